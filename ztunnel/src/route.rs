//! Where an outbound connection goes: a pure decision over the [`Mesh`].
//!
//! An address of a service leads to the service's waypoint, or else to one of its endpoints; an address of a pod leads to the pod's
//! own waypoint, or else to the pod; any other address is passed through. A waypoint that should be asked and is not there fails the
//! connection: nothing ever goes around it. Whoever is the waypoint goes on directly.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use cairn_exchange::SpiffeId;
use smallvec::SmallVec;

use crate::{
    mesh::{From, Gateway, GatewayTarget, Mesh, Mode, Service, Tunnel, Workload},
    sockets::ports,
};

/// Where a connection goes.
#[derive(Clone, Debug)]
pub struct Route {
    /// Where TCP goes.
    pub to: To,
    /// The tunnel that it goes in.
    pub tunnel: Option<TunnelTo>,
    /// Who is there.
    pub destination: Option<Arc<Workload>>,
    /// The service that was meant.
    pub service: Option<Arc<Service>>,
}

/// An address, or a name to resolve first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// This one.
    Address(SocketAddr),
    /// One that the name has.
    Name(Arc<str>, u16),
}

/// A tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelTo {
    /// What is asked for.
    pub authority: String,
    /// Who may answer.
    pub expect: Identities,
    /// The tunnel inside of it, through the gateway of another network.
    pub inner: Option<Inner>,
}

/// A tunnel inside a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inner {
    /// What is asked for.
    pub authority: String,
    /// Who may answer.
    pub expect: Identities,
}

/// One of these.
pub type Identities = SmallVec<[SpiffeId; 1]>;

/// Why there is no way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    /// The connection leads to ourselves.
    #[error("the connection wants to go to {0}, which is one of this proxy's own ports")]
    Loop(SocketAddr),
    /// Nobody serves the service.
    #[error("service {service} has no endpoint for port {port} that may be used")]
    NoEndpoint {
        /// Its key.
        service: Arc<str>,
        /// The port.
        port: u16,
    },
    /// The waypoint is not there.
    #[error("the waypoint {0} cannot be found or has no endpoint, and nothing goes around it")]
    NoWaypoint(String),
    /// The other network cannot be reached.
    #[error("{workload} is in network {network:?}, which has no gateway that can be found")]
    NoNetworkGateway {
        /// Who.
        workload: Arc<str>,
        /// Where.
        network: Arc<str>,
    },
    /// It should be reached by a tunnel, and nobody says who it is.
    #[error("{0} has no identity, so it cannot be reached by a tunnel")]
    NoIdentity(Arc<str>),
}

/// Decides for a connection from the pod `from` to `target`.
pub fn decide(mesh: &Mesh, from: &Workload, target: SocketAddr) -> Result<Route, NoRoute> {
    if from.addresses.contains(&target.ip()) && ports::ALL.contains(&target.port()) || is_own_loopback(target) {
        return Err(NoRoute::Loop(target));
    }
    match mesh.service_at(target.ip(), &from.facts.namespace) {
        Some(service) => to_service(mesh, from, service, target),
        None => match mesh.workload_at(target.ip()) {
            Some(workload) => to_workload(mesh, from, workload, target),
            None => Ok(passthrough(target)),
        },
    }
}

fn is_own_loopback(target: SocketAddr) -> bool {
    target.ip().is_loopback() && ports::ALL.contains(&target.port())
}

fn passthrough(target: SocketAddr) -> Route {
    Route {
        to: To::Address(target),
        tunnel: None,
        destination: None,
        service: None,
    }
}

fn to_service(mesh: &Mesh, from: &Workload, service: Arc<Service>, target: SocketAddr) -> Result<Route, NoRoute> {
    if let Some(waypoint) = service.choose_waypoint(fastrand::f64())
        && !mesh.is_behind(&waypoint.target, from)
    {
        let waypoint = waypoint.clone();
        return Ok(Route {
            service: Some(service),
            ..through(mesh, from, &waypoint, target.to_string())?
        });
    }
    if service
        .load_balancing
        .as_ref()
        .is_some_and(|terms| terms.mode == Mode::Passthrough)
    {
        return Ok(Route {
            service: Some(service),
            ..passthrough(target)
        });
    }
    let chosen = mesh
        .endpoints(&service.key)
        .and_then(|endpoints| endpoints.choose(&service, target.port(), Some(From { workload: from })));
    let Some((workload, port)) = chosen else {
        return Err(NoRoute::NoEndpoint {
            service: service.key.clone(),
            port: target.port(),
        });
    };
    to_endpoint(mesh, workload, port, Some(service), target.port())
}

fn to_workload(mesh: &Mesh, from: &Workload, workload: Arc<Workload>, target: SocketAddr) -> Result<Route, NoRoute> {
    if let Some(waypoint) = &workload.waypoint
        && !mesh.is_behind(&waypoint.target, from)
    {
        return through(mesh, from, waypoint, target.to_string());
    }
    to_endpoint(mesh, workload, target.port(), None, target.port())
}

/// To one workload, by what it speaks.
fn to_endpoint(
    mesh: &Mesh,
    workload: Arc<Workload>,
    port: u16,
    service: Option<Arc<Service>>,
    service_port: u16,
) -> Result<Route, NoRoute> {
    if workload.facts.network != *mesh.network() {
        return to_network(mesh, workload, port, service, service_port);
    }
    let families = service.as_ref().map(|service| service.families).unwrap_or_default();
    let Some(address) = workload.address(families) else {
        return Ok(Route {
            to: To::Name(workload.hostname.clone(), port),
            tunnel: None,
            destination: Some(workload),
            service,
        });
    };
    let direct = SocketAddr::new(address, port);
    let (to, tunnel) = match workload.tunnel {
        Tunnel::None => (direct, None),
        Tunnel::Hbone => {
            let tunnel = TunnelTo {
                authority: direct.to_string(),
                expect: identities(&workload, service.as_deref())?,
                inner: None,
            };
            (SocketAddr::new(address, ports::INBOUND_HBONE), Some(tunnel))
        }
    };
    Ok(Route {
        to: To::Address(to),
        tunnel,
        destination: Some(workload),
        service,
    })
}

/// Into another network: a tunnel to its gateway, and one inside of it to the workload or to the service there.
fn to_network(
    mesh: &Mesh,
    workload: Arc<Workload>,
    port: u16,
    service: Option<Arc<Service>>,
    service_port: u16,
) -> Result<Route, NoRoute> {
    let unreachable = || NoRoute::NoNetworkGateway {
        workload: workload.uid().clone(),
        network: workload.facts.network.clone(),
    };
    let gateway = workload.network_gateway.as_ref().ok_or_else(unreachable)?;
    let (there, address) = gateway_of(mesh, None, gateway).ok_or_else(unreachable)?;
    let authority = match (&service, workload.addresses.first()) {
        (Some(service), _) => format!("{}:{service_port}", service.hostname),
        (None, Some(address)) => SocketAddr::new(*address, port).to_string(),
        (None, None) => return Err(unreachable()),
    };
    let inner = Inner {
        authority: authority.clone(),
        expect: identities(&workload, service.as_deref())?,
    };
    Ok(Route {
        to: To::Address(address),
        tunnel: Some(TunnelTo {
            authority,
            expect: identities(&there, None)?,
            inner: Some(inner),
        }),
        destination: Some(workload),
        service,
    })
}

/// To a waypoint, which is told `authority`.
fn through(mesh: &Mesh, from: &Workload, waypoint: &Gateway, authority: String) -> Result<Route, NoRoute> {
    let missing = || {
        NoRoute::NoWaypoint(match &waypoint.target {
            GatewayTarget::Service(key) => key.to_string(),
            GatewayTarget::Address(_, address) => address.to_string(),
        })
    };
    let (workload, to) = gateway_of(mesh, Some(from), waypoint).ok_or_else(missing)?;
    let named = match &waypoint.target {
        GatewayTarget::Service(key) => mesh.service(key),
        GatewayTarget::Address(network, address) => mesh.service_in(network, *address, &from.facts.namespace),
    };
    Ok(Route {
        to: To::Address(to),
        tunnel: Some(TunnelTo {
            authority,
            expect: identities(&workload, named.as_deref())?,
            inner: None,
        }),
        destination: Some(workload),
        service: None,
    })
}

/// A workload of a gateway, and where it ends tunnels. The service has to list that port, unless the workload says another of its own.
fn gateway_of(mesh: &Mesh, from: Option<&Workload>, gateway: &Gateway) -> Option<(Arc<Workload>, SocketAddr)> {
    let of_service = |service: Arc<Service>| {
        let from = from.map(|workload| From { workload });
        let chosen = mesh.endpoints(&service.key)?.choose(&service, gateway.port, from);
        let (workload, port) = chosen?;
        let address = workload.address(service.families)?;
        Some((workload, SocketAddr::new(address, port)))
    };
    match &gateway.target {
        GatewayTarget::Service(key) => of_service(mesh.service(key)?),
        GatewayTarget::Address(network, address) => {
            let namespace = from.map_or("", |from| &*from.facts.namespace);
            if let Some(service) = mesh.service_in(network, *address, namespace) {
                return of_service(service);
            }
            let workload = mesh.workload_in(network, *address)?;
            Some((workload, SocketAddr::new(*address, gateway.port)))
        }
    }
}

/// Who may answer: the workload, and what its service allows.
fn identities(workload: &Workload, service: Option<&Service>) -> Result<Identities, NoRoute> {
    let own = workload
        .identity()
        .ok_or_else(|| NoRoute::NoIdentity(workload.uid().clone()))?;
    let mut all: Identities = [own.clone()].into_iter().collect();
    all.extend(
        service
            .into_iter()
            .flat_map(|service| service.subject_alt_names.iter().cloned()),
    );
    Ok(all)
}

/// The address of a name, of a family that is there.
pub fn first_address(addresses: impl Iterator<Item = SocketAddr>) -> Option<IpAddr> {
    let all: Vec<_> = addresses.map(|address| address.ip().to_canonical()).collect();
    all.iter().find(|address| address.is_ipv4()).or_else(|| all.first()).copied()
}

#[cfg(test)]
mod tests;
