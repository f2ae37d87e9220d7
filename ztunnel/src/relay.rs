//! Bytes in both directions between two ends, until both have ended.
//!
//! Half-closes are passed on as such; a reset of one end resets the other, so that nobody takes a part for the whole. What one end
//! sends waits for the other to take it, one piece at a time. A connection that is silent holds no buffer.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use cairn_hbone::TunnelStream;
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    net::TcpStream,
};

use crate::sockets;

/// One end of a connection.
#[derive(Debug)]
pub enum Side {
    /// TCP.
    Tcp(TcpStream),
    /// A stream in a tunnel.
    Tunnel(Box<TunnelStream>),
}

/// Told of every piece that has arrived.
pub trait Count {
    /// From the client.
    fn received(&self, bytes: usize);
    /// From the server.
    fn sent(&self, bytes: usize);
}

/// One direction.
#[derive(Default)]
struct Direction {
    pending: Bytes,
    /// How much is asked for at once.
    size: usize,
    read_ended: bool,
    ended: bool,
}

/// How much is asked for at first.
const SMALL: usize = 4 << 10;
/// How much is asked for of an end that always has more.
const LARGE: usize = 64 << 10;

/// Moves bytes until both ends have ended; an error ends both by a reset, as does dropping the future.
pub async fn run(client: Side, server: Side, count: &impl Count) -> io::Result<()> {
    let (mut client, mut server) = (Reset(Some(client)), Reset(Some(server)));
    let (mut up, mut down) = (Direction::default(), Direction::default());
    let done = poll_fn(|cx| {
        let (Some(client), Some(server)) = (&mut client.0, &mut server.0) else {
            return Poll::Ready(Ok(()));
        };
        if !up.ended
            && let Poll::Ready(end) = up.poll(cx, client, server, |bytes| count.received(bytes))
        {
            end?;
            up.ended = true;
        }
        if !down.ended
            && let Poll::Ready(end) = down.poll(cx, server, client, |bytes| count.sent(bytes))
        {
            end?;
            down.ended = true;
        }
        if up.ended && down.ended {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await;
    if done.is_ok() {
        (client.0, server.0) = (None, None);
    }
    done
}

/// Ends what it holds by a reset.
struct Reset(Option<Side>);

impl Drop for Reset {
    fn drop(&mut self) {
        if let Some(side) = self.0.take() {
            side.reset();
        }
    }
}

// === impl Direction ===

impl Direction {
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut Side, to: &mut Side, count: impl Fn(usize)) -> Poll<io::Result<()>> {
        loop {
            while !self.pending.is_empty() {
                ready!(to.poll_send(cx, &mut self.pending))?;
            }
            if self.read_ended {
                return to.poll_end(cx);
            }
            let data = ready!(from.poll_data(cx, &mut self.size))?;
            if data.is_empty() {
                self.read_ended = true;
            } else {
                count(data.len());
                self.pending = data;
            }
        }
    }
}

// === impl Side ===

impl Side {
    /// The next piece; empty at the end.
    fn poll_data(&mut self, cx: &mut Context<'_>, size: &mut usize) -> Poll<io::Result<Bytes>> {
        match self {
            Self::Tunnel(stream) => Poll::Ready(ready!(stream.poll_data(cx)).unwrap_or(Ok(Bytes::new()))),
            Self::Tcp(stream) => {
                // No buffer before there is something to put into it.
                ready!(stream.poll_read_ready(cx))?;
                let mut buffer = BytesMut::zeroed((*size).clamp(SMALL, LARGE));
                let mut into = ReadBuf::new(&mut buffer);
                ready!(Pin::new(stream).poll_read(cx, &mut into))?;
                let read = into.filled().len();
                *size = match read {
                    _ if read == buffer.len() => buffer.len() * 2,
                    _ if read < buffer.len() / 4 => buffer.len() / 2,
                    _ => buffer.len(),
                };
                buffer.truncate(read);
                Poll::Ready(Ok(buffer.freeze()))
            }
        }
    }

    /// Takes something off the front.
    fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<()>> {
        match self {
            Self::Tunnel(stream) => ready!(stream.poll_send(cx, data, false))?,
            Self::Tcp(stream) => {
                let written = ready!(Pin::new(stream).poll_write(cx, data))?;
                data.advance(written);
                written
            }
        };
        Poll::Ready(Ok(()))
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = match self {
            Self::Tunnel(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        };
        // Who is gone before it was told that nothing more comes has lost nothing by it.
        match ready!(ended) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            other => Poll::Ready(other),
        }
    }

    /// Ends it as something that has failed.
    pub fn reset(self) {
        match self {
            Self::Tcp(stream) => sockets::reset(stream),
            Self::Tunnel(stream) => stream.reset(h2::Reason::CONNECT_ERROR),
        }
    }
}
