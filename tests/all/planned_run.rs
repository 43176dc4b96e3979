//! Runs whose cut, rank and link rates are planned, through real sessions: a server in this process and native clients of it.
//! Wherever the cut is, and however often it moves, training stays what it is on one device.

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pollster::block_on;
use serde_json::Value;
use sflllm::client::{self, Loader, Plan, local, native};
use sflllm::compute::Engine;
use sflllm::data::{Batches, Dataset, Example, Options};
use sflllm::model::adapter::{Adapter, LoraSpec, Target};
use sflllm::model::architecture::Architecture;
use sflllm::model::central::Central;
use sflllm::model::stack::StackWeights;
use sflllm::model::weights::{HeldUnits, Holding, Weights};
use sflllm::model::workspace::Extent;
use sflllm::protocol::message::{Assignment, Digest, LinkRates, OwnAlpha, RunConfig};
use sflllm::protocol::{Deadline, FinishReason};
use sflllm::runs::directory::RunDirectory;
use sflllm::server::planner::{ClientPrediction, Decision, Planner, RoundFacts, RoundPrediction, StartFacts};
use sflllm::server::{Limits, Model, Role, Run, Server, Settings, Summary};
use sflllm::split::Training;
use sflllm::terms::adapter::Trained;
use sflllm::terms::aggregation::Aggregation;
use sflllm::terms::format::Format;
use sflllm::terms::ids::{RoundKey, RunId, StepKey};
use sflllm::terms::optimizer::{OptimizerSettings, Schedule};
use sflllm::terms::phases::Phases;
use sflllm::terms::tensor::WireForm;
use sflllm::transport::{Dialer, JoinLink, Trust};
use tokio::sync::watch;

const SEED: u64 = 11;
const BATCH: usize = 2;
const LOCAL_STEPS: u32 = 3;

fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt2_peft/legacy")
}

fn config() -> Architecture {
    Architecture::load(&fixture().join("model")).unwrap()
}

fn weights(config: &Architecture) -> Weights {
    Weights::open(&fixture().join("model"), config).unwrap()
}

/// An adapter that has been trained elsewhere.
fn adapter(config: &Architecture) -> Adapter {
    Adapter::load(&fixture().join("adapter"), config).unwrap()
}

fn examples(config: &Architecture) -> Vec<Example> {
    let options = Options::new(config.positions, config.vocab);
    Dataset::load(&fixture().join("data.jsonl"), None, &options)
        .unwrap()
        .examples
}

fn training(config: &Architecture, spec: &LoraSpec, rounds: u32) -> Training {
    Training {
        spec: spec.clone(),
        optimizer: OptimizerSettings {
            lr: 3e-3,
            schedule: Schedule::Linear,
            warmup: 2,
            total_steps: u64::from(rounds * LOCAL_STEPS),
            ..Default::default()
        },
        batch: BATCH,
        seq: config.positions,
        wire: WireForm::F32,
    }
}

/// Cuts by round; the first also by rank.
#[derive(Default)]
struct Fixed {
    cuts: Vec<usize>,
    /// Clients' own cuts, by their names' numbers.
    own: Vec<usize>,
    rank: Option<usize>,
    rates: Option<LinkRates>,
    fails: bool,
    heard: Arc<Mutex<Heard>>,
}

/// What a planner was told.
#[derive(Default)]
struct Heard {
    start: Option<StartFacts>,
    rounds: Vec<RoundFacts>,
}

impl Fixed {
    fn cuts(cuts: &[usize]) -> Fixed {
        Fixed {
            cuts: cuts.to_vec(),
            ..Fixed::default()
        }
    }

    fn cut(&self, round: u32) -> Option<usize> {
        self.cuts.get(round as usize).or(self.cuts.last()).copied()
    }
}

impl Planner for Fixed {
    fn start(&mut self, facts: &StartFacts) -> Result<Option<Decision>, String> {
        self.heard.lock().unwrap().start = Some(facts.clone());
        let clients = facts.clients.iter().map(|client| client.id);
        let prediction = RoundPrediction {
            clients: clients
                .clone()
                .map(|id| {
                    let prediction = ClientPrediction {
                        step: Phases {
                            forward: 0.5,
                            ..Phases::default()
                        },
                        federated_s: 0.0,
                    };
                    (id, prediction)
                })
                .collect(),
            server_s: 0.25,
            total_s: 1.5,
        };
        Ok(Some(Decision {
            cut: self.cut(0).unwrap_or(facts.cut),
            cuts: (facts.clients.iter())
                .filter_map(|client| {
                    let number: usize = client.name.rsplit(' ').next()?.parse().ok()?;
                    Some((client.id, *self.own.get(number)?))
                })
                .collect(),
            rank: self.rank.unwrap_or(facts.rank),
            rates: self
                .rates
                .iter()
                .flat_map(|rates| clients.clone().map(|id| (id, *rates)))
                .collect(),
            prediction: Some(prediction),
            reason: "as the test says".to_owned(),
        }))
    }

    fn boundary(&mut self, measured: &RoundFacts) -> Result<Option<Decision>, String> {
        self.heard.lock().unwrap().rounds.push(measured.clone());
        if self.fails {
            return Err("the test has had enough".to_owned());
        }
        if !measured.can_recut {
            return Ok(None);
        }
        Ok(self.cut(measured.round).map(|cut| Decision {
            cut,
            rank: measured.rank,
            reason: format!("round {} comes", measured.round + 1),
            ..Decision::default()
        }))
    }
}

struct Ran {
    summary: Result<Summary, sflllm::server::Error>,
    clients: Vec<native::Summary>,
    /// Parts of the model that clients fetched over the network.
    fetched: Vec<String>,
    /// What each client kept, if it did.
    kept: Vec<Adapter>,
    /// Of all blocks, as exported, where a round was closed.
    exported: Option<Adapter>,
    metrics: Vec<Value>,
}

impl Ran {
    fn lines(&self, kind: &str) -> Vec<&Value> {
        self.metrics.iter().filter(|line| line["kind"] == kind).collect()
    }

    fn losses(&self) -> Vec<f64> {
        self.lines("step")
            .iter()
            .map(|line| line["loss"].as_f64().unwrap())
            .collect()
    }

    fn adapter(&self) -> &Adapter {
        self.exported.as_ref().expect("an exported adapter")
    }

    /// Cuts that were planned.
    fn cuts(&self) -> Vec<u64> {
        let plans = self.lines("event").into_iter().filter(|line| line["event"] == "plan");
        plans.map(|line| line["cut"].as_u64().unwrap()).collect()
    }
}

/// Serves a run with one client for each list of examples.
fn run(cut: usize, rounds: u32, initial: Adapter, planner: Option<Fixed>, clients: Vec<Vec<Example>>) -> Ran {
    run_on(&Engine::cpu(), (cut, rounds), initial, planner, clients)
}

fn run_on(
    engine: &Engine,
    (cut, rounds): (usize, u32),
    initial: Adapter,
    planner: Option<Fixed>,
    clients: Vec<Vec<Example>>,
) -> Ran {
    run_by(
        (Aggregation::Mean, &[]),
        engine,
        (cut, rounds),
        initial,
        planner,
        clients,
    )
}

/// Runs the servers with these clients to the end, aggregating in this way, with clients' own ranks where any are given.
fn run_by(
    (aggregation, ranks): (Aggregation, &[u32]),
    engine: &Engine,
    (cut, rounds): (usize, u32),
    initial: Adapter,
    planner: Option<Fixed>,
    clients: Vec<Vec<Example>>,
) -> Ran {
    let home = tempfile::tempdir().unwrap();
    let config = config();
    let mut examples = examples(&config);
    examples.truncate(3);
    let run = Run {
        model: Model {
            name: "legacy".to_owned(),
            digest: Digest([0; 32]),
            architecture: config.clone(),
            weights: weights(&config),
            holding: Holding::As(Format::F32),
            tokenizer: None,
        },
        engine: engine.clone(),
        training: training(&config, &initial.spec, rounds),
        cut,
        initial,
        validation: Some(examples),
        rounds,
        local_steps: LOCAL_STEPS,
        seed: SEED,
        shuffle: false,
        clients: clients.len() as u32,
        wait: Duration::from_secs(60),
        deadline: Deadline::Auto,
        quorum: None,
        aggregation,
        ranks: ranks.to_vec(),
        planner: planner.map(|planner| Box::new(planner) as Box<dyn Planner>),
    };
    let directory = RunDirectory::create(Some(&home.path().join("run")), "plan").unwrap();
    let settings = Settings {
        role: Role::Both,
        listen: vec!["http://127.0.0.1:0".parse().unwrap()],
        token: None,
        operator: None,
        hosts: Vec::new(),
        limits: Limits::default(),
        home: home.path().to_owned(),
        directory,
        demo_data: b"".into(),
        run: Some(run),
        interrupted: None,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let fetched = Arc::new(Mutex::new(Vec::new()));
    let (summary, clients) = runtime.block_on(async {
        let server = Server::start(settings, Box::new(|_| {})).await.unwrap();
        let origin = server.addresses()[0].local_url.parse::<JoinLink>().unwrap().origin;
        let (_stop, stopped) = watch::channel(false);
        let mut joined = Vec::new();
        for (number, examples) in clients.into_iter().enumerate() {
            let settings = native::Settings {
                server: origin.clone(),
                token: None,
                dialer: Dialer::new(&Trust::Known).unwrap(),
                name: format!("client {number}"),
                engine: engine.clone(),
                source: native::Source::Examples(examples),
                cache: home.path().join(format!("cache-{number}")),
                adapter_out: Some(home.path().join(format!("kept-{number}"))),
                give_up: Duration::from_secs(60),
                keep: None,
            };
            let fetched = fetched.clone();
            let note = move |report| {
                if let native::Report::Fetching { name, done, bytes } = report
                    && done == bytes
                {
                    fetched.lock().unwrap().push(name);
                }
            };
            joined.push(tokio::spawn(native::join(settings, stopped.clone(), note)));
        }
        let summary = server.serve().await;
        let mut clients = Vec::new();
        for client in joined {
            clients.push(client.await.unwrap().unwrap());
        }
        (summary, clients)
    });
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    let metrics = read(&home.path().join("run/metrics.jsonl"));
    let exported = home.path().join("run/adapter");
    let kept = (0..clients.len())
        .filter_map(|number| Adapter::load(&home.path().join(format!("kept-{number}")), &config).ok());
    let kept = kept.collect();
    Ran {
        kept,
        exported: Adapter::load(&exported, &config).ok(),
        metrics: metrics
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect(),
        fetched: fetched.lock().unwrap().clone(),
        summary,
        clients,
    }
}

/// The losses and the adapter of the same training on one device.
fn centralised(engine: &Engine, initial: &Adapter, rounds: u32) -> (Vec<f64>, Vec<f32>) {
    let config = config();
    let training = training(&config, &initial.spec, rounds);
    let source = weights(&config);
    let loaded = StackWeights::load(
        engine,
        &config,
        &mut HeldUnits {
            weights: &source,
            holding: Holding::As(Format::F32),
        },
    )
    .unwrap();
    let extent = Extent {
        batch: BATCH,
        seq: config.positions,
    };
    let mut whole = Central::new(engine, &config, loaded, Some(initial), extent, Some(training.optimizer)).unwrap();
    let mut batches = Batches::new(examples(&config), BATCH, config.positions, None).unwrap();
    let losses = (0..rounds * LOCAL_STEPS)
        .map(|_| {
            let batch = batches.next_batch();
            let counted = block_on(whole.step(&batch.tokens, &batch.targets, batch.seq)).unwrap();
            counted.loss_sum / counted.tokens as f64
        })
        .collect();
    (losses, block_on(whole.adapter()).unwrap())
}

#[track_caller]
fn assert_same(ran: &Ran, losses: &[f64], adapter: &[f32], what: &str) {
    let found = ran.losses();
    assert_eq!(found.len(), losses.len(), "{what}");
    for (step, (found, expected)) in found.iter().zip(losses).enumerate() {
        assert!(
            (found - expected).abs() <= 1e-6 * expected,
            "{what}, step {step}: {found}, not {expected}"
        );
    }
    let largest = adapter.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    assert_eq!(ran.adapter().values.len(), adapter.len(), "{what}");
    for (index, (found, expected)) in ran.adapter().values.iter().zip(adapter).enumerate() {
        assert!(
            (found - expected).abs() <= 1e-6 * largest,
            "{what}, value {index}: {found}, not {expected}"
        );
    }
}

#[test]
fn wherever_the_cut_moves_one_clients_training_is_that_of_one_device() {
    const ROUNDS: u32 = 5;
    let config = config();
    let initial = adapter(&config);
    let (losses, trained) = centralised(&Engine::cpu(), &initial, ROUNDS);
    let still = run(1, ROUNDS, initial.clone(), None, vec![examples(&config)]);
    assert_same(&still, &losses, &trained, "never moved");
    let heard = Arc::new(Mutex::new(Heard::default()));
    let planner = Fixed {
        heard: heard.clone(),
        ..Fixed::cuts(&[1, 2, 3, 1, 3])
    };
    let moved = run(1, ROUNDS, initial, Some(planner), vec![examples(&config)]);
    assert_same(&moved, &losses, &trained, "moved");
    assert_eq!(moved.cuts(), [1, 2, 3, 1, 3]);
    let valid = |ran: &Ran| -> Vec<f64> {
        ran.lines("round")
            .iter()
            .map(|line| line["valid_loss"].as_f64().unwrap())
            .collect()
    };
    for (found, expected) in valid(&moved).iter().zip(valid(&still)) {
        assert!((found - expected).abs() < 1e-6 * expected, "{found}, not {expected}");
    }
    assert_eq!(
        moved.fetched,
        ["embedding", "block.0", "block.1", "block.2"],
        "each part once"
    );
    assert_eq!(moved.clients[0].reason, FinishReason::Completed);
    assert_eq!(moved.clients[0].steps, u64::from(ROUNDS * LOCAL_STEPS));

    let heard = heard.lock().unwrap();
    let start = heard.start.as_ref().unwrap();
    let speed = start.clients[0].speed.expect("a client measures itself");
    assert!(speed.forward_flops_per_s > 1.0 && speed.backward_flops_per_s > 1.0);
    assert!(start.server_flops_per_s.unwrap() > 1.0);
    let facts: Vec<(u32, usize, bool)> = heard
        .rounds
        .iter()
        .map(|facts| (facts.round, facts.cut, facts.can_recut))
        .collect();
    assert_eq!(facts, [(1, 1, true), (2, 2, true), (3, 3, true), (4, 1, true)]);
    for facts in &heard.rounds {
        assert_eq!((facts.measured.len(), facts.measured[0].steps), (1, LOCAL_STEPS));
        assert!(facts.measured[0].activation_bits > 0.0 && facts.server_s.is_some());
        assert_eq!(
            facts.measured[0].federated_s.is_some(),
            facts.round > 1,
            "of the round before"
        );
    }
}

#[test]
fn the_cut_moves_on_a_gpu_as_well() {
    const ROUNDS: u32 = 3;
    let Some(engine) = Engine::gpu_for_tests() else { return };
    let config = config();
    let initial = adapter(&config);
    let (losses, trained) = centralised(&engine, &initial, ROUNDS);
    let clients = vec![examples(&config)];
    let moved = run_on(&engine, (1, ROUNDS), initial, Some(Fixed::cuts(&[2, 3, 1])), clients);
    assert_same(&moved, &losses, &trained, engine.name());
}

#[test]
fn the_run_begins_where_the_plan_says_at_its_rank() {
    const ROUNDS: u32 = 3;
    let config = config();
    let spec = |rank: usize| LoraSpec::new(rank, 2.0 * rank as f32, [Target::AttnQkv, Target::MlpFc]).unwrap();
    let fresh = |rank| Adapter::init(&config, &spec(rank), 0..config.blocks, SEED).unwrap();
    let planner = Fixed {
        rank: Some(5),
        ..Fixed::cuts(&[3, 2])
    };
    let ran = run(1, ROUNDS, fresh(2), Some(planner), vec![examples(&config)]);
    assert_eq!(ran.adapter().spec, spec(5));
    let (losses, trained) = centralised(&Engine::cpu(), &fresh(5), ROUNDS);
    assert_same(&ran, &losses, &trained, "rank 5 from the cut after 3");

    // A given adapter brings its own rank.
    let planner = Fixed {
        rank: Some(5),
        ..Fixed::default()
    };
    let ran = run_to_error(planner);
    assert!(ran.contains("starts from an adapter"), "{ran}");
}

/// What a run with a given adapter ends with.
fn run_to_error(planner: Fixed) -> String {
    let config = config();
    let ran = run(1, 2, adapter(&config), Some(planner), vec![examples(&config)]);
    ran.summary.unwrap_err().to_string()
}

/// An assignment of the first `cut` blocks, and the files it names.
fn assign(cut: usize) -> (Assignment, Vec<Vec<u8>>) {
    let config = config();
    let spec = adapter(&config).spec;
    let run = RunConfig {
        rank: spec.rank as u32,
        alpha: spec.alpha,
        wire: WireForm::F32,
        seed: SEED,
        shuffle: false,
        local_steps: LOCAL_STEPS,
        rounds: 2,
        optimizer: OptimizerSettings {
            lr: 1e-3,
            weight_decay: 0.0,
            total_steps: 6,
            ..OptimizerSettings::default()
        },
        ..RunConfig::new(
            cut as u32,
            (2, 8),
            (config.width as u32, config.vocab as u32),
            spec.targets.iter().map(|target| target.module()),
        )
    };
    local::assign(RunId([1; 16]), run, &weights(&config), Holding::As(Format::F32)).unwrap()
}

/// What a client is asked to do, as far as its driver checks it.
#[test]
fn an_assignment_that_cannot_be_is_refused_with_what_is_wrong() {
    let config = config();
    let assignment = |cut| assign(cut).0;
    assert_eq!(Plan::new(&assignment(3)).unwrap().cut, 3);
    let refused = |assignment: Assignment| Plan::new(&assignment).unwrap_err().to_string();
    for cut in [0, config.blocks, usize::MAX >> 33] {
        let error = refused(Assignment {
            config: RunConfig {
                split: cut as u32,
                ..assignment(1).config
            },
            ..assignment(1)
        });
        assert!(error.contains("a block on each side"), "{error}");
    }
    let more = refused(Assignment {
        adapter_len: assignment(1).adapter_len,
        ..assignment(2)
    });
    assert!(more.contains("an adapter of"), "{more}");
    let parts = refused(Assignment {
        weights: assignment(1).weights,
        ..assignment(2)
    });
    assert!(parts.contains("model parts"), "{parts}");
    let rank = refused(Assignment {
        config: RunConfig {
            rank: 0,
            ..assignment(2).config
        },
        ..assignment(2)
    });
    assert!(rank.contains("rank 0"), "{rank}");

    let own = |block, target: &str, alpha| OwnAlpha {
        block,
        target: target.to_owned(),
        alpha,
    };
    let with = |alphas| Assignment {
        alphas,
        ..assignment(2)
    };
    let plan = Plan::new(&with(vec![own(0, "attn.c_attn", 3.0), own(1, "attn.c_attn", 1e-3)])).unwrap();
    assert_eq!(plan.cut, 2);
    for (alphas, wrong) in [
        (vec![own(0, "c_proj", 1.0)], "alpha of the targets `c_proj`"),
        (vec![own(0, "q_proj", 1.0)], "`q_proj` is no LoRA target"),
        (vec![own(0, "c_attn", 0.0)], "alpha 0 must be"),
        (vec![own(0, "c_attn", f32::NAN)], "alpha NaN must be"),
        (vec![own(1, "c_attn", 1.0), own(0, "c_attn", 1.0)], "ordered by block"),
        (vec![own(1, "c_attn", 1.0), own(1, "c_attn", 1.0)], "each named once"),
        (vec![own(1, "c_fc", 1.0)], "an adapter of"),
    ] {
        let error = refused(with(alphas));
        assert!(error.contains(wrong), "{error}");
    }
}

#[test]
fn parts_taken_from_files_compute_what_parts_taken_from_memory_do() {
    let engine = Engine::cpu();
    let (assignment, files) = assign(2);
    let plan = Plan::new(&assignment).unwrap();
    let loader = || Loader::new(&engine, &plan, || Duration::ZERO, None).unwrap();
    let (mut stored, mut held) = (loader(), loader());
    for bytes in &files {
        stored.add_stored(Cursor::new(bytes.clone())).unwrap();
        held.add(bytes.clone()).unwrap();
    }
    let key = StepKey {
        round: RoundKey { round: 0, attempt: 0 },
        step: 0,
    };
    let [stored, held] = [stored, held].map(|loader| {
        let mut learner = loader.finish(examples(&config())).unwrap();
        block_on(learner.forward(key)).unwrap()
    });
    assert_eq!(stored.tensor, held.tensor);
    assert_eq!(stored.targets, held.targets);
}

#[test]
fn parts_in_damaged_files_are_refused_and_the_right_ones_taken_after_them() {
    let engine = Engine::cpu();
    let (assignment, files) = assign(1);
    let mut loader = Loader::new(&engine, &Plan::new(&assignment).unwrap(), || Duration::ZERO, None).unwrap();
    for (blob, bytes) in assignment.weights.iter().zip(files) {
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 1;
        let longer = [&bytes[..], &[0]].concat();
        for damaged in [flipped, bytes[..bytes.len() - 1].to_vec(), longer, Vec::new()] {
            let error = loader.add_stored(Cursor::new(damaged)).unwrap_err();
            assert!(
                matches!(&error, client::Error::Hash { name } if *name == blob.name),
                "{error}"
            );
        }
        loader.add_stored(Cursor::new(bytes)).unwrap();
    }
    assert!(loader.missing().is_empty());
}

#[test]
fn what_is_on_the_device_is_used_again_for_the_same_model_only() {
    let engine = Engine::cpu();
    let clock = || Duration::ZERO;
    let (first, files) = assign(2);
    let held = || {
        let mut loader = Loader::new(&engine, &Plan::new(&first).unwrap(), clock, None).unwrap();
        for bytes in &files {
            loader.add(bytes.clone()).unwrap();
        }
        let learner = loader.finish(examples(&config())).unwrap();
        Some(block_on(learner.release()).unwrap())
    };
    let missing = |assignment: &Assignment| {
        let mut loader = Loader::new(&engine, &Plan::new(assignment).unwrap(), clock, held()).unwrap();
        let missing: Vec<String> = loader.missing().iter().map(|blob| blob.name.clone()).collect();
        (missing, loader.take_data().is_some())
    };
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    assert_eq!(missing(&assign(1).0), (names(&[]), true));
    assert_eq!(missing(&assign(3).0), (names(&["block.2"]), true));
    let mut changed = assign(3).0;
    changed.weights[2].sha256 = Digest([7; 32]);
    assert_eq!(missing(&changed), (names(&["block.1", "block.2"]), true));
    let other_run = Assignment {
        run: RunId([2; 16]),
        ..assign(3).0
    };
    assert_eq!(
        missing(&other_run),
        (names(&["block.2"]), false),
        "another run may read the text otherwise"
    );
    let other_heads = Assignment {
        model_config: assign(2).0.model_config.replace("\"n_head\":4", "\"n_head\":2"),
        ..assign(2).0
    };
    assert_eq!(
        missing(&other_heads),
        (names(&["embedding", "block.0", "block.1"]), false)
    );
}

#[test]
fn a_plan_that_cannot_be_carried_out_ends_the_run_with_its_sentence() {
    let failing = Fixed {
        fails: true,
        ..Fixed::default()
    };
    let error = run_to_error(failing);
    assert!(error.contains("the test has had enough"), "{error}");
    for (cuts, words) in [
        (&[0][..], "leaves one side"),
        (&[4], "leaves one side"),
        (&[1, 9], "leaves one side"),
    ] {
        let error = run_to_error(Fixed::cuts(cuts));
        assert!(error.contains(words), "{cuts:?}: {error}");
    }
    let impossible = Fixed {
        rates: Some(LinkRates {
            main_bits_per_s: f64::NAN,
            federated_bits_per_s: 1e6,
        }),
        ..Fixed::default()
    };
    let error = run_to_error(impossible);
    assert!(error.contains("impossible link rates"), "{error}");
}

fn own(cut: usize, own: &[usize]) -> Fixed {
    Fixed {
        own: own.to_vec(),
        ..Fixed::cuts(&[cut])
    }
}

/// The fixture's examples, divided among three.
fn thirds(config: &Architecture) -> Vec<Vec<Example>> {
    let examples = examples(config);
    let third = examples.len() / 3;
    vec![
        examples[..third].to_vec(),
        examples[third..2 * third].to_vec(),
        examples[2 * third..].to_vec(),
    ]
}

#[test]
fn clients_with_cuts_of_their_own_train_one_model() {
    const ROUNDS: u32 = 3;
    let config = config();
    let initial = adapter(&config);
    let ran = |planner: Fixed| run(1, ROUNDS, initial.clone(), Some(planner), thirds(&config));
    let mixed = ran(own(1, &[2, 1, 3]));
    let summary = mixed.summary.as_ref().unwrap();
    assert_eq!(
        (summary.rounds, summary.steps),
        (ROUNDS, u64::from(ROUNDS * LOCAL_STEPS))
    );
    for client in &mixed.clients {
        assert_eq!(client.reason, FinishReason::Completed);
    }
    // Before the first round each block is the initial one wherever it is run, so the first losses are those of one cut.
    let one = ran(Fixed::cuts(&[1]));
    let (losses, of_one) = (mixed.losses(), one.losses());
    assert!(
        (losses[0] - of_one[0]).abs() < 1e-6 * of_one[0],
        "{losses:?}, {of_one:?}"
    );
    // What is exported is what was validated, and what each client ends with.
    let exported = mixed.adapter();
    for (kept, cut) in mixed.kept.iter().zip([2, 1, 3]) {
        let own = exported.slice(&config, 0..cut).unwrap();
        assert_eq!(kept.values, own.values, "cut {cut}");
    }
    let valid = mixed.lines("round").last().unwrap()["valid_loss"].as_f64().unwrap();
    let source = weights(&config);
    let engine = Engine::cpu();
    let loaded = StackWeights::load(
        &engine,
        &config,
        &mut HeldUnits {
            weights: &source,
            holding: Holding::As(Format::F32),
        },
    )
    .unwrap();
    let extent = Extent {
        batch: BATCH,
        seq: config.positions,
    };
    let mut whole = Central::new(&engine, &config, loaded, Some(exported), extent, None).unwrap();
    let mut validation = examples(&config);
    validation.truncate(3);
    let (mut sum, mut tokens) = (0.0, 0);
    for batch in sflllm::data::pass(&validation, BATCH, config.positions).unwrap() {
        let counted = block_on(whole.loss(&batch.tokens, &batch.targets, batch.seq)).unwrap();
        sum += counted.loss_sum;
        tokens += counted.tokens;
    }
    assert!(
        (sum / tokens as f64 - valid).abs() < 1e-9 * valid,
        "{} and {valid}",
        sum / tokens as f64
    );
    assert!(
        valid < mixed.lines("round")[0]["valid_loss"].as_f64().unwrap(),
        "it learns"
    );

    // The same again, to the bit: who joins first makes no difference to sums, but for their order.
    let largest = exported
        .values
        .iter()
        .fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let again = ran(own(1, &[2, 1, 3]));
    for (found, expected) in again.adapter().values.iter().zip(&exported.values) {
        assert!((found - expected).abs() <= 1e-5 * largest, "{found}, not {expected}");
    }
}

#[test]
fn equal_cuts_of_their_own_are_one_cut_for_all() {
    let config = config();
    let initial = adapter(&config);
    let ran = |planner: Fixed| run(1, 2, initial.clone(), Some(planner), vec![examples(&config)]);
    let (one, own) = (ran(Fixed::cuts(&[2])), ran(own(2, &[2])));
    assert_eq!(own.losses(), one.losses());
    assert_eq!(own.adapter(), one.adapter());
}

#[test]
fn cuts_of_their_own_that_cannot_be_end_the_run_with_a_sentence() {
    for (cut, cuts, words) in [
        (1, &[4][..], "leaves one side"),
        (1, &[0], "leaves one side"),
        (2, &[3], "the smallest of its clients'"),
    ] {
        let error = run_to_error(own(cut, cuts));
        assert!(error.contains(words), "{cuts:?}: {error}");
    }
}

#[test]
fn what_was_measured_stands_beside_what_was_predicted() {
    let config = config();
    let examples = examples(&config);
    let halves = vec![examples[..4].to_vec(), examples[4..].to_vec()];
    let planner = Fixed {
        rates: LinkRates::new(2e8, 2e8),
        ..Fixed::cuts(&[2, 1])
    };
    let ran = run(1, 2, adapter(&config), Some(planner), halves);
    ran.summary.as_ref().unwrap();
    let steps = ran.lines("step");
    assert_eq!(steps.len() as u32, 2 * LOCAL_STEPS);
    for step in steps {
        let phases = step["phases"].as_array().unwrap();
        assert_eq!(phases.len(), 2, "{step}");
        for phase in phases {
            for field in ["forward_s", "upload_s", "download_s", "backward_s"] {
                assert!(phase[field].as_f64().unwrap() >= 0.0, "{field} of {phase}");
            }
            assert!(phase["forward_s"].as_f64().unwrap() > 0.0 && phase["backward_s"].as_f64().unwrap() > 0.0);
        }
    }
    let rounds = &ran.lines("round")[1..];
    let predicted: Vec<Option<f64>> = rounds.iter().map(|round| round["predicted_s"].as_f64()).collect();
    assert_eq!(predicted, [Some(1.5), None], "the second plan predicts nothing");
    for round in rounds {
        assert!(round["measured_s"].as_f64().unwrap() > 0.0);
        assert!(round["server"]["measured_s"].as_f64().unwrap() > 0.0);
        for client in round["phases"].as_array().unwrap() {
            assert!(client["measured"]["federated_s"].as_f64().unwrap() > 0.0, "{client}");
        }
    }
    assert_eq!(rounds[0]["phases"][0]["predicted"]["forward_s"], 0.5);
    assert_eq!(rounds[0]["server"]["predicted_s"], 0.25);
    assert_eq!(rounds[1]["phases"][0]["predicted"], Value::Null);
    let plans: Vec<&Value> = ran
        .lines("event")
        .into_iter()
        .filter(|line| line["event"] == "plan")
        .collect();
    assert_eq!(
        (&plans[0]["reason"], plans[0]["rates"][1]["main_bits_per_s"].as_f64()),
        (&"as the test says".into(), Some(2e8))
    );
}

/// A fresh adapter of rank 4, of which these matrices are trained.
fn fresh(trained: Trained) -> Adapter {
    let config = config();
    let spec = LoraSpec {
        trained,
        ..LoraSpec::new(4, 8.0, [Target::AttnQkv, Target::MlpProj]).unwrap()
    };
    Adapter::init(&config, &spec, 0..config.blocks, SEED).unwrap()
}

/// So many clients' parts of the examples.
fn parts(count: usize) -> Vec<Vec<Example>> {
    let examples = examples(&config());
    examples
        .chunks(examples.len().div_ceil(count))
        .map(<[Example]>::to_vec)
        .collect()
}

/// Mean loss of the validation examples on one device.
fn valid_loss(adapter: &Adapter) -> f64 {
    let config = config();
    let source = weights(&config);
    let mut units = HeldUnits {
        weights: &source,
        holding: Holding::As(Format::F32),
    };
    let loaded = StackWeights::load(&Engine::cpu(), &config, &mut units).unwrap();
    let extent = Extent {
        batch: BATCH,
        seq: config.positions,
    };
    let mut whole = Central::new(&Engine::cpu(), &config, loaded, Some(adapter), extent, None).unwrap();
    let mut examples = examples(&config);
    examples.truncate(3);
    let (mut loss, mut tokens) = (0.0, 0);
    for batch in sflllm::data::pass(&examples, BATCH, config.positions).unwrap() {
        let counted = block_on(whole.loss(&batch.tokens, &batch.targets, batch.seq)).unwrap();
        loss += counted.loss_sum;
        tokens += counted.tokens;
    }
    loss / tokens as f64
}

#[test]
fn with_frozen_a_wherever_the_cut_moves_one_clients_training_is_that_of_one_device() {
    const ROUNDS: u32 = 4;
    let initial = fresh(Trained::B);
    for engine in [Some(Engine::cpu()), Engine::gpu_for_tests()].into_iter().flatten() {
        let (losses, trained) = centralised(&engine, &initial, ROUNDS);
        let ffa = (Aggregation::Ffa, &[][..]);
        let planner = Some(Fixed::cuts(&[1, 3, 2, 1]));
        let one = vec![examples(&config())];
        let moved = run_by(ffa, &engine, (1, ROUNDS), initial.clone(), planner, one);
        assert_same(&moved, &losses, &trained, "frozen A");
        for entry in initial.layout.entries() {
            assert_eq!(
                trained[entry.range_a()],
                initial.values[entry.range_a()],
                "not a bit of A"
            );
            assert_eq!(moved.adapter().values[entry.range_a()], initial.values[entry.range_a()]);
            assert!(
                moved.adapter().values[entry.range_b()]
                    .iter()
                    .any(|value| *value != 0.0)
            );
        }
    }
}

#[test]
fn with_frozen_a_only_b_crosses_and_its_mean_misses_nothing() {
    let ran = |aggregation: Aggregation| {
        let initial = fresh(aggregation.trained());
        run_by((aggregation, &[]), &Engine::cpu(), (2, 2), initial, None, parts(3))
    };
    let (mean, ffa) = (ran(Aggregation::Mean), ran(Aggregation::Ffa));
    let last = |ran: &Ran| ran.lines("round").last().copied().cloned().unwrap();
    assert_eq!(
        (&last(&ffa)["aggregation"], &last(&ffa)["averaging_error"]),
        (&"ffa".into(), &0.0.into())
    );
    assert!(last(&mean)["averaging_error"].as_f64().unwrap() > 1e-3);
    // Of every block 4 · (64 + 192 + 256 + 64) values, of which 4 · (192 + 64) are B's.
    let values = |ran: &Ran| last(ran)["adapter_bytes"].as_u64().unwrap() / 3 / 4;
    let (all, of_b) = (2 * 4 * (64 + 192 + 256 + 64), 2 * 4 * (192 + 64));
    assert!((all..all + 64).contains(&values(&mean)) && (of_b..of_b + 64).contains(&values(&ffa)));
}

#[test]
fn what_is_exact_is_saved_and_validated_at_the_rank_it_takes() {
    for aggregation in [Aggregation::Flora, Aggregation::Fedex] {
        let initial = fresh(Trained::Both);
        let clients = parts(3);
        let ran = run_by((aggregation, &[]), &Engine::cpu(), (2, 3), initial, None, clients);
        assert!(ran.summary.is_ok(), "{:?}", ran.summary.err());
        for entry in ran.adapter().layout.entries() {
            let expected = if entry.block < 2 { 12 } else { 4 };
            assert_eq!(
                (entry.rank, entry.scale),
                (expected, 2.0),
                "{aggregation}, block {}",
                entry.block
            );
        }
        let line = ran.lines("round").last().copied().cloned().unwrap();
        let (found, expected) = (line["valid_loss"].as_f64().unwrap(), valid_loss(ran.adapter()));
        assert!((found - expected).abs() < 1e-6 * expected, "{found}, not {expected}");
        let error = |name: &str| line[name].as_f64().unwrap();
        let (averaging, start) = (error("averaging_error"), error("start_error"));
        assert!(averaging > 1e-4, "{averaging}");
        match aggregation {
            Aggregation::Flora => assert!(start < averaging, "{start}, not below {averaging}"),
            _ => assert_eq!(start, averaging),
        }
    }
}

#[test]
fn clients_of_other_ranks_train_together_and_keep_their_own() {
    for aggregation in Aggregation::ALL.iter().copied() {
        let initial = fresh(aggregation.trained());
        let by = (aggregation, &[4, 1, 2][..]);
        let mut ran = run_by(by, &Engine::cpu(), (1, 2), initial, None, parts(3));
        let summary = ran.summary.as_ref().unwrap();
        assert!(
            summary.rounds == 2
                && ran
                    .clients
                    .iter()
                    .all(|client| client.reason == FinishReason::Completed)
        );
        ran.kept.sort_by_key(|kept| kept.spec.rank);
        let kept: Vec<(usize, f32)> = ran.kept.iter().map(|kept| (kept.spec.rank, kept.spec.alpha)).collect();
        assert_eq!(kept, [(1, 2.0), (2, 4.0), (4, 8.0)], "{aggregation}");
        let line = ran.lines("round").last().copied().cloned().unwrap();
        assert_eq!(line["adapters"], 3);
        assert!(line["excluded"].as_array().unwrap().is_empty(), "{line}");
        // Each has the first rows and columns of the widest.
        let widest = &ran.kept[2];
        let shape = widest.layout.shape().unwrap();
        for narrow in &ran.kept[..2] {
            let expected = shape.narrow(&widest.values, 1, narrow.spec.rank);
            assert_eq!(narrow.values, expected, "{aggregation}, rank {}", narrow.spec.rank);
        }
    }
}

#[test]
fn products_of_any_rank_take_the_place_of_an_adapters_first_blocks() {
    let config = config();
    let adapter = fresh(Trained::Both);
    // Two blocks of (64 to 192) and (256 to 64), one of them without any product.
    let ranks = [3, 0, 1, 2];
    let len = 3 * (64 + 192) + (64 + 192) + 2 * (256 + 64);
    let values: Vec<f32> = (0..len).map(|index| index as f32 / len as f32).collect();
    let with = adapter.with_products(&config, &ranks, &values).unwrap();
    let found: Vec<(usize, usize, f32)> = (with.layout.entries().iter())
        .map(|entry| (entry.block, entry.rank, entry.scale))
        .collect();
    assert_eq!(found[..3], [(0, 3, 2.0), (1, 1, 2.0), (1, 2, 2.0)]);
    assert!(
        found[3..]
            .iter()
            .all(|&(block, rank, scale)| block >= 2 && (rank, scale) == (4, 2.0))
    );
    let above = adapter.layout.range(2..4);
    assert_eq!(with.values, [values.as_slice(), &adapter.values[above]].concat());
    let home = tempfile::tempdir().unwrap();
    with.save(home.path(), &config, "").unwrap();
    let loaded = Adapter::load(home.path(), &config).unwrap();
    assert_eq!(
        (loaded.layout.entries(), &loaded.values),
        (with.layout.entries(), &with.values)
    );
    assert!(adapter.with_products(&config, &ranks, &values[1..]).is_err());
    assert!(adapter.with_products(&config, &[1; 9], &values).is_err());
    assert!(with.layout.shape().is_none(), "its blocks differ");
}
