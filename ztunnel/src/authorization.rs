//! `istio.security.Authorization` into conditions (layer 4 of an `AuthorizationPolicy`).
//!
//! A policy is an OR over rules, a rule an AND over clauses, a clause an OR over matches, a match an AND over fields; a field holds when
//! one of its values does (or it has none) and none of its `not_` values does. A rule without clauses and a clause without
//! matches always hold, a policy without rules never does, and a match without fields is passed over: istiod sends one for what is of
//! layer 7 in a DENY, which the waypoint enforces.
//!
//! A policy decides who gets in, so nothing in it is passed over: a value that cannot be read, an action, scope or field that is newer
//! than we are refuses the whole resource.

use std::sync::Arc;

use cairn_policy::{
    matcher::{Regex, StringMatch as Shape, StringMatcher},
    rbac::{Address as Which, Condition, Text},
};
use cairn_proto::istio::security::{
    Action as WireAction, Address, Authorization, Group, Match, Rules, Scope as WireScope, ServiceAccountMatch, StringMatch,
    string_match::MatchType,
};
use ipnet::IpNet;
use prost::Message as _;

use crate::{
    policies::{Action, Policy, Scope},
    wds::{self, Malformed},
};

/// The type that is subscribed to.
pub const TYPE: &str = "type.googleapis.com/istio.security.Authorization";

/// What is wrong, and where.
type Wrong = (&'static str, String);

/// Reads a policy.
pub fn read(resource: &str, bytes: &[u8]) -> Result<Policy, Malformed> {
    let malformed = |(field, reason): Wrong| Malformed {
        resource: resource.to_owned(),
        field: field.to_owned(),
        reason,
    };
    let wire = Authorization::decode(bytes).map_err(|error| malformed(("", format!("is no Authorization: {error}"))))?;
    if wire.encoded_len() != bytes.len() {
        let words = "has a field that is newer than this proxy, and may be the one that decides".to_owned();
        return Err(malformed(("", words)));
    }
    if format!("{}/{}", wire.namespace, wire.name) != resource {
        let words = format!("{}/{} is not the name of the resource", wire.namespace, wire.name);
        return Err(malformed(("name", words)));
    }
    policy(wire).map_err(malformed)
}

/// What is left of a policy that cannot be read, when there was none before: its worst. Without a scope that can be read it is everybody's.
pub fn worst(resource: &str, bytes: &[u8]) -> Policy {
    let wire = Authorization::decode(bytes).unwrap_or_default();
    let (namespace, name) = resource.split_once('/').unwrap_or_default();
    let allow = WireAction::try_from(wire.action) == Ok(WireAction::Allow) && !wire.name.is_empty();
    Policy {
        key: resource.into(),
        name: name.into(),
        namespace: namespace.into(),
        scope: scope(wire.scope).unwrap_or(Scope::Global),
        action: if allow { Action::Allow } else { Action::Deny },
        dry_run: false,
        // An ALLOW that allows nobody, a DENY that denies everybody.
        condition: if allow {
            Condition::AnyOf(Vec::new())
        } else {
            Condition::Always
        },
        wire: None,
    }
}

fn policy(wire: Authorization) -> Result<Policy, Wrong> {
    let shown = wire.clone();
    let Authorization {
        name,
        namespace,
        scope: scope_number,
        action,
        groups,
        dry_run,
        extensions,
    } = wire;
    refuse_extensions(&extensions)?;
    Ok(Policy {
        key: format!("{namespace}/{name}").into(),
        name: name.into(),
        namespace: namespace.into(),
        scope: scope(scope_number).ok_or_else(|| ("scope", format!("has the value {scope_number}, which is not known here")))?,
        action: match WireAction::try_from(action) {
            Ok(WireAction::Allow) => Action::Allow,
            Ok(WireAction::Deny) => Action::Deny,
            Err(_) => return Err(("action", format!("has the value {action}, which is not known here"))),
        },
        dry_run,
        condition: any_of(groups.into_iter().map(rule))?,
        wire: Some(Box::new(shown)),
    })
}

fn scope(number: i32) -> Option<Scope> {
    Some(match WireScope::try_from(number).ok()? {
        WireScope::Global => Scope::Global,
        WireScope::Namespace => Scope::Namespace,
        WireScope::WorkloadSelector => Scope::Selector,
    })
}

fn rule(Group { rules }: Group) -> Result<Condition, Wrong> {
    all(rules.into_iter().map(clause))
}

fn clause(Rules { matches }: Rules) -> Result<Condition, Wrong> {
    if matches.is_empty() {
        return Ok(Condition::Always);
    }
    any_of(matches.into_iter().filter(|one| *one != Match::default()).map(one_match))
}

fn one_match(wire: Match) -> Result<Condition, Wrong> {
    let Match {
        namespaces,
        not_namespaces,
        service_accounts,
        not_service_accounts,
        principals,
        not_principals,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
        extensions,
    } = wire;
    refuse_extensions(&extensions)?;
    let source = |address| range("source_ips", Which::DirectRemote, &address);
    let destination = |address| range("destination_ips", Which::Destination, &address);
    let fields = [
        field(namespaces, not_namespaces, |value| namespace("namespaces", value)),
        field(service_accounts, not_service_accounts, service_account),
        field(principals, not_principals, |value| principal("principals", value)),
        field(source_ips, not_source_ips, source),
        field(destination_ips, not_destination_ips, destination),
        field(destination_ports, not_destination_ports, port),
    ];
    all(fields.into_iter())
}

/// `(none, or one of them) and not one of those`.
fn field<T>(values: Vec<T>, not: Vec<T>, condition: impl Fn(T) -> Result<Condition, Wrong>) -> Result<Condition, Wrong> {
    let mut parts = Vec::with_capacity(2);
    if !values.is_empty() {
        parts.push(any_of(values.into_iter().map(&condition))?);
    }
    if !not.is_empty() {
        parts.push(Condition::Not(Box::new(any_of(not.into_iter().map(&condition))?)));
    }
    Ok(Condition::All(parts))
}

fn any_of(conditions: impl Iterator<Item = Result<Condition, Wrong>>) -> Result<Condition, Wrong> {
    Ok(Condition::AnyOf(conditions.collect::<Result<_, _>>()?))
}

fn all(conditions: impl Iterator<Item = Result<Condition, Wrong>>) -> Result<Condition, Wrong> {
    Ok(Condition::All(conditions.collect::<Result<_, _>>()?))
}

/// Principals are compared without their scheme, on both sides.
fn principal(field: &'static str, StringMatch { match_type }: StringMatch) -> Result<Condition, Wrong> {
    let bare = |text: String| -> Arc<str> { text.strip_prefix("spiffe://").unwrap_or(&text).into() };
    let shape = match match_type {
        Some(MatchType::Exact(text)) => Shape::Exact(bare(text)),
        Some(MatchType::Prefix(text)) => Shape::Prefix(bare(text)),
        Some(MatchType::Suffix(text)) => Shape::Suffix(text.into()),
        // Whoever has an identity.
        Some(MatchType::Presence(())) => Shape::Prefix("".into()),
        None => return Err(shapeless(field)),
    };
    Ok(peer(shape))
}

/// The namespace in the peer's identity, whatever its trust domain.
fn namespace(field: &'static str, StringMatch { match_type }: StringMatch) -> Result<Condition, Wrong> {
    let pattern = match match_type {
        Some(MatchType::Exact(text)) => literal(&text),
        Some(MatchType::Prefix(text)) => format!("{}[^/]*", literal(&text)),
        Some(MatchType::Suffix(text)) => format!("[^/]*{}", literal(&text)),
        Some(MatchType::Presence(())) => "[^/]+".to_owned(),
        None => return Err(shapeless(field)),
    };
    identity(field, &pattern, "[^/]+")
}

/// Namespace and service account in the peer's identity, whatever its trust domain.
fn service_account(wire: ServiceAccountMatch) -> Result<Condition, Wrong> {
    let ServiceAccountMatch {
        namespace,
        service_account,
    } = wire;
    identity("service_accounts", &literal(&namespace), &literal(&service_account))
}

fn identity(field: &'static str, namespace: &str, account: &str) -> Result<Condition, Wrong> {
    let pattern = format!("[^/]+/ns/{namespace}/sa/{account}");
    let regex = Regex::new(&pattern).map_err(|error| (field, error.to_string()))?;
    Ok(peer(Shape::Regex(regex)))
}

fn peer(shape: Shape) -> Condition {
    Condition::Text(Text::PeerPrincipal, StringMatcher::new(shape, false))
}

/// A text that stands for itself in a regular expression.
fn literal(text: &str) -> String {
    let special = |letter: char| r"\.+*?()|[]{}^$".contains(letter);
    text.chars()
        .flat_map(|letter| special(letter).then_some('\\').into_iter().chain([letter]))
        .collect()
}

fn range(field: &'static str, which: Which, wire: &Address) -> Result<Condition, Wrong> {
    let Address { address, length } = wire;
    let bytes = || format!("has {} bytes that are no IP address", address.len());
    let address = wds::ip(address).ok_or_else(|| (field, bytes()))?;
    let net = u8::try_from(*length).ok().and_then(|length| IpNet::new(address, length).ok());
    net.map(|net| Condition::Address(which, net))
        .ok_or_else(|| (field, format!("has a range of /{length}, which {address} cannot have")))
}

fn port(number: u32) -> Result<Condition, Wrong> {
    let port = u16::try_from(number).map_err(|_| ("destination_ports", format!("has the port {number}, which is none")))?;
    Ok(Condition::Port(port..=port))
}

fn shapeless(field: &'static str) -> Wrong {
    (field, "has a match of a kind that is not known here".to_owned())
}

fn refuse_extensions(extensions: &[cairn_proto::istio::workload::Extension]) -> Result<(), Wrong> {
    match extensions.first() {
        None => Ok(()),
        Some(first) => Err((
            "extensions",
            format!("has `{}`, which is not known here and may decide", first.name),
        )),
    }
}
