//! Layer normalisation of every row: forward, and the gradient with respect to its input (scale and shift are frozen).

use super::case::{Example, case, rows_width};
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

params! {
    /// Sizes for `layernorm.forward`.
    pub struct ForwardParams {
        pub rows: u32,
        pub width: u32,
        pub epsilon: f32,
    }
}

params! {
    /// Sizes for `layernorm.backward_x`.
    pub struct BackwardParams {
        pub rows: u32,
        pub width: u32,
        /// Non-zero adds to `d_x` instead of replacing it.
        pub accumulate: u32,
    }
}

contract! {
    /// `out = (x - mean) / sqrt(variance + epsilon) * gamma + beta`.
    pub(crate) static FORWARD = "layernorm.forward", ForwardParams,
    [x: Read f32, gamma: Read f32, beta: Read f32, out: Write f32, stats: Write f32],
    spec: spec::forward, host: forward_host, variants: [FORWARD_ROWS, FORWARD_WORKGROUP]
}

variant! {
    /// An invocation a row, for adapters emulated on a CPU.
    static FORWARD_ROWS = FORWARD, "rows", ["layernorm"], "forward_rows", ForwardParams,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |params| linear_workgroups(params.rows as usize, WORKGROUP),
}

variant! {
    /// A workgroup a row.
    static FORWARD_WORKGROUP = FORWARD, "workgroup", ["layernorm"], "forward", ForwardParams,
    grid: |params| linear_workgroups(params.rows as usize, 1),
}

contract! {
    /// Gradient with respect to `x`.
    pub(crate) static BACKWARD_X = "layernorm.backward_x", BackwardParams,
    [d_out: Read f32, x: Read f32, gamma: Read f32, stats: Read f32, d_x: Write f32],
    spec: spec::backward_x, host: backward_x_host, variants: [BACKWARD_X_ROWS, BACKWARD_X_WORKGROUP]
}

variant! {
    /// An invocation a row, for adapters emulated on a CPU.
    static BACKWARD_X_ROWS = BACKWARD_X, "rows", ["layernorm"], "backward_x_rows", BackwardParams,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |params| linear_workgroups(params.rows as usize, WORKGROUP),
}

variant! {
    /// A workgroup a row.
    static BACKWARD_X_WORKGROUP = BACKWARD_X, "workgroup", ["layernorm"], "backward_x", BackwardParams,
    grid: |params| linear_workgroups(params.rows as usize, 1),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&FORWARD, &BACKWARD_X];

/// Records `out = layernorm(x)`; `x` and `out` are (rows, width), `stats` (rows, 2) is kept for [`backward_x`].
pub fn forward(
    recording: &mut Recording,
    params: ForwardParams,
    x: &Buffer,
    (gamma, beta): (&Buffer, &Buffer),
    out: &Buffer,
    stats: &Buffer,
) {
    let elements = params.rows as f64 * params.width as f64;
    recording.dispatch(
        &FORWARD,
        params,
        &[x, gamma, beta, out, stats],
        Cost {
            flops: 8.0 * elements,
            bytes: 8.0 * elements,
        },
    );
}

/// Records `d_x = ∂loss/∂x` (rows, width), or adds it to `d_x`.
pub fn backward_x(
    recording: &mut Recording,
    params: BackwardParams,
    d_out: &Buffer,
    (x, gamma, stats): (&Buffer, &Buffer, &Buffer),
    d_x: &Buffer,
) {
    let elements = params.rows as f64 * params.width as f64;
    recording.dispatch(
        &BACKWARD_X,
        params,
        &[d_out, x, gamma, stats, d_x],
        Cost {
            flops: 14.0 * elements,
            bytes: 12.0 * elements,
        },
    );
}

/// What benches time.
pub(crate) static EXAMPLES: &[Example] = &[
    Example {
        name: "layernorm.forward",
        shape: rows_width,
        build: |b, s| {
            let x = b.random("x", s.rows() * s.width)?;
            let gamma = b.random("gamma", s.width)?;
            let beta = b.random("beta", s.width)?;
            let out = b.zeros("out", s.rows() * s.width)?;
            let stats = b.zeros("stats", s.rows() * 2)?;
            Ok(case(&[(&out.clone(), s.rows() * s.width)], false, move |recording| {
                forward(
                    recording,
                    ForwardParams {
                        rows: s.rows() as u32,
                        width: s.width as u32,
                        epsilon: 1e-5,
                    },
                    &x,
                    (&gamma, &beta),
                    &out,
                    &stats,
                );
            }))
        },
    },
    Example {
        name: "layernorm.backward_x",
        shape: rows_width,
        build: |b, s| {
            let d_out = b.random("d_out", s.rows() * s.width)?;
            let x = b.random("x", s.rows() * s.width)?;
            let gamma = b.random("gamma", s.width)?;
            let stats = b.random("stats", s.rows() * 2)?;
            let d_x = b.zeros("d_x", s.rows() * s.width)?;
            Ok(case(&[(&d_x.clone(), s.rows() * s.width)], false, move |recording| {
                backward_x(
                    recording,
                    BackwardParams {
                        rows: s.rows() as u32,
                        width: s.width as u32,
                        accumulate: 0,
                    },
                    &d_out,
                    (&x, &gamma, &stats),
                    &d_x,
                );
            }))
        },
    },
];

/// The mathematics in plain loops.
pub mod spec {
    use super::{BackwardParams, ForwardParams};
    use crate::compute::real::Real;

    /// Every row less its mean, over its standard deviation, times gamma plus beta; keeps mean and reciprocal deviation.
    pub fn forward<T: Real>(
        params: &ForwardParams,
        x: &[T],         // (rows, width)
        gamma: &[T],     // (width)
        beta: &[T],      // (width)
        out: &mut [T],   // (rows, width)
        stats: &mut [T], // (rows, 2): mean, reciprocal standard deviation
    ) {
        let (rows, width) = (params.rows as usize, params.width as usize);
        for row in 0..rows {
            let mut sum = T::ZERO;
            for i in 0..width {
                sum += x[row * width + i];
            }
            let mean = sum / T::of(width);
            let mut squares = T::ZERO;
            for i in 0..width {
                let centred = x[row * width + i] - mean;
                squares += centred * centred;
            }
            let rstd = T::ONE / (squares / T::of(width) + T::from(params.epsilon)).sqrt();
            for i in 0..width {
                out[row * width + i] = (x[row * width + i] - mean) * rstd * gamma[i] + beta[i];
            }
            stats[row * 2] = mean;
            stats[row * 2 + 1] = rstd;
        }
    }

    /// The gradient of the input; what is in `d_x` stays in the sum where the parameters say so.
    pub fn backward_x<T: Real>(
        params: &BackwardParams,
        d_out: &[T],   // (rows, width)
        x: &[T],       // (rows, width)
        gamma: &[T],   // (width)
        stats: &[T],   // (rows, 2)
        d_x: &mut [T], // (rows, width)
    ) {
        let (rows, width) = (params.rows as usize, params.width as usize);
        for row in 0..rows {
            let (mean, rstd) = (stats[row * 2], stats[row * 2 + 1]);
            let (mut sum, mut dot) = (T::ZERO, T::ZERO);
            for i in 0..width {
                let norm = (x[row * width + i] - mean) * rstd;
                let d_norm = d_out[row * width + i] * gamma[i];
                sum += d_norm;
                dot += d_norm * norm;
            }
            for i in 0..width {
                let norm = (x[row * width + i] - mean) * rstd;
                let d_norm = d_out[row * width + i] * gamma[i];
                let value = rstd * (d_norm - sum / T::of(width) - norm * (dot / T::of(width)));
                if params.accumulate != 0 {
                    d_x[row * width + i] += value;
                } else {
                    d_x[row * width + i] = value;
                }
            }
        }
    }
}

/// [`spec::forward`] on all cores.
fn forward_host(
    params: &ForwardParams,
    x: &[f32],         // (rows, width)
    gamma: &[f32],     // (width)
    beta: &[f32],      // (width)
    out: &mut [f32],   // (rows, width)
    stats: &mut [f32], // (rows, 2)
) {
    let (rows, width) = (params.rows as usize, params.width as usize);
    for row in 0..rows {
        let x = &x[row * width..][..width];
        let mean = x.iter().sum::<f32>() / width as f32;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / width as f32;
        stats[row * 2] = mean;
        stats[row * 2 + 1] = 1.0 / (variance + params.epsilon).sqrt();
    }
    for_each_row(&mut out[..rows * width], width, |row, out| {
        let (mean, rstd) = (stats[row * 2], stats[row * 2 + 1]);
        for (i, out) in out.iter_mut().enumerate() {
            *out = (x[row * width + i] - mean) * rstd * gamma[i] + beta[i];
        }
    });
}

/// [`spec::backward_x`] on all cores.
fn backward_x_host(
    params: &BackwardParams,
    d_out: &[f32],   // (rows, width)
    x: &[f32],       // (rows, width)
    gamma: &[f32],   // (width)
    stats: &[f32],   // (rows, 2)
    d_x: &mut [f32], // (rows, width)
) {
    let (rows, width) = (params.rows as usize, params.width as usize);
    for_each_row(&mut d_x[..rows * width], width, |row, d_x| {
        let (mean, rstd) = (stats[row * 2], stats[row * 2 + 1]);
        let pair = |i: usize| ((x[row * width + i] - mean) * rstd, d_out[row * width + i] * gamma[i]);
        let (mut sum, mut dot) = (0.0, 0.0);
        for i in 0..width {
            let (norm, d_norm) = pair(i);
            sum += d_norm;
            dot += d_norm * norm;
        }
        let (sum, dot) = (sum / width as f32, dot / width as f32);
        for (i, d_x) in d_x.iter_mut().enumerate() {
            let (norm, d_norm) = pair(i);
            let value = rstd * (d_norm - sum - norm * dot);
            *d_x = if params.accumulate != 0 { *d_x + value } else { value };
        }
    });
}
