//! How much may arrive unread: stream windows, the connection window, and the budgets that bound them.
//!
//! `h2` has one stream window for a whole connection (SETTINGS_INITIAL_WINDOW_SIZE, which also moves the windows of open streams) and
//! one connection window. Both are moved here while the connection runs:
//!
//! * A stream starts with 64 KiB. The connection window covers every open stream's whole window (in powers of two, so that it moves
//!   rarely): streams that are not read can fill their own windows and nothing else, so they never stop another one.
//! * The stream window doubles when one reader took at least half a window within one round trip, that is when the window is what
//!   limits it, and only as far as the tunnel's limit, shared by its streams, and the process's budget allow. When streams are added
//!   and the limit is reached, the stream window shrinks again.
//! * What the connection window grants above the floor of 128 KiB is taken from the process's [`Budget`] and returned when
//!   streams end or the tunnel closes. When the budget is used up, tunnels share what they have: their stream windows shrink down to
//!   16 KiB, and only below that can unread streams hold up others of the same tunnel.
//!
//! A granted window is a promise, not memory: memory is used only for what a peer sent and nobody has read.

use crate::budget::Budget;

/// Sizes of flow-control windows, in bytes.
#[derive(Clone, Debug)]
pub struct WindowSettings {
    /// What a stream starts with (64 KiB).
    pub stream: u32,
    /// What a stream that is read as fast as it arrives may grow to (2 MiB).
    pub stream_max: u32,
    /// What the streams of one tunnel may have together when they have grown (16 MiB).
    pub tunnel_max: u32,
    /// What all tunnels that share these settings may have together (256 MiB).
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
    /// The stream window that growth has reached; what is advertised may be less when many streams share.
    target: u32,
    /// How many streams the connection window covers.
    covered: u32,
    max_streams: u32,
    /// Taken from the budget.
    granted: u32,
    sizes: Sizes,
}

/// The connection window that every tunnel may have without asking.
const FLOOR: u32 = 128 * 1024;
/// Stream windows do not shrink below this.
const STREAM_MIN: u32 = 16 * 1024;
/// The protocol's limit is 2^31 - 1.
const WINDOW_MAX: u32 = 1 << 30;

impl Default for WindowSettings {
    fn default() -> Self {
        Self {
            stream: 64 << 10,
            stream_max: 2 << 20,
            tunnel_max: 16 << 20,
            budget: Budget::new(256 << 20),
        }
    }
}

// === impl Windows ===

impl Windows {
    pub(crate) fn new(settings: WindowSettings, max_streams: u32) -> Self {
        let stream = settings.stream.clamp(STREAM_MIN, WINDOW_MAX);
        let mut windows = Self {
            settings,
            target: stream,
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

    /// One reader took `busiest` bytes within one round trip. Answers with new sizes if the windows grow.
    pub(crate) fn measured(&mut self, busiest: u32) -> Option<Sizes> {
        if busiest < self.sizes.stream / 2 || self.sizes.stream < self.target {
            return None;
        }
        let before = self.target;
        self.target = self
            .target
            .saturating_mul(2)
            .min(self.settings.stream_max.max(before))
            .min(WINDOW_MAX);
        let change = self.settle();
        // What could not be granted is not kept as a wish: it would come back when streams end, without being read any faster.
        self.target = self.target.min(self.sizes.stream.max(before));
        change
    }

    /// Makes the sizes follow from target, streams, limits and budget.
    fn settle(&mut self) -> Option<Sizes> {
        let base = self.settings.stream.clamp(STREAM_MIN, WINDOW_MAX);
        let share = (self.settings.tunnel_max / self.covered).max(base);
        let stream = self.target.min(share);
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
            assert_eq!(stream, 64 * KIB, "{active}");
            assert!(connection >= stream * (active + 1).min(100), "{active}: {connection}");
        }
    }

    #[test]
    fn a_window_grows_only_when_it_is_what_limits_its_reader() {
        let mut windows = Windows::new(settings(1 << 30), 100);
        windows.cover(1);
        assert_eq!(windows.measured(20 * KIB), None);
        assert_eq!(
            windows.measured(60 * KIB),
            Some(Sizes {
                stream: 128 * KIB,
                connection: 256 * KIB
            })
        );
        for _ in 0..20 {
            windows.measured(u32::MAX);
        }
        assert_eq!(
            windows.sizes(),
            Sizes {
                stream: 2048 * KIB,
                connection: 4096 * KIB
            }
        );
    }

    #[test]
    fn grown_windows_shrink_when_more_streams_share_the_tunnel() {
        let mut windows = Windows::new(settings(1 << 30), 100);
        for _ in 0..20 {
            windows.measured(u32::MAX);
        }
        windows.cover(100);
        assert_eq!(
            windows.sizes(),
            Sizes {
                stream: 128 * KIB,
                connection: 128 * 128 * KIB
            }
        );
    }

    #[test]
    fn an_exhausted_budget_makes_windows_smaller_and_is_returned() {
        let settings = settings(1 << 20);
        let mut first = Windows::new(settings.clone(), 100);
        first.cover(16);
        assert_eq!(
            first.sizes(),
            Sizes {
                stream: (1152 * KIB) / 32,
                connection: 1152 * KIB
            }
        );
        let mut second = Windows::new(settings.clone(), 100);
        assert_eq!(
            second.sizes(),
            Sizes {
                stream: 64 * KIB,
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
        assert_eq!(settings.budget.granted(), 0);
        second.cover(3);
        assert_eq!(
            second.sizes(),
            Sizes {
                stream: 64 * KIB,
                connection: 256 * KIB
            }
        );
        drop(second);
        assert_eq!(settings.budget.granted(), 0);
    }

    proptest! {
        #[test]
        fn the_budget_is_never_exceeded_and_always_returned(
            budget in 0u64..(64 << 20),
            steps in proptest::collection::vec((0usize..4, 0u32..220, any::<bool>()), 1..100),
        ) {
            let settings = settings(budget);
            let mut tunnels: Vec<_> = (0..4).map(|_| Windows::new(settings.clone(), 200)).collect();
            for (tunnel, active, busy) in steps {
                if busy {
                    tunnels[tunnel].measured(u32::MAX);
                } else {
                    tunnels[tunnel].cover(active);
                }
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
