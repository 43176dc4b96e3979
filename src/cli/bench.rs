//! `bench`: every kernel checked against its CPU reference and then timed at GPT-2-small shapes, and whole training steps of the
//! demo model.

use std::time::Instant;

use anyhow::Context;
use clap::Args;
use serde_json::json;

use crate::compute::{Engine, Recording};
use crate::data::{Dataset, pass};
use crate::kernels::case::{Example, Sizes};
use crate::model::adapter::{Adapter, LoraSpec, Target};
use crate::model::central::Central;
use crate::model::workspace::Extent;

use super::console;
use super::options::{DeviceOptions, OutputOptions, ReadingOptions};
use super::source::{DEMO_TRAIN, Source};
use crate::model::weights::Holding;
use crate::terms::format::Format;
use crate::terms::optimizer::OptimizerSettings;

/// Check every kernel against its CPU reference and time it at GPT-2-small shapes, then time training steps of the demo model.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  sflllm bench --device gpu --filter 'matmul|attention' --peak --json")]
pub struct Options {
    /// Only ids that match this regular expression
    #[arg(long, value_name = "REGEX")]
    pub filter: Option<String>,
    /// Measure the device's own copy bandwidth and product rate first, and give results as fractions of them
    #[arg(long)]
    pub peak: bool,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// A sample runs at least this long, so that clocks and submission cost little.
const SAMPLE_SECONDS: f64 = 0.03;
/// Samples of which the median is taken.
const SAMPLES: usize = 5;
/// A kernel passes when no output is further from its reference than this, over the largest output.
const TOLERANCE: f64 = 2e-4;

/// Median seconds of one run of what `record` adds.
fn median_seconds(engine: &Engine, record: &dyn Fn(&mut Recording)) -> anyhow::Result<f64> {
    let prepared = |copies: usize| {
        let mut recording = engine.recording();
        (0..copies).for_each(|_| record(&mut recording));
        engine.prepare(recording)
    };
    let time = |copies: usize| {
        let ready = prepared(copies);
        pollster::block_on(engine.wait())?;
        let start = Instant::now();
        engine.run(&ready)?;
        pollster::block_on(engine.wait())?;
        anyhow::Ok(start.elapsed().as_secs_f64())
    };
    time(1)?;
    let once = time(1)?;
    let copies = ((SAMPLE_SECONDS / once.max(1e-6)).ceil() as usize).clamp(1, 200);
    let mut samples = (0..SAMPLES)
        .map(|_| Ok(time(copies)? / copies as f64))
        .collect::<anyhow::Result<Vec<f64>>>()?;
    samples.sort_by(f64::total_cmp);
    Ok(samples[SAMPLES / 2])
}

struct Row {
    id: String,
    median_s: f64,
    gflops: f64,
    gbytes_per_s: f64,
    max_abs_err: Option<f64>,
    config: String,
}

fn bench_kernel(engine: &Engine, example: &Example, sizes: Sizes) -> anyhow::Result<Row> {
    let id = example.id(sizes);
    let built = example.build(engine, sizes)?;
    let mut recording = engine.recording();
    built.record(&mut recording);
    let cost = recording.cost();
    let config = recording
        .commands()
        .iter()
        .filter_map(|command| match command {
            crate::compute::Command::Dispatch(dispatch) => {
                Some(dispatch.launch.as_ref().map_or("host", |launch| launch.variant.name))
            }
            _ => None,
        })
        .next()
        .unwrap_or_default()
        .to_owned();
    engine.run(&engine.prepare(recording))?;
    let found = pollster::block_on(built.download(engine))?;

    let reference_engine = Engine::cpu();
    let reference = example.build(&reference_engine, sizes)?;
    let mut recording = reference_engine.recording();
    reference.record(&mut recording);
    reference_engine.run(&reference_engine.prepare(recording))?;
    let expected = pollster::block_on(reference.download(&reference_engine))?;
    let difference = built.difference(&found, &expected);
    anyhow::ensure!(
        difference <= TOLERANCE,
        "{id} on {}: off its CPU reference by {difference:.2e} of the largest output (at most {TOLERANCE:.0e}); \
         it is not timed. Please report this with the output of `sflllm doctor`",
        engine.name()
    );
    let median_s = median_seconds(engine, &|recording| built.record(recording))?;
    Ok(Row {
        id,
        median_s,
        gflops: cost.flops / median_s / 1e9,
        gbytes_per_s: cost.bytes / median_s / 1e9,
        max_abs_err: Some(difference),
        config,
    })
}

/// A centralised training step of the demo model: (id, batch).
const STEPS: [(&str, usize); 2] = [("step/demo.central/4", 4), ("step/demo.central/8", 8)];

fn bench_step(engine: &Engine, id: &str, batch: usize) -> anyhow::Result<Row> {
    let source = Source::demo(Holding::As(Format::F16))?;
    let options = source.data_options(source.architecture.positions, &ReadingOptions::default());
    let data = Dataset::read(DEMO_TRAIN, "demo", source.tokenize(), &options)?;
    let batch = pass(&data.examples, batch, source.architecture.positions)?
        .next()
        .context("the demo data is empty")?;
    let spec = LoraSpec::new(8, 16.0, [Target::AttnQkv])?;
    let adapter = Adapter::init(&source.architecture, &spec, 0..source.architecture.blocks, 0)?;
    let extent = Extent {
        batch: batch.batch,
        seq: batch.seq,
    };
    let weights = source.load(engine)?;
    let settings = OptimizerSettings::default();
    let mut model = Central::new(
        engine,
        &source.architecture,
        weights,
        Some(&adapter),
        extent,
        Some(settings),
    )?;
    let mut samples = Vec::new();
    for _ in 0..3 + SAMPLES {
        let start = Instant::now();
        pollster::block_on(model.step(&batch.tokens, &batch.targets, batch.seq))?;
        samples.push(start.elapsed().as_secs_f64());
    }
    let mut samples = samples.split_off(3);
    samples.sort_by(f64::total_cmp);
    let median_s = samples[SAMPLES / 2];
    let cost = model.step_cost(batch.seq);
    Ok(Row {
        id: format!("{id}x{}", batch.seq),
        median_s,
        gflops: cost.flops / median_s / 1e9,
        gbytes_per_s: cost.bytes / median_s / 1e9,
        max_abs_err: None,
        config: format!("{:.0} tokens/s", (batch.batch * batch.seq) as f64 / median_s),
    })
}

/// Bytes of each of the two buffers that the copy bandwidth is measured with.
const COPY_BYTES: usize = 64 << 20;

/// The device's own copy bandwidth in GB/s (bytes read plus bytes written) and multiply-add rate in GFLOP/s.
fn peaks(engine: &Engine) -> anyhow::Result<(f64, f64)> {
    let words = COPY_BYTES / 4;
    let source = engine.buffer("peak.source", words)?;
    let target = engine.buffer("peak.target", words)?;
    let copy = median_seconds(engine, &|recording| recording.copy((&source, 0), (&target, 0), words))?;
    let out = engine.buffer("peak.out", crate::kernels::peak::LANES)?;
    let fma = median_seconds(engine, &|recording| crate::kernels::peak::multiply_add(recording, &out))?;
    let mut recording = engine.recording();
    crate::kernels::peak::multiply_add(&mut recording, &out);
    Ok((2.0 * COPY_BYTES as f64 / copy / 1e9, recording.cost().flops / fma / 1e9))
}

pub fn run(options: Options) -> anyhow::Result<()> {
    let filter = regex::Regex::new(options.filter.as_deref().unwrap_or("")).map_err(|error| {
        // The lines before the last show where in the expression, over several lines.
        let text = error.to_string();
        let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
        anyhow::anyhow!("--filter is no regular expression: {reason}")
    })?;
    let engine = options.device.engine()?;
    let peaks = options.peak.then(|| peaks(&engine)).transpose()?;
    let quiet = options.output.quiet;
    if !quiet {
        console::say(format!("device: {}", engine.name()));
        if let Some((bandwidth, rate)) = peaks {
            console::say(format!(
                "its copy bandwidth {bandwidth:.1} GB/s, multiply-add {rate:.0} GFLOP/s"
            ));
        }
    }
    let sizes = Sizes::GPT2_SMALL;
    let mut rows = Vec::new();
    let mut show = |row: Row| -> anyhow::Result<()> {
        if !options.output.json {
            let of_peak = peaks.map_or(String::new(), |(bandwidth, rate)| {
                format!(
                    "  {:3.0} % of fma  {:3.0} % of copy",
                    100.0 * row.gflops / rate,
                    100.0 * row.gbytes_per_s / bandwidth
                )
            });
            console::print(format!(
                "{:<52} {:>10.3} ms {:>9.1} GFLOP/s {:>8.1} GB/s  {}{of_peak}",
                row.id,
                1e3 * row.median_s,
                row.gflops,
                row.gbytes_per_s,
                row.config
            ))?;
        } else if !quiet {
            console::say(&row.id);
        }
        rows.push(row);
        Ok(())
    };
    for example in crate::kernels::examples() {
        if filter.is_match(&example.id(sizes)) {
            show(bench_kernel(&engine, example, sizes)?)?;
        }
    }
    for (id, batch) in STEPS {
        if filter.is_match(id) {
            show(bench_step(&engine, id, batch)?)?;
        }
    }
    anyhow::ensure!(!rows.is_empty(), "--filter matches no benchmark");
    if options.output.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| {
                let mut value = json!({
                    "id": row.id, "device": engine.name(), "median_s": row.median_s, "gflops": row.gflops,
                    "gbytes_per_s": row.gbytes_per_s, "max_abs_err": row.max_abs_err, "config": row.config,
                });
                if let Some((bandwidth, rate)) = peaks {
                    value["fma_fraction"] = json!(row.gflops / rate);
                    value["copy_fraction"] = json!(row.gbytes_per_s / bandwidth);
                }
                value
            })
            .collect();
        console::print(format!("{:#}", serde_json::Value::from(rows)))?;
    }
    Ok(())
}
