//! What happens to the processes: arrivals, alarms, work that is done, and faults.
//!
//! Separate from what they answer: here is what the network and the clock do to them.

use std::time::Duration;

use super::super::network::{Arrival, End, SocketId};
use super::super::scenario::Fault;
use super::super::toy::Trained;
use super::{Node, Own, World};
use crate::client::edge::{Config, Edge, State};
use crate::protocol::message::Capabilities;
use crate::protocol::{ClientConfig, ConnectionId, Endpoint};
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
        let is_of_server = match node {
            Node::Main | Node::Control => true,
            Node::Federated => !self.scenario.remote_control,
            Node::Client(_) => false,
        };
        if self.is_down && is_of_server {
            return self.network.close(socket, end);
        }
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
                let Some(edge) = &mut toy.edge else {
                    return;
                };
                match arrival {
                    Arrival::Opened => edge.connected(endpoint, now),
                    Arrival::Frame(bytes) => edge.frame(endpoint, now, &bytes),
                    Arrival::Closed => edge.disconnected(endpoint, now, None),
                }
            }
            Node::Control => {}
        }
    }

    pub(super) fn handle(&mut self, own: Own) {
        match own {
            Own::OfServer { process, own } if process == self.process => self.handle(*own),
            Own::OfServer { .. } => {}
            Own::Revive => self.revive(),
            Own::Timer(node) => self.time_out(node),
            Own::Fault(fault) => self.strike(fault),
            Own::Fetched {
                client,
                process,
                number,
            } => {
                let now = self.now(Node::Client(client));
                if let Some(edge) = self.process(client, process) {
                    edge.fetched(now, number, Ok(()));
                }
            }
            Own::Computed {
                client,
                process,
                task,
                took,
            } => self.compute(client, process, *task, took),
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
        if self.is_down && node == Node::Main {
            return;
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
                if let Some(edge) = &mut self.toys[client].edge {
                    edge.timeout(now);
                }
            }
        }
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Start(client) => self.start(client),
            Fault::Leave(client) => {
                let now = self.now(Node::Client(client));
                if let Some(edge) = &mut self.toys[client].edge {
                    edge.leave(now);
                }
            }
            Fault::Crash(client) => {
                let toy = &mut self.toys[client];
                toy.edge = None;
                for socket in [toy.main.take(), toy.federated.take()].into_iter().flatten() {
                    self.network.vanish(socket, End::Dialler);
                }
            }
            Fault::Kill(client) => self.kill(client),
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
            Fault::KillServer(length) => self.kill_server(length),
            Fault::Stop if self.is_down => {}
            Fault::Stop => {
                let now = self.now(Node::Main);
                self.main.stop(now, "stopped".to_owned());
            }
        }
    }

    /// A client's process dies; its connections close.
    pub(super) fn kill(&mut self, client: usize) {
        let toy = &mut self.toys[client];
        toy.edge = None;
        for socket in [toy.main.take(), toy.federated.take()].into_iter().flatten() {
            self.network.close(socket, End::Dialler);
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
        if toy.edge.is_some() && toy.outcome.finished.is_none() && toy.outcome.failed.is_none() {
            return;
        }
        toy.process += 1;
        toy.trained = Trained::default();
        toy.cursor = 0;
        toy.outcome.finished = None;
        toy.outcome.failed = None;
        let resume = toy.kept.as_deref().map(State::decode).transpose();
        let capabilities = Capabilities {
            forms: vec![WireForm::F32],
            memory_bytes: 0,
            device: "toy".to_owned(),
        };
        let config = Config {
            client: ClientConfig {
                secret: Some("open sesame".to_owned()),
                give_up: Duration::from_secs(600),
                seed: self.scenario.seed ^ (u64::from(toy.process) << 32 | client as u64),
                ..ClientConfig::new(client.to_string(), capabilities)
            },
            server: "the toy server".to_owned(),
            keeps: self.scenario.keeps,
            resume: resume.clone().ok().flatten(),
        };
        toy.edge = Some(Edge::new(config, now));
        if let Err(error) = resume {
            self.violation(format!("what client {client} has kept cannot be read: {error}"));
        }
    }
}
