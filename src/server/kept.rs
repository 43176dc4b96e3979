//! What a main server keeps of its run on disk, and what it takes a run up again from.
//!
//! | file of `state/` | is written | has |
//! |---|---|---|
//! | `server.json` | when the run begins | the run's number and the key of its tickets, the join token |
//! | `rounds/` | when a round is about to begin, before anybody is told that the one before is done | [`Checkpoint`], totals, how far `metrics.jsonl` goes |
//! | `members/` | when a round begins, and before an answer that gives out numbers, shuts somebody out or loses a round | [`RunState`] |
//!
//! Each is on the disk before what came of it is sent. Separate from the coordinator because what is on disk has a form of its own. The directory is
//! the owner's alone: who has the key of the tickets is every client.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::Error;
use super::coordinator::Totals;
use crate::protocol::{Checkpoint, RunState};
use crate::runs::directory::RunDirectory;
use crate::runs::snapshots::Snapshots;
use crate::terms::ids::RunId;

const SERVER: &str = "server.json";

/// The files of a run that goes on.
pub struct Kept {
    members: Snapshots,
    rounds: Snapshots,
    /// The revision of the session that `members` has.
    revision: Option<u64>,
}

/// What never changes in a run.
#[derive(Clone, Debug)]
pub struct Identity {
    pub run: RunId,
    pub ticket_key: [u8; 32],
    /// The join token.
    pub token: Option<String>,
    /// Of the link to a federated server elsewhere.
    pub control_key: Option<String>,
}

/// A run to be taken up again.
pub struct Interrupted {
    pub identity: Identity,
    pub state: RunState,
    pub checkpoint: Checkpoint,
    pub totals: Totals,
    /// What was found damaged, and what is done instead.
    pub damage: Vec<String>,
    kept: Kept,
}

impl Interrupted {
    /// Reads what a run has left.
    ///
    /// # Errors
    /// [`Error::NoState`] where nothing can be gone on from, with the reason; [`Error::Disk`].
    pub fn open(directory: &RunDirectory) -> Result<Self, Error> {
        let state = directory.path().join("state");
        let fail = |reason: String| Error::NoState {
            path: directory.path().display().to_string(),
            reason,
        };
        let path = state.join(SERVER);
        let text = fs::read_to_string(&path).map_err(|error| fail(format!("{}: {error}", path.display())))?;
        let identity = Identity::from_json(&text).ok_or_else(|| fail(format!("{} is damaged", path.display())))?;
        let (rounds, checkpoint) = Snapshots::open(&state.join("rounds"))?;
        let (members, known) = Snapshots::open(&state.join("members"))?;
        let mut damage: Vec<String> = rounds
            .damaged()
            .iter()
            .chain(members.damaged())
            .map(ToString::to_string)
            .collect();
        let Some(checkpoint) = checkpoint else {
            return Err(fail(match damage.first() {
                Some(damage) => damage.clone(),
                None => "no round has begun".to_owned(),
            }));
        };
        let (totals, checkpoint) =
            split_totals(&checkpoint.bytes).ok_or_else(|| fail("a checkpoint is too short".to_owned()))?;
        let totals = Totals::from_json(totals);
        let checkpoint = Checkpoint::decode(checkpoint).map_err(|error| fail(format!("its checkpoint: {error}")))?;
        let state = match known {
            Some(known) => RunState::decode(&known.bytes).map_err(|error| fail(format!("its members: {error}")))?,
            None => {
                damage.push(
                    "nothing is known of the clients: each comes back under its number as long as it has a ticket"
                        .to_owned(),
                );
                RunState::unknown(checkpoint.round)
            }
        };
        Ok(Self {
            identity,
            state,
            checkpoint,
            totals,
            damage,
            kept: Kept {
                members,
                rounds,
                revision: None,
            },
        })
    }

    /// How long the run has gone on.
    pub fn elapsed(&self) -> Duration {
        Duration::try_from_secs_f64(self.totals.seconds).unwrap_or_default()
    }

    /// Its files, to go on with.
    pub fn into_kept(self) -> Kept {
        self.kept
    }
}

impl Kept {
    /// The files of a run that begins.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn create(directory: &RunDirectory, identity: &Identity) -> Result<Self, Error> {
        let state = directory.path().join("state");
        private_directory(&state).map_err(|error| Error::file("create", &state, error))?;
        directory.write_state(SERVER, identity.to_json().to_string().as_bytes())?;
        Ok(Self {
            members: Snapshots::open(&state.join("members"))?.0,
            rounds: Snapshots::open(&state.join("rounds"))?.0,
            revision: None,
        })
    }

    /// Whether the session has changed since its members were kept.
    pub fn lacks(&self, revision: u64) -> bool {
        self.revision != Some(revision)
    }

    /// Has the members kept again, changed or not.
    pub fn forget(&mut self) {
        self.revision = None;
    }

    /// Keeps who is in the run.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn members(&mut self, revision: u64, state: &RunState) -> Result<(), Error> {
        // Once is enough where it fails: it is tried again with the next change and the next round.
        self.revision = Some(revision);
        Ok(self.members.save(revision, &state.encode())?)
    }

    /// Keeps the beginning of a round.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn round(&mut self, checkpoint: &Checkpoint, totals: &Totals) -> Result<(), Error> {
        let totals = totals.to_json().to_string();
        let mut bytes = (totals.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(totals.as_bytes());
        bytes.extend(checkpoint.encode());
        Ok(self.rounds.save(checkpoint.round.into(), &bytes)?)
    }
}

/// The totals' text and the checkpoint.
fn split_totals(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (totals, checkpoint) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    Some((std::str::from_utf8(totals).ok()?, checkpoint))
}

impl Identity {
    fn to_json(&self) -> Value {
        json!({
            "run": hex(&self.run.0), "ticket_key": hex(&self.ticket_key), "token": self.token,
            "control_key": self.control_key,
        })
    }

    fn from_json(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        Some(Self {
            run: RunId(unhex(value["run"].as_str()?)?),
            ticket_key: unhex(value["ticket_key"].as_str()?)?,
            token: value["token"].as_str().map(str::to_owned),
            control_key: value["control_key"].as_str().map(str::to_owned),
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N || !text.is_ascii() {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// Makes a directory that only its owner may look into.
fn private_directory(path: &Path) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt;
        builder.mode(0o700);
    }
    builder.create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_as_it_was_written() {
        let identity = Identity {
            run: RunId(std::array::from_fn(|index| index as u8 * 15)),
            ticket_key: [0xa5; 32],
            token: Some("tok\"en".to_owned()),
            control_key: Some(String::new()),
        };
        let text = identity.to_json().to_string();
        let read = Identity::from_json(&text).unwrap();
        assert_eq!(read.to_json(), identity.to_json());
        for damaged in [
            &text[..text.len() - 1],
            "{}",
            &text.replacen("a5", "g5", 1),
            &text.replacen("a5", "", 1),
        ] {
            assert!(Identity::from_json(damaged).is_none(), "{damaged}");
        }
    }

    #[test]
    fn totals_and_checkpoint_are_told_apart() {
        assert_eq!(split_totals(b"\x02\0\0\0\0\0\0\0{}rest"), Some(("{}", &b"rest"[..])));
        assert_eq!(split_totals(b"\x02\0\0\0\0\0\0\0{"), None);
        assert_eq!(split_totals(b"\xff\xff\xff\xff\xff\xff\xff\xff{}"), None);
        assert_eq!(split_totals(b"\x02\0"), None);
    }
}
