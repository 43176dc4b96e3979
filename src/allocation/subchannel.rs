//! Who gets which subchannel, for the shortest phase: exact on flat channels and on small ones, a target-deadline local search
//! with a certified distance to the optimum elsewhere.
//!
//! On a flat channel subchannels are alike, so only counts matter, and the bound of clients that share subchannels is reached: its
//! counts are an ownership (see [`bound`](super::bound)). With gains that differ
//! by subchannel the problem is NP-hard. There the greedy assignment of the paper is a start; then a deadline between the bound
//! and the best so far is chosen and subchannels are moved and exchanged until the powers it needs are allowed.

use super::bound::{EXACT, Ladders};
use super::channel::Channel;
use super::power::{Demand, Holdings, LinkPlan, control, fastest_s, ln_least_power, ln_water_level};

/// Ownerships that are all tried.
const ENUMERATED: f64 = 1e5;

/// An ownership with its powers, and what no other can beat.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkSolution {
    pub plan: LinkPlan,
    /// A true lower bound on `phase + weight × energy` of any plan.
    pub lower_s: f64,
}

/// How a link is solved.
#[derive(Clone, Debug)]
pub struct LinkOptions<'a> {
    /// Seconds a joule counts as; 0 for the paper's problem.
    pub energy_weight_s_per_j: f64,
    /// An ownership to start from besides the greedy one, instead of one by auction.
    pub start: Option<&'a [usize]>,
    /// A longer phase is of no use to the caller: the search may stop once it despairs of this one.
    pub useful_below_s: Option<f64>,
}

/// The best plan that is found for one link. `None` when a client with a payload cannot be heard at all.
pub fn solve(ladders: &Ladders<'_>, demand: &Demand, options: &LinkOptions<'_>) -> Option<LinkSolution> {
    let channel = ladders.channel();
    let (owner, lower_s) = match channel.is_flat() {
        true => flat(ladders, demand)?,
        false => selective(ladders, demand, options)?,
    };
    let weight = options.energy_weight_s_per_j;
    let plan = control(channel, demand, &owner, weight)?;
    if weight <= 0.0 {
        return Some(LinkSolution {
            lower_s: lower_s.min(plan.phase_s),
            plan,
        });
    }
    // Cheaper counts at longer deadlines: on a flat channel any ownership with them, elsewhere the one found.
    let mut best = plan;
    if channel.is_flat() {
        let mut deadline_s = best.phase_s;
        for _ in 0..60 {
            let Some(counts) = ladders.thrifty_counts(demand, deadline_s) else {
                break;
            };
            let found = control(channel, demand, &owner_of(&counts, channel.subchannels), weight);
            if let Some(found) = found
                && found.cost_s(weight) < best.cost_s(weight)
            {
                best = found;
            }
            deadline_s *= 1.05;
            if deadline_s > best.cost_s(weight) {
                break;
            }
        }
    }
    let lower_s = ladders.energy_bound_s(demand, weight, lower_s, best.cost_s(weight));
    Some(LinkSolution { plan: best, lower_s })
}

/// An ownership with these counts, in order; what is left over goes round.
fn owner_of(counts: &[usize], subchannels: usize) -> Vec<usize> {
    let mut owner = Vec::with_capacity(subchannels);
    for (client, &count) in counts.iter().enumerate() {
        owner.extend(std::iter::repeat_n(client, count));
    }
    let clients = counts.len();
    while owner.len() < subchannels {
        owner.push(owner.len() % clients);
    }
    owner.truncate(subchannels);
    owner
}

/// The optimum on a flat channel, where clients that share subchannels need not: only counts matter.
fn flat(ladders: &Ladders<'_>, demand: &Demand) -> Option<(Vec<usize>, f64)> {
    let relaxation = ladders.relax(demand)?;
    let owner = owner_of(&relaxation.counts, ladders.channel().subchannels);
    Some((owner, relaxation.lower_s))
}

fn selective(ladders: &Ladders<'_>, demand: &Demand, options: &LinkOptions<'_>) -> Option<(Vec<usize>, f64)> {
    let channel = ladders.channel();
    let relaxation = ladders.relax(demand)?;
    let mut found = Found {
        owner: greedy(ladders, demand),
        upper_s: f64::INFINITY,
        lower_s: relaxation.lower_s,
    };
    let time = |owner: &[usize]| fastest_s(channel, demand, &Holdings::new(channel, owner));
    found.upper_s = time(&found.owner)?;
    let mut search = Search::new(ladders, demand);
    let start = match options.start {
        Some(start) => start.to_vec(),
        None => search.auction(&found.owner, 0.5 * (found.upper_s + found.lower_s)),
    };
    if let Some(reached) = time(&start)
        && reached < found.upper_s
    {
        (found.owner, found.upper_s) = (start, reached);
    }
    let hopeful = match options.useful_below_s {
        // Whether there is anything useful at all comes first.
        Some(limit_s) if limit_s > found.lower_s && limit_s < found.upper_s => {
            search.patience /= 4;
            let reached = search.reach(&mut found, limit_s);
            search.patience *= 4;
            reached
        }
        _ => true,
    };
    if hopeful {
        search.descend(&mut found);
    }
    let (clients, subchannels) = (channel.clients() as f64, channel.subchannels as f64);
    if channel.clients() == 1 {
        // There is one ownership, and the sets of its subchannels are not to be counted.
        found.lower_s = found.lower_s.max(found.upper_s * (1.0 - EXACT));
    } else if found.is_open() && subchannels * clients.ln() <= ENUMERATED.ln() {
        enumerate(channel, demand, &mut found.owner, &mut found.upper_s);
        found.lower_s = found.lower_s.max(found.upper_s * (1.0 - EXACT));
    } else if found.is_open() {
        branch(ladders, demand, &mut found);
    }
    Some((found.owner, found.lower_s))
}

/// An ownership, the time it takes, and the time that none can beat.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub owner: Vec<usize>,
    pub upper_s: f64,
    pub lower_s: f64,
}

impl Found {
    fn is_open(&self) -> bool {
        self.lower_s < self.upper_s * (1.0 - 2.0 * EXACT)
    }
}

/// Rounds of [`auction`].
const AUCTION_ROUNDS: usize = 24;

/// The paper's greedy assignment: the client with the longest wait first takes its best subchannel, then the others; after that
/// whoever is slowest takes its best one of those left. Powers meanwhile are equal shares: each subchannel's of the link's total,
/// or each client's of its own cap where that is less.
pub(super) fn greedy(ladders: &Ladders<'_>, demand: &Demand) -> Vec<usize> {
    let channel = ladders.channel();
    let (clients, subchannels) = (channel.clients(), channel.subchannels);
    let share_w = channel.power_total_w / subchannels as f64;
    let mut owner = vec![usize::MAX; subchannels];
    let mut own: Vec<Vec<usize>> = vec![Vec::new(); clients];
    // Where in its order each client looks next.
    let mut next = vec![0; clients];
    let mut free = 0;
    let mut take = |client: usize, owner: &mut Vec<usize>| -> usize {
        match ladders.order(client) {
            None => {
                free += 1;
                free - 1
            }
            Some(order) => loop {
                let subchannel = order[next[client]] as usize;
                next[client] += 1;
                if owner[subchannel] == usize::MAX {
                    return subchannel;
                }
            },
        }
    };
    let delay_s = |client: usize, own: &[usize]| {
        let power = share_w.min(channel.power_max_w[client] / own.len() as f64);
        let nats: f64 = match channel.is_flat() {
            true => own.len() as f64 * (power * channel.snr_per_watt(client, 0)).ln_1p(),
            false => own
                .iter()
                .map(|&subchannel| (power * channel.snr_per_watt(client, subchannel)).ln_1p())
                .sum(),
        };
        demand.wait_s[client] + demand.payload_bits[client] * std::f64::consts::LN_2 / (channel.bandwidth_hz * nats)
    };
    let mut first: Vec<usize> = (0..clients).collect();
    first.sort_by(|&a, &b| demand.wait_s[b].total_cmp(&demand.wait_s[a]).then(a.cmp(&b)));
    let mut slowest = std::collections::BinaryHeap::new();
    for client in first {
        let subchannel = take(client, &mut owner);
        owner[subchannel] = client;
        own[client].push(subchannel);
        slowest.push(Slow(delay_s(client, &own[client]), client));
    }
    for _ in clients..subchannels {
        let Some(Slow(_, client)) = slowest.pop() else { break };
        let subchannel = take(client, &mut owner);
        owner[subchannel] = client;
        own[client].push(subchannel);
        slowest.push(Slow(delay_s(client, &own[client]), client));
    }
    owner
}

/// A delay in s and its client, ordered by delay.
struct Slow(f64, usize);

impl PartialEq for Slow {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Slow {}

impl PartialOrd for Slow {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Slow {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0).then_with(|| other.1.cmp(&self.1))
    }
}

/// Tries every ownership that gives each client a subchannel, against the best so far.
fn enumerate(channel: &Channel, demand: &Demand, owner: &mut Vec<usize>, upper_s: &mut f64) {
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

/// The local search for a deadline: which subchannels to move or exchange so that the powers it needs are allowed.
struct Search<'a> {
    ladders: &'a Ladders<'a>,
    channel: &'a Channel,
    demand: &'a Demand,
    /// `[client][subchannel]`: ln γ and 1/γ.
    ln_gain: Vec<Vec<f64>>,
    inverse: Vec<Vec<f64>>,
    /// `[client]`: its own cap or the link's total, in W, so that what is summed stays finite where a client has no cap.
    cap_w: Vec<f64>,
    ln_cap: Vec<f64>,
    /// Needed by the deadline.
    nats: Vec<f64>,
    owner: Vec<usize>,
    holdings: Vec<Holding>,
    /// Σ min(P_k, cap_k), in W.
    total_w: f64,
    /// Clients whose moves have not been tried since something changed for them.
    pending: Vec<usize>,
    is_pending: Vec<bool>,
    evaluations: usize,
    /// Evaluations of a move to spend on one deadline.
    patience: usize,
    random: u64,
}

/// A client's subchannels and the power it needs on them.
#[derive(Clone, Debug, Default)]
struct Holding {
    subchannels: Vec<usize>,
    /// Σ ln γ and Σ 1/γ over them.
    ln_gains: f64,
    inverses: f64,
    need: Need,
}

/// The power for what must be sent: within the cap, and what is beyond it in nepers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Need {
    capped_w: f64,
    excess: f64,
}

/// `subchannel` goes from its owner to `receiver`, which gives `back` for it.
#[derive(Clone, Copy, Debug)]
struct Move {
    subchannel: usize,
    receiver: usize,
    back: Option<usize>,
}

/// Violations that are rounding, in nepers.
const MET: f64 = 1e-13;

impl<'a> Search<'a> {
    fn new(ladders: &'a Ladders<'a>, demand: &'a Demand) -> Self {
        let channel = ladders.channel();
        let (clients, subchannels) = (channel.clients(), channel.subchannels);
        let table = |value: fn(f64) -> f64| -> Vec<Vec<f64>> {
            (0..clients)
                .map(|client| {
                    (0..subchannels)
                        .map(|subchannel| value(channel.snr_per_watt(client, subchannel)))
                        .collect()
                })
                .collect()
        };
        let cap_w: Vec<f64> = (channel.power_max_w.iter())
            .map(|power| power.min(channel.power_total_w))
            .collect();
        Self {
            ladders,
            channel,
            demand,
            ln_gain: table(f64::ln),
            inverse: table(f64::recip),
            ln_cap: cap_w.iter().map(|power| power.ln()).collect(),
            cap_w,
            nats: vec![0.0; clients],
            owner: Vec::new(),
            holdings: vec![Holding::default(); clients],
            total_w: 0.0,
            pending: Vec::new(),
            is_pending: vec![false; clients],
            evaluations: 0,
            patience: 4_000 + 3 * clients * subchannels,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// An ownership by prices: each subchannel goes to whoever it saves most power, `λ(u - 1 + e^-u)` with `u = ln(λ γ)` and `λ` the
    /// client's water level, and the levels follow what the clients got. (The dual of the time-sharing relaxation, rounded.)
    fn auction(&self, start: &[usize], deadline_s: f64) -> Vec<usize> {
        let Self {
            channel,
            demand,
            ln_gain,
            ..
        } = self;
        let clients = channel.clients();
        let nats: Vec<f64> = (0..clients)
            .map(|client| demand.nats(client, channel.bandwidth_hz, deadline_s))
            .collect();
        let mut owner = start.to_vec();
        let mut best = (f64::INFINITY, owner.clone());
        let mut ln_level = vec![0.0; clients];
        let mut own: Vec<Vec<f64>> = vec![Vec::new(); clients];
        for round in 0..AUCTION_ROUNDS {
            own.iter_mut().for_each(Vec::clear);
            for (subchannel, &client) in owner.iter().enumerate() {
                own[client].push(ln_gain[client][subchannel]);
            }
            let mut excess = 0.0;
            let mut total_w = 0.0;
            let step = if round == 0 { 1.0 } else { 0.5 };
            for client in 0..clients {
                own[client].sort_by(|a, b| b.total_cmp(a));
                let reached = match own[client].is_empty() {
                    // Nothing was cheap enough: it bids more.
                    true => ln_level[client] + 2.0,
                    false => ln_water_level(&own[client], nats[client]),
                };
                ln_level[client] += step * (reached - ln_level[client]);
                let ln_power = ln_least_power(&own[client], nats[client]);
                let ln_cap = channel.power_max_w[client].ln();
                excess += (ln_power - ln_cap).max(0.0);
                total_w += ln_power.min(ln_cap).exp();
            }
            let violation = excess + (total_w / channel.power_total_w).ln();
            if violation < best.0 {
                best = (violation, owner.clone());
            }
            let level: Vec<f64> = ln_level.iter().map(|level| level.exp()).collect();
            for (subchannel, owner) in owner.iter_mut().enumerate() {
                let mut most = (0.0, *owner);
                for client in 0..clients {
                    let reach = ln_level[client] + ln_gain[client][subchannel];
                    if reach > 0.0 {
                        let saved = level[client] * (reach - 1.0) + (-ln_gain[client][subchannel]).exp();
                        if saved > most.0 {
                            most = (saved, client);
                        }
                    }
                }
                *owner = most.1;
            }
        }
        best.1
    }

    /// Shortens the time until deadlines below it bring nothing any more.
    fn descend(&mut self, found: &mut Found) {
        let mut step = 0.5;
        while found.upper_s - found.lower_s > 1e-7 * found.upper_s && step > 1.0 / 40.0 {
            let target_s = found.upper_s - step * (found.upper_s - found.lower_s);
            if !self.reach(found, target_s) {
                step *= 0.4;
            }
        }
    }

    /// Looks for an ownership that ends by `target_s`, from the one found so far; takes a better one even if it does not. Whether
    /// it does is up to the exact power control: the search's own sums are rounded.
    fn reach(&mut self, found: &mut Found, target_s: f64) -> bool {
        self.begin(&found.owner, target_s);
        self.meet();
        if let Some(reached) = fastest_s(self.channel, self.demand, &Holdings::new(self.channel, &self.owner))
            && reached < found.upper_s
        {
            found.upper_s = reached;
            found.owner.clone_from(&self.owner);
        }
        found.upper_s <= target_s * (1.0 + EXACT)
    }

    fn begin(&mut self, owner: &[usize], deadline_s: f64) {
        self.evaluations = 0;
        for client in 0..self.channel.clients() {
            self.nats[client] = self.demand.nats(client, self.channel.bandwidth_hz, deadline_s);
        }
        self.set(owner);
    }

    fn set(&mut self, owner: &[usize]) {
        self.owner = owner.to_vec();
        self.holdings.iter_mut().for_each(|holding| holding.subchannels.clear());
        for (subchannel, &client) in owner.iter().enumerate() {
            self.holdings[client].subchannels.push(subchannel);
        }
        for client in 0..self.holdings.len() {
            self.settle(client);
            self.mark(client);
        }
    }

    fn mark(&mut self, client: usize) {
        if !self.is_pending[client] {
            self.is_pending[client] = true;
            self.pending.push(client);
        }
    }

    /// Brings what is kept about `client` up to date with its subchannels.
    fn settle(&mut self, client: usize) {
        let sum = |table: &[f64], subchannels: &[usize]| subchannels.iter().map(|&i| table[i]).sum::<f64>();
        let holding = &self.holdings[client];
        let ln_gains = sum(&self.ln_gain[client], &holding.subchannels);
        let inverses = sum(&self.inverse[client], &holding.subchannels);
        let holding = &mut self.holdings[client];
        (holding.ln_gains, holding.inverses) = (ln_gains, inverses);
        self.holdings[client].need = self.need(client, None, None);
        self.total_w = self.holdings.iter().map(|holding| holding.need.capped_w).sum();
    }

    /// What `client` would need if it lost subchannel `without` and got `with`.
    fn need(&self, client: usize, without: Option<usize>, with: Option<usize>) -> Need {
        let holding = &self.holdings[client];
        let nats = self.nats[client];
        if nats <= 0.0 {
            return Need::default();
        }
        let (gain, inverse) = (&self.ln_gain[client], &self.inverse[client]);
        let (mut count, mut ln_gains, mut inverses) = (holding.subchannels.len(), holding.ln_gains, holding.inverses);
        let mut weakest = f64::INFINITY;
        if let Some(lost) = without {
            count -= 1;
            ln_gains -= gain[lost];
            inverses -= inverse[lost];
        }
        if let Some(got) = with {
            count += 1;
            ln_gains += gain[got];
            inverses += inverse[got];
            weakest = gain[got];
        }
        for &subchannel in &holding.subchannels {
            if Some(subchannel) != without {
                weakest = weakest.min(gain[subchannel]);
            }
        }
        let ln_cap = self.ln_cap[client];
        let excessive = |excess: f64| Need {
            capped_w: self.cap_w[client],
            excess,
        };
        if count == 0 {
            return excessive(f64::INFINITY);
        }
        let ln_level = (nats - ln_gains) / count as f64;
        let ln_power = match ln_level + weakest > 0.0 {
            // With power on all of them: P = m w - Σ 1/γ.
            // Where little is left of the difference it is rounding, and the slow way is exact.
            true if ln_level < 300.0 && ln_level + weakest > 1e-3 => {
                let power = count as f64 * ln_level.exp() - inverses;
                if power <= self.cap_w[client] {
                    return Need {
                        capped_w: power,
                        excess: 0.0,
                    };
                }
                power.ln()
            }
            true if ln_level >= 300.0 => ln_level + (count as f64).ln(),
            _ => {
                let mut sorted: Vec<f64> = (holding.subchannels.iter())
                    .filter(|&&subchannel| Some(subchannel) != without)
                    .map(|&subchannel| gain[subchannel])
                    .chain(with.map(|subchannel| gain[subchannel]))
                    .collect();
                sorted.sort_unstable_by(|a, b| b.total_cmp(a));
                ln_least_power(&sorted, nats)
            }
        };
        match ln_power <= ln_cap {
            true => Need {
                capped_w: ln_power.exp(),
                excess: 0.0,
            },
            false => excessive(ln_power - ln_cap),
        }
    }

    fn total_excess(&self, total_w: f64) -> f64 {
        match total_w > self.channel.power_total_w {
            true => (total_w / self.channel.power_total_w).ln(),
            false => 0.0,
        }
    }

    /// How far the powers are beyond what is allowed, in nepers; 0 when they are allowed.
    fn violation(&self) -> f64 {
        let own: f64 = self.holdings.iter().map(|holding| holding.need.excess).sum();
        own + self.total_excess(self.total_w)
    }

    /// Moves and exchanges until the deadline is met or given up. Either way the best ownership met is left.
    fn meet(&mut self) {
        self.improve();
        let mut best = (self.violation(), self.owner.clone());
        let mut turns = 0;
        while best.0 > MET && self.evaluations < self.patience {
            // Rotations move many at once; where they have nothing left, a kick gives them something new.
            let rotated = turns % 3 != 2 && self.rotate();
            if !rotated {
                self.kick();
            }
            turns += 1;
            self.improve();
            let violation = self.violation();
            if violation <= best.0 {
                best = (violation, self.owner.clone());
            } else {
                self.go_back(&best.1);
            }
        }
    }

    /// Every client puts one of its subchannels, drawn at random, into a pot, and the pot is given back, one to each, in the best
    /// way there is: an assignment problem. Whether that changed anything.
    fn rotate(&mut self) -> bool {
        let clients = self.holdings.len();
        if self.holdings.iter().any(|holding| holding.subchannels.is_empty()) {
            return false;
        }
        let pot: Vec<usize> = (0..clients)
            .map(|client| {
                let position = self.next_random(self.holdings[client].subchannels.len());
                self.holdings[client].subchannels[position]
            })
            .collect();
        let per_watt = 1.0 / self.total_w.max(self.channel.power_total_w);
        let mut cost = Vec::with_capacity(clients * clients);
        for client in 0..clients {
            for &subchannel in &pot {
                let need = match subchannel == pot[client] {
                    true => self.holdings[client].need,
                    false => self.need(client, Some(pot[client]), Some(subchannel)),
                };
                cost.push(need.excess.min(1e6) + need.capped_w * per_watt);
            }
        }
        // A rotation costs less than as many moves: its needs are one each and there is no exchange to weigh.
        self.evaluations += clients * clients / 4 + clients * clients * clients / 64;
        let mut changed = Vec::new();
        for (client, position) in cheapest_assignment(&cost, clients).into_iter().enumerate() {
            if position != client {
                changed.push((pot[position], client));
            }
        }
        for &(subchannel, client) in &changed {
            self.transfer(subchannel, client);
        }
        for &(_, client) in &changed {
            self.settle(client);
            self.mark(client);
        }
        !changed.is_empty()
    }

    /// Restores an earlier ownership in which no move helped.
    fn go_back(&mut self, owner: &[usize]) {
        for (subchannel, &to) in owner.iter().enumerate() {
            let from = self.owner[subchannel];
            if from != to {
                self.transfer(subchannel, to);
                self.settle(from);
                self.settle(to);
            }
        }
    }

    fn transfer(&mut self, subchannel: usize, receiver: usize) {
        let donor = self.owner[subchannel];
        self.holdings[donor].subchannels.retain(|&other| other != subchannel);
        self.holdings[receiver].subchannels.push(subchannel);
        self.owner[subchannel] = receiver;
    }

    fn apply(&mut self, change: Move) {
        let donor = self.owner[change.subchannel];
        self.transfer(change.subchannel, change.receiver);
        if let Some(back) = change.back {
            self.transfer(back, donor);
        }
        for client in [donor, change.receiver] {
            self.settle(client);
            self.mark(client);
        }
    }

    fn next_random(&mut self, below: usize) -> usize {
        // SplitMix64: the search is the same on every machine.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }

    /// A few exchanges at random.
    fn kick(&mut self) {
        for _ in 0..2 {
            let subchannel = self.next_random(self.owner.len());
            let receiver = self.next_random(self.holdings.len());
            if receiver == self.owner[subchannel] || self.holdings[receiver].subchannels.is_empty() {
                continue;
            }
            let position = self.next_random(self.holdings[receiver].subchannels.len());
            let back = Some(self.holdings[receiver].subchannels[position]);
            self.apply(Move {
                subchannel,
                receiver,
                back,
            });
        }
        // An attempt is never free, so that hopeless ones end.
        self.evaluations += 50;
    }

    /// Applies the best move of one client after the other until none helps.
    fn improve(&mut self) {
        while let Some(client) = self.pending.pop() {
            self.is_pending[client] = false;
            if self.violation() <= MET {
                continue;
            }
            if let Some(change) = self.best_move(client) {
                self.apply(change);
            }
        }
    }

    /// The move to `client` that lessens the violation most, among its best subchannels.
    fn best_move(&mut self, client: usize) -> Option<Move> {
        let mut best = (-1e-12, None);
        let mut evaluations = 0;
        let own = &self.holdings[client];
        let reach = (8 * self.owner.len() / self.holdings.len()).max(24);
        for &subchannel in self.ladders.order(client).unwrap_or_default().iter().take(reach) {
            let subchannel = subchannel as usize;
            let donor = self.owner[subchannel];
            if donor == client {
                continue;
            }
            if self.holdings[donor].subchannels.len() > 1 {
                evaluations += 1;
                let change = Move {
                    subchannel,
                    receiver: client,
                    back: None,
                };
                self.consider(change, &mut best);
            }
            for &back in &own.subchannels {
                // Worse for both helps neither.
                if self.ln_gain[client][subchannel] <= self.ln_gain[client][back]
                    && self.ln_gain[donor][back] <= self.ln_gain[donor][subchannel]
                {
                    continue;
                }
                evaluations += 1;
                let change = Move {
                    subchannel,
                    receiver: client,
                    back: Some(back),
                };
                self.consider(change, &mut best);
            }
        }
        self.evaluations += evaluations;
        best.1
    }

    fn consider(&self, change: Move, best: &mut (f64, Option<Move>)) {
        let Move {
            subchannel,
            receiver,
            back,
        } = change;
        let donor = self.owner[subchannel];
        let (was_receiver, was_donor) = (self.holdings[receiver].need, self.holdings[donor].need);
        let gained = self.need(receiver, back, Some(subchannel));
        // What the receiver saves must at least be something, or the donor must save by `back`.
        if back.is_none() && gained.capped_w >= was_receiver.capped_w && gained.excess >= was_receiver.excess {
            return;
        }
        let lost = self.need(donor, Some(subchannel), back);
        let own = (gained.excess - was_receiver.excess) + (lost.excess - was_donor.excess);
        let more_w = (gained.capped_w - was_receiver.capped_w) + (lost.capped_w - was_donor.capped_w);
        if own > 0.0 && more_w > 0.0 || own.is_nan() {
            return;
        }
        let change_of_total = match self.total_w > self.channel.power_total_w || more_w > 0.0 {
            true => self.total_excess(self.total_w + more_w) - self.total_excess(self.total_w),
            false => 0.0,
        };
        let change_of_violation = own + change_of_total;
        if change_of_violation < best.0 {
            *best = (change_of_violation, Some(change));
        }
    }
}

/// The permutation with the least sum of `cost[row * size + column]`, as the column of each row: the Hungarian method by shortest
/// augmenting paths (Kuhn 1955, Jonker and Volgenant 1987).
fn cheapest_assignment(cost: &[f64], size: usize) -> Vec<usize> {
    const NONE: usize = usize::MAX;
    let (mut row_price, mut column_price) = (vec![0.0; size], vec![0.0; size]);
    let mut row_of = vec![NONE; size];
    let mut distance = vec![0.0; size];
    let mut from = vec![NONE; size];
    let mut done = vec![false; size];
    for start in 0..size {
        distance.fill(f64::INFINITY);
        from.fill(NONE);
        done.fill(false);
        let (mut row, mut column, mut reached) = (start, NONE, 0.0);
        loop {
            let mut nearest = (f64::INFINITY, NONE);
            for next in 0..size {
                if done[next] {
                    continue;
                }
                let step = reached + (cost[row * size + next] - row_price[row] - column_price[next]);
                if step < distance[next] {
                    (distance[next], from[next]) = (step, column);
                }
                if distance[next] < nearest.0 {
                    nearest = (distance[next], next);
                }
            }
            (reached, column) = nearest;
            done[column] = true;
            match row_of[column] {
                NONE => break,
                taken => row = taken,
            }
        }
        for next in 0..size {
            if done[next] {
                column_price[next] += distance[next] - reached;
                let taken = row_of[next];
                if taken != NONE {
                    row_price[taken] += reached - distance[next];
                }
            }
        }
        row_price[start] += reached;
        // Along the path everybody moves on by one.
        while from[column] != NONE {
            row_of[column] = row_of[from[column]];
            column = from[column];
        }
        row_of[column] = start;
    }
    let mut column_of = vec![0; size];
    for (column, &row) in row_of.iter().enumerate() {
        column_of[row] = column;
    }
    column_of
}

/// Deadlines at which [`branch`] tries to settle the matter.
const BRANCH_DEADLINES: usize = 12;

/// Branch and bound on who owns contested subchannels, within a limit of nodes: it raises the lower bound where the count bound
/// is loose, and finds what the local search did not. Worth its time on links of a few clients.
fn branch(ladders: &Ladders<'_>, demand: &Demand, found: &mut Found) {
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

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// The least sum over all permutations of the columns.
    fn least_by_permutations(cost: &[f64], size: usize, row: usize, free: &mut Vec<usize>) -> f64 {
        if row == size {
            return 0.0;
        }
        let mut least = f64::INFINITY;
        for position in 0..free.len() {
            let column = free.remove(position);
            least = least.min(cost[row * size + column] + least_by_permutations(cost, size, row + 1, free));
            free.insert(position, column);
        }
        least
    }

    fn assert_cheapest(cost: &[f64], size: usize) {
        let columns = cheapest_assignment(cost, size);
        let mut used = columns.clone();
        used.sort_unstable();
        assert_eq!(used, (0..size).collect::<Vec<_>>(), "{cost:?}");
        let sum: f64 = (columns.iter().enumerate())
            .map(|(row, column)| cost[row * size + column])
            .sum();
        let least = least_by_permutations(cost, size, 0, &mut (0..size).collect());
        assert!(
            (sum - least).abs() <= 1e-12 * least.abs().max(1.0),
            "{sum} {least} {cost:?}"
        );
    }

    #[test]
    fn the_cheapest_assignment_is_that_of_all_permutations() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for size in 1..=6 {
            for _ in 0..200 {
                let cost: Vec<f64> = (0..size * size).map(|_| rng.random_range(-1.0..1.0)).collect();
                assert_cheapest(&cost, size);
            }
        }
    }

    #[test]
    fn the_cheapest_assignment_copes_with_ties_and_prohibitive_costs() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for size in 1..=6 {
            assert_cheapest(&vec![1.0; size * size], size);
            for _ in 0..100 {
                let cost: Vec<f64> = (0..size * size)
                    .map(|_| [0.0, 1.0, 2.0, 1e6][rng.random_range(0..4)])
                    .collect();
                assert_cheapest(&cost, size);
            }
        }
    }
}
