//! How long people are told that something is waited for.
//!
//! Separate because nothing depends on it but what they see.

use std::time::Duration;

use super::{Awaited, Cause, Edge, Output, Report};
use crate::protocol::Endpoint;

/// A pause that people are told the rest of.
pub(super) struct Countdown {
    pub what: Awaited,
    reason: Option<String>,
    since: Duration,
    until: Duration,
    pub next: Duration,
}

impl<C: Cause> Edge<C> {
    /// Tells people now and every second how long something is still waited for.
    pub(super) fn count_down(
        &mut self,
        what: Awaited,
        reason: Option<String>,
        since: Duration,
        now: Duration,
        until: Duration,
    ) {
        if matches!(what, Awaited::Server(Endpoint::Main) | Awaited::Return) {
            self.is_in_touch = false;
        }
        self.countdowns.retain(|countdown| countdown.what != what);
        if is_telling(self.is_in_touch, what) {
            self.show(Report::Waiting {
                what,
                reason: reason.clone(),
                first: since == now,
                again_in: until.saturating_sub(now),
                passed: now.saturating_sub(since),
            });
        }
        self.countdowns.push(Countdown {
            what,
            reason,
            since,
            until,
            next: now + Duration::from_secs(1),
        });
    }

    pub(super) fn tick(&mut self, now: Duration) {
        self.countdowns.retain(|countdown| countdown.until > now);
        let is_in_touch = self.is_in_touch;
        for countdown in self.countdowns.iter_mut().filter(|countdown| countdown.next <= now) {
            countdown.next = now + Duration::from_secs(1);
            if !is_telling(is_in_touch, countdown.what) {
                continue;
            }
            self.outputs.push_back(Output::Show(Report::Waiting {
                what: countdown.what,
                reason: countdown.reason.clone(),
                first: false,
                again_in: countdown.until - now,
                passed: now.saturating_sub(countdown.since),
            }));
        }
    }
}

/// Whether people are told that this is waited for: without the main server nothing else matters.
fn is_telling(is_in_touch: bool, what: Awaited) -> bool {
    is_in_touch || matches!(what, Awaited::Server(Endpoint::Main) | Awaited::Return)
}
