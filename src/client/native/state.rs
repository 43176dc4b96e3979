//! A directory in which one client keeps what it needs to come back to a run.
//!
//! Separate from what is kept, which is the machine's: here it is a file that one process at a time has.

use std::io;
use std::path::{Path, PathBuf};

use super::super::edge::{State, StateError};
use crate::disk::{self, Claim};
use crate::protocol::message::Digest;

/// The file in the directory.
const FILE: &str = "client.state";
/// By what a user names the directory.
const OPTION: &str = "--state";
/// Processes on one machine that are the same client but for this.
const MOST_ALIKE: usize = 1000;

/// The directory, for as long as this process has it.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    _claim: Claim,
}

/// What was in it.
#[derive(Debug)]
pub enum Found {
    Nothing,
    State(Box<State>),
    /// It could not be used, and is called `aside` from now on.
    Damaged {
        aside: PathBuf,
        reason: StateError,
    },
}

impl StateDirectory {
    /// Takes a directory, which is made if it does not exist.
    ///
    /// # Errors
    /// [`disk::Error::Busy`] when another process has it, [`disk::Error::File`].
    pub fn open(path: &Path) -> Result<Self, disk::Error> {
        Ok(Self {
            _claim: Claim::file(&path.join(FILE), OPTION)?,
            path: path.to_owned(),
        })
    }

    /// Takes the directory below `clients` of a client that joins `server` under this name with this data: of those that are
    /// alike the first that no other process has.
    ///
    /// # Errors
    /// [`disk::Error`].
    pub fn of_client(clients: &Path, server: &str, name: &str, data: &Path) -> Result<Self, disk::Error> {
        // However it is written; a file that is not there is not learned from.
        let data = std::fs::canonicalize(data).unwrap_or_else(|_| data.to_owned());
        let parts = [server, name, &data.to_string_lossy()].join("\n");
        let digest = Digest::of(parts.as_bytes()).to_string();
        let place = server.split_once("://").map_or(server, |(_, place)| place);
        let label: String = format!("{place}-{name}")
            .chars()
            .map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' })
            .take(60)
            .collect();
        let mut number = 1;
        loop {
            let suffix = if number > 1 {
                format!("-{number}")
            } else {
                String::new()
            };
            match Self::open(&clients.join(format!("{label}-{}{suffix}", &digest[..12]))) {
                Err(disk::Error::Busy { .. }) if number < MOST_ALIKE => number += 1,
                result => return result,
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self) -> PathBuf {
        self.path.join(FILE)
    }

    /// What is in it. What cannot be used is put aside, where it is in nobody's way.
    ///
    /// # Errors
    /// [`disk::Error::File`].
    pub fn load(&self) -> Result<Found, disk::Error> {
        let file = self.file();
        let bytes = match std::fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => return Err(disk::Error::file("read", &file, error)),
        };
        let reason = match State::decode(&bytes) {
            Ok(state) => return Ok(Found::State(Box::new(state))),
            Err(reason) => reason,
        };
        let names = (1..).map(|number| self.path.join(format!("{FILE}.damaged-{number}")));
        let free = |name: &PathBuf| std::fs::symlink_metadata(name).is_err();
        let aside = { names }
            .find(free)
            .unwrap_or_else(|| self.path.join(format!("{FILE}.damaged")));
        std::fs::rename(&file, &aside).map_err(|error| disk::Error::file("put aside", &file, error))?;
        Ok(Found::Damaged { aside, reason })
    }

    /// Keeps this in place of what was kept before: after a crash there is one or the other.
    ///
    /// # Errors
    /// [`disk::Error::File`]; what was kept before still is.
    pub fn save(&self, bytes: &[u8]) -> Result<(), disk::Error> {
        disk::replace(&self.file(), bytes)
    }

    /// Removes what is kept.
    pub fn forget(&self) {
        // Whoever finds it again finds a run that is over.
        let _ = std::fs::remove_file(self.file());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::edge::{Checkpoint, Standing};
    use crate::data::Cursor;
    use crate::protocol::Passport;
    use crate::protocol::message::Ticket;
    use crate::terms::ids::{ClientId, RunId};
    use crate::terms::moments::Moments;

    fn state() -> State {
        State {
            passport: Passport {
                run: RunId([7; 16]),
                client: ClientId(3),
                ticket: Ticket(vec![1, 2, 3]),
            },
            server: "http://127.0.0.1:8080".to_owned(),
            data: None,
            checkpoints: vec![Checkpoint {
                round: 4,
                standing: Standing {
                    moments: Moments::zero(5),
                    cursor: Cursor::default(),
                },
            }],
        }
    }

    #[test]
    fn what_is_kept_is_found_again_by_the_same_client_and_forgotten_at_the_end() {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("a.txt");
        let open = |name: &str| StateDirectory::of_client(home.path(), "http://h:1", name, &data).unwrap();
        let first = open("ada");
        assert!(matches!(first.load().unwrap(), Found::Nothing));
        first.save(&state().encode()).unwrap();
        let path = first.path().to_owned();
        drop(first);
        let other = open("grace");
        assert_ne!(other.path(), path);
        let again = open("ada");
        assert_eq!(again.path(), path);
        let Found::State(found) = again.load().unwrap() else {
            panic!("nothing was kept")
        };
        assert_eq!(*found, state());
        again.forget();
        assert!(matches!(again.load().unwrap(), Found::Nothing));
    }

    #[test]
    fn two_processes_never_have_the_same_directory() {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("a.txt");
        let open = || StateDirectory::of_client(home.path(), "http://h:1", "ada", &data).unwrap();
        let (first, second) = (open(), open());
        assert_ne!(first.path(), second.path());
        let busy = StateDirectory::open(first.path()).unwrap_err();
        assert!(matches!(&busy, disk::Error::Busy { .. }), "{busy}");
        assert!(busy.to_string().contains("--state"), "{busy}");
    }

    #[test]
    fn damage_is_named_and_put_aside_and_what_was_there_is_kept() {
        let home = tempfile::tempdir().unwrap();
        let directory = StateDirectory::open(home.path()).unwrap();
        let good = state().encode();
        let mut damaged = good.clone();
        damaged[20] ^= 1;
        for (bytes, expected) in [
            (damaged, StateError::Damaged),
            (good[..good.len() - 1].to_vec(), StateError::Damaged),
            (b"something else".to_vec(), StateError::Foreign),
        ] {
            directory.save(&bytes).unwrap();
            let Found::Damaged { aside, reason } = directory.load().unwrap() else {
                panic!("damage went unseen")
            };
            assert_eq!(reason, expected);
            assert_eq!(std::fs::read(aside).unwrap(), bytes);
            assert!(matches!(directory.load().unwrap(), Found::Nothing));
        }
        // A directory in its place.
        std::fs::create_dir(directory.file()).unwrap();
        let error = directory.load().unwrap_err();
        assert!(error.to_string().contains("client.state"), "{error}");
        assert!(directory.save(&good).is_err());
    }
}
