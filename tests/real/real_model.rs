//! A real pretrained model against `transformers` and `peft` (`fixtures/smollm2`): SmolLM2-135M-Instruct, as its GGUF file has it.
//!
//! The file, 98 MB, is named by `SFLLLM_REAL_MODEL`; `cargo xtask test --real-model` fetches it. Without it these tests say so and
//! claim nothing.

#![allow(clippy::print_stderr, reason = "the test harness takes it")]

use std::path::{Path, PathBuf};
use std::process::Command;

use pollster::block_on;
use serde_json::{Value, json};
use sflllm::cli::source::{ModelName, Source};
use sflllm::compute::Engine;
use sflllm::data::{Dataset, Example, Options};
use sflllm::model::adapter::{Adapter, LoraSpec, Target};
use sflllm::model::central::Central;
use sflllm::model::unit::Unit;
use sflllm::model::weights::Holding;
use sflllm::model::workspace::Extent;
use sflllm::terms::format::Format;
use sflllm::terms::optimizer::{OptimizerSettings, Schedule};
use sflllm::terms::tensor::IGNORED_TARGET;
use sha2::{Digest, Sha256};

/// The model's file, and what `transformers` and `peft` make of it.
struct Real {
    file: PathBuf,
    expected: Value,
}

impl Real {
    /// `None` where no file is named.
    fn find() -> Option<Self> {
        let Some(file) = std::env::var_os("SFLLLM_REAL_MODEL") else {
            eprintln!("SFLLLM_REAL_MODEL names no file: nothing is checked; try `cargo xtask test --real-model`");
            return None;
        };
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2/expected.json");
        Some(Self {
            file: file.into(),
            expected: serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap(),
        })
    }

    fn source(&self, holding: Holding) -> Source {
        Source::open(&ModelName::Path(self.file.clone()), holding, true).unwrap()
    }

    fn numbers(&self, pointer: &str) -> Vec<f64> {
        let values = self.expected.pointer(pointer).unwrap().as_array().unwrap();
        values.iter().map(|value| value.as_f64().unwrap()).collect()
    }

    fn number(&self, pointer: &str) -> f64 {
        self.expected.pointer(pointer).unwrap().as_f64().unwrap()
    }

    /// Tokens of the windows, a window after another.
    fn windows(&self) -> (Vec<u32>, usize) {
        let ids = self.numbers("/windows/ids").into_iter().map(|id| id as u32).collect();
        (ids, self.number("/windows/window") as usize)
    }
}

/// Every next token (rows, seq) is a target.
fn next_tokens(tokens: &[u32], seq: usize) -> Vec<i32> {
    let row = |row: &[u32]| {
        let next = row[1..].iter().map(|&token| token as i32);
        next.chain([IGNORED_TARGET]).collect::<Vec<_>>()
    };
    tokens.chunks(seq).flat_map(row).collect()
}

#[track_caller]
fn assert_close(found: f64, expected: f64, relative: f64, what: &str) {
    let difference = (found / expected - 1.0).abs();
    eprintln!("{what}: {found}, expected {expected}, off by {difference:.1e}");
    assert!(difference <= relative, "{what}: {found}, expected {expected}");
}

/// One model for all windows of `seq` tokens in batches of one.
fn central(source: &Source, seq: usize) -> Central {
    let engine = Engine::cpu();
    let weights = source.load(&engine).unwrap();
    Central::new(
        &engine,
        &source.architecture,
        weights,
        None,
        Extent { batch: 1, seq },
        None,
    )
    .unwrap()
}

#[test]
fn the_file_is_the_one_that_is_meant() {
    let Some(real) = Real::find() else { return };
    let digest = Sha256::digest(std::fs::read(&real.file).unwrap());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(real.expected["gguf_sha256"], hex, "{}", real.file.display());
}

#[test]
fn losses_of_a_text_are_those_of_transformers() {
    let Some(real) = Real::find() else { return };
    let source = real.source(Holding::Auto);
    assert_eq!(source.weights.format(Holding::Auto), Format::Q4);
    let (ids, seq) = real.windows();
    let mut model = central(&source, seq);
    let expected = real.numbers("/windows/losses");
    assert_eq!(expected.len() * seq, ids.len());
    let mut sum = 0.0;
    for (index, (window, expected)) in ids.chunks(seq).zip(&expected).enumerate() {
        let counted = block_on(model.loss(window, &next_tokens(window, seq), seq)).unwrap();
        let loss = counted.loss_sum / counted.tokens as f64;
        assert_close(loss, *expected, 1e-4, &format!("window {index}"));
        sum += loss;
    }
    assert_close(
        sum / expected.len() as f64,
        real.number("/windows/loss"),
        2e-5,
        "all windows",
    );
}

#[test]
fn a_conversation_has_transformers_tokens_labels_and_loss() {
    let Some(real) = Real::find() else { return };
    let source = real.source(Holding::Auto);
    let conversations = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat/conversations.json");
    let conversations: Value = serde_json::from_slice(&std::fs::read(conversations).unwrap()).unwrap();
    let expected = real.expected["chat"]["conversations"].as_object().unwrap();
    assert_eq!(expected.len(), conversations.as_object().unwrap().len());
    for (name, expected) in expected {
        let line = json!({ "messages": conversations[name] }).to_string();
        let seq = expected["ids"].as_array().unwrap().len();
        let options = Options::new(seq, source.architecture.vocab);
        let data = Dataset::read(line.as_bytes(), "chat.jsonl", source.tokenize(), &options).unwrap();
        let [Example { ids, labels }] = &data.examples[..] else {
            panic!("{name}: one conversation is one example");
        };
        assert_eq!(json!(ids), expected["ids"], "{name}");
        assert_eq!(json!(labels), expected["labels"], "{name}");
        let targets: Vec<i32> = labels[1..].iter().copied().chain([IGNORED_TARGET]).collect();
        let counted = block_on(central(&source, seq).loss(ids, &targets, seq)).unwrap();
        assert_eq!(json!(counted.tokens), expected["tokens"], "{name}");
        let loss = counted.loss_sum / counted.tokens as f64;
        assert_close(loss, expected["loss"].as_f64().unwrap(), 1e-4, name);
    }
}

#[test]
fn the_greedy_answer_is_that_of_transformers() {
    let Some(real) = Real::find() else { return };
    let answer = &real.expected["answer"];
    let output = Command::new(env!("CARGO_BIN_EXE_sflllm"))
        .args([
            "generate",
            "--device",
            "cpu",
            "--json",
            "--quiet",
            "--temperature",
            "0",
            "--max-tokens",
            "60",
        ])
        .args(["--chat", "--prompt", answer["prompt"].as_str().unwrap(), "--model"])
        .arg(&real.file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["text"], answer["text"]);
}

#[test]
fn ten_lora_steps_have_pefts_losses() {
    let Some(real) = Real::find() else { return };
    let source = real.source(Holding::Auto);
    let number = |name: &str| real.number(&format!("/lora/{name}"));
    let (batch, rank) = (number("batch") as usize, number("rank") as usize);
    let targets = [Target::QProj, Target::VProj];
    assert_eq!(real.expected["lora"]["targets"], json!(["q_proj", "v_proj"]));
    let spec = LoraSpec::new(rank, number("alpha") as f32, targets).unwrap();
    let mut adapter = Adapter::init(&source.architecture, &spec, 0..source.architecture.blocks, 0).unwrap();
    // B stays zero; A is what the fixture's script drew, in the order of blocks and targets.
    let mut place = 0;
    for block in 0..source.architecture.blocks {
        for target in targets {
            let range = adapter.layout.entry(block, target).unwrap().range_a();
            for value in &mut adapter.values[range] {
                *value = drawn(place);
                place += 1;
            }
        }
    }
    for (index, expected) in real.numbers("/lora/first_a").into_iter().enumerate() {
        assert_eq!(drawn(index as u32), expected as f32);
    }
    let optimizer = OptimizerSettings {
        lr: number("lr") as f32,
        weight_decay: number("weight_decay") as f32,
        schedule: Schedule::Constant,
        ..OptimizerSettings::default()
    };
    let (ids, seq) = real.windows();
    let engine = Engine::cpu();
    let weights = source.load(&engine).unwrap();
    let extent = Extent { batch, seq };
    let mut model = Central::new(
        &engine,
        &source.architecture,
        weights,
        Some(&adapter),
        extent,
        Some(optimizer),
    )
    .unwrap();
    let losses = real.numbers("/lora/losses_f32");
    assert_eq!(losses.len(), 10);
    for (step, (tokens, expected)) in ids.chunks(batch * seq).zip(losses).enumerate() {
        let counted = block_on(model.step(tokens, &next_tokens(tokens, seq), seq)).unwrap();
        assert_close(
            counted.loss_sum / counted.tokens as f64,
            expected,
            1e-4,
            &format!("step {step}"),
        );
    }
}

/// The fixture's A: the finaliser of MurmurHash3 of a value's place, evenly over ±1/24.
fn drawn(place: u32) -> f32 {
    let mut hash = place;
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^= hash >> 16;
    ((f64::from(hash >> 8) / 8_388_608.0 - 1.0) / 24.0) as f32
}

#[test]
fn tensors_have_the_values_that_the_gguf_package_reads() {
    let Some(real) = Real::find() else { return };
    let source = real.source(Holding::As(Format::F32));
    let query = &real.expected["tensors"]["model.layers.0.self_attn.q_proj.weight"];
    let unit = source.weights.unit(Unit::Block(0), Holding::As(Format::F32)).unwrap();
    let found = unit.tensor("self_attn.q_proj.weight").unwrap().to_f32();
    for (row, expected) in [(1, "row_1"), (32, "row_32"), (65, "row_65")] {
        let start: Vec<f32> = found[row * source.architecture.width..][..4].to_vec();
        let expected: Vec<f32> = serde_json::from_value(query[expected].clone()).unwrap();
        assert_eq!(start, expected, "row {row}");
    }
}
