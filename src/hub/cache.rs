//! One repository in the cache directory that Python's huggingface_hub and this program share:
//!
//! ```text
//! models--ORG--NAME/refs/REVISION              the commit that a branch or tag was last seen at
//! models--ORG--NAME/blobs/ETAG                 contents; ETAG.incomplete while they arrive
//! models--ORG--NAME/snapshots/COMMIT/FILE      a relative link to a blob, or a copy of it where there are no links
//! models--ORG--NAME/.no_exist/COMMIT/FILE      empty: that commit has no such file
//! .locks/models--ORG--NAME/ETAG.lock           held while a blob is written
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::error::Error;
use super::name::FileName;

const COMMIT_LENGTH: usize = 40;
/// How often a lock that another process holds is tried.
const LOCK_PAUSE: Duration = Duration::from_millis(200);

/// A commit of a repository: 40 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit(String);

/// The name of a blob: what the server calls a content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Etag(String);

impl Commit {
    /// Nothing unless `text` is a whole commit in the form git writes.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (text.len() == COMMIT_LENGTH && text.bytes().all(hex)).then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Commit {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl Etag {
    /// From a header, `"…"` or `W/"…"`; nothing for one that is no file name.
    pub fn parse(header: &str) -> Option<Self> {
        let text = header.strip_prefix("W/").unwrap_or(header);
        let text = text.trim_matches('"');
        let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+=".contains(&byte);
        let whole = (1..=128).contains(&text.len()) && text.bytes().all(safe) && !text.starts_with('.');
        whole.then(|| Self(text.to_owned()))
    }
}

/// A repository's part of the cache. Nothing is created before there is something to keep.
#[derive(Debug)]
pub(super) struct Repository {
    root: PathBuf,
    locks: PathBuf,
}

/// Other processes keep their hands off a blob until this is dropped.
#[derive(Debug)]
pub(super) struct Lock {
    /// Closing it unlocks it; there is none where the file system knows no locks.
    _file: Option<File>,
}

impl Repository {
    /// `repository` is a checked `ORG/NAME`.
    pub fn new(cache: &Path, repository: &str) -> Self {
        let name = format!("models--{}", repository.replace('/', "--"));
        Self {
            root: cache.join(&name),
            locks: cache.join(".locks").join(name),
        }
    }

    /// The commit that `revision` is, or was last seen at.
    pub fn commit(&self, revision: &str) -> Option<Commit> {
        Commit::parse(revision).or_else(|| {
            let mut text = String::new();
            let file = File::open(self.root.join("refs").join(revision)).ok()?;
            file.take(2 * COMMIT_LENGTH as u64).read_to_string(&mut text).ok()?;
            Commit::parse(text.trim())
        })
    }

    /// Remembers where `revision` was seen.
    pub fn set_commit(&self, revision: &str, commit: &Commit) -> Result<(), Error> {
        if revision == commit.as_str() || self.commit(revision).as_ref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        create_parent(&path)?;
        // Threads of one process do this at the same time too.
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join(format!(".ref.{}.{unique}", std::process::id()));
        fs::write(&temporary, commit.as_str()).map_err(Error::cache(&temporary))?;
        fs::rename(&temporary, &path).map_err(Error::cache(&path))
    }

    /// The directory of a commit's files.
    pub fn snapshot(&self, commit: &Commit) -> PathBuf {
        self.root.join("snapshots").join(commit.as_str())
    }

    /// Where a file of a commit is, or would be.
    pub fn path(&self, commit: &Commit, file: &FileName) -> PathBuf {
        below(self.snapshot(commit), file)
    }

    pub fn has(&self, commit: &Commit, file: &FileName) -> bool {
        self.path(commit, file).is_file()
    }

    /// Whether the commit is known not to have the file.
    pub fn lacks(&self, commit: &Commit, file: &FileName) -> bool {
        below(self.root.join(".no_exist").join(commit.as_str()), file).exists()
    }

    /// Remembers that the commit has no such file.
    pub fn note_lack(&self, commit: &Commit, file: &FileName) -> Result<(), Error> {
        let path = below(self.root.join(".no_exist").join(commit.as_str()), file);
        create_parent(&path)?;
        File::create(&path).map(drop).map_err(Error::cache(&path))
    }

    /// GGUF files that lie directly in the snapshot.
    pub fn gguf_files(&self, commit: &Commit) -> Vec<FileName> {
        let Ok(entries) = fs::read_dir(self.snapshot(commit)) else {
            return Vec::new();
        };
        let mut files: Vec<FileName> = entries
            .filter_map(|entry| FileName::parse(entry.ok()?.file_name().to_str()?))
            .filter(|file| file.is_gguf() && self.has(commit, file))
            .collect();
        files.sort();
        files
    }

    /// Where a content is, or would be.
    pub fn blob(&self, etag: &Etag) -> PathBuf {
        self.root.join("blobs").join(&etag.0)
    }

    /// Where a content arrives.
    pub fn partial(&self, etag: &Etag) -> PathBuf {
        self.root.join("blobs").join(format!("{}.incomplete", etag.0))
    }

    /// Keeps other processes from writing the blob; `waiting` is called once if one of them does so now.
    pub async fn lock(&self, etag: &Etag, waiting: impl FnOnce()) -> Result<Lock, Error> {
        create_parent(&self.blob(etag))?;
        let path = self.locks.join(format!("{}.lock", etag.0));
        let mut waiting = Some(waiting);
        loop {
            create_parent(&path)?;
            let opened = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
            let file = match opened {
                Ok(file) => file,
                // Whoever held it has removed it, with its directory, this moment.
                Err(error) if error.kind() == ErrorKind::NotFound && waiting.is_none() => continue,
                Err(error) => return Err(Error::cache(&path)(error)),
            };
            match file.try_lock() {
                Ok(()) if is_linked(&file) => return Ok(Lock { _file: Some(file) }),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    if let Some(waiting) = waiting.take() {
                        waiting();
                    }
                    // A lock of the file system cannot be awaited without a thread that blocks in it.
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                // A network file system without locks: contents are checked, so the worst is doing work twice.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                    return Ok(Lock { _file: None });
                }
                Err(TryLockError::Error(error)) => return Err(Error::cache(&path)(error)),
            }
        }
    }

    /// Makes the blob appear as `file` of the commit. Call it with the blob's lock held.
    pub fn link(&self, commit: &Commit, file: &FileName, etag: &Etag) -> Result<(), Error> {
        self.link_by(commit, file, etag, symlink)
    }

    fn link_by(
        &self,
        commit: &Commit,
        file: &FileName,
        etag: &Etag,
        symlink: impl Fn(&Path, &Path) -> io::Result<()>,
    ) -> Result<(), Error> {
        if self.has(commit, file) {
            return Ok(());
        }
        let path = self.path(commit, file);
        create_parent(&path)?;
        // The link of a blob that has since been removed.
        if path.symlink_metadata().is_ok() {
            fs::remove_file(&path).map_err(Error::cache(&path))?;
        }
        let mut target = PathBuf::from("../..");
        target.extend(file.segments().skip(1).map(|_| ".."));
        target.extend(["blobs", &etag.0]);
        if symlink(&target, &path).is_ok() && self.has(commit, file) {
            return Ok(());
        }
        // Windows without the right to make links, or a file system that has none.
        let temporary = self.root.join("blobs").join(format!("{}.copy.incomplete", etag.0));
        fs::copy(self.blob(etag), &temporary)
            .and_then(|_| fs::rename(&temporary, &path))
            .map_err(|error| storage(error, &temporary, file.as_str(), None))
    }
}

/// A failure to write part of `file` at `path`, of which `missing` bytes are still to come.
pub(super) fn storage(error: io::Error, path: &Path, file: &str, missing: Option<u64>) -> Error {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Error::DiskFull {
            file: file.to_owned(),
            directory: path.parent().unwrap_or(path).to_owned(),
            missing,
        },
        _ => Error::cache(path)(error),
    }
}

fn below(mut directory: PathBuf, file: &FileName) -> PathBuf {
    directory.extend(file.segments());
    directory
}

fn create_parent(path: &Path) -> Result<(), Error> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(Error::cache(parent)),
        None => Ok(()),
    }
}

/// Whether the locked file still has a name: Python removes its lock files when it is done, and a lock on one that is
/// gone keeps nobody out.
#[cfg(unix)]
fn is_linked(file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
}

#[cfg(not(unix))]
fn is_linked(_: &File) -> bool {
    true
}

#[cfg(unix)]
fn symlink(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(windows)]
fn symlink(target: &Path, path: &Path) -> io::Result<()> {
    // Windows takes a link with `/` in it, and does not follow it.
    let target: PathBuf = target.components().collect();
    std::os::windows::fs::symlink_file(target, path)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit() -> Commit {
        Commit::parse("0123456789abcdef0123456789abcdef01234567").unwrap()
    }

    fn file(name: &str) -> FileName {
        FileName::parse(name).unwrap()
    }

    #[test]
    fn a_commit_is_forty_hexadecimal_digits() {
        for bad in [
            "main",
            "0123",
            "0123456789ABCDEF0123456789ABCDEF01234567",
            "../../../../../../../../../../../../etcpw",
        ] {
            assert!(Commit::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn an_etag_becomes_a_file_name_or_nothing() {
        for (header, name) in [("\"abc\"", "abc"), ("W/\"a-1.2\"", "a-1.2"), ("abc", "abc")] {
            assert_eq!(Etag::parse(header).unwrap().0, name);
        }
        let long = "a".repeat(129);
        for bad in ["", "\"\"", "\"../x\"", "a/b", "a\\b", "..", ".x", "a:b", "a\0", &long] {
            assert!(Etag::parse(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn a_reference_that_is_no_commit_is_none() {
        let cache = tempfile::tempdir().unwrap();
        let repository = Repository::new(cache.path(), "a/b");
        let path = cache.path().join("models--a--b/refs/main");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        for text in ["", "main", "0123456789abcdef0123456789abcdef0123456789", "\u{0}"] {
            fs::write(&path, text).unwrap();
            assert_eq!(repository.commit("main"), None, "{text:?}");
        }
        repository.set_commit("main", &commit()).unwrap();
        assert_eq!(repository.commit("main"), Some(commit()));
        assert_eq!(fs::read_to_string(&path).unwrap(), commit().as_str());
        repository.set_commit("refs/pr/1", &commit()).unwrap();
        assert_eq!(repository.commit("refs/pr/1"), Some(commit()));
    }

    #[test]
    fn without_links_a_file_is_a_copy() {
        let cache = tempfile::tempdir().unwrap();
        let repository = Repository::new(cache.path(), "a/b");
        let etag = Etag::parse("e1").unwrap();
        create_parent(&repository.blob(&etag)).unwrap();
        fs::write(repository.blob(&etag), "content").unwrap();
        let refuse = |_: &Path, _: &Path| Err(ErrorKind::PermissionDenied.into());
        repository.link_by(&commit(), &file("x/y.json"), &etag, refuse).unwrap();
        let path = repository.path(&commit(), &file("x/y.json"));
        assert!(path.symlink_metadata().unwrap().is_file());
        assert_eq!(fs::read_to_string(path).unwrap(), "content");
        assert!(repository.blob(&etag).exists());
    }

    #[cfg(unix)]
    #[test]
    fn links_are_relative_and_replace_those_that_lead_nowhere() {
        let cache = tempfile::tempdir().unwrap();
        let repository = Repository::new(cache.path(), "a/b");
        let (old, new) = (Etag::parse("old").unwrap(), Etag::parse("new").unwrap());
        create_parent(&repository.blob(&new)).unwrap();
        fs::write(repository.blob(&old), "old").unwrap();
        fs::write(repository.blob(&new), "new").unwrap();
        for name in ["top.json", "a/b/deep.json"] {
            repository.link(&commit(), &file(name), &old).unwrap();
        }
        let deep = repository.path(&commit(), &file("a/b/deep.json"));
        assert_eq!(fs::read_link(&deep).unwrap(), Path::new("../../../../blobs/old"));
        fs::remove_file(repository.blob(&old)).unwrap();
        repository.link(&commit(), &file("a/b/deep.json"), &new).unwrap();
        assert_eq!(fs::read_to_string(&deep).unwrap(), "new");
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_lock_whose_file_was_removed_is_taken_again() {
        let cache = tempfile::tempdir().unwrap();
        let repository = Repository::new(cache.path(), "a/b");
        let etag = Etag::parse("e").unwrap();
        let path = cache.path().join(".locks/models--a--b/e.lock");
        let first = repository.lock(&etag, || {}).await.unwrap();
        let (waits, waited) = std::sync::mpsc::channel();
        let second = repository.lock(&etag, move || waits.send(()).unwrap());
        let release = async move {
            // Lets the other future try the lock, find it held and begin its pause.
            tokio::time::sleep(LOCK_PAUSE / 2).await;
            waited.recv().unwrap();
            fs::remove_file(&path).unwrap();
            drop(first);
            path
        };
        let (second, path) = tokio::join!(second, release);
        let (_second, path) = (second.unwrap(), path);
        assert!(path.exists(), "the lock that is held has a name");
    }
}
