//! Runs on this machine: the directory that a run has to itself and what it resumes from.
//!
//! It is separate from those who train, because `serve` and `train` keep their runs in one way and `runs` lists both.

pub mod snapshots;
