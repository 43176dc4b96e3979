//! What is left on disk: files that are written whole or not at all, and claims on the places that a command writes to.
//!
//! It is separate from those who write, models, servers and commands, so that there is one way to replace a file and one
//! answer to whether a place is free: finished work is never overwritten, and no two processes write in one place. Native only.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::machine;

/// Why something cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path} holds {what}, which {option} would overwrite: give another {option}, or remove it first")]
    Taken {
        path: String,
        what: &'static str,
        option: &'static str,
    },
    #[error("another sflllm{} is writing to {path}: wait for its end, or give another {option}", holder.in_brackets())]
    Busy {
        path: String,
        option: &'static str,
        holder: Holder,
    },
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: String,
        r#source: io::Error,
    },
}

impl Error {
    pub fn file(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File {
            action,
            path: path.display().to_string(),
            source,
        }
    }
}

/// Replaces the file at `path`: whoever reads it, after a crash as well, finds the old contents or the new, never a part.
///
/// # Errors
/// [`Error::File`] with the path; the old contents are then still there.
pub fn replace(path: &Path, contents: &[u8]) -> Result<(), Error> {
    static FILES: AtomicU64 = AtomicU64::new(0);
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}-{number}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, path));
    if let Err(error) = written {
        // The first error is the one to report, whether or not the leftover can be removed.
        let _ = std::fs::remove_file(&temporary);
        return Err(Error::file("write", path, error));
    }
    sync_directory(path);
    Ok(())
}

/// Makes the name of a new file as durable as its contents. Not every file system can.
fn sync_directory(path: &Path) {
    #[cfg(unix)]
    {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Ok(directory) = File::open(parent.unwrap_or(Path::new("."))) {
            let _ = directory.sync_all();
        }
    }
    #[cfg(not(unix))]
    let _ = path;
}

/// The process that holds a [`Claim`], as it has written into the lock itself. Not every system lets others read that.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    pub process: Option<u32>,
    pub host: Option<String>,
}

impl Holder {
    fn this() -> Self {
        Self {
            process: Some(std::process::id()),
            host: machine::host_name(),
        }
    }

    /// `123 desk.local`, as it stands in the lock.
    fn line(&self) -> String {
        let process = self.process.map(|process| process.to_string());
        format!(
            "{} {}\n",
            process.as_deref().unwrap_or_default(),
            self.host.as_deref().unwrap_or_default()
        )
    }

    fn read(lock: &Path) -> Self {
        let mut text = String::new();
        let read = File::open(lock).and_then(|file| file.take(1000).read_to_string(&mut text));
        let mut words = match read {
            Ok(_) => text.split_whitespace(),
            Err(_) => "".split_whitespace(),
        };
        let process = words.next().and_then(|word| word.parse().ok());
        let host = words.next().filter(|_| process.is_some());
        Self {
            process,
            host: host.map(str::to_owned),
        }
    }

    /// ` (process 123 on desk.local)`, or nothing.
    fn in_brackets(&self) -> String {
        match (self.process, &self.host) {
            (Some(process), Some(host)) => format!(" (process {process} on {host})"),
            (Some(process), None) => format!(" (process {process})"),
            (None, _) => String::new(),
        }
    }
}

/// Who has claimed a directory, if somebody has. It never takes the claim itself, but whoever claims at this very moment has to
/// wait a little.
pub fn holder(directory: &Path) -> Option<Holder> {
    let lock = directory.join(LOCK);
    // Shared, so that those who ask do not see each other.
    match File::open(&lock).ok()?.try_lock_shared() {
        Err(TryLockError::WouldBlock) => Some(Holder::read(&lock)),
        Ok(()) | Err(TryLockError::Error(_)) => None,
    }
}

/// The lock's name in a claimed directory.
const LOCK: &str = ".lock";
/// How often, and with which pause, a lock is asked for that [`holder`] may have for a moment.
const TRIES: usize = 5;
const PAUSE: Duration = Duration::from_millis(2);

/// The right to write in one place, until it is dropped or the process ends, however it ends.
///
/// It is a lock that the operating system holds on a hidden file, which goes with the claim.
#[derive(Debug)]
pub struct Claim {
    lock: PathBuf,
    /// `None` on file systems without locks.
    file: Option<File>,
    /// Directories that were made for this claim, the outermost first. They go with it if nothing was put into them.
    made: Vec<PathBuf>,
}

impl Claim {
    /// Claims a directory, which is made if it does not exist. One that has a file or directory called as one of `marks` holds
    /// `what` already, and is refused; `option` is what the user gave it by.
    ///
    /// # Errors
    /// [`Error::Taken`], [`Error::Busy`], [`Error::File`].
    pub fn directory(path: &Path, option: &'static str, what: &'static str, marks: &[&str]) -> Result<Self, Error> {
        let check = || match marks.iter().any(|mark| exists(&path.join(mark))) {
            true => Err(Error::Taken {
                path: path.display().to_string(),
                what,
                option,
            }),
            false => Ok(()),
        };
        // Before, so that nothing is left in a directory that is refused; again after, because another may just have ended.
        let first = check();
        let made = match &first {
            Ok(()) => make_directories(path)?,
            Err(_) => Vec::new(),
        };
        let claim = Self::lock(path.join(LOCK), made, path, option);
        match (first, claim) {
            // A run that goes on explains the files.
            (_, Err(busy @ Error::Busy { .. })) => Err(busy),
            (Err(taken), _) => Err(taken),
            (Ok(()), claim) => {
                let claim = claim?;
                check()?;
                Ok(claim)
            }
        }
    }

    /// Claims a directory that is there, to go on with what it holds.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::File`].
    pub fn existing(path: &Path, option: &'static str) -> Result<Self, Error> {
        Self::lock(path.join(LOCK), Vec::new(), path, option)
    }

    /// Claims a file that this command goes on with or makes, whichever it finds.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::File`].
    pub fn file(path: &Path, option: &'static str) -> Result<Self, Error> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let made = parent.map_or(Ok(Vec::new()), make_directories)?;
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(".lock");
        Self::lock(path.with_file_name(name), made, path, option)
    }

    /// Claims a file that does not exist yet.
    ///
    /// # Errors
    /// [`Error::Taken`], [`Error::Busy`], [`Error::File`].
    pub fn new_file(path: &Path, option: &'static str, what: &'static str) -> Result<Self, Error> {
        let claim = Self::file(path, option)?;
        match exists(path) {
            true => Err(Error::Taken {
                path: path.display().to_string(),
                what,
                option,
            }),
            false => Ok(claim),
        }
    }

    fn lock(lock: PathBuf, made: Vec<PathBuf>, path: &Path, option: &'static str) -> Result<Self, Error> {
        let mut claim = Self { lock, file: None, made };
        let mut tries = TRIES;
        loop {
            let mut opened = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&claim.lock)
                .map_err(|error| Error::file("write", &claim.lock, error))?;
            match opened.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if tries > 1 => {
                    tries -= 1;
                    // The holder may be about to go; nobody tells who waits for a lock with a limit.
                    std::thread::sleep(PAUSE);
                    continue;
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Busy {
                        path: path.display().to_string(),
                        option,
                        holder: Holder::read(&claim.lock),
                    });
                }
                // What is finished is still refused there.
                Err(TryLockError::Error(error)) => {
                    tracing::warn!("{} cannot be locked: {error}", path.display());
                    return Ok(claim);
                }
            }
            // Whoever had it before may have removed the file since it was opened here.
            if is_at(&opened, &claim.lock) {
                // For people. The lock holds without it, on a full disk for instance.
                let _ = (opened.set_len(0)).and_then(|()| opened.write_all(Holder::this().line().as_bytes()));
                claim.file = Some(opened);
                return Ok(claim);
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Elsewhere a file of that name could meanwhile be another's.
        if cfg!(unix) && self.file.is_some() {
            // A leftover is harmless.
            let _ = std::fs::remove_file(&self.lock);
        }
        for directory in self.made.iter().rev() {
            // Refused where it is not empty.
            if std::fs::remove_dir(directory).is_err() {
                break;
            }
        }
    }
}

/// A directory that appears under its name with all that belongs in it, or not at all.
#[derive(Debug)]
pub struct NewDirectory {
    place: PathBuf,
    /// Where it is filled, beside its place.
    temporary: PathBuf,
    finished: bool,
    _claim: Claim,
}

impl NewDirectory {
    /// Claims the name of a directory that does not exist yet; `what` is said of whatever has the name already.
    ///
    /// # Errors
    /// [`Error::Taken`], [`Error::Busy`], [`Error::File`].
    pub fn create(path: &Path, option: &'static str, what: &'static str) -> Result<Self, Error> {
        let claim = Claim::new_file(path, option, what)?;
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(name);
        std::fs::create_dir(&temporary).map_err(|error| Error::file("create", &temporary, error))?;
        Ok(Self {
            place: path.to_owned(),
            temporary,
            finished: false,
            _claim: claim,
        })
    }

    /// Makes a new file in it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn file(&self, name: &str) -> io::Result<File> {
        File::create_new(self.temporary.join(name))
    }

    /// Gives it its name. Its files are on the disk by then.
    ///
    /// # Errors
    /// [`Error::File`]; nothing of it is left then.
    pub fn finish(mut self) -> Result<(), Error> {
        let named = std::fs::read_dir(&self.temporary)
            .and_then(|entries| {
                for entry in entries {
                    File::open(entry?.path())?.sync_all()?;
                }
                Ok(())
            })
            .and_then(|()| std::fs::rename(&self.temporary, &self.place));
        named.map_err(|error| Error::file("write", &self.place, error))?;
        self.finished = true;
        sync_directory(&self.place);
        Ok(())
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        if !self.finished {
            // A leftover costs disk space only.
            let _ = std::fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Whether something is there, be it a link that leads nowhere.
fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

/// Makes a directory and those above it; those that were made, the outermost first.
fn make_directories(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let missing = path
        .ancestors()
        .take_while(|directory| !directory.as_os_str().is_empty() && !exists(directory));
    let mut missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
    missing.reverse();
    std::fs::create_dir_all(path).map_err(|error| Error::file("create", path, error))?;
    Ok(missing)
}

/// Whether `path` still leads to the open `file`.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        match (file.metadata(), std::fs::metadata(path)) {
            (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
            _ => false,
        }
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: [&str; 2] = ["run.json", "adapter"];

    fn claim(path: &Path) -> Result<Claim, Error> {
        Claim::directory(path, "--out", "a run", &MARKS)
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(names(directory.path()), ["a.json"]);
        let error = replace(&directory.path().join("none/a.json"), b"x").unwrap_err();
        assert!(matches!(error, Error::File { action: "write", .. }), "{error}");
        std::fs::create_dir(directory.path().join("taken")).unwrap();
        assert!(replace(&directory.path().join("taken"), b"x").is_err());
        assert_eq!(names(directory.path()), ["a.json", "taken"]);
    }

    #[test]
    fn a_directory_has_one_writer_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        let first = claim(&path).unwrap();
        assert!(matches!(claim(&path), Err(Error::Busy { .. })));
        // Also once there is something in it.
        std::fs::write(path.join("run.json"), "{}").unwrap();
        assert!(matches!(claim(&path), Err(Error::Busy { .. })));
        drop(first);
        assert!(matches!(claim(&path), Err(Error::Taken { .. })));
        assert_eq!(names(&path), ["run.json"]);
    }

    #[test]
    fn who_holds_a_claim_is_named_by_it_and_to_those_who_ask() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        assert_eq!(holder(&path), None);
        let first = claim(&path).unwrap();
        let named = format!("another sflllm (process {}", std::process::id());
        for error in [
            claim(&path).unwrap_err(),
            Claim::existing(&path, "--resume").unwrap_err(),
        ] {
            let error = error.to_string();
            // Where a lock keeps others from reading, nobody is named.
            assert!(error.starts_with(&named) || cfg!(not(unix)), "{error}");
        }
        assert!(holder(&path).is_some());
        // A process that was killed leaves its lock, which nobody holds.
        std::fs::write(path.join("run.json"), "{}").unwrap();
        let left = std::fs::read(path.join(LOCK)).unwrap_or_default();
        drop(first);
        std::fs::write(path.join(LOCK), left).unwrap();
        assert_eq!(holder(&path), None);
        let again = Claim::existing(&path, "--resume").unwrap();
        assert!(holder(&path).is_some());
        drop(again);
        assert_eq!(names(&path), ["run.json"]);
    }

    #[test]
    fn what_is_there_is_refused_by_name_and_left_alone() {
        for mark in MARKS {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join(mark), "finished").unwrap();
            let error = claim(directory.path()).unwrap_err().to_string();
            let path = directory.path().display().to_string();
            assert!(error.contains(&path) && error.contains("another --out"), "{error}");
            assert_eq!(names(directory.path()), [mark]);
        }
        // Something else in it is no reason.
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("notes.txt"), "mine").unwrap();
        assert!(claim(directory.path()).is_ok());
        assert_eq!(names(directory.path()), ["notes.txt"]);
    }

    #[test]
    fn a_claim_that_was_not_used_leaves_no_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/run");
        drop(claim(&path).unwrap());
        assert_eq!(names(directory.path()), Vec::<String>::new());
        let used = claim(&path).unwrap();
        std::fs::write(path.join("run.json"), "{}").unwrap();
        drop(used);
        assert_eq!(names(&path), ["run.json"]);
    }

    #[test]
    fn a_file_has_one_writer_at_a_time_and_a_new_one_must_be_new() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tables/rounds.json");
        let first = Claim::file(&path, "--out").unwrap();
        assert!(matches!(Claim::file(&path, "--out"), Err(Error::Busy { .. })));
        std::fs::write(&path, "{}").unwrap();
        drop(first);
        assert!(Claim::file(&path, "--out").is_ok());
        assert!(matches!(
            Claim::new_file(&path, "--out", "a sweep"),
            Err(Error::Taken { .. })
        ));
        assert_eq!(names(path.parent().unwrap()), ["rounds.json"]);
    }

    #[test]
    fn a_new_directory_appears_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("exports/one");
        let create = || NewDirectory::create(&path, "--out", "an export");
        let given_up = create().unwrap();
        given_up.file("a").unwrap().write_all(b"half").unwrap();
        assert!(!path.exists());
        assert!(matches!(create(), Err(Error::Busy { .. })));
        drop(given_up);
        assert_eq!(names(directory.path()), Vec::<String>::new());

        let whole = create().unwrap();
        whole.file("a").unwrap().write_all(b"all").unwrap();
        assert!(whole.file("a").is_err());
        whole.finish().unwrap();
        assert_eq!(names(path.parent().unwrap()), ["one"]);
        assert_eq!(std::fs::read(path.join("a")).unwrap(), b"all");
        let error = create().unwrap_err().to_string();
        assert!(
            error.contains("an export") && error.contains("another --out"),
            "{error}"
        );
        // Empty ones and files are no free places either.
        for (name, make) in [("empty", true), ("file", false)] {
            let place = directory.path().join(name);
            match make {
                true => std::fs::create_dir(&place).unwrap(),
                false => std::fs::write(&place, "mine").unwrap(),
            }
            let taken = NewDirectory::create(&place, "--out", "something").unwrap_err();
            assert!(matches!(taken, Error::Taken { .. }), "{taken}");
        }
    }

    #[test]
    fn claims_of_many_threads_never_hold_together() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rounds.json");
        let holders = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        if let Ok(claim) = Claim::file(&path, "--out") {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                            holders.fetch_sub(1, Ordering::SeqCst);
                            drop(claim);
                        }
                    }
                });
            }
        });
    }
}
