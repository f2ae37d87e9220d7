//! Why rules decide as they do: the story of a decision, read off the plain trees.
//!
//! Each policy is judged by the interpreter that the compiled form is proven against. Of those that do not match, the nearest come
//! first: those that fail by the fewest conditions, and of these the ones of which most holds. Made on demand; a request pays nothing.

use std::{borrow::Cow, fmt, net::IpAddr};

use cairn_exchange::cel::Program;

use super::{Action, Address, Condition, Facts, Policy, Rules, Text, interpret};
use crate::{
    matcher::{StringMatch, StringMatcher},
    miss::{Fact, HIDDEN, is_secret, string_words, without_secrets},
};

/// How many of the policies that did not match are told.
pub const NEAREST: usize = 5;

/// How much of a policy that does not match is told in a sentence.
const MOST_MISSES: usize = 4;

/// The story of rules.
#[derive(Clone, Debug)]
pub struct RulesStory {
    /// What becomes of what a policy matches.
    pub action: Action,
    /// Whether the rules let it pass.
    pub allowed: bool,
    /// How many policies there are.
    pub policies: usize,
    /// The policy that matched.
    pub matched: Option<PolicyStory>,
    /// Policies that did not, the nearest first; [`NEAREST`] at most.
    pub nearest: Vec<PolicyStory>,
}

/// The story of a policy.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PolicyStory {
    /// Its name in the configuration.
    pub name: String,
    /// What holds of what it asks.
    pub holds: Vec<Fact>,
    /// What does not; nothing for the policy that matched.
    pub misses: Vec<Fact>,
}

/// A policy's name as people know it: istiod writes `ns[app]-policy[deny-admin]-rule[0]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyName<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name there.
    pub name: &'a str,
    /// Which of its rules.
    pub rule: &'a str,
}

/// What holds of a condition and what does not.
#[derive(Default)]
struct Judged {
    holds: Vec<Fact>,
    misses: Vec<Fact>,
}

// === impl Rules ===

impl Rules {
    /// Why the rules decide as they do.
    pub fn explain(&self, facts: &Facts<'_>) -> RulesStory {
        let (allowed, matched) = interpret::decide(self.action(), self.plain(), facts);
        let story = |name: &str, policy: &Policy| {
            let Judged { holds, misses } = judge_policy(policy, facts);
            PolicyStory {
                name: name.to_owned(),
                holds,
                misses,
            }
        };
        let mut nearest: Vec<_> = self
            .plain()
            .iter()
            .map(|(name, policy)| story(name, policy))
            .filter(|story| !story.misses.is_empty())
            .collect();
        nearest.sort_by_key(|story| (story.misses.len(), std::cmp::Reverse(story.holds.len())));
        nearest.truncate(NEAREST);
        RulesStory {
            action: self.action(),
            allowed,
            policies: self.plain().len(),
            matched: matched.and_then(|name| Some(story(name, self.plain().get(name)?))),
            nearest,
        }
    }
}

// === impl PolicyStory ===

impl PolicyStory {
    /// In one sentence why it does not match, or what of the request it matches.
    pub fn sentence(&self) -> String {
        let list = |facts: &[Fact]| {
            let mut words: Vec<_> = facts.iter().take(MOST_MISSES).map(ToString::to_string).collect();
            let more = facts.len().saturating_sub(MOST_MISSES);
            if more > 0 {
                words.push(format!("{more} more"));
            }
            words.join("; ")
        };
        let who = PolicyName::of(&self.name);
        match (&*self.misses, &*self.holds) {
            ([], []) => format!("{who} matches everything"),
            ([], holds) => {
                let found = holds.iter().map(|fact| match &fact.found {
                    Some(found) if *found == fact.wanted => format!("{} is {found}", fact.subject),
                    Some(found) => format!("{} {found} is {}", fact.subject, fact.wanted),
                    None => format!("{} is {}", fact.subject, fact.wanted),
                });
                format!("{who} matches: {}", found.collect::<Vec<_>>().join("; "))
            }
            (misses, []) => format!("{who} does not match: {}", list(misses)),
            (misses, _) => format!("{who} matches except {}", list(misses)),
        }
    }
}

// === impl PolicyName ===

impl<'a> PolicyName<'a> {
    /// Takes a name apart, where istiod has written it.
    pub fn parse(text: &'a str) -> Option<Self> {
        let rest = text.get(text.find("ns[")? + "ns[".len()..)?;
        let (namespace, rest) = rest.split_once("]-policy[")?;
        let (name, rest) = rest.split_once("]-rule[")?;
        let rule = rest.strip_suffix(']')?;
        Some(Self { namespace, name, rule })
    }

    /// The name as people know it; one that istiod has not written, as it is.
    pub fn of(text: &'a str) -> Cow<'a, str> {
        Self::parse(text).map_or(Cow::Borrowed(text), |name| name.to_string().into())
    }
}

impl fmt::Display for PolicyName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, name, rule } = self;
        write!(f, "rule {rule} of {namespace}/{name}")
    }
}

// === judging ===

fn judge_policy(policy: &Policy, facts: &Facts<'_>) -> Judged {
    let mut judged = any(&policy.permissions, facts);
    judged.and(any(&policy.principals, facts));
    if let Some(program) = &policy.condition {
        judged.and(expression(program, facts));
    }
    judged
}

/// An expression: what it is, what it came to, and what it looked at.
fn expression(program: &Program, facts: &Facts<'_>) -> Judged {
    let Some(story) = facts.view().map(|view| program.explain(&view)) else {
        return Judged::of(Fact::new(format!("condition {program}"), "true", None), false);
    };
    let read = story.read.iter().map(|(name, value)| match value {
        Some(_) if is_secret(name) => format!("{name} is {HIDDEN}"),
        Some(value) => format!("{name} is {}", without_secrets(value)),
        None => format!("{name} is not there"),
    });
    let read = read.collect::<Vec<_>>().join(", ");
    let found = match (story.holds, &*story.result, &*read) {
        (true, ..) => "true".to_owned(),
        (false, result, "") => result.to_owned(),
        (false, result, read) => format!("{result} ({read})"),
    };
    Judged::of(
        Fact::new(format!("condition {program}"), "true", Some(found.into())),
        story.holds,
    )
}

impl Judged {
    fn of(fact: Fact, holds: bool) -> Self {
        let (holds, misses) = if holds {
            (vec![fact], Vec::new())
        } else {
            (Vec::new(), vec![fact])
        };
        Self { holds, misses }
    }

    fn and(&mut self, other: Self) {
        self.holds.extend(other.holds);
        self.misses.extend(other.misses);
    }
}

fn judge(condition: &Condition, facts: &Facts<'_>) -> Judged {
    match condition {
        Condition::Always => Judged::default(),
        Condition::All(all) => all.iter().fold(Judged::default(), |mut judged, one| {
            judged.and(judge(one, facts));
            judged
        }),
        Condition::AnyOf(alternatives) => any(alternatives, facts),
        Condition::Not(inner) => not(inner, facts),
        leaf => Judged::of(describe(leaf, facts), interpret::holds(leaf, facts)),
    }
}

/// One of several: the one that holds, or the nearest. Alternatives of one subject are one miss.
fn any(alternatives: &[Condition], facts: &Facts<'_>) -> Judged {
    if let Some(held) = alternatives.iter().find(|one| interpret::holds(one, facts)) {
        return judge(held, facts);
    }
    let mut judged: Vec<_> = alternatives.iter().map(|one| judge(one, facts)).collect();
    let subject = judged.first().and_then(|first| Some(first.misses.first()?.subject.clone()));
    let simple = |one: &Judged| matches!(&*one.misses, [miss] if Some(&miss.subject) == subject.as_ref()) && one.holds.is_empty();
    if judged.iter().all(simple) {
        let misses = judged.into_iter().flat_map(|one| one.misses).collect();
        let nothing = || Fact::new("policy", "one of no alternatives", None);
        return Judged {
            holds: Vec::new(),
            misses: vec![Fact::alternatives(misses).unwrap_or_else(nothing)],
        };
    }
    judged.sort_by_key(|one| (one.misses.len(), std::cmp::Reverse(one.holds.len())));
    judged.into_iter().next().unwrap_or_default()
}

fn not(inner: &Condition, facts: &Facts<'_>) -> Judged {
    let mut judged = judge(inner, facts);
    let negate = |facts: Vec<Fact>| {
        facts.into_iter().map(|fact| Fact {
            wanted: format!("not {}", fact.wanted),
            ..fact
        })
    };
    if interpret::holds(inner, facts) {
        let mut misses: Vec<_> = negate(std::mem::take(&mut judged.holds)).collect();
        // What holds without asking anything cannot be the opposite.
        if misses.is_empty() {
            misses.push(Fact::new("policy", "not everything", None));
        }
        Judged {
            holds: Vec::new(),
            misses,
        }
    } else {
        Judged {
            holds: negate(judged.misses).collect(),
            misses: Vec::new(),
        }
    }
}

fn describe(condition: &Condition, facts: &Facts<'_>) -> Fact {
    let address = |address: Option<IpAddr>| address.map(|address| Cow::Owned(address.to_string()));
    match condition {
        Condition::Header(matcher) => Fact::header(matcher, facts.header(&matcher.name).as_deref()),
        Condition::Path(matcher) => Fact::new("path", string_words(matcher), facts.path().map(Cow::from)),
        Condition::Template(template) => Fact::new("path", template.template(), facts.path().map(Cow::from)),
        Condition::Address(which, net) => {
            let subject = match which {
                Address::Destination => "destination ip",
                Address::DirectRemote => "source ip",
                Address::Remote => "remote ip",
            };
            let single = net.prefix_len() == net.max_prefix_len();
            let wanted = if single { net.addr().to_string() } else { net.to_string() };
            Fact::new(subject, wanted, address(facts.address(*which)))
        }
        Condition::Port(range) => {
            let wanted = if range.start() == range.end() {
                range.start().to_string()
            } else {
                format!("{} to {}", range.start(), range.end())
            };
            Fact::new("port", wanted, Some(facts.destination_port.to_string().into()))
        }
        Condition::Text(which, matcher) => text(*which, matcher, facts),
        Condition::State(key, matcher) => {
            let found = facts.state(key).map(|text| String::from_utf8_lossy(&text).into_owned());
            Fact::new(format!("filter state {key}"), string_words(matcher), found.map(Cow::from))
        }
        Condition::Authenticated => Fact::new("certificate", "any", facts.certificate.map(Cow::from)),
        Condition::Metadata(matcher) => Fact::metadata(matcher, facts.metadata),
        Condition::Always | Condition::All(_) | Condition::AnyOf(_) | Condition::Not(_) => Fact::new("policy", "anything", None),
    }
}

fn text(which: Text, matcher: &StringMatcher, facts: &Facts<'_>) -> Fact {
    let found = facts.text(which);
    let subject = match which {
        Text::ServerName => "server name",
        Text::Certificate => "certificate",
        Text::PeerPrincipal => "principal",
        Text::LocalPrincipal => "our principal",
        Text::ConnectAuthority => "authority of the tunnel",
    };
    // istiod writes namespaces so.
    if let (Text::PeerPrincipal, StringMatch::Regex(regex)) = (which, matcher.how())
        && let Some(namespace) = regex
            .pattern()
            .strip_prefix(".*/ns/")
            .and_then(|rest| rest.strip_suffix("/.*"))
    {
        let ours = found.and_then(|found| Some(found.split_once("/ns/")?.1.split('/').next()?.into()));
        // Where there is none to be seen, the whole principal tells more.
        return Fact::new("namespace", namespace.replace(".*", "*"), ours.or(found.map(Cow::from)));
    }
    Fact::new(subject, string_words(matcher), found.map(Cow::from))
}
