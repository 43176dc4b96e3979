//! An edge client's session: both its connections, and what it computes when.
//!
//! It asks its driver for sockets, weights, forward and backward passes and the adapter, one at a time, and turns the
//! answers into messages. A gradient is handed on only if it names the very activations it was asked for. When a
//! connection fails the session asks for another, after growing pauses; after losing the main server it joins again, by
//! its ticket, from the next round. Between rounds the main server may assign another cut, which is loaded as the first one
//! was. Activations and adapters leave no faster than the rates of the round.

use std::collections::VecDeque;
use std::time::Duration;

use super::dial::{ConnectionFault, Dialer, Heard, Tick};
use super::frame::{adapter_frame_bytes, step_frame_bytes};
use super::link::silence_limit;
use super::message::*;
use super::{Endpoint, PING_INTERVAL, Transmit, earlier};
use crate::terms::ids::{ClientId, RoundKey, StepKey};
use crate::terms::moments::Moments;
use crate::terms::speed::Speed;
use crate::terms::tensor::{WireLayout, WireTensor};

/// The largest frame before an assignment says more.
const UNASSIGNED_FRAME_BYTES: usize = 1 << 20;

/// Who a client is.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// What this client speaks: `PROTOCOL_VERSION`.
    pub version: Version,
    pub name: String,
    pub capabilities: Capabilities,
    /// The model this client expects; `None` takes the server's.
    pub model: Option<Digest>,
    /// The tokenizer this client expects; `None` takes the server's.
    pub tokenizer: Option<Digest>,
    /// The join secret.
    pub secret: Option<String>,
    /// Connections that may fail one after another before the session gives up.
    pub retries: u32,
}

/// The driver's answer to `ComputeForward`.
#[derive(Clone, Debug, PartialEq)]
pub struct ActivationsInput {
    pub key: StepKey,
    pub examples: u32,
    /// What the forward pass took.
    pub forward: Duration,
    /// `(batch, seq)`; `IGNORED_TARGET` takes no part in the loss.
    pub targets: Vec<i32>,
    /// `(batch, seq, width)`, of the assignment's width and form.
    pub tensor: WireTensor,
}

/// The driver's answer to `UploadAdapter`.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterInput {
    pub round: RoundKey,
    /// Of the round's batches.
    pub examples: u64,
    /// The flat adapter.
    pub values: Vec<f32>,
    /// Of the blocks that leave, where there are any.
    pub moments: Option<Moments>,
}

/// A mistake of the driver; nothing a server sends leads here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    #[error("activations of {given}, where at most {largest} was agreed")]
    Layout { given: WireLayout, largest: WireLayout },
    #[error("{targets} targets for activations of {rows} rows")]
    Targets { targets: usize, rows: usize },
    #[error("an adapter of {given} values, where {expected} were agreed")]
    Adapter { given: usize, expected: u64 },
    #[error("moments other than those of the blocks that leave")]
    Moments,
}

/// How a session ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The run has done all its rounds.
    Completed,
    /// `leave` was called.
    Left,
    /// The server stopped the run.
    Stopped {
        detail: String,
        return_after: Option<Duration>,
    },
}

/// How a session ended badly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientFailure {
    #[error("the {endpoint:?} server refused: {} ({})", .refused.reason, .refused.detail)]
    Refused { endpoint: Endpoint, refused: Refused },
    #[error("the {endpoint:?} server ended the session: {} ({})", .stop.reason, .stop.detail)]
    Stopped { endpoint: Endpoint, stop: Stop },
    #[error("the {endpoint:?} server broke the protocol: {detail}")]
    Protocol { endpoint: Endpoint, detail: String },
    #[error("the {endpoint:?} server: {fault}")]
    Connection { endpoint: Endpoint, fault: ConnectionFault },
    #[error("the {endpoint:?} server cannot be reached; check its address and that it runs")]
    Unreachable { endpoint: Endpoint },
}

/// What the driver should do or know.
#[derive(Clone, Debug, PartialEq)]
pub enum ClientEvent {
    /// Open a socket; answer with `connected` or `disconnected`. Without a URL the service is at the join URL's origin.
    Connect {
        endpoint: Endpoint,
        url: Option<String>,
    },
    /// The connection is gone; the next attempt is at `retry_at`.
    ConnectionLost {
        endpoint: Endpoint,
        retry_at: Duration,
    },
    /// Load what it names and answer with `ready`. Not repeated after a reconnection that brings the same. Where another has
    /// been loaded before, the adapter state of the blocks that both have is kept.
    Assigned(Box<Assignment>),
    /// The client takes part in a round.
    RoundStarted {
        round: RoundKey,
        members: u32,
    },
    /// Put these values into the client side's adapter. `round` is the one whose average they are or, before the first
    /// step of a newcomer, the one that starts from them. Comes before any `ComputeForward` that builds on it. Moments are
    /// those of the last blocks, which are new to this client.
    InstallAdapter {
        round: RoundKey,
        values: Vec<f32>,
        moments: Option<Moments>,
    },
    /// Answer with `activations`.
    ComputeForward {
        key: StepKey,
    },
    /// Run backward, take the optimiser step, answer with `step_done`.
    ComputeBackward {
        key: StepKey,
        gradient: Gradient,
    },
    /// Answer with `adapter`. With it go the moments of the blocks from `split` on, if there are any, as after `steps`
    /// optimiser steps.
    UploadAdapter {
        round: RoundKey,
        split: u32,
        steps: u64,
    },
    RoundResult(RoundResult),
    /// The last event.
    Finished(FinishReason),
    /// The last event.
    Failed(ClientFailure),
}

struct Identity {
    client: ClientId,
    main_ticket: Ticket,
    federated_ticket: Ticket,
    federated_url: Option<String>,
    ping_interval: Duration,
}

struct Assigned {
    assignment: Assignment,
    /// It came over this connection, or came again.
    current: bool,
    /// The driver has said `ready`.
    loaded: bool,
    /// The main server has been told, on this connection.
    told: bool,
}

/// What the client is doing.
enum Work {
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

/// A client's state machine.
pub struct ClientSession {
    config: ClientConfig,
    main: Dialer,
    federated: Dialer,
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
    /// The run is complete, but for the last average.
    ending: Option<Duration>,
    over: bool,
    /// Of sockets that are being closed.
    closes: VecDeque<Transmit<Endpoint>>,
    events: VecDeque<ClientEvent>,
}

impl ClientSession {
    /// A client that asks for its first socket at once.
    pub fn new(config: ClientConfig, now: Duration) -> ClientSession {
        let mut session = ClientSession {
            main: Dialer::new(config.version, config.retries),
            federated: Dialer::new(config.version, config.retries),
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
            ending: None,
            over: false,
            closes: VecDeque::new(),
            events: VecDeque::new(),
        };
        session.main.start(now);
        session.handle_timeout(now);
        session
    }

    /// The client's number in the run, once it is in.
    pub fn client(&self) -> Option<ClientId> {
        self.identity.as_ref().map(|identity| identity.client)
    }

    /// The largest frame the servers may send: what a socket need not read past.
    pub fn max_frame_bytes(&self) -> usize {
        self.frame_limit().unwrap_or(UNASSIGNED_FRAME_BYTES)
    }

    /// The socket asked for is open.
    pub fn connected(&mut self, endpoint: Endpoint, now: Duration) {
        if !self.dialer(endpoint).is_opening() {
            return;
        }
        let credential = match (endpoint, &self.identity, &self.config.secret) {
            (Endpoint::Federated, Some(identity), _) => Credential::Ticket(identity.federated_ticket.clone()),
            (Endpoint::Main, Some(identity), _) => Credential::Ticket(identity.main_ticket.clone()),
            (_, None, Some(secret)) => Credential::Secret(secret.clone()),
            (_, None, None) => Credential::None,
        };
        if endpoint == Endpoint::Main {
            self.came_by_ticket = self.identity.is_some();
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
        self.dialer(endpoint).greet(now, &hello);
    }

    /// The socket closed, or could not be opened.
    pub fn disconnected(&mut self, endpoint: Endpoint, now: Duration) {
        if self.dialer(endpoint).has_socket() {
            self.lose(endpoint, now);
        }
    }

    /// A frame of the socket opened last for this endpoint.
    pub fn handle_frame(&mut self, endpoint: Endpoint, now: Duration, bytes: &[u8]) {
        if self.over {
            return;
        }
        let limit = self.max_frame_bytes();
        match self.dialer(endpoint).handle_frame(now, bytes, limit) {
            Ok(Heard::Nothing) => {}
            Ok(Heard::Welcome(welcome)) => self.handle_welcome(endpoint, now, *welcome),
            Ok(Heard::Refused(refused)) => self.handle_refusal(endpoint, now, refused),
            Ok(Heard::Message(message)) => self.handle_message(endpoint, now, message),
            Err(fault) => self.fail(ClientFailure::Connection { endpoint, fault }),
        }
    }

    pub fn handle_timeout(&mut self, now: Duration) {
        if self.over {
            return;
        }
        if self.ending.is_some_and(|deadline| deadline <= now) {
            return self.finish(FinishReason::Completed);
        }
        for endpoint in [Endpoint::Main, Endpoint::Federated] {
            match self.dialer(endpoint).handle_timeout(now) {
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
        self.send_paced(Endpoint::Main, now, &message);
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
        self.send(Endpoint::Main, &Message::StepDone(StepDone { key, backward }));
        if more {
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
        self.send_paced(Endpoint::Federated, now, &Message::AdapterUpdate(update.clone()));
        self.work = Work::AwaitAverage(update);
        Ok(())
    }

    /// Says goodbye and ends the session.
    pub fn leave(&mut self, _now: Duration) {
        self.finish(FinishReason::Left);
    }

    pub fn poll_transmit(&mut self) -> Option<Transmit<Endpoint>> {
        if let Some(earlier) = self.closes.pop_front() {
            return Some(earlier);
        }
        for endpoint in [Endpoint::Main, Endpoint::Federated] {
            if let Some(bytes) = self.dialer(endpoint).poll_frame() {
                return Some(Transmit::Frame { to: endpoint, bytes });
            }
        }
        None
    }

    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        self.events.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Duration> {
        if self.over {
            return None;
        }
        earlier(
            self.ending,
            earlier(self.main.poll_timeout(), self.federated.poll_timeout()),
        )
    }

    // Connections.

    fn dialer(&mut self, endpoint: Endpoint) -> &mut Dialer {
        match endpoint {
            Endpoint::Main => &mut self.main,
            Endpoint::Federated => &mut self.federated,
        }
    }

    /// The largest frame the assignment leads to; `None` when there is none or no frame may be that large.
    fn frame_limit(&self) -> Option<usize> {
        let assignment = &self.assigned.as_ref()?.assignment;
        let step = step_frame_bytes(&assignment.config)?;
        // With two moments for each value, at most.
        let adapter = adapter_frame_bytes(assignment.adapter_len.checked_mul(3)?)?;
        Some(step.max(adapter).max(UNASSIGNED_FRAME_BYTES))
    }

    fn send(&mut self, endpoint: Endpoint, message: &Message) {
        if let Some(link) = self.dialer(endpoint).link() {
            link.send(message);
        }
    }

    /// Sends what takes its time on the emulated uplink.
    fn send_paced(&mut self, endpoint: Endpoint, now: Duration, message: &Message) {
        if let Some(link) = self.dialer(endpoint).link() {
            link.send_paced(now, message);
        }
    }

    /// Brings both uplinks to the rates of the round.
    fn set_rates(&mut self) {
        let rates = self.rates;
        if let Some(link) = self.main.link() {
            link.set_rate(rates.map(|rates| rates.main_bits_per_s));
        }
        if let Some(link) = self.federated.link() {
            link.set_rate(rates.map(|rates| rates.federated_bits_per_s));
        }
    }

    fn hang_up(&mut self, endpoint: Endpoint) {
        // What is still to be sent goes before the close.
        self.dialer(endpoint).flush();
        while let Some(bytes) = self.dialer(endpoint).poll_frame() {
            self.closes.push_back(Transmit::Frame { to: endpoint, bytes });
        }
        if self.dialer(endpoint).hang_up() {
            self.closes.push_back(Transmit::Close { to: endpoint });
        }
    }

    /// A connection is gone. Losing the main server is leaving the round.
    fn lose(&mut self, endpoint: Endpoint, now: Duration) {
        if self.over {
            return;
        }
        self.hang_up(endpoint);
        if self.ending.is_some() {
            // The run is complete. Only the last average is missing, and only the federated server has it.
            if endpoint == Endpoint::Main {
                return;
            }
        } else if endpoint == Endpoint::Main {
            self.leave_round();
        }
        match self.dialer(endpoint).retry(now) {
            Some(retry_at) => self
                .events
                .push_back(ClientEvent::ConnectionLost { endpoint, retry_at }),
            None if self.ending.is_some() => self.finish(FinishReason::Completed),
            None => self.fail(ClientFailure::Unreachable { endpoint }),
        }
    }

    fn leave_round(&mut self) {
        self.work = Work::Idle;
        self.next_step = None;
        if let Some(assigned) = &mut self.assigned {
            assigned.current = false;
            assigned.told = false;
        }
    }

    fn handle_welcome(&mut self, endpoint: Endpoint, now: Duration, welcome: Welcome) {
        self.set_rates();
        match endpoint {
            Endpoint::Main => {
                let Some(federated_ticket) = welcome.federated_ticket else {
                    return self.protocol(
                        endpoint,
                        "a welcome without a ticket for the federated service".to_owned(),
                    );
                };
                let same = self.client() == Some(welcome.client);
                self.identity = Some(Identity {
                    client: welcome.client,
                    main_ticket: welcome.ticket,
                    federated_ticket,
                    federated_url: welcome.federated_url,
                    ping_interval: welcome.ping_interval,
                });
                if !same || !self.federated.has_socket() {
                    self.hang_up(Endpoint::Federated);
                    self.federated.start(now);
                    self.handle_timeout(now);
                }
            }
            Endpoint::Federated => {
                if let Some(identity) = &mut self.identity {
                    identity.federated_ticket = welcome.ticket;
                }
                if let Work::AwaitAverage(update) | Work::AwaitBase { update, .. } = &self.work {
                    let message = Message::AdapterUpdate(update.clone());
                    self.send_paced(Endpoint::Federated, now, &message);
                }
                self.announce(now);
            }
        }
    }

    fn handle_refusal(&mut self, endpoint: Endpoint, now: Duration, refused: Refused) {
        self.hang_up(endpoint);
        let by_ticket = endpoint == Endpoint::Federated || self.came_by_ticket;
        let retry_at = match refused.reason {
            reason if by_ticket && reason.is_authorisation_failure() => {
                // Both connections begin again, with the secret.
                self.identity = None;
                self.hang_up(Endpoint::Main);
                self.hang_up(Endpoint::Federated);
                self.leave_round();
                self.main.retry(now)
            }
            // The run ended while this client was away from it.
            RefusalReason::NoRun if by_ticket && endpoint == Endpoint::Main => {
                let detail = refused.detail;
                return self.finish(FinishReason::Stopped {
                    detail,
                    return_after: None,
                });
            }
            // The federated server may not have heard of the run yet.
            RefusalReason::NoRun if endpoint == Endpoint::Federated => self.federated.retry(now),
            _ => None,
        };
        match retry_at {
            Some(retry_at) => self
                .events
                .push_back(ClientEvent::ConnectionLost { endpoint, retry_at }),
            None if self.ending.is_some() => self.finish(FinishReason::Completed),
            None => self.fail(ClientFailure::Refused { endpoint, refused }),
        }
    }

    /// Tells the main server that this client can take part, when it can: weights loaded, both services connected.
    fn announce(&mut self, _now: Duration) {
        let up = self.main.is_up() && self.federated.is_up();
        if let Some(assigned) = &mut self.assigned
            && up
            && assigned.current
            && assigned.loaded
            && !assigned.told
        {
            assigned.told = true;
            self.main.succeeded();
            self.federated.succeeded();
            let ready = Ready {
                assignment: assigned.assignment.number,
                speed: self.speed,
            };
            self.send(Endpoint::Main, &Message::Ready(ready));
        }
    }

    // Messages.

    fn handle_message(&mut self, endpoint: Endpoint, now: Duration, message: Message) {
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
            Some(assigned)
                if assigned.current
                    && !(matches!(self.work, Work::Idle | Work::AwaitAverage(_))
                        && assignment.number > assigned.assignment.number) =>
            {
                let detail = format!(
                    "expected {}, got Assignment {}",
                    self.expected(Endpoint::Main),
                    assignment.number
                );
                return self.protocol(Endpoint::Main, detail);
            }
            Some(assigned) if assigned.assignment == assignment => assigned.current = true,
            _ => {
                // The next round brings the adapter; the average that was awaited is that of another cut.
                self.installed = None;
                self.work = Work::Idle;
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
                for endpoint in [Endpoint::Main, Endpoint::Federated] {
                    if let Some(link) = self.dialer(endpoint).link() {
                        link.set_limit(limit);
                    }
                }
                self.events.push_back(ClientEvent::Assigned(Box::new(assignment)));
            }
        }
        self.announce(now);
    }

    fn handle_round_start(&mut self, start: RoundStart) {
        let told = self.assigned.as_ref().is_some_and(|assigned| assigned.told);
        if !told || !matches!(self.work, Work::Idle | Work::AwaitAverage(_)) {
            let detail = format!(
                "expected {}, got RoundStart of {}",
                self.expected(Endpoint::Main),
                start.round
            );
            return self.protocol(Endpoint::Main, detail);
        }
        self.rates = start.rates;
        self.set_rates();
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

    fn handle_step_start(&mut self, start: StepStart) {
        let expected = match &self.work {
            Work::AwaitStep(key) => Some(*key),
            Work::AwaitBase { start, .. } => Some(start.round.step(0)),
            Work::Backward(key) => Some(key.round.step(key.step + 1)),
            _ => None,
        };
        if expected != Some(start.key) || self.next_step.is_some() {
            let detail = format!(
                "expected {}, got StepStart of {}",
                self.expected(Endpoint::Main),
                start.key
            );
            return self.protocol(Endpoint::Main, detail);
        }
        self.next_step = Some(start);
        self.begin_step();
    }

    /// Asks for the forward pass of a step that has been announced and whose turn it is.
    fn begin_step(&mut self) {
        if let Work::AwaitStep(key) = self.work
            && self.next_step.take_if(|start| start.key == key).is_some()
        {
            self.work = Work::Forward(key);
            self.events.push_back(ClientEvent::ComputeForward { key });
        }
    }

    fn handle_round_end(&mut self, end: RoundEnd) {
        let RoundEnd { round, split, steps } = end;
        if !matches!(self.work, Work::AwaitEnd(current) if current == round) {
            let detail = format!("expected {}, got RoundEnd of {round}", self.expected(Endpoint::Main));
            return self.protocol(Endpoint::Main, detail);
        }
        if split == 0 || steps == 0 {
            let detail = format!("a RoundEnd of {round} that keeps {split} blocks, after {steps} steps");
            return self.protocol(Endpoint::Main, detail);
        }
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

    // Ends.

    fn handle_stop(&mut self, endpoint: Endpoint, now: Duration, stop: Stop) {
        match stop.reason {
            StopReason::Completed => {
                let limit = self
                    .identity
                    .as_ref()
                    .map_or(PING_INTERVAL, |identity| identity.ping_interval);
                self.ending = Some(now + silence_limit(limit));
                self.end_if_due();
            }
            StopReason::Shutdown => {
                self.finish(FinishReason::Stopped {
                    detail: stop.detail,
                    return_after: stop.return_after,
                });
            }
            StopReason::Excluded => self.lose(endpoint, now),
            StopReason::Unexpected | StopReason::BadUpdate | StopReason::Superseded => {
                self.fail(ClientFailure::Stopped { endpoint, stop });
            }
        }
    }

    /// Ends a complete run unless the last average is still to come.
    fn end_if_due(&mut self) {
        if self.ending.is_some() && !matches!(self.work, Work::AwaitAverage(_)) {
            self.finish(FinishReason::Completed);
        }
    }

    fn finish(&mut self, reason: FinishReason) {
        if !self.over {
            self.close();
            self.events.push_back(ClientEvent::Finished(reason));
        }
    }

    fn fail(&mut self, failure: ClientFailure) {
        if !self.over {
            self.close();
            self.events.push_back(ClientEvent::Failed(failure));
        }
    }

    fn protocol(&mut self, endpoint: Endpoint, detail: String) {
        self.fail(ClientFailure::Protocol { endpoint, detail });
    }

    fn close(&mut self) {
        self.over = true;
        for endpoint in [Endpoint::Main, Endpoint::Federated] {
            self.send(endpoint, &Message::Leave);
            self.hang_up(endpoint);
        }
    }
}
