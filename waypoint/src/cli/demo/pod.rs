//! The pods of the demonstration: each an address of the loopback interface with what a node does for a pod in a mesh.
//!
//! A pod accepts tunnels on its own address, port 15008, with an identity of its own, and hands each stream to the application that
//! listens on the port that was asked for: what ztunnel does for a real pod. Which pods there are, and what they speak on which port,
//! is read from the configuration.

use std::{collections::BTreeMap, io, net::SocketAddr, sync::Arc, time::Duration};

use cairn_exchange::SpiffeId;
use cairn_hbone::{Connect, Peer, ServerSettings, drain};
use cairn_identity::{Identity, ServerTerms, generate::Authority};
use http::{HeaderMap, StatusCode};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    StartError,
    echo::{self, App},
    mesh::{HBONE_PORT, TRUST_DOMAIN},
};
use crate::{serve::listener::bind, snapshot::Snapshot, upstream::Target};

/// Tunnel connections to one pod at a time; more wait to be accepted.
const MAX_TUNNELS: usize = 256;
/// Time for a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1.1 or HTTP/2.
    Http,
    /// Bytes.
    Tcp,
}

/// One pod.
#[derive(Debug, PartialEq, Eq)]
pub struct Pod {
    /// Where its tunnels end.
    pub address: SocketAddr,
    /// Who it is.
    pub id: SpiffeId,
    /// Its application.
    pub app: Arc<App>,
    /// What it speaks on its ports.
    pub ports: BTreeMap<u16, Speaks>,
}

/// Every pod that a cluster of this configuration has as an endpoint.
pub fn all(snapshot: &Snapshot) -> Result<Vec<Pod>, StartError> {
    let mut pods = BTreeMap::new();
    for (_, cluster) in snapshot.clusters.iter() {
        for endpoint in cluster.state.endpoints.load().iter() {
            let Target::Tunnel { address, .. } = endpoint.target else {
                continue;
            };
            if !address.ip().is_loopback() {
                return Err(StartError::Elsewhere {
                    cluster: cluster.name().to_string(),
                    address,
                });
            }
            let Some(workload) = snapshot.workloads.workload_at(address.ip()) else {
                return Err(StartError::Nobody(address.ip()));
            };
            let id = match &workload.identity {
                Some(id) => id.clone(),
                None => SpiffeId::workload(TRUST_DOMAIN, &workload.namespace, &workload.service_account)
                    .map_err(|error| StartError::Identity(error.to_string()))?,
            };
            let pod = pods.entry(address.ip()).or_insert_with(|| Pod {
                address: SocketAddr::new(address.ip(), HBONE_PORT),
                id,
                app: Arc::new(App {
                    pod: workload.name.to_string(),
                    version: workload.canonical_revision.to_string(),
                }),
                ports: BTreeMap::new(),
            });
            pod.ports.insert(address.port(), spoken(cluster.name()));
        }
    }
    Ok(pods.into_values().collect())
}

/// What istiod says is spoken with a cluster, by its name: `inbound-vip|9000|tcp|shop.demo.svc.cluster.local`.
fn spoken(cluster: &str) -> Speaks {
    if cluster.split('|').nth(2) == Some("tcp") {
        Speaks::Tcp
    } else {
        Speaks::Http
    }
}

impl Pod {
    /// Begins to listen.
    pub fn start(self, authority: &Authority) -> Result<(), StartError> {
        let credentials = authority
            .issue(&self.id)
            .map_err(|error| StartError::Identity(error.to_string()))?;
        let identity = Identity::fixed(credentials);
        let listener = bind(self.address).map_err(|error| StartError::pod(self.address, error))?;
        tokio::spawn(accept(Arc::new(self), identity, listener));
        Ok(())
    }

    /// Hands a stream to the application that listens on its port.
    async fn serve(&self, connect: Connect) {
        match connect.authority.port_u16().and_then(|port| self.ports.get(&port)) {
            Some(speaks) => {
                let Ok(stream) = connect.accept(HeaderMap::new()) else {
                    return;
                };
                match speaks {
                    Speaks::Http => self.app.clone().http(stream).await,
                    Speaks::Tcp => echo::tcp(stream).await,
                }
            }
            None => {
                let why = format!("nothing listens on {}\n", connect.authority);
                connect.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new(), why);
            }
        }
    }
}

async fn accept(pod: Arc<Pod>, identity: Identity, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(MAX_TUNNELS));
    // Nobody closes the semaphore.
    while let Ok(permit) = room.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, address)) => {
                let (pod, identity) = (pod.clone(), identity.clone());
                tokio::spawn(async move {
                    let _permit = permit;
                    if let Err(error) = connection(&pod, &identity, stream, address).await {
                        tracing::debug!(%error, pod = %pod.app.pod, client = %address, "tunnel connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, pod = %pod.app.pod, "a tunnel connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(pod: &Arc<Pod>, identity: &Identity, stream: TcpStream, address: SocketAddr) -> io::Result<()> {
    let terms = ServerTerms::hbone([format!("spiffe://{TRUST_DOMAIN}/")]);
    let config = identity
        .server_config(&terms)
        .ok_or_else(|| io::Error::other("there is no certificate"))?;
    stream.set_nodelay(true)?;
    let local_address = stream.local_addr()?;
    let stream = timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream)).await??;
    let id = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|certificates| cairn_identity::peer_id(certificates).ok());
    let peer = Peer {
        id,
        address,
        local_address,
        local_id: Some(pod.id.clone()),
    };
    let (_undrained, watch) = drain::channel();
    let on_connect = |connect| {
        let pod = pod.clone();
        tokio::spawn(async move { pod.serve(connect).await });
    };
    cairn_hbone::serve(stream, Arc::new(peer), &ServerSettings::default(), watch, on_connect)
        .await
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_tells_by_its_name_what_is_spoken() {
        assert_eq!(spoken("inbound-vip|9000|tcp|shop.demo.svc.cluster.local"), Speaks::Tcp);
        assert_eq!(spoken("inbound-vip|80|http|shop.demo.svc.cluster.local"), Speaks::Http);
    }
}
