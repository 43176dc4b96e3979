//! Where Chromium and its driver are on this machine. `tests/real/browser.rs` includes this file by its path, so that what
//! the set-up looks for is what the test runs.

use std::env;
use std::path::{Path, PathBuf};

/// The programs a browser test needs.
pub struct Browser {
    pub chromium: PathBuf,
    pub driver: PathBuf,
}

/// Finds both, or names the ones that are missing. `CHROMIUM` and `CHROMEDRIVER` name them outright.
pub fn find() -> Result<Browser, Vec<&'static str>> {
    let chromium = named_by("CHROMIUM").or_else(|| {
        on_path(&["chromium", "google-chrome", "google-chrome-stable", "chrome"])
            // Ubuntu installs a script of this name that only says how to install the snap.
            .or_else(|| on_path(&["chromium-browser"]).filter(|_| !Path::new("/usr/bin/snap").exists()))
            .or_else(|| in_places(&["/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"]))
    });
    let driver = named_by("CHROMEDRIVER")
        .or_else(|| on_path(&["chromedriver"]).or_else(|| in_places(&["/usr/lib/chromium/chromedriver"])));
    match (chromium, driver) {
        (Some(chromium), Some(driver)) => Ok(Browser { chromium, driver }),
        (chromium, driver) => Err([("chromium", chromium), ("chromedriver", driver)]
            .into_iter()
            .filter(|(_, found)| found.is_none())
            .map(|(name, _)| name)
            .collect()),
    }
}

fn named_by(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).map(PathBuf::from).filter(|path| path.is_file())
}

fn on_path(names: &[&str]) -> Option<PathBuf> {
    let directories: Vec<PathBuf> = env::var_os("PATH")
        .map(|path| env::split_paths(&path).collect())
        .unwrap_or_default();
    names.iter().find_map(|name| {
        let file = format!("{name}{}", env::consts::EXE_SUFFIX);
        directories
            .iter()
            .map(|directory| directory.join(&file))
            .find(|path| path.is_file())
    })
}

fn in_places(places: &[&str]) -> Option<PathBuf> {
    places.iter().map(PathBuf::from).find(|path| path.is_file())
}
