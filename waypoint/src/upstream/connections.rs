//! Connections to one endpoint: idle HTTP/1.1 ones, and HTTP/2 ones that requests share.
//!
//! A connection is used only for requests whose [`Key`] it was made under: the fingerprint of the cluster's transport settings and the
//! client's identity. Idle connections stand in a few stacks so that cores do not wait for each other; the most recently used goes
//! first, and one that was idle for too long is closed by whoever comes by, or by the sweep.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::{
    SpiffeId,
    clock::{Instant, now},
};
use hyper::client::conn::http1::SendRequest;
use parking_lot::Mutex;
use smallvec::SmallVec;

use super::{
    Cluster, ClusterSettings, EndpointState, Level,
    queue::{Permit, Queues, Turn},
};
use crate::body::RequestBody;

/// Stacks of idle connections per endpoint.
const STACKS: usize = 4;
/// Idle connections per stack; one more closes the oldest.
const MAX_IDLE: usize = 256;
/// HTTP/2 streams on a connection before another is opened, when the endpoint allows more.
const HTTP2_SPREAD: u32 = 100;

/// What a connection was made under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Fingerprint of the transport settings.
    pub transport: u64,
    /// Fingerprint of the terms under which its tunnel was made.
    pub tunnel: u64,
    /// Whose requests it carries.
    pub principal: Option<SpiffeId>,
    /// Where it goes, for endpoints that are wherever the client wanted to go.
    pub original: Option<std::net::SocketAddr>,
    /// What it was made for, where the transport settings tell purposes apart.
    pub purpose: Option<Arc<super::Purpose>>,
    /// Under whose limits.
    pub level: Level,
}

/// An HTTP/1.1 connection that is in nobody's hands.
#[derive(Debug)]
pub struct Http1 {
    /// Sends requests.
    pub sender: SendRequest<RequestBody>,
    /// What it was made under.
    pub key: Key,
    /// When it was made.
    pub made: Instant,
    /// Requests that it has carried.
    pub requests: u32,
    /// Our end.
    pub local_address: Option<std::net::SocketAddr>,
    idle_since: Instant,
    /// Held while it is in use: after an upgrade its own task has ended.
    in_use: Option<Arc<Permit>>,
    /// Gone when it has ended.
    permit: Weak<Permit>,
}

/// An HTTP/2 connection.
#[derive(Debug)]
pub struct Http2 {
    sender: h2::client::SendRequest<Bytes>,
    key: Key,
    made: Instant,
    active: AtomicU32,
    requests: AtomicU32,
    idle_since: Mutex<Instant>,
    /// It takes no new requests.
    gone: Arc<AtomicBool>,
    /// Our end.
    pub local_address: Option<std::net::SocketAddr>,
}

/// One stream's worth of an HTTP/2 connection.
#[derive(Debug)]
pub struct Http2Lease {
    connection: Arc<Http2>,
    endpoint: Weak<EndpointState>,
}

/// The connections to an endpoint.
#[derive(Debug, Default)]
pub struct Connections {
    http1: [Mutex<Vec<Http1>>; STACKS],
    http2: Mutex<SmallVec<[Arc<Http2>; 1]>>,
    /// Who may make one, and who waits.
    pub(super) queues: Queues,
}

// === impl Http1 ===

impl Http1 {
    /// A connection that was just made.
    pub fn new(
        sender: SendRequest<RequestBody>,
        key: Key,
        local_address: Option<std::net::SocketAddr>,
        permit: Arc<Permit>,
    ) -> Self {
        Self {
            sender,
            permit: Arc::downgrade(&permit),
            in_use: Some(permit),
            key,
            made: now(),
            requests: 0,
            local_address,
            idle_since: now(),
        }
    }

    fn is_usable(&self, settings: &ClusterSettings, at: Instant) -> bool {
        !self.sender.is_closed() && is_young(settings, self.made, Some(self.idle_since), self.requests, at)
    }
}

fn is_young(settings: &ClusterSettings, made: Instant, idle_since: Option<Instant>, requests: u32, at: Instant) -> bool {
    let within = |limit: Option<Duration>, since: Instant| limit.is_none_or(|limit| at.saturating_duration_since(since) < limit);
    within(settings.max_connection_duration, made)
        && idle_since.is_none_or(|since| within(settings.idle_timeout, since))
        && settings.max_requests_per_connection.is_none_or(|most| requests < most)
}

// === impl Connections ===

impl Connections {
    /// Takes an idle connection; `near` chooses the stack to begin with.
    pub fn take_http1(&self, key: &Key, settings: &ClusterSettings, near: u64) -> Option<Http1> {
        let at = now();
        let start = near as usize % STACKS;
        (0..STACKS).find_map(|offset| {
            let mut stack = self.http1.get((start + offset) % STACKS)?.lock();
            while let Some(position) = stack.iter().rposition(|connection| connection.key == *key) {
                let mut connection = stack.remove(position);
                if connection.is_usable(settings, at) {
                    connection.in_use = connection.permit.upgrade();
                    if connection.in_use.is_some() {
                        return Some(connection);
                    }
                }
            }
            None
        })
    }

    /// An idle connection, the right to make one, or a place in the queue.
    pub fn turn_http1(endpoint: &Arc<EndpointState>, cluster: &Cluster, key: &Key, near: u64) -> Turn<Http1> {
        let this = &endpoint.connections;
        let waiting = match this.queues.open(endpoint, cluster, key, |_| None) {
            Turn::Wait(waiting) => waiting,
            turn => return turn,
        };
        // One may have been put back before it could be seen that somebody waits.
        match this.take_http1(key, &cluster.settings, near) {
            Some(connection) => Turn::Use(connection),
            None => Turn::Wait(waiting),
        }
    }

    /// A shared connection with room, the right to make one, or a place in the queue: also behind those that are being made, as long as
    /// they will have room.
    pub fn turn_http2(endpoint: &Arc<EndpointState>, cluster: &Cluster, key: &Key) -> Turn<Http2Lease> {
        let this = &endpoint.connections;
        let settings = &cluster.settings;
        let room = settings.http2_max_concurrent_streams.unwrap_or(HTTP2_SPREAD).max(1);
        this.queues.open(endpoint, cluster, key, |queue| {
            if let Some(lease) = Self::take_http2(endpoint, key, settings) {
                return Some(Ok(lease));
            }
            queue.will_have_room(room).then_some(Err(()))
        })
    }

    /// Puts a connection back whose exchange has ended well.
    pub fn put_http1(&self, mut connection: Http1, settings: &ClusterSettings, near: u64) {
        connection.idle_since = now();
        if !connection.is_usable(settings, connection.idle_since) {
            return;
        }
        let Some(stack) = self.http1.get(near as usize % STACKS) else {
            return;
        };
        connection.in_use = None;
        let key = self.queues.anybody_waits().then(|| connection.key.clone());
        {
            let mut stack = stack.lock();
            if stack.len() >= MAX_IDLE {
                stack.remove(0);
            }
            stack.push(connection);
        }
        if let Some(key) = key {
            self.queues.wake(&key);
        }
    }

    /// Takes a stream's worth of the least busy HTTP/2 connection that has room.
    pub fn take_http2(endpoint: &Arc<EndpointState>, key: &Key, settings: &ClusterSettings) -> Option<Http2Lease> {
        let at = now();
        let mut all = endpoint.connections.http2.lock();
        all.retain(|connection| {
            let used_up = !is_young(
                settings,
                connection.made,
                None,
                connection.requests.load(Ordering::Relaxed),
                at,
            );
            let idle = connection.active.load(Ordering::Acquire) == 0;
            !(connection.gone.load(Ordering::Acquire) || used_up && idle && connection.key == *key)
        });
        let usable = all
            .iter()
            .filter(|connection| connection.key == *key && connection.has_room(settings, at));
        let connection = usable.min_by_key(|connection| connection.active.load(Ordering::Relaxed))?;
        Some(Http2Lease::new(connection.clone(), endpoint))
    }

    /// Adds a connection that was just made and takes the first stream's worth of it. `gone` is set when it ends.
    pub fn add_http2(
        endpoint: &Arc<EndpointState>,
        sender: h2::client::SendRequest<Bytes>,
        key: Key,
        gone: Arc<AtomicBool>,
        local_address: Option<std::net::SocketAddr>,
    ) -> Http2Lease {
        let connection = Arc::new(Http2 {
            sender,
            key,
            made: now(),
            active: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            idle_since: Mutex::new(now()),
            gone,
            local_address,
        });
        let lease = Http2Lease::new(connection.clone(), endpoint);
        endpoint.connections.http2.lock().push(connection);
        lease
    }

    /// Closes what was idle for too long.
    pub fn sweep(&self, settings: &ClusterSettings) {
        let at = now();
        for stack in &self.http1 {
            stack.lock().retain(|connection| connection.is_usable(settings, at));
        }
        self.http2.lock().retain(|connection| {
            let busy = connection.active.load(Ordering::Acquire) > 0;
            let idle_since = *connection.idle_since.lock();
            let requests = connection.requests.load(Ordering::Relaxed);
            !connection.gone.load(Ordering::Acquire)
                && (busy || is_young(settings, connection.made, Some(idle_since), requests, at))
        });
    }

    /// Idle HTTP/1.1 and open HTTP/2 connections.
    pub fn counts(&self) -> (usize, usize) {
        (
            self.http1.iter().map(|stack| stack.lock().len()).sum(),
            self.http2.lock().len(),
        )
    }
}

// === impl Http2 ===

impl Http2 {
    fn has_room(&self, settings: &ClusterSettings, at: Instant) -> bool {
        let allowed = u32::try_from(self.sender.current_max_send_streams()).unwrap_or(u32::MAX);
        let most = settings.http2_max_concurrent_streams.unwrap_or(HTTP2_SPREAD).min(allowed);
        self.active.load(Ordering::Relaxed) < most
            && is_young(settings, self.made, None, self.requests.load(Ordering::Relaxed), at)
    }
}

// === impl Http2Lease ===

impl Http2Lease {
    fn new(connection: Arc<Http2>, endpoint: &Arc<EndpointState>) -> Self {
        connection.active.fetch_add(1, Ordering::AcqRel);
        connection.requests.fetch_add(1, Ordering::Relaxed);
        Self {
            connection,
            endpoint: Arc::downgrade(endpoint),
        }
    }

    /// Sends requests.
    pub fn sender(&self) -> h2::client::SendRequest<Bytes> {
        self.connection.sender.clone()
    }

    /// Our end.
    pub fn local_address(&self) -> Option<std::net::SocketAddr> {
        self.connection.local_address
    }

    /// The connection takes no more requests: nobody gets it again.
    pub fn retire(&self) {
        self.connection.gone.store(true, Ordering::Release);
    }
}

impl Drop for Http2Lease {
    fn drop(&mut self) {
        if self.connection.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            *self.connection.idle_since.lock() = now();
        }
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.connections.queues.wake(&self.connection.key);
        }
    }
}
