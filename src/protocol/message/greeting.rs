//! How a connection begins: who comes, with what right, and the answer.
//!
//! Separate because all of it is said once, before anything of the run.

use std::fmt;
use std::time::Duration;

use super::Digest;
use crate::terms::ids::{ClientId, RunId};
use crate::terms::tensor::WireForm;

/// The protocol this crate speaks. Peers with another major version are refused; of two minors the lower is used.
pub const PROTOCOL_VERSION: Version = Version { major: 3, minor: 2 };

/// The first version in which an assignment can have [`Assignment::alphas`](super::Assignment::alphas).
pub const ALPHAS_SINCE: Version = Version { major: 3, minor: 1 };

/// The first version in which a round can go on without a client that is there: it may be sent the next step, the round's end or the
/// next round instead of what it waits for. Also the first of [`StopReason::Late`](super::StopReason::Late),
/// [`ExclusionReason::Late`](super::ExclusionReason::Late), [`ExclusionReason::Outlier`](super::ExclusionReason::Outlier) and
/// [`Control::Base`](super::Control::Base).
pub const DEADLINES_SINCE: Version = Version { major: 3, minor: 2 };

/// The first version in which messages with tensors and adapters carry a digest of themselves.
pub const DIGESTS_SINCE: Version = Version { major: 3, minor: 2 };

/// The first version in which a run says how adapters are aggregated ([`Control::Rule`](super::Control::Rule)): of what a client
/// trains ([`Assignment::trained`](super::Assignment::trained)), of moments that begin anew
/// ([`MomentPolicy::Reset`](crate::terms::moments::MomentPolicy)), and of members with ranks of their own.
pub const AGGREGATION_SINCE: Version = Version { major: 3, minor: 2 };

/// A protocol version. Minor versions only append fields and message kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    pub major: u16,
    pub minor: u16,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a client's machine can do.
#[derive(Clone, Debug, PartialEq)]
pub struct Capabilities {
    /// What it can encode and decode.
    pub forms: Vec<WireForm>,
    /// Memory it can give, in bytes; 0 when unknown.
    pub memory_bytes: u64,
    /// Device name, for people.
    pub device: String,
}

/// Which service a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Service {
    /// Activations and gradients: a client at the main server.
    Main,
    /// Adapters: a client at the federated server.
    Federated,
    /// The main server at the federated server.
    Control,
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Service::Main => "main",
            Service::Federated => "federated",
            Service::Control => "control",
        })
    }
}

/// An opaque pass a server gave. Only servers look inside.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket(pub Vec<u8>);

impl Ticket {
    /// As the bearer of an HTTP request carries it: hexadecimal digits.
    pub fn to_bearer(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// `None` for a text that is no ticket.
    pub fn from_bearer(text: &str) -> Option<Ticket> {
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?));
        rest.is_empty().then(|| bytes.collect()).flatten().map(Ticket)
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({} bytes)", self.0.len())
    }
}

/// Why the bearer may come in.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    None,
    /// The join secret.
    Secret(String),
    Ticket(Ticket),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credential::None => "None",
            Credential::Secret(_) => "Secret(..)",
            Credential::Ticket(_) => "Ticket(..)",
        })
    }
}

/// The first frame of a connection.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    pub version: Version,
    pub service: Service,
    pub credential: Credential,
    pub name: String,
    /// The model this client expects; `None` takes the server's.
    pub model: Option<Digest>,
    /// The tokenizer this client expects; `None` takes the server's.
    pub tokenizer: Option<Digest>,
    pub capabilities: Capabilities,
}

/// The answer that lets a connection in.
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// The version both speak from here on.
    pub version: Version,
    pub client: ClientId,
    pub run: RunId,
    /// For the next connection to this service; the one presented is spent.
    pub ticket: Ticket,
    /// For the federated service; given by the main service only.
    pub federated_ticket: Option<Ticket>,
    /// Where the federated service is; `None` is the same origin.
    pub federated_url: Option<String>,
    pub ping_interval: Duration,
    pub model: Digest,
    pub tokenizer: Digest,
}

/// Why a connection was not let in. The numbers are frozen over all protocol versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RefusalReason {
    /// The first frame is not a greeting of this protocol.
    NotThisProtocol,
    /// The major versions differ.
    Version,
    Malformed,
    /// Another service lives at this address.
    Service,
    /// The run needs its join secret.
    SecretMissing,
    SecretWrong,
    /// The ticket was not made by this run's servers.
    TicketForged,
    TicketExpired,
    /// The ticket was used before, by a connection that went on to speak.
    TicketSpent,
    /// The ticket is for another run.
    TicketOtherRun,
    Model,
    Tokenizer,
    /// The client cannot encode the run's wire form.
    WireForm,
    /// The run is over, or has not begun at this service.
    NoRun,
    /// As many clients as this server takes are connected.
    Full,
    /// The bearer was thrown out of the run.
    Expelled,
    /// A reason a newer server gave that this version has no name for; the detail says it.
    Other,
}

impl RefusalReason {
    /// Whether the bearer tried to come in without the right to.
    pub fn is_authorisation_failure(self) -> bool {
        matches!(
            self,
            RefusalReason::SecretMissing
                | RefusalReason::SecretWrong
                | RefusalReason::TicketForged
                | RefusalReason::TicketExpired
                | RefusalReason::TicketSpent
                | RefusalReason::TicketOtherRun
        )
    }
}

impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RefusalReason::NotThisProtocol => "this is not an sflllm connection",
            RefusalReason::Version => "the protocol versions do not fit; update the older side",
            RefusalReason::Malformed => "the greeting is malformed",
            RefusalReason::Service => "this address serves another purpose",
            RefusalReason::SecretMissing => "this run needs its join token; give --token",
            RefusalReason::SecretWrong => "the join token is wrong; copy it again from the server",
            RefusalReason::TicketForged => "the ticket was not issued by this server; join again with the join token",
            RefusalReason::TicketExpired => "the ticket has expired; join again with the join token",
            RefusalReason::TicketSpent => "the ticket has been used; join again with the join token",
            RefusalReason::TicketOtherRun => "the ticket belongs to another run; join again with the join token",
            RefusalReason::Model => "the server trains another model",
            RefusalReason::Tokenizer => "the server uses another tokenizer",
            RefusalReason::WireForm => "this client cannot encode the run's wire form",
            RefusalReason::NoRun => "no run is open here",
            RefusalReason::Expelled => "this client was thrown out of the run",
            RefusalReason::Full => "the server has as many clients as it takes; try later",
            RefusalReason::Other => "the server refused",
        })
    }
}

/// The answer that keeps a connection out. Its layout is frozen over all protocol versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What the server speaks.
    pub version: Version,
    pub reason: RefusalReason,
    pub detail: String,
}
