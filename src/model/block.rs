//! One transformer block: two residual parts, attention and feed-forward, each behind a norm.

use crate::compute::{Buffer, Engine, Error, Recording};

use super::architecture::Architecture;
use super::linear::{Lora, Pass};
use super::part::attention::{AttentionPart, AttentionWeights, Over};
use super::part::mlp::{MlpPart, MlpWeights};
use super::unit::UnitData;
use super::workspace::{Activations, BackwardTo, Scratch};

/// A block's frozen weights on a device; clones share them.
#[derive(Clone)]
pub struct BlockWeights {
    attention: AttentionWeights,
    mlp: MlpWeights,
}

impl BlockWeights {
    /// Uploads a block's unit.
    pub fn upload(engine: &Engine, model: &Architecture, unit: &UnitData) -> Result<Self, Error> {
        Ok(Self {
            attention: AttentionWeights::upload(engine, model, unit)?,
            mlp: MlpWeights::upload(engine, model, unit)?,
        })
    }
}

/// One block of a stack, while it is being recorded.
pub(super) struct Block<'a> {
    pub model: &'a Architecture,
    pub index: usize,
    pub batch: usize,
    pub seq: usize,
    pub weights: &'a BlockWeights,
    pub activations: &'a Activations,
    pub lora: Option<&'a Lora>,
    pub rotations: Option<&'a Buffer>,
    pub position: &'a Buffer,
}

impl<'a> Block<'a> {
    fn pass(&self) -> Pass<'a> {
        Pass {
            block: self.index,
            rows: self.batch * self.seq,
            lora: self.lora,
            low_rank: &self.activations.low_rank,
        }
    }

    fn attention(&self) -> AttentionPart<'a> {
        AttentionPart {
            model: self.model,
            batch: self.batch,
            seq: self.seq,
            weights: &self.weights.attention,
            activations: &self.activations.attention,
            pass: self.pass(),
            rotations: self.rotations,
            position: self.position,
        }
    }

    fn mlp(&self) -> MlpPart<'a> {
        MlpPart {
            model: self.model,
            weights: &self.weights.mlp,
            activations: &self.activations.mlp,
            pass: self.pass(),
        }
    }

    pub(crate) fn record_forward(&self, recording: &mut Recording, over: Over<'_>) {
        let Activations { x, y, out, .. } = self.activations;
        self.attention().record_forward(recording, x, y, over);
        self.mlp().record_forward(recording, y, out);
    }

    /// Takes `scratch.d_x`, the gradient of the block's output, to that of its input, and adds the adapter gradients.
    pub fn record_backward(&self, recording: &mut Recording, scratch: &Scratch, to: BackwardTo) {
        let Activations { x, y, .. } = self.activations;
        if self.mlp().record_backward(recording, scratch, y, to) {
            self.attention().record_backward(recording, scratch, x, to);
        }
    }
}
