//! The task that owns the sessions: inputs from connections, the compute thread and the link to a federated server
//! elsewhere go in, frames and work come out, and what happened is written down.
//!
//! It is separate from the sessions because they have no clock, no channel and no file, and from everything that can be slow
//! because a session's deadlines are real.
//!
//! | file | holds |
//! |---|---|
//! | `main_run`, `measure` | a main server's session, and what is counted beside it |
//! | `event`, `answer` | what the sessions ask for, and what the compute thread has done |
//! | `link` | the way to the federated server |
//! | `report`, `status` | what people are told |
//! | `keep` | what is written down before it is acted on |
//! | `tally`, `totals` | who was refused, and what the run has come to, in numbers |

mod answer;
mod event;
mod keep;
mod link;
mod main_run;
mod measure;
mod report;
mod status;
mod tally;
mod totals;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

pub use link::RemoteLink;
use link::link_event;
pub use main_run::{About, Keeping, MainRun};
use report::Unwritten;
pub use report::{Ending, Report, Summary};
use tally::Tally;
pub use totals::Totals;

use super::Error;
use super::clock::RunClock;
use super::gate::{Gate, Passage};
use super::inbox::{Done, Input, Outbox, Work};
use super::limit::GuessLimit;
use super::metrics::Metrics;
use crate::protocol::codec::decode_hello;
use crate::protocol::message::{Credential, PROTOCOL_VERSION};
use crate::protocol::{ConnectionId, Endpoint, FederatedServerSession, RunEnd, Transmit};
use crate::runs::directory::RunDirectory;
use crate::split::Evaluation;

/// How long to wait, when the run is over, for clients that do not take their leave.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, Default)]
struct Traffic {
    up: u64,
    down: u64,
}

struct Connection {
    endpoint: Endpoint,
    address: IpAddr,
    passage: Arc<Passage>,
    outgoing: Outbox,
    /// A guess at the secret has been paid for and is not answered yet.
    guesses: bool,
}

/// What a coordinator is made of.
pub struct Parts {
    pub clock: RunClock,
    pub queue: mpsc::Receiver<Input>,
    pub main: Option<MainRun>,
    pub federated: Option<FederatedServerSession>,
    pub link: Option<RemoteLink>,
    pub directory: RunDirectory,
    pub metrics: Metrics,
    pub status: watch::Sender<Value>,
    pub guesses: Arc<Mutex<GuessLimit>>,
    /// Whether who comes without a ticket needs a secret.
    pub asks_secret: bool,
    pub gate: Arc<Gate>,
    /// What sockets may receive, as the sessions say.
    pub max_frame_bytes: Arc<AtomicUsize>,
    pub report: Box<dyn Fn(Report) + Send>,
}

/// Owner of the sessions: takes what connections and the compute thread say, and gives them frames and work.
pub struct Coordinator {
    parts: Parts,
    connections: HashMap<ConnectionId, Connection>,
    total: Traffic,
    summary: Summary,
    /// The run of a federated server is over.
    run_closed: bool,
    /// When to stop waiting for the last clients; then `abandoned` is set.
    end_by: Option<Instant>,
    abandoned: bool,
    failure: Option<Error>,
    /// What cannot be written at present.
    unwritten: Unwritten,
    refusals: Tally,
}

impl Coordinator {
    pub fn new(parts: Parts) -> Self {
        Self {
            parts,
            connections: HashMap::new(),
            total: Traffic::default(),
            summary: Summary {
                ending: Ending::Completed,
                rounds: 0,
                steps: 0,
                tokens: 0,
                seconds: 0.0,
                bytes_up: 0,
                bytes_down: 0,
                baseline: None,
                last: None,
            },
            run_closed: false,
            end_by: None,
            abandoned: false,
            failure: None,
            unwritten: Unwritten::default(),
            refusals: Tally::default(),
        }
    }

    /// Waits until the model is loaded.
    pub async fn ready(&mut self) -> Result<(), Error> {
        if let Some(main) = &mut self.parts.main {
            match self.parts.queue.recv().await {
                Some(Input::Computed(Done::Ready)) => {}
                Some(Input::Computed(Done::Failed(error))) => return Err(error),
                _ => return Err(Error::WorkerGone),
            }
            // The model may have taken long to load.
            (main.round_started, main.step_started) = (Instant::now(), Instant::now());
            if main.about.validates && self.summary.baseline.is_none() {
                main.compute(Work::Baseline)?;
            }
        }
        self.settle();
        Ok(())
    }

    fn now(&self) -> Duration {
        self.parts.clock.now()
    }

    /// Runs until the run is over and everybody has been told.
    pub async fn run(mut self) -> Result<Summary, Error> {
        loop {
            if self.is_over() {
                break;
            }
            let deadline = self.deadline();
            tokio::select! {
                input = self.parts.queue.recv() => match input {
                    Some(input) => self.handle(input),
                    None => break,
                },
                Some((socket, event)) = link_event(&mut self.parts.link) => self.handle_link(socket, event),
                () = sleep_until(deadline) => self.handle_timeout(),
            }
            self.settle();
        }
        self.finish()
    }

    fn is_over(&self) -> bool {
        match &self.parts.main {
            Some(main) => (main.drained || self.abandoned) && (main.saved || self.failure.is_some()),
            None => self.abandoned || (self.run_closed && self.connections.is_empty()),
        }
    }

    fn finish(mut self) -> Result<Summary, Error> {
        self.tell_refusals(true);
        self.summary.seconds = self.parts.clock.now().as_secs_f64();
        (self.summary.bytes_up, self.summary.bytes_down) = (self.total.up, self.total.down);
        let (ending, text) = match self.parts.main.as_mut().and_then(|main| main.outcome.take()) {
            Some(RunEnd::Completed) => (Ending::Completed, "completed".to_owned()),
            Some(RunEnd::NoClients) => (Ending::NoClients, "no clients left".to_owned()),
            Some(RunEnd::Stopped(detail)) => (Ending::Stopped(detail.clone()), detail),
            Some(RunEnd::FederatedFault(detail)) => {
                self.failure.get_or_insert(Error::Federated(detail.clone()));
                (Ending::Stopped(detail.clone()), detail)
            }
            Some(RunEnd::Diverged(detail)) => (Ending::Diverged(detail.clone()), detail),
            None if self.run_closed => (Ending::RunClosed, "the main server ended the run".to_owned()),
            None => (Ending::Stopped("stopped".to_owned()), "stopped".to_owned()),
        };
        self.summary.ending = ending;
        let summary = &self.summary;
        let perplexity = |evaluation: Option<Evaluation>| evaluation.map(|evaluation| evaluation.perplexity);
        let totals = json!({
            "rounds": summary.rounds, "steps": summary.steps, "tokens": summary.tokens, "seconds": summary.seconds,
            "bytes_up": summary.bytes_up, "bytes_down": summary.bytes_down, "metrics_lost": self.parts.metrics.lost(),
            "first_valid_perplexity": perplexity(summary.baseline), "last_valid_perplexity": perplexity(summary.last),
        });
        let reason = match &self.failure {
            Some(failure) => format!("failed: {failure}"),
            None => text,
        };
        let written = self.parts.directory.end(&reason, totals);
        match self.failure {
            Some(failure) => Err(failure),
            None => Ok(written.map(|()| self.summary)?),
        }
    }

    /// The run cannot go on: tells the clients and ends.
    fn fail(&mut self, error: Error) {
        let now = self.now();
        if self.failure.is_none() {
            if let Some(main) = &mut self.parts.main {
                main.session.stop(now, "the server has a problem".to_owned());
            }
            self.end_by.get_or_insert(Instant::now() + DRAIN_LIMIT);
            self.failure = Some(error);
        }
    }

    fn check(&mut self, result: Result<(), Error>) {
        if let Err(error) = result {
            self.fail(error);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let sessions = [
            self.parts.main.as_ref().and_then(|main| main.session.poll_timeout()),
            self.parts
                .federated
                .as_ref()
                .and_then(FederatedServerSession::poll_timeout),
            self.parts.link.as_ref().and_then(RemoteLink::poll_timeout),
            self.refusals.due(),
        ];
        let earliest = sessions
            .into_iter()
            .flatten()
            .min()
            .map(|timeout| self.parts.clock.at(timeout));
        earliest.into_iter().chain(self.end_by).min()
    }

    fn handle_timeout(&mut self) {
        let now = self.now();
        self.tell_refusals(false);
        if self.end_by.is_some_and(|end| end <= Instant::now()) {
            self.end_by = None;
            self.abandoned = true;
        }
        if let Some(main) = &mut self.parts.main {
            main.session.handle_timeout(now);
        }
        if let Some(federated) = &mut self.parts.federated {
            federated.handle_timeout(now);
        }
        if let Some(link) = &mut self.parts.link {
            link.handle_timeout(now);
        }
    }

    fn handle(&mut self, input: Input) {
        let now = self.now();
        match input {
            Input::Opened {
                connection,
                endpoint,
                address,
                passage,
                outgoing,
            } => {
                self.connections.insert(
                    connection,
                    Connection {
                        endpoint,
                        address,
                        passage,
                        outgoing,
                        guesses: false,
                    },
                );
                match (endpoint, &mut self.parts.main, &mut self.parts.federated) {
                    (Endpoint::Main, Some(main), _) => main.session.connected(connection, now),
                    (Endpoint::Federated, _, Some(federated)) => federated.connected(connection, now),
                    _ => {}
                }
            }
            Input::Frame {
                connection,
                bytes,
                room: _room,
            } => {
                if !self.may_say(connection, &bytes, now) {
                    return self.closed(connection, false);
                }
                let Some(Connection { endpoint, .. }) = self.connections.get(&connection) else {
                    return;
                };
                self.total.up += bytes.len() as u64;
                match (endpoint, &mut self.parts.main, &mut self.parts.federated) {
                    (Endpoint::Main, Some(main), _) => {
                        main.step_bytes.up += bytes.len() as u64;
                        main.session.handle_frame(connection, now, &bytes);
                    }
                    (Endpoint::Federated, _, Some(federated)) => federated.handle_frame(connection, now, &bytes),
                    _ => {}
                }
            }
            Input::Closed { connection, unread } => self.closed(connection, unread),
            Input::Computed(done) => {
                let handled = self.computed(done);
                self.check(handled);
            }
            Input::Stop(detail) => match &mut self.parts.main {
                Some(main) => main.session.stop(now, detail),
                None => self.abandoned = true,
            },
        }
    }

    /// Whether a stranger's frame may be looked at: a guess at the secret has to be paid for first, and once.
    fn may_say(&mut self, id: ConnectionId, bytes: &[u8], now: Duration) -> bool {
        let Some(connection) = self.connections.get_mut(&id).filter(|_| self.parts.asks_secret) else {
            return true;
        };
        if connection.passage.is_member() || connection.guesses {
            return true;
        }
        let is_guess =
            decode_hello(PROTOCOL_VERSION, bytes).is_ok_and(|hello| matches!(hello.credential, Credential::Secret(_)));
        if !is_guess {
            return true;
        }
        let mut guesses = self.parts.guesses.lock().unwrap_or_else(PoisonError::into_inner);
        connection.guesses = guesses.pay(connection.address, now).is_ok();
        if !connection.guesses {
            // Closed without an answer: who means well tries again in a while.
            self.refusals.note(now, "too many wrong tokens from its address", false);
        }
        connection.guesses
    }

    /// A session has let a connection in.
    fn admitted(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.passage.admit();
            if std::mem::take(&mut connection.guesses) {
                let mut guesses = self.parts.guesses.lock().unwrap_or_else(PoisonError::into_inner);
                guesses.pay_back(connection.address);
            }
        }
    }

    /// A connection is gone, or, if it does not read what it is sent, is let go.
    fn closed(&mut self, connection: ConnectionId, unread: bool) {
        let now = self.now();
        let Some(Connection { endpoint, .. }) = self.connections.remove(&connection) else {
            return;
        };
        match (endpoint, &mut self.parts.main, &mut self.parts.federated) {
            (Endpoint::Main, Some(main), _) if unread => main.session.unread(connection, now),
            (Endpoint::Main, Some(main), _) => main.session.disconnected(connection, now),
            (Endpoint::Federated, _, Some(federated)) if unread => federated.unread(connection, now),
            (Endpoint::Federated, _, Some(federated)) => federated.disconnected(connection, now),
            _ => {}
        }
    }

    /// Carries out everything the sessions ask for, until they ask for nothing more.
    fn settle(&mut self) {
        loop {
            let mut quiet = true;
            while let Some(event) = self.parts.main.as_mut().and_then(|main| main.session.poll_event()) {
                quiet = false;
                let handled = self.main_event(event);
                self.check(handled);
            }
            while let Some(event) = self
                .parts
                .federated
                .as_mut()
                .and_then(FederatedServerSession::poll_event)
            {
                quiet = false;
                self.federated_event(event);
            }
            self.keep_members();
            quiet &= !self.exchange_control();
            quiet &= !self.transmit();
            if quiet {
                break;
            }
        }
        if let Some(detail) = self.parts.metrics.take_trouble() {
            (self.parts.report)(Report::Trouble { detail });
        }
        self.publish();
    }

    /// Sends what the sessions want sent. Returns whether there was anything.
    fn transmit(&mut self) -> bool {
        let mut any = false;
        while let Some(transmit) = self.parts.main.as_mut().and_then(|main| main.session.poll_transmit()) {
            any = true;
            if let (Transmit::Frame { bytes, .. }, Some(main)) = (&transmit, &mut self.parts.main) {
                main.step_bytes.down += bytes.len() as u64;
            }
            self.send(transmit);
        }
        while let Some(transmit) = self
            .parts
            .federated
            .as_mut()
            .and_then(FederatedServerSession::poll_transmit)
        {
            any = true;
            self.send(transmit);
        }
        any | self.transmit_link()
    }

    fn send(&mut self, transmit: Transmit<ConnectionId>) {
        match transmit {
            Transmit::Frame { to, bytes } => {
                let Some(open) = self.connections.get(&to) else { return };
                self.total.down += bytes.len() as u64;
                if !open.outgoing.send(bytes) {
                    self.closed(to, true);
                }
            }
            Transmit::Close { to } => {
                if let Some(open) = self.connections.get(&to) {
                    // With the sender dropped the connection's task writes what it has, and ends.
                    open.outgoing.close();
                    self.closed(to, false);
                }
            }
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
