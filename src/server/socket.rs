//! WebSockets of the two services: frames in and out of the coordinator, one task a connection.
//!
//! It is separate from the coordinator because a slow or hostile connection may hold up its own task and nothing else.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::WebSocketUpgrade;
use axum::extract::ws::{Message, WebSocket};
use axum::response::Response;
use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc;

use super::inbox::{Input, Outgoing};
use super::limit::FailureLimit;
use crate::protocol::{ConnectionId, Endpoint};

/// Frames waiting for one connection. The protocol answers before it asks again, so more means a peer that does not read.
const QUEUED_FRAMES: usize = 64;
/// Greetings and control messages fit in this; larger frames are taken once a run's sizes are known.
pub const SMALL_FRAME_BYTES: usize = 1 << 20;
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
    failures: Arc<Mutex<FailureLimit>>,
    origin: Instant,
}

impl Door {
    /// `origin` is the zero of the coordinator's clock, `failures` what it notes failed attempts in.
    pub fn new(
        (main, federated): (bool, bool),
        inputs: mpsc::Sender<Input>,
        max_frame_bytes: Arc<AtomicUsize>,
        failures: Arc<Mutex<FailureLimit>>,
        origin: Instant,
    ) -> Self {
        Self {
            main,
            federated,
            inputs,
            max_frame_bytes,
            next_connection: AtomicU64::new(0),
            failures,
            origin,
        }
    }

    /// Whether `address` may try to connect; otherwise how long it has to wait.
    ///
    /// # Errors
    /// The time until it may.
    pub fn check(&self, address: IpAddr) -> Result<(), Duration> {
        self.failures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .check(address, self.origin.elapsed())
    }

    /// Answers the upgrade; the connection's task starts when it is complete.
    pub fn open(&self, endpoint: Endpoint, address: IpAddr, upgrade: WebSocketUpgrade) -> Response {
        let connection = ConnectionId(self.next_connection.fetch_add(1, Ordering::Relaxed));
        let inputs = self.inputs.clone();
        let max_frame_bytes = self.max_frame_bytes.load(Ordering::Relaxed);
        upgrade
            .max_message_size(max_frame_bytes)
            .max_frame_size(max_frame_bytes)
            .on_upgrade(move |socket| carry(connection, endpoint, address, socket, inputs))
    }
}

/// Moves frames both ways until either side ends.
async fn carry(
    connection: ConnectionId,
    endpoint: Endpoint,
    address: IpAddr,
    socket: WebSocket,
    inputs: mpsc::Sender<Input>,
) {
    let (outgoing, mut queue) = mpsc::channel(QUEUED_FRAMES);
    if inputs
        .send(Input::Opened {
            connection,
            endpoint,
            address,
            outgoing,
        })
        .await
        .is_err()
    {
        return;
    }
    let (mut sink, mut stream) = socket.split();
    let writing = async {
        while let Some(Outgoing::Frame(bytes)) = queue.recv().await {
            match tokio::time::timeout(WRITE_TIMEOUT, sink.send(Message::Binary(bytes.into()))).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return tracing::debug!("connection {}: {error}", connection.0),
                Err(_) => return tracing::info!("connection {} does not read; closed", connection.0),
            }
        }
        // The peer may already be gone.
        let _ = tokio::time::timeout(Duration::from_secs(1), sink.close()).await;
    };
    let reading = async {
        while let Some(message) = stream.next().await {
            match message {
                Ok(Message::Binary(bytes)) => {
                    if inputs
                        .send(Input::Frame {
                            connection,
                            bytes: bytes.into(),
                        })
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                Ok(Message::Ping(_) | Message::Pong(_)) => {}
                Ok(Message::Text(_)) => return tracing::info!("connection {} sent text; closed", connection.0),
                Ok(Message::Close(_)) => return,
                Err(error) => return tracing::debug!("connection {}: {error}", connection.0),
            }
        }
    };
    tokio::select! {
        () = writing => {}
        () = reading => {}
    }
    // The coordinator is gone only when the run is over.
    let _ = inputs.send(Input::Closed { connection }).await;
}
