//! The run's log for machines: `metrics.jsonl`, one object a line.
//!
//! It is separate from the coordinator so that the fields have one definition. Rounds and steps count from 1; the line of
//! round 0 is the validation before training.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::Error;
use super::planner::ClientPrediction;
use crate::terms::phases::Phases;

/// A member's step. The upload is from when the client was free to start until its activations had come, less the forward pass; the
/// download from when its gradient went out until it was done, less the backward pass.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StepPhases {
    pub client: u64,
    #[serde(flatten)]
    pub phases: Phases<f64>,
}

/// A member's round.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RoundPhases {
    pub client: u64,
    #[serde(serialize_with = "predicted")]
    pub predicted: Option<ClientPrediction>,
    pub measured: MeasuredPhases,
}

/// A prediction as the log has it: without the way of the gradients, which emulated links have for nothing.
fn predicted<S: Serializer>(prediction: &Option<ClientPrediction>, serializer: S) -> Result<S::Ok, S::Error> {
    let fields = prediction.map(|ClientPrediction { step, federated_s }| {
        json!({
            "forward_s": step.forward, "upload_s": step.upload, "backward_s": step.backward, "federated_s": federated_s,
        })
    });
    fields.serialize(serializer)
}

/// Means over a member's steps, and the time from asking for its adapter until the federated server had it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MeasuredPhases {
    #[serde(flatten)]
    pub step: Phases<f64>,
    pub federated_s: Option<f64>,
}

/// The server's part of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ServerPhase {
    pub predicted_s: Option<f64>,
    /// The mean over the round's steps.
    pub measured_s: Option<f64>,
}

/// One optimiser step of the server.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    pub round: u32,
    /// In the run, over all rounds.
    pub step: u32,
    /// Mean over all members' targets.
    pub loss: f64,
    /// Targets the loss is averaged over.
    pub tokens: u64,
    pub clients: usize,
    /// From the end of the step before (or the round's start) to the end of this one.
    pub seconds: f64,
    /// Of `seconds`, until the last member's activations had come.
    pub wait_seconds: f64,
    /// Of `seconds`, on the server's device.
    pub compute_seconds: f64,
    /// Received and sent on the main service since the last line.
    pub bytes_up: u64,
    pub bytes_down: u64,
    /// Of the members that did the whole step.
    pub phases: Vec<StepPhases>,
}

/// The end of a round.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RoundRecord {
    pub round: u32,
    /// In the average.
    pub adapters: usize,
    /// Client numbers and why they are not in the average.
    pub excluded: Vec<Value>,
    pub valid_loss: Option<f64>,
    pub valid_perplexity: Option<f64>,
    pub valid_tokens: Option<usize>,
    /// The planner's forecast, when there is one.
    pub predicted_s: Option<f64>,
    /// From the round's start to its average, without the time in which the next was planned.
    pub measured_s: f64,
    pub phases: Vec<RoundPhases>,
    pub server: ServerPhase,
}

/// Appends to `metrics.jsonl`.
#[derive(Debug)]
pub struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// # Errors
    /// [`Error::File`].
    pub fn create(directory: &Path) -> Result<Self, Error> {
        let path = directory.join("metrics.jsonl");
        let file = File::create(&path).map_err(|error| Error::file("create", &path, error))?;
        Ok(Self { file, path })
    }

    /// # Errors
    /// [`Error::File`].
    pub fn step(&mut self, record: &StepRecord) -> Result<(), Error> {
        self.line("step", serde_json::to_value(record).expect("a record has a JSON form"))
    }

    /// # Errors
    /// [`Error::File`].
    pub fn round(&mut self, record: &RoundRecord) -> Result<(), Error> {
        self.line("round", serde_json::to_value(record).expect("a record has a JSON form"))
    }

    /// Something that happened `at` seconds after the start; `fields` must be an object.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn event(&mut self, at: f64, event: &str, fields: Value) -> Result<(), Error> {
        let mut line = json!({ "at": at, "event": event });
        merge(&mut line, fields);
        self.line("event", line)
    }

    fn line(&mut self, kind: &str, fields: Value) -> Result<(), Error> {
        let mut line = json!({ "kind": kind });
        merge(&mut line, fields);
        // One write a line, so that a reader never sees half of one.
        let text = format!("{line}\n");
        self.file
            .write_all(text.as_bytes())
            .map_err(|error| Error::file("write", &self.path, error))
    }
}

fn merge(line: &mut Value, fields: Value) {
    if let (Value::Object(line), Value::Object(fields)) = (line, fields) {
        line.extend(fields);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_an_object_with_its_kind() {
        let directory = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(directory.path()).unwrap();
        let step = StepRecord {
            round: 1,
            step: 2,
            loss: 3.5,
            tokens: 40,
            clients: 2,
            seconds: 0.5,
            wait_seconds: 0.25,
            compute_seconds: 0.125,
            bytes_up: 10,
            bytes_down: 20,
            phases: vec![StepPhases {
                client: 7,
                phases: Phases {
                    upload: 0.25,
                    ..Phases::default()
                },
            }],
        };
        metrics.step(&step).unwrap();
        let round = RoundRecord {
            round: 1,
            adapters: 2,
            excluded: vec![json!({ "client": 3, "reason": "left the round" })],
            valid_loss: Some(2.0),
            valid_perplexity: Some(2.0_f64.exp()),
            valid_tokens: Some(100),
            predicted_s: None,
            measured_s: 1.5,
            phases: vec![RoundPhases::default()],
            server: ServerPhase::default(),
        };
        metrics.round(&round).unwrap();
        metrics.event(0.5, "joined", json!({ "client": 1 })).unwrap();
        let text = std::fs::read_to_string(directory.path().join("metrics.jsonl")).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(
            (&lines[0]["kind"], &lines[0]["bytes_down"]),
            (&json!("step"), &json!(20))
        );
        assert_eq!(
            (&lines[0]["phases"][0]["client"], &lines[1]["phases"][0]["predicted"]),
            (&json!(7), &Value::Null)
        );
        assert_eq!(
            (&lines[1]["kind"], &lines[1]["excluded"][0]["client"]),
            (&json!("round"), &json!(3))
        );
        assert_eq!(
            (&lines[2]["kind"], &lines[2]["event"]),
            (&json!("event"), &json!("joined"))
        );
    }
}
