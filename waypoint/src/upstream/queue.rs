//! Who may make a connection to an endpoint, and who waits for one.
//!
//! Where the cluster's limit of connections is reached, requests wait for one in the order in which they came; the first connection under
//! a key is made whatever the limit, so that nobody waits for ever. A connection counts from its making to its end, which its own
//! task tells ([`Permit`]).

use std::{
    collections::VecDeque,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
};

use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::{Cluster, ConnectError, Counted, EndpointState, Level, Resource, connections::Key};

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
pub(super) struct Queue {
    key: Key,
    /// Connections that are there or being made.
    open: u32,
    /// Shared connections that are being made.
    opening: u32,
    waiting: VecDeque<oneshot::Sender<Waited>>,
    /// How many of those that wait have gone away.
    left: usize,
}

/// The queues for connections to an endpoint.
#[derive(Debug, Default)]
pub(super) struct Queues {
    by_key: Mutex<SmallVec<[Queue; 1]>>,
    /// Requests in queues.
    waiting: AtomicU32,
    /// Connections under all keys.
    open: AtomicU32,
}

// === impl Queues ===

impl Queues {
    /// The first connection of a key, or one more within the limits; else a place in the queue. `before` may know of something better:
    /// one that is there, or that it pays to wait.
    pub(super) fn open<C>(
        &self,
        endpoint: &Arc<EndpointState>,
        cluster: &Cluster,
        key: &Key,
        before: impl FnOnce(&Queue) -> Option<Result<C, ()>>,
    ) -> Turn<C> {
        let mut queues = self.by_key.lock();
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

    /// Whether any request waits.
    pub(super) fn anybody_waits(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Tells the first who waits for a connection under this key that there may be one.
    pub(super) fn wake(&self, key: &Key) {
        if self.anybody_waits()
            && let Some(queue) = self.by_key.lock().iter_mut().find(|queue| queue.key == *key)
        {
            queue.wake(&self.waiting, 1);
        }
    }

    fn closed(&self, key: &Key) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        let mut queues = self.by_key.lock();
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
        if let Some(queue) = endpoint
            .connections
            .queues
            .by_key
            .lock()
            .iter_mut()
            .find(|queue| queue.key == *key)
        {
            queue.opening += 1;
        }
        Opening {
            endpoint: Arc::downgrade(endpoint),
            key: key.clone(),
            failure: None,
        }
    }

    fn opened(&self, key: &Key, failure: Option<&ConnectError>) {
        let mut queues = self.by_key.lock();
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
}

// === impl Queue ===

impl Queue {
    /// Whether there is room for one more behind the connections that are being made, each with room for so many.
    pub(super) fn will_have_room(&self, each: u32) -> bool {
        u64::from(self.opening) * u64::from(each) > self.waiting.len() as u64
    }

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
        let queues = &endpoint.connections.queues;
        if self.turn.try_recv().is_ok() {
            queues.wake(&self.key);
        } else if let Some(queue) = queues.by_key.lock().iter_mut().find(|queue| queue.key == self.key) {
            queue.left(&queues.waiting);
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
            endpoint.connections.queues.opened(&self.key, self.failure.as_ref());
        }
    }
}

// === impl Permit ===

impl Drop for Permit {
    fn drop(&mut self) {
        // First the count: who is woken looks at it.
        self.counted = None;
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.connections.queues.closed(&self.key);
        }
    }
}
