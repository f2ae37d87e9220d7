//! What decisions cost a request: `cargo bench -p cairn-policy`.
//!
//! The figures that are promised (ARCHITECTURE.md §6): an ALLOW by principal, method and path 0.3 µs; 1,000 policies of 20 rules 2 µs; a
//! token that was seen before 1 µs, another one with ES256 150 µs; 10,000 routes 1.1 × what 10 cost, regular expressions alone 20 µs.

use std::{collections::BTreeMap, hint::black_box, sync::Arc};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use cairn_exchange::{Connection, DynamicMetadata, Exchange, Protocol, RequestHead, Scheme, clock};
use cairn_policy::{
    jwt::{Authentication, FetchedKeys, KeySource, Keys, Problem, Provider, ProviderSettings, Requirement},
    matcher::{HeaderMatch, HeaderMatcher, HeaderName, PathMatch, PathMatcher, Regex, StringMatch, StringMatcher},
    rbac::{Action, Condition, Facts, Policy, Rules, Text},
    route::{Facts as RouteFacts, Forward, Route, RouteAction, RouteMatch, RouteTable, Target, VirtualHost},
};
use divan::Bencher;
use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};
use serde_json::{Value, json};

fn main() {
    divan::main();
}

fn head(path: &str) -> RequestHead {
    let mut headers = HeaderMap::new();
    headers.insert("x-tenant", HeaderValue::from_static("gold"));
    headers.insert("user-agent", HeaderValue::from_static("curl/8.9.1"));
    RequestHead {
        method: Method::GET,
        path: PathAndQuery::try_from(path).unwrap(),
        authority: HeaderValue::from_static("web.app"),
        scheme: Scheme::Http,
        headers,
    }
}

fn exchange(peer: &str, path: &str) -> Exchange {
    let connection = Connection {
        id: 1,
        authority: "10.96.1.10:80".into(),
        local_address: "10.96.1.10:80".parse().ok(),
        service_port: 80,
        remote_address: "10.244.0.9:41000".parse().unwrap(),
        peer: peer.parse().ok(),
        local: None,
        source: None,
        requested_server_name: None,
        opened: clock::now(),
    };
    let mut exchange = Exchange::begin(Protocol::Http11, Arc::new(connection), "chain".into(), 1);
    exchange.request = Some(head(path));
    exchange
}

// === policies ===

fn client(namespace: usize, account: usize) -> String {
    format!("spiffe://cluster.local/ns/team-{namespace}/sa/client-{account}")
}

fn method(name: &str) -> Condition {
    Condition::Header(HeaderMatcher {
        name: HeaderName::Method,
        how: HeaderMatch::String(StringMatcher::exact(name)),
        invert: false,
        treat_missing_as_empty: false,
    })
}

fn from(principal: &str) -> Condition {
    Condition::Text(Text::PeerPrincipal, StringMatcher::exact(principal))
}

fn namespace(name: usize) -> Condition {
    let pattern = Regex::new(&format!(".*/ns/team-{name}/.*")).unwrap();
    Condition::Text(Text::PeerPrincipal, StringMatcher::new(StringMatch::Regex(pattern), false))
}

fn below(path: &str) -> Condition {
    Condition::Path(StringMatcher::prefix(path))
}

/// As istiod writes a rule: everything in and/or.
fn rule(who: Condition, path: &str) -> Policy {
    Policy {
        permissions: vec![Condition::All(vec![
            Condition::AnyOf(vec![method("GET"), method("HEAD")]),
            Condition::AnyOf(vec![below(path)]),
        ])],
        principals: vec![Condition::All(vec![Condition::AnyOf(vec![who])])],
        condition: None,
    }
}

/// 1,000 policies of 20 rules each, which are 20,000 of Envoy's.
fn many(who: impl Fn(usize, usize) -> Condition) -> Rules {
    let policies = (0..1_000).flat_map(|policy| (0..20).map(move |rule| (policy, rule)));
    let policies = policies.map(|(policy, number)| {
        let name = format!("ns[app]-policy[p-{policy:04}]-rule[{number}]");
        (name, rule(who(policy, number), &format!("/api/v{number}/items-{policy}/")))
    });
    Rules::new(Action::Allow, policies.collect())
}

/// Nothing but the facts: what all others pay besides.
#[divan::bench]
fn rbac_no_policy(bencher: Bencher<'_, '_>) {
    let rules = Rules::new(Action::Deny, BTreeMap::new());
    let exchange = exchange(&client(1, 1), "/api/v1/items-1/7");
    bencher.bench(|| rules.decide(&Facts::inside(black_box(&exchange))).allowed);
}

/// One ALLOW by principal, method and path.
#[divan::bench]
fn rbac_one_allow(bencher: Bencher<'_, '_>) {
    let policy = rule(from(&client(1, 1)), "/api/v1/items-1/");
    let rules = Rules::new(
        Action::Allow,
        BTreeMap::from([("ns[app]-policy[p]-rule[0]".to_owned(), policy)]),
    );
    let exchange = exchange(&client(1, 1), "/api/v1/items-1/7");
    bencher.bench(|| assert!(rules.decide(&Facts::inside(black_box(&exchange))).allowed));
}

/// Of 1,000 policies × 20 rules: the last one matches, or none does; by principal, by namespace, or by path alone.
#[divan::bench(args = ["principal-last", "principal-none", "namespace-last", "namespace-none", "path-last", "path-none"])]
fn rbac_many_policies(bencher: Bencher<'_, '_>, case: &str) {
    let (by, found) = case.split_once('-').unwrap();
    let rules = match by {
        "principal" => many(|policy, number| from(&client(policy, number))),
        "namespace" => many(|policy, _| namespace(policy)),
        _ => many(|_, _| Condition::Always),
    };
    let path = if found == "last" {
        "/api/v19/items-999/7"
    } else {
        "/nothing/of/it"
    };
    let exchange = exchange(&client(999, 19), path);
    bencher.bench(|| assert_eq!(rules.decide(&Facts::inside(black_box(&exchange))).allowed, found == "last"));
}

/// 1,000 policies that each name 20 principals and 20 paths.
#[divan::bench]
fn rbac_many_wide_policies(bencher: Bencher<'_, '_>) {
    let policies = (0..1_000).map(|policy| {
        let wide = Policy {
            permissions: vec![Condition::AnyOf(
                (0..20).map(|n| below(&format!("/p{policy}/{n}/"))).collect(),
            )],
            principals: vec![Condition::AnyOf((0..20).map(|n| from(&client(policy, n))).collect())],
            condition: None,
        };
        (format!("ns[app]-policy[p-{policy:04}]-rule[0]"), wide)
    });
    let rules = Rules::new(Action::Allow, policies.collect());
    let exchange = exchange(&client(999, 19), "/p999/19/x");
    bencher.bench(|| assert!(rules.decide(&Facts::inside(black_box(&exchange))).allowed));
}

// === routes ===

fn table(routes: impl Iterator<Item = RouteMatch>) -> RouteTable {
    let action = |n: usize| RouteAction::Forward(Box::new(Forward::to(Target::Cluster(format!("c{n}").into()))));
    let routes = routes
        .enumerate()
        .map(|(n, matches)| Arc::new(Route::new(matches, action(n))));
    RouteTable::new("t", vec![Arc::new(VirtualHost::any("h", routes.collect()))]).unwrap()
}

fn by_regex(pattern: String) -> RouteMatch {
    RouteMatch::path(PathMatcher::new(PathMatch::Regex(Regex::new(&pattern).unwrap()), false))
}

/// Of ten routes four begin with, three are, two ask for a header besides, one is a regular expression.
fn mixed(n: usize) -> RouteMatch {
    let path = |how| RouteMatch::path(PathMatcher::new(how, false));
    match n % 10 {
        0..4 => path(PathMatch::Prefix(format!("/prefix/{n}/").into())),
        4..7 => path(PathMatch::Exact(format!("/exact/{n}").into())),
        7..9 => RouteMatch {
            headers: vec![HeaderMatcher {
                name: HeaderName::parse("x-tenant").unwrap(),
                how: HeaderMatch::String(StringMatcher::exact(if n % 2 == 0 { "gold" } else { "lead" })),
                invert: false,
                treat_missing_as_empty: false,
            }],
            ..path(PathMatch::Prefix(format!("/tenant/{n}/").into()))
        },
        _ => by_regex(format!("/regex/{n}/[a-z]+")),
    }
}

/// The last route of each kind, one after the other.
#[divan::bench(args = [10, 10_000])]
fn four_routes_found_in_a_mix(bencher: Bencher<'_, '_>, routes: usize) {
    let table = table((0..routes).map(mixed));
    let last = routes - 10;
    let heads = [
        format!("/prefix/{}/x", last + 3),
        format!("/exact/{}", last + 6),
        format!("/tenant/{}/x", last + 8),
        format!("/regex/{}/x", last + 9),
    ];
    let heads = heads.map(|path| head(&path));
    let facts = RouteFacts {
        random: 0,
        metadata: DynamicMetadata::NONE,
    };
    bencher.bench(|| {
        for head in black_box(&heads) {
            assert!(table.find(head, facts).is_some());
        }
    });
}

/// Regular expressions alone: with a beginning of their own, and with a word of their own in the middle.
#[divan::bench(args = ["beginning", "middle"])]
fn route_found_among_10000_regular_expressions(bencher: Bencher<'_, '_>, kind: &str) {
    let pattern = |n: usize| match kind {
        "beginning" => format!("/regex/{n}/[a-z]+"),
        _ => format!("/[a-z]+/item-{n}/.*"),
    };
    let table = table((0..10_000).map(|n| by_regex(pattern(n))));
    let head = head(if kind == "beginning" {
        "/regex/9999/x"
    } else {
        "/shop/item-9999/x"
    });
    let facts = RouteFacts {
        random: 0,
        metadata: DynamicMetadata::NONE,
    };
    bencher.bench(|| assert!(table.find(black_box(&head), facts).is_some()));
}

// === tokens ===

const NOW: u64 = 1_800_000_000;

struct NothingFetched;

impl FetchedKeys for NothingFetched {
    fn keys(&self, _provider: usize) -> Option<Result<Arc<Keys>, Problem>> {
        None
    }
}

fn encoded(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn authentication(pair: &EcdsaKeyPair) -> Authentication {
    let point = pair.public_key().as_ref().get(1..).unwrap();
    let (x, y) = point.split_at(32);
    let keys = json!({"keys": [{"kty": "EC", "crv": "P-256", "x": encoded(x), "y": encoded(y)}]});
    let settings = ProviderSettings {
        name: "origins-0".into(),
        issuer: Some("issuer".into()),
        payload_in_metadata: Some("payload".into()),
        ..ProviderSettings::default()
    };
    let keys = Keys::parse(&keys.to_string()).unwrap();
    let provider = Provider::new(settings, KeySource::Inline(Ok(keys)));
    let requires = Requirement::Provider {
        provider: 0,
        audiences: None,
    };
    let every = RouteMatch::path(PathMatcher::new(PathMatch::Prefix("/".into()), false));
    Authentication::new(vec![provider], vec![(every, requires)], vec![], true).unwrap()
}

fn token(pair: &EcdsaKeyPair, number: u64) -> RequestHead {
    let claims =
        json!({"iss": "issuer", "sub": number.to_string(), "exp": NOW + 600, "groups": ["dev", "ops"], "scope": "read write"});
    let part = |value: &Value| encoded(value.to_string());
    let signed = format!("{}.{}", part(&json!({"alg": "ES256", "typ": "JWT"})), part(&claims));
    let signature = pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
    let mut head = head("/");
    let value = format!("Bearer {signed}.{}", encoded(signature.as_ref()));
    head.headers
        .insert(http::header::AUTHORIZATION, HeaderValue::try_from(value).unwrap());
    head
}

fn accept(filter: &Authentication, head: &mut RequestHead) {
    let mut metadata = DynamicMetadata::default();
    let checked = filter.check(None, head, &mut metadata, 0, NOW, &NothingFetched);
    assert_eq!(checked, cairn_policy::jwt::Checked::Passed);
}

/// A token that was verified before.
#[divan::bench]
fn jwt_seen_before(bencher: Bencher<'_, '_>) {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let filter = authentication(&pair);
    let head = token(&pair, 0);
    accept(&filter, &mut head.clone());
    bencher
        .with_inputs(|| head.clone())
        .bench_values(|mut head| accept(&filter, &mut head));
}

/// Tokens that were not.
#[divan::bench(sample_count = 20, sample_size = 50)]
fn jwt_es256(bencher: Bencher<'_, '_>) {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let filter = authentication(&pair);
    let mut number = 0;
    bencher
        .with_inputs(|| {
            number += 1;
            token(&pair, number)
        })
        .bench_local_values(|mut head| accept(&filter, &mut head));
}
