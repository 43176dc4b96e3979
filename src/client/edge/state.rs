//! What a client keeps of a run, as bytes: who it is there, and where its training stood at the last rounds' beginnings.
//!
//! The adapter's values are not kept, since the server tells them to whoever comes back. Separate from the machine because the
//! bytes outlive the process, and may come back damaged.

use super::task::Standing;
use crate::data::Cursor;
use crate::protocol::Passport;
use crate::protocol::codec::DecodeError;
use crate::protocol::codec::wire::{Reader, Wire, put_length, wire_list, wire_struct};
use crate::protocol::message::{Digest, Ticket};

/// The first bytes.
const MAGIC: [u8; 4] = *b"SFLC";
/// What this crate writes, and all that it reads.
const VERSION: u16 = 1;
const DIGEST_BYTES: usize = 32;
/// The beginnings of rounds that are kept: a server that lost the end of a round may go back by one.
pub(super) const CHECKPOINTS: usize = 2;

/// What a client keeps of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Who it is there.
    pub passport: Passport,
    /// Where the run is, for people.
    pub server: String,
    /// Of the examples, once they were read.
    pub data: Option<Digest>,
    /// Of ascending rounds.
    pub checkpoints: Vec<Checkpoint>,
}

/// Where training stood when a round began.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The round's number, from 0.
    pub round: u32,
    /// Where training stood.
    pub standing: Standing,
}

/// Why bytes are not what a client has kept.
#[expect(missing_docs, reason = "the messages say it")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("it is not what a client keeps of a run")]
    Foreign,
    #[error("it was written by another version of this program (format {found}, not {VERSION})")]
    Version { found: u16 },
    #[error("it is damaged: its digest is another")]
    Damaged,
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("its {0} cannot be")]
    Impossible(&'static str),
}

impl State {
    /// As bytes for [`State::decode`]: with a version and a digest.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        VERSION.put(&mut bytes);
        self.put(&mut bytes);
        let digest = Digest::of(&bytes);
        digest.put(&mut bytes);
        bytes
    }

    /// What [`State::encode`] has written.
    ///
    /// # Errors
    /// [`StateError`]: there is nothing to go on from.
    pub fn decode(bytes: &[u8]) -> Result<State, StateError> {
        let Some(rest) = bytes.strip_prefix(&MAGIC) else {
            return Err(StateError::Foreign);
        };
        // Another version may have its digest elsewhere.
        let found = u16::take(&mut Reader { bytes: rest })?;
        if found != VERSION {
            return Err(StateError::Version { found });
        }
        let (contents, digest) = bytes.split_last_chunk::<DIGEST_BYTES>().ok_or(StateError::Damaged)?;
        if Digest::of(contents).0 != *digest {
            return Err(StateError::Damaged);
        }
        let mut reader = Reader {
            bytes: contents.get(MAGIC.len() + size_of::<u16>()..).unwrap_or_default(),
        };
        let state = State::take(&mut reader)?;
        reader.finish()?;
        let ascend = state.checkpoints.is_sorted_by(|one, next| one.round < next.round);
        if state.checkpoints.len() > CHECKPOINTS || !ascend {
            return Err(StateError::Impossible("rounds"));
        }
        let fits = |checkpoint: &Checkpoint| {
            let moments = &checkpoint.standing.moments;
            moments.are_of(moments.len(), moments.steps) && moments.are_possible()
        };
        if !state.checkpoints.iter().all(fits) {
            return Err(StateError::Impossible("moments"));
        }
        Ok(state)
    }
}

wire_struct!(State {
    passport: Passport,
    server: String,
    data: Option<Digest>,
    checkpoints: Vec<Checkpoint>,
});
wire_struct!(Checkpoint {
    round: u32,
    standing: Standing,
});
wire_list!(Checkpoint);

impl Wire for Passport {
    const MIN_BYTES: usize = 16 + 8 + Vec::<u8>::MIN_BYTES;

    fn put(&self, out: &mut Vec<u8>) {
        self.run.put(out);
        self.client.put(out);
        self.ticket.0.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Passport {
            run: Wire::take(reader)?,
            client: Wire::take(reader)?,
            ticket: Ticket(Wire::take(reader)?),
        })
    }
}

impl Wire for Standing {
    const MIN_BYTES: usize = 16;

    fn put(&self, out: &mut Vec<u8>) {
        self.moments.put(out);
        self.cursor.epoch.put(out);
        self.cursor.position.put(out);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Standing {
            moments: Wire::take(reader)?,
            cursor: Cursor {
                epoch: Wire::take(reader)?,
                position: Wire::take(reader)?,
            },
        })
    }
}
