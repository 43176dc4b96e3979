//! A server in this process, with its local clients, from its start to its end.
//!
//! Separate from the options because the demo hosts a run too, which nobody has given any.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::super::console::Console;
use super::super::{desktop, interrupt};
use super::shown::{Shown, announce, join_page, plural};
use crate::client::native;
use crate::compute::Engine;
use crate::data::Example;
use crate::runs::directory::RunDirectory;
use crate::server::{self, Address, HostName, Interrupted, Limits, Listen, Role, Run, Server, Settings, Summary};
use crate::transport::{self, Dialer, JoinLink, Trust};

/// How a server is reached and shown.
pub struct Hosting {
    pub token: Option<String>,
    /// Names besides its own by which it may be called.
    pub hosts: Vec<HostName>,
    pub listen: Vec<Listen>,
    pub open: bool,
    pub quiet: bool,
    /// For tabs that join without a file of their own.
    pub demo_data: Vec<u8>,
}

/// A tokio runtime for servers and clients. Computing happens in threads of its own.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the network threads")
}

/// Serves a run with its local clients until it is over.
pub fn host(
    hosting: Hosting,
    role: Role,
    directory: RunDirectory,
    run: Option<Run>,
    local: Vec<Vec<Example>>,
    interrupted: Option<Box<Interrupted>>,
) -> anyhow::Result<Summary> {
    let runtime = runtime()?;
    let result = runtime.block_on(host_here(hosting, role, directory, run, local, interrupted));
    // Downloads that still run have no reader any more.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn host_here(
    hosting: Hosting,
    role: Role,
    directory: RunDirectory,
    run: Option<Run>,
    local: Vec<Vec<Example>>,
    interrupted: Option<Box<Interrupted>>,
) -> anyhow::Result<Summary> {
    let console = Console::new(hosting.quiet);
    let mut interrupt = interrupt::watch("stopping")?;
    let engine = run.as_ref().map(|run| run.engine.clone());
    let steps = run
        .as_ref()
        .map_or(0, |run| u64::from(run.rounds) * u64::from(run.local_steps));
    let clients = run.as_ref().map_or(0, |run| run.clients);
    let path = directory.path().to_owned();
    let home = transport::data_directory()?;
    if let Some(engine) = &engine {
        console.line(format!("loading the model on {}", engine.name()));
    }
    let shown = Shown {
        console: console.clone(),
        steps,
        plan: Mutex::new(String::new()),
    };
    let control_key = match &role {
        Role::Federated { control_key, .. } => Some(control_key.clone()),
        _ => None,
    };
    let is_page = control_key.is_none();
    let operator = server::generate_token();
    let settings = Settings {
        role,
        listen: hosting.listen,
        token: hosting.token.clone(),
        operator: Some(operator.clone()),
        hosts: hosting.hosts,
        limits: Limits::default(),
        home,
        directory,
        demo_data: hosting.demo_data.into(),
        run,
        interrupted,
    };
    let server = Server::start(settings, Box::new(move |report| shown.report(report))).await?;
    announce(&server, &console, hosting.token.as_deref(), control_key.as_deref());
    if let Some(address) = server.addresses().last() {
        console.line(format!("status: {}/status?operator={operator}", address.local_url));
    }
    console.line(format!("run directory: {}", path.display()));
    if is_page {
        console.waiting(format!("waiting for {clients} client{}", plural(clients as usize)));
    }
    if hosting.open
        && let Some(address) = server.addresses().last()
    {
        desktop::open(&join_page(&address.local_url, hosting.token.as_deref(), None));
    }

    let stopper = server.stopper();
    let (stop_sender, stop) = watch::channel(false);
    let stopped = stopper.clone();
    let watcher = tokio::spawn(async move {
        interrupt.wait().await;
        stopped.stop("the server was stopped").await;
    });
    let mut joined = JoinSet::new();
    if let Some(engine) = engine {
        for (number, examples) in local.into_iter().enumerate() {
            let settings = local_client(&server, &hosting.token, &engine, number, examples)?;
            joined.spawn(native::join(settings, stop.clone(), |_| {}));
        }
    }
    let failure = Arc::new(Mutex::new(None));
    let noted = failure.clone();
    let local_failures = tokio::spawn(async move {
        while let Some(ended) = joined.join_next().await {
            let error = match ended {
                Ok(Ok(_)) => continue,
                Ok(Err(error)) => anyhow::Error::from(error),
                Err(error) => anyhow::Error::from(error),
            };
            noted
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(error);
            stopper.stop("a client of the server's own process failed").await;
        }
    });
    let summary = server.serve().await;
    // The clients have been told; this is for one that has lost its connection meanwhile.
    let _ = stop_sender.send(true);
    if tokio::time::timeout(Duration::from_secs(3), local_failures)
        .await
        .is_err()
    {
        tracing::warn!("a local client did not end in time");
    }
    watcher.abort();
    console.finish();
    let failure = failure.lock().unwrap_or_else(PoisonError::into_inner).take();
    match failure {
        Some(error) => Err(error.context("a local client failed")),
        None => Ok(summary?),
    }
}

fn local_client(
    server: &Server,
    token: &Option<String>,
    engine: &Engine,
    number: usize,
    examples: Vec<Example>,
) -> anyhow::Result<native::Settings> {
    let address = server.addresses().last().context("the server listens nowhere")?;
    let link: JoinLink = local_link(address)?;
    let trust = match server.certificate_file() {
        Some(file) if link.origin.secure => Trust::Authority(file.to_owned()),
        _ => Trust::Known,
    };
    Ok(native::Settings {
        server: link.origin,
        token: token.clone(),
        dialer: Dialer::new(&trust)?,
        name: format!("local {}", number + 1),
        engine: engine.clone(),
        source: native::Source::Examples(examples),
        cache: server
            .blobs()
            .context("only a main server has local clients")?
            .to_owned(),
        adapter_out: None,
        // It is in the server's own process.
        give_up: Duration::from_secs(60),
        keep: None,
    })
}

fn local_link(address: &Address) -> anyhow::Result<JoinLink> {
    Ok(address.local_url.parse()?)
}
