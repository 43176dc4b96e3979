//! What the main server and the federated server tell each other.
//!
//! Separate from `training` because in one process these are handed over as values, and never framed.

use std::fmt;
use std::time::Duration;

use super::Digest;
use crate::federated::{Errors, Exact, Rule};
use crate::terms::ids::{ClientId, RoundKey, RunId};
use crate::terms::moments::Moments;

/// Moments that come with an adapter: of so many values, the last ones, as after so many steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaving {
    pub len: u64,
    pub steps: u64,
}

/// A member of a round that opens, and the adapter it starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub client: ClientId,
    pub base: Digest,
    /// Numbers in its adapter, which are the first of the round's; at a rank of its own the first of every matrix'.
    pub adapter_len: u64,
    /// Where it is smaller than the run's.
    pub rank: Option<u32>,
}

/// Main → federated server. In one process the driver hands these over as values.
#[derive(Clone, PartialEq)]
pub enum Control {
    /// Opens the run, or repeats what is known after the link was lost.
    OpenRun {
        run: RunId,
        /// Key of the run's tickets.
        ticket_key: [u8; 32],
        /// The main server's clock at sending, by which tickets expire.
        now: Duration,
        ticket_lifetime: Duration,
        /// Numbers in the largest update the run can lead to, moments included.
        largest_update: u64,
        /// Clients' identity of the run, echoed in the handshake.
        model: Digest,
        tokenizer: Digest,
    },
    /// How adapters are aggregated from the next round on, and what they look like. Without it, by their mean.
    Rule(Rule),
    /// What rounds start from until there is an average: where that is not the last average. In the length of the average.
    Base { values: Vec<f32> },
    OpenRound {
        round: RoundKey,
        members: Vec<Member>,
        /// Numbers in the average: in the adapter of the deepest cut of the run.
        adapter_len: u64,
        /// Most examples one member can have used in the round.
        max_examples: u64,
    },
    /// Members have been asked for their adapters.
    Collect {
        round: RoundKey,
        /// What comes with the adapter.
        moments: Option<Leaving>,
        /// The main server's copy of the last of the average's values: of the blocks that not all members have.
        copy: Vec<f32>,
    },
    /// A member left the open round.
    Departed { round: RoundKey, client: ClientId },
    /// The run is over.
    CloseRun,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Control::OpenRun {
                run, largest_update, ..
            } => write!(f, "OpenRun({run}, at most {largest_update} numbers)"),
            Control::Rule(rule) => write!(f, "Rule({}, rank {})", rule.aggregation(), rule.shape().rank()),
            Control::Base { values } => write!(f, "Base({} values)", values.len()),
            Control::OpenRound { round, members, .. } => write!(f, "OpenRound({round}, {members:?})"),
            Control::Collect { round, moments, copy } => {
                write!(f, "Collect({round}, {moments:?}, a copy of {} values)", copy.len())
            }
            Control::Departed { round, client } => write!(f, "Departed({round}, {client})"),
            Control::CloseRun => write!(f, "CloseRun"),
        }
    }
}

/// Why a member's adapter is not in the average.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExclusionReason {
    /// The main server said it left.
    Departed,
    /// It has had no connection to the federated server for too long.
    Absent,
    /// Its adapter, or the moments with it, have the wrong length.
    WrongLength,
    /// Its adapter has a value that is not finite, or its moments one that cannot be.
    NotFinite,
    /// Its adapter comes from another base.
    WrongBase,
    /// It claims no examples, or more than a round has.
    Examples,
    /// It broke the protocol.
    Misbehaved,
    /// Its adapter, or what it was trained on, did not come in time. It is in the next round again.
    Late,
    /// Its adapter has moved much further than the others'.
    Outlier,
}

impl fmt::Display for ExclusionReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ExclusionReason::Departed => "left the round",
            ExclusionReason::Absent => "not connected to the federated server",
            ExclusionReason::WrongLength => "its adapter has the wrong length",
            ExclusionReason::NotFinite => "its adapter has a value that is not finite",
            ExclusionReason::WrongBase => "its adapter comes from another base",
            ExclusionReason::Examples => "its number of examples is impossible",
            ExclusionReason::Misbehaved => "it broke the protocol",
            ExclusionReason::Late => "it was too late",
            ExclusionReason::Outlier => "its adapter has moved much further than is usual in this run",
        })
    }
}

/// A member left out of a round, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exclusion {
    pub client: ClientId,
    pub reason: ExclusionReason,
}

/// A member of an average and its number of examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inclusion {
    pub client: ClientId,
    pub examples: u64,
}

/// Federated → main server.
#[derive(Clone, Debug, PartialEq)]
pub enum ControlReply {
    /// A member was left out while the round goes on.
    Excluded { round: RoundKey, exclusion: Exclusion },
    /// A member's adapter has come, in a frame of so many bytes.
    Received {
        round: RoundKey,
        client: ClientId,
        bytes: u64,
    },
    /// The round is averaged. No individual adapter is in here, unless one client was alone, or alone with its last blocks.
    RoundClosed(RoundClosed),
}

/// What members' adapters come to.
#[derive(Clone, Debug, PartialEq)]
pub struct Mean {
    /// Of `values`.
    pub digest: Digest,
    /// What members go on with.
    pub values: Vec<f32>,
    /// Of the blocks that leave the clients.
    pub moments: Option<Moments>,
    /// What is validated and saved, where that is more than `values`.
    pub exact: Option<Box<Exact>>,
    /// What averages miss, where that is known.
    pub errors: Option<Errors>,
}

/// The outcome of a round at the federated server.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundClosed {
    pub round: RoundKey,
    pub included: Vec<Inclusion>,
    pub excluded: Vec<Exclusion>,
    /// `None` when nobody was left.
    pub average: Option<Mean>,
}
