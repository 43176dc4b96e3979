//! The device's own rate of multiply-adds, that other kernels' rates are given as fractions of.

use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;
/// Independent chains of sixteen values each: enough to fill a large GPU.
pub const LANES: usize = 1 << 16;
/// Multiply-adds of a value.
const ROUNDS: u32 = 512;
/// Lanes a thread of the CPU engine takes at a time.
const BLOCK: usize = 1024;

params! {
    pub struct Params {
        pub lanes: u32,
        pub rounds: u32,
    }
}

contract! {
    /// `rounds` multiply-adds on sixteen values a lane.
    pub(crate) static MULTIPLY_ADD = "peak.multiply_add", Params,
    [out: Write f32],
    spec: spec::multiply_add, host: multiply_add_host, variants: [MULTIPLY_ADD_LANE]
}

variant! {
    /// An invocation a lane.
    static MULTIPLY_ADD_LANE = MULTIPLY_ADD, "lane", ["peak"], "multiply_add", Params,
    grid: |params| linear_workgroups(params.lanes as usize, WORKGROUP),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&MULTIPLY_ADD];

/// Records [`LANES`] lanes of multiply-adds; `out` is ([`LANES`]).
pub fn multiply_add(recording: &mut Recording, out: &Buffer) {
    recording.dispatch(
        &MULTIPLY_ADD,
        Params {
            lanes: LANES as u32,
            rounds: ROUNDS,
        },
        &[out],
        Cost {
            flops: LANES as f64 * f64::from(ROUNDS) * 32.0,
            bytes: LANES as f64 * 4.0,
        },
    );
}

/// The mathematics in plain loops.
pub mod spec {
    use super::Params;

    pub fn multiply_add(
        params: &Params,
        out: &mut [f32], // (lanes)
    ) {
        let lanes = params.lanes as usize;
        for lane in 0..lanes {
            let start = lane as f32 / lanes as f32;
            let factor = 0.5 + 0.25 * start;
            let step = [0.125, 0.25, 0.375, 0.5];
            let mut sum = 0.0;
            for j in 0..16 {
                let mut value = start + (j / 4) as f32 * step[j % 4];
                for _ in 0..params.rounds {
                    value = value * factor + step[j % 4];
                }
                sum += value;
            }
            out[lane] = sum;
        }
    }
}

/// [`spec::multiply_add`] on all cores, sixteen values at a time.
fn multiply_add_host(
    params: &Params,
    out: &mut [f32], // (lanes)
) {
    let lanes = params.lanes as usize;
    for_each_row(&mut out[..lanes], BLOCK, |block, out| {
        for (i, out) in out.iter_mut().enumerate() {
            let start = (block * BLOCK + i) as f32 / lanes as f32;
            let factor = 0.5 + 0.25 * start;
            let step = [0.125, 0.25, 0.375, 0.5];
            let mut values = [0.0f32; 16];
            for (j, value) in values.iter_mut().enumerate() {
                *value = start + (j / 4) as f32 * step[j % 4];
            }
            for _ in 0..params.rounds {
                for (j, value) in values.iter_mut().enumerate() {
                    *value = *value * factor + step[j % 4];
                }
            }
            *out = values.iter().sum();
        }
    });
}
