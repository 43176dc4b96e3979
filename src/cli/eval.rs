//! `eval`: loss and perplexity of a model, with or without an adapter, on a data file.

use std::path::PathBuf;

use clap::Args;

use crate::data::pass;
use crate::model::central::{Central, Counted};
use crate::model::workspace::Extent;
use crate::split::Evaluation;

use super::console::{self, Bar};
use super::options::{DeviceOptions, ModelOptions, OutputOptions, ReadingOptions};
use super::source::Source;

/// Loss and perplexity of a model, with or without an adapter, on a data file.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  sflllm eval --model path/to/gpt2 --adapter runs/mine/adapter --data valid.txt --json")]
pub struct Options {
    #[command(flatten)]
    pub model: ModelOptions,
    /// A PEFT adapter directory
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The data: JSON lines or a JSON list, CSV, `meaning||reference` lines, or plain text
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Examples computed at a time; does not change the result
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub batch: u32,
    /// Longest window, in tokens; the model's positions if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    pub seq: Option<u32>,
    #[command(flatten)]
    pub reading: ReadingOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

pub fn run(options: Options) -> anyhow::Result<()> {
    let source = Source::open(&options.model.model, options.model.weights, options.output.quiet)?
        .with_reading(&options.reading)?;
    let positions = source.architecture.positions;
    let seq = options.seq.map_or(positions, |seq| seq as usize);
    anyhow::ensure!(
        seq <= positions,
        "--seq {seq} is longer than the model's {positions} positions"
    );
    let data = source.data(&options.data, seq, &options.reading, options.output.quiet)?;
    let adapter = options.adapter.as_deref().map(|dir| source.adapter(dir)).transpose()?;
    let engine = options.device.engine()?;
    let batches = pass(&data.examples, options.batch as usize, seq)?;
    let bar = Bar::over(batches.len() as u64, "eval", options.output.quiet);
    let batches: Vec<_> = batches.collect();
    let longest = batches.iter().map(|batch| batch.seq).max().unwrap_or(1);
    let weights = source.load(&engine)?;
    let extent = Extent {
        batch: options.batch as usize,
        seq: longest,
    };
    let mut model = Central::new(&engine, &source.architecture, weights, adapter.as_ref(), extent, None)?;
    let mut counted = Counted::default();
    for batch in &batches {
        counted += pollster::block_on(model.loss(&batch.tokens, &batch.targets, batch.seq))?;
        bar.set_message(format!("loss {:.4}", counted.loss_sum / counted.tokens as f64));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let Evaluation {
        loss,
        perplexity,
        tokens,
    } = Evaluation::new(counted);
    let examples = data.examples.len();
    if options.output.json {
        console::print(
            serde_json::json!({"loss": loss, "perplexity": perplexity, "tokens": tokens, "examples": examples}),
        )?;
    } else {
        console::print(format!(
            "loss {loss:.5}, perplexity {perplexity:.4} over {tokens} tokens of {examples} examples"
        ))?;
    }
    Ok(())
}
