//! A run of several processes of which one is killed, whenever it may be: it ends as one that nobody disturbed. Real processes.
#![cfg(unix)]

use std::path::Path;
use std::process::Stdio;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use super::place::{Place, Running, Serving, lines, object, until};

const CLIENTS: usize = 3;
const ROUNDS: usize = 3;
const LOCAL_STEPS: usize = 3;
const BEGIN: &str = "serve --device cpu --listen http://127.0.0.1:0 --clients 3 --rounds 3 --local-steps 3 --batch 2 --seq 12 \
                     --split 1 --rank 2 --no-shuffle --clip 1 --schedule linear --valid @valid.jsonl --quorum 3 --token open-sesame";

/// Every client has examples of its own.
fn place() -> Place {
    let place = Place::new();
    let example = |index: usize| {
        let ids: Vec<String> = (0..12)
            .map(|position| ((7 * index + 3 * position) % 50 + 1).to_string())
            .collect();
        format!("{{\"input_ids\":[{}]}}\n", ids.join(","))
    };
    let examples = |from: usize, count: usize| (from..from + count).map(example).collect::<String>();
    std::fs::write(place.path("valid.jsonl"), examples(0, 4)).unwrap();
    for client in 0..CLIENTS {
        std::fs::write(place.path(&format!("data-{client}.jsonl")), examples(5 * client, 5)).unwrap();
    }
    place
}

/// What happened, without times and addresses: of rounds that were begun again, the last time.
fn figures(run: &Path) -> Vec<Value> {
    let kept = |line: &Value| match line["kind"].as_str() {
        Some("step") => Some(serde_json::json!({
            "step": line["step"], "loss": line["loss"], "tokens": line["tokens"], "clients": line["clients"],
            "excluded": line["excluded"],
        })),
        Some("round") => Some(serde_json::json!({
            "round": line["round"], "adapters": line["adapters"], "valid_loss": line["valid_loss"], "excluded": line["excluded"],
        })),
        _ => None,
    };
    let figures: Vec<Value> = lines(&run.join("metrics.jsonl")).iter().filter_map(kept).collect();
    let is_same = |left: &Value, right: &Value| ["step", "round"].iter().all(|name| left[name] == right[name]);
    let is_last = |index: usize| !figures[index + 1..].iter().any(|later| is_same(later, &figures[index]));
    (0..figures.len())
        .filter(|&index| is_last(index))
        .map(|index| figures[index].clone())
        .collect()
}

fn logged(run: &Path) -> usize {
    let text = std::fs::read(run.join("metrics.jsonl")).unwrap_or_default();
    text.iter().filter(|&&byte| byte == b'\n').count()
}

/// A run with its processes.
struct Whole<'a> {
    place: &'a Place,
    name: String,
    server: Serving,
    clients: Vec<Running>,
}

impl<'a> Whole<'a> {
    /// Clients join one after the other, because the order in which they are summed is that of their numbers.
    fn start(place: &'a Place, name: &str) -> Self {
        Self::start_with(place, name, "")
    }

    fn start_with(place: &'a Place, name: &str, more: &str) -> Self {
        let server = Serving::start(place.program(&format!("{BEGIN} --out @{name} {more}")));
        let mut whole = Self {
            place,
            name: name.to_owned(),
            server,
            clients: Vec::new(),
        };
        for client in 0..CLIENTS {
            let running = whole.client(client);
            whole.clients.push(running);
            let run = place.path(name);
            let joined = || lines_of(&run, "joined");
            until("a client in the run", || joined() > client);
        }
        whole
    }

    fn client(&self, client: usize) -> Running {
        let Self {
            place, name, server, ..
        } = self;
        let words = format!(
            "join {} --token open-sesame --device cpu --data @data-{client}.jsonl --name client-{client} --state @{name}-client-{client}",
            server.url
        );
        let mut command = place.program(&words);
        Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn kill_server(&mut self) {
        self.server.process.signal("KILL");
        self.server.process.end();
        self.server = Serving::start(self.place.program(&format!("serve --resume @{}", self.name)));
    }

    /// Everybody comes to an end, and well.
    fn end(mut self, what: &str) {
        for (client, running) in self.clients.iter_mut().enumerate() {
            assert_eq!(running.end().code(), Some(0), "{what}: client {client}");
        }
        let (code, said) = self.server.end();
        assert_eq!(code, Some(0), "{what}: {said}");
    }
}

fn lines_of(run: &Path, event: &str) -> usize {
    let Ok(text) = std::fs::read_to_string(run.join("metrics.jsonl")) else {
        return 0;
    };
    text.matches(&format!("\"event\":\"{event}\"")).count()
}

fn assert_same(run: &Path, undisturbed: &Path, what: &str) {
    assert_eq!(figures(run), figures(undisturbed), "{what}");
    let adapter = |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    assert!(adapter(run) == adapter(undisturbed), "{what}: the adapters differ");
}

#[test]
fn a_server_that_is_killed_anywhere_goes_on_and_ends_as_one_that_is_not() {
    let place = place();
    Whole::start(&place, "undisturbed").end("undisturbed");
    let undisturbed = place.path("undisturbed");
    assert_eq!(figures(&undisturbed).len(), ROUNDS * (LOCAL_STEPS + 1) + 1);
    // Everything from the first member to the last line.
    let most = logged(&undisturbed);
    let mut random = ChaCha8Rng::seed_from_u64(10);
    for number in 0..5 {
        let name = format!("killed-{number}");
        let run = place.path(&name);
        let mut whole = Whole::start(&place, &name);
        let points: Vec<usize> = (0..2).map(|_| random.random_range(3..most - 4)).collect();
        for &point in &points {
            until("a line", || logged(&run) >= point || has_ended(&run));
            if !has_ended(&run) {
                whole.kill_server();
            }
        }
        let what = format!("killed at {points:?}");
        whole.end(&what);
        assert_same(&run, &undisturbed, &what);
    }
}

#[test]
fn however_adapters_become_one_a_killed_server_goes_on_as_if_it_had_not_been() {
    let place = place();
    let mut random = ChaCha8Rng::seed_from_u64(12);
    for (number, more) in [
        "--aggregate flora",
        "--aggregate fedex --client-ranks 2,1,2",
        "--aggregate ffa",
        "--aggregate trimmed --wire int8",
    ]
    .into_iter()
    .enumerate()
    {
        let whole = format!("undisturbed-{number}");
        Whole::start_with(&place, &whole, more).end(more);
        let undisturbed = place.path(&whole);
        let most = logged(&undisturbed);
        let name = format!("killed-{number}");
        let run = place.path(&name);
        let mut whole = Whole::start_with(&place, &name, more);
        let point = random.random_range(most / 2..most - 4);
        until("a line", || logged(&run) >= point || has_ended(&run));
        if !has_ended(&run) {
            whole.kill_server();
        }
        whole.end(more);
        assert_same(&run, &undisturbed, &format!("{more}, killed at {point}"));
    }
}

#[test]
fn a_client_that_is_killed_anywhere_comes_back_and_the_run_ends_as_one_that_nobody_disturbed() {
    let place = place();
    Whole::start(&place, "undisturbed").end("undisturbed");
    let undisturbed = place.path("undisturbed");
    let most = logged(&undisturbed);
    let mut random = ChaCha8Rng::seed_from_u64(11);
    for number in 0..5 {
        let name = format!("killed-{number}");
        let run = place.path(&name);
        let mut whole = Whole::start(&place, &name);
        let points: Vec<(usize, usize)> = (0..2)
            .map(|_| (random.random_range(CLIENTS..most - 4), random.random_range(0..CLIENTS)))
            .collect();
        for &(point, client) in &points {
            until("a line", || logged(&run) >= point || has_ended(&run));
            if !has_ended(&run) {
                whole.clients[client].signal("KILL");
                whole.clients[client].end();
                whole.clients[client] = whole.client(client);
            }
        }
        let what = format!("killed at {points:?}");
        whole.end(&what);
        assert_same(&run, &undisturbed, &what);
    }
}

fn has_ended(run: &Path) -> bool {
    let path = run.join("run.json");
    path.is_file() && !object(&path)["ended"].is_null()
}
