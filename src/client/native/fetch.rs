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
use crate::transport::{self, Dialer, Origin};

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
                // What is there is of use to the next attempt, and a ticket that is good no more is about to be replaced.
                let passes = error.is_transient() && done > 0;
                return match passes || matches!(error, transport::Error::Status { status: 401, .. }) {
                    true => Err(Error::Broken {
                        name: blob.name.clone(),
                        reason: error.to_string(),
                    }),
                    false => Err(error.into()),
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::protocol::message::Digest;
    use crate::transport::{JoinLink, Trust};

    /// Answers one request, and closes the connection. Returns the request's range, if it has one.
    fn answer(listener: &TcpListener, status: &str, length: usize, body: &[u8]) -> Option<String> {
        let (stream, _) = listener.accept().unwrap();
        let mut head = BufReader::new(stream.try_clone().unwrap()).lines();
        let lines: Vec<String> = head
            .by_ref()
            .map(|line| line.unwrap())
            .take_while(|line| !line.is_empty())
            .collect();
        let mut stream: TcpStream = stream;
        write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
        )
        .unwrap();
        stream.write_all(body).unwrap();
        lines
            .iter()
            .find_map(|line| Some(line.strip_prefix("range: ")?.to_owned()))
    }

    fn fetcher(listener: &TcpListener, cache: &Path) -> Fetcher {
        let link: JoinLink = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let dialer = Dialer::new(&Trust::Known).unwrap();
        Fetcher::new(dialer, link.origin, cache.to_owned(), Arc::new(|_| {}))
    }

    #[tokio::test]
    async fn a_download_that_broke_off_goes_on_where_it_was_whatever_the_server_makes_of_that() {
        let whole: Vec<u8> = (0..100_000_u32).map(|number| (number % 251) as u8).collect();
        let blob = Blob {
            name: "a block".to_owned(),
            sha256: Digest::of(&whole),
            bytes: whole.len() as u64,
        };
        let wanted = Wanted {
            weights: vec![blob.clone()],
            tokenizer: None,
        };
        for takes_ranges in [true, false] {
            let cache = tempfile::tempdir().unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let fetcher = fetcher(&listener, cache.path());
            let bytes = whole.clone();
            let server = std::thread::spawn(move || {
                let first = answer(&listener, "200 OK", bytes.len(), &bytes[..60_000]);
                let second = match takes_ranges {
                    true => answer(&listener, "206 Partial Content", 40_000, &bytes[60_000..]),
                    false => answer(&listener, "200 OK", bytes.len(), &bytes),
                };
                (first, second)
            });
            let error = fetcher.fetch_all(&wanted, None).await.unwrap_err();
            assert!(matches!(error, Error::Broken { .. }), "{error}");
            let files = fetcher.fetch_all(&wanted, None).await.unwrap();
            assert_eq!(std::fs::read(&files.weights[0]).unwrap(), whole);
            let ranges = server.join().unwrap();
            assert_eq!(ranges, (None, Some("bytes=60000-".to_owned())));
            let names = std::fs::read_dir(cache.path()).unwrap();
            assert_eq!(names.count(), 1, "something is left beside the file");
        }
    }

    #[tokio::test]
    async fn what_is_not_what_was_announced_is_not_kept() {
        let blob = Blob {
            name: "a block".to_owned(),
            sha256: Digest::of(b"right"),
            bytes: 5,
        };
        let wanted = Wanted {
            weights: vec![blob],
            tokenizer: None,
        };
        for body in [&b"wrong"[..], b"too long"] {
            let cache = tempfile::tempdir().unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let fetcher = fetcher(&listener, cache.path());
            let server = std::thread::spawn(move || answer(&listener, "200 OK", body.len(), body));
            let error = fetcher.fetch_all(&wanted, None).await.unwrap_err();
            assert!(error.to_string().contains("a block"), "{error}");
            server.join().unwrap();
            assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
        }
    }
}
