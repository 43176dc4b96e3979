//! The machines of a main server, a federated server and two clients in one process: a small random model, cut in the middle,
//! learns to count, and the clients' adapters are averaged after every round.
//!
//! `cargo run --release --no-default-features --example sessions`

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use pollster::block_on;
use sflllm::client::{Loader, Plan, capabilities, local};
use sflllm::compute::Engine;
use sflllm::data::Example;
use sflllm::model::adapter::Adapter;
use sflllm::model::architecture::Architecture;
use sflllm::model::weights::{HeldUnits, Holding, Weights};
use sflllm::protocol::message::RunConfig;
use sflllm::protocol::*;
use sflllm::split::ServerPart;
use sflllm::terms::format::Format;
use sflllm::terms::ids::RunId;

const MODEL: &str = r#"{"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4,
    "intermediate_size": 64, "vocab_size": 20, "max_position_embeddings": 8, "rms_norm_eps": 1e-5}"#;
/// Nothing here waits for time to pass.
const NOW: Duration = Duration::ZERO;

pub fn main() -> Result<(), Box<dyn Error>> {
    let engine = Engine::cpu();
    let model = Architecture::from_json(MODEL)?;
    let (weights, holding) = (Weights::random(&model, 1)?, Holding::As(Format::F32));

    // What the clients are to do, and the main server's part of it.
    let config = RunConfig::new(2, (2, 8), (32, 20), ["q_proj", "v_proj", "down_proj"]);
    let (assignment, parts) = local::assign(RunId([1; 16]), config, &weights, holding)?;
    let plan = Plan::new(&assignment)?;
    let adapter = Adapter::init(&model, &plan.training.spec, 0..model.blocks, 1)?;
    let [below, above] = [0..plan.cut, plan.cut..model.blocks].map(|blocks| adapter.slice(&model, blocks));
    let mut units = HeldUnits {
        weights: &weights,
        holding,
    };
    let mut server = ServerPart::new(&engine, &model, &mut units, plan.cut, &plan.training, &above?.values)?;
    let config = MainConfig::new(Placement::new(assignment, below?.values), [2; 32], 2);

    // Each client has data of its own.
    let session = |name| ClientSession::new(ClientConfig::new(name, capabilities("CPU", 0)), NOW);
    let mut run = LocalRun::new(MainServerSession::new(config, NOW)?, ["Ada", "Grace"].map(session));
    let mut learners = Vec::new();
    for first in [1, 7] {
        let mut loader = Loader::new(&engine, &plan, || NOW, None)?;
        parts.iter().try_for_each(|part| loader.add(part.clone()))?;
        let counted = |from| Example::text((from..from + 8).collect());
        learners.push(loader.finish((first..first + 6).map(counted).collect())?);
    }

    let mut losses = Vec::new();
    while let Some(event) = run.next(NOW) {
        match event {
            LocalEvent::Client(place, event) => {
                block_on(learners[place].answer(&mut run.clients[place], NOW, event))?;
            }
            LocalEvent::Main(MainEvent::Contribution { key, contribution }) => {
                let output = block_on(local::contribute(&mut server, &contribution))?;
                run.main.contributed(NOW, key, contribution.client, Some(output))?;
            }
            LocalEvent::Main(MainEvent::CloseStep { lanes, .. }) => losses.push(server.close(&lanes)?.loss),
            LocalEvent::Main(MainEvent::RoundClosed { round, average, .. }) => {
                let (loss, len) = (losses[losses.len() - 1], average.len());
                println!("{round}: loss {loss:.3}, {len} values averaged");
                run.main.validated(NOW, round, None, None)?;
            }
            _ => {}
        }
    }
    assert!(losses[losses.len() - 1] < 0.7 * losses[0], "it has learnt to count");
    Ok(())
}
