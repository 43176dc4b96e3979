//! Real processes of this program in a directory of their own, and what they leave there.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sflllm::model::adapter::Adapter;
use sflllm::model::architecture::Architecture;

pub use super::running::Running;

/// Generous: a machine may be slow. Nothing is asserted about time but where a process must end at once.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A directory with a small data file, and the program with its home there.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let line = "{\"input_ids\":[1,2,3,4,5,6,7,8,9,10,11,12]}\n";
        std::fs::write(place.path("data.jsonl"), line.repeat(8)).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Words that begin with `@` are paths in this directory.
    pub fn program(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sflllm"));
        self.arguments(&mut command, words);
        command
    }

    pub fn arguments(&self, command: &mut Command, words: &str) {
        for word in words.split_whitespace() {
            match word.strip_prefix('@') {
                Some(name) => command.arg(self.path(name)),
                None => command.arg(word),
            };
        }
        command
            .env("SFLLLM_HOME", self.path("home"))
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
    }

    /// Runs to the end: status, stdout, stderr.
    pub fn run(&self, words: &str) -> (Option<i32>, String, String) {
        told(self.program(words).output().unwrap())
    }

    pub fn serve(&self, rounds: u32, out: &str) -> Serving {
        let words = format!("serve --device cpu --listen http://127.0.0.1:0 {SMALL_RUN} --rounds {rounds} --out {out}");
        Serving::start(self.program(&words))
    }
}

pub const TRAIN: &str = "train --device cpu --data @data.jsonl --batch 1 --seq 12 --rank 1 --out @run";
pub const SMALL_RUN: &str = "--clients 1 --local-steps 3 --batch 2 --seq 12 --split 1 --rank 1 --wait 5";

pub fn told(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// A pipe that nobody reads from.
pub fn gone() -> Stdio {
    std::io::pipe().unwrap().1.into()
}

impl Running {
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args(["-s", name, &self.0.id().to_string()])
            .status();
        assert!(status.unwrap().success());
    }

    /// Waits for the end, which std cannot with a limit: so it asks again and again.
    pub fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "the process does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A server, its address, and what it says.
pub struct Serving {
    pub process: Running,
    pub url: String,
    pub stderr: BufReader<std::process::ChildStderr>,
}

impl Serving {
    pub fn start(mut command: Command) -> Self {
        let mut process = Running(command.spawn().unwrap());
        let mut stderr = BufReader::new(process.0.stderr.take().unwrap());
        let mut said = String::new();
        loop {
            let mut line = String::new();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "it does not listen: {said}");
            if let Some(url) = line.strip_prefix("listening on ") {
                let url = url.trim().to_owned();
                return Self { process, url, stderr };
            }
            said += &line;
        }
    }

    pub fn port(&self) -> &str {
        self.url.rsplit(':').next().unwrap()
    }

    pub fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        (self.process.end().code(), said)
    }
}

/// Asks again and again, since a file that another process writes tells nobody; a test that hangs fails after [`LIMIT`].
pub fn until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "{what} does not come about");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("half a line: {line}")))
        .collect()
}

pub fn object(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Whether the log says that a round was averaged.
pub fn has_closed_a_round(run: &Path) -> bool {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let line = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    whole
        .lines()
        .map(line)
        .any(|line| line["kind"] == "round" && line["round"] != 0)
}

pub fn has_adapter(run: &Path) -> bool {
    let config = Architecture::from_json(include_str!("../../assets/demo/config.json")).unwrap();
    Adapter::load(&run.join("adapter"), &config).is_ok()
}

/// All files below a directory and what they hold.
pub fn contents(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(contents(&path)),
            false => drop(found.insert(path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    found
}
