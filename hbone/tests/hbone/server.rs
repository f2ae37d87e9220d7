//! What an accepted connection promises: CONNECT only, drain, keepalive, bounds.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cairn_hbone::{Budget, Connect, PoolSettings, ServeError, ServerSettings, StreamLimits, drain, serve};
use h2::Reason;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    time::timeout,
};

use crate::support::{Mesh, PATIENCE, Raw, destination, open, peer, round_trip, settle};

#[tokio::test]
async fn anything_but_connect_is_not_found() {
    let mut raw = Raw::connect(ServerSettings::default()).await;
    for (method, uri) in [
        (Method::GET, "http://10.0.0.1:80/"),
        (Method::POST, "https://web/x"),
        (Method::OPTIONS, "http://a/"),
    ] {
        let (response, _) = raw.request(method.clone(), uri, true).await;
        assert_eq!(response.await.unwrap().status(), StatusCode::NOT_FOUND, "{method}");
    }
    let (response, _send) = raw.request(Method::CONNECT, "echo:80", false).await;
    assert_eq!(response.await.unwrap().status(), StatusCode::OK);
}

/// What a client is told after its first answer.
async fn told_limit(raw: &mut Raw) -> usize {
    let (response, _send) = raw.request(Method::GET, "http://10.0.0.1:80/", true).await;
    response.await.unwrap();
    raw.client.current_max_send_streams()
}

#[tokio::test]
async fn a_tunnel_may_have_more_streams_while_the_process_has_room() {
    let settings = ServerSettings {
        streams: StreamLimits {
            budget: Budget::new(1600),
            ..StreamLimits::default()
        },
        ..ServerSettings::default()
    };
    let mut first = Raw::connect(settings.clone()).await;
    let mut second = Raw::connect(settings.clone()).await;
    assert_eq!((told_limit(&mut first).await, told_limit(&mut second).await), (200, 193));
    assert_eq!(settings.streams.budget.granted(), 193);
    let Raw {
        client, driver, served, ..
    } = first;
    drop((client, driver.abort()));
    served.await.unwrap().unwrap();
    assert_eq!(settings.streams.budget.granted(), 93);
}

#[tokio::test]
async fn the_request_and_its_answer_carry_headers() {
    let mesh = Mesh::new(ServerSettings::default(), |connect: Connect| {
        assert_eq!(connect.authority.as_str(), "10.96.1.10:80");
        assert_eq!(connect.peer.id.as_ref().unwrap().namespace(), Some("app"));
        let headers = HeaderMap::from_iter([(http::header::FORWARDED, connect.headers["baggage"].clone())]);
        drop(connect.accept(headers).unwrap());
    });
    let headers = HeaderMap::from_iter([("baggage".parse().unwrap(), HeaderValue::from_static("a=b"))]);
    let opened = mesh
        .pool(PoolSettings::default())
        .open(&destination(), "10.96.1.10:80", headers)
        .await
        .unwrap();
    assert_eq!(opened.response_headers["forwarded"], "a=b");
    assert_eq!(opened.peer_id.unwrap().service_account(), Some("server"));
}

#[tokio::test]
async fn a_refusal_has_status_and_body() {
    let mut raw = Raw::connect(ServerSettings::default()).await;
    let (response, _send) = raw.request(Method::CONNECT, "refuse:80", false).await;
    let response = response.await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let mut body = response.into_body();
    assert_eq!(body.data().await.unwrap().unwrap(), "no such service");
    assert!(body.data().await.is_none());
}

#[tokio::test]
async fn a_caller_that_waits_to_answer_learns_of_the_reset() {
    let (sender, mut waiting) = tokio::sync::mpsc::unbounded_channel();
    let mesh = Mesh::new(ServerSettings::default(), move |connect| sender.send(connect).unwrap());
    let pool = mesh.pool(PoolSettings::default());
    let opening = tokio::spawn(async move { pool.open(&destination(), "x:1", HeaderMap::new()).await });
    let mut connect: Connect = waiting.recv().await.unwrap();
    opening.abort();
    timeout(PATIENCE, connect.cancelled()).await.unwrap();
    assert!(connect.accept(HeaderMap::new()).is_err());
}

#[tokio::test]
async fn a_drain_says_goaway_and_lets_streams_finish() {
    let mesh = Mesh::behaving();
    let pool = mesh.pool(PoolSettings::default());
    let mut old = open(&pool, "echo:80").await.stream;
    round_trip(&mut old, b"before").await;
    let (trigger, served) = mesh.take_served().pop().unwrap();
    trigger.start();
    settle().await;
    round_trip(&mut old, b"during").await;
    assert!(!served.is_finished());
    let mut new = open(&pool, "echo:80").await.stream;
    round_trip(&mut new, b"on another connection").await;
    assert_eq!(mesh.dials(), 2);
    old.shutdown().await.unwrap();
    old.read_to_end(&mut Vec::new()).await.unwrap();
    timeout(PATIENCE, trigger.ended()).await.unwrap();
    served.await.unwrap().unwrap();
    round_trip(&mut new, b"after").await;
}

#[tokio::test]
async fn a_drain_ends_an_idle_connection() {
    let raw = Raw::connect(ServerSettings::default()).await;
    raw.trigger.start();
    timeout(PATIENCE, raw.served).await.unwrap().unwrap().unwrap();
    timeout(PATIENCE, raw.driver).await.unwrap().unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_answer_pings_is_dropped() {
    let started = tokio::time::Instant::now();
    let (near, far) = duplex(64 * 1024);
    let (_trigger, watch) = drain::channel();
    let (sender, mut streams) = tokio::sync::mpsc::unbounded_channel();
    let served = tokio::spawn(async move {
        serve(far, peer(), &ServerSettings::default(), watch, |connect| {
            sender.send(connect.accept(HeaderMap::new()).unwrap()).unwrap();
        })
        .await
    });
    let (mut client, mut connection) = h2::client::handshake(near).await.unwrap();
    let request = http::Request::builder().method(Method::CONNECT).uri("x:1").body(()).unwrap();
    let (response, _send) = client.send_request(request, false).unwrap();
    // The peer works until it has its answer, and then its process is frozen.
    tokio::select! {
        response = response => assert_eq!(response.unwrap().status(), 200),
        _ = &mut connection => panic!("the connection ended"),
    }
    let mut stream = streams.recv().await.unwrap();
    assert!(stream.read_to_end(&mut Vec::new()).await.is_err());
    assert!(matches!(served.await.unwrap(), Err(ServeError::KeepaliveTimeout(_))));
    assert_eq!(started.elapsed().as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_pings_stays_until_it_was_idle_for_long() {
    let started = tokio::time::Instant::now();
    let settings = ServerSettings {
        idle_timeout: Duration::from_secs(300),
        ..ServerSettings::default()
    };
    let mut raw = Raw::connect(settings).await;
    let (response, send) = raw.request(Method::CONNECT, "echo:80", false).await;
    let response = response.await.unwrap();
    tokio::time::sleep(Duration::from_secs(400)).await;
    assert!(!raw.served.is_finished());
    drop((response, send));
    raw.served.await.unwrap().unwrap();
    assert_eq!(started.elapsed().as_secs(), 700);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_speaks_is_dropped() {
    for first in [&b""[..], b"PRI * HTTP/2.0\r\n", b"GET / HTTP/1.1\r\n\r\n"] {
        let (mut near, far) = duplex(1024);
        let (_trigger, watch) = drain::channel();
        near.write_all(first).await.unwrap();
        let result = serve(far, peer(), &ServerSettings::default(), watch, |_| ()).await;
        assert!(
            matches!(result, Err(ServeError::HandshakeTimeout(_) | ServeError::Protocol(_))),
            "{result:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_never_ends_is_cut() {
    let (mut near, far) = duplex(64 * 1024);
    let (_trigger, watch) = drain::channel();
    let served = tokio::spawn(async move { serve(far, peer(), &ServerSettings::default(), watch, |_| ()).await });
    near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    // HEADERS on stream 1 without END_HEADERS, and then one byte of a CONTINUATION at a time.
    near.write_all(b"\0\0\x01\x01\0\0\0\0\x01\x82").await.unwrap();
    let mut sent = 0;
    while !served.is_finished() && sent < 1000 {
        let _ = near.write_all(b"\0\0\x01\x09\0\0\0\0\x01\x84").await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        sent += 1;
    }
    assert!(served.await.unwrap().is_err());
    assert!(sent <= 31, "{sent}");
}

#[tokio::test]
async fn a_head_over_the_limit_is_refused_and_the_connection_stays() {
    let mut raw = Raw::connect(ServerSettings::default()).await;
    let value = HeaderValue::from_bytes(&[b'x'; 20_000]).unwrap();
    std::future::poll_fn(|cx| raw.client.poll_ready(cx)).await.unwrap();
    let request = http::Request::builder()
        .method(Method::CONNECT)
        .uri("echo:80")
        .header("baggage", value)
        .body(())
        .unwrap();
    let (response, _send) = raw.client.send_request(request, false).unwrap();
    assert_eq!(response.await.unwrap().status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let (response, _send) = raw.request(Method::CONNECT, "echo:80", false).await;
    assert_eq!(response.await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn ten_thousand_streams_opened_and_reset_leave_nothing_behind() {
    struct Alive(Arc<AtomicUsize>);
    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let alive = Arc::new(AtomicUsize::new(0));
    let counted = alive.clone();
    let server = ServerSettings::default();
    let budget = server.windows.budget.clone();
    let mesh = Mesh::new(server, move |connect: Connect| {
        counted.fetch_add(1, Ordering::SeqCst);
        let alive = Alive(counted.clone());
        tokio::spawn(async move {
            let _alive = alive;
            crate::support::behave(connect).await;
        });
    });
    let pool = mesh.pool(PoolSettings {
        spread_tunnels: 1,
        ..PoolSettings::default()
    });
    for _ in 0..200 {
        let opens = (0..50).map(|_| open(&pool, "echo:80"));
        for opened in futures_util::future::join_all(opens).await {
            opened.stream.reset(Reason::CANCEL);
        }
    }
    let gone = async {
        while alive.load(Ordering::SeqCst) > 0 || budget.granted() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
    assert_eq!((pool.stats().tunnels, pool.stats().streams, mesh.dials()), (1, 0, 1));
    round_trip(&mut open(&pool, "echo:80").await.stream, b"still here").await;
}

#[tokio::test]
async fn resets_faster_than_anybody_can_look_end_the_connection() {
    let mut raw = Raw::connect(ServerSettings::default()).await;
    // Everything below is queued before the connection's task runs, so it arrives at once.
    let mut refused = None;
    for _ in 0..10_000 {
        let request = http::Request::builder()
            .method(Method::CONNECT)
            .uri("echo:80")
            .body(())
            .unwrap();
        match raw.client.send_request(request, false) {
            Ok((response, mut send)) => {
                send.send_reset(Reason::CANCEL);
                drop(response);
            }
            Err(error) => {
                refused = Some(error);
                break;
            }
        }
    }
    assert!(refused.is_none(), "{refused:?}");
    match timeout(PATIENCE, raw.served).await.unwrap().unwrap() {
        Err(ServeError::Protocol(error)) => assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn small_writes_to_a_slow_reader_do_not_end_the_connection() {
    let mut raw = Raw::connect(ServerSettings::default()).await;
    let (response, mut stalled) = raw.request(Method::CONNECT, "stall:1", false).await;
    response.await.unwrap();
    for _ in 0..6_000 {
        stalled.send_data(Bytes::from_static(b"0123456789"), false).unwrap();
    }
    let (response, mut send) = raw.request(Method::CONNECT, "echo:80", false).await;
    let mut back = response.await.unwrap().into_body();
    send.send_data(Bytes::from_static(b"ping"), false).unwrap();
    assert_eq!(timeout(PATIENCE, back.data()).await.unwrap().unwrap().unwrap(), "ping");
}
