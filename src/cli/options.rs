//! Options that several commands share, with their defaults, and the ways they become settings.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::defaults;
use super::source::ModelName;
use crate::compute::{Engine, Selection};
use crate::data::Columns;
use crate::data::tokenizer::CHATML_NAME;
use crate::model::adapter::{AdapterError, LoraSpec, Target};
use crate::model::architecture::Architecture;
use crate::model::weights::Holding;
use crate::terms::optimizer::{OptimizerSettings, Schedule};

/// A number, or `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Auto,
    Value(usize),
}

impl Choice {
    /// The number, if it is one.
    pub fn value(self) -> Option<usize> {
        match self {
            Self::Auto => None,
            Self::Value(value) => Some(value),
        }
    }
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
    /// Rank of the adapter; auto takes the one that a scenario's or calibration's rounds make fastest, or else 8, and
    /// 16 for a model wider than 1,024
    #[arg(long, value_name = "N|auto", default_value = "auto")]
    pub rank: Choice,
    /// Scale of the adapter, over its rank; twice the rank if not given
    #[arg(long, value_name = "F")]
    pub alpha: Option<f32>,
    /// Adapted matrices, as the model names them (c_attn, c_proj, c_fc; q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
    /// down_proj); all if not given, or by `all`
    #[arg(long, value_name = "NAMES")]
    pub targets: Option<String>,
    /// Start from this PEFT adapter instead of a fresh one; it brings its own rank, alpha and targets
    #[arg(long, value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,
}

/// What `--targets` names in a model.
pub(super) fn targets(model: &Architecture, names: Option<&str>) -> Result<Vec<Target>, AdapterError> {
    match names {
        Some(names) => LoraSpec::parse_targets(model, names),
        None => Ok(defaults::targets(model)),
    }
}

impl LoraOptions {
    /// The adapter these options ask for.
    pub fn spec(&self, model: &Architecture) -> Result<LoraSpec, AdapterError> {
        let rank = self.rank.value().unwrap_or_else(|| defaults::rank(model));
        let alpha = self.alpha.unwrap_or_else(|| defaults::alpha(rank));
        LoraSpec::new(rank, alpha, targets(model, self.targets.as_deref())?)
    }
}

#[derive(Args, Clone, Debug)]
pub struct OptimizerOptions {
    /// Learning rate of AdamW; if not given, one that suits the model's width, and falls to zero over the run
    #[arg(long, value_name = "F")]
    pub lr: Option<f32>,
    /// Decoupled weight decay
    #[arg(long, value_name = "F", default_value_t = 0.01)]
    pub weight_decay: f32,
    /// Steps over which the learning rate rises from zero; if not given, a twentieth of them, and none with --lr
    #[arg(long, value_name = "N")]
    pub warmup: Option<u64>,
    /// What the learning rate does after that; if not given, linear, and constant with --lr
    #[arg(long, value_name = "constant|linear")]
    pub schedule: Option<Schedule>,
    /// Scale gradients down to this global norm; in a split run each side takes the norm of its own
    #[arg(long, value_name = "F")]
    pub clip: Option<f32>,
}

impl OptimizerOptions {
    /// The settings of a run of `total_steps` steps, in which `targets` of a model are adapted.
    pub fn settings(
        &self,
        model: &Architecture,
        targets: &[Target],
        total_steps: u64,
    ) -> anyhow::Result<OptimizerSettings> {
        if let Some(lr) = self.lr {
            anyhow::ensure!(lr.is_finite() && lr >= 0.0, "--lr {lr} must be a number of at least 0");
        }
        anyhow::ensure!(
            self.weight_decay.is_finite() && self.weight_decay >= 0.0,
            "--weight-decay {} must be a number of at least 0",
            self.weight_decay
        );
        if let Some(clip) = self.clip {
            anyhow::ensure!(clip.is_finite() && clip > 0.0, "--clip {clip} must be a number above 0");
        }
        Ok(OptimizerSettings {
            lr: self.lr.unwrap_or_else(|| defaults::learning_rate(model, targets)),
            weight_decay: self.weight_decay,
            schedule: self.schedule.unwrap_or_else(|| defaults::schedule(self.lr)),
            warmup: self.warmup.unwrap_or_else(|| defaults::warmup(self.lr, total_steps)),
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

/// The longest window that `--seq` means for a model of `positions`.
pub(super) fn window(seq: Option<u32>, positions: usize) -> anyhow::Result<usize> {
    match seq {
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

impl BatchOptions {
    /// The longest window for a model of `positions`.
    pub fn seq(&self, positions: usize) -> anyhow::Result<usize> {
        window(self.seq, positions)
    }
}
