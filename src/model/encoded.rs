//! A model unit as bytes: what stands before its tensors' data, and rows that are read where the bytes are kept.
//!
//! It is separate from the units because a client uses the rows of an embedding whose bytes are in a file, and never has the unit.

use std::fmt;
use std::io::SeekFrom;
use std::sync::{Arc, Mutex, PoisonError};

use super::architecture::Architecture;
use super::archive::Source;
use super::ends::embedding::{Embedding, RowSource, Rows};
use super::unit::{Unit, layout};
use super::weights::WeightsError;
use crate::terms::format::{Format, FormatError, Layout};

const MAGIC: [u8; 4] = *b"SFLU";
/// Of the magic and the numbers before the table.
const PREAMBLE_BYTES: usize = 4 * 5;

/// A tensor in the bytes of a unit.
#[derive(Debug)]
pub(super) struct EncodedTensor {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub format: Format,
    /// The byte at which its words begin.
    pub at: u64,
}

impl EncodedTensor {
    pub fn layout(&self) -> Layout {
        layout(&self.shape, self.format)
    }
}

/// Bytes of the header of a unit: they depend on the model alone.
fn header_bytes(unit: Unit, model: &Architecture) -> usize {
    let described = |(name, shape): &(&str, Vec<usize>)| 4 + name.len().next_multiple_of(4) + 4 * (2 + shape.len());
    PREAMBLE_BYTES + unit.tensors(model).iter().map(described).sum::<usize>()
}

/// The tensors of a unit of `length` bytes that begins with `bytes`, in the order of [`Unit::tensors`]. It must be exactly this
/// unit of this model, with matrices in any format.
///
/// # Errors
/// [`WeightsError::Unit`] says what differs; [`WeightsError::NoSuchBlock`].
pub(super) fn parse(
    bytes: &[u8],
    length: u64,
    unit: Unit,
    model: &Architecture,
) -> Result<Vec<EncodedTensor>, WeightsError> {
    unit.check(model)?;
    let fail = |reason: String| WeightsError::Unit { unit, reason };
    if !bytes.starts_with(&MAGIC) {
        return Err(fail("it does not begin as a model unit".to_owned()));
    }
    // What the header must be is known from the model but for the formats: these are read where they must stand, and then
    // all of it is compared.
    let other = || fail("its table is another unit's or another model's".to_owned());
    let (mut at, mut data) = (PREAMBLE_BYTES, header_bytes(unit, model) as u64);
    let mut tensors = Vec::new();
    for (name, shape) in unit.tensors(model) {
        at += 4 + name.len().next_multiple_of(4);
        let code = bytes.get(at..at + 4).ok_or_else(other)?;
        let code = u32::from_le_bytes([code[0], code[1], code[2], code[3]]);
        let format = Format::ALL
            .into_iter()
            .find(|&format| format_code(format) == code)
            .filter(|&format| format == Format::F32 || shape.len() == 2)
            .ok_or_else(other)?;
        at += 4 * (2 + shape.len());
        let words = layout(&shape, format).words();
        tensors.push(EncodedTensor {
            name,
            shape,
            format,
            at: data,
        });
        data = data.saturating_add((words as u64).saturating_mul(4));
    }
    let header = encode_header(unit, tensors.iter().map(|t| (t.name, &t.shape[..], t.format)));
    if !bytes.starts_with(&header) {
        return Err(other());
    }
    if length != data {
        return Err(fail(format!("it has {length} bytes, expected {data}")));
    }
    Ok(tensors)
}

/// What [`UnitData`](super::unit::UnitData) documents, up to the words.
pub(super) fn encode_header<'a>(unit: Unit, tensors: impl Iterator<Item = (&'a str, &'a [usize], Format)>) -> Vec<u8> {
    let (kind, block) = match unit {
        Unit::Embedding => (0, 0),
        Unit::Block(block) => (1, block as u32),
        Unit::Final => (2, 0),
    };
    let mut table = Vec::new();
    let mut count: u32 = 0;
    let mut version: u32 = 1;
    for (name, shape, format) in tensors {
        count += 1;
        if format.is_quantised() {
            version = 2;
        }
        table.extend((name.len() as u32).to_le_bytes());
        table.extend(name.as_bytes());
        table.resize(table.len().next_multiple_of(4), 0);
        table.extend(format_code(format).to_le_bytes());
        table.extend((shape.len() as u32).to_le_bytes());
        for &size in shape {
            table.extend((size as u32).to_le_bytes());
        }
    }
    let mut header = MAGIC.to_vec();
    for number in [version, kind, block, count] {
        header.extend(number.to_le_bytes());
    }
    header.extend(table);
    header
}

fn format_code(format: Format) -> u32 {
    match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q8 => 2,
        Format::Q4 => 3,
    }
}

/// The words that `bytes` are, little endian.
pub(super) fn words_of(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.as_chunks::<4>().0;
    words.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

/// Checks words that came from outside.
///
/// # Errors
/// [`WeightsError::Unit`] names the tensor.
pub(super) fn check_words(unit: Unit, name: &str, layout: Layout, words: &[u32]) -> Result<(), WeightsError> {
    layout.check(words).map_err(|error| {
        let reason = match error {
            FormatError::Padding { .. } => format!("the padding after tensor `{name}` is not zero"),
            FormatError::NotFinite { .. } => format!("tensor `{name}` holds a value that is not finite"),
            other => format!("tensor `{name}`: {other}"),
        };
        WeightsError::Unit { unit, reason }
    })
}

impl Embedding {
    /// The embedding of an encoded [`Unit::Embedding`] of `model`: its header is read now, its rows when they are needed, from
    /// `source`, which stays open and must not change.
    ///
    /// # Errors
    /// [`WeightsError::Unit`] when the bytes are another unit's or another model's, or not as many as the header says;
    /// [`WeightsError::Read`].
    pub fn stored(model: &Architecture, source: impl Source + 'static) -> Result<Self, WeightsError> {
        let unit = Unit::Embedding;
        let mut source: Box<dyn Source> = Box::new(source);
        let failed = |source| WeightsError::Read { unit, source };
        let length = source.seek(SeekFrom::End(0)).map_err(failed)?;
        let mut header = vec![0; header_bytes(unit, model).min(usize::try_from(length).unwrap_or(usize::MAX))];
        source
            .seek(SeekFrom::Start(0))
            .and_then(|_| source.read_exact(&mut header))
            .map_err(failed)?;
        let tensors = parse(&header, length, unit, model)?;
        let source = Arc::new(Mutex::new(source));
        let rows = tensors.into_iter().map(|tensor| {
            Rows::Stored(Arc::new(EncodedRows {
                source: source.clone(),
                tensor,
            }))
        });
        Ok(Self::new(model, rows.collect()))
    }
}

/// The rows of a matrix in the bytes of an embedding.
struct EncodedRows {
    source: Arc<Mutex<Box<dyn Source>>>,
    tensor: EncodedTensor,
}

impl RowSource for EncodedRows {
    fn read(&self, row: usize, values: &mut [f32]) -> Result<(), WeightsError> {
        let EncodedTensor { name, at, .. } = self.tensor;
        let unit = Unit::Embedding;
        let window = self.tensor.layout().window(row);
        let mut bytes = vec![0; 4 * window.layout.words()];
        {
            let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
            let mut rest = &mut bytes[..];
            for words in window.words {
                let (part, after) = rest.split_at_mut(4 * words.len());
                rest = after;
                if part.is_empty() {
                    continue;
                }
                source
                    .seek(SeekFrom::Start(at + 4 * words.start as u64))
                    .and_then(|_| source.read_exact(part))
                    .map_err(|source| WeightsError::Read { unit, source })?;
            }
        }
        let words = words_of(&bytes);
        check_words(unit, name, window.layout, &words)?;
        window.layout.decode_row(&words, window.row, values);
        Ok(())
    }
}

impl fmt::Debug for EncodedRows {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("EncodedRows")
            .field("tensor", &self.tensor)
            .finish_non_exhaustive()
    }
}
