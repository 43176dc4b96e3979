//! What outlives the process of a main server: who is in the run and where it stands, as values to be kept and taken up again.
//!
//! Separate because a session in memory is much more than that. Connections, timers and the open step are made anew: a run that is taken up
//! again is at the beginning of a round, and the round is begun once more.

use std::collections::BTreeSet;
use std::time::Duration;

use super::super::codec::{self, DecodeError};
use super::MainServerSession;
use super::config::{MainConfig, MainError};
use super::event::{MainEvent, RunEnd};
use super::placement::Placement;
use super::round::Phase;
use crate::federated::Exact;
use crate::terms::ids::{ClientId, RoundKey};
use crate::terms::moments::Moments;

/// Client numbers are reserved this many at a time, so that not every newcomer has to be written down before it is answered.
const RESERVED: u64 = 256;

/// Who is in the run, and the round that is open. It changes when clients come and go; [`MainServerSession::revision`] says when.
#[derive(Clone, Debug, PartialEq)]
pub struct RunState {
    pub round: RoundKey,
    /// Whether the first round has begun.
    pub has_started: bool,
    /// No client has this number, or a greater one.
    pub next_client: u64,
    pub clients: Vec<ClientState>,
}

/// What is kept of a client. Of one that is missing here and has a genuine ticket nothing is known but its number.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientState {
    pub client: ClientId,
    /// Tickets below this serial are spent.
    pub next_serial: u64,
    /// Its tickets are good for nothing any more.
    pub banned: bool,
    /// It was there: the round waits for its return.
    pub present: bool,
    /// It said goodbye, or is out of the run for good: no quorum counts on its return.
    pub gone: bool,
}

/// The main server's side of a round's beginning: what a round that comes to nothing goes back to, in memory as on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Which round it is the beginning of; of a run that is complete, the number of its rounds.
    pub round: u32,
    /// Who holds which blocks below the cut, and their adapter.
    pub placement: Placement,
    /// The adapter of the blocks from the smallest cut on, flat.
    pub adapter: Vec<f32>,
    /// And its optimiser's moments.
    pub moments: Moments,
    /// The exact products of the last round, where the run saves more than the average.
    pub exact: Option<Exact>,
}

impl RunState {
    /// Of a run of whose clients nothing is known any more.
    pub fn unknown(round: u32) -> RunState {
        RunState {
            round: RoundKey { round, attempt: 0 },
            has_started: round > 0,
            // More than can ever have come: all genuine tickets are below.
            next_client: u64::from(u32::MAX),
            clients: Vec::new(),
        }
    }

    /// As bytes for [`RunState::decode`].
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_run_state(self)
    }

    /// # Errors
    /// [`DecodeError`] for bytes that are none of [`RunState::encode`].
    pub fn decode(bytes: &[u8]) -> Result<RunState, DecodeError> {
        codec::decode_run_state(bytes)
    }
}

impl Checkpoint {
    /// As bytes for [`Checkpoint::decode`].
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_checkpoint(self)
    }

    /// # Errors
    /// [`DecodeError`] for bytes that are none of [`Checkpoint::encode`].
    pub fn decode(bytes: &[u8]) -> Result<Checkpoint, DecodeError> {
        codec::decode_checkpoint(bytes)
    }
}

impl MainServerSession {
    /// Takes a run up where `state` and the checkpoint, whose placement `config` has, leave it: at the beginning of the checkpoint's round, whose
    /// next attempt starts when those who were there are back, or the time for waiting is over and somebody is. One that was complete tells those who
    /// were there.
    ///
    /// # Errors
    /// As [`MainServerSession::new`].
    pub fn resume(config: MainConfig, state: &RunState, round: u32, now: Duration) -> Result<Self, MainError> {
        let until = now + config.wait_for_client;
        let mut session = MainServerSession::new(config, now)?;
        session.round = match state.round {
            // Frames of the attempt that was open must not be taken for frames of the next.
            open if open.round == round => RoundKey {
                round,
                attempt: open.attempt.saturating_add(1),
            },
            _ => RoundKey { round, attempt: 0 },
        };
        session.has_started = state.has_started || round > 0;
        session.is_returning = true;
        session.steps = session.steps_before(round);
        session.roster.restore(state);
        session.reserved = state.next_client;
        if round >= session.config().rounds {
            session.finish(RunEnd::Completed, now);
            // Who was there may not have heard of it.
            session.phase = Phase::Finished {
                drain_by: until,
                drained: false,
            };
        } else {
            // Somebody who was there may never have learned its number.
            session.phase = Phase::Waiting { until: Some(until) };
        }
        // What is kept says still that the attempt before is open.
        session.revision += 1;
        Ok(session)
    }

    /// What has to be kept of the session for [`MainServerSession::resume`]. Once [`MainServerSession::revision`] has changed it has to be kept
    /// before anything is sent that came of the change.
    pub fn state(&self) -> RunState {
        RunState {
            round: self.round,
            has_started: self.has_started,
            next_client: self.reserved,
            clients: self.roster.state(),
        }
    }

    /// Changes with what [`MainServerSession::state`] has to say before it may be acted on.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Who holds what at present.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Has the driver keep what a round begins from, or what the run ends with.
    pub(super) fn keep(&mut self, round: u32) {
        self.events.push_back(MainEvent::Keep {
            round,
            placement: Box::new(Placement::clone(&self.placement)),
        });
    }

    /// Makes sure that the number of the next newcomer is kept.
    pub(super) fn reserve(&mut self) {
        if self.roster.next_client() >= self.reserved {
            self.reserved = self.roster.next_client() + RESERVED;
            self.revision += 1;
        }
    }

    /// Optimiser steps in the run before this round. Every round that closes has all of its steps.
    pub(super) fn steps_before(&self, round: u32) -> u64 {
        u64::from(round) * u64::from(self.config().local_steps)
    }

    /// Those who were there when the run was interrupted, as long as the next round waits for them.
    pub fn awaited_back(&self) -> BTreeSet<ClientId> {
        match self.is_returning {
            true => self.roster.expected().clone(),
            false => BTreeSet::new(),
        }
    }
}
