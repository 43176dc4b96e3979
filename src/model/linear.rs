//! A block's projections: frozen linear maps, each with its LoRA pair where it is adapted (Hu et al., arXiv 2106.09685):
//! `y = x·W + b + scale·(x·Aᵀ)·Bᵀ`.
//!
//! Maps that read the same input write side by side into one tensor, as GPT-2's `c_attn` gives query, key and value at once:
//! a [`Projection`].

use crate::compute::{Buffer, Engine, Error, Recording};
use crate::kernels::weight::{Columns, Weight};
use crate::kernels::{lora, matmul};

use super::adapter::{AdapterEntry, AdapterLayout, Target};
use super::architecture::Architecture;
use super::unit::{Tensor, UnitData};
use crate::terms::adapter::Trained;

/// An adapter on the device with what its training needs. Flat, in the order of [`AdapterLayout`].
pub struct Lora {
    pub(super) layout: AdapterLayout,
    pub(super) values: Buffer,
    pub(super) gradient: Buffer,
    pub(super) scalars: Buffer,
    /// The values as they were set, where some of them are not trained: weight decay is not to move those.
    pub(super) frozen: Option<Buffer>,
}

/// Scratch of the adapters' gradients, shared by all projections. rows = batch·seq.
pub(super) struct LoraScratch {
    pub v: Buffer,       // (rows, rank)
    pub partial: Buffer, // split sums
}

impl LoraScratch {
    pub fn new(engine: &Engine, layout: &AdapterLayout, rows: usize) -> Result<Self, Error> {
        let entries = layout.entries().iter();
        let rank = entries.clone().map(|entry| entry.rank).max().unwrap_or(1);
        let partial = entries
            .map(|entry| lora::partial_words(rows, entry.inputs.max(entry.outputs), entry.rank))
            .max();
        Ok(Self {
            v: engine.buffer("v", rows * rank)?,
            partial: engine.buffer("partial", partial.unwrap_or(1))?,
        })
    }
}

/// `input·Aᵀ` of a block's adapted maps, (rows, rank) each: kept by the forward pass for the gradient of B.
#[derive(Clone, Default)]
pub(super) struct LowRank(Vec<(Target, Buffer)>);

impl LowRank {
    /// Buffers for the maps of a block that are adapted. What nobody reads later may be `shared` with another block, where the
    /// ranks are the same.
    pub fn new(
        engine: &Engine,
        layout: Option<&AdapterLayout>,
        (block, rows): (usize, usize),
        shared: Option<&LowRank>,
    ) -> Result<Self, Error> {
        let entries = layout
            .into_iter()
            .flat_map(|layout| layout.entries())
            .filter(|entry| entry.block == block);
        entries
            .map(|entry| {
                let old = shared.and_then(|shared| shared.find(entry.target));
                let words = rows * entry.rank;
                let buffer = match old.filter(|old| old.words() >= words) {
                    Some(old) => old.clone(),
                    None => engine.buffer(format!("block.{block}.{}.u", entry.target.short()), words)?,
                };
                Ok((entry.target, buffer))
            })
            .collect::<Result<_, Error>>()
            .map(Self)
    }

    fn find(&self, target: Target) -> Option<&Buffer> {
        self.0.iter().find(|(own, _)| *own == target).map(|(_, buffer)| buffer)
    }

    fn get(&self, target: Target) -> &Buffer {
        self.find(target).expect("an adapted map has its low-rank activations")
    }
}

/// What the projections of a block are recorded with.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    /// The block's index in the model.
    pub block: usize,
    pub rows: usize,
    pub lora: Option<&'a Lora>,
    pub low_rank: &'a LowRank,
}

impl<'a> Pass<'a> {
    pub fn entry(&self, target: Target) -> Option<(&'a Lora, &'a AdapterEntry)> {
        let lora = self.lora?;
        Some((lora, lora.layout.entry(self.block, target)?))
    }

    /// Whether a map of the block below `level` is adapted.
    pub(crate) fn adapted_below(&self, level: usize) -> bool {
        self.adapted(|at| at < level)
    }

    /// Whether a map of the block at `level` is adapted.
    pub(crate) fn adapted_at(&self, level: usize) -> bool {
        self.adapted(|at| at == level)
    }

    fn adapted(&self, is_meant: impl Fn(usize) -> bool) -> bool {
        let Some(lora) = self.lora else { return false };
        lora.layout
            .entries()
            .iter()
            .any(|entry| entry.block == self.block && is_meant(entry.target.level()))
    }
}

/// One frozen linear map on a device; clones share it.
#[derive(Clone)]
pub struct Linear {
    pub target: Target,
    weight: Weight,
    /// (outputs)
    bias: Option<Buffer>,
}

/// A tensor of the unit.
///
/// # Panics
/// If the unit has none of this name: units are checked where they are read.
pub(super) fn tensor<'a>(unit: &'a UnitData, name: &str) -> &'a Tensor {
    unit.tensor(name)
        .unwrap_or_else(|| panic!("unit {} has no {name}", unit.unit))
}

/// Room for a tensor, and in it the words that there are: a [`Blank`](super::cost::Blank) one has none.
fn upload(engine: &Engine, unit: &UnitData, tensor: &Tensor) -> Result<Buffer, Error> {
    let buffer = engine.buffer(format!("{}.{}", unit.unit, tensor.name), tensor.layout().words())?;
    engine.upload(&buffer, 0, &tensor.words);
    Ok(buffer)
}

/// Uploads the unit's vector called `name`.
pub(super) fn upload_vector(engine: &Engine, unit: &UnitData, name: &str) -> Result<Buffer, Error> {
    upload(engine, unit, tensor(unit, name))
}

impl Linear {
    /// Uploads one of a block's maps.
    pub fn upload(engine: &Engine, model: &Architecture, unit: &UnitData, target: Target) -> Result<Self, Error> {
        let matrix = tensor(unit, target.weight());
        let layout = matrix.layout();
        Ok(Self {
            target,
            weight: Weight {
                buffer: upload(engine, unit, matrix)?,
                format: layout.format,
                stored_rows: layout.rows,
                first_row: 0,
                rows: layout.rows,
                columns: layout.columns,
                transposed: model.transposed,
            },
            bias: model
                .biased(target)
                .then(|| upload_vector(engine, unit, target.bias()))
                .transpose()?,
        })
    }

    pub fn outputs(&self) -> usize {
        self.weight.outputs()
    }

    /// Records `out = x·W + b (+ adapter) (+ residual)`, and GELU after that when `gelu_pre` is to hold the sum before it.
    pub(super) fn record_forward(
        &self,
        recording: &mut Recording,
        pass: Pass<'_>,
        x: &Buffer,
        out: Columns<'_>,
        residual: Option<&Buffer>,
        gelu_pre: Option<&Buffer>,
    ) {
        let x = Columns::all(x, self.weight.inputs());
        let lora = pass.entry(self.target).map(|(lora, entry)| {
            let u = pass.low_rank.get(self.target);
            let params = lora::DownParams {
                rows: pass.rows,
                inputs: entry.inputs,
                rank: entry.rank,
                offset: entry.offset_a,
            };
            lora::forward_down(recording, params, x, &lora.values, u);
            matmul::Lora {
                u,
                adapter: &lora.values,
                offset: entry.offset_b,
                rank: entry.rank as u32,
                scale: entry.scale,
            }
        });
        let epilogue = matmul::Epilogue {
            bias: self.bias.as_ref(),
            residual,
            lora,
            gelu_pre,
            ..Default::default()
        };
        matmul::forward(recording, pass.rows, &self.weight, x, out, epilogue);
    }

    /// Records the adapter's gradients from `d_y` and, where `d_x` is given, the gradient of the input, added to what is there
    /// when `accumulate` says so.
    pub(super) fn record_backward(
        &self,
        recording: &mut Recording,
        pass: Pass<'_>,
        scratch: &LoraScratch,
        x: &Buffer,
        d_y: Columns<'_>,
        d_x: Option<(&Buffer, bool)>,
    ) {
        let rows = pass.rows;
        let lora = pass.entry(self.target).map(|(lora, entry)| {
            let (inputs, outputs, rank, scale) = (entry.inputs, entry.outputs, entry.rank, entry.scale);
            let up = lora::UpParams {
                rows,
                outputs,
                rank,
                offset: entry.offset_b,
            };
            lora::backward_up(recording, up, d_y, &lora.values, &scratch.v);
            let of_b = lora::BackwardBParams {
                rows,
                outputs,
                rank,
                offset: entry.offset_b,
                scale,
            };
            let u = pass.low_rank.get(self.target);
            lora::backward_b(recording, of_b, d_y, u, &lora.scalars, &scratch.partial, &lora.gradient);
            let of_a = lora::BackwardAParams {
                rows,
                inputs,
                rank,
                offset: entry.offset_a,
                scale,
            };
            let x = Columns::all(x, inputs);
            if lora.layout.trained() == Trained::Both {
                lora::backward_a(
                    recording,
                    of_a,
                    &scratch.v,
                    x,
                    &lora.scalars,
                    &scratch.partial,
                    &lora.gradient,
                );
            }
            matmul::Lora {
                u: &scratch.v,
                adapter: &lora.values,
                offset: entry.offset_a,
                rank: rank as u32,
                scale,
            }
        });
        if let Some((d_x, accumulate)) = d_x {
            let epilogue = matmul::Epilogue {
                lora,
                accumulate,
                ..Default::default()
            };
            let d_x = Columns::all(d_x, self.weight.inputs());
            matmul::backward_x(recording, rows, &self.weight, d_y, d_x, epilogue);
        }
    }
}

/// Maps of one input whose outputs lie side by side.
#[derive(Clone)]
pub struct Projection(Vec<Linear>);

impl Projection {
    /// Uploads a block's maps of one level.
    pub fn upload(engine: &Engine, model: &Architecture, unit: &UnitData, level: usize) -> Result<Self, Error> {
        let targets = model.targets().iter().filter(|target| target.level() == level);
        targets
            .map(|&target| Linear::upload(engine, model, unit, target))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The maps in the order of their outputs.
    pub(crate) fn maps(&self) -> &[Linear] {
        &self.0
    }

    /// Each map with the columns of a tensor that are its own, whose row is `stride` long.
    pub(super) fn columns<'a>(
        &'a self,
        buffer: &'a Buffer,
        stride: usize,
    ) -> impl Iterator<Item = (&'a Linear, Columns<'a>)> {
        let mut first = 0;
        self.0.iter().map(move |map| {
            let columns = Columns { buffer, first, stride };
            first += map.outputs();
            (map, columns)
        })
    }

    /// Records the backward pass of all maps from the columns of their outputs' gradients; the gradients of their input are added
    /// up where `d_x` is given.
    pub(super) fn record_backward<'a>(
        &'a self,
        recording: &mut Recording,
        pass: Pass<'_>,
        scratch: &LoraScratch,
        x: &Buffer,
        d_y: impl Iterator<Item = (&'a Linear, Columns<'a>)>,
        d_x: Option<&Buffer>,
    ) {
        for (i, (map, d_y)) in d_y.enumerate() {
            map.record_backward(recording, pass, scratch, x, d_y, d_x.map(|d_x| (d_x, i > 0)));
        }
    }
}
