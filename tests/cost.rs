//! The closed forms of `model::cost` against what recorded steps declare: products to the last operation, buffers to the last word,
//! and what the closed forms leave out.

use std::collections::BTreeMap;
use std::ops::Range;

use sflllm::compute::{Buffer, Command, Engine, Recording};
use sflllm::model::adapter::{Adapter, LoraSpec, Target};
use sflllm::model::architecture::Architecture;
use sflllm::model::block::BlockWeights;
use sflllm::model::cost::{Convention, Workload};
use sflllm::model::ends::{EmbeddingWeights, HeadWeights};
use sflllm::model::stack::{Stack, StackWeights};
use sflllm::model::weights::{Tensor, TensorData, Unit, UnitData};
use sflllm::model::workspace::Extent;
use sflllm::terms::format::Format;
use sflllm::terms::tensor::WireForm;

/// Kernels that are matrix products; all others are element-wise, or add up what products left in parts.
const PRODUCTS: [&str; 9] = [
    "matmul.forward",
    "matmul.forward_gelu",
    "matmul.backward_x",
    "lora.forward_down",
    "lora.backward_up",
    "lora.backward_partial",
    "attention.forward",
    "attention.backward_q",
    "attention.backward_kv",
];

struct Case {
    config: Architecture,
    extent: Extent,
    rank: usize,
    cut: usize,
}

fn config(blocks: usize, width: usize, heads: usize, vocab: usize, positions: usize) -> Architecture {
    Architecture {
        blocks,
        width,
        heads,
        ffn: 4 * width,
        vocab,
        positions,
        layernorm_epsilon: 1e-5,
        eos: None,
    }
}

fn odd() -> Case {
    Case {
        config: Architecture {
            ffn: 203,
            ..config(3, 70, 5, 301, 45)
        },
        extent: Extent { batch: 3, seq: 45 },
        rank: 3,
        cut: 2,
    }
}

fn demo() -> Case {
    let text = include_str!("../assets/demo/config.json");
    Case {
        config: Architecture::from_json(text).unwrap(),
        extent: Extent { batch: 4, seq: 128 },
        rank: 8,
        cut: 1,
    }
}

/// The shape of GPT-2 small with three of its blocks.
fn small() -> Case {
    Case {
        config: config(3, 768, 12, 50_257, 1024),
        extent: Extent { batch: 2, seq: 128 },
        rank: 8,
        cut: 2,
    }
}

fn target_sets() -> [Vec<Target>; 5] {
    [
        LoraSpec::parse_targets("c_attn").unwrap(),
        LoraSpec::parse_targets("c_attn,c_proj").unwrap(),
        Target::ALL.to_vec(),
        LoraSpec::parse_targets("c_fc").unwrap(),
        LoraSpec::parse_targets("mlp.c_proj").unwrap(),
    ]
}

fn zeros(config: &Architecture, unit: Unit, dtype: Format) -> UnitData {
    let tensor = |(name, shape): (&str, Vec<usize>)| {
        let elements: usize = shape.iter().product();
        let data = match dtype {
            Format::F16 if shape.len() == 2 => TensorData::F16(vec![0; elements.div_ceil(2)]),
            _ => TensorData::F32(vec![0.0; elements]),
        };
        Tensor {
            name: name.to_owned(),
            shape,
            data,
        }
    };
    UnitData {
        unit,
        tensors: unit.tensors(config).into_iter().map(tensor).collect(),
    }
}

impl Case {
    /// Blocks `range` for training, with the embedding, and with the head where they are the last.
    fn stack(&self, range: Range<usize>, targets: &[Target], dtype: Format) -> Stack {
        let (engine, config) = (Engine::cpu(), &self.config);
        let block = |block| BlockWeights::upload(&engine, config, &zeros(config, Unit::Block(block), dtype)).unwrap();
        let head = || HeadWeights::upload(&engine, &zeros(config, Unit::Final, dtype)).unwrap();
        let embedding = zeros(config, Unit::Embedding, dtype);
        let weights = StackWeights {
            embedding: Some(EmbeddingWeights::upload(&engine, config, &embedding).unwrap()),
            blocks: range.clone().map(block).collect(),
            first_block: range.start,
            head: (range.end == config.blocks).then(head),
        };
        let spec = LoraSpec::new(self.rank, 16.0, targets.iter().copied()).unwrap();
        let adapter = Adapter::init(config, &spec, range, 0).unwrap();
        let adapter = (&adapter.spec, &adapter.layout, &adapter.values[..]);
        Stack::new(&engine, config, weights, Some(adapter), self.extent, true).unwrap()
    }

    fn record(&self, record: impl FnOnce(&mut Recording)) -> Recording {
        let mut recording = Engine::cpu().recording();
        record(&mut recording);
        recording
    }

    fn workload(&self, targets: &[Target]) -> Workload {
        Workload::new(&self.config, targets, self.extent, Convention::Issued)
    }
}

/// FLOP by kernel.
fn flops_by_kernel(recording: &Recording) -> BTreeMap<&'static str, f64> {
    let mut flops = BTreeMap::new();
    for command in recording.commands() {
        if let Command::Dispatch(dispatch) = command {
            *flops.entry(dispatch.kernel.name).or_default() += dispatch.cost.flops;
        }
    }
    flops
}

fn product_flops(recording: &Recording) -> f64 {
    flops_by_kernel(recording)
        .into_iter()
        .filter(|(kernel, _)| PRODUCTS.contains(kernel))
        .map(|(_, flops)| flops)
        .sum()
}

fn other_flops(recordings: &[&Recording]) -> f64 {
    recordings
        .iter()
        .map(|recording| recording.cost().flops - product_flops(recording))
        .sum()
}

/// Bytes of all buffers that the recordings name.
fn buffer_bytes(recordings: &[&Recording]) -> usize {
    let mut buffers: Vec<&Buffer> = Vec::new();
    let mut add = |buffer| {
        if !buffers.iter().any(|known: &&Buffer| known.is(buffer)) {
            buffers.push(buffer);
        }
    };
    for command in recordings.iter().flat_map(|recording| recording.commands()) {
        match command {
            Command::Dispatch(dispatch) => dispatch.buffers.iter().for_each(&mut add),
            Command::Copy {
                source, destination, ..
            } => [source, destination].into_iter().for_each(&mut add),
            Command::Clear(buffer) => add(buffer),
        }
    }
    buffers.iter().map(|buffer| 4 * buffer.words()).sum()
}

#[test]
fn the_closed_forms_count_every_product_that_a_split_step_records() {
    for case in [odd(), demo(), small()] {
        let seq = case.extent.seq;
        for targets in target_sets() {
            let workload = case.workload(&targets);
            let (cut, rank) = (case.cut, case.rank);
            let what = |pass: &str| format!("{pass}, {targets:?}, width {}", case.config.width);

            let client = case.stack(0..cut, &targets, Format::F16);
            let forward = case.record(|recording| {
                client.record_embedding(recording, seq);
                client.record_blocks(recording, seq);
            });
            let backward = case.record(|recording| {
                client.record_backward(recording, seq, false);
                client.record_update(recording);
            });
            assert_eq!(
                product_flops(&forward),
                workload.client_forward_flops(cut, rank),
                "{}",
                what("client forward")
            );
            assert_eq!(
                product_flops(&backward),
                workload.client_backward_flops(cut, rank),
                "{}",
                what("client backward")
            );

            let server = case.stack(cut..case.config.blocks, &targets, Format::F16);
            let step = case.record(|recording| {
                server.record_blocks(recording, seq);
                server.record_loss(recording, seq, true);
                server.record_backward(recording, seq, true);
                server.record_update(recording);
            });
            assert_eq!(
                product_flops(&step),
                workload.server_flops(cut, rank),
                "{}",
                what("server")
            );
            let evaluation = case.record(|recording| {
                server.record_blocks(recording, seq);
                server.record_loss(recording, seq, false);
            });
            assert_eq!(
                product_flops(&evaluation),
                workload.server_forward_flops(cut, rank),
                "{}",
                what("server forward")
            );
            assert_eq!(
                product_flops(&forward) + product_flops(&backward) + product_flops(&step),
                workload.step_flops(cut, rank),
                "{}",
                what("both sides")
            );
        }
    }
}

#[test]
fn a_centralised_step_is_a_cut_above_all_blocks() {
    let case = odd();
    let (seq, blocks) = (case.extent.seq, case.config.blocks);
    for targets in target_sets() {
        let stack = case.stack(0..blocks, &targets, Format::F32);
        let step = case.record(|recording| {
            stack.record_embedding(recording, seq);
            stack.record_blocks(recording, seq);
            stack.record_loss(recording, seq, true);
            stack.record_backward(recording, seq, false);
            stack.record_update(recording);
        });
        assert_eq!(
            product_flops(&step),
            case.workload(&targets).step_flops(blocks, case.rank),
            "{targets:?}"
        );
    }
}

#[test]
fn element_wise_work_is_a_small_share() {
    for (case, largest) in [(odd(), 0.03), (demo(), 0.015), (small(), 0.0025)] {
        let seq = case.extent.seq;
        let targets = Target::ALL;
        let (config, rows) = (&case.config, (case.extent.batch * seq) as f64);
        let client = case.stack(0..case.cut, &targets, Format::F16);
        let server = case.stack(case.cut..config.blocks, &targets, Format::F16);
        let client = case.record(|recording| {
            client.record_embedding(recording, seq);
            client.record_blocks(recording, seq);
            client.record_backward(recording, seq, false);
        });
        let server = case.record(|recording| {
            server.record_blocks(recording, seq);
            server.record_loss(recording, seq, true);
            server.record_backward(recording, seq, true);
        });
        let both = [&client, &server];
        let other = other_flops(&both);
        let share = other / (client.cost().flops + server.cost().flops);
        assert!(share < largest, "width {}: {share}", config.width);

        // What the kernels declare: two norms forward (8) and backward (14), dot (2) a value of a row's width, GELU's derivative (17)
        // a value of its inner width; no first norm's derivative on the lowest block.
        let (width, ffn, blocks) = (config.width as f64, config.ffn as f64, config.blocks as f64);
        let in_blocks = rows * (blocks * (2.0 * 8.0 + 2.0 * 14.0 + 2.0) * width - 14.0 * width + blocks * 17.0 * ffn);
        let ends = rows * (width + (8.0 + 14.0 + 3.0) * width + 4.0 * config.vocab as f64 + 3.0);
        let sums = both
            .iter()
            .flat_map(|recording| flops_by_kernel(recording))
            .filter(|(kernel, _)| matches!(*kernel, "lora.backward_a" | "lora.backward_b"))
            .map(|(_, flops)| flops)
            .sum::<f64>();
        assert_eq!(other, in_blocks + ends + sums, "width {}", config.width);
    }
}

#[test]
fn the_textbook_forms_hold_for_gpt2_small() {
    let config = config(12, 768, 12, 50_257, 1024);
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

    // Causal attention is about half of dense attention, and its backward pass 7 products for 4.
    let issued = Workload::new(&config, &[Target::AttnQkv], extent, Convention::Issued);
    let saved = workload.block_forward_flops(8) - issued.block_forward_flops(8);
    assert_eq!(saved, 2.0 * rows * (seq - 1.0) * width);
}

#[test]
fn adapter_values_are_those_of_the_layout() {
    for case in [odd(), demo()] {
        for targets in target_sets() {
            let spec = LoraSpec::new(case.rank, 16.0, targets.iter().copied()).unwrap();
            for blocks in 0..=case.config.blocks {
                let adapter = Adapter::init(&case.config, &spec, 0..blocks, 0).unwrap();
                assert_eq!(
                    case.workload(&targets).adapter_values(blocks, case.rank),
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
fn client_memory_is_what_the_stack_allocates() {
    for (case, dtype) in [(odd(), Format::F16), (odd(), Format::F32), (demo(), Format::F16)] {
        let seq = case.extent.seq;
        for targets in target_sets() {
            for cut in 1..case.config.blocks {
                let stack = case.stack(0..cut, &targets, dtype);
                let forward = case.record(|recording| {
                    stack.record_embedding(recording, seq);
                    stack.record_blocks(recording, seq);
                });
                // To the input: without that, scratch that a lowest adapter leaves unused would not be named.
                let backward = case.record(|recording| {
                    stack.record_backward(recording, seq, true);
                    stack.record_update(recording);
                });
                let workload = case.workload(&targets);
                assert_eq!(
                    workload.client_memory_bytes(cut, case.rank, dtype, WireForm::F32),
                    buffer_bytes(&[&forward, &backward]) as f64,
                    "cut {cut}, {targets:?}, {dtype:?}"
                );
                let packed = workload.client_memory_bytes(cut, case.rank, dtype, WireForm::Int8);
                let wire = 2 * WireForm::Int8
                    .bytes(case.extent.batch * seq, case.config.width)
                    .unwrap();
                assert_eq!(packed, (buffer_bytes(&[&forward, &backward]) + wire) as f64);
            }
        }
    }
}
