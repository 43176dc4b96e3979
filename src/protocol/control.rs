//! The main server's end of its link to a federated server in another process.
//!
//! Carries `Control` there and `ControlReply` back, and keeps dialling. What was under way when the link is lost is not
//! kept here: when it is up again the main session repeats what must be known (`MainServerSession::control_connected`).

use std::collections::VecDeque;
use std::time::Duration;

use super::Transmit;
use super::client::ClientFailure;
use super::dial::{Dialer, Heard, Patience, Tick};
use super::message::*;
use super::{Endpoint, MAX_FRAME_BYTES};
use crate::terms::aggregation::Aggregation;

/// Who the main server is to the federated one.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// What this server speaks: `PROTOCOL_VERSION`.
    pub version: Version,
    pub name: String,
    /// The join secret.
    pub secret: Option<String>,
    /// Connections that may fail one after another before the session gives up.
    pub retries: u32,
}

/// What the driver should do or know.
#[derive(Clone, Debug, PartialEq)]
pub enum ControlEvent {
    /// Open a socket to the federated server; answer with `connected` or `disconnected`.
    Connect,
    /// The link is up: call `MainServerSession::control_connected`.
    Connected,
    ConnectionLost {
        retry_at: Duration,
    },
    /// The last event.
    Failed(ClientFailure),
}

/// The link's state machine.
pub struct ControlSession {
    config: ControlConfig,
    dialer: Dialer,
    over: bool,
    /// What the federated server was found to speak.
    theirs: Version,
    transmits: VecDeque<Transmit<Endpoint>>,
    replies: VecDeque<ControlReply>,
    events: VecDeque<ControlEvent>,
}

impl ControlSession {
    /// A link that asks for its first socket at once.
    pub fn new(config: ControlConfig, now: Duration) -> ControlSession {
        let mut session = ControlSession {
            dialer: Dialer::new(config.version, Patience::Attempts(config.retries), 0),
            theirs: config.version,
            config,
            over: false,
            transmits: VecDeque::new(),
            replies: VecDeque::new(),
            events: VecDeque::new(),
        };
        session.dialer.start(now);
        session.handle_timeout(now);
        session
    }

    /// The socket asked for is open.
    pub fn connected(&mut self, now: Duration) {
        if !self.dialer.is_opening() {
            return;
        }
        let credential = match &self.config.secret {
            Some(secret) => Credential::Secret(secret.clone()),
            None => Credential::None,
        };
        let hello = Hello {
            version: self.config.version,
            service: Service::Control,
            credential,
            name: self.config.name.clone(),
            model: None,
            tokenizer: None,
            capabilities: Capabilities {
                forms: Vec::new(),
                memory_bytes: 0,
                device: String::new(),
            },
        };
        self.dialer.greet(now, &hello);
    }

    /// The socket closed, or could not be opened.
    pub fn disconnected(&mut self, now: Duration) {
        if self.dialer.has_socket() {
            self.lose(now);
        }
    }

    /// A frame of the socket opened last.
    pub fn handle_frame(&mut self, now: Duration, bytes: &[u8]) {
        if self.over {
            return;
        }
        match self.dialer.handle_frame(now, bytes, MAX_FRAME_BYTES) {
            Ok(Heard::Nothing) => {}
            Ok(Heard::Welcome(welcome)) => {
                self.theirs = welcome.version;
                self.dialer.succeeded();
                self.events.push_back(ControlEvent::Connected);
            }
            Ok(Heard::Refused(refused)) => {
                self.fail(ClientFailure::Refused {
                    endpoint: Endpoint::Federated,
                    refused,
                });
            }
            Ok(Heard::Message(Message::ControlReply(reply))) => self.replies.push_back(reply),
            Ok(Heard::Message(Message::Stop(stop))) => {
                self.fail(ClientFailure::Stopped {
                    endpoint: Endpoint::Federated,
                    stop,
                });
            }
            Ok(Heard::Message(other)) => {
                let detail = format!("expected ControlReply or Stop, got {}", other.name());
                self.fail(ClientFailure::Protocol {
                    endpoint: Endpoint::Federated,
                    detail,
                });
            }
            Err(fault) => self.fail(ClientFailure::Connection {
                endpoint: Endpoint::Federated,
                fault,
            }),
        }
    }

    /// Bytes of a frame that is not whole yet have come: the federated server is not silent, the way is slow.
    pub fn heard(&mut self) {
        self.dialer.hear_part();
    }

    /// Tells the session what time it is; at the latest when [`ControlSession::poll_timeout`] says.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.over {
            return;
        }
        match self.dialer.handle_timeout(now) {
            Tick::Nothing => {}
            Tick::Dial => self.events.push_back(ControlEvent::Connect),
            Tick::Gone => self.lose(now),
        }
    }

    /// Sends what `MainServerSession::poll_control` gave. While the link is down it is dropped, and repeated later.
    pub fn send(&mut self, control: Control) {
        if matches!(control, Control::Base { .. }) && self.theirs < DEADLINES_SINCE {
            // It compares adapters with each other only.
            return;
        }
        if let Control::Rule(rule) = &control
            && self.theirs < AGGREGATION_SINCE
        {
            // The mean is all that it knows, and all members have one rank then.
            if rule.aggregation() != Aggregation::Mean {
                self.fail(ClientFailure::Protocol {
                    endpoint: Endpoint::Federated,
                    detail: format!(
                        "it speaks protocol {}, and this run aggregates by `{}`, which needs {AGGREGATION_SINCE}",
                        self.theirs,
                        rule.aggregation()
                    ),
                });
            }
            return;
        }
        if let Some(link) = self.dialer.link() {
            link.send(&Message::Control(control));
        }
    }

    /// For `MainServerSession::handle_control`.
    pub(crate) fn poll_reply(&mut self) -> Option<ControlReply> {
        self.replies.pop_front()
    }

    /// To the one socket there is; the endpoint is always `Federated`.
    pub fn poll_transmit(&mut self) -> Option<Transmit<Endpoint>> {
        if let Some(earlier) = self.transmits.pop_front() {
            return Some(earlier);
        }
        let bytes = self.dialer.poll_frame()?;
        Some(Transmit::Frame {
            to: Endpoint::Federated,
            bytes,
        })
    }

    /// The next thing for the driver to do or know.
    pub fn poll_event(&mut self) -> Option<ControlEvent> {
        self.events.pop_front()
    }

    /// When [`ControlSession::handle_timeout`] is to be called; `None` once the session is over.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if self.over { None } else { self.dialer.poll_timeout() }
    }

    /// Says goodbye and ends the link. Nothing more happens.
    pub fn close(&mut self) {
        if !self.over {
            self.over = true;
            if let Some(link) = self.dialer.link() {
                link.send(&Message::Leave);
            }
            self.hang_up();
        }
    }

    fn hang_up(&mut self) {
        while let Some(bytes) = self.dialer.poll_frame() {
            self.transmits.push_back(Transmit::Frame {
                to: Endpoint::Federated,
                bytes,
            });
        }
        if self.dialer.hang_up() {
            self.transmits.push_back(Transmit::Close {
                to: Endpoint::Federated,
            });
        }
    }

    fn lose(&mut self, now: Duration) {
        if self.over {
            return;
        }
        self.hang_up();
        match self.dialer.retry(now) {
            Some(retry) => self
                .events
                .push_back(ControlEvent::ConnectionLost { retry_at: retry.at }),
            None => self.fail(ClientFailure::Unreachable {
                endpoint: Endpoint::Federated,
            }),
        }
    }

    fn fail(&mut self, failure: ClientFailure) {
        if !self.over {
            self.close();
            self.events.push_back(ControlEvent::Failed(failure));
        }
    }
}
