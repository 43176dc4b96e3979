//! What is known of a run and its clients, and what a round would take by that.
//!
//! Separate from the search over cuts and ranks, which asks here what each of them would come to.

use std::collections::{BTreeMap, BTreeSet};

use super::super::planner::{ClientFacts, ClientRound, RoundFacts};
use super::{Allocator, number};
use crate::allocation::scenario::{CellCosts, Scenario, Speeds};
use crate::allocation::{Cell, Problem, RoundTimes};
use crate::model::architecture::Architecture;
use crate::model::cost::{Convention, Workload};
use crate::model::workspace::Extent;
use crate::protocol::message::LinkRates;
use crate::split::Training;
use crate::terms::format::Format;
use crate::terms::ids::ClientId;
use crate::terms::phases::Phases;
use crate::terms::speed::Speed;

/// A speed for clients that measured none, when nobody did, in FLOP/s.
pub(super) const SUPPOSED_FLOPS_PER_S: f64 = 1e9;
/// An uplink's and a downlink's throughput before any was measured, in bit/s: that of a modest Wi-Fi.
const SUPPOSED_BITS_PER_S: f64 = 20e6;

/// What does not change during a run.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub architecture: Architecture,
    pub training: Training,
    /// How matrices of blocks are held.
    pub weights: Format,
    pub local_steps: u32,
}

impl Shape {
    /// The work as this crate's kernels count it, since that is how speeds are measured.
    pub fn workload(&self) -> Workload {
        let extent = Extent {
            batch: self.training.batch,
            seq: self.training.seq,
        };
        Workload::new(
            &self.architecture,
            &self.training.spec.targets,
            extent,
            Convention::Issued,
        )
    }

    pub fn blocks(&self) -> u32 {
        u32::try_from(self.architecture.blocks).unwrap_or(u32::MAX)
    }
}

/// A client's speed and throughputs, measured or supposed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub speed: Option<Speed>,
    pub memory_bytes: u64,
    pub uplink_bits_per_s: f64,
    pub downlink_bits_per_s: f64,
    pub federated_bits_per_s: f64,
    /// Mean bits of a step's activations, when they were counted.
    pub upload_bits: Option<f64>,
}

impl Known {
    pub fn new(facts: &ClientFacts) -> Self {
        Self {
            speed: facts.speed,
            memory_bytes: facts.memory_bytes,
            uplink_bits_per_s: SUPPOSED_BITS_PER_S,
            downlink_bits_per_s: SUPPOSED_BITS_PER_S,
            federated_bits_per_s: SUPPOSED_BITS_PER_S,
            upload_bits: None,
        }
    }
}

impl Allocator {
    /// Speeds of `clients`, in their order; a client without one is taken to be like the slowest of the others.
    fn speeds(&self, clients: &[ClientId]) -> Speeds {
        let slowest = |part: fn(&Speed) -> f64| {
            (self.known.values())
                .filter_map(|known| known.speed.as_ref().map(part))
                .min_by(f64::total_cmp)
                .unwrap_or(SUPPOSED_FLOPS_PER_S)
        };
        let of = |part: fn(&Speed) -> f64| -> Vec<f64> {
            let otherwise = slowest(part);
            let speed = |client: &ClientId| self.known.get(client).and_then(|known| known.speed.as_ref().map(part));
            clients
                .iter()
                .map(|client| speed(client).unwrap_or(otherwise))
                .collect()
        };
        Speeds {
            client_forward: of(|speed| speed.forward_flops_per_s),
            client_backward: of(|speed| speed.backward_flops_per_s),
            server: self.server_flops_per_s,
        }
    }

    /// The scenario's radio around the run's work.
    pub(super) fn problem(
        &self,
        scenario: &Scenario,
        clients: &[ClientId],
        splits: &[u32],
        ranks: &[(u32, f64)],
    ) -> Result<Problem, String> {
        let run = self.run()?;
        let mut scenario = scenario.clone();
        scenario.model.blocks = run.architecture.blocks;
        scenario.training.local_steps = run.local_steps;
        scenario.training.wire = run.training.wire;
        scenario.training.weights = Some(run.weights);
        scenario.training.splits = Some(splits.to_vec());
        scenario.training.ranks = Some(ranks.iter().map(|&(rank, _)| rank).collect());
        scenario.training.rounds = ranks.iter().copied().collect();
        let memory = |client: &ClientId| match self.known.get(client).map_or(0, |known| known.memory_bytes) {
            0 => f64::INFINITY,
            bytes => bytes as f64,
        };
        let limits: Vec<f64> = clients.iter().map(memory).collect();
        if scenario.clients.memory_max_bytes.is_none() && limits.iter().any(|limit| limit.is_finite()) {
            scenario.clients.memory_max_bytes = Some(limits);
        }
        // Energy of the run's real devices is not known.
        let joules = vec![0.0; clients.len()];
        scenario
            .problem_with(&run.workload(), &self.speeds(clients), joules)
            .map_err(|error| error.to_string())
    }

    /// What a round would take at the clients' `cuts`, in their order, and `rank`, at the rates that are emulated or measured.
    pub(super) fn times(&self, clients: &[ClientFacts], cuts: &[usize], rank: usize) -> Result<RoundTimes, String> {
        let run = self.run()?;
        let ids: Vec<ClientId> = clients.iter().map(|facts| facts.id).collect();
        let workload = run.workload();
        let costs = CellCosts {
            workload: &workload,
            speeds: &self.speeds(&ids),
            wire: run.training.wire,
            weights: run.weights,
            joules_per_flop: vec![0.0; ids.len()],
        };
        let distinct: BTreeSet<usize> = cuts.iter().copied().collect();
        let splits: Vec<u32> = distinct.iter().copied().map(number).collect();
        let rows = costs.cells(&splits, &[number(rank)]);
        let by_cut: BTreeMap<usize, &Cell> = (distinct.into_iter().zip(&rows))
            .filter_map(|(cut, row)| Some((cut, row.first()?)))
            .collect();
        let cells: Vec<&Cell> = cuts.iter().filter_map(|cut| by_cut.get(cut).copied()).collect();
        let emulated = self.rates_of(clients);
        let rate = |id: &ClientId, emulated_part: fn(&LinkRates) -> f64, measured: fn(&Known) -> f64| {
            let known = self.known.get(id).map_or(SUPPOSED_BITS_PER_S, measured);
            emulated.get(id).map_or(known, emulated_part)
        };
        let upload_s = |(id, cell): (&ClientId, &&Cell)| {
            let bits = (self.known.get(id))
                .and_then(|known| known.upload_bits)
                .unwrap_or(cell.upload_bits);
            bits / rate(id, |rates| rates.main_bits_per_s, |known| known.uplink_bits_per_s)
        };
        let adapter_s = |(id, cell): (&ClientId, &&Cell)| {
            cell.adapter_bits
                / rate(
                    id,
                    |rates| rates.federated_bits_per_s,
                    |known| known.federated_bits_per_s,
                )
        };
        // Emulated links send their gradients down for free, as in the paper; real ones take their time.
        let download_s = |(id, cell): (&ClientId, &&Cell)| match self.settings.scenario {
            Some(_) => 0.0,
            None => {
                let known = self.known.get(id);
                let bits = known.and_then(|known| known.upload_bits).unwrap_or(cell.gradient_bits);
                bits / known.map_or(SUPPOSED_BITS_PER_S, |known| known.downlink_bits_per_s)
            }
        };
        let per_client = |part: fn(&Cell) -> &Vec<f64>| {
            let seconds = |(client, cell): (usize, &&Cell)| part(cell).get(client).copied();
            cells.iter().enumerate().filter_map(seconds).collect()
        };
        Ok(RoundTimes {
            phases: Phases {
                forward: per_client(|cell| &cell.client_forward_s),
                upload: ids.iter().zip(&cells).map(upload_s).collect(),
                download: ids.iter().zip(&cells).map(download_s).collect(),
                backward: per_client(|cell| &cell.client_backward_s),
            },
            server_s: cells.iter().map(|cell| cell.server_s).sum::<f64>() / cells.len().max(1) as f64,
            adapter_s: ids.iter().zip(&cells).map(adapter_s).collect(),
            broadcast_s: 0.0,
        })
    }

    /// What a run of so many rounds would take.
    pub(super) fn total_s(
        &self,
        clients: &[ClientFacts],
        cuts: &[usize],
        (rank, rounds): (usize, f64),
    ) -> Result<f64, String> {
        Ok(rounds * self.times(clients, cuts, rank)?.round_s(self.run()?.local_steps))
    }

    /// What a round showed, in place of what was supposed.
    pub(super) fn learn(&mut self, facts: &RoundFacts) -> Result<(), String> {
        let run = self.run()?.clone();
        let workload = run.workload();
        for measured in &facts.measured {
            let Some(known) = self.known.get_mut(&measured.id) else {
                continue;
            };
            let cut = facts.cut_of(measured.id);
            let phases = measured.phases;
            let forward = workload.client_forward_flops(cut, facts.rank);
            let backward = workload.client_backward_flops(cut, facts.rank);
            if let Some(speed) = Speed::new(forward / phases.forward, backward / phases.backward) {
                known.speed = Some(speed);
            }
            let ClientRound {
                activation_bits,
                gradient_bits,
                ..
            } = *measured;
            let throughput = |bits: f64, seconds: f64| {
                let rate = bits / seconds;
                (rate.is_finite() && rate > 0.0).then_some(rate)
            };
            if activation_bits > 0.0 {
                known.upload_bits = Some(activation_bits);
            }
            if let Some(rate) = throughput(activation_bits, phases.upload) {
                known.uplink_bits_per_s = rate;
                // Until an adapter was timed: both links leave the same device.
                known.federated_bits_per_s = rate;
            }
            if let Some(rate) = throughput(gradient_bits, phases.download) {
                known.downlink_bits_per_s = rate;
            }
            if let (Some(bits), Some(seconds)) = (measured.adapter_bits, measured.federated_s)
                && let Some(rate) = throughput(bits, seconds)
            {
                known.federated_bits_per_s = rate;
            }
        }
        if let Some(server_s) = facts.server_s {
            let of_member = |measured: &ClientRound| workload.server_flops(facts.cut_of(measured.id), facts.rank);
            let flops: f64 = facts.measured.iter().map(of_member).sum();
            if server_s > 0.0 && flops > 0.0 {
                self.server_flops_per_s = flops / server_s;
            }
        }
        Ok(())
    }
}
