//! The problem in numbers that follows from a scenario: what is random is drawn here, and every number is checked.
//!
//! Separate from the scenario because most of its readers only want it shown.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::super::channel::{Channel, MAX_SUBCHANNELS, SnrPerWatt, dbm_to_w, path_loss_db, snr_per_watt};
use super::super::delay::{Broadcast, Problem};
use super::super::{Error, LinkName};
use super::cost::{CellCosts, Speeds};
use super::error::{ScenarioError, field};
use super::{Fading, Radio, Scenario, TrainingShape};
use crate::model::adapter::LoraSpec;
use crate::model::architecture::Architecture;
use crate::model::cost::{Convention, Workload};
use crate::model::workspace::Extent;
use crate::terms::format::Format;

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

impl Scenario {
    /// The model's shape.
    ///
    /// # Errors
    /// [`ScenarioError::Model`] names the field.
    pub fn architecture(&self) -> Result<Architecture, ScenarioError> {
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
        let model = self.architecture()?;
        let TrainingShape { batch, seq, .. } = self.training;
        let tokens = batch.saturating_mul(seq);
        if tokens == 0 || tokens > MAX_TOKENS || seq > model.positions {
            return Err(field(
                "training.batch, training.seq",
                format!(
                    "{batch} × {seq} is not a batch for a model of {} positions",
                    model.positions
                ),
            ));
        }
        let targets = LoraSpec::parse_targets(&model, &self.training.targets.join(","))
            .map_err(|error| field("training.targets", error.to_string()))?;
        Ok(Workload::new(
            &model,
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
        let blocks = u32::try_from(self.architecture()?.blocks).unwrap_or(u32::MAX);
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
    pub(crate) fn client_compute_hz(&self) -> Result<Vec<f64>, ScenarioError> {
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
    pub(crate) fn problem_with(
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
            weights: self.training.weights.unwrap_or(Format::F16),
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

fn between(rng: &mut impl Rng, low: f64, high: f64) -> f64 {
    low + (high - low) * rng.random::<f64>()
}

/// The power of a Rayleigh-distributed amplitude, of mean 1.
fn exponential(rng: &mut impl Rng) -> f64 {
    // Away from 0, whose gain no power could use.
    -(1.0 - rng.random::<f64>()).ln().min(-1e-12)
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
