//! LoRA fine-tuning of a whole model on one device.
//!
//! `cargo run --release --no-default-features --example train`

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::Path;

use pollster::block_on;
use sflllm::compute::Engine;
use sflllm::data::{Batches, Dataset, Options, Tokenize, Tokenizer};
use sflllm::model::adapter::{Adapter, LoraSpec, Target};
use sflllm::model::architecture::Architecture;
use sflllm::model::central::Central;
use sflllm::model::stack::StackWeights;
use sflllm::model::weights::{HeldUnits, Holding, Weights};
use sflllm::model::workspace::Extent;
use sflllm::terms::format::Format;
use sflllm::terms::optimizer::{OptimizerSettings, Schedule};

pub fn main() -> Result<(), Box<dyn Error>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let model = Architecture::load(&directory)?;
    let weights = Weights::open(&directory, &model)?;
    let tokenizer = Tokenizer::load(&directory, model.eos)?;
    let extent = Extent { batch: 8, seq: 64 };
    let data = Dataset::load(
        &directory.join("train.txt"),
        tokenizer.as_ref().map(|t| t as &dyn Tokenize),
        &Options::new(extent.seq, model.vocab),
    )?;
    let mut batches = Batches::new(data.examples, extent.batch, extent.seq, Some(1))?;

    let spec = LoraSpec::new(4, 8.0, [Target::AttnQkv])?;
    let adapter = Adapter::init(&model, &spec, 0..model.blocks, 1)?;
    let optimizer = OptimizerSettings {
        lr: 3e-3,
        schedule: Schedule::Constant,
        ..OptimizerSettings::default()
    };
    let engine = Engine::cpu();
    let mut units = HeldUnits {
        weights: &weights,
        holding: Holding::As(Format::F16),
    };
    let held = StackWeights::load(&engine, &model, &mut units)?;
    let mut central = Central::new(&engine, &model, held, Some(&adapter), extent, Some(optimizer))?;
    for step in 0..10 {
        let batch = batches.next_batch();
        let counted = block_on(central.step(&batch.tokens, &batch.targets, batch.seq))?;
        println!("step {step}: loss {:.4}", counted.loss_sum / counted.tokens as f64);
    }
    Ok(())
}
