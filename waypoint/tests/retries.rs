//! When a request is tried again, where, and when no more.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cairn_policy::{
    retry::RetryOn,
    route::{Forward, Target as RouteTarget},
    timeout::RouteTimeouts,
};
use cairn_waypoint::upstream::{ClusterSettings, UpstreamProtocol};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use rig::{App, Config, Pod, Rig, default_route, echo_app, fetch, http_app, route, routes, send};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const WEB: &str = "10.96.1.10:80";
const CLUSTER: &str = "inbound-vip|80|http|10.96.1.10";
/// The longest body that is kept so that it can be sent again.
const RECORD: usize = 1024 * 1024;

fn post(body: Vec<u8>) -> Request<Full<Bytes>> {
    Request::post("/up")
        .header("host", "web")
        .body(Full::new(body.into()))
        .unwrap()
}

/// A pod that refuses every tunnel.
async fn refusing(rig: &Rig, last: u8) -> Pod {
    rig.pod_that(last, |connect| {
        connect.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new(), "no")
    })
    .await
}

/// A pod that counts requests, and resets each without an answer.
fn resetting() -> App {
    Arc::new(|mut stream, _| {
        Box::pin(async move {
            let _ = stream.read(&mut [0; 4096]).await;
            stream.reset(h2::Reason::INTERNAL_ERROR);
        })
    })
}

/// HTTP/2 that refuses the first `refusals` requests (REFUSED_STREAM) once it has read some of their bodies, and tells the length of
/// the body and the trailers of the others.
fn refusing_streams(refusals: u32, seen: Arc<AtomicU32>) -> App {
    Arc::new(move |stream, _| {
        let seen = seen.clone();
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let number = seen.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let mut length = 0;
                    while let Some(Ok(data)) = body.data().await {
                        length += data.len();
                        body.flow_control().release_capacity(data.len()).unwrap();
                        if number < refusals && length > 0 {
                            respond.send_reset(h2::Reason::REFUSED_STREAM);
                            return;
                        }
                    }
                    let trailers = body.trailers().await.ok().flatten();
                    let sum = trailers
                        .as_ref()
                        .and_then(|trailers| trailers.get("x-sum"))
                        .map_or("-", |sum| sum.to_str().unwrap())
                        .to_owned();
                    let mut send = respond.send_response(Response::new(()), false).unwrap();
                    send.send_data(format!("{length} {sum}").into(), true).unwrap();
                });
            }
        })
    })
}

fn http2(cluster: &mut ClusterSettings) {
    cluster.protocol = UpstreamProtocol::Http2;
}

/// The default route with a limit on the whole exchange, retrying on anything.
fn limited(limit: Duration, change: impl FnOnce(&mut cairn_policy::retry::RetryPolicy)) -> Forward {
    let mut retry = match &default_route(CLUSTER).action {
        cairn_policy::route::RouteAction::Forward(forward) => forward.retry.clone().unwrap(),
        other => panic!("{other:?}"),
    };
    change(&mut retry);
    let timeouts = RouteTimeouts {
        timeout: Some(limit),
        ..RouteTimeouts::default()
    };
    Forward {
        retry: Some(retry),
        timeouts,
        ..Forward::to(RouteTarget::Cluster(CLUSTER.into()))
    }
}

async fn serve(rig: &Rig, endpoints: &[SocketAddr], forward: Forward) {
    rig.serve(Config::default().http_with(WEB, endpoints, |http| http.routes = routes(vec![route("/", forward)]), |_| {}))
        .await;
}

/// A pod that never answers a request.
fn hanging() -> App {
    Arc::new(|mut stream, _| {
        Box::pin(async move {
            let mut buffer = vec![0; 4096];
            while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
        })
    })
}

#[tokio::test]
async fn a_tunnel_that_is_refused_is_tried_elsewhere_and_the_body_arrives_whole() {
    let rig = Rig::start().await;
    let good = rig.pod(10, echo_app("web")).await;
    let bad = [refusing(&rig, 11).await, refusing(&rig, 12).await];
    let nobody = SocketAddr::new(rig.ip(99), 8080);
    // Whatever the route says of retries: nothing was sent.
    for (round, retry) in [true, false].into_iter().enumerate() {
        let config = |endpoints: &[SocketAddr]| {
            let without = Forward {
                retry: None,
                ..limited(Duration::from_secs(10), |_| {})
            };
            let routes = routes(vec![if retry { default_route(CLUSTER) } else { route("/", without) }]);
            Config::default().http_with(WEB, endpoints, |http| http.routes = routes, |_| {})
        };
        let endpoints = [good.address, bad[0].address, nobody];
        if round == 0 {
            rig.serve(config(&endpoints)).await
        } else {
            rig.publish(config(&endpoints))
        }
        let mut client = rig.http1(WEB).await;
        for _ in 0..20 {
            let (status, _, body) = send(&mut client, post(vec![b'x'; 2 * RECORD])).await;
            assert_eq!(
                (status, &body[..]),
                (StatusCode::OK, &b"web /up 2097152"[..]),
                "retry {retry}"
            );
        }
        // No endpoint takes it: each of at most three was asked once.
        rig.publish(config(&[bad[0].address, bad[1].address, nobody]));
        let before = bad[0].connects.load(Ordering::SeqCst) + bad[1].connects.load(Ordering::SeqCst);
        let (status, _, body) = fetch(&mut client, "/").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(
            body.starts_with(b"upstream connect error or disconnect/reset before headers. retried and the latest reset reason: "),
            "{body:?}"
        );
        let asked = bad[0].connects.load(Ordering::SeqCst) + bad[1].connects.load(Ordering::SeqCst) - before;
        let told = rig.told(21 * (round + 1)).await;
        assert_eq!(
            (asked, told.attempts, told.flags.as_str()),
            (2, 3, "UF,URX"),
            "retry {retry}: {told:?}"
        );
    }
    rig.quiet().await;
}

#[tokio::test]
async fn a_pod_that_resets_after_it_has_the_request_is_not_tried_again() {
    let rig = Rig::start().await;
    let (one, two) = (rig.pod(10, resetting()).await, rig.pod(11, resetting()).await);
    rig.serve(Config::default().http(WEB, &[one.address, two.address])).await;
    let (status, _, body) = fetch(&mut rig.http1(WEB).await, "/").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(
        &body[..],
        b"upstream connect error or disconnect/reset before headers. reset reason: connection termination"
    );
    let told = rig.told(1).await;
    assert_eq!((told.flags.as_str(), told.attempts), ("UC", 1));
    assert_eq!(one.connects.load(Ordering::SeqCst) + two.connects.load(Ordering::SeqCst), 1);
    rig.settled().await;
}

#[tokio::test]
async fn a_connection_that_is_closed_before_anything_was_sent_is_tried_elsewhere() {
    let rig = Rig::start().await;
    let good = rig.pod(10, echo_app("web")).await;
    let closing = rig
        .pod(
            11,
            Arc::new(|stream, _| Box::pin(async move { stream.reset(h2::Reason::CANCEL) })),
        )
        .await;
    rig.serve(Config::default().http(WEB, &[good.address, closing.address])).await;
    let mut client = rig.http1(WEB).await;
    let mut good_answers = 0;
    for _ in 0..40 {
        let (status, _, body) = fetch(&mut client, "/").await;
        // The reset may come when the request is on its way already: then nobody can know.
        assert!(
            status == StatusCode::OK || body.ends_with(b"connection termination"),
            "{status} {body:?}"
        );
        good_answers += u32::from(status == StatusCode::OK);
    }
    assert!(
        good_answers >= 20 && closing.connects.load(Ordering::SeqCst) > 0,
        "{good_answers}"
    );
    rig.quiet().await;
}

#[tokio::test]
async fn a_refused_stream_is_sent_again_with_body_and_trailers() {
    let rig = Rig::start().await;
    let seen = Arc::new(AtomicU32::new(0));
    let pod = rig.pod(10, refusing_streams(2, seen.clone())).await;
    rig.serve(Config::default().http_with(WEB, &[pod.address], |_| {}, http2))
        .await;
    for (pieces, piece) in [(3, 1000), (1, 1), (16, RECORD / 16)] {
        seen.store(0, Ordering::SeqCst);
        let mut client = rig.http2(WEB).await.ready().await.unwrap();
        let (answer, mut body) = client
            .send_request(Request::post("http://web/").body(()).unwrap(), false)
            .unwrap();
        let sending = tokio::spawn(async move {
            for _ in 0..pieces {
                let mut data = Bytes::from(vec![b'x'; piece]);
                while !data.is_empty() {
                    body.reserve_capacity(data.len());
                    let room = std::future::poll_fn(|cx| body.poll_capacity(cx)).await.unwrap().unwrap();
                    body.send_data(data.split_to(room.min(data.len())), false).unwrap();
                }
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", HeaderValue::from_static("7"));
            body.send_trailers(trailers).unwrap();
        });
        let answer = answer.await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(
            answer.into_body().data().await.unwrap().unwrap(),
            format!("{} 7", pieces * piece)
        );
        sending.await.unwrap();
        assert_eq!(seen.load(Ordering::SeqCst), 3);
        rig.quiet().await;
    }
}

#[tokio::test]
async fn a_body_that_is_too_long_to_be_kept_is_not_sent_again() {
    let rig = Rig::start().await;
    let seen = Arc::new(AtomicU32::new(0));
    // Refuses only after more than the record has been read.
    let counting = seen.clone();
    let pod = rig
        .pod(
            10,
            Arc::new(move |stream, _| {
                let seen = counting.clone();
                Box::pin(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        seen.fetch_add(1, Ordering::SeqCst);
                        tokio::spawn(async move {
                            let mut body = request.into_body();
                            let mut length = 0;
                            while length <= RECORD + 1000 {
                                let Some(Ok(data)) = body.data().await else { return };
                                length += data.len();
                                body.flow_control().release_capacity(data.len()).unwrap();
                            }
                            respond.send_reset(h2::Reason::REFUSED_STREAM);
                        });
                    }
                })
            }),
        )
        .await;
    rig.serve(Config::default().http_with(WEB, &[pod.address], |_| {}, http2))
        .await;
    let mut client = rig.http1(WEB).await;
    let request = client.send_request(post(vec![b'x'; 4 * RECORD])).await;
    // The answer may come while the body is still being sent, and the connection ends behind it.
    if let Ok(answer) = request {
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
    let told = rig.told(1).await;
    assert_eq!(
        (told.status, told.flags.as_str(), told.attempts),
        (Some(503), "UR", 1),
        "{told:?}"
    );
    assert_eq!(seen.load(Ordering::SeqCst), 1);
    drop(client);
    rig.settled().await;
}

#[tokio::test]
async fn endpoints_that_were_tried_are_avoided() {
    let rig = Rig::start().await;
    let (mut pods, mut requests) = (Vec::new(), Vec::new());
    for last in 10..13 {
        let count = Arc::new(AtomicU32::new(0));
        requests.push(count.clone());
        let app = move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            async { status(StatusCode::BAD_GATEWAY) }
        };
        pods.push(rig.pod(last, http_app(app)).await);
    }
    let addresses: Vec<_> = pods.iter().map(|pod| pod.address).collect();
    serve(
        &rig,
        &addresses,
        limited(Duration::from_secs(10), |retry| retry.on = RetryOn::GATEWAY_ERROR),
    )
    .await;
    let mut client = rig.http1(WEB).await;
    for round in 1..=5 {
        assert_eq!(fetch(&mut client, "/").await.0, StatusCode::BAD_GATEWAY);
        let told = rig.told(round).await;
        assert_eq!((told.attempts, told.details.as_str()), (3, "via_upstream"));
    }
    let requests: Vec<_> = requests.iter().map(|count| count.load(Ordering::SeqCst)).collect();
    assert_eq!(requests, [5; 3], "every request went to each of the three once");
    rig.quiet().await;
}

fn status(status: StatusCode) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::from("sorry"));
    *answer.status_mut() = status;
    answer
}

#[tokio::test]
async fn a_route_timeout_is_a_504_and_the_endpoint_is_told() {
    let rig = Rig::start().await;
    let (tell, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let app: App = Arc::new(move |mut stream, _| {
        let tell = tell.clone();
        Box::pin(async move {
            let end = stream.read_to_end(&mut Vec::new()).await;
            tell.send(end.is_err()).unwrap();
        })
    });
    let pod = rig.pod(10, app).await;
    serve(&rig, &[pod.address], limited(Duration::from_millis(300), |_| {})).await;
    let since = tokio::time::Instant::now();
    let (status, _, body) = fetch(&mut rig.http1(WEB).await, "/").await;
    assert_eq!(
        (status, &body[..]),
        (StatusCode::GATEWAY_TIMEOUT, &b"upstream request timeout"[..])
    );
    assert!(
        (Duration::from_millis(300)..Duration::from_secs(3)).contains(&since.elapsed()),
        "{:?}",
        since.elapsed()
    );
    let told = rig.told(1).await;
    assert_eq!((told.flags.as_str(), told.details.as_str()), ("UT", "response_timeout"));
    tokio::time::timeout(Duration::from_secs(5), ends.recv())
        .await
        .expect("the endpoint is told that nobody waits");
    rig.settled().await;
}

#[tokio::test]
async fn a_request_whose_body_stops_has_no_route_timeout_yet_and_leaves_nothing_when_it_is_idle() {
    let rig = Rig::start().await;
    let pods = [
        rig.pod(10, hanging()).await,
        rig.pod(11, refusing_streams(9, Arc::default())).await,
    ];
    for (round, pod) in pods.iter().enumerate() {
        let forward = limited(Duration::from_millis(300), |retry| retry.on = RetryOn::NONE);
        let settings = move |cluster: &mut ClusterSettings| {
            cluster.protocol = if round == 0 {
                UpstreamProtocol::Http1
            } else {
                UpstreamProtocol::Http2
            };
        };
        let config = Config::default().http_with(
            WEB,
            &[pod.address],
            |http| {
                http.routes = routes(vec![route("/", forward)]);
                http.settings.stream_idle_timeout = Some(Duration::from_millis(600));
            },
            settings,
        );
        if round == 0 {
            rig.serve(config).await
        } else {
            rig.publish(config)
        }
        // HTTP/2 inside: a stream whose body never goes on, on a connection that stays.
        let mut client = rig.http2(WEB).await.ready().await.unwrap();
        let (answer, body) = client
            .send_request(Request::post("http://web/").body(()).unwrap(), false)
            .unwrap();
        assert_eq!(answer.await.unwrap().status(), StatusCode::REQUEST_TIMEOUT, "round {round}");
        assert_eq!(rig.told(round + 1).await.flags, "SI");
        rig.quiet().await;
        drop(body);
    }
}

#[tokio::test]
async fn an_attempt_that_takes_too_long_is_made_again_elsewhere() {
    let rig = Rig::start().await;
    let (slow, good) = (rig.pod(10, hanging()).await, rig.pod(11, echo_app("web")).await);
    let forward = limited(Duration::from_secs(10), |retry| {
        retry.on = RetryOn::parse("gateway-error").0;
        retry.per_try_timeout = Some(Duration::from_millis(100));
    });
    serve(&rig, &[slow.address, good.address], forward).await;
    let mut client = rig.http1(WEB).await;
    for _ in 0..10 {
        let (status, _, body) = send(&mut client, post(vec![b'x'; 1000])).await;
        assert_eq!((status, &body[..]), (StatusCode::OK, &b"web /up 1000"[..]));
    }
    assert!(slow.connects.load(Ordering::SeqCst) > 0);
    rig.quiet().await;
}

#[tokio::test]
async fn retries_stop_at_the_deadline() {
    let rig = Rig::start().await;
    let slow = rig.pod(10, hanging()).await;
    let forward = limited(Duration::from_millis(350), |retry| {
        retry.on = RetryOn::parse("gateway-error").0;
        retry.retries = 1000;
        retry.per_try_timeout = Some(Duration::from_millis(100));
    });
    serve(&rig, &[slow.address], forward).await;
    let since = tokio::time::Instant::now();
    let (status, _, body) = fetch(&mut rig.http1(WEB).await, "/").await;
    assert_eq!(
        (status, &body[..]),
        (StatusCode::GATEWAY_TIMEOUT, &b"upstream request timeout"[..])
    );
    assert!(since.elapsed() < Duration::from_secs(3), "{:?}", since.elapsed());
    let told = rig.told(1).await;
    assert!(
        (2..=4).contains(&told.attempts) && told.details == "response_timeout",
        "{told:?}"
    );
    rig.settled().await;
}

#[tokio::test]
async fn requests_that_wait_for_a_tunnel_do_not_fail_because_another_was_refused() {
    const CLIENTS: usize = 50;
    let rig = Rig::start().await;
    // The first CONNECT to arrive is refused, when all others wait for the same tunnel already; the rest is served.
    let number = Arc::new(AtomicU32::new(0));
    let pod = rig
        .pod_that(10, move |connect| {
            let first = number.fetch_add(1, Ordering::SeqCst) == 0;
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                if first {
                    connect.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new(), "not now");
                    return;
                }
                let mut stream = connect.accept(HeaderMap::new()).unwrap();
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
                    .await;
                let _ = stream.shutdown().await;
            });
        })
        .await;
    // Without any retry of the route.
    let forward = Forward {
        retry: None,
        ..limited(Duration::from_secs(10), |_| {})
    };
    serve(&rig, &[pod.address], forward).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(rig.http1(WEB).await);
    }
    let answers = futures_util::future::join_all(
        clients
            .into_iter()
            .map(|mut client| async move { fetch(&mut client, "/").await.0 }),
    )
    .await;
    let failed = answers.iter().filter(|status| **status != StatusCode::OK).count();
    assert!(failed <= 1, "{failed} of {CLIENTS} failed, one was refused");
    rig.settled().await;
}
