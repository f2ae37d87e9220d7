//! How long to wait before the next attempt.
//!
//! Usually a random part of an interval that doubles with each retry; where the answer says when to come back (`Retry-After`), that
//! time and up to half as much again, so that not all clients return at once.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName};

/// The first interval, where configuration says nothing.
pub const DEFAULT_BACKOFF_BASE: Duration = Duration::from_millis(25);
/// How many times the first interval the last one is, where configuration says nothing.
const DEFAULT_MOST_FACTOR: u32 = 10;
/// The longest that a reset header is obeyed, where configuration says nothing.
const DEFAULT_MOST_RESET: Duration = Duration::from_secs(300);

/// Jittered exponential backoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    base: Duration,
    most: Duration,
}

/// Backoff that the answer asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimitedBackoff {
    /// Headers to look at; the first that says something counts.
    pub headers: Vec<ResetHeader>,
    /// Longer waits are not obeyed.
    pub most: Duration,
}

/// A header that says when to come back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResetHeader {
    /// Its name.
    pub name: HeaderName,
    /// What it holds.
    pub format: ResetFormat,
}

/// What a reset header holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetFormat {
    /// Seconds from now.
    Seconds,
    /// Seconds since 1970.
    UnixTimestamp,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(None, None)
    }
}

// === impl Backoff ===

impl Backoff {
    /// From the first interval to the longest; by default 25 ms and ten times the first. Never less than a millisecond.
    pub fn new(base: Option<Duration>, most: Option<Duration>) -> Self {
        let base = base.unwrap_or(DEFAULT_BACKOFF_BASE).max(Duration::from_millis(1));
        let most = most.unwrap_or_else(|| base.saturating_mul(DEFAULT_MOST_FACTOR)).max(base);
        Self { base, most }
    }

    /// The interval before the `retry`-th retry (the first is 0), of which the wait is a random part.
    pub fn interval(&self, retry: u32) -> Duration {
        let doubled = 1u32.checked_shl(retry).and_then(|factor| self.base.checked_mul(factor));
        doubled.unwrap_or(self.most).min(self.most)
    }

    /// The wait before the `retry`-th retry: less than its interval.
    pub fn wait(&self, retry: u32, random: u64) -> Duration {
        let interval = u64::try_from(self.interval(retry).as_millis()).unwrap_or(u64::MAX).max(1);
        Duration::from_millis(random % interval)
    }
}

// === impl RateLimitedBackoff ===

impl RateLimitedBackoff {
    /// Looks at these headers; a wait of more than `most` (five minutes by default) is not obeyed.
    pub fn new(headers: Vec<ResetHeader>, most: Option<Duration>) -> Self {
        Self {
            headers,
            most: most.unwrap_or(DEFAULT_MOST_RESET),
        }
    }

    /// The wait that an answer asks for, and up to half as much again; `None` when it asks for none, for the past or for too long.
    pub fn wait(&self, headers: &HeaderMap, now: SystemTime, random: u64) -> Option<Duration> {
        let asked = self
            .headers
            .iter()
            .find_map(|header| header.interval(headers, now).filter(|asked| *asked <= self.most))?;
        let half = u64::try_from(asked.as_millis() / 2).unwrap_or(u64::MAX).max(1);
        Some(asked + Duration::from_millis(random % half))
    }
}

// === impl ResetHeader ===

impl ResetHeader {
    fn interval(&self, headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
        let number = headers.get(&self.name)?.to_str().ok()?.trim().parse().ok()?;
        let asked = Duration::from_secs(number);
        match self.format {
            ResetFormat::Seconds => Some(asked),
            ResetFormat::UnixTimestamp => SystemTime::UNIX_EPOCH.checked_add(asked)?.duration_since(now).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::{Backoff, Duration, HeaderMap, HeaderName, RateLimitedBackoff, ResetFormat, ResetHeader, SystemTime};

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn intervals_double_up_to_the_longest() {
        for (backoff, intervals) in [
            (Backoff::default(), [25, 50, 100, 200, 250, 250]),
            (Backoff::new(Some(ms(40)), None), [40, 80, 160, 320, 400, 400]),
            (Backoff::new(Some(ms(40)), Some(ms(50))), [40, 50, 50, 50, 50, 50]),
            (Backoff::new(Some(ms(40)), Some(ms(10))), [40, 40, 40, 40, 40, 40]),
            (Backoff::new(Some(ms(0)), Some(ms(0))), [1, 1, 1, 1, 1, 1]),
        ] {
            let found: Vec<u128> = (0..6).map(|retry| backoff.interval(retry).as_millis()).collect();
            assert_eq!(found, intervals, "{backoff:?}");
            assert_eq!(backoff.interval(u32::MAX), backoff.interval(9));
        }
    }

    #[test]
    fn an_answer_may_say_when_to_come_back() {
        let header = |name, format| ResetHeader {
            name: HeaderName::from_static(name),
            format,
        };
        let backoff = RateLimitedBackoff::new(
            vec![
                header("retry-after", ResetFormat::Seconds),
                header("x-reset", ResetFormat::UnixTimestamp),
            ],
            Some(Duration::from_secs(10)),
        );
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        for (name, value, wait) in [
            ("retry-after", "2", Some(ms(2000))),
            ("retry-after", "10", Some(ms(10_000))),
            ("retry-after", "11", None),
            ("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT", None),
            ("retry-after", "-1", None),
            ("x-reset", "1003", Some(ms(3000))),
            ("x-reset", "999", None),
            ("x-reset", "18446744073709551615", None),
            ("x-other", "2", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            assert_eq!(backoff.wait(&headers, now, 0), wait, "{name}: {value}");
            if let Some(wait) = wait {
                let jittered = backoff.wait(&headers, now, 999).unwrap();
                assert!(jittered > wait && jittered < wait + wait / 2);
            }
        }
    }

    proptest! {
        #[test]
        fn a_wait_is_shorter_than_its_interval(retry in any::<u32>(), random in any::<u64>()) {
            let backoff = Backoff::default();
            prop_assert!(backoff.wait(retry, random) < backoff.interval(retry));
        }
    }
}
