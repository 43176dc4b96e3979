//! AdamW with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101) on a flat adapter, and the global gradient norm that
//! clipping needs.
//!
//! What changes from step to step is read from the `scalars` buffer, see [`scalar`].

use super::scalar;
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Kernel;
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{kernel, params};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Elements whose squares one partial sum holds.
const CHUNK: usize = 4096;

/// Added to the norm before dividing, as `torch.nn.utils.clip_grad_norm_` does.
const CLIP_EPSILON: f32 = 1e-6;

params! {
    pub struct NormParams {
        pub n: u32,
        /// Elements of one partial sum.
        pub chunk: u32,
    }
}

params! {
    pub struct UpdateParams {
        pub n: u32,
    }
}

kernel! {
    /// `partial[c] = Σ gradient²` over chunk `c`, a workgroup a chunk.
    pub static NORM_PARTIAL = "adamw.norm_partial", "adamw", "norm_partial", NormParams,
    [gradient: Read f32, partial: Write f32], norm_partial_cpu
}

kernel! {
    /// [`NORM_PARTIAL`], an invocation a chunk.
    pub static NORM_PARTIAL_ROWS = "adamw.norm_partial", "adamw", "norm_partial_rows", NormParams,
    [gradient: Read f32, partial: Write f32], norm_partial_cpu
}

kernel! {
    /// `scalars[NORM] = |GRAD_SCALE| · √(Σ partial)`, one workgroup.
    pub static NORM_TOTAL = "adamw.norm_total", "adamw", "norm_total", NormParams,
    [partial: Read f32, scalars: Write f32], norm_total_cpu
}

kernel! {
    /// [`NORM_TOTAL`], one invocation.
    pub static NORM_TOTAL_ROWS = "adamw.norm_total", "adamw", "norm_total_rows", NormParams,
    [partial: Read f32, scalars: Write f32], norm_total_cpu
}

kernel! {
    /// One step on every parameter.
    pub static UPDATE = "adamw.update", "adamw", "update", UpdateParams,
    [gradient: Read f32, scalars: Read f32, adapter: Write f32, moment1: Write f32, moment2: Write f32], update_cpu
}

/// The kernels of this family.
pub static ALL: &[&Kernel] = &[
    &NORM_PARTIAL,
    &NORM_PARTIAL_ROWS,
    &NORM_TOTAL,
    &NORM_TOTAL_ROWS,
    &UPDATE,
];

/// Words of the `partial` buffer that [`norm`] needs for `n` elements.
pub fn partial_words(n: usize) -> usize {
    n.div_ceil(CHUNK).max(1)
}

/// Records `scalars[NORM] = ‖GRAD_SCALE · gradient[0..n]‖₂`. Needed before [`update`] only where `scalars[CLIP]` may be set.
pub fn norm(recording: &mut Recording, n: usize, gradient: &Buffer, partial: &Buffer, scalars: &Buffer) {
    let params = NormParams {
        n: n as u32,
        chunk: CHUNK as u32,
    };
    let chunks = partial_words(n);
    let (first, items, second) = match recording.class() {
        DeviceClass::CpuAdapter => (&NORM_PARTIAL_ROWS, chunks, &NORM_TOTAL_ROWS),
        _ => (&NORM_PARTIAL, chunks * WORKGROUP as usize, &NORM_TOTAL),
    };
    recording.dispatch(
        first,
        vec![],
        params,
        &[gradient, partial],
        linear_workgroups(items, WORKGROUP),
        Cost {
            flops: 2.0 * n as f64,
            bytes: 4.0 * n as f64,
        },
    );
    recording.dispatch(
        second,
        vec![],
        params,
        &[partial, scalars],
        [1, 1, 1],
        Cost {
            flops: chunks as f64,
            bytes: 4.0 * chunks as f64,
        },
    );
}

/// Records one AdamW step on the first `n` elements of `adapter`, `moment1` and `moment2`:
/// `g = gradient · GRAD_SCALE · min(1, CLIP / (NORM + 1e-6))`, `p -= LR · WEIGHT_DECAY · p`,
/// `m = β₁m + (1-β₁)g`, `v = β₂v + (1-β₂)g²`, `p -= LR · (m/BIAS1) / (√(v/BIAS2) + ε)`.
pub fn update(
    recording: &mut Recording,
    n: usize,
    gradient: &Buffer,
    scalars: &Buffer,
    (adapter, moment1, moment2): (&Buffer, &Buffer, &Buffer),
) {
    recording.dispatch(
        &UPDATE,
        vec![],
        UpdateParams { n: n as u32 },
        &[gradient, scalars, adapter, moment1, moment2],
        linear_workgroups(n, WORKGROUP),
        Cost {
            flops: 18.0 * n as f64,
            bytes: 28.0 * n as f64,
        },
    );
}

/// The specification of `adamw.norm_partial`.
pub fn norm_partial_cpu(
    params: &NormParams,
    gradient: &[f32],    // (n)
    partial: &mut [f32], // (ceil(n / chunk))
) {
    let (n, chunk) = (params.n as usize, params.chunk as usize);
    for_each_row(&mut partial[..n.div_ceil(chunk).max(1)], 1, |c, partial| {
        let gradient = &gradient[(c * chunk).min(n)..((c + 1) * chunk).min(n)];
        // Lanes, as the shader: adding one after another would lose digits.
        let mut lanes = [0.0f32; 64];
        for gradient in gradient.chunks(64) {
            for (lane, g) in lanes.iter_mut().zip(gradient) {
                *lane += g * g;
            }
        }
        partial[0] = lanes.iter().sum();
    });
}

/// The specification of `adamw.norm_total`.
pub fn norm_total_cpu(
    params: &NormParams,
    partial: &[f32],     // (ceil(n / chunk))
    scalars: &mut [f32], // (scalar::COUNT)
) {
    let chunks = params.n.div_ceil(params.chunk).max(1) as usize;
    let sum: f32 = partial[..chunks].iter().sum();
    scalars[scalar::NORM] = scalars[scalar::GRAD_SCALE].abs() * sum.sqrt();
}

/// The specification of `adamw.update`.
pub fn update_cpu(
    params: &UpdateParams,
    gradient: &[f32],    // (n)
    scalars: &[f32],     // (scalar::COUNT)
    adapter: &mut [f32], // (n)
    moment1: &mut [f32], // (n)
    moment2: &mut [f32], // (n)
) {
    let clip = scalars[scalar::CLIP];
    let factor = if clip > 0.0 {
        (clip / (scalars[scalar::NORM] + CLIP_EPSILON)).min(1.0)
    } else {
        1.0
    };
    let scale = scalars[scalar::GRAD_SCALE] * factor;
    let (lr, decay) = (scalars[scalar::LR], scalars[scalar::WEIGHT_DECAY]);
    let (beta1, beta2) = (scalars[scalar::BETA1], scalars[scalar::BETA2]);
    let (bias1, bias2) = (scalars[scalar::BIAS1], scalars[scalar::BIAS2]);
    let epsilon = scalars[scalar::EPSILON];
    for i in 0..params.n as usize {
        let g = gradient[i] * scale;
        let m = beta1 * moment1[i] + (1.0 - beta1) * g;
        let v = beta2 * moment2[i] + (1.0 - beta2) * g * g;
        let p = adapter[i] - lr * decay * adapter[i];
        adapter[i] = p - lr * (m / bias1) / ((v / bias2).sqrt() + epsilon);
        moment1[i] = m;
        moment2[i] = v;
    }
}
