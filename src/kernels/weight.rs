//! A frozen matrix on a device, as kernels take it: a range of the rows of a buffer in one of the formats of
//! [`Format`](crate::terms::format::Format), and which way round it is stored. `shaders/weight.wgsl` reads it on devices.

use std::ops::Range;

use crate::compute::Buffer;
use crate::terms::format::Format;

/// `rows` rows of `columns` values each, from row `first_row` on of a buffer that holds `stored_rows` of them.
#[derive(Clone, Debug)]
pub struct Weight {
    pub buffer: Buffer,
    pub format: Format,
    /// Rows of the whole buffer: where a planar format's scales begin.
    pub stored_rows: usize,
    pub first_row: usize,
    pub rows: usize,
    /// The contiguous axis.
    pub columns: usize,
    /// False: stored (inputs, outputs), as GPT-2's are. True: stored (outputs, inputs), as most models' are.
    pub transposed: bool,
}

impl Weight {
    /// Values of an input row of the linear map.
    pub fn inputs(&self) -> usize {
        if self.transposed { self.columns } else { self.rows }
    }

    /// Values of an output row of the linear map.
    pub fn outputs(&self) -> usize {
        if self.transposed { self.rows } else { self.columns }
    }

    /// Some of its rows, on the same buffer.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    pub fn row_range(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {self:?}");
        Self {
            first_row: self.first_row + rows.start,
            rows: rows.len(),
            ..self.clone()
        }
    }
}

/// Some columns of a row-major buffer: row `i` begins at element `first + i · stride`.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> {
    pub buffer: &'a Buffer,
    pub first: usize,
    pub stride: usize,
}

impl<'a> Columns<'a> {
    /// All columns of a buffer (rows, width).
    pub fn all(buffer: &'a Buffer, width: usize) -> Self {
        Self {
            buffer,
            first: 0,
            stride: width,
        }
    }
}
