//! Whole training runs in virtual time: the real sessions over a network that delays, loses, repeats and reorders
//! frames, cuts connections, and kills processes, all from a seed.
//!
//! The sessions are the ones that run on sockets; only what they compute is a toy, small enough that every average can
//! be checked. A run is a pure function of its `Scenario`, so a failure is repeated by its seed.

mod network;
mod outcome;
mod run;
mod scenario;
mod toy;

pub use network::{Traffic, Weather};
pub use outcome::{ClientOutcome, Outcome, Phase, RoundRecord};
pub use run::simulate;
pub use scenario::{Fault, Scenario};
