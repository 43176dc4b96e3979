//! The local search for a deadline: subchannels are moved, exchanged and rotated until the powers that the deadline needs are
//! allowed. No ownership is proved the best, but it is hard to better one from here.

use super::bound::{EXACT, Ladders};
use super::channel::Channel;
use super::ownership::Found;
use super::power::{Demand, Holdings, fastest_s, ln_least_power, ln_water_level};

/// Rounds of [`Search::auction`].
const AUCTION_ROUNDS: usize = 24;

/// The state of a search.
pub(super) struct Search<'a> {
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
    /// The subchannel with the least ln γ and that, and the next one's.
    weakest: usize,
    ln_weakest: f64,
    ln_next: f64,
    need: Need,
    /// The water level in W where it is over all of them and within the cap, otherwise 0.
    level_w: f64,
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

/// Evaluations after which the best move of a client so far will do.
const MANY: usize = 4_000;
/// Times the patience after which moves are left untried.
const IMPATIENCE: usize = 4;
/// Violations that are rounding, in nepers.
const MET: f64 = 1e-13;

impl<'a> Search<'a> {
    pub fn new(ladders: &'a Ladders<'a>, demand: &'a Demand) -> Self {
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
    pub(crate) fn auction(&self, start: &[usize], deadline_s: f64) -> Vec<usize> {
        let Self {
            channel,
            demand,
            ln_gain,
            inverse,
            ..
        } = self;
        let clients = channel.clients();
        let nats: Vec<f64> = (0..clients)
            .map(|client| demand.nats(client, channel.bandwidth_hz, deadline_s))
            .collect();
        let mut owner = start.to_vec();
        let mut best = (f64::INFINITY, owner.clone());
        let mut most = vec![0.0; channel.subchannels];
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
            most.fill(0.0);
            for client in 0..clients {
                let (ln_level, level) = (ln_level[client], ln_level[client].exp());
                let gains = ln_gain[client].iter().zip(&inverse[client]);
                for (((ln_gain, inverse), most), owner) in gains.zip(&mut most).zip(&mut owner) {
                    let reach = ln_level + ln_gain;
                    let saved = level * (reach - 1.0) + inverse;
                    if reach > 0.0 && saved > *most {
                        (*most, *owner) = (saved, client);
                    }
                }
            }
        }
        best.1
    }

    /// Shortens the time until deadlines below it bring nothing any more.
    pub(crate) fn descend(&mut self, found: &mut Found) {
        let mut step = 0.5;
        while found.upper_s - found.lower_s > 1e-7 * found.upper_s && step > 0.1 {
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

    /// [`Search::reach`] with less patience.
    pub(crate) fn reach_hastily(&mut self, found: &mut Found, target_s: f64) -> bool {
        self.patience /= 4;
        let reached = self.reach(found, target_s);
        self.patience *= 4;
        reached
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
        let (gain, inverse) = (&self.ln_gain[client], &self.inverse[client]);
        let holding = &mut self.holdings[client];
        (holding.ln_gains, holding.inverses) = (0.0, 0.0);
        (holding.weakest, holding.ln_weakest, holding.ln_next) = (usize::MAX, f64::INFINITY, f64::INFINITY);
        for &subchannel in &holding.subchannels {
            holding.ln_gains += gain[subchannel];
            holding.inverses += inverse[subchannel];
            if gain[subchannel] < holding.ln_weakest {
                holding.ln_next = holding.ln_weakest;
                (holding.weakest, holding.ln_weakest) = (subchannel, gain[subchannel]);
            } else {
                holding.ln_next = holding.ln_next.min(gain[subchannel]);
            }
        }
        let need = self.need(client, None, None);
        let holding = &mut self.holdings[client];
        let ln_level = (self.nats[client] - holding.ln_gains) / holding.subchannels.len() as f64;
        let over_all = need.excess <= 0.0 && ln_level + holding.ln_weakest > 0.0 && self.nats[client] > 0.0;
        holding.level_w = if over_all { ln_level.exp() } else { 0.0 };
        holding.need = need;
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
        let mut weakest = holding.ln_weakest;
        if let Some(lost) = without {
            count -= 1;
            ln_gains -= gain[lost];
            inverses -= inverse[lost];
            if lost == holding.weakest {
                weakest = holding.ln_next;
            }
        }
        if let Some(got) = with {
            count += 1;
            ln_gains += gain[got];
            inverses += inverse[got];
            weakest = weakest.min(gain[got]);
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

    /// What all powers together are beyond the link's, relative to it.
    fn total_excess(&self, total_w: f64) -> f64 {
        (total_w / self.channel.power_total_w - 1.0).max(0.0)
    }

    /// How far the powers are beyond what is allowed; 0 when they are allowed.
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
            if self.violation() <= MET || self.evaluations > IMPATIENCE * self.patience {
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
            if evaluations > MANY && best.1.is_some() {
                break;
            }
            // Long sums take longer.
            let effort = 1 + (own.subchannels.len() + self.holdings[donor].subchannels.len()) / 64;
            if self.holdings[donor].subchannels.len() > 1 {
                evaluations += effort;
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
                evaluations += effort;
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

    /// Whether an exchange between two clients within their caps changes the violation by `least` or more, by tangents: with as many
    /// subchannels the power `m w - Σ 1/γ`, `w = exp((n - Σ ln γ) / m)`, is convex in `Σ ln γ`.
    fn hopeless_exchange(&self, receiver: (usize, usize), donor: (usize, usize), least: f64) -> bool {
        let (gets, gives) = (receiver.1, donor.1);
        let tangent_w = |client: usize, got: usize, lost: usize| {
            let (gain, inverse) = (&self.ln_gain[client], &self.inverse[client]);
            self.holdings[client].level_w * (gain[lost] - gain[got]) + (inverse[lost] - inverse[got])
        };
        let known = |client: usize| self.holdings[client].level_w > 0.0;
        if !known(receiver.0) || !known(donor.0) {
            return false;
        }
        let more_w = tangent_w(receiver.0, gets, gives) + tangent_w(donor.0, gives, gets);
        self.total_w <= self.channel.power_total_w || more_w >= least * self.channel.power_total_w
    }

    fn consider(&self, change: Move, best: &mut (f64, Option<Move>)) {
        let Move {
            subchannel,
            receiver,
            back,
        } = change;
        let donor = self.owner[subchannel];
        if let Some(back) = back
            && self.hopeless_exchange((receiver, subchannel), (donor, back), best.0)
        {
            return;
        }
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
