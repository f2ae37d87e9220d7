//! What the streams of one tunnel connection share with the task that drives it.
//!
//! Only atomics: a stream adds to them when it starts, ends, or gives window back, and the connection's task reads them. Nothing
//! here is touched for each frame.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use cairn_exchange::clock::{self, Instant};
use tokio::sync::Notify;

/// Facts about one connection.
#[derive(Debug)]
pub(crate) struct Shared {
    streams: AtomicU32,
    /// Milliseconds after `born` at which the last stream ended.
    idle_since: AtomicU64,
    born: Instant,
    /// A reader gives window back when it has taken this much.
    release_at: AtomicU32,
    /// Who waits for a stream to end (client side only).
    waiting: Option<Arc<Waiting>>,
}

/// Those who wait for a free stream or a new tunnel.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    pub(crate) count: AtomicU32,
    pub(crate) changed: Notify,
}

/// One stream's place among the streams of its connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    shared: Arc<Shared>,
}

// === impl Shared ===

impl Shared {
    pub(crate) fn new(release_at: u32, waiting: Option<Arc<Waiting>>) -> Arc<Self> {
        Arc::new(Self {
            streams: AtomicU32::new(0),
            idle_since: AtomicU64::new(0),
            born: clock::now(),
            release_at: AtomicU32::new(release_at.max(1)),
            waiting,
        })
    }

    pub(crate) fn streams(&self) -> u32 {
        self.streams.load(Ordering::SeqCst)
    }

    /// Since when there has been no stream; meaningless while there is one.
    pub(crate) fn idle_since(&self) -> Instant {
        self.born + std::time::Duration::from_millis(self.idle_since.load(Ordering::Relaxed))
    }

    pub(crate) fn release_at(&self) -> u32 {
        self.release_at.load(Ordering::Relaxed)
    }

    pub(crate) fn set_release_at(&self, bytes: u32) {
        self.release_at.store(bytes.max(1), Ordering::Relaxed);
    }
}

// === impl Slot ===

impl Slot {
    pub(crate) fn take(shared: &Arc<Shared>) -> Self {
        shared.streams.fetch_add(1, Ordering::SeqCst);
        Self { shared: shared.clone() }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.shared.streams.fetch_sub(1, Ordering::SeqCst) == 1 {
            let idle = clock::now().saturating_duration_since(self.shared.born).as_millis();
            self.shared
                .idle_since
                .store(u64::try_from(idle).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        // A waiter counts itself before it looks for a free stream, we free the stream before we look for waiters: one sees the other.
        if let Some(waiting) = &self.shared.waiting
            && waiting.count.load(Ordering::SeqCst) > 0
        {
            waiting.changed.notify_one();
        }
    }
}
