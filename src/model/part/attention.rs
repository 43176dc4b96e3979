//! The attention part of a block: `out = x + attention(norm(x))·W_o`.
//!
//! ```text
//! a = norm(x)   q k v = a·W + b   [q, k = norm of each head]   [q, k rotated]   o = attention(q, k, v)   out = x + o·W_o + b_o
//! ```
//! What stands in brackets is as the architecture has it. Queries, keys and values lie side by side in one tensor,
//! (rows, (heads + 2·kv_heads)·head_size).

use crate::compute::{Buffer, Engine, Error, Recording};
use crate::kernels::weight::Columns;
use crate::kernels::{attention, rmsnorm, rotary};
use crate::model::architecture::Architecture;
use crate::model::linear::{Linear, Pass, Projection, upload_vector};
use crate::model::unit::{UnitData, block_norms};
use crate::model::workspace::{BackwardTo, Buffers, Scratch};

use super::norm::{Norm, STATS};

/// Levels of the part's projections in [`Target::level`](crate::model::adapter::Target::level).
const QKV: usize = 0;
const OUT: usize = 1;

/// The part's frozen weights on a device; clones share them.
#[derive(Clone)]
pub struct AttentionWeights {
    norm: Norm,
    qkv: Projection,
    qk_norm: Option<QkNorm>,
    out: Linear,
}

/// The scales of the norms of each query and key head, (head_size) each.
#[derive(Clone)]
struct QkNorm {
    q: Buffer,
    k: Buffer,
}

impl AttentionWeights {
    /// Uploads the part from its block's unit.
    pub fn upload(engine: &Engine, model: &Architecture, unit: &UnitData) -> Result<Self, Error> {
        let qk_norm = model
            .qk_norm()
            .then(|| {
                Ok::<_, Error>(QkNorm {
                    q: upload_vector(engine, unit, "self_attn.q_norm.weight")?,
                    k: upload_vector(engine, unit, "self_attn.k_norm.weight")?,
                })
            })
            .transpose()?;
        let mut out = Projection::upload(engine, model, unit, OUT)?.maps().to_vec();
        Ok(Self {
            norm: Norm::upload(engine, unit, block_norms(model.family).0)?,
            qkv: Projection::upload(engine, model, unit, QKV)?,
            qk_norm,
            out: out.pop().expect("a block has an output projection"),
        })
    }
}

/// What the forward pass keeps for the backward pass. rows = batch·seq.
#[derive(Clone)]
pub(in crate::model) struct AttentionActivations {
    stats: Buffer, // (rows, 2)
    a: Buffer,     // (rows, width); one for all blocks: the backward pass makes it again
    qk: Option<NormedHeads>,
    pub qkv: Buffer, // (rows, qkv_width), rotated
    lse: Buffer,     // (batch, heads, seq)
    o: Buffer,       // (rows, attention_width)
}

/// Queries and keys before their norms, (rows, (heads + kv_heads)·head_size), and what the norms keep.
#[derive(Clone)]
struct NormedHeads {
    qk: Buffer,
    q_stats: Buffer, // (rows, heads)
    k_stats: Buffer, // (rows, kv_heads)
}

impl AttentionActivations {
    pub fn new(model: &Architecture, buffers: &Buffers<'_>, shared: Option<&Self>) -> Result<Self, Error> {
        let rows = buffers.rows;
        let qk = model
            .qk_norm()
            .then(|| {
                let old = shared.and_then(|s| s.qk.as_ref());
                let width = (model.heads + model.kv_heads) * model.head_size;
                Ok::<_, Error>(NormedHeads {
                    qk: buffers.kept("qk", rows * width, old.map(|o| &o.qk))?,
                    q_stats: buffers.kept("q_stats", rows * model.heads, old.map(|o| &o.q_stats))?,
                    k_stats: buffers.kept("k_stats", rows * model.kv_heads, old.map(|o| &o.k_stats))?,
                })
            })
            .transpose()?;
        Ok(Self {
            stats: buffers.kept("stats_1", rows * STATS, shared.map(|s| &s.stats))?,
            a: buffers.shared("a", rows * model.width, shared.map(|s| &s.a))?,
            qk,
            qkv: buffers.kept("qkv", rows * model.qkv_width(), shared.map(|s| &s.qkv))?,
            lse: buffers.kept("lse", rows * model.heads, shared.map(|s| &s.lse))?,
            o: buffers.kept("o", rows * model.attention_width(), shared.map(|s| &s.o))?,
        })
    }
}

/// The keys and values of one block that a text has had so far, and where it stands.
pub(in crate::model) struct Cache<'a> {
    pub keys_values: &'a Buffer,
    pub capacity: usize,
    /// u32 (1): tokens before the first of this pass.
    pub position: &'a Buffer,
}

/// What attention ranges over.
pub(in crate::model) enum Over<'a> {
    /// The sequences of the batch.
    Sequences,
    /// One sequence, with what went before it.
    Cache(Cache<'a>),
}

/// The part while it is being recorded.
pub(in crate::model) struct AttentionPart<'a> {
    pub model: &'a Architecture,
    pub batch: usize,
    pub seq: usize,
    pub weights: &'a AttentionWeights,
    pub activations: &'a AttentionActivations,
    pub pass: Pass<'a>,
    /// cos and sin of every position, where positions are rotations.
    pub rotations: Option<&'a Buffer>,
    /// u32 (1): the position of each sequence's first token.
    pub position: &'a Buffer,
}

impl AttentionPart<'_> {
    fn params(&self) -> attention::Params {
        attention::Params {
            batch: self.batch as u32,
            seq: self.seq as u32,
            heads: self.model.heads as u32,
            kv_heads: self.model.kv_heads as u32,
            head_size: self.model.head_size as u32,
            scale: 1.0 / (self.model.head_size as f32).sqrt(),
        }
    }

    /// Queries and keys are the first heads of each row.
    fn rotary(&self) -> rotary::Params {
        rotary::Params {
            rows: self.pass.rows as u32,
            seq: self.seq as u32,
            heads: (self.model.heads + self.model.kv_heads) as u32,
            head_size: self.model.head_size as u32,
            stride: self.model.qkv_width() as u32,
            first: 0,
        }
    }

    /// The query and the key norm: groups, scale, statistics, and the first column of their heads.
    fn head_norms<'a>(&self, norm: &'a QkNorm, kept: &'a NormedHeads) -> [(usize, &'a Buffer, &'a Buffer, usize); 2] {
        let model = self.model;
        [
            (model.heads, &norm.q, &kept.q_stats, 0),
            (model.kv_heads, &norm.k, &kept.k_stats, model.attention_width()),
        ]
    }

    /// Where each map of the projection writes, and its gradient is found: queries and keys apart where a norm follows.
    fn columns<'a>(
        &'a self,
        qkv: &'a Buffer,
        qk: Option<&'a Buffer>,
    ) -> impl Iterator<Item = (&'a Linear, Columns<'a>)> {
        let normed = (self.model.heads + self.model.kv_heads) * self.model.head_size;
        self.weights
            .qkv
            .columns(qkv, self.model.qkv_width())
            .map(move |(map, columns)| match qk {
                Some(buffer) if columns.first < normed => (
                    map,
                    Columns {
                        buffer,
                        stride: normed,
                        ..columns
                    },
                ),
                _ => (map, columns),
            })
    }

    /// Records `out` (rows, width) from `x` (rows, width).
    pub(crate) fn record_forward(&self, recording: &mut Recording, x: &Buffer, out: &Buffer, over: Over<'_>) {
        let (model, rows, kept) = (self.model, self.pass.rows, self.activations);
        self.weights
            .norm
            .record_forward(recording, model, rows, x, &kept.a, &kept.stats);
        for (map, columns) in self.columns(&kept.qkv, kept.qk.as_ref().map(|qk| &qk.qk)) {
            map.record_forward(recording, self.pass, &kept.a, columns, None, None);
        }
        if let (Some(norm), Some(heads)) = (&self.weights.qk_norm, &kept.qk) {
            for (groups, gamma, stats, first) in self.head_norms(norm, heads) {
                let params = rmsnorm::Params {
                    rows: rows as u32,
                    groups: groups as u32,
                    width: model.head_size as u32,
                    epsilon: model.norm_epsilon,
                };
                let stride = (model.heads + model.kv_heads) * model.head_size;
                let x = Columns {
                    buffer: &heads.qk,
                    first,
                    stride,
                };
                let out = Columns {
                    buffer: &kept.qkv,
                    first,
                    stride: model.qkv_width(),
                };
                rmsnorm::forward(recording, params, x, gamma, out, stats);
            }
        }
        if let Some(table) = self.rotations {
            rotary::forward(recording, self.rotary(), table, self.position, &kept.qkv);
        }
        match over {
            Over::Sequences => attention::forward(recording, self.params(), &kept.qkv, &kept.o, &kept.lse),
            Over::Cache(cache) => {
                let params = attention::CacheParams {
                    rows: rows as u32,
                    capacity: cache.capacity as u32,
                    heads: model.heads as u32,
                    kv_heads: model.kv_heads as u32,
                    head_size: model.head_size as u32,
                    scale: self.params().scale,
                };
                attention::append(recording, params, &kept.qkv, cache.position, cache.keys_values);
                attention::cached(recording, params, &kept.qkv, cache.keys_values, cache.position, &kept.o);
            }
        }
        let out = Columns::all(out, model.width);
        self.weights
            .out
            .record_forward(recording, self.pass, &kept.o, out, Some(x), None);
    }

    /// Takes `scratch.d_x`, the gradient of the part's output, to that of its input `x`, and adds the adapter gradients.
    pub fn record_backward(&self, recording: &mut Recording, scratch: &Scratch, x: &Buffer, to: BackwardTo) {
        let (model, rows, kept) = (self.model, self.pass.rows, self.activations);
        let pass = self.pass;
        let below = to == BackwardTo::Input || pass.adapted_below(OUT);
        let d_out = Columns::all(&scratch.d_x, model.width);
        let d_o = below.then_some((&scratch.d_inner, false));
        self.weights
            .out
            .record_backward(recording, pass, &scratch.lora, &kept.o, d_out, d_o);
        if !below {
            return;
        }
        attention::backward(
            recording,
            self.params(),
            (&kept.qkv, &kept.o, &kept.lse),
            &scratch.d_inner,
            &scratch.dot,
            &scratch.d_qkv,
        );
        if let Some(table) = self.rotations {
            rotary::backward(recording, self.rotary(), table, self.position, &scratch.d_qkv);
        }
        if let (Some(norm), Some(heads), Some(d_qk)) = (&self.weights.qk_norm, &kept.qk, &scratch.d_qk) {
            for (groups, gamma, stats, first) in self.head_norms(norm, heads) {
                let params = rmsnorm::BackwardParams {
                    rows: rows as u32,
                    groups: groups as u32,
                    width: model.head_size as u32,
                    accumulate: 0,
                };
                let stride = (model.heads + model.kv_heads) * model.head_size;
                let apart = |buffer| Columns { buffer, first, stride };
                let d_out = Columns {
                    buffer: &scratch.d_qkv,
                    first,
                    stride: model.qkv_width(),
                };
                rmsnorm::backward_x(recording, params, d_out, (apart(&heads.qk), gamma, stats), apart(d_qk));
            }
        }
        let below = to == BackwardTo::Input;
        let d_y = self.columns(&scratch.d_qkv, scratch.d_qk.as_ref());
        let d_a = below.then_some(&scratch.d_norm);
        if pass.adapted_at(QKV) {
            let norm = &self.weights.norm;
            norm.record_forward(recording, model, rows, x, &kept.a, &kept.stats);
        }
        self.weights
            .qkv
            .record_backward(recording, pass, &scratch.lora, &kept.a, d_y, d_a);
        if below {
            self.weights.norm.record_backward(
                recording,
                model,
                rows,
                &scratch.d_norm,
                (x, &kept.stats),
                (&scratch.d_x, true),
            );
        }
    }
}
