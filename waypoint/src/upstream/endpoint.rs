//! Endpoints: one place that can answer, and the set of them that a cluster has at a moment.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64},
    },
};

use super::TransportTerms;
use cairn_policy::balance::{AliasTable, PriorityHealth, smooth_sequence};

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
    pub endpoints: Vec<Arc<Endpoint>>,
}

/// Endpoints of one priority.
#[derive(Debug, Default)]
pub struct Priority {
    /// By locality.
    pub localities: Vec<LocalityGroup>,
    /// Those that may be chosen, in order.
    pub available: Vec<Arc<Endpoint>>,
    /// All of them, for panic.
    pub all: Vec<Arc<Endpoint>>,
    /// How weights spread the requests over `available`; `None` when all weights are the same.
    pub spread: Option<Spread>,
    /// Counts, for the choice among priorities.
    pub health: PriorityHealth,
}

/// Unequal weights, prepared.
#[derive(Debug)]
pub struct Spread {
    /// For a choice by a random number.
    pub alias: AliasTable,
    /// For a choice in turn.
    pub sequence: Vec<u32>,
}

/// The endpoints of a cluster at a moment.
#[derive(Debug, Default)]
pub struct EndpointSet {
    /// By priority, 0 first.
    pub priorities: Vec<Priority>,
    /// Whether istiod has said anything yet: a cluster without an answer is not the same as one without endpoints.
    pub known: bool,
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

// === impl Spread ===

impl Spread {
    fn of(endpoints: &[Arc<Endpoint>]) -> Option<Self> {
        if endpoints
            .windows(2)
            .all(|pair| matches!(pair, [a, b] if a.weight == b.weight))
        {
            return None;
        }
        let weights: Vec<u32> = endpoints.iter().map(|endpoint| endpoint.weight).collect();
        Some(Self {
            alias: AliasTable::new(&weights)?,
            sequence: smooth_sequence(&weights),
        })
    }
}

// === impl EndpointSet ===

impl EndpointSet {
    /// Puts endpoints into their order: `groups` are (priority, locality, locality's weight, endpoints).
    pub fn new(groups: Vec<(usize, LocalityGroup)>) -> Self {
        let levels = groups.iter().map(|(priority, _)| priority + 1).max().unwrap_or(0);
        let mut priorities: Vec<Priority> = std::iter::repeat_with(Priority::default).take(levels).collect();
        for (priority, group) in groups {
            if let Some(level) = priorities.get_mut(priority) {
                level.all.extend(group.endpoints.iter().cloned());
                level.localities.push(group);
            }
        }
        for level in &mut priorities {
            level.available = level
                .all
                .iter()
                .filter(|endpoint| endpoint.health == Health::Healthy)
                .cloned()
                .collect();
            if level.available.is_empty() {
                level.available = level
                    .all
                    .iter()
                    .filter(|endpoint| endpoint.health == Health::Degraded)
                    .cloned()
                    .collect();
            }
            let count = |health: Health| {
                u32::try_from(level.all.iter().filter(|endpoint| endpoint.health == health).count()).unwrap_or(u32::MAX)
            };
            level.health = PriorityHealth {
                healthy: count(Health::Healthy),
                degraded: count(Health::Degraded),
                total: u32::try_from(level.all.len()).unwrap_or(u32::MAX),
            };
            level.spread = Spread::of(&level.available);
        }
        Self { priorities, known: true }
    }

    /// Every endpoint.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.priorities.iter().flat_map(|priority| &priority.all)
    }
}
