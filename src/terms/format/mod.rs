//! The formats of frozen weight matrices: how many words a matrix takes, where its parts lie, encoding and decoding.
//!
//! A matrix is row major in an array of 32-bit words. `columns` is its contiguous axis, whatever that means to the
//! model: an In×Out matrix has Out columns and an Out×In matrix has In. Quantised formats cut every row into groups of
//! [`GROUP`] columns, the last of which may be short, and keep all codes before all scales ("planar"), so that four
//! neighbouring weights are always found in one place whichever product reads them:
//!
//! * `f32`: one value a word.
//! * `f16`: two halves a word over the whole matrix, the earlier in the low bits; an odd count is padded with a zero
//!   half.
//! * `q8`: four int8 codes a word, little endian, 8 words a group; then, from [`Layout::scales_at`], one f16 scale a
//!   group, two a word and padded as in `f16`. A weight is scale · code.
//! * `q4`: eight 4-bit codes a word, the first in the lowest bits, 4 words a group; then one word a group, an f16 scale
//!   low and an f16 minimum high. A weight is scale · code + minimum.
//!
//! Codes behind the end of a short group are zero. Scales times codes are exact in f32, so a fused multiply-add and a
//! multiplication before an addition give the same weight.
//!
//! It is separate from the model's weights because kernels, the engines, the files and the wire all read the same
//! layout.

mod encoder;
mod group;
mod packed;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

pub use encoder::Encoder;
pub use packed::Packed;

use half::f16;
use serde::{Deserialize, Serialize};

/// Columns that share a scale in [`Format::Q8`] and [`Format::Q4`].
pub const GROUP: usize = 32;
/// Words of codes a group takes in [`Format::Q8`].
pub(crate) const Q8_CODE_WORDS: usize = GROUP / 4;
/// Words of codes a group takes in [`Format::Q4`].
pub(crate) const Q4_CODE_WORDS: usize = GROUP / 8;

/// How a frozen matrix is held. Biases, norms, adapters and activations are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// 8-bit codes with a scale for every 32 columns.
    Q8,
    /// 4-bit codes with a scale and a minimum for every 32 columns.
    Q4,
}

/// Why values have no encoding, or words are none.
#[expect(missing_docs, reason = "the messages say it")]
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FormatError {
    #[error("`{found}` is no weight format: f32, f16, q8 and q4 are")]
    Name { found: String },
    #[error(
        "row {row}, column {column} holds {value}, which is beyond what {format} can hold: hold the weights as f32"
    )]
    Overflow {
        format: Format,
        row: usize,
        column: usize,
        value: f32,
    },
    #[error("row {row} holds a value that is not finite")]
    NotFinite { row: usize },
    #[error("a {rows}×{columns} matrix in {format} has {expected} {unit}, not {found}")]
    Length {
        format: Format,
        rows: usize,
        columns: usize,
        unit: &'static str,
        expected: usize,
        found: usize,
    },
    #[error("the padding of row {row} is not zero")]
    Padding { row: usize },
}

impl Format {
    /// Every format, the most precise first.
    pub const ALL: [Format; 4] = [Format::F32, Format::F16, Format::Q8, Format::Q4];

    /// As it is spelled in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::F16 => "f16",
            Format::Q8 => "q8",
            Format::Q4 => "q4",
        }
    }

    /// Bits a weight takes in rows of whole groups, scales included.
    pub fn bits_per_weight(self) -> f64 {
        match self {
            Format::F32 => 32.0,
            Format::F16 => 16.0,
            Format::Q8 => 8.5,
            Format::Q4 => 5.0,
        }
    }

    /// Whether columns are held in groups that share a scale.
    pub fn is_quantised(self) -> bool {
        matches!(self, Format::Q8 | Format::Q4)
    }

    /// The layout of a `rows`×`columns` matrix.
    pub fn layout(self, rows: usize, columns: usize) -> Layout {
        Layout {
            format: self,
            rows,
            columns,
        }
    }

    /// 32-bit words of the buffer of a `rows`×`columns` matrix; `usize::MAX` when they cannot be counted.
    pub fn words(self, rows: usize, columns: usize) -> usize {
        self.layout(rows, columns).words()
    }

    /// Encodes a row-major `rows`×`columns` matrix.
    ///
    /// # Errors
    /// [`FormatError::Overflow`] names the value that the format cannot hold; [`FormatError::NotFinite`];
    /// [`FormatError::Length`] when the count of values is not `rows · columns`.
    pub fn encode(self, values: &[f32], rows: usize, columns: usize) -> Result<Vec<u32>, FormatError> {
        self.layout(rows, columns).encode(values)
    }

    /// All values of a matrix, row major.
    ///
    /// # Panics
    /// When `words` is not as long as the layout says.
    pub fn decode(self, words: &[u32], rows: usize, columns: usize) -> Vec<f32> {
        self.layout(rows, columns).decode(words)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        Self::ALL
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| FormatError::Name {
                found: name.chars().take(80).collect(),
            })
    }
}

/// Where the values of a row-major matrix lie in its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Layout {
    /// How a value is held.
    pub format: Format,
    /// Rows of the matrix.
    pub rows: usize,
    /// Values of a row.
    pub columns: usize,
}

impl Layout {
    /// Number of values; `usize::MAX` when they cannot be counted.
    pub fn elements(&self) -> usize {
        self.rows.saturating_mul(self.columns)
    }

    /// Groups of a row, the short last one included.
    pub fn groups(&self) -> usize {
        self.columns.div_ceil(GROUP)
    }

    /// Words of codes of one group; formats without groups have none.
    pub(crate) fn group_words(&self) -> usize {
        match self.format {
            Format::F32 | Format::F16 => 0,
            Format::Q8 => Q8_CODE_WORDS,
            Format::Q4 => Q4_CODE_WORDS,
        }
    }

    /// The word at which the scales begin: all words of `f32` and `f16`, which have none.
    pub fn scales_at(&self) -> usize {
        match self.format {
            Format::F32 => self.elements(),
            Format::F16 => self.elements().div_ceil(2),
            Format::Q8 | Format::Q4 => self
                .rows
                .saturating_mul(self.groups())
                .saturating_mul(self.group_words()),
        }
    }

    /// Words of the whole matrix; `usize::MAX` when they cannot be counted.
    pub fn words(&self) -> usize {
        let groups = self.rows.saturating_mul(self.groups());
        self.scales_at().saturating_add(match self.format {
            Format::F32 | Format::F16 => 0,
            Format::Q8 => groups.div_ceil(2),
            Format::Q4 => groups,
        })
    }

    /// Columns of one group.
    fn group_length(&self, group: usize) -> usize {
        GROUP.min(self.columns - GROUP * group)
    }

    /// The part of the matrix to read for one row: that row and the other of its pair, since a row alone may begin within a word
    /// of halves.
    ///
    /// # Panics
    /// When the row does not exist.
    pub fn window(&self, row: usize) -> Window {
        assert!(row < self.rows, "row {row} of {self:?}");
        let first = row - row % 2;
        let before = self.format.layout(first, self.columns);
        let layout = self.format.layout(2.min(self.rows - first), self.columns);
        let (codes, scales) = (
            before.scales_at(),
            self.scales_at() + before.words() - before.scales_at(),
        );
        Window {
            layout,
            row: row - first,
            words: [
                codes..codes + layout.scales_at(),
                scales..scales + layout.words() - layout.scales_at(),
            ],
        }
    }

    /// Encodes all values, row major.
    ///
    /// # Errors
    /// As [`Format::encode`].
    pub fn encode(&self, values: &[f32]) -> Result<Vec<u32>, FormatError> {
        self.expect(self.elements(), values.len(), "values")?;
        let mut encoder = Encoder::new(*self);
        encoder.push(values)?;
        encoder.finish()
    }

    /// All values, row major.
    ///
    /// # Panics
    /// When `words` is not as long as the layout says.
    pub fn decode(&self, words: &[u32]) -> Vec<f32> {
        let mut values = vec![0.0; self.elements()];
        self.decode_rows(words, 0..self.rows, &mut values);
        values
    }

    /// The values of `rows`, row major, into `values` of `rows.len() · columns`.
    ///
    /// # Panics
    /// When `words` or `values` has another length, or the rows do not exist.
    pub(crate) fn decode_rows(&self, words: &[u32], rows: Range<usize>, values: &mut [f32]) {
        assert_eq!(words.len(), self.words(), "{self:?}");
        assert_eq!(values.len(), rows.len() * self.columns, "{self:?}, {rows:?}");
        if self.columns == 0 {
            return;
        }
        for (row, values) in rows.zip(values.chunks_exact_mut(self.columns)) {
            self.decode_row(words, row, values);
        }
    }

    /// The values of one row into `values` of `columns`.
    ///
    /// # Panics
    /// When `words` or `values` has another length, or the row does not exist.
    pub fn decode_row(&self, words: &[u32], row: usize, values: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {self:?}");
        assert_eq!(values.len(), self.columns, "{self:?}");
        match self.format {
            Format::F32 => {
                for (value, word) in values.iter_mut().zip(&words[row * self.columns..]) {
                    *value = f32::from_bits(*word);
                }
            }
            Format::F16 => {
                let first = row * self.columns;
                for (element, value) in (first..).zip(values) {
                    *value = half_at(words, element).to_f32();
                }
            }
            Format::Q8 | Format::Q4 => {
                let mut decoded = [0.0; GROUP];
                for (group, values) in values.chunks_mut(GROUP).enumerate() {
                    self.decode_group(words, row, group, &mut decoded);
                    values.copy_from_slice(&decoded[..values.len()]);
                }
            }
        }
    }

    /// Columns `32 · group` to `32 · group + 31` of a row; zero beyond the row's end.
    ///
    /// # Panics
    /// When the group does not exist or `words` is too short.
    #[inline]
    pub fn decode_group(&self, words: &[u32], row: usize, group: usize, values: &mut [f32; GROUP]) {
        assert!(
            row < self.rows && group < self.groups(),
            "group {row}, {group} of {self:?}"
        );
        let index = row * self.groups() + group;
        match self.format {
            Format::F32 => {
                let first = row * self.columns + group * GROUP;
                values.fill(0.0);
                let length = self.group_length(group);
                for (value, word) in values.iter_mut().zip(&words[first..first + length]) {
                    *value = f32::from_bits(*word);
                }
            }
            Format::F16 => {
                let first = row * self.columns + group * GROUP;
                values.fill(0.0);
                let length = self.group_length(group);
                for (element, value) in (first..).zip(&mut values[..length]) {
                    *value = half_at(words, element).to_f32();
                }
            }
            Format::Q8 => {
                let (scale, codes) = self.q8_group(words, index);
                let scale = scale.to_f32();
                for (values, word) in values.as_chunks_mut::<4>().0.iter_mut().zip(codes) {
                    *values = word.to_le_bytes().map(|code| scale * f32::from(code.cast_signed()));
                }
            }
            Format::Q4 => {
                let (scale, minimum, codes) = self.q4_group(words, index);
                let (scale, minimum) = (scale.to_f32(), minimum.to_f32());
                for (values, word) in values.as_chunks_mut::<8>().0.iter_mut().zip(codes) {
                    for (i, value) in values.iter_mut().enumerate() {
                        *value = scale * (word >> (4 * i) & 15) as f32 + minimum;
                    }
                }
                // A code of zero stands for the minimum, so a short group's rest has to be cleared.
                values[self.group_length(group)..].fill(0.0);
            }
        }
    }

    /// Scale and codes of a group of a `q8` matrix; `index` counts all groups, row · groups + group.
    ///
    /// # Panics
    /// When the group does not exist or `words` is too short.
    #[inline]
    pub(crate) fn q8_group(&self, words: &[u32], index: usize) -> (f16, [u32; Q8_CODE_WORDS]) {
        let mut codes = [0; Q8_CODE_WORDS];
        codes.copy_from_slice(&words[index * Q8_CODE_WORDS..][..Q8_CODE_WORDS]);
        (half_at(&words[self.scales_at()..], index), codes)
    }

    /// Scale, minimum and codes of a group of a `q4` matrix; `index` counts all groups, row · groups + group.
    ///
    /// # Panics
    /// When the group does not exist or `words` is too short.
    #[inline]
    pub(crate) fn q4_group(&self, words: &[u32], index: usize) -> (f16, f16, [u32; Q4_CODE_WORDS]) {
        let mut codes = [0; Q4_CODE_WORDS];
        codes.copy_from_slice(&words[index * Q4_CODE_WORDS..][..Q4_CODE_WORDS]);
        let pair = words[self.scales_at() + index];
        (f16::from_bits(pair as u16), f16::from_bits((pair >> 16) as u16), codes)
    }

    /// Compares the length of `words` with the layout's, and checks that every value is finite and every padding zero,
    /// as [`Layout::encode`] leaves them.
    ///
    /// # Errors
    /// [`FormatError`] names the row.
    pub fn check(&self, words: &[u32]) -> Result<(), FormatError> {
        self.expect(self.words(), words.len(), "words")?;
        let infinite = |bits: u32| bits & 0x7c00 == 0x7c00;
        let (codes, scales) = words.split_at(self.scales_at());
        let row_of = |element: usize| {
            element
                .checked_div(self.columns)
                .unwrap_or(0)
                .min(self.rows.saturating_sub(1))
        };
        match self.format {
            Format::F32 => {
                if let Some(element) = codes.iter().position(|&word| !f32::from_bits(word).is_finite()) {
                    return Err(FormatError::NotFinite { row: row_of(element) });
                }
            }
            Format::F16 => {
                if let Some(word) = codes.iter().position(|&word| infinite(word) || infinite(word >> 16)) {
                    let element = 2 * word + usize::from(!infinite(codes[word]));
                    return Err(FormatError::NotFinite { row: row_of(element) });
                }
                if self.elements() % 2 == 1 && codes[codes.len() - 1] >> 16 != 0 {
                    return Err(FormatError::Padding { row: self.rows - 1 });
                }
            }
            Format::Q8 | Format::Q4 => {
                let (bits, scales_per_word) = if self.format == Format::Q8 { (8, 2) } else { (4, 1) };
                if let Some(word) = scales.iter().position(|&word| infinite(word) || infinite(word >> 16)) {
                    let row = scales_per_word * word / self.groups();
                    return Err(FormatError::NotFinite { row });
                }
                let groups = self.rows * self.groups();
                if !groups.is_multiple_of(scales_per_word) && scales[scales.len() - 1] >> 16 != 0 {
                    return Err(FormatError::Padding { row: self.rows - 1 });
                }
                let used = self.columns % GROUP * bits;
                if used != 0 {
                    let row_words = self.groups() * self.group_words();
                    for (row, codes) in codes.chunks_exact(row_words).enumerate() {
                        let last = &codes[row_words - self.group_words()..];
                        let (whole, part) = (used / 32, used % 32);
                        if last[whole] >> part != 0 || last[whole + 1..].iter().any(|&word| word != 0) {
                            return Err(FormatError::Padding { row });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn expect(&self, expected: usize, found: usize, unit: &'static str) -> Result<(), FormatError> {
        if found == expected {
            return Ok(());
        }
        Err(FormatError::Length {
            format: self.format,
            rows: self.rows,
            columns: self.columns,
            unit,
            expected,
            found,
        })
    }
}

/// One or two rows of a matrix, which are a matrix too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Of what is in the window, as a matrix of its own.
    pub layout: Layout,
    /// The row asked for, counted within the window.
    pub row: usize,
    /// Which words of the whole matrix are the window's, in their order: values or codes, then scales.
    pub words: [Range<usize>; 2],
}

/// Half `element` of words that hold two each, the earlier low.
fn half_at(words: &[u32], element: usize) -> f16 {
    f16::from_bits((words[element / 2] >> (16 * (element % 2))) as u16)
}

/// Sets a half that is still zero.
fn set_half(words: &mut [u32], element: usize, half: f16) {
    words[element / 2] |= u32::from(half.to_bits()) << (16 * (element % 2));
}
