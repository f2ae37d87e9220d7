//! Bad input on the data path: the proxy answers as it should, tells of it once, keeps nothing, and goes on.
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
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::SpiffeId;
use cairn_identity::{ClientTerms, Identity, generate::Authority};
use cairn_policy::route::{Forward, Target as RouteTarget};
use cairn_policy::timeout::RouteTimeouts;
use cairn_waypoint::upstream::{ClusterSettings, UpstreamProtocol};
use http::{Method, Request, StatusCode};
use http_body_util::Full;
use rig::{App, Config, Pod, Rig, Told, echo_app, fetch, id, route, routes};
use rustls::{ClientConfig, client::ResolvesClientCert};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

const WEB: &str = "10.96.1.10:80";
const DB: &str = "10.96.1.20:5432";
const ANY: &str = "10.96.1.30:7000";
const PATIENCE: Duration = Duration::from_secs(10);

async fn mesh() -> (Rig, Pod) {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let endpoints = [pod.address];
    rig.serve(
        Config::default()
            .http(WEB, &endpoints)
            .tcp(DB, &endpoints)
            .detect(ANY, &endpoints),
    )
    .await;
    (rig, pod)
}

/// The proxy still serves, and holds nothing.
async fn still_well(rig: &Rig) {
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.0, StatusCode::OK);
    rig.settled().await;
}

/// A client's TLS settings by the name that it goes by.
fn tls(authority: &Authority, as_: &SpiffeId) -> ClientConfig {
    let identity = Identity::fixed(authority.issue(as_).unwrap());
    ClientConfig::clone(
        &identity
            .client_config(&ClientTerms::hbone(["spiffe://cluster.local/"]))
            .unwrap(),
    )
}

async fn handshake(rig: &Rig, config: ClientConfig) -> std::io::Result<TlsStream<TcpStream>> {
    let name = rustls::pki_types::ServerName::from(rig.address.ip());
    timeout(PATIENCE, TlsConnector::from(Arc::new(config)).connect(name, rig.dial().await))
        .await
        .unwrap()
}

/// A client that has no certificate.
#[derive(Debug)]
struct Nobody;

impl ResolvesClientCert for Nobody {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn who_does_not_prove_to_be_of_the_mesh_gets_no_tunnel() {
    let (rig, _pod) = mesh().await;
    let stranger = Authority::new("stranger").unwrap();
    let mut without = tls(&rig.authority, &id("client"));
    without.client_auth_cert_resolver = Arc::new(Nobody);
    // It believes the proxy; the proxy does not believe it.
    let mut of_another_authority = tls(&rig.authority, &id("client"));
    of_another_authority.client_auth_cert_resolver = tls(&stranger, &id("client")).client_auth_cert_resolver;
    let of_another_domain = tls(&rig.authority, &SpiffeId::workload("evil.example", "app", "client").unwrap());
    for (round, (who, config)) in [
        ("nobody", without),
        ("another authority's", of_another_authority),
        ("another trust domain's", of_another_domain),
    ]
    .into_iter()
    .enumerate()
    {
        // With TLS 1.3 the client learns of it with its first read.
        if let Ok(mut stream) = handshake(&rig, config).await {
            let _ = stream
                .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                .await;
            let mut heard = Vec::new();
            let end = timeout(PATIENCE, stream.read_to_end(&mut heard))
                .await
                .expect("the connection ends");
            assert!(heard.is_empty() && end.is_err(), "{who}: {heard:?} {end:?}");
        }
        assert_eq!(
            rig.engine.proxy.live.handshakes_failed.load(Ordering::SeqCst),
            round as u64 + 1,
            "{who}"
        );
    }
    still_well(&rig).await;
}

#[tokio::test]
async fn what_is_no_tls_ends_the_connection_and_no_other() {
    let (rig, _pod) = mesh().await;
    for said in [
        &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..],
        &[0; 1000],
        b"\x16\x03\x01\xff\xff\xff",
        b"",
    ] {
        let mut stream = rig.dial().await;
        stream.write_all(said).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut heard))
            .await
            .expect("the connection ends");
        assert!(!String::from_utf8_lossy(&heard).contains("HTTP"), "{heard:?}");
    }
    // TLS, and then no HTTP/2.
    let mut stream = handshake(&rig, tls(&rig.authority, &id("client"))).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut Vec::new()))
        .await
        .expect("the connection ends");
    still_well(&rig).await;
}

#[tokio::test]
async fn unknown_authorities_are_refused_at_once_and_other_methods_are_not_found() {
    let (rig, _pod) = mesh().await;
    let client = rig.by_hand(id("client")).await;
    let unknown = [
        "web",
        "web.app.svc.cluster.local:80",
        "10.96.1.10",
        "10.96.1.10:0",
        "10.96.1.10:99999",
        "[::1]:80",
        "user@10.96.1.10:80",
        "10.96.1.010:80",
        "0.0.0.0:80",
    ];
    for authority in unknown {
        let mut client = client.clone().ready().await.unwrap();
        let (answer, _send) = client
            .send_request(Request::connect(authority).body(()).unwrap(), false)
            .unwrap();
        match timeout(PATIENCE, answer).await.expect("answered at once") {
            Ok(answer) => assert!(
                matches!(answer.status().as_u16(), 400 | 503),
                "{authority}: {}",
                answer.status()
            ),
            // What is no authority at all breaks HTTP/2.
            Err(error) => assert!(
                error.is_reset() && error.reason() == Some(h2::Reason::PROTOCOL_ERROR),
                "{authority}: {error}"
            ),
        }
    }
    for method in [Method::GET, Method::POST, Method::OPTIONS] {
        let mut client = client.clone().ready().await.unwrap();
        let request = Request::builder()
            .method(method.clone())
            .uri("http://10.96.1.10:80/")
            .body(())
            .unwrap();
        let (answer, _) = client.send_request(request, true).unwrap();
        assert_eq!(
            timeout(PATIENCE, answer).await.unwrap().unwrap().status(),
            StatusCode::NOT_FOUND,
            "{method}"
        );
    }
    drop(client);
    still_well(&rig).await;
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// HPACK: a field whose name is in the static table (or, for 0, given), not to be indexed.
fn field(index: u8, name: &str, value: &[u8]) -> Vec<u8> {
    let mut out = vec![index];
    for text in [name.as_bytes(), value].into_iter().skip(usize::from(index != 0)) {
        match text.len() {
            short @ ..127 => out.push(short as u8),
            long => {
                out.push(127);
                let mut rest = long - 127;
                while rest >= 128 {
                    out.push((rest % 128) as u8 | 128);
                    rest /= 128;
                }
                out.push(rest as u8);
            }
        }
        out.extend_from_slice(text);
    }
    out
}

/// A tunnel connection on which HTTP/2 has begun.
async fn raw_tunnel(rig: &Rig) -> TlsStream<TcpStream> {
    let mut stream = handshake(rig, tls(&rig.authority, &id("client"))).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    stream
}

#[tokio::test]
async fn malformed_heads_of_tunnels_are_refused_and_served_neighbours_go_on() {
    let (rig, pod) = mesh().await;
    let connect = |authority: &[u8]| [field(2, "", b"CONNECT"), field(1, "", authority)].concat();
    let heads = [
        ("no authority", field(2, "", b"CONNECT")),
        ("an empty authority", connect(b"")),
        ("a NUL", connect(b"10.96.1.10:80\0")),
        ("a space", connect(b"10.96. 1.10:80")),
        ("bytes that are no text", connect(b"\xff\xfe:80")),
        ("a huge authority", connect(&[b'a'; 15_000])),
        ("a path in CONNECT", [connect(WEB.as_bytes()), field(4, "", b"/")].concat()),
        (
            "an upper-case name",
            [connect(WEB.as_bytes()), field(0, "X-Up", b"1")].concat(),
        ),
        (
            "a connection header",
            [connect(WEB.as_bytes()), field(0, "connection", b"close")].concat(),
        ),
        ("a broken field", vec![0x40, 0x85]),
        ("a field of no table", vec![0xff, 0xff, 0xff, 0x7f]),
    ];
    for (what, head) in heads {
        let mut stream = raw_tunnel(&rig).await;
        stream.write_all(&frame(HEADERS, END_HEADERS, 1, &head)).await.unwrap();
        // Something that says no: HEADERS with an error, RST_STREAM, or GOAWAY.
        let answer = async {
            loop {
                let mut head = [0; 9];
                if stream.read_exact(&mut head).await.is_err() {
                    return "closed";
                }
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let mut payload = vec![0; length];
                if stream.read_exact(&mut payload).await.is_err() {
                    return "closed";
                }
                match head[3] {
                    // `:status 200` is the eighth entry of the static table.
                    HEADERS => return if payload[0] == 0x88 { "accepted" } else { "answered" },
                    3 | 7 => return "reset",
                    _ => {}
                }
            }
        };
        let answer = timeout(PATIENCE, answer)
            .await
            .unwrap_or_else(|_| panic!("{what}: nothing came back"));
        assert_ne!(answer, "accepted", "{what}");
    }
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0);
    still_well(&rig).await;
}

#[tokio::test]
async fn a_head_of_a_tunnel_that_never_ends_is_ended() {
    let (rig, _pod) = mesh().await;
    let mut stream = raw_tunnel(&rig).await;
    let mut sent = stream.write_all(&frame(HEADERS, 0, 1, &field(2, "", b"CONNECT"))).await;
    let piece = frame(CONTINUATION, 0, 1, &field(0, "x", &[b'x'; 8000]));
    let mut count = 0;
    while sent.is_ok() && count < 5000 {
        sent = timeout(PATIENCE, stream.write_all(&piece))
            .await
            .expect("the proxy reads or ends");
        count += 1;
    }
    assert!(sent.is_err(), "40 MB of one head were taken");
    still_well(&rig).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_streams_that_are_opened_and_reset_leave_nothing() {
    let (rig, _pod) = mesh().await;
    let mut client = rig.by_hand(id("client")).await;
    for number in 0..10_000 {
        let authority = [WEB, DB, ANY, "10.96.9.9:9"][number % 4];
        loop {
            let ready = timeout(PATIENCE, client.clone().ready())
                .await
                .expect("the tunnel goes on or ends");
            let request = Request::connect(authority).body(()).unwrap();
            // Some are reset before and some after they were looked at.
            match ready.map(|mut ready| ready.send_request(request, false)) {
                Ok(Ok((answer, mut send))) => {
                    if number % 8 < 4 {
                        send.send_reset(h2::Reason::CANCEL);
                    } else if number % 16 < 8 {
                        let _ = send.send_data(Bytes::from_static(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n"), false);
                        let _ = timeout(Duration::from_millis(1), answer).await;
                    }
                    break;
                }
                // Too many resets that nobody had looked at end the tunnel; the next one is another client's.
                Ok(Err(_)) | Err(_) => client = rig.by_hand(id("client")).await,
            }
        }
    }
    drop(client);
    still_well(&rig).await;
    let live = &rig.engine.proxy.live;
    let ended = async {
        // The client's pool has a tunnel of its own.
        while live.tunnels.load(Ordering::SeqCst) > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, ended).await.expect("the tunnels are gone");
}

/// Sends raw bytes into an HTTP tunnel and checks status, end, and the one line that is told.
async fn answered(rig: &Rig, bytes: &[u8], status: u16, details: &str) -> String {
    let before = rig.told.lock().len();
    let (answer, error) = rig.raw(WEB, bytes).await;
    let said = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]);
    assert!(
        answer.starts_with(&format!("HTTP/1.1 {status} ")),
        "{said:?} -> {answer:?} {error:?}"
    );
    assert!(
        error.is_none() && answer.contains("connection: close"),
        "{said:?} -> {answer:?} {error:?}"
    );
    let told = rig.told(before + 1).await;
    rig.settled().await;
    assert_eq!(rig.told.lock().len(), before + 1, "told of once: {said:?}");
    assert_eq!((told.status, told.details.as_str()), (Some(status), details), "{said:?}");
    answer
}

#[tokio::test]
async fn requests_whose_framing_is_doubtful_are_refused() {
    let (rig, pod) = mesh().await;
    let codec = "http1.codec_error";
    let both = "http1.content_length_and_chunked_not_allowed";
    let cases = [
        ("content-length: 3\r\ntransfer-encoding: chunked\r\n", both),
        ("Transfer-Encoding: Chunked\r\nContent-Length: 0\r\n", both),
        ("content-length: 3\ntransfer-encoding: chunked\n", both),
        ("content-length: 3\r\ncontent-length: 4\r\n", codec),
        ("content-length: -1\r\n", codec),
        ("content-length: +3\r\n", codec),
        ("content-length: 3, 4\r\n", codec),
        ("content-length: 0x3\r\n", codec),
        ("content-length: 99999999999999999999999\r\n", codec),
        ("transfer-encoding : chunked\r\n", codec),
        ("transfer-encoding: chunked, gzip\r\n", codec),
        ("transfer-encoding: gzip\r\n", codec),
        ("x: 1\r\n folded\r\n", codec),
        ("x: a\0b\r\n", codec),
        ("no colon\r\n", codec),
        (": no name\r\n", codec),
    ];
    for (fields, details) in cases {
        let request = format!("POST / HTTP/1.1\r\nhost: web\r\n{fields}\r\n3\r\nabc\r\n0\r\n\r\n");
        answered(&rig, request.as_bytes(), 400, details).await;
    }
    for request in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "GET  / HTTP/1.1\r\nhost: a\r\n\r\n",
        "G\u{e9}T / HTTP/1.1\r\nhost: a\r\n\r\n",
    ] {
        answered(&rig, request.as_bytes(), 400, codec).await;
    }
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0, "nothing of it went on");
    still_well(&rig).await;
}

#[tokio::test]
async fn a_refused_head_is_answered_however_it_is_cut() {
    let (rig, _pod) = mesh().await;
    let request = b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    for piece in [1, 7, 30] {
        let mut stream = rig.open(WEB).await.unwrap().stream;
        for part in request.chunks(piece) {
            let _ = stream.write_all(part).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut answer = Vec::new();
        let end = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
        assert!(
            end.is_ok() && answer.starts_with(b"HTTP/1.1 400 "),
            "pieces of {piece}: {:?} {end:?}",
            String::from_utf8_lossy(&answer)
        );
    }
    still_well(&rig).await;
}

#[tokio::test]
async fn heads_over_the_limits_are_answered_431() {
    let (rig, pod) = mesh().await;
    let long = format!("GET / HTTP/1.1\r\nhost: web\r\nx: {}\r\n\r\n", "y".repeat(70_000));
    answered(&rig, long.as_bytes(), 431, "http1.headers_too_large").await;
    let endless = format!("GET / HTTP/1.1\r\nhost: web\r\nx: {}", "y".repeat(2_000_000));
    answered(&rig, endless.as_bytes(), 431, "http1.headers_too_large").await;
    let many: String = (0..150).map(|number| format!("x-{number}: 1\r\n")).collect();
    answered(
        &rig,
        format!("GET / HTTP/1.1\r\nhost: web\r\n{many}\r\n").as_bytes(),
        431,
        "http1.headers_too_large",
    )
    .await;
    // The same in HTTP/2.
    let client = rig.http2(WEB).await;
    for (size, count) in [(70_000, 1), (1, 150)] {
        let mut request = Request::get("http://web/");
        for number in 0..count {
            request = request.header(format!("x-{number}"), "y".repeat(size));
        }
        let (answer, _) = client
            .clone()
            .ready()
            .await
            .unwrap()
            .send_request(request.body(()).unwrap(), true)
            .unwrap();
        assert_eq!(
            timeout(PATIENCE, answer).await.unwrap().unwrap().status().as_u16(),
            431,
            "{size} × {count}"
        );
    }
    drop(client);
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0);
    still_well(&rig).await;
}

#[tokio::test]
async fn a_head_that_comes_too_slowly_is_answered_408() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let limit = Duration::from_millis(300);
    rig.serve(Config::default().http_with(
        WEB,
        &[pod.address],
        |http| http.settings.request_headers_timeout = Some(limit),
        |_| {},
    ))
    .await;
    let mut stream = rig.open(WEB).await.unwrap().stream;
    // A first request, and then silence for longer than a head may take: that is no head.
    stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
    let mut answer = vec![0; 4096];
    let read = stream.read(&mut answer).await.unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 200 OK"));
    tokio::time::sleep(2 * limit).await;
    // Then one byte after the other.
    let since = tokio::time::Instant::now();
    let (mut read, mut write) = tokio::io::split(stream);
    let drip = tokio::spawn(async move {
        for byte in b"GET / HTTP/1.1\r\nhost: web\r\nx: "
            .iter()
            .chain(std::iter::repeat(&b'y'))
            .take(1000)
        {
            if write.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("1,000 bytes in 20 s were taken");
    });
    let mut answer = Vec::new();
    timeout(PATIENCE, read.read_to_end(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.contains("HTTP/1.1 408 Request Timeout"), "{answer}");
    assert!(
        since.elapsed() >= limit && since.elapsed() < 10 * limit,
        "{:?}",
        since.elapsed()
    );
    let told = rig.told(2).await;
    assert_eq!((told.status, told.details.as_str()), (Some(408), "request_header_timeout"));
    timeout(PATIENCE, drip).await.unwrap().unwrap();
    still_well(&rig).await;
}

#[tokio::test]
async fn an_inner_connection_without_requests_ends_after_its_idle_time() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let limit = Duration::from_millis(300);
    rig.serve(Config::default().http_with(WEB, &[pod.address], |http| http.settings.idle_timeout = Some(limit), |_| {}))
        .await;
    let mut stream = rig.open(WEB).await.unwrap().stream;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer))
        .await
        .expect("it ends")
        .expect("and well");
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
    let (mut sender, connection) = h2::client::handshake(rig.open(WEB).await.unwrap().stream).await.unwrap();
    let ended = tokio::spawn(connection);
    let (answer, _) = sender
        .send_request(Request::get("http://web/").body(()).unwrap(), true)
        .unwrap();
    assert_eq!(answer.await.unwrap().status(), StatusCode::OK);
    timeout(PATIENCE, ended)
        .await
        .expect("GOAWAY, then the end")
        .unwrap()
        .unwrap();
    still_well(&rig).await;
}

#[tokio::test]
async fn what_follows_a_body_is_not_part_of_it() {
    let (rig, _pod) = mesh().await;
    let (answer, _) = rig
        .raw(
            WEB,
            b"POST /one HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\n\r\nabcdefg\r\n\r\n",
        )
        .await;
    assert!(answer.contains("web /one 3HTTP/1.1 400 Bad Request"), "{answer}");
    // HTTP/2 tells where a body ends: more and less than was promised break it, and the endpoint does not take it for whole.
    for (promised, sent) in [("3", &b"abcdefg"[..]), ("30", b"abc")] {
        let mut client = rig.http2(WEB).await.ready().await.unwrap();
        let request = Request::post("http://web/two")
            .header("content-length", promised)
            .body(())
            .unwrap();
        let (answer, mut send) = client.send_request(request, false).unwrap();
        send.send_data(Bytes::copy_from_slice(sent), true).unwrap();
        let answer = timeout(PATIENCE, answer).await.expect("an end");
        assert!(
            answer
                .as_ref()
                .map_or(true, |answer| answer.status() == StatusCode::BAD_REQUEST),
            "{promised}: {answer:?}"
        );
    }
    still_well(&rig).await;
}

#[tokio::test]
async fn a_body_that_is_cut_is_not_taken_for_whole() {
    let (tell, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let rig = Rig::start().await;
    let app: App = Arc::new(move |mut stream, _| {
        let tell = tell.clone();
        Box::pin(async move {
            let mut heard = Vec::new();
            let end = stream.read_to_end(&mut heard).await;
            tell.send((end.is_err(), heard.ends_with(b"0\r\n\r\n"))).unwrap();
        })
    });
    let pod = rig.pod(10, app).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    for head in [
        "content-length: 100\r\n\r\nhalf",
        "transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        for reset in [false, true] {
            let mut stream = rig.open(WEB).await.unwrap().stream;
            stream
                .write_all(format!("POST / HTTP/1.1\r\nhost: web\r\n{head}").as_bytes())
                .await
                .unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            if reset {
                stream.reset(h2::Reason::CANCEL);
            } else {
                stream.shutdown().await.unwrap();
                let _ = timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.expect("an end");
            }
            let (cut, whole) = timeout(PATIENCE, ends.recv()).await.expect("the endpoint is told").unwrap();
            assert!(cut || !whole, "{head:?} reset {reset}: the endpoint took it for whole");
        }
    }
    rig.settled().await;
    assert_eq!(rig.told.lock().len(), 4);
}

/// A pod that says this to every request, and then ends or waits.
fn says(words: &'static [u8], ends: bool) -> App {
    Arc::new(move |mut stream, _| {
        Box::pin(async move {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(words).await;
            if ends {
                let _ = stream.shutdown().await;
            }
            let _ = stream.read(&mut [0; 4096]).await;
        })
    })
}

fn within(limit: Duration) -> Forward {
    let timeouts = RouteTimeouts {
        timeout: Some(limit),
        ..RouteTimeouts::default()
    };
    Forward {
        timeouts,
        ..Forward::to(RouteTarget::Cluster("inbound-vip|80|http|10.96.1.10".into()))
    }
}

async fn told_once(rig: &Rig, round: usize) -> Told {
    let told = rig.told(round).await;
    rig.settled().await;
    assert_eq!(rig.told.lock().len(), round, "told of once");
    told
}

#[tokio::test]
async fn a_destination_that_speaks_garbage_is_a_bad_gateway() {
    let rig = Rig::start().await;
    let huge: &'static [u8] = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(600_000))
        .leak()
        .as_bytes();
    let many: String = (0..300).map(|number| format!("x-{number}: 1\r\n")).collect();
    let many: &'static [u8] = format!("HTTP/1.1 200 OK\r\n{many}\r\n").leak().as_bytes();
    let cases: [&'static [u8]; 7] = [
        b"garbage\r\n\r\n",
        b"\0\x01\x02\x03",
        b"HTTP/1.1 999999 What\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        huge,
        many,
    ];
    let mut pods = Vec::new();
    for (round, words) in cases.into_iter().enumerate() {
        let pod = rig.pod(10 + round as u8, says(words, false)).await;
        let config = Config::default().http(WEB, &[pod.address]);
        if round == 0 {
            rig.serve(config).await
        } else {
            rig.publish(config)
        }
        let said = String::from_utf8_lossy(&words[..words.len().min(60)]).into_owned();
        let mut client = rig.http1(WEB).await;
        let (status, _, body) = timeout(PATIENCE, fetch(&mut client, "/")).await.expect("an answer");
        assert_eq!(
            (status, &body[..]),
            (
                StatusCode::BAD_GATEWAY,
                &b"upstream connect error or disconnect/reset before headers. reset reason: protocol error"[..]
            ),
            "{said:?}"
        );
        drop(client);
        let told = told_once(&rig, round + 1).await;
        assert_eq!((told.flags.as_str(), told.attempts), ("UPE", 1), "{said:?}");
        pods.push(pod);
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_or_breaks_the_rules_is_cut_for_the_client_too() {
    let rig = Rig::start().await;
    let cases: [(&'static [u8], bool, &str); 4] = [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf", true, "half"),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
            true,
            "half",
        ),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n",
            false,
            "half",
        ),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
            false,
            "",
        ),
    ];
    let mut pods = Vec::new();
    for (round, (words, ends, part)) in cases.into_iter().enumerate() {
        let pod = rig.pod(10 + round as u8, says(words, ends)).await;
        let config = Config::default().http(WEB, &[pod.address]);
        if round == 0 {
            rig.serve(config).await
        } else {
            rig.publish(config)
        }
        let said = String::from_utf8_lossy(words);
        let (answer, error) = rig.raw(WEB, b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
        assert!(answer.is_empty() || answer.contains(part), "{said:?} -> {answer:?}");
        assert_eq!(
            error.map(|error| error.kind()),
            Some(std::io::ErrorKind::ConnectionReset),
            "{said:?} -> {answer:?}"
        );
        // And in HTTP/2.
        let mut client = rig.http2(WEB).await.ready().await.unwrap();
        let (answer, _) = client
            .send_request(Request::get("http://web/").body(()).unwrap(), true)
            .unwrap();
        // The head may be lost with the rest, where nobody had time to send it.
        let end = match timeout(PATIENCE, answer).await.expect("the answer begins or ends") {
            Err(error) => Some(error),
            Ok(answer) => {
                let mut body = answer.into_body();
                let mut end = None;
                while let Some(data) = timeout(PATIENCE, body.data()).await.expect("the answer ends") {
                    end = data.err();
                    if end.is_some() {
                        break;
                    }
                }
                end
            }
        };
        assert!(end.is_some_and(|error| error.is_reset()), "{said:?}");
        drop(client);
        let told = told_once(&rig, 2 * round + 2).await;
        assert!(
            matches!(told.flags.as_str(), "UC" | "UPE") && told.details.starts_with("upstream_reset_after_response_started"),
            "{said:?}: {told:?}"
        );
        pods.push(pod);
    }
}

#[tokio::test]
async fn a_destination_that_is_told_http2_and_speaks_otherwise_is_an_error() {
    let rig = Rig::start().await;
    let mut pods = Vec::new();
    for (round, (words, ends)) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], true),
        (b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", true),
        (b"", true),
    ]
    .into_iter()
    .enumerate()
    {
        let pod = rig.pod(10 + round as u8, says(words, ends)).await;
        let http2 = |cluster: &mut ClusterSettings| cluster.protocol = UpstreamProtocol::Http2;
        let config = Config::default().http_with(WEB, &[pod.address], |_| {}, http2);
        if round == 0 {
            rig.serve(config).await
        } else {
            rig.publish(config)
        }
        let mut client = rig.http1(WEB).await;
        let (status, _, body) = timeout(PATIENCE, fetch(&mut client, "/")).await.expect("an answer");
        assert!(
            matches!(status.as_u16(), 502 | 503) && body.starts_with(b"upstream connect error"),
            "{round}: {status} {body:?}"
        );
        drop(client);
        told_once(&rig, round + 1).await;
        pods.push(pod);
    }
}

#[tokio::test]
async fn a_destination_that_refuses_or_hangs_is_told_of_in_time() {
    let rig = Rig::start().await;
    // Takes the connection and never speaks TLS.
    let silent = TcpListener::bind(SocketAddr::new(rig.ip(50), 15008)).await.unwrap();
    let held = tokio::spawn(async move {
        let mut all = Vec::new();
        while let Ok((stream, _)) = silent.accept().await {
            all.push(stream);
        }
    });
    // Answers no CONNECT; answers no request.
    let mute = rig
        .pod_that(51, |connect| {
            drop(tokio::spawn(async move {
                let _held = connect;
                std::future::pending::<()>().await
            }))
        })
        .await;
    let hanging = rig.pod(52, says(b"", false)).await;
    let slow: App = Arc::new(|mut stream, _| {
        Box::pin(async move {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await;
            std::future::pending::<()>().await;
        })
    });
    let slow = rig.pod(53, slow).await;
    let limit = Duration::from_millis(400);
    let cases = [
        (SocketAddr::new(rig.ip(99), 8080), 503, "UF"),
        (SocketAddr::new(rig.ip(50), 8080), 504, "UT"),
        (mute.address, 504, "UT"),
        (hanging.address, 504, "UT"),
    ];
    for (round, (address, status, flags)) in cases.into_iter().enumerate() {
        let config = Config::default().http_with(
            WEB,
            &[address],
            |http| http.routes = routes(vec![route("/", within(limit))]),
            |_| {},
        );
        if round == 0 {
            rig.serve(config).await
        } else {
            rig.publish(config)
        }
        let mut client = rig.http1(WEB).await;
        let (answer, _, _) = timeout(PATIENCE, fetch(&mut client, "/")).await.expect("an answer in time");
        drop(client);
        assert_eq!(
            (answer.as_u16(), told_once(&rig, round + 1).await.flags.as_str()),
            (status, flags),
            "{address}"
        );
    }
    // An answer that stops in its middle is cut when its time is over.
    rig.publish(Config::default().http_with(
        WEB,
        &[slow.address],
        |http| http.routes = routes(vec![route("/", within(limit))]),
        |_| {},
    ));
    let (answer, error) = rig.raw(WEB, b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert!(answer.ends_with("half") && error.is_some(), "{answer:?} {error:?}");
    assert_eq!(told_once(&rig, 5).await.flags, "UT");
    held.abort();
}

#[tokio::test]
async fn a_client_that_gives_up_leaves_no_request_behind() {
    let rig = Rig::start().await;
    let (tell, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let app: App = Arc::new(move |mut stream, _| {
        let tell = tell.clone();
        Box::pin(async move {
            let _ = stream.read(&mut [0; 4096]).await;
            tell.send("asked").unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
            tell.send("left").unwrap();
        })
    });
    let pod = rig.pod(10, app).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    // HTTP/1: the connection is reset while its request waits for an answer; HTTP/2: the stream.
    let mut stream = rig.open(WEB).await.unwrap().stream;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
    assert_eq!(timeout(PATIENCE, ends.recv()).await.unwrap(), Some("asked"));
    stream.reset(h2::Reason::CANCEL);
    assert_eq!(
        timeout(PATIENCE, ends.recv()).await.expect("the endpoint is told"),
        Some("left")
    );
    let client = rig.http2(WEB).await;
    let (answer, mut send) = client
        .clone()
        .ready()
        .await
        .unwrap()
        .send_request(Request::get("http://web/").body(()).unwrap(), false)
        .unwrap();
    assert_eq!(timeout(PATIENCE, ends.recv()).await.unwrap(), Some("asked"));
    send.send_reset(h2::Reason::CANCEL);
    drop(answer);
    assert_eq!(
        timeout(PATIENCE, ends.recv()).await.expect("the endpoint is told"),
        Some("left")
    );
    rig.quiet().await;
    let told: Vec<_> = rig.told.lock().iter().map(|told| (told.status, told.flags.clone())).collect();
    assert_eq!(told, [(None, "DC".to_owned()), (None, "DC".to_owned())]);
    drop((client, send));
    rig.settled().await;
}

#[tokio::test]
async fn an_endless_answer_waits_for_its_reader() {
    let rig = Rig::start().await;
    let (tell, mut written) = tokio::sync::watch::channel(0usize);
    let app: App = Arc::new(move |mut stream, _| {
        let tell = tell.clone();
        Box::pin(async move {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            while stream.write_all(&[b'x'; 16 * 1024]).await.is_ok() {
                tell.send_modify(|count| *count += 16 * 1024);
            }
        })
    });
    let pod = rig.pod(10, app).await;
    rig.serve(Config::default().http(WEB, &[pod.address])).await;
    let mut client = rig.http1(WEB).await;
    let answer = client
        .send_request(
            Request::get("/")
                .header("host", "web")
                .body(Full::<Bytes>::default())
                .unwrap(),
        )
        .await
        .unwrap();
    // Until nothing more is taken: the windows and buffers on the way are full.
    while timeout(Duration::from_millis(500), written.changed()).await.is_ok() {
        assert!(
            *written.borrow_and_update() < 64 << 20,
            "the proxy takes more than it can pass on"
        );
    }
    drop((answer, client));
    rig.settled().await;
}

#[tokio::test]
async fn refusals_are_counted() {
    let (rig, _pod) = mesh().await;
    assert_eq!(
        rig.open("10.96.9.9:9").await.unwrap_err().status(),
        Some(StatusCode::SERVICE_UNAVAILABLE)
    );
    assert_eq!(rig.engine.proxy.live.refused.load(Ordering::SeqCst), 1);
}
