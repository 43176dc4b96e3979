//! Models from the hub (huggingface.co, or a mirror of it): a name becomes a directory on this machine.
//!
//! Files lie in the cache of Python's huggingface_hub, in its layout: what either has fetched, the other finds. A model
//! that is there as a whole is taken without asking anyone; to see where a branch is now, remove its file under
//! `refs/`, or name a commit. Native only, and apart from the model's files, which do not know where they came from.
//!
//! [`name`]: what is asked for. [`settings`]: where and as whom. `choice`: which files a model is made of. `remote`:
//! the requests. `transfer`: a file's way into the cache. `cache`: its layout.

mod cache;
mod choice;
mod error;
pub mod name;
mod remote;
pub mod settings;
mod transfer;

use std::path::PathBuf;
use std::time::Duration;

pub use cache::Commit;
pub use error::{Credential, Error};
pub use name::{FileName, Name};
pub use settings::{Endpoint, Settings, Token};

use cache::Repository;
use choice::{Entry, Weights};
use remote::Remote;
use transfer::Transfer;

/// Fetches models.
#[derive(Clone, Debug)]
pub struct Hub {
    settings: Settings,
}

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub commit: Commit,
    pub files: Files,
}

/// What a model is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Files {
    /// A directory with `config.json`, safetensors files, and what else there is of tokenizer and settings.
    Directory(PathBuf),
    /// One GGUF file.
    Gguf(PathBuf),
}

/// What happens while a model is fetched.
#[derive(Debug)]
pub enum Event<'a> {
    /// So many files are to come, of so many bytes together as far as that is known. There may be several such groups.
    Fetching { files: usize, bytes: u64 },
    /// A file of the group is begun; `present` of its bytes are here already.
    File { file: &'a FileName, present: u64 },
    /// So many more bytes of the file have arrived.
    Received { bytes: u64 },
    /// The bytes of the file that had arrived are thrown away: it comes again from its beginning.
    Dropped { file: &'a FileName, bytes: u64 },
    /// Another process fetches this file; it is waited for.
    Locked { file: &'a FileName },
    /// A request failed and is sent again after a pause.
    Retrying { reason: &'a Error, pause: Duration },
    /// All files of the group are here.
    Fetched,
    /// The hub could not be asked whether something is missing, and what lies here is taken.
    Unasked { reason: &'a Error },
}

/// Is told what happens.
pub trait Progress: Send + Sync {
    fn report(&self, event: Event<'_>);
}

impl<F: Fn(Event<'_>) + Send + Sync> Progress for F {
    fn report(&self, event: Event<'_>) {
        self(event);
    }
}

impl Hub {
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// Finds a model in the cache, or fetches what is missing of it. What has arrived of a file stays when this is
    /// dropped or the process ends, and the next call goes on from there.
    ///
    /// # Errors
    /// [`Error`] says what to do.
    pub async fn snapshot(&self, name: &Name, progress: &dyn Progress) -> Result<Snapshot, Error> {
        let repository = Repository::new(&self.settings.cache, name.repository());
        let found = repository
            .commit(name.revision())
            .and_then(|commit| Found::of(&repository, name, commit));
        let found = match found {
            Some(found) if found.is_whole || self.settings.offline => return found.choose(name),
            None if self.settings.offline => {
                return Err(Error::Offline {
                    model: name.to_string(),
                    cache: self.settings.cache.clone(),
                });
            }
            found => found,
        };
        let remote = Remote::new(&self.settings)?;
        let listing = match (remote.listing(name, progress).await, found) {
            (Ok(listing), _) => listing,
            (Err(reason), Some(found)) => {
                progress.report(Event::Unasked { reason: &reason });
                return found.choose(name);
            }
            (Err(error), None) => return Err(error),
        };
        let weights = choice::weights(name, &listing.entries)?;
        let transfer = Transfer {
            remote: &remote,
            repository: &repository,
            name,
            commit: &listing.commit,
            progress,
        };
        fetch(&transfer, &listing.entries, &weights).await?;
        if name.file().is_none() {
            for file in choice::known_names().filter(|file| listing.entries.iter().all(|entry| entry.name != *file)) {
                repository.note_lack(&listing.commit, &file)?;
            }
        }
        // Last, so that a branch that has moved is only followed to where all of it is here.
        repository.set_commit(name.revision(), &listing.commit)?;
        let files = match weights {
            Weights::Gguf(file) => Files::Gguf(repository.path(&listing.commit, &file)),
            Weights::Single | Weights::Sharded => Files::Directory(repository.snapshot(&listing.commit)),
        };
        Ok(Snapshot {
            commit: listing.commit,
            files,
        })
    }

    /// A directory of the cache that has a model's `config.json`, which is all that is fetched where it is missing. What the
    /// cache says of the model's branches stays as it is.
    ///
    /// # Errors
    /// [`Error::NoConfig`] where the repository has none, as those with GGUF files alone; else as [`Hub::snapshot`].
    pub async fn description(&self, name: &Name, progress: &dyn Progress) -> Result<PathBuf, Error> {
        let repository = Repository::new(&self.settings.cache, name.repository());
        let config = FileName::known(choice::CONFIG);
        let here = (repository.commit(name.revision())).filter(|commit| repository.has(commit, &config));
        let commit = match here {
            Some(commit) => commit,
            None if self.settings.offline => {
                return Err(Error::Offline {
                    model: name.to_string(),
                    cache: self.settings.cache.clone(),
                });
            }
            None => {
                let remote = Remote::new(&self.settings)?;
                let listing = remote.listing(name, progress).await?;
                let entries: Vec<&Entry> = (listing.entries.iter()).filter(|entry| entry.name == config).collect();
                if entries.is_empty() {
                    return Err(Error::NoConfig {
                        repository: name.repository().to_owned(),
                    });
                }
                let transfer = Transfer {
                    remote: &remote,
                    repository: &repository,
                    name,
                    commit: &listing.commit,
                    progress,
                };
                fetch_group(&transfer, entries).await?;
                listing.commit
            }
        };
        Ok(repository.snapshot(&commit))
    }

    /// [`Hub::description`] for callers that wait in their own thread.
    ///
    /// # Errors
    /// [`Error`] says what to do.
    pub fn description_blocking(&self, name: &Name, progress: &dyn Progress) -> Result<PathBuf, Error> {
        blocking(|| self.description(name, progress))
    }

    /// [`Hub::snapshot`] for callers that wait in their own thread, inside or outside of an async runtime.
    ///
    /// # Errors
    /// [`Error`] says what to do.
    pub fn snapshot_blocking(&self, name: &Name, progress: &dyn Progress) -> Result<Snapshot, Error> {
        blocking(|| self.snapshot(name, progress))
    }
}

/// Waits in a thread of its own, which may be inside or outside of an async runtime.
fn blocking<T: Send, F: Future<Output = Result<T, Error>>>(work: impl FnOnce() -> F + Send) -> Result<T, Error> {
    let waiting = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Error::Http {
            reason: error.to_string(),
        })?;
        runtime.block_on(work())
    };
    std::thread::scope(|scope| match scope.spawn(waiting).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Brings the files of a model into the cache: first those beside the weights, one of which may name the shards.
async fn fetch(transfer: &Transfer<'_>, entries: &[Entry], weights: &Weights) -> Result<(), Error> {
    let named = |files: &[&str]| -> Vec<&Entry> {
        let wanted = |entry: &&Entry| files.contains(&entry.name.as_str());
        entries.iter().filter(wanted).collect()
    };
    match weights {
        Weights::Gguf(file) => fetch_group(transfer, named(&[file.as_str()])).await,
        Weights::Single => {
            fetch_group(transfer, named(&choice::BESIDE)).await?;
            fetch_group(transfer, named(&[choice::SINGLE])).await
        }
        Weights::Sharded => {
            let mut beside = named(&choice::BESIDE);
            beside.extend(named(&[choice::INDEX]));
            fetch_group(transfer, beside).await?;
            let shards = shards(transfer.repository, transfer.name, transfer.commit)?;
            let missing = shards
                .iter()
                .find(|shard| entries.iter().all(|entry| entry.name != **shard));
            if let Some(shard) = missing {
                return Err(Error::NoFile {
                    repository: transfer.name.repository().to_owned(),
                    file: shard.to_string(),
                    others: Vec::new(),
                });
            }
            let shards: Vec<&str> = shards.iter().map(FileName::as_str).collect();
            fetch_group(transfer, named(&shards)).await
        }
    }
}

async fn fetch_group(transfer: &Transfer<'_>, entries: Vec<&Entry>) -> Result<(), Error> {
    let mut heads = Vec::new();
    for entry in entries {
        if !transfer.repository.has(transfer.commit, &entry.name) {
            let head = transfer
                .remote
                .head(transfer.name, transfer.commit, entry, transfer.progress);
            heads.push((&entry.name, head.await?));
        }
    }
    if heads.is_empty() {
        return Ok(());
    }
    let bytes = heads.iter().filter_map(|(_, head)| head.bytes);
    transfer.progress.report(Event::Fetching {
        files: heads.len(),
        bytes: bytes.fold(0, u64::saturating_add),
    });
    for (file, head) in &heads {
        transfer.run(file, head).await?;
    }
    transfer.progress.report(Event::Fetched);
    Ok(())
}

/// The shards that a cached index names.
fn shards(repository: &Repository, name: &Name, commit: &Commit) -> Result<Vec<FileName>, Error> {
    let index = choice::INDEX;
    let path = repository.snapshot(commit).join(index);
    let text = std::fs::read(&path).map_err(Error::cache(&path))?;
    choice::shards(name.repository(), &text)
}

/// A model that can be used as it lies in the cache.
struct Found {
    commit: Commit,
    /// One, or GGUF files among which none was named.
    files: Vec<Files>,
    /// Whether it is certain that the hub has nothing more of it.
    is_whole: bool,
}

impl Found {
    fn of(repository: &Repository, name: &Name, commit: Commit) -> Option<Self> {
        let gguf = |file: &FileName| Files::Gguf(repository.path(&commit, file));
        let has = |file: &FileName| repository.has(&commit, file);
        let lacks = |file: &'static str| repository.lacks(&commit, &FileName::known(file));
        let has_known = |file: &'static str| has(&FileName::known(file));
        if let Some(file) = name.file() {
            let files = has(file).then(|| vec![gguf(file)])?;
            return Some(Self {
                commit,
                files,
                is_whole: true,
            });
        }
        let has_shards = || shards(repository, name, &commit).is_ok_and(|shards| shards.iter().all(has));
        let (files, is_whole) = if has_known(choice::CONFIG) && (has_known(choice::SINGLE) || has_shards()) {
            let settled = |file| has_known(file) || lacks(file);
            (
                vec![Files::Directory(repository.snapshot(&commit))],
                choice::BESIDE.into_iter().all(settled),
            )
        } else {
            let files: Vec<Files> = repository.gguf_files(&commit).iter().map(gguf).collect();
            let is_whole = files.len() == 1 && lacks(choice::SINGLE) && lacks(choice::INDEX);
            (files, is_whole)
        };
        (!files.is_empty()).then_some(Self {
            commit,
            files,
            is_whole,
        })
    }

    fn choose(self, name: &Name) -> Result<Snapshot, Error> {
        match <[Files; 1]>::try_from(self.files) {
            Ok([files]) => Ok(Snapshot {
                commit: self.commit,
                files,
            }),
            Err(several) => Err(Error::Several {
                repository: name.repository().to_owned(),
                files: several
                    .iter()
                    .filter_map(|files| match files {
                        Files::Gguf(path) | Files::Directory(path) => path.file_name(),
                    })
                    .map(|name| name.to_string_lossy().into_owned())
                    .collect(),
            }),
        }
    }
}
