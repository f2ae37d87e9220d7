//! Pilot-agent's ports: 15020 for health, metrics and the end; 15021 for readiness alone; 15090 for metrics alone
//! (contract runtime §8.4).

use std::net::SocketAddr;

use axum::{
    Router,
    extract::{ConnectInfo, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use cairn_agent::shutdown::Request;
use cairn_telemetry::prometheus::Format;

use super::Pages;

/// 15020.
pub fn router(pages: Pages) -> Router {
    Router::new()
        .route("/healthz/ready", get(ready))
        .route("/stats/prometheus", get(prometheus))
        .route("/metrics", get(prometheus))
        .route("/quitquitquit", post(quit))
        .route("/drain", post(drain))
        .with_state(pages)
}

/// 15021.
pub fn ready_router(pages: Pages) -> Router {
    Router::new().route("/healthz/ready", get(ready)).with_state(pages)
}

/// 15090.
pub fn metrics_router(pages: Pages) -> Router {
    Router::new().route("/stats/prometheus", get(prometheus)).with_state(pages)
}

async fn ready(State(pages): State<Pages>) -> Response {
    match pages.readiness.check() {
        Ok(()) => StatusCode::OK.into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n").into_response(),
    }
}

/// A scrape, in the format that the scraper prefers.
pub(super) async fn prometheus(State(pages): State<Pages>, headers: HeaderMap) -> Response {
    let format = Format::negotiate(headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()));
    // Rendering takes time in proportion to the series, so not on a thread that others wait for.
    match tokio::task::spawn_blocking(move || pages.registry.render(format)).await {
        Ok(text) => ([(header::CONTENT_TYPE, format.content_type())], text).into_response(),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("metrics could not be rendered: {error}\n"),
        )
            .into_response(),
    }
}

async fn quit(State(pages): State<Pages>, ConnectInfo(client): ConnectInfo<SocketAddr>) -> Response {
    ask(&pages, client, Request::Quit)
}

async fn drain(State(pages): State<Pages>, ConnectInfo(client): ConnectInfo<SocketAddr>) -> Response {
    ask(&pages, client, Request::Drain)
}

/// The end may be asked for from within the pod only.
fn ask(pages: &Pages, client: SocketAddr, request: Request) -> Response {
    if !client.ip().to_canonical().is_loopback() {
        return (StatusCode::FORBIDDEN, "only requests from localhost are allowed\n").into_response();
    }
    super::envoy::request(pages, request)
}
