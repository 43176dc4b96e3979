//! What the machine asks of its driver, and what it is told: the values that they exchange.
//!
//! Separate so that drivers can be read against this page alone.

use std::fmt;
use std::time::Duration;

use super::state::State;
use crate::data::{Cursor, Summary as DataSummary};
use crate::protocol::message::{Assignment, Blob, Digest, Gradient, RoundResult};
use crate::protocol::{
    ActivationsInput, AdapterInput, ClientConfig, ClientError, ClientFailure, Endpoint, FinishReason,
};
use crate::terms::ids::{ClientId, RoundKey, StepKey};
use crate::terms::moments::Moments;
use crate::terms::speed::Speed;

/// Who joins, and as whom.
pub struct Config {
    /// Its passport is that of `resume`.
    pub client: ClientConfig,
    /// Where the run is, for people who look into what is kept.
    pub server: String,
    /// Whether the driver can keep what is to be stored.
    pub keeps: bool,
    /// What was stored before.
    pub resume: Option<State>,
}

/// What a driver is to do, in this order.
#[derive(Debug, PartialEq)]
pub enum Output<C> {
    /// Open a socket; answer with `connected` or `disconnected`. Without a URL the service is at the join URL's origin.
    Connect {
        /// The server.
        endpoint: Endpoint,
        /// Where it is.
        url: Option<String>,
    },
    /// Send a frame over the socket opened last for this server.
    Transmit {
        /// The server.
        endpoint: Endpoint,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// Close the socket, after what was transmitted.
    Close {
        /// The server.
        endpoint: Endpoint,
    },
    /// Fetch files; answer with `fetched`. One of a higher number takes the place of one that is under way.
    Fetch(Fetch),
    /// Do this and answer with `done`. There is never more than one.
    Compute(Task),
    /// Keep this in place of what was kept before, in such a way that a crash leaves one or the other; answer with `stored`.
    Store(Vec<u8>),
    /// Remove what was kept.
    Forget,
    /// For people.
    Show(Report),
    /// The last output.
    End(Result<FinishReason, Failure<C>>),
}

/// What is missing of an assignment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The last parts of the model, in their order.
    pub weights: Vec<Blob>,
    /// For data that is still to be read.
    pub tokenizer: Option<Blob>,
}

/// Files to fetch, where they are not at hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Of this fetch; later ones have higher numbers.
    pub number: u64,
    /// The files.
    pub wanted: Wanted,
}

/// Something to compute.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// Make room for what it names, of which nothing need be there that an earlier one left.
    Assign(Box<Assignment>),
    /// Put together what was fetched, and the data.
    Load,
    /// Go back to `restore`, if there is something, and count the round's examples from zero.
    BeginRound {
        /// The round, and which attempt at it.
        round: RoundKey,
        /// Where training stood.
        restore: Option<Box<Standing>>,
        /// Whether to say where training then stands.
        keep: bool,
    },
    /// Put these values into the client side's adapter. Moments are those of the last blocks, which are new to this client.
    Install {
        /// The flat adapter.
        values: Vec<f32>,
        /// Of the last blocks.
        moments: Option<Moments>,
    },
    /// Run the next batch up to the cut.
    Forward(StepKey),
    /// Run backward and take the optimiser step.
    Backward {
        /// The step of the last `Forward`.
        key: StepKey,
        /// Of its activations.
        gradient: Box<Gradient>,
    },
    /// Give the adapter, with the moments of the blocks from `split` on, if there are any, as after `steps` optimiser steps.
    Collect {
        /// The round that is over.
        round: RoundKey,
        /// Where the next one cuts.
        split: u32,
        /// Of the optimiser, in the run.
        steps: u64,
    },
}

/// What came of a task.
#[derive(Clone, Debug, PartialEq)]
pub enum Done {
    /// Of `Assign`: what is still missing.
    Assigned(Wanted),
    /// Of `Load`.
    Loaded {
        /// What this device computes of the assignment.
        speed: Option<Speed>,
        /// Of the examples.
        data: Digest,
        /// Where they were just read.
        summary: Option<DataSummary>,
    },
    /// Of `BeginRound`: where training then stands, if that was asked for.
    Began(Option<Standing>),
    /// Of `Install`.
    Installed,
    /// Of `Forward`.
    Activations(ActivationsInput),
    /// Of `Backward`.
    StepDone {
        /// How long.
        took: Duration,
    },
    /// Of `Collect`, with where training stands after the round.
    Adapter(AdapterInput, Standing),
}

/// Where training stands but for the adapter's values, which the server knows.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    /// Of the adapter's values.
    pub moments: Moments,
    /// The place in the data.
    pub cursor: Cursor,
}

/// Why a driver could not do something.
pub trait Cause: fmt::Display {
    /// Whether trying again in a moment could help.
    fn may_pass(&self) -> bool;
}

/// How taking part ended badly.
#[derive(Debug, PartialEq)]
pub enum Failure<C> {
    /// A server refused, or cannot be reached.
    Session(ClientFailure),
    /// What was computed is not what was agreed.
    Answer(ClientError),
    /// The driver could not do something.
    Driver(C),
}

/// What is being waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// A server that cannot be reached.
    Server(Endpoint),
    /// A server that has said when it will be back.
    Return,
    /// Parts of the model that could not be fetched.
    Weights,
}

/// What happens, for people. Rounds and steps count from 1.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// A server can be reached, for the first time.
    Connected,
    /// In the run; `again` where it has been in it before, as the same client.
    Admitted {
        /// As whom.
        client: ClientId,
        /// As the same as before.
        again: bool,
    },
    /// The server has another run than the one that was kept.
    OtherRun,
    /// In the run that it was in before, but as somebody new: the server did not know it any more.
    Unknown,
    /// The data is not what it was when the run was left: it begins at its first example.
    OtherData,
    /// Told once a second, of the main server alone while that is out of reach.
    Waiting {
        /// What for.
        what: Awaited,
        /// Why it is not there.
        reason: Option<String>,
        /// The first time of a row of failures.
        first: bool,
        /// Until it is tried again.
        again_in: Duration,
        /// For how long it has been waited by now.
        passed: Duration,
    },
    /// A part of the model is being fetched; `done` of `bytes` are there. Said by the driver.
    Fetching {
        /// The part's.
        name: String,
        /// Bytes that are there.
        done: u64,
        /// Bytes that it has.
        bytes: u64,
    },
    /// Something new is to be loaded.
    Assigned {
        /// Of the run.
        rounds: u32,
        /// Of a round.
        local_steps: u32,
    },
    /// It is loaded.
    Loaded {
        /// Of the data, where it was just read.
        summary: Option<DataSummary>,
        /// That this client runs.
        blocks: u32,
        /// Of the run.
        rounds: u32,
        /// Still to go.
        steps: u32,
    },
    /// The client takes part in a round.
    RoundStarted {
        /// Its number.
        round: u32,
        /// Of the run.
        rounds: u32,
        /// Clients in it.
        members: u32,
    },
    /// A local step is done.
    Step {
        /// The round's number.
        round: u32,
        /// Its number in the round.
        step: u32,
        /// Of the round.
        steps: u32,
        /// This client's mean over its targets.
        loss: f32,
        /// All members' mean over theirs.
        mean_loss: f32,
        /// Targets of this client.
        tokens: u64,
    },
    /// What came of a round.
    Round(RoundResult),
    /// Something could not be kept; it is tried again.
    Unsaved {
        /// Why.
        detail: String,
    },
    /// It could be kept again.
    Saved,
}
