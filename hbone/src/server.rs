//! Accepting tunnels: one HTTP/2 connection whose streams are CONNECT requests.
//!
//! [`serve`] drives one connection until it ends. Each CONNECT becomes a [`Connect`], which waits for its caller's answer; everything
//! else is answered here (404 for other methods and for extended CONNECT, as `connect_terminate` has no route for them). The
//! connection's task does TLS and framing only: `on_connect` must be cheap, and spawns what is not.
//!
//! What a peer can make us hold is bounded: streams ([`ServerSettings::streams`]), header bytes, unread data
//! ([`WindowSettings`]), resets that were never looked at, errors, and time (handshake, heads that do not end, PING, idleness).
//!
//! A drain sends GOAWAY; streams that are open go on, and the connection ends with the last one.

use std::{
    fmt,
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::{SpiffeId, clock};
use h2::{Reason, RecvStream, server::SendResponse};
use http::{HeaderMap, Method, Request, Response, StatusCode, uri::Authority};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Sleep, sleep_until, timeout},
};

use crate::{
    drain, heads,
    keepalive::{Keepalive, KeepaliveSettings, PeerGone, Resize},
    shared::{Shared, Slot},
    stream::TunnelStream,
    stream_limit::StreamLimits,
    turn::Turn,
    windows::{WindowSettings, Windows},
};

/// The two ends of a tunnel connection; shared by all its streams.
#[derive(Debug)]
pub struct Peer {
    /// Who the peer proved to be, if its connection was authenticated.
    pub id: Option<SpiffeId>,
    /// Where its TCP connection comes from; ztunnel keeps the client pod's address.
    pub address: SocketAddr,
    /// Where it was accepted.
    pub local_address: SocketAddr,
    /// Who we proved to be.
    pub local_id: Option<SpiffeId>,
}

/// What one accepted connection may do.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// SETTINGS_MAX_CONCURRENT_STREAMS.
    pub streams: StreamLimits,
    /// SETTINGS_MAX_HEADER_LIST_SIZE, in bytes (16 KiB); longer heads are answered 431.
    pub max_header_list: u32,
    /// SETTINGS_MAX_FRAME_SIZE, in bytes (32 KiB).
    pub max_frame_size: u32,
    /// How much one stream may hand over that was not sent yet, in bytes (128 KiB).
    pub max_send_buffer: usize,
    /// Bookkeeping that unread DATA frames smaller than 256 bytes may cost, in bytes a connection (4 MiB).
    pub small_frame_budget: usize,
    /// How many streams may be reset by the peer before they were looked at (200); one more ends the connection.
    pub max_pending_resets: usize,
    /// How many streams of one connection may break the protocol (1,024); one more ends the connection.
    pub max_error_resets: usize,
    /// How long the HTTP/2 preface may take (10 s).
    pub handshake_timeout: Duration,
    /// How long a head may take from its first byte to its last, and every other frame but DATA (10 s).
    pub head_timeout: Duration,
    /// How long a connection may be without streams before it is drained (1 h).
    pub idle_timeout: Duration,
    /// PINGs.
    pub keepalive: KeepaliveSettings,
    /// Flow control.
    pub windows: WindowSettings,
}

/// One CONNECT that waits for its answer. Dropped unanswered, the stream is reset.
pub struct Connect {
    /// Where the peer wants to go: host and port as it wrote them.
    pub authority: Authority,
    /// The request's headers, for example `baggage`.
    pub headers: HeaderMap,
    /// The ends of the connection that it came on.
    pub peer: Arc<Peer>,
    respond: SendResponse<Bytes>,
    recv: RecvStream,
    slot: Slot,
}

/// The peer reset the stream, or its connection ended, before it was answered.
#[derive(Debug, thiserror::Error)]
#[error("the CONNECT was cancelled before it was answered: {0}")]
pub struct AlreadyGone(#[from] h2::Error);

/// Why a connection did not end well. Its streams have learned of it already.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No HTTP/2 preface in time.
    #[error("the peer did not begin to speak HTTP/2 within {0:?}")]
    HandshakeTimeout(Duration),
    /// A head was not finished in time.
    #[error("the peer did not finish a head, or another frame, within {0:?}")]
    HeadTimeout(Duration),
    /// A PING was not answered in time.
    #[error("the peer did not answer a PING within {0:?} and counts as gone")]
    KeepaliveTimeout(Duration),
    /// The transport failed.
    #[error("the tunnel's transport failed: {0}")]
    Transport(#[source] io::Error),
    /// The peer broke the protocol, or says that we did.
    #[error("the tunnel connection failed: {0}")]
    Protocol(#[source] h2::Error),
}

/// How long the good-bye to a peer that does not finish a head may take.
const GOODBYE: Duration = Duration::from_secs(1);

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            streams: StreamLimits::default(),
            max_header_list: 16 << 10,
            max_frame_size: 32 << 10,
            max_send_buffer: 128 << 10,
            small_frame_budget: 4 << 20,
            max_pending_resets: 200,
            max_error_resets: 1024,
            handshake_timeout: Duration::from_secs(10),
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(3600),
            keepalive: KeepaliveSettings::default(),
            windows: WindowSettings::default(),
        }
    }
}

/// Serves one connection until the peer closes it, it fails, or a drain or idleness ends it.
///
/// `io` is what TLS made of the connection, `peer` what TLS proved. `on_connect` is called in this task for each CONNECT. The watch
/// is held until the connection has ended. Cancelling the future closes the connection and breaks its streams.
pub async fn serve<IO>(
    io: IO,
    peer: Arc<Peer>,
    settings: &ServerSettings,
    drain: drain::Watch,
    mut on_connect: impl FnMut(Connect) + Send,
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limit = settings.streams.grant();
    let windows = Windows::new(settings.windows.clone(), limit.streams());
    let (io, mut late) = heads::watch(io, settings.head_timeout);
    let handshake = builder(settings, limit.streams(), &windows).handshake::<_, Bytes>(io);
    let mut connection = match timeout(settings.handshake_timeout, handshake).await {
        Ok(connection) => connection?,
        Err(_) => return Err(ServeError::HandshakeTimeout(settings.handshake_timeout)),
    };
    let shared = Shared::new(windows.release_at(), None);
    let mut keepalive = connection
        .ping_pong()
        .map(|ping_pong| Keepalive::new(ping_pong, settings.keepalive, windows));

    let mut drained = drain.into_drained();
    let mut draining = false;
    let mut idle = pin!(sleep_until(clock::now() + settings.idle_timeout));
    let mut closing_idle = false;
    let mut turn = Turn::default();
    let mut ending: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        ready!(turn.poll(cx, shared.streams()));
        if !draining && Pin::new(&mut drained).poll(cx).is_ready() {
            draining = true;
            connection.graceful_shutdown();
        }
        while !closing_idle && idle.as_mut().poll(cx).is_ready() {
            let now = clock::now();
            let deadline = if shared.streams() > 0 { now } else { shared.idle_since() } + settings.idle_timeout;
            if deadline > now {
                idle.as_mut().reset(deadline);
            } else {
                closing_idle = true;
                connection.graceful_shutdown();
            }
        }
        loop {
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => accept(request, respond, &peer, &shared, &mut on_connect),
                // Without streams, a transport that is simply gone is as good an end as any.
                Poll::Ready(Some(Err(error))) if error.is_io() && shared.streams() == 0 => return Poll::Ready(Ok(())),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error.into())),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            }
        }
        if ending.is_none() && late.poll(cx).is_ready() {
            tracing::debug!(client = %peer.address, "a tunnel's peer does not finish a head");
            connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
            ending = Some(Box::pin(sleep_until(clock::now() + GOODBYE)));
            cx.waker().wake_by_ref();
        }
        if let Some(ending) = &mut ending
            && ending.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(ServeError::HeadTimeout(settings.head_timeout)));
        }
        match poll_keepalive(&mut keepalive, cx, &shared, &mut connection) {
            Poll::Ready(PeerGone) => Poll::Ready(Err(ServeError::KeepaliveTimeout(settings.keepalive.timeout))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

fn builder(settings: &ServerSettings, streams: u32, windows: &Windows) -> h2::server::Builder {
    let sizes = windows.sizes();
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(streams)
        .max_header_list_size(settings.max_header_list)
        .max_frame_size(settings.max_frame_size)
        .max_send_buffer_size(settings.max_send_buffer)
        .data_frame_budget(settings.small_frame_budget)
        .max_pending_accept_reset_streams(settings.max_pending_resets)
        .max_local_error_reset_streams(Some(settings.max_error_resets))
        .initial_window_size(sizes.stream)
        .initial_connection_window_size(sizes.connection);
    builder
}

fn poll_keepalive<C: Resize>(
    keepalive: &mut Option<Keepalive>,
    cx: &mut Context<'_>,
    shared: &Shared,
    connection: &mut C,
) -> Poll<PeerGone> {
    match keepalive {
        Some(keepalive) => keepalive.poll(cx, shared, connection),
        None => Poll::Pending,
    }
}

/// Hands a CONNECT to the caller and answers everything else.
fn accept(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    peer: &Arc<Peer>,
    shared: &Arc<Shared>,
    on_connect: &mut impl FnMut(Connect),
) {
    let (head, recv) = request.into_parts();
    let extended = head.extensions.get::<h2::ext::Protocol>().is_some();
    let status = match head.uri.into_parts().authority {
        _ if head.method != Method::CONNECT || extended => StatusCode::NOT_FOUND,
        Some(authority) => {
            let slot = Slot::take(shared);
            return on_connect(Connect {
                authority,
                headers: head.headers,
                peer: peer.clone(),
                respond,
                recv,
                slot,
            });
        }
        None => StatusCode::BAD_REQUEST,
    };
    let mut response = Response::new(());
    *response.status_mut() = status;
    // Fails only when the peer has reset the stream already, and then nobody waits for the answer.
    let _ = respond.send_response(response, true);
}

// === impl Connect ===

impl Connect {
    /// Answers 200 with `headers`; from then on the tunnel carries bytes.
    pub fn accept(mut self, headers: HeaderMap) -> Result<TunnelStream, AlreadyGone> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let send = self.respond.send_response(response, false)?;
        Ok(TunnelStream::new(send, self.recv, self.slot))
    }

    /// Answers with another status than 200 and ends the stream. A peer that is gone is not told.
    pub fn refuse(mut self, status: StatusCode, headers: HeaderMap, body: impl Into<Bytes>) {
        let body = body.into();
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        if let Ok(mut send) = self.respond.send_response(response, body.is_empty())
            && !body.is_empty()
        {
            // Fails only when the peer has reset the stream since.
            let _ = send.send_data(body, true);
        }
    }

    /// Resets the stream instead of answering it.
    pub fn reset(mut self, reason: Reason) {
        self.respond.send_reset(reason);
    }

    /// Completes when the peer no longer waits for the answer; for callers that connect onwards before they answer.
    pub fn poll_cancelled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.respond.poll_reset(cx).map(|_| ())
    }

    /// As [`Connect::poll_cancelled`].
    pub async fn cancelled(&mut self) {
        poll_fn(|cx| self.poll_cancelled(cx)).await;
    }
}

impl fmt::Debug for Connect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connect")
            .field("authority", &self.authority)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

// === impl ServeError ===

impl From<h2::Error> for ServeError {
    fn from(error: h2::Error) -> Self {
        if error.is_io() {
            let text = error.to_string();
            return Self::Transport(error.into_io().unwrap_or_else(|| io::Error::other(text)));
        }
        Self::Protocol(error)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Resize for h2::server::Connection<IO, Bytes> {
    fn set_connection_window(&mut self, bytes: u32) {
        self.set_target_window_size(bytes);
    }

    fn set_stream_window(&mut self, bytes: u32) -> bool {
        self.set_initial_window_size(bytes).is_ok()
    }
}
