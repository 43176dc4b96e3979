//! Power control at fixed owners against a general conic solver, which is given the problem as the paper poses it.

use clarabel::algebra::CscMatrix;
use clarabel::solver::{
    DefaultSettingsBuilder, DefaultSolver, ExponentialConeT, IPSolver, NonnegativeConeT, SecondOrderConeT,
    SolverStatus, SupportedConeT,
};
use rand::RngExt;
use sflllm::allocation::power::control;
use sflllm::allocation::{Channel, Demand, SnrPerWatt};

use crate::brute;
use crate::instances::{assert_at_most, assert_near, generator, log_uniform};

/// The constraint `b - A x ∈ cone`, row by row.
#[derive(Default)]
struct Rows {
    /// (row, column, value)
    entries: Vec<(usize, usize, f64)>,
    right: Vec<f64>,
    cones: Vec<SupportedConeT<f64>>,
}

impl Rows {
    /// Adds `right - Σ value · x[column]`.
    fn push(&mut self, right: f64, terms: &[(usize, f64)]) {
        let row = self.right.len();
        self.entries
            .extend(terms.iter().map(|&(column, value)| (row, column, value)));
        self.right.push(right);
    }

    fn matrix(&self, columns: usize) -> CscMatrix<f64> {
        let (mut rows, mut places, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for &(row, column, value) in &self.entries {
            rows.push(row);
            places.push(column);
            values.push(value);
        }
        CscMatrix::new_from_triplets(self.right.len(), columns, rows, places, values)
    }
}

/// The shortest phase by the solver. Variables: the phase, each subchannel's nats, each subchannel's power as a part of the link's
/// total.
///
/// minimise T subject to `nats_i ≤ ln(1 + p_i γ_i)` (exponential cone), `(Σ nats) (T - a_k) ≥ D_k ln 2 / B` (rotated second-order
/// cone), and the powers' sums.
fn solver_phase_s(channel: &Channel, demand: &Demand, owner: &[usize]) -> f64 {
    let subchannels = channel.subchannels;
    let nats = |subchannel: usize| 1 + subchannel;
    let power = |subchannel: usize| 1 + subchannels + subchannel;
    let columns = 1 + 2 * subchannels;
    let mut rows = Rows::default();
    for subchannel in 0..subchannels {
        rows.push(0.0, &[(power(subchannel), -1.0)]);
    }
    let all: Vec<(usize, f64)> = (0..subchannels).map(|subchannel| (power(subchannel), 1.0)).collect();
    rows.push(1.0, &all);
    for client in 0..channel.clients() {
        let own: Vec<(usize, f64)> = (0..subchannels)
            .filter(|&subchannel| owner[subchannel] == client)
            .map(|subchannel| (power(subchannel), 1.0))
            .collect();
        rows.push(channel.power_max_w[client] / channel.power_total_w, &own);
    }
    rows.cones.push(NonnegativeConeT(rows.right.len()));
    for client in 0..channel.clients() {
        // x y ≥ c is ‖(2 √c, x - y)‖ ≤ x + y
        let load = demand.payload_bits[client] * std::f64::consts::LN_2 / channel.bandwidth_hz;
        let wait = demand.wait_s[client];
        let own = |sign: f64| -> Vec<(usize, f64)> {
            (0..subchannels)
                .filter(|&subchannel| owner[subchannel] == client)
                .map(|subchannel| (nats(subchannel), -1.0))
                .chain([(0, sign)])
                .collect()
        };
        rows.push(-wait, &own(-1.0));
        rows.push(wait, &own(1.0));
        rows.push(2.0 * load.sqrt(), &[]);
        rows.cones.push(SecondOrderConeT(3));
    }
    for (subchannel, &client) in owner.iter().enumerate() {
        let snr = channel.snr_per_watt(client, subchannel) * channel.power_total_w;
        rows.push(0.0, &[(nats(subchannel), -1.0)]);
        rows.push(1.0, &[]);
        rows.push(1.0, &[(power(subchannel), -snr)]);
        rows.cones.push(ExponentialConeT());
    }
    let mut linear = vec![0.0; columns];
    linear[0] = 1.0;
    let settings = DefaultSettingsBuilder::default()
        .verbose(false)
        .max_iter(500)
        .tol_gap_abs(1e-10)
        .tol_gap_rel(1e-10)
        .tol_feas(1e-10)
        .build()
        .unwrap();
    let quadratic = CscMatrix::zeros((columns, columns));
    let matrix = rows.matrix(columns);
    let mut solver = DefaultSolver::new(&quadratic, &linear, &matrix, &rows.right, &rows.cones, settings).unwrap();
    solver.solve();
    assert!(
        matches!(
            solver.solution.status,
            SolverStatus::Solved | SolverStatus::AlmostSolved
        ),
        "{:?}",
        solver.solution.status
    );
    solver.solution.x[0]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Binding {
    Total,
    Caps,
    Either,
}

struct Case {
    channel: Channel,
    demand: Demand,
    owner: Vec<usize>,
}

fn case(seed: u64, binding: Binding, unequal: bool) -> Case {
    let mut rng = generator(seed);
    let clients = rng.random_range(1..6);
    let subchannels = rng.random_range(clients..=4 * clients);
    let power_max_w: Vec<f64> = (0..clients).map(|_| log_uniform(&mut rng, -1.0, 0.3)).collect();
    let sum: f64 = power_max_w.iter().sum();
    let least = power_max_w.iter().copied().fold(f64::INFINITY, f64::min);
    let power_total_w = match binding {
        Binding::Total => 0.8 * least,
        Binding::Caps => 1.5 * sum,
        Binding::Either => sum * rng.random_range(0.3..1.0),
    };
    let mean: Vec<f64> = (0..clients).map(|_| log_uniform(&mut rng, 0.0, 3.0)).collect();
    let snr_per_watt = SnrPerWatt::Selective(
        (mean.iter())
            .map(|mean| {
                (0..subchannels)
                    .map(|_| mean * log_uniform(&mut rng, -1.5, 0.5))
                    .collect()
            })
            .collect(),
    );
    let owner = (0..subchannels)
        .map(|subchannel| match subchannel < clients {
            true => subchannel,
            false => rng.random_range(0..clients),
        })
        .collect();
    let longest: f64 = if unequal { 3.0 } else { 0.0 };
    Case {
        demand: Demand {
            wait_s: (0..clients).map(|_| longest * rng.random::<f64>()).collect(),
            payload_bits: (0..clients).map(|_| log_uniform(&mut rng, 3.5, 4.5)).collect(),
        },
        channel: Channel {
            subchannels,
            bandwidth_hz: 1e4,
            snr_per_watt,
            power_max_w,
            power_total_w,
        },
        owner,
    }
}

fn compare_with_the_solver(binding: Binding) {
    for seed in 0..24 {
        let Case { channel, demand, owner } = case(seed, binding, seed % 3 != 0);
        let plan = control(&channel, &demand, &owner, 0.0).unwrap();
        let expected = solver_phase_s(&channel, &demand, &owner);
        assert_near(plan.phase_s, expected, 1e-6, &format!("{binding:?}, seed {seed}"));
    }
}

#[test]
fn powers_match_a_conic_solver_where_the_total_binds() {
    compare_with_the_solver(Binding::Total);
}

#[test]
fn powers_match_a_conic_solver_where_the_caps_bind() {
    compare_with_the_solver(Binding::Caps);
}

#[test]
fn powers_match_a_conic_solver_where_either_binds() {
    compare_with_the_solver(Binding::Either);
}

#[test]
fn powers_are_the_least_that_end_when_the_plan_says() {
    for seed in 0..200 {
        let binding = [Binding::Total, Binding::Caps, Binding::Either][seed as usize % 3];
        let Case { channel, demand, owner } = case(seed, binding, true);
        let plan = control(&channel, &demand, &owner, 0.0).unwrap();
        for client in 0..channel.clients() {
            let own = |subchannel: &usize| owner[*subchannel] == client;
            let gains: Vec<f64> = (0..channel.subchannels)
                .filter(own)
                .map(|subchannel| channel.snr_per_watt(client, subchannel))
                .collect();
            let time_s = plan.phase_s - demand.wait_s[client];
            let least_w = brute::least_power_w(&gains, channel.bandwidth_hz, demand.payload_bits[client], time_s);
            let power_w: f64 = (0..channel.subchannels).filter(own).map(|i| plan.power_w[i]).sum();
            assert_near(power_w, least_w, 1e-9, &format!("seed {seed}, client {client}"));
            assert_at_most(
                power_w,
                channel.power_max_w[client],
                1e-12,
                &format!("seed {seed}, client {client}"),
            );
        }
        assert_at_most(
            plan.power_w.iter().sum(),
            channel.power_total_w,
            1e-12,
            &format!("seed {seed}"),
        );
    }
}

#[test]
fn a_transmission_far_shorter_than_the_wait_before_it_keeps_its_cap() {
    for (wait_s, bits) in [(1e3, 1e-2), (1e6, 1.0), (1e9, 1e-3)] {
        let channel = Channel {
            subchannels: 3,
            bandwidth_hz: 1e3,
            snr_per_watt: SnrPerWatt::Flat(vec![1e6, 1e9]),
            power_max_w: vec![1.0, 2.0],
            power_total_w: 3.0,
        };
        let demand = Demand {
            wait_s: vec![wait_s, 0.5 * wait_s],
            payload_bits: vec![bits; 2],
        };
        let plan = control(&channel, &demand, &[0, 1, 0], 0.0).unwrap();
        assert!(plan.power_w[0] + plan.power_w[2] <= 1.0 + 1e-12, "{plan:?}");
        assert!(plan.phase_s.is_finite() && plan.phase_s >= wait_s, "{plan:?}");
    }
}
