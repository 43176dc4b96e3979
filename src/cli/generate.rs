//! `generate`: text from a prompt.

use std::path::PathBuf;

use clap::Args;
use rand::{RngExt, SeedableRng};

use crate::compute::Engine;
use crate::data::{Tokenize, Tokenizer};
use crate::model::adapter::Adapter;
use crate::model::architecture::Architecture;
use crate::model::generation::Generator;
use crate::model::stack::StackWeights;

use super::console;
use super::options::{DeviceOptions, ModelOptions, OutputOptions};
use super::source::Source;

/// Text from a prompt.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  sflllm generate --adapter runs/mine/adapter --prompt 'place: Red Acorn; kind: tea room||'

A prompt that ends in `||` is a meaning, as in `meaning||reference` data: what follows is its reference.")]
pub struct Options {
    #[command(flatten)]
    pub model: ModelOptions,
    /// A PEFT adapter directory
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The text to go on from
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Longest continuation, in tokens
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token; higher is more varied
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub temperature: f32,
    /// Draw among this many likeliest tokens only; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    pub max_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is all.
    pub top_k: usize,
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token every time.
    pub fn greedy(max_tokens: usize) -> Self {
        Self {
            max_tokens,
            temperature: 0.0,
            top_k: 0,
            seed: 0,
        }
    }
}

/// Ids of a prompt: of the meaning and the end-of-text token after it where the prompt ends in `||`.
pub fn prompt_ids(tokenizer: &Tokenizer, prompt: &str) -> anyhow::Result<Vec<u32>> {
    let ids = match prompt.trim_end().strip_suffix("||") {
        Some(meaning) => {
            let mut ids = tokenizer.encode(meaning.trim())?;
            ids.push(tokenizer.eos()?);
            ids
        }
        None => tokenizer.encode(prompt)?,
    };
    anyhow::ensure!(!ids.is_empty(), "--prompt is empty; give some text to go on from");
    Ok(ids)
}

/// A model ready to write.
pub struct Writer {
    generator: Generator,
    eos: Option<u32>,
}

impl Writer {
    /// The whole model on `engine`, one text at a time, of at most `capacity` tokens.
    pub fn new(
        engine: &Engine,
        model: &Architecture,
        weights: StackWeights,
        adapter: Option<&Adapter>,
        capacity: usize,
        eos: Option<u32>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            generator: Generator::new(engine, model, weights, adapter, capacity.min(model.positions))?,
            eos,
        })
    }

    /// Continues `prompt` until the end-of-text token, `max_tokens` or the end of the room; `each` sees every new id, and an error
    /// of its ends the text.
    pub fn write(
        &mut self,
        prompt: &[u32],
        sampling: &Sampling,
        mut each: impl FnMut(u32) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<u32>> {
        let room = self.generator.capacity();
        anyhow::ensure!(
            prompt.len() < room,
            "the prompt has {} tokens; there is room for {room} with what is to be written",
            prompt.len()
        );
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(sampling.seed);
        self.generator.truncate(0);
        let mut logits = pollster::block_on(self.generator.extend(prompt))?;
        let mut ids = Vec::new();
        while ids.len() < sampling.max_tokens {
            let next = choose(&logits, sampling, &mut rng)?;
            if Some(next) == self.eos {
                break;
            }
            ids.push(next);
            each(next)?;
            if self.generator.len() == room || ids.len() == sampling.max_tokens {
                break;
            }
            logits = pollster::block_on(self.generator.extend(&[next]))?;
        }
        Ok(ids)
    }
}

/// The next token for `logits` (vocab).
fn choose(logits: &[f32], sampling: &Sampling, rng: &mut impl RngExt) -> anyhow::Result<u32> {
    anyhow::ensure!(
        logits.iter().all(|logit| logit.is_finite()),
        "the model's output is not finite: the weights or the adapter are broken"
    );
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]);
    if sampling.temperature <= 0.0 {
        return order
            .into_iter()
            .min_by(by_logit)
            .ok_or_else(|| anyhow::anyhow!("the model has no vocabulary"));
    }
    if sampling.top_k > 0 && sampling.top_k < order.len() {
        order.select_nth_unstable_by(sampling.top_k - 1, by_logit);
        order.truncate(sampling.top_k);
    }
    let top = order
        .iter()
        .map(|&i| logits[i as usize])
        .fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = order
        .iter()
        .map(|&i| f64::from((logits[i as usize] - top) / sampling.temperature).exp())
        .collect();
    let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
    for (&id, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left <= 0.0 {
            return Ok(id);
        }
    }
    order
        .last()
        .copied()
        .ok_or_else(|| anyhow::anyhow!("the model has no vocabulary"))
}

pub fn run(options: Options) -> anyhow::Result<()> {
    anyhow::ensure!(
        options.temperature.is_finite() && options.temperature >= 0.0,
        "--temperature {} must be a number of at least 0",
        options.temperature
    );
    let source = Source::open(&options.model.model, options.model.weights, options.output.quiet)?;
    let prompt = prompt_ids(source.tokenizer()?, &options.prompt)?;
    let adapter = options.adapter.as_deref().map(|dir| source.adapter(dir)).transpose()?;
    let engine = options.device.engine()?;
    let weights = source.load(&engine)?;
    let eos = source.tokenizer()?.eos().ok();
    let capacity = prompt.len().saturating_add(options.max_tokens);
    let mut writer = Writer::new(&engine, &source.config, weights, adapter.as_ref(), capacity, eos)?;
    let sampling = Sampling {
        max_tokens: options.max_tokens,
        temperature: options.temperature,
        top_k: options.top_k,
        seed: options.seed,
    };
    let tokenizer = source.tokenizer()?;
    if options.output.json {
        let ids = writer.write(&prompt, &sampling, |_| Ok(()))?;
        console::print(serde_json::json!({"prompt": options.prompt, "text": tokenizer.decode(&ids)?, "ids": ids}))?;
        return Ok(());
    }
    // Byte-level tokens may end inside a character: print what is complete.
    let mut shown = 0;
    let mut ids = Vec::new();
    let mut print = |ids: &[u32], all: bool| -> anyhow::Result<()> {
        let text = tokenizer.decode(ids).unwrap_or_default();
        let complete = if all {
            text.len()
        } else {
            text.trim_end_matches('\u{fffd}').len()
        };
        if complete > shown && text.is_char_boundary(shown) {
            console::print_part(&text[shown..complete])?;
            shown = complete;
        }
        Ok(())
    };
    let written = writer.write(&prompt, &sampling, |id| {
        ids.push(id);
        print(&ids, false)
    })?;
    print(&written, true)?;
    console::print("")?;
    Ok(())
}
