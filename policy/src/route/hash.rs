//! What consistent hashing looks at, and the hash of a request.
//!
//! A policy names parts of a request; each part that is there is hashed, and the hashes are mixed in order, exactly as Envoy does it, so
//! that proxies of both kinds send a request to the same endpoint. A request without any of the parts has no hash and goes anywhere.

use std::{net::IpAddr, time::Duration};

use cairn_exchange::RequestHead;
use http::{HeaderMap, HeaderValue, header};
use smallvec::SmallVec;
use xxhash_rust::xxh64::xxh64;

use crate::matcher::{HeaderName, RegexRewrite, first_query_value};

/// One part of a hash key.
#[derive(Clone, Debug)]
pub struct HashPolicy {
    /// Where to look.
    pub source: HashSource,
    /// When this, or one before it, gives a value, later policies are not asked.
    pub terminal: bool,
}

/// Where a part of a hash key comes from.
#[derive(Clone, Debug)]
pub enum HashSource {
    /// A request header.
    Header {
        /// Its name.
        name: HeaderName,
        /// What is done to its values before.
        rewrite: Option<RegexRewrite>,
    },
    /// A cookie; made for the client when it is missing and `ttl` is given.
    Cookie {
        /// Its name.
        name: Box<str>,
        /// How long a made cookie lives.
        ttl: Option<CookieTtl>,
        /// Path of a made cookie.
        path: Box<str>,
        /// Other attributes of a made cookie, name and value.
        attributes: Vec<(Box<str>, Box<str>)>,
    },
    /// The client's address.
    SourceIp,
    /// A query parameter.
    Query(Box<str>),
}

/// How long a made cookie lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CookieTtl {
    /// As long as the client's session.
    Session,
    /// That long.
    For(Duration),
}

/// Where a request comes from, as far as its hash is concerned.
#[derive(Clone, Copy, Debug)]
pub struct HashFacts<'a> {
    /// The client.
    pub client: IpAddr,
    /// What tells the client's connection from others; the value of a made cookie comes from it.
    pub connection: &'a str,
}

/// The hash of a request, and the cookies that the client is to bring the next time.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RequestHash {
    /// The hash; `None` when nothing of what is hashed is there.
    pub hash: Option<u64>,
    /// Values of `set-cookie` for the answer.
    pub cookies: SmallVec<[HeaderValue; 1]>,
}

// === impl HashPolicy ===

impl HashPolicy {
    /// The hash of a request.
    pub fn hash(policies: &[Self], head: &RequestHead, facts: HashFacts<'_>) -> RequestHash {
        let mut found = RequestHash::default();
        for policy in policies {
            if let Some(part) = policy.source.hash(head, facts, &mut found.cookies) {
                found.hash = Some(found.hash.unwrap_or(0).rotate_left(1) ^ part);
            }
            if policy.terminal && found.hash.is_some() {
                break;
            }
        }
        found
    }
}

/// The hash of a client's address, for bytes.
pub fn hash_address(client: IpAddr) -> u64 {
    xxh64(client.to_string().as_bytes(), 0)
}

// === impl HashSource ===

impl HashSource {
    fn hash(&self, head: &RequestHead, facts: HashFacts<'_>, made: &mut SmallVec<[HeaderValue; 1]>) -> Option<u64> {
        match self {
            Self::Header { name, rewrite } => hash_header(head, name, rewrite.as_ref()),
            Self::Cookie {
                name,
                ttl,
                path,
                attributes,
            } => {
                if let Some(value) = cookie(&head.headers, name) {
                    return Some(xxh64(value, 0));
                }
                let ttl = (*ttl)?;
                let value = format!("{:016x}", xxh64(facts.connection.as_bytes(), 0));
                made.extend(HeaderValue::try_from(set_cookie(name, &value, ttl, path, attributes)));
                Some(xxh64(value.as_bytes(), 0))
            }
            Self::SourceIp => Some(hash_address(facts.client)),
            Self::Query(name) => {
                let value = first_query_value(head.path.query()?, name)?;
                Some(xxh64(value.as_bytes(), 0))
            }
        }
    }
}

/// All values of a header, in order of their bytes, each hashed with the hash before as its seed.
fn hash_header(head: &RequestHead, name: &HeaderName, rewrite: Option<&RegexRewrite>) -> Option<u64> {
    let mut values: SmallVec<[Vec<u8>; 2]> = match name {
        HeaderName::Field(name) => head
            .headers
            .get_all(name)
            .iter()
            .map(|value| value.as_bytes().to_vec())
            .collect(),
        pseudo => crate::matcher::request_header(head, pseudo)
            .map(|value| value.into_owned())
            .into_iter()
            .collect(),
    };
    if values.is_empty() {
        return None;
    }
    if let Some(rewrite) = rewrite {
        for value in &mut values {
            if let Ok(text) = std::str::from_utf8(value) {
                *value = rewrite.replace_all(text).into_bytes();
            }
        }
    }
    values.sort();
    Some(values.iter().fold(0, |seed, value| xxh64(value, seed)))
}

/// The value of a cookie, without quotes around it; an empty one counts for none.
fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h [u8]> {
    let pairs = headers
        .get_all(header::COOKIE)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b';'));
    let value = pairs
        .filter_map(|pair| {
            let at = pair.iter().position(|byte| *byte == b'=')?;
            let (key, value) = pair.split_at_checked(at)?;
            (key.trim_ascii() == name.as_bytes()).then(|| value.get(1..).unwrap_or_default().trim_ascii())
        })
        .next()?;
    let value = match value {
        [b'"', inner @ .., b'"'] => inner,
        value => value,
    };
    Some(value).filter(|value| !value.is_empty())
}

fn set_cookie(name: &str, value: &str, ttl: CookieTtl, path: &str, attributes: &[(Box<str>, Box<str>)]) -> String {
    let mut cookie = format!("{name}=\"{value}\"");
    if let CookieTtl::For(ttl) = ttl {
        cookie.push_str(&format!("; Max-Age={}", ttl.as_secs()));
    }
    if !path.is_empty() {
        cookie.push_str("; Path=");
        cookie.push_str(path);
    }
    for (attribute, value) in attributes {
        cookie.push_str("; ");
        cookie.push_str(attribute);
        if !value.is_empty() {
            cookie.push('=');
            cookie.push_str(value);
        }
    }
    cookie.push_str("; HttpOnly");
    cookie
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cairn_exchange::{RequestHead, Scheme};
    use http::{HeaderMap, HeaderName as Field, HeaderValue, Method, uri::PathAndQuery};
    use xxhash_rust::xxh64::xxh64;

    use super::{CookieTtl, HashFacts, HashPolicy, HashSource};
    use crate::matcher::{HeaderName, RegexRewrite};

    fn head(path: &'static str, fields: &[(&'static str, &'static str)]) -> RequestHead {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(Field::from_static(name), HeaderValue::from_static(value));
        }
        RequestHead {
            method: Method::GET,
            path: PathAndQuery::from_static(path),
            authority: HeaderValue::from_static("web"),
            scheme: Scheme::Http,
            headers,
        }
    }

    fn policy(source: HashSource) -> HashPolicy {
        HashPolicy { source, terminal: false }
    }

    fn header(name: &str) -> HashSource {
        HashSource::Header {
            name: HeaderName::parse(name).unwrap(),
            rewrite: None,
        }
    }

    fn cookie(ttl: Option<CookieTtl>) -> HashSource {
        HashSource::Cookie {
            name: "sid".into(),
            ttl,
            path: "/".into(),
            attributes: vec![("SameSite".into(), "Strict".into()), ("Secure".into(), "".into())],
        }
    }

    fn hash(policies: &[HashPolicy], head: &RequestHead) -> Option<u64> {
        HashPolicy::hash(policies, head, FACTS).hash
    }

    const FACTS: HashFacts<'static> = HashFacts {
        client: std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 0, 200)),
        connection: "10.244.0.200:4000010.96.3.2:80",
    };

    #[test]
    fn each_part_is_hashed_as_envoy_hashes_it() {
        let x = |text: &str| xxh64(text.as_bytes(), 0);
        for (source, head, expected) in [
            (header("x-user"), head("/", &[("x-user", "alice")]), Some(x("alice"))),
            (header("x-user"), head("/", &[("x-user", "")]), Some(x(""))),
            (header("x-user"), head("/", &[]), None),
            (
                header("x-user"),
                head("/", &[("x-user", "bob"), ("x-user", "alice")]),
                Some(xxh64(b"bob", x("alice"))),
            ),
            (header(":authority"), head("/", &[]), Some(x("web"))),
            (HashSource::SourceIp, head("/", &[]), Some(x("10.244.0.200"))),
            (HashSource::Query("key".into()), head("/?a=b&key=zwei", &[]), Some(x("zwei"))),
            (HashSource::Query("key".into()), head("/", &[]), None),
            (cookie(None), head("/", &[("cookie", "other=1; sid=\"two\"")]), Some(x("two"))),
            (
                cookie(None),
                head("/", &[("cookie", "other=1"), ("cookie", "sid=one")]),
                Some(x("one")),
            ),
            (cookie(None), head("/", &[("cookie", "side=one")]), None),
        ] {
            let found = HashPolicy::hash(&[policy(source.clone())], &head, FACTS);
            assert_eq!(found.hash, expected, "{source:?}");
            assert!(found.cookies.is_empty());
        }
    }

    #[test]
    fn a_missing_cookie_is_made_and_hashed_as_it_will_come_back() {
        let found = HashPolicy::hash(
            &[policy(cookie(Some(CookieTtl::For(Duration::from_secs(3600)))))],
            &head("/", &[]),
            FACTS,
        );
        let value = format!("{:016x}", xxh64(FACTS.connection.as_bytes(), 0));
        assert_eq!(found.hash, Some(xxh64(value.as_bytes(), 0)));
        let expected = format!("sid=\"{value}\"; Max-Age=3600; Path=/; SameSite=Strict; Secure; HttpOnly");
        assert_eq!(found.cookies.as_slice(), [expected.as_str()]);
        let session = HashPolicy::hash(&[policy(cookie(Some(CookieTtl::Session)))], &head("/", &[]), FACTS);
        assert!(!session.cookies[0].to_str().unwrap().contains("Max-Age"));
    }

    #[test]
    fn several_parts_are_mixed_in_order_and_a_terminal_one_ends() {
        let request = head("/?key=1", &[("x-user", "alice")]);
        let (user, key) = (xxh64(b"alice", 0), xxh64(b"1", 0));
        let mut policies = vec![policy(header("x-user")), policy(HashSource::Query("key".into()))];
        assert_eq!(hash(&policies, &request), Some(user.rotate_left(1) ^ key));
        policies.reverse();
        assert_eq!(hash(&policies, &request), Some(key.rotate_left(1) ^ user));
        policies[0].terminal = true;
        assert_eq!(hash(&policies, &request), Some(key));
        assert_eq!(hash(&policies, &head("/", &[("x-user", "alice")])), Some(user));
    }

    #[test]
    fn a_header_may_be_rewritten_before() {
        let source = HashSource::Header {
            name: HeaderName::parse("x-user").unwrap(),
            rewrite: Some(RegexRewrite::new("^(.*)@.*$", "\\1").unwrap()),
        };
        let request = head("/", &[("x-user", "alice@example.com")]);
        assert_eq!(hash(&[policy(source)], &request), Some(xxh64(b"alice", 0)));
    }
}
