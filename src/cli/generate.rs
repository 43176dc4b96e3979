//! `generate`: text from a prompt.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use rand::{RngExt, SeedableRng};

use crate::compute::Engine;
use crate::data::chat::ASSISTANT;
use crate::data::reader::conversation;
use crate::data::{Conversation, Message, Tokenize, Tokenizer};
use crate::model::adapter::Adapter;
use crate::model::architecture::Architecture;
use crate::model::generation::Generator;
use crate::model::stack::StackWeights;

use super::console;
use super::options::{DeviceOptions, ModelOptions, OutputOptions, ReadingOptions};
use super::source::Source;

/// Text from a prompt.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm generate --adapter runs/mine/adapter --prompt 'place: Red Acorn; kind: tea room||'
  sflllm generate --model path/to/instruct --chat --system 'Be brief.' --prompt 'Name three fruits.'

A prompt that ends in `||` is a meaning, as in `meaning||reference` data: what follows is its reference. With --chat, or with the
messages of a file, the model's chat template writes what is asked, and the answer follows.")]
pub struct Options {
    #[command(flatten)]
    pub model: ModelOptions,
    /// A PEFT adapter directory
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The text to go on from; with --chat, what the user says
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "messages",
        conflicts_with = "messages"
    )]
    pub prompt: Option<String>,
    /// Answer as a chat model does
    #[arg(long, conflicts_with = "messages")]
    pub chat: bool,
    /// Said to the model before anything else
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// Answer the last message of this JSON file: a list of messages with role and content, or an object with `messages`
    #[arg(long, value_name = "FILE")]
    pub messages: Option<PathBuf>,
    /// Write conversations by this Jinja file instead of the model's own chat template; chatml is the common ChatML
    #[arg(long, value_name = "FILE|chatml")]
    pub chat_template: Option<String>,
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
        None => tokenizer.prompt(prompt)?,
    };
    anyhow::ensure!(!ids.is_empty(), "--prompt is empty; give some text to go on from");
    Ok(ids)
}

/// Ids of what the options ask, and the tokens that end the answer.
fn asked(tokenizer: &Tokenizer, options: &Options) -> anyhow::Result<(Vec<u32>, Vec<u32>)> {
    let conversation = match (&options.messages, &options.prompt) {
        (Some(file), _) => {
            let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
            let conversation = conversation(&text).with_context(|| format!("{} is not usable", file.display()))?;
            anyhow::ensure!(
                conversation.messages.last().is_some_and(|last| last.role != ASSISTANT),
                "{} ends with the assistant's own message: leave that out, and it is written anew",
                file.display()
            );
            conversation
        }
        (None, Some(prompt)) if options.chat => Conversation {
            messages: options
                .system
                .iter()
                .map(|system| Message::new("system", system))
                .chain([Message::new("user", prompt)])
                .collect(),
            tools: None,
        },
        (None, prompt) => {
            let ids = prompt_ids(tokenizer, prompt.as_deref().unwrap_or_default())?;
            return Ok((ids, tokenizer.stop_ids().to_vec()));
        }
    };
    Ok(tokenizer.chat_prompt(&conversation)?)
}

/// A model ready to write.
pub struct Writer {
    generator: Generator,
    /// Ids that have a token: an embedding may have more rows.
    writable: Vec<u32>,
    stop: Vec<u32>,
}

impl Writer {
    /// The whole model on `engine`, one text at a time, of at most `capacity` tokens.
    pub fn new(
        engine: &Engine,
        model: &Architecture,
        weights: StackWeights,
        adapter: Option<&Adapter>,
        capacity: usize,
        tokenizer: &Tokenizer,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            generator: Generator::new(engine, model, weights, adapter, capacity.min(model.positions))?,
            writable: (0..model.vocab as u32).filter(|&id| tokenizer.has(id)).collect(),
            stop: tokenizer.stop_ids().to_vec(),
        })
    }

    /// Ends texts at these tokens instead of those that the tokenizer's files name.
    pub fn stop_at(mut self, stop: Vec<u32>) -> Self {
        self.stop = stop;
        self
    }

    /// Continues `prompt` until a token that ends the text, `max_tokens` or the end of the room; `each` sees every new id, and an
    /// error of its ends the text.
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
            let next = choose(&logits, &self.writable, sampling, &mut rng)?;
            if self.stop.contains(&next) {
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

/// The next token for `logits` (vocab), one of `writable`.
fn choose(logits: &[f32], writable: &[u32], sampling: &Sampling, rng: &mut impl RngExt) -> anyhow::Result<u32> {
    anyhow::ensure!(
        logits.iter().all(|logit| logit.is_finite()),
        "the model's output is not finite: the weights or the adapter are broken"
    );
    let mut order = writable.to_vec();
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
    let reading = ReadingOptions {
        chat_template: options.chat_template.clone(),
        ..ReadingOptions::default()
    };
    let source =
        Source::open(&options.model.model, options.model.weights, options.output.quiet)?.with_reading(&reading)?;
    let (prompt, stop) = asked(source.tokenizer()?, &options)?;
    let adapter = options.adapter.as_deref().map(|dir| source.adapter(dir)).transpose()?;
    let engine = options.device.engine()?;
    let weights = source.load(&engine)?;
    let capacity = prompt.len().saturating_add(options.max_tokens);
    let tokenizer = source.tokenizer()?;
    let mut writer =
        Writer::new(&engine, &source.config, weights, adapter.as_ref(), capacity, tokenizer)?.stop_at(stop);
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
    let mut text = tokenizer.decode_stream();
    writer.write(&prompt, &sampling, |id| {
        // Every id that is drawn has a token.
        console::print_part(text.push(id).unwrap_or_default())?;
        Ok(())
    })?;
    console::print(text.finish()?)?;
    Ok(())
}
