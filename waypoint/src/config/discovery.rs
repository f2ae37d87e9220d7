//! Endpoints that DNS finds (contract xds §5.4): names are looked up for as long as their cluster is published, and each answer swaps the
//! cluster's endpoints, as EDS does.
//!
//! Every name has a task on the control runtime. An answer counts at once, whatever the other names are still waiting for; a name that
//! cannot be looked up keeps the addresses that it had.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::task::AbortHandle;

use super::{assignment::Assignment, cluster::Compiled};
use crate::upstream::{
    ClusterState, Discovery, DnsTerms,
    dns::{Answer, Names, pause},
};

/// A cluster whose names are looked up, until this is dropped.
#[derive(Debug)]
pub(crate) struct Discovering {
    search: Arc<Search>,
    tasks: Vec<AbortHandle>,
}

#[derive(Debug)]
struct Search {
    cluster: Arc<Compiled>,
    assignment: Assignment,
    state: Arc<ClusterState>,
    names: Names,
    terms: DnsTerms,
    /// Only the first address counts.
    first_only: bool,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    /// Nobody wants to know any more.
    over: bool,
    addresses: HashMap<String, Vec<IpAddr>>,
    /// Names without any outcome so far.
    pending: BTreeSet<String>,
}

// === impl Discovering ===

impl Discovering {
    /// Looks up the names of a cluster. `None` when it has none, or when there is nobody to ask: then it has its other endpoints.
    pub(crate) fn start(
        cluster: &Arc<Compiled>,
        assignment: &Assignment,
        state: &Arc<ClusterState>,
        names: &Names,
        before: Option<&Self>,
    ) -> Option<Self> {
        let (terms, first_only) = match &cluster.settings.discovery {
            Discovery::StrictDns(terms) => (terms, false),
            Discovery::LogicalDns(terms) => (terms, true),
            _ => return None,
        };
        let hosts: BTreeSet<String> = assignment.names.iter().map(|name| name.host.to_string()).collect();
        let runtime = names.runtime().filter(|_| !hosts.is_empty())?;
        // What the version before has found serves until it is found again.
        let mut addresses = before
            .map(|before| before.search.found.lock().addresses.clone())
            .unwrap_or_default();
        addresses.retain(|host, _| hosts.contains(host));
        let pending = hosts.iter().filter(|host| !addresses.contains_key(*host)).cloned().collect();
        let search = Arc::new(Search {
            cluster: cluster.clone(),
            assignment: assignment.clone(),
            state: state.clone(),
            names: names.clone(),
            terms: terms.clone(),
            first_only,
            found: Mutex::new(Found {
                over: false,
                addresses,
                pending,
            }),
        });
        let tasks = hosts
            .into_iter()
            .map(|host| runtime.spawn(search.clone().keep_fresh(host)).abort_handle())
            .collect();
        Some(Self { search, tasks })
    }

    /// Puts what is known now into the cluster's state.
    pub(crate) fn swap(&self) {
        self.search.swap(&mut self.search.found.lock());
    }
}

impl Drop for Discovering {
    fn drop(&mut self) {
        self.search.found.lock().over = true;
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

// === impl Search ===

impl Search {
    async fn keep_fresh(self: Arc<Self>, host: String) {
        let mut failures = 0;
        loop {
            let answer = self.names.look_up(&host, self.terms.family).await;
            let cadence = &self.terms.cadence;
            let length = match &answer {
                Ok(answer) => {
                    failures = 0;
                    cadence.pause(Ok(answer), fastrand::u64(..))
                }
                Err(error) => {
                    failures += 1;
                    if failures == 1 {
                        tracing::warn!(cluster = %self.cluster.facts.name, "{error}; what was known before stays in use");
                    }
                    cadence.pause(Err(failures), fastrand::u64(..))
                }
            };
            if !self.take(&host, answer.ok()) {
                return;
            }
            pause(length).await;
        }
    }

    /// Takes an outcome over; `false` when nobody wants to know it.
    fn take(&self, host: &str, answer: Option<Answer>) -> bool {
        let mut found = self.found.lock();
        if found.over {
            return false;
        }
        let was_pending = found.pending.remove(host);
        let changed = answer.is_some_and(|answer| {
            let mut addresses = answer.addresses;
            if self.first_only {
                addresses.truncate(1);
            } else {
                // The order of an answer says nothing here, and changes at each look.
                addresses.sort_unstable();
                addresses.dedup();
            }
            found.addresses.get(host) != Some(&addresses) && {
                found.addresses.insert(host.to_owned(), addresses);
                true
            }
        });
        if changed || was_pending {
            self.swap(&mut found);
        }
        true
    }

    /// With `found` locked, so that sets are swapped in the order in which they were found.
    fn swap(&self, found: &mut Found) {
        let _writing = self.state.writing.lock();
        let previous = self.state.endpoints.load_full();
        let addresses: BTreeMap<&str, &[IpAddr]> = found
            .addresses
            .iter()
            .map(|(host, addresses)| (host.as_str(), addresses.as_slice()))
            .collect();
        let mut endpoints = self.assignment.endpoints(
            &self.cluster.facts.name,
            &self.cluster.settings,
            &self.cluster.matched,
            &previous,
            |host| addresses.get(host).copied().unwrap_or_default(),
            // Told when the cluster was published.
            &mut Vec::new(),
        );
        endpoints.known = found.pending.is_empty();
        self.state.endpoints.store(Arc::new(endpoints));
        self.state.found.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use arc_swap::ArcSwap;

    use crate::{
        config::{
            Compiler,
            cluster::{self, Endpoints},
            compiler::Sources,
            load,
        },
        snapshot::Snapshot,
        upstream::{Cluster, dns::testing::Server},
        workloads::Workloads,
    };

    use super::*;

    const NAMED: &str = "inbound-vip|80|http|named.example.com";
    const ROUND_ROBIN: &str = "inbound-vip|80|http|rr.example.com";
    const STRICT: &str = "inbound-vip|80|http|strict.example.com";

    fn capture() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../conformance/fixtures/xds/istio-1.31.0-20260827/18-serviceentry-dns")
    }

    /// istiod's own messages, with names looked up at this server.
    fn compiled(server: &Server) -> (Compiler, Arc<ArcSwap<Snapshot>>) {
        let workloads = Arc::new(Workloads::new(String::new()));
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
        let sources = Sources {
            names: server.names(),
            ..Sources::default()
        };
        let mut compiler = Compiler::new(workloads, snapshot.clone(), None).feeding(sources);
        for answer in load::load(&capture()).unwrap() {
            let applied = compiler.apply(&answer.type_url, answer.resources, answer.removed);
            assert_eq!(applied.nack(), None);
        }
        (compiler, snapshot)
    }

    fn published(snapshot: &ArcSwap<Snapshot>, name: &str) -> Arc<Cluster> {
        snapshot.load().clusters.get(name).unwrap().clone()
    }

    fn endpoints(cluster: &Cluster) -> Vec<(String, u32)> {
        let set = cluster.state.endpoints.load();
        set.iter()
            .map(|endpoint| (endpoint.display.to_string(), endpoint.weight))
            .collect()
    }

    async fn until(cluster: &Cluster, expected: &[(&str, u32)]) {
        let expected: Vec<_> = expected
            .iter()
            .map(|(display, weight)| ((*display).to_owned(), *weight))
            .collect();
        let wait = async {
            loop {
                let found = cluster.state.found.notified();
                tokio::pin!(found);
                found.as_mut().enable();
                if endpoints(cluster) == expected {
                    return;
                }
                found.await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(20), wait).await.is_err() {
            panic!("{expected:?} were expected, found {:?}", endpoints(cluster));
        }
    }

    #[tokio::test]
    async fn every_address_is_an_endpoint_with_the_weight_of_its_name() {
        let server = Server::start().await;
        server.set("a.backend.example.com", &["198.51.100.30"], 1);
        server.set("b.backend.example.com", &["198.51.100.32", "198.51.100.31"], 1);
        server.set("rr.example.com", &["198.51.100.20", "198.51.100.21"], 1);
        server.set("strict.example.com", &["198.51.100.10"], 1);
        let (_compiler, snapshot) = compiled(&server);
        let named = published(&snapshot, NAMED);
        named.resolved().await;
        until(
            &named,
            &[
                ("198.51.100.30:8080", 2),
                ("198.51.100.31:8081", 1),
                ("198.51.100.32:8081", 1),
            ],
        )
        .await;
        until(&published(&snapshot, ROUND_ROBIN), &[("198.51.100.20:80", 1)]).await;

        // A changed answer is taken over, and an endpoint that stays keeps its state.
        let strict = published(&snapshot, STRICT);
        until(&strict, &[("198.51.100.10:443", 1)]).await;
        let before = strict.state.endpoints.load().iter().next().unwrap().state.clone();
        server.set("strict.example.com", &["198.51.100.10", "198.51.100.11"], 1);
        until(&strict, &[("198.51.100.10:443", 1), ("198.51.100.11:443", 1)]).await;
        assert!(Arc::ptr_eq(
            &before,
            &strict.state.endpoints.load().iter().next().unwrap().state
        ));
    }

    #[tokio::test]
    async fn servers_that_fail_take_nothing_away_and_a_name_that_has_gone_does() {
        let clusters = load::load(&capture()).unwrap();
        let resource = clusters
            .iter()
            .flat_map(|answer| &answer.resources)
            .find(|resource| resource.name == STRICT);
        let compiled = Arc::new(cluster::compile(STRICT, &resource.unwrap().bytes).unwrap());
        let Endpoints::Fixed(assignment) = &compiled.endpoints else {
            panic!("names stand in the cluster");
        };
        let state = Arc::new(ClusterState::default());
        let server = Server::start().await;
        let discovering = Discovering::start(&compiled, assignment, &state, &server.names(), None).unwrap();
        let count = || state.endpoints.load().iter().count();
        let answer = Answer {
            addresses: vec![[198, 51, 100, 10].into(), [198, 51, 100, 11].into()],
            ..Answer::default()
        };
        for (outcome, expected) in [(Some(answer), 2), (None, 2), (Some(Answer::default()), 0), (None, 0)] {
            assert!(discovering.search.take("strict.example.com", outcome));
            assert_eq!(count(), expected);
        }
        let search = discovering.search.clone();
        drop(discovering);
        assert!(!search.take("strict.example.com", None), "nobody wants to know any more");
    }

    #[tokio::test]
    async fn a_cluster_that_was_never_resolved_is_waited_for_and_one_that_is_gone_is_not_looked_up() {
        let server = Server::start().await;
        let (compiler, snapshot) = compiled(&server);
        let strict = published(&snapshot, STRICT);
        // There is no such name: that is an answer, and nobody waits any longer.
        tokio::time::timeout(Duration::from_secs(10), strict.resolved())
            .await
            .unwrap();
        assert_eq!(endpoints(&strict), []);
        assert!(strict.state.endpoints.load().known);

        // A search keeps its cluster's state alive: with the cluster it ends.
        let state = Arc::downgrade(&strict.state);
        drop((strict, compiler, snapshot));
        let ended = async {
            while state.strong_count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap();
    }
}
