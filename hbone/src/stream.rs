//! One duplex byte stream inside a tunnel.
//!
//! The same type serves accepted and opened streams. Reading hands out the buffers that `h2` received; writing hands `Bytes` on
//! without a copy. Three ends are kept apart (RFC 9113 §8.5): END_STREAM is a half-close (end of file for the reader, while the other
//! direction goes on), RST_STREAM is an error, and the end of the whole connection is another error. A RST_STREAM that follows the
//! peer's END_STREAM takes nothing from the reader, who still gets every byte and a clean end; only writing fails.
//!
//! Flow control: a byte counts against the stream's window until its reader has taken it, so a reader that stops stops its peer, and
//! nobody else's. Window is given back in batches, see [`crate::WindowSettings`]. A writer waits while the peer's window or the
//! connection's send buffer is full; what one write hands over is bounded by [`MAX_WRITE`].

use std::{
    fmt,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::shared::{Shared, Slot};

/// The most that one write hands to the connection; more is taken in the next call, so that streams take turns.
pub const MAX_WRITE: usize = 64 * 1024;

/// One byte stream in a tunnel: both directions of one TCP connection.
///
/// Dropping it before both directions ended resets the stream: CANCEL, or NO_ERROR on the accepting side when everything was sent
/// and only the peer's bytes are no longer wanted.
pub struct TunnelStream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// Received, not yet taken by a reader that copies.
    held: Bytes,
    /// Taken by the reader, not yet given back as window.
    taken: u32,
    write_ended: bool,
    read_ended: bool,
    slot: Slot,
}

/// How a stream ended that did not end well; the inner error of the [`io::Error`]s of a [`TunnelStream`].
#[derive(Debug, thiserror::Error)]
pub struct StreamError {
    /// The code of the RST_STREAM or GOAWAY, if there was one.
    pub reason: Option<Reason>,
    /// Whether the peer said so, and not this side.
    pub by_peer: bool,
    /// Whether only this stream ended, and not its connection.
    pub is_reset: bool,
    kind: io::ErrorKind,
    detail: String,
}

// === impl TunnelStream ===

impl TunnelStream {
    pub(crate) fn new(send: SendStream<Bytes>, recv: RecvStream, slot: Slot) -> Self {
        Self {
            send,
            recv,
            held: Bytes::new(),
            taken: 0,
            write_ended: false,
            read_ended: false,
            slot,
        }
    }

    /// A stream of another HTTP/2 connection than a tunnel's: one that an extended CONNECT (RFC 8441) has made a byte stream. Window is
    /// given back in batches of `batch` bytes, which has to be less than the stream's window.
    pub fn of_halves(send: SendStream<Bytes>, recv: RecvStream, batch: u32) -> Self {
        Self::new(send, recv, Slot::take(&Shared::new(batch, None)))
    }

    /// Reads what has arrived, without a copy; `None` is the peer's half-close.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        let data = if self.held.is_empty() {
            match ready!(self.poll_chunk(cx)) {
                Some(Ok(data)) => data,
                end => return Poll::Ready(end),
            }
        } else {
            std::mem::take(&mut self.held)
        };
        self.release(data.len());
        Poll::Ready(Some(Ok(data)))
    }

    /// Sends from the front of `data` without a copy and takes off what was sent; waits while the peer or the connection cannot take
    /// any. With `end`, the half-close rides on the frame that empties `data`.
    ///
    /// Returns how much was taken, which is zero only for empty `data`.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes, end: bool) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(if end { self.end_write().map(|()| 0) } else { Ok(0) });
        }
        let room = ready!(self.poll_room(cx, data.len()))?;
        let chunk = data.split_to(room.min(data.len()));
        let (sent, end) = (chunk.len(), end && data.is_empty());
        self.send_chunk(cx, chunk, end)?;
        Poll::Ready(Ok(sent))
    }

    /// Completes when the peer resets the stream or its connection ends, for a holder that neither reads nor writes.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.send.poll_reset(cx).map(|result| match result {
            Ok(reason) => StreamError::reset(reason).into(),
            Err(error) => StreamError::from(error).into(),
        })
    }

    /// Ends both directions at once, with a code that tells the peer why; what was not sent yet is discarded.
    pub fn reset(mut self, reason: Reason) {
        self.send.send_reset(reason);
    }

    /// Whether the peer has half-closed and every byte was read.
    pub fn is_read_ended(&self) -> bool {
        self.read_ended
    }

    /// Whether this side has half-closed.
    pub fn is_write_ended(&self) -> bool {
        self.write_ended
    }

    /// The next received frame, not yet counted as taken.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            if self.read_ended {
                return Poll::Ready(None);
            }
            match ready!(self.recv.poll_data(cx)) {
                // An empty frame says nothing; passed on, it would read as the end.
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => return Poll::Ready(Some(Ok(data))),
                Some(Err(error)) => return Poll::Ready(Some(Err(StreamError::from(error).into()))),
                None => {
                    self.read_ended = true;
                    self.give_back();
                }
            }
        }
    }

    /// Counts bytes as taken by the reader, and gives window back when enough have come together.
    fn release(&mut self, bytes: usize) {
        self.taken = self.taken.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.taken >= self.slot.shared().release_at() {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        let bytes = std::mem::take(&mut self.taken);
        if bytes == 0 {
            return;
        }
        // The only error is giving back more than came in, and every byte counted here came from `recv`.
        let _ = self.recv.flow_control().release_capacity(bytes as usize);
    }

    /// How many bytes may be sent now, at most `wanted`.
    fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        if self.write_ended {
            return Poll::Ready(Err(StreamError::after_end().into()));
        }
        self.send.reserve_capacity(wanted.min(MAX_WRITE));
        let room = self.send.capacity();
        if room > 0 {
            return Poll::Ready(Ok(room));
        }
        match ready!(self.send.poll_capacity(cx)) {
            Some(Ok(room)) => Poll::Ready(Ok(room)),
            Some(Err(error)) => Poll::Ready(Err(StreamError::from(error).into())),
            None => Poll::Ready(Err(self.why_closed(cx).into())),
        }
    }

    fn send_chunk(&mut self, cx: &mut Context<'_>, chunk: Bytes, end: bool) -> io::Result<()> {
        if self.send.send_data(chunk, end).is_err() {
            return Err(self.why_closed(cx).into());
        }
        self.write_ended = end;
        Ok(())
    }

    fn end_write(&mut self) -> io::Result<()> {
        if !self.write_ended {
            // Fails only when the stream is over already, of which the reader learns; there is nothing left to end.
            let _ = self.send.send_data(Bytes::new(), true);
            self.write_ended = true;
        }
        Ok(())
    }

    /// Why the stream cannot be written to any more.
    fn why_closed(&mut self, cx: &mut Context<'_>) -> StreamError {
        match self.send.poll_reset(cx) {
            Poll::Ready(Ok(reason)) => StreamError::reset(reason),
            Poll::Ready(Err(error)) => error.into(),
            Poll::Pending => StreamError::after_end(),
        }
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if into.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if self.held.is_empty() {
            match ready!(self.poll_chunk(cx)) {
                Some(Ok(data)) => self.held = data,
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = self.held.len().min(into.remaining());
        into.put_slice(&self.held.split_to(count));
        if self.held.is_empty() {
            // Keeps no reference to a received buffer of which nothing is left.
            self.held = Bytes::new();
        }
        self.release(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        if from.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.poll_room(cx, from.len()))?;
        let count = room.min(from.len());
        self.send_chunk(cx, Bytes::copy_from_slice(&from[..count]), false)?;
        Poll::Ready(Ok(count))
    }

    /// Gathers the slices into one frame, so that a head and the first part of its body leave together.
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let total = from.iter().map(|slice| slice.len()).sum();
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.poll_room(cx, total))?;
        let count = room.min(total);
        let mut gathered = BytesMut::with_capacity(count);
        for slice in from {
            let left = count - gathered.len();
            if left == 0 {
                break;
            }
            gathered.extend_from_slice(&slice[..slice.len().min(left)]);
        }
        self.send_chunk(cx, gathered.freeze(), false)?;
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing is kept back here: what was written leaves as soon as the connection's task runs.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Half-closes: the peer reads the end, and reading here goes on.
    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.end_write())
    }
}

impl fmt::Debug for TunnelStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelStream")
            .field("id", &self.send.stream_id().as_u32())
            .field("read_ended", &self.read_ended)
            .field("write_ended", &self.write_ended)
            .finish_non_exhaustive()
    }
}

// === impl StreamError ===

impl StreamError {
    fn reset(reason: Reason) -> Self {
        let detail = format!("the peer reset the stream: {reason}");
        Self {
            reason: Some(reason),
            by_peer: true,
            is_reset: true,
            kind: io::ErrorKind::ConnectionReset,
            detail,
        }
    }

    fn after_end() -> Self {
        let detail = "this side has already half-closed the stream".into();
        Self {
            reason: None,
            by_peer: false,
            is_reset: false,
            kind: io::ErrorKind::BrokenPipe,
            detail,
        }
    }

    /// The stream error inside an [`io::Error`] of a [`TunnelStream`], if it is one.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl From<h2::Error> for StreamError {
    fn from(error: h2::Error) -> Self {
        let (is_reset, by_peer) = (error.is_reset(), error.is_remote());
        let detail = match (is_reset, by_peer) {
            (true, true) => format!("the peer reset the stream: {error}"),
            (true, false) => format!("the stream was reset by this side: {error}"),
            (false, _) => format!("the tunnel connection ended: {error}"),
        };
        let kind = if is_reset {
            io::ErrorKind::ConnectionReset
        } else {
            io::ErrorKind::ConnectionAborted
        };
        Self {
            reason: error.reason(),
            by_peer,
            is_reset,
            kind,
            detail,
        }
    }
}

impl From<StreamError> for io::Error {
    fn from(error: StreamError) -> Self {
        io::Error::new(error.kind, error)
    }
}
