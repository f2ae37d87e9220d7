//! Which exchanges a sink logs.

use std::{fmt, sync::Arc};

use cairn_exchange::{Exchange, Protocol, ResponseFlags, format::View};
use http::HeaderName;

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
    /// Those that the chain has decided to trace.
    Traceable,
    /// A share of them.
    Sampled(Sampled),
    /// By the status of gRPC, which an answer without one gets from its HTTP status.
    GrpcStatus {
        /// A bit for each code.
        codes: u32,
        /// All but those.
        exclude: bool,
    },
    /// Requests, or connections.
    Requests(bool),
    /// Those that all agree on.
    All(Box<[Filter]>),
    /// Those that one agrees on.
    Any(Box<[Filter]>),
    /// By what others look at: headers, metadata, expressions.
    When(When),
}

/// A share of exchanges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampled {
    /// So many …
    pub numerator: u64,
    /// … of so many.
    pub denominator: u64,
    /// By chance; else the request's id decides, so that all logs of a request agree.
    pub independent: bool,
}

/// A condition that somebody else has compiled.
#[derive(Clone)]
pub struct When {
    holds: Arc<dyn Fn(&View<'_>) -> bool + Send + Sync>,
    reads: Box<[HeaderName]>,
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
    /// Whether the exchange is logged.
    pub fn matches(&self, view: &View<'_>) -> bool {
        let exchange = view.exchange;
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
            Self::Traceable => exchange.traceable,
            Self::Sampled(sampled) => sampled.holds(exchange),
            Self::GrpcStatus { codes, exclude } => {
                let code = 1_u32.checked_shl(grpc_code(exchange)).unwrap_or(0);
                (codes & code != 0) != *exclude
            }
            Self::Requests(requests) => (exchange.protocol != Protocol::Tcp) == *requests,
            Self::All(filters) => filters.iter().all(|filter| filter.matches(view)),
            Self::Any(filters) => filters.iter().any(|filter| filter.matches(view)),
            Self::When(When { holds, .. }) => holds(view),
        }
    }

    /// The fields of the answer that it reads.
    pub(super) fn response_headers(&self) -> Vec<&HeaderName> {
        match self {
            Self::All(filters) | Self::Any(filters) => filters.iter().flat_map(Self::response_headers).collect(),
            Self::When(When { reads, .. }) => reads.iter().collect(),
            _ => Vec::new(),
        }
    }
}

/// The code of the answer, gRPC or not (gRPC's http-grpc-status-mapping).
fn grpc_code(exchange: &Exchange) -> u32 {
    const UNKNOWN: u32 = 2;
    let by_status = || {
        Some(match exchange.status?.as_u16() {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502 | 503 | 504 => 14,
            _ => UNKNOWN,
        })
    };
    exchange.grpc_status.or_else(by_status).unwrap_or(UNKNOWN)
}

// === impl Sampled ===

impl Sampled {
    fn holds(self, exchange: &Exchange) -> bool {
        let lot = || {
            let id = exchange.request.as_ref()?.headers.get("x-request-id")?.to_str().ok()?;
            u64::from_str_radix(id.get(..8).filter(|_| id.len() == 36)?, 16).ok()
        };
        let lot = if self.independent { None } else { lot() };
        let lot = lot.unwrap_or_else(|| fastrand::u64(..));
        lot.checked_rem(self.denominator).is_some_and(|lot| lot < self.numerator)
    }
}

// === impl When ===

impl When {
    /// A condition.
    pub fn new(holds: impl Fn(&View<'_>) -> bool + Send + Sync + 'static) -> Self {
        Self {
            holds: Arc::new(holds),
            reads: Box::default(),
        }
    }

    /// A condition that reads these fields of the answer.
    #[must_use]
    pub fn reading(self, reads: impl IntoIterator<Item = HeaderName>) -> Self {
        Self {
            reads: reads.into_iter().collect(),
            ..self
        }
    }
}

impl fmt::Debug for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("When(…)")
    }
}

impl PartialEq for When {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.holds, &other.holds)
    }
}

impl Eq for When {}

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
