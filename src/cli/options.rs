//! Options that several commands share, with their defaults, and the ways they become settings.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::source::ModelName;
use crate::compute::{Engine, Selection};
use crate::data::Columns;
use crate::data::tokenizer::CHATML_NAME;
use crate::model::adapter::{AdapterError, LoraSpec, Target};
use crate::model::architecture::{Architecture, Family};
use crate::model::weights::Holding;
use crate::terms::optimizer::{OptimizerSettings, Schedule};

/// A number, or `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Auto,
    Value(usize),
}

impl std::str::FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            number => number
                .parse()
                .map(Self::Value)
                .map_err(|_| format!("`{number}` is neither a whole number nor `auto`")),
        }
    }
}

#[derive(Args, Clone, Debug)]
pub struct ModelOptions {
    /// A Hugging Face directory (config.json, model.safetensors, tokenizer.json or vocab.json + merges.txt), a .gguf file, a
    /// name on huggingface.co (fetched once, into the cache that Python uses), or `demo`
    #[arg(
        long,
        value_name = "DIR|FILE.gguf|hf:ORG/NAME[@REVISION]|demo",
        default_value = "demo"
    )]
    pub model: ModelName,
    /// How frozen weights are held: auto keeps what a file has quantised, and takes f16 otherwise
    #[arg(long, default_value_t, value_name = "auto|f32|f16|q8|q4")]
    pub weights: Holding,
}

#[derive(Args, Clone, Debug)]
pub struct DeviceOptions {
    /// auto (a GPU, else the CPU engine), gpu, cpu, or part of an adapter's name (`sflllm doctor` lists them)
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: Selection,
}

impl DeviceOptions {
    /// Opens the device.
    pub fn engine(&self) -> Result<Engine, crate::compute::Error> {
        pollster::block_on(Engine::open(&self.device))
    }
}

#[derive(Args, Clone, Debug)]
pub struct OutputOptions {
    /// Machine-readable results on stdout
    #[arg(long)]
    pub json: bool,
    /// No progress on stderr
    #[arg(long)]
    pub quiet: bool,
}

#[derive(Args, Clone, Debug)]
pub struct LoraOptions {
    /// Rank of the adapter; auto takes the one that a scenario's or calibration's rounds make fastest, or else 8
    #[arg(long, value_name = "N|auto", default_value = "auto")]
    pub rank: Choice,
    /// Scale of the adapter, over its rank; twice the rank if not given
    #[arg(long, value_name = "F")]
    pub alpha: Option<f32>,
    /// Adapted matrices, as the model names them (c_attn, c_proj, c_fc; q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
    /// down_proj), or `all`; if not given, c_attn of GPT-2 and q_proj and v_proj of others
    #[arg(long, value_name = "NAMES")]
    pub targets: Option<String>,
    /// Start from this PEFT adapter instead of a fresh one; it brings its own rank, alpha and targets
    #[arg(long, value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,
}

/// What `--targets` names in a model; its query and value projections if it is not given.
pub(super) fn targets(model: &Architecture, names: Option<&str>) -> Result<Vec<Target>, AdapterError> {
    match names {
        Some(names) => LoraSpec::parse_targets(model, names),
        None => Ok(match model.family {
            Family::Gpt2 => vec![Target::AttnQkv],
            _ => vec![Target::QProj, Target::VProj],
        }),
    }
}

/// What `--rank auto` takes.
const DEFAULT_RANK: usize = 8;

impl LoraOptions {
    /// The adapter these options ask for.
    pub fn spec(&self, model: &Architecture) -> Result<LoraSpec, AdapterError> {
        let rank = match self.rank {
            Choice::Auto => DEFAULT_RANK,
            Choice::Value(rank) => rank,
        };
        let alpha = self.alpha.unwrap_or(2.0 * rank as f32);
        LoraSpec::new(rank, alpha, targets(model, self.targets.as_deref())?)
    }
}

#[derive(Args, Clone, Debug)]
pub struct OptimizerOptions {
    /// Learning rate of AdamW
    #[arg(long, value_name = "F", default_value_t = 1e-3)]
    pub lr: f32,
    /// Decoupled weight decay
    #[arg(long, value_name = "F", default_value_t = 0.01)]
    pub weight_decay: f32,
    /// Steps over which the learning rate rises from zero
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub warmup: u64,
    /// What the learning rate does after that
    #[arg(long, default_value_t, value_name = "constant|linear")]
    pub schedule: Schedule,
    /// Scale gradients down to this global norm; in a split run each side takes the norm of its own
    #[arg(long, value_name = "F")]
    pub clip: Option<f32>,
}

impl OptimizerOptions {
    /// The settings of a run of `total_steps` steps.
    pub fn settings(&self, total_steps: u64) -> anyhow::Result<OptimizerSettings> {
        anyhow::ensure!(
            self.lr.is_finite() && self.lr >= 0.0,
            "--lr {} must be a number of at least 0",
            self.lr
        );
        anyhow::ensure!(
            self.weight_decay.is_finite() && self.weight_decay >= 0.0,
            "--weight-decay {} must be a number of at least 0",
            self.weight_decay
        );
        if let Some(clip) = self.clip {
            anyhow::ensure!(clip.is_finite() && clip > 0.0, "--clip {clip} must be a number above 0");
        }
        Ok(OptimizerSettings {
            lr: self.lr,
            weight_decay: self.weight_decay,
            schedule: self.schedule,
            warmup: self.warmup,
            total_steps,
            clip: self.clip,
        })
    }
}

#[derive(Args, Clone, Debug)]
pub struct BatchOptions {
    /// Examples in a batch
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub batch: u32,
    /// Longest window, in tokens; longer examples are cut. The smaller of 128 and the model's positions if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    pub seq: Option<u32>,
    /// Seed of the shuffle and of fresh adapters
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Take the examples in the file's order
    #[arg(long)]
    pub no_shuffle: bool,
    #[command(flatten)]
    pub reading: ReadingOptions,
}

/// How data files are to be understood.
#[derive(Args, Clone, Debug, Default)]
pub struct ReadingOptions {
    /// Leave out lines that cannot be read, and count them
    #[arg(long)]
    pub skip_bad_lines: bool,
    /// Which columns of a table, or fields of JSON, are what: prompt=question,completion=answer, or text=body
    #[arg(long, value_name = "NAMES")]
    pub columns: Option<Columns>,
    /// Write conversations by this Jinja file instead of the model's own chat template; chatml is the common ChatML
    #[arg(long, value_name = "FILE|chatml")]
    pub chat_template: Option<String>,
}

impl ReadingOptions {
    /// The chat template to use instead of the model's: its text, or `chatml`.
    pub fn chat_template(&self) -> anyhow::Result<Option<String>> {
        match self.chat_template.as_deref() {
            None | Some(CHATML_NAME) => Ok(self.chat_template.clone()),
            Some(file) => std::fs::read_to_string(file)
                .map(Some)
                .with_context(|| format!("--chat-template {file} cannot be read; give a Jinja file, or {CHATML_NAME}")),
        }
    }
}

/// What `--seq` is without being given, where the model has as many positions.
const DEFAULT_SEQ: usize = 128;

impl BatchOptions {
    /// The longest window for a model of `positions`.
    pub fn seq(&self, positions: usize) -> anyhow::Result<usize> {
        match self.seq {
            None => Ok(DEFAULT_SEQ.min(positions)),
            Some(seq) => {
                anyhow::ensure!(
                    seq as usize <= positions,
                    "--seq {seq} is longer than the model's {positions} positions"
                );
                Ok(seq as usize)
            }
        }
    }
}
