//! What has been measured of a round, summed up for planners and for the log.
//!
//! Separate because it is arithmetic alone.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::metrics::{MeasuredPhases, RoundPhases, StepPhases};
use super::super::planner::{ClientRound, RoundPrediction};
use crate::protocol::{CollectTime, StepTimes};
use crate::terms::ids::ClientId;
use crate::terms::phases::Phases;

/// What has been measured of a round.
#[derive(Default)]
pub(super) struct RoundMeasure {
    /// Counted from 1.
    pub round: u32,
    pub steps: u32,
    pub server: Duration,
    members: BTreeMap<ClientId, MemberMeasure>,
    /// Of the round before.
    pub collected: Vec<CollectTime>,
}

/// Sums over a member's steps.
#[derive(Clone, Copy, Default)]
struct MemberMeasure {
    steps: u32,
    phases: Phases<Duration>,
    bytes_up: u64,
    bytes_down: u64,
}

impl RoundMeasure {
    /// Begins a round, counted from 1. What the one before showed is forgotten, but for the way of its adapters.
    pub fn begin(&mut self, round: u32) {
        *self = RoundMeasure {
            round,
            collected: std::mem::take(&mut self.collected),
            ..RoundMeasure::default()
        };
    }

    pub fn add(&mut self, times: &StepTimes) {
        let sums = self.members.entry(times.client).or_default();
        sums.steps += 1;
        sums.phases += times.phases;
        sums.bytes_up += times.bytes_up;
        sums.bytes_down += times.bytes_down;
    }

    pub fn server_s(&self) -> Option<f64> {
        (self.steps > 0).then(|| self.server.as_secs_f64() / f64::from(self.steps))
    }

    /// Means over members' steps, with the collection of adapters as `collected` has it.
    pub fn clients(&self, collected: &[CollectTime]) -> Vec<ClientRound> {
        let means = self.members.iter().map(|(id, sums)| {
            let steps = f64::from(sums.steps);
            let collected = collected.iter().find(|time| time.client == *id);
            ClientRound {
                id: *id,
                steps: sums.steps,
                phases: sums.phases.as_secs_f64().map(|sum| sum / steps),
                activation_bits: 8.0 * sums.bytes_up as f64 / steps,
                gradient_bits: 8.0 * sums.bytes_down as f64 / steps,
                federated_s: collected.map(|time| time.took.as_secs_f64()),
                adapter_bits: collected.map(|time| 8.0 * time.bytes as f64),
            }
        });
        means.collect()
    }

    /// The same for the log, beside what was expected.
    pub fn phases(&self, collected: &[CollectTime], prediction: Option<&RoundPrediction>) -> Vec<RoundPhases> {
        let phases = self.clients(collected).into_iter().map(|mean| RoundPhases {
            client: mean.id.0,
            predicted: prediction.and_then(|prediction| prediction.clients.get(&mean.id).copied()),
            measured: MeasuredPhases {
                step: mean.phases,
                federated_s: mean.federated_s,
            },
        });
        phases.collect()
    }
}

pub(super) fn phases(times: &StepTimes) -> StepPhases {
    StepPhases {
        client: times.client.0,
        phases: times.phases.as_secs_f64(),
    }
}
