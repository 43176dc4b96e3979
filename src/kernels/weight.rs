//! A frozen matrix on a device, as kernels take it: a range of the rows of a buffer in one of the formats of
//! [`Format`], and which way round it is stored. `shaders/weight.wgsl` reads it on devices.

use std::ops::Range;

use crate::compute::Buffer;
use crate::compute::host::weight::Stored;
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

    /// The word of the buffer at which the scales of a quantised format begin; 0 for the others.
    pub fn scales_at(&self) -> usize {
        if self.format.is_quantised() {
            self.format.layout(self.stored_rows, self.columns).scales_at()
        } else {
            0
        }
    }

    /// Bytes of its values and scales.
    pub fn bytes(&self) -> f64 {
        4.0 * self.format.words(self.rows, self.columns) as f64
    }

    /// Some of its rows, on the same buffer.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    pub fn row_range(&self, rows: Range<usize>) -> Self {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?} of {self:?}"
        );
        Self {
            first_row: self.first_row + rows.start,
            rows: rows.len(),
            ..self.clone()
        }
    }
}

/// The number by which params and `W_FORMAT` of `shaders/weight.wgsl` name a format.
pub(super) fn code(format: Format) -> u32 {
    match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q8 => 2,
        Format::Q4 => 3,
    }
}

/// The matrix that params describe: the format by its [`code`], `columns` values a row, scales from word `scales_at` on.
pub(super) fn stored(words: &[u32], format: u32, columns: u32, scales_at: u32) -> Stored<'_> {
    let format = match format {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Q8,
        3 => Format::Q4,
        _ => panic!("{format} is the code of no weight format"),
    };
    Stored {
        words,
        format,
        columns: columns as usize,
        scales_at: scales_at as usize,
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
