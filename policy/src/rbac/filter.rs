//! An RBAC filter, and several of them in a row.

use std::sync::{Arc, LazyLock};

use cairn_exchange::{DynamicMetadata, Exchange, Protocol, ShadowDecision};
use serde_json::Value;

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
    /// Under which the policy that matched is noted.
    policy_key: Arc<str>,
    /// Under which the result is noted.
    result_key: Arc<str>,
}

/// Where the results of shadow rules are noted, by what was decided about.
const OF_REQUESTS: &str = "envoy.filters.http.rbac";
const OF_CONNECTIONS: &str = "envoy.filters.network.rbac";

/// Where an audit notes whether it matched, for logs: `true` or `false`.
static AUDIT_HINT: LazyLock<[Arc<str>; 2]> = LazyLock::new(|| ["envoy.common".into(), "access_log_hint".into()]);

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
        if let Some((shadow, decision)) = outcome.shadow {
            let namespace = match exchange.protocol {
                Protocol::Tcp => OF_CONNECTIONS,
                Protocol::Http10 | Protocol::Http11 | Protocol::Http2 => OF_REQUESTS,
            };
            shadow.note(decision, namespace, &mut exchange.metadata);
            exchange.shadow.push(ShadowDecision {
                prefix: shadow.prefix.clone(),
                allowed: decision.allowed,
                policy: decision.policy.cloned(),
            });
        }
        if let Some(marked) = marked {
            exchange.audited |= marked;
            let [namespace, key] = &*AUDIT_HINT;
            exchange
                .metadata
                .set(namespace.clone(), key.clone(), Arc::new(Value::Bool(marked)));
        }
        denied.map_or(Ok(()), Err)
    }

    /// Where the enforced rules are an audit: whether it matched.
    fn marks(&self, outcome: &Outcome<'_>) -> Option<bool> {
        self.rules.as_ref().filter(|rules| rules.action() == Action::Log)?;
        Some(outcome.enforced?.policy.is_some())
    }
}

// === impl Shadow ===

impl Shadow {
    /// Rules that are tried out, and what the names of their results begin with.
    pub fn new(rules: Rules, prefix: impl Into<Arc<str>>) -> Self {
        let prefix = prefix.into();
        Self {
            policy_key: format!("{prefix}shadow_effective_policy_id").into(),
            result_key: format!("{prefix}shadow_engine_result").into(),
            rules,
            prefix,
        }
    }

    /// Notes the result, for filters behind this one. Where nothing matched, the policy that an earlier filter of the same prefix noted
    /// is forgotten: an authorizer that stands behind this filter is asked about what this filter's own rules matched. Envoy keeps it,
    /// so that the rules of one provider may call another (contract xds §6.7).
    fn note(&self, decision: Decision<'_>, namespace: &str, metadata: &mut DynamicMetadata) {
        let result = if decision.allowed { "allowed" } else { "denied" };
        metadata.set(namespace.into(), self.result_key.clone(), Arc::new(Value::from(result)));
        match decision.policy {
            Some(policy) => {
                let policy = Arc::new(Value::from(&**policy));
                metadata.set(namespace.into(), self.policy_key.clone(), policy);
            }
            None => metadata.remove(namespace, &self.policy_key),
        }
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
        self.check_from(0, self.0.len(), exchange)
    }

    /// The same by some of them: from one place in their order up to another.
    pub fn check_from(&self, from: usize, to: usize, exchange: &mut Exchange) -> Result<(), Denied> {
        let mut some = self.0.iter().take(to).skip(from);
        some.try_for_each(|filter| filter.check(exchange))
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
