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
    /// Attempts that may fail one after another.
    retries: u32,
    failures: u32,
    state: State,
    outbox: VecDeque<Vec<u8>>,
}

impl Dialer {
    pub fn new(version: Version, retries: u32) -> Dialer {
        Dialer {
            version,
            retries,
            failures: 0,
            state: State::Idle,
            outbox: VecDeque::new(),
        }
    }

    /// Dials at the next timeout, at once.
    pub fn start(&mut self, now: Duration) {
        self.state = State::Pausing { until: now };
    }

    /// Forgets the connection. Returns whether there was a socket to close.
    pub(crate) fn hang_up(&mut self) -> bool {
        self.outbox.clear();
        let before = std::mem::replace(&mut self.state, State::Idle);
        !matches!(before, State::Idle | State::Pausing { .. })
    }

    /// The connection failed: pauses before the next attempt and returns when that will be, or `None` when the
    /// attempts are used up.
    pub fn retry(&mut self, now: Duration) -> Option<Duration> {
        self.hang_up();
        if self.failures >= self.retries {
            return None;
        }
        let pause = FIRST_PAUSE
            .saturating_mul(1 << self.failures.min(16))
            .min(LONGEST_PAUSE);
        self.failures += 1;
        let until = now + pause;
        self.state = State::Pausing { until };
        Some(until)
    }

    /// The connection has proved useful: failures are counted from zero again.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
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
