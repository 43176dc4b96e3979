//! A byte stream to a server, encrypted or not.
//!
//! Separate because WebSockets are spoken over either alike.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncRead, AsyncWrite};

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// A byte stream to a server, encrypted or not.
pub struct ByteStream {
    bytes: Box<dyn Bytes>,
    received: Arc<AtomicU64>,
}

impl ByteStream {
    pub(super) fn new(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> ByteStream {
        ByteStream {
            bytes: Box::new(stream),
            received: Arc::default(),
        }
    }

    /// Counts the bytes that come: most of a large frame do before it is whole.
    pub(super) fn received(&self) -> Arc<AtomicU64> {
        self.received.clone()
    }
}

impl AsyncRead for ByteStream {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = std::pin::Pin::new(&mut *self.bytes).poll_read(context, buffer);
        let count = buffer.filled().len().saturating_sub(before);
        self.received.fetch_add(count as u64, Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut *self.bytes).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.bytes).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.bytes).poll_shutdown(context)
    }
}
