//! `plan`: an allocation problem's answer, certified: who gets which subchannels and power, which cut, which rank.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{anyhow, bail};
use clap::Args;
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use serde_json::{Value, json};

use crate::allocation::channel::w_to_dbm;
use crate::allocation::instance::Instance;
use crate::allocation::scenario::Scenario;
use crate::allocation::{Channel, LinkPlan, Method, Phases, Plan, Problem, SolveOptions, solve};

use super::human::{certificate, duration, percent, plain, with_prefix};
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

/// A problem with its plan.
pub struct Answer {
    /// Of the file, or of the instance.
    pub name: String,
    pub problem: Problem,
    pub plan: Plan,
    pub phases: Phases,
    pub per_client_split: bool,
    pub solve_s: f64,
    pub comparison: Vec<Compared>,
}

/// A method's totals over seeds.
pub struct Compared {
    pub method: Method,
    pub total_s: Statistics,
    pub gap: Statistics,
}

/// A client's part of a plan.
pub struct ClientRow {
    pub split: u32,
    pub forward_s: f64,
    pub upload_s: f64,
    pub download_s: f64,
    pub backward_s: f64,
    pub adapter_s: f64,
    pub main: Share,
    pub federated: Share,
}

/// A client's part of a link.
pub struct Share {
    pub subchannels: Vec<usize>,
    pub power_w: f64,
    pub power_max_w: f64,
    pub rate_bits_per_s: f64,
}

impl Share {
    fn new(channel: &Channel, link: &LinkPlan, client: usize) -> Self {
        let subchannels: Vec<usize> = (0..channel.subchannels).filter(|&i| link.owner[i] == client).collect();
        Self {
            power_w: subchannels.iter().map(|&subchannel| link.power_w[subchannel]).sum(),
            power_max_w: channel.power_max_w[client].min(channel.power_total_w),
            rate_bits_per_s: channel.rate_bits_per_s(client, &link.owner, &link.power_w),
            subchannels,
        }
    }

    /// `0–3 7 9–10`
    pub fn ranges(&self) -> String {
        let mut text = String::new();
        let mut rest = &self.subchannels[..];
        while let Some(&first) = rest.first() {
            let run = rest.iter().zip(first..).take_while(|&(&a, b)| a == b).count();
            let separator = if text.is_empty() { "" } else { " " };
            text += &match run {
                1 => format!("{separator}{first}"),
                _ => format!("{separator}{first}–{}", first + run - 1),
            };
            rest = &rest[run..];
        }
        text
    }
}

/// `3.20 W, 35.1 dBm`
pub fn power(power_w: f64) -> String {
    match power_w > 0.0 {
        true => format!("{}, {:.1} dBm", with_prefix(power_w, "W"), w_to_dbm(power_w)),
        false => "0 W".to_owned(),
    }
}

impl Answer {
    fn new(name: String, problem: Problem, options: &Options) -> anyhow::Result<Self> {
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
        Ok(Self {
            phases: problem.phases(&plan)?,
            name,
            problem,
            plan,
            per_client_split: options.per_client_split,
            solve_s,
            comparison,
        })
    }

    pub fn rank(&self) -> u32 {
        self.problem.ranks[self.plan.rank_index]
    }

    pub fn rounds(&self) -> f64 {
        self.problem.rounds[self.plan.rank_index]
    }

    /// `1 block on the clients, rank 8: 60 rounds of 12 local steps`; where clients have their own cuts, `1–11 blocks`.
    pub fn choice(&self) -> String {
        let labels = || self.plan.split_index.iter().map(|&index| self.problem.splits[index]);
        let blocks = match (labels().min(), labels().max()) {
            (Some(least), Some(most)) if least != most => format!("{least}–{most} blocks"),
            (Some(1), _) => "1 block".to_owned(),
            (least, _) => format!("{} blocks", least.unwrap_or(0)),
        };
        format!(
            "{blocks} on the clients, rank {}: {} rounds of {} local steps",
            self.rank(),
            plain(self.rounds()),
            self.problem.local_steps
        )
    }

    /// The run's delay without what its energy counts as.
    pub fn delay_s(&self) -> f64 {
        self.rounds() * self.phases.round_s(self.problem.local_steps)
    }

    pub fn clients(&self) -> Vec<ClientRow> {
        let (problem, plan, phases) = (&self.problem, &self.plan, &self.phases);
        (0..problem.clients())
            .map(|client| ClientRow {
                split: problem.splits[plan.split_index[client]],
                forward_s: phases.forward_s[client],
                upload_s: phases.upload_s[client],
                download_s: phases.download_s[client],
                backward_s: phases.backward_s[client],
                adapter_s: phases.adapter_s[client],
                main: Share::new(&problem.main, &plan.main, client),
                federated: Share::new(&problem.federated, &plan.federated, client),
            })
            .collect()
    }

    fn json(&self) -> Value {
        let (problem, plan) = (&self.problem, &self.plan);
        let link = |plan: &LinkPlan| json!({"owner": plan.owner, "power_w": plan.power_w, "phase_s": plan.phase_s, "energy_j": plan.energy_j});
        let split = |of: &dyn Fn(usize) -> Value| match self.per_client_split {
            true => plan.split_index.iter().map(|&index| of(index)).collect(),
            false => plan.split_index.first().map_or(Value::Null, |&index| of(index)),
        };
        let mut answer = json!({
            "total_s": plan.total_s,
            "lower_bound_s": plan.lower_bound_s,
            "gap": plan.gap(),
            "split_index": split(&|index| json!(index)),
            "rank_index": plan.rank_index,
            "split": split(&|index| json!(problem.splits[index])),
            "rank": self.rank(),
            "main": link(&plan.main),
            "fed": link(&plan.federated),
            "method": plan.method.name(),
            "solve_ms": self.solve_s * 1e3,
            "phases": self.phases,
        });
        if let Some(download) = &plan.download {
            answer["download"] = link(download);
        }
        if !self.comparison.is_empty() {
            answer["compare"] = (self.comparison.iter())
                .map(|compared| {
                    json!({"method": compared.method.name(), "seeds": compared.total_s.count,
                           "mean_total_s": compared.total_s.mean, "std_total_s": compared.total_s.std,
                           "mean_gap": compared.gap.mean})
                })
                .collect();
        }
        answer
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        let (problem, plan) = (&self.problem, &self.plan);
        let mut text = String::new();
        writeln!(
            text,
            "{}: {} clients, {} main and {} federated subchannels",
            self.name,
            problem.clients(),
            problem.main.subchannels,
            problem.federated.subchannels
        )?;
        writeln!(text, "cut: {}", self.choice())?;
        writeln!(text, "total {} ({:.2} s)", duration(plan.total_s), plan.total_s)?;
        if plan.total_s > self.delay_s() * (1.0 + 1e-9) {
            writeln!(
                text,
                "of which {} are delay, and the rest is what the clients' energy counts as",
                duration(self.delay_s())
            )?;
        }
        writeln!(
            text,
            "{}; no plan with {} is below {}",
            certificate(plan.gap()),
            match self.per_client_split {
                true => "a cut for each client",
                false => "one cut for all",
            },
            duration(plan.lower_bound_s)
        )?;
        writeln!(text, "method {}, solved in {}\n", plan.method, duration(self.solve_s))?;
        text += &self.delays();
        text.push('\n');
        text += &self.shares();
        if !self.comparison.is_empty() {
            text.push('\n');
            text += &self.compared();
        }
        Ok(text)
    }

    /// Where a round's time goes, by client.
    fn delays(&self) -> String {
        let phases = &self.phases;
        let downloads = self.problem.download.is_some();
        let mut head = vec!["delay", "cut", "forward", "upload", "download", "backward", "adapter"];
        let mut rows: Vec<Vec<String>> = Vec::new();
        for (client, row) in self.clients().iter().enumerate() {
            rows.push(vec![
                format!("client {client}"),
                row.split.to_string(),
                duration(row.forward_s),
                duration(row.upload_s),
                duration(row.download_s),
                duration(row.backward_s),
                duration(row.adapter_s),
            ]);
        }
        if !downloads {
            head.remove(4);
            rows.iter_mut().for_each(|row| drop(row.remove(4)));
        }
        let mut text = table(&head, &rows);
        text += &format!(
            "  a local step ends after {}, of which the server's work for all is {}; the adapter is sent once a round of {}\n",
            duration(phases.step_s()),
            duration(phases.server_s),
            duration(phases.round_s(self.problem.local_steps))
        );
        text
    }

    /// Who has which part of the links.
    fn shares(&self) -> String {
        let mut text = String::new();
        type Part = fn(&ClientRow) -> &Share;
        let links: [(&str, &Channel, Part); 2] = [
            ("main link", &self.problem.main, |row| &row.main),
            ("federated link", &self.problem.federated, |row| &row.federated),
        ];
        for (position, (name, channel, share)) in links.into_iter().enumerate() {
            let rows: Vec<Vec<String>> = (self.clients().iter().enumerate())
                .map(|(client, row)| {
                    let share = share(row);
                    vec![
                        format!("client {client}"),
                        share.subchannels.len().to_string(),
                        power(share.power_w),
                        with_prefix(share.rate_bits_per_s, "bit/s"),
                        share.ranges(),
                    ]
                })
                .collect();
            if position > 0 {
                text.push('\n');
            }
            text += &table(&[name, "subchannels", "power", "rate", "which"], &rows);
            let used: f64 = self.clients().iter().map(|row| share(row).power_w).sum();
            text += &format!("  together {} of {}\n", power(used), power(channel.power_total_w));
        }
        text
    }

    fn compared(&self) -> String {
        let best = self.plan.total_s;
        let rows: Vec<Vec<String>> = (self.comparison.iter())
            .map(|compared| {
                let over = compared.total_s.mean / best - 1.0;
                vec![
                    compared.method.name().to_owned(),
                    duration(compared.total_s.mean),
                    match compared.total_s.count {
                        1 => String::new(),
                        count => format!("± {} over {count} seeds", duration(compared.total_s.std)),
                    },
                    match over.abs() < 1e-7 {
                        true => "the same".to_owned(),
                        false => format!("{}{}", if over < 0.0 { "" } else { "+" }, percent(over)),
                    },
                    percent(compared.gap.mean),
                ]
            })
            .collect();
        table(&["method", "total", "", "against the plan", "gap"], &rows)
    }
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

/// Columns as wide as their longest entry: names to the left, numbers to the right.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|&name| name.to_owned()).collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&head).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (column, entry) in line.iter().enumerate() {
            let width = widths[column];
            row += &match column {
                0 => format!("{entry:<width$}"),
                _ if head[column] == "which" => format!("  {entry}"),
                _ => format!("  {entry:>width$}"),
            };
        }
        text += row.trim_end();
        text.push('\n');
    }
    text
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
        eprintln!("the report is {}", dir.join("index.html").display());
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
            let answer = Answer::new(file.clone(), problem, &options).map_err(|error| anyhow!("{file}: {error:#}"))?;
            match options.output.json {
                true => println!("{}", answer.json()),
                false => print!("{}", answer.text()?),
            }
            if let Some(dir) = &options.report {
                write_report(&options, dir, &answer, Some(&scenario))?;
            }
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
                    .and_then(|problem| Answer::new(name.clone(), problem, &options))
                    .map_err(|error| anyhow!("{file}, instance {name}: {error:#}"))?;
                answers.push(answer);
            }
            if options.output.json {
                println!("{}", json_of(&answers));
            } else {
                for (position, answer) in answers.iter().enumerate() {
                    let separator = if position == 0 { "" } else { "\n" };
                    print!("{separator}{}", answer.text()?);
                }
            }
            if let (Some(dir), [answer]) = (&options.report, &answers[..]) {
                write_report(&options, dir, answer, None)?;
            }
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
