//! RBAC filters (contract xds §3.4, §6.2): of requests, of TCP connections, and of tunnels (§6.9).
//!
//! Presence decides: `rules: {}` denies everything, no `rules` at all denies nothing (contract seen §1, row 6.5). What of
//! enforced rules we cannot evaluate refuses the chain. Rules that are only tried out decide nothing, so that what cannot be
//! evaluated of them is listed, and they are left out.

mod condition;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use cairn_policy::rbac::{Action, Policy, Rbac, Rules, Shadow};
use cairn_proto::envoy::{
    config::rbac::v3::{Permission, Policy as EnvoyPolicy, Rbac as EnvoyRules, rbac::Action as EnvoyAction},
    extensions::filters::{http::rbac::v3::Rbac as HttpRbac, network::rbac::v3::Rbac as NetworkRbac},
};

pub(crate) use condition::metadata;

use super::{
    cel,
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
};

/// What the result of shadow rules that only ask whether an external authorizer is to be called begins with (contract xds §6.7):
/// unlike those of a dry run they decide something, so that what of them cannot be evaluated refuses.
pub(crate) const EXTERNAL: &str = "istio_ext_authz_";

/// Where a filter stands, which decides what its conditions can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// Before requests of a chain.
    Http,
    /// Before the bytes of a chain.
    Network,
    /// Before the CONNECTs of tunnels.
    Tunnel,
}

/// An RBAC filter of requests.
pub(crate) fn http(filter: HttpRbac, notes: &mut Notes) -> Result<Rbac, Malformed> {
    of_requests(filter, Layer::Http, notes)
}

/// An RBAC filter of CONNECTs.
pub(crate) fn tunnel(filter: HttpRbac, notes: &mut Notes) -> Result<Rbac, Malformed> {
    of_requests(filter, Layer::Tunnel, notes)
}

/// Whether any rule, enforced or tried out, looks at the server name that a client asks for in TLS.
pub(crate) fn asks_server_name(filter: &NetworkRbac) -> bool {
    let rules = filter.rules.iter().chain(&filter.shadow_rules);
    let policies = rules.flat_map(|rules| rules.policies.values());
    policies
        .flat_map(|policy| &policy.permissions)
        .any(permission_asks_server_name)
}

fn permission_asks_server_name(permission: &Permission) -> bool {
    use cairn_proto::envoy::config::rbac::v3::permission::Rule;
    match &permission.rule {
        Some(Rule::RequestedServerName(_)) => true,
        Some(Rule::AndRules(set) | Rule::OrRules(set)) => set.rules.iter().any(permission_asks_server_name),
        Some(Rule::NotRule(inner)) => permission_asks_server_name(inner),
        _ => false,
    }
}

fn of_requests(filter: HttpRbac, layer: Layer, notes: &mut Notes) -> Result<Rbac, Malformed> {
    let HttpRbac {
        rules,
        rules_stat_prefix,
        matcher,
        shadow_rules,
        shadow_matcher,
        shadow_rules_stat_prefix,
        track_per_rule_stats,
    } = filter;
    ignore_set!(notes, rules_stat_prefix, track_per_rule_stats);
    refuse_set!(notes, matcher);
    ignore_set!(notes, shadow_matcher);
    both(rules, shadow_rules, &shadow_rules_stat_prefix, layer, notes)
}

/// An RBAC filter of connections.
pub(crate) fn network(filter: NetworkRbac, notes: &mut Notes) -> Result<Rbac, Malformed> {
    let NetworkRbac {
        rules,
        matcher,
        shadow_rules,
        shadow_matcher,
        shadow_rules_stat_prefix,
        stat_prefix,
        enforcement_type,
        delay_deny,
    } = filter;
    // A connection is decided once, before anything passes: nothing that is known of it can change later.
    unneeded!(stat_prefix, enforcement_type);
    refuse_set!(notes, matcher);
    ignore_set!(notes, shadow_matcher, delay_deny);
    both(rules, shadow_rules, &shadow_rules_stat_prefix, Layer::Network, notes)
}

fn both(
    rules: Option<EnvoyRules>,
    shadow: Option<EnvoyRules>,
    prefix: &str,
    layer: Layer,
    notes: &mut Notes,
) -> Result<Rbac, Malformed> {
    let rules = rules
        .map(|rules| notes.within("rules", |notes| compile(rules, layer, notes)))
        .transpose()?;
    if rules.as_ref().is_some_and(|rules| rules.action() == Action::Log) {
        notes.ignore("rules", "requests are marked for audit in the record alone");
    }
    let shadow = match shadow {
        None => None,
        Some(rules) if prefix == EXTERNAL => Some(notes.within("shadow_rules", |notes| compile(rules, layer, notes))?),
        Some(rules) => notes.within("shadow_rules", |notes| tried_out(rules, layer, notes))?,
    };
    Ok(Rbac {
        rules,
        shadow: shadow.map(|rules| Shadow::new(rules, prefix)),
    })
}

/// Rules of a dry run: what cannot be evaluated of them stops nobody.
fn tried_out(rules: EnvoyRules, layer: Layer, notes: &mut Notes) -> Result<Option<Rules>, Malformed> {
    let mut apart = Notes::of("");
    let compiled = compile(rules, layer, &mut apart).map_err(|error| notes.malformed(&error.field, error.what))?;
    if let Some(refusal) = apart.refusal() {
        notes.ignore("", format!("the dry run is left out: {refusal}"));
        return Ok(None);
    }
    notes.ignore(
        "",
        "results of dry runs stand in the record alone, not in metrics and traces yet",
    );
    Ok(Some(compiled))
}

fn compile(rules: EnvoyRules, layer: Layer, notes: &mut Notes) -> Result<Rules, Malformed> {
    let EnvoyRules {
        action,
        policies,
        audit_logging_options,
    } = rules;
    ignore_set!(notes, audit_logging_options);
    let action = match EnvoyAction::try_from(action) {
        Ok(EnvoyAction::Allow) => Action::Allow,
        Ok(EnvoyAction::Deny) => Action::Deny,
        Ok(EnvoyAction::Log) => Action::Log,
        Err(_) => return Err(notes.malformed("action", format!("{action} is not known"))),
    };
    let mut compiled = BTreeMap::new();
    for (name, policy) in policies {
        let policy = notes.within(format!("policies[{name}]"), |notes| compile_policy(policy, layer, notes))?;
        compiled.insert(name, policy);
    }
    Ok(Rules::new(action, compiled))
}

fn compile_policy(policy: EnvoyPolicy, layer: Layer, notes: &mut Notes) -> Result<Policy, Malformed> {
    let EnvoyPolicy {
        permissions,
        principals,
        condition,
        checked_condition,
        cel_config,
    } = policy;
    // Envoy reads the checked one only where there is no other.
    let expression = condition
        .map(|condition| ("condition", condition))
        .or_else(|| checked_condition.map(|condition| ("checked_condition", cel::checked(condition))));
    let condition = match expression {
        None => None,
        Some((field, _)) if layer == Layer::Tunnel => {
            notes.refuse(field, "is not evaluated before a tunnel is accepted");
            None
        }
        Some((field, expression)) => cel::deciding(field, expression, cel::options(cel_config), notes)?,
    };
    Ok(Policy {
        permissions: condition::each("permissions", permissions, notes, |one, notes| {
            condition::permission(one, layer, notes)
        })?,
        principals: condition::each("principals", principals, notes, |one, notes| {
            condition::principal(one, layer, notes)
        })?,
        condition,
    })
}
