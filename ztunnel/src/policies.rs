//! The policies of the mesh, and what they mean for one workload.
//!
//! [`Policies`] holds every policy by name and by where it applies. [`Ruling`] is what applies to one workload, compiled: all DENY
//! policies as one set of rules, all ALLOW policies as another, and the same for those that are only tried out. It is made anew when
//! policies or the workload change, so that a connection costs two look-ups and no allocation.
//!
//! Any DENY that matches denies; with an ALLOW policy there, one has to match; else everybody may. A policy that the workload names and
//! that nobody has heard of denies as well: it may be the one that should.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use arc_swap::ArcSwap;
use cairn_exchange::SpiffeId;
use cairn_policy::rbac::{self, Condition, Facts, Rules};
use cairn_proto::istio::security::Authorization;
use tokio::sync::watch;

use crate::mesh::Workload;

/// One policy.
#[derive(Clone, Debug)]
pub struct Policy {
    /// `namespace/name`.
    pub key: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Whom it is about.
    pub scope: Scope,
    /// What becomes of what it matches.
    pub action: Action,
    /// It is only tried out.
    pub dry_run: bool,
    /// When it matches.
    pub condition: Condition,
    /// As it was sent, for display; `None` where it could not be read.
    pub wire: Option<Box<Authorization>>,
}

/// Whom a policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everybody.
    Global,
    /// The workloads of its namespace.
    Namespace,
    /// Workloads that name it.
    Selector,
}

/// What becomes of what a policy matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It may pass.
    Allow,
    /// It may not.
    Deny,
}

/// All policies; one writer, and readers that never wait.
#[derive(Debug)]
pub struct Policies {
    all: ArcSwap<BTreeMap<Arc<str>, Arc<Policy>>>,
    /// Names that have been heard of and are gone: no reason to deny.
    gone: ArcSwap<BTreeSet<Arc<str>>>,
    version: watch::Sender<u64>,
}

/// A connection, as policies see it.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Who opened it; `None` for plaintext.
    pub peer: Option<&'a SpiffeId>,
    /// Where it comes from.
    pub source: IpAddr,
    /// The pod's address and port, after translation.
    pub destination: SocketAddr,
}

/// What applies to one workload.
#[derive(Clone, Debug, Default)]
pub struct Ruling {
    /// Which version of the policies it was made of.
    pub version: u64,
    deny: Option<Rules>,
    allow: Option<Rules>,
    dry_deny: Option<Rules>,
    dry_allow: Option<Rules>,
    /// Policies that the workload names and nobody knows.
    unknown: Box<[Arc<str>]>,
}

/// Why a connection may not pass.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// A DENY policy matches.
    #[error("connection closed due to policy rejection: explicitly denied by: {0}")]
    By(Arc<str>),
    /// There are ALLOW policies and none matches.
    #[error("connection closed due to policy rejection: allow policies exist, but none allowed")]
    NoneAllows,
    /// A policy that the workload names is not known.
    #[error("connection closed due to policy rejection: the policy {0} has not arrived, and may be one that denies")]
    Unknown(Arc<str>),
}

/// What a policy that is only tried out would have done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DryRun {
    /// Whether it would have passed.
    pub allowed: bool,
    /// The policy that decided; none for want of one that allows.
    pub policy: Option<Arc<str>>,
}

/// Names of policies that are gone and still remembered.
const MOST_GONE: usize = 10_000;

impl Default for Policies {
    fn default() -> Self {
        Self {
            all: ArcSwap::default(),
            gone: ArcSwap::default(),
            version: watch::Sender::new(0),
        }
    }
}

// === impl Policies ===

impl Policies {
    /// Takes over what one push changed.
    pub fn change(&self, changed: Vec<Policy>, removed: &[String]) {
        let mut all = BTreeMap::clone(&self.all.load());
        let mut gone = BTreeSet::clone(&self.gone.load());
        for name in removed {
            all.remove(name.as_str());
            gone.insert(name.as_str().into());
        }
        while gone.len() > MOST_GONE {
            gone.pop_first();
        }
        for policy in changed {
            gone.remove(&policy.key);
            all.insert(policy.key.clone(), Arc::new(policy));
        }
        self.gone.store(Arc::new(gone));
        self.all.store(Arc::new(all));
        self.version.send_modify(|version| *version += 1);
    }

    /// Whether a policy is known.
    pub fn contains(&self, key: &str) -> bool {
        self.all.load().contains_key(key)
    }

    /// All of them.
    pub fn all(&self) -> Arc<BTreeMap<Arc<str>, Arc<Policy>>> {
        self.all.load_full()
    }

    /// Changes with each push.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// The number of the newest push.
    pub fn version(&self) -> u64 {
        *self.version.borrow()
    }

    /// What applies to a workload.
    pub fn ruling(&self, workload: &Workload) -> Ruling {
        // Before the policies, so that a ruling is never taken for newer than it is.
        let version = self.version();
        let all = self.all.load();
        let applies = |policy: &Policy| match policy.scope {
            Scope::Global => true,
            Scope::Namespace => *policy.namespace == *workload.facts.namespace,
            Scope::Selector => workload.policies.contains(&policy.key),
        };
        let of = |action: Action, dry_run: bool| {
            let chosen = all
                .values()
                .filter(|policy| policy.action == action && policy.dry_run == dry_run && applies(policy));
            let policies: BTreeMap<_, _> = chosen.map(|policy| (policy.key.to_string(), policy.for_rules())).collect();
            let action = match action {
                Action::Allow => rbac::Action::Allow,
                Action::Deny => rbac::Action::Deny,
            };
            (!policies.is_empty()).then(|| Rules::new(action, policies))
        };
        let gone = self.gone.load();
        let unknown = workload
            .policies
            .iter()
            .filter(|key| !all.contains_key(*key) && !gone.contains(*key));
        Ruling {
            version,
            deny: of(Action::Deny, false),
            allow: of(Action::Allow, false),
            dry_deny: of(Action::Deny, true),
            dry_allow: of(Action::Allow, true),
            unknown: unknown.cloned().collect(),
        }
    }
}

// === impl Policy ===

impl Policy {
    fn for_rules(&self) -> rbac::Policy {
        rbac::Policy {
            permissions: vec![self.condition.clone()],
            principals: vec![Condition::Always],
            condition: None,
        }
    }
}

// === impl Ruling ===

impl Ruling {
    /// Decides about a connection.
    pub fn decide(&self, asked: Asked<'_>) -> Result<(), Denied> {
        self.decide_known(asked)?;
        match self.unknown.first() {
            Some(unknown) => Err(Denied::Unknown(unknown.clone())),
            None => Ok(()),
        }
    }

    /// Decides by the policies that are known; for connections that were let in before one was named that is still on its way.
    pub fn decide_known(&self, asked: Asked<'_>) -> Result<(), Denied> {
        let facts = asked.facts();
        if let Some(policy) = self.deny.as_ref().and_then(|rules| rules.decide(&facts).policy) {
            return Err(Denied::By(policy.clone()));
        }
        match &self.allow {
            Some(rules) if !rules.decide(&facts).allowed => Err(Denied::NoneAllows),
            _ => Ok(()),
        }
    }

    /// What the policies that are only tried out would have done, where they would have denied or decided.
    pub fn try_out(&self, asked: Asked<'_>) -> Option<DryRun> {
        if self.dry_deny.is_none() && self.dry_allow.is_none() {
            return None;
        }
        let facts = asked.facts();
        if let Some(policy) = self.dry_deny.as_ref().and_then(|rules| rules.decide(&facts).policy) {
            return Some(DryRun {
                allowed: false,
                policy: Some(policy.clone()),
            });
        }
        let decision = self.dry_allow.as_ref()?.decide(&facts);
        Some(DryRun {
            allowed: decision.allowed,
            policy: decision.policy.cloned(),
        })
    }

    /// Whether a policy that the workload names has not arrived.
    pub fn is_incomplete(&self) -> bool {
        !self.unknown.is_empty()
    }
}

// === impl Asked ===

impl<'a> Asked<'a> {
    fn facts(&self) -> Facts<'a> {
        let principal = self.peer.map(|peer| peer.as_str());
        let bare = principal.map(|text| text.strip_prefix("spiffe://").unwrap_or(text));
        Facts::of_connection(bare, self.source, self.destination)
    }
}

#[cfg(test)]
mod tests;
