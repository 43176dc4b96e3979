//! Small instances drawn from a seed, in regimes that break solvers in different ways.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use sflllm::allocation::{Cell, Channel, LinkPlan, Plan, Problem, SnrPerWatt};

/// What is special about an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Regime {
    Ordinary,
    /// The links' total power binds, no client's own does.
    TotalPower,
    /// The clients' own powers bind, the total does not.
    ClientPower,
    /// -60 to -30 dB.
    TinySnr,
    /// 100 to 150 dB.
    HugeSnr,
    /// Waits between a millionth and a thousand times a transmission.
    UnequalWaits,
}

impl Regime {
    pub const ALL: [Self; 6] = [
        Self::Ordinary,
        Self::TotalPower,
        Self::ClientPower,
        Self::TinySnr,
        Self::HugeSnr,
        Self::UnequalWaits,
    ];

    /// How near to the optimum an exact method comes, relative. Far below the noise it is the rounding of a gain's logarithm as a
    /// part of the signal.
    pub fn tolerance(self) -> f64 {
        match self {
            Self::TinySnr => 1e-7,
            _ => 1e-9,
        }
    }
}

/// How large an instance is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub clients: usize,
    pub main: usize,
    pub federated: usize,
    pub splits: usize,
    pub ranks: usize,
    pub flat: bool,
}

impl Shape {
    /// 2 clients with 4 and 3 subchannels, 2 splits and 2 ranks.
    pub fn small(flat: bool) -> Self {
        Self {
            clients: 2,
            main: 4,
            federated: 3,
            splits: 2,
            ranks: 2,
            flat,
        }
    }
}

pub fn generator(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// `10^x` with x uniform.
pub fn log_uniform(rng: &mut impl Rng, low: f64, high: f64) -> f64 {
    10.0_f64.powf(rng.random_range(low..=high))
}

fn caps(rng: &mut impl Rng, shape: Shape) -> Vec<f64> {
    (0..shape.clients).map(|_| log_uniform(rng, -1.0, 0.5)).collect()
}

fn channel(rng: &mut impl Rng, regime: Regime, shape: Shape, subchannels: usize, power_max_w: Vec<f64>) -> Channel {
    let clients = shape.clients;
    let (low, high) = match regime {
        Regime::TinySnr => (-6.0, -3.0),
        Regime::HugeSnr => (10.0, 15.0),
        _ => (-0.5, 4.0),
    };
    let sum: f64 = power_max_w.iter().sum();
    let least = power_max_w.iter().copied().fold(f64::INFINITY, f64::min);
    let power_total_w = match regime {
        Regime::TotalPower => 0.9 * least * rng.random_range(0.05..1.0),
        Regime::ClientPower => 1.1 * sum,
        _ => sum * rng.random_range(0.2..1.2),
    };
    let mean: Vec<f64> = (0..clients).map(|_| log_uniform(rng, low, high)).collect();
    let snr_per_watt = match shape.flat {
        true => SnrPerWatt::Flat(mean),
        false => SnrPerWatt::Selective(
            mean.into_iter()
                .map(|gain| {
                    (0..subchannels)
                        .map(|_| gain * -(1.0 - rng.random::<f64>()).ln().min(-1e-3))
                        .collect()
                })
                .collect(),
        ),
    };
    Channel {
        subchannels,
        bandwidth_hz: log_uniform(rng, 3.0, 6.0),
        snr_per_watt,
        power_max_w,
        power_total_w,
    }
}

/// A problem of this shape and regime.
pub fn problem(rng: &mut impl Rng, regime: Regime, shape: Shape) -> Problem {
    // A client's cap is the same on each link.
    let caps = caps(rng, shape);
    let main = channel(rng, regime, shape, shape.main, caps.clone());
    let federated = channel(rng, regime, shape, shape.federated, caps);
    // Roughly what a second transmits, so that waits and transmissions are of a size.
    let typical = |channel: &Channel| {
        let gain = channel.snr_per_watt(0, 0);
        channel.bandwidth_hz * (channel.power_total_w / shape.clients as f64 * gain).ln_1p()
    };
    let (upload, adapter) = (typical(&main), typical(&federated));
    let cells = (0..shape.splits)
        .map(|_| {
            (0..shape.ranks)
                .map(|_| {
                    let mut waits = |scale: f64| -> Vec<f64> {
                        (0..shape.clients)
                            .map(|_| match regime {
                                Regime::UnequalWaits => log_uniform(rng, -6.0, 3.0),
                                _ => scale * rng.random::<f64>(),
                            })
                            .collect()
                    };
                    let (client_forward_s, client_backward_s) = (waits(1.0), waits(0.3));
                    Cell {
                        client_forward_s,
                        client_backward_s,
                        server_s: rng.random::<f64>(),
                        upload_bits: upload * rng.random_range(0.3..3.0),
                        adapter_bits: adapter * rng.random_range(0.3..3.0),
                        gradient_bits: upload * rng.random_range(0.3..3.0),
                        compute_j: (0..shape.clients).map(|_| rng.random::<f64>()).collect(),
                        memory_bytes: (0..shape.clients).map(|_| rng.random_range(1e6..1e7)).collect(),
                    }
                })
                .collect()
        })
        .collect();
    Problem {
        local_steps: rng.random_range(1..20),
        main,
        federated,
        download: None,
        broadcast: None,
        splits: (1..=shape.splits as u32).collect(),
        ranks: (1..=shape.ranks as u32).map(|rank| 2 * rank).collect(),
        rounds: (0..shape.ranks).map(|_| rng.random_range(20.0..100.0)).collect(),
        cells,
        memory_max_bytes: None,
        energy_weight_s_per_j: 0.0,
    }
}

/// The gradients' link: like the main link, with a base station's power.
pub fn download(rng: &mut impl Rng, regime: Regime, shape: Shape) -> Channel {
    let caps = caps(rng, shape);
    let channel = channel(rng, regime, shape, shape.main, caps);
    Channel {
        power_max_w: vec![f64::INFINITY; shape.clients],
        ..channel
    }
}

/// `problem` in the form of an instance file.
pub fn instance(name: &str, problem: &Problem) -> Value {
    let table = |value: fn(&Cell) -> Value| -> Value {
        (problem.cells.iter())
            .map(|row| row.iter().map(value).collect::<Value>())
            .collect()
    };
    let gains = |channel: &Channel| match &channel.snr_per_watt {
        SnrPerWatt::Flat(gains) => gains.iter().map(|&gain| vec![gain]).collect(),
        SnrPerWatt::Selective(gains) => gains.clone(),
    };
    json!({
        "name": name,
        "K": problem.clients(),
        "M": problem.main.subchannels,
        "N": problem.federated.subchannels,
        "local_iters": problem.local_steps,
        "flat": problem.main.is_flat(),
        "bandwidth_main_hz": problem.main.bandwidth_hz,
        "bandwidth_fed_hz": problem.federated.bandwidth_hz,
        "pmax_w": problem.main.power_max_w,
        "pth_main_w": problem.main.power_total_w,
        "pth_fed_w": problem.federated.power_total_w,
        "snr_per_watt_main": gains(&problem.main),
        "snr_per_watt_fed": gains(&problem.federated),
        "splits": problem.splits,
        "ranks": problem.ranks,
        "rounds": problem.rounds,
        "client_fwd_s": table(|cell| json!(cell.client_forward_s)),
        "client_bwd_s": table(|cell| json!(cell.client_backward_s)),
        "server_s": table(|cell| json!(cell.server_s)),
        "upload_bits": table(|cell| json!(cell.upload_bits)),
        "adapter_bits": table(|cell| json!(cell.adapter_bits)),
    })
}

/// A plan's total from its owners and powers alone: no claim of the plan is used.
pub fn reevaluated_s(problem: &Problem, plan: &Plan) -> f64 {
    let times = problem.times(plan).unwrap_or_else(|error| panic!("{error}: {plan:?}"));
    let delay_s = times.round_s(problem.local_steps);
    let energy_j = |channel: &Channel, link: &LinkPlan, sending_s: &[f64]| -> f64 {
        (0..channel.subchannels)
            .map(|subchannel| link.power_w[subchannel] * sending_s[link.owner[subchannel]])
            .sum()
    };
    let compute_j: f64 = (plan.split_index.iter().enumerate())
        .map(|(client, &split)| problem.cells[split][plan.rank_index].compute_j[client])
        .sum();
    let download_j = match (&problem.download, &plan.download) {
        (Some(channel), Some(link)) => energy_j(channel, link, &times.phases.download),
        _ => 0.0,
    };
    let step_j = compute_j + energy_j(&problem.main, &plan.main, &times.phases.upload) + download_j;
    let round_j =
        f64::from(problem.local_steps) * step_j + energy_j(&problem.federated, &plan.federated, &times.adapter_s);
    problem.rounds[plan.rank_index] * (delay_s + problem.energy_weight_s_per_j * round_j)
}

#[track_caller]
pub fn assert_near(found: f64, expected: f64, relative: f64, what: &str) {
    assert!(
        (found - expected).abs() <= relative * expected.abs(),
        "{what}: {found:e}, expected {expected:e}: off by {:e}",
        found / expected - 1.0
    );
}

#[track_caller]
pub fn assert_at_most(found: f64, limit: f64, relative: f64, what: &str) {
    assert!(
        found <= limit + relative * limit.abs(),
        "{what}: {found:e} is above {limit:e} by {:e}",
        found / limit - 1.0
    );
}
