//! What this machine shows in a window: a page in the browser, a folder in its file manager.
//!
//! Separate because several commands do it, and because systems name the program for it differently.

use std::process::Stdio;

use super::console;

/// Opens an address or a path with the program that the desktop has for it. That it cannot is said.
pub fn open(target: &str) {
    let (program, arguments): (&str, &[&str]) = match std::env::consts::OS {
        "macos" => ("open", &[]),
        "windows" => ("cmd", &["/C", "start", ""]),
        _ => ("xdg-open", &[]),
    };
    let started = std::process::Command::new(program)
        .args(arguments)
        .arg(target)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if let Err(error) = started {
        console::say(format!("cannot open {target} ({program}: {error}); open it yourself"));
    }
}
