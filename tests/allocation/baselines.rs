//! The random baselines and the paper's algorithm.

use std::collections::BTreeSet;

use sflllm::allocation::scenario::{PRESETS, Scenario};
use sflllm::allocation::{Method, Problem, SolveOptions, solve};

use crate::instances::{Regime, Shape, assert_at_most, assert_near, generator, problem, reevaluated_s};

const RANDOM: [Method; 4] = [Method::A, Method::B, Method::C, Method::D];

fn seeded(seed: u64) -> SolveOptions {
    SolveOptions {
        seed,
        ..Default::default()
    }
}

fn preset(name: &str) -> Problem {
    Scenario::preset(name).unwrap().problem().unwrap()
}

#[test]
fn random_baselines_are_the_same_for_a_seed_and_others_for_others() {
    for name in ["cell", "selective"] {
        let problem = preset(name);
        for method in RANDOM {
            let plan = |seed| solve(&problem, method, &seeded(seed)).unwrap();
            assert_eq!(plan(7), plan(7), "{method} on {name}");
            let totals: BTreeSet<u64> = (0..8).map(|seed| plan(seed).total_s.to_bits()).collect();
            assert!(totals.len() > 1, "{method} on {name}: {totals:?}");
        }
    }
}

#[test]
fn methods_without_chance_ignore_the_seed() {
    let problem = preset("selective");
    for method in [Method::Best, Method::Bcd] {
        let plan = |seed| solve(&problem, method, &seeded(seed)).unwrap();
        assert_eq!(plan(0), plan(1), "{method}");
    }
}

#[test]
fn random_baselines_starve_nobody_and_are_never_better_than_the_bound() {
    for name in PRESETS {
        let problem = preset(name);
        let best = solve(&problem, Method::Best, &SolveOptions::default()).unwrap();
        for method in RANDOM {
            for seed in 0..30 {
                let plan = solve(&problem, method, &seeded(seed)).unwrap();
                let label = format!("{method}, seed {seed} on {name}");
                assert!(plan.total_s.is_finite(), "{label}");
                for link in [&plan.main, &plan.federated] {
                    let heard: BTreeSet<usize> = (link.owner.iter().zip(&link.power_w))
                        .filter(|&(_, &power)| power > 0.0)
                        .map(|(&owner, _)| owner)
                        .collect();
                    assert_eq!(heard.len(), problem.clients(), "{label}");
                }
                assert_near(reevaluated_s(&problem, &plan), plan.total_s, 1e-9, &label);
                assert_at_most(best.lower_bound_s, plan.total_s, 1e-9, &label);
                assert_at_most(plan.lower_bound_s, best.total_s, 1e-9, &label);
            }
        }
    }
}

#[test]
fn random_baselines_have_a_subchannel_for_everybody_where_there_is_one_each() {
    for seed in 0..20 {
        let shape = Shape {
            clients: 6,
            main: 6,
            federated: 6,
            splits: 3,
            ranks: 2,
            flat: seed % 2 == 0,
        };
        let problem = problem(&mut generator(seed), Regime::Ordinary, shape);
        for method in Method::ALL {
            let plan = solve(&problem, method, &seeded(seed)).unwrap();
            let owners: BTreeSet<usize> = plan.main.owner.iter().copied().collect();
            assert_eq!(owners.len(), 6, "{method}, seed {seed}");
            assert_near(reevaluated_s(&problem, &plan), plan.total_s, 1e-9, "re-evaluated");
        }
    }
}

#[test]
fn the_papers_algorithm_is_not_worse_than_its_own_parts_left_to_chance_on_average() {
    for name in PRESETS {
        let problem = preset(name);
        let bcd = solve(&problem, Method::Bcd, &SolveOptions::default()).unwrap().total_s;
        for method in RANDOM {
            let mean: f64 = (0..30)
                .map(|seed| solve(&problem, method, &seeded(seed)).unwrap().total_s)
                .sum::<f64>()
                / 30.0;
            assert_at_most(bcd, mean, 1e-9, &format!("{method} on {name}"));
        }
    }
}

#[test]
fn a_methods_name_reads_back() {
    for method in Method::ALL {
        assert_eq!(method.name().parse(), Ok(method));
    }
    let error = "greedy".parse::<Method>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "`greedy` is no method; choose best, bcd, a, b, c or d"
    );
}
