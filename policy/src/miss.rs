//! What was asked of a request and what was there instead: the words of "why not?".
//!
//! A [`Fact`] is one comparison of a matcher with a request: which part was looked at, what shape was wanted, what was found. The
//! explanations of policies and routes are lists of them. They are made on demand, never on a request's way; values of fields that
//! carry secrets are left out of them.

use std::{borrow::Cow, fmt};

use cairn_exchange::{DynamicMetadata, RequestHead};

use crate::matcher::{
    HeaderMatch, HeaderMatcher, HeaderName, MetadataMatcher, PathMatch, PathMatcher, QueryMatch, QueryMatcher, StringMatch,
    StringMatcher, ValueMatcher, first_query_value, request_header,
};

/// Longest value that is repeated, in bytes.
const LONGEST: usize = 200;
/// Alternatives that are named one by one.
const MOST_ALTERNATIVES: usize = 6;
/// What stands in the place of a secret.
pub const HIDDEN: &str = "(hidden)";

/// One comparison.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Fact {
    /// What was looked at: `path`, `method`, `principal`, …
    pub subject: String,
    /// Which shape was wanted.
    pub wanted: String,
    /// What was there; `None`: nothing.
    pub found: Option<String>,
}

// === impl Fact ===

impl Fact {
    /// A comparison.
    pub fn new(subject: impl Into<String>, wanted: impl Into<String>, found: Option<Cow<'_, str>>) -> Self {
        Self {
            subject: subject.into(),
            wanted: wanted.into(),
            found: found.map(|found| shortened(&found)),
        }
    }

    /// Several comparisons of one subject, of which one would have been enough.
    pub fn alternatives(all: Vec<Self>) -> Option<Self> {
        let mut rest = all.into_iter();
        let mut fact = rest.next()?;
        let mut named = 1;
        let mut more = 0;
        for other in rest {
            if named < MOST_ALTERNATIVES {
                named += 1;
                fact.wanted = format!("{} or {}", fact.wanted, other.wanted);
            } else {
                more += 1;
            }
        }
        if more > 0 {
            fact.wanted = format!("{} or {more} more", fact.wanted);
        }
        Some(fact)
    }

    pub(crate) fn header(matcher: &HeaderMatcher, value: Option<&[u8]>) -> Self {
        let HeaderMatcher {
            name,
            how,
            invert,
            treat_missing_as_empty: _,
        } = matcher;
        let (subject, secret) = match name {
            HeaderName::Method => ("method".to_owned(), false),
            HeaderName::Authority => ("host".to_owned(), false),
            HeaderName::Path => ("path with query".to_owned(), false),
            HeaderName::Scheme => ("scheme".to_owned(), false),
            HeaderName::Status => ("status".to_owned(), false),
            HeaderName::Field(name) => (format!("header {name}"), is_secret(name.as_str())),
        };
        let wanted = match how {
            HeaderMatch::Present(true) => "present".to_owned(),
            HeaderMatch::Present(false) => "absent".to_owned(),
            HeaderMatch::String(_) if secret => HIDDEN.to_owned(),
            HeaderMatch::String(string) => string_words(string),
            HeaderMatch::Range { start, end } => format!("a number from {start} to {}", end.saturating_sub(1)),
        };
        let wanted = if *invert { format!("not {wanted}") } else { wanted };
        let found = value.map(|value| match (secret, name) {
            (true, _) => HIDDEN.into(),
            (false, HeaderName::Path) => Cow::Owned(without_secrets(&String::from_utf8_lossy(value))),
            (false, _) => String::from_utf8_lossy(value),
        });
        Self::new(subject, wanted, found)
    }

    pub(crate) fn header_of(matcher: &HeaderMatcher, head: &RequestHead) -> Self {
        Self::header(matcher, request_header(head, &matcher.name).as_deref())
    }

    pub(crate) fn query(matcher: &QueryMatcher, query: &str) -> Self {
        let secret = is_secret(&matcher.name);
        let wanted = match &matcher.how {
            QueryMatch::Present => "present".to_owned(),
            QueryMatch::String(_) if secret => HIDDEN.to_owned(),
            QueryMatch::String(string) => string_words(string),
        };
        let found = first_query_value(query, &matcher.name).map(|value| if secret { HIDDEN } else { value });
        Self::new(format!("query {}", matcher.name), wanted, found.map(Cow::from))
    }

    pub(crate) fn metadata(matcher: &MetadataMatcher, metadata: &DynamicMetadata) -> Self {
        let subject = match &*matcher.path {
            [payload, claim @ ..]
                if *matcher.filter == *crate::jwt::NAMESPACE && !claim.is_empty() && &**payload == "payload" =>
            {
                format!("claim {}", claim.join("."))
            }
            path => format!("metadata {}/{}", matcher.filter, path.join("/")),
        };
        let wanted = value_words(&matcher.value);
        let wanted = if matcher.invert { format!("not {wanted}") } else { wanted };
        let found = metadata.get(&matcher.filter, &matcher.path).map(|value| match value {
            serde_json::Value::String(text) => Cow::Owned(text.clone()),
            other => Cow::Owned(other.to_string()),
        });
        Self::new(subject, wanted, found)
    }
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { subject, wanted, found } = self;
        match found {
            Some(found) if found.is_empty() => write!(f, "{subject}: {wanted} vs \"\""),
            Some(found) => write!(f, "{subject}: {wanted} vs {found}"),
            None => write!(f, "{subject}: {wanted} vs nothing"),
        }
    }
}

/// A shape of text.
pub fn string_words(matcher: &StringMatcher) -> String {
    let words = match matcher.how() {
        StringMatch::Exact(whole) if whole.is_empty() => "\"\"".to_owned(),
        StringMatch::Exact(whole) => whole.to_string(),
        StringMatch::Prefix(start) => format!("{start}*"),
        StringMatch::Suffix(end) => format!("*{end}"),
        StringMatch::Contains(part) => format!("*{part}*"),
        // istiod writes `*` so.
        StringMatch::Regex(regex) if regex.pattern() == ".+" => "present".to_owned(),
        StringMatch::Regex(regex) => format!("~{}", regex.pattern()),
    };
    any_case(words, matcher.ignores_case())
}

/// A shape of paths.
pub fn path_words(matcher: &PathMatcher) -> String {
    let words = match matcher.how() {
        PathMatch::Exact(whole) => whole.to_string(),
        PathMatch::Prefix(start) => format!("{start}*"),
        PathMatch::SeparatedPrefix(start) => format!("{start} or {start}/*"),
        PathMatch::Regex(regex) => format!("~{}", regex.pattern()),
        PathMatch::Connect => "CONNECT".to_owned(),
    };
    any_case(words, matcher.ignores_case())
}

fn any_case(words: String, any: bool) -> String {
    if any { format!("{words} (any case)") } else { words }
}

fn value_words(matcher: &ValueMatcher) -> String {
    match matcher {
        ValueMatcher::Null => "null".to_owned(),
        ValueMatcher::Bool(wanted) => wanted.to_string(),
        ValueMatcher::Exact(number) => number.to_string(),
        ValueMatcher::Range { start, end } => format!("a number from {start} to below {end}"),
        ValueMatcher::String(string) => string_words(string),
        ValueMatcher::Present(true) => "present".to_owned(),
        ValueMatcher::Present(false) => "absent".to_owned(),
        ValueMatcher::ListOneOf(item) => value_words(item),
        ValueMatcher::Or(any) => {
            // A claim is asked for as a text and as one of a list: the same words.
            let mut words: Vec<_> = any.iter().map(value_words).collect();
            words.dedup();
            words.join(" or ")
        }
    }
}

/// Whether what stands under a name (of a header, a parameter) is nobody's business.
pub fn is_secret(name: &str) -> bool {
    const WHOLE: [&str; 6] = ["authorization", "proxy-authorization", "cookie", "set-cookie", "code", "sig"];
    const PARTS: [&str; 11] = [
        "token",
        "secret",
        "passw",
        "api-key",
        "api_key",
        "apikey",
        "credential",
        "signature",
        "session",
        "private-key",
        "jwt",
    ];
    let name = name.to_ascii_lowercase();
    WHOLE.contains(&&*name) || PARTS.iter().any(|part| name.contains(part))
}

/// A path and its query without the values of parameters that carry secrets.
pub fn without_secrets(path: &str) -> String {
    let Some((path, query)) = path.split_once('?') else {
        return path.to_owned();
    };
    let pairs = query.split('&').map(|pair| match pair.split_once('=') {
        Some((name, _)) if is_secret(name) => Cow::Owned(format!("{name}={HIDDEN}")),
        _ => Cow::Borrowed(pair),
    });
    format!("{path}?{}", pairs.collect::<Vec<_>>().join("&"))
}

fn shortened(text: &str) -> String {
    match text.char_indices().find(|(at, _)| *at >= LONGEST) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_known_by_their_names() {
        for (name, secret) in [
            ("Authorization", true),
            ("cookie", true),
            ("x-api-key", true),
            ("access_token", true),
            ("X-Auth-Token", true),
            ("x-tenant", false),
            ("user-agent", false),
            ("x-request-id", false),
        ] {
            assert_eq!(is_secret(name), secret, "{name}");
        }
        assert_eq!(without_secrets("/a?x=1&access_token=abc&y"), "/a?x=1&access_token=(hidden)&y");
        assert_eq!(without_secrets("/a"), "/a");
    }

    #[test]
    fn long_values_are_cut() {
        let long = "é".repeat(500);
        let fact = Fact::new("path", "/", Some(long.as_str().into()));
        assert_eq!(fact.found.map(|found| found.chars().count()), Some(101));
    }

    #[test]
    fn a_few_alternatives_are_named_and_the_others_counted() {
        let facts = (0..20).map(|n| Fact::new("path", format!("/{n}"), Some("/x".into())));
        let fact = Fact::alternatives(facts.collect()).unwrap();
        assert_eq!(fact.to_string(), "path: /0 or /1 or /2 or /3 or /4 or /5 or 14 more vs /x");
    }
}
