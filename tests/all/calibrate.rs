//! `sflllm calibrate` on a model of random weights: its table, going on after an interruption, and that a split run with one client
//! needs the rounds of a centralised one.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Parser;
use serde_json::{Value, json};
use sflllm::cli::Cli;
use sflllm::model::rounds::{RoundsError, RoundsTable};

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    /// A directory with data in it: sequences in which each token follows from the one before.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sequence = |start: u32| -> Vec<u32> {
            std::iter::successors(Some(start), |token| Some((token * 5 + 3) % 24))
                .take(12)
                .collect()
        };
        let mut text = String::new();
        for start in 0..12 {
            writeln!(text, "{}", json!({ "input_ids": sequence(start) })).unwrap();
        }
        std::fs::write(dir.path().join("data.jsonl"), text).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn calibrate(&self, out: &str, options: &[&str]) -> Result<RoundsTable, String> {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt2_peft/narrow/model");
        let (data, out) = (self.path("data.jsonl"), self.path(out));
        let file = |path: &Path| path.to_str().unwrap().to_owned();
        let mut words: Vec<String> = ["sflllm", "calibrate", "--device", "cpu", "--weights", "f32", "--quiet"]
            .map(str::to_owned)
            .into();
        words.extend(["--lr", "0.02", "--local-steps", "2", "--batch", "4"].map(str::to_owned));
        for (name, value) in [
            ("--model", &model),
            ("--data", &data),
            ("--valid", &data),
            ("--out", &out),
        ] {
            words.extend([name.to_owned(), file(value)]);
        }
        words.extend(options.iter().map(|&word| word.to_owned()));
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        cli.command.run().map_err(|error| format!("{error:#}"))?;
        Ok(RoundsTable::load(&out).unwrap())
    }
}

const SMALL: [&str; 8] = [
    "--ranks",
    "4,1",
    "--seeds",
    "2",
    "--max-rounds",
    "5",
    "--target-fraction",
    "0.5",
];

#[test]
fn the_table_has_a_mean_and_its_runs_for_every_rank() {
    let bench = Bench::new();
    let table = bench.calibrate("rounds.json", &SMALL).unwrap();
    assert!(table.complete);
    assert_eq!((table.schema, table.clients, table.local_steps), (1, 1, 2));
    assert_eq!((table.seeds, table.max_rounds), (2, Some(5)));
    assert_eq!(table.ranks, [1, 4]);
    for index in 0..2 {
        let runs: Vec<f64> = table.runs[index].iter().map(|run| run.unwrap()).collect();
        assert_eq!(runs.len(), 2);
        assert!(runs.iter().all(|&rounds| rounds > 0.0 && rounds <= 5.0), "{runs:?}");
        assert!((table.rounds[index].unwrap() - (runs[0] + runs[1]) / 2.0).abs() < 1e-12);
        let deviation = (runs[0] - runs[1]).abs() / 2.0_f64.sqrt();
        assert!((table.spread[index].unwrap() - deviation).abs() < 1e-12);
    }
    // The target is half of the way that the largest rank went, and a run of another rank ends where it gets there.
    let way = |run: &Vec<f64>| (run[0], run.iter().copied().fold(f64::INFINITY, f64::min));
    let (before, lowest) = (
        (way(&table.losses[1][0]).0 + way(&table.losses[1][1]).0) / 2.0,
        (way(&table.losses[1][0]).1 + way(&table.losses[1][1]).1) / 2.0,
    );
    let target = table.target_loss.unwrap();
    assert!((target - (before + lowest) / 2.0).abs() < 1e-12);
    assert!(table.losses[1].iter().all(|run| run.len() == 6));
    for run in &table.losses[0] {
        let (last, earlier) = run.split_last().unwrap();
        assert!(*last <= target && earlier.iter().all(|&loss| loss > target));
    }
    assert_eq!(table.measured().unwrap().len(), 2);

    // The same settings again change nothing, and need no training.
    let written = std::fs::read(bench.path("rounds.json")).unwrap();
    bench.calibrate("rounds.json", &SMALL).unwrap();
    assert_eq!(std::fs::read(bench.path("rounds.json")).unwrap(), written);
    // Other settings are not mixed into it.
    let error = bench
        .calibrate("rounds.json", &[&SMALL[..], &["--seed", "7"]].concat())
        .unwrap_err();
    assert!(error.contains("(seed)"), "{error}");
    assert_eq!(std::fs::read(bench.path("rounds.json")).unwrap(), written);
}

#[test]
fn an_interrupted_calibration_goes_on_where_it_was() {
    let bench = Bench::new();
    let whole = bench.calibrate("whole.json", &SMALL).unwrap();
    let text = std::fs::read_to_string(bench.path("whole.json")).unwrap();
    for (kept, name) in [
        ([0, 0], "nothing"),
        ([0, 1], "before the target is known"),
        ([1, 2], "after"),
    ] {
        let mut partial: Value = serde_json::from_str(&text).unwrap();
        partial["complete"] = json!(false);
        for (index, kept) in kept.into_iter().enumerate() {
            partial["losses"][index].as_array_mut().unwrap().truncate(kept);
            partial["runs"][index].as_array_mut().unwrap().truncate(kept);
            partial["rounds"][index] = Value::Null;
        }
        std::fs::write(bench.path("partial.json"), partial.to_string()).unwrap();
        assert_eq!(bench.calibrate("partial.json", &SMALL).unwrap(), whole, "{name}");
    }
    // A kept run is not trained again: a mark put into it is still there.
    let mut partial: Value = serde_json::from_str(&text).unwrap();
    partial["complete"] = json!(false);
    partial["losses"][0].as_array_mut().unwrap().truncate(1);
    partial["losses"][0][0][0] = json!(1234.5);
    std::fs::write(bench.path("partial.json"), partial.to_string()).unwrap();
    let marked = bench.calibrate("partial.json", &SMALL).unwrap();
    assert_eq!(marked.losses[0][0][0], 1234.5);
    assert_eq!(marked.losses[0][1], whole.losses[0][1]);
}

#[test]
fn one_client_of_a_split_run_needs_the_rounds_of_a_centralised_one() {
    let bench = Bench::new();
    let central = bench.calibrate("central.json", &SMALL).unwrap();
    for cut in ["1", "2"] {
        let split = [&SMALL[..], &["--clients", "1", "--split", cut, "--wire", "f32"]].concat();
        let split = bench.calibrate(&format!("split{cut}.json"), &split).unwrap();
        assert_eq!(split.settings["split"], json!(cut.parse::<usize>().unwrap()));
        for (split, central) in split.runs.iter().flatten().zip(central.runs.iter().flatten()) {
            let (split, central) = (split.unwrap(), central.unwrap());
            assert!((split - central).abs() < 1e-3, "cut {cut}: {split} for {central}");
        }
    }
}

#[test]
fn several_clients_learn_together_and_an_unreached_target_is_null() {
    let bench = Bench::new();
    let options = ["--ranks", "2", "--seeds", "1", "--max-rounds", "3", "--clients", "3"];
    let table = bench.calibrate("together.json", &options).unwrap();
    assert_eq!((table.clients, table.ranks.len()), (3, 1));
    assert_eq!(table.spread, [None]);
    let losses = &table.losses[0][0];
    assert!(losses[3] < losses[0], "{losses:?}");
    assert!(table.measured().is_ok());

    let low = [&options[..], &["--target-loss", "0.000001"]].concat();
    let table = bench.calibrate("low.json", &low).unwrap();
    assert!(table.complete);
    assert_eq!(table.rounds, [None]);
    assert!(matches!(table.measured(), Err(RoundsError::Unreached { rank: 2 })));

    let high = [&options[..], &["--target-loss", "100"]].concat();
    let error = bench.calibrate("high.json", &high).unwrap_err();
    assert!(error.contains("not below the loss before training"), "{error}");
}
