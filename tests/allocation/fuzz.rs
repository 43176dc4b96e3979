//! Files with something wrong in them, at random: an error or a plan that is what it says, never a panic.

use proptest::prelude::*;
use serde_json::{Value, json};
use sflllm::allocation::instance::Instance;
use sflllm::allocation::scenario::Scenario;
use sflllm::allocation::{Method, Problem, SolveOptions, solve};

use crate::instances::{Regime, Shape, generator, instance, problem};

/// What a value is replaced with.
fn wrong_values() -> Vec<Value> {
    vec![
        json!(null),
        json!(true),
        json!("NaN"),
        json!(""),
        json!([]),
        json!({}),
        json!([[1.0]]),
        json!(0),
        json!(-1),
        json!(1),
        json!(2),
        json!(7),
        json!(1e-320),
        json!(1e-30),
        json!(0.5),
        json!(1e30),
        json!(1e308),
        json!(-1e308),
        json!(-0.0),
        json!(4_294_967_295_u64),
        json!(u64::MAX),
        json!(1_000_000_000_000_000_000_u64),
    ]
}

/// How many values there are below `value`, itself included.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(size).sum(),
        Value::Object(fields) => fields.values().map(size).sum(),
        _ => 0,
    }
}

/// The `number`-th of them.
fn nth(value: &mut Value, mut number: usize) -> &mut Value {
    if number == 0 {
        return value;
    }
    number -= 1;
    let below: Vec<&mut Value> = match value {
        Value::Array(values) => values.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => Vec::new(),
    };
    for child in below {
        let size = size(child);
        if number < size {
            return nth(child, number);
        }
        number -= size;
    }
    unreachable!("the number is below the size")
}

/// Replaces a value, or drops, doubles or scales a part of it.
fn damage(file: &mut Value, place: usize, kind: usize) {
    let places = size(file);
    let target = nth(file, place % places);
    let mut wrong = wrong_values();
    let kind = kind % (wrong.len() + 2);
    if kind < wrong.len() {
        *target = wrong.swap_remove(kind);
        return;
    }
    let drops = kind == wrong.len();
    match target {
        Value::Array(values) if drops => drop(values.pop()),
        Value::Array(values) => values.extend(values.last().cloned()),
        Value::Object(fields) if drops => {
            let last = fields.keys().next_back().cloned();
            last.and_then(|key| fields.remove(&key));
        }
        Value::Object(fields) => drop(fields.insert("unknown".to_owned(), json!(1))),
        Value::Number(number) => {
            let factor = if drops { 1e-9 } else { 1e9 };
            *target = json!(number.as_f64().unwrap_or(0.0) * factor);
        }
        _ => {}
    }
}

/// Solves it by every method; what is solved must be what it says.
fn assert_solves_or_refuses(problem: &Problem) {
    for per_client_split in [false, true] {
        for method in [Method::Best, Method::Bcd, Method::A] {
            let options = SolveOptions {
                seed: 1,
                per_client_split,
            };
            match solve(problem, method, &options) {
                Err(error) => assert!(!error.to_string().is_empty()),
                Ok(plan) => {
                    assert!(
                        plan.total_s.is_finite() && plan.total_s >= 0.0,
                        "{method}: {}",
                        plan.total_s
                    );
                    assert!(
                        plan.lower_bound_s >= 0.0 && plan.lower_bound_s <= plan.total_s,
                        "{method}: {} {}",
                        plan.lower_bound_s,
                        plan.total_s
                    );
                    let times = problem
                        .times(&plan)
                        .unwrap_or_else(|error| panic!("{method}: {error}: {plan:?}"));
                    let again = problem.rounds[plan.rank_index] * times.round_s(problem.local_steps);
                    if problem.energy_weight_s_per_j == 0.0 {
                        assert!(
                            (again - plan.total_s).abs() <= 1e-9 * plan.total_s,
                            "{method}: {again:e} {:e}",
                            plan.total_s
                        );
                    }
                }
            }
        }
    }
}

fn damages() -> impl Strategy<Value = Vec<(usize, usize)>> {
    prop::collection::vec((any::<usize>(), any::<usize>()), 1..4)
}

fn small_instance(flat: bool) -> Value {
    instance(
        "damaged",
        &problem(&mut generator(5), Regime::Ordinary, Shape::small(flat)),
    )
}

fn small_scenario(preset: &str) -> Value {
    let small = json!({
        "clients": { "count": 2, "memory_max_bytes": [1e12, 1e12] },
        "main": { "subchannels": 4 },
        "federated": { "subchannels": 3 },
        "download": { "subchannels": 3, "bandwidth_hz": 1e6, "power_total_dbm": 30.0 },
        "model": { "blocks": 3 },
        "training": { "splits": [1, 2], "ranks": [1, 4] },
        "objective": { "broadcast_power_dbm": 30.0 },
    });
    let scenario = Scenario::preset(preset).unwrap().with(small).unwrap();
    serde_json::to_value(scenario).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_damaged_instance_is_solved_or_refused(flat: bool, damages in damages()) {
        let mut file = small_instance(flat);
        for (place, kind) in damages {
            damage(&mut file, place, kind);
        }
        if let Ok(instance) = serde_json::from_value::<Instance>(file)
            && let Ok(problem) = instance.problem()
        {
            assert_solves_or_refuses(&problem);
        }
    }

    #[test]
    fn a_damaged_scenario_is_solved_or_refused(selective: bool, damages in damages()) {
        let mut file = small_scenario(if selective { "selective" } else { "cell" });
        for (place, kind) in damages {
            damage(&mut file, place, kind);
        }
        if let Ok(problem) = Scenario::from_value(file).and_then(|scenario| scenario.problem()) {
            assert_solves_or_refuses(&problem);
        }
    }
}

#[test]
fn the_files_are_solved_before_they_are_damaged() {
    for flat in [true, false] {
        let instance: Instance = serde_json::from_value(small_instance(flat)).unwrap();
        assert_solves_or_refuses(&instance.problem().unwrap());
    }
    for preset in ["cell", "selective"] {
        let scenario = Scenario::from_value(small_scenario(preset)).unwrap();
        assert_solves_or_refuses(&scenario.problem().unwrap());
    }
}
