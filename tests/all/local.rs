//! Runs in one thread: the sessions joined without a network, the model's parts answering them.

use std::time::Duration;

use pollster::block_on;
use sflllm::client::{Learner, Loader, Plan, capabilities, local};
use sflllm::compute::Engine;
use sflllm::data::{Batches, Example};
use sflllm::model::adapter::Adapter;
use sflllm::model::architecture::Architecture;
use sflllm::model::central::Central;
use sflllm::model::stack::StackWeights;
use sflllm::model::weights::{HeldUnits, Holding, Weights};
use sflllm::model::workspace::Extent;
use sflllm::protocol::message::RunConfig;
use sflllm::protocol::*;
use sflllm::split::ServerPart;
use sflllm::terms::format::Format;
use sflllm::terms::ids::RunId;
use sflllm::terms::tensor::WireForm;

const HOLDING: Holding = Holding::As(Format::F32);
const BATCH: u32 = 2;
const SEQ: u32 = 6;
const ROUNDS: u32 = 3;
const LOCAL_STEPS: u32 = 4;

/// Three blocks, grouped heads, a head of its own.
fn model() -> Architecture {
    Architecture::from_json(
        r#"{"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1,
            "head_dim": 4, "intermediate_size": 20, "vocab_size": 17, "max_position_embeddings": 8, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false}"#,
    )
    .unwrap()
}

fn examples(client: u32) -> Vec<Example> {
    let text = |index: u32| Example::text((0..SEQ).map(|at| (3 * index + at * (client + 1)) % 17).collect());
    (client..client + 5).map(text).collect()
}

fn units(weights: &Weights) -> HeldUnits<'_> {
    HeldUnits {
        weights,
        holding: HOLDING,
    }
}

/// A run with its model.
struct Trainer {
    plan: Plan,
    parts: Vec<Vec<u8>>,
    run: LocalRun,
    learners: Vec<Learner>,
    server: ServerPart,
    initial: Adapter,
    now: Duration,
    losses: Vec<f64>,
    average: Vec<f32>,
    end: Option<RunEnd>,
}

impl Trainer {
    fn new(cut: u32, clients: u32) -> Trainer {
        let (model, engine) = (model(), Engine::cpu());
        let weights = Weights::random(&model, 3).unwrap();
        let config = RunConfig {
            rounds: ROUNDS,
            local_steps: LOCAL_STEPS,
            shuffle: false,
            wire: WireForm::F32,
            ..RunConfig::new(cut, (BATCH, SEQ), (12, 17), ["q_proj", "up_proj"])
        };
        let (assignment, parts) = local::assign(RunId([1; 16]), config, &weights, HOLDING).unwrap();
        let plan = Plan::new(&assignment).unwrap();
        let initial = Adapter::init(&model, &plan.training.spec, 0..model.blocks, 5).unwrap();
        let [below, above] =
            [0..plan.cut, plan.cut..model.blocks].map(|blocks| initial.slice(&model, blocks).unwrap().values);
        let server = ServerPart::new(&engine, &model, &mut units(&weights), plan.cut, &plan.training, &above).unwrap();
        let config = MainConfig::new(Placement::new(assignment, below), [2; 32], clients);
        let main = MainServerSession::new(config, Duration::ZERO).unwrap();
        let session = |client: u32| {
            let config = ClientConfig::new(client.to_string(), capabilities(engine.name(), 0));
            ClientSession::new(config, Duration::ZERO)
        };
        let mut trainer = Trainer {
            plan,
            parts,
            run: LocalRun::new(main, (0..clients).map(session)),
            learners: Vec::new(),
            server,
            initial,
            now: Duration::ZERO,
            losses: Vec::new(),
            average: Vec::new(),
            end: None,
        };
        (0..clients).for_each(|client| trainer.load(client));
        trainer
    }

    /// The next client's part and data.
    fn load(&mut self, client: u32) {
        let mut loader = Loader::new(&Engine::cpu(), &self.plan, || Duration::ZERO, None).unwrap();
        for part in &self.parts {
            loader.add(part.clone()).unwrap();
        }
        self.learners.push(loader.finish(examples(client)).unwrap());
    }

    /// Answers what comes until nothing does. What was only told is returned.
    fn go_on(&mut self) -> Vec<LocalEvent> {
        self.go_on_while(|_| true)
    }

    fn go_on_while(&mut self, more: impl Fn(&Trainer) -> bool) -> Vec<LocalEvent> {
        let mut told = Vec::new();
        while more(self)
            && let Some(event) = self.run.next(self.now)
        {
            match event {
                LocalEvent::Client(place, event) => {
                    let session = &mut self.run.clients[place];
                    let event = block_on(self.learners[place].answer(session, self.now, event)).unwrap();
                    told.extend(event.map(|event| LocalEvent::Client(place, event)));
                }
                LocalEvent::Main(MainEvent::Contribution { key, contribution }) => {
                    let output = block_on(local::contribute(&mut self.server, &contribution)).unwrap();
                    let client = contribution.client;
                    self.run.main.contributed(self.now, key, client, Some(output)).unwrap();
                }
                LocalEvent::Main(MainEvent::CloseStep { lanes, .. }) => {
                    self.losses.push(self.server.close(&lanes).unwrap().loss);
                }
                LocalEvent::Main(MainEvent::RoundClosed { round, average, .. }) => {
                    self.average = average;
                    self.run.main.validated(self.now, round, None, None).unwrap();
                }
                LocalEvent::Main(MainEvent::Finished { reason }) => self.end = Some(reason),
                told_only => told.push(told_only),
            }
        }
        told
    }

    /// The whole model's adapter.
    fn adapter(&self) -> Vec<f32> {
        let above = block_on(self.server.adapter()).unwrap();
        self.average.iter().copied().chain(above).collect()
    }
}

#[test]
fn one_client_at_any_cut_trains_as_one_device_does() {
    let model = model();
    for cut in [1, 2] {
        let mut trainer = Trainer::new(cut, 1);
        let told = trainer.go_on();
        assert_eq!(trainer.end, Some(RunEnd::Completed));
        let finished = ClientEvent::Finished(FinishReason::Completed);
        assert!(told.contains(&LocalEvent::Client(0, finished)), "{told:?}");
        assert!(told.contains(&LocalEvent::Main(MainEvent::Drained)), "{told:?}");

        let weights = Weights::random(&model, 3).unwrap();
        let engine = Engine::cpu();
        let held = StackWeights::load(&engine, &model, &mut units(&weights)).unwrap();
        let (batch, seq) = (BATCH as usize, SEQ as usize);
        let optimizer = trainer.plan.training.optimizer;
        let extent = Extent { batch, seq };
        let mut whole = Central::new(&engine, &model, held, Some(&trainer.initial), extent, Some(optimizer)).unwrap();
        let mut batches = Batches::new(examples(0), batch, seq, None).unwrap();
        assert_eq!(trainer.losses.len(), (ROUNDS * LOCAL_STEPS) as usize);
        for (step, found) in trainer.losses.iter().enumerate() {
            let batch = batches.next_batch();
            let counted = block_on(whole.step(&batch.tokens, &batch.targets, batch.seq)).unwrap();
            let expected = counted.loss_sum / counted.tokens as f64;
            assert!(
                (found - expected).abs() <= 1e-6 * expected,
                "cut {cut}, step {step}: {found}, not {expected}"
            );
        }
        let (found, expected) = (trainer.adapter(), block_on(whole.adapter()).unwrap());
        assert_eq!(found.len(), expected.len());
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(
                (found - expected).abs() <= 1e-5,
                "cut {cut}, value {index}: {found}, not {expected}"
            );
        }
    }
}

#[test]
fn a_client_whose_connection_is_cut_comes_back_and_the_run_goes_on() {
    for endpoint in [Endpoint::Main, Endpoint::Federated] {
        let mut trainer = Trainer::new(1, 2);
        trainer.go_on_while(|trainer| trainer.losses.is_empty());
        assert_eq!(trainer.losses.len(), 1, "the first step is done, and no more");
        trainer.run.cut(1, endpoint, Duration::ZERO);
        let mut told = trainer.go_on();
        while trainer.end.is_none() {
            trainer.now = trainer.run.poll_timeout().expect("somebody waits");
            trainer.run.handle_timeout(trainer.now);
            told.extend(trainer.go_on());
        }
        let lost = |event: &LocalEvent| matches!(event, LocalEvent::Client(1, ClientEvent::ConnectionLost { endpoint: lost, .. }) if *lost == endpoint);
        assert_eq!(told.iter().filter(|event| lost(event)).count(), 1, "{told:?}");
        assert_eq!(trainer.end, Some(RunEnd::Completed));
        let finished = |place| LocalEvent::Client(place, ClientEvent::Finished(FinishReason::Completed));
        assert!(told.contains(&finished(0)), "{told:?}");
        // Without the main server it misses the rest of the round, and joins the next: that it does, if there is still one.
        if endpoint == Endpoint::Federated {
            assert!(told.contains(&finished(1)), "{told:?}");
        }
    }
}

#[test]
fn who_joins_later_learns_from_the_next_round_on() {
    let mut trainer = Trainer::new(1, 1);
    trainer.load(1);
    let config = ClientConfig::new("late", capabilities("CPU", 0));
    assert_eq!(trainer.run.join(ClientSession::new(config, Duration::ZERO)), 1);
    let told = trainer.go_on();
    let members: Vec<usize> = (told.iter())
        .filter_map(|event| match event {
            LocalEvent::Main(MainEvent::RoundStarted { members, .. }) => Some(members.len()),
            _ => None,
        })
        .collect();
    assert_eq!(members.first(), Some(&1), "one is enough to begin");
    assert_eq!(members.last(), Some(&2));
    assert_eq!(trainer.end, Some(RunEnd::Completed));
}
