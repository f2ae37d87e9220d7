//! Connections that pods open: captured, led where they belong, in a tunnel where there is one.
//!
//! The client's own connection has been accepted by then, for it was redirected. When the way onwards fails it is reset at once: an
//! end in order would look as if a server had answered with nothing.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use cairn_exchange::clock;
use cairn_hbone::OpenError;
use tokio::{
    net::{TcpListener, TcpStream, lookup_host},
    time::timeout,
};

use crate::{
    baggage, inbound,
    mesh::Workload,
    pod::Pod,
    relay::{self, Side},
    route::{self, NoRoute, Route, To},
    sockets,
    telemetry::{Flag, Parties, Record, Reporter},
};

/// How long a name may take.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a connection was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no way.
    #[error(transparent)]
    NoRoute(#[from] NoRoute),
    /// Nobody says who the client is.
    #[error("unknown source: the mesh does not know this pod")]
    UnknownSource,
    /// The tunnel.
    #[error("connection failed: {0}")]
    Tunnel(#[from] OpenError),
    /// TCP.
    #[error("connection failed: {0}")]
    Tcp(#[from] std::io::Error),
    /// The name.
    #[error("the name {0} has no address")]
    NoAddress(Arc<str>),
}

/// Accepts until the drain.
pub async fn accept(pod: Arc<Pod>, listener: TcpListener) {
    inbound::accept_all(pod, listener, |pod, stream, source| async move {
        match sockets::original_destination(&stream) {
            Ok(target) => serve(pod, stream, source, target).await,
            Err(error) => {
                tracing::debug!(%source, "it is not known where a connection wants to go: {error}");
                sockets::reset(stream);
            }
        }
    })
    .await;
}

/// Serves one connection that wants to go to `target`.
pub async fn serve(pod: Arc<Pod>, client: TcpStream, source: SocketAddr, target: SocketAddr) {
    match begin(&pod, source, target).await {
        Ok(begun) => begun.relay(&pod, client).await,
        Err(()) => sockets::reset(client),
    }
}

/// A connection that has been made onwards.
pub struct Begun {
    record: Record,
    server: Side,
    source: SocketAddr,
    original: SocketAddr,
    actual: SocketAddr,
}

/// Makes the connection onwards; what fails has been told.
pub async fn begin(pod: &Pod, source: SocketAddr, target: SocketAddr) -> Result<Begun, ()> {
    let begin = clock::now();
    let log = &pod.node.log;
    let refuse = |error: &dyn std::fmt::Display| log.refused(source, target, Reporter::Source, error);
    let Some(from) = pod.known(source.ip()).await else {
        refuse(&ConnectError::UnknownSource);
        return Err(());
    };
    let route = route::decide(&pod.node.mesh, &from, target).map_err(|error| refuse(&error))?;
    let actual = address(&route.to).await.map_err(|error| refuse(&error))?;
    let headers = || {
        let host = route.service.as_ref().map(|service| &*service.hostname);
        baggage::connect(&from, source, host)
    };
    let mut peer = None;
    let connected = match &route.tunnel {
        Some(tunnel) => match pod.tunnels.open(actual, tunnel, headers()).await {
            Ok(opened) => {
                peer = opened.peer_id;
                Ok(Side::Tunnel(Box::new(opened.stream)))
            }
            Err(error) => Err(ConnectError::from(error)),
        },
        None => pod
            .sockets
            .connect(actual, Some(source.ip()))
            .await
            .map(Side::Tcp)
            .map_err(ConnectError::from),
    };
    // Only now: the first tunnel may have waited for our own certificate.
    let parties = Parties {
        destination_identity: peer,
        ..parties(pod, &from, source, actual, &route)
    };
    let record = Record::open(parties, begin, &pod.node.metrics, log);
    match connected {
        Ok(server) => Ok(Begun {
            record,
            server,
            source,
            original: target,
            actual,
        }),
        Err(error) => {
            record.close(Some(&error), Flag::Connect);
            Err(())
        }
    }
}

// === impl Begun ===

impl Begun {
    /// Moves bytes until the end.
    pub async fn relay(self, pod: &Pod, client: TcpStream) {
        let Self {
            record,
            server,
            source,
            original,
            actual,
        } = self;
        let _ticket = pod.open.enter(false, source, None, original.to_string(), actual);
        let ended = relay::run(Side::Tcp(client), server, &record).await;
        record.close(ended.as_ref().err().map(|error| error as &dyn std::fmt::Display), Flag::None);
    }
}

async fn address(to: &To) -> Result<SocketAddr, ConnectError> {
    match to {
        To::Address(address) => Ok(*address),
        To::Name(name, port) => {
            let found = timeout(RESOLVE_TIMEOUT, lookup_host((&**name, *port))).await;
            let none = || ConnectError::NoAddress(name.clone());
            let ip = route::first_address(found.map_err(|_| none())??).ok_or_else(none)?;
            Ok(SocketAddr::new(ip, *port))
        }
    }
}

fn parties(pod: &Pod, from: &Arc<Workload>, source: SocketAddr, actual: SocketAddr, route: &Route) -> Parties {
    let identity = pod.certificate.identity.current().map(|credentials| credentials.id().clone());
    Parties {
        reporter: Reporter::Source,
        source_address: source,
        source: Some(from.clone()),
        claimed: None,
        source_identity: identity.filter(|_| route.tunnel.is_some()),
        destination_address: actual,
        hbone: route.tunnel.as_ref().map(|tunnel| match &tunnel.inner {
            Some(inner) => inner.authority.as_str().into(),
            None => tunnel.authority.as_str().into(),
        }),
        destination: route.destination.clone(),
        destination_identity: None,
        service: route.service.clone(),
        mutual_tls: route.tunnel.is_some(),
    }
}
