//! Attention on the CPU engine: blocks of rows on all cores, whose scores and sums are packed products.

use super::Params;
use crate::compute::cpu::for_each_row;
use crate::compute::host::exp;
use crate::compute::host::product::{Matrix, Term, add_products};
use crate::compute::host::simd::{Instructions, Simd, Vectorised};

/// Rows of `qkv` or `out` that a task takes at once.
pub(super) const BLOCK: usize = 64;

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

    /// The queries of a head.
    fn queries(&self, params: &Params, qkv: &[f32], head: usize) -> Vec<f32> {
        self.gather(params, qkv, params.qkv_width(), head * params.head_size as usize)
    }

    /// The keys and the values of a key-value head.
    fn keys_and_values(&self, params: &Params, qkv: &[f32], kv_head: usize) -> (Vec<f32>, Vec<f32>) {
        let part = |column| self.gather(params, qkv, params.qkv_width(), column);
        (part(key_column(params, kv_head)), part(value_column(params, kv_head)))
    }
}

fn key_column(params: &Params, kv_head: usize) -> usize {
    params.width() + kv_head * params.head_size as usize
}

fn value_column(params: &Params, kv_head: usize) -> usize {
    key_column(params, params.kv_heads as usize + kv_head)
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
pub(super) fn times_transpose(left: &[f32], right: &[f32], inner: usize, scale: f32) -> Vec<f32> {
    let (rows, columns) = (left.len() / inner, right.len() / inner);
    let mut out = vec![0.0; rows * columns];
    let term = Term {
        inner,
        left: Matrix::rows(left, 0, inner),
        right: Matrix::rows(right, 0, inner),
        scale,
    };
    add_products(rows, columns, &[term], &mut out, |_, _| {}, |_, _| {});
    out
}

/// `out += left · right`, left (rows, inner), right (inner, columns).
pub(super) fn add_times(left: &[f32], right: &[f32], columns: usize, out: &mut [f32]) {
    let inner = right.len() / columns;
    let term = Term {
        inner,
        left: Matrix::rows(left, 0, inner),
        right: Matrix::columns(right, 0, columns),
        scale: 1.0,
    };
    add_products(out.len() / columns, columns, &[term], out, |_, _| {}, |_, _| {});
}

/// Turns scores into their softmax, and gives their log-sum-exp.
pub(super) struct Softmax<'a> {
    pub(super) scores: &'a mut [f32],
    pub(super) lse: &'a mut f32,
}

impl Vectorised for Softmax<'_> {
    #[inline(always)]
    fn run<I: Instructions, const ROWS: usize, const LANES: usize>(self) {
        let mut maxima = [f32::MIN; LANES];
        let (blocks, rest) = self.scores.as_chunks::<LANES>();
        for block in blocks {
            for (max, &score) in maxima.iter_mut().zip(block) {
                *max = if score > *max { score } else { *max };
            }
        }
        let mut max = f32::MIN;
        for &score in maxima.iter().chain(rest) {
            max = if score > max { score } else { max };
        }
        let mut sums = [0.0f32; LANES];
        let (blocks, rest) = self.scores.as_chunks_mut::<LANES>();
        for block in blocks {
            for (sum, score) in sums.iter_mut().zip(block) {
                *score = exp(*score - max);
                *sum += *score;
            }
        }
        let mut sum = 0.0;
        for score in rest {
            *score = exp(*score - max);
            sum += *score;
        }
        sum += I::sum(sums);
        let factor = 1.0 / sum;
        for score in self.scores.iter_mut() {
            *score *= factor;
        }
        *self.lse = max + sum.ln();
    }
}

/// Turns the scores of a row into their softmax over the first `count`, zeros after, and returns their log-sum-exp.
pub(super) fn softmax(simd: Simd, scores: &mut [f32], count: usize) -> f32 {
    let (scores, masked) = scores.split_at_mut(count);
    let mut lse = 0.0;
    simd.run(Softmax { scores, lse: &mut lse });
    masked.fill(0.0);
    lse
}

/// Turns a query's scores into their gradients.
struct QueryGradients<'a> {
    scale: f32,
    lse: f32,
    dot: f32,
    d_probabilities: &'a [f32],
    scores: &'a mut [f32],
}

impl Vectorised for QueryGradients<'_> {
    #[inline(always)]
    fn run<I: Instructions, const ROWS: usize, const LANES: usize>(self) {
        for (score, d_probability) in self.scores.iter_mut().zip(self.d_probabilities) {
            *score = self.scale * exp(*score - self.lse) * (d_probability - self.dot);
        }
    }
}

/// Turns a key's scores into probabilities, and the gradients of the probabilities into those of the scores.
struct KeyGradients<'a> {
    scale: f32,
    lse: &'a [f32],
    dot: &'a [f32],
    scores: &'a mut [f32],
    d_probabilities: &'a mut [f32],
}

impl Vectorised for KeyGradients<'_> {
    #[inline(always)]
    fn run<I: Instructions, const ROWS: usize, const LANES: usize>(self) {
        let pairs = self.scores.iter_mut().zip(self.d_probabilities);
        for ((score, d_probability), (lse, dot)) in pairs.zip(self.lse.iter().zip(self.dot)) {
            *score = exp(*score - lse);
            *d_probability = self.scale * *score * (*d_probability - dot);
        }
    }
}

/// Copies the rows of a head's (tokens, head_size) into the columns from `column` on of `rows` (tokens, pitch).
fn scatter(values: &[f32], size: usize, rows: &mut [f32], pitch: usize, column: usize) {
    for (row, values) in rows.chunks_mut(pitch).zip(values.chunks(size)) {
        row[column..column + size].copy_from_slice(values);
    }
}

/// [`spec::forward`](super::spec::forward) on all cores.
pub(super) fn forward(
    params: &Params,
    qkv: &[f32],     // (batch * seq, (heads + 2 * kv_heads) * head_size)
    out: &mut [f32], // (batch * seq, heads * head_size)
    lse: &mut [f32], // (batch, heads, seq)
) {
    let (size, heads, width) = (params.head_size as usize, params.heads as usize, params.width());
    let (group, simd) = (params.group(), Simd::detect());
    // Both results of a row side by side, because they are laid out differently.
    let pitch = width + heads;
    let mut results = vec![0.0; params.rows() * pitch];
    for_each_block(params, &mut results, pitch, |queries, rows| {
        let keys = Tokens { start: 0, ..queries };
        for kv_head in 0..params.kv_heads as usize {
            let (k, v) = keys.keys_and_values(params, qkv, kv_head);
            for head in kv_head * group..(kv_head + 1) * group {
                let q = queries.queries(params, qkv, head);
                let mut probabilities = times_transpose(&q, &k, size, params.scale);
                for (i, scores) in probabilities.chunks_mut(keys.len()).enumerate() {
                    rows[i * pitch + width + head] = softmax(simd, scores, queries.start + i + 1);
                }
                let mut sums = vec![0.0; queries.len() * size];
                add_times(&probabilities, &v, size, &mut sums);
                scatter(&sums, size, rows, pitch, head * size);
            }
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

/// [`spec::backward_dot`](super::spec::backward_dot) on all cores.
pub(super) fn backward_dot(
    params: &Params,
    out: &[f32],     // (batch * seq, heads * head_size)
    d_out: &[f32],   // (batch * seq, heads * head_size)
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

/// [`spec::backward_q`](super::spec::backward_q) on all cores.
pub(super) fn backward_q(
    params: &Params,
    qkv: &[f32],       // (batch * seq, (heads + 2 * kv_heads) * head_size)
    d_out: &[f32],     // (batch * seq, heads * head_size)
    lse: &[f32],       // (batch, heads, seq)
    dot: &[f32],       // (batch, heads, seq)
    d_qkv: &mut [f32], // (batch * seq, (heads + 2 * kv_heads) * head_size), of which the queries are written
) {
    let (size, width, pitch) = (params.head_size as usize, params.width(), params.qkv_width());
    let (group, simd) = (params.group(), Simd::detect());
    for_each_block(params, d_qkv, pitch, |queries, rows| {
        let keys = Tokens { start: 0, ..queries };
        for kv_head in 0..params.kv_heads as usize {
            let (k, v) = keys.keys_and_values(params, qkv, kv_head);
            for head in kv_head * group..(kv_head + 1) * group {
                let q = queries.queries(params, qkv, head);
                let d_o = queries.gather(params, d_out, width, head * size);
                let mut d_scores = times_transpose(&q, &k, size, params.scale);
                let d_probabilities = times_transpose(&d_o, &v, size, 1.0);
                let at = queries.at(params, head);
                let scores = d_scores.chunks_mut(keys.len());
                for (i, (scores, d_p)) in scores.zip(d_probabilities.chunks(keys.len())).enumerate() {
                    let (scores, masked) = scores.split_at_mut(queries.start + i + 1);
                    simd.run(QueryGradients {
                        scale: params.scale,
                        lse: lse[at + i],
                        dot: dot[at + i],
                        d_probabilities: d_p,
                        scores,
                    });
                    masked.fill(0.0);
                }
                let mut d_q = vec![0.0; queries.len() * size];
                add_times(&d_scores, &k, size, &mut d_q);
                scatter(&d_q, size, rows, pitch, head * size);
            }
        }
    });
}

/// [`spec::backward_kv`](super::spec::backward_kv) on all cores.
pub(super) fn backward_kv(
    params: &Params,
    qkv: &[f32],       // (batch * seq, (heads + 2 * kv_heads) * head_size)
    d_out: &[f32],     // (batch * seq, heads * head_size)
    lse: &[f32],       // (batch, heads, seq)
    dot: &[f32],       // (batch, heads, seq)
    d_qkv: &mut [f32], // (batch * seq, (heads + 2 * kv_heads) * head_size), of which the keys and values are written
) {
    let (size, width, pitch) = (params.head_size as usize, params.width(), params.qkv_width());
    let (group, simd) = (params.group(), Simd::detect());
    for_each_block(params, d_qkv, pitch, |keys, rows| {
        let queries = Tokens {
            end: params.seq as usize,
            ..keys
        };
        for kv_head in 0..params.kv_heads as usize {
            let (k, v) = keys.keys_and_values(params, qkv, kv_head);
            let mut d_k = vec![0.0; keys.len() * size];
            let mut d_v = vec![0.0; keys.len() * size];
            for head in kv_head * group..(kv_head + 1) * group {
                let q = queries.queries(params, qkv, head);
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
                    simd.run(KeyGradients {
                        scale: params.scale,
                        lse: &lse[i..],
                        dot: &dot[i..],
                        scores: &mut probabilities[i..],
                        d_probabilities: &mut d_scores[i..],
                    });
                }
                add_times(&d_scores, &q, size, &mut d_k);
                add_times(&probabilities, &d_o, size, &mut d_v);
            }
            scatter(&d_k, size, rows, pitch, key_column(params, kv_head));
            scatter(&d_v, size, rows, pitch, value_column(params, kv_head));
        }
    });
}
