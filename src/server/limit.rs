//! How often one address may fail to authorise itself.
//!
//! It is separate from the sockets so that it can be tested with a given time, and from the sessions because those do not
//! know addresses.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// Failures that are forgiven within [`WINDOW`].
pub const ALLOWED_FAILURES: u32 = 10;
/// How long a failure counts.
pub const WINDOW: Duration = Duration::from_secs(60);
/// Addresses remembered at once; beyond it the one that failed longest ago is forgotten.
const MAX_ADDRESSES: usize = 4096;

/// Failed attempts per address. An IPv6 address counts with its /64, which one host usually owns whole.
#[derive(Debug, Default)]
pub struct FailureLimit {
    addresses: HashMap<IpAddr, Failures>,
}

#[derive(Clone, Copy, Debug)]
struct Failures {
    count: u32,
    /// When the window began.
    since: Duration,
}

impl FailureLimit {
    /// Whether `address` may try (again) at `now`; otherwise how long it has to wait.
    ///
    /// # Errors
    /// The time until it may.
    pub fn check(&self, address: IpAddr, now: Duration) -> Result<(), Duration> {
        match self.addresses.get(&source(address)) {
            Some(failures) if failures.count >= ALLOWED_FAILURES && now < failures.since + WINDOW => {
                Err(failures.since + WINDOW - now)
            }
            _ => Ok(()),
        }
    }

    /// Notes a failed attempt.
    pub fn failed(&mut self, address: IpAddr, now: Duration) {
        let address = source(address);
        if self.addresses.len() >= MAX_ADDRESSES && !self.addresses.contains_key(&address) {
            self.addresses.retain(|_, failures| now < failures.since + WINDOW);
            if self.addresses.len() >= MAX_ADDRESSES
                && let Some(oldest) = self
                    .addresses
                    .iter()
                    .min_by_key(|(_, failures)| failures.since)
                    .map(|(address, _)| *address)
            {
                self.addresses.remove(&oldest);
            }
        }
        let failures = self
            .addresses
            .entry(address)
            .or_insert(Failures { count: 0, since: now });
        if now >= failures.since + WINDOW {
            *failures = Failures { count: 0, since: now };
        }
        failures.count = failures.count.saturating_add(1);
    }
}

fn source(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => IpAddr::V4(v4),
            None => IpAddr::V6(Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    fn failed(limit: &mut FailureLimit, address: IpAddr, times: u32) {
        for _ in 0..times {
            limit.failed(address, NOW);
        }
    }

    #[test]
    fn an_address_that_keeps_failing_has_to_wait_and_others_do_not() {
        let mut limit = FailureLimit::default();
        let (guesser, other) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        failed(&mut limit, guesser, ALLOWED_FAILURES - 1);
        assert_eq!(limit.check(guesser, NOW), Ok(()));
        failed(&mut limit, guesser, 1);
        assert_eq!(limit.check(guesser, NOW), Err(WINDOW));
        assert_eq!(limit.check(other, NOW), Ok(()));
        assert_eq!(limit.check(guesser, NOW + WINDOW), Ok(()));
    }

    #[test]
    fn an_ipv6_host_cannot_escape_within_its_network() {
        let mut limit = FailureLimit::default();
        failed(&mut limit, "2001:db8::1".parse().unwrap(), ALLOWED_FAILURES);
        assert!(limit.check("2001:db8::2".parse().unwrap(), NOW).is_err());
        assert!(limit.check("2001:db8:0:1::2".parse().unwrap(), NOW).is_ok());
    }

    #[test]
    fn memory_stays_bounded() {
        let mut limit = FailureLimit::default();
        for number in 0..3 * MAX_ADDRESSES as u32 {
            limit.failed(IpAddr::V4(number.into()), NOW);
        }
        assert_eq!(limit.addresses.len(), MAX_ADDRESSES);
    }
}
