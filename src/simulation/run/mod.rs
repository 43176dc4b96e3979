//! A training run of toy clients over the real sessions.
//!
//! Separate from `network` because this is a driver, the third beside the native and the browser one: it answers the
//! sessions' events, and checks what must hold of every run whatever the weather.
//!
//! | file | holds |
//! |---|---|
//! | `happening` | what the network and the clock do to the processes |
//! | `disk` | what the main server keeps, and its death and return |
//! | `client`, `server` | what they compute, and what must hold |
//! | `settle` | what they say |

mod client;
mod disk;
mod happening;
mod server;
mod settle;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Duration;

use disk::Disk;

use super::network::{End, Happening, Network, SocketId, Traffic};
use super::outcome::{ClientOutcome, Outcome};
use super::scenario::{Fault, Scenario};
use super::toy::{BLOCKS, NUMBERS, Trained, assignment, initial_adapter, rule};
use crate::client::edge::{Edge, Task};
use crate::federated::Exact;
use crate::protocol::message::PROTOCOL_VERSION;
use crate::protocol::{
    AdapterInput, ControlAccess, ControlConfig, ControlSession, FederatedConfig, FederatedServerSession,
    GradientOutput, MainConfig, MainServerSession, Occasion, Placement,
};
use crate::terms::ids::{ClientId, RoundKey, StepKey};

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
    Fetched {
        client: usize,
        process: u32,
        number: u64,
    },
    Computed {
        client: usize,
        process: u32,
        task: Box<Task>,
        took: Duration,
    },
    Contributed {
        key: StepKey,
        output: GradientOutput,
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
    /// Something of the main server's process with this number.
    OfServer {
        process: u32,
        own: Box<Own>,
    },
    /// The main server is started again.
    Revive,
}

/// What a contribution comes to at the main server.
struct Lane {
    tokens: u64,
    mean: f64,
    /// Of the first value that this is added to.
    entry: usize,
    d_activations: Vec<f32>,
}

struct Toy {
    edge: Option<Edge<Infallible>>,
    process: u32,
    main: Option<SocketId>,
    federated: Option<SocketId>,
    dark_until: Duration,
    stalled_until: Duration,
    timer: Option<Duration>,
    cursor: u64,
    examples: u64,
    trained: Trained,
    /// What outlives the process.
    kept: Option<Vec<u8>>,
    /// What its machines have asked for.
    outputs: u64,
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
    /// The open step, and what has been computed of it.
    step: Option<StepKey>,
    lanes: BTreeMap<ClientId, Lane>,
    /// When the main server has computed what it was given so far.
    busy_until: Duration,
    /// Which process of the main server this is, and whether it is running.
    process: u32,
    is_down: bool,
    disk: Disk,
    uploads: BTreeMap<(RoundKey, usize), AdapterInput>,
    /// What the main server gave to the averages.
    copies: BTreeMap<RoundKey, Vec<f32>>,
    /// Blocks below the main server's.
    split: u32,
    /// Clients' own cuts.
    cuts: BTreeMap<ClientId, u32>,
    /// Of the blocks that some client has.
    average: Vec<f32>,
    /// What is saved instead of it, where that is more.
    exact: Option<Exact>,
    /// The main server's blocks.
    blocks: Trained,
    server: f64,
    /// Both as they were when the round began.
    before: (Trained, f64),
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

fn secret() -> Option<String> {
    Some("open sesame".to_owned())
}

fn main_config(scenario: &Scenario, placement: Placement) -> MainConfig {
    MainConfig {
        secret: secret(),
        largest_update: (3 * BLOCKS * NUMBERS) as u64,
        plans: !(scenario.splits.is_empty() && scenario.cuts.is_empty()),
        wait_for_client: scenario.wait_for_client,
        deadline: scenario.deadline,
        quorum: scenario.quorum,
        ..MainConfig::new(placement, [5; 32], scenario.needed)
    }
}

fn federated_server(scenario: &Scenario) -> FederatedServerSession {
    FederatedServerSession::new(FederatedConfig {
        control: match scenario.remote_control {
            true => ControlAccess::Remote { secret: secret() },
            false => ControlAccess::Local,
        },
        ..FederatedConfig::default()
    })
}

fn control(scenario: &Scenario, now: Duration) -> Option<ControlSession> {
    scenario.remote_control.then(|| {
        let config = ControlConfig {
            version: PROTOCOL_VERSION,
            name: "main".to_owned(),
            secret: secret(),
            retries: 1000,
        };
        ControlSession::new(config, now)
    })
}

impl World {
    fn new(scenario: Scenario) -> World {
        let placement = Placement {
            rule: Some(rule(scenario.aggregation)),
            ..Placement::new(assignment(&scenario, 1), initial_adapter()[..NUMBERS].to_vec())
        };
        let main = MainServerSession::new(main_config(&scenario, placement), skew(Node::Main))
            .expect("the toy run is well configured");
        let federated = federated_server(&scenario);
        let control = control(&scenario, skew(Node::Control));
        let toys = (0..scenario.clients)
            .map(|_| Toy {
                edge: None,
                process: 0,
                main: None,
                federated: None,
                dark_until: Duration::ZERO,
                stalled_until: Duration::ZERO,
                timer: None,
                cursor: 0,
                examples: 0,
                trained: Trained::default(),
                kept: None,
                outputs: 0,
                outcome: ClientOutcome {
                    finished: None,
                    failed: None,
                    adapter: Vec::new(),
                    installed: Vec::new(),
                    forwards: 0,
                    backwards: 0,
                    assigned: 0,
                    identities: Vec::new(),
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
            step: None,
            lanes: BTreeMap::new(),
            busy_until: Duration::ZERO,
            process: 0,
            is_down: false,
            disk: Disk::default(),
            uploads: BTreeMap::new(),
            copies: BTreeMap::new(),
            split: 1,
            cuts: BTreeMap::new(),
            average: initial_adapter()[..NUMBERS].to_vec(),
            blocks: Trained::new(initial_adapter()[NUMBERS..].to_vec()),
            server: 1.0,
            before: (Trained::default(), 0.0),
            exact: None,
            outcome: Outcome {
                end: None,
                drained: false,
                elapsed: Duration::ZERO,
                adapter: Vec::new(),
                model: Vec::new(),
                server: 0.0,
                steps: 0,
                rounds: Vec::new(),
                partial: Vec::new(),
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
        self.keep_round(0, self.main.placement().clone());
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
            |toy: &Toy| toy.edge.is_none() || toy.outcome.finished.is_some() || toy.outcome.failed.is_some();
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
}
