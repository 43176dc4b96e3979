//! What the toy clients compute, and their answers to their sessions.
//!
//! Separate because it is one of three drivers of a client's session, beside the native and the browser one.

use std::time::Duration;

use super::super::toy::{BATCH, NUMBERS, SEQ, VOCAB, from_tensor, to_tensor};
use super::{Node, Own, Route, World};
use crate::protocol::{ActivationsInput, AdapterInput, ClientEvent, ClientSession, Endpoint};
use crate::terms::ids::{RoundKey, StepKey};
use crate::terms::moments::Moments;
use crate::terms::tensor::{IGNORED_TARGET, WireTensor};

impl World {
    pub(super) fn process(&mut self, client: usize, process: u32) -> Option<&mut ClientSession> {
        let toy = &mut self.toys[client];
        if toy.process == process {
            toy.session.as_mut()
        } else {
            None
        }
    }

    pub(super) fn forward(&mut self, client: usize, process: u32, key: StepKey, took: Duration) {
        let now = self.now(Node::Client(client));
        let toy = &mut self.toys[client];
        if toy.process != process || toy.session.is_none() {
            return;
        }
        toy.cursor += 1;
        toy.outcome.forwards += 1;
        let datum = ((client as u64 + 1) * 31 + toy.cursor * 7) % 11;
        let mut activations = vec![0.05 * datum as f32; NUMBERS];
        toy.trained.run(0, &mut activations);
        // Every third batch of the second client has no target in the loss.
        let ignored = client == 1 && toy.cursor.is_multiple_of(3);
        let target = |row: u32| {
            let known = !ignored && !(u64::from(row) + toy.cursor + client as u64).is_multiple_of(4);
            if known { (row % VOCAB) as i32 } else { IGNORED_TARGET }
        };
        let examples = 1 + (client as u32 + toy.cursor as u32) % BATCH;
        toy.examples += u64::from(examples);
        let input = ActivationsInput {
            key,
            examples,
            forward: took,
            targets: (0..BATCH * SEQ).map(target).collect(),
            tensor: to_tensor(&activations),
        };
        let result = toy.session.as_mut().map(|session| session.activations(now, input));
        if let Some(Err(error)) = result {
            self.violation(error.to_string());
        }
    }

    pub(super) fn backward(
        &mut self,
        client: usize,
        process: u32,
        key: StepKey,
        took: Duration,
        gradient: &WireTensor,
    ) {
        let now = self.now(Node::Client(client));
        let toy = &mut self.toys[client];
        if toy.process != process {
            return;
        }
        toy.outcome.backwards += 1;
        let d_out = from_tensor(gradient);
        toy.trained.step(|index| d_out[index % NUMBERS]);
        if let Some(session) = &mut toy.session {
            session.step_done(now, key, took);
        }
    }

    /// Hands the adapter over.
    pub(super) fn collect(&mut self, client: usize, process: u32, round: RoundKey, (split, steps): (u32, u64)) {
        let now = self.now(Node::Client(client));
        let toy = &mut self.toys[client];
        if toy.process != process || toy.session.is_none() {
            return;
        }
        let stays = split as usize * NUMBERS;
        let input = AdapterInput {
            round,
            examples: toy.examples,
            values: toy.trained.values.clone(),
            moments: (stays < toy.trained.values.len()).then(|| toy.trained.moments(stays, steps)),
        };
        self.uploads.insert((round, client), input.clone());
        let result = toy.session.as_mut().map(|session| session.adapter(now, input));
        if let Some(Err(error)) = result {
            self.violation(error.to_string());
        }
    }

    /// When the client's machine can begin with something.
    fn free_at(&self, client: usize) -> Duration {
        self.network.now.max(self.toys[client].stalled_until)
    }

    pub(super) fn handle_client_event(&mut self, client: usize, event: ClientEvent) {
        let process = self.toys[client].process;
        let compute = self.scenario.compute;
        match event {
            ClientEvent::Connect { endpoint, url } => {
                assert_eq!(url, None, "the toy services share an origin");
                let reachable = self.toys[client].dark_until <= self.network.now;
                let socket = self.network.dial(reachable);
                let to = match endpoint {
                    Endpoint::Main => Node::Main,
                    Endpoint::Federated => Node::Federated,
                };
                self.routes.push(Route {
                    from: Node::Client(client),
                    to,
                });
                let toy = &mut self.toys[client];
                match endpoint {
                    Endpoint::Main => toy.main = Some(socket),
                    Endpoint::Federated => toy.federated = Some(socket),
                }
                self.network.darken(socket, self.toys[client].dark_until);
            }
            ClientEvent::Assigned(assignment) => {
                self.toys[client].outcome.assigned += 1;
                if assignment.adapter_len != u64::from(assignment.config.split) * NUMBERS as u64 {
                    self.violation(format!("client {client} was assigned {assignment:?}"));
                }
                let at = self.network.now + self.network.pause(compute) * 3;
                self.network.schedule(at, Own::Loaded { client, process });
            }
            ClientEvent::InstallAdapter { values, moments, .. } => {
                let toy = &mut self.toys[client];
                toy.outcome.installed.push(values.clone());
                let trained = &mut toy.trained;
                let gained = moments.as_ref().map_or(0, |moments| moments.first.len());
                for own in [&mut trained.first, &mut trained.second] {
                    own.resize(values.len() - gained, 0.0);
                }
                if let Some(Moments { first, second, .. }) = moments {
                    trained.first.extend(first);
                    trained.second.extend(second);
                }
                trained.values = values;
                toy.examples = 0;
            }
            ClientEvent::ComputeForward { key } => {
                if self.toys[client].trained.values.is_empty() {
                    self.violation(format!("client {client} was asked for {key} without an adapter"));
                }
                let took = self.network.pause(compute);
                let own = Own::Forwarded {
                    client,
                    process,
                    key,
                    took,
                };
                self.network.schedule(self.free_at(client) + took, own);
            }
            ClientEvent::ComputeBackward { key, gradient } => {
                let took = self.network.pause(compute);
                let own = Own::Backwarded {
                    client,
                    process,
                    key,
                    took,
                    gradient: gradient.tensor,
                };
                self.network.schedule(self.free_at(client) + took, own);
            }
            ClientEvent::UploadAdapter { round, split, steps } => {
                let own = Own::Collected {
                    client,
                    process,
                    round,
                    split,
                    steps,
                };
                self.network.schedule(self.free_at(client), own);
            }
            ClientEvent::Finished(reason) => self.toys[client].outcome.finished = Some(reason),
            ClientEvent::Failed(failure) => self.toys[client].outcome.failed = Some(failure),
            ClientEvent::ConnectionLost { .. } | ClientEvent::RoundStarted { .. } | ClientEvent::RoundResult(_) => {}
        }
    }
}
