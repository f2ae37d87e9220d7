//! What policies mean, read off the plain trees: the measure of the compiled form.

use std::collections::BTreeMap;

use cairn_exchange::cel::Program;

use super::{Action, Condition, Facts, Policy};

/// Whether a condition holds.
pub fn holds(condition: &Condition, facts: &Facts<'_>) -> bool {
    match condition {
        Condition::Always => true,
        Condition::All(all) => all.iter().all(|one| holds(one, facts)),
        Condition::AnyOf(any) => any.iter().any(|one| holds(one, facts)),
        Condition::Not(inner) => !holds(inner, facts),
        Condition::Header(matcher) => facts.header_matches(matcher),
        Condition::Path(matcher) => facts.path().is_some_and(|path| matcher.matches(path.as_bytes())),
        Condition::Template(template) => facts.path().is_some_and(|path| template.matches(path)),
        Condition::Address(which, net) => facts.address(*which).is_some_and(|address| net.contains(&address)),
        Condition::Port(range) => range.contains(&facts.destination_port),
        Condition::Text(which, matcher) => facts.text(*which).is_some_and(|text| matcher.matches(text.as_bytes())),
        Condition::State(key, matcher) => facts.state(key).is_some_and(|text| matcher.matches(&text)),
        Condition::Authenticated => facts.certificate.is_some(),
        Condition::Metadata(matcher) => matcher.matches(facts.metadata),
    }
}

/// Whether an expression holds, where there is one. What is not evaluated before a tunnel is accepted does not.
pub fn agrees(condition: Option<&Program>, facts: &Facts<'_>) -> bool {
    condition.is_none_or(|program| facts.view().is_some_and(|view| program.holds(&view)))
}

/// What rules say: whether it passes, and the policy that matched.
pub fn decide<'a>(action: Action, policies: &'a BTreeMap<String, Policy>, facts: &Facts<'_>) -> (bool, Option<&'a str>) {
    let any = |conditions: &[Condition]| conditions.iter().any(|one| holds(one, facts));
    let matched = policies
        .iter()
        .find(|(_, policy)| any(&policy.permissions) && any(&policy.principals) && agrees(policy.condition.as_deref(), facts));
    let allowed = match action {
        Action::Allow => matched.is_some(),
        Action::Deny => matched.is_none(),
        Action::Log => true,
    };
    (allowed, matched.map(|(name, _)| name.as_str()))
}
