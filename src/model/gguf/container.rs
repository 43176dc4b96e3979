//! The container: metadata and the table of tensors read from any seekable source, ranges of its data, and the writer.
//!
//! It is separate from the block types because it moves bytes whose meaning it does not know.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use super::blocks::{BlockType, Repacked, Repacker, Stored};
use super::{GgufError, shown};
use crate::model::archive::Source;
use crate::terms::format::{Format, FormatError};

const MAGIC: [u8; 4] = *b"GGUF";
/// The version written.
const VERSION: u32 = 3;
/// Alignment of tensor data when the metadata says nothing.
const ALIGNMENT: u32 = 32;
/// The metadata key of another alignment.
pub const ALIGNMENT_KEY: &str = "general.alignment";
/// Arrays inside arrays are read to this depth.
const MAX_DEPTH: usize = 8;
/// Dimensions a tensor may have.
const MAX_DIMENSIONS: u32 = 4;
/// Bytes of a tensor read at a time.
const CHUNK: usize = 1 << 17;

macro_rules! numbers {
    ($($kind:ident($number:ty) = $id:literal),* $(,)?) => {
        /// One metadata value.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Value {
            $($kind($number),)*
            Bool(bool),
            String(String),
            Array(Array),
        }

        /// A metadata array, all of one kind.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Array {
            $($kind(Vec<$number>),)*
            Bool(Vec<bool>),
            String(Vec<String>),
            Array(Vec<Array>),
        }

        impl Value {
            fn kind(&self) -> u32 {
                match self {
                    $(Value::$kind(_) => $id,)*
                    Value::Bool(_) => BOOL,
                    Value::String(_) => STRING,
                    Value::Array(_) => ARRAY,
                }
            }

            fn write(&self, bytes: &mut Vec<u8>) {
                match self {
                    $(Value::$kind(value) => bytes.extend(value.to_le_bytes()),)*
                    Value::Bool(value) => bytes.push(u8::from(*value)),
                    Value::String(value) => write_string(value, bytes),
                    Value::Array(value) => value.write(bytes),
                }
            }
        }

        impl Array {
            fn kind(&self) -> u32 {
                match self {
                    $(Array::$kind(_) => $id,)*
                    Array::Bool(_) => BOOL,
                    Array::String(_) => STRING,
                    Array::Array(_) => ARRAY,
                }
            }

            pub fn len(&self) -> usize {
                match self {
                    $(Array::$kind(values) => values.len(),)*
                    Array::Bool(values) => values.len(),
                    Array::String(values) => values.len(),
                    Array::Array(values) => values.len(),
                }
            }

            fn write(&self, bytes: &mut Vec<u8>) {
                bytes.extend(self.kind().to_le_bytes());
                bytes.extend((self.len() as u64).to_le_bytes());
                match self {
                    $(Array::$kind(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),)*
                    Array::Bool(values) => bytes.extend(values.iter().map(|&value| u8::from(value))),
                    Array::String(values) => values.iter().for_each(|value| write_string(value, bytes)),
                    Array::Array(values) => values.iter().for_each(|value| value.write(bytes)),
                }
            }
        }

        $(impl From<$number> for Value {
            fn from(value: $number) -> Self {
                Value::$kind(value)
            }
        }

        impl From<Vec<$number>> for Value {
            fn from(values: Vec<$number>) -> Self {
                Value::Array(Array::$kind(values))
            }
        })*

        impl Parser<'_> {
            fn value(&mut self, kind: u32, key: &str) -> Result<Value, GgufError> {
                Ok(match kind {
                    $($id => Value::$kind(<$number>::from_le_bytes(self.fixed(key)?)),)*
                    BOOL => Value::Bool(self.bools(1, key)?[0]),
                    STRING => Value::String(self.string(key)?),
                    ARRAY => Value::Array(self.array(key, 0)?),
                    _ => return Err(self.damaged(format!("`{}` has a value of unknown kind {kind}", shown(key)))),
                })
            }

            fn array(&mut self, key: &str, depth: usize) -> Result<Array, GgufError> {
                if depth == MAX_DEPTH {
                    return Err(self.damaged(format!("`{}` has arrays nested deeper than {MAX_DEPTH}", shown(key))));
                }
                let kind = u32::from_le_bytes(self.fixed(key)?);
                let count = u64::from_le_bytes(self.fixed(key)?);
                Ok(match kind {
                    $($id => {
                        let bytes = self.bytes(count.saturating_mul(size_of::<$number>() as u64), key)?;
                        let values = bytes.as_chunks().0.iter().map(|&value| <$number>::from_le_bytes(value));
                        Array::$kind(values.collect())
                    })*
                    BOOL => Array::Bool(self.bools(count, key)?),
                    // A string takes at least its length, an array its kind and length.
                    STRING => {
                        let count = self.room(count, 8, key)?;
                        let mut values = Vec::with_capacity(count);
                        for _ in 0..count {
                            values.push(self.string(key)?);
                        }
                        Array::String(values)
                    }
                    ARRAY => {
                        let count = self.room(count, 12, key)?;
                        let mut values = Vec::with_capacity(count);
                        for _ in 0..count {
                            values.push(self.array(key, depth + 1)?);
                        }
                        Array::Array(values)
                    }
                    _ => return Err(self.damaged(format!("`{}` has an array of unknown kind {kind}", shown(key)))),
                })
            }
        }
    };
}

const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
numbers! {
    U8(u8) = 0, I8(i8) = 1, U16(u16) = 2, I16(i16) = 3, U32(u32) = 4, I32(i32) = 5, F32(f32) = 6,
    U64(u64) = 10, I64(i64) = 11, F64(f64) = 12,
}

impl Array {
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers of an array of any integer kind that fit.
    pub fn integers(&self) -> Option<Vec<i64>> {
        Some(match self {
            Array::U8(values) => values.iter().map(|&value| i64::from(value)).collect(),
            Array::I8(values) => values.iter().map(|&value| i64::from(value)).collect(),
            Array::U16(values) => values.iter().map(|&value| i64::from(value)).collect(),
            Array::I16(values) => values.iter().map(|&value| i64::from(value)).collect(),
            Array::U32(values) => values.iter().map(|&value| i64::from(value)).collect(),
            Array::I32(values) => values.iter().map(|&value| i64::from(value)).collect(),
            Array::U64(values) => values
                .iter()
                .map(|&value| value.try_into().ok())
                .collect::<Option<_>>()?,
            Array::I64(values) => values.clone(),
            _ => return None,
        })
    }
}

impl Value {
    /// A number of any integer kind that is not negative.
    pub fn unsigned(&self) -> Option<u64> {
        match *self {
            Value::U8(value) => Some(value.into()),
            Value::U16(value) => Some(value.into()),
            Value::U32(value) => Some(value.into()),
            Value::U64(value) => Some(value),
            Value::I8(value) => value.try_into().ok(),
            Value::I16(value) => value.try_into().ok(),
            Value::I32(value) => value.try_into().ok(),
            Value::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// A number of either float kind.
    pub fn float(&self) -> Option<f64> {
        match *self {
            Value::F32(value) => Some(value.into()),
            Value::F64(value) => Some(value),
            _ => None,
        }
    }

    pub fn string(&self) -> Option<&str> {
        match self {
            Value::String(value) => Some(value),
            _ => None,
        }
    }

    pub fn bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }

    pub fn strings(&self) -> Option<&[String]> {
        match self {
            Value::Array(Array::String(values)) => Some(values),
            _ => None,
        }
    }

    /// The value for an error message, cut when it is long.
    pub fn shown(&self) -> String {
        match self {
            Value::String(value) => format!("\"{}\"", shown(value)),
            Value::Array(array) => format!("an array of {}", array.len()),
            Value::Bool(value) => value.to_string(),
            _ => match (self.unsigned(), self.float()) {
                (Some(value), _) => value.to_string(),
                (_, Some(value)) => value.to_string(),
                _ => "a negative number".to_owned(),
            },
        }
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Value::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::String(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Value::String(value)
    }
}

impl From<Vec<String>> for Value {
    fn from(values: Vec<String>) -> Self {
        Value::Array(Array::String(values))
    }
}

fn write_string(text: &str, bytes: &mut Vec<u8>) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// Keys and values in the order of the file; a key is there once.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl Metadata {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// Sets a value, in the place of the key's former one or at the end.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        match self.index.get(key) {
            Some(&i) => self.entries[i].1 = value.into(),
            None => {
                self.index.insert(key.to_owned(), self.entries.len());
                self.entries.push((key.to_owned(), value.into()));
            }
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }
}

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
fn tensor_bytes(dimensions: &[u64], stored: &Stored) -> Option<u64> {
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

/// Reads forward through the header, counting what is left.
struct Parser<'a> {
    file: &'a str,
    source: BufReader<&'a mut dyn Source>,
    position: u64,
    length: u64,
}

impl Parser<'_> {
    fn damaged(&self, reason: String) -> GgufError {
        GgufError::Damaged {
            file: self.file.to_owned(),
            reason,
        }
    }

    fn left(&self) -> u64 {
        self.length - self.position
    }

    /// Checks that `count` things of at least `bytes` each can still come.
    fn room(&self, count: u64, bytes: u64, what: &str) -> Result<usize, GgufError> {
        let needed = count.saturating_mul(bytes);
        match usize::try_from(count) {
            Ok(count) if needed <= self.left() => Ok(count),
            _ => Err(GgufError::Truncated {
                file: self.file.to_owned(),
                what: shown(what),
                needed,
                left: self.left(),
            }),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), GgufError> {
        self.position += bytes.len() as u64;
        self.source.read_exact(bytes).map_err(|source| GgufError::Read {
            file: self.file.to_owned(),
            source,
        })
    }

    fn bytes(&mut self, count: u64, what: &str) -> Result<Vec<u8>, GgufError> {
        let mut bytes = vec![0; self.room(count, 1, what)?];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        self.room(N as u64, 1, what)?;
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let length = u64::from_le_bytes(self.fixed(what)?);
        let bytes = self.bytes(length, what)?;
        String::from_utf8(bytes).map_err(|_| self.damaged(format!("a text of {} is not UTF-8", shown(what))))
    }

    fn bools(&mut self, count: u64, what: &str) -> Result<Vec<bool>, GgufError> {
        let bytes = self.bytes(count, what)?;
        if bytes.iter().any(|&byte| byte > 1) {
            return Err(self.damaged(format!("`{}` holds a truth value that is neither 0 nor 1", shown(what))));
        }
        Ok(bytes.iter().map(|&byte| byte == 1).collect())
    }

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
    /// As [`Gguf::check`] and [`Gguf::block_type`]; [`GgufError::Read`]; [`GgufError::Format`] when a value is not finite.
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

    /// The given rows of a matrix as f32, into `values` of `rows.len() · columns`: an embedding is gathered without being loaded.
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

/// Writes a GGUF file forward, tensor after tensor, to any output.
#[derive(Debug)]
pub struct GgufWriter<W> {
    output: W,
    alignment: u64,
    /// Names and bytes of the tensors.
    tensors: Vec<(String, u64)>,
    /// The tensor being written, and how much of it has been.
    current: usize,
    written: u64,
}

impl<W: Write> GgufWriter<W> {
    /// Writes the header and the table: names, dimensions (the contiguous one first) and types in the order of the data.
    ///
    /// # Errors
    /// The output's.
    ///
    /// # Panics
    /// When a tensor's rows are no whole blocks of its type, or the metadata's alignment is no power of two.
    pub fn begin(mut output: W, metadata: &Metadata, table: &[(String, Vec<u64>, BlockType)]) -> io::Result<Self> {
        let alignment = match metadata.get(ALIGNMENT_KEY) {
            None => ALIGNMENT,
            Some(Value::U32(alignment)) if alignment.is_power_of_two() => *alignment,
            Some(other) => panic!("an alignment of {}", other.shown()),
        };
        let alignment = u64::from(alignment);
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((table.len() as u64).to_le_bytes());
        header.extend((metadata.entries.len() as u64).to_le_bytes());
        for (key, value) in metadata.iter() {
            write_string(key, &mut header);
            header.extend(value.kind().to_le_bytes());
            value.write(&mut header);
        }
        let mut offset = 0;
        let mut tensors = Vec::with_capacity(table.len());
        for (name, dimensions, block) in table {
            write_string(name, &mut header);
            header.extend((dimensions.len() as u32).to_le_bytes());
            header.extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
            header.extend(block.stored().id.to_le_bytes());
            header.extend(u64::to_le_bytes(offset));
            let Some(bytes) = tensor_bytes(dimensions, block.stored()) else {
                panic!("`{name}` of {dimensions:?} in {block}");
            };
            tensors.push((name.clone(), bytes));
            offset = (offset + bytes).next_multiple_of(alignment);
        }
        header.resize(header.len().next_multiple_of(alignment as usize), 0);
        output.write_all(&header)?;
        Ok(Self {
            output,
            alignment,
            tensors,
            current: 0,
            written: 0,
        })
    }

    /// Writes the next bytes of the next tensor; a piece may end anywhere, but not in another tensor.
    ///
    /// # Errors
    /// The output's.
    ///
    /// # Panics
    /// When the bytes are more than the tensor still has.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some((name, size)) = self.tensors.get(self.current) else {
            panic!("{} bytes after the last tensor", bytes.len());
        };
        self.written += bytes.len() as u64;
        assert!(
            self.written <= *size,
            "{} bytes of `{name}`, which has {size}",
            self.written
        );
        self.output.write_all(bytes)?;
        if self.written == *size {
            let padding = size.next_multiple_of(self.alignment) - size;
            self.output.write_all(&vec![0; padding as usize])?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Flushes the file when every tensor has been written.
    ///
    /// # Errors
    /// The output's.
    ///
    /// # Panics
    /// When tensors are missing.
    pub fn finish(mut self) -> io::Result<W> {
        if let Some((name, size)) = self.tensors.get(self.current) {
            panic!("`{name}` ends after {} of {size} bytes", self.written);
        }
        self.output.flush()?;
        Ok(self.output)
    }
}
