//! Connections to one endpoint: idle HTTP/1.1 ones, and HTTP/2 ones that requests share.
//!
//! A connection is used only for requests whose [`Key`] it was made under: the fingerprint of the cluster's transport settings and the
//! client's identity. Idle connections stand in a few stacks so that cores do not wait for each other; the most recently used goes
//! first, and one that was idle for too long is closed by whoever comes by, or by the sweep.
//!
//! Where the cluster's limit of connections is reached, requests wait for one in the order in which they came; the first connection under
//! a key is made whatever the limit, so that nobody waits for ever. A connection counts from its making to its end, which its own
//! task tells ([`Permit`]).

use std::{
    collections::VecDeque,
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
use tokio::sync::oneshot;

use super::{Cluster, ClusterSettings, ConnectError, Counted, EndpointState, Level, Resource};
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

/// The right to have a connection; it is given back when the connection has ended.
#[derive(Debug)]
pub struct Permit {
    counted: Option<Counted>,
    endpoint: Weak<EndpointState>,
    key: Key,
}

/// What comes to a request that needs a connection.
#[derive(Debug)]
pub enum Turn<C> {
    /// One that is there.
    Use(C),
    /// It may make one.
    Open(Permit),
    /// It has to wait.
    Wait(Waiting),
}

/// What a request that has waited gets.
#[derive(Debug)]
pub enum Waited {
    /// Something may have become free.
    Again,
    /// The connection that several waited for did not come about.
    Failed(ConnectError),
}

/// A place in the queue for a connection.
#[derive(Debug)]
pub struct Waiting {
    turn: oneshot::Receiver<Waited>,
    endpoint: Weak<EndpointState>,
    key: Key,
    /// It has been its turn.
    done: bool,
}

/// A shared connection that is being made; whoever waits for it is told how that ends.
#[derive(Debug)]
pub struct Opening {
    endpoint: Weak<EndpointState>,
    key: Key,
    failure: Option<ConnectError>,
}

/// Connections under one key, and requests that wait for one.
#[derive(Debug)]
struct Queue {
    key: Key,
    /// Connections that are there or being made.
    open: u32,
    /// Shared connections that are being made.
    opening: u32,
    waiting: VecDeque<oneshot::Sender<Waited>>,
    /// How many of those that wait have gone away.
    left: usize,
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
    queues: Mutex<SmallVec<[Queue; 1]>>,
    /// Requests in queues.
    waiting: AtomicU32,
    /// Connections under all keys.
    open: AtomicU32,
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
        let waiting = match this.open(endpoint, cluster, key, |_| None) {
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
        this.open(endpoint, cluster, key, |queue| {
            if let Some(lease) = Self::take_http2(endpoint, key, settings) {
                return Some(Ok(lease));
            }
            let expected = u64::from(queue.opening) * u64::from(room);
            (expected > queue.waiting.len() as u64).then_some(Err(()))
        })
    }

    /// The first connection of a key, or one more within the limits; else a place in the queue. `before` may know of something better:
    /// one that is there, or that it pays to wait.
    fn open<C>(
        &self,
        endpoint: &Arc<EndpointState>,
        cluster: &Cluster,
        key: &Key,
        before: impl FnOnce(&Queue) -> Option<Result<C, ()>>,
    ) -> Turn<C> {
        let mut queues = self.queues.lock();
        let at = queues.iter().position(|queue| queue.key == *key).unwrap_or_else(|| {
            queues.push(Queue {
                key: key.clone(),
                open: 0,
                opening: 0,
                waiting: VecDeque::new(),
                left: 0,
            });
            queues.len() - 1
        });
        // It was found, or put there.
        let queue = &mut queues[at];
        let wait = match before(queue) {
            Some(Ok(connection)) => return Turn::Use(connection),
            Some(Err(())) => true,
            None => false,
        };
        if !wait && let Some(counted) = self.count(cluster, key.level, queue.open == 0) {
            queue.open += 1;
            self.open.fetch_add(1, Ordering::Relaxed);
            return Turn::Open(Permit {
                counted: Some(counted),
                endpoint: Arc::downgrade(endpoint),
                key: key.clone(),
            });
        }
        let (told, turn) = oneshot::channel();
        queue.waiting.push_back(told);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Turn::Wait(Waiting {
            turn,
            endpoint: Arc::downgrade(endpoint),
            key: key.clone(),
            done: false,
        })
    }

    fn count(&self, cluster: &Cluster, level: Level, first: bool) -> Option<Counted> {
        let breakers = &cluster.settings.breakers;
        let counted = Counted::within(&cluster.state, breakers, level, Resource::Connection).filter(|_| {
            let open = self.open.load(Ordering::Relaxed);
            breakers.connections_per_endpoint.is_none_or(|most| open < most)
        });
        counted.or_else(|| first.then(|| Counted::anyway(&cluster.state, level, Resource::Connection)))
    }

    /// Tells the first who waits for a connection under this key that there may be one.
    fn wake(&self, key: &Key) {
        if self.waiting.load(Ordering::SeqCst) > 0
            && let Some(queue) = self.queues.lock().iter_mut().find(|queue| queue.key == *key)
        {
            queue.wake(&self.waiting, 1);
        }
    }

    fn closed(&self, key: &Key) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        let mut queues = self.queues.lock();
        if let Some(at) = queues.iter().position(|queue| queue.key == *key) {
            let queue = &mut queues[at];
            queue.open = queue.open.saturating_sub(1);
            queue.wake(&self.waiting, 1);
            if queue.open == 0 && queue.opening == 0 && queue.waiting.is_empty() {
                queues.swap_remove(at);
            }
        }
    }

    /// A shared connection under this key is being made.
    pub fn opening(endpoint: &Arc<EndpointState>, key: &Key) -> Opening {
        if let Some(queue) = endpoint.connections.queues.lock().iter_mut().find(|queue| queue.key == *key) {
            queue.opening += 1;
        }
        Opening {
            endpoint: Arc::downgrade(endpoint),
            key: key.clone(),
            failure: None,
        }
    }

    fn opened(&self, key: &Key, failure: Option<&ConnectError>) {
        let mut queues = self.queues.lock();
        let Some(queue) = queues.iter_mut().find(|queue| queue.key == *key) else {
            return;
        };
        queue.opening = queue.opening.saturating_sub(1);
        match failure {
            Some(error) if queue.opening == 0 => {
                queue.left = 0;
                for waiting in queue.waiting.drain(..) {
                    self.waiting.fetch_sub(1, Ordering::SeqCst);
                    let _ = waiting.send(Waited::Failed(error.clone()));
                }
            }
            _ => queue.wake(&self.waiting, usize::MAX),
        }
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
        let key = (self.waiting.load(Ordering::SeqCst) > 0).then(|| connection.key.clone());
        {
            let mut stack = stack.lock();
            if stack.len() >= MAX_IDLE {
                stack.remove(0);
            }
            stack.push(connection);
        }
        if let Some(key) = key {
            self.wake(&key);
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
            endpoint.connections.wake(&self.connection.key);
        }
    }
}

// === impl Queue ===

impl Queue {
    /// Tells the first `most` that it may be their turn.
    fn wake(&mut self, count: &AtomicU32, most: usize) {
        let mut woken = 0;
        while woken < most
            && let Some(first) = self.waiting.pop_front()
        {
            count.fetch_sub(1, Ordering::SeqCst);
            // One who has gone away is nobody's turn.
            if first.send(Waited::Again).is_ok() {
                woken += 1;
            } else {
                self.left = self.left.saturating_sub(1);
            }
        }
    }

    /// One has gone away. Their places are cleared when they are half of all.
    fn left(&mut self, count: &AtomicU32) {
        self.left += 1;
        if self.left * 2 >= self.waiting.len() {
            let before = self.waiting.len();
            self.waiting.retain(|waiting| !waiting.is_closed());
            let cleared = u32::try_from(before - self.waiting.len()).unwrap_or(u32::MAX);
            count.fetch_sub(cleared, Ordering::SeqCst);
            self.left = 0;
        }
    }
}

// === impl Waiting ===

impl Waiting {
    /// Waits. How long is the request's own affair.
    pub async fn turn(mut self) -> Waited {
        let waited = (&mut self.turn).await.unwrap_or(Waited::Again);
        self.done = true;
        waited
    }
}

impl Drop for Waiting {
    /// Whoever goes away when it was just its turn passes it on.
    fn drop(&mut self) {
        self.turn.close();
        if self.done {
            return;
        }
        let Some(endpoint) = self.endpoint.upgrade() else { return };
        let connections = &endpoint.connections;
        if self.turn.try_recv().is_ok() {
            connections.wake(&self.key);
        } else if let Some(queue) = connections.queues.lock().iter_mut().find(|queue| queue.key == self.key) {
            queue.left(&connections.waiting);
        }
    }
}

// === impl Opening ===

impl Opening {
    /// It did not come about.
    pub fn failed(mut self, error: &ConnectError) {
        self.failure = Some(error.clone());
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.connections.opened(&self.key, self.failure.as_ref());
        }
    }
}

// === impl Permit ===

impl Drop for Permit {
    fn drop(&mut self) {
        // First the count: who is woken looks at it.
        self.counted = None;
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.connections.closed(&self.key);
        }
    }
}
