//! What a training on one device goes on from, as bytes.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `train` and the version of this form, 1, with zeros between |
//! | 9 × 8 | steps taken; epoch and position of the cursor; tokens; seconds and last loss, as the bits of f64; bytes of `metrics.jsonl`, lines that are missing in it, and of these since its last line |
//! | 8 | n: values of the adapter |
//! | 3 × 4 n | the adapter, its first and its second moments, f32 |
//!
//! All is little-endian. Order of the data and schedule follow from the run's options and these counters.

use crate::data::Cursor;
use crate::server::metrics::Position;
use crate::terms::moments::Moments;

const MAGIC: [u8; 8] = *b"train\0\0\x01";
const WORDS: usize = 10;
const HEADER: usize = 8 + 8 * WORDS;

/// A run between two steps.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub cursor: Cursor,
    pub tokens: u64,
    /// Spent on steps.
    pub seconds: f64,
    /// Of the last step; NaN before the first.
    pub loss: f64,
    pub metrics: Position,
    /// The adapter, flat.
    pub values: Vec<f32>,
    /// Of the adapter's values, after all steps taken.
    pub moments: Moments,
}

/// Bytes are no [`State`] of this run.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    #[error("it is no state of `sflllm train` that this version reads")]
    Form,
    #[error("its state is of an adapter of {found} values, and the run's has {expected}")]
    Length { found: u64, expected: usize },
}

impl State {
    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.moments.steps
    }

    pub fn encode(&self) -> Vec<u8> {
        let words: [u64; WORDS] = [
            self.steps(),
            self.cursor.epoch,
            self.cursor.position,
            self.tokens,
            self.seconds.to_bits(),
            self.loss.to_bits(),
            self.metrics.bytes,
            self.metrics.lost,
            self.metrics.missing,
            self.values.len() as u64,
        ];
        let arrays = [&self.values, &self.moments.first, &self.moments.second];
        let mut bytes = Vec::with_capacity(HEADER + 12 * self.values.len());
        bytes.extend(MAGIC);
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        for array in arrays {
            bytes.extend(array.iter().flat_map(|value| value.to_le_bytes()));
        }
        bytes
    }

    /// The state of a run whose adapter has `len` values.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn decode(bytes: &[u8], len: usize) -> Result<Self, StateError> {
        let (header, arrays) = bytes.split_at_checked(HEADER).ok_or(StateError::Form)?;
        let (magic, words) = header.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(StateError::Form);
        }
        let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|byte| words[8 * index + byte]));
        let found = word(9);
        if found != len as u64 {
            return Err(StateError::Length { found, expected: len });
        }
        let (values, rest) = arrays.as_chunks::<4>();
        if values.len() / 3 != len || values.len() % 3 != 0 || !rest.is_empty() {
            return Err(StateError::Form);
        }
        let array = |index: usize| -> Vec<f32> {
            let values = &values[index * len..(index + 1) * len];
            values.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
        };
        Ok(Self {
            cursor: Cursor {
                epoch: word(1),
                position: word(2),
            },
            tokens: word(3),
            seconds: f64::from_bits(word(4)),
            loss: f64::from_bits(word(5)),
            metrics: Position {
                bytes: word(6),
                lost: word(7),
                missing: word(8),
            },
            values: array(0),
            moments: Moments {
                steps: word(0),
                first: array(1),
                second: array(2),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            cursor: Cursor { epoch: 3, position: 17 },
            tokens: 12345,
            seconds: 0.1 + 0.2,
            loss: 1.0 / 3.0,
            metrics: Position {
                bytes: 991,
                lost: 4,
                missing: 2,
            },
            values: vec![1.5, -0.0, f32::MIN_POSITIVE],
            moments: Moments {
                steps: 40,
                first: vec![0.1, 0.2, 0.3],
                second: vec![1e-30, 0.0, 2.0],
            },
        }
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let bytes = state().encode();
        assert_eq!(State::decode(&bytes, 3).unwrap(), state());
        assert_eq!(State::decode(&bytes, 3).unwrap().encode(), bytes, "bit by bit");
    }

    #[test]
    fn bytes_that_are_no_state_of_the_run_are_refused() {
        let bytes = state().encode();
        for length in 0..bytes.len() {
            assert_eq!(State::decode(&bytes[..length], 3), Err(StateError::Form), "{length}");
        }
        assert_eq!(
            State::decode(&[&bytes[..], &[0; 12]].concat(), 3),
            Err(StateError::Form)
        );
        let other = State::decode(&bytes, 4).unwrap_err().to_string();
        assert!(
            other.contains("adapter of 3 values") && other.contains("has 4"),
            "{other}"
        );
        let mut serve = bytes.clone();
        serve[0] = b's';
        assert_eq!(State::decode(&serve, 3), Err(StateError::Form));
    }
}
