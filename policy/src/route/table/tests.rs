use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};

use cairn_exchange::{DynamicMetadata, RequestHead, Scheme};

use super::{
    Domain, Facts, Found, Fraction, InvalidRouteTable, PathMatch, PathMatcher, Route, RouteAction, RouteMatch, RouteTable,
    VirtualHost, WeightedCluster, without_port,
};
use crate::{
    headers::{HeaderEdit, HeaderEdits},
    matcher::{
        HeaderMatch, HeaderMatcher, HeaderName, MetadataMatcher, QueryMatch, QueryMatcher, Regex, StringMatcher, ValueMatcher,
    },
    route::{Forward, Target},
};

fn head(method: &str, authority: &'static str, path: &str) -> RequestHead {
    RequestHead {
        method: method.parse().unwrap(),
        path: PathAndQuery::try_from(path).unwrap(),
        authority: HeaderValue::from_static(authority),
        scheme: Scheme::Http,
        headers: HeaderMap::new(),
    }
}

fn facts() -> Facts<'static> {
    Facts {
        random: 7,
        metadata: DynamicMetadata::NONE,
    }
}

fn route(name: &str, matches: RouteMatch) -> Arc<Route> {
    let action = RouteAction::Forward(Box::new(Forward::to(Target::Cluster("c".into()))));
    Arc::new(Route {
        name: Some(name.into()),
        ..Route::new(matches, action)
    })
}

fn path(how: PathMatch) -> RouteMatch {
    RouteMatch::path(PathMatcher::new(how, false))
}

fn table(routes: Vec<Arc<Route>>) -> RouteTable {
    RouteTable::new("t", vec![Arc::new(VirtualHost::any("h", routes))]).unwrap()
}

fn name<'a>(found: Option<Found<'a>>) -> Option<&'a str> {
    found.and_then(|found| found.route.name.as_deref())
}

#[test]
fn the_first_route_that_matches_is_taken() {
    let header = |header: &str, value: &str| HeaderMatcher {
        name: HeaderName::parse(header).unwrap(),
        how: HeaderMatch::String(StringMatcher::exact(value)),
        invert: false,
        treat_missing_as_empty: false,
    };
    let query = QueryMatcher {
        name: "q".into(),
        how: QueryMatch::Present,
    };
    let table = table(vec![
        route(
            "post",
            RouteMatch {
                headers: vec![header(":method", "POST")],
                ..path(PathMatch::Prefix("/a".into()))
            },
        ),
        route(
            "canary",
            RouteMatch {
                headers: vec![header("x-canary", "true")],
                ..path(PathMatch::Prefix("/".into()))
            },
        ),
        route(
            "query",
            RouteMatch {
                query: vec![query],
                ..path(PathMatch::Exact("/a".into()))
            },
        ),
        route(
            "grpc",
            RouteMatch {
                grpc: true,
                ..path(PathMatch::Prefix("/".into()))
            },
        ),
        route("exact", path(PathMatch::Exact("/a".into()))),
        route("regex", path(PathMatch::Regex(Regex::new("/v[0-9]+/.*").unwrap()))),
        route("separated", path(PathMatch::SeparatedPrefix("/api".into()))),
        route("connect", path(PathMatch::Connect)),
        route("shadowed", path(PathMatch::Exact("/a".into()))),
    ]);
    for (method, request, fields, expected) in [
        ("GET", "/a", vec![], Some("exact")),
        ("POST", "/a/b", vec![], Some("post")),
        ("POST", "/a", vec![("x-canary", "true")], Some("post")),
        ("GET", "/a", vec![("x-canary", "true")], Some("canary")),
        ("GET", "/a?q=1", vec![], Some("query")),
        ("GET", "/a?p=1", vec![], Some("exact")),
        ("GET", "/v2/x?y", vec![], Some("regex")),
        ("GET", "/api/x", vec![], Some("separated")),
        ("GET", "/apis", vec![], None),
        ("POST", "/p.S/M", vec![("content-type", "application/grpc")], Some("grpc")),
        ("CONNECT", "/a", vec![], Some("connect")),
    ] {
        let mut head = head(method, "web", request);
        for (name, value) in fields {
            head.headers.insert(name, HeaderValue::from_static(value));
        }
        assert_eq!(name(table.find(&head, facts())), expected, "{method} {request}");
    }
}

#[test]
fn a_connect_matches_no_path() {
    let table = table(vec![route("all", path(PathMatch::Prefix("/".into())))]);
    assert!(table.find(&head("CONNECT", "web:80", "/"), facts()).is_none());
    assert!(table.find(&head("GET", "web:80", "/"), facts()).is_some());
}

#[test]
fn fractions_and_metadata_are_part_of_the_match() {
    let claim = MetadataMatcher {
        filter: "f".into(),
        path: ["group".into()].into(),
        value: ValueMatcher::String(StringMatcher::exact("dev")),
        invert: false,
    };
    let tenth = Fraction {
        numerator: 10,
        denominator: 100,
    };
    let table = table(vec![
        route(
            "tenth",
            RouteMatch {
                fraction: Some(tenth),
                ..path(PathMatch::Prefix("/".into()))
            },
        ),
        route(
            "dev",
            RouteMatch {
                metadata: vec![claim],
                ..path(PathMatch::Prefix("/".into()))
            },
        ),
        route("rest", path(PathMatch::Prefix("/".into()))),
    ]);
    let mut dev = DynamicMetadata::default();
    dev.set("f".into(), "group".into(), std::sync::Arc::new("dev".into()));
    for (random, known, expected) in [
        (9, false, "tenth"),
        (10, false, "rest"),
        (10, true, "dev"),
        (109, true, "tenth"),
    ] {
        let facts = Facts {
            random,
            metadata: if known { &dev } else { DynamicMetadata::NONE },
        };
        assert_eq!(
            name(table.find(&head("GET", "web", "/"), facts)),
            Some(expected),
            "{random} {known}"
        );
    }
}

#[test]
fn the_virtual_host_comes_from_the_authority() {
    let host = |domains: &[&str], name: &str| {
        let routes = vec![route(name, path(PathMatch::Prefix("/".into())))];
        let domains = domains.iter().map(|domain| Domain::parse(domain).unwrap()).collect();
        Arc::new(VirtualHost {
            domains,
            ..VirtualHost::any(name, routes)
        })
    };
    let mut table = RouteTable::new("t", vec![host(&["*.wild.example.com"], "wild"), host(&["a.b"], "exact")]).unwrap();
    for (authority, without, with) in [
        ("x.wild.example.com", Some("wild"), Some("wild")),
        ("x.wild.example.com:80", None, Some("wild")),
        ("a.b:80", None, Some("exact")),
        ("other", None, None),
    ] {
        table.ignore_port_in_authority = false;
        assert_eq!(
            name(table.find(&head("GET", authority, "/"), facts())),
            without,
            "{authority}"
        );
        table.ignore_port_in_authority = true;
        assert_eq!(name(table.find(&head("GET", authority, "/"), facts())), with, "{authority}");
    }
}

#[test]
fn two_hosts_with_one_domain_are_refused() {
    let host = |name: &str| Arc::new(VirtualHost::any(name, vec![]));
    let error = RouteTable::new("t", vec![host("a"), host("b")]).unwrap_err();
    assert_eq!(
        error,
        InvalidRouteTable::DuplicateDomain {
            host: "b".into(),
            domain: Domain::Any
        }
    );
}

#[test]
fn ports_are_taken_off_authorities() {
    for (authority, host) in [
        ("a:80", "a"),
        ("a", "a"),
        ("a:b", "a:b"),
        ("10.0.0.1:80", "10.0.0.1"),
        ("[::1]:80", "[::1]"),
        ("[::1]", "[::1]"),
        ("::1", "::1"),
        ("", ""),
    ] {
        assert_eq!(without_port(authority.as_bytes()), host.as_bytes(), "{authority}");
    }
}

#[test]
fn edits_are_applied_from_the_most_specific_level_up_unless_turned_round() {
    let edits = |value: &str| HeaderEdits::new(vec![HeaderEdit::set("x-level", value).unwrap()], vec![]);
    let route = Route {
        request_edits: edits("route"),
        ..Route::new(
            RouteMatch::path(PathMatcher::any()),
            RouteAction::Forward(Box::new(Forward::to(Target::Cluster("c".into())))),
        )
    };
    let host = VirtualHost {
        request_edits: edits("host"),
        ..VirtualHost::any("h", vec![Arc::new(route)])
    };
    let mut table = RouteTable::new("t", vec![Arc::new(host)]).unwrap();
    table.request_edits = edits("table");
    let cluster = WeightedCluster {
        request_edits: edits("cluster"),
        ..WeightedCluster::new("c", 1)
    };
    for (most_specific_wins, last) in [(false, "table"), (true, "route")] {
        table.most_specific_edits_win = most_specific_wins;
        let head = head(Method::GET.as_str(), "web", "/");
        let found = table.find(&head, facts()).unwrap();
        let levels = found.request_edits(Some(&cluster));
        assert_eq!(levels.len(), 4);
        let mut headers = HeaderMap::new();
        for level in levels {
            assert!(level.apply_literal(&mut headers));
        }
        assert_eq!(headers["x-level"], last);
        assert!(found.response_edits(None).is_empty());
    }
}

#[test]
fn a_filter_is_configured_by_the_most_specific_level() {
    let at = |value: u8| [("f".into(), Arc::new(value) as Arc<dyn std::any::Any + Send + Sync>)].into();
    let forward = RouteAction::Forward(Box::new(Forward::to(Target::Cluster("c".into()))));
    let route = Route {
        overrides: at(2),
        ..Route::new(RouteMatch::path(PathMatcher::any()), forward)
    };
    let host = VirtualHost {
        overrides: at(1),
        ..VirtualHost::any("h", vec![Arc::new(route)])
    };
    let mut table = RouteTable::new("t", vec![Arc::new(host)]).unwrap();
    for (filter, value) in [("f", 0u8), ("t", 9)] {
        table.overrides.insert(filter.into(), Arc::new(value));
    }
    let head = head("GET", "web", "/");
    let found = table.find(&head, facts()).unwrap();
    assert!(found.has_overrides(None));
    let cluster = WeightedCluster {
        overrides: at(3),
        ..WeightedCluster::new("c", 1)
    };
    let plain = WeightedCluster::new("c", 1);
    for (filter, cluster, value) in [
        ("f", Some(&cluster), Some(3)),
        ("f", Some(&plain), Some(2)),
        ("f", None, Some(2)),
        ("g", None, None),
        ("t", None, Some(9)),
    ] {
        let found = found
            .override_levels(cluster)
            .find_map(|level| level.get(filter)?.downcast_ref::<u8>())
            .copied();
        assert_eq!(found, value);
    }
}
