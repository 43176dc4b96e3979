//! This machine: where the program keeps what outlives a run, and what it is called in its network.
//!
//! Separate because nothing here opens a connection.

use std::path::PathBuf;

use super::Error;

/// Where this program keeps what outlives a run: `SFLLLM_HOME`, else `sflllm` in the user's data directory.
///
/// # Errors
/// [`Error::NoHome`] when the environment names none.
pub fn data_directory() -> Result<PathBuf, Error> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(home) = variable("SFLLLM_HOME") {
        return Ok(home);
    }
    let data = variable("XDG_DATA_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".local/share")))
        .or_else(|| variable("LOCALAPPDATA"));
    data.map(|data| data.join("sflllm")).ok_or(Error::NoHome)
}

/// Where downloaded model parts are kept, by their content's hash.
///
/// # Errors
/// [`Error::NoHome`] when the environment names no place.
pub fn cache_directory() -> Result<PathBuf, Error> {
    Ok(data_directory()?.join("weights"))
}

/// This machine's name in its network, in lower case.
pub fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("COMPUTERNAME").ok());
    let name = name.or_else(|| {
        let output = std::process::Command::new("hostname").output().ok()?;
        String::from_utf8(output.stdout).ok()
    })?;
    let name = name.trim().to_lowercase();
    let valid = !name.is_empty()
        && name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        });
    valid.then_some(name)
}
