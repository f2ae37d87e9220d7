//! Clusters and their endpoints between answers of istiod: what was sent, what is published, what waits.
//!
//! istiod sends every cluster at nearly every change (contract seen §1, row 1.9), so bytes are compared first. A new cluster
//! waits until its endpoints have been sent once, or until [`FETCH_TIMEOUT`] is over: chains wait with it, and what is new in them (a
//! policy that denies) must not wait for ever on endpoints that do not come. One that istiod has removed stays while a chain still names it: chains are sent
//! after clusters. Endpoints are swapped inside of a cluster's state and need no new snapshot.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use cairn_exchange::clock::{self, Instant};

use super::{
    assignment::Delivered,
    cluster::{self, Compiled, Endpoints},
    compiler::{FETCH_TIMEOUT, Resource},
    discovery::Discovering,
    originate::TunnelListener,
    report::{ResourceError, Unsupported},
    state::StateStore,
    store::Pending,
};
use crate::{
    snapshot::Table,
    upstream::{Cluster, EndpointSet, TransportTerms, dns::Names},
};

/// All clusters.
#[derive(Debug, Default)]
pub(crate) struct Clusters {
    entries: HashMap<Arc<str>, Entry>,
    assignments: HashMap<Arc<str>, AssignmentEntry>,
    /// Clusters by the name that their endpoints have.
    by_service: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Clusters of which a version waits for endpoints, and until when.
    waiting: BTreeMap<Arc<str>, Instant>,
    /// Clusters that istiod has removed and a chain may still name.
    gone: BTreeSet<Arc<str>>,
    /// What listeners say of tunnels, by cluster.
    tunnels: BTreeMap<String, TunnelListener>,
    states: StateStore,
    /// Looks names up.
    names: Names,
}

#[derive(Debug)]
struct Entry {
    bytes: Bytes,
    /// The last version that was good.
    latest: Option<Arc<Compiled>>,
    /// The published version.
    active: Option<Arc<Compiled>>,
    malformed: Option<ResourceError>,
    /// What of its endpoints is not done.
    endpoints_unsupported: Vec<Unsupported>,
    /// Looks up the names of the published version.
    discovering: Option<Discovering>,
}

#[derive(Debug, Default)]
struct AssignmentEntry {
    bytes: Bytes,
    good: Option<Delivered>,
    malformed: Option<ResourceError>,
}

// === impl Clusters ===

impl Clusters {
    /// Names are looked up there from now on.
    pub(crate) fn look_up_in(&mut self, names: Names) {
        self.names = names;
    }

    /// Takes over clusters. What is wrong with any of those sent, now or since before, is added to `errors`.
    pub(crate) fn apply_clusters(&mut self, changed: &[Resource], removed: &[String], errors: &mut Vec<ResourceError>) -> bool {
        let mut any = false;
        for resource in changed {
            any |= self.apply_cluster(resource);
            if let Some(entry) = self.entries.get(resource.name.as_str()) {
                errors.extend(entry.errors());
            }
        }
        for name in removed {
            let Some((name, _)) = self.entries.get_key_value(name.as_str()) else {
                continue;
            };
            any |= self.gone.insert(name.clone());
        }
        any
    }

    fn apply_cluster(&mut self, resource: &Resource) -> bool {
        let name: Arc<str> = match self.entries.get_key_value(resource.name.as_str()) {
            Some((name, _)) => name.clone(),
            None => resource.name.as_str().into(),
        };
        let back = self.gone.remove(&name);
        if let Some(entry) = self.entries.get_mut(&name)
            && entry.bytes == resource.bytes
        {
            entry.bytes = resource.bytes.clone();
            return back;
        }
        let entry = self.entries.entry(name.clone()).or_insert_with(|| Entry {
            bytes: Bytes::new(),
            latest: None,
            active: None,
            malformed: None,
            endpoints_unsupported: Vec::new(),
            discovering: None,
        });
        entry.bytes = resource.bytes.clone();
        match cluster::compile(&name, &resource.bytes) {
            Ok(compiled) => {
                entry.malformed = None;
                let before = entry.latest.replace(Arc::new(compiled));
                let active = entry.active.clone();
                self.wait(&name);
                self.reindex(&name, before.iter().chain(&active));
            }
            Err(malformed) => entry.malformed = Some(ResourceError::malformed(&name, None, malformed)),
        }
        true
    }

    /// Notes that a version is to be published. A deadline that runs is not put off by another version.
    fn wait(&mut self, name: &Arc<str>) {
        self.waiting
            .entry(name.clone())
            .or_insert_with(|| clock::now() + FETCH_TIMEOUT);
    }

    /// Keeps `by_service` true after a cluster has changed; `before` are its versions so far.
    fn reindex<'a>(&mut self, name: &Arc<str>, before: impl Iterator<Item = &'a Arc<Compiled>>) {
        for service in before.filter_map(|compiled| compiled.service()) {
            if let Some(names) = self.by_service.get_mut(service) {
                names.remove(name);
                if names.is_empty() {
                    self.by_service.remove(service);
                }
            }
        }
        let Some(entry) = self.entries.get(name) else { return };
        for service in entry.versions().filter_map(|compiled| compiled.service()) {
            self.by_service.entry(service.clone()).or_default().insert(name.clone());
        }
    }

    /// Takes over endpoints; nothing of a published snapshot changes but the sets in its clusters.
    pub(crate) fn apply_endpoints(&mut self, changed: &[Resource], errors: &mut Vec<ResourceError>) -> bool {
        let mut any = false;
        for resource in changed {
            let Some((service, clusters)) = self.by_service.get_key_value(resource.name.as_str()) else {
                // An answer to a question that we no longer ask.
                continue;
            };
            let (service, clusters) = (service.clone(), clusters.clone());
            // Not even an empty one is the same as none.
            let news = self
                .assignments
                .get(&service)
                .is_none_or(|known| known.bytes != resource.bytes);
            let known = self.assignments.entry(service.clone()).or_default();
            known.bytes = resource.bytes.clone();
            if news {
                any = true;
                let renewed = Delivered::renew(&mut known.good, &service, &resource.bytes);
                known.malformed = renewed
                    .err()
                    .map(|malformed| ResourceError::malformed(&service, None, malformed));
                for name in &clusters {
                    self.swap_endpoints(name);
                }
            }
            if let Some(entry) = self.assignments.get(&service) {
                errors.extend(entry.malformed.clone());
                errors.extend(
                    entry
                        .good
                        .iter()
                        .flat_map(|good| good.unsupported.iter().filter_map(Unsupported::error)),
                );
            }
            for entry in clusters.iter().filter_map(|name| self.entries.get(name)) {
                errors.extend(entry.endpoints_unsupported.iter().filter_map(Unsupported::error));
            }
        }
        any
    }

    /// Puts the endpoints that the published version of a cluster has now into its state.
    fn swap_endpoints(&mut self, name: &Arc<str>) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let Some(active) = &entry.active else { return };
        let state = self.states.cluster(name);
        entry.endpoints_unsupported.clear();
        let assignment = match &active.endpoints {
            Endpoints::Fixed(assignment) => Some(assignment),
            Endpoints::Eds(service) => self
                .assignments
                .get(service)
                .and_then(|entry| entry.good.as_ref())
                .map(|good| &good.assignment),
        };
        let Some(assignment) = assignment else {
            let _writing = state.writing.lock();
            entry.discovering = None;
            // Those that it had under another name are not its own any more.
            state.endpoints.store(Arc::new(EndpointSet::default()));
            return;
        };
        // A search that goes on takes `writing` with its own lock held: it is started, and the one before ended, without `writing`.
        let discovering = Discovering::start(active, assignment, &state, &self.names, entry.discovering.as_ref());
        let before = std::mem::replace(&mut entry.discovering, discovering);
        // The old search has ended before the new one says anything.
        drop(before);
        let writing = state.writing.lock();
        let previous = state.endpoints.load_full();
        if active.settings.outlier.is_none() {
            // Nobody would take them back.
            previous.iter().for_each(|endpoint| endpoint.state.monitor.take_back());
        }
        let listed = &mut entry.endpoints_unsupported;
        let endpoints = assignment.endpoints(name, &active.settings, &active.matched, &previous, |_| &[], listed);
        match &entry.discovering {
            Some(discovering) => {
                drop(writing);
                discovering.swap();
            }
            None => state.endpoints.store(Arc::new(endpoints)),
        }
    }

    /// Publishes what need not wait any longer; `true` when the table has changed.
    pub(crate) fn settle(&mut self, table: &mut Table<Arc<Cluster>>) -> bool {
        let now = clock::now();
        let mut ready: Vec<Arc<str>> = Vec::new();
        for (name, deadline) in &self.waiting {
            let latest = self.entries.get(name).and_then(|entry| entry.latest.as_ref());
            if latest.is_none_or(|latest| self.has_endpoints(latest)) {
                ready.push(name.clone());
            } else if *deadline <= now {
                tracing::warn!(
                    cluster = %name,
                    waited = ?FETCH_TIMEOUT,
                    "istiod has not sent the endpoints of this cluster: it, and the chains that name it, are used without; requests to it \
                     are answered 503 until they come"
                );
                ready.push(name.clone());
            }
        }
        for name in &ready {
            self.waiting.remove(name);
            let Some(entry) = self.entries.get_mut(name) else { continue };
            let before = std::mem::replace(&mut entry.active, entry.latest.clone());
            self.reindex(name, before.iter());
            // The state is made before the set is put into it, and held by the cluster from here on.
            let state = self.states.cluster(name);
            self.swap_endpoints(name);
            if let Some(cluster) = self.publishable(name, state) {
                table.insert(name.clone(), Arc::new(cluster));
            }
        }
        !ready.is_empty()
    }

    fn has_endpoints(&self, compiled: &Compiled) -> bool {
        match &compiled.endpoints {
            Endpoints::Fixed(_) => true,
            // One that came malformed has come: its cluster alone has no endpoints, and nothing else waits for it.
            Endpoints::Eds(service) => self.assignments.contains_key(service),
        }
    }

    fn publishable(&self, name: &Arc<str>, state: Arc<crate::upstream::ClusterState>) -> Option<Cluster> {
        let active = self.entries.get(name)?.active.as_ref()?;
        let mut settings = active.settings.clone();
        let mut transport_hash = active.transport_hash;
        let said = self.tunnels.get(&**name);
        settings.tunnel_headers = said.map(|said| said.headers.clone()).unwrap_or_default();
        if let Some(reason) = said.and_then(|said| said.refusal.as_ref()) {
            // Connections that were made before are not used either.
            transport_hash = !transport_hash;
            settings.transport = TransportTerms::Unsupported(reason.as_str().into());
            settings.tunnel = None;
        }
        Some(Cluster {
            facts: active.facts.clone(),
            settings,
            transport_hash,
            state,
        })
    }

    /// Opens tunnels, or refuses them, as listeners say of each cluster; `true` when that is news.
    pub(crate) fn open_tunnels_as(&mut self, tunnels: BTreeMap<String, TunnelListener>) -> bool {
        if tunnels == self.tunnels {
            return false;
        }
        let touched: Vec<_> = tunnels.keys().chain(self.tunnels.keys()).cloned().collect();
        self.tunnels = tunnels;
        for name in touched {
            if let Some((name, _)) = self.entries.get_key_value(name.as_str()) {
                let name = name.clone();
                self.wait(&name);
            }
        }
        true
    }

    /// Takes clusters away that istiod has removed and no chain names; `true` when the table has changed.
    pub(crate) fn drop_unnamed(&mut self, named: &HashSet<&str>, table: &mut Table<Arc<Cluster>>) -> bool {
        let drop: Vec<Arc<str>> = self.gone.iter().filter(|name| !named.contains(&***name)).cloned().collect();
        let mut any = false;
        for name in &drop {
            self.gone.remove(name);
            self.waiting.remove(name);
            let versions: Vec<_> = self.entries.remove(name).iter().flat_map(Entry::versions).cloned().collect();
            self.reindex(name, versions.iter());
            any |= table.remove(name).is_some();
        }
        self.assignments.retain(|service, _| self.by_service.contains_key(service));
        any
    }

    /// Whether any cluster waits to be taken away.
    pub(crate) fn any_gone(&self) -> bool {
        !self.gone.is_empty()
    }

    /// Whether a chain that names this cluster has to wait: it is coming, and was never there.
    pub(crate) fn is_coming(&self, name: &str) -> bool {
        self.entries
            .get(name)
            .is_some_and(|entry| entry.active.is_none() && entry.latest.is_some())
            && !self.gone.contains(name)
    }

    /// Names of the endpoint assignments that are wanted.
    pub(crate) fn wanted_assignments(&self) -> BTreeSet<String> {
        self.by_service.keys().map(|service| service.to_string()).collect()
    }

    /// Names of the secrets that are wanted of istiod.
    pub(crate) fn wanted_secrets(&self) -> BTreeSet<String> {
        self.versions()
            .flat_map(|compiled| compiled.secrets.served.iter().cloned())
            .collect()
    }

    /// Names of the secrets that are wanted and lie in files.
    pub(crate) fn wanted_files(&self) -> BTreeSet<String> {
        self.versions()
            .flat_map(|compiled| compiled.secrets.files.iter().cloned())
            .collect()
    }

    fn versions(&self) -> impl Iterator<Item = &Arc<Compiled>> {
        self.entries.values().flat_map(Entry::versions)
    }

    /// Clusters that wait for endpoints.
    pub(crate) fn waiting(&self) -> impl ExactSizeIterator<Item = &Arc<str>> {
        self.waiting.keys()
    }

    /// When the next of them stops to wait.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.waiting.values().min().copied()
    }

    /// Clusters whose endpoints have not come: those that wait for them, and those that are used without.
    pub(crate) fn pending(&self, list: &mut Vec<Pending>) {
        for (name, entry) in &self.entries {
            let Some(compiled) = entry.latest.as_ref().filter(|latest| !self.has_endpoints(latest)) else {
                continue;
            };
            list.push(Pending {
                resource: name.to_string(),
                chain: None,
                waits_for: compiled
                    .service()
                    .map(|service| format!("endpoints (EDS) of {service}"))
                    .into_iter()
                    .collect(),
                overdue: !self.waiting.contains_key(name),
            });
        }
    }

    /// What is not done.
    pub(crate) fn unsupported(&self, list: &mut Vec<Unsupported>) {
        for entry in self.entries.values() {
            list.extend(entry.latest.iter().flat_map(|compiled| compiled.unsupported.iter().cloned()));
            list.extend(entry.endpoints_unsupported.iter().cloned());
        }
        let good = self.assignments.values().filter_map(|entry| entry.good.as_ref());
        list.extend(good.flat_map(|good| good.unsupported.iter().cloned()));
    }
}

// === impl Entry ===

impl Entry {
    fn versions(&self) -> impl Iterator<Item = &Arc<Compiled>> {
        self.latest.iter().chain(&self.active)
    }

    fn errors(&self) -> impl Iterator<Item = ResourceError> {
        let refused = self
            .latest
            .iter()
            .flat_map(|compiled| compiled.unsupported.iter().filter_map(Unsupported::error));
        self.malformed.clone().into_iter().chain(refused)
    }
}

// === impl Compiled ===

impl Compiled {
    /// The name of its endpoints in EDS.
    fn service(&self) -> Option<&Arc<str>> {
        match &self.endpoints {
            Endpoints::Eds(service) => Some(service),
            Endpoints::Fixed(_) => None,
        }
    }
}
