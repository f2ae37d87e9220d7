//! Trees of matchers from messages: what they decide, what refuses, what is malformed.

use cairn_exchange::{Exchange, RequestHead, Scheme};
use cairn_policy::rbac::Facts;
use cairn_proto::{
    cel::expr as newer,
    envoy::{
        config::rbac::v3::{Action as EnvoyVerdict, rbac::Action as EnvoyAction},
        extensions::matching::common_inputs::network::v3::{
            ApplicationProtocolInput, DestinationPortInput, DirectSourceIpInput, FilterStateInput,
        },
        r#type::matcher::v3::HttpRequestHeaderMatchInput,
    },
    xds::{
        core::v3::{CidrRange, TypedExtensionConfig},
        r#type::{
            matcher::v3::{
                CelMatcher, HttpAttributesCelMatchInput, IpMatcher, StringMatcher,
                ip_matcher::IpRangeMatcher,
                matcher::{
                    MatcherList, MatcherTree, MatcherType, OnMatch,
                    matcher_list::{
                        FieldMatcher, Predicate,
                        predicate::{MatchType, SinglePredicate, single_predicate},
                    },
                    matcher_tree::{MatchMap, TreeType},
                    on_match,
                },
                string_matcher::MatchPattern,
            },
            v3::CelExpression,
        },
    },
};

use http::{HeaderName, HeaderValue, Method, uri::PathAndQuery};

use super::{
    tests::{CLIENT, any, exchange},
    *,
};

fn extension(type_name: &str, message: &impl prost::Message) -> TypedExtensionConfig {
    TypedExtensionConfig {
        name: "x".into(),
        typed_config: Some(any(type_name, message)),
    }
}

fn network_input(name: &str, message: &impl prost::Message) -> TypedExtensionConfig {
    extension(&format!("envoy.extensions.matching.common_inputs.network.v3.{name}"), message)
}

fn header(name: &str) -> TypedExtensionConfig {
    let header_name = name.into();
    extension(
        "envoy.type.matcher.v3.HttpRequestHeaderMatchInput",
        &HttpRequestHeaderMatchInput { header_name },
    )
}

fn verdict(name: &str, action: EnvoyAction) -> OnMatch {
    let verdict = EnvoyVerdict {
        name: name.into(),
        action: action.into(),
    };
    OnMatch {
        keep_matching: false,
        on_match: Some(on_match::OnMatch::Action(extension("envoy.config.rbac.v3.Action", &verdict))),
    }
}

fn further(matcher: Matcher) -> OnMatch {
    OnMatch {
        keep_matching: false,
        on_match: Some(on_match::OnMatch::Matcher(Box::new(matcher))),
    }
}

fn tree(input: TypedExtensionConfig, tree_type: TreeType) -> Matcher {
    Matcher {
        on_no_match: None,
        matcher_type: Some(MatcherType::MatcherTree(MatcherTree {
            input: Some(input),
            tree_type: Some(tree_type),
        })),
    }
}

fn exact(input: TypedExtensionConfig, map: &[(&str, OnMatch)]) -> Matcher {
    let map = map.iter().map(|(key, next)| ((*key).to_owned(), next.clone())).collect();
    tree(input, TreeType::ExactMatchMap(MatchMap { map }))
}

fn predicate(input: TypedExtensionConfig, matcher: single_predicate::Matcher) -> Predicate {
    Predicate {
        match_type: Some(MatchType::SinglePredicate(SinglePredicate {
            input: Some(input),
            matcher: Some(matcher),
        })),
    }
}

fn starts(text: &str) -> single_predicate::Matcher {
    single_predicate::Matcher::ValueMatch(StringMatcher {
        ignore_case: false,
        match_pattern: Some(MatchPattern::Prefix(text.into())),
    })
}

fn attributes() -> TypedExtensionConfig {
    extension(
        "xds.type.matcher.v3.HttpAttributesCelMatchInput",
        &HttpAttributesCelMatchInput {},
    )
}

fn expression(expression: CelExpression) -> single_predicate::Matcher {
    let matcher = CelMatcher {
        expr_match: Some(expression),
        description: String::new(),
    };
    single_predicate::Matcher::CustomMatch(extension("xds.type.matcher.v3.CelMatcher", &matcher))
}

fn as_text(text: &str) -> single_predicate::Matcher {
    expression(CelExpression {
        cel_expr_string: text.into(),
        ..CelExpression::default()
    })
}

fn list(entries: Vec<(Predicate, OnMatch)>, otherwise: Option<OnMatch>) -> Matcher {
    let matchers = entries.into_iter().map(|(predicate, on_match)| FieldMatcher {
        predicate: Some(predicate),
        on_match: Some(on_match),
    });
    Matcher {
        on_no_match: otherwise.map(Box::new),
        matcher_type: Some(MatcherType::MatcherList(MatcherList {
            matchers: matchers.collect(),
        })),
    }
}

fn compiled(matcher: Matcher, layer: Layer) -> Result<(Rbac, Notes), String> {
    let mut notes = Notes::of("x");
    let filter = HttpRbac {
        matcher: Some(matcher),
        ..HttpRbac::default()
    };
    let rbac = of_requests(filter, layer, &mut notes).map_err(|error| error.to_string())?;
    Ok((rbac, notes))
}

#[test]
fn a_tree_of_every_kind_decides() {
    let inside = IpMatcher {
        range_matchers: vec![IpRangeMatcher {
            ranges: vec![CidrRange {
                address_prefix: "10.244.0.0".into(),
                prefix_len: Some(16),
            }],
            on_match: Some(verdict("inside", EnvoyAction::Allow)),
            exclusive: false,
        }],
    };
    let by_range = tree(
        network_input("DirectSourceIPInput", &DirectSourceIpInput {}),
        TreeType::CustomMatch(extension("xds.type.matcher.v3.IPMatcher", &inside)),
    );
    let by_path = tree(
        header(":path"),
        TreeType::PrefixMatchMap(MatchMap {
            map: [
                ("/admin".to_owned(), verdict("admin", EnvoyAction::Deny)),
                ("/".to_owned(), further(by_range)),
            ]
            .into(),
        }),
    );
    // `true`, in the newer message.
    let truth = newer::Expr {
        id: 1,
        expr_kind: Some(newer::expr::ExprKind::ConstExpr(newer::Constant {
            constant_kind: Some(newer::constant::ConstantKind::BoolValue(true)),
        })),
    };
    let always = expression(CelExpression {
        cel_expr_parsed: Some(newer::ParsedExpr {
            expr: Some(truth),
            source_info: None,
        }),
        ..CelExpression::default()
    });
    let key = FilterStateInput {
        key: "io.istio.peer_principal".into(),
        field: String::new(),
    };
    let root = list(
        vec![
            (
                predicate(attributes(), as_text("request.headers['x-tenant'] == 'gold'")),
                verdict("gold", EnvoyAction::Log),
            ),
            (
                predicate(network_input("FilterStateInput", &key), starts("spiffe://other/")),
                verdict("other", EnvoyAction::Deny),
            ),
            (
                predicate(attributes(), always),
                further(exact(
                    network_input("DestinationPortInput", &DestinationPortInput {}),
                    &[("80", further(by_path))],
                )),
            ),
        ],
        None,
    );
    let (rbac, notes) = compiled(root, Layer::Http).unwrap();
    assert!(notes.into_list().is_empty());
    for (authority, path, tenant, peer, allowed, name) in [
        ("10.96.1.10:80", "/a", None, CLIENT, true, Some("inside")),
        ("10.96.1.10:80", "/admin/x", None, CLIENT, false, Some("admin")),
        ("10.96.1.10:80", "/admin/x", Some("gold"), CLIENT, true, Some("gold")),
        (
            "10.96.1.10:80",
            "/a",
            None,
            "spiffe://other/ns/app/sa/x",
            false,
            Some("other"),
        ),
        ("10.96.1.10:81", "/a", None, CLIENT, false, None),
    ] {
        let mut exchange = exchange(authority, peer);
        request_of(&mut exchange, path, tenant);
        let decision = rbac.decide(&Facts::inside(&exchange)).enforced.unwrap();
        assert_eq!(
            (decision.allowed, decision.policy.map(|name| &**name)),
            (allowed, name),
            "{authority} {path}"
        );
    }
}

fn request_of(exchange: &mut Exchange, path: &'static str, tenant: Option<&'static str>) {
    let fields = tenant.map(|tenant| (HeaderName::from_static("x-tenant"), HeaderValue::from_static(tenant)));
    exchange.request = Some(RequestHead {
        method: Method::GET,
        path: PathAndQuery::from_static(path),
        authority: HeaderValue::from_static("web"),
        scheme: Scheme::Http,
        headers: fields.into_iter().collect(),
    });
}

#[test]
fn what_a_tree_cannot_ask_refuses_and_what_leads_nowhere_is_malformed() {
    let allow = || verdict("a", EnvoyAction::Allow);
    let unknown = network_input("ApplicationProtocolInput", &ApplicationProtocolInput {});
    let kept = OnMatch {
        keep_matching: true,
        ..allow()
    };
    let of = |matcher| list(vec![(predicate(attributes(), matcher), allow())], None);
    for (matcher, layer, told) in [
        (exact(unknown, &[("a", allow())]), Layer::Http, "is not supported"),
        (
            exact(header("x"), &[("a", kept)]),
            Layer::Http,
            "keep_matching: is not supported",
        ),
        (
            of(as_text("xds.node.id == 'a'")),
            Layer::Http,
            "asks for xds.node, which is not known here",
        ),
        (of(as_text("true")), Layer::Tunnel, "matcher x is not supported here"),
    ] {
        let (_, notes) = compiled(matcher, layer).unwrap();
        let refusal = notes.refusal().unwrap();
        assert!(refusal.contains(told) && refusal.starts_with("matcher."), "{refusal}\n{told}");
    }
    for (matcher, layer, told) in [
        (Matcher::default(), Layer::Http, "matcher: has neither a list nor a tree"),
        (exact(header("x"), &[]), Layer::Http, "exact_match_map: is empty"),
        (exact(header("x y"), &[("a", allow())]), Layer::Http, "`x y` is no header"),
        (
            exact(header("x"), &[("a", allow())]),
            Layer::Network,
            "a TCP connection has no headers",
        ),
        (
            exact(header("x"), &[("a", OnMatch::default())]),
            Layer::Http,
            "map[a]: leads nowhere",
        ),
        (
            of(as_text("1 +")),
            Layer::Http,
            "custom_match: the expression means nothing: at byte 3: an expression is missing",
        ),
        (
            of(expression(CelExpression::default())),
            Layer::Http,
            "the expression means nothing: at byte 0",
        ),
    ] {
        let error = compiled(matcher, layer).err().unwrap();
        assert!(error.contains(told), "{error}\n{told}");
    }
}
