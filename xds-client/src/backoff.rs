//! How long to wait before the next attempt to reach istiod.
//!
//! The wait doubles with each failure from `base` to `cap`, and half of it is random, so that the proxies of a mesh do not return in
//! step after istiod restarts. A stream that lived at least as long as `cap` was healthy and sets the count back: istiod
//! ends each stream after half an hour on purpose. A stream that broke sooner does not, or an answer that is too large would
//! be fetched over and over at the shortest interval.

use std::time::Duration;

/// The bounds of the wait between attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The longest first wait.
    pub base: Duration,
    /// The longest wait of all.
    pub cap: Duration,
}

/// Where in the series of waits the client is.
#[derive(Debug)]
pub(crate) struct Waits {
    bounds: Backoff,
    failures: u32,
}

// === impl Backoff ===

impl Default for Backoff {
    /// Envoy's: half a second to 30 seconds (contract xds §1.3).
    fn default() -> Self {
        Self {
            base: Duration::from_millis(500),
            cap: Duration::from_secs(30),
        }
    }
}

// === impl Waits ===

impl Waits {
    pub(crate) fn new(bounds: Backoff) -> Self {
        Self { bounds, failures: 0 }
    }

    /// Notes that a stream ended after `lived`.
    pub(crate) fn stream_ended(&mut self, lived: Duration) {
        if lived >= self.bounds.cap {
            self.failures = 0;
        }
    }

    /// The next wait; `random` is between 0 and 1.
    pub(crate) fn next(&mut self, random: f64) -> Duration {
        let doubled = 2_u32
            .checked_pow(self.failures)
            .and_then(|factor| self.bounds.base.checked_mul(factor));
        let longest = doubled.unwrap_or(self.bounds.cap).min(self.bounds.cap);
        self.failures = self.failures.saturating_add(1);
        longest / 2 + (longest / 2).mul_f64(random.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_half_of_each_is_random() {
        let mut waits = Waits::new(Backoff::default());
        let longest: Vec<_> = (0..9).map(|_| waits.next(1.0).as_millis()).collect();
        assert_eq!(longest, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]);
        assert_eq!(waits.next(0.0), Duration::from_secs(15));
        waits.failures = u32::MAX;
        assert_eq!(waits.next(1.0), Duration::from_secs(30));
    }

    #[test]
    fn only_a_stream_that_lived_long_sets_the_waits_back() {
        let mut waits = Waits::new(Backoff::default());
        for _ in 0..4 {
            waits.next(1.0);
        }
        waits.stream_ended(Duration::from_secs(29));
        assert_eq!(waits.next(1.0), Duration::from_secs(8));
        waits.stream_ended(Duration::from_secs(30));
        assert_eq!(waits.next(1.0), Duration::from_millis(500));
    }
}
