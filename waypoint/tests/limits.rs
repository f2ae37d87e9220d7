//! How long requests, answers and streams may take, and what is told of those that take longer.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{future::poll_fn, sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_hbone::TunnelStream;
use cairn_policy::{
    retry::RetryOn,
    route::{Forward, RouteAction, Target as RouteTarget},
    timeout::{MaxStreamDuration, RouteTimeouts},
};
use cairn_waypoint::{
    snapshot::HttpSettings,
    upstream::{ClusterSettings, UpstreamProtocol},
};
use h2::{Reason, SendStream};
use http::{Request, Response, StatusCode};
use rig::{App, Config, Pod, Rig, Told, default_route, echo_app, fetch, route, routes};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

const WEB: &str = "10.96.1.10:80";
const CLUSTER: &str = "inbound-vip|80|http|10.96.1.10";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(10);
/// A limit that is reached.
const SHORT: Duration = Duration::from_millis(300);

fn http2(cluster: &mut ClusterSettings) {
    cluster.protocol = UpstreamProtocol::Http2;
}

fn as_it_comes(_: &mut ClusterSettings) {}

/// A route with these times, and no retries.
fn forward(timeouts: RouteTimeouts) -> Forward {
    Forward {
        timeouts,
        ..Forward::to(RouteTarget::Cluster(CLUSTER.into()))
    }
}

fn timeout_of(limit: Duration) -> RouteTimeouts {
    RouteTimeouts {
        timeout: Some(limit),
        ..RouteTimeouts::default()
    }
}

/// A service whose chain and route have these limits.
fn limited(
    pods: &[&Pod],
    timeouts: RouteTimeouts,
    chain: impl FnOnce(&mut HttpSettings),
    cluster: impl FnOnce(&mut ClusterSettings),
) -> Config {
    let pods: Vec<_> = pods.iter().map(|pod| pod.address).collect();
    let change = |http: &mut cairn_waypoint::snapshot::HttpChain| {
        http.routes = routes(vec![route("/", forward(timeouts))]);
        chain(&mut http.settings);
    };
    Config::default().http_with(WEB, &pods, change, cluster)
}

/// HTTP/2 that takes nothing of a request's body, never answers, and tells how its streams end.
fn takes_nothing(tell: mpsc::UnboundedSender<Reason>) -> App {
    Arc::new(move |stream, _| {
        let tell = tell.clone();
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let tell = tell.clone();
                tokio::spawn(async move {
                    let reason = poll_fn(|cx| respond.poll_reset(cx)).await;
                    tell.send(reason.unwrap()).unwrap();
                    drop(request);
                });
            }
        })
    })
}

/// A pod that reads the head of a request, says this, and neither reads nor says anything more.
fn says(words: &'static [u8]) -> App {
    Arc::new(move |mut stream, _| {
        Box::pin(async move {
            let _ = stream.read(&mut [0; 512]).await;
            let _ = stream.write_all(words).await;
            poll_fn(|cx| stream.poll_reset(cx)).await;
        })
    })
}

/// A pod whose answer never ends.
fn endless() -> App {
    Arc::new(|mut stream, _| {
        Box::pin(async move {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            while stream.write_all(&[b'x'; 16 * 1024]).await.is_ok() {}
        })
    })
}

/// Sends as much of the data as its peer takes within a short time; whether that was all.
async fn upload(stream: &mut SendStream<Bytes>, mut data: Bytes, end: bool) -> bool {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let Ok(room) = timeout(SHORT, poll_fn(|cx| stream.poll_capacity(cx))).await else {
            return false;
        };
        let Some(Ok(room)) = room else { return false };
        let piece = data.split_to(room.min(data.len()));
        let last = end && data.is_empty();
        if stream.send_data(piece, last).is_err() {
            return false;
        }
    }
    true
}

fn post() -> Request<()> {
    Request::post("http://web/up").body(()).unwrap()
}

async fn told(rig: &Rig, count: usize) -> (Option<u16>, String, String) {
    let Told {
        status, flags, details, ..
    } = rig.told(count).await;
    (status, flags, details)
}

fn tells(status: u16, flags: &str, details: &str) -> (Option<u16>, String, String) {
    (Some(status), flags.into(), details.into())
}

async fn body_of(answer: Response<h2::RecvStream>) -> (StatusCode, Result<Bytes, h2::Error>) {
    let (head, mut body) = answer.into_parts();
    let mut whole = Vec::new();
    while let Some(data) = body.data().await {
        match data {
            Ok(data) => {
                let _ = body.flow_control().release_capacity(data.len());
                whole.extend_from_slice(&data);
            }
            Err(error) => return (head.status, Err(error)),
        }
    }
    (head.status, Ok(whole.into()))
}

#[tokio::test]
async fn an_upload_that_its_endpoint_does_not_take_ends_with_its_client() {
    let rig = Rig::start().await;
    let (tell, mut resets) = mpsc::unbounded_channel();
    let pod = rig.pod(10, takes_nothing(tell)).await;
    rig.serve(limited(&[&pod], RouteTimeouts::default(), |_| {}, http2)).await;
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let (answer, mut body) = client.send_request(post(), false).unwrap();
    assert!(!upload(&mut body, vec![b'x'; 4 << 20].into(), true).await);
    body.send_reset(Reason::CANCEL);
    drop(answer);
    let reset = timeout(PATIENCE, resets.recv()).await.expect("the endpoint is told");
    assert_eq!(reset, Some(Reason::CANCEL));
    rig.quiet().await;
}

#[tokio::test]
async fn an_attempt_whose_endpoint_takes_nothing_is_given_up_and_made_again_with_the_whole_body() {
    let rig = Rig::start().await;
    let (tell, mut resets) = mpsc::unbounded_channel();
    let stuck = rig.pod(10, takes_nothing(tell)).await;
    let good = rig
        .pod(
            11,
            Arc::new(|stream, _| {
                Box::pin(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        tokio::spawn(async move {
                            let (_, whole) = body_of(Response::new(request.into_body())).await;
                            let mut answer = respond.send_response(Response::new(()), false).unwrap();
                            answer.send_data(whole.unwrap().len().to_string().into(), true).unwrap();
                        });
                    }
                })
            }),
        )
        .await;
    let RouteAction::Forward(default) = default_route(CLUSTER).action else {
        panic!("the default route forwards")
    };
    let mut retry = default.retry.clone().unwrap();
    retry.on = RetryOn::parse("gateway-error").0;
    retry.retries = 5;
    retry.per_try_timeout = Some(SHORT);
    let forward = Forward {
        retry: Some(retry),
        ..forward(timeout_of(PATIENCE))
    };
    let change = |http: &mut cairn_waypoint::snapshot::HttpChain| http.routes = routes(vec![route("/", forward)]);
    rig.serve(Config::default().http_with(WEB, &[stuck.address, good.address], change, http2))
        .await;
    let mut stuck_ones = 0;
    for round in 0..20 {
        let mut client = rig.http2(WEB).await.ready().await.unwrap();
        let (answer, mut body) = client.send_request(post(), false).unwrap();
        let sending = tokio::spawn(async move { upload(&mut body, vec![b'x'; 900_000].into(), true).await });
        let (status, whole) = body_of(timeout(PATIENCE, answer).await.unwrap().unwrap()).await;
        assert_eq!(
            (status, &whole.unwrap()[..]),
            (StatusCode::OK, &b"900000"[..]),
            "round {round}"
        );
        assert!(sending.await.unwrap());
        let again = rig.told(round + 1).await.attempts - 1;
        for _ in 0..again {
            let reset = timeout(PATIENCE, resets.recv()).await.expect("the endpoint is told");
            assert_eq!(reset, Some(Reason::CANCEL));
        }
        stuck_ones += again;
        if stuck_ones > 1 {
            break;
        }
    }
    assert!(stuck_ones > 0, "no attempt went to the endpoint that takes nothing");
    rig.quiet().await;
}

#[tokio::test]
async fn the_routes_timeout_begins_when_the_request_has_ended() {
    let rig = Rig::start().await;
    let (echo, silent) = (rig.pod(10, echo_app("web")).await, rig.pod(11, says(b"")).await);
    rig.serve(limited(&[&echo], timeout_of(SHORT), |_| {}, as_it_comes)).await;
    // Three times as long as the timeout.
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let (answer, mut body) = client.send_request(post(), false).unwrap();
    for piece in 0..6 {
        body.send_data("x".into(), piece == 5).unwrap();
        sleep(SHORT / 2).await;
    }
    let (status, whole) = body_of(answer.await.unwrap()).await;
    assert_eq!((status, &whole.unwrap()[..]), (StatusCode::OK, &b"web /up 6"[..]));
    // As HTTP/1.
    let mut stream = rig.open(WEB).await.unwrap().stream;
    let head = b"POST /up HTTP/1.1\r\nhost: web\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head).await.unwrap();
    for _ in 0..6 {
        stream.write_all(b"1\r\nx\r\n").await.unwrap();
        sleep(SHORT / 2).await;
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("web /up 6"), "{answer:?}");
    // Whole requests whose endpoint does nothing: the body, which nobody takes, does not keep the timeout from beginning.
    rig.publish(limited(&[&silent], timeout_of(SHORT), |_| {}, as_it_comes));
    for length in [0, 10, 500_000] {
        let before = rig.told.lock().len();
        let since = Instant::now();
        let mut client = rig.http2(WEB).await.ready().await.unwrap();
        let (answer, mut body) = client.send_request(post(), length == 0).unwrap();
        let sending = tokio::spawn(async move { upload(&mut body, vec![b'x'; length].into(), true).await });
        let answer = timeout(PATIENCE, answer)
            .await
            .expect("a request that came whole has a timeout");
        let (status, whole) = body_of(answer.unwrap()).await;
        assert_eq!(
            (status, &whole.unwrap()[..]),
            (StatusCode::GATEWAY_TIMEOUT, &b"upstream request timeout"[..])
        );
        assert!(since.elapsed() >= SHORT, "{:?}", since.elapsed());
        assert_eq!(told(&rig, before + 1).await, tells(504, "UT", "response_timeout"));
        sending.await.unwrap();
    }
    rig.quiet().await;
}

#[tokio::test]
async fn an_exchange_in_which_nothing_moves_ends_after_the_idle_time() {
    let idle = |settings: &mut HttpSettings| settings.stream_idle_timeout = Some(SHORT);
    let rig = Rig::start().await;
    let silent = rig.pod(10, says(b"")).await;
    rig.serve(limited(&[&silent], RouteTimeouts::default(), idle, as_it_comes))
        .await;
    // A request that came whole is its endpoint's fault, a request that stopped its client's.
    let (status, _, body) = fetch(&mut rig.http1(WEB).await, "/").await;
    assert_eq!((status, &body[..]), (StatusCode::GATEWAY_TIMEOUT, &b"stream timeout"[..]));
    assert_eq!(told(&rig, 1).await, tells(504, "SI", "stream_idle_timeout"));
    let (answer, _) = rig
        .raw(WEB, b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 9\r\n\r\nhalf")
        .await;
    assert!(
        answer.starts_with("HTTP/1.1 408 ") && answer.contains("connection: close") && answer.ends_with("stream timeout"),
        "{answer:?}"
    );
    assert_eq!(told(&rig, 2).await, tells(408, "SI", "stream_idle_timeout"));
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let (answer, body) = client.send_request(post(), false).unwrap();
    assert_eq!(answer.await.unwrap().status(), StatusCode::REQUEST_TIMEOUT);
    drop(body);
    assert_eq!(told(&rig, 3).await, tells(408, "SI", "stream_idle_timeout"));
    // An answer that stops is cut.
    let half = rig.pod(11, says(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")).await;
    rig.publish(limited(&[&half], RouteTimeouts::default(), idle, as_it_comes));
    let (answer, error) = rig.raw(WEB, b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert!(answer.ends_with("half") && error.is_some(), "{answer:?} {error:?}");
    assert_eq!(told(&rig, 4).await, tells(200, "SI", "stream_idle_timeout"));
    // The route's word goes before the chain's; zero is no limit.
    let route = RouteTimeouts {
        idle: Some(Duration::ZERO),
        ..timeout_of(SHORT * 3)
    };
    rig.publish(limited(&[&silent], route, idle, as_it_comes));
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.2, "upstream request timeout");
    assert_eq!(told(&rig, 5).await, tells(504, "UT", "response_timeout"));
    let route = RouteTimeouts {
        idle: Some(SHORT),
        ..RouteTimeouts::default()
    };
    rig.publish(limited(&[&silent], route, |_| {}, as_it_comes));
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.2, "stream timeout");
    assert_eq!(told(&rig, 6).await, tells(504, "SI", "stream_idle_timeout"));
    rig.quiet().await;
}

#[tokio::test]
async fn an_exchange_in_which_something_moves_is_not_idle() {
    let idle = |settings: &mut HttpSettings| settings.stream_idle_timeout = Some(SHORT);
    let rig = Rig::start().await;
    let slow: App = Arc::new(|mut stream, _| {
        Box::pin(async move {
            let _ = stream.read(&mut [0; 4096]).await;
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n")
                .await
                .unwrap();
            for _ in 0..6 {
                sleep(SHORT / 2).await;
                stream.write_all(b"x").await.unwrap();
            }
            poll_fn(|cx| stream.poll_reset(cx)).await;
        })
    });
    let (slow, echo) = (rig.pod(10, slow).await, rig.pod(11, echo_app("web")).await);
    rig.serve(limited(&[&slow], RouteTimeouts::default(), idle, as_it_comes))
        .await;
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.2, "xxxxxx");
    rig.publish(limited(&[&echo], RouteTimeouts::default(), idle, as_it_comes));
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let (answer, mut body) = client.send_request(post(), false).unwrap();
    for piece in 0..6 {
        body.send_data("x".into(), piece == 5).unwrap();
        sleep(SHORT / 2).await;
    }
    assert_eq!(body_of(answer.await.unwrap()).await.1.unwrap(), "web /up 6");
    rig.quiet().await;
}

#[tokio::test]
async fn a_client_that_reads_no_more_of_its_answer_is_given_up() {
    let idle = |settings: &mut HttpSettings| settings.stream_idle_timeout = Some(SHORT);
    let life = |settings: &mut HttpSettings| settings.max_stream_duration = Some(SHORT * 2);
    let rig = Rig::start().await;
    let pod = rig.pod(10, endless()).await;
    let by_route = || timeout_of(SHORT * 2);
    for (round, (config, flags, details)) in [
        (
            limited(&[&pod], RouteTimeouts::default(), idle, as_it_comes),
            "SI",
            "stream_idle_timeout",
        ),
        (
            limited(&[&pod], RouteTimeouts::default(), life, as_it_comes),
            "-",
            "max_duration_timeout",
        ),
        (limited(&[&pod], by_route(), |_| {}, as_it_comes), "UT", "response_timeout"),
    ]
    .into_iter()
    .enumerate()
    {
        if round == 0 {
            rig.serve(config).await
        } else {
            rig.publish(config)
        }
        let mut unread = rig.open(WEB).await.unwrap().stream;
        unread.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
        assert_eq!(told(&rig, 2 * round + 1).await, tells(200, flags, details));
        let mut client = rig.http2(WEB).await.ready().await.unwrap();
        let (answer, _) = client
            .send_request(Request::get("http://web/").body(()).unwrap(), true)
            .unwrap();
        let answer = answer.await.unwrap();
        assert_eq!(told(&rig, 2 * round + 2).await, tells(200, flags, details));
        rig.quiet().await;
        drop((unread, answer));
    }
    rig.settled().await;
}

#[tokio::test]
async fn a_request_that_does_not_arrive_in_time_is_answered_408() {
    let arrival = |settings: &mut HttpSettings| settings.request_timeout = Some(SHORT);
    let rig = Rig::start().await;
    let slow: App = rig::http_app(|request| async move {
        let body = http_body_util::BodyExt::collect(request.into_body())
            .await
            .unwrap()
            .to_bytes();
        sleep(SHORT * 2).await;
        Response::new(http_body_util::Full::new(body))
    });
    let pod = rig.pod(10, slow).await;
    rig.serve(limited(&[&pod], RouteTimeouts::default(), arrival, as_it_comes))
        .await;
    // However busy it is.
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let (mut answer, mut body) = client.send_request(post(), false).unwrap();
    let since = Instant::now();
    let answer = loop {
        body.send_data("x".into(), false).unwrap();
        if let Ok(answer) = timeout(SHORT / 10, &mut answer).await {
            break answer.unwrap();
        }
        assert!(since.elapsed() < PATIENCE, "there is no answer");
    };
    let (status, whole) = body_of(answer).await;
    assert_eq!(
        (status, &whole.unwrap()[..]),
        (StatusCode::REQUEST_TIMEOUT, &b"request timeout"[..])
    );
    assert_eq!(told(&rig, 1).await, tells(408, "-", "request_overall_timeout"));
    // One that came in time may be answered later.
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let (answer, mut body) = client.send_request(post(), false).unwrap();
    body.send_data("all".into(), true).unwrap();
    assert_eq!(body_of(answer.await.unwrap()).await.1.unwrap(), "all");
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.0, StatusCode::OK);
    rig.quiet().await;
}

#[tokio::test]
async fn a_stream_ends_at_its_longest_time_whatever_moves() {
    let life = |settings: &mut HttpSettings| settings.max_stream_duration = Some(SHORT);
    let of = |duration, grpc_timeout_max| RouteTimeouts {
        max_stream: Some(MaxStreamDuration {
            duration,
            grpc_timeout_max,
            grpc_timeout_offset: None,
        }),
        ..RouteTimeouts::default()
    };
    let rig = Rig::start().await;
    let (silent, busy) = (rig.pod(10, says(b"")).await, rig.pod(11, endless()).await);
    rig.serve(limited(&[&silent], RouteTimeouts::default(), life, as_it_comes))
        .await;
    let (status, _, body) = fetch(&mut rig.http1(WEB).await, "/").await;
    assert_eq!(
        (status, &body[..]),
        (StatusCode::GATEWAY_TIMEOUT, &b"downstream duration timeout"[..])
    );
    assert_eq!(told(&rig, 1).await, tells(504, "-", "max_duration_timeout"));
    rig.publish(limited(&[&busy], RouteTimeouts::default(), life, as_it_comes));
    let (answer, error) = rig.raw(WEB, b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && error.is_some());
    assert_eq!(told(&rig, 2).await, tells(200, "-", "max_duration_timeout"));
    // The route's limit, and what a gRPC client asks for, go before the chain's; the client is told in gRPC.
    rig.publish(limited(&[&silent], of(Some(SHORT), None), |_| {}, as_it_comes));
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.2, "downstream duration timeout");
    assert_eq!(told(&rig, 3).await, tells(504, "-", "max_duration_timeout"));
    rig.publish(limited(
        &[&silent],
        of(Some(Duration::ZERO), Some(Duration::ZERO)),
        |_| {},
        as_it_comes,
    ));
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let call = Request::post("http://web/s/m")
        .header("content-type", "application/grpc")
        .header("grpc-timeout", "300m")
        .body(())
        .unwrap();
    let answer = client.send_request(call, true).unwrap().0.await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["grpc-status"], "4");
    assert_eq!(answer.headers()["grpc-message"], "downstream duration timeout");
    assert_eq!(told(&rig, 4).await, tells(200, "-", "max_duration_timeout"));
    rig.quiet().await;
}

/// A pod that takes an upgrade, greets with seven bytes, hears five, and then does what the closure says.
fn upgraded(then: fn(TunnelStream) -> futures_util::future::BoxFuture<'static, ()>) -> App {
    Arc::new(move |mut stream, _| {
        Box::pin(async move {
            let mut heard = Vec::new();
            while !heard.ends_with(b"\r\n\r\n") {
                assert!(stream.read_buf(&mut heard).await.unwrap() > 0, "{heard:?}");
            }
            let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhello!!";
            stream.write_all(answer).await.unwrap();
            let mut early = [0; 5];
            stream.read_exact(&mut early).await.unwrap();
            assert_eq!(&early, b"early");
            then(stream).await;
        })
    })
}

#[tokio::test]
async fn an_upgraded_connection_has_limits_and_its_bytes_are_told_however_it_ends() {
    let idle = |settings: &mut HttpSettings| settings.stream_idle_timeout = Some(SHORT);
    let life = |settings: &mut HttpSettings| settings.max_stream_duration = Some(SHORT);
    let none = |_: &mut HttpSettings| {};
    let waits: fn(TunnelStream) -> futures_util::future::BoxFuture<'static, ()> =
        |mut stream| Box::pin(async move { while stream.read(&mut [0; 9]).await.is_ok_and(|read| read > 0) {} });
    let resets: fn(TunnelStream) -> futures_util::future::BoxFuture<'static, ()> =
        |stream| Box::pin(async move { stream.reset(Reason::INTERNAL_ERROR) });
    let rig = Rig::start().await;
    let (waiting, resetting) = (rig.pod(10, upgraded(waits)).await, rig.pod(11, upgraded(resets)).await);
    // A route's timeout begins with the end of the request, which an upgraded one never has.
    let limited = |pod, chain: fn(&mut HttpSettings)| limited(&[pod], timeout_of(SHORT / 3), chain, as_it_comes);
    for (round, (config, flags, details)) in [
        (limited(&waiting, idle), "SI", "stream_idle_timeout"),
        (limited(&waiting, life), "-", "max_duration_timeout"),
        (limited(&resetting, none), "-", "via_upstream"),
    ]
    .into_iter()
    .enumerate()
    {
        if round == 0 {
            rig.serve(config).await
        } else {
            rig.publish(config)
        }
        // The client does not wait for the answer before it goes on in the other protocol.
        let ask = b"GET /chat HTTP/1.1\r\nhost: web\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nearly";
        let (answer, error) = rig.raw(WEB, ask).await;
        assert!(
            answer.starts_with("HTTP/1.1 101 ") && answer.ends_with("hello!!"),
            "{answer:?}"
        );
        assert!(error.is_some(), "it was cut");
        let told = rig.told(round + 1).await;
        assert_eq!((told.received, told.sent), (5, 7), "{told:?}");
        assert_eq!(
            (told.status, told.flags.as_str(), told.details.as_str()),
            (Some(101), flags, details)
        );
    }
    rig.settled().await;
}
