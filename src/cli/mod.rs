//! The command line: one file per subcommand, and the options they share.

pub mod answer;
pub mod bench;
pub mod calibrate;
pub mod charts;
pub mod console;
pub mod defaults;
pub mod demo;
pub mod desktop;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod fetch;
pub mod generate;
pub mod given;
pub mod human;
pub mod interrupt;
pub mod join;
pub mod modelfile;
pub mod needs;
pub mod options;
pub mod plan;
pub mod report;
pub mod runs;
pub mod scenario;
pub mod secret;
pub mod serve;
pub mod source;
pub mod sweep;
pub mod train;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

/// Split federated fine-tuning of GPT-2-style models across the devices people already have.
///
/// Each device keeps its own files. Start a server with `sflllm serve`, join it from other machines with `sflllm join` or a
/// browser tab, and take away a LoRA adapter that Python's peft loads.
#[derive(Debug, Parser)]
#[command(name = "sflllm", version, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the main job: two clients in this process, and any tab that joins, fine-tune the demo model
    Demo(Box<demo::Options>),
    /// The main and federated servers, and the web page for browser clients
    Serve(Box<serve::Options>),
    /// Join a server with this device and a file that stays here
    Join(Box<join::Options>),
    /// Fine-tune an adapter on this device alone
    Train(Box<train::Options>),
    /// Runs on this machine: their state, loss and size; remove one, or open it
    Runs(Box<runs::Options>),
    /// Loss and perplexity of a model on a data file
    Eval(Box<eval::Options>),
    /// Write text from a prompt
    Generate(Box<generate::Options>),
    /// Write an adapter, or a model with it, in the form that another program loads: peft, llama.cpp, transformers, Ollama
    Export(Box<export::Options>),
    /// Measure the rounds that each LoRA rank needs to reach a target loss
    Calibrate(Box<calibrate::Options>),
    /// Find subchannels, powers, cut and rank for a scenario, with a certificate
    Plan(Box<plan::Options>),
    /// The total delay by method while one of a scenario's numbers varies, as CSV
    Sweep(Box<sweep::Options>),
    /// Check and time the kernels on this device
    Bench(Box<bench::Options>),
    /// Show what this machine can do, and what to install
    Doctor(doctor::Options),
}

impl Command {
    /// Runs the command.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Demo(options) => demo::run(*options),
            Self::Serve(options) => serve::run(*options),
            Self::Join(options) => join::run(*options),
            Self::Train(options) => train::run(*options),
            Self::Runs(options) => runs::run(*options),
            Self::Eval(options) => eval::run(*options),
            Self::Generate(options) => generate::run(*options),
            Self::Export(options) => export::run(*options),
            Self::Calibrate(options) => calibrate::run(*options),
            Self::Plan(options) => plan::run(*options),
            Self::Sweep(options) => sweep::run(*options),
            Self::Bench(options) => bench::run(*options),
            Self::Doctor(options) => doctor::run(options),
        }
    }
}

/// Bad usage that the declaration of `command`'s options does not express; `main` ends with it as with the parser's own.
fn usage(command: &str, message: impl std::fmt::Display) -> anyhow::Error {
    let mut cli = Cli::command();
    cli.build();
    match cli.find_subcommand_mut(command) {
        Some(command) => command.error(ErrorKind::ArgumentConflict, message).into(),
        None => cli.error(ErrorKind::ArgumentConflict, message).into(),
    }
}
