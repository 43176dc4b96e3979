//! `sflllm serve`: the main and federated servers, with clients in the same process if wanted.
//!
//! | file | holds |
//! |---|---|
//! | `resume` | a run that goes on |
//! | `host` | a server in this process, with its local clients |
//! | `shown` | what people are told of it |

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use serde_json::json;

use super::console;
use super::defaults;
use super::given::{self, Given};
use super::options::{BatchOptions, Choice, DeviceOptions, LoraOptions, ModelOptions, OptimizerOptions, OutputOptions};
use super::scenario::ScenarioOptions;
use super::secret::{CONTROL_KEY, TOKEN};
use super::source::{DEMO_TRAIN, Source};
use crate::allocation::Method;
use crate::allocation::scenario::Scenario;
use crate::data::{Dataset, Example, Sharding};
use crate::model::adapter::Adapter;
use crate::model::rounds::RoundsTable;
use crate::protocol::Deadline;
use crate::protocol::message::Digest;
use crate::runs::directory::RunDirectory;
use crate::server::allocator::{self, Allocator};
use crate::server::{self, Ending, HostName, Listen, Role, Run};
use crate::split::Training;
use crate::terms::adapter::Trained;
use crate::terms::aggregation::Aggregation;
use crate::terms::tensor::WireForm;
use crate::transport::{Dialer, JoinLink, Trust};

mod host;
mod resume;
mod shown;

pub(super) use host::{Hosting, host, runtime};
use resume::{RECORDING, Resumed, resume};
pub(super) use shown::conclude;

/// Serve a run: the main server, the federated server and the web page, on one port.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm serve --clients 2 --rounds 10 --valid valid.txt
      the demo model for everybody on the network; prints a join link and its QR code
  sflllm serve --model path/to/gpt2 --listen https://127.0.0.1:8443 --token secret --clients 3 --out runs/mine
  sflllm serve --resume runs/mine
      after a crash, a kill or Ctrl-C: goes on where the last round began
  sflllm serve --role federated --listen https://0.0.0.0:9443
      prints the address to give to the main server, and its control key
  sflllm serve --role main --federated-url 'https://192.168.1.21:9443/#f=FINGERPRINT' --control-key KEY

SFLLLM_TOKEN and SFLLLM_CONTROL_KEY are taken where no option gives the join token or the control key.")]
pub struct Options {
    #[command(flatten)]
    given: Given,
    /// Address to listen on: https://HOST:PORT, or http://HOST:PORT on loopback; may be repeated; port 0 takes a free one
    /// [default: https://0.0.0.0:8443 and http://127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    pub listen: Vec<Listen>,
    /// Which of the two servers this process is
    #[arg(long, value_enum, default_value_t = RoleName::Both)]
    pub role: RoleName,
    /// Where the federated server is (with --role main); clients are sent there too
    #[arg(long, value_name = "URL", required_if_eq("role", "main"))]
    pub federated_url: Option<JoinLink>,
    /// PEM file with the certificate of the federated server elsewhere, or of its authority
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Accept any certificate of the federated server elsewhere
    #[arg(long, conflicts_with = "ca")]
    pub insecure_tls: bool,
    /// Start when this many clients are ready; more may join later [default: 1, or the number of local clients]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub clients: Option<u32>,
    /// Rounds of local training and averaging
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Steps of every client in a round
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub local_steps: u32,
    /// Blocks on the clients; auto chooses by what the clients measure, and again as the run goes
    #[arg(long, value_name = "N|auto", default_value = "auto")]
    pub split: Choice,
    /// Let every client have a cut of its own: fast devices take more blocks, slow ones fewer. Chosen once, before the first
    /// round; the server's copy of the blocks that only some clients have is averaged with theirs (not with --split N)
    #[arg(long)]
    pub per_client_split: bool,
    /// Emulate the radio links of this scenario (TOML or JSON, or the name of a preset): each client has a place in it, and its
    /// uplinks are as fast as the plan makes them
    #[arg(long, value_name = "FILE")]
    pub scenario: Option<PathBuf>,
    /// How the scenario's subchannels, powers, cut and rank are chosen: best, bcd (the paper's), a, b, c, d (at random)
    #[arg(long, value_name = "METHOD", default_value = "best", requires = "scenario")]
    pub plan_method: Method,
    /// Seed of the random methods
    #[arg(long, value_name = "N", default_value_t = 0, requires = "scenario")]
    pub plan_seed: u64,
    /// Rounds to the target loss at each rank, as `sflllm calibrate` measured them; `--rank auto` chooses by them
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Data to validate on, before the first round and after every round
    #[arg(long, value_name = "FILE")]
    pub valid: Option<PathBuf>,
    /// Join token, or `generate` [default: none on loopback, generated otherwise]
    #[arg(long, value_name = "TOKEN|generate")]
    pub token: Option<String>,
    /// File that holds the join token, which stays out of the machine's list of processes
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    pub token_file: Option<PathBuf>,
    /// Key of the link between the two servers, or `generate` [default: generated by the federated server, which prints it]
    #[arg(long, value_name = "KEY|generate")]
    pub control_key: Option<String>,
    /// File that holds the key of the link between the two servers
    #[arg(long, value_name = "FILE", conflicts_with = "control_key")]
    pub control_key_file: Option<PathBuf>,
    /// Another name by which browsers and clients call this server; may be repeated. Its own names, and addresses in numbers, are
    /// known; requests for any other are refused, so that no page from elsewhere can reach this server through its visitors
    #[arg(long, value_name = "NAME")]
    pub host: Vec<HostName>,
    /// Clients in this process, which speak the same protocol as others
    #[arg(long, value_name = "N", default_value_t = 0, requires = "data")]
    pub local_clients: usize,
    /// Data of the local clients: given once it is divided among them, repeated there is one file for each
    #[arg(long, value_name = "FILE", requires = "local_clients")]
    pub data: Vec<PathBuf>,
    /// How activations and gradients travel
    #[arg(long, default_value_t, value_name = "f32|f16|int8")]
    pub wire: WireForm,
    /// Seconds to wait for a client to return when all have left
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub wait: u32,
    /// How long a step waits for a client's activations, and a round for its adapter, once others' have come; who is late is left
    /// out, and dropped after three times running. auto goes by how long they have taken, from 5 s to 10 minutes
    #[arg(long, value_name = "auto|SECONDS", default_value = "auto")]
    pub deadline: Deadline,
    /// At the deadline, wait on until this many clients' have come; and when so many have lost their connection that fewer are left,
    /// begin the round again once enough are back, or go on with whom there is after --wait [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub quorum: Option<u32>,
    /// How clients' adapters become one. mean: of A and of B; what that misses of the mean change is told. trimmed, median: of each
    /// value, without its extremes or in its middle, whatever few clients send. flora, fedex: what is validated and saved is the
    /// mean change itself, at a larger rank; clients go on with its nearest of their rank, or with the means. ffa: A is frozen, only B
    /// is trained and sent. With --role federated, main servers that do otherwise are refused [default: mean]
    #[arg(long, value_name = "mean|trimmed|median|flora|fedex|ffa")]
    pub aggregate: Option<Aggregation>,
    /// Ranks of the clients, in turn as they join, none above --rank: 4,8,16 for devices that differ (needs --split N)
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub client_ranks: Vec<u32>,
    /// Take up the interrupted run in this directory: at the beginning of the round that was open, with the options, the token and the
    /// addresses it began with, so that its clients find it again. Beside it only --quiet, --json, --open and --device
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// Run directory [default: runs/TIME-MODEL]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Open the page in this machine's browser
    #[arg(long)]
    pub open: bool,
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub lora: LoraOptions,
    #[command(flatten)]
    pub optimizer: OptimizerOptions,
    #[command(flatten)]
    pub batches: BatchOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RoleName {
    Both,
    Main,
    Federated,
}

/// What this is called by.
const COMMAND: &str = "serve";

/// Where `--split auto` begins, before anything was measured.
const FIRST_SPLIT: usize = 1;

/// # Errors
/// One sentence that says what to do.
pub fn run(options: Options) -> anyhow::Result<()> {
    match &options.resume {
        Some(directory) => resume(&directory.clone(), options),
        None => begin(options, None),
    }
}

/// Where to listen.
fn listened(options: &Options) -> anyhow::Result<Vec<Listen>> {
    Ok(match &options.listen[..] {
        [] if options.role == RoleName::Federated => vec!["https://0.0.0.0:9443".parse()?],
        [] => vec!["https://0.0.0.0:8443".parse()?, "http://127.0.0.1:8080".parse()?],
        given => given.to_vec(),
    })
}

/// Begins a run, or goes on with one.
fn begin(options: Options, resumed: Option<Resumed>) -> anyhow::Result<()> {
    let is_resumed = resumed.is_some();
    let listen = listened(&options)?;
    let asked = TOKEN.read(options.token.as_deref(), options.token_file.as_deref(), None)?;
    let hosting = Hosting {
        token: match options.role {
            // Nobody joins a federated server: clients come with the main server's tickets.
            RoleName::Federated => None,
            _ if is_resumed => options.token.clone(),
            _ => token(asked.as_deref(), &listen)?,
        },
        hosts: options.host.clone(),
        listen,
        open: options.open,
        quiet: options.output.quiet,
        demo_data: DEMO_TRAIN.to_vec(),
    };
    let control_key = CONTROL_KEY.read(
        options.control_key.as_deref(),
        options.control_key_file.as_deref(),
        None,
    )?;
    if options.role == RoleName::Federated {
        if options.local_clients > 0 || options.valid.is_some() {
            bail!("--local-clients and --valid belong to the main server; start this one with --role federated only");
        }
        let mut directory = RunDirectory::create(options.out.as_deref(), "federated")?;
        directory.note(json!({ "command": COMMAND, "role": "federated", "aggregate": options.aggregate }))?;
        let control_key = match control_key.as_deref() {
            None | Some("generate") => server::generate_token(),
            Some(key) => key.to_owned(),
        };
        let role = Role::Federated {
            control_key,
            aggregation: options.aggregate,
        };
        let summary = host(hosting, role, directory, None, Vec::new(), None)?;
        return conclude(&summary, None, &options.output);
    }

    let role = match &options.federated_url {
        Some(link) if options.role == RoleName::Main => {
            let trust = match (&options.ca, options.insecure_tls) {
                (Some(file), _) => Trust::Authority(file.clone()),
                (None, true) => Trust::Anyone,
                (None, false) => Trust::Known,
            };
            let Some(control_key) = control_key else {
                bail!(
                    "--role main needs the key that the federated server prints when it starts: give it with {}, {} or {}",
                    CONTROL_KEY.option,
                    CONTROL_KEY.file_option,
                    CONTROL_KEY.variable
                );
            };
            Role::Main {
                federated: link.clone(),
                dialer: Dialer::new(&trust)?.toward(link)?,
                control_key,
            }
        }
        Some(_) => bail!("--federated-url belongs to --role main"),
        None if options.control_key.is_some() || options.control_key_file.is_some() => {
            bail!("--control-key belongs to --role main and --role federated")
        }
        None => Role::Both,
    };
    let (mut directory, interrupted) = match resumed {
        Some(resumed) => (resumed.directory, Some(resumed.interrupted)),
        None => (
            RunDirectory::create(options.out.as_deref(), &options.model.model.short())?,
            None,
        ),
    };
    let path = directory.path().to_owned();
    let prepared = prepare(&options, &mut directory)?;
    let adapter = directory.adapter();
    let summary = host(
        hosting,
        role,
        directory,
        Some(prepared.run),
        prepared.local,
        interrupted,
    )?;
    if matches!(summary.ending, Ending::Stopped(_) | Ending::NoClients) {
        console::say(format!("go on with: sflllm serve --resume {}", path.display()));
    }
    conclude(&summary, Some(&adapter), &options.output)
}

/// The join token: what was asked for, or a generated one where other machines can connect.
pub(super) fn token(asked: Option<&str>, listen: &[Listen]) -> anyhow::Result<Option<String>> {
    let loopback = |listen: &Listen| {
        listen.host == "localhost"
            || listen
                .host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|host| host.is_loopback())
    };
    Ok(match asked {
        Some("generate") => Some(server::generate_token()),
        Some(token) => Some(token.to_owned()),
        None if listen.iter().all(loopback) => None,
        None => Some(server::generate_token()),
    })
}

struct Prepared {
    run: Run,
    /// Examples of each local client.
    local: Vec<Vec<Example>>,
}

/// Reads model and data, and writes down what they are.
fn prepare(options: &Options, directory: &mut RunDirectory) -> anyhow::Result<Prepared> {
    let reading = &options.batches.reading;
    let source =
        Source::open(&options.model.model, options.model.weights, options.output.quiet)?.with_reading(reading)?;
    let BatchOptions {
        batch,
        seed,
        no_shuffle,
        ..
    } = options.batches;
    let seq = options.batches.seq(source.architecture.positions)?;
    let aggregation = options.aggregate.unwrap_or_default();
    let initial = match &options.lora.init_adapter {
        Some(_) if aggregation.trained() != Trained::Both => bail!(
            "--aggregate {aggregation} freezes the matrices A that the run's seed makes, and --init-adapter brings others; leave one \
             of the two out"
        ),
        Some(directory) => source.adapter(directory)?.with_one_rank(&source.architecture)?,
        None => Adapter::init(
            &source.architecture,
            &options.lora.spec(&source.architecture)?,
            0..source.architecture.blocks,
            seed,
        )?,
    };
    let steps = u64::from(options.rounds) * u64::from(options.local_steps);
    let optimizer = options
        .optimizer
        .settings(&source.architecture, &initial.spec.targets, steps)?;
    let said = defaults::said(
        &source.architecture,
        &options.lora,
        &initial.spec,
        &options.optimizer,
        &optimizer,
    );
    if !options.output.quiet {
        console::say(&said);
    }
    let mut initial = initial;
    initial.spec.trained = aggregation.trained();
    let initial = Adapter::from_values(
        &source.architecture,
        &initial.spec,
        0..source.architecture.blocks,
        initial.values,
    )?;
    if let Some(rank) = options
        .client_ranks
        .iter()
        .find(|rank| **rank as usize > initial.spec.rank)
    {
        bail!(
            "--client-ranks {rank}: the run's rank is {}, and clients can have smaller ones only; give a larger --rank",
            initial.spec.rank
        );
    }
    let has_ranks = !options.client_ranks.is_empty();
    if has_ranks && options.split == Choice::Auto {
        bail!("--client-ranks needs --split N: with ranks of their own, clients keep their blocks");
    }
    if options.per_client_split && aggregation == Aggregation::Flora {
        bail!(
            "--aggregate flora puts adapters in other coordinates in every round, which the server's optimiser of blocks that \
             some clients have too cannot follow; take --aggregate fedex, or leave out --per-client-split"
        );
    }
    let training = Training {
        spec: initial.spec.clone(),
        optimizer,
        batch: batch as usize,
        seq,
        wire: options.wire,
    };
    let cut = match options.split {
        Choice::Auto => FIRST_SPLIT,
        Choice::Value(cut) if options.per_client_split => {
            bail!("--per-client-split chooses the cuts, and --split {cut} says them; leave one of the two out")
        }
        Choice::Value(cut) => cut,
    };
    if options.per_client_split && options.plan_method != Method::Best {
        bail!("--per-client-split needs --plan-method best; the others have one cut for all clients");
    }
    let read = |path: &PathBuf| source.data(path, seq, reading, options.output.quiet);
    let valid = options.valid.as_ref().map(read).transpose()?;
    let data = options.data.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
    let describe = |path: &PathBuf, data: &Dataset| json!({ "file": path, "summary": data.summary });
    directory.note(json!({
        "command": COMMAND,
        "options": RECORDING.record(&given::command::<Options>(COMMAND), &options.given),
        "role": if options.role == RoleName::Main { "main" } else { "both" },
        "model_source": options.model.model.recorded(),
        "configuration": {
            "rounds": options.rounds, "local_steps": options.local_steps, "clients": options.clients,
            "local_clients": options.local_clients, "split": cut, "spec": training.spec,
            "optimizer": training.optimizer, "batch": batch, "seq": seq, "wire": training.wire,
            "seed": seed, "shuffle": !no_shuffle, "wait": options.wait, "deadline_s": options.deadline.seconds(), "quorum": options.quorum,
            "aggregate": aggregation, "client_ranks": options.client_ranks,
        },
        "settings": said,
        "valid": options.valid.as_ref().zip(valid.as_ref()).map(|(path, data)| describe(path, data)),
        "data": options.data.iter().zip(&data).map(|(path, data)| describe(path, data)).collect::<Vec<_>>(),
    }))?;
    let local = divide(
        data.into_iter().map(|data| data.examples).collect(),
        options.local_clients,
    )?;
    let scenario = options.scenario.as_deref().map(scenario).transpose()?;
    let places = scenario.as_ref().map_or(0, |scenario| scenario.clients.count);
    let clients = options.clients.unwrap_or(
        u32::try_from(options.local_clients.max(places))
            .unwrap_or(u32::MAX)
            .max(1),
    );
    if let Some(scenario) = &scenario {
        ensure!(
            clients as usize == places,
            "--scenario has places for {places} clients and the run starts with {clients}; use --clients {places}, or set clients.count \
             in the scenario"
        );
        directory.note(json!({
            "scenario": scenario, "plan_method": options.plan_method.name(), "plan_seed": options.plan_seed,
        }))?;
    }
    let rounds = (options.calibration.as_deref()).map(RoundsTable::load).transpose()?;
    let planner = Allocator::new(allocator::Settings {
        scenario,
        method: options.plan_method,
        seed: options.plan_seed,
        split: options.split.value(),
        per_client_split: options.per_client_split,
        rank: match options.lora.init_adapter {
            Some(_) => Some(training.spec.rank),
            None if has_ranks => Some(training.spec.rank),
            None => options.lora.rank.value(),
        },
        rounds,
    });
    let run = Run {
        engine: options.device.engine()?,
        training,
        cut,
        initial,
        validation: valid.map(|data| data.examples),
        rounds: options.rounds,
        local_steps: options.local_steps,
        seed,
        shuffle: !no_shuffle,
        clients,
        wait: Duration::from_secs(options.wait.into()),
        deadline: options.deadline,
        quorum: options.quorum,
        aggregation,
        ranks: options.client_ranks.clone(),
        planner: Some(Box::new(planner)),
        model: model(source),
    };
    Ok(Prepared { run, local })
}

/// A scenario file, or the preset of that name.
fn scenario(path: &Path) -> anyhow::Result<Scenario> {
    let options = ScenarioOptions {
        file: path.display().to_string(),
        changes: Vec::new(),
    };
    options.read_scenario().context("--scenario")
}

/// The model as the server takes it.
pub(super) fn model(source: Source) -> server::Model {
    server::Model {
        name: source.name,
        digest: Digest(source.digest),
        architecture: source.architecture,
        weights: source.weights,
        holding: source.holding,
        tokenizer: source.tokenizer.map(|tokenizer| tokenizer.json().to_vec()),
    }
}

/// One file is divided among the clients, several are one each.
fn divide(mut files: Vec<Vec<Example>>, clients: usize) -> anyhow::Result<Vec<Vec<Example>>> {
    match files.len() {
        0 => Ok(Vec::new()),
        1 => Ok(Sharding::Strided.divide(files.swap_remove(0), clients)?),
        count if count == clients => Ok(files),
        count => bail!("--data was given {count} times for {clients} local clients; give it once, or once for each"),
    }
}
