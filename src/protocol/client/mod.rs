//! An edge client's session: both its connections, and what it computes when.
//!
//! It asks its driver for sockets, weights, forward and backward passes and the adapter, one at a time, and turns the
//! answers into messages. A gradient is handed on only if it names the very activations it was asked for. When a
//! connection fails the session asks for another, after growing pauses, for hours; after losing the main server it joins again, by
//! its ticket, from the next round, also in another process that has its passport. Between rounds the main server may assign another cut, which is loaded as the first one
//! was. Activations and adapters leave no faster than the rates of the round.
//!
//! A client that is too late is told the next step, the round's end or the next round instead of what it waits for: it gives up what
//! it was doing and goes on there.
//!
//! | file | holds |
//! |---|---|
//! | `event` | what the driver is asked and told |
//! | `connections` | the way to both servers, and back to them |
//! | `round` | rounds and steps as they are announced |

mod connections;
mod event;
mod round;

use std::collections::VecDeque;
use std::time::Duration;

use connections::{Connections, Identity};
pub use event::{
    ActivationsInput, AdapterInput, ClientConfig, ClientError, ClientEvent, ClientFailure, FinishReason, Passport,
};
use round::{Assigned, Work};

use super::dial::{Heard, Tick};
use super::frame::{adapter_frame_bytes, step_frame_bytes};
use super::link::silence_limit;
use super::message::*;
use super::{Endpoint, PING_INTERVAL, Transmit, earlier};
use crate::terms::ids::{ClientId, StepKey};
use crate::terms::speed::Speed;

/// The largest frame before an assignment says more.
const UNASSIGNED_FRAME_BYTES: usize = 1 << 20;

/// A client's state machine.
pub struct ClientSession {
    config: ClientConfig,
    connections: Connections,
    identity: Option<Identity>,
    /// The ticket was presented, not the secret.
    came_by_ticket: bool,
    assigned: Option<Assigned>,
    /// What the driver measured.
    speed: Option<Speed>,
    rates: Option<LinkRates>,
    installed: Option<Digest>,
    /// Digest of the adapter the current round started from.
    base: Digest,
    work: Work,
    /// A step announced before the work of the last one is done.
    next_step: Option<StepStart>,
    /// The round's end, announced likewise.
    next_end: Option<RoundEnd>,
    /// The run is complete, but for the last average.
    ending: Option<Duration>,
    over: bool,
    events: VecDeque<ClientEvent>,
}

impl ClientSession {
    /// A client that asks for its first socket at once.
    pub fn new(config: ClientConfig, now: Duration) -> ClientSession {
        let mut session = ClientSession {
            connections: Connections::new(&config),
            config,
            identity: None,
            came_by_ticket: false,
            assigned: None,
            speed: None,
            rates: None,
            installed: None,
            base: Digest([0; 32]),
            work: Work::Idle,
            next_step: None,
            next_end: None,
            ending: None,
            over: false,
            events: VecDeque::new(),
        };
        session.connections.dialer(Endpoint::Main).start(now);
        session.handle_timeout(now);
        session
    }

    /// The client's number in the run, once it is in.
    pub fn client(&self) -> Option<ClientId> {
        self.passport().map(|passport| passport.client)
    }

    /// By what it is known again. Every time the main server lets it in, it is another: the one before is of no use as soon as the
    /// next frame is sent.
    pub fn passport(&self) -> Option<&Passport> {
        let admitted = self.identity.as_ref().map(|identity| &identity.passport);
        admitted.or(self.config.passport.as_ref())
    }

    /// What the main server gives weights for, once the client is in: for `Authorization: Bearer`.
    pub fn bearer(&self) -> Option<String> {
        self.identity
            .as_ref()
            .map(|identity| identity.passport.ticket.to_bearer())
    }

    /// The largest frame the servers may send: what a socket need not read past.
    pub fn max_frame_bytes(&self) -> usize {
        self.frame_limit().unwrap_or(UNASSIGNED_FRAME_BYTES)
    }

    /// The largest frame the assignment leads to; `None` when there is none or no frame may be that large.
    fn frame_limit(&self) -> Option<usize> {
        let assignment = &self.assigned.as_ref()?.assignment;
        let step = step_frame_bytes(&assignment.config)?;
        // With two moments for each value, at most.
        let adapter = adapter_frame_bytes(assignment.adapter_len.checked_mul(3)?)?;
        Some(step.max(adapter).max(UNASSIGNED_FRAME_BYTES))
    }

    /// The socket asked for is open.
    pub fn connected(&mut self, endpoint: Endpoint, now: Duration) {
        if !self.connections.dialer(endpoint).is_opening() {
            return;
        }
        let ticket = match endpoint {
            Endpoint::Main => self.passport().map(|passport| &passport.ticket),
            Endpoint::Federated => self.identity.as_ref().map(|identity| &identity.federated_ticket),
        };
        let credential = match (ticket, &self.config.secret) {
            (Some(ticket), _) => Credential::Ticket(ticket.clone()),
            (None, Some(secret)) => Credential::Secret(secret.clone()),
            (None, None) => Credential::None,
        };
        if endpoint == Endpoint::Main {
            self.came_by_ticket = matches!(credential, Credential::Ticket(_));
        }
        let hello = Hello {
            version: self.config.version,
            service: match endpoint {
                Endpoint::Main => Service::Main,
                Endpoint::Federated => Service::Federated,
            },
            credential,
            name: self.config.name.clone(),
            model: self.config.model,
            tokenizer: self.config.tokenizer,
            capabilities: self.config.capabilities.clone(),
        };
        self.connections.dialer(endpoint).greet(now, &hello);
    }

    /// The socket closed, or could not be opened.
    pub fn disconnected(&mut self, endpoint: Endpoint, now: Duration) {
        if self.connections.dialer(endpoint).has_socket() {
            self.lose(endpoint, now);
        }
    }

    /// A frame of the socket opened last for this endpoint.
    pub fn handle_frame(&mut self, endpoint: Endpoint, now: Duration, bytes: &[u8]) {
        if self.over {
            return;
        }
        let limit = self.max_frame_bytes();
        match self.connections.dialer(endpoint).handle_frame(now, bytes, limit) {
            Ok(Heard::Nothing) => {}
            Ok(Heard::Welcome(welcome)) => self.handle_welcome(endpoint, now, *welcome),
            Ok(Heard::Refused(refused)) => self.handle_refusal(endpoint, now, refused),
            Ok(Heard::Message(message)) => self.handle_message(endpoint, now, message),
            Err(fault) if fault.is_damage() => self.lose(endpoint, now),
            Err(fault) => self.fail(ClientFailure::Connection { endpoint, fault }),
        }
    }

    /// Bytes of a frame that is not whole yet have come: the server is not silent, the way is slow.
    pub fn heard(&mut self, endpoint: Endpoint) {
        self.connections.dialer(endpoint).hear_part();
    }

    /// Tells the session what time it is; at the latest when [`ClientSession::poll_timeout`] says.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.over {
            return;
        }
        if self.ending.is_some_and(|deadline| deadline <= now) {
            return self.finish(FinishReason::Completed);
        }
        for endpoint in [Endpoint::Main, Endpoint::Federated] {
            match self.connections.dialer(endpoint).handle_timeout(now) {
                Tick::Nothing => {}
                Tick::Dial => {
                    let url = match (endpoint, &self.identity) {
                        (Endpoint::Federated, Some(identity)) => identity.federated_url.clone(),
                        _ => None,
                    };
                    self.events.push_back(ClientEvent::Connect { endpoint, url });
                }
                Tick::Gone => self.lose(endpoint, now),
            }
        }
    }

    /// The driver's answer to `Assigned`: everything is loaded, and so fast.
    pub fn ready(&mut self, now: Duration, speed: Option<Speed>) {
        self.speed = speed;
        if let Some(assigned) = &mut self.assigned {
            assigned.loaded = true;
        }
        self.announce(now);
    }

    /// The driver's answer to `ComputeForward`. An answer to a superseded request is dropped.
    ///
    /// # Errors
    /// When shape and sizes are not those agreed; the request stands.
    pub fn activations(&mut self, now: Duration, input: ActivationsInput) -> Result<(), ClientError> {
        let (Work::Forward(key), Some(assigned)) = (&self.work, &self.assigned) else {
            return Ok(());
        };
        if *key != input.key {
            return Ok(());
        }
        let config = &assigned.assignment.config;
        let ActivationsInput {
            key,
            examples,
            forward,
            targets,
            tensor,
        } = input;
        let layout = tensor.layout();
        if !config.takes(layout) {
            return Err(ClientError::Layout {
                given: layout,
                largest: config.largest_tensor(),
            });
        }
        if targets.len() != tensor.rows() {
            return Err(ClientError::Targets {
                targets: targets.len(),
                rows: tensor.rows(),
            });
        }
        self.work = Work::AwaitGradient {
            key,
            layout,
            activations: Digest::of(tensor.bytes()),
        };
        let message = Message::Activations(Activations {
            key,
            split: config.split,
            examples,
            forward,
            targets,
            tensor,
        });
        self.connections.send_paced(Endpoint::Main, now, &message);
        Ok(())
    }

    /// The driver's answer to `ComputeBackward`, which took so long.
    pub fn step_done(&mut self, _now: Duration, key: StepKey, backward: Duration) {
        let (Work::Backward(current), Some(assigned)) = (&self.work, &self.assigned) else {
            return;
        };
        if *current != key {
            return;
        }
        let more = key.step + 1 < assigned.assignment.config.local_steps;
        self.connections
            .send(Endpoint::Main, &Message::StepDone(StepDone { key, backward }));
        if let Some(end) = self.next_end.take() {
            self.begin_end(end);
        } else if more {
            self.work = Work::AwaitStep(key.round.step(key.step + 1));
            self.begin_step();
        } else {
            self.work = Work::AwaitEnd(key.round);
        }
    }

    /// The driver's answer to `UploadAdapter`.
    ///
    /// # Errors
    /// When the adapter has another length than agreed, or the moments are not those asked for; the request stands.
    pub fn adapter(&mut self, now: Duration, input: AdapterInput) -> Result<(), ClientError> {
        let (Work::Collect(end), Some(assigned)) = (&self.work, &self.assigned) else {
            return Ok(());
        };
        let AdapterInput {
            round,
            examples,
            values,
            moments,
        } = input;
        if end.round != round {
            return Ok(());
        }
        let Assignment {
            run,
            adapter_len,
            ref config,
            ..
        } = assigned.assignment;
        if values.len() as u64 != adapter_len {
            return Err(ClientError::Adapter {
                given: values.len(),
                expected: adapter_len,
            });
        }
        let leaving = config.split.saturating_sub(end.split);
        let len = values.len() / config.split.max(1) as usize * leaving as usize;
        let fits = match &moments {
            Some(moments) => leaving > 0 && moments.are_of(len, end.steps),
            None => leaving == 0,
        };
        if !fits {
            return Err(ClientError::Moments);
        }
        let update = AdapterUpdate {
            run,
            round,
            base: self.base,
            examples,
            values,
            moments,
        };
        self.connections
            .send_paced(Endpoint::Federated, now, &Message::AdapterUpdate(update.clone()));
        self.work = Work::AwaitAverage(update);
        Ok(())
    }

    /// Says goodbye and ends the session.
    pub fn leave(&mut self, _now: Duration) {
        self.finish(FinishReason::Left);
    }

    /// The next thing to do with a socket.
    pub fn poll_transmit(&mut self) -> Option<Transmit<Endpoint>> {
        self.connections.poll_transmit()
    }

    /// The next thing for the driver to do or know.
    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        self.events.pop_front()
    }

    /// When [`ClientSession::handle_timeout`] is to be called; `None` once the session is over.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if self.over {
            return None;
        }
        earlier(self.ending, self.connections.poll_timeout())
    }

    // Ends.

    pub(super) fn handle_stop(&mut self, endpoint: Endpoint, now: Duration, stop: Stop) {
        match stop.reason {
            StopReason::Completed => {
                let limit = self
                    .identity
                    .as_ref()
                    .map_or(PING_INTERVAL, |identity| identity.ping_interval);
                self.ending = Some(now + silence_limit(limit));
                self.end_if_due();
            }
            StopReason::Shutdown => match stop.return_after {
                Some(after) => self.await_return(endpoint, now, stop.detail, after),
                None => self.finish(FinishReason::Stopped { detail: stop.detail }),
            },
            StopReason::Excluded => self.lose(endpoint, now),
            StopReason::Unexpected | StopReason::BadUpdate | StopReason::Superseded | StopReason::Late => {
                self.fail(ClientFailure::Stopped { endpoint, stop });
            }
        }
    }

    /// Ends a complete run unless the last average is still to come.
    pub(super) fn end_if_due(&mut self) {
        if self.ending.is_some() && !matches!(self.work, Work::AwaitAverage(_)) {
            self.finish(FinishReason::Completed);
        }
    }

    pub(super) fn finish(&mut self, reason: FinishReason) {
        if !self.over {
            self.close();
            self.events.push_back(ClientEvent::Finished(reason));
        }
    }

    pub(super) fn fail(&mut self, failure: ClientFailure) {
        if !self.over {
            self.close();
            self.events.push_back(ClientEvent::Failed(failure));
        }
    }

    pub(super) fn protocol(&mut self, endpoint: Endpoint, detail: String) {
        self.fail(ClientFailure::Protocol { endpoint, detail });
    }

    fn close(&mut self) {
        self.over = true;
        for endpoint in [Endpoint::Main, Endpoint::Federated] {
            self.connections.send(endpoint, &Message::Leave);
            self.connections.hang_up(endpoint);
        }
    }
}
