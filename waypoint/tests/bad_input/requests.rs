//! Requests whose framing, heads or bodies are wrong or late.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use crate::{
    PATIENCE, WEB, mesh,
    rig::{App, Config, Rig, echo_app},
    still_well,
};

/// Sends raw bytes into an HTTP tunnel and checks status, end, and the one line that is told.
pub async fn answered(rig: &Rig, bytes: &[u8], status: u16, details: &str) -> String {
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
        ("x: 1\r\n folded\r\n", codec),
        ("x: a\0b\r\n", codec),
        ("no colon\r\n", codec),
        (": no name\r\n", codec),
    ];
    for (fields, details) in cases {
        let request = format!("POST / HTTP/1.1\r\nhost: web\r\n{fields}\r\n3\r\nabc\r\n0\r\n\r\n");
        answered(&rig, request.as_bytes(), 400, details).await;
    }
    for coding in [
        "gzip",
        "chunked, gzip",
        "gzip, chunked",
        "cow\r\ntransfer-encoding: chunked",
        "",
    ] {
        let request = format!("POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: {coding}\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
        answered(&rig, request.as_bytes(), 501, "http1.invalid_transfer_encoding").await;
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
