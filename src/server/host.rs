//! By which names this server may be called.
//!
//! A page from elsewhere can have its own name resolve to this machine (DNS rebinding): the browser then takes this server for
//! the page's own, and only the `Host` header tells. Separate from `http` because it is a comparison of names and nothing else.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::str::FromStr;

use super::Error;

/// A name such as `training.example.org`, in lower case and without a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostName(String);

impl FromStr for HostName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        match name.len() <= 253 && name.split('.').all(is_label) {
            true => Ok(Self(name)),
            false => Err(Error::Host(text.to_owned())),
        }
    }
}

/// The names by which this server may be called. An address in numbers is always one: no page has it for a name that could be
/// made to mean another machine.
#[derive(Clone, Debug)]
pub(super) struct Hosts(BTreeSet<String>);

impl Hosts {
    /// `own` are this machine's names and those listened on, `more` what a person adds.
    pub fn new(own: impl IntoIterator<Item = String>, more: Vec<HostName>) -> Self {
        let own = own.into_iter().map(|name| name.to_ascii_lowercase());
        Self(own.chain(more.into_iter().map(|name| name.0)).collect())
    }

    /// Whether a `Host` header, which may have a port, means this server.
    pub fn has(&self, authority: &str) -> bool {
        let (host, port) = match authority.strip_prefix('[').map(|rest| rest.split_once(']')) {
            Some(Some((v6, port))) => return v6.parse::<IpAddr>().is_ok() && is_port(port.strip_prefix(':'), port),
            Some(None) => return false,
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        is_port(port, "") && (host.parse::<IpAddr>().is_ok() || self.0.contains(&name))
    }
}

/// Whether a port is one; without one nothing may stand in its place.
fn is_port(port: Option<&str>, instead: &str) -> bool {
    match port {
        Some(port) => port.parse::<u16>().is_ok(),
        None => instead.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_goes_by_its_own_names_and_by_numbers() {
        let own = ["localhost", "Laptop.local"].map(str::to_owned);
        let hosts = Hosts::new(own, vec!["Training.Example.org".parse().unwrap()]);
        for right in [
            "localhost",
            "localhost:8080",
            "LOCALHOST.:8080",
            "laptop.local",
            "training.example.org:443",
            "127.0.0.1:8080",
            "192.0.2.7",
            "[::1]:8080",
            "[2001:db8::7]",
        ] {
            assert!(hosts.has(right), "{right}");
        }
        for wrong in [
            "",
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "example.org",
            "localhost:80:80",
            "localhost:",
            "127.0.0.1.evil.example",
            "[::1",
            "[::1]x",
            "[localhost]",
            "127.0.0.1@evil.example",
        ] {
            assert!(!hosts.has(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_name_has_no_port_and_no_scheme() {
        for bad in ["", "https://a", "a:8443", "a b", ".", "a..b"] {
            assert!(bad.parse::<HostName>().is_err(), "{bad}");
        }
    }
}
