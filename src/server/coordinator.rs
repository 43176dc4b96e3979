//! The task that owns the sessions: inputs from connections, the compute thread and the link to a federated server
//! elsewhere go in, frames and work come out, and what happened is written down.
//!
//! It is separate from the sessions because they have no clock, no channel and no file, and from everything that can be slow
//! because a session's deadlines are real.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use super::Error;
use super::inbox::{Done, Input, Outgoing, Work};
use super::limit::FailureLimit;
use super::metrics::{MeasuredPhases, Metrics, RoundPhases, RoundRecord, ServerPhase, StepPhases, StepRecord};
use super::planner::{ClientFacts, ClientRound, Decision, Facts, RoundFacts, RoundPrediction, StartFacts};
use super::store::RunDirectory;
use crate::model::architecture::Architecture;
use crate::protocol::message::{ControlReply, RefusalReason, RunConfig};
use crate::protocol::{
    CollectTime, ConnectionId, ControlEvent, ControlSession, Endpoint, FederatedEvent, FederatedServerSession,
    MAX_FRAME_BYTES, MainEvent, MainServerSession, Occasion, Placement, RoundPlan, RunEnd, RunPhase, StepTimes,
    Transmit,
};
use crate::split::{Evaluation, Training};
use crate::terms::ids::{ClientId, StepKey};
use crate::terms::phases::Phases;
use crate::transport::{self, Dialer, Origin, SocketEvent};

/// How long to wait, when the run is over, for clients that do not take their leave.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// What happens in a run, for people. Rounds and steps count from 1.
#[derive(Clone, Debug)]
pub enum Report {
    Joined {
        client: u64,
        name: String,
        device: String,
    },
    Left {
        client: u64,
        name: String,
        reason: String,
    },
    Refused {
        address: IpAddr,
        reason: String,
    },
    /// Validation before training.
    Baseline(Evaluation),
    RoundStarted {
        round: u32,
        members: usize,
    },
    RoundLost {
        round: u32,
    },
    /// What is to hold from this round on.
    Planned {
        round: u32,
        cut: usize,
        /// Clients' own cuts, by client; empty where `cut` is everybody's.
        cuts: BTreeMap<u64, usize>,
        rank: usize,
        reason: String,
    },
    Step(StepRecord),
    Round(RoundRecord),
    /// Nobody is left to train with.
    Waiting {
        limit: Duration,
    },
    /// The link to a federated server elsewhere, or from a main server elsewhere.
    Link {
        connected: bool,
        detail: String,
    },
    /// A federated server averaged a round.
    Averaged {
        round: u32,
        adapters: usize,
    },
    /// Something could not be written, or can be again; the run goes on.
    Trouble {
        detail: String,
    },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    Completed,
    /// Everybody left and nobody came back in time.
    NoClients,
    Stopped(String),
    /// The main server ended the run of this federated server.
    RunClosed,
}

/// A run in numbers.
#[derive(Clone, Debug)]
pub struct Summary {
    pub ending: Ending,
    /// Rounds that were averaged, and optimiser steps taken.
    pub rounds: u32,
    pub steps: u64,
    pub tokens: u64,
    pub seconds: f64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    /// Validation before training and after the last round.
    pub baseline: Option<Evaluation>,
    pub last: Option<Evaluation>,
}

/// The main server's session with what it computes and counts.
pub struct MainRun {
    session: MainServerSession,
    work: std::sync::mpsc::Sender<Work>,
    about: About,
    /// Blocks of the client, clients' own cuts where they differ, and rank, as they are now.
    cut: usize,
    cuts: BTreeMap<ClientId, usize>,
    rank: usize,
    /// When the current round, its current step, and the step's last arrival were.
    round_started: Instant,
    step_started: Instant,
    step_gathered: Instant,
    /// Counted since the last step's line.
    step_bytes: Traffic,
    /// Written once its members have done it.
    pending_step: Option<(StepKey, StepRecord)>,
    measured: RoundMeasure,
    /// When a plan was asked for, and how long plans of this round have taken.
    planning_since: Option<(Occasion, Instant)>,
    planning: Duration,
    /// Of this round, and of the next.
    prediction: Option<RoundPrediction>,
    next_prediction: Option<RoundPrediction>,
    pending_round: Option<RoundRecord>,
    names: HashMap<u64, String>,
    outcome: Option<RunEnd>,
    drained: bool,
    saved: bool,
}

impl MainRun {
    pub fn new(session: MainServerSession, work: std::sync::mpsc::Sender<Work>, about: About, cut: usize) -> Self {
        let now = Instant::now();
        Self {
            session,
            work,
            cut,
            cuts: BTreeMap::new(),
            rank: about.training.spec.rank,
            about,
            round_started: now,
            step_started: now,
            step_gathered: now,
            step_bytes: Traffic::default(),
            pending_step: None,
            measured: RoundMeasure::default(),
            planning_since: None,
            planning: Duration::ZERO,
            prediction: None,
            next_prediction: None,
            pending_round: None,
            names: HashMap::new(),
            outcome: None,
            drained: false,
            saved: false,
        }
    }

    /// What a planner is told.
    fn facts(&self, occasion: Occasion) -> Facts {
        let clients = self
            .session
            .status()
            .clients
            .into_iter()
            .filter(|client| client.ready)
            .map(|client| ClientFacts {
                id: client.client,
                name: client.name,
                device: client.device,
                memory_bytes: client.memory_bytes,
                speed: client.speed,
            })
            .collect();
        let About {
            config,
            training,
            rounds,
            local_steps,
            ..
        } = &self.about;
        match occasion {
            Occasion::Start => Facts::Start(StartFacts {
                clients,
                server_flops_per_s: None,
                cut: self.cut,
                rank: self.rank,
                config: config.clone(),
                training: training.clone(),
                rounds: *rounds,
                local_steps: *local_steps,
            }),
            Occasion::Boundary(_) | Occasion::Membership => Facts::Round(RoundFacts {
                round: self.measured.round,
                rounds: *rounds,
                cut: self.cut,
                cuts: self.cuts.clone(),
                rank: self.rank,
                can_recut: occasion != Occasion::Membership && self.cuts.is_empty(),
                clients,
                measured: self.measured.clients(&self.measured.collected),
                server_s: self.measured.server_s(),
            }),
        }
    }

    /// Fails when the thread has ended, about which it has said why.
    fn compute(&self, work: Work) -> Result<(), Error> {
        self.work.send(work).map_err(|_| Error::WorkerGone)
    }
}

/// What a run is about, for records and planners.
pub struct About {
    pub model: String,
    pub config: Architecture,
    pub training: Training,
    pub rounds: u32,
    pub local_steps: u32,
    pub validates: bool,
}

/// What has been measured of a round.
#[derive(Default)]
struct RoundMeasure {
    /// Counted from 1.
    round: u32,
    steps: u32,
    server: Duration,
    members: BTreeMap<ClientId, MemberMeasure>,
    /// Of the round before.
    collected: Vec<CollectTime>,
}

/// Sums over a member's steps.
#[derive(Clone, Copy, Default)]
struct MemberMeasure {
    steps: u32,
    phases: Phases<Duration>,
    bytes_up: u64,
    bytes_down: u64,
}

impl RoundMeasure {
    fn add(&mut self, times: &StepTimes) {
        let sums = self.members.entry(times.client).or_default();
        sums.steps += 1;
        sums.phases += times.phases;
        sums.bytes_up += times.bytes_up;
        sums.bytes_down += times.bytes_down;
    }

    fn server_s(&self) -> Option<f64> {
        (self.steps > 0).then(|| self.server.as_secs_f64() / f64::from(self.steps))
    }

    /// Means over members' steps, with the collection of adapters as `collected` has it.
    fn clients(&self, collected: &[CollectTime]) -> Vec<ClientRound> {
        let means = self.members.iter().map(|(id, sums)| {
            let steps = f64::from(sums.steps);
            let collected = collected.iter().find(|time| time.client == *id);
            ClientRound {
                id: *id,
                steps: sums.steps,
                phases: sums.phases.as_secs_f64().map(|sum| sum / steps),
                activation_bits: 8.0 * sums.bytes_up as f64 / steps,
                gradient_bits: 8.0 * sums.bytes_down as f64 / steps,
                federated_s: collected.map(|time| time.took.as_secs_f64()),
                adapter_bits: collected.map(|time| 8.0 * time.bytes as f64),
            }
        });
        means.collect()
    }

    /// The same for the log, beside what was expected.
    fn phases(&self, collected: &[CollectTime], prediction: Option<&RoundPrediction>) -> Vec<RoundPhases> {
        let phases = self.clients(collected).into_iter().map(|mean| RoundPhases {
            client: mean.id.0,
            predicted: prediction.and_then(|prediction| prediction.clients.get(&mean.id).copied()),
            measured: MeasuredPhases {
                step: mean.phases,
                federated_s: mean.federated_s,
            },
        });
        phases.collect()
    }
}

fn phases(times: &StepTimes) -> StepPhases {
    StepPhases {
        client: times.client.0,
        phases: times.phases.as_secs_f64(),
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Traffic {
    up: u64,
    down: u64,
}

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
}

struct Connection {
    endpoint: Endpoint,
    address: IpAddr,
    outgoing: mpsc::Sender<Outgoing>,
}

/// What a coordinator is made of.
pub struct Parts {
    /// The zero of the sessions' clock.
    pub origin: Instant,
    pub queue: mpsc::Receiver<Input>,
    pub main: Option<MainRun>,
    pub federated: Option<FederatedServerSession>,
    pub link: Option<RemoteLink>,
    pub directory: RunDirectory,
    pub metrics: Metrics,
    pub status: watch::Sender<Value>,
    pub failures: Arc<Mutex<FailureLimit>>,
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
}

/// What was said to be unwritten, so that it is said once.
#[derive(Default)]
struct Unwritten(BTreeSet<&'static str>);

impl Unwritten {
    /// Notes how writing `what` went, which is tried again with the next round, and reports a failure that is new.
    fn note(&mut self, what: &'static str, written: Result<(), Error>, report: &dyn Fn(Report)) {
        match written {
            Ok(()) => {
                self.0.remove(what);
            }
            Err(error) if self.0.insert(what) => report(Report::Trouble {
                detail: format!("{error}; the run goes on, and {what} is tried again with every round"),
            }),
            Err(_) => {}
        }
    }
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
        }
    }

    /// From here on the directory holds a run.
    pub fn begin(&mut self) -> Result<(), Error> {
        self.parts.directory.begin()?;
        self.parts.metrics.open();
        Ok(())
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
            if main.about.validates {
                main.compute(Work::Baseline)?;
            }
        }
        self.settle();
        Ok(())
    }

    fn now(&self) -> Duration {
        self.parts.origin.elapsed()
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
        self.summary.seconds = self.parts.origin.elapsed().as_secs_f64();
        (self.summary.bytes_up, self.summary.bytes_down) = (self.total.up, self.total.down);
        let (ending, text) = match self.parts.main.as_mut().and_then(|main| main.outcome.take()) {
            Some(RunEnd::Completed) => (Ending::Completed, "completed".to_owned()),
            Some(RunEnd::NoClients) => (Ending::NoClients, "no clients left".to_owned()),
            Some(RunEnd::Stopped(detail)) => (Ending::Stopped(detail.clone()), detail),
            Some(RunEnd::FederatedFault(detail)) => {
                self.failure.get_or_insert(Error::Federated(detail.clone()));
                (Ending::Stopped(detail.clone()), detail)
            }
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
            None => written.map(|()| self.summary),
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
            self.parts.link.as_ref().and_then(|link| link.session.poll_timeout()),
        ];
        let earliest = sessions
            .into_iter()
            .flatten()
            .min()
            .map(|timeout| self.parts.origin + timeout);
        earliest.into_iter().chain(self.end_by).min()
    }

    fn handle_timeout(&mut self) {
        let now = self.now();
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
            link.session.handle_timeout(now);
        }
    }

    fn handle(&mut self, input: Input) {
        let now = self.now();
        match input {
            Input::Opened {
                connection,
                endpoint,
                address,
                outgoing,
            } => {
                self.connections.insert(
                    connection,
                    Connection {
                        endpoint,
                        address,
                        outgoing,
                    },
                );
                match (endpoint, &mut self.parts.main, &mut self.parts.federated) {
                    (Endpoint::Main, Some(main), _) => main.session.connected(connection, now),
                    (Endpoint::Federated, _, Some(federated)) => federated.connected(connection, now),
                    _ => {}
                }
            }
            Input::Frame { connection, bytes } => {
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
            Input::Closed { connection } => self.closed(connection),
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

    fn closed(&mut self, connection: ConnectionId) {
        let now = self.now();
        let Some(Connection { endpoint, .. }) = self.connections.remove(&connection) else {
            return;
        };
        match (endpoint, &mut self.parts.main, &mut self.parts.federated) {
            (Endpoint::Main, Some(main), _) => main.session.disconnected(connection, now),
            (Endpoint::Federated, _, Some(federated)) => federated.disconnected(connection, now),
            _ => {}
        }
    }

    fn computed(&mut self, done: Done) -> Result<(), Error> {
        let now = self.now();
        let Some(main) = &mut self.parts.main else {
            return Ok(());
        };
        match done {
            Done::Ready => {}
            Done::Baseline(evaluation) => {
                if let Some(evaluation) = evaluation {
                    self.summary.baseline = Some(evaluation);
                    self.summary.last = Some(evaluation);
                    (self.parts.report)(Report::Baseline(evaluation));
                    self.parts
                        .metrics
                        .round(&validated(RoundRecord::default(), Some(evaluation)));
                }
            }
            Done::Step {
                key,
                outputs,
                loss,
                tokens,
                elapsed,
            } => {
                let record = StepRecord {
                    round: key.round.round + 1,
                    step: key.round.round * main.about.local_steps + key.step + 1,
                    loss,
                    tokens,
                    clients: outputs.len(),
                    seconds: main.step_started.elapsed().as_secs_f64(),
                    wait_seconds: main.step_gathered.duration_since(main.step_started).as_secs_f64(),
                    compute_seconds: elapsed.as_secs_f64(),
                    bytes_up: main.step_bytes.up,
                    bytes_down: main.step_bytes.down,
                    phases: Vec::new(),
                };
                main.session.step_result(now, key, outputs)?;
                main.step_started = Instant::now();
                main.step_bytes = Traffic::default();
                main.measured.steps += 1;
                main.measured.server += elapsed;
                self.summary.steps += 1;
                self.summary.tokens += tokens;
                // The one before may belong to a round that was lost.
                if let Some((_, record)) = main.pending_step.replace((key, record.clone())) {
                    self.parts.metrics.step(&record);
                }
                (self.parts.report)(Report::Step(record));
            }
            Done::Planned { decision, placement } => {
                self.planned(now, decision, placement.map(|placement| *placement))?
            }
            Done::Copied { round, values } => main.session.copy(now, round, values)?,
            Done::Closed {
                round,
                evaluation,
                placement,
                saved,
            } => {
                self.unwritten.note("the adapter", saved, &self.parts.report);
                if let Some(placement) = &placement {
                    main.cut = placement.split() as usize;
                }
                let loss = evaluation.map(|evaluation| evaluation.loss);
                main.session
                    .validated(now, round, loss, placement.map(|placement| *placement))?;
                self.summary.rounds = round.round + 1;
                self.summary.last = evaluation.or(self.summary.last);
                if let Some(record) = main.pending_round.take() {
                    let record = validated(record, evaluation);
                    self.parts.metrics.round(&record);
                    (self.parts.report)(Report::Round(record));
                }
                let state = json!({
                    "rounds": self.summary.rounds, "steps": self.summary.steps, "tokens": self.summary.tokens,
                });
                let written = (self.parts.directory).write_state("progress.json", state.to_string().as_bytes());
                self.unwritten.note("its state", written, &self.parts.report);
            }
            Done::Finished => main.saved = true,
            Done::Failed(error) => return Err(error),
        }
        Ok(())
    }

    /// Acts on a planner's decision.
    fn planned(
        &mut self,
        now: Duration,
        decision: Option<Decision>,
        placement: Option<Placement>,
    ) -> Result<(), Error> {
        let at = now.as_secs_f64();
        let Some(main) = &mut self.parts.main else {
            return Ok(());
        };
        let mut round = main.session.status().round + 1;
        if let Some((occasion, since)) = main.planning_since.take() {
            main.planning += since.elapsed();
            round += u32::from(matches!(occasion, Occasion::Boundary(_)));
        }
        if let Some(placement) = placement {
            let RunConfig { rank, alpha, .. } = placement.assignment.config;
            let split = placement.split();
            (main.cut, main.rank) = (split as usize, rank as usize);
            main.cuts = (placement.cuts.iter())
                .map(|(client, cut)| (*client, *cut as usize))
                .collect();
            let cuts: Vec<Value> = (placement.cuts.iter())
                .map(|(client, cut)| json!({ "client": client.0, "split": cut }))
                .collect();
            main.session.place(now, placement)?;
            let About {
                rounds, local_steps, ..
            } = main.about;
            let plan = json!({
                "split": split, "splits": cuts, "rank": rank, "alpha": alpha, "rounds": rounds, "local_steps": local_steps,
            });
            let written = self.parts.directory.note(json!({ "plan": plan }));
            self.unwritten.note("run.json", written, &self.parts.report);
        }
        let plan = decision.as_ref().map(|decision| RoundPlan {
            split: Some(u32::try_from(decision.cut).unwrap_or(u32::MAX)),
            rates: decision.rates.clone(),
        });
        main.session.planned(now, plan)?;
        let Some(Decision {
            cut,
            rank,
            rates,
            prediction,
            reason,
            ..
        }) = decision
        else {
            return Ok(());
        };
        let rates: Vec<Value> = rates
            .iter()
            .map(|(client, rates)| {
                json!({
                    "client": client.0,
                    "main_bits_per_s": rates.main_bits_per_s,
                    "federated_bits_per_s": rates.federated_bits_per_s,
                })
            })
            .collect();
        // Those that hold: a later decision does not repeat them.
        let cuts: BTreeMap<u64, usize> = main.cuts.iter().map(|(client, cut)| (client.0, *cut)).collect();
        let own_cuts: Vec<Value> = (cuts.iter())
            .map(|(client, cut)| json!({ "client": client, "cut": cut }))
            .collect();
        let predicted_s = prediction.as_ref().map(|prediction| prediction.total_s);
        let fields = json!({
            "round": round, "cut": cut, "cuts": own_cuts, "rank": rank, "reason": reason, "rates": rates,
            "predicted_s": predicted_s,
        });
        self.parts.metrics.event(at, "plan", fields);
        (self.parts.report)(Report::Planned {
            round,
            cut,
            cuts,
            rank,
            reason,
        });
        main.next_prediction = prediction;
        Ok(())
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

    fn main_event(&mut self, event: MainEvent) -> Result<(), Error> {
        let at = self.parts.origin.elapsed().as_secs_f64();
        let address = |connections: &HashMap<ConnectionId, Connection>, connection: &ConnectionId| {
            connections
                .get(connection)
                .map(|connection| connection.address.to_string())
        };
        let Some(main) = &mut self.parts.main else {
            return Ok(());
        };
        let (metrics, report) = (&mut self.parts.metrics, &self.parts.report);
        match event {
            MainEvent::ClientRefused { connection, reason } => self.refused(connection, reason),
            MainEvent::ClientJoined {
                connection,
                client,
                name,
                device,
            } => {
                let address = address(&self.connections, &connection);
                main.names.insert(client.0, name.clone());
                let fields = json!({ "client": client.0, "name": name, "device": device, "address": address });
                metrics.event(at, "joined", fields);
                report(Report::Joined {
                    client: client.0,
                    name,
                    device,
                });
            }
            MainEvent::ClientReady { client } => metrics.event(at, "ready", json!({ "client": client.0 })),
            MainEvent::ClientLeft { client, name, reason } => {
                let reason = reason.to_string();
                metrics.event(
                    at,
                    "left",
                    json!({ "client": client.0, "name": name, "reason": reason }),
                );
                report(Report::Left {
                    client: client.0,
                    name,
                    reason,
                });
            }
            MainEvent::RoundStarted { round, members } => {
                (main.round_started, main.step_started) = (Instant::now(), Instant::now());
                main.planning = Duration::ZERO;
                main.prediction.clone_from(&main.next_prediction);
                main.measured = RoundMeasure {
                    round: round.round + 1,
                    collected: std::mem::take(&mut main.measured.collected),
                    ..RoundMeasure::default()
                };
                let clients: Vec<u64> = members.iter().map(|client| client.0).collect();
                let fields = json!({ "round": round.round + 1, "attempt": round.attempt, "clients": clients });
                metrics.event(at, "round_started", fields);
                report(Report::RoundStarted {
                    round: round.round + 1,
                    members: members.len(),
                });
            }
            MainEvent::StepReady { key, contributions } => {
                main.step_gathered = Instant::now();
                main.compute(Work::Step { key, contributions })?;
            }
            MainEvent::StepMeasured { key, clients } => {
                for times in &clients {
                    main.measured.add(times);
                }
                if let Some((_, mut record)) = main.pending_step.take_if(|(pending, _)| *pending == key) {
                    record.phases = clients.iter().map(phases).collect();
                    metrics.step(&record);
                }
            }
            MainEvent::PlanWanted { occasion } => {
                main.planning_since = Some((occasion, Instant::now()));
                let facts = main.facts(occasion);
                main.compute(Work::Plan(Box::new(facts)))?;
            }
            MainEvent::RoundClosed {
                round,
                average,
                moments,
                split,
                included,
                excluded,
                collected,
            } => {
                let measured_s = main.round_started.elapsed().saturating_sub(main.planning);
                let prediction = main.prediction.as_ref();
                let phases = main.measured.phases(&collected, prediction);
                let server = ServerPhase {
                    predicted_s: prediction.map(|prediction| prediction.server_s),
                    measured_s: main.measured.server_s(),
                };
                main.measured.collected = collected;
                main.pending_round = Some(RoundRecord {
                    round: round.round + 1,
                    adapters: included.len(),
                    excluded: excluded
                        .iter()
                        .map(|exclusion| {
                            let name = main.names.get(&exclusion.client.0);
                            let reason = exclusion.reason.to_string();
                            json!({ "client": exclusion.client.0, "name": name, "reason": reason })
                        })
                        .collect(),
                    predicted_s: prediction.map(|prediction| prediction.total_s),
                    measured_s: measured_s.as_secs_f64(),
                    phases,
                    server,
                    ..RoundRecord::default()
                });
                main.compute(Work::Close {
                    round,
                    average,
                    moments,
                    split: split as usize,
                })?;
            }
            MainEvent::RoundLost { round } => {
                metrics.event(
                    at,
                    "round_lost",
                    json!({ "round": round.round + 1, "attempt": round.attempt }),
                );
                report(Report::RoundLost { round: round.round + 1 });
                main.compute(Work::Restore)?;
            }
            MainEvent::CopyWanted { round } => main.compute(Work::Copy { round })?,
            MainEvent::Waiting { until } => {
                let limit = until.saturating_sub(self.parts.origin.elapsed());
                metrics.event(at, "waiting", json!({ "seconds": limit.as_secs_f64() }));
                report(Report::Waiting { limit });
            }
            MainEvent::Finished { reason } => {
                if let Some((_, record)) = main.pending_step.take() {
                    metrics.step(&record);
                }
                main.outcome = Some(reason);
                self.end_by.get_or_insert(Instant::now() + DRAIN_LIMIT);
                // A thread that has failed has said so already; there is nothing more it could save.
                if self.failure.is_none() {
                    main.compute(Work::Finish)?;
                }
            }
            MainEvent::Drained => main.drained = true,
        }
        Ok(())
    }

    fn federated_event(&mut self, event: FederatedEvent) {
        let at = self.parts.origin.elapsed().as_secs_f64();
        // In one process the main server's side tells the same.
        let alone = self.parts.main.is_none();
        let (metrics, report) = (&mut self.parts.metrics, &self.parts.report);
        match event {
            FederatedEvent::ClientRefused { connection, reason } => self.refused(connection, reason),
            FederatedEvent::ClientJoined { client, name, .. } if alone => {
                metrics.event(at, "joined", json!({ "client": client.0, "name": name }));
                report(Report::Joined {
                    client: client.0,
                    name,
                    device: String::new(),
                });
            }
            FederatedEvent::ClientLeft { client, reason } if alone => {
                let reason = reason.to_string();
                metrics.event(at, "left", json!({ "client": client.0, "reason": reason }));
                report(Report::Left {
                    client: client.0,
                    name: String::new(),
                    reason,
                });
            }
            FederatedEvent::ControlConnected { connection } => {
                let address = self
                    .connections
                    .get(&connection)
                    .map(|connection| connection.address.to_string());
                metrics.event(at, "main_server_connected", json!({ "address": address }));
                report(Report::Link {
                    connected: true,
                    detail: address.unwrap_or_default(),
                });
            }
            // After the end of the run it is expected.
            FederatedEvent::ControlLost if self.run_closed => {}
            FederatedEvent::ControlLost => {
                metrics.event(at, "main_server_lost", json!({}));
                report(Report::Link {
                    connected: false,
                    detail: "the main server's connection is lost".to_owned(),
                });
            }
            FederatedEvent::UpdateAccepted {
                client,
                round,
                examples,
            } => {
                let fields = json!({ "client": client.0, "round": round.round + 1, "examples": examples });
                metrics.event(at, "update", fields);
            }
            FederatedEvent::ClientExcluded { client, round, reason } => {
                let fields = json!({ "client": client.0, "round": round.round + 1, "reason": reason.to_string() });
                metrics.event(at, "excluded", fields);
            }
            FederatedEvent::RoundClosed { round, included, .. } if alone => {
                self.summary.rounds = self.summary.rounds.max(round.round + 1);
                let fields = json!({ "round": round.round + 1, "adapters": included.len() });
                metrics.event(at, "averaged", fields);
                report(Report::Averaged {
                    round: round.round + 1,
                    adapters: included.len(),
                });
            }
            FederatedEvent::RunClosed => {
                self.run_closed = true;
                if alone {
                    self.end_by.get_or_insert(Instant::now() + DRAIN_LIMIT);
                }
            }
            FederatedEvent::ClientJoined { .. }
            | FederatedEvent::ClientLeft { .. }
            | FederatedEvent::RoundClosed { .. } => {}
        }
    }

    fn refused(&mut self, connection: ConnectionId, reason: RefusalReason) {
        let now = self.now();
        let Some(Connection { address, .. }) = self.connections.get(&connection) else {
            return;
        };
        if reason.is_authorisation_failure() {
            self.parts
                .failures
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .failed(*address, now);
        }
        let fields = json!({ "address": address.to_string(), "reason": reason.to_string() });
        self.parts.metrics.event(now.as_secs_f64(), "refused", fields);
        (self.parts.report)(Report::Refused {
            address: *address,
            reason: reason.to_string(),
        });
    }

    /// Hands control messages between the two sessions, or to and from the link. Returns whether there were any.
    fn exchange_control(&mut self) -> bool {
        let now = self.parts.origin.elapsed();
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
                ControlEvent::ConnectionLost { .. } => {}
                ControlEvent::Connected => {
                    link.last_error = None;
                    report(Report::Link {
                        connected: true,
                        detail: link.federated.to_string(),
                    });
                    main.session.control_connected(now);
                }
                ControlEvent::Failed(reason) => {
                    let error = match link.last_error.take() {
                        Some(error) => Error::Transport(error),
                        None => Error::Federated(reason.to_string()),
                    };
                    self.fail(error);
                }
            }
        }
        any
    }

    fn handle_link(&mut self, socket: u64, event: SocketEvent) {
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
        while let Some(transmit) = self.parts.link.as_mut().and_then(|link| link.session.poll_transmit()) {
            any = true;
            let now = self.parts.origin.elapsed();
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

    fn send(&mut self, transmit: Transmit<ConnectionId>) {
        let (connection, outgoing) = match transmit {
            Transmit::Frame { to, bytes } => {
                self.total.down += bytes.len() as u64;
                (to, Outgoing::Frame(bytes))
            }
            Transmit::Close { to } => (to, Outgoing::Close),
        };
        let closing = matches!(outgoing, Outgoing::Close);
        let Some(open) = self.connections.get(&connection) else {
            return;
        };
        let sent = open.outgoing.try_send(outgoing).is_ok();
        if closing || !sent {
            // Dropping the sender lets the connection's task write what it has and end. A full queue means a peer that
            // does not read.
            self.closed(connection);
        }
    }

    /// Brings `/status` and the sockets' limit up to date.
    fn publish(&mut self) {
        let (main, federated) = (&self.parts.main, &self.parts.federated);
        let limit = main
            .as_ref()
            .map_or(0, |main| main.session.max_frame_bytes())
            .max(match federated {
                Some(federated) => match federated.max_frame_bytes() {
                    MAX_FRAME_BYTES => 0,
                    bytes => bytes,
                },
                None => 0,
            });
        self.parts
            .max_frame_bytes
            .store(limit.max(super::socket::SMALL_FRAME_BYTES), Ordering::Relaxed);

        let status = match main {
            Some(main) => main_status(main, &self.summary),
            None => json!({ "role": "federated", "rounds_averaged": self.summary.rounds }),
        };
        self.parts.status.send_if_modified(|current| {
            let changed = *current != status;
            if changed {
                *current = status;
            }
            changed
        });
    }
}

fn main_status(main: &MainRun, summary: &Summary) -> Value {
    let status = main.session.status();
    let state = match status.phase {
        RunPhase::Waiting => "waiting",
        RunPhase::Gathering => "gathering",
        RunPhase::Computing => "computing",
        RunPhase::Boundary => "planning",
        RunPhase::Averaging => "averaging",
        RunPhase::Validating => "validating",
        RunPhase::Finished => "finished",
    };
    let clients: Vec<Value> = status
        .clients
        .iter()
        .map(|client| {
            json!({
                "client": client.client.0, "name": client.name, "device": client.device,
                "ready": client.ready, "member": client.member, "awaited": client.awaited,
            })
        })
        .collect();
    json!({
        "role": "main",
        "model": main.about.model,
        "cut": main.cut,
        "rank": main.rank,
        "state": state,
        "round": status.round + 1,
        "rounds": status.rounds,
        "step": status.round * status.local_steps + status.step,
        "steps": status.rounds * status.local_steps,
        "clients": clients,
        "valid_perplexity": summary.last.map(|evaluation| evaluation.perplexity),
    })
}

fn validated(record: RoundRecord, evaluation: Option<Evaluation>) -> RoundRecord {
    RoundRecord {
        valid_loss: evaluation.map(|evaluation| evaluation.loss),
        valid_perplexity: evaluation.map(|evaluation| evaluation.perplexity),
        valid_tokens: evaluation.map(|evaluation| evaluation.tokens),
        ..record
    }
}

/// The next event of the link; never, without a link.
async fn link_event(link: &mut Option<RemoteLink>) -> Option<(u64, SocketEvent)> {
    match link {
        Some(link) => link.events.recv().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
