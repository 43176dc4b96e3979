//! Causal multi-head attention that never stores the scores: an online softmax forward that keeps only each row's
//! log-sum-exp, and a backward that recomputes probabilities from it (FlashAttention, arXiv 2205.14135 and 2307.08691).
//!
//! `qkv` is (batch·seq, 3·width) with the query, key and value of a row side by side, head after head, as GPT-2's `c_attn`
//! gives them; `lse` and `dot` are (batch, heads, seq).

use super::matmul::{Matrix, Term, add_products};
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::{Constants, Kernel};
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{kernel, params};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Queries and keys in a tile, the default of `TILE` in the shader.
const TILE: u32 = 32;

/// Invocations in a workgroup of the `_rows` entry points, the default of `ROWS_WORKGROUP` in the shader.
const ROWS_WORKGROUP: u32 = 8;

params! {
    pub struct Params {
        pub batch: u32,
        pub seq: u32,
        pub heads: u32,
        pub head_size: u32,
        /// Multiplies the scores: 1/√head_size.
        pub scale: f32,
    }
}

impl Params {
    fn rows(&self) -> usize {
        self.batch as usize * self.seq as usize
    }

    fn width(&self) -> usize {
        self.heads as usize * self.head_size as usize
    }

    /// Flops of one product of two (tokens, head_size) tensors over all pairs that the causal mask leaves, or of one that
    /// applies such a pair's weight.
    fn product_flops(&self) -> f64 {
        let seq = self.seq as f64;
        self.batch as f64 * self.width() as f64 * seq * (seq + 1.0)
    }

    /// Bytes of a (batch·seq, width) tensor.
    fn tensor_bytes(&self) -> f64 {
        4.0 * self.rows() as f64 * self.width() as f64
    }
}

kernel! {
    /// `out = softmax(scale · q·kᵀ + mask) · v` and the log-sum-exp of every row, a workgroup a tile of queries.
    pub static FORWARD = "attention.forward", "attention", "forward", Params,
    [qkv: Read f32, out: Write f32, lse: Write f32], forward_cpu
}

kernel! {
    /// [`FORWARD`], an invocation a query.
    pub static FORWARD_ROWS = "attention.forward", "attention", "forward_rows", Params,
    [qkv: Read f32, out: Write f32, lse: Write f32], forward_cpu
}

kernel! {
    /// `dot = Σ out · d_out` over each head of each row.
    pub static BACKWARD_DOT = "attention.backward_dot", "attention", "backward_dot", Params,
    [out: Read f32, d_out: Read f32, dot: Write f32], backward_dot_cpu
}

kernel! {
    /// The query part of `d_qkv`, a workgroup a tile of queries.
    pub static BACKWARD_Q = "attention.backward_q", "attention", "backward_q", Params,
    [qkv: Read f32, d_out: Read f32, lse: Read f32, dot: Read f32, d_qkv: Write f32], backward_q_cpu
}

kernel! {
    /// [`BACKWARD_Q`], an invocation a query.
    pub static BACKWARD_Q_ROWS = "attention.backward_q", "attention", "backward_q_rows", Params,
    [qkv: Read f32, d_out: Read f32, lse: Read f32, dot: Read f32, d_qkv: Write f32], backward_q_cpu
}

kernel! {
    /// The key and value parts of `d_qkv`, a workgroup a tile of keys.
    pub static BACKWARD_KV = "attention.backward_kv", "attention", "backward_kv", Params,
    [qkv: Read f32, d_out: Read f32, lse: Read f32, dot: Read f32, d_qkv: Write f32], backward_kv_cpu
}

kernel! {
    /// [`BACKWARD_KV`], an invocation a key.
    pub static BACKWARD_KV_ROWS = "attention.backward_kv", "attention", "backward_kv_rows", Params,
    [qkv: Read f32, d_out: Read f32, lse: Read f32, dot: Read f32, d_qkv: Write f32], backward_kv_cpu
}

/// The kernels of this family.
pub static ALL: &[&Kernel] = &[
    &FORWARD,
    &FORWARD_ROWS,
    &BACKWARD_DOT,
    &BACKWARD_Q,
    &BACKWARD_Q_ROWS,
    &BACKWARD_KV,
    &BACKWARD_KV_ROWS,
];

/// The kernel, constants and workgroups for a pass over the tokens of every head, by the recording's device class.
fn launch(
    recording: &Recording,
    params: &Params,
    tiled: &'static Kernel,
    rows: &'static Kernel,
) -> (&'static Kernel, Constants, [u32; 3]) {
    let aligned = ("ALIGNED", params.head_size.is_multiple_of(4).into());
    match recording.class() {
        DeviceClass::CpuAdapter => (
            rows,
            vec![("HEAD_QUADS", params.head_size.div_ceil(4).into()), aligned],
            linear_workgroups(params.rows() * params.heads as usize, ROWS_WORKGROUP),
        ),
        _ => (
            tiled,
            vec![("HEAD_SLICES", params.head_size.div_ceil(32).into()), aligned],
            [params.seq.div_ceil(TILE), params.heads, params.batch],
        ),
    }
}

/// Records causal attention: `qkv` (batch·seq, 3·width) to `out` (batch·seq, width) and `lse` (batch, heads, seq), which
/// [`backward`] needs.
pub fn forward(recording: &mut Recording, params: Params, qkv: &Buffer, out: &Buffer, lse: &Buffer) {
    let (kernel, constants, workgroups) = launch(recording, &params, &FORWARD, &FORWARD_ROWS);
    recording.dispatch(
        kernel,
        constants,
        params,
        &[qkv, out, lse],
        workgroups,
        Cost {
            flops: 2.0 * params.product_flops(),
            bytes: 4.0 * params.tensor_bytes(),
        },
    );
}

/// Records the gradient of [`forward`]: `d_qkv` (batch·seq, 3·width) from `d_out` (batch·seq, width). `dot` (batch, heads,
/// seq) is scratch.
pub fn backward(
    recording: &mut Recording,
    params: Params,
    (qkv, out, lse): (&Buffer, &Buffer, &Buffer),
    d_out: &Buffer,
    dot: &Buffer,
    d_qkv: &Buffer,
) {
    backward_dot(recording, params, d_out, out, dot);
    backward_q(recording, params, qkv, d_out, lse, dot, d_qkv);
    backward_kv(recording, params, qkv, d_out, lse, dot, d_qkv);
}

/// Records `dot = Σ out · d_out` over each head of each row: the softmax gradient's row term.
pub fn backward_dot(recording: &mut Recording, params: Params, d_out: &Buffer, out: &Buffer, dot: &Buffer) {
    recording.dispatch(
        &BACKWARD_DOT,
        vec![],
        params,
        &[out, d_out, dot],
        linear_workgroups(params.rows() * params.heads as usize, WORKGROUP),
        Cost {
            flops: 0.5 * params.tensor_bytes(),
            bytes: 2.0 * params.tensor_bytes(),
        },
    );
}

/// Records the query part of `d_qkv`.
pub fn backward_q(
    recording: &mut Recording,
    params: Params,
    qkv: &Buffer,
    d_out: &Buffer,
    lse: &Buffer,
    dot: &Buffer,
    d_qkv: &Buffer,
) {
    let (kernel, constants, workgroups) = launch(recording, &params, &BACKWARD_Q, &BACKWARD_Q_ROWS);
    recording.dispatch(
        kernel,
        constants,
        params,
        &[qkv, d_out, lse, dot, d_qkv],
        workgroups,
        Cost {
            flops: 3.0 * params.product_flops(),
            bytes: 5.0 * params.tensor_bytes(),
        },
    );
}

/// Records the key and value parts of `d_qkv`.
pub fn backward_kv(
    recording: &mut Recording,
    params: Params,
    qkv: &Buffer,
    d_out: &Buffer,
    lse: &Buffer,
    dot: &Buffer,
    d_qkv: &Buffer,
) {
    let (kernel, constants, workgroups) = launch(recording, &params, &BACKWARD_KV, &BACKWARD_KV_ROWS);
    recording.dispatch(
        kernel,
        constants,
        params,
        &[qkv, d_out, lse, dot, d_qkv],
        workgroups,
        Cost {
            flops: 4.0 * params.product_flops(),
            bytes: 6.0 * params.tensor_bytes(),
        },
    );
}

/// eˣ for x from -87 (and below, as for -87) to 88, within 2 units in the last place and free of branches and calls, so that
/// loops over it use vector instructions: `2ⁿ·eʳ` with `|r| ≤ ln 2 / 2` and eʳ by its Taylor polynomial.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding 1.5 · 2²³ rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 as a sum whose first part times n is exact.
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let x = x.max(-87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2.0) - n * LN_2.1;
    let tail = 1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0)));
    let power = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * tail)));
    power * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// Rows of `qkv` or `out` that a CPU task takes at once.
const BLOCK: usize = 64;

/// Some consecutive tokens of one sequence.
#[derive(Clone, Copy)]
struct Tokens {
    batch: usize,
    start: usize,
    end: usize,
}

impl Tokens {
    fn len(&self) -> usize {
        self.end - self.start
    }

    /// Index of the first token in (batch, heads, seq).
    fn at(&self, params: &Params, head: usize) -> usize {
        (self.batch * params.heads as usize + head) * params.seq as usize + self.start
    }

    /// Copies the values that a head has of these tokens from `tensor` (batch·seq, pitch), where they begin in column
    /// `column`: (tokens, head_size).
    fn gather(&self, params: &Params, tensor: &[f32], pitch: usize, column: usize) -> Vec<f32> {
        let size = params.head_size as usize;
        let first = self.batch * params.seq as usize + self.start;
        let mut values = Vec::with_capacity(self.len() * size);
        for row in first..first + self.len() {
            values.extend_from_slice(&tensor[row * pitch + column..][..size]);
        }
        values
    }

    /// The part (0 query, 1 key, 2 value) of a head.
    fn part(&self, params: &Params, qkv: &[f32], part: usize, head: usize) -> Vec<f32> {
        let width = params.width();
        let column = part * width + head * params.head_size as usize;
        self.gather(params, qkv, 3 * width, column)
    }
}

/// Calls `block(tokens, rows)` for blocks of at most [`BLOCK`] rows of `tensor` (batch·seq, pitch), none across sequences.
fn for_each_block(params: &Params, tensor: &mut [f32], pitch: usize, block: impl Fn(Tokens, &mut [f32]) + Sync) {
    let (rows, seq) = (params.rows(), params.seq as usize);
    for_each_row(&mut tensor[..rows * pitch], BLOCK * pitch, |i, mut rest| {
        let mut row = i * BLOCK;
        while !rest.is_empty() {
            let (batch, start) = (row / seq, row % seq);
            let count = (rest.len() / pitch).min(seq - start);
            let (rows, tail) = rest.split_at_mut(count * pitch);
            let end = start + count;
            block(Tokens { batch, start, end }, rows);
            row += count;
            rest = tail;
        }
    });
}

/// `scale · left · rightᵀ`, left (rows, inner), right (columns, inner).
fn times_transpose(left: &[f32], right: &[f32], inner: usize, scale: f32) -> Vec<f32> {
    let (rows, columns) = (left.len() / inner, right.len() / inner);
    product(
        (rows, columns, inner),
        Matrix::rows(left, 0, inner),
        Matrix::rows(right, 0, inner),
        scale,
    )
}

/// `left · right`, left (rows, inner), right (inner, columns).
fn times(left: &[f32], right: &[f32], columns: usize) -> Vec<f32> {
    let inner = right.len() / columns;
    product(
        (left.len() / inner, columns, inner),
        Matrix::rows(left, 0, inner),
        Matrix::columns(right, 0, columns),
        1.0,
    )
}

fn product((rows, columns, inner): (usize, usize, usize), left: Matrix<'_>, right: Matrix<'_>, scale: f32) -> Vec<f32> {
    let term = Term {
        inner,
        left,
        right,
        scale,
    };
    let mut out = vec![0.0; rows * columns];
    add_products(rows, columns, &[term], &mut out, |_, _| {}, |_, _| {});
    out
}

/// Copies the rows of a head's (tokens, head_size) into the columns from `column` on of `rows` (tokens, pitch).
fn scatter(values: &[f32], size: usize, rows: &mut [f32], pitch: usize, column: usize) {
    for (row, values) in rows.chunks_mut(pitch).zip(values.chunks(size)) {
        row[column..column + size].copy_from_slice(values);
    }
}

/// The specification of `attention.forward`.
pub fn forward_cpu(
    params: &Params,
    qkv: &[f32],     // (batch * seq, 3 * width)
    out: &mut [f32], // (batch * seq, width)
    lse: &mut [f32], // (batch, heads, seq)
) {
    let (size, heads, width) = (params.head_size as usize, params.heads as usize, params.width());
    // Both results of a row side by side, because they are laid out differently.
    let pitch = width + heads;
    let mut results = vec![0.0; params.rows() * pitch];
    for_each_block(params, &mut results, pitch, |queries, rows| {
        let keys = Tokens { start: 0, ..queries };
        for head in 0..heads {
            let q = queries.part(params, qkv, 0, head);
            let k = keys.part(params, qkv, 1, head);
            let v = keys.part(params, qkv, 2, head);
            let mut probabilities = times_transpose(&q, &k, size, params.scale);
            for (i, scores) in probabilities.chunks_mut(keys.len()).enumerate() {
                let (scores, masked) = scores.split_at_mut(queries.start + i + 1);
                let max = scores.iter().copied().fold(f32::MIN, f32::max);
                scores.iter_mut().for_each(|score| *score = exp(*score - max));
                let sum: f32 = scores.iter().sum();
                scores.iter_mut().for_each(|score| *score /= sum);
                masked.fill(0.0);
                rows[i * pitch + width + head] = max + sum.ln();
            }
            scatter(&times(&probabilities, &v, size), size, rows, pitch, head * size);
        }
    });
    for (row, result) in results.chunks(pitch).enumerate() {
        let (values, row_lse) = result.split_at(width);
        out[row * width..][..width].copy_from_slice(values);
        let (batch, t) = (row / params.seq as usize, row % params.seq as usize);
        for (head, &value) in row_lse.iter().enumerate() {
            lse[(batch * heads + head) * params.seq as usize + t] = value;
        }
    }
}

/// The specification of `attention.backward_dot`.
pub fn backward_dot_cpu(
    params: &Params,
    out: &[f32],     // (batch * seq, width)
    d_out: &[f32],   // (batch * seq, width)
    dot: &mut [f32], // (batch, heads, seq)
) {
    let (seq, size) = (params.seq as usize, params.head_size as usize);
    let (heads, width) = (params.heads as usize, params.width());
    for_each_row(&mut dot[..params.rows() * heads], seq, |group, dot| {
        for (t, dot) in dot.iter_mut().enumerate() {
            let at = (group / heads * seq + t) * width + group % heads * size;
            let pairs = out[at..][..size].iter().zip(&d_out[at..][..size]);
            *dot = pairs.map(|(out, d_out)| out * d_out).sum();
        }
    });
}

/// The specification of `attention.backward_q`.
pub fn backward_q_cpu(
    params: &Params,
    qkv: &[f32],       // (batch * seq, 3 * width)
    d_out: &[f32],     // (batch * seq, width)
    lse: &[f32],       // (batch, heads, seq)
    dot: &[f32],       // (batch, heads, seq)
    d_qkv: &mut [f32], // (batch * seq, 3 * width)
) {
    let (size, width) = (params.head_size as usize, params.width());
    for_each_block(params, d_qkv, 3 * width, |queries, rows| {
        let keys = Tokens { start: 0, ..queries };
        for head in 0..params.heads as usize {
            let q = queries.part(params, qkv, 0, head);
            let k = keys.part(params, qkv, 1, head);
            let v = keys.part(params, qkv, 2, head);
            let d_o = queries.gather(params, d_out, width, head * size);
            let mut d_scores = times_transpose(&q, &k, size, params.scale);
            let d_probabilities = times_transpose(&d_o, &v, size, 1.0);
            let at = queries.at(params, head);
            let scores = d_scores.chunks_mut(keys.len());
            for (i, (scores, d_p)) in scores.zip(d_probabilities.chunks(keys.len())).enumerate() {
                let (scores, masked) = scores.split_at_mut(queries.start + i + 1);
                for (score, d_p) in scores.iter_mut().zip(d_p) {
                    *score = params.scale * exp(*score - lse[at + i]) * (d_p - dot[at + i]);
                }
                masked.fill(0.0);
            }
            scatter(&times(&d_scores, &k, size), size, rows, 3 * width, head * size);
        }
    });
}

/// The specification of `attention.backward_kv`.
pub fn backward_kv_cpu(
    params: &Params,
    qkv: &[f32],       // (batch * seq, 3 * width)
    d_out: &[f32],     // (batch * seq, width)
    lse: &[f32],       // (batch, heads, seq)
    dot: &[f32],       // (batch, heads, seq)
    d_qkv: &mut [f32], // (batch * seq, 3 * width)
) {
    let (size, width) = (params.head_size as usize, params.width());
    for_each_block(params, d_qkv, 3 * width, |keys, rows| {
        let queries = Tokens {
            end: params.seq as usize,
            ..keys
        };
        for head in 0..params.heads as usize {
            let q = queries.part(params, qkv, 0, head);
            let k = keys.part(params, qkv, 1, head);
            let v = keys.part(params, qkv, 2, head);
            let d_o = queries.gather(params, d_out, width, head * size);
            // Rows are keys and columns queries.
            let mut probabilities = times_transpose(&k, &q, size, params.scale);
            let mut d_scores = times_transpose(&v, &d_o, size, 1.0);
            let at = queries.at(params, head);
            let (lse, dot) = (&lse[at..][..queries.len()], &dot[at..][..queries.len()]);
            for (i, (probabilities, d_scores)) in probabilities
                .chunks_mut(queries.len())
                .zip(d_scores.chunks_mut(queries.len()))
                .enumerate()
            {
                probabilities[..i].fill(0.0);
                d_scores[..i].fill(0.0);
                for query in i..queries.len() {
                    let probability = exp(probabilities[query] - lse[query]);
                    probabilities[query] = probability;
                    d_scores[query] = params.scale * probability * (d_scores[query] - dot[query]);
                }
            }
            let (d_k, d_v) = (times(&d_scores, &q, size), times(&probabilities, &d_o, size));
            scatter(&d_k, size, rows, 3 * width, width + head * size);
            scatter(&d_v, size, rows, 3 * width, 2 * width + head * size);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -870_000..=880_000 {
            let x = i as f32 / 10_000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}): {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::MIN), exp(-87.0));
    }
}
