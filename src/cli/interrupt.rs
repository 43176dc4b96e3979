//! Ctrl-C for commands that compute in this thread and look at a flag between steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

/// A flag that the first Ctrl-C sets, saying `finishing` on stderr; a second one ends the process.
pub fn flag(finishing: &'static str) -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    std::thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
                return;
            };
            runtime.block_on(async {
                while tokio::signal::ctrl_c().await.is_ok() {
                    if set.swap(true, Ordering::SeqCst) {
                        std::process::exit(130);
                    }
                    eprintln!("{finishing}; Ctrl-C again ends at once");
                }
            });
        })
        .context("cannot watch for Ctrl-C")?;
    Ok(flag)
}
