//! Where each number lives in the `scalars` buffer, the handful of floats a step's host side sets before it replays a recording.
//!
//! They are in a buffer and not in params because params are fixed when a recording is prepared. A shader that reads the buffer
//! names the index `const SCALAR_<NAME>: u32`; `tests/all/kernel_contract.rs` compares those with [`INDICES`].

/// Weight of the example's or client's loss in the adapter gradient.
pub const WEIGHT: usize = 0;
/// One over the number of targets of the batch: turns a sum of token losses into their mean.
pub const FACTOR: usize = 1;
/// Learning rate of this step.
pub const LR: usize = 2;
/// `1 - β₁ᵗ`, t counted from 1, of the β₁ that [`BETA1`] holds in f32.
pub const BIAS1: usize = 3;
/// `1 - β₂ᵗ` likewise: `1 - 0.999` in f32 is 1.3e-5 off, which cancels only in the same β₂.
pub const BIAS2: usize = 4;
/// Decoupled weight decay.
pub const WEIGHT_DECAY: usize = 5;
/// Largest allowed global norm of the scaled gradient; 0 does not clip.
pub const CLIP: usize = 6;
/// Multiplies the accumulated gradient before clipping.
pub const GRAD_SCALE: usize = 7;
/// Decay rate of the first moment.
pub const BETA1: usize = 8;
/// Decay rate of the second moment.
pub const BETA2: usize = 9;
/// Added to the root of the second moment.
pub const EPSILON: usize = 10;
/// Global norm of the scaled gradient, before clipping: written by `adamw.norm_total`.
pub const NORM: usize = 11;

/// Length of the `scalars` buffer in words.
pub const COUNT: usize = 16;

/// Every index with its name.
pub const INDICES: &[(&str, usize)] = &[
    ("WEIGHT", WEIGHT),
    ("FACTOR", FACTOR),
    ("LR", LR),
    ("BIAS1", BIAS1),
    ("BIAS2", BIAS2),
    ("WEIGHT_DECAY", WEIGHT_DECAY),
    ("CLIP", CLIP),
    ("GRAD_SCALE", GRAD_SCALE),
    ("BETA1", BETA1),
    ("BETA2", BETA2),
    ("EPSILON", EPSILON),
    ("NORM", NORM),
];
