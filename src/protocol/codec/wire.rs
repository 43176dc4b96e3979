//! Numbers, texts, lists and records to bytes and back: what everything else is put together from.
//!
//! Separate because here, and only here, lengths are compared with the bytes that are there.

use std::time::Duration;

use super::DecodeError;

/// The bytes still to be read.
pub(crate) struct Reader<'a> {
    pub bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or(DecodeError::Truncated(what))?;
        self.bytes = rest;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or(DecodeError::Truncated(what))?;
        self.bytes = rest;
        Ok(*taken)
    }

    /// A count whose elements take at least `element_bytes` each: refused when they cannot all be there.
    pub fn count(&mut self, element_bytes: usize, what: &'static str) -> Result<usize, DecodeError> {
        let count = u32::take(self)?;
        let count = usize::try_from(count).map_err(|_| DecodeError::Truncated(what))?;
        match count.checked_mul(element_bytes) {
            Some(bytes) if bytes <= self.bytes.len() => Ok(count),
            _ => Err(DecodeError::Truncated(what)),
        }
    }

    pub fn finish(self) -> Result<(), DecodeError> {
        match self.bytes.len() {
            0 => Ok(()),
            left => Err(DecodeError::Trailing(left)),
        }
    }
}

/// A value with a place in a frame.
pub(crate) trait Wire: Sized {
    /// The fewest bytes one value can take.
    const MIN_BYTES: usize;

    fn put(&self, out: &mut Vec<u8>);

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError>;
}

macro_rules! wire_number {
    ($($number:ty),*) => {$(
        impl Wire for $number {
            const MIN_BYTES: usize = size_of::<$number>();

            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok(<$number>::from_le_bytes(reader.array(stringify!($number))?))
            }
        }
    )*};
}

wire_number!(u8, u16, u32, u64, f32, f64);

impl Wire for bool {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match u8::take(reader)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(DecodeError::Unknown {
                what: "bool",
                value: value.into(),
            }),
        }
    }
}

impl<const N: usize> Wire for [u8; N] {
    const MIN_BYTES: usize = N;

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.array("a digest or identifier")
    }
}

/// Microseconds.
impl Wire for Duration {
    const MIN_BYTES: usize = 8;

    fn put(&self, out: &mut Vec<u8>) {
        u64::try_from(self.as_micros()).unwrap_or(u64::MAX).put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Duration::from_micros(u64::take(reader)?))
    }
}

/// Lengths are 32 bits: a frame is bounded far below that long before it is encoded.
pub(crate) fn put_length(length: usize, out: &mut Vec<u8>) {
    let length = u32::try_from(length).expect("a field of a frame is shorter than 4 GiB");
    length.put(out);
}

pub(crate) fn put_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    put_length(bytes.len(), out);
    out.extend_from_slice(bytes);
}

impl Wire for String {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(self.as_bytes(), out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let length = reader.count(1, "text")?;
        let bytes = reader.take(length, "text")?;
        Ok(std::str::from_utf8(bytes).map_err(|_| DecodeError::Text)?.to_owned())
    }
}

impl<T: Wire> Wire for Option<T> {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(if bool::take(reader)? {
            Some(T::take(reader)?)
        } else {
            None
        })
    }
}

impl Wire for Vec<u8> {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(self, out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let length = reader.count(1, "payload")?;
        Ok(reader.take(length, "payload")?.to_vec())
    }
}

macro_rules! wire_bulk {
    ($($number:ty),*) => {$(
        impl Wire for Vec<$number> {
            const MIN_BYTES: usize = 4;

            fn put(&self, out: &mut Vec<u8>) {
                put_length(self.len(), out);
                out.reserve(self.len() * size_of::<$number>());
                out.extend(self.iter().flat_map(|number| number.to_le_bytes()));
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                const BYTES: usize = size_of::<$number>();
                let count = reader.count(BYTES, "numbers")?;
                let bytes = reader.take(count * BYTES, "numbers")?;
                Ok(bytes.as_chunks::<BYTES>().0.iter().map(|bytes| <$number>::from_le_bytes(*bytes)).collect())
            }
        }
    )*};
}

wire_bulk!(f32, i32, u32);

/// Implements `Wire` for structs, field by field in the order given.
macro_rules! wire_struct {
    ($name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        impl Wire for $name {
            const MIN_BYTES: usize = 0 $(+ <$kind as Wire>::MIN_BYTES)*;

            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok($name { $($field: <$kind as Wire>::take(reader)?),* })
            }
        }
    };
}
pub(crate) use wire_struct;

/// Implements `Wire` for enums without data, one byte each.
macro_rules! wire_enum {
    ($name:ident { $($variant:ident = $value:literal),* $(,)? }) => {
        impl Wire for $name {
            const MIN_BYTES: usize = 1;

            fn put(&self, out: &mut Vec<u8>) {
                out.push(match self { $($name::$variant => $value),* });
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                match u8::take(reader)? {
                    $($value => Ok($name::$variant),)*
                    value => Err(DecodeError::Unknown { what: stringify!($name), value: value.into() }),
                }
            }
        }
    };
}
pub(super) use wire_enum;

/// Implements `Wire` for lists of small records. Numbers in bulk have their own, below.
macro_rules! wire_list {
    ($($element:ty),*) => {$(
        impl Wire for Vec<$element> {
            const MIN_BYTES: usize = 4;

            fn put(&self, out: &mut Vec<u8>) {
                put_length(self.len(), out);
                self.iter().for_each(|element| element.put(out));
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                let count = reader.count(<$element as Wire>::MIN_BYTES, stringify!($element))?;
                (0..count).map(|_| <$element as Wire>::take(reader)).collect()
            }
        }
    )*};
}
pub(crate) use wire_list;

/// Implements `Wire` for a pair of numbers that only their constructor can put together.
macro_rules! wire_checked {
    ($name:ident { $first:ident, $second:ident }) => {
        impl Wire for $name {
            const MIN_BYTES: usize = 16;

            fn put(&self, out: &mut Vec<u8>) {
                self.$first.put(out);
                self.$second.put(out);
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                let (first, second) = (f64::take(reader)?, f64::take(reader)?);
                $name::new(first, second).ok_or(DecodeError::Range(stringify!($name)))
            }
        }
    };
}
pub(super) use wire_checked;

wire_list!(String);
