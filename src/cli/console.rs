//! Everything that a command says: results on stdout; lines, and on a terminal a bar below them, on stderr.
//!
//! Nothing else in this program writes to either (the crate's lints hold that), because what is said must never end the work it
//! is about. A reader that has gone, a full disk under a log and a terminal that is closed lose lines and nothing else. One that
//! has stopped reading, as a pager does, does not stop the work either: lines wait in a queue for a thread of their own, and
//! beyond its end they are left out and counted.

use std::collections::VecDeque;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::panic::PanicHookInfo;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Lines that wait for a reader; more are left out.
const QUEUED_LINES: usize = 1000;
/// How long the end of a command waits for a reader that takes nothing.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often a bar is drawn.
const FRAME: Duration = Duration::from_millis(100);
/// Pause before a terminal or pipe that is full for now is tried again.
const PAUSE: Duration = Duration::from_millis(10);

/// Why a result could not be written to stdout.
#[derive(Debug, thiserror::Error)]
pub enum Unprinted {
    /// As in `sflllm sweep cell --axis power | head -n 1`: no failure, and nobody is left to be told.
    #[error("the reader of stdout has gone")]
    ReaderGone,
    #[error("cannot write to stdout: {0}")]
    Failed(io::Error),
}

/// A line on stderr.
pub fn say(text: impl Into<String>) {
    TERMINAL.say(text.into());
}

/// A result on stdout, with a line's end.
///
/// # Errors
/// [`Unprinted`].
pub fn print(text: impl Display) -> Result<(), Unprinted> {
    print_part(format!("{text}\n"))
}

/// A part of a result on stdout.
///
/// # Errors
/// [`Unprinted`].
pub fn print_part(text: impl AsRef<str>) -> Result<(), Unprinted> {
    // What was said before stands before.
    TERMINAL.drain();
    let mut output = io::stdout().lock();
    write_patiently(&mut output, text.as_ref().as_bytes())
        .and_then(|()| output.flush())
        .map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Unprinted::ReaderGone,
            _ => Unprinted::Failed(error),
        })
}

/// A result of work that is kept elsewhere as well: it was done, whether or not anybody reads of it.
///
/// # Errors
/// [`Unprinted::Failed`].
pub fn print_kept(text: impl Display) -> Result<(), Unprinted> {
    match print(text) {
        Err(Unprinted::ReaderGone) => Ok(()),
        printed => printed,
    }
}

/// A file that is written again with all that is new: that it fails once is said, and only the last time counts.
#[derive(Debug, Default)]
pub struct Rewritten(Option<anyhow::Error>);

impl Rewritten {
    pub fn note(&mut self, written: anyhow::Result<()>) {
        let before = self.0.take();
        if let Err(error) = written {
            if before.is_none() {
                say(format!("{}; it is tried again with what comes next", sentence(&error)));
            }
            self.0 = Some(error);
        }
    }

    /// # Errors
    /// That of the last time.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        self.0.take().map_or(Ok(()), Err)
    }
}

/// Ends what is shown, and waits for the lines to be written. For the end of the process.
pub fn close() {
    TERMINAL.state().bar = None;
    TERMINAL.drain();
}

/// An error and its causes, each said once.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Says that this program is wrong. For `std::panic::set_hook`.
pub fn panicked(info: &PanicHookInfo<'_>) {
    if crate::data::tokenizer::is_guarded() {
        return;
    }
    let thread = std::thread::current();
    let place = info
        .location()
        .map(|place| format!(" at {}:{}", place.file(), place.line()));
    let mut text = format!(
        "internal error in {}: {}{}; please report this with the command that led to it\n",
        thread.name().unwrap_or("a thread"),
        info.payload_as_str().unwrap_or("no reason given"),
        place.unwrap_or_default(),
    );
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        text += &backtrace.to_string();
    }
    if thread.name() != Some(THREAD) {
        TERMINAL.drain();
    }
    // At once: the process may be about to end.
    let _ = write_patiently(&mut io::stderr(), text.as_bytes());
}

/// Takes the lines of the log.
#[derive(Clone, Copy, Debug, Default)]
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        say(String::from_utf8_lossy(bytes).trim_end());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a command that runs for long shows: lines that `--quiet` hides, and what is being done.
#[derive(Clone)]
pub struct Console {
    quiet: bool,
    bar: Bar,
}

impl Console {
    /// Without a terminal there is no bar; `quiet` hides it, and all but the important lines.
    pub fn new(quiet: bool) -> Self {
        Self {
            quiet,
            bar: Bar::new(Shown::default(), quiet),
        }
    }

    /// A line that `--quiet` hides.
    pub fn line(&self, text: impl Into<String>) {
        if !self.quiet {
            say(text);
        }
    }

    /// A line that is always shown.
    pub fn important(&self, text: impl Into<String>) {
        say(text);
    }

    /// What is being waited for, on a terminal.
    pub fn waiting(&self, text: impl Into<String>) {
        self.bar.set_message(text);
    }

    /// `step` of `steps` are done.
    pub fn step(&self, step: u64, steps: u64, text: impl Into<String>) {
        self.bar.change(|shown| {
            (shown.position, shown.length) = (step, Some(steps));
            shown.message = text.into();
        });
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// A bar below the lines, on a terminal. It goes with its last handle.
#[derive(Clone, Debug)]
pub struct Bar {
    shown: Arc<Mutex<Shown>>,
}

/// What a bar is to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shown {
    /// Of what there are `length`.
    what: &'static str,
    bytes: bool,
    /// How often the speed was counted from the start.
    starts: u32,
    position: u64,
    length: Option<u64>,
    message: String,
}

impl Shown {
    fn is_nothing(&self) -> bool {
        self.length.is_none() && self.message.is_empty()
    }
}

impl Bar {
    /// Over `length` of `what`.
    pub fn over(length: u64, what: &'static str, quiet: bool) -> Self {
        let shown = Shown {
            what,
            length: Some(length),
            ..Shown::default()
        };
        Self::new(shown, quiet)
    }

    /// Over bytes, of which it is said later how many there are.
    pub fn of_bytes(quiet: bool) -> Self {
        let shown = Shown {
            bytes: true,
            ..Shown::default()
        };
        Self::new(shown, quiet)
    }

    fn new(shown: Shown, quiet: bool) -> Self {
        let bar = Self {
            shown: Arc::new(Mutex::new(shown)),
        };
        if !quiet && io::stderr().is_terminal() {
            TERMINAL.state().bar = Some(Arc::downgrade(&bar.shown));
            TERMINAL.state.1.notify_all();
        }
        bar
    }

    /// The terminal's thread looks at it from time to time; nobody waits for it.
    fn change(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown());
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn inc(&self, count: u64) {
        self.change(|shown| shown.position += count);
    }

    pub fn dec(&self, count: u64) {
        self.change(|shown| shown.position = shown.position.saturating_sub(count));
    }

    /// Back to the start of something whose length is not known yet.
    pub fn reset(&self) {
        self.change(|shown| {
            (shown.position, shown.length) = (0, None);
            shown.starts += 1;
        });
    }

    /// The speed is counted from here on.
    pub fn reset_eta(&self) {
        self.change(|shown| shown.starts += 1);
    }

    pub fn set_message(&self, text: impl Into<String>) {
        self.change(|shown| shown.message = text.into());
    }

    pub fn set_length(&self, length: u64) {
        self.change(|shown| shown.length = Some(length));
    }

    pub fn length(&self) -> Option<u64> {
        self.shown().length
    }

    /// Removes it.
    pub fn finish_and_clear(&self) {
        let mut state = TERMINAL.state();
        if state
            .bar
            .as_ref()
            .is_some_and(|bar| bar.as_ptr() == Arc::as_ptr(&self.shown))
        {
            state.bar = None;
            drop(state);
            TERMINAL.drain();
        }
    }
}

static TERMINAL: LazyLock<Terminal> = LazyLock::new(Terminal::start);
const THREAD: &str = "console";

/// The queue of lines, and the thread that writes them to stderr.
struct Terminal {
    state: Arc<(Mutex<State>, Condvar)>,
    /// Without it, lines are written where they are said.
    threaded: bool,
}

#[derive(Default)]
struct State {
    lines: VecDeque<String>,
    /// Lines that found the queue full.
    left_out: usize,
    bar: Option<Weak<Mutex<Shown>>>,
    /// Whether the thread is about to write what it has taken.
    writing: bool,
    /// Whether a bar stands on the terminal.
    drawn: bool,
    /// Counts what was written.
    turns: u64,
    /// The count at which it was waited in vain.
    stuck: Option<u64>,
}

impl State {
    fn bar(&self) -> Option<Arc<Mutex<Shown>>> {
        self.bar.as_ref().and_then(Weak::upgrade)
    }

    fn is_settled(&self) -> bool {
        self.lines.is_empty() && self.left_out == 0 && !self.writing && (self.bar().is_some() || !self.drawn)
    }
}

impl Terminal {
    fn start() -> Self {
        let state = Arc::<(Mutex<State>, Condvar)>::default();
        let shared = state.clone();
        let threaded = std::thread::Builder::new()
            .name(THREAD.to_owned())
            .spawn(move || write_lines(&shared))
            .is_ok();
        Self { state, threaded }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state.0)
    }

    fn say(&self, text: String) {
        if !self.threaded {
            // There is nowhere else to say that this failed.
            let _ = write_patiently(&mut io::stderr(), format!("{text}\n").as_bytes());
            return;
        }
        let mut state = self.state();
        match state.lines.len() < QUEUED_LINES && state.left_out == 0 {
            true => state.lines.push_back(text),
            false => state.left_out += 1,
        }
        self.state.1.notify_all();
    }

    /// Waits until everything is written, unless nobody reads.
    fn drain(&self) {
        if !self.threaded {
            return;
        }
        let mut state = self.state();
        let (mut turns, mut since) = (state.turns, Instant::now());
        while !state.is_settled() && state.stuck != Some(state.turns) {
            if state.turns != turns {
                (turns, since) = (state.turns, Instant::now());
            }
            let left = PATIENCE.saturating_sub(since.elapsed());
            if left.is_zero() {
                state.stuck = Some(turns);
                return;
            }
            self.state.1.notify_all();
            let waited = self.state.1.wait_timeout(state, left.min(FRAME));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The terminal's thread.
fn write_lines((state, changed): &(Mutex<State>, Condvar)) {
    let mut drawing: Option<Drawing> = None;
    loop {
        let (lines, bar) = {
            let mut now = lock(state);
            // Until there are lines, a bar is to be removed, or it is time to draw one again.
            let mut is_time = false;
            while now.lines.is_empty() && now.left_out == 0 && !is_time {
                if now.bar().is_some() {
                    let waited = changed.wait_timeout(now, FRAME);
                    let waited = waited.unwrap_or_else(PoisonError::into_inner);
                    (now, is_time) = (waited.0, waited.1.timed_out());
                } else if drawing.is_some() {
                    break;
                } else {
                    now = changed.wait(now).unwrap_or_else(PoisonError::into_inner);
                }
            }
            now.writing = true;
            let mut lines = Vec::from(std::mem::take(&mut now.lines));
            match std::mem::take(&mut now.left_out) {
                0 => {}
                count => lines.push(format!("({count} lines are left out here: nobody was reading)")),
            }
            (lines, now.bar())
        };
        if bar.is_none()
            && let Some(drawing) = drawing.take()
        {
            drawing.bar.finish_and_clear();
        }
        for line in lines {
            let write = || {
                // Whoever could be told that it failed is whoever does not read.
                let _ = write_patiently(&mut io::stderr(), format!("{line}\n").as_bytes());
            };
            match &drawing {
                Some(drawing) => drawing.bar.suspend(write),
                None => write(),
            }
            lock(state).turns += 1;
        }
        if let Some(bar) = bar {
            draw(&mut drawing, &bar);
        }
        let mut now = lock(state);
        (now.writing, now.drawn) = (false, drawing.is_some());
        now.turns += 1;
        changed.notify_all();
    }
}

/// A bar on the terminal, and what it shows.
struct Drawing {
    bar: ProgressBar,
    shown: Shown,
}

fn draw(drawing: &mut Option<Drawing>, shown: &Mutex<Shown>) {
    let shown = shown.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if shown.is_nothing() {
        return;
    }
    let Drawing { bar, shown: before } = drawing.get_or_insert_with(|| Drawing {
        bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()),
        shown: Shown::default(),
    });
    let look = |shown: &Shown| (shown.length.is_some(), shown.bytes, shown.what);
    if before.is_nothing() || look(before) != look(&shown) {
        let template = match look(&shown) {
            (false, ..) => "{spinner} {msg}",
            (true, true, _) => {
                "{bar:30} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left  {msg}"
            }
            (true, false, "") => "{bar:30} {pos}/{len} steps  {per_sec}  {eta} left  {msg}",
            (true, false, _) => "{prefix} {bar:30} {pos}/{len}  {per_sec}  {eta} left  {msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(shown.what);
        bar.reset_eta();
    }
    if let Some(length) = shown.length.filter(|_| before.length != shown.length) {
        bar.set_length(length);
    }
    if before.position != shown.position {
        bar.set_position(shown.position);
    }
    if before.starts != shown.starts {
        bar.reset_eta();
    }
    if before.message != shown.message {
        bar.set_message(shown.message.clone());
    }
    bar.tick();
    *before = shown;
}

/// Writes all of it; to a terminal or pipe that another process made non-blocking as to any other.
fn write_patiently(output: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match output.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Full for now, and std has no way to be told when that changes.
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn causes_that_their_effect_has_said_are_not_said_again() {
        let inner = || io::Error::new(io::ErrorKind::NotFound, "no such file");
        let told = anyhow::Error::from(inner()).context("cannot read x: no such file");
        assert_eq!(sentence(&told), "cannot read x: no such file");
        let untold = anyhow::Error::from(inner()).context("cannot read x");
        assert_eq!(sentence(&untold), "cannot read x: no such file");
        let three = Err::<(), _>(untold).context("--data").unwrap_err();
        assert_eq!(sentence(&three), "--data: cannot read x: no such file");
    }

    /// A pipe that takes three bytes at a time, and nothing every second time.
    struct Slow(Vec<u8>, bool);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let taken = bytes.len().min(3);
            self.0.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_pipe_that_is_full_for_now_gets_everything_in_the_end() {
        let mut slow = Slow(Vec::new(), false);
        write_patiently(&mut slow, b"the whole line\n").unwrap();
        assert_eq!(slow.0, b"the whole line\n");
    }
}
