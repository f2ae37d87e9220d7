//! What outlier detection remembers of an endpoint.
//!
//! Requests count into atomics; whoever reaches a limit is told so once, and passes it on. Only the task that ejects looks at the rest.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use cairn_exchange::clock::Instant;
use cairn_policy::outlier::{Counted, EjectionKind, OutlierSettings, Rate};
use parking_lot::Mutex;
use smallvec::SmallVec;

/// What is remembered of an endpoint.
#[derive(Debug, Default)]
pub struct Monitor {
    server_errors: AtomicU32,
    gateway_errors: AtomicU32,
    local_failures: AtomicU32,
    answers: Bucket,
    connects: Bucket,
    ejected: AtomicBool,
    history: Mutex<History>,
}

/// Requests of the interval that runs.
#[derive(Debug, Default)]
struct Bucket {
    all: AtomicU32,
    good: AtomicU32,
}

/// Ejections so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct History {
    /// How often.
    pub ejections: u32,
    /// Ejections that were not yet forgiven: the next one takes so many times as long.
    pub backoff: u32,
    /// When the last one began.
    pub ejected: Option<Instant>,
    /// When the last one ended.
    pub returned: Option<Instant>,
    /// What was added to its time by chance.
    pub jitter: Duration,
    /// How requests went in the last interval.
    pub answers: Option<Rate>,
    /// How connecting went in the last interval, where that is counted apart.
    pub connects: Option<Rate>,
}

// === impl Monitor ===

impl Monitor {
    /// Counts; the result is what has just reached its limit.
    pub fn count(&self, settings: &OutlierSettings, counted: Counted) -> SmallVec<[EjectionKind; 2]> {
        let mut reached = SmallVec::new();
        let mut fail = |count: &AtomicU32, limit: u32, kind| {
            if count.fetch_add(1, Relaxed) + 1 == limit {
                reached.push(kind);
            }
        };
        if let Some(status) = counted.status {
            self.answers.all.fetch_add(1, Relaxed);
            if (500..600).contains(&status) {
                if (502..=504).contains(&status) {
                    let limit = settings.gateway_errors.consecutive;
                    fail(&self.gateway_errors, limit, EjectionKind::ConsecutiveGatewayFailure);
                } else {
                    clear(&self.gateway_errors);
                }
                fail(
                    &self.server_errors,
                    settings.server_errors.consecutive,
                    EjectionKind::Consecutive5xx,
                );
            } else {
                self.answers.good.fetch_add(1, Relaxed);
                clear(&self.server_errors);
                clear(&self.gateway_errors);
            }
        }
        match counted.local {
            None => {}
            Some(true) => {
                self.connects.all.fetch_add(1, Relaxed);
                self.connects.good.fetch_add(1, Relaxed);
                clear(&self.local_failures);
            }
            Some(false) => {
                self.connects.all.fetch_add(1, Relaxed);
                let limit = settings.local_failures.consecutive;
                fail(&self.local_failures, limit, EjectionKind::ConsecutiveLocalOriginFailure);
            }
        }
        reached
    }

    /// Begins to count a row anew, after it was looked at.
    pub fn start_over(&self, kind: EjectionKind) {
        match kind {
            EjectionKind::Consecutive5xx => clear(&self.server_errors),
            EjectionKind::ConsecutiveGatewayFailure => clear(&self.gateway_errors),
            EjectionKind::ConsecutiveLocalOriginFailure => clear(&self.local_failures),
            EjectionKind::SuccessRate
            | EjectionKind::SuccessRateLocalOrigin
            | EjectionKind::FailurePercentage
            | EjectionKind::FailurePercentageLocalOrigin => {}
        }
    }

    /// Whether it is out.
    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }

    /// Takes it out.
    pub fn eject(&self, settings: &OutlierSettings, at: Instant, jitter: Duration) {
        let mut history = self.history.lock();
        history.ejections = history.ejections.saturating_add(1);
        history.ejected = Some(at);
        history.backoff = settings.after_ejection(history.backoff);
        history.jitter = jitter;
        self.ejected.store(true, Relaxed);
    }

    /// Takes it back when its time is over.
    pub fn take_back_if_due(&self, settings: &OutlierSettings, at: Instant) -> bool {
        if !self.is_ejected() {
            return false;
        }
        let mut history = self.history.lock();
        let time = settings.time_out(history.backoff, history.jitter);
        let due = history
            .ejected
            .is_none_or(|since| at.saturating_duration_since(since) >= time);
        if due {
            history.returned = Some(at);
            drop(history);
            self.take_back();
        }
        due
    }

    /// Takes it back. Rows begin anew, so that a single failure does not throw it out again.
    pub fn take_back(&self) {
        clear(&self.server_errors);
        clear(&self.gateway_errors);
        clear(&self.local_failures);
        self.ejected.store(false, Relaxed);
    }

    /// Ends an interval: its rates are remembered, and the next one begins.
    pub fn turn_over(&self) {
        let (answers, connects) = (self.answers.take(), self.connects.take());
        let mut history = self.history.lock();
        history.answers = answers;
        history.connects = connects;
    }

    /// One that has done well since it came back is forgiven one ejection.
    pub fn forgive(&self, settings: &OutlierSettings, at: Instant) {
        let mut history = self.history.lock();
        let long_back = |since| at.saturating_duration_since(since) >= settings.interval;
        if history.returned.is_some_and(long_back) && !self.is_ejected() {
            history.backoff = history.backoff.saturating_sub(1);
        }
    }

    /// Ejections so far.
    pub fn history(&self) -> History {
        *self.history.lock()
    }
}

/// Most of the time there is nothing to clear, and a write would only take the line from other cores.
fn clear(count: &AtomicU32) {
    if count.load(Relaxed) != 0 {
        count.store(0, Relaxed);
    }
}

// === impl Bucket ===

impl Bucket {
    fn take(&self) -> Option<Rate> {
        let (all, good) = (self.all.swap(0, Relaxed), self.good.swap(0, Relaxed));
        (all > 0).then(|| Rate {
            success: f64::from(good.min(all)) * 100.0 / f64::from(all),
            volume: all,
        })
    }
}
