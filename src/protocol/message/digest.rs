//! SHA-256 digests: of files, adapters and activations.
//!
//! Separate because it is the one word of the protocol with an algorithm behind it.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

/// A SHA-256 digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// The digest of `parts`, one after the other.
    pub(crate) fn of_parts<const N: usize>(parts: [&[u8]; N]) -> Digest {
        let hasher = parts
            .iter()
            .fold(Sha256::new(), |hasher, part| hasher.chain_update(part));
        Digest(hasher.finalize().into())
    }

    /// The digest of a flat adapter: of its values as little-endian f32.
    pub fn of_values(values: &[f32]) -> Digest {
        let mut hasher = Sha256::new();
        for chunk in values.chunks(1024) {
            let mut bytes = [0_u8; 4096];
            for (slot, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(chunk) {
                *slot = value.to_le_bytes();
            }
            hasher.update(&bytes[..chunk.len() * 4]);
        }
        Digest(hasher.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// The text is not 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a digest is 64 hexadecimal digits")]
pub struct ParseDigestError;

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Digest, ParseDigestError> {
        let mut digest = [0_u8; 32];
        if text.len() != 64 || !text.is_ascii() {
            return Err(ParseDigestError);
        }
        for (byte, pair) in digest.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
            let high = char::from(pair[0]).to_digit(16).ok_or(ParseDigestError)?;
            let low = char::from(pair[1]).to_digit(16).ok_or(ParseDigestError)?;
            *byte = u8::try_from(high * 16 + low).map_err(|_| ParseDigestError)?;
        }
        Ok(Digest(digest))
    }
}
