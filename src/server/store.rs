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
use crate::disk::{self, Claim};
use crate::model::export::card::{CARD_FILE, card};
use crate::model::peft::CONFIG_FILE;
use crate::protocol::message::{Blob, Digest};

/// What says that a directory holds a run.
const MARKS: [&str; 4] = ["run.json", "metrics.jsonl", "adapter", "state"];

/// The directory of one run, which nobody else may write in meanwhile.
///
/// A run that never begins leaves nothing behind, so that the same command can be given again.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
    run: Map<String, Value>,
    begun: bool,
    /// Held for as long as the run lasts.
    _claim: Claim,
}

impl RunDirectory {
    /// Claims `out`, or without one a new `runs/<time>-<name>`.
    ///
    /// # Errors
    /// [`disk::Error::Taken`] for a directory that holds a run, [`disk::Error::Busy`] for one whose run goes on,
    /// [`disk::Error::File`] with the path.
    pub fn create(out: Option<&Path>, name: &str) -> Result<Self, Error> {
        let now = SystemTime::now();
        let claim = |path: &Path| Claim::directory(path, "--out", "a run", &MARKS);
        let (path, claim) = match out {
            Some(out) => (out.to_owned(), claim(out)?),
            None => {
                let name: String = name
                    .chars()
                    .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
                    .collect();
                let path = Path::new("runs").join(format!("{}-{name}", file_time(now)));
                // Several may begin in one second.
                let mut number = 1;
                loop {
                    let path = match number {
                        1 => path.clone(),
                        number => path.with_file_name(format!("{}-{name}-{number}", file_time(now))),
                    };
                    match claim(&path) {
                        Err(disk::Error::Taken { .. } | disk::Error::Busy { .. }) if number < 1000 => number += 1,
                        claim => break (path, claim?),
                    }
                }
            }
        };
        let mut run = Map::new();
        run.insert("version".to_owned(), json!(env!("CARGO_PKG_VERSION")));
        run.insert("start".to_owned(), json!(text_time(now)));
        Ok(Self {
            path,
            run,
            begun: false,
            _claim: claim,
        })
    }

    /// TEMPORARY
    pub fn resume(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path.join("run.json")).map_err(|error| Error::file("read", path, error))?;
        Ok(Self {
            path: path.to_owned(),
            run: serde_json::from_str(&text).unwrap_or_default(),
            begun: true,
            _claim: Claim::file(&path.join("x"), "--resume")?,
        })
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

    /// What `run.json` says, or is to say once the run has begun.
    pub fn run(&self) -> &Map<String, Value> {
        &self.run
    }

    /// Adds to `run.json`, and rewrites it if the run has begun.
    ///
    /// # Errors
    /// [`disk::Error::File`]; what was added is then written with what is added next.
    pub fn note(&mut self, fields: Value) -> Result<(), Error> {
        if let Value::Object(fields) = fields {
            self.run.extend(fields);
        }
        match self.begun {
            true => self.write(),
            false => Ok(()),
        }
    }

    /// From here on this directory holds a run.
    ///
    /// # Errors
    /// [`disk::Error::File`].
    pub fn begin(&mut self) -> Result<(), Error> {
        self.write()?;
        self.begun = true;
        Ok(())
    }

    /// Notes the end of the run.
    ///
    /// # Errors
    /// [`disk::Error::File`].
    pub fn end(&mut self, reason: &str, totals: Value) -> Result<(), Error> {
        self.note(json!({ "end": text_time(SystemTime::now()), "ended": reason, "totals": totals }))?;
        self.write_card()
    }

    /// Gives the adapter, if one was saved here, the model card that says how it was trained.
    fn write_card(&self) -> Result<(), Error> {
        let adapter = self.adapter();
        let Ok(description) = fs::read(adapter.join(CONFIG_FILE)) else {
            return Ok(());
        };
        let description: Value = serde_json::from_slice(&description).unwrap_or_default();
        let card = card(&description, Some(&Value::Object(self.run.clone())));
        Ok(disk::replace(&adapter.join(CARD_FILE), card.as_bytes())?)
    }

    /// Replaces a file below `state/`.
    ///
    /// # Errors
    /// [`disk::Error::File`].
    pub fn write_state(&self, name: &str, contents: &[u8]) -> Result<(), Error> {
        let directory = self.path.join("state");
        fs::create_dir_all(&directory).map_err(|error| Error::file("create", &directory, error))?;
        Ok(disk::replace(&directory.join(name), contents)?)
    }

    fn write(&self) -> Result<(), Error> {
        let mut text = serde_json::to_string_pretty(&self.run).expect("a JSON value has a text");
        text.push('\n');
        Ok(disk::replace(&self.path.join("run.json"), text.as_bytes())?)
    }
}

/// Saves what a run has trained, for which there is no later time: where it belongs, else in a place of its own.
///
/// # Errors
/// Those of `save`; [`Error::Elsewhere`] says where it is instead.
pub fn save_at_last(directory: &Path, save: &dyn Fn(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let Err(error) = save(directory) else {
        return Ok(());
    };
    let name = format!("rescued-{}-{}", file_time(SystemTime::now()), std::process::id());
    let homes = crate::transport::data_directory()
        .into_iter()
        .chain([std::env::temp_dir().join("sflllm")]);
    match homes.map(|home| home.join(&name)).find(|place| save(place).is_ok()) {
        Some(place) => Err(Error::Elsewhere {
            error: Box::new(error),
            place: place.display().to_string(),
        }),
        None => Err(error),
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
    /// [`disk::Error::File`].
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
    /// [`disk::Error::File`].
    pub fn add(&self, name: &str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<Blob, Error> {
        let temporary = self.directory.join(format!(".{name}.tmp"));
        let fail = |error| {
            let _ = fs::remove_file(&temporary);
            Error::file("write", &temporary, error)
        };
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

impl Drop for Blobs {
    fn drop(&mut self) {
        self.remove();
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
/// [`disk::Error::File`].
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
        drop(blobs);
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_holds_a_run_is_refused_and_one_whose_run_never_began_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        let create = || RunDirectory::create(Some(&path), "x");
        let mut failed = create().unwrap();
        failed.note(json!({ "mark": 0 })).unwrap();
        drop(failed);
        assert!(!path.exists());

        let mut first = create().unwrap();
        first.note(json!({ "mark": 1 })).unwrap();
        first.begin().unwrap();
        let busy = create().unwrap_err();
        assert!(matches!(busy, Error::Disk(disk::Error::Busy { .. })), "{busy}");
        first.end("completed", json!({ "rounds": 3 })).unwrap();
        drop(first);
        let taken = create().unwrap_err();
        assert!(matches!(taken, Error::Disk(disk::Error::Taken { .. })), "{taken}");
        let run: Value = serde_json::from_str(&fs::read_to_string(path.join("run.json")).unwrap()).unwrap();
        assert_eq!(
            (&run["mark"], &run["totals"]["rounds"], &run["ended"]),
            (&json!(1), &json!(3), &json!("completed"))
        );
    }

    #[test]
    fn what_was_trained_is_saved_elsewhere_rather_than_nowhere() {
        let directory = tempfile::tempdir().unwrap();
        let full = directory.path().join("adapter");
        let tried = Mutex::new(Vec::new());
        let save = |place: &Path| {
            tried.lock().unwrap().push(place.to_owned());
            match place == full {
                true => Err(Error::file("write", place, io::ErrorKind::StorageFull.into())),
                false => Ok(()),
            }
        };
        let error = save_at_last(&full, &save).unwrap_err().to_string();
        let place = tried.lock().unwrap()[1].display().to_string();
        assert!(
            error.contains("cannot write") && error.ends_with(&format!("the adapter is in {place} instead")),
            "{error}"
        );
        assert!(save_at_last(&directory.path().join("free"), &save).is_ok());
    }
}
