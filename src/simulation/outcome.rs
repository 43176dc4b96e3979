//! What became of a simulated run.
//!
//! Separate so that a test can be read beside the list of what it may look at.

use std::time::Duration;

use super::network::Traffic;
use crate::federated::Exact;
use crate::protocol::message::ExclusionReason;
use crate::protocol::{ClientFailure, CollectTime, FinishReason, RunEnd, StepTimes};
use crate::terms::ids::{ClientId, RoundKey, StepKey};
use crate::terms::moments::Moments;

/// A round as the main server saw it close.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundRecord {
    pub round: RoundKey,
    pub at: Duration,
    /// Members at its start, by client number of the scenario.
    pub members: Vec<usize>,
    /// Adapters in the average, with their examples.
    pub included: Vec<(usize, u64)>,
    pub excluded: Vec<(usize, ExclusionReason)>,
    pub average: Vec<f32>,
    /// Of the blocks that left the clients.
    pub moments: Option<Moments>,
    /// What is saved instead of the average, where that is more.
    pub exact: Option<Exact>,
    pub collected: Vec<CollectTime>,
}

/// What became of a client's last process.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientOutcome {
    pub finished: Option<FinishReason>,
    pub failed: Option<ClientFailure>,
    pub adapter: Vec<f32>,
    /// Adapters that all its processes were given.
    pub installed: Vec<Vec<f32>>,
    /// Forward passes of all its processes.
    pub forwards: u64,
    /// Backward passes of all its processes.
    pub backwards: u64,
    /// Assignments it had to load.
    pub assigned: u64,
    /// The numbers it was given by the main server, in their order: one, unless it came as somebody new.
    pub identities: Vec<ClientId>,
}

/// When a run stood where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Joined(usize),
    Left(usize),
    Lost(RoundKey),
    Rejected(RoundKey),
    Waiting,
    /// The main server's process.
    Killed,
    Revived,
}

/// What became of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// `None` when the time limit came first.
    pub end: Option<RunEnd>,
    /// Whether every client was told and gone when the run ended.
    pub drained: bool,
    pub elapsed: Duration,
    /// The last average.
    pub adapter: Vec<f32>,
    /// Every block's adapter: the last average, then the main server's.
    pub model: Vec<f32>,
    /// The main server's own parameter.
    pub server: f64,
    /// Steps the main server computed.
    pub steps: u64,
    pub rounds: Vec<RoundRecord>,
    /// Clients, by number of the scenario, that closed steps went on without.
    pub partial: Vec<(StepKey, Vec<usize>)>,
    pub measured: Vec<(StepKey, Vec<StepTimes>)>,
    pub history: Vec<(Duration, Phase)>,
    pub clients: Vec<ClientOutcome>,
    pub traffic: Traffic,
    /// What must never happen and did.
    pub violations: Vec<String>,
}
