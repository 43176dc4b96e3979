//! When a run's state is saved, and what is said when it cannot be.
//!
//! Separate from the training, which only asks whether it is time.

use std::time::{Duration, Instant};

use crate::cli::console;
use crate::runs::snapshots::Snapshots;

/// Between two states, where the user says nothing.
const PAUSE: Duration = Duration::from_secs(5);
/// A state that took long to save is worth so many times its time: saving costs at most 1 % of the run.
const WORTH: u32 = 100;

/// Saves states from time to time.
#[derive(Debug)]
pub struct Keeper {
    snapshots: Snapshots,
    /// As the user says, whatever it costs.
    asked: Option<Duration>,
    last: Instant,
    /// Of the last one.
    cost: Duration,
    /// Of the last one that was saved, or found at the start.
    saved: Option<u64>,
    failing: bool,
}

impl Keeper {
    /// `found` is the step of the state that the run goes on from.
    pub fn new(snapshots: Snapshots, asked: Option<Duration>, found: Option<u64>) -> Self {
        Self {
            snapshots,
            asked,
            last: Instant::now(),
            cost: Duration::ZERO,
            saved: found,
            failing: false,
        }
    }

    /// Whether a state is to be saved now.
    pub fn is_time(&self) -> bool {
        let pause = self.asked.unwrap_or(PAUSE.max(self.cost * WORTH));
        self.last.elapsed() >= pause
    }

    /// Saves the state after `step` steps, unless it is saved already. That it cannot be is said once, and that it can be again. Whether it
    /// is saved.
    ///
    /// # Errors
    /// Those of `state`.
    pub fn save<E>(&mut self, step: u64, state: impl FnOnce() -> Result<Vec<u8>, E>) -> Result<bool, E> {
        if self.saved == Some(step) {
            return Ok(true);
        }
        let start = Instant::now();
        let written = self.snapshots.save(step, &state()?);
        self.last = Instant::now();
        self.cost = self.last - start;
        match written {
            Ok(()) if self.failing => {
                self.failing = false;
                console::say(format!("the run's state is saved again, at step {step}"));
            }
            Ok(()) => {}
            Err(error) => {
                if !self.failing {
                    self.failing = true;
                    console::say(format!(
                        "the run's state cannot be saved: {error}; the run goes on, could be resumed {}, and tries again",
                        from(self.saved)
                    ));
                }
                return Ok(false);
            }
        }
        self.saved = Some(step);
        Ok(true)
    }

    /// Where the run would go on.
    pub fn from(&self) -> String {
        from(self.saved)
    }
}

fn from(step: Option<u64>) -> String {
    match step {
        Some(step) => format!("from step {step}"),
        None => "from its beginning".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeper(asked: Option<Duration>, home: &tempfile::TempDir) -> Keeper {
        Keeper::new(Snapshots::open(&home.path().join("state")).unwrap().0, asked, None)
    }

    #[test]
    fn a_state_that_takes_long_to_save_is_saved_less_often() {
        let home = tempfile::tempdir().unwrap();
        let mut keeper = keeper(None, &home);
        let now = Instant::now();
        let ago = |seconds| now.checked_sub(Duration::from_secs(seconds));
        let Some(old) = ago(1000) else {
            return; // A machine that was started just now.
        };
        assert!(!keeper.is_time());
        keeper.last = old;
        assert!(keeper.is_time());
        keeper.cost = Duration::from_secs(20);
        assert!(!keeper.is_time(), "2,000 seconds are not over");
        keeper.asked = Some(Duration::from_secs(900));
        assert!(keeper.is_time(), "whatever it costs");
    }

    #[test]
    fn a_state_that_cannot_be_saved_is_told_from_one_that_is() {
        let home = tempfile::tempdir().unwrap();
        let mut keeper = keeper(Some(Duration::ZERO), &home);
        let bytes = |bytes: &'static [u8]| move || Ok::<_, ()>(bytes.to_vec());
        assert_eq!(keeper.save(1, bytes(b"one")), Ok(true));
        assert_eq!(keeper.save(1, || Err(())), Ok(true), "it is not asked for again");
        let obstacle = home.path().join("state/00000001.snapshot");
        std::fs::create_dir(&obstacle).unwrap();
        assert_eq!(keeper.save(2, bytes(b"two")), Ok(false));
        assert_eq!(keeper.from(), "from step 1");
        std::fs::remove_dir(&obstacle).unwrap();
        assert_eq!(keeper.save(2, bytes(b"two")), Ok(true));
        assert_eq!(
            (keeper.from(), keeper.save(3, || Err(()))),
            ("from step 2".to_owned(), Err(()))
        );
    }
}
