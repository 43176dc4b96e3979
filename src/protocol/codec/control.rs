//! What the two servers tell each other, in bytes.
//!
//! Separate from `training` because no client ever sends or sees these.

use super::super::message::{
    Control, ControlReply, Digest, Exclusion, ExclusionReason, Inclusion, Leaving, Mean, Member, RoundClosed,
};
use super::DecodeError;
use super::wire::{Reader, Wire, put_length, wire_enum, wire_list, wire_struct};
use crate::terms::ids::{ClientId, RoundKey};
use crate::terms::moments::Moments;

wire_enum!(ExclusionReason {
    Departed = 0,
    Absent = 1,
    WrongLength = 2,
    NotFinite = 3,
    WrongBase = 4,
    Examples = 5,
    Misbehaved = 6,
    Late = 7,
    Outlier = 8,
});
wire_struct!(Exclusion {
    client: ClientId,
    reason: ExclusionReason
});
wire_struct!(Inclusion {
    client: ClientId,
    examples: u64
});
wire_struct!(Leaving { len: u64, steps: u64 });
wire_struct!(Member {
    client: ClientId,
    base: Digest,
    adapter_len: u64
});
wire_list!(Member, Exclusion, Inclusion);
wire_struct!(Mean { digest: Digest, values: Vec<f32>, moments: Option<Moments> });
wire_struct!(RoundClosed {
    round: RoundKey,
    included: Vec<Inclusion>,
    excluded: Vec<Exclusion>,
    average: Option<Mean>,
});

impl Wire for Control {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Control::OpenRun {
                run,
                ticket_key,
                now,
                ticket_lifetime,
                largest_update,
                model,
                tokenizer,
            } => {
                out.push(0);
                run.put(out);
                ticket_key.put(out);
                now.put(out);
                ticket_lifetime.put(out);
                largest_update.put(out);
                model.put(out);
                tokenizer.put(out);
            }
            Control::OpenRound {
                round,
                members,
                adapter_len,
                max_examples,
            } => {
                out.push(1);
                round.put(out);
                members.put(out);
                adapter_len.put(out);
                max_examples.put(out);
            }
            Control::Collect { round, moments, copy } => {
                out.push(2);
                round.put(out);
                moments.put(out);
                copy.put(out);
            }
            Control::Departed { round, client } => {
                out.push(3);
                round.put(out);
                client.put(out);
            }
            Control::CloseRun => out.push(4),
            Control::Base { values } => {
                out.push(5);
                values.put(out);
            }
        }
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match u8::take(reader)? {
            0 => Ok(Control::OpenRun {
                run: Wire::take(reader)?,
                ticket_key: Wire::take(reader)?,
                now: Wire::take(reader)?,
                ticket_lifetime: Wire::take(reader)?,
                largest_update: Wire::take(reader)?,
                model: Wire::take(reader)?,
                tokenizer: Wire::take(reader)?,
            }),
            1 => Ok(Control::OpenRound {
                round: Wire::take(reader)?,
                members: Wire::take(reader)?,
                adapter_len: Wire::take(reader)?,
                max_examples: Wire::take(reader)?,
            }),
            2 => Ok(Control::Collect {
                round: Wire::take(reader)?,
                moments: Wire::take(reader)?,
                copy: Wire::take(reader)?,
            }),
            3 => Ok(Control::Departed {
                round: Wire::take(reader)?,
                client: Wire::take(reader)?,
            }),
            4 => Ok(Control::CloseRun),
            5 => Ok(Control::Base {
                values: Wire::take(reader)?,
            }),
            value => Err(DecodeError::Unknown {
                what: "Control",
                value: value.into(),
            }),
        }
    }
}

impl Wire for ControlReply {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            ControlReply::Excluded { round, exclusion } => {
                out.push(0);
                round.put(out);
                exclusion.put(out);
            }
            ControlReply::Received { round, client, bytes } => {
                out.push(1);
                round.put(out);
                client.put(out);
                bytes.put(out);
            }
            ControlReply::RoundClosed(closed) => {
                out.push(2);
                closed.put(out);
            }
        }
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match u8::take(reader)? {
            0 => Ok(ControlReply::Excluded {
                round: Wire::take(reader)?,
                exclusion: Wire::take(reader)?,
            }),
            1 => Ok(ControlReply::Received {
                round: Wire::take(reader)?,
                client: Wire::take(reader)?,
                bytes: Wire::take(reader)?,
            }),
            2 => Ok(ControlReply::RoundClosed(Wire::take(reader)?)),
            value => Err(DecodeError::Unknown {
                what: "ControlReply",
                value: value.into(),
            }),
        }
    }
}
