//! What the server's parts hand to each other: inputs to the coordinator, its frames to the connections, its work to the compute
//! thread and the answers.
//!
//! It is apart from all of them, so that sockets and the compute thread need not name the coordinator, nor it them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Error;
use super::planner::{Decision, Facts};
use crate::protocol::{ConnectionId, Contribution, Endpoint, GradientOutput, Placement};
use crate::split::{Evaluation, LaneError};
use crate::terms::ids::{ClientId, RoundKey, StepKey};
use crate::terms::moments::Moments;

/// What reaches the coordinator.
#[derive(Debug)]
pub enum Input {
    Opened {
        connection: ConnectionId,
        endpoint: Endpoint,
        address: IpAddr,
        outgoing: mpsc::Sender<Outgoing>,
    },
    Frame {
        connection: ConnectionId,
        bytes: Vec<u8>,
    },
    Closed {
        connection: ConnectionId,
    },
    Computed(Done),
    Stop(String),
}

/// What the coordinator sends to a connection.
#[derive(Debug)]
pub enum Outgoing {
    Frame(Vec<u8>),
    Close,
}

/// What the coordinator asks for.
#[derive(Debug)]
pub enum Work {
    /// Loss of the validation data before training.
    Baseline,
    /// One member's part of a step; the first of a step opens it.
    Contribute { key: StepKey, contribution: Contribution },
    /// Closes the step with these members' gradients.
    CloseStep { key: StepKey, lanes: BTreeSet<ClientId> },
    /// Back to the adapter with which the round began.
    Restore,
    /// Asks the planner what is to hold next, and at the start puts it into effect.
    Plan(Box<Facts>),
    /// Gives this side's values of the blocks that some clients have and others do not.
    Copy { round: RoundKey },
    /// Takes the clients' average, which goes as far as the largest cut, into the whole model's adapter, saves and validates it, and moves the cut to `split`.
    /// `moments` are those of the blocks that come here.
    Close {
        round: RoundKey,
        average: Vec<f32>,
        moments: Option<Moments>,
        split: usize,
    },
    /// Saves the adapter of the last closed round, unless it is.
    Finish,
}

/// What the worker answers.
#[derive(Debug)]
pub enum Done {
    /// The model is loaded.
    Ready,
    Baseline(Option<Evaluation>),
    Contributed {
        key: StepKey,
        client: ClientId,
        /// Or why there is nothing for this client.
        output: Result<GradientOutput, LaneError>,
    },
    StepClosed {
        key: StepKey,
        /// Mean over the targets of all its members.
        loss: f64,
        tokens: u64,
        /// What its contributions and its close took.
        elapsed: Duration,
    },
    Planned {
        decision: Option<Decision>,
        /// Where cut or rank are others than before.
        placement: Option<Box<Placement>>,
    },
    Copied {
        round: RoundKey,
        values: Vec<f32>,
    },
    Closed {
        round: RoundKey,
        evaluation: Option<Evaluation>,
        placement: Option<Box<Placement>>,
        /// Whether the adapter could be written; it is tried again with the next round. Where the validation loss is not finite,
        /// nothing of the round was kept, and nothing written.
        saved: Result<(), Error>,
    },
    Finished,
    /// The worker cannot go on.
    Failed(Error),
}
