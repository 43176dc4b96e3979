//! The planner that asks the allocator: emulated radio links from a scenario, or the speeds and throughputs that were measured.
//!
//! With a scenario every client has a place in it, the plan's rate on each of its links, and the run's own model, batch and
//! measured speeds for the rest. Without one, cut and rank follow from what the clients measured when they joined, and the cut
//! again from every round's measured phases. At the start it may give every client a cut of its own, for the whole run.

mod knowledge;
mod search;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use knowledge::{Known, SUPPOSED_FLOPS_PER_S, Shape};

use super::planner::{ClientFacts, ClientPrediction, Decision, Planner, RoundFacts, RoundPrediction, StartFacts};
use crate::allocation::scenario::Scenario;
use crate::allocation::{self, Method, Problem, SolveOptions};
use crate::model::rounds::RoundsTable;
use crate::protocol::message::LinkRates;
use crate::terms::ids::ClientId;

/// The cut moves only when that is forecast to shorten a round by more than this part of it.
pub const MARGIN: f64 = 0.1;

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
}

impl Allocator {
    /// A run that goes on after an interruption: with the cuts and the rank it has. Links are as the plan makes them for those, once
    /// somebody is at every place.
    fn start_again(&mut self, facts: &StartFacts) -> Result<Option<Decision>, String> {
        let cuts: Vec<usize> = (facts.clients.iter())
            .map(|client| facts.cuts.get(&client.id).copied().unwrap_or(facts.cut))
            .collect();
        if let Some(scenario) = &self.settings.scenario
            && facts.clients.len() == scenario.clients.count
        {
            let ids: Vec<ClientId> = facts.clients.iter().map(|facts| facts.id).collect();
            let (problem, plan) = self.solve(&ids, &[number(facts.cut)], &[(number(facts.rank), 1.0)], false)?;
            self.take_rates(&problem, &plan)?;
            self.settle(&facts.clients);
        }
        let reason = "as before the interruption".to_owned();
        self.decision(&facts.clients, (facts.cut, &cuts), facts.rank, reason)
    }
}

impl Planner for Allocator {
    fn start(&mut self, facts: &StartFacts) -> Result<Option<Decision>, String> {
        self.run = Some(Shape {
            architecture: facts.architecture.clone(),
            training: facts.training.clone(),
            weights: facts.weights,
            local_steps: facts.local_steps,
        });
        if let Some(speed) = facts
            .server_flops_per_s
            .filter(|speed| speed.is_finite() && *speed > 0.0)
        {
            self.server_flops_per_s = speed;
        }
        self.settle(&facts.clients);
        if facts.is_resumed {
            return self.start_again(facts);
        }
        let ranks = self.ranks(facts.rank)?;
        let blocks = u32::try_from(facts.architecture.blocks).unwrap_or(u32::MAX);
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
