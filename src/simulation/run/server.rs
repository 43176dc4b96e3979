//! What the main server computes and plans, and what must hold of every step and round whatever the weather.
//!
//! Separate because the checks stand beside what they check: each average is compared with the adapters that were sent.

use std::collections::{BTreeMap, BTreeSet};

use super::super::outcome::{Phase, RoundRecord};
use super::super::toy::{NUMBERS, Trained, assignment, from_tensor, initial_adapter, to_tensor};
use super::{Node, Own, World};
use crate::federated::{mean_of_prefixes, weighted_mean};
use crate::protocol::message::{Exclusion, Inclusion};
use crate::protocol::{AdapterInput, Contribution, GradientOutput, MainEvent, Occasion, Placement, RoundPlan};
use crate::terms::ids::{ClientId, StepKey};
use crate::terms::moments::Moments;

impl World {
    /// Answers what is to hold next.
    pub(super) fn plan(&mut self, occasion: Occasion) {
        let now = self.now(Node::Main);
        let split = match occasion {
            Occasion::Start => {
                let placement = match self.scenario.cuts.is_empty() {
                    true => self.recut(self.scenario.split(0), None),
                    false => Some(self.place()),
                };
                if let Some(placement) = placement
                    && let Err(error) = self.main.place(now, placement)
                {
                    self.violation(error.to_string());
                }
                None
            }
            Occasion::Boundary(round) if self.scenario.cuts.is_empty() => Some(self.scenario.split(round.round + 1)),
            Occasion::Boundary(_) | Occasion::Membership => None,
        };
        let status = self.main.status();
        let rates = status
            .clients
            .iter()
            .filter_map(|client| Some((client.client, self.scenario.rates?)));
        let plan = RoundPlan {
            split,
            rates: rates.collect(),
        };
        if let Err(error) = self.main.planned(now, Some(plan)) {
            self.violation(error.to_string());
        }
    }

    /// Gives the clients that are there their own cuts.
    fn place(&mut self) -> Placement {
        let status = self.main.status();
        let ready = status.clients.iter().filter(|client| client.ready);
        self.cuts = ready
            .filter_map(|client| {
                let number = self.numbers.get(&client.client)?;
                Some((client.client, *self.scenario.cuts.get(*number)?))
            })
            .collect();
        self.split = self.cuts.values().copied().min().unwrap_or(1);
        let largest = self.cuts.values().copied().max().unwrap_or(1);
        self.average = initial_adapter()[..largest as usize * NUMBERS].to_vec();
        self.blocks = Trained::new(initial_adapter()[self.split as usize * NUMBERS..].to_vec());
        Placement {
            assignment: assignment(&self.scenario, largest),
            adapter: self.average.clone(),
            moments: None,
            cuts: self.cuts.clone(),
        }
    }

    /// Moves the cut. `moments` are those of the blocks that come to the main server.
    fn recut(&mut self, split: u32, moments: Option<Moments>) -> Option<Placement> {
        if split == self.split {
            return None;
        }
        self.split = split;
        let (old, new) = (self.average.len(), split as usize * NUMBERS);
        let mut going = None;
        if new < old {
            let mut blocks = Trained::new(self.average.split_off(new));
            if let Some(moments) = moments {
                (blocks.first, blocks.second) = (moments.first, moments.second);
            }
            blocks.extend(std::mem::take(&mut self.blocks));
            self.blocks = blocks;
        } else {
            let kept = self.blocks.split_off(new - old);
            let given = std::mem::replace(&mut self.blocks, kept);
            going = Some(given.moments(0, self.outcome.steps));
            self.average.extend(given.values);
        }
        Some(Placement {
            assignment: assignment(&self.scenario, split),
            adapter: self.average.clone(),
            moments: going,
            cuts: BTreeMap::new(),
        })
    }

    pub(super) fn handle_main_event(&mut self, event: MainEvent) {
        let at = self.network.now;
        match event {
            MainEvent::ClientJoined { client, name, .. } => {
                let number = name.parse().unwrap_or(usize::MAX);
                self.numbers.insert(client, number);
                self.present.insert(client);
                self.outcome.history.push((at, Phase::Joined(number)));
            }
            MainEvent::ClientLeft { client, .. } => {
                if !self.present.remove(&client) {
                    self.violation(format!("{client} left without having joined"));
                }
                self.departed.insert(client);
                self.outcome.history.push((at, Phase::Left(self.numbers[&client])));
            }
            MainEvent::RoundStarted { members, round } => {
                if let Some(absent) = members.iter().find(|client| !self.present.contains(client)) {
                    self.violation(format!("{round} began with {absent}, who has left"));
                }
                self.members = members;
                self.departed.clear();
            }
            MainEvent::StepReady { key, contributions } => self.compute_step(key, &contributions),
            MainEvent::StepMeasured { key, clients } => self.outcome.measured.push((key, clients)),
            MainEvent::PlanWanted { occasion } => {
                let at = at + self.network.pause(self.scenario.compute);
                self.network.schedule(at, Own::Planned(occasion));
            }
            MainEvent::CopyWanted { round } => {
                let shared = self.average.len() - self.split as usize * NUMBERS;
                let values = self.blocks.values[..shared].to_vec();
                self.copies.insert(round, values.clone());
                let at = at + self.network.pause(self.scenario.compute);
                self.network.schedule(at, Own::Copied { round, values });
            }
            MainEvent::RoundClosed {
                round,
                average,
                moments,
                split,
                included,
                excluded,
                collected,
            } => {
                let record = RoundRecord {
                    round,
                    at,
                    members: Vec::new(),
                    included: Vec::new(),
                    excluded: Vec::new(),
                    average: average.clone(),
                    moments: moments.clone(),
                    collected,
                };
                self.check_round(record, &included, &excluded);
                let shared = &average[self.split as usize * NUMBERS..];
                self.blocks.values[..shared.len()].copy_from_slice(shared);
                self.average = average;
                let placement = self.recut(split, moments).map(Box::new);
                let at = at + self.network.pause(self.scenario.compute);
                self.network.schedule(at, Own::Validated { round, placement });
            }
            MainEvent::RoundLost { round } => self.outcome.history.push((at, Phase::Lost(round))),
            MainEvent::Waiting { .. } => self.outcome.history.push((at, Phase::Waiting)),
            MainEvent::Finished { reason } => self.outcome.end = Some(reason),
            MainEvent::Drained => self.outcome.drained = true,
            MainEvent::ClientRefused { .. } | MainEvent::ClientReady { .. } => {}
        }
    }

    fn compute_step(&mut self, key: StepKey, contributions: &[Contribution]) {
        let weights: f64 = contributions.iter().map(|contribution| contribution.weight).sum();
        if (weights - 1.0).abs() > 1e-12 {
            self.violation(format!("the weights of {key} add up to {weights}"));
        }
        let clients: BTreeSet<ClientId> = contributions.iter().map(|contribution| contribution.client).collect();
        if clients.len() != contributions.len() {
            self.violation(format!("somebody contributes twice to {key}"));
        }
        if let Some(gone) = clients.iter().find(|client| !self.present.contains(client)) {
            self.violation(format!("{gone} contributes to {key} but has left"));
        }
        let expected: BTreeSet<ClientId> = self
            .members
            .iter()
            .filter(|member| !self.departed.contains(member))
            .copied()
            .collect();
        if clients != expected {
            self.violation(format!(
                "{key} has contributions of {clients:?}, its members are {expected:?}"
            ));
        }
        let mut server = self.server;
        let mut blocks = self.blocks.clone();
        let mut d_blocks = vec![0.0; blocks.values.len()];
        let mut outputs = Vec::new();
        for contribution in contributions {
            let split = self.cuts.get(&contribution.client).copied().unwrap_or(self.split);
            if contribution.split != split {
                self.violation(format!(
                    "{} contributes at a cut after {}",
                    contribution.client, contribution.split
                ));
            }
            let mut activations = from_tensor(&contribution.activations);
            let entry = (split - self.split) as usize * NUMBERS;
            self.blocks.run(entry, &mut activations);
            let mean = activations.iter().map(|value| f64::from(*value)).sum::<f64>() / activations.len() as f64;
            server -= 0.01 * contribution.weight * mean;
            let d_activations: Vec<f32> = activations.iter().map(|value| 0.5 * value).collect();
            for (sum, value) in d_blocks[entry..].iter_mut().zip(d_activations.iter().cycle()) {
                *sum += contribution.weight as f32 * value;
            }
            outputs.push(GradientOutput {
                client: contribution.client,
                loss: mean.abs() as f32,
                gradient: to_tensor(&d_activations),
            });
        }
        blocks.step(|index| d_blocks[index]);
        let at = self.network.now + self.network.pause(self.scenario.compute);
        let own = Own::Stepped {
            key,
            outputs,
            server,
            blocks,
        };
        self.network.schedule(at, own);
    }

    fn check_round(&mut self, record: RoundRecord, included: &[Inclusion], excluded: &[Exclusion]) {
        let RoundRecord {
            round,
            average,
            moments,
            ..
        } = &record;
        let round = *round;
        let number = |client: &ClientId| self.numbers.get(client).copied().unwrap_or(usize::MAX);
        let uploads: Option<Vec<&AdapterInput>> = included
            .iter()
            .map(|member| {
                self.uploads
                    .get(&(round, number(&member.client)))
                    .filter(|input| input.examples == member.examples)
            })
            .collect();
        let mut found = Vec::new();
        // With two processes, word that somebody left can cross the closing of the round.
        if !self.scenario.remote_control
            && let Some(gone) = included.iter().find(|member| self.departed.contains(&member.client))
        {
            found.push(format!("{round} has the adapter of {}, who has left", gone.client));
        }
        if let Some(other) = included.iter().find(|member| !self.members.contains(&member.client)) {
            found.push(format!("{round} has the adapter of {}, who is no member", other.client));
        }
        match uploads {
            None => found.push(format!("{round} has an adapter that was never sent")),
            Some(uploads) => {
                let copy = self.copies.get(&round).map_or(&[][..], Vec::as_slice);
                let values: Vec<(u64, &[f32])> = (uploads.iter())
                    .map(|input| (input.examples, input.values.as_slice()))
                    .collect();
                let mean = |part: &dyn Fn(&AdapterInput) -> Option<Vec<f32>>| {
                    let parts: Option<Vec<(u64, Vec<f32>)>> = uploads
                        .iter()
                        .map(|input| Some((input.examples, part(input)?)))
                        .collect();
                    let parts = parts?;
                    let weighted: Vec<(u64, &[f32])> = parts
                        .iter()
                        .map(|(examples, values)| (*examples, values.as_slice()))
                        .collect();
                    weighted_mean(&weighted).ok()
                };
                let expected = [
                    mean_of_prefixes(&values, self.average.len(), copy).ok(),
                    mean(&|input| Some(input.moments.as_ref()?.first.clone())),
                    mean(&|input| Some(input.moments.as_ref()?.second.clone())),
                ];
                let given = [
                    Some(average.clone()),
                    moments.as_ref().map(|moments| moments.first.clone()),
                    moments.as_ref().map(|moments| moments.second.clone()),
                ];
                if expected != given {
                    found.push(format!("the average of {round} is {given:?}, not {expected:?}"));
                }
            }
        }
        let record = RoundRecord {
            members: self.members.iter().map(number).collect(),
            included: included
                .iter()
                .map(|member| (number(&member.client), member.examples))
                .collect(),
            excluded: excluded
                .iter()
                .map(|exclusion| (number(&exclusion.client), exclusion.reason))
                .collect(),
            ..record
        };
        self.outcome.rounds.push(record);
        for text in found {
            self.violation(text);
        }
    }
}
