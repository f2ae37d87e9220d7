//! Over memory and under a paused clock: time passes only when everybody waits.

use std::{future::pending, time::Duration};

use bytes::Bytes;
use cairn_exchange::clock;
use cairn_proto::envoy::{config::core::v3::Node, service::discovery::v3::DeltaDiscoveryResponse};
use prost::Message as _;
use tokio::{
    io::{DuplexStream, copy_bidirectional, duplex},
    sync::{mpsc, oneshot},
};
use tonic::Status;

use super::server::{CDS, EDS, Heard, LDS, Opened, Recorder, Told, WDS, names, response, serve};
use crate::{Client, Settings, Subscription, Tls, Update, Verdict, Wish, connect::Transport};

fn settings() -> Settings {
    let node = Node {
        id: "waypoint~10.0.0.1~w.app~app.svc".into(),
        ..Node::default()
    };
    Settings::new("istiod.test:15010".parse().unwrap(), Tls::Plaintext, node)
}

fn subscriptions() -> Vec<Subscription> {
    vec![
        Subscription::wildcard(CDS),
        Subscription::by_name(EDS),
        Subscription::wildcard(LDS),
        Subscription::wildcard(WDS),
    ]
}

/// Starts a client whose connections go to `connect`.
fn start(
    settings: Settings,
    connect: mpsc::Sender<DuplexStream>,
    decide: impl FnMut(&Update) -> Verdict + Send + 'static,
) -> (crate::Status, Heard, oneshot::Sender<()>) {
    let (told, heard) = mpsc::unbounded_channel();
    let mut client = Client::new(settings, subscriptions(), Recorder { told, decide }).unwrap();
    client.transport = Transport::Memory(connect);
    let status = client.status();
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(client.run(async {
        let _ = stopped.await;
    }));
    (status, Heard(heard), stop)
}

fn accept(_: &Update) -> Verdict {
    Verdict::accepted()
}

/// The endpoints of all clusters, as a real consumer wishes them.
fn accept_and_want_endpoints(update: &Update) -> Verdict {
    let mut verdict = Verdict::accepted();
    if update.type_url.as_str() == CDS {
        verdict.wishes.push(Wish::exactly(EDS, names(update)));
    }
    verdict
}

/// Reads the three first requests of a stream.
async fn begun(streams: &mut mpsc::UnboundedReceiver<Opened>) -> Opened {
    let mut stream = streams.recv().await.unwrap();
    for kind in [CDS, LDS, WDS] {
        assert_eq!(stream.request().await.type_url, kind);
    }
    stream
}

/// A connection to `server` that can be made silent without being closed.
fn valve(server: mpsc::Sender<DuplexStream>) -> (mpsc::Sender<DuplexStream>, mpsc::Sender<()>) {
    let (connect, mut connections) = mpsc::channel::<DuplexStream>(4);
    let (close, mut closed) = mpsc::channel::<()>(1);
    tokio::spawn(async move {
        while let Some(mut client) = connections.recv().await {
            let (mut near, far) = duplex(1 << 20);
            server.send(far).await.unwrap();
            tokio::select! {
                _ = copy_bidirectional(&mut client, &mut near) => {}
                Some(()) = closed.recv() => {
                    tokio::spawn(async move {
                        let _open = (client, near);
                        pending::<()>().await;
                    });
                }
            }
        }
    });
    (connect, close)
}

#[tokio::test(start_paused = true)]
async fn a_captured_state_arrives_whole_and_each_type_is_acknowledged() {
    let (connect, mut streams) = serve(None);
    let (status, mut heard, _stop) = start(settings(), connect, accept_and_want_endpoints);
    let mut stream = streams.recv().await.unwrap();
    let first = stream.request().await;
    assert_eq!(
        (first.type_url.as_str(), first.node.unwrap().id),
        (CDS, "waypoint~10.0.0.1~w.app~app.svc".into())
    );
    for kind in [LDS, WDS] {
        let next = stream.request().await;
        assert_eq!((next.type_url.as_str(), next.node), (kind, None));
    }
    let captures = [
        (CDS, &include_bytes!("../../../tests/captured/cds.pb")[..]),
        (EDS, &include_bytes!("../../../tests/captured/eds.pb")[..]),
        (LDS, &include_bytes!("../../../tests/captured/lds.pb")[..]),
        (WDS, &include_bytes!("../../../tests/captured/wds.pb")[..]),
    ];
    for (kind, capture) in captures {
        let answer = DeltaDiscoveryResponse::decode_length_delimited(capture).unwrap();
        let (size, bodies) = (answer.encoded_len(), answer.resources.clone());
        stream.answer(answer);
        let update = heard.applied().await;
        assert_eq!((update.type_url.as_str(), update.bytes), (kind, size));
        for (changed, sent) in update.changed.iter().zip(&bodies) {
            assert_eq!((&changed.name, &changed.version), (&sent.name, &sent.version));
            assert_eq!(changed.bytes, Bytes::from(sent.resource.clone().unwrap().value));
        }
        assert_eq!(update.changed.len(), bodies.len());
        let ack = stream.request().await;
        assert_eq!(
            (ack.type_url.as_str(), ack.response_nonce.as_str(), ack.error_detail),
            (kind, "nonce-1", None)
        );
        if kind == CDS {
            let wish = stream.request().await;
            assert_eq!((wish.type_url.as_str(), wish.response_nonce.as_str()), (EDS, ""));
            assert_eq!(wish.resource_names_subscribe, names(&update));
        }
    }
    let snapshot = status.snapshot();
    assert!(snapshot.connected_since.is_some());
    assert!(
        snapshot
            .types
            .values()
            .all(|kind| kind.acked == 1 && kind.nacked == 0 && kind.last_nonce == "nonce-1"),
        "{snapshot:?}"
    );
    assert_eq!(snapshot.types.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_reaches_istiod_and_the_status_and_the_next_answer_clears_it() {
    let (connect, mut streams) = serve(None);
    let mut answers = 0;
    let (status, mut heard, _stop) = start(settings(), connect, move |_| {
        answers += 1;
        if answers == 1 {
            Verdict::refused("cluster a: bad")
        } else {
            Verdict::accepted()
        }
    });
    let mut stream = begun(&mut streams).await;
    stream.answer(response(CDS, "n1", &["a"], &[]));
    heard.applied().await;
    let nack = stream.request().await;
    assert_eq!(
        (nack.response_nonce.as_str(), nack.error_detail.unwrap().message.as_str()),
        ("n1", "cluster a: bad")
    );
    assert_eq!(status.snapshot().types[CDS].last_nack.as_deref(), Some("cluster a: bad"));
    stream.answer(response(CDS, "n2", &["a"], &[]));
    heard.applied().await;
    assert_eq!(stream.request().await.response_nonce, "n2");
    let kind = &status.snapshot().types[CDS];
    assert_eq!((kind.acked, kind.nacked, kind.last_nack.as_deref()), (1, 1, None));
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_panics_refuses_and_is_asked_again() {
    let (connect, mut streams) = serve(None);
    let (_status, mut heard, _stop) = start(settings(), connect, |update| {
        assert!(update.nonce != "n1", "a bug");
        Verdict::accepted()
    });
    let mut stream = begun(&mut streams).await;
    stream.answer(response(CDS, "n1", &["a"], &[]));
    let nack = stream.request().await.error_detail.unwrap();
    assert!(
        nack.message.contains("internal error") && nack.message.contains("a bug"),
        "{}",
        nack.message
    );
    stream.answer(response(CDS, "n2", &["a"], &[]));
    heard.applied().await;
    assert_eq!(stream.request().await.error_detail, None);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_vanishes_is_replaced_and_goes_on_where_it_ended() {
    let (connect, mut streams) = serve(None);
    let (status, mut heard, _stop) = start(settings(), connect, accept_and_want_endpoints);
    let mut stream = begun(&mut streams).await;
    stream.answer(response(CDS, "n1", &["a", "b"], &[]));
    heard.applied().await;
    assert_eq!(stream.request().await.response_nonce, "n1");
    assert_eq!(stream.request().await.resource_names_subscribe, ["a", "b"]);
    stream.answer(response(EDS, "n2", &["a"], &[]));
    heard.applied().await;
    stream.request().await;
    stream.fail(Status::unavailable("going down"));
    assert!(heard.disconnected().await.contains("going down"));

    let mut stream = streams.recv().await.unwrap();
    let cds = stream.request().await;
    assert!(cds.node.is_some() && cds.resource_names_subscribe.is_empty() && cds.response_nonce.is_empty());
    assert_eq!(cds.initial_resource_versions.into_keys().collect::<Vec<_>>(), ["a", "b"]);
    let eds = stream.request().await;
    assert_eq!(
        (eds.type_url.as_str(), eds.resource_names_subscribe),
        (EDS, vec!["a".into(), "b".into()])
    );
    assert_eq!(eds.initial_resource_versions.into_keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(stream.request().await.type_url, LDS);
    // A new istiod that knows nothing of what was held does not say that b is gone.
    stream.answer(response(CDS, "m1", &["a"], &[]));
    assert!(matches!(heard.next().await, Told::Connected));
    assert_eq!(heard.applied().await.removed, ["b"]);
    assert_eq!(status.snapshot().streams, 2);
}

#[tokio::test(start_paused = true)]
async fn removed_names_are_passed_on_known_or_not() {
    let (connect, mut streams) = serve(None);
    let (_status, mut heard, _stop) = start(settings(), connect, accept);
    let mut stream = begun(&mut streams).await;
    stream.answer(response(WDS, "n1", &["w"], &["app/extra.app.svc.cluster.local"]));
    assert_eq!(heard.applied().await.removed, ["app/extra.app.svc.cluster.local"]);
    assert_eq!(stream.request().await.response_nonce, "n1");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_nobody_asked_for_is_counted_and_not_acknowledged() {
    let (connect, mut streams) = serve(None);
    let (status, mut heard, _stop) = start(settings(), connect, accept);
    let mut stream = begun(&mut streams).await;
    stream.answer(response(
        "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
        "r",
        &["r"],
        &[],
    ));
    stream.answer(response(CDS, "n1", &[], &[]));
    assert_eq!(heard.applied().await.nonce, "n1");
    assert_eq!(stream.request().await.response_nonce, "n1");
    assert_eq!(status.snapshot().unrequested, 1);
}

#[tokio::test(start_paused = true)]
async fn attempts_come_ever_more_slowly_while_nobody_answers() {
    let (connect, mut connections) = mpsc::channel::<DuplexStream>(1);
    let (status, _heard, _stop) = start(settings(), connect, accept);
    let mut gaps = Vec::new();
    let mut last = clock::now();
    for _ in 0..10 {
        drop(connections.recv().await.unwrap());
        gaps.push(last.elapsed());
        last = clock::now();
    }
    assert_eq!(gaps[0], Duration::ZERO);
    for (n, gap) in gaps.iter().enumerate().skip(1) {
        let longest = Duration::from_millis(500 << (n - 1)).min(Duration::from_secs(30));
        // Timers are rounded up to a millisecond.
        assert!(
            *gap >= longest / 2 && *gap <= longest + Duration::from_millis(2),
            "{n}: {gap:?}"
        );
    }
    status.until(|now| now.failed_attempts >= 9).await;
}

#[tokio::test(start_paused = true)]
async fn a_half_open_istiod_is_given_up_by_keepalive() {
    let (server, mut streams) = serve(None);
    let (connect, close) = valve(server);
    let (_status, mut heard, _stop) = start(settings(), connect, accept);
    let stream = begun(&mut streams).await;
    stream.answer(response(CDS, "n1", &["a"], &[]));
    heard.applied().await;
    close.send(()).await.unwrap();
    let silent_since = clock::now();
    let reason = heard.disconnected().await;
    assert!(reason.contains("no sign of life for 40"), "{reason}");
    assert!(
        silent_since.elapsed() <= Duration::from_secs(42),
        "{:?}",
        silent_since.elapsed()
    );
    let again = streams.recv().await.unwrap().request().await;
    assert_eq!(again.initial_resource_versions.into_keys().collect::<Vec<_>>(), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn an_istiod_that_accepts_and_never_answers_is_given_up_in_the_end() {
    let (connect, mut streams) = serve(None);
    let (_status, mut heard, _stop) = start(settings(), connect, accept);
    let stream = begun(&mut streams).await;
    let reason = heard.disconnected().await;
    assert!(reason.contains("no answer within 300s"), "{reason}");
    drop(stream);
    begun(&mut streams).await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_over_the_limit_ends_the_stream_and_takes_nothing_away() {
    let (connect, mut streams) = serve(None);
    let (_status, mut heard, _stop) = start(
        Settings {
            max_message: 1000,
            ..settings()
        },
        connect,
        accept,
    );
    let stream = begun(&mut streams).await;
    stream.answer(response(CDS, "n1", &["a"], &[]));
    assert_eq!(names(&heard.applied().await), ["a"]);
    stream.answer(response(LDS, "n2", &["x".repeat(1000).as_str()], &[]));
    let reason = heard.disconnected().await;
    assert!(
        reason.contains("larger than 1000 bytes") && reason.contains("old configuration stays"),
        "{reason}"
    );
    let again = streams.recv().await.unwrap().request().await;
    assert_eq!(again.initial_resource_versions.into_keys().collect::<Vec<_>>(), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn refusals_are_told_with_what_to_do() {
    let cases = [
        (Status::unauthenticated("authentication failure"), "audience istio-ca"),
        (Status::permission_denied("no identities"), "SERVICE_ACCOUNT"),
        (Status::unavailable("server is not ready"), "istiod is not ready"),
    ];
    for (refusal, hint) in cases {
        let (connect, _streams) = serve(Some(refusal.clone()));
        let (status, _heard, _stop) = start(settings(), connect, accept);
        status.until(|now| now.failed_attempts >= 2).await;
        let error = status.snapshot().last_error.unwrap();
        assert!(error.contains(refusal.message()) && error.contains(hint), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_no_answer_are_named_and_the_stream_is_replaced() {
    let frame = |length: u32, bytes: &[u8]| Bytes::from([&[0][..], &length.to_be_bytes(), bytes].concat());
    let cases = [
        (frame(3, b"\xff\xff\xff"), "3 bytes that are no discovery answer"),
        (frame(100, b"only this"), "istiod.test:15010"),
        (Bytes::from_static(b"\x07not a gRPC frame at all"), "istiod.test:15010"),
        (Bytes::new(), "istiod.test:15010"),
    ];
    for (bytes, want) in cases {
        let (connect, mut connections) = mpsc::channel::<DuplexStream>(1);
        let (status, mut heard, _stop) = start(settings(), connect, accept);
        let connection = connections.recv().await.unwrap();
        let raw = tokio::spawn(raw_answer(connection, bytes.clone()));
        let reason = heard.disconnected().await;
        assert!(reason.contains(want), "{bytes:?}: {reason}");
        assert!(connections.recv().await.is_some(), "another attempt follows");
        assert_eq!(status.snapshot().types.len(), 0);
        raw.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn an_http2_server_that_is_no_http2_server_is_named() {
    let (connect, mut connections) = mpsc::channel::<DuplexStream>(1);
    let (status, _heard, _stop) = start(settings(), connect, accept);
    let mut connection = connections.recv().await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut connection, b"HTTP/1.1 400 Bad Request\r\n\r\n")
        .await
        .unwrap();
    status.until(|now| now.failed_attempts == 1).await;
    let error = status.snapshot().last_error.unwrap();
    assert!(error.contains("the connection to istiod.test:15010 broke"), "{error}");
}

/// Answers the first call with these bytes as its body, and ends it without trailers.
async fn raw_answer(connection: DuplexStream, bytes: Bytes) {
    let mut server = h2::server::handshake(connection).await.unwrap();
    while let Some(Ok((request, mut respond))) = server.accept().await {
        let head = http::Response::builder()
            .header("content-type", "application/grpc")
            .body(())
            .unwrap();
        let mut body = respond.send_response(head, false).unwrap();
        body.send_data(bytes.clone(), true).unwrap();
        std::mem::forget(request);
    }
}

#[tokio::test(start_paused = true)]
async fn an_istiod_that_reads_nothing_is_given_up() {
    let (connect, mut connections) = mpsc::channel::<DuplexStream>(1);
    let (_status, mut heard, _stop) = start(settings(), connect, accept);
    let connection = connections.recv().await.unwrap();
    // No window: the client may send its head, but not one byte of a request.
    let mut server = h2::server::Builder::new()
        .initial_window_size(0)
        .handshake::<_, Bytes>(connection)
        .await
        .unwrap();
    let answers = (0..64).flat_map(|n| {
        let answer = response(CDS, &format!("n{n}"), &[], &[]).encode_to_vec();
        [&[0][..], &u32::try_from(answer.len()).unwrap().to_be_bytes(), &answer].concat()
    });
    let (_request, mut respond) = server.accept().await.unwrap().unwrap();
    let head = http::Response::builder()
        .header("content-type", "application/grpc")
        .body(())
        .unwrap();
    let mut body = respond.send_response(head, false).unwrap();
    body.send_data(answers.collect::<Vec<u8>>().into(), false).unwrap();
    tokio::spawn(async move { while server.accept().await.is_some() {} });
    let reason = heard.disconnected().await;
    assert!(reason.contains("took no request for 30s"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn the_client_stops_when_it_is_told_to() {
    let (connect, mut streams) = serve(None);
    let (_status, mut heard, stop) = start(settings(), connect, accept);
    let _stream = begun(&mut streams).await;
    stop.send(()).unwrap();
    while heard.0.recv().await.is_some() {}
}

#[test]
fn settings_that_can_never_work_are_refused_at_the_start() {
    let consumer = || Recorder {
        told: mpsc::unbounded_channel().0,
        decide: accept,
    };
    let bad = [
        Settings {
            node: Node::default(),
            ..settings()
        },
        Settings {
            headers: vec![("no good".into(), "x".into())],
            ..settings()
        },
        Settings {
            headers: vec![("x".into(), "line\nbreak".into())],
            ..settings()
        },
    ];
    for settings in bad {
        assert!(Client::new(settings, subscriptions(), consumer()).is_err());
    }
}
