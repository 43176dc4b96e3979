//! `sflllm join`: a native edge client.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;

use super::console::{self, Console};
use super::human::{self, bytes};
use super::interrupt;
use super::options::{DeviceOptions, OutputOptions, ReadingOptions};
use super::secret::TOKEN;
use crate::client::native::{self, Awaited, Found, Keep, Report, Settings, Source, StateDirectory};
use crate::disk::Claim;
use crate::machine;
use crate::model::peft::{CONFIG_FILE, TENSOR_FILE};
use crate::protocol::{Endpoint, FinishReason};
use crate::transport::{self, Dialer, JoinLink, Trust};

/// Take part in a run as an edge client: data stays here, activations go to the server.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm join 'https://192.168.1.20:8443/?join=1#t=k7wd-m2pq-9xhc-4vtn' --data my_text.txt
  sflllm join http://127.0.0.1:8080 --token k7wd-m2pq-9xhc-4vtn --data my_text.txt --state client-1 --give-up 2d

The same command again goes on in the run where it was left: after Ctrl-C, a crash, a reboot, as the same client with its
optimiser's state. Ctrl-C once finishes what is being computed and leaves; twice ends at once.

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
    /// Directory for what it takes to go on in the run later (default: one for this server, name and data below SFLLLM_HOME, or in
    /// the user's data directory)
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Join as somebody new: forget what was kept of an earlier run there
    #[arg(long)]
    pub fresh: bool,
    /// How long to try again when the server cannot be reached, such as 90s, 45min, 12h or 2d
    #[arg(long, value_name = "TIME", default_value = "12h")]
    pub give_up: GiveUp,
    #[command(flatten)]
    pub reading: ReadingOptions,
    #[command(flatten)]
    pub device: DeviceOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// How long a server that cannot be reached is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GiveUp(Duration);

impl FromStr for GiveUp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const LONGEST: f64 = 366.0 * 86_400.0;
        let text = text.trim();
        let unit_at = text
            .find(|letter: char| !letter.is_ascii_digit() && letter != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let seconds = match unit.trim() {
            "s" | "" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => f64::NAN,
        };
        let length = number.parse::<f64>().map_or(f64::NAN, |number| number * seconds);
        if (0.0..=LONGEST).contains(&length) {
            Ok(Self(Duration::from_secs_f64(length)))
        } else {
            Err("it is no length of time of at most a year; write it like 90s, 45min, 12h or 2d".to_owned())
        }
    }
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
    let name = options
        .name
        .clone()
        .or_else(machine::host_name)
        .unwrap_or_else(|| "native client".to_owned());
    let keep = keep(&options, &name, &console)?;
    let kept = keep.as_ref().map(|keep| keep.directory.path().to_owned());
    let mut interrupt = interrupt::watch("leaving")?;
    let engine = options.device.engine()?;
    console.line(format!("joining {} with {}", options.url.origin, engine.name()));
    let settings = Settings {
        server: options.url.origin.clone(),
        token,
        dialer: Dialer::new(&trust)?.toward(&options.url)?,
        name,
        engine,
        source: Source::File {
            path: options.data,
            skip_bad_lines: options.reading.skip_bad_lines,
            chat_template: options.reading.chat_template()?,
            columns: options.reading.columns.unwrap_or_default(),
        },
        cache: transport::cache_directory()?,
        adapter_out: options.adapter_out.clone(),
        give_up: options.give_up.0,
        keep,
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
        FinishReason::Stopped { detail } => format!("the server ended the run: {detail}"),
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
    if let (FinishReason::Left, Some(kept)) = (&summary.reason, kept) {
        let kept = human::shell_word(&kept);
        console.important(format!(
            "to go on as the same client, give the same command again: its state is in {kept}"
        ));
    }
    Ok(printed?)
}

/// Where this client keeps what it takes to come back, and what was there.
fn keep(options: &Options, name: &str, console: &Console) -> anyhow::Result<Option<Keep>> {
    let directory = match &options.state {
        Some(path) => StateDirectory::open(path)?,
        None => {
            let clients = transport::data_directory()?.join("clients");
            let server = options.url.origin.to_string();
            match StateDirectory::of_client(&clients, &server, name, &options.data) {
                Ok(directory) => directory,
                Err(error) => {
                    console.important(format!("{error}; going on without keeping anything to come back with"));
                    return Ok(None);
                }
            }
        }
    };
    if options.fresh {
        directory.forget();
    }
    let resume = match directory.load()? {
        Found::Nothing => None,
        Found::State(state) => {
            let place = human::shell_word(directory.path());
            let client = state.passport.client;
            console.line(format!(
                "going on as {client}, by what is in {place}; --fresh forgets it"
            ));
            Some(*state)
        }
        Found::Damaged { aside, reason } => {
            console.important(format!(
                "what this client had kept cannot be used ({reason}), and is now called {}; joining as somebody new",
                human::shell_word(&aside)
            ));
            None
        }
    };
    Ok(Some(Keep { directory, resume }))
}

/// A time that passes, in whole seconds.
fn passing(time: Duration) -> String {
    let seconds = time.as_secs_f64().ceil().max(1.0);
    match seconds < 120.0 {
        true => format!("{seconds:.0} s"),
        false => human::duration(seconds),
    }
}

/// What is being waited for, and until when.
fn waiting(what: Awaited, reason: Option<&str>, again_in: Duration, passed: Duration) -> String {
    let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
    let what = match what {
        Awaited::Return => {
            return format!("the server is away{reason}; back in touch in {}", passing(again_in));
        }
        Awaited::Server(Endpoint::Main) => "server not reachable",
        Awaited::Server(Endpoint::Federated) => "federated server not reachable",
        Awaited::Weights => "the model cannot be fetched",
    };
    let since = if passed < Duration::from_secs(1) {
        String::new()
    } else {
        format!(" (since {})", passing(passed))
    };
    format!("{what}{reason}, trying again in {}{since}", passing(again_in))
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
            Report::Admitted { client, again: true } => console.line(format!("back in the run as {client}")),
            Report::Admitted { client, again: false } => console.line(format!("in the run as {client}")),
            Report::OtherRun => console.important("the server has another run by now: joining that"),
            Report::Unknown => console.important("the server does not know this client any more"),
            Report::OtherData => console.important("the data is not what it was: it begins at its first example again"),
            Report::Waiting {
                what,
                reason,
                first,
                again_in,
                passed,
            } => {
                if *first {
                    console.line(waiting(*what, reason.as_deref(), *again_in, *passed));
                }
                console.waiting(waiting(*what, None, *again_in, *passed));
            }
            Report::Assigned { .. } => {}
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
                summary, blocks, steps, ..
            } => {
                if let Some(data) = summary {
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
            Report::Unsaved { detail } => console.important(format!("{detail}; going on without, and trying again")),
            Report::Saved => console.line("what this client keeps is saved again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_read_with_their_units() {
        let read = |text: &str| text.parse::<GiveUp>().map(|GiveUp(length)| length.as_secs());
        for (text, seconds) in [
            ("90", 90),
            ("90s", 90),
            ("1.5min", 90),
            ("12h", 43_200),
            (" 2 d ", 172_800),
            ("0s", 0),
        ] {
            assert_eq!(read(text), Ok(seconds), "{text}");
        }
        for bad in ["", "soon", "-1s", "12 hours", "1e9d", "400d", "h"] {
            let error = read(bad).unwrap_err();
            assert!(error.contains("12h"), "{bad}: {error}");
        }
    }

    #[test]
    fn who_waits_is_told_for_what_and_how_long() {
        let seconds = Duration::from_secs;
        let server = Awaited::Server(Endpoint::Main);
        assert_eq!(
            waiting(server, None, seconds(12), seconds(180)),
            "server not reachable, trying again in 12 s (since 3 min 0 s)"
        );
        assert_eq!(
            waiting(
                Awaited::Weights,
                Some("it broke"),
                Duration::from_millis(500),
                Duration::ZERO
            ),
            "the model cannot be fetched (it broke), trying again in 1 s"
        );
        assert_eq!(
            waiting(Awaited::Return, Some("new disk"), seconds(9000), Duration::ZERO),
            "the server is away (new disk); back in touch in 2 h 30 min"
        );
    }
}
