//! What goes beyond the paper is the paper's problem where it is switched off, and brute force's where it is on.

use rand::RngExt;
use sflllm::allocation::{Broadcast, Cell, Error, Method, Plan, Problem, SolveOptions, solve};

use crate::brute;
use crate::instances::{Regime, Shape, assert_at_most, assert_near, download, generator, problem, reevaluated_s};

const SHAPE: Shape = Shape {
    clients: 3,
    main: 4,
    federated: 3,
    splits: 3,
    ranks: 2,
    flat: false,
};

fn shape(seed: u64) -> Shape {
    Shape {
        clients: 2 + seed as usize % 2,
        flat: seed % 4 < 2,
        ..SHAPE
    }
}

fn regime(seed: u64) -> Regime {
    [
        Regime::Ordinary,
        Regime::TotalPower,
        Regime::ClientPower,
        Regime::UnequalWaits,
    ][seed as usize % 4]
}

fn plain(seed: u64) -> Problem {
    problem(&mut generator(seed), regime(seed), shape(seed))
}

fn best(problem: &Problem) -> Plan {
    solve(problem, Method::Best, &SolveOptions::default()).unwrap()
}

fn best_per_client(problem: &Problem) -> Plan {
    let options = SolveOptions {
        per_client_split: true,
        ..Default::default()
    };
    solve(problem, Method::Best, &options).unwrap()
}

fn for_every_cell(problem: &mut Problem, change: impl FnMut(&mut Cell)) {
    problem.cells.iter_mut().flatten().for_each(change);
}

/// That `best` is brute force's optimum, with a true bound, and comes to what it says.
fn assert_optimal(problem: &Problem, seed: u64) {
    let found = best(problem);
    let optimum = brute::uniform_s(problem);
    assert_near(found.total_s, optimum, 1e-9, &format!("seed {seed}"));
    assert_at_most(found.lower_bound_s, optimum, 1e-9, &format!("seed {seed}: lower bound"));
    assert_near(
        reevaluated_s(problem, &found),
        found.total_s,
        1e-9,
        &format!("seed {seed}"),
    );
}

#[test]
fn a_download_of_nothing_costs_nothing() {
    for seed in 0..40 {
        let mut problem = plain(seed);
        for_every_cell(&mut problem, |cell| cell.gradient_bits = 0.0);
        let without = best(&problem);
        problem.download = Some(download(&mut generator(seed), regime(seed), shape(seed)));
        let with = best(&problem);
        assert_near(with.total_s, without.total_s, 1e-12, &format!("seed {seed}"));
        assert_near(
            reevaluated_s(&problem, &with),
            with.total_s,
            1e-9,
            &format!("seed {seed}"),
        );
    }
}

#[test]
fn a_download_of_infinite_width_costs_nothing() {
    for seed in 0..40 {
        let mut problem = plain(seed);
        let without = best(&problem);
        let mut channel = download(&mut generator(seed), regime(seed), shape(seed));
        channel.bandwidth_hz = 1e30;
        problem.download = Some(channel);
        assert_near(best(&problem).total_s, without.total_s, 1e-9, &format!("seed {seed}"));
    }
}

#[test]
fn a_download_ends_with_its_backward_pass_as_brute_force_has_it() {
    for seed in 0..60 {
        let mut problem = plain(seed);
        problem.download = Some(download(&mut generator(seed + 1000), regime(seed), shape(seed)));
        assert_optimal(&problem, seed);
    }
}

#[test]
fn a_broadcast_at_any_rate_costs_nothing() {
    for seed in 0..20 {
        let mut problem = plain(seed);
        let without = best(&problem);
        problem.broadcast = Some(Broadcast {
            rate_bits_per_s: f64::MAX,
        });
        assert_near(best(&problem).total_s, without.total_s, 1e-12, &format!("seed {seed}"));
    }
}

#[test]
fn a_broadcast_is_added_to_a_round_as_brute_force_has_it() {
    for seed in 0..30 {
        let mut problem = plain(seed);
        problem.broadcast = Some(Broadcast {
            rate_bits_per_s: problem.cells[0][0].adapter_bits / 2.0,
        });
        assert_optimal(&problem, seed);
    }
}

#[test]
fn memory_that_is_enough_changes_nothing() {
    for seed in 0..20 {
        let mut problem = plain(seed);
        let without = (best(&problem), best_per_client(&problem));
        problem.memory_max_bytes = Some(vec![f64::INFINITY; problem.clients()]);
        assert_eq!((best(&problem), best_per_client(&problem)), without, "seed {seed}");
    }
}

/// `problem` with caps between its clients' cells, such that each client fits somewhere.
fn short_of_memory(seed: u64) -> Problem {
    let mut problem = plain(seed);
    let mut rng = generator(seed + 500);
    let caps = (0..problem.clients()).map(|client| {
        let mut needs: Vec<f64> = (problem.cells.iter().flatten())
            .map(|cell| cell.memory_bytes[client])
            .collect();
        needs.sort_by(f64::total_cmp);
        needs[rng.random_range(1..needs.len())]
    });
    problem.memory_max_bytes = Some(caps.collect());
    problem
}

#[test]
fn memory_that_is_short_leaves_the_best_of_what_fits() {
    let (mut impossible, mut pruned) = (0, 0);
    for seed in 0..80 {
        let problem = short_of_memory(seed);
        let optimum = brute::uniform_s(&problem);
        match solve(&problem, Method::Best, &SolveOptions::default()) {
            Ok(plan) => {
                assert_near(plan.total_s, optimum, 1e-9, &format!("seed {seed}"));
                assert_near(
                    reevaluated_s(&problem, &plan),
                    plan.total_s,
                    1e-9,
                    &format!("seed {seed}"),
                );
                pruned += usize::from(plan.total_s > best(&plain(seed)).total_s * (1.0 + 1e-9));
            }
            Err(error) => {
                assert_eq!(error, Error::NothingFits, "seed {seed}");
                assert_eq!(optimum, f64::INFINITY, "seed {seed}");
                impossible += 1;
            }
        }
        for method in [Method::Bcd, Method::A, Method::C, Method::D] {
            match solve(&problem, method, &SolveOptions::default()) {
                Ok(plan) => assert_at_most(optimum, reevaluated_s(&problem, &plan), 1e-9, method.name()),
                Err(error) => assert_eq!(error, Error::NothingFits, "{method}, seed {seed}"),
            }
        }
    }
    assert!(
        impossible > 0 && pruned > 10,
        "{impossible} impossible, {pruned} pruned"
    );
}

#[test]
fn a_client_whose_memory_holds_nothing_is_named() {
    let mut problem = plain(0);
    let clients = problem.clients();
    problem.memory_max_bytes = Some(
        (0..clients)
            .map(|client| if client == 1 { 10.0 } else { 1e9 })
            .collect(),
    );
    let error = solve(&problem, Method::Best, &SolveOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Memory { client: 1, .. }), "{error}");
}

#[test]
fn splits_of_the_clients_own_are_brute_forces() {
    for seed in 0..40 {
        let problem = match seed % 2 {
            0 => plain(seed),
            _ => short_of_memory(seed),
        };
        let optimum = brute::per_client_s(&problem);
        let options = SolveOptions {
            per_client_split: true,
            ..Default::default()
        };
        match solve(&problem, Method::Best, &options) {
            Ok(plan) => {
                assert_near(plan.total_s, optimum, 1e-9, &format!("seed {seed}"));
                assert_at_most(plan.lower_bound_s, optimum, 1e-9, &format!("seed {seed}: lower bound"));
                assert_near(
                    reevaluated_s(&problem, &plan),
                    plan.total_s,
                    1e-9,
                    &format!("seed {seed}"),
                );
            }
            Err(error) => {
                assert_eq!(error, Error::NothingFits);
                assert_eq!(optimum, f64::INFINITY);
            }
        }
    }
}

#[test]
fn splits_of_the_clients_own_are_never_worse_than_one_for_all() {
    for seed in 0..12 {
        let shape = Shape {
            clients: 3 + 5 * (seed as usize % 2),
            main: 12,
            federated: 10,
            splits: 5,
            ranks: 2,
            flat: seed % 4 < 2,
        };
        let problem = problem(&mut generator(seed), regime(seed), shape);
        let (uniform, own) = (best(&problem), best_per_client(&problem));
        assert_at_most(own.total_s, uniform.total_s, 0.0, &format!("seed {seed}"));
        assert_at_most(
            own.lower_bound_s,
            uniform.total_s,
            1e-9,
            &format!("seed {seed}: lower bound"),
        );
        assert_near(
            reevaluated_s(&problem, &own),
            own.total_s,
            1e-9,
            &format!("seed {seed}"),
        );
    }
}

/// Alike clients, whose passes take longer and whose server has less to do the deeper the cut.
fn alike(seed: u64, server_s_per_block: f64) -> Problem {
    let mut problem = problem(&mut generator(seed), Regime::Ordinary, Shape { flat: true, ..SHAPE });
    let clients = problem.clients();
    for channel in [&mut problem.main, &mut problem.federated] {
        channel.power_max_w = vec![1.0; clients];
        channel.power_total_w = 2.0;
        channel.subchannels = 2 * clients;
        channel.snr_per_watt = sflllm::allocation::SnrPerWatt::Flat(vec![1e3; clients]);
    }
    let bits = problem.cells[0][0].upload_bits;
    for (split, row) in problem.cells.iter_mut().enumerate() {
        let blocks = split as f64 + 1.0;
        for cell in row {
            cell.client_forward_s = vec![0.1 * blocks; clients];
            cell.client_backward_s = vec![0.2 * blocks; clients];
            cell.server_s = server_s_per_block * (5.0 - blocks);
            (cell.upload_bits, cell.adapter_bits) = (bits, 1e-3 * bits * blocks);
        }
    }
    problem
}

#[test]
fn alike_clients_of_a_fast_server_have_the_same_split() {
    for seed in 0..10 {
        let problem = alike(seed, 1e-3);
        let (uniform, own) = (best(&problem), best_per_client(&problem));
        assert_near(own.total_s, uniform.total_s, 1e-12, &format!("seed {seed}"));
        assert_eq!(own.split_index, uniform.split_index, "seed {seed}");
    }
}

#[test]
fn energy_without_weight_counts_nothing() {
    for seed in 0..20 {
        let problem = plain(seed);
        let mut frugal = problem.clone();
        for_every_cell(&mut frugal, |cell| cell.compute_j.fill(0.0));
        assert_eq!(best(&problem), best(&frugal), "seed {seed}");
    }
}

#[test]
fn energy_with_hardly_any_weight_changes_the_total_hardly() {
    for seed in 0..20 {
        let mut problem = plain(seed);
        let without = best(&problem);
        problem.energy_weight_s_per_j = 1e-12;
        assert_near(best(&problem).total_s, without.total_s, 1e-7, &format!("seed {seed}"));
    }
}

/// The optimum of `delay + weight × energy` over owners and a grid of deadlines.
fn thrifty_s(problem: &Problem) -> f64 {
    let clients = problem.clients();
    let weight = problem.energy_weight_s_per_j;
    let mut least = f64::INFINITY;
    for row in &problem.cells {
        for (rank, cell) in row.iter().enumerate() {
            let demand = |wait_s: Vec<f64>, bits: f64| sflllm::allocation::Demand {
                wait_s,
                payload_bits: vec![bits; clients],
            };
            let main = demand(cell.client_forward_s.clone(), cell.upload_bits);
            let federated = demand(vec![0.0; clients], cell.adapter_bits);
            let step_s = brute::thrifty_link_s(&problem.main, &main, weight)
                + cell.server_s
                + cell.client_backward_s.iter().copied().fold(0.0, f64::max)
                + weight * cell.compute_j.iter().sum::<f64>();
            let round_s =
                f64::from(problem.local_steps) * step_s + brute::thrifty_link_s(&problem.federated, &federated, weight);
            least = least.min(problem.rounds[rank] * round_s);
        }
    }
    least
}

#[test]
fn energy_is_saved_where_it_counts_and_the_bound_holds() {
    for seed in 0..24 {
        let mut problem = problem(
            &mut generator(seed),
            regime(seed),
            Shape {
                clients: 2,
                splits: 2,
                ranks: 1,
                ..shape(seed)
            },
        );
        let fastest = best(&problem);
        problem.energy_weight_s_per_j = [0.01, 0.3, 3.0][seed as usize % 3];
        let thrifty = best(&problem);
        let label = format!("seed {seed}");
        assert_near(reevaluated_s(&problem, &thrifty), thrifty.total_s, 1e-9, &label);
        assert_at_most(thrifty.total_s, reevaluated_s(&problem, &fastest), 1e-9, &label);
        let grid = thrifty_s(&problem);
        assert_at_most(thrifty.lower_bound_s, grid, 1e-9, &format!("{label}: lower bound"));
        assert_at_most(
            thrifty.lower_bound_s,
            thrifty.total_s,
            0.0,
            &format!("{label}: lower bound"),
        );
        // Elsewhere the owners are those of the shortest phase.
        let tolerance = if problem.main.is_flat() { 1e-6 } else { 0.01 };
        assert_at_most(thrifty.total_s, grid, tolerance, &label);
    }
}

#[test]
fn energy_counts_in_every_link_and_method() {
    for seed in 0..12 {
        let mut problem = plain(seed);
        problem.download = Some(download(&mut generator(seed), regime(seed), shape(seed)));
        problem.energy_weight_s_per_j = 0.5;
        for method in Method::ALL {
            let plan = solve(&problem, method, &SolveOptions::default()).unwrap();
            let label = format!("{method}, seed {seed}");
            assert_near(reevaluated_s(&problem, &plan), plan.total_s, 1e-9, &label);
            assert_at_most(plan.lower_bound_s, plan.total_s, 0.0, &label);
        }
        let (own, uniform) = (best_per_client(&problem), best(&problem));
        assert_at_most(own.total_s, uniform.total_s, 0.0, &format!("seed {seed}"));
        assert_near(
            reevaluated_s(&problem, &own),
            own.total_s,
            1e-9,
            &format!("seed {seed}"),
        );
    }
}
