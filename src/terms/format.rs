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

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use half::f16;
use serde::{Deserialize, Serialize};

/// Columns that share a scale in [`Format::Q8`] and [`Format::Q4`].
pub const GROUP: usize = 32;
/// Words of codes a group takes in [`Format::Q8`].
pub const Q8_CODE_WORDS: usize = GROUP / 4;
/// Words of codes a group takes in [`Format::Q4`].
pub const Q4_CODE_WORDS: usize = GROUP / 8;

/// 1.5 · 2²³: added to a small number, its low bits become the number rounded to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;
/// Parts of a group's range cut off below and above in the search for 4-bit codes.
const NARROWINGS: [(f32, f32); 4] = [(0.0, 0.0), (0.03, 0.03), (0.06, 0.0), (0.0, 0.06)];

/// How a frozen matrix is held. Biases, norms, adapters and activations are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    F32,
    F16,
    /// 8-bit codes with a scale for every 32 columns.
    Q8,
    /// 4-bit codes with a scale and a minimum for every 32 columns.
    Q4,
}

/// Why values have no encoding, or words are none.
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
    pub const ALL: [Format; 4] = [Format::F32, Format::F16, Format::Q8, Format::Q4];

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
    pub format: Format,
    pub rows: usize,
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
    pub fn group_words(&self) -> usize {
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
    pub fn decode_rows(&self, words: &[u32], rows: Range<usize>, values: &mut [f32]) {
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
    pub fn q8_group(&self, words: &[u32], index: usize) -> (f16, [u32; Q8_CODE_WORDS]) {
        let mut codes = [0; Q8_CODE_WORDS];
        codes.copy_from_slice(&words[index * Q8_CODE_WORDS..][..Q8_CODE_WORDS]);
        (half_at(&words[self.scales_at()..], index), codes)
    }

    /// Scale, minimum and codes of a group of a `q4` matrix; `index` counts all groups, row · groups + group.
    ///
    /// # Panics
    /// When the group does not exist or `words` is too short.
    #[inline]
    pub fn q4_group(&self, words: &[u32], index: usize) -> (f16, f16, [u32; Q4_CODE_WORDS]) {
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

/// Encodes a matrix whose values come piece by piece, so that the matrix is never held as f32.
#[derive(Clone, Debug)]
pub struct Encoder {
    layout: Layout,
    words: Vec<u32>,
    /// Values pushed so far, those of the unfinished group included.
    pushed: usize,
    /// The unfinished group.
    group: [f32; GROUP],
}

impl Encoder {
    /// # Panics
    /// When the layout's words cannot be allocated: compare [`Layout::words`] with what is known before.
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            words: vec![0; layout.words()],
            pushed: 0,
            group: [0.0; GROUP],
        }
    }

    /// Values taken so far.
    pub fn pushed(&self) -> usize {
        self.pushed
    }

    /// Takes the next values, row major; a piece may end anywhere.
    ///
    /// # Errors
    /// As [`Format::encode`], with [`FormatError::Length`] for more values than the matrix has. An encoder that has
    /// failed is of no more use.
    pub fn push(&mut self, values: &[f32]) -> Result<(), FormatError> {
        let layout = self.layout;
        if values.len() > layout.elements() - self.pushed {
            layout.expect(layout.elements(), self.pushed.saturating_add(values.len()), "values")?;
        }
        if let Some(i) = values.iter().position(|value| !value.is_finite()) {
            return Err(FormatError::NotFinite {
                row: (self.pushed + i) / layout.columns,
            });
        }
        match layout.format {
            Format::F32 => {
                for (word, value) in self.words[self.pushed..].iter_mut().zip(values) {
                    *word = value.to_bits();
                }
                self.pushed += values.len();
            }
            Format::F16 => {
                for &value in values {
                    let half = f16::from_f32(value);
                    if half.is_infinite() {
                        return Err(self.overflow(value));
                    }
                    set_half(&mut self.words, self.pushed, half);
                    self.pushed += 1;
                }
            }
            Format::Q8 | Format::Q4 => {
                let mut rest = values;
                while !rest.is_empty() {
                    let (row, column) = (self.pushed / layout.columns, self.pushed % layout.columns);
                    let (group, held) = (column / GROUP, column % GROUP);
                    let length = layout.group_length(group);
                    let taken = rest.len().min(length - held);
                    self.group[held..held + taken].copy_from_slice(&rest[..taken]);
                    rest = &rest[taken..];
                    self.pushed += taken;
                    if held + taken == length {
                        self.close_group(row * layout.groups() + group, length)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The words, when every value has come.
    ///
    /// # Errors
    /// [`FormatError::Length`] when values are missing.
    pub fn finish(self) -> Result<Vec<u32>, FormatError> {
        self.layout.expect(self.layout.elements(), self.pushed, "values")?;
        Ok(self.words)
    }

    fn overflow(&self, value: f32) -> FormatError {
        FormatError::Overflow {
            format: self.layout.format,
            row: self.pushed / self.layout.columns,
            column: self.pushed % self.layout.columns,
            value,
        }
    }

    /// Takes the next group of a `q8` matrix as it is, four codes a word.
    ///
    /// # Panics
    /// When the matrix is of another format, has rows that are no whole groups, or is complete, and in the middle of a
    /// group.
    pub fn push_q8_group(&mut self, scale: f16, codes: [u32; Q8_CODE_WORDS]) {
        let index = self.next_whole_group(Format::Q8);
        self.put_q8(index, scale, codes);
    }

    /// Takes the next group of a `q4` matrix as it is, eight codes a word.
    ///
    /// # Panics
    /// When the matrix is of another format, has rows that are no whole groups, or is complete, and in the middle of a
    /// group.
    pub fn push_q4_group(&mut self, scale: f16, minimum: f16, codes: [u32; Q4_CODE_WORDS]) {
        let index = self.next_whole_group(Format::Q4);
        self.put_q4(index, scale, minimum, codes);
    }

    fn next_whole_group(&mut self, format: Format) -> usize {
        let layout = self.layout;
        assert!(
            layout.format == format && layout.columns.is_multiple_of(GROUP) && self.pushed.is_multiple_of(GROUP),
            "a group of {format} for {layout:?} after {} values",
            self.pushed
        );
        let index = self.pushed / GROUP;
        self.pushed += GROUP;
        index
    }

    fn put_q8(&mut self, index: usize, scale: f16, codes: [u32; Q8_CODE_WORDS]) {
        self.words[index * Q8_CODE_WORDS..][..Q8_CODE_WORDS].copy_from_slice(&codes);
        set_half(&mut self.words[self.layout.scales_at()..], index, scale);
    }

    fn put_q4(&mut self, index: usize, scale: f16, minimum: f16, codes: [u32; Q4_CODE_WORDS]) {
        self.words[index * Q4_CODE_WORDS..][..Q4_CODE_WORDS].copy_from_slice(&codes);
        self.words[self.layout.scales_at() + index] = u32::from(scale.to_bits()) | u32::from(minimum.to_bits()) << 16;
    }

    /// Writes the group with this index among all groups of the matrix; `pushed` stands behind it.
    fn close_group(&mut self, index: usize, length: usize) -> Result<(), FormatError> {
        let encoded = match self.layout.format {
            Format::Q8 => {
                self.group[length..].fill(0.0);
                encode_q8(&self.group).map(|(scale, codes)| self.put_q8(index, scale, codes))
            }
            _ => encode_q4(&mut self.group, length)
                .map(|(scale, minimum, codes)| self.put_q4(index, scale, minimum, codes)),
        };
        if encoded.is_none() {
            let magnitude = |i: &usize| self.group[*i].abs();
            let largest = (0..length)
                .max_by(|i, j| magnitude(i).total_cmp(&magnitude(j)))
                .unwrap_or(0);
            self.pushed -= length - largest;
            return Err(self.overflow(self.group[largest]));
        }
        Ok(())
    }
}

/// A matrix in one of the formats, of the length its layout says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    layout: Layout,
    words: Vec<u32>,
}

impl Packed {
    /// Takes words that come from outside, when they are what [`Layout::encode`] could have left.
    ///
    /// # Errors
    /// As [`Layout::check`].
    pub fn new(layout: Layout, words: Vec<u32>) -> Result<Self, FormatError> {
        layout.check(&words)?;
        Ok(Self { layout, words })
    }

    /// Encodes a row-major matrix.
    ///
    /// # Errors
    /// As [`Format::encode`].
    pub fn encode(layout: Layout, values: &[f32]) -> Result<Self, FormatError> {
        let words = layout.encode(values)?;
        Ok(Self { layout, words })
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn words(&self) -> &[u32] {
        &self.words
    }

    pub fn into_words(self) -> Vec<u32> {
        self.words
    }

    /// All values, row major.
    pub fn decode(&self) -> Vec<f32> {
        self.layout.decode(&self.words)
    }

    /// The matrix of the given rows in the given order, which loses nothing in any format. A row may be taken more than
    /// once.
    ///
    /// # Panics
    /// When a row does not exist.
    pub fn select_rows(&self, rows: &[usize]) -> Self {
        let from = self.layout;
        let to = from.format.layout(rows.len(), from.columns);
        let mut words = vec![0; to.words()];
        for (target, &source) in rows.iter().enumerate() {
            assert!(source < from.rows, "row {source} of {from:?}");
            match from.format {
                Format::F32 => words[target * from.columns..][..from.columns]
                    .copy_from_slice(&self.words[source * from.columns..][..from.columns]),
                Format::F16 => copy_halves(&self.words, source, &mut words, target, from.columns),
                Format::Q8 | Format::Q4 => {
                    let length = from.groups() * from.group_words();
                    words[target * length..][..length].copy_from_slice(&self.words[source * length..][..length]);
                    let (source_scales, target_scales) =
                        (&self.words[from.scales_at()..], &mut words[to.scales_at()..]);
                    if from.format == Format::Q8 {
                        copy_halves(source_scales, source, target_scales, target, from.groups());
                    } else {
                        target_scales[target * from.groups()..][..from.groups()]
                            .copy_from_slice(&source_scales[source * from.groups()..][..from.groups()]);
                    }
                }
            }
        }
        Self { layout: to, words }
    }
}

/// Copies row `source` of halves to row `target`, rows being `length` halves long.
fn copy_halves(from: &[u32], source: usize, to: &mut [u32], target: usize, length: usize) {
    for i in 0..length {
        set_half(to, target * length + i, half_at(from, source * length + i));
    }
}

/// Half `element` of words that hold two each, the earlier low.
fn half_at(words: &[u32], element: usize) -> f16 {
    f16::from_bits((words[element / 2] >> (16 * (element % 2))) as u16)
}

/// Sets a half that is still zero.
fn set_half(words: &mut [u32], element: usize, half: f16) {
    words[element / 2] |= u32::from(half.to_bits()) << (16 * (element % 2));
}

/// A group in 8-bit codes; `None` when its scale is beyond f16.
fn encode_q8(values: &[f32; GROUP]) -> Option<(f16, [u32; Q8_CODE_WORDS])> {
    let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let mut scale = f16::from_f32(largest / 127.0);
    // Among subnormal halves rounding down may be by much more than half a code.
    if largest > 127.5 * scale.to_f32() {
        scale = f16::from_bits(scale.to_bits() + 1);
    }
    if scale.is_infinite() {
        return None;
    }
    let inverse = inverse(scale);
    let mut words = [0; Q8_CODE_WORDS];
    for (word, values) in words.iter_mut().zip(values.as_chunks::<4>().0) {
        *word =
            u32::from_le_bytes(values.map(|value| ((value * inverse).clamp(-127.0, 127.0) + ROUND).to_bits() as u8));
    }
    Some((scale, words))
}

/// A group in 4-bit codes, with the scale and minimum that leave the least squared error among those searched; `None`
/// when they are beyond f16. Values from `length` on are overwritten.
///
/// The search narrows the range from both ends in steps, because one clipped outlier costs less than coarser codes for
/// all the others, and fits scale and minimum to the codes by least squares.
fn encode_q4(values: &mut [f32; GROUP], length: usize) -> Option<(f16, f16, [u32; Q4_CODE_WORDS])> {
    for i in length..GROUP {
        values[i] = values[i - length];
    }
    let (low, high) = values
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &value| {
            (low.min(value), high.max(value))
        });
    let range = high - low;
    let round = |scale: f32, minimum: f32| (f16::from_f32(scale), f16::from_f32(minimum));
    let (mut scale, mut minimum) = round(range / 15.0, low);
    if !scale.is_finite() || !minimum.is_finite() {
        return None;
    }
    if range > 0.0 {
        let mut least = q4_error(values, scale, minimum);
        for (below, above) in NARROWINGS {
            let narrowed = round(range * (1.0 - below - above) / 15.0, low + range * below);
            let fitted = fit_q4(values, narrowed.0, narrowed.1);
            for candidate in [Some(narrowed), fitted].into_iter().flatten() {
                let error = q4_error(values, candidate.0, candidate.1);
                if error < least {
                    least = error;
                    (scale, minimum) = candidate;
                }
            }
        }
    }
    let (inverse, low) = (inverse(scale), minimum.to_f32());
    let mut words = [0; Q4_CODE_WORDS];
    for (i, &value) in values[..length].iter().enumerate() {
        let code = q4_code(value, inverse, low) as u32;
        words[i / 8] |= code << (4 * (i % 8));
    }
    Some((scale, minimum, words))
}

/// The code of a value, still as a number: a whole one from 0 to 15.
fn q4_code(value: f32, inverse: f32, minimum: f32) -> f32 {
    ((value - minimum) * inverse).clamp(0.0, 15.0) + ROUND - ROUND
}

/// Squared error of a whole group under a scale and minimum, summed in eight lanes so that it is the same on every
/// machine.
fn q4_error(values: &[f32; GROUP], scale: f16, minimum: f16) -> f32 {
    let (inverse, scale, minimum) = (inverse(scale), scale.to_f32(), minimum.to_f32());
    let mut lanes = [0.0; 8];
    for values in values.as_chunks::<8>().0 {
        for (lane, &value) in lanes.iter_mut().zip(values) {
            let error = scale * q4_code(value, inverse, minimum) + minimum - value;
            *lane += error * error;
        }
    }
    lanes.iter().sum()
}

/// The scale and minimum of least squared error for the codes that the given ones lead to; `None` when all codes are
/// equal or the fit is beyond f16.
fn fit_q4(values: &[f32; GROUP], scale: f16, minimum: f16) -> Option<(f16, f16)> {
    let (inverse, minimum) = (inverse(scale), minimum.to_f32());
    let (mut codes, mut squares, mut sums, mut products) = ([0.0f32; 8], [0.0f32; 8], [0.0f32; 8], [0.0f32; 8]);
    for values in values.as_chunks::<8>().0 {
        for (i, &value) in values.iter().enumerate() {
            let code = q4_code(value, inverse, minimum);
            codes[i] += code;
            squares[i] += code * code;
            // Relative to the minimum: a group far from zero must not lose its spread to cancellation.
            sums[i] += value - minimum;
            products[i] += code * (value - minimum);
        }
    }
    let [codes, squares, sums, products] = [codes, squares, sums, products].map(|lanes| lanes.iter().sum::<f32>());
    let n = GROUP as f32;
    let determinant = n * squares - codes * codes;
    let scale = (n * products - codes * sums) / determinant;
    let fitted = (
        f16::from_f32(scale),
        f16::from_f32(minimum + (sums - scale * codes) / n),
    );
    (determinant > 0.0 && fitted.0.is_finite() && fitted.1.is_finite()).then_some(fitted)
}

/// 1 / scale, and zero for a group that is all one value.
fn inverse(scale: f16) -> f32 {
    if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() }
}
