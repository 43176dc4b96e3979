//! Requests to end: Ctrl-C, the request to terminate, and the terminal that closes. Work is finished and saved at the first,
//! and given up at the second.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use tokio::sync::watch;

use super::console;

/// Whether this command was asked to end.
#[derive(Clone, Debug)]
pub struct Interrupt {
    flag: Arc<AtomicBool>,
    asked: watch::Receiver<bool>,
}

impl Interrupt {
    /// For those who look between two pieces of work.
    pub fn flag(&self) -> &AtomicBool {
        &self.flag
    }

    pub fn is_set(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }

    /// For those who wait.
    pub async fn wait(&mut self) {
        if self.asked.wait_for(|asked| *asked).await.is_err() {
            // The thread that watches never ends.
            std::future::pending::<()>().await;
        }
    }
}

/// From here on the first request to end says `finishing` on stderr and is left to the command; the second ends the process.
///
/// A terminal that closes is no request for a command that was started to outlive it, with `nohup`.
///
/// # Errors
/// When the operating system refuses.
pub fn watch(finishing: &'static str) -> anyhow::Result<Interrupt> {
    let flag = Arc::new(AtomicBool::new(false));
    let (sender, asked) = watch::channel(false);
    let set = flag.clone();
    let watcher = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = watcher.context("cannot watch for Ctrl-C")?;
    let mut requests = {
        let _inside = runtime.enter();
        Requests::listen().context("cannot watch for Ctrl-C")?
    };
    std::thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                loop {
                    let status = requests.next().await;
                    if set.swap(true, Ordering::SeqCst) {
                        std::process::exit(status);
                    }
                    console::say(format!("{finishing}; Ctrl-C again ends at once"));
                    // The command may have nobody who waits.
                    let _ = sender.send(true);
                }
            });
        })
        .context("cannot watch for Ctrl-C")?;
    Ok(Interrupt { flag, asked })
}

#[cfg(unix)]
struct Requests {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    /// `None` where it is ignored.
    hang_up: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Requests {
    fn listen() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: match is_ignored(libc::SIGHUP) {
                true => None,
                false => Some(signal(SignalKind::hangup())?),
            },
        })
    }

    /// Waits; the status of a process that such a signal ends.
    async fn next(&mut self) -> i32 {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => 128 + libc::SIGINT,
            _ = self.terminate.recv() => 128 + libc::SIGTERM,
            _ = hang_up => 128 + libc::SIGHUP,
        }
    }
}

/// Whether this process was started with the signal ignored.
#[cfg(unix)]
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: with a null second argument the call changes nothing, and it fills in the third, which is zeroed before so
    // that it is a valid value even if the call fails.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

#[cfg(not(unix))]
struct Requests;

#[cfg(not(unix))]
impl Requests {
    fn listen() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> i32 {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        130
    }
}
