//! The best cut and rank with the best links, and a proof of how good that is.
//!
//! Cells (cut, rank) are opened in the order of their lower bounds, each first with a bound that costs nothing, then with the
//! count bound of its links, and only then solved. The search ends when no cell that is left can beat the best plan; the smallest
//! bound that remains is the certificate.

mod links;
mod per_client;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::collections::BinaryHeap;

pub(super) use links::{Links, Solved};
pub(super) use per_client::per_client;

use super::power::Demand;
use super::{Choice, Error};

/// Relative width below which two totals are the same.
const SAME: f64 = 1e-12;

impl Links<'_> {
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
    pub(crate) fn uniform_bound_s(&self) -> f64 {
        best_first(self, self.uniform(), None, Effort::Bound).1
    }
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
