//! Messages to bytes and back.
//!
//! Little-endian and hand-written, so that a tensor is copied once and every length is checked against the bytes that
//! are really there before anything is allocated: decoding a frame takes memory in proportion to that frame, whatever
//! it claims. Separate from `message` so that the layout can be read, fuzzed and timed by itself.
//!
//! A connection opens with a greeting and its answer, both starting with `MAGIC`; the bytes up to and including the
//! version are the same in every protocol version, as is all of `Refused`. Every later frame is
//! `kind: u8, number: u32, acknowledged: u32, body`; `link` says what the two numbers mean.

use std::time::Duration;

use super::message::*;
use crate::terms::format::Format;
use crate::terms::ids::{ClientId, RoundKey, RunId, StepKey};
use crate::terms::moments::{MomentPolicy, Moments};
use crate::terms::optimizer::{OptimizerSettings, Schedule};
use crate::terms::speed::Speed;
use crate::terms::tensor::{WireForm, WireLayout, WireTensor, WireTensorError};

/// The first bytes of a greeting and of its answer.
pub const MAGIC: [u8; 4] = *b"SFLM";

/// Bytes of a frame before its body.
pub const HEADER_BYTES: usize = 9;

/// Largest greeting or answer.
pub const MAX_HANDSHAKE_BYTES: usize = 16 * 1024;

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REFUSED: u8 = 3;

const PING: u8 = 1;
const PONG: u8 = 2;

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
    #[error("{0} is not a number that can be")]
    Range(&'static str),
    #[error(transparent)]
    Tensor(#[from] WireTensorError),
    #[error("a frame of {bytes} bytes is larger than the {limit} this connection takes")]
    TooLarge { bytes: usize, limit: usize },
}

/// Why the first frame of a connection is not a greeting this side can answer with a welcome.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GreetingError {
    #[error("not a greeting of this protocol")]
    NotThisProtocol,
    #[error("the other side speaks protocol {theirs}, this side {ours}")]
    Version { ours: Version, theirs: Version },
    #[error("malformed greeting: {0}")]
    Malformed(DecodeError),
}

impl From<DecodeError> for GreetingError {
    fn from(error: DecodeError) -> Self {
        Self::Malformed(error)
    }
}

/// What a server answers to a greeting.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    Welcome(Welcome),
    Refused(Refused),
}

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

/// The bytes still to be read.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or(DecodeError::Truncated(what))?;
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or(DecodeError::Truncated(what))?;
        self.bytes = rest;
        Ok(*taken)
    }

    /// A count whose elements take at least `element_bytes` each: refused when they cannot all be there.
    fn count(&mut self, element_bytes: usize, what: &'static str) -> Result<usize, DecodeError> {
        let count = u32::take(self)?;
        let count = usize::try_from(count).map_err(|_| DecodeError::Truncated(what))?;
        match count.checked_mul(element_bytes) {
            Some(bytes) if bytes <= self.bytes.len() => Ok(count),
            _ => Err(DecodeError::Truncated(what)),
        }
    }

    fn finish(self) -> Result<(), DecodeError> {
        match self.bytes.len() {
            0 => Ok(()),
            left => Err(DecodeError::Trailing(left)),
        }
    }
}

/// A value with a place in a frame.
trait Wire: Sized {
    /// The fewest bytes one value can take.
    const MIN_BYTES: usize;

    fn put(&self, out: &mut Vec<u8>);

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError>;
}

macro_rules! wire_number {
    ($($number:ty),*) => {$(
        impl Wire for $number {
            const MIN_BYTES: usize = size_of::<$number>();

            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok(<$number>::from_le_bytes(reader.array(stringify!($number))?))
            }
        }
    )*};
}

wire_number!(u8, u16, u32, u64, f32, f64);

/// Implements `Wire` for structs, field by field in the order given.
macro_rules! wire_struct {
    ($name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        impl Wire for $name {
            const MIN_BYTES: usize = 0 $(+ <$kind as Wire>::MIN_BYTES)*;

            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok($name { $($field: <$kind as Wire>::take(reader)?),* })
            }
        }
    };
}

/// Implements `Wire` for enums without data, one byte each.
macro_rules! wire_enum {
    ($name:ident { $($variant:ident = $value:literal),* $(,)? }) => {
        impl Wire for $name {
            const MIN_BYTES: usize = 1;

            fn put(&self, out: &mut Vec<u8>) {
                out.push(match self { $($name::$variant => $value),* });
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                match u8::take(reader)? {
                    $($value => Ok($name::$variant),)*
                    value => Err(DecodeError::Unknown { what: stringify!($name), value: value.into() }),
                }
            }
        }
    };
}

impl Wire for bool {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match u8::take(reader)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(DecodeError::Unknown {
                what: "bool",
                value: value.into(),
            }),
        }
    }
}

impl<const N: usize> Wire for [u8; N] {
    const MIN_BYTES: usize = N;

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.array("a digest or identifier")
    }
}

/// Microseconds.
impl Wire for Duration {
    const MIN_BYTES: usize = 8;

    fn put(&self, out: &mut Vec<u8>) {
        u64::try_from(self.as_micros()).unwrap_or(u64::MAX).put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Duration::from_micros(u64::take(reader)?))
    }
}

/// Lengths are 32 bits: a frame is bounded far below that long before it is encoded.
fn put_length(length: usize, out: &mut Vec<u8>) {
    let length = u32::try_from(length).expect("a field of a frame is shorter than 4 GiB");
    length.put(out);
}

fn put_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    put_length(bytes.len(), out);
    out.extend_from_slice(bytes);
}

impl Wire for String {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(self.as_bytes(), out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let length = reader.count(1, "text")?;
        let bytes = reader.take(length, "text")?;
        Ok(std::str::from_utf8(bytes).map_err(|_| DecodeError::Text)?.to_owned())
    }
}

impl<T: Wire> Wire for Option<T> {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(if bool::take(reader)? {
            Some(T::take(reader)?)
        } else {
            None
        })
    }
}

/// Implements `Wire` for lists of small records. Numbers in bulk have their own, below.
macro_rules! wire_list {
    ($($element:ty),*) => {$(
        impl Wire for Vec<$element> {
            const MIN_BYTES: usize = 4;

            fn put(&self, out: &mut Vec<u8>) {
                put_length(self.len(), out);
                self.iter().for_each(|element| element.put(out));
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                let count = reader.count(<$element as Wire>::MIN_BYTES, stringify!($element))?;
                (0..count).map(|_| <$element as Wire>::take(reader)).collect()
            }
        }
    )*};
}

wire_list!(String, Blob, WireForm, Member, Exclusion, Inclusion);

impl Wire for Vec<u8> {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(self, out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let length = reader.count(1, "payload")?;
        Ok(reader.take(length, "payload")?.to_vec())
    }
}

macro_rules! wire_bulk {
    ($($number:ty),*) => {$(
        impl Wire for Vec<$number> {
            const MIN_BYTES: usize = 4;

            fn put(&self, out: &mut Vec<u8>) {
                put_length(self.len(), out);
                out.reserve(self.len() * size_of::<$number>());
                out.extend(self.iter().flat_map(|number| number.to_le_bytes()));
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                const BYTES: usize = size_of::<$number>();
                let count = reader.count(BYTES, "numbers")?;
                let bytes = reader.take(count * BYTES, "numbers")?;
                Ok(bytes.as_chunks::<BYTES>().0.iter().map(|bytes| <$number>::from_le_bytes(*bytes)).collect())
            }
        }
    )*};
}

wire_bulk!(f32, i32);

impl Wire for Digest {
    const MIN_BYTES: usize = 32;

    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Digest(Wire::take(reader)?))
    }
}

impl Wire for RunId {
    const MIN_BYTES: usize = 16;

    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(RunId(Wire::take(reader)?))
    }
}

impl Wire for ClientId {
    const MIN_BYTES: usize = 8;

    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(ClientId(u64::take(reader)?))
    }
}

impl Wire for Ticket {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Ticket(Wire::take(reader)?))
    }
}

impl Wire for Credential {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Credential::None => out.push(0),
            Credential::Secret(secret) => {
                out.push(1);
                secret.put(out);
            }
            Credential::Ticket(ticket) => {
                out.push(2);
                ticket.put(out);
            }
        }
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match u8::take(reader)? {
            0 => Ok(Credential::None),
            1 => Ok(Credential::Secret(Wire::take(reader)?)),
            2 => Ok(Credential::Ticket(Wire::take(reader)?)),
            value => Err(DecodeError::Unknown {
                what: "Credential",
                value: value.into(),
            }),
        }
    }
}

wire_enum!(WireForm { F32 = 0, F16 = 1, Int8 = 2 });
wire_enum!(Format { F16 = 0, F32 = 1, Q8 = 2, Q4 = 3 });
wire_enum!(Schedule { Constant = 0, Linear = 1 });
wire_enum!(MomentPolicy { Keep = 0, Reset = 1 });
wire_enum!(Service { Main = 0, Federated = 1, Control = 2 });
wire_enum!(StopReason { Completed = 0, Shutdown = 1, Unexpected = 2, BadUpdate = 3, Excluded = 4, Superseded = 5 });
wire_enum!(ExclusionReason {
    Departed = 0,
    Absent = 1,
    WrongLength = 2,
    NotFinite = 3,
    WrongBase = 4,
    Examples = 5,
    Misbehaved = 6,
});

wire_struct!(Version { major: u16, minor: u16 });
wire_struct!(RoundKey {
    round: u32,
    attempt: u32
});
wire_struct!(StepKey {
    round: RoundKey,
    step: u32
});
wire_struct!(Blob {
    name: String,
    sha256: Digest,
    bytes: u64
});
/// Steps of a run as the wire has them: those past 32 bits are as many as fit.
struct Steps(u64);

impl Wire for Steps {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        u32::try_from(self.0).unwrap_or(u32::MAX).put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Steps(u32::take(reader)?.into()))
    }
}

impl Wire for OptimizerSettings {
    const MIN_BYTES: usize = 4 + 4 + Schedule::MIN_BYTES + 2 * Steps::MIN_BYTES + Option::<f32>::MIN_BYTES;

    fn put(&self, out: &mut Vec<u8>) {
        self.lr.put(out);
        self.weight_decay.put(out);
        self.schedule.put(out);
        Steps(self.warmup).put(out);
        Steps(self.total_steps).put(out);
        self.clip.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(OptimizerSettings {
            lr: Wire::take(reader)?,
            weight_decay: Wire::take(reader)?,
            schedule: Wire::take(reader)?,
            warmup: Steps::take(reader)?.0,
            total_steps: Steps::take(reader)?.0,
            clip: Wire::take(reader)?,
        })
    }
}

wire_struct!(RunConfig {
    split: u32,
    rank: u32,
    alpha: f32,
    targets: Vec<String>,
    weights: Format,
    wire: WireForm,
    batch: u32,
    seq: u32,
    width: u32,
    vocab: u32,
    seed: u64,
    shuffle: bool,
    local_steps: u32,
    rounds: u32,
    optimizer: OptimizerSettings,
    moments: MomentPolicy,
});
wire_struct!(Assignment {
    run: RunId,
    number: u32,
    config: RunConfig,
    model_config: String,
    weights: Vec<Blob>,
    tokenizer: Vec<Blob>,
    adapter_len: u64,
});
wire_struct!(Capabilities {
    forms: Vec<WireForm>,
    memory_bytes: u64,
    device: String
});

/// Implements `Wire` for a pair of numbers that only their constructor can put together.
macro_rules! wire_checked {
    ($name:ident { $first:ident, $second:ident }) => {
        impl Wire for $name {
            const MIN_BYTES: usize = 16;

            fn put(&self, out: &mut Vec<u8>) {
                self.$first.put(out);
                self.$second.put(out);
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                let (first, second) = (f64::take(reader)?, f64::take(reader)?);
                $name::new(first, second).ok_or(DecodeError::Range(stringify!($name)))
            }
        }
    };
}

wire_checked!(Speed {
    forward_flops_per_s,
    backward_flops_per_s
});
wire_checked!(LinkRates {
    main_bits_per_s,
    federated_bits_per_s
});
wire_struct!(Moments { steps: u64, first: Vec<f32>, second: Vec<f32> });
wire_struct!(RoundStart {
    round: RoundKey,
    base: Digest,
    members: u32,
    adapter: Option<Vec<f32>>,
    moments: Option<Moments>,
    rates: Option<LinkRates>,
});
wire_struct!(Ready { assignment: u32, speed: Option<Speed> });
wire_struct!(StepStart {
    key: StepKey,
    members: u32
});
/// The layout of a tensor, whose bytes come at the end of its message.
impl Wire for WireLayout {
    const MIN_BYTES: usize = 13;

    fn put(&self, out: &mut Vec<u8>) {
        self.batch.put(out);
        self.seq.put(out);
        self.width.put(out);
        self.form.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(WireLayout {
            batch: Wire::take(reader)?,
            seq: Wire::take(reader)?,
            width: Wire::take(reader)?,
            form: Wire::take(reader)?,
        })
    }
}

fn take_tensor(layout: WireLayout, reader: &mut Reader<'_>) -> Result<WireTensor, DecodeError> {
    Ok(WireTensor::new(layout, Vec::<u8>::take(reader)?)?)
}

impl Wire for Activations {
    const MIN_BYTES: usize = StepKey::MIN_BYTES + 4 + WireLayout::MIN_BYTES + 4 + Duration::MIN_BYTES + 4 + 4;

    fn put(&self, out: &mut Vec<u8>) {
        self.key.put(out);
        self.split.put(out);
        self.tensor.layout().put(out);
        self.examples.put(out);
        self.forward.put(out);
        self.targets.put(out);
        put_bytes(self.tensor.bytes(), out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (key, split, layout) = (Wire::take(reader)?, Wire::take(reader)?, Wire::take(reader)?);
        Ok(Activations {
            key,
            split,
            examples: Wire::take(reader)?,
            forward: Wire::take(reader)?,
            targets: Wire::take(reader)?,
            tensor: take_tensor(layout, reader)?,
        })
    }
}

impl Wire for Gradient {
    const MIN_BYTES: usize = StepKey::MIN_BYTES + WireLayout::MIN_BYTES + Digest::MIN_BYTES + 4 + 8 + 4 + 4;

    fn put(&self, out: &mut Vec<u8>) {
        self.key.put(out);
        self.tensor.layout().put(out);
        self.activations.put(out);
        self.loss.put(out);
        self.tokens.put(out);
        self.mean_loss.put(out);
        put_bytes(self.tensor.bytes(), out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (key, layout) = (Wire::take(reader)?, Wire::take(reader)?);
        Ok(Gradient {
            key,
            activations: Wire::take(reader)?,
            loss: Wire::take(reader)?,
            tokens: Wire::take(reader)?,
            mean_loss: Wire::take(reader)?,
            tensor: take_tensor(layout, reader)?,
        })
    }
}

wire_struct!(StepDone {
    key: StepKey,
    backward: Duration
});
wire_struct!(RoundEnd {
    round: RoundKey,
    split: u32,
    steps: u64
});
wire_struct!(AdapterUpdate {
    run: RunId,
    round: RoundKey,
    base: Digest,
    examples: u64,
    values: Vec<f32>,
    moments: Option<Moments>,
});
wire_struct!(Average { round: RoundKey, digest: Digest, values: Vec<f32> });
wire_struct!(UpdateDeclined { round: RoundKey, open: Option<RoundKey>, detail: String });
wire_struct!(RoundResult {
    round: u32,
    rounds: u32,
    included: u32,
    valid_loss: Option<f64>,
    steps: u32,
    total_steps: u32,
});
wire_struct!(Stop { reason: StopReason, detail: String, return_after: Option<Duration> });
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

const fn refusal_code(reason: RefusalReason) -> u16 {
    match reason {
        RefusalReason::NotThisProtocol => 1,
        RefusalReason::Version => 2,
        RefusalReason::Malformed => 3,
        RefusalReason::Service => 4,
        RefusalReason::SecretMissing => 5,
        RefusalReason::SecretWrong => 6,
        RefusalReason::TicketForged => 7,
        RefusalReason::TicketExpired => 8,
        RefusalReason::TicketSpent => 9,
        RefusalReason::TicketOtherRun => 10,
        RefusalReason::Model => 11,
        RefusalReason::Tokenizer => 12,
        RefusalReason::WireForm => 13,
        RefusalReason::NoRun => 14,
        RefusalReason::Full => 15,
        RefusalReason::Other => u16::MAX,
    }
}

/// Every reason with a code of its own.
const REFUSALS: [RefusalReason; 15] = [
    RefusalReason::NotThisProtocol,
    RefusalReason::Version,
    RefusalReason::Malformed,
    RefusalReason::Service,
    RefusalReason::SecretMissing,
    RefusalReason::SecretWrong,
    RefusalReason::TicketForged,
    RefusalReason::TicketExpired,
    RefusalReason::TicketSpent,
    RefusalReason::TicketOtherRun,
    RefusalReason::Model,
    RefusalReason::Tokenizer,
    RefusalReason::WireForm,
    RefusalReason::NoRun,
    RefusalReason::Full,
];

fn greeting(kind: u8, version: Version) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.push(kind);
    version.put(&mut out);
    out
}

/// Checks the frozen part of a greeting or answer and returns its kind, version and the rest.
fn open_greeting(frame: &[u8]) -> Result<(u8, Version, Reader<'_>), GreetingError> {
    if frame.len() > MAX_HANDSHAKE_BYTES {
        return Err(DecodeError::TooLarge {
            bytes: frame.len(),
            limit: MAX_HANDSHAKE_BYTES,
        }
        .into());
    }
    let body = frame.strip_prefix(&MAGIC).ok_or(GreetingError::NotThisProtocol)?;
    let mut reader = Reader { bytes: body };
    let kind = u8::take(&mut reader)?;
    let version = Version::take(&mut reader)?;
    Ok((kind, version, reader))
}

/// A client's first frame.
pub fn encode_hello(hello: &Hello) -> Vec<u8> {
    let mut out = greeting(HELLO, hello.version);
    hello.service.put(&mut out);
    hello.credential.put(&mut out);
    hello.name.put(&mut out);
    hello.model.put(&mut out);
    hello.tokenizer.put(&mut out);
    hello.capabilities.put(&mut out);
    out
}

/// Reads a client's first frame. Nothing after the version is looked at unless the majors agree with `ours`; what a
/// newer minor appended is left unread.
///
/// # Errors
/// `NotThisProtocol` without the magic and the kind of a greeting, `Version` for another major, else `Malformed`.
pub fn decode_hello(ours: Version, frame: &[u8]) -> Result<Hello, GreetingError> {
    let (kind, version, mut reader) = open_greeting(frame)?;
    if kind != HELLO {
        return Err(GreetingError::NotThisProtocol);
    }
    if version.major != ours.major {
        return Err(GreetingError::Version { ours, theirs: version });
    }
    let reader = &mut reader;
    let hello = Hello {
        version,
        service: Wire::take(reader)?,
        credential: Wire::take(reader)?,
        name: Wire::take(reader)?,
        model: Wire::take(reader)?,
        tokenizer: Wire::take(reader)?,
        capabilities: Wire::take(reader)?,
    };
    match reader.bytes.len() {
        left if left > 0 && version.minor <= ours.minor => Err(DecodeError::Trailing(left).into()),
        _ => Ok(hello),
    }
}

/// Whether a frame starts like a greeting; no other frame does.
pub fn is_greeting(frame: &[u8]) -> bool {
    frame.starts_with(&MAGIC)
}

/// A server's answer to a greeting.
pub fn encode_answer(answer: &Answer) -> Vec<u8> {
    match answer {
        Answer::Welcome(welcome) => {
            let mut out = greeting(WELCOME, welcome.version);
            welcome.client.put(&mut out);
            welcome.run.put(&mut out);
            welcome.ticket.put(&mut out);
            welcome.federated_ticket.put(&mut out);
            welcome.federated_url.put(&mut out);
            welcome.ping_interval.put(&mut out);
            welcome.model.put(&mut out);
            welcome.tokenizer.put(&mut out);
            out
        }
        Answer::Refused(refused) => {
            let mut out = greeting(REFUSED, refused.version);
            refusal_code(refused.reason).put(&mut out);
            refused.detail.put(&mut out);
            out
        }
    }
}

/// Reads a server's answer. A refusal can be read whatever version the server speaks.
///
/// # Errors
/// As `decode_hello`.
pub fn decode_answer(ours: Version, frame: &[u8]) -> Result<Answer, GreetingError> {
    let (kind, version, mut reader) = open_greeting(frame)?;
    match kind {
        WELCOME => {
            if version.major != ours.major || version.minor > ours.minor {
                return Err(GreetingError::Version { ours, theirs: version });
            }
            let welcome = Welcome {
                version,
                client: Wire::take(&mut reader)?,
                run: Wire::take(&mut reader)?,
                ticket: Wire::take(&mut reader)?,
                federated_ticket: Wire::take(&mut reader)?,
                federated_url: Wire::take(&mut reader)?,
                ping_interval: Wire::take(&mut reader)?,
                model: Wire::take(&mut reader)?,
                tokenizer: Wire::take(&mut reader)?,
            };
            reader.finish()?;
            Ok(Answer::Welcome(welcome))
        }
        REFUSED => {
            let code = u16::take(&mut reader)?;
            let reason = REFUSALS.into_iter().find(|reason| refusal_code(*reason) == code);
            let detail = Wire::take(&mut reader)?;
            Ok(Answer::Refused(Refused {
                version,
                reason: reason.unwrap_or(RefusalReason::Other),
                detail,
            }))
        }
        _ => Err(GreetingError::NotThisProtocol),
    }
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
    let mut frame = Vec::with_capacity(bulk + 160);
    frame.push(0);
    number.put(&mut frame);
    acknowledged.put(&mut frame);
    frame[0] = put_message(message, &mut frame);
    frame
}

/// Brings a frame that is sent again up to date.
pub(super) fn set_acknowledged(frame: &mut [u8], acknowledged: u32) {
    if let Some(place) = frame.get_mut(5..HEADER_BYTES) {
        place.copy_from_slice(&acknowledged.to_le_bytes());
    }
}

macro_rules! messages {
    ($($name:ident($kind:ty) = $value:literal),* ; $($bare:ident = $bare_value:literal),*) => {
        /// Appends a message's body and returns its kind.
        fn put_message(message: &Message, out: &mut Vec<u8>) -> u8 {
            match message {
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
