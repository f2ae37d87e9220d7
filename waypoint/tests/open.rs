//! What stays open for long obeys what comes later: policies that deny it, and the end of its service.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_filters::{Filter, FilterChain};
use cairn_hbone::TunnelStream;
use cairn_policy::{
    matcher::StringMatcher,
    rbac::{Action, Condition, Filters, Policy, Rbac, Rules, Text},
    route::{Forward, Target},
};
use cairn_waypoint::{serve::open::OnChange, upstream::UpstreamProtocol};
use http::{Request, StatusCode};
use rig::{App, Config, Rig, mirror, route, routes, tunnels};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

const WEB: &str = "10.96.1.10:80";
const DB: &str = "10.96.1.20:5432";
const PATIENCE: Duration = Duration::from_secs(10);
/// Longer than it takes until a change has been looked at.
const LOOKED: Duration = Duration::from_millis(300);
const DENIED: &str = "rbac_access_denied_by_changed_policy";
const GONE: &str = "downstream_local_disconnect(service_gone)";

fn rbac(action: Action, permission: Condition, principal: Condition) -> Rbac {
    let policy = Policy {
        permissions: vec![permission],
        principals: vec![principal],
        condition: None,
    };
    Rbac {
        rules: Some(Rules::new(action, BTreeMap::from([("policy".to_owned(), policy)]))),
        shadow: None,
    }
}

/// Denies the client of the rig by who it is.
fn deny_client() -> Rbac {
    rbac(
        Action::Deny,
        Condition::Always,
        Condition::Text(Text::PeerPrincipal, StringMatcher::exact(rig::id("client").as_str())),
    )
}

/// Denies requests by where their path begins.
fn deny(path: &str) -> Rbac {
    rbac(Action::Deny, Condition::Path(StringMatcher::prefix(path)), Condition::Always)
}

fn connections(endpoint: SocketAddr, filter: Rbac) -> Config {
    Config::default().tcp_with(
        DB,
        tunnels(&[endpoint]),
        |tcp| tcp.rbac = Filters::from_iter([filter]),
        |_| {},
    )
}

fn requests(endpoint: SocketAddr, filter: Rbac) -> Config {
    let filters = FilterChain::new(vec![Filter::Rbac(Arc::new(filter))]);
    Config::default().http_with(WEB, &[endpoint], |http| http.filters = filters, |_| {})
}

/// The same, whose pods speak HTTP/2.
fn calls(endpoint: SocketAddr, filter: Rbac) -> Config {
    let filters = FilterChain::new(vec![Filter::Rbac(Arc::new(filter))]);
    Config::default().http_with(
        WEB,
        &[endpoint],
        |http| http.filters = filters,
        |cluster| cluster.protocol = UpstreamProtocol::Http2,
    )
}

/// An application that answers every call at once and then sends back what comes, until it has ended.
fn echoes() -> App {
    Arc::new(|stream, _| {
        Box::pin(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                    let mut body = request.into_body();
                    while let Some(Ok(data)) = body.data().await {
                        let _ = body.flow_control().release_capacity(data.len());
                        let _ = send.send_data(data, false);
                    }
                    let _ = send.send_data(Bytes::new(), true);
                });
            }
        })
    })
}

/// A call that has begun.
struct Call {
    send: h2::SendStream<Bytes>,
    answer: h2::RecvStream,
}

impl Call {
    async fn begin(sender: &mut h2::client::SendRequest<Bytes>, path: &str) -> Self {
        let request = Request::post(format!("http://web{path}")).header("content-type", "application/grpc");
        let (answer, send) = sender.send_request(request.body(()).unwrap(), false).unwrap();
        let answer = timeout(PATIENCE, answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let answer = answer.into_body();
        let mut call = Self { send, answer };
        call.works().await;
        call
    }

    /// What is said is heard.
    async fn works(&mut self) {
        self.send.send_data(Bytes::from_static(b"ping"), false).unwrap();
        let heard = timeout(PATIENCE, self.answer.data()).await.unwrap().unwrap().unwrap();
        assert_eq!(heard, "ping");
    }

    /// How it ends.
    async fn end(&mut self) -> h2::Error {
        timeout(PATIENCE, self.answer.data()).await.unwrap().unwrap().unwrap_err()
    }
}

/// Says something and hears it back.
async fn works(stream: &mut TunnelStream) {
    stream.write_all(b"ping").await.unwrap();
    let mut heard = [0; 4];
    timeout(PATIENCE, stream.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(&heard, b"ping");
}

/// What nobody is.
fn nobody() -> Rbac {
    rbac(Action::Deny, Condition::Always, Condition::Not(Box::new(Condition::Always)))
}

#[tokio::test]
async fn an_open_connection_stays_until_a_policy_denies_it() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    rig.serve(connections(pod.address, nobody())).await;
    let mut stream = rig.open(DB).await.unwrap().stream;
    for _ in 0..2 {
        works(&mut stream).await;
        // All chains are new, and say what the old ones said.
        rig.publish(connections(pod.address, nobody()));
        tokio::time::sleep(LOOKED).await;
    }
    rig.publish(connections(pod.address, deny_client()));
    let end = timeout(PATIENCE, stream.read(&mut [0; 4])).await.unwrap();
    assert!(end.is_err(), "a reset, so that nobody takes it for the end: {end:?}");
    rig.told(1).await;
    rig.settled().await;
}

#[tokio::test]
async fn a_connection_that_a_change_finds_on_its_way_in_is_decided_by_it() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    rig.serve(connections(pod.address, nobody())).await;
    for _ in 0..20 {
        let opening = rig.open(DB);
        rig.publish(connections(pod.address, deny_client()));
        if let Ok(mut opened) = opening.await {
            let end = timeout(PATIENCE, opened.stream.read(&mut [0; 4])).await.unwrap();
            assert!(end.is_err(), "{end:?}");
        }
        rig.publish(connections(pod.address, nobody()));
    }
    rig.settled().await;
}

#[tokio::test]
async fn a_websocket_is_closed_when_its_request_would_be_denied_now() {
    let rig = Rig::start().await;
    let app: App = Arc::new(|mut stream, _| {
        Box::pin(async move {
            let mut heard = Vec::new();
            while !heard.ends_with(b"\r\n\r\n") && stream.read_buf(&mut heard).await.unwrap() > 0 {}
            let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhello";
            stream.write_all(answer).await.unwrap();
            let _ = stream.read(&mut [0; 1]).await;
        })
    });
    let pod = rig.pod(10, app).await;
    let serving = |path| requests(pod.address, deny(path));
    rig.serve(serving("/other")).await;
    let mut stream = rig.open(WEB).await.unwrap().stream;
    let ask = b"GET /chat HTTP/1.1\r\nhost: web\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(ask).await.unwrap();
    let mut heard = Vec::new();
    while !heard.ends_with(b"hello") {
        assert!(timeout(PATIENCE, stream.read_buf(&mut heard)).await.unwrap().unwrap() > 0);
    }
    rig.publish(serving("/others"));
    let silent = timeout(LOOKED, stream.read(&mut [0; 1])).await;
    assert!(silent.is_err(), "it stays open: {silent:?}");
    rig.publish(serving("/chat"));
    let end = timeout(PATIENCE, stream.read(&mut [0; 1])).await.unwrap();
    assert!(end.is_err(), "{end:?}");
    let told = rig.told(1).await;
    assert_eq!((told.status, told.details.as_str()), (Some(101), DENIED));
    rig.settled().await;
}

#[tokio::test]
async fn a_call_is_reset_when_it_would_be_denied_now_and_its_neighbour_goes_on() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echoes()).await;
    rig.serve(calls(pod.address, nobody())).await;
    let mut sender = rig.http2(WEB).await;
    let mut denied = Call::begin(&mut sender, "/a.A/Watch").await;
    let mut allowed = Call::begin(&mut sender, "/b.B/Watch").await;
    rig.publish(calls(pod.address, deny("/c.C")));
    tokio::time::sleep(LOOKED).await;
    denied.works().await;
    allowed.works().await;
    rig.publish(calls(pod.address, deny("/a.A")));
    let end = denied.end().await;
    assert!(end.is_reset() && end.is_remote(), "{end}");
    let told = rig.told(1).await;
    assert_eq!((told.status, told.details.as_str()), (Some(200), DENIED));
    // It was told of the change too.
    tokio::time::sleep(LOOKED).await;
    allowed.works().await;
    drop((allowed, denied, sender));
    rig.settled().await;
}

#[tokio::test]
async fn a_request_that_waits_for_its_answer_is_refused_when_it_would_be_denied_now() {
    let rig = Rig::start().await;
    let silent: App =
        Arc::new(|mut stream, _| Box::pin(async move { while stream.read(&mut [0; 512]).await.is_ok_and(|count| count > 0) {} }));
    let pod = rig.pod(10, silent).await;
    rig.serve(requests(pod.address, nobody())).await;
    let mut sender = rig.http1(WEB).await;
    let request = Request::get("/poll").header("host", "web").body(Default::default()).unwrap();
    let asking = tokio::spawn(async move { rig::send(&mut sender, request).await });
    let mut sender = rig.http2(WEB).await;
    let request = Request::post("http://web/poll").body(()).unwrap();
    let (answer, mut body) = sender.send_request(request, false).unwrap();
    body.send_data(Bytes::from_static(b"some of it"), false).unwrap();
    while pod.connects.load(std::sync::atomic::Ordering::SeqCst) < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    rig.publish(requests(pod.address, deny("/poll")));
    let (status, _, text) = timeout(PATIENCE, asking).await.unwrap().unwrap();
    assert_eq!((status, &text[..]), (StatusCode::FORBIDDEN, &b"RBAC: access denied"[..]));
    let answer = timeout(PATIENCE, answer).await.unwrap().unwrap();
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    let told = rig.told(2).await;
    assert_eq!((told.status, told.details.as_str(), told.attempts), (Some(403), DENIED, 1));
    drop((answer, body, sender));
    rig.settled().await;
}

/// An application that begins an answer and never ends it.
fn endless() -> App {
    Arc::new(|mut stream, _| {
        Box::pin(async move {
            let mut heard = Vec::new();
            while !heard.ends_with(b"\r\n\r\n") && stream.read_buf(&mut heard).await.unwrap() > 0 {}
            let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
            stream.write_all(answer).await.unwrap();
            let _ = stream.read(&mut [0; 1]).await;
        })
    })
}

/// Asks by HTTP/1.1 and reads until the answer has begun.
async fn ask(rig: &Rig, path: &str) -> TunnelStream {
    let mut stream = rig.open(WEB).await.unwrap().stream;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: web\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut heard = Vec::new();
    while !heard.ends_with(b"hello\r\n") {
        assert!(timeout(PATIENCE, stream.read_buf(&mut heard)).await.unwrap().unwrap() > 0);
    }
    stream
}

#[tokio::test]
async fn policy_speaks_of_the_request_as_it_came_not_of_what_its_route_makes_of_it() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, endless()).await;
    let serving = |filter| {
        let filters = FilterChain::new(vec![Filter::Rbac(Arc::new(filter))]);
        let forward = Forward {
            path_rewrite: Some(cairn_policy::route::PathRewrite::Full("/inside".into())),
            ..Forward::to(Target::Cluster("inbound-vip|80|http|10.96.1.10".into()))
        };
        let table = routes(vec![route("/", forward)]);
        Config::default().http_with(
            WEB,
            &[pod.address],
            |http| (http.filters, http.routes) = (filters, table),
            |_| {},
        )
    };
    rig.serve(serving(nobody())).await;
    let mut stream = ask(&rig, "/outside").await;
    rig.publish(serving(deny("/inside")));
    let silent = timeout(LOOKED, stream.read(&mut [0; 1])).await;
    assert!(silent.is_err(), "it stays open: {silent:?}");
    rig.publish(serving(deny("/outside")));
    let end = timeout(PATIENCE, stream.read(&mut [0; 1])).await.unwrap();
    assert!(end.is_err(), "{end:?}");
    assert_eq!(rig.told(1).await.details, DENIED);
    rig.settled().await;
}

#[tokio::test]
async fn whoever_says_so_keeps_what_is_open_whatever_comes() {
    let change = |settings: &mut cairn_waypoint::proxy::DataSettings| {
        settings.open_connections = OnChange::Continue;
        settings.service_drain = Duration::from_millis(1);
    };
    let rig = Rig::start_with(change).await;
    let pod = rig.pod(10, echoes()).await;
    rig.serve(calls(pod.address, nobody())).await;
    let mut call = Call::begin(&mut rig.http2(WEB).await, "/a.A/Watch").await;
    for config in [calls(pod.address, deny("/a.A")), Config::default()] {
        rig.publish(config);
        tokio::time::sleep(LOOKED).await;
        call.works().await;
    }
}

#[tokio::test]
async fn all_of_a_service_is_closed_at_any_change_where_that_is_wanted() {
    let rig = Rig::start_with(|settings| settings.open_connections = OnChange::Close).await;
    let pod = rig.pod(10, echoes()).await;
    rig.serve(calls(pod.address, nobody())).await;
    let mut call = Call::begin(&mut rig.http2(WEB).await, "/a.A/Watch").await;
    rig.publish(calls(pod.address, nobody()));
    let end = call.end().await;
    assert!(end.is_reset() && end.is_remote(), "{end}");
}

#[tokio::test]
async fn what_is_open_outlives_its_service_by_the_drain_time_and_nothing_new_comes() {
    const DRAIN: Duration = Duration::from_millis(1500);
    let rig = Rig::start_with(|settings| settings.service_drain = DRAIN).await;
    let (mirrors, echo, endless) = (
        rig.pod(10, mirror()).await,
        rig.pod(11, echoes()).await,
        rig.pod(12, endless()).await,
    );
    let both = || {
        let speaks = |cluster: &mut cairn_waypoint::upstream::ClusterSettings| cluster.protocol = UpstreamProtocol::Downstream;
        connections(mirrors.address, nobody())
            .http_with("10.96.1.30:80", &[endless.address], |_| {}, |_| {})
            .http_with(WEB, &[echo.address], |_| {}, speaks)
    };
    rig.serve(both()).await;
    let mut bytes = rig.open(DB).await.unwrap().stream;
    works(&mut bytes).await;
    let mut sender = rig.http2(WEB).await;
    let mut call = Call::begin(&mut sender, "/a.A/Watch").await;
    let mut idle = rig.open(WEB).await.unwrap().stream;
    idle.write_all(b"GET / HT").await.unwrap();

    let begun = tokio::time::Instant::now();
    rig.publish(Config::default());
    let refused = rig.open(DB).await.unwrap_err();
    assert_eq!(refused.status(), Some(StatusCode::SERVICE_UNAVAILABLE));
    tokio::time::sleep(LOOKED).await;
    works(&mut bytes).await;
    call.works().await;

    let end = timeout(PATIENCE, bytes.read(&mut [0; 4])).await.unwrap();
    assert!(end.is_err(), "a reset, so that nobody takes it for the end: {end:?}");
    assert!(begun.elapsed() >= DRAIN, "{:?}", begun.elapsed());
    call.end().await;
    let _ = timeout(PATIENCE, idle.read(&mut [0; 4])).await.unwrap();
    rig.told(2).await;
    let mut told: Vec<_> = rig
        .told
        .lock()
        .iter()
        .map(|told| format!("{}{}", told.details, told.termination))
        .collect();
    told.retain(|told| told == GONE);
    assert_eq!(told.len(), 2, "{:?}", rig.told.lock());
    rig.settled().await;
}

#[tokio::test]
async fn a_service_that_comes_back_in_time_keeps_what_is_open() {
    const DRAIN: Duration = Duration::from_millis(600);
    let rig = Rig::start_with(|settings| settings.service_drain = DRAIN).await;
    let pod = rig.pod(10, echoes()).await;
    rig.serve(calls(pod.address, nobody())).await;
    let mut call = Call::begin(&mut rig.http2(WEB).await, "/a.A/Watch").await;
    rig.publish(Config::default());
    tokio::time::sleep(LOOKED).await;
    rig.publish(calls(pod.address, nobody()));
    tokio::time::sleep(DRAIN).await;
    call.works().await;
    rig.publish(calls(pod.address, deny("/a.A")));
    assert!(call.end().await.is_reset());
}
