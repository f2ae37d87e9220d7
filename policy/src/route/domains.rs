//! Which virtual host an authority belongs to.
//!
//! Envoy's order: an exact domain, then the longest suffix (`*.example.com`), then the longest prefix (`example.*`), then `*`.
//! Letters are folded; the wildcard stands for at least one character.

use std::collections::HashMap;

use foldhash::fast::RandomState;

/// A domain of a virtual host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Domain {
    /// The whole authority.
    Exact(Box<str>),
    /// Its end: `*.example.com` (the dot is kept; `*-x.example.com` is allowed too).
    Suffix(Box<str>),
    /// Its beginning: `example.*`.
    Prefix(Box<str>),
    /// Any.
    Any,
}

/// A domain that is not one.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is no domain: `*` stands alone, at the beginning or at the end, once")]
pub struct InvalidDomain(String);

/// Virtual hosts by domain.
#[derive(Debug, Default)]
pub(super) struct DomainIndex {
    exact: HashMap<Box<str>, usize, RandomState>,
    /// Longest first.
    suffixes: Vec<(Box<str>, usize)>,
    /// Longest first.
    prefixes: Vec<(Box<str>, usize)>,
    any: Option<usize>,
}

// === impl Domain ===

impl Domain {
    /// A domain as configured.
    pub fn parse(domain: &str) -> Result<Self, InvalidDomain> {
        let refuse = || InvalidDomain(domain.to_owned());
        let folded = domain.to_ascii_lowercase();
        match (folded.strip_prefix('*'), folded.strip_suffix('*')) {
            _ if folded.is_empty() => Err(refuse()),
            (Some(""), _) => Ok(Self::Any),
            (Some(suffix), _) if !suffix.contains('*') => Ok(Self::Suffix(suffix.into())),
            (None, Some(prefix)) if !prefix.contains('*') => Ok(Self::Prefix(prefix.into())),
            (None, None) if !folded.contains('*') => Ok(Self::Exact(folded.into())),
            _ => Err(refuse()),
        }
    }
}

// === impl DomainIndex ===

impl DomainIndex {
    /// Adds a domain; `false` when another host has it already.
    pub(super) fn insert(&mut self, domain: &Domain, host: usize) -> bool {
        match domain {
            Domain::Exact(exact) if self.exact.contains_key(exact) => false,
            Domain::Exact(exact) => self.exact.insert(exact.clone(), host).is_none(),
            Domain::Suffix(suffix) => insert_longest_first(&mut self.suffixes, suffix, host),
            Domain::Prefix(prefix) => insert_longest_first(&mut self.prefixes, prefix, host),
            Domain::Any if self.any.is_some() => false,
            Domain::Any => self.any.replace(host).is_none(),
        }
    }

    /// The virtual host of an authority.
    pub(super) fn find(&self, authority: &[u8]) -> Option<usize> {
        if self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty() {
            return self.any;
        }
        let folded = authority.to_ascii_lowercase();
        let exact = || {
            std::str::from_utf8(&folded)
                .ok()
                .and_then(|folded| self.exact.get(folded).copied())
        };
        let suffix = || longest(&self.suffixes, |part| folded.len() > part.len() && folded.ends_with(part));
        let prefix = || longest(&self.prefixes, |part| folded.len() > part.len() && folded.starts_with(part));
        exact().or_else(suffix).or_else(prefix).or(self.any)
    }
}

fn insert_longest_first(parts: &mut Vec<(Box<str>, usize)>, part: &str, host: usize) -> bool {
    if parts.iter().any(|(known, _)| &**known == part) {
        return false;
    }
    let at = parts.partition_point(|(known, _)| known.len() >= part.len());
    parts.insert(at, (part.into(), host));
    true
}

fn longest(parts: &[(Box<str>, usize)], fits: impl Fn(&[u8]) -> bool) -> Option<usize> {
    parts.iter().find(|(part, _)| fits(part.as_bytes())).map(|(_, host)| *host)
}

#[cfg(test)]
mod tests {
    use super::{Domain, DomainIndex};

    #[test]
    fn domains_are_exact_or_have_one_wildcard_at_an_end() {
        for (text, domain) in [
            ("*", Some(Domain::Any)),
            ("Web.App", Some(Domain::Exact("web.app".into()))),
            ("*.app", Some(Domain::Suffix(".app".into()))),
            ("*-x.app", Some(Domain::Suffix("-x.app".into()))),
            ("web.*", Some(Domain::Prefix("web.".into()))),
            ("", None),
            ("a*b", None),
            ("*a*", None),
            ("**", None),
            ("a**", None),
        ] {
            assert_eq!(Domain::parse(text).ok(), domain, "{text}");
        }
    }

    #[test]
    fn the_most_specific_domain_wins() {
        let mut index = DomainIndex::default();
        let domains = ["*", "*.example.com", "*.b.example.com", "a.example.com", "a.*", "a.example.*"];
        for (host, domain) in domains.iter().enumerate() {
            assert!(index.insert(&Domain::parse(domain).unwrap(), host));
        }
        assert!(!index.insert(&Domain::parse("A.example.com").unwrap(), 9));
        assert!(!index.insert(&Domain::parse("*.EXAMPLE.com").unwrap(), 9));
        for (authority, host) in [
            ("a.example.com", 3),
            ("A.Example.COM", 3),
            ("x.example.com", 1),
            ("x.b.example.com", 2),
            ("a.example.net", 5),
            ("a.net", 4),
            ("a.", 0),
            (".example.com", 0),
            ("a.example.com:80", 5),
            ("", 0),
            ("other", 0),
        ] {
            assert_eq!(index.find(authority.as_bytes()), Some(host), "{authority}");
        }
    }

    #[test]
    fn without_a_catch_all_other_authorities_have_no_host() {
        let mut index = DomainIndex::default();
        index.insert(&Domain::parse("a").unwrap(), 0);
        assert_eq!(index.find(b"b"), None);
        assert_eq!(index.find(b"\xff"), None);
        assert_eq!(DomainIndex::default().find(b"a"), None);
    }
}
