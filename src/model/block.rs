//! One transformer block: its frozen weights on the device, what its forward pass keeps, and the recording of both passes.
//!
//! ```text
//! a = LN1(x)   qkv = a·W_qkv + b   o = attention(qkv)   y = x + o·W_o + b_o
//! m = LN2(y)   h = m·W_fc + b_fc   g = GELU(h)          out = y + g·W_proj + b_proj
//! ```
//! Each of the four linear maps may carry a LoRA pair (Hu et al. 2021): `+ scale·(input·Aᵀ)·Bᵀ`.

use crate::compute::{Buffer, Engine, Error, Recording};
use crate::kernels::{attention, gelu, layernorm, lora, matmul};

use super::adapter::{AdapterEntry, Target};
use super::config::Config;
use super::stack::{Lora, Scratch};
use super::weights::{TensorData, UnitData};
use crate::terms::format::Format;

/// A frozen linear map: `weight` (inputs, outputs), `bias` (outputs).
#[derive(Clone)]
pub struct Linear {
    weight: Buffer,
    bias: Buffer,
    inputs: usize,
    outputs: usize,
    f16: bool,
}

/// Scale and shift of a layer norm, (width) each.
pub type Norm = (Buffer, Buffer);

/// A block's frozen weights on a device; clones share them.
#[derive(Clone)]
pub struct BlockWeights {
    ln_1: Norm,
    ln_2: Norm,
    /// In the order of [`Target::ALL`].
    linears: [Linear; 4],
}

/// Uploads a tensor as it is held: f16 pairs or f32, as 32-bit words.
pub(super) fn upload(engine: &Engine, name: String, data: &TensorData) -> Result<Buffer, Error> {
    match data {
        TensorData::F16(words) => engine.buffer_from(name, words),
        TensorData::F32(values) => engine.buffer_from(name, values),
    }
}

/// Uploads the unit's tensor called `name`.
///
/// # Panics
/// If the unit has no such tensor: units are checked where they are read.
pub(super) fn upload_named(engine: &Engine, unit: &UnitData, name: &str) -> Result<(Buffer, Format), Error> {
    let tensor = unit
        .tensor(name)
        .unwrap_or_else(|| panic!("unit {} has no {name}", unit.unit));
    let buffer = upload(engine, format!("{}.{name}", unit.unit), &tensor.data)?;
    Ok((buffer, tensor.data.dtype()))
}

pub(super) fn upload_norm(engine: &Engine, unit: &UnitData, name: &str) -> Result<Norm, Error> {
    Ok((
        upload_named(engine, unit, &format!("{name}.weight"))?.0,
        upload_named(engine, unit, &format!("{name}.bias"))?.0,
    ))
}

impl BlockWeights {
    /// Uploads a block's unit.
    pub fn upload(engine: &Engine, config: &Config, unit: &UnitData) -> Result<Self, Error> {
        let linear = |target: Target| {
            let (inputs, outputs) = target.dimensions(config);
            let (weight, dtype) = upload_named(engine, unit, &format!("{}.weight", target.module()))?;
            Ok(Linear {
                weight,
                bias: upload_named(engine, unit, &format!("{}.bias", target.module()))?.0,
                inputs,
                outputs,
                f16: dtype == Format::F16,
            })
        };
        Ok(Self {
            ln_1: upload_norm(engine, unit, "ln_1")?,
            ln_2: upload_norm(engine, unit, "ln_2")?,
            linears: [
                linear(Target::AttnQkv)?,
                linear(Target::AttnProj)?,
                linear(Target::MlpFc)?,
                linear(Target::MlpProj)?,
            ],
        })
    }

    fn linear(&self, target: Target) -> &Linear {
        &self.linears[target as usize]
    }
}

/// What a block's forward pass writes; the backward pass reads it. rows = batch·seq.
#[derive(Clone)]
pub struct Activations {
    /// Block input (rows, width).
    pub x: Buffer,
    /// Block output (rows, width): the next block's input.
    pub out: Buffer,
    stats_1: Buffer, // (rows, 2)
    a: Buffer,       // (rows, width)
    pub qkv: Buffer, // (rows, 3·width)
    lse: Buffer,     // (batch, heads, seq)
    o: Buffer,       // (rows, width)
    y: Buffer,       // (rows, width)
    stats_2: Buffer, // (rows, 2)
    m: Buffer,       // (rows, width)
    h: Buffer,       // (rows, ffn), before GELU
    g: Buffer,       // (rows, ffn), after GELU
    /// `input·Aᵀ` of each adapted map, (rows, rank), in the order of [`Target::ALL`].
    u: [Option<Buffer>; 4],
}

/// What blocks keep of their forward passes.
#[derive(Clone, Copy)]
pub(super) struct Keeping<'a> {
    pub rows: usize,
    pub lora: Option<&'a Lora>,
    /// A backward pass follows. The inputs of maps without an adapter are shared all the same: only adapter gradients read them.
    pub keep: bool,
}

impl Activations {
    /// Buffers for one block. `shared` is the set of the block before, for what nobody reads later.
    pub(super) fn new(
        engine: &Engine,
        config: &Config,
        block: usize,
        (x, out): (Buffer, Buffer),
        shared: Option<&Activations>,
        Keeping { rows, lora, keep }: Keeping<'_>,
    ) -> Result<Self, Error> {
        let name = |what: &str| format!("block.{block}.{what}");
        let new = |what: &str, words: usize| engine.buffer(name(what), words);
        let entry = |target| lora.and_then(|lora: &Lora| lora.layout.entry(block, target));
        let pick = |what: &str, words: usize, needed: bool, old: Option<&Buffer>| match old {
            Some(old) if !needed => Ok(old.clone()),
            _ => new(what, words),
        };
        let (width, ffn) = (config.width, config.ffn);
        let u = |target: Target, old: Option<&Buffer>| {
            entry(target).map(|e| pick("u", rows * e.rank, keep, old)).transpose()
        };
        let old_u = |target: Target| shared.and_then(|s| s.u[target as usize].as_ref());
        Ok(Self {
            x,
            out,
            stats_1: pick("stats_1", rows * 2, keep, shared.map(|s| &s.stats_1))?,
            a: pick(
                "a",
                rows * width,
                keep && entry(Target::AttnQkv).is_some(),
                shared.map(|s| &s.a),
            )?,
            qkv: pick("qkv", rows * 3 * width, keep, shared.map(|s| &s.qkv))?,
            lse: pick("lse", rows * config.heads, keep, shared.map(|s| &s.lse))?,
            o: pick("o", rows * width, keep, shared.map(|s| &s.o))?,
            y: pick("y", rows * width, keep, shared.map(|s| &s.y))?,
            stats_2: pick("stats_2", rows * 2, keep, shared.map(|s| &s.stats_2))?,
            m: pick(
                "m",
                rows * width,
                keep && entry(Target::MlpFc).is_some(),
                shared.map(|s| &s.m),
            )?,
            h: pick("h", rows * ffn, keep, shared.map(|s| &s.h))?,
            g: pick(
                "g",
                rows * ffn,
                keep && entry(Target::MlpProj).is_some(),
                shared.map(|s| &s.g),
            )?,
            u: [
                u(Target::AttnQkv, old_u(Target::AttnQkv))?,
                u(Target::AttnProj, old_u(Target::AttnProj))?,
                u(Target::MlpFc, old_u(Target::MlpFc))?,
                u(Target::MlpProj, old_u(Target::MlpProj))?,
            ],
        })
    }
}

/// One block of a stack, while it is being recorded.
pub(super) struct Block<'a> {
    pub config: &'a Config,
    pub index: usize,
    pub batch: usize,
    pub seq: usize,
    pub weights: &'a BlockWeights,
    pub activations: &'a Activations,
    pub lora: Option<&'a Lora>,
}

/// How far a block's backward pass goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BackwardTo {
    /// To the gradient of the block's input.
    Input,
    /// To the gradient of the block's lowest adapted map and no further: nothing below it is trained.
    LowestAdapter,
}

impl Block<'_> {
    fn rows(&self) -> usize {
        self.batch * self.seq
    }

    fn entry(&self, target: Target) -> Option<(&Lora, &AdapterEntry)> {
        let lora = self.lora?;
        Some((lora, lora.layout.entry(self.index, target)?))
    }

    fn u(&self, target: Target) -> &Buffer {
        self.activations.u[target as usize]
            .as_ref()
            .expect("an adapted map has its low-rank activations")
    }

    /// `out = x·W + b (+ adapter) (+ residual)`, and GELU after that when `gelu_pre` is to hold the sum before it.
    fn linear_forward(
        &self,
        recording: &mut Recording,
        target: Target,
        x: &Buffer,
        out: &Buffer,
        residual: Option<&Buffer>,
        gelu_pre: Option<&Buffer>,
    ) {
        let linear = self.weights.linear(target);
        let lora = self.entry(target).map(|(lora, entry)| {
            let u = self.u(target);
            lora::forward_down(
                recording,
                lora::ForwardDownParams {
                    rows: self.rows() as u32,
                    inputs: entry.inputs as u32,
                    rank: entry.rank as u32,
                    offset: entry.offset_a as u32,
                },
                x,
                &lora.values,
                u,
            );
            matmul::Lora {
                u,
                adapter: &lora.values,
                offset: entry.offset_b,
                rank: entry.rank as u32,
                scale: lora.scale,
            }
        });
        matmul::forward(
            recording,
            matmul::Shape::new(self.rows(), linear.outputs, linear.inputs),
            linear.f16,
            x,
            &linear.weight,
            out,
            matmul::Epilogue {
                bias: Some(&linear.bias),
                residual,
                lora,
                gelu_pre,
                ..Default::default()
            },
        );
    }

    /// Adapter gradients of one map, and `d_x` unless it is `None`.
    fn linear_backward(
        &self,
        recording: &mut Recording,
        target: Target,
        x: &Buffer,
        d_y: &Buffer,
        d_x: Option<&Buffer>,
        scratch: &Scratch,
    ) {
        let linear = self.weights.linear(target);
        let lora = self.entry(target).map(|(lora, entry)| {
            let rows = self.rows() as u32;
            lora::backward_up(
                recording,
                lora::BackwardUpParams {
                    rows,
                    outputs: entry.outputs as u32,
                    rank: entry.rank as u32,
                    offset: entry.offset_b as u32,
                },
                d_y,
                &lora.values,
                &scratch.v,
            );
            lora::backward_b(
                recording,
                lora::BackwardBParams {
                    rows,
                    outputs: entry.outputs as u32,
                    rank: entry.rank as u32,
                    offset: entry.offset_b as u32,
                    scale: lora.scale,
                },
                d_y,
                self.u(target),
                &lora.scalars,
                &scratch.partial,
                &lora.gradient,
            );
            lora::backward_a(
                recording,
                lora::BackwardAParams {
                    rows,
                    inputs: entry.inputs as u32,
                    rank: entry.rank as u32,
                    offset: entry.offset_a as u32,
                    scale: lora.scale,
                },
                &scratch.v,
                x,
                &lora.scalars,
                &scratch.partial,
                &lora.gradient,
            );
            matmul::Lora {
                u: &scratch.v,
                adapter: &lora.values,
                offset: entry.offset_a,
                rank: entry.rank as u32,
                scale: lora.scale,
            }
        });
        if let Some(d_x) = d_x {
            matmul::backward_x(
                recording,
                matmul::Shape::new(self.rows(), linear.outputs, linear.inputs),
                linear.f16,
                d_y,
                &linear.weight,
                d_x,
                matmul::Epilogue {
                    lora,
                    ..Default::default()
                },
            );
        }
    }

    fn attention_params(&self) -> attention::Params {
        let head_size = self.config.head_width();
        attention::Params {
            batch: self.batch as u32,
            seq: self.seq as u32,
            heads: self.config.heads as u32,
            head_size: head_size as u32,
            scale: 1.0 / (head_size as f32).sqrt(),
        }
    }

    pub fn record_forward(&self, recording: &mut Recording) {
        let act = self.activations;
        let norm = layernorm::ForwardParams {
            rows: self.rows() as u32,
            width: self.config.width as u32,
            epsilon: self.config.layernorm_epsilon,
        };
        let (gamma, beta) = &self.weights.ln_1;
        layernorm::forward(recording, norm, &act.x, (gamma, beta), &act.a, &act.stats_1);
        self.linear_forward(recording, Target::AttnQkv, &act.a, &act.qkv, None, None);
        attention::forward(recording, self.attention_params(), &act.qkv, &act.o, &act.lse);
        self.linear_forward(recording, Target::AttnProj, &act.o, &act.y, Some(&act.x), None);
        let (gamma, beta) = &self.weights.ln_2;
        layernorm::forward(recording, norm, &act.y, (gamma, beta), &act.m, &act.stats_2);
        self.linear_forward(recording, Target::MlpFc, &act.m, &act.g, None, Some(&act.h));
        self.linear_forward(recording, Target::MlpProj, &act.g, &act.out, Some(&act.y), None);
    }

    /// Takes `scratch.d_x`, the gradient of the block's output, to that of its input, and adds the adapter gradients.
    pub fn record_backward(&self, recording: &mut Recording, scratch: &Scratch, to: BackwardTo) {
        let act = self.activations;
        let norm = layernorm::BackwardParams {
            rows: self.rows() as u32,
            width: self.config.width as u32,
            accumulate: 1,
        };
        let needed = |target: Target| {
            to == BackwardTo::Input
                || Target::ALL[..target as usize]
                    .iter()
                    .any(|&lower| self.entry(lower).is_some())
        };
        let d_x = &scratch.d_x;

        let below = needed(Target::MlpProj);
        self.linear_backward(
            recording,
            Target::MlpProj,
            &act.g,
            d_x,
            below.then_some(&scratch.d_g),
            scratch,
        );
        if !below {
            return;
        }
        gelu::backward_x(
            recording,
            self.rows() * self.config.ffn,
            &act.h,
            &scratch.d_g,
            &scratch.d_h,
        );
        let below = needed(Target::MlpFc);
        self.linear_backward(
            recording,
            Target::MlpFc,
            &act.m,
            &scratch.d_h,
            below.then_some(&scratch.d_norm),
            scratch,
        );
        if !below {
            return;
        }
        layernorm::backward_x(
            recording,
            norm,
            &scratch.d_norm,
            (&act.y, &self.weights.ln_2.0, &act.stats_2),
            d_x,
        );
        let below = needed(Target::AttnProj);
        self.linear_backward(
            recording,
            Target::AttnProj,
            &act.o,
            d_x,
            below.then_some(&scratch.d_norm),
            scratch,
        );
        if !below {
            return;
        }
        attention::backward(
            recording,
            self.attention_params(),
            (&act.qkv, &act.o, &act.lse),
            &scratch.d_norm,
            &scratch.dot,
            &scratch.d_qkv,
        );
        let below = to == BackwardTo::Input;
        self.linear_backward(
            recording,
            Target::AttnQkv,
            &act.a,
            &scratch.d_qkv,
            below.then_some(&scratch.d_norm),
            scratch,
        );
        if below {
            layernorm::backward_x(
                recording,
                norm,
                &scratch.d_norm,
                (&act.x, &self.weights.ln_1.0, &act.stats_1),
                d_x,
            );
        }
    }
}
