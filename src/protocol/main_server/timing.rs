//! How long the phases of a step take each of its members.
//!
//! Separate because it only watches: no decision of the session but that a step is over reads from it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::event::StepTimes;
use crate::terms::ids::{ClientId, StepKey};
use crate::terms::phases::Phases;

/// A member of the current round.
#[derive(Clone, Copy, Debug)]
struct Clock {
    /// When it was free to start.
    asked: Duration,
    /// Forward and upload, once its activations have come.
    phases: Phases<Duration>,
    bytes_up: u64,
}

/// A member's gradient is out.
struct Answered {
    sent: Duration,
    done: bool,
    /// Without download and backward before it is done.
    times: StepTimes,
}

/// A step of which gradients are out.
#[derive(Default)]
struct Finishing {
    /// No more members are answered.
    closed: bool,
    members: BTreeMap<ClientId, Answered>,
}

/// The clocks of a round's members.
#[derive(Default)]
pub(super) struct Timing {
    clocks: BTreeMap<ClientId, Clock>,
    /// The step that is open, and the one before it while members are not done with that.
    steps: BTreeMap<StepKey, Finishing>,
}

impl Timing {
    /// Members are free to start a step, once they are done with the one before.
    pub fn start(&mut self, members: &BTreeSet<ClientId>, now: Duration) {
        self.clocks = members
            .iter()
            .map(|client| {
                let clock = Clock {
                    asked: now,
                    phases: Phases::default(),
                    bytes_up: 0,
                };
                (*client, clock)
            })
            .collect();
    }

    /// A member's activations have come, after a forward pass that took so long by its own word.
    pub(crate) fn handle_activations(&mut self, client: ClientId, forward: Duration, bytes: u64, now: Duration) {
        if let Some(clock) = self.clocks.get_mut(&client) {
            // No part of the time is longer than the whole.
            let whole = now.saturating_sub(clock.asked);
            let forward = forward.min(whole);
            clock.phases = Phases {
                forward,
                upload: whole - forward,
                ..Phases::default()
            };
            clock.bytes_up = bytes;
        }
    }

    /// A member's gradient went out, in a frame of so many bytes.
    pub(crate) fn gradient_sent(&mut self, key: StepKey, client: ClientId, bytes_down: u64, now: Duration) {
        if let Some(clock) = self.clocks.get(&client) {
            let times = StepTimes {
                client,
                phases: clock.phases,
                bytes_up: clock.bytes_up,
                bytes_down,
            };
            let answered = Answered {
                sent: now,
                done: false,
                times,
            };
            self.steps.entry(key).or_default().members.insert(client, answered);
        }
    }

    /// No more gradients of this step go out, and members are free to start the next. Who is not done with an earlier one was left
    /// out of this, and is waited for no more.
    pub fn close(&mut self, key: StepKey, now: Duration) {
        for (_, step) in self.steps.range_mut(..key) {
            step.members.retain(|_, answered| answered.done);
        }
        self.steps.entry(key).or_default().closed = true;
        let busy = self.finishing();
        for (_, clock) in self.clocks.iter_mut().filter(|(client, _)| !busy.contains(client)) {
            clock.asked = now;
        }
    }

    /// Whether somebody has a gradient and is not done with it.
    pub(crate) fn is_finishing(&self) -> bool {
        !self.steps.is_empty()
    }

    /// Who has a gradient and is not done with it.
    pub(crate) fn finishing(&self) -> BTreeSet<ClientId> {
        let open = |(client, answered): (&ClientId, &Answered)| (!answered.done).then_some(*client);
        self.steps
            .values()
            .flat_map(|step| step.members.iter().filter_map(open))
            .collect()
    }

    /// The step whose gradient this client has been sent and that it has not finished.
    pub(crate) fn unfinished(&self, client: ClientId) -> Option<StepKey> {
        let open =
            |(_, step): &(&StepKey, &Finishing)| step.members.get(&client).is_some_and(|answered| !answered.done);
        self.steps.iter().find(open).map(|(key, _)| *key)
    }

    /// A member is done with its step, after a backward pass that took so long by its own word.
    pub(crate) fn handle_step_done(&mut self, client: ClientId, key: StepKey, backward: Duration, now: Duration) {
        let step = self.steps.get_mut(&key);
        if let Some(answered) = step.and_then(|step| step.members.get_mut(&client)) {
            let whole = now.saturating_sub(answered.sent);
            let phases = &mut answered.times.phases;
            phases.backward = backward.min(whole);
            phases.download = whole - phases.backward;
            answered.done = true;
        }
        if let Some(clock) = self.clocks.get_mut(&client) {
            clock.asked = now;
        }
    }

    /// A client has left, or the round goes on without it.
    pub(crate) fn forget(&mut self, client: ClientId) {
        self.clocks.remove(&client);
        for step in self.steps.values_mut() {
            step.members.remove(&client);
        }
    }

    /// Forgets a round that is lost.
    pub fn clear(&mut self) {
        *self = Timing::default();
    }

    /// The times of a closed step that all members who are left have done, once.
    pub(crate) fn take_finished(&mut self) -> Option<(StepKey, Vec<StepTimes>)> {
        let is_done = |step: &Finishing| step.closed && step.members.values().all(|answered| answered.done);
        let key = *self.steps.iter().find(|(_, step)| is_done(step))?.0;
        let step = self.steps.remove(&key)?;
        let times = step.members.into_values().map(|answered| answered.times);
        Some((key, times.collect()))
    }
}
