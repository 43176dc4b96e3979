//! One step: its members' activations as they come, and what the driver made of them.
//!
//! Separate because a step has rules of its own: what may be in a member's message, that each is taken once, and that the shares
//! of those who are in it add up to 1.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::super::message::{Activations, Control, Digest, Gradient, Message, RunConfig, StepDone, StepStart};
use super::MainServerSession;
use super::config::MainError;
use super::event::{Contribution, DepartureReason, GradientOutput};
use super::round::Phase;
use crate::terms::ids::{ClientId, StepKey};
use crate::terms::tensor::{IGNORED_TARGET, WireLayout};

/// What is kept of a contribution while the driver computes.
struct Received {
    layout: WireLayout,
    tokens: u64,
    activations: Digest,
}

/// A step that waits for activations.
pub(super) struct Gathering {
    key: StepKey,
    /// With what has come.
    members: BTreeMap<ClientId, Option<(Received, Contribution)>>,
}

impl Gathering {
    pub fn new(key: StepKey, members: &BTreeSet<ClientId>) -> Gathering {
        Gathering {
            key,
            members: members.iter().map(|client| (*client, None)).collect(),
        }
    }

    pub fn key(&self) -> StepKey {
        self.key
    }

    pub fn members(&self) -> BTreeSet<ClientId> {
        self.members.keys().copied().collect()
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Whether this member's activations have not come.
    pub(crate) fn awaits(&self, client: ClientId) -> bool {
        self.members.get(&client).is_some_and(Option::is_none)
    }

    /// Whether all have come.
    pub(crate) fn is_complete(&self) -> bool {
        self.members.values().all(Option::is_some)
    }

    /// Returns whether the client was a member.
    pub fn remove(&mut self, client: ClientId) -> bool {
        self.members.remove(&client).is_some()
    }

    /// Takes in a member's activations.
    fn insert(&mut self, client: ClientId, checked: (Received, Contribution)) {
        self.members.insert(client, Some(checked));
    }

    /// Ends the waiting: what the driver is to compute, in client order, each with its share.
    pub fn close(&mut self) -> (Computing, Vec<Contribution>) {
        let mut received = BTreeMap::new();
        let mut contributions = Vec::new();
        for (client, (record, contribution)) in std::mem::take(&mut self.members)
            .into_iter()
            .filter_map(|(client, given)| Some((client, given?)))
        {
            received.insert(client, record);
            contributions.push(contribution);
        }
        share(&mut contributions);
        let computing = Computing {
            key: self.key,
            members: received,
        };
        (computing, contributions)
    }
}

/// A step that the driver computes.
pub(super) struct Computing {
    key: StepKey,
    members: BTreeMap<ClientId, Received>,
}

impl Computing {
    pub fn key(&self) -> StepKey {
        self.key
    }

    pub fn members(&self) -> BTreeSet<ClientId> {
        self.members.keys().copied().collect()
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Returns whether the client was a member.
    pub fn remove(&mut self, client: ClientId) -> bool {
        self.members.remove(&client).is_some()
    }

    /// Whether the gradients have the layouts of the activations they belong to.
    fn check(&self, outputs: &[GradientOutput]) -> Result<(), MainError> {
        for output in outputs {
            if let Some(received) = self.members.get(&output.client)
                && received.layout != output.gradient.layout()
            {
                return Err(MainError::GradientLayout {
                    client: output.client,
                    given: output.gradient.layout(),
                    expected: received.layout,
                });
            }
        }
        Ok(())
    }

    /// Whether an output is a member's, and finite.
    fn is_usable(&self, output: &GradientOutput) -> bool {
        self.members.contains_key(&output.client) && output.loss.is_finite() && output.gradient.is_finite()
    }

    /// Mean loss over the targets of all members that have an output; 0 without any target.
    fn mean_loss(&self, outputs: &[GradientOutput]) -> f32 {
        let weighted = |output: &GradientOutput| {
            let received = self.members.get(&output.client)?;
            Some((received.tokens, f64::from(output.loss)))
        };
        let tokens: u64 = outputs.iter().filter_map(weighted).map(|(tokens, _)| tokens).sum();
        let total: f64 = outputs
            .iter()
            .filter_map(weighted)
            .map(|(tokens, loss)| tokens as f64 * loss)
            .sum();
        if tokens == 0 {
            0.0
        } else {
            (total / tokens as f64) as f32
        }
    }
}

/// Checks activations against what was agreed, where the client's cut is after `cut` blocks. The error is said to the client.
fn check_activations(
    config: &RunConfig,
    cut: u32,
    client: ClientId,
    given: Activations,
) -> Result<(Received, Contribution), String> {
    let Activations {
        split,
        examples,
        targets,
        tensor,
        ..
    } = given;
    let layout = tensor.layout();
    if !config.takes(layout) {
        let largest = config.largest_tensor();
        return Err(format!("activations of {layout}, where at most {largest} was agreed"));
    }
    if split != cut {
        return Err(format!("activations of {split} blocks, where the cut is after {cut}"));
    }
    if targets.len() != tensor.rows() {
        return Err(format!(
            "activations of {layout} with {} targets, not {}",
            targets.len(),
            tensor.rows()
        ));
    }
    let is_target =
        |target: &i32| *target == IGNORED_TARGET || u32::try_from(*target).is_ok_and(|target| target < config.vocab);
    if let Some(position) = targets.iter().position(|target| !is_target(target)) {
        return Err(format!(
            "target {position} is {}, outside the vocabulary of {}",
            targets[position], config.vocab
        ));
    }
    if !tensor.is_finite() {
        return Err("activations with a value that is not finite".to_owned());
    }
    if !(1..=layout.batch).contains(&examples) {
        return Err(format!("{examples} examples in a batch of {}", layout.batch));
    }
    let tokens = targets.iter().filter(|target| **target != IGNORED_TARGET).count() as u64;
    let received = Received {
        layout,
        tokens,
        activations: Digest::of(tensor.bytes()),
    };
    let contribution = Contribution {
        client,
        split,
        examples,
        tokens,
        weight: 0.0,
        targets,
        activations: tensor,
    };
    Ok((received, contribution))
}

/// Gives each contribution its share of the step's tokens; equal shares if there is no token at all.
fn share(contributions: &mut [Contribution]) {
    let total: u64 = contributions.iter().map(|contribution| contribution.tokens).sum();
    let count = contributions.len() as f64;
    for contribution in contributions {
        contribution.weight = if total == 0 {
            1.0 / count
        } else {
            contribution.tokens as f64 / total as f64
        };
    }
}

impl MainServerSession {
    /// The driver's answer to `StepReady`. A member without an output, or with a loss or gradient that is not finite,
    /// is dropped. Outputs for clients that have left since are ignored, as is an answer to a step that has been lost.
    ///
    /// # Errors
    /// When a gradient is not of the layout of the activations it belongs to; nothing is changed then.
    pub fn step_result(
        &mut self,
        now: Duration,
        key: StepKey,
        mut outputs: Vec<GradientOutput>,
    ) -> Result<(), MainError> {
        let Phase::Computing(computing) = &self.phase else {
            return Ok(());
        };
        if computing.key != key {
            return Ok(());
        }
        computing.check(&outputs)?;
        outputs.retain(|output| computing.is_usable(output));
        let mean_loss = computing.mean_loss(&outputs);

        let Phase::Computing(Computing { mut members, .. }) =
            std::mem::replace(&mut self.phase, Phase::Waiting { until: None })
        else {
            return Ok(());
        };
        self.steps += 1;
        let mut staying = BTreeSet::new();
        let mut sent = Vec::new();
        for GradientOutput { client, loss, gradient } in outputs {
            let Some(received) = members.remove(&client) else {
                continue;
            };
            let gradient = Gradient {
                key,
                activations: received.activations,
                loss,
                tokens: received.tokens,
                mean_loss,
                tensor: gradient,
            };
            staying.insert(client);
            let bytes_down = match self.roster.connection(client) {
                Some(connection) => self.door.send(connection, &Message::Gradient(gradient)),
                None => 0,
            };
            sent.push((client, bytes_down as u64));
        }
        self.timing.gradients_sent(key, now, sent);
        let next = key.step + 1;
        if next < self.config().local_steps {
            self.phase = Phase::Gathering(Gathering::new(key.round.step(next), &staying));
        } else {
            self.phase = Phase::Boundary {
                members: staying.clone(),
            };
        }
        for client in members.into_keys() {
            self.controls.push_back(Control::Departed {
                round: key.round,
                client,
            });
            self.expel(client, DepartureReason::Unusable);
        }
        // Only those who stay are told of the next step; they may have become fewer while the others were dropped.
        if matches!(self.phase, Phase::Gathering { .. }) {
            self.send_to_all(&staying, |count| {
                Message::StepStart(StepStart {
                    key: key.round.step(next),
                    members: count,
                })
            });
        }
        self.retest(now);
        Ok(())
    }

    pub(super) fn handle_activations(
        &mut self,
        client: ClientId,
        activations: Activations,
        bytes: u64,
        now: Duration,
    ) -> Result<(), String> {
        let unexpected = || {
            format!(
                "expected {}, got Activations of {}",
                self.expected_of(client),
                activations.key
            )
        };
        let Phase::Gathering(gathering) = &self.phase else {
            return Err(unexpected());
        };
        let awaited = gathering.awaits(client) && self.timing.unfinished(client).is_none();
        if activations.key != gathering.key || !awaited {
            return Err(unexpected());
        }
        let forward = activations.forward;
        let cut = self.placement.split_of(client);
        let checked = check_activations(self.config(), cut, client, activations)?;
        if let Phase::Gathering(gathering) = &mut self.phase {
            gathering.insert(client, checked);
        }
        self.timing.handle_activations(client, forward, bytes, now);
        Ok(())
    }

    pub(super) fn handle_step_done(&mut self, client: ClientId, done: StepDone, now: Duration) -> Result<(), String> {
        if self.timing.unfinished(client) != Some(done.key) {
            return Err(format!(
                "expected {}, got StepDone of {}",
                self.expected_of(client),
                done.key
            ));
        }
        self.timing.handle_step_done(client, done.backward, now);
        Ok(())
    }
}
