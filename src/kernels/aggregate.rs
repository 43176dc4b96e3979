//! The weighted mean of clients' adapters, FedAvg's aggregation (McMahan et al., arXiv 1602.05629).

use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Kernel;
use crate::compute::{Buffer, Cost, Recording, linear_workgroups};
use crate::{kernel, params};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Elements a CPU task takes at once.
const BLOCK: usize = 4096;

params! {
    pub struct Params {
        /// Elements of one adapter.
        pub n: u32,
        pub clients: u32,
    }
}

kernel! {
    /// `out = Σ_k (weights[k] / Σ weights) · stacked[k]`.
    pub static MEAN = "aggregate.mean", "aggregate", "mean", Params,
    [stacked: Read f32, weights: Read f32, out: Write f32], mean_cpu
}

/// The kernels of this family.
pub static ALL: &[&Kernel] = &[&MEAN];

/// Records the weighted mean of `stacked` (clients, n) over its rows into `out` (n). `weights` (clients) need not sum to 1 but
/// must have a positive sum; with one client the mean is exactly its row.
pub fn mean(recording: &mut Recording, params: Params, stacked: &Buffer, weights: &Buffer, out: &Buffer) {
    let (n, clients) = (params.n as f64, params.clients as f64);
    recording.dispatch(
        &MEAN,
        vec![],
        params,
        &[stacked, weights, out],
        linear_workgroups(params.n as usize, WORKGROUP),
        Cost {
            flops: 2.0 * n * clients,
            bytes: 4.0 * n * (clients + 1.0),
        },
    );
}

/// The specification of `aggregate.mean`.
pub fn mean_cpu(
    params: &Params,
    stacked: &[f32], // (clients, n)
    weights: &[f32], // (clients)
    out: &mut [f32], // (n)
) {
    let (n, clients) = (params.n as usize, params.clients as usize);
    let total: f32 = weights[..clients].iter().sum();
    for_each_row(&mut out[..n], BLOCK, |block, out| {
        out.fill(0.0);
        for client in 0..clients {
            let share = weights[client] / total;
            let stacked = &stacked[client * n + block * BLOCK..][..out.len()];
            for (out, value) in out.iter_mut().zip(stacked) {
                *out += share * value;
            }
        }
    });
}
