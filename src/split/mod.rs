//! The model on each side of the cut, and what crosses it.
//!
//! ```text
//! client k: embedding, blocks 0..cut ──activations S_k──▶ server: blocks cut.., head, loss
//!                                   ◀──d loss_k / d S_k──
//! ```
//! The server's adapter takes one optimiser step on `Σ w_k loss_k`, `w_k = tokens_k / Σ tokens`; every client gets the gradient of
//! its own mean loss, not scaled by `w_k`, and takes a step of its own. With one client this is centralised training.
//! (SflLLM, arXiv 2504.14667.) The server's step is a stream: a contribution runs through its blocks when it comes, in a lane of its
//! own, and is answered at once; the step closes with the sum of the lanes' adapter gradients, in client order, so that its bits do
//! not depend on who came first. A lane costs the memory of one adapter gradient. One whose loss or gradient is not finite leaves
//! nothing behind.
//!
//! Gradient clipping is by the norm of each side's own adapter gradient, since neither side sees the other's: with a clip the
//! split run differs from the centralised one by that, and by nothing else.
//!
//! Clients may have cuts of their own. The server then holds the blocks above the smallest one; what a client sends enters its
//! stack at the client's cut and its gradient leaves there, so a block has the gradient of the contributions that pass it.
//!
//! The cut can move between steps: blocks go from one side to the other with their adapter and its optimiser's moments, and
//! training goes on as if they had always been there.
//!
//! Head, labels and loss are on the server here; only [`ServerPart`] knows that, so that a later shape can keep them on the client.

mod client;
mod cut;
mod server;
mod speed;

pub use client::ClientPart;
pub use server::{Closed, Contribution, Evaluation, Moved, Reply, ServerPart};
pub use speed::Clock;

use crate::compute;
use crate::model::ModelError;
use crate::model::adapter::{AdapterError, AdapterLayout, LoraSpec};
use crate::model::architecture::Architecture;
use crate::model::weights::WeightsError;
use crate::terms::ids::ClientId;
use crate::terms::optimizer::OptimizerSettings;
use crate::terms::tensor::{IGNORED_TARGET, WireForm, WireTensorError};

/// What a side of the cut was given that it cannot use, or what its device could not do.
#[expect(missing_docs, reason = "the messages say it")]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Compute(#[from] compute::Error),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error("the cut must leave a block on each side: 1 to {} of {blocks} blocks, not {cut}", .blocks - 1)]
    Split { cut: usize, blocks: usize },
    #[error("activations of {found} blocks, where the server has blocks {cut} to {}", .blocks - 1)]
    OtherCut { cut: usize, blocks: usize, found: usize },
    #[error("{what} has {found} values, expected {expected}")]
    Length {
        what: &'static str,
        expected: usize,
        found: usize,
    },
    #[error("a tensor in {found} on the wire, where {expected} was agreed")]
    Form { expected: WireForm, found: WireForm },
    #[error(transparent)]
    Tensor(#[from] WireTensorError),
    #[error("sequences of {seq} do not fit: the run was set up for {longest} and the model has {positions} positions")]
    Sequence {
        seq: usize,
        longest: usize,
        positions: usize,
    },
    #[error("{what} {value} is outside the vocabulary of {vocab}")]
    Token {
        what: &'static str,
        value: i64,
        vocab: usize,
    },
    #[error("a gradient arrived for no forward pass")]
    NoForward,
    #[error("{client} has no lane in this step")]
    NoLane { client: ClientId },
}

/// Why a contribution has no lane in a step. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// It is not what was agreed.
    #[error(transparent)]
    Refused(Error),
    /// It is not finite.
    #[error("its loss is {0}")]
    Loss(f64),
    /// It would spoil the adapter that it is added to.
    #[error("its gradient has a value that is not finite")]
    Gradient,
    /// It has a lane already.
    #[error("it came a second time")]
    Again,
    /// Not the contribution's fault: the device could not compute it.
    #[error(transparent)]
    Device(compute::Error),
}

impl From<compute::Error> for LaneError {
    fn from(error: compute::Error) -> Self {
        LaneError::Device(error)
    }
}

/// What both sides of a run agree on.
#[derive(Clone, Debug, PartialEq)]
pub struct Training {
    /// Rank, scale and targets of the adapter, the same on both sides.
    pub spec: LoraSpec,
    /// Settings of both sides' optimisers.
    pub optimizer: OptimizerSettings,
    /// Rows of a client's batch.
    pub batch: usize,
    /// Longest sequence.
    pub seq: usize,
    /// How activations and gradients travel.
    pub wire: WireForm,
}

impl Training {
    fn check(&self, model: &Architecture) -> Result<(), Error> {
        self.check_seq(self.seq, model)
    }

    fn check_seq(&self, seq: usize, model: &Architecture) -> Result<(), Error> {
        if seq == 0 || seq > self.seq || seq > model.positions {
            return Err(Error::Sequence {
                seq,
                longest: self.seq,
                positions: model.positions,
            });
        }
        Ok(())
    }
}

impl From<ModelError> for Error {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Compute(error) => Error::Compute(error),
            ModelError::Weights(error) => Error::Weights(error),
        }
    }
}

fn check_length(what: &'static str, found: usize, expected: usize) -> Result<(), Error> {
    if found != expected {
        return Err(Error::Length { what, expected, found });
    }
    Ok(())
}

fn check_tokens(tokens: &[u32], vocab: usize) -> Result<(), Error> {
    match tokens.iter().find(|&&token| token as usize >= vocab) {
        Some(&token) => Err(Error::Token {
            what: "token",
            value: token.into(),
            vocab,
        }),
        None => Ok(()),
    }
}

fn check_targets(targets: &[i32], vocab: usize) -> Result<(), Error> {
    match targets
        .iter()
        .find(|&&target| target != IGNORED_TARGET && !(0..vocab as i64).contains(&target.into()))
    {
        Some(&target) => Err(Error::Token {
            what: "target",
            value: target.into(),
            vocab,
        }),
        None => Ok(()),
    }
}

fn check_adapter(layout: &AdapterLayout, values: &[f32]) -> Result<(), Error> {
    check_length("the adapter", values.len(), layout.len())
}
