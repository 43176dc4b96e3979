//! The fingerprint of a certificate, as a join link carries it.
//!
//! Separate because servers make it, links carry it and dialling checks it, and to all three it is the same 32 bytes.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

/// SHA-256 of a certificate in DER. As text it is base64url without padding (RFC 4648, section 5): 43 characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const CHARACTERS: usize = 43;

impl Fingerprint {
    /// Of a certificate in DER.
    pub fn of(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // 256 bits in 43 groups of six, the last filled up with two zeros.
        for at in 0..CHARACTERS {
            let value = (0..6).fold(0, |value, bit| (value << 1) | self.bit(6 * at + bit));
            write!(f, "{}", char::from(ALPHABET[value]))?;
        }
        Ok(())
    }
}

impl Fingerprint {
    fn bit(&self, at: usize) -> usize {
        let byte = self.0.get(at / 8).copied().unwrap_or(0);
        usize::from(byte >> (7 - at % 8) & 1)
    }
}

/// The text is no fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a certificate's fingerprint is 43 letters, digits, - and _; copy the whole link again")]
pub struct ParseFingerprintError;

impl FromStr for Fingerprint {
    type Err = ParseFingerprintError;

    fn from_str(text: &str) -> Result<Self, ParseFingerprintError> {
        if text.len() != CHARACTERS {
            return Err(ParseFingerprintError);
        }
        let mut bytes = [0_u8; 33];
        for (at, character) in text.bytes().enumerate() {
            let value = ALPHABET
                .iter()
                .position(|letter| *letter == character)
                .ok_or(ParseFingerprintError)?;
            for bit in 0..6 {
                let (place, set) = (6 * at + bit, value >> (5 - bit) & 1 == 1);
                if set {
                    bytes[place / 8] |= 0x80 >> (place % 8);
                }
            }
        }
        // Two texts of one fingerprint would be one too many.
        match bytes.split_first_chunk::<32>() {
            Some((digest, [0])) => Ok(Self(*digest)),
            _ => Err(ParseFingerprintError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_base64url_of_sha_256() {
        // printf abc | openssl dgst -sha256 -binary | basenc --base64url
        let text = "ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0";
        assert_eq!(Fingerprint::of(b"abc").to_string(), text);
        assert_eq!(text.parse(), Ok(Fingerprint::of(b"abc")));
    }

    #[test]
    fn what_is_no_fingerprint_is_refused() {
        let text = Fingerprint::of(b"abc").to_string();
        for bad in [
            "",
            &text[1..],
            &format!("{text}A"),
            &text.replace('-', "+"),
            &format!("{}1", &text[..42]),
        ] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(ParseFingerprintError), "{bad}");
        }
    }
}
