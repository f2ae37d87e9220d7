//! A workload: a pod, a workload entry, or an endpoint that is only known by its host name.

use std::{net::IpAddr, sync::Arc};

use cairn_exchange::SpiffeId;
use smallvec::SmallVec;

/// Everything that is known of a workload. Texts are shared between workloads that have them in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// What metrics and logs tell of it, and its identity.
    pub facts: Arc<cairn_exchange::Workload>,
    /// Its addresses; none for a workload that only has a host name.
    pub addresses: SmallVec<[IpAddr; 1]>,
    /// The name to resolve where there is no address; empty otherwise.
    pub hostname: Arc<str>,
    /// How its inbound traffic arrives.
    pub tunnel: Tunnel,
    /// The waypoint of the workload itself.
    pub waypoint: Option<Gateway>,
    /// The gateway of its network.
    pub network_gateway: Option<Gateway>,
    /// The node that it runs on.
    pub node: Arc<str>,
    /// The third part of its locality.
    pub subzone: Arc<str>,
    /// It ends tunnels itself, as waypoints do.
    pub native_tunnel: bool,
    /// How tunnelled connections reach the application, where it is not by TCP as they came.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The services that it is an endpoint of, by their keys, and how their ports are its ports.
    pub services: Box<[(Arc<str>, Ports)]>,
    /// Keys of the policies that select it.
    pub policies: Box<[Arc<str>]>,
    /// Whether it is ready for connections.
    pub healthy: bool,
    /// It has its node's address, which is no name for it.
    pub host_network: bool,
    /// Its share of connections.
    pub capacity: u32,
}

/// How the ports of a service are those of an endpoint, sorted by the service's.
pub type Ports = Arc<[(u16, u16)]>;

/// How inbound traffic arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tunnel {
    /// As TCP.
    None,
    /// As HBONE.
    Hbone,
}

/// How tunnelled connections reach the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    /// What is said first.
    pub protocol: ApplicationProtocol,
    /// Another port than the one that was asked for.
    pub port: Option<u16>,
}

/// What an application is told before a connection's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplicationProtocol {
    /// Nothing.
    None,
    /// The PROXY protocol, with the peer's identity.
    Proxy,
}

/// Where traffic for somebody else goes: a waypoint, or the gateway of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Who.
    pub target: GatewayTarget,
    /// Where it ends tunnels.
    pub port: u16,
}

/// How a gateway is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatewayTarget {
    /// The key of its service.
    Service(Arc<str>),
    /// An address of a service or a pod.
    Address(Arc<str>, IpAddr),
}

// === impl Workload ===

impl Workload {
    /// Its unique name.
    pub fn uid(&self) -> &Arc<str> {
        &self.facts.uid
    }

    /// Who it is.
    pub fn identity(&self) -> Option<&SpiffeId> {
        self.facts.identity.as_ref()
    }

    /// Its port behind a service's, when it is an endpoint of it. A service port that is mapped to nothing goes by its own number
    /// to no port, since a named port has to be named by the endpoint.
    pub fn target_port(&self, service: &str, port: u16) -> Option<u16> {
        let (_, ports) = self.services.iter().find(|(key, _)| **key == *service)?;
        target_port(ports, port)
    }

    /// An address of one family, or any.
    pub fn address(&self, families: super::Families) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| families.allow(*address))
    }
}

/// The target of one port.
pub(super) fn target_port(ports: &[(u16, u16)], port: u16) -> Option<u16> {
    let at = ports.binary_search_by_key(&port, |(service, _)| *service).ok()?;
    ports.get(at).map(|(_, target)| *target).filter(|target| *target != 0)
}
