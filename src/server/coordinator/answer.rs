//! What the compute thread has done, handed to the session and written down.
//!
//! Separate from `event`, its opposite: there the session asks, here it is answered.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::Error;
use super::super::inbox::Done;
use super::super::metrics::{RoundRecord, StepRecord};
use super::super::planner::Decision;
use super::Coordinator;
use super::main_run::About;
use super::report::Report;
use crate::protocol::message::RunConfig;
use crate::protocol::{Occasion, Placement, RoundPlan};
use crate::split::Evaluation;

impl Coordinator {
    pub(super) fn computed(&mut self, done: Done) -> Result<(), Error> {
        let now = self.now();
        let Some(main) = &mut self.parts.main else {
            return Ok(());
        };
        match done {
            Done::Ready => {}
            Done::Baseline(evaluation) => {
                if let Some(evaluation) = evaluation {
                    self.summary.baseline = Some(evaluation);
                    self.summary.last = Some(evaluation);
                    (self.parts.report)(Report::Baseline(evaluation));
                    self.parts
                        .metrics
                        .round(&validated(RoundRecord::default(), Some(evaluation)));
                }
            }
            Done::Contributed { key, client, output } => {
                let output = match output {
                    Ok(output) => Some(output),
                    Err(error) => {
                        let fields = json!({
                            "client": client.0, "name": main.names.get(&client.0), "reason": error.to_string(),
                        });
                        self.parts.metrics.event(now.as_secs_f64(), "unusable", fields);
                        None
                    }
                };
                main.session.contributed(now, key, client, output)?;
            }
            Done::StepClosed {
                key,
                loss,
                tokens,
                elapsed,
            } => {
                let Some((_, record)) = main.closing_step.take_if(|(closing, _)| *closing == key) else {
                    return Ok(());
                };
                let mut record = StepRecord {
                    loss,
                    tokens,
                    seconds: main.step_started.elapsed().as_secs_f64(),
                    compute_seconds: elapsed.as_secs_f64(),
                    ..record
                };
                main.step_started = Instant::now();
                main.measured.steps += 1;
                main.measured.server += elapsed;
                self.summary.steps += 1;
                self.summary.tokens += tokens;
                // The one before may belong to a round that was lost.
                if let Some((_, record)) = main.pending_step.take() {
                    self.parts.metrics.step(&record);
                }
                match main.step_phases.take_if(|(measured, _)| *measured == key) {
                    Some((_, phases)) => {
                        record.phases = phases;
                        self.parts.metrics.step(&record);
                    }
                    None => main.pending_step = Some((key, record.clone())),
                }
                (self.parts.report)(Report::Step(record));
            }
            Done::Planned {
                decision,
                placement,
                side,
            } => {
                main.side = side;
                self.planned(now, decision, placement.map(|placement| *placement))?
            }
            Done::Copied { round, values } => main.session.copy(now, round, values)?,
            Done::Closed {
                round,
                evaluation,
                placement,
                side,
                saved,
            } => {
                main.side = side;
                self.unwritten.note("the adapter", saved, &self.parts.report);
                if let Some(placement) = &placement {
                    main.cut = placement.split() as usize;
                }
                let loss = evaluation.map(|evaluation| evaluation.loss);
                main.session
                    .validated(now, round, loss, placement.map(|placement| *placement))?;
                if loss.is_some_and(|loss| !loss.is_finite()) {
                    // The round is not closed: it is begun again.
                    main.pending_round = None;
                    return Ok(());
                }
                self.summary.rounds = round.round + 1;
                self.summary.last = evaluation.or(self.summary.last);
                if let Some(record) = main.pending_round.take() {
                    let record = validated(record, evaluation);
                    self.parts.metrics.round(&record);
                    (self.parts.report)(Report::Round(record));
                }
            }
            Done::Finished => main.saved = true,
            Done::Failed(error) => return Err(error),
        }
        Ok(())
    }

    /// Acts on a planner's decision.
    fn planned(
        &mut self,
        now: Duration,
        decision: Option<Decision>,
        placement: Option<Placement>,
    ) -> Result<(), Error> {
        let at = now.as_secs_f64();
        let Some(main) = &mut self.parts.main else {
            return Ok(());
        };
        let mut round = main.session.status().round + 1;
        if let Some((occasion, since)) = main.planning_since.take() {
            main.planning += since.elapsed();
            round += u32::from(matches!(occasion, Occasion::Boundary(_)));
        }
        if let Some(placement) = placement {
            let RunConfig { rank, alpha, .. } = placement.assignment.config;
            let split = placement.split();
            (main.cut, main.rank) = (split as usize, rank as usize);
            main.cuts = (placement.cuts.iter())
                .map(|(client, cut)| (*client, *cut as usize))
                .collect();
            let cuts: Vec<Value> = (placement.cuts.iter())
                .map(|(client, cut)| json!({ "client": client.0, "split": cut }))
                .collect();
            main.session.place(now, placement)?;
            let About {
                rounds, local_steps, ..
            } = main.about;
            let plan = json!({
                "split": split, "splits": cuts, "rank": rank, "alpha": alpha, "rounds": rounds, "local_steps": local_steps,
            });
            let written = self.parts.directory.note(json!({ "plan": plan }));
            self.unwritten.note("run.json", written, &self.parts.report);
        }
        let plan = decision.as_ref().map(|decision| RoundPlan {
            split: Some(u32::try_from(decision.cut).unwrap_or(u32::MAX)),
            rates: decision.rates.clone(),
        });
        main.session.planned(now, plan)?;
        let Some(Decision {
            cut,
            rank,
            rates,
            prediction,
            reason,
            ..
        }) = decision
        else {
            return Ok(());
        };
        let rates: Vec<Value> = rates
            .iter()
            .map(|(client, rates)| {
                json!({
                    "client": client.0,
                    "main_bits_per_s": rates.main_bits_per_s,
                    "federated_bits_per_s": rates.federated_bits_per_s,
                })
            })
            .collect();
        // Those that hold: a later decision does not repeat them.
        let cuts: BTreeMap<u64, usize> = main.cuts.iter().map(|(client, cut)| (client.0, *cut)).collect();
        let own_cuts: Vec<Value> = (cuts.iter())
            .map(|(client, cut)| json!({ "client": client, "cut": cut }))
            .collect();
        let predicted_s = prediction.as_ref().map(|prediction| prediction.total_s);
        let fields = json!({
            "round": round, "cut": cut, "cuts": own_cuts, "rank": rank, "reason": reason, "rates": rates,
            "predicted_s": predicted_s,
        });
        self.parts.metrics.event(at, "plan", fields);
        (self.parts.report)(Report::Planned {
            round,
            cut,
            cuts,
            rank,
            reason,
        });
        main.next_prediction = prediction;
        Ok(())
    }
}

fn validated(record: RoundRecord, evaluation: Option<Evaluation>) -> RoundRecord {
    RoundRecord {
        valid_loss: evaluation.map(|evaluation| evaluation.loss),
        valid_perplexity: evaluation.map(|evaluation| evaluation.perplexity),
        valid_tokens: evaluation.map(|evaluation| evaluation.tokens),
        ..record
    }
}
