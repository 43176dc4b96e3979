//! What the two servers tell each other, in bytes.
//!
//! Separate from `training` because no client ever sends or sees these.

use super::super::message::{
    Control, ControlReply, Digest, Exclusion, ExclusionReason, Inclusion, Leaving, Mean, Member, RoundClosed,
};
use super::DecodeError;
use super::wire::{Reader, Wire, put_length, wire_enum, wire_list, wire_struct};
use crate::federated::{Errors, Exact, Rule};
use crate::terms::adapter::{AdapterShape, MatrixShape};
use crate::terms::aggregation::Aggregation;
use crate::terms::ids::{ClientId, RoundKey};

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

/// Without its rank: ranks follow the members, in a kind of `Control` of their own, where there are any.
impl Wire for Member {
    const MIN_BYTES: usize = ClientId::MIN_BYTES + Digest::MIN_BYTES + 8;

    fn put(&self, out: &mut Vec<u8>) {
        self.client.put(out);
        self.base.put(out);
        self.adapter_len.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Member {
            client: Wire::take(reader)?,
            base: Wire::take(reader)?,
            adapter_len: Wire::take(reader)?,
            rank: None,
        })
    }
}

wire_enum!(Aggregation { Mean = 0, Trimmed = 1, Median = 2, Flora = 3, Fedex = 4, Ffa = 5 });
wire_struct!(MatrixShape {
    inputs: u32,
    outputs: u32
});

/// Aggregation, rank, sides; what is trained follows from the first.
impl Wire for Rule {
    const MIN_BYTES: usize = Aggregation::MIN_BYTES + 4 + 4;

    fn put(&self, out: &mut Vec<u8>) {
        self.aggregation().put(out);
        u32::try_from(self.shape().rank()).unwrap_or(u32::MAX).put(out);
        self.shape().matrices().to_vec().put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let aggregation = Aggregation::take(reader)?;
        let rank = usize::try_from(u32::take(reader)?).unwrap_or(usize::MAX);
        let shape = AdapterShape::new(rank, aggregation.trained(), Wire::take(reader)?);
        (shape.and_then(|shape| Rule::new(aggregation, shape))).ok_or(DecodeError::Range("the shape of an adapter"))
    }
}

wire_struct!(Errors {
    averaging: f64,
    start: f64
});
wire_struct!(Exact { ranks: Vec<u32>, values: Vec<f32> });
wire_list!(Member, Exclusion, Inclusion, MatrixShape);

/// Without what is exact and what is missed, which follow the round in a kind of `ControlReply` of their own.
impl Wire for Mean {
    const MIN_BYTES: usize = Digest::MIN_BYTES + 4 + 1;

    fn put(&self, out: &mut Vec<u8>) {
        self.digest.put(out);
        self.values.put(out);
        self.moments.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Mean {
            digest: Wire::take(reader)?,
            values: Wire::take(reader)?,
            moments: Wire::take(reader)?,
            exact: None,
            errors: None,
        })
    }
}

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
                let has_ranks = members.iter().any(|member| member.rank.is_some());
                out.push(if has_ranks { 7 } else { 1 });
                round.put(out);
                members.put(out);
                adapter_len.put(out);
                max_examples.put(out);
                if has_ranks {
                    members.iter().for_each(|member| member.rank.put(out));
                }
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
            Control::Rule(rule) => {
                out.push(6);
                rule.put(out);
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
            kind @ (1 | 7) => {
                let round = Wire::take(reader)?;
                let mut members: Vec<Member> = Wire::take(reader)?;
                let (adapter_len, max_examples) = (Wire::take(reader)?, Wire::take(reader)?);
                if kind == 7 {
                    for member in &mut members {
                        member.rank = Wire::take(reader)?;
                    }
                    if members.iter().all(|member| member.rank.is_none()) {
                        return Err(DecodeError::Range("a list of no ranks"));
                    }
                }
                Ok(Control::OpenRound {
                    round,
                    members,
                    adapter_len,
                    max_examples,
                })
            }
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
            6 => Ok(Control::Rule(Wire::take(reader)?)),
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
                let more = closed.average.as_ref().map(|mean| (&mean.exact, &mean.errors));
                match more {
                    Some((exact, errors)) if exact.is_some() || errors.is_some() => {
                        out.push(3);
                        closed.put(out);
                        exact.is_some().put(out);
                        if let Some(exact) = exact {
                            exact.put(out);
                        }
                        errors.put(out);
                    }
                    _ => {
                        out.push(2);
                        closed.put(out);
                    }
                }
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
            3 => {
                const WHAT: &str = "a round that is closed with nothing more";
                let mut closed = RoundClosed::take(reader)?;
                let mean = closed.average.as_mut().ok_or(DecodeError::Range(WHAT))?;
                mean.exact = <Option<Exact> as Wire>::take(reader)?.map(Box::new);
                mean.errors = Wire::take(reader)?;
                match (&mean.exact, &mean.errors) {
                    (None, None) => Err(DecodeError::Range(WHAT)),
                    _ => Ok(ControlReply::RoundClosed(closed)),
                }
            }
            value => Err(DecodeError::Unknown {
                what: "ControlReply",
                value: value.into(),
            }),
        }
    }
}
