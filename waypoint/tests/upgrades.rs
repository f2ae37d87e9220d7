//! Requests that are switched to another protocol, whichever HTTP client and endpoint speak.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_waypoint::upstream::{ClusterSettings, UpstreamProtocol};
use h2::ext::Protocol;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rig::{App, Config, Pod, Rig, http_app};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const WEB: &str = "10.96.1.10:80";

/// What the endpoint was asked.
type Asked = Arc<Mutex<Vec<String>>>;

/// An endpoint that switches by HTTP/1.1 and sends everything back.
fn switching_http1(asked: &Asked) -> App {
    let asked = asked.clone();
    http_app(move |mut request| {
        let kind = request
            .headers()
            .get("upgrade")
            .and_then(|kind| kind.to_str().ok().map(str::to_owned));
        asked.lock().push(format!("{} {} {kind:?}", request.method(), request.uri()));
        async move {
            let mut answer = Response::new(Full::default());
            let Some(kind) = kind else { return answer };
            tokio::spawn(async move {
                let io = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
                let (mut read, mut write) = tokio::io::split(io);
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            answer.headers_mut().insert("upgrade", kind.parse().unwrap());
            answer.headers_mut().insert("connection", "upgrade".parse().unwrap());
            answer
        }
    })
}

/// The same by HTTP/2; paths that begin with `/no` are refused. One that `knows` nothing of extended CONNECT resets.
fn switching_http2(asked: &Asked, knows: bool) -> App {
    let asked = asked.clone();
    Arc::new(move |stream, _| {
        let asked = asked.clone();
        Box::pin(async move {
            let mut builder = h2::server::Builder::new();
            if knows {
                builder.enable_connect_protocol();
            }
            let mut connection = builder.handshake::<_, Bytes>(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let kind = request.extensions().get::<Protocol>().map(|kind| kind.as_str().to_owned());
                let fields = ["connection", "upgrade", "host"].map(|name| request.headers().contains_key(name));
                assert_eq!(fields, [false; 3]);
                asked.lock().push(format!("{} {} {kind:?}", request.method(), request.uri()));
                if request.uri().path().starts_with("/no") {
                    let answer = Response::builder().status(StatusCode::FORBIDDEN).body(()).unwrap();
                    let mut send = respond.send_response(answer, false).unwrap();
                    send.send_data("not here".into(), true).unwrap();
                    continue;
                }
                tokio::spawn(async move {
                    let mut send = respond.send_response(Response::new(()), false).unwrap();
                    let mut body = request.into_body();
                    while let Some(Ok(data)) = body.data().await {
                        body.flow_control().release_capacity(data.len()).unwrap();
                        send.send_data(data, false).unwrap();
                    }
                    send.send_data(Bytes::new(), true).unwrap();
                });
            }
        })
    })
}

async fn serve(rig: &Rig, pod: &Pod, protocol: UpstreamProtocol, extended: bool) {
    let chain = |http: &mut cairn_waypoint::snapshot::HttpChain| http.settings.http2_extended_connect = extended;
    let cluster = |cluster: &mut ClusterSettings| cluster.protocol = protocol;
    rig.serve(Config::default().http_with(WEB, &[pod.address], chain, cluster))
        .await;
}

/// Sends this as an HTTP/1.1 client, and what follows after the head of the answer; returns all that came.
async fn by_http1(rig: &Rig, path: &str) -> String {
    let mut stream = rig.open(WEB).await.unwrap().stream;
    let request = format!("GET {path} HTTP/1.1\r\nhost: web\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let mut all = String::from_utf8(head).unwrap();
    if all.starts_with("HTTP/1.1 101") {
        stream.write_all(b"ping").await.unwrap();
        stream.shutdown().await.unwrap();
        stream.read_to_string(&mut all).await.unwrap();
    }
    all
}

/// Asks by extended CONNECT; what came back for `ping` behind a 200, until the end.
async fn by_http2(rig: &Rig, kind: &str, path: &str) -> Result<(Response<()>, String), h2::Error> {
    let mut client = rig.http2(WEB).await.ready().await?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = format!("http://web{path}").parse().unwrap();
    *request.version_mut() = http::Version::HTTP_2;
    request.extensions_mut().insert(Protocol::from(kind));
    let (answer, mut send) = client.send_request(request, false)?;
    let (parts, mut body) = answer.await?.into_parts();
    if parts.status == StatusCode::OK {
        send.send_data("pi".into(), false)?;
        send.send_data("ng".into(), true)?;
    }
    let mut all = Vec::new();
    while let Some(data) = body.data().await {
        all.extend_from_slice(&data?);
    }
    Ok((Response::from_parts(parts, ()), String::from_utf8(all).unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_becomes_an_extended_connect_for_an_http2_endpoint() {
    let rig = Rig::start().await;
    let asked = Asked::default();
    let pod = rig.pod(10, switching_http2(&asked, true)).await;
    serve(&rig, &pod, UpstreamProtocol::Http2, false).await;
    let answer = by_http1(&rig, "/chat?a").await;
    assert!(answer.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "{answer}");
    assert!(
        answer.contains("\r\nupgrade: websocket\r\n") && answer.contains("\r\nconnection: upgrade\r\n"),
        "{answer}"
    );
    assert!(answer.ends_with("\r\n\r\nping"), "{answer}");
    assert_eq!(*asked.lock(), [r#"CONNECT http://web/chat?a Some("websocket")"#]);
    let told = rig.told(1).await;
    assert_eq!((told.status, told.sent, told.received), (Some(101), 4, 4));
    // One that is refused is answered as the endpoint says.
    let answer = by_http1(&rig, "/no").await;
    assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
    rig.settled().await;
    assert_eq!(
        pod.connects.load(std::sync::atomic::Ordering::SeqCst),
        1,
        "one connection serves both"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extended_connect_becomes_an_upgrade_for_an_http1_endpoint() {
    let rig = Rig::start().await;
    let asked = Asked::default();
    let pod = rig.pod(10, switching_http1(&asked)).await;
    serve(&rig, &pod, UpstreamProtocol::Http1, true).await;
    let (answer, echoed) = by_http2(&rig, "websocket", "/chat?a").await.unwrap();
    assert_eq!((answer.status(), echoed.as_str()), (StatusCode::OK, "ping"));
    assert!(!answer.headers().contains_key("upgrade") && !answer.headers().contains_key("connection"));
    assert_eq!(*asked.lock(), [r#"GET /chat?a Some("websocket")"#]);
    let told = rig.told(1).await;
    assert_eq!((told.status, told.sent, told.received), (Some(101), 4, 4));
    rig.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extended_connect_stays_one_between_http2_and_http2() {
    let rig = Rig::start().await;
    let asked = Asked::default();
    let pod = rig.pod(10, switching_http2(&asked, true)).await;
    serve(&rig, &pod, UpstreamProtocol::Downstream, true).await;
    let (answer, echoed) = by_http2(&rig, "websocket", "/chat").await.unwrap();
    assert_eq!((answer.status(), echoed.as_str()), (StatusCode::OK, "ping"));
    assert_eq!(*asked.lock(), [r#"CONNECT http://web/chat Some("websocket")"#]);
    let (answer, body) = by_http2(&rig, "websocket", "/no").await.unwrap();
    assert_eq!((answer.status(), body.as_str()), (StatusCode::FORBIDDEN, "not here"));
    // The chain serves no other kind, and nobody asks the endpoint.
    let (answer, _) = by_http2(&rig, "connect-udp", "/chat").await.unwrap();
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    assert_eq!(asked.lock().len(), 2);
    rig.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extended_connect_that_is_not_allowed_resets_its_stream_and_nothing_else() {
    let rig = Rig::start().await;
    let asked = Asked::default();
    let pod = rig.pod(10, switching_http2(&asked, true)).await;
    serve(&rig, &pod, UpstreamProtocol::Http2, false).await;
    let error = by_http2(&rig, "websocket", "/chat").await.unwrap_err();
    assert_eq!((error.reason(), error.is_reset()), (Some(h2::Reason::PROTOCOL_ERROR), true));
    assert_eq!(asked.lock().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_knows_no_extended_connect_is_a_failed_request() {
    let rig = Rig::start().await;
    let asked = Asked::default();
    let pod = rig.pod(10, switching_http2(&asked, false)).await;
    serve(&rig, &pod, UpstreamProtocol::Http2, false).await;
    let answer = tokio::time::timeout(Duration::from_secs(10), by_http1(&rig, "/chat"))
        .await
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert_eq!(rig.told(1).await.flags, "UR");
}
