//! One connection to an endpoint on behalf of a client that sends bytes: whether it may be, where it goes, and what is told of it.

use std::{
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use cairn_exchange::{Exchange, Protocol, ResponseFlags, Upstream, clock};
use cairn_filters::local_ratelimit;
use cairn_hbone::TunnelStream;
use cairn_policy::{outlier::Report, route::hash_address};
use cairn_telemetry::istio::TcpReport;
use http::StatusCode;
use tokio::time::timeout_at;

use super::{
    Inner, authorize,
    open::{self, Asked, Standing, Vigil},
    relay::{End, Relay, Terms},
};
use crate::{
    proxy::under,
    snapshot::{Chain, ChainKind, Snapshot, TcpChain},
    upstream::{
        Avoid, Cluster, ConnectError, Counted, Discovery, Endpoint, Level, Picking, Purpose, Resource, Toward, UpstreamIo,
    },
};

/// Endpoints that are tried for one connection: of which no byte was sent, so that another try harms nobody.
const MAX_TRIES: u32 = 3;
/// Envoy's idle timeout of TCP connections.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// Why a connection is not passed.
pub struct Refused {
    /// What the CONNECT is answered.
    pub status: StatusCode,
    /// The reason.
    pub why: String,
    /// By policy, whose name is nothing that the client is told.
    pub denied: bool,
}

/// What is told of a connection that does not come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tells {
    /// Why: to logs and metrics.
    Failure,
    /// Nothing: another protocol may be spoken in the end.
    Nothing,
}

/// A connection to an endpoint on behalf of a client.
pub struct Passage {
    inner: Arc<Inner>,
    chain: Arc<Chain>,
    exchange: Option<Exchange>,
    endpoint: Arc<Endpoint>,
    /// The connection, as the cluster's limits count it.
    _counted: Counted,
    io: Option<UpstreamIo>,
    /// What the endpoint has said before the client said anything.
    greeting: Bytes,
    report: Option<TcpReport>,
}

impl Passage {
    /// Decides, and connects.
    pub async fn open(inner: &Arc<Inner>, snapshot: &Arc<Snapshot>, chain: &Arc<Chain>, tells: Tells) -> Result<Self, Refused> {
        let mut exchange = Exchange::begin(Protocol::Tcp, inner.connection.clone(), chain.name.clone(), snapshot.version);
        let tcp = match (&chain.kind, &chain.refuse) {
            (_, Some(refusal)) => {
                exchange.because(ResponseFlags::NONE, "chain_not_supported");
                let why = format!(
                    "this service has a rule that its waypoint does not support: {}",
                    refusal.reason
                );
                return Err(Refused {
                    status: StatusCode::FORBIDDEN,
                    why,
                    denied: false,
                });
            }
            (ChainKind::Tcp(tcp), None) => tcp,
            (ChainKind::Http(_) | ChainKind::Refused { .. }, None) => {
                return Err(Refused {
                    status: StatusCode::FORBIDDEN,
                    why: "this chain does not pass bytes".into(),
                    denied: false,
                });
            }
        };
        let refused = |mut exchange: Exchange, flags, why: String| {
            exchange.because(flags, why.clone());
            tell(inner, tcp, exchange, tells);
            Refused {
                status: StatusCode::SERVICE_UNAVAILABLE,
                why,
                denied: false,
            }
        };
        let cluster = tcp.choose(fastrand::u64(..)).and_then(|name| snapshot.clusters.get(name));
        exchange.cluster = cluster.map(|cluster| cluster.facts.clone());
        if let Err(why) = authorize::connection(inner, snapshot, tcp, &mut exchange).await {
            tell(inner, tcp, exchange, tells);
            return Err(Refused {
                status: StatusCode::FORBIDDEN,
                why,
                denied: true,
            });
        }
        if !tcp.limits.iter().all(|limit| limit.take(1, local_ratelimit::now())) {
            exchange.termination_details = Some("local_ratelimit_close_over_limit".into());
            let why = format!("more connections to {} than its limit allows", chain.name);
            return Err(refused(exchange, ResponseFlags::NONE, why));
        }
        let Some(cluster) = cluster else {
            let why = format!("the cluster of {} does not exist", chain.name);
            return Err(refused(exchange, ResponseFlags::NO_CLUSTER_FOUND, why));
        };
        let original = super::request::original(inner);
        cluster.resolved().await;
        let hash = tcp.hash_source_ip.then(|| hash_address(inner.connection.remote_address.ip()));
        let mut picking = Picking::new(cluster).hashed(hash);
        let outliers = &inner.proxy.outliers;
        let breakers = &cluster.settings.breakers;
        let count = |resource| Counted::within(&cluster.state, breakers, Level::Default, resource);
        let mut last = None;
        // All tries together take no longer than one may: a client that waits for its connection is not kept for three timeouts.
        let deadline = clock::now() + cluster.settings.connect_timeout;
        let named = match by_server_name(inner, tcp, cluster).await {
            Named::Nothing => None,
            Named::At(endpoint) => Some(endpoint),
            Named::Refused(flags, why) => return Err(refused(exchange, flags, why)),
        };
        while exchange.attempts < MAX_TRIES && clock::now() < deadline {
            let avoid = Avoid {
                endpoints: true,
                priorities: None,
            };
            let next = match &named {
                Some(endpoint) => (exchange.attempts == 0).then(|| endpoint.clone()),
                None => picking.next(fastrand::u64(..), avoid),
            };
            let Some(endpoint) = next else {
                break;
            };
            // It waits for its connection, and the connection counts from its making.
            let (Some(_pending), Some(counted)) = (count(Resource::Pending), count(Resource::Connection)) else {
                let why = format!("the limits of {} are reached", cluster.name());
                return Err(refused(exchange, ResponseFlags::UPSTREAM_OVERFLOW, why));
            };
            exchange.attempts += 1;
            exchange.upstream = Some(describe(&endpoint, snapshot, original));
            let purpose = Purpose::of(
                cluster.transport_to(&endpoint),
                cluster.settings.names_by_host,
                None,
                inner.connection.remote_address,
                original,
            );
            let toward = Toward {
                snapshot,
                cluster,
                endpoint: &endpoint,
                original,
                purpose: purpose.as_deref(),
                speak: None,
            };
            let connected = timeout_at(deadline, inner.proxy.connector.connect(&toward)).await;
            match connected.unwrap_or(Err(ConnectError::Timeout)) {
                Ok(connected) => {
                    if let Some(upstream) = &mut exchange.upstream {
                        upstream.local_address = connected.local_address;
                    }
                    outliers.report(cluster, &endpoint, Report::ConnectedForGood);
                    endpoint.state.active.fetch_add(1, Ordering::Relaxed);
                    endpoint.state.total.fetch_add(1, Ordering::Relaxed);
                    return Ok(Self {
                        inner: inner.clone(),
                        chain: chain.clone(),
                        exchange: Some(exchange),
                        endpoint,
                        _counted: counted,
                        io: Some(connected.io),
                        greeting: Bytes::new(),
                        report: None,
                    });
                }
                Err(error @ ConnectError::Unsupported(_)) => {
                    last = Some(error);
                    break;
                }
                Err(error) => {
                    let report = match error {
                        ConnectError::Timeout => Report::TimedOut,
                        _ => Report::Failed,
                    };
                    outliers.report(cluster, &endpoint, report);
                    last = Some(error);
                }
            }
        }
        Err(match last {
            Some(error) => {
                exchange.transport_failure = Some(error.to_string().into());
                let why = format!("no connection to an endpoint of {}: {error}", cluster.name());
                refused(exchange, ResponseFlags::UPSTREAM_CONNECTION_FAILURE, why)
            }
            None => {
                let why = format!("no healthy endpoint in {}", cluster.name());
                refused(exchange, ResponseFlags::NO_HEALTHY_UPSTREAM, why)
            }
        })
    }

    fn tcp(&self) -> Option<&TcpChain> {
        match &self.chain.kind {
            ChainKind::Tcp(tcp) => Some(tcp),
            ChainKind::Http(_) | ChainKind::Refused { .. } => None,
        }
    }

    /// Whether the endpoint has said something.
    pub fn is_greeted(&self) -> bool {
        !self.greeting.is_empty()
    }

    /// Waits for the endpoint's first bytes. From one that ends without any, nothing comes any more.
    pub fn poll_greeting(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(io) = &mut self.io else { return Poll::Pending };
        match ready!(io.poll_bytes(cx, &mut BytesMut::new())) {
            Ok(bytes) if !bytes.is_empty() => {
                self.greeting = bytes;
                Poll::Ready(())
            }
            Ok(_) | Err(_) => {
                self.io = None;
                Poll::Pending
            }
        }
    }

    /// Passes bytes until both sides have ended.
    pub async fn run(mut self, stream: TunnelStream, held: Bytes) {
        let Some(upstream) = self.io.take() else { return };
        let proxy = self.inner.proxy.clone();
        let _counted = under(&proxy.live.exchanges);
        let (idle, most, interval) = self
            .tcp()
            .map_or((None, None, None), |tcp| (tcp.idle_timeout, tcp.max_duration, tcp.metrics));
        let terms = Terms {
            idle: Some(idle.unwrap_or(IDLE_TIMEOUT)).filter(|idle| !idle.is_zero()),
            until: most.map(|most| clock::now() + most),
            interval,
        };
        let mut relay = Relay::new(stream, upstream, held, std::mem::take(&mut self.greeting));
        let standing = Standing {
            inner: self.inner.clone(),
            chain: self.chain.clone(),
            asked: Asked::bytes(),
            vigil: Vigil::new(self.exchange.as_ref().map_or(0, |exchange| exchange.snapshot)),
        };
        self.inner.busy();
        proxy.open.enter(&self.inner);
        let end = relay.run(terms, &standing, |relay| self.progress(relay)).await;
        self.close(end);
    }

    /// Tells of the bytes so far; the first time, of the connection itself.
    fn progress(&mut self, relay: &Relay) {
        let Some(exchange) = &mut self.exchange else { return };
        exchange.counts.received = relay.received;
        exchange.counts.sent = relay.sent;
        if let ChainKind::Tcp(TcpChain {
            metrics: Some(_),
            metric_rules,
            ..
        }) = &self.chain.kind
        {
            let istio = &self.inner.proxy.istio;
            self.report
                .get_or_insert_with(|| istio.report_open(exchange, metric_rules))
                .progress(exchange);
        }
    }

    /// Tells of the end.
    pub fn close(&mut self, end: End) {
        let Some(mut exchange) = self.exchange.take() else { return };
        exchange.moments.last_sent = Some(exchange.elapsed());
        match end {
            End::Clean | End::Idle => {}
            End::ClientGone => exchange.flags.insert(ResponseFlags::DOWNSTREAM_REMOTE_RESET),
            End::EndpointGone => exchange.flags.insert(ResponseFlags::UPSTREAM_REMOTE_RESET),
            End::Duration => exchange.flags.insert(ResponseFlags::DURATION_TIMEOUT),
            End::Denied => exchange.termination_details = Some(open::DENIED.into()),
            End::Gone => exchange.termination_details = Some(open::GONE.into()),
        }
        let report = self.report.take();
        if let Some(tcp) = self.tcp() {
            if tcp.metrics.is_some() {
                report
                    .unwrap_or_else(|| self.inner.proxy.istio.report_open(&exchange, &tcp.metric_rules))
                    .close(&exchange);
            }
            tcp.access_logs.log(&cairn_exchange::format::View::new(&exchange));
        }
        if let Some(observer) = &self.inner.proxy.observer {
            observer(&exchange);
        }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.endpoint.state.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where a server name leads.
enum Named {
    /// The cluster does not go by names.
    Nothing,
    /// There.
    At(Arc<Endpoint>),
    /// Nowhere, and why.
    Refused(ResponseFlags, String),
}

/// The endpoint that the client's server name asks for, in a cluster that goes by names. A name that the service does not cover leads
/// nowhere (conformance/DIFFERENCES.md).
async fn by_server_name(inner: &Inner, tcp: &TcpChain, cluster: &Cluster) -> Named {
    let Discovery::DynamicForwardProxy(terms) = &cluster.settings.discovery else {
        return Named::Nothing;
    };
    let (Some(name), Some(port)) = (&inner.connection.requested_server_name, tcp.server_name.forward_to) else {
        let why = format!("{} goes by server names, and the client has named none", cluster.name());
        return Named::Refused(ResponseFlags::NO_HEALTHY_UPSTREAM, why);
    };
    let service = cluster.facts.service.as_ref();
    if let Some(domain) = service.and_then(|service| service.host.strip_prefix('*'))
        && !name.ends_with(&domain.to_ascii_lowercase())
    {
        let why = format!("the server name {name} is not one of *{domain}");
        return Named::Refused(ResponseFlags::NO_HEALTHY_UPSTREAM, why);
    }
    let found = cluster
        .state
        .hosts
        .endpoint(inner.proxy.connector.names(), terms, name, port)
        .await;
    match found {
        Ok(endpoint) => Named::At(endpoint),
        Err(error) => Named::Refused(ResponseFlags::DNS_RESOLUTION_FAILED, error.to_string()),
    }
}

/// Tells of a connection that never reached an endpoint.
fn tell(inner: &Inner, tcp: &TcpChain, mut exchange: Exchange, tells: Tells) {
    if tells == Tells::Nothing {
        return;
    }
    exchange.moments.last_sent = Some(exchange.elapsed());
    if tcp.metrics.is_some() {
        inner.proxy.istio.report_open(&exchange, &tcp.metric_rules).close(&exchange);
    }
    tcp.access_logs.log(&cairn_exchange::format::View::new(&exchange));
    if let Some(observer) = &inner.proxy.observer {
        observer(&exchange);
    }
}

/// An endpoint as the record names it.
pub fn describe(endpoint: &Endpoint, snapshot: &Snapshot, original: Option<std::net::SocketAddr>) -> Upstream {
    let unspecified = || std::net::SocketAddr::from(([0, 0, 0, 0], 0));
    let address = endpoint.target.address().or(original).unwrap_or_else(unspecified);
    Upstream {
        display: endpoint.display.clone(),
        address,
        workload: snapshot.workloads.workload_at(address.ip()),
        local_address: None,
    }
}
