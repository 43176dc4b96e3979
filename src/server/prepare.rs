//! A run from its settings, or from what an interrupted one has left: the clients' part of the model, the session, and the keeper's thread.
//!
//! Separate from the server that listens, which is the same whatever it serves.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::coordinator::{About, Keeping, MainRun};
use super::inbox::{Input, Side};
use super::keeper::{self, Beginning};
use super::kept::{Identity, Interrupted};
use super::planner::LARGEST_RANK;
use super::store::Blobs;
use super::{Error, Model, Role, Run, listen, worker};
use crate::model::adapter::{Adapter, AdapterLayout, LoraSpec, Target};
use crate::model::architecture::Architecture;
use crate::model::weights::HeldUnits;
use crate::protocol::message::{Assignment, Blob, OwnAlpha, RunConfig};
use crate::protocol::{Bearers, Checkpoint, MAX_FRAME_BYTES, MainConfig, MainServerSession, Placement};
use crate::runs::directory::RunDirectory;
use crate::split;
use crate::terms::ids::RunId;

/// Whether a run begins or goes on.
pub(super) enum History {
    New,
    Interrupted(Box<Interrupted>),
}

impl Run {
    /// Makes it the run that was interrupted: with its cut, its rank and its adapter.
    fn take_up(&mut self, interrupted: &Interrupted, path: &str) -> Result<(), Error> {
        let Checkpoint {
            placement,
            adapter,
            exact,
            ..
        } = &interrupted.checkpoint;
        let other = |reason: String| Error::OtherModel {
            path: path.to_owned(),
            reason,
        };
        let architecture = &self.model.architecture;
        let config = &placement.assignment.config;
        self.cut = placement.split() as usize;
        if self.training.spec.rank != config.rank as usize {
            self.training.spec = LoraSpec {
                trained: self.training.spec.trained,
                ..LoraSpec::new(config.rank as usize, config.alpha, self.training.spec.targets.clone())?
            };
        }
        // What is not trained is what the run's seed makes it.
        let Adapter { layout, mut values, .. } =
            Adapter::init(architecture, &self.training.spec, 0..self.cut, self.seed)?;
        let below = (placement.adapter.get(..layout.trained_len())).unwrap_or(&placement.adapter);
        (layout.scatter(below, &mut values)).map_err(|error| other(error.to_string()))?;
        values.extend(adapter);
        let fault = match (exact, &placement.rule) {
            (Some(exact), Some(rule)) => {
                // The cut may have been moved since they were made.
                let blocks = exact.ranks.len() / rule.shape().matrices().len();
                exact.fault(rule.shape(), blocks.min(architecture.blocks))
            }
            (Some(_), None) => Some("products that no rule makes".to_owned()),
            (None, _) => None,
        };
        if let Some(fault) = fault {
            return Err(other(fault));
        }
        self.initial = Adapter::from_values(architecture, &self.training.spec, 0..architecture.blocks, values)
            .map_err(|error| other(error.to_string()))?;
        Ok(())
    }
}

/// Writes the clients' part of the model, starts loading the server's, and makes the session.
pub(super) fn prepare(
    mut run: Run,
    role: &Role,
    secret: Option<String>,
    directory: &mut RunDirectory,
    inputs: mpsc::Sender<Input>,
    history: History,
    now: Duration,
) -> Result<(MainRun, Arc<Blobs>, Bearers), Error> {
    let path = directory.path().display().to_string();
    if let History::Interrupted(interrupted) = &history {
        run.take_up(interrupted, &path)?;
    }
    let mut run_config = run_config(&run);
    let Run {
        model,
        engine,
        training,
        cut,
        initial,
        validation,
        rounds,
        local_steps,
        clients,
        wait,
        deadline,
        quorum,
        aggregation,
        ranks,
        planner,
        ..
    } = run;
    let Model {
        name,
        digest,
        architecture,
        weights,
        holding,
        tokenizer,
    } = model;
    if cut == 0 || cut >= architecture.blocks {
        return Err(split::Error::Split {
            cut,
            blocks: architecture.blocks,
        }
        .into());
    }
    // Clients' own cuts go further than the smallest.
    let largest = match &history {
        History::New => cut,
        History::Interrupted(interrupted) => interrupted.checkpoint.placement.assignment.config.split as usize,
    };
    let blobs = Arc::new(Blobs::create(&directory.weights())?);
    let parts = {
        let mut units = HeldUnits {
            weights: &weights,
            holding,
        };
        keeper::parts(&mut units, &blobs, &[], largest)?
    };
    let mut tokenizer_files: Vec<Blob> = Vec::new();
    if let Some(json) = &tokenizer {
        tokenizer_files.push(blobs.add("tokenizer.json", |output| output.write_all(json))?);
    }

    run_config.split = u32::try_from(largest).unwrap_or(u32::MAX);
    let below = initial.slice(&architecture, 0..largest)?;
    let rule = keeper::rule(aggregation, &below.layout)?;
    let assignment = Assignment {
        run: RunId(rand::random()),
        number: 0,
        config: run_config,
        model_config: architecture.to_json(),
        weights: parts.clone(),
        tokenizer: tokenizer_files,
        adapter_len: below.layout.trained_len() as u64,
        alphas: alphas(&training.spec),
        trained: training.spec.trained,
    };
    let (identity, placement, side, resumed) = match history {
        History::New => {
            let identity = Identity {
                run: assignment.run,
                ticket_key: rand::random(),
                token: secret.clone(),
                control_key: match role {
                    Role::Main { control_key, .. } => Some(control_key.clone()),
                    _ => None,
                },
            };
            let placement = Placement {
                rule,
                ranks: ranks.clone(),
                ..Placement::new(assignment, below.layout.gather(&below.values))
            };
            let side = Side::new(initial.slice(&architecture, cut..architecture.blocks)?.values);
            (identity, placement, side, None)
        }
        History::Interrupted(interrupted) => {
            let identity = interrupted.identity.clone();
            let Checkpoint {
                round,
                placement,
                adapter,
                moments,
                exact,
            } = interrupted.checkpoint.clone();
            let before = &placement.assignment;
            let same = Assignment {
                run: before.run,
                number: before.number,
                ..assignment
            };
            let is_same = same == *before && (&placement.rule, &placement.ranks) == (&rule, &ranks);
            if !is_same || identity.run != before.run {
                return Err(Error::OtherModel {
                    path,
                    reason: "the model, its tokenizer, the way its weights are held or an option is not what the run began with".to_owned(),
                });
            }
            let side = Side {
                values: adapter,
                moments,
                exact,
            };
            (identity, placement, side, Some((round, interrupted)))
        }
    };
    let RunConfig { rank, alpha, .. } = placement.assignment.config;
    directory.note(json!({
        "run": identity.run.to_string(),
        "plan": { "split": cut, "rank": rank, "alpha": alpha, "rounds": rounds, "local_steps": local_steps },
        "device": engine.name(),
        "model": { "name": name, "sha256": digest.to_string(), "config": serde_json::from_str::<Value>(&placement.assignment.model_config).unwrap_or_default() },
    }))?;
    let bearers = Bearers::new(identity.run, identity.ticket_key, secret.clone());
    let config = MainConfig {
        secret,
        largest_update: match planner {
            Some(_) => largest_update(&architecture, &training.spec),
            None => placement.assignment.adapter_len,
        },
        plans: planner.is_some(),
        model: digest,
        federated_url: match role {
            Role::Main { federated, .. } => Some(listen::join_link(
                &federated.origin.to_string(),
                None,
                federated.fingerprint,
            )),
            _ => None,
        },
        wait_for_client: wait,
        deadline,
        quorum,
        ..MainConfig::new(placement.clone(), identity.ticket_key, clients)
    };
    let (session, keeping) = match resumed {
        None => (MainServerSession::new(config, now)?, Keeping::Begins(identity)),
        Some((round, interrupted)) => {
            let session = MainServerSession::resume(config, &interrupted.state, round, now)?;
            (session, Keeping::Kept(interrupted.into_kept()))
        }
    };
    let about = About {
        model: name.clone(),
        architecture: architecture.clone(),
        training: training.clone(),
        aggregation,
        weights: weights.format(holding),
        rounds,
        local_steps,
        validates: validation.is_some(),
    };
    let side = Arc::new(side);
    let work = worker::start(
        keeper::KeeperSettings {
            engine,
            architecture,
            weights,
            holding,
            cut,
            training,
            initial,
            beginning: Beginning {
                side: side.clone(),
                client_values: below.values,
                cuts: (placement.cuts.into_iter())
                    .map(|(client, cut)| (client, cut as usize))
                    .collect(),
            },
            assignment: placement.assignment,
            parts,
            blobs: blobs.clone(),
            planner,
            aggregation,
            ranks,
            validation,
            adapter_directory: directory.adapter(),
            base_model: name,
        },
        inputs,
    )?;
    Ok((MainRun::new(session, work, about, side, keeping), blobs, bearers))
}

/// Numbers in the largest update that a planner's choices lead to: of all blocks but one, each value with two moments.
fn largest_update(architecture: &Architecture, spec: &LoraSpec) -> u64 {
    let spec = LoraSpec {
        rank: spec.rank.max(LARGEST_RANK),
        ..spec.clone()
    };
    // A frame has no room for more; a plan that needs it is refused when it comes.
    let most = MAX_FRAME_BYTES as u64 / 5;
    match AdapterLayout::new(architecture, &spec, 0..architecture.blocks.saturating_sub(1)) {
        Ok(layout) => most.min(3 * layout.len() as u64),
        Err(_) => most,
    }
}

fn run_config(run: &Run) -> RunConfig {
    let training = &run.training;
    let size = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    RunConfig {
        split: size(run.cut),
        rank: size(training.spec.rank),
        alpha: training.spec.alpha,
        targets: training
            .spec
            .targets
            .iter()
            .copied()
            .map(Target::module)
            .map(str::to_owned)
            .collect(),
        weights: run.model.weights.format(run.model.holding),
        wire: training.wire,
        batch: size(training.batch),
        seq: size(training.seq),
        width: size(run.model.architecture.width),
        vocab: size(run.model.architecture.vocab),
        seed: run.seed,
        shuffle: run.shuffle,
        local_steps: run.local_steps,
        rounds: run.rounds,
        optimizer: training.optimizer,
        moments: run.aggregation.moments(),
    }
}

/// The alphas of a spec that has one rank.
fn alphas(spec: &LoraSpec) -> Vec<OwnAlpha> {
    (spec.exceptions.iter())
        .map(|exception| OwnAlpha {
            block: u32::try_from(exception.block).unwrap_or(u32::MAX),
            target: exception.target.module().to_owned(),
            alpha: exception.alpha,
        })
        .collect()
}
