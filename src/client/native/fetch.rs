//! Parts of the model on their way from the server into the cache.
//!
//! Separate from the driver because a download is a task of its own: the session goes on meanwhile.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt;

use super::super as client;
use super::{Error, Report};
use crate::protocol::message::Blob;
use crate::transport::{Dialer, Origin};

/// Fetches parts of the model into the cache.
pub(super) struct Fetcher {
    pub dialer: Dialer,
    pub server: Origin,
    /// What the server is shown.
    pub bearer: Option<String>,
    pub cache: PathBuf,
    pub report: std::sync::Arc<dyn Fn(Report) + Send + Sync>,
}

impl Fetcher {
    pub async fn fetch_all(
        &self,
        units: &[Blob],
        tokenizer: Option<&Blob>,
    ) -> Result<(Vec<PathBuf>, Option<PathBuf>), Error> {
        std::fs::create_dir_all(&self.cache).map_err(|error| Error::file("create", &self.cache, error))?;
        let mut files = Vec::with_capacity(units.len());
        for blob in units {
            files.push(self.fetch(blob).await?);
        }
        let tokenizer = match tokenizer {
            Some(blob) => Some(self.fetch(blob).await?),
            None => None,
        };
        Ok((files, tokenizer))
    }

    /// The file of a blob; fetched unless the cache has it whole.
    async fn fetch(&self, blob: &Blob) -> Result<PathBuf, Error> {
        let path = self.cache.join(blob.sha256.to_string());
        let (there, wanted) = (path.clone(), blob.clone());
        if tokio::task::spawn_blocking(move || cached(&there, &wanted))
            .await
            .unwrap_or(false)
        {
            return Ok(path);
        }
        static DOWNLOADS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = DOWNLOADS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let temporary = self
            .cache
            .join(format!("{}.{}-{number}.part", blob.sha256, std::process::id()));
        let result = self.download(blob, &temporary).await;
        let moved = result.and_then(|()| {
            std::fs::rename(&temporary, &path).map_err(|error| Error::file("rename", &temporary, error))
        });
        if moved.is_err() {
            // The first error is the one to report, whether or not the leftover can be removed.
            let _ = std::fs::remove_file(&temporary);
        }
        moved.map(|()| path)
    }

    async fn download(&self, blob: &Blob, file: &Path) -> Result<(), Error> {
        let url = format!("/weights/{}", blob.sha256);
        let fail = |reason: String| Error::Download {
            name: blob.name.clone(),
            url: format!("{}{url}", self.server),
            reason,
        };
        let mut response = self.dialer.get(&self.server, &url, self.bearer.as_deref()).await?;
        let mut output = tokio::fs::File::create(file)
            .await
            .map_err(|error| Error::file("create", file, error))?;
        let (mut hash, mut done) = (Sha256::new(), 0_u64);
        loop {
            let chunk = response.chunk().await;
            let chunk =
                chunk.map_err(|_| fail(format!("the connection broke after {done} of {} bytes", blob.bytes)))?;
            let Some(chunk) = chunk else { break };
            done += chunk.len() as u64;
            if done > blob.bytes {
                return Err(fail(format!("it is longer than the {} bytes announced", blob.bytes)));
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

/// Whether the cache holds the blob with its hash.
fn cached(path: &Path, blob: &Blob) -> bool {
    std::fs::File::open(path).is_ok_and(|file| client::verify(blob, file).is_ok())
}
