//! Models of every family on both engines against `transformers` + `peft` (`fixtures/gpt2_peft`, `fixtures/families`), and the split
//! against the unsplit model.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pollster::block_on;
use serde_json::Value;
use sflllm::compute::Engine;
use sflllm::data::{Batch, Batches, Dataset, Options, pass};
use sflllm::model::adapter::Adapter;
use sflllm::model::architecture::{Architecture, Family};
use sflllm::model::central::{Central, Counted};
use sflllm::model::stack::StackWeights;
use sflllm::model::unit::{Unit, UnitData};
use sflllm::model::weights::{HeldUnits, Holding, Weights};
use sflllm::model::workspace::Extent;
use sflllm::split::{self, ClientPart, Contribution, ServerPart, Training};
use sflllm::terms::format::Format;
use sflllm::terms::moments::Moments;
use sflllm::terms::optimizer::OptimizerSettings;
use sflllm::terms::tensor::{WireForm, WireTensor};

const F32: Holding = Holding::As(Format::F32);

/// Folders of `fixtures`.
const CASES: [&str; 6] = [
    "gpt2_peft/narrow",
    "gpt2_peft/legacy",
    "families/llama",
    "families/llama3",
    "families/qwen2",
    "families/qwen3",
];

struct Fixture {
    config: Architecture,
    weights: Weights,
    adapter: Adapter,
    data: Dataset,
    expected: Value,
    tensors: Vec<u8>,
}

impl Fixture {
    fn load(case: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(case);
        let config = Architecture::load(&dir.join("model")).unwrap();
        let options = Options::new(config.positions, config.vocab);
        Self {
            weights: Weights::open(&dir.join("model"), &config).unwrap(),
            adapter: Adapter::load(&dir.join("adapter"), &config).unwrap(),
            data: Dataset::load(&dir.join("data.jsonl"), None, &options).unwrap(),
            expected: serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap(),
            tensors: std::fs::read(dir.join("expected.safetensors")).unwrap(),
            config,
        }
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        let file = safetensors::SafeTensors::deserialize(&self.tensors).unwrap();
        file.tensor(name)
            .unwrap_or_else(|_| panic!("the fixture has {name}"))
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }

    fn unit(&self, unit: Unit) -> UnitData {
        self.weights.unit(unit, F32).unwrap()
    }

    fn units(&self) -> HeldUnits<'_> {
        HeldUnits {
            weights: &self.weights,
            holding: F32,
        }
    }

    fn central(&self, engine: &Engine, batch: usize, adapter: bool, optimizer: Option<OptimizerSettings>) -> Central {
        let weights = StackWeights::load(engine, &self.config, &mut self.units()).unwrap();
        let extent = Extent {
            batch,
            seq: self.config.positions,
        };
        Central::new(
            engine,
            &self.config,
            weights,
            adapter.then_some(&self.adapter),
            extent,
            optimizer,
        )
        .unwrap()
    }

    fn pass(&self, batch: usize) -> Vec<Batch> {
        pass(&self.data.examples, batch, self.config.positions)
            .unwrap()
            .collect()
    }
}

/// The CPU engine, and a GPU engine where there is an adapter.
fn engines() -> Vec<Engine> {
    std::iter::once(Engine::cpu()).chain(Engine::gpu_for_tests()).collect()
}

fn mean_loss(model: &mut Central, batches: &[Batch]) -> (f64, usize) {
    let mut sum = Counted::default();
    for batch in batches {
        sum += block_on(model.loss(&batch.tokens, &batch.targets, batch.seq)).unwrap();
    }
    (sum.loss_sum / sum.tokens as f64, sum.tokens)
}

#[track_caller]
fn assert_close(found: f64, expected: f64, relative: f64, what: &str) {
    assert!(
        (found - expected).abs() <= relative * expected.abs(),
        "{what}: {found}, expected {expected}"
    );
}

/// Largest difference against the largest expected value.
#[track_caller]
fn assert_tensor_close(found: &[f32], expected: &[f32], relative: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            (f - e).abs() <= relative * scale,
            "{what}[{i}]: {f}, expected {e} (largest {scale})"
        );
    }
}

#[test]
fn losses_equal_those_of_transformers_and_peft() {
    for case in CASES {
        let fixture = Fixture::load(case);
        for engine in engines() {
            for (adapter, key) in [(false, "base_loss"), (true, "loss")] {
                let mut model = fixture.central(&engine, 3, adapter, None);
                let (loss, tokens) = mean_loss(&mut model, &fixture.pass(3));
                assert_eq!(tokens as u64, fixture.expected["tokens"].as_u64().unwrap());
                let expected = fixture.expected[key].as_f64().unwrap();
                let what = format!("{case} {key} on {}", engine.name());
                assert_close(loss, expected, 2e-6, &what);
            }
        }
    }
}

#[test]
fn logits_equal_those_of_transformers_and_peft() {
    for case in CASES {
        let fixture = Fixture::load(case);
        let ids = fixture.data.examples[0].ids.clone();
        for engine in engines() {
            let mut model = fixture.central(&engine, 1, true, None);
            let logits = block_on(model.logits(&ids, ids.len(), 0..ids.len())).unwrap();
            let expected = fixture.tensor("logits.example_0");
            let what = format!("{case} logits on {}", engine.name());
            assert_tensor_close(&logits.concat(), &expected, 2e-5, &what);
        }
    }
}

fn fixture_directory(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(case)
}

/// Patterns of ranks and alphas, regular expressions, some layers only, other names and types of the tensors.
#[test]
fn adapters_in_every_form_that_peft_reads_give_its_losses() {
    for case in ["families/llama", "families/qwen3"] {
        let fixture = Fixture::load(case);
        for (name, expected) in fixture.expected["adapters"].as_object().unwrap() {
            let directory = fixture_directory(case).join("adapters").join(name);
            let adapter = Adapter::load(&directory, &fixture.config).unwrap_or_else(|error| panic!("{name}: {error}"));
            let adapter = adapter.over_all_blocks(&fixture.config).unwrap();
            let engine = Engine::cpu();
            let weights = StackWeights::load(&engine, &fixture.config, &mut fixture.units()).unwrap();
            let extent = Extent {
                batch: 3,
                seq: fixture.config.positions,
            };
            let mut model = Central::new(&engine, &fixture.config, weights, Some(&adapter), extent, None).unwrap();
            let (loss, _) = mean_loss(&mut model, &fixture.pass(3));
            assert_close(loss, expected.as_f64().unwrap(), 2e-6, &format!("{case} {name}"));
            // What is written of it is read as the same.
            let written = tempfile::tempdir().unwrap();
            adapter.save(written.path(), &fixture.config, "base").unwrap();
            let again = Adapter::load(written.path(), &fixture.config).unwrap();
            assert_eq!(
                again.over_all_blocks(&fixture.config).unwrap(),
                adapter,
                "{case} {name}"
            );
        }
    }
}

#[test]
fn adapters_of_more_than_low_rank_matrices_are_refused_by_name() {
    let case = "families/llama";
    let fixture = Fixture::load(case);
    for (folder, named) in [
        ("dora", "use_dora"),
        ("modules_to_save", "modules_to_save"),
        ("bias", "bias"),
        ("lora_bias", "lora_bias"),
        ("trainable_tokens", "trainable_token_indices"),
        ("bin", "adapter_model.bin"),
    ] {
        let directory = fixture_directory(case).join("refused").join(folder);
        let error = Adapter::load(&directory, &fixture.config).unwrap_err().to_string();
        assert!(error.contains(named), "{folder}: {error}");
    }
}

#[test]
fn both_spellings_of_rotary_settings_are_one_model() {
    for case in ["families/llama3", "families/qwen2"] {
        let other = std::fs::read_to_string(fixture_directory(case).join("config_other_spelling.json")).unwrap();
        assert_eq!(
            Architecture::from_json(&other).unwrap(),
            Fixture::load(case).config,
            "{case}"
        );
    }
}

#[test]
fn a_models_description_written_is_the_one_read() {
    for case in CASES {
        let model = Fixture::load(case).config;
        assert_eq!(Architecture::from_json(&model.to_json()).unwrap(), model, "{case}");
    }
}

#[test]
fn adapter_gradients_equal_those_of_transformers_and_peft() {
    for case in CASES {
        let fixture = Fixture::load(case);
        for engine in engines() {
            let settings = OptimizerSettings::default();
            let mut model = fixture.central(&engine, 8, true, Some(settings));
            let batch = &fixture.pass(8)[0];
            let gradient = block_on(model.gradient(&batch.tokens, &batch.targets, batch.seq)).unwrap();
            for entry in fixture.adapter.layout.entries() {
                let body = match fixture.config.family {
                    Family::Gpt2 => "transformer.h",
                    _ => "model.layers",
                };
                let module = format!("base_model.model.{body}.{}.{}", entry.block, entry.target.module());
                for (letter, range) in [("A", entry.range_a()), ("B", entry.range_b())] {
                    let name = format!("grad.{module}.lora_{letter}.weight");
                    assert_tensor_close(
                        &gradient[range],
                        &fixture.tensor(&name),
                        5e-5,
                        &format!("{case} {name} on {}", engine.name()),
                    );
                }
            }
        }
    }
}

#[test]
fn ten_adamw_losses_equal_those_of_torch() {
    for case in CASES {
        let fixture = Fixture::load(case);
        let runs = fixture.expected["runs"].clone();
        for run in runs.as_array().unwrap() {
            let name = run["name"].as_str().unwrap();
            let number = |key: &str| run[key].as_f64().unwrap();
            let settings = OptimizerSettings {
                lr: number("lr") as f32,
                weight_decay: number("weight_decay") as f32,
                clip: run["clip"].as_f64().map(|clip| clip as f32),
                ..Default::default()
            };
            let rows = run["batch"].as_u64().unwrap() as usize;
            for engine in engines() {
                let mut model = fixture.central(&engine, rows, true, Some(settings));
                let examples = fixture.data.examples.clone();
                let mut batches = Batches::new(examples, rows, fixture.config.positions, None).unwrap();
                for (step, expected) in run["losses"].as_array().unwrap().iter().enumerate() {
                    let batch = batches.next_batch();
                    let counted = block_on(model.step(&batch.tokens, &batch.targets, batch.seq)).unwrap();
                    let what = format!("{case} {name} step {step} on {}", engine.name());
                    let loss = counted.loss_sum / counted.tokens as f64;
                    assert_close(loss, expected.as_f64().unwrap(), 2e-5, &what);
                }
                let (after, _) = mean_loss(&mut model, &fixture.pass(rows));
                let what = format!("{case} {name} after on {}", engine.name());
                assert_close(after, number("loss_after"), 2e-5, &what);
            }
        }
    }
}

struct Parts {
    client: ClientPart,
    server: ServerPart,
}

impl Fixture {
    fn training(&self, batch: usize, wire: WireForm) -> Training {
        Training {
            spec: self.adapter.spec.clone(),
            optimizer: OptimizerSettings {
                lr: 1e-3,
                clip: None,
                ..Default::default()
            },
            batch,
            seq: self.config.positions,
            wire,
        }
    }

    fn parts(&self, engine: &Engine, cut: usize, training: &Training) -> Parts {
        let client_values = self.adapter.slice(&self.config, 0..cut).unwrap().values;
        let server_values = self
            .adapter
            .slice(&self.config, cut..self.config.blocks)
            .unwrap()
            .values;
        let embedding = self.weights.embedding(F32).unwrap();
        let blocks: Vec<UnitData> = (0..cut).map(|block| self.unit(Unit::Block(block))).collect();
        Parts {
            client: ClientPart::new(engine, &self.config, embedding, &blocks, training, &client_values).unwrap(),
            server: ServerPart::new(engine, &self.config, &mut self.units(), cut, training, &server_values).unwrap(),
        }
    }
}

#[test]
fn split_step_equals_unsplit_step_at_every_cut() {
    for case in CASES {
        let fixture = Fixture::load(case);
        for engine in engines() {
            let training = fixture.training(2, WireForm::F32);
            let mut whole = fixture.central(&engine, 2, true, Some(training.optimizer));
            let examples = fixture.data.examples.clone();
            let positions = fixture.config.positions;
            let mut batches = Batches::new(examples, 2, positions, None).unwrap();
            let steps: Vec<Batch> = (0..10).map(|_| batches.next_batch()).collect();
            let unsplit: Vec<f64> = steps
                .iter()
                .map(|batch| {
                    let counted = block_on(whole.step(&batch.tokens, &batch.targets, batch.seq)).unwrap();
                    counted.loss_sum / counted.tokens as f64
                })
                .collect();
            let unsplit_adapter = block_on(whole.adapter()).unwrap();
            for cut in 1..fixture.config.blocks {
                let Parts { mut client, mut server } = fixture.parts(&engine, cut, &training);
                for (step, batch) in steps.iter().enumerate() {
                    let activations = block_on(client.forward(&batch.tokens, batch.seq)).unwrap();
                    let (loss, replies) = block_on(server.step(&[Contribution {
                        cut,
                        activations: &activations,
                        targets: &batch.targets,
                    }]))
                    .unwrap();
                    block_on(client.backward(&replies[0].gradient)).unwrap();
                    let what = format!("{case} cut {cut} step {step} on {}", engine.name());
                    assert_close(loss, unsplit[step], 1e-6, &what);
                }
                let mut joined = block_on(client.adapter()).unwrap();
                joined.extend(block_on(server.adapter()).unwrap());
                let what = format!("{case} cut {cut} adapter on {}", engine.name());
                assert_tensor_close(&joined, &unsplit_adapter, 1e-5, &what);
            }
        }
    }
}

/// With K clients the server's loss is Σ w_k loss_k and each client's gradient is that of its own loss: the gradient that a client
/// gets beside others equals the one it gets alone.
#[test]
fn a_client_gets_the_gradient_of_its_own_loss() {
    let fixture = Fixture::load("gpt2_peft/narrow");
    for engine in engines() {
        let training = fixture.training(2, WireForm::F32);
        let batches = fixture.pass(2);
        let Parts { mut client, .. } = fixture.parts(&engine, 1, &training);
        let forwards: Vec<WireTensor> = batches
            .iter()
            .map(|batch| block_on(client.forward(&batch.tokens, batch.seq)).unwrap())
            .collect();
        let contributions: Vec<Contribution<'_>> = forwards
            .iter()
            .zip(&batches)
            .map(|(activations, batch)| Contribution {
                cut: 1,
                activations,
                targets: &batch.targets,
            })
            .collect();
        let Parts { mut server, .. } = fixture.parts(&engine, 1, &training);
        let (loss, replies) = block_on(server.step(&contributions)).unwrap();
        let total: usize = replies.iter().map(|reply| reply.tokens).sum();
        let weighted: f64 = replies
            .iter()
            .map(|reply| reply.loss * reply.tokens as f64 / total as f64)
            .sum();
        assert_close(loss, weighted, 1e-12, "the server's loss");
        for (k, contribution) in contributions.iter().enumerate() {
            let Parts { mut server, .. } = fixture.parts(&engine, 1, &training);
            let (alone, reply) = block_on(server.step(&[*contribution])).unwrap();
            assert_eq!(replies[k].loss, alone, "client {k}");
            assert_eq!(replies[k].gradient, reply[0].gradient, "client {k}");
        }
    }
}

/// The server's adapter takes one step on the token-weighted loss of all clients: the same as one batch of all their examples.
#[test]
fn the_server_steps_on_the_concatenated_batch() {
    let fixture = Fixture::load("gpt2_peft/narrow");
    let engine = Engine::cpu();
    let training = fixture.training(2, WireForm::F32);
    let batches = fixture.pass(2);
    let Parts { mut client, mut server } = fixture.parts(&engine, 1, &training);
    let forwards: Vec<WireTensor> = batches
        .iter()
        .map(|batch| block_on(client.forward(&batch.tokens, batch.seq)).unwrap())
        .collect();
    let contributions: Vec<Contribution<'_>> = forwards
        .iter()
        .zip(&batches)
        .map(|(activations, batch)| Contribution {
            cut: 1,
            activations,
            targets: &batch.targets,
        })
        .collect();
    let (loss, _) = block_on(server.step(&contributions)).unwrap();

    let all = &fixture.pass(8)[0];
    let whole = Training { batch: 8, ..training };
    let Parts {
        client: mut whole_client,
        server: mut whole_server,
    } = fixture.parts(&engine, 1, &whole);
    let activations = block_on(whole_client.forward(&all.tokens, all.seq)).unwrap();
    let (whole_loss, _) = block_on(whole_server.step(&[Contribution {
        cut: 1,
        activations: &activations,
        targets: &all.targets,
    }]))
    .unwrap();
    assert_close(loss, whole_loss, 1e-6, "loss");
    assert_tensor_close(
        &block_on(server.adapter()).unwrap(),
        &block_on(whole_server.adapter()).unwrap(),
        1e-5,
        "the server's adapter",
    );
}

/// Clients at cuts of their own each get the loss and the gradient that they get at a server cut where they are, and are so trained
/// as an unsplit model on their data; the server's blocks have the sum of what the parts at single cuts have of them.
#[test]
fn contributions_enter_the_server_where_their_clients_cut_is() {
    let fixture = Fixture::load("gpt2_peft/legacy");
    let blocks = fixture.config.blocks;
    for engine in engines() {
        let training = fixture.training(2, WireForm::F32);
        let batches = fixture.pass(2);
        let cuts = [1, 3, 2];
        let mut clients = Vec::new();
        let mut activations = Vec::new();
        for (cut, batch) in cuts.into_iter().zip(&batches) {
            let Parts { mut client, .. } = fixture.parts(&engine, cut, &training);
            activations.push(block_on(client.forward(&batch.tokens, batch.seq)).unwrap());
            clients.push(client);
        }
        let contributions: Vec<Contribution<'_>> = (cuts.into_iter().zip(&activations).zip(&batches))
            .map(|((cut, activations), batch)| Contribution {
                cut,
                activations,
                targets: &batch.targets,
            })
            .collect();
        assert_eq!(contributions.len(), 3, "the fixture has three batches");
        let Parts { mut server, .. } = fixture.parts(&engine, 1, &training);
        let (loss, replies) = block_on(server.accumulate(&contributions)).unwrap();
        let gradient = block_on(server.adapter_gradient()).unwrap();

        let total: usize = replies.iter().map(|reply| reply.tokens).sum();
        let block = gradient.len() / (blocks - 1);
        let mut sum = vec![0.0_f32; gradient.len()];
        let mut weighted = 0.0;
        for (contribution, reply) in contributions.iter().zip(&replies) {
            let cut = contribution.cut;
            let Parts { mut server, .. } = fixture.parts(&engine, cut, &training);
            let (alone, own) = block_on(server.accumulate(&[*contribution])).unwrap();
            assert_eq!(reply.loss, alone, "cut {cut}");
            assert_eq!(reply.gradient, own[0].gradient, "cut {cut}");
            let weight = reply.tokens as f64 / total as f64;
            weighted += weight * alone;
            let own = block_on(server.adapter_gradient()).unwrap();
            for (sum, value) in sum[block * (cut - 1)..].iter_mut().zip(own) {
                *sum += weight as f32 * value;
            }
        }
        assert_close(loss, weighted, 1e-12, "the server's loss");
        assert_tensor_close(&gradient, &sum, 1e-5, "the server's gradient");

        for ((client, reply), batch) in clients.iter_mut().zip(&replies).zip(&batches) {
            block_on(client.backward(&reply.gradient)).unwrap();
            let mut whole = fixture.central(&engine, 2, true, Some(training.optimizer));
            let counted = block_on(whole.step(&batch.tokens, &batch.targets, batch.seq)).unwrap();
            assert_close(
                reply.loss,
                counted.loss_sum / counted.tokens as f64,
                1e-6,
                "the unsplit loss",
            );
            let own = block_on(client.adapter()).unwrap();
            let unsplit = block_on(whole.adapter()).unwrap();
            assert_tensor_close(&own, &unsplit[..own.len()], 1e-5, "the unsplit model's adapter");
        }
    }
}

/// Time that goes on by a millisecond whenever it is looked at.
fn clock() -> Duration {
    static LOOKS: AtomicU64 = AtomicU64::new(0);
    Duration::from_millis(LOOKS.fetch_add(1, Ordering::Relaxed))
}

/// Measuring runs the part's own passes, and leaves adapter, moments, gradient and activations as they would be without.
#[test]
fn measuring_a_part_changes_nothing_it_is_trained_by() {
    let fixture = Fixture::load("gpt2_peft/narrow");
    for engine in engines() {
        let training = fixture.training(2, WireForm::F16);
        let batches = fixture.pass(2);
        let mut results = Vec::new();
        for measured in [false, true] {
            let Parts { mut client, mut server } = fixture.parts(&engine, 1, &training);
            let mut losses = Vec::new();
            for batch in &batches[..3] {
                if measured {
                    let speed = block_on(client.measure(clock)).unwrap().expect("a clock that goes on");
                    assert!(
                        speed.forward_flops_per_s > 1e6 && speed.backward_flops_per_s > 1e6,
                        "{speed:?}"
                    );
                    assert!(block_on(server.measure(clock)).unwrap().expect("a clock that goes on") > 1e6);
                }
                let activations = block_on(client.forward(&batch.tokens, batch.seq)).unwrap();
                let contribution = Contribution {
                    cut: 1,
                    activations: &activations,
                    targets: &batch.targets,
                };
                let (loss, replies) = block_on(server.step(&[contribution])).unwrap();
                block_on(client.backward(&replies[0].gradient)).unwrap();
                losses.push(loss);
            }
            let (own, moments) = (block_on(client.adapter()).unwrap(), block_on(client.moments()).unwrap());
            results.push((losses, own, moments, block_on(server.adapter()).unwrap()));
        }
        assert!(results[0] == results[1], "on {}", engine.name());
    }
}

#[test]
fn a_clock_that_stands_still_measures_nothing() {
    let fixture = Fixture::load("gpt2_peft/narrow");
    let training = fixture.training(2, WireForm::F32);
    let Parts { mut client, mut server } = fixture.parts(&Engine::cpu(), 1, &training);
    assert_eq!(block_on(client.measure(|| Duration::ZERO)).unwrap(), None);
    assert_eq!(block_on(server.measure(|| Duration::ZERO)).unwrap(), None);
}

/// A part takes contributions at its own cut, and what it is given for another cut must be of it.
#[test]
fn a_part_takes_what_is_of_its_cut_only() {
    let fixture = Fixture::load("gpt2_peft/legacy");
    let training = fixture.training(2, WireForm::F32);
    let batch = fixture.pass(2).remove(0);
    let Parts { mut client, server } = fixture.parts(&Engine::cpu(), 1, &training);
    let client_values = block_on(client.adapter()).unwrap();
    let activations = block_on(client.forward(&batch.tokens, batch.seq)).unwrap();
    let contribution = |cut| Contribution {
        cut,
        activations: &activations,
        targets: &batch.targets,
    };
    let mut units = fixture.units();
    let (server, moved) = block_on(server.recut(&mut units, 3, &client_values, None)).unwrap();
    assert_eq!(server.cut(), 3);
    assert_eq!(
        moved.adapter,
        fixture.adapter.slice(&fixture.config, 0..3).unwrap().values
    );
    assert_eq!(
        moved.moments.map(|moments| moments.len()),
        Some(2 * client_values.len())
    );
    assert!(matches!(
        server.check(&contribution(1)),
        Err(split::Error::OtherCut { cut: 3, found: 1, .. })
    ));
    server.check(&contribution(3)).unwrap();
    for (cut, client, moments) in [
        (0, moved.adapter.as_slice(), None),
        (4, &moved.adapter, None),
        (2, &client_values, None),
        (2, &moved.adapter, None),
        (2, &moved.adapter, Some(Moments::zero(1))),
    ] {
        let Parts { server, .. } = fixture.parts(&Engine::cpu(), 3, &training);
        let mut units = fixture.units();
        let refused = block_on(server.recut(&mut units, cut, client, moments));
        assert!(
            matches!(refused, Err(split::Error::Split { .. } | split::Error::Length { .. })),
            "cut {cut}"
        );
    }
}

/// A narrower wire form changes the numbers by its rounding and no more.
#[test]
fn wire_forms_change_the_loss_by_their_rounding_only() {
    let fixture = Fixture::load("gpt2_peft/narrow");
    for engine in engines() {
        let batch = fixture.pass(2).remove(0);
        let mut losses = Vec::new();
        for wire in [WireForm::F32, WireForm::F16, WireForm::Int8] {
            let training = fixture.training(2, wire);
            let Parts { mut client, mut server } = fixture.parts(&engine, 1, &training);
            let activations = block_on(client.forward(&batch.tokens, batch.seq)).unwrap();
            let bytes = wire.bytes(2 * batch.seq, fixture.config.width);
            assert_eq!(Some(activations.bytes().len()), bytes);
            let contribution = Contribution {
                cut: 1,
                activations: &activations,
                targets: &batch.targets,
            };
            let (loss, replies) = block_on(server.step(&[contribution])).unwrap();
            block_on(client.backward(&replies[0].gradient)).unwrap();
            losses.push(loss);
        }
        assert_close(losses[1], losses[0], 1e-3, "f16");
        assert_close(losses[2], losses[0], 2e-2, "int8");
        assert_ne!(losses[0], losses[1]);
        assert_ne!(losses[0], losses[2]);
    }
}
