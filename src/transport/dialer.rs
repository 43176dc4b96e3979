//! Opening connections: HTTP requests and WebSockets with one TLS configuration.
//!
//! Separate from `diagnosis`, which looks into what went wrong.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};

use super::diagnosis::{http_error, io_error, refused, tls_reason, without_tls};
use super::{ByteStream, CONNECT_TIMEOUT, Error, JoinLink, Origin, SERVER_HEADER, Trust};

/// Frames waiting to be sent or to be handled. The protocol answers before it asks again.
const QUEUED_FRAMES: usize = 64;
/// How often it is looked whether bytes have come.
const PART_INTERVAL: Duration = Duration::from_secs(1);
/// How long it is looked into what else answers at an address.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Opens HTTP requests and WebSockets with one TLS configuration.
#[derive(Clone, Debug)]
pub struct Dialer {
    trust: Trust,
    tls: Arc<ClientConfig>,
    http: reqwest::Client,
}

/// What becomes of a socket that [`Dialer::open`] was asked for.
#[derive(Debug)]
pub enum SocketEvent {
    /// It is open; frames go into the sender, and dropping that closes it.
    Opened(mpsc::Sender<Vec<u8>>),
    Frame(Vec<u8>),
    /// Bytes of a frame that is not whole yet have come. Said every second in which there were any.
    Part,
    /// It could not be opened, or is closed: the last event.
    Closed(Option<Error>),
}

impl Dialer {
    /// # Errors
    /// [`Error::Authority`] when the `--ca` file cannot be used.
    pub fn new(trust: &Trust) -> Result<Self, Error> {
        let tls = trust.client_config()?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls.clone())
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(Error::Http)?;
        Ok(Self {
            trust: trust.clone(),
            tls: Arc::new(tls),
            http,
        })
    }

    /// The dialer for the server that a link names. A link's fingerprint is all that counts, unless a person has said which
    /// certificates to accept; the fingerprint of another link counts for nothing here.
    ///
    /// # Errors
    /// [`Error::Tls`], [`Error::Http`].
    pub fn toward(&self, link: &JoinLink) -> Result<Self, Error> {
        match (link.fingerprint, &self.trust) {
            (Some(fingerprint), Trust::Known | Trust::Pinned(_)) => Self::new(&Trust::Pinned(fingerprint)),
            (None, Trust::Pinned(_)) => Self::new(&Trust::Known),
            _ => Ok(self.clone()),
        }
    }

    /// Starts to GET `path` (from `/`) from its byte `from` on, as the bearer of a credential, and gives the answer if it is a
    /// success; the body is still to be read. A server may begin at the first byte all the same: it then answers 200, not 206.
    ///
    /// # Errors
    /// [`Error`] names the address.
    pub async fn get(
        &self,
        origin: &Origin,
        path: &str,
        bearer: Option<&str>,
        from: u64,
    ) -> Result<reqwest::Response, Error> {
        let url = format!("{origin}{path}");
        let mut request = self.http.get(&url);
        if let Some(bearer) = bearer {
            request = request.bearer_auth(bearer);
        }
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let response = request.send().await.map_err(|error| http_error(&url, &error))?;
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
                Ok(tls) => ByteStream::new(tls),
                Err(error) => return Err(without_tls(origin, error).await),
            }
        } else {
            ByteStream::new(tcp)
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

pub(super) async fn connect(origin: &Origin) -> Result<TcpStream, Error> {
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

/// Moves frames both ways until either side ends.
async fn carry<T: Copy>(tag: T, socket: WebSocketStream<ByteStream>, events: &mpsc::Sender<(T, SocketEvent)>) {
    let (outgoing, mut queue) = mpsc::channel::<Vec<u8>>(QUEUED_FRAMES);
    if events.send((tag, SocketEvent::Opened(outgoing))).await.is_err() {
        return;
    }
    let received = socket.get_ref().received();
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
    let feeling = async {
        let mut known = 0;
        loop {
            // How often the session is told that bytes of an unfinished frame come; the stream itself speaks of whole ones only.
            tokio::time::sleep(PART_INTERVAL).await;
            let count = received.load(std::sync::atomic::Ordering::Relaxed);
            if std::mem::replace(&mut known, count) != count && events.send((tag, SocketEvent::Part)).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = writing => {}
        () = reading => {}
        () = feeling => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
    use tokio_tungstenite::tungstenite::http;

    use super::super::JoinLink;
    use super::*;

    #[tokio::test]
    async fn a_frame_that_comes_slowly_is_felt_before_it_is_whole() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let link: JoinLink = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let (events, mut heard) = mpsc::channel(8);
        let dialer = Dialer::new(&Trust::Known).unwrap();
        dialer.open((), &link.origin, "/main", 1 << 20, events);
        let (stream, _) = listener.accept().await.unwrap();
        #[expect(clippy::result_large_err, reason = "the library's own signature")]
        let greet = |_: &Request, mut response: Response| {
            let headers = response.headers_mut();
            headers.insert(SERVER_HEADER, http::HeaderValue::from_static("test"));
            Ok(response)
        };
        let socket = tokio_tungstenite::accept_hdr_async(stream, greet).await.unwrap();
        let Some(((), SocketEvent::Opened(_outgoing))) = heard.recv().await else {
            panic!("the socket did not open")
        };
        let mut stream = socket.into_inner();
        // A binary frame of 4 bytes, the half of it.
        stream.write_all(&[0x82, 4, 1, 2]).await.unwrap();
        assert!(matches!(heard.recv().await, Some(((), SocketEvent::Part))));
        stream.write_all(&[3, 4]).await.unwrap();
        let frame = loop {
            match heard.recv().await {
                Some(((), SocketEvent::Part)) => {}
                Some(((), SocketEvent::Frame(bytes))) => break bytes,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(frame, [1, 2, 3, 4]);
    }
}
