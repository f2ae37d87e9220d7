//! Which exchanges a sink logs.

use cairn_exchange::{Exchange, ResponseFlags};

/// A condition on a finished exchange (`envoy.config.accesslog.v3.AccessLogFilter`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Filter {
    /// All.
    #[default]
    Always,
    /// By the status of the answer, which is 0 when there is none.
    Status(Comparison, u64),
    /// By the duration in milliseconds.
    Duration(Comparison, u64),
    /// Those with one of these flags; with any flag at all when none is named.
    Flags(ResponseFlags),
    /// Those that all agree on.
    All(Box<[Filter]>),
    /// Those that one agrees on.
    Any(Box<[Filter]>),
}

/// How a number is compared with the configured one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Equal.
    Equal,
    /// Not equal.
    NotEqual,
    /// Greater or equal.
    AtLeast,
    /// Less or equal.
    AtMost,
}

// === impl Filter ===

impl Filter {
    /// Whether `exchange` is logged.
    pub fn matches(&self, exchange: &Exchange) -> bool {
        match self {
            Self::Always => true,
            Self::Status(comparison, than) => {
                let status = exchange.status.map_or(0, |status| status.as_u16().into());
                comparison.holds(status, *than)
            }
            Self::Duration(comparison, than) => {
                let millis = u64::try_from(exchange.duration().as_millis()).unwrap_or(u64::MAX);
                comparison.holds(millis, *than)
            }
            Self::Flags(flags) if flags.is_empty() => !exchange.flags.is_empty(),
            Self::Flags(flags) => exchange.flags.intersects(*flags),
            Self::All(filters) => filters.iter().all(|filter| filter.matches(exchange)),
            Self::Any(filters) => filters.iter().any(|filter| filter.matches(exchange)),
        }
    }
}

// === impl Comparison ===

impl Comparison {
    fn holds(self, number: u64, than: u64) -> bool {
        match self {
            Self::Equal => number == than,
            Self::NotEqual => number != than,
            Self::AtLeast => number >= than,
            Self::AtMost => number <= than,
        }
    }
}
