//! A forward reader that compares every length with the bytes left before it allocates.
//!
//! It is separate from the container because metadata and table are read through it alike.

use std::io::{BufReader, Read};

use super::{GgufError, shown};
use crate::model::archive::Source;

/// Reads forward through the header, counting what is left.
pub(super) struct Parser<'a> {
    pub(super) file: &'a str,
    pub(super) source: BufReader<&'a mut dyn Source>,
    pub(super) position: u64,
    pub(super) length: u64,
}

impl Parser<'_> {
    pub(super) fn damaged(&self, reason: String) -> GgufError {
        GgufError::Damaged {
            file: self.file.to_owned(),
            reason,
        }
    }

    pub(super) fn left(&self) -> u64 {
        self.length - self.position
    }

    /// Checks that `count` things of at least `bytes` each can still come.
    pub(super) fn room(&self, count: u64, bytes: u64, what: &str) -> Result<usize, GgufError> {
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

    pub(super) fn bytes(&mut self, count: u64, what: &str) -> Result<Vec<u8>, GgufError> {
        let mut bytes = vec![0; self.room(count, 1, what)?];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        self.room(N as u64, 1, what)?;
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let length = u64::from_le_bytes(self.fixed(what)?);
        let bytes = self.bytes(length, what)?;
        String::from_utf8(bytes).map_err(|_| self.damaged(format!("a text of {} is not UTF-8", shown(what))))
    }

    pub(super) fn bools(&mut self, count: u64, what: &str) -> Result<Vec<bool>, GgufError> {
        let bytes = self.bytes(count, what)?;
        if bytes.iter().any(|&byte| byte > 1) {
            return Err(self.damaged(format!("`{}` holds a truth value that is neither 0 nor 1", shown(what))));
        }
        Ok(bytes.iter().map(|&byte| byte == 1).collect())
    }
}
