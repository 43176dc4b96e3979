//! What the session tells its driver, and the values that they exchange.
//!
//! Separate so that drivers can be read against this page alone.

use std::time::Duration;

use super::super::message::{
    Assignment, Capabilities, Digest, Gradient, PROTOCOL_VERSION, Refused, RoundResult, Stop, Ticket, Version,
};
use super::super::{ConnectionFault, Endpoint};
use crate::terms::ids::{ClientId, RoundKey, RunId, StepKey};
use crate::terms::moments::Moments;
use crate::terms::tensor::{WireLayout, WireTensor};

/// How long a server that cannot be reached is tried again, unless configured otherwise.
const GIVE_UP: Duration = Duration::from_secs(12 * 3600);

/// Who a client is.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// What this client speaks: `PROTOCOL_VERSION`.
    pub version: Version,
    pub name: String,
    pub capabilities: Capabilities,
    /// The model this client expects; `None` takes the server's.
    pub model: Option<Digest>,
    /// The tokenizer this client expects; `None` takes the server's.
    pub tokenizer: Option<Digest>,
    /// The join secret.
    pub secret: Option<String>,
    /// As whom to come, if this client has been in a run before. Where it is not known any more, it comes with the secret.
    pub passport: Option<Passport>,
    /// How long a server that cannot be reached is tried again.
    pub give_up: Duration,
    /// Any number: clients of different ones pause for different times before they try again.
    pub seed: u64,
}

/// By what a client is known again in a run that it has been in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passport {
    pub run: RunId,
    pub client: ClientId,
    /// For the main service's next connection.
    pub ticket: Ticket,
}

impl ClientConfig {
    /// A client that is new, takes whatever model the server has, comes without a secret, and tries for twelve hours to reach a
    /// server that is away. `name` is shown to people. Where several may lose a server at once, they need seeds of their own.
    pub fn new(name: impl Into<String>, capabilities: Capabilities) -> ClientConfig {
        ClientConfig {
            version: PROTOCOL_VERSION,
            name: name.into(),
            capabilities,
            model: None,
            tokenizer: None,
            secret: None,
            passport: None,
            give_up: GIVE_UP,
            seed: 0,
        }
    }
}

/// The driver's answer to `ComputeForward`.
#[derive(Clone, Debug, PartialEq)]
pub struct ActivationsInput {
    pub key: StepKey,
    pub examples: u32,
    /// What the forward pass took.
    pub forward: Duration,
    /// `(batch, seq)`; `IGNORED_TARGET` takes no part in the loss.
    pub targets: Vec<i32>,
    /// `(batch, seq, width)`, of the assignment's width and form.
    pub tensor: WireTensor,
}

/// The driver's answer to `UploadAdapter`.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterInput {
    pub round: RoundKey,
    /// Of the round's batches.
    pub examples: u64,
    /// The flat adapter.
    pub values: Vec<f32>,
    /// Of the blocks that leave, where there are any.
    pub moments: Option<Moments>,
}

/// A mistake of the driver; nothing a server sends leads here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    #[error("activations of {given}, where at most {largest} was agreed")]
    Layout { given: WireLayout, largest: WireLayout },
    #[error("{targets} targets for activations of {rows} rows")]
    Targets { targets: usize, rows: usize },
    #[error("an adapter of {given} values, where {expected} were agreed")]
    Adapter { given: usize, expected: u64 },
    #[error("moments other than those of the blocks that leave")]
    Moments,
}

/// How a session ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The run has done all its rounds.
    Completed,
    /// `leave` was called.
    Left,
    /// The server stopped the run.
    Stopped { detail: String },
}

/// How a session ended badly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientFailure {
    #[error("the {endpoint:?} server refused: {} ({})", .refused.reason, .refused.detail)]
    Refused { endpoint: Endpoint, refused: Refused },
    #[error("the {endpoint:?} server ended the session: {} ({})", .stop.reason, .stop.detail)]
    Stopped { endpoint: Endpoint, stop: Stop },
    #[error("the {endpoint:?} server broke the protocol: {detail}")]
    Protocol { endpoint: Endpoint, detail: String },
    #[error("the {endpoint:?} server: {fault}")]
    Connection { endpoint: Endpoint, fault: ConnectionFault },
    #[error("the {endpoint:?} server cannot be reached; check its address and that it runs")]
    Unreachable { endpoint: Endpoint },
}

/// What the driver should do or know.
#[derive(Clone, Debug, PartialEq)]
pub enum ClientEvent {
    /// Open a socket; answer with `connected` or `disconnected`. Without a URL the service is at the join URL's origin.
    Connect {
        endpoint: Endpoint,
        url: Option<String>,
    },
    /// The connection is gone at `at`; the next attempt is at `retry_at`. `since` is when the first of the attempts that failed in
    /// a row did.
    ConnectionLost {
        endpoint: Endpoint,
        at: Duration,
        retry_at: Duration,
        since: Duration,
    },
    /// The server goes away and has said when it will be back: that is when it is tried again.
    ServerAway {
        detail: String,
        at: Duration,
        until: Duration,
    },
    /// Load what it names and answer with `ready`. Not repeated after a reconnection that brings the same. Where another has
    /// been loaded before, the adapter state of the blocks that both have is kept.
    Assigned(Box<Assignment>),
    /// The client takes part in a round.
    RoundStarted {
        round: RoundKey,
        members: u32,
    },
    /// Put these values into the client side's adapter. `round` is the one whose average they are or, before the first
    /// step of a newcomer, the one that starts from them. Comes before any `ComputeForward` that builds on it. Moments are
    /// those of the last blocks, which are new to this client.
    InstallAdapter {
        round: RoundKey,
        values: Vec<f32>,
        moments: Option<Moments>,
    },
    /// Answer with `activations`.
    ComputeForward {
        key: StepKey,
    },
    /// Run backward, take the optimiser step, answer with `step_done`.
    ComputeBackward {
        key: StepKey,
        gradient: Gradient,
    },
    /// Answer with `adapter`. With it go the moments of the blocks from `split` on, if there are any, as after `steps`
    /// optimiser steps.
    UploadAdapter {
        round: RoundKey,
        split: u32,
        steps: u64,
    },
    RoundResult(RoundResult),
    /// The last event.
    Finished(FinishReason),
    /// The last event.
    Failed(ClientFailure),
}
