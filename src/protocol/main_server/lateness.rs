//! How long members are waited for, and how many of them are enough.
//!
//! Separate because it is a policy: `step` and `round` say who is late, and what becomes of who is.

use std::collections::VecDeque;
use std::time::Duration;

/// After so many things in a row that a member was waited for in vain, it is dropped.
pub(super) const MISSES: u32 = 3;

/// Arrivals that are remembered.
const REMEMBERED: usize = 64;
/// Before so many are known there is no telling what is late.
const FEW: usize = 3;
/// How many spreads past the median an arrival may be.
const SPREADS: u32 = 8;

/// How long a step waits for activations, and a round for adapters, once somebody's have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Deadline {
    /// By what arrivals have taken: their median and eight times their spread, which is the median absolute deviation, or a quarter
    /// of the median where that is more; never less than 5 s nor more than 10 minutes, and 2 minutes while few are known. Where
    /// nobody's have come, nobody is kept waiting: then it is 10 minutes.
    #[default]
    Auto,
    /// So long, whatever arrivals have taken.
    After(Duration),
}

impl Deadline {
    /// The least that [`Deadline::Auto`] waits.
    pub const SHORTEST: Duration = Duration::from_secs(5);
    /// What it waits while few arrivals are known.
    pub const START: Duration = Duration::from_secs(120);
    /// The most it waits.
    pub const LONGEST: Duration = Duration::from_secs(600);

    /// The seconds that were given; `None` for [`Deadline::Auto`].
    pub fn seconds(self) -> Option<f64> {
        match self {
            Deadline::Auto => None,
            Deadline::After(limit) => Some(limit.as_secs_f64()),
        }
    }
}

impl std::str::FromStr for Deadline {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Deadline::Auto);
        }
        // A day is longer than anybody waits, and far from what a clock cannot hold.
        match text.parse::<f64>() {
            Ok(seconds) if (0.001..=86_400.0).contains(&seconds) => {
                Ok(Deadline::After(Duration::from_secs_f64(seconds)))
            }
            _ => Err(format!(
                "`{text}` is neither `auto` nor a number of seconds from 0.001 to 86400"
            )),
        }
    }
}

/// What a kind of arrival has taken so far.
pub(super) struct Patience {
    deadline: Deadline,
    arrivals: VecDeque<Duration>,
}

impl Patience {
    pub fn new(deadline: Deadline) -> Patience {
        Patience {
            deadline,
            arrivals: VecDeque::new(),
        }
    }

    /// Something came after so long.
    pub(crate) fn note(&mut self, took: Duration) {
        if self.arrivals.len() == REMEMBERED {
            self.arrivals.pop_front();
        }
        self.arrivals.push_back(took);
    }

    /// How long to wait, where somebody has come and where nobody has.
    pub(crate) fn limits(&self) -> Limits {
        match self.deadline {
            Deadline::After(limit) => Limits {
                some: limit,
                none: limit,
            },
            Deadline::Auto => Limits {
                some: self.limit(),
                none: Deadline::LONGEST,
            },
        }
    }

    fn limit(&self) -> Duration {
        if self.arrivals.len() < FEW {
            return Deadline::START;
        }
        let middle = median(self.arrivals.iter().copied());
        let deviation = median(self.arrivals.iter().map(|arrival| arrival.abs_diff(middle)));
        let spread = deviation.max(middle / 4);
        middle
            .saturating_add(spread.saturating_mul(SPREADS))
            .clamp(Deadline::SHORTEST, Deadline::LONGEST)
    }
}

fn median(values: impl Iterator<Item = Duration>) -> Duration {
    let mut values: Vec<Duration> = values.collect();
    values.sort_unstable();
    match values.len() {
        0 => Duration::ZERO,
        count if count % 2 == 1 => values[count / 2],
        count => (values[count / 2 - 1] + values[count / 2]) / 2,
    }
}

/// How long members are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    some: Duration,
    none: Duration,
}

/// A wait for several members.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    since: Duration,
    limits: Limits,
}

impl Wait {
    pub fn new(since: Duration, limits: Limits) -> Wait {
        Wait { since, limits }
    }

    /// When it is over, where anybody has come or nobody.
    pub(crate) fn ends(&self, anybody: bool) -> Duration {
        self.since.saturating_add(match anybody {
            true => self.limits.some,
            false => self.limits.none,
        })
    }

    /// Waits once more, from now on.
    pub(crate) fn again(&mut self, now: Duration) {
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(values: &[u64]) -> Patience {
        let mut patience = Patience::new(Deadline::Auto);
        for value in values {
            patience.note(Duration::from_secs(*value));
        }
        patience
    }

    #[test]
    fn the_deadline_follows_arrivals_within_its_bounds() {
        let some = |values: &[u64]| seconds(values).limits().some;
        assert_eq!(some(&[]), Deadline::START);
        assert_eq!(some(&[9, 9]), Deadline::START, "two say nothing yet");
        assert_eq!(some(&[0, 0, 0]), Deadline::SHORTEST);
        assert_eq!(some(&[20, 20, 20]), Duration::from_secs(20 + 8 * 5));
        // Deviations from 20 are 0, 10, 10.
        assert_eq!(some(&[10, 20, 30]), Duration::from_secs(20 + 8 * 10));
        assert_eq!(some(&[10, 20, 30, 4000]), Duration::from_secs(25 + 8 * 10));
        assert_eq!(some(&[400, 400, 400]), Deadline::LONGEST);
        assert_eq!(seconds(&[1, 1, 1]).limits().none, Deadline::LONGEST);
        let mut old = seconds(&[500; REMEMBERED]);
        for _ in 0..REMEMBERED {
            old.note(Duration::from_secs(1));
        }
        assert_eq!(old.limits().some, Deadline::SHORTEST, "what was long ago is forgotten");
    }

    #[test]
    fn a_deadline_is_auto_or_seconds() {
        assert_eq!("auto".parse(), Ok(Deadline::Auto));
        assert_eq!("2.5".parse(), Ok(Deadline::After(Duration::from_millis(2500))));
        for bad in ["", "soon", "0", "-1", "nan", "inf", "1e9", "5s"] {
            let error = bad.parse::<Deadline>().unwrap_err();
            assert!(error.contains("auto"), "{error}");
        }
    }
}
