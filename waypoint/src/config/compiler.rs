//! The one writer of the configuration.
//!
//! [`Compiler::apply`] takes one answer of istiod for one type, compiles what changed, publishes what need not wait, and says what was
//! wrong, what is not done and what else is wanted. It belongs on the control plane's threads. The order in a push is clusters,
//! endpoints, listeners; in any other order the result is the same, only later.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use cairn_exchange::clock::{self, Instant};
use cairn_identity::Secrets;
use cairn_proto::envoy::extensions::transport_sockets::tls::v3::Secret;
use cairn_telemetry::{access_log::LogFiles, trace::NodeFacts};

use super::{
    answer::words,
    any::{Unknown, decode},
    clusters::Clusters,
    listeners::{Listeners, Published},
    own_limits::{self, OwnLimits, OwnLimitsError},
    report::{Malformed, Notes, ResourceError, Unsupported},
    store::Store,
    workload,
};
use crate::{export::Exports, recorder::Recorder, snapshot::Snapshot, upstream::dns::Names, workloads::Workloads};

pub use super::answer::{
    ADDRESSES, Applied, CLUSTERS, ENDPOINTS, EXTENSIONS, LISTENERS, PROXY_CONFIG, Resource, SECRETS, WORKLOADS,
};

/// Names that a sentence about what is missing lists.
const NAMES_IN_WORDS: usize = 5;

/// How long anything waits for what it needs: the proxy with being ready for secrets and extension configurations, as Envoy does
/// (contract xds §1.11: istiod leaves out what the proxy may not have, and what needs it refuses by itself); and a cluster, with the
/// chains that name it, for its endpoints. There Envoy waits without end, as istiod tells it to, and a policy that came with the
/// chain waits with it.
pub(crate) const FETCH_TIMEOUT: Duration = Duration::from_secs(15);

/// What connections take from elsewhere than a snapshot, and the configuration names.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Certificates and roots of TLS to applications.
    pub secrets: Secrets,
    /// Addresses of names.
    pub names: Names,
    /// Ways to collectors of traces and logs.
    pub exports: Exports,
    /// Who we are to collectors.
    pub node: NodeFacts,
}

/// The one writer.
#[derive(Debug)]
pub struct Compiler {
    workloads: Arc<Workloads>,
    publish: Arc<ArcSwap<Snapshot>>,
    store: Arc<Store>,
    clusters: Clusters,
    listeners: Listeners,
    sources: Sources,
    /// Limits that the operator has written himself, and what is wrong with newer ones.
    own_limits: Arc<OwnLimits>,
    wrong_limits: Option<OwnLimitsError>,
    /// Keeps what was published.
    recorder: Option<Arc<Recorder>>,
    /// What is published, to be changed and published again.
    snapshot: Snapshot,
    /// Types of which an answer has come.
    received: BTreeSet<String>,
    /// What was wanted last.
    wanted: BTreeMap<&'static str, BTreeSet<String>>,
    /// When what is wanted of a type last changed.
    wanted_since: BTreeMap<&'static str, Instant>,
}

// === impl Compiler ===

impl Compiler {
    /// A writer for `publish`. Access logs are written to `log_files`; without, nothing is served and no file is opened.
    pub fn new(workloads: Arc<Workloads>, publish: Arc<ArcSwap<Snapshot>>, log_files: Option<LogFiles>) -> Self {
        let snapshot = Snapshot::empty(workloads.clone());
        Self {
            workloads,
            publish,
            store: Arc::default(),
            clusters: Clusters::default(),
            listeners: Listeners::new(log_files),
            sources: Sources::default(),
            own_limits: Arc::default(),
            wrong_limits: None,
            recorder: None,
            snapshot,
            received: BTreeSet::new(),
            wanted: BTreeMap::new(),
            wanted_since: BTreeMap::new(),
        }
    }

    /// Feeds what connections of a running proxy take from elsewhere than a snapshot.
    pub fn feeding(mut self, sources: Sources) -> Self {
        self.clusters.look_up_in(sources.names.clone());
        self.listeners.export_to(sources.exports.clone(), sources.node.clone());
        self.sources = sources;
        self
    }

    /// What is published is kept by this recorder too.
    #[must_use]
    pub fn recorded(self, recorder: Option<Arc<Recorder>>) -> Self {
        Self { recorder, ..self }
    }

    /// The resources as they came, and the list of what is not done; for administrative pages.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Everything that is not done.
    pub fn unsupported(&self) -> Arc<[Unsupported]> {
        self.store.unsupported()
    }

    /// Takes over one answer: resources of one type that are new or were sent again, and names that are gone.
    pub fn apply(&mut self, type_url: &str, changed: Vec<Resource>, removed: Vec<String>) -> Applied {
        let mut errors = Vec::new();
        let any = match type_url {
            CLUSTERS => self.clusters.apply_clusters(&changed, &removed, &mut errors),
            ENDPOINTS => self.clusters.apply_endpoints(&changed, &mut errors),
            LISTENERS => self.listeners.apply(&changed, &removed, &mut errors),
            WORKLOADS | ADDRESSES => {
                self.apply_workloads(type_url, &changed, &removed, &mut errors);
                false
            }
            EXTENSIONS => self.listeners.apply_extensions(&changed, &mut errors),
            SECRETS => {
                self.apply_secrets(&changed, &removed, &mut errors);
                true
            }
            other => {
                let what = format!("{other} was not asked for");
                errors.push(ResourceError::malformed(
                    other,
                    None,
                    Malformed {
                        field: String::new(),
                        what,
                    },
                ));
                return Applied {
                    errors,
                    ..Applied::default()
                };
            }
        };
        self.keep(type_url, &changed, &removed, &errors);
        let first = self.received.insert(type_url.to_owned());
        let mut applied = Applied {
            errors,
            ..Applied::default()
        };
        if any || first {
            applied.published = self.settle();
            applied.wants = self.wants();
            self.list();
        }
        applied
    }

    /// Takes over the operator's own limits of requests (`cairn.dev/rate-limits`), or that there are none any more. An object with
    /// anything wrong in it leaves the one before in use, and is listed.
    pub fn limit(&mut self, text: Option<&str>) -> Result<(), OwnLimitsError> {
        let parsed = text.map_or_else(|| Ok(OwnLimits::default()), OwnLimits::parse);
        let own = match parsed {
            Ok(own) => Arc::new(own),
            Err(error) => {
                self.wrong_limits = Some(error.clone());
                self.list();
                return Err(error);
            }
        };
        self.wrong_limits = None;
        let before = std::mem::replace(&mut self.own_limits, own.clone());
        let gone = before.clusters.iter().filter(|cluster| !own.clusters.contains(cluster));
        let gone: Vec<String> = gone.map(|cluster| cluster.name.clone()).collect();
        // They are ours: what would be wrong with them was found when the object was read.
        self.clusters.apply_clusters(&own.clusters, &gone, &mut Vec::new());
        self.listeners.limit(own);
        self.settle();
        self.list();
        Ok(())
    }

    /// When something has waited long enough for what it needs; then [`Compiler::overdue`] is to be called.
    pub fn due(&self) -> Option<Instant> {
        self.clusters.due()
    }

    /// Publishes what has waited long enough, without what it waits for; the version, when anything in the snapshot changed. Names
    /// that are no longer wanted are told with the next answer.
    pub fn overdue(&mut self) -> Option<u64> {
        let published = self.settle();
        self.list();
        published
    }

    /// Puts the resources into the store, with what is wrong with them.
    fn keep(&self, type_url: &str, changed: &[Resource], removed: &[String], errors: &[ResourceError]) {
        // Extension configurations are only ever replaced (contract xds §1.9).
        let removed = if type_url == EXTENSIONS { &[][..] } else { removed };
        for name in removed {
            self.store.remove(type_url, name);
        }
        let resources = changed
            .iter()
            .map(|resource| (resource.name.clone(), resource.version.clone(), resource.bytes.clone()));
        self.store.put(type_url, resources);
        let mut wrong: BTreeMap<&str, Vec<&ResourceError>> = BTreeMap::new();
        for error in errors {
            wrong.entry(&error.resource).or_default().push(error);
        }
        for resource in changed {
            let words = wrong.get(resource.name.as_str()).map(|errors| words(errors));
            self.store.set_error(type_url, &resource.name, words);
        }
    }

    /// Hands secrets to the handshakes that need them. One that cannot be used leaves the one before in use.
    fn apply_secrets(&mut self, changed: &[Resource], removed: &[String], errors: &mut Vec<ResourceError>) {
        for resource in changed {
            let mut notes = Notes::of(&resource.name);
            let delivered = decode::<Secret>(&resource.bytes, Unknown::Ignored, &mut notes).and_then(|secret| {
                self.sources
                    .secrets
                    .deliver(&resource.name, secret)
                    .map_err(|error| notes.malformed("", error.to_string()))
            });
            if let Err(malformed) = delivered {
                errors.push(ResourceError::malformed(&resource.name, None, malformed));
            }
        }
        for name in removed {
            self.sources.secrets.forget(name);
        }
    }

    fn apply_workloads(&mut self, type_url: &str, changed: &[Resource], removed: &[String], errors: &mut Vec<ResourceError>) {
        for resource in changed {
            // What was wrong is looked at again: it is as wrong as before, and istiod is told so each time.
            if self
                .store
                .resource(type_url, &resource.name)
                .is_some_and(|stored| stored.bytes == resource.bytes && stored.error.is_none())
            {
                continue;
            }
            let applied = match type_url {
                WORKLOADS => workload::apply_workload(&resource.name, &resource.bytes, &self.workloads),
                _ => workload::apply_address(&resource.name, &resource.bytes, &self.workloads),
            };
            if let Err(malformed) = applied {
                errors.push(ResourceError::malformed(&resource.name, None, malformed));
            }
        }
        for name in removed {
            self.workloads.remove(name);
        }
    }

    /// Publishes what need not wait any longer, as one new version.
    fn settle(&mut self) -> Option<u64> {
        let mut any = false;
        self.clusters.open_tunnels_as(self.listeners.tunnels());
        any |= self.clusters.settle(&mut self.snapshot.clusters);
        let Snapshot {
            version: _,
            terminate,
            matcher,
            chains,
            clusters: _,
            workloads: _,
        } = &mut self.snapshot;
        any |= self.listeners.settle(
            &self.clusters,
            Published {
                terminate,
                matcher,
                chains,
            },
        );
        if self.clusters.any_gone() {
            any |= self
                .clusters
                .drop_unnamed(&self.listeners.named_clusters(), &mut self.snapshot.clusters);
        }
        if !any {
            return None;
        }
        self.snapshot.version += 1;
        let Snapshot {
            version,
            terminate,
            matcher,
            chains,
            clusters,
            workloads,
        } = &self.snapshot;
        let published = Arc::new(Snapshot {
            version: *version,
            terminate: terminate.clone(),
            matcher: matcher.clone(),
            chains: chains.clone(),
            clusters: clusters.clone(),
            workloads: workloads.clone(),
        });
        let version = *version;
        if let Some(recorder) = &self.recorder {
            recorder.published(published.clone());
        }
        self.publish.store(published);
        Some(version)
    }

    /// Names of dependent resources, where they are others than the last time.
    fn wants(&mut self) -> BTreeMap<&'static str, BTreeSet<String>> {
        let now = BTreeMap::from([
            (ENDPOINTS, self.clusters.wanted_assignments()),
            (SECRETS, self.clusters.wanted_secrets()),
            (EXTENSIONS, self.listeners.wanted_extensions()),
        ]);
        let secrets = now.get(SECRETS).into_iter().flatten().cloned();
        self.sources
            .secrets
            .want(&secrets.chain(self.clusters.wanted_files()).collect());
        let news = |(type_url, names): &(&&'static str, &BTreeSet<String>)| match self.wanted.get(**type_url) {
            Some(before) => before != *names,
            None => !names.is_empty(),
        };
        let changed: BTreeMap<_, _> = now
            .iter()
            .filter(news)
            .map(|(type_url, names)| (*type_url, names.clone()))
            .collect();
        self.wanted = now;
        let since = changed.keys().map(|type_url| (*type_url, clock::now()));
        self.wanted_since.extend(since);
        changed
    }

    /// Tells the store what is not done, and what waits.
    fn list(&self) {
        let mut list = Vec::new();
        self.clusters.unsupported(&mut list);
        self.listeners.unsupported(&mut list);
        list.extend(self.listeners.unused_limits());
        if let Some(OwnLimitsError { place, what }) = &self.wrong_limits {
            list.push(own_limits::listed(
                place.clone(),
                format!("{what}; the last good object stays"),
            ));
        }
        self.store.set_unsupported(list);
        let mut pending = Vec::new();
        self.clusters.pending(&mut pending);
        self.listeners.pending(&self.clusters, &mut pending);
        self.store.set_pending(pending);
    }

    /// What has to come before the proxy can serve (architecture rule 11), in words; empty when everything is there.
    pub fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if !self.received.contains(CLUSTERS) {
            missing.push("clusters (CDS)".to_owned());
        }
        if self.clusters.waiting().len() > 0 {
            missing.push(format!("endpoints (EDS) of {}", some(self.clusters.waiting())));
        }
        if !self.received.contains(LISTENERS) {
            missing.push("listeners (LDS)".to_owned());
        } else {
            missing.extend(self.listeners.missing().map(|name| format!("the listener {name}")));
        }
        for (type_url, kind) in [(SECRETS, "secrets (SDS)"), (EXTENSIONS, "extension configurations (ECDS)")] {
            let since = self.wanted_since.get(type_url);
            if since.is_none_or(|since| clock::now().saturating_duration_since(*since) >= FETCH_TIMEOUT) {
                continue;
            }
            let have = self.store.names(type_url);
            let wanted = self.wanted.get(type_url).into_iter().flatten();
            let absent: Vec<_> = wanted.filter(|name| !have.contains(*name)).collect();
            if !absent.is_empty() {
                missing.push(format!("{kind}: {}", some(absent.into_iter())));
            }
        }
        if missing.is_empty() && self.listeners.waiting().len() > 0 {
            missing.push(format!("clusters of {}", some(self.listeners.waiting())));
        }
        missing
    }
}

/// A few names, and how many more there are.
fn some<N: std::fmt::Display>(names: impl ExactSizeIterator<Item = N>) -> String {
    let more = names.len().saturating_sub(NAMES_IN_WORDS);
    let first: Vec<String> = names.take(NAMES_IN_WORDS).map(|name| name.to_string()).collect();
    match more {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

// === impl Consumer ===

impl cairn_xds::Consumer for Compiler {
    fn apply(&mut self, update: cairn_xds::Update) -> cairn_xds::Verdict {
        let cairn_xds::Update {
            type_url,
            system_version,
            nonce: _,
            changed,
            removed,
            received: _,
            bytes: _,
        } = update;
        self.store.set_version(type_url.as_str(), &system_version);
        let applied = Compiler::apply(
            self,
            type_url.as_str(),
            changed.into_iter().map(Resource::from).collect(),
            removed,
        );
        let error = applied.nack();
        let wishes = applied
            .wants
            .into_iter()
            .map(|(type_url, names)| cairn_xds::Wish::exactly(type_url, names))
            .collect();
        cairn_xds::Verdict { error, wishes }
    }
}
