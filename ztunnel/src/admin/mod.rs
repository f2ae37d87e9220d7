//! What operators and their tools ask: readiness (15021), metrics (15020), administration (15000).

mod dump;

use std::sync::Arc;

use axum::{
    Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use cairn_agent::shutdown::{Control, Request};
use cairn_telemetry::{Registry, prometheus::Format};
use serde::Deserialize;

use crate::{logging, node::Node, readiness::Readiness};

/// Everything that pages show or change.
#[derive(Clone)]
pub struct Pages {
    /// The proxy.
    pub node: Arc<Node>,
    /// Numbers.
    pub registry: Registry,
    /// Whether it is ready.
    pub readiness: Readiness,
    /// What is logged.
    pub logging: logging::Handle,
    /// Ends it.
    pub control: Control,
}

/// `/logging?level=…`
#[derive(Debug, Deserialize)]
struct Level {
    level: Option<String>,
    #[serde(default)]
    reset: Option<String>,
}

/// Administration.
pub fn router(pages: Pages) -> Router {
    Router::new()
        .route("/config_dump", get(config_dump))
        .route("/logging", get(show_logging).post(change_logging))
        .route("/quitquitquit", post(quit))
        .route("/", get(index))
        .with_state(pages)
}

/// Metrics.
pub fn metrics_router(pages: Pages) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/stats/prometheus", get(metrics))
        .with_state(pages)
}

/// Readiness.
pub fn ready_router(pages: Pages) -> Router {
    Router::new().route("/healthz/ready", get(ready)).with_state(pages)
}

async fn index() -> &'static str {
    "/config_dump: what the proxy knows\n/logging: what is logged; POST ?level=info,cairn_ztunnel=debug changes it\n/quitquitquit: POST ends the process\n"
}

async fn config_dump(State(pages): State<Pages>) -> Response {
    // It may be large: not on a thread that others need.
    let made = tokio::task::spawn_blocking(move || dump::of(&pages.node).to_string()).await;
    match made {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn show_logging(State(pages): State<Pages>) -> String {
    format!("current log level is {}\n", pages.logging.current())
}

async fn change_logging(State(pages): State<Pages>, Query(asked): Query<Level>) -> Response {
    if asked.reset.is_some() {
        pages.logging.reset();
    }
    if let Some(level) = asked.level
        && let Err(error) = pages.logging.change(&level)
    {
        return (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response();
    }
    show_logging(State(pages)).await.into_response()
}

async fn quit(State(pages): State<Pages>) -> &'static str {
    pages.control.send(Request::Quit);
    "shutdown now\n"
}

async fn metrics(State(pages): State<Pages>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let format = Format::negotiate(accept);
    ([(header::CONTENT_TYPE, format.content_type())], pages.registry.render(format)).into_response()
}

async fn ready(State(pages): State<Pages>) -> Response {
    let waiting = pages.readiness.waiting();
    if waiting.is_empty() {
        return "ready\n".into_response();
    }
    (
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("not ready, pending: {}\n", waiting.join("; ")),
    )
        .into_response()
}
