//! The opening of a connection in bytes: a greeting and its answer.
//!
//! Separate from frames because it is what peers of any two versions must be able to read of each other.

use super::super::message::{
    Capabilities, Credential, Hello, RefusalReason, Refused, Service, Ticket, Version, Welcome,
};
use super::wire::{Reader, Wire, wire_enum, wire_struct};
use super::{DecodeError, MAGIC, MAX_HANDSHAKE_BYTES};
use crate::terms::tensor::WireForm;

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REFUSED: u8 = 3;

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

wire_enum!(Service { Main = 0, Federated = 1, Control = 2 });
wire_struct!(Capabilities {
    forms: Vec<WireForm>,
    memory_bytes: u64,
    device: String
});

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
        RefusalReason::Expelled => 16,
        RefusalReason::Other => u16::MAX,
    }
}

/// Every reason with a code of its own.
const REFUSALS: [RefusalReason; 16] = [
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
    RefusalReason::Expelled,
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
