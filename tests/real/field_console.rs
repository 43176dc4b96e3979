//! What a run survives, and what its words are: readers that go away, full disks, requests to end, a second start in the same
//! place, wrong addresses. Real processes of this program. Each claim holds off a fault that users of other programs met.
#![cfg(unix)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sflllm::data::Tokenizer;
use sflllm::model::architecture::Architecture;
use sflllm::model::rounds::RoundsTable;

use super::place::{
    Place, Running, SMALL_RUN, Serving, TRAIN, contents, gone, has_adapter, lines, object, told, until,
};

// rigelminer/rigel#33, andrewchambers/bupstash#65: a message that cannot be written ends the program.

#[test]
fn a_stderr_that_nobody_reads_does_not_end_a_run() {
    let place = Place::new();
    let status = place.program(&format!("{TRAIN} --steps 5")).stderr(gone()).status();
    assert!(status.unwrap().success() && has_adapter(&place.path("run")));

    // A server whose reader leaves after its first line, and a client that never had one.
    let place = Place::new();
    let Serving {
        mut process,
        url,
        stderr,
    } = place.serve(3, "@run");
    drop(stderr);
    let join = format!("join {url} --device cpu --data @data.jsonl");
    let status = place.program(&join).stderr(gone()).stdout(gone()).status().unwrap();
    assert!(status.success());
    assert!(process.end().success() && has_adapter(&place.path("run")));
}

#[test]
fn a_stderr_that_is_no_longer_read_does_not_stop_a_run() {
    let place = Place::new();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut fill = writer.try_clone().unwrap();
    // As full as a pipe gets: the writing blocks, until the end of the test. Nothing tells that it blocks, so it gets time to.
    let filler = std::thread::spawn(move || fill.write_all(&vec![b'x'; 1 << 21]));
    std::thread::sleep(Duration::from_millis(300));
    let mut process = Running(
        place
            .program(&format!("{TRAIN} --steps 5"))
            .stderr(writer)
            .spawn()
            .unwrap(),
    );
    assert!(process.end().success() && has_adapter(&place.path("run")));
    std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    filler.join().unwrap().unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_log_on_a_full_disk_does_not_end_a_run() {
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let place = Place::new();
    let mut train = place.program(&format!("{TRAIN} --steps 3"));
    let status = train.stderr(full()).stdout(full()).status().unwrap();
    assert!(status.success() && has_adapter(&place.path("run")));

    // A result that was asked for by name and cannot be had is an error; the work is kept all the same.
    let place = Place::new();
    let mut train = place.program(&format!("{TRAIN} --steps 3 --json --quiet"));
    let (code, _, said) = told(train.stdout(full()).output().unwrap());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("stdout") && said.contains("the adapter is in"), "{said}");
    assert!(has_adapter(&place.path("run")));
    let mut eval = place.program("eval --device cpu --data @data.jsonl --json --quiet");
    let (code, _, said) = told(eval.stdout(full()).output().unwrap());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cannot write to stdout"), "{said}");
}

// astral-sh/ruff#12610: a pipe into `head` ends in a panic.
#[test]
fn a_result_that_nobody_reads_ends_quietly() {
    let place = Place::new();
    std::fs::write(place.path("ids.txt"), "").unwrap();
    for words in [
        "eval --device cpu --data @data.jsonl --json --quiet",
        "eval --device cpu --data @data.jsonl --quiet",
        "generate --device cpu --prompt name --max-tokens 200",
        "generate --device cpu --prompt name --max-tokens 2 --json",
        "plan cell --json --quiet",
        "sweep cell --axis power --seeds 1 --methods a --quiet",
        "doctor",
        "bench --device cpu --filter gelu --quiet",
    ] {
        let (code, _, said) = told(place.program(words).stdout(gone()).output().unwrap());
        assert_eq!((code, said.as_str()), (Some(141), ""), "{words}");
    }
    // What is kept in files was done, and is well.
    for (words, kept) in [
        (format!("{TRAIN} --steps 3 --json"), "run/adapter/adapter_config.json"),
        (
            "calibrate --device cpu --data @data.jsonl --valid @data.jsonl --seq 12 --ranks 1 --seeds 1 --max-rounds 1 \
             --local-steps 1 --target-loss 0.5 --out @rounds.json"
                .to_owned(),
            "rounds.json",
        ),
        ("plan cell --report @report --report-seeds 1".to_owned(), "report/index.html"),
    ] {
        let (code, _, said) = told(place.program(&words).stdout(gone()).output().unwrap());
        let quietly = if words.starts_with("plan") { 141 } else { 0 };
        assert_eq!(code, Some(quietly), "{words}: {said}");
        assert!(place.path(kept).is_file() && !said.contains("error"), "{words}: {said}");
    }
}

#[test]
fn a_disk_that_is_full_for_the_metrics_costs_lines_and_not_the_run() {
    let place = Place::new();
    // No file may have more than 16 KiB: enough for the adapter, and for half of the metrics.
    let mut limited = Command::new("bash");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$@\"", "limited"]);
    limited.arg(env!("CARGO_BIN_EXE_sflllm"));
    place.arguments(&mut limited, &format!("{TRAIN} --targets c_attn --steps 400"));
    let (code, _, said) = told(limited.output().unwrap());
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(said.matches("metrics.jsonl cannot be written").count(), 1, "{said}");
    let run = place.path("run");
    let lost = object(&run.join("run.json"))["totals"]["metrics_lost"]
        .as_u64()
        .unwrap();
    assert!(lost > 0 && has_adapter(&run));
    assert_eq!(lines(&run.join("metrics.jsonl")).len() as u64 + lost, 400);
}

#[test]
fn an_adapter_that_cannot_be_saved_is_tried_again_and_at_last_put_elsewhere() {
    let place = Place::new();
    let mut serving = place.serve(3, "@run");
    // In the way of the directory.
    let obstacle = place.path("run/adapter");
    std::fs::write(&obstacle, "").unwrap();
    let join = format!("join {} --device cpu --data @data.jsonl --quiet", serving.url);
    let (code, _, said) = place.run(&join);
    assert_eq!(code, Some(0), "{said}");
    let code = serving.process.end().code();
    let (_, said) = serving.end();
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(said.matches("the adapter is tried again").count(), 1, "{said}");
    let (_, elsewhere) = said.rsplit_once("; the adapter is in ").unwrap();
    let elsewhere = PathBuf::from(elsewhere.trim().strip_suffix(" instead").unwrap());
    assert!(elsewhere.starts_with(place.path("home")) && elsewhere.join("adapter_model.safetensors").is_file());
    assert_eq!(object(&place.path("run/run.json"))["totals"]["rounds"], 3);

    // With the obstacle out of the way in time, nothing is missing in the end.
    let place = Place::new();
    let serving = place.serve(100_000, "@run");
    let obstacle = place.path("run/adapter");
    std::fs::write(&obstacle, "").unwrap();
    let join = format!("join {} --device cpu --data @data.jsonl --quiet", serving.url);
    let _client = Running(place.program(&join).spawn().unwrap());
    until("a round", || place.path("run/state/progress.json").is_file());
    std::fs::remove_file(&obstacle).unwrap();
    until("an adapter", || has_adapter(&place.path("run")));
    serving.process.signal("TERM");
    let (code, said) = serving.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the adapter is tried again"), "{said}");
}

// oobabooga/textgen#2902, hiyouga/LlamaFactory#4612: the second run replaces the first.

#[test]
fn what_is_finished_is_not_overwritten() {
    let place = Place::new();
    for words in [
        format!("{TRAIN} --steps 3"),
        "sweep cell --over clients=2 --methods a --seeds 1 --out @curves.csv".to_owned(),
        "plan cell --report @report --report-seeds 1".to_owned(),
    ] {
        let (code, _, said) = place.run(&words);
        assert_eq!(code, Some(0), "{said}");
    }
    let serving = place.serve(3, "@served");
    let join = format!(
        "join {} --device cpu --data @data.jsonl --adapter-out @kept",
        serving.url
    );
    let (code, _, said) = place.run(&join);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(serving.end().0, Some(0));

    let before = contents(place.0.path());
    for (words, option) in [
        (format!("{TRAIN} --steps 1"), "--out"),
        // Also where the start would fail later, for want of a model.
        (format!("{TRAIN} --steps 1 --model @none"), "--out"),
        (
            format!("serve --device cpu --listen http://127.0.0.1:0 {SMALL_RUN} --out @run"),
            "--out",
        ),
        (
            "serve --role federated --listen http://127.0.0.1:0 --out @served".to_owned(),
            "--out",
        ),
        (
            "demo --device cpu --listen http://127.0.0.1:0 --out @served".to_owned(),
            "--out",
        ),
        (join, "--adapter-out"),
        (
            "sweep cell --over clients=2 --methods a --seeds 1 --out @curves.csv".to_owned(),
            "--out",
        ),
        ("plan cell --report @report --report-seeds 1".to_owned(), "--report"),
    ] {
        let (code, _, said) = place.run(&words);
        assert_eq!(code, Some(1), "{words}: {said}");
        let advice = format!("give another {option}");
        assert!(said.starts_with("error: ") && said.contains(&advice), "{words}: {said}");
        assert!(contents(place.0.path()) == before, "{words} has changed something");
    }
}

#[test]
fn a_run_that_goes_on_has_its_directory_to_itself() {
    let place = Place::new();
    let serving = place.serve(3, "@run");
    for words in [
        format!("{TRAIN} --steps 1"),
        format!("serve --device cpu --listen http://127.0.0.1:0 {SMALL_RUN} --out @run"),
    ] {
        let (code, _, said) = place.run(&words);
        assert_eq!(code, Some(1), "{said}");
        let named = format!("another sflllm (process {}", serving.process.0.id());
        assert!(said.contains(&named) && said.contains("is writing to"), "{said}");
    }
    let join = format!("join {} --device cpu --data @data.jsonl --quiet", serving.url);
    assert_eq!(place.run(&join).0, Some(0));
    assert_eq!(serving.end().0, Some(0));
    assert_eq!(object(&place.path("run/run.json"))["ended"], "completed");
    let hidden = contents(&place.path("run"));
    assert!(
        hidden.keys().all(|path| !path.ends_with(".lock")),
        "{:?}",
        hidden.keys()
    );
}

#[test]
fn a_start_that_fails_leaves_nothing_and_can_be_repeated() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for words in [
        format!("serve --device cpu --listen http://127.0.0.1:{port} {SMALL_RUN} --out @run"),
        format!("{TRAIN} --steps 1 --data @missing.txt").replace("--data @data.jsonl", ""),
        format!("{TRAIN} --steps 1 --device nonesuch").replace("--device cpu", ""),
    ] {
        let (code, _, said) = place.run(&words);
        assert_eq!(code, Some(1), "{said}");
        assert!(!place.path("run").exists(), "{words}");
    }
    let (code, _, said) = place.run(&format!("{TRAIN} --steps 1"));
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn runs_without_a_name_go_beside_each_other() {
    let place = Place::new();
    let words = TRAIN.replace("--out @run", "--steps 1");
    for _ in 0..3 {
        let mut command = place.program(&words);
        assert!(command.current_dir(place.0.path()).status().unwrap().success());
    }
    let runs = std::fs::read_dir(place.path("runs")).unwrap().count();
    assert_eq!(runs, 3);
}

// A terminal that closes, a service manager that stops its services: what was trained is saved.

/// A program that is started without minding a hangup (`nohup`) does not mind it, and what it starts neither.
#[expect(clippy::print_stderr, reason = "the test harness takes it")]
fn requests_to_end() -> Vec<&'static str> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let mut signals = vec!["INT", "TERM"];
    if ignored.is_some_and(|mask| mask & 1 == 1) {
        eprintln!("NOT TESTED WITH A HANGUP: these tests were started not to mind one");
    } else {
        signals.push("HUP");
    }
    signals
}

#[test]
fn every_request_to_end_saves_what_was_trained() {
    for signal in requests_to_end() {
        let place = Place::new();
        let mut train = Running(place.program(&format!("{TRAIN} --steps 10000000")).spawn().unwrap());
        let metrics = place.path("run/metrics.jsonl");
        until("a step", || {
            std::fs::metadata(&metrics).is_ok_and(|file| file.len() > 0)
        });
        train.signal(signal);
        assert_eq!(train.end().code(), Some(0), "{signal}");
        let run = object(&place.path("run/run.json"));
        assert_eq!(run["ended"], "stopped", "{signal}");
        assert!(run["totals"]["steps"].as_u64().unwrap() > 0 && has_adapter(&place.path("run")));

        let place = Place::new();
        let serving = place.serve(100_000, "@run");
        let join = format!(
            "join {} --device cpu --data @data.jsonl --adapter-out @kept",
            serving.url
        );
        let mut client = Running(place.program(&join).spawn().unwrap());
        until("a round", || place.path("run/state/progress.json").is_file());
        client.signal(signal);
        assert_eq!(client.end().code(), Some(0), "{signal}");
        assert!(place.path("kept/adapter_model.safetensors").is_file());
        serving.process.signal(signal);
        let (code, said) = serving.end();
        assert_eq!(code, Some(0), "{signal}: {said}");
        assert!(has_adapter(&place.path("run")));
    }
}

#[test]
fn a_calibration_that_is_asked_to_end_keeps_its_finished_runs() {
    let place = Place::new();
    let words = "calibrate --device cpu --data @data.jsonl --valid @data.jsonl --seq 12 --ranks 1 --seeds 1000 \
                 --max-rounds 2 --local-steps 1 --target-loss 0.5 --out @tables/rounds.json";
    let out = place.path("tables/rounds.json");
    let mut process = Running(place.program(words).spawn().unwrap());
    let runs = || RoundsTable::load(&out).map_or(0, |table| table.losses[0].len());
    until("a finished run", || runs() > 0);
    // While it goes on, nobody else writes there.
    let (code, _, said) = place.run(words);
    assert_eq!(code, Some(1), "{said}");
    let named = format!("another sflllm (process {}", process.0.id());
    assert!(said.contains(&named), "{said}");
    process.signal("TERM");
    assert_eq!(process.end().code(), Some(0));
    assert!(runs() > 0 && !RoundsTable::load(&out).unwrap().complete);
}

#[test]
fn a_run_under_nohup_outlives_its_terminal() {
    let place = Place::new();
    let mut command = Command::new("bash");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "nohup"]);
    command.arg(env!("CARGO_BIN_EXE_sflllm"));
    place.arguments(&mut command, &format!("{TRAIN} --steps 10000000"));
    let mut train = Running(command.spawn().unwrap());
    let metrics = place.path("run/metrics.jsonl");
    let written = || std::fs::metadata(&metrics).map_or(0, |file| file.len());
    until("a step", || written() > 0);
    train.signal("HUP");
    // Nothing tells that a signal was ignored: one that ends the process has ended it by then.
    std::thread::sleep(Duration::from_millis(300));
    let then = written();
    until("another step", || written() > then);
    assert_eq!(train.0.try_wait().unwrap(), None);
    train.signal("TERM");
    assert_eq!(train.end().code(), Some(0));
}

#[test]
fn a_second_request_ends_at_once() {
    let place = Place::new();
    let line = format!("{{\"input_ids\":{:?}}}\n", [1; 256]);
    std::fs::write(place.path("long.jsonl"), line.repeat(256)).unwrap();
    let words = "train --device cpu --data @long.jsonl --batch 256 --seq 256 --steps 1000 --out @run";
    let mut train = Running(place.program(words).spawn().unwrap());
    until("a run", || place.path("run/run.json").is_file());
    // In the middle of a step, which takes long.
    std::thread::sleep(Duration::from_millis(200));
    train.signal("INT");
    // Two that wait together would be delivered as one.
    std::thread::sleep(Duration::from_millis(200));
    train.signal("INT");
    assert_eq!(train.end().code(), Some(130));
}

// Words.

/// The reasons of the operating system and of JSON, each of which is to be said once.
fn said_twice(text: &str) -> bool {
    let mut reasons: Vec<&str> = text
        .match_indices("(os error ")
        .map(|(at, _)| text[at..].split(')').next().unwrap())
        .collect();
    reasons.extend(
        text.match_indices(" at line ")
            .map(|(at, _)| text[at..].split([':', ';', '\n']).next().unwrap()),
    );
    let all = reasons.len();
    reasons.sort_unstable();
    reasons.dedup();
    reasons.len() < all
}

#[test]
fn every_error_is_one_sentence_that_says_its_cause_once() {
    let place = Place::new();
    std::fs::create_dir_all(place.path("empty")).unwrap();
    std::fs::create_dir_all(place.path("broken")).unwrap();
    for (name, text) in [
        ("broken/config.json", "{\"n_layer\": }"),
        ("broken/adapter_config.json", "{\"r\": }"),
        ("broken.json", "{\"a\": }"),
        ("broken.toml", "a = = 1"),
        (
            "bad_model.toml",
            "preset = \"cell\"\n[training]\nrounds_file = \"missing.json\"",
        ),
    ] {
        std::fs::write(place.path(name), text).unwrap();
    }
    let data = "--device cpu --data @data.jsonl";
    for words in [
        "eval --device cpu --data @missing.txt",
        &format!("eval {data} --model @empty"),
        &format!("eval {data} --model @broken"),
        &format!("eval {data} --model @missing"),
        &format!("eval {data} --adapter @missing"),
        &format!("eval {data} --adapter @broken"),
        "train --device cpu --data @missing.txt --steps 1 --out @run",
        &format!("train {data} --steps 1 --out /proc/none"),
        "serve --device cpu --listen http://127.0.0.1:0 --out /proc/none",
        "serve --device cpu --listen http://127.0.0.1:0 --valid @missing.txt --out @run",
        "serve --device cpu --listen http://127.0.0.1:0 --calibration @missing.json --out @run",
        "serve --device cpu --listen http://127.0.0.1:0 --calibration @broken.json --out @run",
        "serve --device cpu --listen http://127.0.0.1:0 --scenario @broken.toml --out @run",
        "join http://127.0.0.1:1 --device cpu --data @missing.txt",
        "join https://127.0.0.1:1 --device cpu --data @data.jsonl --ca @missing.pem",
        &format!("join http://127.0.0.1:1 {data} --adapter-out /proc/none"),
        "plan @missing.toml",
        "plan @broken.toml",
        "plan @broken.json",
        "plan @bad_model.toml",
        "plan cell --report /proc/none",
        "sweep cell --over clients=2 --methods a --seeds 1 --out /proc/none/a.csv",
        "calibrate --device cpu --out /proc/none/rounds.json",
        "calibrate --device cpu --out @broken.json",
    ] {
        let (code, _, said) = place.run(words);
        assert_eq!(code, Some(1), "{words}: {said}");
        let error = said.lines().find(|line| line.starts_with("error: "));
        let error = error.unwrap_or_else(|| panic!("{words}: {said}"));
        assert!(!said_twice(error), "{words}: {error}");
        assert!(!place.path("run").exists(), "{words}");
    }
}

/// An error whose text has its cause in it must not give that cause as its source as well: whoever prints the chain says it
/// twice. `r#source` is a field that thiserror does not take for one.
#[test]
fn an_error_that_says_its_cause_does_not_pass_it_on() {
    fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => sources(&path, found),
                false if path.extension().is_some_and(|extension| extension == "rs") => found.push(path),
                false => {}
            }
        }
    }
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    let mut seen = 0;
    for file in files {
        let code = std::fs::read_to_string(&file).unwrap();
        let mut rest = code.as_str();
        while let Some(at) = rest.find("#[error(") {
            rest = &rest[at + "#[error(".len()..];
            let end = rest.find(")]").unwrap();
            let (message, after) = (&rest[..end], &rest[end..]);
            let variant = &after[..after.find("#[error(").unwrap_or(after.len())];
            // To the end of the enum at most.
            let variant = variant.split("\n}").next().unwrap();
            let passes = variant.contains("#[from]") || variant.contains("#[source]") || variant.contains(" source: ");
            let says = message.contains("{0") || message.contains("{source") || message.contains(".0");
            assert!(!(says && passes), "{}: `{message}` says its source", file.display());
            seen += 1;
        }
    }
    assert!(seen > 100, "only {seen} errors were found");
}

// A text that an editor has saved with a byte order mark.
#[test]
fn a_byte_order_mark_before_json_is_no_fault() {
    let marked = |text: &str| format!("\u{feff}{text}");
    let config = include_str!("../../assets/demo/config.json");
    assert_eq!(
        Architecture::from_json(&marked(config)).unwrap(),
        Architecture::from_json(config).unwrap()
    );
    let tokenizer = include_str!("../../assets/demo/tokenizer.json");
    let plain = Tokenizer::from_json(tokenizer.as_bytes(), None).unwrap();
    // What clients get is the same file.
    assert_eq!(
        Tokenizer::from_json(marked(tokenizer).as_bytes(), None)
            .unwrap()
            .digest(),
        plain.digest()
    );
    assert!(RoundsTable::from_json(&marked(r#"{"schema":1,"ranks":[1],"rounds":[30]}"#)).is_ok());

    let place = Place::new();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt2_peft/narrow");
    for (from, to) in [(fixture.join("model"), "model"), (fixture.join("adapter"), "adapter")] {
        std::fs::create_dir(place.path(to)).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            if path.extension().is_some_and(|extension| extension == "json") {
                bytes.splice(0..0, "\u{feff}".bytes());
            }
            std::fs::write(place.path(to).join(path.file_name().unwrap()), bytes).unwrap();
        }
    }
    std::fs::copy(fixture.join("data.jsonl"), place.path("examples.jsonl")).unwrap();
    let (code, _, said) = place.run("eval --device cpu --model @model --adapter @adapter --data @examples.jsonl");
    assert_eq!(code, Some(0), "{said}");
    std::fs::write(place.path("marked.toml"), marked("preset = \"cell\"\n")).unwrap();
    let (code, _, said) = place.run("plan @marked.toml --method a");
    assert_eq!(code, Some(0), "{said}");
}

// openssl/openssl#27293, tlsnotary/tlsn#776: "wrong version number", "corrupt message".

fn join(place: &Place, url: &str) -> (Option<i32>, String) {
    let words = format!("join {url} --device cpu --data @data.jsonl --insecure-tls --quiet");
    let (code, _, said) = place.run(&words);
    (code, said)
}

#[test]
fn the_other_scheme_is_named_where_it_answers() {
    let place = Place::new();
    let secure = format!("serve --device cpu --listen https://127.0.0.1:0 --token sesame {SMALL_RUN} --out @run");
    let serving = Serving::start(place.program(&secure));
    for scheme in ["http", "ws"] {
        let (code, said) = join(&place, &format!("{scheme}://127.0.0.1:{}", serving.port()));
        assert_eq!(code, Some(1), "{said}");
        assert!(
            said.contains(&format!("use https://127.0.0.1:{}", serving.port())),
            "{said}"
        );
    }
    serving.process.signal("TERM");
    assert_eq!(serving.end().0, Some(0));

    let place = Place::new();
    let serving = place.serve(3, "@run");
    for scheme in ["https", "wss"] {
        let (code, said) = join(&place, &format!("{scheme}://127.0.0.1:{}", serving.port()));
        assert_eq!(code, Some(1), "{said}");
        assert!(
            said.contains(&format!("use http://127.0.0.1:{}", serving.port())),
            "{said}"
        );
    }
    // The scheme of the socket itself is as good as that of the page.
    let (code, said) = join(&place, &format!("ws://127.0.0.1:{}/", serving.port()));
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(serving.end().0, Some(0));
}

#[test]
fn a_federated_server_sends_clients_to_the_main_one() {
    let place = Place::new();
    let words = "serve --role federated --listen http://127.0.0.1:0 --out @run";
    let serving = Serving::start(place.program(words));
    let (code, said) = join(&place, &serving.url);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("is no main server"), "{said}");
    serving.process.signal("TERM");
    assert_eq!(serving.end().0, Some(0));
}

/// A server that says `answer` to whoever connects, once they have said something.
fn stranger(answer: &'static str, speaks_first: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let talk = move |mut stream: TcpStream| {
        let mut asked = [0; 4096];
        // Whoever asks may be gone before it is answered.
        if speaks_first || stream.read(&mut asked).is_ok() {
            let _ = stream.write_all(answer.as_bytes());
        }
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || talk(stream));
        }
    });
    port
}

#[test]
fn another_program_at_the_address_is_told_from_an_sflllm_server() {
    let place = Place::new();
    let page = "HTTP/1.1 404 Not Found\r\nServer: pages/1.0\r\nContent-Length: 15\r\n\r\n<html>no</html>";
    let port = stranger(page, false);
    for scheme in ["http", "https"] {
        let (code, said) = join(&place, &format!("{scheme}://127.0.0.1:{port}"));
        assert_eq!(code, Some(1), "{said}");
        assert!(
            said.contains("no sflllm server") && said.contains("pages/1.0"),
            "{said}"
        );
        assert!(!said.contains("<html>") && said.lines().count() == 1, "{said}");
    }
    let moved = "HTTP/1.1 301 Moved\r\nLocation: https://elsewhere.example/\r\nContent-Length: 0\r\n\r\n";
    let (code, said) = join(&place, &format!("http://127.0.0.1:{}", stranger(moved, false)));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("https://elsewhere.example/"), "{said}");
    for (answer, speaks_first) in [("SSH-2.0-OpenSSH_9.9\r\n", true), ("+PONG\r\n", false)] {
        for scheme in ["http", "https"] {
            let (code, said) = join(
                &place,
                &format!("{scheme}://127.0.0.1:{}", stranger(answer, speaks_first)),
            );
            assert_eq!(code, Some(1), "{said}");
            assert!(said.contains("no sflllm server"), "{scheme} {answer}: {said}");
        }
    }
    // Another program's WebSocket: it says yes to everything.
    let yes = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
               Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n";
    let (code, said) = join(&place, &format!("http://127.0.0.1:{}", stranger(yes, false)));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("no sflllm server"), "{said}");
}

#[test]
fn an_address_that_is_none_is_answered_with_one_that_is() {
    let place = Place::new();
    for (url, like) in [
        ("127.0.0.1:8443", "https://127.0.0.1:8443"),
        ("localhost:8443", "https://localhost:8443"),
        ("gpu-box:8443/?join=1#t=abc", "https://gpu-box:8443"),
        ("https://127.0.0.1:8443/main", "write it like https://127.0.0.1:8443"),
        (
            "https://127.0.0.1:8443/sflllm/?join=1#t=abc",
            "write it like https://127.0.0.1:8443",
        ),
        ("ftp://127.0.0.1:8443", "https://"),
        ("https://", "https://192.168.1.20:8443"),
        ("https://127.0.0.1:99999", "https://192.168.1.20:8443"),
    ] {
        let (code, said) = join(&place, url);
        assert_eq!(code, Some(2), "{url}: {said}");
        assert!(said.contains(like), "{url}: {said}");
    }
    let (code, said) = join(&place, "https://no-such-host.invalid:8443");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("no-such-host.invalid") && said.contains("spelled"),
        "{said}"
    );
}
