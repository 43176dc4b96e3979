//! The norm before a part of a block and before the head: layer norm or RMS norm, as the architecture says.

use crate::compute::{Buffer, Engine, Error, Recording};
use crate::kernels::weight::Columns;
use crate::kernels::{layernorm, rmsnorm};
use crate::model::architecture::Architecture;
use crate::model::linear::upload_vector;
use crate::model::unit::UnitData;

/// Words a row takes in the statistics that a norm keeps for its backward pass, whichever norm it is.
pub(crate) const STATS: usize = 2;

/// Scale and, of a layer norm, shift: (width) each. Clones share them.
#[derive(Clone)]
pub enum Norm {
    Layer { gamma: Buffer, beta: Buffer },
    Rms { gamma: Buffer },
}

impl Norm {
    /// Uploads the norm whose tensors have these names in the unit; without a shift it is an RMS norm.
    pub fn upload(engine: &Engine, unit: &UnitData, (gamma, beta): (&str, Option<&str>)) -> Result<Self, Error> {
        let gamma = upload_vector(engine, unit, gamma)?;
        Ok(match beta {
            Some(beta) => Norm::Layer {
                gamma,
                beta: upload_vector(engine, unit, beta)?,
            },
            None => Norm::Rms { gamma },
        })
    }

    /// Records `out = norm(x)`, both (rows, width); `stats` (rows, [`STATS`]) is kept for the backward pass.
    pub(crate) fn record_forward(
        &self,
        recording: &mut Recording,
        model: &Architecture,
        rows: usize,
        x: &Buffer,
        out: &Buffer,
        stats: &Buffer,
    ) {
        let width = model.width;
        match self {
            Norm::Layer { gamma, beta } => {
                let params = layernorm::ForwardParams {
                    rows: rows as u32,
                    width: width as u32,
                    epsilon: model.norm_epsilon,
                };
                layernorm::forward(recording, params, x, (gamma, beta), out, stats);
            }
            Norm::Rms { gamma } => {
                let params = rmsnorm::Params {
                    rows: rows as u32,
                    groups: 1,
                    width: width as u32,
                    epsilon: model.norm_epsilon,
                };
                let (x, out) = (Columns::all(x, width), Columns::all(out, width));
                rmsnorm::forward(recording, params, x, gamma, out, stats);
            }
        }
    }

    /// Records the gradient of `x` (rows, width), added to what `d_x` holds when `accumulate` says so.
    pub fn record_backward(
        &self,
        recording: &mut Recording,
        model: &Architecture,
        rows: usize,
        d_out: &Buffer,
        (x, stats): (&Buffer, &Buffer),
        (d_x, accumulate): (&Buffer, bool),
    ) {
        let width = model.width;
        match self {
            Norm::Layer { gamma, .. } => {
                let params = layernorm::BackwardParams {
                    rows: rows as u32,
                    width: width as u32,
                    accumulate: accumulate.into(),
                };
                layernorm::backward_x(recording, params, d_out, (x, gamma, stats), d_x);
            }
            Norm::Rms { gamma } => {
                let params = rmsnorm::BackwardParams {
                    rows: rows as u32,
                    groups: 1,
                    width: width as u32,
                    accumulate: accumulate.into(),
                };
                let all = |buffer| Columns::all(buffer, width);
                rmsnorm::backward_x(recording, params, all(d_out), (all(x), gamma, stats), all(d_x));
            }
        }
    }
}
