//! What conditions and rules mean, and that the compiled form means the same.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use cairn_exchange::{
    Connection, DynamicMetadata, Exchange, Protocol, RequestHead, Scheme,
    cel::{Options, Program},
};
use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};
use ipnet::IpNet;
use proptest::{collection::vec, prelude::*, sample::select};

use super::{Action, Address, Condition, Decision, Facts, Filters, Policy, Rbac, Rules, Text, UriTemplate, details, interpret};
use crate::matcher::{HeaderMatch, HeaderMatcher, HeaderName, MetadataMatcher, Regex, StringMatch, StringMatcher, ValueMatcher};

const CLIENT: &str = "spiffe://cluster.local/ns/app/sa/client";

/// What one request or connection is.
#[derive(Clone, Debug)]
struct Sample {
    request: Option<RequestHead>,
    destination: Option<IpAddr>,
    port: u16,
    remote: IpAddr,
    forwarded: IpAddr,
    peer: Option<&'static str>,
    certificate: Option<&'static str>,
    server_name: Option<&'static str>,
}

impl Sample {
    fn http(method: &'static str, path: &'static str, fields: &[(&'static str, &'static str)]) -> Self {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_static(value));
        }
        Self {
            request: Some(RequestHead {
                method: Method::from_bytes(method.as_bytes()).unwrap(),
                path: PathAndQuery::from_static(path),
                authority: HeaderValue::from_static("Web.app:80"),
                scheme: Scheme::Http,
                headers,
            }),
            ..Self::tcp()
        }
    }

    fn tcp() -> Self {
        Self {
            request: None,
            destination: Some([10, 96, 1, 10].into()),
            port: 80,
            remote: [10, 244, 0, 9].into(),
            forwarded: [192, 0, 2, 7].into(),
            peer: Some(CLIENT),
            certificate: None,
            server_name: None,
        }
    }

    fn facts(&self) -> Facts<'_> {
        Facts {
            request: self.request.as_ref(),
            has_path: self.request.is_some(),
            destination_ip: self.destination,
            destination_port: self.port,
            direct_remote_ip: self.remote,
            remote_ip: self.forwarded,
            requested_server_name: self.server_name,
            certificate: self.certificate,
            peer_principal: self.peer,
            local_principal: Some("spiffe://cluster.local/ns/app/sa/waypoint"),
            connect_authority: Some("10.96.1.10:80"),
            metadata: DynamicMetadata::NONE,
            exchange: None,
        }
    }

    /// The same with a record for expressions.
    fn facts_of<'a>(&'a self, record: &'a Exchange) -> Facts<'a> {
        Facts {
            exchange: Some(record),
            ..self.facts()
        }
    }
}

fn exact(text: &str) -> StringMatcher {
    StringMatcher::exact(text)
}

fn regex(pattern: &str) -> StringMatcher {
    StringMatcher::new(StringMatch::Regex(Regex::new(pattern).unwrap()), false)
}

fn header(name: &str, how: HeaderMatch) -> Condition {
    Condition::Header(HeaderMatcher {
        name: HeaderName::parse(name).unwrap(),
        how,
        invert: false,
        treat_missing_as_empty: false,
    })
}

fn method(name: &str) -> Condition {
    header(":method", HeaderMatch::String(exact(name)))
}

fn not(inner: Condition) -> Condition {
    Condition::Not(Box::new(inner))
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn policy(permission: Condition, principal: Condition) -> Policy {
    Policy {
        permissions: vec![permission],
        principals: vec![principal],
        condition: None,
    }
}

fn rules(action: Action, policies: &[(&str, Policy)]) -> Rules {
    let policies = policies.iter().map(|(name, policy)| ((*name).to_owned(), policy.clone()));
    Rules::new(action, policies.collect())
}

/// Whether a condition holds, compiled and read.
fn holds(condition: &Condition, facts: &Facts<'_>) -> bool {
    let policies = [("p", policy(Condition::Always, condition.clone()))];
    let compiled = rules(Action::Allow, &policies).decide(facts).allowed;
    assert_eq!(compiled, interpret::holds(condition, facts), "{condition:?}");
    compiled
}

#[test]
fn each_condition_asks_its_own_fact() {
    let request = Sample::http("GET", "/admin/x?q=1", &[("x-tenant", "gold")]);
    let text = |which, how| Condition::Text(which, how);
    let ignoring_case = StringMatcher::new(StringMatch::Exact("web.APP:80".into()), true);
    for (condition, expected) in [
        (Condition::Always, true),
        (Condition::All(vec![]), true),
        (Condition::AnyOf(vec![]), false),
        (not(Condition::Always), false),
        (method("GET"), true),
        (method("get"), false),
        (header(":authority", HeaderMatch::String(ignoring_case)), true),
        (header("host", HeaderMatch::Present(true)), true),
        (header("x-tenant", HeaderMatch::String(exact("Gold"))), false),
        (header("x-none", HeaderMatch::Present(true)), false),
        (Condition::Path(exact("/admin/x")), true),
        (Condition::Path(StringMatcher::prefix("/admin")), true),
        (Condition::Path(exact("/admin/x?q=1")), false),
        (Condition::Template(UriTemplate::new("/*/x").unwrap()), true),
        (Condition::Address(Address::Destination, net("10.96.0.0/16")), true),
        (Condition::Address(Address::DirectRemote, net("10.244.0.0/24")), true),
        (Condition::Address(Address::DirectRemote, net("192.0.2.0/24")), false),
        (Condition::Address(Address::Remote, net("192.0.2.7/32")), true),
        (Condition::Port(80..=80), true),
        (Condition::Port(81..=90), false),
        (text(Text::PeerPrincipal, exact(CLIENT)), true),
        (text(Text::PeerPrincipal, regex(".*/ns/app/.*")), true),
        (text(Text::PeerPrincipal, StringMatcher::prefix("spiffe://old-td/")), false),
        (text(Text::LocalPrincipal, regex(".*/sa/waypoint")), true),
        (text(Text::ConnectAuthority, exact("10.96.1.10:80")), true),
        (text(Text::ServerName, exact("")), true),
        // Inside a tunnel there is no certificate.
        (text(Text::Certificate, exact(CLIENT)), false),
        (Condition::Authenticated, false),
    ] {
        assert_eq!(holds(&condition, &request.facts()), expected, "{condition:?}");
        assert_eq!(
            holds(&not(condition.clone()), &request.facts()),
            !expected,
            "not {condition:?}"
        );
    }
}

#[test]
fn what_is_missing_matches_nothing_but_a_not() {
    let mut nobody = Sample::tcp();
    nobody.peer = None;
    nobody.destination = None;
    let claim = MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: ["payload".into(), "sub".into()].into(),
        value: ValueMatcher::String(regex(".*")),
        invert: false,
    };
    for condition in [
        Condition::Text(Text::PeerPrincipal, regex(".*")),
        Condition::Address(Address::Destination, net("0.0.0.0/0")),
        Condition::Path(regex(".*")),
        Condition::Template(UriTemplate::new("/**").unwrap()),
        header(":path", HeaderMatch::Present(true)),
        header(":method", HeaderMatch::String(regex(".*"))),
        Condition::Metadata(claim),
    ] {
        assert!(!holds(&condition, &nobody.facts()), "{condition:?}");
        assert!(holds(&not(condition), &nobody.facts()));
    }
}

#[test]
fn a_connect_has_headers_but_no_path() {
    let connect = Sample::http("CONNECT", "/", &[]);
    let mut facts = connect.facts();
    facts.has_path = false;
    facts.certificate = Some(CLIENT);
    for (condition, expected) in [
        (method("CONNECT"), true),
        (Condition::Path(regex(".*")), false),
        (header(":path", HeaderMatch::Present(true)), false),
        (Condition::Authenticated, true),
        (
            Condition::Text(Text::Certificate, StringMatcher::prefix("spiffe://cluster.local/")),
            true,
        ),
    ] {
        assert_eq!(holds(&condition, &facts), expected, "{condition:?}");
    }
}

#[test]
fn claims_are_looked_up_where_filters_note_them() {
    let request = Sample::http("GET", "/", &[]);
    let mut metadata = DynamicMetadata::default();
    metadata.set(
        "envoy.filters.http.jwt_authn".into(),
        "payload".into(),
        std::sync::Arc::new(serde_json::json!({"sub": "dev"})),
    );
    let facts = Facts {
        metadata: &metadata,
        ..request.facts()
    };
    for (wanted, expected) in [("dev", true), ("ops", false)] {
        let claim = Condition::Metadata(MetadataMatcher {
            filter: "envoy.filters.http.jwt_authn".into(),
            path: ["payload".into(), "sub".into()].into(),
            value: ValueMatcher::String(exact(wanted)),
            invert: false,
        });
        assert_eq!(holds(&claim, &facts), expected);
    }
}

/// A record, for expressions.
fn record(sample: &Sample) -> Exchange {
    let connection = Connection {
        id: 1,
        authority: "10.96.1.10:80".into(),
        local_address: "10.96.1.10:80".parse().ok(),
        service_port: 80,
        remote_address: SocketAddr::new(sample.remote, 41_000),
        peer: None,
        local: None,
        source: None,
        requested_server_name: None,
        opened: cairn_exchange::clock::now(),
    };
    let protocol = if sample.request.is_some() {
        Protocol::Http11
    } else {
        Protocol::Tcp
    };
    let mut exchange = Exchange::begin(protocol, connection.into(), "chain".into(), 1);
    exchange.request.clone_from(&sample.request);
    exchange
}

fn with_condition(text: &str) -> Policy {
    Policy {
        condition: Some(Program::parse(text, Options::default()).unwrap().into()),
        ..policy(method("GET"), Condition::Always)
    }
}

#[test]
fn a_condition_has_to_hold_besides() {
    let exchange = record(&Sample::http("GET", "/a?x=1", &[("x-tenant", "gold")]));
    let facts = Facts::inside(&exchange);
    for (text, expected) in [
        ("request.headers['x-tenant'] == 'gold'", true),
        ("request.headers['x-tenant'] == 'lead'", false),
        ("request.headers['x-none'] != 'gold'", false),
        (
            "request.url_path == '/a' && source.port == 41000 && destination.port == 80",
            true,
        ),
        ("request.path", false),
    ] {
        for action in [Action::Allow, Action::Deny] {
            let rules = rules(action, &[("p", with_condition(text))]);
            let decision = rules.decide(&facts);
            assert_eq!(decision.policy.is_some(), expected, "{text}");
            assert_eq!(decision.allowed, expected == (action == Action::Allow), "{text}");
            let (allowed, policy) = interpret::decide(action, rules.plain(), &facts);
            assert_eq!((allowed, policy.is_some()), (decision.allowed, expected), "{text}");
        }
    }
    // Before a tunnel is accepted there is no record.
    let unknown = Facts { exchange: None, ..facts };
    assert!(
        !rules(Action::Allow, &[("p", with_condition("true"))])
            .decide(&unknown)
            .allowed
    );
}

#[test]
fn objects_of_filter_state_are_read_off_the_record() {
    let mut exchange = record(&Sample::http("GET", "/", &[]));
    exchange.filter_state.set("tenant".into(), "gold".to_owned(), false);
    let facts = Facts::inside(&exchange);
    for (key, wanted, expected) in [("tenant", "gold", true), ("tenant", "lead", false), ("other", "gold", false)] {
        assert_eq!(
            holds(&Condition::State(key.into(), exact(wanted)), &facts),
            expected,
            "{key} {wanted}"
        );
    }
}

#[test]
fn the_story_of_a_condition_says_what_it_is_and_what_it_found() {
    let exchange = record(&Sample::http("GET", "/a", &[("x-tenant", "lead"), ("x-api-key", "hush")]));
    let facts = Facts::inside(&exchange);
    let text = "request.headers['x-tenant'] == 'gold' && request.headers['x-api-key'] == 'a' && has(request.referer)";
    let story = rules(Action::Allow, &[("p", with_condition(text))]).explain(&facts);
    let nearest: Vec<_> = story.nearest.iter().map(|story| story.sentence()).collect();
    assert_eq!(
        nearest,
        [concat!(
            r#"p matches except condition request.headers["x-tenant"] == "gold" && request.headers["x-api-key"] == "a" "#,
            r#"&& has(request.referer): true vs false (request.headers["x-tenant"] is "lead", "#,
            r#"request.headers["x-api-key"] is (hidden), request.referer is not there)"#
        )]
    );
    let story = rules(Action::Allow, &[("p", with_condition("request.method == 'GET'"))]).explain(&facts);
    assert_eq!(
        story.matched.unwrap().sentence(),
        r#"p matches: method is GET; condition request.method == "GET" is true"#
    );
}

#[test]
fn an_ipv4_client_in_ipv6_form_is_the_ipv4_client() {
    let mut sample = Sample::tcp();
    sample.remote = "::ffff:10.244.0.9".parse().unwrap();
    assert!(holds(
        &Condition::Address(Address::DirectRemote, net("10.244.0.9/32")),
        &sample.facts()
    ));
}

#[test]
fn the_first_policy_by_name_that_matches_is_told() {
    let get = policy(method("GET"), Condition::Always);
    let all = policy(Condition::Always, Condition::Always);
    let none = policy(Condition::Always, not(Condition::Always));
    let request = Sample::http("GET", "/", &[]);
    for (action, policies, allowed, matched) in [
        (Action::Allow, vec![], false, None),
        (Action::Deny, vec![], true, None),
        (Action::Log, vec![], true, None),
        (Action::Allow, vec![("b", all.clone()), ("a", get.clone())], true, Some("a")),
        (Action::Deny, vec![("b", all.clone()), ("a", none.clone())], false, Some("b")),
        (Action::Log, vec![("a", get)], true, Some("a")),
        (Action::Allow, vec![("a", none.clone())], false, None),
        (Action::Deny, vec![("a", none)], true, None),
    ] {
        let rules = rules(action, &policies);
        let Decision { allowed: found, policy } = rules.decide(&request.facts());
        assert_eq!(
            (found, policy.map(|name| &**name)),
            (allowed, matched),
            "{action:?} {policies:?}"
        );
    }
}

#[test]
fn absent_rules_allow_and_empty_rules_deny() {
    let facts = Sample::tcp();
    let filter = |rules| Filters::from_iter([Rbac { rules, shadow: None }]);
    assert!(filter(None).decide(&facts.facts()).is_ok());
    let denied = filter(Some(rules(Action::Allow, &[]))).decide(&facts.facts()).unwrap_err();
    assert_eq!(denied.details(), "rbac_access_denied_matched_policy[none]");
}

#[test]
fn all_filters_have_to_let_it_pass() {
    let all = policy(Condition::Always, Condition::Always);
    let filter = |action| Rbac {
        rules: Some(rules(action, &[("p q", all.clone())])),
        shadow: None,
    };
    let filters = Filters::from_iter([filter(Action::Allow), filter(Action::Deny)]);
    let denied = filters.decide(&Sample::tcp().facts()).unwrap_err();
    assert_eq!(denied.details(), "rbac_access_denied_matched_policy[p_q]");
    assert_eq!(details(Some("")), "rbac_access_denied_matched_policy[none]");
}

fn text() -> impl Strategy<Value = StringMatcher> {
    let words = select(vec![
        "",
        "/",
        "/admin",
        "/admin/x",
        "GET",
        "gold",
        CLIENT,
        "spiffe://cluster.local/ns/app/sa/other",
        "spiffe://",
        "client",
    ]);
    let shaped = (words, 0..5u8, any::<bool>()).prop_map(|(word, kind, fold)| {
        let how = match kind {
            0 | 1 => StringMatch::Exact(word.into()),
            2 => StringMatch::Prefix(word.into()),
            3 => StringMatch::Suffix(word.into()),
            _ => StringMatch::Contains(word.into()),
        };
        StringMatcher::new(how, fold)
    });
    let regex = select(vec![
        ".*",
        ".+",
        ".*/ns/app/.*",
        "/admin.*",
        ".*/client",
        "GET",
        "/ad.in",
        "(?i)/ADMIN.*",
        "a|.*b",
        "[A-Z]+",
        "/admin?",
    ])
    .prop_map(regex);
    prop_oneof![4 => shaped, 1 => regex]
}

fn condition() -> impl Strategy<Value = Condition> {
    let nets = select(vec![
        "10.0.0.0/8",
        "10.244.0.9/32",
        "10.244.0.0/24",
        "192.0.2.0/24",
        "0.0.0.0/0",
        "fd00::/8",
        "::/0",
    ]);
    let addresses = select(vec![Address::Destination, Address::DirectRemote, Address::Remote]);
    let texts = select(vec![
        Text::PeerPrincipal,
        Text::LocalPrincipal,
        Text::Certificate,
        Text::ServerName,
        Text::ConnectAuthority,
    ]);
    let names = select(vec![":method", ":path", ":authority", "x-tenant", "x-none"]);
    let how = prop_oneof![
        3 => text().prop_map(HeaderMatch::String),
        1 => any::<bool>().prop_map(HeaderMatch::Present),
    ];
    let leaf = prop_oneof![
        1 => Just(Condition::Always),
        1 => Just(Condition::Authenticated),
        2 => text().prop_map(Condition::Path),
        2 => (addresses, nets).prop_map(|(which, range)| Condition::Address(which, net(range))),
        2 => (78..82u16, 0..3u16).prop_map(|(from, more)| Condition::Port(from..=from + more)),
        4 => (texts, text()).prop_map(|(which, how)| Condition::Text(which, how)),
        3 => (names, how, any::<bool>(), any::<bool>()).prop_map(|(name, how, invert, treat_missing_as_empty)| {
            Condition::Header(HeaderMatcher { name: HeaderName::parse(name).unwrap(), how, invert, treat_missing_as_empty })
        }),
        1 => select(vec!["/*", "/**", "/admin/*"]).prop_map(|template| Condition::Template(UriTemplate::new(template).unwrap())),
    ];
    leaf.prop_recursive(3, 24, 5, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(Condition::All),
            vec(inner.clone(), 0..5).prop_map(Condition::AnyOf),
            inner.prop_map(not),
        ]
    })
}

fn expression() -> impl Strategy<Value = Arc<Program>> {
    let texts = vec![
        "request.method == 'GET'",
        "request.headers['x-tenant'] == 'gold'",
        "request.headers['x-none'] == 'a' || source.port > 0",
        "request.path",
    ];
    select(texts).prop_map(|text| Program::parse(text, Options::default()).unwrap().into())
}

/// Enough for an index, and mostly of what an index can look up.
fn many_policies() -> impl Strategy<Value = BTreeMap<String, Policy>> {
    let plain = prop_oneof![
        3 => text().prop_map(Condition::Path),
        3 => text().prop_map(|how| Condition::Text(Text::PeerPrincipal, how)),
        2 => text().prop_map(|how| header("x-tenant", HeaderMatch::String(how))),
        1 => (78..82u16).prop_map(|port| Condition::Port(port..=port + 1)),
        1 => select(vec!["10.0.0.0/8", "10.244.0.9/32", "10.244.0.0/24", "0.0.0.0/0", "fd00::/8"])
            .prop_map(|range| Condition::Address(Address::DirectRemote, net(range))),
        1 => select(vec!["/*", "/admin/*", "/a{b}"]).prop_map(|template| {
            UriTemplate::new(template).map_or(Condition::Authenticated, Condition::Template)
        }),
        1 => Just(Condition::Always),
    ];
    let nested = prop_oneof![
        3 => plain.clone(),
        1 => vec(plain.clone(), 0..3).prop_map(Condition::All),
        1 => vec(plain.clone(), 0..9).prop_map(Condition::AnyOf),
        1 => plain.prop_map(not),
    ];
    let policy = (vec(nested.clone(), 1..3), vec(nested, 1..3)).prop_map(|(permissions, principals)| Policy {
        permissions,
        principals,
        condition: None,
    });
    proptest::collection::btree_map("[a-z]{2}", policy, 8..16)
}

fn policies() -> impl Strategy<Value = BTreeMap<String, Policy>> {
    let policy = (
        vec(condition(), 1..4),
        vec(condition(), 1..4),
        proptest::option::weighted(0.2, expression()),
    )
        .prop_map(|(permissions, principals, condition)| Policy {
            permissions,
            principals,
            condition,
        });
    proptest::collection::btree_map("[a-d]", policy, 0..4)
}

fn sample() -> impl Strategy<Value = Sample> {
    let address = || {
        select(vec!["10.244.0.9", "10.96.1.10", "192.0.2.7", "fd00::1", "::ffff:10.244.0.9"])
            .prop_map(|text| text.parse::<IpAddr>().unwrap())
    };
    let names = || {
        select(vec![
            None,
            Some(CLIENT),
            Some("spiffe://cluster.local/ns/app/sa/other"),
            Some(""),
        ])
    };
    let request = proptest::option::of((
        select(vec!["GET", "POST", "CONNECT"]),
        select(vec!["/", "/admin", "/admin/x?a=b", "/Admin"]),
        select(vec![
            &[][..],
            &[("x-tenant", "gold")][..],
            &[("x-tenant", "gold"), ("x-tenant", "")][..],
        ]),
    ));
    (
        request,
        proptest::option::of(address()),
        78..84u16,
        address(),
        address(),
        names(),
        names(),
        select(vec![None, Some("gold"), Some("")]),
    )
        .prop_map(
            |(request, destination, port, remote, forwarded, peer, certificate, server_name)| Sample {
                request: request.and_then(|(method, path, fields)| Sample::http(method, path, fields).request),
                destination,
                port,
                remote,
                forwarded,
                peer,
                certificate,
                server_name,
            },
        )
}

fn action() -> impl Strategy<Value = Action> {
    select(vec![Action::Allow, Action::Deny, Action::Log])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn of_many_policies_those_that_can_match_are_asked(action in action(), policies in many_policies(), samples in vec(sample(), 1..8)) {
        let compiled = Rules::new(action, policies.clone());
        prop_assert!(compiled.is_indexed());
        for sample in samples {
            let record = record(&sample);
            let facts = sample.facts_of(&record);
            let (allowed, policy) = interpret::decide(action, &policies, &facts);
            let decision = compiled.decide(&facts);
            prop_assert_eq!((decision.allowed, decision.policy.map(|name| &**name)), (allowed, policy), "{:?}", sample);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn compiled_rules_decide_as_the_plain_ones(action in action(), policies in policies(), samples in vec(sample(), 1..8)) {
        let compiled = Rules::new(action, policies.clone());
        for sample in samples {
            let record = record(&sample);
            let facts = sample.facts_of(&record);
            let (allowed, policy) = interpret::decide(action, &policies, &facts);
            let decision = compiled.decide(&facts);
            prop_assert_eq!((decision.allowed, decision.policy.map(|name| &**name)), (allowed, policy), "{:?}", sample);
        }
    }

    #[test]
    fn a_story_tells_what_was_decided(action in action(), policies in policies(), samples in vec(sample(), 1..8)) {
        let compiled = Rules::new(action, policies.clone());
        for sample in samples {
            let record = record(&sample);
            let facts = sample.facts_of(&record);
            let story = compiled.explain(&facts);
            let decision = compiled.decide(&facts);
            prop_assert_eq!(story.allowed, decision.allowed);
            prop_assert_eq!(story.matched.as_ref().map(|policy| policy.name.as_str()), decision.policy.map(|name| &**name));
            prop_assert!(story.matched.iter().all(|policy| policy.misses.is_empty()));
            // Whatever does not match has a reason, and whatever has none matches.
            let (alone, named) = (|name: &str| BTreeMap::from([(name.to_owned(), policies[name].clone())]), policies.keys());
            for name in named {
                let one = alone(name);
                let (_, matched) = interpret::decide(action, &one, &facts);
                let near = Rules::new(action, one.clone()).explain(&facts);
                prop_assert_eq!(matched.is_none(), near.nearest.iter().any(|policy| !policy.misses.is_empty()));
            }
        }
    }

    #[test]
    fn a_deny_more_never_allows_more(policies in policies(), more in condition(), sample in sample()) {
        let allowed = |policies: &BTreeMap<String, Policy>| Rules::new(Action::Deny, policies.clone()).decide(&sample.facts()).allowed;
        let before = allowed(&policies);
        let mut with = policies;
        with.insert("e".to_owned(), policy(more, Condition::Always));
        prop_assert!(before || !allowed(&with));
    }

    #[test]
    fn an_allow_more_never_denies_more(policies in policies(), more in condition(), sample in sample()) {
        let allowed = |policies: &BTreeMap<String, Policy>| Rules::new(Action::Allow, policies.clone()).decide(&sample.facts()).allowed;
        let before = allowed(&policies);
        let mut with = policies;
        with.insert("e".to_owned(), policy(Condition::Always, more));
        prop_assert!(!before || allowed(&with));
    }

    #[test]
    fn a_filter_more_never_allows_more(action in action(), policies in policies(), sample in sample()) {
        let first = || Rbac { rules: Some(rules(Action::Deny, &[("p", policy(method("GET"), Condition::Always))])), shadow: None };
        let second = Rbac { rules: Some(Rules::new(action, policies)), shadow: None };
        let one = Filters::from_iter([first()]).decide(&sample.facts()).is_ok();
        let both = Filters::from_iter([first(), second]).decide(&sample.facts()).is_ok();
        prop_assert!(one || !both);
    }
}

#[test]
fn the_port_is_the_services_where_the_client_asked_for_it_by_name() {
    use cairn_exchange::{Connection, Exchange, Protocol, clock};
    let client: SocketAddr = "10.244.0.9:41000".parse().unwrap();
    let connection = Connection {
        id: 1,
        authority: "web.app.svc.cluster.local:80".into(),
        local_address: None,
        service_port: 80,
        remote_address: client,
        peer: CLIENT.parse().ok(),
        local: None,
        source: None,
        requested_server_name: None,
        opened: clock::now(),
    };
    let exchange = Exchange::begin(Protocol::Tcp, connection.into(), "chain".into(), 1);
    let facts = Facts::inside(&exchange);
    assert!(holds(&Condition::Port(80..=80), &facts));
    assert!(holds(&Condition::Text(Text::PeerPrincipal, exact(CLIENT)), &facts));
    assert!(!holds(&Condition::Authenticated, &facts));
    assert!(holds(&Condition::Address(Address::Remote, client.ip().into()), &facts));
}

#[test]
fn a_story_names_the_nearest_miss_first() {
    let at = |path: &str| Condition::All(vec![Condition::Path(StringMatcher::prefix(path)), method("GET")]);
    let from = |pattern: &str| Condition::Text(Text::PeerPrincipal, regex(pattern));
    let rules = rules(
        Action::Deny,
        &[
            ("ns[app]-policy[far]-rule[1]", policy(at("/x"), from(".*/ns/other/.*"))),
            (
                "ns[app]-policy[deny-admin]-rule[0]",
                policy(at("/admin/"), from(".*/ns/app/.*")),
            ),
        ],
    );
    let request = Sample::http("GET", "/administration", &[]);
    let story = rules.explain(&request.facts());
    assert!(story.allowed);
    let sentences: Vec<_> = story.nearest.iter().map(super::PolicyStory::sentence).collect();
    assert_eq!(
        sentences,
        [
            "rule 0 of app/deny-admin matches except path: /admin/* vs /administration",
            "rule 1 of app/far matches except path: /x* vs /administration; namespace: other vs app",
        ]
    );
    let denied = Sample::http("GET", "/admin/x", &[]);
    let story = rules.explain(&denied.facts());
    assert_eq!(
        story.matched.unwrap().sentence(),
        "rule 0 of app/deny-admin matches: path /admin/x is /admin/*; method is GET; namespace is app"
    );
}

#[test]
fn a_story_keeps_secrets_to_itself() {
    let rules = rules(
        Action::Allow,
        &[(
            "p",
            policy(
                header("authorization", HeaderMatch::String(exact("Bearer wanted"))),
                Condition::Always,
            ),
        )],
    );
    let request = Sample::http("GET", "/", &[("authorization", "Bearer given")]);
    let sentence = rules.explain(&request.facts()).nearest[0].sentence();
    assert_eq!(sentence, "p does not match: header authorization: (hidden) vs (hidden)");
}
