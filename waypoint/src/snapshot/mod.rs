//! Everything that istiod said about services, compiled and immutable.
//!
//! A request takes one [`Snapshot`] when its head has been read and keeps it; the next request on the same connection takes the
//! newest. What lives longer than a configuration (connections, counters, ejections) is not here but in the state that clusters of
//! successive snapshots share by name ([`crate::upstream::ClusterState`]).

pub mod chain;
pub mod matcher;
mod table;

use std::{net::SocketAddr, sync::Arc};

pub use chain::{Chain, ChainKind, HttpChain, HttpSettings, Refusal, ServerNameUse, TcpChain};
pub use table::Table;

use crate::{
    upstream::{Cluster, INNER_ORIGINATE, ORIGINATE, OUTER_ORIGINATE, Target},
    workloads::Workloads,
};
use matcher::{Facts, Node, Outcome, Spoken};

/// One version of the configuration.
#[derive(Debug)]
pub struct Snapshot {
    /// Counts published versions.
    pub version: u64,
    /// How tunnels are accepted: the listener `connect_terminate`. `None` until istiod has sent it.
    pub terminate: Option<Arc<Terminate>>,
    /// Which chain serves which authority: `main_internal`.
    pub matcher: Option<Arc<Node>>,
    /// Chains by name.
    pub chains: Table<Arc<Chain>>,
    /// Clusters by name.
    pub clusters: Table<Arc<Cluster>>,
    /// Workloads and services of the mesh; a live table of its own.
    pub workloads: Arc<Workloads>,
}

/// How tunnels are accepted (contract xds §2.2).
#[derive(Debug, PartialEq)]
pub struct Terminate {
    /// Addresses to listen on.
    pub addresses: Vec<SocketAddr>,
    /// What a client must show.
    pub tls: cairn_identity::ServerTerms,
    /// Streams that one tunnel may have open.
    pub max_concurrent_streams: u32,
    /// PING after this much silence, and how long the answer may take.
    pub keepalive: Option<(std::time::Duration, std::time::Duration)>,
    /// Who may ask for tunnels (contract xds §6.9).
    pub rbac: cairn_policy::rbac::Filters,
    /// What becomes of the `server` header of answers to CONNECT.
    pub server: cairn_policy::headers::outgoing::ServerHeader,
    /// Told of CONNECTs that are refused.
    pub access_logs: cairn_telemetry::access_log::AccessLog,
    /// Why every tunnel is refused, when the listener has something that we cannot enforce.
    pub refuse: Option<Refusal>,
}

/// What serves a tunnel.
#[derive(Clone, Debug)]
pub enum Serves {
    /// HTTP, whatever the client speaks.
    Http(Arc<Chain>),
    /// Bytes.
    Tcp(Arc<Chain>),
    /// It depends on what the client speaks: HTTP for HTTP/1.1 and HTTP/2, else TCP.
    Detect,
    /// Nobody.
    Nobody(Unserved),
}

/// Why nobody serves a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unserved {
    /// Nothing is known of services yet.
    NotYet,
    /// There is no such service, or no longer.
    NoService,
    /// What chooses its chain is beyond us.
    Unsupported,
    /// Its chain is missing: it could never be applied.
    NotApplied,
}

// === impl Snapshot ===

impl Snapshot {
    /// The configuration before anything has arrived.
    pub fn empty(workloads: Arc<Workloads>) -> Self {
        Self {
            version: 0,
            terminate: None,
            matcher: None,
            chains: Table::default(),
            clusters: Table::default(),
            workloads,
        }
    }

    /// What serves an inner connection, given what is known of it.
    pub fn serves(&self, facts: &Facts<'_>) -> Serves {
        let Some(matcher) = &self.matcher else {
            return Serves::Nobody(Unserved::NotYet);
        };
        let mut outcome = matcher.find(facts);
        let other;
        if outcome == Outcome::Nothing {
            // istiod puts one of several addresses of a ServiceEntry into the matcher (contract seen §1, row 2.5); ztunnel may
            // use any.
            other = self.sibling_address(facts);
            if let Some(address) = other {
                outcome = matcher.find(&Facts {
                    destination_ip: Some(address),
                    ..*facts
                });
            }
        }
        match outcome {
            Outcome::Detect => Serves::Detect,
            Outcome::Refused => Serves::Nobody(Unserved::Unsupported),
            Outcome::Nothing => Serves::Nobody(Unserved::NoService),
            Outcome::Chain(name) => match self.chains.get(name) {
                None => Serves::Nobody(Unserved::NotApplied),
                Some(chain) => match chain.kind {
                    ChainKind::Http(_) => Serves::Http(chain.clone()),
                    ChainKind::Tcp(_) => Serves::Tcp(chain.clone()),
                    // A refused chain refuses in the way of what is spoken; its name says what istiod meant it for.
                    ChainKind::Refused { http: true } => Serves::Http(chain.clone()),
                    ChainKind::Refused { http: false } => Serves::Tcp(chain.clone()),
                },
            },
        }
    }

    /// Fingerprint of the terms under which tunnels to such an endpoint are made now.
    pub fn tunnel_terms(&self, target: &Target) -> u64 {
        let terms = |name| self.clusters.get(name).map_or(0, |cluster| cluster.transport_hash);
        match target {
            Target::Double { .. } => terms(OUTER_ORIGINATE).rotate_left(1) ^ terms(INNER_ORIGINATE),
            Target::Tunnel { .. } | Target::Plain(_) | Target::Original { .. } => terms(ORIGINATE),
        }
    }

    /// Another address of the service that owns this one, if the matcher knows that.
    fn sibling_address(&self, facts: &Facts<'_>) -> Option<std::net::IpAddr> {
        let address = facts.destination_ip?;
        let matcher = self.matcher.as_ref()?;
        let service = self.workloads.service_at(address)?;
        service
            .addresses
            .iter()
            .copied()
            .filter(|other| *other != address)
            .find(|other| {
                matcher.find(&Facts {
                    destination_ip: Some(*other),
                    ..*facts
                }) != Outcome::Nothing
            })
    }
}

impl Serves {
    /// The chain, when there is one.
    pub fn chain(&self) -> Option<&Arc<Chain>> {
        match self {
            Serves::Http(chain) | Serves::Tcp(chain) => Some(chain),
            Serves::Detect | Serves::Nobody(_) => None,
        }
    }
}

impl Unserved {
    /// For people.
    pub fn why(self) -> &'static str {
        match self {
            Unserved::NotYet => "the configuration of services has not arrived yet",
            Unserved::NoService => "no service of this waypoint has this address and port",
            Unserved::Unsupported => "what chooses the chain of this service is not supported: see /unsupported",
            Unserved::NotApplied => "the chain of this service could not be applied",
        }
    }
}

/// Facts with the outcome of detection filled in.
pub fn spoken<'a>(facts: &Facts<'a>, spoken: Spoken) -> Facts<'a> {
    Facts {
        spoken: Some(spoken),
        ..*facts
    }
}
