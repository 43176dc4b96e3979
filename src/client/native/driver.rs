//! The machine's outputs carried out: sockets, downloads, the compute thread and files.
//!
//! Separate from what a caller sees: whoever joins a run gives settings and gets reports. Nothing is decided here.

use std::sync::Arc;
use std::sync::mpsc as thread_mpsc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::super::capabilities;
use super::super::edge::{Config, Done, Edge, Failure, Fetch, Output, Report};
use super::adapter::AdapterOut;
use super::fetch::{Fetcher, Files};
use super::thread::{Command, start_thread};
use super::{Error, Keep, Settings, StateDirectory, Summary};
use crate::compute::DeviceClass;
use crate::machine;
use crate::protocol::{ClientConfig, Endpoint, FinishReason, MAX_FRAME_BYTES};
use crate::transport::{Dialer, JoinLink, Origin, SocketEvent};

/// How long to wait at the end for the last frames to be sent.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// What of the machine's memory a server may count on, in bytes; 0 for a GPU with memory of its own, which tells nobody how much it has.
fn memory(device: DeviceClass) -> u64 {
    match device {
        DeviceClass::Gpu => 0,
        // A computer has other things to do as well.
        DeviceClass::CpuAdapter | DeviceClass::CpuEngine => machine::memory().unwrap_or(0) / 2,
    }
}

/// Takes part until the run is over, or until `stop` becomes true.
///
/// # Errors
/// [`Error`] says what to do.
pub async fn join(
    settings: Settings,
    stop: watch::Receiver<bool>,
    report: impl Fn(Report) + Send + Sync + 'static,
) -> Result<Summary, Error> {
    let report: Arc<dyn Fn(Report) + Send + Sync> = Arc::new(report);
    let adapter_out = Arc::new(AdapterOut::new(settings.adapter_out, report.clone()));
    let (commands, done) = start_thread(settings.engine.clone(), settings.source, adapter_out.clone())?;
    let (state, resume) = match settings.keep {
        Some(Keep { directory, resume }) => (Some(Arc::new(directory)), resume),
        None => (None, None),
    };
    let config = Config {
        client: ClientConfig {
            secret: settings.token,
            give_up: settings.give_up,
            seed: any_number(),
            ..ClientConfig::new(
                settings.name,
                capabilities(settings.engine.name(), memory(settings.engine.class())),
            )
        },
        server: settings.server.to_string(),
        keeps: state.is_some(),
        resume,
    };
    let (socket_sender, sockets) = mpsc::channel(64);
    let (fetch_sender, fetched) = mpsc::channel(1);
    let fetcher = Fetcher::new(
        settings.dialer.clone(),
        settings.server.clone(),
        settings.cache,
        report.clone(),
    );
    let driver = Driver {
        edge: Edge::new(config, Duration::ZERO),
        origin: Instant::now(),
        server: settings.server,
        dialer: settings.dialer,
        state,
        adapter_out,
        report,
        sockets: [Socket::default(), Socket::default()],
        socket_sender,
        commands,
        fetcher: Arc::new(fetcher),
        fetch_sender,
        download: None,
        bytes: (0, 0),
        end: None,
    };
    driver.run(sockets, done, fetched, stop).await
}

/// By which clients that were started at the same time differ.
fn any_number() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

#[derive(Default)]
struct Socket {
    /// Counts the sockets of this endpoint, so that what an old one still says is not taken for the new one's.
    number: u64,
    outgoing: Option<mpsc::Sender<Vec<u8>>>,
    /// Opening or open.
    live: bool,
}

type Tag = (Endpoint, u64);
type Fetched = (u64, Result<Files, Error>);

struct Driver {
    edge: Edge<Error>,
    origin: Instant,
    server: Origin,
    dialer: Dialer,
    state: Option<Arc<StateDirectory>>,
    adapter_out: Arc<AdapterOut>,
    report: Arc<dyn Fn(Report) + Send + Sync>,
    sockets: [Socket; 2],
    socket_sender: mpsc::Sender<(Tag, SocketEvent)>,
    commands: thread_mpsc::Sender<Command>,
    fetcher: Arc<Fetcher>,
    fetch_sender: mpsc::Sender<Fetched>,
    download: Option<JoinHandle<()>>,
    /// Sent and received.
    bytes: (u64, u64),
    end: Option<Result<FinishReason, Failure<Error>>>,
}

impl Driver {
    async fn run(
        mut self,
        mut sockets: mpsc::Receiver<(Tag, SocketEvent)>,
        mut done: mpsc::Receiver<Result<Done, Error>>,
        mut fetched: mpsc::Receiver<Fetched>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Summary, Error> {
        let mut stoppable = true;
        let end = loop {
            self.settle().await;
            if let Some(end) = self.end.take() {
                break end;
            }
            let deadline = self.edge.poll_timeout().map(|timeout| self.origin + timeout);
            tokio::select! {
                Some((tag, event)) = sockets.recv() => self.socket_event(tag, event),
                result = done.recv() => match result {
                    Some(result) => self.edge.done(self.now(), result),
                    None => self.edge.give_up(self.now(), Error::ThreadGone),
                },
                Some((number, files)) = fetched.recv() => self.fetched(number, files),
                changed = stop.wait_for(|stop| *stop), if stoppable => {
                    stoppable = false;
                    // Without a sender nobody will ever stop this client.
                    if changed.is_ok() {
                        self.edge.leave(self.now());
                    }
                }
                () = sleep_until(deadline) => self.edge.timeout(self.now()),
            }
        };
        if let Some(download) = &self.download {
            download.abort();
        }
        self.close(sockets).await;
        let tally = self.edge.tally();
        let summary = |reason| Summary {
            reason,
            steps: tally.steps,
            tokens: tally.tokens,
            bytes_up: self.bytes.0,
            bytes_down: self.bytes.1,
            seconds: self.origin.elapsed().as_secs_f64(),
        };
        let reason = end.map_err(Error::from)?;
        self.adapter_out.finish()?;
        Ok(summary(reason))
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Carries out all that the machine asks for.
    async fn settle(&mut self) {
        while let Some(output) = self.edge.poll() {
            match output {
                Output::Connect { endpoint, url } => {
                    if let Err(error) = self.connect(endpoint, url.as_deref()) {
                        self.edge.disconnected(endpoint, self.now(), Some(error));
                    }
                }
                Output::Transmit { endpoint, bytes } => self.transmit(endpoint, bytes),
                // The task behind it writes what it has, and ends.
                Output::Close { endpoint } => self.sockets[index(endpoint)].outgoing = None,
                Output::Fetch(fetch) => self.fetch(fetch),
                Output::Compute(task) => self.command(Command::Run(task)),
                Output::Store(bytes) => {
                    let stored = self.store(bytes).await;
                    self.edge.stored(self.now(), stored);
                }
                Output::Forget => {
                    if let Some(state) = &self.state {
                        state.forget();
                    }
                }
                Output::Show(report) => (self.report)(report),
                Output::End(end) => self.end = Some(end),
            }
        }
    }

    fn connect(&mut self, endpoint: Endpoint, url: Option<&str>) -> Result<(), Error> {
        let (origin, dialer) = match url {
            Some(url) => {
                let link: JoinLink = url.parse()?;
                (link.origin.clone(), self.dialer.toward(&link)?)
            }
            None => (self.server.clone(), self.dialer.clone()),
        };
        let path = match endpoint {
            Endpoint::Main => "/main",
            Endpoint::Federated => "/federated",
        };
        let socket = &mut self.sockets[index(endpoint)];
        socket.number += 1;
        socket.outgoing = None;
        socket.live = true;
        let tag = (endpoint, socket.number);
        dialer.open(tag, &origin, path, MAX_FRAME_BYTES, self.socket_sender.clone());
        Ok(())
    }

    fn transmit(&mut self, endpoint: Endpoint, bytes: Vec<u8>) {
        let socket = &mut self.sockets[index(endpoint)];
        let Some(outgoing) = &socket.outgoing else { return };
        self.bytes.0 += bytes.len() as u64;
        if outgoing.try_send(bytes).is_err() {
            // A full queue means a server that does not read.
            socket.outgoing = None;
            socket.number += 1;
            self.edge.disconnected(endpoint, self.now(), None);
        }
    }

    fn socket_event(&mut self, (endpoint, number): Tag, event: SocketEvent) {
        let now = self.now();
        let socket = &mut self.sockets[index(endpoint)];
        if socket.number != number {
            return;
        }
        match event {
            SocketEvent::Opened(outgoing) => {
                socket.outgoing = Some(outgoing);
                self.edge.connected(endpoint, now);
            }
            SocketEvent::Frame(bytes) => {
                self.bytes.1 += bytes.len() as u64;
                self.edge.frame(endpoint, now, &bytes);
            }
            SocketEvent::Part => self.edge.heard(endpoint),
            SocketEvent::Closed(error) => {
                socket.outgoing = None;
                socket.live = false;
                self.edge.disconnected(endpoint, now, error.map(Error::from));
            }
        }
    }

    fn fetch(&mut self, Fetch { number, wanted }: Fetch) {
        if let Some(before) = self.download.take() {
            before.abort();
        }
        let (fetcher, bearer, sender) = (self.fetcher.clone(), self.edge.bearer(), self.fetch_sender.clone());
        self.download = Some(tokio::spawn(async move {
            let files = fetcher.fetch_all(&wanted, bearer.as_deref()).await;
            // The driver may have ended meanwhile.
            let _ = sender.send((number, files)).await;
        }));
    }

    fn fetched(&mut self, number: u64, files: Result<Files, Error>) {
        let result = files.map(|files| {
            if self.edge.is_fetching(number) {
                self.command(Command::Files(files));
            }
        });
        self.edge.fetched(self.now(), number, result);
    }

    fn command(&mut self, command: Command) {
        if self.commands.send(command).is_err() {
            self.edge.give_up(self.now(), Error::ThreadGone);
        }
    }

    async fn store(&self, bytes: Vec<u8>) -> Result<(), String> {
        let Some(state) = self.state.clone() else { return Ok(()) };
        let saved = tokio::task::spawn_blocking(move || state.save(&bytes)).await;
        match saved {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Lets the last frames out.
    async fn close(&mut self, mut sockets: mpsc::Receiver<(Tag, SocketEvent)>) {
        for socket in &mut self.sockets {
            socket.outgoing = None;
        }
        let drained = async {
            while self.sockets.iter().any(|socket| socket.live) {
                match sockets.recv().await {
                    Some(((endpoint, number), SocketEvent::Closed(_))) => {
                        let socket = &mut self.sockets[index(endpoint)];
                        socket.live &= socket.number != number;
                    }
                    Some(_) => {}
                    None => break,
                }
            }
        };
        // What has not gone out by then is lost; the server finds out by itself.
        let _ = tokio::time::timeout(CLOSE_LIMIT, drained).await;
    }
}

fn index(endpoint: Endpoint) -> usize {
    match endpoint {
        Endpoint::Main => 0,
        Endpoint::Federated => 1,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
