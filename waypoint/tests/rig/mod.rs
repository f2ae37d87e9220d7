//! A mesh of one process: a client that opens tunnels, the proxy, and destinations behind HBONE, all on loopback addresses of their
//! own. Configuration is put together by hand, so that a test says just what it needs.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of the rig")]

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::{ClusterFacts, SpiffeId};
use cairn_filters::FilterChain;
use cairn_hbone::{Connect, Destination, Opened, Peer, Pool, PoolSettings, ServerSettings, TcpTls, TunnelStream, drain};
use cairn_identity::{ClientTerms, Identity, ServerTerms, generate::Authority};
use cairn_policy::{
    matcher::{PathMatch, PathMatcher},
    retry::{RetryOn, RetryPolicy},
    route::{Forward, Route, RouteAction, RouteMatch, RouteTable, Target as RouteTarget, VirtualHost},
};
use cairn_waypoint::{
    engine::{Engine, Parts},
    proxy::DataSettings,
    snapshot::{
        Chain, ChainKind, HttpChain, HttpSettings, Snapshot, Table, TcpChain, Terminate,
        matcher::{Input, Node, Ranges},
    },
    upstream::{
        Breakers, Cluster, ClusterSettings, ClusterState, Endpoint, EndpointSet, EndpointState, Health, Locality, LocalityGroup,
        Resource, Target, Thresholds,
    },
};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

static NEXT_NET: AtomicU8 = AtomicU8::new(1);

/// The mesh.
pub struct Rig {
    pub authority: Authority,
    pub engine: Engine,
    pub address: SocketAddr,
    net: [u8; 2],
    tasks: Vec<JoinHandle<()>>,
    client: Pool,
    version: std::cell::Cell<u64>,
    /// What the proxy told of finished requests and connections.
    pub told: Arc<parking_lot::Mutex<Vec<Told>>>,
}

/// What is told of a request or connection at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub status: Option<u16>,
    pub flags: String,
    pub details: String,
    pub termination: String,
    pub attempts: u32,
    pub received: u64,
    pub sent: u64,
    pub messages: (u64, u64),
    pub grpc_status: Option<u32>,
}

/// What a destination's application does with a stream.
pub type App = Arc<dyn Fn(TunnelStream, String) -> futures_util::future::BoxFuture<'static, ()> + Send + Sync>;

/// A pod behind HBONE.
pub struct Pod {
    pub address: SocketAddr,
    /// CONNECTs seen.
    pub connects: Arc<AtomicU32>,
    task: JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn id(account: &str) -> SpiffeId {
    SpiffeId::workload("cluster.local", "app", account).unwrap()
}

impl Rig {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With other settings.
    pub async fn start_with(change: impl FnOnce(&mut DataSettings)) -> Self {
        let authority = Authority::new("rig").unwrap();
        let identity = Identity::fixed(authority.issue(&id("waypoint")).unwrap());
        Self::start_as(authority, identity, change).await
    }

    /// With an identity of which the test knows more.
    pub async fn start_as(authority: Authority, identity: Identity, change: impl FnOnce(&mut DataSettings)) -> Self {
        // Tests of several processes may run at once: the process number tells their networks apart.
        let net = [
            (std::process::id() % 120 + 100) as u8,
            NEXT_NET.fetch_add(1, Ordering::Relaxed),
        ];
        let address = SocketAddr::from(([127, net[0], net[1], 1], 15008));
        let mut settings = DataSettings {
            listen: Some(address),
            ..DataSettings::default()
        };
        change(&mut settings);
        let told = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let book = told.clone();
        let observer: cairn_waypoint::proxy::Observer = Box::new(move |exchange| book.lock().push(Told::of(exchange)));
        let parts = Parts {
            identity,
            network: String::new(),
            version: "test".into(),
            settings,
            observer: Some(observer),
        };
        let engine = Engine::new(parts);
        let client = client(&authority, id("client"));
        Self {
            authority,
            engine,
            address,
            net,
            tasks: Vec::new(),
            client,
            version: std::cell::Cell::new(0),
            told,
        }
    }

    /// Waits until nothing is under way any more: no stream, no exchange, no request counted at an endpoint or a cluster.
    pub async fn settled(&self) {
        self.wait_for(|_| true).await;
    }

    /// As [`Self::settled`], but clients' connections may stay.
    pub async fn quiet(&self) {
        self.wait_for(|at| at > 0).await;
    }

    async fn wait_for(&self, counts: impl Fn(usize) -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            let left = self.under_way();
            if left.iter().enumerate().all(|(at, left)| !counts(at) || *left == 0) {
                return;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "still under way (streams, exchanges, endpoints, clusters): {left:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What is under way: streams, exchanges, requests by endpoints, requests by clusters.
    pub fn under_way(&self) -> [u64; 4] {
        let live = &self.engine.proxy.live;
        let mut left = [
            live.streams.load(Ordering::SeqCst),
            live.exchanges.load(Ordering::SeqCst),
            0,
            0,
        ];
        for (_, cluster) in self.engine.snapshot.load().clusters.iter() {
            for endpoint in cluster.state.endpoints.load().iter() {
                left[2] += u64::from(endpoint.state.active.load(Ordering::SeqCst));
            }
            left[3] += u64::from(cluster.state.usage.total(Resource::Request) + cluster.state.usage.total(Resource::Pending));
        }
        left
    }

    /// What was told last, once so many have been told of.
    pub async fn told(&self, count: usize) -> Told {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while self.told.lock().len() < count {
            assert!(
                tokio::time::Instant::now() < deadline,
                "only these were told of: {:?}",
                self.told.lock()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.told.lock().last().cloned().unwrap()
    }

    /// Publishes a configuration and starts listening.
    pub async fn serve(&self, config: Config) {
        self.publish(config);
        self.engine.listen().unwrap();
    }

    /// Publishes another configuration.
    pub fn publish(&self, config: Config) {
        self.version.set(self.version.get() + 1);
        let mut snapshot = Snapshot::empty(self.engine.workloads.clone());
        snapshot.version = self.version.get();
        snapshot.terminate = Some(Arc::new(Terminate {
            addresses: vec![self.address],
            tls: ServerTerms::hbone(config.trust_domains.iter().map(|domain| format!("spiffe://{domain}/"))),
            max_concurrent_streams: config.streams.unwrap_or(100),
            keepalive: None,
            rbac: config.guard.clone(),
            server: Default::default(),
            access_logs: config.tunnel_logs.clone(),
            refuse: None,
        }));
        snapshot.matcher = Some(Arc::new(config.matcher()));
        let mut chains = Table::default();
        for chain in config.chains {
            chains.insert(chain.name.clone(), Arc::new(chain));
        }
        let mut clusters = Table::default();
        for cluster in config.clusters.into_iter().chain([originate()]) {
            clusters.insert(cluster.name().clone(), Arc::new(cluster));
        }
        snapshot.chains = chains;
        snapshot.clusters = clusters;
        self.engine.snapshot.store(Arc::new(snapshot));
    }

    /// An address of this rig's network.
    pub fn ip(&self, last: u8) -> IpAddr {
        Ipv4Addr::new(127, self.net[0], self.net[1], last).into()
    }

    /// A pod whose application is given each accepted stream.
    pub async fn pod(&self, last: u8, app: App) -> Pod {
        self.pod_that(last, move |connect| {
            let app = app.clone();
            tokio::spawn(async move {
                let authority = connect.authority.to_string();
                if let Ok(stream) = connect.accept(HeaderMap::new()) {
                    app(stream, authority).await;
                }
            });
        })
        .await
    }

    /// A pod that does with a CONNECT what it likes.
    pub async fn pod_that(&self, last: u8, on_connect: impl Fn(Connect) + Clone + Send + Sync + 'static) -> Pod {
        let identity = Identity::fixed(self.authority.issue(&id("pod")).unwrap());
        pod_at(self.ip(last), identity, on_connect).await
    }

    /// Opens a stream to an authority as the usual client.
    pub async fn open(&self, authority: &str) -> Result<Opened, cairn_hbone::OpenError> {
        self.client
            .open(
                &Destination {
                    address: self.address,
                    trust: 0,
                },
                authority,
                HeaderMap::new(),
            )
            .await
    }

    /// A plain connection to the proxy.
    pub async fn dial(&self) -> tokio::net::TcpStream {
        tokio::net::TcpStream::connect(self.address).await.unwrap()
    }

    /// HTTP/2 in a tunnel connection that was opened by hand, as this client.
    pub async fn by_hand(&self, as_: SpiffeId) -> h2::client::SendRequest<Bytes> {
        let identity = Identity::fixed(self.authority.issue(&as_).unwrap());
        let terms = ClientTerms::hbone(["spiffe://cluster.local/"]);
        let connector = tokio_rustls::TlsConnector::from(identity.client_config(&terms).unwrap());
        let name = rustls::pki_types::ServerName::from(self.address.ip());
        let tls = connector.connect(name, self.dial().await).await.unwrap();
        let (sender, connection) = h2::client::handshake(tls).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    /// HTTP/2 in a stream of its own.
    pub async fn http2(&self, authority: &str) -> h2::client::SendRequest<Bytes> {
        let (sender, connection) = h2::client::handshake(self.open(authority).await.unwrap().stream)
            .await
            .unwrap();
        tokio::spawn(connection);
        sender
    }

    /// What comes back for raw bytes, until the end.
    pub async fn raw(&self, authority: &str, bytes: &[u8]) -> (String, Option<std::io::Error>) {
        let mut stream = self.open(authority).await.unwrap().stream;
        // A refusal may come before all was sent.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer))
            .await
            .unwrap();
        (String::from_utf8_lossy(&answer).into_owned(), ended.err())
    }

    /// An HTTP/1.1 client in a stream of its own.
    pub async fn http1(&self, authority: &str) -> hyper::client::conn::http1::SendRequest<Full<Bytes>> {
        let opened = self.open(authority).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(opened.stream))
            .await
            .unwrap();
        tokio::spawn(connection.with_upgrades());
        sender
    }
}

/// A pod at this address.
pub async fn pod_at(ip: IpAddr, identity: Identity, on_connect: impl Fn(Connect) + Clone + Send + Sync + 'static) -> Pod {
    let address = SocketAddr::new(ip, 8080);
    let listener = TcpListener::bind(SocketAddr::new(ip, 15008)).await.unwrap();
    let tls = identity
        .server_config(&ServerTerms::hbone(["spiffe://cluster.local/"]))
        .unwrap();
    let connects = Arc::new(AtomicU32::new(0));
    let seen = connects.clone();
    let task = tokio::spawn(async move {
        let (_trigger, watch) = drain::channel();
        loop {
            let (tcp, from) = listener.accept().await.unwrap();
            // Or windows are opened 40 ms late.
            tcp.set_nodelay(true).unwrap();
            let (tls, on_connect, seen, watch) = (tls.clone(), on_connect.clone(), seen.clone(), watch.clone());
            tokio::spawn(async move {
                let Ok(io) = TlsAcceptor::from(tls).accept(tcp).await else {
                    return;
                };
                let peer = Peer {
                    id: None,
                    address: from,
                    local_address: from,
                    local_id: None,
                };
                let on_connect = |connect: Connect| {
                    seen.fetch_add(1, Ordering::SeqCst);
                    on_connect(connect);
                };
                let _ = cairn_hbone::serve(io, Arc::new(peer), &ServerSettings::default(), watch, on_connect).await;
            });
        }
    });
    Pod { address, connects, task }
}

impl Told {
    fn of(exchange: &cairn_exchange::Exchange) -> Self {
        let counts = &exchange.counts;
        Self {
            status: exchange.status.map(|status| status.as_u16()),
            flags: exchange.flags.to_string(),
            details: exchange.details.as_deref().unwrap_or_default().to_owned(),
            termination: exchange.termination_details.as_deref().unwrap_or_default().to_owned(),
            attempts: exchange.attempts,
            received: counts.received,
            sent: counts.sent,
            messages: (counts.request_messages, counts.response_messages),
            grpc_status: exchange.grpc_status,
        }
    }
}

/// A pool that opens tunnels with this identity.
pub fn client(authority: &Authority, as_: SpiffeId) -> Pool {
    client_as(Identity::fixed(authority.issue(&as_).unwrap()), PoolSettings::default())
}

/// The same with other settings.
pub fn client_as(identity: Identity, settings: PoolSettings) -> Pool {
    let terms = ClientTerms::hbone(["spiffe://cluster.local/"]);
    let dial = TcpTls::new(
        move |_| identity.client_config(&terms).ok_or_else(|| "no certificate".to_owned()),
        |_, certificates| Ok(cairn_identity::peer_id(certificates).ok()),
    );
    Pool::new(settings, dial)
}

fn originate() -> Cluster {
    let settings = ClusterSettings {
        tunnel: Some(ClientTerms::hbone(["spiffe://cluster.local/"])),
        connect_timeout: Duration::from_secs(2),
        ..ClusterSettings::default()
    };
    cluster_with("connect_originate", Vec::new(), settings)
}

/// An application that speaks HTTP/1.1.
pub fn http_app<F, Fut>(answer: F) -> App
where
    F: Fn(Request<hyper::body::Incoming>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    Arc::new(move |stream, _| {
        let answer = answer.clone();
        Box::pin(async move {
            let service = service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .half_close(true)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
                .await;
        })
    })
}

/// An application that sends everything back, and ends when the client has ended.
pub fn mirror() -> App {
    Arc::new(|stream, _| {
        Box::pin(async move {
            let (mut read, mut write) = tokio::io::split(stream);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        })
    })
}

/// An application that answers with its name, the path and the body's length.
pub fn echo_app(name: &'static str) -> App {
    http_app(move |request| async move {
        let path = request.uri().path().to_owned();
        let body = request
            .into_body()
            .collect()
            .await
            .map(|body| body.to_bytes())
            .unwrap_or_default();
        Response::new(Full::from(format!("{name} {path} {}", body.len())))
    })
}

/// A configuration: chains by address, and clusters.
pub struct Config {
    /// Whose clients are believed.
    trust_domains: Vec<String>,
    places: Vec<(SocketAddr, Node)>,
    chains: Vec<Chain>,
    clusters: Vec<Cluster>,
    /// Streams that a client's tunnel may have, where it is not the usual number.
    streams: Option<u32>,
    /// Who may ask for tunnels.
    guard: cairn_policy::rbac::Filters,
    /// Where refused CONNECTs are written.
    tunnel_logs: cairn_telemetry::access_log::AccessLog,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            trust_domains: vec!["cluster.local".into()],
            places: Vec::new(),
            chains: Vec::new(),
            clusters: Vec::new(),
            streams: None,
            guard: Default::default(),
            tunnel_logs: Default::default(),
        }
    }
}

impl Config {
    /// Clients of these trust domains are believed.
    #[must_use]
    pub fn trusting(self, domains: &[&str]) -> Self {
        let trust_domains = domains.iter().map(|domain| (*domain).to_owned()).collect();
        Self { trust_domains, ..self }
    }

    /// An HTTP service with default routes to a cluster of its own.
    #[must_use]
    pub fn http(self, service: &str, endpoints: &[SocketAddr]) -> Self {
        self.http_with(service, endpoints, |_| {}, |_| {})
    }

    /// The same with other settings and routes.
    #[must_use]
    pub fn http_with(
        mut self,
        service: &str,
        endpoints: &[SocketAddr],
        chain: impl FnOnce(&mut HttpChain),
        cluster: impl FnOnce(&mut ClusterSettings),
    ) -> Self {
        let address: SocketAddr = service.parse().unwrap();
        let name: Arc<str> = format!("inbound-vip|{}|http|{}", address.port(), address.ip()).into();
        self.places.push((address, Node::Chain(name.clone())));
        let mut http = http_chain(&name);
        chain(&mut http);
        self.chains.push(Chain {
            name: name.clone(),
            service_port: address.port(),
            kind: ChainKind::Http(http),
            refuse: None,
        });
        let mut settings = cluster_settings();
        cluster(&mut settings);
        self.clusters.push(cluster_with(&name, endpoints.to_vec(), settings));
        self
    }

    /// A TCP service.
    #[must_use]
    pub fn tcp(self, service: &str, endpoints: &[SocketAddr]) -> Self {
        self.tcp_with(service, tunnels(endpoints), |_| {}, |_| {})
    }

    /// The same with other settings, and endpoints that are reached in other ways.
    #[must_use]
    pub fn tcp_with(
        mut self,
        service: &str,
        endpoints: Vec<Target>,
        change: impl FnOnce(&mut TcpChain),
        cluster: impl FnOnce(&mut ClusterSettings),
    ) -> Self {
        let address: SocketAddr = service.parse().unwrap();
        let name: Arc<str> = format!("inbound-vip|{}|tcp|{}", address.port(), address.ip()).into();
        self.places.push((address, Node::Chain(name.clone())));
        let mut chain = tcp_chain(&name, address.port());
        if let ChainKind::Tcp(tcp) = &mut chain.kind {
            change(tcp);
        }
        self.chains.push(chain);
        let mut settings = cluster_settings();
        cluster(&mut settings);
        self.clusters.push(cluster_of(&name, endpoints, settings));
        self
    }

    /// A service of which it is not known what is spoken.
    #[must_use]
    pub fn detect(self, service: &str, endpoints: &[SocketAddr]) -> Self {
        self.detect_with(service, endpoints, |_| {})
    }

    /// The same with other settings for bytes.
    #[must_use]
    pub fn detect_with(mut self, service: &str, endpoints: &[SocketAddr], change: impl FnOnce(&mut TcpChain)) -> Self {
        self = self
            .http(service, endpoints)
            .tcp_with(service, tunnels(endpoints), change, |_| {});
        let Some((_, tcp)) = self.places.pop() else { return self };
        let Some((address, http)) = self.places.pop() else {
            return self;
        };
        let map = [("'http/1.1'".into(), http.clone()), ("'h2c'".into(), http)]
            .into_iter()
            .collect();
        self.places.push((
            address,
            Node::Exact {
                input: Input::ApplicationProtocol,
                map,
                otherwise: Some(Box::new(tcp)),
            },
        ));
        self
    }

    /// A cluster beside those of the services.
    #[must_use]
    pub fn cluster(mut self, name: &str, endpoints: &[SocketAddr]) -> Self {
        self.clusters.push(cluster_with(name, endpoints.to_vec(), cluster_settings()));
        self
    }

    /// The same with other settings.
    #[must_use]
    pub fn cluster_with(mut self, name: &str, endpoints: &[SocketAddr], change: impl FnOnce(&mut ClusterSettings)) -> Self {
        let mut settings = cluster_settings();
        change(&mut settings);
        self.clusters.push(cluster_with(name, endpoints.to_vec(), settings));
        self
    }

    /// A client's tunnel may have so many streams.
    #[must_use]
    pub fn streams(self, most: u32) -> Self {
        Self {
            streams: Some(most),
            ..self
        }
    }

    /// Refused CONNECTs are written to these logs.
    #[must_use]
    pub fn tunnel_logs(self, tunnel_logs: cairn_telemetry::access_log::AccessLog) -> Self {
        Self { tunnel_logs, ..self }
    }

    /// Tunnels are for whom these filters let pass.
    #[must_use]
    pub fn guarded(self, guard: cairn_policy::rbac::Filters) -> Self {
        Self { guard, ..self }
    }

    /// The chain added last refuses.
    #[must_use]
    pub fn refusing(mut self, reason: &str) -> Self {
        if let Some(chain) = self.chains.last_mut() {
            chain.refuse = Some(cairn_waypoint::snapshot::Refusal::because(reason));
        }
        self
    }

    fn matcher(&self) -> Node {
        let mut ranges = Ranges::default();
        for (address, node) in &self.places {
            let map = [(address.port().to_string().into(), node.clone())].into_iter().collect();
            let by_port = Node::Exact {
                input: Input::DestinationPort,
                map,
                otherwise: None,
            };
            ranges.add([ipnet::IpNet::from(address.ip())], by_port);
        }
        Node::Ranges {
            input: Input::DestinationIp,
            ranges,
            otherwise: None,
        }
    }
}

fn cluster_settings() -> ClusterSettings {
    // No limits where nothing is said, as istiod sends it.
    let unlimited = Thresholds {
        max_connections: u32::MAX,
        max_pending_requests: u32::MAX,
        max_requests: u32::MAX,
        max_retries: u32::MAX,
        retry_budget: None,
    };
    ClusterSettings {
        breakers: Breakers {
            default: unlimited,
            ..Breakers::default()
        },
        panic_threshold: 0.0,
        connect_timeout: Duration::from_secs(2),
        ..ClusterSettings::default()
    }
}

/// istiod's default route (contract xds §4.2).
pub fn default_route(cluster: &str) -> Route {
    let retry = RetryPolicy {
        on: RetryOn::parse("connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes").0,
        retries: 2,
        avoid_previous_hosts: true,
        ..RetryPolicy::default()
    };
    let forward = Forward {
        retry: Some(retry),
        ..Forward::to(RouteTarget::Cluster(cluster.into()))
    };
    route("/", forward)
}

/// A route by prefix.
pub fn route(prefix: &str, forward: Forward) -> Route {
    let mut route = Route::new(
        RouteMatch::path(PathMatcher::new(PathMatch::Prefix(prefix.into()), false)),
        RouteAction::Forward(Box::new(forward)),
    );
    route.name = Some("default".into());
    route
}

/// A table of these routes.
pub fn routes(routes: Vec<Route>) -> RouteTable {
    let host = VirtualHost::any("inbound|http|80", routes.into_iter().map(Arc::new).collect());
    RouteTable::new("test", vec![Arc::new(host)]).unwrap()
}

fn http_chain(cluster: &str) -> HttpChain {
    HttpChain {
        settings: HttpSettings {
            websocket: true,
            stream_idle_timeout: None,
            ..HttpSettings::default()
        },
        filters: FilterChain::default(),
        routes: routes(vec![default_route(cluster)]),
        access_logs: Default::default(),
        tracer: None,
        metrics: Box::new([None]),
        shared: None,
    }
}

fn tcp_chain(name: &Arc<str>, port: u16) -> Chain {
    let tcp = TcpChain {
        targets: vec![(name.clone(), 1)],
        total_weight: 1,
        idle_timeout: None,
        max_duration: None,
        hash_source_ip: false,
        access_logs: Default::default(),
        metrics: Some(Duration::from_secs(5)),
        metric_rules: Box::new([None]),
        limits: Vec::new(),
        rbac: Default::default(),
        authorizers: Vec::new(),
        server_name: Default::default(),
    };
    Chain {
        name: name.clone(),
        service_port: port,
        kind: ChainKind::Tcp(tcp),
        refuse: None,
    }
}

/// Endpoints behind HBONE.
pub fn tunnels(endpoints: &[SocketAddr]) -> Vec<Target> {
    endpoints
        .iter()
        .map(|address| Target::Tunnel {
            address: *address,
            gateway: None,
        })
        .collect()
}

fn cluster_with(name: &str, endpoints: Vec<SocketAddr>, settings: ClusterSettings) -> Cluster {
    cluster_of(name, tunnels(&endpoints), settings)
}

fn cluster_of(name: &str, targets: Vec<Target>, settings: ClusterSettings) -> Cluster {
    let locality = Arc::new(Locality::default());
    let endpoints = targets
        .into_iter()
        .map(|target| {
            Arc::new(Endpoint {
                display: format!("{target:?}").into(),
                target,
                health: Health::Healthy,
                weight: 1,
                locality: locality.clone(),
                transport: None,
                hostname: None,
                hash_key: None,
                labels: Default::default(),
                healthy_since: cairn_exchange::clock::now(),
                state: Arc::new(EndpointState::default()),
            })
        })
        .collect();
    let state = ClusterState::default();
    let group = LocalityGroup {
        locality,
        weight: 1,
        endpoints,
    };
    let set = EndpointSet::new(vec![(0, group)], settings.arrangement(None));
    state.endpoints.store(Arc::new(set));
    let facts = ClusterFacts {
        name: name.into(),
        alt_stat_name: None,
        service: None,
    };
    Cluster {
        facts: Arc::new(facts),
        settings,
        transport_hash: 0,
        state: Arc::new(state),
    }
}

/// Sends a request and reads all of the answer.
pub async fn fetch(
    sender: &mut hyper::client::conn::http1::SendRequest<Full<Bytes>>,
    path: &str,
) -> (StatusCode, HeaderMap, Bytes) {
    send(
        sender,
        Request::get(path).header("host", "web").body(Full::default()).unwrap(),
    )
    .await
}

/// Sends a request and reads all of the answer.
pub async fn send(
    sender: &mut hyper::client::conn::http1::SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
) -> (StatusCode, HeaderMap, Bytes) {
    sender.ready().await.unwrap();
    let answer = sender.send_request(request).await.unwrap();
    let (parts, body) = answer.into_parts();
    (parts.status, parts.headers, body.collect().await.unwrap().to_bytes())
}
