//! Every message that crosses the wire, as plain values.
//!
//! The types are separate from their bytes (`codec`) and from the state machines that exchange them, so that drivers,
//! simulator and tests can name a message without knowing how it is framed or when it may be sent.

mod control;
mod digest;
mod greeting;
mod training;

pub use control::{Control, ControlReply, Exclusion, ExclusionReason, Inclusion, Leaving, Mean, Member, RoundClosed};
pub use digest::{Digest, ParseDigestError};
pub use greeting::{
    AGGREGATION_SINCE, ALPHAS_SINCE, Capabilities, Credential, DEADLINES_SINCE, DIGESTS_SINCE, Hello, PROTOCOL_VERSION,
    RefusalReason, Refused, Service, Ticket, Version, Welcome,
};
pub use training::{
    Activations, AdapterUpdate, Assignment, Average, Blob, Gradient, LinkRates, OwnAlpha, Ready, RoundEnd, RoundResult,
    RoundStart, RunConfig, StepDone, StepStart, Stop, StopReason, UpdateDeclined,
};

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
