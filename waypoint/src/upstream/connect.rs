//! Opens the byte stream to an endpoint: through a tunnel, or plainly.

use std::{net::SocketAddr, sync::Arc};

use cairn_hbone::{Dial, DialError, Dialed, OpenError, TunnelStream};
use cairn_identity::{ClientTerms, Identity, Originator};
use http::{HeaderMap, StatusCode};
use parking_lot::{Mutex, RwLock};
use rustls::ClientConfig;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{Cluster, Endpoint, Purpose, Target, TcpKeepalive, TransportTerms, UpstreamIo, dns::Names, transport::put_on};
use crate::{config::compiler::Sources, snapshot::Snapshot};

/// The port on which every HBONE proxy listens (contract xds §5.8: `upstream_port_override`).
pub const HBONE_PORT: u16 = 15008;
/// The cluster whose TLS terms tunnels to endpoints use.
pub const ORIGINATE: &str = "connect_originate";
/// The cluster whose TLS terms the inner one of two tunnels to another network uses.
pub const INNER_ORIGINATE: &str = "inner_connect_originate";
/// As [`INNER_ORIGINATE`], for the outer tunnel.
pub const OUTER_ORIGINATE: &str = "outer_connect_originate";

/// Opens byte streams to endpoints.
pub struct Connector {
    tunnels: cairn_hbone::Pool,
    trust: Arc<Trust>,
    originator: Originator,
    names: Names,
    identity: Identity,
    /// Settings of tunnels that carry one stream.
    inner_settings: cairn_hbone::PoolSettings,
}

/// Where a stream is to go, and for what.
pub struct Toward<'a> {
    /// The configuration of the request.
    pub snapshot: &'a Snapshot,
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// Where the client wanted to go.
    pub original: Option<SocketAddr>,
    /// What the connection is for, where the cluster tells purposes apart.
    pub purpose: Option<&'a Purpose>,
    /// The application protocol that is going to be spoken, as TLS calls it.
    pub speak: Option<&'static [u8]>,
}

/// TLS terms by the key that the pool knows them under.
#[derive(Default)]
struct Trust {
    terms: RwLock<Vec<ClientTerms>>,
}

/// A stream and our end of it.
pub struct Connected {
    /// The stream.
    pub io: UpstreamIo,
    /// The address it leaves from.
    pub local_address: Option<SocketAddr>,
}

/// Why no stream could be opened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not within the cluster's time.
    #[error("connect timeout")]
    Timeout,
    /// The connection was refused, or the destination cannot be reached.
    #[error("{0}")]
    Failed(String),
    /// The destination answered the tunnel with this status.
    #[error("tunnel_response:{}", .0.as_u16())]
    Tunnel(StatusCode),
    /// The configuration has something that we cannot do.
    #[error("{0}")]
    Unsupported(Arc<str>),
}

// === impl Trust ===

impl Trust {
    /// The key of these terms: equal terms have equal keys. Terms are few: one per mesh configuration ever seen.
    fn key(&self, terms: &ClientTerms) -> u64 {
        if let Some(at) = self.terms.read().iter().position(|known| known == terms) {
            return at as u64;
        }
        let mut all = self.terms.write();
        let at = all.iter().position(|known| known == terms).unwrap_or_else(|| {
            all.push(terms.clone());
            all.len() - 1
        });
        at as u64
    }

    fn terms(&self, key: u64) -> Option<ClientTerms> {
        self.terms.read().get(usize::try_from(key).ok()?).cloned()
    }
}

// === impl Connector ===

impl Connector {
    /// A connector that shows this identity to the mesh, and to applications what clusters name of `sources`.
    pub fn new(identity: Identity, settings: cairn_hbone::PoolSettings, sources: &Sources) -> Self {
        let trust = Arc::new(Trust::default());
        let known = trust.clone();
        let inner_settings = cairn_hbone::PoolSettings {
            max_tunnels: 1,
            spread_tunnels: 1,
            ..settings.clone()
        };
        let (shown, originator) = (identity.clone(), Originator::new(identity.clone(), sources.secrets.clone()));
        let dial = cairn_hbone::TcpTls::new(
            move |destination| {
                let terms = known.terms(destination.trust).ok_or("these TLS terms are not known")?;
                identity
                    .client_config(&terms)
                    .ok_or_else(|| "there is no valid certificate of our own".to_owned())
            },
            |_, certificates| Ok(cairn_identity::peer_id(certificates).ok()),
        );
        Self {
            tunnels: cairn_hbone::Pool::new(settings, dial),
            trust,
            originator,
            names: sources.names.clone(),
            identity: shown,
            inner_settings,
        }
    }

    /// Where names are looked up.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Trust has changed: tunnels that were made before take no more streams, and end with their last one.
    pub fn trust_changed(&self) {
        self.tunnels.retain(|_| false);
    }

    /// Fingerprint of the terms under which tunnels to such an endpoint are made now, and of the trust that they rest on.
    pub fn tunnel_terms(&self, snapshot: &Snapshot, target: &Target) -> u64 {
        snapshot.tunnel_terms(target) ^ self.identity.trust_mark()
    }

    /// Tunnels and streams now.
    pub fn stats(&self) -> cairn_hbone::PoolStats {
        self.tunnels.stats()
    }

    /// Opens a stream to the endpoint, with all that the cluster puts onto it.
    pub async fn connect(&self, to: &Toward<'_>) -> Result<Connected, ConnectError> {
        let settings = &to.cluster.settings;
        match to.cluster.transport_to(to.endpoint) {
            TransportTerms::Unsupported(reason) => Err(ConnectError::Unsupported(reason.clone())),
            TransportTerms::Raw => self.reach(to).await,
            // The cluster's time is for all of it, as in Envoy.
            terms @ (TransportTerms::Tls(_) | TransportTerms::Proxied(..)) => {
                let address = to.endpoint.target.address().or(to.original);
                let dressed = async {
                    let Connected { io, local_address } = self.reach(to).await?;
                    let io = put_on(&self.originator, io, terms, to.purpose, to.speak, address).await?;
                    Ok(Connected { io, local_address })
                };
                timeout(settings.connect_timeout, dressed)
                    .await
                    .unwrap_or(Err(ConnectError::Timeout))
            }
        }
    }

    /// The bare stream.
    async fn reach(&self, to: &Toward<'_>) -> Result<Connected, ConnectError> {
        let Toward {
            snapshot,
            cluster,
            endpoint,
            original,
            purpose: _,
            speak: _,
        } = *to;
        let no_address = || ConnectError::Failed("the client asked for a name, and this cluster needs an address".into());
        match &endpoint.target {
            Target::Tunnel { address, gateway } => self.tunnel(snapshot, *address, *gateway).await,
            Target::Double { gateway, service } => self.double_tunnel(snapshot, *gateway, service).await,
            Target::Plain(address) => plain(*address, cluster).await,
            Target::Original { tunnel: true } => self.tunnel(snapshot, original.ok_or_else(no_address)?, None).await,
            Target::Original { tunnel: false } => {
                let mut address = original.ok_or_else(no_address)?;
                if let super::Discovery::OriginalDestination(super::OriginalDestination {
                    port_override: Some(port),
                }) = cluster.settings.discovery
                {
                    address.set_port(port);
                }
                plain(address, cluster).await
            }
        }
    }

    /// A tunnel to a workload of another network, inside of one to that network's gateway (contract xds §2.9). The gateway chooses the
    /// workload, so that each inner tunnel carries one stream and the next may lead elsewhere; outer ones are shared.
    async fn double_tunnel(&self, snapshot: &Snapshot, gateway: SocketAddr, service: &str) -> Result<Connected, ConnectError> {
        let terms = |name: &str| {
            snapshot.clusters.get(name).and_then(|cluster| {
                let settings = &cluster.settings;
                let headers: HeaderMap = settings.tunnel_headers.iter().cloned().collect();
                Some((settings.tunnel.as_ref()?, settings.connect_timeout, headers))
            })
        };
        let missing = |name: &str| ConnectError::Failed(format!("the cluster {name} has not arrived, or is refused"));
        let (outer, outer_limit, outer_headers) = terms(OUTER_ORIGINATE).ok_or_else(|| missing(OUTER_ORIGINATE))?;
        let (inner, inner_limit, inner_headers) = terms(INNER_ORIGINATE).ok_or_else(|| missing(INNER_ORIGINATE))?;
        let config = self
            .identity
            .client_config(inner)
            .ok_or_else(|| ConnectError::Failed("there is no valid certificate of our own".into()))?;
        let destination = cairn_hbone::Destination {
            address: SocketAddr::new(gateway.ip(), HBONE_PORT),
            trust: self.trust.key(outer),
        };
        let opened = timeout(outer_limit, self.tunnels.open(&destination, service, outer_headers))
            .await
            .map_err(|_| ConnectError::Timeout)??;
        let within = Within {
            stream: Mutex::new(Some(opened.stream)),
            config,
            local_address: opened.local_address,
        };
        // It lets go of its only tunnel, which ends with its only stream.
        let once = cairn_hbone::Pool::new(self.inner_settings.clone(), within);
        let opened = timeout(inner_limit, once.open(&destination, service, inner_headers))
            .await
            .map_err(|_| ConnectError::Timeout)??;
        Ok(Connected {
            io: UpstreamIo::Tunnel(opened.stream),
            local_address: Some(opened.local_address),
        })
    }

    async fn tunnel(
        &self,
        snapshot: &Snapshot,
        address: SocketAddr,
        gateway: Option<SocketAddr>,
    ) -> Result<Connected, ConnectError> {
        let originate = snapshot.clusters.get(ORIGINATE).and_then(|cluster| {
            cluster
                .settings
                .tunnel
                .as_ref()
                .map(|terms| (terms, cluster.settings.connect_timeout))
        });
        let Some((terms, limit)) = originate else {
            return Err(ConnectError::Failed(format!("the cluster {ORIGINATE} has not arrived")));
        };
        let destination = cairn_hbone::Destination {
            address: gateway.unwrap_or_else(|| SocketAddr::new(address.ip(), HBONE_PORT)),
            trust: self.trust.key(terms),
        };
        let authority = address.to_string();
        let opened = timeout(limit, self.tunnels.open(&destination, &authority, HeaderMap::new())).await;
        match opened {
            Err(_) => Err(ConnectError::Timeout),
            Ok(Ok(opened)) => Ok(Connected {
                io: UpstreamIo::Tunnel(opened.stream),
                local_address: Some(opened.local_address),
            }),
            Ok(Err(error)) => Err(ConnectError::from(error)),
        }
    }
}

/// Makes TLS on a stream that is there already: the tunnel inside of a tunnel.
struct Within {
    stream: Mutex<Option<TunnelStream>>,
    config: Arc<ClientConfig>,
    local_address: SocketAddr,
}

impl Dial for Within {
    type Io = TlsStream<TunnelStream>;

    async fn dial(&self, _: &cairn_hbone::Destination) -> Result<Dialed<Self::Io>, DialError> {
        let stream = self.stream.lock().take();
        let stream = stream.ok_or_else(|| DialError::NotReady("the outer tunnel has been used".into()))?;
        let io = TlsConnector::from(self.config.clone())
            .connect(cairn_identity::server_name(), stream)
            .await
            .map_err(DialError::Tls)?;
        let certificates = io.get_ref().1.peer_certificates().unwrap_or_default();
        Ok(Dialed {
            peer_id: cairn_identity::peer_id(certificates).ok(),
            io,
            local_address: self.local_address,
        })
    }
}

async fn plain(address: SocketAddr, cluster: &Cluster) -> Result<Connected, ConnectError> {
    let stream = timeout(cluster.settings.connect_timeout, TcpStream::connect(address))
        .await
        .map_err(|_| ConnectError::Timeout)?
        .map_err(|error| ConnectError::Failed(in_envoys_words(&error)))?;
    stream
        .set_nodelay(true)
        .map_err(|error| ConnectError::Failed(in_envoys_words(&error)))?;
    if let Some(keepalive) = &cluster.settings.tcp_keepalive {
        // A kernel that does not take a value keeps its own; the connection is as good without.
        let _ = socket2::SockRef::from(&stream).set_tcp_keepalive(&probes(keepalive));
    }
    let local_address = stream.local_addr().ok();
    Ok(Connected {
        io: UpstreamIo::Plain(stream),
        local_address,
    })
}

/// A cluster's keepalive as the kernel takes it; what is not said stays the kernel's own.
fn probes(keepalive: &TcpKeepalive) -> socket2::TcpKeepalive {
    let mut probes = socket2::TcpKeepalive::new();
    if let Some(time) = keepalive.time {
        probes = probes.with_time(time);
    }
    if let Some(interval) = keepalive.interval {
        probes = probes.with_interval(interval);
    }
    if let Some(count) = keepalive.probes {
        probes = probes.with_retries(count);
    }
    probes
}

/// As Envoy writes it into `upstream_transport_failure_reason`.
fn in_envoys_words(error: &std::io::Error) -> String {
    let text = match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "Connection refused".to_owned(),
        std::io::ErrorKind::HostUnreachable => "No route to host".to_owned(),
        std::io::ErrorKind::NetworkUnreachable => "Network is unreachable".to_owned(),
        std::io::ErrorKind::ConnectionReset => "Connection reset by peer".to_owned(),
        _ => error.to_string(),
    };
    format!("delayed_connect_error:_{}", text.replace(' ', "_"))
}

impl From<OpenError> for ConnectError {
    fn from(error: OpenError) -> Self {
        if let Some(status) = error.status() {
            return ConnectError::Tunnel(status);
        }
        match &error {
            OpenError::ConnectTimeout { .. } | OpenError::AnswerTimeout { .. } => ConnectError::Timeout,
            OpenError::Dial { source, .. } => match source.as_ref() {
                DialError::Connect(io) => ConnectError::Failed(in_envoys_words(io)),
                other => ConnectError::Failed(other.to_string()),
            },
            _ => ConnectError::Failed(error.to_string()),
        }
    }
}
