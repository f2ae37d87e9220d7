//! An issuer whose tokens are accepted, and what is told of them behind.

use std::{
    fmt,
    sync::{Arc, LazyLock},
};

use cairn_exchange::{DynamicMetadata, RequestHead};
use http::{HeaderName, HeaderValue};
use quick_cache::sync::Cache;
use serde_json::Value;

use super::{
    keys::Keys,
    location::{Location, Locations, Place},
    problem::Problem,
    token::{Token, with_words},
};

/// What is configured of an issuer.
#[derive(Clone, Debug, Default)]
pub struct ProviderSettings {
    /// Its name in the configuration.
    pub name: Box<str>,
    /// `iss` of its tokens; none: any.
    pub issuer: Option<Box<str>>,
    /// Audiences, one of which a token must have; none: any.
    pub audiences: Vec<Box<str>>,
    /// Where its tokens are; none: `Authorization: Bearer` and the parameter `access_token`.
    pub places: Vec<Place>,
    /// Whether the token stays in the request.
    pub forward: bool,
    /// The header that gets the payload, as it stands in the token.
    pub payload_header: Option<HeaderName>,
    /// Whether that is padded.
    pub pad_payload_header: bool,
    /// Headers that get claims: name, and path of the claim.
    pub claim_headers: Vec<(HeaderName, Box<str>)>,
    /// The key of dynamic metadata that gets the claims.
    pub payload_in_metadata: Option<Arc<str>>,
    /// The key of dynamic metadata that gets the token's head.
    pub header_in_metadata: Option<Arc<str>>,
    /// The key of dynamic metadata that is told why a token was not accepted.
    pub failure_in_metadata: Option<Arc<str>>,
    /// Claims whose words become lists in metadata.
    pub space_delimited: Vec<Box<str>>,
    /// Seconds by which clocks may differ; 0: 60.
    pub clock_skew: u64,
}

/// Where the keys are.
pub enum KeySource {
    /// In the configuration.
    Inline(Result<Keys, Problem>),
    /// Elsewhere; whoever asks may have them, or have tried.
    Remote,
}

/// An issuer.
pub struct Provider {
    pub(super) settings: ProviderSettings,
    pub(super) keys: KeySource,
    pub(super) locations: Locations,
    /// Tokens whose signature was verified with these keys.
    pub(super) verified: Cache<Box<str>, Arc<Verified>>,
}

/// A token whose signature is right.
#[derive(Debug)]
pub(super) struct Verified {
    pub(super) token: Token,
    /// The claims as metadata has them.
    noted: Arc<Value>,
}

/// Tokens that are remembered for each issuer of a chain.
pub const MAX_VERIFIED: usize = 1024;
/// The filter's name, and the namespace of its metadata.
pub const NAMESPACE: &str = "envoy.filters.http.jwt_authn";
static NAMESPACE_SHARED: LazyLock<Arc<str>> = LazyLock::new(|| NAMESPACE.into());
const DEFAULT_SKEW: u64 = 60;

// === impl Provider ===

impl Provider {
    /// An issuer.
    pub fn new(settings: ProviderSettings, keys: KeySource) -> Self {
        let mut locations = Locations::default();
        locations.add(settings.issuer.as_deref(), &places(&settings));
        Self {
            settings,
            keys,
            locations,
            verified: Cache::new(MAX_VERIFIED),
        }
    }

    /// What is configured.
    pub fn settings(&self) -> &ProviderSettings {
        &self.settings
    }

    /// Whether its keys have to be fetched.
    pub fn is_remote(&self) -> bool {
        matches!(self.keys, KeySource::Remote)
    }

    pub(super) fn skew(&self) -> u64 {
        if self.settings.clock_skew == 0 {
            DEFAULT_SKEW
        } else {
            self.settings.clock_skew
        }
    }

    pub(super) fn verified(&self, token: Token) -> Verified {
        let noted = with_words(&token.claims, &self.settings.space_delimited);
        Verified { token, noted }
    }

    /// Removes what only verified tokens may say.
    pub(super) fn sanitize(&self, head: &mut RequestHead) {
        let claims = self.settings.claim_headers.iter().map(|(name, _)| name);
        for name in self.settings.payload_header.iter().chain(claims) {
            head.headers.remove(name);
        }
    }

    /// Tells of a good token.
    pub(super) fn tell(&self, verified: &Verified, location: &Location, head: &mut RequestHead, metadata: &mut DynamicMetadata) {
        let settings = &self.settings;
        let token = &verified.token;
        if let Some(name) = &settings.payload_header {
            let mut payload = token.payload().to_owned();
            while settings.pad_payload_header && !payload.len().is_multiple_of(4) {
                payload.push('=');
            }
            if let Ok(value) = HeaderValue::from_str(&payload) {
                head.headers.append(name.clone(), value);
            }
        }
        for (name, claim) in &settings.claim_headers {
            // A claim that cannot be a header's value is not told.
            if let Some(value) = claim_text(&token.claims, claim).and_then(|text| HeaderValue::try_from(text).ok()) {
                head.headers.append(name.clone(), value);
            }
        }
        if !settings.forward {
            location.remove(head);
        }
        if let Some(key) = &settings.header_in_metadata {
            metadata.set(NAMESPACE_SHARED.clone(), key.clone(), token.header.clone());
        }
        if let Some(key) = &settings.payload_in_metadata {
            metadata.set(NAMESPACE_SHARED.clone(), key.clone(), verified.noted.clone());
        }
    }

    /// Tells of a bad one.
    pub(super) fn tell_failure(&self, problem: Problem, metadata: &mut DynamicMetadata) {
        if let Some(key) = &self.settings.failure_in_metadata {
            let told = serde_json::json!({"message": problem.to_string()});
            metadata.set(NAMESPACE_SHARED.clone(), key.clone(), Arc::new(told));
        }
    }
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provider")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Where an issuer's tokens are.
pub(super) fn places(settings: &ProviderSettings) -> Vec<Place> {
    if !settings.places.is_empty() {
        return settings.places.clone();
    }
    let bearer = Place::Header {
        name: "authorization".into(),
        prefix: "Bearer ".into(),
    };
    vec![bearer, Place::Parameter("access_token".into())]
}

/// A claim as text, by a path with dots; lists and objects have none.
fn claim_text(claims: &Value, path: &str) -> Option<String> {
    let claim = match claims.get(path) {
        Some(claim) => claim,
        None => path.split('.').try_fold(claims, |value, key| value.as_object()?.get(key))?,
    };
    match claim {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Bool(is) => Some(is.to_string()),
        Value::Number(number) => Some(match (number.as_u64(), number.as_f64()) {
            (Some(whole), _) => whole.to_string(),
            (None, Some(number)) if number >= 0.0 && number.fract() == 0.0 => format!("{number:.0}"),
            (None, Some(number)) => format!("{number:.6}"),
            (None, None) => return None,
        }),
        _ => None,
    }
}

/// Whether a token is for one of the `accepted`; schemes and a slash at the end do not count.
pub(super) fn audience_accepted(accepted: &[Box<str>], token: &[Box<str>]) -> bool {
    fn bare(audience: &str) -> &str {
        let audience = audience
            .strip_prefix("https://")
            .or_else(|| audience.strip_prefix("http://"))
            .unwrap_or(audience);
        audience.strip_suffix('/').unwrap_or(audience)
    }
    accepted.is_empty()
        || token
            .iter()
            .any(|has| accepted.iter().any(|wanted| bare(wanted) == bare(has)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn claims_become_text_as_envoys_do() {
        let claims = json!({
            "s": "x", "empty": "", "n": 7, "big": 1e15, "neg": -3, "frac": 1.5, "t": true, "list": ["a"],
            "o": {"in": "deep"}, "a.b": "dotted",
        });
        for (path, text) in [
            ("s", Some("x")),
            ("empty", None),
            ("n", Some("7")),
            ("big", Some("1000000000000000")),
            ("neg", Some("-3.000000")),
            ("frac", Some("1.500000")),
            ("t", Some("true")),
            ("list", None),
            ("o", None),
            ("o.in", Some("deep")),
            ("a.b", Some("dotted")),
            ("none", None),
        ] {
            assert_eq!(claim_text(&claims, path).as_deref(), text, "{path}");
        }
    }

    #[test]
    fn audiences_are_compared_without_scheme_and_last_slash() {
        let list = |texts: &[&str]| texts.iter().map(|text| (*text).into()).collect::<Vec<Box<str>>>();
        for (accepted, token, is) in [
            (&[][..], &[][..], true),
            (&["a"], &["b", "a"], true),
            (&["https://a/"], &["http://a"], true),
            (&["a"], &[], false),
            (&["a"], &["ab"], false),
        ] {
            assert_eq!(audience_accepted(&list(accepted), &list(token)), is, "{accepted:?} {token:?}");
        }
    }
}
