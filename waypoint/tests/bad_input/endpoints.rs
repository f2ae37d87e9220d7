//! Destinations that misbehave, and clients that leave.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_policy::{
    route::{Forward, Target as RouteTarget},
    timeout::RouteTimeouts,
};
use cairn_waypoint::upstream::{ClusterSettings, UpstreamProtocol};
use http::{Request, StatusCode};
use http_body_util::Full;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::timeout,
};

use crate::{
    PATIENCE, WEB,
    rig::{App, Config, Rig, Told, fetch, route, routes},
};

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
