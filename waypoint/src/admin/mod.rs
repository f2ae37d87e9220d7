//! What operators and their tools ask the proxy: readiness, metrics, the configuration, the end.
//!
//! Four small HTTP servers on the control runtime (contract runtime §8.4), outside the data path:
//!
//! * [`envoy`]: administration as Envoy's, for this pod only (15000): `istioctl` and people read it;
//! * `exchanges`: the last exchanges, and why they were decided so;
//! * [`agent`]: health, metrics and drain as pilot-agent's (15020), readiness (15021) and metrics (15090);
//! * [`readiness`]: whether the proxy is ready, and in words why not;
//! * [`metrics`] and [`stats`]: numbers for Prometheus, and Envoy's names for a few of them;
//!
//! The HTTP server with its limits is [`cairn_agent::server`].

pub mod agent;
mod clusters;
pub mod envoy;
mod exchanges;
pub mod metrics;
mod pages;
pub mod readiness;
pub mod stats;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;

pub use cairn_agent::server::{self, BindError};
pub use pages::{About, Pages};
pub use readiness::Readiness;

use crate::{config::Store, engine::Engine};

/// Pages of a proxy whose configuration does not come from istiod: always ready.
pub fn static_pages(engine: &Engine, store: std::sync::Arc<Store>) -> Pages {
    let readiness = Readiness::new(Vec::new);
    readiness.serving();
    Pages::new(engine, store, readiness)
}

/// Serves administration at `address`, on the calling runtime; says where when the port was left to the system.
pub async fn serve(address: SocketAddr, pages: Pages) -> Result<SocketAddr, BindError> {
    server::start("administration", address, envoy::router(pages)).await
}
