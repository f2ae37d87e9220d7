//! Records of exchanges for the tests of this crate.

use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use cairn_exchange::{ClusterFacts, Connection, Exchange, Protocol, RequestHead, Scheme, Service, Upstream, Workload, clock};
use http::{HeaderMap, HeaderValue, Method, StatusCode};

pub(crate) fn workload(name: &str, namespace: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}-0").into(),
        name: format!("{name}-0").into(),
        namespace: namespace.into(),
        network: "".into(),
        identity: Some(format!("spiffe://cluster.local/ns/{namespace}/sa/{name}").parse().unwrap()),
        service_account: name.into(),
        canonical_name: name.into(),
        canonical_revision: "v2".into(),
        workload_type: "deployment",
        workload_name: format!("{name}-v2").into(),
        cluster: "Kubernetes".into(),
        region: "eu".into(),
        zone: "eu-1".into(),
    })
}

pub(crate) fn connection() -> Connection {
    Connection {
        id: 1,
        authority: "10.96.1.10:80".into(),
        local_address: Some("10.96.1.10:80".parse().unwrap()),
        service_port: 80,
        remote_address: "10.244.0.5:41616".parse().unwrap(),
        peer: Some("spiffe://cluster.local/ns/shop/sa/client".parse().unwrap()),
        local: Some("spiffe://cluster.local/ns/app/sa/waypoint".parse().unwrap()),
        source: Some(workload("client", "elsewhere")),
        requested_server_name: None,
        opened: clock::now(),
    }
}

/// A finished `GET /x` that the destination has answered with 200 after 4 ms, at 2022-04-01T03:23:12.736Z.
pub(crate) fn exchange() -> Exchange {
    let mut exchange = Exchange::begin(Protocol::Http11, Arc::new(connection()), "chain".into(), 1);
    exchange.wall = UNIX_EPOCH + Duration::from_millis(1_648_783_392_736);
    exchange.request = Some(RequestHead {
        method: Method::GET,
        path: "/x".parse().unwrap(),
        authority: HeaderValue::from_static("web"),
        scheme: Scheme::Http,
        headers: HeaderMap::new(),
    });
    exchange.cluster = Some(Arc::new(ClusterFacts {
        name: "inbound-vip|80|http|web.app.svc.cluster.local".into(),
        alt_stat_name: None,
        service: Some(Service {
            host: "web.app.svc.cluster.local".into(),
            name: "web".into(),
            namespace: "app".into(),
        }),
    }));
    exchange.upstream = Some(Upstream {
        display: "envoy://connect_originate/10.244.0.31:8080".into(),
        address: "10.244.0.31:8080".parse().unwrap(),
        workload: Some(workload("web", "app")),
        local_address: None,
    });
    exchange.status = Some(StatusCode::OK);
    exchange.details = Some("via_upstream".into());
    exchange.counts.received_head = 90;
    exchange.counts.received = 10;
    exchange.counts.sent_head = 100;
    exchange.counts.sent = 600;
    exchange.moments.first_upstream_sent = Some(Duration::from_millis(1));
    exchange.moments.last_sent = Some(Duration::from_millis(4));
    exchange
}

pub(crate) fn grpc(mut exchange: Exchange) -> Exchange {
    let head = exchange.request.as_mut().unwrap();
    let grpc = HeaderValue::from_static("application/grpc");
    head.headers.insert(http::header::CONTENT_TYPE, grpc);
    exchange.protocol = Protocol::Http2;
    exchange
}
