//! Who may not have a tunnel, and HTTP/2 of tunnels that is none.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::SpiffeId;
use cairn_identity::generate::Authority;
use http::{Method, Request, StatusCode};
use rustls::client::ResolvesClientCert;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use crate::{
    ANY, DB, PATIENCE, WEB, mesh,
    rig::{Config, Rig, echo_app, id},
    still_well,
    wire::{CONTINUATION, END_HEADERS, HEADERS, field, frame, handshake, raw_tunnel, tls},
};

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

#[tokio::test]
async fn refusals_are_counted() {
    let (rig, _pod) = mesh().await;
    assert_eq!(
        rig.open("10.96.9.9:9").await.unwrap_err().status(),
        Some(StatusCode::SERVICE_UNAVAILABLE)
    );
    assert_eq!(rig.engine.proxy.live.refused.load(Ordering::SeqCst), 1);
}

/// Whether GOAWAY with ENHANCE_YOUR_CALM comes, and then the end.
async fn is_told_to_calm_down(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> bool {
    let mut calm = false;
    let reading = async {
        loop {
            let mut head = [0; 9];
            if stream.read_exact(&mut head).await.is_err() {
                return;
            }
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            stream.read_exact(&mut payload).await.unwrap();
            calm |= head[3] == 7 && payload[4..8] == [0, 0, 0, 11];
        }
    };
    timeout(PATIENCE, reading).await.expect("the connection ends");
    calm
}

#[tokio::test]
async fn a_head_that_is_not_finished_in_time_ends_its_connection_and_no_other() {
    let limit = Duration::from_millis(300);
    let rig = Rig::start_with(|settings| settings.tunnel_server.head_timeout = limit).await;
    let pod = rig.pod(10, echo_app("web")).await;
    let config = Config::default().http_with(
        WEB,
        &[pod.address],
        |http| http.settings.request_headers_timeout = Some(limit),
        |_| {},
    );
    rig.serve(config).await;
    let unfinished = [
        frame(HEADERS, 0, 1, &field(2, "", b"GET")),
        frame(HEADERS, END_HEADERS, 1, &field(2, "", b"GET"))[..12].to_vec(),
        frame(6, 0, 0, &[0; 8])[..5].to_vec(),
    ];
    for bytes in unfinished {
        let mut tunnel = raw_tunnel(&rig).await;
        let mut inner = rig.open(WEB).await.unwrap().stream;
        inner.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        inner.write_all(&frame(4, 0, 0, &[])).await.unwrap();
        tunnel.write_all(&bytes).await.unwrap();
        inner.write_all(&bytes).await.unwrap();
        assert!(is_told_to_calm_down(&mut tunnel).await, "{bytes:?} in a tunnel");
        assert!(is_told_to_calm_down(&mut inner).await, "{bytes:?} within");
    }
    // Who is silent between frames, or within DATA, is not late.
    let mut silent = rig.http2(WEB).await;
    let (answer, mut send) = silent
        .send_request(Request::post("http://web/").body(()).unwrap(), false)
        .unwrap();
    tokio::time::sleep(3 * limit).await;
    send.send_data(Bytes::from_static(b"late"), true).unwrap();
    assert_eq!(timeout(PATIENCE, answer).await.unwrap().unwrap().status(), StatusCode::OK);
    drop((silent, send));
    still_well(&rig).await;
}
