//! The delay of a run as a function of cut, rank, subchannels and powers: the problem and what a plan comes to.
//!
//! ```text
//! total = E(r) · [ I · ( max_k(T_k^F + T_k^up) + T_S + max_k T_k^B ) + max_k T_k^fed ]
//! ```
//! (arXiv 2504.14667: `E(r)` rounds to the target loss at rank `r`, `I` local steps a round, `T^F`/`T^B` a client's forward and
//! backward pass, `T^up` its activation upload, `T_S` the server's work for all clients, `T^fed` its adapter upload.) The first
//! link carries activations and labels, the second adapters; they share no variable, so given cut and rank they are two problems.
//!
//! Beyond the paper, and absent by default: the gradient download as a third link, `max_k(T_k^down + T_k^B)` instead of
//! `max_k T_k^B`; the broadcast of the averaged adapter at the worst client's rate; cuts that a client's memory allows; energy.

use super::channel::{Channel, LinkName};
use super::power::{Demand, LinkPlan};
use super::{Error, Plan};
use crate::terms::phases::Phases;

/// One (cut, rank) and what it costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// `[client]`: forward pass of one local step, in s.
    pub client_forward_s: Vec<f64>,
    /// `[client]`: backward pass of one local step, in s.
    pub client_backward_s: Vec<f64>,
    /// Forward and backward of all clients' activations on the server in one local step, in s.
    pub server_s: f64,
    /// Activations and labels of a client in one local step.
    pub upload_bits: f64,
    /// A client's adapter.
    pub adapter_bits: f64,
    /// The gradient of a client's activations in one local step; used where the problem has a download link.
    pub gradient_bits: f64,
    /// `[client]`: energy of its computation in one local step, in J; used where energy counts.
    pub compute_j: Vec<f64>,
    /// `[client]`: memory that it takes, in bytes; used where the problem has caps.
    pub memory_bytes: Vec<f64>,
}

/// The averaged adapter on its way back: everybody listens to the whole band, at the rate of whoever hears worst.
#[derive(Clone, Debug, PartialEq)]
pub struct Broadcast {
    /// In bit/s.
    pub rate_bits_per_s: f64,
}

/// What is to be decided, in numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// `I`: local steps in a round.
    pub local_steps: u32,
    /// The link to the main server.
    pub main: Channel,
    /// The link to the federated server.
    pub federated: Channel,
    /// The gradients' link, if they count. Its total power is the base station's.
    pub download: Option<Channel>,
    /// How the averaged adapter goes back, where that counts.
    pub broadcast: Option<Broadcast>,
    /// Candidate cuts: blocks on the clients.
    pub splits: Vec<u32>,
    /// Candidate ranks.
    pub ranks: Vec<u32>,
    /// `[rank]`: E(r), rounds to the target loss.
    pub rounds: Vec<f64>,
    /// `[split][rank]`
    pub cells: Vec<Vec<Cell>>,
    /// `[client]`: memory it can give, in bytes.
    pub memory_max_bytes: Option<Vec<f64>>,
    /// Seconds of delay that a joule of the clients counts as; 0 in the paper's problem.
    pub energy_weight_s_per_j: f64,
}

/// Where the time of one round goes under a plan, in s. Per client; the phases end with the slowest.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct RoundTimes {
    /// `[client]`: of a local step. The download is 0 where it does not count.
    #[serde(flatten)]
    pub phases: Phases<Vec<f64>>,
    /// The server's part of a local step.
    pub server_s: f64,
    /// `[client]`: adapter upload of a round.
    pub adapter_s: Vec<f64>,
    /// Adapter broadcast of a round; 0 where it does not count.
    pub broadcast_s: f64,
}

impl RoundTimes {
    /// One local step: forward and upload end with the slowest client, so do download and backward.
    pub fn step_s(&self) -> f64 {
        let Phases {
            forward,
            upload,
            download,
            backward,
        } = &self.phases;
        longest_sum(forward, upload) + self.server_s + longest_sum(download, backward)
    }

    /// One round of `local_steps` and an aggregation.
    pub fn round_s(&self, local_steps: u32) -> f64 {
        f64::from(local_steps) * self.step_s() + self.adapter_s.iter().copied().fold(0.0, f64::max) + self.broadcast_s
    }
}

fn longest_sum(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a + b).fold(0.0, f64::max)
}

impl Problem {
    /// How many clients there are.
    pub fn clients(&self) -> usize {
        self.main.clients()
    }

    /// That the problem is complete, finite and has a solution.
    ///
    /// # Errors
    /// [`Error`] names client, link and constraint.
    pub fn check(&self) -> Result<(), Error> {
        self.main.check(LinkName::Main)?;
        self.federated.check(LinkName::Federated)?;
        let clients = self.clients();
        let length = |what: &str, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => Err(Error::Length {
                what: what.to_owned(),
                found,
                expected,
            }),
        };
        length("power_max_w of the federated link", self.federated.clients(), clients)?;
        if let Some(download) = &self.download {
            download.check(LinkName::Download)?;
            length("power_max_w of the download link", download.clients(), clients)?;
        }
        if self.local_steps == 0 {
            return Err(Error::Number {
                what: "local_steps".to_owned(),
                value: 0.0,
                range: "above 0",
            });
        }
        for (what, count) in [("splits", self.splits.len()), ("ranks", self.ranks.len())] {
            if count == 0 {
                return Err(Error::Empty { what });
            }
        }
        length("rounds", self.rounds.len(), self.ranks.len())?;
        length("cells", self.cells.len(), self.splits.len())?;
        let number = |what: &str, value: f64| match value.is_finite() && value >= 0.0 {
            true => Ok(()),
            false => Err(Error::Number {
                what: what.to_owned(),
                value,
                range: "not below 0",
            }),
        };
        number("energy_weight_s_per_j", self.energy_weight_s_per_j)?;
        for (&rank, &rounds) in self.ranks.iter().zip(&self.rounds) {
            if !(rounds.is_finite() && rounds > 0.0) {
                return Err(Error::Rounds {
                    rank,
                    rounds: Some(rounds),
                });
            }
        }
        if let Some(Broadcast { rate_bits_per_s }) = self.broadcast
            && !(rate_bits_per_s.is_finite() && rate_bits_per_s > 0.0)
        {
            return Err(Error::Number {
                what: "rate_bits_per_s of the broadcast".to_owned(),
                value: rate_bits_per_s,
                range: "above 0",
            });
        }
        for (row, split) in self.cells.iter().zip(&self.splits) {
            length(&format!("the ranks of split {split}"), row.len(), self.ranks.len())?;
            for (cell, rank) in row.iter().zip(&self.ranks) {
                let name = |what: &str| format!("{what} of split {split}, rank {rank}");
                for (what, values) in [
                    ("client_forward_s", &cell.client_forward_s),
                    ("client_backward_s", &cell.client_backward_s),
                    ("compute_j", &cell.compute_j),
                    ("memory_bytes", &cell.memory_bytes),
                ] {
                    length(&name(what), values.len(), clients)?;
                    // A name costs more than its check.
                    let impossible = values.iter().find(|value| !(value.is_finite() && **value >= 0.0));
                    if let Some(&value) = impossible {
                        number(&name(what), value)?;
                    }
                }
                for (what, value) in [
                    ("server_s", cell.server_s),
                    ("upload_bits", cell.upload_bits),
                    ("adapter_bits", cell.adapter_bits),
                    ("gradient_bits", cell.gradient_bits),
                ] {
                    number(&name(what), value)?;
                }
            }
        }
        if let Some(caps) = &self.memory_max_bytes {
            length("memory_max_bytes", caps.len(), clients)?;
            for (client, &cap) in caps.iter().enumerate() {
                let fits = (0..self.splits.len())
                    .any(|split| (0..self.ranks.len()).any(|rank| self.cells[split][rank].memory_bytes[client] <= cap));
                if !fits {
                    return Err(Error::Memory {
                        client,
                        available_bytes: cap,
                        needed_bytes: self
                            .cells
                            .iter()
                            .flatten()
                            .map(|cell| cell.memory_bytes[client])
                            .fold(f64::INFINITY, f64::min),
                    });
                }
            }
        }
        Ok(())
    }

    /// Whether `client`'s memory holds its part at this cut and rank.
    pub fn fits(&self, client: usize, split: usize, rank: usize) -> bool {
        match &self.memory_max_bytes {
            Some(caps) => self.cells[split][rank].memory_bytes[client] <= caps[client],
            None => true,
        }
    }

    /// The cells of each client's own cut.
    fn cells_of<'a>(&'a self, split_index: &'a [usize], rank: usize) -> impl Iterator<Item = &'a Cell> {
        split_index.iter().map(move |&split| &self.cells[split][rank])
    }

    /// The main link's demand when client `k` is cut at `split_index[k]`.
    pub(super) fn main_demand(&self, split_index: &[usize], rank: usize) -> Demand {
        Demand {
            wait_s: (self.cells_of(split_index, rank).enumerate())
                .map(|(client, cell)| cell.client_forward_s[client])
                .collect(),
            payload_bits: self.cells_of(split_index, rank).map(|cell| cell.upload_bits).collect(),
        }
    }

    /// The federated link's demand.
    pub(super) fn federated_demand(&self, split_index: &[usize], rank: usize) -> Demand {
        Demand {
            wait_s: vec![0.0; split_index.len()],
            payload_bits: self.cells_of(split_index, rank).map(|cell| cell.adapter_bits).collect(),
        }
    }

    /// The download link's demand: the backward pass follows the transmission.
    pub(super) fn download_demand(&self, split_index: &[usize], rank: usize) -> Demand {
        Demand {
            wait_s: (self.cells_of(split_index, rank).enumerate())
                .map(|(client, cell)| cell.client_backward_s[client])
                .collect(),
            payload_bits: self
                .cells_of(split_index, rank)
                .map(|cell| cell.gradient_bits)
                .collect(),
        }
    }

    /// The server's work in one local step. A cell counts all clients at its cut, so each client brings its share.
    pub(super) fn server_s(&self, split_index: &[usize], rank: usize) -> f64 {
        let sum: f64 = self.cells_of(split_index, rank).map(|cell| cell.server_s).sum();
        sum / split_index.len() as f64
    }

    /// The slowest client's backward pass.
    pub(super) fn backward_s(&self, split_index: &[usize], rank: usize) -> f64 {
        (self.cells_of(split_index, rank).enumerate())
            .map(|(client, cell)| cell.client_backward_s[client])
            .fold(0.0, f64::max)
    }

    /// The broadcast of the averaged adapter, as large as the largest client's.
    pub(super) fn broadcast_s(&self, split_index: &[usize], rank: usize) -> f64 {
        let largest = (self.cells_of(split_index, rank))
            .map(|cell| cell.adapter_bits)
            .fold(0.0, f64::max);
        self.broadcast
            .as_ref()
            .map_or(0.0, |broadcast| largest / broadcast.rate_bits_per_s)
    }

    /// All clients' computation in one local step, in J; 0 unless energy counts.
    pub(super) fn compute_j(&self, split_index: &[usize], rank: usize) -> f64 {
        (self.cells_of(split_index, rank).enumerate())
            .map(|(client, cell)| cell.compute_j[client])
            .sum()
    }

    /// What a run costs in s: its delay, and its energy at its weight. `main`, `federated` and `download` are the costs of the
    /// links for one step, one round and one step; without a download link `download` is the slowest backward pass.
    pub(super) fn total_s(
        &self,
        split_index: &[usize],
        rank: usize,
        (main, federated, download): (f64, f64, f64),
    ) -> f64 {
        let step = main
            + self.server_s(split_index, rank)
            + download
            + self.energy_weight_s_per_j * self.compute_j(split_index, rank);
        self.rounds[rank] * (f64::from(self.local_steps) * step + federated + self.broadcast_s(split_index, rank))
    }

    /// What a plan's links and choices come to, from its owners and powers alone.
    ///
    /// # Errors
    /// [`Error::Plan`] when it breaks a constraint.
    pub fn times(&self, plan: &Plan) -> Result<RoundTimes, Error> {
        let broken = |reason: String| Err(Error::Plan { reason });
        let clients = self.clients();
        let (rank, split_index) = (plan.rank_index, &plan.split_index);
        if rank >= self.ranks.len()
            || split_index.len() != clients
            || split_index.iter().any(|&split| split >= self.splits.len())
        {
            return broken("a split or rank index is not one of the problem's".to_owned());
        }
        for (client, &split) in split_index.iter().enumerate() {
            if !self.fits(client, split, rank) {
                return broken(format!(
                    "client {client} has not the memory for split {}",
                    self.splits[split]
                ));
            }
        }
        let transmit = |link: LinkName, channel: &Channel, plan: &LinkPlan, demand: &Demand| {
            check_powers(link, channel, plan)?;
            (0..clients)
                .map(|client| {
                    let bits = demand.payload_bits[client];
                    let rate = channel.rate_bits_per_s(client, &plan.owner, &plan.power_w);
                    match bits <= 0.0 || rate > 0.0 {
                        true => Ok(if bits <= 0.0 { 0.0 } else { bits / rate }),
                        false => Err(Error::Plan {
                            reason: format!("client {client} sends nothing on the {link} link"),
                        }),
                    }
                })
                .collect::<Result<Vec<f64>, Error>>()
        };
        let main = self.main_demand(split_index, rank);
        let federated = self.federated_demand(split_index, rank);
        let down = self.download_demand(split_index, rank);
        Ok(RoundTimes {
            phases: Phases {
                upload: transmit(LinkName::Main, &self.main, &plan.main, &main)?,
                forward: main.wait_s,
                download: match (&self.download, &plan.download) {
                    (Some(channel), Some(plan)) => transmit(LinkName::Download, channel, plan, &down)?,
                    (None, _) => vec![0.0; clients],
                    (Some(_), None) => {
                        return Err(Error::Plan {
                            reason: "there is no plan for the download link".to_owned(),
                        });
                    }
                },
                backward: down.wait_s,
            },
            server_s: self.server_s(split_index, rank),
            adapter_s: transmit(LinkName::Federated, &self.federated, &plan.federated, &federated)?,
            broadcast_s: self.broadcast_s(split_index, rank),
        })
    }
}

/// Relative excess of a power sum that is rounding.
const POWER_TOLERANCE: f64 = 1e-9;

fn check_powers(link: LinkName, channel: &Channel, plan: &LinkPlan) -> Result<(), Error> {
    let broken = |reason: String| Err(Error::Plan { reason });
    let clients = channel.clients();
    if plan.owner.len() != channel.subchannels || plan.power_w.len() != channel.subchannels {
        return broken(format!("the {link} link has {} subchannels", channel.subchannels));
    }
    if let Some(owner) = plan.owner.iter().find(|&&owner| owner >= clients) {
        return broken(format!("client {owner} on the {link} link does not exist"));
    }
    let mut sums = vec![0.0; clients];
    for (&owner, &power) in plan.owner.iter().zip(&plan.power_w) {
        if !(power.is_finite() && power >= 0.0) {
            return broken(format!("a power of {power} W on the {link} link"));
        }
        sums[owner] += power;
    }
    for (client, (&sum, &cap)) in sums.iter().zip(&channel.power_max_w).enumerate() {
        if sum > cap * (1.0 + POWER_TOLERANCE) {
            return broken(format!(
                "client {client} sends with {sum} W of {cap} W on the {link} link"
            ));
        }
    }
    let total: f64 = sums.iter().sum();
    if total > channel.power_total_w * (1.0 + POWER_TOLERANCE) {
        return broken(format!(
            "the {link} link sends with {total} W of {} W",
            channel.power_total_w
        ));
    }
    Ok(())
}
