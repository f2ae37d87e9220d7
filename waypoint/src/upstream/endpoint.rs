//! Endpoints: places that can answer.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64},
    },
};

use cairn_exchange::clock::Instant;
use cairn_policy::balance::Labels;

use super::{Latency, Monitor, TransportTerms};

/// How an endpoint is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Through a tunnel of `connect_originate`: CONNECT `address` at `gateway`'s or its own IP, port 15008.
    Tunnel {
        /// What the CONNECT asks for: `podIP:port`.
        address: SocketAddr,
        /// Another place to send the tunnel to (endpoint metadata `waypoint`).
        gateway: Option<SocketAddr>,
    },
    /// Through a tunnel inside of a tunnel to another network's gateway (`inner_connect_originate`).
    Double {
        /// The gateway.
        gateway: SocketAddr,
        /// The service that both tunnels ask for: `web.app.svc.cluster.local:80`.
        service: Arc<str>,
    },
    /// Plainly, by TCP.
    Plain(SocketAddr),
    /// Where the client wanted to go: by tunnel (`encap`) or plainly (original destination).
    Original {
        /// Whether in a tunnel.
        tunnel: bool,
    },
}

/// Health as istiod says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    /// May be chosen.
    Healthy,
    /// May be chosen when too few are healthy.
    Degraded,
    /// Not chosen, unless in panic.
    Unhealthy,
    /// Gets no new requests.
    Draining,
}

/// Region, zone and sub-zone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Sub-zone.
    pub sub_zone: Arc<str>,
}

/// What lives as long as an endpoint is known, whatever configuration names it.
#[derive(Debug, Default)]
pub struct EndpointState {
    /// Requests (or TCP connections) under way.
    pub active: AtomicU32,
    /// Requests ever sent.
    pub total: AtomicU64,
    /// Idle and shared connections.
    pub connections: crate::upstream::connections::Connections,
    /// How it does.
    pub monitor: Monitor,
    /// How long it takes, where that decides.
    pub latency: Latency,
}

/// One endpoint of a cluster.
#[derive(Debug)]
pub struct Endpoint {
    /// How to reach it.
    pub target: Target,
    /// As Envoy prints it in logs: `envoy://connect_originate/10.244.0.10:8080`.
    pub display: Arc<str>,
    /// Health.
    pub health: Health,
    /// Share of the requests, at least 1.
    pub weight: u32,
    /// Where it is.
    pub locality: Arc<Locality>,
    /// Its host name, where it is told.
    pub hostname: Option<Arc<str>>,
    /// What consistent hashing knows it by, where it is told (metadata `hash_key`).
    pub hash_key: Option<Arc<str>>,
    /// What it says of itself, for subsets.
    pub labels: Arc<Labels>,
    /// Since when it is healthy: how warm it is.
    pub healthy_since: Instant,
    /// What is put onto connections to it, where that is something else than its cluster says of all.
    pub transport: Option<Arc<TransportTerms>>,
    /// What lives on.
    pub state: Arc<EndpointState>,
}

/// Endpoints of one locality in one priority.
#[derive(Debug)]
pub struct LocalityGroup {
    /// Where they are.
    pub locality: Arc<Locality>,
    /// Weight among the localities of the priority, for locality-weighted balancing.
    pub weight: u32,
    /// Its endpoints.
    pub endpoints: Arc<[Arc<Endpoint>]>,
}

// === impl Target ===

impl Target {
    /// The address behind it, when it has one of its own.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Target::Tunnel { address, .. } | Target::Plain(address) => Some(*address),
            Target::Double { gateway, .. } => Some(*gateway),
            Target::Original { .. } => None,
        }
    }
}

// === impl Endpoint ===

impl Endpoint {
    /// Whether it may be chosen before others: istiod says that it is healthy, and it was not taken out.
    pub fn is_healthy(&self) -> bool {
        self.health == Health::Healthy && !self.state.monitor.is_ejected()
    }

    /// Whether it may be chosen when healthy ones do not suffice.
    pub fn is_degraded(&self) -> bool {
        self.health == Health::Degraded && !self.state.monitor.is_ejected()
    }

    /// What consistent hashing knows it by.
    pub fn hash_key(&self, by_hostname: bool) -> &str {
        let name = self.hostname.as_ref().filter(|_| by_hostname);
        self.hash_key.as_ref().or(name).unwrap_or(&self.display)
    }
}
