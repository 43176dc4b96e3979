//! Optima of small instances against trying everything, and what holds of every plan on larger ones.

use sflllm::allocation::{Method, Problem, SnrPerWatt, SolveOptions, solve};

use crate::brute;
use crate::instances::{Regime, Shape, assert_at_most, assert_near, generator, problem, reevaluated_s};

const SMALL: [Shape; 4] = [
    Shape {
        clients: 1,
        main: 3,
        federated: 2,
        splits: 2,
        ranks: 1,
        flat: false,
    },
    Shape {
        clients: 2,
        main: 4,
        federated: 3,
        splits: 2,
        ranks: 2,
        flat: false,
    },
    Shape {
        clients: 2,
        main: 2,
        federated: 5,
        splits: 1,
        ranks: 2,
        flat: false,
    },
    Shape {
        clients: 3,
        main: 4,
        federated: 3,
        splits: 2,
        ranks: 1,
        flat: false,
    },
];

/// What every answer must be, whatever the instance.
fn assert_sound(problem: &Problem, label: &str) {
    let bcd = solve(problem, Method::Bcd, &SolveOptions::default()).unwrap();
    let best = solve(problem, Method::Best, &SolveOptions::default()).unwrap();
    for plan in [&best, &bcd] {
        let label = format!("{label}, {}", plan.method);
        assert_near(reevaluated_s(problem, plan), plan.total_s, 1e-9, &label);
        assert_at_most(plan.lower_bound_s, plan.total_s, 0.0, &label);
    }
    assert_at_most(best.total_s, bcd.total_s, 1e-9, &format!("{label}: best and bcd"));
    assert_at_most(
        bcd.lower_bound_s,
        best.total_s,
        1e-9,
        &format!("{label}: bcd's bound and best"),
    );
}

fn compare_with_brute_force(seeds: std::ops::Range<u64>, flat: bool) {
    for seed in seeds {
        let mut rng = generator(seed);
        for regime in Regime::ALL {
            let shape = Shape {
                flat,
                ..SMALL[seed as usize % SMALL.len()]
            };
            let problem = problem(&mut rng, regime, shape);
            let label = format!("{regime:?}, seed {seed}, {shape:?}");
            let optimum = brute::uniform_s(&problem);
            let best = solve(&problem, Method::Best, &SolveOptions::default()).unwrap();
            let tolerance = regime.tolerance();
            assert_near(best.total_s, optimum, tolerance, &label);
            assert_at_most(best.lower_bound_s, optimum, tolerance, &format!("{label}: lower bound"));
            assert_at_most(best.gap(), tolerance, 0.0, &format!("{label}: gap"));
            assert_sound(&problem, &label);
        }
    }
}

#[test]
fn best_is_the_optimum_of_small_flat_instances() {
    compare_with_brute_force(0..250, true);
}

#[test]
fn best_is_the_optimum_of_small_selective_instances() {
    compare_with_brute_force(1000..1250, false);
}

#[test]
fn plans_keep_their_promises_on_instances_too_large_to_exhaust() {
    for seed in 0..6 {
        let mut rng = generator(seed);
        for regime in Regime::ALL {
            for flat in [true, false] {
                for (clients, main, federated) in [(1, 40, 33), (3, 31, 20), (8, 24, 8), (20, 40, 25)] {
                    let shape = Shape {
                        clients,
                        main,
                        federated,
                        splits: 2,
                        ranks: 2,
                        flat,
                    };
                    let problem = problem(&mut rng, regime, shape);
                    assert_sound(&problem, &format!("{regime:?}, seed {seed}, {shape:?}"));
                }
            }
        }
    }
}

/// Everybody is heard a factor of `scale` as well.
fn fainter(mut problem: Problem, scale: f64) -> Problem {
    for channel in [&mut problem.main, &mut problem.federated] {
        match &mut channel.snr_per_watt {
            SnrPerWatt::Flat(gains) => gains.iter_mut().for_each(|gain| *gain *= scale),
            SnrPerWatt::Selective(gains) => gains.iter_mut().flatten().for_each(|gain| *gain *= scale),
        }
    }
    problem
}

#[test]
fn signals_that_are_all_but_rounding_have_plans_that_are_what_they_say() {
    for seed in 0..4 {
        for (scale, clients, main) in [(1e-3, 3, 9), (1e-6, 3, 9), (1e-6, 2, 30), (1e-9, 5, 12), (1e-6, 1, 50)] {
            for flat in [true, false] {
                let shape = Shape {
                    clients,
                    main,
                    federated: 6,
                    splits: 1,
                    ranks: 1,
                    flat,
                };
                let problem = fainter(problem(&mut generator(seed), Regime::TinySnr, shape), scale);
                for method in [Method::Best, Method::Bcd] {
                    let plan = solve(&problem, method, &SolveOptions::default()).unwrap();
                    let label = format!("seed {seed}, {scale:e}, {shape:?}, {method}");
                    assert_near(reevaluated_s(&problem, &plan), plan.total_s, 1e-9, &label);
                    assert_at_most(plan.lower_bound_s, plan.total_s, 0.0, &label);
                }
            }
        }
    }
}
