//! Values to words, piece by piece.
//!
//! Separate because a matrix that is being encoded is not one yet: it has a place where it goes on.

use half::f16;

use super::group::{encode_q4, encode_q8};
use super::{Format, FormatError, GROUP, Layout, Q4_CODE_WORDS, Q8_CODE_WORDS, set_half};

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
