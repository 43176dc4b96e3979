//! A run directory: configuration and totals, metrics, the adapter, and the model parts handed to clients.
//!
//! It is separate from the run so that every file is written in one place, and so that a reader at any moment finds each
//! file whole.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::Error;
use crate::protocol::message::{Blob, Digest};

/// Replaces the file at `path`: a reader sees the old contents or the new, never a part.
///
/// # Errors
/// [`Error::File`] with the path.
pub fn write_atomically(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|error| {
        // The first error is the one to report, whether or not the leftover can be removed.
        let _ = fs::remove_file(&temporary);
        Error::file("write", path, error)
    })
}

/// The directory of one run.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
    run: Map<String, Value>,
}

impl RunDirectory {
    /// Makes `out`, or `runs/<time>-<name>` without one. A directory that holds an earlier run's `run.json` and
    /// `metrics.jsonl` keeps them as `run.previous.json` and `metrics.previous.jsonl`.
    ///
    /// # Errors
    /// [`Error::File`] with the path.
    pub fn create(out: Option<&Path>, name: &str) -> Result<Self, Error> {
        let now = SystemTime::now();
        let path = match out {
            Some(out) => out.to_owned(),
            None => {
                let name: String = name
                    .chars()
                    .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
                    .collect();
                Path::new("runs").join(format!("{}-{name}", file_time(now)))
            }
        };
        fs::create_dir_all(&path).map_err(|error| Error::file("create", &path, error))?;
        for (name, kept) in [
            ("run.json", "run.previous.json"),
            ("metrics.jsonl", "metrics.previous.jsonl"),
        ] {
            let file = path.join(name);
            match fs::rename(&file, path.join(kept)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::file("rename", &file, error));
                }
                _ => {}
            }
        }
        let mut run = Map::new();
        run.insert("version".to_owned(), json!(env!("CARGO_PKG_VERSION")));
        run.insert("start".to_owned(), json!(text_time(now)));
        Ok(Self { path, run })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the adapter of the whole model is kept, in PEFT's form.
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// Model parts for clients, by content hash.
    pub fn weights(&self) -> PathBuf {
        self.path.join("weights")
    }

    /// Adds to `run.json` and rewrites it.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn note(&mut self, fields: Value) -> Result<(), Error> {
        if let Value::Object(fields) = fields {
            self.run.extend(fields);
        }
        let mut text = serde_json::to_string_pretty(&self.run).expect("a JSON value has a text");
        text.push('\n');
        write_atomically(&self.path.join("run.json"), text.as_bytes())
    }

    /// Notes the end of the run.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn end(&mut self, reason: &str, totals: Value) -> Result<(), Error> {
        self.note(json!({ "end": text_time(SystemTime::now()), "ended": reason, "totals": totals }))
    }

    /// Replaces a file below `state/`.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn write_state(&self, name: &str, contents: &[u8]) -> Result<(), Error> {
        let directory = self.path.join("state");
        fs::create_dir_all(&directory).map_err(|error| Error::file("create", &directory, error))?;
        write_atomically(&directory.join(name), contents)
    }
}

/// Files served by the hash of their content. More can be added while others are served.
#[derive(Debug, Default)]
pub struct Blobs {
    directory: PathBuf,
    files: Mutex<BTreeMap<Digest, PathBuf>>,
}

impl Blobs {
    /// Blobs to be written into `directory`, which is made if it does not exist.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn create(directory: &Path) -> Result<Self, Error> {
        fs::create_dir_all(directory).map_err(|error| Error::file("create", directory, error))?;
        Ok(Self {
            directory: directory.to_owned(),
            files: Mutex::default(),
        })
    }

    /// Writes one blob, without holding it in memory. `write` gives the contents.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn add(&self, name: &str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<Blob, Error> {
        let temporary = self.directory.join(format!(".{name}.tmp"));
        let fail = |error| Error::file("write", &temporary, error);
        let file = fs::File::create(&temporary).map_err(fail)?;
        let mut output = Hashing {
            inner: BufWriter::new(file),
            hash: Sha256::new(),
            bytes: 0,
        };
        write(&mut output).and_then(|()| output.inner.flush()).map_err(fail)?;
        let sha256 = Digest(output.hash.finalize().into());
        let path = self.directory.join(sha256.to_string());
        fs::rename(&temporary, &path).map_err(fail)?;
        self.files().insert(sha256, path);
        Ok(Blob {
            name: name.to_owned(),
            sha256,
            bytes: output.bytes,
        })
    }

    /// The file of a blob.
    pub fn path(&self, sha256: &Digest) -> Option<PathBuf> {
        self.files().get(sha256).cloned()
    }

    fn files(&self) -> std::sync::MutexGuard<'_, BTreeMap<Digest, PathBuf>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the files, which can be made again from the model.
    pub fn remove(&self) {
        for path in self.files().values() {
            // A leftover costs disk space only.
            let _ = fs::remove_file(path);
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// SHA-256 of a file's contents.
///
/// # Errors
/// [`Error::File`].
pub fn file_digest(path: &Path) -> Result<Digest, Error> {
    let fail = |error| Error::file("read", path, error);
    let mut file = fs::File::open(path).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(fail)? {
            0 => return Ok(Digest(hash.finalize().into())),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// Year, month, day, hour, minute and second in UTC. The calendar repeats every 400 years, which begin in March here so that
/// a leap day comes last.
fn civil(time: SystemTime) -> [u64; 6] {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    let days = seconds / 86_400 + 719_468; // since 0000-03-01
    let (era, day) = (days / 146_097, days % 146_097);
    let year_of_era = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    [
        year,
        month,
        day_of_month,
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    ]
}

/// `20250131-235959`.
fn file_time(time: SystemTime) -> String {
    let [year, month, day, hour, minute, second] = civil(time);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

/// `2025-01-31T23:59:59Z`.
pub fn text_time(time: SystemTime) -> String {
    let [year, month, day, hour, minute, second] = civil(time);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_civil_dates() {
        let time = |seconds| text_time(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(time(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(time(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn a_blob_is_named_by_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::create(&directory.path().join("weights")).unwrap();
        let blob = blobs.add("block.0", |output| output.write_all(b"abc")).unwrap();
        assert_eq!(blob.sha256, Digest::of(b"abc"));
        assert_eq!(blob.bytes, 3);
        let path = blobs.path(&blob.sha256).unwrap();
        assert_eq!(file_digest(&path).unwrap(), blob.sha256);
        assert_eq!(blobs.path(&Digest::of(b"other")), None);
        blobs.remove();
        assert!(!path.exists());
    }

    #[test]
    fn an_earlier_run_in_the_same_directory_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        RunDirectory::create(Some(directory.path()), "x")
            .unwrap()
            .note(json!({ "mark": 1 }))
            .unwrap();
        fs::write(directory.path().join("metrics.jsonl"), "old\n").unwrap();
        let mut second = RunDirectory::create(Some(directory.path()), "x").unwrap();
        second.note(json!({ "mark": 2 })).unwrap();
        second.end("completed", json!({ "rounds": 3 })).unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        assert!(read("run.previous.json").contains("\"mark\": 1"));
        assert_eq!(read("metrics.previous.jsonl"), "old\n");
        let run: Value = serde_json::from_str(&read("run.json")).unwrap();
        assert_eq!(
            (&run["mark"], &run["totals"]["rounds"], &run["ended"]),
            (&json!(2), &json!(3), &json!("completed"))
        );
    }
}
