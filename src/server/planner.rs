//! Where the choice of cut, rank and link rates comes in: what the server knows, asked of a [`Planner`] at every boundary, and
//! the [`Decision`] it acts on.
//!
//! It is separate from the coordinator because how to choose is no matter of the server's. A planner runs in the compute thread,
//! which has nothing else to do at a boundary, and may take its time.

use std::collections::BTreeMap;

use crate::model::architecture::Architecture;
use crate::protocol::message::LinkRates;
use crate::split::Training;
use crate::terms::format::Format;
use crate::terms::ids::ClientId;
use crate::terms::phases::Phases;
use crate::terms::speed::Speed;

/// The largest rank that a planner may choose, unless the run began with a larger one: what the servers make room for.
pub const LARGEST_RANK: usize = 64;

/// Chooses how a run goes on.
pub trait Planner: Send {
    /// When the first clients are ready, before anything is trained: cut and rank may change. `None` leaves all as it is.
    ///
    /// # Errors
    /// A sentence, with which the run ends.
    fn start(&mut self, facts: &StartFacts) -> Result<Option<Decision>, String>;

    /// After the last step of a round, before adapters are asked for; and whenever a client is to take part that no decision
    /// has known, at which time the cut stays ([`RoundFacts::can_recut`]). `None` leaves all as it is: a client without a
    /// decision has no rates.
    ///
    /// # Errors
    /// A sentence, with which the run ends.
    fn boundary(&mut self, measured: &RoundFacts) -> Result<Option<Decision>, String>;
}

/// A client that is ready to take part.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientFacts {
    pub id: ClientId,
    pub name: String,
    pub device: String,
    /// 0 when unknown.
    pub memory_bytes: u64,
    pub speed: Option<Speed>,
}

/// What is known before the first round.
#[derive(Clone, Debug)]
pub struct StartFacts {
    pub clients: Vec<ClientFacts>,
    /// Of this server on its part, forward and backward.
    pub server_flops_per_s: Option<f64>,
    /// Blocks of the client, as configured.
    pub cut: usize,
    /// Clients' own cuts, where they differ already.
    pub cuts: BTreeMap<ClientId, usize>,
    pub rank: usize,
    pub architecture: Architecture,
    pub training: Training,
    /// How matrices of blocks are held.
    pub weights: Format,
    pub rounds: u32,
    pub local_steps: u32,
    /// The run was taken up again: cuts and rank stay as they are, only what is not kept of a plan is made anew.
    pub is_resumed: bool,
}

/// What was measured of a member in a round: means over its steps, in seconds and bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClientRound {
    pub id: ClientId,
    pub steps: u32,
    pub phases: Phases<f64>,
    /// Of the frames with activations and gradient.
    pub activation_bits: f64,
    pub gradient_bits: f64,
    /// From asking for the adapter until the federated server had it, and the bits of its frame, in the round before.
    pub federated_s: Option<f64>,
    pub adapter_bits: Option<f64>,
}

/// What is known at a boundary.
#[derive(Clone, Debug)]
pub struct RoundFacts {
    /// Counted from 1: the round that was measured; 0 when none has been.
    pub round: u32,
    pub rounds: u32,
    /// Blocks of the client; of those with the fewest, where clients have cuts of their own.
    pub cut: usize,
    /// Clients' own cuts, where they differ; who has none has `cut`.
    pub cuts: BTreeMap<ClientId, usize>,
    pub rank: usize,
    /// Whether a decision may move the cut. It may not where clients have cuts of their own.
    pub can_recut: bool,
    /// Everybody who is to take part in the next round, as it seems now.
    pub clients: Vec<ClientFacts>,
    /// The members of the round.
    pub measured: Vec<ClientRound>,
    /// The server's mean over the round's steps, in seconds.
    pub server_s: Option<f64>,
}

impl RoundFacts {
    /// Blocks of this client.
    pub fn cut_of(&self, client: ClientId) -> usize {
        self.cuts.get(&client).copied().unwrap_or(self.cut)
    }
}

/// What is to hold from the next round on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// Blocks of the client.
    pub cut: usize,
    /// Clients' own cuts, the smallest of which is `cut`: at the start only, for the whole run. Empty: `cut` is everybody's.
    pub cuts: BTreeMap<ClientId, usize>,
    /// Another one than now only at the start; α/rank stays.
    pub rank: usize,
    /// Of the clients' emulated uplinks; a client without has none.
    pub rates: BTreeMap<ClientId, LinkRates>,
    pub prediction: Option<RoundPrediction>,
    /// For people: a phrase.
    pub reason: String,
}

/// What a planner expects of a round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoundPrediction {
    pub clients: BTreeMap<ClientId, ClientPrediction>,
    /// The server's part of a step.
    pub server_s: f64,
    /// All steps and the collection of adapters.
    pub total_s: f64,
}

/// What a planner expects of a client: of one step, and of sending the adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ClientPrediction {
    pub step: Phases<f64>,
    pub federated_s: f64,
}

/// What a planner is asked.
#[derive(Clone, Debug)]
pub enum Facts {
    Start(Box<StartFacts>),
    Round(RoundFacts),
}

impl Facts {
    /// What the planner decides for a model of `blocks` blocks; an error where it cannot be carried out.
    pub(super) fn ask(&self, planner: &mut dyn Planner, blocks: usize) -> Result<Option<Decision>, String> {
        let decision = match self {
            Facts::Start(facts) => planner.start(facts)?,
            Facts::Round(facts) => planner.boundary(facts)?,
        };
        if let Some(decision) = &decision {
            self.check(decision, blocks)?;
        }
        Ok(decision)
    }

    fn check(&self, decision: &Decision, blocks: usize) -> Result<(), String> {
        let (cut, rank) = match self {
            Facts::Start(facts) => (facts.cut, facts.rank),
            Facts::Round(facts) => (facts.cut, facts.rank),
        };
        let fixed_cut = matches!(self, Facts::Round(facts) if !facts.can_recut);
        let mut cuts = std::iter::once(decision.cut).chain(decision.cuts.values().copied());
        if let Some(cut) = cuts.find(|&cut| cut == 0 || cut >= blocks) {
            return Err(format!(
                "the plan cuts after {cut} blocks, which leaves one side without any"
            ));
        }
        if let Some(&smallest) = decision.cuts.values().min() {
            if matches!(self, Facts::Round(_)) {
                return Err("the plan gives clients cuts of their own after the start".to_owned());
            }
            if smallest != decision.cut {
                return Err(format!(
                    "the plan's cut is after {} blocks, the smallest of its clients' after {smallest}",
                    decision.cut
                ));
            }
        }
        if decision.cut != cut && fixed_cut {
            return Err(format!(
                "the plan moves the cut from {cut} to {} where it cannot be moved",
                decision.cut
            ));
        }
        match self {
            Facts::Round(_) if decision.rank != rank => {
                return Err(format!(
                    "the plan changes the rank from {rank} to {} after training began",
                    decision.rank
                ));
            }
            _ if decision.rank == 0 || decision.rank > LARGEST_RANK.max(rank) => {
                return Err(format!(
                    "the plan's rank of {} is not one from 1 to {}",
                    decision.rank,
                    LARGEST_RANK.max(rank)
                ));
            }
            _ => {}
        }
        let impossible =
            |rates: &LinkRates| LinkRates::new(rates.main_bits_per_s, rates.federated_bits_per_s).is_none();
        match decision.rates.iter().find(|(_, rates)| impossible(rates)) {
            Some((client, rates)) => Err(format!("the plan gives {client} impossible link rates: {rates:?}")),
            None => Ok(()),
        }
    }
}
