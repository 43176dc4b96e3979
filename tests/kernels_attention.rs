//! Attention: every tiling equals the CPU reference, the reference equals a naive f64 forward and its finite differences.

mod engines;

use engines::{agree, assert_close, exact, finite_differences, floats, numbers, poisoned};
use sflllm::kernels::attention::{self, Params};

fn params(batch: usize, seq: usize, heads: usize, head_size: usize) -> Params {
    Params {
        batch: batch as u32,
        seq: seq as u32,
        heads: heads as u32,
        head_size: head_size as u32,
        scale: 1.0 / (head_size as f32).sqrt(),
    }
}

/// Sizes of ones, primes, one below, at and above a tile of 32 and a slice of 32, and those of real models.
const SHAPES: &[(usize, usize, usize, usize)] = &[
    (1, 1, 1, 1),
    (2, 45, 5, 14),
    (1, 31, 2, 32),
    (1, 32, 1, 14),
    (2, 33, 1, 33),
    (1, 65, 3, 64),
    (1, 98, 1, 64),
    (1, 35, 1, 130),
];

/// Naive causal attention in f64: out (batch·seq, width) and lse (batch, heads, seq).
fn naive(params: &Params, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (batch, seq) = (params.batch as usize, params.seq as usize);
    let (heads, size) = (params.heads as usize, params.head_size as usize);
    let width = heads * size;
    let at = |b: usize, t: usize, part: usize, head: usize, d: usize| {
        qkv[((b * seq + t) * 3 + part) * width + head * size + d]
    };
    let mut out = vec![0.0; batch * seq * width];
    let mut lse = vec![0.0; batch * heads * seq];
    for b in 0..batch {
        for head in 0..heads {
            for query in 0..seq {
                let scores: Vec<f64> = (0..=query)
                    .map(|key| {
                        let dot: f64 = (0..size)
                            .map(|d| at(b, query, 0, head, d) * at(b, key, 1, head, d))
                            .sum();
                        dot * f64::from(params.scale)
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                lse[(b * heads + head) * seq + query] = max + sum.ln();
                for d in 0..size {
                    out[(b * seq + query) * width + head * size + d] = scores
                        .iter()
                        .enumerate()
                        .map(|(key, score)| (score - max).exp() / sum * at(b, key, 2, head, d))
                        .sum();
                }
            }
        }
    }
    (out, lse)
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

#[test]
fn forward_equals_naive_attention_in_every_tiling() {
    for &(batch, seq, heads, size) in SHAPES {
        let params = params(batch, seq, heads, size);
        let width = heads * size;
        let qkv: Vec<f32> = numbers(1, batch * seq * 3 * width).iter().map(|x| 3.0 * x).collect();
        let claim = format!("forward {params:?}");
        let found = agree(
            &claim,
            &[
                floats(&qkv),
                poisoned(batch * seq * width),
                poisoned(batch * heads * seq),
            ],
            |recording, buffers| attention::forward(recording, params, &buffers[0], &buffers[1], &buffers[2]),
        );
        let (out, lse) = naive(&params, &wide(&qkv));
        assert_close(&claim, rows_of(&found[1]), &narrow(&out), 1e-4);
        assert_close(&claim, rows_of(&found[2]), &narrow(&lse), 1e-4);
    }
}

#[test]
fn a_token_attends_to_no_later_one() {
    let params = params(1, 40, 2, 6);
    let width = 12;
    let mut qkv = numbers(2, 40 * 3 * width);
    let run = |qkv: &[f32]| {
        let found = agree(
            "causality",
            &[floats(qkv), poisoned(40 * width), poisoned(2 * 40)],
            |recording, buffers| attention::forward(recording, params, &buffers[0], &buffers[1], &buffers[2]),
        );
        rows_of(&found[1]).to_vec()
    };
    let before = run(&qkv);
    qkv[33 * 3 * width..].iter_mut().for_each(|x| *x = 7.0 - 2.0 * *x);
    let after = run(&qkv);
    assert_eq!(before[..33 * width], after[..33 * width]);
    assert_ne!(before[33 * width..], after[33 * width..]);
}

#[test]
fn large_scores_neither_overflow_nor_vanish() {
    let params = params(1, 40, 1, 16);
    let qkv: Vec<f32> = numbers(3, 40 * 48).iter().map(|x| 60.0 * x).collect();
    let found = agree(
        "scores up to thousands",
        &[floats(&qkv), poisoned(40 * 16), poisoned(40)],
        |recording, buffers| attention::forward(recording, params, &buffers[0], &buffers[1], &buffers[2]),
    );
    let (out, lse) = naive(&params, &wide(&qkv));
    assert_close("out", rows_of(&found[1]), &narrow(&out), 2e-3);
    assert_close("lse", rows_of(&found[2]), &narrow(&lse), 1e-4);
}

#[test]
fn backward_agrees_in_every_tiling_and_writes_all_of_d_qkv() {
    for &(batch, seq, heads, size) in SHAPES {
        let params = params(batch, seq, heads, size);
        let (rows, width) = (batch * seq, heads * size);
        let qkv: Vec<f32> = numbers(4, rows * 3 * width).iter().map(|x| 2.0 * x).collect();
        let mut out = vec![0.0; rows * width];
        let mut lse = vec![0.0; batch * heads * seq];
        attention::forward_cpu(&params, &qkv, &mut out, &mut lse);
        agree(
            &format!("backward {params:?}"),
            &[
                floats(&qkv),
                floats(&out),
                floats(&lse),
                floats(&numbers(5, rows * width)),
                poisoned(batch * heads * seq),
                poisoned(rows * 3 * width),
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
    let params = params(1, 5, 2, 3);
    let width = 6;
    let qkv = numbers(6, 5 * 3 * width);
    let sentinel = vec![9.0f32; 5 * 3 * width];
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
            let is_query = i % (3 * width) < width;
            assert_eq!(*value != 9.0, is_query == query_part, "element {i}");
        }
    }
}

#[test]
fn backward_equals_finite_differences() {
    for (batch, seq, heads, size) in [(2, 5, 2, 3), (1, 9, 1, 5), (1, 3, 5, 14)] {
        let params = params(batch, seq, heads, size);
        let (rows, width) = (batch * seq, heads * size);
        let qkv = numbers(8, rows * 3 * width);
        let d_out = numbers(9, rows * width);
        let mut out = vec![0.0; rows * width];
        let mut lse = vec![0.0; batch * heads * seq];
        let mut dot = vec![0.0; batch * heads * seq];
        let mut d_qkv = vec![f32::NAN; rows * 3 * width];
        attention::forward_cpu(&params, &qkv, &mut out, &mut lse);
        attention::backward_dot_cpu(&params, &out, &d_out, &mut dot);
        attention::backward_q_cpu(&params, &qkv, &d_out, &lse, &dot, &mut d_qkv);
        attention::backward_kv_cpu(&params, &qkv, &d_out, &lse, &dot, &mut d_qkv);
        let expected = finite_differences(&wide(&qkv), |qkv| {
            let (out, _) = naive(&params, qkv);
            out.iter().zip(&d_out).map(|(out, &d_out)| out * f64::from(d_out)).sum()
        });
        assert_close(&format!("{params:?}"), &d_qkv, &expected, 1e-4);
    }
}

#[test]
fn attention_reads_no_further_than_its_shape() {
    // Workspaces are allocated at the largest shape: what lies behind must neither be read nor written.
    let params = params(1, 3, 1, 4);
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
