//! What a run tells people while it goes on, and what it has come to.
//!
//! Separate because whoever shows a run needs these and nothing else of the coordinator.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::IpAddr;
use std::time::Duration;

use super::super::metrics::{RoundRecord, StepRecord};
use crate::split::Evaluation;

/// What happens in a run, for people. Rounds and steps count from 1.
#[derive(Clone, Debug)]
pub enum Report {
    Joined {
        client: u64,
        name: String,
        device: String,
    },
    Left {
        client: u64,
        name: String,
        reason: String,
    },
    Refused {
        address: IpAddr,
        reason: String,
    },
    /// More refusals than are told one by one, by reason.
    RefusedMore {
        count: u64,
        reasons: BTreeMap<String, u64>,
    },
    /// Validation before training.
    Baseline(Evaluation),
    /// The run goes on after an interruption, once so many are back or were waited for in vain.
    Resumed {
        round: u32,
        awaited: usize,
    },
    RoundStarted {
        round: u32,
        members: usize,
    },
    RoundLost {
        round: u32,
    },
    /// The round came to nothing that can be used, and is begun again.
    RoundRejected {
        round: u32,
        reason: String,
    },
    /// What is to hold from this round on.
    Planned {
        round: u32,
        cut: usize,
        /// Clients' own cuts, by client; empty where `cut` is everybody's.
        cuts: BTreeMap<u64, usize>,
        rank: usize,
        reason: String,
    },
    Step(StepRecord),
    Round(RoundRecord),
    /// Nobody is left to train with.
    Waiting {
        limit: Duration,
    },
    /// The link to a federated server elsewhere, or from a main server elsewhere.
    Link {
        connected: bool,
        detail: String,
    },
    /// A federated server averaged a round.
    Averaged {
        round: u32,
        adapters: usize,
    },
    /// Something could not be written, or can be again; the run goes on.
    Trouble {
        detail: String,
    },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    Completed,
    /// Everybody left and nobody came back in time.
    NoClients,
    Stopped(String),
    /// A round came to nothing that can be used, however often it was tried.
    Diverged(String),
    /// The main server ended the run of this federated server.
    RunClosed,
}

/// A run in numbers.
#[derive(Clone, Debug)]
pub struct Summary {
    pub ending: Ending,
    /// Rounds that were averaged, and optimiser steps taken.
    pub rounds: u32,
    pub steps: u64,
    pub tokens: u64,
    pub seconds: f64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    /// Validation before training and after the last round.
    pub baseline: Option<Evaluation>,
    pub last: Option<Evaluation>,
}

/// What was said to be unwritten, so that it is said once.
#[derive(Default)]
pub(super) struct Unwritten(BTreeSet<&'static str>);

impl Unwritten {
    /// Notes how writing `what` went, which is tried again with the next round, and reports a failure that is new.
    pub(super) fn note(&mut self, what: &'static str, written: Result<(), impl Display>, report: &dyn Fn(Report)) {
        match written {
            Ok(()) => {
                self.0.remove(what);
            }
            Err(error) if self.0.insert(what) => report(Report::Trouble {
                detail: format!("{error}; the run goes on, and {what} is tried again with every round"),
            }),
            Err(_) => {}
        }
    }
}
