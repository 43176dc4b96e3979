//! What a served run tells people: where it is, what happens, and what it has come to.
//!
//! Separate because nothing here decides anything.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::bail;
use serde_json::json;

use super::super::console::{self, Console};
use super::super::human::bytes;
use super::super::options::OutputOptions;
use super::super::secret::CONTROL_KEY;
use crate::server::listen::{join_link, link_fragment, qr_code};
use crate::server::metrics::RoundRecord;
use crate::server::{Ending, Report, Server, Summary};
use crate::terms::aggregation::Aggregation;
use crate::transport::Fingerprint;

pub fn join_page(url: &str, token: Option<&str>, fingerprint: Option<Fingerprint>) -> String {
    match link_fragment(token, fingerprint).as_str() {
        "" => url.to_owned(),
        fragment => format!("{url}/{fragment}"),
    }
}

/// Says where the server is and how to join it.
pub fn announce(server: &Server, console: &Console, token: Option<&str>, control_key: Option<&str>) {
    let pin = |url: &str| server.fingerprint().filter(|_| url.starts_with("https://"));
    for address in server.addresses() {
        console.line(format!("listening on {}", address.url));
    }
    if let Some(file) = server.certificate_file() {
        console.line(format!("certificate: {} (for --ca on other machines)", file.display()));
    }
    if let Some(token) = token {
        console.line(format!("join token: {token}"));
    }
    if let Some(key) = control_key {
        for address in server.addresses() {
            let url = address.network_urls.first().unwrap_or(&address.local_url);
            let page = join_page(url, None, pin(url));
            console.line(format!("for the main server: --federated-url '{page}'"));
        }
        console.line(format!(
            "control key: {key} (for the main server's {})",
            CONTROL_KEY.option
        ));
        return;
    }
    for address in server
        .addresses()
        .iter()
        .filter(|address| address.network_urls.is_empty())
    {
        let url = &address.local_url;
        console.line(format!("on this machine: {}", join_page(url, token, pin(url))));
    }
    let network: Vec<&String> = server
        .addresses()
        .iter()
        .flat_map(|address| &address.network_urls)
        .collect();
    for (position, url) in network.iter().enumerate() {
        let link = join_link(url, token, pin(url));
        console.line(format!("on the network: {link}"));
        if position == 0
            && std::io::IsTerminal::is_terminal(&std::io::stderr())
            && let Some(code) = qr_code(&link)
        {
            console.line(code);
        }
    }
}

pub fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Says how the run ended.
pub fn conclude(summary: &Summary, adapter: Option<&Path>, output: &OutputOptions) -> anyhow::Result<()> {
    let printed = if output.json {
        let line = json!({
            "rounds": summary.rounds, "steps": summary.steps, "tokens": summary.tokens, "seconds": summary.seconds,
            "bytes_up": summary.bytes_up, "bytes_down": summary.bytes_down,
            "first_valid_perplexity": summary.baseline.map(|evaluation| evaluation.perplexity),
            "last_valid_perplexity": summary.last.map(|evaluation| evaluation.perplexity),
            "adapter": adapter, "completed": summary.ending == Ending::Completed,
        });
        console::print_kept(line)
    } else {
        Ok(())
    };
    let saved = adapter
        .map(|adapter| format!("; adapter in {}", adapter.display()))
        .unwrap_or_default();
    let text = format!(
        "{} rounds, {} steps in {:.1} s, {} received, {} sent{saved}",
        summary.rounds,
        summary.steps,
        summary.seconds,
        bytes(summary.bytes_up),
        bytes(summary.bytes_down)
    );
    match &summary.ending {
        Ending::Completed => console::say(format!("the run is complete: {text}")),
        Ending::RunClosed => console::say(format!(
            "the main server ended the run: {} rounds averaged",
            summary.rounds
        )),
        Ending::Stopped(_) => console::say(format!("stopped: {text}")),
        Ending::Diverged(reason) => bail!("{reason}; {text}"),
        Ending::NoClients => bail!("all clients left and none came back in time; {text}"),
    }
    Ok(printed?)
}

/// What plain averaging misses of the mean change, and what the round's own way does.
fn missed(round: &RoundRecord) -> String {
    let (Some(averaging), Some(start), Some(aggregation)) =
        (round.averaging_error, round.start_error, round.aggregation)
    else {
        return String::new();
    };
    let percent = |error: f64| format!("{:.2} %", 100.0 * error);
    let own = match aggregation {
        Aggregation::Mean | Aggregation::Ffa => String::new(),
        Aggregation::Trimmed | Aggregation::Median | Aggregation::Flora => {
            format!(
                ", {aggregation} {}{}",
                percent(start),
                if aggregation == Aggregation::Flora {
                    " at the clients"
                } else {
                    ""
                }
            )
        }
        Aggregation::Fedex => String::from(", fedex none in what is saved"),
    };
    format!(", averaging error {}{own}", percent(averaging))
}

/// A run on the terminal, as it goes on.
pub struct Shown {
    pub console: Console,
    /// All that there will be.
    pub steps: u64,
    /// Cut and rank of the last plan that was shown.
    pub plan: Mutex<String>,
}

impl Shown {
    pub fn report(&self, report: Report) {
        let console = &self.console;
        match report {
            Report::Joined { client, name, device } => {
                let device = if device.is_empty() {
                    device
                } else {
                    format!(", {device}")
                };
                console.line(format!("client {client} ({name}{device}) joined"));
            }
            Report::Left { client, name, reason } => {
                let name = if name.is_empty() { name } else { format!(" ({name})") };
                console.line(format!("client {client}{name} is gone: {reason}"));
            }
            Report::Refused { address, reason } => console.line(format!("refused {address}: {reason}")),
            Report::RefusedMore { count, reasons } => {
                let reasons: Vec<String> = (reasons.iter())
                    .map(|(reason, count)| format!("{count} times: {reason}"))
                    .collect();
                console.line(format!(
                    "refused {count} more in the last minute; {}",
                    reasons.join("; ")
                ));
            }
            Report::Baseline(evaluation) => console.line(format!(
                "before training: validation loss {:.4}, perplexity {:.3}",
                evaluation.loss, evaluation.perplexity
            )),
            Report::Resumed { round, awaited } => {
                let awaited = match awaited {
                    0 => String::new(),
                    count => format!("; waiting for {count} client{} to come back", plural(count)),
                };
                console.line(format!("the run goes on at the beginning of round {round}{awaited}"));
            }
            Report::RoundStarted { round, members } => {
                console.waiting(format!("round {round} with {members} client{}", plural(members)));
            }
            Report::RoundLost { round } => console.line(format!(
                "round {round} has lost its clients, or more than --quorum allows: it is begun again"
            )),
            Report::RoundRejected { round, reason } => {
                console.important(format!("round {round} cannot be used and is begun again: {reason}"));
            }
            Report::Step(step) => {
                let partial = match step.excluded.len() {
                    0 => String::new(),
                    count => format!(", without {count}"),
                };
                console.step(
                    u64::from(step.step),
                    self.steps,
                    format!(
                        "round {}  loss {:.3}  {} client{}{partial}",
                        step.round,
                        step.loss,
                        step.clients,
                        plural(step.clients)
                    ),
                );
            }
            Report::Planned {
                round,
                cut,
                cuts,
                rank,
                reason,
            } => {
                let deepest = cuts.values().copied().max().unwrap_or(cut);
                let text = match deepest == cut {
                    true => format!("cut after {cut} block{}", plural(cut)),
                    false => format!("clients' own cuts, after {cut} to {deepest} blocks"),
                };
                let plan = format!("{text}, rank {rank}");
                let mut shown = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
                if *shown != plan {
                    console.line(format!("plan from round {round}: {plan}; {reason}"));
                    *shown = plan;
                }
            }
            Report::Round(round) => {
                let validation = match (round.valid_loss, round.valid_perplexity) {
                    (Some(loss), Some(perplexity)) => {
                        format!(", validation loss {loss:.4}, perplexity {perplexity:.3}")
                    }
                    _ => String::new(),
                };
                let predicted = round
                    .predicted_s
                    .map(|predicted| format!(" ({predicted:.1} s predicted)"))
                    .unwrap_or_default();
                let partial = match round.excluded.len() {
                    0 => String::new(),
                    count => format!(", without {count}"),
                };
                let missed = missed(&round);
                console.line(format!(
                    "round {}: {} adapter{} averaged in {:.1} s{predicted}{partial}{missed}{validation}",
                    round.round,
                    round.adapters,
                    plural(round.adapters),
                    round.measured_s
                ));
            }
            Report::Waiting { limit } => {
                console.important(format!(
                    "no clients left; waiting {:.0} s for one to return",
                    limit.as_secs_f64()
                ));
            }
            Report::Link {
                connected: true,
                detail,
            } => console.line(format!("linked with {detail}")),
            Report::Link {
                connected: false,
                detail,
            } => console.important(detail),
            Report::Averaged { round, adapters } => {
                console.line(format!("round {round}: {adapters} adapters averaged"));
            }
            Report::Trouble { detail } => console.important(detail),
        }
    }
}
