//! The container: metadata and the table of tensors read from any seekable source, and ranges of its data.
//!
//! It is separate from the block types because it moves bytes whose meaning it does not know.

use std::collections::HashMap;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;

use super::blocks::{BlockType, Repacked, Repacker, Stored};
use super::metadata::{Metadata, Value};
use super::parser::Parser;
use super::{ALIGNMENT, ALIGNMENT_KEY, GgufError, MAGIC, shown};
use crate::model::archive::Source;
use crate::terms::format::{Format, FormatError};

/// Dimensions a tensor may have.
const MAX_DIMENSIONS: u32 = 4;
/// Bytes of a tensor read at a time.
const CHUNK: usize = 1 << 17;

/// A tensor's entry in the table.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    /// Sizes, the contiguous one first: a matrix of `rows` and `columns` is `[columns, rows]`.
    pub dimensions: Vec<u64>,
    pub stored: &'static Stored,
    /// Bytes of the tensor in the file.
    pub range: Range<u64>,
}

impl TensorInfo {
    /// Elements of the contiguous axis, and how many such rows there are.
    pub fn columns_and_rows(&self) -> (u64, u64) {
        let columns = self.dimensions.first().copied().unwrap_or(1);
        (columns, self.dimensions.iter().skip(1).product())
    }
}

/// Bytes of a tensor of these dimensions; `None` when they cannot be counted or rows are no whole blocks.
pub(super) fn tensor_bytes(dimensions: &[u64], stored: &Stored) -> Option<u64> {
    let elements = dimensions
        .iter()
        .try_fold(1u64, |product, &size| product.checked_mul(size))?;
    let whole = dimensions
        .first()
        .is_none_or(|columns| columns.is_multiple_of(stored.elements))
        && elements.is_multiple_of(stored.elements);
    (whole && elements <= i64::MAX as u64).then_some(())?;
    (elements / stored.elements).checked_mul(stored.bytes)
}

impl Parser<'_> {
    fn version(&mut self) -> Result<(), GgufError> {
        let file = self.file.to_owned();
        if self.left() < 4 || self.fixed::<4>("the header")? != MAGIC {
            return Err(GgufError::Magic { file });
        }
        match u32::from_le_bytes(self.fixed("the header")?) {
            2 | 3 => Ok(()),
            found if found & 0xffff == 0 && found != 0 => Err(GgufError::BigEndian { file }),
            found => Err(GgufError::Version { file, found }),
        }
    }

    fn metadata(&mut self, count: u64) -> Result<Metadata, GgufError> {
        // A key takes at least its length, a kind and a byte.
        let count = self.room(count, 13, "the metadata")?;
        let mut metadata = Metadata::default();
        for i in 0..count {
            let key = self.string(&format!("metadata key {i}"))?;
            let kind = u32::from_le_bytes(self.fixed(&key)?);
            let value = self.value(kind, &key)?;
            if metadata.get(&key).is_some() {
                return Err(self.damaged(format!("the metadata key `{}` is there twice", shown(&key))));
            }
            metadata.set(&key, value);
        }
        Ok(metadata)
    }

    /// An entry of the table, its range still relative to the data.
    fn tensor(&mut self, index: usize, alignment: u64) -> Result<TensorInfo, GgufError> {
        let name = self.string(&format!("the name of tensor {index}"))?;
        let what = format!("tensor `{}`", shown(&name));
        let count = u32::from_le_bytes(self.fixed(&what)?);
        if count > MAX_DIMENSIONS {
            return Err(self.damaged(format!(
                "{what} has {count} dimensions, at most {MAX_DIMENSIONS} are possible"
            )));
        }
        let mut dimensions = Vec::with_capacity(count as usize);
        for _ in 0..count {
            dimensions.push(u64::from_le_bytes(self.fixed(&what)?));
        }
        let id = u32::from_le_bytes(self.fixed(&what)?);
        let Some(stored) = Stored::from_id(id) else {
            return Err(self.damaged(format!("{what} is of unknown type {id}")));
        };
        let offset = u64::from_le_bytes(self.fixed(&what)?);
        let Some(bytes) = tensor_bytes(&dimensions, stored).filter(|&bytes| bytes > 0) else {
            return Err(self.damaged(format!(
                "{what} cannot have the dimensions {dimensions:?}: {} comes in blocks of {}",
                stored.name, stored.elements
            )));
        };
        if !offset.is_multiple_of(alignment) {
            return Err(self.damaged(format!(
                "{what} begins at {offset}, which is no multiple of {alignment}"
            )));
        }
        let Some(end) = offset.checked_add(bytes) else {
            return Err(self.damaged(format!("{what} ends beyond any file")));
        };
        Ok(TensorInfo {
            name,
            dimensions,
            stored,
            range: offset..end,
        })
    }

    fn tensors(&mut self, count: u64, alignment: u64) -> Result<Vec<TensorInfo>, GgufError> {
        // A name's length, the number of dimensions, a type and an offset.
        let count = self.room(count, 24, "the table of tensors")?;
        let mut tensors = Vec::with_capacity(count);
        for index in 0..count {
            tensors.push(self.tensor(index, alignment)?);
        }
        let data = self.position.next_multiple_of(alignment);
        let left = self.length.saturating_sub(data);
        for tensor in &mut tensors {
            if tensor.range.end > left {
                return Err(GgufError::Truncated {
                    file: self.file.to_owned(),
                    what: format!("tensor `{}`, up to its end,", shown(&tensor.name)),
                    needed: tensor.range.end,
                    left,
                });
            }
            tensor.range = data + tensor.range.start..data + tensor.range.end;
        }
        let mut order: Vec<&TensorInfo> = tensors.iter().collect();
        order.sort_by_key(|tensor| tensor.range.start);
        for pair in order.windows(2) {
            if pair[1].range.start < pair[0].range.end {
                let (first, second) = (shown(&pair[0].name), shown(&pair[1].name));
                return Err(self.damaged(format!("tensors `{first}` and `{second}` overlap")));
            }
        }
        Ok(tensors)
    }
}

/// An open GGUF file whose metadata and table have been checked against its length.
pub struct Gguf {
    file: String,
    source: Box<dyn Source>,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Gguf")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl Gguf {
    /// Reads and checks everything before the data. `file` names the file in errors.
    ///
    /// # Errors
    /// [`GgufError`] when it is no GGUF file of a known version, or its table does not describe ranges of its bytes.
    pub fn open(file: &str, source: impl Source + 'static) -> Result<Self, GgufError> {
        let mut source: Box<dyn Source> = Box::new(source);
        let read_error = |source| GgufError::Read {
            file: file.to_owned(),
            source,
        };
        let length = source.seek(SeekFrom::End(0)).map_err(read_error)?;
        source.seek(SeekFrom::Start(0)).map_err(read_error)?;
        let mut parser = Parser {
            file,
            source: BufReader::new(&mut *source),
            position: 0,
            length,
        };
        parser.version()?;
        let tensors = u64::from_le_bytes(parser.fixed("the header")?);
        let keys = u64::from_le_bytes(parser.fixed("the header")?);
        let metadata = parser.metadata(keys)?;
        let alignment = match metadata.get(ALIGNMENT_KEY) {
            None => u64::from(ALIGNMENT),
            Some(Value::U32(alignment)) if alignment.is_power_of_two() => u64::from(*alignment),
            Some(found) => {
                return Err(GgufError::Key {
                    file: file.to_owned(),
                    key: ALIGNMENT_KEY.to_owned(),
                    found: found.shown(),
                    expected: "a power of two".to_owned(),
                });
            }
        };
        let tensors = parser.tensors(tensors, alignment)?;
        let mut index = HashMap::with_capacity(tensors.len());
        for (i, tensor) in tensors.iter().enumerate() {
            if index.insert(tensor.name.clone(), i).is_some() {
                return Err(parser.damaged(format!("tensor `{}` is there twice", shown(&tensor.name))));
            }
        }
        drop(parser);
        Ok(Self {
            file: file.to_owned(),
            source,
            metadata,
            tensors,
            index,
        })
    }

    /// Opens a file on disk.
    ///
    /// # Errors
    /// As [`Gguf::open`]; [`GgufError::Read`] with the path.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open_path(path: &std::path::Path) -> Result<Self, GgufError> {
        let file = path.display().to_string();
        match std::fs::File::open(path) {
            Ok(source) => Self::open(&file, source),
            Err(source) => Err(GgufError::Read { file, source }),
        }
    }

    /// The name the file was opened with.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// What the file says of itself.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The table, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// A tensor's entry in the table, if the file has it.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// Checks that a tensor is there and has the shape, sizes in Hugging Face's order: the contiguous one last.
    ///
    /// # Errors
    /// [`GgufError::Missing`], [`GgufError::Shape`].
    pub fn check(&self, name: &str, expected: &[usize]) -> Result<&TensorInfo, GgufError> {
        let info = self.tensor(name).ok_or_else(|| GgufError::Missing {
            file: self.file.clone(),
            tensor: shown(name),
        })?;
        let same = info.dimensions.len() == expected.len()
            && info
                .dimensions
                .iter()
                .rev()
                .zip(expected)
                .all(|(&found, &expected)| found == expected as u64);
        if !same {
            return Err(GgufError::Shape {
                file: self.file.clone(),
                tensor: shown(name),
                expected: expected.to_vec(),
                found: info.dimensions.iter().rev().copied().collect(),
            });
        }
        Ok(info)
    }

    /// The type of a tensor, when it is one that can be read.
    ///
    /// # Errors
    /// [`GgufError::Type`].
    pub fn block_type(&self, info: &TensorInfo) -> Result<BlockType, GgufError> {
        info.stored.block.ok_or_else(|| GgufError::Type {
            file: self.file.clone(),
            tensor: shown(&info.name),
            found: info.stored.name,
        })
    }

    /// All values of a tensor as f32, row major.
    ///
    /// # Errors
    /// As [`Gguf::check`] and [`Gguf::block_type`]; [`GgufError::Read`]; [`GgufError::Format`] when a value is not
    /// finite.
    pub fn read(&mut self, name: &str, expected: &[usize]) -> Result<Vec<f32>, GgufError> {
        let info = self.check(name, expected)?.clone();
        let block = self.block_type(&info)?;
        // The table has been compared with the file: a weight of the narrowest type takes 18 bytes in 32.
        let mut values = Vec::with_capacity(expected.iter().product());
        self.for_each_chunk(&info, |bytes| {
            block.decode_into(bytes, &mut values);
            Ok(())
        })?;
        let columns = expected.last().copied().unwrap_or(1);
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(element) => {
                let row = element / columns;
                Err(format_error(&self.file, &info, FormatError::NotFinite { row }))
            }
        }
    }

    /// A matrix in the format that holds its type without loss, or in `format` when one is given.
    ///
    /// # Errors
    /// As [`Gguf::read`]; [`GgufError::Format`] names a value that the format cannot hold.
    pub fn packed(&mut self, name: &str, expected: [usize; 2], format: Option<Format>) -> Result<Repacked, GgufError> {
        let info = self.check(name, &expected)?.clone();
        let block = self.block_type(&info)?;
        let attempt = |gguf: &mut Self, format| {
            let mut repacker = Repacker::new(block, expected[0], expected[1], format);
            let file = gguf.file.clone();
            gguf.for_each_chunk(&info, |bytes| {
                repacker
                    .push(bytes)
                    .map_err(|source| format_error(&file, &info, source))
            })?;
            repacker.finish().map_err(|source| format_error(&file, &info, source))
        };
        let first = attempt(self, format);
        match block.fallback() {
            Some(wider) if format.is_none() && matches!(first, Err(GgufError::Format { .. })) => {
                attempt(self, Some(wider))
            }
            _ => first,
        }
    }

    /// The given rows of a matrix as f32, into `values` of `rows.len() · columns`: an embedding is gathered without
    /// being loaded.
    ///
    /// # Errors
    /// As [`Gguf::read`]; [`GgufError::Row`].
    ///
    /// # Panics
    /// When `values` has another length.
    pub fn rows(
        &mut self,
        name: &str,
        expected: [usize; 2],
        rows: impl ExactSizeIterator<Item = usize>,
        values: &mut [f32],
    ) -> Result<(), GgufError> {
        let info = self.check(name, &expected)?.clone();
        let block = self.block_type(&info)?;
        let [count, columns] = expected;
        assert_eq!(values.len(), rows.len() * columns, "rows of {}", info.name);
        let row_bytes = (info.range.end - info.range.start) / count as u64;
        let mut bytes = vec![0; row_bytes as usize];
        let mut decoded = Vec::with_capacity(columns);
        for (row, values) in rows.zip(values.chunks_exact_mut(columns)) {
            if row >= count {
                return Err(GgufError::Row {
                    file: self.file.clone(),
                    tensor: shown(name),
                    row,
                    rows: count,
                });
            }
            self.read_at(info.range.start + row as u64 * row_bytes, &mut bytes)?;
            decoded.clear();
            block.decode_into(&bytes, &mut decoded);
            values.copy_from_slice(&decoded);
            if values.iter().any(|value| !value.is_finite()) {
                return Err(format_error(&self.file, &info, FormatError::NotFinite { row }));
            }
        }
        Ok(())
    }

    /// Whether two tensors are stored alike, bit for bit.
    ///
    /// # Errors
    /// [`GgufError::Missing`], [`GgufError::Read`].
    pub fn equal(&mut self, left: &str, right: &str) -> Result<bool, GgufError> {
        let find = |name: &str| {
            self.tensor(name).cloned().ok_or_else(|| GgufError::Missing {
                file: self.file.clone(),
                tensor: shown(name),
            })
        };
        let (left, right) = (find(left)?, find(right)?);
        if left.stored != right.stored || left.dimensions != right.dimensions {
            return Ok(false);
        }
        let mut other = Vec::new();
        let mut at = right.range.start;
        for start in left.range.clone().step_by(CHUNK) {
            let length = (CHUNK as u64).min(left.range.end - start) as usize;
            let mut bytes = vec![0; length];
            other.resize(length, 0);
            self.read_at(start, &mut bytes)?;
            self.read_at(at, &mut other)?;
            at += length as u64;
            if bytes != other {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Hands the bytes of a tensor to `consume` in order, some whole blocks at a time.
    ///
    /// # Errors
    /// [`GgufError::Read`]; whatever `consume` returns.
    pub fn for_each_chunk(
        &mut self,
        info: &TensorInfo,
        mut consume: impl FnMut(&[u8]) -> Result<(), GgufError>,
    ) -> Result<(), GgufError> {
        let chunk = CHUNK as u64 / info.stored.bytes * info.stored.bytes;
        let mut bytes = Vec::new();
        let mut start = info.range.start;
        while start < info.range.end {
            bytes.resize(chunk.min(info.range.end - start) as usize, 0);
            self.read_at(start, &mut bytes)?;
            consume(&bytes)?;
            start += bytes.len() as u64;
        }
        Ok(())
    }

    fn read_at(&mut self, start: u64, bytes: &mut [u8]) -> Result<(), GgufError> {
        self.source
            .seek(SeekFrom::Start(start))
            .and_then(|_| self.source.read_exact(bytes))
            .map_err(|source| GgufError::Read {
                file: self.file.clone(),
                source,
            })
    }
}

fn format_error(file: &str, info: &TensorInfo, source: FormatError) -> GgufError {
    GgufError::Format {
        file: file.to_owned(),
        tensor: shown(&info.name),
        source,
    }
}
