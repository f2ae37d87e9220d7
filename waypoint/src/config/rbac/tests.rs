//! RBAC messages of every kind, and the decisions that captured policies come to.

use std::{net::SocketAddr, path::Path, sync::Arc};

use arc_swap::ArcSwap;
use cairn_exchange::{Connection, Exchange, Protocol, RequestHead, Scheme, clock};
use cairn_filters::{FilterChain, NoServices, OnRoute, Run, Verdict};
use cairn_policy::rbac::{Denied, Facts};
use cairn_proto::{
    envoy::{
        config::{
            core::v3::{CidrRange, TypedExtensionConfig},
            rbac::v3::{
                MetadataSource, Permission, Principal, SourcedMetadata, permission::Rule, principal, principal::Identifier,
            },
            route::v3::HeaderMatcher,
        },
        extensions::{
            path::r#match::uri_template::v3::UriTemplateMatchConfig,
            rbac::principals::mtls_authenticated::v3::Config as MtlsAuthenticated,
        },
        r#type::{
            matcher::v3::{
                FilterStateMatcher, MetadataMatcher, PathMatcher, StringMatcher, ValueMatcher, filter_state_matcher,
                metadata_matcher::{PathSegment, path_segment::Segment},
                path_matcher,
                string_matcher::MatchPattern,
                value_matcher,
            },
            v3::Int32Range,
        },
    },
    google::api::expr::v1alpha1::{
        CheckedExpr, Constant, Expr,
        constant::ConstantKind,
        expr::{ExprKind, Ident, Select},
    },
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, uri::PathAndQuery};

use super::*;
use crate::{
    config::{Compiler, load::load},
    snapshot::{ChainKind, Snapshot},
    workloads::Workloads,
};

fn any(type_name: &str, message: &impl prost::Message) -> prost_types::Any {
    prost_types::Any {
        type_url: format!("type.googleapis.com/{type_name}"),
        value: message.encode_to_vec(),
    }
}

fn extension(type_name: &str, message: &impl prost::Message) -> TypedExtensionConfig {
    TypedExtensionConfig {
        name: "x".into(),
        typed_config: Some(any(type_name, message)),
    }
}

fn template(path_template: &str) -> TypedExtensionConfig {
    let path_template = path_template.into();
    extension(
        "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
        &UriTemplateMatchConfig { path_template },
    )
}

fn exact(text: &str) -> StringMatcher {
    string(MatchPattern::Exact(text.into()))
}

fn string(pattern: MatchPattern) -> StringMatcher {
    StringMatcher {
        ignore_case: false,
        match_pattern: Some(pattern),
    }
}

fn range(address_prefix: &str, prefix_len: u32) -> CidrRange {
    CidrRange {
        address_prefix: address_prefix.into(),
        prefix_len: Some(prefix_len),
    }
}

fn claim() -> MetadataMatcher {
    MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: vec![PathSegment {
            segment: Some(Segment::Key("payload".into())),
        }],
        value: Some(ValueMatcher {
            match_pattern: Some(value_matcher::MatchPattern::StringMatch(exact("x"))),
        }),
        invert: false,
    }
}

fn state(key: &str) -> Identifier {
    Identifier::FilterState(FilterStateMatcher {
        key: key.into(),
        matcher: Some(filter_state_matcher::Matcher::StringMatch(exact("x"))),
    })
}

fn authenticated(pattern: MatchPattern) -> Identifier {
    Identifier::Authenticated(principal::Authenticated {
        principal_name: Some(string(pattern)),
    })
}

fn header() -> HeaderMatcher {
    HeaderMatcher {
        name: "x-a".into(),
        ..HeaderMatcher::default()
    }
}

fn policy(rule: Rule, identifier: Identifier) -> EnvoyPolicy {
    EnvoyPolicy {
        permissions: vec![Permission { rule: Some(rule) }],
        principals: vec![Principal {
            identifier: Some(identifier),
        }],
        ..EnvoyPolicy::default()
    }
}

fn rules(policy: EnvoyPolicy) -> EnvoyRules {
    EnvoyRules {
        policies: [("p".to_owned(), policy)].into(),
        ..EnvoyRules::default()
    }
}

/// What becomes of rules in a layer: done, refused, or malformed.
fn outcome(rules: EnvoyRules, layer: Layer) -> Result<&'static str, String> {
    let mut notes = Notes::of("x");
    match both(Some(rules), None, "", layer, &mut notes) {
        Err(error) => Err(error.to_string()),
        Ok(_) if notes.refusal().is_some() => Ok("refused"),
        Ok(_) => Ok("done"),
    }
}

fn of_permission(rule: Rule, layer: Layer) -> Result<&'static str, String> {
    outcome(rules(policy(rule, Identifier::Any(true))), layer)
}

fn of_principal(identifier: Identifier, layer: Layer) -> Result<&'static str, String> {
    outcome(rules(policy(Rule::Any(true), identifier)), layer)
}

#[test]
fn each_kind_of_permission_is_done_or_refused() {
    let url = |path| {
        Rule::UrlPath(PathMatcher {
            rule: Some(path_matcher::Rule::Path(path)),
        })
    };
    let from = |source: MetadataSource| {
        Rule::SourcedMetadata(SourcedMetadata {
            metadata_matcher: Some(claim()),
            metadata_source: source.into(),
        })
    };
    let nested = |rule| Rule::NotRule(Box::new(Permission { rule: Some(rule) }));
    for (rule, layer, expected) in [
        (Rule::Any(true), Layer::Network, "done"),
        (Rule::Header(header()), Layer::Http, "done"),
        (Rule::Header(header()), Layer::Tunnel, "done"),
        (url(exact("/a")), Layer::Http, "done"),
        (Rule::UriTemplate(template("/a/*")), Layer::Http, "done"),
        (Rule::DestinationIp(range("10.0.0.0", 8)), Layer::Network, "done"),
        (Rule::DestinationPort(65_535), Layer::Network, "done"),
        (
            Rule::DestinationPortRange(Int32Range { start: 1, end: 65_536 }),
            Layer::Network,
            "done",
        ),
        (Rule::RequestedServerName(exact("a")), Layer::Network, "done"),
        (Rule::Metadata(claim()), Layer::Http, "done"),
        (from(MetadataSource::Dynamic), Layer::Http, "done"),
        (from(MetadataSource::Route), Layer::Http, "refused"),
        (Rule::Matcher(template("/a")), Layer::Http, "refused"),
        (nested(Rule::Matcher(template("/a"))), Layer::Http, "refused"),
    ] {
        assert_eq!(of_permission(rule.clone(), layer).as_deref(), Ok(expected), "{rule:?}");
    }
}

#[test]
fn each_kind_of_principal_is_done_or_refused() {
    let prefix = |text: &str| authenticated(MatchPattern::Prefix(text.into()));
    let mtls = extension(
        "envoy.extensions.rbac.principals.mtls_authenticated.v3.Config",
        &MtlsAuthenticated {
            san_matcher: None,
            any_validated_client_certificate: true,
        },
    );
    for (identifier, layer, expected) in [
        (Identifier::Any(true), Layer::Tunnel, "done"),
        (
            Identifier::Authenticated(principal::Authenticated { principal_name: None }),
            Layer::Tunnel,
            "done",
        ),
        (prefix("spiffe://cluster.local/"), Layer::Tunnel, "done"),
        (prefix("spi"), Layer::Tunnel, "done"),
        (prefix("CN="), Layer::Tunnel, "refused"),
        (
            authenticated(MatchPattern::Exact("client.example.com".into())),
            Layer::Tunnel,
            "refused",
        ),
        (Identifier::Custom(mtls), Layer::Tunnel, "done"),
        (Identifier::Custom(template("/a")), Layer::Http, "refused"),
        (Identifier::SourceIp(range("10.0.0.0", 8)), Layer::Network, "done"),
        (Identifier::DirectRemoteIp(range("fd00::", 8)), Layer::Network, "done"),
        (Identifier::RemoteIp(range("10.0.0.0", 8)), Layer::Http, "done"),
        (Identifier::Header(header()), Layer::Http, "done"),
        (Identifier::Metadata(claim()), Layer::Http, "done"),
        (state("io.istio.peer_principal"), Layer::Http, "done"),
        (state("io.istio.peer_principal"), Layer::Network, "done"),
        // RBAC stands before what fills filter state there.
        (state("io.istio.peer_principal"), Layer::Tunnel, "refused"),
        (state("io.istio.other"), Layer::Http, "refused"),
        (state("tenant"), Layer::Http, "done"),
        (state("tenant"), Layer::Tunnel, "refused"),
        (
            Identifier::OrIds(principal::Set {
                ids: vec![Principal {
                    identifier: Some(state("io.istio.other")),
                }],
            }),
            Layer::Http,
            "refused",
        ),
    ] {
        assert_eq!(
            of_principal(identifier.clone(), layer).as_deref(),
            Ok(expected),
            "{identifier:?}"
        );
    }
}

#[test]
fn what_envoy_rejects_is_malformed_and_says_where() {
    let set = principal::Set { ids: vec![] };
    for (outcome, told) in [
        (
            of_permission(Rule::Any(false), Layer::Http),
            "rules.policies[p].permissions[0].any: may only be true",
        ),
        (
            of_permission(Rule::Header(header()), Layer::Network),
            "permissions[0].header: a TCP connection has no headers",
        ),
        (
            of_permission(Rule::DestinationPort(70_000), Layer::Http),
            "destination_port: 70000 is no port",
        ),
        (
            of_permission(Rule::DestinationPortRange(Int32Range { start: 5, end: 5 }), Layer::Http),
            "5 to 5 is no range of ports",
        ),
        (
            of_permission(Rule::DestinationIp(range("10.0.0", 8)), Layer::Http),
            "destination_ip: `10.0.0` is no IP address",
        ),
        (
            of_permission(Rule::UriTemplate(template("/**/*")), Layer::Http),
            "after `**` only text may follow",
        ),
        (
            of_principal(Identifier::RemoteIp(range("10.0.0.0", 40)), Layer::Http),
            "40 is too long for 10.0.0.0",
        ),
        (
            of_principal(Identifier::AndIds(set), Layer::Http),
            "principals[0].and_ids: is empty",
        ),
        (
            outcome(rules(EnvoyPolicy::default()), Layer::Http),
            "rules.policies[p].permissions: is empty",
        ),
        (
            outcome(
                EnvoyRules {
                    action: 9,
                    ..EnvoyRules::default()
                },
                Layer::Http,
            ),
            "rules.action: 9 is not known",
        ),
    ] {
        let error = outcome.unwrap_err();
        assert!(error.contains(told), "{error}\n{told}");
    }
}

fn expression(kind: ExprKind) -> Expr {
    Expr {
        id: 0,
        expr_kind: Some(kind),
    }
}

fn truth(value: bool) -> Expr {
    expression(ExprKind::ConstExpr(Constant {
        constant_kind: Some(ConstantKind::BoolValue(value)),
    }))
}

/// `xds.node`
fn unknown() -> Expr {
    let name = "xds".into();
    expression(ExprKind::SelectExpr(Box::new(Select {
        operand: Some(Box::new(expression(ExprKind::IdentExpr(Ident { name })))),
        field: "node".into(),
        test_only: false,
    })))
}

fn with_condition(condition: Expr) -> EnvoyPolicy {
    EnvoyPolicy {
        condition: Some(condition),
        ..policy(Rule::Any(true), Identifier::Any(true))
    }
}

#[test]
fn a_condition_decides_where_there_is_a_record() {
    let checked = |value: bool, other: Option<Expr>| EnvoyPolicy {
        condition: other,
        checked_condition: Some(CheckedExpr {
            expr: Some(truth(value)),
            ..CheckedExpr::default()
        }),
        ..policy(Rule::Any(true), Identifier::Any(true))
    };
    let exchange = exchange("10.96.1.10:80", CLIENT);
    for (policy, allowed) in [
        (with_condition(truth(true)), true),
        (with_condition(truth(false)), false),
        (checked(true, None), true),
        (checked(false, None), false),
        // Envoy asks only the other one where there are both.
        (checked(false, Some(truth(true))), true),
    ] {
        let mut notes = Notes::of("x");
        let rbac = both(Some(rules(policy)), None, "", Layer::Http, &mut notes).unwrap();
        assert_eq!(rbac.decide(&Facts::inside(&exchange)).denied().is_none(), allowed);
        assert!(notes.into_list().is_empty());
    }
    assert_eq!(
        outcome(rules(with_condition(truth(true))), Layer::Tunnel).as_deref(),
        Ok("refused")
    );
    assert_eq!(
        outcome(rules(with_condition(truth(true))), Layer::Network).as_deref(),
        Ok("done")
    );
    assert_eq!(
        outcome(rules(with_condition(unknown())), Layer::Http).as_deref(),
        Ok("refused")
    );
    let error = outcome(rules(with_condition(Expr::default())), Layer::Http).unwrap_err();
    assert_eq!(
        error,
        "rules.policies[p].condition: the expression means nothing: a part of it is empty"
    );
}

#[test]
fn presence_decides_and_what_cannot_be_evaluated_refuses() {
    let with_condition = with_condition(unknown());
    for (enforced, shadow, prefix, refuses, listed) in [
        (None, None, "", false, 0),
        (Some(EnvoyRules::default()), None, "", false, 0),
        (None, Some(EnvoyRules::default()), "istio_dry_run_allow_", false, 1),
        // A dry run that cannot be evaluated stops nobody; the question to an authorizer does.
        (None, Some(rules(with_condition.clone())), "istio_dry_run_deny_", false, 1),
        (None, Some(rules(with_condition)), EXTERNAL, true, 1),
    ] {
        let mut notes = Notes::of("x");
        let filter = HttpRbac {
            rules: enforced.clone(),
            shadow_rules: shadow.clone(),
            shadow_rules_stat_prefix: prefix.into(),
            ..HttpRbac::default()
        };
        let rbac = http(filter, &mut notes).unwrap();
        assert_eq!(rbac.rules.is_some(), enforced.is_some());
        assert_eq!(notes.refusal().is_some(), refuses, "{shadow:?} {prefix}");
        assert_eq!(notes.into_list().len(), listed, "{shadow:?} {prefix}");
    }
    let mut notes = Notes::of("x");
    let filter = NetworkRbac {
        matcher: Some(Default::default()),
        ..NetworkRbac::default()
    };
    network(filter, &mut notes).unwrap();
    assert!(notes.refusal().is_some());
}

fn captured(scenario: &str) -> Arc<Snapshot> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance/fixtures/xds/istio-1.31.0-20260827");
    let workloads = Arc::new(Workloads::new(""));
    let published = Arc::new(ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
    let mut compiler = Compiler::new(workloads, published.clone(), None);
    for answer in load(&path.join(scenario)).unwrap() {
        compiler.apply(&answer.type_url, answer.resources, answer.removed);
    }
    published.load_full()
}

fn exchange(authority: &str, peer: &str) -> Exchange {
    let address: SocketAddr = authority.parse().unwrap();
    let connection = Connection {
        id: 1,
        authority: authority.into(),
        local_address: Some(address),
        service_port: address.port(),
        remote_address: "10.244.0.200:41000".parse().unwrap(),
        peer: peer.parse().ok(),
        local: None,
        source: None,
        requested_server_name: None,
        opened: clock::now(),
    };
    Exchange::begin(Protocol::Tcp, connection.into(), "chain".into(), 1)
}

fn request(filters: &FilterChain, exchange: &mut Exchange) -> Option<String> {
    match filters.decode_head(&mut Run::default(), exchange, &OnRoute::NONE, &NoServices) {
        Verdict::Continue => None,
        Verdict::Reply(reply) => Some(reply.details.into_owned()),
        other => panic!("{other:?}"),
    }
}

const CLIENT: &str = "spiffe://cluster.local/ns/app/sa/client";

#[test]
fn captured_policies_decide_about_requests_as_envoy_does() {
    let snapshot = captured("20-authz");
    let gateway_deny = "ns[app]-policy[gateway-deny]-rule[0]";
    let other = "spiffe://cluster.local/ns/other/sa/someone";
    let none = Some("none");
    for (to, peer, method, path, field, denied_by) in [
        ("web", CLIENT, "GET", "/healthz", None, None),
        ("web", CLIENT, "GET", "/healthz?x=1", None, None),
        ("web", CLIENT, "GET", "/healthz/", None, none),
        ("web", CLIENT, "GET", "/HEALTHZ", None, none),
        (
            "web",
            "spiffe://cluster.local/ns/clients/sa/runner",
            "GET",
            "/healthz",
            None,
            None,
        ),
        ("web", other, "GET", "/healthz", None, Some(gateway_deny)),
        (
            "web",
            "spiffe://cluster.local/ns/application/sa/someone",
            "GET",
            "/healthz",
            None,
            Some(gateway_deny),
        ),
        ("web", "", "GET", "/healthz", None, Some(gateway_deny)),
        (
            "web",
            CLIENT,
            "TRACE",
            "/healthz",
            None,
            Some("ns[istio-system]-policy[class-deny]-rule[0]"),
        ),
        (
            "web",
            CLIENT,
            "GET",
            "/healthz",
            Some(("x-bad", "anything")),
            Some("ns[app]-policy[web-deny]-rule[2]"),
        ),
        (
            "web",
            CLIENT,
            "GET",
            "/healthz",
            Some(("x-bad", "")),
            Some("ns[app]-policy[web-deny]-rule[2]"),
        ),
        (
            "web",
            CLIENT,
            "PUT",
            "/admin/x",
            None,
            Some("ns[app]-policy[web-deny]-rule[0]"),
        ),
        ("web", CLIENT, "GET", "/admin/x", None, none),
        ("open", CLIENT, "GET", "/healthz", None, none),
    ] {
        let chain = snapshot
            .chains
            .get(&format!("inbound-vip|80|http|{to}.app.svc.cluster.local"))
            .unwrap();
        let ChainKind::Http(http) = &chain.kind else {
            panic!("{}", chain.name)
        };
        assert!(chain.refuse.is_none());
        let mut exchange = exchange("10.96.1.10:80", peer);
        let mut headers = HeaderMap::new();
        if let Some((name, value)) = field {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        exchange.request = Some(RequestHead {
            method: Method::from_bytes(method.as_bytes()).unwrap(),
            path: PathAndQuery::from_static(path),
            authority: HeaderValue::from_static("web.app.svc.cluster.local"),
            scheme: Scheme::Http,
            headers,
        });
        let details = denied_by.map(|policy| format!("rbac_access_denied_matched_policy[{policy}]"));
        assert_eq!(
            request(&http.filters, &mut exchange),
            details,
            "{to} {peer} {method} {path} {field:?}"
        );
    }
}

#[test]
fn captured_policies_decide_about_connections() {
    // A DENY on paths alone denies a TCP port, as istiod leaves the paths out (contract xds §6.5).
    let denied = |scenario: &str, chain: &str, authority: &str| {
        let snapshot = captured(scenario);
        let chain = snapshot.chains.get(chain).unwrap();
        assert!(chain.refuse.is_none());
        let ChainKind::Tcp(tcp) = &chain.kind else {
            panic!("{}", chain.name)
        };
        let decided = tcp.rbac.check(&mut exchange(authority, CLIENT));
        decided.err().map(|denied: Denied| denied.details())
    };
    let web = "inbound-vip|9000|tcp|web.app.svc.cluster.local";
    for (scenario, chain, authority, policy) in [
        ("20-authz", web, "10.96.1.10:9000", Some("ns[app]-policy[web-deny]-rule[0]")),
        (
            "07-workload-waypoint",
            "direct-tcp",
            "10.244.0.20:9999",
            Some("ns[app]-policy[batch]-rule[0]"),
        ),
        ("07-workload-waypoint", "direct-tcp", "10.244.0.20:8080", None),
    ] {
        let details = policy.map(|policy| format!("rbac_access_denied_matched_policy[{policy}]"));
        assert_eq!(denied(scenario, chain, authority), details, "{scenario} {authority}");
    }
}

#[test]
fn captured_policies_of_the_waypoint_itself_decide_about_tunnels() {
    let snapshot = captured("29-mesh-options");
    let terminate = snapshot.terminate.as_ref().unwrap();
    assert!(terminate.refuse.is_none());
    let connect = RequestHead {
        method: Method::CONNECT,
        path: PathAndQuery::from_static("/"),
        authority: HeaderValue::from_static("10.96.1.10:80"),
        scheme: Scheme::Http,
        headers: HeaderMap::new(),
    };
    for (peer, allowed) in [
        ("spiffe://mesh.example.org/ns/app/sa/client", true),
        ("spiffe://old.example.org/ns/app/sa/client", true),
        (CLIENT, true),
        ("spiffe://cluster.local/ns/other/sa/someone", false),
        ("spiffe://foreign.example.org/ns/app/sa/client", false),
        ("", false),
    ] {
        let exchange = exchange("10.96.1.10:80", peer);
        let facts = Facts::tunnel(&exchange.connection, &connect, "10.244.0.2:15008".parse().unwrap());
        let decided = terminate.rbac.decide(&facts).map_err(|denied| denied.details());
        let none = "rbac_access_denied_matched_policy[none]".to_owned();
        assert_eq!(decided, if allowed { Ok(()) } else { Err(none) }, "{peer}");
    }
}
