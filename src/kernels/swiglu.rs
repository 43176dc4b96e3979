//! The gated activation of Llama's MLP (SwiGLU, arXiv 2002.05202): `silu(gate) · up`, forward and the gradient with respect to
//! both, on the two halves of a fused projection's rows. Separate from the products around it, so that the projection can be one
//! matrix or two.
//!
//! | version    | idea                                                | measured |
//! |------------|-----------------------------------------------------|----------|
//! | `elements` | an invocation an element of `out`                    | not measured on a GPU yet |
//! | host       | a row a task, with an exponential that vectorises    | forward 0.8 G elements/s a core |
//! | host       | compiled for the machine's vectors                   | forward 3.1 G, backward 2.6 G |
//!
//! Host figures: a core of an AMD EPYC with AVX-512, 512 rows of 1,536.

use super::case::{Builder, Case, Example, Sizes, case};
use crate::compute::cpu::for_each_row;
use crate::compute::host::exp;
use crate::compute::host::simd::{Instructions, Simd, Vectorised};
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, Error, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

params! {
    /// Sizes for swiglu's kernels.
    pub struct Params {
        pub rows: u32,
        /// Columns of the gate, and of what it lets through.
        pub ffn: u32,
    }
}

impl Params {
    fn elements(&self) -> usize {
        self.rows as usize * self.ffn as usize
    }
}

contract! {
    /// `out = silu(gate) · up`, `silu(g) = g / (1 + e⁻ᵍ)`.
    pub(crate) static FORWARD = "swiglu.forward", Params,
    [gate_up: Read f32, out: Write f32],
    spec: spec::forward, host: forward_host, variants: [FORWARD_ELEMENTS]
}

variant! {
    /// An invocation an element of `out`.
    static FORWARD_ELEMENTS = FORWARD, "elements", ["swiglu"], "forward", Params,
    grid: |params| linear_workgroups(params.elements(), WORKGROUP),
}

contract! {
    /// Gradient with respect to `gate_up`.
    pub(crate) static BACKWARD_X = "swiglu.backward_x", Params,
    [gate_up: Read f32, d_out: Read f32, d_gate_up: Write f32],
    spec: spec::backward_x, host: backward_x_host, variants: [BACKWARD_X_ELEMENTS]
}

variant! {
    /// An invocation an element of `d_out`.
    static BACKWARD_X_ELEMENTS = BACKWARD_X, "elements", ["swiglu"], "backward_x", Params,
    grid: |params| linear_workgroups(params.elements(), WORKGROUP),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&FORWARD, &BACKWARD_X];

/// Records `out = silu(gate) · up`: `gate_up` (rows, 2·ffn), gates before ups, to `out` (rows, ffn).
pub fn forward(recording: &mut Recording, params: Params, gate_up: &Buffer, out: &Buffer) {
    let elements = params.elements() as f64;
    recording.dispatch(
        &FORWARD,
        params,
        &[gate_up, out],
        Cost {
            flops: 5.0 * elements,
            bytes: 12.0 * elements,
        },
    );
}

/// Records `d_gate_up` (rows, 2·ffn), the gradient of [`forward`], from `d_out` (rows, ffn).
pub fn backward_x(recording: &mut Recording, params: Params, gate_up: &Buffer, d_out: &Buffer, d_gate_up: &Buffer) {
    let elements = params.elements() as f64;
    recording.dispatch(
        &BACKWARD_X,
        params,
        &[gate_up, d_out, d_gate_up],
        Cost {
            flops: 11.0 * elements,
            bytes: 20.0 * elements,
        },
    );
}

/// The mathematics in plain loops.
pub mod spec {
    use super::Params;
    use crate::compute::real::Real;

    fn sigmoid<T: Real>(value: T) -> T {
        T::ONE / (T::ONE + (-value).exp())
    }

    /// `up · gate · sigmoid(gate)`.
    pub fn forward<T: Real>(
        params: &Params,
        gate_up: &[T], // (rows, 2 * ffn): gate, then up
        out: &mut [T], // (rows, ffn)
    ) {
        let ffn = params.ffn as usize;
        for row in 0..params.rows as usize {
            for i in 0..ffn {
                let gate = gate_up[row * 2 * ffn + i];
                let up = gate_up[row * 2 * ffn + ffn + i];
                out[row * ffn + i] = gate * sigmoid(gate) * up;
            }
        }
    }

    /// The gradients of gate and up, from that of the output.
    pub fn backward_x<T: Real>(
        params: &Params,
        gate_up: &[T],       // (rows, 2 * ffn): gate, then up
        d_out: &[T],         // (rows, ffn)
        d_gate_up: &mut [T], // (rows, 2 * ffn)
    ) {
        let ffn = params.ffn as usize;
        for row in 0..params.rows as usize {
            for i in 0..ffn {
                let gate = gate_up[row * 2 * ffn + i];
                let up = gate_up[row * 2 * ffn + ffn + i];
                let s = sigmoid(gate);
                let d = d_out[row * ffn + i];
                d_gate_up[row * 2 * ffn + i] = d * up * s * (T::ONE + gate * (T::ONE - s));
                d_gate_up[row * 2 * ffn + ffn + i] = d * gate * s;
            }
        }
    }
}

/// Below -87 as at -87, where nothing is left of the product with any gate.
#[inline(always)]
fn sigmoid(value: f32) -> f32 {
    1.0 / (1.0 + exp((-value).min(87.0)))
}

/// [`spec::forward`] on all cores.
fn forward_host(
    params: &Params,
    gate_up: &[f32], // (rows, 2 * ffn)
    out: &mut [f32], // (rows, ffn)
) {
    let (ffn, simd) = (params.ffn as usize, Simd::detect());
    for_each_row(&mut out[..params.elements()], ffn, |row, out| {
        let (gate, up) = gate_up[row * 2 * ffn..][..2 * ffn].split_at(ffn);
        simd.run(ForwardRow { gate, up, out });
    });
}

struct ForwardRow<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Vectorised for ForwardRow<'_> {
    #[inline(always)]
    fn run<I: Instructions, const ROWS: usize, const LANES: usize>(self) {
        for ((out, &gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = gate * sigmoid(gate) * up;
        }
    }
}

/// [`spec::backward_x`] on all cores.
fn backward_x_host(
    params: &Params,
    gate_up: &[f32],       // (rows, 2 * ffn)
    d_out: &[f32],         // (rows, ffn)
    d_gate_up: &mut [f32], // (rows, 2 * ffn)
) {
    let (ffn, simd) = (params.ffn as usize, Simd::detect());
    for_each_row(&mut d_gate_up[..2 * params.elements()], 2 * ffn, |row, d_gate_up| {
        let (gate, up) = gate_up[row * 2 * ffn..][..2 * ffn].split_at(ffn);
        let (d_gate, d_up) = d_gate_up.split_at_mut(ffn);
        simd.run(BackwardRow {
            gate,
            up,
            d_out: &d_out[row * ffn..][..ffn],
            d_gate,
            d_up,
        });
    });
}

struct BackwardRow<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    d_out: &'a [f32],
    d_gate: &'a mut [f32],
    d_up: &'a mut [f32],
}

impl Vectorised for BackwardRow<'_> {
    #[inline(always)]
    fn run<I: Instructions, const ROWS: usize, const LANES: usize>(self) {
        let gradients = self.d_gate.iter_mut().zip(self.d_up).zip(self.d_out);
        for (((d_gate, d_up), d), (&gate, up)) in gradients.zip(self.gate.iter().zip(self.up)) {
            let s = sigmoid(gate);
            *d_gate = d * up * s * (1.0 + gate * (1.0 - s));
            *d_up = d * gate * s;
        }
    }
}

fn shape(s: Sizes) -> String {
    format!("{}x{}", s.rows(), s.ffn)
}

fn example_params(s: Sizes) -> Params {
    Params {
        rows: s.rows() as u32,
        ffn: s.ffn as u32,
    }
}

fn forward_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    let n = s.rows() * s.ffn;
    let gate_up = b.random("gate_up", 2 * n)?;
    let out = b.zeros("out", n)?;
    Ok(case(&[(&out.clone(), n)], false, move |recording| {
        forward(recording, example_params(s), &gate_up, &out);
    }))
}

fn backward_x_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    let n = s.rows() * s.ffn;
    let gate_up = b.random("gate_up", 2 * n)?;
    let d_out = b.random("d_out", n)?;
    let d_gate_up = b.zeros("d_gate_up", 2 * n)?;
    Ok(case(&[(&d_gate_up.clone(), 2 * n)], false, move |recording| {
        backward_x(recording, example_params(s), &gate_up, &d_out, &d_gate_up);
    }))
}

/// Uses of this family at a model's sizes.
pub(crate) static EXAMPLES: &[Example] = &[
    Example {
        name: "swiglu.forward",
        shape,
        build: forward_example,
    },
    Example {
        name: "swiglu.backward_x",
        shape,
        build: backward_x_example,
    },
];
