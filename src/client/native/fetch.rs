//! Parts of the model on their way from the server into the cache.
//!
//! Separate from the driver because a download is a task of its own: the session goes on meanwhile.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt;

use super::super as client;
use super::super::edge::{Report, Wanted};
use super::Error;
use crate::protocol::message::Blob;
use crate::transport::{Dialer, Origin};

/// Where what was wanted is.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// The last parts of the model, in their order.
    pub weights: Vec<PathBuf>,
    pub tokenizer: Option<PathBuf>,
}

/// Fetches parts of the model into the cache.
pub(super) struct Fetcher {
    dialer: Dialer,
    server: Origin,
    cache: PathBuf,
    report: Arc<dyn Fn(Report) + Send + Sync>,
    /// In the names of files that are not whole yet: of this process and this client of it.
    number: u64,
}

impl Fetcher {
    pub fn new(dialer: Dialer, server: Origin, cache: PathBuf, report: Arc<dyn Fn(Report) + Send + Sync>) -> Self {
        static FETCHERS: AtomicU64 = AtomicU64::new(0);
        Self {
            dialer,
            server,
            cache,
            report,
            number: FETCHERS.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// `bearer` is what the server is shown.
    pub async fn fetch_all(&self, wanted: &Wanted, bearer: Option<&str>) -> Result<Files, Error> {
        std::fs::create_dir_all(&self.cache).map_err(|error| Error::file("create", &self.cache, error))?;
        let mut files = Files::default();
        for blob in &wanted.weights {
            files.weights.push(self.fetch(blob, bearer).await?);
        }
        if let Some(blob) = &wanted.tokenizer {
            files.tokenizer = Some(self.fetch(blob, bearer).await?);
        }
        Ok(files)
    }

    /// The file of a blob; fetched unless the cache has it whole.
    async fn fetch(&self, blob: &Blob, bearer: Option<&str>) -> Result<PathBuf, Error> {
        let path = self.cache.join(blob.sha256.to_string());
        let (there, wanted) = (path.clone(), blob.clone());
        if tokio::task::spawn_blocking(move || cached(&there, &wanted))
            .await
            .unwrap_or(false)
        {
            return Ok(path);
        }
        let temporary = self
            .cache
            .join(format!("{}.{}-{}.part", blob.sha256, std::process::id(), self.number));
        let result = self.download(blob, &temporary, bearer).await;
        let moved = result.and_then(|()| {
            std::fs::rename(&temporary, &path).map_err(|error| Error::file("rename", &temporary, error))
        });
        // Where the connection broke, the next attempt goes on from what is there.
        if moved
            .as_ref()
            .is_err_and(|error| !matches!(error, Error::Broken { .. }))
        {
            // The first error is the one to report, whether or not the leftover can be removed.
            let _ = std::fs::remove_file(&temporary);
        }
        moved.map(|()| path)
    }

    async fn download(&self, blob: &Blob, file: &Path, bearer: Option<&str>) -> Result<(), Error> {
        let path = format!("/weights/{}", blob.sha256);
        let url = format!("{}{path}", self.server);
        let (mut hash, mut done) = begun(blob, file);
        let mut response = match self.dialer.get(&self.server, &path, bearer, done).await {
            Ok(response) => response,
            Err(error) => {
                return match (error.is_transient(), done) {
                    // What is there is of use to the next attempt.
                    (true, 1..) => Err(Error::Broken {
                        name: blob.name.clone(),
                        reason: error.to_string(),
                    }),
                    _ => Err(error.into()),
                };
            }
        };
        if done > 0 && response.status().as_u16() != 206 {
            (hash, done) = (Sha256::new(), 0);
        }
        let mut output = tokio::fs::File::options()
            .create(true)
            .append(done > 0)
            .write(true)
            .truncate(done == 0)
            .open(file)
            .await
            .map_err(|error| Error::file("create", file, error))?;
        loop {
            let chunk = response.chunk().await;
            let broken = |reason: String| Error::Broken {
                name: blob.name.clone(),
                reason,
            };
            let chunk = match chunk {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(_) => {
                    // For whoever goes on from it.
                    output
                        .flush()
                        .await
                        .map_err(|error| Error::file("write", file, error))?;
                    return Err(broken(format!(
                        "the connection broke after {done} of {} bytes of {url}",
                        blob.bytes
                    )));
                }
            };
            done += chunk.len() as u64;
            if done > blob.bytes {
                return Err(Error::Oversized {
                    name: blob.name.clone(),
                    url,
                    bytes: blob.bytes,
                });
            }
            hash.update(&chunk);
            output
                .write_all(&chunk)
                .await
                .map_err(|error| Error::file("write", file, error))?;
            (self.report)(Report::Fetching {
                name: blob.name.clone(),
                done,
                bytes: blob.bytes,
            });
        }
        output
            .flush()
            .await
            .map_err(|error| Error::file("write", file, error))?;
        let digest: [u8; 32] = hash.finalize().into();
        if digest != blob.sha256.0 {
            return Err(client::Error::Hash {
                name: blob.name.clone(),
            }
            .into());
        }
        Ok(())
    }
}

/// What an attempt before has left of a blob, and how much that is.
fn begun(blob: &Blob, file: &Path) -> (Sha256, u64) {
    let (mut hash, mut done) = (Sha256::new(), 0);
    let Ok(mut there) = std::fs::File::open(file) else {
        return (hash, 0);
    };
    let mut piece = vec![0; 1 << 16];
    loop {
        match there.read(&mut piece) {
            Ok(0) if done < blob.bytes => return (hash, done),
            Ok(count) if count > 0 => {
                hash.update(&piece[..count]);
                done += count as u64;
            }
            // There is nothing left to ask for, or nothing to read.
            _ => return (Sha256::new(), 0),
        }
    }
}

/// Whether the cache holds the blob with its hash.
fn cached(path: &Path, blob: &Blob) -> bool {
    std::fs::File::open(path).is_ok_and(|file| client::verify(blob, file).is_ok())
}
