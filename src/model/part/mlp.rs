//! The feed-forward part of a block: `out = y + act(norm(y)·W_up)·W_down`.
//!
//! ```text
//! m = norm(y)   h = m·W_fc + b_fc            g = GELU(h)          out = y + g·W_proj + b_proj     GPT-2
//!               h = m·W_gate side by m·W_up  g = silu(gate)⊙up    out = y + g·W_down              Llama, Qwen
//! ```

use crate::compute::{Buffer, Engine, Error, Recording};
use crate::kernels::weight::Columns;
use crate::kernels::{gelu, swiglu};
use crate::model::architecture::{Architecture, MlpKind};
use crate::model::linear::{Linear, Pass, Projection};
use crate::model::unit::{UnitData, block_norms};
use crate::model::workspace::{BackwardTo, Buffers, Scratch};

use super::norm::{Norm, STATS};

/// Levels of the part's projections in [`Target::level`](crate::model::adapter::Target::level).
const UP: usize = 2;
const DOWN: usize = 3;

/// The part's frozen weights on a device; clones share them.
#[derive(Clone)]
pub struct MlpWeights {
    norm: Norm,
    up: Projection,
    down: Linear,
}

impl MlpWeights {
    /// Uploads the part from its block's unit.
    pub fn upload(engine: &Engine, model: &Architecture, unit: &UnitData) -> Result<Self, Error> {
        let mut down = Projection::upload(engine, model, unit, DOWN)?.maps().to_vec();
        Ok(Self {
            norm: Norm::upload(engine, unit, block_norms(model.family).1)?,
            up: Projection::upload(engine, model, unit, UP)?,
            down: down.pop().expect("a block has a projection down"),
        })
    }
}

/// Columns of what the projections up give.
pub(in crate::model) fn inner_width(model: &Architecture) -> usize {
    match model.mlp() {
        MlpKind::Gelu => model.ffn,
        MlpKind::SwiGlu => 2 * model.ffn,
    }
}

/// What the forward pass keeps for the backward pass. rows = batch·seq.
#[derive(Clone)]
pub(in crate::model) struct MlpActivations {
    stats: Buffer, // (rows, 2)
    m: Buffer,     // (rows, width); one for all blocks: the backward pass makes it again
    h: Buffer,     // (rows, inner_width), before the activation
    g: Buffer,     // (rows, ffn), after it; made again after SwiGLU, kept after GELU, which is fused into its product
}

impl MlpActivations {
    pub fn new(model: &Architecture, buffers: &Buffers<'_>, shared: Option<&Self>) -> Result<Self, Error> {
        let rows = buffers.rows;
        Ok(Self {
            stats: buffers.kept("stats_2", rows * STATS, shared.map(|s| &s.stats))?,
            m: buffers.shared("m", rows * model.width, shared.map(|s| &s.m))?,
            h: buffers.kept("h", rows * inner_width(model), shared.map(|s| &s.h))?,
            g: match model.mlp() {
                MlpKind::Gelu => buffers.input_of_level(DOWN, "g", rows * model.ffn, shared.map(|s| &s.g))?,
                MlpKind::SwiGlu => buffers.shared("g", rows * model.ffn, shared.map(|s| &s.g))?,
            },
        })
    }
}

/// The part while it is being recorded.
pub(in crate::model) struct MlpPart<'a> {
    pub model: &'a Architecture,
    pub weights: &'a MlpWeights,
    pub activations: &'a MlpActivations,
    pub pass: Pass<'a>,
}

impl MlpPart<'_> {
    fn swiglu(&self) -> swiglu::Params {
        swiglu::Params {
            rows: self.pass.rows as u32,
            ffn: self.model.ffn as u32,
        }
    }

    /// Records `out` (rows, width) from `y` (rows, width).
    pub(crate) fn record_forward(&self, recording: &mut Recording, y: &Buffer, out: &Buffer) {
        let (model, rows, kept) = (self.model, self.pass.rows, self.activations);
        self.weights
            .norm
            .record_forward(recording, model, rows, y, &kept.m, &kept.stats);
        match model.mlp() {
            MlpKind::Gelu => {
                for map in self.weights.up.maps() {
                    let g = Columns::all(&kept.g, model.ffn);
                    map.record_forward(recording, self.pass, &kept.m, g, None, Some(&kept.h));
                }
            }
            MlpKind::SwiGlu => {
                for (map, columns) in self.weights.up.columns(&kept.h, inner_width(model)) {
                    map.record_forward(recording, self.pass, &kept.m, columns, None, None);
                }
                swiglu::forward(recording, self.swiglu(), &kept.h, &kept.g);
            }
        }
        let out = Columns::all(out, model.width);
        self.weights
            .down
            .record_forward(recording, self.pass, &kept.g, out, Some(y), None);
    }

    /// Takes `scratch.d_x`, the gradient of the part's output, to that of its input `y`, and adds the adapter gradients. Returns
    /// whether it got there: with [`BackwardTo::LowestAdapter`] it ends where nothing below is trained.
    pub fn record_backward(&self, recording: &mut Recording, scratch: &Scratch, y: &Buffer, to: BackwardTo) -> bool {
        let (model, rows, kept) = (self.model, self.pass.rows, self.activations);
        let pass = self.pass;
        let needed = |level: usize| to == BackwardTo::Input || pass.adapted_below(level);
        let below = needed(DOWN);
        let d_out = Columns::all(&scratch.d_x, model.width);
        let d_g = below.then_some((&scratch.d_g, false));
        if pass.adapted_at(DOWN) && model.mlp() == MlpKind::SwiGlu {
            swiglu::forward(recording, self.swiglu(), &kept.h, &kept.g);
        }
        self.weights
            .down
            .record_backward(recording, pass, &scratch.lora, &kept.g, d_out, d_g);
        if !below {
            return false;
        }
        match model.mlp() {
            MlpKind::Gelu => gelu::backward_x(recording, rows * model.ffn, &kept.h, &scratch.d_g, &scratch.d_h),
            MlpKind::SwiGlu => swiglu::backward_x(recording, self.swiglu(), &kept.h, &scratch.d_g, &scratch.d_h),
        }
        let below = needed(UP);
        let d_y = self.weights.up.columns(&scratch.d_h, inner_width(model));
        let d_m = below.then_some(&scratch.d_norm);
        if pass.adapted_at(UP) {
            let norm = &self.weights.norm;
            norm.record_forward(recording, model, rows, y, &kept.m, &kept.stats);
        }
        self.weights
            .up
            .record_backward(recording, pass, &scratch.lora, &kept.m, d_y, d_m);
        if below {
            self.weights.norm.record_backward(
                recording,
                model,
                rows,
                &scratch.d_norm,
                (y, &kept.stats),
                (&scratch.d_x, true),
            );
        }
        below
    }
}
