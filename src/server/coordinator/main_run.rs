//! The main server's session with what it computes and counts.
//!
//! Separate because only a main server has one: the coordinator of a federated server does without.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::Error;
use super::super::inbox::{Side, Work};
use super::super::kept::{Identity, Kept};
use super::super::metrics::{RoundRecord, StepPhases, StepRecord};
use super::super::planner::{ClientFacts, Facts, RoundFacts, RoundPrediction, StartFacts};
use super::Traffic;
use super::measure::RoundMeasure;
use crate::model::architecture::Architecture;
use crate::protocol::{LeftOut, MainServerSession, Occasion, RunEnd};
use crate::split::Training;
use crate::terms::aggregation::Aggregation;
use crate::terms::format::Format;
use crate::terms::ids::{ClientId, StepKey};

/// The main server's session with what it computes and counts.
pub struct MainRun {
    pub(super) session: MainServerSession,
    pub(super) work: std::sync::mpsc::Sender<Work>,
    pub(super) about: About,
    /// Blocks of the client, clients' own cuts where they differ, and rank, as they are now.
    pub(super) cut: usize,
    pub(super) cuts: BTreeMap<ClientId, usize>,
    pub(super) rank: usize,
    /// When the current round, its current step, and the step's last arrival were.
    pub(super) round_started: Instant,
    pub(super) step_started: Instant,
    pub(super) step_gathered: Instant,
    /// Counted since the last step's line.
    pub(super) step_bytes: Traffic,
    /// What is known of the step that is being closed.
    pub(super) closing_step: Option<(StepKey, StepRecord)>,
    /// Written once its members have done it.
    pub(super) pending_step: Option<(StepKey, StepRecord)>,
    /// What its members took, where they were done before the step was closed.
    pub(super) step_phases: Option<(StepKey, Vec<StepPhases>)>,
    pub(super) measured: RoundMeasure,
    /// When a plan was asked for, and how long plans of this round have taken.
    pub(super) planning_since: Option<(Occasion, Instant)>,
    pub(super) planning: Duration,
    /// Of this round, and of the next.
    pub(super) prediction: Option<RoundPrediction>,
    pub(super) next_prediction: Option<RoundPrediction>,
    pub(super) pending_round: Option<RoundRecord>,
    /// What the main server's side began the round from, and what is kept of the session.
    pub(super) side: Arc<Side>,
    pub(super) keeping: Keeping,
    pub(super) names: HashMap<u64, String>,
    pub(super) outcome: Option<RunEnd>,
    pub(super) drained: bool,
    pub(super) saved: bool,
}

impl MainRun {
    pub fn new(
        session: MainServerSession,
        work: std::sync::mpsc::Sender<Work>,
        about: About,
        side: Arc<Side>,
        keeping: Keeping,
    ) -> Self {
        let now = Instant::now();
        Self {
            work,
            cut: session.placement().split() as usize,
            cuts: (session.placement().cuts.iter())
                .map(|(client, cut)| (*client, *cut as usize))
                .collect(),
            rank: about.training.spec.rank,
            about,
            round_started: now,
            step_started: now,
            step_gathered: now,
            step_bytes: Traffic::default(),
            closing_step: None,
            pending_step: None,
            step_phases: None,
            measured: RoundMeasure::default(),
            planning_since: None,
            planning: Duration::ZERO,
            side,
            keeping,
            session,
            prediction: None,
            next_prediction: None,
            pending_round: None,
            names: HashMap::new(),
            outcome: None,
            drained: false,
            saved: false,
        }
    }

    /// What a planner is told.
    pub(super) fn facts(&self, occasion: Occasion) -> Facts {
        let clients = self
            .session
            .status()
            .clients
            .into_iter()
            .filter(|client| client.ready)
            .map(|client| ClientFacts {
                id: client.client,
                name: client.name,
                device: client.device,
                memory_bytes: client.memory_bytes,
                speed: client.speed,
            })
            .collect();
        let About {
            architecture,
            training,
            weights,
            rounds,
            local_steps,
            ..
        } = &self.about;
        match occasion {
            Occasion::Start | Occasion::Resumption => Facts::Start(Box::new(StartFacts {
                clients,
                server_flops_per_s: None,
                cut: self.cut,
                cuts: self.cuts.clone(),
                is_resumed: occasion == Occasion::Resumption,
                rank: self.rank,
                architecture: architecture.clone(),
                training: training.clone(),
                weights: *weights,
                rounds: *rounds,
                local_steps: *local_steps,
            })),
            Occasion::Boundary(_) | Occasion::Membership => Facts::Round(RoundFacts {
                round: self.measured.round,
                rounds: *rounds,
                cut: self.cut,
                cuts: self.cuts.clone(),
                rank: self.rank,
                can_recut: occasion != Occasion::Membership && self.cuts.is_empty(),
                clients,
                measured: self.measured.clients(&self.measured.collected),
                server_s: self.measured.server_s(),
            }),
        }
    }

    /// A member that is not in a step or round, for the log.
    pub(super) fn excluded(&self, left_out: &LeftOut) -> Value {
        let LeftOut { client, reason } = left_out;
        json!({ "client": client.0, "name": self.names.get(&client.0), "reason": reason })
    }

    /// Fails when the thread has ended, about which it has said why.
    pub(super) fn compute(&self, work: Work) -> Result<(), Error> {
        self.work.send(work).map_err(|_| Error::WorkerGone)
    }
}

/// The run's state on disk.
pub enum Keeping {
    /// It begins with the run.
    Begins(Identity),
    Kept(Kept),
}

/// What a run is about, for records and planners.
pub struct About {
    pub model: String,
    pub architecture: Architecture,
    pub training: Training,
    pub aggregation: Aggregation,
    /// How matrices of blocks are held.
    pub weights: Format,
    pub rounds: u32,
    pub local_steps: u32,
    pub validates: bool,
}
