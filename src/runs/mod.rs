//! Runs on this machine: the directory that a run has to itself, what it resumes from, and what is told of runs afterwards.
//!
//! It is separate from those who train, because `serve`, `demo` and `train` keep their runs in one way and `runs` lists them all.

pub mod directory;
pub mod found;
pub mod snapshots;
pub mod time;

use crate::disk;
use crate::model::adapter::AdapterError;

/// Why a run cannot be kept, or not be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Disk(#[from] disk::Error),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error("{error}; the adapter is in {place} instead")]
    Elsewhere { error: AdapterError, place: String },
    #[error("{0} holds a run, which --out would overwrite: give another --out, or go on with that one by --resume {0}")]
    Taken(String),
    #[error("there is no run {name} in {directory}; {there}")]
    Unknown {
        name: String,
        directory: String,
        /// Which there are.
        there: String,
    },
    #[error("{0} holds no run that could go on: begin one with --out {0}")]
    NoRun(String),
    #[error(
        "{path} is damaged ({reason}): the run cannot go on without what it says; begin it again with another --out"
    )]
    Description { path: String, reason: String },
}
