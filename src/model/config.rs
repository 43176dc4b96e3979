//! The shape of a GPT-2-style model: `Config`, read from and written as a Hugging Face `config.json`.
//!
//! It is separate from the weights because everything that reasons about a model without holding one
//! (the allocator's cost model, the protocol, a browser tab before its download) needs the shape alone.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// No tensor of a model may hold more elements than this, so that sizes in bytes fit 32-bit targets.
const MAX_ELEMENTS: u64 = 1 << 29;

/// The sizes of a GPT-2 model.
///
/// Dropout settings of the file are not kept: the frozen base model runs without dropout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Config {
    /// Transformer blocks (`n_layer`).
    pub blocks: usize,
    /// Hidden width (`n_embd`), a multiple of `heads`.
    pub width: usize,
    /// Attention heads (`n_head`).
    pub heads: usize,
    /// Width of the feed-forward layer (`n_inner`, four times `width` when null).
    pub ffn: usize,
    /// Rows of the token embedding (`vocab_size`).
    pub vocab: usize,
    /// Learned positions, the longest sequence (`n_positions`).
    pub positions: usize,
    /// Added to the variance in every layer norm (`layer_norm_epsilon`).
    pub layernorm_epsilon: f32,
    /// End-of-text token (`eos_token_id`); `None` when the file names none inside the vocabulary.
    pub eos: Option<u32>,
}

/// Why a `config.json` was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config.json is not valid JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("config.json must hold a JSON object")]
    NotAnObject,
    #[error("unknown model architecture {found}: only GPT-2 models (model_type \"gpt2\") can be loaded")]
    Architecture { found: String },
    #[error("config.json has no `{field}`")]
    Missing { field: &'static str },
    #[error("config.json: `{field}` is {found}, expected {expected}")]
    Invalid {
        field: &'static str,
        found: String,
        expected: String,
    },
    #[error("config.json: `{field}` = {found} is not supported; {supported} is")]
    Unsupported {
        field: &'static str,
        found: String,
        supported: &'static str,
    },
    #[cfg(not(target_arch = "wasm32"))]
    #[error("cannot read {path}: {source}")]
    Read { path: String, source: std::io::Error },
}

impl Config {
    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] names the field when it is missing, out of range or asks for something unsupported.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        Self::try_from(serde_json::from_str::<Value>(text)?)
    }

    /// A `config.json` that [`Config::from_json`] and transformers read as the same model.
    pub fn to_json(&self) -> String {
        Value::from(self.clone()).to_string()
    }

    /// Reads `config.json` in a model directory.
    ///
    /// # Errors
    /// [`ConfigError`], with the path when the file cannot be read.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(dir: &std::path::Path) -> Result<Self, ConfigError> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read {
            path: path.display().to_string(),
            source,
        })?;
        Self::from_json(&text)
    }

    /// Width of one attention head.
    pub fn head_width(&self) -> usize {
        self.width / self.heads
    }
}

impl TryFrom<Value> for Config {
    type Error = ConfigError;

    fn try_from(value: Value) -> Result<Self, ConfigError> {
        let Value::Object(fields) = value else {
            return Err(ConfigError::NotAnObject);
        };
        check_architecture(&fields)?;

        let blocks = size(&fields, "n_layer", 4096)?;
        let width = size(&fields, "n_embd", 1 << 17)?;
        let heads = size(&fields, "n_head", 1 << 17)?;
        let vocab = size(&fields, "vocab_size", 1 << 24)?;
        let positions = match optional(&fields, "n_positions") {
            Some(_) => size(&fields, "n_positions", 1 << 24)?,
            None if optional(&fields, "n_ctx").is_some() => size(&fields, "n_ctx", 1 << 24)?,
            None => {
                return Err(ConfigError::Missing { field: "n_positions" });
            }
        };
        let ffn = match optional(&fields, "n_inner") {
            Some(_) => size(&fields, "n_inner", 1 << 20)?,
            None => 4 * width,
        };
        if width % heads != 0 {
            return Err(ConfigError::Invalid {
                field: "n_embd",
                found: width.to_string(),
                expected: format!("a multiple of n_head = {heads}"),
            });
        }
        for (field, rows, columns) in [
            ("vocab_size", vocab, width),
            ("n_positions", positions, width),
            ("n_embd", width, 3 * width),
            ("n_inner", width, ffn),
        ] {
            if rows as u64 * columns as u64 > MAX_ELEMENTS {
                return Err(ConfigError::Invalid {
                    field,
                    found: optional(&fields, field).map_or_else(|| "null".to_owned(), Value::to_string),
                    expected: format!("a model whose largest tensor has at most {MAX_ELEMENTS} elements"),
                });
            }
        }

        let layernorm_epsilon = match optional(&fields, "layer_norm_epsilon") {
            None => 1e-5,
            Some(value) => match value.as_f64().map(|epsilon| epsilon as f32) {
                Some(epsilon) if epsilon > 0.0 && epsilon < 1.0 => epsilon,
                _ => {
                    return Err(invalid("layer_norm_epsilon", value, "a number between 0 and 1"));
                }
            },
        };
        check_settings(&fields)?;

        // transformers writes its default 50256 into the files of models with smaller vocabularies.
        let eos = optional(&fields, "eos_token_id")
            .and_then(Value::as_u64)
            .filter(|&eos| eos < vocab as u64)
            .map(|eos| eos as u32);
        Ok(Self {
            blocks,
            width,
            heads,
            ffn,
            vocab,
            positions,
            layernorm_epsilon,
            eos,
        })
    }
}

impl From<Config> for Value {
    fn from(config: Config) -> Self {
        json!({
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": config.blocks,
            "n_embd": config.width,
            "n_head": config.heads,
            "n_inner": config.ffn,
            "vocab_size": config.vocab,
            "n_positions": config.positions,
            "layer_norm_epsilon": config.layernorm_epsilon,
            "activation_function": "gelu_new",
            "tie_word_embeddings": true,
            "eos_token_id": config.eos,
            "bos_token_id": config.eos,
        })
    }
}

/// A field that is present and not null.
fn optional<'a>(fields: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    fields.get(field).filter(|value| !value.is_null())
}

fn invalid(field: &'static str, found: &Value, expected: &str) -> ConfigError {
    ConfigError::Invalid {
        field,
        found: shown(found),
        expected: expected.to_owned(),
    }
}

/// A value for an error message, cut when it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 {
        text
    } else {
        text.chars().take(80).chain("…".chars()).collect()
    }
}

fn size(fields: &Map<String, Value>, field: &'static str, largest: u64) -> Result<usize, ConfigError> {
    let value = optional(fields, field).ok_or(ConfigError::Missing { field })?;
    match value.as_u64() {
        Some(size) if (1..=largest).contains(&size) => Ok(size as usize),
        _ => Err(invalid(field, value, &format!("a whole number from 1 to {largest}"))),
    }
}

fn check_architecture(fields: &Map<String, Value>) -> Result<(), ConfigError> {
    let found = match (optional(fields, "model_type"), optional(fields, "architectures")) {
        (Some(Value::String(model_type)), _) if model_type == "gpt2" => return Ok(()),
        (Some(model_type), _) => shown(model_type),
        (None, Some(Value::Array(names))) if names.iter().any(|name| name == "GPT2LMHeadModel") => {
            return Ok(());
        }
        (None, Some(names)) => shown(names),
        (None, None) => {
            return Err(ConfigError::Missing { field: "model_type" });
        }
    };
    Err(ConfigError::Architecture { found })
}

/// Settings that change the mathematics: each must have the value this crate implements.
fn check_settings(fields: &Map<String, Value>) -> Result<(), ConfigError> {
    let flags = [
        ("scale_attn_weights", true, "true"),
        ("scale_attn_by_inverse_layer_idx", false, "false"),
        ("tie_word_embeddings", true, "true"),
        ("add_cross_attention", false, "false"),
    ];
    for (field, implemented, supported) in flags {
        if let Some(value) = optional(fields, field)
            && *value != Value::Bool(implemented)
        {
            return Err(ConfigError::Unsupported {
                field,
                found: shown(value),
                supported,
            });
        }
    }
    if let Some(value) = optional(fields, "activation_function")
        && !matches!(value.as_str(), Some("gelu_new" | "gelu_pytorch_tanh"))
    {
        return Err(ConfigError::Unsupported {
            field: "activation_function",
            found: shown(value),
            supported: "\"gelu_new\"",
        });
    }
    Ok(())
}
