//! The two ends of the model: the embedding below the first block, and the final norm with the head, tied to the embedding, above
//! the last. The token embedding is the one tensor that may exceed a device's largest binding, so it is held in chunks of
//! vocabulary rows.

use crate::compute::{Buffer, Engine, Error, Recording};
use crate::kernels::{cross_entropy, embedding, layernorm, matmul};

use super::block::{Norm, upload_named, upload_norm};
use super::config::Config;
use super::weights::{TensorData, UnitData};
use crate::terms::format::Format;

/// Vocabulary rows `start..end` of the token embedding, (end - start, width).
#[derive(Clone)]
pub struct Chunk {
    pub buffer: Buffer,
    pub start: usize,
    pub end: usize,
}

/// The token and position embeddings on a device; clones share them.
#[derive(Clone)]
pub struct EmbeddingWeights {
    chunks: Vec<Chunk>,
    positions: Buffer, // (positions, width)
    f16: bool,
}

impl EmbeddingWeights {
    /// Uploads the embedding unit.
    pub fn upload(engine: &Engine, config: &Config, unit: &UnitData) -> Result<Self, Error> {
        let (positions, dtype) = upload_named(engine, unit, "wpe.weight")?;
        let tensor = unit
            .tensor("wte.weight")
            .unwrap_or_else(|| panic!("unit {} has no wte.weight", unit.unit));
        let f16 = dtype == Format::F16;
        let per_word = if f16 { 2 } else { 1 };
        // An even number of rows starts every chunk on a whole word.
        let rows = (engine.max_buffer_words() * per_word / config.width).min(config.vocab.next_multiple_of(2)) & !1;
        if rows == 0 {
            return Err(Error::LimitTooSmall {
                limit: "bytes in a storage binding",
                needed: config.width as u64 * 8,
                had: engine.max_buffer_words() as u64 * 4,
                advice: "; use `--device cpu`",
            });
        }
        let chunks = (0..config.vocab)
            .step_by(rows)
            .map(|start| {
                let end = (start + rows).min(config.vocab);
                let name = format!("wte.{start}");
                let (from, to) = (start * config.width, end * config.width);
                let buffer = match &tensor.data {
                    TensorData::F16(words) => engine.buffer_from(name, &words[from / 2..to.div_ceil(2)])?,
                    TensorData::F32(values) => engine.buffer_from(name, &values[from..to])?,
                };
                Ok(Chunk { buffer, start, end })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { chunks, positions, f16 })
    }

    /// Records `out = wte[token] + wpe[position]`; `tokens` u32 (batch·seq), `out` (batch·seq, width).
    pub(super) fn record_forward(
        &self,
        recording: &mut Recording,
        config: &Config,
        (batch, seq): (usize, usize),
        tokens: &Buffer,
        out: &Buffer,
    ) {
        for chunk in &self.chunks {
            embedding::forward(
                recording,
                embedding::ForwardParams {
                    rows: (batch * seq) as u32,
                    seq: seq as u32,
                    width: config.width as u32,
                    vocab_start: chunk.start as u32,
                    vocab_end: chunk.end as u32,
                    f16: self.f16.into(),
                },
                tokens,
                &chunk.buffer,
                &self.positions,
                out,
            );
        }
    }
}

/// The final norm; the head is the embedding.
#[derive(Clone)]
pub struct HeadWeights {
    ln_f: Norm,
}

impl HeadWeights {
    /// Uploads the final unit.
    pub fn upload(engine: &Engine, unit: &UnitData) -> Result<Self, Error> {
        Ok(Self {
            ln_f: upload_norm(engine, unit, "ln_f")?,
        })
    }
}

/// Columns of the vocabulary whose logits exist at one time.
const VOCABULARY_TILE: usize = 2048;

/// What the head computes on: one set per stack, at the largest shape.
pub(super) struct HeadBuffers {
    pub hidden: Buffer, // (rows, width)
    stats: Buffer,      // (rows, 2)
    logits: Buffer,     // (rows, tile)
    state: Buffer,
    row_scale: Buffer,
    pub targets: Buffer, // i32 (rows)
    pub loss: Buffer,    // (rows), 0 where the target is ignored
    d_hidden: Option<Buffer>,
}

impl HeadBuffers {
    pub fn new(engine: &Engine, config: &Config, rows: usize, gradient: bool) -> Result<Self, Error> {
        let tile = VOCABULARY_TILE.min(config.vocab);
        let new = |name: &str, words: usize| engine.buffer(format!("head.{name}"), words);
        Ok(Self {
            hidden: new("hidden", rows * config.width)?,
            stats: new("stats", rows * 2)?,
            logits: new("logits", rows * tile)?,
            state: new("state", rows * cross_entropy::STATE_WORDS)?,
            row_scale: new("row_scale", rows)?,
            targets: new("targets", rows)?,
            loss: new("loss", rows)?,
            d_hidden: gradient.then(|| new("d_hidden", rows * config.width)).transpose()?,
        })
    }
}

/// The head while it is being recorded.
pub(super) struct Head<'a> {
    pub config: &'a Config,
    pub rows: usize,
    pub weights: &'a HeadWeights,
    pub embedding: &'a EmbeddingWeights,
    pub buffers: &'a HeadBuffers,
    pub scalars: &'a Buffer,
}

impl Head<'_> {
    /// Records the final norm of `x` (rows, width).
    pub fn record_norm(&self, recording: &mut Recording, x: &Buffer) {
        let (gamma, beta) = &self.weights.ln_f;
        layernorm::forward(
            recording,
            layernorm::ForwardParams {
                rows: self.rows as u32,
                width: self.config.width as u32,
                epsilon: self.config.layernorm_epsilon,
            },
            x,
            (gamma, beta),
            &self.buffers.hidden,
            &self.buffers.stats,
        );
    }

    /// Records norm, logits and loss of `x` (rows, width) and, when `d_x` is given, the gradient with respect to `x` of
    /// `scalars[FACTOR]` times the sum of the rows' losses.
    pub fn record_loss(&self, recording: &mut Recording, x: &Buffer, d_x: Option<&Buffer>) {
        self.record_norm(recording, x);
        let chunks: Vec<(Buffer, u32, u32)> = self
            .embedding
            .chunks
            .iter()
            .map(|chunk| (chunk.buffer.clone(), chunk.start as u32, chunk.end as u32))
            .collect();
        let d_hidden = d_x.map(|_| {
            self.buffers
                .d_hidden
                .as_ref()
                .expect("a stack that trains has d_hidden")
        });
        cross_entropy::record(
            recording,
            &cross_entropy::Head {
                rows: self.rows,
                width: self.config.width,
                tile: VOCABULARY_TILE.min(self.config.vocab),
                f16: self.embedding.f16,
                chunks: &chunks,
                hidden: &self.buffers.hidden,
                targets: &self.buffers.targets,
                scalars: self.scalars,
                scratch: cross_entropy::Scratch {
                    logits: &self.buffers.logits,
                    state: &self.buffers.state,
                    row_scale: &self.buffers.row_scale,
                },
                loss: &self.buffers.loss,
                d_hidden,
            },
        );
        if let (Some(d_x), Some(d_hidden)) = (d_x, d_hidden) {
            layernorm::backward_x(
                recording,
                layernorm::BackwardParams {
                    rows: self.rows as u32,
                    width: self.config.width as u32,
                    accumulate: 0,
                },
                d_hidden,
                (x, &self.weights.ln_f.0, &self.buffers.stats),
                d_x,
            );
        }
    }

    /// Records the logits (rows, vocabulary rows of the chunk) of the normed hidden state, a buffer a chunk.
    pub fn record_logits(&self, recording: &mut Recording, logits: &[Buffer]) {
        for (chunk, logits) in self.embedding.chunks.iter().zip(logits) {
            matmul::backward_x(
                recording,
                matmul::Shape::new(self.rows, self.config.width, chunk.end - chunk.start),
                self.embedding.f16,
                &self.buffers.hidden,
                &chunk.buffer,
                logits,
                Default::default(),
            );
        }
    }

    /// Vocabulary rows of each chunk.
    pub fn chunk_rows(&self) -> impl Iterator<Item = usize> + '_ {
        self.embedding.chunks.iter().map(|c| c.end - c.start)
    }
}
