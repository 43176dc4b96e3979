//! Main server, federated server and clients of one process, joined without loss or delay.
//!
//! Separate because it is a network, and no machine of the protocol. Its driver is left with the events that ask for something to be
//! computed, and with the time.
//!
//! ```
//! use std::time::Duration;
//! use sflllm::protocol::message::{Assignment, Capabilities, RunConfig};
//! use sflllm::protocol::{
//!     ClientConfig, ClientEvent, ClientSession, LocalEvent, LocalRun, MainConfig, MainEvent, MainServerSession, Placement,
//! };
//! use sflllm::terms::{ids::RunId, tensor::WireForm};
//!
//! // One block of eight adapter values at the client; width 16, vocabulary 32.
//! let config = RunConfig::new(1, (4, 128), (16, 32), ["q_proj"]);
//! let assignment = Assignment::new(RunId([1; 16]), config, "{}".to_owned());
//! let main = MainConfig::new(Placement::new(assignment, vec![0.0; 8]), [2; 32], 1);
//! let capabilities = Capabilities { forms: vec![WireForm::F16], memory_bytes: 0, device: "CPU".to_owned() };
//! let client = ClientSession::new(ClientConfig::new("Ada", capabilities), Duration::ZERO);
//! let mut run = LocalRun::new(MainServerSession::new(main, Duration::ZERO)?, [client]);
//! let mut asked = None;
//! while let Some(event) = run.next(Duration::ZERO) {
//!     match event {
//!         // Here the weights would be loaded.
//!         LocalEvent::Client(0, ClientEvent::Assigned(_)) => run.clients[0].ready(Duration::ZERO, None),
//!         LocalEvent::Client(0, ClientEvent::ComputeForward { key }) => asked = Some(key),
//!         _ => {}
//!     }
//! }
//! assert_eq!(asked.unwrap().to_string(), "round 0.0 step 0");
//! # Ok::<(), sflllm::protocol::MainError>(())
//! ```

use std::time::Duration;

use super::{
    ClientEvent, ClientSession, ConnectionId, Endpoint, FederatedConfig, FederatedEvent, FederatedServerSession,
    MainEvent, MainServerSession, Transmit, earlier,
};

/// What one of the machines of a [`LocalRun`] asks of its driver, or tells it.
#[derive(Clone, Debug, PartialEq)]
pub enum LocalEvent {
    /// Of [`LocalRun::main`].
    Main(MainEvent),
    /// Of [`LocalRun::federated`].
    Federated(FederatedEvent),
    /// Of the client in this place of [`LocalRun::clients`]. [`ClientEvent::Connect`] is none of them.
    Client(usize, ClientEvent),
}

/// The machines of a run in one process, and what is open between them.
pub struct LocalRun {
    /// The main server.
    pub main: MainServerSession,
    /// The federated server, whose main server is in this process.
    pub federated: FederatedServerSession,
    /// The clients, in the order of [`LocalEvent::Client`].
    pub clients: Vec<ClientSession>,
    /// Of each client, its connections to both servers.
    open: Vec<Open>,
    last: ConnectionId,
    /// The client whose events come first: after the last one's, so that nobody waits for others to be done.
    turn: usize,
}

/// A client's connections: to the main server, to the federated server.
type Open = [Option<ConnectionId>; 2];

const ENDPOINTS: [Endpoint; 2] = [Endpoint::Main, Endpoint::Federated];

impl LocalRun {
    /// A run of these clients, and of others that [`LocalRun::join`] later.
    pub fn new(main: MainServerSession, clients: impl IntoIterator<Item = ClientSession>) -> LocalRun {
        let clients: Vec<ClientSession> = clients.into_iter().collect();
        LocalRun {
            main,
            federated: FederatedServerSession::new(FederatedConfig::default()),
            open: vec![Open::default(); clients.len()],
            clients,
            last: ConnectionId(0),
            turn: 0,
        }
    }

    /// Takes another client in, and returns its place in [`LocalRun::clients`].
    pub fn join(&mut self, client: ClientSession) -> usize {
        self.clients.push(client);
        self.open.push(Open::default());
        self.clients.len() - 1
    }

    /// Carries what the machines say until one of them has something for the driver. `None` when all of them wait for answers
    /// or for time to pass.
    ///
    /// Events of one machine come in their order, and after every frame that was sent before them has arrived; clients take turns.
    pub fn next(&mut self, now: Duration) -> Option<LocalEvent> {
        loop {
            while self.carry(now) {}
            if let Some(event) = self.main.poll_event() {
                return Some(LocalEvent::Main(event));
            }
            if let Some(event) = self.federated.poll_event() {
                return Some(LocalEvent::Federated(event));
            }
            let count = self.clients.len();
            let mut places = (self.turn..count).chain(0..self.turn);
            let (place, event) = places.find_map(|place| Some((place, self.clients[place].poll_event()?)))?;
            self.turn = (place + 1) % count;
            match event {
                ClientEvent::Connect { endpoint, .. } => self.connect(place, endpoint, now),
                event => return Some(LocalEvent::Client(place, event)),
            }
        }
    }

    /// When [`LocalRun::handle_timeout`] is to be called at the latest.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let servers = earlier(self.main.poll_timeout(), self.federated.poll_timeout());
        (self.clients.iter()).fold(servers, |at, client| earlier(at, client.poll_timeout()))
    }

    /// Tells all machines what time it is.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.main.handle_timeout(now);
        self.federated.handle_timeout(now);
        for client in &mut self.clients {
            client.handle_timeout(now);
        }
    }

    /// Closes a client's connection at both its ends, if it is open: what may happen to sockets.
    pub fn cut(&mut self, place: usize, endpoint: Endpoint, now: Duration) {
        if let Some(connection) = self.open[place][endpoint as usize].take() {
            self.server_disconnected(endpoint, connection, now);
            self.clients[place].disconnected(endpoint, now);
        }
    }

    fn connect(&mut self, place: usize, endpoint: Endpoint, now: Duration) {
        self.last.0 += 1;
        self.open[place][endpoint as usize] = Some(self.last);
        match endpoint {
            Endpoint::Main => self.main.connected(self.last, now),
            Endpoint::Federated => self.federated.connected(self.last, now),
        }
        self.clients[place].connected(endpoint, now);
    }

    fn server_disconnected(&mut self, endpoint: Endpoint, connection: ConnectionId, now: Duration) {
        match endpoint {
            Endpoint::Main => self.main.disconnected(connection, now),
            Endpoint::Federated => self.federated.disconnected(connection, now),
        }
    }

    /// Carries all that waits now; whether there was anything.
    fn carry(&mut self, now: Duration) -> bool {
        let mut carried = false;
        while let Some(control) = self.main.poll_control() {
            carried = true;
            self.federated.handle_control(now, control);
        }
        while let Some(reply) = self.federated.poll_control() {
            carried = true;
            self.main.handle_control(now, reply);
        }
        for endpoint in ENDPOINTS {
            while let Some(transmit) = match endpoint {
                Endpoint::Main => self.main.poll_transmit(),
                Endpoint::Federated => self.federated.poll_transmit(),
            } {
                carried = true;
                self.carry_to_client(endpoint, transmit, now);
            }
        }
        for place in 0..self.clients.len() {
            while let Some(transmit) = self.clients[place].poll_transmit() {
                carried = true;
                self.carry_to_server(place, transmit, now);
            }
        }
        carried
    }

    /// What a server sends to a connection that is no longer open is lost.
    fn carry_to_client(&mut self, endpoint: Endpoint, transmit: Transmit<ConnectionId>, now: Duration) {
        let (Transmit::Frame { to, .. } | Transmit::Close { to }) = &transmit;
        let holds = |open: &Open| open[endpoint as usize] == Some(*to);
        let Some(place) = self.open.iter().position(holds) else {
            return;
        };
        match transmit {
            Transmit::Frame { bytes, .. } => self.clients[place].handle_frame(endpoint, now, &bytes),
            Transmit::Close { .. } => {
                self.open[place][endpoint as usize] = None;
                self.clients[place].disconnected(endpoint, now);
            }
        }
    }

    fn carry_to_server(&mut self, place: usize, transmit: Transmit<Endpoint>, now: Duration) {
        let (Transmit::Frame { to, .. } | Transmit::Close { to }) = &transmit;
        let endpoint = *to;
        let Some(connection) = self.open[place][endpoint as usize] else {
            return;
        };
        match (transmit, endpoint) {
            (Transmit::Frame { bytes, .. }, Endpoint::Main) => self.main.handle_frame(connection, now, &bytes),
            (Transmit::Frame { bytes, .. }, Endpoint::Federated) => {
                self.federated.handle_frame(connection, now, &bytes);
            }
            (Transmit::Close { .. }, _) => {
                self.open[place][endpoint as usize] = None;
                self.server_disconnected(endpoint, connection, now);
            }
        }
    }
}
