//! Names into addresses: what `/etc/resolv.conf` says, off the data path.
//!
//! Queries and their answers live on the control runtime (architecture rule 8), whoever asks. A name without records is an answer, as in
//! Envoy: its endpoints go. Servers that cannot be reached, or do not answer in time, are a failure, and what was known before stays.

mod hosts;

use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use cairn_exchange::clock;
use hickory_resolver::{
    TokioResolver,
    config::{LookupIpStrategy, ResolverConfig, ResolverOpts},
    net::{NetError, runtime::TokioRuntimeProvider},
};
use tokio::runtime::Handle;

pub use hosts::{HostCache, HostCacheTerms, HostError};

/// Addresses of a name that are used; more are left out.
const MAX_ADDRESSES: usize = 1024;
/// The whole of a look-up, with all servers and search domains.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(20);
/// No name is asked for more often, whatever its servers say.
const LEAST_REFRESH: Duration = Duration::from_secs(1);

/// Which addresses of a name are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv6, or IPv4 where there is none.
    #[default]
    Auto,
    /// IPv4.
    V4Only,
    /// IPv6.
    V6Only,
    /// IPv4, or IPv6 where there is none.
    V4Preferred,
    /// Both.
    All,
}

/// How often a name is asked for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cadence {
    /// After an answer.
    pub refresh: Duration,
    /// Whether the life of the records replaces that.
    pub respect_ttl: bool,
    /// Not more often than this.
    pub least: Duration,
    /// Up to so much is added.
    pub jitter: Duration,
    /// After a failure, doubled for each further one up to the second.
    pub failure: Option<(Duration, Duration)>,
}

/// What DNS said of a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Its addresses, in their order; none when the name has no records.
    pub addresses: Vec<IpAddr>,
    /// How long they may be believed.
    pub ttl: Duration,
    /// Why there are none, in Envoy's words.
    pub empty: Option<&'static str>,
}

/// DNS could not be asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("looking up {host}: {cause}")]
pub struct LookupError {
    host: String,
    cause: String,
    /// In Envoy's words.
    pub words: &'static str,
}

/// Asks DNS; clones share connections. The default one knows no server.
#[derive(Clone, Debug, Default)]
pub struct Names {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    runtime: Handle,
    /// Other servers than the system's.
    servers: Option<(ResolverConfig, ResolverOpts)>,
    resolvers: [OnceLock<Result<TokioResolver, String>>; 5],
}

// === impl Family ===

impl Family {
    fn strategy(self) -> (usize, LookupIpStrategy) {
        match self {
            Family::Auto => (0, LookupIpStrategy::Ipv6thenIpv4),
            Family::V4Only => (1, LookupIpStrategy::Ipv4Only),
            Family::V6Only => (2, LookupIpStrategy::Ipv6Only),
            Family::V4Preferred => (3, LookupIpStrategy::Ipv4thenIpv6),
            Family::All => (4, LookupIpStrategy::Ipv4AndIpv6),
        }
    }
}

// === impl Cadence ===

impl Default for Cadence {
    /// Envoy's.
    fn default() -> Self {
        Self {
            refresh: Duration::from_secs(5),
            respect_ttl: false,
            least: LEAST_REFRESH,
            jitter: Duration::ZERO,
            failure: None,
        }
    }
}

impl Cadence {
    /// The pause after an answer, or after the so many-th failure in a row.
    pub fn pause(&self, answer: Result<&Answer, u32>, random: u64) -> Duration {
        let pause = match (answer, self.failure) {
            (Ok(answer), _) if self.respect_ttl && !answer.addresses.is_empty() && !answer.ttl.is_zero() => answer.ttl,
            (Ok(answer), Some((base, _))) if answer.addresses.is_empty() => base,
            (Err(failures), Some((base, most))) => {
                let doubled = base.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
                doubled.min(most.max(base))
            }
            _ => self.refresh,
        };
        let jitter = match u64::try_from(self.jitter.as_micros()) {
            Ok(0) | Err(_) => Duration::ZERO,
            Ok(most) => Duration::from_micros(random % most),
        };
        pause.max(self.least).max(LEAST_REFRESH) + jitter
    }
}

// === impl Names ===

impl Names {
    /// Asks the servers of `/etc/resolv.conf`, on this runtime.
    pub fn on(runtime: Handle) -> Self {
        Self::with(runtime, None)
    }

    /// Asks these servers.
    pub fn asking(runtime: Handle, config: ResolverConfig, options: ResolverOpts) -> Self {
        Self::with(runtime, Some((config, options)))
    }

    fn with(runtime: Handle, servers: Option<(ResolverConfig, ResolverOpts)>) -> Self {
        Self {
            inner: Some(Arc::new(Inner {
                runtime,
                servers,
                resolvers: Default::default(),
            })),
        }
    }

    /// The runtime that names are looked up on, if they are looked up at all.
    pub fn runtime(&self) -> Option<&Handle> {
        self.inner.as_ref().map(|inner| &inner.runtime)
    }

    /// Looks a name up; has to be called on [`Names::runtime`].
    pub async fn look_up(&self, host: &str, family: Family) -> Result<Answer, LookupError> {
        let failed = |cause: String, words| LookupError {
            host: host.to_owned(),
            cause,
            words,
        };
        const NO_SERVER: &str = "cares_failure:Could_not_contact_DNS_servers";
        let Some(inner) = &self.inner else {
            return Err(failed("names are not looked up here".to_owned(), NO_SERVER));
        };
        let resolver = inner.resolver(family).map_err(|cause| failed(cause, NO_SERVER))?;
        let found = match tokio::time::timeout(LOOKUP_TIMEOUT, resolver.lookup_ip(host)).await {
            Ok(found) => found,
            Err(_) => Err(NetError::Timeout),
        };
        match found {
            Ok(found) => {
                let addresses: Vec<IpAddr> = found.iter().take(MAX_ADDRESSES).collect();
                let answers = found.as_lookup().answers();
                let ttl = answers.iter().map(|record| record.ttl).min().unwrap_or_default();
                Ok(Answer {
                    empty: addresses.is_empty().then_some(NO_DATA),
                    addresses,
                    ttl: Duration::from_secs(ttl.into()),
                })
            }
            Err(error) if error.is_nx_domain() => Ok(Answer {
                empty: Some("cares_norecords:Domain_name_not_found"),
                ..Answer::default()
            }),
            Err(error) if error.is_no_records_found() => Ok(Answer {
                empty: Some(NO_DATA),
                ..Answer::default()
            }),
            Err(error) => {
                let words = match error {
                    NetError::Timeout => "cares_failure:Timeout_while_contacting_DNS_servers",
                    _ => NO_SERVER,
                };
                Err(failed(error.to_string(), words))
            }
        }
    }
}

const NO_DATA: &str = "cares_norecords:DNS_server_returned_answer_with_no_data";

impl Inner {
    fn resolver(&self, family: Family) -> Result<&TokioResolver, String> {
        let (slot, strategy) = family.strategy();
        let slot = self.resolvers.get(slot).ok_or("there is no such family")?;
        let made = slot.get_or_init(|| {
            let mut builder = match &self.servers {
                Some((config, options)) => TokioResolver::builder_with_config(config.clone(), TokioRuntimeProvider::default())
                    .with_options(options.clone()),
                None => TokioResolver::builder_tokio().map_err(|error| format!("/etc/resolv.conf: {error}"))?,
            };
            let options = builder.options_mut();
            options.ip_strategy = strategy;
            // Who asks knows how long an answer lives, and asks again when it wants to know.
            options.cache_size = 0;
            builder.build().map_err(|error| error.to_string())
        });
        made.as_ref().map_err(Clone::clone)
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Names").finish_non_exhaustive()
    }
}

/// When something is next due.
pub(crate) async fn pause(length: Duration) {
    tokio::time::sleep_until(clock::now() + length).await;
}

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn names_are_asked_for_again_as_the_cluster_says() {
        let answer = |ttl| Answer {
            addresses: vec![[10, 0, 0, 1].into()],
            ttl: seconds(ttl),
            empty: None,
        };
        let empty = Answer::default();
        let plain = Cadence {
            refresh: seconds(60),
            ..Cadence::default()
        };
        let by_ttl = Cadence {
            respect_ttl: true,
            ..plain
        };
        let failing = Cadence {
            failure: Some((seconds(2), seconds(10))),
            ..by_ttl
        };
        for (cadence, outcome, expected) in [
            (plain, Ok(&answer(30)), 60),
            (by_ttl, Ok(&answer(30)), 30),
            (by_ttl, Ok(&answer(0)), 60),
            (by_ttl, Ok(&empty), 60),
            (by_ttl, Err(1), 60),
            (failing, Ok(&empty), 2),
            (failing, Err(1), 2),
            (failing, Err(2), 4),
            (failing, Err(3), 8),
            (failing, Err(4), 10),
            (failing, Err(400), 10),
        ] {
            assert_eq!(cadence.pause(outcome, 0), seconds(expected), "{outcome:?}");
        }
        let often = Cadence {
            refresh: Duration::ZERO,
            jitter: Duration::from_millis(100),
            ..Cadence::default()
        };
        assert_eq!(often.pause(Ok(&empty), 99_999), seconds(1) + Duration::from_micros(99_999));
    }

    #[tokio::test]
    async fn records_and_their_absence_are_answers_and_silence_is_none() {
        let server = testing::Server::start().await;
        server.set("web.example.com", &["10.0.0.1", "10.0.0.2", "2001:db8::1"], 30);
        let names = server.names();
        let all = names.look_up("web.example.com", Family::All).await.unwrap();
        assert_eq!(all.ttl, seconds(30));
        assert_eq!(all.addresses.len(), 3);
        let four = names.look_up("web.example.com", Family::V4Only).await.unwrap();
        assert_eq!(four.addresses, [IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2])]);
        let six = names.look_up("web.example.com", Family::Auto).await.unwrap();
        assert_eq!(six.addresses, ["2001:db8::1".parse::<IpAddr>().unwrap()]);
        let nobody = names.look_up("nobody.example.com", Family::V4Only).await.unwrap();
        assert_eq!(nobody.empty, Some("cares_norecords:Domain_name_not_found"));
        server.break_down();
        let error = names.look_up("web.example.com", Family::V4Only).await.unwrap_err();
        assert!(error.to_string().starts_with("looking up web.example.com: "), "{error}");
        Names::default().look_up("web.example.com", Family::V4Only).await.unwrap_err();
    }
}
