//! The tensors of a model with an adapter in its weights: W + s·B·A, one tensor at a time.
//!
//! It is separate from the files that are written because their orders and orientations differ and the sum does not.

use std::ops::Range;

use rayon::prelude::*;

use crate::model::adapter::{Adapter, AdapterEntry, Target};
use crate::model::unit::Unit;
use crate::model::weights::{Weights, WeightsError};

/// Values handed out at a time, if a row is not longer.
const CHUNK: usize = 1 << 20;

/// A model, and the adapter to be put into it, if there is one.
#[derive(Clone, Copy, Debug)]
pub struct Merged<'a> {
    pub weights: &'a Weights,
    /// Of this model.
    pub adapter: Option<&'a Adapter>,
}

/// A tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub unit: Unit,
    /// Its name in the unit.
    pub tensor: &'static str,
    /// (rows, columns) or (length), as [`Weights`] has it.
    pub shape: Vec<usize>,
    /// Which projection it is the matrix of.
    pub target: Option<Target>,
}

/// How a part is handed out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arrangement {
    /// Projections are (outputs, inputs), else (inputs, outputs).
    pub transposed: bool,
    /// For every row that is handed out, which it is; `None` for the order they have.
    pub rows: Option<Vec<usize>>,
}

impl Merged<'_> {
    /// All tensors, in the order of the forward pass.
    pub fn parts(&self) -> Vec<Part> {
        let model = self.weights.model();
        let targets = model.targets();
        let of_unit = |unit: Unit| {
            unit.tensors(model).into_iter().map(move |(tensor, shape)| Part {
                unit,
                tensor,
                shape,
                target: match unit {
                    Unit::Block(_) => targets.iter().copied().find(|target| target.weight() == tensor),
                    Unit::Embedding | Unit::Final => None,
                },
            })
        };
        Unit::all(model).flat_map(of_unit).collect()
    }

    /// The shape of a part in a form.
    pub fn shape(&self, part: &Part, form: &Arrangement) -> Vec<usize> {
        let mut shape = part.shape.clone();
        if part.target.is_some() && form.transposed != self.weights.model().transposed {
            shape.reverse();
        }
        shape
    }

    /// Hands the values of a part to `consume`, some whole rows at a time; a vector is one row.
    ///
    /// # Errors
    /// Those of the weights and of `consume`.
    pub fn for_each_rows<E: From<WeightsError>>(
        &self,
        part: &Part,
        form: &Arrangement,
        mut consume: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let columns = self.shape(part, form).last().copied().unwrap_or(1).max(1);
        let rows = part.shape.iter().product::<usize>() / columns;
        let at_a_time = (CHUNK / columns).max(1);
        let pieces = (0..rows)
            .step_by(at_a_time)
            .map(|start| start..rows.min(start + at_a_time));
        let Some(target) = part.target else {
            for piece in pieces {
                consume(&self.weights.rows(part.unit, part.tensor, &part.shape, piece)?)?;
            }
            return Ok(());
        };
        let values = self.projection(part, target, form.transposed)?;
        match &form.rows {
            None => values.chunks(columns * at_a_time).try_for_each(consume),
            Some(order) => {
                let row = |row: usize| &values[row * columns..][..columns];
                pieces
                    .map(|piece: Range<usize>| order[piece].iter().flat_map(|&index| row(index)).copied())
                    .try_for_each(|values| consume(&values.collect::<Vec<f32>>()))
            }
        }
    }

    /// A projection's whole matrix.
    fn projection(&self, part: &Part, target: Target, transposed: bool) -> Result<Vec<f32>, WeightsError> {
        let stored = self.weights.model().transposed;
        let (rows, columns) = (part.shape[0], part.shape[1]);
        let mut values = self.weights.rows(part.unit, part.tensor, &part.shape, 0..rows)?;
        if let (Some(adapter), Unit::Block(block)) = (self.adapter, part.unit)
            && let Some(entry) = adapter.layout.entry(block, target)
        {
            add(entry, &adapter.values, stored, &mut values);
        }
        Ok(match stored == transposed {
            true => values,
            false => transpose(&values, rows, columns),
        })
    }
}

/// Adds s·B·A to a matrix, (outputs, inputs) if `transposed`, else (inputs, outputs). Sums are in f64, so that one rounding is left.
fn add(entry: &AdapterEntry, values: &[f32], transposed: bool, matrix: &mut [f32]) {
    let (rank, scale) = (entry.rank, f64::from(entry.scale));
    let (a, b) = (&values[entry.range_a()], &values[entry.range_b()]);
    // (rows, rank) · (rank, columns)
    let (left, right, columns) = match transposed {
        true => (b.to_vec(), a.to_vec(), entry.inputs),
        false => (
            transpose(a, rank, entry.inputs),
            transpose(b, entry.outputs, rank),
            entry.outputs,
        ),
    };
    matrix.par_chunks_mut(columns).zip(left.par_chunks(rank)).for_each_init(
        || vec![0.0f64; columns],
        |sums, (row, left)| {
            sums.fill(0.0);
            for (&left, right) in left.iter().zip(right.chunks(columns)) {
                let left = scale * f64::from(left);
                for (sum, &right) in sums.iter_mut().zip(right) {
                    *sum += left * f64::from(right);
                }
            }
            for (value, sum) in row.iter_mut().zip(sums) {
                *value = (f64::from(*value) + *sum) as f32;
            }
        },
    );
}

/// A matrix of `rows` with its axes exchanged.
fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut transposed = vec![0.0; values.len()];
    transposed
        .par_chunks_mut(rows)
        .enumerate()
        .for_each(|(column, values_of)| {
            for (row, value) in values_of.iter_mut().enumerate() {
                *value = values[row * columns + column];
            }
        });
    transposed
}
