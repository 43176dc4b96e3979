//! Root-mean-square normalisation (arXiv 1910.07467), forward and the gradient with respect to its input (the scale is frozen):
//! of whole rows, or of each head of a row, as the normalisation of queries and keys is. Inputs and outputs may be some columns
//! of wider tensors. Separate from [`layernorm`](super::layernorm), which subtracts a mean and shifts.
//!
//! | version     | idea                                                                     | measured |
//! |-------------|--------------------------------------------------------------------------|----------|
//! | `workgroup` | a workgroup a group of values, its sum by a tree in workgroup memory      | not measured on a GPU yet |
//! | `rows`      | an invocation a group: for adapters emulated on a CPU                     | not timed |
//! | host        | a row a task, sums in eight interleaved lanes                             | 512 rows of 576: forward 100 µs, backward 170 µs on a core |

use super::case::{Builder, Case, Example, Sizes, case, rows_width};
use super::weight::Columns;
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, DeviceClass, Error, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// What [`forward`] normalises: in every row, `groups` groups of `width` values side by side.
#[derive(Clone, Copy, Debug)]
pub struct Params {
    pub rows: u32,
    pub groups: u32,
    pub width: u32,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// What [`backward_x`] goes back through.
#[derive(Clone, Copy, Debug)]
pub struct BackwardParams {
    pub rows: u32,
    pub groups: u32,
    pub width: u32,
    /// Non-zero adds to `d_x` instead of replacing it.
    pub accumulate: u32,
}

params! {
    /// [`Params`], and where the rows of `x` and `out` begin.
    pub struct ForwardLayout {
        pub rows: u32,
        pub groups: u32,
        pub width: u32,
        pub epsilon: f32,
        pub x_first: u32,
        pub x_stride: u32,
        pub out_first: u32,
        pub out_stride: u32,
    }
}

params! {
    /// [`BackwardParams`], and where the rows of `d_out`, `x` and `d_x` begin.
    pub struct BackwardLayout {
        pub rows: u32,
        pub groups: u32,
        pub width: u32,
        pub accumulate: u32,
        pub d_out_first: u32,
        pub d_out_stride: u32,
        pub x_first: u32,
        pub x_stride: u32,
        pub d_x_first: u32,
        pub d_x_stride: u32,
    }
}

contract! {
    /// `out = x / √(mean(x²) + epsilon) · gamma`, the mean over each group.
    pub(crate) static FORWARD = "rmsnorm.forward", ForwardLayout,
    [x: Read f32, gamma: Read f32, out: Write f32, stats: Write f32],
    spec: spec::forward, host: forward_host, variants: [FORWARD_ROWS, FORWARD_WORKGROUP]
}

variant! {
    /// An invocation a group, for adapters emulated on a CPU.
    static FORWARD_ROWS = FORWARD, "rows", ["rmsnorm"], "forward_rows", ForwardLayout,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |params| linear_workgroups(params.rows as usize * params.groups as usize, WORKGROUP),
}

variant! {
    /// A workgroup a group.
    static FORWARD_WORKGROUP = FORWARD, "workgroup", ["rmsnorm"], "forward", ForwardLayout,
    grid: |params| linear_workgroups(params.rows as usize * params.groups as usize, 1),
}

contract! {
    /// Gradient with respect to `x`.
    pub(crate) static BACKWARD_X = "rmsnorm.backward_x", BackwardLayout,
    [d_out: Read f32, x: Read f32, gamma: Read f32, stats: Read f32, d_x: Write f32],
    spec: spec::backward_x, host: backward_x_host, variants: [BACKWARD_X_ROWS, BACKWARD_X_WORKGROUP]
}

variant! {
    /// An invocation a group, for adapters emulated on a CPU.
    static BACKWARD_X_ROWS = BACKWARD_X, "rows", ["rmsnorm"], "backward_x_rows", BackwardLayout,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |params| linear_workgroups(params.rows as usize * params.groups as usize, WORKGROUP),
}

variant! {
    /// A workgroup a group.
    static BACKWARD_X_WORKGROUP = BACKWARD_X, "workgroup", ["rmsnorm"], "backward_x", BackwardLayout,
    grid: |params| linear_workgroups(params.rows as usize * params.groups as usize, 1),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&FORWARD, &BACKWARD_X];

/// Records `out = rmsnorm(x)` on groups of (rows, groups·width) columns, each scaled by `gamma` (width); `stats` (rows, groups)
/// is kept for [`backward_x`].
pub fn forward(
    recording: &mut Recording,
    params: Params,
    x: Columns<'_>,
    gamma: &Buffer,
    out: Columns<'_>,
    stats: &Buffer,
) {
    let elements = params.rows as f64 * params.groups as f64 * params.width as f64;
    recording.dispatch(
        &FORWARD,
        ForwardLayout {
            rows: params.rows,
            groups: params.groups,
            width: params.width,
            epsilon: params.epsilon,
            x_first: x.first as u32,
            x_stride: x.stride as u32,
            out_first: out.first as u32,
            out_stride: out.stride as u32,
        },
        &[x.buffer, gamma, out.buffer, stats],
        Cost {
            flops: 4.0 * elements,
            bytes: 8.0 * elements,
        },
    );
}

/// Records `d_x = ∂loss/∂x` on groups of (rows, groups·width) columns, or adds it to `d_x`.
pub fn backward_x(
    recording: &mut Recording,
    params: BackwardParams,
    d_out: Columns<'_>,
    (x, gamma, stats): (Columns<'_>, &Buffer, &Buffer),
    d_x: Columns<'_>,
) {
    let elements = params.rows as f64 * params.groups as f64 * params.width as f64;
    recording.dispatch(
        &BACKWARD_X,
        BackwardLayout {
            rows: params.rows,
            groups: params.groups,
            width: params.width,
            accumulate: params.accumulate,
            d_out_first: d_out.first as u32,
            d_out_stride: d_out.stride as u32,
            x_first: x.first as u32,
            x_stride: x.stride as u32,
            d_x_first: d_x.first as u32,
            d_x_stride: d_x.stride as u32,
        },
        &[d_out.buffer, x.buffer, gamma, stats, d_x.buffer],
        Cost {
            flops: 9.0 * elements,
            bytes: 12.0 * elements,
        },
    );
}

/// The mathematics in plain loops.
pub mod spec {
    use super::{BackwardLayout, ForwardLayout};
    use crate::compute::real::Real;

    /// Every segment over its root mean square, times the weight; keeps the reciprocal root.
    pub fn forward<T: Real>(
        params: &ForwardLayout,
        x: &[T],         // (rows, groups * width)
        gamma: &[T],     // (width)
        out: &mut [T],   // (rows, groups * width)
        stats: &mut [T], // (rows, groups): reciprocal root mean square
    ) {
        let (groups, width) = (params.groups as usize, params.width as usize);
        for row in 0..params.rows as usize {
            for group in 0..groups {
                let x_start = params.x_first as usize + row * params.x_stride as usize + group * width;
                let out_start = params.out_first as usize + row * params.out_stride as usize + group * width;
                let mut squares = T::ZERO;
                for i in 0..width {
                    squares += x[x_start + i] * x[x_start + i];
                }
                let rstd = T::ONE / (squares / T::of(width) + T::from(params.epsilon)).sqrt();
                for i in 0..width {
                    out[out_start + i] = x[x_start + i] * rstd * gamma[i];
                }
                stats[row * groups + group] = rstd;
            }
        }
    }

    /// The gradient of the input.
    pub fn backward_x<T: Real>(
        params: &BackwardLayout,
        d_out: &[T],   // (rows, groups * width)
        x: &[T],       // (rows, groups * width)
        gamma: &[T],   // (width)
        stats: &[T],   // (rows, groups)
        d_x: &mut [T], // (rows, groups * width)
    ) {
        let (groups, width) = (params.groups as usize, params.width as usize);
        for row in 0..params.rows as usize {
            for group in 0..groups {
                let start = params.d_out_first as usize + row * params.d_out_stride as usize + group * width;
                let x_start = params.x_first as usize + row * params.x_stride as usize + group * width;
                let d_x_start = params.d_x_first as usize + row * params.d_x_stride as usize + group * width;
                let rstd = stats[row * groups + group];
                let mut sum = T::ZERO;
                for i in 0..width {
                    sum += d_out[start + i] * gamma[i] * (x[x_start + i] * rstd);
                }
                let mean = sum / T::of(width);
                for i in 0..width {
                    let value = rstd * (d_out[start + i] * gamma[i] - x[x_start + i] * rstd * mean);
                    if params.accumulate != 0 {
                        d_x[d_x_start + i] += value;
                    } else {
                        d_x[d_x_start + i] = value;
                    }
                }
            }
        }
    }
}

/// `Σ term(i)` for i below `count`, in eight interleaved sums.
#[inline(always)]
fn interleaved_sum(count: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut sums = [0.0f32; 8];
    let whole = count / 8 * 8;
    for first in (0..whole).step_by(8) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum += term(first + i);
        }
    }
    sums.iter().sum::<f32>() + (whole..count).map(term).sum::<f32>()
}

/// The elements of a buffer from the first value of row 0 to the last value of the last row.
fn span(rows: u32, columns: usize, first: u32, stride: u32) -> std::ops::Range<usize> {
    let first = first as usize;
    match rows {
        0 => first..first,
        rows => first..first + (rows as usize - 1) * stride as usize + columns,
    }
}

/// [`spec::forward`] on all cores.
fn forward_host(
    params: &ForwardLayout,
    x: &[f32],         // (rows, groups * width)
    gamma: &[f32],     // (width)
    out: &mut [f32],   // (rows, groups * width)
    stats: &mut [f32], // (rows, groups)
) {
    let (groups, width) = (params.groups as usize, params.width as usize);
    let x_row = |row: usize| &x[params.x_first as usize + row * params.x_stride as usize..][..groups * width];
    for_each_row(&mut stats[..params.rows as usize * groups], groups, |row, stats| {
        for (rstd, x) in stats.iter_mut().zip(x_row(row).chunks_exact(width)) {
            let squares = interleaved_sum(width, |i| x[i] * x[i]);
            *rstd = 1.0 / (squares / width as f32 + params.epsilon).sqrt();
        }
    });
    let out = &mut out[span(params.rows, groups * width, params.out_first, params.out_stride)];
    for_each_row(out, params.out_stride as usize, |row, out| {
        let stats = &stats[row * groups..][..groups];
        for ((out, x), rstd) in out
            .chunks_exact_mut(width)
            .zip(x_row(row).chunks_exact(width))
            .zip(stats)
        {
            for ((out, x), gamma) in out.iter_mut().zip(x).zip(gamma) {
                *out = x * rstd * gamma;
            }
        }
    });
}

/// [`spec::backward_x`] on all cores.
fn backward_x_host(
    params: &BackwardLayout,
    d_out: &[f32],   // (rows, groups * width)
    x: &[f32],       // (rows, groups * width)
    gamma: &[f32],   // (width)
    stats: &[f32],   // (rows, groups)
    d_x: &mut [f32], // (rows, groups * width)
) {
    let (groups, width) = (params.groups as usize, params.width as usize);
    let gamma = &gamma[..width];
    let d_x = &mut d_x[span(params.rows, groups * width, params.d_x_first, params.d_x_stride)];
    for_each_row(d_x, params.d_x_stride as usize, |row, d_x| {
        let d_out = &d_out[params.d_out_first as usize + row * params.d_out_stride as usize..][..groups * width];
        let x = &x[params.x_first as usize + row * params.x_stride as usize..][..groups * width];
        let stats = &stats[row * groups..][..groups];
        let inputs = d_out.chunks_exact(width).zip(x.chunks_exact(width)).zip(stats);
        for (d_x, ((d_out, x), &rstd)) in d_x.chunks_exact_mut(width).zip(inputs) {
            let sum = interleaved_sum(width, |i| d_out[i] * gamma[i] * (x[i] * rstd));
            let mean = sum / width as f32;
            for (i, d_x) in d_x.iter_mut().enumerate() {
                let value = rstd * (d_out[i] * gamma[i] - x[i] * rstd * mean);
                *d_x = if params.accumulate != 0 { *d_x + value } else { value };
            }
        }
    });
}

fn forward_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    let n = s.rows() * s.width;
    let x = b.random("x", n)?;
    let gamma = b.random("gamma", s.width)?;
    let out = b.zeros("out", n)?;
    let stats = b.zeros("stats", s.rows())?;
    let params = Params {
        rows: s.rows() as u32,
        groups: 1,
        width: s.width as u32,
        epsilon: 1e-5,
    };
    Ok(case(&[(&out.clone(), n)], false, move |recording| {
        let (x, out) = (Columns::all(&x, s.width), Columns::all(&out, s.width));
        forward(recording, params, x, &gamma, out, &stats);
    }))
}

/// The queries and keys of a fused projection, head by head.
fn heads_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    let groups = s.heads + s.kv_heads;
    let (stride, width) = ((s.heads + 2 * s.kv_heads) * s.head_size, groups * s.head_size);
    let x = b.random("x", s.rows() * stride)?;
    let gamma = b.random("gamma", s.head_size)?;
    let out = b.zeros("out", s.rows() * width)?;
    let stats = b.zeros("stats", s.rows() * groups)?;
    let params = Params {
        rows: s.rows() as u32,
        groups: groups as u32,
        width: s.head_size as u32,
        epsilon: 1e-6,
    };
    Ok(case(&[(&out.clone(), s.rows() * width)], false, move |recording| {
        let (x, out) = (Columns::all(&x, stride), Columns::all(&out, width));
        forward(recording, params, x, &gamma, out, &stats);
    }))
}

fn backward_x_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    let n = s.rows() * s.width;
    let d_out = b.random("d_out", n)?;
    let x = b.random("x", n)?;
    let gamma = b.random("gamma", s.width)?;
    let stats = b.random("stats", s.rows())?;
    let d_x = b.zeros("d_x", n)?;
    let params = BackwardParams {
        rows: s.rows() as u32,
        groups: 1,
        width: s.width as u32,
        accumulate: 0,
    };
    Ok(case(&[(&d_x.clone(), n)], false, move |recording| {
        let all = |buffer| Columns::all(buffer, s.width);
        backward_x(recording, params, all(&d_out), (all(&x), &gamma, &stats), all(&d_x));
    }))
}

/// Uses of this family at a model's sizes.
pub(crate) static EXAMPLES: &[Example] = &[
    Example {
        name: "rmsnorm.forward",
        shape: rows_width,
        build: forward_example,
    },
    Example {
        name: "rmsnorm.forward+heads",
        shape: |s| format!("{}x{}x{}", s.rows(), s.heads + s.kv_heads, s.head_size),
        build: heads_example,
    },
    Example {
        name: "rmsnorm.backward_x",
        shape: rows_width,
        build: backward_x_example,
    },
];
