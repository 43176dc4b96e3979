//! `train`: centralised LoRA fine-tuning on one device, the baseline that the split run is held against.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use serde_json::json;

use crate::compute::Engine;
use crate::data::{Batches, Example, pass};
use crate::model::adapter::{Adapter, AdapterLayout};
use crate::model::architecture::Architecture;
use crate::model::central::{Central, Counted};
use crate::model::stack::StackWeights;
use crate::model::workspace::Extent;
use crate::server::metrics::Metrics;
use crate::server::store::{self, RunDirectory};
use crate::split::Evaluation;

use super::console::{self, Bar};
use super::defaults;
use super::interrupt::{self, Interrupt};
use super::options::{BatchOptions, DeviceOptions, LoraOptions, ModelOptions, OptimizerOptions, OutputOptions};
use super::source::Source;

/// Centralised LoRA fine-tuning of a model on this device, without a network: the baseline.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  sflllm train --data mine.txt --valid held-out.txt --steps 200 --lr 3e-3 --out runs/mine")]
pub struct Options {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub lora: LoraOptions,
    #[command(flatten)]
    pub optimizer: OptimizerOptions,
    #[command(flatten)]
    pub batches: BatchOptions,
    /// The data: JSON lines or a JSON list, CSV, `meaning||reference` lines, or plain text
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
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
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// `None` when it was interrupted.
fn evaluate(
    engine: &Engine,
    architecture: &Architecture,
    weights: &StackWeights,
    adapter: &Adapter,
    examples: &[Example],
    extent: Extent,
    interrupt: &Interrupt,
) -> anyhow::Result<Option<Evaluation>> {
    let mut model = Central::new(engine, architecture, weights.clone(), Some(adapter), extent, None)?;
    let mut counted = Counted::default();
    for batch in pass(examples, extent.batch, extent.seq)? {
        if interrupt.is_set() {
            return Ok(None);
        }
        counted += pollster::block_on(model.loss(&batch.tokens, &batch.targets, batch.seq))?;
    }
    Ok(Some(Evaluation::new(counted)))
}

pub fn run(options: Options) -> anyhow::Result<()> {
    let quiet = options.output.quiet;
    let mut directory = RunDirectory::create(options.out.as_deref(), "train")?;
    let reading = &options.batches.reading;
    let source = Source::open(&options.model.model, options.model.weights, quiet)?.with_reading(reading)?;
    let seq = options.batches.seq(source.architecture.positions)?;
    let batch = options.batches.batch as usize;
    let data = source.data(&options.data, seq, reading, quiet)?;
    let valid = options
        .valid
        .as_deref()
        .map(|path| source.data(path, seq, reading, quiet))
        .transpose()?;
    let adapter = match &options.lora.init_adapter {
        Some(dir) => source.adapter(dir)?,
        None => Adapter::init(
            &source.architecture,
            &options.lora.spec(&source.architecture)?,
            0..source.architecture.blocks,
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
        .settings(&source.architecture, &adapter.spec.targets, steps)?;
    let said = defaults::said(
        &source.architecture,
        &options.lora,
        &adapter.spec,
        &options.optimizer,
        &settings,
    );
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
    let weights = source.load(&engine)?;
    let extent = Extent { batch, seq };
    let adapter_dir = directory.adapter();
    directory.note(json!({
        "command": "train",
        "model": source.name,
        "model_source": options.model.model.recorded(),
        "device": engine.name(),
        "configuration": {
            "rank": adapter.spec.rank, "alpha": adapter.spec.alpha,
            "targets": adapter.spec.targets, "optimizer": settings, "batch": batch, "seq": seq,
            "seed": options.batches.seed, "shuffle": !options.batches.no_shuffle,
            "weights": source.holding.to_string(),
        },
        "settings": said,
        "adapter": adapter_dir,
        "data": data.summary,
    }))?;
    let interrupt = interrupt::watch("finishing this step and saving")?;
    let evaluate_on = |adapter: &Adapter| match &valid {
        Some(valid) => {
            let architecture = &source.architecture;
            evaluate(
                &engine,
                architecture,
                &weights,
                adapter,
                &valid.examples,
                extent,
                &interrupt,
            )
        }
        None => Ok(None),
    };
    let mut model = Central::new(
        &engine,
        &source.architecture,
        weights.clone(),
        Some(&adapter),
        extent,
        Some(settings),
    )?;
    let mut metrics = Metrics::new(directory.path());
    directory.begin()?;
    metrics.open();
    let before = evaluate_on(&adapter)?;
    if let (Some(before), false) = (before, quiet) {
        console::say(format!("validation perplexity before: {:.4}", before.perplexity));
    }
    let bar = Bar::over(steps, "train", quiet);
    let clock = Instant::now();
    let mut tokens = 0;
    let mut last_loss = f64::NAN;
    let mut taken = 0;
    while taken < steps && !interrupt.is_set() {
        let begin = Instant::now();
        let batch = batches.next_batch();
        let counted = pollster::block_on(model.step(&batch.tokens, &batch.targets, batch.seq))?;
        last_loss = counted.loss_sum / counted.tokens.max(1) as f64;
        anyhow::ensure!(
            last_loss.is_finite(),
            "the loss of step {taken} is {last_loss}: try a lower --lr, or --clip 1"
        );
        tokens += counted.tokens;
        metrics.line(
            "step",
            json!({"step": taken, "loss": last_loss, "tokens": counted.tokens, "seconds": begin.elapsed().as_secs_f64()}),
        );
        if let Some(trouble) = metrics.take_trouble() {
            console::say(trouble);
        }
        taken += 1;
        bar.set_message(format!("loss {last_loss:.4}"));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let seconds = clock.elapsed().as_secs_f64();
    let trained = Adapter {
        values: pollster::block_on(model.adapter())?,
        ..adapter
    };
    // First of all: whatever may fail after it, this was the work.
    store::save_at_last(&adapter_dir, &|dir| {
        Ok(trained.save(dir, &source.architecture, &source.name)?)
    })?;
    let kept = || format!("the adapter is in {}", adapter_dir.display());
    let after = match interrupt.is_set() {
        true => None,
        false => evaluate_on(&trained).with_context(kept)?,
    };
    let valid_json = |evaluation: Option<Evaluation>| {
        evaluation.map(|e| json!({"loss": e.loss, "perplexity": e.perplexity, "tokens": e.tokens}))
    };
    // A loss that there is none of is null.
    let totals = json!({
        "steps": taken, "tokens": tokens, "seconds": seconds, "loss": last_loss, "metrics_lost": metrics.lost(),
    });
    directory
        .note(json!({"valid_before": valid_json(before), "valid_after": valid_json(after)}))
        .with_context(kept)?;
    let reason = match taken == steps {
        true => "completed",
        false => "stopped",
    };
    directory.end(reason, totals).with_context(kept)?;
    if options.output.json {
        let summary = serde_json::to_string(directory.run())?;
        return console::print_kept(summary).with_context(kept);
    }
    let mut summary = format!(
        "{taken} steps in {seconds:.1} s, last loss {last_loss:.4}; adapter in {}",
        adapter_dir.display()
    );
    if let (Some(before), Some(after)) = (before, after) {
        summary += &format!(
            "\nvalidation perplexity {:.4} before, {:.4} after",
            before.perplexity, after.perplexity
        );
    }
    if let Err(error) = console::print_kept(summary) {
        // Everything that it would have said is in run.json.
        console::say(error.to_string());
    }
    Ok(())
}
