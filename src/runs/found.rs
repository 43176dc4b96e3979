//! Runs as their directories tell of them afterwards, or meanwhile: for lists, and for whoever removes one.
//!
//! It is separate from [`super::directory`] because it reads what anybody may have written or damaged since, and never a whole log.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Map, Value};

use super::Error;
use super::directory::{LOG_FILE, MARKS, RUN_FILE, read_description};
use super::time::time_of_text;
use crate::disk::{self, Claim, Holder};

/// So much of a log's end is read.
const TAIL: u64 = 1 << 16;
/// Names that are said when another was meant.
const NAMED: usize = 8;

/// A run on this machine.
#[derive(Clone, Debug)]
pub struct Found {
    pub path: PathBuf,
    /// The directory's.
    pub name: String,
    pub state: State,
    /// `run.json`; empty where it is damaged, or not written yet.
    pub run: Map<String, Value>,
    pub figures: Figures,
    /// Of all its files.
    pub bytes: u64,
}

/// What became of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// A process holds its directory.
    Running(Holder),
    Complete,
    /// It was stopped, for a reason, or its process has ended without a word.
    Interrupted(Option<String>),
    Failed(String),
    /// It does not tell.
    Damaged(String),
}

impl State {
    /// One word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Running(_) => "running",
            Self::Complete => "complete",
            Self::Interrupted(_) => "interrupted",
            Self::Failed(_) => "failed",
            Self::Damaged(_) => "damaged",
        }
    }

    /// Why, where that is said.
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Running(holder) => holder.process.map(|process| format!("process {process}")),
            Self::Complete => None,
            Self::Interrupted(reason) => reason.clone(),
            Self::Failed(reason) | Self::Damaged(reason) => Some(reason.clone()),
        }
    }
}

/// How far a run has come, as far as is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    pub steps: Option<u64>,
    /// It was to have.
    pub total_steps: Option<u64>,
    /// Of the last step.
    pub loss: Option<f64>,
    /// On validation data, at last.
    pub perplexity: Option<f64>,
    /// From its start to its end or, without one, to its log's last line.
    pub seconds: Option<f64>,
}

impl Found {
    /// The run in a directory; `None` where there is none.
    pub fn at(path: &Path) -> Option<Self> {
        let holder = disk::holder(path);
        let is_run = MARKS.iter().any(|mark| path.join(mark).exists());
        if !path.is_dir() || !(is_run || holder.is_some()) {
            return None;
        }
        let file = path.join(RUN_FILE);
        let (run, damage) = match file.exists() {
            true => match read_description(&file) {
                Ok(run) => (run, None),
                Err(error) => (Map::new(), Some(error.to_string())),
            },
            false => (Map::new(), Some(format!("it has no {RUN_FILE}"))),
        };
        let ended = run.get("ended").and_then(Value::as_str);
        let state = match (holder, damage) {
            (Some(holder), _) => State::Running(holder),
            (None, Some(damage)) => State::Damaged(damage),
            (None, None) => match ended {
                Some("completed" | "the main server ended the run") => State::Complete,
                Some(ended) => match ended.strip_prefix("failed: ") {
                    Some(reason) => State::Failed(reason.to_owned()),
                    None => State::Interrupted(Some(ended.to_owned())),
                },
                None => State::Interrupted(None),
            },
        };
        let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let name = whole.file_name().map(|name| name.to_string_lossy().into_owned());
        Some(Self {
            path: path.to_owned(),
            name: name.unwrap_or_else(|| path.display().to_string()),
            figures: figures(path, &run, &state),
            bytes: bytes_below(path),
            state,
            run,
        })
    }

    /// The runs in a directory, the oldest first. One that does not exist has none.
    ///
    /// # Errors
    /// [`disk::Error::File`].
    pub fn all_in(directory: &Path) -> Result<Vec<Self>, Error> {
        let fail = |error| disk::Error::file("list", directory, error);
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(fail(error).into()),
        };
        let mut found = Vec::new();
        for entry in entries {
            found.extend(Self::at(&entry.map_err(fail)?.path()));
        }
        found.sort_by(|a, b| (a.start(), &a.name).cmp(&(b.start(), &b.name)));
        Ok(found)
    }

    /// The run in `directory` that is called `name`, or the only one whose name begins so; else the one at that path.
    ///
    /// # Errors
    /// [`Error::Unknown`] names some that there are.
    pub fn named(directory: &Path, name: &str) -> Result<Self, Error> {
        let mut all = Self::all_in(directory)?;
        if let Some(exact) = all.iter().position(|run| run.name == name) {
            return Ok(all.swap_remove(exact));
        }
        let matching: Vec<&Self> = all.iter().filter(|run| run.name.starts_with(name)).collect();
        if let ([only], false) = (&matching[..], name.is_empty()) {
            return Ok((*only).clone());
        }
        if let (true, Some(found)) = (matching.is_empty(), Self::at(Path::new(name))) {
            return Ok(found);
        }
        let names = |runs: &mut dyn ExactSizeIterator<Item = &Self>| {
            let count = runs.len();
            let mut names: Vec<String> = runs.take(NAMED).map(|run| run.name.clone()).collect();
            if count > NAMED {
                names.push(format!("{} more", count - NAMED));
            }
            names.join(", ")
        };
        let there = match (matching.len(), all.len()) {
            (2.., _) => format!(
                "the name begins those of {}: say which",
                names(&mut matching.into_iter())
            ),
            (_, 0) => "there are none: say with --dir where they are, or give a run's path".to_owned(),
            _ => format!("there are {}", names(&mut all.iter())),
        };
        Err(Error::Unknown {
            name: name.to_owned(),
            directory: directory.display().to_string(),
            there,
        })
    }

    /// When it began, as `run.json` has it.
    pub fn start(&self) -> Option<&str> {
        self.text("start")
    }

    /// What began it: `train`, or a server's role.
    pub fn kind(&self) -> Option<&str> {
        match (self.text("command"), self.text("role")) {
            (Some(command), _) => Some(command),
            (None, Some("both")) => Some("serve"),
            (None, role) => role,
        }
    }

    /// The model that it trains.
    pub fn model(&self) -> Option<&str> {
        let model = self.run.get("model")?;
        model.as_str().or_else(|| model.get("name")?.as_str())
    }

    /// Whether it can be gone on with: it has not come to its end, and tells what by.
    pub fn is_resumable(&self) -> bool {
        let is_open = matches!(self.state, State::Interrupted(_) | State::Failed(_));
        is_open && self.text("command") == Some("train") && self.run.contains_key("options")
    }

    fn text(&self, field: &str) -> Option<&str> {
        self.run.get(field)?.as_str()
    }

    /// Removes what a run consists of, and its directory if nothing else is in it; whether it was.
    ///
    /// # Errors
    /// [`disk::Error::Busy`] for a run that goes on, [`disk::Error::File`]. What is left of it can be removed by another call.
    pub fn remove(&self) -> Result<bool, Error> {
        let claim = Claim::existing(&self.path, "RUN")?;
        // What it is known by goes last.
        let parts = MARKS
            .iter()
            .filter(|mark| **mark != RUN_FILE)
            .chain(&[WEIGHTS, RUN_FILE]);
        for part in parts {
            let path = self.path.join(part);
            let removed = match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
                Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
                Ok(_) => fs::remove_file(&path),
            };
            removed.map_err(|error| disk::Error::file("remove", &path, error))?;
        }
        drop(claim);
        // Refused where it is not empty.
        Ok(fs::remove_dir(&self.path).is_ok())
    }
}

/// Model parts that a server gives to clients.
const WEIGHTS: &str = "weights";

fn figures(path: &Path, run: &Map<String, Value>, state: &State) -> Figures {
    let totals = run.get("totals");
    let total = |name: &str| totals.and_then(|totals| totals.get(name));
    let log = path.join(LOG_FILE);
    let tail = Tail::read(&log).unwrap_or_default();
    // The lines of `train` count from 0.
    let first = u64::from(run.get("command").and_then(Value::as_str) != Some("train"));
    let last_step = tail.step.as_ref();
    let logged = last_step.and_then(|line| line["step"].as_u64()?.checked_add(1 - first));
    let validated = run.get("valid_after").and_then(|valid| valid["perplexity"].as_f64());
    let start = run.get("start").and_then(Value::as_str).and_then(time_of_text);
    let until = match state {
        State::Running(_) => Some(SystemTime::now()),
        _ => match run.get("end").and_then(Value::as_str) {
            Some(end) => time_of_text(end),
            None => fs::metadata(&log).and_then(|log| log.modified()).ok(),
        },
    };
    let elapsed = start
        .zip(until)
        .and_then(|(start, until)| until.duration_since(start).ok());
    Figures {
        steps: total("steps").and_then(Value::as_u64).or(logged),
        total_steps: run
            .get("configuration")
            .and_then(|configuration| configuration["optimizer"]["total_steps"].as_u64()),
        loss: total("loss")
            .and_then(Value::as_f64)
            .or_else(|| last_step?["loss"].as_f64()),
        perplexity: validated
            .or_else(|| total("last_valid_perplexity")?.as_f64())
            .or(tail.perplexity),
        seconds: elapsed.map(|elapsed| elapsed.as_secs_f64()),
    }
}

/// What the end of a log tells.
#[derive(Default)]
struct Tail {
    /// The last step's line.
    step: Option<Value>,
    /// Of the last validated round.
    perplexity: Option<f64>,
}

impl Tail {
    fn read(log: &Path) -> io::Result<Self> {
        let mut file = File::open(log)?;
        let from = file.metadata()?.len().saturating_sub(TAIL);
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        let mut tail = Self::default();
        // A line that was cut is no JSON object.
        for line in bytes.split(|&byte| byte == b'\n').rev() {
            let Ok(line) = serde_json::from_slice::<Value>(line) else {
                continue;
            };
            match line["kind"].as_str() {
                Some("step") if tail.step.is_none() => tail.step = Some(line),
                Some("round") if tail.perplexity.is_none() => tail.perplexity = line["valid_perplexity"].as_f64(),
                _ => {}
            }
        }
        Ok(tail)
    }
}

/// Of all files below a directory that can be seen; links are not followed.
fn bytes_below(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |file| file.len()),
        _ => 0,
    });
    bytes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    struct Home(tempfile::TempDir);

    impl Home {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn run(&self, name: &str, run: &str, log: &str) -> PathBuf {
            let path = self.0.path().join(name);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join(RUN_FILE), run).unwrap();
            fs::write(path.join(LOG_FILE), log).unwrap();
            path
        }

        fn named(&self, name: &str) -> Result<Found, Error> {
            Found::named(self.0.path(), name)
        }
    }

    #[test]
    fn a_run_tells_what_became_of_it() {
        let home = Home::new();
        let state = |run: Value| {
            home.run("one", &run.to_string(), "");
            home.named("one").unwrap().state
        };
        assert_eq!(state(json!({ "ended": "completed" })), State::Complete);
        assert_eq!(
            state(json!({ "ended": "stopped" })),
            State::Interrupted(Some("stopped".to_owned()))
        );
        assert_eq!(
            state(json!({ "start": "2025-01-01T00:00:00Z" })),
            State::Interrupted(None)
        );
        assert_eq!(
            state(json!({ "ended": "failed: NaN" })),
            State::Failed("NaN".to_owned())
        );
        let path = home.0.path().join("one");
        let claim = Claim::existing(&path, "RUN").unwrap();
        assert!(matches!(state(json!({ "ended": "completed" })), State::Running(_)));
        let refused = home.named("one").unwrap().remove().unwrap_err();
        assert!(matches!(refused, Error::Disk(disk::Error::Busy { .. })), "{refused}");
        drop(claim);
        for damaged in ["", "{", "[]", "\u{fffd}"] {
            home.run("one", damaged, "");
            let found = home.named("one").unwrap();
            assert!(matches!(found.state, State::Damaged(_)), "{damaged}");
        }
        fs::remove_file(path.join(RUN_FILE)).unwrap();
        assert!(
            matches!(home.named("one").unwrap().state, State::Damaged(_)),
            "there is a log"
        );
    }

    #[test]
    fn figures_are_totals_or_what_the_log_says_at_last() {
        let home = Home::new();
        let log = "{\"kind\":\"step\",\"step\":6,\"loss\":3.5}\n{\"kind\":\"round\",\"valid_perplexity\":9.5}\n\
                   {\"kind\":\"step\",\"step\":7,\"loss\":2.5}\n{\"kind\":\"step\",\"st";
        let run = json!({
            "command": "train", "start": "2025-01-01T00:00:00Z", "end": "2025-01-01T00:01:40Z",
            "configuration": { "optimizer": { "total_steps": 20 } },
        });
        home.run("one", &run.to_string(), log);
        let figures = home.named("one").unwrap().figures;
        let expected = Figures {
            steps: Some(8),
            total_steps: Some(20),
            loss: Some(2.5),
            perplexity: Some(9.5),
            seconds: Some(100.0),
        };
        assert_eq!(figures, expected);
        // A server's lines count from 1, and the log may be long.
        let long = format!("{}\n{log}", "x".repeat(3 * TAIL as usize));
        home.run("one", "{\"role\":\"both\"}", &long);
        let found = home.named("one").unwrap();
        assert_eq!((found.figures.steps, found.kind()), (Some(7), Some("serve")));
        let totals = json!({ "totals": { "steps": 9, "loss": 1.5, "last_valid_perplexity": 4.5 } });
        home.run("one", &totals.to_string(), log);
        let figures = home.named("one").unwrap().figures;
        assert_eq!(
            (figures.steps, figures.loss, figures.perplexity),
            (Some(9), Some(1.5), Some(4.5))
        );
        // What makes no sense is unknown.
        home.run(
            "one",
            "{\"totals\":[],\"start\":7,\"configuration\":3}",
            "[]\n7\n\"kind\"\n",
        );
        assert_eq!(home.named("one").unwrap().figures.loss, None);
    }

    #[test]
    fn a_run_is_found_by_its_name_a_prefix_of_its_own_or_its_path() {
        let home = Home::new();
        let alone = Home::new().run("elsewhere", "{}", "");
        assert!(home.named("a").unwrap_err().to_string().contains("there are none"));
        for (name, start) in [("ab", "2"), ("abc", "1"), ("b", "3")] {
            home.run(name, &json!({ "start": start }).to_string(), "");
        }
        fs::create_dir(home.0.path().join("no-run")).unwrap();
        fs::write(home.0.path().join("file"), "").unwrap();
        let all = Found::all_in(home.0.path()).unwrap();
        let names: Vec<&str> = all.iter().map(|run| &run.name[..]).collect();
        assert_eq!(names, ["abc", "ab", "b"], "the oldest first");
        for (name, found) in [("ab", "ab"), ("abc", "abc"), ("b", "b")] {
            assert_eq!(home.named(name).unwrap().name, found);
        }
        let error = home.named("a").unwrap_err().to_string();
        assert!(error.contains("abc, ab: say which"), "{error}");
        for name in ["x", "", "no-run"] {
            let error = home.named(name).unwrap_err().to_string();
            assert!(error.contains("abc, ab, b"), "{name}: {error}");
        }
        let path = home.0.path().join("b");
        assert_eq!(home.named(path.to_str().unwrap()).unwrap().path, path);
        assert!(home.named(alone.to_str().unwrap()).is_err(), "it is gone with its home");
        assert!(Found::all_in(&home.0.path().join("none")).unwrap().is_empty());
    }

    #[test]
    fn what_belongs_to_nobody_s_run_stays() {
        let home = Home::new();
        for (name, beside) in [("clean", false), ("mixed", true)] {
            let path = home.run(name, "{}", "");
            fs::create_dir_all(path.join("adapter")).unwrap();
            fs::write(path.join("adapter/README.md"), "card").unwrap();
            fs::create_dir_all(path.join("state")).unwrap();
            if beside {
                fs::write(path.join("thesis.tex"), "mine").unwrap();
            }
            let found = home.named(name).unwrap();
            assert_eq!(found.remove().unwrap(), !beside);
            let left = fs::read_dir(&path).map_or(0, Iterator::count);
            assert_eq!((left, path.exists()), (usize::from(beside), beside));
        }
        assert!(Found::all_in(home.0.path()).unwrap().is_empty());
    }
}
