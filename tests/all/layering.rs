//! The dependency table of the crate: which folder may name which, and which folder owns which external crate.
//!
//! It reads the sources, so that an arrow in the wrong direction fails here and not in a review.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A module, and the modules of ours that it may name.
const MODULES: &[(&str, &[&str])] = &[
    ("terms", &[]),
    ("compute", &["terms"]),
    ("data", &["terms"]),
    ("federated", &["terms"]),
    ("transport", &[]),
    ("machine", &[]),
    ("disk", &["machine"]),
    ("runs", &["terms", "model", "transport", "disk"]),
    ("hub", &[]),
    ("protocol", &["terms", "federated"]),
    ("kernels", &["terms", "compute"]),
    ("model", &["terms", "kernels", "compute", "disk"]),
    ("split", &["terms", "model", "kernels", "compute"]),
    ("allocation", &["terms", "model"]),
    ("simulation", &["terms", "protocol", "federated", "client", "data"]),
    (
        "client",
        &[
            "terms",
            "split",
            "model",
            "protocol",
            "data",
            "compute",
            "transport",
            "machine",
            "disk",
        ],
    ),
    (
        "server",
        &[
            "terms",
            "split",
            "model",
            "protocol",
            "data",
            "compute",
            "federated",
            "allocation",
            "transport",
            "machine",
            "disk",
            "runs",
        ],
    ),
];

/// An external crate, and the paths below `src/` that may name it.
const CRATES: &[(&str, &[&str])] = &[
    ("wgpu", &["compute"]),
    ("safetensors", &["model"]),
    ("tokenizers", &["data/tokenizer"]),
    ("minijinja", &["data/template"]),
    ("minijinja_contrib", &["data/template"]),
    ("csv", &["data/reader/table.rs"]),
    ("web_sys", &["client/web"]),
    ("wasm_bindgen", &["client/web"]),
    ("wasm_bindgen_futures", &["client/web"]),
    ("js_sys", &["client/web"]),
    ("tokio", &["client/native", "server", "transport", "hub", "cli"]),
    ("axum", &["server"]),
    ("axum_server", &["server"]),
    ("tower_http", &["server"]),
    ("rcgen", &["server"]),
    ("qrcode", &["server"]),
    ("rustls", &["server", "transport", "hub/remote.rs"]),
    ("tokio_rustls", &["transport"]),
    ("tokio_tungstenite", &["transport"]),
    ("reqwest", &["transport", "hub"]),
    ("clap", &["cli", "main.rs"]),
    ("anyhow", &["cli", "main.rs"]),
    ("indicatif", &["cli"]),
    ("plotters", &["cli/charts.rs"]),
    (
        "libc",
        &["cli/interrupt.rs", "machine.rs", "main.rs", "server/descriptors.rs"],
    ),
];

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every Rust file below `src/`, as its path there and its code without comments.
fn files() -> Vec<(String, String)> {
    fn collect(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = sources();
    let mut paths = Vec::new();
    collect(&root, &mut paths);
    paths
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
            (name, without_comments(&fs::read_to_string(&path).unwrap()))
        })
        .collect()
}

fn without_comments(source: &str) -> String {
    source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn identifier(text: &str) -> &str {
    let end = text
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(text.len());
    &text[..end]
}

/// The modules of ours that `code` names: the part after each `crate::`, also in `crate::{a::X, b}`.
fn named_modules(code: &str) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for (position, _) in code.match_indices("crate::") {
        if code[..position].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[position + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => {
                named.insert(identifier(rest).to_owned());
            }
            Some(group) => {
                let mut depth = 0;
                let mut start = true;
                for (at, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => start = true,
                        c if start && depth == 0 && (c.is_alphabetic() || c == '_') => {
                            named.insert(identifier(&group[at..]).to_owned());
                            start = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    named
}

/// Whether `code` names the external crate: as a path, in a `use`, or in an attribute.
fn names_crate(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(position, _)| {
        let before = code[..position].chars().next_back();
        let after = &code[position + name.len()..];
        let own_word = !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '"');
        own_word && (after.starts_with("::") || after.starts_with(';') && code[..position].ends_with("use "))
    })
}

#[test]
fn the_scanner_sees_every_form_of_a_path() {
    let code = "use crate::model::architecture::Architecture;\nuse crate::{split::{Cut, Wire}, data, protocol::*};\nlet x: crate::compute::Engine;\nmacro $crate::hidden";
    let expected: BTreeSet<String> = ["model", "split", "data", "protocol", "compute"]
        .map(str::to_owned)
        .into();
    assert_eq!(named_modules(code), expected);
    assert_eq!(
        named_modules(&without_comments("// crate::server is elsewhere\n")),
        BTreeSet::new()
    );
    assert!(names_crate("use tokio::sync::mpsc;", "tokio"));
    assert!(names_crate("    fn f() -> anyhow::Result<()>", "anyhow"));
    assert!(!names_crate("use tokio_rustls::x;", "tokio"));
    assert!(!names_crate("my_tokio::x", "tokio"));
    assert!(!names_crate("crate::tokio::x", "tokio"));
}

#[test]
fn modules_depend_in_one_direction_only() {
    let mut wrong = Vec::new();
    for (file, code) in files() {
        let module = identifier(&file).to_owned();
        let Some((_, allowed)) = MODULES.iter().find(|(name, _)| *name == module) else {
            assert!(
                matches!(module.as_str(), "lib" | "main" | "cli"),
                "src/{file}: the module `{module}` is not in the table of this test"
            );
            continue;
        };
        for named in named_modules(&code) {
            let known = MODULES.iter().any(|(name, _)| *name == named) || named == "cli";
            if known && named != module && !allowed.contains(&named.as_str()) {
                wrong.push(format!("src/{file} names crate::{named}"));
            }
        }
    }
    assert!(wrong.is_empty(), "against the dependency table:\n{}", wrong.join("\n"));
}

#[test]
fn the_table_has_no_cycle() {
    // Each module may name earlier ones only, in the order in which they can be removed.
    let mut left: Vec<_> = MODULES.to_vec();
    let mut removed: BTreeSet<&str> = BTreeSet::new();
    while !left.is_empty() {
        let before = left.len();
        left.retain(|(name, allowed)| {
            let free = allowed.iter().all(|module| removed.contains(module));
            if free {
                removed.insert(name);
            }
            !free
        });
        assert!(left.len() < before, "a cycle among {left:?}");
    }
}

#[test]
fn external_crates_have_an_owner() {
    let mut wrong = Vec::new();
    for (file, code) in files() {
        for (name, owners) in CRATES {
            let owned = owners
                .iter()
                .any(|owner| file == *owner || file.strip_prefix(owner).is_some_and(|rest| rest.starts_with('/')));
            if !owned && names_crate(&code, name) {
                wrong.push(format!("src/{file} names {name}, which belongs to {owners:?}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "external crates outside their owners:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_browser_build_has_no_native_crates() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--package", "sflllm", "--target", "wasm32-unknown-unknown"])
        .args(["--edges", "normal", "--prefix", "none", "--format", "{p}", "--locked"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).unwrap();
    let packages: BTreeSet<&str> = tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(
        packages.contains("wgpu") && packages.contains("wasm-bindgen"),
        "not the browser's tree:\n{tree}"
    );
    for native in [
        "tokio",
        "axum",
        "naga",
        "wgpu-core",
        "wgpu-hal",
        "rustls",
        "reqwest",
        "tokenizers",
        "rayon",
        "clap",
        "plotters",
    ] {
        assert!(!packages.contains(native), "{native} is in the browser build:\n{tree}");
    }
}
