//! Outgoing connections of a native process: the join link, which certificates to trust, HTTP and WebSockets.
//!
//! It is separate from the client and the servers because both dial (a client its servers, a main server a federated
//! server elsewhere), and from the protocol because that knows bytes only. Native only.
//!
//! | file | holds |
//! |---|---|
//! | `link`, `fingerprint`, `trust` | where a server is, and which certificates are accepted |
//! | `dialer`, `stream` | opening connections |
//! | `diagnosis` | what is wrong when none opens |
//! | `machine` | this machine: its directories and its name |

mod diagnosis;
mod dialer;
mod fingerprint;
mod link;
mod machine;
mod stream;
mod trust;

use std::time::Duration;

pub use dialer::{Dialer, SocketEvent};
pub use fingerprint::Fingerprint;
pub use link::{JoinLink, Origin};
pub use machine::{cache_directory, data_directory};
pub use stream::ByteStream;
pub use trust::Trust;

/// How long a connection may take to open before it counts as failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// By this header of its answers an sflllm server is told from others.
pub const SERVER_HEADER: &str = "x-sflllm";

/// Why a server could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{url}` is no address of a server: {reason}; write it like {like}")]
    Url { url: String, reason: String, like: String },
    #[error(
        "http://{host} would send training data over the network unencrypted; use the server's https:// address \
         (plain http is accepted on this machine's loopback address only)"
    )]
    PlainText { host: String },
    #[error("no server answers at {url} (connection refused); is `sflllm serve` running there, on this port?")]
    Refused { url: String },
    #[error("{url} does not answer within {} s; check the address, and that a firewall lets the port through", CONNECT_TIMEOUT.as_secs())]
    TimedOut { url: String },
    #[error(
        "the certificate of {url} is not known here ({reason}); copy the server's certificate file \
         ({home}/tls/certificate.pem there) and give it with --ca FILE, or accept any certificate with --insecure-tls"
    )]
    Certificate { url: String, reason: String, home: String },
    #[error(
        "the certificate of {url} is not the one that the join link names: copy the link again, since the server may have made a \
         new certificate; if it did not, somebody else answers in its place"
    )]
    Pin { url: String },
    #[error("cannot reach {url}: {reason}")]
    Unreachable { url: String, reason: String },
    #[error("the name in {url} is not known here; check how it is spelled, or use the server's address in numbers")]
    UnknownHost { url: String },
    #[error("{url} does not answer plain http: a server that speaks TLS is there; use {https}")]
    NeedsTls { url: String, https: String },
    #[error(
        "{url} does not answer TLS: an sflllm server without it is there; use {http} on that machine, or start it with --listen https://"
    )]
    NoTls { url: String, http: String },
    #[error(
        "another program answers at {url}{detail}, no sflllm server; check the address and the port: `sflllm serve` prints its link"
    )]
    NotSflllm { url: String, detail: String },
    #[error("{url} sends visitors on to {to}; use that address")]
    Redirect { url: String, to: String },
    #[error("the sflllm server at {url} is no {service} server; the one that is prints its own link")]
    NoService { url: String, service: String },
    #[error("no TLS connection with {url} comes about: {reason}; check that both sides run the same version of sflllm")]
    Handshake { url: String, reason: String },
    #[error("{url} answered {status}{detail}")]
    Status { url: String, status: u16, detail: String },
    #[error("{path}: {reason}; --ca needs a file with PEM certificates")]
    Authority { path: String, reason: String },
    #[error("TLS cannot be set up: {0}")]
    Tls(rustls::Error),
    #[error("HTTP cannot be set up: {0}")]
    Http(reqwest::Error),
    #[error("no directory for this program's data: set SFLLLM_HOME, XDG_DATA_HOME or HOME")]
    NoHome,
}

impl From<rustls::Error> for Error {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error)
    }
}

impl Error {
    /// Whether trying again in a moment could help.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Refused { .. } | Error::TimedOut { .. } | Error::Unreachable { .. } | Error::UnknownHost { .. } => {
                true
            }
            Error::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }
}
