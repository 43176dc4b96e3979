//! A client in a native process: sockets, files and a compute thread around the session.
//!
//! The session runs in the caller's async task and answers pings at once; forward and backward passes run in a thread of
//! their own and may take as long as they take.

mod driver;
mod fetch;
mod thread;

use std::io;
use std::path::{Path, PathBuf};

pub use driver::join;

use crate::compute::Engine;
use crate::data::{Columns, Example, Summary as DataSummary};
use crate::protocol::message::RoundResult;
use crate::protocol::{ClientError, ClientFailure, Endpoint, FinishReason};
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
    #[error("{name} could not be fetched from {url}: {reason}")]
    Download { name: String, url: String, reason: String },
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
}

/// What happens, for people. Rounds and steps count from 1.
#[derive(Clone, Debug)]
pub enum Report {
    Connected,
    ConnectionLost {
        endpoint: Endpoint,
        reason: Option<String>,
    },
    /// A part of the model is being fetched; `done` of `bytes` are there.
    Fetching {
        name: String,
        done: u64,
        bytes: u64,
    },
    Loaded {
        data: Option<DataSummary>,
        blocks: usize,
        rounds: u32,
        /// Still to go.
        steps: u32,
    },
    RoundStarted {
        round: u32,
        rounds: u32,
        members: u32,
    },
    Step {
        step: u32,
        steps: u32,
        loss: f32,
        mean_loss: f32,
        tokens: u64,
    },
    Round(RoundResult),
    /// The adapter could not be saved; the next is tried again.
    Unsaved {
        detail: String,
    },
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
