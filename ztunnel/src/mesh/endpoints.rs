//! The endpoints of one service, indexed by what they may have in common with a client.
//!
//! With a preference of, say, region and zone there is a bag for each region and one for each region and zone beside the one of all.
//! Choosing looks into at most as many bags as the preference is long.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hasher as _},
    net::IpAddr,
    sync::Arc,
};

use foldhash::fast::{FixedState, RandomState};
use parking_lot::RwLock;

use super::{
    bag::{Bag, Member},
    service::{Families, HealthPolicy, LoadBalancing, Mode, Scope, Service},
    workload::{Ports, Workload, target_port},
};

/// The endpoints of one service; a lock of its own, held for the time of one change or choice.
#[derive(Debug, Default)]
pub struct Endpoints {
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// All, whether they count now or not.
    all: HashMap<Arc<str>, Member, RandomState>,
    terms: Terms,
    /// Everybody who counts.
    everybody: Bag,
    /// By the first parts of the preference: how many, and what they are.
    nearer: HashMap<(usize, u64), Bag, RandomState>,
}

/// What of a service decides about its endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Terms {
    preference: Vec<Scope>,
    strict: bool,
    unhealthy_count: bool,
}

/// Where a client is.
#[derive(Clone, Copy, Debug)]
pub struct From<'a> {
    /// The client.
    pub workload: &'a Workload,
}

// === impl Endpoints ===

impl Endpoints {
    /// Adds or replaces an endpoint.
    pub(super) fn insert(&self, workload: Arc<Workload>, ports: Ports) {
        let mut inner = self.inner.write();
        inner.take_out(workload.uid());
        let member = Member { workload, ports };
        inner.put_in(&member);
        inner.all.insert(member.workload.uid().clone(), member);
    }

    /// Takes an endpoint away; whether nothing is left.
    pub(super) fn remove(&self, uid: &str) -> bool {
        let mut inner = self.inner.write();
        inner.take_out(uid);
        inner.all.remove(uid);
        inner.all.is_empty()
    }

    /// The service is now this one.
    pub(super) fn follow(&self, load_balancing: Option<&LoadBalancing>) {
        let terms = load_balancing.map(Terms::of).unwrap_or_default();
        if self.inner.read().terms == terms {
            return;
        }
        let mut inner = self.inner.write();
        inner.terms = terms;
        inner.everybody = Bag::default();
        inner.nearer.clear();
        let all: Vec<_> = inner.all.values().cloned().collect();
        for member in &all {
            inner.put_in(member);
        }
    }

    /// One endpoint for a connection to `port` of the service, and its own port.
    ///
    /// An endpoint that says nothing of the port takes the service's word for it; one that has no address of a wanted family counts
    /// only when it has a name to resolve.
    pub fn choose(&self, service: &Service, port: u16, from: Option<From<'_>>) -> Option<(Arc<Workload>, u16)> {
        let usable = |member: &Member| {
            target(service, member, port).is_some()
                && (member.workload.address(service.families).is_some() || !member.workload.hostname.is_empty())
        };
        let inner = self.inner.read();
        let member = inner.choose(from, usable)?;
        Some((member.workload.clone(), target(service, member, port)?))
    }

    /// The endpoint with this address.
    pub fn at(&self, address: IpAddr) -> Option<Arc<Workload>> {
        let inner = self.inner.read();
        let member = inner
            .all
            .values()
            .find(|member| member.workload.addresses.contains(&address))?;
        Some(member.workload.clone())
    }

    /// Whether a workload is one of them.
    pub fn contains(&self, uid: &str) -> bool {
        self.inner.read().all.contains_key(uid)
    }

    /// Addresses of those that count, for a service without one of its own.
    pub fn addresses(&self, families: Families, most: usize) -> Vec<IpAddr> {
        let inner = self.inner.read();
        inner
            .everybody
            .iter()
            .flat_map(|member| member.workload.addresses.iter().copied())
            .filter(|address| families.allow(*address))
            .take(most)
            .collect()
    }

    /// All, for display.
    pub fn all(&self) -> Vec<(Arc<Workload>, Ports)> {
        let inner = self.inner.read();
        inner
            .all
            .values()
            .map(|member| (member.workload.clone(), member.ports.clone()))
            .collect()
    }
}

/// The port of an endpoint.
fn target(service: &Service, member: &Member, port: u16) -> Option<u16> {
    target_port(&member.ports, port).or_else(|| service.target_port(port).filter(|_| member.ports.is_empty()))
}

// === impl Inner ===

impl Inner {
    fn put_in(&mut self, member: &Member) {
        if !member.workload.healthy && !self.terms.unhealthy_count {
            return;
        }
        self.everybody.insert(member.clone());
        for (depth, hash) in self.terms.keys(&member.workload) {
            self.nearer.entry((depth, hash)).or_default().insert(member.clone());
        }
    }

    fn take_out(&mut self, uid: &str) {
        let Some(before) = self.all.get(uid) else { return };
        self.everybody.remove(uid);
        for key in self.terms.keys(&before.workload) {
            if let Some(bag) = self.nearer.get_mut(&key) {
                bag.remove(uid);
                if bag.is_empty() {
                    self.nearer.remove(&key);
                }
            }
        }
    }

    fn choose(&self, from: Option<From<'_>>, usable: impl Fn(&Member) -> bool) -> Option<&Member> {
        if self.terms.preference.is_empty() {
            return self.everybody.choose(usable);
        }
        // Who is nobody has nothing in common with anybody.
        let mut keys = from.map(|from| self.terms.keys(from.workload)).unwrap_or_default();
        if self.terms.strict {
            keys.retain(|(depth, _)| *depth == self.terms.preference.len());
        }
        for key in keys.iter().rev() {
            if let Some(member) = self.nearer.get(key).and_then(|bag| bag.choose(&usable)) {
                return Some(member);
            }
        }
        if self.terms.strict {
            return None;
        }
        self.everybody.choose(usable)
    }
}

// === impl Terms ===

impl Terms {
    fn of(load_balancing: &LoadBalancing) -> Self {
        let LoadBalancing {
            preference,
            mode,
            health,
        } = load_balancing;
        let preferred = matches!(mode, Mode::Strict | Mode::Failover);
        Self {
            preference: if preferred { preference.clone() } else { Vec::new() },
            strict: *mode == Mode::Strict,
            unhealthy_count: *health == HealthPolicy::AllowAll,
        }
    }

    /// For one, two, three … parts of the preference: what this workload has of them.
    fn keys(&self, workload: &Workload) -> Vec<(usize, u64)> {
        let mut hasher = FixedState::default().build_hasher();
        let mut keys = Vec::with_capacity(self.preference.len());
        for (depth, scope) in self.preference.iter().enumerate() {
            hasher.write(part(workload, *scope).as_bytes());
            hasher.write_u8(0xff);
            keys.push((depth + 1, hasher.finish()));
        }
        keys
    }
}

fn part(workload: &Workload, scope: Scope) -> &str {
    match scope {
        Scope::Region => &workload.facts.region,
        Scope::Zone => &workload.facts.zone,
        Scope::Subzone => &workload.subzone,
        Scope::Node => &workload.node,
        Scope::Cluster => &workload.facts.cluster,
        Scope::Network => &workload.facts.network,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn placed(name: &str, region: &str, zone: &str, healthy: bool) -> Arc<Workload> {
        let mut workload = testing::workload(name, &["10.1.0.1"]);
        let facts = Arc::make_mut(&mut workload.facts);
        facts.region = region.into();
        facts.zone = zone.into();
        workload.healthy = healthy;
        Arc::new(workload)
    }

    fn chosen(endpoints: &Endpoints, service: &Service, client: &Workload) -> Vec<String> {
        let mut names: Vec<_> = (0..200)
            .filter_map(|_| endpoints.choose(service, 80, Some(From { workload: client })))
            .map(|(workload, _)| workload.facts.name.to_string())
            .collect();
        names.sort();
        names.dedup();
        names
    }

    #[test]
    fn the_nearest_endpoints_that_are_ready_are_chosen() {
        let mut service = testing::service("app/web", &[], &[(80, 8080)]);
        let endpoints = Endpoints::default();
        let ports: Ports = Arc::from([]);
        for workload in [
            placed("here", "r1", "z1", true),
            placed("here-too", "r1", "z1", true),
            placed("region", "r1", "z2", true),
            placed("far", "r2", "z1", true),
            placed("sick", "r1", "z1", false),
        ] {
            endpoints.insert(workload, ports.clone());
        }
        let client = placed("client", "r1", "z1", true);
        let mut follow = |mode, health| {
            service.load_balancing = Some(LoadBalancing {
                preference: vec![Scope::Region, Scope::Zone],
                mode,
                health,
            });
            endpoints.follow(service.load_balancing.as_ref());
        };
        follow(Mode::Failover, HealthPolicy::OnlyHealthy);
        let service = testing::service("app/web", &[], &[(80, 8080)]);
        assert_eq!(chosen(&endpoints, &service, &client), ["here", "here-too"]);
        endpoints.remove(placed("here", "", "", true).uid());
        endpoints.insert(placed("here-too", "r1", "z1", false), ports.clone());
        assert_eq!(chosen(&endpoints, &service, &client), ["region"]);
        assert_eq!(
            chosen(&endpoints, &service, &placed("x", "r3", "z1", true)),
            ["far", "region"]
        );
        let follow = |mode, health| {
            endpoints.follow(Some(&LoadBalancing {
                preference: vec![Scope::Region, Scope::Zone],
                mode,
                health,
            }));
        };
        follow(Mode::Strict, HealthPolicy::OnlyHealthy);
        assert!(chosen(&endpoints, &service, &client).is_empty());
        follow(Mode::Strict, HealthPolicy::AllowAll);
        assert_eq!(chosen(&endpoints, &service, &client), ["here-too", "sick"]);
        endpoints.follow(None);
        assert_eq!(chosen(&endpoints, &service, &client), ["far", "region"]);
    }

    #[test]
    fn a_port_that_the_endpoint_names_goes_before_the_services_and_an_unknown_one_goes_nowhere() {
        let service = testing::service("app/web", &[], &[(80, 8080), (81, 0)]);
        let endpoints = Endpoints::default();
        endpoints.insert(placed("plain", "", "", true), Arc::from([]));
        let port = |port| endpoints.choose(&service, port, None).map(|(_, port)| port);
        assert_eq!((port(80), port(81), port(82)), (Some(8080), None, None));
        endpoints.insert(placed("plain", "", "", true), Arc::from([(80, 9090), (81, 9091)]));
        assert_eq!((port(80), port(81), port(82)), (Some(9090), Some(9091), None));
    }
}
