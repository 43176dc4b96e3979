//! Data files: recognising the format by content, and turning what they hold into examples.
//!
//! Reading has phases so that every tokenizer and every chat template fits: [`Document::parse`] lists the texts to
//! encode and how their ids go together, [`Document::render`] lays conversations out as text, [`Document::assemble`]
//! builds the examples from the ids. Natively all happens in [`Dataset::read`]; in a browser templates are run and ids
//! are made by JavaScript in between. `bytes` tells text from what is none, `detect` one format from
//! another; `record` knows fields, `table` tables, `text` lines and running text; `document` holds what was read.

mod bytes;
mod detect;
mod document;
mod record;
mod table;
mod text;

use serde::{Deserialize, Serialize};

use detect::detect;
pub use document::Document;
pub use record::{Columns, ColumnsError, conversation};

use super::chat::{Conversation, Render};
use super::{DataError, Example};

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object a line: token ids, a conversation, an instruction, prompt and completion, or a text.
    Jsonl,
    /// JSON objects as in [`Jsonl`](Self::Jsonl), in a list or one after the other over several lines each.
    Json,
    /// Rows of fields under a line of names.
    Table,
    /// `meaning||reference` a line, learned on the reference only.
    E2e,
    /// Running text, cut into windows.
    Text,
}

impl std::fmt::Display for Format {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Format::Jsonl => "JSON lines",
            Format::Json => "a JSON list",
            Format::Table => "a table",
            Format::E2e => "meaning||reference lines",
            Format::Text => "plain text",
        })
    }
}

/// How to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The longest example in tokens; also the window of plain text.
    pub seq: usize,
    /// Size of the model's vocabulary: every id must be below it.
    pub vocab: usize,
    /// Count and leave out bad lines instead of stopping at the first.
    pub skip_bad_lines: bool,
    /// Which fields are what.
    pub columns: Columns,
}

impl Options {
    /// Every line must be right, and names in the file are taken as they are.
    pub fn new(seq: usize, vocab: usize) -> Self {
        Self {
            seq,
            vocab,
            skip_bad_lines: false,
            columns: Columns::default(),
        }
    }
}

/// A text's ids, and where each token ends in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub ids: Vec<u32>,
    /// The byte of the text after each token's last one; as many as `ids`.
    pub ends: Vec<u32>,
}

/// The tokens that stand at the ends of texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Put before a text, for models that were trained so.
    pub begin: Vec<u32>,
    /// Put after a text.
    pub end: Option<u32>,
}

/// Turns text into ids.
pub trait Tokenize {
    /// Ids of `text`, without tokens added at its ends.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError>;

    /// The end-of-text token.
    ///
    /// # Errors
    /// [`DataError::NoEndToken`].
    fn eos(&self) -> Result<u32, DataError>;

    /// Ids of each of `texts`.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    fn encode_all(&self, texts: &[String]) -> Result<Vec<Vec<u32>>, DataError> {
        texts.iter().map(|text| self.encode(text)).collect()
    }

    /// Ids of each of `texts`, with the places of the tokens in them.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    fn encode_with_ends(&self, texts: &[String]) -> Result<Vec<Encoded>, DataError>;

    /// What is put before a text: nothing for most models.
    fn begin(&self) -> &[u32] {
        &[]
    }

    /// The model's chat template.
    fn template(&self) -> Option<&dyn Render> {
        None
    }
}

/// What was read, and what was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub format: Format,
    /// SHA-256 of the file, in hexadecimal.
    pub digest: String,
    pub examples: usize,
    /// Tokens of all examples.
    pub tokens: u64,
    /// Tokens the loss is taken on.
    pub targets: u64,
    /// Examples cut to the longest length.
    pub truncated: usize,
    /// Examples left out because nothing of them is learned, often after being cut.
    pub dropped: usize,
    /// Lines left out by `--skip-bad-lines`.
    pub bad_lines: usize,
    /// What is wrong with the first of them.
    pub first_bad_line: Option<String>,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "{} examples from {}, {} tokens of which {} are learned",
            self.examples, self.format, self.tokens, self.targets
        )?;
        if self.truncated > 0 {
            write!(formatter, ", {} cut to the longest length", self.truncated)?;
        }
        if self.dropped > 0 {
            write!(formatter, ", {} dropped with nothing to learn", self.dropped)?;
        }
        if let Some(first) = &self.first_bad_line {
            write!(formatter, ", {} bad lines skipped (first: {first})", self.bad_lines)?;
        }
        Ok(())
    }
}

/// The examples of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    pub examples: Vec<Example>,
    pub summary: Summary,
}

impl Dataset {
    /// Reads a whole file's bytes; `name` names it in errors. Files of token ids need no tokenizer.
    ///
    /// # Errors
    /// [`DataError`] with the file, the line and what to do.
    pub fn read(
        bytes: &[u8],
        name: &str,
        tokenizer: Option<&dyn Tokenize>,
        options: &Options,
    ) -> Result<Self, DataError> {
        Self::from_document(Document::parse(bytes, name, options)?, tokenizer)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// As [`Dataset::read`]; [`DataError::Read`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(
        path: &std::path::Path,
        tokenizer: Option<&dyn Tokenize>,
        options: &Options,
    ) -> Result<Self, DataError> {
        let name = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| DataError::Read {
            path: name.clone(),
            source,
        })?;
        let document = Document::parse(&bytes, &name, options)?;
        drop(bytes);
        Self::from_document(document, tokenizer)
    }

    fn from_document(mut document: Document, tokenizer: Option<&dyn Tokenize>) -> Result<Self, DataError> {
        if !document.needs_tokenizer() {
            return document.assemble(Vec::new(), Vec::new(), &Marks::default());
        }
        let tokenizer = tokenizer.ok_or_else(|| DataError::NoTokenizer {
            file: document.name().to_owned(),
        })?;
        document.render(tokenizer.template())?;
        let ids = tokenizer.encode_all(document.texts())?;
        let chats = tokenizer.encode_with_ends(document.transcripts())?;
        let marks = Marks {
            begin: tokenizer.begin().to_vec(),
            end: match document.needs_eos() {
                true => Some(tokenizer.eos()?),
                false => None,
            },
        };
        document.assemble(ids, chats, &marks)
    }
}

/// What one line, element or row holds.
enum Line {
    Ids(Example),
    Completion { prompt: String, completion: String },
    Reference { meaning: String, reference: String },
    Whole(String),
    Conversation(Conversation),
}
