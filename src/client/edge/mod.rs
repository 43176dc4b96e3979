//! An edge client as one state machine without clock, socket, thread, file or device.
//!
//! It owns the session with both servers and everything around it that would otherwise be decided once in each driver: what is
//! fetched, computed and kept, when what failed is tried again, and what people are told. A driver carries out its outputs (`poll`)
//! and answers them; after every answer it polls again. The time is an argument: a `Duration` since any fixed moment.
//!
//! **Rounds are done or undone as a whole.** The machine keeps where training stood when the last rounds began. A round that came
//! to nothing for this client, because it crashed, lost its connection or the round was begun again, leaves no trace: before the
//! next one it goes back. What it has sent to be averaged counts as done, unless that round is begun again.
//!
//! **What is sent builds on what is kept.** Nothing leaves while something is being stored. So a client that comes back after a
//! crash has the ticket that is good, and never trains again on data that is in an average. Where nothing can be stored, it goes on
//! without and tries again.
//!
//! | file | holds |
//! |---|---|
//! | `task` | what the driver is asked, told and shown |
//! | `state` | what is kept, as bytes |
//! | `answer` | what the answers come to |
//! | `waiting` | how long people are told that something is waited for |

mod answer;
mod state;
mod task;
mod waiting;

use std::collections::VecDeque;
use std::time::Duration;

use state::CHECKPOINTS;
pub use state::{Checkpoint, State, StateError};
pub use task::{Awaited, Cause, Config, Done, Failure, Fetch, Output, Report, Standing, Task, Wanted};
use waiting::Countdown;

use crate::protocol::message::{Digest, RunConfig};
use crate::protocol::{ClientEvent, ClientFailure, ClientSession, FinishReason, Passport, Transmit};
use crate::terms::ids::{RoundKey, StepKey};

/// How long the very first connection is tried: the server may be about to start.
const FIRST_CONNECTION: Duration = Duration::from_secs(6);
/// Until what could not be stored is stored again, unless there is something new before that.
const STORE_PAUSE: Duration = Duration::from_secs(30);
/// Until what could not be fetched is fetched again, at first; it doubles …
const FETCH_PAUSE: Duration = Duration::from_secs(1);
/// … up to this.
const LONGEST_FETCH_PAUSE: Duration = Duration::from_secs(30);

/// What a finished or running client has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Local steps.
    pub steps: u64,
    /// Targets they were about.
    pub tokens: u64,
}

/// A task that the driver is at.
struct Busy {
    generation: u64,
    about: About,
}

/// What the answer to a task is needed for.
enum About {
    Round(RoundKey),
    Moments,
    Step {
        key: StepKey,
        loss: f32,
        mean_loss: f32,
        tokens: u64,
    },
    Loading,
    Other,
}

/// Files on their way.
struct Fetching {
    fetch: Fetch,
    failures: u32,
    /// When the first of the attempts that failed in a row did.
    since: Option<Duration>,
    again_at: Option<Duration>,
}

/// The machine. `C` is why its driver could not do something.
pub struct Edge<C> {
    session: ClientSession,
    server: String,
    keeps: bool,
    give_up: Duration,
    started: Duration,

    // Connections.
    has_connected: bool,
    /// The main server was reached last, and not lost since: what else is waited for is of interest.
    is_in_touch: bool,
    last_cause: Option<C>,
    countdowns: Vec<Countdown>,

    // Work.
    /// Counts the assignments, so that work for an old one is recognised when it ends.
    generation: u64,
    assigned: Option<RunConfig>,
    fetching: Option<Fetching>,
    queue: VecDeque<Task>,
    busy: Option<Busy>,
    leaving: bool,
    tally: Tally,

    // What is kept.
    passport: Option<Passport>,
    data: Option<Digest>,
    checkpoints: Vec<Checkpoint>,
    /// The round at whose beginning training stands.
    stands_at: Option<u32>,
    /// Moments of other blocks have come since.
    gained: bool,
    unstored: bool,
    storing: bool,
    store_again_at: Option<Duration>,
    store_failed: bool,

    outputs: VecDeque<Output<C>>,
    end: Option<Result<FinishReason, Failure<C>>>,
    over: bool,
}

impl<C: Cause> Edge<C> {
    /// A client that asks for its first socket at once.
    pub fn new(config: Config, now: Duration) -> Self {
        let Config {
            mut client,
            server,
            keeps,
            resume,
        } = config;
        let (passport, data, checkpoints) = match resume {
            Some(state) => (Some(state.passport), state.data, state.checkpoints),
            None => (None, None, Vec::new()),
        };
        client.passport.clone_from(&passport);
        Self {
            give_up: client.give_up,
            session: ClientSession::new(client, now),
            server,
            keeps,
            started: now,
            has_connected: false,
            is_in_touch: false,
            last_cause: None,
            countdowns: Vec::new(),
            generation: 0,
            assigned: None,
            fetching: None,
            queue: VecDeque::new(),
            busy: None,
            leaving: false,
            tally: Tally::default(),
            passport,
            data,
            checkpoints,
            stands_at: None,
            gained: false,
            unstored: false,
            storing: false,
            store_again_at: None,
            store_failed: false,
            outputs: VecDeque::new(),
            end: None,
            over: false,
        }
    }

    /// What the main server gives weights for, once the client is in: for `Authorization: Bearer`.
    pub fn bearer(&self) -> Option<String> {
        self.session.bearer()
    }

    /// What it has done so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Whether the files of this number are still wanted.
    pub fn is_fetching(&self, number: u64) -> bool {
        self.fetching
            .as_ref()
            .is_some_and(|fetching| fetching.fetch.number == number)
    }

    /// What the driver is to do next; `None` when it has to wait for an answer, a frame or the time.
    pub fn poll(&mut self) -> Option<Output<C>> {
        loop {
            if let Some(output) = self.outputs.pop_front() {
                return Some(output);
            }
            if self.over {
                return None;
            }
            self.see_passport();
            if self.unstored && !self.storing {
                self.store();
                continue;
            }
            if !self.storing
                && let Some(transmit) = self.session.poll_transmit()
            {
                return Some(match transmit {
                    Transmit::Frame { to, bytes } => Output::Transmit { endpoint: to, bytes },
                    Transmit::Close { to } => Output::Close { endpoint: to },
                });
            }
            if let Some(event) = self.session.poll_event() {
                self.handle(event);
                continue;
            }
            if self.end.is_some() {
                if self.storing {
                    return None;
                }
                self.over = true;
                if self.keeps && matches!(self.end, Some(Ok(FinishReason::Completed))) {
                    self.outputs.push_back(Output::Forget);
                }
                self.outputs.extend(self.end.take().map(Output::End));
                continue;
            }
            return self.next_task().map(Output::Compute);
        }
    }

    /// When to call `timeout`.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if self.over {
            return None;
        }
        let fetch = self.fetching.as_ref().and_then(|fetching| fetching.again_at);
        let ticks = self.countdowns.iter().map(|countdown| countdown.next);
        let due = [self.session.poll_timeout(), fetch, self.store_again_at];
        due.into_iter().flatten().chain(ticks).min()
    }

    /// The time told by `poll_timeout` has come, or any other.
    pub fn timeout(&mut self, now: Duration) {
        if self.over {
            return;
        }
        self.session.handle_timeout(now);
        if let Some(fetching) = &mut self.fetching
            && fetching.again_at.take_if(|due| *due <= now).is_some()
        {
            self.countdowns.retain(|countdown| countdown.what != Awaited::Weights);
            self.outputs.push_back(Output::Fetch(fetching.fetch.clone()));
        }
        if self.store_again_at.take_if(|due| *due <= now).is_some() {
            self.unstored = true;
        }
        self.tick(now);
    }

    /// Finishes what is being computed, then says goodbye.
    pub fn leave(&mut self, now: Duration) {
        self.leaving = true;
        let short = self
            .busy
            .as_ref()
            .is_some_and(|busy| !matches!(busy.about, About::Loading));
        if !short {
            self.session.leave(now);
        }
    }

    // People.

    fn show(&mut self, report: Report) {
        self.outputs.push_back(Output::Show(report));
    }

    // What is kept.

    /// Takes over who the client is, if that has changed.
    fn see_passport(&mut self) {
        let Some(current) = self.session.passport() else { return };
        if self.passport.as_ref() == Some(current) {
            return;
        }
        let before = self.passport.replace(current.clone());
        let client = current.client;
        let again = match before {
            Some(before) if before.run != current.run => {
                self.checkpoints.clear();
                self.data = None;
                self.stands_at = None;
                self.show(Report::OtherRun);
                false
            }
            Some(before) if before.client != client => {
                self.show(Report::Unknown);
                false
            }
            before => before.is_some(),
        };
        self.unstored = true;
        if !self.storing {
            // Before anybody hears of it.
            self.store();
        }
        self.show(Report::Admitted { client, again });
    }

    fn store(&mut self) {
        self.unstored = false;
        self.store_again_at = None;
        if let Some(passport) = self.passport.clone().filter(|_| self.keeps) {
            let state = State {
                passport,
                server: self.server.clone(),
                data: self.data,
                checkpoints: self.checkpoints.clone(),
            };
            self.storing = true;
            self.outputs.push_back(Output::Store(state.encode()));
        }
    }

    /// Training stands at the beginning of this round.
    fn keep(&mut self, round: u32, standing: Standing) {
        self.checkpoints.retain(|checkpoint| checkpoint.round < round);
        self.checkpoints.push(Checkpoint { round, standing });
        let surplus = self.checkpoints.len().saturating_sub(CHECKPOINTS);
        self.checkpoints.drain(..surplus);
        self.stands_at = Some(round);
        self.unstored = true;
    }

    // Work.

    /// The task that is next, if none is under way.
    fn next_task(&mut self) -> Option<Task> {
        if self.busy.is_some() || self.leaving {
            return None;
        }
        let mut task = self.queue.pop_front()?;
        let about = match &mut task {
            Task::BeginRound { round, restore, keep } => {
                // What comes after it never happened.
                self.checkpoints.retain(|checkpoint| checkpoint.round <= round.round);
                let last = self.checkpoints.last();
                *restore = last
                    .filter(|checkpoint| self.stands_at != Some(checkpoint.round))
                    .map(|checkpoint| Box::new(checkpoint.standing.clone()));
                *keep = self.gained || last.is_none_or(|checkpoint| checkpoint.round != round.round);
                About::Round(*round)
            }
            Task::Install { moments: Some(_), .. } => About::Moments,
            Task::Forward(_) => {
                self.stands_at = None;
                About::Other
            }
            Task::Backward { key, gradient } => About::Step {
                key: *key,
                loss: gradient.loss,
                mean_loss: gradient.mean_loss,
                tokens: gradient.tokens,
            },
            Task::Assign(_) | Task::Load => About::Loading,
            Task::Install { .. } | Task::Collect { .. } => About::Other,
        };
        self.busy = Some(Busy {
            generation: self.generation,
            about,
        });
        Some(task)
    }

    fn rounds(&self) -> (u32, u32) {
        self.assigned
            .as_ref()
            .map_or((0, 0), |config| (config.rounds, config.local_steps))
    }

    fn handle(&mut self, event: ClientEvent) {
        match event {
            ClientEvent::Connect { endpoint, url } => {
                self.countdowns.retain(|countdown| {
                    countdown.what != Awaited::Server(endpoint) && countdown.what != Awaited::Return
                });
                self.outputs.push_back(Output::Connect { endpoint, url });
            }
            ClientEvent::ConnectionLost {
                endpoint,
                at,
                retry_at,
                since,
            } => {
                let reason = self.last_cause.as_ref().map(ToString::to_string);
                self.count_down(Awaited::Server(endpoint), reason, since, at, retry_at);
            }
            ClientEvent::ServerAway { detail, at, until } => {
                self.count_down(Awaited::Return, Some(detail), at, at, until);
            }
            ClientEvent::Assigned(assignment) => {
                let config = &assignment.config;
                self.show(Report::Assigned {
                    rounds: config.rounds,
                    local_steps: config.local_steps,
                });
                self.assigned = Some(config.clone());
                self.generation += 1;
                self.fetching = None;
                self.queue.clear();
                self.queue.push_back(Task::Assign(assignment));
            }
            ClientEvent::InstallAdapter { values, moments, .. } => {
                self.queue.push_back(Task::Install { values, moments });
            }
            ClientEvent::RoundStarted { round, members } => {
                let rounds = self.rounds().0;
                self.show(Report::RoundStarted {
                    round: round.round + 1,
                    rounds,
                    members,
                });
                self.queue.push_back(Task::BeginRound {
                    round,
                    restore: None,
                    keep: false,
                });
            }
            ClientEvent::ComputeForward { key } => self.queue.push_back(Task::Forward(key)),
            ClientEvent::ComputeBackward { key, gradient } => self.queue.push_back(Task::Backward {
                key,
                gradient: Box::new(gradient),
            }),
            ClientEvent::UploadAdapter { round, split, steps } => {
                self.queue.push_back(Task::Collect { round, split, steps });
            }
            ClientEvent::RoundResult(result) => self.show(Report::Round(result)),
            // Taking leave because of an error ends well for the session only.
            ClientEvent::Finished(reason) => {
                self.end.get_or_insert(Ok(reason));
            }
            ClientEvent::Failed(failure) => {
                // Why the last connection failed says more than that it did.
                let unreachable = matches!(failure, ClientFailure::Unreachable { .. });
                let cause = self.last_cause.take().filter(|_| unreachable);
                let failure = cause.map_or(Failure::Session(failure), Failure::Driver);
                self.end.get_or_insert(Err(failure));
            }
        }
    }
}
