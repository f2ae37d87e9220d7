//! Limits of requests that the proxy counts by itself (contract xds §3.12).
//!
//! The buckets of a configuration live as long as it stands, whatever else of the chain changes; whoever compiles it sees to that.
//! Where each client connection has buckets of its own, they are found by the connection and go with it.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::{Connection, Exchange, ResponseFlags, clock};
use cairn_policy::{
    headers::{HeaderEdits, record_alone},
    rate_limit::{self, About, Allowance, Buckets, Descriptor, HostLimits, RateLimit, TokenBucket},
    route::Fraction,
};
use http::StatusCode;
use parking_lot::Mutex;

use crate::{
    contract::{HttpFilter, LocalReply, ResponseHead, Slot, Verdict},
    on_route::{RouteConfig, Scope},
};

/// Connections after whose number the table of their buckets is cleaned of those that are gone.
const CLEAN_AT_LEAST: usize = 64;

/// The filter.
#[derive(Debug)]
pub struct LocalRateLimit {
    /// What holds where a route says nothing.
    pub limit: Arc<LocalLimit>,
}

/// One limit, on a chain or on a route.
#[derive(Debug)]
pub struct LocalLimit {
    /// The share of requests that it looks at.
    pub enabled: Fraction,
    /// The share of those beyond the limit that it denies.
    pub enforced: Fraction,
    /// What those are answered.
    pub status: StatusCode,
    /// gRPC callers are told `RESOURCE_EXHAUSTED`.
    pub resource_exhausted: bool,
    /// Edits of requests beyond the limit that are not denied.
    pub request_edits: HeaderEdits,
    /// Edits of answers to those that are.
    pub response_edits: HeaderEdits,
    /// Whether answers tell what is left.
    pub headers: bool,
    /// Which limits of routes it counts by.
    pub stage: u32,
    /// What becomes of those of virtual hosts.
    pub host_limits: HostLimits,
    /// Its own, in the place of those of routes.
    pub own: Vec<RateLimit>,
    /// Buckets.
    pub count: Count,
}

/// Whose buckets are counted with.
pub enum Count {
    /// The same for all requests.
    Together(Arc<Buckets>),
    /// Each client connection its own.
    PerConnection(PerConnection),
}

/// Buckets by connection.
pub struct PerConnection {
    make: Box<dyn Fn(Duration) -> Buckets + Send + Sync>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    buckets: HashMap<u64, (Weak<Connection>, Arc<Buckets>)>,
    clean_at: usize,
}

/// What it keeps for a request.
struct Kept {
    limit: Arc<LocalLimit>,
    denied: bool,
    bucket: Option<Arc<TokenBucket>>,
}

/// Time since the process's own beginning, for buckets.
pub fn now() -> Duration {
    static BEGINNING: std::sync::LazyLock<clock::Instant> = std::sync::LazyLock::new(clock::now);
    clock::now().saturating_duration_since(*BEGINNING)
}

// === impl LocalRateLimit ===

impl HttpFilter for LocalRateLimit {
    fn name(&self) -> &str {
        "envoy.filters.http.local_ratelimit"
    }

    fn decode_head(&self, slot: &mut Slot, exchange: &mut Exchange, scope: &Scope<'_>) -> Verdict {
        let limit = match scope.config() {
            Some(RouteConfig::LocalRateLimit(limit)) => limit,
            _ => &self.limit,
        };
        if !limit.enabled.contains(fastrand::u64(..)) {
            return Verdict::Continue;
        }
        let Allowance { allowed, bucket } = limit.take(exchange, scope);
        let denied = !allowed && limit.enforced.contains(fastrand::u64(..));
        if limit.headers || denied {
            *slot = Slot::Other(Box::new(Kept {
                limit: limit.clone(),
                denied,
                bucket,
            }));
        }
        if denied {
            return Verdict::Reply(limit.reply());
        }
        if !allowed {
            limit.request_edits.apply_to_request(exchange, &record_alone);
        }
        Verdict::Continue
    }

    fn encode_head(&self, slot: &mut Slot, exchange: &mut Exchange, head: &mut ResponseHead) {
        let Slot::Other(kept) = slot else { return };
        let Some(Kept { limit, denied, bucket }) = kept.downcast_ref() else {
            return;
        };
        if *denied {
            limit
                .response_edits
                .apply_to_response(&mut head.headers, exchange, &record_alone);
        }
        if let Some(bucket) = bucket.as_ref().filter(|_| limit.headers) {
            rate_limit::headers::of_bucket(bucket, now(), &mut head.headers);
        }
    }
}

// === impl LocalLimit ===

impl LocalLimit {
    fn take(&self, exchange: &Exchange, scope: &Scope<'_>) -> Allowance {
        let of_connection;
        let buckets = match &self.count {
            Count::Together(buckets) => buckets,
            Count::PerConnection(connections) => {
                of_connection = connections.of(&exchange.connection);
                &of_connection
            }
        };
        let descriptors = if buckets.has_descriptors() {
            self.descriptors(exchange, scope)
        } else {
            Vec::new()
        };
        buckets.take(&descriptors, now())
    }

    fn descriptors(&self, exchange: &Exchange, scope: &Scope<'_>) -> Vec<Descriptor> {
        let about = About {
            exchange,
            source_cluster: scope.services.node_cluster(),
            cluster: scope.route.cluster().map(|name| &**name),
        };
        match scope.route.found {
            Some(_) if !self.own.is_empty() => RateLimit::each(&self.own, self.stage, about),
            Some(found) => rate_limit::describe(found, self.host_limits, self.stage, about),
            None => Vec::new(),
        }
    }

    fn reply(&self) -> LocalReply {
        let body = Bytes::from_static(b"local_rate_limited");
        LocalReply {
            grpc_status: self.resource_exhausted.then_some(crate::ratelimit::RESOURCE_EXHAUSTED),
            ..LocalReply::new(self.status, ResponseFlags::RATE_LIMITED, "local_rate_limited", body)
        }
    }
}

// === impl PerConnection ===

impl PerConnection {
    /// Each connection gets buckets that this makes, full at the time that it is given.
    pub fn new(make: impl Fn(Duration) -> Buckets + Send + Sync + 'static) -> Self {
        Self {
            make: Box::new(make),
            known: Mutex::default(),
        }
    }

    fn of(&self, connection: &Arc<Connection>) -> Arc<Buckets> {
        let mut known = self.known.lock();
        if let Some((_, buckets)) = known.buckets.get(&connection.id) {
            return buckets.clone();
        }
        if known.buckets.len() >= known.clean_at {
            known.buckets.retain(|_, (connection, _)| connection.strong_count() > 0);
            // Cleaned again when there are twice as many: each connection pays for a few others.
            known.clean_at = (known.buckets.len() * 2).max(CLEAN_AT_LEAST);
        }
        let buckets = Arc::new((self.make)(now()));
        known
            .buckets
            .insert(connection.id, (Arc::downgrade(connection), buckets.clone()));
        buckets
    }
}

impl fmt::Debug for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Count::Together(buckets) => f.debug_tuple("Together").field(buckets).finish(),
            Count::PerConnection(_) => f.write_str("PerConnection"),
        }
    }
}
