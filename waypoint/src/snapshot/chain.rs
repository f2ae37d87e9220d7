//! One filter chain of `main_internal`: what is done with the connections of one service port.

use std::{any::Any, sync::Arc, time::Duration};

use cairn_filters::{FilterChain, ext_authz::network::OfConnections};
use cairn_policy::{headers::Sampling, rate_limit::TokenBucket, rbac, route::RouteTable};
use cairn_telemetry::{access_log::AccessLog, istio::Rules, trace::Tracer};

/// A compiled chain.
#[derive(Debug)]
pub struct Chain {
    /// `inbound-vip|80|http|web.app.svc.cluster.local`, `direct-tcp`, …
    pub name: Arc<str>,
    /// Port of the service by the chain's name; 0 for `direct-*`.
    pub service_port: u16,
    /// What is spoken and done.
    pub kind: ChainKind,
    /// Why everything is refused, when the chain has something that could decide and that we cannot do.
    pub refuse: Option<Refusal>,
}

/// HTTP or bytes. There is one for each chain, behind its `Arc`: a box inside would only be one more step to every request.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)]
pub enum ChainKind {
    /// HTTP.
    Http(HttpChain),
    /// Bytes.
    Tcp(TcpChain),
    /// Nothing of it could be compiled; [`Chain::refuse`] says why.
    Refused {
        /// Whether istiod meant it for HTTP.
        http: bool,
    },
}

/// Why a chain refuses: 403 for HTTP, an end of the connection for TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What is not supported and where it stands, in words.
    pub reason: Arc<str>,
}

/// A chain that speaks HTTP.
#[derive(Debug)]
pub struct HttpChain {
    /// Connection settings.
    pub settings: HttpSettings,
    /// The filters before the router.
    pub filters: FilterChain,
    /// The routes.
    pub routes: RouteTable,
    /// Access logs.
    pub access_logs: AccessLog,
    /// Traces, where the chain has any.
    pub tracer: Option<Box<Tracer>>,
    /// What each filter `istio.stats` changes of Istio's metrics; without one none are recorded.
    pub metrics: Box<[Option<Arc<Rules>>]>,
    /// Live things that filters of this chain share over all configurations with the same content.
    pub shared: Option<Arc<dyn Any + Send + Sync>>,
}

/// What a client may do with header names that contain an underscore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Underscores {
    /// Pass.
    #[default]
    Allow,
    /// Answer 400.
    Reject,
    /// Remove the header.
    Drop,
}

/// Settings of an HTTP connection manager (contract xds §3.1).
#[derive(Clone, Debug)]
pub struct HttpSettings {
    /// What is done to paths.
    pub path: cairn_policy::path::PathNormalization,
    /// What is done to the headers of requests that arrive.
    pub incoming: cairn_policy::headers::incoming::Incoming,
    /// What becomes of the `server` header of answers.
    pub server: cairn_policy::headers::outgoing::ServerHeader,
    /// What request ids have to do with tracing, and which requests are traced, where any are.
    pub sampling: Sampling,
    /// Whether `Upgrade: websocket` is served.
    pub websocket: bool,
    /// HTTP/2 clients may ask for upgrades by extended CONNECT.
    pub http2_extended_connect: bool,
    /// Other upgrade types that are served, in lower case.
    pub upgrades: Vec<Box<str>>,
    /// Whether HTTP/1.0 is served.
    pub accept_http10: bool,
    /// Whether names of header fields keep their spelling.
    pub preserve_header_case: bool,
    /// Whether 100 Continue of the backend is passed on.
    pub proxy_100_continue: bool,
    /// Whether Envoy's own headers are left out (`x-envoy-*`).
    pub suppress_envoy_headers: bool,
    /// Underscores in header names.
    pub underscores: Underscores,
    /// Largest head of a request in bytes.
    pub max_request_head: usize,
    /// Most header fields in a request.
    pub max_request_headers: usize,
    /// An exchange without progress is ended after this.
    pub stream_idle_timeout: Option<Duration>,
    /// Time for the whole request to arrive.
    pub request_timeout: Option<Duration>,
    /// Time for the head to arrive.
    pub request_headers_timeout: Option<Duration>,
    /// A connection without requests is closed after this.
    pub idle_timeout: Option<Duration>,
    /// A connection is closed after this.
    pub max_connection_duration: Option<Duration>,
    /// An exchange is ended after this.
    pub max_stream_duration: Option<Duration>,
    /// HTTP/2: streams at once.
    pub http2_max_concurrent_streams: Option<u32>,
    /// HTTP/2: window of a stream.
    pub http2_stream_window: Option<u32>,
    /// HTTP/2: window of the connection.
    pub http2_connection_window: Option<u32>,
}

/// What the server name that a client asks for in TLS is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerNameUse {
    /// Policies look at it.
    pub judged: bool,
    /// It is where the bytes go, at this port.
    pub forward_to: Option<u16>,
}

/// A chain that passes bytes.
#[derive(Debug)]
pub struct TcpChain {
    /// Where to: cluster and weight; one entry when there is no choice.
    pub targets: Vec<(Arc<str>, u32)>,
    /// Sum of the weights.
    pub total_weight: u64,
    /// A connection without bytes in either direction is ended after this.
    pub idle_timeout: Option<Duration>,
    /// A connection is ended after this.
    pub max_duration: Option<Duration>,
    /// Whether the client's address chooses the endpoint.
    pub hash_source_ip: bool,
    /// Access logs.
    pub access_logs: AccessLog,
    /// Whether Istio's metrics are recorded, and how often while the connection lives.
    pub metrics: Option<Duration>,
    /// What each filter changes of them.
    pub metric_rules: Box<[Option<Arc<Rules>>]>,
    /// Who may connect.
    pub rbac: rbac::Filters,
    /// Authorizers that are asked whether they may, in the order of the chain's filters.
    pub authorizers: Vec<Arc<OfConnections>>,
    /// How many may connect in what time; a token of each.
    pub limits: Vec<Arc<TokenBucket>>,
    /// What the client's server name is used for.
    pub server_name: ServerNameUse,
}

// === impl Chain ===

impl Chain {
    /// Whether anything depends on the server name that a client asks for in TLS.
    pub fn reads_server_name(&self) -> bool {
        match &self.kind {
            ChainKind::Tcp(tcp) => self.refuse.is_none() && tcp.server_name != ServerNameUse::default(),
            ChainKind::Http(_) | ChainKind::Refused { .. } => false,
        }
    }
}

// === impl Refusal ===

impl Refusal {
    /// Refuses for this reason.
    pub fn because(reason: impl Into<Arc<str>>) -> Self {
        Self { reason: reason.into() }
    }
}

// === impl TcpChain ===

impl TcpChain {
    /// The cluster that a number between 0 and `u64::MAX` chooses.
    pub fn choose(&self, random: u64) -> Option<&Arc<str>> {
        if let [(only, _)] = self.targets.as_slice() {
            return Some(only);
        }
        let mut left = random.checked_rem(self.total_weight)?;
        for (cluster, weight) in &self.targets {
            match left.checked_sub(u64::from(*weight)) {
                None => return Some(cluster),
                Some(rest) => left = rest,
            }
        }
        None
    }
}

// === impl HttpSettings ===

impl Default for HttpSettings {
    /// Envoy's defaults.
    fn default() -> Self {
        Self {
            path: Default::default(),
            incoming: Default::default(),
            server: Default::default(),
            sampling: Sampling::default(),
            websocket: false,
            http2_extended_connect: false,
            upgrades: Vec::new(),
            accept_http10: false,
            preserve_header_case: false,
            proxy_100_continue: false,
            suppress_envoy_headers: false,
            underscores: Underscores::Allow,
            max_request_head: 60 * 1024,
            max_request_headers: 100,
            stream_idle_timeout: Some(Duration::from_secs(300)),
            request_timeout: None,
            request_headers_timeout: None,
            idle_timeout: Some(Duration::from_secs(3600)),
            max_connection_duration: None,
            max_stream_duration: None,
            http2_max_concurrent_streams: None,
            http2_stream_window: None,
            http2_connection_window: None,
        }
    }
}
