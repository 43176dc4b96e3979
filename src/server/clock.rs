//! The time of a run: what its sessions are told.

use std::time::{Duration, Instant};

/// A clock that goes on from where it stood when the run was interrupted. Without an interruption it starts at zero.
///
/// The time in between does not count: tickets live as long as the server.
#[derive(Clone, Copy, Debug)]
pub struct RunClock {
    start: Instant,
    before: Duration,
}

impl RunClock {
    /// Of a run that has gone on for so long already.
    pub fn new(before: Duration) -> Self {
        Self {
            start: Instant::now(),
            before,
        }
    }

    pub fn now(&self) -> Duration {
        self.before + self.start.elapsed()
    }

    /// When it will be `time`.
    pub fn at(&self, time: Duration) -> Instant {
        self.start + time.saturating_sub(self.before)
    }
}
