//! Scenario and instance files: what they mean, and what is said of those that mean nothing.

use serde_json::{Value, json};
use sflllm::allocation::instance::Instance;
use sflllm::allocation::scenario::{PRESETS, Scenario};
use sflllm::allocation::{Method, SnrPerWatt, SolveOptions, solve};

use crate::instances::{Regime, Shape, assert_near, generator, instance, problem, reevaluated_s};

/// `paper` with `changes`.
fn changed(changes: Value) -> Result<sflllm::allocation::Problem, String> {
    Scenario::from_value(changes)
        .and_then(|scenario| scenario.problem())
        .map_err(|error| error.to_string())
}

#[track_caller]
fn assert_refused(changes: Value, parts: &[&str]) {
    let error = changed(changes.clone()).expect_err(&changes.to_string());
    for part in parts {
        assert!(error.contains(part), "`{error}` does not say `{part}`");
    }
}

/// A small instance as a file has it.
fn file(flat: bool) -> Value {
    instance(
        "file",
        &problem(&mut generator(1), Regime::Ordinary, Shape::small(flat)),
    )
}

#[track_caller]
fn assert_instance_refused(change: impl FnOnce(&mut Value), parts: &[&str]) {
    let mut file = file(false);
    change(&mut file);
    let error = match serde_json::from_value::<Instance>(file) {
        Ok(instance) => instance.problem().unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(error.contains(part), "`{error}` does not say `{part}`");
    }
}

#[test]
fn every_preset_is_solved_by_every_method() {
    for name in PRESETS {
        let problem = Scenario::preset(name).unwrap().problem().unwrap();
        for method in Method::ALL {
            let plan = solve(&problem, method, &SolveOptions::default()).unwrap();
            assert_near(
                reevaluated_s(&problem, &plan),
                plan.total_s,
                1e-9,
                &format!("{method} on {name}"),
            );
        }
    }
}

#[test]
fn the_best_plan_of_a_flat_preset_is_exact() {
    for name in ["paper", "cell", "slow-server"] {
        let problem = Scenario::preset(name).unwrap().problem().unwrap();
        let plan = solve(&problem, Method::Best, &SolveOptions::default()).unwrap();
        assert!(plan.gap() < 1e-9, "{name}: {}", plan.gap());
    }
}

#[test]
fn a_scenario_reads_the_same_in_toml_and_json_and_back() {
    let toml = "preset = 'selective'\nseed = 3\n[clients]\ncount = 7\n[training]\nsplits = [1, 4]\n[training.rounds]\n4 = 50.0\n";
    let json =
        r#"{"preset":"selective","seed":3,"clients":{"count":7},"training":{"splits":[1,4],"rounds":{"4":50.0}}}"#;
    let scenario = Scenario::from_text(toml).unwrap();
    assert_eq!(scenario, Scenario::from_text(json).unwrap());
    let again = Scenario::from_value(serde_json::to_value(&scenario).unwrap()).unwrap();
    assert_eq!(scenario, again);
    assert_eq!(scenario.ranks().unwrap(), vec![(4, 50.0)]);
}

#[test]
fn subchannels_leave_places_and_speeds_as_they_are() {
    let few = Scenario::preset("cell").unwrap();
    let many = few.with(json!({ "main": { "subchannels": 64 } })).unwrap();
    let gains = |scenario: &Scenario| {
        let (main, federated, _) = scenario.channels().unwrap();
        let (SnrPerWatt::Flat(main_gains), SnrPerWatt::Flat(federated_gains)) =
            (main.snr_per_watt, federated.snr_per_watt)
        else {
            panic!("a flat preset");
        };
        let path: Vec<f64> = main_gains.iter().map(|gain| gain * main.bandwidth_hz).collect();
        (path, federated_gains)
    };
    let ((few_path, few_federated), (many_path, many_federated)) = (gains(&few), gains(&many));
    assert_eq!(few_federated, many_federated);
    for (few, many) in few_path.iter().zip(&many_path) {
        assert_near(*many, *few, 1e-12, "gain times bandwidth");
    }
    assert_eq!(few.speeds().unwrap(), many.speeds().unwrap());
}

#[test]
fn unknown_presets_and_fields_are_named() {
    assert_refused(json!({ "preset": "moon" }), &["moon", "slow-server"]);
    assert_refused(json!({ "preset": 3 }), &["3"]);
    assert_refused(json!({ "clients": { "cuont": 3 } }), &["cuont", "count"]);
    assert_refused(json!({ "bandwidth": 1 }), &["bandwidth"]);
    assert_refused(json!([1]), &[]);
    assert_refused(json!("paper"), &[]);
    assert_refused(json!({ "clients": 5 }), &[]);
}

#[test]
fn numbers_that_are_none_are_refused() {
    for wrong in [json!(null), json!("NaN"), json!([]), json!(-1.0)] {
        assert_refused(json!({ "main": { "bandwidth_hz": wrong } }), &[]);
    }
    assert!(Scenario::from_text("[main]\nbandwidth_hz = nan\n").is_err());
    let infinite = Scenario::from_text("[main]\nbandwidth_hz = inf\n").and_then(|scenario| scenario.problem());
    assert!(infinite.is_err());
    let gains = |gain: Value| {
        json!({
            "clients": { "count": 2 },
            "channel": { "main_snr_per_watt": [[1e3], [gain]] },
        })
    };
    assert!(changed(gains(json!(1e3))).is_ok());
    for wrong in [json!(null), json!("NaN"), json!(-1.0), json!(0.0)] {
        assert_refused(gains(wrong), &[]);
    }
    assert_refused(gains(json!(0.0)), &["snr_per_watt", "client 1", "main link", "above 0"]);
}

#[test]
fn links_that_carry_nothing_are_refused_by_name() {
    assert_refused(
        json!({ "main": { "bandwidth_hz": 0.0 } }),
        &["bandwidth", "main link", "0 Hz"],
    );
    assert_refused(json!({ "federated": { "bandwidth_hz": 0.0 } }), &["federated link"]);
    assert_refused(
        json!({ "main": { "power_total_dbm": -1e9 } }),
        &["total power", "main link", "above 0"],
    );
    assert_refused(
        json!({ "clients": { "power_max_dbm_each": [1, 2, -1e9, 4, 5] } }),
        &["power_max_w", "client 2", "main link", "above 0"],
    );
    assert_refused(
        json!({ "clients": { "power_max_dbm": -1e9 } }),
        &["power_max_w", "client 0"],
    );
}

#[test]
fn more_clients_than_subchannels_are_refused_with_both_numbers() {
    assert_refused(json!({ "clients": { "count": 21 } }), &["main link", "20", "21"]);
    assert_refused(
        json!({ "clients": { "count": 21 }, "main": { "subchannels": 30 } }),
        &["federated link", "20", "21"],
    );
    assert_refused(
        json!({ "download": { "subchannels": 2, "bandwidth_hz": 1e6, "power_total_dbm": 30.0 } }),
        &["download link", "2 subchannels", "5 clients"],
    );
    assert_refused(json!({ "clients": { "count": 0 } }), &["no clients"]);
}

#[test]
fn lists_of_the_wrong_length_are_refused_by_name() {
    assert_refused(
        json!({ "clients": { "compute_hz_each": [1e9] } }),
        &["compute_hz_each", "1", "5"],
    );
    assert_refused(
        json!({ "clients": { "main_distance_m": [1, 2] } }),
        &["main_distance_m", "2", "5"],
    );
    assert_refused(
        json!({ "clients": { "power_max_dbm_each": [] } }),
        &["power_max_dbm_each", "0", "5"],
    );
    assert_refused(
        json!({ "clients": { "memory_max_bytes": [1e9] } }),
        &["memory_max_bytes", "1", "5"],
    );
    assert_refused(
        json!({ "channel": { "main_snr_per_watt": [[1.0], [1.0]] } }),
        &["snr_per_watt", "main link", "2", "5"],
    );
    assert_refused(
        json!({ "clients": { "count": 2 }, "channel": { "main_snr_per_watt": [[1.0, 2.0], [1.0, 3.0]] } }),
        &["snr_per_watt", "client 0", "main link", "2", "20"],
    );
    assert_refused(
        json!({ "channel": { "main_snr_per_watt": [] } }),
        &["snr_per_watt", "main link"],
    );
}

#[test]
fn splits_ranks_and_rounds_that_do_not_fit_are_refused() {
    assert_refused(json!({ "training": { "splits": [0, 1] } }), &["training.splits", "0"]);
    assert_refused(json!({ "training": { "splits": [12] } }), &["training.splits", "12"]);
    assert_refused(json!({ "training": { "splits": [] } }), &["training.splits"]);
    assert_refused(json!({ "training": { "ranks": [] } }), &["rank"]);
    assert_refused(
        json!({ "training": { "ranks": [0], "rounds": { "0": 1.0 } } }),
        &["training.ranks"],
    );
    assert_refused(
        json!({ "training": { "ranks": [1, 3] } }),
        &["rank 3", "E(r)", "calibrate"],
    );
    assert_refused(json!({ "training": { "rounds": { "1": 0.0 } } }), &["rank 1", "E(r)"]);
    assert_refused(json!({ "training": { "rounds": {} } }), &["training.rounds"]);
    assert_refused(json!({ "training": { "local_steps": 0 } }), &["local_steps", "above 0"]);
    assert_refused(json!({ "training": { "seq": 2048 } }), &["training.seq", "1024"]);
    assert_refused(json!({ "training": { "wire": "f64" } }), &["training.wire", "f64"]);
    assert_refused(json!({ "training": { "targets": ["w"] } }), &["training.targets", "w"]);
    assert_refused(json!({ "model": { "blocks": 1 } }), &["training.splits"]);
}

#[test]
fn sizes_that_are_mistakes_are_refused_before_anything_is_made_of_them() {
    let huge = json!(1_000_000_000_000_000_000_u64);
    assert_refused(json!({ "clients": { "count": huge } }), &["clients"]);
    assert_refused(
        json!({ "main": { "subchannels": huge } }),
        &["main link", "subchannels"],
    );
    assert_refused(
        json!({ "federated": { "subchannels": huge } }),
        &["federated link", "subchannels"],
    );
    assert_refused(json!({ "training": { "batch": huge } }), &["training.batch"]);
    assert_refused(json!({ "model": { "blocks": huge } }), &["n_layer"]);
    assert_refused(
        json!({ "preset": "selective", "clients": { "count": 60000 }, "main": { "subchannels": 65536 }, "federated": { "subchannels": 65536 } }),
        &["channel.fading", "main link"],
    );
    assert_refused(
        json!({ "clients": { "count": 60000 }, "main": { "subchannels": 65536 }, "federated": { "subchannels": 65536 }, "model": { "blocks": 4096 } }),
        &["training.splits"],
    );
    assert_instance_refused(|file| file["M"] = huge.clone(), &["main link"]);
    assert_instance_refused(|file| file["K"] = huge.clone(), &["pmax_w"]);
}

#[test]
fn numbers_whose_sum_is_infinite_are_refused() {
    let mut file = file(true);
    file["rounds"] = json!([1e308, 1e308]);
    let problem = serde_json::from_value::<Instance>(file).unwrap().problem().unwrap();
    for method in Method::ALL {
        let error = solve(&problem, method, &SolveOptions::default()).unwrap_err();
        assert!(error.to_string().contains("total delay"), "{method}: {error}");
    }
}

#[test]
fn an_instance_with_a_table_of_the_wrong_shape_is_refused_by_name() {
    let pop = |value: &mut Value| {
        value.as_array_mut().unwrap().pop();
    };
    for field in [
        "client_fwd_s",
        "client_bwd_s",
        "server_s",
        "upload_bits",
        "adapter_bits",
    ] {
        assert_instance_refused(|file| pop(&mut file[field]), &[field, "1 entries", "expected 2"]);
        assert_instance_refused(
            |file| pop(&mut file[field][1]),
            &[field, "split 2", "1 entries", "expected 2"],
        );
        assert_instance_refused(
            |file| {
                let row = file[field][0].clone();
                file[field].as_array_mut().unwrap().push(row);
            },
            &[field, "3 entries", "expected 2"],
        );
    }
    for field in ["pmax_w", "rounds", "snr_per_watt_main", "snr_per_watt_fed"] {
        assert_instance_refused(
            |file| pop(&mut file[field]),
            &[field.trim_end_matches("_w"), "1 entries"],
        );
    }
    assert_instance_refused(
        |file| pop(&mut file["snr_per_watt_fed"][1]),
        &["client 1", "federated link"],
    );
    assert_instance_refused(
        |file| pop(&mut file["client_fwd_s"][0][1]),
        &["client_forward_s", "split 1, rank 4"],
    );
    assert_instance_refused(|file| file["flat"] = json!(true), &["snr_per_watt_main", "expected 1"]);
    assert_instance_refused(|file| file["splits"] = json!([]), &[]);
    assert_instance_refused(|file| file["local_iters"] = json!(0), &["local_steps"]);
    assert_instance_refused(|file| file["K"] = json!(0), &[]);
    assert_instance_refused(
        |file| drop(file.as_object_mut().unwrap().remove("pth_fed_w")),
        &["pth_fed_w"],
    );
}

#[test]
fn an_instance_with_a_number_that_is_none_is_refused_by_name() {
    assert_instance_refused(|file| file["pmax_w"][1] = json!(0.0), &["power_max_w", "client 1"]);
    assert_instance_refused(
        |file| file["pth_fed_w"] = json!(-1.0),
        &["total power", "federated link"],
    );
    assert_instance_refused(
        |file| file["bandwidth_main_hz"] = json!(0.0),
        &["bandwidth", "main link"],
    );
    assert_instance_refused(|file| file["snr_per_watt_main"][0][2] = json!(null), &["null"]);
    assert_instance_refused(
        |file| file["snr_per_watt_main"][0][2] = json!(0.0),
        &["client 0", "main link"],
    );
    assert_instance_refused(
        |file| file["upload_bits"][1][0] = json!(-3.0),
        &["upload_bits of split 2, rank 2"],
    );
    assert_instance_refused(|file| file["rounds"][1] = json!(0.0), &["rank 4"]);
}
