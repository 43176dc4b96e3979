//! How long the phases of a step take each of its members.
//!
//! Separate because it only watches: no decision of the session but that a step is over reads from it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::event::StepTimes;
use crate::terms::ids::{ClientId, StepKey};
use crate::terms::phases::Phases;

/// A member of the current step.
#[derive(Clone, Copy, Debug)]
struct Clock {
    /// When it was free to start.
    asked: Duration,
    /// Forward and upload, once its activations have come.
    phases: Phases<Duration>,
    bytes_up: u64,
}

/// A step whose gradients are out.
struct Finishing {
    key: StepKey,
    sent: Duration,
    /// Members' times, once they are done; before that without download and backward.
    members: BTreeMap<ClientId, (bool, StepTimes)>,
}

/// The clocks of a round's members.
#[derive(Default)]
pub(super) struct Timing {
    clocks: BTreeMap<ClientId, Clock>,
    finishing: Option<Finishing>,
}

impl Timing {
    /// Members are free to start the round's first step.
    pub fn start(&mut self, members: &BTreeSet<ClientId>, now: Duration) {
        let clock = Clock {
            asked: now,
            phases: Phases::default(),
            bytes_up: 0,
        };
        self.clocks = members.iter().map(|client| (*client, clock)).collect();
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

    /// Gradients went out, in frames of so many bytes.
    pub(crate) fn gradients_sent(&mut self, key: StepKey, now: Duration, sent: Vec<(ClientId, u64)>) {
        let times = |(client, bytes_down): (ClientId, u64)| {
            let clock = self.clocks.get(&client)?;
            let times = StepTimes {
                client,
                phases: clock.phases,
                bytes_up: clock.bytes_up,
                bytes_down,
            };
            Some((client, (false, times)))
        };
        self.finishing = Some(Finishing {
            key,
            sent: now,
            members: sent.into_iter().filter_map(times).collect(),
        });
    }

    /// Whether somebody has a gradient and is not done with it.
    pub(crate) fn is_finishing(&self) -> bool {
        self.finishing.is_some()
    }

    /// The step whose gradient this client has been sent and that it has not finished.
    pub(crate) fn unfinished(&self, client: ClientId) -> Option<StepKey> {
        let finishing = self.finishing.as_ref()?;
        let (done, _) = finishing.members.get(&client)?;
        (!done).then_some(finishing.key)
    }

    /// A member is done with its step, after a backward pass that took so long by its own word.
    pub(crate) fn handle_step_done(&mut self, client: ClientId, backward: Duration, now: Duration) {
        if let Some(finishing) = &mut self.finishing
            && let Some((is_done, times)) = finishing.members.get_mut(&client)
        {
            let whole = now.saturating_sub(finishing.sent);
            times.phases.backward = backward.min(whole);
            times.phases.download = whole - times.phases.backward;
            *is_done = true;
        }
        if let Some(clock) = self.clocks.get_mut(&client) {
            clock.asked = now;
        }
    }

    /// A client has left.
    pub(crate) fn forget(&mut self, client: ClientId) {
        self.clocks.remove(&client);
        if let Some(finishing) = &mut self.finishing {
            finishing.members.remove(&client);
        }
    }

    /// The times of a step that all members who are left have done, once.
    pub(crate) fn take_finished(&mut self) -> Option<(StepKey, Vec<StepTimes>)> {
        let Finishing { key, members, .. } = self
            .finishing
            .take_if(|finishing| finishing.members.values().all(|(done, _)| *done))?;
        Some((key, members.into_values().map(|(_, times)| times).collect()))
    }
}
