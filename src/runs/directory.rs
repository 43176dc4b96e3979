//! A run directory: configuration and totals, metrics, the adapter, and what the run resumes from.
//!
//! It is separate from the run so that every file is written in one place, and so that a reader at any moment finds each
//! file whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::Error;
use super::snapshots::{Loaded, Snapshots};
use super::time::{file_time, text_time};
use crate::disk::{self, Claim};
use crate::model::adapter::AdapterError;
use crate::model::export::card::{CARD_FILE, card};
use crate::model::peft::CONFIG_FILE;

/// What a run says of itself.
pub(super) const RUN_FILE: &str = "run.json";
pub(super) const LOG_FILE: &str = "metrics.jsonl";
pub(super) const STATE: &str = "state";

/// What says that a directory holds a run.
pub(super) const MARKS: [&str; 4] = [RUN_FILE, LOG_FILE, "adapter", STATE];

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
    /// [`Error::Taken`] for a directory that holds a run, [`disk::Error::Busy`] for one whose run goes on,
    /// [`disk::Error::File`] with the path.
    pub fn create(out: Option<&Path>, name: &str) -> Result<Self, Error> {
        let now = SystemTime::now();
        let claim = |path: &Path| match Claim::directory(path, "--out", "a run", &MARKS) {
            Err(disk::Error::Taken { path, .. }) => Err(Error::Taken(path)),
            claim => Ok(claim?),
        };
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
                        Err(Error::Taken(_) | Error::Disk(disk::Error::Busy { .. })) if number < 1000 => number += 1,
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

    /// Claims the directory of a run that has begun, to go on with it. Nothing in it is changed by that.
    ///
    /// # Errors
    /// [`Error::NoRun`], [`Error::Description`], [`disk::Error::Busy`] for a run that goes on, [`disk::Error::File`].
    pub fn resume(path: &Path) -> Result<Self, Error> {
        let file = path.join(RUN_FILE);
        if !file.is_file() {
            return Err(Error::NoRun(path.display().to_string()));
        }
        let claim = Claim::existing(path, "--resume")?;
        Ok(Self {
            path: path.to_owned(),
            run: read_description(&file)?,
            begun: true,
            _claim: claim,
        })
    }

    /// Notes that a resumed run goes on from a snapshot's number, or from its beginning. It has not ended then.
    ///
    /// # Errors
    /// [`disk::Error::File`].
    pub fn go_on(&mut self, from: Option<u64>) -> Result<(), Error> {
        for field in ["end", "ended", "totals"] {
            self.run.remove(field);
        }
        let this = json!({ "at": text_time(SystemTime::now()), "from": from, "version": env!("CARGO_PKG_VERSION") });
        match self.run.get_mut("resumed") {
            Some(Value::Array(times)) => times.push(this),
            _ => drop(self.run.insert("resumed".to_owned(), json!([this]))),
        }
        self.write()
    }

    /// The states that the run resumes from, and the newest.
    ///
    /// # Errors
    /// As [`Snapshots::open`].
    pub fn snapshots(&self) -> Result<(Snapshots, Option<Loaded>), Error> {
        Ok(Snapshots::open(&self.path.join(STATE))?)
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
        let directory = self.path.join(STATE);
        fs::create_dir_all(&directory).map_err(|error| disk::Error::file("create", &directory, error))?;
        Ok(disk::replace(&directory.join(name), contents)?)
    }

    fn write(&self) -> Result<(), Error> {
        let mut text = serde_json::to_string_pretty(&self.run).expect("a JSON value has a text");
        text.push('\n');
        Ok(disk::replace(&self.path.join(RUN_FILE), text.as_bytes())?)
    }
}

/// Saves what a run has trained, for which there is no later time: where it belongs, else in a place of its own.
///
/// # Errors
/// Those of `save`; [`Error::Elsewhere`] says where it is instead.
pub fn save_at_last(directory: &Path, save: &dyn Fn(&Path) -> Result<(), AdapterError>) -> Result<(), Error> {
    let Err(error) = save(directory) else {
        return Ok(());
    };
    let name = format!("rescued-{}-{}", file_time(SystemTime::now()), std::process::id());
    let homes = crate::transport::data_directory()
        .into_iter()
        .chain([std::env::temp_dir().join("sflllm")]);
    match homes.map(|home| home.join(&name)).find(|place| save(place).is_ok()) {
        Some(place) => Err(Error::Elsewhere {
            error,
            place: place.display().to_string(),
        }),
        None => Err(error.into()),
    }
}

/// What `run.json` says.
///
/// # Errors
/// [`Error::Description`], [`disk::Error::File`].
pub(super) fn read_description(file: &Path) -> Result<Map<String, Value>, Error> {
    let text = fs::read(file).map_err(|error| disk::Error::file("read", file, error))?;
    let damaged = |reason: String| Error::Description {
        path: file.display().to_string(),
        reason,
    };
    match serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))? {
        Value::Object(run) => Ok(run),
        _ => Err(damaged("it is no JSON object".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use super::*;

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
        assert!(matches!(taken, Error::Taken(_)), "{taken}");
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
                true => Err(disk::Error::file("write", place, io::ErrorKind::StorageFull.into()).into()),
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
