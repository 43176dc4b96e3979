//! How short a phase could be at best: a true lower bound that anybody can check again.
//!
//! The count bound forgets that two clients cannot have the same subchannel: client `k` may use its `n` best ones, which costs
//! it no more power than any `n` it could really have. Only the counts remain, and they must add up to the subchannels there
//! are. A deadline is impossible when the least counts that respect the clients' power caps add up to more than that, or when
//! the counts with the least total power exceed the link's. Those are found exactly: the least power is convex in the count
//! (the water-filling cost is supermodular in the set of subchannels and each further one is worse), so giving the subchannels
//! one by one to the client that gains most is optimal (Fox 1966). On a flat channel nothing was forgotten and the bound is the
//! optimum.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::channel::{Channel, SnrPerWatt};
use super::power::Demand;

/// One client's subchannels from best to worst, as far as the least power over the first `n` of them needs.
enum Ladder {
    /// Equal gains, with this logarithm.
    Equal(f64),
    Sorted {
        /// ln γ of the best.
        best: f64,
        /// `[n]`: Σ over the first `n` of `ln γ_1 - ln γ_i`; `[0]` is 0.
        behind: Vec<f64>,
        /// `[n]`: Σ over the first `n` of `γ_1 / γ_i`.
        hurdles: Vec<f64>,
        /// `[n - 1]`: nats from which on the `n`-th is used, rising.
        threshold: Vec<f64>,
        /// Subchannels, best first.
        order: Vec<u32>,
        /// `[n - 1]`: ln γ and 1/γ of the `n`-th.
        ln_gain: Vec<f64>,
        inverse: Vec<f64>,
    },
}

/// A client's subchannels from best to worst, with the logarithms of their gains and their inverses.
#[derive(Clone, Copy)]
pub(super) struct Rungs<'a> {
    pub order: &'a [u32],
    pub ln_gain: &'a [f64],
    pub inverse: &'a [f64],
    behind: &'a [f64],
}

impl Rungs<'_> {
    /// Natural logarithm of the water level, in ln W, that carries `nats` over the `n` best, all in use.
    pub(crate) fn ln_level(&self, n: usize, nats: f64) -> f64 {
        (nats + self.behind[n]) / n as f64 - self.ln_gain[0]
    }
}

/// The clients' ladders on a channel, made once for every deadline.
pub struct Ladders<'a> {
    channel: &'a Channel,
    ladders: Vec<Arc<Ladder>>,
}

/// Relative width of the bracket in which exact methods leave the optimum: their result is that close.
pub(super) const EXACT: f64 = 1e-11;

/// Attempts at a deadline that is possible; more fail only where numbers overflow.
const FIRST_PROBES: i32 = 60;

/// Probes after which the bracket is left as it is. A dozen are usual; where powers underflow every deadline looks possible.
const RELAX_STEPS: i32 = 500;

/// The optimum of a link whose clients may share subchannels.
pub(super) struct Relaxation {
    /// `[client]`
    pub counts: Vec<usize>,
    /// Proved impossible to beat, in s.
    pub lower_s: f64,
}

/// Subchannels for each client, if the deadline allows any.
pub(super) type Counts = Option<Vec<usize>>;

impl<'a> Ladders<'a> {
    pub fn new(channel: &'a Channel) -> Self {
        let ladders = match &channel.snr_per_watt {
            SnrPerWatt::Flat(gains) => gains.iter().map(|gain| Arc::new(Ladder::Equal(gain.ln()))).collect(),
            SnrPerWatt::Selective(gains) => gains.iter().map(|gains| Arc::new(sorted(gains))).collect(),
        };
        Self { channel, ladders }
    }

    /// The same ladders with `subchannel` off those of `clients`; `None` when that leaves one of them none.
    pub(super) fn without(&self, clients: &[usize], subchannel: usize) -> Option<Ladders<'a>> {
        let mut ladders = self.ladders.clone();
        for &client in clients {
            let Ladder::Sorted { order, .. } = &*ladders[client] else {
                return None;
            };
            if !order.contains(&(subchannel as u32)) {
                continue;
            }
            let rest: Vec<u32> = order
                .iter()
                .copied()
                .filter(|&other| other != subchannel as u32)
                .collect();
            let SnrPerWatt::Selective(gains) = &self.channel.snr_per_watt else {
                return None;
            };
            ladders[client] = Arc::new(rungs(&gains[client], rest)?);
        }
        Some(Ladders {
            channel: self.channel,
            ladders,
        })
    }

    pub fn channel(&self) -> &'a Channel {
        self.channel
    }

    /// The subchannels of `client`, best first; `None` on a flat channel, where all are as good.
    pub(super) fn order(&self, client: usize) -> Option<&[u32]> {
        match &*self.ladders[client] {
            Ladder::Equal(_) => None,
            Ladder::Sorted { order, .. } => Some(order),
        }
    }

    /// `None` on a flat channel.
    pub(super) fn rungs(&self, client: usize) -> Option<Rungs<'_>> {
        match &*self.ladders[client] {
            Ladder::Equal(_) => None,
            Ladder::Sorted {
                behind,
                order,
                ln_gain,
                inverse,
                ..
            } => Some(Rungs {
                order,
                ln_gain,
                inverse,
                behind,
            }),
        }
    }

    /// How many of its best subchannels `client` would send on if it had them all.
    fn useful(&self, client: usize, nats: f64) -> usize {
        match &*self.ladders[client] {
            Ladder::Equal(_) => self.channel.subchannels,
            Ladder::Sorted { threshold, .. } => threshold.partition_point(|&from| from < nats).max(1),
        }
    }

    /// Least power of `client` on its `n` best subchannels, in W, `n` being at most [`Ladders::useful`]. Rounded down by more than
    /// its rounding error, so that a bound made of it stays one.
    fn power_w(&self, client: usize, n: usize, nats: f64) -> f64 {
        let count = n as f64;
        match &*self.ladders[client] {
            Ladder::Equal(ln_gain) => count * (nats / count).exp_m1() * (-ln_gain).exp() * (1.0 - ROUNDING),
            Ladder::Sorted {
                best, behind, hurdles, ..
            } => {
                let level = ((nats + behind[n]) / count).exp() * count;
                ((level - hurdles[n]) - ROUNDING * level).max(0.0) * (-best).exp()
            }
        }
    }

    /// The least count of `client` within its own power cap; `None` when no count is.
    pub(super) fn least_count(&self, client: usize, nats: f64) -> Option<usize> {
        if nats <= 0.0 {
            return Some(0);
        }
        let cap = self.channel.power_max_w[client].min(self.channel.power_total_w);
        let useful = self.useful(client, nats);
        // The power falls with the count.
        let (mut low, mut high) = (0, useful);
        if self.power_w(client, useful, nats) > cap {
            return None;
        }
        while high - low > 1 {
            let middle = usize::midpoint(low, high);
            match self.power_w(client, middle, nats) > cap {
                true => low = middle,
                false => high = middle,
            }
        }
        Some(high)
    }

    /// Counts within the power caps with the least total power that end at `deadline_s`, as many subchannels given away as it
    /// takes; `None` when the deadline is impossible.
    pub(super) fn counts(&self, demand: &Demand, deadline_s: f64) -> Counts {
        let mut greedy = self.least_counts(demand, deadline_s)?;
        greedy.give(self, |total_w| total_w <= self.channel.power_total_w);
        greedy.within(self.channel.power_total_w)
    }

    /// The same with every useful subchannel given away: on a flat channel the best ownership there is.
    pub(super) fn spread(&self, demand: &Demand, deadline_s: f64) -> Counts {
        let mut greedy = self.least_counts(demand, deadline_s)?;
        greedy.give(self, |_| false);
        greedy.within(self.channel.power_total_w)
    }

    /// Counts with the least energy of transmissions that end at `deadline_s`, whatever the total power, and that energy in J.
    fn least_energy(&self, demand: &Demand, deadline_s: f64) -> Option<(Vec<usize>, f64)> {
        let mut greedy = self.least_counts(demand, deadline_s)?;
        greedy.weights = demand.wait_s.iter().map(|wait| deadline_s - wait).collect();
        greedy.give(self, |_| false);
        Some((greedy.counts, greedy.total))
    }

    /// Counts with the least energy of transmissions that end at `deadline_s`; `None` when the deadline is impossible.
    pub(super) fn thrifty_counts(&self, demand: &Demand, deadline_s: f64) -> Counts {
        Some(self.least_energy(demand, deadline_s)?.0)
    }

    fn least_counts(&self, demand: &Demand, deadline_s: f64) -> Option<Greedy> {
        let channel = self.channel;
        let clients = channel.clients();
        let mut greedy = Greedy {
            spare: channel.subchannels,
            counts: Vec::with_capacity(clients),
            nats: Vec::with_capacity(clients),
            weights: Vec::new(),
            total: 0.0,
        };
        for client in 0..clients {
            let nats = demand.nats(client, channel.bandwidth_hz, deadline_s);
            if nats == f64::INFINITY {
                return None;
            }
            let count = self.least_count(client, nats)?;
            greedy.spare = greedy.spare.checked_sub(count)?;
            greedy.counts.push(count);
            greedy.nats.push(nats);
        }
        Some(greedy)
    }

    /// The optimum of the relaxed problem, in which clients may share subchannels. `None` when a client cannot be heard at all.
    ///
    /// From a possible deadline, the counts with the least power there have a shortest deadline of their own, and so on: it ends
    /// when there are no counts for a deadline just below, which is the proof. (Dinkelbach's method for fractional programs, here
    /// with the total power as the denominator; the caps are handled by the least counts.) A halving step now and then bounds
    /// the number of steps.
    pub(super) fn relax(&self, demand: &Demand) -> Option<Relaxation> {
        let mut low_s = demand.longest_wait_s();
        let mut high_s = self.reachable_s(demand);
        if !high_s.is_finite() {
            return None;
        }
        let mut counts = None;
        let mut probe_s = high_s;
        for step in 1.. {
            match self.spread(demand, probe_s) {
                Some(found) => {
                    high_s = self.shortest_s(demand, &found).min(probe_s);
                    counts = Some(found);
                }
                // The first probe is possible by construction; rounding may disagree, but not for long.
                None if counts.is_none() && step > FIRST_PROBES => return None,
                None if counts.is_none() => {
                    high_s *= 1.0 + 1e-6;
                    probe_s = high_s;
                    continue;
                }
                None => low_s = low_s.max(probe_s),
            }
            if low_s >= high_s * (1.0 - 2.0 * EXACT) {
                break;
            }
            probe_s = match step % 8 {
                0 => 0.5 * (low_s + high_s),
                _ => high_s * (1.0 - EXACT),
            };
            if probe_s <= low_s || step == RELAX_STEPS {
                break;
            }
        }
        Some(Relaxation {
            counts: counts?,
            lower_s: low_s,
        })
    }

    /// A time no ownership can beat, in s.
    pub fn lower_bound_s(&self, demand: &Demand) -> f64 {
        match self.relax(demand) {
            Some(relaxation) => relaxation.lower_s,
            None => demand.longest_wait_s(),
        }
    }

    /// The shortest deadline with each client on its best `counts` subchannels, in s.
    fn shortest_s(&self, demand: &Demand, counts: &[usize]) -> f64 {
        let channel = self.channel;
        let clients = channel.clients();
        let total_w = channel.power_total_w;
        let end_s = |client: usize, power_w: f64| {
            let bits = demand.payload_bits[client];
            match bits > 0.0 {
                true => {
                    let nats = self.most_nats(client, counts[client], power_w);
                    demand.wait_s[client] + bits * std::f64::consts::LN_2 / (channel.bandwidth_hz * nats)
                }
                false => demand.wait_s[client],
            }
        };
        let (mut low_s, mut high_s) = (0.0_f64, 0.0_f64);
        for client in 0..clients {
            let cap_w = channel.power_max_w[client];
            low_s = low_s.max(end_s(client, cap_w.min(total_w)));
            high_s = high_s.max(end_s(client, cap_w.min(total_w / clients as f64)));
        }
        super::power::shortest_s((low_s, high_s), total_w, |deadline_s| {
            let (mut power_w, mut slope) = (0.0, 0.0);
            for (client, &count) in counts.iter().enumerate() {
                let nats = demand.nats(client, channel.bandwidth_hz, deadline_s);
                if nats > 0.0 {
                    let (power, level_w) = self.power_and_level_w(client, count, nats);
                    power_w += power;
                    slope -= level_w * nats / (deadline_s - demand.wait_s[client]);
                }
            }
            (power_w, slope)
        })
    }

    /// Least power and water level of `client` on its `n` best subchannels, in W.
    fn power_and_level_w(&self, client: usize, n: usize, nats: f64) -> (f64, f64) {
        match &*self.ladders[client] {
            Ladder::Equal(ln_gain) => {
                let (each, unit_w) = (nats / n as f64, (-ln_gain).exp());
                (n as f64 * each.exp_m1() * unit_w, each.exp() * unit_w)
            }
            Ladder::Sorted {
                best, behind, hurdles, ..
            } => {
                let n = n.min(self.useful(client, nats));
                let level = ((nats + behind[n]) / n as f64).exp();
                let unit_w = (-best).exp();
                (((level * n as f64) - hurdles[n]).max(0.0) * unit_w, level * unit_w)
            }
        }
    }

    /// The most nats per hertz of `client` on its `n` best subchannels with `power_w`.
    fn most_nats(&self, client: usize, n: usize, power_w: f64) -> f64 {
        match &*self.ladders[client] {
            Ladder::Equal(ln_gain) => n as f64 * (power_w * ln_gain.exp() / n as f64).ln_1p(),
            Ladder::Sorted {
                best, behind, hurdles, ..
            } => {
                let budget = power_w * best.exp();
                let mut active = n;
                loop {
                    let level = (budget + hurdles[active]) / active as f64;
                    let weakest = hurdles[active] - hurdles[active - 1];
                    if level > weakest || active == 1 {
                        return active as f64 * level.ln() - behind[active];
                    }
                    active -= 1;
                }
            }
        }
    }

    /// A true lower bound on `phase + weight × energy` of plans for this link, given that no phase is shorter than `lower_s` and a
    /// plan that costs `upper_s`.
    ///
    /// The least energy falls with the deadline, so between two deadlines no plan costs less than the earlier one plus the
    /// energy at the later; the interval that promises most is halved until that hardly helps.
    pub(super) fn energy_bound_s(&self, demand: &Demand, weight_s_per_j: f64, lower_s: f64, upper_s: f64) -> f64 {
        let energy_j = |deadline_s: f64| match self.least_energy(demand, deadline_s) {
            Some((_, energy_j)) => energy_j,
            None => f64::INFINITY,
        };
        let promise = |from_s: f64, to_s: f64| from_s + weight_s_per_j * energy_j(to_s);
        let mut intervals = vec![(promise(lower_s, upper_s), lower_s, upper_s)];
        for _ in 0..400 {
            let (position, &(least, from_s, to_s)) = intervals
                .iter()
                .enumerate()
                .min_by(|a, b| a.1.0.total_cmp(&b.1.0))
                .expect("there is an interval");
            if least >= upper_s || to_s - from_s < 1e-4 * from_s {
                break;
            }
            let middle_s = 0.5 * (from_s + to_s);
            intervals[position] = (promise(from_s, middle_s), from_s, middle_s);
            intervals.push((promise(middle_s, to_s), middle_s, to_s));
        }
        intervals.iter().map(|&(least, ..)| least).fold(upper_s, f64::min)
    }

    /// A deadline at which the counts are possible, in s.
    pub(super) fn reachable_s(&self, demand: &Demand) -> f64 {
        let mut longest_tail: f64 = 0.0;
        let channel = self.channel;
        let share_w = channel.power_total_w / channel.clients() as f64;
        for client in 0..channel.clients() {
            let ln_gain = match &*self.ladders[client] {
                Ladder::Equal(gain) => *gain,
                Ladder::Sorted { best, .. } => *best,
            };
            let nats = (channel.power_max_w[client].min(share_w).ln() + ln_gain).exp().ln_1p();
            longest_tail =
                longest_tail.max(demand.payload_bits[client] * std::f64::consts::LN_2 / (channel.bandwidth_hz * nats));
        }
        (demand.longest_wait_s() + longest_tail) * (1.0 + 1e-9)
    }
}

/// Giving subchannels one by one to the client that saves most.
struct Greedy {
    spare: usize,
    counts: Vec<usize>,
    nats: Vec<f64>,
    /// What a client's watt counts as; 1 where this is empty.
    weights: Vec<f64>,
    /// Σ weight × least power.
    total: f64,
}

impl Greedy {
    fn cost(&self, ladders: &Ladders<'_>, client: usize, count: usize) -> f64 {
        self.weights.get(client).unwrap_or(&1.0) * ladders.power_w(client, count, self.nats[client])
    }

    fn offer(&self, ladders: &Ladders<'_>, client: usize) -> Option<Offer> {
        let count = self.counts[client];
        (count > 0 && count < ladders.useful(client, self.nats[client])).then(|| Offer {
            saved: self.cost(ladders, client, count) - self.cost(ladders, client, count + 1),
            client,
        })
    }

    fn add_up(&mut self, ladders: &Ladders<'_>) {
        self.total = (0..self.counts.len())
            .filter(|&client| self.counts[client] > 0)
            .map(|client| self.cost(ladders, client, self.counts[client]))
            .sum();
    }

    /// Gives subchannels away until `enough` of the total.
    fn give(&mut self, ladders: &Ladders<'_>, enough: impl Fn(f64) -> bool) {
        self.add_up(ladders);
        if enough(self.total) {
            return;
        }
        let mut offers: BinaryHeap<Offer> = (0..self.counts.len())
            .filter_map(|client| self.offer(ladders, client))
            .collect();
        while self.spare > 0 {
            let Some(Offer { saved, client }) = offers.pop() else {
                break;
            };
            self.total -= saved;
            self.counts[client] += 1;
            self.spare -= 1;
            if enough(self.total) {
                // Cancellation in the running total is settled by adding up again.
                self.add_up(ladders);
                if enough(self.total) {
                    return;
                }
            }
            offers.extend(self.offer(ladders, client));
        }
        self.add_up(ladders);
    }

    fn within(self, power_total_w: f64) -> Counts {
        (self.total <= power_total_w).then_some(self.counts)
    }
}

/// Relative rounding error of a power, generously.
const ROUNDING: f64 = 1e-14;

fn sorted(gains: &[f64]) -> Ladder {
    let mut order: Vec<u32> = (0..gains.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| gains[b as usize].total_cmp(&gains[a as usize]).then(a.cmp(&b)));
    rungs(gains, order).expect("a link has subchannels")
}

/// The ladder of the subchannels in `order`, best first; `None` when there are none.
fn rungs(gains: &[f64], order: Vec<u32>) -> Option<Ladder> {
    let best_gain = gains[*order.first()? as usize];
    let best = best_gain.ln();
    let (mut behind, mut hurdles) = (vec![0.0], vec![0.0]);
    let mut threshold = Vec::with_capacity(order.len());
    let (mut sum_behind, mut sum_hurdles) = (0.0, 0.0);
    for (position, &subchannel) in order.iter().enumerate() {
        let ratio = best_gain / gains[subchannel as usize];
        let step = ratio.ln();
        threshold.push(position as f64 * step - sum_behind);
        sum_behind += step;
        sum_hurdles += ratio;
        behind.push(sum_behind);
        hurdles.push(sum_hurdles);
    }
    Some(Ladder::Sorted {
        best,
        behind,
        hurdles,
        threshold,
        ln_gain: order
            .iter()
            .map(|&subchannel| gains[subchannel as usize].ln())
            .collect(),
        inverse: order
            .iter()
            .map(|&subchannel| gains[subchannel as usize].recip())
            .collect(),
        order,
    })
}

struct Offer {
    saved: f64,
    client: usize,
}

impl PartialEq for Offer {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Offer {}

impl PartialOrd for Offer {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Offer {
    fn cmp(&self, other: &Self) -> Ordering {
        self.saved
            .total_cmp(&other.saved)
            .then_with(|| other.client.cmp(&self.client))
    }
}
