//! How large frames may be.
//!
//! Separate from `codec` because it is what the sessions of both sides derive from an agreement before anything is sent: what
//! a peer may be made to buffer.

use super::codec::HEADER_BYTES;
use super::message::RunConfig;

/// The largest frame any connection ever takes, whatever an assignment says.
pub const MAX_FRAME_BYTES: usize = 1 << 30;

/// Room for everything in a frame but its tensors.
const FRAME_SLACK_BYTES: usize = 1024;
/// Bytes of the largest frame with activations or a gradient; `None` when it is larger than any frame may be.
pub(crate) fn step_frame_bytes(config: &RunConfig) -> Option<usize> {
    let tensor = config.largest_tensor();
    let bytes = tensor
        .rows()?
        .checked_mul(4)?
        .checked_add(tensor.bytes()?)?
        .checked_add(HEADER_BYTES + FRAME_SLACK_BYTES)?;
    (bytes <= MAX_FRAME_BYTES).then_some(bytes)
}

/// Bytes of the largest frame with a flat adapter; `None` when it is larger than any frame may be.
pub(crate) fn adapter_frame_bytes(adapter_len: u64) -> Option<usize> {
    let bytes = usize::try_from(adapter_len)
        .ok()?
        .checked_mul(4)?
        .checked_add(HEADER_BYTES + FRAME_SLACK_BYTES)?;
    (bytes <= MAX_FRAME_BYTES).then_some(bytes)
}
