//! Causal multi-head attention that never stores the scores: an online softmax forward that keeps only each row's
//! log-sum-exp, and a backward that recomputes probabilities from it (FlashAttention, arXiv 2205.14135 and 2307.08691).
//!
//! `qkv` is (batch·seq, 3·width) with the query, key and value of a row side by side, head after head, as GPT-2's `c_attn`
//! gives them; `lse` and `dot` are (batch, heads, seq).

use crate::compute::cpu::for_each_row;
use crate::compute::kernel::{Constants, Kernel};
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{kernel, params};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Queries and keys in a tile, the default of `TILE` in the shader.
const TILE: u32 = 32;

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

/// The kernel, constants and workgroups for a pass over tiles of tokens or over tokens, by the recording's device class.
fn launch(
    recording: &Recording,
    params: &Params,
    tiled: &'static Kernel,
    rows: &'static Kernel,
) -> (&'static Kernel, Constants, [u32; 3]) {
    match recording.class() {
        DeviceClass::CpuAdapter => (
            rows,
            vec![("HEAD_QUADS", params.head_size.div_ceil(4).into())],
            linear_workgroups(params.rows() * params.heads as usize, WORKGROUP),
        ),
        _ => (
            tiled,
            vec![("HEAD_SLICES", params.head_size.div_ceil(32).into())],
            [params.seq.div_ceil(TILE), params.heads, params.batch],
        ),
    }
}

/// Records causal attention: `qkv` (batch·seq, 3·width) to `out` (batch·seq, width) and `lse` (batch, heads, seq), which
/// [`backward`] needs.
pub fn forward(
    recording: &mut Recording,
    params: Params,
    qkv: &Buffer,
    out: &Buffer,
    lse: &Buffer,
) {
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
pub fn backward_dot(
    recording: &mut Recording,
    params: Params,
    d_out: &Buffer,
    out: &Buffer,
    dot: &Buffer,
) {
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
    let (kernel, constants, workgroups) =
        launch(recording, &params, &BACKWARD_KV, &BACKWARD_KV_ROWS);
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

/// Lanes of a sum, so that it is a sum of short sums and compiles to vector instructions.
const LANES: usize = 16;

fn dot_product(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

/// `out += weight · x`
fn accumulate(out: &mut [f32], weight: f32, x: &[f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out += weight * x;
    }
}

/// One of query (0), key (1) and value (2) of token `t` of a sequence and head.
struct Heads<'a> {
    params: &'a Params,
    qkv: &'a [f32],
    batch: usize,
    head: usize,
}

impl<'a> Heads<'a> {
    fn part(&self, part: usize, t: usize) -> &'a [f32] {
        let (seq, size) = (self.params.seq as usize, self.params.head_size as usize);
        let row = self.batch * seq + t;
        &self.qkv[(row * 3 + part) * self.params.width() + self.head * size..][..size]
    }
}

/// The specification of `attention.forward`.
pub fn forward_cpu(
    params: &Params,
    qkv: &[f32],     // (batch * seq, 3 * width)
    out: &mut [f32], // (batch * seq, width)
    lse: &mut [f32], // (batch, heads, seq)
) {
    let (seq, size) = (params.seq as usize, params.head_size as usize);
    let (heads, width) = (params.heads as usize, params.width());
    let group = |batch, head| Heads {
        params,
        qkv,
        batch,
        head,
    };
    // The rows of `out` need `lse`, which is laid out the other way round, so it comes first.
    for_each_row(&mut lse[..params.rows() * heads], seq, |batch_head, lse| {
        let tokens = group(batch_head / heads, batch_head % heads);
        let mut scores = vec![0.0f32; seq];
        for (query, lse) in lse.iter_mut().enumerate() {
            let q = tokens.part(0, query);
            let scores = &mut scores[..=query];
            for (key, score) in scores.iter_mut().enumerate() {
                *score = params.scale * dot_product(q, tokens.part(1, key));
            }
            let max = scores.iter().copied().fold(f32::MIN, f32::max);
            let sum: f32 = scores.iter().map(|score| (score - max).exp()).sum();
            *lse = max + sum.ln();
        }
    });
    for_each_row(&mut out[..params.rows() * width], width, |row, out| {
        let (batch, query) = (row / seq, row % seq);
        for (head, out) in out.chunks_mut(size).enumerate() {
            let tokens = group(batch, head);
            let lse = lse[(batch * heads + head) * seq + query];
            out.fill(0.0);
            for key in 0..=query {
                let score = params.scale * dot_product(tokens.part(0, query), tokens.part(1, key));
                accumulate(out, (score - lse).exp(), tokens.part(2, key));
            }
        }
    });
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
    for_each_row(&mut dot[..params.rows() * heads], seq, |batch_head, dot| {
        for (t, dot) in dot.iter_mut().enumerate() {
            let at = (batch_head / heads * seq + t) * width + batch_head % heads * size;
            *dot = dot_product(&out[at..][..size], &d_out[at..][..size]);
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
    let (seq, size) = (params.seq as usize, params.head_size as usize);
    let (heads, width) = (params.heads as usize, params.width());
    for_each_row(
        &mut d_qkv[..params.rows() * 3 * width],
        3 * width,
        |row, d_qkv| {
            let (batch, query) = (row / seq, row % seq);
            for (head, d_q) in d_qkv[..width].chunks_mut(size).enumerate() {
                let tokens = Heads {
                    params,
                    qkv,
                    batch,
                    head,
                };
                let at = (batch * heads + head) * seq + query;
                let d_out = &d_out[row * width + head * size..][..size];
                let q = tokens.part(0, query);
                d_q.fill(0.0);
                for key in 0..=query {
                    let k = tokens.part(1, key);
                    let probability = (params.scale * dot_product(q, k) - lse[at]).exp();
                    let d_probability = dot_product(d_out, tokens.part(2, key));
                    let d_score = params.scale * probability * (d_probability - dot[at]);
                    accumulate(d_q, d_score, k);
                }
            }
        },
    );
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
    let (seq, size) = (params.seq as usize, params.head_size as usize);
    let (heads, width) = (params.heads as usize, params.width());
    for_each_row(
        &mut d_qkv[..params.rows() * 3 * width],
        3 * width,
        |row, d_qkv| {
            let (batch, key) = (row / seq, row % seq);
            let (d_k, d_v) = d_qkv[width..].split_at_mut(width);
            let d_heads = d_k.chunks_mut(size).zip(d_v.chunks_mut(size));
            for (head, (d_k, d_v)) in d_heads.enumerate() {
                let tokens = Heads {
                    params,
                    qkv,
                    batch,
                    head,
                };
                let (k, v) = (tokens.part(1, key), tokens.part(2, key));
                d_k.fill(0.0);
                d_v.fill(0.0);
                for query in key..seq {
                    let at = (batch * heads + head) * seq + query;
                    let d_out = &d_out[(batch * seq + query) * width + head * size..][..size];
                    let q = tokens.part(0, query);
                    let probability = (params.scale * dot_product(q, k) - lse[at]).exp();
                    let d_probability = dot_product(d_out, v);
                    let d_score = params.scale * probability * (d_probability - dot[at]);
                    accumulate(d_v, probability, d_out);
                    accumulate(d_k, d_score, q);
                }
            }
        },
    );
}
