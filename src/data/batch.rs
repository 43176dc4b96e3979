//! Batches of a fixed shape from examples of many lengths: padding, targets, shuffling and the data cursor.
//!
//! It is separate from the readers because a batch knows nothing of text, and because its order must be the
//! same on every platform: a run that is stopped, or moved to a browser, goes on with the very next example.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::{DataError, Example};
use crate::terms::tensor::IGNORED_TARGET;

/// Sequence lengths are rounded up to a multiple of this, so that few shapes need preparing.
pub(crate) const LENGTH_BUCKET: usize = 16;

/// One step's input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Rows, always the requested number: rows without an example have only ignored targets.
    pub batch: usize,
    /// Positions of a row: the longest example's, rounded up to a bucket.
    pub seq: usize,
    /// Token ids, padded with 0. Shape (batch, seq), row major.
    pub tokens: Vec<u32>,
    /// The label of the position after each token, -100 where there is none to learn. Shape (batch, seq).
    pub targets: Vec<i32>,
    /// Targets that are not -100: what the loss is averaged over.
    pub target_count: usize,
    /// Rows that hold an example.
    pub examples: usize,
}

impl Batch {
    /// Lays out at most `batch` examples, each cut to at most `seq` positions.
    ///
    /// An example of n tokens needs n-1 positions, and none after its last target: attention is causal,
    /// so positions without a later target change nothing and are trimmed.
    fn new<'a>(examples: impl ExactSizeIterator<Item = &'a Example> + Clone, batch: usize, seq: usize) -> Self {
        let filled = examples.len();
        let longest = examples
            .clone()
            .map(|example| positions(example).min(seq))
            .max()
            .unwrap_or(0);
        let row = longest.max(1).next_multiple_of(LENGTH_BUCKET).min(seq);
        let mut tokens = vec![0; batch * row]; // (batch, seq)
        let mut targets = vec![IGNORED_TARGET; batch * row]; // (batch, seq)
        let mut target_count = 0;
        for (index, example) in examples.enumerate() {
            let length = positions(example).min(row);
            let at = index * row;
            tokens[at..at + length].copy_from_slice(&example.ids[..length]);
            targets[at..at + length].copy_from_slice(&example.labels[1..=length]);
            target_count += example.labels[1..=length]
                .iter()
                .filter(|&&label| label != IGNORED_TARGET)
                .count();
        }
        Self {
            batch,
            seq: row,
            tokens,
            targets,
            target_count,
            examples: filled,
        }
    }
}

/// Input positions up to the last one with a target.
fn positions(example: &Example) -> usize {
    let labels = &example.labels[..example.labels.len().min(example.ids.len())];
    labels.iter().rposition(|&label| label != IGNORED_TARGET).unwrap_or(0)
}

/// Where the next batch starts; saved with a run and restored by [`Batches::restore`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Completed passes over the examples.
    pub epoch: u64,
    /// Examples of this epoch already given out.
    pub position: u64,
}

/// An endless sequence of batches: every epoch visits each example once, the last batch of an epoch may be partial.
#[derive(Clone, Debug)]
pub struct Batches {
    examples: Vec<Example>,
    batch: usize,
    seq: usize,
    seed: Option<u64>,
    cursor: Cursor,
    order: Vec<u32>,
}

impl Batches {
    /// `shuffle` is the seed of the order, which differs in every epoch; `None` keeps the file's order.
    ///
    /// # Errors
    /// [`DataError::NoExamples`] without an example, [`DataError::Option`] for a zero `batch` or `seq`.
    pub fn new(examples: Vec<Example>, batch: usize, seq: usize, shuffle: Option<u64>) -> Result<Self, DataError> {
        check_shape(batch, seq)?;
        if examples.is_empty() {
            return Err(DataError::NoExamples {
                name: "the data".to_owned(),
                why: None,
            });
        }
        let order = epoch_order(examples.len(), shuffle, 0);
        Ok(Self {
            examples,
            batch,
            seq,
            seed: shuffle,
            cursor: Cursor::default(),
            order,
        })
    }

    /// The next batch; after the last one of an epoch the next epoch begins.
    pub fn next_batch(&mut self) -> Batch {
        let start = self.cursor.position as usize;
        let end = (start + self.batch).min(self.order.len());
        let rows = self.order[start..end]
            .iter()
            .map(|&index| &self.examples[index as usize]);
        let batch = Batch::new(rows, self.batch, self.seq);
        self.cursor.position = end as u64;
        if end == self.order.len() {
            self.cursor = Cursor {
                epoch: self.cursor.epoch + 1,
                position: 0,
            };
            self.order = epoch_order(self.examples.len(), self.seed, self.cursor.epoch);
        }
        batch
    }

    /// Where the next batch starts.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Goes on from a saved cursor.
    ///
    /// # Errors
    /// [`DataError::Cursor`] when it points past the end of these examples.
    pub fn restore(&mut self, cursor: Cursor) -> Result<(), DataError> {
        if cursor.position >= self.examples.len() as u64 || cursor.epoch == u64::MAX {
            return Err(DataError::Cursor {
                position: cursor.position,
                examples: self.examples.len(),
            });
        }
        self.order = epoch_order(self.examples.len(), self.seed, cursor.epoch);
        self.cursor = cursor;
        Ok(())
    }

    /// The examples behind the batches, in the file's order.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// Gives the examples back.
    pub(crate) fn into_examples(self) -> Vec<Example> {
        self.examples
    }
}

/// One pass over `examples` in their order, for evaluation; the last batch may be partial.
///
/// # Errors
/// [`DataError::Option`] for a zero `batch` or `seq`.
pub fn pass(examples: &[Example], batch: usize, seq: usize) -> Result<impl ExactSizeIterator<Item = Batch>, DataError> {
    check_shape(batch, seq)?;
    Ok(examples
        .chunks(batch)
        .map(move |rows| Batch::new(rows.iter(), batch, seq)))
}

fn check_shape(batch: usize, seq: usize) -> Result<(), DataError> {
    for (option, value) in [("--batch", batch), ("--seq", seq)] {
        if value == 0 {
            return Err(DataError::Option {
                option,
                reason: "must be at least 1".to_owned(),
            });
        }
    }
    Ok(())
}

/// Fisher-Yates from a stream per epoch. Written out because the shuffles of `rand` may draw differently for
/// 32-bit and 64-bit `usize`, and between its versions.
fn epoch_order(examples: usize, seed: Option<u64>, epoch: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..examples as u32).collect();
    if let Some(seed) = seed {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch);
        for last in (1..order.len()).rev() {
            let choices = last as u64 + 1;
            // Multiply-shift of 64 random bits: the bias is below 2^-32 for any u32 count.
            let pick = ((u128::from(rng.next_u64()) * u128::from(choices)) >> 64) as usize;
            order.swap(last, pick);
        }
    }
    order
}
