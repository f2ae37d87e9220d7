//! The table of the mesh.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use papaya::HashMap;
use tokio::sync::watch;

use super::{
    endpoints::Endpoints,
    service::Service,
    workload::{GatewayTarget, Workload},
};

type Map<K, V> = HashMap<K, V, RandomState>;
/// A range of addresses in a network, and whose it is.
type Range = (Arc<str>, ipnet::IpNet, Arc<Service>);
/// An address in a network.
type Place = (Arc<str>, IpAddr);

/// Everything known of workloads and services.
///
/// One writer at a time; readers never wait for it. A change puts the new in before it takes the old away, so that what stays the
/// same is never missing in between.
#[derive(Debug)]
pub struct Mesh {
    network: Arc<str>,
    workloads: Map<Arc<str>, Arc<Workload>>,
    by_address: Map<Place, Arc<Workload>>,
    services: Map<Arc<str>, Arc<Service>>,
    /// Several services may have one address or one name, in different namespaces.
    by_vip: Map<Place, Arc<[Arc<Service>]>>,
    by_host: Map<Arc<str>, Arc<[Arc<Service>]>>,
    /// Services whose addresses are ranges; few, the longest first.
    ranges: ArcSwap<Vec<Range>>,
    endpoints: Map<Arc<str>, Arc<Endpoints>>,
    workload_count: AtomicUsize,
    version: watch::Sender<u64>,
}

// === impl Mesh ===

impl Mesh {
    /// An empty table, for a proxy in this network.
    pub fn new(network: impl Into<Arc<str>>) -> Self {
        Self {
            network: network.into(),
            workloads: Map::default(),
            by_address: Map::default(),
            services: Map::default(),
            by_vip: Map::default(),
            by_host: Map::default(),
            ranges: ArcSwap::default(),
            endpoints: Map::default(),
            workload_count: AtomicUsize::new(0),
            version: watch::Sender::new(0),
        }
    }

    /// The network that we are in.
    pub fn network(&self) -> &Arc<str> {
        &self.network
    }

    /// Changes with each push, for those who wait for somebody to appear.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// A push has been applied.
    pub fn pushed(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    // --- looking up

    /// A workload by its unique name.
    pub fn workload(&self, uid: &str) -> Option<Arc<Workload>> {
        self.workloads.pin().get(uid).cloned()
    }

    /// The workload with this address in our network.
    pub fn workload_at(&self, address: IpAddr) -> Option<Arc<Workload>> {
        self.workload_in(&self.network, address)
    }

    /// The workload with this address in a network.
    pub fn workload_in(&self, network: &Arc<str>, address: IpAddr) -> Option<Arc<Workload>> {
        let place = (network.clone(), address.to_canonical());
        self.by_address.pin().get(&place).cloned()
    }

    /// A service by its key.
    pub fn service(&self, key: &str) -> Option<Arc<Service>> {
        self.services.pin().get(key).cloned()
    }

    /// The service that an address of our network stands for, seen from a namespace.
    pub fn service_at(&self, address: IpAddr, namespace: &str) -> Option<Arc<Service>> {
        self.service_in(&self.network, address, namespace)
    }

    /// The service that an address stands for, seen from a namespace: the exact address first, then the longest range.
    pub fn service_in(&self, network: &Arc<str>, address: IpAddr, namespace: &str) -> Option<Arc<Service>> {
        let address = address.to_canonical();
        let place = (network.clone(), address);
        if let Some(service) = self.by_vip.pin().get(&place).and_then(|all| preferred(all, namespace)) {
            return Some(service);
        }
        let ranges = self.ranges.load();
        ranges
            .iter()
            .find(|(of, range, service)| of == network && range.contains(&address) && service.is_visible_to(namespace))
            .map(|(_, _, service)| service.clone())
    }

    /// The service of a host name, seen from a namespace.
    pub fn service_named(&self, hostname: &str, namespace: &str) -> Option<Arc<Service>> {
        let by_host = self.by_host.pin();
        by_host.get(hostname).and_then(|all| preferred(all, namespace))
    }

    /// The endpoints of a service; none where nobody has been one yet.
    pub fn endpoints(&self, key: &str) -> Option<Arc<Endpoints>> {
        self.endpoints.pin().get(key).cloned()
    }

    /// Whether a gateway is this workload.
    pub fn is_behind(&self, target: &GatewayTarget, workload: &Workload) -> bool {
        let of_service = |key: &str| {
            self.endpoints(key)
                .is_some_and(|endpoints| endpoints.contains(workload.uid()))
        };
        match target {
            GatewayTarget::Service(key) => of_service(key),
            GatewayTarget::Address(network, address) => match self.service_in(network, *address, &workload.facts.namespace) {
                Some(service) => of_service(&service.key),
                None => *network == workload.facts.network && workload.addresses.contains(address),
            },
        }
    }

    /// How many workloads and services there are.
    pub fn counts(&self) -> (usize, usize) {
        (self.workload_count.load(Relaxed), self.services.pin().len())
    }

    /// All workloads, by their unique names.
    pub fn workloads(&self) -> Vec<Arc<Workload>> {
        let mut all: Vec<_> = self.workloads.pin().values().cloned().collect();
        all.sort_by(|a, b| a.uid().cmp(b.uid()));
        all
    }

    /// All services, by their keys.
    pub fn services(&self) -> Vec<Arc<Service>> {
        let mut all: Vec<_> = self.services.pin().values().cloned().collect();
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all
    }

    // --- changing; one writer at a time

    /// Adds or replaces a workload.
    pub fn insert_workload(&self, workload: Workload) {
        let workload = Arc::new(workload);
        let before = self.workloads.pin().get(workload.uid()).cloned();
        if before.as_deref() == Some(&workload) {
            return;
        }
        for (key, ports) in &workload.services {
            self.endpoints_of(key).insert(workload.clone(), ports.clone());
        }
        if !workload.host_network {
            let by_address = self.by_address.pin();
            for address in &workload.addresses {
                by_address.insert((workload.facts.network.clone(), *address), workload.clone());
            }
        }
        self.workloads.pin().insert(workload.uid().clone(), workload.clone());
        match before {
            Some(before) => self.forget(&before, Some(&workload)),
            None => {
                self.workload_count.fetch_add(1, Relaxed);
            }
        }
    }

    /// Adds or replaces a service.
    pub fn insert_service(&self, service: Service) {
        let service = Arc::new(service);
        let before = self.services.pin().get(&service.key).cloned();
        if before.as_deref() == Some(&service) {
            return;
        }
        self.endpoints_of(&service.key).follow(service.load_balancing.as_ref());
        self.services.pin().insert(service.key.clone(), service.clone());
        change(&self.by_host, &service.hostname, Some(&service), &service.key);
        let (single, ranges): (Vec<_>, Vec<_>) = service.vips.iter().partition(|vip| is_single(&vip.range));
        for vip in single {
            change(
                &self.by_vip,
                &(vip.network.clone(), vip.range.addr()),
                Some(&service),
                &service.key,
            );
        }
        if let Some(before) = &before {
            self.forget_names(before, Some(&service));
        }
        let had_ranges = before.is_some_and(|before| before.vips.iter().any(|vip| !is_single(&vip.range)));
        if had_ranges || !ranges.is_empty() {
            let added = ranges
                .iter()
                .map(|vip| (vip.network.clone(), vip.range, service.clone()))
                .collect();
            self.change_ranges(&service.key, added);
        }
    }

    /// Takes a workload or service away by the name of its resource; an unknown name is nothing to do.
    pub fn remove(&self, name: &str) {
        if let Some(workload) = self.workloads.pin().remove(name).cloned() {
            self.workload_count.fetch_sub(1, Relaxed);
            self.forget(&workload, None);
        } else if let Some(service) = self.services.pin().remove(name).cloned() {
            self.forget_names(&service, None);
            if service.vips.iter().any(|vip| !is_single(&vip.range)) {
                self.change_ranges(name, Vec::new());
            }
            // Its endpoints stay for a service of the same key that may come again; who has none left is forgotten.
            let endpoints = self.endpoints.pin();
            if let Some(of) = endpoints.get(name) {
                of.follow(None);
                if of.all().is_empty() {
                    endpoints.remove(name);
                }
            }
        }
    }

    fn endpoints_of(&self, key: &Arc<str>) -> Arc<Endpoints> {
        self.endpoints.pin().get_or_insert_with(key.clone(), Arc::default).clone()
    }

    /// Takes away what `before` had and `now` has not.
    fn forget(&self, before: &Arc<Workload>, now: Option<&Arc<Workload>>) {
        let by_address = self.by_address.pin();
        for address in &before.addresses {
            let place = (before.facts.network.clone(), *address);
            // The address may have gone to another workload meanwhile.
            if by_address.get(&place).is_some_and(|there| Arc::ptr_eq(there, before)) {
                by_address.remove(&place);
            }
        }
        for (key, _) in &before.services {
            if now.is_some_and(|now| now.services.iter().any(|(other, _)| other == key)) {
                continue;
            }
            let endpoints = self.endpoints.pin();
            if let Some(of) = endpoints.get(key)
                && of.remove(before.uid())
                && !self.services.pin().contains_key(key)
            {
                endpoints.remove(key);
            }
        }
    }

    fn forget_names(&self, before: &Arc<Service>, now: Option<&Arc<Service>>) {
        if now.is_none_or(|now| now.hostname != before.hostname) {
            change(&self.by_host, &before.hostname, None, &before.key);
        }
        for vip in before.vips.iter().filter(|vip| is_single(&vip.range)) {
            if now.is_none_or(|now| !now.vips.contains(vip)) {
                change(&self.by_vip, &(vip.network.clone(), vip.range.addr()), None, &before.key);
            }
        }
    }

    fn change_ranges(&self, key: &str, added: Vec<Range>) {
        let mut ranges: Vec<_> = self
            .ranges
            .load()
            .iter()
            .filter(|(_, _, of)| *of.key != *key)
            .cloned()
            .collect();
        ranges.extend(added);
        ranges.sort_by(|(_, a, of_a), (_, b, of_b)| b.prefix_len().cmp(&a.prefix_len()).then(of_a.key.cmp(&of_b.key)));
        self.ranges.store(Arc::new(ranges));
    }
}

/// Puts a service into the list of one name, or takes it out.
fn change<K: Clone + Eq + std::hash::Hash>(
    map: &Map<K, Arc<[Arc<Service>]>>,
    name: &K,
    service: Option<&Arc<Service>>,
    key: &str,
) {
    let map = map.pin();
    let others = map.get(name).map(|all| all.iter()).unwrap_or_default();
    let mut all: Vec<_> = others.filter(|other| *other.key != *key).chain(service).cloned().collect();
    all.sort_by(|a, b| a.key.cmp(&b.key));
    if all.is_empty() {
        map.remove(name);
    } else {
        map.insert(name.clone(), all.into());
    }
}

/// The one that a namespace means: its own, then the canonical one, then the first.
fn preferred(all: &[Arc<Service>], namespace: &str) -> Option<Arc<Service>> {
    let seen = || all.iter().filter(|service| service.is_visible_to(namespace));
    let own = seen().find(|service| *service.namespace == *namespace);
    own.or_else(|| seen().find(|service| service.canonical))
        .or_else(|| seen().next())
        .cloned()
}

fn is_single(range: &ipnet::IpNet) -> bool {
    range.prefix_len() == range.max_prefix_len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{service, workload};

    fn at(mesh: &Mesh, address: &str, namespace: &str) -> Option<String> {
        mesh.service_at(address.parse().unwrap(), namespace)
            .map(|service| service.key.to_string())
    }

    #[test]
    fn an_address_stands_for_ones_own_service_then_the_canonical_one_then_the_longest_range() {
        let mesh = Mesh::new("");
        mesh.insert_service(service("a/web.example.com", &["10.0.0.1", "10.9.0.0/16"], &[]));
        let mut canonical = service("b/web.example.com", &["10.0.0.1", "10.9.1.0/24"], &[]);
        canonical.canonical = true;
        mesh.insert_service(canonical.clone());
        let mut private = service("c/web.example.com", &["10.0.0.1", "10.9.1.1"], &[]);
        private.private = true;
        mesh.insert_service(private);
        assert_eq!(at(&mesh, "10.0.0.1", "a").as_deref(), Some("a/web.example.com"));
        assert_eq!(at(&mesh, "10.0.0.1", "c").as_deref(), Some("c/web.example.com"));
        assert_eq!(at(&mesh, "10.0.0.1", "x").as_deref(), Some("b/web.example.com"));
        assert_eq!(at(&mesh, "10.9.1.1", "c").as_deref(), Some("c/web.example.com"));
        assert_eq!(at(&mesh, "10.9.1.1", "x").as_deref(), Some("b/web.example.com"));
        assert_eq!(at(&mesh, "10.9.2.1", "x").as_deref(), Some("a/web.example.com"));
        canonical.vips.truncate(1);
        mesh.insert_service(canonical);
        assert_eq!(at(&mesh, "10.9.1.1", "x").as_deref(), Some("a/web.example.com"));
        mesh.remove("a/web.example.com");
        assert_eq!(at(&mesh, "10.9.1.1", "x"), None);
        assert_eq!(at(&mesh, "10.0.0.1", "a").as_deref(), Some("b/web.example.com"));
        mesh.remove("b/web.example.com");
        mesh.remove("c/web.example.com");
        assert_eq!((mesh.by_vip.pin().len(), mesh.by_host.pin().len()), (0, 0));
    }

    #[test]
    fn endpoints_may_come_before_their_service_and_go_with_their_workload() {
        let mesh = Mesh::new("");
        let mut web = workload("web", &["10.1.0.1"]);
        web.services = Box::new([("app/web".into(), Arc::from([(80, 8080)]))]);
        mesh.insert_workload(web.clone());
        mesh.insert_service(service("app/web", &["10.0.0.1"], &[(80, 0)]));
        let chosen = |mesh: &Mesh| {
            let service = mesh.service("app/web")?;
            mesh.endpoints("app/web")?.choose(&service, 80, None).map(|(_, port)| port)
        };
        assert_eq!(chosen(&mesh), Some(8080));
        web.addresses = [[10, 1, 0, 2].into()].into_iter().collect();
        mesh.insert_workload(web.clone());
        assert!(mesh.workload_at([10, 1, 0, 1].into()).is_none());
        assert!(mesh.workload_at([10, 1, 0, 2].into()).is_some());
        assert_eq!(chosen(&mesh), Some(8080));
        web.services = Box::new([]);
        mesh.insert_workload(web.clone());
        assert_eq!(chosen(&mesh), None);
        mesh.remove(web.uid());
        assert!(mesh.workload_at([10, 1, 0, 2].into()).is_none());
        assert_eq!(mesh.counts(), (0, 1));
        mesh.remove("app/web");
        assert!(mesh.endpoints.pin().is_empty());
    }

    #[test]
    fn an_address_that_went_to_another_workload_stays_with_it() {
        let mesh = Mesh::new("");
        let (old, new) = (workload("old", &["10.1.0.1"]), workload("new", &["10.1.0.1"]));
        mesh.insert_workload(old.clone());
        mesh.insert_workload(new.clone());
        mesh.remove(old.uid());
        assert_eq!(mesh.workload_at([10, 1, 0, 1].into()).unwrap().uid(), new.uid());
        let mut on_host = workload("host", &["10.1.0.1"]);
        on_host.host_network = true;
        mesh.insert_workload(on_host);
        assert_eq!(mesh.workload_at([10, 1, 0, 1].into()).unwrap().uid(), new.uid());
    }
}
