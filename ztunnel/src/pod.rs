//! One pod that is served: its sockets, its certificate, its tunnels, what applies to it, and what is open.
//!
//! A pod is served from [`Pod::start`] until its drain: listeners stop and tunnels are told to go elsewhere ([`Pod::drain`]), or
//! everything ends at once ([`Pod::end`]), as for a pod that is gone.

use std::{net::IpAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use cairn_exchange::SpiffeId;
use cairn_hbone::drain;
use cairn_identity::Urgency;
use tokio::{
    net::{TcpListener, UdpSocket},
    time::timeout,
};

use crate::{
    certificates::Held,
    dns, inbound,
    mesh::Workload,
    node::Node,
    open::Open,
    outbound,
    policies::Ruling,
    sockets::{Sockets, ports},
    socks5,
    tunnels::Tunnels,
};

/// How long a connection waits for its pod to become known.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection waits for a policy that the pod names and that has not arrived.
const POLICY_TIMEOUT: Duration = Duration::from_secs(2);

/// Who a pod is, as istio-cni or the settings say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInfo {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Its trust domain.
    pub trust_domain: String,
}

/// One pod.
#[derive(Debug)]
pub struct Pod {
    /// Who it is.
    pub info: PodInfo,
    /// The name of its resource in workload discovery.
    pub uid: Arc<str>,
    /// The proxy.
    pub node: Arc<Node>,
    /// Its sockets.
    pub sockets: Sockets,
    /// Its certificate.
    pub certificate: Arc<Held>,
    /// Its tunnels.
    pub tunnels: Tunnels,
    /// What is open.
    pub open: Arc<Open>,
    ruling: ArcSwapOption<(Arc<Workload>, Ruling)>,
    listening: drain::Trigger,
    work: drain::Trigger,
}

/// Why a pod cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// Its name makes no identity.
    #[error("{0} is no identity of a pod: {1}")]
    Identity(String, cairn_exchange::InvalidSpiffeId),
    /// A port cannot be had.
    #[error("port {port} cannot be opened in the network namespace of {pod}: {source}")]
    Listen {
        /// Which.
        port: u16,
        /// Whose.
        pod: String,
        /// What the system says.
        source: std::io::Error,
    },
}

/// The sockets of a pod that wait for connections.
#[derive(Debug)]
pub struct Listeners {
    /// Captured outbound connections.
    pub outbound: TcpListener,
    /// Captured inbound connections.
    pub plaintext: TcpListener,
    /// Tunnels.
    pub hbone: TcpListener,
    /// DNS by datagrams and by TCP, where it is answered.
    pub dns: Vec<(UdpSocket, TcpListener)>,
    /// SOCKS5, where it is wanted.
    pub socks5: Option<TcpListener>,
}

// === impl PodInfo ===

impl PodInfo {
    /// Its identity.
    pub fn identity(&self) -> Result<SpiffeId, PodError> {
        SpiffeId::workload(&self.trust_domain, &self.namespace, &self.service_account)
            .map_err(|error| PodError::Identity(format!("{}/{}", self.namespace, self.name), error))
    }
}

// === impl Listeners ===

impl Listeners {
    /// Opens them.
    pub fn open(info: &PodInfo, node: &Node, sockets: &Sockets) -> Result<Self, PodError> {
        let failed = |port| {
            move |source| PodError::Listen {
                port,
                pod: format!("{}/{}", info.namespace, info.name),
                source,
            }
        };
        let tcp = |port| sockets.listen(port).map_err(failed(port));
        Ok(Self {
            outbound: tcp(ports::OUTBOUND)?,
            plaintext: tcp(ports::INBOUND_PLAINTEXT)?,
            hbone: tcp(ports::INBOUND_HBONE)?,
            dns: match node.settings.dns {
                true => sockets.dns(ports::DNS).map_err(failed(ports::DNS))?,
                false => Vec::new(),
            },
            socks5: match node.settings.socks5 {
                true => Some(sockets.listen_locally(ports::SOCKS5).map_err(failed(ports::SOCKS5))?),
                false => None,
            },
        })
    }
}

// === impl Pod ===

impl Pod {
    /// Begins to serve a pod on the calling runtime.
    pub fn start(node: Arc<Node>, info: PodInfo, sockets: Sockets) -> Result<Arc<Self>, PodError> {
        let id = info.identity()?;
        let listeners = Listeners::open(&info, &node, &sockets)?;
        let certificate = node.certificates.hold(&id, Urgency::Waiting);
        let tunnels = Tunnels::new(&node.settings.pool, &certificate.identity, &sockets);
        let (listening, _) = drain::channel();
        let (work, _) = drain::channel();
        let pod = Arc::new(Self {
            uid: format!("{}//Pod/{}/{}", node.settings.cluster, info.namespace, info.name).into(),
            info,
            node,
            sockets,
            certificate,
            tunnels,
            open: Arc::default(),
            ruling: ArcSwapOption::empty(),
            listening,
            work,
        });
        pod.serve(listeners);
        Ok(pod)
    }

    fn serve(self: &Arc<Self>, listeners: Listeners) {
        let Listeners {
            outbound,
            plaintext,
            hbone,
            dns,
            socks5,
        } = listeners;
        self.spawn(outbound::accept(self.clone(), outbound));
        self.spawn(inbound::plaintext::accept(self.clone(), plaintext));
        self.spawn(inbound::hbone::accept(self.clone(), hbone));
        self.spawn(inbound::watch(Arc::downgrade(self)));
        for (datagrams, streams) in dns {
            self.spawn(dns::serve(self.clone(), datagrams, streams));
        }
        if let Some(listener) = socks5 {
            self.spawn(socks5::accept(self.clone(), listener));
        }
    }

    /// Does work that ends with the pod.
    pub fn spawn(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) {
        let mut end = self.work.watch();
        tokio::spawn(async move {
            tokio::select! {
                () = work => {}
                () = end.drained() => {}
            }
        });
    }

    /// When to accept no more, and tell tunnels so.
    pub fn listening(&self) -> drain::Watch {
        self.listening.watch()
    }

    /// Accepts no more; what is open goes on.
    pub fn drain(&self) {
        self.listening.start();
    }

    /// Ends everything at once.
    pub fn end(&self) {
        self.listening.start();
        self.work.start();
    }

    /// What the mesh says of it: by its name, or else by one of its addresses if it fits.
    pub fn workload_at(&self, address: IpAddr) -> Option<Arc<Workload>> {
        let mesh = &self.node.mesh;
        mesh.workload(&self.uid).or_else(|| {
            let there = mesh.workload_at(address)?;
            let fits = *there.facts.namespace == *self.info.namespace
                && *there.facts.service_account == *self.info.service_account
                && (there.facts.name.is_empty() || *there.facts.name == *self.info.name);
            fits.then_some(there)
        })
    }

    /// What the mesh says of it, waiting a while for it to become known.
    pub async fn known(&self, address: IpAddr) -> Option<Arc<Workload>> {
        if let Some(workload) = self.workload_at(address) {
            return Some(workload);
        }
        let mut pushes = self.node.mesh.watch();
        let waiting = async {
            loop {
                if let Some(workload) = self.workload_at(address) {
                    return Some(workload);
                }
                pushes.changed().await.ok()?;
            }
        };
        timeout(KNOWN_TIMEOUT, waiting).await.ok().flatten()
    }

    /// What applies to it now.
    pub fn ruling(&self, workload: &Arc<Workload>) -> Arc<(Arc<Workload>, Ruling)> {
        let version = self.node.policies.version();
        let current = self.ruling.load_full();
        if let Some(current) = current.filter(|current| Arc::ptr_eq(&current.0, workload) && current.1.version == version) {
            return current;
        }
        let new = Arc::new((workload.clone(), self.node.policies.ruling(workload)));
        self.ruling.store(Some(new.clone()));
        new
    }

    /// What applies to it, waiting a while for policies that are named and have not arrived.
    pub async fn complete_ruling(&self, workload: &Arc<Workload>) -> Arc<(Arc<Workload>, Ruling)> {
        let ruling = self.ruling(workload);
        if !ruling.1.is_incomplete() {
            return ruling;
        }
        self.node.metrics.unknown_policies.inc();
        let mut pushes = self.node.policies.watch();
        let waiting = async {
            loop {
                let ruling = self.ruling(workload);
                if !ruling.1.is_incomplete() || pushes.changed().await.is_err() {
                    return ruling;
                }
            }
        };
        timeout(POLICY_TIMEOUT, waiting).await.unwrap_or(ruling)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.end();
    }
}
