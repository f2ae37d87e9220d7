use std::sync::Arc;

use cairn_exchange::{Connection, Exchange, Protocol, RequestHead, Scheme, clock, format::Template};
use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};

use super::*;
use crate::{
    matcher::{HeaderMatch, PathMatcher, QueryMatch},
    route::{Forward, Route, RouteAction, RouteMatch, RouteTable, Target, VirtualHost},
};

fn exchange(path: &'static str, fields: &[(&'static str, &'static str)]) -> Exchange {
    let connection = Connection {
        id: 1,
        authority: "10.96.1.10:80".into(),
        local_address: None,
        service_port: 80,
        remote_address: "10.244.3.9:41000".parse().unwrap(),
        peer: None,
        local: None,
        source: None,
        requested_server_name: None,
        opened: clock::now(),
    };
    let mut headers = HeaderMap::new();
    for (name, value) in fields {
        headers.append(*name, HeaderValue::from_static(value));
    }
    let mut exchange = Exchange::begin(Protocol::Http11, Arc::new(connection), "chain".into(), 1);
    exchange.request = Some(RequestHead {
        method: Method::GET,
        path: PathAndQuery::from_static(path),
        authority: HeaderValue::from_static("web"),
        scheme: Scheme::Http,
        headers,
    });
    exchange
}

fn about(exchange: &Exchange) -> About<'_> {
    About {
        exchange,
        source_cluster: "waypoint.app",
        cluster: Some("inbound"),
    }
}

fn text(format: &str, otherwise: &str) -> Value {
    Value {
        format: Template::parse(format).unwrap(),
        otherwise: otherwise.into(),
    }
}

fn present(name: &str) -> HeaderMatcher {
    HeaderMatcher {
        name: HeaderName::parse(name).unwrap(),
        how: HeaderMatch::Present(true),
        invert: false,
        treat_missing_as_empty: false,
    }
}

/// The entries that one action makes of a request, or `None` when it takes the descriptor with it.
fn entries(action: Action, exchange: &Exchange) -> Option<String> {
    let limit = RateLimit {
        actions: vec![action],
        ..RateLimit::default()
    };
    let descriptor = RateLimit::each([&limit], 0, about(exchange)).pop()?;
    let words = descriptor.entries.iter().map(|(key, value)| format!("{key}={value}"));
    Some(words.collect::<Vec<_>>().join(","))
}

#[test]
fn each_action_makes_its_entry_or_takes_the_descriptor_with_it() {
    let key = || Arc::<str>::from("k");
    let header = |name: &str, skip_if_absent| Action::Header {
        name: HeaderName::parse(name).unwrap(),
        key: key(),
        skip_if_absent,
    };
    let query = |name: &str, skip_if_absent| Action::Query {
        name: name.into(),
        key: key(),
        skip_if_absent,
    };
    let matched = |name: &str, expect| Action::HeaderMatch {
        key: key(),
        value: text("special", ""),
        expect,
        headers: vec![present(name)],
    };
    let asked = |name: &str, expect| Action::QueryMatch {
        key: key(),
        value: text("asked", ""),
        expect,
        parameters: vec![QueryMatcher {
            name: name.into(),
            how: QueryMatch::Present,
        }],
    };
    let address = |range: &str, invert| Action::AddressMatch {
        key: key(),
        value: text("near", ""),
        invert,
        ranges: [range.parse().unwrap()].into_iter().collect(),
    };
    let generic = |format: &str, otherwise: &str| Action::Generic {
        key: key(),
        value: text(format, otherwise),
    };
    let metadata = |otherwise: &str, skip_if_absent| Action::Metadata {
        key: key(),
        filter: "f".into(),
        path: ["a".into()].into(),
        otherwise: otherwise.into(),
        skip_if_absent,
    };
    let exchange = exchange("/p?q=1", &[("x-a", "1"), ("x-a", "2")]);
    for (action, made) in [
        (Action::SourceCluster, Some("source_cluster=waypoint.app")),
        (Action::DestinationCluster, Some("destination_cluster=inbound")),
        (header("x-a", false), Some("k=1")),
        (header(":path", false), Some("k=/p?q=1")),
        (header("x-b", false), None),
        (header("x-b", true), Some("")),
        (query("q", false), Some("k=1")),
        (query("r", false), None),
        (query("r", true), Some("")),
        (Action::RemoteAddress, Some("remote_address=10.244.3.9")),
        (
            Action::MaskedRemoteAddress { v4: 16, v6: 64 },
            Some("masked_remote_address=10.244.0.0/16"),
        ),
        (generic("v", ""), Some("k=v")),
        (generic("%REQ(x-a)%", ""), Some("k=1")),
        (generic("%REQ(x-b)%", "other"), Some("k=other")),
        (generic("%REQ(x-b)%", ""), None),
        (matched("x-a", true), Some("k=special")),
        (matched("x-b", true), None),
        (matched("x-b", false), Some("k=special")),
        (asked("q", true), Some("k=asked")),
        (asked("r", true), None),
        (address("10.244.0.0/16", false), Some("k=near")),
        (address("10.244.0.0/16", true), None),
        (metadata("", false), None),
        (metadata("", true), Some("")),
        (metadata("d", false), Some("k=d")),
    ] {
        let what = format!("{action:?}");
        assert_eq!(entries(action, &exchange).as_deref(), made, "{what}");
    }
}

#[test]
fn the_clients_address_is_the_one_that_is_believed() {
    let mut exchange = exchange("/", &[]);
    exchange.client_address = Some("203.0.113.1:0".parse().unwrap());
    assert_eq!(
        entries(Action::RemoteAddress, &exchange).as_deref(),
        Some("remote_address=203.0.113.1")
    );
}

#[test]
fn one_action_without_an_entry_spoils_its_descriptor_alone() {
    let header = |name: &str| Action::Header {
        name: HeaderName::parse(name).unwrap(),
        key: "k".into(),
        skip_if_absent: false,
    };
    let limit = |actions| RateLimit {
        actions,
        ..RateLimit::default()
    };
    let limits = [limit(vec![header("x-a"), header("x-b")]), limit(vec![header("x-a")])];
    let exchange = exchange("/", &[("x-a", "1")]);
    let made = RateLimit::each(&limits, 0, about(&exchange));
    assert_eq!(made.len(), 1);
    assert_eq!(made[0].entries.len(), 1);
    assert!(RateLimit::each(&limits, 1, about(&exchange)).is_empty(), "another stage");
}

#[test]
fn a_request_may_count_more_than_once() {
    let hits = |count| RateLimit {
        actions: vec![Action::RemoteAddress],
        hits: Some(Hits { count, negative: true }),
        ..RateLimit::default()
    };
    let exchange = exchange("/", &[("x-cost", "7")]);
    let cost = |format: &str| hits(Err(Template::parse(format).unwrap()));
    for (limit, counts) in [
        (hits(Ok(3)), Some(3)),
        (cost("%REQ(x-cost)%"), Some(7)),
        (cost("%REQ(x-none)%"), None),
    ] {
        let made = RateLimit::each([&limit], 0, about(&exchange)).pop();
        assert_eq!(made.and_then(|descriptor| descriptor.hits), counts);
    }
}

#[test]
fn limits_of_the_host_count_as_the_route_says() {
    let generic = |value: &str| RateLimit {
        actions: vec![Action::Generic {
            key: "generic_key".into(),
            value: text(value, ""),
        }],
        ..RateLimit::default()
    };
    let exchange = exchange("/", &[]);
    for (own, include_host, option, counted) in [
        (true, false, HostLimits::Override, "route"),
        (false, false, HostLimits::Override, "host"),
        (true, false, HostLimits::Include, "route,host"),
        (true, true, HostLimits::Ignore, "route,host"),
        (false, false, HostLimits::Ignore, ""),
    ] {
        let mut forward = Forward::to(Target::Cluster("c".into()));
        forward.rate_limits = RateLimits {
            own: if own { vec![generic("route")] } else { Vec::new() },
            include_host,
        };
        let route = Route::new(RouteMatch::path(PathMatcher::any()), RouteAction::Forward(Box::new(forward)));
        let host = VirtualHost {
            rate_limits: vec![generic("host")],
            ..VirtualHost::any("h", vec![Arc::new(route)])
        };
        let table = RouteTable::new("t", vec![Arc::new(host)]).unwrap();
        let facts = crate::route::Facts {
            random: 0,
            metadata: cairn_exchange::DynamicMetadata::NONE,
        };
        let found = table.find(exchange.request.as_ref().unwrap(), facts).unwrap();
        let made = describe(found, option, 0, about(&exchange));
        let values: Vec<_> = made.iter().map(|descriptor| descriptor.entries[0].1.as_str()).collect();
        assert_eq!(values.join(","), counted, "{own} {include_host} {option:?}");
    }
}
