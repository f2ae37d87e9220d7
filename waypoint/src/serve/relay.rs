//! Bytes in both directions, until both sides have ended: of TCP connections, and of HTTP connections that were switched to another
//! protocol.
//!
//! Half-closes are passed on as such; a reset of one side resets the other. What one side sends waits for the other to take it, one
//! piece at a time, so that a slow reader slows its writer and fills nothing.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use cairn_exchange::clock::{self, Instant};
use cairn_hbone::TunnelStream;
use tokio::io::AsyncWrite as _;

use super::open::{Over, Standing};
use crate::upstream::UpstreamIo;

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Both sides ended.
    Clean,
    /// The client reset.
    ClientGone,
    /// The endpoint reset.
    EndpointGone,
    /// Silence.
    Idle,
    /// The maximum duration.
    Duration,
    /// Policy allows it no more.
    Denied,
    /// Its service is gone.
    Gone,
}

/// How long a connection may last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms {
    /// Without a byte in either direction.
    pub idle: Option<Duration>,
    /// Whatever moves.
    pub until: Option<Instant>,
    /// How often its progress is told.
    pub interval: Option<Duration>,
}

/// Both directions of a connection.
pub struct Relay {
    client: Option<TunnelStream>,
    endpoint: Option<UpstreamIo>,
    /// Client to endpoint.
    up: Direction,
    /// Endpoint to client.
    down: Direction,
    buffer: BytesMut,
    /// Bytes for the client.
    pub sent: u64,
    /// Bytes from the client.
    pub received: u64,
    moved: Instant,
}

/// How a direction ended early.
enum Cut {
    /// The side that reads takes no more. It may have sent everything before (END_STREAM, then a reset that says so): whether it is
    /// gone for good, the other direction learns when it has read to the end.
    TakesNoMore,
    /// One side is gone.
    Gone(End),
}

/// One direction: what was read and not yet written, and how far its end has got.
#[derive(Default)]
struct Direction {
    pending: Bytes,
    read_ended: bool,
    ended: bool,
}

impl Relay {
    /// A client and its endpoint, and what each has said already.
    pub fn new(client: TunnelStream, endpoint: UpstreamIo, held: Bytes, greeting: Bytes) -> Self {
        let (received, sent) = (held.len() as u64, greeting.len() as u64);
        Self {
            client: Some(client),
            endpoint: Some(endpoint),
            up: Direction {
                pending: held,
                ..Direction::default()
            },
            down: Direction {
                pending: greeting,
                ..Direction::default()
            },
            buffer: BytesMut::new(),
            sent,
            received,
            moved: clock::now(),
        }
    }

    /// Passes bytes until both sides have ended, or one of them or the terms have cut it; then both are ended in the same way.
    pub async fn run(&mut self, terms: Terms, standing: &Standing, mut tell: impl FnMut(&Self)) -> End {
        let mut seen = (0, 0);
        let mut last_moved = clock::now();
        let end = loop {
            let now = clock::now();
            let wake = [
                terms.idle.map(|idle| last_moved + idle),
                terms.until,
                terms.interval.map(|interval| now + interval),
            ]
            .into_iter()
            .flatten()
            .min();
            let done = poll_fn(|cx| match standing.poll_over(cx) {
                Poll::Ready(Over::Denied) => Poll::Ready(End::Denied),
                Poll::Ready(Over::Gone) => Poll::Ready(End::Gone),
                Poll::Pending => self.poll(cx),
            });
            let ended = match wake {
                Some(wake) => tokio::time::timeout_at(wake, done).await.ok(),
                None => Some(done.await),
            };
            if let Some(end) = ended {
                break end;
            }
            let moved = (self.sent, self.received);
            if moved != seen {
                seen = moved;
                last_moved = self.moved;
            }
            let now = clock::now();
            if terms.until.is_some_and(|until| now >= until) {
                break End::Duration;
            }
            if terms.idle.is_some_and(|idle| now >= last_moved + idle) {
                break End::Idle;
            }
            tell(self);
        };
        tell(self);
        self.end(end);
        end
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let (Some(client), Some(endpoint)) = (&mut self.client, &mut self.endpoint) else {
            return Poll::Ready(End::Clean);
        };
        if !self.up.ended
            && let Poll::Ready(done) = self
                .up
                .client_to_endpoint(cx, client, endpoint, &mut self.received, &mut self.moved)
        {
            match done {
                Ok(()) | Err(Cut::TakesNoMore) => self.up.end(),
                Err(Cut::Gone(end)) => return Poll::Ready(end),
            }
        }
        if !self.down.ended
            && let Poll::Ready(done) =
                self.down
                    .endpoint_to_client(cx, client, endpoint, &mut self.buffer, &mut self.sent, &mut self.moved)
        {
            match done {
                Ok(()) | Err(Cut::TakesNoMore) => self.down.end(),
                Err(Cut::Gone(end)) => return Poll::Ready(end),
            }
        }
        // Who has said everything may still leave before it has heard everything. Reading does not tell any more, and writing not yet.
        if self.up.read_ended && !self.down.ended && client.poll_reset(cx).is_ready() {
            self.down.end();
        }
        if self.down.read_ended && !self.up.ended && endpoint.poll_reset(cx).is_ready() {
            self.up.end();
        }
        if self.up.ended && self.down.ended {
            Poll::Ready(End::Clean)
        } else {
            Poll::Pending
        }
    }

    /// Ends both sides as one of them, or we, ended.
    fn end(&mut self, end: End) {
        let (client, endpoint) = (self.client.take(), self.endpoint.take());
        match end {
            End::Clean => {}
            End::ClientGone | End::EndpointGone | End::Idle | End::Duration | End::Denied | End::Gone => {
                if let Some(client) = client {
                    client.reset(h2::Reason::CONNECT_ERROR);
                }
                if let Some(endpoint) = endpoint {
                    endpoint.reset();
                }
            }
        }
    }
}

impl Direction {
    fn end(&mut self) {
        self.ended = true;
        self.pending = Bytes::new();
    }

    fn client_to_endpoint(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut TunnelStream,
        endpoint: &mut UpstreamIo,
        count: &mut u64,
        moved: &mut Instant,
    ) -> Poll<Result<(), Cut>> {
        loop {
            while !self.pending.is_empty() {
                match endpoint {
                    UpstreamIo::Tunnel(stream) => {
                        ready!(stream.poll_send(cx, &mut self.pending, false)).map_err(|_| Cut::TakesNoMore)?;
                    }
                    UpstreamIo::Plain(_) | UpstreamIo::Tls(_) => {
                        let written =
                            ready!(Pin::new(&mut *endpoint).poll_write(cx, &self.pending)).map_err(|error| cut(&error))?;
                        self.pending.advance(written);
                    }
                }
            }
            if self.read_ended {
                return Pin::new(&mut *endpoint).poll_shutdown(cx).map_err(|error| cut(&error));
            }
            let data = match client.poll_data(cx) {
                Poll::Ready(data) => data,
                Poll::Pending => {
                    // TLS keeps what was written until it is told to send it.
                    if let UpstreamIo::Tls(stream) = endpoint {
                        ready!(Pin::new(&mut **stream).poll_flush(cx)).map_err(|error| cut(&error))?;
                    }
                    return Poll::Pending;
                }
            };
            match data {
                None => self.read_ended = true,
                Some(Err(_)) => return Poll::Ready(Err(Cut::Gone(End::ClientGone))),
                Some(Ok(data)) => {
                    *count += data.len() as u64;
                    *moved = clock::now();
                    self.pending = data;
                }
            }
        }
    }

    fn endpoint_to_client(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut TunnelStream,
        endpoint: &mut UpstreamIo,
        buffer: &mut BytesMut,
        count: &mut u64,
        moved: &mut Instant,
    ) -> Poll<Result<(), Cut>> {
        loop {
            while !self.pending.is_empty() {
                ready!(client.poll_send(cx, &mut self.pending, false)).map_err(|_| Cut::TakesNoMore)?;
            }
            if self.read_ended {
                return Pin::new(&mut *client).poll_shutdown(cx).map_err(|_| Cut::TakesNoMore);
            }
            let data = ready!(endpoint.poll_bytes(cx, buffer)).map_err(|_| Cut::Gone(End::EndpointGone))?;
            if data.is_empty() {
                self.read_ended = true;
            } else {
                *count += data.len() as u64;
                *moved = clock::now();
                self.pending = data;
            }
        }
    }
}

/// What a failed write to a plain connection means. A reset is told once, here or to the reader; a broken pipe comes after the
/// endpoint's own end, which may still have to be read.
fn cut(error: &std::io::Error) -> Cut {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        Cut::TakesNoMore
    } else {
        Cut::Gone(End::EndpointGone)
    }
}
