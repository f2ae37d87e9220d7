//! Copies of requests: what they carry, and that nothing that becomes of them reaches the request.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cairn_policy::{
    headers::{HeaderEdit, HeaderEdits, Mutation},
    route::{Forward, Fraction, Mirror, MirrorTarget, PathRewrite, Target as RouteTarget},
    timeout::RouteTimeouts,
};
use cairn_telemetry::trace::NodeFacts;
use cairn_waypoint::upstream::{ClusterSettings, UpstreamProtocol};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use parking_lot::Mutex;
use rig::{App, Config, Rig, echo_app, fetch, http_app, route, routes, send};

const WEB: &str = "10.96.1.10:80";
const CLUSTER: &str = "inbound-vip|80|http|10.96.1.10";
/// The most that a copy may be behind.
const BEHIND: usize = 1024 * 1024;

/// What came to a mirror.
#[derive(Clone, Debug)]
struct Seen {
    line: String,
    headers: HeaderMap,
    body: Bytes,
    trailers: Option<HeaderMap>,
}

type Book = Arc<Mutex<Vec<Seen>>>;

/// An application that notes what comes, and answers with what a client must never see.
fn noting(book: &Book) -> App {
    let book = book.clone();
    http_app(move |request| {
        let book = book.clone();
        async move {
            let (parts, body) = request.into_parts();
            let line = format!("{} {} {:?}", parts.method, parts.uri, parts.headers["host"]);
            // A copy that was cut is none.
            if let Ok(body) = body.collect().await {
                let trailers = body.trailers().cloned();
                let (headers, body) = (parts.headers, body.to_bytes());
                book.lock().push(Seen {
                    line,
                    headers,
                    body,
                    trailers,
                });
            }
            let mut answer = Response::new(Full::from("the mirror's"));
            *answer.status_mut() = StatusCode::IM_A_TEAPOT;
            answer
        }
    })
}

/// The same in HTTP/2.
fn noting_http2(book: &Book) -> App {
    let book = book.clone();
    Arc::new(move |stream, _| {
        let book = book.clone();
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let book = book.clone();
                tokio::spawn(async move {
                    let (parts, mut body) = request.into_parts();
                    let mut all = Vec::new();
                    while let Some(data) = body.data().await {
                        let Ok(data) = data else { return };
                        body.flow_control().release_capacity(data.len()).unwrap();
                        all.extend_from_slice(&data);
                    }
                    let trailers = body.trailers().await.unwrap();
                    book.lock().push(Seen {
                        line: format!("{} {}", parts.method, parts.uri),
                        headers: parts.headers,
                        body: all.into(),
                        trailers,
                    });
                    respond.send_response(Response::new(()), true).unwrap();
                });
            }
        })
    })
}

/// An application that takes its streams, and nothing more.
fn hanging() -> App {
    Arc::new(|stream, _| {
        Box::pin(async move {
            let _held = stream;
            std::future::pending::<()>().await;
        })
    })
}

fn forward(mirrors: Vec<Mirror>) -> Forward {
    Forward {
        mirrors,
        ..Forward::to(RouteTarget::Cluster(CLUSTER.into()))
    }
}

async fn wait_for(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn post(body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post("/up?q=1")
        .header("host", "web:80")
        .header("x-forwarded-for", "10.0.0.9")
        .header("x-copy-to", "by-header")
        .body(Full::new(body.into()))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mirror_gets_the_request_as_its_route_edits_it_and_the_client_only_its_answer() {
    let address = "10.244.0.2".parse().unwrap();
    let rig = Rig::start_with(|settings| {
        settings.node = NodeFacts {
            address: Some(address),
            ..NodeFacts::default()
        };
    })
    .await;
    let (first, second, none) = (Book::default(), Book::default(), Book::default());
    let web = rig.pod(10, echo_app("web")).await;
    let pods = [
        rig.pod(11, noting(&first)).await,
        rig.pod(12, noting(&second)).await,
        rig.pod(13, noting(&none)).await,
    ];
    let edits = HeaderEdits::new(vec![HeaderEdit::set("x-copy", "of %REQ(:PATH)%").unwrap()], vec![]);
    let to = forward(vec![
        Mirror::to("first"),
        Mirror {
            to: MirrorTarget::Header(HeaderName::from_static("x-copy-to")),
            shadow_host_suffix: true,
            edits: vec![Mutation::Edit(edits)],
            ..Mirror::to("")
        },
        Mirror {
            fraction: Fraction {
                numerator: 0,
                denominator: 100,
            },
            ..Mirror::to("none")
        },
        Mirror::to("missing"),
    ]);
    let to = Forward {
        path_rewrite: Some(PathRewrite::Full("/rewritten".into())),
        ..to
    };
    let config = Config::default()
        .http_with(WEB, &[web.address], |http| http.routes = routes(vec![route("/", to)]), |_| {})
        .cluster("first", &[pods[0].address])
        .cluster("by-header", &[pods[1].address])
        .cluster("none", &[pods[2].address]);
    rig.serve(config).await;
    let mut client = rig.http1(WEB).await;
    let (status, _, body) = send(&mut client, post("hello")).await;
    assert_eq!((status, &body[..]), (StatusCode::OK, &b"web /rewritten 5"[..]));
    // The next one finds their connections.
    let (status, ..) = fetch(&mut client, "/again").await;
    assert_eq!(status, StatusCode::OK);
    wait_for("both mirrors get their copies", || {
        first.lock().len() == 2 && second.lock().len() == 1
    })
    .await;
    let first = first.lock().clone();
    assert_eq!(first[0].line, r#"POST /rewritten?q=1 "web:80""#);
    assert_eq!(
        (&first[0].body[..], first[0].headers["x-envoy-internal"].to_str().unwrap()),
        (&b"hello"[..], "true")
    );
    assert_eq!(first[0].headers["x-forwarded-for"], "10.0.0.9,10.244.0.2");
    assert!(!first[0].headers.contains_key("x-copy"));
    assert_eq!((first[1].line.as_str(), first[1].body.len()), (r#"GET /rewritten "web""#, 0));
    let second = second.lock()[0].clone();
    assert_eq!(
        (second.line.as_str(), &second.body[..]),
        (r#"POST /rewritten?q=1 "web-shadow:80""#, &b"hello"[..])
    );
    assert_eq!(second.headers["x-copy"], "of /rewritten?q=1");
    assert_eq!(none.lock().len(), 0);
    let mirrors = &rig.engine.proxy.mirrors;
    // The cluster that is not there twice, and a header that is not there once.
    assert_eq!(
        (mirrors.begun.load(Ordering::SeqCst), mirrors.skipped.load(Ordering::SeqCst)),
        (3, 3)
    );
    assert_eq!(
        pods[0].connects.load(Ordering::SeqCst),
        1,
        "a mirror's connection is used again"
    );
    drop(client);
    rig.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_has_the_trailers_too() {
    let rig = Rig::start().await;
    let (original, copies) = (Book::default(), Book::default());
    let (web, mirror) = (
        rig.pod(10, noting_http2(&original)).await,
        rig.pod(11, noting_http2(&copies)).await,
    );
    let http2 = |cluster: &mut ClusterSettings| cluster.protocol = UpstreamProtocol::Http2;
    let to = forward(vec![Mirror::to("mirror")]);
    let config = Config::default()
        .http_with(WEB, &[web.address], |http| http.routes = routes(vec![route("/", to)]), http2)
        .cluster_with("mirror", &[mirror.address], http2);
    rig.serve(config).await;
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let request = Request::post("http://web/up").body(()).unwrap();
    let (answer, mut stream) = client.send_request(request, false).unwrap();
    stream.send_data(Bytes::from_static(b"abc"), false).unwrap();
    let trailers: HeaderMap = [(HeaderName::from_static("x-sum"), HeaderValue::from_static("294"))]
        .into_iter()
        .collect();
    stream.send_trailers(trailers.clone()).unwrap();
    assert_eq!(answer.await.unwrap().status(), StatusCode::OK);
    wait_for("the copy comes", || copies.lock().len() == 1).await;
    for book in [original, copies] {
        let seen = book.lock()[0].clone();
        assert_eq!((&seen.body[..], seen.trailers), (&b"abc"[..], Some(trailers.clone())));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_body_passes_a_mirror_that_hangs_and_little_of_it_is_kept() {
    const LENGTH: usize = 100 * 1024 * 1024;
    let rig = Rig::start().await;
    let (web, mirror) = (rig.pod(10, counting()).await, rig.pod(11, hanging()).await);
    let to = forward(vec![Mirror::to("mirror")]);
    let config = Config::default()
        .http_with(WEB, &[web.address], |http| http.routes = routes(vec![route("/", to)]), |_| {})
        .cluster("mirror", &[mirror.address]);
    rig.serve(config).await;
    let proxy = rig.engine.proxy.clone();
    let most = Arc::new(AtomicUsize::new(0));
    let watch = tokio::spawn({
        let (proxy, most) = (proxy.clone(), most.clone());
        async move {
            loop {
                most.fetch_max(proxy.mirrors.bodies.held(), Ordering::SeqCst);
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        }
    });
    let mut client = rig.http1(WEB).await;
    let begun = Instant::now();
    let (status, _, body) = send(&mut client, post(vec![7; LENGTH])).await;
    let took = begun.elapsed();
    watch.abort();
    assert_eq!((status, body), (StatusCode::OK, LENGTH.to_string().into()));
    assert!(took < Duration::from_secs(60), "{took:?}");
    let most = most.load(Ordering::SeqCst);
    assert!(most <= BEHIND, "{most} bytes were kept for the mirror");
    let mirrors = &proxy.mirrors;
    assert_eq!((mirrors.bodies.cut.load(Ordering::SeqCst), mirrors.bodies.held()), (1, 0));
    assert_eq!(mirror.connects.load(Ordering::SeqCst), 1, "the mirror was reached");
    wait_for("the copy is given up", || mirrors.failed.load(Ordering::SeqCst) == 1).await;
    // The connection of the request goes on.
    let (status, ..) = fetch(&mut client, "/next").await;
    assert_eq!(status, StatusCode::OK);
}

/// Answers with how many bytes came.
fn counting() -> App {
    http_app(|request| async move {
        let (mut body, mut length) = (request.into_body(), 0);
        while let Some(Ok(frame)) = body.frame().await {
            length += frame.data_ref().map_or(0, Bytes::len);
        }
        Response::new(Full::from(length.to_string()))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_cannot_be_reached_or_does_not_answer_harms_nobody_and_is_given_up() {
    let rig = Rig::start().await;
    let web = rig.pod(10, echo_app("web")).await;
    let hangs = rig.pod(11, hanging()).await;
    let refuses = rig
        .pod_that(12, |connect| {
            connect.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new(), "no")
        })
        .await;
    let to = Forward {
        timeouts: RouteTimeouts {
            timeout: Some(Duration::from_millis(300)),
            ..RouteTimeouts::default()
        },
        ..forward(vec![Mirror::to("hangs"), Mirror::to("refuses"), Mirror::to("empty")])
    };
    let config = Config::default()
        .http_with(WEB, &[web.address], |http| http.routes = routes(vec![route("/", to)]), |_| {})
        .cluster("hangs", &[hangs.address])
        .cluster("refuses", &[refuses.address])
        .cluster("empty", &[]);
    rig.serve(config).await;
    let mut client = rig.http1(WEB).await;
    let (status, _, body) = send(&mut client, post("hello")).await;
    assert_eq!((status, &body[..]), (StatusCode::OK, &b"web /up 5"[..]));
    let told = rig.told(1).await;
    assert_eq!(
        (told.attempts, told.flags.as_str(), told.details.as_str()),
        (1, "-", "via_upstream")
    );
    let mirrors = &rig.engine.proxy.mirrors;
    wait_for("all three are given up", || mirrors.failed.load(Ordering::SeqCst) == 3).await;
    drop(client);
    rig.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_its_client_gives_up_leaves_no_whole_copy() {
    let rig = Rig::start().await;
    let copies = Book::default();
    let (web, mirror) = (rig.pod(10, hanging()).await, rig.pod(11, noting_http2(&copies)).await);
    let to = forward(vec![Mirror::to("mirror")]);
    let config = Config::default()
        .http_with(WEB, &[web.address], |http| http.routes = routes(vec![route("/", to)]), |_| {})
        .cluster_with("mirror", &[mirror.address], |cluster| {
            cluster.protocol = UpstreamProtocol::Http2
        });
    rig.serve(config).await;
    let mut client = rig.http2(WEB).await.ready().await.unwrap();
    let request = Request::post("http://web/up").body(()).unwrap();
    let (answer, mut stream) = client.send_request(request, false).unwrap();
    stream.send_data(Bytes::from_static(b"abc"), false).unwrap();
    let mirrors = &rig.engine.proxy.mirrors;
    wait_for("the copy begins", || mirrors.begun.load(Ordering::SeqCst) == 1).await;
    stream.send_reset(h2::Reason::CANCEL);
    drop((answer, stream));
    wait_for("the copy is given up", || mirrors.failed.load(Ordering::SeqCst) == 1).await;
    assert_eq!(copies.lock().len(), 0);
}
