//! Envoy's administrative pages, as far as `istioctl`, bug reports and people read them (contract runtime §8.6).
//!
//! `/unsupported` and `/services` are ours. Pages that change something want POST, as Envoy's.

use std::{collections::BTreeMap, fs};

use axum::{
    Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use cairn_agent::shutdown::Request;
use cairn_exchange::clock;
use serde_json::json;

use super::{Pages, agent::prometheus, clusters, exchanges, stats};
use crate::config::{dump, show};

type Parameters = Query<BTreeMap<String, String>>;

/// Every page, and what it is for.
const HELP: [(&str, &str); 21] = [
    ("/certs", "the workload certificate in use"),
    ("/clusters", "clusters and endpoints (?format=json)"),
    ("/config_dump", "what istiod sent, as it sent it (?include_eds)"),
    ("/drain_listeners", "POST: begin to drain"),
    (
        "/exchanges",
        "the last requests and connections (?service=&code=&principal=&id=&limit=)",
    ),
    (
        "/exchanges/ID/story",
        "why that one was decided so; ID is its x-request-id (?format=text)",
    ),
    (
        "/explain",
        "why a request would be decided so (?from=&to=&method=&path=&header=&source_ip=&jwt=&format=text)",
    ),
    ("/healthcheck/fail", "POST: be not ready"),
    ("/healthcheck/ok", "POST: end that"),
    ("/help", "this page"),
    ("/listeners", "addresses that are listened on"),
    (
        "/logging",
        "log levels; POST ?level=debug, ?http=debug or ?paths=http:debug,rbac:info changes them",
    ),
    ("/memory", "memory of the process"),
    ("/quitquitquit", "POST: exit at once"),
    ("/ready", "whether the proxy is ready, and why not"),
    ("/runtime", "Envoy's runtime values: none"),
    ("/server_info", "version, state, node, options"),
    ("/services", "the compiled configuration, for people"),
    (
        "/stats",
        "Envoy's names for a few numbers (?filter=REGEX, ?format=json or prometheus)",
    ),
    ("/stats/prometheus", "metrics"),
    (
        "/unsupported",
        "what istiod asked for and is not done, and what waits for something that istiod has not sent",
    ),
];

/// 15000.
pub fn router(pages: Pages) -> Router {
    Router::new()
        .route("/", get(help))
        .route("/help", get(help))
        .route("/certs", get(certificates))
        .route("/clusters", get(clusters::page))
        .route("/config_dump", get(config_dump))
        .route("/drain_listeners", post(drain_listeners))
        .route("/exchanges", get(exchanges::page))
        .route("/exchanges/{id}/story", get(exchanges::story))
        .route("/explain", get(exchanges::ask))
        .route(
            "/healthcheck/fail",
            post(|State(pages): State<Pages>| async move { health(&pages, true) }),
        )
        .route(
            "/healthcheck/ok",
            post(|State(pages): State<Pages>| async move { health(&pages, false) }),
        )
        .route("/listeners", get(clusters::listeners))
        .route("/logging", get(levels).post(set_levels))
        .route("/memory", get(memory))
        .route(
            "/quitquitquit",
            post(|State(pages): State<Pages>| async move { request(&pages, Request::Quit) }),
        )
        .route("/ready", get(ready))
        .route(
            "/runtime",
            get(|| async { json_answer(&json!({ "layers": [], "entries": {} })) }),
        )
        .route("/server_info", get(server_info))
        .route("/services", get(services))
        .route("/stats", get(stats_page))
        .route("/stats/prometheus", get(prometheus))
        .route("/unsupported", get(unsupported))
        .with_state(pages)
}

async fn help() -> String {
    let lines = HELP.iter().map(|(path, what)| format!("  {path}: {what}\n"));
    format!("admin commands are:\n{}", lines.collect::<String>())
}

async fn ready(State(pages): State<Pages>) -> Response {
    // Envoy prints the state; what is missing stands behind it.
    let state = pages.readiness.state();
    match pages.readiness.check() {
        Ok(()) => format!("{state}\n").into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{state}\n{why}\n")).into_response(),
    }
}

/// JSON as Envoy prints it, over several lines.
pub(super) fn json_answer(value: &serde_json::Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], format!("{value:#}\n")).into_response()
}

/// Work in proportion to the mesh, away from the threads that others wait for.
pub(super) async fn heavy<R: IntoResponse + Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.into_response(),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the page could not be made: {error}\n"),
        )
            .into_response(),
    }
}

async fn config_dump(State(pages): State<Pages>, Query(parameters): Parameters) -> Response {
    let endpoints = parameters
        .get("include_eds")
        .is_some_and(|value| value != "false" && value != "off");
    heavy(move || json_answer(&dump::config_dump(&pages.store, pages.about.node.clone(), endpoints))).await
}

async fn services(State(pages): State<Pages>) -> Response {
    heavy(move || show::show(&pages.proxy.snapshot.load_full(), &pages.store.unsupported())).await
}

async fn unsupported(State(pages): State<Pages>) -> Response {
    json_answer(&json!({ "unsupported": *pages.store.unsupported(), "waiting": *pages.store.pending() }))
}

async fn server_info(State(pages): State<Pages>) -> Response {
    let uptime = format!("{}s", clock::now().duration_since(pages.begin).as_secs());
    json_answer(&json!({
        // Envoy's five parts: revision, version, whether it was changed, kind of build, TLS library.
        "version": concat!("0000000000000000000000000000000000000000/cairn-", env!("CARGO_PKG_VERSION"), "/Clean/RELEASE/rustls"),
        "state": pages.readiness.state().to_string(),
        "hot_restart_version": "disabled",
        "command_line_options": pages.about.options,
        "node": pages.about.node,
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
    }))
}

async fn stats_page(state: State<Pages>, Query(parameters): Parameters, headers: HeaderMap) -> Response {
    match parameters.get("format").map(String::as_str) {
        Some("prometheus") => prometheus(state, headers).await,
        format => stats::page(&state.0, parameters.get("filter").map(String::as_str), format == Some("json")),
    }
}

async fn certificates(State(pages): State<Pages>) -> Response {
    let status = pages.proxy.identity.status();
    let time = |at: Option<std::time::SystemTime>| at.map(|at| humantime::format_rfc3339_seconds(at).to_string());
    let days = |at: std::time::SystemTime| at.duration_since(clock::wall()).map_or(0, |left| left.as_secs() / 86_400);
    let Some(id) = &status.id else {
        return json_answer(&json!({ "certificates": [] }));
    };
    json_answer(&json!({ "certificates": [{
        "cert_chain": [{
            "serial_number": status.serial,
            "subject_alt_names": [{ "uri": id.as_str() }],
            "days_until_expiration": status.expiry.map(days).unwrap_or(0).to_string(),
            "valid_from": time(status.not_before),
            "expiration_time": time(status.expiry),
        }],
    }] }))
}

async fn levels(State(pages): State<Pages>) -> Response {
    match &pages.logging {
        Some(handle) => handle.list().into_response(),
        None => (StatusCode::NOT_FOUND, "log levels cannot be changed here\n").into_response(),
    }
}

/// `level=debug`, `NAME=debug`, `paths=NAME:debug,NAME:info`.
async fn set_levels(State(pages): State<Pages>, Query(parameters): Parameters) -> Response {
    let Some(handle) = &pages.logging else {
        return (StatusCode::NOT_FOUND, "log levels cannot be changed here\n").into_response();
    };
    let mut changes = Vec::new();
    for (name, value) in &parameters {
        match name.as_str() {
            "level" => changes.push(("all", value.as_str())),
            "paths" => changes.extend(value.split(',').filter_map(|item| item.split_once(':'))),
            name => changes.push((name, value.as_str())),
        }
    }
    match handle.change(changes) {
        Ok(()) => handle.list().into_response(),
        Err(words) => (StatusCode::BAD_REQUEST, words + "\n").into_response(),
    }
}

/// Envoy's fields; what the allocator knows, as the kernel sees it.
async fn memory() -> Response {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line
            .and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok())
            .unwrap_or(0);
        (kib * 1024).to_string()
    };
    json_answer(&json!({
        "allocated": bytes("RssAnon:"),
        "heap_size": bytes("VmData:"),
        "pageheap_unmapped": "0",
        "pageheap_free": "0",
        "total_thread_cache": "0",
        "total_physical_bytes": bytes("VmRSS:"),
    }))
}

async fn drain_listeners(State(pages): State<Pages>) -> Response {
    request(&pages, Request::Drain)
}

fn health(pages: &Pages, fail: bool) -> Response {
    pages.readiness.fail(fail);
    "OK\n".into_response()
}

/// Passes a request to end on.
pub(super) fn request(pages: &Pages, request: Request) -> Response {
    match &pages.shutdown {
        Some(control) => {
            control.send(request);
            "OK\n".into_response()
        }
        None => (StatusCode::NOT_FOUND, "this proxy ends by a signal only\n").into_response(),
    }
}
