//! What the allocator's methods are worth on the presets, for the README's table: mean reductions of the delay against the random
//! baselines, certified gaps, and times. `cargo bench --bench allocation_quality`, with a number of seeds after `--` if other
//! than 200.

#![expect(clippy::print_stdout, reason = "a table for a terminal")]

use std::time::Instant;

use serde_json::{Value, json};
use sflllm::allocation::scenario::Scenario;
use sflllm::allocation::{Method, Plan, Problem, SolveOptions, solve};

struct Case {
    name: &'static str,
    preset: &'static str,
    changes: Value,
    /// Of the seeds asked for, this part: large ones take longer.
    share: f64,
}

fn cases() -> Vec<Case> {
    let large =
        json!({ "clients": { "count": 100 }, "main": { "subchannels": 256 }, "federated": { "subchannels": 256 } });
    let case = |name, preset, changes, share| Case {
        name,
        preset,
        changes,
        share,
    };
    vec![
        case("paper", "paper", json!({}), 1.0),
        case("cell", "cell", json!({}), 1.0),
        case(
            "paper, rayleigh",
            "paper",
            json!({ "channel": { "fading": "rayleigh" } }),
            1.0,
        ),
        case("selective", "selective", json!({}), 1.0),
        case(
            "selective, K=20 M=64",
            "selective",
            json!({ "clients": { "count": 20 }, "main": { "subchannels": 64 }, "federated": { "subchannels": 64 } }),
            1.0,
        ),
        case("cell, K=100 M=256", "cell", large.clone(), 0.25),
        case("selective, K=100 M=256", "selective", large, 0.25),
    ]
}

/// Numbers of one kind over the seeds.
#[derive(Default)]
struct Sample(Vec<f64>);

impl Sample {
    fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// The least number that `part` of them do not exceed.
    fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let position = (part * sorted.len() as f64).ceil() as usize;
        sorted[position.clamp(1, sorted.len()) - 1]
    }

    fn percent(&self) -> String {
        let percent = |part: f64| 100.0 * part;
        format!(
            "{:.3} / {:.3} / {:.3}",
            percent(self.mean()),
            percent(self.quantile(0.95)),
            percent(self.quantile(1.0))
        )
    }
}

/// A method's results over the seeds of a case.
#[derive(Default)]
struct Results {
    /// Reduction against each baseline.
    reduction: [Sample; 4],
    gap: Sample,
    time_ms: Sample,
}

const BASELINES: [Method; 4] = [Method::A, Method::B, Method::C, Method::D];

fn timed(problem: &Problem, method: Method, options: &SolveOptions) -> (Plan, f64) {
    let start = Instant::now();
    let plan = solve(problem, method, options).expect("the presets can be solved");
    (plan, start.elapsed().as_secs_f64() * 1e3)
}

fn problem(preset: &str, changes: &Value, seed: u64) -> Problem {
    Scenario::preset(preset)
        .and_then(|scenario| scenario.with(changes.clone()))
        .and_then(|scenario| scenario.with(json!({ "seed": seed })))
        .and_then(|scenario| scenario.problem())
        .expect("the presets are complete")
}

fn run(case: &Case, seeds: u64) {
    let mut results = [Results::default(), Results::default()];
    for seed in 0..seeds {
        let problem = problem(case.preset, &case.changes, seed);
        let options = SolveOptions {
            seed,
            ..Default::default()
        };
        let plans = [Method::Best, Method::Bcd].map(|method| timed(&problem, method, &options));
        // The best bound that is known counts for both.
        let lower_s = plans.iter().map(|(plan, _)| plan.lower_bound_s).fold(0.0, f64::max);
        for ((plan, time_ms), results) in plans.iter().zip(&mut results) {
            results.gap.0.push((plan.total_s / lower_s - 1.0).max(0.0));
            results.time_ms.0.push(*time_ms);
        }
        for (index, method) in BASELINES.into_iter().enumerate() {
            let baseline_s = timed(&problem, method, &options).0.total_s;
            for ((plan, _), results) in plans.iter().zip(&mut results) {
                results.reduction[index].0.push(1.0 - plan.total_s / baseline_s);
            }
        }
    }
    for (method, results) in ["best", "bcd"].into_iter().zip(&results) {
        let [a, b, c, d] = results.reduction.each_ref().map(|sample| 100.0 * sample.mean());
        println!(
            "| {} | {seeds} | {method} | {a:.1} | {b:.1} | {c:.1} | {d:.1} | {} | {:.2} / {:.2} |",
            case.name,
            results.gap.percent(),
            results.time_ms.mean(),
            results.time_ms.quantile(1.0),
        );
    }
}

/// What cuts of the clients' own gain where the server is slow.
fn run_per_client(clients: usize, seeds: u64) {
    let (mut gain, mut gap, mut time_ms) = (Sample::default(), Sample::default(), Sample::default());
    for seed in 0..seeds {
        let problem = problem("slow-server", &json!({ "clients": { "count": clients } }), seed);
        let own = SolveOptions {
            per_client_split: true,
            ..Default::default()
        };
        let (uniform, _) = timed(&problem, Method::Best, &SolveOptions::default());
        let (plan, ms) = timed(&problem, Method::Best, &own);
        gain.0.push(1.0 - plan.total_s / uniform.total_s);
        gap.0.push(plan.gap());
        time_ms.0.push(ms);
    }
    println!(
        "| {clients} | {seeds} | {:.1} | {} | {:.0} / {:.0} |",
        100.0 * gain.mean(),
        gap.percent(),
        time_ms.mean(),
        time_ms.quantile(1.0)
    );
}

fn main() {
    // Cargo adds flags of its own.
    let seeds: u64 = std::env::args().find_map(|text| text.parse().ok()).unwrap_or(200);
    println!(
        "Mean reduction of the delay against the baselines in %, certified gap in % (mean / p95 / max), ms (mean / max):\n"
    );
    println!("| scenario | seeds | method | a | b | c | d | gap | time |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for case in cases() {
        run(&case, ((seeds as f64 * case.share) as u64).max(1));
    }
    println!("\nslow-server, --per-client-split: mean gain in % over the best split that is the same for all:\n");
    println!("| clients | seeds | gain | gap | time |");
    println!("|---|---|---|---|---|");
    for (clients, share) in [(5, 1.0), (20, 0.1)] {
        run_per_client(clients, ((seeds as f64 * share) as u64).max(1));
    }
}
