//! What the client is doing: rounds and steps as the servers announce them.
//!
//! Separate from the connections, whose coming and going it outlives, but for that of the main server.

use std::time::Duration;

use super::super::Endpoint;
use super::super::message::*;
use super::ClientSession;
use super::event::ClientEvent;
use crate::terms::ids::{RoundKey, StepKey};
use crate::terms::moments::Moments;
use crate::terms::tensor::WireLayout;

pub(super) struct Assigned {
    pub assignment: Assignment,
    /// It came over this connection, or came again.
    pub current: bool,
    /// The driver has said `ready`.
    pub loaded: bool,
    /// The main server has been told, on this connection.
    pub told: bool,
}

/// What the client is doing.
pub(super) enum Work {
    /// Waiting for a round.
    Idle,
    /// The next round was announced before the average it starts from arrived.
    AwaitBase {
        start: RoundStart,
        update: AdapterUpdate,
    },
    AwaitStep(StepKey),
    Forward(StepKey),
    AwaitGradient {
        key: StepKey,
        layout: WireLayout,
        activations: Digest,
    },
    Backward(StepKey),
    /// The round's steps are done.
    AwaitEnd(RoundKey),
    /// The driver is asked for its adapter.
    Collect(RoundEnd),
    /// Kept until the average arrives, to be sent again after a reconnection.
    AwaitAverage(AdapterUpdate),
}

impl Work {
    /// The round this belongs to, while its outcome is open.
    fn round(&self) -> Option<RoundKey> {
        match self {
            Work::Idle => None,
            Work::AwaitBase { start, .. } => Some(start.round),
            Work::AwaitStep(key) | Work::Forward(key) | Work::AwaitGradient { key, .. } | Work::Backward(key) => {
                Some(key.round)
            }
            Work::AwaitEnd(round) => Some(*round),
            Work::Collect(end) => Some(end.round),
            Work::AwaitAverage(update) => Some(update.round),
        }
    }
}

impl ClientSession {
    pub(super) fn leave_round(&mut self) {
        self.give_up();
        if let Some(assigned) = &mut self.assigned {
            assigned.current = false;
            assigned.told = false;
        }
    }

    /// Gives up what it was doing. Answers of the driver to that are dropped.
    fn give_up(&mut self) {
        self.work = Work::Idle;
        self.next_step = None;
        self.next_end = None;
    }

    pub(super) fn handle_message(&mut self, endpoint: Endpoint, now: Duration, message: Message) {
        match (endpoint, message) {
            (Endpoint::Main, Message::Assignment(assignment)) => self.handle_assignment(now, *assignment),
            (Endpoint::Main, Message::RoundStart(start)) => self.handle_round_start(start),
            (Endpoint::Main, Message::StepStart(start)) => self.handle_step_start(start),
            (Endpoint::Main, Message::Gradient(gradient)) => self.handle_gradient(gradient),
            (Endpoint::Main, Message::RoundEnd(end)) => self.handle_round_end(end),
            (Endpoint::Main, Message::RoundResult(result)) => {
                self.events.push_back(ClientEvent::RoundResult(result));
            }
            (Endpoint::Federated, Message::Average(average)) => self.handle_average(average),
            (Endpoint::Federated, Message::UpdateDeclined(declined)) => {
                match &self.work {
                    // Too late for that round; the main server says which is next.
                    Work::AwaitAverage(update) if update.round == declined.round => {
                        self.work = Work::Idle;
                        self.end_if_due();
                    }
                    // The average will not come. The main server gives it to whoever joins.
                    Work::AwaitBase { update, .. } if update.round == declined.round => {
                        self.lose(Endpoint::Main, now);
                    }
                    _ => {}
                }
            }
            (endpoint, Message::Stop(stop)) => self.handle_stop(endpoint, now, stop),
            (endpoint, other) => {
                self.protocol(
                    endpoint,
                    format!("expected {}, got {}", self.expected(endpoint), other.name()),
                );
            }
        }
    }

    /// What may come now, for error texts.
    fn expected(&self, endpoint: Endpoint) -> String {
        match (endpoint, &self.work) {
            (Endpoint::Federated, _) => "Average, UpdateDeclined or Stop".to_owned(),
            (Endpoint::Main, _) if self.assigned.is_none() => "Assignment or Stop".to_owned(),
            (Endpoint::Main, Work::Idle | Work::AwaitAverage(_)) => {
                "RoundStart, RoundResult, Assignment or Stop".to_owned()
            }
            (Endpoint::Main, Work::AwaitBase { start, .. }) => {
                format!("StepStart of {} or Stop", start.round.step(0))
            }
            (Endpoint::Main, Work::AwaitStep(key)) => format!("StepStart of {key} or Stop"),
            (Endpoint::Main, Work::AwaitGradient { key, .. }) => {
                format!("Gradient of {key} or Stop")
            }
            (Endpoint::Main, Work::AwaitEnd(round)) => format!("RoundEnd of {round} or Stop"),
            (Endpoint::Main, Work::Forward(_) | Work::Backward(_) | Work::Collect(_)) => "StepStart or Stop".to_owned(),
        }
    }

    fn handle_assignment(&mut self, now: Duration, assignment: Assignment) {
        match &mut self.assigned {
            Some(assigned) if assigned.current && assignment.number <= assigned.assignment.number => {
                let detail = format!(
                    "expected {}, got Assignment {}",
                    self.expected(Endpoint::Main),
                    assignment.number
                );
                return self.protocol(Endpoint::Main, detail);
            }
            Some(assigned) if assigned.assignment == assignment => assigned.current = true,
            _ => {
                // The next round brings the adapter; the average that was awaited is that of another cut. In the middle of a
                // round it says that the round has gone on without this client.
                self.installed = None;
                self.give_up();
                self.assigned = Some(Assigned {
                    assignment: assignment.clone(),
                    current: true,
                    loaded: false,
                    told: false,
                });
                let Some(limit) = self.frame_limit() else {
                    return self.protocol(
                        Endpoint::Main,
                        "an assignment whose frames would be too large".to_owned(),
                    );
                };
                self.connections.set_limit(limit);
                self.events.push_back(ClientEvent::Assigned(Box::new(assignment)));
            }
        }
        self.announce(now);
    }

    fn handle_round_start(&mut self, start: RoundStart) {
        let told = self.assigned.as_ref().is_some_and(|assigned| assigned.told);
        let is_next = self.work.round().is_none_or(|round| round < start.round);
        if !told || !is_next {
            let detail = format!(
                "expected {}, got RoundStart of {}",
                self.expected(Endpoint::Main),
                start.round
            );
            return self.protocol(Endpoint::Main, detail);
        }
        if !matches!(self.work, Work::AwaitAverage(_)) {
            // The round before has gone on without this client.
            self.give_up();
        }
        self.rates = start.rates;
        self.connections.set_rates(self.rates);
        let RoundStart { round, base, .. } = start;
        match start.adapter {
            Some(values) => {
                if !self.install(Endpoint::Main, round, base, values, start.moments) {
                    return;
                }
                self.begin_round(RoundStart {
                    adapter: None,
                    moments: None,
                    ..start
                });
            }
            None if start.moments.is_some() => {
                let detail = format!("{round} brings moments without the adapter they belong to");
                self.protocol(Endpoint::Main, detail);
            }
            None if self.installed == Some(base) => self.begin_round(start),
            None => match std::mem::replace(&mut self.work, Work::Idle) {
                // The average comes over the other connection and may be later.
                Work::AwaitAverage(update) => self.work = Work::AwaitBase { start, update },
                _ => {
                    let detail = format!("{round} starts from an adapter {base} that was never sent");
                    self.protocol(Endpoint::Main, detail);
                }
            },
        }
    }

    fn begin_round(&mut self, start: RoundStart) {
        self.base = start.base;
        self.events.push_back(ClientEvent::RoundStarted {
            round: start.round,
            members: start.members,
        });
        self.work = Work::AwaitStep(start.round.step(0));
        self.begin_step();
    }

    /// A step is announced: the next one or, where steps have gone on without this client, one after that.
    fn handle_step_start(&mut self, start: StepStart) {
        let first = match &self.work {
            Work::AwaitStep(key) => Some(*key),
            Work::AwaitBase { start, .. } => Some(start.round.step(0)),
            Work::Forward(key) | Work::AwaitGradient { key, .. } | Work::Backward(key) => {
                key.step.checked_add(1).map(|step| key.round.step(step))
            }
            _ => None,
        };
        let first = match (first, &self.next_step) {
            (Some(first), Some(next)) => Some(first.max(next.key.round.step(next.key.step.saturating_add(1)))),
            (first, _) => first,
        };
        let local_steps = self
            .assigned
            .as_ref()
            .map_or(0, |assigned| assigned.assignment.config.local_steps);
        let is_due = first.is_some_and(|first| first.round == start.key.round && first <= start.key);
        if !is_due || start.key.step >= local_steps {
            let detail = format!(
                "expected {}, got StepStart of {}",
                self.expected(Endpoint::Main),
                start.key
            );
            return self.protocol(Endpoint::Main, detail);
        }
        self.next_step = Some(start);
        if matches!(self.work, Work::Forward(_) | Work::AwaitGradient { .. }) {
            // Its activations were too late.
            self.work = Work::AwaitStep(start.key);
        }
        self.begin_step();
    }

    /// Asks for the forward pass of a step that has been announced and whose turn it is.
    pub(super) fn begin_step(&mut self) {
        if let Work::AwaitStep(first) = self.work
            && let Some(StepStart { key, .. }) = self.next_step.take_if(|start| start.key >= first)
        {
            self.work = Work::Forward(key);
            self.events.push_back(ClientEvent::ComputeForward { key });
        }
    }

    /// The round's steps are done, the last of them perhaps without this client.
    fn handle_round_end(&mut self, end: RoundEnd) {
        let RoundEnd { round, split, steps } = end;
        let is_due = match &self.work {
            Work::AwaitStep(_) | Work::Forward(_) | Work::AwaitGradient { .. } | Work::Backward(_) => {
                self.work.round() == Some(round) && self.next_end.is_none()
            }
            Work::AwaitEnd(current) => *current == round,
            _ => false,
        };
        if !is_due {
            let detail = format!("expected {}, got RoundEnd of {round}", self.expected(Endpoint::Main));
            return self.protocol(Endpoint::Main, detail);
        }
        if split == 0 || steps == 0 {
            let detail = format!("a RoundEnd of {round} that keeps {split} blocks, after {steps} steps");
            return self.protocol(Endpoint::Main, detail);
        }
        if matches!(self.work, Work::Backward(_)) {
            self.next_end = Some(end);
        } else {
            self.begin_end(end);
        }
    }

    /// Asks for the adapter.
    pub(super) fn begin_end(&mut self, end: RoundEnd) {
        let RoundEnd { round, split, steps } = end;
        self.give_up();
        self.work = Work::Collect(end);
        self.events
            .push_back(ClientEvent::UploadAdapter { round, split, steps });
    }

    fn handle_gradient(&mut self, gradient: Gradient) {
        let Work::AwaitGradient {
            key,
            layout,
            activations,
        } = self.work
        else {
            let detail = format!(
                "expected {}, got Gradient of {}",
                self.expected(Endpoint::Main),
                gradient.key
            );
            return self.protocol(Endpoint::Main, detail);
        };
        let found = gradient.tensor.layout();
        if gradient.key != key || gradient.activations != activations || found != layout {
            let detail = format!(
                "the gradient of {} ({found}, for activations {}) does not belong to the activations of {key} \
                 ({layout}, {activations})",
                gradient.key, gradient.activations
            );
            return self.protocol(Endpoint::Main, detail);
        }
        if !gradient.tensor.is_finite() {
            return self.protocol(
                Endpoint::Main,
                format!("the gradient of {key} has a value that is not finite"),
            );
        }
        self.work = Work::Backward(key);
        self.events.push_back(ClientEvent::ComputeBackward { key, gradient });
    }

    fn handle_average(&mut self, average: Average) {
        let Average { round, digest, values } = average;
        let awaited = match &self.work {
            Work::AwaitAverage(update) | Work::AwaitBase { update, .. } => update.round == round,
            _ => false,
        };
        if !awaited {
            // A repetition, or of a round this client is no longer in.
            return;
        }
        if !self.install(Endpoint::Federated, round, digest, values, None) {
            return;
        }
        match std::mem::replace(&mut self.work, Work::Idle) {
            Work::AwaitBase { start, .. } if start.base == digest => self.begin_round(start),
            Work::AwaitBase { start, .. } => {
                let detail = format!(
                    "{} starts from {}, but the average is {digest}",
                    start.round, start.base
                );
                self.protocol(Endpoint::Main, detail);
            }
            _ => self.end_if_due(),
        }
    }

    /// Checks an adapter and hands it to the driver. Returns whether it was good.
    fn install(
        &mut self,
        endpoint: Endpoint,
        round: RoundKey,
        digest: Digest,
        values: Vec<f32>,
        moments: Option<Moments>,
    ) -> bool {
        let (expected, split) = self.assigned.as_ref().map_or((0, 1), |assigned| {
            let Assignment {
                adapter_len, config, ..
            } = &assigned.assignment;
            (*adapter_len, config.split.max(1))
        });
        let fits = |moments: &Moments| {
            let len = moments.first.len();
            let block = (values.len() / split as usize).max(1);
            moments.are_of(len, moments.steps)
                && moments.are_possible()
                && len < values.len()
                && len.is_multiple_of(block)
        };
        let fault = if values.len() as u64 != expected {
            Some(format!("an adapter of {} values, not {expected}", values.len()))
        } else if !values.iter().all(|value| value.is_finite()) {
            Some("an adapter with a value that is not finite".to_owned())
        } else if Digest::of_values(&values) != digest {
            Some("an adapter that does not have its digest".to_owned())
        } else if !moments.as_ref().is_none_or(fits) {
            Some("moments that are not those of an adapter's last blocks".to_owned())
        } else {
            None
        };
        if let Some(detail) = fault {
            self.protocol(endpoint, detail);
            return false;
        }
        self.installed = Some(digest);
        self.events
            .push_back(ClientEvent::InstallAdapter { round, values, moments });
        true
    }
}
