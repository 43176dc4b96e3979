//! GGUF files, the form in which llama.cpp keeps a model: one file with metadata, tokenizer and tensors, mostly
//! quantised.
//!
//! `container` reads the file and `writer` writes it, with the `metadata` of every kind; `blocks` are the types its
//! tensors are stored in; `header` turns metadata into the shape of a model; `names` translates tensor names and row
//! orders between GGUF and Hugging Face; `model` joins these; `tokenizer` makes a `tokenizer.json` of the vocabulary
//! inside, and `vocabulary` puts one into a file. It is separate from `weights` because nothing here knows how a model is run, and it takes every length in a
//! file as a claim: nothing is allocated before the claim is compared with the bytes that are left.

#[doc(hidden)]
pub mod blocks;
pub mod container;
#[doc(hidden)]
pub mod header;
#[doc(hidden)]
pub mod metadata;
pub mod model;
#[doc(hidden)]
pub mod names;
mod parser;
pub mod tokenizer;
mod vocabulary;
#[doc(hidden)]
pub mod writer;

use crate::terms::format::FormatError;

const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of tensor data when the metadata says nothing.
const ALIGNMENT: u32 = 32;
/// The metadata key of another alignment.
const ALIGNMENT_KEY: &str = "general.alignment";

/// Why a GGUF file was refused, or could not be written. `file` is the name it was opened with.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("cannot read {file}: {source}")]
    Read { file: String, r#source: std::io::Error },
    #[error("{file} is not a GGUF file: it does not begin with the letters GGUF")]
    Magic { file: String },
    #[error(
        "{file} is a big-endian GGUF file: only little-endian ones are read; convert it with gguf_convert_endian.py"
    )]
    BigEndian { file: String },
    #[error("{file} is GGUF version {found}: versions 2 and 3 are read")]
    Version { file: String, found: u32 },
    #[error("{file} is truncated or damaged: {what} takes {needed} bytes and {left} are left")]
    Truncated {
        file: String,
        what: String,
        needed: u64,
        left: u64,
    },
    #[error("{file} is damaged: {reason}")]
    Damaged { file: String, reason: String },
    #[error("{file} has no `{key}` in its metadata")]
    MissingKey { file: String, key: String },
    #[error("{file}: `{key}` is {found}, expected {expected}")]
    Key {
        file: String,
        key: String,
        found: String,
        expected: String,
    },
    #[error("{file}: {what} is not supported; {supported}")]
    Unsupported {
        file: String,
        what: String,
        supported: &'static str,
    },
    #[error("{file} has no tensor `{tensor}`")]
    Missing { file: String, tensor: String },
    #[error("{file}: tensor `{tensor}` has shape {found:?}, expected {expected:?}")]
    Shape {
        file: String,
        tensor: String,
        expected: Vec<usize>,
        found: Vec<u64>,
    },
    #[error("{file}: tensor `{tensor}` has {rows} rows, and row {row} was asked for")]
    Row {
        file: String,
        tensor: String,
        row: usize,
        rows: usize,
    },
    #[error(
        "{file}: tensor `{tensor}` is stored as {found}; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and \
         Q6_K can be read: take a file in one of these, such as the model's Q8_0 or Q4_K_M"
    )]
    Type {
        file: String,
        tensor: String,
        found: &'static str,
    },
    #[error("{file}: tensor `{tensor}`: {source}")]
    Format {
        file: String,
        tensor: String,
        r#source: FormatError,
    },
}

/// Text of a file for an error message, cut when it is long.
fn shown(text: &str) -> String {
    if text.chars().count() <= 80 {
        text.to_owned()
    } else {
        text.chars().take(80).chain("…".chars()).collect()
    }
}
