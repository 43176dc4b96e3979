//! The main server and the federated server: sockets, files and threads around their sessions. Native only.
//!
//! ```text
//! browser, native client ── http ── socket ──▶ coordinator ──▶ worker (a thread; the keeper of its side of the model)
//!                                                   │
//!                                  sessions of the protocol; metrics, store
//! ```
//! One task, the coordinator, owns the sessions; connections and the compute thread send it inputs and never wait for each
//! other; what they hand over is in `inbox`. A main server and a federated server in one process share the coordinator but not
//! their state: what passes between them is what would cross the link between two processes.

pub mod allocator;
mod clock;
mod coordinator;
mod descriptors;
mod gate;
mod host;
mod http;
mod inbox;
mod keeper;
mod kept;
mod limit;
pub mod listen;
pub mod metrics;
pub mod planner;
mod prepare;
mod socket;
pub mod store;
mod tls;
mod worker;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum_server::Handle;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use serde_json::json;
use tokio::sync::{mpsc, watch};

use crate::compute::Engine;
use crate::data::{DataError, Example};
use crate::disk;
use crate::model::adapter::{Adapter, AdapterError};
use crate::model::architecture::Architecture;
use crate::model::weights::{Holding, Weights, WeightsError};
use crate::protocol::message::{Digest, PROTOCOL_VERSION};
use crate::protocol::{
    ControlAccess, ControlConfig, ControlSession, Deadline, FederatedConfig, FederatedServerSession, MainError,
};
use crate::runs;
use crate::runs::directory::RunDirectory;
use crate::split::{self, Training};
use crate::terms::aggregation::Aggregation;
use crate::transport::{self, Dialer, Fingerprint, JoinLink};

use clock::RunClock;
use coordinator::{Coordinator, RemoteLink};
pub use coordinator::{Ending, Report, Summary};
pub use gate::Limits;
use gate::{Gate, GateKeeper};
pub use host::HostName;
use host::Hosts;
use inbox::Input;
pub use kept::Interrupted;
use listen::Bound;
pub use listen::Listen;
use metrics::Metrics;
use planner::Planner;
use prepare::{History, prepare};
use socket::Door;

/// Inputs waiting for the coordinator; connections wait beyond it.
const QUEUED_INPUTS: usize = 64;
/// Failed connections in a row to a federated server elsewhere before a main server gives up: about a minute.
const LINK_RETRIES: u32 = 8;
/// How long the HTTP server lets running downloads finish when the run is over.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// Why a server cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--listen {address}: {reason}")]
    Listen { address: String, reason: String },
    #[error(
        "--listen {address}: plain http is for loopback only, because training data would cross the network unencrypted; \
         use https://0.0.0.0:{port}, or http://127.0.0.1:{port}"
    )]
    PlainText { address: String, port: u16 },
    #[error("--listen {address}: port {port} is in use by another program; choose another port, or 0 for a free one")]
    Busy { address: String, port: u16 },
    #[error("`{0}` is no name of a server; write it like training.example.org, without a port")]
    Host(String),
    #[error("the server's certificate cannot be made: {0}")]
    Certificate(String),
    #[error(transparent)]
    Disk(#[from] disk::Error),
    #[error("the run in {path} cannot be taken up again: {reason}")]
    NoState { path: String, reason: String },
    #[error("the run in {path} cannot be taken up again with this model: {reason}")]
    OtherModel { path: String, reason: String },
    #[error(transparent)]
    Directory(#[from] runs::Error),
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    #[error("the HTTP server stopped: {0}")]
    Serve(io::Error),
    #[error(transparent)]
    Split(#[from] split::Error),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Run(#[from] MainError),
    #[error("--aggregate {0} does not go with this run's adapter, whose blocks differ; take --aggregate mean")]
    Aggregation(Aggregation),
    #[error("no plan for the run: {0}")]
    Planner(String),
    #[error(
        "the federated server at {0} refuses the control key; give the one that it prints when it starts with --control-key, \
         --control-key-file or SFLLLM_CONTROL_KEY"
    )]
    ControlKey(String),
    #[error("the federated server: {0}")]
    Federated(String),
    #[error(transparent)]
    Transport(#[from] transport::Error),
    #[error("the compute thread ended without a reason")]
    WorkerGone,
}

impl Error {
    fn file(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Disk(disk::Error::file(action, path, source))
    }
}

/// Which of the two servers this process is.
#[derive(Clone, Debug)]
pub enum Role {
    Both,
    /// With the federated server elsewhere; clients are sent there too.
    Main {
        federated: JoinLink,
        dialer: Dialer,
        /// What the federated server asks the main server for.
        control_key: String,
    },
    Federated {
        control_key: String,
        /// Main servers that aggregate otherwise are refused.
        aggregation: Option<Aggregation>,
    },
}

/// A frozen model, as clients get it and as this server runs its side of it.
pub struct Model {
    /// What an exported adapter says it belongs to.
    pub name: String,
    pub digest: Digest,
    pub architecture: Architecture,
    pub weights: Weights,
    pub holding: Holding,
    /// The `tokenizer.json` for clients; `None` when data comes as token ids only.
    pub tokenizer: Option<Vec<u8>>,
}

/// What a main server trains.
pub struct Run {
    pub model: Model,
    pub engine: Engine,
    pub training: Training,
    /// Blocks of the client.
    pub cut: usize,
    /// The whole model's adapter at the start.
    pub initial: Adapter,
    pub validation: Option<Vec<Example>>,
    pub rounds: u32,
    pub local_steps: u32,
    pub seed: u64,
    pub shuffle: bool,
    /// The first round starts when this many clients are ready.
    pub clients: u32,
    /// How long to wait for one to return when all have left.
    pub wait: Duration,
    /// How long members are waited for, and how many of them a step or a round goes on with then.
    pub deadline: Deadline,
    pub quorum: Option<u32>,
    /// How clients' adapters become one. What it says of the trained matrices is what `training` says.
    pub aggregation: Aggregation,
    /// Clients' own ranks, up to the run's, in turn by the order in which they join; none: that of the run.
    pub ranks: Vec<u32>,
    /// Chooses cut, rank and link rates as the run goes; without one they stay.
    pub planner: Option<Box<dyn Planner>>,
}

/// How to serve.
pub struct Settings {
    pub role: Role,
    pub listen: Vec<Listen>,
    /// The join secret; `None` lets everybody in.
    pub token: Option<String>,
    /// Who has it may see `/status` from other machines.
    pub operator: Option<String>,
    /// Names besides this machine's own by which browsers and clients call the server.
    pub hosts: Vec<HostName>,
    /// What connections may cost.
    pub limits: Limits,
    /// Where the certificate is kept.
    pub home: PathBuf,
    pub directory: RunDirectory,
    /// Served to tabs that join without a file of their own.
    pub demo_data: Cow<'static, [u8]>,
    /// For the main server.
    pub run: Option<Run>,
    /// The run is one that was interrupted.
    pub interrupted: Option<Box<Interrupted>>,
}

/// An address the server listens on.
#[derive(Clone, Debug)]
pub struct Address {
    /// As bound, such as `https://0.0.0.0:8443`.
    pub url: String,
    /// For this machine.
    pub local_url: String,
    /// For other machines, the likeliest first.
    pub network_urls: Vec<String>,
}

/// A server that listens.
pub struct Server {
    addresses: Vec<Address>,
    certificate_file: Option<PathBuf>,
    fingerprint: Option<Fingerprint>,
    patience: Duration,
    gate: Arc<Gate>,
    blobs: Option<PathBuf>,
    inputs: mpsc::Sender<Input>,
    coordinator: Coordinator,
    handles: Vec<Handle<SocketAddr>>,
    tasks: Vec<tokio::task::JoinHandle<io::Result<()>>>,
    site: Arc<http::Site>,
}

/// Ends a running server from elsewhere.
#[derive(Clone)]
pub struct Stopper(mpsc::Sender<Input>);

impl Stopper {
    /// Tells the clients and saves; `detail` is the reason they are given. [`Server::serve`] then returns.
    pub async fn stop(&self, detail: &str) {
        // If the coordinator is gone there is nothing left to stop.
        let _ = self.0.send(Input::Stop(detail.to_owned())).await;
    }
}

/// Whether this program holds the browser client's files.
pub fn has_browser_client() -> bool {
    !http::ASSETS.is_empty()
}

impl Server {
    /// Binds every address, prepares the certificate, hands the client's part of the model to the store and loads the server's.
    /// `report` is called with what happens.
    ///
    /// # Errors
    /// [`Error`] says what to do.
    pub async fn start(settings: Settings, report: Box<dyn Fn(Report) + Send>) -> Result<Self, Error> {
        let Settings {
            role,
            listen,
            token,
            operator,
            hosts,
            limits,
            home,
            mut directory,
            demo_data,
            run,
            mut interrupted,
        } = settings;
        let bound = listen.iter().map(Listen::bind).collect::<Result<Vec<_>, _>>()?;
        let identity = match bound.iter().any(|bound| bound.secure) {
            true => Some(tls::Identity::open(&home, &certificate_names(&listen))?),
            false => None,
        };
        let addresses: Vec<Address> = bound
            .iter()
            .map(|bound| Address {
                url: bound.url(),
                local_url: bound.local_url(),
                network_urls: bound.network_urls(),
            })
            .collect();
        directory.note(json!({ "addresses": addresses.iter().map(|address| &address.url).collect::<Vec<_>>() }))?;

        let clock = RunClock::new(
            interrupted
                .as_ref()
                .map_or(Duration::ZERO, |interrupted| interrupted.elapsed()),
        );
        let (inputs, queue) = mpsc::channel(QUEUED_INPUTS);
        let (status_sender, status) = watch::channel(http::starting());
        let guesses = Arc::new(Mutex::new(limit::GuessLimit::default()));
        let max_frame_bytes = Arc::new(AtomicUsize::new(socket::UNASSIGNED_FRAME_BYTES));
        let limits = limits.fit(descriptors::raise());
        let gate = Gate::new(limits.clone(), max_frame_bytes.clone());
        let asks_secret = token.is_some() || matches!(role, Role::Federated { .. });
        let metrics = match &interrupted {
            Some(interrupted) => Metrics::resume(directory.path(), interrupted.totals.metrics)?,
            None => Metrics::new(directory.path()),
        };
        let before = interrupted
            .as_mut()
            .map(|interrupted| (interrupted.totals.clone(), std::mem::take(&mut interrupted.damage)));
        let serves = (
            !matches!(role, Role::Federated { .. }),
            !matches!(role, Role::Main { .. }),
        );

        let (main, blobs, bearers) = match run {
            Some(run) => {
                let now = clock.now();
                let history = match interrupted {
                    Some(interrupted) => History::Interrupted(interrupted),
                    None => History::New,
                };
                let (main, blobs, bearers) = prepare(run, &role, token, &mut directory, inputs.clone(), history, now)?;
                (Some(main), Some(blobs), Some(bearers))
            }
            None => (None, None, None),
        };
        let blob_directory = blobs.as_ref().map(|_| directory.weights());
        let federated = serves.1.then(|| {
            let (control, aggregation) = match &role {
                Role::Federated {
                    control_key,
                    aggregation,
                } => (
                    ControlAccess::Remote {
                        secret: Some(control_key.clone()),
                    },
                    *aggregation,
                ),
                _ => (ControlAccess::Local, None),
            };
            FederatedServerSession::new(FederatedConfig {
                control,
                aggregation,
                ..FederatedConfig::default()
            })
        });
        let link = match role {
            Role::Main {
                federated,
                dialer,
                control_key,
            } => {
                let session = ControlSession::new(
                    ControlConfig {
                        version: PROTOCOL_VERSION,
                        secret: Some(control_key),
                        name: "main server".to_owned(),
                        retries: LINK_RETRIES,
                    },
                    clock.now(),
                );
                Some(RemoteLink::new(session, dialer, federated.origin))
            }
            _ => None,
        };
        let mut coordinator = Coordinator::new(coordinator::Parts {
            clock,
            queue,
            main,
            federated,
            link,
            directory,
            metrics,
            status: status_sender,
            guesses: guesses.clone(),
            asks_secret,
            gate: gate.clone(),
            max_frame_bytes: max_frame_bytes.clone(),
            report,
        });
        if let Some((totals, damage)) = before {
            coordinator.resume(&totals, &damage);
        }
        if let Err(error) = coordinator.ready().await {
            // Before the directory is given up, which is empty then.
            if let Some(blobs) = &blobs {
                blobs.remove();
            }
            return Err(error);
        }

        let site = Arc::new(http::Site {
            blobs,
            status,
            demo_data,
            door: Door::new(serves, inputs.clone(), max_frame_bytes, limits.clone()),
            hosts: Hosts::new(certificate_names(&listen), hosts),
            bearers,
            operator,
            guesses,
            clock,
        });
        let mut server = Self {
            addresses,
            certificate_file: identity.as_ref().map(|identity| identity.certificate_file.clone()),
            fingerprint: identity.as_ref().map(|identity| identity.fingerprint),
            patience: limits.patience,
            gate,
            blobs: blob_directory,
            inputs,
            coordinator,
            handles: Vec::new(),
            tasks: Vec::new(),
            site: site.clone(),
        };
        for bound in bound {
            server.listen(bound, identity.as_ref(), http::router(site.clone()))?;
        }
        server.coordinator.begin()?;
        Ok(server)
    }

    fn listen(&mut self, bound: Bound, identity: Option<&tls::Identity>, router: axum::Router) -> Result<(), Error> {
        let handle = Handle::new();
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        let keeper = GateKeeper(self.gate.clone());
        let task = match identity.filter(|_| bound.secure) {
            Some(identity) => {
                let config = RustlsConfig::from_config(identity.config.clone());
                let acceptor = RustlsAcceptor::new(config)
                    .handshake_timeout(self.patience)
                    .acceptor(keeper);
                let server = axum_server::from_tcp(bound.listener)
                    .map_err(Error::Serve)?
                    .acceptor(acceptor);
                tokio::spawn(server.handle(handle.clone()).serve(service))
            }
            None => {
                let server = axum_server::from_tcp(bound.listener)
                    .map_err(Error::Serve)?
                    .acceptor(keeper);
                tokio::spawn(server.handle(handle.clone()).serve(service))
            }
        };
        self.handles.push(handle);
        self.tasks.push(task);
        Ok(())
    }

    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// The certificate that clients elsewhere may be given for `--ca`.
    pub fn certificate_file(&self) -> Option<&Path> {
        self.certificate_file.as_deref()
    }

    /// Of the certificate, for links.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.fingerprint
    }

    /// Where the clients' part of the model lies by content hash, for clients on this machine.
    pub fn blobs(&self) -> Option<&Path> {
        self.blobs.as_deref()
    }

    pub fn stopper(&self) -> Stopper {
        Stopper(self.inputs.clone())
    }

    /// Serves until the run is over.
    ///
    /// # Errors
    /// [`Error`]; what was trained up to the last round is saved.
    pub async fn serve(self) -> Result<Summary, Error> {
        let Self {
            coordinator,
            handles,
            tasks,
            inputs,
            site,
            ..
        } = self;
        drop(inputs);
        let summary = coordinator.run().await;
        for handle in &handles {
            handle.graceful_shutdown(Some(SHUTDOWN_GRACE));
        }
        for task in tasks {
            if let Ok(Err(error)) = task.await {
                tracing::warn!("the HTTP server stopped: {error}");
            }
        }
        if let Some(blobs) = &site.blobs {
            blobs.remove();
        }
        summary
    }
}

/// What the certificate must be valid for: this machine's own names and those listened on.
fn certificate_names(listen: &[Listen]) -> BTreeSet<String> {
    let mut names = tls::local_names();
    names.extend(
        listen
            .iter()
            .map(|listen| listen.host.clone())
            .filter(|host| host != "0.0.0.0" && host != "::"),
    );
    names
}

/// A join secret that can be typed on a phone: eighty random bits, without letters that look alike.
pub fn generate_token() -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghjkmnpqrstuvwxyz023456789";
    let bytes: [u8; 16] = rand::random();
    let letters: Vec<u8> = bytes.iter().map(|byte| ALPHABET[usize::from(byte % 32)]).collect();
    let groups: Vec<&str> = letters
        .chunks(4)
        .filter_map(|group| std::str::from_utf8(group).ok())
        .collect();
    groups.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_typable_and_differ() {
        let token = generate_token();
        assert_eq!(token.len(), 19);
        assert!(
            token
                .bytes()
                .all(|byte| byte == b'-' || byte.is_ascii_lowercase() || byte.is_ascii_digit())
        );
        assert_ne!(token, generate_token());
    }
}
