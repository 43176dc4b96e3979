//! The residual stream: adding one tensor to another in place.

use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Kernel;
use crate::compute::{Buffer, Cost, Recording, linear_workgroups};
use crate::{kernel, params};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Elements a CPU task takes at once.
const BLOCK: usize = 16_384;

params! {
    pub struct Params {
        pub n: u32,
    }
}

kernel! {
    /// `out += x`.
    pub static ACCUMULATE = "residual.accumulate", "residual", "accumulate", Params,
    [x: Read f32, out: Write f32], accumulate_cpu
}

/// The kernels of this family.
pub static ALL: &[&Kernel] = &[&ACCUMULATE];

/// Records `out += x` over the first `n` elements.
pub fn accumulate(recording: &mut Recording, n: usize, x: &Buffer, out: &Buffer) {
    recording.dispatch(
        &ACCUMULATE,
        vec![],
        Params { n: n as u32 },
        &[x, out],
        linear_workgroups(n, WORKGROUP),
        Cost {
            flops: n as f64,
            bytes: 12.0 * n as f64,
        },
    );
}

/// The specification of `residual.accumulate`.
pub fn accumulate_cpu(
    params: &Params,
    x: &[f32],       // (n)
    out: &mut [f32], // (n)
) {
    let n = params.n as usize;
    for_each_row(&mut out[..n], BLOCK, |block, out| {
        let x = &x[block * BLOCK..][..out.len()];
        for (out, x) in out.iter_mut().zip(x) {
            *out += x;
        }
    });
}
