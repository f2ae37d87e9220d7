//! The time of day, as a parameter.
//!
//! A certificate's lifetime is written in the time of day, which does not follow tokio's clock. Everything here that compares
//! with a certificate asks a [`WallClock`], so that a test can tie the time of day to the paused clock.

use std::{fmt, sync::Arc, time::SystemTime};

use cairn_exchange::clock;

/// Tells the time of day.
#[derive(Clone)]
pub struct WallClock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

// === impl WallClock ===

impl WallClock {
    /// A clock that asks `read`.
    pub fn new(read: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// A clock that stands at `start` now and from then on moves with tokio's clock, paused or not.
    pub fn following_tokio(start: SystemTime) -> Self {
        let origin = clock::now();
        Self::new(move || start + clock::now().saturating_duration_since(origin))
    }

    /// The time of day.
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}

impl Default for WallClock {
    fn default() -> Self {
        Self::new(clock::wall)
    }
}

impl fmt::Debug for WallClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WallClock").field(&self.now()).finish()
    }
}
