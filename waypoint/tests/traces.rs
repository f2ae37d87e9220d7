//! Traces: requests take their context along, and spans reach a collector over the mesh, or are lost without anybody waiting.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    reason = "a test fails by panicking"
)]

mod rig;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_telemetry::{
    export::{Envelope, Limits, Spec},
    trace::{NodeFacts, Propagation, Provider, Tracer},
};
use cairn_waypoint::export::{Destination, Server};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use parking_lot::Mutex;
use rig::{Config, Rig, http_app, send};

const WEB: &str = "10.96.1.10:80";
const COLLECTOR: &str = "outbound|9411||zipkin.observe.svc.cluster.local";
const PARENT: &str = "b7ad6b7169203331";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// What a collector was sent: the request's path and fields, and the body.
type Sent = Arc<Mutex<Vec<(String, HeaderMap, Bytes)>>>;

fn collector(sent: Sent) -> rig::App {
    http_app(move |request| {
        let sent = sent.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            sent.lock().push((parts.uri.to_string(), parts.headers, body));
            let mut answer = Response::new(Full::default());
            *answer.status_mut() = StatusCode::ACCEPTED;
            answer
        }
    })
}

fn zipkin(rig: &Rig, limits: Limits) -> Box<Tracer> {
    let destination = Destination::Http(Box::new(Server {
        cluster: COLLECTOR.into(),
        authority: HeaderValue::from_static("zipkin.observe.svc.cluster.local"),
        path: "/api/v2/spans".parse().unwrap(),
        headers: HeaderMap::from_iter([(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]),
        timeout: Duration::from_secs(5),
    }));
    let exporter = rig.engine.sources.exports.open(Spec {
        name: destination.cluster().clone(),
        destination,
        envelope: Envelope::Json,
        kind: "traces",
        limits,
    });
    Box::new(Tracer {
        provider: Provider::Zipkin {
            exporter,
            propagation: Propagation {
                wide: true,
                ..Propagation::default()
            },
        },
        tags: Box::default(),
        operation: None,
        upstream_operation: None,
        max_path: 256,
        verbose: false,
        upstream_spans: false,
        propagate: true,
    })
}

fn request() -> Request<Full<Bytes>> {
    let request = Request::get("/a?b").header("host", "web").header("x-b3-traceid", TRACE);
    let request = request.header("x-b3-spanid", PARENT).header("x-b3-sampled", "1");
    request.body(Full::default()).unwrap()
}

#[tokio::test]
async fn a_span_reaches_its_collector_and_the_next_hop_is_its_child() {
    let rig = Rig::start_with(|settings| {
        settings.node = NodeFacts {
            cluster: "waypoint.app".into(),
            ..NodeFacts::default()
        };
    })
    .await;
    let web = rig
        .pod(
            10,
            http_app(|request| async move {
                let field = |name| request.headers().get(name).map_or("-", |value| value.to_str().unwrap());
                let ids = ["x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled"].map(field);
                Response::new(Full::from(ids.join(" ")))
            }),
        )
        .await;
    let sent = Sent::default();
    let zipkin_pod = rig.pod(11, collector(sent.clone())).await;
    let tracer = zipkin(&rig, Limits::default());
    let config = Config::default()
        .http_with(WEB, &[web.address], |chain| chain.tracer = Some(tracer), |_| {})
        .cluster(COLLECTOR, &[zipkin_pod.address]);
    rig.serve(config).await;
    let mut client = rig.http1(WEB).await;
    let (status, _, body) = send(&mut client, request()).await;
    assert_eq!(status, StatusCode::OK);
    let body = String::from_utf8(body.to_vec()).unwrap();
    let [trace, span, parent, sampled] = body.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{body}")
    };
    assert_eq!((trace, parent, sampled), (TRACE, PARENT, "1"));
    rig.told(1).await;
    assert!(rig.engine.sources.exports.flush(Duration::from_secs(10)).await);
    let sent = sent.lock();
    let [(path, headers, message)] = &sent[..] else {
        panic!("{sent:?}")
    };
    assert_eq!(
        (path.as_str(), headers["content-type"].to_str().unwrap()),
        ("/api/v2/spans", "application/json")
    );
    assert_eq!(headers["host"], "zipkin.observe.svc.cluster.local");
    let spans: serde_json::Value = serde_json::from_slice(message).unwrap();
    let told = &spans[0];
    assert_eq!(
        (&told["traceId"], &told["id"], &told["parentId"]),
        (&TRACE.into(), &span.into(), &PARENT.into())
    );
    assert_eq!(told["tags"]["http.url"], "http://web/a?b");
    assert_eq!(told["localEndpoint"]["serviceName"], "waypoint.app");
}

#[tokio::test]
async fn a_collector_that_does_not_answer_keeps_no_request() {
    let rig = Rig::start().await;
    let web = rig.pod(10, rig::echo_app("web")).await;
    let silent: rig::App = Arc::new(|stream, _| {
        Box::pin(async move {
            let _open = stream;
            std::future::pending().await
        })
    });
    let silent = rig.pod(11, silent).await;
    let few = Limits {
        queue: 8,
        batch: 4,
        ..Limits::default()
    };
    let tracer = zipkin(&rig, few);
    let config = Config::default()
        .http_with(WEB, &[web.address], |chain| chain.tracer = Some(tracer), |_| {})
        .cluster(COLLECTOR, &[silent.address]);
    rig.serve(config).await;
    let mut client = rig.http1(WEB).await;
    for _ in 0..100 {
        let (status, ..) = send(&mut client, request()).await;
        assert_eq!(status, StatusCode::OK);
    }
    let scrape = rig.engine.registry.render(cairn_telemetry::prometheus::Format::Text);
    let scrape = String::from_utf8(scrape).unwrap();
    let dropped = scrape
        .lines()
        .find(|line| line.starts_with("cairn_export_dropped_records_total"))
        .unwrap();
    assert!(
        !dropped.ends_with(" 0"),
        "more spans than find room are dropped, and counted: {dropped}"
    );
}
