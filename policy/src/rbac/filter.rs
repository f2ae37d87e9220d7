//! An RBAC filter, and several of them in a row.

use std::sync::Arc;

use cairn_exchange::{Exchange, ShadowDecision};

use super::{Action, Decision, Facts, Rules};

/// One RBAC filter. Without rules everything passes; rules without policies are something else.
#[derive(Clone, Debug, Default)]
pub struct Rbac {
    /// What is enforced.
    pub rules: Option<Rules>,
    /// What is only tried out.
    pub shadow: Option<Shadow>,
}

/// Rules that are tried out: a dry run, or the question whether an external authorizer is to be asked (contract xds §6.6, §6.7).
#[derive(Clone, Debug)]
pub struct Shadow {
    /// The rules.
    pub rules: Rules,
    /// What the names of their results begin with: `istio_dry_run_allow_`, …
    pub prefix: Arc<str>,
}

/// What one filter says.
#[derive(Clone, Copy, Debug)]
pub struct Outcome<'a> {
    /// What is enforced.
    pub enforced: Option<Decision<'a>>,
    /// What would have been.
    pub shadow: Option<(&'a Shadow, Decision<'a>)>,
}

/// The filters of a connection, in order: all have to let it pass. A set is equal to itself only, and to another without filters.
#[derive(Clone, Debug, Default)]
pub struct Filters(Arc<[Rbac]>);

/// What a filter does not let pass, and by which policy: none for an ALLOW that nothing matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The policy.
    pub policy: Option<Arc<str>>,
}

/// What denied requests are answered with.
pub(super) const ANSWER: &str = "RBAC: access denied";

// === impl Rbac ===

impl Rbac {
    /// Decides; the shadow rules first, as Envoy does, though neither knows of the other.
    pub fn decide(&self, facts: &Facts<'_>) -> Outcome<'_> {
        Outcome {
            shadow: self.shadow.as_ref().map(|shadow| (shadow, shadow.rules.decide(facts))),
            enforced: self.rules.as_ref().map(|rules| rules.decide(facts)),
        }
    }

    /// Decides about a request or connection inside a tunnel, and notes in its record what does not stop it.
    pub fn check(&self, exchange: &mut Exchange) -> Result<(), Denied> {
        let outcome = self.decide(&Facts::inside(exchange));
        let denied = outcome.denied();
        let marked = self.marks(&outcome);
        let shadow = outcome.shadow.map(|(shadow, decision)| ShadowDecision {
            prefix: shadow.prefix.clone(),
            allowed: decision.allowed,
            policy: decision.policy.cloned(),
        });
        exchange.shadow.extend(shadow);
        exchange.audited |= marked;
        denied.map_or(Ok(()), Err)
    }

    /// Whether the enforced rules are an audit that matched.
    fn marks(&self, outcome: &Outcome<'_>) -> bool {
        self.rules.as_ref().is_some_and(|rules| rules.action() == Action::Log)
            && outcome.enforced.is_some_and(|decision| decision.policy.is_some())
    }
}

// === impl Outcome ===

impl Outcome<'_> {
    /// Whether it is stopped.
    pub fn denied(&self) -> Option<Denied> {
        let decision = self.enforced.filter(|decision| !decision.allowed)?;
        Some(Denied {
            policy: decision.policy.cloned(),
        })
    }
}

// === impl Filters ===

impl Filters {
    /// The filters, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Rbac> {
        self.0.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Decides about a connection inside a tunnel; the first filter that denies it ends the way.
    pub fn check(&self, exchange: &mut Exchange) -> Result<(), Denied> {
        self.0.iter().try_for_each(|filter| filter.check(exchange))
    }

    /// Decides by these facts alone.
    pub fn decide(&self, facts: &Facts<'_>) -> Result<(), Denied> {
        self.0
            .iter()
            .try_for_each(|filter| filter.decide(facts).denied().map_or(Ok(()), Err))
    }
}

impl FromIterator<Rbac> for Filters {
    fn from_iter<I: IntoIterator<Item = Rbac>>(filters: I) -> Self {
        Self(filters.into_iter().collect())
    }
}

impl PartialEq for Filters {
    fn eq(&self, other: &Self) -> bool {
        (self.is_empty() && other.is_empty()) || Arc::ptr_eq(&self.0, &other.0)
    }
}

// === impl Denied ===

impl Denied {
    /// The text of the answer.
    pub const ANSWER: &'static str = ANSWER;

    /// Why, in Envoy's words (contract xds §3.4).
    pub fn details(&self) -> String {
        details(self.policy.as_deref())
    }
}

/// `rbac_access_denied_matched_policy[…]`; white space in a name becomes `_`, so that it stays one word of a log.
pub fn details(policy: Option<&str>) -> String {
    let mut details = "rbac_access_denied_matched_policy[".to_owned();
    match policy.filter(|name| !name.is_empty()) {
        Some(name) => details.extend(
            name.chars()
                .map(|letter| if letter.is_ascii_whitespace() { '_' } else { letter }),
        ),
        None => details.push_str("none"),
    }
    details.push(']');
    details
}
