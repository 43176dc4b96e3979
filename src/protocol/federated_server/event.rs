//! How the service is run, and what its driver is told.
//!
//! Separate so that drivers can be read against this page alone.

use std::time::Duration;

use super::super::message::{Exclusion, ExclusionReason, Inclusion, PROTOCOL_VERSION, RefusalReason, Version};
use super::super::{ConnectionId, DepartureReason, MAX_CLIENTS, PING_INTERVAL};
use crate::terms::aggregation::Aggregation;
use crate::terms::ids::{ClientId, RoundKey};

/// Where the main server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlAccess {
    /// In this process: `handle_control` and `poll_control`.
    Local,
    /// Behind a connection for the service `Control`, let in by the join secret.
    Remote { secret: Option<String> },
}

/// How the federated service is run. What is averaged comes with `Control::OpenRun`.
pub struct FederatedConfig {
    /// What this server speaks: `PROTOCOL_VERSION`.
    pub version: Version,
    pub control: ControlAccess,
    /// What a main server's runs are to be aggregated by; another is refused. `None` leaves it to the main server.
    pub aggregation: Option<Aggregation>,
    /// More clients than these are refused.
    pub max_clients: u32,
    pub ping_interval: Duration,
}

impl Default for FederatedConfig {
    /// For a main server in this process, and 1024 clients.
    fn default() -> FederatedConfig {
        FederatedConfig {
            version: PROTOCOL_VERSION,
            control: ControlAccess::Local,
            aggregation: None,
            max_clients: MAX_CLIENTS,
            ping_interval: PING_INTERVAL,
        }
    }
}

/// What the driver should know.
#[derive(Clone, Debug, PartialEq)]
pub enum FederatedEvent {
    ClientRefused {
        connection: ConnectionId,
        reason: RefusalReason,
    },
    ClientJoined {
        connection: ConnectionId,
        client: ClientId,
        name: String,
    },
    ClientLeft {
        client: ClientId,
        reason: DepartureReason,
    },
    ControlConnected {
        connection: ConnectionId,
    },
    ControlLost,
    UpdateAccepted {
        client: ClientId,
        round: RoundKey,
        examples: u64,
    },
    ClientExcluded {
        client: ClientId,
        round: RoundKey,
        reason: ExclusionReason,
    },
    RoundClosed {
        round: RoundKey,
        included: Vec<Inclusion>,
        excluded: Vec<Exclusion>,
    },
    RunClosed,
}
