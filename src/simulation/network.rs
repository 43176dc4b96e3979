//! Virtual time, and sockets that behave as badly as asked.
//!
//! Separate from `run`, which knows the sessions: this knows only that bytes go from one end to the other. The queue
//! holds what arrives and whatever else its user wants to happen later.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the network treats frames.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weather {
    /// Shortest and longest delay of a frame.
    pub delay: (Duration, Duration),
    /// Probability that a frame is lost.
    pub loss: f64,
    /// Probability that a frame arrives twice.
    pub duplication: f64,
    /// Whether frames arrive in the order in which they were sent, as over TCP.
    pub ordered: bool,
}

impl Weather {
    /// As a WebSocket has it: nothing lost, nothing repeated, everything in order.
    pub const CALM: Weather = Weather {
        delay: (Duration::from_millis(5), Duration::from_millis(40)),
        loss: 0.0,
        duplication: 0.0,
        ordered: true,
    };

    /// One frame in ten lost, one in ten repeated, any order.
    pub const STORM: Weather = Weather {
        delay: (Duration::from_millis(5), Duration::from_millis(400)),
        loss: 0.1,
        duplication: 0.1,
        ordered: false,
    };
}

/// What became of the frames of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub frames: u64,
    pub bytes: u64,
    pub lost: u64,
    pub repeated: u64,
}

/// A socket, by its place in the list of all there have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SocketId(pub usize);

/// An end of a socket: the one that dialled, or the one that listened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Dialler,
    Listener,
}

impl End {
    fn other(self) -> End {
        match self {
            End::Dialler => End::Listener,
            End::Listener => End::Dialler,
        }
    }
}

#[derive(Debug)]
pub(super) enum Arrival {
    Opened,
    Frame(Vec<u8>),
    Closed,
}

#[derive(Debug)]
pub(super) enum Happening<W> {
    Arrival {
        socket: SocketId,
        end: End,
        arrival: Arrival,
    },
    Own(W),
}

struct Scheduled<W> {
    at: Duration,
    sequence: u64,
    happening: Happening<W>,
}

impl<W> Scheduled<W> {
    fn order(&self) -> (Duration, u64) {
        (self.at, self.sequence)
    }
}

impl<W> PartialEq for Scheduled<W> {
    fn eq(&self, other: &Self) -> bool {
        self.order() == other.order()
    }
}

impl<W> Eq for Scheduled<W> {}

impl<W> PartialOrd for Scheduled<W> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<W> Ord for Scheduled<W> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order().cmp(&other.order())
    }
}

struct Socket {
    /// Whether each end still takes what arrives: dialler, listener.
    open: [bool; 2],
    /// When the last frame towards each end arrives.
    busy_until: [Duration; 2],
    /// Nothing gets through before then, and nobody is told.
    dark_until: Duration,
}

pub(super) struct Network<W> {
    pub now: Duration,
    pub traffic: Traffic,
    pub random: ChaCha8Rng,
    weather: Weather,
    queue: BinaryHeap<Reverse<Scheduled<W>>>,
    sequence: u64,
    sockets: Vec<Socket>,
}

fn place(end: End) -> usize {
    match end {
        End::Dialler => 0,
        End::Listener => 1,
    }
}

impl<W> Network<W> {
    pub fn new(seed: u64, weather: Weather) -> Network<W> {
        Network {
            now: Duration::ZERO,
            traffic: Traffic::default(),
            random: ChaCha8Rng::seed_from_u64(seed),
            weather,
            queue: BinaryHeap::new(),
            sequence: 0,
            sockets: Vec::new(),
        }
    }

    pub fn schedule(&mut self, at: Duration, own: W) {
        self.push(at, Happening::Own(own));
    }

    fn push(&mut self, at: Duration, happening: Happening<W>) {
        self.sequence += 1;
        let at = at.max(self.now);
        self.queue.push(Reverse(Scheduled {
            at,
            sequence: self.sequence,
            happening,
        }));
    }

    /// A time from `shortest` to `longest`.
    pub fn pause(&mut self, (shortest, longest): (Duration, Duration)) -> Duration {
        shortest + (longest - shortest).mul_f64(self.random.random::<f64>())
    }

    /// Dials. Both ends hear `Opened`, or, when `reachable` is false, the dialler hears `Closed`.
    pub fn dial(&mut self, reachable: bool) -> SocketId {
        const GIVING_UP: Duration = Duration::from_secs(3);
        let socket = SocketId(self.sockets.len());
        let delay = self.pause(self.weather.delay);
        let at = self.now + delay;
        self.sockets.push(Socket {
            open: [true; 2],
            busy_until: [at; 2],
            dark_until: Duration::ZERO,
        });
        if reachable {
            self.push(
                at,
                Happening::Arrival {
                    socket,
                    end: End::Listener,
                    arrival: Arrival::Opened,
                },
            );
            self.push(
                at,
                Happening::Arrival {
                    socket,
                    end: End::Dialler,
                    arrival: Arrival::Opened,
                },
            );
        } else {
            let at = self.now + GIVING_UP;
            self.push(
                at,
                Happening::Arrival {
                    socket,
                    end: End::Dialler,
                    arrival: Arrival::Closed,
                },
            );
        }
        socket
    }

    /// Sends a frame from an end, if it is open.
    pub fn send(&mut self, socket: SocketId, from: End, bytes: Vec<u8>) {
        if !self.sockets[socket.0].open[place(from)] {
            return;
        }
        self.traffic.frames += 1;
        self.traffic.bytes += bytes.len() as u64;
        let dark = self.now < self.sockets[socket.0].dark_until;
        if self.random.random_bool(self.weather.loss) || dark {
            self.traffic.lost += 1;
            return;
        }
        if self.random.random_bool(self.weather.duplication) {
            self.traffic.repeated += 1;
            self.deliver(socket, from.other(), Arrival::Frame(bytes.clone()));
        }
        self.deliver(socket, from.other(), Arrival::Frame(bytes));
    }

    fn deliver(&mut self, socket: SocketId, end: End, arrival: Arrival) {
        let delay = self.pause(self.weather.delay);
        let mut at = self.now + delay;
        let busy_until = &mut self.sockets[socket.0].busy_until[place(end)];
        // The end of a connection never overtakes what was sent before it.
        if self.weather.ordered || matches!(arrival, Arrival::Closed) {
            at = at.max(*busy_until);
        }
        *busy_until = at.max(*busy_until);
        self.push(at, Happening::Arrival { socket, end, arrival });
    }

    /// Closes a socket from one end; the other is told.
    pub fn close(&mut self, socket: SocketId, from: End) {
        if std::mem::replace(&mut self.sockets[socket.0].open[place(from)], false) {
            self.deliver(socket, from.other(), Arrival::Closed);
        }
    }

    /// The process at this end is no more; nobody is told.
    pub(crate) fn vanish(&mut self, socket: SocketId, end: End) {
        self.sockets[socket.0].open[place(end)] = false;
    }

    /// Nothing gets through this socket until `until`; nobody is told.
    pub(crate) fn darken(&mut self, socket: SocketId, until: Duration) {
        let dark_until = &mut self.sockets[socket.0].dark_until;
        *dark_until = until.max(*dark_until);
    }

    /// What happens next. Moves the time on.
    pub fn next(&mut self) -> Option<Happening<W>> {
        loop {
            let Reverse(Scheduled { at, happening, .. }) = self.queue.pop()?;
            self.now = at;
            if let Happening::Arrival { socket, end, arrival } = &happening {
                let open = &mut self.sockets[socket.0].open[place(*end)];
                if !*open {
                    continue;
                }
                if matches!(arrival, Arrival::Closed) {
                    *open = false;
                }
            }
            return Some(happening);
        }
    }
}
