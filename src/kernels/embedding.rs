//! Token and position embedding.
//!
//! The token table may be larger than one storage binding, so it comes in chunks of the vocabulary, one dispatch each; a
//! dispatch writes the rows whose token lies in its chunk and leaves the others alone.

use crate::compute::cpu::for_each_row;
use crate::compute::kernel::Kernel;
use crate::compute::{Buffer, Cost, Recording, linear_workgroups};
use crate::{kernel, params};

/// Invocations in a workgroup, the default of `WORKGROUP` in the shader.
const WORKGROUP: u32 = 64;

params! {
    pub struct ForwardParams {
        /// batch · seq
        pub rows: u32,
        pub seq: u32,
        pub width: u32,
        /// The chunk holds the tokens `vocab_start..vocab_end`.
        pub vocab_start: u32,
        pub vocab_end: u32,
        /// Non-zero: both tables hold f16 pairs, otherwise f32.
        pub f16: u32,
    }
}

kernel! {
    /// `out[row] = wte[tokens[row] - vocab_start] + wpe[row % seq]` where the token lies in the chunk.
    pub static FORWARD = "embedding.forward", "embedding", "forward", ForwardParams,
    [tokens: Read u32, wte: Read u32, wpe: Read u32, out: Write f32], forward_cpu
}

/// The kernels of this family.
pub static ALL: &[&Kernel] = &[&FORWARD];

/// Records the embedding of the rows whose token lies in the chunk `wte` (vocab_end - vocab_start, width); `wpe` is
/// (at least seq, width), `out` (rows, width).
pub fn forward(
    recording: &mut Recording,
    params: ForwardParams,
    tokens: &Buffer,
    wte: &Buffer,
    wpe: &Buffer,
    out: &Buffer,
) {
    let elements = params.rows as usize * params.width as usize;
    let weight_bytes = if params.f16 != 0 { 2.0 } else { 4.0 };
    recording.dispatch(
        &FORWARD,
        vec![("F16", (params.f16 != 0).into())],
        params,
        &[tokens, wte, wpe, out],
        linear_workgroups(elements, WORKGROUP),
        Cost {
            flops: elements as f64,
            bytes: (4.0 + 2.0 * weight_bytes) * elements as f64,
        },
    );
}

/// Element `i` of a weight matrix stored as f16 pairs or as f32.
fn weight(words: &[u32], f16: bool, i: usize) -> f32 {
    if f16 {
        half::f16::from_bits((words[i / 2] >> (i % 2 * 16)) as u16).to_f32()
    } else {
        f32::from_bits(words[i])
    }
}

/// The specification of `embedding.forward`.
pub fn forward_cpu(
    params: &ForwardParams,
    tokens: &[u32],  // (rows)
    wte: &[u32],     // (vocab_end - vocab_start, width)
    wpe: &[u32],     // (positions, width)
    out: &mut [f32], // (rows, width)
) {
    let (rows, width) = (params.rows as usize, params.width as usize);
    let f16 = params.f16 != 0;
    for_each_row(&mut out[..rows * width], width, |row, out| {
        if !(params.vocab_start..params.vocab_end).contains(&tokens[row]) {
            return;
        }
        let token = (tokens[row] - params.vocab_start) as usize;
        let position = row % params.seq as usize;
        for (i, out) in out.iter_mut().enumerate() {
            *out = weight(wte, f16, token * width + i) + weight(wpe, f16, position * width + i);
        }
    });
}
