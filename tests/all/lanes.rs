//! The server's step as a stream: contributions in lanes of their own, summed when the step closes.

use std::collections::BTreeSet;
use std::path::PathBuf;

use pollster::block_on;
use sflllm::compute::Engine;
use sflllm::data::{Batch, Dataset, Options, pass};
use sflllm::model::adapter::Adapter;
use sflllm::model::architecture::Architecture;
use sflllm::model::unit::Unit;
use sflllm::model::weights::{HeldUnits, Holding, Weights};
use sflllm::split::{self, ClientPart, Contribution, LaneError, Reply, ServerPart, Training};
use sflllm::terms::format::Format;
use sflllm::terms::ids::ClientId;
use sflllm::terms::optimizer::OptimizerSettings;
use sflllm::terms::tensor::{IGNORED_TARGET, WireForm, WireLayout, WireTensor};

const F32: Holding = Holding::As(Format::F32);
const ROWS: usize = 2;

struct Setup {
    model: Architecture,
    weights: Weights,
    adapter: Adapter,
    batches: Vec<Batch>,
}

impl Setup {
    fn load() -> Self {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt2_peft/narrow");
        let model = Architecture::load(&directory.join("model")).unwrap();
        let options = Options::new(model.positions, model.vocab);
        let data = Dataset::load(&directory.join("data.jsonl"), None, &options).unwrap();
        Self {
            weights: Weights::open(&directory.join("model"), &model).unwrap(),
            adapter: Adapter::load(&directory.join("adapter"), &model).unwrap(),
            batches: pass(&data.examples, ROWS, model.positions).unwrap().collect(),
            model,
        }
    }

    fn training(&self, wire: WireForm) -> Training {
        Training {
            spec: self.adapter.spec.clone(),
            optimizer: OptimizerSettings {
                clip: Some(1.0),
                ..OptimizerSettings::default()
            },
            batch: ROWS,
            seq: self.model.positions,
            wire,
        }
    }

    fn server(&self, engine: &Engine, wire: WireForm) -> ServerPart {
        let mut units = HeldUnits {
            weights: &self.weights,
            holding: F32,
        };
        let above = self.adapter.slice(&self.model, 1..self.model.blocks).unwrap().values;
        ServerPart::new(engine, &self.model, &mut units, 1, &self.training(wire), &above).unwrap()
    }

    /// What three clients send for a step.
    fn forwards(&self, engine: &Engine, wire: WireForm) -> Vec<WireTensor> {
        let embedding = self.weights.embedding(F32).unwrap();
        let block = [self.weights.unit(Unit::Block(0), F32).unwrap()];
        let below = self.adapter.slice(&self.model, 0..1).unwrap().values;
        let mut client = ClientPart::new(engine, &self.model, embedding, &block, &self.training(wire), &below).unwrap();
        let forward = |batch: &Batch| block_on(client.forward(&batch.tokens, batch.seq)).unwrap();
        self.batches[..3].iter().map(forward).collect()
    }

    fn contribution<'a>(&'a self, forwards: &'a [WireTensor], client: usize) -> Contribution<'a> {
        Contribution {
            cut: 1,
            activations: &forwards[client],
            targets: &self.batches[client].targets,
        }
    }
}

fn engines() -> Vec<Engine> {
    std::iter::once(Engine::cpu()).chain(Engine::gpu_for_tests()).collect()
}

fn clients(ids: &[u64]) -> BTreeSet<ClientId> {
    ids.iter().copied().map(ClientId).collect()
}

fn contribute(server: &mut ServerPart, client: u64, contribution: &Contribution<'_>) -> Result<Reply, LaneError> {
    block_on(server.contribute(ClientId(client), contribution))
}

/// Bits of the adapter, for comparisons that no rounding passes.
fn bits(server: &ServerPart) -> Vec<u32> {
    let values = block_on(server.adapter()).unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn the_order_of_arrival_changes_no_bit_of_a_step() {
    let setup = Setup::load();
    for engine in engines() {
        let forwards = setup.forwards(&engine, WireForm::F32);
        let mut results = Vec::new();
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut server = setup.server(&engine, WireForm::F32);
            let mut closed = Vec::new();
            let mut replies = Vec::new();
            // The second step finds the lanes of the first in other places.
            for step in 0..2 {
                server.open_step();
                let mut own: Vec<(usize, Vec<u8>, f64)> = order
                    .iter()
                    .cycle()
                    .skip(step)
                    .take(3)
                    .map(|&client| {
                        let contribution = setup.contribution(&forwards, client);
                        let reply = contribute(&mut server, client as u64, &contribution).unwrap();
                        (client, reply.gradient.bytes().to_vec(), reply.loss)
                    })
                    .collect();
                own.sort_by_key(|(client, ..)| *client);
                replies.push(own);
                closed.push(server.close(&clients(&[0, 1, 2])).unwrap());
            }
            results.push((closed, replies, bits(&server)));
        }
        assert!(
            results.iter().all(|result| *result == results[0]),
            "on {}",
            engine.name()
        );
        assert!(results[0].0[1].loss < results[0].0[0].loss, "the steps are steps");
    }
}

#[test]
fn a_lane_that_is_dropped_before_the_close_was_never_there() {
    let setup = Setup::load();
    for engine in engines() {
        let forwards = setup.forwards(&engine, WireForm::F32);
        let step = |given: &[usize], counted: &[u64]| {
            let mut server = setup.server(&engine, WireForm::F32);
            server.open_step();
            for &client in given {
                contribute(&mut server, client as u64, &setup.contribution(&forwards, client)).unwrap();
            }
            let closed = server.close(&clients(counted)).unwrap();
            (closed, bits(&server))
        };
        assert_eq!(step(&[1, 0, 2], &[0, 2]), step(&[0, 2], &[0, 2]));
        assert_ne!(step(&[0, 1, 2], &[0, 1, 2]).1, step(&[0, 2], &[0, 2]).1);
        // A step that was not closed leaves nothing to the next.
        let mut server = setup.server(&engine, WireForm::F32);
        server.open_step();
        contribute(&mut server, 1, &setup.contribution(&forwards, 1)).unwrap();
        server.open_step();
        contribute(&mut server, 0, &setup.contribution(&forwards, 0)).unwrap();
        assert!(matches!(
            server.close(&clients(&[0, 1])),
            Err(split::Error::NoLane { client: ClientId(1) })
        ));
        server.close(&clients(&[0])).unwrap();
        assert_eq!(bits(&server), step(&[0], &[0]).1);
    }
}

/// Activations of this form whose every number is as large as a peer likes.
fn huge(wire: WireForm, seq: usize, width: usize) -> WireTensor {
    let layout = WireLayout {
        form: wire,
        batch: ROWS as u32,
        seq: seq as u32,
        width: width as u32,
    };
    let bytes = layout.bytes().unwrap();
    let bytes = match wire {
        WireForm::F32 => 1e38_f32.to_le_bytes().repeat(bytes / 4),
        WireForm::F16 => 0x7bff_u16.to_le_bytes().repeat(bytes / 2),
        WireForm::Int8 => {
            let scales = 2e36_f32.to_le_bytes().repeat(ROWS * seq);
            let rest = vec![127; bytes - scales.len()];
            [scales, rest].concat()
        }
    };
    WireTensor::new(layout, bytes).unwrap()
}

#[test]
fn a_contribution_that_explodes_fails_alone_and_leaves_nothing_behind() {
    let setup = Setup::load();
    for engine in engines() {
        for wire in [WireForm::F32, WireForm::Int8] {
            let forwards = setup.forwards(&engine, wire);
            let honest = |attacks: &[usize]| {
                let mut server = setup.server(&engine, wire);
                let mut losses = Vec::new();
                for _ in 0..2 {
                    server.open_step();
                    for client in 0..3 {
                        if attacks.contains(&client) {
                            let bad = huge(wire, setup.batches[0].seq, setup.model.width);
                            assert!(bad.is_finite());
                            let contribution = Contribution {
                                cut: 1,
                                activations: &bad,
                                targets: &setup.batches[0].targets,
                            };
                            let found = contribute(&mut server, 9, &contribution);
                            assert!(
                                matches!(found, Err(LaneError::Loss(_) | LaneError::Gradient)),
                                "{wire} on {}: {found:?}",
                                engine.name()
                            );
                        }
                        let contribution = setup.contribution(&forwards, client);
                        losses.push(contribute(&mut server, client as u64, &contribution).unwrap().loss);
                    }
                    server.close(&clients(&[0, 1, 2])).unwrap();
                }
                (losses, bits(&server))
            };
            assert_eq!(honest(&[0, 1, 2]), honest(&[]), "{wire} on {}", engine.name());
        }
    }
}

#[test]
fn fewer_rows_are_as_if_the_others_had_no_target() {
    let setup = Setup::load();
    for engine in engines() {
        for wire in [WireForm::F32, WireForm::F16, WireForm::Int8] {
            let forwards = setup.forwards(&engine, wire);
            let (whole, batch) = (&forwards[0], &setup.batches[0]);
            let one = one_row(whole);
            let mut targets = batch.targets.clone();
            targets[batch.seq..].fill(IGNORED_TARGET);
            let step = |activations: &WireTensor, targets: &[i32]| {
                let mut server = setup.server(&engine, wire);
                server.open_step();
                // What another left on the device must not show.
                let bad = huge(wire, batch.seq, setup.model.width);
                let poison = Contribution {
                    cut: 1,
                    activations: &bad,
                    targets: &batch.targets,
                };
                drop(contribute(&mut server, 9, &poison));
                let contribution = Contribution {
                    cut: 1,
                    activations,
                    targets,
                };
                let reply = contribute(&mut server, 1, &contribution).unwrap();
                server.close(&clients(&[1])).unwrap();
                (reply, bits(&server))
            };
            let (short, short_adapter) = step(&one, &targets[..batch.seq]);
            let (full, full_adapter) = step(whole, &targets);
            assert_eq!((short.loss, short.tokens), (full.loss, full.tokens));
            assert_eq!(short.gradient, one_row(&full.gradient), "{wire}");
            assert_eq!(short_adapter, full_adapter, "{wire} on {}", engine.name());
        }
    }
}

/// The first sequence of a tensor.
fn one_row(whole: &WireTensor) -> WireTensor {
    let layout = WireLayout {
        batch: 1,
        ..whole.layout()
    };
    let bytes = match layout.form {
        WireForm::F32 | WireForm::F16 => whole.bytes()[..layout.bytes().unwrap()].to_vec(),
        WireForm::Int8 => {
            let seq = layout.seq as usize;
            let (scales, packed) = whole.bytes().split_at(4 * ROWS * seq);
            [&scales[..4 * seq], &packed[..packed.len() / ROWS]].concat()
        }
    };
    WireTensor::new(layout, bytes).unwrap()
}

#[test]
fn a_contribution_that_was_not_agreed_is_refused() {
    let setup = Setup::load();
    let engine = Engine::cpu();
    let forwards = setup.forwards(&engine, WireForm::F32);
    let mut server = setup.server(&engine, WireForm::F32);
    server.open_step();
    let good = setup.contribution(&forwards, 0);
    let halves = setup.forwards(&engine, WireForm::F16);
    let large = WireTensor::new(
        WireLayout {
            batch: ROWS as u32 + 1,
            seq: 1,
            ..forwards[0].layout()
        },
        vec![0; 4 * (ROWS + 1) * setup.model.width],
    )
    .unwrap();
    for bad in [
        Contribution { cut: 0, ..good },
        Contribution {
            targets: &good.targets[1..],
            ..good
        },
        Contribution {
            activations: &halves[0],
            ..good
        },
        Contribution {
            activations: &large,
            targets: &[1; ROWS + 1],
            ..good
        },
    ] {
        let found = contribute(&mut server, 0, &bad);
        assert!(matches!(found, Err(LaneError::Refused(_))), "{found:?}");
    }
    contribute(&mut server, 0, &good).unwrap();
    assert!(matches!(contribute(&mut server, 0, &good), Err(LaneError::Again)));
}
