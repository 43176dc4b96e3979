//! Solving the presets at the sizes that matter, and the two parts that every method is made of.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use serde_json::{Value, json};
use sflllm::allocation::bound::Ladders;
use sflllm::allocation::power::control;
use sflllm::allocation::scenario::{PRESETS, Scenario};
use sflllm::allocation::{Demand, Method, Problem, SolveOptions, solve};

fn problem(preset: &str, changes: Value) -> Problem {
    Scenario::preset(preset)
        .and_then(|scenario| scenario.with(changes))
        .and_then(|scenario| scenario.problem())
        .expect("the presets are complete")
}

fn sized(preset: &str, clients: usize, subchannels: usize) -> Problem {
    problem(
        preset,
        json!({
            "clients": { "count": clients },
            "main": { "subchannels": subchannels },
            "federated": { "subchannels": subchannels },
        }),
    )
}

fn plans(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("allocation");
    group.sample_size(10);
    let sizes = [
        ("cell", 100, 256),
        ("cell", 1000, 4096),
        ("selective", 20, 64),
        ("selective", 100, 256),
    ];
    let sized = sizes.map(|(preset, clients, subchannels)| {
        let id = format!("{preset}/{clients}x{subchannels}");
        (id, sized(preset, clients, subchannels))
    });
    let presets = PRESETS.map(|preset| (format!("{preset}/5x20"), problem(preset, json!({}))));
    for (id, problem) in presets.into_iter().chain(sized) {
        group.bench_function(BenchmarkId::new("best", id), |bencher| {
            bencher.iter(|| solve(black_box(&problem), Method::Best, &SolveOptions::default()));
        });
    }
    let own = SolveOptions {
        per_client_split: true,
        ..Default::default()
    };
    let slow = problem("slow-server", json!({}));
    group.bench_function("best/slow-server/5x20/per-client", |bencher| {
        bencher.iter(|| solve(black_box(&slow), Method::Best, &own));
    });
    group.finish();
}

fn parts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("allocation");
    for (preset, clients, subchannels) in [("cell", 100, 256), ("selective", 100, 256)] {
        let problem = sized(preset, clients, subchannels);
        let cell = &problem.cells[0][0];
        let demand = Demand {
            wait_s: cell.client_forward_s.clone(),
            payload_bits: vec![cell.upload_bits; clients],
        };
        let id = format!("{preset}/{clients}x{subchannels}");
        let ladders = Ladders::new(&problem.main);
        group.bench_function(BenchmarkId::new("count_bound", &id), |bencher| {
            bencher.iter(|| ladders.lower_bound_s(black_box(&demand)));
        });
        let owner: Vec<usize> = (0..subchannels).map(|subchannel| subchannel % clients).collect();
        group.bench_function(BenchmarkId::new("power_control", &id), |bencher| {
            bencher.iter(|| control(&problem.main, black_box(&demand), &owner, 0.0));
        });
    }
    group.finish();
}

criterion_group!(benches, plans, parts);
criterion_main!(benches);
