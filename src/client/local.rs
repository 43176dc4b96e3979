//! A run in one thread, driven by a [`LocalRun`](crate::protocol::LocalRun): the assignment is made from the model itself, and what
//! clients and main server are asked to compute is answered at once.
//!
//! Separate because a client anywhere else fetches its assignment's parts, and everybody else computes while the sessions go on.

use std::time::Duration;

use super::plan::{training, units};
use super::{Error, Learner, Plan};
use crate::model::adapter::AdapterLayout;
use crate::model::weights::{Holding, Weights};
use crate::protocol::message::{Assignment, Blob, RunConfig};
use crate::protocol::{ClientError, ClientEvent, ClientSession, Contribution, GradientOutput};
use crate::split::{self, LaneError, ServerPart};
use crate::terms::ids::RunId;

/// The assignment of a run on this model, and the bytes of its parts in the order in which [`Loader::add`](super::Loader::add)
/// takes them. It has no tokenizer.
///
/// # Errors
/// As [`Plan::new`]; [`Error::Weights`] when a part cannot be read.
pub fn assign(
    run: RunId,
    config: RunConfig,
    weights: &Weights,
    holding: Holding,
) -> Result<(Assignment, Vec<Vec<u8>>), Error> {
    let model = weights.model();
    let cut = config.split as usize;
    let mut assignment = Assignment::new(run, config, model.to_json());
    let spec = training(model, &assignment)?.spec;
    assignment.adapter_len = AdapterLayout::new(model, &spec, 0..cut)?.trained_len() as u64;
    let mut parts = Vec::new();
    for unit in units(cut) {
        let data = weights.unit(unit, holding)?;
        let mut bytes = Vec::new();
        data.encode(&mut bytes).map_err(|source| Error::Read {
            name: unit.to_string(),
            source,
        })?;
        assignment.weights.push(Blob::of(unit.to_string(), &bytes));
        parts.push(bytes);
    }
    Plan::new(&assignment)?;
    Ok((assignment, parts))
}

/// Answers [`MainEvent::Contribution`](crate::protocol::MainEvent::Contribution): the answer goes to
/// [`MainServerSession::contributed`](crate::protocol::MainServerSession::contributed).
///
/// # Errors
/// [`LaneError`]; the step goes on without this contribution if the session is given `None`.
pub async fn contribute(part: &mut ServerPart, contribution: &Contribution) -> Result<GradientOutput, LaneError> {
    let client = contribution.client;
    let given = split::Contribution {
        cut: contribution.split as usize,
        activations: &contribution.activations,
        targets: &contribution.targets,
    };
    let reply = part.contribute(client, &given).await?;
    Ok(GradientOutput {
        client,
        loss: reply.loss as f32,
        gradient: reply.gradient,
    })
}

impl Learner {
    /// Answers an event of the session that it learns for, as far as it asks for something to be computed. What it only tells is
    /// given back, and so is an assignment that is not the one that was loaded.
    ///
    /// A round that is begun again is trained from where the attempt before left off. To go back, a driver keeps
    /// [`Learner::standing`] at [`ClientEvent::RoundStarted`] and gives it to [`Learner::begin_round`].
    ///
    /// # Errors
    /// As the answers: [`Error::Assignment`], [`Error::Split`].
    pub async fn answer(
        &mut self,
        session: &mut ClientSession,
        now: Duration,
        event: ClientEvent,
    ) -> Result<Option<ClientEvent>, Error> {
        let refused = |error: ClientError| Error::Assignment(error.to_string());
        match event {
            ClientEvent::Assigned(assignment) if Plan::new(&assignment)? == *self.plan() => session.ready(now, None),
            ClientEvent::RoundStarted { .. } => {
                self.begin_round(None).await?;
                return Ok(Some(event));
            }
            ClientEvent::InstallAdapter { values, moments, .. } => self.install(&values, moments).await?,
            ClientEvent::ComputeForward { key } => {
                let input = self.forward(key).await?;
                session.activations(now, input).map_err(refused)?;
            }
            ClientEvent::ComputeBackward { key, gradient } => {
                let took = self.backward(gradient).await?;
                session.step_done(now, key, took);
            }
            ClientEvent::UploadAdapter { round, split, steps } => {
                let input = self.adapter(round, split, steps).await?.0;
                session.adapter(now, input).map_err(refused)?;
            }
            told => return Ok(Some(told)),
        }
        Ok(None)
    }
}
