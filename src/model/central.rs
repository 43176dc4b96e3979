//! The whole model on one device: the baseline that split training is held against, and what evaluates and generates.

use crate::compute::{Cost, Engine, Error};

use super::ModelError;
use super::adapter::{Adapter, AdapterError, AdapterLayout};
use super::architecture::Architecture;
use super::stack::{Stack, StackWeights};
use super::workspace::Extent;
use crate::terms::moments::Moments;
use crate::terms::optimizer::OptimizerSettings;

/// Summed token losses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counted {
    pub loss_sum: f64,
    pub tokens: usize,
}

impl std::ops::AddAssign for Counted {
    fn add_assign(&mut self, other: Self) {
        self.loss_sum += other.loss_sum;
        self.tokens += other.tokens;
    }
}

/// The whole model on one device, with its adapter and, to train, its optimiser: the baseline of split training.
pub struct Central {
    stack: Stack,
    optimizer: Option<OptimizerSettings>,
}

impl Central {
    /// The whole model for inputs up to `extent`; `optimizer` makes it trainable and needs an adapter.
    ///
    /// # Panics
    /// If `optimizer` is given without an adapter.
    pub fn new(
        engine: &Engine,
        model: &Architecture,
        weights: StackWeights,
        adapter: Option<&Adapter>,
        extent: Extent,
        optimizer: Option<OptimizerSettings>,
    ) -> Result<Self, Error> {
        assert!(optimizer.is_none() || adapter.is_some(), "training needs an adapter");
        Ok(Self {
            stack: Stack::new(
                engine,
                model,
                weights,
                adapter.map(|a| (&a.layout, a.values.as_slice())),
                extent,
                optimizer.is_some(),
            )?,
            optimizer,
        })
    }

    /// Loss of a batch of tokens and targets (batch, seq).
    pub async fn loss(&mut self, tokens: &[u32], targets: &[i32], seq: usize) -> Result<Counted, ModelError> {
        self.stack.upload_tokens(tokens, seq)?;
        let count = self.stack.upload_targets(targets, 1.0);
        self.stack.run("loss", seq, |stack, recording| {
            stack.record_blocks(recording, seq);
            stack.record_loss(recording, seq, false);
        })?;
        Ok(Counted {
            loss_sum: self.stack.loss_sum(seq).await?,
            tokens: count,
        })
    }

    /// One optimiser step on a batch; returns the loss before it.
    ///
    /// # Panics
    /// If the model was made without an optimiser.
    pub async fn step(&mut self, tokens: &[u32], targets: &[i32], seq: usize) -> Result<Counted, ModelError> {
        let settings = self.optimizer.expect("a trainable model");
        self.stack.upload_tokens(tokens, seq)?;
        let step = self.stack.steps();
        self.stack.begin_update(&settings, step, 1.0);
        let count = self.stack.upload_targets(targets, 1.0);
        self.stack.run("step", seq, |stack, recording| {
            stack.record_blocks(recording, seq);
            stack.record_loss(recording, seq, true);
            stack.record_backward(recording, seq, false);
            stack.record_update(recording);
        })?;
        Ok(Counted {
            loss_sum: self.stack.loss_sum(seq).await?,
            tokens: count,
        })
    }

    /// The arithmetic and traffic of a step on sequences of `seq`, once one was taken.
    pub fn step_cost(&self, seq: usize) -> Cost {
        self.stack.cost("step", seq).unwrap_or_default()
    }

    /// The gradient of a batch's mean loss with respect to the adapter, flat, without a step.
    pub async fn gradient(&mut self, tokens: &[u32], targets: &[i32], seq: usize) -> Result<Vec<f32>, ModelError> {
        self.stack.upload_tokens(tokens, seq)?;
        self.stack.upload_targets(targets, 1.0);
        self.stack.run("gradient", seq, |stack, recording| {
            stack.record_clear_gradient(recording);
            stack.record_blocks(recording, seq);
            stack.record_loss(recording, seq, true);
            stack.record_backward(recording, seq, false);
        })?;
        let gradient = self.stack.adapter_gradient().await?;
        self.stack
            .run("clear", 0, |stack, recording| stack.record_clear_gradient(recording))?;
        Ok(gradient)
    }

    /// The logits (vocab) after each of `positions` of the first row, given tokens (batch, seq).
    pub async fn logits(
        &mut self,
        tokens: &[u32],
        seq: usize,
        positions: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        self.stack.upload_tokens(tokens, seq)?;
        self.stack.run("hidden", seq, |stack, recording| {
            stack.record_blocks(recording, seq);
        })?;
        let mut logits = Vec::new();
        for position in positions {
            logits.push(self.stack.logits_at(position).await?);
        }
        Ok(logits)
    }

    /// The adapter's values, flat.
    pub async fn adapter(&self) -> Result<Vec<f32>, Error> {
        self.stack.adapter().await
    }

    /// Replaces the adapter's values.
    ///
    /// # Errors
    /// [`AdapterError::Length`] when they are not as many as the adapter has, or there is none.
    pub fn set_adapter(&mut self, values: &[f32]) -> Result<(), AdapterError> {
        let expected = self.stack.layout().map_or(0, AdapterLayout::len);
        if values.len() != expected {
            return Err(AdapterError::Length {
                expected,
                found: values.len(),
            });
        }
        if expected > 0 {
            self.stack.set_adapter(values);
        }
        Ok(())
    }

    /// The optimiser's moments of the adapter's values, and how many steps it has taken.
    ///
    /// # Panics
    /// If the model was made without an optimiser.
    pub async fn moments(&self) -> Result<Moments, Error> {
        assert!(self.optimizer.is_some(), "a trainable model");
        self.stack.moments().await
    }

    /// Replaces the adapter's values and their moments: the next step is the one after those that the moments have taken.
    ///
    /// # Errors
    /// [`AdapterError::Length`] when values or moments are not as many as the adapter has; nothing is replaced then.
    ///
    /// # Panics
    /// If the model was made without an optimiser.
    pub fn restore(&mut self, values: &[f32], moments: &Moments) -> Result<(), AdapterError> {
        assert!(self.optimizer.is_some(), "a trainable model");
        for found in [moments.first.len(), moments.second.len()] {
            if found != values.len() {
                return Err(AdapterError::Length {
                    expected: values.len(),
                    found,
                });
            }
        }
        self.set_adapter(values)?;
        self.stack.set_moments(moments);
        Ok(())
    }

    /// The shape of what is on the device.
    pub fn model(&self) -> &Architecture {
        self.stack.model()
    }

    /// The largest input it was made for.
    pub fn extent(&self) -> Extent {
        self.stack.extent()
    }
}
