//! The planner that asks the allocator: emulated radio links from a scenario, or the speeds and throughputs that were measured.
//!
//! With a scenario every client has a place in it, the plan's rate on each of its links, and the run's own model, batch and
//! measured speeds for the rest. Without one, cut and rank follow from what the clients measured when they joined, and the cut
//! again from every round's measured phases. At the start it may give every client a cut of its own, for the whole run.

use std::collections::{BTreeMap, BTreeSet};

use super::planner::{
    ClientFacts, ClientPrediction, ClientRound, Decision, Planner, RoundFacts, RoundPrediction, StartFacts,
};
use crate::allocation::scenario::{CellCosts, Scenario, Speeds};
use crate::allocation::{self, Cell, Method, Problem, RoundTimes, SolveOptions};
use crate::model::architecture::Architecture;
use crate::model::cost::{Convention, Workload};
use crate::model::rounds::RoundsTable;
use crate::model::workspace::Extent;
use crate::protocol::message::LinkRates;
use crate::split::Training;
use crate::terms::format::Format;
use crate::terms::ids::ClientId;
use crate::terms::phases::Phases;
use crate::terms::speed::Speed;

/// The cut moves only when that is forecast to shorten a round by more than this part of it.
pub const MARGIN: f64 = 0.1;

/// A speed for clients that measured none, when nobody did, in FLOP/s.
const SUPPOSED_FLOPS_PER_S: f64 = 1e9;
/// An uplink's and a downlink's throughput before any was measured, in bit/s: that of a modest Wi-Fi.
const SUPPOSED_BITS_PER_S: f64 = 20e6;

/// Moves of single clients' cuts at most, and the relative difference below which two totals are the same.
const MOVES: usize = 1000;
const SAME: f64 = 1e-12;

/// What is asked of the allocator.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whose radio links are emulated; `None` takes the real ones.
    pub scenario: Option<Scenario>,
    pub method: Method,
    /// Of the random methods.
    pub seed: u64,
    /// The cut, if it is not to be chosen.
    pub split: Option<usize>,
    /// Whether every client may have a cut of its own; for [`Method::Best`].
    pub per_client_split: bool,
    /// The rank, if it is not to be chosen.
    pub rank: Option<usize>,
    /// Rounds to the target loss at each rank, when the scenario does not have them.
    pub rounds: Option<RoundsTable>,
}

/// The planner of a run: cuts, ranks, radio shares and power for its clients, from a scenario or from what was measured.
pub struct Allocator {
    settings: Settings,
    run: Option<Shape>,
    /// Each client's place in the scenario. It is kept when the client leaves, until somebody else needs one.
    places: BTreeMap<ClientId, usize>,
    /// `[place]`
    rates: Vec<LinkRates>,
    /// What is known of each client by now.
    known: BTreeMap<ClientId, Known>,
    server_flops_per_s: f64,
}

/// Cuts in the clients' order and a rank, and what a run would take.
struct Found {
    total_s: f64,
    cuts: Vec<usize>,
    rank: usize,
}

/// What does not change during a run.
#[derive(Clone, Debug)]
struct Shape {
    config: Architecture,
    training: Training,
    local_steps: u32,
}

impl Shape {
    /// The work as this crate's kernels count it, since that is how speeds are measured.
    fn workload(&self) -> Workload {
        let extent = Extent {
            batch: self.training.batch,
            seq: self.training.seq,
        };
        Workload::new(&self.config, &self.training.spec.targets, extent, Convention::Issued)
    }

    fn blocks(&self) -> u32 {
        u32::try_from(self.config.blocks).unwrap_or(u32::MAX)
    }
}

/// A client's speed and throughputs, measured or supposed.
#[derive(Clone, Copy, Debug)]
struct Known {
    speed: Option<Speed>,
    memory_bytes: u64,
    uplink_bits_per_s: f64,
    downlink_bits_per_s: f64,
    federated_bits_per_s: f64,
    /// Mean bits of a step's activations, when they were counted.
    upload_bits: Option<f64>,
}

impl Known {
    fn new(facts: &ClientFacts) -> Self {
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
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            run: None,
            places: BTreeMap::new(),
            rates: Vec::new(),
            known: BTreeMap::new(),
            server_flops_per_s: SUPPOSED_FLOPS_PER_S,
        }
    }

    fn run(&self) -> Result<&Shape, String> {
        self.run.as_ref().ok_or_else(|| "the run has not begun".to_owned())
    }

    /// Candidate ranks with E(r); a rank that is not chosen needs none.
    fn ranks(&self, current: usize) -> Result<Vec<(u32, f64)>, String> {
        let settings = &self.settings;
        if let Some(rank) = settings.rank {
            return Ok(vec![(number(rank), 1.0)]);
        }
        match (&settings.rounds, &settings.scenario) {
            (Some(table), _) => {
                let measured = table.measured().map_err(|error| error.to_string())?;
                Ok((measured.into_iter())
                    .map(|(rank, rounds)| (number(rank), rounds))
                    .collect())
            }
            (None, Some(scenario)) => scenario.ranks().map_err(|error| error.to_string()),
            (None, None) => Ok(vec![(number(current), 1.0)]),
        }
    }

    fn splits(&self, blocks: u32) -> Vec<u32> {
        match self.settings.split {
            Some(split) => vec![u32::try_from(split).unwrap_or(u32::MAX)],
            None => match self.settings.scenario.as_ref().map(Scenario::splits) {
                Some(Ok(splits)) if splits.iter().all(|&split| split < blocks) => splits,
                _ => (1..blocks).collect(),
            },
        }
    }

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
    fn problem(
        &self,
        scenario: &Scenario,
        clients: &[ClientId],
        splits: &[u32],
        ranks: &[(u32, f64)],
    ) -> Result<Problem, String> {
        let run = self.run()?;
        let mut scenario = scenario.clone();
        scenario.model.blocks = run.config.blocks;
        scenario.training.local_steps = run.local_steps;
        scenario.training.wire = run.training.wire;
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

    /// A plan for the scenario's places, whose owners are `clients`.
    fn solve(
        &self,
        clients: &[ClientId],
        splits: &[u32],
        ranks: &[(u32, f64)],
        per_client_split: bool,
    ) -> Result<(Problem, allocation::Plan), String> {
        let scenario = (self.settings.scenario.as_ref()).ok_or_else(|| "there is no scenario".to_owned())?;
        let problem = self.problem(scenario, clients, splits, ranks)?;
        let options = SolveOptions {
            seed: self.settings.seed,
            per_client_split,
        };
        let plan = allocation::solve(&problem, self.settings.method, &options).map_err(|error| error.to_string())?;
        Ok((problem, plan))
    }

    /// Who is at which place. A client that comes later takes the place of one that has left.
    fn settle(&mut self, clients: &[ClientFacts]) {
        for facts in clients {
            self.known.entry(facts.id).or_insert_with(|| Known::new(facts));
            if self.places.contains_key(&facts.id) {
                continue;
            }
            let taken: Vec<usize> = (clients.iter())
                .filter_map(|other| self.places.get(&other.id).copied())
                .collect();
            let Some(place) = (0..self.rates.len()).find(|place| !taken.contains(place)) else {
                continue;
            };
            self.places.retain(|_, occupied| *occupied != place);
            self.places.insert(facts.id, place);
        }
    }

    fn rates_of(&self, clients: &[ClientFacts]) -> BTreeMap<ClientId, LinkRates> {
        (clients.iter())
            .filter_map(|facts| {
                let rates = self.rates.get(*self.places.get(&facts.id)?)?;
                Some((facts.id, *rates))
            })
            .collect()
    }

    /// What a round would take at the clients' `cuts`, in their order, and `rank`, at the rates that are emulated or measured.
    fn times(&self, clients: &[ClientFacts], cuts: &[usize], rank: usize) -> Result<RoundTimes, String> {
        let run = self.run()?;
        let ids: Vec<ClientId> = clients.iter().map(|facts| facts.id).collect();
        let workload = run.workload();
        let costs = CellCosts {
            workload: &workload,
            speeds: &self.speeds(&ids),
            wire: run.training.wire,
            weights: Format::F16,
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
    fn total_s(&self, clients: &[ClientFacts], cuts: &[usize], (rank, rounds): (usize, f64)) -> Result<f64, String> {
        Ok(rounds * self.times(clients, cuts, rank)?.round_s(self.run()?.local_steps))
    }

    /// Cuts that a client's memory allows, shallowest first.
    fn fitting(&self, client: &ClientFacts, rank: usize) -> Result<Vec<usize>, String> {
        let run = self.run()?;
        let workload = run.workload();
        let fits = |split: &usize| {
            let needed = workload.client_memory_bytes(*split, rank, Format::F16, run.training.wire);
            client.memory_bytes == 0 || needed <= client.memory_bytes as f64
        };
        let mut splits: Vec<usize> = (self.splits(run.blocks()).into_iter())
            .map(|split| split as usize)
            .filter(fits)
            .collect();
        splits.sort_unstable();
        Ok(splits)
    }

    /// Every client's cut and the rank with the shortest run that is found: from the best cut for all, and the deepest cuts
    /// within any limit on the backward pass, client by client to what is better.
    fn shortest_per_client(
        &self,
        clients: &[ClientFacts],
        ranks: &[(u32, f64)],
    ) -> Result<(Vec<usize>, usize), String> {
        let mut best: Option<Found> = None;
        for &(rank, rounds) in ranks {
            let rank = rank as usize;
            let fitting = (clients.iter())
                .map(|client| self.fitting(client, rank))
                .collect::<Result<Vec<_>, _>>()?;
            // Of equals the first is taken: one cut for all.
            let one = self.shortest(clients, &[(number(rank), rounds)]);
            let mut candidates: Vec<Vec<usize>> = (one.into_iter()).map(|(cut, _)| vec![cut; clients.len()]).collect();
            candidates.extend(self.thresholds(clients, &fitting, rank)?);
            let mut found: Option<Found> = None;
            for cuts in candidates {
                let total_s = self.total_s(clients, &cuts, (rank, rounds))?;
                if found.as_ref().is_none_or(|found| total_s < found.total_s) {
                    found = Some(Found { total_s, cuts, rank });
                }
            }
            let Some(found) = found else { continue };
            let found = self.refined(clients, &fitting, found, rounds)?;
            if best.as_ref().is_none_or(|best| found.total_s < best.total_s) {
                best = Some(found);
            }
        }
        let Found { cuts, rank, .. } = best.ok_or_else(|| {
            "no cut fits the memory of some client; leave the smallest device out, or choose a smaller model".to_owned()
        })?;
        Ok((cuts, rank))
    }

    /// The deepest cut of every client within a limit on its backward pass, for every limit that matters.
    fn thresholds(
        &self,
        clients: &[ClientFacts],
        fitting: &[Vec<usize>],
        rank: usize,
    ) -> Result<Vec<Vec<usize>>, String> {
        let mut backward: Vec<BTreeMap<usize, f64>> = vec![BTreeMap::new(); clients.len()];
        for split in self.splits(self.run()?.blocks()) {
            let split = split as usize;
            let times = self.times(clients, &vec![split; clients.len()], rank)?;
            for (of_client, seconds) in backward.iter_mut().zip(times.phases.backward) {
                of_client.insert(split, seconds);
            }
        }
        let mut limits: Vec<f64> = backward
            .iter()
            .flat_map(|of_client| of_client.values().copied())
            .collect();
        limits.sort_by(f64::total_cmp);
        limits.dedup();
        let within = |limit: f64| -> Option<Vec<usize>> {
            (fitting.iter().zip(&backward))
                .map(|(fitting, backward)| {
                    let quick = |split: &usize| backward.get(split).is_some_and(|seconds| *seconds <= limit);
                    fitting.iter().copied().filter(quick).max()
                })
                .collect()
        };
        Ok(limits.into_iter().filter_map(within).collect())
    }

    /// Moves one client's cut by one or two places as long as that shortens the run.
    fn refined(
        &self,
        clients: &[ClientFacts],
        fitting: &[Vec<usize>],
        mut best: Found,
        rounds: f64,
    ) -> Result<Found, String> {
        'moved: for _ in 0..MOVES {
            for (client, fitting) in fitting.iter().enumerate() {
                let Some(place) = fitting.iter().position(|split| *split == best.cuts[client]) else {
                    continue;
                };
                for change in [-1_isize, 1, -2, 2] {
                    let Some(&split) = place.checked_add_signed(change).and_then(|place| fitting.get(place)) else {
                        continue;
                    };
                    let mut cuts = best.cuts.clone();
                    cuts[client] = split;
                    let total_s = self.total_s(clients, &cuts, (best.rank, rounds))?;
                    if total_s < best.total_s * (1.0 - SAME) {
                        (best.total_s, best.cuts) = (total_s, cuts);
                        continue 'moved;
                    }
                }
            }
            break;
        }
        Ok(best)
    }

    /// The cut and rank with the shortest run at the rates there are.
    fn shortest(&self, clients: &[ClientFacts], ranks: &[(u32, f64)]) -> Result<(usize, usize), String> {
        let mut fitting = Vec::with_capacity(ranks.len());
        for &(rank, rounds) in ranks {
            let of_clients = clients.iter().map(|client| self.fitting(client, rank as usize));
            fitting.push((rank as usize, rounds, of_clients.collect::<Result<Vec<_>, _>>()?));
        }
        let mut best: Option<(f64, usize, usize)> = None;
        for split in self.splits(self.run()?.blocks()) {
            for &(rank, rounds, ref fitting) in &fitting {
                let split = split as usize;
                if !fitting.iter().all(|fitting| fitting.contains(&split)) {
                    continue;
                }
                let total = self.total_s(clients, &vec![split; clients.len()], (rank, rounds))?;
                if best.is_none_or(|(least, ..)| total < least) {
                    best = Some((total, split, rank));
                }
            }
        }
        let (_, split, rank) = best.ok_or_else(|| {
            "no cut fits the memory of all clients; leave the smallest device out, or choose a smaller model".to_owned()
        })?;
        Ok((split, rank))
    }

    /// Everything at these cuts, in the clients' order, the smallest of the run being `cut`.
    fn decision(
        &self,
        clients: &[ClientFacts],
        (cut, cuts): (usize, &[usize]),
        rank: usize,
        reason: String,
    ) -> Result<Option<Decision>, String> {
        let times = self.times(clients, cuts, rank)?;
        let of_client = |(position, facts): (usize, &ClientFacts)| {
            let prediction = ClientPrediction {
                step: times.phases.of(position),
                federated_s: times.adapter_s[position],
            };
            (facts.id, prediction)
        };
        Ok(Some(Decision {
            cut,
            cuts: BTreeMap::new(),
            rank,
            rates: self.rates_of(clients),
            prediction: Some(RoundPrediction {
                clients: clients.iter().enumerate().map(of_client).collect(),
                server_s: times.server_s,
                total_s: times.round_s(self.run()?.local_steps),
            }),
            reason,
        }))
    }

    /// The same at the start, where clients may be given cuts of their own.
    fn opening(
        &self,
        clients: &[ClientFacts],
        cuts: &[usize],
        rank: usize,
        reason: String,
    ) -> Result<Option<Decision>, String> {
        let cut = cuts.iter().copied().min().unwrap_or(1);
        let mut decision = self.decision(clients, (cut, cuts), rank, reason)?;
        if let Some(decision) = &mut decision
            && cuts.iter().any(|&own| own != cut)
        {
            decision.cuts = clients.iter().map(|facts| facts.id).zip(cuts.iter().copied()).collect();
        }
        Ok(decision)
    }

    /// Takes the links' rates from a plan, for the places in order.
    fn take_rates(&mut self, problem: &Problem, plan: &allocation::Plan) -> Result<(), String> {
        let rate = |client: usize| {
            let main = (problem.main).rate_bits_per_s(client, &plan.main.owner, &plan.main.power_w);
            let federated = (problem.federated).rate_bits_per_s(client, &plan.federated.owner, &plan.federated.power_w);
            LinkRates::new(main, federated).ok_or_else(|| {
                format!(
                    "the plan gives client {client} of the scenario {main} and {federated} bit/s, which no link has"
                )
            })
        };
        self.rates = (0..problem.clients()).map(rate).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// What a round showed, in place of what was supposed.
    fn learn(&mut self, facts: &RoundFacts) -> Result<(), String> {
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

impl Planner for Allocator {
    fn start(&mut self, facts: &StartFacts) -> Result<Option<Decision>, String> {
        self.run = Some(Shape {
            config: facts.config.clone(),
            training: facts.training.clone(),
            local_steps: facts.local_steps,
        });
        if let Some(speed) = facts
            .server_flops_per_s
            .filter(|speed| speed.is_finite() && *speed > 0.0)
        {
            self.server_flops_per_s = speed;
        }
        self.settle(&facts.clients);
        let ranks = self.ranks(facts.rank)?;
        let blocks = u32::try_from(facts.config.blocks).unwrap_or(u32::MAX);
        let Some(scenario) = &self.settings.scenario else {
            let (cuts, rank) = match self.settings.per_client_split {
                true => self.shortest_per_client(&facts.clients, &ranks)?,
                false => {
                    let (cut, rank) = self.shortest(&facts.clients, &ranks)?;
                    (vec![cut; facts.clients.len()], rank)
                }
            };
            return self.opening(
                &facts.clients,
                &cuts,
                rank,
                "by the speeds measured at the start".to_owned(),
            );
        };
        let places = scenario.clients.count;
        if facts.clients.len() != places {
            return Err(format!(
                "the scenario has places for {places} clients and {} joined; start with --clients {places}, or set clients.count",
                facts.clients.len()
            ));
        }
        let ids: Vec<ClientId> = facts.clients.iter().map(|facts| facts.id).collect();
        let (problem, plan) = self.solve(&ids, &self.splits(blocks), &ranks, self.settings.per_client_split)?;
        self.take_rates(&problem, &plan)?;
        self.settle(&facts.clients);
        // Clients were given their places in the order of the facts.
        let cuts: Vec<usize> = (plan.split_index.iter())
            .map(|&index| problem.splits[index] as usize)
            .collect();
        let reason = format!(
            "method {}, {:.1} s to the target by the model, {}",
            plan.method,
            plan.total_s,
            certificate(&plan)
        );
        let rank = problem.ranks[plan.rank_index] as usize;
        self.opening(&facts.clients, &cuts, rank, reason)
    }

    fn boundary(&mut self, facts: &RoundFacts) -> Result<Option<Decision>, String> {
        self.learn(facts)?;
        self.settle(&facts.clients);
        let cuts: Vec<usize> = facts.clients.iter().map(|client| facts.cut_of(client.id)).collect();
        let stay = |this: &Self, reason: String| this.decision(&facts.clients, (facts.cut, &cuts), facts.rank, reason);
        let fixed = self.settings.split.is_some() || !facts.can_recut || facts.round >= facts.rounds;
        // A random plan, and the paper's, are carried out as they were made.
        if fixed || self.settings.method != Method::Best {
            return stay(self, "as before".to_owned());
        }
        let run = self.run()?;
        let (local_steps, blocks) = (run.local_steps, run.blocks());
        let rank = [(u32::try_from(facts.rank).unwrap_or(u32::MAX), 1.0)];
        let now_s = self.times(&facts.clients, &cuts, facts.rank)?.round_s(local_steps);
        let uniform = |cut: usize| vec![cut; facts.clients.len()];
        let (cut, then_s, plan) = match &self.settings.scenario {
            // Without somebody at every place there is no problem to solve: links stay as they are.
            Some(scenario)
                if self.places.len() != scenario.clients.count || facts.clients.len() != self.places.len() =>
            {
                return stay(self, "as before".to_owned());
            }
            Some(_) => {
                let mut by_place: Vec<(usize, ClientId)> =
                    self.places.iter().map(|(&client, &place)| (place, client)).collect();
                by_place.sort_unstable();
                let ids: Vec<ClientId> = by_place.into_iter().map(|(_, client)| client).collect();
                let (problem, plan) = self.solve(&ids, &self.splits(blocks), &rank, false)?;
                let cut = plan.split_index.first().map_or(1, |&index| problem.splits[index]);
                (cut as usize, plan.total_s, Some((problem, plan)))
            }
            None => {
                let (cut, _) = self.shortest(&facts.clients, &rank)?;
                let then_s = self
                    .times(&facts.clients, &uniform(cut), facts.rank)?
                    .round_s(local_steps);
                (cut, then_s, None)
            }
        };
        if cut == facts.cut || then_s >= now_s * (1.0 - MARGIN) {
            return stay(self, "as before".to_owned());
        }
        if let Some((problem, plan)) = &plan {
            self.take_rates(problem, plan)?;
        }
        let reason = format!("a round of {then_s:.2} s instead of {now_s:.2} s by the phases measured");
        self.decision(&facts.clients, (cut, &uniform(cut)), facts.rank, reason)
    }
}

fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// How good a plan is, in words.
fn certificate(plan: &allocation::Plan) -> String {
    match plan.gap() {
        gap if gap < 1e-6 => "the best there is".to_owned(),
        gap => format!("at most {:.2} % above the best there is", 100.0 * gap),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::{LoraSpec, Target};
    use crate::terms::optimizer::{OptimizerSettings, Schedule};
    use crate::terms::tensor::WireForm;

    fn config() -> Architecture {
        Architecture::from_json(
            r#"{"model_type":"gpt2","n_layer":6,"n_embd":64,"n_head":4,"vocab_size":300,"n_positions":64}"#,
        )
        .unwrap()
    }

    fn training() -> Training {
        Training {
            spec: LoraSpec::new(4, 8.0, [Target::AttnQkv]).unwrap(),
            optimizer: OptimizerSettings {
                lr: 1e-3,
                weight_decay: 0.0,
                schedule: Schedule::Constant,
                warmup: 0,
                total_steps: 100,
                clip: None,
            },
            batch: 4,
            seq: 32,
            wire: WireForm::F16,
        }
    }

    fn client(id: u64, flops_per_s: f64) -> ClientFacts {
        ClientFacts {
            id: ClientId(id),
            name: String::new(),
            device: String::new(),
            memory_bytes: 0,
            speed: Speed::new(flops_per_s, flops_per_s),
        }
    }

    fn start(clients: Vec<ClientFacts>, server_flops_per_s: f64) -> StartFacts {
        StartFacts {
            clients,
            server_flops_per_s: Some(server_flops_per_s),
            cut: 1,
            rank: 4,
            config: config(),
            training: training(),
            rounds: 10,
            local_steps: 5,
        }
    }

    fn settings() -> Settings {
        Settings {
            scenario: None,
            method: Method::Best,
            seed: 0,
            split: None,
            per_client_split: false,
            rank: None,
            rounds: None,
        }
    }

    /// A round at `cut` in which client `id` computed at `flops_per_s`, the server at `server_flops_per_s`.
    fn round(allocator: &Allocator, cut: usize, speeds: &[(u64, f64)], server_flops_per_s: f64) -> RoundFacts {
        let workload = allocator.run().unwrap().workload();
        let measured = |&(id, speed): &(u64, f64)| ClientRound {
            id: ClientId(id),
            steps: 5,
            phases: Phases {
                forward: workload.client_forward_flops(cut, 4) / speed,
                upload: 0.01,
                download: 0.01,
                backward: workload.client_backward_flops(cut, 4) / speed,
            },
            activation_bits: 1e5,
            gradient_bits: 1e5,
            federated_s: Some(0.01),
            adapter_bits: Some(1e5),
        };
        RoundFacts {
            round: 1,
            rounds: 10,
            cut,
            cuts: BTreeMap::new(),
            rank: 4,
            can_recut: true,
            clients: speeds.iter().map(|&(id, speed)| client(id, speed)).collect(),
            measured: speeds.iter().map(measured).collect(),
            server_s: Some(speeds.len() as f64 * workload.server_flops(cut, 4) / server_flops_per_s),
        }
    }

    fn decided(decision: Result<Option<Decision>, String>) -> Decision {
        decision.unwrap().unwrap()
    }

    #[test]
    fn a_slow_server_gives_blocks_away_and_slow_clients_keep_few() {
        let clients = || vec![client(1, 1e9), client(2, 1e9)];
        let deep = decided(Allocator::new(settings()).start(&start(clients(), 1e8)));
        let shallow = decided(Allocator::new(settings()).start(&start(clients(), 1e11)));
        assert_eq!((deep.cut, shallow.cut), (5, 1));
        assert_eq!((deep.rank, shallow.rank), (4, 4));
    }

    fn per_client() -> Settings {
        Settings {
            per_client_split: true,
            ..settings()
        }
    }

    #[test]
    fn a_slow_and_a_fast_client_of_a_slow_server_get_cuts_of_their_own() {
        let clients = || vec![client(1, 1e7), client(2, 1e9)];
        let one = decided(Allocator::new(settings()).start(&start(clients(), 2e8)));
        let mut allocator = Allocator::new(per_client());
        let own = decided(allocator.start(&start(clients(), 2e8)));
        assert!(one.cuts.is_empty());
        let cut = |id| own.cuts[&ClientId(id)];
        assert!(cut(1) < cut(2), "{:?}", own.cuts);
        assert_eq!(own.cut, cut(1), "the smallest");
        let total = |decision: &Decision| decision.prediction.as_ref().unwrap().total_s;
        assert!(total(&own) < total(&one), "{} and {}", total(&own), total(&one));
        // No other cuts are predicted to be faster: all of them are few enough to try.
        let facts = clients();
        for first in 1..6 {
            for second in 1..6 {
                let other = allocator.times(&facts, &[first, second], 4).unwrap().round_s(5);
                assert!(total(&own) <= other * (1.0 + 1e-9), "{first}, {second}: {other}");
            }
        }
        // While cuts differ nothing moves, and what is learned is of each client's own blocks.
        let workload = allocator.run().unwrap().workload();
        let mut facts = round(&allocator, own.cut, &[(1, 1e7), (2, 1e9)], 2e8);
        facts.cuts = own.cuts.clone();
        facts.can_recut = false;
        facts.measured[1].phases.forward = workload.client_forward_flops(cut(2), 4) / 3e9;
        facts.measured[1].phases.backward = workload.client_backward_flops(cut(2), 4) / 3e9;
        let then = decided(allocator.boundary(&facts));
        assert_eq!((then.cut, then.cuts.len()), (own.cut, 0));
        let learned = allocator.known[&ClientId(2)].speed.unwrap();
        assert!((learned.forward_flops_per_s / 3e9 - 1.0).abs() < 1e-9);
        let (before, after) = (own.prediction.unwrap(), then.prediction.unwrap());
        assert!(after.clients[&ClientId(2)].step.forward < before.clients[&ClientId(2)].step.forward);
    }

    #[test]
    fn equal_clients_have_one_cut_for_all() {
        for server in [1e8, 1e11] {
            let clients = vec![client(1, 1e9), client(2, 1e9)];
            let one = decided(Allocator::new(settings()).start(&start(clients.clone(), server)));
            let own = decided(Allocator::new(per_client()).start(&start(clients, server)));
            assert_eq!(own, one);
        }
    }

    #[test]
    fn a_scenario_gives_clients_cuts_of_their_own() {
        let settings = Settings {
            scenario: Some(radio(3)),
            ..per_client()
        };
        let clients = vec![client(1, 1e7), client(2, 1e9), client(3, 1e9)];
        let one = Settings {
            scenario: Some(radio(3)),
            ..self::settings()
        };
        let own = decided(Allocator::new(settings).start(&start(clients.clone(), 2e8)));
        let one = decided(Allocator::new(one).start(&start(clients, 2e8)));
        assert_eq!((own.cuts.len(), own.rates.len()), (3, 3));
        assert_eq!(own.cuts.values().min(), Some(&own.cut));
        assert!(own.cuts[&ClientId(1)] < own.cuts[&ClientId(2)], "{:?}", own.cuts);
        assert!(own.prediction.unwrap().total_s < one.prediction.unwrap().total_s);
    }

    #[test]
    fn a_device_without_the_memory_keeps_the_cut_shallow() {
        let mut small = client(2, 1e9);
        let run = Shape {
            config: config(),
            training: training(),
            local_steps: 5,
        };
        let needed = |cut| run.workload().client_memory_bytes(cut, 4, Format::F16, WireForm::F16) as u64;
        small.memory_bytes = needed(2) + 1;
        let mut allocator = Allocator::new(settings());
        assert_eq!(
            decided(allocator.start(&start(vec![client(1, 1e9), small.clone()], 1e8))).cut,
            2
        );
        small.memory_bytes = needed(1) - 1;
        let error = Allocator::new(settings()).start(&start(vec![client(1, 1e9), small], 1e8));
        assert!(error.unwrap_err().contains("memory"));
    }

    #[test]
    fn the_cut_moves_when_the_measured_phases_say_it_pays_by_the_margin() {
        let mut allocator = Allocator::new(settings());
        // The server said it was fast, and is not.
        let first = decided(allocator.start(&start(vec![client(1, 1e9), client(2, 1e9)], 1e11)));
        assert_eq!(first.cut, 1);
        let facts = round(&allocator, 1, &[(1, 1e9), (2, 1e9)], 1e8);
        let moved = decided(allocator.boundary(&facts));
        assert_eq!(moved.cut, 5);
        let prediction = moved.prediction.unwrap();
        assert!((prediction.clients[&ClientId(1)].step.upload - 0.01).abs() < 1e-12);

        // Where a block is as fast on either side, nothing pays.
        let mut allocator = Allocator::new(settings());
        decided(allocator.start(&start(vec![client(1, 1e9)], 1e9)));
        let even = round(&allocator, 3, &[(1, 1e9)], 1.02e9);
        assert_eq!(decided(allocator.boundary(&even)).cut, 3);
        let not_now = RoundFacts {
            can_recut: false,
            ..round(&allocator, 3, &[(1, 1e9)], 1e8)
        };
        assert_eq!(decided(allocator.boundary(&not_now)).cut, 3);
        let fixed = Settings {
            split: Some(3),
            ..settings()
        };
        let mut allocator = Allocator::new(fixed);
        assert_eq!(decided(allocator.start(&start(vec![client(1, 1e9)], 1e8))).cut, 3);
        let slow = round(&allocator, 3, &[(1, 1e9)], 1e8);
        assert_eq!(decided(allocator.boundary(&slow)).cut, 3);
    }

    #[test]
    fn the_rank_follows_the_calibrated_rounds() {
        let table = |rounds: &str| {
            RoundsTable::from_json(&format!(r#"{{"schema":1,"ranks":[2,16],"rounds":{rounds}}}"#)).unwrap()
        };
        let chosen = |rounds: &str| {
            let settings = Settings {
                rounds: Some(table(rounds)),
                ..settings()
            };
            decided(Allocator::new(settings).start(&start(vec![client(1, 1e9)], 1e9))).rank
        };
        assert_eq!(chosen("[30, 10]"), 16);
        assert_eq!(chosen("[10, 10]"), 2);
    }

    fn radio(clients: usize) -> Scenario {
        Scenario::preset("selective")
            .unwrap()
            .with(serde_json::json!({
                "clients": { "count": clients },
                "training": { "rounds": { "2": 12.0, "4": 10.0 } },
            }))
            .unwrap()
    }

    #[test]
    fn a_scenario_gives_every_client_the_rates_of_its_plan() {
        let settings = Settings {
            scenario: Some(radio(3)),
            ..settings()
        };
        let mut allocator = Allocator::new(settings);
        let clients: Vec<ClientFacts> = (1..=3).map(|id| client(id, 1e9)).collect();
        let decision = decided(allocator.start(&start(clients, 1e10)));
        assert_eq!(decision.rates.len(), 3);
        let prediction = decision.prediction.unwrap();
        let run = allocator.run().unwrap();
        let workload = run.workload();
        let bits = workload.activation_bits(WireForm::F16) + workload.label_bits();
        for (id, rates) in &decision.rates {
            let predicted = prediction.clients[id];
            assert!((predicted.step.upload * rates.main_bits_per_s / bits - 1.0).abs() < 1e-9);
        }
        // All clients that send end together, so the step is what the model says of any of them.
        let phases: Vec<_> = prediction.clients.values().collect();
        let upload = phases
            .iter()
            .map(|p| p.step.forward + p.step.upload)
            .fold(0.0, f64::max);
        let backward = phases.iter().map(|p| p.step.backward).fold(0.0, f64::max);
        let federated = phases.iter().map(|p| p.federated_s).fold(0.0, f64::max);
        let round_s = 5.0 * (upload + prediction.server_s + backward) + federated;
        assert!((prediction.total_s / round_s - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_newcomer_takes_the_place_of_the_client_that_left() {
        let settings = Settings {
            scenario: Some(radio(2)),
            ..settings()
        };
        let mut allocator = Allocator::new(settings);
        let first = decided(allocator.start(&start(vec![client(1, 1e9), client(2, 1e9)], 1e10)));
        let facts = round(&allocator, first.cut, &[(1, 1e9), (7, 1e9)], 1e10);
        let then = decided(allocator.boundary(&facts));
        assert_eq!(then.rates[&ClientId(7)], first.rates[&ClientId(2)]);
        assert_eq!(then.rates[&ClientId(1)], first.rates[&ClientId(1)]);
        assert!(!then.rates.contains_key(&ClientId(2)));
    }

    #[test]
    fn a_scenario_for_other_numbers_of_clients_is_refused() {
        let settings = Settings {
            scenario: Some(radio(3)),
            ..settings()
        };
        let error = Allocator::new(settings)
            .start(&start(vec![client(1, 1e9)], 1e10))
            .unwrap_err();
        assert!(error.contains("3 clients") && error.contains("1 joined"), "{error}");
    }

    #[test]
    fn the_papers_methods_are_carried_out_as_they_were_made() {
        for method in [Method::Bcd, Method::A] {
            let settings = Settings {
                scenario: Some(radio(2)),
                method,
                ..settings()
            };
            let mut allocator = Allocator::new(settings);
            let first = decided(allocator.start(&start(vec![client(1, 1e9), client(2, 1e9)], 1e12)));
            let facts = round(&allocator, first.cut, &[(1, 1e9), (2, 1e9)], 1e7);
            let then = decided(allocator.boundary(&facts));
            assert_eq!((then.cut, then.rates), (first.cut, first.rates));
        }
    }
}
