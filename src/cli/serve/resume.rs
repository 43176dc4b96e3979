//! A run that goes on: with the options, the token and the addresses it began with.
//!
//! Separate from the run's beginning because it asks for nothing and finds everything.

use std::path::Path;

use anyhow::ensure;
use serde_json::Value;

use super::super::console;
use super::super::given::Recording;
use super::super::train::{self, absolute};
use super::{COMMAND, Options, begin, listened};
use crate::runs::directory::RunDirectory;
use crate::server::{Interrupted, Listen};

/// A run to be taken up again, and its directory.
pub struct Resumed {
    pub directory: RunDirectory,
    pub interrupted: Box<Interrupted>,
}

/// Takes up the run in a directory.
pub fn resume(path: &Path, given: Options) -> anyhow::Result<()> {
    let directory = RunDirectory::resume(path)?;
    let shown = path.display();
    let said = |name: &str| directory.run().get(name).and_then(Value::as_str);
    ensure!(
        said("command") == Some(COMMAND),
        "the run in {shown} was not begun by `sflllm serve`, which cannot go on with it"
    );
    ensure!(
        said("role") != Some("federated"),
        "{shown} is that of a federated server, which keeps nothing: start it again with the same --listen and --control-key, and the \
         main server tells it all it has to know"
    );
    if said("ended") == Some("completed") {
        if given.output.json {
            return Ok(console::print_kept(serde_json::to_string(directory.run())?)?);
        }
        let adapter = directory.adapter();
        let text = format!(
            "the run in {shown} is complete; its adapter is in {}",
            adapter.display()
        );
        return Ok(console::print_kept(text)?);
    }
    let mut options: Options = RECORDING.resumed(COMMAND, directory.run(), &given.given, path)?;
    let interrupted = Box::new(Interrupted::open(&directory)?);
    (options.output, options.open) = (given.output, given.open);
    options.token.clone_from(&interrupted.identity.token);
    options.control_key.clone_from(&interrupted.identity.control_key);
    options.listen = listen_again(&options, &directory)?;
    begin(options, Some(Resumed { directory, interrupted }))
}

/// How the options are kept in `run.json`. Secrets are not: they are in `state/`, which only the owner may look into.
pub const RECORDING: Recording = Recording {
    left_out: &[
        "resume",
        "out",
        "json",
        "quiet",
        "open",
        "token",
        "token-file",
        "control-key",
        "control-key-file",
    ],
    may_change: &[
        ("device", &[]),
        ("wait", &[]),
        ("deadline", &[]),
        ("quorum", &[]),
        ("host", &[]),
        ("federated-url", &[]),
        ("data", &[]),
        ("valid", &[]),
    ],
    placed,
};

/// What an option's text means in whatever directory it is read.
fn placed(option: &str, text: &str) -> String {
    match option {
        "scenario" if !Path::new(text).exists() => text.to_owned(),
        "ca" | "scenario" | "calibration" => absolute(text),
        _ => train::placed(option, text),
    }
}

/// The addresses of the run, with the ports that were free when it began.
fn listen_again(options: &Options, directory: &RunDirectory) -> anyhow::Result<Vec<Listen>> {
    let bound = directory.run().get("addresses").and_then(Value::as_array);
    let bound = bound
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::parse::<Listen>);
    let bound = bound.collect::<Result<Vec<_>, _>>()?;
    let asked = listened(options)?;
    Ok(asked
        .into_iter()
        .enumerate()
        .map(|(position, mut asked)| {
            if let (0, Some(bound)) = (asked.port, bound.get(position)) {
                asked.port = bound.port;
            }
            asked
        })
        .collect())
}
