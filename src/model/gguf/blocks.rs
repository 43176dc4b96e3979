//! The types in which GGUF tensors are stored: their sizes, decoding, and the way into the formats of
//! [`crate::terms::format`].
//!
//! A tensor is a sequence of blocks, and a row is a whole number of them. Decoding gives the values of ggml's own
//! formulas bit for bit: all products of codes and scales are exact in f32, so that one rounding is left at most. Q8_0,
//! Q4_0 and Q4_1 have the groups of `q8` and `q4`, only in another order, so they change places without loss; so does
//! Q4_K but for its scales, which are products of two numbers and are rounded to f16.

use half::{bf16, f16};

use crate::terms::format::{Encoder, Format, FormatError, GROUP, Layout, Packed, Q4_CODE_WORDS, Q8_CODE_WORDS};

/// Elements of a block of the "K" types.
const SUPER: usize = 256;

/// The types that are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

/// A type that a file may name, decoded or not: enough to know where its tensors end.
#[derive(Debug, PartialEq, Eq)]
pub struct Stored {
    pub id: u32,
    pub name: &'static str,
    /// Elements of a block.
    pub elements: u64,
    /// Bytes of a block.
    pub bytes: u64,
    pub block: Option<BlockType>,
}

const fn stored(id: u32, name: &'static str, elements: u64, bytes: u64, block: Option<BlockType>) -> Stored {
    Stored {
        id,
        name,
        elements,
        bytes,
        block,
    }
}

static STORED: [Stored; 34] = [
    stored(0, "F32", 1, 4, Some(BlockType::F32)),
    stored(1, "F16", 1, 2, Some(BlockType::F16)),
    stored(2, "Q4_0", 32, 18, Some(BlockType::Q4_0)),
    stored(3, "Q4_1", 32, 20, Some(BlockType::Q4_1)),
    stored(6, "Q5_0", 32, 22, Some(BlockType::Q5_0)),
    stored(7, "Q5_1", 32, 24, Some(BlockType::Q5_1)),
    stored(8, "Q8_0", 32, 34, Some(BlockType::Q8_0)),
    stored(9, "Q8_1", 32, 40, None),
    stored(10, "Q2_K", 256, 84, None),
    stored(11, "Q3_K", 256, 110, None),
    stored(12, "Q4_K", 256, 144, Some(BlockType::Q4K)),
    stored(13, "Q5_K", 256, 176, Some(BlockType::Q5K)),
    stored(14, "Q6_K", 256, 210, Some(BlockType::Q6K)),
    stored(15, "Q8_K", 256, 292, None),
    stored(16, "IQ2_XXS", 256, 66, None),
    stored(17, "IQ2_XS", 256, 74, None),
    stored(18, "IQ3_XXS", 256, 98, None),
    stored(19, "IQ1_S", 256, 50, None),
    stored(20, "IQ4_NL", 32, 18, None),
    stored(21, "IQ3_S", 256, 110, None),
    stored(22, "IQ2_S", 256, 82, None),
    stored(23, "IQ4_XS", 256, 136, None),
    stored(24, "I8", 1, 1, None),
    stored(25, "I16", 1, 2, None),
    stored(26, "I32", 1, 4, None),
    stored(27, "I64", 1, 8, None),
    stored(28, "F64", 1, 8, None),
    stored(29, "IQ1_M", 256, 56, None),
    stored(30, "BF16", 1, 2, Some(BlockType::Bf16)),
    stored(34, "TQ1_0", 256, 54, None),
    stored(35, "TQ2_0", 256, 66, None),
    stored(39, "MXFP4", 32, 17, None),
    stored(40, "NVFP4", 64, 36, None),
    stored(41, "Q1_0", 128, 18, None),
];

impl Stored {
    pub(crate) fn from_id(id: u32) -> Option<&'static Self> {
        STORED.iter().find(|stored| stored.id == id)
    }
}

impl BlockType {
    pub const ALL: [BlockType; 11] = [
        BlockType::F32,
        BlockType::F16,
        BlockType::Bf16,
        BlockType::Q8_0,
        BlockType::Q4_0,
        BlockType::Q4_1,
        BlockType::Q5_0,
        BlockType::Q5_1,
        BlockType::Q4K,
        BlockType::Q5K,
        BlockType::Q6K,
    ];

    /// ggml's name.
    pub fn name(self) -> &'static str {
        self.stored().name
    }

    pub fn stored(self) -> &'static Stored {
        let found = STORED.iter().find(|stored| stored.block == Some(self));
        found.unwrap_or_else(|| unreachable!("every block type is in the table"))
    }

    /// The format that holds the type best: without loss where one does.
    pub fn natural(self) -> Format {
        match self {
            BlockType::F32 => Format::F32,
            BlockType::F16 | BlockType::Bf16 => Format::F16,
            BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q4K => Format::Q4,
            BlockType::Q8_0 | BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q5K | BlockType::Q6K => Format::Q8,
        }
    }

    /// The format for a tensor that holds values too large for [`BlockType::natural`], if there can be such.
    pub fn fallback(self) -> Option<Format> {
        match self {
            BlockType::F32 | BlockType::F16 | BlockType::Q8_0 | BlockType::Q4_1 => None,
            BlockType::Q4_0 | BlockType::Q4K => Some(Format::Q8),
            BlockType::Bf16 | BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q5K | BlockType::Q6K => Some(Format::F32),
        }
    }

    /// Appends the values of whole blocks.
    ///
    /// # Panics
    /// When `bytes` is not a whole number of blocks.
    pub fn decode_into(self, bytes: &[u8], values: &mut Vec<f32>) {
        let size = self.stored().bytes as usize;
        assert!(
            bytes.len().is_multiple_of(size),
            "{} bytes of {}",
            bytes.len(),
            self.name()
        );
        let blocks = bytes.chunks_exact(size);
        match self {
            BlockType::F32 => values.extend(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes))),
            BlockType::F16 => values.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&bytes| f16::from_le_bytes(bytes).to_f32()),
            ),
            BlockType::Bf16 => values.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&bytes| bf16::from_le_bytes(bytes).to_f32()),
            ),
            BlockType::Q8_0 => {
                for block in blocks {
                    let scale = half(block, 0).to_f32();
                    values.extend(block[2..].iter().map(|code| f32::from(code.cast_signed()) * scale));
                }
            }
            BlockType::Q4_0 => {
                for block in blocks {
                    let scale = half(block, 0).to_f32();
                    values.extend(nibbles(&block[2..]).map(|code| scale * (f32::from(code) - 8.0)));
                }
            }
            BlockType::Q4_1 => {
                for block in blocks {
                    let (scale, minimum) = (half(block, 0).to_f32(), half(block, 2).to_f32());
                    values.extend(nibbles(&block[4..]).map(|code| scale * f32::from(code) + minimum));
                }
            }
            BlockType::Q5_0 => {
                for block in blocks {
                    let (scale, high) = (half(block, 0).to_f32(), &block[2..6]);
                    let codes = nibbles(&block[6..]).enumerate();
                    values.extend(codes.map(|(i, code)| scale * (f32::from(code | bit(high, i) << 4) - 16.0)));
                }
            }
            BlockType::Q5_1 => {
                for block in blocks {
                    let (scale, minimum, high) = (half(block, 0).to_f32(), half(block, 2).to_f32(), &block[4..8]);
                    let codes = nibbles(&block[8..]).enumerate();
                    values.extend(codes.map(|(i, code)| scale * f32::from(code | bit(high, i) << 4) + minimum));
                }
            }
            BlockType::Q4K => {
                for block in blocks {
                    for part in 0..SUPER / GROUP {
                        let (scale, minimum) = k_scale(block, part);
                        values.extend(k_nibbles(&block[16..], part).map(|code| scale * f32::from(code) - minimum));
                    }
                }
            }
            BlockType::Q5K => {
                for block in blocks {
                    let high = &block[16..48];
                    for part in 0..SUPER / GROUP {
                        let (scale, minimum) = k_scale(block, part);
                        let codes = k_nibbles(&block[48..], part).zip(high);
                        values.extend(
                            codes.map(|(code, high)| scale * f32::from(code | (high >> part & 1) << 4) - minimum),
                        );
                    }
                }
            }
            BlockType::Q6K => {
                for block in blocks {
                    let scale = half(block, 208).to_f32();
                    for i in 0..SUPER {
                        // Halves of 128; in each, quarters of 32 share bytes of high bits, and two quarters bytes of
                        // low bits.
                        let (side, quarter, lane) = (i / 128, i % 128 / 32, i % 32);
                        let low = block[64 * side + 32 * (quarter % 2) + lane] >> (4 * (quarter / 2)) & 15;
                        let high = block[128 + 32 * side + lane] >> (2 * quarter) & 3;
                        let part = f32::from(block[192 + i / 16].cast_signed());
                        values.push(scale * part * (f32::from(low | high << 4) - 32.0));
                    }
                }
            }
        }
    }

    /// Encodes whole rows in a type that is written: F32, F16, BF16 or Q8_0, rounded as ggml does.
    ///
    /// # Errors
    /// [`FormatError::Overflow`] for a value beyond F16 or Q8_0, [`FormatError::NotFinite`] also for one that BF16 rounds
    /// beyond its largest; their row is 0, their column the index.
    ///
    /// # Panics
    /// For another type, and when `values` is not a whole number of blocks.
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>, FormatError> {
        if values.iter().any(|value| !value.is_finite()) {
            return Err(FormatError::NotFinite { row: 0 });
        }
        let checked = |scale: f16, format, value: f32, column| match scale.is_finite() {
            true => Ok(scale),
            false => Err(FormatError::Overflow {
                format,
                row: 0,
                column,
                value,
            }),
        };
        match self {
            BlockType::F32 => Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect()),
            BlockType::F16 => {
                let mut bytes = Vec::with_capacity(2 * values.len());
                for (column, &value) in values.iter().enumerate() {
                    let half = checked(f16::from_f32(value), Format::F16, value, column)?;
                    bytes.extend(half.to_le_bytes());
                }
                Ok(bytes)
            }
            BlockType::Bf16 => {
                let mut bytes = Vec::with_capacity(2 * values.len());
                for &value in values {
                    let rounded = bf16::from_f32(value);
                    if !rounded.is_finite() {
                        return Err(FormatError::NotFinite { row: 0 });
                    }
                    bytes.extend(rounded.to_le_bytes());
                }
                Ok(bytes)
            }
            BlockType::Q8_0 => {
                assert!(values.len().is_multiple_of(GROUP), "{} values of Q8_0", values.len());
                let mut bytes = Vec::with_capacity(values.len() / GROUP * 34);
                for (group, values) in values.as_chunks::<GROUP>().0.iter().enumerate() {
                    let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                    let scale = largest / 127.0;
                    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                    let stored = checked(f16::from_f32(scale), Format::Q8, largest, GROUP * group)?;
                    bytes.extend(stored.to_le_bytes());
                    bytes.extend(
                        values
                            .map(|value| (value * inverse).round() as i8)
                            .map(i8::cast_unsigned),
                    );
                }
                Ok(bytes)
            }
            _ => panic!("{} is not written from values", self.name()),
        }
    }
}

impl std::fmt::Display for BlockType {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(self.name())
    }
}

fn half(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// 32 codes of 16 bytes: all low nibbles come first.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes
        .iter()
        .map(|byte| byte & 15)
        .chain(bytes.iter().map(|byte| byte >> 4))
}

fn bit(bytes: &[u8], index: usize) -> u8 {
    bytes[index / 8] >> (index % 8) & 1
}

/// The 32 codes of part 0 to 7 of a K block: parts come in pairs, the even one in the low nibbles of 32 bytes.
fn k_nibbles(bytes: &[u8], part: usize) -> impl Iterator<Item = u8> {
    let shift = 4 * (part % 2);
    bytes[32 * (part / 2)..][..32]
        .iter()
        .map(move |byte| byte >> shift & 15)
}

/// Scale and minimum of part 0 to 7 of a Q4_K or Q5_K block: 6-bit multiples of two halves, packed in 12 bytes.
fn k_scale(block: &[u8], part: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, minimum) = if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        let (low, scale_high, minimum_high) = (packed[part + 4], packed[part - 4] >> 6, packed[part] >> 6);
        (low & 15 | scale_high << 4, low >> 4 | minimum_high << 4)
    };
    (
        half(block, 0).to_f32() * f32::from(scale),
        half(block, 2).to_f32() * f32::from(minimum),
    )
}

/// A tensor that has come into one of our formats.
#[derive(Clone, Debug, PartialEq)]
pub struct Repacked {
    pub packed: Packed,
    /// How the file stores it.
    pub block: BlockType,
    /// Whether a weight differs from the file's, which is worth a word to the user.
    pub rounded: bool,
}

/// Brings the blocks of a matrix into a format as they come, so that the matrix is never held twice.
#[derive(Debug)]
pub struct Repacker {
    block: BlockType,
    layout: Layout,
    encoder: Encoder,
    rounded: bool,
    values: Vec<f32>,
}

impl Repacker {
    /// For a `rows`×`columns` matrix into `format`, or [`BlockType::natural`]'s.
    pub fn new(block: BlockType, rows: usize, columns: usize, format: Option<Format>) -> Self {
        let layout = format.unwrap_or(block.natural()).layout(rows, columns);
        Self {
            block,
            layout,
            encoder: Encoder::new(layout),
            rounded: false,
            values: Vec::new(),
        }
    }

    /// Takes the next whole blocks.
    ///
    /// # Errors
    /// As [`Encoder::push`].
    ///
    /// # Panics
    /// When `bytes` is not a whole number of blocks, or more than the matrix has.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let blocks = bytes.chunks_exact(self.block.stored().bytes as usize);
        assert!(blocks.remainder().is_empty(), "{} bytes of {}", bytes.len(), self.block);
        match (self.block, self.layout.format) {
            (BlockType::Q8_0, Format::Q8) => {
                for block in blocks {
                    let mut codes = [0; Q8_CODE_WORDS];
                    for (word, &bytes) in codes.iter_mut().zip(block[2..].as_chunks().0) {
                        *word = u32::from_le_bytes(bytes);
                    }
                    self.encoder.push_q8_group(half(block, 0), codes);
                }
            }
            (BlockType::Q4_0, Format::Q4) => {
                for block in blocks {
                    let scale = half(block, 0);
                    self.push_q4(scale.to_f32(), -8.0 * scale.to_f32(), nibbles(&block[2..]))?;
                }
            }
            (BlockType::Q4_1, Format::Q4) => {
                for block in blocks {
                    self.encoder
                        .push_q4_group(half(block, 0), half(block, 2), q4_words(nibbles(&block[4..])));
                }
            }
            (BlockType::Q4K, Format::Q4) => {
                for block in blocks {
                    for part in 0..SUPER / GROUP {
                        let (scale, minimum) = k_scale(block, part);
                        self.push_q4(scale, -minimum, k_nibbles(&block[16..], part))?;
                    }
                }
            }
            (block, format) => {
                self.values.clear();
                block.decode_into(bytes, &mut self.values);
                self.rounded |= match format {
                    Format::F32 => false,
                    Format::F16 => self.values.iter().any(|&value| f16::from_f32(value).to_f32() != value),
                    Format::Q8 | Format::Q4 => true,
                };
                self.encoder.push(&self.values)?;
            }
        }
        Ok(())
    }

    fn push_q4(&mut self, scale: f32, minimum: f32, codes: impl Iterator<Item = u8>) -> Result<(), FormatError> {
        let halves = (f16::from_f32(scale), f16::from_f32(minimum));
        if !(halves.0.is_finite() && halves.1.is_finite()) {
            let element = self.encoder.pushed();
            return Err(FormatError::Overflow {
                format: Format::Q4,
                row: element / self.layout.columns,
                column: element % self.layout.columns,
                value: minimum,
            });
        }
        self.rounded |= (halves.0.to_f32(), halves.1.to_f32()) != (scale, minimum);
        self.encoder.push_q4_group(halves.0, halves.1, q4_words(codes));
        Ok(())
    }

    /// The matrix, when all its blocks have come.
    ///
    /// # Errors
    /// [`FormatError::NotFinite`]; [`FormatError::Length`] when blocks are missing.
    pub fn finish(self) -> Result<Repacked, FormatError> {
        Ok(Repacked {
            packed: Packed::new(self.layout, self.encoder.finish()?)?,
            block: self.block,
            rounded: self.rounded,
        })
    }
}

/// 32 codes as eight a word.
fn q4_words(codes: impl Iterator<Item = u8>) -> [u32; Q4_CODE_WORDS] {
    let mut words = [0; Q4_CODE_WORDS];
    for (i, code) in codes.enumerate() {
        words[i / 8] |= u32::from(code) << (4 * (i % 8));
    }
    words
}

/// A matrix in its type of GGUF, all its values kept: F32, F16, Q8_0 or Q4_1. `None` when a quantised one has rows that
/// are no whole groups, which GGUF cannot hold.
pub fn blocks_of(packed: &Packed) -> Option<(BlockType, Vec<u8>)> {
    let (layout, words) = (packed.layout(), packed.words());
    let groups = layout.rows * layout.groups();
    if layout.format.is_quantised() && !layout.columns.is_multiple_of(GROUP) {
        return None;
    }
    let mut bytes = Vec::new();
    let block = match layout.format {
        Format::F32 => {
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            BlockType::F32
        }
        Format::F16 => {
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            bytes.truncate(2 * layout.elements());
            BlockType::F16
        }
        Format::Q8 => {
            bytes.reserve(34 * groups);
            for group in 0..groups {
                let (scale, codes) = layout.q8_group(words, group);
                bytes.extend(scale.to_le_bytes());
                bytes.extend(codes.iter().flat_map(|word| word.to_le_bytes()));
            }
            BlockType::Q8_0
        }
        Format::Q4 => {
            bytes.reserve(20 * groups);
            for group in 0..groups {
                let (scale, minimum, codes) = layout.q4_group(words, group);
                bytes.extend(scale.to_le_bytes());
                bytes.extend(minimum.to_le_bytes());
                let code = |i: usize| (codes[i / 8] >> (4 * (i % 8))) as u8 & 15;
                bytes.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
            }
            BlockType::Q4_1
        }
    };
    Some((block, bytes))
}
