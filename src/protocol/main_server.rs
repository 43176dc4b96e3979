//! The main server's session: who is in the run, and the rounds and steps they take together.
//!
//! One object for the run and all its connections. It decides when a round starts, gathers each step's activations,
//! hands them to the driver, sends the gradients back, and after the last local step waits for the federated server's
//! average. It sees activations and targets, never one client's adapter.
//!
//! Who holds which blocks is a `Placement`: the run begins with one, and may be given another at any boundary. At a boundary
//! the driver is asked what is to hold for the next round (`PlanWanted`) before clients are asked for their adapters, so that
//! they know which moments go with them. A round starts when everybody who was there has loaded the latest assignment.
//!
//! Clients may have cuts of their own, from before the first round to the end of the run. The main server then holds the blocks
//! from the smallest cut on, and its copy of those up to the largest is averaged with the clients' (`CopyWanted`).
//!
//! Membership is frozen when a round starts and can only shrink within it; a client that joins meanwhile waits for the
//! next boundary. Every change of membership goes through `retest`, so no step waits for somebody who has left.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::admission::{Admission, Pass, TicketOffice, check_secret};
use super::codec::{HEADER_BYTES, MAX_HANDSHAKE_BYTES};
use super::door::{Door, Heard};
use super::link::silence_limit;
use super::message::*;
use super::{ConnectionId, MAX_FRAME_BYTES, Transmit, display_name, earlier};
use crate::terms::ids::{ClientId, RoundKey, RunId, StepKey};
use crate::terms::moments::Moments;
use crate::terms::phases::Phases;
use crate::terms::speed::Speed;
use crate::terms::tensor::{IGNORED_TARGET, WireLayout, WireTensor};

/// Room for everything in a frame but its tensors.
const FRAME_SLACK_BYTES: usize = 1024;

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
}

/// Who holds which blocks, and in which state they come to the clients.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// What clients at the largest cut get, and others the beginning of; its number is set by the session.
    pub assignment: Assignment,
    /// The client side's adapter, flat.
    pub adapter: Vec<f32>,
    /// Moments of the blocks that clients did not hold before, the last of theirs; `None` where they start anew.
    pub moments: Option<Moments>,
    /// Clients' own cuts, up to the assignment's. Without any that is everybody's; else who has none gets the smallest.
    pub cuts: BTreeMap<ClientId, u32>,
}

/// What is to hold from the next round on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoundPlan {
    /// Blocks of the client, if it is to be another number than now: possible where `PlanWanted` says so, and clients have
    /// no cuts of their own.
    pub split: Option<u32>,
    /// Of the emulated uplinks; a client without a rate has none.
    pub rates: BTreeMap<ClientId, LinkRates>,
}

/// When a plan is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Nothing is trained yet: before `planned`, `place` may change cut and rank.
    Start,
    /// The steps of this round are done: the split may change.
    Boundary(RoundKey),
    /// Clients are ready whom the last plan did not know.
    Membership,
}

/// How long the phases of one client's step took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTimes {
    pub client: ClientId,
    /// Forward and backward as the client says; the upload from the time the client was free to start until its activations had
    /// come, less the forward pass; the download from the time the gradient went out until the client was done, less the backward
    /// pass.
    pub phases: Phases<Duration>,
    /// Of the frames with activations and gradient.
    pub bytes_up: u64,
    pub bytes_down: u64,
}

/// A member's adapter on its way to the federated server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CollectTime {
    pub client: ClientId,
    /// From asking for the adapter until the federated server had it.
    pub took: Duration,
    pub bytes: u64,
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

/// One member's part of a step, as checked: the tensor is finite and its layout is one of the assignment's; targets are in the
/// vocabulary or ignored.
#[derive(Clone, Debug, PartialEq)]
pub struct Contribution {
    pub client: ClientId,
    /// Blocks run at the client.
    pub split: u32,
    pub examples: u32,
    /// Targets that take part in the loss. May be zero: such a member's loss and gradient are zero.
    pub tokens: u64,
    /// Its share of the step's loss, `tokens / Σ tokens`. The shares of a step add up to 1.
    pub weight: f64,
    /// `(batch, seq)`
    pub targets: Vec<i32>,
    /// `(batch, seq, width)`
    pub activations: WireTensor,
}

/// What the driver computed for one member.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientOutput {
    pub client: ClientId,
    /// Mean loss of its targets.
    pub loss: f32,
    /// Gradient of that loss by its activations, in their layout.
    pub gradient: WireTensor,
}

/// Why a client is no longer in the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DepartureReason {
    /// It said goodbye.
    Left,
    /// Its connection closed.
    Disconnected,
    /// It was silent for too long.
    Silent,
    /// It opened another connection.
    Superseded,
    /// It broke the protocol.
    Misbehaved(String),
    /// The federated server left it out.
    Excluded(ExclusionReason),
    /// Its activations led to a loss or gradient the driver could not use.
    Unusable,
}

impl std::fmt::Display for DepartureReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DepartureReason::Left => f.write_str("left"),
            DepartureReason::Disconnected => f.write_str("disconnected"),
            DepartureReason::Silent => f.write_str("went silent"),
            DepartureReason::Superseded => f.write_str("connected again"),
            DepartureReason::Misbehaved(detail) => write!(f, "broke the protocol: {detail}"),
            DepartureReason::Excluded(reason) => write!(f, "left out of the round: {reason}"),
            DepartureReason::Unusable => f.write_str("its activations gave no usable loss or gradient"),
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    Completed,
    /// Everybody left and nobody came back in time.
    NoClients,
    Stopped(String),
    /// The federated server returned something that is not an average of this run.
    FederatedFault(String),
}

/// What the driver should know or do.
#[derive(Clone, Debug, PartialEq)]
pub enum MainEvent {
    ClientRefused {
        connection: ConnectionId,
        reason: RefusalReason,
    },
    ClientJoined {
        connection: ConnectionId,
        client: ClientId,
        name: String,
        device: String,
    },
    ClientReady {
        client: ClientId,
    },
    ClientLeft {
        client: ClientId,
        name: String,
        reason: DepartureReason,
    },
    RoundStarted {
        round: RoundKey,
        members: Vec<ClientId>,
    },
    /// Compute the step and answer with `step_result`.
    StepReady {
        key: StepKey,
        contributions: Vec<Contribution>,
    },
    /// All members that are left have done this step.
    StepMeasured {
        key: StepKey,
        clients: Vec<StepTimes>,
    },
    /// Say what is to hold next, with `planned`.
    PlanWanted {
        occasion: Occasion,
    },
    /// The round's adapters are collected: answer with `copy`, the main server's values of the blocks that some clients have
    /// and others do not.
    CopyWanted {
        round: RoundKey,
    },
    /// Take the average, which goes as far as the largest cut, validate, save, and answer with `validated`. If `split` is
    /// another number than that of the placement, the answer brings the placement for it.
    RoundClosed {
        round: RoundKey,
        average: Vec<f32>,
        /// Of the blocks that leave the clients.
        moments: Option<Moments>,
        split: u32,
        included: Vec<Inclusion>,
        excluded: Vec<Exclusion>,
        collected: Vec<CollectTime>,
    },
    /// Every member left. The round starts again, under another attempt, when somebody is ready; the server's adapter
    /// should go back to where the round began.
    RoundLost {
        round: RoundKey,
    },
    /// Nobody is left to train with; the run stops at `until`.
    Waiting {
        until: Duration,
    },
    Finished {
        reason: RunEnd,
    },
    /// All clients have been told and are gone.
    Drained,
}

/// Where the run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunPhase {
    /// For clients to join or return.
    Waiting,
    /// For activations.
    Gathering,
    /// For the driver's `step_result`.
    Computing,
    /// For the last step's backward passes, or for the driver's `planned`.
    Boundary,
    /// For the federated server.
    Averaging,
    /// For the driver's `validated`.
    Validating,
    Finished,
}

/// A client as the status shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientStatus {
    pub client: ClientId,
    pub name: String,
    pub device: String,
    /// Memory it can give, in bytes; 0 when unknown.
    pub memory_bytes: u64,
    pub speed: Option<Speed>,
    pub ready: bool,
    /// Whether it is a member of the current round.
    pub member: bool,
    /// Whether the current step waits for its activations.
    pub awaited: bool,
}

/// The run at a glance.
#[derive(Clone, Debug, PartialEq)]
pub struct RunStatus {
    pub phase: RunPhase,
    pub round: u32,
    pub rounds: u32,
    /// Local step within the round.
    pub step: u32,
    pub local_steps: u32,
    /// Connected clients.
    pub clients: Vec<ClientStatus>,
}

/// What is kept of a client over its connections.
struct Client {
    name: String,
    device: String,
    memory_bytes: u64,
    speed: Option<Speed>,
    connection: Option<ConnectionId>,
    /// It has loaded the latest assignment.
    ready: bool,
    /// It was told of the latest assignment at a boundary, so the moments that come with that are its own too.
    carries: bool,
    /// Digest of the adapter it is known to hold.
    holds: Option<Digest>,
    /// Tickets below this serial are spent.
    next_serial: u64,
}

/// What is kept of a contribution while the driver computes.
struct Received {
    layout: WireLayout,
    tokens: u64,
    activations: Digest,
}

/// A member of the current step.
#[derive(Clone, Copy, Debug)]
struct Clock {
    /// When it was free to start.
    asked: Duration,
    /// Forward and upload, once its activations have come.
    phases: Phases<Duration>,
    bytes_up: u64,
}

/// A step whose gradients are out.
struct Finishing {
    key: StepKey,
    sent: Duration,
    /// Members' times, once they are done; before that without download and backward.
    members: BTreeMap<ClientId, (bool, StepTimes)>,
}

enum Phase {
    Waiting {
        until: Option<Duration>,
    },
    Gathering {
        key: StepKey,
        members: BTreeMap<ClientId, Option<(Received, Contribution)>>,
    },
    Computing {
        key: StepKey,
        members: BTreeMap<ClientId, Received>,
    },
    Boundary {
        members: BTreeSet<ClientId>,
    },
    Averaging {
        members: BTreeSet<ClientId>,
        /// Blocks at the clients afterwards.
        split: u32,
        /// What stands in for the blocks that some members lack; `None` until the driver has given it.
        copy: Option<Vec<f32>>,
        /// When they were asked for their adapters.
        asked: Duration,
        collected: Vec<CollectTime>,
    },
    Validating {
        round: RoundKey,
        included: u32,
        split: u32,
    },
    Finished {
        drain_by: Duration,
        drained: bool,
    },
}

/// The main server's state machine.
pub struct MainServerSession {
    config: MainConfig,
    office: TicketOffice,
    door: Door<ClientId>,
    clients: BTreeMap<ClientId, Client>,
    next_client: u64,
    has_started: bool,
    round: RoundKey,
    phase: Phase,
    /// The client side of the model as it is now; its adapter is the base of the next round.
    placement: Placement,
    /// Digests of the adapters that clients start the next round from, by cut.
    bases: BTreeMap<u32, Digest>,
    /// Steps computed in the run.
    steps: u64,
    clocks: BTreeMap<ClientId, Clock>,
    finishing: Option<Finishing>,
    /// Clients who were ready when the latest placement came and have not left: the next round waits for them.
    expected: BTreeSet<ClientId>,
    /// Clients that the latest plan is for, and what the next is being made for.
    planned: BTreeSet<ClientId>,
    planning: Option<Occasion>,
    rates: BTreeMap<ClientId, LinkRates>,
    frame_limit: usize,
    events: VecDeque<MainEvent>,
    controls: VecDeque<Control>,
}

/// Bytes of the largest frame with activations or a gradient; `None` when it is larger than any frame may be.
pub(super) fn step_frame_bytes(config: &RunConfig) -> Option<usize> {
    let tensor = config.largest_tensor();
    let bytes = tensor
        .rows()?
        .checked_mul(4)?
        .checked_add(tensor.bytes()?)?
        .checked_add(HEADER_BYTES + FRAME_SLACK_BYTES)?;
    (bytes <= MAX_FRAME_BYTES).then_some(bytes)
}

/// Bytes of the largest frame with a flat adapter; `None` when it is larger than any frame may be.
pub(super) fn adapter_frame_bytes(adapter_len: u64) -> Option<usize> {
    let bytes = usize::try_from(adapter_len)
        .ok()?
        .checked_mul(4)?
        .checked_add(HEADER_BYTES + FRAME_SLACK_BYTES)?;
    (bytes <= MAX_FRAME_BYTES).then_some(bytes)
}

impl Placement {
    /// Blocks below the main server's: the smallest cut.
    pub fn split(&self) -> u32 {
        self.cuts
            .values()
            .copied()
            .min()
            .unwrap_or(self.assignment.config.split)
    }

    /// Blocks of this client.
    pub fn split_of(&self, client: ClientId) -> u32 {
        self.cuts.get(&client).copied().unwrap_or_else(|| self.split())
    }

    /// Values of one block's adapter.
    fn block_len(&self) -> u64 {
        self.assignment.adapter_len / u64::from(self.assignment.config.split.max(1))
    }

    /// Values in the adapter of a client with so many blocks.
    fn len_at(&self, split: u32) -> u64 {
        u64::from(split) * self.block_len()
    }

    /// Values of the blocks that some clients may have and the main server has too.
    fn copy_len(&self) -> usize {
        let len = usize::try_from(self.len_at(self.split())).unwrap_or(usize::MAX);
        self.adapter.len().saturating_sub(len)
    }

    /// The adapter of a client with so many blocks.
    fn adapter_at(&self, split: u32) -> &[f32] {
        let len = usize::try_from(self.len_at(split)).unwrap_or(usize::MAX);
        self.adapter.get(..len).unwrap_or(&self.adapter)
    }

    fn assignment_of(&self, client: ClientId) -> Assignment {
        let split = self.split_of(client);
        let mut assignment = self.assignment.clone();
        // The embedding comes before the blocks.
        assignment.weights.truncate(split as usize + 1);
        assignment.adapter_len = self.len_at(split);
        assignment.config.split = split;
        assignment
    }

    /// Digests of the clients' adapters, by cut.
    fn bases(&self) -> BTreeMap<u32, Digest> {
        let splits: BTreeSet<u32> = self.cuts.values().copied().chain([self.split()]).collect();
        (splits.into_iter())
            .map(|split| (split, Digest::of_values(self.adapter_at(split))))
            .collect()
    }
}

impl MainConfig {
    fn check(&self, placement: &Placement) -> Result<(), MainError> {
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
        // Frames, steps and rounds stay as they were announced.
        let first = &self.placement.assignment;
        let same = RunConfig {
            split: first.config.split,
            rank: first.config.rank,
            alpha: first.config.alpha,
            ..config.clone()
        };
        if same != first.config || placement.assignment.run != first.run {
            return Err(MainError::Fixed);
        }
        Ok(())
    }
}

impl MainServerSession {
    /// A run that waits for its first clients.
    ///
    /// # Errors
    /// When the configuration is contradictory or too large for the wire.
    pub fn new(config: MainConfig, now: Duration) -> Result<MainServerSession, MainError> {
        let run = &config.placement.assignment.config;
        let sizes = [
            ("the number of clients", config.clients),
            ("the most clients", config.max_clients),
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
        if adapter_frame_bytes(config.largest_update).is_none() {
            return Err(MainError::UpdateTooLarge {
                len: config.largest_update,
            });
        }
        config.check(&config.placement)?;
        let mut session = MainServerSession {
            office: TicketOffice {
                run: config.run,
                key: config.ticket_key,
                lifetime: config.ticket_lifetime,
            },
            door: Door::new(config.version, config.ping_interval),
            clients: BTreeMap::new(),
            next_client: 1,
            has_started: false,
            round: RoundKey { round: 0, attempt: 0 },
            phase: Phase::Waiting { until: None },
            bases: config.placement.bases(),
            placement: config.placement.clone(),
            steps: 0,
            clocks: BTreeMap::new(),
            finishing: None,
            expected: BTreeSet::new(),
            planned: BTreeSet::new(),
            planning: None,
            rates: BTreeMap::new(),
            frame_limit,
            events: VecDeque::new(),
            controls: VecDeque::new(),
            config,
        };
        session.open_run(now);
        Ok(session)
    }

    /// The largest frame a client may send: what a socket need not read past.
    pub fn max_frame_bytes(&self) -> usize {
        self.frame_limit
    }

    /// What clients agree on at present.
    pub fn config(&self) -> &RunConfig {
        &self.placement.assignment.config
    }

    pub fn connected(&mut self, connection: ConnectionId, now: Duration) {
        self.door.open(connection, now);
    }

    pub fn disconnected(&mut self, connection: ConnectionId, now: Duration) {
        if let Some(client) = self.door.remove(connection) {
            self.depart(client, DepartureReason::Disconnected);
        }
        self.retest(now);
    }

    pub fn handle_frame(&mut self, connection: ConnectionId, now: Duration, bytes: &[u8]) {
        match self.door.hear(connection, bytes) {
            Heard::Nothing => {}
            Heard::Refused(reason) => self.events.push_back(MainEvent::ClientRefused { connection, reason }),
            Heard::Hello(hello) => self.greet(connection, now, &hello),
            Heard::Fault { guest, error } => self.expel(guest, DepartureReason::Misbehaved(error.to_string())),
            Heard::Frame { guest, first, message } => {
                if let (true, Some(client)) = (first, self.clients.get_mut(&guest)) {
                    client.next_serial += 1;
                }
                if let Some(message) = message {
                    self.handle_message(guest, message, bytes.len() as u64, now);
                }
            }
        }
        self.retest(now);
    }

    pub fn handle_timeout(&mut self, now: Duration) {
        for (_, client) in self.door.handle_timeout(now) {
            if let Some(client) = client {
                self.depart(client, DepartureReason::Silent);
            }
        }
        self.retest(now);
        match self.phase {
            Phase::Waiting { until: Some(until) } if until <= now => {
                if !self.has_started || self.clients.values().any(|client| client.ready) {
                    // Who is still loading has had long enough.
                    self.expected.clear();
                    self.phase = Phase::Waiting { until: None };
                    self.retest(now);
                } else {
                    self.finish(RunEnd::NoClients, now);
                }
            }
            Phase::Finished { drain_by, .. } if drain_by <= now => {
                for connection in self.door.connections() {
                    self.door.close(connection);
                }
                self.retest(now);
            }
            _ => {}
        }
    }

    /// What the federated server said.
    pub fn handle_control(&mut self, now: Duration, reply: ControlReply) {
        match reply {
            ControlReply::Excluded { round, exclusion } if round == self.round => self.exclude(&exclusion),
            ControlReply::Received { round, client, bytes } if round == self.round => {
                if let Phase::Averaging { asked, collected, .. } = &mut self.phase {
                    let took = now.saturating_sub(*asked);
                    collected.push(CollectTime { client, took, bytes });
                }
            }
            ControlReply::RoundClosed(closed) if closed.round == self.round => self.close_round(closed, now),
            // Of a round that was lost meanwhile, or a repetition.
            ControlReply::Excluded { .. } | ControlReply::Received { .. } | ControlReply::RoundClosed(_) => {}
        }
        self.retest(now);
    }

    /// The link to a federated server in another process is up, perhaps again: repeats what it must know.
    pub fn control_connected(&mut self, now: Duration) {
        self.controls.clear();
        self.open_run(now);
        let members = self.members();
        if !members.is_empty() {
            self.open_round(members);
        }
        self.collect();
        if matches!(self.phase, Phase::Finished { .. }) {
            self.controls.push_back(Control::CloseRun);
        }
    }

    /// The driver's answer to `StepReady`. A member without an output, or with a loss or gradient that is not finite,
    /// is dropped. Outputs for clients that have left since are ignored, as is an answer to a step that has been lost.
    ///
    /// # Errors
    /// When a gradient is not of the layout of the activations it belongs to; nothing is changed then.
    pub fn step_result(
        &mut self,
        now: Duration,
        key: StepKey,
        mut outputs: Vec<GradientOutput>,
    ) -> Result<(), MainError> {
        let Phase::Computing { key: current, members } = &self.phase else {
            return Ok(());
        };
        if *current != key {
            return Ok(());
        }
        for output in &outputs {
            if let Some(received) = members.get(&output.client)
                && received.layout != output.gradient.layout()
            {
                return Err(MainError::GradientLayout {
                    client: output.client,
                    given: output.gradient.layout(),
                    expected: received.layout,
                });
            }
        }
        outputs.retain(|output| {
            members.contains_key(&output.client) && output.loss.is_finite() && output.gradient.is_finite()
        });
        let weighted = |output: &GradientOutput| {
            members
                .get(&output.client)
                .map(|received| (received.tokens, f64::from(output.loss)))
        };
        let tokens: u64 = outputs.iter().filter_map(weighted).map(|(tokens, _)| tokens).sum();
        let total: f64 = outputs
            .iter()
            .filter_map(weighted)
            .map(|(tokens, loss)| tokens as f64 * loss)
            .sum();
        let mean_loss = if tokens == 0 {
            0.0
        } else {
            (total / tokens as f64) as f32
        };

        let Phase::Computing { mut members, .. } = std::mem::replace(&mut self.phase, Phase::Waiting { until: None })
        else {
            return Ok(());
        };
        self.steps += 1;
        let config = &self.placement.assignment.config;
        let mut staying = BTreeSet::new();
        let mut finishing = BTreeMap::new();
        for GradientOutput { client, loss, gradient } in outputs {
            let Some(received) = members.remove(&client) else {
                continue;
            };
            let gradient = Gradient {
                key,
                activations: received.activations,
                loss,
                tokens: received.tokens,
                mean_loss,
                tensor: gradient,
            };
            staying.insert(client);
            let bytes_down = match self.clients.get(&client).and_then(|client| client.connection) {
                Some(connection) => self.door.send(connection, &Message::Gradient(gradient)),
                None => 0,
            };
            if let Some(clock) = self.clocks.get(&client) {
                let times = StepTimes {
                    client,
                    phases: clock.phases,
                    bytes_up: clock.bytes_up,
                    bytes_down: bytes_down as u64,
                };
                finishing.insert(client, (false, times));
            }
        }
        self.finishing = Some(Finishing {
            key,
            sent: now,
            members: finishing,
        });
        let next = key.step + 1;
        if next < config.local_steps {
            self.phase = Phase::Gathering {
                key: key.round.step(next),
                members: staying.iter().map(|client| (*client, None)).collect(),
            };
        } else {
            self.phase = Phase::Boundary {
                members: staying.clone(),
            };
        }
        for client in members.into_keys() {
            self.controls.push_back(Control::Departed {
                round: key.round,
                client,
            });
            self.expel(client, DepartureReason::Unusable);
        }
        // Only those who stay are told of the next step; they may have become fewer while the others were dropped.
        if matches!(self.phase, Phase::Gathering { .. }) {
            self.send_to_all(&staying, |count| {
                Message::StepStart(StepStart {
                    key: key.round.step(next),
                    members: count,
                })
            });
        }
        self.retest(now);
        Ok(())
    }

    /// The driver's answer to `RoundClosed`, with the mean validation loss if it validates, and with another placement where
    /// the plan was one.
    ///
    /// # Errors
    /// When the placement is missing, or is not what was planned; nothing is changed then.
    pub fn validated(
        &mut self,
        now: Duration,
        round: RoundKey,
        valid_loss: Option<f64>,
        placement: Option<Placement>,
    ) -> Result<(), MainError> {
        let Phase::Validating {
            round: current,
            included,
            split,
        } = self.phase
        else {
            return Ok(());
        };
        if current != round {
            return Ok(());
        }
        let found = placement.as_ref().unwrap_or(&self.placement).split();
        if found != split {
            return Err(MainError::Split { found, expected: split });
        }
        if let Some(placement) = &placement {
            self.config.check(placement)?;
        }
        let config = &self.placement.assignment.config;
        let rounds = config.rounds;
        let done = round.round + 1;
        let result = Message::RoundResult(RoundResult {
            round: round.round,
            rounds,
            included,
            valid_loss,
            steps: done.saturating_mul(config.local_steps),
            total_steps: rounds.saturating_mul(config.local_steps),
        });
        for connection in self.clients.values().filter_map(|client| client.connection) {
            self.door.send(connection, &result);
        }
        if done >= rounds {
            self.finish(RunEnd::Completed, now);
        } else {
            self.round = RoundKey {
                round: done,
                attempt: 0,
            };
            if let Some(placement) = placement {
                self.adopt(placement);
            }
            self.wait(now);
        }
        self.retest(now);
        Ok(())
    }

    /// Before anything is trained, changes who holds what: to be called before the answer to `PlanWanted` of
    /// `Occasion::Start`.
    ///
    /// # Errors
    /// When the placement contradicts itself or the run, or something is trained already; nothing is changed then.
    pub fn place(&mut self, now: Duration, placement: Placement) -> Result<(), MainError> {
        if self.has_started {
            return Err(MainError::Fixed);
        }
        self.config.check(&placement)?;
        self.adopt(placement);
        self.phase = Phase::Waiting {
            until: Some(now + self.config.wait_for_client),
        };
        Ok(())
    }

    /// The driver's answer to `PlanWanted`; `None` leaves everything as it is.
    ///
    /// # Errors
    /// When the plan moves the cut where it cannot be moved; the question stands.
    pub fn planned(&mut self, now: Duration, plan: Option<RoundPlan>) -> Result<(), MainError> {
        let Some(occasion) = self.planning else {
            return Ok(());
        };
        let current = self.placement.split();
        let split = plan.as_ref().and_then(|plan| plan.split).unwrap_or(current);
        let movable = matches!(occasion, Occasion::Boundary(_)) && self.placement.copy_len() == 0;
        let moved = split.abs_diff(current);
        let largest = u64::from(split.max(current)) + 2 * u64::from(moved);
        if split == 0 || moved != 0 && (!movable || largest * self.placement.block_len() > self.config.largest_update) {
            return Err(MainError::Split {
                found: split,
                expected: current,
            });
        }
        self.planning = None;
        if let Some(plan) = plan {
            self.rates = plan.rates;
        }
        // A round may have been lost meanwhile, and with it the boundary.
        if let (Occasion::Boundary(round), Phase::Boundary { members }) = (occasion, &self.phase)
            && round == self.round
        {
            let members = members.clone();
            self.ask_for_adapters(members, split, now);
        }
        self.retest(now);
        Ok(())
    }

    /// The driver's answer to `CopyWanted`. An answer for a round that has been lost is dropped.
    ///
    /// # Errors
    /// When the values are not those that some clients have and others do not; the question stands.
    pub fn copy(&mut self, now: Duration, round: RoundKey, values: Vec<f32>) -> Result<(), MainError> {
        let expected = self.placement.copy_len();
        let Phase::Averaging { copy: copy @ None, .. } = &mut self.phase else {
            return Ok(());
        };
        if self.round != round {
            return Ok(());
        }
        if values.len() != expected {
            return Err(MainError::CopyLength {
                given: values.len(),
                expected,
            });
        }
        if !values.iter().all(|value| value.is_finite()) {
            return Err(MainError::CopyNotFinite);
        }
        *copy = Some(values);
        self.collect();
        self.retest(now);
        Ok(())
    }

    /// Ends the run: clients are told, and `Drained` follows when they are gone.
    pub fn stop(&mut self, now: Duration, detail: String) {
        self.finish(RunEnd::Stopped(detail), now);
        self.retest(now);
    }

    pub fn poll_transmit(&mut self) -> Option<Transmit<ConnectionId>> {
        self.door.poll_transmit()
    }

    pub fn poll_event(&mut self) -> Option<MainEvent> {
        self.events.pop_front()
    }

    pub fn poll_control(&mut self) -> Option<Control> {
        self.controls.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Duration> {
        let own = match self.phase {
            Phase::Waiting { until } => until,
            Phase::Finished {
                drain_by,
                drained: false,
            } => Some(drain_by),
            _ => None,
        };
        earlier(own, self.door.poll_timeout())
    }

    pub fn status(&self) -> RunStatus {
        let (phase, step) = match &self.phase {
            Phase::Waiting { .. } => (RunPhase::Waiting, 0),
            Phase::Gathering { key, .. } => (RunPhase::Gathering, key.step),
            Phase::Computing { key, .. } => (RunPhase::Computing, key.step),
            Phase::Boundary { .. } => (RunPhase::Boundary, self.placement.assignment.config.local_steps),
            Phase::Averaging { .. } => (RunPhase::Averaging, self.placement.assignment.config.local_steps),
            Phase::Validating { .. } => (RunPhase::Validating, self.placement.assignment.config.local_steps),
            Phase::Finished { .. } => (RunPhase::Finished, 0),
        };
        let members = self.members();
        let awaited = |client: &ClientId| match &self.phase {
            Phase::Gathering { members, .. } => members.get(client).is_some_and(Option::is_none),
            _ => false,
        };
        let connected = self.clients.iter().filter(|(_, client)| client.connection.is_some());
        RunStatus {
            phase,
            round: self.round.round,
            rounds: self.placement.assignment.config.rounds,
            step,
            local_steps: self.placement.assignment.config.local_steps,
            clients: connected
                .map(|(id, client)| ClientStatus {
                    client: *id,
                    name: client.name.clone(),
                    device: client.device.clone(),
                    memory_bytes: client.memory_bytes,
                    speed: client.speed,
                    ready: client.ready,
                    member: members.contains(id),
                    awaited: awaited(id),
                })
                .collect(),
        }
    }

    // Coming in.

    fn greet(&mut self, connection: ConnectionId, now: Duration, hello: &Hello) {
        match self.admit(hello, now) {
            Ok(admission) => self.welcome(connection, now, hello, admission),
            Err((reason, detail)) => {
                self.door.refuse(connection, reason, detail);
                self.events.push_back(MainEvent::ClientRefused { connection, reason });
            }
        }
    }

    fn admit(&self, hello: &Hello, now: Duration) -> Result<Admission, (RefusalReason, String)> {
        let plain = |reason: RefusalReason| (reason, reason.to_string());
        if hello.service != Service::Main {
            let detail = format!("this is the main service; {} connections go elsewhere", hello.service);
            return Err((RefusalReason::Service, detail));
        }
        let admission = match &hello.credential {
            Credential::Ticket(ticket) => {
                let pass = self.office.check(Service::Main, ticket, now).map_err(plain)?;
                match self.clients.get(&pass.client) {
                    Some(client) if client.next_serial <= pass.serial => Admission::Known(pass),
                    _ => return Err(plain(RefusalReason::TicketSpent)),
                }
            }
            credential => {
                check_secret(self.config.secret.as_deref(), credential).map_err(plain)?;
                Admission::New
            }
        };
        if matches!(self.phase, Phase::Finished { .. }) {
            return Err((RefusalReason::NoRun, "the run is over".to_owned()));
        }
        let differs = |theirs: Option<Digest>, ours: Digest| theirs.is_some_and(|theirs| theirs != ours);
        if differs(hello.model, self.config.model) {
            return Err((
                RefusalReason::Model,
                format!("this run trains the model {}", self.config.model),
            ));
        }
        if differs(hello.tokenizer, self.config.tokenizer) {
            return Err((
                RefusalReason::Tokenizer,
                format!("this run's tokenizer is {}", self.config.tokenizer),
            ));
        }
        let wire = self.placement.assignment.config.wire;
        if !hello.capabilities.forms.contains(&wire) {
            return Err((RefusalReason::WireForm, format!("this run's wire form is {wire}")));
        }
        let replaces = match admission {
            Admission::Known(pass) => self
                .clients
                .get(&pass.client)
                .is_some_and(|client| client.connection.is_some()),
            Admission::New => false,
        };
        if !replaces && self.connected_clients() >= self.config.max_clients as usize {
            return Err(plain(RefusalReason::Full));
        }
        Ok(admission)
    }

    fn welcome(&mut self, connection: ConnectionId, now: Duration, hello: &Hello, admission: Admission) {
        let (id, serial) = match admission {
            Admission::New => {
                let id = ClientId(self.next_client);
                self.next_client += 1;
                (id, 0)
            }
            Admission::Known(Pass { client, serial }) => (client, serial),
        };
        if let Some(old) = self.clients.get(&id).and_then(|client| client.connection) {
            self.door.stop(
                old,
                stop(StopReason::Superseded, "this client opened another connection", None),
            );
            self.depart(id, DepartureReason::Superseded);
        }
        let name = display_name(&hello.name);
        let device = display_name(&hello.capabilities.device);
        self.clients.insert(
            id,
            Client {
                name: name.clone(),
                device: device.clone(),
                memory_bytes: hello.capabilities.memory_bytes,
                speed: None,
                connection: Some(connection),
                ready: false,
                carries: false,
                holds: None,
                next_serial: serial,
            },
        );
        let pass = Pass {
            client: id,
            serial: serial + 1,
        };
        // The federated service counts its own serials; those it is handed here are above all it has issued before.
        let federated = Pass {
            client: id,
            serial: (serial + 1) << 32,
        };
        let welcome = Welcome {
            version: hello.version.min(self.config.version),
            client: id,
            run: self.config.run,
            ticket: self.office.issue(Service::Main, pass, now),
            federated_ticket: Some(self.office.issue(Service::Federated, federated, now)),
            federated_url: self.config.federated_url.clone(),
            ping_interval: self.config.ping_interval,
            model: self.config.model,
            tokenizer: self.config.tokenizer,
        };
        self.door.welcome(connection, id, welcome, now, self.frame_limit);
        self.door.send(
            connection,
            &Message::Assignment(Box::new(self.placement.assignment_of(id))),
        );
        self.events.push_back(MainEvent::ClientJoined {
            connection,
            client: id,
            name,
            device,
        });
        // A newcomer has as long to become ready as the run waits for anybody.
        if let Phase::Waiting { until: Some(until) } = &mut self.phase
            && self.expected.is_empty()
        {
            *until = (*until).max(now + self.config.wait_for_client);
            self.events.push_back(MainEvent::Waiting { until: *until });
        }
    }

    // Going out.

    /// Takes a client out of the run. Its connection is gone or about to be.
    fn depart(&mut self, id: ClientId, reason: DepartureReason) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        if client.connection.take().is_none() {
            return;
        }
        client.ready = false;
        client.carries = false;
        client.holds = None;
        self.expected.remove(&id);
        self.clocks.remove(&id);
        if let Some(finishing) = &mut self.finishing {
            finishing.members.remove(&id);
        }
        let name = client.name.clone();
        self.events.push_back(MainEvent::ClientLeft {
            client: id,
            name,
            reason,
        });
        let round = self.round;
        let was_member = match &mut self.phase {
            Phase::Gathering { members, .. } => members.remove(&id).is_some(),
            Phase::Computing { members, .. } => members.remove(&id).is_some(),
            Phase::Boundary { members } | Phase::Averaging { members, .. } => members.remove(&id),
            Phase::Waiting { .. } | Phase::Validating { .. } | Phase::Finished { .. } => false,
        };
        if was_member {
            self.controls.push_back(Control::Departed { round, client: id });
        }
    }

    /// Ends a client's session, and says why.
    fn expel(&mut self, id: ClientId, reason: DepartureReason) {
        if let Some(connection) = self.clients.get(&id).and_then(|client| client.connection) {
            let (wire, return_after) = match &reason {
                DepartureReason::Excluded(ExclusionReason::Absent) => (StopReason::Excluded, Some(Duration::ZERO)),
                DepartureReason::Excluded(_) | DepartureReason::Unusable => (StopReason::BadUpdate, None),
                _ => (StopReason::Unexpected, None),
            };
            self.door
                .stop(connection, stop(wire, &reason.to_string(), return_after));
            self.depart(id, reason);
        }
    }

    fn exclude(&mut self, exclusion: &Exclusion) {
        // Nobody is excluded for departing who has not: the word came from here.
        if exclusion.reason != ExclusionReason::Departed && self.members().contains(&exclusion.client) {
            self.expel(exclusion.client, DepartureReason::Excluded(exclusion.reason));
        }
    }

    // The run.

    fn handle_message(&mut self, client: ClientId, message: Message, bytes: u64, now: Duration) {
        if matches!(self.phase, Phase::Finished { .. }) && !matches!(message, Message::Leave) {
            // What was on its way when the run ended.
            return;
        }
        match message {
            Message::Ready(ready) => self.handle_ready(client, ready, now),
            Message::Activations(activations) => {
                if let Err(detail) = self.handle_activations(client, activations, bytes, now) {
                    self.expel(client, DepartureReason::Misbehaved(detail));
                }
            }
            Message::StepDone(done) => {
                if let Err(detail) = self.handle_step_done(client, done, now) {
                    self.expel(client, DepartureReason::Misbehaved(detail));
                }
            }
            Message::Leave => {
                if let Some(connection) = self.clients.get(&client).and_then(|client| client.connection) {
                    self.door.close(connection);
                }
                self.depart(client, DepartureReason::Left);
            }
            other => {
                let detail = format!("expected {}, got {}", self.expected_of(client), other.name());
                self.expel(client, DepartureReason::Misbehaved(detail));
            }
        }
    }

    /// What this client may send now, for error texts.
    fn expected_of(&self, client: ClientId) -> String {
        if let Some(key) = self.unfinished(client) {
            return format!("StepDone of {key} or Leave");
        }
        match &self.phase {
            _ if !self.clients.get(&client).is_some_and(|client| client.ready) => "Ready or Leave".to_owned(),
            Phase::Gathering { key, members } if members.get(&client).is_some_and(Option::is_none) => {
                format!("Activations of {key} or Leave")
            }
            _ => "Leave".to_owned(),
        }
    }

    /// The step whose gradient this client has been sent and that it has not finished.
    fn unfinished(&self, client: ClientId) -> Option<StepKey> {
        let finishing = self.finishing.as_ref()?;
        let (done, _) = finishing.members.get(&client)?;
        (!done).then_some(finishing.key)
    }

    fn handle_ready(&mut self, id: ClientId, ready: Ready, now: Duration) {
        let number = self.placement.assignment.number;
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        if ready.assignment < number && !client.ready {
            // The latest assignment is on its way.
            return;
        }
        if client.ready || ready.assignment != number {
            let detail = format!(
                "expected {}, got Ready for assignment {}",
                self.expected_of(id),
                ready.assignment
            );
            return self.expel(id, DepartureReason::Misbehaved(detail));
        }
        client.ready = true;
        client.speed = ready.speed.or(client.speed);
        self.expected.remove(&id);
        self.events.push_back(MainEvent::ClientReady { client: id });
        self.retest(now);
    }

    fn handle_activations(
        &mut self,
        client: ClientId,
        activations: Activations,
        bytes: u64,
        now: Duration,
    ) -> Result<(), String> {
        let unexpected = || {
            format!(
                "expected {}, got Activations of {}",
                self.expected_of(client),
                activations.key
            )
        };
        let Phase::Gathering { key, members } = &self.phase else {
            return Err(unexpected());
        };
        let awaited = members.get(&client).is_some_and(Option::is_none) && self.unfinished(client).is_none();
        if activations.key != *key || !awaited {
            return Err(unexpected());
        }
        let forward = activations.forward;
        let checked = self.check_activations(client, activations)?;
        if let Phase::Gathering { members, .. } = &mut self.phase {
            members.insert(client, Some(checked));
        }
        if let Some(clock) = self.clocks.get_mut(&client) {
            // No part of the time is longer than the whole.
            let whole = now.saturating_sub(clock.asked);
            let forward = forward.min(whole);
            clock.phases = Phases {
                forward,
                upload: whole - forward,
                ..Phases::default()
            };
            clock.bytes_up = bytes;
        }
        Ok(())
    }

    fn handle_step_done(&mut self, client: ClientId, done: StepDone, now: Duration) -> Result<(), String> {
        if self.unfinished(client) != Some(done.key) {
            return Err(format!(
                "expected {}, got StepDone of {}",
                self.expected_of(client),
                done.key
            ));
        }
        if let Some(finishing) = &mut self.finishing
            && let Some((is_done, times)) = finishing.members.get_mut(&client)
        {
            let whole = now.saturating_sub(finishing.sent);
            times.phases.backward = done.backward.min(whole);
            times.phases.download = whole - times.phases.backward;
            *is_done = true;
        }
        if let Some(clock) = self.clocks.get_mut(&client) {
            clock.asked = now;
        }
        Ok(())
    }

    fn check_activations(&self, client: ClientId, given: Activations) -> Result<(Received, Contribution), String> {
        let config = &self.placement.assignment.config;
        let Activations {
            split,
            examples,
            targets,
            tensor,
            ..
        } = given;
        let layout = tensor.layout();
        if !config.takes(layout) {
            let largest = config.largest_tensor();
            return Err(format!("activations of {layout}, where at most {largest} was agreed"));
        }
        let cut = self.placement.split_of(client);
        if split != cut {
            return Err(format!("activations of {split} blocks, where the cut is after {cut}"));
        }
        if targets.len() != tensor.rows() {
            return Err(format!(
                "activations of {layout} with {} targets, not {}",
                targets.len(),
                tensor.rows()
            ));
        }
        let is_target = |target: &i32| {
            *target == IGNORED_TARGET || u32::try_from(*target).is_ok_and(|target| target < config.vocab)
        };
        if let Some(position) = targets.iter().position(|target| !is_target(target)) {
            return Err(format!(
                "target {position} is {}, outside the vocabulary of {}",
                targets[position], config.vocab
            ));
        }
        if !tensor.is_finite() {
            return Err("activations with a value that is not finite".to_owned());
        }
        if !(1..=layout.batch).contains(&examples) {
            return Err(format!("{examples} examples in a batch of {}", layout.batch));
        }
        let tokens = targets.iter().filter(|target| **target != IGNORED_TARGET).count() as u64;
        let received = Received {
            layout,
            tokens,
            activations: Digest::of(tensor.bytes()),
        };
        let contribution = Contribution {
            client,
            split,
            examples,
            tokens,
            weight: 0.0,
            targets,
            activations: tensor,
        };
        Ok((received, contribution))
    }

    /// Moves the run on as far as it can go. Called after every change, of membership above all.
    fn retest(&mut self, now: Duration) {
        if let Some(Finishing { key, members, .. }) = self
            .finishing
            .take_if(|finishing| finishing.members.values().all(|(done, _)| *done))
        {
            let clients = members.into_values().map(|(_, times)| times).collect();
            self.events.push_back(MainEvent::StepMeasured { key, clients });
        }
        match &mut self.phase {
            Phase::Waiting { .. } => self.start_round(now),
            Phase::Gathering { members, .. } if members.is_empty() => self.lose_round(now),
            Phase::Gathering { key, members } if members.values().all(Option::is_some) => {
                let key = *key;
                let members = std::mem::take(members);
                let mut received = BTreeMap::new();
                let mut contributions = Vec::new();
                for (client, (record, contribution)) in
                    members.into_iter().filter_map(|(client, given)| Some((client, given?)))
                {
                    received.insert(client, record);
                    contributions.push(contribution);
                }
                share(&mut contributions);
                self.phase = Phase::Computing { key, members: received };
                self.events.push_back(MainEvent::StepReady { key, contributions });
            }
            Phase::Computing { members, .. } if members.is_empty() => self.lose_round(now),
            Phase::Boundary { members } | Phase::Averaging { members, .. } if members.is_empty() => {
                self.lose_round(now)
            }
            Phase::Boundary { members } if self.finishing.is_none() && self.planning.is_none() => {
                let members = members.clone();
                if self.config.plans && self.round.round + 1 < self.placement.assignment.config.rounds {
                    self.want_plan(Occasion::Boundary(self.round));
                } else {
                    self.ask_for_adapters(members, self.placement.split(), now);
                }
            }
            Phase::Finished { drained, .. } if !*drained && !self.door.has_guests() => {
                *drained = true;
                self.events.push_back(MainEvent::Drained);
            }
            _ => {}
        }
    }

    /// Asks the driver what is to hold next. It is asked one thing at a time.
    fn want_plan(&mut self, occasion: Occasion) {
        self.planning = Some(occasion);
        self.planned = self.ready();
        self.events.push_back(MainEvent::PlanWanted { occasion });
    }

    /// Ends the steps of the round.
    fn ask_for_adapters(&mut self, members: BTreeSet<ClientId>, split: u32, now: Duration) {
        let (round, steps) = (self.round, self.steps);
        let is_mixed = self.placement.copy_len() > 0;
        for id in &members {
            let kept = match is_mixed {
                true => self.placement.split_of(*id),
                false => split,
            };
            if let Some(connection) = self.clients.get(id).and_then(|client| client.connection) {
                let end = RoundEnd {
                    round,
                    split: kept,
                    steps,
                };
                self.door.send(connection, &Message::RoundEnd(end));
            }
        }
        self.phase = Phase::Averaging {
            members,
            split,
            copy: (!is_mixed).then(Vec::new),
            asked: now,
            collected: Vec::new(),
        };
        if is_mixed {
            self.events.push_back(MainEvent::CopyWanted { round });
        }
        self.collect();
    }

    /// Tells the federated server, as soon as that is known, what comes with the adapters and beside them.
    fn collect(&mut self) {
        if let Phase::Averaging {
            split,
            copy: Some(copy),
            ..
        } = &self.phase
        {
            let steps = self.steps;
            let moments = self.leaving(*split).map(|len| Leaving { len, steps });
            self.controls.push_back(Control::Collect {
                round: self.round,
                moments,
                copy: copy.clone(),
            });
        }
    }

    /// Values of the blocks that leave the clients when they keep `split`.
    fn leaving(&self, split: u32) -> Option<u64> {
        let current = self.placement.split();
        (split < current).then(|| self.placement.len_at(current - split))
    }

    /// Makes a checked placement the current one and hands it to everybody.
    fn adopt(&mut self, mut placement: Placement) {
        placement.assignment.number = self.placement.assignment.number.wrapping_add(1);
        self.bases = placement.bases();
        self.placement = placement;
        self.expected = self.ready();
        for (id, client) in &mut self.clients {
            client.carries = client.ready;
            client.ready = false;
            client.holds = None;
            if let Some(connection) = client.connection {
                let assignment = self.placement.assignment_of(*id);
                self.door.send(connection, &Message::Assignment(Box::new(assignment)));
            }
        }
    }

    /// Starts the next round if enough are ready: the number asked for at first, anybody later; after a new placement,
    /// everybody who was there.
    fn start_round(&mut self, now: Duration) {
        let ready = self.ready();
        let needed = if self.has_started {
            1
        } else {
            self.config.clients as usize
        };
        if ready.len() < needed || !self.expected.is_empty() || self.planning.is_some() {
            return;
        }
        if self.config.plans && !ready.is_subset(&self.planned) {
            return self.want_plan(if self.planned.is_empty() && !self.has_started {
                Occasion::Start
            } else {
                Occasion::Membership
            });
        }
        self.has_started = true;
        let round = self.round;
        let count = ready.len() as u32;
        self.open_round(ready.clone());
        self.events.push_back(MainEvent::RoundStarted {
            round,
            members: ready.iter().copied().collect(),
        });
        for id in &ready {
            let split = self.placement.split_of(*id);
            let (Some(client), Some(&base)) = (self.clients.get_mut(id), self.bases.get(&split)) else {
                continue;
            };
            let holds = client.holds.replace(base);
            let adapter = (holds != Some(base)).then(|| self.placement.adapter_at(split).to_vec());
            let carries = std::mem::take(&mut client.carries);
            if let Some(connection) = client.connection {
                let start = RoundStart {
                    round,
                    base,
                    members: count,
                    adapter,
                    moments: self.placement.moments.clone().filter(|_| carries),
                    rates: self.rates.get(id).copied(),
                };
                self.door.send(connection, &Message::RoundStart(start));
            }
        }
        // Whoever comes later did not hold these blocks when they were moved.
        self.placement.moments = None;
        let key = round.step(0);
        self.send_to_all(&ready, |count| Message::StepStart(StepStart { key, members: count }));
        let clock = Clock {
            asked: now,
            phases: Phases::default(),
            bytes_up: 0,
        };
        self.clocks = ready.iter().map(|client| (*client, clock)).collect();
        self.phase = Phase::Gathering {
            key,
            members: ready.into_iter().map(|client| (client, None)).collect(),
        };
        self.retest(now);
    }

    fn ready(&self) -> BTreeSet<ClientId> {
        let ready = self.clients.iter().filter(|(_, client)| client.ready);
        ready.map(|(id, _)| *id).collect()
    }

    fn send_to_all(&mut self, clients: &BTreeSet<ClientId>, message: impl Fn(u32) -> Message) {
        let connections: Vec<ConnectionId> = clients
            .iter()
            .filter_map(|id| self.clients.get(id)?.connection)
            .collect();
        let message = message(connections.len() as u32);
        for connection in connections {
            self.door.send(connection, &message);
        }
    }

    fn lose_round(&mut self, now: Duration) {
        self.events.push_back(MainEvent::RoundLost { round: self.round });
        self.round.attempt += 1;
        self.wait(now);
        self.retest(now);
    }

    /// The round boundary. If nobody is ready the run waits, for so long.
    fn wait(&mut self, now: Duration) {
        let until = now + self.config.wait_for_client;
        self.phase = Phase::Waiting { until: Some(until) };
        if self.expected.is_empty() && !self.clients.values().any(|client| client.ready) {
            self.events.push_back(MainEvent::Waiting { until });
        }
    }

    fn close_round(&mut self, closed: RoundClosed, now: Duration) {
        let Phase::Averaging { split, collected, .. } = &mut self.phase else {
            // Closed without anybody, as the exclusions before it said.
            return;
        };
        let (split, collected) = (*split, std::mem::take(collected));
        let Some(Mean {
            digest,
            values,
            moments,
        }) = closed.average
        else {
            for exclusion in &closed.excluded {
                self.exclude(exclusion);
            }
            if matches!(self.phase, Phase::Averaging { .. }) {
                self.lose_round(now);
            }
            return;
        };
        let expected = self.placement.adapter.len();
        let leaving = self
            .leaving(split)
            .map(|len| usize::try_from(len).unwrap_or(usize::MAX));
        let fault = if values.len() != expected {
            Some(format!("an average of {} values, not {expected}", values.len()))
        } else if !values.iter().all(|value| value.is_finite()) {
            Some("an average with a value that is not finite".to_owned())
        } else if Digest::of_values(&values) != digest {
            Some("an average that does not have its digest".to_owned())
        } else if !match (&moments, leaving) {
            (Some(moments), Some(len)) => moments.are_of(len, self.steps) && moments.are_possible(),
            (moments, leaving) => moments.is_some() == leaving.is_some(),
        } {
            Some("an average without the moments of the blocks that leave".to_owned())
        } else {
            None
        };
        if let Some(fault) = fault {
            return self.finish(RunEnd::FederatedFault(fault), now);
        }
        for exclusion in &closed.excluded {
            self.exclude(exclusion);
        }
        self.placement.adapter.clone_from(&values);
        self.bases = self.placement.bases();
        for inclusion in &closed.included {
            if let Some(client) = self.clients.get_mut(&inclusion.client)
                && client.ready
            {
                client.holds = self.bases.get(&self.placement.split_of(inclusion.client)).copied();
            }
        }
        let round = closed.round;
        self.phase = Phase::Validating {
            round,
            included: closed.included.len() as u32,
            split,
        };
        let (included, excluded) = (closed.included, closed.excluded);
        self.events.push_back(MainEvent::RoundClosed {
            round,
            average: values,
            moments,
            split,
            included,
            excluded,
            collected,
        });
    }

    fn finish(&mut self, reason: RunEnd, now: Duration) {
        if matches!(self.phase, Phase::Finished { .. }) {
            return;
        }
        let message = Message::Stop(match &reason {
            RunEnd::Completed => stop(StopReason::Completed, "all rounds are done", None),
            RunEnd::NoClients => stop(StopReason::Shutdown, "nobody was ready in time", None),
            RunEnd::Stopped(detail) | RunEnd::FederatedFault(detail) => stop(StopReason::Shutdown, detail, None),
        });
        // The connections stay until the clients have heard and hung up.
        for connection in self.clients.values().filter_map(|client| client.connection) {
            self.door.send(connection, &message);
        }
        self.phase = Phase::Finished {
            drain_by: now + silence_limit(self.config.ping_interval),
            drained: false,
        };
        self.controls.push_back(Control::CloseRun);
        self.events.push_back(MainEvent::Finished { reason });
    }

    fn open_run(&mut self, now: Duration) {
        self.controls.push_back(Control::OpenRun {
            run: self.config.run,
            ticket_key: self.config.ticket_key,
            now,
            ticket_lifetime: self.config.ticket_lifetime,
            largest_update: self.config.largest_update,
            model: self.config.model,
            tokenizer: self.config.tokenizer,
        });
    }

    fn open_round(&mut self, members: BTreeSet<ClientId>) {
        let config = &self.placement.assignment.config;
        let member = |client: ClientId| {
            let split = self.placement.split_of(client);
            Some(Member {
                client,
                base: *self.bases.get(&split)?,
                adapter_len: self.placement.len_at(split),
            })
        };
        self.controls.push_back(Control::OpenRound {
            round: self.round,
            members: members.into_iter().filter_map(member).collect(),
            adapter_len: self.placement.adapter.len() as u64,
            max_examples: u64::from(config.batch) * u64::from(config.local_steps),
        });
    }

    /// Members of the round that is open at the federated server.
    fn members(&self) -> BTreeSet<ClientId> {
        match &self.phase {
            Phase::Gathering { members, .. } => members.keys().copied().collect(),
            Phase::Computing { members, .. } => members.keys().copied().collect(),
            Phase::Boundary { members } | Phase::Averaging { members, .. } => members.clone(),
            Phase::Waiting { .. } | Phase::Validating { .. } | Phase::Finished { .. } => BTreeSet::new(),
        }
    }

    fn connected_clients(&self) -> usize {
        self.clients
            .values()
            .filter(|client| client.connection.is_some())
            .count()
    }
}

/// Gives each contribution its share of the step's tokens; equal shares if there is no token at all.
fn share(contributions: &mut [Contribution]) {
    let total: u64 = contributions.iter().map(|contribution| contribution.tokens).sum();
    let count = contributions.len() as f64;
    for contribution in contributions {
        contribution.weight = if total == 0 {
            1.0 / count
        } else {
            contribution.tokens as f64 / total as f64
        };
    }
}

fn stop(reason: StopReason, detail: &str, return_after: Option<Duration>) -> Stop {
    Stop {
        reason,
        detail: detail.to_owned(),
        return_after,
    }
}
