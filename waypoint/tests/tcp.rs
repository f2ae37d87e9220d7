//! Bytes through the proxy: declared TCP ports, ports of unknown protocol, and what becomes of their ends.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{
    io::ErrorKind,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use cairn_hbone::TunnelStream;
use cairn_waypoint::{
    snapshot::TcpChain,
    upstream::{ClusterSettings, Target, TcpKeepalive},
};
use http::{HeaderMap, Request, StatusCode};
use rig::{App, Config, Rig, echo_app, fetch, mirror, tunnels};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy, split},
    net::{TcpListener, TcpStream},
    time::timeout,
};

const DB: &str = "10.96.1.20:5432";
const PATIENCE: Duration = Duration::from_secs(10);

/// Does with the stream what the closure says.
fn app<F, Fut>(act: F) -> App
where
    F: Fn(TunnelStream) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    Arc::new(move |stream, _| Box::pin(act(stream)))
}

/// A plain server that does with each connection what the closure says.
async fn plain<F, Fut>(rig: &Rig, last: u8, act: F) -> SocketAddr
where
    F: Fn(TcpStream) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(SocketAddr::new(rig.ip(last), 5432)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(act(stream));
        }
    });
    address
}

async fn exchange(stream: &mut TunnelStream, said: &[u8]) -> Vec<u8> {
    stream.write_all(said).await.unwrap();
    stream.shutdown().await.unwrap();
    read_all(stream).await.unwrap()
}

async fn read_all(stream: &mut TunnelStream) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut all))
        .await
        .expect("the stream ends")?;
    Ok(all)
}

async fn open(rig: &Rig) -> TunnelStream {
    rig.open(DB).await.unwrap().stream
}

/// Status and text with which a CONNECT is refused.
async fn refused(rig: &Rig) -> (StatusCode, String) {
    let error = timeout(PATIENCE, rig.open(DB)).await.unwrap().unwrap_err();
    (error.status().unwrap_or_else(|| panic!("{error}")), error.to_string())
}

fn plainly(address: SocketAddr) -> Vec<Target> {
    vec![Target::Plain(address)]
}

fn with(config: Config, endpoints: Vec<Target>, chain: impl FnOnce(&mut TcpChain)) -> Config {
    config.tcp_with(DB, endpoints, chain, |_: &mut ClusterSettings| {})
}

#[tokio::test]
async fn bytes_go_both_ways_and_both_ends_are_passed_on() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    let plain = plain(&rig, 20, |mut stream| async move {
        let (mut read, mut write) = stream.split();
        let _ = copy(&mut read, &mut write).await;
    })
    .await;
    for (round, endpoints) in [tunnels(&[pod.address]), plainly(plain)].into_iter().enumerate() {
        let config = with(Config::default(), endpoints.clone(), |_| {});
        if round == 0 {
            rig.serve(config).await;
        } else {
            rig.publish(config);
        }
        assert_eq!(exchange(&mut open(&rig).await, b"hello").await, b"hello", "{endpoints:?}");
        let told = rig.told(round + 1).await;
        assert_eq!((told.flags.as_str(), told.received, told.sent), ("-", 5, 5), "{endpoints:?}");
        rig.settled().await;
    }
}

#[tokio::test]
async fn the_endpoint_is_connected_before_the_connect_is_answered() {
    let rig = Rig::start().await;
    let (release, held) = tokio::sync::watch::channel(false);
    let pod = rig
        .pod_that(10, move |connect| {
            let mut held = held.clone();
            tokio::spawn(async move {
                held.wait_for(|open| *open).await.unwrap();
                let mut stream = connect.accept(HeaderMap::new()).unwrap();
                stream.shutdown().await.unwrap();
                let _ = stream.read(&mut [0]).await;
            });
        })
        .await;
    rig.serve(Config::default().tcp(DB, &[pod.address])).await;
    let mut opening = Box::pin(rig.open(DB));
    assert!(
        timeout(Duration::from_millis(200), &mut opening).await.is_err(),
        "answered before the endpoint was there"
    );
    assert_eq!(pod.connects.load(Ordering::SeqCst), 1);
    release.send(true).unwrap();
    assert_eq!(read_all(&mut opening.await.unwrap().stream).await.unwrap(), b"");
}

#[tokio::test]
async fn a_client_that_leaves_while_its_endpoint_is_connected_leaves_nothing() {
    let rig = Rig::start().await;
    let pod = rig
        .pod_that(10, |connect| {
            drop(tokio::spawn(async move {
                let _held = connect;
                std::future::pending::<()>().await
            }))
        })
        .await;
    rig.serve(Config::default().tcp(DB, &[pod.address])).await;
    assert!(timeout(Duration::from_millis(200), rig.open(DB)).await.is_err());
    rig.settled().await;
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_left_for_another_and_told_of_when_it_is_the_last() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    let refusing = rig
        .pod_that(11, |connect| {
            connect.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new(), "no")
        })
        .await;
    let nobody = SocketAddr::new(rig.ip(99), 8080);
    rig.serve(Config::default().tcp(DB, &[pod.address, refusing.address, nobody]))
        .await;
    for _ in 0..20 {
        assert_eq!(exchange(&mut open(&rig).await, b"x").await, b"x");
    }
    for (endpoint, why) in [(nobody, "Connection_refused"), (refusing.address, "503")] {
        rig.publish(Config::default().tcp(DB, &[endpoint]));
        let (status, text) = refused(&rig).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.contains("no connection to an endpoint") && text.contains(why), "{text}");
    }
    rig.publish(with(Config::default(), plainly(nobody), |_| {}));
    assert_eq!(refused(&rig).await.0, StatusCode::SERVICE_UNAVAILABLE);
    let told = rig.told(23).await;
    assert_eq!((told.flags.as_str(), told.attempts), ("UF", 3), "{told:?}");
    rig.settled().await;
}

#[tokio::test]
async fn a_service_without_endpoints_or_cluster_says_so() {
    let rig = Rig::start().await;
    rig.serve(Config::default().tcp(DB, &[])).await;
    let (status, text) = refused(&rig).await;
    assert!(
        status == StatusCode::SERVICE_UNAVAILABLE && text.contains("no healthy endpoint"),
        "{text}"
    );
    assert_eq!(rig.told(1).await.flags, "UH");
    rig.publish(with(Config::default(), Vec::new(), |tcp| {
        tcp.targets = vec![("gone".into(), 1)]
    }));
    let (status, text) = refused(&rig).await;
    assert!(
        status == StatusCode::SERVICE_UNAVAILABLE && text.contains("does not exist"),
        "{text}"
    );
    assert_eq!(rig.told(2).await.flags, "NC");
}

#[tokio::test]
async fn a_chain_that_cannot_be_enforced_refuses_without_asking_the_endpoint() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    rig.serve(
        Config::default()
            .tcp(DB, &[pod.address])
            .refusing("envoy.filters.network.rbac"),
    )
    .await;
    let (status, text) = refused(&rig).await;
    assert!(
        status == StatusCode::FORBIDDEN && text.contains("envoy.filters.network.rbac"),
        "{text}"
    );
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn big_transfers_arrive_whole_in_both_directions() {
    const SIZE: usize = 8 << 20;
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    let plain = plain(&rig, 20, |mut stream| async move {
        let (mut read, mut write) = stream.split();
        let _ = copy(&mut read, &mut write).await;
    })
    .await;
    rig.serve(Config::default().tcp(DB, &[pod.address])).await;
    for endpoints in [tunnels(&[pod.address]), plainly(plain)] {
        rig.publish(with(Config::default(), endpoints.clone(), |_| {}));
        let (mut read, mut write) = split(open(&rig).await);
        let said: Vec<u8> = (0..SIZE).map(|at| (at / 251 + at % 251) as u8).collect();
        let expected = said.clone();
        let sending = tokio::spawn(async move {
            write.write_all(&said).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut back = Vec::new();
        timeout(Duration::from_secs(60), read.read_to_end(&mut back))
            .await
            .unwrap()
            .unwrap();
        sending.await.unwrap();
        assert!(back == expected, "{endpoints:?}: {} of {SIZE} bytes", back.len());
    }
    rig.settled().await;
}

#[tokio::test]
async fn a_half_close_of_either_side_leaves_the_other_direction_open() {
    let rig = Rig::start().await;
    let pod = rig
        .pod(
            10,
            app(|mut stream| async move {
                // The endpoint ends first, and goes on listening.
                stream.write_all(b"greeting").await.unwrap();
                stream.shutdown().await.unwrap();
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).await.unwrap();
                assert_eq!(heard, b"last words");
            }),
        )
        .await;
    rig.serve(Config::default().tcp(DB, &[pod.address])).await;
    let mut stream = open(&rig).await;
    assert_eq!(read_all(&mut stream).await.unwrap(), b"greeting");
    stream.write_all(b"last words").await.unwrap();
    stream.shutdown().await.unwrap();
    let told = rig.told(1).await;
    assert_eq!((told.flags.as_str(), told.received, told.sent), ("-", 10, 8));
    rig.settled().await;
}

#[tokio::test]
async fn a_reset_of_the_endpoint_is_a_reset_for_the_client() {
    let rig = Rig::start().await;
    let pod = rig
        .pod(
            10,
            app(|mut stream| async move {
                let _ = stream.read(&mut [0; 16]).await;
                let _ = stream.write_all(b"half").await;
                tokio::time::sleep(Duration::from_millis(50)).await;
                stream.reset(h2::Reason::INTERNAL_ERROR);
            }),
        )
        .await;
    let plain = plain(&rig, 20, |mut stream| async move {
        let _ = stream.read(&mut [0; 16]).await;
        let _ = stream.write_all(b"half").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    })
    .await;
    rig.serve(Config::default().tcp(DB, &[pod.address])).await;
    for (round, endpoints) in [tunnels(&[pod.address]), plainly(plain)].into_iter().enumerate() {
        rig.publish(with(Config::default(), endpoints.clone(), |_| {}));
        let mut stream = open(&rig).await;
        stream.write_all(b"hello").await.unwrap();
        let error = read_all(&mut stream).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{endpoints:?}");
        assert_eq!(rig.told(round + 1).await.flags, "UR", "{endpoints:?}");
    }
    rig.settled().await;
}

#[tokio::test]
async fn a_reset_of_the_client_is_a_reset_for_the_endpoint() {
    let rig = Rig::start().await;
    let (tell, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let tell_plain = tell.clone();
    let pod = rig
        .pod(
            10,
            app(move |mut stream| {
                let tell = tell.clone();
                async move { tell.send(stream.read_to_end(&mut Vec::new()).await).unwrap() }
            }),
        )
        .await;
    let plain = plain(&rig, 20, move |mut stream| {
        let tell = tell_plain.clone();
        async move { tell.send(stream.read_to_end(&mut Vec::new()).await).unwrap() }
    })
    .await;
    rig.serve(Config::default().tcp(DB, &[pod.address])).await;
    for (round, endpoints) in [tunnels(&[pod.address]), plainly(plain)].into_iter().enumerate() {
        rig.publish(with(Config::default(), endpoints.clone(), |_| {}));
        let mut stream = open(&rig).await;
        stream.write_all(b"hello").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        stream.reset(h2::Reason::CANCEL);
        let end = timeout(PATIENCE, ends.recv()).await.unwrap().unwrap();
        assert_eq!(
            end.map_err(|error| error.kind()),
            Err(ErrorKind::ConnectionReset),
            "{endpoints:?}"
        );
        assert_eq!(rig.told(round + 1).await.flags, "DR", "{endpoints:?}");
    }
    rig.settled().await;
}

#[tokio::test]
async fn a_clean_end_that_a_reset_follows_loses_nothing() {
    const SIZE: usize = 300_000;
    let rig = Rig::start().await;
    // The endpoint says everything, ends, and takes no more: END_STREAM, then RST_STREAM(NO_ERROR).
    let pod = rig
        .pod(
            10,
            app(|mut stream| async move {
                stream.write_all(&vec![b'x'; SIZE]).await.unwrap();
                stream.shutdown().await.unwrap();
            }),
        )
        .await;
    rig.serve(Config::default().tcp(DB, &[pod.address])).await;
    for round in 0..20 {
        let (mut read, mut write) = split(open(&rig).await);
        // The client says more than the endpoint ever takes.
        let saying = tokio::spawn(async move { while write.write_all(&[b'y'; 10_000]).await.is_ok() {} });
        let mut heard = Vec::new();
        timeout(PATIENCE, read.read_to_end(&mut heard))
            .await
            .unwrap()
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(heard.len(), SIZE, "round {round}");
        timeout(PATIENCE, saying)
            .await
            .expect("the client is told that nobody listens")
            .unwrap();
    }
    rig.settled().await;
}

#[tokio::test]
async fn a_client_that_leaves_after_its_end_is_noticed_while_the_endpoint_is_silent() {
    let rig = Rig::start().await;
    let (tell, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let pod = rig
        .pod(
            10,
            app(move |mut stream| {
                let tell = tell.clone();
                async move {
                    let mut heard = Vec::new();
                    stream.read_to_end(&mut heard).await.unwrap();
                    tell.send(heard).unwrap();
                    std::future::poll_fn(|cx| stream.poll_reset(cx)).await;
                    tell.send(b"reset".to_vec()).unwrap();
                }
            }),
        )
        .await;
    rig.serve(Config::default().tcp(DB, &[pod.address])).await;
    let mut stream = open(&rig).await;
    stream.write_all(b"all of it").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(timeout(PATIENCE, ends.recv()).await.unwrap().unwrap(), b"all of it");
    drop(stream);
    assert_eq!(timeout(PATIENCE, ends.recv()).await.unwrap().unwrap(), b"reset");
    rig.settled().await;
}

#[tokio::test]
async fn a_silent_connection_ends_after_the_idle_timeout_and_a_busy_one_does_not() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    rig.serve(with(Config::default(), tunnels(&[pod.address]), |tcp| {
        tcp.idle_timeout = Some(Duration::from_millis(300))
    }))
    .await;
    let mut stream = open(&rig).await;
    for _ in 0..8 {
        stream.write_all(b"x").await.unwrap();
        stream.read_exact(&mut [0]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(80)).await;
    }
    let since = tokio::time::Instant::now();
    assert_eq!(read_all(&mut stream).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(since.elapsed() < Duration::from_secs(5));
    rig.settled().await;
}

#[tokio::test]
async fn a_connection_ends_after_its_longest_time_however_busy() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    rig.serve(with(Config::default(), tunnels(&[pod.address]), |tcp| {
        tcp.max_duration = Some(Duration::from_millis(300))
    }))
    .await;
    let mut stream = open(&rig).await;
    let busy = async {
        loop {
            if stream.write_all(b"x").await.is_err() || stream.read_exact(&mut [0]).await.is_err() {
                return;
            }
        }
    };
    timeout(PATIENCE, busy).await.expect("it ends");
    assert_eq!(rig.told(1).await.flags, "DT");
    rig.settled().await;
}

#[tokio::test]
async fn what_is_addressed_to_a_workload_goes_there_through_a_tunnel() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    let authority = pod.address.to_string();
    let config = Config::default().tcp_with(&authority, vec![Target::Original { tunnel: true }], |_| {}, |_| {});
    rig.serve(config).await;
    let mut stream = rig.open(&authority).await.unwrap().stream;
    assert_eq!(exchange(&mut stream, b"to the pod").await, b"to the pod");
    assert_eq!(pod.connects.load(Ordering::SeqCst), 1);
}

// --- ports of unknown protocol

#[tokio::test]
async fn http_is_found_on_an_undeclared_port() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(Config::default().detect(DB, &[pod.address])).await;
    let (status, headers, body) = fetch(&mut rig.http1(DB).await, "/one").await;
    assert_eq!((status, &body[..]), (StatusCode::OK, &b"web /one 0"[..]));
    assert!(headers.contains_key("x-envoy-upstream-service-time"), "it was served as HTTP");
    let mut sender = rig.http2(DB).await.ready().await.unwrap();
    let (answer, _) = sender
        .send_request(Request::get("http://web/two").body(()).unwrap(), true)
        .unwrap();
    assert_eq!(answer.await.unwrap().status(), StatusCode::OK);
    // Its head comes in pieces, with longer pauses than the detection waits for a silent client.
    let mut stream = open(&rig).await;
    for piece in ["GE", "T /sl", "ow HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n"] {
        tokio::time::sleep(Duration::from_millis(100 * u64::from(piece.len() != 2))).await;
        stream.write_all(piece.as_bytes()).await.unwrap();
    }
    let answer = String::from_utf8(read_all(&mut stream).await.unwrap()).unwrap();
    assert!(
        answer.contains("server: istio-envoy") && answer.ends_with("web /slow 0"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_on_an_undeclared_port() {
    let rig = Rig::start().await;
    let pod = rig
        .pod(
            10,
            app(|mut stream| async move {
                stream.write_all(b"220 ready\r\n").await.unwrap();
                let mut line = [0; 6];
                stream.read_exact(&mut line).await.unwrap();
                stream.write_all(&line).await.unwrap();
                stream.shutdown().await.unwrap();
            }),
        )
        .await;
    rig.serve(Config::default().detect(DB, &[pod.address])).await;
    let mut stream = open(&rig).await;
    let mut greeting = [0; 11];
    let since = tokio::time::Instant::now();
    timeout(PATIENCE, stream.read_exact(&mut greeting))
        .await
        .expect("the client says nothing until it is greeted")
        .unwrap();
    assert_eq!(&greeting, b"220 ready\r\n");
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    stream.write_all(b"QUIT\r\n").await.unwrap();
    assert_eq!(read_all(&mut stream).await.unwrap(), b"QUIT\r\n");
    rig.settled().await;
}

#[tokio::test]
async fn whatever_is_not_http_passes_as_it_is_on_an_undeclared_port() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    rig.serve(Config::default().detect(DB, &[pod.address])).await;
    let client_hello = [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], &[7; 512]].concat();
    let said: &[&[u8]] = &[
        b"r",
        b"PING\r\n",
        b"PING",
        b"*1\r\n$4\r\nPING\r\n",
        b"GET key\r\n",
        b"PRI * HTTP/3\r\n",
        &client_hello,
        b"\0\0\0\x08\x04\xd2\x16\x2f",
    ];
    for words in said {
        let mut stream = open(&rig).await;
        stream.write_all(words).await.unwrap();
        let mut back = vec![0; words.len()];
        timeout(PATIENCE, stream.read_exact(&mut back))
            .await
            .unwrap_or_else(|_| panic!("no echo of {words:?}"))
            .unwrap();
        assert_eq!(&back, words);
        // And cut into single bytes that come one by one.
        let mut stream = open(&rig).await;
        for byte in *words {
            stream.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        stream.shutdown().await.unwrap();
        assert_eq!(read_all(&mut stream).await.unwrap(), *words);
    }
    rig.settled().await;
}

#[tokio::test]
async fn a_client_that_only_ends_is_passed_on_as_that() {
    let rig = Rig::start().await;
    let pod = rig
        .pod(
            10,
            app(|mut stream| async move {
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).await.unwrap();
                stream.write_all(format!("heard {}", heard.len()).as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            }),
        )
        .await;
    rig.serve(Config::default().detect(DB, &[pod.address])).await;
    assert_eq!(exchange(&mut open(&rig).await, b"").await, b"heard 0");
}

#[tokio::test]
async fn an_undeclared_port_whose_endpoint_refuses_resets() {
    let rig = Rig::start().await;
    rig.serve(Config::default().detect(DB, &[SocketAddr::new(rig.ip(99), 8080)]))
        .await;
    let mut stream = open(&rig).await;
    stream.write_all(b"r").await.unwrap();
    assert_eq!(read_all(&mut stream).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(rig.told(1).await.flags, "UF");
    rig.settled().await;
}

#[tokio::test]
async fn a_stalled_reader_stops_its_writer_and_nobody_else() {
    let rig = Rig::start().await;
    let pod = rig
        .pod(
            10,
            app(|mut stream| async move {
                let chunk = Bytes::from(vec![b'x'; 64 * 1024]);
                while stream.write_all(&chunk).await.is_ok() {}
            }),
        )
        .await;
    rig.serve(Config::default().tcp(DB, &[pod.address])).await;
    // 20 clients that read nothing, and one that reads 16 MiB through the same tunnel.
    let mut stalled = Vec::new();
    for _ in 0..20 {
        stalled.push(open(&rig).await);
    }
    let mut reader = open(&rig).await;
    let mut left = 16 << 20;
    let mut buffer = vec![0; 64 * 1024];
    while left > 0 {
        let read = timeout(PATIENCE, reader.read(&mut buffer))
            .await
            .expect("the reader is not starved")
            .unwrap();
        assert!(read > 0);
        left -= read.min(left);
    }
    drop((stalled, reader));
    rig.settled().await;
}

/// A pod that never answers a CONNECT.
async fn never_answering(rig: &Rig, last: u8) -> rig::Pod {
    rig.pod_that(last, |connect| {
        tokio::spawn(async move {
            let mut connect = connect;
            connect.cancelled().await;
        });
    })
    .await
}

#[tokio::test]
async fn what_a_client_says_while_its_endpoint_is_dialled_is_heard() {
    let rig = Rig::start().await;
    let (web, stuck) = (rig.pod(10, echo_app("web")).await, never_answering(&rig, 11).await);
    let bytes_go_nowhere = |tcp: &mut TcpChain| tcp.targets = vec![("stuck".into(), 1)];
    rig.serve(
        Config::default()
            .detect_with(DB, &[web.address], bytes_go_nowhere)
            .cluster("stuck", &[stuck.address]),
    )
    .await;
    // Silent until its endpoint is being dialled; then it speaks HTTP, of which that endpoint has nothing to hear.
    let mut stream = open(&rig).await;
    while stuck.connects.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let answer = timeout(Duration::from_secs(1), read_all(&mut stream)).await;
    let answer = answer.expect("the answer does not wait for the other endpoint").unwrap();
    assert!(answer.ends_with(b"web / 0"), "{answer:?}");
    // One that says bytes, and leaves before they have anywhere to go, leaves nothing.
    let mut stream = open(&rig).await;
    stream.write_all(b"\x00\x01\x02").await.unwrap();
    while stuck.connects.load(Ordering::SeqCst) < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stream.reset(h2::Reason::CANCEL);
    timeout(Duration::from_secs(1), rig.settled())
        .await
        .expect("nobody dials for a client that has left");
}

#[tokio::test]
async fn all_tries_together_take_no_longer_than_one_may() {
    let rig = Rig::start().await;
    let stuck = [never_answering(&rig, 10).await, never_answering(&rig, 11).await];
    let endpoints = tunnels(&stuck.each_ref().map(|pod| pod.address));
    let quick = |cluster: &mut ClusterSettings| cluster.connect_timeout = Duration::from_millis(200);
    rig.serve(Config::default().tcp_with(DB, endpoints, |_| {}, quick)).await;
    let since = tokio::time::Instant::now();
    assert_eq!(refused(&rig).await.0, StatusCode::SERVICE_UNAVAILABLE);
    // A tunnel alone may take two seconds here.
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
}

/// Whether the kernel probes a connection to this address: its timer in `/proc/net/tcp` (proc(5)).
fn is_probed(address: SocketAddr) -> bool {
    let std::net::IpAddr::V4(ip) = address.ip() else {
        return false;
    };
    let remote = format!("{:08X}:{:04X}", u32::from_le_bytes(ip.octets()), address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(2) == Some(&remote.as_str()) && fields.get(5).is_some_and(|timer| timer.starts_with("02:"))
    })
}

#[tokio::test]
async fn plain_connections_are_probed_as_their_cluster_says() {
    let rig = Rig::start().await;
    for (last, probed) in [(30, true), (31, false)] {
        let address = plain(&rig, last, |mut stream: TcpStream| async move {
            let _ = stream.read(&mut [0; 1]).await;
        })
        .await;
        let probes = move |cluster: &mut ClusterSettings| {
            cluster.tcp_keepalive = probed.then_some(TcpKeepalive {
                probes: Some(3),
                time: Some(Duration::from_secs(60)),
                interval: Some(Duration::from_secs(5)),
            });
        };
        let config = Config::default().tcp_with(DB, plainly(address), |_| {}, probes);
        if last == 30 {
            rig.serve(config).await
        } else {
            rig.publish(config)
        }
        let stream = open(&rig).await;
        let mut found = is_probed(address);
        for _ in 0..100 {
            if found == probed {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            found = is_probed(address);
        }
        assert_eq!(found, probed);
        drop(stream);
    }
}
