//! Adapters whose projections have ranks and scales of their own: a run of several devices starts from them, and trains what one
//! device trains.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use sflllm::model::adapter::{Adapter, Exception, LoraSpec, Target};
use sflllm::model::architecture::Architecture;

const STEPS: &str = "8";

fn demo() -> Architecture {
    Architecture::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo"))).unwrap()
}

/// An adapter of some projections of the demo model that changes what the model computes: no B is zero.
fn uneven(rank_stabilised: bool) -> Adapter {
    let exception = |block, target, rank, alpha| Exception {
        block,
        target,
        rank,
        alpha,
    };
    let mut spec = LoraSpec::new(4, 8.0, [Target::AttnQkv, Target::MlpFc])
        .unwrap()
        .with_exceptions(vec![
            exception(0, Target::AttnQkv, 2, 8.0),
            exception(0, Target::MlpFc, 0, 8.0),
            exception(1, Target::AttnQkv, 5, 3.0),
            exception(2, Target::MlpProj, 3, 1.0),
            exception(3, Target::AttnQkv, 0, 8.0),
            exception(3, Target::MlpFc, 0, 8.0),
        ])
        .unwrap();
    spec.rank_stabilised = rank_stabilised;
    let mut adapter = Adapter::init(&demo(), &spec, 0..4, 3).unwrap();
    for (position, value) in adapter.values.iter_mut().enumerate() {
        *value += 0.02 * (position as f32 * 0.37).sin();
    }
    adapter
}

fn run(home: &Path, words: &str, out: &Path) -> Vec<Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_sflllm"))
        .args(words.split_whitespace())
        .args("--seed 5 --lr 1e-2 --batch 2 --seq 48 --weights f32 --device cpu --data".split(' '))
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo/valid.txt"))
        .arg("--init-adapter")
        .arg(home.join("initial"))
        .arg("--out")
        .arg(out)
        .env("SFLLLM_HOME", home)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn losses(metrics: &[Value]) -> Vec<f64> {
    let steps = metrics.iter().filter(|line| line["kind"] == "step");
    steps.map(|line| line["loss"].as_f64().unwrap()).collect()
}

fn largest_difference(a: impl IntoIterator<Item = f64>, b: impl IntoIterator<Item = f64>) -> f64 {
    a.into_iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn a_split_run_from_an_uneven_adapter_trains_what_one_device_trains() {
    let model = demo();
    for rank_stabilised in [false, true] {
        let home = tempfile::tempdir().unwrap();
        uneven(rank_stabilised)
            .save(&home.path().join("initial"), &model, "demo")
            .unwrap();
        let alone = home.path().join("alone");
        let expected = losses(&run(home.path(), &format!("train --steps {STEPS}"), &alone));
        assert_eq!(expected.len().to_string(), STEPS);
        // Projections without an adapter are on both sides of the first cut, none is above the last.
        for cut in 1..model.blocks {
            let out = home.path().join(format!("cut-{cut}"));
            let words = format!(
                "serve --local-clients 1 --listen http://127.0.0.1:0 --split {cut} --rounds 2 --local-steps 4 --wire f32"
            );
            let found = losses(&run(home.path(), &words, &out));
            assert_eq!(found.len(), expected.len());
            let difference = largest_difference(expected.iter().copied(), found.iter().copied());
            assert!(difference < 2e-5, "cut {cut}: {found:?}, expected {expected:?}");
            // What was nothing at the start still is; the rest is what one device learned.
            let learned = Adapter::load(&out.join("adapter"), &model).unwrap();
            let expected = Adapter::load(&alone.join("adapter"), &model).unwrap();
            for entry in learned.layout.entries() {
                let b = &learned.values[entry.range_b()];
                match expected.layout.entry(entry.block, entry.target) {
                    None => assert!(b.iter().all(|&value| value == 0.0), "{entry:?}"),
                    Some(own) => {
                        assert!((entry.scale / own.scale - 1.0).abs() < 1e-6, "{entry:?} {own:?}");
                        let rows = b.chunks(entry.rank).flat_map(|row| &row[..own.rank]).copied();
                        let own = expected.values[own.range_b()].iter().copied();
                        let difference = largest_difference(rows.map(f64::from), own.map(f64::from));
                        assert!(difference < 1e-4, "{entry:?}: {difference}");
                    }
                }
            }
        }
    }
}

#[test]
fn an_even_adapter_is_left_as_it_is() {
    let spec = LoraSpec::new(3, 8.0, [Target::AttnQkv]).unwrap();
    let adapter = Adapter::init(&demo(), &spec, 1..3, 0).unwrap();
    assert_eq!(adapter.clone().with_one_rank(&demo()).unwrap(), adapter);
}
