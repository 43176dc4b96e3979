//! The machine's tasks, carried out on a device.
//!
//! Separate from loading and training themselves, which know nothing of each other: this takes a client from one assignment to
//! the next. Files are not its business: whoever has them puts them into [`Trainer::loader`] between `Assign` and `Load`.

use sha2::{Digest as _, Sha256};

use super::edge::{Done, Task, Wanted};
use super::{Error, Learner, Loader, Plan};
use crate::compute::Engine;
use crate::data::Example;
use crate::protocol::message::{Assignment, Digest};
use crate::split::Clock;

/// A client's part of a model, from one assignment to the next.
pub struct Trainer {
    engine: Engine,
    clock: Clock,
    stage: Stage,
    /// Of the examples, since they were read.
    data: Option<Digest>,
}

#[derive(Default)]
enum Stage {
    #[default]
    Empty,
    Loading(Box<Loader>),
    Learning(Box<Learner>),
}

impl Trainer {
    /// `clock` is what the client measures itself by.
    pub fn new(engine: &Engine, clock: Clock) -> Self {
        Self {
            engine: engine.clone(),
            clock,
            stage: Stage::Empty,
            data: None,
        }
    }

    /// The assignment that is being loaded or trained.
    pub fn plan(&self) -> Option<&Plan> {
        match &self.stage {
            Stage::Empty => None,
            Stage::Loading(loader) => Some(loader.plan()),
            Stage::Learning(learner) => Some(learner.plan()),
        }
    }

    /// Takes what an assignment still lacks.
    pub fn loader(&mut self) -> Option<&mut Loader> {
        match &mut self.stage {
            Stage::Loading(loader) => Some(loader),
            Stage::Empty | Stage::Learning(_) => None,
        }
    }

    /// Carries out a task.
    ///
    /// # Errors
    /// [`Error`]: this device cannot go on. [`Error::Assignment`] for a task before there was what it needs, too.
    pub async fn run(&mut self, task: Task) -> Result<Done, Error> {
        match (task, &mut self.stage) {
            (Task::Assign(assignment), _) => self.assign(&assignment).await,
            (Task::Load, _) => self.load().await,
            (task, Stage::Learning(learner)) => train(learner, task).await,
            (_, Stage::Empty | Stage::Loading(_)) => Err(not_loaded()),
        }
    }

    async fn assign(&mut self, assignment: &Assignment) -> Result<Done, Error> {
        let plan = Plan::new(assignment)?;
        // The data goes on where it stood, whatever is loaded again.
        let held = match std::mem::take(&mut self.stage) {
            Stage::Empty => None,
            Stage::Loading(loader) => Some(loader.release()),
            Stage::Learning(learner) => Some(learner.release().await?),
        };
        let loader = Loader::new(&self.engine, &plan, self.clock, held)?;
        let wanted = Wanted {
            weights: loader.missing().to_vec(),
            tokenizer: plan.tokenizer().filter(|_| loader.needs_data()).cloned(),
        };
        if loader.needs_data() {
            self.data = None;
        }
        self.stage = Stage::Loading(Box::new(loader));
        Ok(Done::Assigned(wanted))
    }

    async fn load(&mut self) -> Result<Done, Error> {
        let Stage::Loading(mut loader) = std::mem::take(&mut self.stage) else {
            return Err(not_loaded());
        };
        let examples = loader.take_data().ok_or_else(not_loaded)?;
        let data = *self.data.get_or_insert_with(|| digest(&examples));
        let mut learner = loader.finish(examples)?;
        let speed = learner.speed().await?;
        self.stage = Stage::Learning(Box::new(learner));
        Ok(Done::Loaded {
            speed,
            data,
            summary: None,
        })
    }
}

async fn train(learner: &mut Learner, task: Task) -> Result<Done, Error> {
    Ok(match task {
        Task::BeginRound { restore, keep, .. } => {
            learner.begin_round(restore.as_deref()).await?;
            Done::Began(match keep {
                true => Some(learner.standing().await?),
                false => None,
            })
        }
        Task::Install { values, moments } => {
            learner.install(&values, moments).await?;
            Done::Installed
        }
        Task::Forward(key) => Done::Activations(learner.forward(key).await?),
        Task::Backward { gradient, .. } => Done::StepDone {
            took: learner.backward(*gradient).await?,
        },
        Task::Collect { round, split, steps } => {
            let (input, standing) = learner.adapter(round, split, steps).await?;
            Done::Adapter(input, standing)
        }
        Task::Assign(_) | Task::Load => return Err(not_loaded()),
    })
}

fn not_loaded() -> Error {
    Error::Assignment("it was not loaded".to_owned())
}

/// By which examples are known again: of their ids and labels, in their order.
fn digest(examples: &[Example]) -> Digest {
    let mut hash = Sha256::new();
    for example in examples {
        hash.update((example.ids.len() as u64).to_le_bytes());
        example.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        hash.update((example.labels.len() as u64).to_le_bytes());
        example.labels.iter().for_each(|label| hash.update(label.to_le_bytes()));
    }
    Digest(hash.finalize().into())
}
