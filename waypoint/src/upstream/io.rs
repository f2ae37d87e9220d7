//! The byte stream to an endpoint: a stream in a tunnel, or a plain connection.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use cairn_hbone::TunnelStream;
use cairn_identity::OriginatedStream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A byte stream to an endpoint.
#[derive(Debug)]
pub enum UpstreamIo {
    /// In a tunnel.
    Tunnel(TunnelStream),
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS on one of them.
    Tls(Box<OriginatedStream<UpstreamIo>>),
}

macro_rules! each {
    ($this:expr, $io:ident => $call:expr) => {
        match $this.get_mut() {
            UpstreamIo::Tunnel(io) => {
                let $io = Pin::new(io);
                $call
            }
            UpstreamIo::Plain(io) => {
                let $io = Pin::new(io);
                $call
            }
            UpstreamIo::Tls(io) => {
                let $io = Pin::new(&mut **io);
                $call
            }
        }
    };
}

/// Read from a plain connection at a time.
const READ_SIZE: usize = 16 * 1024;

// === impl UpstreamIo ===

impl UpstreamIo {
    /// Reads what has arrived; nothing is the end. `buffer` serves a plain connection, and is given up while there is nothing to read,
    /// so that a silent connection keeps no memory.
    pub fn poll_bytes(&mut self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        match self {
            UpstreamIo::Tunnel(stream) => match ready!(stream.poll_data(cx)) {
                None => Poll::Ready(Ok(Bytes::new())),
                Some(data) => Poll::Ready(data),
            },
            UpstreamIo::Plain(_) | UpstreamIo::Tls(_) => {
                buffer.resize(READ_SIZE, 0);
                let mut into = ReadBuf::new(buffer);
                let read = match Pin::new(self).poll_read(cx, &mut into) {
                    // Who closes without TLS's own farewell is gone as well; what these bytes are worth is for those who read them.
                    Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
                    read => read,
                };
                let filled = into.filled().len();
                if !matches!(read, Poll::Ready(Ok(()))) {
                    *buffer = BytesMut::new();
                }
                ready!(read)?;
                Poll::Ready(Ok(buffer.split_to(filled).freeze()))
            }
        }
    }
}

impl UpstreamIo {
    /// Whether the other side has reset the stream, where that can be told from its end.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            UpstreamIo::Tunnel(stream) => stream.poll_reset(cx).map(drop),
            UpstreamIo::Plain(_) => Poll::Pending,
            UpstreamIo::Tls(stream) => stream.get_mut().0.poll_reset(cx),
        }
    }

    /// Ends the stream so that the other side does not take it for a regular end: that would tell it that it has heard everything.
    pub fn reset(self) {
        match self {
            UpstreamIo::Tunnel(stream) => stream.reset(h2::Reason::CONNECT_ERROR),
            UpstreamIo::Plain(stream) => {
                let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            }
            UpstreamIo::Tls(stream) => stream.into_inner().0.reset(),
        }
    }
}

impl AsyncRead for UpstreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, io => io.poll_read(cx, into))
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, io => io.poll_write(cx, from))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        each!(self, io => io.poll_write_vectored(cx, from))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => io.poll_shutdown(cx))
    }
}
