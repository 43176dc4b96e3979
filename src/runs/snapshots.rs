//! What a run resumes from: its state, as numbered files of which the last two are kept.
//!
//! A state is small (an adapter, its moments, a few counters), is made whole and replaces the one before it as a whole, and is read
//! once, at a start. So it is a file of its own each time, and not an entry of a database as redb: there is nothing to look up, no log to
//! replay, and a file that was cut short or flipped is told by its digest, put aside under a name that says so, and leaves the one before it
//! to go on from.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `sflstate` |
//! | 4 | the version of this form, 1 |
//! | 8 | the number that [`Snapshots::save`] was given |
//! | 8 | n: bytes of the state |
//! | n | the state |
//! | 32 | SHA-256 of all before it |
//!
//! Numbers are little-endian. What the state's bytes mean is said by whoever saves them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::disk::{self, Error};

const MAGIC: [u8; 8] = *b"sflstate";
const VERSION: u32 = 1;
const HEADER: usize = 28;
const DIGEST: usize = 32;
/// Snapshots that are kept: the last, and the one to go back to should it turn out to be damaged.
const KEPT: usize = 2;
const EXTENSION: &str = "snapshot";

/// The snapshots in a directory. Whoever has opened it is the only one who writes there: that is held by the run's [`disk::Claim`].
#[derive(Debug)]
pub struct Snapshots {
    directory: PathBuf,
    /// Sequence numbers of the whole ones, the oldest first.
    kept: Vec<u64>,
    /// Of the next file.
    next: u64,
    damaged: Vec<Damaged>,
    /// What writes that were cut short have left.
    unfinished: Vec<PathBuf>,
}

/// The newest whole state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The number it was saved by.
    pub number: u64,
    pub bytes: Vec<u8>,
}

/// A snapshot that cannot be used, and was put aside.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} is damaged ({why}) and was put aside as {}", .file.display(), .aside.display())]
pub struct Damaged {
    pub file: PathBuf,
    /// Where it is now.
    pub aside: PathBuf,
    pub why: String,
}

impl Snapshots {
    /// The snapshots in `directory`, which need not exist yet, and the newest whole one. Damaged ones that are newer are put aside, as
    /// [`Self::damaged`] says.
    ///
    /// # Errors
    /// [`Error::File`] when the directory cannot be read, a snapshot not opened, or a damaged one not renamed.
    pub fn open(directory: &Path) -> Result<(Self, Option<Loaded>), Error> {
        let mut snapshots = Self {
            directory: directory.to_owned(),
            kept: Vec::new(),
            next: 0,
            damaged: Vec::new(),
            unfinished: Vec::new(),
        };
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((snapshots, None)),
            Err(error) => return Err(Error::file("read", directory, error)),
        };
        for entry in entries {
            let entry = entry.map_err(|error| Error::file("read", directory, error))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            match sequence_of(&name) {
                Some(sequence) => {
                    snapshots.next = snapshots.next.max(sequence.saturating_add(1));
                    if !name.ends_with(DAMAGED) {
                        snapshots.kept.push(sequence);
                    }
                }
                None if is_unfinished(&name) => snapshots.unfinished.push(entry.path()),
                None => {}
            }
        }
        snapshots.kept.sort_unstable();
        snapshots.kept.dedup();
        while let Some(&sequence) = snapshots.kept.last() {
            let path = snapshots.path(sequence);
            let file = File::open(&path).map_err(|error| Error::file("open", &path, error))?;
            match read(file) {
                Ok(loaded) => return Ok((snapshots, Some(loaded))),
                Err(why) => snapshots.put_aside(path, why)?,
            }
            snapshots.kept.pop();
        }
        Ok((snapshots, None))
    }

    /// What [`Self::open`] has put aside, the newest first. With no state loaded and something here, all is lost.
    pub fn damaged(&self) -> &[Damaged] {
        &self.damaged
    }

    /// Saves a state: it is on the disk when this returns. The one before it is kept as well; older ones are removed, and what writes
    /// that were cut short have left.
    ///
    /// # Errors
    /// [`Error::File`]; those saved before are then still there, and the next call tries again.
    pub fn save(&mut self, number: u64, bytes: &[u8]) -> Result<(), Error> {
        fs::create_dir_all(&self.directory).map_err(|error| Error::file("create", &self.directory, error))?;
        for leftover in self.unfinished.drain(..) {
            // It costs disk space only.
            let _ = fs::remove_file(leftover);
        }
        let sequence = self.next;
        disk::replace(&self.path(sequence), &encode(number, bytes))?;
        self.next = sequence.saturating_add(1);
        self.kept.push(sequence);
        while self.kept.len() > KEPT {
            let oldest = self.kept.remove(0);
            // A leftover costs disk space only, and is removed when there are newer ones again.
            let _ = fs::remove_file(self.path(oldest));
        }
        Ok(())
    }

    fn path(&self, sequence: u64) -> PathBuf {
        self.directory.join(format!("{sequence:08}.{EXTENSION}"))
    }

    fn put_aside(&mut self, file: PathBuf, why: String) -> Result<(), Error> {
        let aside = file.with_extension(format!("{EXTENSION}{DAMAGED}"));
        fs::rename(&file, &aside).map_err(|error| Error::file("rename", &file, error))?;
        self.damaged.push(Damaged { file, aside, why });
        Ok(())
    }
}

const DAMAGED: &str = ".damaged";

/// The sequence number in a snapshot's name, put aside or not.
fn sequence_of(name: &str) -> Option<u64> {
    let name = name.strip_suffix(DAMAGED).unwrap_or(name);
    let number = name.strip_suffix(EXTENSION)?.strip_suffix('.')?;
    let sequence = number.parse().ok()?;
    // Other spellings of the number would be other files.
    (format!("{sequence:08}") == number).then_some(sequence)
}

/// Whether a name is that of a file which [`disk::replace`] had not finished.
fn is_unfinished(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".tmp") && name.contains(&format!(".{EXTENSION}."))
}

fn encode(number: u64, bytes: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEADER + bytes.len() + DIGEST);
    file.extend(MAGIC);
    file.extend(VERSION.to_le_bytes());
    file.extend(number.to_le_bytes());
    file.extend((bytes.len() as u64).to_le_bytes());
    file.extend(bytes);
    let digest: [u8; DIGEST] = Sha256::digest(&file).into();
    file.extend(digest);
    file
}

/// Reads a whole snapshot, or says why it is none.
fn read(mut file: File) -> Result<Loaded, String> {
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    let mut header = [0; HEADER];
    file.read_exact(&mut header)
        .map_err(|_| format!("it ends after {size} bytes, within its header"))?;
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| header[at + index]));
    if header[..8] != MAGIC {
        return Err("it does not begin as a snapshot".to_owned());
    }
    let version = u32::from_le_bytes(std::array::from_fn(|index| header[8 + index]));
    if version != VERSION {
        return Err(format!("it is of version {version}, and this program reads {VERSION}"));
    }
    let (number, length) = (word(12), word(20));
    // Before anything of that size is allocated.
    if length.checked_add((HEADER + DIGEST) as u64) != Some(size) {
        return Err(format!(
            "it has {size} bytes, and its header tells of a state of {length}"
        ));
    }
    let mut bytes = Vec::new();
    let rest = usize::try_from(size).unwrap_or(usize::MAX) - HEADER;
    bytes
        .try_reserve_exact(rest)
        .map_err(|_| format!("there is no memory for its {size} bytes"))?;
    file.take(rest as u64)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("it cannot be read: {error}"))?;
    let state = rest - DIGEST;
    if bytes.len() != rest {
        return Err("it became shorter while it was read".to_owned());
    }
    let digest = Sha256::new()
        .chain_update(header)
        .chain_update(&bytes[..state])
        .finalize();
    if digest[..] != bytes[state..] {
        return Err("its digest is another".to_owned());
    }
    bytes.truncate(state);
    Ok(Loaded { number, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn loaded(directory: &Path) -> Option<(u64, Vec<u8>)> {
        let (_, loaded) = Snapshots::open(directory).unwrap();
        loaded.map(|Loaded { number, bytes }| (number, bytes))
    }

    #[test]
    fn the_last_of_two_is_found_again() {
        let home = tempfile::tempdir().unwrap();
        let state = home.path().join("run/state");
        let (mut snapshots, none) = Snapshots::open(&state).unwrap();
        assert_eq!(none, None);
        assert!(!state.exists(), "to open is not to write");
        for (number, bytes) in [(10, &b"one"[..]), (20, b""), (20, b"three"), (15, b"four")] {
            snapshots.save(number, bytes).unwrap();
            assert_eq!(loaded(&state), Some((number, bytes.to_vec())));
        }
        assert_eq!(names(&state), ["00000002.snapshot", "00000003.snapshot"]);

        let (mut snapshots, _) = Snapshots::open(&state).unwrap();
        snapshots.save(16, b"five").unwrap();
        assert_eq!(names(&state), ["00000003.snapshot", "00000004.snapshot"]);
        assert_eq!(loaded(&state), Some((16, b"five".to_vec())));
    }

    /// Each way to damage the newest of two: it is named, put aside, and the one before it is used.
    fn falls_back(damage: impl Fn(&[u8]) -> Vec<u8>) -> String {
        let home = tempfile::tempdir().unwrap();
        let (mut snapshots, _) = Snapshots::open(home.path()).unwrap();
        snapshots.save(1, b"before").unwrap();
        snapshots.save(2, b"newest").unwrap();
        let newest = home.path().join("00000001.snapshot");
        let damaged = damage(&fs::read(&newest).unwrap());
        fs::write(&newest, &damaged).unwrap();

        let (mut snapshots, loaded) = Snapshots::open(home.path()).unwrap();
        let expected = Loaded {
            number: 1,
            bytes: b"before".to_vec(),
        };
        assert_eq!(loaded, Some(expected), "{damaged:?}");
        let [told] = snapshots.damaged() else {
            panic!("{:?}", snapshots.damaged());
        };
        assert_eq!(told.file, newest);
        assert_eq!(fs::read(&told.aside).unwrap(), damaged);
        let told = told.to_string();
        // What was put aside is neither overwritten nor looked at again.
        snapshots.save(3, b"after").unwrap();
        let after = ["00000000.snapshot", "00000001.snapshot.damaged", "00000002.snapshot"];
        assert_eq!(names(home.path()), after);
        let (snapshots, loaded) = Snapshots::open(home.path()).unwrap();
        assert_eq!(
            (loaded.map(|loaded| loaded.number), snapshots.damaged()),
            (Some(3), &[][..])
        );
        told
    }

    #[test]
    fn a_snapshot_cut_short_at_any_byte_is_named_and_the_one_before_it_is_used() {
        let whole = encode(2, b"newest").len();
        for length in 0..whole {
            let told = falls_back(|bytes| bytes[..length].to_vec());
            assert!(
                told.contains("00000001.snapshot") && told.contains(&length.to_string()),
                "{told}"
            );
        }
        falls_back(|bytes| [bytes, b"x"].concat());
    }

    #[test]
    fn a_snapshot_with_any_byte_flipped_is_named_and_the_one_before_it_is_used() {
        let whole = encode(2, b"newest").len();
        for at in 0..whole {
            for mask in [1, 0x80, 0xff] {
                falls_back(|bytes| {
                    let mut bytes = bytes.to_vec();
                    bytes[at] ^= mask;
                    bytes
                });
            }
        }
    }

    #[test]
    fn with_all_damaged_there_is_no_state_and_both_are_named() {
        let home = tempfile::tempdir().unwrap();
        let (mut snapshots, _) = Snapshots::open(home.path()).unwrap();
        for number in 0..2 {
            snapshots.save(number, b"state").unwrap();
            fs::write(home.path().join(format!("{number:08}.snapshot")), "").unwrap();
        }
        let (snapshots, loaded) = Snapshots::open(home.path()).unwrap();
        assert_eq!(loaded, None);
        assert_eq!(snapshots.damaged().len(), 2);
    }

    #[test]
    fn what_a_killed_write_has_left_is_removed_and_nothing_else_is() {
        let home = tempfile::tempdir().unwrap();
        let (mut snapshots, _) = Snapshots::open(home.path()).unwrap();
        snapshots.save(1, b"state").unwrap();
        for name in [".00000001.snapshot.77-0.tmp", "mine.txt", "1.snapshot", ".mine.tmp"] {
            fs::write(home.path().join(name), "x").unwrap();
        }
        let (mut snapshots, loaded) = Snapshots::open(home.path()).unwrap();
        assert_eq!(loaded.map(|loaded| loaded.number), Some(1));
        assert_eq!(names(home.path()).len(), 5, "to open is not to write");
        snapshots.save(2, b"next").unwrap();
        assert_eq!(
            names(home.path()),
            [
                ".mine.tmp",
                "00000000.snapshot",
                "00000001.snapshot",
                "1.snapshot",
                "mine.txt"
            ]
        );
    }

    #[test]
    fn a_save_that_fails_loses_nothing_and_the_next_one_counts() {
        let home = tempfile::tempdir().unwrap();
        let state = home.path().join("state");
        let (mut snapshots, _) = Snapshots::open(&state).unwrap();
        snapshots.save(1, b"one").unwrap();
        // In the way of the next file: nothing can be given its name.
        let obstacle = state.join("00000001.snapshot");
        fs::create_dir(&obstacle).unwrap();
        let error = snapshots.save(2, b"two").unwrap_err().to_string();
        assert!(error.contains("00000001.snapshot"), "{error}");
        assert_eq!(names(&state), ["00000000.snapshot", "00000001.snapshot"]);
        fs::remove_dir(&obstacle).unwrap();
        assert_eq!(loaded(&state), Some((1, b"one".to_vec())));
        snapshots.save(3, b"three").unwrap();
        assert_eq!(loaded(&state), Some((3, b"three".to_vec())));
    }
}
