//! Outgoing connections of a native process: the join link, which certificates to trust, HTTP and WebSockets.
//!
//! It is separate from the client and the servers because both dial (a client its servers, a main server a federated
//! server elsewhere), and from the protocol because that knows bytes only. Native only.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

/// Frames waiting to be sent or to be handled. The protocol answers before it asks again.
const QUEUED_FRAMES: usize = 64;
/// How long a connection may take to open before it counts as failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a server could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{url}` is no address of a server: {reason}; write it like https://192.168.1.20:8443")]
    Url { url: String, reason: String },
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
            Error::Refused { .. } | Error::TimedOut { .. } | Error::Unreachable { .. } => true,
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
        let fail = |reason: &str| Error::Url {
            url: text.chars().take(200).collect(),
            reason: reason.to_owned(),
        };
        let url = reqwest::Url::parse(text).map_err(|error| fail(&error.to_string()))?;
        let secure = match url.scheme() {
            "https" | "wss" => true,
            "http" | "ws" => false,
            other => return Err(fail(&format!("`{other}://` is neither https:// nor http://"))),
        };
        let host = url.host_str().ok_or_else(|| fail("it names no host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = url.port_or_known_default().ok_or_else(|| fail("it names no port"))?;
        let origin = Origin { secure, host, port };
        if !origin.secure && !origin.is_loopback() {
            return Err(Error::PlainText {
                host: origin.authority(),
            });
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
        let url = format!(
            "{}://{}{path}",
            if origin.secure { "wss" } else { "ws" },
            origin.authority()
        );
        let opening = self.open_websocket(origin, &url, max_message);
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
        url: &str,
        max_message: usize,
    ) -> Result<WebSocketStream<ByteStream>, Error> {
        let place = origin.to_string();
        let tcp = TcpStream::connect((origin.host.as_str(), origin.port))
            .await
            .map_err(|error| io_error(&place, &error))?;
        // Frames are written whole; waiting to fill a packet only delays a step.
        tcp.set_nodelay(true).map_err(|error| io_error(&place, &error))?;
        let stream = if origin.secure {
            let name = ServerName::try_from(origin.host.clone()).map_err(|error| Error::Url {
                url: place.clone(),
                reason: error.to_string(),
            })?;
            let tls = tokio_rustls::TlsConnector::from(self.tls.clone())
                .connect(name, tcp)
                .await
                .map_err(|error| io_error(&place, &error))?;
            ByteStream(Box::new(tls))
        } else {
            ByteStream(Box::new(tcp))
        };
        let config = WebSocketConfig::default()
            .max_message_size(Some(max_message))
            .max_frame_size(Some(max_message))
            .max_write_buffer_size(usize::MAX);
        match tokio_tungstenite::client_async_with_config(url, stream, Some(config)).await {
            Ok((socket, _)) => Ok(socket),
            Err(tokio_tungstenite::tungstenite::Error::Http(response)) => {
                let detail = response.body().as_ref().map(|body| {
                    let text: String = String::from_utf8_lossy(body).trim().chars().take(200).collect();
                    format!(": {text}")
                });
                Err(Error::Status {
                    url: url.to_owned(),
                    status: response.status().as_u16(),
                    detail: detail.unwrap_or_default(),
                })
            }
            Err(tokio_tungstenite::tungstenite::Error::Io(error)) => Err(io_error(&place, &error)),
            Err(error) => Err(Error::Unreachable {
                url: place,
                reason: error.to_string(),
            }),
        }
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

fn io_error(url: &str, error: &io::Error) -> Error {
    let url = url.to_owned();
    if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        return tls_error(url, tls);
    }
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Error::Refused { url },
        io::ErrorKind::TimedOut => Error::TimedOut { url },
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
        other => Error::Unreachable {
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
