//! Outgoing connections of a native process: the join link, which certificates to trust, HTTP and WebSockets.
//!
//! It is separate from the client and the servers because both dial (a client its servers, a main server a federated
//! server elsewhere), and from the protocol because that knows bytes only. Native only.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message, http};

/// Frames waiting to be sent or to be handled. The protocol answers before it asks again.
const QUEUED_FRAMES: usize = 64;
/// How long a connection may take to open before it counts as failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it is looked into what else answers at an address.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// By this header of its answers an sflllm server is told from others.
pub const SERVER_HEADER: &str = "x-sflllm";

/// Why a server could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{url}` is no address of a server: {reason}; write it like {like}")]
    Url { url: String, reason: String, like: String },
    #[error(
        "http://{host} would send training data over the network unencrypted; use the server's https:// address \
         (plain http is accepted on this machine's loopback address only)"
    )]
    PlainText { host: String },
    #[error("no server answers at {url} (connection refused); is `sflllm serve` running there, on this port?")]
    Refused { url: String },
    #[error("{url} does not answer within {} s; check the address, and that a firewall lets the port through", CONNECT_TIMEOUT.as_secs())]
    TimedOut { url: String },
    #[error(
        "the certificate of {url} is not known here ({reason}); copy the server's certificate file \
         ({home}/tls/certificate.pem there) and give it with --ca FILE, or accept any certificate with --insecure-tls"
    )]
    Certificate { url: String, reason: String, home: String },
    #[error("cannot reach {url}: {reason}")]
    Unreachable { url: String, reason: String },
    #[error("the name in {url} is not known here; check how it is spelled, or use the server's address in numbers")]
    UnknownHost { url: String },
    #[error("{url} does not answer plain http: a server that speaks TLS is there; use {https}")]
    NeedsTls { url: String, https: String },
    #[error(
        "{url} does not answer TLS: an sflllm server without it is there; use {http} on that machine, or start it with --listen https://"
    )]
    NoTls { url: String, http: String },
    #[error(
        "another program answers at {url}{detail}, no sflllm server; check the address and the port: `sflllm serve` prints its link"
    )]
    NotSflllm { url: String, detail: String },
    #[error("{url} sends visitors on to {to}; use that address")]
    Redirect { url: String, to: String },
    #[error("the sflllm server at {url} is no {service} server; the one that is prints its own link")]
    NoService { url: String, service: String },
    #[error("no TLS connection with {url} comes about: {reason}; check that both sides run the same version of sflllm")]
    Handshake { url: String, reason: String },
    #[error("{url} answered {status}{detail}")]
    Status { url: String, status: u16, detail: String },
    #[error("{path}: {reason}; --ca needs a file with PEM certificates")]
    Authority { path: String, reason: String },
    #[error("TLS cannot be set up: {0}")]
    Tls(rustls::Error),
    #[error("HTTP cannot be set up: {0}")]
    Http(reqwest::Error),
    #[error("no directory for this program's data: set SFLLLM_HOME, XDG_DATA_HOME or HOME")]
    NoHome,
}

impl From<rustls::Error> for Error {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error)
    }
}

impl Error {
    /// Whether trying again in a moment could help.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Refused { .. } | Error::TimedOut { .. } | Error::Unreachable { .. } | Error::UnknownHost { .. } => {
                true
            }
            Error::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }
}

/// Where this program keeps what outlives a run: `SFLLLM_HOME`, else `sflllm` in the user's data directory.
///
/// # Errors
/// [`Error::NoHome`] when the environment names none.
pub fn data_directory() -> Result<PathBuf, Error> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(home) = variable("SFLLLM_HOME") {
        return Ok(home);
    }
    let data = variable("XDG_DATA_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".local/share")))
        .or_else(|| variable("LOCALAPPDATA"));
    data.map(|data| data.join("sflllm")).ok_or(Error::NoHome)
}

/// Where downloaded model parts are kept, by their content's hash.
///
/// # Errors
/// [`Error::NoHome`] when the environment names no place.
pub fn cache_directory() -> Result<PathBuf, Error> {
    Ok(data_directory()?.join("weights"))
}

/// This machine's name in its network, in lower case.
pub fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("COMPUTERNAME").ok());
    let name = name.or_else(|| {
        let output = std::process::Command::new("hostname").output().ok()?;
        String::from_utf8(output.stdout).ok()
    })?;
    let name = name.trim().to_lowercase();
    let valid = !name.is_empty()
        && name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        });
    valid.then_some(name)
}

/// Scheme, host and port of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// https, and wss for WebSockets.
    pub secure: bool,
    /// A name or an address; IPv6 without brackets.
    pub host: String,
    pub port: u16,
}

impl Origin {
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}://{}",
            if self.secure { "https" } else { "http" },
            self.authority()
        )
    }
}

/// What a join link says: `https://HOST:PORT/?join=1#t=TOKEN`, of which everything after the port may be absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinLink {
    pub origin: Origin,
    pub token: Option<String>,
}

impl std::str::FromStr for JoinLink {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |reason: &str, like: Option<String>| Error::Url {
            url: printable(text, 200),
            reason: reason.to_owned(),
            like: like.unwrap_or_else(|| "https://192.168.1.20:8443".to_owned()),
        };
        if !text.contains("://") {
            let like = format!("https://{text}");
            let is_host = like.parse::<Self>().is_ok();
            return Err(fail(
                "it does not begin with https:// or http://",
                is_host.then_some(like),
            ));
        }
        let url = reqwest::Url::parse(text).map_err(|error| fail(&error.to_string(), None))?;
        let secure = match url.scheme() {
            "https" | "wss" => true,
            "http" | "ws" => false,
            other => return Err(fail(&format!("`{other}://` is neither https:// nor http://"), None)),
        };
        let host = url.host_str().ok_or_else(|| fail("it names no host", None))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = url
            .port_or_known_default()
            .ok_or_else(|| fail("it names no port", None))?;
        let origin = Origin { secure, host, port };
        if !origin.secure && !origin.is_loopback() {
            return Err(Error::PlainText {
                host: origin.authority(),
            });
        }
        // The page's own address is what a browser shows.
        if !matches!(url.path(), "/" | "" | "/index.html") {
            let reason = format!("a server is not at a path such as `{}`", printable(url.path(), 80));
            return Err(fail(&reason, Some(origin.to_string())));
        }
        let token = url.fragment().and_then(|fragment| {
            fragment
                .split('&')
                .find_map(|part| part.strip_prefix("t="))
                .filter(|token| !token.is_empty())
        });
        Ok(Self {
            origin,
            token: token.map(str::to_owned),
        })
    }
}

/// Which server certificates to accept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Those of the system's authorities, and that of this user's own server on this machine.
    #[default]
    Known,
    /// Those signed by, or equal to, the certificates in this PEM file.
    Authority(PathBuf),
    /// Any. An attacker on the network can then read and change everything.
    Anyone,
}

/// Opens HTTP requests and WebSockets with one TLS configuration.
#[derive(Clone, Debug)]
pub struct Dialer {
    tls: Arc<ClientConfig>,
    http: reqwest::Client,
}

/// What becomes of a socket that [`Dialer::open`] was asked for.
#[derive(Debug)]
pub enum SocketEvent {
    /// It is open; frames go into the sender, and dropping that closes it.
    Opened(mpsc::Sender<Vec<u8>>),
    Frame(Vec<u8>),
    /// It could not be opened, or is closed: the last event.
    Closed(Option<Error>),
}

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// A byte stream to a server, encrypted or not.
pub struct ByteStream(Box<dyn Bytes>);

impl AsyncRead for ByteStream {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut *self.0).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_shutdown(context)
    }
}

impl Dialer {
    /// # Errors
    /// [`Error::Authority`] when the `--ca` file cannot be used.
    pub fn new(trust: &Trust) -> Result<Self, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let mut tls = match trust {
            Trust::Known => builder.with_root_certificates(known_roots()).with_no_client_auth(),
            Trust::Authority(path) => builder.with_root_certificates(authority(path)?).with_no_client_auth(),
            Trust::Anyone => {
                let mut tls = builder
                    .with_root_certificates(RootCertStore::empty())
                    .with_no_client_auth();
                tls.dangerous()
                    .set_certificate_verifier(Arc::new(AnyCertificate(provider)));
                tls
            }
        };
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls.clone())
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(Error::Http)?;
        Ok(Self {
            tls: Arc::new(tls),
            http,
        })
    }

    /// Starts to GET `path` (from `/`), and gives the answer if it is a success; the body is still to be read.
    ///
    /// # Errors
    /// [`Error`] names the address.
    pub async fn get(&self, origin: &Origin, path: &str) -> Result<reqwest::Response, Error> {
        let url = format!("{origin}{path}");
        let response = self
            .http
            .get(&url)
            .send()
            .await
            .map_err(|error| http_error(&url, &error))?;
        let status = response.status();
        if !status.is_success() {
            return Err(Error::Status {
                url,
                status: status.as_u16(),
                detail: String::new(),
            });
        }
        Ok(response)
    }

    /// Opens the WebSocket at `path` (from `/`). Messages over `max_message` bytes break it.
    ///
    /// # Errors
    /// [`Error`] names the address.
    pub async fn websocket(
        &self,
        origin: &Origin,
        path: &str,
        max_message: usize,
    ) -> Result<WebSocketStream<ByteStream>, Error> {
        let opening = self.open_websocket(origin, path, max_message);
        match tokio::time::timeout(CONNECT_TIMEOUT, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(Error::TimedOut {
                url: origin.to_string(),
            }),
        }
    }

    /// Opens the WebSocket at `path` in a task of its own, which reports to `events` under `tag` until the socket is closed.
    pub fn open<T: Copy + Send + Sync + 'static>(
        &self,
        tag: T,
        origin: &Origin,
        path: &'static str,
        max_message: usize,
        events: mpsc::Sender<(T, SocketEvent)>,
    ) {
        let (dialer, origin) = (self.clone(), origin.clone());
        tokio::spawn(async move {
            let error = match dialer.websocket(&origin, path, max_message).await {
                Ok(socket) => {
                    carry(tag, socket, &events).await;
                    None
                }
                Err(error) => Some(error),
            };
            // Whoever asked may have gone.
            let _ = events.send((tag, SocketEvent::Closed(error))).await;
        });
    }

    async fn open_websocket(
        &self,
        origin: &Origin,
        path: &str,
        max_message: usize,
    ) -> Result<WebSocketStream<ByteStream>, Error> {
        let place = origin.to_string();
        let tcp = connect(origin).await?;
        let stream = if origin.secure {
            match self.handshake(origin, tcp).await? {
                Ok(tls) => ByteStream(Box::new(tls)),
                Err(error) => return Err(without_tls(origin, error).await),
            }
        } else {
            ByteStream(Box::new(tcp))
        };
        let config = WebSocketConfig::default()
            .max_message_size(Some(max_message))
            .max_frame_size(Some(max_message))
            .max_write_buffer_size(usize::MAX);
        let scheme = if origin.secure { "wss" } else { "ws" };
        let url = format!("{scheme}://{}{path}", origin.authority());
        match tokio_tungstenite::client_async_with_config(url, stream, Some(config)).await {
            Ok((socket, response)) if response.headers().contains_key(SERVER_HEADER) => Ok(socket),
            Ok(_) => Err(Error::NotSflllm {
                url: place,
                detail: String::new(),
            }),
            Err(WebSocketError::Http(response)) => Err(refused(place, path, &response)),
            // What a server that waits for TLS makes of plain text: nothing that could be read.
            Err(_) if !origin.secure && self.answers_tls(origin).await => Err(Error::NeedsTls {
                url: place,
                https: Origin {
                    secure: true,
                    ..origin.clone()
                }
                .to_string(),
            }),
            Err(WebSocketError::Io(error)) => Err(io_error(&place, &error)),
            // It answered, and not as a web server does.
            Err(_) => Err(Error::NotSflllm {
                url: place,
                detail: String::new(),
            }),
        }
    }

    /// The inner error is that of the handshake.
    async fn handshake(&self, origin: &Origin, tcp: TcpStream) -> Result<io::Result<TlsStream<TcpStream>>, Error> {
        let name = ServerName::try_from(origin.host.clone()).map_err(|_| Error::UnknownHost {
            url: origin.to_string(),
        })?;
        let connector = tokio_rustls::TlsConnector::from(self.tls.clone());
        Ok(connector.connect(name, tcp).await)
    }

    /// Whether a TLS server is there, whatever its certificate.
    async fn answers_tls(&self, origin: &Origin) -> bool {
        let Ok(anyone) = Self::new(&Trust::Anyone) else {
            return false;
        };
        let asking = async {
            let tcp = connect(origin).await?;
            anyone.handshake(origin, tcp).await
        };
        match tokio::time::timeout(PROBE_TIMEOUT, asking).await {
            Ok(Ok(Ok(_))) => true,
            Ok(Ok(Err(error))) => matches!(tls_reason(&error), Some(rustls::Error::AlertReceived(_))),
            _ => false,
        }
    }
}

async fn connect(origin: &Origin) -> Result<TcpStream, Error> {
    let place = origin.to_string();
    let found = tokio::net::lookup_host((origin.host.as_str(), origin.port)).await;
    let addresses: Vec<SocketAddr> = found.map_or_else(|_| Vec::new(), Iterator::collect);
    if addresses.is_empty() {
        return Err(Error::UnknownHost { url: place });
    }
    let tcp = TcpStream::connect(&addresses[..])
        .await
        .map_err(|error| io_error(&place, &error))?;
    // Frames are written whole; waiting to fill a packet only delays a step.
    tcp.set_nodelay(true).map_err(|error| io_error(&place, &error))?;
    Ok(tcp)
}

/// Why no TLS connection came about with `origin`, which may be no TLS server at all.
async fn without_tls(origin: &Origin, error: io::Error) -> Error {
    let place = origin.to_string();
    let is_answer = matches!(
        tls_reason(&error),
        Some(
            rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_) | rustls::Error::PeerIncompatible(_)
        )
    );
    if is_answer {
        return io_error(&place, &error);
    }
    match plain_answer(origin).await {
        // It closed the connection: a server that is just ending, perhaps.
        None if tls_reason(&error).is_none() => io_error(&place, &error),
        Some(head) if header(&head, SERVER_HEADER).is_some() => Error::NoTls {
            url: place,
            http: Origin {
                secure: false,
                ..origin.clone()
            }
            .to_string(),
        },
        answer => Error::NotSflllm {
            url: place,
            detail: called(answer.as_deref().and_then(|head| header(head, "server"))),
        },
    }
}

/// What a web server without TLS says of itself: the head of its answer.
async fn plain_answer(origin: &Origin) -> Option<String> {
    let asking = async {
        let mut tcp = connect(origin).await.ok()?;
        let request = format!(
            "GET /status HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            origin.authority()
        );
        tcp.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        // A head is shorter; what comes after it does not matter.
        tcp.take(16 << 10).read_to_end(&mut answer).await.ok()?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let head = answer.split("\r\n\r\n").next().unwrap_or_default();
        head.starts_with("HTTP/").then(|| head.to_owned())
    };
    tokio::time::timeout(PROBE_TIMEOUT, asking).await.ok().flatten()
}

/// A field of an answer's head.
fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(field, _)| field.eq_ignore_ascii_case(name))?;
    Some(value.trim())
}

/// ` (nginx)`, or nothing.
fn called(name: Option<&str>) -> String {
    match name.map(|name| printable(name, 60)) {
        Some(name) if !name.is_empty() => format!(" ({name})"),
        _ => String::new(),
    }
}

/// The start of a text from elsewhere, without what a terminal would act on.
fn printable(text: &str, most: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(most).collect()
}

/// What an answer means that opens no WebSocket.
fn refused(url: String, path: &str, response: &http::Response<Option<Vec<u8>>>) -> Error {
    let status = response.status().as_u16();
    let field = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    let is_sflllm = field(SERVER_HEADER).is_some();
    match status {
        404 if is_sflllm => Error::NoService {
            url,
            service: path.trim_start_matches('/').to_owned(),
        },
        _ if is_sflllm => {
            let body = response.body().as_deref().unwrap_or_default();
            let text = printable(String::from_utf8_lossy(body).trim(), 200);
            let detail = match text.is_empty() {
                true => text,
                false => format!(": {text}"),
            };
            Error::Status { url, status, detail }
        }
        300..400 if field("location").is_some() => Error::Redirect {
            url,
            to: printable(field("location").unwrap_or_default(), 200),
        },
        // Something between here and the server has no answer for now.
        429 | 500.. => Error::Status {
            url,
            status,
            detail: called(field("server")),
        },
        _ => Error::NotSflllm {
            url,
            detail: called(field("server")),
        },
    }
}

/// Moves frames both ways until either side ends.
async fn carry<T: Copy>(tag: T, socket: WebSocketStream<ByteStream>, events: &mpsc::Sender<(T, SocketEvent)>) {
    let (outgoing, mut queue) = mpsc::channel::<Vec<u8>>(QUEUED_FRAMES);
    if events.send((tag, SocketEvent::Opened(outgoing))).await.is_err() {
        return;
    }
    let (mut sink, mut stream) = socket.split();
    let writing = async {
        while let Some(bytes) = queue.recv().await {
            if sink.send(Message::Binary(bytes.into())).await.is_err() {
                return;
            }
        }
        // The peer may already be gone.
        let _ = tokio::time::timeout(Duration::from_secs(1), sink.close()).await;
    };
    let reading = async {
        while let Some(Ok(message)) = stream.next().await {
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Close(_) => return,
                _ => continue,
            };
            if events.send((tag, SocketEvent::Frame(bytes.into()))).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = writing => {}
        () = reading => {}
    }
}

/// The TLS error inside another.
fn tls_reason(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

fn io_error(url: &str, error: &io::Error) -> Error {
    let url = url.to_owned();
    if let Some(tls) = tls_reason(error) {
        return tls_error(url, tls);
    }
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Error::Refused { url },
        io::ErrorKind::TimedOut => Error::TimedOut { url },
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            Error::Unreachable {
                url,
                reason: "the connection was closed at once; is an sflllm server there?".to_owned(),
            }
        }
        _ => Error::Unreachable {
            url,
            reason: error.to_string(),
        },
    }
}

fn tls_error(url: String, error: &rustls::Error) -> Error {
    match error {
        rustls::Error::InvalidCertificate(reason) => {
            let home = data_directory().map_or_else(|_| "SFLLLM_HOME".to_owned(), |home| home.display().to_string());
            let reason = match reason {
                rustls::CertificateError::UnknownIssuer => "it was signed by nobody trusted here".to_owned(),
                other => other.to_string(),
            };
            Error::Certificate { url, reason, home }
        }
        other => Error::Handshake {
            url,
            reason: other.to_string(),
        },
    }
}

fn http_error(url: &str, error: &reqwest::Error) -> Error {
    let mut source = std::error::Error::source(error);
    let mut deepest = error.to_string();
    while let Some(inner) = source {
        // hyper wraps the operating system's error several times over.
        if let Some(io) = inner.downcast_ref::<io::Error>()
            && (io.kind() == io::ErrorKind::ConnectionRefused
                || io.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()))
        {
            return io_error(url, io);
        }
        if let Some(tls) = inner.downcast_ref::<rustls::Error>() {
            return tls_error(url.to_owned(), tls);
        }
        deepest = inner.to_string();
        source = inner.source();
    }
    if error.is_timeout() {
        return Error::TimedOut { url: url.to_owned() };
    }
    Error::Unreachable {
        url: url.to_owned(),
        reason: deepest,
    }
}

/// The certificates in a PEM file.
fn authority(path: &Path) -> Result<RootCertStore, Error> {
    let fail = |reason: String| Error::Authority {
        path: path.display().to_string(),
        reason,
    };
    let pem = std::fs::read(path).map_err(|error| fail(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| fail(error.to_string()))?;
        roots.add(certificate).map_err(|error| fail(error.to_string()))?;
    }
    if roots.is_empty() {
        Err(fail("it holds no certificate".to_owned()))
    } else {
        Ok(roots)
    }
}

fn known_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Ok(home) = data_directory()
        && let Ok(own) = authority(&home.join("tls/certificate.pem"))
    {
        roots.roots.extend(own.roots);
    }
    roots
}

/// Accepts every certificate, but still only from whoever holds its key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_link_names_origin_and_token() {
        let link: JoinLink = "https://192.168.1.20:8443/?join=1#t=abc-def".parse().unwrap();
        assert_eq!(
            link.origin,
            Origin {
                secure: true,
                host: "192.168.1.20".to_owned(),
                port: 8443
            }
        );
        assert_eq!(link.token.as_deref(), Some("abc-def"));
        let link: JoinLink = "http://[::1]:8080".parse().unwrap();
        assert_eq!(
            (link.origin.to_string().as_str(), link.token),
            ("http://[::1]:8080", None)
        );
    }

    #[test]
    fn plain_text_is_for_loopback_only() {
        assert!("http://localhost:8080".parse::<JoinLink>().is_ok());
        assert!(matches!(
            "http://192.168.1.20:8080".parse::<JoinLink>(),
            Err(Error::PlainText { .. })
        ));
        assert!(matches!("ftp://host:1".parse::<JoinLink>(), Err(Error::Url { .. })));
        assert!(matches!("host:8443".parse::<JoinLink>(), Err(Error::Url { .. })));
    }

    #[test]
    fn an_authority_file_must_hold_a_certificate() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trust = Trust::Authority(file.path().to_owned());
        assert!(matches!(Dialer::new(&trust), Err(Error::Authority { .. })));
    }
}
