//! The one place that reads the time.
//!
//! Durations and deadlines use [`now`], which follows tokio's clock and so stands still in tests that pause it. [`wall`] is the
//! time of day, for log lines and certificates.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use tokio::time::Instant;

/// The monotonic clock; under `tokio::time::pause` it moves only when a test moves it.
#[inline]
pub fn now() -> Instant {
    Instant::now()
}

/// The time of day.
#[inline]
#[allow(clippy::disallowed_methods, reason = "this is the one reader of the wall clock")]
pub fn wall() -> SystemTime {
    SystemTime::now()
}

/// The time of day as seconds since 1970, zero for a clock that stands before it.
pub fn unix_seconds() -> u64 {
    wall().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
