//! The record of one exchange: a request with its answer, or a TCP connection.
//!
//! Facts are filled in as they become known, by whoever learns them, and read by filters (attributes), the formatter, logs,
//! metrics and the explanation of a decision. There is one set of facts, so that all of them agree.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, uri::PathAndQuery};

use crate::{DynamicMetadata, FilterState, ResponseFlags, SpiffeId, TraceIds, clock::Instant, workload::Workload};

/// What is spoken inside a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Bytes that are nobody's business.
    Tcp,
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2, with prior knowledge.
    Http2,
}

/// The scheme of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// `http`
    Http,
    /// `https`
    Https,
}

/// The head of a request in the form that all protocols share: what HTTP/2 calls pseudo-headers are fields, and there is no
/// `host` header among `headers`.
#[derive(Clone, Debug)]
pub struct RequestHead {
    /// The method.
    pub method: Method,
    /// Path and query, normalized as the chain asks.
    pub path: PathAndQuery,
    /// `:authority` or `Host`; empty when the client sent none.
    pub authority: HeaderValue,
    /// `:scheme`, or what the connection implies.
    pub scheme: Scheme,
    /// All other fields, in order of arrival per name.
    pub headers: HeaderMap,
}

/// Who the parties of an inner connection are; the same for all its requests.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Counts inner connections of this process.
    pub id: u64,
    /// The authority of the CONNECT request.
    pub authority: Arc<str>,
    /// The service address that the authority stands for: the authority when it is an address, else the service's own (VIP and port).
    pub local_address: Option<SocketAddr>,
    /// The port of the service.
    pub service_port: u16,
    /// Where the client is; the tunnel's source address.
    pub remote_address: SocketAddr,
    /// Who the client is, from its certificate.
    pub peer: Option<SpiffeId>,
    /// Who we were to the client.
    pub local: Option<SpiffeId>,
    /// The workload behind `remote_address`, when known.
    pub source: Option<Arc<Workload>>,
    /// The server name of the client's own TLS, where it was looked at.
    pub requested_server_name: Option<Arc<str>>,
    /// When the inner connection was accepted.
    pub opened: Instant,
}

/// The service that a cluster stands for; labels of metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Service {
    /// Full host name.
    pub host: Arc<str>,
    /// Name of the service.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
}

/// What is said of the cluster that a request went to.
#[derive(Debug)]
pub struct ClusterFacts {
    /// `inbound-vip|80|http|web.app.svc.cluster.local`
    pub name: Arc<str>,
    /// The name that statistics and `%UPSTREAM_CLUSTER%` show, where the configuration gives one.
    pub alt_stat_name: Option<Arc<str>>,
    /// The service in the cluster's metadata.
    pub service: Option<Service>,
}

/// The endpoint of the last attempt.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// As Envoy prints it: `envoy://connect_originate/10.244.0.10:8080` for a tunnel, `10.244.0.10:8080` without.
    pub display: Arc<str>,
    /// The endpoint's address.
    pub address: SocketAddr,
    /// The workload behind it, when known.
    pub workload: Option<Arc<Workload>>,
    /// Our end of the connection, when there is one.
    pub local_address: Option<SocketAddr>,
}

/// Moments of an exchange, as time since its start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moments {
    /// Last byte of the request received.
    pub request_received: Option<Duration>,
    /// First byte sent upstream.
    pub first_upstream_sent: Option<Duration>,
    /// Last byte sent upstream.
    pub last_upstream_sent: Option<Duration>,
    /// First byte received from upstream.
    pub first_upstream_received: Option<Duration>,
    /// Last byte received from upstream.
    pub last_upstream_received: Option<Duration>,
    /// First byte of the answer sent.
    pub first_sent: Option<Duration>,
    /// Last byte of the answer sent: the duration of the exchange.
    pub last_sent: Option<Duration>,
}

/// Bytes and messages of an exchange.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Bytes of the request's body, or received from the TCP client.
    pub received: u64,
    /// Bytes of the answer's body, or sent to the TCP client.
    pub sent: u64,
    /// Head of the request on the wire, approximately.
    pub received_head: u64,
    /// Head of the answer on the wire, approximately.
    pub sent_head: u64,
    /// gRPC messages of the request.
    pub request_messages: u64,
    /// gRPC messages of the answer.
    pub response_messages: u64,
}

/// What authorization rules that are only tried out (a dry run) would have done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowDecision {
    /// What the names of the result begin with: `istio_dry_run_allow_`, …
    pub prefix: Arc<str>,
    /// Whether they would have let it pass.
    pub allowed: bool,
    /// The policy that matched, if one did.
    pub policy: Option<Arc<str>>,
}

/// The record of one exchange.
#[derive(Debug)]
pub struct Exchange {
    /// What was spoken.
    pub protocol: Protocol,
    /// Time of day at the start.
    pub wall: SystemTime,
    /// Start on the monotonic clock.
    pub start: Instant,
    /// The parties.
    pub connection: Arc<Connection>,
    /// The client that `x-forwarded-for` names, where the chain believes it; `None`: the connection's remote address.
    pub client_address: Option<SocketAddr>,
    /// The request as it is now: filters and the route edit it. `None` for TCP.
    pub request: Option<RequestHead>,
    /// The chain that decided: `inbound-vip|80|http|…`, `direct-tcp`, …
    pub chain: Arc<str>,
    /// Name of the chosen route.
    pub route: Option<Arc<str>>,
    /// Objects that filters have put.
    pub filter_state: FilterState,
    /// A filter has changed what routes look at, and asks for the route to be chosen again.
    pub reroute: bool,
    /// The chosen cluster.
    pub cluster: Option<Arc<ClusterFacts>>,
    /// The endpoint of the last attempt.
    pub upstream: Option<Upstream>,
    /// What is spoken with the endpoint.
    pub upstream_protocol: Option<Protocol>,
    /// How often it was tried.
    pub attempts: u32,
    /// Status of the answer; `None` when there was none.
    pub status: Option<StatusCode>,
    /// Those fields of the answer that the chain's logs name.
    pub response_headers: Vec<(HeaderName, HeaderValue)>,
    /// Status of a gRPC answer.
    pub grpc_status: Option<u32>,
    /// What went wrong.
    pub flags: ResponseFlags,
    /// Why it was answered so, in Envoy's words: `via_upstream`, `route_not_found`, …
    pub details: Option<Cow<'static, str>>,
    /// Why the connection ended, in Envoy's words.
    pub termination_details: Option<Cow<'static, str>>,
    /// Why no connection to the endpoint could be made.
    pub transport_failure: Option<Cow<'static, str>>,
    /// What rules that are only tried out would have done, in their order.
    pub shadow: Vec<ShadowDecision>,
    /// What filters have noted.
    pub metadata: DynamicMetadata,
    /// Its span, where the chain traces and what the request says of a trace could be read.
    pub trace: Option<TraceIds>,
    /// Whether the chain has decided that it is traced; what the request brought may say otherwise.
    pub traceable: bool,
    /// Whether an AUDIT policy matched: `access_log_hint`.
    pub audited: bool,
    /// Bytes and messages.
    pub counts: Counts,
    /// Moments.
    pub moments: Moments,
    /// The version of the configuration that it saw.
    pub snapshot: u64,
}

// === impl RequestHead ===

impl RequestHead {
    /// Whether the request is gRPC, by its content type.
    pub fn is_grpc(&self) -> bool {
        self.headers
            .get(http::header::CONTENT_TYPE)
            .is_some_and(|value| is_grpc_content_type(value.as_bytes()))
    }
}

/// `application/grpc`, alone or followed by `+…` or `;…`, as Envoy decides.
pub fn is_grpc_content_type(value: &[u8]) -> bool {
    value
        .strip_prefix(b"application/grpc")
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

// === impl Exchange ===

impl Exchange {
    /// A record that begins now.
    pub fn begin(protocol: Protocol, connection: Arc<Connection>, chain: Arc<str>, snapshot: u64) -> Self {
        Self {
            protocol,
            wall: crate::clock::wall(),
            start: crate::clock::now(),
            connection,
            client_address: None,
            request: None,
            chain,
            route: None,
            filter_state: FilterState::default(),
            reroute: false,
            cluster: None,
            upstream: None,
            upstream_protocol: None,
            attempts: 0,
            status: None,
            response_headers: Vec::new(),
            grpc_status: None,
            flags: ResponseFlags::NONE,
            details: None,
            termination_details: None,
            transport_failure: None,
            shadow: Vec::new(),
            metadata: DynamicMetadata::default(),
            trace: None,
            traceable: false,
            audited: false,
            counts: Counts::default(),
            moments: Moments::default(),
            snapshot,
        }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        crate::clock::now().saturating_duration_since(self.start)
    }

    /// Notes why it was answered so; the first reason stays.
    pub fn because(&mut self, flags: ResponseFlags, details: impl Into<Cow<'static, str>>) {
        self.flags.insert(flags);
        if self.details.is_none() {
            self.details = Some(details.into());
        }
    }

    /// Whether the request is gRPC.
    pub fn is_grpc(&self) -> bool {
        self.request.as_ref().is_some_and(RequestHead::is_grpc)
    }

    /// Time from the start to the last byte of the answer, or until now.
    pub fn duration(&self) -> Duration {
        self.moments.last_sent.unwrap_or_else(|| self.elapsed())
    }

    /// The address of the client's workload.
    pub fn source_ip(&self) -> IpAddr {
        self.connection.remote_address.ip()
    }
}

#[cfg(test)]
mod tests {
    use super::is_grpc_content_type;

    #[test]
    fn grpc_is_known_by_its_content_type() {
        for (value, grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=x", true),
            ("application/grpc-web", false),
            ("application/json", false),
            ("", false),
        ] {
            assert_eq!(is_grpc_content_type(value.as_bytes()), grpc, "{value}");
        }
    }
}
