//! The federated server's session: the members' adapters of a round in, their average out.
//!
//! One object for the run and all its connections. The main server says over `Control` who is in a round; clients send
//! their adapters here and nowhere else, with the moments of the blocks that are about to leave them, which are averaged
//! alike. Members may have cuts of their own: their adapters are prefixes of the average, and for what the shorter ones lack the
//! main server's copy stands in. A round closes when every member has sent an adapter or is left out, tested again on every change of membership.
//! Tokens, labels and activations never come here.
//!
//! | file | holds |
//! |---|---|
//! | `event` | how the service is run, and what its driver is told |
//! | `membership` | who comes in and who goes out |
//! | `round`, `collection` | what a round is made of, and how it goes |
//! | `outlier` | whose adapter has moved too far |

mod collection;
mod event;
mod membership;
mod outlier;
mod round;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

pub use event::{ControlAccess, FederatedConfig, FederatedEvent};
use membership::{Client, Controller, Guest};
use outlier::Usual;
use round::{Asked, Closed, OpenRound, Participant};

use super::admission::TicketOffice;
use super::codec::MAX_HANDSHAKE_BYTES;
use super::door::{Door, Heard};
use super::frame::adapter_frame_bytes;
use super::message::*;
use super::{ConnectionId, DepartureReason, MAX_FRAME_BYTES, Transmit, earlier};
use crate::federated::Rule;
use crate::terms::ids::ClientId;

struct Run {
    office: TicketOffice,
    /// The main server's clock less this one's, in parts that cannot both be non-zero.
    ahead: Duration,
    behind: Duration,
    frame_limit: usize,
    model: Digest,
    tokenizer: Digest,
}

impl Run {
    /// The main server's clock, by which tickets expire.
    fn clock(&self, now: Duration) -> Duration {
        (now + self.ahead).saturating_sub(self.behind)
    }
}

/// The federated server's state machine.
pub struct FederatedServerSession {
    config: FederatedConfig,
    door: Door<Guest>,
    run: Option<Run>,
    control: Option<Controller>,
    clients: BTreeMap<ClientId, Client>,
    open: Option<OpenRound>,
    /// Kept until the next round closes, for members that did not hear of it.
    last: Option<Closed>,
    /// Adapters, with the bytes of their frames, that the main server, whose word travels another way, has not asked for yet:
    /// one a client at most.
    early: BTreeMap<ClientId, (AdapterUpdate, u64)>,
    usual: Usual,
    /// How the rounds that are opened now are aggregated; `None` is the mean.
    rule: Option<Rule>,
    replies: VecDeque<ControlReply>,
    events: VecDeque<FederatedEvent>,
}

impl FederatedServerSession {
    /// A service that waits for `Control::OpenRun`.
    pub fn new(config: FederatedConfig) -> FederatedServerSession {
        FederatedServerSession {
            door: Door::new(config.version, config.ping_interval),
            config,
            run: None,
            control: None,
            clients: BTreeMap::new(),
            open: None,
            last: None,
            early: BTreeMap::new(),
            usual: Usual::default(),
            rule: None,
            replies: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The largest frame anybody may send: what a socket need not read past.
    pub fn max_frame_bytes(&self) -> usize {
        self.run.as_ref().map_or(MAX_FRAME_BYTES, |run| run.frame_limit)
    }

    /// Clients connected now.
    pub(crate) fn connected_clients(&self) -> usize {
        self.clients
            .values()
            .filter(|client| client.connection.is_some())
            .count()
    }

    /// A socket was accepted. Its number is one that was never used before.
    pub fn connected(&mut self, connection: ConnectionId, now: Duration) {
        self.door.open(connection, now);
    }

    /// A socket is closed, from whichever side; its client has some time to come back with its adapter.
    pub fn disconnected(&mut self, connection: ConnectionId, now: Duration) {
        if let Some(guest) = self.door.remove(connection) {
            self.depart(guest, DepartureReason::Disconnected, now);
        }
        self.retest(now);
    }

    /// The connection was closed from this side, because what waited for it was more than it reads.
    pub fn unread(&mut self, connection: ConnectionId, now: Duration) {
        if let Some(guest) = self.door.remove(connection) {
            self.depart(guest, DepartureReason::Unread, now);
        }
        self.retest(now);
    }

    /// A frame came, whole. What a peer may not say ends its own connection and nothing else.
    pub fn handle_frame(&mut self, connection: ConnectionId, now: Duration, bytes: &[u8]) {
        match self.door.hear(connection, bytes) {
            Heard::Nothing => {}
            Heard::Refused(reason) => self
                .events
                .push_back(FederatedEvent::ClientRefused { connection, reason }),
            Heard::Hello(hello) => {
                if let Err((reason, detail)) = self.greet(connection, now, &hello) {
                    self.door.refuse(connection, reason, detail);
                    self.events
                        .push_back(FederatedEvent::ClientRefused { connection, reason });
                }
            }
            Heard::Fault { guest, error } if error.is_damage() => {
                self.door.close(connection);
                self.depart(guest, DepartureReason::Damaged, now);
            }
            Heard::Fault { guest, error } => self.expel(guest, StopReason::Unexpected, error.to_string(), now),
            Heard::Frame { guest, first, message } => {
                if let (true, Guest::Client(client)) = (first, guest)
                    && let Some(client) = self.clients.get_mut(&client)
                {
                    client.next_serial += 1;
                }
                if let Some(message) = message {
                    self.handle_message(guest, message, bytes.len() as u64, now);
                }
            }
        }
        self.retest(now);
    }

    /// Bytes of a frame that is not whole yet have come: its sender is not silent, only slow.
    pub fn heard(&mut self, connection: ConnectionId) {
        self.door.hear_part(connection);
    }

    /// Tells the session what time it is; at the latest when [`FederatedServerSession::poll_timeout`] says.
    pub fn handle_timeout(&mut self, now: Duration) {
        for (_, guest) in self.door.handle_timeout(now) {
            if let Some(guest) = guest {
                self.depart(guest, DepartureReason::Silent, now);
            }
        }
        let absent: Vec<ClientId> = self
            .absence_deadlines()
            .filter(|(_, deadline)| *deadline <= now)
            .map(|(client, _)| client)
            .collect();
        for client in absent {
            self.exclude(client, ExclusionReason::Absent);
        }
        self.retest(now);
    }

    /// What the main server said.
    pub fn handle_control(&mut self, now: Duration, control: Control) {
        match control {
            Control::OpenRun {
                run,
                ticket_key,
                now: theirs,
                ticket_lifetime,
                largest_update,
                model,
                tokenizer,
            } => {
                if self.run.as_ref().is_some_and(|open| open.office.run != run) {
                    self.drop_run();
                }
                self.run = Some(Run {
                    office: TicketOffice {
                        run,
                        key: ticket_key,
                        lifetime: ticket_lifetime,
                    },
                    ahead: theirs.saturating_sub(now),
                    behind: now.saturating_sub(theirs),
                    frame_limit: adapter_frame_bytes(largest_update)
                        .unwrap_or(MAX_FRAME_BYTES)
                        .max(MAX_HANDSHAKE_BYTES),
                    model,
                    tokenizer,
                });
            }
            Control::Base { values } => self.usual.start_from(values),
            Control::Rule(rule) => match self.config.aggregation.filter(|own| *own != rule.aggregation()) {
                Some(own) => {
                    let detail = format!(
                        "the run aggregates by `{}`, and the federated server was started with --aggregate {own}: start one of \
                         them otherwise",
                        rule.aggregation()
                    );
                    self.expel(Guest::Control, StopReason::Unexpected, detail, now);
                }
                None => self.rule = Some(rule),
            },
            Control::OpenRound {
                round,
                members,
                adapter_len,
                max_examples,
            } => {
                let participant = |member: Member| {
                    let Member {
                        client,
                        base,
                        adapter_len,
                        rank,
                    } = member;
                    let participant = Participant {
                        base,
                        adapter_len,
                        rank,
                        update: None,
                    };
                    (client, participant)
                };
                let opening = OpenRound {
                    round,
                    rule: self.rule.clone(),
                    adapter_len,
                    max_examples,
                    asked: None,
                    opened: now,
                    members: members.into_iter().map(participant).collect(),
                    excluded: Vec::new(),
                };
                match opening.contradiction() {
                    Some(detail) => self.expel(Guest::Control, StopReason::Unexpected, detail, now),
                    None => self.open_round(opening),
                }
            }
            Control::Collect { round, moments, copy } => {
                if let Some(open) = &mut self.open
                    && open.round == round
                    // A repetition after a lost link changes nothing.
                    && open.asked.is_none()
                {
                    match open.copy_fault(&copy) {
                        Some(detail) => self.expel(Guest::Control, StopReason::Unexpected, detail, now),
                        None => {
                            open.asked = Some(Asked { moments, copy });
                            self.take_early(round, now);
                        }
                    }
                }
            }
            Control::Departed { round, client } => {
                if self.open.as_ref().is_some_and(|open| open.round == round) {
                    self.exclude(client, ExclusionReason::Departed);
                }
            }
            Control::CloseRun => {
                // Members that did not hear of the last average may still ask for it.
                self.open = None;
                self.events.push_back(FederatedEvent::RunClosed);
            }
        }
        self.retest(now);
    }

    /// The next thing to do with a socket.
    pub fn poll_transmit(&mut self) -> Option<Transmit<ConnectionId>> {
        self.door.poll_transmit()
    }

    /// The next thing for the driver to know.
    pub fn poll_event(&mut self) -> Option<FederatedEvent> {
        self.events.pop_front()
    }

    /// For a main server in the same process; a remote one gets its replies as frames.
    pub fn poll_control(&mut self) -> Option<ControlReply> {
        self.replies.pop_front()
    }

    /// When [`FederatedServerSession::handle_timeout`] is to be called; `None` while nothing is waited for.
    pub fn poll_timeout(&self) -> Option<Duration> {
        earlier(
            self.door.poll_timeout(),
            self.absence_deadlines().map(|(_, deadline)| deadline).min(),
        )
    }

    fn handle_message(&mut self, guest: Guest, message: Message, bytes: u64, now: Duration) {
        match (guest, message) {
            (Guest::Control, Message::Control(control)) => self.handle_control(now, control),
            (Guest::Client(client), Message::AdapterUpdate(update)) => self.handle_update(client, update, bytes, now),
            (_, Message::Leave) => {
                if let Some(connection) = self.connection_of(guest) {
                    self.door.close(connection);
                }
                if let Guest::Client(client) = guest {
                    self.exclude(client, ExclusionReason::Departed);
                }
                self.depart(guest, DepartureReason::Left, now);
            }
            (guest, other) => {
                let expected = match guest {
                    Guest::Client(_) => "AdapterUpdate or Leave",
                    Guest::Control => "Control or Leave",
                };
                let detail = format!("expected {expected}, got {}", other.name());
                self.expel(guest, StopReason::Unexpected, detail, now);
            }
        }
    }

    pub(super) fn reply(&mut self, mut reply: ControlReply) {
        match (&self.config.control, &self.control) {
            (ControlAccess::Local, _) => self.replies.push_back(reply),
            (ControlAccess::Remote { .. }, Some(Controller { connection, version })) => {
                if *version < DEADLINES_SINCE {
                    without_new_words(&mut reply);
                }
                self.door.send(*connection, &Message::ControlReply(reply));
            }
            // The main server repeats its round when it returns, and is answered then.
            (ControlAccess::Remote { .. }, None) => {}
        }
    }
}

/// Says it in the words of a main server before [`DEADLINES_SINCE`].
fn without_new_words(reply: &mut ControlReply) {
    if let ControlReply::RoundClosed(RoundClosed {
        average: Some(mean), ..
    }) = reply
    {
        (mean.exact, mean.errors) = (None, None);
    }
    let exclusions = match reply {
        ControlReply::Excluded { exclusion, .. } => std::slice::from_mut(exclusion),
        ControlReply::RoundClosed(closed) => closed.excluded.as_mut_slice(),
        ControlReply::Received { .. } => return,
    };
    for exclusion in exclusions {
        if matches!(exclusion.reason, ExclusionReason::Late | ExclusionReason::Outlier) {
            exclusion.reason = ExclusionReason::Misbehaved;
        }
    }
}
