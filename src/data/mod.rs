//! Text into examples, examples into batches.
//!
//! `reader` recognises the file formats, `chat` lays conversations out and says what of them is learned, `template`
//! runs chat templates and `tokenizer` turns text into ids (both natively; a browser does them in JavaScript), `batch`
//! pads, shuffles and remembers where a run stands, `shard` divides examples among clients. Nothing here knows a model
//! beyond its vocabulary size and longest sequence.

pub(crate) mod batch;
#[doc(hidden)]
pub mod chat;
pub(crate) mod json;
#[doc(hidden)]
pub mod reader;
pub(crate) mod shard;
#[cfg(not(target_arch = "wasm32"))]
#[doc(hidden)]
pub mod template;
#[cfg(not(target_arch = "wasm32"))]
#[doc(hidden)]
pub mod tokenizer;

pub use batch::{Batch, Batches, Cursor, pass};
pub use chat::{Conversation, Message, Render};
pub use reader::{Columns, Dataset, Document, Encoded, Format, Marks, Options, Summary, Tokenize};
pub use shard::Sharding;
#[cfg(not(target_arch = "wasm32"))]
pub use template::Template;
#[cfg(not(target_arch = "wasm32"))]
pub use tokenizer::{DecodeStream, Tokenizer};

use crate::terms::tensor::IGNORED_TARGET;

/// One tokenised example. `labels` is as long as `ids` and aligned with it, as in Hugging Face data sets:
/// the loss shifts, so `labels[t]` is predicted from `ids[..t]` and `labels[0]` never counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Token ids, or [`IGNORED_TARGET`].
    pub labels: Vec<i32>,
}

impl Example {
    /// Text of which every token is learned.
    pub fn text(ids: Vec<u32>) -> Self {
        let labels = ids.iter().map(|&id| id.cast_signed()).collect();
        Self { ids, labels }
    }

    /// Positions that are learned.
    pub fn target_count(&self) -> usize {
        self.labels
            .iter()
            .skip(1)
            .filter(|&&label| label != IGNORED_TARGET)
            .count()
    }
}

/// What is wrong with one line, element or row, in words that follow its place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Flaw(String);

impl Flaw {
    /// From words that can follow "line 3 ".
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// Why data, or the tokenizer for it, was refused.
#[expect(missing_docs, reason = "the messages say it")]
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("cannot read {path}: {source}")]
    Read { path: String, r#source: std::io::Error },
    #[error("{file}, line {line}: {reason} (--skip-bad-lines leaves such lines out)")]
    BadLine { file: String, line: usize, reason: String },
    #[error("{file} is {what} and cannot be read as it is: {advice}")]
    NotText {
        file: String,
        what: &'static str,
        advice: &'static str,
    },
    #[error("{file}, line {line}: {reason}")]
    Broken { file: String, line: usize, reason: String },
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
    #[error(
        "{file} is {format} of conversations, and the model has no chat template to write them by: give one with --chat-template FILE, or the common ChatML with --chat-template chatml"
    )]
    NoTemplate { file: String, format: Format },
    #[error("the chat template cannot be used: {reason} (--chat-template FILE gives another)")]
    Template { reason: String },
    #[error("{file} is not a usable tokenizer file: {reason}")]
    Tokenizer { file: String, reason: String },
    #[error(
        "the tokenizer has token ids up to {} but the model's vocabulary has only {model} entries: they do not belong together",
        .tokenizer - 1
    )]
    VocabularyMismatch { tokenizer: usize, model: usize },
    #[error(
        "no file of the model names its end-of-text token (eos_token in tokenizer_config.json, eos_token_id in config.json), and the tokenizer has no <|endoftext|>"
    )]
    NoEndToken,
    #[error("cannot tokenise {text:?}: {reason}")]
    Encode { text: String, reason: String },
    #[error("token id {id} is outside the model's vocabulary of {vocab}")]
    Token { id: u32, vocab: usize },
    #[error("{found} texts were tokenised, expected {expected}")]
    TextCount { expected: usize, found: usize },
}
