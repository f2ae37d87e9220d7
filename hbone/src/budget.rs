//! An amount that all tunnels of a process share: bytes that may arrive unread, streams beyond each tunnel's own.
//!
//! One atomic. Whoever asks gets what is left, which may be less than it asked for or nothing: everybody has a floor of its own that
//! needs no asking.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// So many of something, shared by its clones.
#[derive(Clone, Debug)]
pub struct Budget {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    limit: u64,
    granted: AtomicU64,
}

impl Budget {
    /// A budget of `limit`.
    pub fn new(limit: u64) -> Self {
        Self {
            inner: Arc::new(Inner {
                limit,
                granted: AtomicU64::new(0),
            }),
        }
    }

    /// How much is granted now.
    pub fn granted(&self) -> u64 {
        self.inner.granted.load(Ordering::Relaxed)
    }

    /// How much is left now.
    pub(crate) fn left(&self) -> u64 {
        self.inner.limit.saturating_sub(self.granted())
    }

    /// Takes up to `wanted`.
    pub(crate) fn take(&self, wanted: u32) -> u32 {
        let mut taken = 0;
        let _ = self
            .inner
            .granted
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |granted| {
                let left = self.inner.limit.saturating_sub(granted);
                taken = u32::try_from(left.min(u64::from(wanted))).unwrap_or(wanted);
                Some(granted + u64::from(taken))
            });
        taken
    }

    pub(crate) fn put_back(&self, taken: u32) {
        self.inner.granted.fetch_sub(u64::from(taken), Ordering::Relaxed);
    }
}
