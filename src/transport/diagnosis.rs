//! What is wrong when a server does not answer as one should: who is there instead, in words that say what to do.
//!
//! Separate from dialling because none of it is needed when all is well.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::http;

use super::dialer::{PROBE_TIMEOUT, connect};
use super::trust::NotPinned;
use super::{Error, Origin, SERVER_HEADER, data_directory};

/// Why no TLS connection came about with `origin`, which may be no TLS server at all.
pub(super) async fn without_tls(origin: &Origin, error: io::Error) -> Error {
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
pub(super) fn printable(text: &str, most: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(most).collect()
}

/// What an answer means that opens no WebSocket.
pub(super) fn refused(url: String, path: &str, response: &http::Response<Option<Vec<u8>>>) -> Error {
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

/// The TLS error inside another.
pub(super) fn tls_reason(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

pub(super) fn io_error(url: &str, error: &io::Error) -> Error {
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
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) if other.0.is::<NotPinned>() => {
            Error::Pin { url }
        }
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

pub(super) fn http_error(url: &str, error: &reqwest::Error) -> Error {
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
