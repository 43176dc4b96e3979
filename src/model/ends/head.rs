//! The output end: the final norm and the head, a matrix (vocab, width) that is the token embedding where it is tied. It is the one
//! matrix that may exceed a device's largest binding, so it is held in chunks of vocabulary rows.

use crate::compute::{Buffer, Engine, Error, Recording};
use crate::kernels::cross_entropy::{self, Chunk};
use crate::kernels::matmul;
use crate::kernels::weight::{Columns, Weight};
use crate::model::ModelError;
use crate::model::architecture::Architecture;
use crate::model::part::norm::{Norm, STATS};
use crate::model::unit::{HEAD, Tensor, Unit, UnitData, final_norm};
use crate::model::weights::{UnitSource, WeightsError};
use crate::terms::format::Packed;

/// The final norm and the head on a device; clones share them.
#[derive(Clone)]
pub struct HeadWeights {
    norm: Norm,
    chunks: Vec<Chunk>,
}

impl HeadWeights {
    /// Uploads the final norm, and the head from wherever the model has it.
    ///
    /// # Errors
    /// [`ModelError`] when a unit cannot be read or the device has no room.
    pub fn load(engine: &Engine, model: &Architecture, units: &mut dyn UnitSource) -> Result<Self, ModelError> {
        let mut last = units.unit(Unit::Final)?;
        let norm = Norm::upload(engine, &last, final_norm(model.family))?;
        let matrix = if model.tied {
            take(&mut units.unit(Unit::Embedding)?, Unit::token_embedding(model))
        } else {
            take(&mut last, HEAD)
        };
        Ok(Self {
            norm,
            chunks: upload_chunks(engine, matrix)?,
        })
    }
}

/// # Panics
/// If the unit has no such tensor: units are checked where they are read.
fn take(unit: &mut UnitData, name: &str) -> Tensor {
    unit.take(name)
        .unwrap_or_else(|| panic!("unit {} has no {name}", unit.unit))
}

/// Uploads a matrix in as few parts as the device's bindings allow.
fn upload_chunks(engine: &Engine, matrix: Tensor) -> Result<Vec<Chunk>, ModelError> {
    let layout = matrix.layout();
    let (vocab, width) = (layout.rows, layout.columns);
    let chunk = |buffer: Buffer, start: usize, rows: usize| Chunk {
        weight: Weight {
            buffer,
            format: layout.format,
            stored_rows: rows,
            first_row: 0,
            rows,
            columns: width,
            transposed: true,
        },
        start,
    };
    if layout.words() <= engine.max_buffer_words() {
        let buffer = engine.buffer("head", layout.words())?;
        engine.upload(&buffer, 0, &matrix.words);
        return Ok(vec![chunk(buffer, 0, vocab)]);
    }
    // An even number of rows keeps halves of different rows in different words.
    let pair = layout.format.words(2, width);
    let rows = (engine.max_buffer_words() / pair * 2).min(vocab);
    if rows == 0 {
        return Err(Error::LimitTooSmall {
            limit: "bytes in a storage binding",
            needed: pair as u64 * 4,
            had: engine.max_buffer_words() as u64 * 4,
            advice: "; use `--device cpu`",
        }
        .into());
    }
    let packed = Packed::new(layout, matrix.words).map_err(|error| WeightsError::Format {
        tensor: matrix.name,
        format: layout.format,
        error,
    })?;
    (0..vocab)
        .step_by(rows)
        .map(|start| {
            let end = (start + rows).min(vocab);
            let part = packed.select_rows(&(start..end).collect::<Vec<_>>());
            let buffer = engine.buffer_from(format!("head.{start}"), part.words())?;
            Ok(chunk(buffer, start, end - start))
        })
        .collect()
}

/// Columns of the vocabulary whose logits exist at one time.
const VOCABULARY_TILE: usize = 2048;

/// What the head computes on: one set per workspace, at the largest shape.
pub(in crate::model) struct HeadBuffers {
    hidden: Buffer, // (rows, width)
    stats: Buffer,  // (rows, 2)
    logits: Buffer, // (rows, tile)
    state: Buffer,
    row_scale: Buffer,
    pub targets: Buffer, // i32 (rows)
    pub loss: Buffer,    // (rows), 0 where the target is ignored
    d_hidden: Option<Buffer>,
}

impl HeadBuffers {
    pub fn new(engine: &Engine, model: &Architecture, rows: usize, gradient: bool) -> Result<Self, Error> {
        let tile = VOCABULARY_TILE.min(model.vocab);
        let new = |name: &str, words: usize| engine.buffer(format!("head.{name}"), words);
        Ok(Self {
            hidden: new("hidden", rows * model.width)?,
            stats: new("stats", rows * STATS)?,
            logits: new("logits", rows * tile)?,
            state: new("state", rows * cross_entropy::STATE_WORDS)?,
            row_scale: new("row_scale", rows)?,
            targets: new("targets", rows)?,
            loss: new("loss", rows)?,
            d_hidden: gradient.then(|| new("d_hidden", rows * model.width)).transpose()?,
        })
    }
}

/// What the logits of single rows are computed on.
pub(in crate::model) struct LogitBuffers {
    hidden: Buffer,      // (width)
    stats: Buffer,       // (2)
    logits: Vec<Buffer>, // (vocabulary rows of a chunk)
}

impl LogitBuffers {
    pub fn new(engine: &Engine, model: &Architecture, weights: &HeadWeights) -> Result<Self, Error> {
        let rows = weights.chunks.iter().map(|chunk| chunk.weight.rows);
        Ok(Self {
            hidden: engine.buffer("last.hidden", model.width)?,
            stats: engine.buffer("last.stats", STATS)?,
            logits: rows
                .map(|rows| engine.buffer("last.logits", rows))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Records norm and logits of one row `x` (width).
    pub fn record(&self, recording: &mut Recording, model: &Architecture, weights: &HeadWeights, x: &Buffer) {
        weights
            .norm
            .record_forward(recording, model, 1, x, &self.hidden, &self.stats);
        for (chunk, logits) in weights.chunks.iter().zip(&self.logits) {
            let hidden = Columns::all(&self.hidden, model.width);
            let logits = Columns::all(logits, chunk.weight.rows);
            matmul::forward(recording, 1, &chunk.weight, hidden, logits, Default::default());
        }
    }

    /// Reads the logits (vocab) back.
    pub async fn download(&self, engine: &Engine) -> Result<Vec<f32>, Error> {
        let mut values = Vec::new();
        for logits in &self.logits {
            values.extend(engine.download::<f32>(logits, 0, logits.words()).await?);
        }
        Ok(values)
    }
}

/// The head while it is being recorded.
pub(in crate::model) struct Head<'a> {
    pub model: &'a Architecture,
    pub rows: usize,
    pub weights: &'a HeadWeights,
    pub buffers: &'a HeadBuffers,
    pub scalars: &'a Buffer,
}

impl Head<'_> {
    /// Records norm, logits and loss of `x` (rows, width) and, when `d_x` is given, the gradient with respect to `x` of
    /// `scalars[FACTOR]` times the sum of the rows' losses.
    pub fn record_loss(&self, recording: &mut Recording, x: &Buffer, d_x: Option<&Buffer>) {
        let buffers = self.buffers;
        self.weights
            .norm
            .record_forward(recording, self.model, self.rows, x, &buffers.hidden, &buffers.stats);
        let d_hidden = d_x.map(|_| buffers.d_hidden.as_ref().expect("a workspace that trains has d_hidden"));
        cross_entropy::record(
            recording,
            &cross_entropy::Head {
                rows: self.rows,
                width: self.model.width,
                tile: VOCABULARY_TILE.min(self.model.vocab),
                chunks: &self.weights.chunks,
                hidden: &buffers.hidden,
                targets: &buffers.targets,
                scalars: self.scalars,
                scratch: cross_entropy::Scratch {
                    logits: &buffers.logits,
                    state: &buffers.state,
                    row_scale: &buffers.row_scale,
                },
                loss: &buffers.loss,
                d_hidden,
            },
        );
        if let (Some(d_x), Some(d_hidden)) = (d_x, d_hidden) {
            self.weights.norm.record_backward(
                recording,
                self.model,
                self.rows,
                d_hidden,
                (x, &buffers.stats),
                (d_x, false),
            );
        }
    }
}
