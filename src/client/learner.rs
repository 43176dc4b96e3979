//! Training on the loaded part, as the session asks for it.
//!
//! Separate from loading, which is over by then.

use std::time::Duration;

use super::Error;
use super::edge::Standing;
use super::loader::Held;
use super::plan::Plan;
use crate::data::{Batches, Example};
use crate::model::adapter::Adapter;
use crate::protocol::message::Gradient;
use crate::protocol::{ActivationsInput, AdapterInput};
use crate::split::{ClientPart, Clock};
use crate::terms::ids::{RoundKey, StepKey};
use crate::terms::moments::{MomentPolicy, Moments};
use crate::terms::speed::Speed;

/// Computes what the session asks for.
pub struct Learner {
    part: ClientPart,
    /// As it was installed; what of it is not trained is what it was from the beginning.
    installed: Adapter,
    plan: Plan,
    clock: Clock,
    batches: Batches,
    speed: Option<Speed>,
    /// Values, the last ones, whose moments are still to come.
    unfilled: usize,
    /// Moments of the last blocks came with the adapter that was installed last.
    gained: bool,
    /// Trained on in the current round.
    examples: u64,
    /// Of the last forward pass, until its gradient has come.
    pending: u64,
    /// Targets of the last forward pass.
    tokens: usize,
}

impl Learner {
    pub(super) fn new(
        part: ClientPart,
        installed: Adapter,
        plan: Plan,
        clock: Clock,
        batches: Batches,
        speed: Option<Speed>,
        unfilled: usize,
    ) -> Self {
        Self {
            part,
            installed,
            plan,
            clock,
            batches,
            speed,
            unfilled,
            gained: false,
            examples: 0,
            pending: 0,
            tokens: 0,
        }
    }

    /// What it learns for.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What this device computes of the plan, measured the first time. Training is not touched.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn speed(&mut self) -> Result<Option<Speed>, Error> {
        if self.speed.is_none() {
            self.speed = self.part.measure(self.clock).await?;
        }
        Ok(self.speed)
    }

    /// Gives up the assignment for another.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn release(self) -> Result<Held, Error> {
        let weights = self.part.weights().clone();
        Ok(Held {
            embedding: weights.embedding,
            blocks: weights.blocks,
            moments: self.part.moments().await?,
            cursor: Some(self.batches.cursor()),
            examples: Some(self.batches.into_examples()),
            plan: self.plan,
            speed: self.speed,
        })
    }

    /// `BeginRound`: goes back to where training stood, if it is told to, and counts this round's examples from zero.
    ///
    /// # Errors
    /// [`Error::Data`] for a place that the data does not have; [`Error::Split`].
    pub async fn begin_round(&mut self, restore: Option<&Standing>) -> Result<(), Error> {
        self.examples = 0;
        let Some(Standing { moments, cursor }) = restore else {
            return Ok(());
        };
        self.batches.restore(*cursor)?;
        if self.plan.moments == MomentPolicy::Reset {
            return Ok(self.part.set_moments(&Moments::zero(self.installed.layout.len()))?);
        }
        let own = self.part.moments().await?;
        // Of blocks that have come since then nothing is known but what came with them.
        if moments.len() >= own.len() || self.gained {
            let both = moments.len().min(own.len());
            let restored = moments.slice(0..both).followed_by(own.slice(both..own.len()));
            self.part.set_moments(&restored)?;
        }
        Ok(())
    }

    /// Where training stands.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn standing(&self) -> Result<Standing, Error> {
        Ok(Standing {
            moments: self.part.moments().await?,
            cursor: self.batches.cursor(),
        })
    }

    /// `InstallAdapter`: takes the trained values of the client's side, and the moments of blocks that are new to it. Where
    /// those do not come, because the blocks were moved while this client was away, or where the run's moments are of no use with
    /// other values, its optimiser begins anew.
    ///
    /// # Errors
    /// [`Error::Assignment`] for moments of other blocks, [`Error::Split`] for another length.
    pub async fn install(&mut self, values: &[f32], moments: Option<Moments>) -> Result<(), Error> {
        let Adapter {
            layout, values: all, ..
        } = &mut self.installed;
        layout.scatter(values, all)?;
        self.part.set_adapter(all)?;
        let none = Moments::zero(layout.len());
        self.gained = moments.is_some();
        match moments {
            _ if self.plan.moments == MomentPolicy::Reset => self.part.set_moments(&none)?,
            Some(gained) => {
                let own = layout.gather_moments(&self.part.moments().await?);
                let Some(kept) = own.len().checked_sub(gained.len()) else {
                    return Err(Error::Assignment("moments of more blocks than there are".to_owned()));
                };
                let moments = own.slice(0..kept).followed_by(gained);
                self.part.set_moments(&layout.scatter_moments(&moments)?)?;
            }
            None if self.unfilled > 0 => self.part.set_moments(&none)?,
            None => {}
        }
        self.unfilled = 0;
        Ok(())
    }

    /// `ComputeForward`: the next batch up to the cut.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn forward(&mut self, key: StepKey) -> Result<ActivationsInput, Error> {
        let start = (self.clock)();
        let batch = self.batches.next_batch();
        let rounds = u64::from(key.round.round) * u64::from(self.plan.local_steps);
        self.part.set_run_step(rounds + u64::from(key.step));
        let tensor = self.part.forward(&batch.tokens, batch.seq).await?;
        self.pending = batch.examples as u64;
        self.tokens = batch.target_count;
        Ok(ActivationsInput {
            key,
            examples: batch.examples as u32,
            forward: (self.clock)().saturating_sub(start),
            targets: batch.targets,
            tensor,
        })
    }

    /// `ComputeBackward`: the gradient of this client's own loss, and one optimiser step. Returns what they took.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn backward(&mut self, gradient: Gradient) -> Result<Duration, Error> {
        let start = (self.clock)();
        self.part.backward(&gradient.tensor).await?;
        self.examples += std::mem::take(&mut self.pending);
        Ok((self.clock)().saturating_sub(start))
    }

    /// `UploadAdapter`: the adapter's trained values, flat, the examples it was trained on in this round, and the moments of the blocks from `split`
    /// on as after `steps` optimiser steps. With it, where training stands.
    ///
    /// # Errors
    /// [`Error::Split`].
    pub async fn adapter(&self, round: RoundKey, split: u32, steps: u64) -> Result<(AdapterInput, Standing), Error> {
        let layout = &self.installed.layout;
        let values = layout.gather(&self.part.adapter().await?);
        let standing = self.standing().await?;
        let stays = values.len() / self.plan.cut * (split as usize).min(self.plan.cut);
        let leaving = || {
            layout
                .gather_moments(&standing.moments)
                .slice(stays..values.len())
                .at(steps)
        };
        let moments = (stays < values.len()).then(leaving);
        let input = AdapterInput {
            round,
            examples: self.examples,
            values,
            moments,
        };
        Ok((input, standing))
    }

    /// Targets of the last forward pass.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Gives the data back, to go on with in another run.
    pub fn into_examples(self) -> Vec<Example> {
        self.batches.into_examples()
    }
}
