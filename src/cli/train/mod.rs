//! `train`: centralised LoRA fine-tuning on one device, the baseline that the split run is held against.
//!
//! A run that is killed goes on with `--resume` as if nothing had been: adapter, moments, schedule and the order of the data are
//! those of the last saved state, and the metrics beyond it are taken back.

mod keeper;
mod state;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::compute::Engine;
use crate::data::tokenizer::CHATML_NAME;
use crate::data::{Batches, Dataset, Example, pass};
use crate::model::adapter::Adapter;
use crate::model::central::{Central, Counted};
use crate::model::stack::StackWeights;
use crate::model::workspace::Extent;
use crate::protocol::message::Digest;
use crate::runs::directory::{self, RunDirectory};
use crate::runs::snapshots::Snapshots;
use crate::server::metrics::Metrics;
use crate::split::Evaluation;
use crate::terms::optimizer::OptimizerSettings;

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

/// What a run is made of, by its options.
struct Ingredients {
    source: Source,
    data: Dataset,
    valid: Option<Dataset>,
    adapter: Adapter,
    extent: Extent,
    steps: u64,
    settings: OptimizerSettings,
    /// What was chosen, for people.
    said: String,
}

impl Ingredients {
    fn new(options: &Options) -> anyhow::Result<Self> {
        let quiet = options.output.quiet;
        let reading = &options.batches.reading;
        let source = Source::open(&options.model.model, options.model.weights, quiet)?.with_reading(reading)?;
        let seq = options.batches.seq(source.architecture.positions)?;
        let batch = options.batches.batch as usize;
        let data_file = options.data.as_deref();
        let data_file = data_file.context("--data FILE is needed: it says what is learned")?;
        let data = source.data(data_file, seq, reading, quiet)?;
        let valid = options.valid.as_deref();
        let valid = valid.map(|path| source.data(path, seq, reading, quiet)).transpose()?;
        let adapter = match &options.lora.init_adapter {
            Some(dir) => source.adapter(dir)?,
            None => Adapter::init(
                &source.architecture,
                &options.lora.spec(&source.architecture)?,
                0..source.architecture.blocks,
                options.batches.seed,
            )?,
        };
        let per_epoch = data.examples.len().div_ceil(batch) as u64;
        let epochs = options.epochs.unwrap_or(1);
        let steps = options.steps.unwrap_or(epochs.saturating_mul(per_epoch));
        let optimizer = &options.optimizer;
        let settings = optimizer.settings(&source.architecture, &adapter.spec.targets, steps)?;
        let said = defaults::said(&source.architecture, &options.lora, &adapter.spec, optimizer, &settings);
        Ok(Self {
            source,
            data,
            valid,
            adapter,
            extent: Extent { batch, seq },
            steps,
            settings,
            said,
        })
    }

    /// For `run.json`: the numbers that the options come to.
    fn configuration(&self, options: &BatchOptions) -> Value {
        let spec = &self.adapter.spec;
        json!({
            "rank": spec.rank, "alpha": spec.alpha, "targets": spec.targets, "optimizer": self.settings,
            "batch": self.extent.batch, "seq": self.extent.seq, "seed": options.seed, "shuffle": !options.no_shuffle,
            "weights": self.source.holding.to_string(),
        })
    }

    /// For `run.json`: SHA-256 of all that is trained, and trained on. Of data it is that of the tokens, which another tokenizer or chat
    /// template changes as well as another file.
    fn digests(&self) -> Value {
        json!({
            "model": Digest(self.source.digest).to_string(),
            "initial_adapter": Digest::of_values(&self.adapter.values).to_string(),
            "data": digest_of(&self.data.examples).to_string(),
            "valid": self.valid.as_ref().map(|valid| digest_of(&valid.examples).to_string()),
        })
    }

    /// That this is what a run was begun with, or going on would be another run.
    fn check(&self, run: &Map<String, Value>, options: &BatchOptions) -> anyhow::Result<()> {
        let (begun, now) = (run.get("digests").cloned().unwrap_or_default(), self.digests());
        for (what, name) in [
            ("the model", "model"),
            ("what --data says", "data"),
            ("what --valid says", "valid"),
            ("the adapter to start from", "initial_adapter"),
        ] {
            ensure!(
                begun[name] == now[name],
                "{what} is not what the run was begun with: bring that back, or begin another run with --out"
            );
        }
        let begun = run.get("configuration").cloned().unwrap_or_default();
        let (begun, now) = (lasting(&begun), lasting(&self.configuration(options)));
        ensure!(
            begun == now,
            "the run's options now mean {now}, and meant {begun} when it was begun: go on with the version that began it"
        );
        Ok(())
    }

    /// On the validation data, if there are any; `None` also when it was interrupted.
    fn evaluate(
        &self,
        engine: &Engine,
        weights: &StackWeights,
        adapter: &Adapter,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Option<Value>> {
        let Some(valid) = &self.valid else {
            return Ok(None);
        };
        let Extent { batch, seq } = self.extent;
        let mut model = Central::new(
            engine,
            &self.source.architecture,
            weights.clone(),
            Some(adapter),
            self.extent,
            None,
        )?;
        let mut counted = Counted::default();
        for batch in pass(&valid.examples, batch, seq)? {
            if interrupt.is_set() {
                return Ok(None);
            }
            counted += pollster::block_on(model.loss(&batch.tokens, &batch.targets, batch.seq))?;
        }
        let Evaluation {
            loss,
            perplexity,
            tokens,
            ..
        } = Evaluation::new(counted);
        Ok(Some(
            json!({ "loss": loss, "perplexity": perplexity, "tokens": tokens }),
        ))
    }
}

/// Of examples' tokens and labels, in their order.
fn digest_of(examples: &[Example]) -> Digest {
    let mut digest = Sha256::new();
    for example in examples {
        digest.update((example.ids.len() as u64).to_le_bytes());
        digest.update((example.labels.len() as u64).to_le_bytes());
        example.ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
        example
            .labels
            .iter()
            .for_each(|label| digest.update(label.to_le_bytes()));
    }
    Digest(digest.finalize().into())
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

/// The state to go on from, and where further ones are saved.
fn saved(directory: &RunDirectory, values: usize) -> anyhow::Result<(Snapshots, Option<State>)> {
    let (snapshots, loaded) = directory.snapshots()?;
    for damaged in snapshots.damaged() {
        console::say(damaged.to_string());
    }
    let state = loaded.map(|loaded| State::decode(&loaded.bytes, values)).transpose();
    let shown = directory.path().display();
    Ok((
        snapshots,
        state.with_context(|| format!("cannot go on with the run in {shown}"))?,
    ))
}

/// Says where a run goes on, and whether that is another device.
fn say_resumed(directory: &RunDirectory, taken: u64, engine: &Engine) {
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

fn perplexity(evaluation: &Value) -> f64 {
    evaluation["perplexity"].as_f64().unwrap_or(f64::NAN)
}

fn train(options: &Options, mut directory: RunDirectory) -> anyhow::Result<()> {
    let quiet = options.output.quiet;
    let resumed = options.resume.is_some();
    let made = Ingredients::new(options)?;
    let Ingredients {
        source,
        adapter,
        extent,
        steps,
        ..
    } = &made;
    let (extent, steps) = (*extent, *steps);
    if resumed {
        made.check(directory.run(), &options.batches)?;
    }
    let (snapshots, found) = saved(&directory, adapter.layout.len())?;
    let found_step = found.as_ref().map(State::steps);
    let taken = found_step.unwrap_or(0);
    ensure!(
        steps >= taken,
        "the run has taken {taken} steps already, more than the {steps} that are asked for: say a later end with --steps N"
    );
    if is_complete(&directory) && steps == taken {
        return say_complete(&directory, options);
    }
    let shuffle = (!options.batches.no_shuffle).then_some(options.batches.seed);
    let mut batches = Batches::new(made.data.examples.clone(), extent.batch, extent.seq, shuffle)?;
    let engine = options.device.engine()?;
    if !quiet {
        console::say(&made.said);
        console::say(format!(
            "{steps} steps of {} examples on {}, {} adapter values of rank {}",
            extent.batch,
            engine.name(),
            adapter.layout.len(),
            adapter.spec.rank
        ));
    }
    if resumed {
        say_resumed(&directory, taken, &engine);
    }
    let weights = source.load(&engine)?;
    let mut model = Central::new(
        &engine,
        &source.architecture,
        weights.clone(),
        Some(adapter),
        extent,
        Some(made.settings),
    )?;
    if let Some(found) = &found {
        batches.restore(found.cursor)?;
        model.restore(&found.values, &found.moments)?;
    }
    let interrupt = interrupt::watch("finishing this step and saving")?;
    let adapter_dir = directory.adapter();
    let valid = options.valid.as_deref().zip(made.valid.as_ref());
    directory.note(json!({
        "command": COMMAND,
        "options": RECORDING.record(&given::command::<Options>(COMMAND), &options.given),
        "model": source.name,
        "model_source": options.model.model.recorded(),
        "device": engine.name(),
        "configuration": made.configuration(&options.batches),
        "settings": made.said,
        "adapter": adapter_dir,
        "data": made.data.summary,
        "valid": valid.map(|(path, valid)| json!({ "file": path, "summary": valid.summary })),
        "digests": made.digests(),
    }))?;
    let metrics = match resumed {
        true => {
            let position = found.as_ref().map_or_else(Default::default, |found| found.metrics);
            let metrics = Metrics::resume(directory.path(), position)?;
            directory.go_on(found_step)?;
            metrics
        }
        false => {
            let mut metrics = Metrics::new(directory.path());
            directory.begin()?;
            metrics.open();
            metrics
        }
    };
    let known = directory.run().get("valid_before").filter(|value| value.is_object());
    let before = match known.cloned() {
        Some(before) => Some(before),
        None => {
            let before = made.evaluate(&engine, &weights, adapter, &interrupt)?;
            directory.note(json!({ "valid_before": before }))?;
            before
        }
    };
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
            found_step,
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
    let (totals, seconds) = (training.progress.totals(&training.metrics), training.progress.seconds());
    let trained = Adapter {
        values: pollster::block_on(training.model.adapter())?,
        ..adapter.clone()
    };
    // First of all: whatever may fail after it, this was the work.
    let kept = directory::save_at_last(&adapter_dir, &|dir| {
        trained.save(dir, &source.architecture, &source.name)
    });
    let is_saved = training.save()?;
    kept?;
    let kept = || format!("the adapter is in {}", adapter_dir.display());
    let after = match interrupt.is_set() {
        true => None,
        false => made
            .evaluate(&engine, &weights, &trained, &interrupt)
            .with_context(kept)?,
    };
    directory.note(json!({ "valid_after": after })).with_context(kept)?;
    let Progress { taken, loss, .. } = training.progress;
    let is_complete = taken == steps;
    let reason = match is_complete {
        true => "completed",
        false => "stopped",
    };
    directory.end(reason, totals).with_context(kept)?;
    let go_on = format!("sflllm train --resume {}", shell_word(directory.path()));
    if !is_complete && !is_saved {
        console::say(format!("{go_on} would go on {}", training.keeper.from()));
    }
    if options.output.json {
        if !is_complete && is_saved {
            console::say(format!("go on with: {go_on}"));
        }
        let summary = serde_json::to_string(directory.run())?;
        return console::print_kept(summary).with_context(kept);
    }
    let mut summary = format!(
        "{taken} steps in {seconds:.1} s, last loss {loss:.4}; adapter in {}",
        adapter_dir.display()
    );
    if let (Some(before), Some(after)) = (&before, &after) {
        summary += &format!(
            "\nvalidation perplexity {:.4} before, {:.4} after",
            perplexity(before),
            perplexity(after)
        );
    }
    if !is_complete && is_saved {
        summary += &format!("\ngo on with: {go_on}");
    }
    if let Err(error) = console::print_kept(summary) {
        // Everything that it would have said is in run.json.
        console::say(error.to_string());
    }
    Ok(())
}
