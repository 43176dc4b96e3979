//! `serve --aggregate` and `--client-ranks` as somebody types them.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn data(name: &str) -> String {
    format!("{}/assets/demo/{name}.txt", env!("CARGO_MANIFEST_DIR"))
}

/// Serves a short run with three clients in the process.
fn serve(home: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sflllm"))
        .args(["serve", "--listen", "http://127.0.0.1:0", "--device", "cpu"])
        .args([
            "--local-clients",
            "3",
            "--data",
            &data("train"),
            "--rounds",
            "2",
            "--local-steps",
            "2",
        ])
        .args(words)
        .arg("--out")
        .arg(home.join("run"))
        .env("SFLLLM_HOME", home)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn what_does_not_go_together_is_said_before_anything_is_served() {
    let home = tempfile::tempdir().unwrap();
    for (words, expected) in [
        (&["--aggregate", "sum"][..], "mean, trimmed, median, flora, fedex, ffa"),
        (&["--client-ranks", "4,2"], "--client-ranks needs --split N"),
        (&["--client-ranks", "4,0", "--split", "1"], "0 is not in"),
        (
            &["--client-ranks", "4,64", "--split", "1", "--rank", "8"],
            "--client-ranks 64: the run's rank is 8",
        ),
        (
            &["--aggregate", "flora", "--per-client-split"],
            "take --aggregate fedex",
        ),
        (
            &["--aggregate", "ffa", "--init-adapter", "elsewhere"],
            "--aggregate ffa freezes the matrices A",
        ),
    ] {
        let output = serve(home.path(), words);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(expected), "{words:?}: {said}");
        assert!(!home.path().join("run").exists(), "{words:?} leaves nothing behind");
    }
}

#[test]
fn a_run_says_how_it_aggregated_and_what_averaging_misses() {
    let home = tempfile::tempdir().unwrap();
    let words = [
        "--aggregate",
        "flora",
        "--client-ranks",
        "8,4,2",
        "--split",
        "2",
        "--rank",
        "8",
    ];
    let output = serve(home.path(), &words);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("averaging error") && said.contains("flora") && said.contains("% at the clients"),
        "{said}"
    );
    let run = home.path().join("run");
    let read = |name: &str| std::fs::read_to_string(run.join(name)).unwrap();
    let noted: Value = serde_json::from_str(&read("run.json")).unwrap();
    let configuration = &noted["configuration"];
    assert_eq!(configuration["aggregate"], "flora");
    assert_eq!(configuration["client_ranks"], serde_json::json!([8, 4, 2]));
    let metrics = read("metrics.jsonl");
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let last = lines.rev().find(|line| line["kind"] == "round").unwrap();
    assert_eq!((&last["aggregation"], &last["adapters"]), (&"flora".into(), &3.into()));
    let error = |name: &str| last[name].as_f64().unwrap();
    assert!(
        0.0 < error("start_error") && error("start_error") < error("averaging_error"),
        "{last}"
    );
    // The clients' ranks together, in the files of peft.
    let description: Value = serde_json::from_str(&read("adapter/adapter_config.json")).unwrap();
    let ranks = description["rank_pattern"].as_object().unwrap();
    assert!(!ranks.is_empty() && ranks.values().all(|rank| rank == 14), "{ranks:?}");
}
