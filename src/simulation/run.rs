//! A training run of toy clients over the real sessions.
//!
//! Separate from `network` because this is a driver, the third beside the native and the browser one: it answers the
//! sessions' events, and checks what must hold of every run whatever the weather. The toy model is a chain of blocks, each of
//! which adds a part of its adapter to what it is given, trained by gradient descent with momentum; the blocks up to the cut are
//! the client's. Where the cut is makes no difference to one client's run.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::network::{Arrival, End, Happening, Network, SocketId, Traffic, Weather};
use crate::federated::{mean_of_prefixes, weighted_mean};
use crate::protocol::message::*;
use crate::protocol::{
    ActivationsInput, AdapterInput, ClientConfig, ClientEvent, ClientFailure, ClientSession, CollectTime, ConnectionId,
    Contribution, ControlAccess, ControlConfig, ControlEvent, ControlSession, Endpoint, FederatedConfig,
    FederatedServerSession, FinishReason, GradientOutput, MainConfig, MainEvent, MainServerSession, Occasion,
    Placement, RoundPlan, RunEnd, StepTimes, Transmit,
};
use crate::terms::format::Format;
use crate::terms::ids::{ClientId, RoundKey, RunId, StepKey};
use crate::terms::moments::{MomentPolicy, Moments};
use crate::terms::optimizer::{OptimizerSettings, Schedule};
use crate::terms::tensor::{IGNORED_TARGET, WireForm, WireLayout, WireTensor};

const BATCH: u32 = 2;
const SEQ: u32 = 2;
const WIDTH: u32 = 2;
const VOCAB: u32 = 11;
/// Numbers of a block's adapter, and of a step's activations.
const NUMBERS: usize = (BATCH * SEQ * WIDTH) as usize;
/// Blocks of the toy model.
const BLOCKS: usize = 4;
/// What of its adapter a block adds to what it is given.
const SHARE: f32 = 0.25;

/// A thing that goes wrong, or a decision of somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The client's process starts, again after it crashed or was killed.
    Start(usize),
    /// The client says goodbye.
    Leave(usize),
    /// The client's machine vanishes; nobody is told.
    Crash(usize),
    /// The client's process dies; its connections close.
    Kill(usize),
    /// Nothing reaches or leaves the client for so long; nobody is told.
    Partition(usize, Duration),
    /// One of the client's connections closes at both ends.
    Cut(usize, Endpoint),
    /// The link between the two servers closes, if they are two processes.
    CutControl,
    /// The main server is told to stop.
    Stop,
}

/// Everything a run depends on.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub weather: Weather,
    /// Clients there are; those without a `Fault::Start` start at once.
    pub clients: usize,
    /// Clients the first round waits for.
    pub needed: u32,
    pub rounds: u32,
    pub local_steps: u32,
    /// Two server processes with a link between them, instead of one.
    pub remote_control: bool,
    /// Time of a client's forward or backward pass and of the server's step.
    pub compute: (Duration, Duration),
    pub wait_for_client: Duration,
    /// Blocks of the client in each round, from 1 to 3; the last holds for the rounds after it. Without any the cut stays after
    /// the first block and nobody plans.
    pub splits: Vec<u32>,
    /// Blocks of each client that is there when the first round is planned, by its number; the cut then stays. Without any
    /// `splits` says.
    pub cuts: Vec<u32>,
    /// Of every client's emulated uplinks, where there is a plan.
    pub rates: Option<LinkRates>,
    pub faults: Vec<(Duration, Fault)>,
    /// When to give up on the run.
    pub time_limit: Duration,
}

impl Scenario {
    /// A run without mishap.
    pub fn calm(clients: usize, rounds: u32, local_steps: u32) -> Scenario {
        Scenario {
            seed: 1,
            weather: Weather::CALM,
            clients,
            needed: clients as u32,
            rounds,
            local_steps,
            remote_control: false,
            compute: (Duration::from_millis(50), Duration::from_millis(200)),
            wait_for_client: Duration::from_secs(60),
            splits: Vec::new(),
            cuts: Vec::new(),
            rates: None,
            faults: Vec::new(),
            time_limit: Duration::from_secs(24 * 3600),
        }
    }

    /// Blocks of the client in a round.
    fn split(&self, round: u32) -> u32 {
        let planned = self.splits.get(round as usize).or(self.splits.last());
        planned.copied().unwrap_or(1)
    }
}

/// A round as the main server saw it close.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundRecord {
    pub round: RoundKey,
    pub at: Duration,
    /// Members at its start, by client number of the scenario.
    pub members: Vec<usize>,
    /// Adapters in the average, with their examples.
    pub included: Vec<(usize, u64)>,
    pub excluded: Vec<(usize, ExclusionReason)>,
    pub average: Vec<f32>,
    /// Of the blocks that left the clients.
    pub moments: Option<Moments>,
    pub collected: Vec<CollectTime>,
}

/// What became of a client's last process.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientOutcome {
    pub finished: Option<FinishReason>,
    pub failed: Option<ClientFailure>,
    pub adapter: Vec<f32>,
    /// Adapters that all its processes were given.
    pub installed: Vec<Vec<f32>>,
    /// Forward passes of all its processes.
    pub forwards: u64,
    /// Backward passes of all its processes.
    pub backwards: u64,
    /// Assignments it had to load.
    pub assigned: u64,
}

/// When a run stood where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Joined(usize),
    Left(usize),
    Lost(RoundKey),
    Waiting,
}

/// What became of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// `None` when the time limit came first.
    pub end: Option<RunEnd>,
    /// Whether every client was told and gone when the run ended.
    pub drained: bool,
    pub elapsed: Duration,
    /// The last average.
    pub adapter: Vec<f32>,
    /// Every block's adapter: the last average, then the main server's.
    pub model: Vec<f32>,
    /// The main server's own parameter.
    pub server: f64,
    /// Steps the main server computed.
    pub steps: u64,
    pub rounds: Vec<RoundRecord>,
    pub measured: Vec<(StepKey, Vec<StepTimes>)>,
    pub history: Vec<(Duration, Phase)>,
    pub clients: Vec<ClientOutcome>,
    pub traffic: Traffic,
    /// What must never happen and did.
    pub violations: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Main,
    Federated,
    Control,
    Client(usize),
}

enum Own {
    Timer(Node),
    Fault(Fault),
    Loaded {
        client: usize,
        process: u32,
    },
    Forwarded {
        client: usize,
        process: u32,
        key: StepKey,
        took: Duration,
    },
    Backwarded {
        client: usize,
        process: u32,
        key: StepKey,
        took: Duration,
        gradient: WireTensor,
    },
    Stepped {
        key: StepKey,
        outputs: Vec<GradientOutput>,
        server: f64,
        blocks: Trained,
    },
    Planned(Occasion),
    Copied {
        round: RoundKey,
        values: Vec<f32>,
    },
    Validated {
        round: RoundKey,
        placement: Option<Box<Placement>>,
    },
}

/// Values and what training keeps of them.
#[derive(Clone, Debug, Default)]
struct Trained {
    values: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
}

impl Trained {
    fn new(values: Vec<f32>) -> Trained {
        let zeros = vec![0.0; values.len()];
        Trained {
            values,
            first: zeros.clone(),
            second: zeros,
        }
    }

    /// Moves every block by the gradient of its output.
    fn step(&mut self, d_out: impl Fn(usize) -> f32) {
        for index in 0..self.values.len() {
            let d_value = SHARE * d_out(index);
            self.first[index] = 0.5 * self.first[index] + d_value;
            self.second[index] += d_value * d_value;
            self.values[index] -= 0.4 * self.first[index];
        }
    }

    /// Runs the blocks from this value on.
    fn run(&self, from: usize, x: &mut [f32]) {
        for (index, value) in self.values.iter().enumerate().skip(from) {
            x[index % NUMBERS] += SHARE * value;
        }
    }

    /// The moments from this value on.
    fn moments(&self, from: usize, steps: u64) -> Moments {
        Moments {
            steps,
            first: self.first[from..].to_vec(),
            second: self.second[from..].to_vec(),
        }
    }

    /// Takes the blocks from a value on out, and leaves the others.
    fn split_off(&mut self, from: usize) -> Trained {
        Trained {
            values: self.values.split_off(from),
            first: self.first.split_off(from),
            second: self.second.split_off(from),
        }
    }

    fn extend(&mut self, other: Trained) {
        self.values.extend(other.values);
        self.first.extend(other.first);
        self.second.extend(other.second);
    }
}

struct Toy {
    session: Option<ClientSession>,
    process: u32,
    main: Option<SocketId>,
    federated: Option<SocketId>,
    dark_until: Duration,
    timer: Option<Duration>,
    cursor: u64,
    examples: u64,
    trained: Trained,
    outcome: ClientOutcome,
}

/// Which way a socket leads.
#[derive(Clone, Copy)]
struct Route {
    from: Node,
    to: Node,
}

struct World {
    scenario: Scenario,
    network: Network<Own>,
    main: MainServerSession,
    federated: FederatedServerSession,
    control: Option<ControlSession>,
    control_socket: Option<SocketId>,
    timers: [Option<Duration>; 3],
    routes: Vec<Route>,
    toys: Vec<Toy>,
    /// Clients by the numbers the main server gave them.
    numbers: BTreeMap<ClientId, usize>,
    /// In the run, as the main server says.
    present: BTreeSet<ClientId>,
    /// Left since the current round began, as the main server says.
    departed: BTreeSet<ClientId>,
    members: Vec<ClientId>,
    uploads: BTreeMap<(RoundKey, usize), AdapterInput>,
    /// What the main server gave to the averages.
    copies: BTreeMap<RoundKey, Vec<f32>>,
    /// Blocks below the main server's.
    split: u32,
    /// Clients' own cuts.
    cuts: BTreeMap<ClientId, u32>,
    /// Of the blocks that some client has.
    average: Vec<f32>,
    /// The main server's blocks.
    blocks: Trained,
    server: f64,
    outcome: Outcome,
}

/// Runs a scenario to its end.
pub fn simulate(scenario: &Scenario) -> Outcome {
    let mut world = World::new(scenario.clone());
    world.run();
    world.outcome.elapsed = world.network.now;
    let below = &world.average[..world.split as usize * NUMBERS];
    world.outcome.model = [below, &world.blocks.values].concat();
    world.outcome.adapter = world.average;
    world.outcome.server = world.server;
    world.outcome.traffic = world.network.traffic;
    world.outcome.clients = world
        .toys
        .into_iter()
        .map(|toy| ClientOutcome {
            adapter: toy.trained.values,
            ..toy.outcome
        })
        .collect();
    world.outcome
}

/// Every process reads another clock.
fn skew(node: Node) -> Duration {
    match node {
        Node::Main | Node::Control => Duration::from_secs(5000),
        Node::Federated => Duration::from_secs(77),
        Node::Client(client) => Duration::from_millis(123_457 * (client as u64 + 1)),
    }
}

/// Of all blocks.
fn initial_adapter() -> Vec<f32> {
    (0..NUMBERS * BLOCKS).map(|index| 0.5 - 0.125 * index as f32).collect()
}

fn assignment(scenario: &Scenario, split: u32) -> Assignment {
    Assignment {
        run: RunId([3; 16]),
        number: 0,
        config: RunConfig {
            split,
            rank: 4,
            alpha: 8.0,
            targets: vec!["c_attn".to_owned()],
            weights: Format::F32,
            wire: WireForm::F32,
            batch: BATCH,
            seq: SEQ,
            width: WIDTH,
            vocab: VOCAB,
            seed: scenario.seed,
            shuffle: true,
            local_steps: scenario.local_steps,
            rounds: scenario.rounds,
            optimizer: OptimizerSettings {
                lr: 0.1,
                weight_decay: 0.0,
                schedule: Schedule::Constant,
                warmup: 0,
                total_steps: u64::from(scenario.rounds * scenario.local_steps),
                clip: None,
            },
            moments: MomentPolicy::Keep,
        },
        model_config: "{}".to_owned(),
        weights: Vec::new(),
        tokenizer: Vec::new(),
        adapter_len: u64::from(split) * NUMBERS as u64,
    }
}

fn to_tensor(values: &[f32]) -> WireTensor {
    let layout = WireLayout {
        form: WireForm::F32,
        batch: BATCH,
        seq: SEQ,
        width: WIDTH,
    };
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    WireTensor::new(layout, bytes).expect("the toy's tensors have one size")
}

fn from_tensor(tensor: &WireTensor) -> Vec<f32> {
    let words = tensor.bytes().as_chunks::<4>().0;
    words.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

impl World {
    fn new(scenario: Scenario) -> World {
        let secret = Some("open sesame".to_owned());
        let digest = |text: &str| Digest::of(text.as_bytes());
        let main = MainServerSession::new(
            MainConfig {
                version: PROTOCOL_VERSION,
                run: RunId([3; 16]),
                ticket_key: [5; 32],
                ticket_lifetime: Duration::from_secs(12 * 3600),
                secret: secret.clone(),
                clients: scenario.needed,
                max_clients: 1000,
                placement: Placement {
                    assignment: assignment(&scenario, 1),
                    adapter: initial_adapter()[..NUMBERS].to_vec(),
                    moments: None,
                    cuts: BTreeMap::new(),
                },
                largest_update: (3 * BLOCKS * NUMBERS) as u64,
                plans: !(scenario.splits.is_empty() && scenario.cuts.is_empty()),
                model: digest("model"),
                tokenizer: digest("tokenizer"),
                federated_url: None,
                ping_interval: crate::protocol::PING_INTERVAL,
                wait_for_client: scenario.wait_for_client,
            },
            skew(Node::Main),
        )
        .expect("the toy run is well configured");
        let control_access = if scenario.remote_control {
            ControlAccess::Remote { secret: secret.clone() }
        } else {
            ControlAccess::Local
        };
        let federated = FederatedServerSession::new(FederatedConfig {
            version: PROTOCOL_VERSION,
            control: control_access,
            max_clients: 1000,
            ping_interval: crate::protocol::PING_INTERVAL,
        });
        let control = scenario.remote_control.then(|| {
            let config = ControlConfig {
                version: PROTOCOL_VERSION,
                name: "main".to_owned(),
                secret,
                retries: 1000,
            };
            ControlSession::new(config, skew(Node::Control))
        });
        let toys = (0..scenario.clients)
            .map(|_| Toy {
                session: None,
                process: 0,
                main: None,
                federated: None,
                dark_until: Duration::ZERO,
                timer: None,
                cursor: 0,
                examples: 0,
                trained: Trained::default(),
                outcome: ClientOutcome {
                    finished: None,
                    failed: None,
                    adapter: Vec::new(),
                    installed: Vec::new(),
                    forwards: 0,
                    backwards: 0,
                    assigned: 0,
                },
            })
            .collect();
        let mut network = Network::new(scenario.seed, scenario.weather);
        for client in 0..scenario.clients {
            let is_start = |(_, fault): &(Duration, Fault)| *fault == Fault::Start(client);
            if !scenario.faults.iter().any(is_start) {
                network.schedule(Duration::ZERO, Own::Fault(Fault::Start(client)));
            }
        }
        for (at, fault) in &scenario.faults {
            network.schedule(*at, Own::Fault(*fault));
        }
        World {
            network,
            main,
            federated,
            control,
            control_socket: None,
            timers: [None; 3],
            routes: Vec::new(),
            toys,
            numbers: BTreeMap::new(),
            present: BTreeSet::new(),
            departed: BTreeSet::new(),
            members: Vec::new(),
            uploads: BTreeMap::new(),
            copies: BTreeMap::new(),
            split: 1,
            cuts: BTreeMap::new(),
            average: initial_adapter()[..NUMBERS].to_vec(),
            blocks: Trained::new(initial_adapter()[NUMBERS..].to_vec()),
            server: 1.0,
            outcome: Outcome {
                end: None,
                drained: false,
                elapsed: Duration::ZERO,
                adapter: Vec::new(),
                model: Vec::new(),
                server: 0.0,
                steps: 0,
                rounds: Vec::new(),
                measured: Vec::new(),
                history: Vec::new(),
                clients: Vec::new(),
                traffic: Traffic::default(),
                violations: Vec::new(),
            },
            scenario,
        }
    }

    fn run(&mut self) {
        self.settle();
        while !self.is_over()
            && let Some(happening) = self.network.next()
            && self.network.now <= self.scenario.time_limit
        {
            match happening {
                Happening::Arrival { socket, end, arrival } => self.arrive(socket, end, arrival),
                Happening::Own(own) => self.handle(own),
            }
            self.settle();
        }
    }

    /// The servers are done, and so is every client that still runs.
    fn is_over(&self) -> bool {
        let client_over =
            |toy: &Toy| toy.session.is_none() || toy.outcome.finished.is_some() || toy.outcome.failed.is_some();
        self.outcome.drained && self.toys.iter().all(client_over)
    }

    fn now(&self, node: Node) -> Duration {
        self.network.now + skew(node)
    }

    fn violation(&mut self, text: String) {
        self.outcome
            .violations
            .push(format!("at {:?}: {text}", self.network.now));
    }

    // What happens.

    fn arrive(&mut self, socket: SocketId, end: End, arrival: Arrival) {
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

    fn handle(&mut self, own: Own) {
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
            Own::Planned(occasion) => self.plan(occasion),
            Own::Copied { round, values } => {
                let now = self.now(Node::Main);
                if let Err(error) = self.main.copy(now, round, values) {
                    self.violation(error.to_string());
                }
            }
            Own::Stepped {
                key,
                outputs,
                server,
                blocks,
            } => {
                let now = self.now(Node::Main);
                self.server = server;
                self.blocks = blocks;
                self.outcome.steps += 1;
                if let Err(error) = self.main.step_result(now, key, outputs) {
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

    /// Answers what is to hold next.
    fn plan(&mut self, occasion: Occasion) {
        let now = self.now(Node::Main);
        let split = match occasion {
            Occasion::Start => {
                let placement = match self.scenario.cuts.is_empty() {
                    true => self.recut(self.scenario.split(0), None),
                    false => Some(self.place()),
                };
                if let Some(placement) = placement
                    && let Err(error) = self.main.place(now, placement)
                {
                    self.violation(error.to_string());
                }
                None
            }
            Occasion::Boundary(round) if self.scenario.cuts.is_empty() => Some(self.scenario.split(round.round + 1)),
            Occasion::Boundary(_) | Occasion::Membership => None,
        };
        let status = self.main.status();
        let rates = status
            .clients
            .iter()
            .filter_map(|client| Some((client.client, self.scenario.rates?)));
        let plan = RoundPlan {
            split,
            rates: rates.collect(),
        };
        if let Err(error) = self.main.planned(now, Some(plan)) {
            self.violation(error.to_string());
        }
    }

    /// Gives the clients that are there their own cuts.
    fn place(&mut self) -> Placement {
        let status = self.main.status();
        let ready = status.clients.iter().filter(|client| client.ready);
        self.cuts = ready
            .filter_map(|client| {
                let number = self.numbers.get(&client.client)?;
                Some((client.client, *self.scenario.cuts.get(*number)?))
            })
            .collect();
        self.split = self.cuts.values().copied().min().unwrap_or(1);
        let largest = self.cuts.values().copied().max().unwrap_or(1);
        self.average = initial_adapter()[..largest as usize * NUMBERS].to_vec();
        self.blocks = Trained::new(initial_adapter()[self.split as usize * NUMBERS..].to_vec());
        Placement {
            assignment: assignment(&self.scenario, largest),
            adapter: self.average.clone(),
            moments: None,
            cuts: self.cuts.clone(),
        }
    }

    /// Moves the cut. `moments` are those of the blocks that come to the main server.
    fn recut(&mut self, split: u32, moments: Option<Moments>) -> Option<Placement> {
        if split == self.split {
            return None;
        }
        self.split = split;
        let (old, new) = (self.average.len(), split as usize * NUMBERS);
        let mut going = None;
        if new < old {
            let mut blocks = Trained::new(self.average.split_off(new));
            if let Some(moments) = moments {
                (blocks.first, blocks.second) = (moments.first, moments.second);
            }
            blocks.extend(std::mem::take(&mut self.blocks));
            self.blocks = blocks;
        } else {
            let kept = self.blocks.split_off(new - old);
            let given = std::mem::replace(&mut self.blocks, kept);
            going = Some(given.moments(0, self.outcome.steps));
            self.average.extend(given.values);
        }
        Some(Placement {
            assignment: assignment(&self.scenario, split),
            adapter: self.average.clone(),
            moments: going,
            cuts: BTreeMap::new(),
        })
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
        toy.session = Some(ClientSession::new(
            ClientConfig {
                version: PROTOCOL_VERSION,
                name: format!("{client}"),
                capabilities: Capabilities {
                    forms: vec![WireForm::F32],
                    memory_bytes: 0,
                    device: "toy".to_owned(),
                },
                model: None,
                tokenizer: None,
                secret: Some("open sesame".to_owned()),
                retries: 20,
            },
            now,
        ));
    }

    // What clients compute.

    fn process(&mut self, client: usize, process: u32) -> Option<&mut ClientSession> {
        let toy = &mut self.toys[client];
        if toy.process == process {
            toy.session.as_mut()
        } else {
            None
        }
    }

    fn forward(&mut self, client: usize, process: u32, key: StepKey, took: Duration) {
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

    fn backward(&mut self, client: usize, process: u32, key: StepKey, took: Duration, gradient: &WireTensor) {
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

    fn handle_client_event(&mut self, client: usize, event: ClientEvent) {
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
                self.network.schedule(self.network.now + took, own);
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
                self.network.schedule(self.network.now + took, own);
            }
            ClientEvent::UploadAdapter { round, split, steps } => {
                let now = self.now(Node::Client(client));
                let toy = &mut self.toys[client];
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
            ClientEvent::Finished(reason) => self.toys[client].outcome.finished = Some(reason),
            ClientEvent::Failed(failure) => self.toys[client].outcome.failed = Some(failure),
            ClientEvent::ConnectionLost { .. } | ClientEvent::RoundStarted { .. } | ClientEvent::RoundResult(_) => {}
        }
    }

    // What the main server computes, and what must hold.

    fn handle_main_event(&mut self, event: MainEvent) {
        let at = self.network.now;
        match event {
            MainEvent::ClientJoined { client, name, .. } => {
                let number = name.parse().unwrap_or(usize::MAX);
                self.numbers.insert(client, number);
                self.present.insert(client);
                self.outcome.history.push((at, Phase::Joined(number)));
            }
            MainEvent::ClientLeft { client, .. } => {
                if !self.present.remove(&client) {
                    self.violation(format!("{client} left without having joined"));
                }
                self.departed.insert(client);
                self.outcome.history.push((at, Phase::Left(self.numbers[&client])));
            }
            MainEvent::RoundStarted { members, round } => {
                if let Some(absent) = members.iter().find(|client| !self.present.contains(client)) {
                    self.violation(format!("{round} began with {absent}, who has left"));
                }
                self.members = members;
                self.departed.clear();
            }
            MainEvent::StepReady { key, contributions } => self.compute_step(key, &contributions),
            MainEvent::StepMeasured { key, clients } => self.outcome.measured.push((key, clients)),
            MainEvent::PlanWanted { occasion } => {
                let at = at + self.network.pause(self.scenario.compute);
                self.network.schedule(at, Own::Planned(occasion));
            }
            MainEvent::CopyWanted { round } => {
                let shared = self.average.len() - self.split as usize * NUMBERS;
                let values = self.blocks.values[..shared].to_vec();
                self.copies.insert(round, values.clone());
                let at = at + self.network.pause(self.scenario.compute);
                self.network.schedule(at, Own::Copied { round, values });
            }
            MainEvent::RoundClosed {
                round,
                average,
                moments,
                split,
                included,
                excluded,
                collected,
            } => {
                let record = RoundRecord {
                    round,
                    at,
                    members: Vec::new(),
                    included: Vec::new(),
                    excluded: Vec::new(),
                    average: average.clone(),
                    moments: moments.clone(),
                    collected,
                };
                self.check_round(record, &included, &excluded);
                let shared = &average[self.split as usize * NUMBERS..];
                self.blocks.values[..shared.len()].copy_from_slice(shared);
                self.average = average;
                let placement = self.recut(split, moments).map(Box::new);
                let at = at + self.network.pause(self.scenario.compute);
                self.network.schedule(at, Own::Validated { round, placement });
            }
            MainEvent::RoundLost { round } => self.outcome.history.push((at, Phase::Lost(round))),
            MainEvent::Waiting { .. } => self.outcome.history.push((at, Phase::Waiting)),
            MainEvent::Finished { reason } => self.outcome.end = Some(reason),
            MainEvent::Drained => self.outcome.drained = true,
            MainEvent::ClientRefused { .. } | MainEvent::ClientReady { .. } => {}
        }
    }

    fn compute_step(&mut self, key: StepKey, contributions: &[Contribution]) {
        let weights: f64 = contributions.iter().map(|contribution| contribution.weight).sum();
        if (weights - 1.0).abs() > 1e-12 {
            self.violation(format!("the weights of {key} add up to {weights}"));
        }
        let clients: BTreeSet<ClientId> = contributions.iter().map(|contribution| contribution.client).collect();
        if clients.len() != contributions.len() {
            self.violation(format!("somebody contributes twice to {key}"));
        }
        if let Some(gone) = clients.iter().find(|client| !self.present.contains(client)) {
            self.violation(format!("{gone} contributes to {key} but has left"));
        }
        let expected: BTreeSet<ClientId> = self
            .members
            .iter()
            .filter(|member| !self.departed.contains(member))
            .copied()
            .collect();
        if clients != expected {
            self.violation(format!(
                "{key} has contributions of {clients:?}, its members are {expected:?}"
            ));
        }
        let mut server = self.server;
        let mut blocks = self.blocks.clone();
        let mut d_blocks = vec![0.0; blocks.values.len()];
        let mut outputs = Vec::new();
        for contribution in contributions {
            let split = self.cuts.get(&contribution.client).copied().unwrap_or(self.split);
            if contribution.split != split {
                self.violation(format!(
                    "{} contributes at a cut after {}",
                    contribution.client, contribution.split
                ));
            }
            let mut activations = from_tensor(&contribution.activations);
            let entry = (split - self.split) as usize * NUMBERS;
            self.blocks.run(entry, &mut activations);
            let mean = activations.iter().map(|value| f64::from(*value)).sum::<f64>() / activations.len() as f64;
            server -= 0.01 * contribution.weight * mean;
            let d_activations: Vec<f32> = activations.iter().map(|value| 0.5 * value).collect();
            for (sum, value) in d_blocks[entry..].iter_mut().zip(d_activations.iter().cycle()) {
                *sum += contribution.weight as f32 * value;
            }
            outputs.push(GradientOutput {
                client: contribution.client,
                loss: mean.abs() as f32,
                gradient: to_tensor(&d_activations),
            });
        }
        blocks.step(|index| d_blocks[index]);
        let at = self.network.now + self.network.pause(self.scenario.compute);
        let own = Own::Stepped {
            key,
            outputs,
            server,
            blocks,
        };
        self.network.schedule(at, own);
    }

    fn check_round(&mut self, record: RoundRecord, included: &[Inclusion], excluded: &[Exclusion]) {
        let RoundRecord {
            round,
            average,
            moments,
            ..
        } = &record;
        let round = *round;
        let number = |client: &ClientId| self.numbers.get(client).copied().unwrap_or(usize::MAX);
        let uploads: Option<Vec<&AdapterInput>> = included
            .iter()
            .map(|member| {
                self.uploads
                    .get(&(round, number(&member.client)))
                    .filter(|input| input.examples == member.examples)
            })
            .collect();
        let mut found = Vec::new();
        // With two processes, word that somebody left can cross the closing of the round.
        if !self.scenario.remote_control
            && let Some(gone) = included.iter().find(|member| self.departed.contains(&member.client))
        {
            found.push(format!("{round} has the adapter of {}, who has left", gone.client));
        }
        if let Some(other) = included.iter().find(|member| !self.members.contains(&member.client)) {
            found.push(format!("{round} has the adapter of {}, who is no member", other.client));
        }
        match uploads {
            None => found.push(format!("{round} has an adapter that was never sent")),
            Some(uploads) => {
                let copy = self.copies.get(&round).map_or(&[][..], Vec::as_slice);
                let values: Vec<(u64, &[f32])> = (uploads.iter())
                    .map(|input| (input.examples, input.values.as_slice()))
                    .collect();
                let mean = |part: &dyn Fn(&AdapterInput) -> Option<Vec<f32>>| {
                    let parts: Option<Vec<(u64, Vec<f32>)>> = uploads
                        .iter()
                        .map(|input| Some((input.examples, part(input)?)))
                        .collect();
                    let parts = parts?;
                    let weighted: Vec<(u64, &[f32])> = parts
                        .iter()
                        .map(|(examples, values)| (*examples, values.as_slice()))
                        .collect();
                    weighted_mean(&weighted).ok()
                };
                let expected = [
                    mean_of_prefixes(&values, self.average.len(), copy).ok(),
                    mean(&|input| Some(input.moments.as_ref()?.first.clone())),
                    mean(&|input| Some(input.moments.as_ref()?.second.clone())),
                ];
                let given = [
                    Some(average.clone()),
                    moments.as_ref().map(|moments| moments.first.clone()),
                    moments.as_ref().map(|moments| moments.second.clone()),
                ];
                if expected != given {
                    found.push(format!("the average of {round} is {given:?}, not {expected:?}"));
                }
            }
        }
        let record = RoundRecord {
            members: self.members.iter().map(number).collect(),
            included: included
                .iter()
                .map(|member| (number(&member.client), member.examples))
                .collect(),
            excluded: excluded
                .iter()
                .map(|exclusion| (number(&exclusion.client), exclusion.reason))
                .collect(),
            ..record
        };
        self.outcome.rounds.push(record);
        for text in found {
            self.violation(text);
        }
    }

    // Draining the sessions.

    fn settle(&mut self) {
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
        while let Some(transmit) = self.main.poll_transmit() {
            moved = true;
            self.transmit_from_server(transmit);
        }
        while let Some(transmit) = self.federated.poll_transmit() {
            moved = true;
            self.transmit_from_server(transmit);
        }
        while let Some(event) = self.main.poll_event() {
            moved = true;
            self.handle_main_event(event);
        }
        while self.federated.poll_event().is_some() {
            moved = true;
        }
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
                ControlEvent::ConnectionLost { .. } => {}
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
            let Some(session) = &mut self.toys[client].session else {
                return moved;
            };
            if let Some(transmit) = session.poll_transmit() {
                moved = true;
                self.transmit_from_client(client, transmit);
            } else if let Some(event) = session.poll_event() {
                moved = true;
                self.handle_client_event(client, event);
            } else {
                return moved;
            }
        }
    }

    fn transmit_from_client(&mut self, client: usize, transmit: Transmit<Endpoint>) {
        let toy = &mut self.toys[client];
        let (Transmit::Frame { to, .. } | Transmit::Close { to }) = &transmit;
        let slot = match to {
            Endpoint::Main => &mut toy.main,
            Endpoint::Federated => &mut toy.federated,
        };
        let Some(socket) = *slot else { return };
        match transmit {
            Transmit::Frame { bytes, .. } => self.network.send(socket, End::Dialler, bytes),
            Transmit::Close { .. } => {
                *slot = None;
                self.network.close(socket, End::Dialler);
            }
        }
    }

    /// Wakes every session when it asks to be woken. An earlier alarm still rings; a session wakes for nothing, then.
    fn set_timers(&mut self) {
        let mut due = vec![
            (Node::Main, self.main.poll_timeout()),
            (Node::Federated, self.federated.poll_timeout()),
            (
                Node::Control,
                self.control.as_ref().and_then(ControlSession::poll_timeout),
            ),
        ];
        due.extend(self.toys.iter().enumerate().map(|(client, toy)| {
            (
                Node::Client(client),
                toy.session.as_ref().and_then(ClientSession::poll_timeout),
            )
        }));
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
