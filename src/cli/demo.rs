//! `sflllm demo`: the whole thing on one machine. Two clients in this process and any tab that joins fine-tune the demo model;
//! texts before and after show what it learned.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use serde_json::json;

use super::console;
use super::generate::{Sampling, Writer, prompt_ids};
use super::options::{DeviceOptions, OutputOptions, ReadingOptions};
use super::serve::{Hosting, conclude, host, model, token};
use super::source::{DEMO_TRAIN, DEMO_VALID, Source};
use crate::compute::Engine;
use crate::data::{Dataset, Sharding};
use crate::model::adapter::{Adapter, LoraSpec};
use crate::model::weights::Holding;
use crate::server::store::RunDirectory;
use crate::server::{self, Ending, Listen, Role, Run};
use crate::split::Training;
use crate::terms::format::Format;
use crate::terms::optimizer::{OptimizerSettings, Schedule};
use crate::terms::tensor::WireForm;

const CLIENTS: usize = 2;
const ROUNDS: u32 = 16;
const LOCAL_STEPS: u32 = 15;
const CUT: usize = 1;
const RANK: usize = 8;
const ALPHA: f32 = 16.0;
const BATCH: usize = 4;
const LEARNING_RATE: f32 = 1e-2;
const SEED: u64 = 0;
/// Validation examples looked at after every round.
const VALIDATED: usize = 64;
/// Texts written before and after.
const SAMPLES: usize = 3;
const SAMPLE_TOKENS: usize = 60;
/// Before training the likeliest text is one phrase again and again; a draw shows what the model knows.
const UNTRAINED: Sampling = Sampling {
    max_tokens: SAMPLE_TOKENS,
    temperature: 0.8,
    top_k: 40,
    top_p: 1.0,
    repetition_penalty: 1.0,
    seed: 1,
};

/// Fine-tune the demo model with two clients in this process and any tab that joins.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  sflllm demo
      then open the link it prints in a browser tab, or scan its QR code with a phone, to take part")]
pub struct Options {
    /// Address to listen on; may be repeated [default: https://0.0.0.0:8443 and http://127.0.0.1:8080, or free ports]
    #[arg(long, value_name = "ADDR")]
    pub listen: Vec<Listen>,
    /// Rounds of local training and averaging
    #[arg(long, value_name = "N", default_value_t = ROUNDS, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Join token, or `generate` [default: generated where other machines can connect]
    #[arg(long, value_name = "TOKEN|generate")]
    pub token: Option<String>,
    /// Run directory [default: runs/TIME-demo]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Open the page in this machine's browser
    #[arg(long)]
    pub open: bool,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// # Errors
/// One sentence that says what to do.
pub fn run(options: Options) -> anyhow::Result<()> {
    let quiet = options.output.quiet;
    let mut directory = RunDirectory::create(options.out.as_deref(), "demo")?;
    let listen = match &options.listen[..] {
        [] => vec![free("https://0.0.0.0:8443")?, free("http://127.0.0.1:8080")?],
        given => given.to_vec(),
    };
    let token = token(options.token.as_deref(), &listen)?;
    let engine = options.device.engine()?;
    let source = open()?;
    let config = source.config.clone();
    let initial = Adapter::init(
        &config,
        &LoraSpec::new(RANK, ALPHA, config.targets().iter().copied())?,
        0..config.blocks,
        SEED,
    )?;
    let training = Training {
        spec: initial.spec.clone(),
        optimizer: OptimizerSettings {
            lr: LEARNING_RATE,
            weight_decay: 0.01,
            schedule: Schedule::Linear,
            warmup: 5,
            total_steps: u64::from(options.rounds) * u64::from(LOCAL_STEPS),
            clip: Some(1.0),
        },
        batch: BATCH,
        seq: config.positions.min(128),
        wire: WireForm::F16,
    };
    let read = |bytes: &[u8], name: &str| {
        Dataset::read(
            bytes,
            name,
            source.tokenize(),
            &source.data_options(training.seq, &ReadingOptions::default()),
        )
    };
    let train = read(DEMO_TRAIN, "train.txt")?;
    let mut valid = read(DEMO_VALID, "valid.txt")?;
    valid.examples.truncate(VALIDATED);

    let meanings = meanings();
    if !quiet {
        console::say("Before training, the model writes plain English and takes no notice of what it is asked for:\n");
    }
    let before = write(&engine, None, &meanings, UNTRAINED)?;
    if !quiet {
        show(&meanings, &before);
        console::say(format!(
            "Now {CLIENTS} clients fine-tune it, each on its half of {} examples.\n",
            train.examples.len()
        ));
    }

    directory.note(json!({
        "role": "both",
        "configuration": {
            "rounds": options.rounds, "local_steps": LOCAL_STEPS, "local_clients": CLIENTS, "split": CUT,
            "spec": training.spec, "optimizer": training.optimizer, "batch": BATCH, "seq": training.seq,
            "wire": training.wire, "seed": SEED,
        },
        "data": [{ "file": "demo", "summary": train.summary }],
    }))?;
    let adapter_directory = directory.adapter();
    let local = Sharding::Strided.divide(train.examples, CLIENTS)?;
    let run = Run {
        model: model(source),
        engine: engine.clone(),
        training,
        cut: CUT,
        initial,
        validation: Some(valid.examples),
        rounds: options.rounds,
        local_steps: LOCAL_STEPS,
        seed: SEED,
        shuffle: true,
        clients: CLIENTS as u32,
        wait: Duration::from_secs(10),
        planner: None,
    };
    let hosting = Hosting {
        token,
        listen,
        open: options.open,
        quiet,
    };
    let summary = host(hosting, Role::Both, directory, Some(run), local)?;
    if summary.ending == Ending::Completed && !quiet {
        let adapter = Adapter::load(&adapter_directory, &config)?;
        console::say("\nAfter training, its texts follow the meanings:\n");
        show(
            &meanings,
            &write(&engine, Some(&adapter), &meanings, Sampling::greedy(SAMPLE_TOKENS))?,
        );
        if let (Some(before), Some(after)) = (summary.baseline, summary.last) {
            console::say(format!(
                "Validation perplexity: {:.2} before, {:.2} after: {:.1} times lower.",
                before.perplexity,
                after.perplexity,
                before.perplexity / after.perplexity
            ));
        }
        console::say(format!(
            "Try it: sflllm generate --model demo --adapter {} --prompt '{}||'",
            adapter_directory.display(),
            meanings[0]
        ));
    }
    conclude(&summary, Some(&adapter_directory), &options.output)
}

fn open() -> anyhow::Result<Source> {
    Source::demo(Holding::As(Format::F16))
}

/// The address, on another port where that one is taken.
fn free(address: &str) -> anyhow::Result<Listen> {
    let mut listen: Listen = address.parse()?;
    match listen.bind() {
        Err(server::Error::Busy { .. }) => listen.port = 0,
        bound => drop(bound?),
    }
    Ok(listen)
}

/// Different meanings of the validation data.
fn meanings() -> Vec<String> {
    let text = String::from_utf8_lossy(DEMO_VALID);
    let mut meanings: Vec<String> = Vec::new();
    for meaning in text.lines().filter_map(|line| Some(line.split_once("||")?.0.trim())) {
        if meanings.len() < SAMPLES && meanings.iter().all(|known| known != meaning) {
            meanings.push(meaning.to_owned());
        }
    }
    meanings
}

/// What the model writes for each meaning.
fn write(
    engine: &Engine,
    adapter: Option<&Adapter>,
    meanings: &[String],
    sampling: Sampling,
) -> anyhow::Result<Vec<String>> {
    let source = open()?;
    let weights = source.load(engine)?;
    let tokenizer = source.tokenizer()?;
    let mut writer = Writer::new(
        engine,
        &source.config,
        weights,
        adapter,
        source.config.positions,
        tokenizer,
    )?;
    meanings
        .iter()
        .map(|meaning| {
            let prompt = prompt_ids(tokenizer, &format!("{meaning}||"))?;
            let ids = writer.write(&prompt, &sampling, |_| Ok(ControlFlow::Continue(())))?.ids;
            tokenizer
                .decode(&ids)
                .context("the model wrote something its tokenizer cannot read")
        })
        .collect()
}

fn show(meanings: &[String], texts: &[String]) {
    for (meaning, text) in meanings.iter().zip(texts) {
        console::say(format!("  {meaning}\n    -> {}\n", text.trim()));
    }
}
