//! Products of few rows with a frozen matrix on the CPU: a generated token's. Every weight is used once or a few times, so the
//! matrix is read in its own order, a run of a row at a time, and never copied into panels as [`product`](super::product) does.

use std::ops::Range;

use super::simd::{Instructions, Simd, Vectorised};
use super::weight::Stored;
use crate::compute::cpu::for_each_row;

/// Most rows that are computed this way.
pub(crate) const MOST_ROWS: usize = 4;

/// Weights decoded at a time.
const RUN: usize = 512;

/// Weights that are worth a task of their own.
const TASK: usize = 1 << 16;

/// Most tasks of a product whose tasks each have sums of all columns.
const MOST_PARTS: usize = 64;

/// A product of at most [`MOST_ROWS`] rows with some rows of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct FewRows<'a> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) inner: usize,
    /// (rows, inner): row `i` begins at element `first + i · stride`.
    pub(crate) x: &'a [f32],
    pub(crate) first: usize,
    pub(crate) stride: usize,
    pub(crate) matrix: Stored<'a>,
    /// The row of the matrix that the product's first is.
    pub(crate) first_row: usize,
    /// The matrix is (columns, inner), else (inner, columns).
    pub(crate) transposed: bool,
}

impl FewRows<'_> {
    /// Calls `store(row, column, value)` for every value of the product (rows, columns). Each is summed in the same order
    /// whatever the number of threads, which is why no size of a task depends on it.
    ///
    /// # Panics
    /// If there are more than [`MOST_ROWS`].
    pub(crate) fn compute(&self, store: impl FnMut(usize, usize, f32)) {
        match self.rows {
            0 => {}
            1 => self.compute_rows::<1>(store),
            2 => self.compute_rows::<2>(store),
            3 => self.compute_rows::<3>(store),
            MOST_ROWS => self.compute_rows::<MOST_ROWS>(store),
            rows => panic!("{rows} rows are no few rows"),
        }
    }

    fn compute_rows<const ROWS: usize>(&self, store: impl FnMut(usize, usize, f32)) {
        let product = Product::<ROWS> {
            rows: std::array::from_fn(|row| &self.x[self.first + row * self.stride..][..self.inner]),
            matrix: self.matrix,
            first_row: self.first_row,
        };
        if self.transposed {
            product.dot_products(self.columns, store);
        } else {
            product.scaled_rows(self.columns, store);
        }
    }
}

#[derive(Clone, Copy)]
struct Product<'a, const ROWS: usize> {
    rows: [&'a [f32]; ROWS], // (ROWS, inner)
    matrix: Stored<'a>,
    first_row: usize,
}

impl<const ROWS: usize> Product<'_, ROWS> {
    /// A task takes some columns, which are rows of the matrix.
    fn dot_products(&self, columns: usize, mut store: impl FnMut(usize, usize, f32)) {
        let simd = Simd::detect();
        let block = (TASK / self.rows[0].len().max(1)).max(1);
        // Blocks of columns one after the other, each (ROWS, its columns).
        let mut sums = vec![0.0; ROWS * columns];
        for_each_row(&mut sums, ROWS * block, |i, sums| {
            simd.run(DotProducts {
                product: self,
                first_column: i * block,
                sums,
            });
        });
        for (i, sums) in sums.chunks(ROWS * block).enumerate() {
            let columns = sums.len() / ROWS;
            for (at, &sum) in sums.iter().enumerate() {
                store(at / columns, i * block + at % columns, sum);
            }
        }
    }

    /// A task takes some of the inner elements, which are rows of the matrix, and has sums of its own.
    fn scaled_rows(&self, columns: usize, mut store: impl FnMut(usize, usize, f32)) {
        let simd = Simd::detect();
        let inner = self.rows[0].len();
        let part = (TASK / columns.max(1)).max(inner.div_ceil(MOST_PARTS)).max(1);
        let mut sums = vec![0.0; ROWS * columns * inner.div_ceil(part).max(1)];
        for_each_row(&mut sums, ROWS * columns, |i, sums| {
            simd.run(ScaledRows {
                product: self,
                inner: i * part..inner.min((i + 1) * part),
                sums,
            });
        });
        for at in 0..ROWS * columns {
            let parts = sums.iter().skip(at).step_by(ROWS * columns);
            store(at / columns, at % columns, parts.sum());
        }
    }
}

/// Some columns of a product with a transposed matrix: dot products with its rows.
struct DotProducts<'a, const ROWS: usize> {
    product: &'a Product<'a, ROWS>,
    first_column: usize,
    sums: &'a mut [f32], // (ROWS, columns)
}

impl<const ROWS: usize> Vectorised for DotProducts<'_, ROWS> {
    #[inline(always)]
    fn run<I: Instructions, const TILE_ROWS: usize, const LANES: usize>(self) {
        let Product {
            rows,
            matrix,
            first_row,
        } = *self.product;
        let inner = rows[0].len();
        let columns = self.sums.len() / ROWS;
        let mut run = [0.0; RUN];
        for column in 0..columns {
            let mut lanes = [[0.0f32; LANES]; ROWS];
            let mut rest = [0.0f32; ROWS];
            for first in (0..inner).step_by(RUN) {
                let run = &mut run[..RUN.min(inner - first)];
                matrix.read::<I>(first_row + self.first_column + column, first, run);
                let (run, run_rest) = run.as_chunks::<LANES>();
                for ((row, lanes), rest) in rows.iter().zip(&mut lanes).zip(&mut rest) {
                    let (row, row_rest) = row[first..inner.min(first + RUN)].as_chunks::<LANES>();
                    for (run, row) in run.iter().zip(row) {
                        for ((lane, &weight), &x) in lanes.iter_mut().zip(run).zip(row) {
                            *lane = I::multiply_add(weight, x, *lane);
                        }
                    }
                    for (&weight, &x) in run_rest.iter().zip(row_rest) {
                        *rest = I::multiply_add(weight, x, *rest);
                    }
                }
            }
            for ((row, lanes), rest) in lanes.iter().enumerate().zip(rest) {
                self.sums[row * columns + column] = I::sum(*lanes) + rest;
            }
        }
    }
}

/// Some inner elements' share of a product: the sum of rows of the matrix, each times a value of the factor.
struct ScaledRows<'a, const ROWS: usize> {
    product: &'a Product<'a, ROWS>,
    inner: Range<usize>,
    sums: &'a mut [f32], // (ROWS, columns), zeros
}

impl<const ROWS: usize> Vectorised for ScaledRows<'_, ROWS> {
    #[inline(always)]
    fn run<I: Instructions, const TILE_ROWS: usize, const LANES: usize>(self) {
        let Product {
            rows,
            matrix,
            first_row,
        } = *self.product;
        let columns = self.sums.len() / ROWS;
        let mut run = [0.0; RUN];
        for i in self.inner {
            for first in (0..columns).step_by(RUN) {
                let run = &mut run[..RUN.min(columns - first)];
                matrix.read::<I>(first_row + i, first, run);
                for (row, sums) in rows.iter().zip(self.sums.chunks_exact_mut(columns)) {
                    let x = row[i];
                    for (sum, &weight) in sums[first..].iter_mut().zip(run.iter()) {
                        *sum = I::multiply_add(x, weight, *sum);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terms::format::Format;

    #[test]
    fn few_rows_are_exact_on_small_integers_with_every_instruction_set() {
        for (columns, inner) in [(1, 1), (33, 70), (520, 1030)] {
            let value = |i: usize| (i * 5 % 7) as f32 - 3.0;
            let x: Vec<f32> = (0..2 * inner).map(value).collect();
            let matrix: Vec<f32> = (0..columns * inner).map(value).collect();
            let words: Vec<u32> = matrix.iter().map(|value| value.to_bits()).collect();
            for (simd, transposed) in Simd::available()
                .into_iter()
                .flat_map(|simd| [(simd, false), (simd, true)])
            {
                let at = |i: usize, column: usize| {
                    matrix[if transposed {
                        column * inner + i
                    } else {
                        i * columns + column
                    }]
                };
                let expected: Vec<f32> = (0..2 * columns)
                    .map(|at_| {
                        (0..inner)
                            .map(|i| x[at_ / columns * inner + i] * at(i, at_ % columns))
                            .sum()
                    })
                    .collect();
                let product = Product {
                    rows: [&x[..inner], &x[inner..]],
                    matrix: Stored {
                        words: &words,
                        format: Format::F32,
                        columns: if transposed { inner } else { columns },
                        scales_at: 0,
                    },
                    first_row: 0,
                };
                let mut sums = vec![0.0; 2 * columns];
                if transposed {
                    simd.run(DotProducts {
                        product: &product,
                        first_column: 0,
                        sums: &mut sums,
                    });
                } else {
                    simd.run(ScaledRows {
                        product: &product,
                        inner: 0..inner,
                        sums: &mut sums,
                    });
                }
                assert_eq!(sums, expected, "{simd:?}, {columns}x{inner}, transposed {transposed}");
            }
        }
    }
}
