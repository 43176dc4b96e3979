//! The page in a real browser: headless Chromium, driven through chromedriver, joins a real server.
//!
//! Without Chromium the tests say so and pass, unless `SFLLLM_REQUIRE_BROWSER=1` is set, as `cargo xtask test` does.

#[path = "../../xtask/src/browser.rs"]
mod chromium;

use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sflllm::compute::Engine;
use sflllm::data::{Dataset, Options, Tokenize, Tokenizer};
use sflllm::model::adapter::{Adapter, LoraSpec, Target};
use sflllm::model::architecture::Architecture;
use sflllm::model::unit::Unit;
use sflllm::model::weights::{Holding, Weights};
use sflllm::protocol::Deadline;
use sflllm::protocol::message::{Digest, LinkRates};
use sflllm::runs::directory::RunDirectory;
use sflllm::server::planner::{Decision, Planner, RoundFacts, StartFacts};
use sflllm::server::{self, Model, Role, Run, Settings};
use sflllm::split::Training;
use sflllm::terms::aggregation::Aggregation;
use sflllm::terms::format::Format;
use sflllm::terms::optimizer::OptimizerSettings;
use sflllm::terms::tensor::WireForm;

const PATIENCE: Duration = Duration::from_secs(240);
const TOKEN: &str = "paper-boat";

/// A WebGPU adapter without a GPU.
const EMULATED_GPU: &[&str] = &["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];
const NO_GPU: &[&str] = &["--disable-gpu", "--disable-features=WebGPU"];

#[test]
fn two_tabs_on_webgpu_train_to_the_end() {
    let Some(programs) = programs() else { return };
    let run = tempfile::tempdir().unwrap();
    let (rounds, local_steps) = (2, 4);
    let server = Server::start(run.path(), 2, rounds, local_steps);
    let chromium = Chromium::start(&programs, EMULATED_GPU);
    let link = format!("{}/?join=1#t={TOKEN}", server.origin);

    let first = chromium.window();
    chromium.open(&link);
    let second = chromium.new_window();
    chromium.open(&link);
    for tab in [&first, &second] {
        chromium.switch(tab);
        chromium.wait_for_state(&["done"], &server.said);
        let shown = chromium.root_data();
        assert_eq!(shown["step"], (rounds * local_steps).to_string(), "{shown}");
        assert_eq!(shown["round"], rounds.to_string(), "{shown}");
        let device = shown["device"].as_str().unwrap_or_default().to_lowercase();
        assert!(
            device.contains("swiftshader"),
            "the tab should compute on WebGPU: {shown}"
        );
        for counter in ["sent", "received"] {
            let bytes: u64 = shown[counter].as_str().and_then(|text| text.parse().ok()).unwrap_or(0);
            assert!(bytes > 1000, "{counter} bytes are not counted: {shown}");
        }
        assert_eq!(
            chromium.script("return location.hash", json!([])),
            "",
            "the token must leave the address bar"
        );
    }
    chromium.screenshot("browser.png");
    server.finish();
    check_metrics(run.path(), 2, rounds, local_steps);
}

#[test]
fn a_browser_without_webgpu_says_so_and_trains_a_local_file_on_its_cpu() {
    let Some(programs) = programs() else { return };
    let run = tempfile::tempdir().unwrap();
    let server = Server::start(run.path(), 1, 1, 4);
    let chromium = Chromium::start(&programs, NO_GPU);

    chromium.open(&format!("{}/?join=1#t={TOKEN}", server.origin));
    chromium.wait_for_state(&["unsupported"], &server.said);
    let advice = chromium.script("return document.getElementById('problem').innerText", json!([]));
    let advice = advice.as_str().unwrap_or_default();
    assert!(
        advice.contains("WebGPU") && advice.contains("CPU"),
        "no advice in: {advice}"
    );
    chromium.screenshot("browser-unsupported.png");

    // A file of this device instead of the demo text.
    let text = run.path().join("diary.txt");
    fs::write(
        &text,
        "The river was high today. We walked to the old mill and back. ".repeat(60),
    )
    .unwrap();
    chromium.choose_file("#file", &text);
    chromium.script("document.querySelector('input[value=file]').checked = true", json!([]));
    let name = chromium.script("return document.getElementById('file-name').innerText", json!([]));
    assert!(name.as_str().is_some_and(|name| name.contains("diary.txt")), "{name}");
    chromium.script("document.getElementById('join-button').click()", json!([]));
    chromium.wait_for_state(&["done"], &server.said);
    let shown = chromium.root_data();
    assert!(
        shown["device"].as_str().is_some_and(|device| device.contains("CPU")),
        "{shown}"
    );
    server.finish();
    check_steps(run.path(), 1, 4);
}

/// Told by /proc.
#[cfg(target_os = "linux")]
#[test]
fn a_test_that_fails_leaves_no_browser_running() {
    let Some(programs) = programs() else { return };
    let browser = Mutex::new(None);
    let failed = std::panic::catch_unwind(|| {
        let chromium = Chromium::start(&programs, NO_GPU);
        *browser.lock().unwrap() = chromium.browser;
        panic!("as a test that fails does; this is no failure");
    });
    assert!(failed.is_err());
    let process = PathBuf::from(format!(
        "/proc/{}",
        browser.into_inner().unwrap_or_else(|held| held.into_inner()).unwrap()
    ));
    assert!(!process.exists(), "{}", process.display());
}

#[test]
fn a_tab_trains_a_llama_in_four_bits_as_one_process_does() {
    let Some(programs) = programs() else { return };
    let run = tempfile::tempdir().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families/llama");
    let (model, data, adapter) = (
        fixture.join("model"),
        fixture.join("data.jsonl"),
        fixture.join("adapter"),
    );
    let (rounds, local_steps) = (2, 4);
    let common = |command: &mut Command| {
        command
            .args([
                "--device",
                "cpu",
                "--weights",
                "q4",
                "--no-shuffle",
                "--batch",
                "2",
                "--seq",
                "64",
            ])
            .args(["--lr", "2e-3", "--schedule", "constant", "--warmup", "0"])
            .arg("--model")
            .arg(&model)
            .arg("--init-adapter")
            .arg(&adapter);
    };
    let mut alone = Command::new(env!("CARGO_BIN_EXE_sflllm"));
    alone.args(["train", "--quiet", "--steps", &(rounds * local_steps).to_string()]);
    common(&mut alone);
    let alone = (alone.arg("--data").arg(&data))
        .arg("--out")
        .arg(run.path().join("alone"))
        .output()
        .unwrap();
    assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stderr));

    let server = Server::start_with(run.path(), 1, rounds, local_steps, |serve| {
        serve.args(["--split", "2", "--wire", "f32"]);
        common(serve);
    });
    let chromium = Chromium::start(&programs, EMULATED_GPU);
    chromium.open(&format!("{}/#t={TOKEN}", server.origin));
    chromium.wait_for_state(&["idle"], &server.said);
    chromium.choose_file("#file", &data);
    chromium.script("document.querySelector('input[value=file]').checked = true", json!([]));
    chromium.script("document.getElementById('join-button').click()", json!([]));
    chromium.wait_for_state(&["done"], &server.said);
    let shown = chromium.root_data();
    let device = shown["device"].as_str().unwrap_or_default().to_lowercase();
    assert!(device.contains("swiftshader"), "{shown}");
    assert_eq!(chromium.files().len(), 1, "the embedding was to be read from a file");
    server.finish();

    let together = losses(check_steps(run.path(), 1, rounds * local_steps));
    let alone = losses(read_metrics(&run.path().join("alone/metrics.jsonl")));
    assert_eq!(alone.len(), together.len());
    for (alone, together) in alone.iter().zip(&together) {
        assert!(
            (alone / together - 1.0).abs() < 1e-4,
            "in one process {alone}, with a tab {together}"
        );
    }
    assert!(together.last() < together.first(), "nothing was learned: {together:?}");
}

fn losses(lines: Vec<Value>) -> Vec<f64> {
    let steps = lines.iter().filter(|line| line["kind"] == "step");
    steps.map(|step| step["loss"].as_f64().unwrap()).collect()
}

#[test]
fn a_tab_fetches_the_embedding_into_a_file_once_and_computes_the_same_without_the_file() {
    let Some(programs) = programs() else { return };
    let home = tempfile::tempdir().unwrap();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let config = Architecture::load(&assets).unwrap();
    let weights = Weights::open(&assets, &config).unwrap();
    let embedding = weights.unit(Unit::Embedding, Holding::Auto).unwrap();
    let (name, size) = (Digest(embedding.digest()).to_string(), embedding.encoded_length());
    let text = home.path().join("diary.txt");
    fs::write(
        &text,
        "The river was high today. We walked to the old mill and back. ".repeat(60),
    )
    .unwrap();

    let chromium = Chromium::start(&programs, NO_GPU);
    // Files belong to an origin, so all runs are at one address.
    let mut listen = "http://127.0.0.1:0".to_owned();
    let mut visit = |number: usize, prepare: &str| -> (i64, Vec<f64>) {
        let run = home.path().join(number.to_string());
        fs::create_dir(&run).unwrap();
        let server = Server::start_with(&run, 1, 1, 3, |serve| {
            serve
                .args([
                    "--listen", &listen, "--model", "demo", "--device", "cpu", "--batch", "2",
                ])
                .args(["--lr", "3e-3", "--split", "1", "--rank", "4", "--seq", "64"]);
        });
        listen.clone_from(&server.origin);
        // Another fragment alone would not load the page again.
        chromium.open("about:blank");
        chromium.open(&format!("{}/#t={TOKEN}", server.origin));
        chromium.wait_for_state(&["unsupported"], &server.said);
        let prepared = chromium.asynchronous_script(
            "const [code, name, done] = arguments;
             const prepare = Object.getPrototypeOf(async () => {}).constructor('file', 'name', code);
             const directory = async () => (await navigator.storage.getDirectory()).getDirectoryHandle('sflllm');
             prepare(async () => (await directory()).getFileHandle(name)).then(() => done(''), (error) => done(String(error)));",
            json!([prepare, name]),
        );
        assert_eq!(prepared, "", "{prepare}");
        chromium.choose_file("#file", &text);
        chromium.script("document.querySelector('input[value=file]').checked = true", json!([]));
        chromium.script("document.getElementById('join-button').click()", json!([]));
        chromium.wait_for_state(&["done"], &server.said);
        let shown = chromium.root_data();
        server.finish();
        let number = |field: &str| shown[field].as_str().and_then(|text| text.parse::<i64>().ok());
        assert!(
            number("held") > Some(1 << 20),
            "what the tab holds is not said: {shown}"
        );
        (number("received").unwrap(), losses(check_steps(&run, 1, 3)))
    };

    let (fresh, expected) = visit(0, "");
    assert_eq!(chromium.files(), [(name.clone(), size)]);
    let (kept, losses) = visit(1, "");
    assert_eq!(losses, expected);
    assert!(fresh - kept >= size as i64, "{kept} bytes after {fresh}");
    // Besides the file all visits receive the same, but for a few messages that tell time.
    let mut again = |number, prepare: &str, fetched: u64| {
        let (received, losses) = visit(number, prepare);
        assert_eq!(losses, expected, "after {prepare}");
        let more = received - kept;
        assert!(
            (more - fetched as i64).abs() < 4096,
            "{more} bytes more after {prepare}"
        );
    };
    let half = size / 2;
    let edit = |edit: &str| {
        format!("const stream = await (await file()).createWritable({{ keepExistingData: true }}); {edit}")
    };
    again(
        2,
        &edit(&format!("await stream.truncate({half}); await stream.close();")),
        size - half,
    );
    assert_eq!(chromium.files(), [(name.clone(), size)]);
    let damage = format!(
        "await stream.write({{ type: 'write', position: {half}, data: new Uint8Array(64).fill(255) }}); await stream.close();"
    );
    again(3, &edit(&damage), size);
    assert_eq!(chromium.files(), [(name.clone(), size)]);
    // Whoever writes a file keeps others from it: the tab goes on in memory.
    again(4, &edit("window.writing = stream;"), size);
}

/// As `real_model`, where a file is named. Four blocks, batch 4 × 128, rank 8: what `docs/measured.md` has.
#[test]
#[expect(clippy::print_stderr, reason = "the test harness takes it")]
fn a_tab_on_smollm2_downloads_less_than_45_mb_and_holds_less_than_120() {
    let Some(model) = std::env::var_os("SFLLLM_REAL_MODEL") else {
        eprintln!("SFLLLM_REAL_MODEL names no file: nothing is checked; try `cargo xtask test --real-model`");
        return;
    };
    let Some(programs) = programs() else { return };
    let run = tempfile::tempdir().unwrap();
    let server = Server::start_with(run.path(), 1, 1, 2, |serve| {
        serve.arg("--model").arg(&model).args([
            "--device", "cpu", "--split", "4", "--batch", "4", "--seq", "128", "--rank", "8",
        ]);
    });
    let chromium = Chromium::start(&programs, EMULATED_GPU);
    chromium.open(&format!("{}/?join=1#t={TOKEN}", server.origin));
    chromium.wait_for_state(&["done"], &server.said);
    let shown = chromium.root_data();
    server.finish();
    let lines = check_steps(run.path(), 1, 2);
    let steps = lines.iter().filter(|line| line["kind"] == "step");
    let messages: u64 = steps.filter_map(|step| step["bytes_down"].as_u64()).sum();
    let number = |field: &str| shown[field].as_str().and_then(|text| text.parse::<u64>().ok()).unwrap();
    let (received, held, gpu) = (number("received"), number("held"), number("heldGpu"));
    let files = chromium.files();
    eprintln!(
        "received {received} bytes, {messages} of them in steps; held {held}, {gpu} of them on the GPU; files {files:?}"
    );
    assert_eq!(files.len(), 1, "the embedding is kept in a file");
    assert!(received - messages < 45_000_000);
    // The four blocks alone are 8.8 MB.
    assert!(gpu > 8_800_000 && held > gpu && held < 120_000_000);
}

/// Cuts by round, and slow uplinks.
struct Moving([usize; 3]);

impl Planner for Moving {
    fn start(&mut self, facts: &StartFacts) -> Result<Option<Decision>, String> {
        if facts.clients.iter().any(|client| client.speed.is_none()) {
            return Err("a tab did not measure itself".to_owned());
        }
        Ok(Some(Decision {
            cut: self.0[0],
            rank: facts.rank,
            rates: facts
                .clients
                .iter()
                .filter_map(|client| Some((client.id, LinkRates::new(2e7, 2e7)?)))
                .collect(),
            ..Decision::default()
        }))
    }

    fn boundary(&mut self, measured: &RoundFacts) -> Result<Option<Decision>, String> {
        Ok(Some(Decision {
            cut: self.0[measured.round as usize],
            rank: measured.rank,
            ..Decision::default()
        }))
    }
}

#[test]
fn a_tab_whose_blocks_come_and_go_trains_to_the_end() {
    let Some(programs) = programs() else { return };
    let home = tempfile::tempdir().unwrap();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let config = Architecture::load(&assets).unwrap();
    let spec = LoraSpec::new(4, 8.0, [Target::AttnQkv]).unwrap();
    let run = Run {
        model: Model {
            name: "demo".to_owned(),
            digest: Digest([0; 32]),
            weights: Weights::open(&assets, &config).unwrap(),
            holding: Holding::As(Format::F16),
            tokenizer: Some(fs::read(assets.join("tokenizer.json")).unwrap()),
            architecture: config.clone(),
        },
        engine: Engine::cpu(),
        training: Training {
            spec: spec.clone(),
            optimizer: OptimizerSettings::default(),
            batch: 2,
            seq: 64,
            wire: WireForm::F16,
        },
        cut: 1,
        initial: Adapter::init(&config, &spec, 0..config.blocks, 1).unwrap(),
        validation: None,
        rounds: 3,
        local_steps: 2,
        seed: 1,
        shuffle: true,
        clients: 1,
        wait: PATIENCE,
        deadline: Deadline::Auto,
        quorum: None,
        aggregation: Aggregation::Mean,
        ranks: Vec::new(),
        planner: Some(Box::new(Moving([2, 3, 1]))),
    };
    let settings = Settings {
        role: Role::Both,
        listen: vec!["http://127.0.0.1:0".parse().unwrap()],
        token: Some(TOKEN.to_owned()),
        operator: None,
        hosts: Vec::new(),
        limits: server::Limits::default(),
        home: home.path().to_owned(),
        directory: RunDirectory::create(Some(&home.path().join("out")), "demo").unwrap(),
        demo_data: include_bytes!("../../assets/demo/train.txt").into(),
        run: Some(run),
        interrupted: None,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let said = Arc::new(Mutex::new(String::new()));
    let heard = Arc::clone(&said);
    let report = move |report| heard.lock().unwrap().push_str(&format!("{report:?}\n"));
    let server = runtime
        .block_on(server::Server::start(settings, Box::new(report)))
        .unwrap();
    let origin = server.addresses()[0].local_url.clone();
    let serving = runtime.spawn(server.serve());

    let chromium = Chromium::start(&programs, EMULATED_GPU);
    chromium.open(&format!("{origin}/?join=1#t={TOKEN}"));
    chromium.wait_for_state(&["done"], &said);
    let summary = runtime.block_on(serving).unwrap().unwrap();
    assert_eq!((summary.rounds, summary.steps), (3, 6));
    let lines = check_steps(home.path(), 1, 6);
    let cuts: Vec<u64> = lines
        .iter()
        .filter(|line| line["event"] == "plan")
        .filter_map(|line| line["cut"].as_u64())
        .collect();
    assert_eq!(cuts, [2, 3, 1]);
    let trained = Adapter::load(&home.path().join("out/adapter"), &config).unwrap();
    for entry in trained.layout.entries() {
        let moved = trained.values[entry.range_b()].iter().any(|&value| value != 0.0);
        assert!(moved, "block {} was not trained", entry.block);
    }
}

#[test]
fn a_tab_that_is_loaded_again_in_mid_run_goes_on_as_the_same_client_from_where_its_round_began() {
    let Some(programs) = programs() else { return };
    let run = tempfile::tempdir().unwrap();
    let (rounds, local_steps) = (3, 40);
    let text = run.path().join("diary.txt");
    let lines = (0..400).map(|day| format!("Day {day}.{}\n", " The river was high.".repeat(1 + day * 7 % 11)));
    fs::write(&text, lines.collect::<String>()).unwrap();
    let server = Server::start_with(run.path(), 1, rounds, local_steps, |serve| {
        serve
            .args(["--model", "demo", "--device", "cpu", "--no-shuffle", "--batch", "2"])
            .args(["--lr", "3e-3", "--split", "1", "--rank", "4", "--seq", "64"]);
    });
    let chromium = Chromium::start(&programs, NO_GPU);
    chromium.open(&format!("{}/?device=cpu#t={TOKEN}", server.origin));
    chromium.wait_for_state(&["idle", "unsupported"], &server.said);
    chromium.choose_file("#file", &text);
    chromium.script("document.querySelector('input[value=file]').checked = true", json!([]));
    chromium.script("document.getElementById('join-button').click()", json!([]));
    let reach = |step: u64| {
        let start = Instant::now();
        let shown = || chromium.root_data();
        while shown()["step"].as_str().and_then(|step| step.parse::<u64>().ok()) < Some(step) {
            assert!(
                start.elapsed() < PATIENCE,
                "{}\n{}",
                shown(),
                server.said.lock().unwrap()
            );
            // WebDriver only answers questions.
            thread::sleep(Duration::from_millis(20));
        }
        shown()
    };
    let before = reach(local_steps + 10);
    chromium.command("POST", "refresh", Some(&json!({})));
    // The join code has left the address; a person has only to say yes, and chooses no file.
    let label = loop {
        let label = chromium.script(
            "const button = document.getElementById('continue'); return button && !button.hidden ? button.innerText : ''",
            json!([]),
        );
        match label.as_str() {
            Some(label) if !label.is_empty() => break label.to_owned(),
            // As above: the page tells WebDriver nothing by itself.
            _ => thread::sleep(Duration::from_millis(100)),
        }
    };
    assert!(label.contains("as client 1, from round 2"), "{label}");
    chromium.script("document.getElementById('continue').click()", json!([]));
    let between = reach(local_steps + 1);
    assert_eq!((&before["client"], &between["client"]), (&json!("1"), &json!("1")));
    // Asked for by the address, it goes on by itself.
    reach(2 * local_steps + 10);
    chromium.script("history.replaceState(null, '', '/?device=cpu&join=1')", json!([]));
    chromium.command("POST", "refresh", Some(&json!({})));
    chromium.wait_for_state(&["done"], &server.said);
    assert_eq!(chromium.root_data()["client"], "1");
    let kept = chromium.asynchronous_script(
        "const [done] = arguments;
         (async () => {
           const root = await navigator.storage.getDirectory();
           for (let tries = 0; tries < 50; tries += 1) {
             const names = [];
             for await (const name of (await root.getDirectoryHandle('sflllm-clients')).keys()) names.push(name);
             if (!names.length) return [];
             await new Promise((resolve) => setTimeout(resolve, 100));
           }
           return 'still there';
         })().then(done, (error) => done(String(error)));",
        json!([]),
    );
    assert_eq!(kept, json!([]), "a run that is complete is forgotten");
    server.finish();

    let metrics = read_metrics(&run.path().join("out/metrics.jsonl"));
    let events = |name: &str| -> Vec<&Value> { metrics.iter().filter(|line| line["event"] == name).collect() };
    assert!(
        events("joined").iter().all(|joined| joined["client"] == 1),
        "{:?}",
        events("joined")
    );
    assert_eq!(events("round_lost").len(), 2);
    // Whatever was begun again was begun at the same batch, and nothing was left out between rounds.
    let mut batches = vec![Vec::new(); (rounds * local_steps) as usize];
    for step in metrics.iter().filter(|line| line["kind"] == "step") {
        batches[step["step"].as_u64().unwrap() as usize - 1].push(step["tokens"].as_u64().unwrap());
    }
    assert!(batches.iter().filter(|attempts| attempts.len() > 1).count() >= 20);
    for (step, attempts) in batches.iter().enumerate() {
        assert!(
            attempts.windows(2).all(|pair| pair[0] == pair[1]),
            "step {step}: {attempts:?}"
        );
    }
}

#[test]
fn a_wrong_join_code_is_explained() {
    let Some(programs) = programs() else { return };
    let run = tempfile::tempdir().unwrap();
    let server = Server::start(run.path(), 1, 1, 1);
    let chromium = Chromium::start(&programs, NO_GPU);

    chromium.open(&format!("{}/?join=1&device=cpu#t=wrong", server.origin));
    chromium.wait_for_state(&["error"], &server.said);
    let advice = chromium.script("return document.getElementById('problem').innerText", json!([]));
    assert!(
        advice.as_str().is_some_and(|advice| advice.contains("join code")),
        "{advice}"
    );
}

#[test]
fn browser_token_ids_are_the_native_ones() {
    let Some(programs) = programs() else { return };
    let run = tempfile::tempdir().unwrap();
    let server = Server::start(run.path(), 1, 1, 1);
    let chromium = Chromium::start(&programs, NO_GPU);
    chromium.open(&server.origin);

    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let native = Tokenizer::load(&assets, None)
        .unwrap()
        .expect("the demo has a tokenizer");
    let mut texts: Vec<String> = fs::read_to_string(assets.join("test.txt"))
        .unwrap()
        .lines()
        .take(200)
        .flat_map(|line| line.split("||").map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let awkward = [
        "",
        " ",
        "  two  spaces and a tab\tand\n\nlines\r\n",
        "it's I'll we've they'd — “quotes” … £5–£10 €",
        "naïve café Ünïcödé ÅÄÖ ß ﬁ",
        "日本語のテキスト 中文 한국어 हिन्दी العربية",
        "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 zero\u{200b}width \u{feff}bom",
        "<|endoftext|> in the text <|endoftext|>",
        "12345 67,890.12 x=y+z; {\"json\": [1, 2]} a||b",
        "MiXeD cAsE ALLCAPS camelCase snake_case",
    ];
    texts.extend(awkward.map(str::to_owned));

    let tokenizer: Value = serde_json::from_slice(&fs::read(assets.join("tokenizer.json")).unwrap()).unwrap();
    let found = chromium.asynchronous_script(
        "const [tokenizer, texts, done] = arguments;
         import('/vendor/tokenizers/tokenizers.min.mjs').then(({ Tokenizer }) => {
           const made = new Tokenizer(tokenizer, {});
           done(texts.map((text) => made.encode(text, { add_special_tokens: false }).ids));
         }, (error) => done(String(error)));",
        json!([tokenizer, texts]),
    );
    let found: Vec<Vec<u32>> =
        serde_json::from_value(found.clone()).unwrap_or_else(|_| panic!("the page answered {found}"));
    assert_eq!(found.len(), texts.len());
    for (text, ids) in texts.iter().zip(found) {
        assert_eq!(ids, native.encode(text).unwrap(), "{text:?}");
    }
}

#[test]
fn browser_conversations_are_the_native_ones() {
    let Some(programs) = programs() else { return };
    let run = tempfile::tempdir().unwrap();
    let server = Server::start(run.path(), 1, 1, 1);
    let chromium = Chromium::start(&programs, NO_GPU);
    chromium.open(&server.origin);

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let json = |name: &str| -> Value { serde_json::from_slice(&fs::read(root.join(name)).unwrap()).unwrap() };
    let (conversations, expected) = (
        json("tests/fixtures/chat/conversations.json"),
        json("tests/fixtures/chat/expected.json"),
    );
    let demo = json("assets/demo/tokenizer.json");
    let size = Tokenizer::from_json(demo.to_string().as_bytes(), None)
        .unwrap()
        .vocab_size();
    for (name, expected) in expected.as_object().unwrap() {
        let mut tokenizer = demo.clone();
        let special = ["bos_token", "eos_token", "end_of_turn"].map(|token| expected[token].as_str());
        let mut special: Vec<&str> = special.into_iter().flatten().collect();
        special.sort_unstable();
        special.dedup();
        for (index, content) in special.iter().enumerate() {
            tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({
                "id": size + index, "content": content, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false}));
        }
        let id = |token: &str| Some(size + special.iter().position(|known| expected[token] == *known)?);
        let template = fs::read_to_string(root.join(format!("tests/fixtures/chat/{name}.jinja"))).unwrap();
        let settings = json!({"chat_template": template, "eos": id("eos_token"), "bos": id("bos_token")});
        // Settings come last.
        let plain = tokenizer.to_string();
        let served = format!("{},\"sflllm\":{settings}}}", plain.strip_suffix('}').unwrap());
        let native = Tokenizer::from_json(served.as_bytes(), None).unwrap();
        let (seq, vocab) = (200, size + special.len());
        let mut lines: Vec<String> = Vec::new();
        for (case, messages) in conversations.as_object().unwrap() {
            let roles = |role: &str| {
                messages
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|message| message["role"] == role)
            };
            if expected["rendered"][case].get("error").is_none() && roles("assistant") {
                lines.push(json!({ "messages": messages }).to_string());
            }
        }
        lines.push(json!({"prompt": "a prompt", "completion": " and what follows"}).to_string());
        let file = lines.join("\n");
        let options = Options::new(seq, vocab);
        let data = Dataset::read(file.as_bytes(), "talk.jsonl", Some(&native), &options).unwrap();

        let found = chromium.asynchronous_script(
            "const [tokenizer, file, seq, vocab, done] = arguments;
             (async () => {
               const { default: init, DataReader } = await import('/sflllm.js');
               await init({ module_or_path: '/sflllm_bg.wasm' });
               const { readExamples } = await import('/codec.js');
               const bytes = (text) => new TextEncoder().encode(text);
               const reader = new DataReader(bytes(file), 'talk.jsonl', seq, vocab);
               await readExamples(reader, bytes(tokenizer), undefined, () => {});
               const examples = [];
               for (let example; (example = reader.example(examples.length)); ) examples.push(example.map((part) => [...part]));
               return examples;
             })().then(done, (error) => done(String(error.message ?? error)));",
            json!([served, file, seq, vocab]),
        );
        let found: Vec<(Vec<u32>, Vec<i32>)> =
            serde_json::from_value(found.clone()).unwrap_or_else(|_| panic!("{name}: the page answered {found}"));
        assert_eq!(found.len(), data.examples.len(), "{name}");
        for ((line, native), (ids, labels)) in lines.iter().zip(data.examples).zip(found) {
            assert_eq!((ids, labels), (native.ids, native.labels), "{name}: {line}");
        }
    }
}

/// Every step and every average had all the tabs in it, and the model learned what it is validated on.
fn check_metrics(run: &Path, tabs: u64, rounds: u64, local_steps: u64) {
    let lines = check_steps(run, tabs, rounds * local_steps);
    let round_lines = || lines.iter().filter(|line| line["kind"] == "round");
    let averaged: Vec<&Value> = round_lines()
        .filter(|round| round["adapters"].as_u64() > Some(0))
        .collect();
    assert_eq!(averaged.len() as u64, rounds);
    for round in averaged {
        assert_eq!(round["adapters"], tabs, "a tab is missing from an average: {round}");
    }
    let losses: Vec<f64> = round_lines().filter_map(|round| round["valid_loss"].as_f64()).collect();
    assert!(
        losses.len() >= 2 && losses.last() < losses.first(),
        "validation loss did not fall: {losses:?}"
    );
}

/// All steps were taken, each with all the tabs. Gives back the lines of the metrics file.
fn check_steps(run: &Path, tabs: u64, count: u64) -> Vec<Value> {
    let lines = read_metrics(&run.join("out/metrics.jsonl"));
    let steps: Vec<&Value> = lines.iter().filter(|line| line["kind"] == "step").collect();
    assert_eq!(steps.len() as u64, count);
    for step in steps {
        assert_eq!(step["clients"], tabs, "a tab missed a step: {step}");
        assert!(
            step["bytes_up"].as_u64() > Some(0) && step["bytes_down"].as_u64() > Some(0),
            "{step}"
        );
        assert!(step["loss"].as_f64().is_some_and(f64::is_finite), "{step}");
    }
    lines
}

fn read_metrics(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[expect(clippy::print_stderr, reason = "the test harness takes it")]
fn programs() -> Option<chromium::Browser> {
    match chromium::find() {
        Ok(programs) => Some(programs),
        Err(missing) => {
            let missing = missing.join(" and ");
            let required = std::env::var_os("SFLLLM_REQUIRE_BROWSER").is_some_and(|value| value == "1");
            assert!(!required, "SFLLLM_REQUIRE_BROWSER=1, but {missing} cannot be found");
            eprintln!("NOT TESTED IN A BROWSER: {missing} cannot be found; `cargo xtask setup` installs it");
            None
        }
    }
}

/// `sflllm serve` on a free port.
struct Server {
    process: Child,
    origin: String,
    said: Arc<Mutex<String>>,
}

impl Server {
    /// On the demo model, with a few of its lines to validate on.
    fn start(directory: &Path, clients: u64, rounds: u64, local_steps: u64) -> Self {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/valid.txt");
        let few: Vec<String> = fs::read_to_string(demo)
            .unwrap()
            .lines()
            .take(16)
            .map(str::to_owned)
            .collect();
        let valid = directory.join("valid.txt");
        fs::write(&valid, few.join("\n")).unwrap();
        Self::start_with(directory, clients, rounds, local_steps, |serve| {
            serve
                .args(["--model", "demo", "--device", "cpu"])
                .args([
                    "--batch", "2", "--lr", "3e-3", "--split", "1", "--rank", "4", "--seq", "64",
                ])
                .arg("--valid")
                .arg(&valid);
        })
    }

    /// With the arguments that `configure` adds, which may say another address as well.
    fn start_with(
        directory: &Path,
        clients: u64,
        rounds: u64,
        local_steps: u64,
        configure: impl FnOnce(&mut Command),
    ) -> Self {
        let mut serve = Command::new(env!("CARGO_BIN_EXE_sflllm"));
        serve
            .args(["serve", "--token", TOKEN])
            .args(["--clients", &clients.to_string(), "--rounds", &rounds.to_string()])
            .args(["--local-steps", &local_steps.to_string()])
            .arg("--out")
            .arg(directory.join("out"));
        configure(&mut serve);
        if !serve.get_args().any(|argument| argument == "--listen") {
            serve.args(["--listen", "http://127.0.0.1:0"]);
        }
        let mut process = serve
            .env("SFLLLM_HOME", directory.join("home"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = process.stderr.take().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let (sender, receiver) = std::sync::mpsc::channel();
        let heard = Arc::clone(&said);
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some((_, origin)) = line.split_once("listening on ") {
                    // Nobody may be waiting any more.
                    let _ = sender.send(origin.trim().trim_end_matches('/').to_owned());
                }
                let mut heard = heard.lock().unwrap();
                heard.push_str(&line);
                heard.push('\n');
            }
        });
        let mut server = Self {
            process,
            origin: String::new(),
            said,
        };
        match receiver.recv_timeout(PATIENCE) {
            Ok(origin) => server.origin = origin,
            Err(_) => panic!("the server does not listen:\n{}", server.said.lock().unwrap()),
        }
        server
    }

    /// Waits for the run to end well.
    fn finish(mut self) {
        let start = Instant::now();
        let status = loop {
            match self.process.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > PATIENCE => panic!("the server does not end:\n{}", self.said.lock().unwrap()),
                None => thread::sleep(Duration::from_millis(100)),
            }
        };
        assert!(status.success(), "the server failed:\n{}", self.said.lock().unwrap());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already unless a test failed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A headless Chromium with its own profile, and a minimal WebDriver client for it.
struct Chromium {
    driver: Child,
    port: u16,
    session: String,
    /// The process of Chromium itself, which outlives a driver that is killed.
    browser: Option<u64>,
    _profile: tempfile::TempDir,
}

impl Chromium {
    fn start(programs: &chromium::Browser, flags: &[&str]) -> Self {
        let profile = tempfile::tempdir().unwrap();
        let mut driver = Command::new(&programs.driver)
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(driver.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let port = lines.find_map(|line| {
            line.split_once("successfully on port ")?
                .1
                .trim_end_matches('.')
                .parse()
                .ok()
        });
        // The driver blocks when nobody reads what it says.
        thread::spawn(move || lines.for_each(drop));
        let mut chromium = Self {
            driver,
            port: port.expect("chromedriver names its port"),
            session: String::new(),
            browser: None,
            _profile: profile,
        };

        let user_data = format!("--user-data-dir={}", chromium._profile.path().display());
        let mut arguments = vec![
            "--headless=new",
            "--no-sandbox",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            // Of two windows one is behind the other; both must get processor time.
            "--disable-renderer-backgrounding",
            "--disable-backgrounding-occluded-windows",
            "--disable-background-timer-throttling",
            "--window-size=1180,900",
            &user_data,
        ];
        arguments.extend(flags);
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "timeouts": { "script": 60_000, "pageLoad": 60_000 },
            "goog:chromeOptions": { "binary": programs.chromium, "args": arguments },
        }}});
        let session = chromium.request("POST", "/session", Some(&wanted));
        chromium.session = session["sessionId"]
            .as_str()
            .expect("chromedriver names its session")
            .to_owned();
        chromium.browser = session["capabilities"]["goog:processID"].as_u64();
        assert!(chromium.browser.is_some(), "chromedriver names its browser's process");
        chromium
    }

    fn open(&self, url: &str) {
        self.command("POST", "url", Some(&json!({ "url": url })));
    }

    fn window(&self) -> String {
        self.command("GET", "window", None).as_str().unwrap().to_owned()
    }

    fn new_window(&self) -> String {
        let made = self.command("POST", "window/new", Some(&json!({ "type": "window" })));
        let handle = made["handle"].as_str().unwrap().to_owned();
        self.switch(&handle);
        handle
    }

    fn switch(&self, window: &str) {
        self.command("POST", "window", Some(&json!({ "handle": window })));
    }

    fn choose_file(&self, selector: &str, path: &Path) {
        let found = self.command(
            "POST",
            "element",
            Some(&json!({ "using": "css selector", "value": selector })),
        );
        let element = found
            .as_object()
            .and_then(|fields| fields.values().next())
            .and_then(Value::as_str)
            .unwrap();
        self.command(
            "POST",
            &format!("element/{element}/value"),
            Some(&json!({ "text": path })),
        );
    }

    fn script(&self, script: &str, arguments: Value) -> Value {
        self.command(
            "POST",
            "execute/sync",
            Some(&json!({ "script": script, "args": arguments })),
        )
    }

    fn asynchronous_script(&self, script: &str, arguments: Value) -> Value {
        self.command(
            "POST",
            "execute/async",
            Some(&json!({ "script": script, "args": arguments })),
        )
    }

    /// Names and sizes of the files that the page's origin keeps in its private file system.
    fn files(&self) -> Vec<(String, u64)> {
        let found = self.asynchronous_script(
            "const [done] = arguments;
             (async () => {
               const root = await navigator.storage.getDirectory();
               const files = [];
               for await (const file of (await root.getDirectoryHandle('sflllm')).values()) {
                 files.push([file.name, (await file.getFile()).size]);
               }
               return files;
             })().then(done, (error) => done(String(error)));",
            json!([]),
        );
        serde_json::from_value(found.clone()).unwrap_or_else(|_| panic!("the page answered {found}"))
    }

    /// The root element's `data-*`.
    fn root_data(&self) -> Value {
        self.script("return { ...document.documentElement.dataset }", json!([]))
    }

    fn wait_for_state(&self, wanted: &[&str], said: &Mutex<String>) {
        let start = Instant::now();
        loop {
            let shown = self.root_data();
            let state = shown["state"].as_str().unwrap_or_default();
            if wanted.contains(&state) {
                return;
            }
            if ["error", "unsupported"].contains(&state) || start.elapsed() > PATIENCE {
                let advice = self.script("return document.getElementById('problem').innerText", json!([]));
                panic!(
                    "waited for {wanted:?}, found {shown}\n{advice}\nthe server said:\n{}",
                    said.lock().unwrap()
                );
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Saves what the window shows beside the build's other results.
    fn screenshot(&self, name: &str) {
        let encoded = self.command("GET", "screenshot", None);
        let bytes = decode_base64(encoded.as_str().unwrap());
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(name), bytes).unwrap();
    }

    fn command(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        self.request(method, &format!("/session/{}/{path}", self.session), body)
    }

    fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let (status, answer) = self.ask(method, path, body, PATIENCE).unwrap();
        assert!(
            status.contains(" 200 "),
            "{method} {path}: {}",
            answer["value"]["message"]
        );
        answer["value"].clone()
    }

    /// One WebDriver command over one HTTP connection: the line with the status, and the answer.
    fn ask(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        patience: Duration,
    ) -> Result<(String, Value), Box<dyn Error>> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(patience))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.port,
            body.len()
        )?;
        let mut reader = BufReader::new(stream);
        let mut status = String::new();
        reader.read_line(&mut status)?;
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            if header.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse()?;
            }
        }
        let mut answer = vec![0; length];
        reader.read_exact(&mut answer)?;
        Ok((status, serde_json::from_slice(&answer)?))
    }
}

impl Drop for Chromium {
    /// When a test fails, too: a driver that is killed leaves its browser running.
    fn drop(&mut self) {
        let path = format!("/session/{}", self.session);
        let closed = !self.session.is_empty()
            && (self.ask("DELETE", &path, None, Duration::from_secs(20)))
                .is_ok_and(|(status, _)| status.contains(" 200 "));
        if let (false, Some(browser)) = (closed, self.browser) {
            let _ = Command::new("kill").args(["-KILL", &browser.to_string()]).status();
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

fn decode_base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => u32::from(byte - b'A'),
        b'a'..=b'z' => u32::from(byte - b'a') + 26,
        b'0'..=b'9' => u32::from(byte - b'0') + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("{:?} is not base64", char::from(other)),
    };
    let digits: Vec<u32> = text.bytes().filter(|byte| *byte != b'=').map(value).collect();
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    for group in digits.chunks(4) {
        let word = group.iter().fold(0, |word, digit| (word << 6) | digit) << (6 * (4 - group.len()));
        bytes.extend(&word.to_be_bytes()[1..group.len()]);
    }
    bytes
}
