//! What is to hold next: the questions to the driver, and another placement in force.
//!
//! Separate because planning goes on beside the round: a question may outlive the boundary at which it was asked.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::super::message::{LinkRates, Message};
use super::MainServerSession;
use super::config::MainError;
use super::event::{MainEvent, Occasion, RoundPlan};
use super::placement::Placement;
use super::round::Phase;
use crate::terms::ids::ClientId;

/// What the driver was asked, one thing at a time, and what it has said.
pub(super) struct Planning {
    /// Whether it is asked at all.
    asks: bool,
    /// Clients that the latest plan is for, and what the next is being made for.
    planned: BTreeSet<ClientId>,
    /// What it has not answered.
    question: Option<Occasion>,
    rates: BTreeMap<ClientId, LinkRates>,
}

impl Planning {
    pub fn new(asks: bool) -> Planning {
        Planning {
            asks,
            planned: BTreeSet::new(),
            question: None,
            rates: BTreeMap::new(),
        }
    }

    /// Whether the driver is asked at boundaries.
    pub fn asks(&self) -> bool {
        self.asks
    }

    /// Whether a question is open.
    pub(crate) fn is_open(&self) -> bool {
        self.question.is_some()
    }

    /// Whether there is somebody whom the latest plan does not know.
    pub fn lacks(&self, ready: &BTreeSet<ClientId>) -> bool {
        self.asks && !ready.is_subset(&self.planned)
    }

    /// Whether no plan has known anybody.
    pub(crate) fn is_first(&self) -> bool {
        self.planned.is_empty()
    }

    /// The client's emulated uplinks.
    pub(crate) fn rates_of(&self, client: ClientId) -> Option<LinkRates> {
        self.rates.get(&client).copied()
    }
}

impl MainServerSession {
    /// Before anything is trained, changes who holds what: to be called before the answer to `PlanWanted` of
    /// `Occasion::Start`.
    ///
    /// # Errors
    /// When the placement contradicts itself or the run, or something is trained already; nothing is changed then.
    pub fn place(&mut self, now: Duration, placement: Placement) -> Result<(), MainError> {
        if self.has_started {
            return Err(MainError::Fixed);
        }
        self.config.check(&placement)?;
        self.adopt(placement);
        self.keep(self.round.round);
        self.phase = Phase::Waiting {
            until: Some(now + self.config.wait_for_client),
        };
        Ok(())
    }

    /// The driver's answer to `PlanWanted`; `None` leaves everything as it is.
    ///
    /// # Errors
    /// When the plan moves the cut where it cannot be moved; the question stands.
    pub fn planned(&mut self, now: Duration, plan: Option<RoundPlan>) -> Result<(), MainError> {
        let Some(occasion) = self.planning.question else {
            return Ok(());
        };
        let current = self.placement.split();
        let split = plan.as_ref().and_then(|plan| plan.split).unwrap_or(current);
        let movable = matches!(occasion, Occasion::Boundary(_))
            && self.placement.copy_len() == 0
            && self.placement.ranks.is_empty();
        let moved = split.abs_diff(current);
        let largest = u64::from(split.max(current)) + 2 * u64::from(moved);
        if split == 0 || moved != 0 && (!movable || largest * self.placement.block_len() > self.config.largest_update) {
            return Err(MainError::Split {
                found: split,
                expected: current,
            });
        }
        self.planning.question = None;
        if let Some(plan) = plan {
            self.planning.rates = plan.rates;
        }
        // A round may have been lost meanwhile, and with it the boundary.
        if let (Occasion::Boundary(round), Phase::Boundary { members, .. }) = (occasion, &self.phase)
            && round == self.round
        {
            let members = members.clone();
            self.ask_for_adapters(members, split, now);
        }
        self.retest(now);
        Ok(())
    }

    /// Asks the driver what is to hold next. It is asked one thing at a time.
    pub(super) fn want_plan(&mut self, occasion: Occasion) {
        self.planning.question = Some(occasion);
        self.planning.planned = self.roster.ready();
        self.events.push_back(MainEvent::PlanWanted { occasion });
    }

    /// Makes a checked placement the current one and hands it to everybody.
    pub(super) fn adopt(&mut self, placement: Placement) {
        self.placement.replace(placement);
        self.roster.reassign();
        for (id, _) in self.roster.connected() {
            if let Some(connection) = self.roster.connection(id) {
                let assignment = self.placement.assignment_of(id);
                self.door.send(connection, &Message::Assignment(Box::new(assignment)));
            }
        }
    }
}
