//! The command line: one file per subcommand, and the options they share.

pub mod bench;
pub mod calibrate;
pub mod console;
pub mod demo;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod interrupt;
pub mod join;
pub mod options;
pub mod progress;
pub mod serve;
pub mod source;
pub mod train;

use clap::{Parser, Subcommand};

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
    /// Loss and perplexity of a model on a data file
    Eval(Box<eval::Options>),
    /// Write text from a prompt
    Generate(Box<generate::Options>),
    /// Measure the rounds that each LoRA rank needs to reach a target loss
    Calibrate(Box<calibrate::Options>),
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
            Self::Eval(options) => eval::run(*options),
            Self::Generate(options) => generate::run(*options),
            Self::Calibrate(options) => calibrate::run(*options),
            Self::Bench(options) => bench::run(*options),
            Self::Doctor(options) => doctor::run(options),
        }
    }
}
