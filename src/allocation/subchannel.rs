//! Who gets which subchannel, for the shortest phase: exact on flat channels and on small ones, a target-deadline local search
//! with a certified distance to the optimum elsewhere.
//!
//! On a flat channel subchannels are alike, so only counts matter, and the bound of clients that share subchannels is reached: its
//! counts are an ownership (see [`bound`](super::bound)). With gains that differ
//! by subchannel the problem is NP-hard. There the greedy assignment of the paper is a start; then a deadline between the bound
//! and the best so far is chosen and subchannels are moved and exchanged until the powers it needs are allowed.

use super::bound::{EXACT, Ladders};
use super::exhaustive::{branch, enumerate};
use super::local::Search;
use super::ownership::Found;
use super::power::{Demand, Holdings, LinkPlan, control, fastest_s};
use super::prices::{Market, Prices};

/// Ownerships that are all tried.
const ENUMERATED: f64 = 1e5;

/// An ownership with its powers, and what no other can beat.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkSolution {
    pub plan: LinkPlan,
    /// A true lower bound on `phase + weight × energy` of any plan.
    pub lower_s: f64,
    /// What proves it, where counts alone do not.
    pub prices: Option<Prices>,
}

/// What a similar demand on the same link came to.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    pub owner: &'a [usize],
    pub prices: Option<&'a Prices>,
}

impl<'a> From<&'a LinkPlan> for Start<'a> {
    fn from(plan: &'a LinkPlan) -> Self {
        Self {
            owner: &plan.owner,
            prices: None,
        }
    }
}

/// How a link is solved.
#[derive(Clone, Debug)]
pub struct LinkOptions<'a> {
    /// Seconds a joule counts as; 0 for the paper's problem.
    pub energy_weight_s_per_j: f64,
    /// An ownership to start from besides the greedy one, instead of one by auction.
    pub start: Option<Start<'a>>,
    /// A longer phase is of no use to the caller: the search may stop once it despairs of this one.
    pub useful_below_s: Option<f64>,
}

/// The best plan that is found for one link. `None` when a client with a payload cannot be heard at all.
pub fn solve(ladders: &Ladders<'_>, demand: &Demand, options: &LinkOptions<'_>) -> Option<LinkSolution> {
    let channel = ladders.channel();
    let (owner, lower_s, prices) = match channel.is_flat() {
        true => {
            let (owner, lower_s) = flat(ladders, demand)?;
            (owner, lower_s, None)
        }
        false => {
            let (found, prices) = selective(ladders, demand, options)?;
            (found.owner, found.lower_s, prices)
        }
    };
    let weight = options.energy_weight_s_per_j;
    let plan = control(channel, demand, &owner, weight)?;
    if weight <= 0.0 {
        return Some(LinkSolution {
            lower_s: lower_s.min(plan.phase_s),
            plan,
            prices,
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
    Some(LinkSolution {
        plan: best,
        lower_s,
        prices,
    })
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

fn selective(ladders: &Ladders<'_>, demand: &Demand, options: &LinkOptions<'_>) -> Option<(Found, Option<Prices>)> {
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
        Some(start) => start.owner.to_vec(),
        None => search.auction(&found.owner, 0.5 * (found.upper_s + found.lower_s)),
    };
    if let Some(reached) = time(&start)
        && reached < found.upper_s
    {
        (found.owner, found.upper_s) = (start, reached);
    }
    if channel.clients() == 1 {
        // There is one ownership, and the sets of its subchannels are not to be counted.
        found.lower_s = found.lower_s.max(found.upper_s * (1.0 - EXACT));
        return Some((found, None));
    }
    let ownerships = channel.subchannels as f64 * (channel.clients() as f64).ln();
    if ownerships <= ENUMERATED.ln() {
        search.descend(&mut found);
        if found.is_open() {
            enumerate(channel, demand, &mut found.owner, &mut found.upper_s);
            found.lower_s = found.lower_s.max(found.upper_s * (1.0 - EXACT));
        }
        return Some((found, None));
    }
    if !found.is_open() {
        return Some((found, None));
    }
    let mut market = Market::new(ladders, demand, options.start.and_then(|start| start.prices));
    if options.start.is_none_or(|start| start.prices.is_none()) {
        market.open(found.between(SELLING));
    }
    // Whether there is anything useful at all comes first.
    let useful_s = options
        .useful_below_s
        .filter(|limit_s| *limit_s > found.lower_s && *limit_s < found.upper_s);
    let hopeful = match useful_s {
        Some(limit_s) => {
            market.ascend(limit_s, ROUNDS / 2);
            if market.is_impossible(limit_s) {
                found.lower_s = limit_s;
                return Some((found, Some(market.into_prices())));
            }
            search.reach_hastily(&mut found, limit_s)
        }
        None => true,
    };
    if hopeful {
        market.ascend(found.between(SELLING), ROUNDS);
        found.lower_s = market.impossible_s(found.lower_s, found.upper_s);
        search.descend(&mut found);
        if found.is_open() {
            market.ascend(found.between(SELLING), ROUNDS);
        }
    }
    if found.is_open() {
        found.lower_s = market.impossible_s(found.lower_s, useful_s.unwrap_or(found.upper_s).min(found.upper_s));
        branch(ladders, demand, &mut found);
    }
    Some((found, Some(market.into_prices())))
}

/// Where between the bound and the best deadline prices are made: near where the bound will be.
const SELLING: f64 = 0.8;
/// Rounds of making prices.
const ROUNDS: usize = 20;

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
