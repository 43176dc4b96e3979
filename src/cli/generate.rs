//! `generate`: text from a prompt.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use rand::{RngExt, SeedableRng};
use serde_json::json;

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
  sflllm generate --adapter none --adapter runs/mine/adapter --adapter runs/other/adapter --prompt 'place: Red Acorn||'

A prompt that ends in `||` is a meaning, as in `meaning||reference` data: what follows is its reference. With --chat, or with the
messages of a file, the model's chat template writes what is asked, and the answer follows.")]
pub struct Options {
    #[command(flatten)]
    pub model: ModelOptions,
    /// A PEFT adapter directory. Repeated, every one of them answers the same prompt; none is the model without an adapter
    #[arg(long, value_name = "DIR|none")]
    pub adapter: Vec<PathBuf>,
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
    /// Draw among the likeliest tokens that have this probability together; 1 for all
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub top_p: f32,
    /// Make tokens that the text has already less likely: 1 leaves them alone, 1.1 is mild
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// End the text before these words (repeatable)
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
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
    /// The likeliest tokens whose probabilities reach this are drawn from (nucleus sampling, arXiv 1904.09751); 1 is all.
    pub top_p: f32,
    /// Logits of tokens that the text has are divided by this where positive and multiplied where negative (CTRL, arXiv
    /// 1909.05858, as transformers does it, prompt included); 1 is none.
    pub repetition_penalty: f32,
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token every time.
    pub fn greedy(max_tokens: usize) -> Self {
        Self {
            max_tokens,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }

    fn checked(self) -> anyhow::Result<Self> {
        anyhow::ensure!(
            self.temperature.is_finite() && self.temperature >= 0.0,
            "--temperature {} must be a number of at least 0",
            self.temperature
        );
        anyhow::ensure!(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "--top-p {} must be above 0 and at most 1",
            self.top_p
        );
        anyhow::ensure!(
            self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0,
            "--repetition-penalty {} must be a number above 0",
            self.repetition_penalty
        );
        Ok(self)
    }
}

/// What a [`Writer`] wrote.
#[derive(Clone, Debug)]
pub struct Written {
    pub ids: Vec<u32>,
    /// From the end of the prompt.
    pub elapsed: Duration,
}

impl Written {
    /// Tokens per second once the prompt was read; none where nothing was written.
    pub fn tokens_per_s(&self) -> Option<f64> {
        let seconds = self.elapsed.as_secs_f64();
        (seconds > 0.0 && !self.ids.is_empty()).then(|| self.ids.len() as f64 / seconds)
    }
}

/// Text that ends before any of some words: what may be the beginning of one is held back until it is known.
struct Until<'a> {
    stops: &'a [String],
    held: String,
    ended: bool,
}

impl<'a> Until<'a> {
    fn new(stops: &'a [String]) -> Self {
        Self {
            stops,
            held: String::new(),
            ended: false,
        }
    }

    /// What of the text with `piece` can be shown.
    fn push(&mut self, piece: &str) -> String {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.ended = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(begins);
        let held = self.held.split_off(keep.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, held)
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

    /// Continues `prompt` until a token that ends the text, `max_tokens` or the end of the room; `each` sees every new id, and
    /// its `Break` or error ends the text.
    pub fn write(
        &mut self,
        prompt: &[u32],
        sampling: &Sampling,
        mut each: impl FnMut(u32) -> anyhow::Result<ControlFlow<()>>,
    ) -> anyhow::Result<Written> {
        let room = self.generator.capacity();
        anyhow::ensure!(
            prompt.len() < room,
            "the prompt has {} tokens; there is room for {room} with what is to be written",
            prompt.len()
        );
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(sampling.seed);
        self.generator.truncate(0);
        let mut logits = pollster::block_on(self.generator.extend(prompt))?;
        let start = Instant::now();
        let mut seen: BTreeSet<u32> = prompt.iter().copied().collect();
        let mut ids = Vec::new();
        while ids.len() < sampling.max_tokens {
            penalise(&mut logits, &seen, sampling.repetition_penalty);
            let next = choose(&logits, &self.writable, sampling, &mut rng)?;
            if self.stop.contains(&next) {
                break;
            }
            ids.push(next);
            seen.insert(next);
            if each(next)?.is_break() || self.generator.len() == room || ids.len() == sampling.max_tokens {
                break;
            }
            logits = pollster::block_on(self.generator.extend(&[next]))?;
        }
        Ok(Written {
            ids,
            elapsed: start.elapsed(),
        })
    }
}

fn penalise(logits: &mut [f32], seen: &BTreeSet<u32>, penalty: f32) {
    for &id in seen {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
        }
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
    let weight = |&i: &u32| f64::from((logits[i as usize] - top) / sampling.temperature).exp();
    if sampling.top_p < 1.0 {
        order.sort_unstable_by(by_logit);
        let enough = f64::from(sampling.top_p) * order.iter().map(weight).sum::<f64>();
        let mut reached = 0.0;
        let count = order.iter().take_while(|id| {
            let more = reached < enough;
            reached += weight(id);
            more
        });
        let count = count.count();
        order.truncate(count);
    }
    let weights: Vec<f64> = order.iter().map(weight).collect();
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

/// What `--adapter` calls the model without one.
const NO_ADAPTER: &str = "none";

/// # Errors
/// One sentence that says what to do.
pub fn run(options: Options) -> anyhow::Result<()> {
    let sampling = Sampling {
        max_tokens: options.max_tokens,
        temperature: options.temperature,
        top_k: options.top_k,
        top_p: options.top_p,
        repetition_penalty: options.repetition_penalty,
        seed: options.seed,
    }
    .checked()?;
    anyhow::ensure!(
        options.stop.iter().all(|stop| !stop.is_empty()),
        "--stop is empty: name the words that end the text"
    );
    let reading = ReadingOptions {
        chat_template: options.chat_template.clone(),
        ..ReadingOptions::default()
    };
    let source =
        Source::open(&options.model.model, options.model.weights, options.output.quiet)?.with_reading(&reading)?;
    let (prompt, stop) = asked(source.tokenizer()?, &options)?;
    let adapters = (options.adapter.iter())
        .map(|name| {
            let adapter = match name.as_os_str() == NO_ADAPTER {
                true => None,
                false => Some(source.adapter(name)?),
            };
            Ok((Some(name), adapter))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let adapters = match adapters.is_empty() {
        true => vec![(None, None)],
        false => adapters,
    };
    let engine = options.device.engine()?;
    let weights = source.load(&engine)?;
    let capacity = prompt.len().saturating_add(options.max_tokens);
    let tokenizer = source.tokenizer()?;
    let compares = adapters.len() > 1;
    let mut answers = Vec::new();
    for (name, adapter) in &adapters {
        if let (true, false, Some(name)) = (compares, options.output.json, name) {
            console::print(format!("== {}", name.display()))?;
        }
        let held = weights.clone();
        let mut writer = Writer::new(
            &engine,
            &source.architecture,
            held,
            adapter.as_ref(),
            capacity,
            tokenizer,
        )?
        .stop_at(stop.clone());
        let (text, written) = answer(&mut writer, tokenizer, &prompt, &sampling, &options)?;
        if options.output.json {
            let mut answer = json!({ "text": text, "ids": written.ids, "tokens_per_s": written.tokens_per_s() });
            if compares {
                answer["adapter"] = json!(name);
            }
            answers.push(answer);
            continue;
        }
        console::print("")?;
        if let Some(rate) = written.tokens_per_s().filter(|_| !options.output.quiet) {
            console::say(format!("{} tokens, {rate:.1} per second", written.ids.len()));
        }
    }
    if options.output.json {
        let mut found = match compares {
            true => json!({ "answers": answers }),
            false => answers.swap_remove(0),
        };
        found["prompt"] = json!(options.prompt);
        console::print(found)?;
    }
    Ok(())
}

/// Writes one continuation, which is shown as it comes where it is not asked for as JSON: then it is returned.
fn answer(
    writer: &mut Writer,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampling: &Sampling,
    options: &Options,
) -> anyhow::Result<(String, Written)> {
    let mut stream = tokenizer.decode_stream();
    let mut until = Until::new(&options.stop);
    let mut text = String::new();
    let mut show = |part: String| -> anyhow::Result<()> {
        match options.output.json {
            true => text.push_str(&part),
            false => console::print_part(part)?,
        }
        Ok(())
    };
    let written = writer.write(prompt, sampling, |id| {
        // Every id that is drawn has a token.
        show(until.push(&stream.push(id).unwrap_or_default()))?;
        Ok(if until.ended {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    })?;
    if !until.ended {
        show(until.push(&stream.finish()?))?;
        show(std::mem::take(&mut until.held))?;
    }
    Ok((text, written))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut until = Until::new(&stops);
        let parts = pieces.iter().map(|piece| until.push(piece)).collect();
        (parts, until.held, until.ended)
    }

    #[test]
    fn a_text_ends_before_the_first_of_its_stops() {
        let (parts, held, ended) = shown(&["END", "\n\n"], &["a E", "N", "vy\n", "\nmore"]);
        assert_eq!((parts.concat().as_str(), held.as_str(), ended), ("a ENvy", "", true));
        assert_eq!(parts[0], "a ", "what may begin a stop is held back");
        let (parts, held, ended) = shown(&["é!"], &["caf", "é", "?", "é"]);
        assert_eq!((parts.concat().as_str(), held.as_str(), ended), ("café?", "é", false));
        let (parts, held, ended) = shown(&[], &["all", " of it"]);
        assert_eq!(
            (parts, held.as_str(), ended),
            (vec!["all".to_owned(), " of it".to_owned()], "", false)
        );
    }

    #[test]
    fn a_draw_keeps_to_the_likeliest_tokens() {
        // Probabilities 0.5, 0.25, 0.125, 0.125.
        let logits = [0.5f32, 0.25, 0.125, 0.125].map(f32::ln);
        let drawn = |top_k: usize, top_p: f32| -> BTreeSet<u32> {
            let sampling = Sampling {
                temperature: 1.0,
                top_k,
                top_p,
                ..Sampling::greedy(1)
            };
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
            (0..400)
                .map(|_| choose(&logits, &[0, 1, 2, 3], &sampling, &mut rng).unwrap())
                .collect()
        };
        assert_eq!(drawn(0, 1.0), BTreeSet::from([0, 1, 2, 3]));
        assert_eq!(drawn(0, 0.7), BTreeSet::from([0, 1]));
        assert_eq!(drawn(0, 0.3), BTreeSet::from([0]));
        assert_eq!(drawn(3, 1.0).len(), 3);
        assert_eq!(drawn(1, 1.0), BTreeSet::from([0]));
    }

    #[test]
    fn what_was_said_becomes_less_likely() {
        let mut logits = [2.0, -2.0, 1.0];
        penalise(&mut logits, &BTreeSet::from([0, 1, 9]), 2.0);
        assert_eq!(logits, [1.0, -4.0, 1.0]);
    }

    #[test]
    fn ids_without_a_token_are_never_drawn() {
        let (logits, writable) = ([0.0, 1.0, 50.0, 2.0, 60.0], [0, 1, 3]);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        assert_eq!(choose(&logits, &writable, &Sampling::greedy(1), &mut rng).unwrap(), 3);
        for top_k in [0, 2, 9] {
            let sampling = Sampling {
                temperature: 9.0,
                top_k,
                ..Sampling::greedy(1)
            };
            for _ in 0..100 {
                assert!(writable.contains(&choose(&logits, &writable, &sampling, &mut rng).unwrap()));
            }
        }
    }
}
