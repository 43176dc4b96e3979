//! Layer normalisation of every row: forward, and the gradient with respect to its input (scale and shift are frozen).

use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Kernel;
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{kernel, params};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

params! {
    pub struct ForwardParams {
        pub rows: u32,
        pub width: u32,
        pub epsilon: f32,
    }
}

params! {
    pub struct BackwardParams {
        pub rows: u32,
        pub width: u32,
        /// Non-zero adds to `d_x` instead of replacing it.
        pub accumulate: u32,
    }
}

kernel! {
    /// `out = (x - mean) / sqrt(variance + epsilon) * gamma + beta`, a workgroup a row.
    pub static FORWARD = "layernorm.forward", "layernorm", "forward", ForwardParams,
    [x: Read f32, gamma: Read f32, beta: Read f32, out: Write f32, stats: Write f32], forward_cpu
}

kernel! {
    /// [`FORWARD`], an invocation a row.
    pub static FORWARD_ROWS = "layernorm.forward", "layernorm", "forward_rows", ForwardParams,
    [x: Read f32, gamma: Read f32, beta: Read f32, out: Write f32, stats: Write f32], forward_cpu
}

kernel! {
    /// Gradient with respect to `x`, a workgroup a row.
    pub static BACKWARD_X = "layernorm.backward_x", "layernorm", "backward_x", BackwardParams,
    [d_out: Read f32, x: Read f32, gamma: Read f32, stats: Read f32, d_x: Write f32], backward_x_cpu
}

kernel! {
    /// [`BACKWARD_X`], an invocation a row.
    pub static BACKWARD_X_ROWS = "layernorm.backward_x", "layernorm", "backward_x_rows", BackwardParams,
    [d_out: Read f32, x: Read f32, gamma: Read f32, stats: Read f32, d_x: Write f32], backward_x_cpu
}

/// Every kernel of the family.
pub static ALL: &[&Kernel] = &[&FORWARD, &FORWARD_ROWS, &BACKWARD_X, &BACKWARD_X_ROWS];

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
    let (kernel, items) = match recording.class() {
        DeviceClass::CpuAdapter => (&FORWARD_ROWS, params.rows as usize),
        _ => (&FORWARD, params.rows as usize * WORKGROUP as usize),
    };
    recording.dispatch(
        kernel,
        vec![],
        params,
        &[x, gamma, beta, out, stats],
        linear_workgroups(items, WORKGROUP),
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
    let (kernel, items) = match recording.class() {
        DeviceClass::CpuAdapter => (&BACKWARD_X_ROWS, params.rows as usize),
        _ => (&BACKWARD_X, params.rows as usize * WORKGROUP as usize),
    };
    recording.dispatch(
        kernel,
        vec![],
        params,
        &[d_out, x, gamma, stats, d_x],
        linear_workgroups(items, WORKGROUP),
        Cost {
            flops: 14.0 * elements,
            bytes: 12.0 * elements,
        },
    );
}

/// The specification of `layernorm.forward`.
pub fn forward_cpu(
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

/// The specification of `layernorm.backward_x`.
pub fn backward_x_cpu(
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
