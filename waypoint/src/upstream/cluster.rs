//! Clusters: settings that come and go with the configuration, and the state by name that stays.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use cairn_exchange::ClusterFacts;
use cairn_policy::{
    balance::{DEFAULT_OVERPROVISIONING, RingSize, SlowStart, SubsetRules},
    outlier::OutlierSettings,
    route::{HashPolicy, Mirror},
};
use http::{HeaderName, HeaderValue};
use parking_lot::Mutex;
use tokio::{sync::Notify, time::timeout};

use super::{
    Arrangement, Breakers, EndpointSet, NamesByHost, TransportTerms, Usage,
    dns::{Cadence, Family, HostCache, HostCacheTerms},
};

/// How the endpoints of a cluster are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// Named in the cluster.
    Static,
    /// By EDS under this name.
    Eds(Arc<str>),
    /// Where the client wanted to go.
    OriginalDestination(OriginalDestination),
    /// By DNS; every address is an endpoint.
    StrictDns(DnsTerms),
    /// By DNS; the first address is the endpoint.
    LogicalDns(DnsTerms),
    /// By the host of each request.
    DynamicForwardProxy(HostCacheTerms),
}

/// How the names of a cluster are looked up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsTerms {
    /// Which addresses are wanted.
    pub family: Family,
    /// How often they are asked for.
    pub cadence: Cadence,
}

/// Settings of an original-destination cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OriginalDestination {
    /// The port to use instead.
    pub port_override: Option<u16>,
}

/// How one of several endpoints is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LbPolicy {
    /// In turn, by weight.
    RoundRobin {
        /// How new endpoints are warmed up.
        slow_start: Option<SlowStart>,
    },
    /// The less busy of some.
    LeastRequest(LeastRequest),
    /// At random, whatever the weights.
    Random,
    /// On a ring, by hash.
    RingHash(RingSize),
    /// By Maglev's table.
    Maglev {
        /// Size of the table, a prime.
        table_size: u64,
    },
    /// The discovery decides.
    ClusterProvided,
}

/// Least request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LeastRequest {
    /// How many are looked at; `None` is all of them. Where weights differ, or endpoints warm up, all count by weight instead.
    pub choices: Option<u32>,
    /// How much requests under way lower a weight: `weight / (requests + 1) ^ bias`.
    pub bias: f64,
    /// How new endpoints are warmed up.
    pub slow_start: Option<SlowStart>,
}

/// What consistent hashing knows an endpoint by, and how much of the load it may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hashing {
    /// By host name instead of address.
    pub by_hostname: bool,
    /// Percent of the average load that an endpoint may have; 0 is no bound.
    pub balance_factor: u32,
}

/// What HTTP is spoken to endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// What the client speaks.
    Downstream,
}

/// Everything about a cluster but its endpoints.
#[derive(Clone, Debug)]
pub struct ClusterSettings {
    /// How endpoints are found.
    pub discovery: Discovery,
    /// How one is chosen.
    pub lb: LbPolicy,
    /// Parts of requests that a hash is made from, instead of those that the route names.
    pub hash_policies: Vec<HashPolicy>,
    /// Who gets copies of its requests, before those of routes.
    pub mirrors: Vec<Mirror>,
    /// How endpoints are put together in subsets, of which requests ask for one.
    pub subsets: Option<Arc<SubsetRules>>,
    /// Consistent hashing.
    pub hashing: Hashing,
    /// Whether localities share by weight.
    pub locality_weighted: bool,
    /// Share of available endpoints in percent below which all are used.
    pub panic_threshold: f64,
    /// Below that share requests are refused instead.
    pub fail_on_panic: bool,
    /// Which endpoints are taken out for a while because they fail.
    pub outlier: Option<OutlierSettings>,
    /// Time for a connection.
    pub connect_timeout: Duration,
    /// HTTP version.
    pub protocol: UpstreamProtocol,
    /// What is put inside.
    pub transport: TransportTerms,
    /// What of a request's host goes into TLS.
    pub names_by_host: NamesByHost,
    /// An idle connection is closed after this.
    pub idle_timeout: Option<Duration>,
    /// A connection is closed after this.
    pub max_connection_duration: Option<Duration>,
    /// A connection is closed after this many requests.
    pub max_requests_per_connection: Option<u32>,
    /// HTTP/2: streams at once on a connection.
    pub http2_max_concurrent_streams: Option<u32>,
    /// Limits.
    pub breakers: Breakers,
    /// For tunnel clusters (`connect_originate`): whom we believe at the other end.
    pub tunnel: Option<cairn_identity::ClientTerms>,
    /// Headers that they are opened with.
    pub tunnel_headers: Vec<(HeaderName, HeaderValue)>,
    /// Probes of TCP connections; `None` leaves them to the system.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Whether names of header fields keep their spelling on HTTP/1.1.
    pub preserve_header_case: bool,
    /// Endpoints that have a host name instead of an address (discovery by DNS).
    pub names: Vec<NamedEndpoint>,
}

/// Probes of idle TCP connections; what is `None` is the system's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TcpKeepalive {
    /// Unanswered probes after which the connection is dead.
    pub probes: Option<u32>,
    /// Silence before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
}

/// An endpoint whose address is to be found by DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedEndpoint {
    /// Host name.
    pub host: Arc<str>,
    /// Port.
    pub port: u16,
    /// Share of the requests, at least 1.
    pub weight: u32,
    /// Where it is.
    pub locality: Arc<super::Locality>,
    /// Priority, 0 first.
    pub priority: usize,
}

/// What stays while a cluster of this name exists.
#[derive(Debug, Default)]
pub struct ClusterState {
    /// Endpoints now; swapped on their own, by whoever holds `writing`.
    pub endpoints: ArcSwap<EndpointSet>,
    /// Endpoints were swapped that DNS has found.
    pub found: Notify,
    /// Hosts that requests have named.
    pub hosts: HostCache,
    /// What is in use.
    pub usage: Usage,
    /// Held while a new set of endpoints is made from the one before.
    pub writing: Mutex<()>,
}

/// A cluster of a snapshot.
#[derive(Debug)]
pub struct Cluster {
    /// Name and service.
    pub facts: Arc<ClusterFacts>,
    /// Settings.
    pub settings: ClusterSettings,
    /// Fingerprint of the settings that connections depend on: connections made under others are not used.
    pub transport_hash: u64,
    /// What stays.
    pub state: Arc<ClusterState>,
}

// === impl Cluster ===

impl Cluster {
    /// What is put onto connections to one of its endpoints.
    pub fn transport_to<'a>(&'a self, endpoint: &'a super::Endpoint) -> &'a TransportTerms {
        endpoint.transport.as_deref().unwrap_or(&self.settings.transport)
    }

    /// Waits for the first answer of DNS, at most for the time of a connection. Clusters whose endpoints do not come from DNS never
    /// wait.
    pub async fn resolved(&self) {
        if !self.waits_for_names() {
            return;
        }
        let wait = async {
            loop {
                let found = self.state.found.notified();
                tokio::pin!(found);
                found.as_mut().enable();
                if self.is_resolved() {
                    return;
                }
                found.await;
            }
        };
        // Without an answer the request is told that there is no endpoint.
        let _ = timeout(self.settings.connect_timeout, wait).await;
    }

    /// Whether DNS has not answered yet.
    pub fn waits_for_names(&self) -> bool {
        matches!(self.settings.discovery, Discovery::StrictDns(_) | Discovery::LogicalDns(_)) && !self.is_resolved()
    }

    fn is_resolved(&self) -> bool {
        let endpoints = self.state.endpoints.load();
        endpoints.known || endpoints.iter().next().is_some()
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.facts.name
    }
}

// === impl ClusterState ===

impl ClusterState {
    /// Makes the set of endpoints anew, after some were taken out or back.
    pub fn reassess(&self) {
        let _writing = self.writing.lock();
        let set = self.endpoints.load_full();
        self.endpoints.store(Arc::new(set.reassessed()));
    }
}

// === impl LbPolicy ===

impl LbPolicy {
    /// Whether a hash of the request decides.
    pub fn is_hashed(&self) -> bool {
        matches!(self, Self::RingHash(_) | Self::Maglev { .. })
    }

    /// How new endpoints are warmed up.
    pub fn slow_start(&self) -> Option<&SlowStart> {
        match self {
            Self::RoundRobin { slow_start } | Self::LeastRequest(LeastRequest { slow_start, .. }) => slow_start.as_ref(),
            Self::Random | Self::RingHash(_) | Self::Maglev { .. } | Self::ClusterProvided => None,
        }
    }
}

impl Default for LeastRequest {
    fn default() -> Self {
        Self {
            choices: Some(2),
            bias: 1.0,
            slow_start: None,
        }
    }
}

// === impl ClusterSettings ===

impl ClusterSettings {
    /// How sets of endpoints are prepared; `overprovisioning` is what the assignment says of it.
    pub fn arrangement(&self, overprovisioning: Option<u32>) -> Arrangement {
        Arrangement {
            lb: self.lb,
            hashing: self.hashing,
            locality_weighted: self.locality_weighted,
            // Envoy rounds to whole percents.
            panic_threshold: self.panic_threshold.round() as u32,
            overprovisioning: overprovisioning.unwrap_or(DEFAULT_OVERPROVISIONING),
            subsets: self.subsets.clone(),
        }
    }
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self {
            discovery: Discovery::Static,
            lb: LbPolicy::LeastRequest(LeastRequest::default()),
            hash_policies: Vec::new(),
            mirrors: Vec::new(),
            subsets: None,
            hashing: Hashing::default(),
            locality_weighted: false,
            panic_threshold: 50.0,
            fail_on_panic: false,
            outlier: None,
            connect_timeout: Duration::from_secs(5),
            protocol: UpstreamProtocol::Http1,
            transport: TransportTerms::Raw,
            names_by_host: NamesByHost::default(),
            idle_timeout: Some(Duration::from_secs(3600)),
            max_connection_duration: None,
            max_requests_per_connection: None,
            http2_max_concurrent_streams: None,
            breakers: Breakers::default(),
            tunnel: None,
            tunnel_headers: Vec::new(),
            tcp_keepalive: None,
            preserve_header_case: false,
            names: Vec::new(),
        }
    }
}
