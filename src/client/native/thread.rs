//! The compute thread: the learner, and the files it is loaded from.
//!
//! Separate from the driver because a pass may take as long as it takes, and a ping is answered at once.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, mpsc as thread_mpsc};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::super::{self as client, Held, Learner, Loader, Plan};
use super::{Error, Source};
use crate::compute::Engine;
use crate::data::{self, Dataset, Summary as DataSummary, Tokenize, Tokenizer};
use crate::protocol::message::Gradient;
use crate::protocol::{ActivationsInput, AdapterInput};
use crate::terms::ids::{RoundKey, StepKey};
use crate::terms::moments::Moments;
use crate::terms::speed::Speed;

/// Asked of the compute thread.
pub(super) enum Task {
    Load {
        generation: u64,
        plan: Box<Plan>,
        units: Vec<PathBuf>,
        tokenizer: Option<PathBuf>,
    },
    BeginRound,
    Install {
        values: Vec<f32>,
        moments: Option<Moments>,
    },
    Forward(StepKey),
    Backward {
        key: StepKey,
        gradient: Box<Gradient>,
    },
    Collect {
        round: RoundKey,
        split: u32,
        steps: u64,
    },
}

/// Answered by the compute thread.
pub(super) enum Reply {
    Loaded {
        generation: u64,
        data: Option<DataSummary>,
        speed: Option<Speed>,
    },
    Activations(ActivationsInput),
    StepDone {
        key: StepKey,
        took: Duration,
    },
    Adapter(AdapterInput),
    Failed(Error),
}

pub(super) fn start_thread(
    engine: Engine,
    source: Source,
) -> Result<(thread_mpsc::Sender<Task>, mpsc::Receiver<Reply>), Error> {
    let (tasks, receiver) = thread_mpsc::channel();
    let (sender, replies) = mpsc::channel(16);
    let compute = move || {
        if let Err(error) = pollster::block_on(compute(engine, source, &receiver, &sender)) {
            // Without a driver there is nobody to tell.
            let _ = sender.blocking_send(Reply::Failed(error));
        }
    };
    std::thread::Builder::new()
        .name("client".to_owned())
        .spawn(compute)
        .map_err(|source| Error::File {
            action: "start",
            path: "a thread".to_owned(),
            source,
        })?;
    Ok((tasks, replies))
}

async fn compute(
    engine: Engine,
    source: Source,
    tasks: &thread_mpsc::Receiver<Task>,
    replies: &mpsc::Sender<Reply>,
) -> Result<(), Error> {
    let mut learner: Option<Learner> = None;
    while let Ok(task) = tasks.recv() {
        let reply = match (task, &mut learner) {
            (
                Task::Load {
                    generation,
                    plan,
                    units,
                    tokenizer,
                },
                current,
            ) => {
                // Within one process the data goes on where it stood, whatever is loaded again.
                let held = match current.take() {
                    Some(learner) => Some(learner.release().await?),
                    None => None,
                };
                let (mut loaded, data) = load(&engine, &plan, &source, held, &units, tokenizer.as_deref())?;
                let speed = loaded.speed().await?;
                *current = Some(loaded);
                Some(Reply::Loaded {
                    generation,
                    data,
                    speed,
                })
            }
            (_, None) => None,
            (Task::BeginRound, Some(learner)) => {
                learner.begin_round();
                None
            }
            (Task::Install { values, moments }, Some(learner)) => {
                learner.install(&values, moments).await?;
                None
            }
            (Task::Forward(key), Some(learner)) => Some(Reply::Activations(learner.forward(key).await?)),
            (Task::Backward { key, gradient }, Some(learner)) => {
                let took = learner.backward(*gradient).await?;
                Some(Reply::StepDone { key, took })
            }
            (Task::Collect { round, split, steps }, Some(learner)) => {
                Some(Reply::Adapter(learner.adapter(round, split, steps).await?))
            }
        };
        if let Some(reply) = reply
            && replies.blocking_send(reply).is_err()
        {
            break;
        }
    }
    Ok(())
}

/// What the client measures itself by.
fn clock() -> Duration {
    static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    ORIGIN.elapsed()
}

/// `units` has the files of the plan's last parts, of all that are not on the device at least.
fn load(
    engine: &Engine,
    plan: &Plan,
    source: &Source,
    held: Option<Held>,
    units: &[PathBuf],
    tokenizer: Option<&Path>,
) -> Result<(Learner, Option<DataSummary>), Error> {
    let read = |path: &Path| std::fs::read(path).map_err(|error| Error::file("read", path, error));
    let mut loader = Loader::new(engine, plan, clock, held)?;
    let (examples, summary) = match (loader.take_data(), source) {
        (Some(examples), _) => (examples, None),
        (None, Source::Examples(examples)) => (examples.clone(), None),
        (
            None,
            Source::File {
                path,
                skip_bad_lines,
                columns,
                chat_template,
            },
        ) => {
            let tokenizer = match tokenizer {
                Some(tokenizer) => {
                    let mut tokenizer =
                        Tokenizer::from_json(&read(tokenizer)?, plan.architecture.eos).map_err(client::Error::from)?;
                    if let Some(template) = chat_template {
                        tokenizer = tokenizer.with_chat_template(template).map_err(client::Error::from)?;
                    }
                    tokenizer
                        .check_vocabulary(plan.architecture.vocab)
                        .map_err(client::Error::from)?;
                    Some(tokenizer)
                }
                None => None,
            };
            let tokenize = tokenizer.as_ref().map(|tokenizer| tokenizer as &dyn Tokenize);
            let options = data::Options {
                skip_bad_lines: *skip_bad_lines,
                columns: columns.clone(),
                ..plan.data_options()
            };
            let data = Dataset::load(path, tokenize, &options).map_err(client::Error::from)?;
            (data.examples, Some(data.summary))
        }
    };
    let there = units.len().saturating_sub(loader.missing().len());
    for path in units.iter().skip(there) {
        let file = File::open(path).map_err(|error| Error::file("open", path, error))?;
        loader.add_stored(file)?;
    }
    Ok((loader.finish(examples)?, summary))
}
