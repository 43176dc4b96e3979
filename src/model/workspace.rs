//! What a stack computes on: activations of every block, the gradients that pass through them, the head's buffers. It is separate
//! from the weights and the adapter because one set of weights may serve several workspaces.
//!
//! Every buffer is made once, at the largest shape; recordings of shorter sequences use a part of it.

use std::ops::Range;

use crate::compute::{Buffer, Engine, Error};

use super::adapter::AdapterLayout;
use super::architecture::Architecture;
use super::ends::head::HeadBuffers;
use super::linear::{LoraScratch, LowRank};
use super::part::attention::AttentionActivations;
use super::part::mlp::{MlpActivations, inner_width};

/// The largest input of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub batch: usize,
    pub seq: usize,
}

impl Extent {
    /// `batch · seq`.
    pub fn rows(&self) -> usize {
        self.batch * self.seq
    }
}

/// How far a block's backward pass goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BackwardTo {
    /// To the gradient of the block's input.
    Input,
    /// To the gradient of the block's lowest adapted maps and no further: nothing below them is trained.
    LowestAdapter,
}

/// Makes the buffers of one block.
pub(super) struct Buffers<'a> {
    pub engine: &'a Engine,
    pub block: usize,
    pub rows: usize,
    pub lora: Option<&'a AdapterLayout>,
    /// A backward pass follows.
    pub keep: bool,
}

impl Buffers<'_> {
    /// A buffer that the backward pass reads: where there is none, the block before may share its `old` one.
    pub fn kept(&self, name: &str, words: usize, old: Option<&Buffer>) -> Result<Buffer, Error> {
        self.picked(name, words, self.keep, old)
    }

    /// A buffer that the backward pass does not read, or writes again before it does: one for all blocks.
    pub(crate) fn shared(&self, name: &str, words: usize, old: Option<&Buffer>) -> Result<Buffer, Error> {
        self.picked(name, words, false, old)
    }

    /// The input of the projections of a level, which only the gradients of their adapters read.
    pub(crate) fn input_of_level(
        &self,
        level: usize,
        name: &str,
        words: usize,
        old: Option<&Buffer>,
    ) -> Result<Buffer, Error> {
        let adapted = |block: usize| {
            let mut entries = self.lora.into_iter().flat_map(|layout| layout.entries());
            self.keep && entries.any(|entry| entry.block == block && entry.target.level() == level)
        };
        // What the block before keeps is its own: one that keeps nothing may not write there.
        let old = old.filter(|_| self.block > 0 && !adapted(self.block - 1));
        self.picked(name, words, adapted(self.block), old)
    }

    fn picked(&self, name: &str, words: usize, own: bool, old: Option<&Buffer>) -> Result<Buffer, Error> {
        match old {
            Some(old) if !own => Ok(old.clone()),
            _ => self.engine.buffer(format!("block.{}.{name}", self.block), words),
        }
    }
}

/// What one block's forward pass writes; the backward pass reads it. rows = batch·seq.
#[derive(Clone)]
pub(super) struct Activations {
    /// Block input (rows, width).
    pub x: Buffer,
    /// Block output (rows, width): the next block's input.
    pub out: Buffer,
    /// Between the parts (rows, width).
    pub y: Buffer,
    pub attention: AttentionActivations,
    pub mlp: MlpActivations,
    pub low_rank: LowRank,
}

/// Gradients of activations, reused by every block. rows = batch·seq.
pub(super) struct Scratch {
    pub d_x: Buffer,          // (rows, width)
    pub d_norm: Buffer,       // (rows, width)
    pub d_inner: Buffer,      // (rows, attention_width)
    pub d_qkv: Buffer,        // (rows, qkv_width)
    pub d_qk: Option<Buffer>, // (rows, (heads + kv_heads)·head_size), where these are normed
    pub d_g: Buffer,          // (rows, ffn)
    pub d_h: Buffer,          // (rows, inner_width)
    pub dot: Buffer,          // (batch, heads, seq)
    pub lora: LoraScratch,
}

impl Scratch {
    fn new(engine: &Engine, model: &Architecture, rows: usize, layout: &AdapterLayout) -> Result<Self, Error> {
        let new = |name: &str, words: usize| engine.buffer(name, words);
        let normed = (model.heads + model.kv_heads) * model.head_size;
        Ok(Self {
            d_x: new("d_x", rows * model.width)?,
            d_norm: new("d_norm", rows * model.width)?,
            d_inner: new("d_inner", rows * model.attention_width())?,
            d_qkv: new("d_qkv", rows * model.qkv_width())?,
            d_qk: model.qk_norm().then(|| new("d_qk", rows * normed)).transpose()?,
            d_g: new("d_g", rows * model.ffn)?,
            d_h: new("d_h", rows * inner_width(model))?,
            dot: new("dot", rows * model.heads)?,
            lora: LoraScratch::new(engine, layout, rows)?,
        })
    }
}

/// The buffers a stack computes on, made at the largest shape: activations of every block, gradients, the head's buffers.
pub(super) struct Workspace {
    pub extent: Extent,
    pub activations: Vec<Activations>,
    pub scratch: Option<Scratch>,
    pub head: Option<HeadBuffers>,
}

impl Workspace {
    /// A workspace for `blocks` of a model and, with `head`, the head; with `training` it keeps what the backward pass needs.
    pub fn new(
        engine: &Engine,
        model: &Architecture,
        (blocks, head): (Range<usize>, bool),
        lora: Option<&AdapterLayout>,
        extent: Extent,
        training: bool,
    ) -> Result<Self, Error> {
        let rows = extent.rows();
        let mut activations: Vec<Activations> = Vec::with_capacity(blocks.len());
        let mut x = engine.buffer("x", rows * model.width)?;
        let mut spare = None;
        for block in blocks {
            let out = match spare.take() {
                Some(spare) if !training => spare,
                _ => engine.buffer(format!("block.{block}.out"), rows * model.width)?,
            };
            let buffers = Buffers {
                engine,
                block,
                rows,
                lora,
                keep: training,
            };
            let before = activations.last();
            let shared = before.filter(|_| !training).map(|before| &before.low_rank);
            activations.push(Activations {
                x: x.clone(),
                out: out.clone(),
                y: buffers.kept("y", rows * model.width, before.map(|b| &b.y))?,
                attention: AttentionActivations::new(model, &buffers, before.map(|b| &b.attention))?,
                mlp: MlpActivations::new(model, &buffers, before.map(|b| &b.mlp))?,
                low_rank: LowRank::new(engine, lora, (block, rows), shared)?,
            });
            spare = Some(x);
            x = out;
        }
        let scratch = match lora {
            Some(layout) if training => Some(Scratch::new(engine, model, rows, layout)?),
            _ => None,
        };
        Ok(Self {
            extent,
            activations,
            scratch,
            head: head
                .then(|| HeadBuffers::new(engine, model, rows, training))
                .transpose()?,
        })
    }
}
