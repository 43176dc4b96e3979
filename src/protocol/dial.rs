//! The dialling side of a connection: greeting, retry with growing pauses, then a `Link`.
//!
//! Separate from the sessions because a client has two such connections and a main server one, all alike.

use std::collections::VecDeque;
use std::time::Duration;

use super::codec::{Answer, GreetingError, decode_answer, encode_hello, is_greeting};
use super::link::{Link, LinkError};
use super::message::{Hello, Message, Refused, Version, Welcome};

/// A greeting without an answer is repeated this often …
const GREETING_INTERVAL: Duration = Duration::from_secs(2);
/// … and given up after this many times.
const GREETINGS: u32 = 6;

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How long a server that cannot be reached is dialled again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// So many times, one after another.
    Attempts(u32),
    /// For so long after the first failure.
    For(Duration),
}

/// When a connection that failed is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Retry {
    pub at: Duration,
    /// The first failure since the connection was last of use.
    pub since: Duration,
}

/// What the other side did that ends the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionFault {
    #[error(transparent)]
    Greeting(#[from] GreetingError),
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl ConnectionFault {
    /// Whether it is the way that is at fault, and not the other side: another connection may be better.
    pub(super) fn is_damage(&self) -> bool {
        matches!(self, ConnectionFault::Link(error) if error.is_damage())
    }
}

/// What a frame brought.
#[derive(Debug)]
pub(super) enum Heard {
    Nothing,
    Welcome(Box<Welcome>),
    Refused(Refused),
    Message(Message),
}

/// What the clock brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tick {
    Nothing,
    /// Open a socket now.
    Dial,
    /// The other side is silent; the socket is to be closed.
    Gone,
}

enum State {
    Idle,
    Pausing {
        until: Duration,
    },
    Opening,
    Greeting {
        hello: Vec<u8>,
        again_at: Duration,
        left: u32,
    },
    Up(Box<Link>),
}

pub(super) struct Dialer {
    version: Version,
    patience: Patience,
    /// Of the pauses' lengths.
    random: u64,
    failures: u32,
    failing_since: Option<Duration>,
    state: State,
    outbox: VecDeque<Vec<u8>>,
}

impl Dialer {
    /// Dialers of different seeds pause for different times, so that the clients of a server that was away do not all come back
    /// at once.
    pub fn new(version: Version, patience: Patience, seed: u64) -> Dialer {
        Dialer {
            version,
            patience,
            random: seed,
            failures: 0,
            failing_since: None,
            state: State::Idle,
            outbox: VecDeque::new(),
        }
    }

    /// Dials at the first timeout from `at` on.
    pub fn start(&mut self, at: Duration) {
        self.state = State::Pausing { until: at };
    }

    /// Forgets the connection. Returns whether there was a socket to close.
    pub(crate) fn hang_up(&mut self) -> bool {
        self.outbox.clear();
        let before = std::mem::replace(&mut self.state, State::Idle);
        !matches!(before, State::Idle | State::Pausing { .. })
    }

    /// The connection failed: pauses before the next attempt and returns when that will be, or `None` when patience is at
    /// its end.
    pub fn retry(&mut self, now: Duration) -> Option<Retry> {
        self.hang_up();
        let since = *self.failing_since.get_or_insert(now);
        let is_over = match self.patience {
            Patience::Attempts(attempts) => self.failures >= attempts,
            Patience::For(length) => now.saturating_sub(since) >= length,
        };
        if is_over {
            return None;
        }
        let pause = FIRST_PAUSE
            .saturating_mul(1 << self.failures.min(16))
            .min(LONGEST_PAUSE);
        // From half the pause to all of it.
        let share = (splitmix(&mut self.random) >> 11) as f64 / (1_u64 << 53) as f64;
        let at = now + pause.mul_f64(0.5 + 0.5 * share);
        self.failures += 1;
        self.state = State::Pausing { until: at };
        Some(Retry { at, since })
    }

    /// The connection has proved useful: failures are counted from zero again.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
        self.failing_since = None;
    }

    /// Whether a socket has been asked for and not yet opened.
    pub(crate) fn is_opening(&self) -> bool {
        matches!(self.state, State::Opening)
    }

    /// Whether there is a socket, or one has been asked for.
    pub(crate) fn has_socket(&self) -> bool {
        matches!(self.state, State::Opening | State::Greeting { .. } | State::Up(_))
    }

    pub fn link(&mut self) -> Option<&mut Link> {
        match &mut self.state {
            State::Up(link) => Some(link),
            _ => None,
        }
    }

    /// Bytes of a frame that is not whole yet have come.
    pub(crate) fn hear_part(&mut self) {
        if let Some(link) = self.link() {
            link.hear();
        }
    }

    /// Lets go at once what waits for the emulated uplink.
    pub fn flush(&mut self) {
        if let Some(link) = self.link() {
            link.flush();
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    /// The socket is open: greets.
    pub fn greet(&mut self, now: Duration, hello: &Hello) {
        let hello = encode_hello(hello);
        self.outbox.push_back(hello.clone());
        self.state = State::Greeting {
            hello,
            again_at: now + GREETING_INTERVAL,
            left: GREETINGS - 1,
        };
    }

    /// Takes in a frame. `limit` is the largest frame once the connection is up.
    pub fn handle_frame(&mut self, now: Duration, bytes: &[u8], limit: usize) -> Result<Heard, ConnectionFault> {
        match &mut self.state {
            // A message that overtook the welcome comes again; so may the welcome itself.
            State::Greeting { .. } if !is_greeting(bytes) => Ok(Heard::Nothing),
            State::Up(_) if is_greeting(bytes) => Ok(Heard::Nothing),
            State::Greeting { .. } => match decode_answer(self.version, bytes)? {
                Answer::Welcome(welcome) => {
                    self.state = State::Up(Box::new(
                        Link::new(now, welcome.ping_interval, limit).speaking(welcome.version),
                    ));
                    Ok(Heard::Welcome(Box::new(welcome)))
                }
                Answer::Refused(refused) => Ok(Heard::Refused(refused)),
            },
            State::Up(link) => match link.handle_frame(bytes)? {
                _ if link.is_overdue() => Err(LinkError::Unacknowledged.into()),
                Some(message) => Ok(Heard::Message(message)),
                None => Ok(Heard::Nothing),
            },
            State::Idle | State::Pausing { .. } | State::Opening => Ok(Heard::Nothing),
        }
    }

    pub fn handle_timeout(&mut self, now: Duration) -> Tick {
        match &mut self.state {
            State::Pausing { until } if *until <= now => {
                self.state = State::Opening;
                Tick::Dial
            }
            State::Greeting { hello, again_at, left } if *again_at <= now => {
                if *left == 0 {
                    return Tick::Gone;
                }
                *left -= 1;
                *again_at = now + GREETING_INTERVAL;
                self.outbox.push_back(hello.clone());
                Tick::Nothing
            }
            State::Up(link) => {
                if link.handle_timeout(now) {
                    Tick::Gone
                } else {
                    Tick::Nothing
                }
            }
            _ => Tick::Nothing,
        }
    }

    pub(crate) fn poll_frame(&mut self) -> Option<Vec<u8>> {
        match &mut self.state {
            State::Up(link) => self.outbox.pop_front().or_else(|| link.poll_frame()),
            _ => self.outbox.pop_front(),
        }
    }

    pub fn poll_timeout(&self) -> Option<Duration> {
        match &self.state {
            State::Idle | State::Opening => None,
            State::Pausing { until } => Some(*until),
            State::Greeting { again_at, .. } => Some(*again_at),
            State::Up(link) => Some(link.poll_timeout()),
        }
    }
}

/// The next of a sequence of random numbers (SplitMix64, by Steele, Lea and Flood, 2014).
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::super::message::PROTOCOL_VERSION;
    use super::*;

    fn pauses(patience: Patience, seed: u64) -> Vec<Duration> {
        let mut dialer = Dialer::new(PROTOCOL_VERSION, patience, seed);
        let (mut now, mut pauses) = (Duration::from_secs(9), Vec::new());
        while let Some(retry) = dialer.retry(now) {
            assert_eq!(retry.since, Duration::from_secs(9));
            pauses.push(retry.at - now);
            now = retry.at;
        }
        pauses
    }

    #[test]
    fn pauses_grow_to_half_a_minute_and_last_as_long_as_patience_does() {
        let hours = Duration::from_secs(12 * 3600);
        let found = pauses(Patience::For(hours), 1);
        for (number, pause) in found.iter().enumerate() {
            let longest = (FIRST_PAUSE * (1 << number.min(10))).min(LONGEST_PAUSE);
            assert!((longest / 2..=longest).contains(pause), "{number}: {pause:?}");
        }
        let total: Duration = found.iter().sum();
        assert!((hours..hours + LONGEST_PAUSE).contains(&total), "{total:?}");
        assert_eq!(pauses(Patience::Attempts(3), 1).len(), 3);
        assert_eq!(pauses(Patience::Attempts(0), 1).len(), 0);
        assert_eq!(pauses(Patience::For(Duration::ZERO), 1).len(), 0);
        assert_ne!(pauses(Patience::Attempts(3), 2), pauses(Patience::Attempts(3), 1));
    }

    #[test]
    fn a_connection_that_was_of_use_begins_a_new_count() {
        let mut dialer = Dialer::new(PROTOCOL_VERSION, Patience::For(Duration::from_secs(5)), 0);
        dialer.retry(Duration::from_secs(1)).unwrap();
        assert_eq!(dialer.retry(Duration::from_secs(6)), None);
        dialer.succeeded();
        let retry = dialer.retry(Duration::from_secs(100)).unwrap();
        assert_eq!(retry.since, Duration::from_secs(100));
        assert!(retry.at <= Duration::from_secs(100) + FIRST_PAUSE);
    }
}
