//! The tied head fused with softmax cross entropy, in one pass over the vocabulary and without ever holding all logits.
//!
//! The vocabulary is taken in tiles. Each row keeps a running maximum and a running sum of exponentials (online softmax:
//! Milakov & Gimelshein, arXiv 1805.02867), and its gradient is accumulated unnormalised, rescaled whenever the maximum grows:
//!
//! ```text
//! for each tile of wte:  logits   = hidden · tileᵀ                        matmul.backward_x
//!                        logits   = exp(logits - max), row_scale, state   cross_entropy.forward
//!                        d_hidden = row_scale · d_hidden + logits · tile  matmul.forward
//! d_hidden = factor · (d_hidden / sum - wte[target])                      cross_entropy.backward_hidden
//! loss     = ln sum + max - target logit                                  cross_entropy.loss
//! ```

use super::attention::exp;
use super::matmul::{self, Epilogue, Shape};
use super::scalar;
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Kernel;
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{kernel, params};
use half::f16;
use half::slice::HalfBitsSliceExt;

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Rows in a workgroup of `forward_rows`, the default of `ROWS` in the shader: few, so that few rows still use all cores.
const ROWS: u32 = 8;

/// Words a row takes in the `state` buffer: running maximum, running sum of exponentials, the target's logit.
pub const STATE_WORDS: usize = 3;

/// Where the running maximum starts: below every logit, and its difference to a logit is finite.
const LOWEST: f32 = -3e38;

params! {
    pub struct ResetParams {
        pub rows: u32,
    }
}

params! {
    pub struct ForwardParams {
        pub rows: u32,
        /// Columns of `logits` in this tile.
        pub columns: u32,
        /// The token that the first column stands for.
        pub vocab_start: u32,
        /// Non-zero: replace the logits by their exponentials.
        pub keep: u32,
    }
}

params! {
    pub struct LossParams {
        pub rows: u32,
    }
}

params! {
    pub struct BackwardHiddenParams {
        pub rows: u32,
        pub width: u32,
        /// The tokens whose embeddings `wte` holds.
        pub vocab_start: u32,
        pub vocab_end: u32,
        /// Non-zero for the first chunk: divide by the sum and multiply by the factor.
        pub first: u32,
        /// Non-zero: `wte` holds pairs of halves.
        pub f16: u32,
    }
}

kernel! {
    /// Starts the running maximum and sums of every row.
    pub static RESET = "cross_entropy.reset", "cross_entropy", "reset", ResetParams,
    [state: Write f32], reset_cpu
}

kernel! {
    /// One vocabulary tile of the online softmax, a workgroup a row.
    pub static FORWARD = "cross_entropy.forward", "cross_entropy", "forward", ForwardParams,
    [targets: Read i32, logits: Write f32, state: Write f32, row_scale: Write f32], forward_cpu
}

kernel! {
    /// [`FORWARD`], an invocation a row.
    pub static FORWARD_ROWS = "cross_entropy.forward", "cross_entropy", "forward_rows", ForwardParams,
    [targets: Read i32, logits: Write f32, state: Write f32, row_scale: Write f32], forward_cpu
}

kernel! {
    /// The loss of every row.
    pub static LOSS = "cross_entropy.loss", "cross_entropy", "loss", LossParams,
    [targets: Read i32, state: Read f32, loss: Write f32], loss_cpu
}

kernel! {
    /// Normalises the accumulated gradient and takes the target's embedding from it.
    pub static BACKWARD_HIDDEN = "cross_entropy.backward_hidden", "cross_entropy", "backward_hidden", BackwardHiddenParams,
    [targets: Read i32, wte: Read u32, state: Read f32, scalars: Read f32, d_hidden: Write f32], backward_hidden_cpu
}

/// Every kernel of the family.
pub static ALL: &[&Kernel] = &[&RESET, &FORWARD, &FORWARD_ROWS, &LOSS, &BACKWARD_HIDDEN];

/// The operands of the fused head.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    pub rows: usize,
    pub width: usize,
    /// Vocabulary columns taken at a time.
    pub tile: usize,
    /// The chunks of `wte` hold pairs of halves.
    pub f16: bool,
    /// (rows, width): after the final norm.
    pub hidden: &'a Buffer,
    /// The token embedding in parts: weights (end - start, width), start, end; together the whole vocabulary.
    pub chunks: &'a [(Buffer, u32, u32)],
    /// (rows) i32: a token below the vocabulary's size, or negative (-100) where there is none.
    pub targets: &'a Buffer,
    /// See [`scalar`]: `FACTOR` multiplies the gradient.
    pub scalars: &'a Buffer,
    pub scratch: Scratch<'a>,
    /// (rows): the loss of each token, 0 where there is no target.
    pub loss: &'a Buffer,
    /// (rows, width): the gradient of `FACTOR` times the sum of the losses, exactly 0 where there is no target. `None` to only
    /// evaluate.
    pub d_hidden: Option<&'a Buffer>,
}

/// Buffers the head needs while it runs.
#[derive(Clone, Copy, Debug)]
pub struct Scratch<'a> {
    /// (rows, tile)
    pub logits: &'a Buffer,
    /// (rows, [`STATE_WORDS`])
    pub state: &'a Buffer,
    /// (rows)
    pub row_scale: &'a Buffer,
}

/// Records the whole head: `loss` and, if wanted, `d_hidden`.
pub fn record(recording: &mut Recording, head: &Head<'_>) {
    let (rows, width) = (head.rows, head.width);
    let Scratch {
        logits,
        state,
        row_scale,
    } = head.scratch;
    reset(recording, ResetParams { rows: rows as u32 }, state);
    let mut first = true;
    for (wte, vocab_start, vocab_end) in head.chunks {
        for start in (*vocab_start..*vocab_end).step_by(head.tile) {
            let columns = head.tile.min((vocab_end - start) as usize);
            let w_offset = (start - vocab_start) as usize * width;
            matmul::backward_x(
                recording,
                Shape {
                    m: rows,
                    n: width,
                    k: columns,
                    w_offset,
                },
                head.f16,
                head.hidden,
                wte,
                logits,
                Epilogue::default(),
            );
            forward(
                recording,
                ForwardParams {
                    rows: rows as u32,
                    columns: columns as u32,
                    vocab_start: start,
                    keep: head.d_hidden.is_some().into(),
                },
                head.targets,
                logits,
                state,
                row_scale,
            );
            if let Some(d_hidden) = head.d_hidden {
                matmul::forward(
                    recording,
                    Shape {
                        m: rows,
                        n: width,
                        k: columns,
                        w_offset,
                    },
                    head.f16,
                    logits,
                    wte,
                    d_hidden,
                    Epilogue {
                        row_scale: (!first).then_some(row_scale),
                        ..Epilogue::default()
                    },
                );
            }
            first = false;
        }
    }
    loss(
        recording,
        LossParams { rows: rows as u32 },
        head.targets,
        state,
        head.loss,
    );
    if let Some(d_hidden) = head.d_hidden {
        for (i, (wte, vocab_start, vocab_end)) in head.chunks.iter().enumerate() {
            backward_hidden(
                recording,
                BackwardHiddenParams {
                    rows: rows as u32,
                    width: width as u32,
                    vocab_start: *vocab_start,
                    vocab_end: *vocab_end,
                    first: (i == 0).into(),
                    f16: head.f16.into(),
                },
                head.targets,
                wte,
                state,
                head.scalars,
                d_hidden,
            );
        }
    }
}

/// Records the start of a pass: no logit seen yet.
pub fn reset(recording: &mut Recording, params: ResetParams, state: &Buffer) {
    let rows = params.rows as usize;
    recording.dispatch(
        &RESET,
        vec![],
        params,
        &[state],
        linear_workgroups(rows, WORKGROUP),
        Cost {
            flops: 0.0,
            bytes: 12.0 * rows as f64,
        },
    );
}

/// Records one tile of the pass: updates `state`, sets `row_scale` to what accumulated sums are to be multiplied by, and
/// replaces `logits` (rows, columns) by their exponentials relative to the new maximum.
pub fn forward(
    recording: &mut Recording,
    params: ForwardParams,
    targets: &Buffer,
    logits: &Buffer,
    state: &Buffer,
    row_scale: &Buffer,
) {
    let elements = f64::from(params.rows) * f64::from(params.columns);
    let rows = params.rows as usize;
    let (kernel, workgroups) = match recording.class() {
        DeviceClass::CpuAdapter => (&FORWARD_ROWS, linear_workgroups(rows, ROWS)),
        _ => (&FORWARD, linear_workgroups(rows, 1)),
    };
    recording.dispatch(
        kernel,
        vec![],
        params,
        &[targets, logits, state, row_scale],
        workgroups,
        Cost {
            flops: 4.0 * elements,
            bytes: if params.keep != 0 { 8.0 } else { 4.0 } * elements,
        },
    );
}

/// Records `loss (rows)`, after the last tile.
pub fn loss(recording: &mut Recording, params: LossParams, targets: &Buffer, state: &Buffer, loss: &Buffer) {
    let rows = params.rows as usize;
    recording.dispatch(
        &LOSS,
        vec![],
        params,
        &[targets, state, loss],
        linear_workgroups(rows, WORKGROUP),
        Cost {
            flops: 3.0 * rows as f64,
            bytes: 20.0 * rows as f64,
        },
    );
}

/// Records the last step of the gradient for one chunk of the vocabulary.
pub fn backward_hidden(
    recording: &mut Recording,
    params: BackwardHiddenParams,
    targets: &Buffer,
    wte: &Buffer,
    state: &Buffer,
    scalars: &Buffer,
    d_hidden: &Buffer,
) {
    let elements = params.rows as usize * params.width as usize;
    recording.dispatch(
        &BACKWARD_HIDDEN,
        vec![("F16", (params.f16 != 0).into())],
        params,
        &[targets, wte, state, scalars, d_hidden],
        linear_workgroups(elements, WORKGROUP),
        Cost {
            flops: 3.0 * elements as f64,
            bytes: 10.0 * elements as f64,
        },
    );
}

/// The specification of `cross_entropy.reset`.
pub fn reset_cpu(
    params: &ResetParams,
    state: &mut [f32], // (rows, STATE_WORDS)
) {
    for state in state.chunks_exact_mut(STATE_WORDS).take(params.rows as usize) {
        state.copy_from_slice(&[LOWEST, 0.0, 0.0]);
    }
}

/// The specification of `cross_entropy.forward`.
pub fn forward_cpu(
    params: &ForwardParams,
    targets: &[i32],       // (rows)
    logits: &mut [f32],    // (rows, columns)
    state: &mut [f32],     // (rows, STATE_WORDS)
    row_scale: &mut [f32], // (rows)
) {
    let (rows, columns) = (params.rows as usize, params.columns as usize);
    let logits = &mut logits[..rows * columns];
    let states = &mut state[..rows * STATE_WORDS];
    for (scale, state) in row_scale.iter_mut().zip(states.chunks_exact(STATE_WORDS)) {
        *scale = state[0];
    }
    for_each_row(states, STATE_WORDS, |row, state| {
        let logits = &logits[row * columns..][..columns];
        let max = maximum(logits).max(state[0]);
        state[1] = state[1] * exp(state[0] - max) + sum_exp(logits, max);
        state[0] = max;
        let target = i64::from(targets[row]) - i64::from(params.vocab_start);
        if (0..columns as i64).contains(&target) {
            state[2] = logits[target as usize];
        }
    });
    for (scale, state) in row_scale.iter_mut().zip(states.chunks_exact(STATE_WORDS)) {
        *scale = exp(*scale - state[0]);
    }
    if params.keep != 0 {
        for_each_row(logits, columns, |row, logits| {
            let max = states[row * STATE_WORDS];
            for logit in logits {
                *logit = exp(*logit - max);
            }
        });
    }
}

/// The specification of `cross_entropy.loss`.
pub fn loss_cpu(
    params: &LossParams,
    targets: &[i32],  // (rows)
    state: &[f32],    // (rows, STATE_WORDS)
    loss: &mut [f32], // (rows)
) {
    for (row, loss) in loss[..params.rows as usize].iter_mut().enumerate() {
        let state = &state[row * STATE_WORDS..][..STATE_WORDS];
        *loss = if targets[row] < 0 {
            0.0
        } else {
            state[1].ln() + state[0] - state[2]
        };
    }
}

/// The specification of `cross_entropy.backward_hidden`.
pub fn backward_hidden_cpu(
    params: &BackwardHiddenParams,
    targets: &[i32],      // (rows)
    wte: &[u32],          // (vocab_end - vocab_start, width)
    state: &[f32],        // (rows, STATE_WORDS)
    scalars: &[f32],      // see `scalar`
    d_hidden: &mut [f32], // (rows, width)
) {
    let (rows, width) = (params.rows as usize, params.width as usize);
    let factor = scalars[scalar::FACTOR];
    let halves: &[f16] = bytemuck::cast_slice::<u32, u16>(wte).reinterpret_cast();
    let singles: &[f32] = bytemuck::cast_slice(wte);
    for_each_row(&mut d_hidden[..rows * width], width, |row, d_hidden| {
        let target = targets[row];
        if params.first != 0 {
            if target < 0 {
                d_hidden.fill(0.0);
            } else {
                let scale = factor / state[row * STATE_WORDS + 1];
                d_hidden.iter_mut().for_each(|d| *d *= scale);
            }
        }
        let token = i64::from(target);
        if (i64::from(params.vocab_start)..i64::from(params.vocab_end)).contains(&token) {
            let start = (token as usize - params.vocab_start as usize) * width;
            for (i, d) in d_hidden.iter_mut().enumerate() {
                let embedding = if params.f16 != 0 {
                    halves[start + i].to_f32()
                } else {
                    singles[start + i]
                };
                *d -= factor * embedding;
            }
        }
    });
}

/// Lanes of the sums over a row, so that the compiler may use vector instructions.
const LANES: usize = 16;

fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [LOWEST; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (max, &value) in lanes.iter_mut().zip(chunk) {
            *max = if value > *max { value } else { *max };
        }
    }
    lanes.iter().chain(rest).fold(LOWEST, |max, &value| max.max(value))
}

fn sum_exp(values: &[f32], max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|value| exp(value - max)).sum();
    for chunk in chunks {
        for (sum, &value) in lanes.iter_mut().zip(chunk) {
            *sum += exp(value - max);
        }
    }
    lanes.iter().sum::<f32>() + rest
}
