//! A bucket of tokens that fills all the time.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// So much of a token may be missing, as moments are not kept more exactly; it is made up for by the next one.
const GRAIN: f64 = 1e-6;

/// Tokens that come at a rate, up to as many as there is room for. Nobody waits for anybody: the state is one number, the moment at
/// which the bucket would have been empty had it filled since.
#[derive(Debug)]
pub struct TokenBucket {
    room: f64,
    /// Tokens a second.
    rate: f64,
    /// Bits of a number of seconds.
    empty_at: AtomicU64,
}

// === impl TokenBucket ===

impl TokenBucket {
    /// A full bucket with room for `max` tokens, of which `per_fill` come in each `interval`.
    pub fn new(max: u32, per_fill: u32, interval: Duration, now: Duration) -> Self {
        let (room, rate) = (f64::from(max), f64::from(per_fill) / interval.as_secs_f64());
        Self {
            room,
            rate,
            empty_at: AtomicU64::new((now.as_secs_f64() - room / rate).to_bits()),
        }
    }

    /// Takes so many tokens, if they are there.
    pub fn take(&self, count: u64, now: Duration) -> bool {
        let (now, count) = (now.as_secs_f64(), count as f64);
        let taken = self.empty_at.fetch_update(Ordering::AcqRel, Ordering::Acquire, |empty_at| {
            let there = self.there(f64::from_bits(empty_at), now);
            (there + GRAIN >= count).then(|| (now - (there - count) / self.rate).to_bits())
        });
        taken.is_ok()
    }

    fn there(&self, empty_at: f64, now: f64) -> f64 {
        // A thread that looked at the clock earlier may come later.
        ((now - empty_at) * self.rate).clamp(0.0, self.room)
    }

    /// Room for tokens.
    pub fn room(&self) -> u64 {
        self.room as u64
    }

    /// Tokens a second.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// Whole tokens that are there.
    pub fn remaining(&self, now: Duration) -> u64 {
        let there = self.there(f64::from_bits(self.empty_at.load(Ordering::Acquire)), now.as_secs_f64());
        (there + GRAIN) as u64
    }

    /// Time until there is a token.
    pub fn next_token(&self, now: Duration) -> Duration {
        let there = self.there(f64::from_bits(self.empty_at.load(Ordering::Acquire)), now.as_secs_f64());
        Duration::try_from_secs_f64(((1.0 - there) / self.rate).max(0.0)).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn tokens_come_back_at_their_rate_up_to_the_room() {
        let bucket = TokenBucket::new(10, 5, SECOND, 100 * SECOND);
        let at = |millis: u64| 100 * SECOND + Duration::from_millis(millis);
        let take = |millis| bucket.take(1, at(millis));
        assert_eq!((0..14).filter(|_| take(0)).count(), 10);
        assert_eq!(bucket.next_token(at(0)), Duration::from_millis(200));
        assert!(!take(190));
        assert!(take(201));
        assert!(!take(202));
        assert_eq!(bucket.remaining(at(1000)), 4);
        assert_eq!(bucket.remaining(at(3_600_000)), 10);
        assert!(!bucket.take(11, at(3_600_000)));
        assert!(bucket.take(10, at(3_600_000)));
    }

    proptest! {
        #[test]
        fn no_more_tokens_are_taken_than_there_were_and_came(
            max in 1u32..50, per_fill in 1u32..20, steps in proptest::collection::vec((0u64..500, 1u64..4), 1..100),
        ) {
            let bucket = TokenBucket::new(max, per_fill, SECOND, Duration::ZERO);
            let (mut now, mut taken) = (Duration::ZERO, 0);
            for (pause, count) in steps {
                now += Duration::from_millis(pause);
                if bucket.take(count, now) {
                    taken += count;
                }
            }
            let most = f64::from(max) + f64::from(per_fill) * now.as_secs_f64();
            prop_assert!(taken as f64 <= most + 1e-6, "{taken} of {most}");
        }
    }
}
