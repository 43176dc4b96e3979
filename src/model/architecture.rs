//! The shape of a model as data: [`Architecture`], parsed from and written as a Hugging Face `config.json`.
//!
//! It is separate from the weights because everything that reasons about a model without holding one
//! (the allocator's cost model, the protocol, a browser tab before its download) needs the shape alone.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::adapter::Target;
use crate::kernels::rotary::Scaling;

/// Of our own: a GPT-2 whose matrices are not as Hugging Face keeps them, because they come from a GGUF file.
const STORED_TRANSPOSED: &str = "stored_transposed";

/// No tensor of a model may hold more elements than this, so that sizes in bytes fit 32-bit targets.
const MAX_ELEMENTS: u64 = 1 << 29;

/// The families that can be loaded. What distinguishes them is said by [`Architecture`]'s methods; all else is sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    Gpt2,
    /// Llama, and SmolLM2, which is one.
    Llama,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    Qwen3,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 4] = [Family::Gpt2, Family::Llama, Family::Qwen2, Family::Qwen3];

    /// `model_type` in a `config.json`, and `general.architecture` in a GGUF file.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Gpt2 => "gpt2",
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    /// The family of this `model_type`.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.model_type() == name)
    }

    /// The class of transformers that loads it.
    pub fn class(self) -> &'static str {
        match self {
            Family::Gpt2 => "GPT2LMHeadModel",
            Family::Llama => "LlamaForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(self.model_type())
    }
}

/// What stands before each part of a block, and before the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Mean and variance, scale and shift.
    Layer,
    /// Root mean square, scale (Zhang & Sennrich, arXiv 1910.07467).
    Rms,
}

/// The feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// `gelu(x·W_fc)·W_proj`, by the tanh approximation.
    Gelu,
    /// `(silu(x·W_gate) ⊙ x·W_up)·W_down` (Shazeer, arXiv 2002.05202).
    SwiGlu,
}

/// Rotary position embedding (Su et al., arXiv 2104.09864) on the halves of each head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotary {
    /// `rope_theta`.
    pub base: f64,
    pub scaling: Scaling,
}

/// The sizes and the settings of a model.
///
/// Dropout settings of the file are not kept: the frozen base model runs without dropout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Architecture {
    pub family: Family,
    /// Transformer blocks.
    pub blocks: usize,
    /// Hidden width.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of one head; `heads · head_size` need not be `width`.
    pub head_size: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// The longest sequence the model was made for.
    pub positions: usize,
    /// Added to the variance or mean square in every norm.
    pub norm_epsilon: f32,
    /// `None`: positions are learned and added to the embedding.
    pub rotary: Option<Rotary>,
    /// The head is the token embedding.
    pub tied: bool,
    /// Matrices are stored (outputs, inputs): all but those of GPT-2 as Hugging Face keeps it.
    pub transposed: bool,
    /// End-of-text token; `None` when the file names none inside the vocabulary.
    pub eos: Option<u32>,
}

/// Why a description of a model was refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchitectureError {
    #[error("config.json is not valid JSON: {0}")]
    Json(serde_json::Error),
    #[error("config.json must hold a JSON object")]
    NotAnObject,
    #[error(
        "unknown model architecture {found}: models of type gpt2, llama (SmolLM2 too), qwen2 and qwen3 can be loaded"
    )]
    Family { found: String },
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
    Read { path: String, r#source: std::io::Error },
}

impl From<serde_json::Error> for ArchitectureError {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(error)
    }
}

impl Architecture {
    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`ArchitectureError`] names the field when it is missing, out of range or asks for something unsupported.
    pub fn from_json(text: &str) -> Result<Self, ArchitectureError> {
        Self::try_from(serde_json::from_str::<Value>(text.trim_start_matches('\u{feff}'))?)
    }

    /// A `config.json` that [`Architecture::from_json`] and transformers read as the same model.
    pub fn to_json(&self) -> String {
        Value::from(self.clone()).to_string()
    }

    /// Reads `config.json` in a model directory.
    ///
    /// # Errors
    /// [`ArchitectureError`], with the path when the file cannot be read.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(dir: &std::path::Path) -> Result<Self, ArchitectureError> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ArchitectureError::Read {
            path: path.display().to_string(),
            source,
        })?;
        Self::from_json(&text)
    }

    /// What the norms subtract and divide by.
    pub fn norm(&self) -> NormKind {
        match self.family {
            Family::Gpt2 => NormKind::Layer,
            Family::Llama | Family::Qwen2 | Family::Qwen3 => NormKind::Rms,
        }
    }

    /// What stands between a block's feed-forward projections.
    pub fn mlp(&self) -> MlpKind {
        match self.family {
            Family::Gpt2 => MlpKind::Gelu,
            Family::Llama | Family::Qwen2 | Family::Qwen3 => MlpKind::SwiGlu,
        }
    }

    /// Whether queries and keys are normed, head by head, before they are rotated.
    pub(crate) fn qk_norm(&self) -> bool {
        self.family == Family::Qwen3
    }

    /// Whether a projection has a bias.
    pub(crate) fn biased(&self, target: Target) -> bool {
        match self.family {
            Family::Gpt2 => true,
            Family::Qwen2 => matches!(target, Target::QProj | Target::KProj | Target::VProj),
            Family::Llama | Family::Qwen3 => false,
        }
    }

    /// The projections of a block, which LoRA can adapt, in the order of the forward pass: the canonical order of adapters.
    pub fn targets(&self) -> &'static [Target] {
        match self.family {
            Family::Gpt2 => &[Target::AttnQkv, Target::AttnProj, Target::MlpFc, Target::MlpProj],
            Family::Llama | Family::Qwen2 | Family::Qwen3 => &[
                Target::QProj,
                Target::KProj,
                Target::VProj,
                Target::OProj,
                Target::GateProj,
                Target::UpProj,
                Target::DownProj,
            ],
        }
    }

    /// (inputs, outputs) of a projection.
    pub fn dimensions(&self, target: Target) -> (usize, usize) {
        let keys = self.kv_heads * self.head_size;
        match target {
            Target::AttnQkv => (self.width, self.qkv_width()),
            Target::AttnProj | Target::OProj => (self.attention_width(), self.width),
            Target::MlpFc | Target::GateProj | Target::UpProj => (self.width, self.ffn),
            Target::MlpProj | Target::DownProj => (self.ffn, self.width),
            Target::QProj => (self.width, self.attention_width()),
            Target::KProj | Target::VProj => (self.width, keys),
        }
    }

    /// Values of all query heads.
    pub(crate) fn attention_width(&self) -> usize {
        self.heads * self.head_size
    }

    /// Values of all query, key and value heads, which lie side by side.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_size
    }
}

impl TryFrom<Value> for Architecture {
    type Error = ArchitectureError;

    fn try_from(value: Value) -> Result<Self, ArchitectureError> {
        let Value::Object(fields) = value else {
            return Err(ArchitectureError::NotAnObject);
        };
        let fields = Fields(fields);
        let family = fields.family()?;
        let architecture = match family {
            Family::Gpt2 => gpt2(&fields)?,
            Family::Llama | Family::Qwen2 | Family::Qwen3 => llama(family, &fields)?,
        };
        architecture.check_sizes(&fields)?;
        Ok(architecture)
    }
}

fn gpt2(fields: &Fields) -> Result<Architecture, ArchitectureError> {
    let blocks = fields.size("n_layer", 4096)?;
    let width = fields.size("n_embd", 1 << 17)?;
    let heads = fields.size("n_head", 1 << 17)?;
    let vocab = fields.size("vocab_size", 1 << 24)?;
    let positions = match fields.optional("n_positions") {
        Some(_) => fields.size("n_positions", 1 << 24)?,
        None if fields.optional("n_ctx").is_some() => fields.size("n_ctx", 1 << 24)?,
        None => {
            return Err(ArchitectureError::Missing { field: "n_positions" });
        }
    };
    let ffn = match fields.optional("n_inner") {
        Some(_) => fields.size("n_inner", 1 << 20)?,
        None => 4 * width,
    };
    if width % heads != 0 {
        return Err(ArchitectureError::Invalid {
            field: "n_embd",
            found: width.to_string(),
            expected: format!("a multiple of n_head = {heads}"),
        });
    }
    for (field, implemented, supported) in [
        ("scale_attn_weights", true, "true"),
        ("scale_attn_by_inverse_layer_idx", false, "false"),
        ("tie_word_embeddings", true, "true"),
        ("add_cross_attention", false, "false"),
    ] {
        fields.must_be(field, &Value::Bool(implemented), supported)?;
    }
    if let Some(value) = fields.optional("activation_function")
        && !matches!(value.as_str(), Some("gelu_new" | "gelu_pytorch_tanh"))
    {
        return Err(unsupported("activation_function", value, "\"gelu_new\""));
    }
    Ok(Architecture {
        family: Family::Gpt2,
        blocks,
        width,
        heads,
        kv_heads: heads,
        head_size: width / heads,
        ffn,
        vocab,
        positions,
        norm_epsilon: fields.epsilon("layer_norm_epsilon", 1e-5)?,
        rotary: None,
        tied: true,
        transposed: fields.optional(STORED_TRANSPOSED) == Some(&Value::Bool(true)),
        eos: fields.eos(vocab),
    })
}

/// Llama and what differs from it in a bias or a norm.
fn llama(family: Family, fields: &Fields) -> Result<Architecture, ArchitectureError> {
    let blocks = fields.size("num_hidden_layers", 4096)?;
    let width = fields.size("hidden_size", 1 << 17)?;
    let heads = fields.size("num_attention_heads", 1 << 17)?;
    let kv_heads = match fields.optional("num_key_value_heads") {
        Some(_) => fields.size("num_key_value_heads", 1 << 17)?,
        None => heads,
    };
    let head_size = match fields.optional("head_dim") {
        Some(_) => fields.size("head_dim", 1 << 12)?,
        None if family == Family::Qwen3 => 128,
        None => width / heads,
    };
    let vocab = fields.size("vocab_size", 1 << 24)?;
    if heads % kv_heads != 0 {
        return Err(ArchitectureError::Invalid {
            field: "num_key_value_heads",
            found: kv_heads.to_string(),
            expected: format!("a divisor of num_attention_heads = {heads}"),
        });
    }
    if head_size == 0 || !head_size.is_multiple_of(2) {
        return Err(ArchitectureError::Invalid {
            field: "head_dim",
            found: head_size.to_string(),
            expected: "an even number, since rotary positions turn halves of a head".to_owned(),
        });
    }
    let no = Value::Bool(false);
    for field in ["mlp_bias", "use_sliding_window", "is_encoder_decoder"] {
        fields.must_be(field, &no, "false")?;
    }
    // Qwen2's configuration has no such field, and its q, k and v always have biases.
    if family != Family::Qwen2 {
        fields.must_be("attention_bias", &no, "false")?;
    }
    for (field, one) in [("pretraining_tp", json!(1)), ("partial_rotary_factor", json!(1.0))] {
        if let Some(value) = fields.optional(field)
            && value.as_f64() != one.as_f64()
        {
            return Err(unsupported(field, value, "1"));
        }
    }
    for field in [
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "num_experts",
        "num_local_experts",
    ] {
        if let Some(value) = fields.optional(field) {
            return Err(unsupported(field, value, "a model without it"));
        }
    }
    if let Some(value) = fields.optional("hidden_act")
        && !matches!(value.as_str(), Some("silu" | "swish"))
    {
        return Err(unsupported("hidden_act", value, "\"silu\""));
    }
    if let Some(Value::Array(kinds)) = fields.optional("layer_types")
        && let Some(kind) = kinds.iter().find(|kind| kind.as_str() != Some("full_attention"))
    {
        return Err(unsupported("layer_types", kind, "\"full_attention\" in every block"));
    }
    let tied = match fields.optional("tie_word_embeddings") {
        None => false,
        Some(Value::Bool(tied)) => *tied,
        Some(value) => return Err(invalid("tie_word_embeddings", value, "true or false")),
    };
    Ok(Architecture {
        family,
        blocks,
        width,
        heads,
        kv_heads,
        head_size,
        ffn: fields.size("intermediate_size", 1 << 20)?,
        vocab,
        positions: match fields.optional("max_position_embeddings") {
            Some(_) => fields.size("max_position_embeddings", 1 << 24)?,
            None => 2048,
        },
        norm_epsilon: fields.epsilon("rms_norm_eps", 1e-6)?,
        rotary: Some(fields.rotary()?),
        tied,
        transposed: true,
        eos: fields.eos(vocab),
    })
}

impl Architecture {
    fn check_sizes(&self, fields: &Fields) -> Result<(), ArchitectureError> {
        let gpt2 = self.family == Family::Gpt2;
        let name = |theirs: &'static str, llama: &'static str| if gpt2 { theirs } else { llama };
        let learned = if self.rotary.is_none() { self.positions } else { 1 };
        for (field, rows, columns) in [
            ("vocab_size", self.vocab, self.width),
            (name("n_positions", "max_position_embeddings"), learned, self.width),
            (name("n_embd", "num_attention_heads"), self.width, self.qkv_width()),
            (name("n_inner", "intermediate_size"), self.width, self.ffn),
        ] {
            if rows as u64 * columns as u64 > MAX_ELEMENTS {
                return Err(ArchitectureError::Invalid {
                    field,
                    found: fields.optional(field).map_or_else(|| "null".to_owned(), shown),
                    expected: format!("a model whose largest tensor has at most {MAX_ELEMENTS} elements"),
                });
            }
        }
        Ok(())
    }
}

impl From<Architecture> for Value {
    fn from(model: Architecture) -> Self {
        let mut value = match model.family {
            Family::Gpt2 => json!({
                "n_layer": model.blocks,
                "n_embd": model.width,
                "n_head": model.heads,
                "n_inner": model.ffn,
                "vocab_size": model.vocab,
                "n_positions": model.positions,
                "layer_norm_epsilon": model.norm_epsilon,
                "activation_function": "gelu_new",
            }),
            Family::Llama | Family::Qwen2 | Family::Qwen3 => json!({
                "num_hidden_layers": model.blocks,
                "hidden_size": model.width,
                "num_attention_heads": model.heads,
                "num_key_value_heads": model.kv_heads,
                "head_dim": model.head_size,
                "intermediate_size": model.ffn,
                "vocab_size": model.vocab,
                "max_position_embeddings": model.positions,
                "rms_norm_eps": model.norm_epsilon,
                "hidden_act": "silu",
            }),
        };
        if let Some(rotary) = model.rotary {
            value["rope_theta"] = json!(rotary.base);
            value["rope_scaling"] = match rotary.scaling {
                Scaling::None => Value::Null,
                Scaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
                Scaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_positions,
                } => json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_positions,
                }),
            };
        }
        if model.family == Family::Gpt2 && model.transposed {
            value[STORED_TRANSPOSED] = json!(true);
        }
        value["model_type"] = json!(model.family.model_type());
        value["architectures"] = json!([model.family.class()]);
        value["tie_word_embeddings"] = json!(model.tied);
        value["eos_token_id"] = json!(model.eos);
        value["bos_token_id"] = json!(model.eos);
        value
    }
}

/// The fields of a `config.json`.
struct Fields(Map<String, Value>);

impl Fields {
    /// A field that is present and not null.
    fn optional(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn size(&self, field: &'static str, largest: u64) -> Result<usize, ArchitectureError> {
        let value = self.optional(field).ok_or(ArchitectureError::Missing { field })?;
        match value.as_u64() {
            Some(size) if (1..=largest).contains(&size) => Ok(size as usize),
            _ => Err(invalid(field, value, &format!("a whole number from 1 to {largest}"))),
        }
    }

    fn epsilon(&self, field: &'static str, default: f32) -> Result<f32, ArchitectureError> {
        match self.optional(field) {
            None => Ok(default),
            Some(value) => match value.as_f64().map(|epsilon| epsilon as f32) {
                Some(epsilon) if epsilon > 0.0 && epsilon < 1.0 => Ok(epsilon),
                _ => Err(invalid(field, value, "a number between 0 and 1")),
            },
        }
    }

    /// A setting that changes the mathematics must be absent or have the value that this crate implements.
    fn must_be(
        &self,
        field: &'static str,
        implemented: &Value,
        supported: &'static str,
    ) -> Result<(), ArchitectureError> {
        match self.optional(field) {
            Some(value) if value != implemented => Err(unsupported(field, value, supported)),
            _ => Ok(()),
        }
    }

    /// transformers writes its default 50256 into the files of models with smaller vocabularies; newer models name several tokens
    /// that end a text, the usual one first.
    fn eos(&self, vocab: usize) -> Option<u32> {
        let value = match self.optional("eos_token_id")? {
            Value::Array(several) => several.first()?,
            one => one,
        };
        let eos = value.as_u64().filter(|&eos| eos < vocab as u64)?;
        Some(eos as u32)
    }

    fn family(&self) -> Result<Family, ArchitectureError> {
        let found = match (self.optional("model_type"), self.optional("architectures")) {
            (Some(model_type), _) => {
                if let Some(family) = model_type.as_str().and_then(Family::from_name) {
                    return Ok(family);
                }
                shown(model_type)
            }
            (None, Some(names)) => {
                let named = |class: &str| match names {
                    Value::Array(names) => names.iter().any(|name| name == class),
                    _ => false,
                };
                if let Some(family) = Family::ALL.into_iter().find(|family| named(family.class())) {
                    return Ok(family);
                }
                shown(names)
            }
            (None, None) => {
                return Err(ArchitectureError::Missing { field: "model_type" });
            }
        };
        Err(ArchitectureError::Family { found })
    }

    /// transformers 5 writes `rope_parameters`; before it there were `rope_theta` and `rope_scaling`.
    fn rotary(&self) -> Result<Rotary, ArchitectureError> {
        let empty = Map::new();
        let object = |field: &'static str| match self.optional(field) {
            None => Ok(&empty),
            Some(Value::Object(fields)) => Ok(fields),
            Some(value) => Err(invalid(field, value, "an object")),
        };
        let (parameters, scaling) = (object("rope_parameters")?, object("rope_scaling")?);
        let positive = |field: &'static str, value: Option<&Value>| match value.map(|value| (value, value.as_f64())) {
            Some((_, Some(number))) if number.is_finite() && number > 0.0 => Ok(Some(number)),
            None | Some((Value::Null, _)) => Ok(None),
            Some((value, _)) => Err(invalid(field, value, "a number above zero")),
        };
        let base = match positive("rope_theta", parameters.get("rope_theta"))? {
            Some(base) => base,
            None => positive("rope_theta", self.optional("rope_theta"))?.unwrap_or(10_000.0),
        };
        let scaling = if parameters.is_empty() { scaling } else { parameters };
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type"));
        let needed =
            |field: &'static str| positive(field, scaling.get(field))?.ok_or(ArchitectureError::Missing { field });
        if let Some(value) = scaling
            .get("partial_rotary_factor")
            .filter(|value| value.as_f64() != Some(1.0))
        {
            return Err(unsupported("partial_rotary_factor", value, "1"));
        }
        let scaling = match kind.map(|kind| (kind, kind.as_str())) {
            None | Some((Value::Null, _)) | Some((_, Some("default"))) => Scaling::None,
            Some((_, Some("linear"))) => Scaling::Linear {
                factor: needed("factor")?,
            },
            Some((_, Some("llama3"))) => Scaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_positions: needed("original_max_position_embeddings")? as usize,
            },
            Some((kind, _)) => return Err(unsupported("rope_type", kind, "default, linear or llama3")),
        };
        Ok(Rotary { base, scaling })
    }
}

fn invalid(field: &'static str, found: &Value, expected: &str) -> ArchitectureError {
    ArchitectureError::Invalid {
        field,
        found: shown(found),
        expected: expected.to_owned(),
    }
}

fn unsupported(field: &'static str, found: &Value, supported: &'static str) -> ArchitectureError {
    ArchitectureError::Unsupported {
        field,
        found: shown(found),
        supported,
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
