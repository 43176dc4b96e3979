//! Who is in the run, over all their connections.
//!
//! Separate because it owns what must stay true of a client whatever the run is doing: only who is connected can be ready, only
//! who is ready is known to hold an adapter, and the next round waits for those who were ready when the assignment changed.

use std::collections::{BTreeMap, BTreeSet};

use super::super::admission::{Admission, Pass};
use super::super::message::{DEADLINES_SINCE, Digest, Hello, Ready, Version};
use super::super::{ConnectionId, display_name};
use super::state::{ClientState, RunState};
use super::step::Awaited;
use crate::terms::ids::{ClientId, StepKey};
use crate::terms::speed::Speed;

/// What is kept of a client over its connections.
pub(super) struct Client {
    name: String,
    device: String,
    memory_bytes: u64,
    speed: Option<Speed>,
    connection: Option<ConnectionId>,
    /// It has loaded the latest assignment.
    ready: bool,
    /// It was told of the latest assignment at a boundary, so the moments that come with that are its own too.
    carries: bool,
    /// Digest of the adapter it is known to hold.
    holds: Option<Digest>,
    /// Tickets below this serial are spent.
    next_serial: u64,
    /// What it speaks.
    version: Version,
    /// Its tickets are good for nothing any more.
    banned: bool,
    /// It said goodbye, or is out of the run for good: nobody counts on its return.
    is_gone: bool,
    /// How often in a row it was waited for in vain.
    misses: BTreeMap<Awaited, u32>,
    /// The last step that a round went on from without it; what it sends up to that is late.
    left_out: Option<StepKey>,
}

impl Client {
    /// Of whom nothing is known.
    fn unseen() -> Client {
        Client {
            name: String::new(),
            device: String::new(),
            memory_bytes: 0,
            speed: None,
            connection: None,
            ready: false,
            carries: false,
            holds: None,
            next_serial: 0,
            version: Version { major: 0, minor: 0 },
            banned: false,
            is_gone: false,
            misses: BTreeMap::new(),
            left_out: None,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn device(&self) -> &str {
        &self.device
    }

    /// Memory it can give, in bytes; 0 when unknown.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    pub fn speed(&self) -> Option<Speed> {
        self.speed
    }

    /// Whether it has loaded the latest assignment.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready
    }
}

/// What a client's `Ready` comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readiness {
    /// It is ready now.
    New,
    /// It means an assignment before the latest, which is on its way.
    Outdated,
    /// It is ready already, or means an assignment that was never made.
    Unexpected,
}

/// What a client that starts a round needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    /// It is not known to hold the adapter the round starts from.
    pub adapter: bool,
    /// The moments that came with the latest assignment are its own too.
    pub moments: bool,
}

/// All clients that have ever been let in.
pub(super) struct Roster {
    clients: BTreeMap<ClientId, Client>,
    next: u64,
    /// Clients who were ready when the latest placement came and have not left: the next round waits for them.
    expected: BTreeSet<ClientId>,
}

impl Roster {
    pub fn new() -> Roster {
        Roster {
            clients: BTreeMap::new(),
            next: 1,
            expected: BTreeSet::new(),
        }
    }

    // Coming in and going out.

    /// Whether this ticket's serial has not been spent. Of clients that came after what was kept of an interrupted run, only their
    /// tickets tell.
    pub fn knows(&self, pass: Pass) -> bool {
        match self.clients.get(&pass.client) {
            Some(client) => client.next_serial <= pass.serial,
            None => pass.client.0 < self.next,
        }
    }

    /// Who this is: a number of its own for whoever is new, with serial 0.
    pub(crate) fn identify(&mut self, admission: Admission) -> Pass {
        match admission {
            Admission::New => {
                let client = ClientId(self.next);
                self.next += 1;
                Pass { client, serial: 0 }
            }
            Admission::Known(pass) => pass,
        }
    }

    /// Whether this client was thrown out for good.
    pub(crate) fn is_banned(&self, id: ClientId) -> bool {
        self.clients.get(&id).is_some_and(|client| client.banned)
    }

    /// Throws a client out for good.
    pub(crate) fn ban(&mut self, id: ClientId) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.banned = true;
            client.is_gone = true;
        }
    }

    /// A client has said goodbye.
    pub(crate) fn let_go(&mut self, id: ClientId) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.is_gone = true;
        }
    }

    /// Clients who are there or may come back.
    pub(crate) fn counted_on(&self) -> usize {
        self.clients.values().filter(|client| !client.is_gone).count()
    }

    /// Lets a client in, or in again. Whatever was known of it but its number, and how often it was late, is as it says now.
    pub(crate) fn enter(&mut self, pass: Pass, hello: &Hello, connection: ConnectionId) -> &Client {
        let before = self.clients.get_mut(&pass.client);
        let client = Client {
            name: display_name(&hello.name),
            device: display_name(&hello.capabilities.device),
            memory_bytes: hello.capabilities.memory_bytes,
            speed: None,
            connection: Some(connection),
            ready: false,
            carries: false,
            holds: None,
            next_serial: pass.serial,
            version: hello.version,
            banned: false,
            is_gone: false,
            misses: before
                .map(|client| std::mem::take(&mut client.misses))
                .unwrap_or_default(),
            left_out: None,
        };
        self.clients.entry(pass.client).insert_entry(client).into_mut()
    }

    /// The client has spoken on its connection: the ticket that it came with is spent.
    pub(crate) fn spend_ticket(&mut self, id: ClientId) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.next_serial += 1;
        }
    }

    /// A client's connection is gone or about to be. Returns its name, if it was connected.
    pub fn leave(&mut self, id: ClientId) -> Option<String> {
        let client = self.clients.get_mut(&id)?;
        client.connection.take()?;
        client.ready = false;
        client.carries = false;
        client.holds = None;
        self.expected.remove(&id);
        Some(client.name.clone())
    }

    // Being kept.

    /// No client has this number yet, or a greater one.
    pub(crate) fn next_client(&self) -> u64 {
        self.next
    }

    pub(crate) fn state(&self) -> Vec<ClientState> {
        let state = |(&client, known): (&ClientId, &Client)| ClientState {
            client,
            next_serial: known.next_serial,
            banned: known.banned,
            present: known.connection.is_some() || self.expected.contains(&client),
        };
        self.clients.iter().map(state).collect()
    }

    /// Clients as they were kept: none of them is there, and those that were are waited for.
    pub(crate) fn restore(&mut self, state: &RunState) {
        self.next = self.next.max(state.next_client);
        for kept in &state.clients {
            let client = Client {
                next_serial: kept.next_serial,
                banned: kept.banned,
                is_gone: kept.banned || !kept.present,
                ..Client::unseen()
            };
            self.clients.insert(kept.client, client);
            if kept.present && !kept.banned {
                self.expected.insert(kept.client);
            }
        }
    }

    /// Nobody waits for this client any more.
    pub(crate) fn expect_no_more(&mut self, id: ClientId) {
        self.expected.remove(&id);
    }

    /// Clients whom the next round waits for.
    pub(crate) fn expected(&self) -> &BTreeSet<ClientId> {
        &self.expected
    }

    // Who is there.

    /// The client's connection, while it has one.
    pub fn connection(&self, id: ClientId) -> Option<ConnectionId> {
        self.clients.get(&id)?.connection
    }

    /// Who is connected.
    pub fn connected(&self) -> impl Iterator<Item = (ClientId, &Client)> {
        let connected = self.clients.iter().filter(|(_, client)| client.connection.is_some());
        connected.map(|(id, client)| (*id, client))
    }

    /// The clients' connections.
    pub(crate) fn connections(&self) -> impl Iterator<Item = ConnectionId> {
        self.clients.values().filter_map(|client| client.connection)
    }

    // Being ready.

    pub(crate) fn is_ready(&self, id: ClientId) -> bool {
        self.clients.get(&id).is_some_and(|client| client.ready)
    }

    pub(crate) fn is_anybody_ready(&self) -> bool {
        self.clients.values().any(|client| client.ready)
    }

    /// Who is ready.
    pub fn ready(&self) -> BTreeSet<ClientId> {
        let ready = self.clients.iter().filter(|(_, client)| client.ready);
        ready.map(|(id, _)| *id).collect()
    }

    /// Whether somebody who was ready is loading the latest assignment.
    pub(crate) fn is_reloading(&self) -> bool {
        !self.expected.is_empty()
    }

    /// Waits no longer for those who are loading.
    pub(crate) fn stop_expecting(&mut self) {
        self.expected.clear();
    }

    /// A client says that it is ready, where `number` is the latest assignment.
    pub(crate) fn handle_ready(&mut self, id: ClientId, ready: Ready, number: u32) -> Readiness {
        let Some(client) = self.clients.get_mut(&id) else {
            return Readiness::Outdated;
        };
        if ready.assignment < number && !client.ready {
            return Readiness::Outdated;
        }
        if client.ready || ready.assignment != number {
            return Readiness::Unexpected;
        }
        client.ready = true;
        client.speed = ready.speed.or(client.speed);
        self.expected.remove(&id);
        Readiness::New
    }

    /// There is another assignment: nobody is ready, and those who were are waited for.
    pub fn reassign(&mut self) {
        self.expected = self.ready();
        for client in self.clients.values_mut() {
            client.carries = client.ready;
            client.ready = false;
            client.holds = None;
        }
    }

    // Being late.

    /// The client was waited for in vain. Returns how often in a row.
    pub(crate) fn was_late(&mut self, id: ClientId, awaited: Awaited) -> u32 {
        let Some(client) = self.clients.get_mut(&id) else {
            return 0;
        };
        let misses = client.misses.entry(awaited).or_default();
        *misses += 1;
        *misses
    }

    pub(crate) fn was_in_time(&mut self, id: ClientId, awaited: Awaited) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.misses.remove(&awaited);
        }
    }

    /// A round goes on from this step without the client.
    pub(crate) fn leave_out(&mut self, id: ClientId, key: StepKey) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.left_out = Some(key);
        }
    }

    /// Whether what the client sends for this step is late: the round went on without it.
    pub(crate) fn was_left_out(&self, id: ClientId, key: StepKey) -> bool {
        let left_out = self.clients.get(&id).and_then(|client| client.left_out);
        left_out.is_some_and(|last| last.round == key.round && key.step <= last.step)
    }

    /// Whether the client goes on when a step or a round has gone on without it. Else it has to come again.
    pub(crate) fn can_be_left_out(&self, id: ClientId) -> bool {
        self.clients
            .get(&id)
            .is_some_and(|client| client.version >= DEADLINES_SINCE)
    }

    // Adapters.

    /// The client's adapter is not what it started the round from, nor what comes of the round.
    pub(crate) fn forget_adapter(&mut self, id: ClientId) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.holds = None;
        }
    }

    /// A client starts a round from the adapter of this digest. `None` for nobody.
    pub fn start(&mut self, id: ClientId, base: Digest) -> Option<Needs> {
        let client = self.clients.get_mut(&id)?;
        Some(Needs {
            adapter: client.holds.replace(base) != Some(base),
            moments: std::mem::take(&mut client.carries),
        })
    }

    /// A client gets an average from the federated server.
    pub fn hold(&mut self, id: ClientId, average: Option<Digest>) {
        if let Some(client) = self.clients.get_mut(&id)
            && client.ready
        {
            client.holds = average;
        }
    }
}
