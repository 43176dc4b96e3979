//! One step: its members' activations as they come, each answered as soon as the driver has computed it, until it closes.
//!
//! Separate because a step has rules of its own: what may be in a member's message, that each is taken once, and with whom it
//! closes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::super::message::{Activations, Digest, Gradient, Message, RunConfig, StepDone, StepStart};
use super::MainServerSession;
use super::config::MainError;
use super::event::{Contribution, DepartureReason, GradientOutput, LeftOut, MainEvent};
use super::lateness::{Limits, Wait};
use super::round::Phase;
use crate::terms::ids::{ClientId, StepKey};
use crate::terms::tensor::{IGNORED_TARGET, WireLayout};

/// What is kept of a contribution while the driver computes.
#[derive(Clone, Copy)]
struct Received {
    layout: WireLayout,
    tokens: u64,
    activations: Digest,
}

/// A member's part of a step.
enum Lane {
    /// Its activations have not come.
    Awaited,
    /// The driver has them.
    Computing(Received),
    /// It has its gradient.
    Answered { tokens: u64, loss: f32 },
    /// The driver could not use them. Whose fault that is shows when somebody's can be used.
    Unusable,
}

/// A step that is open.
pub(super) struct Step {
    key: StepKey,
    opened: Duration,
    /// How long who has not come is waited for.
    wait: Wait,
    /// Of the members that it is to close with.
    lanes: BTreeMap<ClientId, Lane>,
    /// Members that it goes on without.
    late: BTreeSet<ClientId>,
    /// These, and those that have left the run since it was opened.
    left_out: Vec<LeftOut>,
}

impl Step {
    pub fn new(key: StepKey, members: &BTreeSet<ClientId>, now: Duration, limits: Limits) -> Step {
        Step {
            key,
            opened: now,
            wait: Wait::new(now, limits),
            lanes: members.iter().map(|client| (*client, Lane::Awaited)).collect(),
            late: BTreeSet::new(),
            left_out: Vec::new(),
        }
    }

    pub fn key(&self) -> StepKey {
        self.key
    }

    /// All members of the round, late ones too.
    pub fn members(&self) -> BTreeSet<ClientId> {
        self.lanes.keys().chain(&self.late).copied().collect()
    }

    /// Members of the round that have not left it.
    pub fn members_left(&self) -> usize {
        self.lanes.len() + self.late.len()
    }

    /// Whether this member's activations have not come, and are waited for.
    pub(crate) fn awaits(&self, client: ClientId) -> bool {
        matches!(self.lanes.get(&client), Some(Lane::Awaited))
    }

    /// Whether anybody's activations have not come.
    pub(crate) fn is_awaiting(&self) -> bool {
        self.lanes.values().any(|lane| matches!(lane, Lane::Awaited))
    }

    /// Whose activations have not come.
    fn awaited(&self) -> BTreeSet<ClientId> {
        self.those(|lane| matches!(lane, Lane::Awaited))
    }

    /// Who has a gradient.
    fn answered(&self) -> BTreeSet<ClientId> {
        self.those(|lane| matches!(lane, Lane::Answered { .. }))
    }

    fn unusable(&self) -> BTreeSet<ClientId> {
        self.those(|lane| matches!(lane, Lane::Unusable))
    }

    fn those(&self, which: impl Fn(&Lane) -> bool) -> BTreeSet<ClientId> {
        let lanes = self.lanes.iter().filter(|(_, lane)| which(lane));
        lanes.map(|(client, _)| *client).collect()
    }

    /// Whether nothing is to come any more, from members or from the driver.
    fn is_settled(&self) -> bool {
        let settled = |lane: &Lane| matches!(lane, Lane::Answered { .. } | Lane::Unusable);
        self.lanes.values().all(settled)
    }

    /// Members whose activations have come, and may be of use.
    fn arrived(&self) -> usize {
        let arrived = |lane: &&Lane| matches!(lane, Lane::Computing(_) | Lane::Answered { .. });
        self.lanes.values().filter(arrived).count()
    }

    /// When who has not come is late.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.is_awaiting().then(|| self.wait.ends(self.arrived() > 0))
    }

    /// Returns whether the client was a member.
    pub fn remove(&mut self, client: ClientId, reason: &str) -> bool {
        let was_lane = self.lanes.remove(&client).is_some();
        if was_lane {
            let reason = reason.to_owned();
            self.left_out.push(LeftOut { client, reason });
        }
        self.late.remove(&client) || was_lane
    }

    /// Goes on without a member that is still one of the round.
    fn leave_out(&mut self, client: ClientId, reason: String) {
        if self.lanes.remove(&client).is_some() {
            self.late.insert(client);
            self.left_out.push(LeftOut { client, reason });
        }
    }

    /// Mean loss over the targets of all who have been answered; 0 without any target.
    fn mean_loss(&self) -> f32 {
        let answered = |lane: &Lane| match lane {
            Lane::Answered { tokens, loss } => Some((*tokens, f64::from(*loss))),
            _ => None,
        };
        let lanes = || self.lanes.values().filter_map(answered);
        let tokens: u64 = lanes().map(|(tokens, _)| tokens).sum();
        let total: f64 = lanes().map(|(tokens, loss)| tokens as f64 * loss).sum();
        if tokens == 0 {
            0.0
        } else {
            (total / tokens as f64) as f32
        }
    }
}

/// Checks activations against what was agreed, where the client's cut is after `cut` blocks. The error is said to the client.
fn check_activations(
    config: &RunConfig,
    cut: u32,
    client: ClientId,
    given: Activations,
) -> Result<(Received, Contribution), String> {
    let Activations {
        split,
        examples,
        targets,
        tensor,
        ..
    } = given;
    let layout = tensor.layout();
    if !config.takes(layout) {
        let largest = config.largest_tensor();
        return Err(format!("activations of {layout}, where at most {largest} was agreed"));
    }
    if split != cut {
        return Err(format!("activations of {split} blocks, where the cut is after {cut}"));
    }
    if targets.len() != tensor.rows() {
        return Err(format!(
            "activations of {layout} with {} targets, not {}",
            targets.len(),
            tensor.rows()
        ));
    }
    let is_target =
        |target: &i32| *target == IGNORED_TARGET || u32::try_from(*target).is_ok_and(|target| target < config.vocab);
    if let Some(position) = targets.iter().position(|target| !is_target(target)) {
        return Err(format!(
            "target {position} is {}, outside the vocabulary of {}",
            targets[position], config.vocab
        ));
    }
    if !tensor.is_finite() {
        return Err("activations with a value that is not finite".to_owned());
    }
    if !(1..=layout.batch).contains(&examples) {
        return Err(format!("{examples} examples in a batch of {}", layout.batch));
    }
    let tokens = targets.iter().filter(|target| **target != IGNORED_TARGET).count() as u64;
    let received = Received {
        layout,
        tokens,
        activations: Digest::of(tensor.bytes()),
    };
    let contribution = Contribution {
        client,
        split,
        examples,
        tokens,
        targets,
        activations: tensor,
    };
    Ok((received, contribution))
}

impl MainServerSession {
    pub(super) fn open_step(&mut self, key: StepKey, members: &BTreeSet<ClientId>, now: Duration) {
        self.phase = Phase::Step(Step::new(key, members, now, self.step_patience.limits()));
        self.send_to_all(members, |count| Message::StepStart(StepStart { key, members: count }));
    }

    pub(super) fn handle_activations(
        &mut self,
        client: ClientId,
        activations: Activations,
        bytes: u64,
        now: Duration,
    ) -> Result<(), String> {
        if self.roster.was_left_out(client, activations.key) {
            // They were on their way when the step closed.
            return Ok(());
        }
        let unexpected = || {
            format!(
                "expected {}, got Activations of {}",
                self.expected_of(client),
                activations.key
            )
        };
        let Phase::Step(step) = &self.phase else {
            return Err(unexpected());
        };
        let awaited = step.awaits(client) && self.timing.unfinished(client).is_none();
        if activations.key != step.key || !awaited {
            return Err(unexpected());
        }
        let forward = activations.forward;
        let cut = self.placement.split_of(client);
        let (received, contribution) = check_activations(self.config(), cut, client, activations)?;
        let Phase::Step(step) = &mut self.phase else {
            return Ok(());
        };
        let key = step.key;
        step.lanes.insert(client, Lane::Computing(received));
        self.step_patience.note(now.saturating_sub(step.opened));
        self.roster.was_in_time(client, Awaited::Activations);
        self.timing.handle_activations(client, forward, bytes, now);
        self.events.push_back(MainEvent::Contribution { key, contribution });
        Ok(())
    }

    /// The driver's answer to `Contribution`: the member's gradient, which goes out at once, or `None` where its activations
    /// gave nothing that can be used, as is a loss or gradient that is not finite. An answer for a member that has left since, or
    /// to a step that is lost, is dropped.
    ///
    /// # Errors
    /// When the gradient is not of the layout of the activations it belongs to; nothing is changed then.
    pub fn contributed(
        &mut self,
        now: Duration,
        key: StepKey,
        client: ClientId,
        output: Option<GradientOutput>,
    ) -> Result<(), MainError> {
        let Phase::Step(step) = &mut self.phase else {
            return Ok(());
        };
        let (true, Some(Lane::Computing(received))) = (step.key == key, step.lanes.get(&client)) else {
            return Ok(());
        };
        let received = *received;
        let Some(output) = output.filter(|output| output.loss.is_finite() && output.gradient.is_finite()) else {
            step.lanes.insert(client, Lane::Unusable);
            self.retest(now);
            return Ok(());
        };
        let given = output.gradient.layout();
        if given != received.layout {
            return Err(MainError::GradientLayout {
                client,
                given,
                expected: received.layout,
            });
        }
        let answered = Lane::Answered {
            tokens: received.tokens,
            loss: output.loss,
        };
        step.lanes.insert(client, answered);
        let gradient = Gradient {
            key,
            activations: received.activations,
            loss: output.loss,
            tokens: received.tokens,
            mean_loss: step.mean_loss(),
            tensor: output.gradient,
        };
        self.answered.insert(client);
        if let Some(connection) = self.roster.connection(client) {
            let bytes = self.door.send(connection, &Message::Gradient(gradient));
            self.timing.gradient_sent(key, client, bytes as u64, now);
        }
        self.retest(now);
        Ok(())
    }

    pub(super) fn handle_step_done(&mut self, client: ClientId, done: StepDone, now: Duration) -> Result<(), String> {
        if self.timing.unfinished(client) == Some(done.key) {
            self.timing.handle_step_done(client, done.key, done.backward, now);
        } else if !self.roster.was_left_out(client, done.key) {
            return Err(format!(
                "expected {}, got StepDone of {}",
                self.expected_of(client),
                done.key
            ));
        }
        Ok(())
    }

    /// Moves an open step on: drops whose activations cannot be used, and closes it when nothing is to come any more.
    pub(super) fn retest_step(&mut self, now: Duration) {
        let Phase::Step(step) = &self.phase else { return };
        let unusable = step.unusable();
        // As long as nobody's can be used, what they start from may be to blame.
        if !unusable.is_empty() && !self.answered.is_empty() {
            for client in unusable {
                self.expel(client, DepartureReason::Unusable);
            }
            return self.retest(now);
        }
        if !step.is_settled() {
            return;
        }
        if step.answered().is_empty() {
            if !unusable.is_empty() {
                let key = step.key;
                self.reject_round(format!("no member's loss in {key} is finite"), now);
            }
            return;
        }
        self.close_step(now);
    }

    fn close_step(&mut self, now: Duration) {
        let Phase::Step(step) = &mut self.phase else { return };
        let (key, lanes, members) = (step.key, step.answered(), step.members());
        let left_out = std::mem::take(&mut step.left_out);
        self.steps += 1;
        self.timing.close(key, now);
        self.events.push_back(MainEvent::CloseStep { key, lanes, left_out });
        let next = key.step + 1;
        if next < self.config().local_steps {
            self.open_step(key.round.step(next), &members, now);
        } else {
            self.phase = Phase::Boundary {
                members,
                wait: Wait::new(now, self.step_patience.limits()),
            };
        }
        self.retest(now);
    }

    /// The step has waited long enough for those who have not come.
    pub(super) fn step_is_late(&mut self, now: Duration) {
        let Phase::Step(step) = &mut self.phase else { return };
        let (key, opened, awaited) = (step.key, step.opened, step.awaited());
        let enough = self.config.quorum.unwrap_or(1).max(1) as usize;
        let closes = step.arrived() >= enough.min(step.lanes.len());
        if closes {
            let waited = now.saturating_sub(opened).as_secs_f64();
            for client in &awaited {
                step.leave_out(*client, format!("its activations had not come after {waited:.1} s"));
            }
        } else {
            step.wait.again(now);
        }
        for client in awaited {
            if closes {
                self.roster.leave_out(client, key);
            }
            self.was_late(client, Awaited::Activations, closes);
        }
        self.retest(now);
    }
}

/// What a member is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Awaited {
    Activations,
    Adapter,
}

impl Awaited {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Awaited::Activations => "activations",
            Awaited::Adapter => "adapter",
        }
    }
}
