//! What `model::cost` says of a step against steps that are recorded and buffers that are made on an engine that computes.

use std::ops::Range;

use sflllm::compute::{Engine, Recording};
use sflllm::model::adapter::{Adapter, LoraSpec, Target};
use sflllm::model::architecture::Architecture;
use sflllm::model::cost::{Convention, Workload};
use sflllm::model::ends::embedding::Embedding;
use sflllm::model::ends::head::HeadWeights;
use sflllm::model::stack::{Stack, StackWeights};
use sflllm::model::unit::{Tensor, Unit, UnitData, layout};
use sflllm::model::weights::{UnitSource, WeightsError};
use sflllm::model::workspace::Extent;
use sflllm::terms::format::Format;
use sflllm::terms::tensor::WireForm;

struct Case {
    config: Architecture,
    extent: Extent,
    rank: usize,
    cut: usize,
}

fn gpt2(blocks: usize, width: usize, heads: usize, (vocab, positions): (usize, usize), ffn: usize) -> Architecture {
    Architecture::from_json(&format!(
        r#"{{"model_type": "gpt2", "n_layer": {blocks}, "n_embd": {width}, "n_head": {heads}, "n_inner": {ffn},
            "vocab_size": {vocab}, "n_positions": {positions}}}"#
    ))
    .unwrap()
}

fn odd() -> Case {
    Case {
        config: gpt2(3, 70, 5, (301, 45), 203),
        extent: Extent { batch: 3, seq: 45 },
        rank: 3,
        cut: 2,
    }
}

fn demo() -> Case {
    let text = include_str!("../../assets/demo/config.json");
    Case {
        config: Architecture::from_json(text).unwrap(),
        extent: Extent { batch: 4, seq: 128 },
        rank: 8,
        cut: 1,
    }
}

/// Grouped heads whose size is not width over heads, normed queries and keys, an untied head.
fn qwen3() -> Case {
    let text = r#"{"model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 52, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 14, "intermediate_size": 90, "vocab_size": 277,
        "max_position_embeddings": 64, "tie_word_embeddings": false}"#;
    Case {
        config: Architecture::from_json(text).unwrap(),
        extent: Extent { batch: 2, seq: 33 },
        rank: 4,
        cut: 3,
    }
}

fn cases() -> [Case; 3] {
    [odd(), demo(), qwen3()]
}

impl Case {
    fn target_sets(&self) -> Vec<Vec<Target>> {
        let all = self.config.targets().to_vec();
        let mut sets: Vec<Vec<Target>> = all.iter().map(|&target| vec![target]).collect();
        sets.push(vec![all[0], all[2]]);
        sets.push(all);
        sets
    }

    /// Blocks `range` for training, with the head where they are the last.
    fn stack(&self, engine: &Engine, range: Range<usize>, targets: &[Target], format: Format) -> Stack {
        let model = &self.config;
        let mut zeros = Zeros { model, format };
        let weights = StackWeights {
            embedding: None,
            blocks: StackWeights::load_blocks(engine, model, &mut zeros, range.clone()).unwrap(),
            first_block: range.start,
            head: (range.end == model.blocks).then(|| HeadWeights::load(engine, model, &mut zeros).unwrap()),
        };
        let spec = LoraSpec::new(self.rank, 16.0, targets.iter().copied()).unwrap();
        let adapter = Adapter::init(model, &spec, range, 0).unwrap();
        let adapter = (&adapter.layout, &adapter.values[..]);
        Stack::new(engine, model, weights, Some(adapter), self.extent, true).unwrap()
    }

    fn workload(&self, targets: &[Target], convention: Convention) -> Workload {
        Workload::new(&self.config, targets, self.extent, convention)
    }
}

/// A model all of whose weights are zero.
struct Zeros<'a> {
    model: &'a Architecture,
    format: Format,
}

impl UnitSource for Zeros<'_> {
    fn unit(&mut self, unit: Unit) -> Result<UnitData, WeightsError> {
        let tensor = |(name, shape): (&str, Vec<usize>)| {
            let format = if shape.len() == 2 { self.format } else { Format::F32 };
            Tensor {
                name: name.to_owned(),
                format,
                words: vec![0; layout(&shape, format).words()],
                shape,
            }
        };
        let tensors = unit.tensors(self.model).into_iter().map(tensor).collect();
        Ok(UnitData { unit, tensors })
    }

    fn embedding(&mut self) -> Result<Embedding, WeightsError> {
        Ok(Embedding::held(self.model, self.unit(Unit::Embedding)?))
    }
}

fn flops(record: impl FnOnce(&mut Recording)) -> f64 {
    let mut recording = Engine::cpu().recording();
    record(&mut recording);
    recording.cost().flops
}

#[track_caller]
fn assert_equal(found: f64, expected: f64, what: &str) {
    // Sums of the same terms in another order.
    assert!(
        (found - expected).abs() <= 1e-9 * expected,
        "{what}: {found}, not {expected}"
    );
}

#[test]
fn issued_work_is_what_both_sides_of_a_split_step_record() {
    for case in cases() {
        let seq = case.extent.seq;
        for targets in case.target_sets() {
            let workload = case.workload(&targets, Convention::Issued);
            let (cut, rank) = (case.cut, case.rank);
            let what = |pass: &str| format!("{pass}, {targets:?}, width {}", case.config.width);
            let engine = Engine::cpu();
            let client = case.stack(&engine, 0..cut, &targets, Format::F16);
            let forward = flops(|recording| client.record_blocks(recording, seq));
            let backward = flops(|recording| client.record_backward(recording, seq, false));
            assert_equal(
                workload.client_forward_flops(cut, rank),
                forward,
                &what("client forward"),
            );
            assert_equal(
                workload.client_backward_flops(cut, rank),
                backward,
                &what("client backward"),
            );

            let server = case.stack(&engine, cut..case.config.blocks, &targets, Format::F16);
            let step = flops(|recording| {
                server.record_blocks(recording, seq);
                server.record_loss(recording, seq, true);
                server.record_backward(recording, seq, true);
            });
            let evaluation = flops(|recording| {
                server.record_blocks(recording, seq);
                server.record_loss(recording, seq, false);
            });
            assert_equal(workload.server_flops(cut, rank), step, &what("server"));
            assert_equal(
                workload.server_forward_flops(cut, rank),
                evaluation,
                &what("server forward"),
            );
            assert_equal(
                workload.step_flops(cut, rank),
                forward + backward + step,
                &what("both sides"),
            );
        }
    }
}

#[test]
fn dense_products_are_what_is_issued_but_for_the_mask_and_element_wise_work() {
    for (case, share) in [(odd(), 0.2), (demo(), 0.1), (qwen3(), 0.2)] {
        for targets in case.target_sets() {
            let dense = case.workload(&targets, Convention::Dense);
            let issued = case.workload(&targets, Convention::Issued);
            let (rank, blocks) = (case.rank, case.config.blocks);
            let ratio = issued.step_flops(blocks, rank) / dense.step_flops(blocks, rank);
            assert!(
                (ratio - 1.0).abs() < share,
                "{targets:?}, width {}: {ratio}",
                case.config.width
            );
        }
    }
}

#[test]
fn the_textbook_forms_hold_for_gpt2_small() {
    let config = gpt2(12, 768, 12, (50_257, 1024), 3072);
    let extent = Extent { batch: 16, seq: 512 };
    let (rows, seq, width, rank) = (16.0 * 512.0, 512.0, 768.0, 8.0);
    let workload = Workload::new(&config, &[Target::AttnQkv], extent, Convention::Dense);
    let linear = 24.0 * rows * width * width;
    let low_rank = rows * rank * 4.0 * width; // b·s·r·S: c_attn takes width to 3·width
    let forward = linear + 4.0 * rows * seq * width + 2.0 * low_rank;
    let backward = linear + 8.0 * rows * seq * width + 4.0 * low_rank;
    let lowest = backward - 6.0 * rows * width * width - 2.0 * rows * rank * width;
    let head = 2.0 * rows * width * 50_257.0;
    assert_eq!(workload.block_forward_flops(8), forward);
    assert_eq!(workload.block_backward_flops(8), backward);
    assert_eq!(workload.lowest_block_backward_flops(8), lowest);
    assert_eq!(workload.client_forward_flops(3, 8), 3.0 * forward);
    assert_eq!(workload.client_backward_flops(3, 8), lowest + 2.0 * backward);
    assert_eq!(workload.server_flops(3, 8), 9.0 * (forward + backward) + 2.0 * head);
    assert_eq!(workload.client_backward_flops(0, 8), 0.0);
    assert_eq!(
        workload.client_forward_flops(99, 8),
        workload.client_forward_flops(12, 8)
    );

    // 4·width values a rank and block; activations do not know the cut.
    assert_eq!(workload.adapter_values(5, 8), 5.0 * 8.0 * 4.0 * width);
    assert_eq!(workload.adapter_bits(5, 8), 32.0 * workload.adapter_values(5, 8));
    assert_eq!(workload.label_bits(), 32.0 * rows);
    assert_eq!(workload.activation_bits(WireForm::F16), 16.0 * rows * width);
}

#[test]
fn adapter_values_are_those_of_the_layout() {
    for case in cases() {
        for targets in case.target_sets() {
            let spec = LoraSpec::new(case.rank, 16.0, targets.iter().copied()).unwrap();
            for blocks in 0..=case.config.blocks {
                let adapter = Adapter::init(&case.config, &spec, 0..blocks, 0).unwrap();
                assert_eq!(
                    case.workload(&targets, Convention::Dense)
                        .adapter_values(blocks, case.rank),
                    adapter.values.len() as f64
                );
            }
        }
    }
}

#[test]
fn activation_bits_are_those_of_the_wire() {
    for (rows, seq, width) in [(1, 1, 1), (3, 5, 7), (1, 45, 70), (4, 128, 768)] {
        for &form in WireForm::ALL {
            let bytes = form.bytes(rows * seq, width).unwrap();
            assert_eq!(form.bits(rows * seq, width), 8.0 * bytes as f64);
        }
    }
}

#[test]
fn client_memory_is_what_a_stack_takes() {
    for case in cases() {
        for format in Format::ALL {
            for targets in case.target_sets() {
                let cut = case.cut;
                let engine = Engine::cpu();
                let _stack = case.stack(&engine, 0..cut, &targets, format);
                let workload = case.workload(&targets, Convention::Issued);
                let held = engine.buffer_bytes() as f64 + workload.unit_bytes(Unit::Embedding, format);
                assert_eq!(
                    workload.client_memory_bytes(cut, case.rank, format, WireForm::F32),
                    held,
                    "cut {cut}, {targets:?}, {format}"
                );
                let wire = 2 * WireForm::Int8
                    .bytes(case.extent.batch * case.extent.seq, case.config.width)
                    .unwrap();
                assert_eq!(
                    workload.client_memory_bytes(cut, case.rank, format, WireForm::Int8),
                    held + wire as f64
                );
            }
        }
    }
}

#[test]
fn what_either_side_holds_is_told_apart_into_weights_and_training() {
    for case in cases() {
        let (model, cut) = (&case.config, case.cut);
        let targets = model.targets();
        let workload = case.workload(targets, Convention::Issued);
        let format = Format::Q8;
        let formats = |_: Unit, _: &str| format;
        let units = |units: &[Unit]| -> u64 {
            let bytes = units.iter().map(|&unit| workload.held_unit_bytes(unit, &formats));
            bytes.sum()
        };
        let blocks = |range: Range<usize>| range.map(Unit::Block).collect::<Vec<_>>();
        let held = |range: Range<usize>| {
            let engine = Engine::cpu();
            let _stack = case.stack(&engine, range, targets, format);
            engine.buffer_bytes()
        };
        let wire = 2 * WireForm::F16
            .bytes(case.extent.batch * case.extent.seq, model.width)
            .unwrap() as u64;

        let client = workload.client_bytes(cut, case.rank, &formats, WireForm::F16).unwrap();
        assert_eq!(client.weights, units(&blocks(0..cut)));
        assert_eq!(client.total(), held(0..cut) + wire);

        let server = workload.server_bytes(cut, case.rank, &formats, WireForm::F16).unwrap();
        assert!(
            server.weights > units(&blocks(cut..model.blocks)),
            "the head is held too"
        );
        assert_eq!(server.total(), held(cut..model.blocks) + wire);
    }
}
