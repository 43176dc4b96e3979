//! `sflllm plan` and `sflllm sweep` as programs: what they print, what they write, and how they end.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use sflllm::allocation::instance::Instance;
use sflllm::allocation::scenario::Scenario;
use sflllm::allocation::{LinkPlan, Method, Plan, Problem};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/allocation")
        .join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn sflllm(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sflllm")).args(words).output().unwrap()
}

fn stdout(words: &[&str]) -> String {
    let output = sflllm(words);
    assert!(
        output.status.success(),
        "{words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn json(words: &[&str]) -> Value {
    serde_json::from_str(&stdout(words)).unwrap()
}

/// The exit code, and what stands on stderr.
fn failure(words: &[&str]) -> (i32, String) {
    let output = sflllm(words);
    assert!(output.stdout.is_empty(), "{words:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|value| value.as_f64().unwrap())
        .collect()
}

fn index(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

/// The total of a printed plan, from its owners and powers alone.
fn evaluated_s(problem: &Problem, answer: &Value) -> f64 {
    let link = |value: &Value| LinkPlan {
        owner: value["owner"].as_array().unwrap().iter().map(index).collect(),
        power_w: numbers(&value["power_w"]),
        phase_s: value["phase_s"].as_f64().unwrap(),
        energy_j: 0.0,
    };
    let plan = Plan {
        method: answer["method"].as_str().unwrap().parse().unwrap(),
        split_index: match &answer["split_index"] {
            Value::Array(indices) => indices.iter().map(index).collect(),
            one => vec![index(one); problem.clients()],
        },
        rank_index: index(&answer["rank_index"]),
        main: link(&answer["main"]),
        federated: link(&answer["fed"]),
        download: None,
        total_s: 0.0,
        lower_bound_s: 0.0,
    };
    problem.rounds[plan.rank_index] * problem.times(&plan).unwrap().round_s(problem.local_steps)
}

fn assert_is_answer(problem: &Problem, answer: &Value, method: Method) {
    for field in ["total_s", "lower_bound_s", "gap", "solve_ms"] {
        assert!(answer[field].is_f64(), "{field} of {answer}");
    }
    for link in ["main", "fed"] {
        assert!(answer[link]["phase_s"].is_f64(), "{link} of {answer}");
    }
    assert_eq!(answer["method"], method.name());
    let (total_s, lower_s) = (
        answer["total_s"].as_f64().unwrap(),
        answer["lower_bound_s"].as_f64().unwrap(),
    );
    let again_s = evaluated_s(problem, answer);
    assert!((again_s / total_s - 1.0).abs() < 1e-9, "{total_s} is {again_s}");
    assert!(lower_s > 0.0 && lower_s <= total_s);
    assert!((answer["gap"].as_f64().unwrap() - (total_s - lower_s) / lower_s).abs() < 1e-12);
    assert_eq!(answer["rank"], problem.ranks[index(&answer["rank_index"])]);
}

fn instances() -> Vec<Instance> {
    let file: Value = serde_json::from_str(&std::fs::read_to_string(fixture("command.json")).unwrap()).unwrap();
    serde_json::from_value(file["instances"].clone()).unwrap()
}

#[test]
fn a_scenario_is_solved_by_every_method() {
    let path = fixture("scenario.toml");
    let problem = Scenario::load(&path).unwrap().problem().unwrap();
    let best = json(&["plan", text(&path), "--json"]);
    assert!(best["split_index"].is_u64());
    for method in Method::ALL {
        let answer = json(&["plan", text(&path), "--json", "--method", method.name(), "--seed", "3"]);
        assert_is_answer(&problem, &answer, method);
        assert!(answer["total_s"].as_f64().unwrap() >= best["total_s"].as_f64().unwrap() * (1.0 - 1e-9));
    }
    let own = json(&["plan", text(&path), "--json", "--per-client-split"]);
    assert_eq!(own["split_index"].as_array().unwrap().len(), 3);
    assert_eq!(own["split"].as_array().unwrap().len(), 3);
    assert_is_answer(&problem, &own, Method::Best);
    assert!(own["total_s"].as_f64().unwrap() <= best["total_s"].as_f64().unwrap() * (1.0 + 1e-9));
}

#[test]
fn instances_are_solved_one_or_all() {
    let path = fixture("command.json");
    let all = json(&["plan", text(&path), "--json"]);
    let instances = instances();
    assert_eq!(all.as_array().unwrap().len(), instances.len());
    for (instance, answer) in instances.iter().zip(all.as_array().unwrap()) {
        assert_eq!(answer["name"], instance.name.as_str());
        let problem = instance.problem().unwrap();
        assert_is_answer(&problem, answer, Method::Best);
        assert!(
            answer["gap"].as_f64().unwrap() < 1e-9,
            "small instances are exact: {answer}"
        );
        let one = json(&["plan", text(&path), "--instance", &instance.name, "--json"]);
        assert_eq!((&one["total_s"], &one["main"]), (&answer["total_s"], &answer["main"]));
    }
    let dir = tempfile::tempdir().unwrap();
    let single = dir.path().join("single.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    std::fs::write(&single, file["instances"][0].to_string()).unwrap();
    assert_eq!(json(&["plan", text(&single), "--json"])["total_s"], all[0]["total_s"]);
}

#[test]
fn changes_and_presets() {
    let answer = json(&[
        "plan",
        "cell",
        "--json",
        "--set",
        "clients.count=3",
        "--set",
        "main.subchannels=7",
    ]);
    assert_eq!(answer["main"]["owner"].as_array().unwrap().len(), 7);
    assert_eq!(answer["phases"]["upload_s"].as_array().unwrap().len(), 3);
    let other = json(&["plan", "cell", "--json", "--set", "clients.count=3", "--set", "seed=9"]);
    assert_ne!(other["total_s"], answer["total_s"]);
    let downloads = json(&[
        "plan",
        "cell",
        "--json",
        "--set",
        "download={subchannels=8,bandwidth_hz=1e7,power_total_dbm=43}",
    ]);
    assert_eq!(downloads["download"]["owner"].as_array().unwrap().len(), 8);
}

#[test]
fn people_get_a_table() {
    let path = fixture("scenario.toml");
    let text = stdout(&["plan", text(&path), "--compare", "--seeds", "2"]);
    for part in [
        "3 clients",
        "rank 8",
        "certified:",
        "client 2",
        "main link",
        "dBm",
        "bcd",
        "over 2 seeds",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let broken = file("broken.toml", "seed = 1\n[clients\n");
    let unknown = file("unknown.toml", "[clients]\ncuont = 5\n");
    let kind = file("kind.json", r#"{"main": {"subchannels": "many"}}"#);
    let crowded = file("crowded.toml", "[clients]\ncount = 9\n[main]\nsubchannels = 4\n");
    let rounds = file("rounds.toml", "[training]\nranks = [3]\n");
    let mut instance =
        serde_json::from_str::<Value>(&std::fs::read_to_string(fixture("command.json")).unwrap()).unwrap();
    instance["instances"][1]["snr_per_watt_main"][2][0] = Value::from(-1.0);
    let silent = file("silent.json", &instance.to_string());
    let incomplete = file("incomplete.json", r#"{"instances": [{"name": "half", "K": 2}]}"#);
    let cases: [(&Path, &[&str]); 8] = [
        (&broken, &["broken.toml, line 2", "not valid TOML"]),
        (&unknown, &["unknown.toml", "clients.cuont", "unknown field"]),
        (&kind, &["kind.json", "main.subchannels", "invalid type"]),
        (&crowded, &["crowded.toml", "main link has 4 subchannels for 9 clients"]),
        (&rounds, &["rounds.toml", "rank 3 has no rounds"]),
        (
            &silent,
            &["silent.json, instance selective", "client 2 on the main link", "-1"],
        ),
        (&incomplete, &["incomplete.json, instance half", "missing field"]),
        (
            Path::new("nowhere"),
            &["no file nowhere", "paper, cell, selective, slow-server"],
        ),
    ];
    for (path, parts) in cases {
        let (code, message) = failure(&["plan", text(path)]);
        assert_eq!(code, 1, "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        for part in parts {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    let (code, message) = failure(&["plan", "cell", "--set", "clients.count=five"]);
    assert!(
        code == 1 && message.contains("clients.count: invalid type"),
        "{message}"
    );
    let (code, message) = failure(&["plan", text(&fixture("command.json")), "--instance", "none"]);
    assert!(code == 1 && message.contains("it has flat, selective"), "{message}");
}

#[test]
fn bad_usage_ends_with_2() {
    let instances = fixture("command.json");
    for words in [
        &["plan"][..],
        &["plan", "cell", "--method", "e"],
        &["plan", "cell", "--set", "clients.count"],
        &["plan", "cell", "--method", "bcd", "--per-client-split"],
        &["plan", "cell", "--instance", "flat"],
        &["plan", text(&instances), "--report", "nowhere"],
        &["sweep", "cell"],
        &["sweep", "cell", "--axis", "colour"],
        &["sweep", "cell", "--over", "power=1:2"],
    ] {
        let (code, message) = failure(words);
        assert_eq!(code, 2, "{words:?}: {message}");
        assert!(message.contains("--help"), "{words:?}: {message}");
    }
}

/// That tags are closed in order and no number is none. Enough to notice a picture that a browser would refuse.
fn assert_well_formed(name: &str, text: &str) {
    assert!(!text.contains("NaN") && !text.contains("inf\""), "{name}");
    let mut open: Vec<&str> = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find('<') {
        let tag = &rest[start + 1..];
        let end = tag.find('>').unwrap();
        let (inside, after) = (&tag[..end], &tag[end + 1..]);
        let element = inside
            .split(|c: char| c.is_whitespace() || c == '/')
            .find(|part| !part.is_empty())
            .unwrap();
        match inside {
            inside if inside.starts_with('!') || inside.ends_with('/') || ["meta", "br"].contains(&element) => {}
            inside if inside.starts_with('/') => assert_eq!(open.pop(), Some(element), "{name}"),
            _ => open.push(element),
        }
        rest = after;
    }
    assert_eq!(open, Vec::<&str>::new(), "{name}");
}

/// The report's files, each well-formed.
fn report(words: &[&str]) -> (String, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("report");
    stdout(&[words, &["--quiet", "--report", text(&out)]].concat());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&out).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.ends_with(".csv") {
            assert_well_formed(&name, &std::fs::read_to_string(out.join(&name)).unwrap());
        }
        names.push(name);
    }
    names.sort();
    (std::fs::read_to_string(out.join("index.html")).unwrap(), names)
}

#[test]
fn a_scenarios_report_has_every_picture() {
    let (page, names) = report(&["plan", text(&fixture("scenario.toml")), "--report-seeds", "2"]);
    let expected = [
        "bandwidth.svg",
        "cells.svg",
        "client-speed.svg",
        "clients.svg",
        "curves.csv",
        "delay.svg",
        "federated.svg",
        "gaps.svg",
        "index.html",
        "main.svg",
        "power.svg",
        "server-speed.svg",
    ];
    assert_eq!(names, expected);
    assert_eq!(page.matches("<svg ").count(), 10);
    assert!(!page.contains("Not shown"));
}

#[test]
fn an_instances_report_says_what_it_lacks() {
    let path = fixture("command.json");
    let (page, names) = report(&["plan", text(&path), "--instance", "selective"]);
    assert_eq!(
        names,
        ["cells.svg", "delay.svg", "federated.svg", "index.html", "main.svg"]
    );
    assert!(page.contains("Not shown") && page.contains("bare numbers"));
}

#[test]
fn a_sweep_has_a_row_for_each_point_and_method() {
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (fixture("scenario.toml"), dir.path().join("curves.csv"));
    stdout(&[
        "sweep",
        text(&path),
        "--over",
        "main.bandwidth_hz=1e6:4e6:3:log",
        "--over",
        "clients=2,4",
        "--methods",
        "best,bcd,a",
        "--seeds",
        "2",
        "--out",
        text(&out),
    ]);
    let csv = std::fs::read_to_string(&out).unwrap();
    let mut lines = csv.lines();
    assert_eq!(
        lines.next(),
        Some("axis,value,method,seeds,mean_total_s,std_total_s,mean_gap")
    );
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    let places: Vec<(&str, &str, &str)> = rows.iter().map(|row| (row[0], row[1], row[2])).collect();
    let mut expected = Vec::new();
    for (axis, values) in [
        ("main.bandwidth_hz", &["1000000", "2000000", "4000000"][..]),
        ("clients", &["2", "4"]),
    ] {
        for value in values {
            expected.extend(["best", "bcd", "a"].map(|method| (axis, *value, method)));
        }
    }
    assert_eq!(places, expected);
    let number = |row: &[&str], column: usize| row[column].parse::<f64>().unwrap();
    for three in rows.chunks(3) {
        assert_eq!(three[0][3], "2");
        assert!(number(&three[0], 4) <= number(&three[1], 4) * (1.0 + 1e-9));
        assert!(number(&three[1], 4) <= number(&three[2], 4) * (1.0 + 1e-9));
    }
    assert!(
        number(&rows[0], 4) > number(&rows[6], 4),
        "more bandwidth takes less time"
    );
    // The mean over the draws is the one of plans from these seeds.
    let totals: Vec<f64> = ["5", "6"]
        .map(|seed| {
            let (seed, bandwidth) = (format!("seed={seed}"), "main.bandwidth_hz=2e6");
            json(&["plan", text(&path), "--json", "--set", &seed, "--set", bandwidth])["total_s"]
                .as_f64()
                .unwrap()
        })
        .into();
    let mean = (totals[0] + totals[1]) / 2.0;
    assert!((number(&rows[3], 4) / mean - 1.0).abs() < 1e-12);
}

#[test]
fn a_sweep_to_stdout_refuses_points_that_are_none() {
    let path = fixture("scenario.toml");
    let csv = stdout(&[
        "sweep",
        text(&path),
        "--axis",
        "clients",
        "--methods",
        "bcd",
        "--seeds",
        "1",
        "--quiet",
    ]);
    assert_eq!(csv.lines().count(), 1 + 4, "2 to 5 clients, each count once:\n{csv}");
    let (code, message) = failure(&["sweep", text(&path), "--over", "clients=2,9"]);
    assert_eq!(code, 1);
    assert!(
        message.contains("at clients = 9") && message.contains("main link has 6 subchannels"),
        "{message}"
    );
    let (code, message) = failure(&["sweep", text(&fixture("command.json")), "--axis", "all"]);
    assert!(code == 1 && message.contains("a scenario is needed"), "{message}");
}
