//! Every client its own cut.
//!
//! Separate from the search over one cut for all because there are too many choices to open each: good ones are guessed and
//! sharpened, and a bound of its own says how good that is.

use super::super::delay::{Cell, Problem};
use super::super::power::Demand;
use super::super::{Choice, Error};
use super::{Effort, Links, SAME, Solved, best_first, uniform};

/// Assignments of cuts to clients that are all opened.
const ENUMERATED_CUTS: f64 = 3e5;
/// Assignments of cuts that are solved at most, when there are too many to exhaust them.
const SOLVED_CUTS: usize = 400;

/// Every client its own cut, one rank for all: thresholds on the backward pass, sharpened client by client, and exhaustion
/// where there are few enough assignments.
pub(crate) fn per_client(links: &Links<'_>) -> Result<(Solved, f64), Error> {
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
fn deepest(problem: &Problem, client: usize, rank: usize, allowed: impl Fn(&Cell) -> bool) -> Option<usize> {
    (0..problem.splits.len())
        .filter(|&split| problem.fits(client, split, rank) && allowed(&problem.cells[split][rank]))
        .min_by(|&a, &b| {
            let work = |split: usize| problem.cells[split][rank].server_s;
            work(a).total_cmp(&work(b))
        })
}

pub(super) fn every_choice(problem: &Problem) -> Vec<Choice> {
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
pub(super) fn per_client_bound_s(links: &Links<'_>) -> f64 {
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
        let least_bits = |bits: fn(&Cell) -> f64| cells().map(bits).fold(f64::INFINITY, f64::min);
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
