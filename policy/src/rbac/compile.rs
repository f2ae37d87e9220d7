//! Conditions in the form in which they are asked.
//!
//! Alternatives that compare one text or the path with whole strings become one lookup in a set, ranges of one address one search,
//! ports a sorted list; what always or never holds is folded away; what costs least is asked first. None of it changes what
//! holds: a condition has no effect but its answer.

use std::{collections::HashSet, ops::RangeInclusive, sync::Arc};

use cairn_exchange::cel::Program;
use foldhash::fast::RandomState;
use ipnet::IpNet;

use super::{Address, Condition, Facts, Policy, Text, UriTemplate, interpret};
use crate::matcher::{CidrSet, HeaderMatch, HeaderMatcher, HeaderName, MetadataMatcher, StringMatch, StringMatcher};

type Strings = HashSet<Box<[u8]>, RandomState>;

/// A compiled condition.
#[derive(Clone, Debug)]
pub(super) enum Check {
    Always,
    Never,
    All(Box<[Check]>),
    AnyOf(Box<[Check]>),
    Not(Box<Check>),
    Ports(Box<[RangeInclusive<u16>]>),
    Authenticated,
    Addresses(Address, CidrSet),
    Text(Text, StringMatcher),
    TextIn(Text, Strings),
    Path(StringMatcher),
    PathIn(Strings),
    Header(HeaderMatcher),
    HeaderIn(HeaderName, Strings),
    Template(UriTemplate),
    Metadata(MetadataMatcher),
    Expression(Arc<Program>),
}

/// Alternatives being put together.
#[derive(Default)]
struct Alternatives {
    always: bool,
    ports: Vec<RangeInclusive<u16>>,
    ranges: Vec<(Address, Vec<IpNet>)>,
    texts: Vec<(Text, Strings)>,
    paths: Strings,
    headers: Vec<(HeaderName, Strings)>,
    others: Vec<Check>,
}

// === impl Check ===

impl Check {
    /// A policy: one of the permissions and one of the principals.
    pub(super) fn policy(policy: Policy) -> Self {
        let Policy {
            permissions,
            principals,
            condition,
        } = policy;
        let condition = condition.map_or(Self::Always, Self::Expression);
        Self::all([Self::any_of(permissions), Self::any_of(principals), condition])
    }

    fn new(condition: Condition) -> Self {
        match condition {
            Condition::Always => Self::Always,
            Condition::All(all) => Self::all(all.into_iter().map(Self::new)),
            Condition::AnyOf(any) => Self::any_of(any),
            Condition::Not(inner) => match Self::new(*inner) {
                Self::Always => Self::Never,
                Self::Never => Self::Always,
                Self::Not(inner) => *inner,
                inner => Self::Not(Box::new(inner)),
            },
            leaf => Self::any_of(vec![leaf]),
        }
    }

    fn all(checks: impl IntoIterator<Item = Self>) -> Self {
        let mut all = Vec::new();
        for check in checks {
            match check {
                Self::Always => {}
                Self::Never => return Self::Never,
                Self::All(inner) => all.extend(inner),
                other => all.push(other),
            }
        }
        all.sort_by_key(Self::cost);
        match <[Self; 1]>::try_from(all) {
            Ok([only]) => only,
            Err(all) if all.is_empty() => Self::Always,
            Err(all) => Self::All(all.into()),
        }
    }

    fn any_of(conditions: Vec<Condition>) -> Self {
        let mut alternatives = Alternatives::default();
        for condition in conditions {
            alternatives.add(condition);
        }
        alternatives.finish()
    }

    /// Whether it holds.
    pub(super) fn holds(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::All(all) => all.iter().all(|check| check.holds(facts)),
            Self::AnyOf(any) => any.iter().any(|check| check.holds(facts)),
            Self::Not(inner) => !inner.holds(facts),
            Self::Ports(ranges) => ranges.iter().any(|range| range.contains(&facts.destination_port)),
            Self::Authenticated => facts.certificate.is_some(),
            Self::Addresses(which, set) => facts.address(*which).is_some_and(|address| set.contains(address)),
            Self::Text(which, matcher) => facts.text(*which).is_some_and(|text| matcher.matches(text.as_bytes())),
            Self::TextIn(which, set) => facts.text(*which).is_some_and(|text| set.contains(text.as_bytes())),
            Self::Path(matcher) => facts.path().is_some_and(|path| matcher.matches(path.as_bytes())),
            Self::PathIn(set) => facts.path().is_some_and(|path| set.contains(path.as_bytes())),
            Self::Header(matcher) => facts.header_matches(matcher),
            Self::HeaderIn(name, set) => facts.any_header(name, |value| set.contains(value)) == Some(true),
            Self::Template(template) => facts.path().is_some_and(|path| template.matches(path)),
            Self::Metadata(matcher) => matcher.matches(facts.metadata),
            Self::Expression(program) => interpret::agrees(Some(program), facts),
        }
    }

    /// How dear it is to ask, roughly.
    fn cost(&self) -> u8 {
        match self {
            Self::Always | Self::Never | Self::Ports(_) | Self::Authenticated => 0,
            Self::Addresses(..) | Self::TextIn(..) | Self::PathIn(_) => 1,
            Self::HeaderIn(..) => 2,
            Self::Text(_, matcher) | Self::Path(matcher) => string_cost(matcher),
            Self::Header(matcher) => match &matcher.how {
                HeaderMatch::String(string) => string_cost(string) + 1,
                HeaderMatch::Present(_) | HeaderMatch::Range { .. } => 2,
            },
            Self::Template(_) => 5,
            Self::Metadata(_) => 6,
            Self::Expression(_) => 7,
            Self::Not(inner) => inner.cost(),
            Self::All(all) | Self::AnyOf(all) => all.iter().map(Self::cost).max().unwrap_or(0).saturating_add(1),
        }
    }
}

fn string_cost(matcher: &StringMatcher) -> u8 {
    match matcher.how() {
        StringMatch::Exact(_) | StringMatch::Prefix(_) | StringMatch::Suffix(_) => 1,
        StringMatch::Contains(_) => 3,
        StringMatch::Regex(_) => 5,
    }
}

/// The whole string that a matcher asks for, letters as they are.
fn whole(matcher: &StringMatcher) -> Option<Box<[u8]>> {
    match matcher.how() {
        StringMatch::Exact(text) if !matcher.ignores_case() => Some(text.as_bytes().into()),
        _ => None,
    }
}

// === impl Alternatives ===

impl Alternatives {
    fn add(&mut self, condition: Condition) {
        match condition {
            Condition::AnyOf(any) => any.into_iter().for_each(|one| self.add(one)),
            Condition::Port(range) => self.ports.push(range),
            Condition::Address(which, net) => entry(&mut self.ranges, which).push(net),
            Condition::Text(which, matcher) => match whole(&matcher) {
                Some(text) => drop(entry(&mut self.texts, which).insert(text)),
                None => self.others.push(Check::Text(which, matcher)),
            },
            Condition::Path(matcher) => match whole(&matcher) {
                Some(path) => drop(self.paths.insert(path)),
                None => self.others.push(Check::Path(matcher)),
            },
            Condition::Header(matcher) => match &matcher.how {
                HeaderMatch::String(string) if !matcher.invert && !matcher.treat_missing_as_empty => match whole(string) {
                    Some(value) => drop(entry(&mut self.headers, matcher.name).insert(value)),
                    None => self.others.push(Check::Header(matcher)),
                },
                _ => self.others.push(Check::Header(matcher)),
            },
            Condition::Template(template) => self.others.push(Check::Template(template)),
            Condition::Metadata(matcher) => self.others.push(Check::Metadata(matcher)),
            Condition::Authenticated => self.others.push(Check::Authenticated),
            nested @ (Condition::Always | Condition::All(_) | Condition::Not(_)) => match Check::new(nested) {
                Check::Always => self.always = true,
                Check::Never => {}
                other => self.others.push(other),
            },
        }
    }

    fn finish(self) -> Check {
        let Self {
            always,
            ports,
            ranges,
            texts,
            paths,
            headers,
            others,
        } = self;
        if always {
            return Check::Always;
        }
        let mut any = others;
        if !ports.is_empty() {
            any.push(Check::Ports(ports.into()));
        }
        any.extend(
            ranges
                .into_iter()
                .map(|(which, nets)| Check::Addresses(which, nets.into_iter().collect())),
        );
        any.extend(texts.into_iter().map(|(which, set)| Check::TextIn(which, set)));
        if !paths.is_empty() {
            any.push(Check::PathIn(paths));
        }
        any.extend(headers.into_iter().map(|(name, set)| Check::HeaderIn(name, set)));
        any.sort_by_key(Check::cost);
        match <[Check; 1]>::try_from(any) {
            Ok([only]) => only,
            Err(any) if any.is_empty() => Check::Never,
            Err(any) => Check::AnyOf(any.into()),
        }
    }
}

/// The value of a key in a short list; there are as many keys as kinds of facts.
fn entry<K: PartialEq, V: Default>(list: &mut Vec<(K, V)>, key: K) -> &mut V {
    let at = match list.iter().position(|(known, _)| *known == key) {
        Some(at) => at,
        None => {
            list.push((key, V::default()));
            list.len() - 1
        }
    };
    // Found or pushed just now.
    &mut list[at].1
}
