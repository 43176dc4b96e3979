//! The shape of an adapter's matrices, for those who know nothing of models: who aggregates adapters, cuts one to a smaller rank or
//! checks a length.
//!
//! A flat adapter is a row of blocks, each with the same matrices in the same order, A (rank, inputs) and then B (outputs, rank), row
//! major. An adapter of a smaller rank is the first rows of every A and the first columns of every B.

use super::words;

/// Which of an adapter's matrices are trained, averaged and sent. The others are what the run's seed makes them, on every device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Trained {
    /// A and B.
    #[default]
    Both,
    /// A is frozen (FFA-LoRA, arXiv 2403.12313).
    B,
}

words!(Trained {
    Both = "both",
    B = "b",
});

/// The sides of one adapted matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixShape {
    /// Columns of A.
    pub inputs: u32,
    /// Rows of B.
    pub outputs: u32,
}

/// The matrices of every block of an adapter. Products and sums of these sizes fit in 64 bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterShape {
    rank: usize,
    trained: Trained,
    matrices: Vec<MatrixShape>,
}

/// Where one matrix lies in a flat adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixPlace {
    /// Of which block.
    pub block: usize,
    /// Columns of A.
    pub inputs: usize,
    /// Rows of B.
    pub outputs: usize,
    /// Rows of A and columns of B.
    pub rank: usize,
    /// Start of A; where A is not in the adapter, the same as that of B.
    pub a: usize,
    /// Start of B.
    pub b: usize,
}

impl AdapterShape {
    const MOST_MATRICES: usize = 64;
    const MOST_RANK: usize = 1 << 14;
    const MOST_SIDE: u32 = 1 << 24;
    /// Values of one block.
    const MOST_VALUES: u64 = 1 << 29;

    /// `None` without a matrix, for a rank or a side of zero, and for what no adapter has.
    pub fn new(rank: usize, trained: Trained, matrices: Vec<MatrixShape>) -> Option<Self> {
        let possible = |side: u32| (1..=Self::MOST_SIDE).contains(&side);
        let fits = (1..=Self::MOST_RANK).contains(&rank)
            && (1..=Self::MOST_MATRICES).contains(&matrices.len())
            && matrices
                .iter()
                .all(|matrix| possible(matrix.inputs) && possible(matrix.outputs));
        let shape = Self {
            rank,
            trained,
            matrices,
        };
        // Below 2^45, checked or not.
        let values: u64 = if fits {
            let sides = shape
                .matrices
                .iter()
                .map(|matrix| u64::from(matrix.inputs) + u64::from(matrix.outputs));
            rank as u64 * sides.sum::<u64>()
        } else {
            0
        };
        (1..=Self::MOST_VALUES).contains(&values).then_some(shape)
    }

    /// Of the run.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Which matrices are trained.
    pub fn trained(&self) -> Trained {
        self.trained
    }

    /// Of every block, in their order.
    pub fn matrices(&self) -> &[MatrixShape] {
        &self.matrices
    }

    /// The shape of an adapter of these matrices with a smaller rank; `None` for a rank of 0 or above this one's.
    pub fn with_rank(&self, rank: usize) -> Option<Self> {
        let shape = Self { rank, ..self.clone() };
        (1..=self.rank).contains(&rank).then_some(shape)
    }

    /// Values of one block in an adapter of this rank.
    pub fn block_len(&self, rank: usize) -> usize {
        let values = |matrix: &MatrixShape| match self.trained {
            Trained::Both => matrix.inputs as usize + matrix.outputs as usize,
            Trained::B => matrix.outputs as usize,
        };
        rank * self.matrices.iter().map(values).sum::<usize>()
    }

    /// Values of so many blocks in an adapter of this rank.
    pub fn len(&self, blocks: usize, rank: usize) -> usize {
        self.block_len(rank).saturating_mul(blocks)
    }

    /// Blocks of an adapter of this rank and so many values; `None` when they are no whole number.
    pub fn blocks(&self, len: usize, rank: usize) -> Option<usize> {
        let block = self.block_len(rank);
        (block > 0 && len.is_multiple_of(block)).then(|| len / block)
    }

    /// The matrices of blocks `0..blocks` in an adapter of this rank, in order.
    pub fn places(&self, blocks: usize, rank: usize) -> impl Iterator<Item = MatrixPlace> + '_ {
        let mut at = 0;
        (0..blocks)
            .flat_map(move |block| self.matrices.iter().map(move |matrix| (block, matrix)))
            .map(move |(block, matrix)| {
                let (inputs, outputs) = (matrix.inputs as usize, matrix.outputs as usize);
                let a = at;
                let b = match self.trained {
                    Trained::Both => a + rank * inputs,
                    Trained::B => a,
                };
                at = b + rank * outputs;
                MatrixPlace {
                    block,
                    inputs,
                    outputs,
                    rank,
                    a,
                    b,
                }
            })
    }

    /// What a device with `blocks` blocks and a smaller rank has of `values`, an adapter of the whole rank. Where there are too few
    /// values, those that there are.
    pub fn narrow(&self, values: &[f32], blocks: usize, rank: usize) -> Vec<f32> {
        if rank >= self.rank {
            return values.get(..self.len(blocks, self.rank)).unwrap_or(values).to_vec();
        }
        let mut narrow = Vec::with_capacity(self.len(blocks, rank));
        for place in self.places(blocks, self.rank) {
            if self.trained == Trained::Both {
                let a = place.a..place.a + rank * place.inputs;
                narrow.extend_from_slice(values.get(a).unwrap_or_default());
            }
            let b = place.b..place.b + self.rank * place.outputs;
            for row in values.get(b).unwrap_or_default().chunks_exact(self.rank) {
                narrow.extend_from_slice(&row[..rank]);
            }
        }
        narrow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(rank: usize, trained: Trained) -> AdapterShape {
        let matrix = |inputs, outputs| MatrixShape { inputs, outputs };
        AdapterShape::new(rank, trained, vec![matrix(3, 2), matrix(1, 4)]).unwrap()
    }

    #[test]
    fn a_smaller_rank_has_the_first_rows_of_a_and_the_first_columns_of_b() {
        let whole = shape(2, Trained::Both);
        let values: Vec<f32> = (0..whole.len(2, 2)).map(|index| index as f32).collect();
        // Block 0: A of two rows of three, B of two rows of two; A of two rows of one, B of four rows of two.
        let first = [0.0, 1.0, 2.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0];
        let second: Vec<f32> = first.iter().map(|value| value + whole.block_len(2) as f32).collect();
        assert_eq!(whole.narrow(&values, 2, 1), [&first[..], &second].concat());
        assert_eq!(whole.narrow(&values, 1, 1), first);
        assert_eq!(whole.narrow(&values, 1, 2), values[..20]);
        let of_b = shape(2, Trained::B);
        let values: Vec<f32> = (0..of_b.len(1, 2)).map(|index| index as f32).collect();
        assert_eq!(of_b.narrow(&values, 1, 1), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!((of_b.blocks(24, 2), of_b.blocks(25, 2)), (Some(2), None));
    }

    #[test]
    fn what_no_adapter_has_is_no_shape() {
        let side = |inputs| vec![MatrixShape { inputs, outputs: 1 }];
        assert!(AdapterShape::new(0, Trained::Both, side(1)).is_none());
        assert!(AdapterShape::new(1, Trained::Both, Vec::new()).is_none());
        assert!(AdapterShape::new(1, Trained::Both, side(0)).is_none());
        assert!(AdapterShape::new(1, Trained::Both, side(u32::MAX)).is_none());
        assert!(AdapterShape::new(1 << 14, Trained::Both, side(1 << 24)).is_none());
        assert!(AdapterShape::new(usize::MAX, Trained::Both, side(1)).is_none());
        assert!(AdapterShape::new(1, Trained::B, side(1)).is_some());
    }
}
