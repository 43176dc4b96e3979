//! Where the server listens: the `--listen` addresses, their sockets, and the links other devices reach them by.
//!
//! It is separate from what is served so that every address is refused or bound before anything else starts.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::str::FromStr;

use qrcode::QrCode;
use qrcode::render::unicode::Dense1x2;

use super::Error;
use crate::transport::Fingerprint;

/// One `--listen` address: `https://HOST:PORT`, or `http://HOST:PORT` on loopback. Port 0 takes a free one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    pub secure: bool,
    pub host: String,
    pub port: u16,
}

impl FromStr for Listen {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |reason: &str| Error::Listen {
            address: text.to_owned(),
            reason: reason.to_owned(),
        };
        let (secure, rest) = match text.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            Some(_) => return Err(fail("it must begin with https:// or http://")),
            None => return Err(fail("it must begin with https:// (or http:// on loopback)")),
        };
        let rest = rest.trim_end_matches('/');
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, port),
            _ => return Err(fail("it must end with a port, such as :8443")),
        };
        let port = port
            .parse()
            .map_err(|_| fail("its port must be a number from 0 to 65535"))?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(v6) => v6,
            None if host.contains(':') => return Err(fail("an IPv6 address must be in brackets: https://[::]:8443")),
            None => host,
        };
        if host.is_empty() || host.contains(['/', '?', '#', '@', ' ', '[', ']']) {
            return Err(fail(
                "it names no host; 0.0.0.0 stands for all addresses of this machine",
            ));
        }
        Ok(Self {
            secure,
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "https" } else { "http" };
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}

/// A socket that listens.
#[derive(Debug)]
pub struct Bound {
    pub secure: bool,
    pub address: SocketAddr,
    pub listener: TcpListener,
}

impl Listen {
    /// Opens the socket.
    ///
    /// # Errors
    /// [`Error::PlainText`] for http beyond loopback, [`Error::Busy`] when the port is taken, [`Error::Listen`].
    pub fn bind(&self) -> Result<Bound, Error> {
        let fail = |reason: String| Error::Listen {
            address: self.to_string(),
            reason,
        };
        let addresses: Vec<SocketAddr> = (self.host.as_str(), self.port)
            .to_socket_addrs()
            .map_err(|error| fail(error.to_string()))?
            .collect();
        let address = *addresses
            .first()
            .ok_or_else(|| fail("the name has no address".to_owned()))?;
        if !self.secure && !addresses.iter().all(|address| address.ip().is_loopback()) {
            return Err(Error::PlainText {
                address: self.to_string(),
                port: self.port,
            });
        }
        let listener = TcpListener::bind(address).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => Error::Busy {
                address: self.to_string(),
                port: self.port,
            },
            io::ErrorKind::PermissionDenied => fail("this user may not open that port; take one above 1023".to_owned()),
            io::ErrorKind::AddrNotAvailable => fail("this machine has no such address".to_owned()),
            _ => fail(error.to_string()),
        })?;
        listener
            .set_nonblocking(true)
            .map_err(|error| fail(error.to_string()))?;
        let address = listener.local_addr().map_err(|error| fail(error.to_string()))?;
        Ok(Bound {
            secure: self.secure,
            address,
            listener,
        })
    }
}

impl Bound {
    /// `https://127.0.0.1:8443`, with the address as bound.
    pub fn url(&self) -> String {
        self.url_of(self.address.ip())
    }

    /// Whether only this machine can reach it.
    pub fn is_loopback(&self) -> bool {
        self.address.ip().is_loopback()
    }

    /// How a process on this machine reaches it.
    pub fn local_url(&self) -> String {
        self.url_of(match self.address.ip() {
            IpAddr::V4(address) if address.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(address) if address.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
            address => address,
        })
    }

    /// How other machines reach it, the likeliest address first; empty on loopback.
    pub fn network_urls(&self) -> Vec<String> {
        let ip = self.address.ip();
        if ip.is_loopback() {
            return Vec::new();
        }
        if !ip.is_unspecified() {
            return vec![self.url()];
        }
        let mut addresses: Vec<IpAddr> = if_addrs::get_if_addrs()
            .unwrap_or_default()
            .into_iter()
            .filter(|interface| !interface.is_loopback())
            .map(|interface| interface.ip())
            .filter(|address| match address {
                IpAddr::V4(address) => !address.is_link_local(),
                IpAddr::V6(address) => ip.is_ipv6() && !address.is_unicast_link_local(),
            })
            .collect();
        // Home networks number their devices in 192.168/16 and 10/8; containers mostly live in 172.16/12.
        addresses.sort_by_key(|address| match address {
            IpAddr::V4(address) => match address.octets() {
                [192, 168, ..] => 0,
                [10, ..] => 1,
                [172, 16..=31, ..] => 3,
                _ => 2,
            },
            IpAddr::V6(_) => 4,
        });
        addresses.into_iter().map(|address| self.url_of(address)).collect()
    }

    fn url_of(&self, ip: IpAddr) -> String {
        format!(
            "{}://{}",
            if self.secure { "https" } else { "http" },
            SocketAddr::new(ip, self.address.port())
        )
    }
}

/// The link that joins at once, with the token and the fingerprint of the server's certificate.
pub fn join_link(url: &str, token: Option<&str>, fingerprint: Option<Fingerprint>) -> String {
    format!("{url}/?join=1{}", link_fragment(token, fingerprint))
}

/// The end of a link, which browsers never send: `#t=TOKEN&f=FINGERPRINT`, as far as there are such.
pub fn link_fragment(token: Option<&str>, fingerprint: Option<Fingerprint>) -> String {
    let token = token.map(|token| format!("t={token}"));
    let fingerprint = fingerprint.map(|fingerprint| format!("f={fingerprint}"));
    let parts: Vec<String> = token.into_iter().chain(fingerprint).collect();
    match parts.is_empty() {
        true => String::new(),
        false => format!("#{}", parts.join("&")),
    }
}

/// `text` as a QR code of half-block characters for a terminal, or `None` when it is too long for one.
pub fn qr_code(text: &str) -> Option<String> {
    let code = QrCode::new(text.as_bytes()).ok()?;
    let blocks = code.render::<Dense1x2>().quiet_zone(true).build();
    // Black on white by escape codes, whatever the terminal's theme: not every camera reads an inverted code.
    let lines: Vec<String> = blocks
        .lines()
        .map(|line| format!("\x1b[38;5;16;48;5;231m{line}\x1b[0m"))
        .collect();
    Some(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::JoinLink;

    #[test]
    fn listen_addresses_are_urls_with_a_port() {
        let listen: Listen = "https://0.0.0.0:8443".parse().unwrap();
        assert_eq!(
            listen,
            Listen {
                secure: true,
                host: "0.0.0.0".to_owned(),
                port: 8443
            }
        );
        assert_eq!(
            "http://[::1]:0/".parse::<Listen>().unwrap().to_string(),
            "http://[::1]:0"
        );
        for bad in [
            "8443",
            "0.0.0.0:8443",
            "ftp://a:1",
            "https://host",
            "https://:1",
            "https://::1:8443",
            "https://a:70000",
            "https://[::1]",
        ] {
            assert!(matches!(bad.parse::<Listen>(), Err(Error::Listen { .. })), "{bad}");
        }
    }

    #[test]
    fn plain_http_is_refused_beyond_loopback() {
        let listen: Listen = "http://0.0.0.0:0".parse().unwrap();
        assert!(matches!(listen.bind(), Err(Error::PlainText { .. })));
        assert!("http://127.0.0.1:0".parse::<Listen>().unwrap().bind().is_ok());
    }

    #[test]
    fn a_busy_port_is_named() {
        let first = "http://127.0.0.1:0".parse::<Listen>().unwrap().bind().unwrap();
        let error = first.url().parse::<Listen>().unwrap().bind().unwrap_err();
        let port = first.address.port();
        assert!(
            matches!(error, Error::Busy { port: named, .. } if named == port),
            "{error}"
        );
    }

    #[test]
    fn a_socket_on_all_addresses_is_reached_by_loopback_here() {
        let bound = "https://0.0.0.0:0".parse::<Listen>().unwrap().bind().unwrap();
        assert_eq!(bound.local_url(), format!("https://127.0.0.1:{}", bound.address.port()));
        assert!(
            bound
                .network_urls()
                .iter()
                .all(|url| !url.contains("0.0.0.0") && !url.contains("127.0.0.1"))
        );
    }

    #[test]
    fn the_join_link_keeps_token_and_fingerprint_in_the_fragment() {
        assert_eq!(
            join_link("https://10.0.0.2:8443", Some("tok"), None),
            "https://10.0.0.2:8443/?join=1#t=tok"
        );
        assert_eq!(
            join_link("http://127.0.0.1:8080", None, None),
            "http://127.0.0.1:8080/?join=1"
        );
        let fingerprint = Fingerprint::of(b"a certificate");
        let link = join_link(
            "https://192.168.100.200:8443",
            Some("abcd-efgh-jkmn-pqrs"),
            Some(fingerprint),
        );
        let read: JoinLink = link.parse().unwrap();
        assert_eq!(
            (read.token.as_deref(), read.fingerprint),
            (Some("abcd-efgh-jkmn-pqrs"), Some(fingerprint))
        );
        let code = qr_code(&link).unwrap();
        assert!(code.lines().all(|line| line.chars().count() < 90) && code.contains('█'));
    }
}
