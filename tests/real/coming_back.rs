//! A native client that is told to leave, killed, or started twice: with what it keeps it comes back as itself.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::running::Running;

const DATA: &str = include_str!("../../assets/demo/train.txt");
const ROUNDS: usize = 3;
const LOCAL_STEPS: usize = 60;

/// One run of one client, and what it keeps.
struct Stage {
    home: tempfile::TempDir,
    server: Option<Running>,
    url: String,
}

impl Stage {
    fn start() -> Stage {
        let home = tempfile::tempdir().unwrap();
        let lines: Vec<&str> = DATA.lines().take(900).collect();
        std::fs::write(home.path().join("data.txt"), lines.join("\n")).unwrap();
        let mut stage = Stage {
            home,
            server: None,
            url: String::new(),
        };
        let mut serve = stage.program();
        serve
            .args([
                "serve",
                "--listen",
                "http://127.0.0.1:0",
                "--token",
                "secret",
                "--clients",
                "1",
            ])
            .args([
                "--rounds",
                &ROUNDS.to_string(),
                "--local-steps",
                &LOCAL_STEPS.to_string(),
            ])
            .args([
                "--batch",
                "2",
                "--seq",
                "64",
                "--wire",
                "f32",
                "--no-shuffle",
                "--device",
                "cpu",
            ])
            .arg("--out")
            .arg(stage.path("run"));
        let mut server = Running(serve.spawn().unwrap());
        let mut said = BufReader::new(server.0.stderr.take().unwrap()).lines();
        stage.url = said
            .by_ref()
            .map(|line| line.unwrap())
            .find_map(|line| Some(line.strip_prefix("listening on ")?.trim().to_owned()))
            .expect("the server listens nowhere");
        // It must not wait for somebody who reads what it says.
        std::thread::spawn(move || said.for_each(drop));
        stage.server = Some(server);
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sflllm"));
        command
            .env("SFLLLM_HOME", self.home.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn join(&self, arguments: &[&str]) -> Running {
        let mut join = self.program();
        join.args(["join", &self.url, "--token", "secret", "--device", "cpu", "--data"])
            .arg(self.path("data.txt"))
            .args(arguments);
        Running(join.spawn().unwrap())
    }

    fn metrics(&self, kind: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("run/metrics.jsonl")).unwrap_or_default();
        let lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
        lines.filter(|line: &Value| line["kind"] == kind).collect()
    }

    fn events(&self, event: &str) -> Vec<Value> {
        let mut events = self.metrics("event");
        events.retain(|line| line["event"] == event);
        events
    }

    /// Waits until the client has done some more steps, and the server has averaged `rounds`.
    fn await_steps(&self, client: &mut Running, rounds: usize, more: usize) {
        let wanted = self.metrics("step").len() + more;
        while self.metrics("step").len() < wanted || self.metrics("round").len() < rounds {
            if let Some(status) = client.0.try_wait().unwrap() {
                let mut said = String::new();
                client.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
                panic!("the client ended with {status}: {said}");
            }
            // A file that another process writes tells nobody.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Targets of every step in the last attempt at its round: they tell the batches apart.
    fn batches(&self) -> Vec<u64> {
        let mut tokens = vec![0; ROUNDS * LOCAL_STEPS];
        for step in self.metrics("step") {
            tokens[step["step"].as_u64().unwrap() as usize - 1] = step["tokens"].as_u64().unwrap();
        }
        tokens
    }

    /// Waits for the server's end.
    fn end(&mut self) {
        let status = self.server.as_mut().unwrap().0.wait().unwrap();
        assert!(status.success());
    }

    fn kept(&self, directory: &Path) -> bool {
        directory.join("client.state").exists()
    }
}

/// The rounds that counted were trained on the very batches of a run in which nothing happened: none was skipped, none came twice.
#[test]
fn a_client_that_leaves_and_is_killed_comes_back_as_itself_to_the_batch_where_its_round_began() {
    let mut undisturbed = Stage::start();
    let (status, said) = undisturbed.join(&[]).finish();
    assert!(status.success(), "{said}");
    undisturbed.end();
    let expected = undisturbed.batches();
    assert!(expected.windows(2).any(|pair| pair[0] != pair[1]));

    let mut stage = Stage::start();
    let directory = stage.path("kept");
    let state = ["--state", directory.to_str().unwrap()];
    let mut first = stage.join(&state);
    stage.await_steps(&mut first, 1, 8);
    // Nobody else may be this client meanwhile.
    let (status, said) = stage.join(&state).finish();
    assert!(!status.success() && said.contains("another sflllm"), "{said}");
    // Asked to leave, it says how to come back.
    let asked = Command::new("kill").args(["-INT", &first.0.id().to_string()]).status();
    assert!(asked.unwrap().success());
    let (status, said) = first.finish();
    assert!(status.success(), "{said}");
    assert!(said.contains("same command again"), "{said}");
    assert!(stage.kept(&directory));

    let mut second = stage.join(&state);
    stage.await_steps(&mut second, 1, 20);
    second.0.kill().unwrap();
    let (_, said) = second.finish();
    assert!(said.contains("going on as client 1"), "{said}");
    let mut third = stage.join(&state);
    stage.await_steps(&mut third, 2, 20);
    third.0.kill().unwrap();
    third.finish();
    let (status, said) = stage.join(&state).finish();
    assert!(status.success(), "{said}");
    assert!(said.contains("the run is complete"), "{said}");
    stage.end();

    let joined = stage.events("joined");
    let clients: Vec<u64> = joined.iter().filter_map(|line| line["client"].as_u64()).collect();
    assert!(clients.iter().all(|client| *client == 1), "{clients:?}");
    assert!(!stage.events("round_lost").is_empty(), "no round was begun again");
    assert_eq!(stage.batches(), expected);
    assert!(!stage.kept(&directory), "a run that is complete is forgotten");
}

#[test]
fn what_is_damaged_is_put_aside_and_named_and_what_is_forgotten_is_gone() {
    let mut stage = Stage::start();
    let directory = stage.path("kept");
    let state = ["--state", directory.to_str().unwrap()];
    let mut first = stage.join(&state);
    stage.await_steps(&mut first, 0, 8);
    first.0.kill().unwrap();
    first.finish();
    let file = directory.join("client.state");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&file, &bytes).unwrap();
    let mut second = stage.join(&state);
    stage.await_steps(&mut second, 0, 8);
    second.0.kill().unwrap();
    let (_, said) = second.finish();
    assert!(said.contains("damaged"), "{said}");
    assert_eq!(std::fs::read(directory.join("client.state.damaged-1")).unwrap(), bytes);
    let (status, said) = stage.join(&[&state[..], &["--fresh"]].concat()).finish();
    assert!(status.success(), "{said}");
    stage.end();
    let joined = stage.events("joined");
    let mut clients: Vec<u64> = joined.iter().filter_map(|line| line["client"].as_u64()).collect();
    clients.dedup();
    assert_eq!(clients, [1, 2, 3], "three that do not know of each other");
}
