//! Dense products on the CPU: a sum of products of matrices, whichever way round they are stored and in whichever format, through
//! packed panels that fit the caches and the vector registers. Several kernel families' host functions stand on it.
//!
//! The factors are copied into panels (Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", 2008), which
//! makes the transpositions, the strides and the weight formats one loop.

use super::simd::{Instructions, Simd, Vectorised};
use super::weight::Stored;

/// Elements of a matrix as they are stored.
#[derive(Clone, Copy)]
enum Values<'a> {
    F32 {
        values: &'a [f32],
        offset: usize,
        stride: usize,
    },
    Stored {
        stored: Stored<'a>,
        first_row: usize,
    },
}

/// One factor of a product. Its *lanes* are the product's rows (left factor) or columns (right factor); along its other axis,
/// the *inner* one, the product sums.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: Values<'a>,
    inner_contiguous: bool,
}

impl<'a> Matrix<'a> {
    /// A factor (lanes, inner), row-major from `offset` on, a row every `stride` elements.
    pub(crate) fn rows(values: &'a [f32], offset: usize, stride: usize) -> Self {
        Self {
            values: Values::F32 { values, offset, stride },
            inner_contiguous: true,
        }
    }

    /// A factor (inner, lanes), row-major from `offset` on, a row every `stride` elements.
    pub(crate) fn columns(values: &'a [f32], offset: usize, stride: usize) -> Self {
        Self {
            inner_contiguous: false,
            ..Self::rows(values, offset, stride)
        }
    }

    /// A factor whose rows are rows of a frozen matrix from `first_row` on: lanes if `inner_contiguous`, else inner elements.
    pub(crate) fn stored(stored: Stored<'a>, first_row: usize, inner_contiguous: bool) -> Self {
        Self {
            values: Values::Stored { stored, first_row },
            inner_contiguous,
        }
    }

    /// Copies consecutive elements of a row from column `first` on.
    #[inline(always)]
    fn read<I: Instructions>(&self, row: usize, first: usize, out: &mut [f32]) {
        match self.values {
            Values::F32 { values, offset, stride } => {
                out.copy_from_slice(&values[offset + row * stride + first..][..out.len()]);
            }
            Values::Stored { stored, first_row } => stored.read::<I>(first_row + row, first, out),
        }
    }

    /// Copies `panel.len() / LANES` inner elements from `first_inner` on of `lanes <= LANES` lanes from `first_lane` on to
    /// `panel` (inner, LANES), the lanes that do not exist as zeros.
    #[inline(always)]
    fn pack<I: Instructions, const LANES: usize>(
        &self,
        first_lane: usize,
        lanes: usize,
        first_inner: usize,
        panel: &mut [f32],
    ) {
        let inner = panel.len() / LANES;
        if self.inner_contiguous {
            let mut run = [0.0; INNER_BLOCK];
            if lanes < LANES {
                panel.fill(0.0);
            }
            for lane in 0..lanes {
                self.read::<I>(first_lane + lane, first_inner, &mut run[..inner]);
                for (row, &value) in panel.chunks_exact_mut(LANES).zip(&run) {
                    row[lane] = value;
                }
            }
        } else {
            for (i, row) in panel.chunks_exact_mut(LANES).enumerate() {
                let (filled, rest) = row.split_at_mut(lanes);
                self.read::<I>(first_inner + i, first_lane, filled);
                rest.fill(0.0);
            }
        }
    }
}

/// One product of a sum of products: `scale · left · right`.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) inner: usize,
    pub(crate) left: Matrix<'a>,
    pub(crate) right: Matrix<'a>,
    pub(crate) scale: f32,
}

/// Where a product goes: row `i` begins at element `first + i · stride`.
pub(crate) struct Target<'a> {
    pub(crate) values: &'a mut [f32],
    pub(crate) first: usize,
    pub(crate) stride: usize,
}

/// Inner elements that a panel holds: a panel of the right factor then stays in the first-level cache.
const INNER_BLOCK: usize = 256;

/// Most rows of a task: its panels of the left factor then stay in the second-level cache.
const BLOCK_ROWS: usize = 512;

/// Multiply-adds that are worth a task of their own.
const TASK: usize = 1 << 20;

/// `out (rows, columns) += Σ terms`, where `before` runs on every row of `out` first and `after` last; both may be given a row
/// in parts. Every element is summed in the same order whatever the number of threads.
pub(crate) fn add_products(
    rows: usize,
    columns: usize,
    terms: &[Term<'_>],
    out: &mut [f32],
    before: impl Fn(usize, &mut [f32]) + Sync,
    after: impl Fn(usize, &mut [f32]) + Sync,
) {
    let target = Target {
        values: out,
        first: 0,
        stride: columns,
    };
    add_products_to(
        rows,
        columns,
        terms,
        target,
        |row, _, part| before(row, part),
        |row, _, part| after(row, part),
    );
}

/// `out (rows, columns) += Σ terms`, where `before(row, first column, values)` runs on parts that make up `out` first and
/// `after` last. Every element is summed in the same order whatever the number of threads.
pub(crate) fn add_products_to(
    rows: usize,
    columns: usize,
    terms: &[Term<'_>],
    out: Target<'_>,
    before: impl Fn(usize, usize, &mut [f32]) + Sync,
    after: impl Fn(usize, usize, &mut [f32]) + Sync,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    let simd = Simd::detect();
    let inner: usize = terms.iter().map(|term| term.inner).sum();
    let (block_rows, block_columns) = blocks(rows, columns, inner, simd);
    let column_blocks = columns.div_ceil(block_columns);
    let mut blocks: Vec<Block<'_>> = (0..rows.div_ceil(block_rows) * column_blocks)
        .map(|i| Block {
            first_row: i / column_blocks * block_rows,
            first_column: i % column_blocks * block_columns,
            rows: Vec::with_capacity(block_rows),
        })
        .collect();
    let out_rows = out.values[out.first..].chunks_mut(out.stride).take(rows);
    for (row, out) in out_rows.enumerate() {
        let parts = out[..columns].chunks_mut(block_columns);
        for (i, part) in parts.enumerate() {
            blocks[row / block_rows * column_blocks + i].rows.push(part);
        }
    }
    let compute = |mut block: Block<'_>| {
        for (i, row) in block.rows.iter_mut().enumerate() {
            before(block.first_row + i, block.first_column, row);
        }
        for &term in terms {
            simd.run(AddProduct {
                term,
                block: &mut block,
            });
        }
        for (i, row) in block.rows.iter_mut().enumerate() {
            after(block.first_row + i, block.first_column, row);
        }
    };
    #[cfg(not(target_arch = "wasm32"))]
    if blocks.len() > 1 {
        use rayon::prelude::*;
        return blocks.into_par_iter().for_each(compute);
    }
    blocks.into_iter().for_each(compute);
}

/// Rows and columns of a task: enough tasks for the machine, of sizes that copy as little of the factors into panels as can be.
fn blocks(rows: usize, columns: usize, inner: usize, simd: Simd) -> (usize, usize) {
    #[cfg(not(target_arch = "wasm32"))]
    let threads = rayon::current_num_threads();
    #[cfg(target_arch = "wasm32")]
    let threads = 1;
    let (tile_rows, tile_columns) = simd.tile();
    let most = if threads == 1 { 1 } else { 2 * threads };
    let wanted = (rows * columns * inner / TASK).clamp(1, most);
    let block = |size: usize, blocks: usize, tile: usize| size.div_ceil(blocks).next_multiple_of(tile);
    (rows.div_ceil(BLOCK_ROWS)..=wanted.max(rows.div_ceil(BLOCK_ROWS)))
        .map(|row_blocks| {
            let block_rows = block(rows, row_blocks, tile_rows);
            let block_columns = block(columns, wanted.div_ceil(row_blocks), tile_columns);
            let (row_blocks, column_blocks) = (rows.div_ceil(block_rows), columns.div_ceil(block_columns));
            let idle = wanted.min(threads).saturating_sub(row_blocks * column_blocks);
            let packed = row_blocks * columns + column_blocks * rows;
            ((idle, packed), (block_rows, block_columns))
        })
        .min_by_key(|&(cost, _)| cost)
        .map_or((rows, columns), |(_, block)| block)
}

/// A part of the product that one task computes.
struct Block<'a> {
    first_row: usize,
    first_column: usize,
    /// Of one length.
    rows: Vec<&'a mut [f32]>,
}

/// `block += term`.
struct AddProduct<'a, 'b, 'c> {
    term: Term<'a>,
    block: &'b mut Block<'c>,
}

impl Vectorised for AddProduct<'_, '_, '_> {
    #[inline(always)]
    fn run<I: Instructions, const ROWS: usize, const COLUMNS: usize>(self) {
        let Self { term, block } = self;
        let rows = block.rows.len();
        let columns = block.rows[0].len();
        let panels = rows.div_ceil(ROWS);
        let mut left = vec![0.0; panels * ROWS * INNER_BLOCK.min(term.inner)];
        let mut right = vec![0.0; COLUMNS * INNER_BLOCK.min(term.inner)];
        for first_inner in (0..term.inner).step_by(INNER_BLOCK) {
            let inner = INNER_BLOCK.min(term.inner - first_inner);
            let left = &mut left[..panels * ROWS * inner];
            let right = &mut right[..COLUMNS * inner];
            for (i, panel) in left.chunks_exact_mut(ROWS * inner).enumerate() {
                let lanes = ROWS.min(rows - i * ROWS);
                let first_lane = block.first_row + i * ROWS;
                term.left.pack::<I, ROWS>(first_lane, lanes, first_inner, panel);
            }
            if term.scale != 1.0 {
                left.iter_mut().for_each(|value| *value *= term.scale);
            }
            for column in (0..columns).step_by(COLUMNS) {
                let lanes = COLUMNS.min(columns - column);
                let first_lane = block.first_column + column;
                term.right.pack::<I, COLUMNS>(first_lane, lanes, first_inner, right);
                for (panel, out) in left.chunks_exact(ROWS * inner).zip(block.rows.chunks_mut(ROWS)) {
                    let sums = tile::<I, ROWS, COLUMNS>(panel, right);
                    for (out, sums) in out.iter_mut().zip(&sums) {
                        let out = &mut out[column..column + lanes];
                        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn tile<I: Instructions, const ROWS: usize, const COLUMNS: usize>(
    left: &[f32],  // (inner, ROWS)
    right: &[f32], // (inner, COLUMNS)
) -> [[f32; COLUMNS]; ROWS] {
    let mut sums = [[0.0f32; COLUMNS]; ROWS];
    for (left, right) in left.chunks_exact(ROWS).zip(right.chunks_exact(COLUMNS)) {
        for (sums, &left) in sums.iter_mut().zip(left) {
            for (sum, &right) in sums.iter_mut().zip(right) {
                *sum = I::multiply_add(left, right, *sum);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_is_exact_on_small_integers_with_every_instruction_set() {
        for (rows, columns, inner) in [(1, 1, 1), (13, 33, 257), (25, 70, 45)] {
            // Sums of products of integers up to 3 are exact in any order.
            let value = |i: usize| (i * 5 % 7) as f32 - 3.0;
            let left: Vec<f32> = (0..rows * inner).map(value).collect();
            let right: Vec<f32> = (0..columns * inner).map(value).collect();
            let mut expected = vec![1.0; rows * columns];
            for (i, expected) in expected.iter_mut().enumerate() {
                let (row, column) = (i / columns, i % columns);
                *expected += (0..inner)
                    .map(|k| 2.0 * left[row * inner + k] * right[column * inner + k])
                    .sum::<f32>();
            }
            for simd in Simd::available() {
                let term = Term {
                    inner,
                    left: Matrix::rows(&left, 0, inner),
                    right: Matrix::rows(&right, 0, inner),
                    scale: 2.0,
                };
                let mut out = vec![1.0; rows * columns];
                let mut block = Block {
                    first_row: 0,
                    first_column: 0,
                    rows: out.chunks_mut(columns).collect(),
                };
                simd.run(AddProduct {
                    term,
                    block: &mut block,
                });
                assert_eq!(out, expected, "{simd:?}, {rows}x{columns}x{inner}");
            }
        }
    }

    #[test]
    fn blocks_cover_the_product_in_few_tasks() {
        let simd = Simd::detect();
        for (rows, columns, inner) in [
            (1, 1, 1),
            (512, 8, 576),
            (512, 1536, 576),
            (512, 576, 49_152),
            (5_000, 70, 3),
        ] {
            let (block_rows, block_columns) = blocks(rows, columns, inner, simd);
            assert!(block_rows > 0 && block_columns > 0 && block_rows <= BLOCK_ROWS.next_multiple_of(simd.tile().0));
        }
    }
}
