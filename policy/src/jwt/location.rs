//! Where tokens are looked for, and how they are taken out.

use std::borrow::Cow;

use cairn_exchange::RequestHead;
use http::{HeaderName, header, uri::PathAndQuery};
use percent_encoding::percent_decode_str;

use crate::matcher::first_query_value;

/// One place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A header; the token follows the prefix, wherever that stands in the value.
    Header {
        /// Its name, in lower case.
        name: Box<str>,
        /// For example `Bearer `.
        prefix: Box<str>,
    },
    /// A parameter of the query.
    Parameter(Box<str>),
    /// A cookie.
    Cookie(Box<str>),
}

/// A place, and whose tokens it is for.
#[derive(Clone, Debug)]
pub(super) struct Location {
    place: Place,
    /// Header names are parsed once.
    header: Option<HeaderName>,
    /// Issuers that look here; none: all may.
    issuers: Option<Vec<Box<str>>>,
}

/// All places that a set of providers looks at, in Envoy's order: headers, parameters, cookies, each by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Locations {
    locations: Vec<Location>,
}

/// A token that was found.
pub(super) struct Found<'a> {
    pub(super) text: String,
    pub(super) location: &'a Location,
}

/// What follows the prefix begins with the first of these.
fn of_a_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

// === impl Locations ===

impl Locations {
    /// Adds where the issuer's tokens are; no issuer: anybody's.
    pub(super) fn add(&mut self, issuer: Option<&str>, places: &[Place]) {
        for place in places {
            let at = self.locations.binary_search_by(|known| known.place.cmp(place));
            let location = match at {
                Ok(at) => &mut self.locations[at],
                Err(at) => {
                    let header = match place {
                        Place::Header { name, .. } => HeaderName::try_from(&**name).ok(),
                        _ => None,
                    };
                    let location = Location {
                        place: place.clone(),
                        header,
                        issuers: Some(Vec::new()),
                    };
                    self.locations.insert(at, location);
                    &mut self.locations[at]
                }
            };
            match (issuer, &mut location.issuers) {
                (Some(issuer), Some(issuers)) => issuers.push(issuer.into()),
                _ => location.issuers = None,
            }
        }
    }

    /// Every token in the request's head.
    pub(super) fn find(&self, head: &RequestHead) -> Vec<Found<'_>> {
        let mut found = Vec::new();
        for location in &self.locations {
            location.find(head, |text| found.push(Found { text, location }));
        }
        found
    }
}

// === impl Location ===

impl Location {
    /// Whether a token of this issuer may stand here.
    pub(super) fn is_for(&self, issuer: &str) -> bool {
        self.issuers
            .as_ref()
            .is_none_or(|issuers| issuers.iter().any(|known| **known == *issuer))
    }

    fn find(&self, head: &RequestHead, mut found: impl FnMut(String)) {
        match (&self.place, &self.header) {
            (Place::Header { prefix, .. }, Some(name)) => {
                for value in head.headers.get_all(name) {
                    let text = String::from_utf8_lossy(value.as_bytes());
                    if let Some(token) = after(&text, prefix) {
                        found(token.to_owned());
                    }
                }
            }
            (Place::Header { .. }, None) => {}
            (Place::Parameter(name), _) => {
                let query = head.path.query().unwrap_or_default();
                if let Some(value) = first_query_value(query, name) {
                    found(percent_decode_str(value).decode_utf8_lossy().into_owned());
                }
            }
            (Place::Cookie(name), _) => {
                if let Some(value) = cookie(head, name) {
                    found(value.into_owned());
                }
            }
        }
    }

    /// Takes the token out of the head, so that it is not forwarded. Cookies stay, as with Envoy.
    pub(super) fn remove(&self, head: &mut RequestHead) {
        match (&self.place, &self.header) {
            (Place::Header { .. }, Some(name)) => {
                head.headers.remove(name);
            }
            (Place::Parameter(name), _) => {
                let Some(query) = head.path.query() else { return };
                let kept = query.split('&').filter(|pair| pair.split('=').next() != Some(name));
                let kept = kept.collect::<Vec<_>>().join("&");
                let path = head.path.path();
                let edited = if kept.is_empty() {
                    path.to_owned()
                } else {
                    format!("{path}?{kept}")
                };
                // Less of a valid target is valid.
                if let Ok(edited) = PathAndQuery::try_from(edited) {
                    head.path = edited;
                }
            }
            _ => {}
        }
    }
}

/// What follows `prefix` in a header's value; the whole value where nothing that belongs to a token does.
fn after<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    if prefix.is_empty() {
        return Some(text);
    }
    let rest = &text[text.find(prefix)? + prefix.len()..];
    Some(match rest.bytes().position(of_a_token) {
        Some(start) => &rest[start..],
        None => text,
    })
}

/// The first cookie of a name.
fn cookie<'a>(head: &'a RequestHead, name: &str) -> Option<Cow<'a, str>> {
    let values = head.headers.get_all(header::COOKIE).iter();
    let mut pairs = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'));
    pairs.find_map(|pair| {
        let (key, value) = pair.trim().split_once('=')?;
        let unquoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        (key == name).then(|| Cow::Borrowed(unquoted.unwrap_or(value)))
    })
}

#[cfg(test)]
mod tests {
    use cairn_exchange::Scheme;
    use http::{HeaderMap, HeaderValue, Method};

    use super::*;

    fn head(path: &'static str, headers: &[(&'static str, &'static str)]) -> RequestHead {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_static(value));
        }
        RequestHead {
            method: Method::GET,
            path: PathAndQuery::from_static(path),
            authority: HeaderValue::from_static("web"),
            scheme: Scheme::Http,
            headers: map,
        }
    }

    fn bearer() -> Place {
        Place::Header {
            name: "authorization".into(),
            prefix: "Bearer ".into(),
        }
    }

    #[test]
    fn tokens_are_found_where_providers_look() {
        let mut locations = Locations::default();
        locations.add(
            Some("a"),
            &[Place::Cookie("jwt".into()), Place::Parameter("access_token".into()), bearer()],
        );
        let texts = |head: &RequestHead| locations.find(head).into_iter().map(|found| found.text).collect::<Vec<_>>();
        for (path, headers, wanted) in [
            ("/", &[("authorization", "Bearer a.b.c")][..], &["a.b.c"][..]),
            ("/", &[("authorization", "x, Bearer  \t a.b.c, d")], &["a.b.c, d"]),
            ("/", &[("authorization", "bearer a.b.c")], &[]),
            ("/", &[("authorization", "Bearer ")], &["Bearer "]),
            (
                "/",
                &[("authorization", "Bearer a"), ("authorization", "Bearer b")],
                &["a", "b"],
            ),
            ("/?access_token=a%2Eb.c&access_token=x", &[], &["a.b.c"]),
            ("/", &[("cookie", "x=1; jwt=\"a.b.c\"")], &["a.b.c"]),
            (
                "/?access_token=p",
                &[("cookie", "jwt=c"), ("authorization", "Bearer h")],
                &["h", "p", "c"],
            ),
        ] {
            assert_eq!(texts(&head(path, headers)), wanted, "{path} {headers:?}");
        }
    }

    #[test]
    fn a_place_is_for_the_issuers_that_look_there() {
        let mut locations = Locations::default();
        locations.add(Some("a"), &[bearer()]);
        locations.add(Some("b"), &[bearer(), Place::Cookie("jwt".into())]);
        let both = head("/", &[("authorization", "Bearer t"), ("cookie", "jwt=t")]);
        let found = locations.find(&both);
        let allowed: Vec<_> = found
            .iter()
            .map(|found| (found.location.is_for("a"), found.location.is_for("b")))
            .collect();
        assert_eq!(allowed, [(true, true), (false, true)]);
        locations.add(None, &[bearer()]);
        assert!(locations.find(&both)[0].location.is_for("anybody"));
    }

    #[test]
    fn a_token_that_is_not_forwarded_is_taken_out() {
        let mut locations = Locations::default();
        locations.add(None, &[bearer(), Place::Parameter("t".into())]);
        for (path, left) in [("/a?x=1&t=a.b.c&y", "/a?x=1&y"), ("/a?t=a.b.c", "/a"), ("/a?t=1&t=2", "/a")] {
            let mut head = head(path, &[("authorization", "Bearer t")]);
            let places: Vec<_> = locations.find(&head).into_iter().map(|found| found.location).collect();
            for place in places {
                place.remove(&mut head);
            }
            assert_eq!((head.path.as_str(), head.headers.len()), (left, 0), "{path}");
        }
    }
}
