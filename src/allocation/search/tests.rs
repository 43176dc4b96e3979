//! Bounds against the plans they must not exceed, on small problems at random.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::channel::{Channel, SnrPerWatt};
use super::super::delay::{Cell, Problem};
use super::per_client::{every_choice, per_client_bound_s};
use super::*;

const CLIENTS: usize = 3;
const SPLITS: usize = 4;

fn channel(rng: &mut ChaCha8Rng) -> Channel {
    Channel {
        subchannels: 5,
        bandwidth_hz: 1e4,
        snr_per_watt: SnrPerWatt::Flat((0..CLIENTS).map(|_| rng.random_range(1.0..1e3)).collect()),
        power_max_w: vec![1.0; CLIENTS],
        power_total_w: rng.random_range(0.5..3.0),
    }
}

/// Few enough cuts to try them all.
fn problem(seed: u64) -> Problem {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    // Sometimes there is nothing to wait for or to send.
    let zero = |rng: &mut ChaCha8Rng, scale: f64| scale * rng.random_range(-0.3..1.0_f64).max(0.0);
    let nothing = seed.is_multiple_of(5);
    let cells = (0..SPLITS).map(|_| {
        vec![Cell {
            client_forward_s: (0..CLIENTS)
                .map(|_| if nothing { 0.0 } else { zero(rng, 2.0) })
                .collect(),
            client_backward_s: (0..CLIENTS).map(|_| zero(rng, 4.0)).collect(),
            server_s: zero(rng, 6.0),
            upload_bits: if nothing { 0.0 } else { zero(rng, 3e4) },
            adapter_bits: zero(rng, 3e4),
            gradient_bits: zero(rng, 3e4),
            compute_j: (0..CLIENTS).map(|_| zero(rng, 1.0)).collect(),
            memory_bytes: (0..CLIENTS).map(|_| zero(rng, 1.0)).collect(),
        }]
    });
    let cells = cells.collect();
    Problem {
        local_steps: 3,
        main: channel(rng),
        federated: channel(rng),
        download: (seed.is_multiple_of(3)).then(|| channel(rng)),
        broadcast: None,
        splits: (1..=SPLITS as u32).collect(),
        ranks: vec![4],
        rounds: vec![10.0],
        cells,
        memory_max_bytes: (seed.is_multiple_of(4)).then(|| vec![0.8; CLIENTS]),
        energy_weight_s_per_j: if seed.is_multiple_of(2) { 0.0 } else { 0.1 },
    }
}

#[test]
fn the_bound_on_cuts_of_the_clients_own_is_below_the_best_of_them() {
    let mut tight = 0;
    for seed in 0..400 {
        let problem = problem(seed);
        if problem.check().is_err() {
            continue;
        }
        let links = Links::new(&problem).unwrap();
        let (best, _) = per_client(&links).unwrap();
        let bound_s = per_client_bound_s(&links);
        assert!(
            bound_s <= best.total_s * (1.0 + 1e-9),
            "seed {seed}: {bound_s} {}",
            best.total_s
        );
        tight += usize::from(bound_s > 0.8 * best.total_s);
    }
    assert!(tight > 50, "{tight}");
}

#[test]
fn bounds_of_a_choice_are_below_its_links() {
    for seed in 0..200 {
        let problem = problem(seed);
        if problem.check().is_err() {
            continue;
        }
        let links = Links::new(&problem).unwrap();
        for choice in every_choice(&problem) {
            let solved = links.solve(&choice, None).unwrap();
            for bound_s in [
                links.quick_bound_s(&choice),
                links.count_bound_s(&choice),
                solved.lower_s,
            ] {
                assert!(
                    bound_s <= solved.total_s * (1.0 + 1e-9),
                    "seed {seed}, {choice:?}: {bound_s} {}",
                    solved.total_s
                );
            }
        }
    }
}
