//! The client's two connections, and what it takes to have both.
//!
//! Separate because the way back to a server is the same whatever the client was computing.

use std::collections::VecDeque;
use std::time::Duration;

use super::super::dial::{Dialer, Patience, Retry};
use super::super::message::{LinkRates, Message, Ready, RefusalReason, Refused, Ticket, Welcome};
use super::super::{Endpoint, Transmit, earlier};
use super::ClientSession;
use super::event::{ClientConfig, ClientEvent, ClientFailure, FinishReason, Passport};
use super::round::Work;

pub(super) struct Identity {
    pub passport: Passport,
    pub federated_ticket: Ticket,
    pub federated_url: Option<String>,
    pub ping_interval: Duration,
}

/// The two connections, to be opened, open or lost.
pub(super) struct Connections {
    main: Dialer,
    federated: Dialer,
    /// Of sockets that are being closed.
    closes: VecDeque<Transmit<Endpoint>>,
}

impl Connections {
    pub fn new(config: &ClientConfig) -> Connections {
        Connections {
            main: Dialer::new(config.version, Patience::For(config.give_up), config.seed),
            federated: Dialer::new(config.version, Patience::For(config.give_up), !config.seed),
            closes: VecDeque::new(),
        }
    }

    pub fn dialer(&mut self, endpoint: Endpoint) -> &mut Dialer {
        match endpoint {
            Endpoint::Main => &mut self.main,
            Endpoint::Federated => &mut self.federated,
        }
    }

    /// Whether both servers have let this client in.
    pub(crate) fn are_up(&self) -> bool {
        self.main.is_up() && self.federated.is_up()
    }

    /// Both have led to something: failures are counted anew.
    pub(crate) fn succeeded(&mut self) {
        self.main.succeeded();
        self.federated.succeeded();
    }

    pub fn send(&mut self, endpoint: Endpoint, message: &Message) {
        if let Some(link) = self.dialer(endpoint).link() {
            link.send(message);
        }
    }

    /// Sends what takes its time on the emulated uplink.
    pub(crate) fn send_paced(&mut self, endpoint: Endpoint, now: Duration, message: &Message) {
        if let Some(link) = self.dialer(endpoint).link() {
            link.send_paced(now, message);
        }
    }

    /// Brings both uplinks to these rates.
    pub(crate) fn set_rates(&mut self, rates: Option<LinkRates>) {
        if let Some(link) = self.main.link() {
            link.set_rate(rates.map(|rates| rates.main_bits_per_s));
        }
        if let Some(link) = self.federated.link() {
            link.set_rate(rates.map(|rates| rates.federated_bits_per_s));
        }
    }

    /// Takes frames of so many bytes from both servers.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        for endpoint in [Endpoint::Main, Endpoint::Federated] {
            if let Some(link) = self.dialer(endpoint).link() {
                link.set_limit(limit);
            }
        }
    }

    /// Closes a connection, after what is still to be sent.
    pub(crate) fn hang_up(&mut self, endpoint: Endpoint) {
        // What is still to be sent goes before the close.
        self.dialer(endpoint).flush();
        while let Some(bytes) = self.dialer(endpoint).poll_frame() {
            self.closes.push_back(Transmit::Frame { to: endpoint, bytes });
        }
        if self.dialer(endpoint).hang_up() {
            self.closes.push_back(Transmit::Close { to: endpoint });
        }
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

    pub fn poll_timeout(&self) -> Option<Duration> {
        earlier(self.main.poll_timeout(), self.federated.poll_timeout())
    }
}

impl ClientSession {
    /// A connection is gone. Losing the main server is leaving the round.
    pub(super) fn lose(&mut self, endpoint: Endpoint, now: Duration) {
        if self.over {
            return;
        }
        self.connections.hang_up(endpoint);
        if self.ending.is_some() {
            // The run is complete. Only the last average is missing, and only the federated server has it.
            if endpoint == Endpoint::Main {
                return;
            }
        } else if endpoint == Endpoint::Main {
            self.leave_round();
        }
        match self.connections.dialer(endpoint).retry(now) {
            Some(retry) => self.lost(endpoint, now, retry),
            None if self.ending.is_some() => self.finish(FinishReason::Completed),
            None => self.fail(ClientFailure::Unreachable { endpoint }),
        }
    }

    fn lost(&mut self, endpoint: Endpoint, now: Duration, retry: Retry) {
        self.events.push_back(ClientEvent::ConnectionLost {
            endpoint,
            at: now,
            retry_at: retry.at,
            since: retry.since,
        });
    }

    /// A server goes away and is back after so long.
    pub(super) fn await_return(&mut self, endpoint: Endpoint, now: Duration, detail: String, after: Duration) {
        // Nobody is waited for longer than one who says nothing.
        let until = now + after.min(self.config.give_up);
        self.connections.hang_up(endpoint);
        if endpoint == Endpoint::Main {
            self.connections.hang_up(Endpoint::Federated);
            self.leave_round();
        }
        self.connections.dialer(endpoint).start(until);
        self.events
            .push_back(ClientEvent::ServerAway { detail, at: now, until });
    }

    pub(super) fn handle_welcome(&mut self, endpoint: Endpoint, now: Duration, welcome: Welcome) {
        self.connections.set_rates(self.rates);
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
                    passport: Passport {
                        run: welcome.run,
                        client: welcome.client,
                        ticket: welcome.ticket,
                    },
                    federated_ticket,
                    federated_url: welcome.federated_url,
                    ping_interval: welcome.ping_interval,
                });
                if !same || !self.connections.dialer(Endpoint::Federated).has_socket() {
                    self.connections.hang_up(Endpoint::Federated);
                    self.connections.dialer(Endpoint::Federated).start(now);
                    self.handle_timeout(now);
                }
            }
            Endpoint::Federated => {
                if let Some(identity) = &mut self.identity {
                    identity.federated_ticket = welcome.ticket;
                }
                if let Work::AwaitAverage(update) | Work::AwaitBase { update, .. } = &self.work {
                    let message = Message::AdapterUpdate(update.clone());
                    self.connections.send_paced(Endpoint::Federated, now, &message);
                }
                self.announce(now);
            }
        }
    }

    pub(super) fn handle_refusal(&mut self, endpoint: Endpoint, now: Duration, refused: Refused) {
        self.connections.hang_up(endpoint);
        let by_ticket = endpoint == Endpoint::Federated || self.came_by_ticket;
        let retry = match refused.reason {
            reason if by_ticket && reason.is_authorisation_failure() => {
                // Both connections begin again, with the secret.
                self.identity = None;
                self.config.passport = None;
                self.connections.hang_up(Endpoint::Main);
                self.connections.hang_up(Endpoint::Federated);
                self.leave_round();
                self.connections.dialer(Endpoint::Main).retry(now)
            }
            // The run ended while this client was away from it.
            RefusalReason::NoRun if by_ticket && endpoint == Endpoint::Main => {
                let detail = refused.detail;
                return self.finish(FinishReason::Stopped { detail });
            }
            // Others have taken the place of one who was away; some of them will leave.
            RefusalReason::Full if by_ticket => self.connections.dialer(endpoint).retry(now),
            // The federated server may not have heard of the run yet.
            RefusalReason::NoRun if endpoint == Endpoint::Federated => {
                self.connections.dialer(Endpoint::Federated).retry(now)
            }
            _ => None,
        };
        match retry {
            Some(retry) => self.lost(endpoint, now, retry),
            None if self.ending.is_some() => self.finish(FinishReason::Completed),
            None => self.fail(ClientFailure::Refused { endpoint, refused }),
        }
    }

    /// Tells the main server that this client can take part, when it can: weights loaded, both services connected.
    pub(super) fn announce(&mut self, _now: Duration) {
        if let Some(assigned) = &mut self.assigned
            && self.connections.are_up()
            && assigned.current
            && assigned.loaded
            && !assigned.told
        {
            assigned.told = true;
            self.connections.succeeded();
            let ready = Ready {
                assignment: assigned.assignment.number,
                speed: self.speed,
            };
            self.connections.send(Endpoint::Main, &Message::Ready(ready));
        }
    }
}
