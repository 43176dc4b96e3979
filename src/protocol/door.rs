//! The listening side: connections before, during and after their greeting.
//!
//! Separate from the server sessions because both services keep their connections alike and differ only in what the
//! messages mean. `G` tells one guest from another.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::codec::{Answer, GreetingError, decode_hello, encode_answer, is_greeting};
use super::link::{Link, LinkError};
use super::message::{Hello, Message, RefusalReason, Refused, Stop, Version, Welcome};
use super::{ConnectionId, Transmit};

/// A connection that has not greeted by then is closed.
const GREETING_LIMIT: Duration = Duration::from_secs(15);

/// What a frame brought.
#[derive(Debug)]
pub(super) enum Heard<G> {
    Nothing,
    /// To be answered by `welcome` or `refuse`.
    Hello(Box<Hello>),
    /// Already refused.
    Refused(RefusalReason),
    /// A sign of life; `first` on the first one after the welcome.
    Frame {
        guest: G,
        first: bool,
        message: Option<Message>,
    },
    /// The guest broke the protocol. The connection is still to be closed.
    Fault {
        guest: G,
        error: LinkError,
    },
}

struct Guest<G> {
    tag: G,
    welcome: Vec<u8>,
    has_spoken: bool,
    link: Link,
}

struct Connection<G> {
    opened: Duration,
    guest: Option<Guest<G>>,
}

pub(super) struct Door<G> {
    version: Version,
    ping_interval: Duration,
    connections: BTreeMap<ConnectionId, Connection<G>>,
    transmits: VecDeque<Transmit<ConnectionId>>,
}

impl<G: Copy> Door<G> {
    pub fn new(version: Version, ping_interval: Duration) -> Door<G> {
        Door {
            version,
            ping_interval,
            connections: BTreeMap::new(),
            transmits: VecDeque::new(),
        }
    }

    pub fn open(&mut self, connection: ConnectionId, now: Duration) {
        self.connections.insert(
            connection,
            Connection {
                opened: now,
                guest: None,
            },
        );
    }

    /// Forgets a connection whose socket is gone. Returns its guest.
    pub fn remove(&mut self, connection: ConnectionId) -> Option<G> {
        self.connections.remove(&connection)?.guest.map(|guest| guest.tag)
    }

    /// Whether anybody has been let in and not left.
    pub(crate) fn has_guests(&self) -> bool {
        self.connections.values().any(|connection| connection.guest.is_some())
    }

    pub(crate) fn connections(&self) -> Vec<ConnectionId> {
        self.connections.keys().copied().collect()
    }

    pub fn hear(&mut self, connection: ConnectionId, bytes: &[u8]) -> Heard<G> {
        let Some(Connection { guest, .. }) = self.connections.get_mut(&connection) else {
            return Heard::Nothing;
        };
        let Some(guest) = guest else {
            return self.hear_greeting(connection, bytes);
        };
        if is_greeting(bytes) {
            // The welcome did not arrive.
            self.transmits.push_back(Transmit::Frame {
                to: connection,
                bytes: guest.welcome.clone(),
            });
            return Heard::Nothing;
        }
        let first = !guest.has_spoken;
        let tag = guest.tag;
        let heard = match guest.link.handle_frame(bytes) {
            Ok(message) => {
                guest.has_spoken = true;
                Heard::Frame {
                    guest: tag,
                    first,
                    message,
                }
            }
            Err(error) => Heard::Fault { guest: tag, error },
        };
        self.flush(connection);
        heard
    }

    /// Bytes of a frame that is not whole yet have come.
    pub(crate) fn hear_part(&mut self, connection: ConnectionId) {
        if let Some(Connection { guest: Some(guest), .. }) = self.connections.get_mut(&connection) {
            guest.link.hear();
        }
    }

    fn hear_greeting(&mut self, connection: ConnectionId, bytes: &[u8]) -> Heard<G> {
        let error = match decode_hello(self.version, bytes) {
            Ok(hello) => return Heard::Hello(Box::new(hello)),
            Err(error) => error,
        };
        let reason = match &error {
            GreetingError::NotThisProtocol => RefusalReason::NotThisProtocol,
            GreetingError::Version { .. } => RefusalReason::Version,
            GreetingError::Malformed(_) => RefusalReason::Malformed,
        };
        self.refuse(connection, reason, error.to_string());
        Heard::Refused(reason)
    }

    /// Lets a connection in. `limit` is the largest frame it may send.
    pub fn welcome(&mut self, connection: ConnectionId, tag: G, welcome: Welcome, now: Duration, limit: usize) {
        let link = Link::new(now, self.ping_interval, limit).speaking(welcome.version);
        let bytes = encode_answer(&Answer::Welcome(welcome));
        if let Some(entry) = self.connections.get_mut(&connection) {
            self.transmits.push_back(Transmit::Frame {
                to: connection,
                bytes: bytes.clone(),
            });
            entry.guest = Some(Guest {
                tag,
                welcome: bytes,
                has_spoken: false,
                link,
            });
        }
    }

    /// Keeps a connection out and closes it.
    pub fn refuse(&mut self, connection: ConnectionId, reason: RefusalReason, detail: String) {
        let refused = Refused {
            version: self.version,
            reason,
            detail,
        };
        let bytes = encode_answer(&Answer::Refused(refused));
        self.transmits.push_back(Transmit::Frame { to: connection, bytes });
        self.close(connection);
    }

    /// Sends a message. Returns the bytes of its frame, 0 where there is nobody.
    pub fn send(&mut self, connection: ConnectionId, message: &Message) -> usize {
        let Some(Connection { guest: Some(guest), .. }) = self.connections.get_mut(&connection) else {
            return 0;
        };
        let bytes = guest.link.send(message);
        self.flush(connection);
        bytes
    }

    pub fn close(&mut self, connection: ConnectionId) {
        if self.connections.remove(&connection).is_some() {
            self.transmits.push_back(Transmit::Close { to: connection });
        }
    }

    /// Says why, then closes.
    pub fn stop(&mut self, connection: ConnectionId, stop: Stop) {
        self.send(connection, &Message::Stop(stop));
        self.close(connection);
    }

    /// Pings, and closes the connections that are silent. Returns those with their guests.
    pub fn handle_timeout(&mut self, now: Duration) -> Vec<(ConnectionId, Option<G>)> {
        let mut gone = Vec::new();
        for (id, connection) in &mut self.connections {
            match &mut connection.guest {
                None if connection.opened + GREETING_LIMIT <= now => gone.push((*id, None)),
                None => {}
                Some(guest) => {
                    let silent = guest.link.handle_timeout(now);
                    if silent || guest.link.is_overdue() {
                        gone.push((*id, Some(guest.tag)));
                    }
                }
            }
        }
        for id in self.connections() {
            self.flush(id);
        }
        for (id, _) in &gone {
            self.close(*id);
        }
        gone
    }

    fn flush(&mut self, to: ConnectionId) {
        if let Some(Connection { guest: Some(guest), .. }) = self.connections.get_mut(&to) {
            while let Some(bytes) = guest.link.poll_frame() {
                self.transmits.push_back(Transmit::Frame { to, bytes });
            }
        }
    }

    pub fn poll_transmit(&mut self) -> Option<Transmit<ConnectionId>> {
        self.transmits.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Duration> {
        let deadline = |connection: &Connection<G>| match &connection.guest {
            None => connection.opened + GREETING_LIMIT,
            Some(guest) => guest.link.poll_timeout(),
        };
        self.connections.values().map(deadline).min()
    }
}
