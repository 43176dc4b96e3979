//! `sweep`: the total delay by method while one of a scenario's numbers varies, each point over several draws of the places.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, anyhow};
use clap::Args;
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use serde_json::{Value, json};

use crate::allocation::scenario::Scenario;
use crate::allocation::{Method, SolveOptions, solve};
use crate::disk::{self, Claim};

use super::console::{self, Bar, Rewritten};
use super::interrupt;
use super::scenario::{ScenarioOptions, nested, reason};

/// The total delay by method while one of a scenario's numbers varies, as CSV.
///
/// Each point is the mean over several draws of places, speeds and fading: the scenario's seed, the next one, and so on.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm sweep cell --axis bandwidth --seeds 5 --out bandwidth.csv
  sflllm sweep selective --over main.subchannels=8,16,32 --over clients.radius_m=50:800:5:log --methods best,bcd

Axes:
  bandwidth      of the main link, in Hz; the other links' follows in proportion
  client-speed   the clients' mean clock rate, in Hz
  server-speed   the server's clock rate, in Hz
  power          the most a client sends with, in dBm; the links' totals follow by as many dB
  clients        how many")]
pub struct Options {
    #[command(flatten)]
    pub scenario: ScenarioOptions,
    /// What varies, and its values: an axis, or a field as in --set; FROM:TO:COUNT are evenly spaced, with :log in proportion;
    /// may be repeated
    #[arg(long, value_name = "NAME=FROM:TO:COUNT[:log]|NAME=V,V,...", value_parser = parse_over, required_unless_present = "axis")]
    pub over: Vec<Over>,
    /// An axis over a range around the scenario's own value: bandwidth, client-speed, server-speed, power, clients, or all
    #[arg(long, value_name = "AXIS", value_parser = parse_axes, value_delimiter = ',')]
    pub axis: Vec<Axes>,
    /// Methods to compare
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "best,bcd,a,b,c,d"
    )]
    pub methods: Vec<Method>,
    /// Draws of each point
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub seeds: u32,
    /// Of the random baselines, in the first draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Where the series go; - is stdout
    #[arg(long, value_name = "FILE.csv|-", default_value = "-")]
    pub out: PathBuf,
    /// No progress on stderr
    #[arg(long)]
    pub quiet: bool,
}

/// What varies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Axis {
    Bandwidth,
    ClientSpeed,
    ServerSpeed,
    Power,
    Clients,
    /// A field of the scenario, by its path.
    Field(String),
}

/// A series' points.
#[derive(Clone, Debug, PartialEq)]
pub struct Over {
    pub axis: Axis,
    pub values: Vec<f64>,
}

/// What `--axis` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axes(Vec<Axis>);

/// Points of a series whose range was not given.
const POINTS: usize = 7;
/// A rate varies from its fourth to its fourfold, and so does the number of clients at most.
const RANGE: f64 = 4.0;
/// A power varies from so much below to so much above, in dB.
const RANGE_DB: f64 = 9.0;

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Axis::Bandwidth => "bandwidth",
            Axis::ClientSpeed => "client-speed",
            Axis::ServerSpeed => "server-speed",
            Axis::Power => "power",
            Axis::Clients => "clients",
            Axis::Field(path) => path,
        })
    }
}

impl FromStr for Axis {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Axis::NAMED.into_iter().find(|axis| axis.to_string() == text);
        Ok(named.unwrap_or_else(|| Axis::Field(text.to_owned())))
    }
}

fn parse_axes(text: &str) -> Result<Axes, String> {
    if text == "all" {
        return Ok(Axes(Axis::NAMED.to_vec()));
    }
    (Axis::NAMED.into_iter().find(|axis| axis.to_string() == text))
        .map(|axis| Axes(vec![axis]))
        .ok_or_else(|| {
            let names: Vec<String> = Axis::NAMED.iter().map(Axis::to_string).collect();
            format!("choose {} or all; for another field use --over", names.join(", "))
        })
}

fn parse_over(text: &str) -> Result<Over, String> {
    let (name, values) = text.split_once('=').ok_or("it has no `=`: write as in power=10:30:5")?;
    let name = name.trim();
    if name.is_empty() || name.split('.').any(str::is_empty) {
        return Err(format!("`{name}` is neither an axis nor a field"));
    }
    let Ok(axis) = name.parse();
    let number = |text: &str| match text.trim().parse::<f64>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => Err(format!("`{text}` is no number")),
    };
    let parts: Vec<&str> = values.split(':').collect();
    let values = match parts[..] {
        [list] => list.split(',').map(number).collect::<Result<_, _>>()?,
        [from, to, count] => spaced(number(from)?, number(to)?, points(count)?),
        [from, to, count, "log"] => {
            let (from, to) = (number(from)?, number(to)?);
            if from <= 0.0 || to <= 0.0 {
                return Err("a range in proportion needs numbers above 0".to_owned());
            }
            spaced(from.ln(), to.ln(), points(count)?)
                .into_iter()
                .map(|ln| round(ln.exp()))
                .collect()
        }
        _ => return Err("write FROM:TO:COUNT, FROM:TO:COUNT:log or a list V,V,...".to_owned()),
    };
    Ok(Over { axis, values })
}

fn points(text: &str) -> Result<usize, String> {
    match text.trim().parse() {
        Ok(count @ 1..=10_000) => Ok(count),
        _ => Err(format!("`{text}` is no number of points, 1 to 10000")),
    }
}

/// Evenly from one number to another, both included.
fn spaced(from: f64, to: f64, count: usize) -> Vec<f64> {
    match count {
        1 => vec![from],
        _ => (0..count)
            .map(|index| from + (to - from) * index as f64 / (count - 1) as f64)
            .collect(),
    }
}

/// Without the noise that logarithms bring.
fn round(value: f64) -> f64 {
    let scale = 10.0_f64.powf(5.0 - value.abs().log10().floor());
    match scale.is_finite() && scale > 0.0 {
        true => (value * scale).round() / scale,
        false => value,
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// What a sample of a number comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    pub count: usize,
    pub mean: f64,
    /// With `count - 1`; 0 for a single one.
    pub std: f64,
}

impl Statistics {
    pub fn of(values: &[f64]) -> Self {
        let mean = mean(values);
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Self {
            count: values.len(),
            mean,
            std: (squares / values.len().saturating_sub(1).max(1) as f64).sqrt(),
        }
    }
}

impl Axis {
    pub const NAMED: [Axis; 5] = [
        Axis::Bandwidth,
        Axis::ClientSpeed,
        Axis::ServerSpeed,
        Axis::Power,
        Axis::Clients,
    ];

    /// The scenario's own place on the axis; `None` for a field that is no number.
    pub fn own(&self, scenario: &Scenario) -> Option<f64> {
        let clients = &scenario.clients;
        match self {
            Axis::Bandwidth => Some(scenario.main.bandwidth_hz),
            Axis::ClientSpeed => Some(match &clients.compute_hz_each {
                Some(each) => mean(each),
                None => mean(&clients.compute_hz),
            }),
            Axis::ServerSpeed => Some(scenario.server.compute_hz),
            Axis::Power => Some(match &clients.power_max_dbm_each {
                Some(each) => each.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                None => clients.power_max_dbm,
            }),
            Axis::Clients => Some(clients.count as f64),
            Axis::Field(path) => number_at(scenario, path).as_ref().and_then(Value::as_f64),
        }
    }

    /// Values around the scenario's own.
    pub fn around(&self, scenario: &Scenario) -> Vec<f64> {
        let Some(own) = self.own(scenario) else {
            return Vec::new();
        };
        let in_proportion = |from: f64, to: f64| -> Vec<f64> {
            let spaced = spaced(from.ln(), to.ln(), POINTS);
            spaced.into_iter().map(|ln| round(ln.exp())).collect()
        };
        let values = match self {
            Axis::Power => spaced(own - RANGE_DB, own + RANGE_DB, POINTS)
                .into_iter()
                .map(round)
                .collect(),
            Axis::Clients => {
                let subchannels = scenario.main.subchannels.min(scenario.federated.subchannels) as f64;
                let most = subchannels.min(own * RANGE);
                in_proportion(most.min(2.0), most)
            }
            Axis::Bandwidth | Axis::ClientSpeed | Axis::ServerSpeed | Axis::Field(_) => {
                in_proportion(own / RANGE, own * RANGE)
            }
        };
        self.whole(scenario, values)
    }

    /// Rounded where only whole numbers make sense, each once.
    fn whole(&self, scenario: &Scenario, mut values: Vec<f64>) -> Vec<f64> {
        let counts = match self {
            Axis::Clients => true,
            Axis::Field(path) => number_at(scenario, path).is_some_and(|value| value.is_u64()),
            Axis::Bandwidth | Axis::ClientSpeed | Axis::ServerSpeed | Axis::Power => false,
        };
        if counts {
            values.iter_mut().for_each(|value| *value = value.round());
            values.dedup();
        }
        values
    }

    /// The scenario at another place on the axis.
    pub fn at(&self, scenario: &Scenario, value: f64) -> anyhow::Result<Scenario> {
        let mut moved = scenario.clone();
        let own = self.own(scenario).unwrap_or(value);
        let factor = value / own;
        let scale = |values: &mut [f64]| values.iter_mut().for_each(|value| *value *= factor);
        match self {
            Axis::Bandwidth => {
                moved.main.bandwidth_hz = value;
                moved.federated.bandwidth_hz *= factor;
                if let Some(download) = &mut moved.download {
                    download.bandwidth_hz *= factor;
                }
                // Noise grows with the band.
                let channel = &mut moved.channel;
                for row in [&mut channel.main_snr_per_watt, &mut channel.federated_snr_per_watt]
                    .into_iter()
                    .flatten()
                    .flatten()
                {
                    row.iter_mut().for_each(|snr| *snr /= factor);
                }
            }
            Axis::ClientSpeed => {
                scale(&mut moved.clients.compute_hz);
                if let Some(each) = &mut moved.clients.compute_hz_each {
                    scale(each);
                }
            }
            Axis::ServerSpeed => moved.server.compute_hz = value,
            Axis::Power => {
                let shift_db = value - own;
                moved.clients.power_max_dbm += shift_db;
                moved.main.power_total_dbm += shift_db;
                moved.federated.power_total_dbm += shift_db;
                if let Some(each) = &mut moved.clients.power_max_dbm_each {
                    each.iter_mut().for_each(|dbm| *dbm += shift_db);
                }
            }
            Axis::Clients => {
                anyhow::ensure!(value >= 1.0, "clients = {value}: there must be at least one");
                moved.clients.count = value as usize;
            }
            Axis::Field(path) => {
                // A count comes as a whole number, or serde refuses it.
                let number = match value.fract() == 0.0 && (0.0..9e15).contains(&value) {
                    true => json!(value as u64),
                    false => json!(value),
                };
                let changes = nested(path, number);
                moved = (scenario.with(changes.clone())).map_err(|error| anyhow!("{}", reason(&error, &changes)))?;
            }
        }
        Ok(moved)
    }
}

fn number_at(scenario: &Scenario, path: &str) -> Option<Value> {
    let value = serde_json::to_value(scenario).ok()?;
    let found = value.pointer(&format!("/{}", path.replace('.', "/")))?;
    found.is_number().then(|| found.clone())
}

/// A method at a point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    pub method: Method,
    pub total_s: Statistics,
    pub gap: Statistics,
}

/// One draw's total and gap by each of the methods.
type Draw = Vec<(f64, f64)>;

/// What each of `methods` comes to in each of `seeds` draws of the places from the scenario's seed on; `None` when it was
/// interrupted.
pub fn draws(
    scenario: &Scenario,
    methods: &[Method],
    (seeds, seed): (u32, u64),
    interrupted: &AtomicBool,
    bar: &Bar,
) -> anyhow::Result<Option<Vec<Draw>>> {
    let draw = |index: u64| -> anyhow::Result<Option<Draw>> {
        let drawn = Scenario {
            seed: scenario.seed.wrapping_add(index),
            ..scenario.clone()
        };
        let problem = drawn.problem().map_err(|error| anyhow!("{error}"))?;
        let mut solved = Vec::with_capacity(methods.len());
        for &method in methods {
            if interrupted.load(Ordering::SeqCst) {
                return Ok(None);
            }
            let options = SolveOptions {
                seed: seed.wrapping_add(index),
                per_client_split: false,
            };
            let plan =
                solve(&problem, method, &options).with_context(|| format!("seed {}, method {method}", drawn.seed))?;
            solved.push((plan.total_s, plan.gap()));
        }
        bar.inc(1);
        Ok(Some(solved))
    };
    (0..u64::from(seeds)).into_par_iter().map(draw).collect()
}

/// The same as statistics.
pub fn measure(
    scenario: &Scenario,
    methods: &[Method],
    seeds: (u32, u64),
    interrupted: &AtomicBool,
    bar: &Bar,
) -> anyhow::Result<Option<Vec<Measured>>> {
    let draws = draws(scenario, methods, seeds, interrupted, bar)?;
    Ok(draws.map(|draws| {
        let column = |index: usize, of: fn(&(f64, f64)) -> f64| -> Statistics {
            let values: Vec<f64> = draws.iter().map(|draw| of(&draw[index])).collect();
            Statistics::of(&values)
        };
        (methods.iter().enumerate())
            .map(|(index, &method)| Measured {
                method,
                total_s: column(index, |draw| draw.0),
                gap: column(index, |draw| draw.1),
            })
            .collect()
    }))
}

pub const CSV_HEAD: &str = "axis,value,method,seeds,mean_total_s,std_total_s,mean_gap";

/// A point's lines.
pub fn csv(axis: &Axis, value: f64, measured: &[Measured]) -> String {
    (measured.iter())
        .map(|Measured { method, total_s, gap }| {
            let Statistics { count, mean, std } = total_s;
            format!("{axis},{value},{method},{count},{mean},{std},{}\n", gap.mean)
        })
        .collect()
}

pub fn run(options: Options) -> anyhow::Result<()> {
    let file = &options.scenario.file;
    let claim = match options.out.as_os_str() == "-" {
        true => None,
        false => Some(Claim::new_file(&options.out, "--out", "a file")?),
    };
    let scenario = options.scenario.read_scenario()?;
    let mut series = options.over.clone();
    for axis in options.axis.iter().flat_map(|axes| &axes.0) {
        series.push(Over {
            axis: axis.clone(),
            values: axis.around(&scenario),
        });
    }
    // Every point is looked at before the first is solved: a mistake at the end of a range shows at once.
    let mut points: Vec<(Axis, f64, Scenario)> = Vec::new();
    for Over { axis, values } in series {
        for value in axis.whole(&scenario, values) {
            let place = || format!("{file} at {axis} = {value}");
            let moved = axis.at(&scenario, value).with_context(place)?;
            moved.problem().map_err(|error| anyhow!("{}: {error}", place()))?;
            points.push((axis.clone(), value, moved));
        }
    }
    let interrupt = interrupt::watch("ending; finished rows are written")?;
    let mut series = Series::new(claim, &options.out)?;
    let draws = points.len() as u64 * u64::from(options.seeds);
    let bar = Bar::over(draws, "sweep", options.quiet);
    let mut finished = 0;
    for (axis, value, scenario) in &points {
        bar.set_message(format!("{axis} = {value}"));
        let seeds = (options.seeds, options.seed);
        let measured = measure(scenario, &options.methods, seeds, interrupt.flag(), &bar)
            .with_context(|| format!("{file} at {axis} = {value}"))?;
        let Some(measured) = measured else { break };
        series.add(&csv(axis, *value, &measured))?;
        finished += 1;
    }
    bar.finish_and_clear();
    series.saved.finish()?;
    if !options.quiet && (!series.is_on_stdout() || finished < points.len()) {
        let place = match series.is_on_stdout() {
            true => "stdout".to_owned(),
            false => options.out.display().to_string(),
        };
        console::say(format!("{finished} of {} points in {place}", points.len()));
    }
    Ok(())
}

/// Where the rows go.
struct Series {
    /// `None` is stdout.
    file: Option<(PathBuf, Claim)>,
    text: String,
    saved: Rewritten,
}

impl Series {
    fn new(claim: Option<Claim>, out: &Path) -> anyhow::Result<Self> {
        let mut series = Self {
            file: claim.map(|claim| (out.to_owned(), claim)),
            text: String::new(),
            saved: Rewritten::default(),
        };
        series.add(&format!("{CSV_HEAD}\n"))?;
        // Before hours of work: that it can be kept.
        series.saved.finish()?;
        Ok(series)
    }

    fn add(&mut self, rows: &str) -> anyhow::Result<()> {
        let Some((path, _)) = &self.file else {
            return Ok(console::print_part(rows)?);
        };
        self.text += rows;
        let written = disk::replace(path, self.text.as_bytes());
        self.saved.note(written.map_err(Into::into));
        Ok(())
    }

    fn is_on_stdout(&self) -> bool {
        self.file.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_lists() {
        let values = |text: &str| parse_over(text).unwrap().values;
        assert_eq!(values("power=10:30:5"), [10.0, 15.0, 20.0, 25.0, 30.0]);
        assert_eq!(values("main.bandwidth_hz=1e6:1e8:3:log"), [1e6, 1e7, 1e8]);
        assert_eq!(values("clients=2,4,8"), [2.0, 4.0, 8.0]);
        assert_eq!(parse_over("clients=2").unwrap().axis, Axis::Clients);
        assert_eq!(
            parse_over("clients.radius_m=2").unwrap().axis,
            Axis::Field("clients.radius_m".to_owned())
        );
        for wrong in [
            "power",
            "=1",
            "power=1:2",
            "power=1:2:0",
            "power=-1:2:3:log",
            "power=x",
            "power=1:2:3:lin",
        ] {
            assert!(parse_over(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn statistics_of_a_sample() {
        let statistics = Statistics::of(&[1.0, 3.0]);
        assert_eq!((statistics.mean, statistics.std), (2.0, 2.0_f64.sqrt()));
        assert_eq!(Statistics::of(&[5.0]).std, 0.0);
    }

    #[test]
    fn an_axis_passes_through_the_scenario_and_keeps_its_proportions() {
        let scenario = Scenario::preset("cell").unwrap();
        for axis in Axis::NAMED {
            let own = axis.own(&scenario).unwrap();
            assert_eq!(axis.at(&scenario, own).unwrap(), scenario, "{axis}");
            assert!(axis.around(&scenario).len() >= 6, "{axis}");
        }
        let narrow = Axis::Bandwidth.at(&scenario, 5e6).unwrap();
        assert_eq!((narrow.main.bandwidth_hz, narrow.federated.bandwidth_hz), (5e6, 5e6));
        let loud = Axis::Power.at(&scenario, 26.0).unwrap();
        assert_eq!(loud.main.power_total_dbm, 33.0);
        let field = Axis::Field("clients.count".to_owned());
        assert_eq!(field.whole(&scenario, vec![2.2, 2.4, 3.0]), [2.0, 3.0]);
        assert_eq!(field.at(&scenario, 3.0).unwrap().clients.count, 3);
        assert!(Axis::Field("clients.cuont".to_owned()).at(&scenario, 3.0).is_err());
    }
}
