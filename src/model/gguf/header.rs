//! The shape of a model, read from a GGUF file's metadata and table, and written back.
//!
//! It is separate from the container because it knows what keys mean, and from `config` because it does not decide what
//! this crate can run: [`ModelHeader::config`] hands that question to the reader of `config.json`.

use serde_json::{Map, Value as Json, json};

use super::container::Gguf;
use super::metadata::{Metadata, Value};
use super::{GgufError, shown};
use crate::kernels::rotary::Scaling;
use crate::model::architecture::{Architecture, Family, Rotary};

const ARCHITECTURE_KEY: &str = "general.architecture";
const CHAT_TEMPLATE_KEY: &str = "tokenizer.chat_template";
/// The tensor of divisors of Llama 3's rotary frequencies.
pub(in crate::model) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// The context a model was first made for, where a file says it.
const ORIGINAL_CONTEXT: &str = "rope.scaling.original_context_length";
/// Llama 3 and its descendants differ in the factor alone: low and high frequency factor, and the context they were
/// first made for.
const LLAMA3_LOW: f32 = 1.0;
const LLAMA3_HIGH: f32 = 4.0;
const LLAMA3_CONTEXT: usize = 8192;

/// What the metadata of a GGUF file says about its model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelHeader {
    pub family: Family,
    /// `general.name`.
    pub name: Option<String>,
    pub blocks: usize,
    pub width: usize,
    pub ffn: usize,
    pub heads: usize,
    /// Heads of keys and values; a divisor of `heads`.
    pub kv_heads: usize,
    /// Size of every head, which need not be `width / heads`.
    pub head_size: usize,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// The longest sequence the model was made for; GPT-2's learned positions.
    pub positions: usize,
    /// Added to the variance or mean square in every norm.
    pub norm_epsilon: f32,
    /// Rotary positions; GPT-2 has none.
    pub rope: Option<Rope>,
    /// Whether the head is the token embedding.
    pub tied_head: bool,
    /// Whether queries, keys and values have biases.
    pub attention_bias: bool,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub chat_template: Option<String>,
}

/// Rotary positions over the whole head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub base: f32,
    pub scaling: RopeScaling,
}

/// What is done to the rotary frequencies base^(−2i / head size).
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// All are divided by one factor.
    Linear {
        factor: f32,
    },
    /// Llama 3: long wavelengths are divided by the factor, short ones kept, those between interpolated.
    Llama3 {
        factor: f32,
        low: f32,
        high: f32,
        original: usize,
    },
    /// Each is divided by its own factor, (head size / 2), by no rule known here.
    Factors(Vec<f32>),
}

impl Rope {
    /// What each frequency is divided by, (head size / 2).
    pub fn factors(&self, head_size: usize) -> Vec<f32> {
        match &self.scaling {
            RopeScaling::None => vec![1.0; head_size / 2],
            RopeScaling::Linear { factor } => vec![*factor; head_size / 2],
            RopeScaling::Llama3 {
                factor,
                low,
                high,
                original,
            } => llama3_factors(self.base, head_size, *factor, *low, *high, *original),
            RopeScaling::Factors(factors) => factors.clone(),
        }
    }
}

fn llama3_factors(base: f32, head_size: usize, factor: f32, low: f32, high: f32, original: usize) -> Vec<f32> {
    let [base, factor, low, high] = [base, factor, low, high].map(f64::from);
    let original = original as f64;
    (0..head_size / 2)
        .map(|i| {
            let wavelength = std::f64::consts::TAU * base.powf(2.0 * i as f64 / head_size as f64);
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor as f32
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            }
        })
        .collect()
}

/// Typed access to the keys below the architecture's name.
struct Keys<'a> {
    file: &'a str,
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.metadata.get(&self.key(name))
    }

    fn wrong(&self, name: &str, found: &Value, expected: &str) -> GgufError {
        GgufError::Key {
            file: self.file.to_owned(),
            key: self.key(name),
            found: found.shown(),
            expected: expected.to_owned(),
        }
    }

    fn missing(&self, name: &str) -> GgufError {
        GgufError::MissingKey {
            file: self.file.to_owned(),
            key: self.key(name),
        }
    }

    fn unsupported(&self, name: &str, found: &Value, supported: &'static str) -> GgufError {
        GgufError::Unsupported {
            file: self.file.to_owned(),
            what: format!("`{}` = {}", self.key(name), found.shown()),
            supported,
        }
    }

    /// A size from 1 to `largest`. Files of models whose blocks differ hold one number a block: all must be the same.
    fn optional_size(&self, name: &str, largest: u64) -> Result<Option<usize>, GgufError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let size = match value {
            Value::Array(array) => match array.integers().as_deref() {
                Some([first, rest @ ..]) if rest.iter().all(|size| size == first) => u64::try_from(*first).ok(),
                Some([_, ..]) => return Err(self.unsupported(name, value, "models whose blocks are all alike are")),
                _ => None,
            },
            value => value.unsigned(),
        };
        match size {
            Some(size) if (1..=largest).contains(&size) => Ok(Some(size as usize)),
            _ => Err(self.wrong(name, value, &format!("a whole number from 1 to {largest}"))),
        }
    }

    fn size(&self, name: &str, largest: u64) -> Result<usize, GgufError> {
        self.optional_size(name, largest)?.ok_or_else(|| self.missing(name))
    }

    fn optional_float(&self, name: &str) -> Result<Option<f32>, GgufError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.float() {
            Some(float) if float > 0.0 && (float as f32).is_finite() => Ok(Some(float as f32)),
            _ => Err(self.wrong(name, value, "a positive number")),
        }
    }

    /// Refuses keys that change the mathematics, unless they hold the value that changes nothing.
    fn check_settings(&self, family: Family) -> Result<(), GgufError> {
        let no_experts = "models without experts are";
        for name in ["expert_count", "expert_used_count"] {
            if let Some(value) = self.get(name)
                && value.unsigned() != Some(0)
            {
                return Err(self.unsupported(name, value, no_experts));
            }
        }
        for name in [
            "attention.scale",
            "logit_scale",
            "embedding_scale",
            "residual_scale",
            "attention.clamp_kqv",
        ] {
            if let Some(value) = self.get(name)
                && value.float() != Some(0.0)
            {
                return Err(self.unsupported(name, value, "models without extra scales are"));
            }
        }
        for (name, usual) in [("attention.causal", true), ("use_parallel_residual", false)] {
            if let Some(value) = self.get(name)
                && value.bool() != Some(usual)
            {
                return Err(self.unsupported(name, value, if usual { "true is" } else { "false is" }));
            }
        }
        if family != Family::Gpt2
            && let Some(window) = self.get("attention.sliding_window")
            && window.unsigned().is_none_or(|window| window > 0)
        {
            return Err(self.unsupported(
                "attention.sliding_window",
                window,
                "attention to all that came before is",
            ));
        }
        Ok(())
    }
}

impl From<&Rotary> for Rope {
    fn from(rotary: &Rotary) -> Self {
        let scaling = match rotary.scaling {
            Scaling::None => RopeScaling::None,
            Scaling::Linear { factor } => RopeScaling::Linear { factor: factor as f32 },
            Scaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => RopeScaling::Llama3 {
                factor: factor as f32,
                low: low_freq_factor as f32,
                high: high_freq_factor as f32,
                original: original_positions,
            },
        };
        Self {
            base: rotary.base as f32,
            scaling,
        }
    }
}

impl ModelHeader {
    /// The header of a model that is in no GGUF file yet. What belongs to its tokenizer is missing.
    pub(crate) fn of(model: &Architecture, name: &str) -> Self {
        Self {
            family: model.family,
            name: Some(name.to_owned()),
            blocks: model.blocks,
            width: model.width,
            ffn: model.ffn,
            heads: model.heads,
            kv_heads: model.kv_heads,
            head_size: model.head_size,
            vocab: model.vocab,
            positions: model.positions,
            norm_epsilon: model.norm_epsilon,
            rope: model.rotary.as_ref().map(Rope::from),
            tied_head: model.tied,
            attention_bias: model.targets().first().is_some_and(|&first| model.biased(first)),
            bos: None,
            eos: None,
            chat_template: None,
        }
    }

    /// Reads the header of a model of one of the families.
    ///
    /// # Errors
    /// [`GgufError`] names the key that is missing, out of range or asks for something unsupported.
    pub fn read(gguf: &mut Gguf) -> Result<Self, GgufError> {
        let family = family(gguf)?;
        let rope_factors = match gguf.tensor(ROPE_FACTORS) {
            None => None,
            Some(_) => Some(read_rope_factors(gguf)?),
        };
        let tied_head = gguf.tensor("output.weight").is_none() || gguf.equal("output.weight", "token_embd.weight")?;
        let attention_bias = gguf.tensor("blk.0.attn_q.bias").is_some() || gguf.tensor("blk.0.attn_qkv.bias").is_some();
        let keys = Keys {
            file: gguf.file(),
            metadata: gguf.metadata(),
            prefix: family.model_type(),
        };
        keys.check_settings(family)?;
        let blocks = keys.size("block_count", 4096)?;
        let width = keys.size("embedding_length", 1 << 17)?;
        let ffn = keys.size("feed_forward_length", 1 << 20)?;
        let heads = keys.size("attention.head_count", 1 << 17)?;
        let kv_heads = keys.optional_size("attention.head_count_kv", 1 << 17)?.unwrap_or(heads);
        let positions = keys.size("context_length", 1 << 24)?;
        let head_size = match keys.optional_size("attention.key_length", 1 << 17)? {
            Some(size) => size,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                let key = keys.key("embedding_length");
                return Err(GgufError::Key {
                    file: gguf.file().to_owned(),
                    key,
                    found: width.to_string(),
                    expected: format!("a multiple of the {heads} heads, or `attention.key_length` beside it"),
                });
            }
        };
        if let Some(found) = keys.get("attention.value_length")
            && found.unsigned() != Some(head_size as u64)
        {
            return Err(keys.unsupported("attention.value_length", found, "values of the size of keys are"));
        }
        if !heads.is_multiple_of(kv_heads) {
            let found = Value::from(kv_heads as u64);
            return Err(keys.wrong(
                "attention.head_count_kv",
                &found,
                &format!("a divisor of the {heads} heads"),
            ));
        }
        let epsilon = match family {
            Family::Gpt2 => "attention.layer_norm_epsilon",
            Family::Llama | Family::Qwen2 | Family::Qwen3 => "attention.layer_norm_rms_epsilon",
        };
        let norm_epsilon = keys.optional_float(epsilon)?.ok_or_else(|| keys.missing(epsilon))?;
        let rope = match family {
            Family::Gpt2 => None,
            Family::Llama | Family::Qwen2 | Family::Qwen3 => Some(rope(&keys, head_size, rope_factors)?),
        };
        let embedding = gguf.tensor("token_embd.weight").ok_or_else(|| GgufError::Missing {
            file: gguf.file().to_owned(),
            tensor: "token_embd.weight".to_owned(),
        })?;
        let vocab = match embedding.columns_and_rows().1 {
            rows @ 1..=0x100_0000 => rows as usize,
            rows => {
                return Err(GgufError::Unsupported {
                    file: gguf.file().to_owned(),
                    what: format!("a vocabulary of {rows}"),
                    supported: "one of up to 16777216 is",
                });
            }
        };
        let token = |name: &str| {
            let id = gguf.metadata().get(name)?.unsigned()?;
            u32::try_from(id).ok().filter(|&id| (id as usize) < vocab)
        };
        let text = |name: &str| gguf.metadata().get(name)?.string().map(str::to_owned);
        Ok(Self {
            family,
            name: text("general.name"),
            blocks,
            width,
            ffn,
            heads,
            kv_heads,
            head_size,
            vocab,
            positions,
            norm_epsilon,
            rope,
            tied_head,
            attention_bias,
            bos: token("tokenizer.ggml.bos_token_id"),
            eos: token("tokenizer.ggml.eos_token_id"),
            chat_template: text(CHAT_TEMPLATE_KEY),
        })
    }

    /// The `config.json` that transformers would keep beside the same model.
    ///
    /// # Errors
    /// [`GgufError::Unsupported`] for rotary factors that no setting of `config.json` stands for; `file` names the file
    /// in it.
    pub fn config(&self, file: &str) -> Result<Json, GgufError> {
        let mut config = Map::new();
        let mut set = |name: &str, value: Json| config.insert(name.to_owned(), value);
        set("model_type", self.family.model_type().into());
        set("vocab_size", self.vocab.into());
        set("tie_word_embeddings", self.tied_head.into());
        set("bos_token_id", json!(self.bos));
        set("eos_token_id", json!(self.eos));
        if self.family == Family::Gpt2 {
            set("architectures", json!([self.family.class()]));
            set("n_layer", self.blocks.into());
            set("n_embd", self.width.into());
            set("n_head", self.heads.into());
            set("n_inner", self.ffn.into());
            set("n_positions", self.positions.into());
            set("layer_norm_epsilon", decimal(self.norm_epsilon));
            set("activation_function", "gelu_new".into());
            return Ok(config.into());
        }
        set("architectures", json!([self.family.class()]));
        set("num_hidden_layers", self.blocks.into());
        set("hidden_size", self.width.into());
        set("num_attention_heads", self.heads.into());
        set("num_key_value_heads", self.kv_heads.into());
        set("head_dim", self.head_size.into());
        set("intermediate_size", self.ffn.into());
        set("max_position_embeddings", self.positions.into());
        set("rms_norm_eps", decimal(self.norm_epsilon));
        set("hidden_act", "silu".into());
        match self.family {
            Family::Gpt2 | Family::Llama => {
                set("attention_bias", self.attention_bias.into());
                set("mlp_bias", false.into());
            }
            Family::Qwen2 => {
                set("use_sliding_window", false.into());
            }
            Family::Qwen3 => {
                set("use_sliding_window", false.into());
                set("attention_bias", self.attention_bias.into());
            }
        }
        if let Some(rope) = &self.rope {
            set("rope_theta", decimal(rope.base));
            let scaling = match &rope.scaling {
                RopeScaling::None => Json::Null,
                RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": decimal(*factor)}),
                RopeScaling::Llama3 {
                    factor,
                    low,
                    high,
                    original,
                } => json!({
                    "rope_type": "llama3",
                    "factor": decimal(*factor),
                    "low_freq_factor": decimal(*low),
                    "high_freq_factor": decimal(*high),
                    "original_max_position_embeddings": original,
                }),
                RopeScaling::Factors(_) => {
                    return Err(GgufError::Unsupported {
                        file: file.to_owned(),
                        what: format!("the factors in `{ROPE_FACTORS}`"),
                        supported: "those of Llama 3 (low 1, high 4, and context 8192 unless the file says another) are",
                    });
                }
            };
            set("rope_scaling", scaling);
        }
        Ok(config.into())
    }

    /// The metadata that [`ModelHeader::read`] and llama.cpp read as the same model, without its tokenizer. Llama 3's
    /// rotary factors are a tensor, `rope_freqs.weight` of [`Rope::factors`].
    pub fn metadata(&self) -> Metadata {
        let mut metadata = Metadata::default();
        metadata.set(ARCHITECTURE_KEY, self.family.model_type());
        metadata.set("general.type", "model");
        if let Some(name) = &self.name {
            metadata.set("general.name", name.as_str());
        }
        let key = |name: &str| format!("{}.{name}", self.family);
        for (name, size) in [
            ("block_count", self.blocks),
            ("context_length", self.positions),
            ("embedding_length", self.width),
            ("feed_forward_length", self.ffn),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_size),
            ("attention.value_length", self.head_size),
            ("vocab_size", self.vocab),
        ] {
            metadata.set(&key(name), size as u32);
        }
        let Some(rope) = &self.rope else {
            metadata.set(&key("attention.layer_norm_epsilon"), self.norm_epsilon);
            return metadata;
        };
        metadata.set(&key("attention.layer_norm_rms_epsilon"), self.norm_epsilon);
        metadata.set(&key("rope.freq_base"), rope.base);
        metadata.set(&key("rope.dimension_count"), self.head_size as u32);
        match rope.scaling {
            RopeScaling::Linear { factor } => {
                metadata.set(&key("rope.scaling.type"), "linear");
                metadata.set(&key("rope.scaling.factor"), factor);
            }
            // Which rule the factors come from; llama.cpp reads the factors and has no use for it.
            RopeScaling::Llama3 { original, .. } => metadata.set(&key(ORIGINAL_CONTEXT), original as u32),
            RopeScaling::None | RopeScaling::Factors(_) => {}
        }
        metadata
    }
}

/// The number whose shortest decimal form is the f32's: 1e-5, not 9.999999747378752e-6.
fn decimal(value: f32) -> Json {
    json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
}

fn family(gguf: &Gguf) -> Result<Family, GgufError> {
    let unsupported = |what: String, supported| GgufError::Unsupported {
        file: gguf.file().to_owned(),
        what,
        supported,
    };
    let text = |key: &str| gguf.metadata().get(key).and_then(Value::string);
    if let Some(kind) = text("general.type").filter(|&kind| kind != "model") {
        let what = format!("a file of type \"{}\"", shown(kind));
        return Err(unsupported(what, "whole models (general.type \"model\") are"));
    }
    if let Some(parts) = gguf
        .metadata()
        .get("split.count")
        .and_then(Value::unsigned)
        .filter(|&parts| parts > 1)
    {
        let what = format!("one of {parts} parts of a split model");
        return Err(unsupported(
            what,
            "a single file is: join them with `llama-gguf-split --merge`",
        ));
    }
    let name = text(ARCHITECTURE_KEY).ok_or_else(|| GgufError::MissingKey {
        file: gguf.file().to_owned(),
        key: ARCHITECTURE_KEY.to_owned(),
    })?;
    Family::from_name(name).ok_or_else(|| {
        unsupported(
            format!("the architecture \"{}\"", shown(name)),
            "gpt2, llama, qwen2 and qwen3 are",
        )
    })
}

fn read_rope_factors(gguf: &mut Gguf) -> Result<Vec<f32>, GgufError> {
    let length = match gguf.tensor(ROPE_FACTORS).map(|info| &info.dimensions[..]) {
        Some(&[length]) if length <= 1 << 16 => length as usize,
        _ => 1,
    };
    gguf.read(ROPE_FACTORS, &[length])
}

fn rope(keys: &Keys<'_>, head_size: usize, factors: Option<Vec<f32>>) -> Result<Rope, GgufError> {
    if let Some(found) = keys.get("rope.dimension_count")
        && found.unsigned() != Some(head_size as u64)
    {
        return Err(keys.unsupported("rope.dimension_count", found, "rotation of the whole head is"));
    }
    if !head_size.is_multiple_of(2) {
        let found = Value::from(head_size as u64);
        return Err(keys.wrong("attention.key_length", &found, "an even number"));
    }
    let base = keys.optional_float("rope.freq_base")?.unwrap_or(10_000.0);
    let factor = match keys.optional_float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.optional_float("rope.scale_linear")?,
    };
    let kind = keys.get("rope.scaling.type");
    let scaling = match (kind.map(|kind| kind.string().unwrap_or("")), factor, factors) {
        (None | Some("none" | "linear"), None | Some(1.0), Some(factors)) => {
            if factors.len() != head_size / 2 || factors.iter().any(|&factor| factor <= 0.0) {
                return Err(GgufError::Unsupported {
                    file: keys.file.to_owned(),
                    what: format!("`{ROPE_FACTORS}` of {} factors", factors.len()),
                    supported: "a positive one for every two lanes of a head is",
                });
            }
            let original = keys.optional_size(ORIGINAL_CONTEXT, 1 << 24)?.unwrap_or(LLAMA3_CONTEXT);
            recognised(base, head_size, factors, original)
        }
        (Some("none"), ..) | (None | Some("linear"), None | Some(1.0), None) => RopeScaling::None,
        (None | Some("linear"), Some(factor), None) => RopeScaling::Linear { factor },
        _ => {
            let found = kind.map_or_else(|| "linear scaling with own factors".to_owned(), Value::shown);
            return Err(GgufError::Unsupported {
                file: keys.file.to_owned(),
                what: format!("`{}` = {found}", keys.key("rope.scaling.type")),
                supported: "none, linear and Llama 3's factors are",
            });
        }
    };
    Ok(Rope { base, scaling })
}

/// Llama 3's scaling, when it is what the factors come from.
fn recognised(base: f32, head_size: usize, factors: Vec<f32>, original: usize) -> RopeScaling {
    let factor = factors.iter().fold(1.0f32, |largest, &factor| largest.max(factor));
    let expected = llama3_factors(base, head_size, factor, LLAMA3_LOW, LLAMA3_HIGH, original);
    if expected
        .iter()
        .zip(&factors)
        .all(|(expected, found)| (expected - found).abs() <= 1e-4 * expected)
    {
        RopeScaling::Llama3 {
            factor,
            low: LLAMA3_LOW,
            high: LLAMA3_HIGH,
            original,
        }
    } else {
        RopeScaling::Factors(factors)
    }
}
