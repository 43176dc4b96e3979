//! An edge client: its session, its side of the model and its data, put together.
//!
//! | module | holds |
//! |---|---|
//! | `edge` | what is done when: the session and all around it, as one machine without sockets, files and devices |
//! | `plan` | what an assignment means ([`Plan`]) |
//! | `loader` | loading the model part by part ([`Loader`]), from what an assignment before has left on the device ([`Held`]) |
//! | `learner` | training ([`Learner`]) |
//! | `trainer` | the machine's tasks, carried out on a device ([`Trainer`]) |
//! | `native`, `web` | bytes, files and time: they carry out what the machine says |
//! | `local` | a run in one thread, without the machine: nothing is fetched, kept or tried again |

pub mod edge;
mod learner;
mod loader;
mod plan;
mod trainer;

pub mod local;
#[cfg(all(feature = "program", not(target_arch = "wasm32")))]
#[doc(hidden)]
pub mod native;
#[cfg(target_arch = "wasm32")]
pub mod web;

use std::io;

pub use learner::Learner;
pub use loader::{Held, Loader};
pub use plan::{Plan, verify};
pub use trainer::Trainer;

use crate::compute;
use crate::data::DataError;
use crate::model::adapter::AdapterError;
use crate::model::architecture::ArchitectureError;
use crate::model::weights::WeightsError;
use crate::protocol::message::Capabilities;
use crate::split;
use crate::terms::tensor::WireForm;

/// Why this client cannot take part.
#[expect(missing_docs, reason = "the messages say it")]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the server's assignment cannot be used: {0}")]
    Assignment(String),
    #[error("the server's model: {0}")]
    Config(ArchitectureError),
    #[error(
        "{name} from the server has another hash than announced; fetch it again, and if it stays tell the server's owner"
    )]
    Hash { name: String },
    #[error("cannot read what was fetched of {name}: {source}")]
    Read { name: String, r#source: io::Error },
    #[error(transparent)]
    Compute(#[from] compute::Error),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Split(#[from] split::Error),
}

impl From<ArchitectureError> for Error {
    fn from(error: ArchitectureError) -> Self {
        Self::Config(error)
    }
}

/// What this program can do on `device`, for the handshake.
pub fn capabilities(device: &str, memory_bytes: u64) -> Capabilities {
    Capabilities {
        forms: WireForm::ALL.to_vec(),
        memory_bytes,
        device: device.to_owned(),
    }
}
