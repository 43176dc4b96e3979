//! Who gets which subchannels, how much power, which cut and which rank, so that training takes the least time: scenario to
//! plan. Pure f64; no GPU, no clock, native and in a browser.
//!
//! The problem is the paper's (arXiv 2504.14667). Its algorithm is here as [`Method::Bcd`], its baselines as [`Method::A`] to
//! [`Method::D`]. [`Method::Best`] goes further: it is exact on flat channels and small instances, and every answer carries a
//! lower bound that no plan can beat.
//!
//! * [`scenario`]: what a person writes down: geometry, radio, devices, model; [`instance`]: the same as bare numbers.
//! * [`Channel`]: a link; [`Problem`]: the objective; [`power`]: exact power control for given owners.
//! * Inside, `bound` has the count bound and `prices` one that knows of contention; `subchannel` finds owners for one link, with `local`
//!   search and, on small links, `exhaustive`ly, all of which improve an `ownership`; `search` goes over cut and rank; `baselines` are
//!   the paper's algorithm and what it is compared with.

pub(crate) mod baselines;
#[doc(hidden)]
pub mod bound;
pub(crate) mod channel;
pub(crate) mod delay;
mod exhaustive;
pub mod instance;
mod local;
mod ownership;
pub mod power;
pub(crate) mod prices;
pub mod scenario;
pub(crate) mod search;
pub(crate) mod subchannel;

use std::fmt;
use std::str::FromStr;

pub use channel::{Channel, LinkName, SnrPerWatt};
pub use delay::{Broadcast, Cell, Problem, RoundTimes};
pub use power::{Demand, LinkPlan};

use search::{Links, Solved};

/// Why there is no plan, or why one cannot be used. Clients count from 0.
#[expect(missing_docs, reason = "the messages say it")]
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("there are no clients")]
    NoClients,
    #[error(
        "the {link} link has {subchannels} subchannels for {clients} clients and each needs one; add subchannels or leave clients out"
    )]
    TooFewSubchannels {
        link: LinkName,
        clients: usize,
        subchannels: usize,
    },
    #[error("the {link} link has {subchannels} subchannels; at most {most}", most = channel::MAX_SUBCHANNELS)]
    TooManySubchannels { link: LinkName, subchannels: usize },
    #[error("{what} of the {link} link is {value} {unit}; it must be a finite number above 0")]
    Link {
        link: LinkName,
        what: &'static str,
        unit: &'static str,
        value: f64,
    },
    #[error("{what} of client {client} on the {link} link is {value}; it must be a finite number above 0")]
    Client {
        link: LinkName,
        client: usize,
        what: &'static str,
        value: f64,
    },
    #[error("{what} is {value}; it must be a finite number {range}")]
    Number {
        what: String,
        value: f64,
        range: &'static str,
    },
    #[error("{what} has {found} entries, expected {expected}")]
    Length {
        what: String,
        found: usize,
        expected: usize,
    },
    #[error("{what} is empty; give at least one")]
    Empty { what: &'static str },
    #[error(
        "rank {rank} has no rounds E(r) above 0 (found {rounds:?}); measure them with `sflllm calibrate`, or leave the rank out"
    )]
    Rounds { rank: u32, rounds: Option<f64> },
    #[error(
        "client {client} has {available_bytes:.0} bytes of memory and its part takes {needed_bytes:.0} at the least; \
         allow a shallower split, or leave the client out"
    )]
    Memory {
        client: usize,
        available_bytes: f64,
        needed_bytes: f64,
    },
    #[error(
        "no split and rank fit the memory of all clients at once; use --per-client-split, or leave the smallest client out"
    )]
    NothingFits,
    #[error("a client cannot be heard on the {link} link at its largest power: its rate there is 0")]
    Unreachable { link: LinkName },
    #[error("the plan breaks a constraint: {reason}")]
    Plan { reason: String },
}

/// How to solve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Method {
    /// Exact or certified.
    Best,
    /// The paper's block coordinate descent.
    Bcd,
    /// Everything at random.
    A,
    /// Subchannels and powers at random, cut and rank chosen.
    B,
    /// Cut at random, the rest by the paper's algorithm.
    C,
    /// Rank at random, the rest by the paper's algorithm.
    D,
}

impl Method {
    /// Every method, the best first.
    pub const ALL: [Method; 6] = [Method::Best, Method::Bcd, Method::A, Method::B, Method::C, Method::D];

    /// As the command line and reports spell it.
    pub fn name(self) -> &'static str {
        match self {
            Method::Best => "best",
            Method::Bcd => "bcd",
            Method::A => "a",
            Method::B => "b",
            Method::C => "c",
            Method::D => "d",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no method.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no method; choose best, bcd, a, b, c or d")]
pub struct ParseMethodError(String);

impl FromStr for Method {
    type Err = ParseMethodError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Method::ALL
            .into_iter()
            .find(|method| method.name() == text)
            .ok_or_else(|| ParseMethodError(text.to_owned()))
    }
}

/// What to do beside the method.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SolveOptions {
    /// For the random baselines.
    pub seed: u64,
    /// Every client may have its own cut; for [`Method::Best`].
    pub per_client_split: bool,
}

/// A cut for every client, and the rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    split_index: Vec<usize>,
    rank: usize,
}

impl Choice {
    fn uniform(split: usize, rank: usize, clients: usize) -> Self {
        Self {
            split_index: vec![split; clients],
            rank,
        }
    }

    fn is_uniform(&self) -> bool {
        self.split_index.windows(2).all(|pair| pair[0] == pair[1])
    }
}

/// The allocator's answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// How it was found.
    pub method: Method,
    /// `[client]`: index into the problem's splits.
    pub split_index: Vec<usize>,
    /// Index into the problem's ranks.
    pub rank_index: usize,
    /// Owners and powers of the main link.
    pub main: LinkPlan,
    /// Owners and powers of the federated link.
    pub federated: LinkPlan,
    /// Owners and powers of the gradients' link, where there is one.
    pub download: Option<LinkPlan>,
    /// The run's delay, and its energy at its weight, in s.
    pub total_s: f64,
    /// No plan of this kind (one cut for all, or each its own) is below, in s.
    pub lower_bound_s: f64,
}

impl Plan {
    /// How far the plan can be from the best, as a part of the lower bound.
    pub fn gap(&self) -> f64 {
        match self.total_s > self.lower_bound_s {
            true => (self.total_s - self.lower_bound_s) / self.lower_bound_s,
            false => 0.0,
        }
    }

    fn new(method: Method, solved: Solved, lower_bound_s: f64) -> Self {
        Self {
            method,
            split_index: solved.choice.split_index,
            rank_index: solved.choice.rank,
            main: solved.main,
            federated: solved.federated,
            download: solved.download,
            total_s: solved.total_s,
            lower_bound_s: lower_bound_s.min(solved.total_s),
        }
    }
}

/// Solves `problem`.
///
/// # Errors
/// [`Error`] names the client, link and constraint that make it impossible.
pub fn solve(problem: &Problem, method: Method, options: &SolveOptions) -> Result<Plan, Error> {
    problem.check()?;
    let links = Links::new(problem)?;
    let (solved, lower_s) = match (method, options.per_client_split) {
        (Method::Best, true) => search::per_client(&links)?,
        (Method::Best, false) => search::uniform(&links)?,
        _ => (
            baselines::alternate(&links, method, options.seed)?,
            links.uniform_bound_s(),
        ),
    };
    // Each number is finite, but what they come to need not be.
    match solved.total_s.is_finite() {
        true => Ok(Plan::new(method, solved, lower_s)),
        false => Err(Error::Number {
            what: "the total delay".to_owned(),
            value: solved.total_s,
            range: "above 0",
        }),
    }
}
