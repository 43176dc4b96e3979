//! What a training on one device goes on from after it was killed, stopped, or had no disk to write to. Real processes.
#![cfg(unix)]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use super::place::{Place, Running, contents, lines, object, told, until};

const STEPS: usize = 24;
/// With a schedule, a shuffle whose epochs end within a batch, and clipping. States are saved after every step.
const BEGIN: &str = "train --device cpu --data @varied.jsonl --valid @varied.jsonl --batch 3 --seq 12 --rank 2 --clip 1 \
                     --schedule linear --seed 5 --steps 24 --save-every 0";

/// Examples that differ.
fn place() -> Place {
    let place = Place::new();
    std::fs::write(place.path("varied.jsonl"), varied(10)).unwrap();
    place
}

fn varied(examples: usize) -> String {
    let example = |index: usize| {
        let ids: Vec<String> = (0..12)
            .map(|position| ((7 * index + 3 * position) % 50 + 1).to_string())
            .collect();
        format!("{{\"input_ids\":[{}]}}\n", ids.join(","))
    };
    (0..examples).map(example).collect()
}

/// Lines of the log without their times.
fn figures(run: &Path) -> Vec<Value> {
    let mut lines = lines(&run.join("metrics.jsonl"));
    for line in &mut lines {
        line.as_object_mut().unwrap().remove("seconds").unwrap();
    }
    lines
}

fn adapter(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap()
}

fn assert_same(run: &Path, whole: &Path, what: &str) {
    assert_eq!(figures(run), figures(whole), "{what}");
    assert!(adapter(run) == adapter(whole), "{what}: the adapters differ");
    let (run, whole) = (object(&run.join("run.json")), object(&whole.join("run.json")));
    for field in ["ended", "valid_before", "valid_after", "configuration"] {
        assert_eq!(run[field], whole[field], "{what}: {field}");
    }
    for field in ["steps", "tokens", "loss", "metrics_lost"] {
        assert_eq!(run["totals"][field], whole["totals"][field], "{what}: {field}");
    }
}

/// An uninterrupted run, to compare with.
fn whole(place: &Place) -> PathBuf {
    let (code, _, said) = place.run(&format!("{BEGIN} --out @whole"));
    assert_eq!(code, Some(0), "{said}");
    let whole = place.path("whole");
    assert_eq!(figures(&whole).len(), STEPS);
    whole
}

fn logged(run: &Path) -> usize {
    let text = std::fs::read(run.join("metrics.jsonl")).unwrap_or_default();
    text.iter().filter(|&&byte| byte == b'\n').count()
}

/// Kills a process once its run has so many lines; 0: at once, whatever there is.
fn kill_at(mut process: Running, run: &Path, lines: usize) {
    until("a line", || logged(run) >= lines);
    process.signal("KILL");
    process.end();
}

/// Goes on with the run, or begins it if it was killed before it was one.
fn go_on(place: &Place, name: &str) -> Command {
    match place.path(name).join("run.json").is_file() {
        true => place.program(&format!("train --resume @{name} --save-every 0")),
        false => place.program(&format!("{BEGIN} --out @{name}")),
    }
}

fn snapshots(run: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(run.join("state")).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "snapshot"));
    paths.sort();
    paths
}

#[test]
fn a_training_that_is_killed_anywhere_ends_as_one_that_is_not() {
    let place = place();
    let whole = whole(&place);
    let mut random = ChaCha8Rng::seed_from_u64(9);
    for round in 0..6 {
        let name = format!("killed-{round}");
        let run = place.path(&name);
        let mut points: Vec<usize> = (0..3).map(|_| random.random_range(0..STEPS)).collect();
        points.sort_unstable();
        for &point in &points {
            kill_at(Running(go_on(&place, &name).spawn().unwrap()), &run, point);
        }
        let (code, _, said) = told(go_on(&place, &name).output().unwrap());
        assert_eq!(code, Some(0), "{said}");
        assert_same(&run, &whole, &format!("killed at {points:?}"));
        assert!(snapshots(&run).len() <= 2);
    }
}

#[test]
fn a_damaged_or_a_missing_state_costs_steps_that_are_taken_again() {
    let place = place();
    let whole = whole(&place);
    type Damage = fn(&[PathBuf]);
    let damages: [(&str, Damage, &str); 4] = [
        (
            "flipped",
            |states| {
                let newest = states.last().unwrap();
                let mut bytes = std::fs::read(newest).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                std::fs::write(newest, bytes).unwrap();
            },
            "is damaged",
        ),
        (
            "short",
            |states| {
                let file = std::fs::File::options().write(true).open(states.last().unwrap());
                file.unwrap().set_len(1000).unwrap();
            },
            "is damaged",
        ),
        // The log is ahead of the state.
        (
            "older",
            |states| std::fs::remove_file(states.last().unwrap()).unwrap(),
            "goes on from step",
        ),
        (
            "none",
            |states| states.iter().for_each(|state| std::fs::write(state, "").unwrap()),
            "goes on from the beginning",
        ),
    ];
    for (name, damage, expected) in damages {
        let run = place.path(name);
        let process = Running(place.program(&format!("{BEGIN} --out @{name}")).spawn().unwrap());
        kill_at(process, &run, 8);
        damage(&snapshots(&run));
        let (code, _, said) = told(go_on(&place, name).output().unwrap());
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains(expected), "{name}: {said}");
        assert_same(&run, &whole, name);
    }
}

#[test]
fn a_request_to_end_saves_the_state_and_says_how_to_go_on() {
    let place = place();
    let whole = whole(&place);
    for (name, more) in [("stopped", ""), ("told", " --json")] {
        let run = place.path(name);
        // No state is saved but the one at the end.
        let words = format!("{BEGIN} --out @{name}{more}").replace("--save-every 0", "");
        let mut process = Running(place.program(&words).spawn().unwrap());
        until("a step", || logged(&run) > 0);
        process.signal("INT");
        let mut out = String::new();
        process.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        process.0.stderr.take().unwrap().read_to_string(&mut out).unwrap();
        assert_eq!(process.end().code(), Some(0), "{out}");
        if object(&run.join("run.json"))["ended"] == "completed" {
            continue; // It was faster than the request.
        }
        assert!(
            out.contains(&format!("sflllm train --resume {}", run.display())),
            "{out}"
        );
        assert_eq!(snapshots(&run).len(), 1);
        let taken = figures(&run).len();
        // From another place, with paths that were relative to none.
        let mut command = place.program(&format!("train --resume {name}"));
        let (code, _, said) = told(command.current_dir(place.0.path()).output().unwrap());
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains(&format!("goes on from step {taken}")), "{said}");
        assert_same(&run, &whole, name);
    }
}

#[test]
fn paths_given_from_one_directory_are_found_from_another() {
    let place = place();
    let words = "train --device cpu --data varied.jsonl --batch 3 --seq 12 --rank 2 --steps 2 --out run";
    let (code, _, said) = told(place.program(words).current_dir(place.0.path()).output().unwrap());
    assert_eq!(code, Some(0), "{said}");
    let (code, _, said) = place.run("train --resume @run --steps 4");
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(figures(&place.path("run")).len(), 4);
}

#[test]
fn options_that_contradict_the_run_are_refused_by_name_and_change_nothing() {
    let place = place();
    std::fs::write(place.path("other.jsonl"), varied(9)).unwrap();
    let run = place.path("run");
    let process = Running(place.program(&format!("{BEGIN} --out @run")).spawn().unwrap());
    kill_at(process, &run, 6);
    // The lock that a killed process leaves goes with the next claim.
    std::fs::remove_file(run.join(".lock")).unwrap();
    let before = contents(&run);
    for (words, named) in [
        ("--lr 0.5", "--lr 0.5 contradicts"),
        (
            "--rank 3",
            "--rank 3 contradicts the run, which was begun with --rank 2",
        ),
        ("--no-shuffle", "--no-shuffle contradicts"),
        ("--seed 6", "with --seed 5"),
        ("--model @none", "begun with --model demo"),
        (
            "--data @other.jsonl",
            "what --data says is not what the run was begun with",
        ),
        ("--valid @other.jsonl", "what --valid says is not what"),
        ("--steps 1", "say a later end with --steps"),
    ] {
        let (code, _, said) = place.run(&format!("train --resume @run {words}"));
        assert_eq!(code, Some(1), "{words}: {said}");
        assert!(said.contains(named), "{words}: {said}");
        assert!(contents(&run) == before, "{words} has changed something");
    }
    let (code, _, said) = place.run("train --resume @run --out @other");
    assert_eq!(code, Some(2), "{said}");
    let (code, _, said) = place.run(&format!("{BEGIN} --out @run"));
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("give another --out") && said.contains("--resume"),
        "{said}"
    );
    assert!(contents(&run) == before);
    // The same options again are none that contradict, and data may have been moved.
    std::fs::rename(place.path("varied.jsonl"), place.path("moved.jsonl")).unwrap();
    let words = "train --resume @run --rank 2 --batch 3 --data @moved.jsonl --valid @moved.jsonl";
    let (code, _, said) = place.run(words);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(figures(&run).len(), STEPS);
}

#[test]
fn what_is_no_run_of_this_command_is_not_gone_on_with() {
    let place = place();
    let none = place.path("none");
    let (code, _, said) = place.run("train --resume @none");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("holds no run that could go on: begin one with --out"),
        "{said}"
    );
    assert!(!none.exists());
    std::fs::create_dir(&none).unwrap();
    for (text, expected) in [
        ("{", "run.json is damaged"),
        ("[]", "run.json is damaged"),
        ("{}", "was not begun by `sflllm train`"),
        ("{\"command\":\"train\"}", "with which options"),
        (
            "{\"command\":\"train\",\"options\":{\"nonsense\":\"1\"}}",
            "none of this version",
        ),
        (
            "{\"command\":\"train\",\"options\":{\"batch\":\"four\"}}",
            "none of this version",
        ),
        (
            "{\"command\":\"train\",\"options\":{\"batch\":4}}",
            "--batch is no text",
        ),
        ("{\"command\":\"train\",\"options\":{}}", "--data FILE is needed"),
    ] {
        std::fs::write(none.join("run.json"), text).unwrap();
        let (code, _, said) = place.run("train --resume @none");
        assert_eq!(code, Some(1), "{text}: {said}");
        assert!(said.contains(expected), "{text}: {said}");
        assert_eq!(std::fs::read_to_string(none.join("run.json")).unwrap(), text);
    }
}

#[test]
fn a_finished_training_is_complete_until_it_is_asked_for_more() {
    let place = place();
    let whole = whole(&place);
    let before = contents(&whole);
    for words in ["", "--steps 24"] {
        let (code, said, _) = place.run(&format!("train --resume @whole {words}"));
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("is complete after 24 steps"), "{said}");
        assert!(contents(&whole) == before, "{words} has changed something");
    }
    let (code, said, _) = place.run("train --resume @whole --json");
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &told["ended"]), (Some(0), &Value::from("completed")));

    let first = figures(&whole);
    let (code, _, said) = place.run("train --resume @whole --steps 30");
    assert_eq!(code, Some(0), "{said}");
    let longer = figures(&whole);
    assert_eq!((&longer[..STEPS], longer.len()), (&first[..], 30));
    let run = object(&whole.join("run.json"));
    assert_eq!(
        (&run["totals"]["steps"], &run["ended"]),
        (&Value::from(30), &Value::from("completed"))
    );
    assert_eq!(run["resumed"][0]["from"], 24);
    // The later end is the run's own from then on.
    let (_, said, _) = place.run("train --resume @whole");
    assert!(said.contains("is complete after 30 steps"), "{said}");
}

#[test]
fn a_training_that_goes_on_is_not_gone_on_with_by_another() {
    let place = place();
    let run = place.path("run");
    let words = format!("{BEGIN} --out @run").replace("--steps 24", "--steps 10000000");
    let mut process = Running(place.program(&words).spawn().unwrap());
    until("a step", || logged(&run) > 0);
    let (code, _, said) = place.run("train --resume @run");
    assert_eq!(code, Some(1), "{said}");
    let named = format!("another sflllm (process {}", process.0.id());
    assert!(said.contains(&named), "{said}");
    process.signal("TERM");
    assert_eq!(process.end().code(), Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_full_for_the_state_costs_states_and_not_the_run() {
    let place = place();
    let run = place.path("run");
    let words = format!("{BEGIN} --out @run").replace("--steps 24", "--steps 10000000");
    // No file may have more than 4 KiB: too little for a state.
    let mut limited = Command::new("bash");
    limited.args(["-c", "trap '' XFSZ; ulimit -S -f 4; exec \"$@\"", "limited"]);
    limited.arg(env!("CARGO_BIN_EXE_sflllm"));
    place.arguments(&mut limited, &words);
    let mut process = Running(limited.spawn().unwrap());
    until("a step", || logged(&run) > 2);
    assert!(run.join("state").is_dir() && snapshots(&run).is_empty());
    let room = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    let id = libc::pid_t::try_from(process.0.id()).unwrap();
    // SAFETY: it reads `room` and writes nothing of ours.
    let raised = unsafe { libc::prlimit(id, libc::RLIMIT_FSIZE, &room, std::ptr::null_mut()) };
    assert_eq!(raised, 0);
    until("a state", || !snapshots(&run).is_empty());
    process.signal("INT");
    let mut said = String::new();
    process.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(process.end().code(), Some(0), "{said}");
    assert_eq!(said.matches("the run's state cannot be saved").count(), 1, "{said}");
    assert_eq!(said.matches("the run's state is saved again").count(), 1, "{said}");
    // Nothing of the writes that failed is left.
    let left = std::fs::read_dir(run.join("state")).unwrap().count();
    assert_eq!(left, snapshots(&run).len());
}
