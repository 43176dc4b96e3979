//! Who may come in: the join secret, and the tickets it is exchanged for.
//!
//! A ticket names its service, run, client, a serial number and when it expires, under an HMAC-SHA-256 (RFC 2104) whose
//! random key only the run's servers hold. Each connection is given the next serial; as soon as its bearer speaks, the
//! serial it came with is spent. Separate from the sessions because both services admit by the same rules.

use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::message::{Credential, Digest, RefusalReason, Service, Ticket};
use crate::terms::ids::{ClientId, RunId};

const BODY_BYTES: usize = 1 + 16 + 8 + 8 + 8;
const TICKET_BYTES: usize = BODY_BYTES + 32;

/// HMAC-SHA-256.
fn authenticate(key: &[u8; 32], message: &[u8]) -> [u8; 32] {
    const BLOCK_BYTES: usize = 64;
    let mut inner = [0x36_u8; BLOCK_BYTES];
    let mut outer = [0x5c_u8; BLOCK_BYTES];
    for (index, byte) in key.iter().enumerate() {
        inner[index] ^= byte;
        outer[index] ^= byte;
    }
    let digest = Sha256::new().chain_update(inner).chain_update(message).finalize();
    Sha256::new().chain_update(outer).chain_update(digest).finalize().into()
}

/// Compares in a time that does not depend on where the two differ.
fn equal_in_constant_time(left: &[u8; 32], right: &[u8; 32]) -> bool {
    let difference = left
        .iter()
        .zip(right)
        .fold(0, |difference, (left, right)| difference | (left ^ right));
    std::hint::black_box(difference) == 0
}

/// Compares two secrets through their digests, so that neither content nor length shows in the time taken.
fn same_secret(ours: &str, theirs: &str) -> bool {
    equal_in_constant_time(&Digest::of(ours.as_bytes()).0, &Digest::of(theirs.as_bytes()).0)
}

/// What a genuine ticket says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pass {
    pub client: ClientId,
    pub serial: u64,
}

/// How a bearer came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// By the secret, or where none is asked for: a client not seen before.
    New,
    /// By ticket: a client the run knows. Whether the serial is spent is for the session to say.
    Known(Pass),
}

/// Who may ask a main server over HTTP for what only the run's clients are to have. In memory of no request: what is asked
/// for changes nothing.
#[derive(Clone)]
pub struct Bearers {
    office: TicketOffice,
    secret: Option<String>,
}

/// What the bearer of a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bearer {
    /// A client of the run, by a ticket for the main service; or nobody in particular where no secret is asked for.
    Admitted,
    /// Said nothing, or a ticket of another run or time.
    Nobody,
    /// Says that this is the join secret.
    Guess,
}

impl Bearers {
    /// Those of the run with this ticket key and join secret.
    pub fn new(run: RunId, ticket_key: [u8; 32], secret: Option<String>) -> Bearers {
        // Tickets are issued elsewhere; one says itself when it expires.
        let lifetime = Duration::ZERO;
        let office = TicketOffice {
            run,
            key: ticket_key,
            lifetime,
        };
        Bearers { office, secret }
    }

    /// What a bearer is at `now` by the main session's clock, without comparing it with the secret.
    pub fn judge(&self, bearer: Option<&str>, now: Duration) -> Bearer {
        let Some(bearer) = bearer else {
            return if self.secret.is_none() {
                Bearer::Admitted
            } else {
                Bearer::Nobody
            };
        };
        match Ticket::from_bearer(bearer).filter(|ticket| ticket.0.len() == TICKET_BYTES) {
            Some(ticket) if self.office.check(Service::Main, &ticket, now).is_ok() => Bearer::Admitted,
            _ if self.secret.is_none() => Bearer::Admitted,
            Some(_) => Bearer::Nobody,
            None => Bearer::Guess,
        }
    }

    /// Whether a guess is right.
    pub fn is_secret(&self, guess: &str) -> bool {
        self.secret.as_deref().is_some_and(|secret| same_secret(secret, guess))
    }
}

/// Compares two secrets in a time that tells nothing of either.
pub fn is_same_secret(ours: &str, theirs: &str) -> bool {
    same_secret(ours, theirs)
}

/// Checks the join secret; `None` asks for none.
pub(super) fn check_secret(secret: Option<&str>, credential: &Credential) -> Result<(), RefusalReason> {
    match (secret, credential) {
        (None, _) => Ok(()),
        (Some(ours), Credential::Secret(theirs)) if same_secret(ours, theirs) => Ok(()),
        (Some(_), Credential::Secret(_)) => Err(RefusalReason::SecretWrong),
        (Some(_), Credential::None | Credential::Ticket(_)) => Err(RefusalReason::SecretMissing),
    }
}

/// Issues and checks the tickets of one run.
#[derive(Clone)]
pub(super) struct TicketOffice {
    pub run: RunId,
    pub key: [u8; 32],
    pub lifetime: Duration,
}

impl TicketOffice {
    /// A ticket good until `now` plus the lifetime, by the main server's clock.
    pub(crate) fn issue(&self, service: Service, pass: Pass, now: Duration) -> Ticket {
        let expires = u64::try_from((now + self.lifetime).as_micros()).unwrap_or(u64::MAX);
        let mut bytes = Vec::with_capacity(TICKET_BYTES);
        bytes.push(service_code(service));
        bytes.extend_from_slice(&self.run.0);
        bytes.extend_from_slice(&pass.client.0.to_le_bytes());
        bytes.extend_from_slice(&pass.serial.to_le_bytes());
        bytes.extend_from_slice(&expires.to_le_bytes());
        bytes.extend_from_slice(&authenticate(&self.key, &bytes));
        Ticket(bytes)
    }

    /// What the ticket says, if this run's servers issued it for `service` and it is still good at `now`.
    pub fn check(&self, service: Service, ticket: &Ticket, now: Duration) -> Result<Pass, RefusalReason> {
        let Some((body, mac)) = ticket.0.split_first_chunk::<BODY_BYTES>() else {
            return Err(RefusalReason::TicketForged);
        };
        let mac: [u8; 32] = mac.try_into().map_err(|_| RefusalReason::TicketForged)?;
        // The run is looked at first only to say which mistake was made; another run's key is not here to check with.
        if body[1..17] != self.run.0 {
            return Err(RefusalReason::TicketOtherRun);
        }
        if !equal_in_constant_time(&authenticate(&self.key, body), &mac) || body[0] != service_code(service) {
            return Err(RefusalReason::TicketForged);
        }
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&body[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        if Duration::from_micros(number(33)) <= now {
            return Err(RefusalReason::TicketExpired);
        }
        Ok(Pass {
            client: ClientId(number(17)),
            serial: number(25),
        })
    }
}

fn service_code(service: Service) -> u8 {
    match service {
        Service::Main => 0,
        Service::Federated => 1,
        Service::Control => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn office() -> TicketOffice {
        TicketOffice {
            run: RunId([7; 16]),
            key: [9; 32],
            lifetime: Duration::from_secs(60),
        }
    }

    #[test]
    fn hmac_agrees_with_rfc_4231_case_2() {
        let mut key = [0; 32];
        key[..4].copy_from_slice(b"Jefe");
        let mac = Digest(authenticate(&key, b"what do ya want for nothing?"));
        assert_eq!(
            mac.to_string(),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn a_ticket_is_good_for_its_service_run_and_time_only() {
        let pass = Pass {
            client: ClientId(3),
            serial: 5,
        };
        let ticket = office().issue(Service::Main, pass, Duration::from_secs(1));
        let check = |office: &TicketOffice, service, at| office.check(service, &ticket, Duration::from_secs(at));
        assert_eq!(check(&office(), Service::Main, 60), Ok(pass));
        assert_eq!(check(&office(), Service::Main, 61), Err(RefusalReason::TicketExpired));
        assert_eq!(
            check(&office(), Service::Federated, 2),
            Err(RefusalReason::TicketForged)
        );
        let other_run = TicketOffice {
            run: RunId([8; 16]),
            ..office()
        };
        assert_eq!(check(&other_run, Service::Main, 2), Err(RefusalReason::TicketOtherRun));
        let other_key = TicketOffice {
            key: [8; 32],
            ..office()
        };
        assert_eq!(check(&other_key, Service::Main, 2), Err(RefusalReason::TicketForged));
    }

    #[test]
    fn a_ticket_with_any_bit_changed_or_cut_is_refused() {
        let ticket = office().issue(
            Service::Main,
            Pass {
                client: ClientId(3),
                serial: 5,
            },
            Duration::ZERO,
        );
        for at in 0..ticket.0.len() {
            let mut changed = ticket.clone();
            changed.0[at] ^= 1;
            assert!(
                office().check(Service::Main, &changed, Duration::ZERO).is_err(),
                "byte {at}"
            );
            let cut = Ticket(ticket.0[..at].to_vec());
            assert_eq!(
                office().check(Service::Main, &cut, Duration::ZERO),
                Err(RefusalReason::TicketForged)
            );
        }
    }

    #[test]
    fn a_bearer_is_a_ticket_of_the_run_or_a_guess() {
        let pass = Pass {
            client: ClientId(3),
            serial: 5,
        };
        let (run, key) = (office().run, office().key);
        let bearers = Bearers::new(run, key, Some("s3cret".to_owned()));
        let ticket = |service| office().issue(service, pass, Duration::ZERO).to_bearer();
        let judge = |bearer: &str, at| bearers.judge(Some(bearer), Duration::from_secs(at));
        let main = ticket(Service::Main);
        assert_eq!(judge(&main, 59), Bearer::Admitted);
        assert_eq!(judge(&main, 60), Bearer::Nobody);
        assert_eq!(judge(&ticket(Service::Federated), 0), Bearer::Nobody);
        assert_eq!(judge(&main[2..], 0), Bearer::Guess);
        assert_eq!(judge("s3cret", 0), Bearer::Guess);
        assert!(bearers.is_secret("s3cret") && !bearers.is_secret("s3cre"));
        assert_eq!(bearers.judge(None, Duration::ZERO), Bearer::Nobody);
        let open = Bearers::new(run, key, None);
        assert_eq!(open.judge(None, Duration::ZERO), Bearer::Admitted);
        assert!(!open.is_secret(""));
    }

    #[test]
    fn the_secret_is_asked_for_only_where_there_is_one() {
        let given = |text: &str| Credential::Secret(text.to_owned());
        assert_eq!(check_secret(None, &Credential::None), Ok(()));
        assert_eq!(check_secret(None, &given("anything")), Ok(()));
        assert_eq!(check_secret(Some("s3cret"), &given("s3cret")), Ok(()));
        assert_eq!(
            check_secret(Some("s3cret"), &given("s3cre")),
            Err(RefusalReason::SecretWrong)
        );
        assert_eq!(
            check_secret(Some("s3cret"), &given("")),
            Err(RefusalReason::SecretWrong)
        );
        assert_eq!(
            check_secret(Some("s3cret"), &Credential::None),
            Err(RefusalReason::SecretMissing)
        );
    }
}
