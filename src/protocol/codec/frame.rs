//! Frames after the handshake: a kind, two numbers, and the message in bytes.
//!
//! Separate because every kind of message is numbered here, and whole frames are written in one go.

use super::super::message::*;
use super::wire::{Reader, Wire};
use super::{DecodeError, HEADER_BYTES};
use crate::terms::adapter::Trained;

const PING: u8 = 1;
const PONG: u8 = 2;

/// A frame after the handshake, its message still in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    Ping {
        nonce: u32,
        acknowledged: u32,
    },
    Pong {
        nonce: u32,
        acknowledged: u32,
    },
    Message {
        number: u32,
        acknowledged: u32,
        kind: u8,
        body: &'a [u8],
    },
}

fn header(kind: u8, number: u32, acknowledged: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
    out.push(kind);
    number.put(&mut out);
    acknowledged.put(&mut out);
    out.extend_from_slice(body);
    out
}

/// The bytes of a frame.
pub fn encode_frame(frame: Frame<'_>) -> Vec<u8> {
    match frame {
        Frame::Ping { nonce, acknowledged } => header(PING, nonce, acknowledged, &[]),
        Frame::Pong { nonce, acknowledged } => header(PONG, nonce, acknowledged, &[]),
        Frame::Message {
            number,
            acknowledged,
            kind,
            body,
        } => header(kind, number, acknowledged, body),
    }
}

/// Reads a frame's header and leaves its body alone.
///
/// # Errors
/// `Truncated` inside the header, `Trailing` after a ping or pong.
pub fn decode_frame(bytes: &[u8]) -> Result<Frame<'_>, DecodeError> {
    let mut reader = Reader { bytes };
    let kind = u8::take(&mut reader)?;
    let number = u32::take(&mut reader)?;
    let acknowledged = u32::take(&mut reader)?;
    match kind {
        PING | PONG => {
            reader.finish()?;
            Ok(if kind == PING {
                Frame::Ping {
                    nonce: number,
                    acknowledged,
                }
            } else {
                Frame::Pong {
                    nonce: number,
                    acknowledged,
                }
            })
        }
        kind => Ok(Frame::Message {
            number,
            acknowledged,
            kind,
            body: reader.bytes,
        }),
    }
}

/// A message's kind and body.
pub fn encode_message(message: &Message) -> (u8, Vec<u8>) {
    let mut body = Vec::new();
    let kind = put_message(message, &mut body);
    (kind, body)
}

/// The frame of a message, written in one go.
pub fn encode_message_frame(number: u32, acknowledged: u32, message: &Message) -> Vec<u8> {
    let bulk = match message {
        Message::Activations(Activations { targets, tensor, .. }) => targets.len() * 4 + tensor.bytes().len(),
        Message::Gradient(Gradient { tensor, .. }) => tensor.bytes().len(),
        Message::AdapterUpdate(AdapterUpdate { values, moments, .. }) => {
            let moments = moments.as_ref().map_or(0, |moments| moments.first.len() * 2);
            (values.len() + moments) * 4
        }
        Message::Average(Average { values, .. }) => values.len() * 4,
        _ => 0,
    };
    // No message has more than this beside its tensors, but for those that are sent once.
    let mut frame = Vec::with_capacity(bulk + 200);
    frame.push(0);
    number.put(&mut frame);
    acknowledged.put(&mut frame);
    frame[0] = put_message(message, &mut frame);
    frame
}

/// The frame of a message with a digest behind it, which tells when a bit was flipped on the way; as
/// `encode_message_frame` for messages that are small or say of their contents what they are. For peers of
/// [`DIGESTS_SINCE`](super::super::message::DIGESTS_SINCE) and later.
pub fn encode_checked_frame(number: u32, acknowledged: u32, message: &Message) -> Vec<u8> {
    let mut frame = encode_message_frame(number, acknowledged, message);
    if matches!(
        message,
        Message::Activations(_) | Message::Gradient(_) | Message::AdapterUpdate(_)
    ) {
        let kind = std::mem::replace(&mut frame[0], CHECKED);
        let digest = checked_digest(kind, &frame[HEADER_BYTES..]);
        frame.push(kind);
        frame.extend_from_slice(&digest.0);
    }
    frame
}

/// Another kind of message, with its kind and a digest of kind and body after it.
const CHECKED: u8 = 33;

fn checked_digest(kind: u8, body: &[u8]) -> Digest {
    Digest::of_parts([&[kind], body])
}

fn take_checked(body: &[u8]) -> Result<Message, DecodeError> {
    const WHAT: &str = "a message's digest";
    let (rest, digest) = body.split_last_chunk::<32>().ok_or(DecodeError::Truncated(WHAT))?;
    let (kind, body) = rest.split_last().ok_or(DecodeError::Truncated(WHAT))?;
    match *kind {
        // Frames within frames are nothing that anybody sends.
        CHECKED => Err(DecodeError::Unknown {
            what: "message kind",
            value: CHECKED.into(),
        }),
        kind if checked_digest(kind, body).0 != *digest => Err(DecodeError::Damaged),
        kind => decode_message(kind, body),
    }
}

/// Brings a frame that is sent again up to date.
pub(crate) fn set_acknowledged(frame: &mut [u8], acknowledged: u32) {
    if let Some(place) = frame.get_mut(5..HEADER_BYTES) {
        place.copy_from_slice(&acknowledged.to_le_bytes());
    }
}

/// An assignment with alphas.
const SCALED_ASSIGNMENT: u8 = 32;

fn take_scaled_assignment(body: &[u8]) -> Result<Message, DecodeError> {
    let mut reader = Reader { bytes: body };
    let mut assignment = Assignment::take(&mut reader)?;
    assignment.alphas = Wire::take(&mut reader)?;
    reader.finish()?;
    match assignment.alphas[..] {
        [] => Err(DecodeError::Range("an empty list of alphas")),
        _ => Ok(Message::Assignment(Box::new(assignment))),
    }
}

/// An assignment, its alphas, and what is trained.
const FROZEN_ASSIGNMENT: u8 = 34;

fn take_frozen_assignment(body: &[u8]) -> Result<Message, DecodeError> {
    let mut reader = Reader { bytes: body };
    let mut assignment = Assignment::take(&mut reader)?;
    assignment.alphas = Wire::take(&mut reader)?;
    assignment.trained = Wire::take(&mut reader)?;
    reader.finish()?;
    match assignment.trained {
        Trained::Both => Err(DecodeError::Range("an assignment that freezes nothing")),
        Trained::B => Ok(Message::Assignment(Box::new(assignment))),
    }
}

macro_rules! messages {
    ($($name:ident($kind:ty) = $value:literal),* ; $($bare:ident = $bare_value:literal),*) => {
        /// Appends a message's body and returns its kind.
        fn put_message(message: &Message, out: &mut Vec<u8>) -> u8 {
            match message {
                Message::Assignment(assignment) if assignment.trained != Trained::Both => {
                    assignment.put(out);
                    assignment.alphas.put(out);
                    assignment.trained.put(out);
                    FROZEN_ASSIGNMENT
                }
                Message::Assignment(assignment) if !assignment.alphas.is_empty() => {
                    assignment.put(out);
                    assignment.alphas.put(out);
                    SCALED_ASSIGNMENT
                }
                $(Message::$name(inner) => {
                    <$kind as Wire>::put(inner, out);
                    $value
                })*
                $(Message::$bare => $bare_value,)*
            }
        }

        /// Reads the body of a message of this kind, all of it.
        ///
        /// # Errors
        /// For a kind, a length or a value that cannot be, naming the field.
        pub fn decode_message(kind: u8, body: &[u8]) -> Result<Message, DecodeError> {
            let mut reader = Reader { bytes: body };
            let message = match kind {
                $($value => Message::$name(<$kind as Wire>::take(&mut reader)?.into()),)*
                $($bare_value => Message::$bare,)*
                FROZEN_ASSIGNMENT => return take_frozen_assignment(body),
                SCALED_ASSIGNMENT => return take_scaled_assignment(body),
                CHECKED => return take_checked(body),
                kind => return Err(DecodeError::Unknown { what: "message kind", value: kind.into() }),
            };
            reader.finish()?;
            Ok(message)
        }
    };
}

messages!(
    Assignment(Assignment) = 16,
    Ready(Ready) = 17,
    RoundStart(RoundStart) = 18,
    StepStart(StepStart) = 19,
    Activations(Activations) = 20,
    Gradient(Gradient) = 21,
    AdapterUpdate(AdapterUpdate) = 22,
    Average(Average) = 23,
    UpdateDeclined(UpdateDeclined) = 24,
    RoundResult(RoundResult) = 25,
    Stop(Stop) = 27,
    Control(Control) = 28,
    ControlReply(ControlReply) = 29,
    StepDone(StepDone) = 30,
    RoundEnd(RoundEnd) = 31 ;
    Leave = 26
);
