//! The session between its sockets, the compute thread and the files.
//!
//! Separate from what a caller sees: whoever joins a run gives settings and gets reports.

use std::path::PathBuf;
use std::sync::mpsc as thread_mpsc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::super::{self as client, Plan, capabilities};
use super::fetch::Fetcher;
use super::thread::{Reply, Task, start_thread};
use super::{Error, Report, Settings, Source, Summary};
use crate::protocol::message::{Assignment, Blob, PROTOCOL_VERSION};
use crate::protocol::{
    ClientConfig, ClientEvent, ClientFailure, ClientSession, Endpoint, FinishReason, MAX_FRAME_BYTES, Transmit,
};
use crate::transport::{self, JoinLink, SocketEvent};

/// Failed connections in a row before a client gives up; the pauses between them grow.
const RETRIES: u32 = 8;
/// How long the very first connection is tried: the server may be about to start.
const FIRST_CONNECTION: Duration = Duration::from_secs(6);
/// How long to wait at the end for the last frames to be sent.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// Takes part until the run is over, or until `stop` becomes true.
///
/// # Errors
/// [`Error`] says what to do.
pub async fn join(
    settings: Settings,
    stop: watch::Receiver<bool>,
    report: impl Fn(Report) + Send + Sync + 'static,
) -> Result<Summary, Error> {
    let (tasks, replies) = start_thread(settings.engine.clone(), settings.source.clone())?;
    let session = ClientSession::new(
        ClientConfig {
            version: PROTOCOL_VERSION,
            name: settings.name.clone(),
            capabilities: capabilities(settings.engine.name(), 0),
            model: None,
            tokenizer: None,
            secret: settings.token.clone(),
            retries: RETRIES,
        },
        Duration::ZERO,
    );
    let (socket_sender, socket_events) = mpsc::channel(64);
    let driver = Driver {
        session,
        origin: Instant::now(),
        settings,
        report: std::sync::Arc::new(report),
        sockets: [Socket::default(), Socket::default()],
        socket_sender,
        tasks,
        plan: None,
        generation: 0,
        loaded: (0, Vec::new()),
        has_connected: false,
        last_error: None,
        unsaved: None,
        summary: Summary {
            reason: FinishReason::Left,
            steps: 0,
            tokens: 0,
            bytes_up: 0,
            bytes_down: 0,
            seconds: 0.0,
        },
        outcome: None,
    };
    driver.run(socket_events, replies, stop).await
}

#[derive(Default)]
struct Socket {
    /// Counts the sockets of this endpoint, so that what an old one still says is not taken for the new one's.
    number: u64,
    outgoing: Option<mpsc::Sender<Vec<u8>>>,
    /// Opening or open.
    live: bool,
}

type Tag = (Endpoint, u64);
type Fetched = (u64, Result<(Vec<PathBuf>, Option<PathBuf>), Error>);

struct Driver {
    session: ClientSession,
    origin: Instant,
    settings: Settings,
    report: std::sync::Arc<dyn Fn(Report) + Send + Sync>,
    sockets: [Socket; 2],
    socket_sender: mpsc::Sender<(Tag, SocketEvent)>,
    tasks: thread_mpsc::Sender<Task>,
    plan: Option<Plan>,
    /// Counts the assignments.
    generation: u64,
    /// The generation that was loaded last, and its parts.
    loaded: (u64, Vec<Blob>),
    has_connected: bool,
    last_error: Option<transport::Error>,
    /// The last adapter, where it could not be saved.
    unsaved: Option<Vec<f32>>,
    summary: Summary,
    outcome: Option<Result<FinishReason, Error>>,
}

impl Driver {
    async fn run(
        mut self,
        mut socket_events: mpsc::Receiver<(Tag, SocketEvent)>,
        mut replies: mpsc::Receiver<Reply>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Summary, Error> {
        let (fetch_sender, mut fetched) = mpsc::channel::<Fetched>(1);
        let mut stoppable = true;
        loop {
            if let Err(error) = self.settle(&fetch_sender) {
                self.fail(error);
            }
            if self.outcome.is_some() {
                break;
            }
            let deadline = self.session.poll_timeout().map(|timeout| self.origin + timeout);
            let handled = tokio::select! {
                Some((tag, event)) = socket_events.recv() => self.socket_event(tag, event),
                reply = replies.recv() => match reply {
                    Some(reply) => self.reply(reply),
                    None => Err(Error::ThreadGone),
                },
                Some((generation, files)) = fetched.recv() => self.fetched(generation, files),
                changed = stop.wait_for(|stop| *stop), if stoppable => {
                    // Without a sender nobody will ever stop this client.
                    stoppable = changed.is_ok();
                    if stoppable {
                        let now = self.now();
                        self.session.leave(now);
                    }
                    Ok(())
                }
                () = sleep_until(deadline) => {
                    let now = self.now();
                    self.session.handle_timeout(now);
                    Ok(())
                }
            };
            if let Err(error) = handled {
                self.fail(error);
            }
        }
        self.close(socket_events).await;
        self.summary.seconds = self.origin.elapsed().as_secs_f64();
        if let (Some(values), Some(Ok(_))) = (self.unsaved.take(), &self.outcome) {
            self.save(&values)?;
        }
        match self.outcome {
            Some(Ok(reason)) => Ok(Summary { reason, ..self.summary }),
            Some(Err(error)) => Err(error),
            None => Err(Error::ThreadGone),
        }
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Takes leave, with this error as the reason.
    fn fail(&mut self, error: Error) {
        let now = self.now();
        self.session.leave(now);
        while let Some(transmit) = self.session.poll_transmit() {
            self.transmit(transmit);
        }
        if !matches!(self.outcome, Some(Err(_))) {
            self.outcome = Some(Err(error));
        }
    }

    /// Lets the last frames out.
    async fn close(&mut self, mut socket_events: mpsc::Receiver<(Tag, SocketEvent)>) {
        for socket in &mut self.sockets {
            socket.outgoing = None;
        }
        let drained = async {
            while self.sockets.iter().any(|socket| socket.live) {
                match socket_events.recv().await {
                    Some(((endpoint, number), SocketEvent::Closed(_))) => {
                        let socket = &mut self.sockets[index(endpoint)];
                        socket.live &= socket.number != number;
                    }
                    Some(_) => {}
                    None => break,
                }
            }
        };
        // What has not gone out by then is lost; the server finds out by itself.
        let _ = tokio::time::timeout(CLOSE_LIMIT, drained).await;
    }

    fn task(&self, task: Task) -> Result<(), Error> {
        self.tasks.send(task).map_err(|_| Error::ThreadGone)
    }

    fn socket_event(&mut self, (endpoint, number): Tag, event: SocketEvent) -> Result<(), Error> {
        let now = self.now();
        let socket = &mut self.sockets[index(endpoint)];
        if socket.number != number {
            return Ok(());
        }
        match event {
            SocketEvent::Opened(outgoing) => {
                socket.outgoing = Some(outgoing);
                self.last_error = None;
                if !self.has_connected {
                    (self.report)(Report::Connected);
                }
                self.has_connected = true;
                self.session.connected(endpoint, now);
            }
            SocketEvent::Frame(bytes) => {
                self.summary.bytes_down += bytes.len() as u64;
                self.session.handle_frame(endpoint, now, &bytes);
            }
            SocketEvent::Closed(error) => {
                socket.outgoing = None;
                socket.live = false;
                if let Some(error) = error {
                    let late = !self.has_connected && self.origin.elapsed() > FIRST_CONNECTION;
                    if !error.is_transient() || late {
                        return Err(error.into());
                    }
                    self.last_error = Some(error);
                }
                self.session.disconnected(endpoint, now);
            }
        }
        Ok(())
    }

    fn reply(&mut self, reply: Reply) -> Result<(), Error> {
        let now = self.now();
        match reply {
            Reply::Loaded {
                generation,
                data,
                speed,
            } if generation == self.generation => {
                if let Some(plan) = &self.plan {
                    self.loaded = (generation, plan.units().to_vec());
                    let done = u32::try_from(self.summary.steps).unwrap_or(u32::MAX);
                    let steps = plan.rounds.saturating_mul(plan.local_steps).saturating_sub(done);
                    (self.report)(Report::Loaded {
                        data,
                        blocks: plan.cut,
                        rounds: plan.rounds,
                        steps,
                    });
                }
                self.session.ready(now, speed);
            }
            Reply::Loaded { .. } => {}
            Reply::Activations(input) => self.session.activations(now, input)?,
            Reply::StepDone { key, took } => {
                self.summary.steps += 1;
                self.session.step_done(now, key, took);
            }
            Reply::Adapter(input) => self.session.adapter(now, input)?,
            Reply::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn fetched(&mut self, generation: u64, files: Result<(Vec<PathBuf>, Option<PathBuf>), Error>) -> Result<(), Error> {
        if generation != self.generation {
            return Ok(());
        }
        let (units, tokenizer) = files?;
        match &self.plan {
            Some(plan) => self.task(Task::Load {
                generation,
                plan: Box::new(plan.clone()),
                units,
                tokenizer,
            }),
            None => Ok(()),
        }
    }

    /// Carries out everything the session asks for.
    fn settle(&mut self, fetch: &mpsc::Sender<Fetched>) -> Result<(), Error> {
        loop {
            let mut quiet = true;
            while let Some(transmit) = self.session.poll_transmit() {
                quiet = false;
                self.transmit(transmit);
            }
            while let Some(event) = self.session.poll_event() {
                quiet = false;
                self.event(event, fetch)?;
            }
            if quiet {
                return Ok(());
            }
        }
    }

    fn transmit(&mut self, transmit: Transmit<Endpoint>) {
        let now = self.now();
        let (endpoint, frame) = match transmit {
            Transmit::Frame { to, bytes } => (to, Some(bytes)),
            Transmit::Close { to } => (to, None),
        };
        let socket = &mut self.sockets[index(endpoint)];
        let Some(outgoing) = &socket.outgoing else { return };
        match frame {
            Some(bytes) => {
                self.summary.bytes_up += bytes.len() as u64;
                if outgoing.try_send(bytes).is_err() {
                    // A full queue means a server that does not read.
                    socket.outgoing = None;
                    socket.number += 1;
                    self.session.disconnected(endpoint, now);
                }
            }
            // The task behind it writes what it has, and ends.
            None => socket.outgoing = None,
        }
    }

    fn event(&mut self, event: ClientEvent, fetch: &mpsc::Sender<Fetched>) -> Result<(), Error> {
        match event {
            ClientEvent::Connect { endpoint, url } => self.connect(endpoint, url.as_deref())?,
            ClientEvent::ConnectionLost { endpoint, .. } => {
                if self.has_connected {
                    let reason = self.last_error.as_ref().map(ToString::to_string);
                    (self.report)(Report::ConnectionLost { endpoint, reason });
                }
            }
            ClientEvent::Assigned(assignment) => self.assigned(&assignment, fetch)?,
            ClientEvent::RoundStarted { round, members } => {
                let rounds = self.plan.as_ref().map_or(0, |plan| plan.rounds);
                (self.report)(Report::RoundStarted {
                    round: round.round + 1,
                    rounds,
                    members,
                });
                self.task(Task::BeginRound)?;
            }
            ClientEvent::InstallAdapter { values, moments, .. } => {
                self.keep(&values);
                self.task(Task::Install { values, moments })?;
            }
            ClientEvent::ComputeForward { key } => self.task(Task::Forward(key))?,
            ClientEvent::ComputeBackward { key, gradient } => {
                let (local_steps, rounds) = self
                    .plan
                    .as_ref()
                    .map_or((0, 0), |plan| (plan.local_steps, plan.rounds));
                self.summary.tokens += gradient.tokens;
                (self.report)(Report::Step {
                    step: key.round.round.saturating_mul(local_steps).saturating_add(key.step + 1),
                    steps: rounds.saturating_mul(local_steps),
                    loss: gradient.loss,
                    mean_loss: gradient.mean_loss,
                    tokens: gradient.tokens,
                });
                self.task(Task::Backward {
                    key,
                    gradient: Box::new(gradient),
                })?;
            }
            ClientEvent::UploadAdapter { round, split, steps } => self.task(Task::Collect { round, split, steps })?,
            ClientEvent::RoundResult(result) => (self.report)(Report::Round(result)),
            // Taking leave because of an error ends well for the session only.
            ClientEvent::Finished(reason) => {
                self.outcome.get_or_insert(Ok(reason));
            }
            ClientEvent::Failed(failure) => {
                // Why the last connection failed says more than that it did.
                let unreachable = matches!(failure, ClientFailure::Unreachable { .. });
                return Err(match (self.last_error.take().filter(|_| unreachable), failure) {
                    (Some(error), _) => error.into(),
                    (None, ClientFailure::Refused { refused, .. }) => {
                        let reason = refused.reason.to_string();
                        let more = if refused.detail == reason {
                            String::new()
                        } else {
                            format!(" ({})", refused.detail)
                        };
                        Error::Refused(reason + &more)
                    }
                    (None, failure) => failure.into(),
                });
            }
        }
        Ok(())
    }

    fn connect(&mut self, endpoint: Endpoint, url: Option<&str>) -> Result<(), Error> {
        let (origin, dialer) = match url {
            Some(url) => {
                let link: JoinLink = url.parse()?;
                (link.origin.clone(), self.settings.dialer.toward(&link)?)
            }
            None => (self.settings.server.clone(), self.settings.dialer.clone()),
        };
        let path = match endpoint {
            Endpoint::Main => "/main",
            Endpoint::Federated => "/federated",
        };
        let socket = &mut self.sockets[index(endpoint)];
        socket.number += 1;
        socket.outgoing = None;
        socket.live = true;
        let tag = (endpoint, socket.number);
        dialer.open(tag, &origin, path, MAX_FRAME_BYTES, self.socket_sender.clone());
        Ok(())
    }

    fn assigned(&mut self, assignment: &Assignment, fetch: &mpsc::Sender<Fetched>) -> Result<(), Error> {
        let plan = Plan::new(assignment)?;
        // What the thread surely has need not be fetched.
        let there = match &self.loaded {
            (generation, units) if *generation == self.generation => {
                let same = units.iter().zip(plan.units()).take_while(|(old, new)| old == new);
                same.count()
            }
            _ => 0,
        };
        self.generation += 1;
        let (generation, fetch) = (self.generation, fetch.clone());
        let fetcher = Fetcher {
            dialer: self.settings.dialer.clone(),
            server: self.settings.server.clone(),
            bearer: self.session.bearer(),
            cache: self.settings.cache.clone(),
            report: self.report.clone(),
        };
        // Who has examples already needs no tokenizer.
        let tokenizer = match self.settings.source {
            Source::File { .. } => plan.tokenizer().cloned(),
            Source::Examples(_) => None,
        };
        let units = plan.units().iter().skip(there).cloned().collect::<Vec<_>>();
        self.plan = Some(plan);
        tokio::spawn(async move {
            let files = fetcher.fetch_all(&units, tokenizer.as_ref()).await;
            // The driver may have ended meanwhile.
            let _ = fetch.send((generation, files)).await;
        });
        Ok(())
    }

    /// Saves a round's adapter, for which there will be another time.
    fn keep(&mut self, values: &[f32]) {
        match self.save(values) {
            Ok(()) => self.unsaved = None,
            Err(error) => {
                if self.unsaved.is_none() {
                    let detail = error.to_string();
                    (self.report)(Report::Unsaved { detail });
                }
                self.unsaved = Some(values.to_vec());
            }
        }
    }

    /// Saves the client's side of the adapter, if asked to.
    fn save(&self, values: &[f32]) -> Result<(), Error> {
        let (Some(directory), Some(plan)) = (&self.settings.adapter_out, &self.plan) else {
            return Ok(());
        };
        plan.adapter(values)
            .and_then(|adapter| adapter.save(directory, &plan.config, ""))
            .map_err(|error| client::Error::from(error).into())
    }
}

fn index(endpoint: Endpoint) -> usize {
    match endpoint {
        Endpoint::Main => 0,
        Endpoint::Federated => 1,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
