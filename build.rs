//! Embeds the web page: writes the list of the files of `web/dist/` (made by `cargo xtask web`) that the native library
//! includes as `ASSETS`. Without a bundle the list is empty and the server says how to build one.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("wasm32") {
        // The bundle is made from this build and cannot also be part of it.
        return Ok(());
    }
    // Not `web/dist`: cargo would rebuild every time while it does not exist.
    println!("cargo::rerun-if-changed=web");
    let directory = |name: &str| {
        env::var_os(name)
            .map(PathBuf::from)
            .ok_or_else(|| io::Error::other(format!("cargo sets {name}")))
    };
    let dist = directory("CARGO_MANIFEST_DIR")?.join("web/dist");
    let mut paths = Vec::new();
    if dist.is_dir() {
        collect(&dist, &mut paths)?;
    }
    let mut files = Vec::new();
    for path in paths {
        let relative = path.strip_prefix(&dist).map_err(io::Error::other)?;
        let url = relative
            .iter()
            .map(|part| part.to_string_lossy())
            .collect::<Vec<_>>()
            .join("/");
        files.push((url, path));
    }
    files.sort();

    let mut source = String::from(
        "/// Every file of the web page, sorted by its path below the site's root; empty without a bundle.\npub static ASSETS: &[(&str, &[u8])] = &[\n",
    );
    for (url, path) in &files {
        source.push_str(&format!(
            "    ({url:?}, include_bytes!({:?})),\n",
            path.to_string_lossy()
        ));
    }
    source.push_str("];\n");
    fs::write(directory("OUT_DIR")?.join("web_assets.rs"), source)
}

fn collect(directory: &Path, paths: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, paths)?;
        } else {
            paths.push(path);
        }
    }
    Ok(())
}
