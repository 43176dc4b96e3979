//! `train`: centralised LoRA fine-tuning on one device, the baseline that the split run is held against.
//!
//! A run that is killed goes on with `--resume` as if nothing had been: adapter, moments, schedule and the order of the data are
//! those of the last saved state, and the metrics beyond it are taken back.

mod keeper;
mod state;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Map, Value, json};

use crate::compute::Engine;
use crate::data::tokenizer::CHATML_NAME;
use crate::data::{Batches, Dataset, Example, pass};
use crate::model::adapter::{Adapter, AdapterLayout};
use crate::model::architecture::Architecture;
use crate::model::central::{Central, Counted};
use crate::model::stack::StackWeights;
use crate::model::workspace::Extent;
use crate::protocol::message::Digest;
use crate::runs::directory::{self, RunDirectory};
use crate::server::metrics::Metrics;
use crate::split::Evaluation;

use super::console::{self, Bar};
use super::defaults;
use super::given::{self, Given, Recording};
use super::human::shell_word;
use super::interrupt::{self, Interrupt};
use super::options::{BatchOptions, DeviceOptions, LoraOptions, ModelOptions, OptimizerOptions, OutputOptions};
use super::source::{ModelName, Source};
use keeper::Keeper;
use state::State;

/// Centralised LoRA fine-tuning of a model on this device, without a network: the baseline.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm train --data mine.txt --valid held-out.txt --steps 200 --lr 3e-3 --out runs/mine
  sflllm train --resume runs/mine                  # go on after Ctrl-C, a crash or a power cut
  sflllm train --resume runs/mine --steps 400      # train on after its end")]
pub struct Options {
    #[command(flatten)]
    given: Given,
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub lora: LoraOptions,
    #[command(flatten)]
    pub optimizer: OptimizerOptions,
    #[command(flatten)]
    pub batches: BatchOptions,
    /// The data: JSON lines or a JSON list, CSV, `meaning||reference` lines, or plain text
    #[arg(long, value_name = "FILE", required_unless_present = "resume")]
    pub data: Option<PathBuf>,
    /// Evaluated before and after training
    #[arg(long, value_name = "FILE")]
    pub valid: Option<PathBuf>,
    /// Optimiser steps
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    pub steps: Option<u64>,
    /// Passes over the data; one if neither this nor --steps is given
    #[arg(long, value_name = "N")]
    pub epochs: Option<u64>,
    /// The run directory, which must not hold a run yet; runs/TIME-train if not given
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Go on with the run in this directory, with the options that it was begun with. --steps or --epochs may say a later end, to
    /// which its schedule then goes
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    pub resume: Option<PathBuf>,
    /// At least so much time between two states saved for --resume; 5 if not given, and more where saving would cost over 1 %
    #[arg(long, value_name = "SECONDS")]
    pub save_every: Option<u32>,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// `None` when it was interrupted.
fn evaluate(
    engine: &Engine,
    config: &Architecture,
    weights: &StackWeights,
    adapter: &Adapter,
    examples: &[Example],
    extent: Extent,
    interrupt: &Interrupt,
) -> anyhow::Result<Option<Evaluation>> {
    let mut model = Central::new(engine, config, weights.clone(), Some(adapter), extent, None)?;
    let mut counted = Counted::default();
    for batch in pass(examples, extent.batch, extent.seq)? {
        if interrupt.is_set() {
            return Ok(None);
        }
        counted += pollster::block_on(model.loss(&batch.tokens, &batch.targets, batch.seq))?;
    }
    Ok(Some(Evaluation::new(counted)))
}

/// How the options are kept in `run.json`.
const RECORDING: Recording = Recording {
    left_out: &["resume", "out", "save-every", "json", "quiet"],
    // The data may have been moved: it is known by its digest.
    may_change: &[
        ("steps", &["epochs"]),
        ("epochs", &["steps"]),
        ("device", &[]),
        ("data", &[]),
        ("valid", &[]),
    ],
    placed,
};

/// What an option's text means in whatever directory it is read.
pub(super) fn placed(option: &str, text: &str) -> String {
    let is_path = match option {
        "data" | "valid" | "init-adapter" => true,
        "chat-template" => text != CHATML_NAME,
        _ => false,
    };
    match text.parse::<ModelName>() {
        Ok(model) if option == "model" => model.recorded(),
        _ if is_path => absolute(text),
        _ => text.to_owned(),
    }
}

/// The path from the root on.
pub(super) fn absolute(path: &str) -> String {
    std::path::absolute(path).map_or_else(|_| path.to_owned(), |path| path.display().to_string())
}

/// What this is called by.
const COMMAND: &str = "train";

/// # Errors
/// One sentence that says what to do.
pub fn run(options: Options) -> anyhow::Result<()> {
    match &options.resume {
        Some(path) => resume(&path.clone(), options),
        None => {
            let directory = RunDirectory::create(options.out.as_deref(), "train")?;
            train(&options, directory)
        }
    }
}

/// Goes on with the run at `path`.
fn resume(path: &Path, given: Options) -> anyhow::Result<()> {
    let directory = RunDirectory::resume(path)?;
    let shown = path.display();
    let run = directory.run();
    let is_train = run.get("command").and_then(Value::as_str) == Some(COMMAND);
    ensure!(
        is_train,
        "the run in {shown} was not begun by `sflllm train`, which cannot go on with it"
    );
    let mut options: Options = RECORDING.resumed(COMMAND, run, &given.given, path)?;
    (options.output, options.save_every) = (given.output, given.save_every);
    let asks_more = given.steps.is_some() || given.epochs.is_some();
    match is_complete(&directory) && !asks_more {
        true => say_complete(&directory, &options),
        false => train(&options, directory),
    }
}

fn is_complete(directory: &RunDirectory) -> bool {
    directory.run().get("ended").and_then(Value::as_str) == Some("completed")
}

/// There is nothing to go on with.
fn say_complete(directory: &RunDirectory, options: &Options) -> anyhow::Result<()> {
    let run = directory.run();
    if options.output.json {
        return Ok(console::print_kept(serde_json::to_string(run)?)?);
    }
    let steps = run.get("totals").and_then(|totals| totals["steps"].as_u64());
    let steps = steps.map_or_else(String::new, |steps| format!(" after {steps} steps"));
    Ok(console::print_kept(format!(
        "the run in {} is complete{steps}; its adapter is in {}. To train on, say a later end: --steps N",
        directory.path().display(),
        directory.adapter().display()
    ))?)
}

/// What the run says of itself must still hold, or going on would be another run.
fn check_unchanged(run: &Map<String, Value>, pointer: [&str; 3], now: &str, what: &str) -> anyhow::Result<()> {
    let [first, rest @ ..] = pointer;
    let field = rest
        .iter()
        .filter(|name| !name.is_empty())
        .fold(run.get(first), |value, name| value?.get(name));
    match field.and_then(Value::as_str) {
        Some(before) if before != now => bail!(
            "{what} is not what the run was begun with (SHA-256 {now}, not {before}): bring that back, or begin another run with --out"
        ),
        _ => Ok(()),
    }
}

/// `configuration` without what a later end changes, as it is read from a file.
fn lasting(configuration: &Value) -> Value {
    let mut lasting: Value = serde_json::from_str(&configuration.to_string()).unwrap_or_default();
    if let Some(optimizer) = lasting.get_mut("optimizer").and_then(Value::as_object_mut) {
        optimizer.remove("total_steps");
        optimizer.remove("warmup");
    }
    lasting
}

/// How far a run has come.
struct Progress {
    taken: u64,
    tokens: u64,
    /// Before this process.
    seconds: f64,
    clock: Instant,
    loss: f64,
}

impl Progress {
    fn seconds(&self) -> f64 {
        self.seconds + self.clock.elapsed().as_secs_f64()
    }

    /// For `run.json`, where a loss that there is none of is null.
    fn totals(&self, metrics: &Metrics) -> Value {
        json!({
            "steps": self.taken, "tokens": self.tokens, "seconds": self.seconds(), "loss": self.loss,
            "metrics_lost": metrics.lost(),
        })
    }
}

/// A run from its first or a later step to its end, or to a request to end.
struct Training<'a> {
    model: Central,
    batches: Batches,
    metrics: Metrics,
    progress: Progress,
    keeper: Keeper,
    steps: u64,
    interrupt: &'a Interrupt,
    quiet: bool,
}

impl Training<'_> {
    fn steps(&mut self) -> anyhow::Result<()> {
        let bar = Bar::over(self.steps, "train", self.quiet);
        bar.inc(self.progress.taken);
        bar.reset_eta();
        while self.progress.taken < self.steps && !self.interrupt.is_set() {
            let loss = self.step()?;
            bar.set_message(format!("loss {loss:.4}"));
            bar.inc(1);
            if self.keeper.is_time() {
                self.save()?;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn step(&mut self) -> anyhow::Result<f64> {
        let begin = Instant::now();
        let batch = self.batches.next_batch();
        let counted = pollster::block_on(self.model.step(&batch.tokens, &batch.targets, batch.seq))?;
        let loss = counted.loss_sum / counted.tokens.max(1) as f64;
        let step = self.progress.taken;
        ensure!(
            loss.is_finite(),
            "the loss of step {step} is {loss}: try a lower --lr, or --clip 1"
        );
        self.progress.loss = loss;
        self.progress.tokens += counted.tokens as u64;
        self.metrics.line(
            "step",
            json!({"step": step, "loss": loss, "tokens": counted.tokens, "seconds": begin.elapsed().as_secs_f64()}),
        );
        if let Some(trouble) = self.metrics.take_trouble() {
            console::say(trouble);
        }
        self.progress.taken += 1;
        Ok(loss)
    }

    /// Saves the state for whoever goes on; whether it is saved.
    fn save(&mut self) -> anyhow::Result<bool> {
        let (model, progress, metrics) = (&self.model, &self.progress, &mut self.metrics);
        let cursor = self.batches.cursor();
        self.keeper.save(progress.taken, || {
            let state = State {
                cursor,
                tokens: progress.tokens,
                seconds: progress.seconds(),
                loss: progress.loss,
                metrics: metrics.position(),
                values: pollster::block_on(model.adapter())?,
                moments: pollster::block_on(model.moments())?,
            };
            Ok(state.encode())
        })
    }
}

fn train(options: &Options, mut directory: RunDirectory) -> anyhow::Result<()> {
    let quiet = options.output.quiet;
    let resumed = options.resume.is_some();
    let reading = &options.batches.reading;
    let source = Source::open(&options.model.model, options.model.weights, quiet)?.with_reading(reading)?;
    let seq = options.batches.seq(source.config.positions)?;
    let batch = options.batches.batch as usize;
    let data_file = options
        .data
        .as_deref()
        .context("--data FILE is needed: it says what is learned")?;
    let data = source.data(data_file, seq, reading, quiet)?;
    let valid = options
        .valid
        .as_deref()
        .map(|path| source.data(path, seq, reading, quiet))
        .transpose()?;
    let adapter = match &options.lora.init_adapter {
        Some(dir) => source.adapter(dir)?,
        None => Adapter::init(
            &source.config,
            &options.lora.spec(&source.config)?,
            0..source.config.blocks,
            options.batches.seed,
        )?,
    };
    let layout: &AdapterLayout = &adapter.layout;
    let per_epoch = data.examples.len().div_ceil(batch) as u64;
    let steps = options
        .steps
        .unwrap_or(options.epochs.unwrap_or(1).saturating_mul(per_epoch));
    let settings = options
        .optimizer
        .settings(&source.config, &adapter.spec.targets, steps)?;
    let said = defaults::said(
        &source.config,
        &options.lora,
        &adapter.spec,
        &options.optimizer,
        &settings,
    );
    let configuration = json!({
        "rank": adapter.spec.rank, "alpha": adapter.spec.alpha,
        "targets": adapter.spec.targets, "optimizer": settings, "batch": batch, "seq": seq,
        "seed": options.batches.seed, "shuffle": !options.batches.no_shuffle,
        "weights": source.holding.to_string(),
    });
    let model_digest = Digest(source.digest).to_string();
    if resumed {
        let run = directory.run();
        check_unchanged(run, ["model_sha256", "", ""], &model_digest, "the model")?;
        check_unchanged(run, ["data", "digest", ""], &data.summary.digest, "--data")?;
        if let Some(valid) = &valid {
            check_unchanged(run, ["valid", "summary", "digest"], &valid.summary.digest, "--valid")?;
        }
        let before = run.get("configuration").cloned().unwrap_or_default();
        ensure!(
            lasting(&before) == lasting(&configuration),
            "the run's options now mean {}, and meant {} when it was begun: go on with the version that began it",
            lasting(&configuration),
            lasting(&before)
        );
    }
    let (snapshots, loaded) = directory.snapshots()?;
    for damaged in snapshots.damaged() {
        console::say(damaged.to_string());
    }
    let found = loaded
        .map(|loaded| State::decode(&loaded.bytes, layout.len()))
        .transpose()
        .with_context(|| format!("cannot go on with the run in {}", directory.path().display()))?;
    let taken = found.as_ref().map_or(0, State::steps);
    ensure!(
        steps >= taken,
        "the run has taken {taken} steps already, more than the {steps} that are asked for: say a later end with --steps N"
    );
    if is_complete(&directory) && steps == taken {
        return say_complete(&directory, options);
    }
    let shuffle = (!options.batches.no_shuffle).then_some(options.batches.seed);
    let mut batches = Batches::new(data.examples.clone(), batch, seq, shuffle)?;
    let engine = options.device.engine()?;
    if !quiet {
        console::say(&said);
        console::say(format!(
            "{steps} steps of {batch} examples on {}, {} adapter values of rank {}",
            engine.name(),
            layout.len(),
            adapter.spec.rank
        ));
    }
    if resumed {
        let from = match taken {
            0 => "from the beginning: no state was saved that can be used".to_owned(),
            taken => format!("from step {taken}"),
        };
        console::say(format!("the run in {} goes on {from}", directory.path().display()));
        let device = directory.run().get("device").and_then(Value::as_str);
        if let Some(device) = device.filter(|device| *device != engine.name()) {
            console::say(format!(
                "it was begun on {device}: on {} its figures can differ in their last digits",
                engine.name()
            ));
        }
    }
    let weights = source.load(&engine)?;
    let extent = Extent { batch, seq };
    let mut model = Central::new(
        &engine,
        &source.config,
        weights.clone(),
        Some(&adapter),
        extent,
        Some(settings),
    )?;
    if let Some(found) = &found {
        batches.restore(found.cursor)?;
        model.restore(&found.values, &found.moments)?;
    }
    let interrupt = interrupt::watch("finishing this step and saving")?;
    let adapter_dir = directory.adapter();
    let describe = |path: &Path, data: &Dataset| json!({ "file": path, "summary": data.summary });
    directory.note(json!({
        "command": COMMAND,
        "options": RECORDING.record(&given::command::<Options>(COMMAND), &options.given),
        "model": source.name,
        "model_source": options.model.model.recorded(),
        "model_sha256": model_digest,
        "device": engine.name(),
        "configuration": configuration,
        "settings": said,
        "adapter": adapter_dir,
        "data": data.summary,
        "valid": options.valid.as_deref().zip(valid.as_ref()).map(|(path, data)| describe(path, data)),
    }))?;
    let evaluate_on = |adapter: &Adapter| -> anyhow::Result<Option<Value>> {
        let Some(valid) = &valid else {
            return Ok(None);
        };
        let evaluation = evaluate(
            &engine,
            &source.config,
            &weights,
            adapter,
            &valid.examples,
            extent,
            &interrupt,
        )?;
        Ok(evaluation.map(|e| json!({"loss": e.loss, "perplexity": e.perplexity, "tokens": e.tokens})))
    };
    let metrics = match resumed {
        true => {
            let metrics = Metrics::resume(
                directory.path(),
                found.as_ref().map_or_else(Default::default, |found| found.metrics),
            )?;
            directory.go_on(found.as_ref().map(State::steps))?;
            metrics
        }
        false => {
            let mut metrics = Metrics::new(directory.path());
            directory.begin()?;
            metrics.open();
            metrics
        }
    };
    let known = directory
        .run()
        .get("valid_before")
        .filter(|value| value.is_object())
        .cloned();
    let before = match known {
        Some(before) => Some(before),
        None => {
            let before = evaluate_on(&adapter)?;
            directory.note(json!({ "valid_before": before }))?;
            before
        }
    };
    let perplexity = |evaluation: &Value| evaluation["perplexity"].as_f64().unwrap_or(f64::NAN);
    if let (Some(before), false) = (&before, quiet) {
        console::say(format!("validation perplexity before: {:.4}", perplexity(before)));
    }
    let mut training = Training {
        model,
        batches,
        metrics,
        progress: Progress {
            taken,
            tokens: found.as_ref().map_or(0, |found| found.tokens),
            seconds: found.as_ref().map_or(0.0, |found| found.seconds),
            clock: Instant::now(),
            loss: found.as_ref().map_or(f64::NAN, |found| found.loss),
        },
        keeper: Keeper::new(
            snapshots,
            options.save_every.map(|seconds| Duration::from_secs(seconds.into())),
            found.as_ref().map(State::steps),
        ),
        steps,
        interrupt: &interrupt,
        quiet,
    };
    if let Err(error) = training.steps() {
        let reason = format!("failed: {}", console::sentence(&error));
        // What went wrong is said in any case.
        let _ = directory.end(&reason, training.progress.totals(&training.metrics));
        return Err(error);
    }
    let progress = &training.progress;
    let (taken, seconds) = (progress.taken, progress.seconds());
    // A loss that there is none of is null.
    let totals = progress.totals(&training.metrics);
    let last_loss = progress.loss;
    let trained = Adapter {
        values: pollster::block_on(training.model.adapter())?,
        ..adapter
    };
    // First of all: whatever may fail after it, this was the work.
    let kept = directory::save_at_last(&adapter_dir, &|dir| trained.save(dir, &source.config, &source.name));
    let is_saved = training.save()?;
    kept?;
    let kept = || format!("the adapter is in {}", adapter_dir.display());
    let after = match interrupt.is_set() {
        true => None,
        false => evaluate_on(&trained).with_context(kept)?,
    };
    directory.note(json!({ "valid_after": after })).with_context(kept)?;
    let reason = match taken == steps {
        true => "completed",
        false => "stopped",
    };
    directory.end(reason, totals).with_context(kept)?;
    let go_on = format!("sflllm train --resume {}", shell_word(directory.path()));
    if taken < steps && (options.output.json || !is_saved) {
        console::say(match is_saved {
            true => format!("go on with: {go_on}"),
            false => format!("{go_on} would go on {}", training.keeper.from()),
        });
    }
    if options.output.json {
        let summary = serde_json::to_string(directory.run())?;
        return console::print_kept(summary).with_context(kept);
    }
    let mut summary = format!(
        "{taken} steps in {seconds:.1} s, last loss {last_loss:.4}; adapter in {}",
        adapter_dir.display()
    );
    if let (Some(before), Some(after)) = (&before, &after) {
        summary += &format!(
            "\nvalidation perplexity {:.4} before, {:.4} after",
            perplexity(before),
            perplexity(after)
        );
    }
    if taken < steps && is_saved {
        summary += &format!("\ngo on with: {go_on}");
    }
    if let Err(error) = console::print_kept(summary) {
        // Everything that it would have said is in run.json.
        console::say(error.to_string());
    }
    Ok(())
}
