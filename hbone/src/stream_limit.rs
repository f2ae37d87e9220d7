//! How many streams a tunnel may have open at once.
//!
//! Envoy gives every tunnel 100, since all streams of a tunnel share one of its threads. Here they do not, so a limit is there to
//! bound memory only, and 100 would make busy peers dial connections that serve nobody. A new tunnel is therefore told more while
//! there is room: its own floor, and a sixteenth of what the process has left above the floors, up to a ceiling. What one tunnel was
//! told, it keeps until it ends (HTTP/2 could lower it, but streams that are open already would not heed that), and then gives back.

use crate::budget::Budget;

/// Limits of concurrent streams.
#[derive(Clone, Debug)]
pub struct StreamLimits {
    /// What every tunnel may have, whatever the others do (100, as `connect_terminate`).
    pub floor: u32,
    /// What a tunnel may have at most (1,000).
    pub ceiling: u32,
    /// What all tunnels that share these limits may have together above their floors (65,536).
    pub budget: Budget,
}

/// One tunnel's limit; goes back to the budget when dropped.
#[derive(Debug)]
pub(crate) struct StreamLimit {
    floor: u32,
    extra: u32,
    budget: Budget,
}

/// A tunnel gets this part of what is left, so that many can get something.
const SHARE: u64 = 16;

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            floor: 100,
            ceiling: 1000,
            budget: Budget::new(65_536),
        }
    }
}

impl StreamLimits {
    /// The same number for every tunnel.
    pub fn fixed(streams: u32) -> Self {
        Self {
            floor: streams,
            ceiling: streams,
            budget: Budget::new(0),
        }
    }

    pub(crate) fn grant(&self) -> StreamLimit {
        let share = u32::try_from(self.budget.left() / SHARE).unwrap_or(u32::MAX);
        let wanted = self.ceiling.saturating_sub(self.floor).min(share);
        StreamLimit {
            floor: self.floor,
            extra: self.budget.take(wanted),
            budget: self.budget.clone(),
        }
    }
}

impl StreamLimit {
    pub(crate) fn streams(&self) -> u32 {
        self.floor.saturating_add(self.extra)
    }
}

impl Drop for StreamLimit {
    fn drop(&mut self) {
        self.budget.put_back(self.extra);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(budget: u64) -> StreamLimits {
        StreamLimits {
            budget: Budget::new(budget),
            ..StreamLimits::default()
        }
    }

    #[test]
    fn a_tunnel_gets_the_ceiling_while_there_is_room() {
        assert_eq!(limits(65_536).grant().streams(), 1000);
    }

    #[test]
    fn limits_shrink_to_the_floor_as_tunnels_take_what_is_left() {
        let limits = limits(1600);
        let held: Vec<_> = (0..400).map(|_| limits.grant()).collect();
        let streams: Vec<_> = held.iter().map(StreamLimit::streams).collect();
        assert_eq!(streams[0], 200);
        assert!(streams.is_sorted_by(|one, next| one >= next), "{streams:?}");
        assert_eq!(streams.last(), Some(&100));
        assert!(limits.budget.granted() <= 1600);
    }

    #[test]
    fn a_tunnel_that_ends_gives_its_share_back() {
        let limits = limits(1600);
        let before = limits.grant().streams();
        assert_eq!(limits.grant().streams(), before);
        assert_eq!(limits.budget.granted(), 0);
    }

    #[test]
    fn a_floor_above_the_ceiling_is_what_counts() {
        let limits = StreamLimits {
            floor: 5000,
            ..StreamLimits::default()
        };
        assert_eq!(limits.grant().streams(), 5000);
    }
}
