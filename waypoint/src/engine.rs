//! The proxy put together: configuration in, connections served, an orderly end.
//!
//! `cairn run`, `cairn proxy` and `cairn demo` differ in where configuration and certificates come from, and in nothing else. Two
//! runtimes: one for connections, one for everything else (configuration, certificates, metrics, log writers), so that work of the
//! control plane never stands in a request's way (architecture §4, rule 8).

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use cairn_hbone::drain;
use cairn_identity::{Identity, Secrets};
use cairn_telemetry::{IstioStats, LogFiles, Registry};
use tokio::{runtime::Runtime, time::sleep};

use crate::{
    config::compiler::Sources,
    export::{Exports, Post},
    proxy::{DataSettings, Live, Observer, Proxy},
    recorder::Recorder,
    serve::{
        listener,
        open::{self, OpenConnections},
        trusted::{self, TrustedTunnels},
    },
    snapshot::Snapshot,
    upstream::{Connector, Discovery, Outliers, dns::Names},
    workloads::Workloads,
};

/// How often idle connections to endpoints are looked over.
const SWEEP: Duration = Duration::from_secs(10);
/// Threads for everything that is not a connection.
const CONTROL_THREADS: usize = 2;

/// What an engine is made of.
pub struct Parts {
    /// Who we are.
    pub identity: Identity,
    /// The network that we are in.
    pub network: String,
    /// The version that `istio_build` tells.
    pub version: String,
    /// Settings of the data path.
    pub settings: DataSettings,
    /// Told of each finished request and connection.
    pub observer: Option<Observer>,
}

/// A proxy that can be given configuration and told to listen.
pub struct Engine {
    /// What connections share.
    pub proxy: Arc<Proxy>,
    /// Where new configurations are published.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Who is who in the mesh.
    pub workloads: Arc<Workloads>,
    /// What connections take from elsewhere than a snapshot; the compiler feeds it.
    pub sources: Sources,
    /// Metrics.
    pub registry: Registry,
    /// Log files.
    pub logs: LogFiles,
    /// Ends connections: GOAWAY, and no more requests on idle ones.
    pub connections: drain::Trigger,
    /// Ends listening.
    pub listening: drain::Trigger,
    /// The last exchanges, where they are kept.
    pub recorder: Option<Arc<Recorder>>,
    /// Carries traces and logs to collectors.
    post: Arc<Post>,
    /// Whether idle connections are looked over.
    sweeping: AtomicBool,
}

/// The two runtimes.
pub struct Runtimes {
    /// For connections.
    pub data: Runtime,
    /// For everything else.
    pub control: Runtime,
}

// === impl Runtimes ===

impl Runtimes {
    /// Runtimes with this many workers for connections; `None` is one a core.
    pub fn new(workers: Option<usize>) -> io::Result<Self> {
        let mut data = tokio::runtime::Builder::new_multi_thread();
        if let Some(workers) = workers {
            data.worker_threads(workers.max(1));
        }
        let data = data.thread_name("connections").enable_all().build()?;
        let control = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(CONTROL_THREADS)
            .thread_name("control")
            .enable_all()
            .build()?;
        Ok(Self { data, control })
    }
}

// === impl Engine ===

impl Engine {
    /// An engine without configuration. Log writers and watchers of files run on the calling runtime.
    pub fn new(parts: Parts) -> Self {
        let registry = Registry::default();
        let logs = LogFiles::new(tokio::runtime::Handle::current(), &registry);
        let workloads = Arc::new(Workloads::new(parts.network));
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
        let istio = IstioStats::new(&registry, cairn_telemetry::istio::Settings::new(parts.version));
        let (connections, connections_watch) = drain::channel();
        let (listening, _) = drain::channel();
        let post = Arc::new(Post::default());
        let sources = Sources {
            secrets: Secrets::watched_on(&tokio::runtime::Handle::current()),
            names: Names::on(tokio::runtime::Handle::current()),
            exports: Exports::new(tokio::runtime::Handle::current(), &registry, post.clone()),
            node: parts.settings.node.clone(),
        };
        let pool = cairn_hbone::PoolSettings {
            windows: parts.settings.tunnel_server.windows.clone(),
            ..cairn_hbone::PoolSettings::default()
        };
        let (outliers, signals) = Outliers::new();
        let outlier_log = parts.settings.outlier_log.as_ref().and_then(|path| {
            let opened = logs.open(path);
            opened
                .inspect_err(|error| tracing::warn!(%error, "ejections are not logged"))
                .ok()
        });
        let recorder = Recorder::new(parts.settings.recorder, parts.settings.workers()).map(Arc::new);
        let proxy = Arc::new(Proxy {
            snapshot: snapshot.clone(),
            connector: Connector::new(parts.identity.clone(), pool, &sources),
            outliers,
            identity: parts.identity,
            istio,
            observer: observer(parts.observer, recorder.clone()),
            drain: connections_watch,
            settings: parts.settings,
            connections: AtomicU64::new(1),
            open: OpenConnections::default(),
            trusted: TrustedTunnels::default(),
            live: Live::default(),
            mirrors: Default::default(),
        });
        post.serve(Arc::downgrade(&proxy));
        // On the runtime for everything that is not a connection.
        tokio::spawn(IstioStats::rotate(Arc::downgrade(&proxy.istio)));
        tokio::spawn(open::watch(Arc::downgrade(&proxy)));
        tokio::spawn(trusted::watch(Arc::downgrade(&proxy)));
        tokio::spawn(signals.supervise(Arc::downgrade(&proxy), outlier_log));
        Self {
            proxy,
            snapshot,
            workloads,
            sources,
            registry,
            logs,
            connections,
            listening,
            recorder,
            post,
            sweeping: AtomicBool::new(false),
        }
    }

    /// Addresses to listen on, by settings or by what istiod said.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        if let Some(address) = self.proxy.settings.listen {
            return vec![address];
        }
        self.snapshot
            .load()
            .terminate
            .as_ref()
            .map(|terminate| terminate.addresses.clone())
            .unwrap_or_default()
    }

    /// Opens the listening sockets and accepts tunnels on the calling runtime. Call it when the configuration is complete: before that
    /// no CONNECT is accepted (architecture §4, rule 11).
    pub fn listen(&self) -> io::Result<Vec<SocketAddr>> {
        self.addresses().into_iter().map(|address| self.listen_on(address)).collect()
    }

    /// Opens one listening socket, as [`Engine::listen`]; for addresses that istiod names later.
    pub fn listen_on(&self, address: SocketAddr) -> io::Result<SocketAddr> {
        let socket = listener::bind(address).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot listen for tunnels on {address}: {error}; is another proxy running there?"),
            )
        })?;
        let local = socket.local_addr()?;
        self.post.connect_here();
        tokio::spawn(listener::accept(self.proxy.clone(), socket, self.listening.watch()));
        if !self.sweeping.swap(true, Ordering::Relaxed) {
            tokio::spawn(sweep(self.proxy.clone()));
        }
        Ok(local)
    }

    /// Whether anything is under way.
    pub fn is_idle(&self) -> bool {
        use std::sync::atomic::Ordering::Relaxed;
        let live = &self.proxy.live;
        live.streams.load(Relaxed) == 0 && live.exchanges.load(Relaxed) == 0
    }
}

/// Whoever wants to be told of finished exchanges.
fn observer(given: Option<Observer>, recorder: Option<Arc<Recorder>>) -> Option<Observer> {
    match (given, recorder) {
        (None, None) => None,
        (Some(given), None) => Some(given),
        (None, Some(recorder)) => Some(Box::new(move |exchange| recorder.record(exchange))),
        (Some(given), Some(recorder)) => Some(Box::new(move |exchange| {
            recorder.record(exchange);
            given(exchange);
        })),
    }
}

/// Closes connections to endpoints that were idle for too long.
async fn sweep(proxy: Arc<Proxy>) {
    loop {
        sleep(SWEEP).await;
        let snapshot = proxy.snapshot.load_full();
        for (_, cluster) in snapshot.clusters.iter() {
            if let Discovery::DynamicForwardProxy(terms) = &cluster.settings.discovery {
                cluster.state.hosts.sweep(terms);
                for endpoint in cluster.state.hosts.endpoints() {
                    endpoint.state.connections.sweep(&cluster.settings);
                }
            }
            for endpoint in cluster.state.endpoints.load().iter() {
                endpoint.state.connections.sweep(&cluster.settings);
            }
        }
    }
}
