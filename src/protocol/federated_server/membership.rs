//! Coming in and going out: tickets at one end, departures, exclusions and long absences at the other.
//!
//! Separate from the rounds, which only ask who is left.

use std::time::Duration;

use super::super::admission::{Pass, check_secret};
use super::super::link::silence_limit;
use super::super::message::*;
use super::super::{ConnectionId, DepartureReason, MAX_FRAME_BYTES, display_name};
use super::FederatedServerSession;
use super::event::{ControlAccess, FederatedEvent};
use super::outlier::Usual;
use crate::terms::ids::{ClientId, RunId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    Client(ClientId),
    Control,
}

/// A main server elsewhere.
pub(super) struct Controller {
    pub connection: ConnectionId,
    /// What it speaks.
    pub version: Version,
}

pub(super) struct Client {
    pub connection: Option<ConnectionId>,
    /// When its connection was lost.
    pub absent_since: Duration,
    /// Tickets below this serial are spent.
    pub next_serial: u64,
    /// Its tickets are good for nothing any more.
    pub banned: bool,
}

impl FederatedServerSession {
    // Coming in.

    pub(super) fn greet(
        &mut self,
        connection: ConnectionId,
        now: Duration,
        hello: &Hello,
    ) -> Result<(), (RefusalReason, String)> {
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
        if known.is_some_and(|client| client.banned) {
            return Err(plain(RefusalReason::Expelled));
        }
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
            banned: false,
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
            self.door.close(old.connection);
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
        self.control = Some(Controller {
            connection,
            version: hello.version,
        });
        self.door
            .welcome(connection, Guest::Control, welcome, now, MAX_FRAME_BYTES);
        self.events.push_back(FederatedEvent::ControlConnected { connection });
        Ok(())
    }

    // Going out.

    pub(super) fn depart(&mut self, guest: Guest, reason: DepartureReason, now: Duration) {
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

    pub(super) fn connection_of(&self, guest: Guest) -> Option<ConnectionId> {
        match guest {
            Guest::Client(client) => self.clients.get(&client)?.connection,
            Guest::Control => Some(self.control.as_ref()?.connection),
        }
    }

    /// Ends a session for good: a client's tickets are good for nothing after that.
    pub(super) fn expel(&mut self, guest: Guest, reason: StopReason, detail: String, now: Duration) {
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
            if let Some(client) = self.clients.get_mut(&client) {
                client.banned = true;
            }
            self.exclude(client, ExclusionReason::Misbehaved);
        }
        self.depart(guest, DepartureReason::Misbehaved(detail), now);
    }

    /// Leaves a member out of the open round; what it has sent is dropped.
    pub(super) fn exclude(&mut self, client: ClientId, reason: ExclusionReason) {
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

    /// Forgets a run and its clients for another.
    pub(super) fn drop_run(&mut self) {
        self.open = None;
        self.last = None;
        self.early.clear();
        self.usual = Usual::default();
        self.rule = None;
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

    /// Members without a connection, and when that has lasted too long.
    pub(super) fn absence_deadlines(&self) -> impl Iterator<Item = (ClientId, Duration)> {
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
