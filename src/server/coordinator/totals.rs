//! A run in numbers, as they are kept over an interruption.
//!
//! Separate because what is kept must be read again by a later version: by name, and with a default for what is missing.

use serde_json::{Value, json};

use super::super::metrics::Position;
use super::Coordinator;
use super::Traffic;
use super::report::Summary;
use crate::split::Evaluation;

/// What a run came to up to the beginning of a round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    pub rounds: u32,
    pub steps: u64,
    pub tokens: u64,
    pub seconds: f64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub baseline: Option<Evaluation>,
    pub last: Option<Evaluation>,
    /// How far `metrics.jsonl` belongs to it.
    pub metrics: Position,
}

impl Totals {
    pub fn to_json(&self) -> Value {
        let evaluation = |evaluation: Option<Evaluation>| {
            evaluation.map(|evaluation| json!({ "loss": evaluation.loss, "perplexity": evaluation.perplexity, "tokens": evaluation.tokens }))
        };
        json!({
            "rounds": self.rounds, "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds,
            "bytes_up": self.bytes_up, "bytes_down": self.bytes_down, "metrics": { "bytes": self.metrics.bytes, "lost": self.metrics.lost, "missing": self.metrics.missing },
            "baseline": evaluation(self.baseline), "last": evaluation(self.last),
        })
    }

    pub fn from_json(text: &str) -> Self {
        let value: Value = serde_json::from_str(text).unwrap_or_default();
        let number = |name: &str| value[name].as_u64().unwrap_or_default();
        let evaluation = |name: &str| {
            let value = &value[name];
            Some(Evaluation {
                loss: value["loss"].as_f64()?,
                perplexity: value["perplexity"].as_f64()?,
                tokens: usize::try_from(value["tokens"].as_u64()?).ok()?,
            })
        };
        Self {
            rounds: u32::try_from(number("rounds")).unwrap_or(u32::MAX),
            steps: number("steps"),
            tokens: number("tokens"),
            seconds: value["seconds"].as_f64().unwrap_or_default(),
            bytes_up: number("bytes_up"),
            bytes_down: number("bytes_down"),
            baseline: evaluation("baseline"),
            last: evaluation("last"),
            metrics: Position {
                bytes: value["metrics"]["bytes"].as_u64().unwrap_or_default(),
                lost: value["metrics"]["lost"].as_u64().unwrap_or_default(),
                missing: value["metrics"]["missing"].as_u64().unwrap_or_default(),
            },
        }
    }
}

impl Coordinator {
    /// What the run has come to by now.
    pub(super) fn totals(&mut self) -> Totals {
        let Summary {
            rounds,
            steps,
            tokens,
            baseline,
            last,
            ..
        } = self.summary;
        Totals {
            rounds,
            steps,
            tokens,
            seconds: self.now().as_secs_f64(),
            bytes_up: self.total.up,
            bytes_down: self.total.down,
            baseline,
            last,
            metrics: self.parts.metrics.position(),
        }
    }

    /// Goes on from there.
    pub(super) fn take_totals(&mut self, totals: &Totals) {
        let summary = &mut self.summary;
        (summary.rounds, summary.steps, summary.tokens) = (totals.rounds, totals.steps, totals.tokens);
        (summary.baseline, summary.last) = (totals.baseline, totals.last);
        self.total = Traffic {
            up: totals.bytes_up,
            down: totals.bytes_down,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_read_as_they_were_written_and_missing_ones_are_nothing() {
        let evaluation = Evaluation {
            loss: 2.5,
            perplexity: 2.5_f64.exp(),
            tokens: 1000,
        };
        let totals = Totals {
            rounds: 3,
            steps: 30,
            tokens: u64::from(u32::MAX) + 7,
            seconds: 12.25,
            bytes_up: 5,
            bytes_down: 6,
            baseline: Some(evaluation),
            last: None,
            metrics: Position {
                bytes: 77,
                lost: 2,
                missing: 1,
            },
        };
        assert_eq!(Totals::from_json(&totals.to_json().to_string()), totals);
        assert_eq!(Totals::from_json("{}"), Totals::default());
        assert_eq!(Totals::from_json("{"), Totals::default());
    }
}
