//! The main server's word to the federated server: handed over in one process, or sent over a link to another.
//!
//! Separate because a lost link is neither a client's connection nor the end of the run: it is opened again.

use std::time::Duration;

use tokio::sync::mpsc;

use super::super::Error;
use super::report::Report;
use super::{Coordinator, Parts};
use crate::protocol::message::{ControlReply, RefusalReason};
use crate::protocol::{ClientFailure, ControlEvent, ControlSession, MAX_FRAME_BYTES, Transmit};
use crate::transport::{self, Dialer, Origin, SocketEvent};

/// The main server's end of its link to a federated server elsewhere.
pub struct RemoteLink {
    session: ControlSession,
    dialer: Dialer,
    federated: Origin,
    /// Counts the sockets, so that what an old one still says is not taken for the new one's.
    socket: u64,
    outgoing: Option<mpsc::Sender<Vec<u8>>>,
    events: mpsc::Receiver<(u64, SocketEvent)>,
    sender: mpsc::Sender<(u64, SocketEvent)>,
    last_error: Option<transport::Error>,
}

impl RemoteLink {
    pub fn new(session: ControlSession, dialer: Dialer, federated: Origin) -> Self {
        let (sender, events) = mpsc::channel(16);
        Self {
            session,
            dialer,
            federated,
            socket: 0,
            outgoing: None,
            events,
            sender,
            last_error: None,
        }
    }

    /// When the session next has something to do.
    pub(super) fn poll_timeout(&self) -> Option<Duration> {
        self.session.poll_timeout()
    }

    pub(super) fn handle_timeout(&mut self, now: Duration) {
        self.session.handle_timeout(now);
    }
}

impl Coordinator {
    /// Hands control messages between the two sessions, or to and from the link. Returns whether there were any.
    pub(super) fn exchange_control(&mut self) -> bool {
        let now = self.parts.clock.now();
        let mut any = false;
        let Parts {
            main, federated, link, ..
        } = &mut self.parts;
        if let Some(main) = main {
            while let Some(control) = main.session.poll_control() {
                any = true;
                match (federated.as_mut(), link.as_mut()) {
                    (Some(federated), _) => federated.handle_control(now, control),
                    (None, Some(link)) => link.session.send(control),
                    (None, None) => {}
                }
            }
            let mut reply = |reply: ControlReply| main.session.handle_control(now, reply);
            if let Some(federated) = federated {
                while let Some(answer) = federated.poll_control() {
                    any = true;
                    reply(answer);
                }
            }
            if let Some(link) = link {
                while let Some(answer) = link.session.poll_reply() {
                    any = true;
                    reply(answer);
                }
            }
        }
        any | self.link_events()
    }

    fn link_events(&mut self) -> bool {
        let now = self.now();
        let mut any = false;
        while let Some(event) = self.parts.link.as_mut().and_then(|link| link.session.poll_event()) {
            any = true;
            let Parts {
                main: Some(main),
                link: Some(link),
                report,
                ..
            } = &mut self.parts
            else {
                break;
            };
            match event {
                ControlEvent::Connect => {
                    link.socket += 1;
                    link.dialer.open(
                        link.socket,
                        &link.federated,
                        "/federated",
                        MAX_FRAME_BYTES,
                        link.sender.clone(),
                    );
                }
                ControlEvent::ConnectionLost { .. } => main.session.control_disconnected(),
                ControlEvent::Connected => {
                    link.last_error = None;
                    report(Report::Link {
                        connected: true,
                        detail: link.federated.to_string(),
                    });
                    main.session.control_connected(now);
                }
                ControlEvent::Failed(reason) => {
                    let refused = match &reason {
                        ClientFailure::Refused { refused, .. } => Some(refused.reason),
                        _ => None,
                    };
                    let error = match link.last_error.take() {
                        _ if refused.is_some_and(RefusalReason::is_authorisation_failure) => {
                            Error::ControlKey(link.federated.to_string())
                        }
                        Some(error) => Error::Transport(error),
                        None => Error::Federated(reason.to_string()),
                    };
                    self.fail(error);
                }
            }
        }
        any
    }

    pub(super) fn handle_link(&mut self, socket: u64, event: SocketEvent) {
        let now = self.now();
        let Some(link) = &mut self.parts.link else { return };
        if socket != link.socket {
            return;
        }
        match event {
            SocketEvent::Opened(outgoing) => {
                link.outgoing = Some(outgoing);
                link.session.connected(now);
            }
            SocketEvent::Frame(bytes) => link.session.handle_frame(now, &bytes),
            SocketEvent::Part => link.session.heard(),
            SocketEvent::Closed(error) => {
                link.outgoing = None;
                link.session.disconnected(now);
                if let Some(error) = error {
                    let detail = error.to_string();
                    let hopeless = !error.is_transient();
                    if link.last_error.is_none() {
                        (self.parts.report)(Report::Link {
                            connected: false,
                            detail,
                        });
                    }
                    link.last_error = Some(error);
                    if hopeless && let Some(error) = link.last_error.take() {
                        self.fail(Error::Transport(error));
                    }
                }
            }
        }
    }

    /// Sends what the session wants sent. Returns whether there was anything.
    pub(super) fn transmit_link(&mut self) -> bool {
        let mut any = false;
        while let Some(transmit) = self.parts.link.as_mut().and_then(|link| link.session.poll_transmit()) {
            any = true;
            let now = self.parts.clock.now();
            let Some(link) = &mut self.parts.link else { break };
            let sent = match transmit {
                Transmit::Frame { bytes, .. } => link
                    .outgoing
                    .as_ref()
                    .is_some_and(|outgoing| outgoing.try_send(bytes).is_ok()),
                Transmit::Close { .. } => false,
            };
            if !sent && link.outgoing.take().is_some() {
                link.socket += 1;
                link.session.disconnected(now);
            }
        }
        any
    }
}

/// The next event of the link; never, without a link.
pub(super) async fn link_event(link: &mut Option<RemoteLink>) -> Option<(u64, SocketEvent)> {
    match link {
        Some(link) => link.events.recv().await,
        None => std::future::pending().await,
    }
}
