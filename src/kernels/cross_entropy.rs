//! The head fused with softmax cross entropy, in one pass over the vocabulary and without ever holding all logits.
//!
//! The vocabulary is taken in tiles. Each row keeps a running maximum and a running sum of exponentials (online softmax:
//! Milakov & Gimelshein, arXiv 1805.02867), and its gradient is accumulated unnormalised, rescaled whenever the maximum grows:
//!
//! ```text
//! for each tile of head:  logits   = hidden · tileᵀ                        matmul.forward
//!                         logits   = exp(logits - max), row_scale, state   cross_entropy.forward
//!                         d_hidden = row_scale · d_hidden + logits · tile  matmul.backward_x
//! d_hidden = factor · (d_hidden / sum - head[target])                      cross_entropy.backward_hidden
//! loss     = ln sum + max - target logit                                   cross_entropy.loss
//! ```
//!
//! | version | idea | measured |
//! |---|---|---|
//! | 1 | vocabulary tiles, maxima and sums by a workgroup a row | not measured on a GPU yet |
//! | `rows` | an invocation a row, for adapters emulated on a CPU | |

use super::case::{Example, case};
use super::matmul::{self, Epilogue};
use super::scalar;
use super::weight::{self, Columns, Weight};
use crate::compute::cpu::for_each_row;
use crate::compute::host::exp;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, DeviceClass, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

/// Rows in a workgroup of `forward_rows`, the default of `ROWS` in the shader: few, so that few rows still use all cores.
const ROWS: u32 = 8;

/// Words a row takes in the `state` buffer: running maximum, running sum of exponentials, the target's logit.
pub const STATE_WORDS: usize = 3;

/// Where the running maximum starts: below every logit, and its difference to a logit is finite.
const LOWEST: f32 = -3e38;

params! {
    /// Sizes for `cross_entropy.reset`.
    pub struct ResetParams {
        pub rows: u32,
    }
}

params! {
    /// Sizes for `cross_entropy.forward`.
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
    /// Sizes for `cross_entropy.loss`.
    pub struct LossParams {
        pub rows: u32,
    }
}

params! {
    /// Sizes for `cross_entropy.backward_hidden`.
    pub struct BackwardHiddenParams {
        pub rows: u32,
        pub width: u32,
        /// The tokens whose rows of the head `w` holds.
        pub vocab_start: u32,
        pub vocab_end: u32,
        /// Non-zero for the first chunk: divide by the sum and multiply by the factor.
        pub first: u32,
        /// Format of `w`: 0 f32, 1 f16, 2 q8, 3 q4.
        pub format: u32,
        /// The row of `w` that stands for `vocab_start`.
        pub first_row: u32,
        /// The word at which the scales of `w` begin.
        pub scales_at: u32,
    }
}

contract! {
    /// Starts the running maximum and sums of every row.
    pub(crate) static RESET = "cross_entropy.reset", ResetParams,
    [state: Write f32],
    spec: spec::reset, host: spec::reset, variants: [RESET_ROW]
}

variant! {
    /// An invocation a row.
    static RESET_ROW = RESET, "row", ["cross_entropy"], "reset", ResetParams,
    grid: |params| linear_workgroups(params.rows as usize, WORKGROUP),
}

contract! {
    /// One vocabulary tile of the online softmax.
    pub(crate) static FORWARD = "cross_entropy.forward", ForwardParams,
    [targets: Read i32, logits: Write f32, state: Write f32, row_scale: Write f32],
    spec: spec::forward, host: forward_host, variants: [FORWARD_ROWS, FORWARD_WORKGROUP]
}

variant! {
    /// An invocation a row, for adapters emulated on a CPU.
    static FORWARD_ROWS = FORWARD, "rows", ["cross_entropy"], "forward_rows", ForwardParams,
    fits: |profile, _| profile.class == DeviceClass::CpuAdapter,
    grid: |params| linear_workgroups(params.rows as usize, ROWS),
}

variant! {
    /// A workgroup a row.
    static FORWARD_WORKGROUP = FORWARD, "workgroup", ["cross_entropy"], "forward", ForwardParams,
    grid: |params| linear_workgroups(params.rows as usize, 1),
}

contract! {
    /// The loss of every row.
    pub(crate) static LOSS = "cross_entropy.loss", LossParams,
    [targets: Read i32, state: Read f32, loss: Write f32],
    spec: spec::loss, host: spec::loss, variants: [LOSS_ROW]
}

variant! {
    /// An invocation a row.
    static LOSS_ROW = LOSS, "row", ["cross_entropy"], "loss", LossParams,
    grid: |params| linear_workgroups(params.rows as usize, WORKGROUP),
}

contract! {
    /// Normalises the accumulated gradient and takes the target's row of the head from it.
    pub(crate) static BACKWARD_HIDDEN = "cross_entropy.backward_hidden", BackwardHiddenParams,
    [targets: Read i32, w: Read u32, state: Read f32, scalars: Read f32, d_hidden: Write f32],
    spec: spec::backward_hidden, host: backward_hidden_host, variants: [BACKWARD_HIDDEN_ELEMENT]
}

variant! {
    /// An invocation a value.
    static BACKWARD_HIDDEN_ELEMENT = BACKWARD_HIDDEN, "element", ["weight", "cross_entropy_hidden"], "backward_hidden",
    BackwardHiddenParams,
    constants: |params| vec![("W_FORMAT", params.format.into())],
    grid: |params| linear_workgroups(params.rows as usize * params.width as usize, WORKGROUP),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&RESET, &FORWARD, &LOSS, &BACKWARD_HIDDEN];

/// Some rows of the head.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Stored (vocabulary rows, width).
    pub weight: Weight,
    /// The token that its first row stands for.
    pub start: usize,
}

/// The operands of the fused head.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    pub rows: usize,
    pub width: usize,
    /// Vocabulary columns taken at a time.
    pub tile: usize,
    /// (rows, width): after the final norm.
    pub hidden: &'a Buffer,
    /// The head in parts; together the whole vocabulary, in order.
    pub chunks: &'a [Chunk],
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
    for chunk in head.chunks {
        for start in (0..chunk.weight.rows).step_by(head.tile) {
            let columns = head.tile.min(chunk.weight.rows - start);
            let tile = chunk.weight.row_range(start..start + columns);
            let hidden = Columns::all(head.hidden, width);
            let tile_logits = Columns::all(logits, columns);
            matmul::forward(recording, rows, &tile, hidden, tile_logits, Epilogue::default());
            forward(
                recording,
                ForwardParams {
                    rows: rows as u32,
                    columns: columns as u32,
                    vocab_start: (chunk.start + start) as u32,
                    keep: head.d_hidden.is_some().into(),
                },
                head.targets,
                logits,
                state,
                row_scale,
            );
            if let Some(d_hidden) = head.d_hidden {
                let epilogue = Epilogue {
                    row_scale: (!first).then_some(row_scale),
                    ..Epilogue::default()
                };
                let d_hidden = Columns::all(d_hidden, width);
                matmul::backward_x(recording, rows, &tile, tile_logits, d_hidden, epilogue);
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
        for (i, chunk) in head.chunks.iter().enumerate() {
            let params = BackwardHiddenParams {
                rows: rows as u32,
                width: width as u32,
                vocab_start: chunk.start as u32,
                vocab_end: (chunk.start + chunk.weight.rows) as u32,
                first: (i == 0).into(),
                format: weight::code(chunk.weight.format),
                first_row: chunk.weight.first_row as u32,
                scales_at: chunk.weight.scales_at() as u32,
            };
            let w = &chunk.weight.buffer;
            backward_hidden(recording, params, head.targets, w, state, head.scalars, d_hidden);
        }
    }
}

/// Records the start of a pass: no logit seen yet.
pub(crate) fn reset(recording: &mut Recording, params: ResetParams, state: &Buffer) {
    let rows = params.rows as usize;
    recording.dispatch(
        &RESET,
        params,
        &[state],
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
    recording.dispatch(
        &FORWARD,
        params,
        &[targets, logits, state, row_scale],
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
        params,
        &[targets, state, loss],
        Cost {
            flops: 3.0 * rows as f64,
            bytes: 20.0 * rows as f64,
        },
    );
}

/// Records the last step of the gradient for one chunk of the vocabulary.
pub(crate) fn backward_hidden(
    recording: &mut Recording,
    params: BackwardHiddenParams,
    targets: &Buffer,
    w: &Buffer,
    state: &Buffer,
    scalars: &Buffer,
    d_hidden: &Buffer,
) {
    let elements = params.rows as usize * params.width as usize;
    recording.dispatch(
        &BACKWARD_HIDDEN,
        params,
        &[targets, w, state, scalars, d_hidden],
        Cost {
            flops: 3.0 * elements as f64,
            bytes: 10.0 * elements as f64,
        },
    );
}

/// What benches time.
pub(crate) static EXAMPLES: &[Example] = &[Example {
    name: "cross_entropy",
    shape: |s| format!("{}x{}x{}", s.rows(), s.width, s.vocab),
    build: |b, s| {
        let tile = 2048.min(s.vocab);
        let hidden = b.random("hidden", s.rows() * s.width)?;
        let half = s.vocab / 2;
        let chunks = [(0, half), (half, s.vocab - half)];
        let chunks = chunks
            .into_iter()
            .filter(|&(_, rows)| rows > 0)
            .map(|(start, rows)| {
                Ok(Chunk {
                    weight: b.weight("head", rows, s.width, true)?,
                    start,
                })
            })
            .collect::<Result<Vec<_>, crate::compute::Error>>()?;
        let targets = b.below("targets", s.rows(), s.vocab)?;
        let scalars = b.scalars()?;
        let logits = b.zeros("logits", s.rows() * tile)?;
        let state = b.zeros("state", s.rows() * STATE_WORDS)?;
        let row_scale = b.zeros("row_scale", s.rows())?;
        let loss = b.zeros("loss", s.rows())?;
        let d_hidden = b.zeros("d_hidden", s.rows() * s.width)?;
        let outputs = [(&loss.clone(), s.rows()), (&d_hidden.clone(), s.rows() * s.width)];
        Ok(case(&outputs, false, move |recording| {
            let head = Head {
                rows: s.rows(),
                width: s.width,
                tile,
                chunks: &chunks,
                hidden: &hidden,
                targets: &targets,
                scalars: &scalars,
                scratch: Scratch {
                    logits: &logits,
                    state: &state,
                    row_scale: &row_scale,
                },
                loss: &loss,
                d_hidden: Some(&d_hidden),
            };
            record(recording, &head);
        }))
    },
}];

/// The mathematics in plain loops.
pub mod spec {
    use super::{BackwardHiddenParams, ForwardParams, LOWEST, LossParams, ResetParams, STATE_WORDS, scalar, weight};
    use crate::compute::real::Real;

    /// The clamp keeps the argument where every device's exp is defined; e⁻⁸⁷ is the smallest normal number.
    fn exp_below<T: Real>(x: T) -> T {
        x.max(T::from(-87.0)).exp()
    }

    pub(crate) fn reset<T: Real>(
        params: &ResetParams,
        state: &mut [T], // (rows, STATE_WORDS)
    ) {
        for row in 0..params.rows as usize {
            state[row * STATE_WORDS] = T::from(LOWEST);
            state[row * STATE_WORDS + 1] = T::ZERO;
            state[row * STATE_WORDS + 2] = T::ZERO;
        }
    }

    /// Carries each row's largest logit and sum of exponentials through a part of the vocabulary, and picks up the logit of its
    /// target. Where the parameters say so, exponentials take the place of the logits.
    pub fn forward<T: Real>(
        params: &ForwardParams,
        targets: &[i32],     // (rows)
        logits: &mut [T],    // (rows, columns)
        state: &mut [T],     // (rows, STATE_WORDS)
        row_scale: &mut [T], // (rows)
    ) {
        let columns = params.columns as usize;
        for row in 0..params.rows as usize {
            let state = &mut state[row * STATE_WORDS..][..STATE_WORDS];
            let logits = &mut logits[row * columns..][..columns];
            let target = i64::from(targets[row]) - i64::from(params.vocab_start);
            if (0..columns as i64).contains(&target) {
                state[2] = logits[target as usize];
            }
            let mut max = state[0];
            for logit in logits.iter() {
                max = max.max(*logit);
            }
            let mut sum = T::ZERO;
            for logit in logits.iter_mut() {
                let value = exp_below(*logit - max);
                if params.keep != 0 {
                    *logit = value;
                }
                sum += value;
            }
            row_scale[row] = exp_below(state[0] - max);
            state[1] = state[1] * row_scale[row] + sum;
            state[0] = max;
        }
    }

    /// The loss of each row: the logarithm of the sum less the target's logit; 0 where the target is ignored.
    pub fn loss<T: Real>(
        params: &LossParams,
        targets: &[i32], // (rows)
        state: &[T],     // (rows, STATE_WORDS)
        loss: &mut [T],  // (rows)
    ) {
        for row in 0..params.rows as usize {
            let state = &state[row * STATE_WORDS..][..STATE_WORDS];
            loss[row] = if targets[row] < 0 {
                T::ZERO
            } else {
                state[1].ln() + state[0] - state[2]
            };
        }
    }

    pub(crate) fn backward_hidden<T: Real>(
        params: &BackwardHiddenParams,
        targets: &[i32],    // (rows)
        w: &[u32],          // (vocab_end - vocab_start, width) from first_row on
        state: &[T],        // (rows, STATE_WORDS)
        scalars: &[T],      // see `scalar`
        d_hidden: &mut [T], // (rows, width)
    ) {
        let width = params.width as usize;
        let stored = weight::stored(w, params.format, params.width, params.scales_at);
        let factor = scalars[scalar::FACTOR];
        for row in 0..params.rows as usize {
            let token = i64::from(targets[row]);
            let inside = (i64::from(params.vocab_start)..i64::from(params.vocab_end)).contains(&token);
            for i in 0..width {
                let d = &mut d_hidden[row * width + i];
                if params.first != 0 {
                    *d = if token < 0 {
                        T::ZERO
                    } else {
                        *d * (factor / state[row * STATE_WORDS + 1])
                    };
                }
                if inside {
                    let head_row = params.first_row as usize + token as usize - params.vocab_start as usize;
                    *d -= factor * T::from(stored.at(head_row, i));
                }
            }
        }
    }
}

/// [`spec::forward`] on all cores, without branches in its loops.
fn forward_host(
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

/// [`spec::backward_hidden`] on all cores.
fn backward_hidden_host(
    params: &BackwardHiddenParams,
    targets: &[i32],
    w: &[u32],
    state: &[f32],
    scalars: &[f32],
    d_hidden: &mut [f32],
) {
    let width = params.width as usize;
    for_each_row(&mut d_hidden[..params.rows as usize * width], width, |row, d_hidden| {
        let of_row = BackwardHiddenParams { rows: 1, ..*params };
        let state = &state[row * STATE_WORDS..];
        spec::backward_hidden(&of_row, &targets[row..], w, state, scalars, d_hidden);
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
