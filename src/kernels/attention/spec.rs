//! The mathematics of attention in plain loops: every score of a query at once, in the order of the keys.

use super::Params;
use crate::compute::real::Real;

/// Index of the first of the values of head `slot` (queries, then keys, then values) of token `t` in `qkv` and `d_qkv`.
fn qkv_start(params: &Params, batch: usize, slot: usize, t: usize) -> usize {
    let slots = params.heads as usize + 2 * params.kv_heads as usize;
    ((batch * params.seq as usize + t) * slots + slot) * params.head_size as usize
}

/// Index of the first of the values of `head` of token `t` in `out` and `d_out`.
fn out_start(params: &Params, batch: usize, head: usize, t: usize) -> usize {
    ((batch * params.seq as usize + t) * params.heads as usize + head) * params.head_size as usize
}

/// Index of token `t` in `lse` and `dot`.
fn row_index(params: &Params, batch: usize, head: usize, t: usize) -> usize {
    (batch * params.heads as usize + head) * params.seq as usize + t
}

/// The slots of a head's keys and values.
fn key_value_slots(params: &Params, head: usize) -> (usize, usize) {
    let (heads, kv_heads) = (params.heads as usize, params.kv_heads as usize);
    let kv_head = head / (heads / kv_heads);
    (heads + kv_head, heads + kv_heads + kv_head)
}

/// `Σ a · b` over a head.
pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut sum = T::ZERO;
    for i in 0..a.len() {
        sum += a[i] * b[i];
    }
    sum
}

/// Causal attention, a query head with its group's keys and values; keeps the logarithm of each row's denominator.
pub fn forward<T: Real>(
    params: &Params,
    qkv: &[T],     // (batch * seq, (heads + 2 * kv_heads) * head_size)
    out: &mut [T], // (batch * seq, heads * head_size)
    lse: &mut [T], // (batch, heads, seq)
) {
    let size = params.head_size as usize;
    let scale = T::from(params.scale);
    for batch in 0..params.batch as usize {
        for head in 0..params.heads as usize {
            let (key_slot, value_slot) = key_value_slots(params, head);
            for query in 0..params.seq as usize {
                let q = &qkv[qkv_start(params, batch, head, query)..][..size];
                let mut scores = Vec::with_capacity(query + 1);
                for key in 0..=query {
                    let k = &qkv[qkv_start(params, batch, key_slot, key)..][..size];
                    scores.push(scale * dot(q, k));
                }
                let max = scores.iter().fold(scores[0], |max, &score| max.max(score));
                let mut sum = T::ZERO;
                for &score in &scores {
                    sum += (score - max).exp();
                }
                let out = &mut out[out_start(params, batch, head, query)..][..size];
                out.fill(T::ZERO);
                for (key, &score) in scores.iter().enumerate() {
                    let v = &qkv[qkv_start(params, batch, value_slot, key)..][..size];
                    for d in 0..size {
                        out[d] += (score - max).exp() / sum * v[d];
                    }
                }
                lse[row_index(params, batch, head, query)] = max + sum.ln();
            }
        }
    }
}

/// The dot product of output and its gradient, for every head and row.
pub fn backward_dot<T: Real>(
    params: &Params,
    out: &[T],         // (batch * seq, heads * head_size)
    d_out: &[T],       // (batch * seq, heads * head_size)
    dot_out: &mut [T], // (batch, heads, seq)
) {
    let size = params.head_size as usize;
    for batch in 0..params.batch as usize {
        for head in 0..params.heads as usize {
            for t in 0..params.seq as usize {
                let start = out_start(params, batch, head, t);
                dot_out[row_index(params, batch, head, t)] = dot(&out[start..][..size], &d_out[start..][..size]);
            }
        }
    }
}

/// The gradient of the queries.
pub fn backward_q<T: Real>(
    params: &Params,
    qkv: &[T],       // (batch * seq, (heads + 2 * kv_heads) * head_size)
    d_out: &[T],     // (batch * seq, heads * head_size)
    lse: &[T],       // (batch, heads, seq)
    saved_dot: &[T], // (batch, heads, seq)
    d_qkv: &mut [T], // (batch * seq, (heads + 2 * kv_heads) * head_size), of which the queries are written
) {
    let size = params.head_size as usize;
    let scale = T::from(params.scale);
    for batch in 0..params.batch as usize {
        for head in 0..params.heads as usize {
            let (key_slot, value_slot) = key_value_slots(params, head);
            for query in 0..params.seq as usize {
                let row = row_index(params, batch, head, query);
                let start = qkv_start(params, batch, head, query);
                let q = &qkv[start..][..size];
                let d_o = &d_out[out_start(params, batch, head, query)..][..size];
                let d_q = &mut d_qkv[start..][..size];
                d_q.fill(T::ZERO);
                for key in 0..=query {
                    let k = &qkv[qkv_start(params, batch, key_slot, key)..][..size];
                    let v = &qkv[qkv_start(params, batch, value_slot, key)..][..size];
                    let probability = (scale * dot(q, k) - lse[row]).exp();
                    let d_score = scale * probability * (dot(d_o, v) - saved_dot[row]);
                    for d in 0..size {
                        d_q[d] += d_score * k[d];
                    }
                }
            }
        }
    }
}

/// The gradients of keys and values, summed over the heads of a group.
pub fn backward_kv<T: Real>(
    params: &Params,
    qkv: &[T],       // (batch * seq, (heads + 2 * kv_heads) * head_size)
    d_out: &[T],     // (batch * seq, heads * head_size)
    lse: &[T],       // (batch, heads, seq)
    saved_dot: &[T], // (batch, heads, seq)
    d_qkv: &mut [T], // (batch * seq, (heads + 2 * kv_heads) * head_size), of which the keys and values are written
) {
    let size = params.head_size as usize;
    let scale = T::from(params.scale);
    let group = params.heads as usize / params.kv_heads as usize;
    for batch in 0..params.batch as usize {
        for kv_head in 0..params.kv_heads as usize {
            for key in 0..params.seq as usize {
                let (key_slot, value_slot) = key_value_slots(params, kv_head * group);
                let k_start = qkv_start(params, batch, key_slot, key);
                let v_start = qkv_start(params, batch, value_slot, key);
                d_qkv[k_start..][..size].fill(T::ZERO);
                d_qkv[v_start..][..size].fill(T::ZERO);
                for head in kv_head * group..(kv_head + 1) * group {
                    for query in key..params.seq as usize {
                        let row = row_index(params, batch, head, query);
                        let q = &qkv[qkv_start(params, batch, head, query)..][..size];
                        let d_o = &d_out[out_start(params, batch, head, query)..][..size];
                        let probability = (scale * dot(q, &qkv[k_start..][..size]) - lse[row]).exp();
                        let d_probability = dot(d_o, &qkv[v_start..][..size]);
                        let d_score = scale * probability * (d_probability - saved_dot[row]);
                        for d in 0..size {
                            d_qkv[v_start + d] += probability * d_o[d];
                            d_qkv[k_start + d] += d_score * q[d];
                        }
                    }
                }
            }
        }
    }
}
