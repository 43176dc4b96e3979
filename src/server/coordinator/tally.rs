//! Refusals that are counted instead of told one by one.
//!
//! Separate because whoever is refused costs nothing to be refused again: what is written about it must not grow with it.

use std::collections::BTreeMap;
use std::time::Duration;

/// Refusals are told singly up to this many, and beyond it in numbers, …
const TOLD: u32 = 10;
/// … this often.
const INTERVAL: Duration = Duration::from_secs(60);

/// Refusals of the last minute.
#[derive(Debug, Default)]
pub(super) struct Tally {
    since: Option<Duration>,
    told: u32,
    untold: BTreeMap<String, u64>,
}

impl Tally {
    /// Counts a refusal at `now`. Returns whether it is to be told by itself; `plain` ones may be.
    pub fn note(&mut self, now: Duration, reason: &str, plain: bool) -> bool {
        self.since.get_or_insert(now);
        if plain && self.told < TOLD {
            self.told += 1;
            return true;
        }
        self.count(now, reason, 1);
        false
    }

    /// Counts what is not told singly.
    pub fn count(&mut self, now: Duration, reason: &str, more: u64) {
        self.since.get_or_insert(now);
        *self.untold.entry(reason.to_owned()).or_default() += more;
    }

    /// When what was counted is to be told.
    pub fn due(&self) -> Option<Duration> {
        self.since.map(|since| since + INTERVAL)
    }

    /// What was counted, once it is time, or `at_once`.
    pub fn take(&mut self, now: Duration, at_once: bool) -> BTreeMap<String, u64> {
        if !at_once && self.due().is_none_or(|due| now < due) {
            return BTreeMap::new();
        }
        std::mem::take(self).untold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_flood_of_refusals_is_a_few_words_and_one_number_a_minute() {
        let mut tally = Tally::default();
        assert_eq!(tally.due(), None);
        let told = (0..1000).filter(|_| tally.note(SECOND, "wrong", true)).count();
        assert_eq!(told as u32, TOLD);
        assert!(!tally.note(2 * SECOND, "garbage", false));
        assert!(tally.take(60 * SECOND, false).is_empty());
        let counted = BTreeMap::from([("garbage".to_owned(), 1), ("wrong".to_owned(), 990)]);
        assert_eq!(tally.take(61 * SECOND, false), counted);
        assert_eq!(tally.due(), None);
        assert!(tally.note(62 * SECOND, "wrong", true), "another minute");
        assert!(!tally.note(62 * SECOND, "garbage", false));
        assert_eq!(tally.take(62 * SECOND, true).values().sum::<u64>(), 1);
    }
}
