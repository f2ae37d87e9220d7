//! Cross-origin resource sharing (contract xds §4.9): which origins may call, and what their browsers are told.
//!
//! A policy of a virtual host completes that of a route where it is written in the old way; else the most specific one counts. All of
//! it is Envoy's, also what is not the standard's: an origin that is not allowed is answered by the backend, unless its preflights are
//! not to be forwarded.

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};

use crate::{matcher::StringMatcher, route::Fraction};

const REQUEST_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-allow-private-network");
const TRUE: HeaderValue = HeaderValue::from_static("true");

/// A policy.
#[derive(Clone, Debug, Default)]
pub struct CorsPolicy {
    /// Origins that may call; one that is `*` stands for all.
    pub allow_origins: Vec<StringMatcher>,
    /// Methods that they may use.
    pub allow_methods: Option<HeaderValue>,
    /// Headers that they may send.
    pub allow_headers: Option<HeaderValue>,
    /// Headers of answers that they may see.
    pub expose_headers: Option<HeaderValue>,
    /// How long an answer to a preflight holds.
    pub max_age: Option<HeaderValue>,
    /// Whether they may send credentials.
    pub allow_credentials: Option<bool>,
    /// Whether they may reach from a public network into a private one.
    pub allow_private_network: Option<bool>,
    /// Whether preflights of other origins go to the backend.
    pub forward_other_preflights: Option<bool>,
    /// The share of requests that it is applied to; `None` is all.
    pub enabled: Option<Fraction>,
    /// The share of requests of which it is only counted whether it would be.
    pub shadow: Option<Fraction>,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Cors {
    /// It is none of its business.
    Pass,
    /// It is forwarded, and its answer tells the browser that this origin may read it.
    Allow(Allowed),
    /// It is a preflight, answered with these fields; [`Allowed`] ones get the fields of every answer too.
    Preflight(Box<HeaderMap>, Option<Allowed>),
}

/// What answers to an allowed origin carry.
#[derive(Clone, Debug, PartialEq)]
pub struct Allowed {
    origin: HeaderValue,
    credentials: bool,
    expose_headers: Option<HeaderValue>,
}

// === impl CorsPolicy ===

impl CorsPolicy {
    /// This policy, completed by a less specific one.
    #[must_use]
    pub fn over(self, other: &Self) -> Self {
        Self {
            allow_origins: if self.allow_origins.is_empty() {
                other.allow_origins.clone()
            } else {
                self.allow_origins
            },
            allow_methods: self.allow_methods.or_else(|| other.allow_methods.clone()),
            allow_headers: self.allow_headers.or_else(|| other.allow_headers.clone()),
            expose_headers: self.expose_headers.or_else(|| other.expose_headers.clone()),
            max_age: self.max_age.or_else(|| other.max_age.clone()),
            allow_credentials: self.allow_credentials.or(other.allow_credentials),
            allow_private_network: self.allow_private_network.or(other.allow_private_network),
            forward_other_preflights: self.forward_other_preflights.or(other.forward_other_preflights),
            enabled: self.enabled,
            shadow: self.shadow,
        }
    }

    /// What becomes of the request of this random number.
    pub fn decide(&self, method: &Method, headers: &HeaderMap, random: u64) -> Cors {
        if !self.enabled.is_none_or(|share| share.contains(random)) {
            return Cors::Pass;
        }
        let Some(origin) = headers.get(header::ORIGIN).filter(|origin| !origin.is_empty()) else {
            return Cors::Pass;
        };
        let allowed = self.allows(origin).then(|| Allowed {
            origin: origin.clone(),
            credentials: self.allow_credentials == Some(true),
            expose_headers: self.expose_headers.clone(),
        });
        let asked_method = headers.get(header::ACCESS_CONTROL_REQUEST_METHOD);
        let preflight = *method == Method::OPTIONS && asked_method.is_some_and(|asked| !asked.is_empty());
        match allowed {
            None if !preflight || self.forward_other_preflights != Some(false) => Cors::Pass,
            Some(allowed) if !preflight => Cors::Allow(allowed),
            allowed => Cors::Preflight(Box::new(self.preflight(headers, allowed.as_ref())), allowed),
        }
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        self.allow_origins
            .iter()
            .any(|matcher| matcher.matches(b"*") || matcher.matches(origin.as_bytes()))
    }

    fn preflight(&self, asked: &HeaderMap, allowed: Option<&Allowed>) -> HeaderMap {
        let mut answer = HeaderMap::new();
        let mut tell = |name: HeaderName, value: Option<&HeaderValue>| {
            if let Some(value) = value {
                answer.insert(name, value.clone());
            }
        };
        tell(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed.map(|allowed| &allowed.origin));
        let yes = TRUE;
        let credentials = (self.allow_credentials == Some(true)).then_some(&yes);
        tell(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, credentials);
        tell(header::ACCESS_CONTROL_ALLOW_METHODS, self.allow_methods.as_ref());
        tell(header::ACCESS_CONTROL_ALLOW_HEADERS, self.allow_headers.as_ref());
        tell(header::ACCESS_CONTROL_MAX_AGE, self.max_age.as_ref());
        let private =
            self.allow_private_network == Some(true) && asked.get(REQUEST_PRIVATE_NETWORK).is_some_and(|asked| asked == "true");
        tell(ALLOW_PRIVATE_NETWORK, private.then_some(&yes));
        answer
    }
}

// === impl Allowed ===

impl Allowed {
    /// Writes the fields into an answer, over what the backend said.
    pub fn write(&self, answer: &mut HeaderMap) {
        answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, self.origin.clone());
        if self.credentials {
            answer.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, TRUE);
        }
        if let Some(expose) = &self.expose_headers {
            answer.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> CorsPolicy {
        CorsPolicy {
            allow_origins: vec![StringMatcher::exact("https://a.example"), StringMatcher::prefix("https://b.")],
            allow_methods: Some(HeaderValue::from_static("GET,PUT")),
            expose_headers: Some(HeaderValue::from_static("x-c")),
            max_age: Some(HeaderValue::from_static("600")),
            allow_credentials: Some(true),
            ..CorsPolicy::default()
        }
    }

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let field = |(name, value): &(&'static str, &'static str)| (name.parse().unwrap(), HeaderValue::from_static(value));
        fields.iter().map(field).collect()
    }

    fn names(answer: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<_> = answer
            .keys()
            .map(|name| name.as_str().trim_start_matches("access-control-"))
            .collect();
        names.sort_unstable();
        names
    }

    const ORIGIN: (&str, &str) = ("origin", "https://a.example");
    const OTHER: (&str, &str) = ("origin", "https://evil.example");
    const ASKS: (&str, &str) = ("access-control-request-method", "PUT");

    #[test]
    fn requests_of_allowed_origins_are_answered_with_leave_to_read() {
        for (fields, allowed) in [
            (&[ORIGIN][..], true),
            (&[("origin", "https://b.anything")], true),
            (&[OTHER], false),
            (&[("origin", "")], false),
            (&[], false),
        ] {
            let verdict = policy().decide(&Method::GET, &headers(fields), 0);
            assert_eq!(matches!(verdict, Cors::Allow(_)), allowed, "{fields:?}");
        }
        let Cors::Allow(allowed) = policy().decide(&Method::GET, &headers(&[ORIGIN]), 0) else {
            panic!("it is allowed");
        };
        let mut answer = headers(&[("access-control-allow-origin", "*")]);
        allowed.write(&mut answer);
        assert_eq!(answer["access-control-allow-origin"], "https://a.example");
        assert_eq!(names(&answer), ["allow-credentials", "allow-origin", "expose-headers"]);
    }

    #[test]
    fn a_preflight_is_an_options_request_that_names_a_method() {
        let preflight = |fields: &[_]| policy().decide(&Method::OPTIONS, &headers(fields), 0);
        let Cors::Preflight(answer, Some(_)) = preflight(&[ORIGIN, ASKS]) else {
            panic!("it is answered");
        };
        assert_eq!(
            names(&answer),
            ["allow-credentials", "allow-methods", "allow-origin", "max-age"]
        );
        assert!(matches!(preflight(&[ORIGIN]), Cors::Allow(_)));
        assert_eq!(preflight(&[OTHER, ASKS]), Cors::Pass);
    }

    #[test]
    fn a_preflight_that_is_not_forwarded_names_no_origin() {
        let policy = CorsPolicy {
            forward_other_preflights: Some(false),
            ..policy()
        };
        let Cors::Preflight(answer, None) = policy.decide(&Method::OPTIONS, &headers(&[OTHER, ASKS]), 0) else {
            panic!("it is answered");
        };
        assert_eq!(names(&answer), ["allow-credentials", "allow-methods", "max-age"]);
        assert_eq!(policy.decide(&Method::GET, &headers(&[OTHER]), 0), Cors::Pass);
    }

    #[test]
    fn a_private_network_is_opened_to_who_asks() {
        let asks = ("access-control-request-private-network", "true");
        for (allow, fields, told) in [
            (Some(true), &[ORIGIN, ASKS, asks][..], true),
            (Some(true), &[ORIGIN, ASKS], false),
            (None, &[ORIGIN, ASKS, asks], false),
        ] {
            let policy = CorsPolicy {
                allow_private_network: allow,
                ..policy()
            };
            let Cors::Preflight(answer, _) = policy.decide(&Method::OPTIONS, &headers(fields), 0) else {
                panic!("it is answered");
            };
            assert_eq!(answer.contains_key(ALLOW_PRIVATE_NETWORK), told, "{allow:?} {fields:?}");
        }
    }

    #[test]
    fn an_origin_of_one_star_is_every_origin() {
        let policy = CorsPolicy {
            allow_origins: vec![StringMatcher::exact("*")],
            ..CorsPolicy::default()
        };
        assert!(matches!(policy.decide(&Method::GET, &headers(&[OTHER]), 0), Cors::Allow(_)));
    }

    #[test]
    fn it_is_applied_to_its_share() {
        let policy = CorsPolicy {
            enabled: Some(Fraction {
                numerator: 30,
                denominator: 100,
            }),
            ..policy()
        };
        let allowed = |random| policy.decide(&Method::GET, &headers(&[ORIGIN]), random) != Cors::Pass;
        assert_eq!((0..100).filter(|random| allowed(*random)).count(), 30);
    }

    #[test]
    fn a_policy_is_completed_by_the_one_around_it() {
        let route = CorsPolicy {
            allow_origins: vec![StringMatcher::exact("https://route")],
            max_age: Some(HeaderValue::from_static("1")),
            ..CorsPolicy::default()
        };
        let both = route.over(&policy());
        assert_eq!(both.max_age.as_ref().unwrap(), "1");
        assert_eq!(both.allow_methods.as_ref().unwrap(), "GET,PUT");
        assert!(!both.allows(&HeaderValue::from_static("https://a.example")));
    }
}
