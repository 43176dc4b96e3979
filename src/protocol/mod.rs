//! What two servers and a client owe each other, as state machines without clock, socket, thread or GPU.
//!
//! A session is a value. Frames, timeouts and local answers go in (`handle_frame`, `handle_timeout`, `connected`,
//! `disconnected` and the named answers to its events); frames and events come out (`poll_transmit`, `poll_event`) with
//! the time of the next timeout (`poll_timeout`). After every call *in*, a driver drains what comes *out*. The time is
//! an argument: a `Duration` since any fixed moment of the driver's choice. So the same code runs natively, in a browser
//! and in the simulator's virtual time.
//!
//! | file | holds |
//! |---|---|
//! | `message`, `codec` | what crosses the wire, and its bytes |
//! | `frame` | how large they may be |
//! | `link` | order, exactly-once delivery and liveness of one connection |
//! | `pace` | an emulated uplink |
//! | `dial`, `door` | the two ends of a connection's beginning |
//! | `admission` | the join secret and the tickets it is exchanged for |
//! | `client` | an edge client: both its connections |
//! | `main_server` | rounds, steps and membership; sees activations, never one client's adapter |
//! | `federated_server` | adapters of a round to their mean; never sees tokens, labels or activations |
//! | `control` | the main server's end of its link to a federated server in another process |
//! | `local` | all of them in one process |
//!
//! A frame is one WebSocket binary message.

mod admission;
pub(crate) mod client;
pub mod codec;
pub(crate) mod control;
mod dial;
mod door;
pub(crate) mod federated_server;
mod frame;
mod link;
mod local;
pub(crate) mod main_server;
pub mod message;
mod pace;

use std::time::Duration;

pub use admission::{Bearer, Bearers, is_same_secret};
pub use client::{
    ActivationsInput, AdapterInput, ClientConfig, ClientError, ClientEvent, ClientFailure, ClientSession, FinishReason,
    Passport,
};
pub use control::{ControlConfig, ControlEvent, ControlSession};
pub use dial::ConnectionFault;
pub use federated_server::{ControlAccess, FederatedConfig, FederatedEvent, FederatedServerSession};
pub use frame::MAX_FRAME_BYTES;
pub use link::{LinkError, MISSED_PINGS, silence_limit};
pub use local::{LocalEvent, LocalRun};
pub use main_server::{
    Checkpoint, ClientState, ClientStatus, CollectTime, Contribution, Deadline, DepartureReason, GradientOutput,
    LeftOut, MainConfig, MainError, MainEvent, MainServerSession, Occasion, Placement, RoundPlan, RunEnd, RunPhase,
    RunState, RunStatus, StepTimes,
};

/// How often each side of a connection pings, unless configured otherwise.
pub const PING_INTERVAL: Duration = Duration::from_secs(5);

/// More clients than these are refused, unless configured otherwise.
pub(crate) const MAX_CLIENTS: u32 = 1024;

/// A server's connection. The driver numbers them and never uses a number again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// One of a client's two connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// `/main`
    Main,
    /// `/federated`
    Federated,
}

/// What a driver is to do with a socket. Frames come before the close that follows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transmit<P> {
    Frame { to: P, bytes: Vec<u8> },
    Close { to: P },
}

/// The earlier of two deadlines, either of which may be missing.
fn earlier(left: Option<Duration>, right: Option<Duration>) -> Option<Duration> {
    match (left, right) {
        (Some(left), Some(right)) => Some(left.min(right)),
        (left, right) => left.or(right),
    }
}

/// A name fit for a terminal, a log and a page: one line, not long.
fn display_name(name: &str) -> String {
    const LONGEST: usize = 64;
    let name: String = name
        .trim()
        .chars()
        .filter(|character| !character.is_control())
        .take(LONGEST)
        .collect();
    if name.is_empty() { "unnamed".to_owned() } else { name }
}
