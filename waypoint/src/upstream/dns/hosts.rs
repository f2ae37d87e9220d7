//! Hosts that requests name: each is looked up when it is first asked for, and kept fresh as long as somebody asks for it
//! (Envoy's dynamic forward proxy; contract xds §3.14).
//!
//! The cache belongs to a cluster and outlives its configuration. A look-up happens once, however many requests wait for it. A host
//! that nobody asked for in the time that the configuration names is forgotten, and so is the one that was asked for least recently when
//! there are too many: a client that invents names costs the others a look-up, not their memory.

use std::{
    borrow::Cow,
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use cairn_exchange::clock::{Instant, now};
use parking_lot::RwLock;
use smallvec::SmallVec;
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

/// Hosts by name and port. Requests to hosts that are known share the lock.
#[derive(Debug, Default)]
pub struct HostCache {
    hosts: RwLock<Hosts>,
}

type Hosts = HashMap<Arc<str>, SmallVec<[Arc<Host>; 1]>>;

/// One host at one port.
#[derive(Debug)]
struct Host {
    name: Arc<str>,
    port: u16,
    found: ArcSwapOption<Result<Arc<Endpoint>, HostError>>,
    first: Notify,
    made: Instant,
    /// When it was last asked for, in milliseconds after it was made.
    asked: AtomicU64,
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
        let host = match host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            true => Cow::Owned(host.to_ascii_lowercase()),
            false => Cow::Borrowed(host),
        };
        let known = |hosts: &Hosts| {
            let entry = hosts.get(&*host)?.iter().find(|entry| entry.port == port)?;
            entry.asked.store(millis(entry.made), Ordering::Relaxed);
            Some(entry.clone())
        };
        if let Some(entry) = known(&self.hosts.read()) {
            return entry;
        }
        let mut hosts = self.hosts.write();
        // Somebody else may have been first.
        if let Some(entry) = known(&hosts) {
            return entry;
        }
        if count(&hosts) >= terms.max_hosts {
            retain(&mut hosts, |entry| entry.unasked() < terms.host_ttl);
        }
        if count(&hosts) >= terms.max_hosts {
            let oldest = hosts.values().flatten().max_by_key(|entry| entry.unasked()).cloned();
            retain(&mut hosts, |entry| {
                oldest.as_ref().is_none_or(|oldest| !Arc::ptr_eq(entry, oldest))
            });
        }
        let entry = Arc::new(Host {
            name: host.as_ref().into(),
            port,
            found: ArcSwapOption::empty(),
            first: Notify::new(),
            made: now(),
            asked: AtomicU64::new(0),
        });
        hosts.entry(entry.name.clone()).or_default().push(entry.clone());
        drop(hosts);
        match names.runtime() {
            Some(runtime) => {
                // The task ends with its entry, and the entry with the cache.
                let (name, port) = (entry.name.clone(), entry.port);
                runtime.spawn(keep_fresh(Arc::downgrade(&entry), names.clone(), terms.clone(), (name, port)));
            }
            None => entry
                .found
                .store(Some(Arc::new(Err(HostError("cares_failure:Could_not_contact_DNS_servers"))))),
        }
        entry
    }

    /// Forgets hosts that nobody asks for any more.
    pub fn sweep(&self, terms: &HostCacheTerms) {
        retain(&mut self.hosts.write(), |entry| entry.unasked() < terms.host_ttl);
    }

    /// Endpoints that are known now.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        let known = |host: &Arc<Host>| {
            host.found
                .load()
                .as_ref()
                .and_then(|found| found.as_ref().as_ref().ok().cloned())
        };
        self.hosts.read().values().flatten().filter_map(known).collect()
    }
}

fn count(hosts: &Hosts) -> usize {
    hosts.values().map(SmallVec::len).sum()
}

fn retain(hosts: &mut Hosts, keep: impl Fn(&Arc<Host>) -> bool) {
    hosts.retain(|_, ports| {
        ports.retain(|entry| keep(entry));
        !ports.is_empty()
    });
}

/// Milliseconds since then.
fn millis(since: Instant) -> u64 {
    u64::try_from(now().saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX)
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
    /// How long nobody has asked for it.
    fn unasked(&self) -> Duration {
        Duration::from_millis(millis(self.made).saturating_sub(self.asked.load(Ordering::Relaxed)))
    }

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
                    hostname: None,
                    hash_key: None,
                    labels: Default::default(),
                    healthy_since: now(),
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
            assert!(count(&cache.hosts.read()) <= 2);
            // The next one is asked for later than this one.
            tokio::time::pause();
            tokio::time::advance(Duration::from_secs(1)).await;
            tokio::time::resume();
        }
        let left: Vec<_> = cache.hosts.read().keys().map(ToString::to_string).collect();
        assert!(
            left.contains(&"d.test".to_owned()) && !left.contains(&"a.test".to_owned()),
            "{left:?}"
        );
    }
}
