//! HTTP requests through the proxy: a client's tunnel in, a tunnel to a pod out.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use cairn_waypoint::{snapshot::Snapshot, upstream::Cluster};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use rig::{Config, Rig, echo_app, fetch, http_app, send};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const WEB: &str = "10.96.1.10:80";

#[tokio::test]
async fn a_request_goes_through_and_its_connections_are_used_again() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let mut client = rig.http1(WEB).await;
    for round in 0..20 {
        let (status, headers, body) = fetch(&mut client, "/a").await;
        assert_eq!((status, &body[..]), (StatusCode::OK, &b"web /a 0"[..]), "round {round}");
        assert_eq!(headers["server"], "istio-envoy");
        assert!(headers.contains_key("x-envoy-upstream-service-time") && headers.contains_key("date"));
    }
    assert_eq!(
        pod.connects.load(Ordering::SeqCst),
        1,
        "one connection to the pod serves all requests"
    );
}

#[tokio::test]
async fn a_body_reaches_the_pod() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let mut client = rig.http1(WEB).await;
    let body = Bytes::from(vec![b'x'; 3_000_000]);
    let request = Request::post("/upload").header("host", "web").body(Full::new(body)).unwrap();
    let (status, _, body) = send(&mut client, request).await;
    assert_eq!((status, &body[..]), (StatusCode::OK, &b"web /upload 3000000"[..]));
}

#[tokio::test]
async fn http2_inside_a_tunnel_is_served() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let stream = rig.open(WEB).await.unwrap().stream;
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    for round in 0..5 {
        let mut sender = sender.clone().ready().await.unwrap();
        let request = Request::get(format!("http://web/h2/{round}")).body(()).unwrap();
        let (answer, _) = sender.send_request(request, true).unwrap();
        let answer = answer.await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let mut body = answer.into_body();
        let data = body.data().await.unwrap().unwrap();
        assert_eq!(&data[..], format!("web /h2/{round} 0").as_bytes());
    }
}

#[tokio::test]
async fn nobodys_address_is_refused_at_once_with_the_reason() {
    let rig = Rig::start().await;
    rig.serve(Config::default().http(WEB, &[])).await;
    for authority in ["10.96.1.10:81", "10.96.9.9:80", "web.app:80"] {
        let refused = rig.open(authority).await.unwrap_err();
        assert_eq!(refused.status(), Some(StatusCode::SERVICE_UNAVAILABLE), "{authority}");
        assert!(refused.to_string().contains("no service of this waypoint"), "{refused}");
    }
}

#[tokio::test]
async fn a_service_without_endpoints_says_so() {
    let rig = Rig::start().await;
    rig.serve(Config::default().http(WEB, &[])).await;
    let (status, _, body) = fetch(&mut rig.http1(WEB).await, "/").await;
    assert_eq!(
        (status, &body[..]),
        (StatusCode::SERVICE_UNAVAILABLE, &b"no healthy upstream"[..])
    );
}

#[tokio::test]
async fn a_chain_that_cannot_be_enforced_refuses() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(
        Config::default()
            .http(WEB, &[pod.address])
            .refusing("envoy.filters.http.rbac"),
    )
    .await;
    let (status, _, _) = fetch(&mut rig.http1(WEB).await, "/").await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_pod_that_refuses_is_left_for_another() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let nobody = std::net::SocketAddr::new(rig.ip(99), 8080);
    rig.serve(Config::default().http(WEB, &[pod.address, nobody])).await;
    let mut client = rig.http1(WEB).await;
    for _ in 0..20 {
        assert_eq!(fetch(&mut client, "/").await.0, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_pod_that_closes_without_an_answer_is_a_503() {
    let rig = Rig::start().await;
    let pod = rig
        .pod(
            10,
            std::sync::Arc::new(|mut stream, _| {
                Box::pin(async move {
                    let _ = stream.read(&mut [0; 1024]).await;
                    let _ = stream.shutdown().await;
                })
            }),
        )
        .await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let (status, _, body) = fetch(&mut rig.http1(WEB).await, "/").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(
        &body[..],
        b"upstream connect error or disconnect/reset before headers. reset reason: connection termination"
    );
}

/// What comes back for raw bytes, until the end.
async fn raw(rig: &Rig, bytes: &str) -> (String, Option<std::io::Error>) {
    let mut stream = rig.open(WEB).await.unwrap().stream;
    // A refusal may come before all was sent.
    let _ = stream.write_all(bytes.as_bytes()).await;
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer))
        .await
        .unwrap();
    (String::from_utf8_lossy(&answer).into_owned(), ended.err())
}

#[tokio::test]
async fn bad_requests_are_answered_in_envoys_words() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let cases = [
        ("hello there\r\n\r\n", "HTTP/1.1 400 Bad Request", "Bad Request"),
        (
            "GET / HTTP/1.1\r\nhost: web\r\nx case: 1\r\n\r\n",
            "HTTP/1.1 400 Bad Request",
            "Bad Request",
        ),
        (
            "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            "HTTP/1.1 400 Bad Request",
            "Bad Request",
        ),
        ("GET / HTTP/1.1\r\nx: 1\r\n\r\n", "HTTP/1.1 400 Bad Request", ""),
        (
            "GET / HTTP/1.0\r\nhost: web\r\n\r\n",
            "426 Upgrade Required",
            "Upgrade Required",
        ),
    ];
    for (request, line, body) in cases {
        let (answer, error) = raw(&rig, request).await;
        assert!(
            answer.contains(line) && answer.ends_with(&format!("\r\n\r\n{body}")),
            "{request:?} -> {answer:?}"
        );
        assert!(
            answer.contains("connection: close") && answer.contains("server: istio-envoy"),
            "{request:?} -> {answer:?}"
        );
        assert!(error.is_none(), "{request:?}: {error:?}");
    }
    let many = format!("GET / HTTP/1.1\r\nhost: web\r\nx: {}\r\n\r\n", "y".repeat(70_000));
    let (answer, _) = raw(&rig, &many).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer:?}");
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_answer_that_is_cut_cuts_the_clients_connection() {
    let rig = Rig::start().await;
    let pod = rig
        .pod(
            10,
            std::sync::Arc::new(|mut stream, _| {
                Box::pin(async move {
                    let _ = stream.read(&mut [0; 1024]).await;
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4000\r\n\r\nhalf").await;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    stream.reset(h2::Reason::INTERNAL_ERROR);
                })
            }),
        )
        .await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let (answer, error) = raw(&rig, "GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert!(answer.ends_with("half"), "{answer:?}");
    assert_eq!(error.map(|error| error.kind()), Some(std::io::ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn informational_answers_pass() {
    let rig = Rig::start().await;
    let pod = rig
        .pod(
            10,
            std::sync::Arc::new(|mut stream, _| {
                Box::pin(async move {
                    let _ = stream.read(&mut [0; 1024]).await;
                    let _ = stream.write_all(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n").await;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                    let _ = stream.read(&mut [0; 1024]).await;
                })
            }),
        )
        .await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let (answer, _) = raw(&rig, "GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n"),
        "{answer:?}"
    );
}

#[tokio::test]
async fn a_websocket_is_passed_through() {
    let rig = Rig::start().await;
    let app = http_app(|mut request: Request<hyper::body::Incoming>| async move {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut io = hyper_util::rt::TokioIo::new(upgrade.await.unwrap());
            let mut word = [0; 4];
            io.read_exact(&mut word).await.unwrap();
            io.write_all(&word).await.unwrap();
            io.shutdown().await.unwrap();
        });
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        answer.headers_mut().insert("upgrade", "websocket".parse().unwrap());
        answer.headers_mut().insert("connection", "Upgrade".parse().unwrap());
        answer
    });
    let pod = rig.pod(10, app).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let mut client = rig.http1(WEB).await;
    let request = Request::get("/chat")
        .header("host", "web")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .body(Full::default())
        .unwrap();
    let answer = client.send_request(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut io = hyper_util::rt::TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    io.write_all(b"ping").await.unwrap();
    let mut back = Vec::new();
    io.read_to_end(&mut back).await.unwrap();
    assert_eq!(back, b"ping");
}

#[tokio::test]
async fn the_next_request_of_a_connection_obeys_the_newest_configuration() {
    let rig = Rig::start().await;
    let (one, two) = (rig.pod(10, echo_app("one")).await, rig.pod(11, echo_app("two")).await);
    rig.serve(Config::default().http(WEB, &[one.address])).await;
    let mut client = rig.http1(WEB).await;
    for round in 0..10 {
        let pod = if round % 2 == 0 { &two } else { &one };
        rig.publish(Config::default().http(WEB, &[pod.address]));
        let (status, headers, body) = fetch(&mut client, "/").await;
        assert_eq!(status, StatusCode::OK);
        assert!(!headers.contains_key("connection"), "no configuration closes a connection");
        assert_eq!(&body[..3], if round % 2 == 0 { b"two" } else { b"one" });
    }
}

#[tokio::test]
async fn a_slow_answer_streams_while_it_comes() {
    let rig = Rig::start().await;
    let pod = rig
        .pod(
            10,
            std::sync::Arc::new(|mut stream, _| {
                Box::pin(async move {
                    let _ = stream.read(&mut [0; 1024]).await;
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf").await;
                    let _ = stream.read(&mut [0; 1]).await;
                })
            }),
        )
        .await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let mut client = rig.http1(WEB).await;
    let answer = client
        .send_request(Request::get("/").header("host", "web").body(Full::default()).unwrap())
        .await
        .unwrap();
    let mut body = answer.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(&first[..], b"half");
}

#[tokio::test]
async fn the_body_of_a_get_reaches_the_pod_though_its_length_is_not_known() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let request =
        "GET /search HTTP/1.1\r\nhost: web\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let (answer, _) = raw(&rig, request).await;
    assert!(answer.ends_with("web /search 5"), "{answer:?}");
}

#[tokio::test]
async fn an_offer_to_go_on_in_http2_is_not_taken_and_no_reason_to_refuse() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let mut client = rig.http1(WEB).await;
    let request = Request::get("/a")
        .header("host", "web")
        .header("connection", "Upgrade, HTTP2-Settings")
        .header("upgrade", "h2c")
        .header("http2-settings", "AAMAAABkAAQCAAAAAAIAAAAA")
        .body(Full::default())
        .unwrap();
    let (status, _, body) = send(&mut client, request).await;
    assert_eq!((status, &body[..]), (StatusCode::OK, &b"web /a 0"[..]));
}

#[tokio::test]
async fn an_upgrade_that_is_refused_is_answered_whole_and_so_is_what_comes_behind_it() {
    let rig = Rig::start().await;
    // Tells the path of each request. (hyper itself drops a connection that was asked to switch.)
    let app: rig::App = std::sync::Arc::new(|mut stream, _| {
        Box::pin(async move {
            let mut heard = Vec::new();
            while stream.read_buf(&mut heard).await.is_ok_and(|read| read > 0) {
                if heard.ends_with(b"\r\n\r\n") {
                    let head = String::from_utf8(std::mem::take(&mut heard)).unwrap();
                    let body = format!("web {} 0", head.split(' ').nth(1).unwrap());
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        })
    });
    let pod = rig.pod(10, app).await;
    let serving = || Config::default().http(WEB, &[pod.address]);
    rig.serve(serving()).await;
    let ask = |kind: &str| format!("GET /chat HTTP/1.1\r\nhost: web\r\nconnection: Upgrade\r\nupgrade: {kind}\r\n\r\n");
    let last = "GET /last HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";
    // By the endpoint, by nobody at the endpoint's place, by the chain.
    for (config, kind, status, end) in [
        (serving(), "websocket", "200 OK", "web /last 0"),
        (Config::default().http(WEB, &[]), "websocket", "503 ", "no healthy upstream"),
        (serving(), "unheard-of", "403 Forbidden", ""),
    ] {
        rig.publish(config);
        for requests in [
            format!("{}{last}", ask(kind)),
            ask(kind).replace("Upgrade\r\n", "Upgrade, close\r\n"),
        ] {
            let (answer, error) = raw(&rig, &requests).await;
            assert!(error.is_none(), "{kind}: the end is clean: {error:?} {answer:?}");
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{kind}: {answer:?}");
            if requests.ends_with(last) {
                assert!(answer.ends_with(end), "{kind}: {answer:?}");
            }
        }
    }
    // What follows is watched as ever.
    rig.publish(serving());
    let smuggled = "POST /b HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let (answer, _) = raw(&rig, &format!("{}{smuggled}", ask("websocket"))).await;
    assert!(
        answer.starts_with("HTTP/1.1 200 OK") && answer.contains("HTTP/1.1 400 Bad Request"),
        "{answer:?}"
    );
    assert!(!answer.contains("/b"), "{answer:?}");
    rig.settled().await;
}

#[tokio::test]
async fn a_connection_of_http2_carries_as_many_requests_as_it_may() {
    let rig = Rig::start().await;
    let app: rig::App = std::sync::Arc::new(|stream, _| {
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                respond.send_response(Response::new(()), true).unwrap();
            }
        })
    });
    let pod = rig.pod(10, app).await;
    let cluster = |cluster: &mut cairn_waypoint::upstream::ClusterSettings| {
        cluster.protocol = cairn_waypoint::upstream::UpstreamProtocol::Http2;
        cluster.max_requests_per_connection = Some(2);
    };
    rig.serve(Config::default().http_with(WEB, &[pod.address], |_| {}, cluster))
        .await;
    let mut client = rig.http1(WEB).await;
    for request in 1..=6u32 {
        assert_eq!(fetch(&mut client, "/").await.0, StatusCode::OK);
        assert_eq!(
            pod.connects.load(Ordering::SeqCst),
            request.div_ceil(2),
            "after {request} requests"
        );
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_no_informational_answers() {
    const EARLY: usize = 20_000;
    let rig = Rig::start().await;
    let (tell, mut said) = tokio::sync::mpsc::unbounded_channel();
    let app: rig::App = std::sync::Arc::new(move |mut stream, _| {
        let tell = tell.clone();
        Box::pin(async move {
            let _ = stream.read(&mut [0; 1024]).await;
            let hint = format!("HTTP/1.1 103 Early Hints\r\nlink: </{}>\r\n\r\n", "a".repeat(500));
            for _ in 0..EARLY {
                stream.write_all(hint.as_bytes()).await.unwrap();
            }
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                .await
                .unwrap();
            tell.send(()).unwrap();
            let _ = stream.read(&mut [0; 1]).await;
        })
    });
    let pod = rig.pod(10, app).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let mut stream = rig.open(WEB).await.unwrap().stream;
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    // 10 MB of advice, of which the client takes none: kept is a little, and the endpoint is not held up.
    tokio::time::timeout(Duration::from_secs(20), said.recv())
        .await
        .expect("the endpoint waits for the client");
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let hints = answer.matches("HTTP/1.1 103 Early Hints\r\n").count();
    assert!((1..EARLY).contains(&hints), "{hints}");
    assert_eq!(answer.matches("HTTP/1.1 200 OK\r\n").count(), 1);
    assert!(answer.ends_with("ok"));
}

#[tokio::test]
async fn an_old_connection_takes_no_more_requests() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let old = |http: &mut cairn_waypoint::snapshot::HttpChain| {
        http.settings.max_connection_duration = Some(Duration::from_millis(300));
    };
    rig.serve(Config::default().http_with(WEB, &[pod.address], old, |_| {})).await;
    // One that is idle ends; one with a request under way ends behind it.
    let mut stream = rig.open(WEB).await.unwrap().stream;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let ended = tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await;
    ended.unwrap().unwrap();
    assert!(answer.ends_with("web / 0"), "{answer:?}");
    let mut client = rig.http2(WEB).await;
    let (answer, mut body) = client
        .send_request(Request::post("http://web/up").body(()).unwrap(), false)
        .unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    body.send_data("late".into(), true).unwrap();
    let mut answer = answer.await.unwrap().into_body();
    assert_eq!(answer.data().await.unwrap().unwrap(), "web /up 4");
    assert!(client.ready().await.is_err(), "the connection takes no other request");
}

#[tokio::test]
async fn a_connection_through_a_tunnel_of_older_terms_is_not_used_again() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let mut client = rig.http1(WEB).await;
    let connects = || pod.connects.load(Ordering::SeqCst);
    for want in [1, 1] {
        assert_eq!(fetch(&mut client, "/").await.0, StatusCode::OK);
        rig.quiet().await;
        assert_eq!(connects(), want);
    }
    // Only the cluster of tunnels changes, not the service's own.
    let before = rig.engine.snapshot.load_full();
    let tunnels = before.clusters.get("connect_originate").unwrap();
    let mut after = Snapshot::empty(rig.engine.workloads.clone());
    after.terminate = before.terminate.clone();
    after.matcher = before.matcher.clone();
    after.chains = before.chains.clone();
    after.clusters = before.clusters.clone();
    let changed = Cluster {
        facts: tunnels.facts.clone(),
        settings: tunnels.settings.clone(),
        transport_hash: !tunnels.transport_hash,
        state: tunnels.state.clone(),
    };
    after.clusters.insert(tunnels.name().clone(), Arc::new(changed));
    rig.engine.snapshot.store(Arc::new(after));
    for want in [2, 2] {
        assert_eq!(fetch(&mut client, "/").await.0, StatusCode::OK);
        rig.quiet().await;
        assert_eq!(connects(), want);
    }
}
