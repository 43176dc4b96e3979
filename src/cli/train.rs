//! `train`: centralised LoRA fine-tuning on one device, the baseline that the split run is held against.

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use serde_json::json;

use crate::data::{Batches, Example, pass};
use crate::model::adapter::{Adapter, AdapterLayout};
use crate::model::architecture::Architecture;
use crate::model::central::{Central, Counted};
use crate::model::stack::StackWeights;
use crate::model::workspace::Extent;
use crate::split::Evaluation;

use super::options::{BatchOptions, DeviceOptions, LoraOptions, ModelOptions, OptimizerOptions, OutputOptions};
use super::source::Source;
use super::{interrupt, progress};

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
    /// The data: JSON lines, `meaning||reference` lines, or plain text
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
    /// The run directory; runs/TIME-train if not given
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// Seconds since 1970.
fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn evaluate(
    engine: &crate::compute::Engine,
    config: &Architecture,
    weights: &StackWeights,
    adapter: &Adapter,
    examples: &[Example],
    extent: Extent,
) -> anyhow::Result<Evaluation> {
    let mut model = Central::new(engine, config, weights.clone(), Some(adapter), extent, None)?;
    let mut counted = Counted::default();
    for batch in pass(examples, extent.batch, extent.seq)? {
        counted += pollster::block_on(model.loss(&batch.tokens, &batch.targets, batch.seq))?;
    }
    Ok(Evaluation::new(counted))
}

pub fn run(options: Options) -> anyhow::Result<()> {
    let quiet = options.output.quiet;
    let source = Source::open(&options.model.model, options.model.weights)?;
    let seq = options.batches.seq(source.config.positions)?;
    let batch = options.batches.batch as usize;
    let skip = options.batches.skip_bad_lines;
    let data = source.data(&options.data, seq, skip, quiet)?;
    let valid = options
        .valid
        .as_deref()
        .map(|path| source.data(path, seq, skip, quiet))
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
    let settings = options.optimizer.settings(steps)?;
    let shuffle = (!options.batches.no_shuffle).then_some(options.batches.seed);
    let mut batches = Batches::new(data.examples.clone(), batch, seq, shuffle)?;
    let engine = options.device.engine()?;
    if !quiet {
        eprintln!(
            "{steps} steps of {batch} examples on {}, {} adapter values of rank {}",
            engine.name(),
            layout.len(),
            adapter.spec.rank
        );
    }
    let weights = source.load(&engine)?;
    let extent = Extent { batch, seq };
    let out = options
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("runs/{}-train", unix_time())));
    std::fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let metrics_path = out.join("metrics.jsonl");
    let mut metrics =
        std::fs::File::create(&metrics_path).with_context(|| format!("cannot write {}", metrics_path.display()))?;
    let evaluate_on = |adapter: &Adapter| {
        valid
            .as_ref()
            .map(|valid| evaluate(&engine, &source.config, &weights, adapter, &valid.examples, extent))
            .transpose()
    };
    let before = evaluate_on(&adapter)?;
    if let (Some(before), false) = (before, quiet) {
        eprintln!("validation perplexity before: {:.4}", before.perplexity);
    }
    let started = unix_time();
    let mut model = Central::new(
        &engine,
        &source.config,
        weights.clone(),
        Some(&adapter),
        extent,
        Some(settings),
    )?;
    let interrupted = interrupt::flag("finishing this step and saving")?;
    let bar = progress::bar(steps, "train", quiet);
    let clock = Instant::now();
    let mut tokens = 0;
    let mut last_loss = f64::NAN;
    let mut taken = 0;
    while taken < steps && !interrupted.load(Ordering::SeqCst) {
        let begin = Instant::now();
        let batch = batches.next_batch();
        let counted = pollster::block_on(model.step(&batch.tokens, &batch.targets, batch.seq))?;
        last_loss = counted.loss_sum / counted.tokens.max(1) as f64;
        anyhow::ensure!(
            last_loss.is_finite(),
            "the loss of step {taken} is {last_loss}: try a lower --lr, or --clip 1"
        );
        tokens += counted.tokens;
        writeln!(
            metrics,
            "{}",
            json!({"kind": "step", "step": taken, "loss": last_loss, "tokens": counted.tokens,
                   "seconds": begin.elapsed().as_secs_f64()})
        )
        .with_context(|| format!("cannot write {}", metrics_path.display()))?;
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
    let adapter_dir = out.join("adapter");
    trained.save(&adapter_dir, &source.config, &source.name)?;
    let after = evaluate_on(&trained)?;
    let valid_json = |evaluation: Option<Evaluation>| {
        evaluation.map(|e| json!({"loss": e.loss, "perplexity": e.perplexity, "tokens": e.tokens}))
    };
    let summary = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "command": "train",
        "model": source.name,
        "device": engine.name(),
        "configuration": {
            "rank": trained.spec.rank, "alpha": trained.spec.alpha,
            "targets": trained.spec.targets, "optimizer": settings, "batch": batch, "seq": seq,
            "seed": options.batches.seed, "shuffle": !options.batches.no_shuffle,
            "weights": source.holding.to_string(),
        },
        "adapter": adapter_dir,
        "data": data.summary,
        "started": started,
        "ended": unix_time(),
        "totals": {"steps": taken, "tokens": tokens, "seconds": seconds, "loss": last_loss},
        "valid_before": valid_json(before),
        "valid_after": valid_json(after),
    });
    std::fs::write(out.join("run.json"), format!("{summary:#}\n"))
        .with_context(|| format!("cannot write {}", out.join("run.json").display()))?;
    if options.output.json {
        println!("{summary}");
    } else {
        println!(
            "{taken} steps in {seconds:.1} s, last loss {last_loss:.4}; adapter in {}",
            adapter_dir.display()
        );
        if let (Some(before), Some(after)) = (before, after) {
            println!(
                "validation perplexity {:.4} before, {:.4} after",
                before.perplexity, after.perplexity
            );
        }
    }
    Ok(())
}
