//! The main server's compute thread: its side of the model, one step after the other.
//!
//! It is separate from the coordinator, and a thread of its own, so that a slow step never keeps a ping unanswered.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::Error;
use super::coordinator::Input;
use crate::compute::Engine;
use crate::data::{self, Example};
use crate::model::adapter::Adapter;
use crate::model::config::Config;
use crate::model::weights::{Unit, UnitData, WeightDtype, Weights, WeightsError};
use crate::protocol::message::{RoundKey, StepKey};
use crate::protocol::{Contribution, GradientOutput};
use crate::split::{self, Cut, Evaluation, ServerPart, Training};

/// What the worker starts from.
pub struct WorkerSettings {
    pub engine: Engine,
    pub config: Config,
    pub weights: Weights,
    pub dtype: WeightDtype,
    pub cut: usize,
    pub training: Training,
    /// The whole model's adapter at the start.
    pub initial: Adapter,
    pub validation: Option<Vec<Example>>,
    /// Where the whole model's adapter is saved, and what it says it belongs to.
    pub adapter_directory: PathBuf,
    pub base_model: String,
}

/// What the coordinator asks for.
#[derive(Debug)]
pub enum Work {
    /// Loss of the validation data before training.
    Baseline,
    Step {
        key: StepKey,
        contributions: Vec<Contribution>,
    },
    /// Back to the adapter with which the round began.
    Restore,
    /// Takes the clients' average into the whole model's adapter, saves and validates it.
    Close { round: RoundKey, average: Vec<f32> },
    /// Saves the adapter of the last closed round, unless it is.
    Finish,
}

/// What the worker answers.
#[derive(Debug)]
pub enum Done {
    /// The model is loaded.
    Ready,
    Baseline(Option<Evaluation>),
    Step {
        key: StepKey,
        outputs: Vec<GradientOutput>,
        loss: f64,
        tokens: u64,
        elapsed: Duration,
    },
    Closed {
        round: RoundKey,
        evaluation: Option<Evaluation>,
    },
    Finished,
    /// The worker cannot go on.
    Failed(Error),
}

/// Starts the thread. It ends when the returned sender is dropped.
///
/// # Errors
/// [`Error::Thread`] when the operating system refuses.
pub fn start(settings: WorkerSettings, replies: tokio::sync::mpsc::Sender<Input>) -> Result<mpsc::Sender<Work>, Error> {
    let (sender, work) = mpsc::channel();
    let answer = move |done| replies.blocking_send(Input::Computed(done)).is_ok();
    std::thread::Builder::new()
        .name("main server".to_owned())
        .spawn(move || {
            if let Err(error) = pollster::block_on(run(settings, &work, &answer)) {
                answer(Done::Failed(error));
            }
        })
        .map_err(Error::Thread)?;
    Ok(sender)
}

async fn run(
    settings: WorkerSettings,
    work: &mpsc::Receiver<Work>,
    answer: &impl Fn(Done) -> bool,
) -> Result<(), Error> {
    let mut worker = Worker::load(settings)?;
    if !answer(Done::Ready) {
        return Ok(());
    }
    while let Ok(work) = work.recv() {
        let done = match work {
            Work::Baseline => Done::Baseline(worker.evaluate().await?),
            Work::Step { key, contributions } => worker.step(key, contributions).await?,
            Work::Restore => {
                worker.part.set_adapter(&worker.server_values)?;
                continue;
            }
            Work::Close { round, average } => worker.close(round, average).await?,
            Work::Finish => {
                worker.save()?;
                Done::Finished
            }
        };
        if !answer(done) {
            break;
        }
    }
    Ok(())
}

struct Worker {
    part: ServerPart,
    settings: WorkerSettings,
    /// The adapter at the end of the last closed round.
    client_values: Vec<f32>,
    server_values: Vec<f32>,
    saved: bool,
}

impl Worker {
    fn load(mut settings: WorkerSettings) -> Result<Self, Error> {
        let WorkerSettings {
            engine,
            config,
            cut,
            training,
            initial,
            weights,
            dtype,
            ..
        } = &mut settings;
        let client_values = initial.slice(config, 0..*cut)?.values;
        let server_values = initial.slice(config, *cut..config.blocks)?.values;
        let mut units = |unit: Unit| -> Result<UnitData, WeightsError> { weights.unit(unit, *dtype) };
        let part = ServerPart::new(engine, config, &mut units, *cut, training, &server_values)?;
        Ok(Self {
            part,
            settings,
            client_values,
            server_values,
            saved: false,
        })
    }

    async fn step(&mut self, key: StepKey, contributions: Vec<Contribution>) -> Result<Done, Error> {
        let start = Instant::now();
        let wire = self.settings.training.wire;
        let mut members = VecDeque::with_capacity(contributions.len());
        let mut targets = Vec::with_capacity(contributions.len());
        let mut cuts = Vec::with_capacity(contributions.len());
        for contribution in contributions {
            members.push_back(contribution.client);
            targets.push(contribution.targets);
            cuts.push(Cut {
                wire,
                batch: contribution.batch as usize,
                seq: contribution.seq as usize,
                width: contribution.width as usize,
                bytes: contribution.payload,
            });
        }
        let inputs: Vec<split::Contribution<'_>> = cuts
            .iter()
            .zip(&targets)
            .map(|(activations, targets)| split::Contribution { activations, targets })
            .collect();
        let (loss, replies) = self.part.step(&inputs).await?;
        let tokens = replies.iter().map(|reply| reply.tokens as u64).sum();
        let outputs = members
            .into_iter()
            .zip(replies)
            .map(|(client, reply)| GradientOutput {
                client,
                loss: reply.loss as f32,
                payload: reply.gradient.bytes,
            })
            .collect();
        Ok(Done::Step {
            key,
            outputs,
            loss,
            tokens,
            elapsed: start.elapsed(),
        })
    }

    async fn close(&mut self, round: RoundKey, average: Vec<f32>) -> Result<Done, Error> {
        self.server_values = self.part.adapter().await?;
        self.client_values = average;
        self.saved = false;
        self.save()?;
        Ok(Done::Closed {
            round,
            evaluation: self.evaluate().await?,
        })
    }

    /// Writes the whole model's adapter.
    fn save(&mut self) -> Result<(), Error> {
        if self.saved {
            return Ok(());
        }
        let WorkerSettings {
            config,
            cut,
            training,
            adapter_directory,
            base_model,
            ..
        } = &self.settings;
        let client = Adapter::from_values(config, &training.spec, 0..*cut, self.client_values.clone())?;
        let server = Adapter::from_values(config, &training.spec, *cut..config.blocks, self.server_values.clone())?;
        client
            .merge(config, &server)?
            .save(adapter_directory, config, base_model)?;
        self.saved = true;
        Ok(())
    }

    async fn evaluate(&mut self) -> Result<Option<Evaluation>, Error> {
        let Some(examples) = &self.settings.validation else {
            return Ok(None);
        };
        let Training { batch, seq, .. } = self.settings.training;
        let mut batches = data::pass(examples, batch, seq)?.map(|batch| (batch.tokens, batch.targets, batch.seq));
        let (weights, dtype) = (&mut self.settings.weights, self.settings.dtype);
        let mut units = |unit: Unit| -> Result<UnitData, WeightsError> { weights.unit(unit, dtype) };
        Ok(Some(
            self.part
                .evaluate(&mut units, &self.client_values, &mut batches)
                .await?,
        ))
    }
}
