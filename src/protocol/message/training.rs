//! What clients and the two servers tell each other in a run.
//!
//! Separate from `control` because no client ever sends or sees what the servers say between themselves.

use std::fmt;
use std::time::Duration;

use super::Digest;
use crate::terms::adapter::Trained;
use crate::terms::format::Format;
use crate::terms::ids::{RoundKey, RunId, StepKey};
use crate::terms::moments::{MomentPolicy, Moments};
use crate::terms::optimizer::OptimizerSettings;
use crate::terms::speed::Speed;
use crate::terms::tensor::{WireForm, WireLayout, WireTensor};

/// What every client of a run must agree on.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// Blocks the client holds: `[0, split)`.
    pub split: u32,
    pub rank: u32,
    pub alpha: f32,
    /// Adapted matrices, by their short names (`c_attn`, `c_proj`, `c_fc`).
    pub targets: Vec<String>,
    pub weights: Format,
    pub wire: WireForm,
    /// Largest batch of a step.
    pub batch: u32,
    /// Longest sequence of a step.
    pub seq: u32,
    pub width: u32,
    pub vocab: u32,
    pub seed: u64,
    pub shuffle: bool,
    pub local_steps: u32,
    pub rounds: u32,
    pub optimizer: OptimizerSettings,
    pub moments: MomentPolicy,
}

impl RunConfig {
    /// A run with `split` blocks at the clients, on batches of `batch` sequences of at most `seq` tokens, of a model of that `width`
    /// and `vocab`. Rank 8 and alpha 16 of these targets, on f32 weights; 10 rounds of 10 steps; data in the order of seed 0; all
    /// else is the types' own default.
    pub fn new<'a>(
        split: u32,
        (batch, seq): (u32, u32),
        (width, vocab): (u32, u32),
        targets: impl IntoIterator<Item = &'a str>,
    ) -> RunConfig {
        RunConfig {
            split,
            rank: 8,
            alpha: 16.0,
            targets: targets.into_iter().map(str::to_owned).collect(),
            weights: Format::F32,
            wire: WireForm::default(),
            batch,
            seq,
            width,
            vocab,
            seed: 0,
            shuffle: true,
            local_steps: 10,
            rounds: 10,
            optimizer: OptimizerSettings::default(),
            moments: MomentPolicy::Keep,
        }
    }

    /// The largest tensor of a step.
    pub(crate) fn largest_tensor(&self) -> WireLayout {
        WireLayout {
            form: self.wire,
            batch: self.batch,
            seq: self.seq,
            width: self.width,
        }
    }

    /// Whether a step may have a tensor of this layout.
    pub fn takes(&self, layout: WireLayout) -> bool {
        (1..=self.batch).contains(&layout.batch)
            && (1..=self.seq).contains(&layout.seq)
            && (layout.width, layout.form) == (self.width, self.wire)
    }
}

/// A file served over HTTP by its content's hash, at `/weights/<sha256>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    pub name: String,
    pub sha256: Digest,
    pub bytes: u64,
}

impl Blob {
    /// The blob of these bytes.
    pub fn of(name: impl Into<String>, bytes: &[u8]) -> Blob {
        Blob {
            name: name.into(),
            sha256: Digest::of(bytes),
            bytes: bytes.len() as u64,
        }
    }
}

/// What a client needs in order to take part: when it joins, and again whenever the run's cut or rank changes. Its adapter
/// comes later, with the round it starts in.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    pub run: RunId,
    /// Counts the run's assignments; every client has the latest before a round starts.
    pub number: u32,
    pub config: RunConfig,
    /// The model's `config.json`.
    pub model_config: String,
    /// The embedding and the client's blocks, in order.
    pub weights: Vec<Blob>,
    pub tokenizer: Vec<Blob>,
    /// Numbers in the client side's flat adapter.
    pub adapter_len: u64,
    /// Of the whole model, ordered by block and target; where there are any, a client speaks
    /// [`ALPHAS_SINCE`](super::ALPHAS_SINCE).
    pub alphas: Vec<OwnAlpha>,
    /// Which matrices the client trains and sends: all flat adapters of the run are of these. The others are what the run's seed makes
    /// them. Where they are not all, a client speaks [`AGGREGATION_SINCE`](super::AGGREGATION_SINCE).
    pub trained: Trained,
}

impl Assignment {
    /// Of a model without files: no parts, no tokenizer, an adapter of no values, and the run's alpha everywhere.
    pub fn new(run: RunId, config: RunConfig, model_config: String) -> Assignment {
        Assignment {
            run,
            number: 0,
            config,
            model_config,
            weights: Vec::new(),
            tokenizer: Vec::new(),
            adapter_len: 0,
            alphas: Vec::new(),
            trained: Trained::Both,
        }
    }
}

/// A projection of one block with another alpha than the run's. Its rank is the run's.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnAlpha {
    pub block: u32,
    /// As in [`RunConfig::targets`].
    pub target: String,
    pub alpha: f32,
}

/// The rates of a client's emulated uplinks, in bits per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkRates {
    pub main_bits_per_s: f64,
    pub federated_bits_per_s: f64,
}

impl LinkRates {
    /// The fastest that is emulated.
    const MOST: f64 = 1e15;

    /// `None` for rates that no link has: not finite, less than 1, or more than 10^15.
    pub fn new(main_bits_per_s: f64, federated_bits_per_s: f64) -> Option<LinkRates> {
        let possible = |rate: f64| (1.0..=LinkRates::MOST).contains(&rate);
        (possible(main_bits_per_s) && possible(federated_bits_per_s)).then_some(LinkRates {
            main_bits_per_s,
            federated_bits_per_s,
        })
    }
}

/// Main → client: the round begins from the adapter of digest `base`.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundStart {
    pub round: RoundKey,
    pub base: Digest,
    pub members: u32,
    /// The base itself, for a client that was not in the average it comes from.
    pub adapter: Option<Vec<f32>>,
    /// Moments of the blocks that this client did not have before, the last of its own.
    pub moments: Option<Moments>,
    /// How fast the client's uplinks are to be in this round; as fast as they are where there is nothing.
    pub rates: Option<LinkRates>,
}

/// Client → main: the assignment of that number is loaded, the federated service is connected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ready {
    pub assignment: u32,
    /// As measured on the part that is loaded.
    pub speed: Option<Speed>,
}

/// Main → client: send the activations of this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepStart {
    pub key: StepKey,
    pub members: u32,
}

/// Client → main: what crosses the cut.
#[derive(Clone, Debug, PartialEq)]
pub struct Activations {
    pub key: StepKey,
    /// The cut they were made at: blocks run.
    pub split: u32,
    /// Examples in the batch.
    pub examples: u32,
    /// What the forward pass took.
    pub forward: Duration,
    /// `(batch, seq)`; `IGNORED_TARGET` takes no part in the loss.
    pub targets: Vec<i32>,
    /// `(batch, seq, width)`
    pub tensor: WireTensor,
}

/// Main → client: the loss gradient of its activations.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradient {
    pub key: StepKey,
    /// Digest of the bytes of the activations this belongs to.
    pub activations: Digest,
    /// Mean loss of this client's targets.
    pub loss: f32,
    /// Targets of this client that took part.
    pub tokens: u64,
    /// Mean loss over the targets of all members who had been answered by then, this one among them.
    pub mean_loss: f32,
    /// `(batch, seq, width)`: `d loss / d activations`.
    pub tensor: WireTensor,
}

/// Client → main: the backward pass and the optimiser step are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepDone {
    pub key: StepKey,
    /// What they took.
    pub backward: Duration,
}

/// Main → client: the round's steps are done; send the adapter to the federated server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundEnd {
    pub round: RoundKey,
    /// Blocks the client will hold afterwards. The moments of those that leave it go with the adapter …
    pub split: u32,
    /// … as after so many optimiser steps.
    pub steps: u64,
}

/// Client → federated: its adapter after the round's last local step.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterUpdate {
    pub run: RunId,
    pub round: RoundKey,
    /// Digest of the adapter the round started from.
    pub base: Digest,
    /// Examples used in the round: its weight.
    pub examples: u64,
    pub values: Vec<f32>,
    /// Of the blocks that leave the client, the last of its own.
    pub moments: Option<Moments>,
}

/// Federated → client: the average of the round's adapters, as far as the client's blocks go.
#[derive(Clone, Debug, PartialEq)]
pub struct Average {
    pub round: RoundKey,
    pub digest: Digest,
    pub values: Vec<f32>,
}

/// Federated → client: an update that came too late or for another round. The client waits for its next round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpdateDeclined {
    pub round: RoundKey,
    /// The round that is open, if one is.
    pub open: Option<RoundKey>,
    pub detail: String,
}

/// Main → client, after each round: for people.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundResult {
    pub round: u32,
    pub rounds: u32,
    /// Adapters in the average.
    pub included: u32,
    /// Mean validation loss, when the server validates.
    pub valid_loss: Option<f64>,
    /// Local steps done in the run so far.
    pub steps: u32,
    pub total_steps: u32,
}

/// Why a server ends a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StopReason {
    /// The run has done all its rounds.
    Completed,
    /// The server is going down or was told to stop.
    Shutdown,
    /// A message that has no place where it came.
    Unexpected,
    /// Activations or an adapter that cannot be used.
    BadUpdate,
    /// Left out of the round by the federated server. Joining again is welcome.
    Excluded,
    /// The same client opened another connection.
    Superseded,
    /// It was waited for in vain too often.
    Late,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StopReason::Completed => "the run is complete",
            StopReason::Shutdown => "the server stopped",
            StopReason::Unexpected => "the server did not expect a message",
            StopReason::BadUpdate => "the server could not use an update",
            StopReason::Excluded => "left out of the round",
            StopReason::Superseded => "this client is connected elsewhere",
            StopReason::Late => "this client is too slow for the run",
        })
    }
}

/// Server → client: the session is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    pub reason: StopReason,
    pub detail: String,
    /// When to come back, if that makes sense.
    pub return_after: Option<Duration>,
}
