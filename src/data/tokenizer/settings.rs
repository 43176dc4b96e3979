//! What the files beside a tokenizer say of it: which token ends a text, which begins one, where generation stops, the
//! chat template.
//!
//! They go to clients inside of the one `tokenizer.json` that is served, under a name of our own ([`SETTINGS`]): what
//! belongs to a vocabulary travels with it and is covered by its digest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::{DataError, Flaw};
use super::{TOKENIZER_FILE, bad};

/// The field of a served `tokenizer.json` that holds [`Settings`].
pub const SETTINGS: &str = "sflllm";

/// What is known of a tokenizer besides its vocabulary. What is `None` is looked for in the tokenizer itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Ends a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eos: Option<u32>,
    /// Begins a text, if `add_bos`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub add_bos: Option<bool>,
    /// Where generation stops, besides `eos`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<u32>,
    /// Tokens that a chat template may name, such as `bos_token` and `eos_token`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub named_tokens: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
}

/// Takes the settings out of a served `tokenizer.json`, where they come last: the rest of it, and they.
pub(super) fn split(json: &[u8]) -> Result<Option<(Vec<u8>, Settings)>, DataError> {
    // Within a string the quotation marks would be escaped.
    let field = format!(",\"{SETTINGS}\":");
    let Some(at) = json.windows(field.len()).rposition(|window| window == field.as_bytes()) else {
        return Ok(None);
    };
    let settings = json[at + field.len()..].trim_ascii_end();
    let settings = settings.strip_suffix(b"}").unwrap_or(settings);
    let settings = serde_json::from_slice(settings)
        .map_err(|error| bad(TOKENIZER_FILE, format!("`{SETTINGS}` in it: {error}")))?;
    Ok(Some(([&json[..at], b"}"].concat(), settings)))
}

/// Puts settings into a `tokenizer.json` that has none.
pub(super) fn join(json: &[u8], settings: &Settings) -> Result<Vec<u8>, DataError> {
    let settings = serde_json::to_string(settings).map_err(|error| bad(TOKENIZER_FILE, error.to_string()))?;
    let object = json
        .trim_ascii_end()
        .strip_suffix(b"}")
        .ok_or_else(|| bad(TOKENIZER_FILE, "it is not a JSON object".to_owned()))?;
    Ok([object, format!(",\"{SETTINGS}\":{settings}}}").as_bytes()].concat())
}

/// A token as a side file describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Added {
    pub id: u32,
    pub content: String,
    pub special: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    pub single_word: bool,
    pub normalized: bool,
}

/// The files beside a tokenizer, as far as they were there.
#[derive(Clone, Debug, Default)]
pub(super) struct SideFiles {
    /// `tokenizer_config.json`, over `special_tokens_map.json`.
    pub named_tokens: BTreeMap<String, String>,
    /// Tokens in `additional_special_tokens` or its successor.
    pub special: Vec<String>,
    pub added: Vec<Added>,
    /// The Python class that the files were written by.
    pub class: Option<String>,
    pub add_bos: Option<bool>,
    pub add_prefix_space: bool,
    pub chat_template: Option<String>,
    /// `eos_token_id` of `generation_config.json`.
    pub stop: Option<Vec<u32>>,
}

/// Named tokens that transformers hands to templates.
const TOKEN_NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl SideFiles {
    /// Reads what `read` finds of them by name.
    pub fn read(read: impl Fn(&str) -> Result<Option<Vec<u8>>, DataError>) -> Result<Self, DataError> {
        let json = |file: &str| -> Result<Value, DataError> {
            match read(file)? {
                None => Ok(Value::Null),
                Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| bad(file, error.to_string())),
            }
        };
        let mut files = Self::default();
        let map = json("special_tokens_map.json")?;
        let config = json("tokenizer_config.json")?;
        for (file, json) in [("special_tokens_map.json", &map), ("tokenizer_config.json", &config)] {
            for name in TOKEN_NAMES {
                if let Some(token) = token_text(&json[name]).map_err(|flaw| bad(file, format!("`{name}`: {flaw}")))? {
                    files.named_tokens.insert(name.to_owned(), token);
                }
            }
            for list in ["additional_special_tokens", "extra_special_tokens"] {
                let tokens: Vec<&Value> = match &json[list] {
                    Value::Array(tokens) => tokens.iter().collect(),
                    // By name, for models of more than text.
                    Value::Object(tokens) => tokens.values().collect(),
                    _ => Vec::new(),
                };
                for token in tokens {
                    files
                        .special
                        .extend(token_text(token).map_err(|flaw| bad(file, format!("`{list}`: {flaw}")))?);
                }
            }
        }
        files.class = config["tokenizer_class"].as_str().map(str::to_owned);
        files.add_bos = config["add_bos_token"].as_bool();
        files.add_prefix_space = config["add_prefix_space"].as_bool().unwrap_or(false);
        files.added = added_tokens(&config["added_tokens_decoder"])
            .map_err(|flaw| bad("tokenizer_config.json", format!("`added_tokens_decoder`: {flaw}")))?;
        let plain = json("added_tokens.json")?;
        files
            .add_plain(&plain)
            .map_err(|flaw| bad("added_tokens.json", flaw.to_string()))?;
        files.added.sort_by_key(|token| token.id);
        files.stop =
            stops(&json("generation_config.json")?).map_err(|flaw| bad("generation_config.json", flaw.to_string()))?;
        files.chat_template = match read("chat_template.jinja")? {
            Some(bytes) => {
                Some(String::from_utf8(bytes).map_err(|error| bad("chat_template.jinja", error.to_string()))?)
            }
            None => match template_text(&config["chat_template"]) {
                Ok(Some(template)) => Some(template),
                Ok(None) => template_text(&json("chat_template.json")?["chat_template"])
                    .map_err(|flaw| bad("chat_template.json", flaw.to_string()))?,
                Err(flaw) => return Err(bad("tokenizer_config.json", flaw.to_string())),
            },
        };
        Ok(files)
    }

    /// `added_tokens.json`: text to id. Which of them are special is said elsewhere.
    fn add_plain(&mut self, plain: &Value) -> Result<(), Flaw> {
        for (content, id) in plain.as_object().into_iter().flatten() {
            let id = number(id).ok_or_else(|| Flaw::new(format!("`{content}` has no token id")))?;
            match self.added.iter().find(|known| known.content == *content) {
                Some(known) if known.id == id => continue,
                Some(known) => {
                    return Err(Flaw::new(format!(
                        "`{content}` has the id {id}, and {} in tokenizer_config.json",
                        known.id
                    )));
                }
                None => {}
            }
            let special = self.special.contains(content) || self.named_tokens.values().any(|token| token == content);
            self.added.push(Added {
                id,
                content: content.clone(),
                special,
                lstrip: false,
                rstrip: false,
                single_word: false,
                normalized: !special,
            });
        }
        Ok(())
    }
}

fn number(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A token that is given as its text, or as an object with `content`.
fn token_text(value: &Value) -> Result<Option<String>, Flaw> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        Value::Object(fields) => match fields.get("content") {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            _ => Err(Flaw::new("an object without `content`")),
        },
        _ => Err(Flaw::new("neither a string nor an object")),
    }
}

/// `added_tokens_decoder`: id to token.
fn added_tokens(decoder: &Value) -> Result<Vec<Added>, Flaw> {
    let mut added = Vec::new();
    for (id, token) in decoder.as_object().into_iter().flatten() {
        let wrong = || Flaw::new(format!("the token {id} is not described by an object with `content`"));
        let flag = |name: &str| token[name].as_bool().unwrap_or(false);
        added.push(Added {
            id: id.parse().map_err(|_| wrong())?,
            content: token["content"].as_str().ok_or_else(wrong)?.to_owned(),
            special: flag("special"),
            lstrip: flag("lstrip"),
            rstrip: flag("rstrip"),
            single_word: flag("single_word"),
            normalized: flag("normalized"),
        });
    }
    Ok(added)
}

/// `eos_token_id`: one, or several.
fn stops(config: &Value) -> Result<Option<Vec<u32>>, Flaw> {
    let wrong = || Flaw::new("`eos_token_id` is neither a token id nor a list of them");
    match &config["eos_token_id"] {
        Value::Null => Ok(None),
        Value::Array(ids) => ids
            .iter()
            .map(|id| number(id).ok_or_else(wrong))
            .collect::<Result<_, _>>()
            .map(Some),
        id => number(id).map(|id| Some(vec![id])).ok_or_else(wrong),
    }
}

/// A template, or the one called `default` of several.
fn template_text(value: &Value) -> Result<Option<String>, Flaw> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        Value::Array(named) => {
            let default = named.iter().find(|template| template["name"] == "default");
            let only = named.first().filter(|_| named.len() == 1);
            match default.or(only).map(|template| &template["template"]) {
                Some(Value::String(text)) => Ok(Some(text.clone())),
                _ => Err(Flaw::new(
                    "`chat_template` lists several templates and none is called `default`",
                )),
            }
        }
        _ => Err(Flaw::new("`chat_template` is neither a text nor a list of named ones")),
    }
}
