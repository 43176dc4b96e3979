//! Every message that crosses the wire, as plain values.
//!
//! The types are separate from their bytes (`codec`) and from the state machines that exchange them, so that drivers,
//! simulator and tests can name a message without knowing how it is framed or when it may be sent.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::terms::format::Format;
use crate::terms::ids::{ClientId, RoundKey, RunId, StepKey};
use crate::terms::moments::{MomentPolicy, Moments};
use crate::terms::optimizer::OptimizerSettings;
use crate::terms::speed::Speed;
use crate::terms::tensor::{WireForm, WireLayout, WireTensor};

/// The protocol this crate speaks. Peers with another major version are refused; of two minors the lower is used.
pub const PROTOCOL_VERSION: Version = Version { major: 3, minor: 0 };

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

/// A SHA-256 digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// The digest of a flat adapter: of its values as little-endian f32.
    pub fn of_values(values: &[f32]) -> Digest {
        let mut hasher = Sha256::new();
        for chunk in values.chunks(1024) {
            let mut bytes = [0_u8; 4096];
            for (slot, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(chunk) {
                *slot = value.to_le_bytes();
            }
            hasher.update(&bytes[..chunk.len() * 4]);
        }
        Digest(hasher.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// The text is not 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a digest is 64 hexadecimal digits")]
pub struct ParseDigestError;

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Digest, ParseDigestError> {
        let mut digest = [0_u8; 32];
        if text.len() != 64 || !text.is_ascii() {
            return Err(ParseDigestError);
        }
        for (byte, pair) in digest.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
            let high = char::from(pair[0]).to_digit(16).ok_or(ParseDigestError)?;
            let low = char::from(pair[1]).to_digit(16).ok_or(ParseDigestError)?;
            *byte = u8::try_from(high * 16 + low).map_err(|_| ParseDigestError)?;
        }
        Ok(Digest(digest))
    }
}

/// What every client of a run must agree on.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// Blocks the client holds: `[0, split)`.
    pub split: u32,
    pub rank: u32,
    pub alpha: f32,
    /// Adapted matrices, by their short names (`c_attn`, `c_proj`, `c_fc`).
    pub targets: Vec<String>,
    pub weights: Format,
    pub wire: WireForm,
    /// Largest batch of a step.
    pub batch: u32,
    /// Longest sequence of a step.
    pub seq: u32,
    pub width: u32,
    pub vocab: u32,
    pub seed: u64,
    pub shuffle: bool,
    pub local_steps: u32,
    pub rounds: u32,
    pub optimizer: OptimizerSettings,
    pub moments: MomentPolicy,
}

impl RunConfig {
    /// The largest tensor of a step.
    pub fn largest_tensor(&self) -> WireLayout {
        WireLayout {
            form: self.wire,
            batch: self.batch,
            seq: self.seq,
            width: self.width,
        }
    }

    /// Whether a step may have a tensor of this layout.
    pub fn takes(&self, layout: WireLayout) -> bool {
        (1..=self.batch).contains(&layout.batch)
            && (1..=self.seq).contains(&layout.seq)
            && (layout.width, layout.form) == (self.width, self.wire)
    }
}

/// A file served over HTTP by its content's hash, at `/weights/<sha256>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    pub name: String,
    pub sha256: Digest,
    pub bytes: u64,
}

/// What a client needs in order to take part: when it joins, and again whenever the run's cut or rank changes. Its adapter
/// comes later, with the round it starts in.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    pub run: RunId,
    /// Counts the run's assignments; every client has the latest before a round starts.
    pub number: u32,
    pub config: RunConfig,
    /// The model's `config.json`.
    pub model_config: String,
    /// The embedding and the client's blocks, in order.
    pub weights: Vec<Blob>,
    pub tokenizer: Vec<Blob>,
    /// Numbers in the client side's flat adapter.
    pub adapter_len: u64,
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

/// The rates of a client's emulated uplinks, in bits per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkRates {
    pub main_bits_per_s: f64,
    pub federated_bits_per_s: f64,
}

impl LinkRates {
    /// The fastest that is emulated.
    const MOST: f64 = 1e15;

    /// `None` for rates that no link has: not finite, less than 1, or more than 10^15.
    pub fn new(main_bits_per_s: f64, federated_bits_per_s: f64) -> Option<LinkRates> {
        let possible = |rate: f64| (1.0..=LinkRates::MOST).contains(&rate);
        (possible(main_bits_per_s) && possible(federated_bits_per_s)).then_some(LinkRates {
            main_bits_per_s,
            federated_bits_per_s,
        })
    }
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
    /// A reason a newer server gave that this version has no name for; the detail says it.
    Other,
}

impl RefusalReason {
    /// Whether the bearer tried to come in without the right to: what a server limits per address.
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

/// Main → client: the round begins from the adapter of digest `base`.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundStart {
    pub round: RoundKey,
    pub base: Digest,
    pub members: u32,
    /// The base itself, for a client that was not in the average it comes from.
    pub adapter: Option<Vec<f32>>,
    /// Moments of the blocks that this client did not have before, the last of its own.
    pub moments: Option<Moments>,
    /// How fast the client's uplinks are to be in this round; as fast as they are where there is nothing.
    pub rates: Option<LinkRates>,
}

/// Client → main: the assignment of that number is loaded, the federated service is connected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ready {
    pub assignment: u32,
    /// As measured on the part that is loaded.
    pub speed: Option<Speed>,
}

/// Main → client: send the activations of this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepStart {
    pub key: StepKey,
    pub members: u32,
}

/// Client → main: what crosses the cut.
#[derive(Clone, Debug, PartialEq)]
pub struct Activations {
    pub key: StepKey,
    /// The cut they were made at: blocks run.
    pub split: u32,
    /// Examples in the batch.
    pub examples: u32,
    /// What the forward pass took.
    pub forward: Duration,
    /// `(batch, seq)`; `IGNORED_TARGET` takes no part in the loss.
    pub targets: Vec<i32>,
    /// `(batch, seq, width)`
    pub tensor: WireTensor,
}

/// Main → client: the loss gradient of its activations.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradient {
    pub key: StepKey,
    /// Digest of the bytes of the activations this belongs to.
    pub activations: Digest,
    /// Mean loss of this client's targets.
    pub loss: f32,
    /// Targets of this client that took part.
    pub tokens: u64,
    /// Mean loss over all members' targets.
    pub mean_loss: f32,
    /// `(batch, seq, width)`: `d loss / d activations`.
    pub tensor: WireTensor,
}

/// Client → main: the backward pass and the optimiser step are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepDone {
    pub key: StepKey,
    /// What they took.
    pub backward: Duration,
}

/// Main → client: the round's steps are done; send the adapter to the federated server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundEnd {
    pub round: RoundKey,
    /// Blocks the client will hold afterwards. The moments of those that leave it go with the adapter …
    pub split: u32,
    /// … as after so many optimiser steps.
    pub steps: u64,
}

/// Client → federated: its adapter after the round's last local step.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterUpdate {
    pub run: RunId,
    pub round: RoundKey,
    /// Digest of the adapter the round started from.
    pub base: Digest,
    /// Examples used in the round: its weight.
    pub examples: u64,
    pub values: Vec<f32>,
    /// Of the blocks that leave the client, the last of its own.
    pub moments: Option<Moments>,
}

/// Federated → client: the average of the round's adapters, as far as the client's blocks go.
#[derive(Clone, Debug, PartialEq)]
pub struct Average {
    pub round: RoundKey,
    pub digest: Digest,
    pub values: Vec<f32>,
}

/// Federated → client: an update that came too late or for another round. The client waits for its next round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpdateDeclined {
    pub round: RoundKey,
    /// The round that is open, if one is.
    pub open: Option<RoundKey>,
    pub detail: String,
}

/// Main → client, after each round: for people.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundResult {
    pub round: u32,
    pub rounds: u32,
    /// Adapters in the average.
    pub included: u32,
    /// Mean validation loss, when the server validates.
    pub valid_loss: Option<f64>,
    /// Local steps done in the run so far.
    pub steps: u32,
    pub total_steps: u32,
}

/// Why a server ends a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StopReason {
    /// The run has done all its rounds.
    Completed,
    /// The server is going down or was told to stop.
    Shutdown,
    /// A message that has no place where it came.
    Unexpected,
    /// Activations or an adapter that cannot be used.
    BadUpdate,
    /// Left out of the round by the federated server. Joining again is welcome.
    Excluded,
    /// The same client opened another connection.
    Superseded,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StopReason::Completed => "the run is complete",
            StopReason::Shutdown => "the server stopped",
            StopReason::Unexpected => "the server did not expect a message",
            StopReason::BadUpdate => "the server could not use an update",
            StopReason::Excluded => "left out of the round",
            StopReason::Superseded => "this client is connected elsewhere",
        })
    }
}

/// Server → client: the session is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    pub reason: StopReason,
    pub detail: String,
    /// When to come back, if that makes sense.
    pub return_after: Option<Duration>,
}

/// Moments that come with an adapter: of so many values, the last ones, as after so many steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaving {
    pub len: u64,
    pub steps: u64,
}

/// A member of a round that opens, and the adapter it starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub client: ClientId,
    pub base: Digest,
    /// Numbers in its adapter, which are the first of the round's.
    pub adapter_len: u64,
}

/// Main → federated server. In one process the driver hands these over as values.
#[derive(Clone, PartialEq)]
pub enum Control {
    /// Opens the run, or repeats what is known after the link was lost.
    OpenRun {
        run: RunId,
        /// Key of the run's tickets.
        ticket_key: [u8; 32],
        /// The main server's clock at sending, by which tickets expire.
        now: Duration,
        ticket_lifetime: Duration,
        /// Numbers in the largest update the run can lead to, moments included.
        largest_update: u64,
        /// Clients' identity of the run, echoed in the handshake.
        model: Digest,
        tokenizer: Digest,
    },
    OpenRound {
        round: RoundKey,
        members: Vec<Member>,
        /// Numbers in the average: in the adapter of the deepest cut of the run.
        adapter_len: u64,
        /// Most examples one member can have used in the round.
        max_examples: u64,
    },
    /// Members have been asked for their adapters.
    Collect {
        round: RoundKey,
        /// What comes with the adapter.
        moments: Option<Leaving>,
        /// The main server's copy of the last of the average's values: of the blocks that not all members have.
        copy: Vec<f32>,
    },
    /// A member left the open round.
    Departed { round: RoundKey, client: ClientId },
    /// The run is over.
    CloseRun,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Control::OpenRun {
                run, largest_update, ..
            } => write!(f, "OpenRun({run}, at most {largest_update} numbers)"),
            Control::OpenRound { round, members, .. } => write!(f, "OpenRound({round}, {members:?})"),
            Control::Collect { round, moments, copy } => {
                write!(f, "Collect({round}, {moments:?}, a copy of {} values)", copy.len())
            }
            Control::Departed { round, client } => write!(f, "Departed({round}, {client})"),
            Control::CloseRun => write!(f, "CloseRun"),
        }
    }
}

/// Why a member's adapter is not in the average.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExclusionReason {
    /// The main server said it left.
    Departed,
    /// It has had no connection to the federated server for too long.
    Absent,
    /// Its adapter, or the moments with it, have the wrong length.
    WrongLength,
    /// Its adapter has a value that is not finite, or its moments one that cannot be.
    NotFinite,
    /// Its adapter comes from another base.
    WrongBase,
    /// It claims no examples, or more than a round has.
    Examples,
    /// It broke the protocol.
    Misbehaved,
}

impl fmt::Display for ExclusionReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ExclusionReason::Departed => "left the round",
            ExclusionReason::Absent => "not connected to the federated server",
            ExclusionReason::WrongLength => "its adapter has the wrong length",
            ExclusionReason::NotFinite => "its adapter has a value that is not finite",
            ExclusionReason::WrongBase => "its adapter comes from another base",
            ExclusionReason::Examples => "its number of examples is impossible",
            ExclusionReason::Misbehaved => "it broke the protocol",
        })
    }
}

/// A member left out of a round, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exclusion {
    pub client: ClientId,
    pub reason: ExclusionReason,
}

/// A member of an average and its number of examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inclusion {
    pub client: ClientId,
    pub examples: u64,
}

/// Federated → main server.
#[derive(Clone, Debug, PartialEq)]
pub enum ControlReply {
    /// A member was left out while the round goes on.
    Excluded { round: RoundKey, exclusion: Exclusion },
    /// A member's adapter has come, in a frame of so many bytes.
    Received {
        round: RoundKey,
        client: ClientId,
        bytes: u64,
    },
    /// The round is averaged. No individual adapter is in here, unless one client was alone, or alone with its last blocks.
    RoundClosed(RoundClosed),
}

/// What members' adapters come to, each weighted by its examples.
#[derive(Clone, Debug, PartialEq)]
pub struct Mean {
    /// Of `values`.
    pub digest: Digest,
    pub values: Vec<f32>,
    /// Of the blocks that leave the clients.
    pub moments: Option<Moments>,
}

/// The outcome of a round at the federated server.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundClosed {
    pub round: RoundKey,
    pub included: Vec<Inclusion>,
    pub excluded: Vec<Exclusion>,
    /// `None` when nobody was left.
    pub average: Option<Mean>,
}

/// A message after the handshake.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    Assignment(Box<Assignment>),
    Ready(Ready),
    RoundStart(RoundStart),
    StepStart(StepStart),
    Activations(Activations),
    Gradient(Gradient),
    StepDone(StepDone),
    RoundEnd(RoundEnd),
    AdapterUpdate(AdapterUpdate),
    Average(Average),
    UpdateDeclined(UpdateDeclined),
    RoundResult(RoundResult),
    /// Client → either server: goodbye.
    Leave,
    Stop(Stop),
    Control(Control),
    ControlReply(ControlReply),
}

impl Message {
    /// The message's kind, for error texts.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Assignment(_) => "Assignment",
            Message::Ready(_) => "Ready",
            Message::RoundStart(_) => "RoundStart",
            Message::StepStart(_) => "StepStart",
            Message::Activations(_) => "Activations",
            Message::Gradient(_) => "Gradient",
            Message::StepDone(_) => "StepDone",
            Message::RoundEnd(_) => "RoundEnd",
            Message::AdapterUpdate(_) => "AdapterUpdate",
            Message::Average(_) => "Average",
            Message::UpdateDeclined(_) => "UpdateDeclined",
            Message::RoundResult(_) => "RoundResult",
            Message::Leave => "Leave",
            Message::Stop(_) => "Stop",
            Message::Control(_) => "Control",
            Message::ControlReply(_) => "ControlReply",
        }
    }
}
