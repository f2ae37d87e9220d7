//! Where istiod's answers meet the compiler, and who hears of what is still missing.
//!
//! The client hands each answer to [`Watched`], which gives it to the one [`Compiler`] and tells [`Progress`] what came of it:
//! readiness and start wait on that, metrics read it. It runs on a blocking thread of the control runtime (architecture rule 8).

use std::time::Duration;

use cairn_exchange::clock;
use cairn_telemetry::{Counter, Registry};
use cairn_xds::{Consumer, Subscription, TypeUrl, Update, Verdict};
use tokio::sync::watch;

use crate::config::{
    Compiler,
    compiler::{CLUSTERS, ENDPOINTS, EXTENSIONS, LISTENERS, SECRETS},
};

/// The compiler, watched.
#[derive(Debug)]
pub struct Watched {
    compiler: Compiler,
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
}

// === impl Watched ===

impl Watched {
    /// Watches `compiler`; the receiver knows how far it has come.
    pub fn new(compiler: Compiler, registry: &Registry) -> (Self, watch::Receiver<Progress>) {
        let (progress, receiver) = watch::channel(Progress {
            missing: compiler.missing(),
            answers: 0,
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
        (
            Self {
                compiler,
                progress,
                applied,
                micros,
            },
            receiver,
        )
    }
}

impl Consumer for Watched {
    fn apply(&mut self, update: Update) -> Verdict {
        let begin = clock::now();
        let verdict = Consumer::apply(&mut self.compiler, update);
        let took: Duration = clock::now().duration_since(begin);
        self.micros.add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        self.applied.inc();
        let missing = self.compiler.missing();
        self.progress.send_modify(|progress| {
            progress.missing = missing;
            progress.answers += 1;
        });
        verdict
    }
}

/// What is asked of istiod, in the order in which answers can be used (contract xds §1.8). `peers`: the type by which workloads
/// are asked for.
pub fn subscriptions(peers: &'static str) -> Vec<Subscription> {
    vec![
        Subscription::wildcard(CLUSTERS),
        Subscription::by_name(ENDPOINTS),
        Subscription::wildcard(LISTENERS),
        Subscription::wildcard(peers),
        Subscription::by_name(EXTENSIONS),
        Subscription::by_name(SECRETS),
    ]
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
}
