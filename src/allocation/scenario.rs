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

use std::collections::BTreeMap;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use super::channel::{Channel, MAX_SUBCHANNELS, SnrPerWatt, dbm_to_w, path_loss_db, snr_per_watt};
use super::delay::{Broadcast, Cell, Problem};
use super::{Error, LinkName};
use crate::model::adapter::LoraSpec;
use crate::model::architecture::{Architecture, ArchitectureError};
use crate::model::cost::{Convention, Workload};
use crate::model::rounds::{RoundsError, RoundsTable};
use crate::model::workspace::Extent;
use crate::terms::format::Format;
use crate::terms::tensor::WireForm;

/// Why a scenario cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    #[error("not valid JSON: {0}")]
    Json(serde_json::Error),
    /// Valid JSON or TOML, and no scenario: a field that is unknown, missing or of another type.
    #[error("{0}")]
    Shape(serde_json::Error),
    #[error("not valid TOML: {0}")]
    Toml(toml::de::Error),
    #[error("`{name}` is no preset; choose paper, cell, selective or slow-server")]
    Preset { name: String },
    #[error("{field}: {reason}")]
    Field { field: &'static str, reason: String },
    #[error("[model]: {0}")]
    Model(ArchitectureError),
    #[error("rounds_file: {0}")]
    Rounds(RoundsError),
    #[error(transparent)]
    Problem(#[from] Error),
    #[cfg(not(target_arch = "wasm32"))]
    #[error("cannot read {path}: {source}")]
    Read { path: String, r#source: std::io::Error },
}

impl From<serde_json::Error> for ScenarioError {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(error)
    }
}

impl From<toml::de::Error> for ScenarioError {
    fn from(error: toml::de::Error) -> Self {
        Self::Toml(error)
    }
}

impl From<ArchitectureError> for ScenarioError {
    fn from(error: ArchitectureError) -> Self {
        Self::Model(error)
    }
}

impl From<RoundsError> for ScenarioError {
    fn from(error: RoundsError) -> Self {
        Self::Rounds(error)
    }
}

/// A scenario, complete: presets fill in what a file leaves out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The preset it started from.
    pub preset: String,
    /// Of everything drawn.
    pub seed: u64,
    pub clients: Clients,
    pub server: Processor,
    pub channel: Propagation,
    pub main: Radio,
    pub federated: Radio,
    /// The gradients' link; absent it costs nothing, as in the paper. `power_total_dbm` is the base station's.
    pub download: Option<Radio>,
    pub model: Model,
    pub training: TrainingShape,
    pub objective: Objective,
}

/// The devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clients {
    pub count: usize,
    /// Clock rates are drawn between these.
    pub compute_hz: [f64; 2],
    /// One for each client, instead.
    pub compute_hz_each: Option<Vec<f64>>,
    /// Clock cycles for a floating-point operation.
    pub cycles_per_flop: f64,
    /// Places are drawn uniformly from a disc of this radius around each server, no nearer than `distance_min_m`.
    pub radius_m: f64,
    pub distance_min_m: f64,
    /// Distances to the main and the federated server, one for each client, instead.
    pub main_distance_m: Option<Vec<f64>>,
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
    pub compute_hz: f64,
    /// Clock cycles for a floating-point operation.
    pub cycles_per_flop: f64,
}

/// How signals arrive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Propagation {
    pub noise_dbm_per_hz: f64,
    /// Path loss at 1 km, and what a decade of distance adds.
    pub path_loss_intercept_db: f64,
    pub path_loss_slope_db: f64,
    pub fading: Fading,
    /// `[client][subchannel]`, or `[client]` of one entry for all subchannels: signal-to-noise ratios per watt, in 1/W, instead
    /// of geometry.
    pub main_snr_per_watt: Option<Vec<Vec<f64>>>,
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
    pub blocks: usize,
    pub width: usize,
    pub heads: usize,
    /// Of the feed-forward layer; absent, four times the width.
    pub ffn: Option<usize>,
    pub vocab: usize,
    pub positions: usize,
}

/// One step's shape, and what is to be chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingShape {
    pub batch: usize,
    pub seq: usize,
    /// Local steps in a round.
    pub local_steps: u32,
    /// How activations and gradients travel: `f32`, `f16` or `int8`.
    #[serde(deserialize_with = "named_wire")]
    pub wire: WireForm,
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

/// What the devices do in a second.
#[derive(Clone, Debug, PartialEq)]
pub struct Speeds {
    /// `[client]`, in FLOP/s.
    pub client_forward: Vec<f64>,
    pub client_backward: Vec<f64>,
    /// In FLOP/s, over forward and backward.
    pub server: f64,
}

/// What one local step takes on given devices, for the cells of a problem.
pub struct CellCosts<'a> {
    pub workload: &'a Workload,
    pub speeds: &'a Speeds,
    pub wire: WireForm,
    pub weights: Format,
    /// `[client]`: joules for a floating-point operation.
    pub joules_per_flop: Vec<f64>,
}

impl CellCosts<'_> {
    /// The cells of `splits` and `ranks`.
    pub fn cells(&self, splits: &[u32], ranks: &[u32]) -> Vec<Vec<Cell>> {
        let row = |&split: &u32| {
            ranks
                .iter()
                .map(|&rank| self.cell(split as usize, rank as usize))
                .collect()
        };
        splits.iter().map(row).collect()
    }

    fn cell(&self, split: usize, rank: usize) -> Cell {
        let Self { workload, speeds, .. } = self;
        let clients = speeds.client_forward.len();
        let (forward, backward) = (
            workload.client_forward_flops(split, rank),
            workload.client_backward_flops(split, rank),
        );
        let memory = workload.client_memory_bytes(split, rank, self.weights, self.wire);
        let activation_bits = workload.activation_bits(self.wire);
        Cell {
            client_forward_s: speeds.client_forward.iter().map(|speed| forward / speed).collect(),
            client_backward_s: speeds.client_backward.iter().map(|speed| backward / speed).collect(),
            server_s: clients as f64 * workload.server_flops(split, rank) / speeds.server,
            upload_bits: activation_bits + workload.label_bits(),
            adapter_bits: workload.adapter_bits(split, rank),
            gradient_bits: activation_bits,
            compute_j: (self.joules_per_flop.iter())
                .map(|joules| joules * (forward + backward))
                .collect(),
            memory_bytes: vec![memory; clients],
        }
    }
}

/// The names of the presets.
pub const PRESETS: [&str; 4] = ["paper", "cell", "selective", "slow-server"];

/// A preset in the form of a file.
fn preset(name: &str) -> Option<Value> {
    let paper = json!({
        "preset": "paper",
        "seed": 0,
        "clients": {
            "count": 5,
            "compute_hz": [1.0e9, 1.6e9],
            "cycles_per_flop": 1.0 / 1024.0,
            "radius_m": 20.0,
            "distance_min_m": 1.0,
            "power_max_dbm": 41.76,
            "capacitance": 1e-28,
        },
        "server": { "compute_hz": 5.0e9, "cycles_per_flop": 1.0 / 32768.0 },
        "channel": {
            "noise_dbm_per_hz": -174.0,
            "path_loss_intercept_db": 128.1,
            "path_loss_slope_db": 37.6,
            "fading": "none",
        },
        "main": { "subchannels": 20, "bandwidth_hz": 500e3, "power_total_dbm": 46.99 },
        "federated": { "subchannels": 20, "bandwidth_hz": 500e3, "power_total_dbm": 46.99 },
        "model": { "blocks": 12, "width": 768, "heads": 12, "vocab": 50257, "positions": 1024 },
        "training": {
            "batch": 16,
            "seq": 512,
            "local_steps": 12,
            "wire": "f32",
            "targets": ["c_attn"],
            "rounds": { "1": 92.0, "2": 74.0, "4": 64.0, "6": 61.0, "8": 60.0 },
        },
        "objective": { "energy_weight_s_per_j": 0.0 },
    });
    let changes = match name {
        "paper" => return Some(paper),
        "cell" | "selective" | "slow-server" => json!({
            "preset": name,
            "clients": { "radius_m": 500.0, "power_max_dbm": 23.0 },
            "main": { "bandwidth_hz": 10e6, "power_total_dbm": 30.0 },
            "federated": { "bandwidth_hz": 10e6, "power_total_dbm": 30.0 },
        }),
        _ => return None,
    };
    let cell = merge(paper, changes);
    Some(match name {
        "selective" => merge(cell, json!({ "channel": { "fading": "rayleigh" } })),
        "slow-server" => merge(
            cell,
            json!({
                "clients": { "compute_hz": [0.3e9, 10e9] },
                "server": { "compute_hz": 0.5e9 },
                "main": { "bandwidth_hz": 100e6 },
                "federated": { "bandwidth_hz": 100e6 },
                "training": { "wire": "f16" },
            }),
        ),
        _ => cell,
    })
}

/// `base` with what `changes` says. Tables are merged, all else is replaced, and so is the table E(r): a rank that is not measured
/// must not keep another model's number.
fn merge(base: Value, changes: Value) -> Value {
    match (base, changes) {
        (Value::Object(mut base), Value::Object(changes)) => {
            for (key, change) in changes {
                let merged = match base.remove(&key) {
                    Some(value) if key != "rounds" => merge(value, change),
                    _ => change,
                };
                base.insert(key, merged);
            }
            Value::Object(base)
        }
        (_, changes) => changes,
    }
}

impl Scenario {
    /// A preset.
    ///
    /// # Errors
    /// [`ScenarioError::Preset`].
    pub fn preset(name: &str) -> Result<Self, ScenarioError> {
        Self::from_value(json!({ "preset": name }))
    }

    /// Reads JSON, if it starts like an object, or TOML. A `rounds_file` is left to [`Scenario::load`].
    ///
    /// # Errors
    /// [`ScenarioError`] names the field.
    pub fn from_text(text: &str) -> Result<Self, ScenarioError> {
        Self::from_value(value_of(text)?)
    }

    /// The same from a parsed file. Without a `preset` it starts from `paper`.
    ///
    /// # Errors
    /// [`ScenarioError`] names the field.
    pub fn from_value(value: Value) -> Result<Self, ScenarioError> {
        let name = match value.get("preset") {
            None => "paper".to_owned(),
            Some(Value::String(name)) => name.clone(),
            Some(other) => {
                return Err(ScenarioError::Preset {
                    name: other.to_string(),
                });
            }
        };
        let base = preset(&name).ok_or(ScenarioError::Preset { name })?;
        serde_json::from_value(merge(base, value)).map_err(ScenarioError::Shape)
    }

    /// Reads a file, and the table of rounds it names.
    ///
    /// # Errors
    /// [`ScenarioError`] names the file or field.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(path: &std::path::Path) -> Result<Self, ScenarioError> {
        let text = std::fs::read_to_string(path).map_err(|source| ScenarioError::Read {
            path: path.display().to_string(),
            source,
        })?;
        let mut scenario = Self::from_text(&text)?;
        scenario.load_rounds(path.parent().unwrap_or(std::path::Path::new("")))?;
        Ok(scenario)
    }

    /// Reads the table that `rounds_file` names, relative to `directory`.
    ///
    /// # Errors
    /// [`ScenarioError::Rounds`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load_rounds(&mut self, directory: &std::path::Path) -> Result<(), ScenarioError> {
        if let Some(file) = &self.training.rounds_file {
            let table = RoundsTable::load(&directory.join(file))?;
            self.set_rounds(&table)?;
        }
        Ok(())
    }

    /// Takes E(r) from a measured table.
    ///
    /// # Errors
    /// [`ScenarioError::Rounds`] when a rank has none.
    pub fn set_rounds(&mut self, table: &RoundsTable) -> Result<(), ScenarioError> {
        self.training.rounds = match &self.training.ranks {
            Some(ranks) => (ranks.iter())
                .map(|&rank| Ok((rank, table.rounds_at(rank as usize)?)))
                .collect::<Result<_, RoundsError>>()?,
            None => (table.measured()?.into_iter())
                .map(|(rank, rounds)| (u32::try_from(rank).unwrap_or(u32::MAX), rounds))
                .collect(),
        };
        Ok(())
    }

    /// The scenario with other values, in the form of a file: `{"clients": {"count": 100}}`.
    ///
    /// # Errors
    /// [`ScenarioError::Shape`] names an unknown field.
    pub fn with(&self, changes: Value) -> Result<Self, ScenarioError> {
        let base = without_nulls(serde_json::to_value(self)?);
        serde_json::from_value(merge(base, changes)).map_err(ScenarioError::Shape)
    }

    /// The model's shape.
    ///
    /// # Errors
    /// [`ScenarioError::Model`] names the field.
    pub fn config(&self) -> Result<Architecture, ScenarioError> {
        let model = &self.model;
        Ok(Architecture::from_json(
            &json!({
                "model_type": "gpt2", "n_layer": model.blocks, "n_embd": model.width, "n_head": model.heads,
                "n_inner": model.ffn, "vocab_size": model.vocab, "n_positions": model.positions,
            })
            .to_string(),
        )?)
    }

    /// The work of a step.
    ///
    /// # Errors
    /// [`ScenarioError`] names the field.
    pub fn workload(&self) -> Result<Workload, ScenarioError> {
        let config = self.config()?;
        let TrainingShape { batch, seq, .. } = self.training;
        let tokens = batch.saturating_mul(seq);
        if tokens == 0 || tokens > MAX_TOKENS || seq > config.positions {
            return Err(field(
                "training.batch, training.seq",
                format!(
                    "{batch} × {seq} is not a batch for a model of {} positions",
                    config.positions
                ),
            ));
        }
        let targets = LoraSpec::parse_targets(&config, &self.training.targets.join(","))
            .map_err(|error| field("training.targets", error.to_string()))?;
        Ok(Workload::new(
            &config,
            &targets,
            Extent { batch, seq },
            Convention::Dense,
        ))
    }

    /// Candidate cuts.
    ///
    /// # Errors
    /// [`ScenarioError::Field`] for one that leaves a side without a block.
    pub fn splits(&self) -> Result<Vec<u32>, ScenarioError> {
        let blocks = u32::try_from(self.config()?.blocks).unwrap_or(u32::MAX);
        let splits = match &self.training.splits {
            Some(splits) => splits.clone(),
            None => (1..blocks).collect(),
        };
        match splits.iter().find(|&&split| split == 0 || split >= blocks) {
            Some(split) => Err(field(
                "training.splits",
                format!("{split} does not leave a block on each side of {blocks}"),
            )),
            None if splits.is_empty() => Err(field("training.splits", "there is none".to_owned())),
            None => Ok(splits),
        }
    }

    /// Candidate ranks with their E(r).
    ///
    /// # Errors
    /// [`Error::Rounds`] for a rank without.
    pub fn ranks(&self) -> Result<Vec<(u32, f64)>, ScenarioError> {
        let rounds = &self.training.rounds;
        let ranks = match &self.training.ranks {
            Some(ranks) => ranks.clone(),
            None => rounds.keys().copied().collect(),
        };
        if ranks.is_empty() {
            return Err(field("training.rounds", "there is no rank".to_owned()));
        }
        ranks
            .into_iter()
            .map(|rank| match rounds.get(&rank) {
                _ if rank == 0 => Err(field("training.ranks", "a rank is at least 1".to_owned())),
                Some(&rounds) if rounds.is_finite() && rounds > 0.0 => Ok((rank, rounds)),
                found => Err(Error::Rounds {
                    rank,
                    rounds: found.copied(),
                }
                .into()),
            })
            .collect()
    }

    /// The number of clients, before anything of that size is made.
    fn client_count(&self) -> Result<usize, ScenarioError> {
        let clients = self.clients.count;
        let links = [
            (LinkName::Main, Some(&self.main)),
            (LinkName::Federated, Some(&self.federated)),
            (LinkName::Download, self.download.as_ref()),
        ];
        for (link, radio) in links {
            let Some(&Radio { subchannels, .. }) = radio else {
                continue;
            };
            if subchannels > MAX_SUBCHANNELS {
                return Err(Error::TooManySubchannels { link, subchannels }.into());
            }
            if clients > subchannels {
                return Err(Error::TooFewSubchannels {
                    link,
                    clients,
                    subchannels,
                }
                .into());
            }
        }
        match clients {
            0 => Err(Error::NoClients.into()),
            _ => Ok(clients),
        }
    }

    /// The clients' clock rates, in Hz.
    ///
    /// # Errors
    /// [`ScenarioError::Field`].
    pub fn client_compute_hz(&self) -> Result<Vec<f64>, ScenarioError> {
        let count = self.client_count()?;
        let [low, high] = self.clients.compute_hz;
        if let Some(each) = &self.clients.compute_hz_each {
            return each_client("clients.compute_hz_each", each, count);
        }
        if !(low.is_finite() && high.is_finite() && low > 0.0 && low <= high) {
            return Err(field(
                "clients.compute_hz",
                format!("[{low}, {high}] is no range above 0"),
            ));
        }
        let mut rng = self.stream(Stream::Compute);
        Ok((0..count).map(|_| between(&mut rng, low, high)).collect())
    }

    /// What the devices of the scenario do in a second.
    ///
    /// # Errors
    /// [`ScenarioError::Field`].
    pub fn speeds(&self) -> Result<Speeds, ScenarioError> {
        above_zero("clients.cycles_per_flop", self.clients.cycles_per_flop)?;
        above_zero("server.compute_hz", self.server.compute_hz)?;
        above_zero("server.cycles_per_flop", self.server.cycles_per_flop)?;
        let client: Vec<f64> = (self.client_compute_hz()?.iter())
            .map(|hz| hz / self.clients.cycles_per_flop)
            .collect();
        Ok(Speeds {
            client_forward: client.clone(),
            client_backward: client,
            server: self.server.compute_hz / self.server.cycles_per_flop,
        })
    }

    /// The main, federated and, where it counts, download link.
    ///
    /// # Errors
    /// [`ScenarioError`] names field, client or link.
    pub fn channels(&self) -> Result<(Channel, Channel, Option<Channel>), ScenarioError> {
        let caps = self.power_max_w()?;
        let main_m = self.distances_m(
            &self.clients.main_distance_m,
            "clients.main_distance_m",
            Stream::MainPlace,
        )?;
        let federated_m = self.distances_m(
            &self.clients.federated_distance_m,
            "clients.federated_distance_m",
            Stream::FederatedPlace,
        )?;
        let main = self.channel_of(
            LinkName::Main,
            &self.main,
            &main_m,
            self.channel.main_snr_per_watt.as_deref(),
            caps.clone(),
            Stream::MainFading,
        )?;
        let federated = self.channel_of(
            LinkName::Federated,
            &self.federated,
            &federated_m,
            self.channel.federated_snr_per_watt.as_deref(),
            caps,
            Stream::FederatedFading,
        )?;
        let download = (self.download.as_ref())
            .map(|radio| {
                // The base station's power is bounded in total only.
                let caps = vec![f64::INFINITY; self.clients.count];
                self.channel_of(LinkName::Download, radio, &main_m, None, caps, Stream::DownloadFading)
            })
            .transpose()?;
        Ok((main, federated, download))
    }

    fn power_max_w(&self) -> Result<Vec<f64>, ScenarioError> {
        let count = self.client_count()?;
        let dbm = match &self.clients.power_max_dbm_each {
            Some(each) if each.len() != count => {
                return Err(field(
                    "clients.power_max_dbm_each",
                    format!("{} entries for {count} clients", each.len()),
                ));
            }
            Some(each) => each.clone(),
            None => vec![self.clients.power_max_dbm; count],
        };
        Ok(dbm.into_iter().map(dbm_to_w).collect())
    }

    fn distances_m(
        &self,
        given: &Option<Vec<f64>>,
        name: &'static str,
        stream: Stream,
    ) -> Result<Vec<f64>, ScenarioError> {
        let clients = &self.clients;
        if let Some(each) = given {
            return each_client(name, each, clients.count);
        }
        above_zero("clients.distance_min_m", clients.distance_min_m)?;
        above_zero("clients.radius_m", clients.radius_m)?;
        let mut rng = self.stream(stream);
        Ok((0..clients.count)
            .map(|_| (clients.radius_m * rng.random::<f64>().sqrt()).max(clients.distance_min_m))
            .collect())
    }

    fn channel_of(
        &self,
        link: LinkName,
        radio: &Radio,
        distance_m: &[f64],
        given: Option<&[Vec<f64>]>,
        power_max_w: Vec<f64>,
        fading: Stream,
    ) -> Result<Channel, ScenarioError> {
        let bandwidth_hz = radio.bandwidth_hz / radio.subchannels as f64;
        let propagation = &self.channel;
        let snr = match given {
            Some(rows) if rows.iter().all(|row| row.len() == 1) => {
                SnrPerWatt::Flat(rows.iter().map(|row| row[0]).collect())
            }
            Some(rows) => SnrPerWatt::Selective(rows.to_vec()),
            None => {
                let flat: Vec<f64> = (distance_m.iter())
                    .map(|&distance_m| {
                        let loss_db = path_loss_db(
                            distance_m,
                            propagation.path_loss_intercept_db,
                            propagation.path_loss_slope_db,
                        );
                        snr_per_watt(loss_db, propagation.noise_dbm_per_hz, bandwidth_hz)
                    })
                    .collect();
                match propagation.fading {
                    Fading::None => SnrPerWatt::Flat(flat),
                    Fading::Rayleigh if flat.len() * radio.subchannels > MAX_GAINS => {
                        return Err(field(
                            "channel.fading",
                            format!(
                                "{} clients × {} subchannels of the {link} link are too many to draw; at most {MAX_GAINS}",
                                flat.len(),
                                radio.subchannels
                            ),
                        ));
                    }
                    Fading::Rayleigh => {
                        let mut rng = self.stream(fading);
                        let mut row =
                            |gain: f64| (0..radio.subchannels).map(|_| gain * exponential(&mut rng)).collect();
                        SnrPerWatt::Selective(flat.into_iter().map(&mut row).collect())
                    }
                }
            }
        };
        let channel = Channel {
            subchannels: radio.subchannels,
            bandwidth_hz,
            snr_per_watt: snr,
            power_max_w,
            power_total_w: dbm_to_w(radio.power_total_dbm),
        };
        channel.check(link)?;
        Ok(channel)
    }

    /// The averaged adapter's way back, if it counts: its rate is that of the client with the least capacity over the band.
    ///
    /// # Errors
    /// [`Error::Number`] for a power that is none.
    pub fn broadcast(&self, federated: &Channel) -> Result<Option<Broadcast>, ScenarioError> {
        let Some(dbm) = self.objective.broadcast_power_dbm else {
            return Ok(None);
        };
        let each_w = dbm_to_w(dbm) / federated.subchannels as f64;
        let capacity = |client: usize| -> f64 {
            (0..federated.subchannels)
                .map(|subchannel| (each_w * federated.snr_per_watt(client, subchannel)).ln_1p())
                .sum()
        };
        let least = (0..federated.clients()).map(capacity).fold(f64::INFINITY, f64::min);
        Ok(Some(Broadcast {
            rate_bits_per_s: federated.bandwidth_hz * least / std::f64::consts::LN_2,
        }))
    }

    /// The problem in numbers.
    ///
    /// # Errors
    /// [`ScenarioError`] names field, client, link and constraint.
    pub fn problem(&self) -> Result<Problem, ScenarioError> {
        let compute_hz = self.client_compute_hz()?;
        let joules_per_flop: Vec<f64> = (compute_hz.iter())
            .map(|hz| self.clients.capacitance * hz * hz * self.clients.cycles_per_flop)
            .collect();
        self.problem_with(&self.workload()?, &self.speeds()?, joules_per_flop)
    }

    /// The problem with another model's work and measured devices in this scenario's places.
    ///
    /// # Errors
    /// [`ScenarioError`] names field, client, link and constraint.
    pub fn problem_with(
        &self,
        workload: &Workload,
        speeds: &Speeds,
        joules_per_flop: Vec<f64>,
    ) -> Result<Problem, ScenarioError> {
        let (splits, ranks) = (self.splits()?, self.ranks()?);
        let (main, federated, download) = self.channels()?;
        let cells = splits.len().saturating_mul(ranks.len()).saturating_mul(main.clients());
        if cells > MAX_CELLS {
            return Err(field(
                "training.splits, training.ranks",
                format!("{cells} combinations with the clients; at most {MAX_CELLS}"),
            ));
        }
        let (ranks, rounds): (Vec<u32>, Vec<f64>) = ranks.into_iter().unzip();
        let costs = CellCosts {
            workload,
            speeds,
            wire: self.training.wire,
            weights: Format::F16,
            joules_per_flop,
        };
        let problem = Problem {
            local_steps: self.training.local_steps,
            broadcast: self.broadcast(&federated)?,
            main,
            federated,
            download,
            cells: costs.cells(&splits, &ranks),
            splits,
            ranks,
            rounds,
            memory_max_bytes: self.clients.memory_max_bytes.clone(),
            energy_weight_s_per_j: self.objective.energy_weight_s_per_j,
        };
        problem.check()?;
        Ok(problem)
    }

    fn stream(&self, stream: Stream) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(stream as u64);
        rng
    }
}

/// Gains of a link that are drawn at most.
const MAX_GAINS: usize = 1 << 24;
/// Splits × ranks × clients.
const MAX_CELLS: usize = 1 << 24;
/// Tokens in a batch.
const MAX_TOKENS: usize = 1 << 31;

/// What is drawn, each from its own stream of the seed.
#[derive(Clone, Copy)]
enum Stream {
    Compute,
    MainPlace,
    FederatedPlace,
    MainFading,
    FederatedFading,
    DownloadFading,
}

fn between(rng: &mut impl Rng, low: f64, high: f64) -> f64 {
    low + (high - low) * rng.random::<f64>()
}

/// The power of a Rayleigh-distributed amplitude, of mean 1.
fn exponential(rng: &mut impl Rng) -> f64 {
    // Away from 0, whose gain no power could use.
    -(1.0 - rng.random::<f64>()).ln().min(-1e-12)
}

/// The wire form, or an error that says whose it is.
fn named_wire<'de, D: Deserializer<'de>>(deserializer: D) -> Result<WireForm, D::Error> {
    WireForm::deserialize(deserializer).map_err(|error| D::Error::custom(format!("training.wire: {error}")))
}

fn field(field: &'static str, reason: String) -> ScenarioError {
    ScenarioError::Field { field, reason }
}

fn above_zero(name: &'static str, value: f64) -> Result<(), ScenarioError> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(field(name, format!("{value} is not above 0"))),
    }
}

fn each_client(name: &'static str, values: &[f64], clients: usize) -> Result<Vec<f64>, ScenarioError> {
    if values.len() != clients {
        return Err(field(name, format!("{} entries for {clients} clients", values.len())));
    }
    for (client, &value) in values.iter().enumerate() {
        if !(value.is_finite() && value > 0.0) {
            return Err(field(name, format!("{value} of client {client} is not above 0")));
        }
    }
    Ok(values.to_vec())
}

/// A parsed TOML or JSON text.
///
/// # Errors
/// [`ScenarioError::Json`], [`ScenarioError::Toml`].
pub fn value_of(text: &str) -> Result<Value, ScenarioError> {
    let text = text.trim_start_matches('\u{feff}');
    // A TOML document starts with a key, a comment or a `[table]`, never with a brace.
    match text.trim_start().starts_with('{') {
        true => Ok(serde_json::from_str(text)?),
        false => Ok(toml::from_str(text)?),
    }
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields
                .into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key, without_nulls(value)))
                .collect::<Map<_, _>>(),
        ),
        other => other,
    }
}
