//! `calibrate`: measures E(r), the rounds of training that an adapter of rank r needs to reach a target loss, which the delay model
//! multiplies a round's delay with.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use clap::Args;
use pollster::block_on;
use serde::Serialize;
use serde_json::Value;

use crate::compute::Engine;
use crate::data::{Batch, Batches, Dataset, Example, Sharding, pass};
use crate::disk::Claim;
use crate::federated;
use crate::model::adapter::{Adapter, LoraSpec, Target};
use crate::model::architecture::Architecture;
use crate::model::central::{Central, Counted};
use crate::model::rounds::RoundsTable;
use crate::model::stack::StackWeights;
use crate::model::workspace::Extent;
use crate::split::{ClientPart, Contribution, LaneError, ServerPart, Training};

use super::console::{self, Bar, Rewritten};
use super::defaults;
use super::interrupt;
use super::options::{BatchOptions, DeviceOptions, ModelOptions, OptimizerOptions, OutputOptions, targets};
use super::source::{DEMO_TRAIN, DEMO_VALID, ModelName, Source};
use crate::terms::format::Format;
use crate::terms::optimizer::OptimizerSettings;
use crate::terms::tensor::WireForm;

/// Measure how many rounds of training each LoRA rank needs to reach a target loss.
///
/// Every rank is trained from each of several seeds, and its validation loss is measured after every round. Rounds have
/// fractions: between two evaluations the loss is taken as a straight line. The file is rewritten after every run; the same
/// command goes on with an unfinished one.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm calibrate --ranks 1,2,4,8 --seeds 2 --max-rounds 10 --lr 1e-2 --valid-examples 32 --out rounds.json
      on the demo model and its data; about a minute on a CPU
  sflllm calibrate --model path/to/gpt2 --data mine.txt --valid held-out.txt --clients 4 --split 2 --target-loss 2.6")]
pub struct Options {
    #[command(flatten)]
    pub model: ModelOptions,
    /// The data to train on, divided among the clients; not needed for the demo model
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// The data to measure the loss on; not needed for the demo model
    #[arg(long, value_name = "FILE")]
    pub valid: Option<PathBuf>,
    /// Examples of the validation data that are used, from its start
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub valid_examples: u32,
    /// Ranks to measure
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "1,2,4,8")]
    pub ranks: Vec<usize>,
    /// Scale of the adapters, over their rank; twice each rank if not given
    #[arg(long, value_name = "F")]
    pub alpha: Option<f32>,
    /// Adapted matrices, as the model names them; all if not given
    #[arg(long, value_name = "NAMES")]
    pub targets: Option<String>,
    /// The loss to reach, in nats a token
    #[arg(long, value_name = "F", conflicts_with = "target_fraction")]
    pub target_loss: Option<f64>,
    /// Without --target-loss: the part of the way from the untrained loss to the lowest loss that the largest rank reaches in
    /// --max-rounds, mean over its seeds
    #[arg(long, value_name = "F", default_value_t = DEFAULT_TARGET_FRACTION)]
    pub target_fraction: f64,
    /// Runs of each rank, with seeds --seed, --seed + 1 and so on
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub seeds: u32,
    /// Clients whose adapters are averaged after every round; 1 trains centralised unless --split is given
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub clients: u32,
    /// Blocks on the clients; 1 if not given
    #[arg(long, value_name = "N")]
    pub split: Option<usize>,
    /// How activations and gradients cross the cut
    #[arg(long, default_value_t, value_name = "f32|f16|int8")]
    pub wire: WireForm,
    /// Optimiser steps in a round
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub local_steps: u32,
    /// Rounds after which a run is given up; a linear schedule falls to zero here
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: u32,
    /// The table to write
    #[arg(long, value_name = "FILE", default_value = "rounds.json")]
    pub out: PathBuf,
    #[command(flatten)]
    pub optimizer: OptimizerOptions,
    #[command(flatten)]
    pub batches: BatchOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

const DEFAULT_TARGET_FRACTION: f64 = 0.7;
const DEFAULT_SPLIT: usize = 1;

/// What a run's losses depend on: only runs with the same settings share a table.
#[derive(Serialize)]
struct Settings<'a> {
    model: String,
    weights: Format,
    data: &'a str,
    valid: &'a str,
    valid_examples: usize,
    ranks: &'a [usize],
    alpha: Option<f32>,
    targets: &'a [Target],
    target_loss: Option<f64>,
    target_fraction: Option<f64>,
    seeds: u32,
    seed: u64,
    shuffle: bool,
    clients: usize,
    /// `None` trains centralised.
    split: Option<usize>,
    wire: Option<WireForm>,
    local_steps: u32,
    max_rounds: u32,
    batch: usize,
    seq: usize,
    optimizer: OptimizerSettings,
}

impl Settings<'_> {
    /// As the file holds them, so that they compare equal to what was read back.
    fn value(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&serde_json::to_string(self)?)?)
    }
}

/// What all runs share.
struct Setup<'a> {
    engine: &'a Engine,
    architecture: &'a Architecture,
    weights: &'a StackWeights,
    /// Examples of each client.
    shards: &'a [Vec<Example>],
    valid: &'a [Batch],
    /// `None` trains centralised.
    cut: Option<usize>,
    wire: WireForm,
    extent: Extent,
    optimizer: OptimizerSettings,
    local_steps: u32,
    shuffle: bool,
}

/// A client of a split run.
struct Member {
    part: ClientPart,
    batches: Batches,
    /// In this round so far: its weight in the average.
    examples: u64,
}

/// What is trained in a run.
enum Trainee {
    Central {
        model: Box<Central>,
        batches: Batches,
    },
    Split {
        members: Vec<Member>,
        server: Box<ServerPart>,
    },
}

impl Setup<'_> {
    fn trainee(&self, adapter: &Adapter, seed: u64) -> anyhow::Result<Trainee> {
        let (engine, model, extent) = (self.engine, self.architecture, self.extent);
        let batches = |examples: &[Example]| {
            Batches::new(
                examples.to_vec(),
                extent.batch,
                extent.seq,
                self.shuffle.then_some(seed),
            )
        };
        let Some(cut) = self.cut else {
            let optimizer = Some(self.optimizer);
            let model = Central::new(engine, model, self.weights.clone(), Some(adapter), extent, optimizer)?;
            return Ok(Trainee::Central {
                model: Box::new(model),
                batches: batches(&self.shards[0])?,
            });
        };
        let training = Training {
            spec: adapter.spec.clone(),
            optimizer: self.optimizer,
            batch: extent.batch,
            seq: extent.seq,
            wire: self.wire,
        };
        let values = |blocks| anyhow::Ok(adapter.slice(model, blocks)?.values);
        let (below, above) = (values(0..cut)?, values(cut..model.blocks)?);
        let client = StackWeights {
            embedding: self.weights.embedding.clone(),
            blocks: self.weights.blocks[..cut].to_vec(),
            first_block: 0,
            head: None,
        };
        let server = StackWeights {
            blocks: self.weights.blocks[cut..].to_vec(),
            first_block: cut,
            ..self.weights.clone()
        };
        let member = |shard: &Vec<Example>| {
            anyhow::Ok(Member {
                part: ClientPart::with_weights(engine, model, client.clone(), &training, &below)?,
                batches: batches(shard)?,
                examples: 0,
            })
        };
        Ok(Trainee::Split {
            members: self.shards.iter().map(member).collect::<anyhow::Result<_>>()?,
            server: Box::new(ServerPart::with_weights(engine, model, server, &training, &above)?),
        })
    }

    /// The whole model, to evaluate adapters of `adapter`'s rank.
    fn evaluator(&self, adapter: &Adapter) -> anyhow::Result<Central> {
        let extent = Extent {
            batch: self.extent.batch,
            seq: self.valid.iter().map(|batch| batch.seq).max().unwrap_or(1),
        };
        let weights = self.weights.clone();
        Ok(Central::new(
            self.engine,
            self.architecture,
            weights,
            Some(adapter),
            extent,
            None,
        )?)
    }

    /// The validation loss. It is rounded to nine decimals, which come back from the file as they went.
    fn loss(&self, evaluator: &mut Central, adapter: &[f32]) -> anyhow::Result<f64> {
        evaluator.set_adapter(adapter)?;
        let mut counted = Counted::default();
        for batch in self.valid {
            counted += block_on(evaluator.loss(&batch.tokens, &batch.targets, batch.seq))?;
        }
        let loss = counted.loss_sum / counted.tokens.max(1) as f64;
        anyhow::ensure!(
            loss.is_finite(),
            "the validation loss is {loss}: try a lower --lr, or --clip 1"
        );
        Ok((loss * 1e9).round() / 1e9)
    }
}

impl Trainee {
    /// One optimiser step of everybody.
    fn step(&mut self) -> anyhow::Result<()> {
        match self {
            Trainee::Central { model, batches } => {
                let batch = batches.next_batch();
                let counted = block_on(model.step(&batch.tokens, &batch.targets, batch.seq))?;
                anyhow::ensure!(
                    counted.loss_sum.is_finite(),
                    "the training loss is {}: try a lower --lr, or --clip 1",
                    counted.loss_sum
                );
            }
            Trainee::Split { members, server } => {
                let mut sent = Vec::with_capacity(members.len());
                for member in members.iter_mut() {
                    let batch = member.batches.next_batch();
                    member.examples += batch.examples as u64;
                    sent.push((block_on(member.part.forward(&batch.tokens, batch.seq))?, batch));
                }
                let contributions: Vec<Contribution<'_>> = sent
                    .iter()
                    .map(|(activations, batch)| Contribution {
                        cut: server.cut(),
                        activations,
                        targets: &batch.targets,
                    })
                    .collect();
                let (_, replies) = block_on(server.step(&contributions)).map_err(|error| match error {
                    LaneError::Loss(loss) => {
                        anyhow::anyhow!("the training loss is {loss}: try a lower --lr, or --clip 1")
                    }
                    other => other.into(),
                })?;
                for (member, reply) in members.iter_mut().zip(&replies) {
                    block_on(member.part.backward(&reply.gradient))?;
                }
            }
        }
        Ok(())
    }

    /// Ends a round: clients' adapters become their weighted mean. The adapter of the whole model, flat.
    fn end_round(&mut self) -> anyhow::Result<Vec<f32>> {
        match self {
            Trainee::Central { model, .. } => Ok(block_on(model.adapter())?),
            Trainee::Split { members, server } => {
                let mut adapters = Vec::with_capacity(members.len());
                for member in members.iter_mut() {
                    let examples = std::mem::take(&mut member.examples);
                    adapters.push((examples, block_on(member.part.adapter())?));
                }
                let weighted: Vec<(u64, &[f32])> = adapters.iter().map(|(n, values)| (*n, &values[..])).collect();
                let mut mean = federated::weighted_mean(&weighted)?;
                for member in members.iter_mut() {
                    member.part.set_adapter(&mean)?;
                }
                mean.extend(block_on(server.adapter())?);
                Ok(mean)
            }
        }
    }
}

/// Reads a file, or the demo's own data where none is given.
fn read(source: &Source, path: Option<&Path>, demo: (&[u8], &str), options: &Options) -> anyhow::Result<Dataset> {
    let seq = options.batches.seq(source.architecture.positions)?;
    let reading = &options.batches.reading;
    match path {
        Some(path) => source.data(path, seq, reading, options.output.quiet),
        None if options.model.model == ModelName::Demo => {
            let (bytes, name) = demo;
            Ok(Dataset::read(
                bytes,
                name,
                source.tokenize(),
                &source.data_options(seq, reading),
            )?)
        }
        None => bail!("give --data and --valid: only the demo model brings its own"),
    }
}

/// The table to go on with: the file's, if there is one, or a new one.
fn table(options: &Options, fresh: RoundsTable) -> anyhow::Result<RoundsTable> {
    let out = &options.out;
    if !out.exists() {
        return Ok(fresh);
    }
    let old = RoundsTable::load(out)
        .with_context(|| format!("{} is no calibration; give another --out, or remove it", out.display()))?;
    if old.settings != fresh.settings {
        let differs = |name: &&String| old.settings.get(name.as_str()) != fresh.settings.get(name.as_str());
        let names = fresh.settings.as_object().into_iter().flat_map(|map| map.keys());
        let differing: Vec<&str> = names.filter(differs).map(String::as_str).collect();
        bail!(
            "{} holds a calibration with other settings ({}); give another --out, or remove it",
            out.display(),
            differing.join(", ")
        );
    }
    let shaped = old.losses.len() == fresh.ranks.len() && old.losses.iter().all(|runs| runs.len() <= fresh.seeds);
    anyhow::ensure!(
        shaped && old.ranks == fresh.ranks,
        "{} is no calibration with these options; give another --out, or remove it",
        out.display()
    );
    Ok(RoundsTable {
        losses: old.losses,
        ..fresh
    })
}

/// The target: what was asked for, or part of the way that the runs of the largest rank went, once they are all there.
fn target(options: &Options, table: &RoundsTable) -> anyhow::Result<Option<f64>> {
    let Some(largest) = table.losses.last() else {
        return Ok(None);
    };
    if let Some(target) = options.target_loss {
        return Ok(Some(target));
    }
    if largest.len() < table.seeds {
        return Ok(None);
    }
    let mean = |losses: &dyn Fn(&Vec<f64>) -> f64| largest.iter().map(losses).sum::<f64>() / largest.len() as f64;
    let before = mean(&|run| run.first().copied().unwrap_or(f64::NAN));
    let lowest = mean(&|run| run.iter().copied().fold(f64::INFINITY, f64::min));
    anyhow::ensure!(
        lowest < before,
        "training does not lower the validation loss of {before:.4}: try another --lr"
    );
    Ok(Some(before - options.target_fraction * (before - lowest)))
}

pub fn run(options: Options) -> anyhow::Result<()> {
    anyhow::ensure!(
        options.target_fraction > 0.0 && options.target_fraction <= 1.0,
        "--target-fraction {} must be above 0 and at most 1",
        options.target_fraction
    );
    anyhow::ensure!(
        options.target_loss.is_none_or(|loss| loss.is_finite() && loss > 0.0),
        "--target-loss must be a number above 0"
    );
    let source = Source::open(&options.model.model, options.model.weights, options.output.quiet)?
        .with_reading(&options.batches.reading)?;
    let adapted = targets(&source.architecture, options.targets.as_deref())?;
    let mut ranks = options.ranks.clone();
    ranks.sort_unstable();
    ranks.dedup();
    let specs = ranks
        .iter()
        .map(|&rank| LoraSpec::new(rank, options.alpha.unwrap_or(defaults::alpha(rank)), adapted.clone()))
        .collect::<Result<Vec<_>, _>>()?;
    anyhow::ensure!(!ranks.is_empty(), "--ranks needs at least one rank");

    // For as long as the table is measured and written.
    let _claim = Claim::file(&options.out, "--out")?;
    let blocks = source.architecture.blocks;
    let cut = match options.split {
        None if options.clients == 1 => None,
        split => Some(split.unwrap_or(DEFAULT_SPLIT)),
    };
    anyhow::ensure!(
        cut.is_none_or(|cut| (1..blocks).contains(&cut)),
        "--split must leave a block on each side: 1 to {} of the model's {blocks}",
        blocks.saturating_sub(1)
    );
    let extent = Extent {
        batch: options.batches.batch as usize,
        seq: options.batches.seq(source.architecture.positions)?,
    };
    let data = read(&source, options.data.as_deref(), (DEMO_TRAIN, "train.txt"), &options)?;
    let mut valid = read(&source, options.valid.as_deref(), (DEMO_VALID, "valid.txt"), &options)?;
    valid.examples.truncate(options.valid_examples as usize);
    let steps = u64::from(options.max_rounds) * u64::from(options.local_steps);
    let optimizer = options.optimizer.settings(&source.architecture, &adapted, steps)?;
    let wire = options.wire;
    let settings = Settings {
        model: source.digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        weights: source.weights.format(source.holding),
        data: &data.summary.digest,
        valid: &valid.summary.digest,
        valid_examples: valid.examples.len(),
        ranks: &ranks,
        alpha: options.alpha,
        targets: &specs[0].targets,
        target_loss: options.target_loss,
        target_fraction: options.target_loss.is_none().then_some(options.target_fraction),
        seeds: options.seeds,
        seed: options.batches.seed,
        shuffle: !options.batches.no_shuffle,
        clients: options.clients as usize,
        split: cut,
        wire: cut.map(|_| wire),
        local_steps: options.local_steps,
        max_rounds: options.max_rounds,
        batch: extent.batch,
        seq: extent.seq,
        optimizer,
    };
    let mut table = table(
        &options,
        RoundsTable {
            clients: options.clients as usize,
            local_steps: options.local_steps as usize,
            max_rounds: Some(options.max_rounds as usize),
            ..RoundsTable::new(&source.name, &ranks, options.seeds as usize, settings.value()?)
        },
    )?;
    table.measure(target(&options, &table)?);
    if !table.complete {
        let shards = Sharding::Strided.divide(data.examples, options.clients as usize)?;
        let engine = options.device.engine()?;
        let weights = source.load(&engine)?;
        let setup = Setup {
            engine: &engine,
            architecture: &source.architecture,
            weights: &weights,
            shards: &shards,
            valid: &pass(&valid.examples, extent.batch, extent.seq)?.collect::<Vec<_>>(),
            cut,
            wire,
            extent,
            optimizer,
            local_steps: options.local_steps,
            shuffle: !options.batches.no_shuffle,
        };
        measure(&options, &setup, &specs, &mut table)?;
    }
    report(&options, &table)
}

/// Trains what the table lacks.
fn measure(options: &Options, setup: &Setup<'_>, specs: &[LoraSpec], table: &mut RoundsTable) -> anyhow::Result<()> {
    let (quiet, rounds) = (options.output.quiet, options.max_rounds);
    // Before hours of work: that it can be kept.
    table.save(&options.out)?;
    let interrupt = interrupt::watch("ending; finished runs are saved")?;
    let stop = interrupt.flag();
    let runs = table.ranks.len() * table.seeds;
    let there: usize = table.losses.iter().map(Vec::len).sum();
    if !quiet {
        let how = match setup.cut {
            None => "centralised".to_owned(),
            Some(cut) => format!("{} clients, cut {cut}", setup.shards.len()),
        };
        let kept = match there {
            0 => String::new(),
            there => format!(", {there} of them already in {}", options.out.display()),
        };
        console::say(format!(
            "{runs} runs{kept}, of at most {rounds} rounds of {} steps, {how}, on {}",
            setup.local_steps,
            setup.engine.name()
        ));
    }
    let mut saved = Rewritten::default();
    let bar = Bar::over((runs - there) as u64 * u64::from(rounds), "rounds", quiet);
    // The largest rank first: the target may follow from its runs.
    let (last, others) = (specs.len() - 1, 0..specs.len() - 1);
    for index in std::iter::once(last).chain(others) {
        let spec = &specs[index];
        let mut evaluator = None;
        while table.losses[index].len() < table.seeds {
            let seed = options.batches.seed.wrapping_add(table.losses[index].len() as u64);
            let adapter = Adapter::init(setup.architecture, spec, 0..setup.architecture.blocks, seed)?;
            let evaluator = match &mut evaluator {
                Some(evaluator) => evaluator,
                none => none.insert(setup.evaluator(&adapter)?),
            };
            let mut losses = vec![setup.loss(evaluator, &adapter.values)?];
            let mut trainee = setup.trainee(&adapter, seed)?;
            if let Some(target) = table.target_loss {
                anyhow::ensure!(
                    target < losses[0],
                    "the target loss {target} is not below the loss before training, {:.4}",
                    losses[0]
                );
            }
            while losses.len() <= rounds as usize && !reached(&losses, table.target_loss) {
                if !round(&mut trainee, setup.local_steps, stop)? {
                    bar.finish_and_clear();
                    return saved.finish();
                }
                losses.push(setup.loss(evaluator, &trainee.end_round()?)?);
                bar.set_message(format!(
                    "rank {}, seed {seed}: loss {:.4}",
                    spec.rank,
                    losses.last().copied().unwrap_or(f64::NAN)
                ));
                bar.inc(1);
            }
            // What this run did not need is not ahead any more.
            let spared = u64::from(rounds).saturating_sub(losses.len() as u64 - 1);
            bar.set_length(bar.length().unwrap_or(0).saturating_sub(spared));
            if !quiet {
                let (taken, loss) = (losses.len() - 1, losses.last().copied().unwrap_or(f64::NAN));
                console::say(format!(
                    "rank {}, seed {seed}: validation loss {:.4} before, {loss:.4} after {taken} rounds",
                    spec.rank, losses[0]
                ));
            }
            table.losses[index].push(losses);
            table.measure(target(options, table)?);
            saved.note(table.save(&options.out).map_err(Into::into));
        }
    }
    bar.finish_and_clear();
    saved.finish()
}

fn reached(losses: &[f64], target: Option<f64>) -> bool {
    target.is_some_and(|target| losses.last().is_some_and(|&loss| loss <= target))
}

/// A round's steps; false when it was interrupted.
fn round(trainee: &mut Trainee, steps: u32, stop: &AtomicBool) -> anyhow::Result<bool> {
    for _ in 0..steps {
        if stop.load(Ordering::SeqCst) {
            return Ok(false);
        }
        trainee.step()?;
    }
    Ok(true)
}

fn report(options: &Options, table: &RoundsTable) -> anyhow::Result<()> {
    let out = options.out.display();
    let mut text = String::new();
    if options.output.json {
        text = table.to_json()?;
    } else {
        let shown = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |number| format!("{number:.2}"));
        if let Some(target) = table.target_loss {
            text = format!(
                "rounds of {} steps to a validation loss of {target:.4}\n{:>6}  {:>8}  {:>8}  runs\n",
                table.local_steps, "rank", "mean", "spread"
            );
            for (index, rank) in table.ranks.iter().enumerate() {
                let runs: Vec<String> = table.runs[index].iter().map(|&run| shown(run)).collect();
                text += &format!(
                    "{rank:>6}  {:>8}  {:>8}  {}\n",
                    shown(table.rounds[index]),
                    shown(table.spread[index]),
                    runs.join("  ")
                );
            }
        }
        if table.complete {
            text += &out.to_string();
        }
    }
    let text = text.trim_end();
    let printed = match text.is_empty() {
        true => Ok(()),
        false => console::print_kept(text),
    };
    if !table.complete {
        let there: usize = table.losses.iter().map(Vec::len).sum();
        let runs = table.ranks.len() * table.seeds;
        console::say(format!(
            "{there} of {runs} runs are in {out}; the same command goes on with it"
        ));
    }
    for (rank, rounds) in table.ranks.iter().zip(&table.rounds) {
        if table.complete && rounds.is_none() {
            console::say(format!(
                "rank {rank} did not reach the target in {} rounds with every seed, so it has no E(r): give more --max-rounds, a \
                 higher target, or leave the rank out",
                options.max_rounds
            ));
        }
    }
    printed.with_context(|| format!("the calibration is in {out}"))
}
