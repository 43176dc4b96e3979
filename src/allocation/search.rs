//! The best cut and rank with the best links, and a proof of how good that is.
//!
//! Cells (cut, rank) are opened in the order of their lower bounds, each first with a bound that costs nothing, then with the
//! count bound of its links, and only then solved. The search ends when no cell that is left can beat the best plan; the smallest
//! bound that remains is the certificate.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::bound::Ladders;
use super::delay::Problem;
use super::power::{Demand, LinkPlan};
use super::prices::{Market, Prices};
use super::subchannel::{self, LinkOptions, LinkSolution, Start};
use super::{Choice, Error};

/// Relative width below which two totals are the same.
const SAME: f64 = 1e-12;

/// A problem's links, prepared for any deadline.
pub(super) struct Links<'a> {
    pub problem: &'a Problem,
    pub main: Ladders<'a>,
    pub federated: Ladders<'a>,
    pub download: Option<Ladders<'a>>,
    /// No client sends a bit in less, waits aside, in s/bit.
    main_s_per_bit: f64,
    download_s_per_bit: f64,
    /// The federated link solved for one bit of each client. Without waits time and energy are proportional to the bits.
    federated_unit: LinkSolution,
}

/// The federated link's reference payload.
const UNIT_BITS: f64 = 1.0;

impl<'a> Links<'a> {
    pub fn new(problem: &'a Problem) -> Result<Self, Error> {
        let main = Ladders::new(&problem.main);
        let federated = Ladders::new(&problem.federated);
        let download = problem.download.as_ref().map(Ladders::new);
        let unit = |clients: usize| Demand {
            wait_s: vec![0.0; clients],
            payload_bits: vec![UNIT_BITS; clients],
        };
        let clients = problem.clients();
        let options = LinkOptions {
            energy_weight_s_per_j: problem.energy_weight_s_per_j,
            start: None,
            useful_below_s: None,
        };
        let federated_unit = subchannel::solve(&federated, &unit(clients), &options).ok_or(Error::Unreachable {
            link: super::LinkName::Federated,
        })?;
        Ok(Self {
            main_s_per_bit: main.lower_bound_s(&unit(clients)),
            download_s_per_bit: download
                .as_ref()
                .map_or(0.0, |download| download.lower_bound_s(&unit(clients))),
            problem,
            main,
            federated,
            download,
            federated_unit,
        })
    }

    /// The federated link at one cut for all: the solution for a bit, stretched.
    fn federated(&self, bits: f64) -> LinkSolution {
        let unit = &self.federated_unit;
        LinkSolution {
            plan: LinkPlan {
                phase_s: unit.plan.phase_s * bits,
                energy_j: unit.plan.energy_j * bits,
                ..unit.plan.clone()
            },
            lower_s: unit.lower_s * bits,
            prices: None,
        }
    }

    fn waits(demand: &Demand, s_per_bit: f64) -> f64 {
        let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
        let sending = least(&demand.wait_s) + least(&demand.payload_bits) * s_per_bit;
        sending.max(demand.longest_wait_s())
    }

    /// A lower bound on the total of `choice`, from what is known of the links at once.
    fn quick_bound_s(&self, choice: &Choice) -> f64 {
        let problem = self.problem;
        let Choice { split_index, rank } = choice;
        let main = Self::waits(&problem.main_demand(split_index, *rank), self.main_s_per_bit);
        let download = match &self.download {
            Some(_) => Self::waits(&problem.download_demand(split_index, *rank), self.download_s_per_bit),
            None => problem.backward_s(split_index, *rank),
        };
        let bits = problem.federated_demand(split_index, *rank).payload_bits;
        let least = bits.iter().copied().fold(f64::INFINITY, f64::min);
        problem.total_s(
            split_index,
            *rank,
            (main, self.federated_unit.lower_s * least, download),
        )
    }

    /// The same from the count bounds of its links.
    pub fn count_bound_s(&self, choice: &Choice) -> f64 {
        let demand = self.problem.main_demand(&choice.split_index, choice.rank);
        self.bound_with_main_s(choice, self.main.lower_bound_s(&demand))
    }

    /// The same when the upload phase is known to take `main` at least.
    fn bound_with_main_s(&self, choice: &Choice, main: f64) -> f64 {
        let problem = self.problem;
        let Choice { split_index, rank } = choice;
        let download = match &self.download {
            Some(download) => download.lower_bound_s(&problem.download_demand(split_index, *rank)),
            None => problem.backward_s(split_index, *rank),
        };
        let demand = problem.federated_demand(split_index, *rank);
        let federated = match choice.is_uniform() {
            true => self.federated_unit.lower_s * demand.payload_bits[0],
            false => self.federated.lower_bound_s(&demand),
        };
        problem.total_s(split_index, *rank, (main, federated, download))
    }

    /// The upload phase with which `choice` could at best equal `total_s`; `None` where that is not simply said.
    fn main_limit_s(&self, choice: &Choice, total_s: f64) -> Option<f64> {
        let problem = self.problem;
        let Choice { split_index, rank } = choice;
        if problem.energy_weight_s_per_j > 0.0 || self.download.is_some() || !choice.is_uniform() {
            return None;
        }
        let bits = problem.federated_demand(split_index, *rank).payload_bits[0];
        let others = problem.total_s(
            split_index,
            *rank,
            (
                0.0,
                self.federated_unit.plan.phase_s * bits,
                problem.backward_s(split_index, *rank),
            ),
        );
        Some((total_s - others) / (problem.rounds[*rank] * f64::from(problem.local_steps)))
    }

    /// Whether the prices that bound `best` prove that `choice` is no better.
    fn cannot_beat(&self, choice: &Choice, best: &Solved) -> bool {
        let Some(prices) = &best.main_prices else { return false };
        let Choice { split_index, rank } = choice;
        let per_second = self.problem.rounds[*rank] * f64::from(self.problem.local_steps);
        let limit_s = (best.total_s * (1.0 - SAME) - self.bound_with_main_s(choice, 0.0)) / per_second;
        let demand = self.problem.main_demand(split_index, *rank);
        limit_s <= 0.0 || Market::new(&self.main, &demand, Some(prices)).is_impossible(limit_s)
    }

    /// `choice` with the best links that are found.
    pub fn solve(&self, choice: &Choice, start: Option<&Solved>) -> Option<Solved> {
        let problem = self.problem;
        let Choice { split_index, rank } = choice;
        let weight = problem.energy_weight_s_per_j;
        let link = |ladders: &Ladders<'_>, demand: &Demand, start: Option<Start<'_>>, useful_below_s: Option<f64>| {
            let options = LinkOptions {
                energy_weight_s_per_j: weight,
                start,
                useful_below_s,
            };
            subchannel::solve(ladders, demand, &options)
        };
        let main = link(
            &self.main,
            &problem.main_demand(split_index, *rank),
            start.map(|start| Start {
                prices: start.main_prices.as_ref(),
                ..Start::from(&start.main)
            }),
            start.and_then(|start| self.main_limit_s(choice, start.total_s)),
        )?;
        let demand = problem.federated_demand(split_index, *rank);
        let federated = match choice.is_uniform() {
            true => self.federated(demand.payload_bits[0]),
            false => link(
                &self.federated,
                &demand,
                start.map(|start| Start::from(&start.federated)),
                None,
            )?,
        };
        let download = match &self.download {
            Some(download) => Some(link(
                download,
                &problem.download_demand(split_index, *rank),
                start.and_then(|start| start.download.as_ref()).map(Start::from),
                None,
            )?),
            None => None,
        };
        let backward_s = problem.backward_s(split_index, *rank);
        let cost = |solution: &LinkSolution| solution.plan.cost_s(weight);
        Some(Solved {
            choice: choice.clone(),
            total_s: problem.total_s(
                split_index,
                *rank,
                (
                    cost(&main),
                    cost(&federated),
                    download.as_ref().map_or(backward_s, cost),
                ),
            ),
            lower_s: problem.total_s(
                split_index,
                *rank,
                (
                    main.lower_s,
                    federated.lower_s,
                    download.as_ref().map_or(backward_s, |download| download.lower_s),
                ),
            ),
            main: main.plan,
            main_prices: main.prices,
            federated: federated.plan,
            download: download.map(|download| download.plan),
        })
    }

    /// Every cut and rank that is the same for all clients and fits their memory.
    fn uniform(&self) -> Vec<Choice> {
        let problem = self.problem;
        let clients = problem.clients();
        let mut choices = Vec::new();
        for split in 0..problem.splits.len() {
            for rank in 0..problem.ranks.len() {
                if (0..clients).all(|client| problem.fits(client, split, rank)) {
                    choices.push(Choice {
                        split_index: vec![split; clients],
                        rank,
                    });
                }
            }
        }
        choices
    }

    /// A lower bound on every plan with one cut for all clients.
    pub fn uniform_bound_s(&self) -> f64 {
        best_first(self, self.uniform(), None, Effort::Bound).1
    }
}

/// A choice with its links.
#[derive(Clone, Debug)]
pub(super) struct Solved {
    pub choice: Choice,
    pub total_s: f64,
    pub lower_s: f64,
    pub main: LinkPlan,
    pub main_prices: Option<Prices>,
    pub federated: LinkPlan,
    pub download: Option<LinkPlan>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Quick,
    Counted,
}

/// A choice that has not been solved. The heap gives the least bound first.
struct Open {
    bound_s: f64,
    stage: Stage,
    choice: Choice,
}

impl Open {
    fn new(bound_s: f64, stage: Stage, choice: Choice) -> Self {
        Self { bound_s, stage, choice }
    }
}

impl PartialEq for Open {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Open {}

impl PartialOrd for Open {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Open {
    fn cmp(&self, other: &Self) -> Ordering {
        other.bound_s.total_cmp(&self.bound_s)
    }
}

/// What the count bound said of one demand on the main link, and so of every other with as much to send: when nobody waits
/// less than `d` longer, no phase is less than `d` longer.
struct Seen {
    demand: Demand,
    main_s: f64,
}

impl Seen {
    fn main_bound_s(&self, demand: &Demand) -> f64 {
        let sends_less = (demand.payload_bits.iter())
            .zip(&self.demand.payload_bits)
            .any(|(bits, seen)| bits < seen);
        if sends_less {
            return 0.0;
        }
        let later_s = (demand.wait_s.iter().zip(&self.demand.wait_s)).map(|(wait, seen)| wait - seen);
        (self.main_s + later_s.fold(f64::INFINITY, f64::min)) * (1.0 - SAME)
    }
}

/// Count bounds that are kept for other choices.
const SEEN: usize = 64;

/// What [`best_first`] is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effort {
    /// The count bounds alone.
    Bound,
    Plan,
}

/// The best plan that is found, if any can be heard, and a bound that no plan in `choices` beats.
fn best_first(
    links: &Links<'_>,
    choices: Vec<Choice>,
    mut best: Option<Solved>,
    effort: Effort,
) -> (Option<Solved>, f64) {
    let mut open: BinaryHeap<Open> = choices
        .into_iter()
        .map(|choice| Open::new(links.quick_bound_s(&choice), Stage::Quick, choice))
        .collect();
    let mut lower_s = f64::INFINITY;
    let mut seen: Vec<Seen> = Vec::new();
    while let Some(Open { bound_s, stage, choice }) = open.pop() {
        if let Some(best) = &best
            && bound_s >= best.total_s * (1.0 - SAME)
        {
            lower_s = lower_s.min(bound_s);
            break;
        }
        match stage {
            Stage::Quick => {
                let demand = links.problem.main_demand(&choice.split_index, choice.rank);
                let known_s = seen.iter().map(|seen| seen.main_bound_s(&demand)).fold(0.0, f64::max);
                let inferred_s = match known_s > 0.0 && choice.is_uniform() {
                    true => links.bound_with_main_s(&choice, known_s),
                    false => 0.0,
                };
                if inferred_s > bound_s * (1.0 + SAME) {
                    open.push(Open::new(inferred_s, Stage::Quick, choice));
                    continue;
                }
                let main_s = links.main.lower_bound_s(&demand);
                let bound_s = links.bound_with_main_s(&choice, main_s).max(bound_s);
                if seen.len() < SEEN {
                    seen.push(Seen { demand, main_s });
                }
                open.push(Open::new(bound_s, Stage::Counted, choice));
            }
            Stage::Counted if effort == Effort::Bound => {
                lower_s = lower_s.min(bound_s);
                break;
            }
            Stage::Counted => {
                if let Some(best) = &best
                    && links.cannot_beat(&choice, best)
                {
                    lower_s = lower_s.min(best.total_s);
                    continue;
                }
                let Some(solved) = links.solve(&choice, best.as_ref()) else {
                    continue;
                };
                lower_s = lower_s.min(solved.lower_s.max(bound_s));
                if best.as_ref().is_none_or(|best| solved.total_s < best.total_s) {
                    best = Some(solved);
                }
            }
        }
    }
    let lower_s = best.as_ref().map_or(lower_s, |best| lower_s.min(best.total_s));
    (best, lower_s)
}

/// One cut and one rank for all clients.
pub(super) fn uniform(links: &Links<'_>) -> Result<(Solved, f64), Error> {
    let choices = links.uniform();
    if choices.is_empty() {
        return Err(Error::NothingFits);
    }
    let (best, lower_s) = best_first(links, choices, None, Effort::Plan);
    let unreachable = Error::Unreachable {
        link: super::LinkName::Main,
    };
    Ok((best.ok_or(unreachable)?, lower_s))
}

/// Assignments of cuts to clients that are all opened.
const ENUMERATED_CUTS: f64 = 3e5;
/// Assignments of cuts that are solved at most, when there are too many to exhaust them.
const SOLVED_CUTS: usize = 400;

/// Every client its own cut, one rank for all: thresholds on the backward pass, sharpened client by client, and exhaustion
/// where there are few enough assignments.
pub(super) fn per_client(links: &Links<'_>) -> Result<(Solved, f64), Error> {
    let problem = links.problem;
    let (clients, splits, ranks) = (problem.clients(), problem.splits.len(), problem.ranks.len());
    let mut best: Option<Solved> = match uniform(links) {
        Ok((solved, _)) => Some(solved),
        Err(Error::NothingFits) => None,
        Err(error) => return Err(error),
    };
    let mut candidates: Vec<(f64, Choice)> = thresholds(problem)
        .into_iter()
        .map(|choice| (links.quick_bound_s(&choice), choice))
        .collect();
    candidates.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (bound_s, choice) in candidates.into_iter().take(SOLVED_CUTS / 8) {
        if best.as_ref().is_some_and(|best| bound_s >= best.total_s) {
            break;
        }
        improve(links, &mut best, &choice);
    }
    let mut left = SOLVED_CUTS;
    'moved: while left > 0 {
        let Some(from) = best.as_ref().map(|best| best.choice.clone()) else {
            break;
        };
        for client in 0..clients {
            for change in [-1_isize, 1, -2, 2] {
                let Some(split) = from.split_index[client].checked_add_signed(change) else {
                    continue;
                };
                if split >= splits || !problem.fits(client, split, from.rank) {
                    continue;
                }
                let mut choice = from.clone();
                choice.split_index[client] = split;
                if left > 0 && improve_counted(links, &mut best, &choice, &mut left) {
                    continue 'moved;
                }
            }
        }
        break;
    }
    if (splits as f64).powi(clients as i32) * ranks as f64 <= ENUMERATED_CUTS {
        let (best, lower_s) = best_first(links, every_choice(problem), best, Effort::Plan);
        return Ok((best.ok_or(Error::NothingFits)?, lower_s));
    }
    let best = best.ok_or(Error::NothingFits)?;
    let lower_s = per_client_bound_s(links).min(best.lower_s);
    Ok((best, lower_s))
}

fn improve(links: &Links<'_>, best: &mut Option<Solved>, choice: &Choice) -> bool {
    let Some(solved) = links.solve(choice, best.as_ref()) else {
        return false;
    };
    let better = (best.as_ref()).is_none_or(|best| solved.total_s < best.total_s * (1.0 - SAME));
    if better {
        *best = Some(solved);
    }
    better
}

/// [`improve`] for choices whose bound leaves hope, counting those that are solved.
fn improve_counted(links: &Links<'_>, best: &mut Option<Solved>, choice: &Choice, left: &mut usize) -> bool {
    if let Some(best) = best
        && (links.count_bound_s(choice) >= best.total_s * (1.0 - SAME) || links.cannot_beat(choice, best))
    {
        return false;
    }
    *left -= 1;
    improve(links, best, choice)
}

/// The deepest cut of every client within a limit on its backward pass, for every limit that matters.
fn thresholds(problem: &Problem) -> Vec<Choice> {
    let mut choices = Vec::new();
    for rank in 0..problem.ranks.len() {
        for limit_s in backward_limits(problem, rank) {
            let split_index: Option<Vec<usize>> = (0..problem.clients())
                .map(|client| deepest(problem, client, rank, |cell| cell.client_backward_s[client] <= limit_s))
                .collect();
            if let Some(split_index) = split_index {
                choices.push(Choice { split_index, rank });
            }
        }
    }
    choices
}

/// Backward passes in s that some client has at some cut, each once.
fn backward_limits(problem: &Problem, rank: usize) -> Vec<f64> {
    let mut limits: Vec<f64> = (problem.cells.iter())
        .flat_map(|row| row[rank].client_backward_s.iter().copied())
        .collect();
    limits.sort_by(f64::total_cmp);
    limits.dedup();
    limits
}

/// The cut at which the server has least to do among those that fit and satisfy `allowed`.
fn deepest(
    problem: &Problem,
    client: usize,
    rank: usize,
    allowed: impl Fn(&super::delay::Cell) -> bool,
) -> Option<usize> {
    (0..problem.splits.len())
        .filter(|&split| problem.fits(client, split, rank) && allowed(&problem.cells[split][rank]))
        .min_by(|&a, &b| {
            let work = |split: usize| problem.cells[split][rank].server_s;
            work(a).total_cmp(&work(b))
        })
}

fn every_choice(problem: &Problem) -> Vec<Choice> {
    let (clients, splits) = (problem.clients(), problem.splits.len());
    let mut choices = Vec::new();
    for rank in 0..problem.ranks.len() {
        let mut split_index = vec![0; clients];
        loop {
            if (0..clients).all(|client| problem.fits(client, split_index[client], rank)) {
                choices.push(Choice {
                    split_index: split_index.clone(),
                    rank,
                });
            }
            let Some(position) = split_index.iter().position(|&split| split + 1 < splits) else {
                break;
            };
            split_index[..position].fill(0);
            split_index[position] += 1;
        }
    }
    choices
}

/// Intervals of the upload phase in [`per_client_bound_s`].
const INTERVALS: i32 = 64;

/// A lower bound on every plan with cuts of the clients' own. Whatever the cuts, the backward phase has some length β and the
/// upload phase lies in some interval; a client cut so that its backward pass exceeds β, or its forward pass and fastest
/// conceivable upload exceed the interval, contradicts that, and the server has at least the work that the other cuts leave it.
fn per_client_bound_s(links: &Links<'_>) -> f64 {
    let problem = links.problem;
    let clients = problem.clients();
    let mut least = f64::INFINITY;
    for rank in 0..problem.ranks.len() {
        let shallowest: Vec<usize> = (0..clients)
            .filter_map(|client| {
                (0..problem.splits.len())
                    .filter(|&split| problem.fits(client, split, rank))
                    .min_by(|&a, &b| {
                        let forward = |split: usize| problem.cells[split][rank].client_forward_s[client];
                        forward(a).total_cmp(&forward(b))
                    })
            })
            .collect();
        if shallowest.len() < clients {
            continue;
        }
        let cells = || problem.cells.iter().map(|row| &row[rank]);
        let least_bits = |bits: fn(&super::delay::Cell) -> f64| cells().map(bits).fold(f64::INFINITY, f64::min);
        let demand = Demand {
            wait_s: problem.main_demand(&shallowest, rank).wait_s,
            payload_bits: vec![least_bits(|cell| cell.upload_bits); clients],
        };
        let shortest_s = links.main.lower_bound_s(&demand);
        let federated = links.federated_unit.lower_s * least_bits(|cell| cell.adapter_bits);
        // Whatever the backward passes, the gradients must arrive.
        let download_s = links.download_s_per_bit * least_bits(|cell| cell.gradient_bits);
        let compute_j: f64 = (0..clients)
            .map(|client| cells().map(|cell| cell.compute_j[client]).fold(f64::INFINITY, f64::min))
            .sum();
        let longest_s = cells()
            .flat_map(|cell| cell.client_forward_s.iter().copied())
            .fold(shortest_s, f64::max);
        let ratio = (longest_s / shortest_s).powf(1.0 / f64::from(INTERVALS));
        // From 0 on no ratio leads anywhere: there the last interval is the only one.
        let first = if shortest_s > 0.0 { 0 } else { INTERVALS };
        for backward_s in backward_limits(problem, rank) {
            for interval in first..=INTERVALS {
                let from_s = match shortest_s > 0.0 {
                    true => shortest_s * ratio.powi(interval),
                    false => 0.0,
                };
                // The last interval has no end.
                let to_s = match interval == INTERVALS {
                    true => f64::INFINITY,
                    false => from_s * ratio * (1.0 + 1e-12),
                };
                let server: Option<f64> = (0..clients)
                    .map(|client| {
                        let split = deepest(problem, client, rank, |cell| {
                            cell.client_backward_s[client] <= backward_s && cell.client_forward_s[client] <= to_s
                        })?;
                        Some(problem.cells[split][rank].server_s)
                    })
                    .sum();
                let Some(server) = server else { continue };
                let step = from_s
                    + server / clients as f64
                    + backward_s.max(download_s)
                    + problem.energy_weight_s_per_j * compute_j;
                let total = problem.rounds[rank] * (f64::from(problem.local_steps) * step + federated);
                least = least.min(total);
            }
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::channel::{Channel, SnrPerWatt};
    use super::super::delay::Cell;
    use super::*;

    const CLIENTS: usize = 3;
    const SPLITS: usize = 4;

    fn channel(rng: &mut ChaCha8Rng) -> Channel {
        Channel {
            subchannels: 5,
            bandwidth_hz: 1e4,
            snr_per_watt: SnrPerWatt::Flat((0..CLIENTS).map(|_| rng.random_range(1.0..1e3)).collect()),
            power_max_w: vec![1.0; CLIENTS],
            power_total_w: rng.random_range(0.5..3.0),
        }
    }

    /// Few enough cuts to try them all.
    fn problem(seed: u64) -> Problem {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        // Sometimes there is nothing to wait for or to send.
        let zero = |rng: &mut ChaCha8Rng, scale: f64| scale * rng.random_range(-0.3..1.0_f64).max(0.0);
        let nothing = seed.is_multiple_of(5);
        let cells = (0..SPLITS).map(|_| {
            vec![Cell {
                client_forward_s: (0..CLIENTS)
                    .map(|_| if nothing { 0.0 } else { zero(rng, 2.0) })
                    .collect(),
                client_backward_s: (0..CLIENTS).map(|_| zero(rng, 4.0)).collect(),
                server_s: zero(rng, 6.0),
                upload_bits: if nothing { 0.0 } else { zero(rng, 3e4) },
                adapter_bits: zero(rng, 3e4),
                gradient_bits: zero(rng, 3e4),
                compute_j: (0..CLIENTS).map(|_| zero(rng, 1.0)).collect(),
                memory_bytes: (0..CLIENTS).map(|_| zero(rng, 1.0)).collect(),
            }]
        });
        let cells = cells.collect();
        Problem {
            local_steps: 3,
            main: channel(rng),
            federated: channel(rng),
            download: (seed.is_multiple_of(3)).then(|| channel(rng)),
            broadcast: None,
            splits: (1..=SPLITS as u32).collect(),
            ranks: vec![4],
            rounds: vec![10.0],
            cells,
            memory_max_bytes: (seed.is_multiple_of(4)).then(|| vec![0.8; CLIENTS]),
            energy_weight_s_per_j: if seed.is_multiple_of(2) { 0.0 } else { 0.1 },
        }
    }

    #[test]
    fn the_bound_on_cuts_of_the_clients_own_is_below_the_best_of_them() {
        let mut tight = 0;
        for seed in 0..400 {
            let problem = problem(seed);
            if problem.check().is_err() {
                continue;
            }
            let links = Links::new(&problem).unwrap();
            let (best, _) = per_client(&links).unwrap();
            let bound_s = per_client_bound_s(&links);
            assert!(
                bound_s <= best.total_s * (1.0 + 1e-9),
                "seed {seed}: {bound_s} {}",
                best.total_s
            );
            tight += usize::from(bound_s > 0.8 * best.total_s);
        }
        assert!(tight > 50, "{tight}");
    }

    #[test]
    fn bounds_of_a_choice_are_below_its_links() {
        for seed in 0..200 {
            let problem = problem(seed);
            if problem.check().is_err() {
                continue;
            }
            let links = Links::new(&problem).unwrap();
            for choice in every_choice(&problem) {
                let solved = links.solve(&choice, None).unwrap();
                for bound_s in [
                    links.quick_bound_s(&choice),
                    links.count_bound_s(&choice),
                    solved.lower_s,
                ] {
                    assert!(
                        bound_s <= solved.total_s * (1.0 + 1e-9),
                        "seed {seed}, {choice:?}: {bound_s} {}",
                        solved.total_s
                    );
                }
            }
        }
    }
}
