//! Who gets which subchannels and how much power, where the model is cut, and with which LoRA rank: a plan and its bound.
//!
//! `cargo run --release --no-default-features --example allocation`

#![allow(clippy::print_stdout)]

use std::error::Error;

use sflllm::allocation::scenario::Scenario;
use sflllm::allocation::{Method, SolveOptions, solve};

pub fn main() -> Result<(), Box<dyn Error>> {
    let scenario = Scenario::from_text(
        r#"
            preset = "cell"
            [clients]
            count = 4
            radius_m = 200.0
            [main]
            subchannels = 12
        "#,
    )?;
    let problem = scenario.problem()?;
    let plan = solve(&problem, Method::Best, &SolveOptions::default())?;
    println!(
        "{:.1} s with the best plan; no plan needs less than {:.1} s (gap {:.2} %)",
        plan.total_s,
        plan.lower_bound_s,
        100.0 * plan.gap()
    );
    println!("subchannels of the main link belong to clients {:?}", plan.main.owner);
    assert!(plan.lower_bound_s <= plan.total_s);
    Ok(())
}
