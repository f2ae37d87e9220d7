//! Conditions in the form in which they are asked.
//!
//! Alternatives that compare one text with many shapes become one lookup ([`Shapes`]), ranges of one address one search, ports a list;
//! what always or never holds is folded away; what costs least is asked first. Texts are shared with the plain trees. None of it
//! changes what holds: a condition has no effect but its answer.

use std::{ops::RangeInclusive, sync::Arc};

use cairn_exchange::cel::Program;
use ipnet::IpNet;

use super::{
    Address, Condition, Facts, Policy, UriTemplate,
    index::Subject,
    interpret,
    shapes::{Shape, Shapes},
};
use crate::matcher::{CidrSet, HeaderMatch, HeaderMatcher, MetadataMatcher, StringMatch, StringMatcher};

/// Up to so many shapes of one text are compared one by one.
const FEW: usize = 6;

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
    Addresses(Address, Box<CidrSet>),
    One(Subject, StringMatcher),
    Many(Subject, Box<Shapes>),
    Header(Box<HeaderMatcher>),
    Template(Box<UriTemplate>),
    Metadata(Box<MetadataMatcher>),
    Expression(Arc<Program>),
}

/// Alternatives being put together.
#[derive(Default)]
struct Alternatives {
    always: bool,
    ports: Vec<RangeInclusive<u16>>,
    ranges: Vec<(Address, Vec<IpNet>)>,
    texts: Vec<(Subject, Vec<StringMatcher>)>,
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
            Self::One(subject, matcher) => subject.any(facts, |text| matcher.matches(text)),
            Self::Many(subject, shapes) => subject.any(facts, |text| shapes.any(text)),
            Self::Header(matcher) => facts.header_matches(matcher),
            Self::Template(template) => facts.path().is_some_and(|path| template.matches(path)),
            Self::Metadata(matcher) => matcher.matches(facts.metadata),
            Self::Expression(program) => interpret::agrees(Some(program), facts),
        }
    }

    /// How dear it is to ask, roughly.
    fn cost(&self) -> u8 {
        match self {
            Self::Always | Self::Never | Self::Ports(_) | Self::Authenticated => 0,
            Self::Addresses(..) => 1,
            Self::One(subject, matcher) => string_cost(matcher) + u8::from(matches!(subject, Subject::Header(_))),
            Self::Many(subject, _) => 2 + u8::from(matches!(subject, Subject::Header(_))),
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

/// What is looked up with others of its kind.
fn shape(matcher: &StringMatcher) -> Shape {
    match matcher.how() {
        StringMatch::Exact(text) => Shape::Exact(text.clone()),
        StringMatch::Prefix(text) => Shape::Prefix(text.clone()),
        StringMatch::Suffix(text) => Shape::Suffix(text.clone()),
        StringMatch::Contains(text) => Shape::Contains(text.clone()),
        StringMatch::Regex(regex) => Shape::Regex(regex.clone()),
    }
}

// === impl Alternatives ===

impl Alternatives {
    fn add(&mut self, condition: Condition) {
        match condition {
            Condition::AnyOf(any) => any.into_iter().for_each(|one| self.add(one)),
            Condition::Port(range) => self.ports.push(range),
            Condition::Address(which, net) => entry(&mut self.ranges, which).push(net),
            Condition::Text(which, matcher) => self.add_text(Subject::Text(which), matcher),
            Condition::State(key, matcher) => self.add_text(Subject::State(key), matcher),
            Condition::Path(matcher) => self.add_text(Subject::Path, matcher),
            Condition::Header(HeaderMatcher {
                name,
                how: HeaderMatch::String(matcher),
                invert: false,
                treat_missing_as_empty: false,
            }) => self.add_text(Subject::Header(name), matcher),
            Condition::Header(matcher) => self.others.push(Check::Header(matcher.into())),
            Condition::Template(template) => self.others.push(Check::Template(template.into())),
            Condition::Metadata(matcher) => self.others.push(Check::Metadata(matcher.into())),
            Condition::Authenticated => self.others.push(Check::Authenticated),
            nested @ (Condition::Always | Condition::All(_) | Condition::Not(_)) => match Check::new(nested) {
                Check::Always => self.always = true,
                Check::Never => {}
                other => self.others.push(other),
            },
        }
    }

    /// Shapes that fold letters are compared alone; expressions fold on their own.
    fn add_text(&mut self, subject: Subject, matcher: StringMatcher) {
        if matcher.ignores_case() && !matches!(matcher.how(), StringMatch::Regex(_)) {
            self.others.push(Check::One(subject, matcher));
        } else {
            entry(&mut self.texts, subject).push(matcher);
        }
    }

    fn finish(self) -> Check {
        let Self {
            always,
            ports,
            ranges,
            texts,
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
                .map(|(which, nets)| Check::Addresses(which, Box::new(nets.into_iter().collect()))),
        );
        for (subject, matchers) in texts {
            let together = (matchers.len() > FEW).then(|| Shapes::new(matchers.iter().map(|matcher| (shape(matcher), 0))));
            match together {
                Some(Ok(shapes)) => any.push(Check::Many(subject, Box::new(shapes))),
                // Few, or expressions that together take too much memory.
                None | Some(Err(_)) => any.extend(matchers.into_iter().map(|matcher| Check::One(subject.clone(), matcher))),
            }
        }
        any.sort_by_key(Check::cost);
        match <[Check; 1]>::try_from(any) {
            Ok([only]) => only,
            Err(any) if any.is_empty() => Check::Never,
            Err(any) => Check::AnyOf(any.into()),
        }
    }
}

/// The value of a key in a short list; there are as many keys as kinds of facts.
pub(super) fn entry<K: PartialEq, V: Default>(list: &mut Vec<(K, V)>, key: K) -> &mut V {
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
