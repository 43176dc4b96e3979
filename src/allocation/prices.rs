//! A bound that knows of contention, by prices.
//!
//! The count bound lets clients share their best subchannels. Here everything a link has to give is for sale: each subchannel at
//! a price `π_i`, and watts at a price `w`. A client that must end by a deadline pays at least
//!
//! `L_k = min over sets S on which its cap suffices of  w P_k(S) + Σ_S π_i`,
//!
//! and clients that all end in time have bought no more than there is: where `Σ L_k` is more than `Σ π_i + w P_total`, the deadline
//! is impossible. That holds at any prices; a proof is one pass over the gains. The cap has a price `μ_k` too: with `w + μ_k` for `w`, less
//! `μ_k P_max,k`, it is a bound on `L_k`, whatever `μ_k` is.
//!
//! Water-filling has the dual `P_k(S) = max over λ of λ n - Σ_S h_i(λ)` with `h_i(λ) = λ (u - 1 + e^-u)`, `u = ln(λ γ_i)⁺`. So whatever the
//! level `λ`, sets of `m` subchannels cost at least `w λ n` less the `m` largest of `w h_i(λ) - π_i`, and `L_k` is bounded by the least
//! over `m` of the most over `λ`. That `m` is a whole number is what makes this sharp: time sharing, where it is not, is 24 % off with 100
//! clients on 256 subchannels. With one price for all subchannels it is the dual of the count bound.
//!
//! Good prices are found by subgradient ascent: what is wanted more than once becomes dearer, what nobody wants cheaper.

use super::bound::{Ladders, Rungs};
use super::power::Demand;

/// What a link has to give costs this much; 1 altogether.
#[derive(Clone, Debug, PartialEq)]
pub struct Prices {
    /// `[subchannel]`
    subchannel: Vec<f64>,
    /// All of the link's power.
    power: f64,
}

impl Prices {
    fn uniform(subchannels: usize, power: f64) -> Self {
        Self {
            subchannel: vec![(1.0 - power) / subchannels as f64; subchannels],
            power,
        }
    }

    fn normalise(&mut self) {
        let sum = self.power + self.subchannel.iter().sum::<f64>();
        self.subchannel.iter_mut().for_each(|price| *price /= sum);
        self.power /= sum;
    }
}

/// What a client would buy, and where the search for it begins at other prices.
#[derive(Clone, Debug, Default)]
struct Bid {
    paid: f64,
    /// `w h_i(λ) - π_i` and the position of subchannel `i` on the client's ladder; the least wanted is last.
    wants: Vec<(f64, u32)>,
    /// The next one: neither bought nor far from it.
    following: Option<(f64, u32)>,
    /// `ln λ`, λ in W.
    ln_level: f64,
    /// The level that what it wants would settle at.
    ln_settled: f64,
    /// What it pays for, in W.
    power_w: f64,
    /// How what it pays grows with what it must send, per neper.
    per_nat: f64,
}

impl Bid {
    fn count(&self) -> usize {
        self.wants.len()
    }

    /// Whether it could pay less with fewer subchannels, what it wants least not being worth its price, or with more, the next one being
    /// worth it. Otherwise any fewer, or any more, cost more at the same level.
    fn could_be(&self, way: Way) -> bool {
        match way {
            Way::Fewer => self.wants.last().is_some_and(|&(score, _)| score < 0.0),
            Way::More => self.following.is_some_and(|(score, _)| score > 0.0),
        }
    }

    /// Where the level would be with one subchannel fewer or more.
    fn level_beside(&self, way: Way, rungs: Rungs<'_>) -> f64 {
        let (other, change) = match way {
            Way::Fewer => (self.wants.last().copied(), -1.0),
            Way::More => (self.following, 1.0),
        };
        let ln_gain = other.map_or(0.0, |(_, position)| rungs.ln_gain[position as usize]);
        let count = self.count() as f64;
        (count * self.ln_settled - change * ln_gain) / (count + change)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Fewer,
    More,
}

impl Way {
    fn back(self) -> Self {
        match self {
            Way::Fewer => Way::More,
            Way::More => Way::Fewer,
        }
    }
}

/// What a client must send and what that costs.
#[derive(Clone, Copy, Debug)]
struct Offer {
    nats: f64,
    /// The least price of a subchannel.
    cheapest: f64,
    per_watt: f64,
}

/// Prices of a client's own power that are tried in a round.
const OWN_PRICES: usize = 3;
/// Levels that are tried for as many subchannels.
const LEVELS: usize = 4;
/// Subchannels up to which the most wanted are kept in order.
const FEW: usize = 32;
/// Levels in ln that are as good as the same.
const SAME_LEVEL: f64 = 1e-3;
/// Shares of the power's price that are tried for equal prices.
const OPENING: usize = 8;
/// Rounds without more being paid after which steps become shorter.
const STALE: usize = 5;
/// What is kept of the last direction.
const MOMENTUM: f64 = 0.3;
/// Deadlines that are tried for the longest impossible one, and how near to it is near enough.
const PROBES: usize = 8;
const NEAR: f64 = 1e-6;
/// How much more must be paid than everything costs, so that rounding proves nothing.
const MARGIN: f64 = 1e-10;

/// Clients that buy what they need to end by a deadline.
pub(super) struct Market<'a> {
    ladders: &'a Ladders<'a>,
    demand: &'a Demand,
    prices: Prices,
    /// `[client]`: price of a watt of its own cap, besides the link's.
    own: Vec<f64>,
    bids: Vec<Bid>,
    /// Of [`Market::bid_at`]: the most wanted subchannels.
    wanted: Vec<(f64, u32)>,
}

impl<'a> Market<'a> {
    /// On a channel that is not flat, where all there is to know is in the counts.
    pub fn new(ladders: &'a Ladders<'a>, demand: &'a Demand, prices: Option<&Prices>) -> Self {
        let channel = ladders.channel();
        Self {
            ladders,
            demand,
            prices: prices
                .cloned()
                .unwrap_or_else(|| Prices::uniform(channel.subchannels, 0.0)),
            own: vec![0.0; channel.clients()],
            bids: vec![Bid::default(); channel.clients()],
            wanted: Vec::new(),
        }
    }

    pub(crate) fn into_prices(self) -> Prices {
        self.prices
    }

    /// What all clients pay at least to end at `deadline_s`, and how that changes with the deadline, per s; infinite when one of
    /// them cannot.
    fn paid(&mut self, deadline_s: f64) -> (f64, f64) {
        let channel = self.ladders.channel();
        let cheapest = self.prices.subchannel.iter().copied().fold(f64::INFINITY, f64::min);
        let (mut paid, mut slope) = (0.0, 0.0);
        for client in 0..channel.clients() {
            let nats = self.demand.nats(client, channel.bandwidth_hz, deadline_s);
            if nats <= 0.0 {
                self.bids[client] = Bid::default();
                continue;
            }
            let Some(bid) = self.bid(client, nats, cheapest) else {
                return (f64::INFINITY, 0.0);
            };
            paid += bid.paid;
            slope -= bid.per_nat * nats / (deadline_s - self.demand.wait_s[client]);
            self.bids[client] = bid;
        }
        (paid, slope)
    }

    /// What `client` pays least for; `None` when no count of subchannels is enough. Where that takes more power than the client may use, a
    /// price `μ` on its power makes it more: all of it for nothing, `- μ P_max`, is what it then has.
    fn bid(&mut self, client: usize, nats: f64, cheapest: f64) -> Option<Bid> {
        if nats == f64::INFINITY {
            return None;
        }
        let rungs = self.ladders.rungs(client)?;
        let least = self.ladders.least_count(client, nats)?;
        let channel = self.ladders.channel();
        let cap_w = channel.power_max_w[client];
        let shared = self.prices.power / channel.power_total_w;
        let offer = |own: f64| Offer {
            nats,
            cheapest,
            per_watt: shared + own,
        };
        let mut best = self.bid_at_price(client, rungs, least, offer(self.own[client]));
        if cap_w.is_finite() {
            best.paid -= self.own[client] * cap_w;
            let mut own = self.own[client];
            let mut power_w = best.power_w;
            for _ in 0..OWN_PRICES {
                if (power_w / cap_w - 1.0).abs() < 1e-2 || (own <= 0.0 && power_w <= cap_w) {
                    break;
                }
                own = match shared + own > 0.0 {
                    true => (shared + own) * (power_w / cap_w).clamp(0.25, 4.0) - shared,
                    false => self.first_price(rungs, nats, least),
                };
                own = own.max(0.0);
                let mut bid = self.bid_at_price(client, rungs, least, offer(own));
                bid.paid -= own * cap_w;
                power_w = bid.power_w;
                if bid.paid > best.paid {
                    best = bid;
                    self.own[client] = own;
                }
            }
        }
        Some(best)
    }

    /// A price of a watt at which subchannels of average price begin to be worth theirs.
    fn first_price(&self, rungs: Rungs<'_>, nats: f64, least: usize) -> f64 {
        let mean = self.prices.subchannel.iter().sum::<f64>() / self.prices.subchannel.len() as f64;
        let ln_level = rungs.ln_level(least, nats);
        let position = least - 1;
        let hurdle_w = ln_level.exp() * (ln_level + rungs.ln_gain[position] - 1.0) + rungs.inverse[position];
        mean / hurdle_w
    }

    /// What `client` pays least for at this price of a watt, of `least` subchannels or more.
    fn bid_at_price(&mut self, client: usize, rungs: Rungs<'_>, least: usize, offer: Offer) -> Bid {
        let channel = self.ladders.channel();
        let before = &self.bids[client];
        let start = match before.count() {
            0 => channel.subchannels / channel.clients(),
            count => count,
        };
        let start = start.max(least);
        let ln_level = match before.count() == start {
            true => before.ln_level,
            false => rungs.ln_level(start, offer.nats),
        };
        let first = self.bid_for(rungs, (start, ln_level), offer, f64::INFINITY);
        let mut best = first.clone();
        self.gallop(rungs, Way::Fewer, first.clone(), (offer, least), &mut best);
        self.gallop(rungs, Way::More, first, (offer, channel.subchannels), &mut best);
        best
    }

    /// Tries fewer or more subchannels than `edge` has, up to `end`, as long as that could cost less, in longer and longer steps. A count
    /// that is stepped over needs no look where the one after it is worth all of its subchannels: without some it costs more.
    fn gallop(&mut self, rungs: Rungs<'_>, way: Way, mut edge: Bid, (offer, end): (Offer, usize), best: &mut Bid) {
        let mut left = edge.count().abs_diff(end);
        let mut stride = 1;
        while edge.could_be(way) && left > 0 {
            let step = stride.min(left);
            let count = match way {
                Way::Fewer => edge.count() - step,
                Way::More => edge.count() + step,
            };
            let ln_level = match step {
                1 => edge.level_beside(way, rungs),
                _ => rungs.ln_level(count, offer.nats),
            };
            // What is far away must be known well, to know what is before it.
            let enough = if step == 1 { best.paid } else { f64::INFINITY };
            let bid = self.bid_for(rungs, (count, ln_level), offer, enough);
            if bid.paid < best.paid {
                best.clone_from(&bid);
            }
            if step > 1 && bid.could_be(way.back()) {
                // Too far. Nothing beyond it is better, unless it could be that too: then all between are looked at, and on.
                if !bid.could_be(way) {
                    left = step - 1;
                }
                stride = 1;
                continue;
            }
            left -= step;
            stride *= 2;
            edge = bid;
        }
    }

    /// What `count` subchannels cost least: the level at which that is most, as far as a few steps find it and while it is below
    /// `enough`. Every level is a bound.
    fn bid_for(&mut self, rungs: Rungs<'_>, (count, mut ln_level): (usize, f64), offer: Offer, enough: f64) -> Bid {
        let mut best = Bid {
            paid: f64::NEG_INFINITY,
            ..Bid::default()
        };
        let (mut low, mut high) = (f64::NEG_INFINITY, f64::INFINITY);
        for _ in 0..LEVELS {
            let bid = self.bid_at(rungs, (count, ln_level), offer);
            let ln_settled = bid.ln_settled;
            if bid.paid > best.paid {
                best = bid;
                best.wants.clone_from(&self.wanted);
            }
            if best.paid >= enough || (ln_settled - ln_level).abs() < SAME_LEVEL {
                break;
            }
            // What is paid is concave in λ, and this is the sign of its slope.
            match ln_settled > ln_level {
                true => low = ln_level,
                false => high = ln_level,
            }
            ln_level = match ln_settled > low && ln_settled < high {
                true => ln_settled,
                false => 0.5 * (low + high),
            };
        }
        if best.wants.len() > count {
            best.following = best.wants.pop();
        }
        best
    }

    /// What `count` subchannels cost at least by one level. What is wanted, and the next after it, are left in `wanted`.
    fn bid_at(&mut self, rungs: Rungs<'_>, (count, ln_level): (usize, f64), offer: Offer) -> Bid {
        let Offer {
            nats,
            cheapest,
            per_watt,
        } = offer;
        let level_w = ln_level.exp();
        let hurdle_w = |position: usize| {
            let reach = ln_level + rungs.ln_gain[position];
            match reach > 0.0 {
                true => level_w * (reach - 1.0) + rungs.inverse[position],
                false => 0.0,
            }
        };
        let values = (rungs.order.iter().enumerate()).map(|(position, &subchannel)| {
            let price = self.prices.subchannel[subchannel as usize];
            (per_watt * hurdle_w(position), price, position as u32)
        });
        let wanted = &mut self.wanted;
        most_wanted(wanted, values, cheapest, count);
        let mut bid = Bid {
            paid: per_watt * level_w * nats,
            power_w: level_w * nats,
            ln_level,
            per_nat: per_watt * level_w,
            ..Bid::default()
        };
        let (mut ln_gains, mut active) = (0.0, 0);
        for &(score, position) in &wanted[..count] {
            bid.paid -= score;
            let position = position as usize;
            if ln_level + rungs.ln_gain[position] > 0.0 {
                bid.power_w -= hurdle_w(position);
                ln_gains += rungs.ln_gain[position];
                active += 1;
            }
        }
        bid.ln_settled = match active {
            0 => rungs.ln_level(count, nats),
            active => (nats - ln_gains) / f64::from(active),
        };
        bid
    }

    /// The best prices that are the same for all subchannels, for want of others.
    pub fn open(&mut self, deadline_s: f64) {
        let channel = self.ladders.channel();
        let mut best = (f64::NEG_INFINITY, self.prices.clone());
        // In logits of the power's share.
        let (mut low, mut high) = (-12.0_f64, 14.0_f64);
        for _ in 0..OPENING {
            let middle = 0.5 * (low + high);
            self.prices = Prices::uniform(channel.subchannels, 1.0 / (1.0 + (-middle).exp()));
            let (paid, _) = self.paid(deadline_s);
            if paid > best.0 {
                best = (paid, self.prices.clone());
            }
            // Too much power is wanted where it is too cheap.
            match self.bids.iter().map(|bid| bid.power_w).sum::<f64>() > channel.power_total_w {
                true => low = middle,
                false => high = middle,
            }
        }
        self.prices = best.1;
    }

    /// Changes prices so that more is paid at `deadline_s`.
    pub(crate) fn ascend(&mut self, deadline_s: f64, rounds: usize) {
        let channel = self.ladders.channel();
        let subchannels = channel.subchannels;
        let mut best = (f64::NEG_INFINITY, self.prices.clone());
        let mut direction = vec![0.0; subchannels];
        let mut direction_of_power = 0.0;
        let mut excess = vec![0.0_f64; subchannels];
        let (mut step, mut stale, mut opened) = (1.0, 0, None);
        for _ in 0..rounds {
            let (paid, _) = self.paid(deadline_s);
            if paid == f64::INFINITY {
                return;
            }
            let opened = *opened.get_or_insert(paid);
            if paid > best.0 {
                best = (paid, self.prices.clone());
                stale = 0;
            } else {
                stale += 1;
            }
            if stale > STALE {
                (step, stale) = (step * 0.6, 0);
                self.prices.clone_from(&best.1);
                direction.fill(0.0);
                direction_of_power = 0.0;
                continue;
            }
            excess.fill(-1.0);
            let mut power_w = 0.0;
            for (client, bid) in self.bids.iter().enumerate() {
                let Some(rungs) = self.ladders.rungs(client) else {
                    continue;
                };
                for &(_, position) in &bid.wants {
                    excess[rungs.order[position as usize] as usize] += 1.0;
                }
                power_w += bid.power_w;
            }
            for ((direction, excess), price) in direction.iter_mut().zip(&excess).zip(&self.prices.subchannel) {
                let free = *price <= 0.0;
                *direction = MOMENTUM * *direction + if free { excess.max(0.0) } else { *excess };
            }
            direction_of_power = MOMENTUM * direction_of_power + power_w / channel.power_total_w - 1.0;
            // The power's price is of the size of many subchannels' and moves as many times as far.
            let mean = self.prices.subchannel.iter().sum::<f64>() / subchannels as f64;
            let scale = (3.0 * self.prices.power / mean).max(1.0);
            let norm = direction.iter().map(|part| part * part).sum::<f64>() + scale * direction_of_power.powi(2);
            if norm <= 0.0 {
                break;
            }
            // Polyak's step towards a little more than has been reached.
            let target = best.0.max(1.0) + 0.3 * (1.0 - opened).abs().max(1e-4);
            let length = step * (target - paid) / norm;
            for (direction, price) in direction.iter().zip(&mut self.prices.subchannel) {
                *price = (*price + length * direction).max(0.0);
            }
            self.prices.power = (self.prices.power + length * scale * direction_of_power).max(0.0);
            self.prices.normalise();
        }
        self.prices = best.1;
    }

    /// The longest deadline from `from_s` on that the prices prove impossible, as far as a few probes find it: `from_s` itself if
    /// none.
    pub(crate) fn impossible_s(&mut self, from_s: f64, to_s: f64) -> f64 {
        let (mut low_s, mut high_s) = (from_s, to_s.max(from_s));
        let mut probe_s = 0.5 * (low_s + high_s);
        for _ in 0..PROBES {
            let (paid, slope) = self.paid(probe_s);
            match paid > 1.0 + MARGIN {
                true => low_s = probe_s,
                false => high_s = probe_s,
            }
            if high_s - low_s < NEAR * high_s {
                break;
            }
            // A little before the root, to be still impossible there.
            let root_s = probe_s - paid.ln() * paid / slope;
            let near_s = root_s - 0.02 * (root_s - probe_s).abs() - 0.5 * NEAR * high_s;
            probe_s = match near_s > low_s && near_s < high_s {
                true => near_s,
                false => 0.5 * (low_s + high_s),
            };
        }
        low_s
    }

    /// Whether the prices prove that no ownership ends by `deadline_s`.
    pub(crate) fn is_impossible(&mut self, deadline_s: f64) -> bool {
        self.paid(deadline_s).0 > 1.0 + MARGIN
    }
}

/// Leaves in `wanted` what is worth most over its price, with its position: `count` of them, the least wanted last, and the next one
/// after that. `values` fall: worth, price, position; no price is below `cheapest`.
fn most_wanted(
    wanted: &mut Vec<(f64, u32)>,
    values: impl Iterator<Item = (f64, f64, u32)>,
    cheapest: f64,
    count: usize,
) {
    let keep = count + 1;
    wanted.clear();
    if keep > FEW {
        wanted.extend(values.map(|(value, price, position)| (value - price, position)));
        let most_first = |a: &(f64, u32), b: &(f64, u32)| b.0.total_cmp(&a.0);
        if wanted.len() > keep {
            wanted.select_nth_unstable_by(keep - 1, most_first);
            wanted.truncate(keep);
        }
        wanted.select_nth_unstable_by(count - 1, most_first);
        return;
    }
    let mut floor = f64::NEG_INFINITY;
    for (value, price, position) in values {
        if value - cheapest <= floor {
            break;
        }
        let score = value - price;
        if score <= floor {
            continue;
        }
        if wanted.len() == keep {
            wanted.pop();
        }
        // Scores come almost in order.
        let place = (wanted.iter().rposition(|&(other, _)| other >= score)).map_or(0, |place| place + 1);
        wanted.insert(place, (score, position));
        if wanted.len() == keep {
            floor = wanted[keep - 1].0;
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::channel::{Channel, SnrPerWatt};
    use super::super::power::{Holdings, fastest_s};
    use super::*;

    fn channel(rng: &mut ChaCha8Rng, clients: usize, subchannels: usize) -> Channel {
        let spread: f64 = rng.random_range(0.0..4.0);
        let gains = (0..clients).map(|_| {
            let mean = rng.random_range(-1.0..3.0_f64).exp();
            (0..subchannels)
                .map(|_| mean * (spread * rng.random_range(-1.0..1.0_f64)).exp())
                .collect()
        });
        Channel {
            subchannels,
            bandwidth_hz: 1e4,
            snr_per_watt: SnrPerWatt::Selective(gains.collect()),
            power_max_w: (0..clients).map(|_| rng.random_range(-1.0..2.0_f64).exp()).collect(),
            power_total_w: rng.random_range(-1.0..3.0_f64).exp(),
        }
    }

    fn demand(rng: &mut ChaCha8Rng, clients: usize) -> Demand {
        Demand {
            wait_s: (0..clients).map(|_| rng.random_range(-0.5..1.0_f64).max(0.0)).collect(),
            payload_bits: (0..clients).map(|_| rng.random_range(-2e3..3e4_f64).max(0.0)).collect(),
        }
    }

    /// The shortest phase of all ownerships.
    fn shortest_s(channel: &Channel, demand: &Demand) -> f64 {
        let (clients, subchannels) = (channel.clients(), channel.subchannels);
        (0..clients.pow(subchannels as u32))
            .filter_map(|mut code| {
                let owner: Vec<usize> = (0..subchannels)
                    .map(|_| {
                        let client = code % clients;
                        code /= clients;
                        client
                    })
                    .collect();
                fastest_s(channel, demand, &Holdings::new(channel, &owner))
            })
            .fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn no_prices_prove_a_possible_deadline_impossible() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut sharper = 0;
        for turn in 0..400 {
            let (clients, subchannels) = [(3, 6), (2, 10)][turn % 2];
            let channel = channel(&mut rng, clients, subchannels);
            let demand = demand(&mut rng, clients);
            let ladders = Ladders::new(&channel);
            let optimum_s = shortest_s(&channel, &demand);
            let counted_s = ladders.lower_bound_s(&demand);
            for case in 0..6 {
                let mut market = Market::new(&ladders, &demand, None);
                if case == 0 {
                    market.open(optimum_s);
                    market.ascend(optimum_s, 60);
                } else {
                    market.prices.power = rng.random_range(-0.5..1.0_f64).max(0.0);
                    // Some of what is best is out of reach: then clients want more of the rest than they would of all.
                    let dear = rng.random_range(0.0..20.0);
                    for (subchannel, price) in market.prices.subchannel.iter_mut().enumerate() {
                        let position = ladders
                            .order(0)
                            .unwrap()
                            .iter()
                            .position(|&i| i as usize == subchannel)
                            .unwrap();
                        let scale = if position < case { dear } else { 1.0 };
                        *price = scale * rng.random_range(-0.2..1.0_f64).max(0.0) + 1e-3;
                    }
                    market.prices.normalise();
                }
                for _ in 0..4 {
                    let from_s = demand.longest_wait_s() + 1e-6;
                    let bound_s = market.impossible_s(from_s, rng.random_range(1.0..3.0) * optimum_s);
                    assert!(
                        bound_s <= optimum_s.max(from_s) * (1.0 + 1e-9),
                        "{bound_s} {optimum_s} {channel:?} {demand:?}"
                    );
                    assert!(!market.is_impossible(optimum_s * (1.0 + 1e-9)));
                    sharper += usize::from(case == 0 && bound_s > counted_s * (1.0 + 1e-3));
                }
            }
        }
        assert!(sharper > 100, "{sharper}");
    }

    #[test]
    fn equal_prices_are_the_dual_of_the_count_bound() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for _ in 0..60 {
            let mut channel = channel(&mut rng, 8, 40);
            channel.power_max_w.fill(f64::INFINITY);
            let demand = demand(&mut rng, 8);
            let ladders = Ladders::new(&channel);
            let counted_s = ladders.lower_bound_s(&demand);
            let longest_s = demand.longest_wait_s();
            let mut market = Market::new(&ladders, &demand, None);
            market.open(counted_s);
            let mut priced_s = longest_s;
            for _ in 0..4 {
                priced_s = market.impossible_s(priced_s, 1.01 * counted_s);
            }
            assert!(priced_s <= counted_s * (1.0 + 1e-6), "{priced_s} {counted_s}");
            // Less by what whole subchannels come to.
            let (priced_s, counted_s) = (priced_s - longest_s, counted_s - longest_s);
            assert!(priced_s >= 0.9 * counted_s, "{priced_s} {counted_s}");
        }
    }

    #[test]
    fn prices_see_that_all_clients_want_the_same_subchannels() {
        // Half of the subchannels are a hundred times better for everybody: four clients cannot all have three of them.
        let gains: Vec<f64> = (0..12).map(|i| if i < 6 { 100.0 } else { 1.0 }).collect();
        let channel = Channel {
            subchannels: 12,
            bandwidth_hz: 1e4,
            snr_per_watt: SnrPerWatt::Selective(vec![gains; 4]),
            power_max_w: vec![f64::INFINITY; 4],
            power_total_w: 4.0,
        };
        let demand = Demand {
            wait_s: vec![0.0; 4],
            payload_bits: vec![1e5; 4],
        };
        let ladders = Ladders::new(&channel);
        let counted_s = ladders.lower_bound_s(&demand);
        let mut market = Market::new(&ladders, &demand, None);
        market.open(1.2 * counted_s);
        market.ascend(1.2 * counted_s, 60);
        let priced_s = market.impossible_s(counted_s, 2.0 * counted_s);
        assert!(priced_s > 1.1 * counted_s, "{priced_s} {counted_s}");
    }
}
