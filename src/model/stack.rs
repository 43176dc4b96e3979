//! A contiguous run of blocks with the ends it owns, its adapter and its workspace on one device. The client's side of the cut,
//! the server's side and the whole model are all stacks; they differ in which blocks and ends they hold.
//!
//! Every buffer is made once, at the largest shape; recordings of shorter sequences use a part of it.

use std::collections::HashMap;
use std::ops::Range;

use crate::compute::{Buffer, Cost, Engine, Error, Prepared, Recording};
use crate::kernels::{adamw, gradient, rotary, scalar};

use super::ModelError;
use super::adapter::AdapterLayout;
use super::architecture::Architecture;
use super::block::{Block, BlockWeights};
use super::ends::embedding::Embedding;
use super::ends::head::{Head, HeadWeights, LogitBuffers};
use super::linear::Lora;
use super::optimizer::fill_scalars;
use super::part::attention::{Cache, Over};
use super::unit::Unit;
use super::weights::UnitSource;
use super::workspace::{BackwardTo, Extent, Workspace};
use crate::terms::adapter::Trained;
use crate::terms::moments::Moments;
use crate::terms::optimizer::OptimizerSettings;

/// The frozen weights of a stack. Cloning shares them.
#[derive(Clone)]
pub struct StackWeights {
    /// Needed where tokens come in; on the host.
    pub embedding: Option<Embedding>,
    /// Blocks in order, the first being block `first_block` of the model.
    pub blocks: Vec<BlockWeights>,
    pub first_block: usize,
    /// Present where the stack ends with the head.
    pub head: Option<HeadWeights>,
}

impl StackWeights {
    /// The whole model, unit by unit, each freed after its upload.
    ///
    /// # Errors
    /// [`ModelError`] when a unit cannot be read or the device has no room.
    pub fn load(engine: &Engine, model: &Architecture, units: &mut dyn UnitSource) -> Result<Self, ModelError> {
        Ok(Self {
            embedding: Some(units.embedding()?),
            blocks: Self::load_blocks(engine, model, units, 0..model.blocks)?,
            first_block: 0,
            head: Some(HeadWeights::load(engine, model, units)?),
        })
    }

    /// Some of the model's blocks.
    ///
    /// # Errors
    /// As [`StackWeights::load`].
    pub fn load_blocks(
        engine: &Engine,
        model: &Architecture,
        units: &mut dyn UnitSource,
        blocks: Range<usize>,
    ) -> Result<Vec<BlockWeights>, ModelError> {
        blocks
            .map(|block| Ok(BlockWeights::upload(engine, model, &units.unit(Unit::Block(block))?)?))
            .collect()
    }

    pub(crate) fn block_range(&self) -> Range<usize> {
        self.first_block..self.first_block + self.blocks.len()
    }
}

/// AdamW's state on the device.
struct MomentBuffers {
    first: Buffer,
    second: Buffer,
    norm_partial: Buffer,
}

/// A contiguous run of blocks on one device, with the ends it owns, its adapter, the optimiser's moments and its workspace.
#[doc(hidden)]
pub struct Stack {
    engine: Engine,
    model: Architecture,
    weights: StackWeights,
    lora: Option<Lora>,
    moments: Option<MomentBuffers>,
    workspace: Workspace,
    rotations: Option<Buffer>, // (positions, head_size / 2, 2)
    /// The position of every sequence's first token, which is 0 but for text that goes on.
    position: Buffer,
    scalars: Buffer,
    scalar_values: [f32; scalar::COUNT],
    step: u64,
    prepared: HashMap<(&'static str, usize, usize), Prepared>,
}

impl Stack {
    /// A stack for inputs up to `extent`; with `training` it keeps what the backward pass needs.
    ///
    /// # Panics
    /// If `adapter` covers other blocks than `weights`, or its values are not its layout's.
    pub fn new(
        engine: &Engine,
        model: &Architecture,
        weights: StackWeights,
        adapter: Option<(&AdapterLayout, &[f32])>,
        extent: Extent,
        training: bool,
    ) -> Result<Self, Error> {
        let scalars = engine.buffer("scalars", scalar::COUNT)?;
        let lora = adapter
            .map(|(layout, values)| {
                assert_eq!(layout.blocks(), weights.block_range(), "an adapter of other blocks");
                assert_eq!(layout.len(), values.len(), "adapter values");
                Ok::<_, Error>(Lora {
                    layout: layout.clone(),
                    values: engine.buffer_from("adapter", values)?,
                    gradient: engine.buffer("adapter.gradient", if training { values.len() } else { 1 })?,
                    scalars: scalars.clone(),
                    frozen: match layout.trained() {
                        Trained::B if training => Some(engine.buffer_from("adapter.frozen", values)?),
                        _ => None,
                    },
                })
            })
            .transpose()?;
        let moments = match &lora {
            Some(lora) if training => Some(MomentBuffers {
                first: engine.buffer("adapter.moment1", lora.layout.len())?,
                second: engine.buffer("adapter.moment2", lora.layout.len())?,
                norm_partial: engine.buffer("adapter.norm_partial", adamw::partial_words(lora.layout.len()))?,
            }),
            _ => None,
        };
        let workspace = Workspace::new(
            engine,
            model,
            (weights.block_range(), weights.head.is_some()),
            lora.as_ref().map(|lora| &lora.layout),
            extent,
            training,
        )?;
        let mut stack = Self {
            engine: engine.clone(),
            model: model.clone(),
            weights,
            lora,
            moments,
            workspace,
            rotations: None,
            position: engine.buffer("position", 1)?,
            scalars,
            scalar_values: {
                let mut values = [0.0; scalar::COUNT];
                values[scalar::GRAD_SCALE] = 1.0;
                values
            },
            step: 0,
            prepared: HashMap::new(),
        };
        stack.make_rotations(extent.seq)?;
        Ok(stack)
    }

    /// Makes room for tokens up to a position.
    pub(super) fn make_rotations(&mut self, positions: usize) -> Result<(), Error> {
        if let Some(rotary) = self.model.rotary {
            let table = rotary::table(positions, self.model.head_size, rotary.base, rotary.scaling);
            self.rotations = Some(self.engine.buffer_from("rotations", &table)?);
        }
        Ok(())
    }

    /// The engine its buffers are on.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The shape of the model it is a part of.
    pub fn model(&self) -> &Architecture {
        &self.model
    }

    /// The largest input it was made for.
    pub fn extent(&self) -> Extent {
        self.workspace.extent
    }

    /// The frozen weights, to build another stack on the same buffers.
    pub fn weights(&self) -> &StackWeights {
        &self.weights
    }

    /// The input of the first block (batch·seq, width): written by the embedding, or from outside.
    pub fn input(&self) -> &Buffer {
        &self.workspace.activations[0].x
    }

    /// The input of the block at `position` of this stack (batch·seq, width).
    ///
    /// # Panics
    /// If the stack has no such block.
    pub(crate) fn input_of(&self, position: usize) -> &Buffer {
        &self.workspace.activations[position].x
    }

    /// The output of the last block (batch·seq, width).
    pub fn output(&self) -> &Buffer {
        &self.workspace.activations[self.workspace.activations.len() - 1].out
    }

    /// The gradient that the backward pass starts from and, taken to the input, ends in (batch·seq, width).
    ///
    /// # Panics
    /// If the stack was not made for training.
    pub fn d_x(&self) -> &Buffer {
        &self.workspace.scratch.as_ref().expect("a training stack").d_x
    }

    fn block(&self, position: usize, (batch, seq): (usize, usize)) -> Block<'_> {
        Block {
            model: &self.model,
            index: self.weights.first_block + position,
            batch,
            seq,
            weights: &self.weights.blocks[position],
            activations: &self.workspace.activations[position],
            lora: self.lora.as_ref(),
            rotations: self.rotations.as_ref(),
            position: &self.position,
        }
    }

    fn head(&self, seq: usize) -> Head<'_> {
        Head {
            model: &self.model,
            rows: self.extent().batch * seq,
            weights: self.weights.head.as_ref().expect("a stack with a head"),
            buffers: self.workspace.head.as_ref().expect("a stack with a head"),
            scalars: &self.scalars,
        }
    }

    /// Records the blocks' forward passes.
    pub fn record_blocks(&self, recording: &mut Recording, seq: usize) {
        self.record_blocks_from(recording, seq, 0);
    }

    /// Records the forward passes from the block at `position` of this stack on.
    pub(crate) fn record_blocks_from(&self, recording: &mut Recording, seq: usize, position: usize) {
        let shape = (self.extent().batch, seq);
        for position in position..self.weights.blocks.len() {
            self.block(position, shape).record_forward(recording, Over::Sequences);
        }
    }

    /// Records the forward passes of the next `rows` tokens of one text, of which the blocks' caches hold what went before.
    pub(super) fn record_blocks_cached(
        &self,
        recording: &mut Recording,
        rows: usize,
        caches: &[Buffer],
        capacity: usize,
    ) {
        for (position, keys_values) in caches.iter().enumerate() {
            let cache = Cache {
                keys_values,
                capacity,
                position: &self.position,
            };
            self.block(position, (1, rows))
                .record_forward(recording, Over::Cache(cache));
        }
    }

    /// Uploads the position of the first token of what is computed next.
    pub(super) fn set_position(&self, position: usize) {
        self.engine.upload(&self.position, 0, &[position as u32]);
    }

    /// Records the head's loss and, with `gradient`, its gradient into [`Stack::d_x`].
    pub fn record_loss(&self, recording: &mut Recording, seq: usize, gradient: bool) {
        self.head(seq)
            .record_loss(recording, self.output(), gradient.then(|| self.d_x()));
    }

    /// Records the backward passes from [`Stack::d_x`]. `to_input` leaves the gradient of [`Stack::input`] there; without it the
    /// lowest block stops at its lowest adapted map.
    pub fn record_backward(&self, recording: &mut Recording, seq: usize, to_input: bool) {
        let lowest = if to_input {
            BackwardTo::Input
        } else {
            BackwardTo::LowestAdapter
        };
        self.record_backward_until(recording, seq, 0, lowest);
    }

    /// The same down to the block at `position` of this stack, the gradient of whose input is left.
    pub(crate) fn record_backward_to(&self, recording: &mut Recording, seq: usize, position: usize) {
        self.record_backward_until(recording, seq, position, BackwardTo::Input);
    }

    fn record_backward_until(&self, recording: &mut Recording, seq: usize, lowest: usize, to: BackwardTo) {
        let scratch = self.workspace.scratch.as_ref().expect("a training stack");
        let shape = (self.extent().batch, seq);
        for position in (lowest..self.weights.blocks.len()).rev() {
            let to = if position > lowest { BackwardTo::Input } else { to };
            self.block(position, shape).record_backward(recording, scratch, to);
        }
    }

    /// Records AdamW on the accumulated adapter gradient, which is cleared after it.
    pub(crate) fn record_update(&self, recording: &mut Recording) {
        let (lora, moments) = (
            self.lora.as_ref().expect("a training stack"),
            self.moments.as_ref().expect("a training stack"),
        );
        let n = lora.layout.len();
        adamw::norm(recording, n, &lora.gradient, &moments.norm_partial, &self.scalars);
        adamw::update(
            recording,
            n,
            &lora.gradient,
            &self.scalars,
            (&lora.values, &moments.first, &moments.second),
        );
        if let Some(frozen) = &lora.frozen {
            // Without a gradient it is only the decay that moved them.
            for entry in lora.layout.entries() {
                let (start, len) = (entry.offset_a, entry.range_a().len());
                recording.copy((frozen, start), (&lora.values, start), len);
            }
        }
        recording.clear(&lora.gradient);
    }

    /// Records forgetting what adapter gradient was accumulated.
    pub(crate) fn record_clear_gradient(&self, recording: &mut Recording) {
        recording.clear(&self.lora.as_ref().expect("a training stack").gradient);
    }

    /// Records the norm of the accumulated adapter gradient, to be read from [`Stack::record_reply`].
    pub(crate) fn record_gradient_norm(&self, recording: &mut Recording) {
        let (lora, moments) = (
            self.lora.as_ref().expect("a training stack"),
            self.moments.as_ref().expect("a training stack"),
        );
        let n = lora.layout.len();
        adamw::norm(recording, n, &lora.gradient, &moments.norm_partial, &self.scalars);
    }

    /// Records copying the norm of the adapter gradient and the losses of (batch, seq) targets to the beginning of `reply`. Returns
    /// the words that takes.
    pub(crate) fn record_reply(&self, recording: &mut Recording, seq: usize, reply: &Buffer) -> usize {
        let head = self.workspace.head.as_ref().expect("a stack with a head");
        let rows = self.extent().batch * seq;
        recording.copy((&self.scalars, scalar::NORM), (reply, 0), 1);
        recording.copy((&head.loss, 0), (reply, 1), rows);
        1 + rows
    }

    /// A buffer that holds an adapter gradient.
    pub(crate) fn gradient_buffer(&self, name: String) -> Result<Buffer, Error> {
        let lora = self.lora.as_ref().expect("a training stack");
        self.engine.buffer(name, lora.layout.len())
    }

    /// Records copying the accumulated adapter gradient.
    pub(crate) fn record_keep_gradient(&self, recording: &mut Recording, into: &Buffer) {
        let lora = self.lora.as_ref().expect("a training stack");
        recording.copy((&lora.gradient, 0), (into, 0), lora.layout.len());
    }

    /// Records adding an adapter gradient, times the weight of [`Stack::set_weight`], to the accumulated one.
    pub(crate) fn record_add_gradient(&self, recording: &mut Recording, from: &Buffer) {
        let lora = self.lora.as_ref().expect("a training stack");
        gradient::add(recording, lora.layout.len(), from, &self.scalars, &lora.gradient);
    }

    /// Uploads the weight of what is added to the adapter gradient next.
    pub(crate) fn set_weight(&mut self, weight: f32) {
        self.scalar_values[scalar::WEIGHT] = weight;
        self.engine.upload(&self.scalars, 0, &self.scalar_values);
    }

    /// Runs the recording called `name` for sequences of `seq`, recording and preparing it the first time.
    pub fn run(
        &mut self,
        name: &'static str,
        seq: usize,
        record: impl FnOnce(&Self, &mut Recording),
    ) -> Result<(), Error> {
        self.run_from((name, 0), seq, record)
    }

    /// The same for a recording of which there is one for each position in the stack.
    pub(crate) fn run_from(
        &mut self,
        (name, position): (&'static str, usize),
        seq: usize,
        record: impl FnOnce(&Self, &mut Recording),
    ) -> Result<(), Error> {
        let key = (name, position, seq);
        if !self.prepared.contains_key(&key) {
            let mut recording = self.engine.recording();
            record(self, &mut recording);
            let prepared = self.engine.prepare(recording);
            self.prepared.insert(key, prepared);
        }
        self.engine.run(&self.prepared[&key])
    }

    /// The arithmetic and traffic of the recording called `name` for sequences of `seq`, once it has run.
    pub fn cost(&self, name: &'static str, seq: usize) -> Option<Cost> {
        self.prepared.get(&(name, 0, seq)).map(Prepared::cost)
    }

    /// Gathers the embeddings of tokens (batch, seq) and uploads them as the stack's input.
    ///
    /// # Errors
    /// [`WeightsError`](super::weights::WeightsError) when the embedding cannot be read.
    pub(crate) fn upload_tokens(&self, tokens: &[u32], seq: usize) -> Result<(), ModelError> {
        self.upload_tokens_at(tokens, seq, 0)
    }

    /// Gathers the embeddings of tokens that begin at a position of their text.
    pub(super) fn upload_tokens_at(&self, tokens: &[u32], seq: usize, position: usize) -> Result<(), ModelError> {
        let embedding = self.weights.embedding.as_ref().expect("a stack with the embedding");
        let rows = embedding.gather(tokens, seq, position)?;
        self.engine.upload(self.input(), 0, &rows);
        Ok(())
    }

    /// Uploads targets (batch, seq), -100 where there is none, and the weights of this batch: `weight` scales its adapter
    /// gradient, the head's gradient is that of the mean over its targets. Returns the number of targets.
    pub(crate) fn upload_targets(&mut self, targets: &[i32], weight: f32) -> usize {
        let count = targets.iter().filter(|&&target| target >= 0).count();
        let head = self.workspace.head.as_ref().expect("a stack with a head");
        self.engine.upload(&head.targets, 0, targets);
        self.scalar_values[scalar::WEIGHT] = weight;
        self.scalar_values[scalar::FACTOR] = if count == 0 { 0.0 } else { 1.0 / count as f32 };
        self.engine.upload(&self.scalars, 0, &self.scalar_values);
        count
    }

    /// Sets the numbers of the next optimiser step and counts it; `run_step` chooses the learning rate, `weight` scales adapter
    /// gradients recorded after this.
    pub(crate) fn begin_update(&mut self, settings: &OptimizerSettings, run_step: u64, weight: f32) {
        fill_scalars(settings, self.step, run_step, &mut self.scalar_values);
        self.scalar_values[scalar::WEIGHT] = weight;
        self.engine.upload(&self.scalars, 0, &self.scalar_values);
        self.step += 1;
    }

    /// Optimiser steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The summed loss of the last batch's targets.
    pub async fn loss_sum(&self, seq: usize) -> Result<f64, Error> {
        let head = self.workspace.head.as_ref().expect("a stack with a head");
        let rows = self.extent().batch * seq;
        let losses: Vec<f32> = self.engine.download(&head.loss, 0, rows).await?;
        Ok(losses.iter().map(|&loss| f64::from(loss)).sum())
    }

    /// The adapter's layout, where there is one.
    pub fn layout(&self) -> Option<&AdapterLayout> {
        self.lora.as_ref().map(|lora| &lora.layout)
    }

    /// The adapter's values, flat; empty without one.
    pub async fn adapter(&self) -> Result<Vec<f32>, Error> {
        match &self.lora {
            None => Ok(Vec::new()),
            Some(lora) => self.engine.download(&lora.values, 0, lora.layout.len()).await,
        }
    }

    /// Replaces the adapter's values; the optimiser's moments stay.
    ///
    /// # Panics
    /// If the length is not the layout's.
    pub fn set_adapter(&self, values: &[f32]) {
        let lora = self.lora.as_ref().expect("a stack with an adapter");
        assert_eq!(values.len(), lora.layout.len(), "adapter values");
        self.engine.upload(&lora.values, 0, values);
        if let Some(frozen) = &lora.frozen {
            self.engine.upload(frozen, 0, values);
        }
    }

    /// The optimiser's moments of the adapter's values.
    pub async fn moments(&self) -> Result<Moments, Error> {
        let (moments, n) = self.moments_of_adapter();
        Ok(Moments {
            steps: self.step,
            first: self.engine.download(&moments.first, 0, n).await?,
            second: self.engine.download(&moments.second, 0, n).await?,
        })
    }

    /// Replaces the optimiser's moments, and with them the number of steps it has taken.
    ///
    /// # Panics
    /// If the length is not the layout's.
    pub(crate) fn set_moments(&mut self, moments: &Moments) {
        let (buffers, n) = self.moments_of_adapter();
        assert_eq!(
            (moments.first.len(), moments.second.len()),
            (n, n),
            "an adapter's moments"
        );
        self.engine.upload(&buffers.first, 0, &moments.first);
        self.engine.upload(&buffers.second, 0, &moments.second);
        self.step = moments.steps;
    }

    fn moments_of_adapter(&self) -> (&MomentBuffers, usize) {
        let moments = self.moments.as_ref().expect("a training stack");
        let lora = self.lora.as_ref().expect("a training stack");
        (moments, lora.layout.len())
    }

    /// The accumulated adapter gradient, flat.
    pub async fn adapter_gradient(&self) -> Result<Vec<f32>, Error> {
        let lora = self.lora.as_ref().expect("a training stack");
        self.engine.download(&lora.gradient, 0, lora.layout.len()).await
    }

    /// Makes what the logits of single rows are computed on.
    pub(super) fn logit_buffers(&self) -> Result<LogitBuffers, Error> {
        let head = self.weights.head.as_ref().expect("a stack with a head");
        LogitBuffers::new(&self.engine, &self.model, head)
    }

    /// Records the logits after a row of the last block's output.
    pub(super) fn record_logits(
        &self,
        recording: &mut Recording,
        row: usize,
        (last, logits): (&Buffer, &LogitBuffers),
    ) {
        let width = self.model.width;
        let head = self.weights.head.as_ref().expect("a stack with a head");
        recording.copy((self.output(), row * width), (last, 0), width);
        logits.record(recording, &self.model, head, last);
    }

    /// The logits (vocab) after position `position` of row 0 of the last forward pass.
    pub(crate) async fn logits_at(&self, position: usize) -> Result<Vec<f32>, Error> {
        let last = self.engine.buffer("last", self.model.width)?;
        let logits = self.logit_buffers()?;
        let mut recording = self.engine.recording();
        self.record_logits(&mut recording, position, (&last, &logits));
        self.engine.run(&self.engine.prepare(recording))?;
        logits.download(&self.engine).await
    }
}
