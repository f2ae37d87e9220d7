//! The pages over real connections, on ports that the system chooses.

use std::{net::SocketAddr, sync::Arc};

use cairn_agent::shutdown::{self, DrainSettings};
use cairn_identity::{Identity, generate::Authority};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::*;
use crate::{
    config::Compiler,
    engine::{Engine, Parts},
    logging,
    proxy::DataSettings,
};

struct Proxy {
    readiness: Readiness,
    requests: shutdown::Requests,
    admin: SocketAddr,
    agent: SocketAddr,
    ready: SocketAddr,
    metrics: SocketAddr,
    engine: Engine,
    pages: Pages,
}

async fn proxy() -> Proxy {
    let id = "spiffe://cluster.local/ns/app/sa/waypoint".parse().unwrap();
    let identity = Identity::fixed(Authority::new("test").unwrap().issue(&id).unwrap());
    let settings = DataSettings::default();
    let engine = Engine::new(Parts {
        identity,
        network: String::new(),
        version: "1.31.0".into(),
        settings,
        observer: None,
    });
    let compiler = Compiler::new(engine.workloads.clone(), engine.snapshot.clone(), None);
    let readiness = Readiness::new(|| vec!["waiting for istiod at istiod:15012".to_owned()]);
    let (control, requests) = shutdown::channel();
    let store: Arc<_> = compiler.store().clone();
    metrics::register(&engine.registry, &engine.proxy, &store);
    let status = cairn_xds::Status::default();
    metrics::register_istiod(&engine.registry, &status);
    let node = cairn_proto::envoy::config::core::v3::Node {
        id: "waypoint~10.0.0.1~w.app~d".into(),
        ..Default::default()
    };
    let pages = Pages::new(&engine, store, readiness.clone())
        .about(About {
            node: About::node_json(&node),
            options: serde_json::json!({ "concurrency": 1 }),
        })
        .istiod(status)
        .logging(logging::Handle::detached())
        .shutdown(control);
    stats::register(&pages);
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    Proxy {
        admin: serve(any, pages.clone()).await.unwrap(),
        agent: server::start("test", any, agent::router(pages.clone())).await.unwrap(),
        ready: server::start("test", any, agent::ready_router(pages.clone())).await.unwrap(),
        metrics: server::start("test", any, agent::metrics_router(pages.clone()))
            .await
            .unwrap(),
        readiness,
        requests,
        engine,
        pages,
    }
}

/// Status and body.
async fn ask(at: SocketAddr, method: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

async fn json(at: SocketAddr, path: &str) -> Value {
    let (status, body) = ask(at, "GET", path).await;
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {error}: {body}"))
}

#[tokio::test]
async fn each_port_has_its_pages_and_no_others() {
    let proxy = proxy().await;
    let cases = [
        (proxy.ready, "GET", "/healthz/ready", 503),
        (proxy.ready, "GET", "/stats/prometheus", 404),
        (proxy.ready, "GET", "/config_dump", 404),
        (proxy.ready, "POST", "/quitquitquit", 404),
        (proxy.metrics, "GET", "/stats/prometheus", 200),
        (proxy.metrics, "GET", "/healthz/ready", 404),
        (proxy.metrics, "GET", "/stats", 404),
        (proxy.agent, "GET", "/healthz/ready", 503),
        (proxy.agent, "GET", "/stats/prometheus", 200),
        (proxy.agent, "GET", "/metrics", 200),
        (proxy.agent, "GET", "/quitquitquit", 405),
        (proxy.agent, "GET", "/drain", 405),
        (proxy.agent, "GET", "/config_dump", 404),
        (proxy.admin, "GET", "/quitquitquit", 405),
        (proxy.admin, "GET", "/ready", 503),
        (proxy.admin, "GET", "/nothing", 404),
    ];
    for (at, method, path, want) in cases {
        assert_eq!(ask(at, method, path).await.0, want, "{method} {path}");
    }
    // The page that lists the pages lists what is there.
    let (_, help) = ask(proxy.admin, "GET", "/help").await;
    for line in help.lines().skip(1) {
        let (path, _) = line.trim().split_once(':').unwrap();
        assert_ne!(ask(proxy.admin, "GET", path).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn readiness_is_told_on_all_ports_with_the_reason() {
    let proxy = proxy().await;
    for at in [proxy.agent, proxy.ready] {
        assert_eq!(
            ask(at, "GET", "/healthz/ready").await,
            (503, "not ready: waiting for istiod at istiod:15012\n".to_owned())
        );
    }
    proxy.readiness.serving();
    for at in [proxy.agent, proxy.ready] {
        assert_eq!(ask(at, "GET", "/healthz/ready").await.0, 200);
    }
    assert_eq!(ask(proxy.admin, "GET", "/ready").await, (200, "LIVE\n".to_owned()));
    assert_eq!(ask(proxy.admin, "POST", "/healthcheck/fail").await.0, 200);
    assert_eq!(ask(proxy.ready, "GET", "/healthz/ready").await.0, 503);
    assert_eq!(json(proxy.admin, "/server_info").await["state"], "DRAINING");
    assert_eq!(ask(proxy.admin, "POST", "/healthcheck/ok").await.0, 200);
    assert_eq!(ask(proxy.ready, "GET", "/healthz/ready").await.0, 200);
}

#[tokio::test]
async fn silent_clients_do_not_keep_the_probe_waiting() {
    let proxy = proxy().await;
    for at in [proxy.ready, proxy.agent, proxy.metrics, proxy.admin] {
        let mut silent = Vec::new();
        for _ in 0..200 {
            silent.push(TcpStream::connect(at).await.unwrap());
        }
        let probe = ask(at, "GET", "/healthz/ready");
        let answered = tokio::time::timeout(std::time::Duration::from_secs(5), probe).await;
        assert!(answered.is_ok(), "{at}");
    }
}

#[tokio::test]
async fn tools_find_envoys_forms() {
    let proxy = proxy().await;
    let info = json(proxy.admin, "/server_info").await;
    assert_eq!(info["state"], "PRE_INITIALIZING");
    assert_eq!(info["node"]["id"], "waypoint~10.0.0.1~w.app~d");
    assert_eq!(info["version"].as_str().unwrap().split('/').count(), 5);
    let dump = json(proxy.admin, "/config_dump").await;
    let kinds = |dump: &Value| -> Vec<String> {
        let kind = |section: &Value| section["@type"].as_str().unwrap().rsplit('.').next().unwrap().to_owned();
        dump["configs"].as_array().unwrap().iter().map(kind).collect()
    };
    assert!(!kinds(&dump).contains(&"EndpointsConfigDump".to_owned()));
    for query in ["include_eds", "include_eds=true"] {
        assert!(kinds(&json(proxy.admin, &format!("/config_dump?{query}")).await).contains(&"EndpointsConfigDump".to_owned()));
    }
    assert!(json(proxy.admin, "/clusters?format=json").await["cluster_statuses"].is_array());
    assert_eq!(json(proxy.admin, "/certs").await["certificates"].as_array().unwrap().len(), 1);
    assert_ne!(json(proxy.admin, "/memory").await["allocated"], "0");
    assert_eq!(json(proxy.admin, "/unsupported").await["unsupported"], serde_json::json!([]));
    let (_, stats) = ask(
        proxy.admin,
        "GET",
        "/stats?filter=%5E(server.state%7Ccluster_manager.cds.update_success)$",
    )
    .await;
    assert_eq!(stats, "cluster_manager.cds.update_success: 0\nserver.state: 2\n");
    assert_eq!(ask(proxy.admin, "GET", "/stats?filter=(").await.0, 400);
    assert!(
        json(proxy.admin, "/stats?format=json").await["stats"]
            .as_array()
            .unwrap()
            .len()
            > 10
    );
}

#[tokio::test]
async fn log_levels_are_changed_by_post() {
    let proxy = proxy().await;
    assert!(ask(proxy.admin, "GET", "/logging").await.1.starts_with("active loggers:\n"));
    let (status, list) = ask(proxy.admin, "POST", "/logging?paths=http:debug,rbac:info").await;
    assert!(
        status == 200 && list.contains("  http: debug\n") && list.contains("  rbac: info\n"),
        "{list}"
    );
    let (_, list) = ask(proxy.admin, "POST", "/logging?level=off").await;
    assert!(list.lines().skip(1).all(|line| line.ends_with(": off")), "{list}");
    for query in ["level=loud", "nobody=info", "paths=http:loud"] {
        assert_eq!(ask(proxy.admin, "POST", &format!("/logging?{query}")).await.0, 400, "{query}");
    }
}

#[tokio::test]
async fn metrics_show_what_happens() {
    let proxy = proxy().await;
    proxy
        .engine
        .proxy
        .live
        .refused
        .fetch_add(3, std::sync::atomic::Ordering::Relaxed);
    let (_, text) = ask(proxy.metrics, "GET", "/stats/prometheus").await;
    for line in [
        "cairn_refused_connects_total 3",
        "cairn_config_version 0",
        "cairn_xds_connected 0",
        "cairn_xds_nacks_total{type=\"lds\"} 0",
        "cairn_unsupported_items{effect=\"refused\"} 0",
        "istio_build{component=\"proxy\",tag=\"1.31.0\"} 1",
        "envoy_server_live 0",
        "envoy_server_state 2",
        "envoy_cluster_manager_active_clusters 0",
        "# TYPE envoy_listener_manager_lds_update_rejected counter",
        "envoy_listener_manager_lds_update_rejected 0",
    ] {
        assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
    }
    assert!(
        text.contains("istio_agent_cert_expiry_seconds{resource_name=\"default\"} "),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_is_asked_for_from_the_pod_only() {
    let proxy = proxy().await;
    // A client from elsewhere: the router is told another address.
    use tower::ServiceExt as _;
    for path in ["/quitquitquit", "/drain"] {
        let elsewhere: SocketAddr = "10.244.0.9:4711".parse().unwrap();
        let mut request = http::Request::post(path).body(axum::body::Body::empty()).unwrap();
        request.extensions_mut().insert(axum::extract::ConnectInfo(elsewhere));
        let Ok(answer) = agent::router(proxy.pages.clone()).oneshot(request).await;
        assert_eq!(answer.status(), 403, "{path}");
    }
    let begun = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = begun.clone();
    let end = tokio::spawn(async move {
        let start = || seen.store(true, std::sync::atomic::Ordering::Relaxed);
        proxy.requests.until_exit(&DrainSettings::default(), start, || false).await;
    });
    assert_eq!(ask(proxy.agent, "POST", "/drain").await, (200, "OK\n".to_owned()));
    assert_eq!(ask(proxy.agent, "POST", "/quitquitquit").await, (200, "OK\n".to_owned()));
    end.await.unwrap();
    assert!(begun.load(std::sync::atomic::Ordering::Relaxed));
}

#[tokio::test]
async fn a_port_in_use_is_told_in_a_sentence() {
    let proxy = proxy().await;
    let error = server::start("readiness (ENVOY_STATUS_PORT)", proxy.ready, agent::ready_router(proxy.pages))
        .await
        .unwrap_err();
    let sentence = error.to_string();
    assert!(
        sentence.starts_with("the port for readiness (ENVOY_STATUS_PORT) cannot be opened at 127.0.0.1:"),
        "{sentence}"
    );
    assert!(
        sentence.ends_with("another proxy runs here; end it, or give this one another port"),
        "{sentence}"
    );
}
