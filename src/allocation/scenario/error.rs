//! Why a scenario cannot be read.
//!
//! Separate because reading it and putting it in numbers fail alike: by the name of a field.

use super::super::Error;
use crate::model::architecture::ArchitectureError;
use crate::model::rounds::RoundsError;

/// Why a scenario cannot be read.
#[expect(missing_docs, reason = "the messages say it")]
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    #[error("not valid JSON: {0}")]
    Json(serde_json::Error),
    /// Valid JSON or TOML, and no scenario: a field that is unknown, missing or of another type.
    #[error("{0}")]
    Shape(serde_json::Error),
    #[error("not valid TOML: {0}")]
    Toml(toml::de::Error),
    #[error("`{name}` is no preset; choose paper, cell, selective or slow-server")]
    Preset { name: String },
    #[error("{field}: {reason}")]
    Field { field: &'static str, reason: String },
    #[error("[model]: {0}")]
    Model(ArchitectureError),
    #[error("rounds_file: {0}")]
    Rounds(RoundsError),
    #[error(transparent)]
    Problem(#[from] Error),
    #[cfg(not(target_arch = "wasm32"))]
    #[error("cannot read {path}: {source}")]
    Read { path: String, r#source: std::io::Error },
}

impl From<serde_json::Error> for ScenarioError {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(error)
    }
}

impl From<toml::de::Error> for ScenarioError {
    fn from(error: toml::de::Error) -> Self {
        Self::Toml(error)
    }
}

impl From<ArchitectureError> for ScenarioError {
    fn from(error: ArchitectureError) -> Self {
        Self::Model(error)
    }
}

impl From<RoundsError> for ScenarioError {
    fn from(error: RoundsError) -> Self {
        Self::Rounds(error)
    }
}

pub(super) fn field(field: &'static str, reason: String) -> ScenarioError {
    ScenarioError::Field { field, reason }
}
