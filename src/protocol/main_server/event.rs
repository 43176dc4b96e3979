//! What the session tells its driver, and the values that they exchange.
//!
//! Separate so that drivers, reports and the simulator can be read against this page alone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::super::ConnectionId;
use super::super::message::{Exclusion, ExclusionReason, Inclusion, LinkRates, RefusalReason};
use super::lateness::MISSES;
use super::placement::Placement;
use crate::federated::{Errors, Exact};
use crate::terms::ids::{ClientId, RoundKey, StepKey};
use crate::terms::moments::Moments;
use crate::terms::phases::Phases;
use crate::terms::tensor::WireTensor;

/// What is to hold from the next round on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoundPlan {
    /// Blocks of the client, if it is to be another number than now: possible where `PlanWanted` says so, and clients have
    /// no cuts of their own.
    pub split: Option<u32>,
    /// Of the emulated uplinks; a client without a rate has none.
    pub rates: BTreeMap<ClientId, LinkRates>,
}

/// When a plan is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Nothing is trained yet: before `planned`, `place` may change cut and rank.
    Start,
    /// The steps of this round are done: the split may change.
    Boundary(RoundKey),
    /// The run goes on after an interruption: cut and rank stay, and what was planned beside them is not known any more.
    Resumption,
    /// Clients are ready whom the last plan did not know.
    Membership,
}

/// How long the phases of one client's step took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTimes {
    pub client: ClientId,
    /// Forward and backward as the client says; the upload from the time the client was free to start until its activations had
    /// come, less the forward pass; the download from the time the gradient went out until the client was done, less the backward
    /// pass.
    pub phases: Phases<Duration>,
    /// Of the frames with activations and gradient.
    pub bytes_up: u64,
    pub bytes_down: u64,
}

/// A member's adapter on its way to the federated server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CollectTime {
    pub client: ClientId,
    /// From asking for the adapter until the federated server had it.
    pub took: Duration,
    pub bytes: u64,
}

/// One member's part of a step, as checked: the tensor is finite and its layout is one of the assignment's; targets are in the
/// vocabulary or ignored.
#[derive(Clone, Debug, PartialEq)]
pub struct Contribution {
    pub client: ClientId,
    /// Blocks run at the client.
    pub split: u32,
    pub examples: u32,
    /// Targets that take part in the loss. May be zero: such a member's loss and gradient are zero.
    pub tokens: u64,
    /// `(batch, seq)`
    pub targets: Vec<i32>,
    /// `(batch, seq, width)`
    pub activations: WireTensor,
}

/// What the driver computed for one member.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientOutput {
    pub client: ClientId,
    /// Mean loss of its targets.
    pub loss: f32,
    /// Gradient of that loss by its activations, in their layout.
    pub gradient: WireTensor,
}

/// A member that a step or a round goes on without, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    pub client: ClientId,
    pub reason: String,
}

/// Why a client is no longer in the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DepartureReason {
    /// It said goodbye.
    Left,
    /// Its connection closed.
    Disconnected,
    /// It was silent for too long.
    Silent,
    /// It did not read what it was sent.
    Unread,
    /// It opened another connection.
    Superseded,
    /// What it sent was damaged on the way; it may come back.
    Damaged,
    /// It broke the protocol.
    Misbehaved(String),
    /// The federated server left it out.
    Excluded(ExclusionReason),
    /// Its activations led to a loss or gradient the driver could not use.
    Unusable,
    /// It was waited for in vain, for this, as often in a row as is allowed.
    Late(&'static str),
}

impl std::fmt::Display for DepartureReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DepartureReason::Left => f.write_str("left"),
            DepartureReason::Disconnected => f.write_str("disconnected"),
            DepartureReason::Silent => f.write_str("went silent"),
            DepartureReason::Unread => f.write_str("does not read what it is sent"),
            DepartureReason::Superseded => f.write_str("connected again"),
            DepartureReason::Damaged => f.write_str("what it sent was damaged on the way"),
            DepartureReason::Misbehaved(detail) => write!(f, "broke the protocol: {detail}"),
            DepartureReason::Excluded(reason) => write!(f, "left out of the round: {reason}"),
            DepartureReason::Unusable => f.write_str("its activations gave no usable loss or gradient"),
            DepartureReason::Late(what) => {
                write!(f, "too slow: its {what} did not come in time {MISSES} times running")
            }
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    Completed,
    /// Everybody left and nobody came back in time.
    NoClients,
    Stopped(String),
    /// The federated server returned something that is not an average of this run.
    FederatedFault(String),
    /// A round was started again as often as is allowed, and came to nothing that can be used.
    Diverged(String),
}

/// What the driver should know or do.
#[derive(Clone, Debug, PartialEq)]
pub enum MainEvent {
    ClientRefused {
        connection: ConnectionId,
        reason: RefusalReason,
    },
    ClientJoined {
        connection: ConnectionId,
        client: ClientId,
        name: String,
        device: String,
    },
    ClientReady {
        client: ClientId,
    },
    ClientLeft {
        client: ClientId,
        name: String,
        reason: DepartureReason,
    },
    RoundStarted {
        round: RoundKey,
        members: Vec<ClientId>,
    },
    /// Compute this member's part of a step, and answer with `contributed`. The first of a step opens it; one that was not closed
    /// is void.
    Contribution {
        key: StepKey,
        contribution: Contribution,
    },
    /// Close the step with the gradients of these members, which have been answered; others that were computed are dropped.
    /// There is no answer.
    CloseStep {
        key: StepKey,
        lanes: BTreeSet<ClientId>,
        /// Members it goes without: the step is partial if there are any.
        left_out: Vec<LeftOut>,
    },
    /// All members that are left have done this step.
    StepMeasured {
        key: StepKey,
        clients: Vec<StepTimes>,
    },
    /// Say what is to hold next, with `planned`.
    PlanWanted {
        occasion: Occasion,
    },
    /// The round's adapters are collected: answer with `copy`, the main server's values of the blocks that some clients have
    /// and others do not.
    CopyWanted {
        round: RoundKey,
    },
    /// Take the average, which goes as far as the largest cut, validate, save, and answer with `validated`. If `split` is
    /// another number than that of the placement, the answer brings the placement for it.
    RoundClosed {
        round: RoundKey,
        average: Vec<f32>,
        /// Of the blocks that leave the clients.
        moments: Option<Moments>,
        /// What is validated and saved, where that is more than the average.
        exact: Option<Exact>,
        /// What averages miss, where that is known.
        errors: Option<Errors>,
        split: u32,
        included: Vec<Inclusion>,
        excluded: Vec<Exclusion>,
        collected: Vec<CollectTime>,
    },
    /// This is what the next round begins from, which has no attempt yet: it is to be kept, with the main server's side of it, before
    /// anything else is sent.
    Keep {
        round: u32,
        placement: Box<Placement>,
    },
    /// Every member left, or so many that the quorum is not. The round starts again, under another attempt, when enough are ready; the server's adapter, its moments
    /// and steps go back to where the round began.
    RoundLost {
        round: RoundKey,
    },
    /// The round came to nothing that can be used. It starts again, under another attempt; the server's side goes back to
    /// where the round began.
    RoundRejected {
        round: RoundKey,
        reason: String,
    },
    /// Nobody is left to train with; the run stops at `until`.
    Waiting {
        until: Duration,
    },
    Finished {
        reason: RunEnd,
    },
    /// All clients have been told and are gone.
    Drained,
}
