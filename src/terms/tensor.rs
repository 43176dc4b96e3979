//! What crosses the cut: activations one way, their gradient the other, (batch, seq, width), in one of three forms.
//!
//! A tensor's form, shape and bytes are checked against each other once, where it is made; who has a [`WireTensor`] need not ask
//! again.

use std::fmt;

use super::words;

/// Label of a position whose target takes no part in the loss; targets (batch, seq) go with the activations.
pub const IGNORED_TARGET: i32 = -100;

/// How the numbers of activations and gradients travel.
///
/// | form | bytes of (rows, width) |
/// |---|---|
/// | `F32` | four a value |
/// | `F16` | IEEE halves, two to a 32-bit word over the whole tensor, the first in the low half |
/// | `Int8` | an f32 scale a row, all scales first; then each row's int8, padded to whole words |
///
/// All words are little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WireForm {
    /// Single precision.
    F32,
    /// Half precision.
    #[default]
    F16,
    /// Codes of 8 bits with a scale for every row.
    Int8,
}

words!(WireForm {
    F32 = "f32",
    F16 = "f16",
    Int8 = "int8",
});

impl WireForm {
    /// Length in 32-bit words of (rows, width) values; `None` when that overflows.
    pub fn words(self, rows: usize, width: usize) -> Option<usize> {
        match self {
            WireForm::F32 => rows.checked_mul(width),
            WireForm::F16 => Some(rows.checked_mul(width)?.div_ceil(2)),
            WireForm::Int8 => rows.checked_mul(width.div_ceil(4).checked_add(1)?),
        }
    }

    /// Length in bytes of (rows, width) values; `None` when that overflows.
    pub fn bytes(self, rows: usize, width: usize) -> Option<usize> {
        self.words(rows, width)?.checked_mul(4)
    }

    /// Length in bits of (rows, width) values, of any size.
    pub fn bits(self, rows: usize, width: usize) -> f64 {
        let (rows, width) = (rows as f64, width as f64);
        let words = match self {
            WireForm::F32 => rows * width,
            WireForm::F16 => (rows * width / 2.0).ceil(),
            WireForm::Int8 => rows * (1.0 + (width / 4.0).ceil()),
        };
        32.0 * words
    }
}

/// A tensor's form and shape (batch, seq, width).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WireLayout {
    /// How a value is written.
    pub form: WireForm,
    /// Sequences.
    pub batch: u32,
    /// Tokens of each sequence.
    pub seq: u32,
    /// Values of each token.
    pub width: u32,
}

impl WireLayout {
    /// Token rows; `None` when that overflows.
    pub fn rows(self) -> Option<usize> {
        usize::try_from(self.batch)
            .ok()?
            .checked_mul(usize::try_from(self.seq).ok()?)
    }

    /// Bytes of such a tensor; `None` when that overflows.
    pub fn bytes(self) -> Option<usize> {
        self.form.bytes(self.rows()?, usize::try_from(self.width).ok()?)
    }
}

impl fmt::Display for WireLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WireLayout {
            form,
            batch,
            seq,
            width,
        } = self;
        write!(f, "{batch} × {seq} × {width} in {form}")
    }
}

/// The bytes are not as many as the layout says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a tensor of {layout} has {} bytes, not {found}", .layout.bytes().map_or("too many".to_owned(), |bytes| bytes.to_string()))]
pub struct WireTensorError {
    /// What was said.
    pub layout: WireLayout,
    /// Bytes that came.
    pub found: usize,
}

/// A tensor (batch, seq, width) as it travels. Its bytes are as many as its layout says.
#[derive(Clone, PartialEq)]
pub struct WireTensor {
    layout: WireLayout,
    bytes: Vec<u8>,
}

impl WireTensor {
    /// # Errors
    /// When `bytes` are not as many as `layout` says.
    pub fn new(layout: WireLayout, bytes: Vec<u8>) -> Result<Self, WireTensorError> {
        if layout.bytes() != Some(bytes.len()) {
            return Err(WireTensorError {
                layout,
                found: bytes.len(),
            });
        }
        Ok(Self { layout, bytes })
    }

    /// Form and shape.
    pub fn layout(&self) -> WireLayout {
        self.layout
    }

    /// How many sequences.
    pub fn batch(&self) -> usize {
        self.layout.batch as usize
    }

    /// Tokens of each sequence.
    pub fn seq(&self) -> usize {
        self.layout.seq as usize
    }

    /// Values of each token.
    pub fn width(&self) -> usize {
        self.layout.width as usize
    }

    /// Token rows.
    pub fn rows(&self) -> usize {
        self.batch() * self.seq()
    }

    /// As they cross the network.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether every number is finite when it is decoded. Of int8 only the scales can fail to be.
    pub fn is_finite(&self) -> bool {
        let finite = |words: &[u8]| {
            let words = words.as_chunks::<4>().0;
            words.iter().all(|word| f32::from_le_bytes(*word).is_finite())
        };
        match self.layout.form {
            WireForm::F32 => finite(&self.bytes),
            WireForm::F16 => {
                let halves = self.bytes.as_chunks::<2>().0;
                halves.iter().all(|half| u16::from_le_bytes(*half) & 0x7c00 != 0x7c00)
            }
            WireForm::Int8 => {
                let scales = self.bytes[..4 * self.rows()].as_chunks::<4>().0;
                // The furthest from zero that a byte can be.
                let furthest = f32::from(i8::MIN);
                scales
                    .iter()
                    .all(|scale| (f32::from_le_bytes(*scale) * furthest).is_finite())
            }
        }
    }
}

impl fmt::Debug for WireTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WireTensor({})", self.layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_as_documented_and_do_not_overflow() {
        assert_eq!(WireForm::F32.bytes(3, 5), Some(60));
        // 15 halves are 8 words.
        assert_eq!(WireForm::F16.bytes(3, 5), Some(32));
        // 3 scales, 3 rows of 5 bytes in 2 words.
        assert_eq!(WireForm::Int8.bytes(3, 5), Some(36));
        for &form in WireForm::ALL {
            assert_eq!(form.bytes(usize::MAX, 3), None);
            assert_eq!(form.bytes(2, usize::MAX), None);
            assert_eq!(form.bytes(0, 5), Some(0));
            assert_eq!(form.bits(3, 5), 8.0 * form.bytes(3, 5).unwrap() as f64);
        }
    }

    fn tensor(form: WireForm, width: u32, bytes: &[u8]) -> WireTensor {
        let layout = WireLayout {
            form,
            batch: 1,
            seq: 1,
            width,
        };
        WireTensor::new(layout, bytes.to_vec()).unwrap()
    }

    #[test]
    fn values_that_are_not_finite_are_found_in_every_form() {
        let f32s = |values: [f32; 2]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        assert!(tensor(WireForm::F32, 2, &f32s([1.0, f32::MAX])).is_finite());
        assert!(!tensor(WireForm::F32, 2, &f32s([1.0, f32::NAN])).is_finite());
        // 65504 is the largest half; 0x7c00 is infinity, 0x7e01 not a number.
        assert!(tensor(WireForm::F16, 2, &[0xff, 0x7b, 0xff, 0xfb]).is_finite());
        assert!(!tensor(WireForm::F16, 2, &[0, 0, 0x00, 0x7c]).is_finite());
        assert!(!tensor(WireForm::F16, 2, &[0x01, 0x7e, 0, 0]).is_finite());
        // One scale, then four bytes that would be NaN as f32 but are not one.
        let scale = |scale: f32| [scale.to_le_bytes(), [0xff; 4]].concat();
        assert!(tensor(WireForm::Int8, 4, &scale(0.5)).is_finite());
        assert!(!tensor(WireForm::Int8, 4, &scale(f32::INFINITY)).is_finite());
        // Finite itself, but not times what it scales.
        assert!(!tensor(WireForm::Int8, 4, &scale(1e37)).is_finite());
        assert!(tensor(WireForm::Int8, 4, &scale(-2e36)).is_finite());
    }

    #[test]
    fn a_tensor_has_the_bytes_of_its_layout_or_is_none() {
        let layout = WireLayout {
            form: WireForm::F32,
            batch: 2,
            seq: 2,
            width: 2,
        };
        assert_eq!(WireTensor::new(layout, vec![0; 32]).unwrap().rows(), 4);
        let error = WireTensor::new(layout, vec![0; 31]).unwrap_err();
        assert_eq!(error.to_string(), "a tensor of 2 × 2 × 2 in f32 has 32 bytes, not 31");
        let huge = WireLayout {
            batch: u32::MAX,
            seq: u32::MAX,
            width: u32::MAX,
            ..layout
        };
        let error = WireTensor::new(huge, vec![0; 32]).unwrap_err();
        assert!(error.to_string().contains("too many bytes"), "{error}");
    }
}
