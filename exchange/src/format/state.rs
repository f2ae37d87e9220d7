//! Objects of the filter state: what the view has, else what the record holds under the names that istiod's configuration uses.

use super::{Value, View};
use crate::{Connection, Workload};

pub(crate) fn filter_state<'a>(view: &View<'a>, key: &str, field: Option<&str>, lookup: &str) -> Value<'a> {
    if let Some(text) = view.filter_state.and_then(|state| state(lookup)) {
        return Value::from_text(text);
    }
    let exchange = view.exchange;
    if let Some(text) = exchange.filter_state.get(key).filter(|_| field.is_none()) {
        return Value::text(text);
    }
    let connection: &'a Connection = &exchange.connection;
    match (key, field) {
        ("downstream_peer" | "downstream_peer_obj", Some(field)) => peer_field(connection.source.as_deref(), field),
        ("upstream_peer" | "upstream_peer_obj", Some(field)) => peer_field(
            exchange.upstream.as_ref().and_then(|upstream| upstream.workload.as_deref()),
            field,
        ),
        ("io.istio.peer_principal", None) => Value::optional(connection.peer.as_ref().map(|id| id.as_str())),
        ("io.istio.local_principal", None) => Value::optional(connection.local.as_ref().map(|id| id.as_str())),
        ("io.istio.connect_authority", None) => Value::optional(Some(&connection.authority)),
        ("envoy.filters.listener.original_dst.local_ip", None) => connection.local_address.map_or(Value::Absent, Value::Address),
        _ => Value::Absent,
    }
}

/// Fields of a peer object (contract runtime §7.3).
fn peer_field<'a>(workload: Option<&'a Workload>, field: &str) -> Value<'a> {
    let Some(workload) = workload else {
        return Value::Absent;
    };
    Value::optional(match field {
        "namespace" => Some(&workload.namespace),
        "cluster" => Some(&workload.cluster),
        "service" | "app" => Some(&workload.canonical_name),
        "revision" | "version" => Some(&workload.canonical_revision),
        "workload" => Some(&workload.workload_name),
        "type" => Some(workload.workload_type),
        "name" => Some(&workload.name),
        "identity" => workload.identity.as_ref().map(|id| id.as_str()),
        "region" => Some(&workload.region),
        "availability_zone" => Some(&workload.zone),
        _ => None,
    })
}
