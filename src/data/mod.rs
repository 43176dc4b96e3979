//! Text into examples, examples into batches.
//!
//! `reader` recognises the file formats, `tokenizer` turns text into ids (natively; a browser hands over ids it
//! made itself), `batch` pads, shuffles and remembers where a run stands, `shard` divides examples among
//! clients. Nothing here knows a model beyond its vocabulary size and longest sequence.

pub mod batch;
pub mod reader;
pub mod shard;
#[cfg(not(target_arch = "wasm32"))]
pub mod tokenizer;

pub use batch::{Batch, Batches, Cursor, pass};
pub use reader::{Dataset, Document, Format, Options, Summary, Tokenize};
pub use shard::Sharding;
#[cfg(not(target_arch = "wasm32"))]
pub use tokenizer::Tokenizer;

/// The label of a position that is not learned.
pub const IGNORED: i32 = -100;

/// One tokenised example. `labels` is as long as `ids` and aligned with it, as in Hugging Face data sets:
/// the loss shifts, so `labels[t]` is predicted from `ids[..t]` and `labels[0]` never counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<u32>,
    /// Token ids, or [`IGNORED`].
    pub labels: Vec<i32>,
}

impl Example {
    /// Positions that are learned.
    pub fn target_count(&self) -> usize {
        self.labels.iter().skip(1).filter(|&&label| label != IGNORED).count()
    }
}

/// Why data, or the tokenizer for it, was refused.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("cannot read {path}: {source}")]
    Read { path: String, r#source: std::io::Error },
    #[error("{file}, line {line}: {reason} (--skip-bad-lines leaves such lines out)")]
    BadLine { file: String, line: usize, reason: String },
    #[error("{name} holds no example to learn from{}", .why.as_deref().map(|why| format!(": {why}")).unwrap_or_default())]
    NoExamples { name: String, why: Option<String> },
    #[error("{option} {reason}")]
    Option { option: &'static str, reason: String },
    #[error("the saved data cursor is at example {position} but there are {examples}: the data file has changed")]
    Cursor { position: u64, examples: usize },
    #[error("{examples} examples cannot be divided among {clients} clients: each needs at least one")]
    TooFewExamples { examples: usize, clients: usize },
    #[error(
        "{file} holds text, and the model has no tokenizer for it: put tokenizer.json, or vocab.json and merges.txt, beside its weights"
    )]
    NoTokenizer { file: String },
    #[error("{file} is not a usable tokenizer file: {reason}")]
    Tokenizer { file: String, reason: String },
    #[error(
        "the tokenizer has token ids up to {} but the model's vocabulary has only {model} entries: they do not belong together",
        .tokenizer - 1
    )]
    VocabularyMismatch { tokenizer: usize, model: usize },
    #[error("the tokenizer has no <|endoftext|> token and config.json names no eos_token_id")]
    NoEndToken,
    #[error("cannot tokenise {text:?}: {reason}")]
    Encode { text: String, reason: String },
    #[error("token id {id} is outside the model's vocabulary of {vocab}")]
    Token { id: u32, vocab: usize },
    #[error("{found} texts were tokenised, expected {expected}")]
    TextCount { expected: usize, found: usize },
}
