//! Messages to bytes and back.
//!
//! Little-endian and hand-written, so that a tensor is copied once and every length is checked against the bytes that
//! are really there before anything is allocated: decoding a frame takes memory in proportion to that frame, whatever
//! it claims. Separate from `message` so that the layout can be read, fuzzed and timed by itself.
//!
//! A connection opens with a greeting and its answer, both starting with `MAGIC`; the bytes up to and including the
//! version are the same in every protocol version, as is all of `Refused`. Every later frame is
//! `kind: u8, number: u32, acknowledged: u32, body`; `link` says what the two numbers mean.

//!
//! | file | holds |
//! |---|---|
//! | `wire`, `word` | numbers, texts and lists; the words of a run |
//! | `greeting` | the beginning of a connection |
//! | `frame` | what follows, with the kinds of messages |
//! | `training`, `control` | the messages' bodies |
//! | `state` | what a main server keeps on disk |

mod control;
mod frame;
mod greeting;
mod state;
mod training;
pub(crate) mod wire;
mod word;

pub(super) use frame::set_acknowledged;
pub use frame::{
    Frame, decode_frame, decode_message, encode_checked_frame, encode_frame, encode_message, encode_message_frame,
};
pub use greeting::{Answer, GreetingError, decode_answer, decode_hello, encode_answer, encode_hello, is_greeting};
pub(super) use state::{decode_checkpoint, decode_run_state, encode_checkpoint, encode_run_state};

use crate::terms::tensor::WireTensorError;

/// The first bytes of a greeting and of its answer.
pub(crate) const MAGIC: [u8; 4] = *b"SFLM";

/// Bytes of a frame before its body.
pub(crate) const HEADER_BYTES: usize = 9;

/// Largest greeting or answer.
pub const MAX_HANDSHAKE_BYTES: usize = 16 * 1024;

/// Why bytes are not a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("the frame ends inside {0}")]
    Truncated(&'static str),
    #[error("{0} bytes are left over after the message")]
    Trailing(usize),
    #[error("{what} has the unknown value {value}")]
    Unknown { what: &'static str, value: u64 },
    #[error("text is not UTF-8")]
    Text,
    #[error("it was damaged on the way: its digest is another")]
    Damaged,
    #[error("{0} is not a number that can be")]
    Range(&'static str),
    #[error(transparent)]
    Tensor(#[from] WireTensorError),
    #[error("a frame of {bytes} bytes is larger than the {limit} this connection takes")]
    TooLarge { bytes: usize, limit: usize },
}
