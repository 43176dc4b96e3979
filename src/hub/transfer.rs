//! One content brought into the cache: resumed where an earlier attempt stopped, checked, and given its name when it is
//! whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::cache::{Commit, Repository, storage};
use super::error::Error;
use super::name::{FileName, Name};
use super::remote::{Head, Remote};
use super::{Event, Progress};

/// No file of a model is larger than this.
const MAX_WEIGHTS: u64 = 1 << 40;
/// Nor is what stands beside the weights.
const MAX_BESIDE: u64 = 256 << 20;

/// A file of a commit on its way into the cache.
pub(super) struct Transfer<'a> {
    pub remote: &'a Remote,
    pub repository: &'a Repository,
    pub name: &'a Name,
    pub commit: &'a Commit,
    pub progress: &'a dyn Progress,
}

/// What has arrived of a content.
struct Partial {
    file: File,
    received: u64,
    digest: Sha256,
}

impl Transfer<'_> {
    /// Makes `file` part of the commit's snapshot.
    pub async fn run(&self, file: &FileName, head: &Head) -> Result<(), Error> {
        let limit = limit(file);
        if let Some(bytes) = head.bytes.filter(|bytes| *bytes > limit) {
            return Err(Error::TooLarge {
                file: file.to_string(),
                bytes,
                limit,
            });
        }
        let waiting = || self.progress.report(Event::Locked { file });
        let _lock = self.repository.lock(&head.etag, waiting).await?;
        let blob = self.repository.blob(&head.etag);
        // One of another length was damaged by someone else.
        let present = fs::metadata(&blob).is_ok_and(|blob| head.bytes.is_none_or(|bytes| blob.len() == bytes));
        if present {
            let bytes = head.bytes.unwrap_or(0);
            self.progress.report(Event::File { file, present: bytes });
        } else {
            self.receive(file, head, &blob).await?;
        }
        self.repository.link(self.commit, file, &head.etag)
    }

    async fn receive(&self, file: &FileName, head: &Head, blob: &Path) -> Result<(), Error> {
        let path = self.repository.partial(&head.etag);
        let mut partial = Partial::open(&path)?;
        // Without a digest nothing would tell that the parts belong together.
        let usable = head.sha256.is_some() && head.bytes.is_none_or(|bytes| partial.received <= bytes);
        if !usable {
            partial.clear(&path)?;
        }
        let present = partial.received;
        self.progress.report(Event::File { file, present });
        let mut again = false;
        loop {
            self.fill(&mut partial, &path, file, head).await?;
            let found = partial.digest();
            let Some(expected) = head.sha256.as_ref().filter(|expected| **expected != found) else {
                break;
            };
            self.progress.report(Event::Dropped {
                file,
                bytes: partial.received,
            });
            partial.clear(&path)?;
            if again {
                // Its name would promise something to resume.
                drop(partial);
                fs::remove_file(&path).map_err(Error::cache(&path))?;
                return Err(Error::Damaged {
                    file: file.to_string(),
                    expected: expected.clone(),
                    found,
                });
            }
            again = true;
        }
        let named = partial.file.sync_data().and_then(|()| fs::rename(&path, blob));
        named.map_err(|error| storage(error, &path, file.as_str(), Some(0)))
    }

    /// Receives until the content has its length.
    async fn fill(&self, partial: &mut Partial, path: &Path, file: &FileName, head: &Head) -> Result<(), Error> {
        let mut retries = self.remote.retries();
        while head.bytes != Some(partial.received) {
            let before = partial.received;
            let Err(error) = self.receive_some(partial, path, file, head).await else {
                return Ok(());
            };
            if partial.received > before {
                retries.reset();
            }
            if let Err(error) = retries.wait(error, self.progress).await {
                return Err(match error.is_transient() && partial.received > 0 {
                    true => Error::Unfinished {
                        file: file.to_string(),
                        received: partial.received,
                        bytes: head.bytes,
                        reason: Box::new(error),
                    },
                    false => error,
                });
            }
        }
        Ok(())
    }

    /// Receives with one request, until the content has its length, or ends where that is not known.
    async fn receive_some(
        &self,
        partial: &mut Partial,
        path: &Path,
        file: &FileName,
        head: &Head,
    ) -> Result<(), Error> {
        let (name, commit) = (self.name, self.commit);
        let resumable = head.sha256.is_some();
        let start = if resumable { partial.received } else { 0 };
        let mut body = self.remote.body(name, commit, file, start, head.bytes).await?;
        if body.start < partial.received {
            self.progress.report(Event::Dropped {
                file,
                bytes: partial.received,
            });
            partial.clear(path)?;
        }
        while let Some(chunk) = self.remote.chunk(&mut body).await? {
            let chunk = chunk.as_ref();
            let received = partial.received + chunk.len() as u64;
            let limit = head.bytes.unwrap_or_else(|| limit(file));
            if received > limit {
                partial.clear(path)?;
                return Err(Error::TooLarge {
                    file: file.to_string(),
                    bytes: received,
                    limit,
                });
            }
            let missing = head.bytes.map(|bytes| bytes - partial.received);
            let written = partial.write(chunk);
            written.map_err(|error| storage(error, path, file.as_str(), missing))?;
            self.progress.report(Event::Received {
                bytes: chunk.len() as u64,
            });
        }
        match head.bytes {
            Some(bytes) if partial.received < bytes => Err(Error::Broken {
                origin: body.origin,
                reason: "it ended early".to_owned(),
            }),
            _ => Ok(()),
        }
    }
}

/// The largest size that is taken for a file.
fn limit(file: &FileName) -> u64 {
    let name = file.as_str();
    match file.is_gguf() || name.ends_with(".safetensors") {
        true => MAX_WEIGHTS,
        false => MAX_BESIDE,
    }
}

impl Partial {
    fn open(path: &Path) -> Result<Self, Error> {
        let open = || -> io::Result<Self> {
            let options = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .clone();
            let mut file = options.open(path)?;
            let mut digest = Sha256::new();
            let mut buffer = vec![0; 1 << 16];
            let mut received = 0;
            // As far as it went when it was opened: another process may ignore the lock and write on.
            let mut rest = (&mut file).take(fs::metadata(path)?.len());
            loop {
                match rest.read(&mut buffer)? {
                    0 => break,
                    read => {
                        digest.update(&buffer[..read]);
                        received += read as u64;
                    }
                }
            }
            Ok(Self { file, received, digest })
        };
        open().map_err(Error::cache(path))
    }

    fn clear(&mut self, path: &Path) -> Result<(), Error> {
        let cleared = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cleared.map_err(Error::cache(path))?;
        (self.received, self.digest) = (0, Sha256::new());
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.digest.update(bytes);
        self.received += bytes.len() as u64;
        Ok(())
    }

    /// In hexadecimal, of all that has arrived.
    fn digest(&self) -> String {
        let digest = self.digest.clone().finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
