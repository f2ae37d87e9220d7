//! How much may arrive unread: stream windows, the connection window, and the budgets that bound them.
//!
//! `h2` has one stream window for a whole connection (SETTINGS_INITIAL_WINDOW_SIZE, which also moves the windows of open streams) and
//! one connection window. Both are moved here while the connection runs:
//!
//! * A stream starts with 128 KiB. The connection window covers every open stream's whole window (in powers of two, so that it moves
//!   rarely): streams that are not read can fill their own windows and nothing else, so they never stop another one.
//! * When the budget below is used up, the stream window shrinks. It never grows again on the same
//!   connection: a peer may use a larger window before its acknowledgement is out (Go's server does), and `h2`, which counts from the
//!   acknowledgement on, would take that for a violation and reset the stream.
//! * What the connection window grants above the floor of 256 KiB is taken from the process's [`Budget`] and returned when
//!   streams end or the tunnel closes. When the budget is used up, tunnels share what they have: their stream windows shrink down to
//!   16 KiB, and only below that can unread streams hold up others of the same tunnel.
//!
//! A granted window is a promise, not memory: memory is used only for what a peer sent and nobody has read.

use crate::budget::Budget;

/// Sizes of flow-control windows, in bytes.
#[derive(Clone, Debug)]
pub struct WindowSettings {
    /// What a stream starts with (128 KiB).
    pub stream: u32,
    /// What all tunnels that share these settings may have together (512 MiB).
    pub budget: Budget,
}

/// What must be told to the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) stream: u32,
    pub(crate) connection: u32,
}

/// The windows of one tunnel; returns its share of the budget when dropped.
#[derive(Debug)]
pub(crate) struct Windows {
    settings: WindowSettings,
    /// How many streams the connection window covers.
    covered: u32,
    max_streams: u32,
    /// Taken from the budget.
    granted: u32,
    sizes: Sizes,
}

/// The connection window that every tunnel may have without asking.
const FLOOR: u32 = 256 * 1024;
/// Stream windows do not shrink below this.
const STREAM_MIN: u32 = 16 * 1024;
/// The protocol's limit is 2^31 - 1.
const WINDOW_MAX: u32 = 1 << 30;

impl Default for WindowSettings {
    fn default() -> Self {
        Self {
            stream: 128 << 10,
            budget: Budget::new(512 << 20),
        }
    }
}

// === impl Windows ===

impl Windows {
    pub(crate) fn new(settings: WindowSettings, max_streams: u32) -> Self {
        let stream = settings.stream.clamp(STREAM_MIN, WINDOW_MAX);
        let mut windows = Self {
            settings,
            covered: 2,
            max_streams: max_streams.max(2),
            granted: 0,
            sizes: Sizes {
                stream,
                connection: FLOOR,
            },
        };
        windows.settle();
        windows
    }

    pub(crate) fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// A reader gives window back when it has taken this much: often enough that readers of all streams together never sit on more
    /// than a quarter of the connection window.
    pub(crate) fn release_at(&self) -> u32 {
        (self.sizes.connection / (4 * self.covered)).clamp(1, self.sizes.stream / 4)
    }

    /// The number of open streams is now `active`. Answers with new sizes if they change.
    pub(crate) fn cover(&mut self, active: u32) -> Option<Sizes> {
        let needed = active.saturating_add(1).clamp(2, self.max_streams).next_power_of_two();
        // Shrinks late, so that a number that swings does not move the windows each time.
        if needed > self.covered || needed < self.covered / 4 {
            self.covered = needed;
            return self.settle();
        }
        None
    }

    /// Makes the sizes follow from streams, limits and budget.
    fn settle(&mut self) -> Option<Sizes> {
        let stream = self.sizes.stream;
        let wanted = stream.saturating_mul(self.covered).clamp(FLOOR, WINDOW_MAX);
        let extra = wanted - FLOOR;
        if extra > self.granted {
            self.granted += self.settings.budget.take(extra - self.granted);
        } else {
            self.settings.budget.put_back(self.granted - extra);
            self.granted = extra;
        }
        let connection = FLOOR + self.granted;
        let sizes = Sizes {
            stream: stream.min((connection / self.covered).max(STREAM_MIN)),
            connection,
        };
        (std::mem::replace(&mut self.sizes, sizes) != sizes).then_some(sizes)
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.settings.budget.put_back(self.granted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: u32 = 1024;

    fn settings(budget: u64) -> WindowSettings {
        WindowSettings {
            budget: Budget::new(budget),
            ..WindowSettings::default()
        }
    }

    #[test]
    fn the_connection_window_covers_every_stream() {
        let mut windows = Windows::new(settings(1 << 30), 100);
        for active in 1..=100 {
            windows.cover(active);
            let Sizes { stream, connection } = windows.sizes();
            assert_eq!(stream, 128 * KIB, "{active}");
            assert!(connection >= stream * (active + 1).min(100), "{active}: {connection}");
        }
    }

    #[test]
    fn a_window_that_has_shrunk_stays() {
        let settings = settings(1 << 20);
        let mut first = Windows::new(settings.clone(), 100);
        first.cover(60);
        let mut second = Windows::new(settings, 100);
        second.cover(4);
        let small = second.sizes().stream;
        assert!(small < 128 * KIB, "{small}");
        drop(first);
        second.cover(1);
        second.cover(4);
        assert_eq!(second.sizes().stream, small);
    }

    #[test]
    fn an_exhausted_budget_makes_windows_smaller_and_is_returned() {
        let settings = settings(1 << 20);
        let mut first = Windows::new(settings.clone(), 100);
        first.cover(16);
        assert_eq!(
            first.sizes(),
            Sizes {
                stream: (1280 * KIB) / 32,
                connection: 1280 * KIB
            }
        );
        let mut second = Windows::new(settings.clone(), 100);
        assert_eq!(
            second.sizes(),
            Sizes {
                stream: 128 * KIB,
                connection: FLOOR
            }
        );
        assert_eq!(
            second.cover(99),
            Some(Sizes {
                stream: STREAM_MIN,
                connection: FLOOR
            })
        );
        drop(first);
        drop(second);
        assert_eq!(settings.budget.granted(), 0);
    }

    proptest! {
        #[test]
        fn the_budget_is_never_exceeded_and_always_returned(
            budget in 0u64..(64 << 20),
            steps in proptest::collection::vec((0usize..4, 0u32..220), 1..100),
        ) {
            let settings = settings(budget);
            let mut tunnels: Vec<_> = (0..4).map(|_| Windows::new(settings.clone(), 200)).collect();
            for (tunnel, active) in steps {
                let before = tunnels[tunnel].sizes().stream;
                tunnels[tunnel].cover(active);
                prop_assert!(tunnels[tunnel].sizes().stream <= before);
                let Sizes { stream, connection } = tunnels[tunnel].sizes();
                prop_assert!(settings.budget.granted() <= budget);
                prop_assert!(connection >= FLOOR && stream >= STREAM_MIN);
                prop_assert!(u64::from(stream) * u64::from(tunnels[tunnel].covered) <= u64::from(connection) || stream == STREAM_MIN);
                prop_assert!(tunnels[tunnel].release_at() >= 1);
            }
            drop(tunnels);
            prop_assert_eq!(settings.budget.granted(), 0);
        }
    }
}
