//! The run as `/status` says it.
//!
//! Separate because nothing in a run depends on it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::socket::UNASSIGNED_FRAME_BYTES;
use super::Coordinator;
use super::main_run::MainRun;
use super::report::Summary;
use crate::protocol::{MAX_FRAME_BYTES, RunPhase};

/// `/status` is this old at most, however much happens.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

impl Coordinator {
    /// When `/status` is to be brought up to date, if it is not.
    pub(super) fn status_due(&self) -> Option<Duration> {
        self.status_due.filter(|_| self.is_status_stale)
    }

    /// Brings `/status` and the sockets' limit up to date.
    pub(super) fn publish(&mut self) {
        let (main, federated) = (&self.parts.main, &self.parts.federated);
        let limit = main
            .as_ref()
            .map_or(0, |main| main.session.max_frame_bytes())
            .max(match federated {
                Some(federated) => match federated.max_frame_bytes() {
                    MAX_FRAME_BYTES => 0,
                    bytes => bytes,
                },
                None => 0,
            });
        self.parts
            .max_frame_bytes
            .store(limit.max(UNASSIGNED_FRAME_BYTES), Ordering::Relaxed);

        // Its size grows with the clients, and so does the number of happenings.
        let now = self.now();
        if self.status_due.is_some_and(|due| now < due) {
            self.is_status_stale = true;
            return;
        }
        self.status_due = Some(now + STATUS_INTERVAL);
        self.is_status_stale = false;
        let status = match &self.parts.main {
            Some(main) => main_status(main, &self.summary),
            None => json!({ "role": "federated", "rounds_averaged": self.summary.rounds }),
        };
        self.parts.status.send_if_modified(|current| {
            let changed = *current != status;
            if changed {
                *current = status;
            }
            changed
        });
    }
}

fn main_status(main: &MainRun, summary: &Summary) -> Value {
    let status = main.session.status();
    let state = match status.phase {
        RunPhase::Waiting => "waiting",
        RunPhase::Gathering => "gathering",
        RunPhase::Computing => "computing",
        RunPhase::Boundary => "planning",
        RunPhase::Averaging => "averaging",
        RunPhase::Validating => "validating",
        RunPhase::Finished => "finished",
    };
    let clients: Vec<Value> = status
        .clients
        .iter()
        .map(|client| {
            json!({
                "client": client.client.0, "name": client.name, "device": client.device,
                "ready": client.ready, "member": client.member, "awaited": client.awaited,
            })
        })
        .collect();
    json!({
        "role": "main",
        "model": main.about.model,
        "cut": main.cut,
        "rank": main.rank,
        "state": state,
        "round": status.round + 1,
        "rounds": status.rounds,
        "step": status.round * status.local_steps + status.step,
        "steps": status.rounds * status.local_steps,
        "clients": clients,
        "valid_perplexity": summary.last.map(|evaluation| evaluation.perplexity),
    })
}
