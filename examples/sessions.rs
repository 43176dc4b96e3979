//! The machines of a main server, a federated server and a client in one process, without sockets: one training step of a split
//! model, and the round's average.
//!
//! `cargo run --release --no-default-features --example sessions`

#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::time::Duration;

use pollster::block_on;
use sflllm::compute::Engine;
use sflllm::model::adapter::{Adapter, LoraSpec, Target};
use sflllm::model::architecture::Architecture;
use sflllm::model::ends::embedding::Embedding;
use sflllm::model::unit::Unit;
use sflllm::model::weights::{HeldUnits, Holding, Weights};
use sflllm::protocol::message::{Assignment, Capabilities, Digest, PROTOCOL_VERSION, RunConfig};
use sflllm::protocol::*;
use sflllm::split::{self, ClientPart, ServerPart, Training};
use sflllm::terms::adapter::Trained;
use sflllm::terms::format::Format;
use sflllm::terms::ids::RunId;
use sflllm::terms::moments::MomentPolicy;
use sflllm::terms::optimizer::OptimizerSettings;
use sflllm::terms::tensor::WireForm;

/// Blocks at the client.
const CUT: usize = 1;

pub fn main() -> Result<(), Box<dyn Error>> {
    // The two parts of the model.
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let model = Architecture::load(&directory)?;
    let weights = Weights::open(&directory, &model)?;
    let holding = Holding::As(Format::F16);
    let spec = LoraSpec::new(4, 8.0, [Target::AttnQkv])?;
    let training = Training {
        spec: spec.clone(),
        optimizer: OptimizerSettings::default(),
        batch: 2,
        seq: 4,
        wire: WireForm::F16,
    };
    let adapter = Adapter::init(&model, &spec, 0..model.blocks, 1)?;
    let (below, above) = (
        adapter.slice(&model, 0..CUT)?,
        adapter.slice(&model, CUT..model.blocks)?,
    );
    let engine = Engine::cpu();
    let mut units = HeldUnits {
        weights: &weights,
        holding,
    };
    let embedding = Embedding::held(&model, weights.unit(Unit::Embedding, holding)?);
    let blocks = [weights.unit(Unit::Block(0), holding)?];
    let mut client_part = ClientPart::new(&engine, &model, embedding, &blocks, &training, &below.values)?;
    let mut server_part = ServerPart::new(&engine, &model, &mut units, CUT, &training, &above.values)?;

    // The three sessions. Time is an argument; nothing here needs it to pass.
    let now = Duration::ZERO;
    let run = RunId([1; 16]);
    let assignment = Assignment {
        run,
        number: 0,
        config: RunConfig {
            split: CUT as u32,
            rank: 4,
            alpha: 8.0,
            targets: vec!["c_attn".to_owned()],
            weights: Format::F16,
            wire: training.wire,
            batch: 2,
            seq: 4,
            width: model.width as u32,
            vocab: model.vocab as u32,
            seed: 1,
            shuffle: false,
            local_steps: 1,
            rounds: 1,
            optimizer: training.optimizer,
            moments: MomentPolicy::Keep,
        },
        model_config: String::new(),
        weights: Vec::new(),
        tokenizer: Vec::new(),
        adapter_len: below.values.len() as u64,
        alphas: Vec::new(),
        trained: Trained::Both,
    };
    let mut main = MainServerSession::new(
        MainConfig {
            version: PROTOCOL_VERSION,
            run,
            ticket_key: [2; 32],
            ticket_lifetime: Duration::from_secs(3600),
            secret: None,
            clients: 1,
            max_clients: 1,
            placement: Placement {
                assignment,
                adapter: below.values.clone(),
                moments: None,
                cuts: BTreeMap::new(),
                rule: None,
                ranks: Vec::new(),
            },
            largest_update: below.values.len() as u64,
            plans: false,
            model: Digest::of(b"demo"),
            tokenizer: Digest::of(b"demo"),
            federated_url: None,
            ping_interval: PING_INTERVAL,
            wait_for_client: Duration::from_secs(60),
            deadline: Deadline::Auto,
            quorum: None,
        },
        now,
    )?;
    let mut federated = FederatedServerSession::new(FederatedConfig {
        version: PROTOCOL_VERSION,
        control: ControlAccess::Local,
        aggregation: None,
        max_clients: 1,
        ping_interval: PING_INTERVAL,
    });
    let mut client = ClientSession::new(
        ClientConfig {
            version: PROTOCOL_VERSION,
            name: "Ada".to_owned(),
            capabilities: Capabilities {
                forms: vec![training.wire],
                memory_bytes: 1 << 30,
                device: engine.name().to_owned(),
            },
            model: None,
            tokenizer: None,
            secret: None,
            retries: 0,
        },
        now,
    );

    // A driver: bytes from one machine to another, and answers to what they ask for.
    let connection = ConnectionId(1);
    loop {
        while let Some(event) = client.poll_event() {
            match event {
                ClientEvent::Connect { endpoint, .. } => {
                    match endpoint {
                        Endpoint::Main => main.connected(connection, now),
                        Endpoint::Federated => federated.connected(connection, now),
                    }
                    client.connected(endpoint, now);
                }
                ClientEvent::Assigned(_) => client.ready(now, None),
                ClientEvent::InstallAdapter { values, .. } => client_part.set_adapter(&values)?,
                ClientEvent::ComputeForward { key } => {
                    let (tokens, targets) = ([5, 6, 7, 8, 9, 10, 11, 12], vec![6, 7, 8, -100, 10, 11, 12, -100]);
                    let tensor = block_on(client_part.forward(&tokens, 4))?;
                    let (examples, forward) = (2, Duration::ZERO);
                    client.activations(
                        now,
                        ActivationsInput {
                            key,
                            examples,
                            forward,
                            targets,
                            tensor,
                        },
                    )?;
                }
                ClientEvent::ComputeBackward { key, gradient } => {
                    block_on(client_part.backward(&gradient.tensor))?;
                    println!(
                        "the client's loss is {:.4} over {} targets",
                        gradient.loss, gradient.tokens
                    );
                    client.step_done(now, key, Duration::ZERO);
                }
                ClientEvent::UploadAdapter { round, .. } => {
                    let values = block_on(client_part.adapter())?;
                    client.adapter(
                        now,
                        AdapterInput {
                            round,
                            examples: 2,
                            values,
                            moments: None,
                        },
                    )?;
                }
                ClientEvent::Finished(reason) => {
                    println!("finished: {reason:?}");
                    return Ok(());
                }
                ClientEvent::Failed(failure) => return Err(failure.into()),
                _ => {}
            }
        }
        while let Some(transmit) = client.poll_transmit() {
            match transmit {
                Transmit::Frame {
                    to: Endpoint::Main,
                    bytes,
                } => main.handle_frame(connection, now, &bytes),
                Transmit::Frame {
                    to: Endpoint::Federated,
                    bytes,
                } => federated.handle_frame(connection, now, &bytes),
                Transmit::Close { .. } => {}
            }
        }
        while let Some(event) = main.poll_event() {
            match event {
                MainEvent::Contribution { key, contribution } => {
                    let client = contribution.client;
                    let given = split::Contribution {
                        cut: CUT,
                        activations: &contribution.activations,
                        targets: &contribution.targets,
                    };
                    let reply = block_on(server_part.contribute(client, &given))?;
                    let output = GradientOutput {
                        client,
                        loss: reply.loss as f32,
                        gradient: reply.gradient,
                    };
                    main.contributed(now, key, client, Some(output))?;
                }
                MainEvent::CloseStep { lanes, .. } => {
                    let closed = server_part.close(&lanes)?;
                    println!("the server's step has a loss of {:.4}", closed.loss);
                }
                MainEvent::RoundClosed { round, average, .. } => {
                    println!("the round's average has {} values", average.len());
                    main.validated(now, round, None, None)?;
                }
                _ => {}
            }
        }
        while let Some(control) = main.poll_control() {
            federated.handle_control(now, control);
        }
        while let Some(reply) = federated.poll_control() {
            main.handle_control(now, reply);
        }
        for (endpoint, server) in [
            (
                Endpoint::Main,
                std::iter::from_fn(|| main.poll_transmit()).collect::<Vec<_>>(),
            ),
            (
                Endpoint::Federated,
                std::iter::from_fn(|| federated.poll_transmit()).collect(),
            ),
        ] {
            for transmit in server {
                match transmit {
                    Transmit::Frame { bytes, .. } => client.handle_frame(endpoint, now, &bytes),
                    Transmit::Close { .. } => client.disconnected(endpoint, now),
                }
            }
        }
    }
}
