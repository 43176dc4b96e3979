//! What is asked of a hub: the files of a revision, what it says of a file, and a file's bytes. Redirects are followed
//! here and not by the HTTP client, because the token is for the hub alone and most files lie elsewhere.

use std::error::Error as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, LOCATION, RANGE,
    RETRY_AFTER,
};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;

use super::cache::{Commit, Etag};
use super::choice::Entry;
use super::error::{Credential, Error};
use super::name::{FileName, Name};
use super::settings::{Endpoint, Settings};
use super::{Event, Progress};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The listing of a repository with a hundred thousand files has about 20 MB.
const MAX_LISTING: usize = 64 << 20;
const MAX_REDIRECTS: usize = 10;
/// How often the same is asked before giving up.
const ATTEMPTS: u32 = 5;
/// A server that asks to be left alone for longer is asked again after this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Characters shown of what a server says.
const SHOWN: usize = 200;

/// A hub, as this process talks to it.
pub(super) struct Remote {
    http: reqwest::Client,
    endpoint: Endpoint,
    authorization: Option<reqwest::header::HeaderValue>,
    credential: Credential,
    patience: Duration,
    pause: Duration,
    /// Whether a server has ever answered: where none has, there is no network, and nothing to wait for.
    reached: AtomicBool,
}

/// What a revision is.
pub(super) struct Listing {
    pub commit: Commit,
    /// Files whose names can be used.
    pub entries: Vec<Entry>,
}

/// What the hub says of a file before sending it.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub etag: Etag,
    pub bytes: Option<u64>,
    /// In lower-case hexadecimal.
    pub sha256: Option<String>,
}

/// The bytes of a file from some place on.
pub(super) struct Body {
    response: Response,
    /// Who sends them.
    pub origin: String,
    /// Where the bytes begin: where it was asked for, or 0.
    pub start: u64,
}

impl Remote {
    /// # Errors
    /// [`Error::Http`].
    pub fn new(settings: &Settings) -> Result<Self, Error> {
        let fail = |reason: String| Error::Http { reason };
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| fail(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let mut builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(settings.patience)
            .user_agent(concat!("sflllm/", env!("CARGO_PKG_VERSION")));
        if settings.endpoint.is_loopback() {
            // No proxy can reach this machine's own addresses.
            builder = builder.no_proxy();
        }
        let (authorization, credential) = match &settings.token {
            None => (None, Credential::None),
            Some(_) if settings.endpoint.is_plain_text() => (None, Credential::Withheld),
            Some(token) => (Some(token.header()), Credential::Sent),
        };
        Ok(Self {
            http: builder.build().map_err(|error| fail(deepest(&error)))?,
            endpoint: settings.endpoint.clone(),
            authorization,
            credential,
            patience: settings.patience,
            pause: settings.pause,
            reached: AtomicBool::new(false),
        })
    }

    /// The commit and the files of a revision.
    pub async fn listing(&self, name: &Name, progress: &dyn Progress) -> Result<Listing, Error> {
        let mut retries = self.retries();
        loop {
            match self.list(name).await {
                Ok(listing) => return Ok(listing),
                Err(error) => retries.wait(error, progress).await?,
            }
        }
    }

    /// What the hub says of one file.
    pub async fn head(
        &self,
        name: &Name,
        commit: &Commit,
        entry: &Entry,
        progress: &dyn Progress,
    ) -> Result<Head, Error> {
        let mut retries = self.retries();
        loop {
            match self.ask(name, commit, entry).await {
                Ok(head) => return Ok(head),
                Err(error) => retries.wait(error, progress).await?,
            }
        }
    }

    async fn list(&self, name: &Name) -> Result<Listing, Error> {
        #[derive(Deserialize)]
        struct Model {
            sha: String,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
            #[serde(default)]
            size: Option<u64>,
            #[serde(default)]
            lfs: Option<Lfs>,
        }
        #[derive(Deserialize)]
        struct Lfs {
            #[serde(default)]
            sha256: Option<String>,
        }
        let segments = ["api", "models"].into_iter().chain(name.repository().split('/'));
        let mut url = self.endpoint.below(segments.chain(["revision", name.revision()]));
        url.set_query(Some("blobs=true"));
        let shown = shown(&url);
        let mut response = self.send(Method::GET, url, None, &|_, _| true).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(name, None, &response));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| self.http_error(&shown, &error))?
        {
            if body.len() + chunk.len() > MAX_LISTING {
                return Err(Error::TooLarge {
                    file: shown,
                    bytes: (body.len() + chunk.len()) as u64,
                    limit: MAX_LISTING as u64,
                });
            }
            body.extend_from_slice(&chunk);
        }
        let answer = |reason: String| Error::Answer {
            url: shown.clone(),
            reason,
        };
        let model: Model = serde_json::from_slice(&body).map_err(|error| answer(error.to_string()))?;
        let commit = Commit::parse(&model.sha).ok_or_else(|| answer("`sha` is no commit".to_owned()))?;
        let entries = model.siblings.into_iter().filter_map(|sibling| {
            // A name that cannot be used here is no file of a model.
            Some(Entry {
                name: FileName::parse(&sibling.rfilename)?,
                bytes: sibling.size,
                sha256: sibling.lfs.and_then(|lfs| sha256(&lfs.sha256?)),
            })
        });
        Ok(Listing {
            commit,
            entries: entries.collect(),
        })
    }

    async fn ask(&self, name: &Name, commit: &Commit, entry: &Entry) -> Result<Head, Error> {
        let url = self.file(name, commit, &entry.name);
        let shown = shown(&url);
        let answer = |reason: &str| Error::Answer {
            url: shown.clone(),
            reason: reason.to_owned(),
        };
        // The hub itself knows the content's name; the place it sends to need not, and may answer GET alone.
        let onwards = |same_origin: bool, headers: &HeaderMap| {
            same_origin || !(headers.contains_key("x-linked-etag") || headers.contains_key(ETAG))
        };
        let response = self.send(Method::HEAD, url, None, &onwards).await?;
        let (status, headers) = (response.status(), response.headers());
        if status != StatusCode::OK && !is_redirect(status) {
            return Err(self.refusal(name, Some(&entry.name), &response));
        }
        if text(headers, "x-repo-commit").is_some_and(|found| found != commit.as_str()) {
            return Err(answer("the file is of another commit than was asked for"));
        }
        let linked = text(headers, "x-linked-etag");
        let etag = linked.or_else(|| text(headers, ETAG.as_str()));
        let etag = etag.ok_or_else(|| answer("a file without an ETag"))?;
        let length = match is_redirect(status) {
            true => None,
            false => text(headers, CONTENT_LENGTH.as_str()),
        };
        let bytes = match text(headers, "x-linked-size").or(length) {
            Some(bytes) => Some(bytes.parse().map_err(|_| answer("a file's size that is no number"))?),
            None => entry.bytes,
        };
        let sha256 = linked.and_then(|linked| sha256(linked.trim_start_matches("W/").trim_matches('"')));
        Ok(Head {
            etag: Etag::parse(etag).ok_or_else(|| answer("an ETag that is no name"))?,
            bytes,
            sha256: sha256.or_else(|| entry.sha256.clone()),
        })
    }

    /// Begins to read a file, from byte `start` on if the server can do that. `bytes` is its whole length, if known.
    pub async fn body(
        &self,
        name: &Name,
        commit: &Commit,
        file: &FileName,
        start: u64,
        bytes: Option<u64>,
    ) -> Result<Body, Error> {
        let url = self.file(name, commit, file);
        let response = self.send(Method::GET, url, Some(start), &|_, _| true).await?;
        let (shown, headers) = (shown(response.url()), response.headers());
        let answer = |reason: String| Error::Answer {
            url: shown.clone(),
            reason,
        };
        let length = text(headers, CONTENT_LENGTH.as_str()).and_then(|length| length.parse::<u64>().ok());
        let (start, whole) = match response.status() {
            StatusCode::OK => (0, length),
            StatusCode::PARTIAL_CONTENT if start > 0 => {
                match text(headers, CONTENT_RANGE.as_str()).map(content_range) {
                    Some(Some((first, whole))) if first == start => (start, whole),
                    _ => return Err(answer("a part of the file that was not asked for".to_owned())),
                }
            }
            // There is nothing from there on: what lies here is no part of this file.
            StatusCode::RANGE_NOT_SATISFIABLE if start > 0 => {
                return Box::pin(self.body(name, commit, file, 0, bytes)).await;
            }
            _ => return Err(self.refusal(name, Some(file), &response)),
        };
        if text(headers, CONTENT_ENCODING.as_str()).is_some_and(|encoding| encoding != "identity") {
            return Err(answer("the file compressed, which was not asked for".to_owned()));
        }
        match (bytes, whole) {
            (Some(bytes), Some(whole)) if bytes != whole => {
                Err(answer(format!("a file of {whole} bytes that was said to have {bytes}")))
            }
            _ => Ok(Body {
                origin: origin(response.url()),
                response,
                start,
            }),
        }
    }

    /// The next bytes; nothing at the end.
    pub async fn chunk(&self, body: &mut Body) -> Result<Option<impl AsRef<[u8]> + use<>>, Error> {
        let chunk = body.response.chunk().await;
        chunk.map_err(|error| self.http_error(&body.origin, &error))
    }

    pub fn retries(&self) -> Retries<'_> {
        Retries {
            remote: self,
            failed: 0,
        }
    }

    fn file(&self, name: &Name, commit: &Commit, file: &FileName) -> Url {
        let repository = name.repository().split('/');
        self.endpoint
            .below(repository.chain(["resolve", commit.as_str()]).chain(file.segments()))
    }

    /// Asks, and goes on where the answer sends while `onwards` says so of whether that is the hub, and of the headers.
    async fn send(
        &self,
        method: Method,
        mut url: Url,
        start: Option<u64>,
        onwards: &(dyn Fn(bool, &HeaderMap) -> bool + Sync),
    ) -> Result<Response, Error> {
        let first = shown(&url);
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.http.request(method.clone(), url.clone());
            // A compressed answer has another length, and parts of it cannot be asked for.
            request = request.header(ACCEPT_ENCODING, "identity");
            if let Some(authorization) = &self.authorization
                && self.endpoint.is_origin_of(&url)
            {
                request = request.header(AUTHORIZATION, authorization);
            }
            if let Some(start @ 1..) = start {
                request = request.header(RANGE, format!("bytes={start}-"));
            }
            let response = request
                .send()
                .await
                .map_err(|error| self.http_error(&origin(&url), &error))?;
            self.reached.store(true, Ordering::Relaxed);
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let answer = |reason: &str| Error::Answer {
                url: first.clone(),
                reason: reason.to_owned(),
            };
            let next = text(response.headers(), LOCATION.as_str()).and_then(|location| url.join(location).ok());
            let next = next.ok_or_else(|| answer("a redirect to no address"))?;
            match (url.scheme(), next.scheme()) {
                (_, "https") | ("http", "http") => {}
                _ => return Err(answer("a redirect to an address that is not encrypted")),
            }
            if !onwards(next.origin() == url.origin(), response.headers()) {
                return Ok(response);
            }
            url = next;
        }
        Err(Error::Answer {
            url: first,
            reason: "one redirect after another".to_owned(),
        })
    }

    /// What an answer means that is no success.
    fn refusal(&self, name: &Name, file: Option<&FileName>, response: &Response) -> Error {
        let repository = name.repository().to_owned();
        let endpoint = self.endpoint.as_str().to_owned();
        let headers = response.headers();
        let said = text(headers, "x-error-message")
            .map(printable)
            .filter(|said| !said.is_empty());
        let message = said.as_ref().map_or_else(String::new, |said| format!(": {said}"));
        let status = response.status().as_u16();
        let credential = self.credential;
        let unauthorized = |repository, endpoint, message| Error::Unauthorized {
            repository,
            endpoint,
            credential,
            message,
        };
        // What lies on another host says nothing of the repository.
        let of_hub = self.endpoint.is_origin_of(response.url());
        match (status, text(headers, "x-error-code"), file) {
            (_, Some("GatedRepo"), _) => Error::Gated {
                repository,
                endpoint,
                credential,
            },
            (_, Some("RevisionNotFound"), _) => Error::NoRevision {
                repository,
                revision: name.revision().to_owned(),
                endpoint,
            },
            (_, Some("EntryNotFound"), Some(file)) | (404, None, Some(file)) if of_hub => Error::NoFile {
                repository,
                file: file.to_string(),
                others: Vec::new(),
            },
            (401, ..) if of_hub => unauthorized(repository, endpoint, message),
            (403, ..) if of_hub => Error::Forbidden { repository, message },
            (404, ..) | (_, Some("RepoNotFound"), _) if of_hub => Error::NoRepository { repository, endpoint },
            _ => Error::Status {
                url: shown(response.url()),
                status,
                message,
                pause: text(headers, RETRY_AFTER.as_str())
                    .and_then(|seconds| seconds.parse().ok())
                    .map(Duration::from_secs),
            },
        }
    }

    fn http_error(&self, origin: &str, error: &reqwest::Error) -> Error {
        let origin = origin.to_owned();
        if let Some(tls) = tls_cause(error) {
            return tls_error(origin, tls);
        }
        let reason = deepest(error);
        if error.is_connect() {
            let reason = match error.is_timeout() {
                true => format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()),
                false => reason,
            };
            Error::NoConnection { origin, reason }
        } else if error.is_timeout() {
            Error::Silent {
                origin,
                patience: self.patience,
            }
        } else {
            Error::Broken { origin, reason }
        }
    }
}

/// Counts failures of one request, with longer and longer waits between them.
pub(super) struct Retries<'a> {
    remote: &'a Remote,
    failed: u32,
}

impl Retries<'_> {
    /// Something has arrived since.
    pub fn reset(&mut self) {
        self.failed = 0;
    }

    /// Waits until it is time to try again.
    ///
    /// # Errors
    /// `error` itself, when trying again is no use.
    pub async fn wait(&mut self, error: Error, progress: &dyn Progress) -> Result<(), Error> {
        self.failed += 1;
        let hopeless = matches!(error, Error::NoConnection { .. }) && !self.remote.reached.load(Ordering::Relaxed);
        if !error.is_transient() || hopeless || self.failed >= ATTEMPTS {
            return Err(error);
        }
        let asked = match &error {
            Error::Status { pause, .. } => *pause,
            _ => None,
        };
        let pause = self.remote.pause.saturating_mul(1 << (self.failed - 1));
        let pause = asked.map_or(pause, |asked| asked.max(pause)).min(LONGEST_PAUSE);
        progress.report(Event::Retrying { reason: &error, pause });
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// What TLS has against a connection. The errors of input and output around it hide it from those who ask for causes
/// only.
fn tls_cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref() {
            return Some(tls);
        }
        next = match error.downcast_ref::<io::Error>() {
            Some(io) => io.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static)),
            None => error.source(),
        };
    }
    None
}

fn tls_error(origin: String, error: &rustls::Error) -> Error {
    use rustls::CertificateError as Certificate;
    let rustls::Error::InvalidCertificate(reason) = error else {
        return Error::NoConnection {
            origin,
            reason: error.to_string(),
        };
    };
    let reason = match reason {
        Certificate::UnknownIssuer => "it was signed by nobody trusted here".to_owned(),
        Certificate::Expired | Certificate::ExpiredContext { .. } => {
            "it has expired, or this machine's clock is wrong".to_owned()
        }
        Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => {
            "it is not valid yet, or this machine's clock is wrong".to_owned()
        }
        Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
            "it is for another host".to_owned()
        }
        other => other.to_string(),
    };
    Error::Certificate { origin, reason }
}

/// The innermost cause: what wraps it repeats it, or says less.
fn deepest(error: &reqwest::Error) -> String {
    let mut reason = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        reason = inner.to_string();
        source = inner.source();
    }
    reason
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// First byte and whole length of `bytes FIRST-LAST/WHOLE`, where the last byte is the file's last.
fn content_range(header: &str) -> Option<(u64, Option<u64>)> {
    let (range, whole) = header.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let whole = match whole {
        "*" => None,
        whole => Some(whole.parse::<u64>().ok()?),
    };
    let to_the_end = whole.is_none_or(|whole| last.checked_add(1) == Some(whole));
    (first <= last && to_the_end).then_some((first, whole))
}

/// A SHA-256 in lower case, if `hex` is one.
fn sha256(hex: &str) -> Option<String> {
    let whole = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    whole.then(|| hex.to_ascii_lowercase())
}

/// An address without its query, which may hold a signature that lets anyone read.
fn shown(url: &Url) -> String {
    format!("{}{}", origin(url), url.path())
}

fn origin(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// What a server says, safe to show on a terminal.
fn printable(said: &str) -> String {
    let said = said.trim().trim_end_matches('.');
    said.chars().filter(|c| !c.is_control()).take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_range_to_the_end_is_taken() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for bad in [
            "bytes 5-8/10",
            "bytes 9-5/10",
            "5-9/10",
            "bytes */10",
            "bytes 5-9",
            "bytes a-b/c",
            "",
        ] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
        assert_eq!(content_range(&format!("bytes 0-{0}/{0}", u64::MAX)), None);
    }

    #[test]
    fn signatures_and_terminal_codes_are_not_shown() {
        let url = Url::parse("https://cdn.example:8443/a/b?Signature=secret").unwrap();
        assert_eq!(shown(&url), "https://cdn.example:8443/a/b");
        assert_eq!(printable(" Repo\u{1b}[31m gone. "), "Repo[31m gone");
    }
}
