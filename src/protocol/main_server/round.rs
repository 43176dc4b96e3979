//! The rounds: from the members that start one, over the adapters they send, to the average that the next one starts from.
//!
//! Separate because a round is what is done or lost as a whole: it has its members, and every way for it to end is here.

use std::collections::BTreeSet;
use std::time::Duration;

use super::super::message::{
    Control, Digest, ExclusionReason, Leaving, Mean, Member, Message, RoundClosed, RoundEnd, RoundResult, RoundStart,
    RunConfig,
};
use super::MainServerSession;
use super::config::MainError;
use super::event::{CollectTime, DepartureReason, MainEvent, Occasion, RunEnd};
use super::lateness::Wait;
use super::placement::Placement;
use super::step::{Awaited, Step};
use crate::federated::{Exact, Rule};
use crate::terms::ids::{ClientId, RoundKey, StepKey};

/// What the run is doing.
pub(super) enum Phase {
    Waiting {
        until: Option<Duration>,
    },
    Step(Step),
    /// The steps are closed; some members may not be done with the last.
    Boundary {
        members: BTreeSet<ClientId>,
        wait: Wait,
    },
    Averaging(Averaging),
    Validating(Validating),
    Finished {
        drain_by: Duration,
        drained: bool,
    },
}

/// A round whose members were asked for their adapters.
pub(super) struct Averaging {
    members: BTreeSet<ClientId>,
    /// Blocks at the clients afterwards.
    split: u32,
    /// What stands in for the blocks that some members lack; `None` until the driver has given it.
    copy: Option<Vec<f32>>,
    /// When they were asked for their adapters.
    asked: Duration,
    wait: Wait,
    collected: Vec<CollectTime>,
}

impl Averaging {
    /// The federated server has a member's adapter, of so many bytes. Returns how long that took, the first time.
    pub(crate) fn handle_received(&mut self, client: ClientId, bytes: u64, now: Duration) -> Option<Duration> {
        if self.collected.iter().any(|time| time.client == client) {
            return None;
        }
        let took = now.saturating_sub(self.asked);
        self.collected.push(CollectTime { client, took, bytes });
        Some(took)
    }

    /// Members whose adapters have not come.
    fn awaited(&self) -> BTreeSet<ClientId> {
        let mut awaited = self.members.clone();
        for time in &self.collected {
            awaited.remove(&time.client);
        }
        awaited
    }

    /// When who has not sent its adapter is late.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let awaited = self.awaited().len();
        (awaited > 0).then(|| self.wait.ends(awaited < self.members.len()))
    }

    pub(crate) fn wait_again(&mut self, now: Duration) {
        self.wait.again(now);
    }
}

/// A round whose average the driver has.
pub(super) struct Validating {
    round: RoundKey,
    included: u32,
    split: u32,
    /// What the round began with.
    before: Vec<f32>,
}

/// Rounds in a row that may come to nothing.
const MOST_REJECTED: u32 = 3;

impl Phase {
    /// Members of the round that is open at the federated server.
    pub fn members(&self) -> BTreeSet<ClientId> {
        match self {
            Phase::Step(step) => step.members(),
            Phase::Boundary { members, .. } | Phase::Averaging(Averaging { members, .. }) => members.clone(),
            Phase::Waiting { .. } | Phase::Validating(_) | Phase::Finished { .. } => BTreeSet::new(),
        }
    }

    /// Takes a client out of the open round. Returns whether it was a member.
    pub fn remove(&mut self, client: ClientId, reason: &str) -> bool {
        match self {
            Phase::Step(step) => step.remove(client, reason),
            Phase::Boundary { members, .. } | Phase::Averaging(Averaging { members, .. }) => members.remove(&client),
            Phase::Waiting { .. } | Phase::Validating(_) | Phase::Finished { .. } => false,
        }
    }

    /// Whether so many have left the open round that fewer than these are in it.
    pub(crate) fn has_fewer_than(&self, enough: usize) -> bool {
        match self {
            Phase::Step(step) => step.members_left() < enough,
            Phase::Boundary { members, .. } | Phase::Averaging(Averaging { members, .. }) => members.len() < enough,
            Phase::Waiting { .. } | Phase::Validating(_) | Phase::Finished { .. } => false,
        }
    }

    /// The step that waits for this client's activations.
    pub(crate) fn awaited_step(&self, client: ClientId) -> Option<StepKey> {
        match self {
            Phase::Step(step) if step.awaits(client) => Some(step.key()),
            _ => None,
        }
    }
}

/// What is wrong with an average, if something is: of how many values it should be, what leaves with it, after how many steps.
fn average_fault(average: &Mean, placement: &Placement, leaving: Option<Leaving>) -> Option<String> {
    let Mean {
        digest,
        values,
        moments,
        exact,
        errors,
    } = average;
    let expected = placement.adapter.len();
    let exact_fault = |exact: &Exact| match &placement.rule {
        Some(rule) => exact.fault(rule.shape(), placement.assignment.config.split as usize),
        None => Some("exact products, which nobody asked for".to_owned()),
    };
    if values.len() != expected {
        Some(format!("an average of {} values, not {expected}", values.len()))
    } else if !values.iter().all(|value| value.is_finite()) {
        Some("an average with a value that is not finite".to_owned())
    } else if Digest::of_values(values) != *digest {
        Some("an average that does not have its digest".to_owned())
    } else if !match (moments, leaving) {
        (Some(moments), Some(Leaving { len, steps })) => {
            moments.are_of(usize::try_from(len).unwrap_or(usize::MAX), steps) && moments.are_possible()
        }
        (moments, leaving) => moments.is_some() == leaving.is_some(),
    } {
        Some("an average without the moments of the blocks that leave".to_owned())
    } else if errors.is_some_and(|errors| !(errors.averaging >= 0.0 && errors.start >= 0.0)) {
        Some("an average with errors that cannot be".to_owned())
    } else {
        exact.as_deref().and_then(exact_fault)
    }
}

impl MainServerSession {
    // Opening.

    /// Starts the next round if enough are ready: the number asked for at first, anybody later; after a new placement,
    /// everybody who was there.
    pub(super) fn start_round(&mut self, now: Duration) {
        let ready = self.roster.ready();
        if Some(ready.len()) >= self.config.quorum.map(|quorum| quorum as usize) {
            self.is_short = false;
        }
        let needed = if self.has_started {
            self.enough()
        } else {
            self.config.clients as usize
        };
        if ready.len() < needed || self.roster.is_reloading() || self.planning.is_open() {
            return;
        }
        if self.planning.lacks(&ready) {
            return self.want_plan(match (self.planning.is_first(), self.has_started) {
                (true, false) => Occasion::Start,
                (true, true) => Occasion::Resumption,
                (false, _) => Occasion::Membership,
            });
        }
        self.has_started = true;
        self.is_returning = false;
        let round = self.round;
        let count = ready.len() as u32;
        self.open_round(ready.clone());
        self.events.push_back(MainEvent::RoundStarted {
            round,
            members: ready.iter().copied().collect(),
        });
        for id in &ready {
            let part = self.placement.part_of(*id);
            let Some(base) = self.placement.base_at(part) else {
                continue;
            };
            let Some(needs) = self.roster.start(*id, base) else {
                continue;
            };
            if let Some(connection) = self.roster.connection(*id) {
                let start = RoundStart {
                    round,
                    base,
                    members: count,
                    adapter: needs.adapter.then(|| self.placement.adapter_at(part)),
                    moments: self.placement.moments.clone().filter(|_| needs.moments),
                    rates: self.planning.rates_of(*id),
                };
                self.door.send(connection, &Message::RoundStart(start));
            }
        }
        self.placement.forget_moments();
        self.answered.clear();
        self.late.clear();
        self.timing.start(&ready, now);
        self.open_step(round.step(0), &ready, now);
        self.retest(now);
    }

    pub(super) fn open_round(&mut self, members: BTreeSet<ClientId>) {
        if let Some(rule) = &self.placement.rule
            && self.told_rule.as_ref() != Some(rule)
        {
            self.told_rule = Some(rule.clone());
            self.controls.push_back(Control::Rule(rule.clone()));
        }
        let base = Digest::of_values(&self.placement.adapter);
        if self.told_base.replace(base) != Some(base) {
            let values = self.placement.adapter.clone();
            self.controls.push_back(Control::Base { values });
        }
        let config = self.config();
        let member = |client: ClientId| {
            let part = self.placement.part_of(client);
            Some(Member {
                client,
                base: self.placement.base_at(part)?,
                adapter_len: self.placement.len_of(part),
                rank: self.placement.is_narrow(part).then_some(part.rank),
            })
        };
        self.controls.push_back(Control::OpenRound {
            round: self.round,
            members: members.into_iter().filter_map(member).collect(),
            adapter_len: self.placement.adapter.len() as u64,
            max_examples: u64::from(config.batch) * u64::from(config.local_steps),
        });
    }

    // Collecting.

    /// Ends the steps of the round. Who was in none of them has nothing to give.
    pub(super) fn ask_for_adapters(&mut self, members: BTreeSet<ClientId>, split: u32, now: Duration) {
        let (round, steps) = (self.round, self.steps);
        let (members, idle): (BTreeSet<ClientId>, BTreeSet<ClientId>) =
            members.into_iter().partition(|client| self.answered.contains(client));
        for client in idle {
            self.leave_out_of_round(client);
        }
        let is_mixed = self.placement.copy_len() > 0;
        for id in &members {
            let kept = match is_mixed {
                true => self.placement.split_of(*id),
                false => split,
            };
            if let Some(connection) = self.roster.connection(*id) {
                let end = RoundEnd {
                    round,
                    split: kept,
                    steps,
                };
                self.door.send(connection, &Message::RoundEnd(end));
            }
        }
        self.phase = Phase::Averaging(Averaging {
            members,
            split,
            copy: (!is_mixed).then(Vec::new),
            asked: now,
            wait: Wait::new(now, self.adapter_patience.limits()),
            collected: Vec::new(),
        });
        if self.phase.has_fewer_than(self.enough()) {
            return self.lose_round(now);
        }
        if is_mixed {
            self.events.push_back(MainEvent::CopyWanted { round });
        }
        self.collect();
    }

    /// Tells the federated server, as soon as that is known, what comes with the adapters and beside them.
    pub(super) fn collect(&mut self) {
        if let Phase::Averaging(Averaging {
            split,
            copy: Some(copy),
            ..
        }) = &self.phase
        {
            self.controls.push_back(Control::Collect {
                round: self.round,
                moments: self.leaving(*split),
                copy: copy.clone(),
            });
        }
    }

    /// What leaves the clients when they keep `split` blocks.
    fn leaving(&self, split: u32) -> Option<Leaving> {
        let current = self.placement.split();
        (split < current).then(|| Leaving {
            len: self.placement.len_at(current - split),
            steps: self.steps,
        })
    }

    /// The driver's answer to `CopyWanted`. An answer for a round that has been lost is dropped.
    ///
    /// # Errors
    /// When the values are not those that some clients have and others do not; the question stands.
    pub fn copy(&mut self, now: Duration, round: RoundKey, values: Vec<f32>) -> Result<(), MainError> {
        let expected = self.placement.copy_len();
        let Phase::Averaging(Averaging { copy: copy @ None, .. }) = &mut self.phase else {
            return Ok(());
        };
        if self.round != round {
            return Ok(());
        }
        if values.len() != expected {
            return Err(MainError::CopyLength {
                given: values.len(),
                expected,
            });
        }
        if !values.iter().all(|value| value.is_finite()) {
            return Err(MainError::CopyNotFinite);
        }
        *copy = Some(values);
        self.collect();
        self.retest(now);
        Ok(())
    }

    /// The round has waited long enough for those who are not done with its last step, or have not sent their adapters.
    pub(super) fn round_is_late(&mut self, now: Duration) {
        let (late, closes) = match &mut self.phase {
            Phase::Boundary { .. } => (self.timing.finishing(), true),
            Phase::Averaging(averaging) => {
                let awaited = averaging.awaited();
                let here = averaging.members.len() - awaited.len();
                let enough = self.config.quorum.unwrap_or(1).max(1) as usize;
                let closes = here >= enough.min(averaging.members.len());
                if !closes {
                    averaging.wait.again(now);
                }
                (awaited, closes)
            }
            _ => return,
        };
        for client in late {
            if closes {
                self.leave_out_of_round(client);
            }
            self.was_late(client, Awaited::Adapter, closes);
        }
        self.retest(now);
    }

    /// The round goes on without a member, which is one of the next again.
    fn leave_out_of_round(&mut self, client: ClientId) {
        let round = self.round;
        if self.phase.remove(client, "") {
            self.controls.push_back(Control::Departed { round, client });
        }
        self.late.insert(client);
        self.timing.forget(client);
        self.roster.leave_out(client, round.step(u32::MAX));
        self.roster.forget_adapter(client);
    }

    // Closing.

    pub(super) fn lose_round(&mut self, now: Duration) {
        self.events.push_back(MainEvent::RoundLost { round: self.round });
        self.begin_again(now);
    }

    /// The round came to nothing that can be used: it starts again from what it started from, or the run ends.
    pub(super) fn reject_round(&mut self, reason: String, now: Duration) {
        let round = self.round;
        self.rejected += 1;
        self.events.push_back(MainEvent::RoundRejected {
            round,
            reason: reason.clone(),
        });
        if self.rejected >= MOST_REJECTED {
            let detail = format!(
                "{reason}, in {MOST_REJECTED} attempts running: try a lower --lr, or --clip 1; the adapter is that of the \
                 last round before"
            );
            return self.finish(RunEnd::Diverged(detail), now);
        }
        self.begin_again(now);
    }

    /// What clients do for this attempt is worth nothing any more; who cannot be told has to come again.
    fn abandon_attempt(&mut self) {
        let round = self.round;
        let members = self.phase.members();
        let everybody: Vec<ClientId> = self.roster.connected().map(|(client, _)| client).collect();
        for client in everybody {
            self.roster.leave_out(client, round.step(u32::MAX));
            self.roster.forget_adapter(client);
        }
        // Nobody is in the round any more.
        self.phase = Phase::Waiting { until: None };
        for client in members {
            if !self.roster.can_be_left_out(client) {
                self.expel(client, DepartureReason::Excluded(ExclusionReason::Late));
            }
        }
    }

    fn begin_again(&mut self, now: Duration) {
        self.abandon_attempt();
        self.round.attempt += 1;
        self.steps = self.steps_before(self.round.round);
        self.revision += 1;
        self.timing.clear();
        self.wait(now);
        self.retest(now);
    }

    /// Clients without whom no round goes on, as long as they may come back.
    pub(super) fn enough(&self) -> usize {
        match self.config.quorum {
            Some(quorum) if !self.is_short => (quorum.min(self.config.clients) as usize)
                .min(self.roster.counted_on())
                .max(1),
            _ => 1,
        }
    }

    /// The round boundary. If too few are ready the run waits, for so long.
    fn wait(&mut self, now: Duration) {
        let until = now + self.config.wait_for_client;
        self.phase = Phase::Waiting { until: Some(until) };
        if !self.roster.is_reloading() && self.roster.ready().len() < self.enough() {
            self.events.push_back(MainEvent::Waiting { until });
        }
    }

    /// Why no training of this round can have led to this average, if none can. AdamW moves a value in a step by no more than
    /// `lr · (1 - β₁) / √((1 - β₂)(1 - β₁²/β₂))`, which is 7.3 times the learning rate (the Cauchy-Schwarz inequality between its two
    /// moments), and by the decay. What is beyond twice that was not trained, whoever sent it.
    fn impossible_step(&self, average: &[f32], exact: Option<&Exact>) -> Option<String> {
        const MOST: f64 = 2.0 * 7.3;
        let RunConfig {
            optimizer,
            local_steps,
            split,
            ..
        } = self.config();
        let lr = f64::from(optimizer.lr) * f64::from(*local_steps);
        let most = |base: f32| lr * (MOST + 2.0 * f64::from(optimizer.weight_decay) * f64::from(base).abs()) + 1e-6;
        let base = &self.placement.adapter;
        let moved = match &self.placement.rule {
            Some(rule) => {
                let is_narrow = !self.placement.ranks.is_empty();
                rule.impossible(*split as usize, base, (average, exact), most, is_narrow)
            }
            None => Rule::impossible_value(base, average, most),
        }?;
        Some(format!(
            "the average of the adapters is {moved}, for {local_steps} steps of training"
        ))
    }

    pub(super) fn close_round(&mut self, closed: RoundClosed, now: Duration) {
        let Phase::Averaging(Averaging { split, collected, .. }) = &mut self.phase else {
            // Closed without anybody, as the exclusions before it said.
            return;
        };
        let (split, collected) = (*split, std::mem::take(collected));
        let Some(average) = closed.average else {
            for exclusion in &closed.excluded {
                self.exclude(exclusion);
            }
            if matches!(self.phase, Phase::Averaging(_)) {
                self.lose_round(now);
            }
            return;
        };
        if let Some(fault) = average_fault(&average, &self.placement, self.leaving(split)) {
            return self.finish(RunEnd::FederatedFault(fault), now);
        }
        let Mean {
            values,
            moments,
            digest,
            exact,
            errors,
        } = average;
        self.told_base = Some(digest);
        for exclusion in &closed.excluded {
            self.exclude(exclusion);
        }
        if let Some(reason) = self.impossible_step(&values, exact.as_deref()) {
            return self.reject_round(reason, now);
        }
        let before = self.placement.adapter.clone();
        self.placement.install(&values);
        for inclusion in &closed.included {
            let base = self.placement.base_at(self.placement.part_of(inclusion.client));
            self.roster.hold(inclusion.client, base);
        }
        let round = closed.round;
        self.phase = Phase::Validating(Validating {
            round,
            included: closed.included.len() as u32,
            split,
            before,
        });
        let (included, mut excluded) = (closed.included, closed.excluded);
        // The federated server knows only that they are not in the round.
        for exclusion in &mut excluded {
            if self.late.contains(&exclusion.client) {
                exclusion.reason = ExclusionReason::Late;
            }
        }
        self.events.push_back(MainEvent::RoundClosed {
            round,
            average: values,
            moments,
            exact: exact.map(|exact| *exact),
            errors,
            split,
            included,
            excluded,
            collected,
        });
    }

    /// The driver's answer to `RoundClosed`, with the mean validation loss if it validates, and with another placement where
    /// the plan was one. A loss that is not finite rejects the round: the driver is to have kept nothing of it.
    ///
    /// # Errors
    /// When the placement is missing, or is not what was planned; nothing is changed then.
    pub fn validated(
        &mut self,
        now: Duration,
        round: RoundKey,
        valid_loss: Option<f64>,
        placement: Option<Placement>,
    ) -> Result<(), MainError> {
        let Phase::Validating(validating) = &mut self.phase else {
            return Ok(());
        };
        if validating.round != round {
            return Ok(());
        }
        let (included, split) = (validating.included, validating.split);
        if let Some(loss) = valid_loss.filter(|loss| !loss.is_finite()) {
            let before = std::mem::take(&mut validating.before);
            self.placement.install(&before);
            self.reject_round(format!("the validation loss of {round} is {loss}"), now);
            return Ok(());
        }
        let found = placement.as_ref().unwrap_or(&self.placement).split();
        if found != split {
            return Err(MainError::Split { found, expected: split });
        }
        if let Some(placement) = &placement {
            self.config.check(placement)?;
        }
        self.rejected = 0;
        let config = &self.placement.assignment.config;
        let rounds = config.rounds;
        let done = round.round + 1;
        let result = Message::RoundResult(RoundResult {
            round: round.round,
            rounds,
            included,
            valid_loss,
            steps: done.saturating_mul(config.local_steps),
            total_steps: rounds.saturating_mul(config.local_steps),
        });
        for connection in self.roster.connections() {
            self.door.send(connection, &result);
        }
        if done >= rounds {
            // That it is complete is kept before anybody hears of it.
            self.keep(done);
            self.finish(RunEnd::Completed, now);
        } else {
            self.round = RoundKey {
                round: done,
                attempt: 0,
            };
            if let Some(placement) = placement {
                self.adopt(placement);
            }
            self.keep(done);
            self.wait(now);
        }
        self.retest(now);
        Ok(())
    }
}
