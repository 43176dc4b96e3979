//! A matrix together with its layout.
//!
//! Separate because here the two are known to fit: words from outside are checked once.

use super::{Format, FormatError, Layout, half_at, set_half};

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

    /// How the words are laid out.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The words, as a device has them.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Gives the words away.
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
