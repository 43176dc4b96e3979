//! `plan --report`: a page with the plan, its pictures, and how the methods compare around the scenario.

use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::anyhow;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::allocation::scenario::Scenario;
use crate::allocation::{LinkPlan, Method, Problem, SolveOptions, solve};
use crate::disk;

use super::answer::{Answer, ClientRow, Share, power};
use super::charts::{self, Hue, Line, Marker, Names, Part, Point, Stroke};
use super::human::{certificate, digits, duration, percent, prefix, with_prefix};
use super::sweep::{Axis, CSV_HEAD, Measured, csv, draws, measure};
use super::{console::Bar, interrupt};

/// A picture, and what it is.
struct Figure {
    /// Of the file, without `.svg`.
    stem: &'static str,
    title: String,
    caption: String,
    svg: String,
}

/// What could not be shown, and why.
struct Missing {
    title: String,
    reason: String,
}

#[derive(Default)]
struct Page {
    plan: Vec<Figure>,
    around: Vec<Figure>,
    missing: Vec<Missing>,
    csv: Option<String>,
}

/// How a method is drawn, and what it is called.
fn method_look(method: Method) -> (&'static str, Stroke) {
    let stroke = |hue, width, dashed, marker| Stroke {
        hue,
        width,
        dashed,
        marker,
    };
    match method {
        Method::Best => ("best", stroke(Hue::Blue, 4, false, Marker::Dot)),
        Method::Bcd => ("bcd (paper)", stroke(Hue::Vermillion, 2, true, Marker::Triangle)),
        Method::A => ("a (all random)", stroke(Hue::Grey, 2, false, Marker::Cross)),
        Method::B => ("b (links random)", stroke(Hue::Purple, 2, false, Marker::Ring)),
        Method::C => ("c (cut random)", stroke(Hue::Green, 2, true, Marker::Ring)),
        Method::D => ("d (rank random)", stroke(Hue::Orange, 2, true, Marker::Cross)),
    }
}

/// The unit of a clock that suits the largest of some times, in s.
fn clock_unit(largest_s: f64) -> (f64, &'static str) {
    match largest_s {
        s if s >= 4.0 * 86400.0 => (86400.0, "d"),
        s if s >= 4.0 * 3600.0 => (3600.0, "h"),
        s if s >= 600.0 => (60.0, "min"),
        s if s >= 1.0 => (1.0, "s"),
        _ => (1e-3, "ms"),
    }
}

/// Writes `dir/index.html`, its pictures as files of their own, and the curves' numbers.
pub fn write(dir: &Path, answer: &Answer, scenario: Option<&Scenario>, seeds: u32, quiet: bool) -> anyhow::Result<()> {
    let interrupt = interrupt::watch("ending; the report has what is finished")?;
    let interrupted = interrupt.flag();
    let problem = &answer.problem;
    let cells = problem.splits.len() * problem.ranks.len();
    let sweeps: Vec<(Axis, Vec<f64>)> = (scenario.iter())
        .flat_map(|scenario| Axis::NAMED.map(|axis| (axis.clone(), axis.around(scenario))))
        .collect();
    let points: usize = sweeps.iter().map(|(_, values)| values.len()).sum();
    let draws = (points + usize::from(scenario.is_some())) as u64 * u64::from(seeds);
    let bar = Bar::over(cells as u64 + draws, "report", quiet);
    let mut page = Page {
        plan: plan_figures(answer)?,
        ..Page::default()
    };
    bar.set_message("cuts and ranks");
    match cell_figure(answer, interrupted, &bar)? {
        Some(figure) => page.plan.push(figure),
        None => page.missing.push(Missing {
            title: "Cut and rank".to_owned(),
            reason: "interrupted".to_owned(),
        }),
    }
    match scenario {
        Some(scenario) => around(&mut page, scenario, &sweeps, seeds, interrupted, &bar)?,
        None => page.missing.push(Missing {
            title: "Around the scenario, and the gaps".to_owned(),
            reason:
                "an instance is bare numbers: there are no places to draw again and no bandwidth, speed or number of \
                     clients to vary; give a scenario for these"
                    .to_owned(),
        }),
    }
    bar.finish_and_clear();
    let save = |name: &str, text: &str| disk::replace(&dir.join(name), text.as_bytes());
    for figure in page.plan.iter().chain(&page.around) {
        save(&format!("{}.svg", figure.stem), &with_ground(&figure.svg))?;
    }
    if let Some(csv) = &page.csv {
        save("curves.csv", csv)?;
    }
    save("index.html", &html(answer, scenario, &page)?)?;
    Ok(())
}

/// A picture on its own, on light or dark ground.
fn with_ground(svg: &str) -> String {
    const STYLE: &str = "<style>svg{color:#1b1f24;background:#fff}@media(prefers-color-scheme:dark){svg{color:#e4e7ea;background:#15181b}}</style>";
    match svg.split_once('>') {
        Some((head, rest)) => format!("{head}>{STYLE}{rest}"),
        None => svg.to_owned(),
    }
}

fn plan_figures(answer: &Answer) -> anyhow::Result<Vec<Figure>> {
    let problem = &answer.problem;
    let mut figures = vec![delay_figure(answer)?];
    let clients = problem.clients();
    let mut map = |stem, link: &str, does: &str, plan: &LinkPlan| -> anyhow::Result<()> {
        let most_w = plan.power_w.iter().copied().fold(0.0, f64::max);
        figures.push(Figure {
            stem,
            title: format!("{link} link"),
            caption: format!("Who {does} on which subchannel, and with how much power."),
            svg: charts::owners(&plan.owner, &plan.power_w, clients, &power(most_w))?,
        });
        Ok(())
    };
    map("main", "Main", "sends activations", &answer.plan.main)?;
    map("federated", "Federated", "sends adapters", &answer.plan.federated)?;
    if let Some(download) = &answer.plan.download {
        map("download", "Download", "is sent gradients", download)?;
    }
    Ok(figures)
}

/// Where the time of a round goes. Every bar is as long as the round: who is ready waits for the slowest.
fn delay_figure(answer: &Answer) -> anyhow::Result<Figure> {
    let (problem, round) = (&answer.problem, &answer.times);
    let phases = &round.phases;
    let clients = problem.clients();
    let steps = f64::from(problem.local_steps);
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let sum = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
    let behind = |values: &[f64], factor: f64| -> Vec<f64> {
        let most = most(values);
        values.iter().map(|value| (most - value) * factor).collect()
    };
    let times = |values: &[f64]| -> Vec<f64> { values.iter().map(|value| value * steps).collect() };
    let up = sum(&phases.forward, &phases.upload);
    let down = sum(&phases.download, &phases.backward);
    let waiting: Vec<f64> = (behind(&up, steps).into_iter())
        .zip(behind(&down, steps))
        .zip(behind(&round.adapter_s, 1.0))
        .map(|((up, down), adapter)| up + down + adapter)
        .collect();
    let part = |name: &str, hue, values| Part {
        name: name.to_owned(),
        hue,
        values,
    };
    let mut parts = vec![
        part("forward", Hue::Sky, times(&phases.forward)),
        part("upload", Hue::Blue, times(&phases.upload)),
        part("server", Hue::Orange, vec![round.server_s * steps; clients]),
        part("download", Hue::Purple, times(&phases.download)),
        part("backward", Hue::Green, times(&phases.backward)),
        part("adapter upload", Hue::Vermillion, round.adapter_s.clone()),
        part("adapter broadcast", Hue::Grey, vec![round.broadcast_s; clients]),
        part("waiting for others", Hue::Faint, waiting),
    ];
    parts.retain(|part| part.values.iter().any(|&value| value > 0.0));
    let (scale, unit) = clock_unit(round.round_s(problem.local_steps));
    let names: Vec<String> = (0..clients).map(|client| client.to_string()).collect();
    let axis = charts::Axis {
        label: format!("time in a round ({unit})"),
        scale,
        in_proportion: false,
    };
    Ok(Figure {
        stem: "delay",
        title: "Delay by phase and client".to_owned(),
        caption: format!(
            "One round of {} local steps, {}. The phases of the steps are added up; the table has them for one step.",
            problem.local_steps,
            duration(round.round_s(problem.local_steps))
        ),
        svg: charts::stacked_bars(&names, "client", &parts, &axis)?,
    })
}

/// The problem with one cut and one rank only.
fn cell_problem(problem: &Problem, split: usize, rank: usize) -> Problem {
    Problem {
        splits: vec![problem.splits[split]],
        ranks: vec![problem.ranks[rank]],
        rounds: vec![problem.rounds[rank]],
        cells: vec![vec![problem.cells[split][rank].clone()]],
        ..problem.clone()
    }
}

fn cell_figure(answer: &Answer, interrupted: &AtomicBool, bar: &Bar) -> anyhow::Result<Option<Figure>> {
    let problem = &answer.problem;
    let ranks = problem.ranks.len();
    let solved: Option<Vec<Option<f64>>> = (0..problem.splits.len() * ranks)
        .into_par_iter()
        .map(|index| {
            if interrupted.load(Ordering::SeqCst) {
                return None;
            }
            let cell = cell_problem(problem, index / ranks, index % ranks);
            // What does not fit a client's memory has no plan.
            let plan = solve(&cell, Method::Best, &SolveOptions::default()).ok();
            bar.inc(1);
            Some(plan.map(|plan| plan.total_s))
        })
        .collect();
    let Some(solved) = solved else { return Ok(None) };
    let cells: Vec<Vec<Option<f64>>> = solved.chunks(ranks).map(<[Option<f64>]>::to_vec).collect();
    let names = |labels: &[u32], label: &str| Names {
        names: labels.iter().map(u32::to_string).collect(),
        label: label.to_owned(),
    };
    let uniform = answer.plan.split_index.windows(2).all(|pair| pair[0] == pair[1]);
    let chosen = (answer.plan.split_index.first())
        .filter(|_| uniform)
        .map(|&split| (split, answer.plan.rank_index));
    let left_out = cells.iter().flatten().filter(|cell| cell.is_none()).count();
    let mut caption = "The least total for each cut and rank, against the least of all.".to_owned();
    match chosen {
        Some(_) => caption += " The plan's is framed.",
        None => caption += " The cuts here are the same for all clients; the plan has one for each.",
    }
    if left_out > 0 {
        caption += " Empty ones have no plan: a client's memory does not hold its part.";
    }
    Ok(Some(Figure {
        stem: "cells",
        title: "Cut and rank".to_owned(),
        caption,
        svg: charts::heat_map(
            &names(&problem.splits, "cut (blocks on the clients)"),
            &names(&problem.ranks, "rank"),
            &cells,
            chosen,
        )?,
    }))
}

/// Title, stem of the file, and the axis' label with its unit for numbers around `value`.
fn axis_look(axis: &Axis, value: f64) -> (&'static str, &'static str, charts::Axis) {
    let numbers = |what: &str, unit: &str, in_proportion: bool| {
        let (scale, prefix) = match unit {
            "Hz" => prefix(value),
            _ => (1.0, ""),
        };
        let label = match unit {
            "" => what.to_owned(),
            _ => format!("{what} ({prefix}{unit})"),
        };
        charts::Axis {
            label,
            scale,
            in_proportion,
        }
    };
    match axis {
        Axis::Bandwidth => (
            "Bandwidth",
            "bandwidth",
            numbers("bandwidth of the main link, the federated in proportion", "Hz", true),
        ),
        Axis::ClientSpeed => (
            "Client speed",
            "client-speed",
            numbers("mean clock rate of the clients", "Hz", true),
        ),
        Axis::ServerSpeed => (
            "Server speed",
            "server-speed",
            numbers("clock rate of the server", "Hz", true),
        ),
        Axis::Power => (
            "Power",
            "power",
            numbers("most a client sends with, the links' totals by as much", "dBm", false),
        ),
        Axis::Clients | Axis::Field(_) => ("Clients", "clients", numbers("clients", "", true)),
    }
}

fn around(
    page: &mut Page,
    scenario: &Scenario,
    sweeps: &[(Axis, Vec<f64>)],
    seeds: u32,
    interrupted: &AtomicBool,
    bar: &Bar,
) -> anyhow::Result<()> {
    let mut rows = format!("{CSV_HEAD}\n");
    for (axis, values) in sweeps {
        bar.set_message(axis.to_string());
        let own = axis.own(scenario);
        let (title, stem, x) = axis_look(axis, own.unwrap_or(1.0));
        let mut points: Vec<(f64, Vec<Measured>)> = Vec::new();
        let mut reason = None;
        for &value in values {
            let measured = (axis.at(scenario, value))
                .and_then(|moved| measure(&moved, &Method::ALL, (seeds, 0), interrupted, bar));
            match measured {
                Ok(Some(measured)) => {
                    rows += &csv(axis, value, &measured);
                    points.push((value, measured));
                }
                Ok(None) => reason = Some("interrupted".to_owned()),
                Err(error) => reason = Some(format!("at {}: {error:#}", digits(value, 4))),
            }
        }
        if points.len() >= 2 {
            page.around.push(Figure {
                stem,
                title: title.to_owned(),
                caption: format!(
                    "Total delay by method: means and standard deviations over {seeds} draws of places{}.{}",
                    match scenario.channel.fading {
                        crate::allocation::scenario::Fading::None => " and speeds",
                        crate::allocation::scenario::Fading::Rayleigh => ", speeds and fading",
                    },
                    match own {
                        Some(_) => " The dashed line is the scenario's own value.",
                        None => "",
                    }
                ),
                svg: curves(&points, &x, own)?,
            });
        }
        if let Some(reason) = reason {
            page.missing.push(Missing {
                title: match points.len() {
                    0 | 1 => title.to_owned(),
                    _ => format!("Some points of {title}"),
                },
                reason,
            });
        }
    }
    page.csv = Some(rows);
    bar.set_message("gaps");
    let methods = [Method::Best, Method::Bcd];
    match draws(scenario, &methods, (seeds, 0), interrupted, bar)? {
        Some(draws) => {
            let gaps = |index: usize| -> Vec<f64> { draws.iter().map(|draw| draw[index].1).collect() };
            page.around
                .push(gap_figure(&methods.map(method_look), [gaps(0), gaps(1)])?);
        }
        None => page.missing.push(Missing {
            title: "Certified gaps".to_owned(),
            reason: "interrupted".to_owned(),
        }),
    }
    Ok(())
}

fn curves(points: &[(f64, Vec<Measured>)], x: &charts::Axis, own: Option<f64>) -> anyhow::Result<String> {
    let means = || {
        points
            .iter()
            .flat_map(|(_, measured)| measured)
            .map(|measured| measured.total_s.mean)
    };
    let (least, most) = means().fold((f64::INFINITY, 0.0_f64), |(least, most), mean| {
        (least.min(mean), most.max(mean))
    });
    let (scale, unit) = clock_unit(most);
    let in_proportion = most > 4.0 * least;
    let lines: Vec<Line> = (Method::ALL.into_iter())
        .map(|method| {
            let (name, stroke) = method_look(method);
            Line {
                name: name.to_owned(),
                stroke,
                points: (points.iter())
                    .flat_map(|(value, measured)| measured.iter().map(move |measured| (*value, measured)))
                    .filter(|(_, measured)| measured.method == method)
                    .map(|(x, measured)| Point {
                        x,
                        y: measured.total_s.mean,
                        band: measured.total_s.std,
                    })
                    .collect(),
            }
        })
        .collect();
    let y = charts::Axis {
        label: format!("total delay ({unit})"),
        scale,
        in_proportion,
    };
    charts::lines(&lines, x, &y, own)
}

fn gap_figure(looks: &[(&'static str, Stroke); 2], gaps: [Vec<f64>; 2]) -> anyhow::Result<Figure> {
    let count = gaps[0].len();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let words: Vec<String> = (looks.iter().zip(&gaps))
        .map(|((name, _), gaps)| format!("{name}: mean {}, at most {}", percent(mean(gaps)), percent(most(gaps))))
        .collect();
    let series: Vec<(String, Hue, Vec<f64>)> = (looks.iter().zip(gaps))
        .map(|((name, stroke), gaps)| ((*name).to_owned(), stroke.hue, gaps))
        .collect();
    let axis = charts::Axis {
        label: "certified gap: total above its lower bound (%)".to_owned(),
        scale: 0.01,
        in_proportion: false,
    };
    Ok(Figure {
        stem: "gaps",
        title: "Certified gaps".to_owned(),
        caption: format!(
            "How far a plan can be from the best, over {count} draws. {}.",
            words.join("; ")
        ),
        svg: charts::histogram(&series, &axis, "draws")?,
    })
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d8dde2}
@media(prefers-color-scheme:dark){:root{--ground:#15181b;--ink:#e4e7ea;--soft:#a3abb3;--line:#343a41}}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:56rem;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;margin:.2em 0}h2{font-size:1.25rem;margin:2.2em 0 .3em}h3{font-size:1.05rem;margin:1.6em 0 .2em}
.lead{font-size:1.15rem}.soft,figcaption{color:var(--soft)}figure{margin:0}figcaption{margin-bottom:.4em}
svg{display:block;max-width:100%;height:auto}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6em 0;font-size:.92rem}
th,td{padding:.25em .8em .25em 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child,.left{text-align:left}td.left{white-space:normal;min-width:8rem}
caption{text-align:left;font-weight:600;padding-top:.6em}
pre{overflow-x:auto;font-size:.85rem}a{color:inherit}";

fn html(answer: &Answer, scenario: Option<&Scenario>, page: &Page) -> anyhow::Result<String> {
    let (problem, plan) = (&answer.problem, &answer.plan);
    let name = escape(&answer.name);
    let mut text = String::new();
    write!(
        text,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Plan for {name}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
    )?;
    writeln!(
        text,
        "<h1>Plan for {name}</h1>
<p class=\"lead\"><strong>{}</strong> in total, with {}.<br>{}.</p>",
        duration(plan.total_s),
        answer.choice(),
        capital(&certificate(plan.gap()))
    )?;
    writeln!(
        text,
        "<p class=\"soft\">{} clients, {} main and {} federated subchannels of {} and {}. Method {}, solved in {}. No plan with {} \
         takes less than {}.</p>",
        problem.clients(),
        problem.main.subchannels,
        problem.federated.subchannels,
        with_prefix(problem.main.bandwidth_hz, "Hz"),
        with_prefix(problem.federated.bandwidth_hz, "Hz"),
        plan.method,
        duration(answer.solve_s),
        if answer.per_client_split {
            "a cut for each client"
        } else {
            "one cut for all"
        },
        duration(plan.lower_bound_s)
    )?;
    if plan.total_s > answer.delay_s() * (1.0 + 1e-9) {
        writeln!(
            text,
            "<p>Of the total, {} are delay, and the rest is what the clients' energy counts as.</p>",
            duration(answer.delay_s())
        )?;
    }
    plan_table(&mut text, answer)?;
    for figure in &page.plan {
        write_figure(&mut text, figure, "h2")?;
    }
    if !page.around.is_empty() {
        text += "<h2>Around the scenario</h2>\n<p><em>best</em> is exact or certified; <em>bcd</em> is the paper's block coordinate \
                 descent; <em>a</em> to <em>d</em> are its baselines with everything, subchannels and powers, the cut, or the rank at \
                 random. The numbers are in <a href=\"curves.csv\">curves.csv</a>.</p>\n";
        for figure in &page.around {
            write_figure(&mut text, figure, "h3")?;
        }
    }
    if !page.missing.is_empty() {
        text += "<h2>Not shown</h2>\n<ul>\n";
        for Missing { title, reason } in &page.missing {
            writeln!(text, "<li>{}: {}.</li>", escape(title), escape(reason))?;
        }
        text += "</ul>\n";
    }
    if let Some(scenario) = scenario {
        writeln!(
            text,
            "<details><summary>The scenario</summary>\n<pre>{}</pre>\n</details>",
            escape(
                &serde_json::to_string_pretty(scenario)
                    .map_err(|error| anyhow!("cannot write the scenario: {error}"))?
            )
        )?;
    }
    text += "</body>\n</html>\n";
    Ok(text)
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn write_figure(text: &mut String, figure: &Figure, heading: &str) -> std::fmt::Result {
    let title = escape(&figure.title);
    let svg = figure
        .svg
        .replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{title}\" "), 1);
    writeln!(
        text,
        "<figure>\n<{heading}>{title}</{heading}>\n<figcaption>{}</figcaption>\n{svg}\n</figure>",
        escape(&figure.caption)
    )
}

fn plan_table(text: &mut String, answer: &Answer) -> std::fmt::Result {
    let downloads = answer.problem.download.is_some();
    let power_of = |share: &Share| format!("{} of {}", power(share.power_w), with_prefix(share.power_max_w, "W"));
    type Column<'a> = (&'a str, Box<dyn Fn(&ClientRow) -> String>);
    let mut times: Vec<Column<'_>> = vec![
        ("cut", Box::new(|row| row.split.to_string())),
        ("forward", Box::new(|row| duration(row.phases.forward))),
        ("upload", Box::new(|row| duration(row.phases.upload))),
        ("backward", Box::new(|row| duration(row.phases.backward))),
        ("adapter, once a round", Box::new(|row| duration(row.adapter_s))),
    ];
    if downloads {
        times.insert(3, ("download", Box::new(|row| duration(row.phases.download))));
    }
    text.push_str("<h2>The plan by client</h2>\n<p class=\"soft\">Times are for one local step. ");
    writeln!(
        text,
        "The server's work for all is {} a step; a step ends after {}.</p>",
        duration(answer.times.server_s),
        duration(answer.times.step_s())
    )?;
    let mut write_table = |caption: &str, head: Vec<&str>, rows: Vec<Vec<String>>| -> std::fmt::Result {
        write!(text, "<div class=\"wide\"><table>\n<caption>{caption}</caption>\n<tr>")?;
        for name in &head {
            let class = if *name == "which" { " class=\"left\"" } else { "" };
            write!(text, "<th{class}>{name}</th>")?;
        }
        text.push_str("</tr>\n");
        for row in rows {
            text.push_str("<tr>");
            for (name, entry) in head.iter().zip(row) {
                let class = if *name == "which" { " class=\"left\"" } else { "" };
                write!(text, "<td{class}>{}</td>", escape(&entry))?;
            }
            text.push_str("</tr>\n");
        }
        text.push_str("</table></div>\n");
        Ok(())
    };
    let clients = answer.clients();
    let head = std::iter::once("client")
        .chain(times.iter().map(|(name, _)| *name))
        .collect();
    let rows = (clients.iter().enumerate())
        .map(|(client, row)| {
            std::iter::once(client.to_string())
                .chain(times.iter().map(|(_, entry)| entry(row)))
                .collect()
        })
        .collect();
    write_table("Delays", head, rows)?;
    type Part = fn(&ClientRow) -> &Share;
    let links: [(&str, Part); 2] = [("Main link", |row| &row.main), ("Federated link", |row| &row.federated)];
    for (link, share) in links {
        let rows = (clients.iter().enumerate())
            .map(|(client, row)| {
                let share = share(row);
                vec![
                    client.to_string(),
                    share.subchannels.len().to_string(),
                    power_of(share),
                    with_prefix(share.rate_bits_per_s, "bit/s"),
                    share.ranges(),
                ]
            })
            .collect();
        write_table(link, vec!["client", "subchannels", "power", "rate", "which"], rows)?;
    }
    Ok(())
}
