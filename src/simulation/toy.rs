//! The toy model: a chain of blocks, each of which adds a part of its adapter to what it is given, trained by gradient descent
//! with momentum. The blocks up to the cut are the client's; where the cut is makes no difference to one client's run.
//!
//! Separate because it is all that is not real in a simulated run.

use super::scenario::Scenario;
use crate::federated::Rule;
use crate::protocol::message::{Assignment, RunConfig};
use crate::terms;
use crate::terms::adapter::{AdapterShape, MatrixShape};
use crate::terms::aggregation::Aggregation;
use crate::terms::ids::RunId;
use crate::terms::moments::Moments;
use crate::terms::optimizer::OptimizerSettings;
use crate::terms::tensor::{WireForm, WireLayout, WireTensor};

pub(super) const BATCH: u32 = 2;
pub(super) const SEQ: u32 = 2;
pub(super) const WIDTH: u32 = 2;
pub(super) const VOCAB: u32 = 11;
/// Numbers of a block's adapter, and of a step's activations.
pub(super) const NUMBERS: usize = (BATCH * SEQ * WIDTH) as usize;
/// Blocks of the toy model.
pub(super) const BLOCKS: usize = 4;
/// What of its adapter a block adds to what it is given.
const SHARE: f32 = 0.25;

/// Values and what training keeps of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Trained {
    pub values: Vec<f32>,
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

impl Trained {
    pub fn new(values: Vec<f32>) -> Trained {
        let zeros = vec![0.0; values.len()];
        Trained {
            values,
            first: zeros.clone(),
            second: zeros,
        }
    }

    /// Moves every block by the gradient of its output.
    pub fn step(&mut self, d_out: impl Fn(usize) -> f32) {
        for index in 0..self.values.len() {
            let d_value = SHARE * d_out(index);
            self.first[index] = 0.5 * self.first[index] + d_value;
            self.second[index] += d_value * d_value;
            self.values[index] -= 0.4 * self.first[index];
        }
    }

    /// Runs the blocks from this value on.
    pub fn run(&self, from: usize, x: &mut [f32]) {
        for (index, value) in self.values.iter().enumerate().skip(from) {
            x[index % NUMBERS] += SHARE * value;
        }
    }

    /// The moments from this value on.
    pub fn moments(&self, from: usize, steps: u64) -> Moments {
        Moments {
            steps,
            first: self.first[from..].to_vec(),
            second: self.second[from..].to_vec(),
        }
    }

    /// Takes the blocks from a value on out, and leaves the others.
    pub(crate) fn split_off(&mut self, from: usize) -> Trained {
        Trained {
            values: self.values.split_off(from),
            first: self.first.split_off(from),
            second: self.second.split_off(from),
        }
    }

    pub fn extend(&mut self, other: Trained) {
        self.values.extend(other.values);
        self.first.extend(other.first);
        self.second.extend(other.second);
    }
}

/// Of all blocks.
pub(super) fn initial_adapter() -> Vec<f32> {
    (0..NUMBERS * BLOCKS).map(|index| 0.5 - 0.125 * index as f32).collect()
}

pub(super) fn assignment(scenario: &Scenario, split: u32) -> Assignment {
    let config = RunConfig {
        rank: 1,
        alpha: 8.0,
        wire: WireForm::F32,
        seed: scenario.seed,
        local_steps: scenario.local_steps,
        rounds: scenario.rounds,
        optimizer: OptimizerSettings {
            lr: 0.1,
            weight_decay: 0.0,
            total_steps: u64::from(scenario.rounds * scenario.local_steps),
            ..OptimizerSettings::default()
        },
        moments: scenario.aggregation.moments(),
        ..RunConfig::new(split, (BATCH, SEQ), (WIDTH, VOCAB), ["c_attn"])
    };
    Assignment {
        adapter_len: u64::from(split) * NUMBERS as u64,
        trained: scenario.aggregation.trained(),
        ..Assignment::new(RunId([3; 16]), config, "{}".to_owned())
    }
}

/// How the toy's adapters are aggregated: a block has one matrix of rank 1.
pub(super) fn rule(aggregation: Aggregation) -> Rule {
    let (inputs, outputs) = match aggregation.trained() {
        terms::adapter::Trained::Both => (NUMBERS as u32 / 2, NUMBERS as u32 / 2),
        terms::adapter::Trained::B => (1, NUMBERS as u32),
    };
    AdapterShape::new(1, aggregation.trained(), vec![MatrixShape { inputs, outputs }])
        .and_then(|shape| Rule::new(aggregation, shape))
        .expect("the toy has a matrix")
}

pub(super) fn to_tensor(values: &[f32]) -> WireTensor {
    let layout = WireLayout {
        form: WireForm::F32,
        batch: BATCH,
        seq: SEQ,
        width: WIDTH,
    };
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    WireTensor::new(layout, bytes).expect("the toy's tensors have one size")
}

pub(super) fn from_tensor(tensor: &WireTensor) -> Vec<f32> {
    let words = tensor.bytes().as_chunks::<4>().0;
    words.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}
