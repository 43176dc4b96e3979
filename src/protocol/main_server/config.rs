//! What a run is, as its driver says it, and what can be wrong about that.
//!
//! Separate from the session because all of it is checked before there is one, and each later placement again.

use std::time::Duration;

use super::super::codec::MAX_HANDSHAKE_BYTES;
use super::super::frame::{adapter_frame_bytes, step_frame_bytes};
use super::super::message::{Assignment, Digest, PROTOCOL_VERSION, RunConfig, Version};
use super::super::{MAX_CLIENTS, PING_INTERVAL};
use super::lateness::Deadline;
use super::placement::Placement;
use crate::terms::ids::{ClientId, RunId};
use crate::terms::moments::Moments;
use crate::terms::tensor::WireLayout;

/// How long a ticket opens a server, unless configured otherwise.
const TICKET_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// What a run is.
pub struct MainConfig {
    /// What this server speaks: `PROTOCOL_VERSION`.
    pub version: Version,
    /// Sixteen random bytes.
    pub run: RunId,
    /// Thirty-two random bytes, from a generator fit for keys.
    pub ticket_key: [u8; 32],
    pub ticket_lifetime: Duration,
    /// The join secret; `None` lets everybody in.
    pub secret: Option<String>,
    /// The first round starts when this many are ready.
    pub clients: u32,
    /// More than these are refused.
    pub max_clients: u32,
    /// Who holds what at the start.
    pub placement: Placement,
    /// Numbers in the largest update that any placement of the run leads to, moments included.
    pub largest_update: u64,
    /// Whether the driver is asked for a plan at boundaries (`PlanWanted`).
    pub plans: bool,
    pub model: Digest,
    pub tokenizer: Digest,
    /// Where clients find the federated service; `None` is the same origin.
    pub federated_url: Option<String>,
    pub ping_interval: Duration,
    /// How long to wait for somebody to return when everybody has left.
    pub wait_for_client: Duration,
    /// How long members are waited for.
    pub deadline: Deadline,
    /// Members that a step or a round goes on with at the deadline; all of them where they are fewer. `None` is one.
    pub quorum: Option<u32>,
}

/// A mistake of the driver or of the configuration; nothing a peer sends leads here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MainError {
    #[error("{what} is {value}; it must be at least 1")]
    Zero { what: &'static str, value: u32 },
    #[error("a step of {batch} × {seq} × {width} does not fit in a frame; choose a smaller batch or sequence")]
    StepTooLarge { batch: u32, seq: u32, width: u32 },
    #[error("an update of {len} values does not fit in a frame; choose a smaller rank or split")]
    UpdateTooLarge { len: u64 },
    #[error("an adapter of {len} values leads to larger updates than the {largest} values that were announced")]
    UpdateTooLong { len: usize, largest: u64 },
    #[error("an adapter of {len} values does not divide into {split} blocks")]
    AdapterBlocks { len: usize, split: u32 },
    #[error("{found} blocks at the client, where a plan may leave {expected}")]
    Split { found: u32, expected: u32 },
    #[error("the placement's moments are not those of blocks that clients gain")]
    Moments,
    #[error("{client} is to have {cut} blocks, where the assignment has {largest}")]
    Cut { client: ClientId, cut: u32, largest: u32 },
    #[error("the shape of the run's adapters is not that of the placement")]
    Shape,
    #[error("a client is to have rank {rank}, where the run has {most}")]
    Rank { rank: u32, most: u32 },
    #[error("a copy of {given} values, where the clients' cuts differ by {expected}")]
    CopyLength { given: usize, expected: usize },
    #[error("the main server's copy has a value that is not finite")]
    CopyNotFinite,
    #[error("another placement would change more than cut and rank")]
    Fixed,
    #[error("the assignment says {assigned} adapter values, the initial adapter has {given}")]
    AdapterLength { assigned: u64, given: usize },
    #[error("the initial adapter has a value that is not finite")]
    AdapterNotFinite,
    #[error("the gradient for {client} is {given}, its activations were {expected}")]
    GradientLayout {
        client: ClientId,
        given: WireLayout,
        expected: WireLayout,
    },
}

impl MainConfig {
    /// A run that begins with this placement when `clients` are ready; at most 1024 are let in, and everybody is. Tickets are good
    /// for a day, and when everybody has left the run waits a minute. No placement follows the first.
    ///
    /// `ticket_key` is thirty-two random bytes, from a generator fit for keys.
    pub fn new(placement: Placement, ticket_key: [u8; 32], clients: u32) -> MainConfig {
        let assignment = &placement.assignment;
        MainConfig {
            version: PROTOCOL_VERSION,
            run: assignment.run,
            ticket_key,
            ticket_lifetime: TICKET_LIFETIME,
            secret: None,
            clients,
            max_clients: MAX_CLIENTS,
            largest_update: assignment.adapter_len,
            plans: false,
            model: Digest::of(assignment.model_config.as_bytes()),
            tokenizer: match assignment.tokenizer.first() {
                Some(tokenizer) => tokenizer.sha256,
                None => Digest::of(&[]),
            },
            federated_url: None,
            ping_interval: PING_INTERVAL,
            wait_for_client: Duration::from_secs(60),
            deadline: Deadline::Auto,
            quorum: None,
            placement,
        }
    }

    /// Checks the run as it is to begin. Returns the bytes of the largest frame that a client may send.
    pub(super) fn frame_limit(&self) -> Result<usize, MainError> {
        let run = &self.placement.assignment.config;
        let sizes = [
            ("the number of clients", self.clients),
            ("the most clients", self.max_clients),
            ("the quorum", self.quorum.unwrap_or(1)),
            ("the batch", run.batch),
            ("the sequence", run.seq),
            ("the width", run.width),
            ("the number of local steps", run.local_steps),
            ("the number of rounds", run.rounds),
        ];
        if let Some((what, value)) = sizes.into_iter().find(|(_, value)| *value == 0) {
            return Err(MainError::Zero { what, value });
        }
        let frame_limit = step_frame_bytes(run)
            .ok_or(MainError::StepTooLarge {
                batch: run.batch,
                seq: run.seq,
                width: run.width,
            })?
            .max(MAX_HANDSHAKE_BYTES);
        if adapter_frame_bytes(self.largest_update).is_none() {
            return Err(MainError::UpdateTooLarge {
                len: self.largest_update,
            });
        }
        self.check(&self.placement)?;
        Ok(frame_limit)
    }

    /// Whether the run may have this placement.
    pub(super) fn check(&self, placement: &Placement) -> Result<(), MainError> {
        let Assignment {
            config, adapter_len, ..
        } = &placement.assignment;
        let len = placement.adapter.len();
        if *adapter_len != len as u64 {
            return Err(MainError::AdapterLength {
                assigned: *adapter_len,
                given: len,
            });
        }
        if config.split == 0 || !adapter_len.is_multiple_of(u64::from(config.split)) {
            return Err(MainError::AdapterBlocks {
                len,
                split: config.split,
            });
        }
        if *adapter_len > self.largest_update {
            return Err(MainError::UpdateTooLong {
                len,
                largest: self.largest_update,
            });
        }
        if !placement.adapter.iter().all(|value| value.is_finite()) {
            return Err(MainError::AdapterNotFinite);
        }
        let fits = |moments: &Moments| {
            moments.are_of(moments.first.len(), moments.steps)
                && moments.are_possible()
                && moments.first.len() < len
                && (moments.first.len() as u64).is_multiple_of(placement.block_len())
        };
        if !placement.moments.as_ref().is_none_or(fits) {
            return Err(MainError::Moments);
        }
        let largest = config.split;
        if let Some((&client, &cut)) = placement.cuts.iter().find(|(_, cut)| !(1..=largest).contains(*cut)) {
            return Err(MainError::Cut { client, cut, largest });
        }
        if let Some(rule) = &placement.rule {
            let (shape, rank) = (rule.shape(), config.rank as usize);
            if shape.rank() != rank
                || shape.len(config.split as usize, rank) != len
                || shape.trained() != placement.assignment.trained
            {
                return Err(MainError::Shape);
            }
        }
        if let Some(&rank) = placement.ranks.iter().find(|rank| !(1..=config.rank).contains(*rank)) {
            return Err(MainError::Rank {
                rank,
                most: config.rank,
            });
        }
        if placement.rule.is_none() && !placement.ranks.is_empty() {
            return Err(MainError::Shape);
        }
        // Frames, steps and rounds stay as they were announced.
        let first = &self.placement.assignment;
        let same = RunConfig {
            split: first.config.split,
            rank: first.config.rank,
            alpha: first.config.alpha,
            ..config.clone()
        };
        let next = &placement.assignment;
        if same != first.config || next.run != first.run || next.alphas != first.alphas || next.trained != first.trained
        {
            return Err(MainError::Fixed);
        }
        Ok(())
    }
}
