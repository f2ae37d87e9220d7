//! What happens when a cluster's limits are reached, and how connections are shared out.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    reason = "a test fails by panicking"
)]

mod rig;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cairn_policy::retry::{RetryBudget, RetryOn};
use cairn_waypoint::upstream::{Breakers, ClusterSettings, EndpointSet, Resource, Thresholds, UpstreamProtocol};
use futures_util::future::join_all;
use http::{HeaderMap, Response, StatusCode};
use http_body_util::Full;
use rig::{App, Config, Pod, Rig, default_route, fetch, http_app, mirror, routes, tunnels};
use tokio::{io::AsyncWriteExt as _, sync::Semaphore};

const WEB: &str = "10.96.1.10:80";
const DB: &str = "10.96.1.20:5432";
const CLUSTER: &str = "inbound-vip|80|http|10.96.1.10";

fn limit(settings: &mut ClusterSettings, change: impl FnOnce(&mut Thresholds)) {
    let Breakers { default, .. } = &mut settings.breakers;
    change(default);
}

/// Requests wait inside until the gate lets them.
struct Gate {
    open: Arc<Semaphore>,
    seen: Arc<AtomicU32>,
}

impl Gate {
    fn new() -> Self {
        Self {
            open: Arc::new(Semaphore::new(0)),
            seen: Arc::default(),
        }
    }

    fn app(&self) -> App {
        let (open, seen) = (self.open.clone(), self.seen.clone());
        http_app(move |_| {
            let (open, seen) = (open.clone(), seen.clone());
            async move {
                seen.fetch_add(1, Ordering::SeqCst);
                open.acquire().await.unwrap().forget();
                Response::new(Full::new(Bytes::from_static(b"served")))
            }
        })
    }

    async fn seen(&self, count: u32) {
        for _ in 0..2000 {
            if self.seen.load(Ordering::SeqCst) >= count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} of {count} requests arrived", self.seen.load(Ordering::SeqCst));
    }

    fn let_in(&self, count: usize) {
        self.open.add_permits(count);
    }
}

async fn web(rig: &Rig, pod: &Pod, change: impl FnOnce(&mut ClusterSettings)) {
    rig.serve(Config::default().http_with(WEB, &[pod.address], |_| {}, change))
        .await;
}

/// So many at once, each on a connection of its own.
async fn at_once(rig: &Rig, count: usize) -> Vec<(StatusCode, HeaderMap, Bytes)> {
    let one = async || fetch(&mut rig.http1(WEB).await, "/").await;
    join_all((0..count).map(|_| one())).await
}

#[tokio::test]
async fn requests_wait_for_a_connection_and_what_is_too_much_is_told_so() {
    let rig = Rig::start().await;
    let gate = Gate::new();
    let pod = rig.pod(10, gate.app()).await;
    web(&rig, &pod, |settings| {
        limit(settings, |limits| {
            (limits.max_connections, limits.max_pending_requests) = (1, 2)
        });
    })
    .await;
    // While its connection is made, a request waits as well.
    let mut first = rig.http1(WEB).await;
    let first = tokio::spawn(async move { fetch(&mut first, "/").await });
    gate.seen(1).await;
    let all = at_once(&rig, 5);
    tokio::pin!(all);
    tokio::select! {
        answers = &mut all => panic!("{answers:?}"),
        // One is served, two wait, three are refused.
        _ = rig.told(3) => {}
    }
    gate.let_in(3);
    let mut answers = all.await;
    answers.push(first.await.unwrap());
    let (good, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|(status, _, _)| *status == StatusCode::OK);
    assert_eq!((good.len(), refused.len()), (3, 3));
    assert_eq!(pod.connects.load(Ordering::SeqCst), 1);
    for (status, headers, body) in refused {
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(
            &body[..],
            b"upstream connect error or disconnect/reset before headers. reset reason: overflow"
        );
        assert_eq!(headers["x-envoy-overloaded"], "true");
    }
    let told = rig.told.lock().first().cloned().unwrap();
    assert_eq!(
        (told.flags.as_str(), told.details.as_str(), told.attempts),
        ("UO", "upstream_reset_before_response_started{overflow}", 1)
    );
    rig.settled().await;
}

#[tokio::test]
async fn more_requests_than_the_limit_are_refused_over_both_protocols() {
    for protocol in [UpstreamProtocol::Http1, UpstreamProtocol::Http2] {
        let rig = Rig::start().await;
        let gate = Gate::new();
        let app = match protocol {
            UpstreamProtocol::Http2 => slow_http2(&gate),
            _ => gate.app(),
        };
        let pod = rig.pod(10, app).await;
        web(&rig, &pod, |settings| {
            settings.protocol = protocol;
            limit(settings, |limits| limits.max_requests = 4);
        })
        .await;
        let all = at_once(&rig, 10);
        tokio::pin!(all);
        tokio::select! {
            answers = &mut all => panic!("{answers:?}"),
            _ = rig.told(6) => {}
        }
        gate.seen(4).await;
        gate.let_in(4);
        let good = all.await.iter().filter(|(status, _, _)| *status == StatusCode::OK).count();
        assert_eq!(good, 4, "{protocol:?}");
        if protocol == UpstreamProtocol::Http2 {
            assert_eq!(
                pod.connects.load(Ordering::SeqCst),
                1,
                "all wait for the one connection that is made"
            );
        }
        rig.settled().await;
    }
}

/// HTTP/2 whose answers wait for the gate.
fn slow_http2(gate: &Gate) -> App {
    let (open, seen) = (gate.open.clone(), gate.seen.clone());
    Arc::new(move |stream, _| {
        let (open, seen) = (open.clone(), seen.clone());
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                let (open, seen) = (open.clone(), seen.clone());
                tokio::spawn(async move {
                    seen.fetch_add(1, Ordering::SeqCst);
                    open.acquire().await.unwrap().forget();
                    respond.send_response(Response::new(()), true)
                });
            }
        })
    })
}

#[tokio::test]
async fn streams_of_a_connection_are_limited_and_others_wait() {
    let rig = Rig::start().await;
    let gate = Gate::new();
    let pod = rig.pod(10, slow_http2(&gate)).await;
    web(&rig, &pod, |settings| {
        settings.protocol = UpstreamProtocol::Http2;
        settings.http2_max_concurrent_streams = Some(2);
        limit(settings, |limits| limits.max_connections = 2);
    })
    .await;
    let all = at_once(&rig, 7);
    tokio::pin!(all);
    tokio::select! {
        answers = &mut all => panic!("{answers:?}"),
        () = gate.seen(4) => {}
    }
    assert_eq!(gate.seen.load(Ordering::SeqCst), 4);
    gate.let_in(7);
    let good = all.await.iter().filter(|(status, _, _)| *status == StatusCode::OK).count();
    assert_eq!((good, pod.connects.load(Ordering::SeqCst)), (7, 2));
    rig.settled().await;
}

#[tokio::test]
async fn a_connection_carries_no_more_requests_than_it_may() {
    for protocol in [UpstreamProtocol::Http1, UpstreamProtocol::Http2] {
        let rig = Rig::start().await;
        let gate = Gate::new();
        gate.let_in(9);
        let app = if protocol == UpstreamProtocol::Http2 {
            slow_http2(&gate)
        } else {
            gate.app()
        };
        let pod = rig.pod(10, app).await;
        web(&rig, &pod, |settings| {
            settings.protocol = protocol;
            settings.max_requests_per_connection = Some(3);
            limit(settings, |limits| limits.max_connections = 1);
        })
        .await;
        let mut client = rig.http1(WEB).await;
        for _ in 0..9 {
            assert_eq!(fetch(&mut client, "/").await.0, StatusCode::OK);
            rig.quiet().await;
        }
        assert_eq!(pod.connects.load(Ordering::SeqCst), 3, "{protocol:?}");
    }
}

#[tokio::test]
async fn one_who_waits_and_goes_away_does_not_keep_the_others() {
    let rig = Rig::start().await;
    let gate = Gate::new();
    let pod = rig.pod(10, gate.app()).await;
    web(&rig, &pod, |settings| limit(settings, |limits| limits.max_connections = 1)).await;
    let mut first = rig.http1(WEB).await;
    let first = tokio::spawn(async move { fetch(&mut first, "/").await.0 });
    gate.seen(1).await;
    let mut leaving = rig.http1(WEB).await;
    let leaving = tokio::spawn(async move { fetch(&mut leaving, "/").await });
    while rig.under_way()[3] < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut last = rig.http1(WEB).await;
    let last = tokio::spawn(async move { fetch(&mut last, "/").await.0 });
    while rig.under_way()[3] < 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    leaving.abort();
    gate.let_in(2);
    assert_eq!((first.await.unwrap(), last.await.unwrap()), (StatusCode::OK, StatusCode::OK));
    rig.settled().await;
}

#[tokio::test]
async fn retries_are_limited_and_the_answer_passes_as_it_is() {
    for (round, budget) in [None, Some(RetryBudget { percent: 0.0, least: 0 })].into_iter().enumerate() {
        let rig = Rig::start().await;
        let seen = Arc::new(AtomicU32::new(0));
        let counted = seen.clone();
        let app = http_app(move |_| {
            let counted = counted.clone();
            async move {
                counted.fetch_add(1, Ordering::SeqCst);
                let mut answer = Response::new(Full::new(Bytes::from_static(b"broken")));
                *answer.status_mut() = StatusCode::BAD_GATEWAY;
                answer
            }
        });
        let pod = rig.pod(10, app).await;
        let mut route = default_route(CLUSTER);
        if let cairn_policy::route::RouteAction::Forward(forward) = &mut route.action {
            forward.retry.as_mut().unwrap().on = RetryOn::parse("gateway-error").0;
        }
        let config = Config::default().http_with(
            WEB,
            &[pod.address],
            |http| http.routes = routes(vec![route]),
            |settings| {
                limit(settings, |limits| {
                    limits.max_retries = if budget.is_some() { 100 } else { 0 };
                    limits.retry_budget = budget;
                })
            },
        );
        rig.serve(config).await;
        let (status, headers, body) = fetch(&mut rig.http1(WEB).await, "/").await;
        assert_eq!((status, &body[..]), (StatusCode::BAD_GATEWAY, &b"broken"[..]));
        assert!(!headers.contains_key("x-envoy-overloaded"));
        let told = rig.told(1).await;
        assert_eq!((told.flags.as_str(), told.attempts), ("UO", 1), "round {round}");
        assert_eq!(seen.load(Ordering::SeqCst), 1);
        rig.settled().await;
    }
}

#[tokio::test]
async fn connections_of_bytes_are_limited_too() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    let settings = |settings: &mut ClusterSettings| limit(settings, |limits| limits.max_connections = 1);
    rig.serve(Config::default().tcp_with(DB, tunnels(&[pod.address]), |_| {}, settings))
        .await;
    let mut first = rig.open(DB).await.unwrap();
    assert!(rig.open(DB).await.is_err());
    let told = rig.told(1).await;
    assert_eq!((told.flags.as_str(), told.attempts), ("UO", 0));
    first.stream.shutdown().await.unwrap();
    drop(first);
    rig.settled().await;
    drop(rig.open(DB).await.unwrap());
    rig.settled().await;
}

#[tokio::test]
async fn an_endpoint_that_is_gone_finishes_its_requests_and_loses_its_idle_connections() {
    let rig = Rig::start().await;
    let gate = Gate::new();
    gate.let_in(1);
    let pod = rig.pod(10, gate.app()).await;
    web(&rig, &pod, |_| {}).await;
    let mut client = rig.http1(WEB).await;
    assert_eq!(fetch(&mut client, "/").await.0, StatusCode::OK);
    rig.quiet().await;
    let snapshot = rig.engine.snapshot.load_full();
    let cluster = snapshot.clusters.get(CLUSTER).unwrap();
    let open = || cluster.state.usage.total(Resource::Connection);
    assert_eq!(open(), 1);
    // One is idle, and another request is under way on it.
    let last = tokio::spawn(async move { fetch(&mut client, "/").await.0 });
    gate.seen(2).await;
    let nobody = EndpointSet::new(Vec::new(), cluster.settings.arrangement(None));
    cluster.state.endpoints.store(Arc::new(nobody));
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(open(), 1);
    gate.let_in(1);
    assert_eq!(last.await.unwrap(), StatusCode::OK);
    for _ in 0..2000 {
        if open() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} connections are still open", open());
}
