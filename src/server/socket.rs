//! WebSockets of the two services: frames in and out of the coordinator, one task a connection.
//!
//! It is separate from the coordinator because a slow or hostile connection may hold up its own task and nothing else.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use axum::extract::WebSocketUpgrade;
use axum::extract::ws::{Message, WebSocket};
use axum::response::Response;
use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc;

use super::gate::{Limits, Passage};
use super::inbox::{Input, Outbox, Outgoing};
use crate::protocol::{ConnectionId, Endpoint};

/// Greetings and control messages fit in this; larger frames are taken once a run's sizes are known.
pub const UNASSIGNED_FRAME_BYTES: usize = 1 << 20;
/// Each socket's buffer for what is read. Larger frames make it grow.
const READ_BUFFER: usize = 8 << 10;
/// How long a frame may take to be written before the connection counts as dead.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Lets connections in and hands them to the coordinator.
pub struct Door {
    pub main: bool,
    pub federated: bool,
    inputs: mpsc::Sender<Input>,
    /// Kept up to date by the coordinator.
    max_frame_bytes: Arc<AtomicUsize>,
    next_connection: AtomicU64,
    limits: Limits,
    /// Bytes that wait for any connection.
    outgoing_bytes: Arc<AtomicUsize>,
}

impl Door {
    /// Serves the main and the federated service where these are true.
    pub fn new(
        (main, federated): (bool, bool),
        inputs: mpsc::Sender<Input>,
        max_frame_bytes: Arc<AtomicUsize>,
        limits: Limits,
    ) -> Self {
        Self {
            main,
            federated,
            inputs,
            max_frame_bytes,
            next_connection: AtomicU64::new(0),
            limits,
            outgoing_bytes: Arc::default(),
        }
    }

    /// Answers the upgrade; the connection's task starts when it is complete.
    pub fn open(
        &self,
        endpoint: Endpoint,
        address: IpAddr,
        passage: Arc<Passage>,
        upgrade: WebSocketUpgrade,
    ) -> Response {
        let connection = ConnectionId(self.next_connection.fetch_add(1, Ordering::Relaxed));
        let inputs = self.inputs.clone();
        // The passage keeps strangers to far less.
        let max_frame_bytes = self.max_frame_bytes.load(Ordering::Relaxed);
        let limits = Limits {
            outgoing_bytes: self.limits.outgoing_bytes.max(2 * max_frame_bytes),
            ..self.limits.clone()
        };
        let (outgoing, queue) = Outbox::new(&limits, self.outgoing_bytes.clone());
        let guest = Guest {
            connection,
            passage: passage.clone(),
            queue,
            inputs,
        };
        let opened = Input::Opened {
            connection,
            endpoint,
            address,
            passage,
            outgoing,
        };
        upgrade
            .read_buffer_size(READ_BUFFER)
            .max_message_size(max_frame_bytes)
            .max_frame_size(max_frame_bytes)
            .on_upgrade(move |socket| guest.carry(socket, opened))
    }
}

/// A connection on its way.
struct Guest {
    connection: ConnectionId,
    passage: Arc<Passage>,
    queue: mpsc::Receiver<Outgoing>,
    inputs: mpsc::Sender<Input>,
}

impl Guest {
    /// Moves frames both ways until either side ends.
    async fn carry(self, socket: WebSocket, opened: Input) {
        let Guest {
            connection,
            passage,
            mut queue,
            inputs,
        } = self;
        if inputs.send(opened).await.is_err() {
            return;
        }
        let (mut sink, mut stream) = socket.split();
        let writing = async {
            while let Some(Outgoing::Frame(mut queued)) = queue.recv().await {
                let bytes = std::mem::take(&mut queued.bytes);
                match tokio::time::timeout(WRITE_TIMEOUT, sink.send(Message::Binary(bytes.into()))).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::debug!("connection {}: {error}", connection.0);
                        return false;
                    }
                    Err(_) => return true,
                }
            }
            // The peer may already be gone.
            let _ = tokio::time::timeout(Duration::from_secs(1), sink.close()).await;
            false
        };
        let reading = async {
            while let Some(message) = stream.next().await {
                let room = passage.take_room();
                match message {
                    Ok(Message::Binary(bytes)) => {
                        let frame = Input::Frame {
                            connection,
                            bytes: bytes.into(),
                            room,
                        };
                        if inputs.send(frame).await.is_err() {
                            return;
                        }
                    }
                    Ok(Message::Ping(_) | Message::Pong(_)) => {}
                    Ok(Message::Text(_)) => return tracing::debug!("connection {} sent text; closed", connection.0),
                    Ok(Message::Close(_)) => return,
                    Err(error) => return tracing::debug!("connection {}: {error}", connection.0),
                }
            }
        };
        let unread = tokio::select! {
            unread = writing => unread,
            () = reading => false,
        };
        // The coordinator is gone only when the run is over.
        let _ = inputs.send(Input::Closed { connection, unread }).await;
    }
}
