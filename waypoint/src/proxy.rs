//! What all connections of the proxy share.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use cairn_hbone::drain;
use cairn_identity::Identity;
use cairn_telemetry::{IstioStats, trace::NodeFacts};

use crate::{
    recorder::RecorderSettings,
    serve::{
        DenyDetail, Mirrors,
        open::{self, OnChange, OpenConnections},
        trusted::TrustedTunnels,
    },
    snapshot::Snapshot,
    upstream::{Connector, Outliers},
};

/// How long a client may be silent on a port of unknown protocol before bytes are passed without knowing (architecture §6).
pub const DETECT_TIMEOUT: Duration = Duration::from_millis(50);

/// Settings of the data path that are the operator's and not istiod's.
#[derive(Clone, Debug)]
pub struct DataSettings {
    /// Listen here instead of where istiod says; for several proxies on one machine.
    pub listen: Option<SocketAddr>,
    /// How long a client may be silent on a port of unknown protocol.
    pub detect_timeout: Duration,
    /// How tunnels are accepted.
    pub tunnel_server: cairn_hbone::ServerSettings,
    /// What becomes of open connections when the policy of their service changes.
    pub open_connections: OnChange,
    /// How long what is open may go on whose service is gone.
    pub service_drain: Duration,
    /// Least request goes by how long endpoints take, beside how many requests they have.
    pub peak_ewma: bool,
    /// Where it is logged which endpoints are taken out and back.
    pub outlier_log: Option<std::path::PathBuf>,
    /// Who the proxy is to services that its filters ask, and to collectors: the cluster is `waypoint.app`.
    pub node: NodeFacts,
    /// How many of the last exchanges are kept.
    pub recorder: RecorderSettings,
    /// Whom denials are told in detail.
    pub deny_detail: DenyDetail,
    /// Threads for connections; `None` is one a core.
    pub workers: Option<usize>,
}

/// Told of each finished request and connection.
pub type Observer = Box<dyn Fn(&cairn_exchange::Exchange) + Send + Sync>;

/// What all connections share.
pub struct Proxy {
    /// The newest configuration.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Opens streams to endpoints.
    pub connector: Connector,
    /// Takes out endpoints that fail.
    pub outliers: Outliers,
    /// Who we are.
    pub identity: Identity,
    /// Istio's metrics.
    pub istio: Arc<IstioStats>,
    /// Told of every finished request and connection: the demo's lines, the recorder of the last exchanges.
    pub observer: Option<Observer>,
    /// Tells connections to end.
    pub drain: drain::Watch,
    /// Settings.
    pub settings: DataSettings,
    /// Numbers of inner connections.
    pub connections: AtomicU64,
    /// What is open for long, and may be denied one day.
    pub open: OpenConnections,
    /// Tunnels, whose peers may be believed no more one day.
    pub trusted: TrustedTunnels,
    /// Live counts for operators.
    pub live: Live,
    /// Copies of requests.
    pub mirrors: Mirrors,
}

/// Things under way now.
#[derive(Debug, Default)]
pub struct Live {
    /// Tunnel connections from clients.
    pub tunnels: AtomicU64,
    /// Streams in them.
    pub streams: AtomicU64,
    /// Requests and TCP connections.
    pub exchanges: AtomicU64,
    /// CONNECTs that were refused.
    pub refused: AtomicU64,
    /// TLS handshakes that failed.
    pub handshakes_failed: AtomicU64,
}

/// Counts one thing under way while it lives.
pub struct Under<'a>(&'a AtomicU64);

// === impl Live ===

/// Counts one more until the returned guard is dropped.
pub fn under(counter: &AtomicU64) -> Under<'_> {
    counter.fetch_add(1, Ordering::Relaxed);
    Under(counter)
}

impl Drop for Under<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl DataSettings ===

impl Default for DataSettings {
    fn default() -> Self {
        Self {
            listen: None,
            detect_timeout: DETECT_TIMEOUT,
            tunnel_server: cairn_hbone::ServerSettings::default(),
            open_connections: OnChange::default(),
            service_drain: open::DRAIN,
            peak_ewma: false,
            outlier_log: None,
            node: NodeFacts::default(),
            recorder: RecorderSettings::default(),
            deny_detail: DenyDetail::default(),
            workers: None,
        }
    }
}

impl DataSettings {
    /// Threads for connections.
    pub fn workers(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.workers.unwrap_or_else(cores).max(1)
    }
}

// === impl Proxy ===

impl Proxy {
    /// The number of the next inner connection.
    pub fn next_connection(&self) -> u64 {
        self.connections.fetch_add(1, Ordering::Relaxed)
    }
}
