//! The client's side of the adapter as files, after every round.
//!
//! Separate because a disk that is full now may not be at the next round: what could not be saved is tried again, at the end too.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::edge::Report;
use super::super::{self as client, Plan};
use super::Error;

/// Where the adapter goes, if it is wanted.
pub(super) struct AdapterOut {
    directory: Option<PathBuf>,
    /// The last adapter, where it could not be saved.
    unsaved: Mutex<Option<(Plan, Vec<f32>)>>,
    report: Arc<dyn Fn(Report) + Send + Sync>,
}

impl AdapterOut {
    pub fn new(directory: Option<PathBuf>, report: Arc<dyn Fn(Report) + Send + Sync>) -> Self {
        Self {
            directory,
            unsaved: Mutex::new(None),
            report,
        }
    }

    /// Saves a round's adapter, for which there will be another time.
    pub fn keep(&self, plan: &Plan, values: &[f32]) {
        let saved = self.save(plan, values);
        let mut unsaved = self.unsaved();
        match saved {
            Ok(()) => *unsaved = None,
            Err(error) => {
                let before = unsaved.replace((plan.clone(), values.to_vec()));
                if before.is_none() {
                    let detail = error.to_string();
                    (self.report)(Report::Unsaved { detail });
                }
            }
        }
    }

    /// Saves what could not be saved before.
    ///
    /// # Errors
    /// [`Error::Client`] when it still cannot.
    pub fn finish(&self) -> Result<(), Error> {
        match self.unsaved().take() {
            Some((plan, values)) => self.save(&plan, &values),
            None => Ok(()),
        }
    }

    fn unsaved(&self) -> MutexGuard<'_, Option<(Plan, Vec<f32>)>> {
        self.unsaved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, plan: &Plan, values: &[f32]) -> Result<(), Error> {
        let Some(directory) = &self.directory else {
            return Ok(());
        };
        plan.adapter(values)
            .and_then(|adapter| adapter.save(directory, &plan.architecture, ""))
            .map_err(|error| client::Error::from(error).into())
    }
}
