//! Committed instances with the optimum that trying everything found.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sflllm::allocation::instance::Instance;
use sflllm::allocation::{Method, Problem, SolveOptions, solve};

use crate::brute;
use crate::instances::{Regime, Shape, assert_at_most, assert_near, generator, instance, problem, reevaluated_s};

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/allocation/instances.json")
}

/// The file as it is made; with `SFLLLM_WRITE_FIXTURES` set the test makes it again.
fn generated() -> Value {
    let shape = |clients, main, federated, splits, flat| Shape {
        clients,
        main,
        federated,
        splits,
        ranks: 2,
        flat,
    };
    let kinds = [
        ("flat_total_power", Regime::TotalPower, shape(3, 5, 4, 2, true)),
        ("flat_client_power", Regime::ClientPower, shape(2, 6, 4, 3, true)),
        ("flat_unequal_waits", Regime::UnequalWaits, shape(3, 4, 4, 2, true)),
        ("selective_ordinary", Regime::Ordinary, shape(3, 6, 5, 2, false)),
        ("selective_total_power", Regime::TotalPower, shape(3, 5, 4, 2, false)),
        ("selective_client_power", Regime::ClientPower, shape(2, 7, 5, 2, false)),
        ("selective_tiny_snr", Regime::TinySnr, shape(2, 5, 4, 2, false)),
        ("selective_huge_snr", Regime::HugeSnr, shape(3, 5, 4, 2, false)),
        ("selective_one_each", Regime::Ordinary, shape(4, 4, 4, 2, false)),
        ("selective_one_client", Regime::Ordinary, shape(1, 4, 3, 2, false)),
    ];
    let instances = kinds.into_iter().enumerate().map(|(seed, (name, regime, shape))| {
        let problem = problem(&mut generator(seed as u64), regime, shape);
        let mut file = instance(name, &problem);
        let optimum_s = brute::uniform_s(&problem);
        file["optimum"] = json!({ "lower_s": optimum_s, "upper_s": optimum_s });
        file["per_client_split_optimum"] = json!(brute::per_client_s(&problem));
        file
    });
    json!({ "schema": 1, "instances": instances.collect::<Vec<_>>() })
}

/// The committed instances as they stand in the file, with what they say.
fn committed() -> Vec<(Value, Problem)> {
    if std::env::var_os("SFLLLM_WRITE_FIXTURES").is_some() {
        fs::create_dir_all(path().parent().unwrap()).unwrap();
        fs::write(path(), format!("{:#}\n", generated())).unwrap();
    }
    let file: Value = serde_json::from_str(&fs::read_to_string(path()).unwrap()).unwrap();
    assert_eq!(file["schema"], 1);
    (file["instances"].as_array().unwrap().iter())
        .map(|raw| {
            let instance: Instance = serde_json::from_value(raw.clone()).unwrap();
            (raw.clone(), instance.problem().unwrap())
        })
        .collect()
}

#[test]
fn the_committed_instances_are_solved_to_their_optimum() {
    for (raw, problem) in committed() {
        let name = raw["name"].as_str().unwrap();
        let tolerance = if name.contains("tiny_snr") { 1e-7 } else { 1e-9 };
        let optimum_s = raw["optimum"]["upper_s"].as_f64().unwrap();
        let plan = solve(&problem, Method::Best, &SolveOptions::default()).unwrap();
        assert_near(plan.total_s, optimum_s, tolerance, name);
        assert_at_most(plan.lower_bound_s, optimum_s, tolerance, name);
        assert_near(reevaluated_s(&problem, &plan), plan.total_s, 1e-9, name);
        let own = SolveOptions {
            per_client_split: true,
            ..Default::default()
        };
        let plan = solve(&problem, Method::Best, &own).unwrap();
        assert_near(
            plan.total_s,
            raw["per_client_split_optimum"].as_f64().unwrap(),
            tolerance,
            name,
        );
    }
}

#[test]
fn the_committed_optima_are_brute_forces() {
    for (raw, problem) in committed() {
        let name = raw["name"].as_str().unwrap();
        assert_near(
            raw["optimum"]["upper_s"].as_f64().unwrap(),
            brute::uniform_s(&problem),
            1e-9,
            name,
        );
        let own_s = brute::per_client_s(&problem);
        assert_near(raw["per_client_split_optimum"].as_f64().unwrap(), own_s, 1e-9, name);
    }
}
