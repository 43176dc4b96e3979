//! Scenarios: what a person writes down about a place, its radio, its devices and the model, in TOML or JSON; and the problem in
//! numbers that follows from it.
//!
//! A scenario starts from a preset and changes what it names. Everything random (places, speeds, fading) is drawn from `seed`,
//! each from a stream of its own, so that more subchannels leave the places as they are.
//!
//! | preset | what it is |
//! |---|---|
//! | `paper` | 5 clients within 20 m, 20 subchannels on 500 kHz, 41.76 dBm each and 46.99 dBm together, GPT-2 small at batch 16 and 512 tokens (arXiv 2504.14667, as far as it is known) |
//! | `cell` | the same clients within 500 m on 10 MHz, 23 dBm each and 30 dBm together |
//! | `selective` | `cell` with Rayleigh fading on every subchannel |
//! | `slow-server` | `cell` on 100 MHz with activations in f16, clients of 0.3 to 10 GHz and a server of a tenth of the speed: computation is what counts, and each client should have its own cut |

mod cost;
mod error;
mod file;
mod problem;

use std::collections::BTreeMap;

pub use cost::{CellCosts, Speeds};
pub use error::ScenarioError;
pub use file::{PRESETS, value_of};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::terms::format::Format;
use crate::terms::tensor::WireForm;

/// A scenario, complete: presets fill in what a file leaves out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The preset it started from.
    pub preset: String,
    /// Of everything drawn.
    pub seed: u64,
    /// The devices.
    pub clients: Clients,
    /// The main server.
    pub server: Processor,
    /// How signals arrive.
    pub channel: Propagation,
    /// The link to the main server.
    pub main: Radio,
    /// The link to the federated server.
    pub federated: Radio,
    /// The gradients' link; absent it costs nothing, as in the paper. `power_total_dbm` is the base station's.
    pub download: Option<Radio>,
    /// The model's shape.
    pub model: Model,
    /// A step's shape, and what is to be chosen.
    pub training: TrainingShape,
    /// What counts beside the delay.
    pub objective: Objective,
}

/// The devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clients {
    /// How many.
    pub count: usize,
    /// Clock rates are drawn between these.
    pub compute_hz: [f64; 2],
    /// One for each client, instead.
    pub compute_hz_each: Option<Vec<f64>>,
    /// Clock cycles for a floating-point operation.
    pub cycles_per_flop: f64,
    /// Places are drawn uniformly from a disc of this radius around each server, no nearer than `distance_min_m`.
    pub radius_m: f64,
    /// Nobody is nearer to a server than this.
    pub distance_min_m: f64,
    /// Distances to the main and the federated server, one for each client, instead.
    pub main_distance_m: Option<Vec<f64>>,
    /// To the federated server, one for each client.
    pub federated_distance_m: Option<Vec<f64>>,
    /// The most a client may send with, on each link.
    pub power_max_dbm: f64,
    /// One for each client, instead.
    pub power_max_dbm_each: Option<Vec<f64>>,
    /// Memory each can give to its part; absent there is no limit.
    pub memory_max_bytes: Option<Vec<f64>>,
    /// Effective switched capacitance ζ: a computation takes `ζ f²` joules a cycle, in J·s²/cycle³.
    pub capacitance: f64,
}

/// The main server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processor {
    /// Clock rate.
    pub compute_hz: f64,
    /// Clock cycles for a floating-point operation.
    pub cycles_per_flop: f64,
}

/// How signals arrive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Propagation {
    /// Noise density.
    pub noise_dbm_per_hz: f64,
    /// Path loss at 1 km, and what a decade of distance adds.
    pub path_loss_intercept_db: f64,
    /// What a decade of distance adds.
    pub path_loss_slope_db: f64,
    /// What differs between subchannels.
    pub fading: Fading,
    /// `[client][subchannel]`, or `[client]` of one entry for all subchannels: signal-to-noise ratios per watt, in 1/W, instead
    /// of geometry.
    pub main_snr_per_watt: Option<Vec<Vec<f64>>>,
    /// Signal-to-noise ratios per watt on the federated link, in 1/W and in the form of `main_snr_per_watt`, instead of geometry.
    pub federated_snr_per_watt: Option<Vec<Vec<f64>>>,
}

/// What differs between subchannels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fading {
    /// Nothing: a flat channel.
    None,
    /// A Rayleigh-distributed amplitude on each.
    Rayleigh,
}

/// A link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Radio {
    /// How many it is divided into.
    pub subchannels: usize,
    /// Of the whole link, divided equally.
    pub bandwidth_hz: f64,
    /// The most all clients together may send with.
    pub power_total_dbm: f64,
}

/// A GPT-2 model's shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Transformer blocks.
    pub blocks: usize,
    /// Values of a token between blocks.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Of the feed-forward layer; absent, four times the width.
    pub ffn: Option<usize>,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// The longest sequence.
    pub positions: usize,
}

/// One step's shape, and what is to be chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingShape {
    /// Sequences of a client's step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Local steps in a round.
    pub local_steps: u32,
    /// How activations and gradients travel: `f32`, `f16` or `int8`.
    #[serde(deserialize_with = "named_wire")]
    pub wire: WireForm,
    /// How frozen weights are held: `f32`, `f16`, `q8` or `q4`; absent, `f16`. A client's memory is counted by it.
    pub weights: Option<Format>,
    /// Adapted matrices.
    pub targets: Vec<String>,
    /// Candidate cuts; absent, all.
    pub splits: Option<Vec<u32>>,
    /// Candidate ranks; absent, all that `rounds` has.
    pub ranks: Option<Vec<u32>>,
    /// E(r): rounds to the target loss at each rank.
    pub rounds: BTreeMap<u32, f64>,
    /// A table measured by `sflllm calibrate`, instead; relative to the scenario's own file.
    pub rounds_file: Option<String>,
}

/// What counts beside the paper's delay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// Seconds that a joule of the clients counts as.
    pub energy_weight_s_per_j: f64,
    /// With this the averaged adapter's way back counts, sent to all at once over the federated link's band.
    pub broadcast_power_dbm: Option<f64>,
}

/// The wire form, or an error that says whose it is.
fn named_wire<'de, D: Deserializer<'de>>(deserializer: D) -> Result<WireForm, D::Error> {
    WireForm::deserialize(deserializer).map_err(|error| D::Error::custom(format!("training.wire: {error}")))
}
