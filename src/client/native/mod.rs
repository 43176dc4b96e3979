//! A client in a native process: sockets, files and a compute thread around the machine.
//!
//! The machine runs in the caller's async task and answers pings at once; forward and backward passes run in a thread of
//! their own and may take as long as they take.

mod adapter;
mod driver;
mod fetch;
mod state;
mod thread;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use driver::join;
pub use state::{Found, StateDirectory};

pub use super::edge::{Awaited, Report};
use super::edge::{Cause, Failure, State};
use crate::compute::Engine;
use crate::data::{Columns, Example};
use crate::protocol::{ClientError, ClientFailure, FinishReason};
use crate::transport::{self, Dialer, Origin};

/// Why a native client stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Transport(#[from] transport::Error),
    #[error("the server refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Session(#[from] ClientFailure),
    #[error(transparent)]
    Client(#[from] super::Error),
    #[error(transparent)]
    Answer(#[from] ClientError),
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: String,
        r#source: io::Error,
    },
    #[error("{name} could not be fetched: {reason}")]
    Broken { name: String, reason: String },
    #[error("{name} could not be fetched from {url}: it is longer than the {bytes} bytes announced")]
    Oversized { name: String, url: String, bytes: u64 },
    #[error("the compute thread ended without a reason")]
    ThreadGone,
}

impl Error {
    fn file(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File {
            action,
            path: path.display().to_string(),
            source,
        }
    }
}

impl Cause for Error {
    fn may_pass(&self) -> bool {
        match self {
            Error::Transport(error) => error.is_transient(),
            Error::Broken { .. } => true,
            _ => false,
        }
    }
}

impl From<Failure<Error>> for Error {
    fn from(failure: Failure<Error>) -> Self {
        match failure {
            Failure::Session(ClientFailure::Refused { refused, .. }) => {
                let reason = refused.reason.to_string();
                let more = if refused.detail == reason {
                    String::new()
                } else {
                    format!(" ({})", refused.detail)
                };
                Error::Refused(reason + &more)
            }
            Failure::Session(failure) => failure.into(),
            Failure::Answer(error) => error.into(),
            Failure::Driver(error) => error,
        }
    }
}

/// What a client learns from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Read and tokenised here, with the server's tokenizer.
    File {
        path: PathBuf,
        skip_bad_lines: bool,
        columns: Columns,
        /// Used instead of the server's chat template; `chatml`, or a template's text.
        chat_template: Option<String>,
    },
    /// Examples already made with this run's tokenizer.
    Examples(Vec<Example>),
}

/// How to join.
pub struct Settings {
    pub server: Origin,
    pub token: Option<String>,
    pub dialer: Dialer,
    pub name: String,
    pub engine: Engine,
    pub source: Source,
    /// Where fetched parts of the model are kept, by content hash.
    pub cache: PathBuf,
    /// Where the client's side of the adapter is saved, if wanted.
    pub adapter_out: Option<PathBuf>,
    /// How long a server that cannot be reached is tried again.
    pub give_up: Duration,
    /// Where what it takes to come back is kept, if it is.
    pub keep: Option<Keep>,
}

/// What a client keeps of a run, and where.
#[derive(Debug)]
pub struct Keep {
    pub directory: StateDirectory,
    /// What is gone on with.
    pub resume: Option<State>,
}

/// A finished session in numbers.
#[derive(Clone, Debug)]
pub struct Summary {
    pub reason: FinishReason,
    /// Local steps taken.
    pub steps: u64,
    pub tokens: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub seconds: f64,
}
