//! A plan for people and programs: what a problem's answer comes to, by client and by link, as text and as JSON.
//!
//! It is apart from the command that finds it, because the report with pictures shows it too.

use std::fmt::Write;

use serde_json::{Value, json};

use super::human::{certificate, duration, percent, plain, table, with_prefix};
use super::sweep::Statistics;
use crate::allocation::{Channel, LinkPlan, Method, Plan, Problem, RoundTimes};
use crate::terms::phases::Phases;

/// A problem with its plan.
pub struct Answer {
    /// Of the file, or of the instance.
    pub name: String,
    pub problem: Problem,
    pub plan: Plan,
    pub times: RoundTimes,
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
    pub phases: Phases<f64>,
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
        true => format!(
            "{}, {:.1} dBm",
            with_prefix(power_w, "W"),
            10.0 * (power_w.log10() + 3.0)
        ),
        false => "0 W".to_owned(),
    }
}

impl Answer {
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
        self.rounds() * self.times.round_s(self.problem.local_steps)
    }

    pub fn clients(&self) -> Vec<ClientRow> {
        let (problem, plan, times) = (&self.problem, &self.plan, &self.times);
        (0..problem.clients())
            .map(|client| ClientRow {
                split: problem.splits[plan.split_index[client]],
                phases: times.phases.of(client),
                adapter_s: times.adapter_s[client],
                main: Share::new(&problem.main, &plan.main, client),
                federated: Share::new(&problem.federated, &plan.federated, client),
            })
            .collect()
    }

    pub fn json(&self) -> Value {
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
            "phases": self.times,
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

    pub fn text(&self) -> Result<String, std::fmt::Error> {
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
        let times = &self.times;
        let downloads = self.problem.download.is_some();
        let mut head = vec!["delay", "cut", "forward", "upload", "download", "backward", "adapter"];
        let mut rows: Vec<Vec<String>> = Vec::new();
        for (client, row) in self.clients().iter().enumerate() {
            rows.push(vec![
                format!("client {client}"),
                row.split.to_string(),
                duration(row.phases.forward),
                duration(row.phases.upload),
                duration(row.phases.download),
                duration(row.phases.backward),
                duration(row.adapter_s),
            ]);
        }
        if !downloads {
            head.remove(4);
            rows.iter_mut().for_each(|row| drop(row.remove(4)));
        }
        let mut text = table(&head, &rows, &["which"]);
        text += &format!(
            "  a local step ends after {}, of which the server's work for all is {}; the adapter is sent once a round of {}\n",
            duration(times.step_s()),
            duration(times.server_s),
            duration(times.round_s(self.problem.local_steps))
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
            text += &table(&[name, "subchannels", "power", "rate", "which"], &rows, &["which"]);
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
        table(&["method", "total", "", "against the plan", "gap"], &rows, &[])
    }
}
