//! Rules as a tree of matchers (`xds.type.matcher.v3.Matcher`) in the place of policies: the first verdict that is reached decides, and
//! where none is, the request or connection is denied.
//!
//! A part of the tree that does not lead to a verdict goes on where the tree says that nothing matched. An input without a value
//! matches nothing.

use std::{collections::HashMap, sync::Arc};

use cairn_exchange::cel::Program;
use foldhash::fast::RandomState;
use ipnet::IpNet;

use super::{Action, Address, Facts, Text, interpret};
use crate::matcher::{HeaderName, StringMatcher};

/// A part of a tree.
#[derive(Clone, Debug)]
pub enum Tree {
    /// Here it is decided.
    Verdict(Verdict),
    /// By the whole value.
    Exact {
        /// What is looked at.
        input: Input,
        /// Where each value leads.
        map: HashMap<Box<[u8]>, Tree, RandomState>,
        /// Where it goes on without.
        otherwise: Option<Box<Tree>>,
    },
    /// By the beginning of the value.
    Prefix {
        /// What is looked at.
        input: Input,
        /// Where each beginning leads; the longest comes first.
        prefixes: Vec<(Box<[u8]>, Tree)>,
        /// Where it goes on without.
        otherwise: Option<Box<Tree>>,
    },
    /// By ranges of an address.
    Ranges {
        /// Which address.
        address: Address,
        /// Where each range leads; the smallest comes first.
        ranges: Vec<(IpNet, Tree)>,
        /// Where it goes on without.
        otherwise: Option<Box<Tree>>,
    },
    /// One question after the other.
    List {
        /// The questions, and where a yes leads.
        entries: Vec<(Predicate, Tree)>,
        /// Where it goes on without.
        otherwise: Option<Box<Tree>>,
    },
}

/// What is decided, and under which name it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The name.
    pub name: Arc<str>,
    /// What becomes of what comes here.
    pub action: Action,
}

/// What is looked at, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A header of the request; several fields joined with `,`.
    Header(HeaderName),
    /// An address.
    Address(Address),
    /// The port of the service.
    Port,
    /// Some text that is known of the connection.
    Text(Text),
    /// An object of filter state.
    State(Arc<str>),
}

/// A question.
#[derive(Clone, Debug)]
pub enum Predicate {
    /// Whether a value has a shape.
    Value(Input, StringMatcher),
    /// Whether an expression holds.
    Expression(Arc<Program>),
    /// All of these.
    All(Vec<Predicate>),
    /// One of these.
    Any(Vec<Predicate>),
    /// Not this.
    Not(Box<Predicate>),
}

// === impl Tree ===

impl Tree {
    /// The verdict that is reached.
    pub(super) fn find(&self, facts: &Facts<'_>) -> Option<&Verdict> {
        let (found, otherwise) = match self {
            Self::Verdict(verdict) => return Some(verdict),
            Self::Exact { input, map, otherwise } => {
                let found = input.with(facts, |value| map.get(value)).flatten();
                (found.and_then(|tree| tree.find(facts)), otherwise)
            }
            Self::Prefix {
                input,
                prefixes,
                otherwise,
            } => {
                let found = input.with(facts, |value| {
                    let mut fitting = prefixes.iter().filter(|(prefix, _)| value.starts_with(prefix));
                    fitting.find_map(|(_, tree)| tree.find(facts))
                });
                (found.flatten(), otherwise)
            }
            Self::Ranges {
                address,
                ranges,
                otherwise,
            } => {
                let found = facts.address(*address).and_then(|address| {
                    let mut fitting = ranges.iter().filter(|(range, _)| range.contains(&address));
                    fitting.find_map(|(_, tree)| tree.find(facts))
                });
                (found, otherwise)
            }
            Self::List { entries, otherwise } => {
                let mut yes = entries.iter().filter(|(predicate, _)| predicate.holds(facts));
                (yes.find_map(|(_, tree)| tree.find(facts)), otherwise)
            }
        };
        found.or_else(|| otherwise.as_ref()?.find(facts))
    }

    /// The verdicts that there are.
    pub(super) fn verdicts<'a>(&'a self, out: &mut Vec<&'a Verdict>) {
        let otherwise = match self {
            Self::Verdict(verdict) => return out.push(verdict),
            Self::Exact { map, otherwise, .. } => {
                map.values().for_each(|tree| tree.verdicts(out));
                otherwise
            }
            Self::Prefix { prefixes, otherwise, .. } => {
                prefixes.iter().for_each(|(_, tree)| tree.verdicts(out));
                otherwise
            }
            Self::Ranges { ranges, otherwise, .. } => {
                ranges.iter().for_each(|(_, tree)| tree.verdicts(out));
                otherwise
            }
            Self::List { entries, otherwise } => {
                entries.iter().for_each(|(_, tree)| tree.verdicts(out));
                otherwise
            }
        };
        otherwise.iter().for_each(|tree| tree.verdicts(out));
    }
}

// === impl Predicate ===

impl Predicate {
    fn holds(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Value(input, matcher) => input.with(facts, |value| matcher.matches(value)).unwrap_or(false),
            Self::Expression(program) => interpret::agrees(Some(program), facts),
            Self::All(all) => all.iter().all(|one| one.holds(facts)),
            Self::Any(any) => any.iter().any(|one| one.holds(facts)),
            Self::Not(inner) => !inner.holds(facts),
        }
    }
}

// === impl Input ===

impl Input {
    /// Calls `f` with the value, where there is one.
    fn with<T>(&self, facts: &Facts<'_>, f: impl FnOnce(&[u8]) -> T) -> Option<T> {
        match self {
            Self::Header(name) => facts.header(name).map(|value| f(&value)),
            Self::Address(address) => facts.address(*address).map(|address| f(address.to_string().as_bytes())),
            Self::Port => Some(f(facts.destination_port.to_string().as_bytes())),
            Self::Text(which) => facts.text(*which).map(|text| f(text.as_bytes())),
            Self::State(key) => facts.state(key).map(|text| f(&text)),
        }
    }
}
