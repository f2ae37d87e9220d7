//! Who is let in: requests, TCP connections and tunnels that a policy denies, on the wire.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::large_futures,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, and may look at the clock"
)]

mod rig;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use cairn_filters::{Filter, FilterChain};
use cairn_policy::{
    matcher::StringMatcher,
    rbac::{Action, Condition, Filters, Policy, Rbac, Rules, Text},
};
use http::{Request, StatusCode};
use http_body_util::Full;
use rig::{Config, Rig, echo_app, fetch, mirror, send, tunnels};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

const WEB: &str = "10.96.1.10:80";
const DB: &str = "10.96.1.20:5432";
const PATIENCE: Duration = Duration::from_secs(10);
const POLICY: &str = "ns[app]-policy[p]-rule[0]";
const DENIED: &str = "rbac_access_denied_matched_policy[ns[app]-policy[p]-rule[0]]";

fn rbac(action: Action, permission: Condition, principal: Condition) -> Rbac {
    let policy = Policy {
        permissions: vec![permission],
        principals: vec![principal],
        condition: None,
    };
    Rbac {
        rules: Some(Rules::new(action, BTreeMap::from([(POLICY.to_owned(), policy)]))),
        shadow: None,
    }
}

/// Denies the client of the rig by who it is.
fn deny_client(text: Text) -> Rbac {
    rbac(
        Action::Deny,
        Condition::Always,
        Condition::Text(text, StringMatcher::exact(rig::id("client").as_str())),
    )
}

fn requests(config: Config, endpoint: std::net::SocketAddr, filter: Rbac) -> Config {
    let filters = FilterChain::new(vec![Filter::Rbac(Arc::new(filter))]);
    config.http_with(WEB, &[endpoint], |http| http.filters = filters, |_| {})
}

fn connections(endpoint: std::net::SocketAddr, filter: Rbac) -> Config {
    Config::default().tcp_with(
        DB,
        tunnels(&[endpoint]),
        |tcp| tcp.rbac = Filters::from_iter([filter]),
        |_| {},
    )
}

#[tokio::test]
async fn a_denied_request_is_answered_403_and_the_next_one_goes_on() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let admin = Condition::Path(StringMatcher::prefix("/admin"));
    rig.serve(requests(
        Config::default(),
        pod.address,
        rbac(Action::Deny, admin, Condition::Always),
    ))
    .await;
    let mut sender = rig.http1(WEB).await;
    for (path, allowed) in [("/a", true), ("/admin/x?q", false), ("/b", true)] {
        let (status, headers, body) = fetch(&mut sender, path).await;
        if allowed {
            assert_eq!(status, StatusCode::OK, "{path}");
        } else {
            assert_eq!((status, &body[..]), (StatusCode::FORBIDDEN, &b"RBAC: access denied"[..]));
            assert_eq!(headers["content-type"], "text/plain");
            assert!(!headers.contains_key("connection"));
        }
    }
    rig.told(3).await;
    let told = rig.told.lock()[1].clone();
    assert_eq!(
        (told.status, told.details.as_str(), told.flags.as_str(), told.attempts),
        (Some(403), DENIED, "-", 0)
    );
}

#[tokio::test]
async fn a_denied_call_is_told_so_in_grpc() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(requests(Config::default(), pod.address, deny_client(Text::PeerPrincipal)))
        .await;
    let mut sender = rig.http1(WEB).await;
    let request = Request::post("/a.B/C")
        .header("host", "web")
        .header("content-type", "application/grpc");
    let (status, headers, _) = send(&mut sender, request.body(Full::new(Bytes::new())).unwrap()).await;
    assert_eq!(
        (status, &headers["grpc-status"], &headers["grpc-message"]),
        (StatusCode::OK, &"7".parse().unwrap(), &"RBAC: access denied".parse().unwrap())
    );
    assert_eq!(rig.told(1).await.details, DENIED);
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_denied_upgrade_ends_its_connection() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    rig.serve(requests(Config::default(), pod.address, deny_client(Text::PeerPrincipal)))
        .await;
    let ask = b"GET /ws HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n\r\n";
    let (answer, ended) = timeout(PATIENCE, rig.raw(WEB, ask)).await.unwrap();
    assert!(ended.is_none(), "{ended:?}");
    assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
    assert!(answer.contains("connection: close\r\n"), "{answer}");
}

#[tokio::test]
async fn the_newest_policy_decides_about_the_next_request_of_an_open_connection() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;

    rig.serve(requests(Config::default(), pod.address, nobody())).await;
    let mut sender = rig.http1(WEB).await;
    assert_eq!(fetch(&mut sender, "/").await.0, StatusCode::OK);
    rig.publish(requests(Config::default(), pod.address, deny_client(Text::PeerPrincipal)));
    assert_eq!(fetch(&mut sender, "/").await.0, StatusCode::FORBIDDEN);
    rig.publish(requests(Config::default(), pod.address, nobody()));
    assert_eq!(fetch(&mut sender, "/").await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_denied_connection_is_refused_before_its_endpoint_hears_of_it() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, mirror()).await;
    rig.serve(connections(pod.address, deny_client(Text::PeerPrincipal))).await;
    let error = timeout(PATIENCE, rig.open(DB)).await.unwrap().unwrap_err();
    assert_eq!(error.status(), Some(StatusCode::FORBIDDEN), "{error}");
    let text = error.to_string();
    assert!(text.contains("RBAC: access denied") && !text.contains("policy["), "{text}");
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0);
    let told = rig.told(1).await;
    assert_eq!(
        (told.termination.as_str(), told.flags.as_str(), told.attempts),
        (DENIED, "-", 0)
    );

    // The port is the service's.
    rig.publish(connections(
        pod.address,
        rbac(Action::Allow, Condition::Port(5432..=5432), Condition::Always),
    ));
    let mut stream = rig.open(DB).await.unwrap().stream;
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
}

#[tokio::test]
async fn a_denied_connection_of_unknown_protocol_is_reset_and_its_requests_are_not() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let config = Config::default().detect_with(WEB, &[pod.address], |tcp| {
        tcp.rbac = Filters::from_iter([deny_client(Text::PeerPrincipal)])
    });
    rig.serve(config).await;
    let mut stream = rig.open(WEB).await.unwrap().stream;
    stream.write_all(b"\x01\x02\x03\x04 is no HTTP\r\n").await.unwrap();
    let ended = timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(rig.told(1).await.termination, DENIED);
    assert_eq!(pod.connects.load(Ordering::SeqCst), 0);
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_client_that_is_denied_bytes_may_think_before_it_speaks_http() {
    let rig = Rig::start_with(|settings| settings.detect_timeout = Duration::from_millis(20)).await;
    let pod = rig.pod(10, echo_app("web")).await;
    let config = Config::default().detect_with(WEB, &[pod.address], |tcp| {
        tcp.rbac = Filters::from_iter([deny_client(Text::PeerPrincipal)])
    });
    rig.serve(config).await;
    let mut stream = rig.open(WEB).await.unwrap().stream;
    assert!(
        timeout(Duration::from_millis(300), stream.read_u8()).await.is_err(),
        "nothing was said yet"
    );
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    assert!(
        answer.starts_with(b"HTTP/1.1 200 OK\r\n"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    // One record: what was tried while it was silent is nobody's request.
    assert_eq!(rig.told(1).await.status, Some(200));
}

#[tokio::test]
async fn a_denied_tunnel_is_refused_whoever_it_is_for() {
    let rig = Rig::start().await;
    let pod = rig.pod(10, echo_app("web")).await;
    let config = |filter| {
        Config::default()
            .http(WEB, &[pod.address])
            .guarded(Filters::from_iter([filter]))
    };
    rig.serve(config(deny_client(Text::Certificate))).await;
    for authority in [WEB, "10.96.9.9:1234"] {
        let error = timeout(PATIENCE, rig.open(authority)).await.unwrap().unwrap_err();
        assert_eq!(error.status(), Some(StatusCode::FORBIDDEN), "{authority}: {error}");
        assert!(error.to_string().contains("RBAC: access denied"), "{error}");
    }
    // Policies of tunnels speak of the tunnel's own port, and of no path.
    rig.publish(config(rbac(
        Action::Allow,
        Condition::Port(15008..=15008),
        Condition::Authenticated,
    )));
    assert_eq!(fetch(&mut rig.http1(WEB).await, "/").await.0, StatusCode::OK);
}

/// What nobody is.
fn nobody() -> Rbac {
    rbac(Action::Deny, Condition::Always, Condition::Not(Box::new(Condition::Always)))
}
