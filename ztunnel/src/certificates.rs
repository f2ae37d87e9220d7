//! The certificates of the pods on this node: one for each service account, for as long as somebody needs it.
//!
//! What keeps one fresh is [`cairn_identity::Identity`]: half-life renewal, growing waits after failures, the old one while it is good.
//! Here are the questions of many: a few requests at a time, the urgent first ([`Turns`]); a failure of one is nobody else's; those of
//! pods that are expected on this node are prepared; the last pod of an account takes its certificate along.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
};

use cairn_exchange::SpiffeId;
use cairn_identity::{CaSettings, Credentials, Identity, Source, Turn, Turns, Urgency};
use parking_lot::Mutex;
use tokio::runtime;

/// Requests to the authority at a time.
const AT_A_TIME: usize = 8;
/// Accounts that certificates are prepared for.
const MOST_PREPARED: usize = 4096;

/// Where certificates come from.
pub enum Authority {
    /// istiod. With `impersonate`, the token is the node's.
    Istiod {
        /// Everything but the identity.
        settings: Box<CaSettings>,
    },
    /// Somebody in this process.
    Made(Box<Make>),
}

/// Makes a certificate for an identity.
pub type Make = dyn Fn(&SpiffeId) -> Credentials + Send + Sync;

/// The certificates of this node.
pub struct Certificates {
    authority: Authority,
    turns: Turns,
    held: Mutex<HashMap<SpiffeId, Weak<Held>>>,
    prepared: Mutex<HashMap<Arc<str>, Arc<Held>>>,
    runtime: runtime::Handle,
}

/// One account's certificate; it is kept fresh until this is dropped.
pub struct Held {
    /// The certificate.
    pub identity: Identity,
    turn: Turn,
}

// === impl Certificates ===

impl Certificates {
    /// None yet; work for them is done on `runtime`.
    pub fn new(authority: Authority, runtime: runtime::Handle) -> Self {
        Self {
            authority,
            turns: Turns::new(AT_A_TIME),
            held: Mutex::default(),
            prepared: Mutex::default(),
            runtime,
        }
    }

    /// The certificate of an account.
    pub fn hold(&self, id: &SpiffeId, urgency: Urgency) -> Arc<Held> {
        let mut held = self.held.lock();
        if let Some(there) = held.get(id).and_then(Weak::upgrade) {
            if urgency == Urgency::Waiting && there.identity.current().is_none() {
                there.turn.set(urgency);
            }
            return there;
        }
        held.retain(|_, other| other.strong_count() > 0);
        let turn = self.turns.turn(urgency);
        let source = match &self.authority {
            Authority::Istiod { settings } => {
                let settings = CaSettings {
                    id: id.clone(),
                    turns: Some(turn.clone()),
                    ..CaSettings::clone(settings)
                };
                Source::CertificateAuthority(settings)
            }
            Authority::Made(make) => Source::Fixed(make(id)),
        };
        let _control = self.runtime.enter();
        let identity = Identity::start(source);
        let new = Arc::new(Held { identity, turn });
        held.insert(id.clone(), Arc::downgrade(&new));
        new
    }

    /// A workload is on this node and may need its certificate soon.
    pub fn prepare(&self, uid: &Arc<str>, id: &SpiffeId) {
        let mut prepared = self.prepared.lock();
        if prepared.len() < MOST_PREPARED || prepared.contains_key(uid) {
            let held = self.hold(id, Urgency::Prepared);
            prepared.insert(uid.clone(), held);
        }
    }

    /// A workload is not on this node any more.
    pub fn forget(&self, uid: &str) {
        self.prepared.lock().remove(uid);
    }

    /// All, by identity.
    pub fn all(&self) -> Vec<(SpiffeId, Identity)> {
        let held = self.held.lock();
        let alive = held
            .iter()
            .filter_map(|(id, held)| Some((id.clone(), held.upgrade()?.identity.clone())));
        let mut all: Vec<_> = alive.collect();
        all.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
        all
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates")
            .field("held", &self.held.lock().keys())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use cairn_identity::generate;

    use super::*;

    #[tokio::test]
    async fn an_account_has_one_certificate_until_the_last_who_needs_it_is_gone() {
        let ca = generate::Authority::new("test").unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let make = move |id: &SpiffeId| {
            count.fetch_add(1, Relaxed);
            ca.issue(id).unwrap()
        };
        let certificates = Certificates::new(Authority::Made(Box::new(make)), runtime::Handle::current());
        let id: SpiffeId = "spiffe://cluster.local/ns/app/sa/web".parse().unwrap();
        certificates.prepare(&"uid".into(), &id);
        let (one, two) = (
            certificates.hold(&id, Urgency::Waiting),
            certificates.hold(&id, Urgency::Waiting),
        );
        assert_eq!((asked.load(Relaxed), certificates.all().len()), (1, 1));
        drop((one, two));
        assert_eq!(certificates.all().len(), 1);
        certificates.forget("uid");
        assert_eq!(certificates.all().len(), 0);
        certificates.hold(&id, Urgency::Waiting);
        assert_eq!(asked.load(Relaxed), 2);
    }
}
