//! The run at a glance, for consoles and pages.
//!
//! Separate because nothing in a run depends on it.

use super::MainServerSession;
use super::round::Phase;
use crate::terms::ids::ClientId;
use crate::terms::speed::Speed;

/// Where the run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunPhase {
    /// For clients to join or return.
    Waiting,
    /// For activations.
    Gathering,
    /// For the driver's `contributed`: nobody's activations are missing.
    Computing,
    /// For the last step's backward passes, or for the driver's `planned`.
    Boundary,
    /// For the federated server.
    Averaging,
    /// For the driver's `validated`.
    Validating,
    Finished,
}

/// A client as the status shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientStatus {
    pub client: ClientId,
    pub name: String,
    pub device: String,
    /// Memory it can give, in bytes; 0 when unknown.
    pub memory_bytes: u64,
    pub speed: Option<Speed>,
    pub ready: bool,
    /// Whether it is a member of the current round.
    pub member: bool,
    /// Whether the current step waits for its activations.
    pub awaited: bool,
}

/// The run at a glance.
#[derive(Clone, Debug, PartialEq)]
pub struct RunStatus {
    pub phase: RunPhase,
    pub round: u32,
    pub rounds: u32,
    /// Local step within the round.
    pub step: u32,
    pub local_steps: u32,
    /// Connected clients.
    pub clients: Vec<ClientStatus>,
}

impl MainServerSession {
    /// The run as it is now.
    pub fn status(&self) -> RunStatus {
        let config = self.config();
        let (phase, step) = match &self.phase {
            Phase::Waiting { .. } => (RunPhase::Waiting, 0),
            Phase::Step(step) if step.is_awaiting() => (RunPhase::Gathering, step.key().step),
            Phase::Step(step) => (RunPhase::Computing, step.key().step),
            Phase::Boundary { .. } => (RunPhase::Boundary, config.local_steps),
            Phase::Averaging(_) => (RunPhase::Averaging, config.local_steps),
            Phase::Validating(_) => (RunPhase::Validating, config.local_steps),
            Phase::Finished { .. } => (RunPhase::Finished, 0),
        };
        let members = self.phase.members();
        let clients = self.roster.connected().map(|(id, client)| ClientStatus {
            client: id,
            name: client.name().to_owned(),
            device: client.device().to_owned(),
            memory_bytes: client.memory_bytes(),
            speed: client.speed(),
            ready: client.is_ready(),
            member: members.contains(&id),
            awaited: self.phase.awaited_step(id).is_some(),
        });
        RunStatus {
            phase,
            round: self.round.round,
            rounds: config.rounds,
            step,
            local_steps: config.local_steps,
            clients: clients.collect(),
        }
    }
}
