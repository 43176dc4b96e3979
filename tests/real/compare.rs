//! `generate` with several adapters: every one answers as it does alone.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sflllm::model::adapter::{Adapter, LoraSpec};
use sflllm::model::architecture::Architecture;

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo");
const PROMPT: &str = "name: Red Acorn; kind: tea room||";

/// What `generate` says to its prompt with these options.
fn generate(words: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_sflllm"))
        .args(["generate", "--model", "demo", "--device", "cpu", "--quiet"])
        .args(["--prompt", PROMPT, "--max-tokens", "12"])
        .args(words)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn found(words: &[&str]) -> Value {
    serde_json::from_str(&generate(&[words, &["--json"]].concat())).unwrap()
}

/// Saves an adapter that changes what the model says.
fn save(directory: &Path, phase: f32) {
    let model = Architecture::load(Path::new(DEMO)).unwrap();
    let spec = LoraSpec::new(2, 4.0, model.targets().to_vec()).unwrap();
    let mut adapter = Adapter::init(&model, &spec, 0..model.blocks, 1).unwrap();
    for (index, value) in adapter.values.iter_mut().enumerate() {
        *value = 0.3 * (phase + index as f32).sin();
    }
    adapter.save(directory, &model, "demo").unwrap();
}

#[test]
fn several_adapters_answer_one_prompt_as_each_does_alone() {
    let place = tempfile::tempdir().unwrap();
    let directories = ["first", "second"].map(|name| place.path().join(name));
    for (directory, phase) in directories.iter().zip([0.0, 2.0]) {
        save(directory, phase);
    }
    let [first, second] = directories.each_ref().map(|directory| directory.to_str().unwrap());
    let together = found(&["--adapter", "none", "--adapter", first, "--adapter", second]);
    assert_eq!(together["prompt"], PROMPT);
    let answers = together["answers"].as_array().unwrap();
    let names: Vec<&str> = answers
        .iter()
        .map(|answer| answer["adapter"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["none", first, second]);
    let alone = [found(&[]), found(&["--adapter", first]), found(&["--adapter", second])];
    for (answer, alone) in answers.iter().zip(&alone) {
        assert_eq!((&answer["text"], &answer["ids"]), (&alone["text"], &alone["ids"]));
        assert!(
            alone.get("answers").is_none(),
            "one answer is as it always was: {alone}"
        );
    }
    assert_ne!(
        alone[0]["ids"], alone[1]["ids"],
        "an adapter that changes nothing shows nothing"
    );
    assert_ne!(alone[1]["ids"], alone[2]["ids"]);

    let shown = generate(&["--adapter", first, "--adapter", "none"]);
    let text = |alone: &Value| alone["text"].as_str().unwrap().to_owned();
    let expected = format!("== {first}\n{}\n== none\n{}\n", text(&alone[1]), text(&alone[0]));
    assert_eq!(shown, expected);
}
