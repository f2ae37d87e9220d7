//! Matching one header of a request or an answer.
//!
//! Each of several fields of one name is looked at by itself: one that matches is enough, and an inverted match wants none to.
//! Joined, `x: a` and `x: b` would escape a rule about `a`. Pseudo-headers are read from the parts of the request head
//! that hold them; `host` is another name of `:authority`. A missing header fails every match but "must be absent", inverted or
//! not, unless a missing header is treated as empty.

use std::borrow::Cow;

use http::{HeaderMap, StatusCode, header::InvalidHeaderName};

use cairn_exchange::{RequestHead, Scheme};

use super::StringMatcher;

/// The name of a header as configuration names it, pseudo-headers included.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HeaderName {
    /// `:method`
    Method,
    /// `:authority`, also `host`
    Authority,
    /// `:path`, with the query
    Path,
    /// `:scheme`
    Scheme,
    /// `:status`, of an answer
    Status,
    /// A field.
    Field(http::HeaderName),
}

/// What is asked of a header.
#[derive(Clone, Debug)]
pub enum HeaderMatch {
    /// It is there (`true`), or is not (`false`).
    Present(bool),
    /// Its value has a shape.
    String(StringMatcher),
    /// Its value is a decimal integer, at least `start` and below `end`.
    Range {
        /// First number inside.
        start: i64,
        /// First number outside.
        end: i64,
    },
}

/// A compiled header matcher.
#[derive(Clone, Debug)]
pub struct HeaderMatcher {
    /// Which header.
    pub name: HeaderName,
    /// What is asked of it.
    pub how: HeaderMatch,
    /// The answer is turned round (but a missing header stays a failure).
    pub invert: bool,
    /// A missing header counts as an empty one.
    pub treat_missing_as_empty: bool,
}

// === impl HeaderName ===

impl HeaderName {
    /// A header by its configured name; letters are folded.
    pub fn parse(name: &str) -> Result<Self, InvalidHeaderName> {
        Ok(match name.to_ascii_lowercase().as_str() {
            ":method" => Self::Method,
            ":authority" | "host" => Self::Authority,
            ":path" => Self::Path,
            ":scheme" => Self::Scheme,
            ":status" => Self::Status,
            field => Self::Field(http::HeaderName::from_bytes(field.as_bytes())?),
        })
    }
}

// === impl HeaderMatcher ===

impl HeaderMatcher {
    /// Whether the request matches.
    pub fn matches(&self, head: &RequestHead) -> bool {
        match any_value(head, &self.name, |value| self.meets(value)) {
            Some(met) => met != self.invert,
            None => self.matches_value(None),
        }
    }

    /// Whether fields match; pseudo-headers are missing there.
    pub fn matches_fields(&self, headers: &HeaderMap) -> bool {
        match &self.name {
            HeaderName::Field(name) => match any_field(headers, name, |value| self.meets(value)) {
                Some(met) => met != self.invert,
                None => self.matches_value(None),
            },
            _ => self.matches_value(None),
        }
    }

    /// Whether an answer matches.
    pub fn matches_answer(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        match self.name {
            HeaderName::Status => self.matches_value(Some(status.as_str().as_bytes())),
            _ => self.matches_fields(headers),
        }
    }

    /// Whether a value, or its absence, matches.
    pub fn matches_value(&self, value: Option<&[u8]>) -> bool {
        let value = match value {
            Some(value) => value,
            None if self.treat_missing_as_empty => b"",
            // Inverted or not, only a presence match can be satisfied by a header that is missing.
            None => return matches!(self.how, HeaderMatch::Present(present) if present == self.invert),
        };
        self.meets(value) != self.invert
    }

    /// Whether one value has what is asked, before the answer is turned round.
    fn meets(&self, value: &[u8]) -> bool {
        match &self.how {
            HeaderMatch::Present(present) => *present,
            HeaderMatch::String(string) => string.matches(value),
            HeaderMatch::Range { start, end } => integer(value).is_some_and(|number| (*start..*end).contains(&number)),
        }
    }
}

/// The value of a request's header, pseudo-headers included; several fields joined with `,`.
pub fn request_header<'a>(head: &'a RequestHead, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    let value = match name {
        HeaderName::Method => head.method.as_str().as_bytes(),
        HeaderName::Authority if head.authority.is_empty() => return None,
        HeaderName::Authority => head.authority.as_bytes(),
        HeaderName::Path => head.path.as_str().as_bytes(),
        HeaderName::Scheme => match head.scheme {
            Scheme::Http => &b"http"[..],
            Scheme::Https => b"https",
        },
        HeaderName::Status => return None,
        HeaderName::Field(name) => return joined(&head.headers, name),
    };
    Some(Cow::Borrowed(value))
}

/// Whether one of the values of a request's header, pseudo-headers included, has what is asked; `None` when it has none.
pub(crate) fn any_value(head: &RequestHead, name: &HeaderName, asked: impl FnMut(&[u8]) -> bool) -> Option<bool> {
    match name {
        HeaderName::Field(name) => any_field(&head.headers, name, asked),
        pseudo => request_header(head, pseudo).as_deref().map(asked),
    }
}

fn any_field(headers: &HeaderMap, name: &http::HeaderName, mut asked: impl FnMut(&[u8]) -> bool) -> Option<bool> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?;
    Some(asked(first.as_bytes()) || values.any(|value| asked(value.as_bytes())))
}

/// All fields of a name as one value; borrowed in the common case that there is one.
pub(crate) fn joined<'a>(headers: &'a HeaderMap, name: &http::HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.as_bytes();
    let mut value = Cow::Borrowed(first);
    for next in values {
        let all = value.to_mut();
        all.push(b',');
        all.extend_from_slice(next.as_bytes());
    }
    Some(value)
}

/// A decimal integer; blanks around it are allowed.
fn integer(value: &[u8]) -> Option<i64> {
    std::str::from_utf8(value.trim_ascii()).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};

    use super::{HeaderMatch, HeaderMatcher, HeaderName, RequestHead, Scheme, StringMatcher};

    fn head(fields: &[(&'static str, &'static str)]) -> RequestHead {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_static(value));
        }
        RequestHead {
            method: Method::PUT,
            path: PathAndQuery::from_static("/a?b=c"),
            authority: HeaderValue::from_static("web.app:80"),
            scheme: Scheme::Http,
            headers,
        }
    }

    #[test]
    fn a_missing_header_fails_all_but_absence() {
        let absent = [];
        let there: [(&str, &str); 1] = [("x-a", "1")];
        let exact = |value| HeaderMatch::String(StringMatcher::exact(value));
        // (how, invert, treat missing as empty, when absent, when "1")
        for (how, invert, missing_is_empty, when_absent, when_one) in [
            (exact("1"), false, false, false, true),
            (exact("1"), true, false, false, false),
            (exact("1"), true, true, true, false),
            (exact("2"), true, false, false, true),
            (exact(""), false, true, true, false),
            (HeaderMatch::Present(true), false, false, false, true),
            (HeaderMatch::Present(true), true, false, true, false),
            (HeaderMatch::Present(false), false, false, true, false),
            (HeaderMatch::Present(false), true, false, false, true),
            (HeaderMatch::Range { start: 1, end: 2 }, false, false, false, true),
            (HeaderMatch::Range { start: 0, end: 1 }, false, false, false, false),
            (HeaderMatch::Range { start: 0, end: 1 }, true, false, false, true),
            (HeaderMatch::Range { start: 0, end: 1 }, true, true, true, true),
        ] {
            let name = HeaderName::parse("X-A").unwrap();
            let matcher = HeaderMatcher {
                name,
                how,
                invert,
                treat_missing_as_empty: missing_is_empty,
            };
            assert_eq!(matcher.matches(&head(&absent)), when_absent, "absent, {matcher:?}");
            assert_eq!(matcher.matches(&head(&there)), when_one, "there, {matcher:?}");
            assert_eq!(matcher.matches_fields(&head(&there).headers), when_one, "fields, {matcher:?}");
        }
    }

    #[test]
    fn pseudo_headers_are_read_from_the_head() {
        for (name, value) in [
            (":method", "PUT"),
            (":path", "/a?b=c"),
            (":authority", "web.app:80"),
            ("Host", "web.app:80"),
            (":scheme", "http"),
        ] {
            let matcher = HeaderMatcher {
                name: HeaderName::parse(name).unwrap(),
                how: HeaderMatch::String(StringMatcher::exact(value)),
                invert: false,
                treat_missing_as_empty: false,
            };
            assert!(matcher.matches(&head(&[])), "{name}");
        }
    }

    #[test]
    fn each_of_several_fields_is_looked_at_by_itself() {
        let blue = |invert| HeaderMatcher {
            name: HeaderName::parse("x-a").unwrap(),
            how: HeaderMatch::String(StringMatcher::exact("blue")),
            invert,
            treat_missing_as_empty: false,
        };
        // (fields, one of them is blue)
        for (fields, found) in [
            (&[("x-a", "blue"), ("x-b", "0"), ("x-a", "green")][..], true),
            (&[("x-a", "green"), ("x-a", "blue")][..], true),
            (&[("x-a", "green"), ("x-a", "red")][..], false),
            (&[("x-a", "blue,green")][..], false),
        ] {
            let head = head(fields);
            assert_eq!(blue(false).matches(&head), found, "{fields:?}");
            assert_eq!(blue(true).matches(&head), !found, "none may match: {fields:?}");
            assert_eq!(blue(false).matches_fields(&head.headers), found, "{fields:?}");
        }
    }

    #[test]
    fn names_that_are_no_header_names_are_refused() {
        for name in ["", "x a", ":unknown", "x:y"] {
            assert!(HeaderName::parse(name).is_err(), "{name}");
        }
    }
}
