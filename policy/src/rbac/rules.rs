//! Rules: an action and policies by name, compiled.

use std::{collections::BTreeMap, sync::Arc};

use super::{Facts, Policy, compile::Check, index::Index};

/// What becomes of what a policy matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// It passes, and nothing else does.
    Allow,
    /// It is stopped, and nothing else is.
    Deny,
    /// It is marked; everything passes.
    Log,
}

/// Compiled rules.
#[derive(Clone, Debug)]
pub struct Rules {
    action: Action,
    policies: Box<[(Arc<str>, Check)]>,
    index: Option<Arc<Index>>,
    /// As configured, for those who ask why.
    plain: Arc<BTreeMap<String, Policy>>,
}

/// What rules say of a request or connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision<'a> {
    /// Whether it may pass.
    pub allowed: bool,
    /// The policy that matched, if one did.
    pub policy: Option<&'a Arc<str>>,
}

// === impl Rules ===

impl Rules {
    /// Compiles rules.
    pub fn new(action: Action, policies: BTreeMap<String, Policy>) -> Self {
        let compiled = policies
            .iter()
            .map(|(name, policy)| (name.as_str().into(), Check::policy(policy.clone())));
        Self {
            action,
            policies: compiled.collect(),
            index: Index::worthwhile(policies.values()).map(Arc::new),
            plain: Arc::new(policies),
        }
    }

    /// What becomes of what a policy matches.
    pub fn action(&self) -> Action {
        self.action
    }

    /// Names of the policies, in the order in which they are asked.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.policies.iter().map(|(name, _)| name)
    }

    /// The policies as configured.
    pub(super) fn plain(&self) -> &BTreeMap<String, Policy> {
        &self.plain
    }

    /// Whether only those policies are asked that an index finds.
    #[cfg(test)]
    pub(super) fn is_indexed(&self) -> bool {
        self.index.is_some()
    }

    /// Decides.
    pub fn decide(&self, facts: &Facts<'_>) -> Decision<'_> {
        let holds = |(_, check): &&(Arc<str>, Check)| check.holds(facts);
        let matched = match &self.index {
            None => self.policies.iter().find(holds),
            Some(index) => {
                let policy = |position: u32| self.policies.get(usize::try_from(position).ok()?);
                let candidates = index.candidates(facts).into_iter();
                candidates.filter_map(policy).find(holds)
            }
        };
        let allowed = match self.action {
            Action::Allow => matched.is_some(),
            Action::Deny => matched.is_none(),
            Action::Log => true,
        };
        Decision {
            allowed,
            policy: matched.map(|(name, _)| name),
        }
    }
}
