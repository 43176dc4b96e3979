//! Where the program keeps what outlives a run.
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
