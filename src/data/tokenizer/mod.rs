//! The native tokenizer: Hugging Face's, from either layout a model directory may have, with the files beside it.
//!
//! It is separate from the reader because a browser tokenises in JavaScript instead, from the one
//! `tokenizer.json` that [`Tokenizer::json`] gives for both layouts. `settings` reads the files beside it, `check` finds
//! what a file may not ask for, `stream` gives out text of ids as they come.

mod check;
mod settings;
mod stream;

use std::cell::Cell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, NormalizedString, Normalizer, SplitDelimiterBehavior, Tokenizer as Inner};

use settings::{Added, SideFiles};
pub use settings::{SETTINGS, Settings};
pub use stream::DecodeStream;

use super::chat::{CHATML, Conversation, Manner, Render};
use super::reader::Encoded;
use super::template::Template;
use super::{DataError, Flaw, Tokenize};

/// The name under which the tokenizer is served.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";
/// What `--chat-template` takes for [`CHATML`].
pub(crate) const CHATML_NAME: &str = "chatml";

const END_OF_TEXT: &str = "<|endoftext|>";
/// Texts encoded at a time: enough to keep every core busy.
const ENCODE_GROUP: usize = 1024;
/// And their bytes, normalized: an encoding takes many times its text.
const ENCODE_BYTES: usize = 4 << 20;
/// A normalizer that cannot make a text longer than this is not watched at it.
const UNWATCHED_GROWTH: u64 = 4;
/// One that can makes texts up to so many times their length: Unicode's own forms make up to 11 bytes of one.
const MOST_GROWTH: usize = 12;
/// Texts are watched in pieces of so many bytes, so that none has to be long before it is refused, …
const PIECE_BYTES: usize = 16 << 10;
/// … and each may be longer by this.
const PIECE_SLACK: usize = 1 << 10;
/// How Qwen2 cuts text, which its older files do not say.
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A tokenizer that has been checked and can be served.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Inner,
    json: Vec<u8>,
    eos: Option<u32>,
    bos: Option<u32>,
    /// What is put before a text.
    begin: Vec<u32>,
    stop: Vec<u32>,
    vocab_size: usize,
    chat: Option<Chat>,
    /// The normalizer is watched.
    grows: bool,
}

/// A chat template as its text, and ready to run.
#[derive(Clone, Debug)]
struct Chat {
    source: String,
    template: Arc<Template>,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, or else `vocab.json` and `merges.txt`, from a model directory, with the files beside
    /// it that say which tokens were added, which end a text, and how conversations are written; `None` when it has
    /// neither. `model_eos` is the end-of-text token to use when none of them names one.
    ///
    /// # Errors
    /// [`DataError::Read`], [`DataError::Tokenizer`], [`DataError::Template`].
    pub fn load(dir: &Path, model_eos: Option<u32>) -> Result<Option<Self>, DataError> {
        let read = |name: &str| {
            let path = dir.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => Ok(Some(match bytes.strip_prefix("\u{feff}".as_bytes()) {
                    Some(text) => text.to_vec(),
                    None => bytes,
                })),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(DataError::Read {
                    path: path.display().to_string(),
                    source,
                }),
            }
        };
        let (json, vocab, merges) = match read(TOKENIZER_FILE)? {
            Some(json) => (Some(json), None, None),
            None => (None, read("vocab.json")?, read("merges.txt")?),
        };
        if json.is_none() && vocab.is_none() && merges.is_none() {
            let sentencepiece = ["tokenizer.model", "spiece.model"]
                .into_iter()
                .find(|name| dir.join(name).exists());
            return match sentencepiece {
                None => Ok(None),
                Some(file) => Err(bad(
                    file,
                    "SentencePiece models are not read; write tokenizer.json with Python: \
                     transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
                        .to_owned(),
                )),
            };
        }
        let side = SideFiles::read(read)?;
        let (inner, json, before) = match (json, vocab, merges) {
            (Some(json), ..) => {
                let (json, before) = without_settings(&json)?;
                let mut inner = library(&json)?;
                let json = match add_tokens(&mut inner, &side)? {
                    true => to_json(&inner)?,
                    false => json,
                };
                (inner, json, before)
            }
            (None, Some(vocab), Some(merges)) => {
                let inner = from_vocab_and_merges(&vocab, &merges, &side)?;
                let json = to_json(&inner)?;
                (inner, json, Settings::default())
            }
            (None, vocab, _) => {
                let (file, other) = if vocab.is_some() {
                    ("vocab.json", "merges.txt")
                } else {
                    ("merges.txt", "vocab.json")
                };
                return Err(bad(file, format!("{other} is missing beside it")));
            }
        };
        let settings = settled(&inner, side, before, model_eos)?;
        Self::new(inner, json, settings, model_eos).map(Some)
    }

    /// From the bytes of a `tokenizer.json`, with the settings inside of it if it was served.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], [`DataError::Template`].
    pub fn from_json(json: &[u8], model_eos: Option<u32>) -> Result<Self, DataError> {
        Self::with_settings(json, Settings::default(), model_eos)
    }

    /// From the bytes of a `tokenizer.json` and what is known of it from elsewhere, such as the header of a GGUF file.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], [`DataError::Template`].
    pub fn with_settings(json: &[u8], settings: Settings, model_eos: Option<u32>) -> Result<Self, DataError> {
        let json = json.strip_prefix("\u{feff}".as_bytes()).unwrap_or(json);
        let (json, before) = without_settings(json)?;
        let inner = library(&json)?;
        Self::new(inner, json, over(settings, before), model_eos)
    }

    /// From GPT-2's older layout: byte-level BPE without a space put before the text.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn from_vocab_and_merges(vocab: &[u8], merges: &[u8], model_eos: Option<u32>) -> Result<Self, DataError> {
        let inner = from_vocab_and_merges(vocab, merges, &SideFiles::default())?;
        let json = to_json(&inner)?;
        Self::new(inner, json, Settings::default(), model_eos)
    }

    /// `json` is the library's own form of `inner`, without settings.
    fn new(mut inner: Inner, json: Vec<u8>, settings: Settings, model_eos: Option<u32>) -> Result<Self, DataError> {
        // Files may ask for padding and truncation; lengths are decided by the reader and the batches.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| bad(TOKENIZER_FILE, error.to_string()))?;
        let Some(largest) = inner.get_vocab(true).into_values().max() else {
            return Err(bad(TOKENIZER_FILE, "its vocabulary is empty".to_owned()));
        };
        let found = Settings {
            eos: inner.token_to_id(END_OF_TEXT).or(model_eos),
            ..put_before(&inner)?
        };
        // What follows is done with texts only, and would shift where tokens are.
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let full = over(settings, found.clone());
        let json = if full == found {
            json
        } else {
            settings::join(&json, &full)?
        };
        let begin = match (full.add_bos, full.bos) {
            (Some(true), Some(bos)) => vec![bos],
            (Some(true), None) => {
                return Err(bad(
                    "tokenizer_config.json",
                    "`add_bos_token` is set, and no `bos_token` is named".to_owned(),
                ));
            }
            _ => Vec::new(),
        };
        let mut stop = full.stop;
        stop.extend(full.eos);
        stop.sort_unstable();
        stop.dedup();
        let special_tokens = special_tokens(&inner, full.eos);
        let mut named = full.named_tokens;
        for (name, id) in [("bos_token", full.bos), ("eos_token", full.eos)] {
            if let (false, Some(token)) = (named.contains_key(name), id.and_then(|id| inner.id_to_token(id))) {
                named.insert(name.to_owned(), token);
            }
        }
        let chat = match full.chat_template {
            None => None,
            Some(source) => Some(Chat {
                template: Arc::new(Template::new(&source, named, special_tokens)?),
                source,
            }),
        };
        Ok(Self {
            grows: grows(&inner)?,
            inner,
            json,
            eos: full.eos,
            bos: full.bos,
            begin,
            stop,
            vocab_size: largest as usize + 1,
            chat,
        })
    }

    /// This tokenizer with another chat template: `chatml`, or a template's text.
    ///
    /// # Errors
    /// [`DataError::Template`].
    pub fn with_chat_template(self, template: &str) -> Result<Self, DataError> {
        let template = if template == CHATML_NAME { CHATML } else { template };
        let settings = Settings {
            chat_template: Some(template.to_owned()),
            ..Settings::default()
        };
        Self::with_settings(&self.json, settings, self.eos)
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

    /// Whether an id stands for text. An embedding may have rows beyond the vocabulary, or for ids left out of it.
    pub fn has(&self, id: u32) -> bool {
        self.inner.id_to_token(id).is_some()
    }

    /// The token of an id, as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token that begins a text, whether or not it is put there.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens at which generation stops, the end-of-text token among them; in rising order.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop
    }

    /// The text of the chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat.as_ref().map(|chat| chat.source.as_str())
    }

    /// Ids that begin a text to be continued: of the text, after what is put before one.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok([self.begin(), &self.encode(text)?].concat())
    }

    /// Ids of a conversation and the beginning of an answer to it, and the tokens that end the answer.
    ///
    /// # Errors
    /// [`DataError::Template`] when there is no chat template, or it refuses the conversation; [`DataError::Encode`].
    pub fn chat_prompt(&self, conversation: &Conversation) -> Result<(Vec<u32>, Vec<u32>), DataError> {
        let refused = |flaw: Flaw| DataError::Template {
            reason: flaw.to_string(),
        };
        let Some(Chat { template, .. }) = &self.chat else {
            return Err(refused(Flaw::new("the model has none; chatml is a common one")));
        };
        let text = template.render(conversation, true).map_err(refused)?;
        let mut stop = self.stop.clone();
        let manner = Manner::of(template.as_ref()).map_err(refused)?;
        // An end of turn that is a token of its own ends the answer, whatever else the files name.
        stop.extend(self.inner.token_to_id(manner.closing().trim()));
        stop.sort_unstable();
        stop.dedup();
        Ok((self.encode(&text)?, stop))
    }

    /// The text of ids, without special tokens such as end-of-text.
    ///
    /// # Errors
    /// [`DataError::Token`] for an id the tokenizer does not have.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        if let Some(&id) = ids.iter().find(|&&id| !self.has(id)) {
            return Err(DataError::Token {
                id,
                vocab: self.vocab_size,
            });
        }
        self.inner
            .decode(ids, true)
            .map_err(|error| bad(TOKENIZER_FILE, error.to_string()))
    }

    /// Text of ids that come one at a time.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// The `tokenizer.json` to serve to clients, the same whichever layout was loaded.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// SHA-256 of [`Tokenizer::json`].
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.json).into()
    }

    /// Bytes of a text as it is cut into tokens, if that is watched; at least nearly.
    ///
    /// # Errors
    /// [`DataError::Encode`] when the normalizer blows it up.
    fn normalized_bytes(&self, text: &str) -> Result<usize, DataError> {
        let Some(normalizer) = self.inner.get_normalizer().filter(|_| self.grows) else {
            return Ok(text.len());
        };
        let (mut rest, mut total) = (text, 0);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.floor_char_boundary(PIECE_BYTES));
            rest = after;
            let mut normalized = NormalizedString::from(piece);
            caught(|| normalizer.normalize(&mut normalized))
                .map_err(|_| encode_error(text, "the tokenizer library gave up".to_owned()))?
                .map_err(|error| encode_error(text, error.to_string()))?;
            let bytes = normalized.get().len();
            if bytes > MOST_GROWTH * piece.len() + PIECE_SLACK {
                let reason = format!(
                    "the normalizer of the tokenizer's file makes {bytes} bytes of {}, and at most {MOST_GROWTH} times as many are \
                     allowed; take the model from a source you trust",
                    piece.len()
                );
                return Err(encode_error(text, reason));
            }
            total += bytes;
        }
        Ok(total)
    }

    /// Encodes texts in groups that keep every core busy and little memory, taking a panic of the tokenizer library
    /// as an error.
    fn encode_groups(
        &self,
        texts: &[String],
        mut each: impl FnMut(&str, tokenizers::Encoding),
        ends: bool,
    ) -> Result<(), DataError> {
        let mut rest = texts;
        while !rest.is_empty() {
            let (mut bytes, mut count) = (0, 0);
            for text in rest.iter().take(ENCODE_GROUP) {
                if bytes >= ENCODE_BYTES {
                    break;
                }
                bytes += self.normalized_bytes(text)?;
                count += 1;
            }
            let (group, after) = rest.split_at(count);
            rest = after;
            let inputs: Vec<&str> = group.iter().map(String::as_str).collect();
            let encoded = caught(|| match ends {
                true => self.inner.encode_batch(inputs, false),
                false => self.inner.encode_batch_fast(inputs, false),
            });
            let encodings = match encoded {
                Ok(encoded) => encoded.map_err(|error| encode_error(&group[0], error.to_string()))?,
                Err(_) => return Err(encode_error(&group[0], "the tokenizer library gave up".to_owned())),
            };
            for (text, encoding) in group.iter().zip(encodings) {
                each(text, encoding);
            }
        }
        Ok(())
    }
}

impl Tokenize for Tokenizer {
    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let mut ids = Vec::new();
        self.encode_groups(
            &[text.to_owned()],
            |_, encoding| ids = encoding.get_ids().to_vec(),
            false,
        )?;
        Ok(ids)
    }

    fn eos(&self) -> Result<u32, DataError> {
        self.eos.ok_or(DataError::NoEndToken)
    }

    fn encode_all(&self, texts: &[String]) -> Result<Vec<Vec<u32>>, DataError> {
        let mut all = Vec::with_capacity(texts.len());
        self.encode_groups(texts, |_, encoding| all.push(encoding.get_ids().to_vec()), false)?;
        Ok(all)
    }

    fn encode_with_ends(&self, texts: &[String]) -> Result<Vec<Encoded>, DataError> {
        let mut all = Vec::with_capacity(texts.len());
        self.encode_groups(
            texts,
            |_, encoding| {
                all.push(Encoded {
                    ids: encoding.get_ids().to_vec(),
                    ends: encoding.get_offsets().iter().map(|&(_, end)| end as u32).collect(),
                });
            },
            true,
        )?;
        Ok(all)
    }

    fn begin(&self) -> &[u32] {
        &self.begin
    }

    fn template(&self) -> Option<&dyn Render> {
        self.chat.as_ref().map(|chat| chat.template.as_ref() as &dyn Render)
    }
}

fn bad(file: &str, reason: String) -> DataError {
    DataError::Tokenizer {
        file: file.to_owned(),
        reason,
    }
}

fn encode_error(text: &str, reason: String) -> DataError {
    DataError::Encode {
        text: text.chars().take(80).collect(),
        reason,
    }
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread is taken as an error about a tokenizer's file, which needs no word of the panic's own.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// Builds a tokenizer, taking a panic of the tokenizer library on a malformed file as an error.
fn guarded<T>(file: &str, build: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, DataError> {
    match caught(build) {
        Ok(built) => built.map_err(|error| bad(file, error.to_string())),
        Err(_) => Err(bad(file, "the tokenizer library cannot read it".to_owned())),
    }
}

fn caught<T>(work: impl FnOnce() -> T) -> std::thread::Result<T> {
    GUARDED.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(false);
    result
}

/// A `tokenizer.json` without the settings that may be inside of it, and they.
fn without_settings(json: &[u8]) -> Result<(Vec<u8>, Settings), DataError> {
    Ok(settings::split(json)?.unwrap_or_else(|| (json.to_vec(), Settings::default())))
}

fn library(json: &[u8]) -> Result<Inner, DataError> {
    check::check(json).map_err(|flaw| bad(TOKENIZER_FILE, flaw.to_string()))?;
    guarded(TOKENIZER_FILE, || Inner::from_bytes(json))
}

/// Whether the normalizer can make texts much longer.
fn grows(inner: &Inner) -> Result<bool, DataError> {
    let Some(normalizer) = inner.get_normalizer() else {
        return Ok(false);
    };
    let normalizer = serde_json::to_value(normalizer).map_err(|error| bad(TOKENIZER_FILE, error.to_string()))?;
    let growth = check::growth(&normalizer, "normalizer").map_err(|flaw| bad(TOKENIZER_FILE, flaw.to_string()))?;
    Ok(growth > UNWATCHED_GROWTH)
}

fn to_json(inner: &Inner) -> Result<Vec<u8>, DataError> {
    inner
        .to_string(false)
        .map(String::into_bytes)
        .map_err(|error| bad(TOKENIZER_FILE, error.to_string()))
}

/// `first` where it says something, `second` otherwise.
fn over(first: Settings, second: Settings) -> Settings {
    let mut named_tokens = second.named_tokens;
    named_tokens.extend(first.named_tokens);
    Settings {
        eos: first.eos.or(second.eos),
        bos: first.bos.or(second.bos),
        add_bos: first.add_bos.or(second.add_bos),
        stop: if first.stop.is_empty() { second.stop } else { first.stop },
        named_tokens,
        chat_template: first.chat_template.or(second.chat_template),
    }
}

/// What side files say, in ids; `before` is what was inside of the tokenizer.
fn settled(inner: &Inner, side: SideFiles, before: Settings, model_eos: Option<u32>) -> Result<Settings, DataError> {
    let id = |name: &str| match side.named_tokens.get(name) {
        None => Ok(None),
        Some(token) => inner.token_to_id(token).map(Some).ok_or_else(|| {
            bad(
                "tokenizer_config.json",
                format!("it names {token:?} as `{name}`, which the vocabulary does not have"),
            )
        }),
    };
    let bos = match side.add_bos {
        Some(true) => id("bos_token")?,
        _ => side
            .named_tokens
            .get("bos_token")
            .and_then(|token| inner.token_to_id(token)),
    };
    let settings = Settings {
        eos: id("eos_token")?,
        bos,
        add_bos: side.add_bos,
        // Without the generation's own settings, the model's count.
        stop: side.stop.unwrap_or_else(|| model_eos.into_iter().collect()),
        named_tokens: side.named_tokens.clone(),
        chat_template: side.chat_template,
    };
    Ok(over(settings, before))
}

/// What the tokenizer itself puts before a text, if it is one token.
fn put_before(inner: &Inner) -> Result<Settings, DataError> {
    let ids = |special| -> Result<Vec<u32>, DataError> {
        let encoding = guarded(TOKENIZER_FILE, || inner.encode_fast("a", special))?;
        Ok(encoding.get_ids().to_vec())
    };
    let (with, without) = (ids(true)?, ids(false)?);
    let text_at = with.windows(without.len().max(1)).position(|window| window == without);
    Ok(match (text_at, with.first()) {
        (Some(1), Some(&bos)) => Settings {
            bos: Some(bos),
            add_bos: Some(true),
            ..Settings::default()
        },
        _ => Settings::default(),
    })
}

/// Tokens that stand for no text, and the end-of-text token.
fn special_tokens(inner: &Inner, eos: Option<u32>) -> Vec<String> {
    let mut tokens: Vec<String> = inner
        .get_added_tokens_decoder()
        .into_values()
        .filter(|token| token.special)
        .map(|token| token.content)
        .chain(eos.and_then(|eos| inner.id_to_token(eos)))
        .collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// Adds what the side files have and a `tokenizer.json` has not; whether that was anything.
fn add_tokens(inner: &mut Inner, side: &SideFiles) -> Result<bool, DataError> {
    let mut changed = false;
    for token in &side.added {
        let known = inner.token_to_id(&token.content);
        let as_token = inner
            .get_added_tokens_decoder()
            .get(&token.id)
            .is_some_and(|known| known.content == token.content);
        if known == Some(token.id) && as_token {
            continue;
        }
        add_token(inner, token)?;
        if inner.token_to_id(&token.content) != Some(token.id) {
            return Err(bad(
                "added_tokens",
                format!(
                    "{:?} has the id {} in the files beside tokenizer.json, which has another place for it",
                    token.content, token.id
                ),
            ));
        }
        changed = true;
    }
    Ok(changed)
}

fn add_token(inner: &mut Inner, token: &Added) -> Result<(), DataError> {
    let added = AddedToken::from(token.content.clone(), token.special)
        .lstrip(token.lstrip)
        .rstrip(token.rstrip)
        .single_word(token.single_word)
        .normalized(token.normalized);
    match token.special {
        true => inner.add_special_tokens([added]),
        false => inner.add_tokens([added]),
    }
    .map(|_| ())
    .map_err(|error| bad("added_tokens", error.to_string()))
}

/// Byte-level BPE from its two files and those beside them.
fn from_vocab_and_merges(vocab: &[u8], merges: &[u8], side: &SideFiles) -> Result<Inner, DataError> {
    let mut vocab: HashMap<String, u32> =
        serde_json::from_slice(vocab).map_err(|error| bad("vocab.json", error.to_string()))?;
    let merges = std::str::from_utf8(merges).map_err(|error| bad("merges.txt", error.to_string()))?;
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
    let mut added = side.added.clone();
    if vocab.contains_key(END_OF_TEXT) && !added.iter().any(|token| token.content == END_OF_TEXT) {
        added.push(Added {
            id: vocab[END_OF_TEXT],
            content: END_OF_TEXT.to_owned(),
            special: true,
            lstrip: false,
            rstrip: false,
            single_word: false,
            normalized: false,
        });
    }
    // Ids may leave gaps, which the library keeps only for what is in the vocabulary.
    let by_id: HashMap<u32, String> = vocab.iter().map(|(token, &id)| (id, token.clone())).collect();
    for token in &added {
        let taken = by_id.get(&token.id).filter(|other| **other != token.content);
        let elsewhere = vocab
            .insert(token.content.clone(), token.id)
            .filter(|&id| id != token.id);
        if taken.is_some() || elsewhere.is_some() {
            return Err(bad(
                "added_tokens",
                format!(
                    "{:?} has the id {} there, and vocab.json has another token for that id, or another id for it",
                    token.content, token.id
                ),
            ));
        }
    }
    let vocab: Vocab = vocab.into_iter().collect();
    let mut inner = guarded("vocab.json", || {
        BPE::builder().vocab_and_merges(vocab, pairs).build().map(Inner::new)
    })?;
    match side.class.as_deref().map(|class| class.trim_end_matches("Fast")) {
        None | Some("GPT2Tokenizer" | "CodeGenTokenizer" | "PreTrainedTokenizer" | "TokenizersBackend") => {
            inner.with_pre_tokenizer(Some(ByteLevel::new(side.add_prefix_space, true, true)));
        }
        Some("Qwen2Tokenizer") => {
            let words = Split::new(
                SplitPattern::Regex(QWEN2_WORDS.to_owned()),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .map_err(|error| bad("vocab.json", error.to_string()))?;
            inner.with_pre_tokenizer(Some(Sequence::new(vec![
                PreTokenizerWrapper::Split(words),
                PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)),
            ])));
            inner
                .with_normalizer(Some(NormalizerWrapper::NFC(NFC)))
                .map_err(|error| bad("vocab.json", error.to_string()))?;
        }
        Some(class) => {
            return Err(bad(
                "vocab.json",
                format!(
                    "tokenizer_config.json says it is a {class}'s, whose way of cutting text is not known here; write \
                     tokenizer.json with Python: transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
                ),
            ));
        }
    }
    inner.with_post_processor(Some(ByteLevel::new(true, false, true)));
    inner.with_decoder(Some(ByteLevel::new(true, true, true)));
    for token in &added {
        add_token(&mut inner, token)?;
    }
    Ok(inner)
}
