//! The tokenizer in a GGUF file's metadata as the `tokenizer.json` of Hugging Face.
//!
//! GGUF names the rule that splits text before the merges (`tokenizer.ggml.pre`) and leaves the rule itself to
//! llama.cpp; here each name stands for the pre-tokenizer of the model's own `tokenizer.json`, so that ids are those
//! the model was trained on. It is separate from the data's tokenizer because it makes text only: the browser reads the
//! same JSON with another library.

use serde_json::{Map, Value as Json, json};

use super::container::Gguf;
use super::metadata::Value;
use super::{GgufError, shown};

pub(super) const MODEL_KEY: &str = "tokenizer.ggml.model";
pub(super) const PRE_KEY: &str = "tokenizer.ggml.pre";
pub(in crate::model) const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
pub(super) const KINDS_KEY: &str = "tokenizer.ggml.token_type";
pub(super) const MERGES_KEY: &str = "tokenizer.ggml.merges";
pub(super) const BOS_KEY: &str = "tokenizer.ggml.bos_token_id";
pub(super) const EOS_KEY: &str = "tokenizer.ggml.eos_token_id";
pub(super) const EOT_KEY: &str = "tokenizer.ggml.eot_token_id";
pub(super) const TEMPLATE_KEY: &str = "tokenizer.chat_template";
pub(super) const ADD_BOS_KEY: &str = "tokenizer.ggml.add_bos_token";

/// Tokens that no text becomes and that end or order a conversation.
pub(super) const CONTROL: i64 = 3;
/// Tokens added to the vocabulary that texts may hold.
pub(super) const USER_DEFINED: i64 = 4;
/// Rows of the embedding that no token uses.
pub(super) const UNUSED: i64 = 5;
/// Control tokens that end an answer in the families read, whether or not the metadata says so.
const END_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"];

/// Words, numbers of up to three digits, punctuation with the line ends after it, white space: Llama 3.
const LLAMA3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// As Llama 3's, with every digit alone: Qwen 2 and 3.
const QWEN2_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// How text is split before merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pre {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

impl Pre {
    pub(super) const ALL: [Pre; 4] = [Pre::Gpt2, Pre::SmolLm, Pre::Llama3, Pre::Qwen2];

    /// The name in a file's metadata.
    pub(super) fn name(self) -> &'static str {
        match self {
            Pre::Gpt2 => "gpt-2",
            Pre::SmolLm => "smollm",
            Pre::Llama3 => "llama-bpe",
            Pre::Qwen2 => "qwen2",
        }
    }

    /// Whether a whole piece that is in the vocabulary is taken as it is, even where the merges would not lead to it.
    pub(super) fn ignores_merges(self) -> bool {
        self == Pre::Llama3
    }

    fn from_name(name: &str) -> Option<Self> {
        match name {
            "default" | "gpt-2" | "gpt2" => Some(Pre::Gpt2),
            "smollm" => Some(Pre::SmolLm),
            "llama-bpe" | "llama3" | "llama-v3" => Some(Pre::Llama3),
            "qwen2" => Some(Pre::Qwen2),
            _ => None,
        }
    }

    fn normalizer(self) -> Json {
        match self {
            Pre::Qwen2 => json!({"type": "NFC"}),
            Pre::Gpt2 | Pre::SmolLm | Pre::Llama3 => Json::Null,
        }
    }

    pub(super) fn pre_tokenizer(self) -> Json {
        let split = |pattern: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                byte_level(false),
            ]})
        };
        match self {
            Pre::Gpt2 => byte_level(true),
            Pre::SmolLm => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                byte_level(true),
            ]}),
            Pre::Llama3 => split(LLAMA3_SPLIT),
            Pre::Qwen2 => split(QWEN2_SPLIT),
        }
    }
}

fn byte_level(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// A tokenizer as a GGUF file has it: taken out of one, or to be put into one.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTokenizer {
    /// The text of a `tokenizer.json`. What else it holds under names that the format does not have is left alone.
    pub json: String,
    /// Entries of the vocabulary, unused ones included.
    pub vocab: usize,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Whether a text begins with `bos`; the JSON's post-processor puts it there.
    pub add_bos: bool,
    /// Tokens at which an answer ends: `eos`, the metadata's other end tokens, and those known by their names.
    pub stop: Vec<u32>,
    pub chat_template: Option<String>,
    /// What the user should know: a sentence each.
    pub notices: Vec<String>,
}

impl GgufTokenizer {
    /// Reads the tokenizer of a file.
    ///
    /// # Errors
    /// [`GgufError::Unsupported`] names a model or a splitting rule that is not read, [`GgufError::Key`] and
    /// [`GgufError::MissingKey`] name what is wrong with the vocabulary.
    pub fn read(gguf: &Gguf) -> Result<Self, GgufError> {
        let reader = Reader { gguf };
        let model = reader.text(MODEL_KEY)?;
        if model != "gpt2" {
            return Err(reader.unsupported(
                format!("the tokenizer model \"{}\"", shown(model)),
                "byte-level BPE (\"gpt2\") is: take the tokenizer.json of the model's own repository",
            ));
        }
        let mut notices = Vec::new();
        let name = gguf.metadata().get(PRE_KEY).and_then(Value::string);
        let pre = Pre::from_name(name.unwrap_or("default")).ok_or_else(|| {
            reader.unsupported(
                format!(
                    "the splitting rule \"{}\" of its tokenizer",
                    shown(name.unwrap_or_default())
                ),
                "default, gpt-2, smollm, llama-bpe and qwen2 are",
            )
        })?;
        if name.is_none_or(|name| name == "default") {
            notices.push(format!(
                "{} does not say how its tokenizer splits text; it is taken to split as GPT-2's",
                gguf.file()
            ));
        }

        let tokens = reader.strings(TOKENS_KEY)?;
        let kinds = reader.kinds(tokens.len())?;
        let mut vocab = Map::with_capacity(tokens.len());
        let mut added = Vec::new();
        for (id, token) in tokens.iter().enumerate() {
            let kind = kinds.as_ref().map_or(1, |kinds| kinds[id]);
            if kind == UNUSED {
                continue;
            }
            if let Some(other) = vocab.insert(token.clone(), id.into()) {
                let found = format!(
                    "a vocabulary whose tokens {other} and {id} are both \"{}\"",
                    shown(token)
                );
                return Err(reader.key(TOKENS_KEY, found, "every token once"));
            }
            if kind == CONTROL || kind == USER_DEFINED {
                if token.is_empty() {
                    return Err(reader.key(TOKENS_KEY, format!("a vocabulary whose token {id} is empty"), "texts"));
                }
                added.push(json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": kind == CONTROL,
                }));
            }
        }
        let merges = reader.merges(&vocab)?;

        let id = |key: &str| {
            let id = gguf.metadata().get(key)?.unsigned()?;
            u32::try_from(id).ok().filter(|&id| (id as usize) < tokens.len())
        };
        let (bos, eos) = (id(BOS_KEY), id(EOS_KEY));
        let add_bos = match gguf.metadata().get(ADD_BOS_KEY) {
            Some(value) => value
                .bool()
                .ok_or_else(|| reader.key(ADD_BOS_KEY, value.shown(), "true or false"))?,
            None => pre == Pre::Llama3,
        } && bos.is_some();
        let named = END_OF_TURN.iter().filter_map(|&name| {
            let id = vocab.get(name)?.as_u64()? as usize;
            let control = kinds.as_ref().is_some_and(|kinds| kinds[id] == CONTROL);
            control.then_some(id as u32)
        });
        let ends = [EOT_KEY, "tokenizer.ggml.eom_token_id"].into_iter().filter_map(id);
        let mut stop = Vec::new();
        for id in eos.into_iter().chain(ends).chain(named) {
            if !stop.contains(&id) {
                stop.push(id);
            }
        }

        let json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": pre.normalizer(),
            "pre_tokenizer": pre.pre_tokenizer(),
            "post_processor": match bos {
                Some(bos) if add_bos => begin_with(&tokens[bos as usize], bos),
                _ => byte_level(false),
            },
            "decoder": byte_level(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": pre.ignores_merges(),
                "vocab": vocab,
                "merges": merges,
            },
        });
        Ok(Self {
            json: json.to_string(),
            vocab: tokens.len(),
            bos,
            eos,
            add_bos,
            stop,
            chat_template: gguf
                .metadata()
                .get(TEMPLATE_KEY)
                .and_then(Value::string)
                .map(str::to_owned),
            notices,
        })
    }
}

/// A post-processor that puts `bos` before every text.
fn begin_with(token: &str, bos: u32) -> Json {
    let special = |type_id: u32| json!({"SpecialToken": {"id": token, "type_id": type_id}});
    let sequence = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    let mut tokens = Map::new();
    tokens.insert(token.to_owned(), json!({"id": token, "ids": [bos], "tokens": [token]}));
    json!({"type": "Sequence", "processors": [
        byte_level(false),
        {
            "type": "TemplateProcessing",
            "single": [special(0), sequence("A", 0)],
            "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
            "special_tokens": tokens,
        },
    ]})
}

struct Reader<'a> {
    gguf: &'a Gguf,
}

impl<'a> Reader<'a> {
    fn unsupported(&self, what: String, supported: &'static str) -> GgufError {
        GgufError::Unsupported {
            file: self.gguf.file().to_owned(),
            what,
            supported,
        }
    }

    fn key(&self, key: &str, found: String, expected: &str) -> GgufError {
        GgufError::Key {
            file: self.gguf.file().to_owned(),
            key: key.to_owned(),
            found,
            expected: expected.to_owned(),
        }
    }

    fn get(&self, key: &str) -> Result<&'a Value, GgufError> {
        self.gguf.metadata().get(key).ok_or_else(|| GgufError::MissingKey {
            file: self.gguf.file().to_owned(),
            key: key.to_owned(),
        })
    }

    fn text(&self, key: &str) -> Result<&'a str, GgufError> {
        let value = self.get(key)?;
        value.string().ok_or_else(|| self.key(key, value.shown(), "a text"))
    }

    fn strings(&self, key: &str) -> Result<&'a [String], GgufError> {
        let value = self.get(key)?;
        value
            .strings()
            .ok_or_else(|| self.key(key, value.shown(), "an array of texts"))
    }

    /// The kind of every token; files without them have ordinary tokens only.
    fn kinds(&self, tokens: usize) -> Result<Option<Vec<i64>>, GgufError> {
        let Some(value) = self.gguf.metadata().get(KINDS_KEY) else {
            return Ok(None);
        };
        let kinds = match value {
            Value::Array(array) => array.integers(),
            _ => None,
        };
        match kinds {
            Some(kinds) if kinds.len() == tokens => Ok(Some(kinds)),
            _ => Err(self.key(KINDS_KEY, value.shown(), &format!("{tokens} kinds, one a token"))),
        }
    }

    /// The merges as pairs. What they join has to be in the vocabulary: a tokenizer library may index by it unasked.
    fn merges(&self, vocab: &Map<String, Json>) -> Result<Vec<Json>, GgufError> {
        let merges = self.strings(MERGES_KEY)?;
        let mut pairs = Vec::with_capacity(merges.len());
        let mut joined = String::new();
        for merge in merges {
            let wrong = |reason: &str| self.key(MERGES_KEY, format!("\"{}\" among others", shown(merge)), reason);
            let (left, right) = merge.split_once(' ').ok_or_else(|| wrong("two parts and a space"))?;
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            if [left, right, &joined].iter().any(|&part| !vocab.contains_key(part)) {
                return Err(wrong("merges of tokens into tokens"));
            }
            pairs.push(json!([left, right]));
        }
        Ok(pairs)
    }
}
