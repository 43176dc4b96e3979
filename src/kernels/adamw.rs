//! AdamW with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101) on a flat adapter, and the global gradient norm that
//! clipping needs.
//!
//! What changes from step to step is read from the `scalars` buffer, see [`scalar`].
//!
//! | version | idea | measured |
//! |---|---|---|
//! | 1 | the norm in two deterministic passes; the update an invocation a parameter, bound by memory | not measured on a GPU yet |

use super::case::{Example, case};
use super::scalar;
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Elements whose squares one partial sum holds.
const CHUNK: usize = 4096;

/// Added to the norm before dividing, as `torch.nn.utils.clip_grad_norm_` does.
const CLIP_EPSILON: f32 = 1e-6;

params! {
    /// Sizes for `adamw.norm_partial`.
    pub struct NormParams {
        pub n: u32,
        /// Elements of one partial sum.
        pub chunk: u32,
    }
}

params! {
    /// Sizes for `adamw.update`.
    pub struct UpdateParams {
        pub n: u32,
    }
}

contract! {
    /// `partial[c] = Σ gradient²` over chunk `c`.
    pub(crate) static NORM_PARTIAL = "adamw.norm_partial", NormParams,
    [gradient: Read f32, partial: Write f32],
    spec: spec::norm_partial, host: norm_partial_host, variants: [NORM_PARTIAL_ROWS, NORM_PARTIAL_WORKGROUP]
}

variant! {
    /// An invocation a chunk, for adapters emulated on a CPU.
    static NORM_PARTIAL_ROWS = NORM_PARTIAL, "rows", ["adamw"], "norm_partial_rows", NormParams,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |params| linear_workgroups(partial_words(params.n as usize), WORKGROUP),
}

variant! {
    /// A workgroup a chunk.
    static NORM_PARTIAL_WORKGROUP = NORM_PARTIAL, "workgroup", ["adamw"], "norm_partial", NormParams,
    grid: |params| linear_workgroups(partial_words(params.n as usize), 1),
}

contract! {
    /// `scalars[NORM] = |GRAD_SCALE| · √(Σ partial)`.
    pub(crate) static NORM_TOTAL = "adamw.norm_total", NormParams,
    [partial: Read f32, scalars: Write f32],
    spec: spec::norm_total, host: spec::norm_total, variants: [NORM_TOTAL_ROWS, NORM_TOTAL_WORKGROUP]
}

variant! {
    /// One invocation, for adapters emulated on a CPU.
    static NORM_TOTAL_ROWS = NORM_TOTAL, "rows", ["adamw"], "norm_total_rows", NormParams,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |_| [1, 1, 1],
}

variant! {
    /// One workgroup.
    static NORM_TOTAL_WORKGROUP = NORM_TOTAL, "workgroup", ["adamw"], "norm_total", NormParams,
    grid: |_| [1, 1, 1],
}

contract! {
    /// One step on every parameter.
    pub(crate) static UPDATE = "adamw.update", UpdateParams,
    [gradient: Read f32, scalars: Read f32, adapter: Write f32, moment1: Write f32, moment2: Write f32],
    spec: spec::update, host: spec::update, variants: [UPDATE_ELEMENT]
}

variant! {
    /// An invocation a parameter.
    static UPDATE_ELEMENT = UPDATE, "element", ["adamw"], "update", UpdateParams,
    grid: |params| linear_workgroups(params.n as usize, WORKGROUP),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&NORM_PARTIAL, &NORM_TOTAL, &UPDATE];

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
    recording.dispatch(
        &NORM_PARTIAL,
        params,
        &[gradient, partial],
        Cost {
            flops: 2.0 * n as f64,
            bytes: 4.0 * n as f64,
        },
    );
    recording.dispatch(
        &NORM_TOTAL,
        params,
        &[partial, scalars],
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
        UpdateParams { n: n as u32 },
        &[gradient, scalars, adapter, moment1, moment2],
        Cost {
            flops: 18.0 * n as f64,
            bytes: 28.0 * n as f64,
        },
    );
}

/// What benches time.
pub(crate) static EXAMPLES: &[Example] = &[Example {
    name: "adamw.update",
    shape: |s| s.adapter_length().to_string(),
    build: |b, s| {
        let n = s.adapter_length();
        let gradient = b.random("gradient", n)?;
        let scalars = b.scalars()?;
        let partial = b.zeros("partial", partial_words(n))?;
        let adapter = b.random("adapter", n)?;
        let first = b.zeros("moment1", n)?;
        let second = b.zeros("moment2", n)?;
        Ok(case(&[(&adapter.clone(), n)], false, move |recording| {
            norm(recording, n, &gradient, &partial, &scalars);
            let state = (&adapter, &first, &second);
            update(recording, n, &gradient, &scalars, state);
        }))
    },
}];

/// The mathematics in plain loops.
pub mod spec {
    use super::{CLIP_EPSILON, NormParams, UpdateParams, scalar};
    use crate::compute::real::Real;

    /// The sum of squares of every chunk of the gradient.
    pub fn norm_partial<T: Real>(
        params: &NormParams,
        gradient: &[T],    // (n)
        partial: &mut [T], // (ceil(n / chunk))
    ) {
        let (n, chunk) = (params.n as usize, params.chunk as usize);
        for c in 0..n.div_ceil(chunk).max(1) {
            // Lanes, as the shader has them: adding one after another would lose digits.
            let mut lanes = [T::ZERO; 64];
            for i in c * chunk..((c + 1) * chunk).min(n) {
                lanes[i % 64] += gradient[i] * gradient[i];
            }
            partial[c] = lanes.into_iter().sum();
        }
    }

    pub(crate) fn norm_total<T: Real>(
        params: &NormParams,
        partial: &[T],     // (ceil(n / chunk))
        scalars: &mut [T], // (scalar::COUNT)
    ) {
        let chunks = params.n.div_ceil(params.chunk).max(1) as usize;
        let mut sum = T::ZERO;
        for partial in &partial[..chunks] {
            sum += *partial;
        }
        scalars[scalar::NORM] = scalars[scalar::GRAD_SCALE].abs() * sum.sqrt();
    }

    /// One step of AdamW on every value, with the gradient scaled and clipped as `scalars` say.
    pub fn update<T: Real>(
        params: &UpdateParams,
        gradient: &[T],    // (n)
        scalars: &[T],     // (scalar::COUNT)
        adapter: &mut [T], // (n)
        moment1: &mut [T], // (n)
        moment2: &mut [T], // (n)
    ) {
        let clip = scalars[scalar::CLIP];
        let mut factor = T::ONE;
        if clip > T::ZERO {
            let ratio = clip / (scalars[scalar::NORM] + T::from(CLIP_EPSILON));
            if ratio < T::ONE {
                factor = ratio;
            }
        }
        let scale = scalars[scalar::GRAD_SCALE] * factor;
        let (lr, decay) = (scalars[scalar::LR], scalars[scalar::WEIGHT_DECAY]);
        let (beta1, beta2) = (scalars[scalar::BETA1], scalars[scalar::BETA2]);
        let (bias1, bias2) = (scalars[scalar::BIAS1], scalars[scalar::BIAS2]);
        for i in 0..params.n as usize {
            let g = gradient[i] * scale;
            let m = beta1 * moment1[i] + (T::ONE - beta1) * g;
            let v = beta2 * moment2[i] + (T::ONE - beta2) * g * g;
            let p = adapter[i] - lr * decay * adapter[i];
            adapter[i] = p - lr * (m / bias1) / ((v / bias2).sqrt() + scalars[scalar::EPSILON]);
            moment1[i] = m;
            moment2[i] = v;
        }
    }
}

/// [`spec::norm_partial`] on all cores.
fn norm_partial_host(
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
