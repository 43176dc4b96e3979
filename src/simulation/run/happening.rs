//! What happens to the processes: arrivals, alarms, work that is done, and faults.
//!
//! Separate from what they answer: here is what the network and the clock do to them.

use super::super::network::{Arrival, End, SocketId};
use super::super::scenario::Fault;
use super::super::toy::Trained;
use super::{Node, Own, World};
use crate::protocol::message::Capabilities;
use crate::protocol::{ClientConfig, ClientSession, ConnectionId, Endpoint};
use crate::terms::tensor::WireForm;

impl World {
    pub(super) fn arrive(&mut self, socket: SocketId, end: End, arrival: Arrival) {
        let route = self.routes[socket.0];
        let node = match end {
            End::Dialler => route.from,
            End::Listener => route.to,
        };
        let now = self.now(node);
        let connection = ConnectionId(socket.0 as u64);
        match node {
            Node::Main => match arrival {
                Arrival::Opened => self.main.connected(connection, now),
                Arrival::Frame(bytes) => self.main.handle_frame(connection, now, &bytes),
                Arrival::Closed => self.main.disconnected(connection, now),
            },
            Node::Federated => match arrival {
                Arrival::Opened => self.federated.connected(connection, now),
                Arrival::Frame(bytes) => self.federated.handle_frame(connection, now, &bytes),
                Arrival::Closed => self.federated.disconnected(connection, now),
            },
            Node::Control if self.control_socket == Some(socket) => {
                let Some(control) = &mut self.control else {
                    return;
                };
                match arrival {
                    Arrival::Opened => control.connected(now),
                    Arrival::Frame(bytes) => control.handle_frame(now, &bytes),
                    Arrival::Closed => control.disconnected(now),
                }
            }
            Node::Client(client) => {
                let toy = &mut self.toys[client];
                let endpoint = match socket {
                    socket if toy.main == Some(socket) => Endpoint::Main,
                    socket if toy.federated == Some(socket) => Endpoint::Federated,
                    _ => return,
                };
                let Some(session) = &mut toy.session else {
                    return;
                };
                match arrival {
                    Arrival::Opened => session.connected(endpoint, now),
                    Arrival::Frame(bytes) => session.handle_frame(endpoint, now, &bytes),
                    Arrival::Closed => session.disconnected(endpoint, now),
                }
            }
            Node::Control => {}
        }
    }

    pub(super) fn handle(&mut self, own: Own) {
        match own {
            Own::Timer(node) => self.time_out(node),
            Own::Fault(fault) => self.strike(fault),
            Own::Loaded { client, process } => {
                let now = self.now(Node::Client(client));
                if let Some(session) = self.process(client, process) {
                    session.ready(now, None);
                }
            }
            Own::Forwarded {
                client,
                process,
                key,
                took,
            } => self.forward(client, process, key, took),
            Own::Backwarded {
                client,
                process,
                key,
                took,
                gradient,
            } => self.backward(client, process, key, took, &gradient),
            Own::Collected {
                client,
                process,
                round,
                split,
                steps,
            } => self.collect(client, process, round, (split, steps)),
            Own::Planned(occasion) => self.plan(occasion),
            Own::Copied { round, values } => {
                let now = self.now(Node::Main);
                if let Err(error) = self.main.copy(now, round, values) {
                    self.violation(error.to_string());
                }
            }
            Own::Contributed { key, output } => {
                let now = self.now(Node::Main);
                if let Err(error) = self.main.contributed(now, key, output.client, Some(output)) {
                    self.violation(error.to_string());
                }
            }
            Own::Validated { round, placement } => {
                let now = self.now(Node::Main);
                let loss = Some(f64::from(self.average[0]));
                if let Err(error) = self
                    .main
                    .validated(now, round, loss, placement.map(|placement| *placement))
                {
                    self.violation(error.to_string());
                }
            }
        }
    }

    fn time_out(&mut self, node: Node) {
        let now = self.now(node);
        match node {
            Node::Main => self.timers[0] = None,
            Node::Federated => self.timers[1] = None,
            Node::Control => self.timers[2] = None,
            Node::Client(client) => self.toys[client].timer = None,
        }
        match node {
            Node::Main => self.main.handle_timeout(now),
            Node::Federated => self.federated.handle_timeout(now),
            Node::Control => {
                if let Some(control) = &mut self.control {
                    control.handle_timeout(now);
                }
            }
            Node::Client(client) => {
                if let Some(session) = &mut self.toys[client].session {
                    session.handle_timeout(now);
                }
            }
        }
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Start(client) => self.start(client),
            Fault::Leave(client) => {
                let now = self.now(Node::Client(client));
                if let Some(session) = &mut self.toys[client].session {
                    session.leave(now);
                }
            }
            Fault::Crash(client) | Fault::Kill(client) => {
                let toy = &mut self.toys[client];
                toy.session = None;
                for socket in [toy.main.take(), toy.federated.take()].into_iter().flatten() {
                    match fault {
                        Fault::Kill(_) => self.network.close(socket, End::Dialler),
                        _ => self.network.vanish(socket, End::Dialler),
                    }
                }
            }
            Fault::Partition(client, length) => {
                let until = self.network.now + length;
                let toy = &mut self.toys[client];
                toy.dark_until = toy.dark_until.max(until);
                for socket in [toy.main, toy.federated].into_iter().flatten() {
                    self.network.darken(socket, until);
                }
            }
            Fault::Stall(client, length) => {
                let until = self.network.now + length;
                let toy = &mut self.toys[client];
                toy.stalled_until = toy.stalled_until.max(until);
            }
            Fault::Cut(client, endpoint) => {
                let toy = &self.toys[client];
                let socket = match endpoint {
                    Endpoint::Main => toy.main,
                    Endpoint::Federated => toy.federated,
                };
                if let Some(socket) = socket {
                    self.cut(socket);
                }
            }
            Fault::CutControl => {
                if let Some(socket) = self.control_socket {
                    self.cut(socket);
                }
            }
            Fault::Stop => {
                let now = self.now(Node::Main);
                self.main.stop(now, "stopped".to_owned());
            }
        }
    }

    /// Something between the ends closes the connection to both.
    fn cut(&mut self, socket: SocketId) {
        self.network.close(socket, End::Dialler);
        self.network.close(socket, End::Listener);
        self.arrive(socket, End::Dialler, Arrival::Closed);
        self.arrive(socket, End::Listener, Arrival::Closed);
    }

    fn start(&mut self, client: usize) {
        let now = self.now(Node::Client(client));
        let toy = &mut self.toys[client];
        if toy.session.is_some() && toy.outcome.finished.is_none() && toy.outcome.failed.is_none() {
            return;
        }
        toy.process += 1;
        toy.trained = Trained::default();
        toy.outcome.finished = None;
        toy.outcome.failed = None;
        let capabilities = Capabilities {
            forms: vec![WireForm::F32],
            memory_bytes: 0,
            device: "toy".to_owned(),
        };
        toy.session = Some(ClientSession::new(
            ClientConfig {
                secret: Some("open sesame".to_owned()),
                retries: 20,
                ..ClientConfig::new(client.to_string(), capabilities)
            },
            now,
        ));
    }
}
