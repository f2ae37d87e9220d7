//! Clusters, endpoints and listeners as they are now, in Envoy's forms.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr};

use axum::{
    extract::{Query, State},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{Pages, envoy::json_answer};
use crate::{
    snapshot::Snapshot,
    upstream::{Endpoint, Health, Level, Resource, Target},
};

/// `/clusters`, `/clusters?format=json`.
pub(super) async fn page(State(pages): State<Pages>, Query(parameters): Query<BTreeMap<String, String>>) -> Response {
    let snapshot = pages.proxy.snapshot.load_full();
    if parameters.get("format").is_some_and(|format| format == "json") {
        json_answer(&as_json(&snapshot))
    } else {
        as_text(&snapshot).into_response()
    }
}

/// `/listeners`.
pub(super) async fn listeners(State(pages): State<Pages>) -> String {
    let snapshot = pages.proxy.snapshot.load_full();
    let addresses = snapshot.terminate.iter().flat_map(|terminate| &terminate.addresses);
    addresses.map(|address| format!("connect_terminate::{address}\n")).collect()
}

fn as_text(snapshot: &Snapshot) -> String {
    use std::sync::atomic::Ordering::Relaxed;
    let mut out = String::new();
    for (name, cluster) in snapshot.clusters.sorted() {
        let breakers = &cluster.settings.breakers;
        for (level, priority) in [(Level::Default, "default_priority"), (Level::High, "high_priority")] {
            let limits = breakers.of(level);
            for (limit, value) in [
                ("max_connections", limits.max_connections),
                ("max_pending_requests", limits.max_pending_requests),
                ("max_requests", limits.max_requests),
                ("max_retries", limits.max_retries),
            ] {
                let _ = writeln!(out, "{name}::{priority}::{limit}::{value}");
            }
        }
        // Beyond what Envoy tells here: its `circuit_breakers.*.remaining_*` gauges.
        for (what, resource) in [
            ("remaining_cx", Resource::Connection),
            ("remaining_pending", Resource::Pending),
            ("remaining_rq", Resource::Request),
            ("remaining_retries", Resource::Retry),
        ] {
            let left = breakers.remaining(&cluster.state.usage, Level::Default, resource);
            let _ = writeln!(out, "{name}::default_priority::{what}::{left}");
        }
        let _ = writeln!(out, "{name}::added_via_api::true");
        for endpoint in cluster.state.endpoints.load().iter() {
            let at = &endpoint.display;
            let _ = writeln!(out, "{name}::{at}::rq_active::{}", endpoint.state.active.load(Relaxed));
            let _ = writeln!(out, "{name}::{at}::rq_total::{}", endpoint.state.total.load(Relaxed));
            let flags = match (endpoint.state.monitor.is_ejected(), endpoint.health) {
                (true, _) => "/failed_outlier_check",
                (false, Health::Healthy) => "healthy",
                (false, other) => health(other),
            };
            let _ = writeln!(out, "{name}::{at}::health_flags::{flags}");
            let _ = writeln!(out, "{name}::{at}::weight::{}", endpoint.weight);
        }
    }
    out
}

fn as_json(snapshot: &Snapshot) -> Value {
    let statuses = snapshot.clusters.sorted().into_iter().map(|(name, cluster)| {
        let hosts: Vec<Value> = cluster.state.endpoints.load().iter().map(|endpoint| host(endpoint)).collect();
        json!({ "name": **name, "added_via_api": true, "host_statuses": hosts, "observability_name": **name })
    });
    json!({ "cluster_statuses": statuses.collect::<Vec<_>>() })
}

fn host(endpoint: &Endpoint) -> Value {
    use std::sync::atomic::Ordering::Relaxed;
    json!({
        "address": address(&endpoint.target),
        "stats": [
            { "name": "rq_total", "value": endpoint.state.total.load(Relaxed).to_string() },
            { "type": "GAUGE", "name": "rq_active", "value": endpoint.state.active.load(Relaxed).to_string() },
        ],
        "health_status": {
            "eds_health_status": health(endpoint.health),
            "failed_outlier_check": endpoint.state.monitor.is_ejected(),
        },
        "weight": endpoint.weight,
        "locality": {
            "region": *endpoint.locality.region, "zone": *endpoint.locality.zone, "sub_zone": *endpoint.locality.sub_zone,
        },
    })
}

/// Endpoints behind tunnels are internal addresses with Istio, as `connect_originate`.
fn address(target: &Target) -> Value {
    let socket =
        |address: &SocketAddr| json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } });
    let internal = |listener: &str, endpoint: &str| json!({ "envoy_internal_address": { "server_listener_name": listener, "endpoint_id": endpoint } });
    match target {
        Target::Plain(address) => socket(address),
        Target::Tunnel { address, .. } => internal("connect_originate", &address.to_string()),
        Target::Double { gateway, .. } => internal("inner_connect_originate", &gateway.to_string()),
        Target::Original { .. } => json!({}),
    }
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Healthy => "HEALTHY",
        Health::Degraded => "DEGRADED",
        Health::Unhealthy => "UNHEALTHY",
        Health::Draining => "DRAINING",
    }
}
