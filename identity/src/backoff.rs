//! How long to wait before something that failed is tried again.
//!
//! Exponential with full jitter between half of the step and the step, from [`BASE`] to [`CAP`]: istiod's own clients use the same
//! bounds (contract xds §1.3), and the jitter keeps a fleet from returning all at once.

use std::time::Duration;

/// The first wait.
pub(crate) const BASE: Duration = Duration::from_millis(500);
/// No wait is longer.
pub(crate) const CAP: Duration = Duration::from_secs(30);

/// Counts failures in a row.
#[derive(Debug)]
pub(crate) struct Backoff {
    step: Duration,
}

// === impl Backoff ===

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { step: BASE }
    }

    /// Success: the next failure waits the shortest time again.
    pub(crate) fn reset(&mut self) {
        self.step = BASE;
    }

    /// How long to wait after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        let step = self.step;
        self.step = (step * 2).min(CAP);
        step.mul_f64(0.5 + 0.5 * fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_start_over_after_success() {
        let mut backoff = Backoff::new();
        let mut step = BASE;
        for _ in 0..12 {
            let wait = backoff.next();
            assert!(wait >= step / 2 && wait <= step, "{wait:?} of {step:?}");
            step = (step * 2).min(CAP);
        }
        assert_eq!(step, CAP);
        backoff.reset();
        assert!(backoff.next() <= BASE);
    }
}
