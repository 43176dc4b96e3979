//! Where a server is: an origin, and the join link that a person is given.
//!
//! Separate because it is text alone, parsed before anything is dialled.

use std::net::IpAddr;

use super::diagnosis::printable;
use super::{Error, Fingerprint};

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
    pub(super) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    pub(super) fn is_loopback(&self) -> bool {
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

/// What a join link says: `https://HOST:PORT/?join=1#t=TOKEN&f=FINGERPRINT`, of which everything after the port may be absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinLink {
    pub origin: Origin,
    pub token: Option<String>,
    /// Of the server's certificate.
    pub fingerprint: Option<Fingerprint>,
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
        let said = |name: &str| {
            let mut parts = url.fragment().unwrap_or_default().split('&');
            parts
                .find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
                .filter(|value| !value.is_empty())
        };
        let fingerprint = said("f").map(str::parse::<Fingerprint>).transpose();
        Ok(Self {
            token: said("t").map(str::to_owned),
            fingerprint: fingerprint.map_err(|error| fail(&error.to_string(), Some(origin.to_string())))?,
            origin,
        })
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
        assert_eq!((link.token.as_deref(), link.fingerprint), (Some("abc-def"), None));
        let fingerprint = Fingerprint::of(b"a certificate");
        let link = format!("https://192.168.1.20:8443/?join=1#t=abc-def&f={fingerprint}");
        let link: JoinLink = link.parse().unwrap();
        assert_eq!(
            (link.token.as_deref(), link.fingerprint),
            (Some("abc-def"), Some(fingerprint))
        );
        assert!(matches!(
            "https://192.168.1.20:8443/#t=abc-def&f=half".parse::<JoinLink>(),
            Err(Error::Url { .. })
        ));
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
}
