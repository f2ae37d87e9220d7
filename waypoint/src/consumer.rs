//! Where istiod's answers meet the compiler, and who hears of what is still missing.
//!
//! The client hands each answer to [`Watched`], which gives it to the one [`Compiler`] and tells [`Progress`] what came of it:
//! readiness and start wait on that, metrics read it. It runs on a blocking thread of the control runtime (architecture rule 8).

use std::{
    future::{Future, pending},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cairn_exchange::clock::{self, Instant};
use cairn_identity::Identity;
use cairn_telemetry::{Counter, Registry};
use cairn_xds::{Consumer, Subscription, TypeUrl, Update, Verdict};
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{sleep, sleep_until},
};

use crate::config::{
    Compiler, OWN_LIMITS, Resource,
    compiler::{CLUSTERS, ENDPOINTS, EXTENSIONS, LISTENERS, PROXY_CONFIG, SECRETS},
    trust,
};
use crate::settings::downward;

/// Pause before a deadline is looked at again, when what it led to has failed.
const FAILED_PAUSE: Duration = Duration::from_secs(1);

/// Pause before the pod's annotations are looked at again: the kubelet takes longer to write them.
const ANNOTATIONS_PAUSE: Duration = Duration::from_secs(1);

/// The compiler, watched.
#[derive(Debug)]
pub struct Watched {
    /// Locked for one answer or deadline at a time, by blocking threads, never across an await.
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    compiler: Compiler,
    /// Believes the trust anchors that istiod sends.
    identity: Option<Identity>,
    progress: watch::Sender<Progress>,
    applied: Counter,
    micros: Counter,
}

/// How far the configuration has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What has to come before the proxy can serve, in words; empty when everything is there.
    pub missing: Vec<String>,
    /// Answers that were applied, in full or in part.
    pub answers: u64,
    /// When something that waits has waited long enough.
    pub due: Option<Instant>,
}

// === impl Watched ===

impl Watched {
    /// Watches `compiler`; the receiver knows how far it has come.
    pub fn new(compiler: Compiler, registry: &Registry) -> (Self, watch::Receiver<Progress>) {
        let (progress, receiver) = watch::channel(Progress {
            missing: compiler.missing(),
            answers: 0,
            due: None,
        });
        let applied = registry.counter(
            "cairn_config_answers_total",
            "Answers of istiod that were taken over or refused.",
            &[],
        );
        let micros = registry.counter(
            "cairn_config_apply_microseconds_total",
            "Time spent on answers of istiod.",
            &[],
        );
        let inner = Inner {
            compiler,
            identity: None,
            progress,
            applied,
            micros,
        };
        let inner = Arc::new(Mutex::new(inner));
        (Self { inner }, receiver)
    }

    /// With an identity that believes the trust anchors that istiod sends.
    #[must_use]
    pub fn believing(self, identity: Identity) -> Self {
        self.inner.lock().identity = Some(identity);
        self
    }

    /// Takes over the operator's own limits of requests, as often as the pod's annotations say other ones. Runs until the watched
    /// compiler is gone.
    pub fn own_limits(&self, annotations: PathBuf) -> impl Future<Output = ()> + Send + 'static {
        let weak = Arc::downgrade(&self.inner);
        async move {
            let mut last = None;
            loop {
                let path = annotations.clone();
                let Some(inner) = weak.upgrade() else { return };
                // Off the runtime: a file may be slow, and a chain takes time to compile.
                let looked = spawn_blocking(move || {
                    let text = annotation(&path, OWN_LIMITS);
                    if text != last {
                        take_limits(&mut inner.lock().compiler, text.as_deref());
                    }
                    text
                });
                last = match looked.await {
                    Ok(text) => text,
                    Err(error) => {
                        tracing::error!("annotations could not be looked at: {error}");
                        None
                    }
                };
                sleep(ANNOTATIONS_PAUSE).await;
            }
        }
    }

    /// Publishes what has waited long enough for something that istiod does not send, whether or not there is a stream to istiod.
    /// Runs until the watched compiler is gone.
    pub fn deadlines(&self) -> impl Future<Output = ()> + Send + 'static {
        let weak = Arc::downgrade(&self.inner);
        let mut progress = self.inner.lock().progress.subscribe();
        async move {
            loop {
                let due = progress.borrow_and_update().due;
                let over = async move {
                    match due {
                        Some(due) => sleep_until(due).await,
                        None => pending().await,
                    }
                };
                tokio::select! {
                    changed = progress.changed() => if changed.is_err() { return },
                    () = over => {
                        let Some(inner) = weak.upgrade() else { return };
                        if let Err(error) = spawn_blocking(move || inner.lock().overdue()).await {
                            tracing::error!("what has waited long enough could not be published: {error}");
                            sleep(FAILED_PAUSE).await;
                        }
                    }
                }
            }
        }
    }
}

impl Consumer for Watched {
    fn apply(&mut self, update: Update) -> Verdict {
        self.inner.lock().apply(update)
    }
}

// === impl Inner ===

impl Inner {
    fn apply(&mut self, update: Update) -> Verdict {
        let begin = clock::now();
        let verdict = match &self.identity {
            Some(identity) if update.type_url.as_str() == PROXY_CONFIG => believe(identity, update),
            _ => Consumer::apply(&mut self.compiler, update),
        };
        let took: Duration = clock::now().duration_since(begin);
        self.micros.add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        self.applied.inc();
        self.tell(1);
        verdict
    }

    fn overdue(&mut self) {
        self.compiler.overdue();
        self.tell(0);
    }

    fn tell(&self, answers: u64) {
        let (missing, due) = (self.compiler.missing(), self.compiler.due());
        self.progress.send_modify(|progress| {
            progress.missing = missing;
            progress.answers += answers;
            progress.due = due;
        });
    }
}

/// What the downward API's file says under a name.
fn annotation(path: &Path, name: &str) -> Option<String> {
    downward(&std::fs::read_to_string(path).ok()?).remove(name)
}

fn take_limits(compiler: &mut Compiler, text: Option<&str>) {
    match compiler.limit(text) {
        Ok(()) if text.is_some() => tracing::info!("{OWN_LIMITS} is in use"),
        Ok(()) => tracing::info!("there is no {OWN_LIMITS} any more"),
        Err(error) => tracing::error!("{OWN_LIMITS} is refused, what was there before stays: {error}"),
    }
}

/// Takes over trust anchors. Where they cannot be used, those before stay.
fn believe(identity: &Identity, update: Update) -> Verdict {
    if update.changed.is_empty() {
        return Verdict::accepted();
    }
    let resources: Vec<Resource> = update.changed.into_iter().map(Resource::from).collect();
    let believed = trust::anchors(&resources).and_then(|pem| {
        identity
            .set_trust_anchors(&pem)
            .map_err(|error| format!("caCertificatesPem: {error}"))
    });
    believed.map_or_else(Verdict::refused, |()| Verdict::accepted())
}

/// What is asked of istiod, in the order in which answers can be used (contract xds §1.8). `peers`: the type by which workloads
/// are asked for; `trust_anchors`: whether roots beside those of the certificate are asked for.
pub fn subscriptions(peers: &'static str, trust_anchors: bool) -> Vec<Subscription> {
    let mut all = trust_anchors
        .then(|| Subscription::wildcard(PROXY_CONFIG))
        .into_iter()
        .collect::<Vec<_>>();
    all.extend([
        Subscription::wildcard(CLUSTERS),
        Subscription::by_name(ENDPOINTS),
        Subscription::wildcard(LISTENERS),
        Subscription::wildcard(peers),
        Subscription::by_name(EXTENSIONS),
        Subscription::by_name(SECRETS),
    ]);
    all
}

/// Whether clusters and listeners are in: what is missing then can be waited for, but not for ever.
pub fn has_base(status: &cairn_xds::StatusSnapshot) -> bool {
    [CLUSTERS, LISTENERS].into_iter().all(|url| {
        status
            .types
            .get(&TypeUrl::from(url))
            .is_some_and(|kind| kind.acked + kind.nacked > 0)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arc_swap::ArcSwap;

    use super::*;
    use crate::{snapshot::Snapshot, workloads::Workloads};

    fn update(type_url: &str) -> Update {
        Update {
            type_url: type_url.into(),
            system_version: "v1".to_owned(),
            nonce: "n".to_owned(),
            changed: Vec::new(),
            removed: Vec::new(),
            received: clock::now(),
            bytes: 0,
        }
    }

    #[test]
    fn what_is_missing_is_told_after_each_answer() {
        let workloads = Arc::new(Workloads::new(""));
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
        let registry = Registry::new();
        let (mut watched, progress) = Watched::new(Compiler::new(workloads, snapshot, None), &registry);
        assert!(
            progress.borrow().missing.iter().any(|item| item.contains("CDS")),
            "{:?}",
            progress.borrow()
        );
        assert_eq!(watched.apply(update(CLUSTERS)).error, None);
        let now = progress.borrow().clone();
        assert!(
            now.answers == 1 && !now.missing.iter().any(|item| item.contains("CDS")),
            "{now:?}"
        );
        assert!(now.missing.iter().any(|item| item.contains("LDS")), "{now:?}");
        assert_eq!(registry.counter("cairn_config_answers_total", "", &[]).get(), 1);
    }

    #[test]
    fn trust_anchors_of_istiod_are_believed_and_bad_ones_refused() {
        use cairn_identity::generate::Authority;
        use cairn_proto::istio::mesh::v1alpha1::ProxyConfig;
        use prost::Message as _;
        let us = "spiffe://cluster.local/ns/app/sa/waypoint".parse().unwrap();
        let identity = Identity::fixed(Authority::new("ours").unwrap().issue(&us).unwrap());
        let workloads = Arc::new(Workloads::new(""));
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
        let (watched, _progress) = Watched::new(Compiler::new(workloads, snapshot, None), &Registry::new());
        let mut watched = watched.believing(identity.clone());
        let mut send = |pem: String| {
            let config = ProxyConfig {
                ca_certificates_pem: vec![pem],
                ..Default::default()
            };
            // istiod gives it no name.
            let changed = cairn_xds::Changed {
                name: String::new(),
                version: String::new(),
                aliases: Vec::new(),
                type_url: PROXY_CONFIG.into(),
                bytes: config.encode_to_vec().into(),
            };
            watched.apply(Update {
                changed: vec![changed],
                ..update(PROXY_CONFIG)
            })
        };
        assert_eq!(send(Authority::new("theirs").unwrap().root_pem()).error, None);
        assert_eq!(identity.status().anchors, 1);
        let words = send("nothing".to_owned()).error.unwrap();
        assert!(words.starts_with("caCertificatesPem: the "), "{words}");
        assert_eq!(identity.status().anchors, 1);
        assert_eq!(subscriptions("x", false).len() + 1, subscriptions("x", true).len());
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_too_long_is_published_without_any_answer() {
        use crate::config::load::load;
        let workloads = Arc::new(Workloads::new(""));
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
        let (mut watched, mut progress) = Watched::new(Compiler::new(workloads, snapshot.clone(), None), &Registry::new());
        let running = tokio::spawn(watched.deadlines());
        let capture = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../conformance/fixtures/xds/istio-1.31.0-20260827/01-http-basic"
        );
        let begin = clock::now();
        for answer in load(capture.as_ref()).unwrap() {
            if answer.type_url == ENDPOINTS {
                continue;
            }
            let changed = answer.resources.into_iter().map(|resource| cairn_xds::Changed {
                name: resource.name,
                version: resource.version,
                aliases: Vec::new(),
                type_url: resource.type_url.into(),
                bytes: resource.bytes,
            });
            watched.apply(Update {
                changed: changed.collect(),
                ..update(&answer.type_url)
            });
        }
        assert!(snapshot.load().matcher.is_none());
        let all = progress.wait_for(|progress| progress.missing.is_empty()).await;
        assert_eq!(all.unwrap().due, None);
        assert_eq!(clock::now().duration_since(begin).as_secs(), 15);
        assert!(snapshot.load().matcher.is_some());
        drop(watched);
        running.await.unwrap();
    }
}
