//! The input end: token embedding and, where positions are learned, theirs, on the host. A step needs as many rows as it has
//! tokens, of a table that is a fifth of a small model; so rows are gathered where the table is kept and only they are uploaded.

use std::fmt;
use std::sync::Arc;

use crate::model::architecture::Architecture;
use crate::model::thread::{MaybeSend, MaybeSync};
use crate::model::unit::UnitData;
use crate::model::weights::WeightsError;
use crate::terms::format::Packed;

/// Rows of a matrix that are read where they are kept.
pub trait RowSource: fmt::Debug + MaybeSend + MaybeSync {
    /// Fills `values` with row `row`.
    ///
    /// # Errors
    /// [`WeightsError`] when it cannot be read.
    fn read(&self, row: usize, values: &mut [f32]) -> Result<(), WeightsError>;
}

/// The rows of a matrix.
#[derive(Clone, Debug)]
pub enum Rows {
    /// In memory.
    Held(Arc<Packed>),
    /// In a file.
    Stored(Arc<dyn RowSource>),
}

impl Rows {
    fn read(&self, row: usize, values: &mut [f32]) -> Result<(), WeightsError> {
        match self {
            Rows::Held(packed) => {
                packed.layout().decode_row(packed.words(), row, values);
                Ok(())
            }
            Rows::Stored(source) => source.read(row, values),
        }
    }
}

/// The token embedding (vocab, width) and the learned positions (positions, width); clones share them.
#[derive(Clone, Debug)]
pub struct Embedding {
    tokens: Rows,
    positions: Option<Rows>,
    width: usize,
}

impl Embedding {
    /// `rows` of the tensors of [`Unit::Embedding`](crate::model::unit::Unit::Embedding), in their order.
    ///
    /// # Panics
    /// If they are not as many as the model has.
    pub fn new(model: &Architecture, rows: Vec<Rows>) -> Self {
        let mut rows = rows.into_iter();
        let embedding = Self {
            tokens: rows.next().expect("a token embedding"),
            positions: rows.next(),
            width: model.width,
        };
        assert_eq!(
            embedding.positions.is_some(),
            model.rotary.is_none(),
            "learned positions"
        );
        embedding
    }

    /// The embedding of a unit, which it keeps.
    ///
    /// # Panics
    /// If the unit is another: units are checked where they are read.
    pub fn held(model: &Architecture, unit: UnitData) -> Self {
        let rows = unit.tensors.into_iter().map(|tensor| {
            let layout = tensor.layout();
            let packed = Packed::new(layout, tensor.words).expect("units are checked where they are read");
            Rows::Held(Arc::new(packed))
        });
        Self::new(model, rows.collect())
    }

    /// The rows of `tokens`, (tokens, width), in f32: sequences of `seq` tokens whose first is at `position`.
    ///
    /// # Errors
    /// [`WeightsError`] when the file cannot be read.
    pub fn gather(&self, tokens: &[u32], seq: usize, position: usize) -> Result<Vec<f32>, WeightsError> {
        let width = self.width;
        let mut values = vec![0.0; tokens.len() * width];
        let mut learned = vec![0.0; if self.positions.is_some() { width } else { 0 }];
        for (i, (row, &token)) in values.chunks_exact_mut(width).zip(tokens).enumerate() {
            self.tokens.read(token as usize, row)?;
            if let Some(positions) = &self.positions {
                positions.read(position + i % seq, &mut learned)?;
                row.iter_mut().zip(&learned).for_each(|(value, p)| *value += p);
            }
        }
        Ok(values)
    }
}
