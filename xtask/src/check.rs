//! `cargo xtask test`: every check in the order that fails soonest, each under its own heading with its time, stopping
//! at the first failure. Continuous integration runs this and nothing else.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::{bundle, command, fetch, setup};

/// What the tests run on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Models {
    /// Those in the repository, or made by the tests.
    Small,
    /// A pretrained model besides, named to the tests in `SFLLLM_REAL_MODEL`.
    Real,
}

/// Runs all of it.
pub fn run(models: Models) -> Result<()> {
    let start = Instant::now();
    let mut times = Times(Vec::new());
    times.step("setup", setup::everything)?;
    let mut model = None;
    if models == Models::Real {
        times.step("pretrained model", || {
            model = Some(fetch::tested()?);
            Ok(())
        })?;
    }
    times.cargo("format", &["fmt", "--all", "--check"])?;
    times.cargo(
        "lint, native",
        &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
    )?;
    // In a browser wgpu's handles stay on their thread; the code that shares them by `Arc` is the native code.
    let wasm = "clippy --package sflllm --lib --target wasm32-unknown-unknown -- -D warnings -A clippy::arc-with-non-send-sync";
    let wasm: Vec<&str> = wasm.split(' ').collect();
    times.cargo("lint, wasm", &wasm)?;
    let library = "clippy --package sflllm --lib --examples --no-default-features -- -D warnings";
    let library: Vec<&str> = library.split(' ').collect();
    times.cargo("lint, the library alone", &library)?;
    // Before the tests, so that the binary they start carries the page.
    times.step("web bundle", || bundle::build(bundle::Profile::Shipped))?;
    times.step("tests: native, GPU and browser", || {
        // What may be skipped on a developer's machine must run here: the set-up has just made it available.
        let settings = [
            ("SFLLLM_REQUIRE_GPU", "1"),
            ("SFLLLM_REQUIRE_BROWSER", "1"),
            // Mesa's device selection layer complains about a missing display in every process.
            ("NODEVICE_SELECT", "1"),
        ];
        let mut tests = command::cargo();
        tests.envs(settings).args(["test", "--workspace"]);
        if let Some(model) = &model {
            tests.env("SFLLLM_REAL_MODEL", model);
        }
        command::run(&mut tests)
    })?;
    times.step("documentation", || {
        command::run(
            command::cargo()
                .env("RUSTDOCFLAGS", "-D warnings")
                .args(["doc", "--workspace", "--no-deps"]),
        )
    })?;

    command::heading("passed");
    for (name, seconds) in &times.0 {
        eprintln!("{name:<34} {seconds:>7.1} s");
    }
    eprintln!("{:<34} {:>7.1} s", "all", start.elapsed().as_secs_f64());
    Ok(())
}

/// The steps that have passed, each with its seconds.
struct Times(Vec<(&'static str, f64)>);

impl Times {
    fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        command::heading(name);
        let start = Instant::now();
        work().with_context(|| format!("{name} failed"))?;
        self.0.push((name, start.elapsed().as_secs_f64()));
        Ok(())
    }

    fn cargo(&mut self, name: &'static str, arguments: &[&str]) -> Result<()> {
        self.step(name, || command::run(command::cargo().args(arguments)))
    }
}
