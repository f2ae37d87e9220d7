//! Hosts that requests name: each is looked up when it is first asked for, and kept fresh as long as somebody asks for it
//! (Envoy's dynamic forward proxy; contract xds §3.14).
//!
//! The cache belongs to a cluster and outlives its configuration. A look-up happens once, however many requests wait for it. A host
//! that nobody asked for in the time that the configuration names is forgotten, and so is the one that was asked for least recently when
//! there are too many: a client that invents names costs the others a look-up, not their memory.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use cairn_exchange::clock::{Instant, now};
use parking_lot::Mutex;
use tokio::{sync::Notify, time::timeout};

use super::{Answer, Cadence, Family, Names, pause};
use crate::upstream::{Endpoint, EndpointState, Health, Target};

/// How hosts are looked up and kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostCacheTerms {
    /// Which addresses are wanted.
    pub family: Family,
    /// How often they are asked for.
    pub cadence: Cadence,
    /// A host that nobody asks for is forgotten after this.
    pub host_ttl: Duration,
    /// Most hosts.
    pub max_hosts: usize,
    /// Time that a request waits for a look-up.
    pub query_timeout: Duration,
    /// The port of hosts that name none.
    pub port: u16,
}

/// Hosts by name and port.
#[derive(Debug, Default)]
pub struct HostCache {
    hosts: Mutex<HashMap<(Arc<str>, u16), Arc<Host>>>,
}

/// One host.
#[derive(Debug)]
struct Host {
    found: ArcSwapOption<Result<Arc<Endpoint>, HostError>>,
    first: Notify,
    asked: Mutex<Instant>,
}

/// Why a host has no address, in Envoy's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("dns_resolution_failure{{{0}}}")]
pub struct HostError(pub &'static str);

/// No answer in time.
const TOO_SLOW: HostError = HostError("cares_failure:Timeout_while_contacting_DNS_servers");

// === impl HostCache ===

impl HostCache {
    /// The endpoint of a host, once it is looked up.
    pub async fn endpoint(
        &self,
        names: &Names,
        terms: &HostCacheTerms,
        host: &str,
        port: u16,
    ) -> Result<Arc<Endpoint>, HostError> {
        let entry = self.entry(names, terms, host, port);
        let wait = async {
            loop {
                // Enlisted before the look, so that no answer comes in between.
                let first = entry.first.notified();
                tokio::pin!(first);
                first.as_mut().enable();
                if let Some(found) = &*entry.found.load() {
                    return Result::clone(found);
                }
                first.await;
            }
        };
        timeout(terms.query_timeout, wait).await.unwrap_or(Err(TOO_SLOW))
    }

    fn entry(&self, names: &Names, terms: &HostCacheTerms, host: &str, port: u16) -> Arc<Host> {
        let mut hosts = self.hosts.lock();
        let key = (Arc::from(host.to_ascii_lowercase()), port);
        if let Some(entry) = hosts.get(&key) {
            *entry.asked.lock() = now();
            return entry.clone();
        }
        let at = now();
        if hosts.len() >= terms.max_hosts {
            hosts.retain(|_, host| at.saturating_duration_since(*host.asked.lock()) < terms.host_ttl);
        }
        if hosts.len() >= terms.max_hosts
            && let Some(oldest) = hosts
                .iter()
                .min_by_key(|(_, host)| *host.asked.lock())
                .map(|(key, _)| key.clone())
        {
            hosts.remove(&oldest);
        }
        let entry = Arc::new(Host {
            found: ArcSwapOption::empty(),
            first: Notify::new(),
            asked: Mutex::new(at),
        });
        hosts.insert(key.clone(), entry.clone());
        drop(hosts);
        match names.runtime() {
            Some(runtime) => {
                // The task ends with its entry, and the entry with the cache.
                runtime.spawn(keep_fresh(Arc::downgrade(&entry), names.clone(), terms.clone(), key));
            }
            None => entry
                .found
                .store(Some(Arc::new(Err(HostError("cares_failure:Could_not_contact_DNS_servers"))))),
        }
        entry
    }

    /// Forgets hosts that nobody asks for any more.
    pub fn sweep(&self, terms: &HostCacheTerms) {
        let at = now();
        self.hosts
            .lock()
            .retain(|_, host| at.saturating_duration_since(*host.asked.lock()) < terms.host_ttl);
    }

    /// Endpoints that are known now.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        let known = |host: &Arc<Host>| {
            host.found
                .load()
                .as_ref()
                .and_then(|found| found.as_ref().as_ref().ok().cloned())
        };
        self.hosts.lock().values().filter_map(known).collect()
    }
}

async fn keep_fresh(entry: Weak<Host>, names: Names, terms: HostCacheTerms, (host, port): (Arc<str>, u16)) {
    let mut failures = 0;
    loop {
        let found = names.look_up(&host, terms.family).await;
        let Some(entry) = entry.upgrade() else { return };
        let length = match &found {
            Ok(answer) => {
                failures = 0;
                entry.take(answer, port);
                terms.cadence.pause(Ok(answer), fastrand::u64(..))
            }
            Err(error) => {
                failures += 1;
                tracing::debug!(%error, "a host could not be looked up");
                // What was known before stays.
                if entry.found.load().is_none() {
                    entry.found.store(Some(Arc::new(Err(HostError(error.words)))));
                }
                terms.cadence.pause(Err(failures), fastrand::u64(..))
            }
        };
        entry.first.notify_waiters();
        drop(entry);
        pause(length).await;
    }
}

impl Host {
    fn take(&self, answer: &Answer, port: u16) {
        let found = match answer.addresses.first() {
            None => Err(HostError(answer.empty.unwrap_or("cares_norecords"))),
            Some(first) => {
                let before = self.found.load();
                let before = before.as_ref().and_then(|found| found.as_ref().as_ref().ok());
                // An address that is still among them stays, with its connections.
                if let Some(endpoint) = before
                    && endpoint
                        .target
                        .address()
                        .is_some_and(|known| answer.addresses.contains(&known.ip()))
                {
                    return;
                }
                let address = SocketAddr::new(*first, port);
                Ok(Arc::new(Endpoint {
                    target: Target::Plain(address),
                    display: address.to_string().into(),
                    health: Health::Healthy,
                    weight: 1,
                    locality: Arc::default(),
                    transport: None,
                    state: Arc::new(EndpointState::default()),
                }))
            }
        };
        self.found.store(Some(Arc::new(found)));
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::Server, *};

    fn terms() -> HostCacheTerms {
        HostCacheTerms {
            family: Family::V4Only,
            cadence: Cadence::default(),
            host_ttl: Duration::from_secs(300),
            max_hosts: 2,
            query_timeout: Duration::from_secs(10),
            port: 80,
        }
    }

    #[tokio::test]
    async fn a_host_is_looked_up_once_and_shared() {
        let server = Server::start().await;
        server.set("one.example.com", &["10.0.0.1"], 60);
        let (names, cache, terms) = (server.names(), HostCache::default(), terms());
        let ask = |host: &'static str| cache.endpoint(&names, &terms, host, 80);
        let (one, again, upper) = tokio::join!(ask("one.example.com"), ask("one.example.com"), ask("ONE.example.com"));
        let (one, again, upper) = (one.unwrap(), again.unwrap(), upper.unwrap());
        assert!(Arc::ptr_eq(&one, &again) && Arc::ptr_eq(&one, &upper));
        assert_eq!(&*one.display, "10.0.0.1:80");
        assert_eq!(server.asked.lock().len(), 1);
        let error = ask("nobody.example.com").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "dns_resolution_failure{cares_norecords:Domain_name_not_found}"
        );
    }

    #[tokio::test]
    async fn hosts_have_a_limit_and_the_one_least_recently_asked_for_goes() {
        let server = Server::start().await;
        let (names, cache, terms) = (server.names(), HostCache::default(), terms());
        for (number, host) in ["a.test", "b.test", "c.test", "d.test"].iter().enumerate() {
            server.set(host, &[&format!("10.0.0.{number}")], 60);
            cache.endpoint(&names, &terms, host, 80).await.unwrap();
            assert!(cache.hosts.lock().len() <= 2);
        }
        let left: Vec<_> = cache.hosts.lock().keys().map(|(host, _)| host.to_string()).collect();
        assert!(
            left.contains(&"d.test".to_owned()) && !left.contains(&"a.test".to_owned()),
            "{left:?}"
        );
    }
}
