//! What the main server keeps, and its death and return.
//!
//! Separate because the disk is all that outlives the process: what is not in [`Disk`] is lost.

use std::time::Duration;

use super::super::network::{End, SocketId};
use super::super::outcome::Phase;
use super::super::toy::Trained;
use super::{Node, Own, World, control, federated_server, main_config};
use crate::protocol::{Checkpoint, MainServerSession, Placement, RunState};
use crate::terms::moments::Moments;

/// What has been written, and how often something was.
#[derive(Default)]
pub(super) struct Disk {
    checkpoint: Option<Kept>,
    members: Option<(u64, Vec<u8>)>,
    writes: u32,
}

/// The beginning of a round, and what the toy counts beside it.
struct Kept {
    checkpoint: Vec<u8>,
    server: f64,
    steps: u64,
}

impl World {
    /// A piece of work of this process of the main server, which nothing comes of if the process dies before.
    pub(super) fn schedule_of_server(&mut self, at: Duration, own: Own) {
        let own = Box::new(own);
        let process = self.process;
        self.network.schedule(at, Own::OfServer { process, own });
    }

    pub(super) fn keep_round(&mut self, round: u32, placement: Placement) {
        let Trained { values, first, second } = self.blocks.clone();
        let checkpoint = Checkpoint {
            round,
            placement,
            adapter: values,
            moments: Moments {
                steps: self.outcome.steps,
                first,
                second,
            },
            exact: self.exact.clone(),
        };
        self.disk.checkpoint = Some(Kept {
            checkpoint: checkpoint.encode(),
            server: self.server,
            steps: self.outcome.steps,
        });
        self.written();
    }

    /// Keeps who is in the run, if that has changed.
    pub(super) fn keep_members(&mut self) {
        let revision = self.main.revision();
        if self.disk.members.as_ref().is_none_or(|(kept, _)| *kept != revision) {
            self.disk.members = Some((revision, self.main.state().encode()));
            self.written();
        }
    }

    /// Has the members kept again, changed or not.
    pub(super) fn forget_members(&mut self) {
        if let Some((revision, _)) = &mut self.disk.members {
            *revision = u64::MAX;
        }
    }

    fn written(&mut self) {
        self.disk.writes += 1;
        let fatal = self
            .scenario
            .kept_and_killed
            .iter()
            .find(|(write, _)| *write == self.disk.writes);
        if let Some((_, length)) = fatal {
            self.kill_server(*length);
        }
    }

    /// The process dies, and is started again after so long.
    pub(super) fn kill_server(&mut self, length: Duration) {
        if self.is_down || self.outcome.drained {
            return;
        }
        self.is_down = true;
        self.process += 1;
        self.outcome.history.push((self.network.now, Phase::Killed));
        for (number, route) in self.routes.iter().enumerate() {
            let (socket, is_both) = (SocketId(number), !self.scenario.remote_control);
            match (route.from, route.to) {
                (_, Node::Main) => self.network.close(socket, End::Listener),
                (Node::Client(_), Node::Federated) if is_both => self.network.close(socket, End::Listener),
                (Node::Control, _) => self.network.close(socket, End::Dialler),
                _ => {}
            }
        }
        self.control_socket = None;
        self.timers[0] = None;
        self.timers[2] = None;
        if self.scenario.remote_control {
            self.control = None;
        } else {
            self.federated = federated_server(&self.scenario);
        }
        self.network.schedule(self.network.now + length, Own::Revive);
    }

    pub(super) fn revive(&mut self) {
        let (Some(kept), Some((_, members))) = (&self.disk.checkpoint, &self.disk.members) else {
            return self.violation("a server was started again of which nothing is kept".to_owned());
        };
        let checkpoint = Checkpoint::decode(&kept.checkpoint).expect("what was kept is read");
        let state = RunState::decode(members).expect("what was kept is read");
        let Checkpoint {
            round,
            placement,
            adapter,
            moments,
            exact,
        } = checkpoint;
        (self.server, self.outcome.steps) = (kept.server, kept.steps);
        self.blocks = Trained {
            values: adapter,
            first: moments.first,
            second: moments.second,
        };
        self.before = (self.blocks.clone(), self.server);
        self.average.clone_from(&placement.adapter);
        (self.split, self.cuts) = (placement.split(), placement.cuts.clone());
        self.outcome.rounds.retain(|record| record.round.round < round);
        let last = self.outcome.rounds.last();
        if last.is_some_and(|last| last.exact != exact) {
            self.violation(format!(
                "what was kept before round {round} has other products than that round"
            ));
        }
        self.exact = exact;
        self.outcome.end = None;
        self.present.clear();
        self.departed.clear();
        self.members.clear();
        self.step = None;
        self.lanes.clear();
        self.busy_until = self.network.now;
        let now = self.now(Node::Main);
        let config = main_config(&self.scenario, placement);
        match MainServerSession::resume(config, &state, round, now) {
            Ok(session) => self.main = session,
            Err(error) => self.violation(error.to_string()),
        }
        self.control = control(&self.scenario, self.now(Node::Control));
        self.is_down = false;
        self.outcome.history.push((self.network.now, Phase::Revived));
    }
}
