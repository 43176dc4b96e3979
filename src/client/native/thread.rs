//! The compute thread: the trainer, and the files it is loaded from.
//!
//! Separate from the driver because a pass may take as long as it takes, and a ping is answered at once.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, LazyLock, mpsc as thread_mpsc};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::super::edge::{Done, Task};
use super::super::{self as client, Trainer};
use super::adapter::AdapterOut;
use super::fetch::Files;
use super::{Error, Source};
use crate::compute::Engine;
use crate::data::{self, Dataset, Summary as DataSummary, Tokenize, Tokenizer};

/// Asked of the compute thread.
pub(super) enum Command {
    /// For the `Load` that follows.
    Files(Files),
    Run(Task),
}

/// The thread's ends: what it is asked, and what it answers.
pub(super) type Ends = (thread_mpsc::Sender<Command>, mpsc::Receiver<Result<Done, Error>>);

pub(super) fn start_thread(engine: Engine, source: Source, adapter_out: Arc<AdapterOut>) -> Result<Ends, Error> {
    let (commands, receiver) = thread_mpsc::channel();
    let (sender, done) = mpsc::channel(1);
    let compute = move || {
        let mut worker = Worker {
            trainer: Trainer::new(&engine, clock),
            source,
            adapter_out,
            files: Files::default(),
        };
        while let Ok(command) = receiver.recv() {
            match command {
                Command::Files(files) => worker.files = files,
                Command::Run(task) => {
                    let result = pollster::block_on(worker.run(task));
                    if sender.blocking_send(result).is_err() {
                        // Without a driver there is nobody to tell.
                        break;
                    }
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("client".to_owned())
        .spawn(compute)
        .map_err(|source| Error::File {
            action: "start",
            path: "a thread".to_owned(),
            source,
        })?;
    Ok((commands, done))
}

struct Worker {
    trainer: Trainer,
    source: Source,
    adapter_out: Arc<AdapterOut>,
    files: Files,
}

impl Worker {
    async fn run(&mut self, task: Task) -> Result<Done, Error> {
        let mut read = None;
        match &task {
            Task::Load => read = self.load()?,
            Task::Install { values, .. } => {
                if let Some(plan) = self.trainer.plan() {
                    self.adapter_out.keep(plan, values);
                }
            }
            _ => {}
        }
        let mut done = self.trainer.run(task).await?;
        match &mut done {
            // Who has examples already needs no tokenizer.
            Done::Assigned(wanted) => {
                if let (Source::Examples(examples), Some(loader)) = (&self.source, self.trainer.loader())
                    && loader.needs_data()
                {
                    loader.set_data(examples.clone());
                    wanted.tokenizer = None;
                }
            }
            Done::Loaded { summary, .. } => *summary = read,
            _ => {}
        }
        Ok(done)
    }

    /// Gives the trainer what it lacks. Returns what the data is like, if it had to be read.
    fn load(&mut self) -> Result<Option<DataSummary>, Error> {
        let Some(loader) = self.trainer.loader() else {
            return Ok(None);
        };
        let summary = match (&self.source, loader.needs_data()) {
            (Source::File { .. }, true) => {
                let data = read_data(loader.plan(), &self.source, self.files.tokenizer.as_deref())?;
                loader.set_data(data.examples);
                Some(data.summary)
            }
            _ => None,
        };
        // The files are those of the last parts.
        let there = self.files.weights.len().saturating_sub(loader.missing().len());
        for path in self.files.weights.iter().skip(there) {
            let file = File::open(path).map_err(|error| Error::file("open", path, error))?;
            loader.add_stored(file)?;
        }
        Ok(summary)
    }
}

/// What the client measures itself by.
fn clock() -> Duration {
    static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    ORIGIN.elapsed()
}

fn read_data(plan: &client::Plan, source: &Source, tokenizer: Option<&Path>) -> Result<Dataset, Error> {
    let read = |path: &Path| std::fs::read(path).map_err(|error| Error::file("read", path, error));
    let Source::File {
        path,
        skip_bad_lines,
        columns,
        chat_template,
    } = source
    else {
        unreachable!("examples need not be read")
    };
    let tokenizer = match tokenizer {
        Some(tokenizer) => {
            let mut tokenizer =
                Tokenizer::from_json(&read(tokenizer)?, plan.architecture.eos).map_err(client::Error::from)?;
            if let Some(template) = chat_template {
                tokenizer = tokenizer.with_chat_template(template).map_err(client::Error::from)?;
            }
            tokenizer
                .check_vocabulary(plan.architecture.vocab)
                .map_err(client::Error::from)?;
            Some(tokenizer)
        }
        None => None,
    };
    let tokenize = tokenizer.as_ref().map(|tokenizer| tokenizer as &dyn Tokenize);
    let options = data::Options {
        skip_bad_lines: *skip_bad_lines,
        columns: columns.clone(),
        ..plan.data_options()
    };
    Ok(Dataset::load(path, tokenize, &options).map_err(client::Error::from)?)
}
