//! The gradient of GELU in the tanh form of GPT-2 (Hendrycks and Gimpel, arXiv 1606.08415). Its forward pass is an epilogue of
//! [`matmul`](super::matmul), which keeps the pre-activation for this.
//!
//! | version | idea | measured |
//! |---|---|---|
//! | 1 | an invocation an element; bound by memory | not measured on a GPU yet |

use super::case::{Example, case};
use crate::compute::cpu::for_each_row;
use crate::compute::host::exp;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Elements a CPU task takes at once.
const BLOCK: usize = 4096;

/// √(2/π)
const ROOT: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

params! {
    /// Sizes for gelu's kernels.
    pub struct Params {
        pub n: u32,
    }
}

contract! {
    /// Gradient with respect to the pre-activation `x`.
    pub(crate) static BACKWARD_X = "gelu.backward_x", Params,
    [x: Read f32, d_out: Read f32, d_x: Write f32],
    spec: spec::backward_x, host: backward_x_host, variants: [BACKWARD_X_ELEMENT]
}

variant! {
    /// An invocation an element.
    static BACKWARD_X_ELEMENT = BACKWARD_X, "element", ["gelu"], "backward_x", Params,
    grid: |params| linear_workgroups(params.n as usize, WORKGROUP),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&BACKWARD_X];

/// Records `d_x = gelu'(x) · d_out`; `x` is the pre-activation.
pub fn backward_x(recording: &mut Recording, n: usize, x: &Buffer, d_out: &Buffer, d_x: &Buffer) {
    recording.dispatch(
        &BACKWARD_X,
        Params { n: n as u32 },
        &[x, d_out, d_x],
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

/// What benches time.
pub(crate) static EXAMPLES: &[Example] = &[Example {
    name: "gelu.backward_x",
    shape: |s| format!("{}x{}", s.rows(), 4 * s.width),
    build: |b, s| {
        let n = s.rows() * 4 * s.width;
        let x = b.random("x", n)?;
        let d_out = b.random("d_out", n)?;
        let d_x = b.zeros("d_x", n)?;
        Ok(case(&[(&d_x.clone(), n)], false, move |recording| {
            backward_x(recording, n, &x, &d_out, &d_x);
        }))
    },
}];

/// The mathematics in plain loops.
pub mod spec {
    use super::Params;
    use crate::compute::real::Real;

    const ROOT: f32 = 0.797_884_6;
    const CUBIC: f32 = 0.044_715;

    /// `x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³)))`.
    pub fn gelu<T: Real>(x: T) -> T {
        let inner = T::from(ROOT) * (x + T::from(CUBIC) * x * x * x);
        T::from(0.5) * x * (T::ONE + inner.tanh())
    }

    /// The gradient of the input, from that of the output.
    pub fn backward_x<T: Real>(
        params: &Params,
        x: &[T],       // (n)
        d_out: &[T],   // (n)
        d_x: &mut [T], // (n)
    ) {
        for i in 0..params.n as usize {
            let x = x[i];
            let inner = T::from(ROOT) * (x + T::from(CUBIC) * x * x * x);
            let d_inner = T::from(ROOT) * (T::ONE + T::from(3.0 * CUBIC) * x * x);
            let tanh = inner.tanh();
            let slope = T::from(0.5) * (T::ONE + tanh) + T::from(0.5) * x * (T::ONE - tanh * tanh) * d_inner;
            d_x[i] = d_out[i] * slope;
        }
    }
}

/// [`spec::backward_x`] on all cores, without the cancellation of `1 - tanh²`.
fn backward_x_host(
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
