//! Which of many policies could match at all.
//!
//! Of what a policy asks, one clause is chosen whose alternatives are all looked up (a principal, a path, a header, an address, a port),
//! and of several the one that fewest other policies share. A decision looks the request's facts up, and asks the few policies found
//! and those that nothing is known of, in their order: it comes to what asking all would come to, since the index leaves out only
//! policies that cannot match.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use foldhash::fast::RandomState;
use ipnet::IpNet;
use smallvec::SmallVec;

use super::{
    Address, Condition, Facts, Policy, Text,
    shapes::{Shape, Shapes},
};
use crate::matcher::{HeaderMatch, HeaderName, StringMatch, StringMatcher};

/// With fewer policies than this, asking each is as quick.
const WORTHWHILE: usize = 8;
/// Widest range of ports that is looked up port by port.
const MOST_PORTS: u16 = 16;
/// What a policy costs that the index does not find, next to one that shares its key with so many others.
const UNFOUND: usize = 1 << 20;

/// Positions of policies, ascending.
type Positions = SmallVec<[u32; 4]>;

/// An index over policies; it knows them by position.
#[derive(Clone, Debug)]
pub(super) struct Index {
    texts: Box<[(Subject, Shapes)]>,
    nets: Box<[(Address, Nets)]>,
    ports: HashMap<u16, u32, RandomState>,
    /// By slot.
    positions: Box<[Positions]>,
    /// Policies that are always asked.
    others: Positions,
}

/// What a shape is asked of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    Path,
    Header(HeaderName),
    Text(Text),
    State(Arc<str>),
}

/// Something to be looked up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Exact(Subject, Arc<str>),
    Prefix(Subject, Arc<str>),
    Suffix(Subject, Arc<str>),
    Contains(Subject, Arc<str>),
    /// By its pattern.
    Regex(Subject, Arc<str>),
    Net(Address, IpNet),
    Port(u16),
}

/// How often keys occur, and the expressions behind them.
#[derive(Default)]
struct Keys {
    policies: HashMap<Key, usize, RandomState>,
}

/// Ranges of addresses, each with its slot; one lies in another or beside it.
#[derive(Clone, Debug, Default)]
struct Nets {
    v4: Box<[Net]>,
    v6: Box<[Net]>,
}

#[derive(Clone, Debug)]
struct Net {
    first: u128,
    last: u128,
    slot: u32,
    /// The smallest of the others that this one lies in.
    within: Option<u32>,
}

// === impl Index ===

impl Index {
    /// An index, when there are enough policies for one.
    pub(super) fn worthwhile<'p>(policies: impl ExactSizeIterator<Item = &'p Policy> + Clone) -> Option<Self> {
        if policies.len() < WORTHWHILE {
            return None;
        }
        Self::new(policies)
    }

    /// `None` where the shapes would take too much memory.
    pub(super) fn new<'p>(policies: impl Iterator<Item = &'p Policy> + Clone) -> Option<Self> {
        let mut keys = Keys::default();
        policies.clone().for_each(|policy| keys.count(policy));
        let mut slots: HashMap<Key, u32, RandomState> = HashMap::default();
        let mut positions: Vec<Positions> = Vec::new();
        let mut others = Positions::new();
        for (position, policy) in (0u32..).zip(policies) {
            let Some((_, clause)) = keys.of_policy(policy) else {
                others.push(position);
                continue;
            };
            for key in clause {
                let next = u32::try_from(positions.len()).ok()?;
                let slot = *slots.entry(key).or_insert(next);
                if slot == next {
                    positions.push(Positions::new());
                }
                let list = positions.get_mut(usize::try_from(slot).ok()?)?;
                if list.last() != Some(&position) {
                    list.push(position);
                }
            }
        }
        let mut texts: Vec<(Subject, Vec<(Shape, u32)>)> = Vec::new();
        let mut nets: Vec<(Address, Vec<(IpNet, u32)>)> = Vec::new();
        let mut ports = HashMap::default();
        for (key, slot) in slots {
            let (subject, shape) = match key {
                Key::Port(port) => {
                    ports.insert(port, slot);
                    continue;
                }
                Key::Net(address, net) => {
                    super::compile::entry(&mut nets, address).push((net, slot));
                    continue;
                }
                Key::Exact(subject, text) => (subject, Shape::Exact(text)),
                Key::Prefix(subject, text) => (subject, Shape::Prefix(text)),
                Key::Suffix(subject, text) => (subject, Shape::Suffix(text)),
                Key::Contains(subject, text) => (subject, Shape::Contains(text)),
                // It was compiled before, so it can be again.
                Key::Regex(subject, pattern) => (subject, Shape::Regex(crate::matcher::Regex::new(&pattern).ok()?)),
            };
            super::compile::entry(&mut texts, subject).push((shape, slot));
        }
        let texts = texts
            .into_iter()
            .map(|(subject, shapes)| Some((subject, Shapes::new(shapes).ok()?)));
        Some(Self {
            texts: texts.collect::<Option<_>>()?,
            nets: nets.into_iter().map(|(address, nets)| (address, Nets::new(nets))).collect(),
            ports,
            positions: positions.into(),
            others,
        })
    }

    /// The policies that could match, ascending.
    pub(super) fn candidates(&self, facts: &Facts<'_>) -> SmallVec<[u32; 32]> {
        let mut found: SmallVec<[u32; 32]> = SmallVec::from_slice(&self.others);
        let mut take = |slot: u32| {
            let list = usize::try_from(slot).ok().and_then(|slot| self.positions.get(slot));
            found.extend_from_slice(list.map_or(&[], |list| list));
        };
        for (subject, shapes) in &self.texts {
            subject.any(facts, |text| {
                shapes.each(text, &mut take);
                false // each of several values counts
            });
        }
        for (address, nets) in &self.nets {
            facts
                .address(*address)
                .into_iter()
                .for_each(|address| nets.each(address, &mut take));
        }
        if let Some(slot) = self.ports.get(&facts.destination_port) {
            take(*slot);
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}

// === impl Subject ===

impl Subject {
    /// Whether the text, or one of the values of a header, has what is asked.
    pub(super) fn any(&self, facts: &Facts<'_>, mut asked: impl FnMut(&[u8]) -> bool) -> bool {
        match self {
            Self::Path => facts.path().is_some_and(|path| asked(path.as_bytes())),
            Self::State(key) => facts.state(key).is_some_and(|text| asked(&text)),
            Self::Text(which) => facts.text(*which).is_some_and(|text| asked(text.as_bytes())),
            Self::Header(name) => facts.any_header(name, asked) == Some(true),
        }
    }
}

// === impl Keys ===

impl Keys {
    /// Counts every key of a policy, once.
    fn count(&mut self, policy: &Policy) {
        let mut all = Vec::new();
        for condition in policy.permissions.iter().chain(&policy.principals) {
            leaves(condition, &mut all);
        }
        all.sort_by_key(|key| std::hash::BuildHasher::hash_one(self.policies.hasher(), key));
        all.dedup();
        for key in all {
            *self.policies.entry(key).or_default() += 1;
        }
    }

    /// The keys of which one is there whenever the policy matches, and how many policies share the commonest of them.
    fn of_policy(&self, policy: &Policy) -> Option<(usize, Vec<Key>)> {
        let clauses = [&policy.permissions, &policy.principals];
        cheapest(clauses.into_iter().filter_map(|any| self.of_any(any)))
    }

    fn of_any(&self, any: &[Condition]) -> Option<(usize, Vec<Key>)> {
        let mut all = (0, Vec::new());
        for condition in any {
            let (cost, keys) = self.of(condition)?;
            all.0 = all.0.max(cost);
            all.1.extend(keys);
        }
        Some(all)
    }

    fn of(&self, condition: &Condition) -> Option<(usize, Vec<Key>)> {
        match condition {
            Condition::AnyOf(any) => self.of_any(any),
            Condition::All(all) => cheapest(all.iter().filter_map(|one| self.of(one))),
            leaf => {
                let keys = keys(leaf)?;
                let cost = keys.iter().map(|key| self.cost(key)).max().unwrap_or(0);
                Some((cost, keys))
            }
        }
    }

    fn cost(&self, key: &Key) -> usize {
        let shared = self.policies.get(key).copied().unwrap_or(1);
        let dear = match key {
            Key::Exact(..) | Key::Port(_) => 0,
            Key::Prefix(..) | Key::Net(..) => 1,
            Key::Suffix(..) => 2,
            Key::Contains(..) => 4,
            Key::Regex(..) => 16,
        };
        // An empty beginning is any text's.
        let empty = matches!(key, Key::Prefix(_, text) | Key::Suffix(_, text) | Key::Contains(_, text) if text.is_empty());
        if empty { UNFOUND } else { shared + dear }
    }
}

fn cheapest(clauses: impl Iterator<Item = (usize, Vec<Key>)>) -> Option<(usize, Vec<Key>)> {
    clauses
        .min_by_key(|(cost, keys)| (*cost, keys.len()))
        .filter(|(cost, _)| *cost < UNFOUND)
}

/// All keys of a condition, wherever they stand but under a not.
fn leaves(condition: &Condition, out: &mut Vec<Key>) {
    match condition {
        Condition::All(inner) | Condition::AnyOf(inner) => inner.iter().for_each(|one| leaves(one, out)),
        leaf => out.extend(keys(leaf).unwrap_or_default()),
    }
}

/// Keys of which one is there whenever a plain condition holds.
fn keys(leaf: &Condition) -> Option<Vec<Key>> {
    let one = |key| Some(vec![key]);
    match leaf {
        Condition::Path(matcher) => one(of_string(Subject::Path, matcher)?),
        Condition::Text(which, matcher) => one(of_string(Subject::Text(*which), matcher)?),
        Condition::State(key, matcher) => one(of_string(Subject::State(key.clone()), matcher)?),
        Condition::Header(matcher) if !matcher.invert && !matcher.treat_missing_as_empty => match &matcher.how {
            HeaderMatch::String(string) => one(of_string(Subject::Header(matcher.name.clone()), string)?),
            HeaderMatch::Present(_) | HeaderMatch::Range { .. } => None,
        },
        Condition::Template(template) => {
            let fixed = template.template().split(['*', '{']).next()?;
            one(Key::Prefix(Subject::Path, fixed.into()))
        }
        Condition::Address(which, net) => one(Key::Net(*which, *net)),
        Condition::Port(ports) if ports.end().saturating_sub(*ports.start()) < MOST_PORTS => {
            Some(ports.clone().map(Key::Port).collect())
        }
        _ => None,
    }
}

fn of_string(subject: Subject, matcher: &StringMatcher) -> Option<Key> {
    let regex = match matcher.how() {
        StringMatch::Regex(regex) => regex,
        _ if matcher.ignores_case() => return None,
        StringMatch::Exact(text) => return Some(Key::Exact(subject, text.clone())),
        StringMatch::Prefix(text) => return Some(Key::Prefix(subject, text.clone())),
        StringMatch::Suffix(text) => return Some(Key::Suffix(subject, text.clone())),
        StringMatch::Contains(text) => return Some(Key::Contains(subject, text.clone())),
    };
    // istiod writes namespaces as `.*/ns/NAME/.*`: what lies between is cheaper to look for, and has to be there.
    let pattern = regex.pattern();
    let (front, middle) = pattern.strip_prefix(".*").map_or((true, pattern), |rest| (false, rest));
    let (end, middle) = middle.strip_suffix(".*").map_or((true, middle), |rest| (false, rest));
    let plain = !middle.is_empty() && !middle.contains(['\\', '.', '+', '*', '?', '(', ')', '[', ']', '{', '}', '^', '$', '|']);
    let (prefix, part) = (regex.literal_prefix(), regex.required_literal());
    Some(match (plain, front, end) {
        (true, true, true) => Key::Exact(subject, middle.into()),
        (true, true, false) => Key::Prefix(subject, middle.into()),
        (true, false, true) => Key::Suffix(subject, middle.into()),
        (true, false, false) => Key::Contains(subject, middle.into()),
        (false, ..) if !prefix.is_empty() && prefix.len() >= part.len() => Key::Prefix(subject, prefix.into()),
        (false, ..) if !part.is_empty() => Key::Contains(subject, part.into()),
        (false, ..) if matches!(pattern, ".*" | ".+") => return None,
        (false, ..) => Key::Regex(subject, pattern.into()),
    })
}

// === impl Nets ===

impl Nets {
    fn new(nets: Vec<(IpNet, u32)>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (net, slot) in nets {
            let list = if matches!(net, IpNet::V4(_)) { &mut v4 } else { &mut v6 };
            list.push(Net {
                first: number(net.network()),
                last: number(net.broadcast()),
                slot,
                within: None,
            });
        }
        Self {
            v4: nested(v4),
            v6: nested(v6),
        }
    }

    fn each(&self, address: IpAddr, f: &mut impl FnMut(u32)) {
        let nets = if address.is_ipv4() { &self.v4 } else { &self.v6 };
        let number = number(address);
        let after = nets.partition_point(|net| net.first <= number);
        let at = |at: u32| nets.get(usize::try_from(at).ok()?);
        let mut next = after.checked_sub(1).and_then(|last| nets.get(last));
        while let Some(net) = next {
            if net.last >= number {
                f(net.slot);
            }
            next = net.within.and_then(at);
        }
    }
}

/// Sorted, larger ones first, and each with the one that it lies in.
fn nested(mut nets: Vec<Net>) -> Box<[Net]> {
    nets.sort_by_key(|net| (net.first, std::cmp::Reverse(net.last)));
    let mut open: Vec<(u128, u32)> = Vec::new();
    for (at, net) in (0u32..).zip(&mut nets) {
        while open.last().is_some_and(|(last, _)| *last < net.first) {
            open.pop();
        }
        net.within = open.last().map(|(_, outer)| *outer);
        open.push((net.last, at));
    }
    nets.into()
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}
