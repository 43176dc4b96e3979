//! A run without settings learns: the program chooses them, says them, and its demo's data is learned within a hundred steps.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// Validation perplexity of the untrained demo model is 471; of the demo's own run at its end, 1.5.
const LEARNED: f64 = 3.0;

fn data(name: &str) -> String {
    format!("{}/assets/demo/{name}.txt", env!("CARGO_MANIFEST_DIR"))
}

/// Runs the program on the demo's data with no settings; run.json and what it said.
fn run(home: &Path, words: &[&str]) -> (Value, String) {
    let out = home.join("run");
    let output = Command::new(env!("CARGO_BIN_EXE_sflllm"))
        .args(words)
        .args([
            "--data",
            &data("train"),
            "--valid",
            &data("valid"),
            "--device",
            "cpu",
            "--out",
        ])
        .arg(&out)
        .env("SFLLLM_HOME", home)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let run = std::fs::read_to_string(out.join("run.json")).unwrap();
    (serde_json::from_str(&run).unwrap(), said)
}

fn assert_said(run: &Value, said: &str) {
    let settings = run["settings"].as_str().unwrap();
    assert!(
        settings.starts_with("settings for width 128 and 100 steps: learning rate 0.01,"),
        "{settings}"
    );
    assert!(said.contains(settings), "{said}");
}

#[test]
fn train_without_settings_learns_the_demos_data_in_a_hundred_steps() {
    let home = tempfile::tempdir().unwrap();
    let (run, said) = run(home.path(), &["train", "--steps", "100"]);
    assert_said(&run, &said);
    let perplexity = run["valid_after"]["perplexity"].as_f64().unwrap();
    assert!(perplexity < LEARNED, "{perplexity}");
}

#[test]
fn serve_without_settings_learns_the_demos_data_in_a_hundred_steps() {
    let home = tempfile::tempdir().unwrap();
    let (run, said) = run(
        home.path(),
        &["serve", "--local-clients", "2", "--listen", "http://127.0.0.1:0"],
    );
    assert_said(&run, &said);
    let metrics = std::fs::read_to_string(home.path().join("run/metrics.jsonl")).unwrap();
    let last = (metrics.lines().rev())
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .find(|line| line["kind"] == "round")
        .unwrap();
    let perplexity = last["valid_perplexity"].as_f64().unwrap();
    assert!(perplexity < LEARNED, "{perplexity}");
}
