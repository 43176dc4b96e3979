//! The command line: see [`sflllm::cli`].

use std::process::ExitCode;

use clap::Parser;
use sflllm::cli::console::{self, Unprinted};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// What a shell says of a program that a closed pipe has ended: 128 and the number of SIGPIPE.
const PIPE_CLOSED: u8 = 141;

/// Keeps Mesa's device-selection layer from printing an error about a missing desktop session on machines without one.
#[cfg(target_os = "linux")]
fn quieten_device_selection() {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: called before any other thread exists.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}

/// Shows this program's own warnings. Those of its libraries say nothing to whoever has not read them; `SFLLLM_LOG=debug`, or
/// `SFLLLM_LOG=wgpu_core=info,sflllm=debug`, shows them to whoever looks for a fault.
fn log() {
    let asked = std::env::var("SFLLLM_LOG")
        .ok()
        .and_then(|asked| asked.parse::<Targets>().ok());
    let shown = asked.unwrap_or_else(|| Targets::new().with_target("sflllm", LevelFilter::WARN));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(console::Log::default)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .log_internal_errors(false);
    tracing_subscriber::registry().with(lines).with(shown).init();
}

/// Ends the process without the exit handlers of libraries. A compute thread may still be letting go of its device, and a driver whose
/// handlers run meanwhile crashes: 1 of 25 servers on lavapipe ended with 139 after a complete run. All that is kept is in its files.
fn leave(code: u8) -> ExitCode {
    // Nobody reads it any more if this fails.
    let _ = std::io::Write::flush(&mut std::io::stdout());
    #[cfg(unix)]
    {
        // SAFETY: it ends the process and touches nothing of it.
        unsafe { libc::_exit(code.into()) }
    }
    #[cfg(not(unix))]
    ExitCode::from(code)
}

fn main() -> ExitCode {
    #[cfg(target_os = "linux")]
    quieten_device_selection();
    std::panic::set_hook(Box::new(console::panicked));
    let cli = sflllm::cli::Cli::parse();
    log();
    let ended = cli.command.run();
    let code = match ended {
        Ok(()) => 0,
        Err(error) => match error.downcast::<clap::Error>() {
            Ok(usage) => usage.exit(),
            Err(error) if matches!(error.downcast_ref(), Some(Unprinted::ReaderGone)) => PIPE_CLOSED,
            Err(error) => {
                console::say(format!("error: {}", console::sentence(&error)));
                1
            }
        },
    };
    console::close();
    leave(code)
}
