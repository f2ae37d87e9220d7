//! The filter pipeline (architecture §3a), proved with four test filters: one that looks at heads only, one that waits, one that wants
//! the whole body, and one that changes answers.
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
use cairn_exchange::{Exchange, ResponseFlags};
use cairn_filters::{BodyNeed, Filter, FilterChain, HttpFilter, LocalReply, Needs, ResponseHead, Scope, Slot, Verdict};
use cairn_waypoint::upstream::UpstreamProtocol;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use parking_lot::Mutex;
use rig::{App, Config, Rig, fetch, http_app, send};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Notify,
    time::timeout,
};

const WEB: &str = "10.96.1.10:80";
const LIMIT: usize = 10_000;

/// What was called, in order.
type Calls = Arc<Mutex<Vec<String>>>;

/// Looks at heads only. Replies to `/reply/NAME`.
#[derive(Debug)]
struct HeadOnly {
    name: &'static str,
    calls: Calls,
}

/// Waits before it lets a request go on: twice, looking at the record in between. Replies to `/late` after its wait.
#[derive(Debug)]
struct Waiting {
    calls: Calls,
    go: Arc<Notify>,
}

/// Wants the whole body, and turns it to upper case. `/empty` replies from the body, `/slow-body` waits with it.
#[derive(Debug)]
struct Buffering {
    calls: Calls,
}

/// Changes heads, data and trailers of answers; counts the request's data as it passes.
#[derive(Debug)]
struct Changing {
    calls: Calls,
    observe_request: bool,
}

fn note(calls: &Calls, what: impl Into<String>) {
    calls.lock().push(what.into());
}

fn path(exchange: &Exchange) -> &str {
    exchange.request.as_ref().map_or("", |head| head.path.path())
}

impl HttpFilter for HeadOnly {
    fn name(&self) -> &str {
        self.name
    }

    fn decode_head(&self, slot: &mut Slot, exchange: &mut Exchange, _: &Scope<'_>) -> Verdict {
        note(&self.calls, format!("{} in", self.name));
        *slot = Slot::Other(Box::new(self.name));
        if path(exchange) == format!("/reply/{}", self.name) {
            return Verdict::Reply(LocalReply::new(
                StatusCode::IM_A_TEAPOT,
                ResponseFlags::NONE,
                "test_reply",
                "from a filter",
            ));
        }
        if let Some(head) = &mut exchange.request {
            head.headers.append("x-seen", HeaderValue::from_static(self.name));
        }
        Verdict::Continue
    }

    fn encode_head(&self, slot: &mut Slot, _: &mut Exchange, head: &mut ResponseHead) {
        let Slot::Other(kept) = slot else {
            panic!("{}: the slot is empty", self.name)
        };
        assert_eq!(kept.downcast_ref(), Some(&self.name), "a slot is its filter's own");
        note(&self.calls, format!("{} out", self.name));
        head.headers.append("x-out", HeaderValue::from_static(self.name));
    }

    fn finish(&self, _: &mut Slot, _: &mut Exchange) {
        note(&self.calls, format!("{} end", self.name));
    }
}

impl HttpFilter for Waiting {
    fn name(&self) -> &str {
        "waiting"
    }

    fn decode_head(&self, _: &mut Slot, _: &mut Exchange, _: &Scope<'_>) -> Verdict {
        note(&self.calls, "waiting stops");
        let (go, calls) = (self.go.clone(), self.calls.clone());
        Verdict::Stop(Box::pin(async move {
            go.notified().await;
            let resume: cairn_filters::Resume = Box::new(move |exchange| {
                note(&calls, "waiting looks again");
                let late = path(exchange) == "/late";
                if let Some(head) = &mut exchange.request {
                    head.headers.insert("x-waited", HeaderValue::from_static("yes"));
                }
                Verdict::Stop(Box::pin(async move {
                    tokio::task::yield_now().await;
                    let resume: cairn_filters::Resume = Box::new(move |_| {
                        note(&calls, "waiting decides");
                        if late {
                            return Verdict::Reply(LocalReply::new(StatusCode::GONE, ResponseFlags::NONE, "late", "too late"));
                        }
                        Verdict::Continue
                    });
                    resume
                }))
            });
            resume
        }))
    }

    fn encode_head(&self, _: &mut Slot, _: &mut Exchange, _: &mut ResponseHead) {
        note(&self.calls, "waiting out");
    }
}

impl HttpFilter for Buffering {
    fn name(&self) -> &str {
        "buffering"
    }

    fn needs(&self) -> Needs {
        Needs {
            request: BodyNeed::Whole { limit: LIMIT },
            observe_response: false,
        }
    }

    fn decode_head(&self, _: &mut Slot, _: &mut Exchange, _: &Scope<'_>) -> Verdict {
        note(&self.calls, "buffering in");
        Verdict::Continue
    }

    fn decode_body(&self, _: &mut Slot, exchange: &mut Exchange, body: &mut Bytes) -> Verdict {
        note(&self.calls, format!("buffering {}", body.len()));
        match path(exchange) {
            "/empty" => Verdict::Reply(LocalReply::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                ResponseFlags::NONE,
                "empty",
                "empty",
            )),
            "/slow-body" => Verdict::Stop(Box::pin(async {
                tokio::task::yield_now().await;
                let again: cairn_filters::Resume = Box::new(|_| {
                    Verdict::Stop(Box::pin(async {
                        let reply: cairn_filters::Resume = Box::new(|_| {
                            Verdict::Reply(LocalReply::new(StatusCode::LOCKED, ResponseFlags::NONE, "locked", "locked"))
                        });
                        reply
                    }))
                });
                again
            })),
            _ => {
                *body = body.to_ascii_uppercase().repeat(2).into();
                Verdict::Continue
            }
        }
    }

    fn encode_head(&self, _: &mut Slot, _: &mut Exchange, _: &mut ResponseHead) {
        note(&self.calls, "buffering out");
    }
}

impl HttpFilter for Changing {
    fn name(&self) -> &str {
        "changing"
    }

    fn needs(&self) -> Needs {
        let request = if self.observe_request {
            BodyNeed::Observe
        } else {
            BodyNeed::Nothing
        };
        Needs {
            request,
            observe_response: true,
        }
    }

    fn decode_data(&self, _: &mut Slot, data: &mut Bytes, end: bool) {
        note(&self.calls, format!("data in {} {end}", data.len()));
    }

    fn decode_trailers(&self, _: &mut Slot, trailers: &mut HeaderMap) {
        trailers.insert("x-trailer-seen", HeaderValue::from_static("in"));
    }

    fn encode_head(&self, _: &mut Slot, exchange: &mut Exchange, head: &mut ResponseHead) {
        note(&self.calls, "changing out");
        if exchange.details.as_deref() == Some("via_upstream") {
            head.headers.remove("content-length");
        }
        head.headers.insert("x-changed", HeaderValue::from_static("yes"));
    }

    fn encode_data(&self, _: &mut Slot, data: &mut Bytes, _: bool) {
        *data = Bytes::from([&b"<"[..], data, b">"].concat());
    }

    fn encode_trailers(&self, _: &mut Slot, trailers: &mut HeaderMap) -> Option<Bytes> {
        trailers.insert("x-trailer-seen", HeaderValue::from_static("out"));
        None
    }
}

/// A pod that tells the headers of interest and the body.
fn report() -> App {
    http_app(|request| async move {
        let seen: Vec<_> = request
            .headers()
            .get_all("x-seen")
            .iter()
            .map(|value| value.to_str().unwrap().to_owned())
            .collect();
        let waited = request.headers().contains_key("x-waited");
        let length = request
            .headers()
            .get("content-length")
            .map_or("-", |value| value.to_str().unwrap())
            .to_owned();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::new(Full::from(format!(
            "{} {waited} {length} {}",
            seen.join("+"),
            String::from_utf8_lossy(&body)
        )))
    })
}

async fn rig_with(filters: Vec<Arc<dyn HttpFilter>>) -> (Rig, rig::Pod) {
    let rig = Rig::start().await;
    let pod = rig.pod(10, report()).await;
    let filters = FilterChain::new(filters.into_iter().map(Filter::Other).collect());
    rig.serve(Config::default().http_with(WEB, &[pod.address], |http| http.filters = filters, |_| {}))
        .await;
    (rig, pod)
}

fn head_only(name: &'static str, calls: &Calls) -> Arc<dyn HttpFilter> {
    Arc::new(HeadOnly {
        name,
        calls: calls.clone(),
    })
}

fn waiting(calls: &Calls) -> (Arc<dyn HttpFilter>, Arc<Notify>) {
    let go = Arc::new(Notify::new());
    (
        Arc::new(Waiting {
            calls: calls.clone(),
            go: go.clone(),
        }),
        go,
    )
}

fn post(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(path)
        .header("host", "web")
        .body(Full::new(body.into()))
        .unwrap()
}

fn taken(calls: &Calls) -> Vec<String> {
    std::mem::take(&mut calls.lock())
}

#[tokio::test]
async fn filters_see_the_request_in_order_and_the_answer_in_reverse() {
    let calls = Calls::default();
    let (rig, _pod) = rig_with(vec![head_only("a", &calls), head_only("b", &calls), head_only("c", &calls)]).await;
    let mut client = rig.http1(WEB).await;
    for _ in 0..2 {
        let (status, headers, body) = fetch(&mut client, "/").await;
        assert_eq!((status, &body[..]), (StatusCode::OK, &b"a+b+c false - "[..]));
        let out: Vec<_> = headers.get_all("x-out").iter().collect();
        assert_eq!(out, ["c", "b", "a"]);
        rig.quiet().await;
        assert_eq!(
            taken(&calls),
            ["a in", "b in", "c in", "c out", "b out", "a out", "a end", "b end", "c end"]
        );
    }
}

#[tokio::test]
async fn a_reply_passes_the_encode_side_of_the_filters_that_ran_and_only_of_these() {
    let calls = Calls::default();
    let (rig, pod) = rig_with(vec![head_only("a", &calls), head_only("b", &calls), head_only("c", &calls)]).await;
    let mut client = rig.http1(WEB).await;
    let (status, headers, body) = fetch(&mut client, "/reply/b").await;
    assert_eq!((status, &body[..]), (StatusCode::IM_A_TEAPOT, &b"from a filter"[..]));
    assert_eq!(headers.get_all("x-out").iter().collect::<Vec<_>>(), ["b", "a"]);
    assert!(!headers.contains_key("connection"), "the connection goes on");
    rig.quiet().await;
    assert_eq!(taken(&calls), ["a in", "b in", "b out", "a out", "a end", "b end"]);
    let told = rig.told(1).await;
    assert_eq!(
        (told.status, told.details.as_str(), told.attempts),
        (Some(418), "test_reply", 0)
    );
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0, "nothing goes on to the endpoint");
    assert_eq!(fetch(&mut client, "/").await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_filter_that_waits_stops_the_request_and_no_filter_behind_it_is_left_out() {
    let calls = Calls::default();
    let (waits, go) = waiting(&calls);
    let (rig, pod) = rig_with(vec![head_only("a", &calls), waits, head_only("b", &calls)]).await;
    let mut client = rig.http1(WEB).await;
    let request = tokio::spawn(async move { fetch(&mut client, "/").await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(
        (taken(&calls), pod.connects.load(Ordering::SeqCst)),
        (vec!["a in".to_owned(), "waiting stops".to_owned()], 0)
    );
    go.notify_one();
    let (status, _, body) = request.await.unwrap();
    assert_eq!((status, &body[..]), (StatusCode::OK, &b"a+b true - "[..]));
    rig.quiet().await;
    let expected = [
        "waiting looks again",
        "waiting decides",
        "b in",
        "b out",
        "waiting out",
        "a out",
        "a end",
        "b end",
    ];
    assert_eq!(taken(&calls), expected);
}

#[tokio::test]
async fn a_filter_may_refuse_after_it_has_waited() {
    let calls = Calls::default();
    let (waits, go) = waiting(&calls);
    let (rig, pod) = rig_with(vec![head_only("a", &calls), waits, head_only("b", &calls)]).await;
    go.notify_one();
    let (status, headers, body) = fetch(&mut rig.http1(WEB).await, "/late").await;
    assert_eq!((status, &body[..]), (StatusCode::GONE, &b"too late"[..]));
    assert_eq!(headers["x-out"], "a");
    rig.quiet().await;
    assert!(
        !taken(&calls).iter().any(|call| call.starts_with('b')),
        "the filter behind it never ran"
    );
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_client_that_leaves_while_a_filter_waits_leaves_nothing() {
    let calls = Calls::default();
    let (waits, _go) = waiting(&calls);
    let (rig, _pod) = rig_with(vec![head_only("a", &calls), waits]).await;
    let mut stream = rig.open(WEB).await.unwrap().stream;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
    timeout(Duration::from_secs(5), async {
        while calls.lock().len() < 2 {
            tokio::task::yield_now().await
        }
    })
    .await
    .unwrap();
    drop(stream);
    rig.settled().await;
    let told = rig.told(1).await;
    assert_eq!(
        (told.status, told.flags.as_str(), told.details.as_str()),
        (None, "DC", "downstream_remote_disconnect")
    );
    assert!(taken(&calls).contains(&"a end".to_owned()), "filters are told of the end");
}

#[tokio::test]
async fn a_filter_that_wants_the_whole_body_gets_it_before_those_behind_it_run_and_may_change_it() {
    let calls = Calls::default();
    let buffering = Arc::new(Buffering { calls: calls.clone() });
    let (rig, _pod) = rig_with(vec![head_only("a", &calls), buffering, head_only("b", &calls)]).await;
    let mut client = rig.http1(WEB).await;
    let (status, _, body) = send(&mut client, post("/", "hello")).await;
    assert_eq!(
        (status, &body[..]),
        (StatusCode::OK, &b"a+b false 10 HELLOHELLO"[..]),
        "the length fits the new body"
    );
    rig.quiet().await;
    assert_eq!(taken(&calls)[..4], ["a in", "buffering in", "buffering 5", "b in"]);
    // Without a body, and on the same connection.
    assert_eq!(fetch(&mut client, "/").await.2, "a+b false - ");
    assert_eq!(taken(&calls)[2], "buffering 0");
}

#[tokio::test]
async fn a_body_over_the_limit_is_answered_413_and_never_goes_on() {
    let calls = Calls::default();
    let buffering = Arc::new(Buffering { calls: calls.clone() });
    let (rig, pod) = rig_with(vec![head_only("a", &calls), buffering, head_only("b", &calls)]).await;
    let (status, _, body) = send(&mut rig.http1(WEB).await, post("/", vec![b'x'; LIMIT])).await;
    assert_eq!((status, body.len()), (StatusCode::OK, "a+b false 20000 ".len() + 2 * LIMIT));
    rig.quiet().await;
    taken(&calls);
    let (status, headers, body) = send(&mut rig.http1(WEB).await, post("/", vec![b'x'; LIMIT + 1])).await;
    assert_eq!(
        (status, &body[..]),
        (StatusCode::PAYLOAD_TOO_LARGE, &b"Payload Too Large"[..])
    );
    assert_eq!(
        (&headers["connection"], &headers["x-out"]),
        (&HeaderValue::from_static("close"), &HeaderValue::from_static("a"))
    );
    rig.quiet().await;
    assert_eq!(taken(&calls), ["a in", "buffering in", "buffering out", "a out", "a end"]);
    assert_eq!(rig.told(2).await.details, "request_payload_too_large");
    assert_eq!(pod.connects.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_filter_may_reply_to_the_body_at_once_or_after_waiting() {
    let calls = Calls::default();
    let (rig, pod) = rig_with(vec![Arc::new(Buffering { calls: calls.clone() })]).await;
    let mut client = rig.http1(WEB).await;
    for (path, expected) in [
        ("/empty", StatusCode::UNPROCESSABLE_ENTITY),
        ("/slow-body", StatusCode::LOCKED),
    ] {
        assert_eq!(send(&mut client, post(path, "hello")).await.0, expected, "{path}");
    }
    assert_eq!(
        send(&mut client, post("/", "on")).await.0,
        StatusCode::OK,
        "the connection went on"
    );
    assert_eq!(pod.connects.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_answer_may_be_changed_and_a_request_watched() {
    let calls = Calls::default();
    let changing = Arc::new(Changing {
        calls: calls.clone(),
        observe_request: true,
    });
    let (rig, _pod) = rig_with(vec![changing]).await;
    let mut client = rig.http1(WEB).await;
    let (status, headers, body) = send(&mut client, post("/", "hello")).await;
    assert_eq!(
        (status, &body[..], &headers["x-changed"]),
        (StatusCode::OK, &b"< false 5 hello>"[..], &HeaderValue::from_static("yes"))
    );
    assert_eq!(taken(&calls), ["data in 5 true", "changing out"]);
}

#[tokio::test]
async fn bodies_stream_untouched_where_nobody_needs_them() {
    let calls = Calls::default();
    let app: App = Arc::new(|mut stream, _| {
        Box::pin(async move {
            // Answers each piece of the request's body before the next one comes.
            let mut heard = Vec::new();
            while !heard.ends_with(b"\r\n\r\n") {
                heard.push(stream.read_u8().await.unwrap());
            }
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n")
                .await
                .unwrap();
            for _ in 0..3 {
                let mut piece = [0; 2];
                stream.read_exact(&mut piece).await.unwrap();
                stream.write_all(&piece).await.unwrap();
            }
            let _ = stream.read(&mut [0]).await;
        })
    });
    let rig = Rig::start().await;
    let pod = rig.pod(10, app).await;
    let filters = FilterChain::new(vec![Filter::Other(head_only("a", &calls)), Filter::GrpcStats]);
    rig.serve(Config::default().http_with(WEB, &[pod.address], |http| http.filters = filters, |_| {}))
        .await;
    let mut stream = rig.open(WEB).await.unwrap().stream;
    stream
        .write_all(b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 6\r\n\r\n")
        .await
        .unwrap();
    let mut head = Vec::new();
    for (round, piece) in [b"ab", b"cd", b"ef"].into_iter().enumerate() {
        stream.write_all(piece).await.unwrap();
        if round == 0 {
            while !head.ends_with(b"\r\n\r\n") {
                head.push(
                    timeout(Duration::from_secs(5), stream.read_u8())
                        .await
                        .expect("the head comes before the body has ended")
                        .unwrap(),
                );
            }
        }
        let mut back = [0; 2];
        timeout(Duration::from_secs(5), stream.read_exact(&mut back))
            .await
            .expect("each piece passes at once")
            .unwrap();
        assert_eq!(&back, piece);
    }
    drop(stream);
    rig.settled().await;
}

#[tokio::test]
async fn grpc_messages_are_counted_from_end_to_end_with_trailers() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, grpc_app()).await;
    let filters = || FilterChain::new(vec![Filter::GrpcStats]);
    let grpc = |cluster: &mut cairn_waypoint::upstream::ClusterSettings| cluster.protocol = UpstreamProtocol::Http2;
    rig.serve(Config::default().http_with(WEB, &[pod.address], |http| http.filters = filters(), grpc))
        .await;
    let client = rig.http2(WEB).await;
    for (round, content_type, messages) in [(1, "application/grpc", (2, 3)), (2, "text/plain", (0, 0))] {
        let mut client = client.clone().ready().await.unwrap();
        let request = Request::post("http://web/echo.Echo/Talk")
            .header("content-type", content_type)
            .header("te", "trailers");
        let (answer, mut body) = client.send_request(request.body(()).unwrap(), false).unwrap();
        // Two messages of 3 bytes, cut in the middle of the second one's head.
        body.send_data(Bytes::from_static(b"\0\0\0\0\x03abc\0\0"), false).unwrap();
        body.send_data(Bytes::from_static(b"\0\0\x03def"), true).unwrap();
        let answer = answer.await.unwrap();
        assert_eq!(
            (answer.status(), &answer.headers()["content-type"]),
            (StatusCode::OK, &HeaderValue::from_str(content_type).unwrap())
        );
        let mut body = answer.into_body();
        let mut heard = 0;
        while let Some(data) = body.data().await {
            let data = data.unwrap();
            heard += data.len();
            body.flow_control().release_capacity(data.len()).unwrap();
        }
        assert_eq!(heard, 3 * 6);
        let trailers = body.trailers().await.unwrap().expect("trailers pass");
        assert_eq!(
            (&trailers["grpc-status"], &trailers["grpc-message"]),
            (&HeaderValue::from_static("5"), &HeaderValue::from_static("none"))
        );
        let told = rig.told(round).await;
        assert_eq!(
            (told.messages, told.grpc_status, told.received),
            (messages, Some(5), 16),
            "{content_type}"
        );
    }
    rig.quiet().await;
    assert_eq!(pod.connects.load(Ordering::SeqCst), 1, "requests share the connection");
}

/// Answers each call with three messages of one byte and trailers, after it has heard all of it.
fn grpc_app() -> App {
    Arc::new(|stream, _| {
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let content_type = request.headers()["content-type"].clone();
                    assert_eq!(request.headers()["te"], "trailers");
                    let mut body = request.into_body();
                    while let Some(data) = body.data().await {
                        body.flow_control().release_capacity(data.unwrap().len()).unwrap();
                    }
                    let answer = Response::builder().header("content-type", content_type).body(()).unwrap();
                    let mut send = respond.send_response(answer, false).unwrap();
                    for _ in 0..3 {
                        send.send_data(Bytes::from_static(b"\0\0\0\0\x01x"), false).unwrap();
                    }
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", HeaderValue::from_static("5"));
                    trailers.insert("grpc-message", HeaderValue::from_static("none"));
                    send.send_trailers(trailers).unwrap();
                });
            }
        })
    })
}

#[tokio::test]
async fn trailers_pass_a_filter_that_buffers_and_one_that_changes_them() {
    let calls = Calls::default();
    let app: App = Arc::new(|stream, _| {
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let mut heard = Vec::new();
                    while let Some(data) = body.data().await {
                        heard.extend_from_slice(&data.unwrap());
                    }
                    let trailers = body.trailers().await.unwrap().expect("the request's trailers pass");
                    let mut send = respond.send_response(Response::new(()), false).unwrap();
                    send.send_data(heard.into(), false).unwrap();
                    send.send_trailers(trailers).unwrap();
                });
            }
        })
    });
    let rig = Rig::start().await;
    let pod = rig.pod(10, app).await;
    let changing = Filter::Other(Arc::new(Changing {
        calls: calls.clone(),
        observe_request: true,
    }));
    let filters = FilterChain::new(vec![Filter::Other(Arc::new(Buffering { calls })), changing]);
    let http2 = |cluster: &mut cairn_waypoint::upstream::ClusterSettings| cluster.protocol = UpstreamProtocol::Http2;
    rig.serve(Config::default().http_with(WEB, &[pod.address], |http| http.filters = filters, http2))
        .await;
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let (answer, mut send) = client
        .send_request(Request::post("http://web/").body(()).unwrap(), false)
        .unwrap();
    send.send_data(Bytes::from_static(b"ab"), false).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", HeaderValue::from_static("1"));
    send.send_trailers(trailers).unwrap();
    let mut body = answer.await.unwrap().into_body();
    assert_eq!(body.data().await.unwrap().unwrap(), "<ABAB>");
    let trailers = body.trailers().await.unwrap().unwrap();
    assert_eq!(
        (&trailers["x-sum"], &trailers["x-trailer-seen"]),
        (&HeaderValue::from_static("1"), &HeaderValue::from_static("out"))
    );
}
