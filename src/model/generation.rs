//! Text, token by token: the keys and values of what was read are kept, so that a token costs one row of the model and attention over
//! what went before.

use crate::compute::{Buffer, Engine, Error, Prepared};
use crate::kernels::attention;

use super::ModelError;
use super::adapter::Adapter;
use super::architecture::Architecture;
use super::ends::head::LogitBuffers;
use super::stack::{Stack, StackWeights};
use super::workspace::Extent;

/// Tokens of a prompt that are read at a time.
const CHUNK: usize = 256;

/// One text that grows, on a model that may carry an adapter.
pub struct Generator {
    stack: Stack,
    /// Keys and values of each block.
    caches: Vec<Buffer>,
    capacity: usize,
    last: Buffer, // (width)
    logits: LogitBuffers,
    /// One more token.
    next: Option<Prepared>,
    position: usize,
}

impl Generator {
    /// Room for texts of at most `capacity` tokens.
    ///
    /// # Errors
    /// [`Error`] when the device has no room.
    ///
    /// # Panics
    /// If the weights are not the whole model's.
    pub fn new(
        engine: &Engine,
        model: &Architecture,
        weights: StackWeights,
        adapter: Option<&Adapter>,
        capacity: usize,
    ) -> Result<Self, Error> {
        assert_eq!(weights.block_range(), 0..model.blocks, "the whole model writes");
        let extent = Extent {
            batch: 1,
            seq: CHUNK.min(capacity),
        };
        let adapter = adapter.map(|a| (&a.layout, a.values.as_slice()));
        let mut stack = Stack::new(engine, model, weights, adapter, extent, false)?;
        stack.make_rotations(capacity)?;
        let words = attention::cache_words(capacity, model.kv_heads, model.head_size);
        let caches = (0..model.blocks)
            .map(|block| engine.buffer(format!("block.{block}.cache"), words))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            last: engine.buffer("last", model.width)?,
            logits: stack.logit_buffers()?,
            stack,
            caches,
            capacity,
            next: None,
            position: 0,
        })
    }

    /// Tokens that the text has so far.
    pub fn len(&self) -> usize {
        self.position
    }

    /// Whether the text has not begun.
    pub fn is_empty(&self) -> bool {
        self.position == 0
    }

    /// Tokens that the text may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Goes back to a text's first `position` tokens.
    pub fn truncate(&mut self, position: usize) {
        self.position = self.position.min(position);
    }

    /// Adds `tokens` to the text and returns the logits (vocab) of what follows them.
    ///
    /// # Errors
    /// [`ModelError`] when the device fails or the embedding cannot be read.
    ///
    /// # Panics
    /// If there are none, or more than there is room for.
    pub async fn extend(&mut self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        assert!(!tokens.is_empty(), "a text goes on with tokens");
        assert!(self.position + tokens.len() <= self.capacity, "the text is full");
        for chunk in tokens.chunks(self.stack.extent().seq) {
            self.stack.upload_tokens_at(chunk, chunk.len(), self.position)?;
            self.stack.set_position(self.position);
            let engine = self.stack.engine();
            if chunk.len() == 1 {
                let next = self.next.take().unwrap_or_else(|| self.prepare(1));
                engine.run(&next)?;
                self.next = Some(next);
            } else {
                engine.run(&self.prepare(chunk.len()))?;
            }
            self.position += chunk.len();
        }
        Ok(self.logits.download(self.stack.engine()).await?)
    }

    fn prepare(&self, rows: usize) -> Prepared {
        let mut recording = self.stack.engine().recording();
        self.stack
            .record_blocks_cached(&mut recording, rows, &self.caches, self.capacity);
        self.stack
            .record_logits(&mut recording, rows - 1, (&self.last, &self.logits));
        self.stack.engine().prepare(recording)
    }
}
