//! One choice of cuts and rank: its bounds, and its best links.
//!
//! Separate from the search over choices, which asks here what each of them can come to.

use super::super::bound::Ladders;
use super::super::delay::Problem;
use super::super::power::{Demand, LinkPlan};
use super::super::prices::{Market, Prices};
use super::super::subchannel::{self, LinkOptions, LinkSolution, Start};
use super::super::{Choice, Error, LinkName};
use super::SAME;

/// A problem's links, prepared for any deadline.
pub struct Links<'a> {
    pub problem: &'a Problem,
    pub main: Ladders<'a>,
    pub federated: Ladders<'a>,
    pub download: Option<Ladders<'a>>,
    /// No client sends a bit in less, waits aside, in s/bit.
    main_s_per_bit: f64,
    pub(super) download_s_per_bit: f64,
    /// The federated link solved for one bit of each client. Without waits time and energy are proportional to the bits.
    pub(super) federated_unit: LinkSolution,
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
            link: LinkName::Federated,
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
    pub(crate) fn quick_bound_s(&self, choice: &Choice) -> f64 {
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
    pub(crate) fn count_bound_s(&self, choice: &Choice) -> f64 {
        let demand = self.problem.main_demand(&choice.split_index, choice.rank);
        self.bound_with_main_s(choice, self.main.lower_bound_s(&demand))
    }

    /// The same when the upload phase is known to take `main` at least.
    pub(crate) fn bound_with_main_s(&self, choice: &Choice, main: f64) -> f64 {
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
    pub(crate) fn main_limit_s(&self, choice: &Choice, total_s: f64) -> Option<f64> {
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
    pub(crate) fn cannot_beat(&self, choice: &Choice, best: &Solved) -> bool {
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
}

/// A choice with its links.
#[derive(Clone, Debug)]
pub struct Solved {
    pub choice: Choice,
    pub total_s: f64,
    pub lower_s: f64,
    pub main: LinkPlan,
    pub main_prices: Option<Prices>,
    pub federated: LinkPlan,
    pub download: Option<LinkPlan>,
}
