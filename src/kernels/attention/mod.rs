//! Causal multi-head attention that never stores the scores: an online softmax forward that keeps only each row's
//! log-sum-exp, and a backward that recomputes probabilities from it (FlashAttention, arXiv 2205.14135 and 2307.08691). Its
//! sibling [`cache`] attends from new tokens to those of a cache, for generation.
//!
//! Heads may share keys and values: query head `h` reads key-value head `h / (heads / kv_heads)` (arXiv 2305.13245). A row of
//! `qkv` (batch·seq, (heads + 2·kv_heads)·head_size) has its query heads, then its key heads, then its value heads, as a fused
//! projection gives them; `lse` and `dot` are (batch, heads, seq). The gradients of keys and values sum over the query heads
//! that share them in ascending order, so that results do not depend on scheduling.
//!
//! | version | idea                                                                                     | measured |
//! |---------|------------------------------------------------------------------------------------------|----------|
//! | `tiled` | a workgroup a tile of 32 tokens of a head; 8 × 8 invocations with 4 × 4 scores each, the head in slices of 32 through workgroup memory | not measured on a GPU yet |
//! | `rows`  | an invocation a token of a head, no workgroup memory: for adapters emulated on a CPU      | not timed |
//! | host    | 64 rows a task; scores and sums as packed products, keys and values gathered once for the heads that share them | 62 GFLOP/s a core forward, 83 backward |
//! | host    | softmax and its gradients in vectors of the machine's width                               | 85 forward, 101 backward |
//!
//! Host figures: a core of an AMD EPYC with AVX-512, 512 tokens, 9 heads on 3 of 64 values.

pub mod cache;
mod host;
pub mod spec;
mod variants;

use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, Recording};
use crate::{contract, params};

use super::case::{Builder, Case, Example, Sizes, case};
use crate::compute::Error;
pub use cache::{CacheParams, append, cache_words, cached};
use variants::{
    BACKWARD_DOT_ROWS, BACKWARD_KV_ROWS, BACKWARD_KV_TILED, BACKWARD_Q_ROWS, BACKWARD_Q_TILED, FORWARD_ROWS,
    FORWARD_TILED,
};

params! {
    /// Sizes for attention's kernels.
    pub struct Params {
        pub batch: u32,
        pub seq: u32,
        /// Query heads.
        pub heads: u32,
        /// Key and value heads; divides `heads`.
        pub kv_heads: u32,
        pub head_size: u32,
        /// Multiplies the scores: 1/√head_size.
        pub scale: f32,
    }
}

impl Params {
    fn rows(&self) -> usize {
        self.batch as usize * self.seq as usize
    }

    /// Values in a row of `out`.
    fn width(&self) -> usize {
        self.heads as usize * self.head_size as usize
    }

    /// Values in a row of `qkv`.
    fn qkv_width(&self) -> usize {
        (self.heads as usize + 2 * self.kv_heads as usize) * self.head_size as usize
    }

    /// Query heads that share a key-value head.
    fn group(&self) -> usize {
        self.heads as usize / self.kv_heads as usize
    }

    /// Flops of one product of two (tokens, head_size) tensors over all pairs that the causal mask leaves, or of one that
    /// applies such a pair's weight, in every head.
    fn product_flops(&self) -> f64 {
        let seq = self.seq as f64;
        self.batch as f64 * self.width() as f64 * seq * (seq + 1.0)
    }

    /// Bytes of a tensor of `heads` heads of every row.
    fn bytes(&self, heads: u32) -> f64 {
        4.0 * self.rows() as f64 * heads as f64 * self.head_size as f64
    }

    fn assert_grouped(&self) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "{} query heads share {} key-value heads unevenly",
            self.heads,
            self.kv_heads
        );
    }
}

contract! {
    /// `out = softmax(scale · q·kᵀ + mask) · v` and the log-sum-exp of every row.
    pub(crate) static FORWARD = "attention.forward", Params,
    [qkv: Read f32, out: Write f32, lse: Write f32],
    spec: spec::forward, host: host::forward, variants: [FORWARD_ROWS, FORWARD_TILED]
}

contract! {
    /// `dot = Σ out · d_out` over each head of each row.
    pub(crate) static BACKWARD_DOT = "attention.backward_dot", Params,
    [out: Read f32, d_out: Read f32, dot: Write f32],
    spec: spec::backward_dot, host: host::backward_dot, variants: [BACKWARD_DOT_ROWS]
}

contract! {
    /// The query part of `d_qkv`.
    pub(crate) static BACKWARD_Q = "attention.backward_q", Params,
    [qkv: Read f32, d_out: Read f32, lse: Read f32, dot: Read f32, d_qkv: Write f32],
    spec: spec::backward_q, host: host::backward_q, variants: [BACKWARD_Q_ROWS, BACKWARD_Q_TILED]
}

contract! {
    /// The key and value parts of `d_qkv`.
    pub(crate) static BACKWARD_KV = "attention.backward_kv", Params,
    [qkv: Read f32, d_out: Read f32, lse: Read f32, dot: Read f32, d_qkv: Write f32],
    spec: spec::backward_kv, host: host::backward_kv, variants: [BACKWARD_KV_ROWS, BACKWARD_KV_TILED]
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[
    &FORWARD,
    &BACKWARD_DOT,
    &BACKWARD_Q,
    &BACKWARD_KV,
    &cache::APPEND,
    &cache::CACHED,
];

/// Records causal attention: `qkv` (batch·seq, (heads + 2·kv_heads)·head_size) to `out` (batch·seq, heads·head_size) and `lse`
/// (batch, heads, seq), which [`backward`] needs.
pub fn forward(recording: &mut Recording, params: Params, qkv: &Buffer, out: &Buffer, lse: &Buffer) {
    params.assert_grouped();
    recording.dispatch(
        &FORWARD,
        params,
        &[qkv, out, lse],
        Cost {
            flops: 2.0 * params.product_flops(),
            bytes: params.bytes(2 * params.heads + 2 * params.kv_heads),
        },
    );
}

/// Records the gradient of [`forward`]: `d_qkv` (batch·seq, (heads + 2·kv_heads)·head_size) from `d_out` (batch·seq,
/// heads·head_size). `dot` (batch, heads, seq) is scratch.
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
        params,
        &[out, d_out, dot],
        Cost {
            flops: 0.5 * params.bytes(params.heads),
            bytes: params.bytes(2 * params.heads),
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
    params.assert_grouped();
    recording.dispatch(
        &BACKWARD_Q,
        params,
        &[qkv, d_out, lse, dot, d_qkv],
        Cost {
            flops: 3.0 * params.product_flops(),
            bytes: params.bytes(3 * params.heads + 2 * params.kv_heads),
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
    params.assert_grouped();
    recording.dispatch(
        &BACKWARD_KV,
        params,
        &[qkv, d_out, lse, dot, d_qkv],
        Cost {
            flops: 4.0 * params.product_flops(),
            bytes: params.bytes(2 * params.heads + 4 * params.kv_heads),
        },
    );
}

fn example_params(s: Sizes) -> Params {
    Params {
        batch: s.batch as u32,
        seq: s.seq as u32,
        heads: s.heads as u32,
        kv_heads: s.kv_heads as u32,
        head_size: s.head_size as u32,
        scale: 1.0 / (s.head_size as f32).sqrt(),
    }
}

fn shape(s: Sizes) -> String {
    format!("{}x{}x{}({})x{}", s.batch, s.seq, s.heads, s.kv_heads, s.head_size)
}

fn forward_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    let params = example_params(s);
    let qkv = b.random("qkv", params.rows() * params.qkv_width())?;
    let out = b.zeros("out", params.rows() * params.width())?;
    let lse = b.zeros("lse", params.rows() * s.heads)?;
    let outputs = [(&out.clone(), params.rows() * params.width())];
    Ok(case(&outputs, false, move |recording| {
        forward(recording, params, &qkv, &out, &lse);
    }))
}

fn backward_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    let params = example_params(s);
    let (rows, width) = (params.rows(), params.width());
    let qkv = b.random("qkv", rows * params.qkv_width())?;
    let d_out = b.random("d_out", rows * width)?;
    let out = b.zeros("out", rows * width)?;
    let lse = b.zeros("lse", rows * s.heads)?;
    let dot = b.zeros("dot", rows * s.heads)?;
    let d_qkv = b.zeros("d_qkv", rows * params.qkv_width())?;
    let mut before = b.engine.recording();
    forward(&mut before, params, &qkv, &out, &lse);
    b.engine.run(&b.engine.prepare(before))?;
    let outputs = [(&d_qkv.clone(), rows * params.qkv_width())];
    Ok(case(&outputs, false, move |recording| {
        backward(recording, params, (&qkv, &out, &lse), &d_out, &dot, &d_qkv);
    }))
}

/// Uses of this family at a model's sizes.
pub(crate) static EXAMPLES: &[Example] = &[
    Example {
        name: "attention.forward",
        shape,
        build: forward_example,
    },
    Example {
        name: "attention.backward",
        shape,
        build: backward_example,
    },
    Example {
        name: "attention.append",
        shape: cache::shape,
        build: cache::append_example,
    },
    Example {
        name: "attention.cached+decode",
        shape: cache::shape,
        build: cache::decode_example,
    },
    Example {
        name: "attention.cached+prefill",
        shape: cache::shape,
        build: cache::prefill_example,
    },
];
