//! Attention of new tokens to those of a cache, for generation: the keys and values of all tokens so far are kept, and a token
//! costs one walk over them. Separate from training's attention, which has all tokens of its sequences at hand and a backward.
//!
//! A cache of [`cache_words`] words holds (kv_heads, capacity, head_size) keys, then as many values. Where the new tokens stand
//! is read from a buffer, because a recording is prepared once and replayed for every token.
//!
//! | version     | idea                                                                                  | measured |
//! |-------------|---------------------------------------------------------------------------------------|----------|
//! | `workgroup` | a workgroup a head of a row, online softmax over blocks of 64 keys, 8 invocations a key | not measured on a GPU yet |
//! | `rows`      | an invocation a head of a row: for adapters emulated on a CPU                          | not timed |
//! | host, row   | a head a task over contiguous keys, plain loops                                        | 10 GFLOP/s a core |
//! | host, row   | vectors of the machine's width, lanes summed by shuffles                                | 22 GFLOP/s a core; 9 heads on 3 of 64 at 512 tokens 30 µs |
//! | host, rows  | packed products of the queries that share keys; faster from 2 rows on                   | the same at 512 new tokens 1.8 ms |
//!
//! Host figures: two cores of an AMD EPYC with AVX-512. The next rung on a GPU is several workgroups a head, each with some of
//! the keys: a generated token has as few workgroups as heads.

use crate::compute::cpu::for_each_row;
use crate::compute::host::product::{Matrix, Term, add_products};
use crate::compute::host::simd::{Instructions, Simd, Vectorised};
use crate::compute::{Buffer, Cost, DeviceClass, Error, Recording, linear_workgroups};
use crate::kernels::case::{Builder, Case, Sizes, case};
use crate::{contract, params, variant};

use super::host::{Softmax, softmax};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Invocations in a workgroup of `cached_rows`, the default of `ROWS_WORKGROUP` in the shader.
const ROWS_WORKGROUP: u32 = 8;

/// The largest head: each of its quads has an invocation.
const MAX_HEAD_SIZE: u32 = 4 * WORKGROUP;

params! {
    /// Sizes for the cache's kernels.
    pub struct CacheParams {
        /// New tokens.
        pub rows: u32,
        /// Tokens that the cache has room for.
        pub capacity: u32,
        /// Query heads.
        pub heads: u32,
        /// Key and value heads; divides `heads`.
        pub kv_heads: u32,
        /// At most 256.
        pub head_size: u32,
        /// Multiplies the scores: 1/√head_size.
        pub scale: f32,
    }
}

impl CacheParams {
    /// Values in a row of `qkv`.
    fn qkv_width(&self) -> usize {
        (self.heads as usize + 2 * self.kv_heads as usize) * self.head_size as usize
    }

    /// Values in a row of `out`.
    fn width(&self) -> usize {
        self.heads as usize * self.head_size as usize
    }

    /// Query heads that share a key-value head.
    fn group(&self) -> usize {
        self.heads as usize / self.kv_heads as usize
    }

    /// Keys that new row `row` attends to when the first new row stands at `position`.
    fn keys_of(&self, position: u32, row: usize) -> usize {
        (position as usize + row + 1).min(self.capacity as usize)
    }

    fn assert_possible(&self) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "{} query heads share {} key-value heads unevenly",
            self.heads,
            self.kv_heads
        );
        assert!(
            self.capacity > 0 && self.head_size <= MAX_HEAD_SIZE,
            "a cache of {} tokens with heads of {} values",
            self.capacity,
            self.head_size
        );
    }
}

/// Words of a cache of `capacity` tokens.
pub fn cache_words(capacity: usize, kv_heads: usize, head_size: usize) -> usize {
    2 * kv_heads * capacity * head_size
}

contract! {
    /// Puts the keys and values of the new rows into the cache from `position[0]` on; rows beyond its capacity are left out.
    pub(crate) static APPEND = "attention.append", CacheParams,
    [qkv: Read f32, position: Read u32, cache: Write f32],
    spec: spec::append, host: append_host, variants: [APPEND_ELEMENTS]
}

variant! {
    /// An invocation a value.
    static APPEND_ELEMENTS = APPEND, "elements", ["attention_cache"], "append", CacheParams,
    grid: |params| linear_workgroups(
        params.rows as usize * 2 * params.kv_heads as usize * params.head_size as usize,
        WORKGROUP,
    ),
}

contract! {
    /// `out = softmax(scale · q·kᵀ) · v`, row i over the keys and values `0 ..= position[0] + i` of the cache.
    pub(crate) static CACHED = "attention.cached", CacheParams,
    [qkv: Read f32, cache: Read f32, position: Read u32, out: Write f32],
    spec: spec::cached, host: cached_host, variants: [CACHED_ROWS, CACHED_WORKGROUP]
}

variant! {
    /// An invocation a head of a row, for adapters emulated on a CPU.
    static CACHED_ROWS = CACHED, "rows", ["attention_cache"], "cached_rows", CacheParams,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    constants: |params| head_constants(params),
    grid: |params| linear_workgroups(params.rows as usize * params.heads as usize, ROWS_WORKGROUP),
}

variant! {
    /// A workgroup a head of a row.
    static CACHED_WORKGROUP = CACHED, "workgroup", ["attention_cache"], "cached", CacheParams,
    constants: |params| head_constants(params),
    grid: |params| [params.heads, params.rows, 1],
}

fn head_constants(params: &CacheParams) -> crate::compute::kernel::Constants {
    vec![
        ("HEAD_QUADS", params.head_size.div_ceil(4).into()),
        ("ALIGNED", params.head_size.is_multiple_of(4).into()),
    ]
}

/// Records that the keys and values of `qkv` (rows, (heads + 2·kv_heads)·head_size) go to the tokens from `position[0]` on of
/// `cache` ([`cache_words`]); `position` is one u32.
pub fn append(recording: &mut Recording, params: CacheParams, qkv: &Buffer, position: &Buffer, cache: &Buffer) {
    params.assert_possible();
    recording.dispatch(
        &APPEND,
        params,
        &[qkv, position, cache],
        Cost {
            flops: 0.0,
            bytes: 8.0 * params.rows as f64 * (params.qkv_width() - params.width()) as f64,
        },
    );
}

/// Records attention of new rows to the cache, which [`append`] has put them into: the queries of `qkv` (rows, (heads +
/// 2·kv_heads)·head_size) to `out` (rows, heads·head_size). Row i attends to the tokens `0 ..= position[0] + i`. The cost is that
/// of a full cache.
pub fn cached(
    recording: &mut Recording,
    params: CacheParams,
    qkv: &Buffer,
    cache: &Buffer,
    position: &Buffer,
    out: &Buffer,
) {
    params.assert_possible();
    let pairs = params.rows as f64 * params.capacity as f64;
    recording.dispatch(
        &CACHED,
        params,
        &[qkv, cache, position, out],
        Cost {
            flops: 4.0 * pairs * params.width() as f64,
            bytes: 4.0
                * (cache_words(
                    params.capacity as usize,
                    params.kv_heads as usize,
                    params.head_size as usize,
                ) as f64
                    + 2.0 * params.rows as f64 * params.width() as f64),
        },
    );
}

/// The mathematics in plain loops.
pub mod spec {
    use super::CacheParams;
    use crate::compute::real::Real;
    use crate::kernels::attention::spec::dot;

    /// Puts the keys and values of new rows behind those that are kept.
    pub fn append<T: Real>(
        params: &CacheParams,
        qkv: &[T],        // (rows, (heads + 2 * kv_heads) * head_size)
        position: &[u32], // (1)
        cache: &mut [T],  // (2 * kv_heads, capacity, head_size): keys, then values
    ) {
        let (heads, kv_heads) = (params.heads as usize, params.kv_heads as usize);
        let (capacity, size) = (params.capacity as usize, params.head_size as usize);
        for row in 0..params.rows as usize {
            let t = position[0] as usize + row;
            if t >= capacity {
                break;
            }
            for slot in 0..2 * kv_heads {
                let source = (row * (heads + 2 * kv_heads) + heads + slot) * size;
                for d in 0..size {
                    cache[(slot * capacity + t) * size + d] = qkv[source + d];
                }
            }
        }
    }

    /// Attention of new queries to everything that is kept, and causally among themselves.
    pub fn cached<T: Real>(
        params: &CacheParams,
        qkv: &[T],        // (rows, (heads + 2 * kv_heads) * head_size)
        cache: &[T],      // (2 * kv_heads, capacity, head_size): keys, then values
        position: &[u32], // (1)
        out: &mut [T],    // (rows, heads * head_size)
    ) {
        let (heads, kv_heads) = (params.heads as usize, params.kv_heads as usize);
        let (capacity, size) = (params.capacity as usize, params.head_size as usize);
        for row in 0..params.rows as usize {
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let keys = &cache[kv_head * capacity * size..][..capacity * size];
                let values = &cache[(kv_heads + kv_head) * capacity * size..][..capacity * size];
                let q = &qkv[(row * (heads + 2 * kv_heads) + head) * size..][..size];
                let scores: Vec<T> = (0..params.keys_of(position[0], row))
                    .map(|key| T::from(params.scale) * dot(q, &keys[key * size..][..size]))
                    .collect();
                let max = scores.iter().fold(scores[0], |max, &score| max.max(score));
                let mut sum = T::ZERO;
                for &score in &scores {
                    sum += (score - max).exp();
                }
                let out = &mut out[(row * heads + head) * size..][..size];
                out.fill(T::ZERO);
                for (key, &score) in scores.iter().enumerate() {
                    for d in 0..size {
                        out[d] += (score - max).exp() / sum * values[key * size + d];
                    }
                }
            }
        }
    }
}

/// [`spec::append`] by whole heads.
fn append_host(
    params: &CacheParams,
    qkv: &[f32],       // (rows, (heads + 2 * kv_heads) * head_size)
    position: &[u32],  // (1)
    cache: &mut [f32], // (2 * kv_heads, capacity, head_size)
) {
    let (capacity, size) = (params.capacity as usize, params.head_size as usize);
    let rows = (params.rows as usize).min(capacity.saturating_sub(position[0] as usize));
    for (row, qkv) in qkv.chunks(params.qkv_width()).take(rows).enumerate() {
        let t = position[0] as usize + row;
        for (slot, values) in qkv[params.width()..].chunks(size).enumerate() {
            cache[(slot * capacity + t) * size..][..size].copy_from_slice(values);
        }
    }
}

/// Multiply-adds below which one core is faster than waking the others.
const SMALL: usize = 1 << 18;

/// [`spec::cached`]: one row by a walk over the keys of each head, more as products of blocks of rows. Packing the keys for a
/// product costs a walk and a half and serves all rows and heads that share them.
fn cached_host(
    params: &CacheParams,
    qkv: &[f32],      // (rows, (heads + 2 * kv_heads) * head_size)
    cache: &[f32],    // (2 * kv_heads, capacity, head_size)
    position: &[u32], // (1)
    out: &mut [f32],  // (rows, heads * head_size)
) {
    let out = &mut out[..params.rows as usize * params.width()];
    if params.rows == 1 {
        cached_row(params, qkv, cache, position[0], out);
    } else {
        cached_rows(params, qkv, cache, position[0], out);
    }
}

/// The keys and the values (capacity, head_size) of a key-value head.
fn keys_and_values<'a>(params: &CacheParams, cache: &'a [f32], kv_head: usize) -> (&'a [f32], &'a [f32]) {
    let words = params.capacity as usize * params.head_size as usize;
    let part = |slot: usize| &cache[slot * words..][..words];
    (part(kv_head), part(params.kv_heads as usize + kv_head))
}

/// A task is a head.
fn cached_row(params: &CacheParams, qkv: &[f32], cache: &[f32], position: u32, out: &mut [f32]) {
    let size = params.head_size as usize;
    let words = params.keys_of(position, 0) * size;
    let simd = Simd::detect();
    let attend = |head: usize, out: &mut [f32]| {
        let (keys, values) = keys_and_values(params, cache, head / params.group());
        simd.run(Attend {
            scale: params.scale,
            q: &qkv[head * size..][..size],
            keys: &keys[..words],
            values: &values[..words],
            out,
        });
    };
    if 2 * words * params.heads as usize >= SMALL {
        for_each_row(out, size, attend);
    } else {
        for (head, out) in out.chunks_mut(size).enumerate() {
            attend(head, out);
        }
    }
}

/// `out = softmax(scale · q·keysᵀ) · values` for one query.
struct Attend<'a> {
    scale: f32,
    q: &'a [f32],       // (head_size)
    keys: &'a [f32],    // (tokens, head_size)
    values: &'a [f32],  // (tokens, head_size)
    out: &'a mut [f32], // (head_size)
}

impl Vectorised for Attend<'_> {
    #[inline(always)]
    fn run<I: Instructions, const ROWS: usize, const LANES: usize>(self) {
        let size = self.q.len();
        let mut scores = vec![0.0; self.keys.len() / size];
        for (score, key) in scores.iter_mut().zip(self.keys.chunks_exact(size)) {
            *score = self.scale * dot::<I, LANES>(self.q, key);
        }
        Softmax {
            scores: &mut scores,
            lse: &mut 0.0,
        }
        .run::<I, ROWS, LANES>();
        let (blocks, rest) = self.out.as_chunks_mut::<LANES>();
        let tail = blocks.len() * LANES;
        for (i, block) in blocks.iter_mut().enumerate() {
            *block = weighted_sum::<I, LANES>(&scores, self.values, size, i * LANES);
        }
        rest.fill(0.0);
        for (weight, values) in scores.iter().zip(self.values.chunks_exact(size)) {
            for (out, &value) in rest.iter_mut().zip(&values[tail..]) {
                *out = I::multiply_add(*weight, value, *out);
            }
        }
    }
}

/// `Σ a · b`.
#[inline(always)]
fn dot<I: Instructions, const LANES: usize>(a: &[f32], b: &[f32]) -> f32 {
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum = I::multiply_add(a, b, *sum);
        }
    }
    // Apart from the lanes, which would else be kept in memory.
    let mut rest = 0.0;
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        rest = I::multiply_add(a, b, rest);
    }
    I::sum(sums) + rest
}

/// `Σ weight · value` over all tokens, of the values from element `first` of a head on.
#[inline(always)]
fn weighted_sum<I: Instructions, const LANES: usize>(
    weights: &[f32],
    values: &[f32], // (tokens, size)
    size: usize,
    first: usize,
) -> [f32; LANES] {
    /// Sums that do not wait for each other.
    const CHAINS: usize = 4;
    let mut sums = [[0.0f32; LANES]; CHAINS];
    let (weights, weights_rest) = weights.as_chunks::<CHAINS>();
    let (values, values_rest) = values.split_at(weights.len() * CHAINS * size);
    for (weights, values) in weights.iter().zip(values.chunks_exact(CHAINS * size)) {
        for ((sums, &weight), values) in sums.iter_mut().zip(weights).zip(values.chunks_exact(size)) {
            for (sum, &value) in sums.iter_mut().zip(&values[first..first + LANES]) {
                *sum = I::multiply_add(weight, value, *sum);
            }
        }
    }
    for ((sums, &weight), values) in sums.iter_mut().zip(weights_rest).zip(values_rest.chunks_exact(size)) {
        for (sum, &value) in sums.iter_mut().zip(&values[first..first + LANES]) {
            *sum = I::multiply_add(weight, value, *sum);
        }
    }
    let mut total = [0.0; LANES];
    for (i, total) in total.iter_mut().enumerate() {
        *total = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    }
    total
}

/// A task is a block of rows and a key-value head: the queries that share it make one product with its keys.
fn cached_rows(params: &CacheParams, qkv: &[f32], cache: &[f32], position: u32, out: &mut [f32]) {
    let (rows, size, group) = (params.rows as usize, params.head_size as usize, params.group());
    let simd = Simd::detect();
    let block = (BLOCK / group).clamp(8, rows.max(8));
    let blocks = rows.div_ceil(block);
    // (kv_heads, blocks, group, block, head_size)
    let mut results = vec![0.0; params.kv_heads as usize * blocks * group * block * size];
    for_each_row(&mut results, group * block * size, |i, sums| {
        let (kv_head, first) = (i / blocks, i % blocks * block);
        let count = block.min(rows - first);
        let mut q = Vec::with_capacity(group * count * size);
        for head in kv_head * group..(kv_head + 1) * group {
            for row in first..first + count {
                q.extend_from_slice(&qkv[row * params.qkv_width() + head * size..][..size]);
            }
        }
        let (keys, values) = keys_and_values(params, cache, kv_head);
        let most = params.keys_of(position, first + count - 1);
        let mut scores = vec![0.0; group * count * most];
        let term = Term {
            inner: size,
            left: Matrix::rows(&q, 0, size),
            right: Matrix::rows(keys, 0, size),
            scale: params.scale,
        };
        add_products(group * count, most, &[term], &mut scores, |_, _| {}, |_, _| {});
        for (i, scores) in scores.chunks_mut(most).enumerate() {
            softmax(simd, scores, params.keys_of(position, first + i % count));
        }
        let term = Term {
            inner: most,
            left: Matrix::rows(&scores, 0, most),
            right: Matrix::columns(values, 0, size),
            scale: 1.0,
        };
        let sums = &mut sums[..group * count * size];
        add_products(group * count, size, &[term], sums, |_, _| {}, |_, _| {});
    });
    for (i, sums) in results.chunks(group * block * size).enumerate() {
        let (kv_head, first) = (i / blocks, i % blocks * block);
        let count = block.min(rows - first);
        for (i, values) in sums.chunks(size).take(group * count).enumerate() {
            let (head, row) = (kv_head * group + i / count, first + i % count);
            out[row * params.width() + head * size..][..size].copy_from_slice(values);
        }
    }
}

/// Queries of a task of [`cached_rows`].
const BLOCK: usize = 64;

fn example_params(s: Sizes, rows: usize) -> CacheParams {
    CacheParams {
        rows: rows as u32,
        capacity: s.seq as u32,
        heads: s.heads as u32,
        kv_heads: s.kv_heads as u32,
        head_size: s.head_size as u32,
        scale: 1.0 / (s.head_size as f32).sqrt(),
    }
}

pub(super) fn shape(s: Sizes) -> String {
    format!("{}x{}({})x{}", s.seq, s.heads, s.kv_heads, s.head_size)
}

/// All rows into an empty cache.
pub(super) fn append_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    let params = example_params(s, s.seq);
    let words = cache_words(s.seq, s.kv_heads, s.head_size);
    let qkv = b.random("qkv", s.seq * params.qkv_width())?;
    let position = b.zeros("position", 1)?;
    let cache = b.zeros("cache", words)?;
    Ok(case(&[(&cache.clone(), words)], false, move |recording| {
        append(recording, params, &qkv, &position, &cache);
    }))
}

/// The last token of a full cache.
pub(super) fn decode_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    cached_example(b, s, 1)
}

/// All tokens at once.
pub(super) fn prefill_example(b: &mut Builder<'_>, s: Sizes) -> Result<Case, Error> {
    cached_example(b, s, s.seq)
}

fn cached_example(b: &mut Builder<'_>, s: Sizes, rows: usize) -> Result<Case, Error> {
    let params = example_params(s, rows);
    let qkv = b.random("qkv", rows * params.qkv_width())?;
    let cache = b.random("cache", cache_words(s.seq, s.kv_heads, s.head_size))?;
    let position = b.engine.buffer_from("position", &[(s.seq - rows) as u32])?;
    let out = b.zeros("out", rows * params.width())?;
    Ok(case(
        &[(&out.clone(), rows * params.width())],
        false,
        move |recording| {
            cached(recording, params, &qkv, &cache, &position, &out);
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_attends_alike_with_every_instruction_set() {
        for (tokens, size) in [(1, 1), (3, 5), (70, 64), (33, 80), (6, 129)] {
            let value = |i: usize| (i * 37 % 101) as f32 / 50.0 - 1.0;
            let q: Vec<f32> = (0..size).map(value).collect();
            let cache: Vec<f32> = (0..2 * tokens * size).map(|i| value(i + 7)).collect();
            let params = CacheParams {
                rows: 1,
                capacity: tokens as u32,
                heads: 1,
                kv_heads: 1,
                head_size: size as u32,
                scale: 0.5,
            };
            let mut expected = vec![f32::NAN; size];
            spec::cached(&params, &q, &cache, &[tokens as u32 - 1], &mut expected);
            for simd in Simd::available() {
                let (keys, values) = keys_and_values(&params, &cache, 0);
                let mut out = vec![f32::NAN; size];
                simd.run(Attend {
                    scale: params.scale,
                    q: &q,
                    keys,
                    values,
                    out: &mut out,
                });
                for (out, expected) in out.iter().zip(&expected) {
                    assert!(
                        (out - expected).abs() < 1e-5,
                        "{simd:?}, {tokens}x{size}: {out}, not {expected}"
                    );
                }
            }
        }
    }
}
