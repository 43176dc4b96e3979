//! Scenarios as text: presets, and what a file changes of them.
//!
//! Separate because it knows of fields only that some are tables.

use serde_json::{Map, Value, json};

use super::{Scenario, ScenarioError};
use crate::model::rounds::{RoundsError, RoundsTable};

/// The names of the presets.
pub const PRESETS: [&str; 4] = ["paper", "cell", "selective", "slow-server"];

/// A preset in the form of a file.
fn preset(name: &str) -> Option<Value> {
    let paper = json!({
        "preset": "paper",
        "seed": 0,
        "clients": {
            "count": 5,
            "compute_hz": [1.0e9, 1.6e9],
            "cycles_per_flop": 1.0 / 1024.0,
            "radius_m": 20.0,
            "distance_min_m": 1.0,
            "power_max_dbm": 41.76,
            "capacitance": 1e-28,
        },
        "server": { "compute_hz": 5.0e9, "cycles_per_flop": 1.0 / 32768.0 },
        "channel": {
            "noise_dbm_per_hz": -174.0,
            "path_loss_intercept_db": 128.1,
            "path_loss_slope_db": 37.6,
            "fading": "none",
        },
        "main": { "subchannels": 20, "bandwidth_hz": 500e3, "power_total_dbm": 46.99 },
        "federated": { "subchannels": 20, "bandwidth_hz": 500e3, "power_total_dbm": 46.99 },
        "model": { "blocks": 12, "width": 768, "heads": 12, "vocab": 50257, "positions": 1024 },
        "training": {
            "batch": 16,
            "seq": 512,
            "local_steps": 12,
            "wire": "f32",
            "targets": ["c_attn"],
            "rounds": { "1": 92.0, "2": 74.0, "4": 64.0, "6": 61.0, "8": 60.0 },
        },
        "objective": { "energy_weight_s_per_j": 0.0 },
    });
    let changes = match name {
        "paper" => return Some(paper),
        "cell" | "selective" | "slow-server" => json!({
            "preset": name,
            "clients": { "radius_m": 500.0, "power_max_dbm": 23.0 },
            "main": { "bandwidth_hz": 10e6, "power_total_dbm": 30.0 },
            "federated": { "bandwidth_hz": 10e6, "power_total_dbm": 30.0 },
        }),
        _ => return None,
    };
    let cell = merge(paper, changes);
    Some(match name {
        "selective" => merge(cell, json!({ "channel": { "fading": "rayleigh" } })),
        "slow-server" => merge(
            cell,
            json!({
                "clients": { "compute_hz": [0.3e9, 10e9] },
                "server": { "compute_hz": 0.5e9 },
                "main": { "bandwidth_hz": 100e6 },
                "federated": { "bandwidth_hz": 100e6 },
                "training": { "wire": "f16" },
            }),
        ),
        _ => cell,
    })
}

/// `base` with what `changes` says. Tables are merged, all else is replaced, and so is the table E(r): a rank that is not measured
/// must not keep another model's number.
fn merge(base: Value, changes: Value) -> Value {
    match (base, changes) {
        (Value::Object(mut base), Value::Object(changes)) => {
            for (key, change) in changes {
                let merged = match base.remove(&key) {
                    Some(value) if key != "rounds" => merge(value, change),
                    _ => change,
                };
                base.insert(key, merged);
            }
            Value::Object(base)
        }
        (_, changes) => changes,
    }
}

impl Scenario {
    /// A preset.
    ///
    /// # Errors
    /// [`ScenarioError::Preset`].
    pub fn preset(name: &str) -> Result<Self, ScenarioError> {
        Self::from_value(json!({ "preset": name }))
    }

    /// Reads JSON, if it starts like an object, or TOML. A `rounds_file` is left to [`Scenario::load`].
    ///
    /// # Errors
    /// [`ScenarioError`] names the field.
    pub fn from_text(text: &str) -> Result<Self, ScenarioError> {
        Self::from_value(value_of(text)?)
    }

    /// The same from a parsed file. Without a `preset` it starts from `paper`.
    ///
    /// # Errors
    /// [`ScenarioError`] names the field.
    pub fn from_value(value: Value) -> Result<Self, ScenarioError> {
        let name = match value.get("preset") {
            None => "paper".to_owned(),
            Some(Value::String(name)) => name.clone(),
            Some(other) => {
                return Err(ScenarioError::Preset {
                    name: other.to_string(),
                });
            }
        };
        let base = preset(&name).ok_or(ScenarioError::Preset { name })?;
        serde_json::from_value(merge(base, value)).map_err(ScenarioError::Shape)
    }

    /// Reads a file, and the table of rounds it names.
    ///
    /// # Errors
    /// [`ScenarioError`] names the file or field.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(path: &std::path::Path) -> Result<Self, ScenarioError> {
        let text = std::fs::read_to_string(path).map_err(|source| ScenarioError::Read {
            path: path.display().to_string(),
            source,
        })?;
        let mut scenario = Self::from_text(&text)?;
        scenario.load_rounds(path.parent().unwrap_or(std::path::Path::new("")))?;
        Ok(scenario)
    }

    /// Reads the table that `rounds_file` names, relative to `directory`.
    ///
    /// # Errors
    /// [`ScenarioError::Rounds`].
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn load_rounds(&mut self, directory: &std::path::Path) -> Result<(), ScenarioError> {
        if let Some(file) = &self.training.rounds_file {
            let table = RoundsTable::load(&directory.join(file))?;
            self.set_rounds(&table)?;
        }
        Ok(())
    }

    /// Takes E(r) from a measured table.
    ///
    /// # Errors
    /// [`ScenarioError::Rounds`] when a rank has none.
    pub fn set_rounds(&mut self, table: &RoundsTable) -> Result<(), ScenarioError> {
        self.training.rounds = match &self.training.ranks {
            Some(ranks) => (ranks.iter())
                .map(|&rank| Ok((rank, table.rounds_at(rank as usize)?)))
                .collect::<Result<_, RoundsError>>()?,
            None => (table.measured()?.into_iter())
                .map(|(rank, rounds)| (u32::try_from(rank).unwrap_or(u32::MAX), rounds))
                .collect(),
        };
        Ok(())
    }

    /// The scenario with other values, in the form of a file: `{"clients": {"count": 100}}`.
    ///
    /// # Errors
    /// [`ScenarioError::Shape`] names an unknown field.
    pub fn with(&self, changes: Value) -> Result<Self, ScenarioError> {
        let base = without_nulls(serde_json::to_value(self)?);
        serde_json::from_value(merge(base, changes)).map_err(ScenarioError::Shape)
    }
}

/// A parsed TOML or JSON text.
///
/// # Errors
/// [`ScenarioError::Json`], [`ScenarioError::Toml`].
pub fn value_of(text: &str) -> Result<Value, ScenarioError> {
    let text = text.trim_start_matches('\u{feff}');
    // A TOML document starts with a key, a comment or a `[table]`, never with a brace.
    match text.trim_start().starts_with('{') {
        true => Ok(serde_json::from_str(text)?),
        false => Ok(toml::from_str(text)?),
    }
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields
                .into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key, without_nulls(value)))
                .collect::<Map<_, _>>(),
        ),
        other => other,
    }
}
