//! Coming in and going out: greetings and tickets at one end, departures and exclusions at the other.
//!
//! Separate from `roster`, which knows who is in the run: this says it to the client, the driver and the federated server.

use std::time::Duration;

use super::super::ConnectionId;
use super::super::admission::{Admission, Pass, check_secret};
use super::super::message::{
    AGGREGATION_SINCE, ALPHAS_SINCE, Control, Credential, Digest, Exclusion, ExclusionReason, Hello, Message,
    RefusalReason, Service, Stop, StopReason, Welcome,
};
use super::MainServerSession;
use super::event::{DepartureReason, MainEvent};
use super::lateness::MISSES;
use super::round::Phase;
use super::step::Awaited;
use crate::terms::adapter::Trained;
use crate::terms::ids::ClientId;
use crate::terms::moments::MomentPolicy;

impl MainServerSession {
    pub(super) fn greet(&mut self, connection: ConnectionId, now: Duration, hello: &Hello) {
        match self.admit(hello, now) {
            Ok(admission) => self.welcome(connection, now, hello, admission),
            Err((reason, detail)) => {
                self.door.refuse(connection, reason, detail);
                self.events.push_back(MainEvent::ClientRefused { connection, reason });
            }
        }
    }

    fn admit(&self, hello: &Hello, now: Duration) -> Result<Admission, (RefusalReason, String)> {
        let plain = |reason: RefusalReason| (reason, reason.to_string());
        if hello.service != Service::Main {
            let detail = format!("this is the main service; {} connections go elsewhere", hello.service);
            return Err((RefusalReason::Service, detail));
        }
        let admission = match &hello.credential {
            Credential::Ticket(ticket) => {
                let pass = self.office.check(Service::Main, ticket, now).map_err(plain)?;
                if self.roster.is_banned(pass.client) {
                    return Err(plain(RefusalReason::Expelled));
                }
                if !self.roster.knows(pass) {
                    return Err(plain(RefusalReason::TicketSpent));
                }
                Admission::Known(pass)
            }
            credential => {
                check_secret(self.config.secret.as_deref(), credential).map_err(plain)?;
                Admission::New
            }
        };
        let has_missed_the_end = self.is_returning && matches!(admission, Admission::Known(_));
        if matches!(self.phase, Phase::Finished { .. }) && !has_missed_the_end {
            return Err((RefusalReason::NoRun, "the run is over".to_owned()));
        }
        let differs = |theirs: Option<Digest>, ours: Digest| theirs.is_some_and(|theirs| theirs != ours);
        if differs(hello.model, self.config.model) {
            return Err((
                RefusalReason::Model,
                format!("this run trains the model {}", self.config.model),
            ));
        }
        if differs(hello.tokenizer, self.config.tokenizer) {
            return Err((
                RefusalReason::Tokenizer,
                format!("this run's tokenizer is {}", self.config.tokenizer),
            ));
        }
        let wire = self.config().wire;
        if !hello.capabilities.forms.contains(&wire) {
            return Err((RefusalReason::WireForm, format!("this run's wire form is {wire}")));
        }
        if !self.placement.assignment.alphas.is_empty() && hello.version < ALPHAS_SINCE {
            let detail = format!("this run's adapter has alphas of its own, which need protocol {ALPHAS_SINCE}");
            return Err((RefusalReason::Version, detail));
        }
        let assignment = &self.placement.assignment;
        if hello.version < AGGREGATION_SINCE
            && (assignment.trained != Trained::Both || assignment.config.moments != MomentPolicy::Keep)
        {
            let detail = format!("how this run aggregates adapters needs protocol {AGGREGATION_SINCE}");
            return Err((RefusalReason::Version, detail));
        }
        let replaces = match admission {
            Admission::Known(pass) => self.roster.connection(pass.client).is_some(),
            Admission::New => false,
        };
        if !replaces && self.roster.connected().count() >= self.config.max_clients as usize {
            return Err(plain(RefusalReason::Full));
        }
        Ok(admission)
    }

    fn welcome(&mut self, connection: ConnectionId, now: Duration, hello: &Hello, admission: Admission) {
        let entry = self.roster.identify(admission);
        self.reserve();
        let Pass { client: id, serial } = entry;
        if let Some(old) = self.roster.connection(id) {
            self.door.stop(
                old,
                stop(StopReason::Superseded, "this client opened another connection", None),
            );
            self.depart(id, DepartureReason::Superseded);
        }
        let client = self.roster.enter(entry, hello, connection);
        let (name, device) = (client.name().to_owned(), client.device().to_owned());
        let pass = Pass {
            client: id,
            serial: serial + 1,
        };
        // The federated service counts its own serials; those it is handed here are above all it has issued before.
        let federated = Pass {
            client: id,
            serial: (serial + 1) << 32,
        };
        let welcome = Welcome {
            version: hello.version.min(self.config.version),
            client: id,
            run: self.config.run,
            ticket: self.office.issue(Service::Main, pass, now),
            federated_ticket: Some(self.office.issue(Service::Federated, federated, now)),
            federated_url: self.config.federated_url.clone(),
            ping_interval: self.config.ping_interval,
            model: self.config.model,
            tokenizer: self.config.tokenizer,
        };
        self.door.welcome(connection, id, welcome, now, self.frame_limit);
        if matches!(self.phase, Phase::Finished { .. }) {
            self.roster.expect_no_more(id);
            let stop = stop(StopReason::Completed, "all rounds are done", None);
            self.door.send(connection, &Message::Stop(stop));
            self.events.push_back(MainEvent::ClientJoined {
                connection,
                client: id,
                name,
                device,
            });
            return;
        }
        self.door.send(
            connection,
            &Message::Assignment(Box::new(self.placement.assignment_of(id))),
        );
        self.events.push_back(MainEvent::ClientJoined {
            connection,
            client: id,
            name,
            device,
        });
        // A newcomer has as long to become ready as the run waits for anybody.
        if let Phase::Waiting { until: Some(until) } = &mut self.phase
            && !self.roster.is_reloading()
        {
            *until = (*until).max(now + self.config.wait_for_client);
            self.events.push_back(MainEvent::Waiting { until: *until });
        }
    }

    // Going out.

    /// Takes a client out of the run. Its connection is gone or about to be.
    pub(super) fn depart(&mut self, id: ClientId, reason: DepartureReason) {
        let Some(name) = self.roster.leave(id) else {
            return;
        };
        self.timing.forget(id);
        if reason == DepartureReason::Left {
            self.roster.let_go(id);
        }
        let round = self.round;
        if self.phase.remove(id, &reason.to_string()) {
            self.controls.push_back(Control::Departed { round, client: id });
        }
        self.events.push_back(MainEvent::ClientLeft {
            client: id,
            name,
            reason,
        });
    }

    /// Ends a client's session, and says why. But for who was only away or late once, its tickets are good for nothing after
    /// that; whoever knows the join secret can come in as somebody new.
    pub(super) fn expel(&mut self, id: ClientId, reason: DepartureReason) {
        if let Some(connection) = self.roster.connection(id) {
            let (wire, return_after) = match &reason {
                DepartureReason::Excluded(ExclusionReason::Absent | ExclusionReason::Late) => {
                    (StopReason::Excluded, Some(Duration::ZERO))
                }
                DepartureReason::Excluded(_) | DepartureReason::Unusable => (StopReason::BadUpdate, None),
                DepartureReason::Late(_) if self.roster.can_be_left_out(id) => (StopReason::Late, None),
                _ => (StopReason::Unexpected, None),
            };
            if wire != StopReason::Excluded {
                self.roster.ban(id);
                self.revision += 1;
            }
            self.door
                .stop(connection, stop(wire, &reason.to_string(), return_after));
            self.depart(id, reason);
        }
    }

    /// A member was waited for in vain; `left_out` is whether that was the last wait for this.
    pub(super) fn was_late(&mut self, id: ClientId, awaited: Awaited, left_out: bool) {
        if self.roster.was_late(id, awaited) >= MISSES {
            self.expel(id, DepartureReason::Late(awaited.name()));
        } else if left_out && !self.roster.can_be_left_out(id) {
            self.expel(id, DepartureReason::Excluded(ExclusionReason::Late));
        }
    }

    pub(super) fn exclude(&mut self, exclusion: &Exclusion) {
        // Nobody is excluded for departing who has not: the word came from here.
        if exclusion.reason != ExclusionReason::Departed && self.phase.members().contains(&exclusion.client) {
            self.expel(exclusion.client, DepartureReason::Excluded(exclusion.reason));
        }
    }
}

pub(super) fn stop(reason: StopReason, detail: &str, return_after: Option<Duration>) -> Stop {
    Stop {
        reason,
        detail: detail.to_owned(),
        return_after,
    }
}
