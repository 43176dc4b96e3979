//! What the sessions say: work for the compute thread, and lines for the log and for people.
//!
//! Separate from the task itself, which only has to know when there is something to hear.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::Error;
use super::super::inbox::Work;
use super::super::metrics::{Completeness, RoundRecord, ServerPhase, StepRecord};
use super::main_run::Keeping;
use super::measure::phases;
use super::report::Report;
use super::{Connection, Coordinator, DRAIN_LIMIT};
use crate::protocol::message::RefusalReason;
use crate::protocol::{ConnectionId, FederatedEvent, LeftOut, MainEvent};

impl Coordinator {
    pub(super) fn main_event(&mut self, event: MainEvent) -> Result<(), Error> {
        if let MainEvent::ClientJoined { connection, .. } = event {
            self.admitted(connection);
        }
        let at = self.parts.clock.now().as_secs_f64();
        let address = |connections: &HashMap<ConnectionId, Connection>, connection: &ConnectionId| {
            connections
                .get(connection)
                .map(|connection| connection.address.to_string())
        };
        let Some(main) = &mut self.parts.main else {
            return Ok(());
        };
        let (metrics, report) = (&mut self.parts.metrics, &self.parts.report);
        match event {
            MainEvent::ClientRefused { connection, reason } => self.refused(connection, reason),
            MainEvent::ClientJoined {
                connection,
                client,
                name,
                device,
            } => {
                let address = address(&self.connections, &connection);
                main.names.insert(client.0, name.clone());
                let fields = json!({ "client": client.0, "name": name, "device": device, "address": address });
                metrics.event(at, "joined", fields);
                report(Report::Joined {
                    client: client.0,
                    name,
                    device,
                });
            }
            MainEvent::ClientReady { client } => metrics.event(at, "ready", json!({ "client": client.0 })),
            MainEvent::ClientLeft { client, name, reason } => {
                let reason = reason.to_string();
                metrics.event(
                    at,
                    "left",
                    json!({ "client": client.0, "name": name, "reason": reason }),
                );
                report(Report::Left {
                    client: client.0,
                    name,
                    reason,
                });
            }
            MainEvent::Keep { round, placement } => self.keep_round(round, *placement),
            MainEvent::RoundStarted { round, members } => {
                if let Keeping::Kept(kept) = &mut main.keeping {
                    kept.forget();
                }
                (main.round_started, main.step_started) = (Instant::now(), Instant::now());
                main.planning = Duration::ZERO;
                main.prediction.clone_from(&main.next_prediction);
                main.measured.begin(round.round + 1);
                let clients: Vec<u64> = members.iter().map(|client| client.0).collect();
                let fields = json!({ "round": round.round + 1, "attempt": round.attempt, "clients": clients });
                metrics.event(at, "round_started", fields);
                report(Report::RoundStarted {
                    round: round.round + 1,
                    members: members.len(),
                });
            }
            MainEvent::Contribution { key, contribution } => {
                main.step_gathered = Instant::now();
                main.compute(Work::Contribute { key, contribution })?;
            }
            MainEvent::CloseStep { key, lanes, left_out } => {
                let bytes = std::mem::take(&mut main.step_bytes);
                let record = StepRecord {
                    round: key.round.round + 1,
                    step: key.round.round * main.about.local_steps + key.step + 1,
                    loss: 0.0,
                    tokens: 0,
                    clients: lanes.len(),
                    result: Completeness::without(left_out.len()),
                    excluded: left_out.iter().map(|left_out| main.excluded(left_out)).collect(),
                    seconds: 0.0,
                    wait_seconds: main
                        .step_gathered
                        .saturating_duration_since(main.step_started)
                        .as_secs_f64(),
                    compute_seconds: 0.0,
                    bytes_up: bytes.up,
                    bytes_down: bytes.down,
                    phases: Vec::new(),
                };
                main.closing_step = Some((key, record));
                main.compute(Work::CloseStep { key, lanes })?;
            }
            MainEvent::StepMeasured { key, clients } => {
                for times in &clients {
                    main.measured.add(times);
                }
                let phases = clients.iter().map(phases).collect();
                match main.pending_step.take_if(|(pending, _)| *pending == key) {
                    Some((_, record)) => metrics.step(&StepRecord { phases, ..record }),
                    None => main.step_phases = Some((key, phases)),
                }
            }
            MainEvent::PlanWanted { occasion } => {
                main.planning_since = Some((occasion, Instant::now()));
                let facts = main.facts(occasion);
                main.compute(Work::Plan(Box::new(facts)))?;
            }
            MainEvent::RoundClosed {
                round,
                average,
                moments,
                exact,
                errors,
                split,
                included,
                excluded,
                collected,
            } => {
                let measured_s = main.round_started.elapsed().saturating_sub(main.planning);
                let prediction = main.prediction.as_ref();
                let phases = main.measured.phases(&collected, prediction);
                let server = ServerPhase {
                    predicted_s: prediction.map(|prediction| prediction.server_s),
                    measured_s: main.measured.server_s(),
                };
                let adapter_bytes = collected.iter().map(|time| time.bytes).sum();
                main.measured.collected = collected;
                main.pending_round = Some(RoundRecord {
                    round: round.round + 1,
                    adapters: included.len(),
                    result: Completeness::without(excluded.len()),
                    excluded: excluded
                        .iter()
                        .map(|exclusion| {
                            main.excluded(&LeftOut {
                                client: exclusion.client,
                                reason: exclusion.reason.to_string(),
                            })
                        })
                        .collect(),
                    predicted_s: prediction.map(|prediction| prediction.total_s),
                    measured_s: measured_s.as_secs_f64(),
                    phases,
                    server,
                    aggregation: Some(main.about.aggregation),
                    averaging_error: errors.map(|errors| errors.averaging),
                    start_error: errors.map(|errors| errors.start),
                    adapter_bytes,
                    ..RoundRecord::default()
                });
                main.compute(Work::Close {
                    round,
                    average,
                    exact,
                    moments,
                    split: split as usize,
                })?;
            }
            MainEvent::RoundLost { round } => {
                metrics.event(
                    at,
                    "round_lost",
                    json!({ "round": round.round + 1, "attempt": round.attempt }),
                );
                report(Report::RoundLost { round: round.round + 1 });
                main.compute(Work::Restore)?;
            }
            MainEvent::RoundRejected { round, reason } => {
                metrics.event(
                    at,
                    "round_rejected",
                    json!({ "round": round.round + 1, "attempt": round.attempt, "reason": reason }),
                );
                report(Report::RoundRejected {
                    round: round.round + 1,
                    reason,
                });
                main.compute(Work::Restore)?;
            }
            MainEvent::CopyWanted { round } => main.compute(Work::Copy { round })?,
            MainEvent::Waiting { until } => {
                let limit = until.saturating_sub(self.parts.clock.now());
                metrics.event(at, "waiting", json!({ "seconds": limit.as_secs_f64() }));
                report(Report::Waiting { limit });
            }
            MainEvent::Finished { reason } => {
                if let Some((_, record)) = main.pending_step.take() {
                    metrics.step(&record);
                }
                main.outcome = Some(reason);
                self.end_by.get_or_insert(Instant::now() + DRAIN_LIMIT);
                // A thread that has failed has said so already; there is nothing more it could save.
                if self.failure.is_none() {
                    main.compute(Work::Finish)?;
                }
            }
            MainEvent::Drained => main.drained = true,
        }
        Ok(())
    }

    pub(super) fn federated_event(&mut self, event: FederatedEvent) {
        if let FederatedEvent::ClientJoined { connection, .. } | FederatedEvent::ControlConnected { connection } = event
        {
            self.admitted(connection);
        }
        let at = self.parts.clock.now().as_secs_f64();
        // In one process the main server's side tells the same.
        let alone = self.parts.main.is_none();
        let (metrics, report) = (&mut self.parts.metrics, &self.parts.report);
        match event {
            FederatedEvent::ClientRefused { connection, reason } => self.refused(connection, reason),
            FederatedEvent::ClientJoined { client, name, .. } if alone => {
                metrics.event(at, "joined", json!({ "client": client.0, "name": name }));
                report(Report::Joined {
                    client: client.0,
                    name,
                    device: String::new(),
                });
            }
            FederatedEvent::ClientLeft { client, reason } if alone => {
                let reason = reason.to_string();
                metrics.event(at, "left", json!({ "client": client.0, "reason": reason }));
                report(Report::Left {
                    client: client.0,
                    name: String::new(),
                    reason,
                });
            }
            FederatedEvent::ControlConnected { connection } => {
                let address = self
                    .connections
                    .get(&connection)
                    .map(|connection| connection.address.to_string());
                metrics.event(at, "main_server_connected", json!({ "address": address }));
                report(Report::Link {
                    connected: true,
                    detail: address.unwrap_or_default(),
                });
            }
            // After the end of the run it is expected.
            FederatedEvent::ControlLost if self.run_closed => {}
            FederatedEvent::ControlLost => {
                metrics.event(at, "main_server_lost", json!({}));
                report(Report::Link {
                    connected: false,
                    detail: "the main server's connection is lost".to_owned(),
                });
            }
            FederatedEvent::UpdateAccepted {
                client,
                round,
                examples,
            } => {
                let fields = json!({ "client": client.0, "round": round.round + 1, "examples": examples });
                metrics.event(at, "update", fields);
            }
            FederatedEvent::ClientExcluded { client, round, reason } => {
                let fields = json!({ "client": client.0, "round": round.round + 1, "reason": reason.to_string() });
                metrics.event(at, "excluded", fields);
            }
            FederatedEvent::RoundClosed { round, included, .. } if alone => {
                self.summary.rounds = self.summary.rounds.max(round.round + 1);
                let fields = json!({ "round": round.round + 1, "adapters": included.len() });
                metrics.event(at, "averaged", fields);
                report(Report::Averaged {
                    round: round.round + 1,
                    adapters: included.len(),
                });
            }
            FederatedEvent::RunClosed => {
                self.run_closed = true;
                if alone {
                    self.end_by.get_or_insert(Instant::now() + DRAIN_LIMIT);
                }
            }
            FederatedEvent::ClientJoined { .. }
            | FederatedEvent::ClientLeft { .. }
            | FederatedEvent::RoundClosed { .. } => {}
        }
    }

    fn refused(&mut self, id: ConnectionId, reason: RefusalReason) {
        let now = self.now();
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let address = connection.address;
        if std::mem::take(&mut connection.guesses) && reason != RefusalReason::SecretWrong {
            let mut guesses = self.parts.guesses.lock().unwrap_or_else(PoisonError::into_inner);
            guesses.pay_back(address);
        }
        // Noise of the network is nothing that anybody would do something about.
        let plain = !matches!(reason, RefusalReason::NotThisProtocol | RefusalReason::Malformed);
        let reason = reason.to_string();
        if self.refusals.note(now, &reason, plain) {
            let fields = json!({ "address": address.to_string(), "reason": reason });
            self.parts.metrics.event(now.as_secs_f64(), "refused", fields);
            (self.parts.report)(Report::Refused { address, reason });
        }
    }

    /// Tells of refusals that were only counted, once it is time, or `at_once`.
    pub(super) fn tell_refusals(&mut self, at_once: bool) {
        let now = self.now();
        let turned_away = self.parts.gate.take_turned_away();
        if turned_away > 0 {
            self.refusals.count(now, "too many connections at once", turned_away);
        }
        let reasons = self.refusals.take(now, at_once);
        if !reasons.is_empty() {
            let count = reasons.values().sum();
            let fields = json!({ "count": count, "reasons": reasons });
            self.parts.metrics.event(now.as_secs_f64(), "refused", fields);
            (self.parts.report)(Report::RefusedMore { count, reasons });
        }
    }
}
