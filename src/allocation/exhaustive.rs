//! Small links: every ownership, and where that is too many, branch and bound on contested subchannels.

use super::bound::{EXACT, Ladders};
use super::channel::Channel;
use super::ownership::Found;
use super::power::{Demand, Holdings, fastest_s, ln_least_power};

/// Tries every ownership that gives each client a subchannel, against the best so far.
pub(super) fn enumerate(channel: &Channel, demand: &Demand, owner: &mut Vec<usize>, upper_s: &mut f64) {
    let (clients, subchannels) = (channel.clients(), channel.subchannels);
    let mut all = Enumeration {
        channel,
        demand,
        power_w: Vec::new(),
        chosen: vec![0; clients],
        owner,
        upper_s,
    };
    all.tabulate();
    all.choose(0, (1_u32 << subchannels) - 1, 0.0);
}

struct Enumeration<'a> {
    channel: &'a Channel,
    demand: &'a Demand,
    /// `[client][set of subchannels]`: least power just below the best time, infinite above the client's cap.
    power_w: Vec<Vec<f64>>,
    chosen: Vec<u32>,
    owner: &'a mut Vec<usize>,
    upper_s: &'a mut f64,
}

impl Enumeration<'_> {
    fn tabulate(&mut self) {
        let channel = self.channel;
        let deadline_s = *self.upper_s * (1.0 - EXACT);
        self.power_w = (0..channel.clients())
            .map(|client| {
                let nats = self.demand.nats(client, channel.bandwidth_hz, deadline_s);
                let mut order: Vec<usize> = (0..channel.subchannels).collect();
                order.sort_by(|&a, &b| {
                    channel
                        .snr_per_watt(client, b)
                        .total_cmp(&channel.snr_per_watt(client, a))
                });
                let mut ln_gain = Vec::with_capacity(channel.subchannels);
                (0..1_u32 << channel.subchannels)
                    .map(|set| {
                        ln_gain.clear();
                        ln_gain.extend(
                            order
                                .iter()
                                .filter(|&&subchannel| set >> subchannel & 1 == 1)
                                .map(|&subchannel| channel.snr_per_watt(client, subchannel).ln()),
                        );
                        let power = ln_least_power(&ln_gain, nats).exp();
                        match power <= channel.power_max_w[client] {
                            true => power,
                            false => f64::INFINITY,
                        }
                    })
                    .collect()
            })
            .collect();
    }

    fn choose(&mut self, client: usize, free: u32, total_w: f64) {
        if client + 1 == self.channel.clients() {
            self.chosen[client] = free;
            if total_w + self.power_w[client][free as usize] <= self.channel.power_total_w {
                self.found();
            }
            return;
        }
        let mut set = free;
        loop {
            let total_w = total_w + self.power_w[client][set as usize];
            if total_w <= self.channel.power_total_w {
                self.chosen[client] = set;
                self.choose(client + 1, free & !set, total_w);
            }
            if set == 0 {
                return;
            }
            set = (set - 1) & free;
        }
    }

    fn found(&mut self) {
        let mut owner = vec![0; self.channel.subchannels];
        for (client, set) in self.chosen.iter().enumerate() {
            for (subchannel, owner) in owner.iter_mut().enumerate() {
                if set >> subchannel & 1 == 1 {
                    *owner = client;
                }
            }
        }
        let reached = fastest_s(self.channel, self.demand, &Holdings::new(self.channel, &owner));
        if let Some(reached) = reached
            && reached < *self.upper_s
        {
            *self.upper_s = reached;
            *self.owner = owner;
            self.tabulate();
        }
    }
}

/// Deadlines at which [`branch`] tries to settle the matter.
const BRANCH_DEADLINES: usize = 12;

/// Branch and bound on who owns contested subchannels, within a limit of nodes: it raises the lower bound where the count bound
/// is loose, and finds what the local search did not. Worth its time on links of a few clients.
pub(super) fn branch(ladders: &Ladders<'_>, demand: &Demand, found: &mut Found) {
    let channel = ladders.channel();
    if channel.clients() * channel.subchannels > BRANCHED {
        return;
    }
    let mut step = 0.5;
    for _ in 0..BRANCH_DEADLINES {
        if found.upper_s - found.lower_s <= 1e-4 * found.upper_s {
            break;
        }
        let target_s = found.lower_s + step * (found.upper_s - found.lower_s);
        let mut tree = Tree {
            channel,
            demand,
            deadline_s: target_s,
            nodes: BRANCH_NODES,
        };
        match tree.explore(ladders) {
            Answer::Impossible => found.lower_s = target_s,
            Answer::Owner(owner) => match fastest_s(channel, demand, &Holdings::new(channel, &owner)) {
                Some(reached) if reached < found.upper_s => (found.owner, found.upper_s) = (owner, reached),
                _ => step *= 0.5,
            },
            Answer::Unknown => {
                step *= 0.5;
                if step < 0.05 {
                    break;
                }
            }
        }
    }
}

/// Links of more clients × subchannels are not branched on.
const BRANCHED: usize = 400;
/// Nodes of the tree for one deadline.
const BRANCH_NODES: usize = 600;

enum Answer {
    Impossible,
    Owner(Vec<usize>),
    Unknown,
}

struct Tree<'a> {
    channel: &'a Channel,
    demand: &'a Demand,
    deadline_s: f64,
    /// Left to open.
    nodes: usize,
}

impl Tree<'_> {
    /// Whether the deadline can be met when each client may have only the subchannels on its ladder.
    fn explore(&mut self, ladders: &Ladders<'_>) -> Answer {
        if self.nodes == 0 {
            return Answer::Unknown;
        }
        self.nodes -= 1;
        let Some(counts) = ladders.counts(self.demand, self.deadline_s) else {
            return Answer::Impossible;
        };
        let subchannels = self.channel.subchannels;
        let mut claims = vec![Vec::new(); subchannels];
        for (client, &count) in counts.iter().enumerate() {
            for &subchannel in ladders.order(client).unwrap_or_default().iter().take(count) {
                claims[subchannel as usize].push(client);
            }
        }
        let contested = (0..subchannels).max_by_key(|&subchannel| claims[subchannel].len());
        let Some(subchannel) = contested.filter(|&subchannel| claims[subchannel].len() > 1) else {
            // Nobody shares: this is an ownership.
            return Answer::Owner(self.complete(&claims));
        };
        let claimants = claims[subchannel].clone();
        let mut unknown = false;
        // One of the claimants has it, or none of them.
        for keeper in claimants.iter().copied().map(Some).chain([None]) {
            if keeper.is_none() && claimants.len() == self.channel.clients() {
                continue;
            }
            let without: Vec<usize> = match keeper {
                // A client without a payload claims nothing and may end with an empty ladder.
                Some(keeper) => (0..self.channel.clients())
                    .filter(|&client| client != keeper && self.demand.payload_bits[client] > 0.0)
                    .collect(),
                None => claimants.clone(),
            };
            let answer = match ladders.without(&without, subchannel) {
                Some(narrowed) => self.explore(&narrowed),
                None => Answer::Impossible,
            };
            match answer {
                Answer::Impossible => {}
                Answer::Owner(owner) => return Answer::Owner(owner),
                Answer::Unknown => unknown = true,
            }
            if self.nodes == 0 {
                return Answer::Unknown;
            }
        }
        match unknown {
            true => Answer::Unknown,
            false => Answer::Impossible,
        }
    }

    /// The claimed subchannels with their claimants, the others with whoever hears best there.
    fn complete(&self, claims: &[Vec<usize>]) -> Vec<usize> {
        (claims.iter().enumerate())
            .map(|(subchannel, claimants)| match claimants.first() {
                Some(&client) => client,
                None => {
                    let gain = |client: usize| self.channel.snr_per_watt(client, subchannel);
                    (0..self.channel.clients())
                        .max_by(|&a, &b| gain(a).total_cmp(&gain(b)))
                        .unwrap_or(0)
                }
            })
            .collect()
    }
}
