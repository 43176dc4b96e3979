//! The federated server's session: the members' adapters of a round in, their average out.
//!
//! One object for the run and all its connections. The main server says over `Control` who is in a round; clients send
//! their adapters here and nowhere else, with the moments of the blocks that are about to leave them, which are averaged
//! alike. Members may have cuts of their own: their adapters are prefixes of the average, and for what the shorter ones lack the
//! main server's copy stands in. A round closes when every member has sent an adapter or is left out, tested again on every change of membership.
//! Tokens, labels and activations never come here.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::admission::{Pass, TicketOffice, check_secret};
use super::codec::MAX_HANDSHAKE_BYTES;
use super::door::{Door, Heard};
use super::frame::adapter_frame_bytes;
use super::link::silence_limit;
use super::message::*;
use super::{ConnectionId, DepartureReason, MAX_FRAME_BYTES, Transmit, display_name, earlier};
use crate::federated::{mean_of_prefixes, weighted_mean};
use crate::terms::ids::{ClientId, RoundKey, RunId};
use crate::terms::moments::Moments;

/// Where the main server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlAccess {
    /// In this process: `handle_control` and `poll_control`.
    Local,
    /// Behind a connection for the service `Control`, let in by the join secret.
    Remote { secret: Option<String> },
}

/// How the federated service is run. What is averaged comes with `Control::OpenRun`.
pub struct FederatedConfig {
    /// What this server speaks: `PROTOCOL_VERSION`.
    pub version: Version,
    pub control: ControlAccess,
    /// More clients than these are refused.
    pub max_clients: u32,
    pub ping_interval: Duration,
}

/// What the driver should know.
#[derive(Clone, Debug, PartialEq)]
pub enum FederatedEvent {
    ClientRefused {
        connection: ConnectionId,
        reason: RefusalReason,
    },
    ClientJoined {
        connection: ConnectionId,
        client: ClientId,
        name: String,
    },
    ClientLeft {
        client: ClientId,
        reason: DepartureReason,
    },
    ControlConnected {
        connection: ConnectionId,
    },
    ControlLost,
    UpdateAccepted {
        client: ClientId,
        round: RoundKey,
        examples: u64,
    },
    ClientExcluded {
        client: ClientId,
        round: RoundKey,
        reason: ExclusionReason,
    },
    RoundClosed {
        round: RoundKey,
        included: Vec<Inclusion>,
        excluded: Vec<Exclusion>,
    },
    RunClosed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    Client(ClientId),
    Control,
}

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

struct Client {
    connection: Option<ConnectionId>,
    /// When its connection was lost.
    absent_since: Duration,
    /// Tickets below this serial are spent.
    next_serial: u64,
}

struct Update {
    examples: u64,
    values: Vec<f32>,
    moments: Option<Moments>,
}

/// What a member of the open round starts from, and what has come of it.
struct Participant {
    base: Digest,
    adapter_len: u64,
    update: Option<Update>,
}

/// What comes with the adapters, and stands in for what some lack.
struct Asked {
    moments: Option<Leaving>,
    copy: Vec<f32>,
}

/// The last round, for members that did not hear of it.
struct Closed {
    told: RoundClosed,
    /// Numbers in the adapters of those who are in the average.
    lengths: BTreeMap<ClientId, usize>,
}

/// A round that adapters may come for.
struct OpenRound {
    round: RoundKey,
    /// Of the average.
    adapter_len: u64,
    max_examples: u64,
    /// Once members have been asked for their adapters.
    asked: Option<Asked>,
    opened: Duration,
    members: BTreeMap<ClientId, Participant>,
    excluded: Vec<Exclusion>,
}

impl OpenRound {
    /// Why the main server cannot mean this round, if it cannot: members' adapters are prefixes of the average.
    fn contradiction(&self) -> Option<String> {
        let longer = |(_, member): &(&ClientId, &Participant)| member.adapter_len > self.adapter_len;
        let (client, member) = self.members.iter().find(longer)?;
        Some(format!(
            "{client} has an adapter of {} values, longer than the average of {}",
            member.adapter_len, self.adapter_len
        ))
    }

    /// Why the main server's copy cannot be meant, if it cannot: it fills up every member's adapter, and is finite.
    fn copy_fault(&self, copy: &[f32]) -> Option<String> {
        let shortest = (self.members.values().map(|member| member.adapter_len).min()).unwrap_or(self.adapter_len);
        let (len, whole) = (copy.len() as u64, self.adapter_len);
        if len > whole || whole - len > shortest {
            Some(format!(
                "a copy of {len} values, where an average of {whole} is made of adapters of {shortest} and more"
            ))
        } else {
            let position = copy.iter().position(|value| !value.is_finite())?;
            Some(format!("value {position} of the copy is not finite"))
        }
    }

    /// Why an update cannot be used, if it cannot.
    fn fault(
        &self,
        member: &Participant,
        update: &AdapterUpdate,
        asked: Option<Leaving>,
    ) -> Option<(ExclusionReason, String)> {
        let (values, moments) = (&update.values, &update.moments);
        let length = |len: u64| usize::try_from(len).unwrap_or(usize::MAX);
        if update.base != member.base {
            let detail = format!("an adapter that started from {}, not {}", update.base, member.base);
            Some((ExclusionReason::WrongBase, detail))
        } else if values.len() != length(member.adapter_len) {
            let detail = format!("an adapter of {} values, not {}", values.len(), member.adapter_len);
            Some((ExclusionReason::WrongLength, detail))
        } else if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            let detail = format!("value {position} of the adapter is not finite");
            Some((ExclusionReason::NotFinite, detail))
        } else if !match (moments, asked) {
            (Some(moments), Some(Leaving { len, steps })) => moments.are_of(length(len), steps),
            (moments, asked) => moments.is_some() == asked.is_some(),
        } {
            let detail = "moments other than those asked for".to_owned();
            Some((ExclusionReason::WrongLength, detail))
        } else if moments.as_ref().is_some_and(|moments| !moments.are_possible()) {
            let detail = "a moment that is not finite, or a second one below zero".to_owned();
            Some((ExclusionReason::NotFinite, detail))
        } else if !(1..=self.max_examples).contains(&update.examples) {
            let detail = format!(
                "{} examples in a round of at most {}",
                update.examples, self.max_examples
            );
            Some((ExclusionReason::Examples, detail))
        } else {
            None
        }
    }
}

/// What `part` takes from each update, weighted by examples.
fn weighted(updates: &[(ClientId, Update)], part: impl Fn(&Update) -> Option<&Vec<f32>>) -> Option<Vec<(u64, &[f32])>> {
    (updates.iter())
        .map(|(_, update)| Some((update.examples, part(update)?.as_slice())))
        .collect()
}

/// The federated server's state machine.
pub struct FederatedServerSession {
    config: FederatedConfig,
    door: Door<Guest>,
    run: Option<Run>,
    control: Option<ConnectionId>,
    clients: BTreeMap<ClientId, Client>,
    open: Option<OpenRound>,
    /// Kept until the next round closes, for members that did not hear of it.
    last: Option<Closed>,
    /// Adapters, with the bytes of their frames, that the main server, whose word travels another way, has not asked for yet:
    /// one a client at most.
    early: BTreeMap<ClientId, (AdapterUpdate, u64)>,
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
            replies: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The largest frame anybody may send: what a socket need not read past.
    pub fn max_frame_bytes(&self) -> usize {
        self.run.as_ref().map_or(MAX_FRAME_BYTES, |run| run.frame_limit)
    }

    /// Clients connected now.
    pub fn connected_clients(&self) -> usize {
        self.clients
            .values()
            .filter(|client| client.connection.is_some())
            .count()
    }

    pub fn connected(&mut self, connection: ConnectionId, now: Duration) {
        self.door.open(connection, now);
    }

    pub fn disconnected(&mut self, connection: ConnectionId, now: Duration) {
        if let Some(guest) = self.door.remove(connection) {
            self.depart(guest, DepartureReason::Disconnected, now);
        }
        self.retest();
    }

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
        self.retest();
    }

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
        self.retest();
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
                    } = member;
                    let participant = Participant {
                        base,
                        adapter_len,
                        update: None,
                    };
                    (client, participant)
                };
                let opening = OpenRound {
                    round,
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
        self.retest();
    }

    pub fn poll_transmit(&mut self) -> Option<Transmit<ConnectionId>> {
        self.door.poll_transmit()
    }

    pub fn poll_event(&mut self) -> Option<FederatedEvent> {
        self.events.pop_front()
    }

    /// For a main server in the same process; a remote one gets its replies as frames.
    pub fn poll_control(&mut self) -> Option<ControlReply> {
        self.replies.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Duration> {
        earlier(
            self.door.poll_timeout(),
            self.absence_deadlines().map(|(_, deadline)| deadline).min(),
        )
    }

    // Coming in.

    fn greet(&mut self, connection: ConnectionId, now: Duration, hello: &Hello) -> Result<(), (RefusalReason, String)> {
        match hello.service {
            Service::Federated => self.greet_client(connection, now, hello),
            Service::Control => self.greet_control(connection, now, hello),
            Service::Main => Err((RefusalReason::Service, "this is the federated service".to_owned())),
        }
    }

    fn greet_client(
        &mut self,
        connection: ConnectionId,
        now: Duration,
        hello: &Hello,
    ) -> Result<(), (RefusalReason, String)> {
        let plain = |reason: RefusalReason| (reason, reason.to_string());
        let Some(run) = &self.run else {
            return Err(plain(RefusalReason::NoRun));
        };
        let Credential::Ticket(ticket) = &hello.credential else {
            return Err((
                RefusalReason::TicketForged,
                "the federated service needs a ticket".to_owned(),
            ));
        };
        let pass = run
            .office
            .check(Service::Federated, ticket, run.clock(now))
            .map_err(plain)?;
        let known = self.clients.get(&pass.client);
        if known.is_some_and(|client| pass.serial < client.next_serial) {
            return Err(plain(RefusalReason::TicketSpent));
        }
        let replaced = known.and_then(|client| client.connection);
        if replaced.is_none() && self.connected_clients() >= self.config.max_clients as usize {
            return Err(plain(RefusalReason::Full));
        }
        let next = Pass {
            client: pass.client,
            serial: pass.serial + 1,
        };
        let welcome = Welcome {
            version: hello.version.min(self.config.version),
            client: pass.client,
            run: run.office.run,
            ticket: run.office.issue(Service::Federated, next, run.clock(now)),
            federated_ticket: None,
            federated_url: None,
            ping_interval: self.config.ping_interval,
            model: run.model,
            tokenizer: run.tokenizer,
        };
        let limit = run.frame_limit;
        if let Some(old) = replaced {
            let detail = "this client opened another connection".to_owned();
            self.door.stop(
                old,
                Stop {
                    reason: StopReason::Superseded,
                    detail,
                    return_after: None,
                },
            );
            self.depart(Guest::Client(pass.client), DepartureReason::Superseded, now);
        }
        let client = Client {
            connection: Some(connection),
            absent_since: now,
            next_serial: pass.serial,
        };
        self.clients.insert(pass.client, client);
        self.door
            .welcome(connection, Guest::Client(pass.client), welcome, now, limit);
        let name = display_name(&hello.name);
        self.events.push_back(FederatedEvent::ClientJoined {
            connection,
            client: pass.client,
            name,
        });
        Ok(())
    }

    fn greet_control(
        &mut self,
        connection: ConnectionId,
        now: Duration,
        hello: &Hello,
    ) -> Result<(), (RefusalReason, String)> {
        let ControlAccess::Remote { secret } = &self.config.control else {
            return Err((
                RefusalReason::Service,
                "the main server of this run is not remote".to_owned(),
            ));
        };
        check_secret(secret.as_deref(), &hello.credential).map_err(|reason| (reason, reason.to_string()))?;
        // Of two links to a main server the newer is the live one.
        if let Some(old) = self.control.take() {
            self.door.close(old);
        }
        let unknown = Digest([0; 32]);
        let welcome = Welcome {
            version: hello.version.min(self.config.version),
            client: ClientId(0),
            run: self.run.as_ref().map_or(RunId([0; 16]), |run| run.office.run),
            ticket: Ticket(Vec::new()),
            federated_ticket: None,
            federated_url: None,
            ping_interval: self.config.ping_interval,
            model: self.run.as_ref().map_or(unknown, |run| run.model),
            tokenizer: self.run.as_ref().map_or(unknown, |run| run.tokenizer),
        };
        self.control = Some(connection);
        self.door
            .welcome(connection, Guest::Control, welcome, now, MAX_FRAME_BYTES);
        self.events.push_back(FederatedEvent::ControlConnected { connection });
        Ok(())
    }

    // Going out.

    fn depart(&mut self, guest: Guest, reason: DepartureReason, now: Duration) {
        match guest {
            Guest::Client(id) => {
                let Some(client) = self.clients.get_mut(&id) else {
                    return;
                };
                if client.connection.take().is_some() {
                    // A member may return with its ticket until its absence is too long.
                    client.absent_since = now;
                    self.early.remove(&id);
                    self.events.push_back(FederatedEvent::ClientLeft { client: id, reason });
                }
            }
            Guest::Control => {
                self.control = None;
                self.events.push_back(FederatedEvent::ControlLost);
            }
        }
    }

    fn connection_of(&self, guest: Guest) -> Option<ConnectionId> {
        match guest {
            Guest::Client(client) => self.clients.get(&client)?.connection,
            Guest::Control => self.control,
        }
    }

    fn expel(&mut self, guest: Guest, reason: StopReason, detail: String, now: Duration) {
        if let Some(connection) = self.connection_of(guest) {
            self.door.stop(
                connection,
                Stop {
                    reason,
                    detail: detail.clone(),
                    return_after: None,
                },
            );
        }
        if let Guest::Client(client) = guest {
            self.exclude(client, ExclusionReason::Misbehaved);
        }
        self.depart(guest, DepartureReason::Misbehaved(detail), now);
    }

    /// Leaves a member out of the open round; what it has sent is dropped.
    fn exclude(&mut self, client: ClientId, reason: ExclusionReason) {
        let Some(open) = &mut self.open else { return };
        if open.members.remove(&client).is_none() {
            return;
        }
        let exclusion = Exclusion { client, reason };
        open.excluded.push(exclusion.clone());
        let round = open.round;
        self.events
            .push_back(FederatedEvent::ClientExcluded { client, round, reason });
        if reason != ExclusionReason::Departed {
            self.reply(ControlReply::Excluded { round, exclusion });
        }
    }

    // The rounds.

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

    fn handle_update(&mut self, client: ClientId, update: AdapterUpdate, bytes: u64, now: Duration) {
        let Some(run) = &self.run else {
            return self.decline(client, update.round, "no run is open");
        };
        if update.run != run.office.run {
            let detail = format!("an adapter of run {}, not {}", update.run, run.office.run);
            return self.refuse_update(client, ExclusionReason::Misbehaved, detail, now);
        }
        let round = update.round;
        let Some(open) = self
            .open
            .as_mut()
            .filter(|open| open.round == round && open.members.contains_key(&client))
        else {
            return match &self.last {
                Some(last) if last.told.round == round && last.lengths.contains_key(&client) => {
                    // It did not hear of the average.
                    self.send_average(&[client]);
                }
                _ if self.is_ahead(round) => {
                    self.early.insert(client, (update, bytes));
                }
                _ => self.decline(client, round, "not a member of an open round"),
            };
        };
        let (Some(asked), Some(member)) = (&open.asked, open.members.get(&client)) else {
            self.early.insert(client, (update, bytes));
            return;
        };
        if let Some((reason, detail)) = open.fault(member, &update, asked.moments) {
            return self.refuse_update(client, reason, detail, now);
        }
        // A repetition after a reconnection changes nothing.
        if let Some(Participant {
            update: slot @ None, ..
        }) = open.members.get_mut(&client)
        {
            let AdapterUpdate {
                examples,
                values,
                moments,
                ..
            } = update;
            *slot = Some(Update {
                examples,
                values,
                moments,
            });
            self.events.push_back(FederatedEvent::UpdateAccepted {
                client,
                round,
                examples,
            });
            self.reply(ControlReply::Received { round, client, bytes });
        }
    }

    /// Whether the main server may still open this round.
    fn is_ahead(&self, round: RoundKey) -> bool {
        let open = self.open.as_ref().map(|open| open.round);
        let last = self.last.as_ref().map(|last| last.told.round);
        open.max(last).is_none_or(|known| known < round)
    }

    fn refuse_update(&mut self, client: ClientId, reason: ExclusionReason, detail: String, now: Duration) {
        self.exclude(client, reason);
        self.expel(Guest::Client(client), StopReason::BadUpdate, detail, now);
    }

    fn decline(&mut self, client: ClientId, round: RoundKey, detail: &str) {
        let open = self.open.as_ref().map(|open| open.round);
        let declined = UpdateDeclined {
            round,
            open,
            detail: detail.to_owned(),
        };
        if let Some(connection) = self.connection_of(Guest::Client(client)) {
            self.door.send(connection, &Message::UpdateDeclined(declined));
        }
    }

    fn open_round(&mut self, opening: OpenRound) {
        if self.run.is_none() {
            return;
        }
        let round = opening.round;
        if let Some(last) = &self.last
            && last.told.round == round
        {
            // The main server did not hear of it.
            return self.reply(ControlReply::RoundClosed(last.told.clone()));
        }
        match &self.open {
            Some(open) if open.round == round => {
                // Repeated after a lost link: words in either direction may have been lost with it.
                let left: Vec<ClientId> = open
                    .members
                    .keys()
                    .filter(|client| !opening.members.contains_key(client))
                    .copied()
                    .collect();
                let unheard: Vec<Exclusion> = open
                    .excluded
                    .iter()
                    .filter(|exclusion| opening.members.contains_key(&exclusion.client))
                    .cloned()
                    .collect();
                for client in left {
                    self.exclude(client, ExclusionReason::Departed);
                }
                for exclusion in unheard {
                    self.reply(ControlReply::Excluded { round, exclusion });
                }
            }
            _ => self.open = Some(opening),
        }
    }

    /// Takes in what came of this round, or of one before it, sooner than it was asked for.
    fn take_early(&mut self, round: RoundKey, now: Duration) {
        let (due, early) = std::mem::take(&mut self.early)
            .into_iter()
            .partition(|(_, (update, _))| update.round <= round);
        self.early = early;
        for (client, (update, bytes)) in due {
            self.handle_update(client, update, bytes, now);
        }
    }

    /// Closes the round when every member has sent its adapter. Called after every change, of membership above all.
    fn retest(&mut self) {
        let complete = |open: &mut OpenRound| open.members.values().all(|member| member.update.is_some());
        let Some(open) = self.open.take_if(complete) else {
            return;
        };
        let updates: Vec<(ClientId, Update)> = open
            .members
            .into_iter()
            .filter_map(|(client, member)| Some((client, member.update?)))
            .collect();
        let (leaving, copy) = (open.asked).map_or((None, Vec::new()), |asked| (asked.moments, asked.copy));
        let moments = |part: fn(&Moments) -> &Vec<f32>| {
            weighted_mean(&weighted(&updates, |update| update.moments.as_ref().map(part))?).ok()
        };
        let whole = usize::try_from(open.adapter_len).unwrap_or(usize::MAX);
        // All was checked on arrival, so the only error left is that there is no update.
        let values = weighted(&updates, |update| Some(&update.values))
            .and_then(|weighted| mean_of_prefixes(&weighted, whole, &copy).ok());
        let average = values.map(|values| Mean {
            digest: Digest::of_values(&values),
            values,
            moments: leaving.and_then(|Leaving { steps, .. }| {
                Some(Moments {
                    steps,
                    first: moments(|moments| &moments.first)?,
                    second: moments(|moments| &moments.second)?,
                })
            }),
        });
        let included: Vec<Inclusion> = updates
            .iter()
            .map(|(client, update)| Inclusion {
                client: *client,
                examples: update.examples,
            })
            .collect();
        let closed = RoundClosed {
            round: open.round,
            included,
            excluded: open.excluded,
            average,
        };
        self.events.push_back(FederatedEvent::RoundClosed {
            round: closed.round,
            included: closed.included.clone(),
            excluded: closed.excluded.clone(),
        });
        let lengths: BTreeMap<ClientId, usize> = (updates.iter())
            .map(|(client, update)| (*client, update.values.len()))
            .collect();
        let members: Vec<ClientId> = lengths.keys().copied().collect();
        self.reply(ControlReply::RoundClosed(closed.clone()));
        self.last = Some(Closed { told: closed, lengths });
        self.send_average(&members);
    }

    fn send_average(&mut self, clients: &[ClientId]) {
        let Some(Closed {
            told:
                RoundClosed {
                    round,
                    average: Some(Mean { digest, values, .. }),
                    ..
                },
            lengths,
        }) = &self.last
        else {
            return;
        };
        let mut averages: BTreeMap<usize, Message> = BTreeMap::new();
        for client in clients {
            let (Some(connection), Some(length)) = (self.connection_of(Guest::Client(*client)), lengths.get(client))
            else {
                continue;
            };
            let own = values.get(..*length).unwrap_or(values);
            let average = averages.entry(own.len()).or_insert_with(|| {
                let digest = match own.len() == values.len() {
                    true => *digest,
                    false => Digest::of_values(own),
                };
                Message::Average(Average {
                    round: *round,
                    digest,
                    values: own.to_vec(),
                })
            });
            self.door.send(connection, average);
        }
    }

    /// Forgets a run and its clients for another.
    fn drop_run(&mut self) {
        self.open = None;
        self.last = None;
        self.early.clear();
        for connection in std::mem::take(&mut self.clients)
            .into_values()
            .filter_map(|client| client.connection)
        {
            let detail = "the server opened another run".to_owned();
            self.door.stop(
                connection,
                Stop {
                    reason: StopReason::Shutdown,
                    detail,
                    return_after: None,
                },
            );
        }
    }

    fn reply(&mut self, reply: ControlReply) {
        match (&self.config.control, self.control) {
            (ControlAccess::Local, _) => self.replies.push_back(reply),
            (ControlAccess::Remote { .. }, Some(connection)) => {
                self.door.send(connection, &Message::ControlReply(reply));
            }
            // The main server repeats its round when it returns, and is answered then.
            (ControlAccess::Remote { .. }, None) => {}
        }
    }

    /// Members without a connection, and when that has lasted too long.
    fn absence_deadlines(&self) -> impl Iterator<Item = (ClientId, Duration)> {
        let limit = silence_limit(self.config.ping_interval);
        self.open.iter().flat_map(move |open| {
            open.members.keys().filter_map(move |id| {
                let absent_since = match self.clients.get(id) {
                    Some(Client {
                        connection: Some(_), ..
                    }) => return None,
                    Some(client) => client.absent_since.max(open.opened),
                    None => open.opened,
                };
                Some((*id, absent_since + limit))
            })
        })
    }
}
