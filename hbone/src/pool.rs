//! Opening streams: a pool of tunnel connections for each destination.
//!
//! [`Pool::open`] finds or makes a connection (see `place.rs` for the choice), sends CONNECT and waits for the answer. A stream that
//! raced with the end of its connection (one that had worked before was closed, or REFUSED_STREAM) is opened once more on another;
//! one that the peer has not looked at (GOAWAY) up to eight times. Nothing of the caller's was sent yet, so that is always safe. Any other failure is the caller's to judge, and touches no
//! other stream: a refused CONNECT says something about one target, not about the tunnel.
//!
//! Destinations live in a sharded map, so opens to different destinations share no lock for longer than a look-up.

use std::{
    fmt,
    future::poll_fn,
    hash::BuildHasher,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use cairn_exchange::{SpiffeId, clock};
use foldhash::fast::RandomState;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Method, Request, Uri, Version, uri::Authority};
use parking_lot::RwLock;
use tokio::time::{timeout, timeout_at};

use crate::{
    dial::Dial,
    keepalive::KeepaliveSettings,
    open_error::OpenError,
    place::{Asking, Pick, Place},
    shared::Slot,
    stream::TunnelStream,
    tunnel::{self, Connect, ConnectError, Established, Tunnel},
    windows::WindowSettings,
};

/// Where a tunnel goes, and on which terms; tunnels are shared by those who want the same.
#[derive(Clone, Copy, Debug, Hash, Eq, PartialEq)]
pub struct Destination {
    /// The TCP address of the tunnel's end, usually port 15008.
    pub address: SocketAddr,
    /// Names the TLS terms: identity, trust, accepted peers. Different terms never share a connection.
    pub trust: u64,
}

/// How tunnels are made and kept.
#[derive(Clone, Debug)]
pub struct PoolSettings {
    /// How long an open waits for a connection: TCP, TLS and HTTP/2 (10 s, as `connect_originate`).
    pub connect_timeout: Duration,
    /// How long the peer may take to answer a CONNECT (15 s: ztunnel itself connects onwards for up to 10 s before it answers).
    pub answer_timeout: Duration,
    /// With this many streams on the least busy tunnel another one is dialed (16).
    pub spread_streams: u32,
    /// How many tunnels to one destination are made to spread load over cores (4).
    pub spread_tunnels: usize,
    /// How many streams one tunnel carries at most, whatever the peer allows (200).
    pub max_streams: u32,
    /// How many tunnels to one destination there are at most, all of them full (64).
    pub max_tunnels: usize,
    /// How many opens may wait for a connection to one destination (1,024).
    pub max_waiting: u32,
    /// How long a tunnel without streams is kept (1 h).
    pub idle_timeout: Duration,
    /// PINGs.
    pub keepalive: KeepaliveSettings,
    /// Flow control.
    pub windows: WindowSettings,
    /// SETTINGS_MAX_HEADER_LIST_SIZE, in bytes (16 KiB).
    pub max_header_list: u32,
    /// SETTINGS_MAX_FRAME_SIZE, in bytes (32 KiB).
    pub max_frame_size: u32,
    /// How much one stream may hand over that was not sent yet, in bytes (128 KiB).
    pub max_send_buffer: usize,
    /// Bookkeeping that unread DATA frames smaller than 256 bytes may cost, in bytes a connection (4 MiB).
    pub small_frame_budget: usize,
}

/// Tunnels to many destinations, shared by all who hold a clone. Dropping the last clone ends each tunnel with its last stream.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    settings: Arc<PoolSettings>,
    dial: Box<dyn Connect>,
    hasher: RandomState,
    shards: [RwLock<Shard>; SHARDS],
}

type Shard = std::collections::HashMap<Destination, Arc<Place>, RandomState>;

/// A stream that the destination has accepted.
#[derive(Debug)]
pub struct Opened {
    /// Carries the bytes.
    pub stream: TunnelStream,
    /// The headers of the answer, for example `baggage`.
    pub response_headers: HeaderMap,
    /// Who the tunnel's end proved to be.
    pub peer_id: Option<SpiffeId>,
    /// The address that the tunnel connection leaves from.
    pub local_address: SocketAddr,
}

/// What a pool holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Destinations with a tunnel or a dial.
    pub destinations: usize,
    /// Live tunnels.
    pub tunnels: usize,
    /// Streams on them.
    pub streams: usize,
}

/// How one try on one tunnel failed.
enum Failed {
    /// The tunnel takes no more streams, and the peer has not looked at this one (RFC 9113 §6.8).
    Unready(OpenError),
    /// Safe and sensible to try on another tunnel.
    Raced(OpenError),
    Final(OpenError),
}

const SHARDS: usize = 64;
/// How often an open is repeated that raced with the end of its connection.
const RACES: usize = 1;
/// How often another tunnel is looked for when the peer had said good-bye on the one that was found.
const UNREADY: usize = 8;
/// How much of a refusal's body is kept.
const BODY_SNIPPET: usize = 1024;
/// How long a refusal's body is waited for.
const BODY_PATIENCE: Duration = Duration::from_secs(1);
/// How often an open looks a destination up again that was just removed.
const LOOKUPS: usize = 8;

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(15),
            spread_streams: 16,
            spread_tunnels: 4,
            max_streams: 200,
            max_tunnels: 64,
            max_waiting: 1024,
            idle_timeout: Duration::from_secs(3600),
            keepalive: KeepaliveSettings::default(),
            windows: WindowSettings::default(),
            max_header_list: 16 << 10,
            max_frame_size: 32 << 10,
            max_send_buffer: 128 << 10,
            small_frame_budget: 4 << 20,
        }
    }
}

// === impl Pool ===

impl Pool {
    /// An empty pool. Tunnels run as tasks of the runtime in which they are opened.
    pub fn new(settings: PoolSettings, dial: impl Dial) -> Self {
        let hasher = RandomState::default();
        let shards = std::array::from_fn(|_| RwLock::new(Shard::with_hasher(hasher.clone())));
        Self {
            inner: Arc::new(Inner {
                settings: Arc::new(settings),
                dial: Box::new(dial),
                hasher,
                shards,
            }),
        }
    }

    /// Opens a stream to `authority` through the tunnel end at `destination`.
    pub async fn open(&self, destination: &Destination, authority: &str, headers: HeaderMap) -> Result<Opened, OpenError> {
        let authority: Authority = authority
            .parse()
            .map_err(|error| OpenError::Invalid(format!("authority {authority:?}: {error}")))?;
        let mut avoid: Option<Arc<Tunnel>> = None;
        let (mut raced, mut unready) = (0, 0);
        loop {
            let (tunnel, slot) = self.inner.tunnel(destination, avoid.as_ref()).await?;
            match self.open_on(destination, &tunnel, slot, &authority, headers.clone()).await {
                Ok(opened) => return Ok(opened),
                Err(Failed::Final(error)) => return Err(error),
                Err(Failed::Raced(_)) if raced < RACES => raced += 1,
                Err(Failed::Unready(_)) if unready < UNREADY => unready += 1,
                Err(Failed::Raced(error) | Failed::Unready(error)) => return Err(error),
            }
            tracing::debug!(address = %destination.address, "opening once more on another connection");
            avoid = Some(tunnel);
        }
    }

    async fn open_on(
        &self,
        destination: &Destination,
        tunnel: &Arc<Tunnel>,
        slot: Slot,
        authority: &Authority,
        headers: HeaderMap,
    ) -> Result<Opened, Failed> {
        let address = destination.address;
        let settings = &self.inner.settings;
        let closed = |error: h2::Error| OpenError::Closed {
            address,
            why: error.to_string(),
        };
        let mut sender = tunnel.sender.clone();
        // Ready at once for a fresh clone, unless the connection takes no more streams.
        if let Err(error) = poll_fn(|cx| sender.poll_ready(cx)).await {
            tunnel.set_gone();
            return Err(Failed::Unready(closed(error)));
        }
        let (answer, send) = match sender.send_request(connect_request(authority, headers), false) {
            Ok(sent) => sent,
            Err(error) if error.is_go_away() || error.is_io() => {
                tunnel.set_gone();
                return Err(Failed::Unready(closed(error)));
            }
            Err(error) => return Err(Failed::Final(OpenError::Invalid(error.to_string()))),
        };
        drop(sender);
        let deadline = clock::now() + settings.answer_timeout;
        match timeout_at(deadline, answer).await {
            Ok(Ok(response)) => {
                tunnel.answered();
                let (head, recv) = response.into_parts();
                if !head.status.is_success() {
                    let body = timeout(BODY_PATIENCE, snippet(recv)).await.unwrap_or_default();
                    let (status, headers) = (head.status, Box::new(head.headers));
                    return Err(Failed::Final(OpenError::Refused {
                        address,
                        status,
                        headers,
                        body,
                    }));
                }
                Ok(Opened {
                    stream: TunnelStream::new(send, recv, slot),
                    response_headers: head.headers,
                    peer_id: tunnel.peer_id.clone(),
                    local_address: tunnel.local_address,
                })
            }
            Ok(Err(error)) => Err(unanswered(address, tunnel, error)),
            Err(_) => Err(Failed::Final(OpenError::AnswerTimeout {
                address,
                after: settings.answer_timeout,
            })),
        }
    }

    /// Lets go of the tunnels to every destination that `keep` does not want; each ends with its last stream.
    ///
    /// The way to replace tunnels whose certificate or trust has changed.
    pub fn retain(&self, keep: impl Fn(&Destination) -> bool) {
        for shard in &self.inner.shards {
            shard.write().retain(|destination, place| {
                if !keep(destination) {
                    place.retire_all();
                    return !place.remove_if_empty();
                }
                true
            });
        }
    }

    /// How much there is now.
    pub fn stats(&self) -> PoolStats {
        let mut stats = PoolStats::default();
        for shard in &self.inner.shards {
            for place in shard.read().values() {
                let (tunnels, streams) = place.count();
                stats.destinations += 1;
                stats.tunnels += tunnels;
                stats.streams += streams;
            }
        }
        stats
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// CONNECT with `:method` and `:authority` only (RFC 9113 §8.5), as the mesh's other parts send it.
fn connect_request(authority: &Authority, headers: HeaderMap) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = Uri::from(authority.clone());
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = headers;
    request
}

/// What it means that a CONNECT ended without an answer.
fn unanswered(address: SocketAddr, tunnel: &Tunnel, error: h2::Error) -> Failed {
    match error.reason() {
        Some(reason) if error.is_reset() => {
            let reset = OpenError::Reset { address, reason };
            // RFC 9113 §8.7: REFUSED_STREAM says that nothing was done.
            if reason == Reason::REFUSED_STREAM {
                Failed::Raced(reset)
            } else {
                Failed::Final(reset)
            }
        }
        _ => {
            tunnel.set_gone();
            let closed = OpenError::Closed {
                address,
                why: error.to_string(),
            };
            if error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR) {
                Failed::Unready(closed)
            } else if tunnel.is_proven() {
                Failed::Raced(closed)
            } else {
                // A connection that never answered anything may be one that the peer does not want, for example because of our
                // certificate, which TLS 1.3 tells after the handshake: another one would end the same way.
                Failed::Final(closed)
            }
        }
    }
}

/// The beginning of a refusal's body.
async fn snippet(mut recv: RecvStream) -> Bytes {
    let mut body = BytesMut::new();
    while let Some(Ok(data)) = recv.data().await {
        body.extend_from_slice(&data[..data.len().min(BODY_SNIPPET - body.len())]);
        if body.len() >= BODY_SNIPPET {
            break;
        }
    }
    body.freeze()
}

// === impl Inner ===

impl Inner {
    /// A tunnel with a place for one more stream.
    async fn tunnel(
        self: &Arc<Self>,
        destination: &Destination,
        avoid: Option<&Arc<Tunnel>>,
    ) -> Result<(Arc<Tunnel>, Slot), OpenError> {
        for _ in 0..LOOKUPS {
            let place = self.place(destination);
            let (pick, must_dial) = place.pick(&self.settings, Asking::InPassing, avoid);
            if let Some(number) = must_dial {
                self.dial(&place, number);
            }
            match pick {
                Pick::Ready(tunnel, slot) => return Ok((tunnel, slot)),
                Pick::Failed(error) => return Err(error),
                Pick::Removed => continue,
                Pick::Wait(_) => {}
            }
            let found = place.wait(&self.settings, avoid, |number| self.dial(&place, number)).await;
            if let Err(error) = &found {
                tracing::debug!(%error, "no tunnel");
                self.prune(&place);
            }
            if let Some(found) = found? {
                return Ok(found);
            }
        }
        Err(OpenError::Closed {
            address: destination.address,
            why: "the destination was removed again and again".into(),
        })
    }

    fn shard(&self, destination: &Destination) -> &RwLock<Shard> {
        let hash = self.hasher.hash_one(destination);
        // The top bits: the map inside uses the bottom ones.
        let index = (hash >> (u64::BITS - SHARDS.trailing_zeros())) as usize;
        self.shards.get(index).unwrap_or(&self.shards[0])
    }

    fn place(&self, destination: &Destination) -> Arc<Place> {
        let shard = self.shard(destination);
        if let Some(place) = shard.read().get(destination) {
            return place.clone();
        }
        shard
            .write()
            .entry(*destination)
            .or_insert_with(|| Arc::new(Place::new(*destination)))
            .clone()
    }

    /// Takes a place out of the map when there is nothing in it.
    fn prune(&self, place: &Arc<Place>) {
        let mut shard = self.shard(&place.destination).write();
        if place.remove_if_empty() && shard.get(&place.destination).is_some_and(|other| Arc::ptr_eq(other, place)) {
            shard.remove(&place.destination);
        }
    }

    /// Begins a dial, in a task that stays with the tunnel until it is over.
    fn dial(self: &Arc<Self>, place: &Arc<Place>, number: u64) {
        let dialing = Dialing {
            inner: self.clone(),
            place: place.clone(),
            number,
            ended: false,
        };
        tokio::spawn(async move {
            let (inner, place, settings) = (
                Arc::downgrade(&dialing.inner),
                Arc::downgrade(&dialing.place),
                dialing.inner.settings.clone(),
            );
            // From here on the task keeps neither the pool nor the tunnel's handle alive.
            let Some(established) = dialing.run().await else { return };
            keep(established, inner, place, settings).await;
        });
    }
}

/// Drives a tunnel that is in the pool, and takes it out when it is over or was idle for long.
async fn keep(established: Established, inner: Weak<Inner>, place: Weak<Place>, settings: Arc<PoolSettings>) {
    let Established {
        tunnel: handle,
        mut driver,
    } = established;
    let (shared, tunnel) = (handle.shared().clone(), Arc::downgrade(&handle));
    drop(handle);
    let retire = || place.upgrade().is_none_or(|place| place.retire(&tunnel));
    tokio::select! {
        () = &mut driver => {}
        () = tunnel::idle(tunnel.clone(), shared, settings, retire) => driver.await,
    }
    if let Some(place) = place.upgrade() {
        place.lost(&tunnel);
        if let Some(inner) = inner.upgrade() {
            inner.prune(&place);
        }
    }
}

/// A dial on its way. Dropped half-way it has failed, so that nobody waits for it for ever.
struct Dialing {
    inner: Arc<Inner>,
    place: Arc<Place>,
    number: u64,
    ended: bool,
}

// === impl Dialing ===

impl Dialing {
    async fn run(mut self) -> Option<Established> {
        let settings = &self.inner.settings;
        let destination = &self.place.destination;
        let connect = self.inner.dial.connect(destination, settings, self.place.waiting.clone());
        let address = destination.address;
        let error = match timeout(settings.connect_timeout, connect).await {
            Ok(Ok(Established { tunnel, driver })) => {
                self.place.add(self.number, tunnel.clone());
                self.ended = true;
                return Some(Established { tunnel, driver });
            }
            Ok(Err(ConnectError::Dial(error))) => OpenError::Dial {
                address,
                source: Arc::new(error),
            },
            Ok(Err(ConnectError::Handshake(error))) => OpenError::Closed {
                address,
                why: error.to_string(),
            },
            Err(_) => OpenError::ConnectTimeout {
                address,
                after: settings.connect_timeout,
            },
        };
        self.end(error);
        None
    }

    fn end(&mut self, error: OpenError) {
        self.ended = true;
        self.place.fail(self.number, error);
        self.inner.prune(&self.place);
    }
}

impl Drop for Dialing {
    fn drop(&mut self) {
        if !self.ended {
            let address = self.place.destination.address;
            self.end(OpenError::Closed {
                address,
                why: "the dial was given up".into(),
            });
        }
    }
}
