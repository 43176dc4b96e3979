//! What the server's parts hand to each other: inputs to the coordinator, its frames to the connections, its work to the compute
//! thread and the answers.
//!
//! It is apart from all of them, so that sockets and the compute thread need not name the coordinator, nor it them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::Error;
use super::gate::{Limits, Passage, SMALL_FRAME_BYTES};
use super::planner::{Decision, Facts};
use crate::federated::Exact;
use crate::protocol::{ConnectionId, Contribution, Endpoint, GradientOutput, Placement};
use crate::split::{Evaluation, LaneError};
use crate::terms::ids::{ClientId, RoundKey, StepKey};
use crate::terms::moments::Moments;

/// What reaches the coordinator.
pub enum Input {
    Opened {
        connection: ConnectionId,
        endpoint: Endpoint,
        address: IpAddr,
        passage: Arc<Passage>,
        outgoing: Outbox,
    },
    Frame {
        connection: ConnectionId,
        bytes: Vec<u8>,
        /// What the frame took of the room for frames, until it has been handled.
        room: Option<OwnedSemaphorePermit>,
    },
    Closed {
        connection: ConnectionId,
        /// It did not read what it was sent.
        unread: bool,
    },
    Computed(Done),
    Stop(String),
}

/// What the coordinator sends to a connection.
#[derive(Debug)]
pub enum Outgoing {
    Frame(Queued),
    Close,
}

/// A frame that counts as waiting until it is dropped.
#[derive(Debug)]
pub struct Queued {
    pub bytes: Vec<u8>,
    length: usize,
    counts: [Arc<AtomicUsize>; 2],
}

impl Drop for Queued {
    fn drop(&mut self) {
        for count in &self.counts {
            count.fetch_sub(self.length, Ordering::Relaxed);
        }
    }
}

/// Frames waiting for one connection. The protocol answers before it asks again, so more means a peer that does not read.
const QUEUED_FRAMES: usize = 64;

/// The way to one connection: takes what its peer reads in time, and no more.
pub struct Outbox {
    sender: mpsc::Sender<Outgoing>,
    /// Bytes that wait for this connection, and for all.
    own: Arc<AtomicUsize>,
    all: Arc<AtomicUsize>,
    most_own: usize,
    most_all: usize,
}

impl Outbox {
    /// `all` counts what waits for any connection.
    pub fn new(limits: &Limits, all: Arc<AtomicUsize>) -> (Outbox, mpsc::Receiver<Outgoing>) {
        let (sender, receiver) = mpsc::channel(QUEUED_FRAMES);
        let outbox = Outbox {
            sender,
            own: Arc::default(),
            all,
            most_own: limits.outgoing_bytes,
            most_all: limits.total_outgoing_bytes,
        };
        (outbox, receiver)
    }

    /// Queues a frame. Returns whether it could be: a peer that has read everything is always sent one more.
    pub fn send(&self, bytes: Vec<u8>) -> bool {
        let length = bytes.len();
        let (own, all) = (self.own.load(Ordering::Relaxed), self.all.load(Ordering::Relaxed));
        let is_too_much = own + length > self.most_own || (all + length > self.most_all && length > SMALL_FRAME_BYTES);
        if own > 0 && is_too_much {
            return false;
        }
        let counts = [self.own.clone(), self.all.clone()];
        for count in &counts {
            count.fetch_add(length, Ordering::Relaxed);
        }
        let queued = Queued { bytes, length, counts };
        self.sender.try_send(Outgoing::Frame(queued)).is_ok()
    }

    /// Closes the connection once what waits has been written.
    pub fn close(&self) {
        // A full queue is not written to its end anyway.
        let _ = self.sender.try_send(Outgoing::Close);
    }
}

/// What the coordinator asks for.
#[derive(Debug)]
pub enum Work {
    /// Loss of the validation data before training.
    Baseline,
    /// One member's part of a step; the first of a step opens it.
    Contribute { key: StepKey, contribution: Contribution },
    /// Closes the step with these members' gradients.
    CloseStep { key: StepKey, lanes: BTreeSet<ClientId> },
    /// Back to the beginning of the round.
    Restore,
    /// Asks the planner what is to hold next, and at the start puts it into effect.
    Plan(Box<Facts>),
    /// Gives this side's values of the blocks that some clients have and others do not.
    Copy { round: RoundKey },
    /// Takes the clients' average, which goes as far as the largest cut, into the whole model's adapter, saves and validates it, and moves the cut to `split`.
    /// `moments` are those of the blocks that come here.
    Close {
        round: RoundKey,
        average: Vec<f32>,
        /// What is validated and saved instead of it, where that is more.
        exact: Option<Exact>,
        moments: Option<Moments>,
        split: usize,
    },
    /// Saves the adapter of the last closed round, unless it is.
    Finish,
}

/// The main server's side of a round's beginning.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// Its adapter, flat.
    pub values: Vec<f32>,
    /// And what the optimiser keeps of it.
    pub moments: Moments,
    /// What the model's first blocks come to, where that is more than the clients' adapter and this one.
    pub exact: Option<Exact>,
}

impl Side {
    /// Before any step.
    pub fn new(values: Vec<f32>) -> Self {
        Self {
            moments: Moments::zero(values.len()),
            values,
            exact: None,
        }
    }
}

/// What the keeper answers.
#[derive(Debug)]
pub enum Done {
    /// The model is loaded.
    Ready,
    Baseline(Option<Evaluation>),
    Contributed {
        key: StepKey,
        client: ClientId,
        /// Or why there is nothing for this client.
        output: Result<GradientOutput, LaneError>,
    },
    StepClosed {
        key: StepKey,
        /// Mean over the targets of all its members.
        loss: f64,
        tokens: u64,
        /// What its contributions and its close took.
        elapsed: Duration,
    },
    Planned {
        decision: Option<Decision>,
        /// Where cut or rank are others than before.
        placement: Option<Box<Placement>>,
        /// What this side then is.
        side: Arc<Side>,
    },
    Copied {
        round: RoundKey,
        values: Vec<f32>,
    },
    Closed {
        round: RoundKey,
        evaluation: Option<Evaluation>,
        placement: Option<Box<Placement>>,
        /// What this side begins the next round from.
        side: Arc<Side>,
        /// Whether the adapter could be written; it is tried again with the next round. Where the validation loss is not finite,
        /// nothing of the round was kept, and nothing written.
        saved: Result<(), Error>,
    },
    Finished,
    /// The keeper cannot go on.
    Failed(Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            outgoing_bytes: 1000,
            total_outgoing_bytes: 3 * SMALL_FRAME_BYTES,
            ..Limits::default()
        }
    }

    #[test]
    fn what_waits_for_one_connection_is_bounded_in_bytes_and_frames() {
        let all = Arc::<AtomicUsize>::default();
        let (outbox, mut queue) = Outbox::new(&limits(), all.clone());
        assert!(outbox.send(vec![0; 5000]), "an empty queue takes any frame");
        assert!(!outbox.send(vec![0]));
        queue.try_recv().unwrap();
        assert_eq!(all.load(Ordering::Relaxed), 0, "what was taken no longer waits");
        assert!(outbox.send(vec![0; 600]) && outbox.send(vec![0; 400]) && !outbox.send(vec![0]));
        drop((outbox, queue));
        assert_eq!(all.load(Ordering::Relaxed), 0);
        let (outbox, _queue) = Outbox::new(&limits(), all.clone());
        let taken = (0..1000).filter(|_| outbox.send(vec![0])).count();
        assert_eq!((taken, all.load(Ordering::Relaxed)), (QUEUED_FRAMES, QUEUED_FRAMES));
    }

    #[test]
    fn where_all_queues_are_long_only_who_reads_gets_more() {
        let limits = Limits {
            outgoing_bytes: 4 * SMALL_FRAME_BYTES,
            ..limits()
        };
        let all = Arc::<AtomicUsize>::default();
        let large = || vec![0; SMALL_FRAME_BYTES + 1];
        let (slow, _slow_queue) = Outbox::new(&limits, all.clone());
        let (quick, _quick_queue) = Outbox::new(&limits, all);
        assert!(slow.send(large()) && slow.send(large()));
        assert!(!slow.send(large()));
        assert!(quick.send(large()) && quick.send(vec![0; 100]) && slow.send(vec![0; 100]));
    }
}
