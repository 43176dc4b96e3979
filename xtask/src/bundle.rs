//! The browser bundle: the library compiled to WebAssembly, bound to JavaScript by wasm-bindgen, laid beside the static
//! files of `web/` in `web/dist/`, from where the root package's build script embeds it in the native binary.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::{Compression, write::GzEncoder};
use wasm_bindgen_cli_support::Bindgen;

use crate::command;
use crate::setup;

/// What the WebAssembly and its JavaScript may weigh, a little above what they do weigh: growth should be a decision, since on a
/// phone's first visit this is the wait before anything runs.
const BUDGET_RAW: usize = 880_000;
const BUDGET_GZIP: usize = 330_000;

/// How the WebAssembly is compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Cargo profile `web`, as embedded in released binaries.
    Shipped,
    /// Cargo profile `dev`, with panics' names kept.
    Dev,
}

/// Builds `web/dist/`. Files whose contents stay the same are not touched, so that what embeds them is not rebuilt.
pub fn build(profile: Profile) -> Result<()> {
    setup::for_bundle()?;
    let (name, directory) = match profile {
        Profile::Shipped => ("web", "web"),
        Profile::Dev => ("dev", "debug"),
    };
    // `--crate-type` here rather than in Cargo.toml: native builds need no shared library.
    command::run(
        command::cargo()
            .args(["rustc", "--package", "sflllm", "--lib", "--crate-type", "cdylib"])
            .args(["--target", "wasm32-unknown-unknown", "--profile", name])
            .env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS", compiler_flags()),
    )?;
    let wasm = command::target_directory()
        .join("wasm32-unknown-unknown")
        .join(directory)
        .join("sflllm.wasm");

    let mut files = static_files(&command::root().join("web"))?;
    let bound = bind(&wasm, profile)?;
    let sizes: Vec<(String, usize, usize)> = bound
        .iter()
        .map(|(path, bytes)| Ok((path.clone(), bytes.len(), gzip_size(bytes)?)))
        .collect::<Result<_>>()?;
    files.extend(bound);
    write_directory(&command::root().join("web/dist"), &files)?;

    let (mut raw, mut gzip) = (0, 0);
    for (path, raw_size, gzip_size) in sizes {
        eprintln!("{path:>16} {raw_size:>9} bytes {gzip_size:>9} gzip");
        raw += raw_size;
        gzip += gzip_size;
    }
    eprintln!(
        "{:>16} {raw:>9} bytes {gzip:>9} gzip (budget {BUDGET_RAW} and {BUDGET_GZIP})",
        "engine"
    );
    if profile == Profile::Shipped && (raw > BUDGET_RAW || gzip > BUDGET_GZIP) {
        bail!("the web client is over its size budget: {raw} of {BUDGET_RAW} bytes, {gzip} of {BUDGET_GZIP} gzip");
    }
    Ok(())
}

/// SIMD, which every browser with WebGPU has and the CPU engine needs; and no paths of the machine that builds.
fn compiler_flags() -> String {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(env::home_dir()?.join(".cargo")));
    let registry = home.map(|home| home.join("registry").join("src"));
    let mut flags = "-Ctarget-feature=+simd128".to_owned();
    for prefix in [registry, Some(command::root())].into_iter().flatten() {
        let prefix = prefix.display().to_string();
        // The variable separates flags by spaces and knows no quotes.
        if !prefix.contains(char::is_whitespace) {
            flags.push_str(&format!(" --remap-path-prefix={prefix}=."));
        }
    }
    flags
}

/// The WebAssembly and the module that loads it.
fn bind(wasm: &Path, profile: Profile) -> Result<BTreeMap<String, Vec<u8>>> {
    let out = wasm.with_file_name("bindgen");
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot empty {}", out.display()))?;
    }
    Bindgen::new()
        .input_path(wasm)
        .web(true)?
        .typescript(false)
        .remove_name_section(profile == Profile::Shipped)
        .remove_producers_section(true)
        .generate(&out)
        .with_context(|| format!("wasm-bindgen cannot process {}", wasm.display()))?;
    if profile == Profile::Shipped {
        optimise(&out.join("sflllm_bg.wasm"))?;
        let module = out.join("sflllm.js");
        let source = fs::read_to_string(&module).with_context(|| format!("cannot read {}", module.display()))?;
        fs::write(&module, without_comments(&source)).with_context(|| format!("cannot write {}", module.display()))?;
    }
    read_tree(&out, &out)
}

/// The module wasm-bindgen wrote, without its documentation comments and indentation. It writes both on lines of their own.
fn without_comments(source: &str) -> String {
    let mut shorter = String::with_capacity(source.len());
    let mut in_comment = false;
    for line in source.lines().map(str::trim) {
        if line.starts_with("/*") {
            in_comment = true;
        }
        if !in_comment && !line.is_empty() && !line.starts_with("//") {
            shorter.push_str(line);
            shorter.push('\n');
        }
        if line.ends_with("*/") {
            in_comment = false;
        }
    }
    shorter
}

/// `wasm-opt` (from binaryen) makes the bundle a little smaller; nothing depends on it.
fn optimise(wasm: &Path) -> Result<()> {
    if !command::succeeds(command::in_root("wasm-opt").arg("--version")) {
        return Ok(());
    }
    let smaller = wasm.with_extension("opt");
    command::run(
        command::in_root("wasm-opt")
            .args(["-O3", "--all-features"])
            .arg(wasm)
            .arg("-o")
            .arg(&smaller),
    )?;
    fs::rename(&smaller, wasm).with_context(|| format!("cannot replace {}", wasm.display()))
}

/// Everything under `web/` that the page is made of.
fn static_files(web: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = read_tree(web, web)?;
    files.retain(|path, _| !path.starts_with("dist/") && !path.ends_with(".md"));
    Ok(files)
}

fn read_tree(top: &Path, directory: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry
            .with_context(|| format!("cannot list {}", directory.display()))?
            .path();
        if path.is_dir() {
            files.extend(read_tree(top, &path)?);
            continue;
        }
        let relative: Vec<String> = path
            .strip_prefix(top)?
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        files.insert(relative.join("/"), bytes);
    }
    Ok(files)
}

/// Makes `directory` hold exactly `files`.
fn write_directory(directory: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    for stale in read_tree(directory, directory)?
        .keys()
        .filter(|path| !files.contains_key(*path))
    {
        let path = directory.join(stale);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    for (relative, bytes) in files {
        let path: PathBuf = directory.join(relative);
        if fs::read(&path).is_ok_and(|found| found == *bytes) {
            continue;
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn gzip_size(bytes: &[u8]) -> Result<usize> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?.len())
}

#[cfg(test)]
mod tests {
    use super::without_comments;

    #[test]
    fn comments_and_indentation_are_left_out() {
        let source = "/**\n * What it does.\n */\nexport class A {\n    /** short */\n    b() {\n        // why\n        return '/* kept */';\n    }\n}\n";
        assert_eq!(
            without_comments(source),
            "export class A {\nb() {\nreturn '/* kept */';\n}\n}\n"
        );
    }
}
