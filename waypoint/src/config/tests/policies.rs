//! Policies that mean nothing: the chain that was there stays, and istiod is told which policy, which rule and what of it.

use cairn_proto::{
    envoy::{
        config::{
            core::v3::{CidrRange, TypedExtensionConfig},
            rbac::v3::{
                Permission, Policy, Principal, Rbac as Rules,
                permission::Rule,
                principal::{Authenticated, Identifier},
            },
            route::v3::{HeaderMatcher, header_matcher::HeaderMatchSpecifier},
        },
        extensions::{
            filters::{
                http::rbac::v3::Rbac,
                network::http_connection_manager::v3::{HttpFilter, http_filter},
            },
            path::r#match::uri_template::v3::UriTemplateMatchConfig,
        },
        r#type::matcher::v3::{PathMatcher, RegexMatcher, StringMatcher, path_matcher, string_matcher::MatchPattern},
    },
    google::api::expr::v1alpha1::{
        Expr,
        expr::{Call, ExprKind},
    },
};

use super::*;

fn any(type_name: &str, message: &impl prost::Message) -> prost_types::Any {
    prost_types::Any {
        type_url: format!("type.googleapis.com/{type_name}"),
        value: message.encode_to_vec(),
    }
}

/// What istiod sends, with a policy before the service `web`.
fn with_policy(answers: &[Answer], policy: Policy) -> Answer {
    let rbac = Rbac {
        rules: Some(Rules {
            policies: [("ns[app]-policy[mine]-rule[0]".to_owned(), policy)].into(),
            ..Rules::default()
        }),
        ..Rbac::default()
    };
    let filter = HttpFilter {
        name: "envoy.filters.http.rbac".into(),
        config_type: Some(http_filter::ConfigType::TypedConfig(any(
            "envoy.extensions.filters.http.rbac.v3.RBAC",
            &rbac,
        ))),
        ..HttpFilter::default()
    };
    let mut listeners = of(answers, LISTENERS).clone();
    edit_listener(&mut listeners, "main_internal", |listener| {
        edit_manager(chain_mut(listener, WEB), |manager| manager.http_filters.insert(0, filter));
    });
    listeners
}

fn policy(rule: Rule, identifier: Identifier) -> Policy {
    Policy {
        permissions: vec![Permission { rule: Some(rule) }],
        principals: vec![Principal {
            identifier: Some(identifier),
        }],
        ..Policy::default()
    }
}

fn regex(regex: &str) -> StringMatcher {
    StringMatcher {
        ignore_case: false,
        match_pattern: Some(MatchPattern::SafeRegex(RegexMatcher {
            regex: regex.into(),
            ..RegexMatcher::default()
        })),
    }
}

fn range(address_prefix: &str, prefix_len: u32) -> CidrRange {
    CidrRange {
        address_prefix: address_prefix.into(),
        prefix_len: Some(prefix_len),
    }
}

#[test]
fn a_policy_that_means_nothing_keeps_the_chain_and_is_told_with_its_place_and_value() {
    let everybody = || Identifier::Any(true);
    let path = |matcher| {
        Rule::UrlPath(PathMatcher {
            rule: Some(path_matcher::Rule::Path(matcher)),
        })
    };
    let path_template = UriTemplateMatchConfig {
        path_template: "/a/**/*".into(),
    };
    let template = TypedExtensionConfig {
        name: "t".into(),
        typed_config: Some(any(
            "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
            &path_template,
        )),
    };
    let header = HeaderMatcher {
        name: "x-a".into(),
        header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(regex("[a"))),
        ..HeaderMatcher::default()
    };
    let who = Identifier::Authenticated(Authenticated {
        principal_name: Some(regex("spiffe://(")),
    });
    let unknown = Expr {
        id: 1,
        expr_kind: Some(ExprKind::CallExpr(Box::new(Call {
            function: "mystery".into(),
            ..Call::default()
        }))),
    };
    let with_condition = Policy {
        condition: Some(unknown),
        ..policy(Rule::Any(true), everybody())
    };
    let answers = capture("01-http-basic");
    let good = with_policy(&answers, policy(path(regex("/a.*")), everybody()));
    let mut bench = Bench::with(&answers);
    assert_eq!(bench.apply(&good).nack(), None);
    let before = bench.snapshot();
    for (policy, place, value) in [
        (
            policy(Rule::DestinationIp(range("10.0.0.300", 8)), everybody()),
            "permissions[0].destination_ip",
            "`10.0.0.300` is no IP address",
        ),
        (
            policy(Rule::Any(true), Identifier::RemoteIp(range("10.0.0.0", 33))),
            "principals[0].remote_ip",
            "33 is too long for 10.0.0.0",
        ),
        (
            policy(path(regex("/a(")), everybody()),
            "permissions[0].url_path.path",
            "the regular expression `/a(` is malformed",
        ),
        (
            policy(Rule::Header(header), everybody()),
            "permissions[0].header",
            "the regular expression `[a` is malformed",
        ),
        (
            policy(Rule::Any(true), who),
            "principals[0].authenticated.principal_name",
            "the regular expression `spiffe://(` is malformed",
        ),
        (
            policy(Rule::UriTemplate(template), everybody()),
            "permissions[0].uri_template",
            "`/a/**/*` is no template of paths",
        ),
        (
            with_condition,
            "condition",
            "there is no function mystery that takes 0 arguments",
        ),
    ] {
        let nack = bench.apply(&with_policy(&answers, policy)).nack().unwrap();
        let place = format!("rules.policies[ns[app]-policy[mine]-rule[0]].{place}");
        assert!(nack.starts_with(&format!("main_internal, chain {WEB}, ")), "{nack}");
        assert!(nack.contains(&place) && nack.contains(value), "{nack}\n{place}: {value}");
        let after = bench.snapshot();
        assert!(
            Arc::ptr_eq(before.chains.get(WEB).unwrap(), after.chains.get(WEB).unwrap()),
            "{nack}"
        );
    }
    assert_eq!(bench.apply(&good).nack(), None);
}
