//! Everything a simulated run depends on.
//!
//! Separate so that a test can be read beside the list of what may go wrong.

use std::time::Duration;

use super::network::Weather;
use crate::protocol::message::LinkRates;
use crate::protocol::{Deadline, Endpoint};
use crate::terms::aggregation::Aggregation;

/// A thing that goes wrong, or a decision of somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The client's process starts, again after it crashed or was killed.
    Start(usize),
    /// The client says goodbye.
    Leave(usize),
    /// The client's machine vanishes; nobody is told.
    Crash(usize),
    /// The client's process dies; its connections close.
    Kill(usize),
    /// Nothing reaches or leaves the client for so long; nobody is told.
    Partition(usize, Duration),
    /// The client's machine is busy for so long: it answers pings, and computes nothing.
    Stall(usize, Duration),
    /// One of the client's connections closes at both ends.
    Cut(usize, Endpoint),
    /// The link between the two servers closes, if they are two processes.
    CutControl,
    /// The main server's process dies, with the federated server's where they are one, and is started again after so long. What it has
    /// kept is on its disk.
    KillServer(Duration),
    /// The main server is told to stop.
    Stop,
}

/// Everything a run depends on.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub weather: Weather,
    /// Clients there are; those without a `Fault::Start` start at once.
    pub clients: usize,
    /// Clients the first round waits for.
    pub needed: u32,
    pub rounds: u32,
    pub local_steps: u32,
    /// Two server processes with a link between them, instead of one.
    pub remote_control: bool,
    /// Time of a client's forward or backward pass and of the server's step.
    pub compute: (Duration, Duration),
    pub wait_for_client: Duration,
    /// How long members are waited for, and how many are enough then.
    pub deadline: Deadline,
    pub quorum: Option<u32>,
    /// Blocks of the client in each round, from 1 to 3; the last holds for the rounds after it. Without any the cut stays after
    /// the first block and nobody plans.
    pub splits: Vec<u32>,
    /// Blocks of each client that is there when the first round is planned, by its number; the cut then stays. Without any
    /// `splits` says.
    pub cuts: Vec<u32>,
    pub aggregation: Aggregation,
    /// Of every client's emulated uplinks, where there is a plan.
    pub rates: Option<LinkRates>,
    pub faults: Vec<(Duration, Fault)>,
    /// The main server's process dies right after it has kept something for the nth time, before anything that came of it is sent, and is
    /// started again after so long.
    pub kept_and_killed: Vec<(u32, Duration)>,
    /// Whether clients keep what it takes to come back as themselves when their process has died.
    pub keeps: bool,
    /// Processes that die instead of carrying out an output of their client, by its number among all of that client's, and start
    /// again a second later.
    pub deaths: Vec<(usize, u64)>,
    /// When to give up on the run.
    pub time_limit: Duration,
}

impl Scenario {
    /// A run without mishap.
    pub fn calm(clients: usize, rounds: u32, local_steps: u32) -> Scenario {
        Scenario {
            seed: 1,
            weather: Weather::CALM,
            clients,
            needed: clients as u32,
            rounds,
            local_steps,
            remote_control: false,
            compute: (Duration::from_millis(50), Duration::from_millis(200)),
            wait_for_client: Duration::from_secs(60),
            // Longer than anything takes that is not about being late.
            deadline: Deadline::After(Duration::from_secs(20 * 3600)),
            quorum: None,
            splits: Vec::new(),
            cuts: Vec::new(),
            aggregation: Aggregation::Mean,
            rates: None,
            faults: Vec::new(),
            kept_and_killed: Vec::new(),
            keeps: true,
            deaths: Vec::new(),
            time_limit: Duration::from_secs(24 * 3600),
        }
    }

    /// Blocks of the client in a round.
    pub(super) fn split(&self, round: u32) -> u32 {
        let planned = self.splits.get(round as usize).or(self.splits.last());
        planned.copied().unwrap_or(1)
    }
}
