//! The main server's session: who is in the run, and the rounds and steps they take together.
//!
//! One object for the run and all its connections. It decides when a round starts, hands each member's activations to the driver
//! as they come, sends the gradient back as soon as that has it, closes the step, and after the last local step waits for the
//! federated server's average. It sees activations and targets, never one client's adapter.
//!
//! Who holds which blocks is a `Placement`: the run begins with one, and may be given another at any boundary. At a boundary
//! the driver is asked what is to hold for the next round (`PlanWanted`) before clients are asked for their adapters, so that
//! they know which moments go with them. A round starts when everybody who was there has loaded the latest assignment.
//!
//! Clients may have cuts of their own, from before the first round to the end of the run. The main server then holds the blocks
//! from the smallest cut on, and its copy of those up to the largest is averaged with the clients' (`CopyWanted`).
//!
//! Membership is frozen when a round starts and can only shrink within it; a client that joins meanwhile waits for the
//! next boundary. Every change of membership goes through `retest`, so no step waits for somebody who has left. Nor does one
//! wait for ever for somebody who is there: at the deadline it closes with whom it has, and who was waited for in vain three times
//! running is dropped.
//!
//! A round that comes to nothing that can be used is rejected: it starts again from what it started from. After three in a row
//! the run ends as diverged.
//!
//! | file | holds |
//! |---|---|
//! | `config`, `placement` | what a run is, who holds which blocks |
//! | `event`, `status` | what the driver is told, and what people see |
//! | `roster`, `membership` | who is in the run; how they come in and go out |
//! | `round`, `step` | what the members do together, as a whole and one by one |
//! | `lateness` | how long they are waited for |
//! | `plan` | what is to hold next |
//! | `state` | what is kept of it over a restart |
//! | `timing` | how long the phases of a step took |

mod config;
mod event;
mod lateness;
mod membership;
mod placement;
mod plan;
mod roster;
mod round;
mod state;
mod status;
mod step;
mod timing;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

pub use config::{MainConfig, MainError};
pub use event::{
    CollectTime, Contribution, DepartureReason, GradientOutput, LeftOut, MainEvent, Occasion, RoundPlan, RunEnd,
    StepTimes,
};
pub use lateness::Deadline;
use lateness::Patience;
use membership::stop;
pub use placement::Placement;
use plan::Planning;
use roster::{Readiness, Roster};
use round::Phase;
pub use state::{Checkpoint, ClientState, RunState};
pub use status::{ClientStatus, RunPhase, RunStatus};
use step::Awaited;
use timing::Timing;

use super::admission::TicketOffice;
use super::door::{Door, Heard};
use super::link::silence_limit;
use super::message::{Control, ControlReply, Digest, Message, Ready, RunConfig, StopReason};
use super::{ConnectionId, Transmit, earlier};
use crate::federated::Rule;
use crate::terms::ids::{ClientId, RoundKey};

/// The main server's state machine.
pub struct MainServerSession {
    config: MainConfig,
    office: TicketOffice,
    door: Door<ClientId>,
    roster: Roster,
    has_started: bool,
    /// Fewer than the quorum take part, because nobody came back in time who would have made it full.
    is_short: bool,
    /// The run was taken up again, and those who were there are waited for.
    is_returning: bool,
    /// Counts what has to be kept before it is acted on.
    revision: u64,
    /// Client numbers below this one are kept as given.
    reserved: u64,
    round: RoundKey,
    phase: Phase,
    /// The client side of the model as it is now; its adapter is the base of the next round.
    placement: placement::Current,
    /// Steps closed in the run.
    steps: u64,
    /// Who has had a gradient in this round.
    answered: BTreeSet<ClientId>,
    /// Whose adapters this round goes on without.
    late: BTreeSet<ClientId>,
    /// Rounds rejected since the last that came to something.
    rejected: u32,
    step_patience: Patience,
    adapter_patience: Patience,
    /// The way to the federated server is lost: nobody's adapter is late.
    control_lost: bool,
    /// Digest of the adapter that the federated server takes for what the round starts from.
    told_base: Option<Digest>,
    /// What the federated server takes for how adapters are aggregated.
    told_rule: Option<Rule>,
    timing: Timing,
    planning: Planning,
    frame_limit: usize,
    events: VecDeque<MainEvent>,
    controls: VecDeque<Control>,
}

impl MainServerSession {
    /// A run that waits for its first clients.
    ///
    /// # Errors
    /// When the configuration is contradictory or too large for the wire.
    pub fn new(config: MainConfig, now: Duration) -> Result<MainServerSession, MainError> {
        let frame_limit = config.frame_limit()?;
        let mut session = MainServerSession {
            office: TicketOffice {
                run: config.run,
                key: config.ticket_key,
                lifetime: config.ticket_lifetime,
            },
            door: Door::new(config.version, config.ping_interval),
            roster: Roster::new(),
            has_started: false,
            is_short: false,
            is_returning: false,
            revision: 0,
            reserved: 0,
            round: RoundKey { round: 0, attempt: 0 },
            phase: Phase::Waiting { until: None },
            placement: placement::Current::new(config.placement.clone()),
            steps: 0,
            answered: BTreeSet::new(),
            late: BTreeSet::new(),
            rejected: 0,
            step_patience: Patience::new(config.deadline),
            adapter_patience: Patience::new(config.deadline),
            control_lost: false,
            told_base: None,
            told_rule: None,
            timing: Timing::default(),
            planning: Planning::new(config.plans),
            frame_limit,
            events: VecDeque::new(),
            controls: VecDeque::new(),
            config,
        };
        session.reserve();
        session.open_run(now);
        Ok(session)
    }

    /// The largest frame a client may send: what a socket need not read past.
    pub fn max_frame_bytes(&self) -> usize {
        self.frame_limit
    }

    /// What clients agree on at present.
    pub fn config(&self) -> &RunConfig {
        &self.placement.assignment.config
    }

    /// A socket was accepted. Its number is one that was never used before.
    pub fn connected(&mut self, connection: ConnectionId, now: Duration) {
        self.door.open(connection, now);
    }

    /// A socket is closed, from whichever side; whoever was behind it leaves the round.
    pub fn disconnected(&mut self, connection: ConnectionId, now: Duration) {
        if let Some(client) = self.door.remove(connection) {
            self.depart(client, DepartureReason::Disconnected);
        }
        self.retest(now);
    }

    /// The connection was closed from this side, because what waited for it was more than it reads.
    pub fn unread(&mut self, connection: ConnectionId, now: Duration) {
        if let Some(client) = self.door.remove(connection) {
            self.depart(client, DepartureReason::Unread);
        }
        self.retest(now);
    }

    /// A frame came, whole. What a peer may not say ends its own connection and nothing else.
    pub fn handle_frame(&mut self, connection: ConnectionId, now: Duration, bytes: &[u8]) {
        match self.door.hear(connection, bytes) {
            Heard::Nothing => {}
            Heard::Refused(reason) => self.events.push_back(MainEvent::ClientRefused { connection, reason }),
            Heard::Hello(hello) => self.greet(connection, now, &hello),
            Heard::Fault { guest, error } if error.is_damage() => {
                self.door.close(connection);
                self.depart(guest, DepartureReason::Damaged);
            }
            Heard::Fault { guest, error } => self.expel(guest, DepartureReason::Misbehaved(error.to_string())),
            Heard::Frame { guest, first, message } => {
                if first {
                    self.roster.spend_ticket(guest);
                }
                if let Some(message) = message {
                    self.handle_message(guest, message, bytes.len() as u64, now);
                }
            }
        }
        self.retest(now);
    }

    /// Bytes of a frame that is not whole yet have come: its sender is not silent, only slow. It is still waited for no longer than
    /// the deadline says.
    pub fn heard(&mut self, connection: ConnectionId) {
        self.door.hear_part(connection);
    }

    /// Tells the session what time it is; at the latest when [`MainServerSession::poll_timeout`] says.
    pub fn handle_timeout(&mut self, now: Duration) {
        for (_, client) in self.door.handle_timeout(now) {
            if let Some(client) = client {
                self.depart(client, DepartureReason::Silent);
            }
        }
        self.retest(now);
        match self.phase {
            Phase::Waiting { until: Some(until) } if until <= now => {
                if !self.has_started || self.roster.is_anybody_ready() {
                    // Who is still loading, or away, has had long enough.
                    self.is_short = true;
                    self.roster.stop_expecting();
                    self.phase = Phase::Waiting { until: None };
                    self.retest(now);
                } else if self.is_returning && !self.roster.expected().is_empty() {
                    // Nobody can know when the server is there again.
                    self.phase = Phase::Waiting {
                        until: Some(now + self.config.wait_for_client),
                    };
                } else {
                    self.finish(RunEnd::NoClients, now);
                }
            }
            Phase::Finished { drain_by, .. } if drain_by <= now => {
                for connection in self.door.connections() {
                    self.door.close(connection);
                }
                self.retest(now);
            }
            _ if self.late_at().is_some_and(|deadline| deadline <= now) => match self.phase {
                Phase::Step(_) => self.step_is_late(now),
                _ => self.round_is_late(now),
            },
            _ => {}
        }
    }

    /// When those who are waited for are late.
    fn late_at(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Step(step) => step.deadline(),
            Phase::Boundary { wait, .. } if self.timing.is_finishing() => Some(wait.ends(true)),
            Phase::Averaging(averaging) if !self.control_lost => averaging.deadline(),
            _ => None,
        }
    }

    /// What the federated server said.
    pub fn handle_control(&mut self, now: Duration, reply: ControlReply) {
        match reply {
            ControlReply::Excluded { round, exclusion } if round == self.round => self.exclude(&exclusion),
            ControlReply::Received { round, client, bytes } if round == self.round => {
                if let Phase::Averaging(averaging) = &mut self.phase
                    && let Some(took) = averaging.handle_received(client, bytes, now)
                {
                    self.adapter_patience.note(took);
                    self.roster.was_in_time(client, Awaited::Adapter);
                }
            }
            ControlReply::RoundClosed(closed) if closed.round == self.round => self.close_round(closed, now),
            // Of a round that was lost meanwhile, or a repetition.
            ControlReply::Excluded { .. } | ControlReply::Received { .. } | ControlReply::RoundClosed(_) => {}
        }
        self.retest(now);
    }

    /// The link to a federated server in another process is lost: until it is up again, nobody's adapter is late.
    pub(crate) fn control_disconnected(&mut self) {
        self.control_lost = true;
    }

    /// The link to a federated server in another process is up, perhaps again: repeats what it must know.
    pub(crate) fn control_connected(&mut self, now: Duration) {
        self.control_lost = false;
        if let Phase::Averaging(averaging) = &mut self.phase {
            averaging.wait_again(now);
        }
        self.controls.clear();
        self.told_base = None;
        self.told_rule = None;
        self.open_run(now);
        let members = self.phase.members();
        if !members.is_empty() {
            self.open_round(members);
        }
        self.collect();
        if matches!(self.phase, Phase::Finished { .. }) {
            self.controls.push_back(Control::CloseRun);
        }
    }

    /// Ends the run: clients are told, and `Drained` follows when they are gone.
    pub fn stop(&mut self, now: Duration, detail: String) {
        self.finish(RunEnd::Stopped(detail), now);
        self.retest(now);
    }

    /// The next thing to do with a socket.
    pub fn poll_transmit(&mut self) -> Option<Transmit<ConnectionId>> {
        self.door.poll_transmit()
    }

    /// The next thing for the driver to do or know.
    pub fn poll_event(&mut self) -> Option<MainEvent> {
        self.events.pop_front()
    }

    /// The next word for the federated server, whichever process it is in.
    pub fn poll_control(&mut self) -> Option<Control> {
        self.controls.pop_front()
    }

    /// When [`MainServerSession::handle_timeout`] is to be called; `None` while nothing is waited for.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let own = match self.phase {
            Phase::Waiting { until } => until,
            Phase::Finished {
                drain_by,
                drained: false,
            } => Some(drain_by),
            _ => self.late_at(),
        };
        earlier(own, self.door.poll_timeout())
    }

    fn handle_message(&mut self, client: ClientId, message: Message, bytes: u64, now: Duration) {
        if matches!(self.phase, Phase::Finished { .. }) && !matches!(message, Message::Leave) {
            // What was on its way when the run ended.
            return;
        }
        match message {
            Message::Ready(ready) => self.handle_ready(client, ready, now),
            Message::Activations(activations) => {
                if let Err(detail) = self.handle_activations(client, activations, bytes, now) {
                    self.expel(client, DepartureReason::Misbehaved(detail));
                }
            }
            Message::StepDone(done) => {
                if let Err(detail) = self.handle_step_done(client, done, now) {
                    self.expel(client, DepartureReason::Misbehaved(detail));
                }
            }
            Message::Leave => {
                if let Some(connection) = self.roster.connection(client) {
                    self.door.close(connection);
                }
                self.depart(client, DepartureReason::Left);
            }
            other => {
                let detail = format!("expected {}, got {}", self.expected_of(client), other.name());
                self.expel(client, DepartureReason::Misbehaved(detail));
            }
        }
    }

    /// What this client may send now, for error texts.
    fn expected_of(&self, client: ClientId) -> String {
        if let Some(key) = self.timing.unfinished(client) {
            return format!("StepDone of {key} or Leave");
        }
        if !self.roster.is_ready(client) {
            return "Ready or Leave".to_owned();
        }
        match self.phase.awaited_step(client) {
            Some(key) => format!("Activations of {key} or Leave"),
            None => "Leave".to_owned(),
        }
    }

    fn handle_ready(&mut self, id: ClientId, ready: Ready, now: Duration) {
        match self.roster.handle_ready(id, ready, self.placement.assignment.number) {
            Readiness::New => {
                self.events.push_back(MainEvent::ClientReady { client: id });
                self.retest(now);
            }
            Readiness::Outdated => {}
            Readiness::Unexpected => {
                let detail = format!(
                    "expected {}, got Ready for assignment {}",
                    self.expected_of(id),
                    ready.assignment
                );
                self.expel(id, DepartureReason::Misbehaved(detail));
            }
        }
    }

    /// Moves the run on as far as it can go. Called after every change, of membership above all.
    fn retest(&mut self, now: Duration) {
        while let Some((key, clients)) = self.timing.take_finished() {
            self.events.push_back(MainEvent::StepMeasured { key, clients });
        }
        let enough = self.enough();
        match &mut self.phase {
            Phase::Waiting { .. } => self.start_round(now),
            phase if phase.has_fewer_than(enough) => self.lose_round(now),
            Phase::Step(_) => self.retest_step(now),
            Phase::Boundary { members, .. } if !self.timing.is_finishing() && !self.planning.is_open() => {
                let members = members.clone();
                if self.planning.asks() && self.round.round + 1 < self.config().rounds {
                    self.want_plan(Occasion::Boundary(self.round));
                } else {
                    self.ask_for_adapters(members, self.placement.split(), now);
                }
            }
            Phase::Finished { drain_by, drained }
                if !*drained
                    && !self.door.has_guests()
                    && (*drain_by <= now || !self.is_returning || self.roster.expected().is_empty()) =>
            {
                *drained = true;
                self.events.push_back(MainEvent::Drained);
            }
            _ => {}
        }
    }

    fn send_to_all(&mut self, clients: &BTreeSet<ClientId>, message: impl Fn(u32) -> Message) {
        let connections: Vec<ConnectionId> = clients.iter().filter_map(|id| self.roster.connection(*id)).collect();
        let message = message(connections.len() as u32);
        for connection in connections {
            self.door.send(connection, &message);
        }
    }

    fn finish(&mut self, reason: RunEnd, now: Duration) {
        if matches!(self.phase, Phase::Finished { .. }) {
            return;
        }
        let message = Message::Stop(match &reason {
            RunEnd::Completed => stop(StopReason::Completed, "all rounds are done", None),
            RunEnd::NoClients => stop(StopReason::Shutdown, "nobody was ready in time", None),
            RunEnd::Stopped(detail) | RunEnd::FederatedFault(detail) | RunEnd::Diverged(detail) => {
                stop(StopReason::Shutdown, detail, None)
            }
        });
        // The connections stay until the clients have heard and hung up.
        for connection in self.roster.connections() {
            self.door.send(connection, &message);
        }
        self.phase = Phase::Finished {
            drain_by: now + silence_limit(self.config.ping_interval),
            drained: false,
        };
        self.controls.push_back(Control::CloseRun);
        self.events.push_back(MainEvent::Finished { reason });
    }

    fn open_run(&mut self, now: Duration) {
        self.controls.push_back(Control::OpenRun {
            run: self.config.run,
            ticket_key: self.config.ticket_key,
            now,
            ticket_lifetime: self.config.ticket_lifetime,
            largest_update: self.config.largest_update,
            model: self.config.model,
            tokenizer: self.config.tokenizer,
        });
    }
}
