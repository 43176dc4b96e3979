//! What the main server computes and plans, and what must hold of every step and round whatever the weather.
//!
//! Separate because the checks stand beside what they check: each average is compared with the adapters that were sent.

use std::collections::{BTreeMap, BTreeSet};

use super::super::outcome::{Phase, RoundRecord};
use super::super::toy::{NUMBERS, Trained, assignment, from_tensor, initial_adapter, rule, to_tensor};
use super::{Lane, Node, Own, World};
use crate::federated::ClientAdapter;
use crate::protocol::message::{Exclusion, Inclusion};
use crate::protocol::{AdapterInput, Contribution, GradientOutput, LeftOut, MainEvent, Occasion, Placement, RoundPlan};
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
            Occasion::Boundary(_) | Occasion::Membership | Occasion::Resumption => None,
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
            rule: Some(rule(self.scenario.aggregation)),
            ranks: Vec::new(),
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
            rule: Some(rule(self.scenario.aggregation)),
            ranks: Vec::new(),
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
                self.forget_members();
                self.departed.clear();
                self.before = (self.blocks.clone(), self.server);
            }
            MainEvent::Contribution { key, contribution } => self.contribute(key, &contribution),
            MainEvent::CloseStep { key, lanes, left_out } => self.close_step(key, &lanes, &left_out),
            MainEvent::StepMeasured { key, clients } => self.outcome.measured.push((key, clients)),
            MainEvent::PlanWanted { occasion } => {
                let at = at + self.network.pause(self.scenario.compute);
                self.schedule_of_server(at, Own::Planned(occasion));
            }
            MainEvent::CopyWanted { round } => {
                let shared = self.average.len() - self.split as usize * NUMBERS;
                let values = self.blocks.values[..shared].to_vec();
                self.copies.insert(round, values.clone());
                let at = at + self.network.pause(self.scenario.compute);
                self.schedule_of_server(at, Own::Copied { round, values });
            }
            MainEvent::RoundClosed {
                round,
                average,
                moments,
                exact,
                errors: _,
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
                    exact: exact.clone(),
                    collected,
                };
                self.check_round(record, &included, &excluded);
                let shared = &average[self.split as usize * NUMBERS..];
                self.blocks.values[..shared.len()].copy_from_slice(shared);
                self.average = average;
                self.exact = exact;
                let placement = self.recut(split, moments).map(Box::new);
                let at = at + self.network.pause(self.scenario.compute);
                self.schedule_of_server(at, Own::Validated { round, placement });
            }
            MainEvent::Keep { round, placement } => self.keep_round(round, *placement),
            MainEvent::RoundRejected { round, .. } => {
                self.undo_round();
                self.outcome.history.push((at, Phase::Rejected(round)));
            }
            MainEvent::RoundLost { round } => {
                self.undo_round();
                self.outcome.history.push((at, Phase::Lost(round)));
            }
            MainEvent::Waiting { .. } => self.outcome.history.push((at, Phase::Waiting)),
            MainEvent::Finished { reason } => self.outcome.end = Some(reason),
            MainEvent::Drained => self.outcome.drained = true,
            MainEvent::ClientRefused { .. } | MainEvent::ClientReady { .. } => {}
        }
    }

    /// The round will begin again.
    fn undo_round(&mut self) {
        (self.blocks, self.server) = self.before.clone();
        self.step = None;
        self.lanes.clear();
    }

    fn contribute(&mut self, key: StepKey, contribution: &Contribution) {
        let client = contribution.client;
        if self.step != Some(key) {
            self.step = Some(key);
            self.lanes.clear();
        }
        if !self.present.contains(&client) {
            self.violation(format!("{client} contributes to {key} but has left"));
        }
        if !self.members.contains(&client) {
            self.violation(format!("{client} contributes to {key} and is no member"));
        }
        let split = self.cuts.get(&client).copied().unwrap_or(self.split);
        if contribution.split != split {
            self.violation(format!("{client} contributes at a cut after {}", contribution.split));
        }
        let mut activations = from_tensor(&contribution.activations);
        let entry = (split - self.split) as usize * NUMBERS;
        self.blocks.run(entry, &mut activations);
        let mean = activations.iter().map(|value| f64::from(*value)).sum::<f64>() / activations.len() as f64;
        let d_activations: Vec<f32> = activations.iter().map(|value| 0.5 * value).collect();
        let output = GradientOutput {
            client,
            loss: mean.abs() as f32,
            gradient: to_tensor(&d_activations),
        };
        let lane = Lane {
            tokens: contribution.tokens,
            mean,
            entry,
            d_activations,
        };
        if self.lanes.insert(client, lane).is_some() {
            self.violation(format!("{client} contributes twice to {key}"));
        }
        // One after the other, as they come.
        self.busy_until = self.busy_until.max(self.network.now) + self.network.pause(self.scenario.compute);
        self.schedule_of_server(self.busy_until, Own::Contributed { key, output });
    }

    fn close_step(&mut self, key: StepKey, lanes: &BTreeSet<ClientId>, left_out: &[LeftOut]) {
        let late: BTreeSet<ClientId> = left_out.iter().map(|left_out| left_out.client).collect();
        let expected: BTreeSet<ClientId> = self
            .members
            .iter()
            .filter(|member| !self.departed.contains(member) && !late.contains(member))
            .copied()
            .collect();
        if *lanes != expected || lanes.is_empty() {
            self.violation(format!("{key} closes with {lanes:?}, its members are {expected:?}"));
        }
        if self.step != Some(key) {
            self.violation(format!("{key} closes, but {:?} is open", self.step));
        }
        let computed: Vec<Lane> = lanes.iter().filter_map(|client| self.lanes.remove(client)).collect();
        if computed.len() != lanes.len() {
            self.violation(format!("{key} closes with lanes that are not there"));
        }
        (self.step, self.lanes) = (None, BTreeMap::new());
        let tokens: u64 = computed.iter().map(|lane| lane.tokens).sum();
        let mut d_blocks = vec![0.0; self.blocks.values.len()];
        for lane in &computed {
            let weight = lane.tokens as f64 / tokens.max(1) as f64;
            self.server -= 0.01 * weight * lane.mean;
            for (sum, value) in d_blocks[lane.entry..].iter_mut().zip(lane.d_activations.iter().cycle()) {
                *sum += weight as f32 * value;
            }
        }
        self.blocks.step(|index| d_blocks[index]);
        self.outcome.steps += 1;
        if !late.is_empty() {
            let numbers = late.iter().filter_map(|client| self.numbers.get(client).copied());
            self.outcome.partial.push((key, numbers.collect()));
        }
    }

    fn check_round(&mut self, record: RoundRecord, included: &[Inclusion], excluded: &[Exclusion]) {
        let RoundRecord {
            round,
            average,
            moments,
            exact,
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
                let rule = rule(self.scenario.aggregation);
                let contributions: Vec<ClientAdapter<'_>> = (uploads.iter())
                    .map(|input| ClientAdapter {
                        weight: input.examples,
                        blocks: input.values.len() / NUMBERS,
                        rank: 1,
                        values: &input.values,
                    })
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
                    rule.moments(&weighted).ok()
                };
                let blocks = self.average.len() / NUMBERS;
                let aggregate = rule.aggregate(blocks, &[], &contributions, copy).ok();
                if aggregate.as_ref().is_none_or(|aggregate| aggregate.exact != *exact) {
                    found.push(format!(
                        "the products of {round} are {exact:?}, not those of {aggregate:?}"
                    ));
                }
                let expected = [
                    aggregate.map(|aggregate| aggregate.values),
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
