//! How long an endpoint takes to answer, as a peak-sensitive moving average (Finagle's "peak EWMA"): a slow answer counts at once, fast
//! ones win it back slowly, and without news the estimate fades, so that an endpoint that was slow is tried again.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use cairn_exchange::clock::Instant;

/// How fast the past fades.
const DECAY: Duration = Duration::from_secs(10);
/// What is expected of an endpoint that has not answered yet.
const EXPECTED: Duration = Duration::from_millis(30);
/// An estimate does not fade below this, so that requests under way still count.
const LEAST: Duration = Duration::from_micros(100);

/// The estimate. Two answers at once may count as one: it is an estimate.
#[derive(Debug, Default)]
pub struct Latency {
    /// The moment that `at` counts from.
    begin: OnceLock<Instant>,
    /// Bits of seconds; 0 is unknown.
    estimate: AtomicU64,
    /// Nanoseconds.
    at: AtomicU64,
}

// === impl Latency ===

impl Latency {
    /// An answer took so long.
    pub fn observe(&self, took: Duration, now: Instant) {
        let begin = *self.begin.get_or_init(|| now);
        let took = took.max(LEAST).as_secs_f64();
        let before = f64::from_bits(self.estimate.load(Relaxed));
        let estimate = if took >= before {
            took
        } else {
            let kept = self.kept(now);
            before * kept + took * (1.0 - kept)
        };
        self.estimate.store(estimate.to_bits(), Relaxed);
        let at = now.saturating_duration_since(begin).as_nanos();
        self.at.store(u64::try_from(at).unwrap_or(u64::MAX), Relaxed);
    }

    /// Seconds that an answer is expected to take.
    pub fn expected(&self, now: Instant) -> f64 {
        let estimate = f64::from_bits(self.estimate.load(Relaxed));
        if estimate == 0.0 {
            return EXPECTED.as_secs_f64();
        }
        (estimate * self.kept(now)).max(LEAST.as_secs_f64())
    }

    /// How much of the past is left.
    fn kept(&self, now: Instant) -> f64 {
        let Some(begin) = self.begin.get() else { return 0.0 };
        let at = *begin + Duration::from_nanos(self.at.load(Relaxed));
        let passed = now.saturating_duration_since(at);
        (-passed.as_secs_f64() / DECAY.as_secs_f64()).exp()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cairn_exchange::clock;

    use super::{EXPECTED, Latency};

    #[test]
    fn a_peak_counts_at_once_and_fades() {
        let latency = Latency::default();
        let start = clock::now();
        let expected = |after| latency.expected(start + Duration::from_secs(after));
        assert!((expected(0) - EXPECTED.as_secs_f64()).abs() < 1e-9);
        latency.observe(Duration::from_millis(5), start);
        latency.observe(Duration::from_millis(200), start);
        assert!((expected(0) - 0.2).abs() < 1e-9);
        assert!((expected(10) - 0.2 / std::f64::consts::E).abs() < 1e-6);
        // A fast answer right behind does not win it back.
        latency.observe(Duration::from_millis(5), start + Duration::from_millis(10));
        assert!(expected(0) > 0.19);
        assert!(expected(3600) < 0.001);
    }
}
