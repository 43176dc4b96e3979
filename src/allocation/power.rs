//! Least power and least time when every subchannel has its owner: exact, without a solver.
//!
//! With `k`'s payload `D_k` (bits), its wait `a_k` (s, work before or after the transmission) and a deadline `T`, client `k` must
//! carry `n_k(T) = D_k ln 2 / (B (T - a_k))` nats per hertz, and the least power that does is inverse water-filling: with its
//! gains sorted and `m` of them active, `ln w = (n - Σ ln γ_i) / m` and `p_i = w - 1/γ_i`. That power falls strictly with `T`, so
//! the shortest phase is one root of one scalar function. The paper (arXiv 2504.14667) reaches the same point with auxiliary
//! rate variables and a general convex solver; a test compares the two.

use super::channel::Channel;

/// What each client must carry on a link.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// `[client]`: work before or after the transmission, in s; the end of the phase does not care which.
    pub wait_s: Vec<f64>,
    /// `[client]`, in bits.
    pub payload_bits: Vec<f64>,
}

impl Demand {
    /// Nats per hertz of one subchannel's width that `client` must carry to end at `deadline_s`; infinite when it cannot.
    pub fn nats(&self, client: usize, bandwidth_hz: f64, deadline_s: f64) -> f64 {
        let bits = self.payload_bits[client];
        let time_s = deadline_s - self.wait_s[client];
        if bits <= 0.0 && time_s >= 0.0 {
            return 0.0;
        }
        if time_s <= 0.0 {
            return f64::INFINITY;
        }
        // However little it is, it takes a subchannel.
        (bits * std::f64::consts::LN_2 / (bandwidth_hz * time_s)).max(f64::MIN_POSITIVE)
    }

    /// The longest wait, which no deadline can be before, in s.
    pub(crate) fn longest_wait_s(&self) -> f64 {
        self.wait_s.iter().copied().fold(0.0, f64::max)
    }
}

/// The water level over some of a client's subchannels, relative to its best gain: `reach = ln(w γ_1)`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Water {
    reach: f64,
    /// Subchannels with power, the best ones.
    active: usize,
}

/// The level that carries `nats` over gains with logarithms `ln_gain`, sorted, best first, of which there is at least one.
fn level(ln_gain: &[f64], nats: f64) -> Water {
    // Differences to the best gain, so that equal gains cancel exactly.
    let best = ln_gain[0];
    let mut behind: f64 = ln_gain.iter().map(|gain| best - gain).sum();
    let mut active = ln_gain.len();
    while active > 1 {
        let reach = (nats + behind) / active as f64;
        let weakest = best - ln_gain[active - 1];
        if reach > weakest {
            return Water { reach, active };
        }
        active -= 1;
        behind -= weakest;
    }
    // What is left of `behind` is rounding.
    Water { reach: nats, active }
}

/// Natural logarithm of the least power, in ln W, that carries `nats` over gains with logarithms `ln_gain`, sorted, best first;
/// infinite when there is no gain to carry them. The logarithm, because a starved client's power overflows.
pub(super) fn ln_least_power(ln_gain: &[f64], nats: f64) -> f64 {
    if nats <= 0.0 {
        return f64::NEG_INFINITY;
    }
    if ln_gain.is_empty() || nats == f64::INFINITY {
        return f64::INFINITY;
    }
    let Water { reach, active } = level(ln_gain, nats);
    let best = ln_gain[0];
    if reach > 30.0 {
        // 1/γ is lost in w but for the weakest: P = m w - Σ 1/γ_i.
        let inverse: f64 = ln_gain[..active].iter().map(|gain| (best - gain - reach).exp()).sum();
        return reach - best + (active as f64 - inverse).ln();
    }
    let relative: f64 = ln_gain[..active]
        .iter()
        .map(|gain| (best - gain).exp() * (reach - (best - gain)).exp_m1())
        .sum();
    relative.ln() - best
}

/// Natural logarithm of the water level, in ln W, that carries `nats` over gains with logarithms `ln_gain`, sorted, best first.
pub(super) fn ln_water_level(ln_gain: &[f64], nats: f64) -> f64 {
    level(ln_gain, nats).reach - ln_gain[0]
}

/// The most nats per hertz that `power_w` carries over gains with logarithms `ln_gain`, sorted, best first.
pub(super) fn most_nats(ln_gain: &[f64], power_w: f64) -> f64 {
    let Some(&best) = ln_gain.first() else { return 0.0 };
    let budget = (power_w.ln() + best).exp();
    let hurdle = |gain: &f64| (best - gain).exp();
    let mut active = ln_gain.len();
    let mut sum: f64 = ln_gain.iter().map(hurdle).sum();
    while active > 1 {
        let weakest = hurdle(&ln_gain[active - 1]);
        let spare = (budget + (sum - active as f64 * weakest)) / active as f64;
        if spare > 0.0 {
            // p_i γ_i = (w γ_1 - h_i) / h_i with h_i = γ_1 / γ_i
            return ln_gain[..active]
                .iter()
                .map(|gain| (((weakest - hurdle(gain)) + spare) / hurdle(gain)).ln_1p())
                .sum();
        }
        active -= 1;
        sum -= weakest;
    }
    budget.ln_1p()
}

/// Who sends where on a link, with what power, and how long the phase takes.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkPlan {
    /// `[subchannel]`: the client that has it.
    pub owner: Vec<usize>,
    /// `[subchannel]`: the least powers that end the phase at `phase_s`.
    pub power_w: Vec<f64>,
    /// When the last client has waited and sent, in s.
    pub phase_s: f64,
    /// Of all clients' transmissions, in J.
    pub energy_j: f64,
}

impl LinkPlan {
    /// What the plan costs when a joule counts as `energy_weight_s_per_j` seconds.
    pub(crate) fn cost_s(&self, energy_weight_s_per_j: f64) -> f64 {
        self.phase_s + energy_weight_s_per_j * self.energy_j
    }
}

/// Each client's subchannels, best first.
pub(super) struct Holdings {
    /// `[client][position]`
    pub subchannels: Vec<Vec<usize>>,
    /// `[client][position]`: natural logarithms of SNR per watt.
    pub ln_gain: Vec<Vec<f64>>,
}

impl Holdings {
    pub fn new(channel: &Channel, owner: &[usize]) -> Self {
        let mut subchannels = vec![Vec::new(); channel.clients()];
        for (subchannel, &client) in owner.iter().enumerate() {
            subchannels[client].push(subchannel);
        }
        let mut ln_gain = Vec::with_capacity(subchannels.len());
        for (client, own) in subchannels.iter_mut().enumerate() {
            if !channel.is_flat() {
                own.sort_by(|&a, &b| {
                    channel
                        .snr_per_watt(client, b)
                        .total_cmp(&channel.snr_per_watt(client, a))
                });
            }
            ln_gain.push(own.iter().map(|&i| channel.snr_per_watt(client, i).ln()).collect());
        }
        Self { subchannels, ln_gain }
    }
}

/// The fastest powers for a given ownership, or with `energy_weight_s_per_j` above 0 the ones with the least
/// `phase + weight × energy`: exact to rounding. `None` when a client with a payload has no subchannel.
pub fn control(channel: &Channel, demand: &Demand, owner: &[usize], energy_weight_s_per_j: f64) -> Option<LinkPlan> {
    let holdings = Holdings::new(channel, owner);
    let link = Transmission {
        channel,
        demand,
        holdings: &holdings,
    };
    let fastest_s = link.fastest_s()?;
    let phase_s = match energy_weight_s_per_j > 0.0 {
        true => link.thriftiest_s(fastest_s, energy_weight_s_per_j),
        false => fastest_s,
    };
    Some(link.plan(owner, phase_s))
}

/// The shortest phase for a given ownership, in s: [`control`] without the powers.
pub(super) fn fastest_s(channel: &Channel, demand: &Demand, holdings: &Holdings) -> Option<f64> {
    Transmission {
        channel,
        demand,
        holdings,
    }
    .fastest_s()
}

/// The shortest deadline in a bracket at which `power` (Σ P in W, and its derivative in W/s) is within `total_w`; the end of the
/// bracket is one that is.
pub(super) fn shortest_s((mut low, mut high): (f64, f64), total_w: f64, power: impl Fn(f64) -> (f64, f64)) -> f64 {
    // Newton on ln(Σ P / total), convex and falling, from the left; the bracket keeps it honest where rounding does not.
    let start = low;
    let mut deadline_s = low;
    for _ in 0..200 {
        let (power_w, slope) = power(deadline_s);
        if power_w <= total_w {
            high = deadline_s;
            if deadline_s == start || power_w >= total_w * (1.0 - 1e-14) {
                break;
            }
        } else {
            low = deadline_s;
        }
        if high - low <= 4.0 * f64::EPSILON * high {
            break;
        }
        let newton = deadline_s - (power_w / total_w).ln() * power_w / slope;
        deadline_s = match newton.is_finite() && newton > low && newton < high {
            true => newton,
            false => 0.5 * (low + high),
        };
    }
    high
}

struct Transmission<'a> {
    channel: &'a Channel,
    demand: &'a Demand,
    holdings: &'a Holdings,
}

impl Transmission<'_> {
    fn nats(&self, client: usize, deadline_s: f64) -> f64 {
        self.demand.nats(client, self.channel.bandwidth_hz, deadline_s)
    }

    /// When `client` ends with at most `power_w`, in s.
    fn end_s(&self, client: usize, power_w: f64) -> f64 {
        let bits = self.demand.payload_bits[client];
        if bits <= 0.0 {
            return self.demand.wait_s[client];
        }
        let nats = most_nats(&self.holdings.ln_gain[client], power_w);
        self.demand.wait_s[client] + bits * std::f64::consts::LN_2 / (self.channel.bandwidth_hz * nats)
    }

    /// Σ P_k and its derivative by the deadline, in W and W/s.
    fn total_power(&self, deadline_s: f64) -> (f64, f64) {
        let (mut power, mut slope) = (0.0, 0.0);
        for (client, ln_gain) in self.holdings.ln_gain.iter().enumerate() {
            let nats = self.nats(client, deadline_s);
            if nats <= 0.0 {
                continue;
            }
            power += ln_least_power(ln_gain, nats).exp();
            // dP/dn = w, dn/dT = -n / (T - a)
            let level_w = (level(ln_gain, nats).reach - ln_gain[0]).exp();
            slope -= level_w * nats / (deadline_s - self.demand.wait_s[client]);
        }
        (power, slope)
    }

    fn fastest_s(&self) -> Option<f64> {
        let clients = self.channel.clients();
        let total = self.channel.power_total_w;
        let (mut low, mut high) = (0.0_f64, 0.0_f64);
        for client in 0..clients {
            if self.demand.payload_bits[client] > 0.0 && self.holdings.ln_gain[client].is_empty() {
                return None;
            }
            let own = self.channel.power_max_w[client];
            low = low.max(self.end_s(client, own.min(total)));
            high = high.max(self.end_s(client, own.min(total / clients as f64)));
        }
        if !high.is_finite() {
            return None;
        }
        Some(shortest_s((low, high), total, |deadline_s| {
            self.total_power(deadline_s)
        }))
    }

    /// The deadline from `fastest_s` on at which one more second costs as much as it saves. The energy `P_k(T) (T - a_k)` is the
    /// perspective of a convex function, so this is again one root of one rising function.
    fn thriftiest_s(&self, fastest_s: f64, weight: f64) -> f64 {
        let slope = |deadline_s: f64| {
            let mut slope = 1.0;
            for (client, ln_gain) in self.holdings.ln_gain.iter().enumerate() {
                let nats = self.nats(client, deadline_s);
                if nats > 0.0 {
                    let level_w = (level(ln_gain, nats).reach - ln_gain[0]).exp();
                    slope += weight * (ln_least_power(ln_gain, nats).exp() - level_w * nats);
                }
            }
            slope
        };
        if slope(fastest_s) >= 0.0 {
            return fastest_s;
        }
        let (mut low, mut high) = (fastest_s, fastest_s * 2.0);
        while slope(high) < 0.0 && high < fastest_s * 1e9 {
            (low, high) = (high, high * 2.0);
        }
        while high - low > 1e-14 * high {
            let middle = 0.5 * (low + high);
            if middle <= low || middle >= high {
                break;
            }
            match slope(middle) < 0.0 {
                true => low = middle,
                false => high = middle,
            }
        }
        high
    }

    /// The powers that end at `deadline_s`. They and not the deadline are the plan: rounding must not put a sum above its cap (a
    /// transmission much shorter than the wait before it) nor end the phase at another time than they do (a signal far below
    /// the noise), so sums are cut to their caps and the phase is the time that these powers take.
    fn plan(&self, owner: &[usize], deadline_s: f64) -> LinkPlan {
        let channel = self.channel;
        let mut power_w = vec![0.0; owner.len()];
        let mut total_w = 0.0;
        for (client, ln_gain) in self.holdings.ln_gain.iter().enumerate() {
            let cap_w = channel.power_max_w[client];
            let nats = (self.nats(client, deadline_s)).min(most_nats(ln_gain, cap_w.min(channel.power_total_w)));
            if nats <= 0.0 || ln_gain.is_empty() {
                continue;
            }
            let Water { reach, active } = level(ln_gain, nats);
            let best = ln_gain[0];
            let own = &self.holdings.subchannels[client][..active];
            for (&subchannel, gain) in own.iter().zip(ln_gain) {
                let behind = best - gain;
                power_w[subchannel] = (-gain).exp() * (reach - behind).exp_m1().max(0.0);
            }
            let sum_w: f64 = own.iter().map(|&subchannel| power_w[subchannel]).sum();
            if sum_w > cap_w {
                own.iter().for_each(|&subchannel| power_w[subchannel] *= cap_w / sum_w);
            }
            total_w += sum_w.min(cap_w);
        }
        if total_w > channel.power_total_w {
            power_w
                .iter_mut()
                .for_each(|power| *power *= channel.power_total_w / total_w);
        }
        let (mut phase_s, mut energy_j) = (0.0_f64, 0.0);
        for (client, own) in self.holdings.subchannels.iter().enumerate() {
            let bits = self.demand.payload_bits[client];
            let mut sending_s = 0.0;
            if bits > 0.0 {
                let nats: f64 = (own.iter())
                    .map(|&subchannel| (power_w[subchannel] * channel.snr_per_watt(client, subchannel)).ln_1p())
                    .sum();
                sending_s = bits * std::f64::consts::LN_2 / (channel.bandwidth_hz * nats);
            }
            phase_s = phase_s.max(self.demand.wait_s[client] + sending_s);
            energy_j += sending_s * own.iter().map(|&subchannel| power_w[subchannel]).sum::<f64>();
        }
        LinkPlan {
            owner: owner.to_vec(),
            power_w,
            phase_s,
            energy_j,
        }
    }
}
