//! Attention: every tiling equals the specification, whose gradients equal finite differences in f64; heads that share keys are
//! heads with copies of them; and tokens that come one by one through a cache get what they would have got together.

use crate::engines::{agree, assert_close, exact, finite_differences, floats, numbers, poisoned};
use sflllm::compute::Engine;
use sflllm::kernels::attention::{self, CacheParams, Params, cache, spec};

fn params(batch: usize, seq: usize, heads: usize, kv_heads: usize, head_size: usize) -> Params {
    Params {
        batch: batch as u32,
        seq: seq as u32,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_size: head_size as u32,
        scale: 1.0 / (head_size as f32).sqrt(),
    }
}

/// (batch, seq, heads, kv_heads, head_size): ones, primes, one below, at and above a tile of 32 and a slice of 32, and those of
/// real models; every way to share keys, from not at all to one for all.
const SHAPES: &[(usize, usize, usize, usize, usize)] = &[
    (1, 1, 1, 1, 1),
    (2, 45, 6, 2, 14),
    (1, 31, 2, 2, 32),
    (1, 32, 3, 1, 14),
    (2, 33, 1, 1, 33),
    (1, 65, 9, 3, 64),
    (1, 98, 2, 1, 64),
    (1, 34, 4, 2, 66),
    (1, 35, 2, 1, 256),
];

/// Sizes of a shape: elements of qkv, of out, of lse.
fn sizes(params: &Params) -> (usize, usize, usize) {
    let rows = params.batch as usize * params.seq as usize;
    let (heads, kv_heads, size) = (
        params.heads as usize,
        params.kv_heads as usize,
        params.head_size as usize,
    );
    (rows * (heads + 2 * kv_heads) * size, rows * heads * size, rows * heads)
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| x.into()).collect()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

fn rows_of(words: &[u32]) -> &[f32] {
    bytemuck::cast_slice(words)
}

/// The specification in f64: out and lse.
fn forward(params: &Params, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (_, width, rows) = sizes(params);
    let (mut out, mut lse) = (vec![0.0; width], vec![0.0; rows]);
    spec::forward(params, qkv, &mut out, &mut lse);
    (out, lse)
}

#[test]
fn forward_agrees_in_every_tiling() {
    for &(batch, seq, heads, kv_heads, size) in SHAPES {
        let params = params(batch, seq, heads, kv_heads, size);
        let (qkv, out, lse) = sizes(&params);
        let qkv: Vec<f32> = numbers(1, qkv).iter().map(|x| 3.0 * x).collect();
        let claim = format!("forward {params:?}");
        let found = agree(
            &claim,
            &[floats(&qkv), poisoned(out), poisoned(lse)],
            |recording, buffers| attention::forward(recording, params, &buffers[0], &buffers[1], &buffers[2]),
        );
        let (out, lse) = forward(&params, &wide(&qkv));
        assert_close(&claim, rows_of(&found[1]), &narrow(&out), 1e-4);
        assert_close(&claim, rows_of(&found[2]), &narrow(&lse), 1e-4);
    }
}

#[test]
fn equal_scores_average_the_values_of_all_tokens_so_far() {
    let params = params(1, 9, 2, 1, 3);
    let mut qkv = wide(&numbers(2, 9 * 4 * 3));
    for row in qkv.chunks_mut(4 * 3) {
        row[..6].fill(0.0);
    }
    let (out, lse) = forward(&params, &qkv);
    for t in 0..9 {
        for head in 0..2 {
            assert!((lse[head * 9 + t] - ((t + 1) as f64).ln()).abs() < 1e-12);
            for d in 0..3 {
                let mean = (0..=t).map(|key| qkv[key * 12 + 9 + d]).sum::<f64>() / (t + 1) as f64;
                assert!((out[(t * 2 + head) * 3 + d] - mean).abs() < 1e-12);
            }
        }
    }
}

#[test]
fn heads_that_share_keys_are_heads_with_copies_of_them() {
    let shared = params(2, 7, 6, 2, 4);
    let copied = Params { kv_heads: 6, ..shared };
    let qkv = wide(&numbers(3, sizes(&shared).0));
    let copy: Vec<f64> = qkv
        .chunks(10 * 4)
        .flat_map(|row| {
            let head = |slot: usize| row[slot * 4..][..4].to_vec();
            let keys = (0..6).flat_map(move |h| head(6 + h / 3));
            let head = |slot: usize| row[slot * 4..][..4].to_vec();
            let values = (0..6).flat_map(move |h| head(8 + h / 3));
            row[..24]
                .iter()
                .copied()
                .chain(keys)
                .chain(values)
                .collect::<Vec<f64>>()
        })
        .collect();
    assert_eq!(forward(&shared, &qkv), forward(&copied, &copy));
}

#[test]
fn a_token_attends_to_no_later_one() {
    let params = params(1, 40, 2, 1, 6);
    let (width, qkv_width) = (12, 24);
    let mut qkv = numbers(2, 40 * qkv_width);
    let run = |qkv: &[f32]| {
        let found = agree(
            "causality",
            &[floats(qkv), poisoned(40 * width), poisoned(2 * 40)],
            |recording, buffers| attention::forward(recording, params, &buffers[0], &buffers[1], &buffers[2]),
        );
        rows_of(&found[1]).to_vec()
    };
    let before = run(&qkv);
    qkv[33 * qkv_width..].iter_mut().for_each(|x| *x = 7.0 - 2.0 * *x);
    let after = run(&qkv);
    assert_eq!(before[..33 * width], after[..33 * width]);
    assert_ne!(before[33 * width..], after[33 * width..]);
}

#[test]
fn large_scores_neither_overflow_nor_vanish() {
    let params = params(1, 40, 1, 1, 16);
    let qkv: Vec<f32> = numbers(3, 40 * 48).iter().map(|x| 60.0 * x).collect();
    let found = agree(
        "scores up to thousands",
        &[floats(&qkv), poisoned(40 * 16), poisoned(40)],
        |recording, buffers| attention::forward(recording, params, &buffers[0], &buffers[1], &buffers[2]),
    );
    let (out, lse) = forward(&params, &wide(&qkv));
    assert_close("out", rows_of(&found[1]), &narrow(&out), 2e-3);
    assert_close("lse", rows_of(&found[2]), &narrow(&lse), 1e-4);
}

#[test]
fn backward_agrees_in_every_tiling_and_writes_all_of_d_qkv() {
    for &(batch, seq, heads, kv_heads, size) in SHAPES {
        let params = params(batch, seq, heads, kv_heads, size);
        let (qkv_words, out_words, rows) = sizes(&params);
        let qkv: Vec<f32> = numbers(4, qkv_words).iter().map(|x| 2.0 * x).collect();
        let (out, lse) = forward(&params, &wide(&qkv));
        agree(
            &format!("backward {params:?}"),
            &[
                floats(&qkv),
                floats(&narrow(&out)),
                floats(&narrow(&lse)),
                floats(&numbers(5, out_words)),
                poisoned(rows),
                poisoned(qkv_words),
            ],
            |recording, buffers| {
                let [qkv, out, lse, d_out, dot, d_qkv] = buffers else {
                    unreachable!("six slots")
                };
                attention::backward(recording, params, (qkv, out, lse), d_out, dot, d_qkv)
            },
        );
    }
}

#[test]
fn query_and_key_value_gradients_leave_each_other_alone() {
    let params = params(1, 5, 2, 1, 3);
    let (width, qkv_width) = (6, 12);
    let qkv = numbers(6, 5 * qkv_width);
    let sentinel = vec![9.0f32; 5 * qkv_width];
    for query_part in [true, false] {
        let found = agree(
            "one part of d_qkv",
            &[
                floats(&qkv),
                floats(&numbers(7, 5 * width)),
                floats(&[3.0; 10]),
                floats(&[0.5; 10]),
                floats(&sentinel),
            ],
            |recording, buffers| {
                let [qkv, d_out, lse, dot, d_qkv] = buffers else {
                    unreachable!("five slots")
                };
                if query_part {
                    attention::backward_q(recording, params, qkv, d_out, lse, dot, d_qkv);
                } else {
                    attention::backward_kv(recording, params, qkv, d_out, lse, dot, d_qkv);
                }
            },
        );
        for (i, value) in rows_of(&found[4]).iter().enumerate() {
            let is_query = i % qkv_width < width;
            assert_eq!(*value != 9.0, is_query == query_part, "element {i}");
        }
    }
}

#[test]
fn backward_equals_finite_differences() {
    for (batch, seq, heads, kv_heads, size) in [(2, 5, 2, 2, 3), (1, 9, 1, 1, 5), (1, 3, 6, 2, 14), (1, 4, 3, 1, 2)] {
        let params = params(batch, seq, heads, kv_heads, size);
        let (qkv_words, out_words, rows) = sizes(&params);
        let qkv = wide(&numbers(8, qkv_words));
        let d_out = wide(&numbers(9, out_words));
        let (out, lse) = forward(&params, &qkv);
        let mut dot = vec![0.0; rows];
        let mut d_qkv = vec![f64::NAN; qkv_words];
        spec::backward_dot(&params, &out, &d_out, &mut dot);
        spec::backward_q(&params, &qkv, &d_out, &lse, &dot, &mut d_qkv);
        spec::backward_kv(&params, &qkv, &d_out, &lse, &dot, &mut d_qkv);
        let expected = finite_differences(&qkv, |qkv| {
            let (out, _) = forward(&params, qkv);
            out.iter().zip(&d_out).map(|(out, d_out)| out * d_out).sum()
        });
        assert_close(&format!("{params:?}"), &narrow(&d_qkv), &expected, 1e-6);
    }
}

#[test]
fn attention_reads_no_further_than_its_shape() {
    // Workspaces are allocated at the largest shape: what lies behind must neither be read nor written.
    let params = params(1, 3, 1, 1, 4);
    let mut qkv = numbers(10, 3 * 12);
    qkv.resize(80, f32::INFINITY);
    let bits = |values: &[f32]| bytemuck::cast_slice::<f32, u32>(values).to_vec();
    let found = agree(
        "a buffer longer than the shape",
        &[exact(&bits(&qkv)), floats(&[8.0; 40]), floats(&[8.0; 20])],
        |recording, buffers| attention::forward(recording, params, &buffers[0], &buffers[1], &buffers[2]),
    );
    assert!(rows_of(&found[1])[12..].iter().all(|&x| x == 8.0));
    assert!(rows_of(&found[2])[3..].iter().all(|&x| x == 8.0));
}

fn cache_params(rows: usize, capacity: usize, (heads, kv_heads, head_size): (usize, usize, usize)) -> CacheParams {
    CacheParams {
        rows: rows as u32,
        capacity: capacity as u32,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_size: head_size as u32,
        scale: 1.0 / (head_size as f32).sqrt(),
    }
}

#[test]
fn cached_attention_agrees_in_every_variant_and_reads_no_key_that_is_not_there_yet() {
    for (rows, position, capacity, (heads, kv_heads, size)) in [
        (1, 0, 1, (1, 1, 1)),
        (1, 0, 9, (2, 1, 5)),
        (1, 62, 80, (3, 1, 64)),
        (1, 63, 80, (4, 4, 33)),
        (1, 64, 80, (9, 3, 64)),
        (3, 100, 200, (2, 2, 14)),
        (2, 127, 129, (2, 1, 130)),
        (1, 70, 71, (2, 1, 256)),
        (9, 0, 9, (6, 2, 7)),
        (37, 0, 50, (9, 3, 64)),
        (65, 13, 78, (2, 1, 32)),
        (70, 3, 73, (14, 2, 8)),
    ] {
        let params = cache_params(rows, capacity, (heads, kv_heads, size));
        let qkv: Vec<f32> = numbers(11, rows * (heads + 2 * kv_heads) * size)
            .iter()
            .map(|x| 3.0 * x)
            .collect();
        let mut stored = numbers(12, attention::cache_words(capacity, kv_heads, size));
        for slot in stored.chunks_mut(capacity * size) {
            slot[(position + rows) * size..].fill(f32::NAN);
        }
        let words: &[u32] = bytemuck::cast_slice(&stored);
        let claim = format!("{params:?} at {position}");
        let found = agree(
            &claim,
            &[
                floats(&qkv),
                exact(words),
                exact(&[position as u32]),
                poisoned(rows * heads * size),
            ],
            |recording, buffers| {
                attention::cached(recording, params, &buffers[0], &buffers[1], &buffers[2], &buffers[3])
            },
        );
        let mut out = vec![0.0; rows * heads * size];
        cache::spec::cached(&params, &wide(&qkv), &wide(&stored), &[position as u32], &mut out);
        assert_close(&claim, rows_of(&found[3]), &narrow(&out), 1e-4);
    }
}

#[test]
fn keys_and_values_are_put_where_they_stand_and_nowhere_else() {
    for (rows, position, capacity) in [(1, 0, 1), (3, 5, 20), (4, 18, 20), (2, 20, 20), (1, u32::MAX, 20)] {
        let (heads, kv_heads, size) = (6, 2, 5);
        let params = cache_params(rows, capacity, (heads, kv_heads, size));
        let qkv = numbers(13, rows * (heads + 2 * kv_heads) * size);
        let found = agree(
            &format!("append {rows} at {position} of {capacity}"),
            &[
                floats(&qkv),
                exact(&[position]),
                floats(&vec![9.0; attention::cache_words(capacity, kv_heads, size)]),
            ],
            |recording, buffers| attention::append(recording, params, &buffers[0], &buffers[1], &buffers[2]),
        );
        for (i, &value) in rows_of(&found[2]).iter().enumerate() {
            let (slot, t, d) = (i / size / capacity, i / size % capacity, i % size);
            let row = t.checked_sub(position as usize).filter(|&row| row < rows);
            let expected = row.map_or(9.0, |row| qkv[(row * (heads + 2 * kv_heads) + heads + slot) * size + d]);
            assert_eq!(value, expected, "slot {slot}, token {t}, value {d}");
        }
    }
}

#[test]
fn tokens_through_a_cache_in_any_pieces_get_what_they_get_together() {
    let (seq, heads, kv_heads, size) = (90, 6, 2, 16);
    let (qkv_width, width) = ((heads + 2 * kv_heads) * size, heads * size);
    let together = params(1, seq, heads, kv_heads, size);
    let qkv = numbers(14, seq * qkv_width);
    let (expected, _) = forward(&together, &wide(&qkv));
    let engine = Engine::cpu();
    for pieces in [vec![1; seq], vec![seq], vec![64, 1, 1, 17, 7], vec![3; 30]] {
        let capacity = seq + 3;
        let store = engine
            .buffer("cache", attention::cache_words(capacity, kv_heads, size))
            .expect("memory");
        let position = engine.buffer("position", 1).expect("memory");
        let mut found = Vec::new();
        for rows in pieces {
            let first = found.len() / width;
            let new = engine
                .buffer_from("qkv", &qkv[first * qkv_width..(first + rows) * qkv_width])
                .expect("memory");
            let out = engine.buffer("out", rows * width).expect("memory");
            engine.upload(&position, 0, &[first as u32]);
            let params = cache_params(rows, capacity, (heads, kv_heads, size));
            let mut recording = engine.recording();
            attention::append(&mut recording, params, &new, &position, &store);
            attention::cached(&mut recording, params, &new, &store, &position, &out);
            engine.run(&engine.prepare(recording)).expect("the CPU engine runs");
            found.extend(pollster::block_on(engine.download::<f32>(&out, 0, rows * width)).expect("memory"));
        }
        assert_close("in pieces", &found, &narrow(&expected), 1e-4);
    }
}
