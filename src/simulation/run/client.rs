//! What the toy clients compute and keep, and their answers to their machines.
//!
//! Separate because it is one of three drivers of a client's machine, beside the native and the browser one.

use std::convert::Infallible;
use std::time::Duration;

use super::super::toy::{BATCH, NUMBERS, SEQ, Trained, VOCAB, from_tensor, to_tensor};
use super::{Node, Own, Route, Toy, World};
use crate::client::edge::{Cause, Done, Edge, Failure, Output, Report, Standing, Task, Wanted};
use crate::data::Cursor;
use crate::protocol::message::Digest;
use crate::protocol::{ActivationsInput, AdapterInput, Endpoint};
use crate::terms::ids::StepKey;
use crate::terms::moments::Moments;
use crate::terms::tensor::{IGNORED_TARGET, WireTensor};

/// Nothing goes wrong at a toy client but its connections.
impl Cause for Infallible {
    fn may_pass(&self) -> bool {
        match *self {}
    }
}

impl Toy {
    fn slot(&mut self, endpoint: Endpoint) -> &mut Option<super::SocketId> {
        match endpoint {
            Endpoint::Main => &mut self.main,
            Endpoint::Federated => &mut self.federated,
        }
    }

    fn standing(&self) -> Standing {
        Standing {
            moments: self.trained.moments(0, 0),
            cursor: Cursor {
                epoch: 0,
                position: self.cursor,
            },
        }
    }

    fn install(&mut self, values: Vec<f32>, moments: Option<Moments>) {
        self.outcome.installed.push(values.clone());
        let trained = &mut self.trained;
        let gained = moments.as_ref().map_or(0, Moments::len);
        for own in [&mut trained.first, &mut trained.second] {
            own.resize(values.len() - gained, 0.0);
        }
        if let Some(Moments { first, second, .. }) = moments {
            trained.first.extend(first);
            trained.second.extend(second);
        }
        trained.values = values;
    }

    fn begin_round(&mut self, restore: Option<&Standing>) {
        self.examples = 0;
        let Some(Standing { moments, cursor }) = restore else {
            return;
        };
        self.cursor = cursor.position;
        let Trained { first, second, .. } = &mut self.trained;
        for (own, kept) in [(first, &moments.first), (second, &moments.second)] {
            own.iter_mut().zip(kept).for_each(|(own, kept)| *own = *kept);
        }
    }

    fn forward(&mut self, client: usize, key: StepKey, took: Duration) -> ActivationsInput {
        self.cursor += 1;
        self.outcome.forwards += 1;
        let datum = ((client as u64 + 1) * 31 + self.cursor * 7) % 11;
        let mut activations = vec![0.05 * datum as f32; NUMBERS];
        self.trained.run(0, &mut activations);
        // Every third batch of the second client has no target in the loss.
        let ignored = client == 1 && self.cursor.is_multiple_of(3);
        let target = |row: u32| {
            let known = !ignored && !(u64::from(row) + self.cursor + client as u64).is_multiple_of(4);
            if known { (row % VOCAB) as i32 } else { IGNORED_TARGET }
        };
        let examples = 1 + (client as u32 + self.cursor as u32) % BATCH;
        self.examples += u64::from(examples);
        ActivationsInput {
            key,
            examples,
            forward: took,
            targets: (0..BATCH * SEQ).map(target).collect(),
            tensor: to_tensor(&activations),
        }
    }

    fn backward(&mut self, gradient: &WireTensor) {
        self.outcome.backwards += 1;
        let d_out = from_tensor(gradient);
        self.trained.step(|index| d_out[index % NUMBERS]);
    }
}

impl World {
    /// The machine of a client's process, while that runs.
    pub(super) fn process(&mut self, client: usize, process: u32) -> Option<&mut Edge<Infallible>> {
        let toy = &mut self.toys[client];
        if toy.process == process {
            toy.edge.as_mut()
        } else {
            None
        }
    }

    /// A task is done.
    pub(super) fn compute(&mut self, client: usize, process: u32, task: Task, took: Duration) {
        let now = self.now(Node::Client(client));
        if self.process(client, process).is_none() {
            return;
        }
        let toy = &mut self.toys[client];
        let done = match task {
            Task::Assign(assignment) => {
                toy.outcome.assigned += 1;
                if assignment.adapter_len != u64::from(assignment.config.split) * NUMBERS as u64 {
                    self.violation(format!("client {client} was assigned {assignment:?}"));
                }
                Done::Assigned(Wanted::default())
            }
            Task::Load => Done::Loaded {
                speed: None,
                data: Digest::of(b"toy"),
                summary: None,
            },
            Task::Install { values, moments } => {
                toy.install(values, moments);
                Done::Installed
            }
            Task::BeginRound { restore, keep, .. } => {
                toy.begin_round(restore.as_deref());
                Done::Began(keep.then(|| toy.standing()))
            }
            Task::Forward(key) => {
                if toy.trained.values.is_empty() {
                    self.violation(format!("client {client} was asked for {key} without an adapter"));
                }
                Done::Activations(self.toys[client].forward(client, key, took))
            }
            Task::Backward { gradient, .. } => {
                toy.backward(&gradient.tensor);
                Done::StepDone { took }
            }
            Task::Collect { round, split, steps } => {
                let stays = split as usize * NUMBERS;
                let input = AdapterInput {
                    round,
                    examples: toy.examples,
                    values: toy.trained.values.clone(),
                    moments: (stays < toy.trained.values.len()).then(|| toy.trained.moments(stays, steps)),
                };
                let standing = toy.standing();
                self.uploads.insert((round, client), input.clone());
                Done::Adapter(input, standing)
            }
        };
        if let Some(edge) = self.process(client, process) {
            edge.done(now, Ok(done));
        }
    }

    /// When the client's machine can begin with something.
    fn free_at(&self, client: usize) -> Duration {
        self.network.now.max(self.toys[client].stalled_until)
    }

    pub(super) fn carry_out(&mut self, client: usize, output: Output<Infallible>) {
        let process = self.toys[client].process;
        let compute = self.scenario.compute;
        match output {
            Output::Connect { endpoint, url } => {
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
                *toy.slot(endpoint) = Some(socket);
                self.network.darken(socket, self.toys[client].dark_until);
            }
            Output::Transmit { endpoint, bytes } => {
                if let Some(socket) = *self.toys[client].slot(endpoint) {
                    self.network.send(socket, super::End::Dialler, bytes);
                }
            }
            Output::Close { endpoint } => {
                if let Some(socket) = self.toys[client].slot(endpoint).take() {
                    self.network.close(socket, super::End::Dialler);
                }
            }
            Output::Fetch(fetch) => {
                let at = self.network.now + self.network.pause(compute) * 3;
                let number = fetch.number;
                self.network.schedule(
                    at,
                    Own::Fetched {
                        client,
                        process,
                        number,
                    },
                );
            }
            Output::Compute(task) => {
                let at = match &task {
                    Task::Forward(_) | Task::Backward { .. } => {
                        let took = self.network.pause(compute);
                        Some((self.free_at(client) + took, took))
                    }
                    Task::Collect { .. } => Some((self.free_at(client), Duration::ZERO)),
                    _ => None,
                };
                match at {
                    Some((at, took)) => {
                        let task = Box::new(task);
                        self.network.schedule(
                            at,
                            Own::Computed {
                                client,
                                process,
                                task,
                                took,
                            },
                        );
                    }
                    None => self.compute(client, process, task, Duration::ZERO),
                }
            }
            Output::Store(bytes) => {
                let now = self.now(Node::Client(client));
                let toy = &mut self.toys[client];
                toy.kept = Some(bytes);
                if let Some(edge) = &mut toy.edge {
                    edge.stored(now, Ok(()));
                }
            }
            Output::Forget => self.toys[client].kept = None,
            Output::Show(Report::Admitted { client: id, .. }) => {
                let identities = &mut self.toys[client].outcome.identities;
                if !identities.contains(&id) {
                    identities.push(id);
                }
            }
            Output::Show(_) => {}
            Output::End(Ok(reason)) => self.toys[client].outcome.finished = Some(reason),
            Output::End(Err(Failure::Session(failure))) => self.toys[client].outcome.failed = Some(failure),
            Output::End(Err(Failure::Answer(error))) => self.violation(error.to_string()),
            Output::End(Err(Failure::Driver(never))) => match never {},
        }
    }
}
