//! The client's side of an exec session, over any connection that reaches the host process.

use burgeon_api::{
    Error, Result,
    exec::{Frame, MOST_PAYLOAD, WINDOW},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Frames read from a connection. [`FrameReader::next`] may be cancelled without losing a byte.
pub struct FrameReader<R> {
    read: R,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub fn new(read: R) -> Self {
        Self { read, buffer: Vec::with_capacity(2 * MOST_PAYLOAD) }
    }

    /// The next frame; `None` at the end of the connection.
    ///
    /// # Errors
    /// `Damaged` for bytes that are no frame.
    pub async fn next(&mut self) -> Result<Option<Frame>> {
        loop {
            if let Some((frame, used)) = Frame::decode(&self.buffer)? {
                self.buffer.drain(..used);
                return Ok(Some(frame));
            }
            match self.read.read_buf(&mut self.buffer).await {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) => return Err(Error::unavailable(format!("the session broke off: {error}"))),
            }
        }
    }
}

/// Writes frames.
pub struct FrameWriter<W> {
    write: W,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub fn new(write: W) -> Self {
        Self { write }
    }

    /// # Errors
    /// `Unavailable` when the connection is gone.
    pub async fn send(&mut self, frame: &Frame) -> Result<()> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.write
            .write_all(&bytes)
            .await
            .map_err(|error| Error::unavailable(format!("the session broke off: {error}")))
    }

    /// Nothing more follows.
    pub async fn end(mut self) {
        // A side that has gone needs to know nothing.
        drop(self.write.shutdown().await);
    }
}

/// How much input may be sent, and what is kept of it until it is acknowledged.
#[derive(Debug, Default)]
pub struct InputWindow {
    /// Bytes sent so far, and how many of them were taken.
    pub sent: u64,
    pub taken: u64,
}

impl InputWindow {
    /// Bytes that may be sent now, at most one frame.
    pub fn room(&self) -> usize {
        let room = WINDOW.saturating_sub(self.sent - self.taken);
        usize::try_from(room).unwrap_or(usize::MAX).min(MOST_PAYLOAD)
    }
}
