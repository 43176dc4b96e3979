//! `plan`: an allocation problem's answer, certified: who gets which subchannels and power, which cut, which rank.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{anyhow, bail};
use clap::Args;
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use serde_json::{Value, json};

use crate::allocation::instance::Instance;
use crate::allocation::scenario::Scenario;
use crate::allocation::{Method, Problem, SolveOptions, solve};
use crate::disk::Claim;

use super::answer::{Answer, Compared};
use super::console;
use super::options::OutputOptions;
use super::report;
use super::scenario::{Input, ScenarioOptions};
use super::sweep::Statistics;
use super::usage;

/// Find who gets which subchannels and power, which cut and which rank, so that training takes the least time.
///
/// The answer comes with a lower bound that no plan can beat. FILE is a scenario in TOML or JSON, which starts from a preset and
/// changes what it names; a preset; or instances in bare numbers.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm plan cell --set clients.count=8 --set main.subchannels=64 --compare
  sflllm plan slow-server --per-client-split --json
  sflllm plan selective --report report
      writes report/index.html: the plan, and how it compares over bandwidth, speeds, power and clients")]
pub struct Options {
    #[command(flatten)]
    pub scenario: ScenarioOptions,
    /// best (exact or certified), bcd (the paper's algorithm), or its baselines: a (all random), b (subchannels and powers
    /// random), c (cut random), d (rank random)
    #[arg(long, value_name = "best|bcd|a|b|c|d", default_value = "best")]
    pub method: Method,
    /// Of the random baselines; places and fading have the scenario's own (--set seed=3)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Let every client have its own cut; with method best
    #[arg(long)]
    pub per_client_split: bool,
    /// Which of the file's instances; all of them if not given
    #[arg(long, value_name = "NAME")]
    pub instance: Option<String>,
    /// Also solve by every method
    #[arg(long)]
    pub compare: bool,
    /// Random baselines in the comparison are means over this many seeds
    #[arg(long, value_name = "N", default_value_t = 10, requires = "compare", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub seeds: u32,
    /// Write a report with pictures
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Draws of places and fading that the report's curves are means over
    #[arg(long, value_name = "N", default_value_t = 10, requires = "report", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub report_seeds: u32,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// The plan that the options ask for.
fn answer(name: String, problem: Problem, options: &Options) -> anyhow::Result<Answer> {
    let settings = SolveOptions {
        seed: options.seed,
        per_client_split: options.per_client_split,
    };
    let clock = Instant::now();
    let plan = solve(&problem, options.method, &settings)?;
    let solve_s = clock.elapsed().as_secs_f64();
    let comparison = match options.compare {
        true => compare(&problem, options.seed, options.seeds)?,
        false => Vec::new(),
    };
    Ok(Answer {
        times: problem.times(&plan)?,
        name,
        problem,
        plan,
        per_client_split: options.per_client_split,
        solve_s,
        comparison,
    })
}

/// Every method on one problem; the random ones are means over seeds.
fn compare(problem: &Problem, seed: u64, seeds: u32) -> anyhow::Result<Vec<Compared>> {
    Method::ALL
        .into_iter()
        .map(|method| {
            let seeds = match method {
                Method::Best | Method::Bcd => 1,
                Method::A | Method::B | Method::C | Method::D => u64::from(seeds),
            };
            let solved = (0..seeds)
                .into_par_iter()
                .map(|index| {
                    let options = SolveOptions {
                        seed: seed.wrapping_add(index),
                        per_client_split: false,
                    };
                    let plan = solve(problem, method, &options)?;
                    Ok((plan.total_s, plan.gap()))
                })
                .collect::<anyhow::Result<Vec<(f64, f64)>>>()?;
            let (totals, gaps): (Vec<f64>, Vec<f64>) = solved.into_iter().unzip();
            Ok(Compared {
                method,
                total_s: Statistics::of(&totals),
                gap: Statistics::of(&gaps),
            })
        })
        .collect()
}

fn chosen(instances: Vec<Instance>, options: &Options) -> anyhow::Result<Vec<Instance>> {
    let Some(name) = &options.instance else {
        return Ok(instances);
    };
    let names: Vec<String> = instances.iter().map(|instance| instance.name.clone()).collect();
    match instances.into_iter().find(|instance| instance.name == *name) {
        Some(instance) => Ok(vec![instance]),
        None => bail!(
            "{} has no instance {name}; it has {}",
            options.scenario.file,
            names.join(", ")
        ),
    }
}

fn write_report(options: &Options, dir: &Path, answer: &Answer, scenario: Option<&Scenario>) -> anyhow::Result<()> {
    report::write(dir, answer, scenario, options.report_seeds, options.output.quiet)?;
    if !options.output.quiet {
        console::say(format!("the report is {}", dir.join("index.html").display()));
    }
    Ok(())
}

pub fn run(options: Options) -> anyhow::Result<()> {
    if options.per_client_split && options.method != Method::Best {
        return Err(usage(
            "plan",
            format!("--per-client-split is for --method best, not {}", options.method),
        ));
    }
    // For as long as the report is written.
    let _claim = (options.report.as_deref())
        .map(|dir| Claim::directory(dir, "--report", "a report", &["index.html"]))
        .transpose()?;
    let file = &options.scenario.file;
    match options.scenario.read()? {
        Input::Scenario(scenario) => {
            if options.instance.is_some() {
                return Err(usage(
                    "plan",
                    format!("--instance is for files of instances, and {file} is a scenario"),
                ));
            }
            let problem = scenario.problem().map_err(|error| anyhow!("{file}: {error}"))?;
            let answer = answer(file.clone(), problem, &options).map_err(|error| anyhow!("{file}: {error:#}"))?;
            let text = match options.output.json {
                true => format!("{}\n", answer.json()),
                false => answer.text()?,
            };
            let printed = console::print_part(text);
            if let Some(dir) = &options.report {
                write_report(&options, dir, &answer, Some(&scenario))?;
            }
            printed?;
        }
        Input::Instances(instances) => {
            let instances = chosen(instances, &options)?;
            if options.report.is_some() && instances.len() > 1 {
                return Err(usage(
                    "plan",
                    format!(
                        "--report is about one problem, and {file} has {}: choose with --instance",
                        instances.len()
                    ),
                ));
            }
            let mut answers = Vec::with_capacity(instances.len());
            for (index, instance) in instances.iter().enumerate() {
                let name = match instance.name.is_empty() {
                    true => format!("{index}"),
                    false => instance.name.clone(),
                };
                let answer = (instance.problem().map_err(anyhow::Error::from))
                    .and_then(|problem| answer(name.clone(), problem, &options))
                    .map_err(|error| anyhow!("{file}, instance {name}: {error:#}"))?;
                answers.push(answer);
            }
            let text = match options.output.json {
                true => format!("{}\n", json_of(&answers)),
                false => {
                    let texts = answers.iter().map(Answer::text).collect::<Result<Vec<_>, _>>()?;
                    texts.join("\n")
                }
            };
            let printed = console::print_part(text);
            if let (Some(dir), [answer]) = (&options.report, &answers[..]) {
                write_report(&options, dir, answer, None)?;
            }
            printed?;
        }
    }
    Ok(())
}

/// One object, or a list of named ones.
fn json_of(answers: &[Answer]) -> Value {
    match answers {
        [answer] => answer.json(),
        _ => answers
            .iter()
            .map(|answer| {
                let mut value = answer.json();
                value["name"] = json!(answer.name);
                value
            })
            .collect(),
    }
}
