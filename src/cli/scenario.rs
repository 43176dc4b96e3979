//! Where `plan`, `sweep` and `serve --scenario` get their problem from: a scenario's file, a preset, or instances in bare numbers.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde_json::{Map, Value};

use crate::allocation::instance::Instance;
use crate::allocation::scenario::{PRESETS, Scenario, ScenarioError, value_of};

#[derive(Args, Clone, Debug)]
pub struct ScenarioOptions {
    /// A scenario (TOML or JSON), instances in bare numbers (JSON), or a preset: paper, cell, selective, slow-server
    #[arg(value_name = "FILE")]
    pub file: String,
    /// Another value for a field of the scenario, in TOML; may be repeated
    #[arg(long = "set", value_name = "KEY.PATH=VALUE", value_parser = parse_change)]
    pub changes: Vec<Change>,
}

/// A field of a scenario, and what it becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub path: String,
    pub value: Value,
}

fn parse_change(text: &str) -> Result<Change, String> {
    let (path, value) = text.split_once('=').ok_or("it has no `=`: write KEY.PATH=VALUE")?;
    let path = path.trim();
    if path.is_empty() || path.split('.').any(str::is_empty) {
        return Err(format!("`{path}` is no field: write as in clients.count=100"));
    }
    Ok(Change {
        path: path.to_owned(),
        value: parse_value(value.trim()),
    })
}

/// A TOML value; what is none is a text, which then needs no quotes.
fn parse_value(text: &str) -> Value {
    let parsed = match text.contains('\n') {
        true => None,
        false => value_of(&format!("value = {text}"))
            .ok()
            .and_then(|table| table.get("value").cloned()),
    };
    parsed.unwrap_or_else(|| Value::String(text.to_owned()))
}

/// `{"a": {"b": value}}` of the path `a.b`.
pub fn nested(path: &str, value: Value) -> Value {
    path.rsplit('.').fold(value, |value, key| {
        Value::Object(Map::from_iter([(key.to_owned(), value)]))
    })
}

/// Puts a value into the form of a file.
fn set(file: &mut Value, change: &Change) -> anyhow::Result<()> {
    let mut at = file;
    for key in change.path.split('.') {
        let Value::Object(table) = at else {
            bail!("--set {}: `{key}` is below something that is no table", change.path);
        };
        at = table.entry(key).or_insert_with(|| Value::Object(Map::new()));
    }
    *at = change.value.clone();
    Ok(())
}

/// What was given to solve.
pub enum Input {
    Scenario(Box<Scenario>),
    /// The scenario cannot be drawn again: there are numbers only.
    Instances(Vec<Instance>),
}

impl ScenarioOptions {
    /// Reads the file, or the preset where there is no such file.
    pub fn read(&self) -> anyhow::Result<Input> {
        let path = Path::new(&self.file);
        let file = &self.file;
        if !path.exists() && PRESETS.contains(&&**file) {
            let preset = nested("preset", Value::String(file.clone()));
            return self.scenario(preset, PathBuf::new());
        }
        anyhow::ensure!(
            path.exists(),
            "there is no file {file}, and it is no preset either ({})",
            PRESETS.join(", ")
        );
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {file}"))?;
        let value = value_of(&text).map_err(|error| anyhow!("{file}{}", place_and_reason(&error, &text)))?;
        let list = match value.get("instances") {
            Some(Value::Array(list)) => list.clone(),
            Some(_) => bail!("{file}: `instances` is not a list"),
            None if value.get("snr_per_watt_main").is_some() => vec![value],
            None => {
                let directory = path.parent().unwrap_or(Path::new("")).to_owned();
                return self.scenario(value, directory);
            }
        };
        anyhow::ensure!(
            self.changes.is_empty(),
            "{file} holds instances in bare numbers: --set is for scenarios"
        );
        anyhow::ensure!(!list.is_empty(), "{file} has no instances");
        let instances = list.into_iter().enumerate().map(|(index, value)| {
            let name = match value.get("name").and_then(Value::as_str) {
                Some(name) => format!("instance {name}"),
                None => format!("instance {index}"),
            };
            serde_json::from_value(value).map_err(|error| anyhow!("{file}, {name}: {error}"))
        });
        Ok(Input::Instances(instances.collect::<anyhow::Result<_>>()?))
    }

    /// The scenario; instances are refused.
    pub fn read_scenario(&self) -> anyhow::Result<Scenario> {
        match self.read()? {
            Input::Scenario(scenario) => Ok(*scenario),
            Input::Instances(_) => bail!(
                "{} holds instances in bare numbers, and a scenario is needed",
                self.file
            ),
        }
    }

    fn scenario(&self, mut value: Value, directory: PathBuf) -> anyhow::Result<Input> {
        for change in &self.changes {
            set(&mut value, change)?;
        }
        let mut scenario = Scenario::from_value(value.clone())
            .map_err(|error| anyhow!("{}: {}", self.file, reason(&error, &value)))?;
        scenario
            .load_rounds(&directory)
            .map_err(|error| anyhow!("{}: {error}", self.file))?;
        Ok(Input::Scenario(Box::new(scenario)))
    }
}

/// Where in a text it stops being TOML or JSON, and why.
fn place_and_reason(error: &ScenarioError, text: &str) -> String {
    match error {
        ScenarioError::Toml(error) => {
            let line = error.span().map(|span| {
                text.as_bytes()[..span.start.min(text.len())]
                    .split(|&byte| byte == b'\n')
                    .count()
            });
            match line {
                Some(line) => format!(", line {line}: not valid TOML: {}", error.message()),
                None => format!(": not valid TOML: {}", error.message()),
            }
        }
        other => format!(": {other}"),
    }
}

/// Why `changes` to a preset make no scenario, with the field's name, which serde does not say.
pub fn reason(error: &ScenarioError, changes: &Value) -> String {
    let ScenarioError::Shape(error) = error else {
        return error.to_string();
    };
    match culprit(changes, "") {
        Some((path, found)) => format!("{path}: {found}"),
        None => error.to_string(),
    }
}

/// The first field that alone is refused, and why.
fn culprit(changes: &Value, prefix: &str) -> Option<(String, String)> {
    let Value::Object(fields) = changes else { return None };
    for (key, value) in fields {
        let path = match prefix {
            "" => key.clone(),
            _ => format!("{prefix}.{key}"),
        };
        let Err(ScenarioError::Shape(error)) = Scenario::from_value(nested(&path, value.clone())) else {
            continue;
        };
        // A field of an optional table is refused for the ones beside it.
        if !value.is_object() && error.to_string().starts_with("missing field") {
            continue;
        }
        return Some(culprit(value, &path).unwrap_or_else(|| (path, error.to_string())));
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn changes_are_toml_values_and_bare_texts() {
        let change = |text: &str| parse_change(text).unwrap();
        assert_eq!(change("clients.count=100").value, json!(100));
        assert_eq!(change("main.bandwidth_hz = 1e6").value, json!(1e6));
        assert_eq!(change("training.ranks=[1, 4]").value, json!([1, 4]));
        assert_eq!(change("channel.fading=rayleigh").value, json!("rayleigh"));
        assert_eq!(change("channel.fading=\"none\"").value, json!("none"));
        assert_eq!(change("a.b=1").path, "a.b");
        assert!(parse_change("clients.count").is_err());
        assert!(parse_change("clients..count=1").is_err());
    }

    #[test]
    fn a_refused_field_is_named_with_its_path() {
        let refused = |changes: Value| reason(&Scenario::from_value(changes.clone()).unwrap_err(), &changes);
        let text = refused(json!({"seed": 4, "clients": {"count": 3, "cuont": 2}}));
        assert!(text.starts_with("clients.cuont: unknown field `cuont`"), "{text}");
        let text = refused(json!({"main": {"subchannels": "many"}}));
        assert!(text.starts_with("main.subchannels: invalid type: string"), "{text}");
        let text = refused(json!({"download": {"subchannels": 4}}));
        assert!(text.starts_with("download: missing field"), "{text}");
    }
}
