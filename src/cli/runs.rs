//! `runs`: what was trained on this machine, what became of it, and what can be done with it.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::human::{bytes, digits, duration, shell_word, table};
use super::{console, desktop};
use crate::runs::found::{Found, State};

/// Runs on this machine: state, loss, perplexity, size; and what to do with one.
///
/// RUN is a run's name, or as much of its beginning as no other has, or the path of its directory.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sflllm runs                       # all in runs/, the latest last
  sflllm runs show mine             # one, with what to do next
  sflllm runs rm mine
  sflllm runs list --dir experiments --json")]
pub struct Options {
    #[command(subcommand)]
    pub action: Option<Action>,
    /// Where the runs are
    #[arg(long, value_name = "DIR", default_value = "runs", global = true)]
    pub dir: PathBuf,
    /// Machine-readable results on stdout
    #[arg(long, global = true)]
    pub json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// All of them; the default
    List,
    /// One of them
    Show {
        /// Its name, an unmistakable beginning of it, or its directory
        #[arg(value_name = "RUN")]
        run: String,
    },
    /// Remove one: run.json, the log, the adapter and the state
    Rm {
        /// Its name, an unmistakable beginning of it, or its directory
        #[arg(value_name = "RUN")]
        run: String,
        /// Without asking
        #[arg(long)]
        yes: bool,
    },
    /// Open the page of a server that runs, or else the adapter's folder, and print which
    Open {
        /// Its name, an unmistakable beginning of it, or its directory
        #[arg(value_name = "RUN")]
        run: String,
    },
}

/// # Errors
/// One sentence that says what to do.
pub fn run(options: Options) -> anyhow::Result<()> {
    let Options { action, dir, json } = options;
    let find = |name: &str| Found::named(&dir, name);
    match action.unwrap_or(Action::List) {
        Action::List => {
            let all = Found::all_in(&dir)?;
            if json {
                let all: Vec<Value> = all.iter().map(summary).collect();
                console::print(serde_json::to_string(&all)?)?;
            } else if all.is_empty() {
                console::print(format!(
                    "no runs in {}; `sflllm train` and `sflllm serve` put theirs there",
                    dir.display()
                ))?;
            } else {
                console::print(list(&all).trim_end())?;
            }
            Ok(())
        }
        Action::Show { run } => {
            let found = find(&run)?;
            match json {
                true => {
                    let mut summary = summary(&found);
                    summary["run"] = Value::Object(found.run);
                    console::print(summary)?;
                }
                false => console::print(show(&found).trim_end())?,
            }
            Ok(())
        }
        Action::Rm { run, yes } => remove(&find(&run)?, yes, json),
        Action::Open { run } => open(&find(&run)?, json),
    }
}

/// How the run could be gone on with.
fn resume(found: &Found) -> Option<String> {
    found
        .is_resumable()
        .then(|| format!("sflllm train --resume {}", shell_word(&found.path)))
}

/// A run for machines.
fn summary(found: &Found) -> Value {
    let figures = &found.figures;
    json!({
        "name": found.name, "path": found.path, "state": found.state.name(), "reason": found.state.reason(),
        "command": found.kind(), "model": found.model(), "steps": figures.steps, "total_steps": figures.total_steps,
        "loss": figures.loss, "perplexity": figures.perplexity, "bytes": found.bytes, "start": found.start(),
        "end": found.run.get("end"), "seconds": figures.seconds, "resume": resume(found),
    })
}

/// What is not known.
const NONE: &str = "-";

fn or_none(text: Option<String>) -> String {
    text.unwrap_or_else(|| NONE.to_owned())
}

fn steps(found: &Found) -> String {
    match (found.figures.steps, found.figures.total_steps) {
        (Some(steps), Some(total)) if total > 0 => format!("{steps}/{total}"),
        (Some(steps), _) => steps.to_string(),
        (None, _) => NONE.to_owned(),
    }
}

/// `2025-01-31 23:59`, in UTC as all times of a run.
fn started(found: &Found) -> String {
    or_none(found.start().map(|start| match (start.get(..10), start.get(11..16)) {
        (Some(day), Some(minute)) => format!("{day} {minute}"),
        _ => start.to_owned(),
    }))
}

fn list(all: &[Found]) -> String {
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|found| {
            let figures = &found.figures;
            vec![
                found.name.clone(),
                found.state.name().to_owned(),
                or_none(found.kind().map(str::to_owned)),
                or_none(found.model().map(str::to_owned)),
                steps(found),
                or_none(figures.loss.map(|loss| format!("{loss:.4}"))),
                or_none(figures.perplexity.map(|perplexity| digits(perplexity, 4))),
                bytes(found.bytes),
                started(found),
                or_none(figures.seconds.map(duration)),
            ]
        })
        .collect();
    let head = [
        "run",
        "state",
        "by",
        "model",
        "steps",
        "loss",
        "perplexity",
        "size",
        "started (UTC)",
        "took",
    ];
    let mut text = table(&head, &rows, &["state", "by", "model"]);
    for found in all {
        match &found.state {
            State::Damaged(reason) => {
                let _ = writeln!(text, "{} does not tell: {reason}", found.name);
            }
            State::Failed(reason) => {
                let _ = writeln!(text, "{} failed: {reason}", found.name);
            }
            _ => {}
        }
    }
    text
}

fn show(found: &Found) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            let _ = writeln!(text, "{name:<11} {value}");
        }
    };
    let figures = &found.figures;
    let state = match (&found.state, found.state.reason()) {
        (State::Interrupted(None), _) => "interrupted: its process ended without a word".to_owned(),
        (state, Some(reason)) => format!("{}: {reason}", state.name()),
        (state, None) => state.name().to_owned(),
    };
    let text_of = |name: &str| found.run.get(name).and_then(Value::as_str).map(str::to_owned);
    let adapter = found.path.join("adapter");
    let has_adapter = adapter.is_dir();
    line("run", Some(found.path.display().to_string()));
    line("state", Some(state));
    line("by", found.kind().map(|kind| format!("sflllm {kind}")));
    line("model", found.model().map(str::to_owned));
    line("device", text_of("device"));
    let settings = text_of("settings");
    line(
        "settings",
        settings.map(|text| text.trim_start_matches("settings ").to_owned()),
    );
    line("steps", figures.steps.map(|_| steps(found)));
    line("loss", figures.loss.map(|loss| format!("{loss:.4}")));
    line("perplexity", figures.perplexity.map(|perplexity| digits(perplexity, 4)));
    line("size", Some(bytes(found.bytes)));
    line("started", text_of("start"));
    line("ended", text_of("end"));
    line("took", figures.seconds.map(duration));
    line("adapter", has_adapter.then(|| adapter.display().to_string()));
    line("go on", resume(found));
    line(
        "try it",
        has_adapter.then(|| {
            let adapter = shell_word(&adapter);
            let model = text_of("model_source")
                .map_or_else(String::new, |model| format!(" --model {}", shell_word(model.as_ref())));
            format!("sflllm generate{model} --adapter {adapter} --prompt \"...\"")
        }),
    );
    text
}

fn remove(found: &Found, yes: bool, json: bool) -> anyhow::Result<()> {
    let shown = found.path.display();
    if let State::Running(_) = found.state {
        let who = found
            .state
            .reason()
            .map_or_else(String::new, |reason| format!(" ({reason})"));
        bail!("the run in {shown} is running{who}: end it first, with Ctrl-C where it was started");
    }
    let is_link = std::fs::symlink_metadata(&found.path).is_ok_and(|file| file.is_symlink());
    ensure!(
        !is_link,
        "{shown} is a link to a run: remove the link, or give the path that it leads to"
    );
    if !yes {
        ensure!(
            io::stdin().is_terminal(),
            "nobody is there to ask whether the run in {shown} is to be removed: say --yes"
        );
        let what = match found.figures.steps {
            Some(steps) => format!("{}, {steps} steps, {}", found.state.name(), bytes(found.bytes)),
            None => format!("{}, {}", found.state.name(), bytes(found.bytes)),
        };
        console::say(format!("Remove {shown} ({what})? It cannot be brought back. [y/N]"));
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).context("cannot read the answer")?;
        if !matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
            console::say("nothing was removed");
            return Ok(());
        }
    }
    let is_gone = found.remove()?;
    if json {
        console::print_kept(json!({ "removed": found.path, "bytes": found.bytes }))?;
        return Ok(());
    }
    console::print_kept(match is_gone {
        true => format!("removed {shown}"),
        false => format!("removed the run in {shown}; what else is in the directory was left there"),
    })?;
    Ok(())
}

fn open(found: &Found, json: bool) -> anyhow::Result<()> {
    let addresses = found.run.get("addresses").and_then(Value::as_array);
    let page = match (&found.state, addresses) {
        (State::Running(_), Some(addresses)) => {
            let urls = || addresses.iter().filter_map(Value::as_str);
            // Its certificate needs no trust here.
            urls().find(|url| url.starts_with("http://")).or_else(|| urls().next())
        }
        _ => None,
    };
    let adapter = found.path.join("adapter");
    let folder = match adapter.is_dir() {
        true => &adapter,
        false => &found.path,
    };
    let target = page.map_or_else(|| folder.display().to_string(), str::to_owned);
    match json {
        true => console::print(json!({ "name": found.name, "open": target, "page": page, "folder": folder }))?,
        false => console::print(&target)?,
    }
    if has_desktop() {
        desktop::open(&target);
    }
    Ok(())
}

/// Whether there is somebody to show a window to.
fn has_desktop() -> bool {
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    match std::env::consts::OS {
        "macos" | "windows" => true,
        _ => is_set("DISPLAY") || is_set("WAYLAND_DISPLAY"),
    }
}
