//! One tunnel connection of the pool: from the dial to its end.
//!
//! A spawned task owns it, so that an open that is given up never takes away the connection that others wait for. The pool holds the
//! [`Tunnel`] handle; when it lets go of it, the connection ends with its last stream.

use std::{
    future::{Future, poll_fn},
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Poll, ready},
};

use bytes::Bytes;
use cairn_exchange::{SpiffeId, clock};
use h2::client::SendRequest;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::sleep_until,
};

use crate::{
    dial::{Dial, DialError, Dialed},
    keepalive::{Keepalive, Resize},
    pool::{Destination, PoolSettings},
    shared::{Shared, Slot, Waiting},
    turn::Turn,
    windows::Windows,
};

/// A live connection that streams can be opened on.
pub(crate) struct Tunnel {
    pub(crate) sender: SendRequest<Bytes>,
    pub(crate) peer_id: Option<SpiffeId>,
    pub(crate) local_address: SocketAddr,
    shared: Arc<Shared>,
    /// The peer's limit of concurrent streams, as far as we have heard.
    max_streams: AtomicU32,
    /// The peer takes no new streams: GOAWAY, or the connection is over.
    gone: AtomicBool,
    /// The peer has answered a request, so the connection works and its end is no refusal.
    proven: AtomicBool,
}

/// A tunnel and the task that drives it.
pub(crate) struct Established {
    pub(crate) tunnel: Arc<Tunnel>,
    pub(crate) driver: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// [`Dial`] without its type parameter.
pub(crate) trait Connect: Send + Sync {
    /// Dials and begins HTTP/2.
    fn connect<'a>(
        &'a self,
        destination: &'a Destination,
        settings: &'a Arc<PoolSettings>,
        waiting: Arc<Waiting>,
    ) -> Pin<Box<dyn Future<Output = Result<Established, ConnectError>> + Send + 'a>>;
}

/// Why no tunnel came about.
#[derive(Debug)]
pub(crate) enum ConnectError {
    Dial(DialError),
    Handshake(h2::Error),
}

impl<D: Dial> Connect for D {
    fn connect<'a>(
        &'a self,
        destination: &'a Destination,
        settings: &'a Arc<PoolSettings>,
        waiting: Arc<Waiting>,
    ) -> Pin<Box<dyn Future<Output = Result<Established, ConnectError>> + Send + 'a>> {
        Box::pin(async move {
            let dialed = self.dial(destination).await.map_err(ConnectError::Dial)?;
            establish(dialed, settings, waiting).await.map_err(ConnectError::Handshake)
        })
    }
}

async fn establish<Io>(dialed: Dialed<Io>, settings: &Arc<PoolSettings>, waiting: Arc<Waiting>) -> Result<Established, h2::Error>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let windows = Windows::new(settings.windows.clone(), settings.max_streams);
    let sizes = windows.sizes();
    let (sender, mut connection) = h2::client::Builder::new()
        .enable_push(false)
        .initial_max_send_streams(DEFAULT_MAX_STREAMS as usize)
        .max_header_list_size(settings.max_header_list)
        .max_frame_size(settings.max_frame_size)
        .max_send_buffer_size(settings.max_send_buffer)
        .data_frame_budget(settings.small_frame_budget)
        .initial_window_size(sizes.stream)
        .initial_connection_window_size(sizes.connection)
        .handshake::<_, Bytes>(dialed.io)
        .await?;
    let shared = Shared::new(windows.release_at(), Some(waiting));
    let keepalive = connection
        .ping_pong()
        .map(|ping_pong| Keepalive::new(ping_pong, settings.keepalive, windows));
    let tunnel = Arc::new(Tunnel {
        sender,
        peer_id: dialed.peer_id,
        local_address: dialed.local_address,
        shared: shared.clone(),
        max_streams: AtomicU32::new(DEFAULT_MAX_STREAMS),
        gone: AtomicBool::new(false),
        proven: AtomicBool::new(false),
    });
    Ok(Established {
        tunnel,
        driver: Box::pin(drive(connection, shared, keepalive)),
    })
}

/// Moves the connection's bytes until it is over or the peer is gone.
async fn drive<Io>(mut connection: h2::client::Connection<Io, Bytes>, shared: Arc<Shared>, mut keepalive: Option<Keepalive>)
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut turn = Turn::default();
    poll_fn(|cx| {
        ready!(turn.poll(cx, shared.streams()));
        if let Poll::Ready(end) = Pin::new(&mut connection).poll(cx) {
            if let Err(error) = end {
                tracing::debug!(%error, "tunnel connection ended");
            }
            return Poll::Ready(());
        }
        match &mut keepalive {
            Some(keepalive) => keepalive.poll(cx, &shared, &mut connection).map(|_gone| {
                tracing::debug!("tunnel connection ended: the peer did not answer a PING");
            }),
            None => Poll::Pending,
        }
    })
    .await;
}

/// Waits until the tunnel has had no stream for the idle timeout and `retire` agrees to let it go.
pub(crate) async fn idle(
    tunnel: std::sync::Weak<Tunnel>,
    shared: Arc<Shared>,
    settings: Arc<PoolSettings>,
    retire: impl Fn() -> bool,
) {
    let mut timer = pin!(sleep_until(clock::now() + settings.idle_timeout));
    loop {
        timer.as_mut().await;
        if tunnel.strong_count() == 0 {
            return;
        }
        let now = clock::now();
        let deadline = if shared.streams() > 0 { now } else { shared.idle_since() } + settings.idle_timeout;
        if deadline <= now && retire() {
            return;
        }
        timer.as_mut().reset(deadline.max(now + RETIRE_AGAIN));
    }
}

/// What RFC 9113 §6.5.2 recommends as the least that a peer allows, and what counts until its SETTINGS arrive.
const DEFAULT_MAX_STREAMS: u32 = 100;
/// When to ask again whether an idle tunnel may go that was just taken into use.
const RETIRE_AGAIN: std::time::Duration = std::time::Duration::from_millis(100);

// === impl Tunnel ===

impl Tunnel {
    pub(crate) fn streams(&self) -> u32 {
        self.shared.streams()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn take_slot(&self) -> Slot {
        Slot::take(&self.shared)
    }

    pub(crate) fn max_streams(&self) -> u32 {
        self.max_streams.load(Ordering::Relaxed)
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    pub(crate) fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    pub(crate) fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }

    /// The peer has answered, so its SETTINGS have arrived as well.
    pub(crate) fn answered(&self) {
        self.proven.store(true, Ordering::Relaxed);
        let max = u32::try_from(self.sender.current_max_send_streams()).unwrap_or(u32::MAX);
        if self.max_streams.load(Ordering::Relaxed) != max {
            self.max_streams.store(max, Ordering::Relaxed);
        }
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> Resize for h2::client::Connection<Io, Bytes> {
    fn set_connection_window(&mut self, bytes: u32) {
        self.set_target_window_size(bytes);
    }

    fn set_stream_window(&mut self, bytes: u32) -> bool {
        self.set_initial_window_size(bytes).is_ok()
    }
}
