//! `sflllm join`: a native edge client.

use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::Context;
use tokio::sync::watch;

use super::console::{self, Console};
use super::human::bytes;
use super::interrupt;
use super::options::{DeviceOptions, OutputOptions, ReadingOptions};
use super::secret::TOKEN;
use crate::client::native::{self, Report, Settings, Source};
use crate::disk::Claim;
use crate::machine;
use crate::model::peft::{CONFIG_FILE, TENSOR_FILE};
use crate::protocol::FinishReason;
use crate::transport::{self, Dialer, JoinLink, Trust};

/// Take part in a run as an edge client: data stays here, activations go to the server.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  sflllm join 'https://192.168.1.20:8443/?join=1#t=k7wd-m2pq-9xhc-4vtn' --data my_text.txt

The server prints the link, which says (after &f=) which certificate is the server's. With a link cut short of that, copy the
certificate file that the server names to this machine and give it with --ca FILE, or accept any certificate with --insecure-tls on
a network you trust.

SFLLLM_TOKEN is taken for the join token where neither an option nor the link has one.")]
pub struct Options {
    /// The server's address or join link, such as https://192.168.1.20:8443
    pub url: JoinLink,
    /// The data: JSON lines or a JSON list, CSV, `meaning||reference` lines, or plain text
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Join token, unless the link has it after #t=
    #[arg(long, value_name = "TOKEN")]
    pub token: Option<String>,
    /// File that holds the join token, which stays out of the machine's list of processes
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    pub token_file: Option<PathBuf>,
    /// Accept any server certificate: encrypted, but an attacker on the network could pose as the server
    #[arg(long, conflicts_with = "ca")]
    pub insecure_tls: bool,
    /// PEM file with the server's certificate, or with that of its authority
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Name shown to the server (default: this machine's name)
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Save the client's side of the averaged adapter here, in PEFT's form, after every round
    #[arg(long, value_name = "DIR")]
    pub adapter_out: Option<PathBuf>,
    #[command(flatten)]
    pub reading: ReadingOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// # Errors
/// One sentence that says what to do.
pub fn run(options: Options) -> anyhow::Result<()> {
    // Found out now, rather than after the model has been fetched.
    std::fs::metadata(&options.data).with_context(|| format!("cannot read {}", options.data.display()))?;
    let trust = match (&options.ca, options.insecure_tls) {
        (Some(file), _) => Trust::Authority(file.clone()),
        (None, true) => Trust::Anyone,
        (None, false) => Trust::Known,
    };
    let token = TOKEN.read(
        options.token.as_deref(),
        options.token_file.as_deref(),
        options.url.token.as_deref(),
    )?;
    // For as long as the adapter is written there.
    let _claim = (options.adapter_out.as_deref())
        .map(|dir| Claim::directory(dir, "--adapter-out", "an adapter", &[CONFIG_FILE, TENSOR_FILE]))
        .transpose()?;
    let console = Console::new(options.output.quiet);
    let mut interrupt = interrupt::watch("leaving")?;
    let engine = options.device.engine()?;
    console.line(format!("joining {} with {}", options.url.origin, engine.name()));
    let settings = Settings {
        server: options.url.origin.clone(),
        token,
        dialer: Dialer::new(&trust)?.toward(&options.url)?,
        name: options
            .name
            .or_else(machine::host_name)
            .unwrap_or_else(|| "native client".to_owned()),
        engine,
        source: Source::File {
            path: options.data,
            skip_bad_lines: options.reading.skip_bad_lines,
            chat_template: options.reading.chat_template()?,
            columns: options.reading.columns.unwrap_or_default(),
        },
        cache: transport::cache_directory()?,
        adapter_out: options.adapter_out.clone(),
    };
    console.waiting("connecting");
    let runtime = super::serve::runtime()?;
    let summary = runtime.block_on(async {
        let (stop_sender, stop) = watch::channel(false);
        tokio::spawn(async move {
            interrupt.wait().await;
            // The client may be done already.
            let _ = stop_sender.send(true);
        });
        let shown = Shown {
            console: console.clone(),
            fetching: Mutex::new(String::new()),
        };
        native::join(settings, stop, move |report| shown.report(&report)).await
    });
    console.finish();
    let summary = summary?;
    let printed = if options.output.json {
        let line = serde_json::json!({
            "steps": summary.steps, "tokens": summary.tokens, "seconds": summary.seconds,
            "bytes_up": summary.bytes_up, "bytes_down": summary.bytes_down,
            "completed": summary.reason == FinishReason::Completed,
        });
        console::print_kept(line)
    } else {
        Ok(())
    };
    let ending = match &summary.reason {
        FinishReason::Completed => "the run is complete".to_owned(),
        FinishReason::Left => "left the run".to_owned(),
        FinishReason::Stopped {
            detail,
            return_after: None,
        } => format!("the server ended the run: {detail}"),
        FinishReason::Stopped {
            detail,
            return_after: Some(after),
        } => {
            format!("the server ended the run: {detail}; come back in {} s", after.as_secs())
        }
    };
    console.important(format!(
        "{ending}: {} steps in {:.1} s, {} sent, {} received{}",
        summary.steps,
        summary.seconds,
        bytes(summary.bytes_up),
        bytes(summary.bytes_down),
        options
            .adapter_out
            .map(|directory| format!("; adapter in {}", directory.display()))
            .unwrap_or_default(),
    ));
    Ok(printed?)
}

struct Shown {
    console: Console,
    /// The part of the model that is being fetched.
    fetching: Mutex<String>,
}

impl Shown {
    fn report(&self, report: &Report) {
        let console = &self.console;
        match report {
            Report::Connected => console.waiting("connected; waiting for the assignment"),
            Report::ConnectionLost { reason, .. } => console.line(match reason {
                Some(reason) => format!("connection lost ({reason}); trying again"),
                None => "connection lost; trying again".to_owned(),
            }),
            Report::Fetching {
                name,
                done,
                bytes: total,
            } => {
                console.waiting(format!("fetching {name}: {} of {}", bytes(*done), bytes(*total)));
                let mut fetching = self.fetching.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if *fetching != *name {
                    console.line(format!("fetching {name} ({})", bytes(*total)));
                    fetching.clone_from(name);
                }
            }
            Report::Loaded {
                data, blocks, steps, ..
            } => {
                if let Some(data) = data {
                    console.line(format!("data: {data}"));
                }
                console.line(format!("loaded the embedding and {blocks} blocks; {steps} steps to go"));
                console.waiting("waiting for the next round");
            }
            Report::RoundStarted { round, rounds, members } => {
                console.line(format!("round {round} of {rounds} with {members} clients"));
            }
            Report::Step {
                step,
                steps,
                loss,
                mean_loss,
                ..
            } => console.step(
                u64::from(*step),
                u64::from(*steps),
                format!("loss {loss:.3} (all clients {mean_loss:.3})"),
            ),
            Report::Round(result) => console.line(match result.valid_loss {
                Some(loss) => format!(
                    "round {} of {} done: validation loss {loss:.4}, perplexity {:.3}",
                    result.round + 1,
                    result.rounds,
                    loss.exp()
                ),
                None => format!("round {} of {} done", result.round + 1, result.rounds),
            }),
            Report::Unsaved { detail } => console.important(format!("{detail}; it is tried again with every round")),
        }
    }
}
