//! A contiguous run of blocks with the ends it owns, its adapter and its workspace on one device. The client's side of the cut,
//! the server's side and the whole model are all stacks; they differ in which blocks and ends they hold.
//!
//! Every buffer is made once, at the largest shape; recordings of shorter sequences use a part of it.

use std::collections::HashMap;
use std::ops::Range;

use crate::compute::{Buffer, Cost, Engine, Error, Prepared, Recording};
use crate::kernels::{adamw, lora, scalar};

use super::adapter::{AdapterLayout, LoraSpec};
use super::block::{Activations, BackwardTo, Block, BlockWeights, Keeping};
use super::config::Config;
use super::ends::{EmbeddingWeights, Head, HeadBuffers, HeadWeights};
use super::optimizer::fill_scalars;
use crate::terms::moments::Moments;
use crate::terms::optimizer::OptimizerSettings;

/// The frozen weights of a stack on a device. Cloning shares the buffers.
#[derive(Clone)]
pub struct StackWeights {
    /// Needed for the input end and, tied, for the head.
    pub embedding: Option<EmbeddingWeights>,
    /// Blocks in order, the first being block `first_block` of the model.
    pub blocks: Vec<BlockWeights>,
    pub first_block: usize,
    /// Present where the stack ends with the head.
    pub head: Option<HeadWeights>,
}

impl StackWeights {
    pub fn block_range(&self) -> Range<usize> {
        self.first_block..self.first_block + self.blocks.len()
    }
}

/// The largest input of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub batch: usize,
    pub seq: usize,
}

impl Extent {
    fn rows(&self) -> usize {
        self.batch * self.seq
    }
}

/// An adapter on the device with what its training needs. Flat, in the order of [`AdapterLayout`].
pub struct Lora {
    pub(super) layout: AdapterLayout,
    pub(super) scale: f32,
    pub(super) values: Buffer,
    pub(super) gradient: Buffer,
    pub(super) scalars: Buffer,
}

/// AdamW's state on the device.
struct MomentBuffers {
    first: Buffer,
    second: Buffer,
    norm_partial: Buffer,
}

/// Gradients of activations, reused by every block. rows = batch·seq.
pub(super) struct Scratch {
    pub d_x: Buffer,     // (rows, width)
    pub d_norm: Buffer,  // (rows, width)
    pub d_qkv: Buffer,   // (rows, 3·width)
    pub d_g: Buffer,     // (rows, ffn)
    pub d_h: Buffer,     // (rows, ffn)
    pub dot: Buffer,     // (batch, heads, seq)
    pub v: Buffer,       // (rows, rank)
    pub partial: Buffer, // split sums of adapter gradients
}

/// See the module.
pub struct Stack {
    engine: Engine,
    config: Config,
    extent: Extent,
    weights: StackWeights,
    lora: Option<Lora>,
    moments: Option<MomentBuffers>,
    scratch: Option<Scratch>,
    activations: Vec<Activations>,
    head: Option<HeadBuffers>,
    tokens: Buffer, // u32 (rows)
    scalars: Buffer,
    scalar_values: [f32; scalar::COUNT],
    step: u64,
    prepared: HashMap<(&'static str, usize, usize), Prepared>,
}

impl Stack {
    /// A stack for inputs up to `extent`; with `training` it keeps what the backward pass needs.
    ///
    /// # Panics
    /// If `adapter`'s layout covers other blocks than `weights`, or the values are not the layout's.
    pub fn new(
        engine: &Engine,
        config: &Config,
        weights: StackWeights,
        adapter: Option<(&LoraSpec, &AdapterLayout, &[f32])>,
        extent: Extent,
        training: bool,
    ) -> Result<Self, Error> {
        let rows = extent.rows();
        let scalars = engine.buffer("scalars", scalar::COUNT)?;
        let lora = adapter
            .map(|(spec, layout, values)| {
                assert_eq!(layout.blocks(), weights.block_range(), "an adapter of other blocks");
                assert_eq!(layout.len(), values.len(), "adapter values");
                Ok::<_, Error>(Lora {
                    layout: layout.clone(),
                    scale: spec.scale(),
                    values: engine.buffer_from("adapter", values)?,
                    gradient: engine.buffer("adapter.gradient", if training { values.len() } else { 1 })?,
                    scalars: scalars.clone(),
                })
            })
            .transpose()?;
        let mut activations: Vec<Activations> = Vec::with_capacity(weights.blocks.len());
        let mut x = engine.buffer("x", rows * config.width)?;
        let mut spare = None;
        for block in weights.block_range() {
            let out = match spare.take() {
                Some(spare) if !training => spare,
                _ => engine.buffer(format!("block.{block}.out"), rows * config.width)?,
            };
            activations.push(Activations::new(
                engine,
                config,
                block,
                (x.clone(), out.clone()),
                activations.last(),
                Keeping {
                    rows,
                    lora: lora.as_ref(),
                    keep: training,
                },
            )?);
            spare = Some(x);
            x = out;
        }
        let scratch = match (&lora, training) {
            (Some(lora), true) => Some(Self::scratch(engine, config, extent, &lora.layout)?),
            _ => None,
        };
        let moments = match (&lora, training) {
            (Some(lora), true) => Some(MomentBuffers {
                first: engine.buffer("adapter.moment1", lora.layout.len())?,
                second: engine.buffer("adapter.moment2", lora.layout.len())?,
                norm_partial: engine.buffer("adapter.norm_partial", adamw::partial_words(lora.layout.len()))?,
            }),
            _ => None,
        };
        let head = weights
            .head
            .as_ref()
            .map(|_| HeadBuffers::new(engine, config, rows, training))
            .transpose()?;
        Ok(Self {
            engine: engine.clone(),
            config: config.clone(),
            extent,
            weights,
            lora,
            moments,
            scratch,
            activations,
            head,
            tokens: engine.buffer("tokens", rows)?,
            scalars,
            scalar_values: [0.0; scalar::COUNT],
            step: 0,
            prepared: HashMap::new(),
        })
    }

    fn scratch(engine: &Engine, config: &Config, extent: Extent, layout: &AdapterLayout) -> Result<Scratch, Error> {
        let rows = extent.rows();
        let new = |name: &str, words: usize| engine.buffer(name, words);
        let rank = layout.entries().first().map_or(1, |entry| entry.rank);
        let widest = layout
            .entries()
            .iter()
            .map(|entry| entry.inputs.max(entry.outputs))
            .max()
            .unwrap_or(1);
        Ok(Scratch {
            d_x: new("d_x", rows * config.width)?,
            d_norm: new("d_norm", rows * config.width)?,
            d_qkv: new("d_qkv", rows * 3 * config.width)?,
            d_g: new("d_g", rows * config.ffn)?,
            d_h: new("d_h", rows * config.ffn)?,
            dot: new("dot", rows * config.heads)?,
            v: new("v", rows * rank)?,
            partial: new("partial", lora::partial_words(rows, widest, rank))?,
        })
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// The frozen weights, to build another stack on the same buffers.
    pub fn weights(&self) -> &StackWeights {
        &self.weights
    }

    /// The input of the first block (batch·seq, width): written by the embedding, or from outside.
    pub fn input(&self) -> &Buffer {
        &self.activations[0].x
    }

    /// The input of the block at `position` of this stack (batch·seq, width).
    ///
    /// # Panics
    /// If the stack has no such block.
    pub fn input_of(&self, position: usize) -> &Buffer {
        &self.activations[position].x
    }

    /// The output of the last block (batch·seq, width).
    pub fn output(&self) -> &Buffer {
        &self.activations[self.activations.len() - 1].out
    }

    /// The gradient that the backward pass starts from and, taken to the input, ends in (batch·seq, width).
    ///
    /// # Panics
    /// If the stack was not made for training.
    pub fn d_x(&self) -> &Buffer {
        &self.scratch.as_ref().expect("a training stack").d_x
    }

    fn block(&self, position: usize, seq: usize) -> Block<'_> {
        Block {
            config: &self.config,
            index: self.weights.first_block + position,
            batch: self.extent.batch,
            seq,
            weights: &self.weights.blocks[position],
            activations: &self.activations[position],
            lora: self.lora.as_ref(),
        }
    }

    fn head(&self, seq: usize) -> Head<'_> {
        Head {
            config: &self.config,
            rows: self.extent.batch * seq,
            weights: self.weights.head.as_ref().expect("a stack with a head"),
            embedding: self
                .weights
                .embedding
                .as_ref()
                .expect("the head is tied to the embedding"),
            buffers: self.head.as_ref().expect("a stack with a head"),
            scalars: &self.scalars,
        }
    }

    /// Records the embedding of the uploaded tokens into [`Stack::input`].
    pub fn record_embedding(&self, recording: &mut Recording, seq: usize) {
        let embedding = self.weights.embedding.as_ref();
        embedding.expect("a stack with the embedding").record_forward(
            recording,
            &self.config,
            (self.extent.batch, seq),
            &self.tokens,
            self.input(),
        );
    }

    /// Records the blocks' forward passes.
    pub fn record_blocks(&self, recording: &mut Recording, seq: usize) {
        self.record_blocks_from(recording, seq, 0);
    }

    /// The same from the block at `position` of this stack on.
    pub fn record_blocks_from(&self, recording: &mut Recording, seq: usize, position: usize) {
        for position in position..self.activations.len() {
            self.block(position, seq).record_forward(recording);
        }
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
    pub fn record_backward_to(&self, recording: &mut Recording, seq: usize, position: usize) {
        self.record_backward_until(recording, seq, position, BackwardTo::Input);
    }

    fn record_backward_until(&self, recording: &mut Recording, seq: usize, lowest: usize, to: BackwardTo) {
        let scratch = self.scratch.as_ref().expect("a training stack");
        for position in (lowest..self.activations.len()).rev() {
            let to = if position > lowest { BackwardTo::Input } else { to };
            self.block(position, seq).record_backward(recording, scratch, to);
        }
    }

    /// Records AdamW on the accumulated adapter gradient, which is cleared after it.
    pub fn record_update(&self, recording: &mut Recording) {
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
        recording.clear(&lora.gradient);
    }

    /// Records forgetting what adapter gradient was accumulated.
    pub fn record_clear_gradient(&self, recording: &mut Recording) {
        recording.clear(&self.lora.as_ref().expect("a training stack").gradient);
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
    pub fn run_from(
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

    /// Uploads token ids (batch, seq).
    pub fn upload_tokens(&self, tokens: &[u32]) {
        self.engine.upload(&self.tokens, 0, tokens);
    }

    /// Uploads targets (batch, seq), -100 where there is none, and the weights of this batch: `weight` scales its adapter
    /// gradient, the head's gradient is that of the mean over its targets. Returns the number of targets.
    pub fn upload_targets(&mut self, targets: &[i32], weight: f32) -> usize {
        let count = targets.iter().filter(|&&target| target >= 0).count();
        let head = self.head.as_ref().expect("a stack with a head");
        self.engine.upload(&head.targets, 0, targets);
        self.scalar_values[scalar::WEIGHT] = weight;
        self.scalar_values[scalar::FACTOR] = if count == 0 { 0.0 } else { 1.0 / count as f32 };
        self.engine.upload(&self.scalars, 0, &self.scalar_values);
        count
    }

    /// Sets the numbers of the next optimiser step and counts it; `run_step` chooses the learning rate, `weight` scales adapter
    /// gradients recorded after this.
    pub fn begin_update(&mut self, settings: &OptimizerSettings, run_step: u64, weight: f32) {
        fill_scalars(settings, self.step, run_step, &mut self.scalar_values);
        self.scalar_values[scalar::WEIGHT] = weight;
        self.engine.upload(&self.scalars, 0, &self.scalar_values);
        self.step += 1;
    }

    /// Optimiser steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The mean loss of the last batch over its `count` targets, summed in f64; 0 for none.
    pub async fn mean_loss(&self, seq: usize, count: usize) -> Result<f64, Error> {
        Ok(self.loss_sum(seq).await? / count.max(1) as f64)
    }

    /// The summed loss of the last batch's targets.
    pub async fn loss_sum(&self, seq: usize) -> Result<f64, Error> {
        let head = self.head.as_ref().expect("a stack with a head");
        let rows = self.extent.batch * seq;
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
    pub fn set_moments(&mut self, moments: &Moments) {
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

    /// The logits (vocab) after position `position` of row 0 of the last forward pass.
    pub async fn logits_at(&self, position: usize) -> Result<Vec<f32>, Error> {
        let width = self.config.width;
        let head = Head {
            rows: 1,
            ..self.head(self.extent.seq)
        };
        let last = self.engine.buffer("output.last", width)?;
        let logits = head
            .chunk_rows()
            .map(|rows| self.engine.buffer("logits", rows))
            .collect::<Result<Vec<_>, _>>()?;
        let mut recording = self.engine.recording();
        recording.copy((self.output(), position * width), (&last, 0), width);
        head.record_norm(&mut recording, &last);
        head.record_logits(&mut recording, &logits);
        self.engine.run(&self.engine.prepare(recording))?;
        let mut values = Vec::with_capacity(self.config.vocab);
        for logits in &logits {
            values.extend(self.engine.download::<f32>(logits, 0, logits.words()).await?);
        }
        Ok(values)
    }
}
