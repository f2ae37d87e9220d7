//! A service: names and addresses that stand for endpoints.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::workload::{Gateway, target_port};

/// Everything that is known of a service but for its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `namespace/hostname`.
    pub key: Arc<str>,
    /// Its name in its namespace.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its full host name.
    pub hostname: Arc<str>,
    /// Addresses that clients use.
    pub vips: Vec<Vip>,
    /// Its ports, and the endpoints' where they are numbers; sorted.
    pub ports: Vec<(u16, u16)>,
    /// Names that its endpoints may have beside their own.
    pub subject_alt_names: Vec<cairn_exchange::SpiffeId>,
    /// Where its traffic goes first.
    pub waypoint: Option<Gateway>,
    /// Several such places and their shares; they go before the single one.
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How endpoints are chosen.
    pub load_balancing: Option<LoadBalancing>,
    /// Which addresses of endpoints may be used.
    pub families: Families,
    /// It goes before others of its host name.
    pub canonical: bool,
    /// Only its own namespace sees it.
    pub private: bool,
}

/// An address, or a range of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vip {
    /// The network that it means something in.
    pub network: Arc<str>,
    /// The addresses; a single one has the length of its family.
    pub range: IpNet,
}

/// One waypoint of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightedWaypoint {
    /// Who.
    pub gateway: Gateway,
    /// Its share.
    pub weight: u32,
}

/// How endpoints are chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadBalancing {
    /// What an endpoint should have in common with the client, most important first.
    pub preference: Vec<Scope>,
    /// What that means.
    pub mode: Mode,
    /// Whether endpoints that are not ready count.
    pub health: HealthPolicy,
}

/// Something that client and endpoint may have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Region.
    Region,
    /// Zone.
    Zone,
    /// Third part of the locality.
    Subzone,
    /// Node.
    Node,
    /// Cluster.
    Cluster,
    /// Network.
    Network,
}

/// What a preference means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing.
    Unspecified,
    /// Endpoints that have all of it in common, and no others.
    Strict,
    /// Endpoints that have most of it in common.
    Failover,
    /// Where the client wanted to go.
    Passthrough,
}

/// Which endpoints count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthPolicy {
    /// Those that are ready.
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// Which addresses may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Families {
    /// All.
    #[default]
    Any,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

// === impl Service ===

impl Service {
    /// Whether clients of this namespace see it.
    pub fn is_visible_to(&self, namespace: &str) -> bool {
        !self.private || *self.namespace == *namespace
    }

    /// The port of an endpoint that says nothing of its own.
    pub fn target_port(&self, port: u16) -> Option<u16> {
        target_port(&self.ports, port)
    }

    /// Whether it has this port.
    pub fn has_port(&self, port: u16) -> bool {
        self.ports.binary_search_by_key(&port, |(service, _)| *service).is_ok()
    }

    /// Whether its traffic goes to a waypoint first.
    pub fn has_waypoint(&self) -> bool {
        self.waypoint.is_some() || !self.weighted_waypoints.is_empty()
    }

    /// The waypoint for one connection: one of the set by its shares, else the single one. `roll` is below 1.
    pub fn choose_waypoint(&self, roll: f64) -> Option<&Gateway> {
        let total: f64 = self.weighted_waypoints.iter().map(|one| f64::from(one.weight)).sum();
        let mut at = roll * total;
        let weighted = self.weighted_waypoints.iter().filter(|one| one.weight > 0).find(|one| {
            at -= f64::from(one.weight);
            at < 0.0
        });
        weighted.map(|one| &one.gateway).or(self.waypoint.as_ref())
    }
}

// === impl Families ===

impl Families {
    /// Whether an address is of one of them.
    pub fn allow(self, address: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::GatewayTarget;

    #[test]
    fn a_waypoint_is_chosen_by_shares_and_a_set_without_shares_leaves_it_to_the_single_one() {
        let gateway = |name: &str| Gateway {
            target: GatewayTarget::Service(name.into()),
            port: 15008,
        };
        let mut service = crate::testing::service("app/web", &["10.0.0.1"], &[(80, 8080)]);
        assert_eq!(service.choose_waypoint(0.5), None);
        service.waypoint = Some(gateway("single"));
        let weighted = |name, weight| WeightedWaypoint {
            gateway: gateway(name),
            weight,
        };
        service.weighted_waypoints = vec![weighted("a", 0), weighted("b", 0)];
        assert_eq!(service.choose_waypoint(0.5), Some(&gateway("single")));
        service.weighted_waypoints = vec![weighted("a", 1), weighted("none", 0), weighted("b", 3)];
        for (roll, want) in [(0.0, "a"), (0.24, "a"), (0.25, "b"), (0.999, "b")] {
            assert_eq!(service.choose_waypoint(roll), Some(&gateway(want)), "{roll}");
        }
    }
}
