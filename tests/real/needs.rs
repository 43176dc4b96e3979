//! `doctor --model` says what a client fetches and holds before anyone starts.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use sflllm::data::Tokenizer;
use sflllm::model::architecture::Architecture;
use sflllm::model::unit::Unit;
use sflllm::model::weights::{Holding, Weights};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo");

fn doctor(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sflllm"))
        .arg("doctor")
        .args(words)
        .output()
        .unwrap()
}

fn needs(words: &[&str]) -> Value {
    let output = doctor(&[words, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_is_fetched_is_the_tokenizer_and_the_units_as_they_are_held() {
    let found = needs(&["--model", DEMO]);
    let architecture = Architecture::load(Path::new(DEMO)).unwrap();
    let weights = Weights::open(Path::new(DEMO), &architecture).unwrap();
    let tokenizer = Tokenizer::load(Path::new(DEMO), architecture.eos).unwrap().unwrap();
    let rows = found["needs"].as_array().unwrap();
    assert_eq!(rows.len(), 4 * (architecture.blocks - 1), "every format, every cut");
    for row in rows {
        let holding: Holding = row["weights"].as_str().unwrap().parse().unwrap();
        let cut = row["split"].as_u64().unwrap() as usize;
        let bytes = |unit| -> u64 {
            let tensors = weights.unit(unit, holding).unwrap().tensors;
            tensors.iter().map(|tensor| 4 * tensor.words.len() as u64).sum()
        };
        let blocks: u64 = (0..cut).map(Unit::Block).map(bytes).sum();
        let embedding = bytes(Unit::Embedding);
        assert_eq!(row["client_bytes"]["embedding"], embedding, "{row}");
        assert_eq!(row["client_bytes"]["weights"], blocks, "{row}");
        let fetched = embedding + blocks + tokenizer.json().len() as u64;
        assert_eq!(row["download_bytes"], fetched, "{row}");
    }
}

#[test]
fn a_smaller_batch_and_window_need_less() {
    let client = |words: &[&str]| {
        let found = needs(&[&["--model", "demo"], words].concat());
        found["needs"][0]["client_bytes"].clone()
    };
    let (usual, small) = (client(&[]), client(&["--batch", "1", "--seq", "32"]));
    assert_eq!(usual["weights"], small["weights"]);
    assert!(small["training"].as_u64() < usual["training"].as_u64());
}

#[test]
fn a_lower_rank_on_fewer_targets_needs_less() {
    let training = |words: &[&str]| {
        let found = needs(&[&["--model", "demo"], words].concat());
        ["client_bytes", "server_bytes"].map(|side| found["needs"][0][side]["training"].as_u64().unwrap())
    };
    let (usual, given) = (training(&[]), training(&["--rank", "8", "--targets", "all"]));
    assert_eq!(usual, given, "what serve takes for the demo");
    let (low, few) = (training(&["--rank", "2"]), training(&["--targets", "attn.c_proj"]));
    for side in [0, 1] {
        assert!(
            low[side] < usual[side] && few[side] < usual[side],
            "{low:?}, {few:?}, {usual:?}"
        );
    }
    let found = needs(&["--model", "demo", "--targets", "c_attn,mlp.c_proj", "--rank", "3"]);
    assert_eq!(found["rank"], 3);
    assert_eq!(found["targets"], serde_json::json!(["attn.c_attn", "mlp.c_proj"]));
}

#[test]
fn what_cannot_be_is_refused_in_a_sentence() {
    for (words, says) in [
        (&["--model", "demo", "--seq", "100000"][..], "256 positions"),
        (&["--batch", "2"], "--model"),
        (&["--model", "demo", "--batch", "0"], "--batch"),
        (&["--model", "demo", "--rank", "0"], "--rank"),
        (&["--model", "demo", "--rank", "100000"], "rank"),
        (&["--model", "demo", "--targets", "q_proj"], "q_proj"),
        (&["--targets", "all"], "--model"),
        (&["--model", "/nowhere"], "/nowhere"),
    ] {
        let output = doctor(words);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(says), "{words:?}: {text}");
    }
}
