//! What `serve`, `join` and `demo` show on stderr while they run: lines, and on a terminal a bar below them.
//!
//! It is separate from `progress` because lines and bar share the terminal here, and because the number of steps is known
//! late.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar with lines above it.
#[derive(Clone)]
pub struct Console {
    bar: ProgressBar,
    quiet: bool,
}

impl Console {
    /// Without a terminal the bar is invisible; `quiet` hides it, and all but the important lines.
    pub fn new(quiet: bool) -> Self {
        let bar = if quiet {
            ProgressBar::hidden()
        } else {
            ProgressBar::no_length()
        };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        Self { bar, quiet }
    }

    /// A line that `--quiet` hides.
    pub fn line(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.important(text);
        }
    }

    /// A line that is always shown.
    pub fn important(&self, text: impl AsRef<str>) {
        self.bar.suspend(|| eprintln!("{}", text.as_ref()));
    }

    /// What is being waited for, on a terminal.
    pub fn waiting(&self, text: impl Into<String>) {
        self.bar.set_message(text.into());
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    /// `step` of `steps` are done.
    pub fn step(&self, step: u64, steps: u64, text: impl Into<String>) {
        if self.bar.length() != Some(steps) {
            let template = "{bar:30} {pos}/{len} steps  {per_sec}  {eta} left  {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.bar.set_style(style);
            }
            self.bar.disable_steady_tick();
            self.bar.set_length(steps);
            self.bar.reset_eta();
        }
        self.bar.set_position(step);
        self.bar.set_message(text.into());
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
