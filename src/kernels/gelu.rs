//! GELU in the tanh form of GPT-2 (Hendrycks and Gimpel, arXiv 1606.08415), forward and its gradient.

use super::attention::exp;
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Kernel;
use crate::compute::{Buffer, Cost, Recording, linear_workgroups};
use crate::{kernel, params};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Elements a CPU task takes at once.
const BLOCK: usize = 4096;

/// √(2/π)
const ROOT: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

params! {
    pub struct Params {
        pub n: u32,
    }
}

kernel! {
    /// `out = x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³)))`.
    pub static FORWARD = "gelu.forward", "gelu", "forward", Params,
    [x: Read f32, out: Write f32], forward_cpu
}

kernel! {
    /// Gradient with respect to the pre-activation `x`.
    pub static BACKWARD_X = "gelu.backward_x", "gelu", "backward_x", Params,
    [x: Read f32, d_out: Read f32, d_x: Write f32], backward_x_cpu
}

/// The kernels of this family.
pub static ALL: &[&Kernel] = &[&FORWARD, &BACKWARD_X];

/// Records `out = gelu(x)` over the first `n` elements.
pub fn forward(recording: &mut Recording, n: usize, x: &Buffer, out: &Buffer) {
    recording.dispatch(
        &FORWARD,
        vec![],
        Params { n: n as u32 },
        &[x, out],
        linear_workgroups(n, WORKGROUP),
        Cost {
            flops: 9.0 * n as f64,
            bytes: 8.0 * n as f64,
        },
    );
}

/// Records `d_x = gelu'(x) · d_out`; `x` is the pre-activation.
pub fn backward_x(recording: &mut Recording, n: usize, x: &Buffer, d_out: &Buffer, d_x: &Buffer) {
    recording.dispatch(
        &BACKWARD_X,
        vec![],
        Params { n: n as u32 },
        &[x, d_out, d_x],
        linear_workgroups(n, WORKGROUP),
        Cost {
            flops: 17.0 * n as f64,
            bytes: 12.0 * n as f64,
        },
    );
}

/// The logistic function of twice the inner cubic `√(2/π)(x + 0.044715 x³)`: `(1 + tanh(inner))/2`, without the cancellation.
#[inline(always)]
fn gate(x: f32) -> f32 {
    let inner = ROOT * (x + CUBIC * x * x * x);
    let e = exp(-2.0 * inner.abs());
    let numerator = if inner < 0.0 { e } else { 1.0 };
    numerator / (1.0 + e)
}

/// GELU of one value.
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    x * gate(x)
}

/// The specification of `gelu.forward`.
pub fn forward_cpu(
    params: &Params,
    x: &[f32],       // (n)
    out: &mut [f32], // (n)
) {
    let n = params.n as usize;
    for_each_row(&mut out[..n], BLOCK, |block, out| {
        let x = &x[block * BLOCK..][..out.len()];
        for (out, &x) in out.iter_mut().zip(x) {
            *out = gelu(x);
        }
    });
}

/// The specification of `gelu.backward_x`.
pub fn backward_x_cpu(
    params: &Params,
    x: &[f32],       // (n)
    d_out: &[f32],   // (n)
    d_x: &mut [f32], // (n)
) {
    let n = params.n as usize;
    for_each_row(&mut d_x[..n], BLOCK, |block, d_x| {
        let x = &x[block * BLOCK..][..d_x.len()];
        let d_out = &d_out[block * BLOCK..][..d_x.len()];
        for ((d_x, &x), d_out) in d_x.iter_mut().zip(x).zip(d_out) {
            let gate = gate(x);
            let d_inner = ROOT * (1.0 + 3.0 * CUBIC * x * x);
            *d_x = d_out * (gate + 2.0 * x * gate * (1.0 - gate) * d_inner);
        }
    });
}
