//! Who is who in the mesh: workloads by address, services by address, as istiod's workload discovery tells.
//!
//! A table of its own beside the snapshots: it has an entry for every pod of the mesh and changes with every pod, and a request reads
//! it at most twice. Resources are `istio.workload.Address` (workloads and services) or `istio.workload.Workload`; names of removed
//! resources that are not known here are ignored, as istiod sends such (contract seen §1, row 1.9).

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use cairn_exchange::Workload;
use foldhash::fast::RandomState;
use parking_lot::RwLock;

/// A service as workload discovery describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshService {
    /// Resource name, `namespace/hostname`.
    pub name: Arc<str>,
    /// Full host name.
    pub hostname: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// All addresses that clients may use.
    pub addresses: Vec<IpAddr>,
}

/// Number of shards by address; a writer holds one at a time for an insertion.
const SHARDS: usize = 32;

/// Workloads of one shard, by network and address.
type Shard = RwLock<HashMap<(Arc<str>, IpAddr), Arc<Workload>, RandomState>>;

/// The table. Lookups by address take a shard's read lock for the time of a hash lookup.
#[derive(Debug)]
pub struct Workloads {
    network: Arc<str>,
    by_address: Vec<Shard>,
    services_by_address: RwLock<HashMap<IpAddr, Arc<MeshService>, RandomState>>,
    /// Several namespaces may have a service of one name; in the order of their resource names.
    services_by_host: RwLock<HashMap<Arc<str>, Vec<Arc<MeshService>>, RandomState>>,
    /// Addresses of each resource, to find what a removal or a change takes away.
    known: RwLock<HashMap<Arc<str>, Known, RandomState>>,
}

#[derive(Clone, Debug)]
enum Known {
    Workload(Arc<Workload>, Vec<IpAddr>),
    Service(Arc<MeshService>),
}

// === impl Workloads ===

impl Workloads {
    /// An empty table for a proxy in this network.
    pub fn new(network: impl Into<Arc<str>>) -> Self {
        Self {
            network: network.into(),
            by_address: std::iter::repeat_with(RwLock::default).take(SHARDS).collect(),
            services_by_address: RwLock::default(),
            services_by_host: RwLock::default(),
            known: RwLock::default(),
        }
    }

    /// The network that this proxy is in; empty for the default one.
    pub fn network(&self) -> &str {
        &self.network
    }

    fn shard(&self, address: IpAddr) -> Option<&Shard> {
        let low = match address {
            IpAddr::V4(v4) => u32::from(v4) as usize,
            IpAddr::V6(v6) => u128::from(v6) as usize,
        };
        self.by_address.get(low % SHARDS)
    }

    /// The workload with this address in our network.
    pub fn workload_at(&self, address: IpAddr) -> Option<Arc<Workload>> {
        let key = (self.network.clone(), address.to_canonical());
        self.shard(key.1)?.read().get(&key).cloned()
    }

    /// The service with this address.
    pub fn service_at(&self, address: IpAddr) -> Option<Arc<MeshService>> {
        self.services_by_address.read().get(&address.to_canonical()).cloned()
    }

    /// The address of the service with this host name: of the first namespace, where several have one.
    pub fn address_of(&self, hostname: &str) -> Option<IpAddr> {
        let by_host = self.services_by_host.read();
        by_host
            .get(hostname)?
            .iter()
            .find_map(|service| service.addresses.first().copied())
    }

    /// Adds or replaces a workload.
    pub fn insert_workload(&self, workload: Workload, addresses: Vec<IpAddr>) {
        let workload = Arc::new(workload);
        self.remove(&workload.uid);
        for address in &addresses {
            if let Some(shard) = self.shard(*address) {
                shard.write().insert((workload.network.clone(), *address), workload.clone());
            }
        }
        self.known
            .write()
            .insert(workload.uid.clone(), Known::Workload(workload, addresses));
    }

    /// Adds or replaces a service.
    pub fn insert_service(&self, service: MeshService) {
        let service = Arc::new(service);
        self.remove(&service.name);
        let mut by_address = self.services_by_address.write();
        for address in &service.addresses {
            by_address.insert(*address, service.clone());
        }
        drop(by_address);
        let mut by_host = self.services_by_host.write();
        let named = by_host.entry(service.hostname.clone()).or_default();
        named.push(service.clone());
        named.sort_by(|a, b| a.name.cmp(&b.name));
        drop(by_host);
        self.known.write().insert(service.name.clone(), Known::Service(service));
    }

    /// Takes a resource away; an unknown name is nothing to do.
    pub fn remove(&self, name: &str) {
        let known = self.known.write().remove(name);
        match known {
            None => {}
            Some(Known::Workload(workload, addresses)) => {
                for address in addresses {
                    if let Some(shard) = self.shard(address) {
                        let mut shard = shard.write();
                        let key = (workload.network.clone(), address);
                        // The address may have gone to another workload meanwhile.
                        if shard.get(&key).is_some_and(|now| Arc::ptr_eq(now, &workload)) {
                            shard.remove(&key);
                        }
                    }
                }
            }
            Some(Known::Service(service)) => {
                let mut by_host = self.services_by_host.write();
                if let Some(named) = by_host.get_mut(&service.hostname) {
                    named.retain(|other| !Arc::ptr_eq(other, &service));
                    if named.is_empty() {
                        by_host.remove(&service.hostname);
                    }
                }
                drop(by_host);
                let mut by_address = self.services_by_address.write();
                for address in &service.addresses {
                    if by_address.get(address).is_some_and(|now| Arc::ptr_eq(now, &service)) {
                        by_address.remove(address);
                    }
                }
            }
        }
    }

    /// How many workloads and services are known.
    pub fn counts(&self) -> (usize, usize) {
        let known = self.known.read();
        let services = known.values().filter(|known| matches!(known, Known::Service(_))).count();
        (known.len() - services, services)
    }

    /// All services, by name, for display.
    pub fn services(&self) -> Vec<Arc<MeshService>> {
        let known = self.known.read();
        let mut all: Vec<_> = known
            .values()
            .filter_map(|known| {
                if let Known::Service(service) = known {
                    Some(service.clone())
                } else {
                    None
                }
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_found_by_its_name_until_it_is_gone() {
        let workloads = Workloads::new("");
        let service = |namespace: &str, address: &str| MeshService {
            name: format!("{namespace}/api.example.com").into(),
            hostname: "api.example.com".into(),
            namespace: namespace.into(),
            addresses: address.parse().into_iter().collect(),
        };
        let found = || workloads.address_of("api.example.com").map(|address| address.to_string());
        assert_eq!(found(), None);
        workloads.insert_service(service("b", "10.0.0.2"));
        assert_eq!(found().as_deref(), Some("10.0.0.2"));
        workloads.insert_service(service("a", "10.0.0.1"));
        assert_eq!(found().as_deref(), Some("10.0.0.1"));
        workloads.insert_service(service("a", "10.0.0.3"));
        assert_eq!(found().as_deref(), Some("10.0.0.3"));
        workloads.remove("a/api.example.com");
        assert_eq!(found().as_deref(), Some("10.0.0.2"));
        workloads.remove("b/api.example.com");
        assert_eq!(found(), None);
        assert!(workloads.services_by_host.read().is_empty());
    }
}
