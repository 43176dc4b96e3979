//! E(r): how many rounds of split training an adapter of rank r needs to reach a target loss, as measured at some ranks.
//!
//! The delay of SflLLM (arXiv 2504.14667) is E(r) times the delay of a round. No formula gives E(r): it is measured by training, on
//! the model and data in question, and kept in a file. The file is separate from the measuring so that whoever chooses a rank
//! can read it without being able to train.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The version of the file that this crate writes and reads.
pub(crate) const SCHEMA: u32 = 1;

/// A calibration, finished or not. Lists are parallel to `ranks`, and those below `rounds` may be empty in a file written by hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundsTable {
    pub schema: u32,
    /// What the numbers belong to, for people.
    #[serde(default)]
    pub model: String,
    /// Whether nothing is left to be measured.
    #[serde(default = "complete")]
    pub complete: bool,
    /// Clients that trained; 1 for centralised training.
    #[serde(default = "one")]
    pub clients: usize,
    /// Optimiser steps in a round.
    #[serde(default = "one")]
    pub local_steps: usize,
    /// Rounds after which a run that did not reach the target was given up.
    #[serde(default)]
    pub max_rounds: Option<usize>,
    /// Runs at each rank.
    #[serde(default)]
    pub seeds: usize,
    /// Mean validation loss of a token, in nats.
    #[serde(default)]
    pub target_loss: Option<f64>,
    /// LoRA ranks, increasing.
    pub ranks: Vec<usize>,
    /// Mean rounds to the target; null where not all runs are there, or one did not reach it.
    pub rounds: Vec<Option<f64>>,
    /// Sample standard deviation of the rounds; null for fewer than two runs.
    #[serde(default)]
    pub spread: Vec<Option<f64>>,
    /// Rounds of each run, in the order of the seeds; null for one that did not reach the target.
    #[serde(default)]
    pub runs: Vec<Vec<Option<f64>>>,
    /// Validation losses of each run: before the first round and after every round.
    #[serde(default)]
    pub losses: Vec<Vec<Vec<f64>>>,
    /// How it was measured. Runs with other settings do not belong in this table.
    #[serde(default)]
    pub settings: Value,
}

fn complete() -> bool {
    true
}

fn one() -> usize {
    1
}

/// Why a table was refused.
#[derive(Debug, thiserror::Error)]
pub enum RoundsError {
    #[error("the table of rounds is not valid: {0}")]
    Json(serde_json::Error),
    #[error("the table of rounds has schema {found}, and this program reads schema {SCHEMA}")]
    Schema { found: u32 },
    #[error("the table of rounds has no ranks")]
    NoRanks,
    #[error("the ranks of a table of rounds must start at 1 and increase, and {rank} follows {before}")]
    Order { before: usize, rank: usize },
    #[error("the table of rounds has {found} entries in `{field}` for its {ranks} ranks")]
    Length {
        field: &'static str,
        ranks: usize,
        found: usize,
    },
    #[error("`{field}` of rank {rank} is {value}; {expected}")]
    Number {
        field: &'static str,
        rank: usize,
        value: f64,
        expected: &'static str,
    },
    #[error("the calibration is not finished: run `sflllm calibrate` again with the same options to go on with it")]
    Incomplete,
    #[error(
        "rank {rank} did not reach the target loss in the rounds it was given: calibrate with more rounds or a higher target, or leave \
         the rank out"
    )]
    Unreached { rank: usize },
    #[error("rank {rank} was not calibrated: {ranks} were")]
    NotMeasured { rank: usize, ranks: String },
    #[cfg(not(target_arch = "wasm32"))]
    #[error(transparent)]
    File(#[from] crate::disk::Error),
}

impl From<serde_json::Error> for RoundsError {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(error)
    }
}

/// Rounds until a loss first comes down to `target`, where `losses[n]` is the loss after n rounds. Between the two evaluations
/// around the crossing the loss is taken as a straight line, so the result has a fraction. `None` if it is never reached.
pub(crate) fn rounds_to_reach(losses: &[f64], target: f64) -> Option<f64> {
    let after = losses.iter().position(|&loss| loss <= target)?;
    let Some(before) = after.checked_sub(1) else {
        return Some(0.0);
    };
    let (high, low) = (losses[before], losses[after]);
    Some(before as f64 + (high - target) / (high - low))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn sample_deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

impl RoundsTable {
    /// An empty table for `seeds` runs at each of `ranks`.
    pub fn new(model: &str, ranks: &[usize], seeds: usize, settings: Value) -> Self {
        let each = ranks.len();
        Self {
            schema: SCHEMA,
            model: model.to_owned(),
            complete: false,
            clients: 1,
            local_steps: 1,
            max_rounds: None,
            seeds,
            target_loss: None,
            ranks: ranks.to_vec(),
            rounds: vec![None; each],
            spread: vec![None; each],
            runs: vec![Vec::new(); each],
            losses: vec![Vec::new(); each],
            settings,
        }
    }

    /// Sets the target, and by it everything that follows from the losses.
    pub fn measure(&mut self, target_loss: Option<f64>) {
        self.target_loss = target_loss;
        let runs = |losses: &Vec<Vec<f64>>| match target_loss {
            Some(target) => losses.iter().map(|run| rounds_to_reach(run, target)).collect(),
            None => Vec::new(),
        };
        self.runs = self.losses.iter().map(runs).collect();
        let all_there = |runs: &Vec<Option<f64>>| runs.len() == self.seeds;
        self.complete = self.runs.iter().all(all_there);
        let reached = |runs: &Vec<Option<f64>>| -> Option<Vec<f64>> {
            let rounds: Vec<f64> = runs.iter().copied().collect::<Option<_>>()?;
            (all_there(runs) && !rounds.is_empty()).then_some(rounds)
        };
        let reached: Vec<Option<Vec<f64>>> = self.runs.iter().map(reached).collect();
        self.rounds = reached.iter().map(|runs| runs.as_deref().map(mean)).collect();
        self.spread = reached
            .iter()
            .map(|runs| runs.as_deref().and_then(sample_deviation))
            .collect();
    }

    /// That the table makes sense; it may be unfinished, and hold ranks that did not reach the target.
    ///
    /// # Errors
    /// [`RoundsError`] names the first thing that is wrong.
    pub fn check(&self) -> Result<(), RoundsError> {
        if self.schema != SCHEMA {
            return Err(RoundsError::Schema { found: self.schema });
        }
        if self.ranks.is_empty() {
            return Err(RoundsError::NoRanks);
        }
        let mut before = 0;
        for &rank in &self.ranks {
            if rank <= before {
                return Err(RoundsError::Order { before, rank });
            }
            before = rank;
        }
        let ranks = self.ranks.len();
        for (field, found, optional) in [
            ("rounds", self.rounds.len(), false),
            ("spread", self.spread.len(), true),
            ("runs", self.runs.len(), true),
            ("losses", self.losses.len(), true),
        ] {
            if found != ranks && !(optional && found == 0) {
                return Err(RoundsError::Length { field, ranks, found });
            }
        }
        let number = |field, index: usize, value: f64, expected: &'static str, good: bool| match good {
            true => Ok(()),
            false => Err(RoundsError::Number {
                field,
                rank: self.ranks[index],
                value,
                expected,
            }),
        };
        let above_zero = |field, index, value: f64| {
            let good = value.is_finite() && value > 0.0;
            number(field, index, value, "rounds are finite and above 0", good)
        };
        for (index, rounds) in self.rounds.iter().enumerate() {
            rounds.map_or(Ok(()), |rounds| above_zero("rounds", index, rounds))?;
        }
        for (index, runs) in self.runs.iter().enumerate() {
            runs.iter()
                .flatten()
                .try_for_each(|&rounds| above_zero("runs", index, rounds))?;
        }
        for (index, &spread) in self.spread.iter().enumerate() {
            let spread = spread.unwrap_or(0.0);
            let good = spread.is_finite() && spread >= 0.0;
            number("spread", index, spread, "a deviation is finite and at least 0", good)?;
        }
        for (index, losses) in self.losses.iter().enumerate() {
            for &loss in losses.iter().flatten() {
                number("losses", index, loss, "a loss is finite", loss.is_finite())?;
            }
        }
        Ok(())
    }

    /// Rank and rounds, for every rank.
    ///
    /// # Errors
    /// [`RoundsError::Incomplete`], and [`RoundsError::Unreached`] with the first rank that has no rounds.
    pub fn measured(&self) -> Result<Vec<(usize, f64)>, RoundsError> {
        if !self.complete {
            return Err(RoundsError::Incomplete);
        }
        let pair = |(&rank, &rounds): (&usize, &Option<f64>)| match rounds {
            Some(rounds) => Ok((rank, rounds)),
            None => Err(RoundsError::Unreached { rank }),
        };
        self.ranks.iter().zip(&self.rounds).map(pair).collect()
    }

    /// E(r) of one rank.
    ///
    /// # Errors
    /// As [`RoundsTable::measured`], but only for this rank; [`RoundsError::NotMeasured`].
    pub fn rounds_at(&self, rank: usize) -> Result<f64, RoundsError> {
        let Some(index) = self.ranks.iter().position(|&known| known == rank) else {
            let ranks: Vec<String> = self.ranks.iter().map(usize::to_string).collect();
            return Err(RoundsError::NotMeasured {
                rank,
                ranks: ranks.join(", "),
            });
        };
        match self.rounds.get(index).copied().flatten() {
            Some(rounds) => Ok(rounds),
            None if self.complete => Err(RoundsError::Unreached { rank }),
            None => Err(RoundsError::Incomplete),
        }
    }

    /// Parses and checks a table.
    ///
    /// # Errors
    /// [`RoundsError::Json`]; as [`RoundsTable::check`].
    pub fn from_json(text: &str) -> Result<Self, RoundsError> {
        let table: Self = serde_json::from_str(text.trim_start_matches('\u{feff}'))?;
        table.check()?;
        Ok(table)
    }

    /// The table as text.
    ///
    /// # Errors
    /// [`RoundsError::Json`].
    pub fn to_json(&self) -> Result<String, RoundsError> {
        Ok(serde_json::to_string(self)?)
    }

    /// Reads and checks a table.
    ///
    /// # Errors
    /// [`RoundsError::File`]; as [`RoundsTable::from_json`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(path: &std::path::Path) -> Result<Self, RoundsError> {
        let text = std::fs::read_to_string(path).map_err(|error| crate::disk::Error::file("read", path, error))?;
        Self::from_json(&text)
    }

    /// Writes the table. The file is replaced atomically: a reader sees the old one or the new one.
    ///
    /// # Errors
    /// [`RoundsError::File`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn save(&self, path: &std::path::Path) -> Result<(), RoundsError> {
        let text = self.to_json()? + "\n";
        Ok(crate::disk::replace(path, text.as_bytes())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> RoundsTable {
        let mut table = RoundsTable::new("m", &[1, 4], 2, Value::Null);
        table.losses = vec![
            vec![vec![4.0, 3.0, 2.0], vec![4.0, 2.0]],
            vec![vec![4.0, 1.0], vec![4.0, 2.5, 2.4]],
        ];
        table.measure(Some(2.5));
        table
    }

    #[test]
    fn rounds_are_interpolated_at_the_first_crossing() {
        assert_eq!(rounds_to_reach(&[4.0, 3.0, 2.0, 3.0, 1.0], 2.25), Some(1.75));
        assert_eq!(rounds_to_reach(&[4.0, 3.0], 3.0), Some(1.0));
        assert_eq!(rounds_to_reach(&[4.0, 5.0, 3.5], 3.0), None);
        assert_eq!(rounds_to_reach(&[2.0], 3.0), Some(0.0));
    }

    #[test]
    fn a_rank_has_the_mean_and_sample_deviation_of_its_runs() {
        let table = table();
        assert_eq!(table.runs, [[Some(1.5), Some(0.75)], [Some(0.5), Some(1.0)]]);
        assert_eq!(table.rounds, [Some(1.125), Some(0.75)]);
        let deviation = (2.0 * 0.375_f64.powi(2)).sqrt();
        assert!((table.spread[0].unwrap() - deviation).abs() < 1e-15);
        assert!(table.complete);
        assert_eq!(table.measured().unwrap(), [(1, 1.125), (4, 0.75)]);
        assert_eq!(table.rounds_at(4).unwrap(), 0.75);
        let missing = table.rounds_at(2).unwrap_err().to_string();
        assert_eq!(missing, "rank 2 was not calibrated: 1, 4 were");
    }

    #[test]
    fn unfinished_and_unreached_ranks_are_refused_by_name() {
        let mut table = table();
        table.measure(Some(2.0));
        assert_eq!(table.rounds, [Some(1.5), None]);
        assert!(table.complete);
        assert!(matches!(
            table.measured().unwrap_err(),
            RoundsError::Unreached { rank: 4 }
        ));
        assert_eq!(table.rounds_at(1).unwrap(), 1.5);
        table.losses[1].pop();
        table.measure(Some(2.5));
        assert!(!table.complete);
        assert!(matches!(table.measured().unwrap_err(), RoundsError::Incomplete));
        table.measure(None);
        assert_eq!(table.rounds, [None, None]);
        assert!(!table.complete);
    }

    #[test]
    fn a_table_survives_its_file_and_needs_ranks_and_rounds_alone() {
        let table = table();
        assert_eq!(RoundsTable::from_json(&table.to_json().unwrap()).unwrap(), table);
        let short = RoundsTable::from_json(r#"{"schema":1,"ranks":[1,2],"rounds":[30,20.5]}"#).unwrap();
        assert_eq!(short.measured().unwrap(), [(1, 30.0), (2, 20.5)]);
    }

    #[test]
    fn what_is_wrong_with_a_table_is_named() {
        for (text, said) in [
            ("[", "not valid"),
            (r#"{"schema":2,"ranks":[1],"rounds":[3]}"#, "schema 2"),
            (r#"{"schema":1,"ranks":[],"rounds":[]}"#, "no ranks"),
            (r#"{"schema":1,"ranks":[0,1],"rounds":[3,3]}"#, "0 follows 0"),
            (r#"{"schema":1,"ranks":[4,4],"rounds":[3,3]}"#, "4 follows 4"),
            (
                r#"{"schema":1,"ranks":[1,2],"rounds":[3]}"#,
                "1 entries in `rounds` for its 2 ranks",
            ),
            (
                r#"{"schema":1,"ranks":[1],"rounds":[3],"runs":[[3],[4]]}"#,
                "2 entries in `runs`",
            ),
            (
                r#"{"schema":1,"ranks":[1,8],"rounds":[3,0]}"#,
                "`rounds` of rank 8 is 0",
            ),
            (
                r#"{"schema":1,"ranks":[1],"rounds":[-2.5]}"#,
                "`rounds` of rank 1 is -2.5",
            ),
            (
                r#"{"schema":1,"ranks":[1],"rounds":[2],"spread":[-1]}"#,
                "`spread` of rank 1 is -1",
            ),
            (r#"{"schema":1,"ranks":[1],"rounds":[1e999]}"#, "not valid"),
        ] {
            let error = RoundsTable::from_json(text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
