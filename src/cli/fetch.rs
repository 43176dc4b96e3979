//! What is shown on stderr while a model comes from the hub: a bar over its bytes on a terminal, and lines for what a person
//! should know. It is separate from `progress` because its steps are bytes, of several files, some of which come twice.

use std::io::IsTerminal;

use indicatif::{DecimalBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::console::Console;
use super::human;
use crate::hub::{Event, Hub, Name, Progress, Settings, Snapshot};

/// Files below this come and go without a word.
const SMALL: u64 = 10 << 20;

/// Finds a model in the cache or fetches it, and shows how that goes.
///
/// # Errors
/// [`crate::hub::Error`] says what to do.
pub fn fetch(name: &Name, quiet: bool) -> Result<Snapshot, crate::hub::Error> {
    let shown = Shown::new(name, quiet);
    let snapshot = Hub::new(Settings::from_environment()?).snapshot_blocking(name, &shown);
    shown.bar.finish_and_clear();
    snapshot
}

/// A model that is in the cache as a whole, without asking the hub.
pub fn cached(name: &Name) -> Option<Snapshot> {
    let mut settings = Settings::from_environment().ok()?;
    settings.offline = true;
    Hub::new(settings).snapshot_blocking(name, &|_: Event<'_>| {}).ok()
}

/// A directory with a model's `config.json`, which is all that is fetched.
///
/// # Errors
/// [`crate::hub::Error`] says what to do.
pub fn description(name: &Name, quiet: bool) -> Result<std::path::PathBuf, crate::hub::Error> {
    let shown = Shown::new(name, quiet);
    let directory = Hub::new(Settings::from_environment()?).description_blocking(name, &shown);
    shown.bar.finish_and_clear();
    directory
}

struct Shown {
    model: String,
    bar: ProgressBar,
    console: Console,
}

impl Shown {
    fn new(name: &Name, quiet: bool) -> Self {
        let target = if quiet || !std::io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let template = "{bar:30} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left  {msg}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self {
            model: name.to_string(),
            bar: ProgressBar::with_draw_target(None, target).with_style(style),
            console: Console::new(quiet),
        }
    }

    fn line(&self, text: String) {
        match self.bar.length() {
            // Nothing is drawn yet, and suspending would draw it.
            None => self.console.line(text),
            Some(_) => self.bar.suspend(|| self.console.line(text)),
        }
    }
}

impl Progress for Shown {
    fn report(&self, event: Event<'_>) {
        match event {
            Event::Fetching { files, bytes } => {
                if bytes >= SMALL {
                    let plural = if files == 1 { "" } else { "s" };
                    let bytes = DecimalBytes(bytes);
                    self.line(format!("Fetching {}: {files} file{plural}, {bytes}", self.model));
                }
                self.bar.reset();
                self.bar.set_length(bytes);
            }
            Event::File { file, present } => {
                self.bar.set_message(file.to_string());
                self.bar.inc(present);
                // What was here before says nothing of the speed.
                self.bar.reset_eta();
            }
            Event::Received { bytes } => self.bar.inc(bytes),
            Event::Dropped { file, bytes } => {
                self.bar.dec(bytes);
                if bytes >= SMALL {
                    self.line(format!(
                        "What there was of {file} cannot be used; it comes again from its beginning"
                    ));
                }
            }
            Event::Locked { file } => self.line(format!("Waiting for another process that fetches {file}")),
            Event::Retrying { reason, pause } => {
                let pause = human::duration(pause.as_secs_f64());
                self.line(format!("{reason}; trying again in {pause}"));
            }
            Event::Fetched => self.bar.finish_and_clear(),
            Event::Unasked { reason } => {
                self.line(format!("{} is taken as it lies in the cache: {reason}", self.model));
            }
        }
    }
}
