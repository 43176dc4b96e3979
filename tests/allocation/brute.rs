//! Optima by trying everything. It shares no formula with the crate but the definitions: a client's power is found by bisection of
//! its water level, a phase by bisection of its deadline, owners by counting through all of them.

use sflllm::allocation::{Channel, Demand, Problem};

/// Halvings of an interval until nothing is left of it.
const HALVINGS: usize = 110;

/// The least power of a client that sends `bits` in `time_s`; infinite when it cannot.
pub fn least_power_w(gains: &[f64], bandwidth_hz: f64, bits: f64, time_s: f64) -> f64 {
    if bits == 0.0 && time_s >= 0.0 {
        return 0.0;
    }
    if gains.is_empty() || time_s <= 0.0 {
        return f64::INFINITY;
    }
    let nats = bits / (bandwidth_hz * time_s) * std::f64::consts::LN_2;
    let best = gains.iter().copied().fold(0.0, f64::max);
    // Of the logarithm of the water level times the best gain: at `nats` the best subchannel alone carries everything.
    let carried = |level: f64| -> f64 { gains.iter().map(|gain| (level + (gain / best).ln()).max(0.0)).sum() };
    let (mut low, mut high) = (0.0, nats);
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        match carried(middle) < nats {
            true => low = middle,
            false => high = middle,
        }
    }
    (gains.iter())
        .map(|gain| (high + (gain / best).ln()).max(0.0).exp_m1() / gain)
        .sum()
}

/// The clients' powers when the phase ends at `deadline_s`.
fn powers_w(channel: &Channel, demand: &Demand, owner: &[usize], deadline_s: f64) -> Vec<f64> {
    (0..channel.clients())
        .map(|client| {
            let gains: Vec<f64> = (0..channel.subchannels)
                .filter(|&subchannel| owner[subchannel] == client)
                .map(|subchannel| channel.snr_per_watt(client, subchannel))
                .collect();
            least_power_w(
                &gains,
                channel.bandwidth_hz,
                demand.payload_bits[client],
                deadline_s - demand.wait_s[client],
            )
        })
        .collect()
}

fn is_possible(channel: &Channel, demand: &Demand, owner: &[usize], deadline_s: f64) -> bool {
    let powers = powers_w(channel, demand, owner, deadline_s);
    powers.iter().sum::<f64>() <= channel.power_total_w
        && powers.iter().zip(&channel.power_max_w).all(|(power, cap)| power <= cap)
}

/// The shortest phase with these owners, if it is below `limit_s`.
pub fn phase_s(channel: &Channel, demand: &Demand, owner: &[usize], limit_s: f64) -> Option<f64> {
    let possible = |deadline_s: f64| is_possible(channel, demand, owner, deadline_s);
    let mut high = limit_s;
    if limit_s == f64::INFINITY {
        high = 1e-9;
        while !possible(high) {
            high *= 2.0;
            if high > 1e30 {
                return None;
            }
        }
    } else if !possible(high) {
        return None;
    }
    let mut low = 0.0;
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        if high - low <= 1e-14 * high {
            break;
        }
        match possible(middle) {
            true => high = middle,
            false => low = middle,
        }
    }
    Some(high)
}

/// Every ownership of `subchannels` by `clients`.
pub fn owners(clients: usize, subchannels: usize) -> impl Iterator<Item = Vec<usize>> {
    (0..clients.pow(subchannels as u32)).map(move |mut number| {
        (0..subchannels)
            .map(|_| {
                let owner = number % clients;
                number /= clients;
                owner
            })
            .collect()
    })
}

/// The shortest phase over all owners.
pub fn link_s(channel: &Channel, demand: &Demand) -> f64 {
    let mut best = f64::INFINITY;
    for owner in owners(channel.clients(), channel.subchannels) {
        let idle = (0..channel.clients()).any(|client| demand.payload_bits[client] > 0.0 && !owner.contains(&client));
        if idle {
            continue;
        }
        // An ownership that is not a little better is none.
        if let Some(found) = phase_s(channel, demand, &owner, best * (1.0 - 1e-12)) {
            best = found;
        }
    }
    best
}

/// The least `phase + weight × energy` over all owners and a grid of deadlines, from the shortest on.
pub fn thrifty_link_s(channel: &Channel, demand: &Demand, weight_s_per_j: f64) -> f64 {
    const POINTS: usize = 400;
    let mut best = f64::INFINITY;
    for owner in owners(channel.clients(), channel.subchannels) {
        let idle = (0..channel.clients()).any(|client| demand.payload_bits[client] > 0.0 && !owner.contains(&client));
        if idle {
            continue;
        }
        let Some(fastest_s) = phase_s(channel, demand, &owner, f64::INFINITY) else {
            continue;
        };
        let cost = |deadline_s: f64| -> f64 {
            let energy_j: f64 = (powers_w(channel, demand, &owner, deadline_s).iter())
                .zip(&demand.wait_s)
                .map(|(power, wait)| power * (deadline_s - wait))
                .sum();
            deadline_s + weight_s_per_j * energy_j
        };
        let least = cost(fastest_s);
        let last_s = least.min(best);
        best = best.min(least);
        for point in 1..=POINTS {
            let deadline_s = fastest_s + (last_s - fastest_s) * point as f64 / POINTS as f64;
            if deadline_s > fastest_s {
                best = best.min(cost(deadline_s));
            }
        }
    }
    best
}

/// Every way of giving each of `clients` one of `splits`.
pub fn every_split(clients: usize, splits: usize) -> impl Iterator<Item = Vec<usize>> {
    owners(splits, clients)
}

/// The least total with client `k` cut at `split_index[k]`.
pub fn total_s(problem: &Problem, split_index: &[usize], rank: usize) -> f64 {
    let clients = problem.clients();
    let cell = |client: usize| &problem.cells[split_index[client]][rank];
    let of = |value: &dyn Fn(usize) -> f64| (0..clients).map(value).collect::<Vec<f64>>();
    let longest = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let main = Demand {
        wait_s: of(&|client| cell(client).client_forward_s[client]),
        payload_bits: of(&|client| cell(client).upload_bits),
    };
    let federated = Demand {
        wait_s: vec![0.0; clients],
        payload_bits: of(&|client| cell(client).adapter_bits),
    };
    let backward = of(&|client| cell(client).client_backward_s[client]);
    let back_s = match &problem.download {
        None => longest(&backward),
        Some(channel) => {
            let demand = Demand {
                wait_s: backward,
                payload_bits: of(&|client| cell(client).gradient_bits),
            };
            link_s(channel, &demand)
        }
    };
    let server_s = of(&|client| cell(client).server_s).iter().sum::<f64>() / clients as f64;
    let broadcast_s = match &problem.broadcast {
        Some(broadcast) => longest(&federated.payload_bits) / broadcast.rate_bits_per_s,
        None => 0.0,
    };
    let step_s = link_s(&problem.main, &main) + server_s + back_s;
    problem.rounds[rank]
        * (f64::from(problem.local_steps) * step_s + link_s(&problem.federated, &federated) + broadcast_s)
}

fn fits(problem: &Problem, split_index: &[usize], rank: usize) -> bool {
    (split_index.iter().enumerate()).all(|(client, &split)| match &problem.memory_max_bytes {
        Some(caps) => problem.cells[split][rank].memory_bytes[client] <= caps[client],
        None => true,
    })
}

/// The optimum with one cut for all clients; infinite when none fits.
pub fn uniform_s(problem: &Problem) -> f64 {
    let mut best = f64::INFINITY;
    for split in 0..problem.splits.len() {
        for rank in 0..problem.ranks.len() {
            let split_index = vec![split; problem.clients()];
            if fits(problem, &split_index, rank) {
                best = best.min(total_s(problem, &split_index, rank));
            }
        }
    }
    best
}

/// The optimum with a cut for every client.
pub fn per_client_s(problem: &Problem) -> f64 {
    let mut best = f64::INFINITY;
    for rank in 0..problem.ranks.len() {
        for split_index in every_split(problem.clients(), problem.splits.len()) {
            if fits(problem, &split_index, rank) {
                best = best.min(total_s(problem, &split_index, rank));
            }
        }
    }
    best
}
