//! The native tokenizer: Hugging Face's, from either layout a GPT-2 directory may have.
//!
//! It is separate from the reader because a browser tokenises in JavaScript instead, from the one
//! `tokenizer.json` that [`Tokenizer::json`] gives for both layouts.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Inner};

use super::{DataError, Tokenize};

/// The name under which the tokenizer is served.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

const END_OF_TEXT: &str = "<|endoftext|>";
/// Texts encoded at a time: enough to keep every core busy.
const ENCODE_GROUP: usize = 1024;

/// A tokenizer that has been checked and can be served.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Inner,
    json: Vec<u8>,
    eos: Option<u32>,
    vocab_size: usize,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, or else `vocab.json` and `merges.txt`, from a model directory; `None` when it has
    /// neither. `model_eos` is the end-of-text token to use when the tokenizer has no `<|endoftext|>`.
    ///
    /// # Errors
    /// [`DataError::Read`], [`DataError::Tokenizer`].
    pub fn load(dir: &Path, model_eos: Option<u32>) -> Result<Option<Self>, DataError> {
        let read = |name: &str| {
            let path = dir.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(DataError::Read {
                    path: path.display().to_string(),
                    source,
                }),
            }
        };
        if let Some(json) = read(TOKENIZER_FILE)? {
            return Self::from_json(&json, model_eos).map(Some);
        }
        match (read("vocab.json")?, read("merges.txt")?) {
            (Some(vocab), Some(merges)) => Self::from_vocab_and_merges(&vocab, &merges, model_eos).map(Some),
            (None, None) => Ok(None),
            (vocab, _) => {
                let (file, other) = if vocab.is_some() {
                    ("vocab.json", "merges.txt")
                } else {
                    ("merges.txt", "vocab.json")
                };
                Err(bad(file, format!("{other} is missing beside it")))
            }
        }
    }

    /// From the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn from_json(json: &[u8], model_eos: Option<u32>) -> Result<Self, DataError> {
        let json = without_mark(json);
        let parsed: Value = serde_json::from_slice(json).map_err(|error| bad(TOKENIZER_FILE, error.to_string()))?;
        check_merges(&parsed).map_err(|reason| bad(TOKENIZER_FILE, reason))?;
        let inner = guarded(TOKENIZER_FILE, || Inner::from_bytes(json))?;
        Self::new(inner, json.to_vec(), model_eos)
    }

    /// From GPT-2's older layout: byte-level BPE without a space put before the text.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn from_vocab_and_merges(vocab: &[u8], merges: &[u8], model_eos: Option<u32>) -> Result<Self, DataError> {
        let vocab: std::collections::HashMap<String, u32> =
            serde_json::from_slice(without_mark(vocab)).map_err(|error| bad("vocab.json", error.to_string()))?;
        let merges = std::str::from_utf8(without_mark(merges)).map_err(|error| bad("merges.txt", error.to_string()))?;
        let mut pairs: Merges = Vec::new();
        for (index, line) in merges.lines().enumerate() {
            if line.is_empty() || (index == 0 && line.starts_with("#version")) {
                continue;
            }
            let wrong = |reason: &str| bad("merges.txt", format!("line {}: {reason}", index + 1));
            let (left, right) = line
                .split_once(' ')
                .ok_or_else(|| wrong("expected two parts and a space"))?;
            let joined = [left, right].concat();
            if [left, right, &joined].iter().any(|&part| !vocab.contains_key(part)) {
                return Err(wrong("it joins tokens that vocab.json does not have"));
            }
            pairs.push((left.to_owned(), right.to_owned()));
        }
        let end_of_text = vocab.contains_key(END_OF_TEXT);
        let vocab: Vocab = vocab.into_iter().collect();
        let mut inner = guarded("vocab.json", || {
            BPE::builder().vocab_and_merges(vocab, pairs).build().map(Inner::new)
        })?;
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_post_processor(Some(ByteLevel::new(true, false, true)));
        inner.with_decoder(Some(ByteLevel::new(true, true, true)));
        if end_of_text {
            inner
                .add_special_tokens([AddedToken::from(END_OF_TEXT, true).normalized(false)])
                .map_err(|error| bad("vocab.json", error.to_string()))?;
        }
        let json = inner
            .to_string(false)
            .map_err(|error| bad("vocab.json", error.to_string()))?;
        Self::new(inner, json.into_bytes(), model_eos)
    }

    fn new(mut inner: Inner, json: Vec<u8>, model_eos: Option<u32>) -> Result<Self, DataError> {
        // Files may ask for padding and truncation; lengths are decided by the reader and the batches.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| bad(TOKENIZER_FILE, error.to_string()))?;
        let vocab = inner.get_vocab(true);
        let Some(&largest) = vocab.values().max() else {
            return Err(bad(TOKENIZER_FILE, "its vocabulary is empty".to_owned()));
        };
        let eos = inner.token_to_id(END_OF_TEXT).or(model_eos);
        Ok(Self {
            inner,
            json,
            eos,
            vocab_size: largest as usize + 1,
        })
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Checks that every token has a row in the model's embedding. A model may have more.
    ///
    /// # Errors
    /// [`DataError::VocabularyMismatch`] with both sizes.
    pub fn check_vocabulary(&self, model: usize) -> Result<(), DataError> {
        if self.vocab_size > model {
            return Err(DataError::VocabularyMismatch {
                tokenizer: self.vocab_size,
                model,
            });
        }
        Ok(())
    }

    /// The text of ids, without special tokens such as end-of-text.
    ///
    /// # Errors
    /// [`DataError::Token`] for an id the tokenizer does not have.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        if let Some(&id) = ids.iter().find(|&&id| self.inner.id_to_token(id).is_none()) {
            return Err(DataError::Token {
                id,
                vocab: self.vocab_size,
            });
        }
        self.inner
            .decode(ids, true)
            .map_err(|error| bad(TOKENIZER_FILE, error.to_string()))
    }

    /// The `tokenizer.json` to serve to clients, the same whichever layout was loaded.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// SHA-256 of [`Tokenizer::json`].
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.json).into()
    }

    fn encode_error(text: &str, reason: &dyn std::fmt::Display) -> DataError {
        DataError::Encode {
            text: text.chars().take(80).collect(),
            reason: reason.to_string(),
        }
    }
}

impl Tokenize for Tokenizer {
    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| Self::encode_error(text, &error))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn eos(&self) -> Result<u32, DataError> {
        self.eos.ok_or(DataError::NoEndToken)
    }

    fn encode_all(&self, texts: &[String]) -> Result<Vec<Vec<u32>>, DataError> {
        let mut all = Vec::with_capacity(texts.len());
        for group in texts.chunks(ENCODE_GROUP) {
            let inputs: Vec<&str> = group.iter().map(String::as_str).collect();
            let encodings = self
                .inner
                .encode_batch_fast(inputs, false)
                .map_err(|error| Self::encode_error(&group[0], &error))?;
            all.extend(encodings.iter().map(|encoding| encoding.get_ids().to_vec()));
        }
        Ok(all)
    }
}

fn bad(file: &str, reason: String) -> DataError {
    DataError::Tokenizer {
        file: file.to_owned(),
        reason,
    }
}

/// Without the byte order mark that some editors put before a text.
fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes)
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread is taken as an error about a tokenizer's file, which needs no word of the panic's own.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// Builds a tokenizer, taking a panic of the tokenizer library on a malformed file as an error.
fn guarded(file: &str, build: impl FnOnce() -> tokenizers::Result<Inner>) -> Result<Inner, DataError> {
    GUARDED.set(true);
    let built = catch_unwind(AssertUnwindSafe(build));
    GUARDED.set(false);
    match built {
        Ok(built) => built.map_err(|error| bad(file, error.to_string())),
        Err(_) => Err(bad(file, "the tokenizer library cannot read it".to_owned())),
    }
}

/// The tokenizer library indexes by the length of a merged token before it looks the token up, so a merge
/// that is not in the vocabulary has to be found first.
fn check_merges(tokenizer: &Value) -> Result<(), String> {
    let model = &tokenizer["model"];
    let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array()) else {
        return Ok(());
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    for merge in merges {
        let pair = match merge {
            Value::String(merge) => merge.split_once(' '),
            Value::Array(pair) => match &pair[..] {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        let Some((left, right)) = pair else {
            return Err(format!("{merge} is not a merge"));
        };
        let joined = format!("{left}{}", right.strip_prefix(prefix).unwrap_or(right));
        if !vocab.contains_key(&joined) || right.len() < prefix.len() {
            return Err(format!("the merge of {left:?} and {right:?} is not in its vocabulary"));
        }
    }
    Ok(())
}
