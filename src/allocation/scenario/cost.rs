//! What a local step takes on given devices.
//!
//! Separate because devices may be a scenario's, or real ones that were measured.

use super::super::delay::Cell;
use crate::model::cost::Workload;
use crate::terms::format::Format;
use crate::terms::tensor::WireForm;

/// What the devices do in a second.
#[derive(Clone, Debug, PartialEq)]
pub struct Speeds {
    /// `[client]`, in FLOP/s.
    pub client_forward: Vec<f64>,
    /// `[client]`, in FLOP/s.
    pub client_backward: Vec<f64>,
    /// In FLOP/s, over forward and backward.
    pub server: f64,
}

/// What one local step takes on given devices, for the cells of a problem.
pub struct CellCosts<'a> {
    /// The arithmetic and the bytes of a step.
    pub workload: &'a Workload,
    /// What the devices do in a second.
    pub speeds: &'a Speeds,
    /// How activations travel.
    pub wire: WireForm,
    /// How frozen weights are held, which counts for memory.
    pub weights: Format,
    /// `[client]`: joules for a floating-point operation.
    pub joules_per_flop: Vec<f64>,
}

impl CellCosts<'_> {
    /// The cells of `splits` and `ranks`.
    pub fn cells(&self, splits: &[u32], ranks: &[u32]) -> Vec<Vec<Cell>> {
        let row = |&split: &u32| {
            ranks
                .iter()
                .map(|&rank| self.cell(split as usize, rank as usize))
                .collect()
        };
        splits.iter().map(row).collect()
    }

    fn cell(&self, split: usize, rank: usize) -> Cell {
        let Self { workload, speeds, .. } = self;
        let clients = speeds.client_forward.len();
        let (forward, backward) = (
            workload.client_forward_flops(split, rank),
            workload.client_backward_flops(split, rank),
        );
        let memory = workload.client_memory_bytes(split, rank, self.weights, self.wire);
        let activation_bits = workload.activation_bits(self.wire);
        Cell {
            client_forward_s: speeds.client_forward.iter().map(|speed| forward / speed).collect(),
            client_backward_s: speeds.client_backward.iter().map(|speed| backward / speed).collect(),
            server_s: clients as f64 * workload.server_flops(split, rank) / speeds.server,
            upload_bits: activation_bits + workload.label_bits(),
            adapter_bits: workload.adapter_bits(split, rank),
            gradient_bits: activation_bits,
            compute_j: (self.joules_per_flop.iter())
                .map(|joules| joules * (forward + backward))
                .collect(),
            memory_bytes: vec![memory; clients],
        }
    }
}
