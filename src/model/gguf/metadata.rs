//! Metadata: keys and values of every kind a GGUF file may hold, read and written.
//!
//! It is separate from the container because nothing here knows where a file keeps its tensors.

use std::collections::HashMap;

use super::parser::Parser;
use super::{GgufError, shown};

/// Arrays inside arrays are read to this depth.
const MAX_DEPTH: usize = 8;

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
            pub(super) fn kind(&self) -> u32 {
                match self {
                    $(Value::$kind(_) => $id,)*
                    Value::Bool(_) => BOOL,
                    Value::String(_) => STRING,
                    Value::Array(_) => ARRAY,
                }
            }

            pub(super) fn write(&self, bytes: &mut Vec<u8>) {
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

            /// How many elements it has.
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
            pub(super) fn value(&mut self, kind: u32, key: &str) -> Result<Value, GgufError> {
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
    /// Whether it has no element.
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
    pub(crate) fn unsigned(&self) -> Option<u64> {
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

    /// The text, if it is one.
    pub fn string(&self) -> Option<&str> {
        match self {
            Value::String(value) => Some(value),
            _ => None,
        }
    }

    /// Whether it holds, if it is a truth value.
    pub fn bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }

    pub(crate) fn strings(&self) -> Option<&[String]> {
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

pub(super) fn write_string(text: &str, bytes: &mut Vec<u8>) {
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
    /// The value of a key.
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

    /// How many elements it has.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }
}
