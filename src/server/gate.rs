//! What a connection may cost: how many there are, how long each may take, and what it may make this process hold.
//!
//! It is separate from the sockets and from HTTP because it is below both, and below TLS: nothing that a stranger sends gets
//! past it without having been counted. It knows three standings. A *stranger* has shown nothing; a *caller* has asked over HTTP
//! for something, and shown that it may; a *member* has been let in by a session. Strangers are few, hurried and kept to little;
//! when there are too many, it is the one that has been there longest of whoever has most that goes, so that no number of idle
//! connections keeps anybody out. Members are never closed from here.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use axum_server::accept::Accept;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tower_http::add_extension::AddExtension;

use super::limit::source;

/// Descriptors that are no connection's: files, the model, threads' own.
const RESERVED_DESCRIPTORS: usize = 128;
/// A frame this long takes no room of its own.
pub const SMALL_FRAME_BYTES: usize = 64 << 10;
/// Room is counted in these.
const ROOM_UNIT: usize = 1 << 10;
/// Callers are let be longer than strangers, by this factor.
const CALLER_PATIENCE: u32 = 4;

/// What connections may cost. Of everything there is enough for the clients a server takes.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once, as far as the system's limit on open files allows.
    pub connections: usize,
    /// Of those, of strangers: at most a quarter of all.
    pub strangers: usize,
    /// And of strangers from one address.
    pub strangers_per_address: usize,
    /// How long a stranger may take over the TLS handshake, over a request's header, or over its first frame.
    pub patience: Duration,
    /// What a stranger may send for one answer: a handshake, a header, or a first frame, which has at most 16 KiB.
    pub stranger_bytes: usize,
    /// Frames on their way in, of all members together. One frame always has room.
    pub incoming_bytes: usize,
    /// Frames waiting for one member that does not read them. Two frames of the run's largest always have room.
    pub outgoing_bytes: usize,
    /// And for all members together: beyond it, who has not read its last frame gets no other large one.
    pub total_outgoing_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            strangers: 1024,
            strangers_per_address: 256,
            patience: Duration::from_secs(15),
            stranger_bytes: 20 << 10,
            incoming_bytes: 1 << 30,
            outgoing_bytes: 32 << 20,
            total_outgoing_bytes: 512 << 20,
        }
    }
}

impl Limits {
    /// As far as a number of descriptors goes.
    pub(super) fn fit(self, descriptors: Option<usize>) -> Self {
        let most = descriptors.map_or(usize::MAX, |all| all.saturating_sub(RESERVED_DESCRIPTORS).max(all / 2));
        let connections = self.connections.min(most).max(4);
        let strangers = self.strangers.min(connections / 4).max(1);
        Self {
            connections,
            strangers,
            strangers_per_address: self.strangers_per_address.clamp(1, strangers),
            ..self
        }
    }
}

const STRANGER: u8 = 0;
const CALLER: u8 = 1;
const MEMBER: u8 = 2;

/// One connection, as everything above it knows it.
pub(super) struct Passage {
    gate: Arc<Gate>,
    number: u64,
    source: IpAddr,
    standing: AtomicU8,
    is_closed: AtomicBool,
    /// Of the task that waits for the connection.
    waker: Mutex<Option<Waker>>,
    /// Bytes since it was last answered, or since its last frame was whole.
    heard: AtomicUsize,
    /// All bytes that have come.
    total: AtomicU64,
    /// When it was last answered.
    answered: Mutex<Instant>,
    /// For the frame that is coming.
    room: Mutex<Option<OwnedSemaphorePermit>>,
}

/// All connections of a server, over all its addresses.
pub(super) struct Gate {
    limits: Limits,
    /// What the sessions take at most, kept up to date by the coordinator.
    max_frame_bytes: Arc<AtomicUsize>,
    room: Arc<Semaphore>,
    /// Permits of `room`.
    units: u32,
    table: Mutex<Table>,
    turned_away: AtomicU64,
}

#[derive(Default)]
struct Table {
    next: u64,
    /// By age.
    passages: BTreeMap<u64, Arc<Passage>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    pub fn new(limits: Limits, max_frame_bytes: Arc<AtomicUsize>) -> Arc<Self> {
        let units = (limits.incoming_bytes / ROOM_UNIT).clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        Arc::new(Self {
            limits,
            max_frame_bytes,
            room: Arc::new(Semaphore::new(units)),
            units: u32::try_from(units).unwrap_or(u32::MAX),
            table: Mutex::default(),
            turned_away: AtomicU64::new(0),
        })
    }

    /// How many connections were closed because there were too many, since this was last asked.
    pub fn take_turned_away(&self) -> u64 {
        self.turned_away.swap(0, Ordering::Relaxed)
    }

    /// Makes room for a connection; `None` when members have it all.
    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Arc<Passage>> {
        let source = source(address);
        let mut table = lock(&self.table);
        if let Some(leaver) = self.leaver(&table, source) {
            self.turned_away.fetch_add(1, Ordering::Relaxed);
            let leaver = leaver?;
            table.passages.remove(&leaver.number);
            leaver.close();
        }
        let number = table.next;
        table.next += 1;
        let passage = Arc::new(Passage {
            gate: self.clone(),
            number,
            source,
            standing: AtomicU8::new(STRANGER),
            is_closed: AtomicBool::new(false),
            waker: Mutex::new(None),
            heard: AtomicUsize::new(0),
            total: AtomicU64::new(0),
            answered: Mutex::new(Instant::now()),
            room: Mutex::new(None),
        });
        table.passages.insert(number, passage.clone());
        Some(passage)
    }

    /// Who has to go for a stranger from `source`: `None` for nobody, `Some(None)` when all there are may stay.
    fn leaver(&self, table: &Table, source: IpAddr) -> Option<Option<Arc<Passage>>> {
        let mut strangers: HashMap<IpAddr, usize> = HashMap::new();
        for passage in table.passages.values().filter(|passage| passage.stands() == STRANGER) {
            *strangers.entry(passage.source).or_default() += 1;
        }
        let oldest = |standing: u8, source: Option<IpAddr>| {
            let of = |passage: &&Arc<Passage>| {
                passage.stands() == standing && source.is_none_or(|source| passage.source == source)
            };
            table.passages.values().find(of).cloned()
        };
        let total: usize = strangers.values().sum();
        if strangers.get(&source).copied().unwrap_or(0) >= self.limits.strangers_per_address {
            return Some(oldest(STRANGER, Some(source)));
        }
        let is_full = table.passages.len() >= self.limits.connections;
        if total >= self.limits.strangers || (is_full && total > 0) {
            let busiest = strangers
                .into_iter()
                .max_by_key(|(_, count)| *count)
                .map(|(source, _)| source);
            return Some(oldest(STRANGER, busiest));
        }
        is_full.then(|| oldest(CALLER, None))
    }
}

impl Passage {
    fn stands(&self) -> u8 {
        self.standing.load(Ordering::Relaxed)
    }

    /// A request has come: whoever sends one has to show again what it may.
    pub fn ask(&self) {
        // A member's connection carries no further requests.
        if self.stands() == CALLER {
            self.standing.store(STRANGER, Ordering::Relaxed);
        }
        self.answer();
    }

    /// The request may be answered with what strangers do not get.
    pub fn call(&self) {
        self.standing.store(CALLER, Ordering::Relaxed);
    }

    /// A session has let it in.
    pub fn admit(&self) {
        self.standing.store(MEMBER, Ordering::Relaxed);
        self.heard.store(0, Ordering::Relaxed);
    }

    pub fn is_member(&self) -> bool {
        self.stands() == MEMBER
    }

    /// Bytes that have come over it, of frames that are not whole yet as well.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    fn answer(&self) {
        self.heard.store(0, Ordering::Relaxed);
        *lock(&self.answered) = Instant::now();
    }

    /// A frame is whole: what it took of the room goes with it.
    pub fn take_room(&self) -> Option<OwnedSemaphorePermit> {
        if self.is_member() {
            self.heard.store(0, Ordering::Relaxed);
        }
        lock(&self.room).take()
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
        if let Some(waker) = lock(&self.waker).take() {
            waker.wake();
        }
    }

    /// When it has waited too long, as far as is known now.
    fn deadline(&self) -> Instant {
        let patience = self.gate.limits.patience;
        let patience = match self.stands() {
            STRANGER => patience,
            _ => patience * CALLER_PATIENCE,
        };
        *lock(&self.answered) + patience
    }
}

impl<S> Accept<TcpStream, S> for GateKeeper {
    type Stream = Guarded<TcpStream>;
    type Service = AddExtension<S, Arc<Passage>>;
    type Future = std::future::Ready<io::Result<(Self::Stream, Self::Service)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let entering = || {
            // A message waits for no other: what a step's phases take is measured.
            stream.set_nodelay(true)?;
            let address = stream.peer_addr()?.ip();
            let passage = self.0.enter(address).ok_or(io::ErrorKind::ConnectionRefused)?;
            Ok((
                Guarded::new(stream, passage.clone()),
                AddExtension::new(service, passage),
            ))
        };
        std::future::ready(entering())
    }
}

/// Lets connections in for an HTTP server.
#[derive(Clone)]
pub(super) struct GateKeeper(pub Arc<Gate>);

/// Room for a frame, to come.
type Waiting = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// A connection's bytes, counted and timed.
pub(super) struct Guarded<I> {
    io: I,
    passage: Arc<Passage>,
    patience: Pin<Box<Sleep>>,
    /// For room, when a member's frame needs some.
    waiting: Option<Waiting>,
}

impl<I> Guarded<I> {
    fn new(io: I, passage: Arc<Passage>) -> Self {
        Self {
            io,
            patience: Box::pin(tokio::time::sleep_until(passage.deadline())),
            passage,
            waiting: None,
        }
    }

    /// Whether it may go on at all.
    fn check(&self, context: &Context<'_>) -> io::Result<()> {
        *lock(&self.passage.waker) = Some(context.waker().clone());
        match self.passage.is_closed.load(Ordering::Relaxed) {
            true => Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "closed for other connections",
            )),
            false => Ok(()),
        }
    }

    /// An error once there was nothing to read and nothing could be written for too long.
    fn poll_patience(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            if self.passage.is_member() {
                return Poll::Pending;
            }
            ready!(self.patience.as_mut().poll(context));
            let deadline = self.passage.deadline();
            if deadline <= Instant::now() {
                return Poll::Ready(io::ErrorKind::TimedOut.into());
            }
            self.patience.as_mut().reset(deadline);
        }
    }

    /// Waits until a frame as large as the largest has room.
    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if lock(&self.passage.room).is_some() {
            return Poll::Ready(Ok(()));
        }
        let gate = &self.passage.gate;
        let waiting = self.waiting.get_or_insert_with(|| {
            let units = gate.max_frame_bytes.load(Ordering::Relaxed).div_ceil(ROOM_UNIT);
            let units = u32::try_from(units).unwrap_or(u32::MAX).clamp(1, gate.units);
            Box::pin(gate.room.clone().acquire_many_owned(units))
        });
        let room = ready!(waiting.as_mut().poll(context)).map_err(io::Error::other);
        self.waiting = None;
        *lock(&self.passage.room) = Some(room?);
        Poll::Ready(Ok(()))
    }
}

impl<I> Drop for Guarded<I> {
    fn drop(&mut self) {
        lock(&self.passage.gate.table).passages.remove(&self.passage.number);
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Guarded<I> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.check(context)?;
        let heard = this.passage.heard.load(Ordering::Relaxed);
        if this.passage.is_member() {
            if heard > SMALL_FRAME_BYTES {
                ready!(this.poll_room(context))?;
            }
        } else if heard > this.passage.gate.limits.stranger_bytes {
            return Poll::Ready(Err(io::Error::other("too much from a stranger")));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut this.io).poll_read(context, buffer) {
            Poll::Ready(read) => {
                let more = buffer.filled().len() - before;
                this.passage.heard.fetch_add(more, Ordering::Relaxed);
                this.passage.total.fetch_add(more as u64, Ordering::Relaxed);
                Poll::Ready(read)
            }
            Poll::Pending => this.poll_patience(context).map(Err),
        }
    }
}

impl<I: AsyncWrite + Unpin> Guarded<I> {
    /// What came of writing.
    fn wrote(&mut self, context: &mut Context<'_>, wrote: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match wrote {
            Poll::Ready(Ok(bytes)) => {
                if bytes > 0 && !self.passage.is_member() {
                    // What is being answered is not waited for, and may go on to ask.
                    *lock(&self.passage.answered) = Instant::now();
                }
                Poll::Ready(Ok(bytes))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => self.poll_patience(context).map(Err),
        }
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Guarded<I> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check(context)?;
        let wrote = Pin::new(&mut this.io).poll_write(context, bytes);
        this.wrote(context, wrote)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check(context)?;
        let wrote = Pin::new(&mut this.io).poll_write_vectored(context, pieces);
        this.wrote(context, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(connections: usize, strangers: usize, strangers_per_address: usize) -> Arc<Gate> {
        let limits = Limits {
            connections,
            strangers,
            strangers_per_address,
            ..Limits::default()
        };
        Gate::new(limits, Arc::new(AtomicUsize::new(1 << 20)))
    }

    fn address(number: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, number])
    }

    fn closed(passages: &[Arc<Passage>]) -> Vec<bool> {
        let is_closed = |passage: &Arc<Passage>| passage.is_closed.load(Ordering::Relaxed);
        passages.iter().map(is_closed).collect()
    }

    #[test]
    fn the_oldest_stranger_of_a_full_address_makes_room() {
        let gate = gate(100, 50, 2);
        let other = gate.enter(address(2)).unwrap();
        let passages: Vec<_> = (0..4).map(|_| gate.enter(address(1)).unwrap()).collect();
        assert_eq!(closed(&passages), [true, true, false, false]);
        assert_eq!(closed(&[other]), [false]);
        assert_eq!(gate.take_turned_away(), 2);
    }

    #[test]
    fn of_all_strangers_who_has_most_makes_room() {
        let gate = gate(100, 5, 4);
        let few = gate.enter(address(1)).unwrap();
        let many: Vec<_> = (0..4).map(|_| gate.enter(address(2)).unwrap()).collect();
        let newcomer = gate.enter(address(3)).unwrap();
        assert_eq!(closed(&[few, newcomer]), [false, false]);
        assert_eq!(closed(&many), [true, false, false, false]);
    }

    #[test]
    fn members_stay_and_callers_go_after_strangers() {
        let gate = gate(4, 4, 4);
        let passages: Vec<_> = (0..4).map(|_| gate.enter(address(1)).unwrap()).collect();
        passages[0].admit();
        passages[1].call();
        passages[2].call();
        let newcomers: Vec<_> = (0..2)
            .map(|_| {
                let newcomer = gate.enter(address(2)).unwrap();
                newcomer.admit();
                newcomer
            })
            .collect();
        assert_eq!(closed(&passages), [false, true, false, true]);
        assert_eq!(closed(&newcomers), [false, false]);
        passages[2].admit();
        assert!(gate.enter(address(3)).is_none(), "members have all there is");
    }

    #[test]
    fn limits_fit_the_descriptors_there_are() {
        let fit = |descriptors| {
            let limits = Limits::default().fit(descriptors);
            (limits.connections, limits.strangers, limits.strangers_per_address)
        };
        assert_eq!(fit(None), (4096, 1024, 256));
        assert_eq!(fit(Some(1 << 20)), (4096, 1024, 256));
        assert_eq!(fit(Some(1024)), (896, 224, 224));
        assert_eq!(fit(Some(256)), (128, 32, 32));
        assert_eq!(fit(Some(0)), (4, 1, 1));
    }
}
