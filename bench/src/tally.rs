//! What a run has done so far: requests, bytes, failures and latencies.
//!
//! One [`Tally`] is shared by all tasks of a run. Latencies are kept only while
//! the measured window is open; counters run always and are read at its edges.
//! In an open loop a request's time begins when it was *due*, not when it was
//! sent, so that a stall is charged to every request that it held up.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Three digits: a p99 of 1.234 ms is not read as 1.2.
const DIGITS: u8 = 3;

/// Latencies that can be told apart, in nanoseconds; longer ones count as the longest.
const SHORTEST: u64 = 100;
const LONGEST: u64 = 60_000_000_000;

/// Counts of one run.
pub(crate) struct Tally {
    done: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    recording: AtomicBool,
    stopped: AtomicBool,
    nanoseconds: Mutex<Histogram<u32>>,
    first_failure: Mutex<Option<String>>,
}

impl Tally {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            recording: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            nanoseconds: Mutex::new(Histogram::new_with_bounds(SHORTEST, LONGEST, DIGITS)?),
            first_failure: Mutex::new(None),
        })
    }

    /// Counts a request that began, or was due, at `start`.
    pub(crate) fn succeed(&self, start: Instant) {
        self.done.fetch_add(1, Ordering::Relaxed);
        if self.recording.load(Ordering::Relaxed) {
            let nanoseconds = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.nanoseconds.lock().saturating_record(nanoseconds);
        }
    }

    /// Counts a failure; the first one's reason is kept for the report.
    pub(crate) fn fail(&self, reason: &anyhow::Error) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.first_failure.lock().get_or_insert_with(|| format!("{reason:#}"));
    }

    pub(crate) fn add_bytes(&self, size: usize) {
        self.bytes.fetch_add(size as u64, Ordering::Relaxed);
    }

    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn failures(&self) -> (u64, Option<String>) {
        (self.failed.load(Ordering::Relaxed), self.first_failure.lock().clone())
    }

    /// Opens or closes the measured window.
    pub(crate) fn record(&self, on: bool) {
        self.recording.store(on, Ordering::Relaxed);
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// The latency below which `share` of the recorded requests lie.
    pub(crate) fn latency(&self, share: f64) -> Duration {
        Duration::from_nanos(self.nanoseconds.lock().value_at_quantile(share))
    }
}

/// When requests of an open loop are due.
pub(crate) struct Schedule {
    due: Mutex<VecDeque<Instant>>,
    arrived: Notify,
}

impl Schedule {
    /// Begins to hand out `rate` due times a second, until the tally is stopped.
    pub(crate) fn start(rate: u32, tally: &Arc<Tally>) -> Result<Arc<Self>> {
        let schedule = Arc::new(Self {
            due: Mutex::new(VecDeque::new()),
            arrived: Notify::new(),
        });
        let period = Duration::from_secs(1) / rate.max(1);
        let timer = periodic(period)?;
        let start = Instant::now();
        let (ours, tally) = (Arc::clone(&schedule), Arc::clone(tally));
        // A thread of its own waits for the kernel's timer; it ends with the run.
        tokio::task::spawn_blocking(move || {
            let mut handed_out = 0;
            while !tally.is_stopped() {
                let Ok(expired) = expirations(&timer) else {
                    break;
                };
                for _ in 0..expired {
                    handed_out += 1;
                    ours.due.lock().push_back(start + period * handed_out);
                    ours.arrived.notify_one();
                }
            }
            // Whoever still waits finds the tally stopped.
            ours.arrived.notify_waiters();
        });
        Ok(schedule)
    }

    /// The next due time, or none when the run is over.
    pub(crate) async fn next(&self, tally: &Tally) -> Option<Instant> {
        loop {
            let arrived = self.arrived.notified();
            if tally.is_stopped() {
                return None;
            }
            if let Some(due) = self.due.lock().pop_front() {
                return Some(due);
            }
            arrived.await;
        }
    }
}

/// A timer of the kernel's: tokio's own have a grain of a millisecond.
fn periodic(period: Duration) -> Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let period = Timespec::try_from(period)?;
    timerfd_settime(
        &timer,
        TimerfdTimerFlags::empty(),
        &Itimerspec {
            it_interval: period,
            it_value: period,
        },
    )?;
    Ok(timer)
}

/// Waits for the timer; how often it went off since the last call.
fn expirations(timer: &OwnedFd) -> Result<u64> {
    let mut count = [0; 8];
    rustix::io::read(timer, &mut count)?;
    Ok(u64::from_ne_bytes(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn latencies_are_kept_only_while_recording() {
        let tally = Tally::new().unwrap();
        let start = Instant::now();
        tokio::time::advance(Duration::from_secs(7)).await;
        tally.succeed(start);
        assert_eq!(tally.latency(0.99), Duration::ZERO);
        tally.record(true);
        for _ in 0..99 {
            tally.succeed(Instant::now() - Duration::from_millis(1));
        }
        tally.succeed(Instant::now() - Duration::from_millis(50));
        assert_eq!(tally.done(), 101);
        let close = |latency: Duration, wanted: f64| {
            assert!(
                (latency.as_secs_f64() / wanted - 1.0).abs() < 0.002,
                "{latency:?} is not {wanted} s"
            );
        };
        close(tally.latency(0.50), 0.001);
        close(tally.latency(0.999), 0.050);
    }

    #[test]
    fn the_first_failure_is_the_one_told() {
        let tally = Tally::new().unwrap();
        tally.fail(&anyhow::anyhow!("first"));
        tally.fail(&anyhow::anyhow!("second"));
        assert_eq!(tally.failures(), (2, Some("first".to_owned())));
    }

    #[tokio::test]
    async fn due_times_are_a_period_apart_however_late_they_are_taken() {
        let tally = Arc::new(Tally::new().unwrap());
        let schedule = Schedule::start(1000, &tally).unwrap();
        let mut due = Vec::new();
        for _ in 0..20 {
            due.push(schedule.next(&tally).await.unwrap());
        }
        for pair in due.windows(2) {
            assert_eq!(pair[1] - pair[0], Duration::from_millis(1));
        }
        tally.stop();
        assert!(schedule.next(&tally).await.is_none());
    }
}
