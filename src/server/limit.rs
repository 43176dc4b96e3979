//! How often one address may guess the join secret.
//!
//! It is separate from the sockets so that it can be tested with a given time, and from the sessions because those do not
//! know addresses. Tickets are no guesses: nobody finds one by trying, and who has one is known by it, whatever the address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// Wrong guesses that are answered at once.
pub const ALLOWED_GUESSES: u32 = 10;
/// After them, one more is answered every so often: people behind one address have to wait for each other, and are not shut out.
pub const INTERVAL: Duration = Duration::from_secs(6);
/// Addresses remembered at once; beyond it the one that may soonest guess freely is forgotten.
const MAX_ADDRESSES: usize = 4096;

/// Guesses per address, paid for before they are looked at, so that those under way count. An IPv6 address counts with its /64,
/// which one host usually owns whole.
#[derive(Debug, Default)]
pub struct GuessLimit {
    /// When each has paid for all its guesses.
    paid: HashMap<IpAddr, Duration>,
}

impl GuessLimit {
    /// Pays for a guess of `address` at `now`; otherwise says how long it has to wait.
    ///
    /// # Errors
    /// The time until it may guess.
    pub fn pay(&mut self, address: IpAddr, now: Duration) -> Result<(), Duration> {
        let address = source(address);
        let paid = self.paid.get(&address).copied().unwrap_or_default().max(now);
        let most = now + INTERVAL * (ALLOWED_GUESSES - 1);
        if paid > most {
            return Err(paid - most);
        }
        self.make_room(address, now);
        self.paid.insert(address, paid + INTERVAL);
        Ok(())
    }

    /// The guess was right, or was none: it costs nothing.
    pub fn pay_back(&mut self, address: IpAddr) {
        if let Some(paid) = self.paid.get_mut(&source(address)) {
            *paid = paid.saturating_sub(INTERVAL);
        }
    }

    fn make_room(&mut self, address: IpAddr, now: Duration) {
        if self.paid.len() < MAX_ADDRESSES || self.paid.contains_key(&address) {
            return;
        }
        self.paid.retain(|_, paid| *paid > now);
        if self.paid.len() >= MAX_ADDRESSES
            && let Some(first) = self.paid.iter().min_by_key(|(_, paid)| **paid).map(|(first, _)| *first)
        {
            self.paid.remove(&first);
        }
    }
}

/// What counts as one address.
pub(super) fn source(address: IpAddr) -> IpAddr {
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

    fn guesses(limit: &mut GuessLimit, address: IpAddr, times: u32) -> u32 {
        (0..times).filter(|_| limit.pay(address, NOW).is_ok()).count() as u32
    }

    #[test]
    fn an_address_that_keeps_guessing_has_to_wait_and_others_do_not() {
        let mut limit = GuessLimit::default();
        let (guesser, other) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        assert_eq!(guesses(&mut limit, guesser, 300), ALLOWED_GUESSES);
        assert_eq!(limit.pay(guesser, NOW), Err(INTERVAL));
        assert_eq!(limit.pay(other, NOW), Ok(()));
        assert_eq!(limit.pay(guesser, NOW + INTERVAL), Ok(()));
        assert_eq!(limit.pay(guesser, NOW + INTERVAL), Err(INTERVAL));
    }

    #[test]
    fn a_right_guess_costs_nothing() {
        let mut limit = GuessLimit::default();
        let address = "192.0.2.1".parse().unwrap();
        for _ in 0..100 {
            assert_eq!(limit.pay(address, NOW), Ok(()));
            limit.pay_back(address);
        }
        assert_eq!(guesses(&mut limit, address, 100), ALLOWED_GUESSES);
    }

    #[test]
    fn an_ipv6_host_cannot_escape_within_its_network() {
        let mut limit = GuessLimit::default();
        guesses(&mut limit, "2001:db8::1".parse().unwrap(), 100);
        assert!(limit.pay("2001:db8::2".parse().unwrap(), NOW).is_err());
        assert!(limit.pay("2001:db8:0:1::2".parse().unwrap(), NOW).is_ok());
    }

    #[test]
    fn memory_stays_bounded() {
        let mut limit = GuessLimit::default();
        for number in 0..3 * MAX_ADDRESSES as u32 {
            limit.pay(IpAddr::V4(number.into()), NOW).unwrap();
        }
        assert_eq!(limit.paid.len(), MAX_ADDRESSES);
    }
}
