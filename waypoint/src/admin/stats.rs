//! Envoy's names for the few numbers that scripts, `istioctl` and dashboards ask for: all of them in `/stats`, and those that Istio's
//! inclusion list shows (contract runtime §7.7) in `/stats/prometheus`, beside everything else.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use cairn_exchange::clock::{self, Instant};
use cairn_telemetry::prometheus::{Kind, Writer};
use cairn_xds::TypeUrl;
use serde_json::json;

use super::{Pages, Readiness, envoy::json_answer, readiness::State};
use crate::{
    config::compiler::{CLUSTERS, LISTENERS},
    proxy::Proxy,
};

/// A larger expression than this is refused.
const FILTER_LIMIT: usize = 64 * 1024;

/// Those whose name `filter` finds.
pub(super) fn page(pages: &Pages, filter: Option<&str>, as_json: bool) -> Response {
    let filter = match filter
        .map(|filter| regex::RegexBuilder::new(filter).size_limit(FILTER_LIMIT).build())
        .transpose()
    {
        Ok(filter) => filter,
        Err(error) => {
            let words = error.to_string();
            let line = words.lines().last().unwrap_or_default().trim().to_owned();
            return (
                StatusCode::BAD_REQUEST,
                format!("the filter is no regular expression: {line}\n"),
            )
                .into_response();
        }
    };
    let wanted = |name: &str| filter.as_ref().is_none_or(|filter| filter.is_match(name));
    let mut stats = Numbers::of(pages).all();
    stats.retain(|(name, _)| wanted(name));
    stats.sort();
    if as_json {
        let stats: Vec<_> = stats
            .iter()
            .map(|(name, value)| json!({ "name": name, "value": value }))
            .collect();
        json_answer(&json!({ "stats": stats }))
    } else {
        stats
            .iter()
            .map(|(name, value)| format!("{name}: {value}\n"))
            .collect::<String>()
            .into_response()
    }
}

/// What the numbers are read from.
struct Numbers {
    proxy: Arc<Proxy>,
    readiness: Readiness,
    begin: Instant,
    istiod: Option<cairn_xds::Status>,
}

/// What the names of those begin with that Prometheus is shown.
const SHOWN: [&str; 3] = ["server.", "cluster_manager.", "listener_manager."];

/// Shows some of them to Prometheus.
pub fn register(pages: &Pages) {
    let numbers = Numbers::of(pages);
    pages.registry.source(move |writer| numbers.write(writer));
}

// === impl Numbers ===

impl Numbers {
    fn of(pages: &Pages) -> Self {
        Self {
            proxy: pages.proxy.clone(),
            readiness: pages.readiness.clone(),
            begin: pages.begin,
            istiod: pages.istiod.clone(),
        }
    }

    fn write(&self, writer: &mut Writer) {
        let mut all = self.all();
        all.retain(|(name, _)| SHOWN.iter().any(|prefix| name.starts_with(prefix)));
        all.sort();
        for (name, value) in all {
            let kind = if name.contains(".update_") {
                Kind::Counter
            } else {
                Kind::Gauge
            };
            let shown = format!("envoy_{}", name.replace('.', "_"));
            writer.family(&shown, kind, &format!("Envoy's {name}."));
            writer.count("", value);
        }
    }

    fn all(&self) -> Vec<(String, u64)> {
        let live = &self.proxy.live;
        let state = self.readiness.state();
        let mut stats: Vec<(String, u64)> = Vec::new();
        let mut put = |name: &str, value: u64| stats.push((name.to_owned(), value));
        put("server.live", u64::from(state == State::Live));
        // 0 is LIVE, 1 DRAINING, 2 PRE_INITIALIZING.
        put(
            "server.state",
            match state {
                State::Live => 0,
                State::Draining => 1,
                State::PreInitializing => 2,
            },
        );
        put("server.uptime", clock::now().duration_since(self.begin).as_secs());
        put("listener_manager.workers_started", u64::from(state != State::PreInitializing));
        put(
            "cluster_manager.active_clusters",
            self.proxy.snapshot.load().clusters.len() as u64,
        );
        if let Some(status) = self.istiod.as_ref().map(cairn_xds::Status::snapshot) {
            put("control_plane.connected_state", u64::from(status.connected_since.is_some()));
            for (name, url) in [("cluster_manager.cds", CLUSTERS), ("listener_manager.lds", LISTENERS)] {
                let kind = status.types.get(&TypeUrl::from(url)).cloned().unwrap_or_default();
                put(&format!("{name}.update_success"), kind.acked);
                put(&format!("{name}.update_rejected"), kind.nacked);
                put(&format!("{name}.update_attempt"), kind.responses);
            }
        }
        for address in self
            .proxy
            .snapshot
            .load()
            .terminate
            .iter()
            .flat_map(|terminate| &terminate.addresses)
        {
            let at = address.to_string().replace(':', "_");
            put(&format!("listener.{at}.downstream_cx_active"), live.tunnels.load(Relaxed));
            put(
                &format!("listener.{at}.ssl.connection_error"),
                live.handshakes_failed.load(Relaxed),
            );
        }
        put("http.connect_terminate.downstream_cx_active", live.tunnels.load(Relaxed));
        put("http.connect_terminate.downstream_rq_active", live.streams.load(Relaxed));
        stats
    }
}
