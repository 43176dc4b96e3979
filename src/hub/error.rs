//! Why a model could not be had from the hub, and what can be done about it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a refusal says about the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// There was none.
    None,
    /// One was sent.
    Sent,
    /// There is one, and it was kept back because the address is not encrypted.
    Withheld,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "`{name}` names no model on the hub: {reason}; write hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:ORG/NAME:FILE.gguf"
    )]
    Name { name: String, reason: String },
    #[error("{name}: {reason}")]
    Setting { name: String, reason: String },
    #[error("no directory to keep models in: set HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME or HOME")]
    NoCacheDirectory,

    #[error(
        "HF_HUB_OFFLINE is set, and {model} is not in the cache {}: unset it, or fetch the model where there is a \
         network",
        cache.display()
    )]
    Offline { model: String, cache: PathBuf },
    #[error(
        "cannot reach {origin} ({reason}): check the network, HTTPS_PROXY if there is a proxy, and HF_ENDPOINT if it \
         is set"
    )]
    NoConnection { origin: String, reason: String },
    #[error("the connection to {origin} broke: {reason}")]
    Broken { origin: String, reason: String },
    #[error(
        "{origin} was silent for {} s; HF_HUB_DOWNLOAD_TIMEOUT=SECONDS waits longer",
        patience.as_secs_f64().ceil()
    )]
    Silent { origin: String, patience: Duration },
    #[error(
        "the certificate of {origin} is not accepted ({reason}). If it should be, install the system's certificates \
         (on Debian the package ca-certificates), or name the file of your network's own authority in SSL_CERT_FILE"
    )]
    Certificate { origin: String, reason: String },
    #[error("HTTP cannot be set up: {reason}")]
    Http { reason: String },

    #[error("{}", unauthorized(repository, endpoint, *credential, message))]
    Unauthorized {
        repository: String,
        endpoint: String,
        credential: Credential,
        message: String,
    },
    #[error("{}", gated(repository, endpoint, *credential))]
    Gated {
        repository: String,
        endpoint: String,
        credential: Credential,
    },
    #[error("{repository}: access is forbidden{message}; the token needs the right to read this model")]
    Forbidden { repository: String, message: String },
    #[error("there is no model {repository} at {endpoint}: check the name there")]
    NoRepository { repository: String, endpoint: String },
    #[error(
        "{repository} has no revision `{revision}`: its branches and tags are at {endpoint}/{repository}/tree/main"
    )]
    NoRevision {
        repository: String,
        revision: String,
        endpoint: String,
    },
    #[error("{repository} has no file {file}{}", listed("; its GGUF files are", others))]
    NoFile {
        repository: String,
        file: String,
        others: Vec<String>,
    },
    #[error(
        "{repository} has no weights that can be read (model.safetensors, shards of it, or a .gguf file){}",
        listed("; it has", found)
    )]
    NoWeights { repository: String, found: Vec<String> },
    #[error("{repository} has no config.json beside its weights")]
    NoConfig { repository: String },
    #[error("{repository}: model.safetensors.index.json cannot be used: {reason}")]
    Index { repository: String, reason: String },
    #[error(
        "{repository} has several GGUF files; take one as hf:{repository}:FILE{}",
        listed(", of", files)
    )]
    Several { repository: String, files: Vec<String> },
    #[error(
        "{file} is one part of a model split over several GGUF files, which cannot be read; take one that is whole"
    )]
    Part { file: String },

    #[error("{url} answered {status}{message}")]
    Status {
        url: String,
        status: u16,
        message: String,
        /// How long the server asks to be left alone.
        pause: Option<Duration>,
    },
    #[error(
        "{url} answered what a hub does not answer: {reason}; check HF_ENDPOINT, and that no log-in page stands between"
    )]
    Answer { url: String, reason: String },
    #[error("{file} would have {} or more, and {} are the most that is taken", size(*bytes), size(*limit))]
    TooLarge { file: String, bytes: u64, limit: u64 },
    #[error(
        "{file} arrived damaged twice (its SHA-256 is {found} instead of {expected}): a proxy on the way may change \
         it; nothing was kept"
    )]
    Damaged {
        file: String,
        expected: String,
        found: String,
    },
    #[error("{file}: {} of {} arrived. {reason}. The same command goes on from there", size(*received), of(*bytes))]
    Unfinished {
        file: String,
        received: u64,
        bytes: Option<u64>,
        reason: Box<Error>,
    },

    #[error(
        "the disk of {} is full: {} more are needed for {file}. Make room, or set HF_HUB_CACHE to another disk; \
         the same command goes on where this one stopped",
        directory.display(), of(*missing)
    )]
    DiskFull {
        file: String,
        directory: PathBuf,
        missing: Option<u64>,
    },
    #[error("{}: {source}", path.display())]
    Cache { path: PathBuf, r#source: io::Error },
}

impl Error {
    /// Whether the same request may succeed in a moment.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Broken { .. } | Self::Silent { .. } | Self::NoConnection { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    pub(super) fn cache(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Cache { path, source }
    }
}

fn unauthorized(repository: &str, endpoint: &str, credential: Credential, message: &str) -> String {
    match credential {
        Credential::None => format!(
            "{endpoint} knows no public model {repository}: check the name; if it is private, set HF_TOKEN to a token \
             that may read it ({endpoint}/settings/tokens)"
        ),
        Credential::Sent => format!(
            "{endpoint} does not let this token read {repository}{message}: check the name, and HF_TOKEN or the file \
             it was read from"
        ),
        Credential::Withheld => withheld(repository, endpoint),
    }
}

fn gated(repository: &str, endpoint: &str, credential: Credential) -> String {
    match credential {
        Credential::None => format!(
            "{repository} is gated: accept its terms at {endpoint}/{repository}, then set HF_TOKEN to a token of that \
             account ({endpoint}/settings/tokens)"
        ),
        Credential::Sent => format!(
            "{repository} is gated, and the account of this token has no access: accept its terms at \
             {endpoint}/{repository}, and see that the token may read gated models"
        ),
        Credential::Withheld => withheld(repository, endpoint),
    }
}

fn withheld(repository: &str, endpoint: &str) -> String {
    format!(
        "{endpoint} gives {repository} to those with a token only, and yours was not sent over an unencrypted \
         connection: set HF_ENDPOINT to an https:// address"
    )
}

/// How many names an error lists.
const LISTED: usize = 40;

fn listed(introduction: &str, names: &[String]) -> String {
    if names.is_empty() {
        return String::new();
    }
    let shown = names[..names.len().min(LISTED)].join(", ");
    match names.len().saturating_sub(LISTED) {
        0 => format!("{introduction} {shown}"),
        more => format!("{introduction} {shown} and {more} more"),
    }
}

fn of(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "an unknown number of bytes".to_owned(), size)
}

/// Bytes as a person writes them, in powers of ten as disks are sold.
pub(super) fn size(bytes: u64) -> String {
    let (scale, unit) = match bytes {
        1_000_000_000.. => (1e9, "GB"),
        1_000_000.. => (1e6, "MB"),
        1_000.. => (1e3, "kB"),
        _ => return format!("{bytes} bytes"),
    };
    let value = bytes as f64 / scale;
    format!("{value:.*} {unit}", if value < 99.5 { 1 } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..45).map(|index| format!("m{index}.gguf")).collect();
        let error = Error::Several {
            repository: "a/b".to_owned(),
            files: names,
        };
        let text = error.to_string();
        assert!(text.contains("hf:a/b:FILE, of m0.gguf, m1.gguf"), "{text}");
        assert!(text.ends_with("m39.gguf and 5 more"), "{text}");
    }

    #[test]
    fn sizes_have_the_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (999, "999 bytes"),
            (1_000, "1.0 kB"),
            (98_362_432, "98.4 MB"),
            (538_000_000, "538 MB"),
            (2_471_645_608, "2.5 GB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
