//! Rotary positions (RoFormer, arXiv 2104.09864) in the form of Llama: the two halves of a head are the two coordinates of its
//! pairs, turned by the token's position times each pair's frequency. In place, on the heads of some columns of a tensor, so
//! that the queries and keys of a fused projection are turned where they are. The angles come from a table, which the host
//! computes in f64: an f32 product of position and frequency is off by 5·10⁻⁴ at position 8,192.
//!
//! | version | idea                                                                            | measured |
//! |---------|---------------------------------------------------------------------------------|----------|
//! | `pairs` | an invocation a pair; both coordinates' reads are contiguous over invocations    | not measured on a GPU yet |
//! | host    | a row a task                                                                     | 512 rows of 12 heads of 64: 70 µs on a core |

use super::case::{Builder, Case, Example, Sizes, case};
use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Contract;
use crate::compute::{Buffer, Cost, Error, Recording, linear_workgroups};
use crate::{contract, params, variant};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

params! {
    /// Sizes for rotary's kernels.
    pub struct Params {
        /// Rows of `x`: whole sequences.
        pub rows: u32,
        /// Tokens of a sequence: row r is token `position[0] + r % seq`.
        pub seq: u32,
        pub heads: u32,
        /// Even.
        pub head_size: u32,
        /// Elements from a row of `x` to the next.
        pub stride: u32,
        /// Element of a row where the first head begins.
        pub first: u32,
    }
}

impl Params {
    fn pairs(&self) -> usize {
        self.rows as usize * self.heads as usize * (self.head_size as usize / 2)
    }
}

/// How a model's frequencies differ from powers of its base, so that it reads longer texts than it was first trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Scaling {
    #[default]
    None,
    /// All frequencies divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1's: pairs that turn fewer than `low_freq_factor` times in `original_positions` tokens are slowed down by
    /// `factor`, those that turn more than `high_freq_factor` times are not, those between partly.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: usize,
    },
}

impl Scaling {
    fn apply(self, frequency: f64) -> f64 {
        match self {
            Scaling::None => frequency,
            Scaling::Linear { factor } => frequency / factor,
            Scaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => {
                let turns = original_positions as f64 * frequency / std::f64::consts::TAU;
                if turns < low_freq_factor {
                    frequency / factor
                } else if turns > high_freq_factor || high_freq_factor <= low_freq_factor {
                    frequency
                } else {
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// The angle that each of the head_size / 2 pairs turns by from a token to the next.
pub fn frequencies(head_size: usize, base: f64, scaling: Scaling) -> Vec<f64> {
    (0..head_size / 2)
        .map(|i| scaling.apply(base.powf(-2.0 * i as f64 / head_size as f64)))
        .collect()
}

/// Cosine and sine of every pair's angle at every position: (positions, head_size / 2, 2).
pub fn table(positions: usize, head_size: usize, base: f64, scaling: Scaling) -> Vec<f32> {
    let frequencies = frequencies(head_size, base, scaling);
    let mut table = Vec::with_capacity(positions * 2 * frequencies.len());
    for position in 0..positions {
        for frequency in &frequencies {
            let (sine, cosine) = (position as f64 * frequency).sin_cos();
            table.extend([cosine as f32, sine as f32]);
        }
    }
    table
}

contract! {
    /// (x1, x2) → (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of every head.
    pub(crate) static FORWARD = "rotary.forward", Params,
    [table: Read f32, position: Read u32, x: Write f32],
    spec: spec::forward, host: forward_host, variants: [FORWARD_PAIRS]
}

variant! {
    /// An invocation a pair.
    static FORWARD_PAIRS = FORWARD, "pairs", ["rotary"], "rotate", Params,
    grid: |params| linear_workgroups(params.pairs(), WORKGROUP),
}

contract! {
    /// The turn back by the same angle: the gradient with respect to what was turned.
    pub(crate) static BACKWARD_X = "rotary.backward_x", Params,
    [table: Read f32, position: Read u32, x: Write f32],
    spec: spec::backward_x, host: backward_x_host, variants: [BACKWARD_X_PAIRS]
}

variant! {
    /// An invocation a pair.
    static BACKWARD_X_PAIRS = BACKWARD_X, "pairs", ["rotary"], "rotate", Params,
    constants: |_| vec![("INVERSE", true.into())],
    grid: |params| linear_workgroups(params.pairs(), WORKGROUP),
}

/// The contracts of this family.
pub static ALL: &[&Contract] = &[&FORWARD, &BACKWARD_X];

/// Records that the heads of `x` (rows, stride) are turned by their tokens' angles, in place. `table` is that of [`table`] and
/// reaches to the last position, `position` one u32.
pub fn forward(recording: &mut Recording, params: Params, table: &Buffer, position: &Buffer, x: &Buffer) {
    dispatch(recording, &FORWARD, params, table, position, x);
}

/// Records that the gradient `d_x` (rows, stride) of what [`forward`] gave becomes that of what it took, in place.
pub fn backward(recording: &mut Recording, params: Params, table: &Buffer, position: &Buffer, d_x: &Buffer) {
    dispatch(recording, &BACKWARD_X, params, table, position, d_x);
}

fn dispatch(
    recording: &mut Recording,
    contract: &'static Contract,
    params: Params,
    table: &Buffer,
    position: &Buffer,
    x: &Buffer,
) {
    assert!(
        params.head_size.is_multiple_of(2) && params.first + params.heads * params.head_size <= params.stride,
        "rotary positions on {params:?}"
    );
    assert!(
        params.seq > 0 && table.words() >= (params.seq * params.head_size) as usize,
        "{table:?} has no angles for {params:?}"
    );
    let pairs = params.pairs() as f64;
    recording.dispatch(
        contract,
        params,
        &[table, position, x],
        Cost {
            flops: 6.0 * pairs,
            bytes: 16.0 * pairs + 4.0 * params.seq as f64 * params.head_size as f64,
        },
    );
}

/// The mathematics in plain loops.
pub mod spec {
    use super::Params;
    use crate::compute::real::Real;

    /// Rotates the pairs of every head by the angles of the row's position.
    pub fn forward<T: Real>(
        params: &Params,
        table: &[T],      // (positions, head_size / 2, 2): cosine, sine
        position: &[u32], // (1)
        x: &mut [T],      // (rows, stride)
    ) {
        rotate(params, table, position, x, T::ONE);
    }

    /// Rotates the gradient back.
    pub fn backward_x<T: Real>(
        params: &Params,
        table: &[T],      // (positions, head_size / 2, 2): cosine, sine
        position: &[u32], // (1)
        x: &mut [T],      // (rows, stride)
    ) {
        rotate(params, table, position, x, -T::ONE);
    }

    fn rotate<T: Real>(params: &Params, table: &[T], position: &[u32], x: &mut [T], direction: T) {
        let half = params.head_size as usize / 2;
        for row in 0..params.rows as usize {
            let t = position[0] as usize + row % params.seq as usize;
            for head in 0..params.heads as usize {
                let start = row * params.stride as usize + params.first as usize + head * 2 * half;
                for i in 0..half {
                    let cosine = table[2 * (t * half + i)];
                    let sine = direction * table[2 * (t * half + i) + 1];
                    let (x1, x2) = (x[start + i], x[start + half + i]);
                    x[start + i] = x1 * cosine - x2 * sine;
                    x[start + half + i] = x2 * cosine + x1 * sine;
                }
            }
        }
    }
}

/// [`spec::forward`] on all cores.
fn forward_host(
    params: &Params,
    table: &[f32],    // (positions, head_size / 2, 2)
    position: &[u32], // (1)
    x: &mut [f32],    // (rows, stride)
) {
    rotate_host(params, table, position, x, 1.0);
}

/// [`spec::backward_x`] on all cores.
fn backward_x_host(
    params: &Params,
    table: &[f32],    // (positions, head_size / 2, 2)
    position: &[u32], // (1)
    x: &mut [f32],    // (rows, stride)
) {
    rotate_host(params, table, position, x, -1.0);
}

fn rotate_host(params: &Params, table: &[f32], position: &[u32], x: &mut [f32], direction: f32) {
    let (rows, stride, size) = (params.rows as usize, params.stride as usize, params.head_size as usize);
    let heads = params.first as usize..params.first as usize + params.heads as usize * size;
    for_each_row(&mut x[..rows * stride], stride, |row, x| {
        let t = position[0] as usize + row % params.seq as usize;
        let angles = &table[t * size..][..size];
        for head in x[heads.clone()].chunks_exact_mut(size) {
            let (x1, x2) = head.split_at_mut(size / 2);
            for ((x1, x2), angle) in x1.iter_mut().zip(x2).zip(angles.chunks_exact(2)) {
                let (cosine, sine) = (angle[0], direction * angle[1]);
                (*x1, *x2) = (*x1 * cosine - *x2 * sine, *x2 * cosine + *x1 * sine);
            }
        }
    });
}

/// The query and key heads of a fused projection, turned or turned back.
fn example(
    b: &mut Builder<'_>,
    s: Sizes,
    launch: fn(&mut Recording, Params, &Buffer, &Buffer, &Buffer),
) -> Result<Case, Error> {
    let head_size = s.head_size.next_multiple_of(2);
    let stride = (s.heads + 2 * s.kv_heads) * head_size;
    let params = Params {
        rows: s.rows() as u32,
        seq: s.seq as u32,
        heads: (s.heads + s.kv_heads) as u32,
        head_size: head_size as u32,
        stride: stride as u32,
        first: 0,
    };
    let angles = table(s.seq, head_size, 10_000.0, Scaling::None);
    let table = b.engine.buffer_from("table", &angles)?;
    let position = b.zeros("position", 1)?;
    let before = b.random("before", s.rows() * stride)?;
    let x = b.zeros("x", s.rows() * stride)?;
    Ok(case(&[(&x.clone(), s.rows() * stride)], false, move |recording| {
        recording.copy((&before, 0), (&x, 0), x.words());
        launch(recording, params, &table, &position, &x);
    }))
}

fn shape(s: Sizes) -> String {
    format!(
        "{}x{}x{}",
        s.rows(),
        s.heads + s.kv_heads,
        s.head_size.next_multiple_of(2)
    )
}

/// Uses of this family at a model's sizes.
pub(crate) static EXAMPLES: &[Example] = &[
    Example {
        name: "rotary.forward",
        shape,
        build: |b, s| example(b, s, forward),
    },
    Example {
        name: "rotary.backward_x",
        shape,
        build: |b, s| example(b, s, backward),
    },
];
