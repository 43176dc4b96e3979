//! Real runs over TLS: the program serves, other processes of it join with parts of the demo data, and the run directory holds
//! what it should.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;
use sflllm::model::adapter::Adapter;
use sflllm::model::architecture::Architecture;

use super::running::Running;

const DATA: &str = include_str!("../../assets/demo/train.txt");
const VALID: &str = include_str!("../../assets/demo/valid.txt");
const CONFIG: &str = include_str!("../../assets/demo/config.json");
/// Generous: a machine may be slow. Nothing is asserted about time.
const LIMIT: Duration = Duration::from_secs(300);

const ROUNDS: u64 = 2;
const LOCAL_STEPS: u64 = 4;

fn program(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sflllm"));
    command
        .env("SFLLLM_HOME", home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// A server, its address, and what it says afterwards.
struct Serving {
    process: Running,
    url: String,
    lines: mpsc::Receiver<String>,
}

fn serve(home: &Path, arguments: &[&str]) -> Serving {
    let mut process = Running(program(home).arg("serve").args(arguments).spawn().unwrap());
    let stderr = BufReader::new(process.0.stderr.take().unwrap());
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let mut said = Vec::new();
    loop {
        match lines.recv_timeout(LIMIT) {
            Ok(line) => match line.strip_prefix("listening on ") {
                Some(url) => {
                    return Serving {
                        process,
                        url: url.to_owned(),
                        lines,
                    };
                }
                None => said.push(line),
            },
            Err(_) => panic!("the server does not listen; it said:\n{}", said.join("\n")),
        }
    }
}

fn join(home: &Path, url: &str, data: &Path, arguments: &[&str]) -> Running {
    let mut command = program(home);
    command
        .arg("join")
        .arg(url)
        .arg("--data")
        .arg(data)
        .args(["--device", "cpu"])
        .args(arguments);
    Running(command.spawn().unwrap())
}

fn run(home: &Path, arguments: &[&str]) -> Output {
    program(home).args(arguments).output().unwrap()
}

/// Every third line of the demo data, as a file of one client.
fn third(directory: &Path, part: usize) -> PathBuf {
    let lines: Vec<&str> = DATA.lines().skip(part).step_by(3).collect();
    let path = directory.join(format!("third-{part}.txt"));
    std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    path
}

fn objects(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn two_clients_train_over_tls_and_leave_an_adapter() {
    let directory = tempfile::tempdir().unwrap();
    let (home, elsewhere) = (directory.path().join("server"), directory.path().join("client"));
    let out = directory.path().join("run");
    let valid = directory.path().join("valid.txt");
    std::fs::write(&valid, VALID.lines().take(12).collect::<Vec<_>>().join("\n")).unwrap();
    let (rounds, local_steps) = (ROUNDS.to_string(), LOCAL_STEPS.to_string());
    let server = serve(
        &home,
        &[
            "--model",
            "demo",
            "--listen",
            "https://127.0.0.1:0",
            "--token",
            "secret",
            "--clients",
            "2",
            "--rounds",
            &rounds,
            "--local-steps",
            &local_steps,
            "--batch",
            "2",
            "--split",
            "1",
            "--rank",
            "4",
            "--lr",
            "3e-3",
            "--device",
            "cpu",
            "--valid",
            valid.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ],
    );

    // Neither a stranger's certificate nor a wrong token goes through, and the run is not disturbed.
    let data = third(directory.path(), 2);
    let (status, said) = join(&elsewhere, &server.url, &data, &["--token", "secret"]).finish();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("--ca FILE") && said.contains("--insecure-tls"), "{said}");
    let (status, said) = join(&elsewhere, &server.url, &data, &["--token", "guess", "--insecure-tls"]).finish();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("token is wrong"), "{said}");

    // One client trusts the server's certificate file, the other any; one takes its token from the link.
    let certificate = home.join("tls/certificate.pem");
    let kept = directory.path().join("kept");
    let first = join(
        &elsewhere,
        &server.url,
        &third(directory.path(), 0),
        &[
            "--token",
            "secret",
            "--ca",
            certificate.to_str().unwrap(),
            "--name",
            "first",
            "--adapter-out",
            kept.to_str().unwrap(),
        ],
    );
    let link = format!("{}/?join=1#t=secret", server.url);
    let second = join(
        &elsewhere,
        &link,
        &third(directory.path(), 1),
        &["--insecure-tls", "--name", "second"],
    );
    for client in [first, second] {
        let (status, said) = client.finish();
        assert!(status.success(), "{said}");
        assert!(said.contains("the run is complete: 8 steps"), "{said}");
    }
    let Serving { process, lines, .. } = server;
    let (status, _) = process.finish();
    let said: Vec<String> = lines.iter().collect();
    assert!(status.success(), "{}", said.join("\n"));

    let run: Value = serde_json::from_str(&std::fs::read_to_string(out.join("run.json")).unwrap()).unwrap();
    assert_eq!(run["ended"], "completed");
    assert_eq!(
        (&run["totals"]["rounds"], &run["totals"]["steps"]),
        (&ROUNDS.into(), &(ROUNDS * LOCAL_STEPS).into())
    );
    assert!(run["addresses"][0].as_str().unwrap().starts_with("https://127.0.0.1:"));

    let metrics = objects(&out.join("metrics.jsonl"));
    let of_kind = |kind: &str| metrics.iter().filter(|line| line["kind"] == kind).collect::<Vec<_>>();
    let steps = of_kind("step");
    assert_eq!(steps.len() as u64, ROUNDS * LOCAL_STEPS);
    for (index, step) in steps.iter().enumerate() {
        assert_eq!(step["step"], index as u64 + 1);
        assert_eq!(step["round"], index as u64 / LOCAL_STEPS + 1);
        assert_eq!(step["clients"], 2);
        for field in ["loss", "tokens", "bytes_up", "bytes_down", "seconds"] {
            assert!(step[field].as_f64().unwrap() > 0.0, "{field} of {step}");
        }
    }
    let rounds = of_kind("round");
    assert_eq!(
        rounds
            .iter()
            .map(|round| round["round"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [0, 1, 2]
    );
    assert!(
        rounds[1..]
            .iter()
            .all(|round| round["adapters"] == 2 && round["excluded"] == Value::Array(Vec::new()))
    );
    let losses: Vec<f64> = rounds
        .iter()
        .map(|round| round["valid_loss"].as_f64().unwrap())
        .collect();
    assert!(
        losses[1] < losses[0] && losses[2] < losses[1],
        "the validation loss does not fall: {losses:?}"
    );
    let names: Vec<&str> = of_kind("event")
        .iter()
        .filter(|event| event["event"] == "joined")
        .filter_map(|event| event["name"].as_str())
        .collect();
    assert!(
        names.len() == 2 && names.contains(&"first") && names.contains(&"second"),
        "{names:?}"
    );
    assert!(of_kind("event").iter().any(|event| event["event"] == "refused"));

    // The adapter is that of the whole model; the client kept its own side of it.
    let config = Architecture::from_json(CONFIG).unwrap();
    let whole = Adapter::load(&out.join("adapter"), &config).unwrap();
    assert_eq!(whole.layout.blocks(), 0..config.blocks);
    // Every projection, unless --targets says otherwise.
    assert_eq!((whole.spec.rank, &whole.spec.targets[..]), (4, config.targets()));
    for entry in whole.layout.entries() {
        let trained = whole.values[entry.range_b()].iter().any(|&value| value != 0.0);
        assert!(trained, "block {} was not trained", entry.block);
    }
    assert_eq!(
        Adapter::load(&kept, &config).unwrap().values,
        whole.slice(&config, 0..1).unwrap().values
    );
    let trained = out.join("adapter");
    assert!(
        !out.join("weights").exists(),
        "the clients' part of the model is left behind"
    );
    assert!(trained.join("adapter_config.json").is_file());
}

#[test]
fn a_federated_server_of_its_own_sees_adapters_only() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path();
    let (main_out, federated_out) = (home.join("main"), home.join("federated"));
    let address = ["--listen", "https://127.0.0.1:0", "--out"];
    let federated = serve(
        home,
        &[
            &["--role", "federated"],
            &address[..],
            &[federated_out.to_str().unwrap()],
        ]
        .concat(),
    );
    let told = |start: &str, end: &str| {
        let line = federated
            .lines
            .iter()
            .find_map(|line| Some(line.strip_prefix(start)?.to_owned()));
        let line = line.expect(start);
        line.split(end).next().unwrap().to_owned()
    };
    let link = told("for the main server: --federated-url '", "'");
    let key = told("control key: ", " ");
    let role = [
        "--role",
        "main",
        "--federated-url",
        &link,
        "--control-key",
        &key,
        "--token",
        "secret",
        "--clients",
        "2",
        "--device",
        "cpu",
    ];
    let run = ["--rounds", "2", "--local-steps", "2", "--batch", "2"];
    let main = serve(
        home,
        &[&role[..], &run, &address, &[main_out.to_str().unwrap()]].concat(),
    );
    // On the server's own machine and account its certificate is known; elsewhere the link is enough for both servers.
    let elsewhere = home.join("elsewhere");
    let start = "on this machine: ";
    let link = main
        .lines
        .iter()
        .find_map(|line| Some(line.strip_prefix(start)?.to_owned()));
    let clients = [
        join(home, &main.url, &third(home, 0), &["--token", "secret"]),
        join(&elsewhere, &link.expect(start), &third(home, 1), &[]),
    ];
    for client in clients {
        let (status, said) = client.finish();
        assert!(status.success(), "{said}");
    }
    for server in [main, federated] {
        let said: Vec<String> = server.lines.iter().collect();
        let (status, _) = server.process.finish();
        assert!(status.success(), "{}", said.join("\n"));
    }
    let steps = objects(&main_out.join("metrics.jsonl"));
    let adapters: Vec<u64> = steps
        .iter()
        .filter(|line| line["kind"] == "round")
        .filter_map(|line| line["adapters"].as_u64())
        .collect();
    assert_eq!(adapters, [2, 2]);
    let federated = objects(&federated_out.join("metrics.jsonl"));
    let updates = federated.iter().filter(|line| line["event"] == "update").count();
    assert_eq!(updates, 4);
    assert!(
        federated.iter().all(|line| line["kind"] == "event"),
        "a federated server has no steps: {federated:?}"
    );
    assert!(main_out.join("adapter").is_dir() && !federated_out.join("adapter").exists());
}

#[test]
fn a_join_link_is_enough_and_a_wrong_fingerprint_too_much() {
    let directory = tempfile::tempdir().unwrap();
    let (home, elsewhere) = (directory.path().join("server"), directory.path().join("client"));
    let out = directory.path().join("run");
    let token = directory.path().join("token");
    std::fs::write(&token, "k7wd-m2pq\n").unwrap();
    let server = serve(
        &home,
        &[
            "--listen",
            "https://127.0.0.1:0",
            "--token-file",
            token.to_str().unwrap(),
            "--rounds",
            "1",
            "--local-steps",
            "2",
            "--batch",
            "2",
            "--device",
            "cpu",
            "--out",
            out.to_str().unwrap(),
        ],
    );
    let start = "on this machine: ";
    let link = (server.lines.iter())
        .find_map(|line| Some(line.strip_prefix(start)?.to_owned()))
        .expect(start);
    let (place, fingerprint) = link.split_once("&f=").unwrap();
    assert_eq!(place, format!("{}/#t=k7wd-m2pq", server.url));
    let data = third(directory.path(), 0);

    // Another certificate's fingerprint, though the server's own is known on this machine.
    let first = if fingerprint.starts_with('A') { "B" } else { "A" };
    let wrong = format!("{place}&f={first}{}", &fingerprint[1..]);
    for home in [&home, &elsewhere] {
        let (status, said) = join(home, &wrong, &data, &[]).finish();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("not the one that the join link names"), "{said}");
    }
    let (status, said) = join(&elsewhere, &format!("{place}&f=half"), &data, &[]).finish();
    assert_eq!(status.code(), Some(2), "{said}");

    // With the fingerprint alone, and the token from the environment.
    let mut command = program(&elsewhere);
    command
        .args([
            "join",
            &format!("{}/#f={fingerprint}", server.url),
            "--device",
            "cpu",
            "--data",
        ])
        .arg(&data)
        .env("SFLLLM_TOKEN", "k7wd-m2pq");
    let (status, said) = Running(command.spawn().unwrap()).finish();
    assert!(status.success() && said.contains("the run is complete"), "{said}");
    let said: Vec<String> = server.lines.iter().collect();
    let (status, _) = server.process.finish();
    assert!(status.success(), "{}", said.join("\n"));
}

#[test]
fn a_main_server_needs_the_federated_servers_key() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path();
    let federated = serve(
        home,
        &[
            "--role",
            "federated",
            "--listen",
            "http://127.0.0.1:0",
            "--out",
            home.join("federated").to_str().unwrap(),
        ],
    );
    let output = run(
        home,
        &[
            "serve",
            "--role",
            "main",
            "--federated-url",
            &federated.url,
            "--control-key",
            "guess",
            "--listen",
            "http://127.0.0.1:0",
            "--device",
            "cpu",
            "--out",
            home.join("main").to_str().unwrap(),
        ],
    );
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("refuses the control key") && said.contains("--control-key"),
        "{said}"
    );
    let output = run(
        directory.path(),
        &[
            "serve",
            "--role",
            "main",
            "--federated-url",
            "https://127.0.0.1:1",
            "--token",
            "secret",
        ],
    );
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("--control-key") && said.contains("SFLLLM_CONTROL_KEY"),
        "{said}"
    );
}

#[test]
fn a_client_that_vanishes_is_dropped_and_the_run_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path();
    let out = home.join("run");
    let server = serve(
        home,
        &[
            "--listen",
            "https://127.0.0.1:0",
            "--token",
            "secret",
            "--clients",
            "2",
            "--rounds",
            "2",
            "--local-steps",
            "15",
            "--batch",
            "2",
            "--device",
            "cpu",
            "--out",
            out.to_str().unwrap(),
        ],
    );
    let [stays, mut vanishes] = [0, 1].map(|part| join(home, &server.url, &third(home, part), &["--token", "secret"]));
    let metrics = out.join("metrics.jsonl");
    let steps = || -> Vec<Value> {
        let text = std::fs::read_to_string(&metrics).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|line: &Value| line["kind"] == "step")
            .collect()
    };
    while steps().is_empty() {
        assert!(
            vanishes.0.try_wait().unwrap().is_none(),
            "the client ended before the first step"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    vanishes.0.kill().unwrap();
    let (status, said) = stays.finish();
    assert!(status.success(), "{said}");
    let said: Vec<String> = server.lines.iter().collect();
    let (status, _) = server.process.finish();
    assert!(status.success(), "{}", said.join("\n"));
    let steps = steps();
    assert_eq!(steps.len(), 30, "{}", said.join("\n"));
    assert_eq!((&steps[0]["clients"], &steps[29]["clients"]), (&2.into(), &1.into()));
}

#[test]
fn a_server_says_what_is_wrong_with_its_address() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("run");
    let serve = |listen: &str| {
        let output = run(
            directory.path(),
            &[
                "serve",
                "--listen",
                listen,
                "--device",
                "cpu",
                "--out",
                out.to_str().unwrap(),
            ],
        );
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (code, said) = serve(&format!("http://127.0.0.1:{port}"));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&format!("port {port} is in use")), "{said}");
    let (code, said) = serve("http://0.0.0.0:0");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("loopback only") && said.contains("https://0.0.0.0:0"),
        "{said}"
    );
    let (code, said) = serve("127.0.0.1");
    assert_eq!(code, Some(2), "{said}");
}

#[test]
fn a_client_says_why_it_cannot_join() {
    let directory = tempfile::tempdir().unwrap();
    let data = third(directory.path(), 0);
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let (status, said) = join(directory.path(), &format!("https://127.0.0.1:{port}"), &data, &[]).finish();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(
        said.contains("connection refused") && said.contains("sflllm serve"),
        "{said}"
    );
    let (status, said) = join(directory.path(), "http://192.0.2.1:8080", &data, &[]).finish();
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("https://"), "{said}");
    let missing = directory.path().join("missing.txt");
    let (status, said) = join(directory.path(), "https://127.0.0.1:1", &missing, &[]).finish();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("missing.txt"), "{said}");
}
