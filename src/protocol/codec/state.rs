//! What a main server keeps on disk, to bytes and back.
//!
//! Separate from the messages because it never crosses the wire: it has a version of its own, and nobody else's to agree with.

use super::super::main_server::{Checkpoint, ClientState, Placement, RunState};
use super::super::message::Assignment;
use super::DecodeError;
use super::wire::{Reader, Wire, put_bytes, put_length, wire_list, wire_struct};
use crate::federated::Exact;
use crate::terms::ids::{ClientId, RoundKey};
use crate::terms::moments::Moments;

/// Of both forms. Other versions are refused.
const VERSION: u32 = 1;

wire_struct!(ClientState {
    client: ClientId,
    next_serial: u64,
    banned: bool,
    present: bool,
    gone: bool,
});
wire_list!(ClientState);
wire_struct!(RunState {
    round: RoundKey,
    has_started: bool,
    next_client: u64,
    clients: Vec<ClientState>,
});

/// A client's own cut.
struct OwnCut {
    client: ClientId,
    cut: u32,
}
wire_struct!(OwnCut {
    client: ClientId,
    cut: u32,
});
wire_list!(OwnCut);

impl Wire for Placement {
    const MIN_BYTES: usize = 4 + 4 + 1 + 4 + 1 + 4;

    fn put(&self, out: &mut Vec<u8>) {
        // As a message, because what an assignment consists of depends on the kind.
        put_bytes(
            &super::encode_message_frame(
                0,
                0,
                &super::super::message::Message::Assignment(Box::new(self.assignment.clone())),
            ),
            out,
        );
        self.adapter.put(out);
        self.moments.put(out);
        let cuts = self.cuts.iter().map(|(&client, &cut)| OwnCut { client, cut });
        cuts.collect::<Vec<_>>().put(out);
        self.rule.put(out);
        self.ranks.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let bytes = Vec::<u8>::take(reader)?;
        Ok(Placement {
            assignment: assignment(&bytes)?,
            adapter: Wire::take(reader)?,
            moments: Wire::take(reader)?,
            cuts: Vec::<OwnCut>::take(reader)?
                .into_iter()
                .map(|own| (own.client, own.cut))
                .collect(),
            rule: Wire::take(reader)?,
            ranks: Wire::take(reader)?,
        })
    }
}

fn assignment(bytes: &[u8]) -> Result<Assignment, DecodeError> {
    use super::super::message::Message;
    match super::decode_frame(bytes)? {
        super::Frame::Message { kind, body, .. } => match super::decode_message(kind, body)? {
            Message::Assignment(assignment) => Ok(*assignment),
            _ => Err(DecodeError::Unknown {
                what: "an assignment's kind",
                value: kind.into(),
            }),
        },
        _ => Err(DecodeError::Unknown {
            what: "an assignment",
            value: 0,
        }),
    }
}

wire_struct!(Checkpoint {
    round: u32,
    placement: Placement,
    adapter: Vec<f32>,
    moments: Moments,
    exact: Option<Exact>,
});

fn encode(value: &impl Wire) -> Vec<u8> {
    let mut out = Vec::new();
    VERSION.put(&mut out);
    value.put(&mut out);
    out
}

fn decode<T: Wire>(bytes: &[u8]) -> Result<T, DecodeError> {
    let mut reader = Reader { bytes };
    let version = u32::take(&mut reader)?;
    if version != VERSION {
        return Err(DecodeError::Unknown {
            what: "the version of a run's state",
            value: version.into(),
        });
    }
    let value = T::take(&mut reader)?;
    reader.finish()?;
    Ok(value)
}

pub fn encode_run_state(state: &RunState) -> Vec<u8> {
    encode(state)
}

pub fn decode_run_state(bytes: &[u8]) -> Result<RunState, DecodeError> {
    decode(bytes)
}

pub fn encode_checkpoint(checkpoint: &Checkpoint) -> Vec<u8> {
    encode(checkpoint)
}

pub fn decode_checkpoint(bytes: &[u8]) -> Result<Checkpoint, DecodeError> {
    decode(bytes)
}
