use std::{collections::HashMap, sync::Arc};

use aws_lc_rs::{
    hmac,
    rand::SystemRandom,
    rsa::{KeyPair as RsaKeyPair, KeySize},
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair,
        Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384,
    },
};
use base64::Engine;
use cairn_exchange::{DynamicMetadata, RequestHead, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, uri::PathAndQuery};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{token::BASE64URL, *};
use crate::matcher::{PathMatch, PathMatcher};

const NOW: u64 = 1_800_000_000;

fn encoded(value: &Value) -> String {
    BASE64URL.encode(value.to_string())
}

fn text(bytes: impl AsRef<[u8]>) -> String {
    BASE64URL.encode(bytes)
}

type Sign = dyn Fn(&[u8]) -> Vec<u8>;

/// A key pair of any kind: what verifies, and a signer.
struct Signer {
    jwk: Value,
    algorithm: &'static str,
    sign: Box<Sign>,
}

impl Signer {
    fn elliptic(algorithm: &'static str) -> Self {
        let (curve, kind) = match algorithm {
            "ES256" => ("P-256", &ECDSA_P256_SHA256_FIXED_SIGNING),
            "ES384" => ("P-384", &ECDSA_P384_SHA384_FIXED_SIGNING),
            _ => ("P-521", &ECDSA_P521_SHA512_FIXED_SIGNING),
        };
        let pair = EcdsaKeyPair::generate(kind).unwrap();
        let point = &pair.public_key().as_ref()[1..];
        let (x, y) = point.split_at(point.len() / 2);
        let jwk = json!({"kty": "EC", "crv": curve, "x": text(x), "y": text(y)});
        let sign = move |data: &[u8]| pair.sign(&SystemRandom::new(), data).unwrap().as_ref().to_vec();
        Self {
            jwk,
            algorithm,
            sign: Box::new(sign),
        }
    }

    fn rsa(algorithm: &'static str, size: KeySize) -> Self {
        let pair = RsaKeyPair::generate(size).unwrap();
        // The DER of a key of 2,048 bits: two heads, the modulus behind a zero, and 65537.
        let der = pair.public_key().as_ref();
        let jwk = json!({"kty": "RSA", "n": text(&der[9..265]), "e": text(&der[267..])});
        let sign = move |data: &[u8]| {
            let mut signature = vec![0; pair.public_modulus_len()];
            let (pkcs, pss) = match algorithm {
                "RS256" => (Some(&RSA_PKCS1_SHA256), None),
                "RS512" => (Some(&RSA_PKCS1_SHA512), None),
                "PS256" => (None, Some(&RSA_PSS_SHA256)),
                _ => (None, Some(&RSA_PSS_SHA384)),
            };
            let random = SystemRandom::new();
            match (pkcs, pss) {
                (Some(pkcs), _) => pair.sign(pkcs, &random, data, &mut signature),
                (_, Some(pss)) => pair.sign(pss, &random, data, &mut signature),
                _ => unreachable!(),
            }
            .unwrap();
            signature
        };
        Self {
            jwk,
            algorithm,
            sign: Box::new(sign),
        }
    }

    fn edwards() -> Self {
        let pair = Ed25519KeyPair::generate().unwrap();
        let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": text(pair.public_key().as_ref())});
        let sign = move |data: &[u8]| pair.sign(data).as_ref().to_vec();
        Self {
            jwk,
            algorithm: "EdDSA",
            sign: Box::new(sign),
        }
    }

    fn secret(secret: &'static [u8]) -> Self {
        let jwk = json!({"kty": "oct", "k": text(secret)});
        let sign = move |data: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), data).as_ref().to_vec();
        Self {
            jwk,
            algorithm: "HS256",
            sign: Box::new(sign),
        }
    }

    /// The key with more fields.
    fn with(mut self, fields: Value) -> Self {
        for (name, value) in fields.as_object().unwrap() {
            self.jwk[name] = value.clone();
        }
        self
    }

    fn keys(&self) -> Keys {
        Keys::parse(&json!({"keys": [self.jwk]}).to_string()).unwrap()
    }

    fn token(&self, claims: &Value) -> String {
        self.token_with(&json!({"alg": self.algorithm, "typ": "JWT"}), claims)
    }

    fn token_with(&self, header: &Value, claims: &Value) -> String {
        let signed = format!("{}.{}", encoded(header), encoded(claims));
        format!("{signed}.{}", text((self.sign)(signed.as_bytes())))
    }
}

fn head(path: &str, headers: &[(&str, &str)]) -> RequestHead {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
    }
    RequestHead {
        method: Method::GET,
        path: PathAndQuery::try_from(path).unwrap(),
        authority: HeaderValue::from_static("web"),
        scheme: Scheme::Http,
        headers: map,
    }
}

/// Fetched keys, by provider.
#[derive(Default)]
struct Fetched(HashMap<usize, Result<Arc<Keys>, Problem>>);

impl FetchedKeys for Fetched {
    fn keys(&self, provider: usize) -> Option<Result<Arc<Keys>, Problem>> {
        self.0.get(&provider).cloned()
    }
}

/// A filter as istiod makes it for the providers.
fn as_istiod(providers: Vec<Provider>) -> Authentication {
    let optional = |index| {
        let provider = Requirement::Provider {
            provider: index,
            audiences: None,
        };
        Requirement::Any(vec![provider, Requirement::AllowMissing])
    };
    let requires = match providers.len() {
        1 => optional(0),
        many => {
            let one = (0..many).map(|index| Requirement::Provider {
                provider: index,
                audiences: None,
            });
            let all = Requirement::All((0..many).map(optional).collect());
            Requirement::Any(one.chain([all]).collect())
        }
    };
    Authentication::new(providers, vec![(every(), requires)], vec![], true).unwrap()
}

fn every() -> RouteMatch {
    RouteMatch::path(PathMatcher::new(PathMatch::Prefix("/".into()), false))
}

fn settings(issuer: &str) -> ProviderSettings {
    ProviderSettings {
        name: "origins-0".into(),
        issuer: Some(issuer.into()),
        payload_in_metadata: Some("payload".into()),
        ..ProviderSettings::default()
    }
}

fn check_at(filter: &Authentication, head: &mut RequestHead, metadata: &mut DynamicMetadata, now: u64) -> Checked {
    filter.check(None, head, metadata, 0, now, &Fetched::default())
}

/// What is said of a request with this `authorization`.
fn check(filter: &Authentication, authorization: &str) -> Checked {
    let mut head = head("/", &[("authorization", authorization)]);
    check_at(filter, &mut head, &mut DynamicMetadata::default(), NOW)
}

#[test]
fn every_algorithm_verifies_its_own_signatures_and_no_other() {
    let signers = [
        Signer::elliptic("ES256"),
        Signer::elliptic("ES384"),
        Signer::elliptic("ES512"),
        Signer::rsa("RS256", KeySize::Rsa2048),
        Signer::rsa("RS512", KeySize::Rsa2048),
        Signer::rsa("PS256", KeySize::Rsa2048),
        Signer::rsa("PS384", KeySize::Rsa2048),
        Signer::edwards(),
        Signer::secret(b"a secret of thirty-two bytes ...."),
    ];
    let tokens: Vec<_> = signers.iter().map(|signer| signer.token(&json!({"iss": "a"}))).collect();
    for (one, signer) in signers.iter().enumerate() {
        for (other, token) in tokens.iter().enumerate() {
            let verified = signer.keys().verify(&Token::parse(token).unwrap());
            assert_eq!(
                verified.is_ok(),
                one == other,
                "{} {}",
                signer.algorithm,
                signers[other].algorithm
            );
        }
        let mut changed = tokens[one].clone();
        let last = changed.len() - 6;
        let letter = if &changed[last..=last] == "A" { "B" } else { "A" };
        changed.replace_range(last..=last, letter);
        let verified = signer.keys().verify(&Token::parse(&changed).unwrap());
        assert_eq!(verified, Err(Problem::Signature), "{}", signer.algorithm);
    }
}

#[test]
fn a_public_key_is_never_a_shared_secret() {
    let rsa = Signer::rsa("RS256", KeySize::Rsa2048);
    let modulus = BASE64URL.decode(rsa.jwk["n"].as_str().unwrap()).unwrap();
    let signed = format!("{}.{}", encoded(&json!({"alg": "HS256"})), encoded(&json!({"iss": "a"})));
    let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &modulus), signed.as_bytes());
    let token = Token::parse(&format!("{signed}.{}", text(signature.as_ref()))).unwrap();
    assert_eq!(rsa.keys().verify(&token), Err(Problem::Signature));
}

#[test]
fn keys_are_chosen_by_identifier_and_algorithm() {
    let claims = json!({"iss": "a"});
    for (fields, header, verified) in [
        (json!({}), json!({"alg": "ES256", "kid": "x"}), Ok(())),
        (json!({"kid": "x"}), json!({"alg": "ES256", "kid": "x"}), Ok(())),
        (json!({"kid": "x"}), json!({"alg": "ES256"}), Ok(())),
        (
            json!({"kid": "x"}),
            json!({"alg": "ES256", "kid": "y"}),
            Err(Problem::NoMatchingKey),
        ),
        (json!({"alg": "ES256"}), json!({"alg": "ES256"}), Ok(())),
        (json!({"alg": "RS256"}), json!({"alg": "ES256"}), Err(Problem::NoMatchingKey)),
    ] {
        let signer = Signer::elliptic("ES256").with(fields.clone());
        let token = Token::parse(&signer.token_with(&header, &claims)).unwrap();
        assert_eq!(signer.keys().verify(&token), verified, "{fields} {header}");
    }
}

#[test]
fn key_sets_that_cannot_be_used_say_why() {
    let small = Signer::rsa("RS256", KeySize::Rsa2048)
        .with(json!({"n": text([0xff; 128])}))
        .jwk;
    for (set, problem) in [
        (json!("x"), Problem::KeysJson),
        (json!({}), Problem::NoKeysField),
        (json!({"keys": {}}), Problem::KeysNotArray),
        (json!({"keys": []}), Problem::NoValidKeys),
        (
            json!({"keys": [7, {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}, {"kty": "?"}]}),
            Problem::NoValidKeys,
        ),
        (json!({"keys": [small]}), Problem::NoValidKeys),
    ] {
        assert_eq!(Keys::parse(&set.to_string()).unwrap_err(), problem, "{set}");
    }
    assert_eq!(Keys::parse("{").unwrap_err(), Problem::KeysJson);
    let one_good = json!({"keys": [{"kty": "?"}, Signer::edwards().jwk]});
    assert!(Keys::parse(&one_good.to_string()).is_ok());
}

#[test]
fn tokens_that_are_none_say_why() {
    let claim = |claim, wanted| Problem::Claim { claim, wanted };
    let of = |header: Value, claims: Value| format!("{}.{}.AAAA", encoded(&header), encoded(&claims));
    let good = json!({"alg": "ES256"});
    let twice = format!("{}.{}.AAAA", encoded(&good), text(r#"{"sub":"a","sub":"b"}"#));
    let deep = format!("{}.{}.AAAA", encoded(&good), text(format!("{{\"a\":{}", "[".repeat(10_000))));
    for (token, problem) in [
        (String::new(), Problem::Form),
        ("a.b".to_owned(), Problem::Form),
        ("a.b.c.d".to_owned(), Problem::Form),
        ("a..c".to_owned(), Problem::Form),
        ("x".repeat(MAX_TOKEN + 1), Problem::Form),
        ("?.e30.AA".to_owned(), Problem::HeaderEncoding),
        ("AAAA.e30.AA".to_owned(), Problem::HeaderJson),
        (of(json!({}), json!({})), Problem::NoAlgorithm),
        (of(json!({"alg": 1}), json!({})), Problem::NoAlgorithm),
        (of(json!({"alg": "none"}), json!({})), Problem::Algorithm),
        (of(json!({"alg": "es256"}), json!({})), Problem::Algorithm),
        (of(json!({"alg": "ES256", "kid": 7}), json!({})), Problem::KeyId),
        (of(json!({"alg": "ES256", "crit": ["b64"]}), json!({})), Problem::Critical),
        (format!("{}.?.AA", encoded(&good)), Problem::PayloadEncoding),
        (format!("{}.AAAA.AA", encoded(&good)), Problem::PayloadJson),
        (twice, Problem::PayloadJson),
        (deep, Problem::PayloadJson),
        (of(good.clone(), json!({"iss": 1})), claim("iss", "a string")),
        (of(good.clone(), json!({"sub": ["a"]})), claim("sub", "a string")),
        (of(good.clone(), json!({"jti": {}})), claim("jti", "a string")),
        (of(good.clone(), json!({"exp": "1"})), claim("exp", "an integer")),
        (
            of(good.clone(), json!({"nbf": -1})),
            claim("nbf", "a positive 64 bit integer"),
        ),
        (
            of(good.clone(), json!({"iat": 1e300})),
            claim("iat", "a positive 64 bit integer"),
        ),
        (of(good.clone(), json!({"aud": 1})), claim("aud", "a string or string list")),
        (
            of(good.clone(), json!({"aud": ["a", 1]})),
            claim("aud", "a string or string list"),
        ),
        (
            format!("{}.{}.?", encoded(&good), encoded(&json!({}))),
            Problem::SignatureEncoding,
        ),
    ] {
        assert_eq!(Token::parse(&token).unwrap_err(), problem, "{token:.80}");
    }
}

#[test]
fn problems_are_worded_as_envoy_words_them() {
    for (problem, text, details) in [
        (Problem::Expired, "Jwt is expired", "jwt_authn_access_denied{Jwt_is_expired}"),
        (
            Problem::Claim {
                claim: "exp",
                wanted: "an integer",
            },
            "Jwt payload [exp] field is not an integer",
            "jwt_authn_access_denied{Jwt_payload_[exp]_field_is_not_an_integer}",
        ),
    ] {
        assert_eq!((problem.to_string().as_str(), problem.details().as_str()), (text, details));
    }
}

#[test]
fn a_token_is_good_in_its_time_and_a_minute_around_it() {
    let signer = Signer::edwards();
    let keys = || KeySource::Inline(Ok(signer.keys()));
    let filter = as_istiod(vec![Provider::new(settings("a"), keys())]);
    let narrow = ProviderSettings {
        clock_skew: 5,
        ..settings("a")
    };
    let narrow = as_istiod(vec![Provider::new(narrow, keys())]);
    for (claims, checked, checked_narrowly) in [
        (json!({}), Checked::Passed, Checked::Passed),
        (json!({"exp": NOW}), Checked::Passed, Checked::Passed),
        (json!({"exp": NOW - 60}), Checked::Passed, Checked::Refused(Problem::Expired)),
        (
            json!({"exp": NOW - 61}),
            Checked::Refused(Problem::Expired),
            Checked::Refused(Problem::Expired),
        ),
        (
            json!({"nbf": NOW + 60}),
            Checked::Passed,
            Checked::Refused(Problem::NotYetValid),
        ),
        (
            json!({"nbf": NOW + 61}),
            Checked::Refused(Problem::NotYetValid),
            Checked::Refused(Problem::NotYetValid),
        ),
        (
            json!({"exp": 0}),
            Checked::Refused(Problem::Expired),
            Checked::Refused(Problem::Expired),
        ),
    ] {
        let mut all = claims.clone();
        all["iss"] = "a".into();
        let authorization = format!("Bearer {}", signer.token(&all));
        assert_eq!(check(&filter, &authorization), checked, "{claims}");
        assert_eq!(check(&narrow, &authorization), checked_narrowly, "{claims}");
    }
}

#[test]
fn a_token_that_was_verified_is_remembered_until_it_expires() {
    let signer = Signer::edwards();
    let filter = as_istiod(vec![Provider::new(settings("a"), KeySource::Inline(Ok(signer.keys())))]);
    let token = signer.token(&json!({"iss": "a", "exp": NOW + 10}));
    let ask = |now| {
        let mut head = head("/", &[("authorization", &format!("Bearer {token}"))]);
        check_at(&filter, &mut head, &mut DynamicMetadata::default(), now)
    };
    assert_eq!(ask(NOW), Checked::Passed);
    let cache = &filter.providers[0].verified;
    assert_eq!(cache.get(&*token).unwrap().issuer(), "a");
    assert_eq!(ask(NOW + 1), Checked::Passed);
    assert_eq!(ask(NOW + 71), Checked::Refused(Problem::Expired));
    assert!(cache.get(&*token).is_none());
    for serial in 0..3 * MAX_VERIFIED {
        check(
            &filter,
            &format!("Bearer {}", signer.token(&json!({"iss": "a", "jti": serial.to_string()}))),
        );
    }
    assert!(cache.len() <= MAX_VERIFIED, "{}", cache.len());
}

#[test]
fn no_token_passes_and_a_bad_one_does_not() {
    let signer = Signer::edwards();
    let stranger = Signer::edwards();
    let filter = as_istiod(vec![Provider::new(settings("a"), KeySource::Inline(Ok(signer.keys())))]);
    assert_eq!(check(&filter, "Basic eA=="), Checked::Passed);
    let of = |signer: &Signer, issuer| format!("Bearer {}", signer.token(&json!({"iss": issuer})));
    assert_eq!(check(&filter, &of(&signer, "a")), Checked::Passed);
    assert_eq!(check(&filter, &of(&signer, "b")), Checked::Refused(Problem::UnknownIssuer));
    assert_eq!(check(&filter, &of(&stranger, "a")), Checked::Refused(Problem::Signature));
    assert_eq!(check(&filter, "Bearer nonsense"), Checked::Refused(Problem::Form));
}

#[test]
fn keys_that_cannot_be_read_refuse_every_token() {
    let signer = Signer::edwards();
    let filter = as_istiod(vec![Provider::new(settings("a"), KeySource::Inline(Keys::parse("{}")))]);
    let token = format!("Bearer {}", signer.token(&json!({"iss": "a"})));
    assert_eq!(check(&filter, &token), Checked::Refused(Problem::NoValidKeys));
    assert_eq!(check(&filter, "none"), Checked::Passed);
}

#[test]
fn one_good_token_of_several_issuers_is_enough_and_keys_are_never_mixed() {
    let (a, b) = (Signer::edwards(), Signer::edwards());
    let filter = || {
        let of = |issuer: &str, signer: &Signer| {
            let settings = ProviderSettings {
                audiences: vec![format!("for-{issuer}").into()],
                ..settings(issuer)
            };
            Provider::new(settings, KeySource::Inline(Ok(signer.keys())))
        };
        as_istiod(vec![of("a", &a), of("b", &b)])
    };
    for (signer, issuer, audience, checked) in [
        (&a, "a", "for-a", Checked::Passed),
        (&b, "b", "for-b", Checked::Passed),
        (&a, "b", "for-b", Checked::Refused(Problem::Signature)),
        (&b, "a", "for-a", Checked::Refused(Problem::Signature)),
        (&b, "b", "for-a", Checked::Refused(Problem::Audience)),
        (&b, "c", "for-b", Checked::Refused(Problem::UnknownIssuer)),
    ] {
        let token = signer.token(&json!({"iss": issuer, "aud": [audience, "x"]}));
        let checked_now = check(&filter(), &format!("Bearer {token}"));
        assert_eq!(checked_now, checked, "{issuer} {audience}");
    }
}

#[test]
fn good_tokens_are_told_of_and_taken_out() {
    let signer = Signer::edwards();
    let settings = ProviderSettings {
        payload_header: Some(HeaderName::from_static("x-payload")),
        claim_headers: vec![
            (HeaderName::from_static("x-sub"), "sub".into()),
            (HeaderName::from_static("x-org"), "org.name".into()),
        ],
        space_delimited: vec!["scope".into()],
        ..settings("a")
    };
    let filter = as_istiod(vec![Provider::new(settings, KeySource::Inline(Ok(signer.keys())))]);
    let claims = json!({"iss": "a", "sub": "me", "org": {"name": "o"}, "scope": "read  write"});
    let token = signer.token(&claims);
    // The second time, the token comes from memory.
    for _ in 0..2 {
        let mut head = head("/", &[("authorization", &format!("Bearer {token}")), ("x-sub", "spoofed")]);
        let mut metadata = DynamicMetadata::default();
        assert_eq!(check_at(&filter, &mut head, &mut metadata, NOW), Checked::Passed);
        let value = |name: &str| {
            head.headers
                .get_all(name)
                .iter()
                .map(|value| value.to_str().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!((value("x-sub"), value("x-org")), (vec!["me"], vec!["o"]));
        assert_eq!(value("x-payload"), [token.split('.').nth(1).unwrap()]);
        assert_eq!(value("authorization"), Vec::<&str>::new());
        let path = |text: &str| text.split('.').map(Into::into).collect::<Vec<Box<str>>>();
        assert_eq!(metadata.get(NAMESPACE, &path("payload.sub")), Some(&json!("me")));
        assert_eq!(
            metadata.get(NAMESPACE, &path("payload.scope")),
            Some(&json!(["read", "write"]))
        );
    }
}

#[test]
fn what_only_tokens_may_say_is_removed_though_there_is_none() {
    let settings = ProviderSettings {
        payload_header: Some(HeaderName::from_static("x-payload")),
        claim_headers: vec![(HeaderName::from_static("x-sub"), "sub".into())],
        ..settings("a")
    };
    let filter = as_istiod(vec![Provider::new(settings, KeySource::Inline(Ok(Signer::edwards().keys())))]);
    let mut head = head("/", &[("x-payload", "spoofed"), ("x-sub", "spoofed"), ("x-other", "stays")]);
    assert_eq!(
        check_at(&filter, &mut head, &mut DynamicMetadata::default(), NOW),
        Checked::Passed
    );
    assert_eq!(head.headers.keys().collect::<Vec<_>>(), ["x-other"]);
}

#[test]
fn a_token_required_is_required() {
    let signer = Signer::edwards();
    let requires = Requirement::Provider {
        provider: 0,
        audiences: None,
    };
    let providers = vec![Provider::new(settings("a"), KeySource::Inline(Ok(signer.keys())))];
    let filter = Authentication::new(providers, vec![(every(), requires)], vec![], true).unwrap();
    assert_eq!(check(&filter, "none"), Checked::Refused(Problem::Missing));
    let mut preflight = head("/", &[("origin", "http://x"), ("access-control-request-method", "GET")]);
    preflight.method = Method::OPTIONS;
    assert_eq!(
        check_at(&filter, &mut preflight, &mut DynamicMetadata::default(), NOW),
        Checked::Passed
    );
    preflight.headers.remove("origin");
    assert_eq!(
        check_at(&filter, &mut preflight, &mut DynamicMetadata::default(), NOW),
        Checked::Refused(Problem::Missing)
    );
}

#[test]
fn a_route_can_switch_it_off_or_name_a_requirement() {
    let requires = Requirement::Provider {
        provider: 0,
        audiences: None,
    };
    let providers = || vec![Provider::new(settings("a"), KeySource::Inline(Ok(Signer::edwards().keys())))];
    let named = vec![("open".into(), Requirement::Nothing)];
    let filter = Authentication::new(providers(), vec![(every(), requires)], named, true).unwrap();
    for (per_route, checked) in [
        (None, Checked::Refused(Problem::Missing)),
        (Some(PerRoute::Disabled), Checked::Passed),
        (Some(PerRoute::Requirement("open".into())), Checked::Passed),
        (
            Some(PerRoute::Requirement("gone".into())),
            Checked::Refused(Problem::UnknownIssuer),
        ),
    ] {
        let (mut head, mut metadata) = (head("/", &[]), DynamicMetadata::default());
        let found = filter.check(per_route.as_ref(), &mut head, &mut metadata, 0, NOW, &Fetched::default());
        assert_eq!(found, checked, "{per_route:?}");
    }
    let unknown = Requirement::All(vec![Requirement::Provider {
        provider: 1,
        audiences: None,
    }]);
    assert!(Authentication::new(providers(), vec![(every(), unknown)], vec![], true).is_err());
}

#[test]
fn keys_that_are_elsewhere_are_asked_for_only_when_they_are_needed() {
    let signer = Signer::edwards();
    let filter = as_istiod(vec![Provider::new(settings("a"), KeySource::Remote)]);
    let ask = |claims: &Value, fetched: &Fetched| {
        let mut head = head("/", &[("authorization", &format!("Bearer {}", signer.token(claims)))]);
        filter.check(None, &mut head, &mut DynamicMetadata::default(), 0, NOW, fetched)
    };
    let none = Fetched::default();
    assert_eq!(ask(&json!({"iss": "a"}), &none), Checked::NeedsKeys(0));
    assert_eq!(ask(&json!({"iss": "b"}), &none), Checked::Refused(Problem::UnknownIssuer));
    assert_eq!(ask(&json!({"iss": "a", "exp": 1}), &none), Checked::Refused(Problem::Expired));
    let failed = Fetched(HashMap::from([(0, Err(Problem::FetchFailed))]));
    assert_eq!(ask(&json!({"iss": "a"}), &failed), Checked::Refused(Problem::FetchFailed));
    let fetched = Fetched(HashMap::from([(0, Ok(Arc::new(signer.keys())))]));
    assert_eq!(ask(&json!({"iss": "a"}), &fetched), Checked::Passed);
}

proptest! {
    #[test]
    fn no_text_makes_a_token_panic(text in "\\PC{0,200}|[A-Za-z0-9_-]{0,80}\\.[A-Za-z0-9_-]{0,80}\\.[A-Za-z0-9_-]{0,80}") {
        let _ = Token::parse(&text);
    }

    #[test]
    fn no_text_makes_keys_panic(text in "\\PC{0,200}|\\{\"keys\":\\[\\{\"kty\":\"(RSA|EC|OKP|oct)\",\"(n|e|x|y|k|crv)\":\"[A-Za-z0-9_-]{0,400}\"\\}\\]\\}") {
        let _ = Keys::parse(&text);
    }

    #[test]
    fn a_token_changed_anywhere_is_not_accepted(at in 0usize..400, letter in "[A-Za-z0-9_-]") {
        let signer = SIGNER.with(Clone::clone);
        let token = signer.0.clone();
        // The last letter of the signature has bits that belong to no byte.
        let at = at % (token.len() - 1);
        prop_assume!(token[at..=at] != letter && token[at..=at] != *".");
        let mut changed = token.clone();
        changed.replace_range(at..=at, &letter);
        if let Ok(parsed) = Token::parse(&changed) {
            prop_assert!(signer.1.verify(&parsed).is_err(), "{changed}");
        }
    }
}

thread_local! {
    static SIGNER: Arc<(String, Keys)> = {
        let signer = Signer::edwards();
        Arc::new((signer.token(&json!({"iss": "a", "sub": "b", "exp": NOW})), signer.keys()))
    };
}
