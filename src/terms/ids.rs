//! Who and when: clients, runs, rounds and steps.
//!
//! They are apart from the messages that carry them, because servers, planners and logs name them too.

use std::fmt;

/// A client, for the whole run. The number survives a reconnection made with a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(
    /// From 1, in the order of joining.
    pub u64,
);

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {}", self.0)
    }
}

/// A run: sixteen random bytes chosen by the main server's driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(
    /// Random.
    pub [u8; 16],
);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A round of the run. `round` counts from 0; `attempt` grows when a round that lost all its members is opened again,
/// so that a frame of the lost attempt can never be taken for one of the new.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RoundKey {
    /// From 0.
    pub round: u32,
    /// From 0, for each round.
    pub attempt: u32,
}

impl RoundKey {
    /// The key of local step `step` of this round.
    pub fn step(self, step: u32) -> StepKey {
        StepKey { round: self, step }
    }
}

impl fmt::Display for RoundKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round {}.{}", self.round, self.attempt)
    }
}

/// A local step of a round; `step` counts from 0 within the round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepKey {
    /// The round it is of.
    pub round: RoundKey,
    /// From 0, for each round.
    pub step: u32,
}

impl fmt::Display for StepKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} step {}", self.round, self.step)
    }
}
