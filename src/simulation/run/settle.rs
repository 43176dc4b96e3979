//! Draining the sessions: frames to the network, events to whoever answers them, alarms to the clock.
//!
//! Separate because it is done after every happening, and knows none.

use std::time::Duration;

use super::super::network::{End, SocketId};
use super::super::scenario::Fault;
use super::{Node, Own, Route, World, skew};
use crate::client::edge::Edge;
use crate::protocol::{ConnectionId, ControlEvent, ControlSession, Transmit};

impl World {
    pub(super) fn settle(&mut self) {
        loop {
            let mut moved = self.settle_servers();
            for client in 0..self.toys.len() {
                moved |= self.settle_client(client);
            }
            if !moved {
                break;
            }
        }
        self.set_timers();
    }

    fn settle_servers(&mut self) -> bool {
        let mut moved = false;
        while !self.is_down
            && let Some(event) = self.main.poll_event()
        {
            moved = true;
            self.handle_main_event(event);
        }
        if !self.is_down {
            self.keep_members();
        }
        if self.is_down {
            return moved | self.settle_federated();
        }
        while let Some(transmit) = self.main.poll_transmit() {
            moved = true;
            self.transmit_from_server(transmit);
        }
        moved |= self.settle_federated();
        while let Some(control) = self.main.poll_control() {
            moved = true;
            let now = self.now(Node::Federated);
            match &mut self.control {
                Some(link) => link.send(control),
                None => self.federated.handle_control(now, control),
            }
        }
        while let Some(reply) = self.federated.poll_control() {
            moved = true;
            let now = self.now(Node::Main);
            self.main.handle_control(now, reply);
        }
        moved | self.settle_control()
    }

    fn settle_federated(&mut self) -> bool {
        let mut moved = false;
        while let Some(transmit) = self.federated.poll_transmit() {
            moved = true;
            self.transmit_from_server(transmit);
        }
        while self.federated.poll_event().is_some() {
            moved = true;
        }
        moved
    }

    fn settle_control(&mut self) -> bool {
        let now = self.now(Node::Main);
        let Some(control) = &mut self.control else {
            return false;
        };
        let mut moved = false;
        while let Some(transmit) = control.poll_transmit() {
            moved = true;
            let Some(socket) = self.control_socket else {
                continue;
            };
            match transmit {
                Transmit::Frame { bytes, .. } => self.network.send(socket, End::Dialler, bytes),
                Transmit::Close { .. } => {
                    self.control_socket = None;
                    self.network.close(socket, End::Dialler);
                }
            }
        }
        while let Some(reply) = control.poll_reply() {
            moved = true;
            self.main.handle_control(now, reply);
        }
        while let Some(event) = control.poll_event() {
            moved = true;
            match event {
                ControlEvent::Connect => {
                    self.control_socket = Some(self.network.dial(true));
                    self.routes.push(Route {
                        from: Node::Control,
                        to: Node::Federated,
                    });
                }
                ControlEvent::Connected => self.main.control_connected(now),
                ControlEvent::ConnectionLost { .. } => self.main.control_disconnected(),
                ControlEvent::Failed(failure) => {
                    self.outcome
                        .violations
                        .push(format!("the servers' link failed: {failure}"));
                }
            }
        }
        moved
    }

    fn transmit_from_server(&mut self, transmit: Transmit<ConnectionId>) {
        let socket = |connection: ConnectionId| SocketId(connection.0 as usize);
        match transmit {
            Transmit::Frame { to, bytes } => self.network.send(socket(to), End::Listener, bytes),
            Transmit::Close { to } => self.network.close(socket(to), End::Listener),
        }
    }

    fn settle_client(&mut self, client: usize) -> bool {
        let mut moved = false;
        loop {
            let toy = &mut self.toys[client];
            let Some(output) = toy.edge.as_mut().and_then(Edge::poll) else {
                return moved;
            };
            moved = true;
            toy.outputs += 1;
            if self.scenario.deaths.contains(&(client, toy.outputs)) {
                self.kill(client);
                let at = self.network.now + Duration::from_secs(1);
                self.network.schedule(at, Own::Fault(Fault::Start(client)));
            } else {
                self.carry_out(client, output);
            }
        }
    }

    /// Wakes every session when it asks to be woken. An earlier alarm still rings; a session wakes for nothing, then.
    fn set_timers(&mut self) {
        let mut due = vec![
            (Node::Main, (!self.is_down).then(|| self.main.poll_timeout()).flatten()),
            (Node::Federated, self.federated.poll_timeout()),
            (
                Node::Control,
                self.control.as_ref().and_then(ControlSession::poll_timeout),
            ),
        ];
        due.extend(
            self.toys
                .iter()
                .enumerate()
                .map(|(client, toy)| (Node::Client(client), toy.edge.as_ref().and_then(Edge::poll_timeout))),
        );
        for (node, deadline) in due {
            let Some(deadline) = deadline else { continue };
            let at = deadline.saturating_sub(skew(node)).max(self.network.now);
            let timer = match node {
                Node::Main => &mut self.timers[0],
                Node::Federated => &mut self.timers[1],
                Node::Control => &mut self.timers[2],
                Node::Client(client) => &mut self.toys[client].timer,
            };
            if timer.is_none_or(|set| at < set) {
                *timer = Some(at);
                self.network.schedule(at, Own::Timer(node));
            }
        }
    }
}
