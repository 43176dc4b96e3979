//! What is written down before it is acted on.
//!
//! Separate because of its place in time: after the sessions have said what happened, and before anything they want sent is sent. Writing is waited for here;
//! it takes milliseconds, once a round and where a client is shut out.

use serde_json::json;

use super::super::Error;
use super::super::kept::Kept;
use super::main_run::Keeping;
use super::report::Report;
use super::{Coordinator, Totals};
use crate::protocol::{Checkpoint, Placement};

impl Coordinator {
    /// From here on the directory holds a run, which can be gone on with.
    pub fn begin(&mut self) -> Result<(), Error> {
        match &self.parts.main {
            Some(main) if matches!(main.keeping, Keeping::Kept(_)) => {
                self.parts.directory.go_on(Some(main.session.status().round.into()))?
            }
            _ => self.parts.directory.begin()?,
        }
        self.parts.metrics.open();
        let Some(main) = &mut self.parts.main else {
            return Ok(());
        };
        match &main.keeping {
            Keeping::Begins(identity) => {
                main.keeping = Keeping::Kept(Kept::create(&self.parts.directory, identity)?);
                let (round, placement) = (0, main.session.placement().clone());
                self.keep_round(round, placement);
            }
            Keeping::Kept(_) => {
                let status = main.session.status();
                let awaited = main.session.awaited_back().len();
                let fields = json!({ "round": status.round + 1, "awaited": awaited });
                self.parts
                    .metrics
                    .event(self.parts.clock.now().as_secs_f64(), "resumed", fields);
                (self.parts.report)(Report::Resumed {
                    round: status.round + 1,
                    awaited,
                });
            }
        }
        self.keep_members();
        Ok(())
    }

    /// Goes on with a run from what it had come to.
    pub fn resume(&mut self, totals: &Totals, damage: &[String]) {
        self.take_totals(totals);
        for detail in damage {
            let detail = detail.clone();
            (self.parts.report)(Report::Trouble { detail });
        }
    }

    /// Keeps what a round begins from.
    pub(super) fn keep_round(&mut self, round: u32, placement: Placement) {
        let totals = self.totals();
        let Some(main) = &mut self.parts.main else { return };
        let Keeping::Kept(kept) = &mut main.keeping else { return };
        let checkpoint = Checkpoint {
            round,
            placement,
            adapter: main.side.values.clone(),
            moments: main.side.moments.clone(),
            exact: main.side.exact.clone(),
        };
        let written = kept.round(&checkpoint, &totals);
        self.unwritten.note("its state", written, &self.parts.report);
    }

    /// Keeps who is in the run, if that has changed.
    pub(super) fn keep_members(&mut self) {
        let Some(main) = &mut self.parts.main else { return };
        let Keeping::Kept(kept) = &mut main.keeping else { return };
        let revision = main.session.revision();
        if kept.lacks(revision) {
            let written = kept.members(revision, &main.session.state());
            self.unwritten
                .note("what is known of the clients", written, &self.parts.report);
        }
    }
}
