//! Tunnels: mutual TLS with the pod's certificate, and CONNECT streams that may lead to this pod and nowhere else.
//!
//! | asked for | answer |
//! |---|---|
//! | an address of the pod and a port | 200 once the application has accepted |
//! | the host name and port of a service that the pod serves | the same, with the pod's port |
//! | any other address or name | 400 |
//! | what policy denies | 401 |
//! | a port of this proxy, or one where nobody listens | 503 |

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::clock;
use cairn_hbone::{Connect, Peer};
use cairn_identity::{ServerTerms, peer_id};
use http::{HeaderMap, HeaderName, StatusCode, uri::Authority};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{accept_all, authorize, service_of, watch_waypoint};
use crate::{
    baggage,
    mesh::{ApplicationProtocol, Service, Workload},
    pod::Pod,
    relay::{self, Side},
    sockets::{canonical, ports},
    telemetry::{Flag, Parties, Record, Reporter},
};

/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a connection is no tunnel.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("there is no certificate to accept tunnels with: {0}")]
    NoCertificate(String),
    #[error("the TLS handshake took longer than {HANDSHAKE_TIMEOUT:?}")]
    Timeout,
    #[error("the TLS handshake failed: {0}")]
    Tls(#[from] std::io::Error),
    #[error("the client's certificate names nobody: {0}")]
    Identity(#[from] cairn_identity::PeerError),
}

/// What a CONNECT asks for that cannot be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Refused {
    #[error("{0} has no port")]
    NoPort(String),
    #[error("ip mismatch: {asked} is asked for, and this is {here}")]
    OtherAddress { asked: IpAddr, here: IpAddr },
    #[error("{0} is no service of this pod, or has no such port here")]
    OtherService(String),
    #[error("recursive call: {0} is a port of this proxy")]
    Recursive(u16),
}

/// Accepts until the drain; tunnels are then told to go, and end with their last stream.
pub async fn accept(pod: Arc<Pod>, listener: TcpListener) {
    accept_all(pod, listener, |pod, stream, source| async move {
        match handshake(&pod, stream, source).await {
            Ok((stream, peer)) => {
                let (settings, drain) = (pod.node.settings.server.clone(), pod.listening());
                let streams = pod.clone();
                let served = cairn_hbone::serve(stream, Arc::new(peer), &settings, drain, move |connect| {
                    streams.spawn(serve(streams.clone(), connect));
                });
                if let Err(error) = served.await {
                    tracing::debug!(%error, %source, "a tunnel ended");
                }
            }
            Err(error) => tracing::info!(%error, %source, pod = %pod.uid, "no tunnel"),
        }
    })
    .await;
}

async fn handshake(pod: &Pod, stream: TcpStream, source: SocketAddr) -> Result<(TlsStream<TcpStream>, Peer), HandshakeError> {
    let terms = ServerTerms::hbone([format!("spiffe://{}/", pod.info.trust_domain)]);
    let identity = &pod.certificate.identity;
    // The first tunnel may come before the certificate.
    let _ready = timeout(HANDSHAKE_TIMEOUT, identity.ready()).await;
    let config = identity
        .try_server_config(&terms)
        .map_err(|error| HandshakeError::NoCertificate(error.to_string()))?;
    let local_id = identity.current().map(|credentials| credentials.id().clone());
    let local_address = canonical(stream.local_addr()?);
    let stream = timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream))
        .await
        .map_err(|_| HandshakeError::Timeout)??;
    let id = peer_id(stream.get_ref().1.peer_certificates().unwrap_or_default())?;
    let peer = Peer {
        id: Some(id),
        address: source,
        local_address,
        local_id,
    };
    Ok((stream, peer))
}

async fn serve(pod: Arc<Pod>, connect: Connect) {
    let begin = clock::now();
    let peer = connect.peer.clone();
    let here = peer.local_address;
    let refuse = |connect: Connect, status: StatusCode, error: &dyn std::fmt::Display| {
        pod.node.log.refused(peer.address, here, Reporter::Destination, error);
        connect.refuse(status, HeaderMap::new(), Bytes::from(error.to_string()));
    };
    let Some(workload) = pod.known(here.ip()).await else {
        return refuse(
            connect,
            StatusCode::SERVICE_UNAVAILABLE,
            &"unknown destination: the mesh does not know this pod",
        );
    };
    let (target, named) = match target(&pod, &workload, &connect.authority, here.ip()) {
        Ok(target) => target,
        Err(error @ Refused::Recursive(_)) => return refuse(connect, StatusCode::SERVICE_UNAVAILABLE, &error),
        Err(error) => return refuse(connect, StatusCode::BAD_REQUEST, &error),
    };
    // A pod that the mesh knows at that address is the peer only if it has proved to be.
    let sender = pod.node.mesh.workload_at(peer.address.ip());
    let sender = sender.filter(|sender| sender.identity() == peer.id.as_ref());
    let ticket = pod
        .open
        .enter(true, peer.address, peer.id.clone(), connect.authority.to_string(), target);
    let record = Record::open(
        Parties {
            reporter: Reporter::Destination,
            source_address: peer.address,
            claimed: baggage::read(&connect.headers),
            source: sender.clone(),
            source_identity: peer.id.clone(),
            destination_address: here,
            hbone: Some(connect.authority.as_str().into()),
            service: named.or_else(|| service_of(&pod, &workload, target.port())),
            destination: Some(workload.clone()),
            destination_identity: peer.local_id.clone(),
            mutual_tls: true,
        },
        begin,
        &pod.node.metrics,
        &pod.node.log,
    );
    if let Err(denied) = authorize(&pod, &workload, &ticket).await {
        record.close(Some(&denied), Flag::Denied);
        return connect.refuse(StatusCode::UNAUTHORIZED, HeaderMap::new(), Bytes::new());
    }
    watch_waypoint(&pod, &workload, &ticket, sender.as_deref());
    let server = match application(&pod, &workload, target, &peer).await {
        Ok(server) => server,
        Err(error) => {
            let words = format!("connection failed: {error}");
            record.close(Some(&words), Flag::Connect);
            return connect.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new(), Bytes::from(words));
        }
    };
    let said = baggage::of(&workload).map(|value| (HeaderName::from_static("baggage"), value));
    let stream = match connect.accept(said.into_iter().collect()) {
        Ok(stream) => stream,
        Err(gone) => return record.close(Some(&gone), Flag::None),
    };
    tokio::select! {
        ended = relay::run(Side::Tunnel(Box::new(stream)), Side::Tcp(server), &record) => {
            record.close(ended.as_ref().err().map(|error| error as &dyn std::fmt::Display), Flag::None);
        }
        _denied = ticket.denied() => record.close(Some(&"connection closed due to policy change"), Flag::None),
    }
}

/// What is asked for, and the service if it was named.
fn target(
    pod: &Pod,
    workload: &Workload,
    authority: &Authority,
    here: IpAddr,
) -> Result<(SocketAddr, Option<Arc<Service>>), Refused> {
    let port = authority.port_u16().ok_or_else(|| Refused::NoPort(authority.to_string()))?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let (port, service) = match host.parse::<IpAddr>() {
        Ok(asked) => {
            let asked = asked.to_canonical();
            if asked != here {
                return Err(Refused::OtherAddress { asked, here });
            }
            (port, None)
        }
        Err(_) => {
            let other = || Refused::OtherService(authority.to_string());
            let service = pod
                .node
                .mesh
                .service_named(host, &workload.facts.namespace)
                .ok_or_else(other)?;
            let target = workload.target_port(&service.key, port).ok_or_else(other)?;
            (target, Some(service))
        }
    };
    if ports::ALL.contains(&port) {
        return Err(Refused::Recursive(port));
    }
    Ok((SocketAddr::new(here, port), service))
}

/// Connects to the application, in the way that the workload asks for.
async fn application(pod: &Pod, workload: &Workload, target: SocketAddr, peer: &Peer) -> std::io::Result<TcpStream> {
    let Some(tunnel) = workload.application_tunnel else {
        return pod.sockets.connect(target, Some(peer.address.ip())).await;
    };
    let to = SocketAddr::new(target.ip(), tunnel.port.unwrap_or(target.port()));
    match tunnel.protocol {
        ApplicationProtocol::None => pod.sockets.connect(to, Some(peer.address.ip())).await,
        ApplicationProtocol::Proxy => {
            let mut stream = pod
                .sockets
                .connect(SocketAddr::new(loopback(to.ip()), to.port()), None)
                .await?;
            crate::proxy_protocol::write(&mut stream, peer.address, target, peer.id.as_ref()).await?;
            Ok(stream)
        }
    }
}

fn loopback(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    }
}
