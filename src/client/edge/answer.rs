//! What a driver answers, and what that comes to.
//!
//! Separate from the machine's outputs because here is all that can go wrong outside of it.

use std::time::Duration;

use super::{
    About, Awaited, Busy, Cause, Done, Edge, FETCH_PAUSE, FIRST_CONNECTION, Failure, Fetch, Fetching,
    LONGEST_FETCH_PAUSE, Output, Report, STORE_PAUSE, Task,
};
use crate::data::Cursor;
use crate::protocol::Endpoint;
use crate::protocol::message::Digest;

impl<C: Cause> Edge<C> {
    // Connections.

    /// The socket asked for is open.
    pub fn connected(&mut self, endpoint: Endpoint, now: Duration) {
        self.last_cause = None;
        if !self.has_connected {
            self.show(Report::Connected);
        }
        self.has_connected = true;
        self.is_in_touch |= endpoint == Endpoint::Main;
        self.session.connected(endpoint, now);
    }

    /// The socket closed, or could not be opened, and perhaps why.
    pub fn disconnected(&mut self, endpoint: Endpoint, now: Duration, cause: Option<C>) {
        if let Some(cause) = cause {
            // A server that was never there may be one that was mistyped.
            let is_known = self.has_connected || self.passport.is_some();
            let is_late = !is_known && now.saturating_sub(self.started) > FIRST_CONNECTION;
            if !cause.may_pass() || is_late {
                return self.fail(now, Failure::Driver(cause));
            }
            self.last_cause = Some(cause);
        }
        self.session.disconnected(endpoint, now);
    }

    /// A frame of the socket opened last for this endpoint.
    pub fn frame(&mut self, endpoint: Endpoint, now: Duration, bytes: &[u8]) {
        self.session.handle_frame(endpoint, now, bytes);
    }

    /// Bytes of a frame that is not whole yet have come.
    pub fn heard(&mut self, endpoint: Endpoint) {
        self.session.heard(endpoint);
    }

    // Files.

    /// The files of this number are at hand, or cannot be had.
    pub fn fetched(&mut self, now: Duration, number: u64, result: Result<(), C>) {
        let Some(fetching) = self
            .fetching
            .as_mut()
            .filter(|fetching| fetching.fetch.number == number)
        else {
            return;
        };
        let cause = match result {
            Ok(()) => {
                self.fetching = None;
                return self.queue.push_back(Task::Load);
            }
            Err(cause) => cause,
        };
        let since = *fetching.since.get_or_insert(now);
        if !cause.may_pass() || now.saturating_sub(since) >= self.give_up {
            return self.fail(now, Failure::Driver(cause));
        }
        let pause = FETCH_PAUSE
            .saturating_mul(1 << fetching.failures.min(16))
            .min(LONGEST_FETCH_PAUSE);
        fetching.failures += 1;
        fetching.again_at = Some(now + pause);
        self.count_down(Awaited::Weights, Some(cause.to_string()), since, now, now + pause);
    }

    // What is kept.

    /// It is kept, or could not be, and why.
    pub fn stored(&mut self, now: Duration, result: Result<(), String>) {
        if !std::mem::take(&mut self.storing) {
            return;
        }
        let failed = result.is_err();
        let before = std::mem::replace(&mut self.store_failed, failed);
        match result {
            Ok(()) if before => self.show(Report::Saved),
            Ok(()) => {}
            Err(detail) => {
                self.store_again_at = Some(now + STORE_PAUSE);
                if !before {
                    self.show(Report::Unsaved { detail });
                }
            }
        }
    }

    // Work.

    /// The task is done, or this device cannot do it.
    pub fn done(&mut self, now: Duration, result: Result<Done, C>) {
        let Some(Busy { generation, about }) = self.busy.take() else {
            return;
        };
        match result {
            Err(cause) => return self.fail(now, Failure::Driver(cause)),
            Ok(done) if generation == self.generation => self.answer(now, about, done),
            // It was about what is no more.
            Ok(_) => self.stands_at = None,
        }
        if self.leaving {
            self.session.leave(now);
        }
    }

    fn answer(&mut self, now: Duration, about: About, done: Done) {
        let answered = match done {
            Done::Assigned(wanted) => {
                let fetch = Fetch {
                    number: self.generation,
                    wanted,
                };
                self.fetching = Some(Fetching {
                    fetch: fetch.clone(),
                    failures: 0,
                    since: None,
                    again_at: None,
                });
                self.outputs.push_back(Output::Fetch(fetch));
                Ok(())
            }
            Done::Loaded { speed, data, summary } => {
                self.know_data(data);
                let (rounds, local_steps) = self.rounds();
                let begun = self.checkpoints.last().map_or(0, |checkpoint| checkpoint.round);
                self.show(Report::Loaded {
                    summary,
                    blocks: self.assigned.as_ref().map_or(0, |config| config.split),
                    rounds,
                    steps: rounds.saturating_sub(begun).saturating_mul(local_steps),
                });
                self.session.ready(now, speed);
                Ok(())
            }
            Done::Began(standing) => {
                if let About::Round(round) = about {
                    self.gained = false;
                    self.stands_at = Some(round.round);
                    if let Some(standing) = standing {
                        self.keep(round.round, standing);
                    }
                }
                Ok(())
            }
            Done::Installed => {
                self.gained |= matches!(about, About::Moments);
                Ok(())
            }
            Done::Activations(input) => self.session.activations(now, input),
            Done::StepDone { took } => {
                if let About::Step {
                    key,
                    loss,
                    mean_loss,
                    tokens,
                } = about
                {
                    self.tally.steps += 1;
                    self.tally.tokens += tokens;
                    let (rounds, local_steps) = self.rounds();
                    self.show(Report::Step {
                        round: key.round.round + 1,
                        step: key.round.round.saturating_mul(local_steps).saturating_add(key.step + 1),
                        steps: rounds.saturating_mul(local_steps),
                        loss,
                        mean_loss,
                        tokens,
                    });
                    self.session.step_done(now, key, took);
                }
                Ok(())
            }
            Done::Adapter(input, standing) => {
                // Kept before it is sent: what is in an average is never trained on again.
                self.keep(input.round.round.saturating_add(1), standing);
                self.session.adapter(now, input)
            }
        };
        if let Err(error) = answered {
            self.fail(now, Failure::Answer(error));
        }
    }

    /// The data has been read. Where it is other data than before, a place in that means nothing.
    fn know_data(&mut self, data: Digest) {
        let before = self.data.replace(data);
        if before == Some(data) {
            return;
        }
        self.unstored = true;
        if before.is_some() {
            for checkpoint in &mut self.checkpoints {
                checkpoint.standing.cursor = Cursor::default();
            }
            self.stands_at = None;
            self.show(Report::OtherData);
        }
    }

    /// The driver cannot go on.
    pub fn give_up(&mut self, now: Duration, cause: C) {
        self.fail(now, Failure::Driver(cause));
    }

    /// Takes leave, with this as the reason.
    fn fail(&mut self, now: Duration, failure: Failure<C>) {
        if !matches!(self.end, Some(Err(_))) {
            self.end = Some(Err(failure));
        }
        self.session.leave(now);
    }
}
