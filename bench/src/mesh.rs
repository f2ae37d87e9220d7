//! The mesh that every proxy is given: what istiod sends a waypoint of one HTTP
//! service and one TCP port, as an Envoy `config_dump`.
//!
//! It is two captures of a real istiod laid together (`captures/`): the HTTP
//! chain of one, one TCP chain of the other, both without any traffic policy. Only the endpoints'
//! addresses are changed, to loopback ones where the rig's destination listens.
//! Access logs are off, as in the captures. With a policy, the HTTP chain also
//! has one ALLOW rule (principal, method and path) as istiod writes it.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::certs::CLIENT;

const HTTP_CAPTURE: &str = include_str!("../captures/http.json");
const TCP_CAPTURE: &str = include_str!("../captures/tcp.json");

/// The authority of the HTTP service: its virtual address and port.
pub(crate) const HTTP_AUTHORITY: &str = "10.96.1.10:80";
/// The authority of the TCP port.
pub(crate) const TCP_AUTHORITY: &str = "10.96.1.31:5432";
const TCP_ADDRESS: &str = "10.96.1.31";
const TCP_PORT: u16 = 5432;
const TCP_CHAIN: &str = "inbound-vip|5432|tcp|db-blue.app.svc.cluster.local";
const HTTP_CHAIN: &str = "inbound-vip|80|http|web.app.svc.cluster.local";

/// The port of every tunnel, which the captured cluster puts in the place of the endpoint's.
const TUNNEL_PORT: u16 = 15008;
/// Captured endpoints and the loopback addresses that stand for them.
const ENDPOINTS: [(&str, &str); 3] = [
    ("10.244.0.10:8080", "127.0.1.1:8080"),
    ("10.244.0.11:8080", "127.0.1.2:8080"),
    ("10.244.0.40:5432", "127.0.1.3:5432"),
];

/// Where the destination must accept tunnels.
pub(crate) fn tunnel_addresses() -> Vec<SocketAddr> {
    (1..=3)
        .map(|host| SocketAddr::from((Ipv4Addr::new(127, 0, 1, host), TUNNEL_PORT)))
        .collect()
}

/// The `config_dump` of the rig's mesh.
pub(crate) fn config_dump(policy: bool) -> Result<Value> {
    let mut dump: Value = serde_json::from_str(HTTP_CAPTURE).context("captures/http.json")?;
    let tcp: Value = serde_json::from_str(TCP_CAPTURE).context("captures/tcp.json")?;
    for (kind, list, name) in [
        ("ClustersConfigDump", "dynamic_active_clusters", "/cluster/name"),
        (
            "EndpointsConfigDump",
            "dynamic_endpoint_configs",
            "/endpoint_config/cluster_name",
        ),
    ] {
        let taken = items(&tcp, kind, list)?
            .iter()
            .find(|item| item.pointer(name).and_then(Value::as_str) == Some(TCP_CHAIN))
            .with_context(|| format!("captures/tcp.json has no {TCP_CHAIN} in {list}"))?
            .clone();
        items_mut(&mut dump, kind, list)?.push(taken);
    }
    add_tcp_chain(listener_mut(&mut dump, "main_internal")?, &tcp)?;
    if policy {
        add_policy(listener_mut(&mut dump, "main_internal")?)?;
    }
    rename(&mut dump);
    Ok(dump)
}

/// The entries of one list of a `config_dump`.
pub(crate) fn items<'dump>(dump: &'dump Value, kind: &str, list: &str) -> Result<&'dump [Value]> {
    dump.pointer("/configs")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .find(|section| is_kind(section, kind))
        .and_then(|section| section.get(list))
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .with_context(|| format!("the configuration dump has no {kind}.{list}"))
}

fn items_mut<'dump>(dump: &'dump mut Value, kind: &str, list: &str) -> Result<&'dump mut Vec<Value>> {
    dump.pointer_mut("/configs")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
        .find(|section| is_kind(section, kind))
        .and_then(|section| section.get_mut(list))
        .and_then(Value::as_array_mut)
        .with_context(|| format!("the configuration dump has no {kind}.{list}"))
}

fn is_kind(section: &Value, kind: &str) -> bool {
    section
        .get("@type")
        .and_then(Value::as_str)
        .is_some_and(|url| url.ends_with(kind))
}

fn listener_mut<'dump>(dump: &'dump mut Value, name: &str) -> Result<&'dump mut Value> {
    items_mut(dump, "ListenersConfigDump", "dynamic_listeners")?
        .iter_mut()
        .find(|listener| listener.get("name").and_then(Value::as_str) == Some(name))
        .and_then(|listener| listener.pointer_mut("/active_state/listener"))
        .with_context(|| format!("the configuration dump has no listener {name}"))
}

/// Puts the TCP service's chain, its place in the matcher and its exemption
/// from inspection into `main_internal`.
fn add_tcp_chain(listener: &mut Value, tcp: &Value) -> Result<()> {
    let mut tcp = tcp.clone();
    let other = listener_mut(&mut tcp, "main_internal")?;
    let chain = array(other, "/filter_chains")?
        .iter()
        .find(|chain| chain.get("name").and_then(Value::as_str) == Some(TCP_CHAIN))
        .with_context(|| format!("captures/tcp.json has no chain {TCP_CHAIN}"))?
        .clone();
    array(listener, "/filter_chains")?.insert(0, chain);

    const RANGES: &str = "/filter_chain_matcher/matcher_tree/custom_match/typed_config/range_matchers";
    let mut range = array(other, RANGES)?
        .iter()
        .find(|range| range.pointer("/ranges/0/address_prefix").and_then(Value::as_str) == Some(TCP_ADDRESS))
        .with_context(|| format!("captures/tcp.json does not match {TCP_ADDRESS}"))?
        .clone();
    range
        .pointer_mut("/on_match/matcher/matcher_tree/exact_match_map/map")
        .and_then(Value::as_object_mut)
        .context("captures/tcp.json has no ports in its matcher")?
        .retain(|port, _| *port == TCP_PORT.to_string());
    array(listener, RANGES)?.push(range);

    for filter in array(listener, "/listener_filters")? {
        if let Some(disabled) = filter.get_mut("filter_disabled") {
            *disabled = json!({"or_match": {"rules": [
                disabled.take(),
                {"destination_port_range": {"start": TCP_PORT, "end": TCP_PORT + 1}},
            ]}});
        }
    }
    Ok(())
}

/// Puts one ALLOW rule in front of the HTTP chain's filters.
fn add_policy(listener: &mut Value) -> Result<()> {
    let chain = array(listener, "/filter_chains")?
        .iter_mut()
        .find(|chain| chain.get("name").and_then(Value::as_str) == Some(HTTP_CHAIN))
        .with_context(|| format!("captures/http.json has no chain {HTTP_CHAIN}"))?;
    array(chain, "/filters/0/typed_config/http_filters")?.insert(
        0,
        json!({
            "name": "envoy.filters.http.rbac",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC",
                "rules": {"policies": {"ns[app]-policy[web-allow]-rule[0]": {
                    "permissions": [{"and_rules": {"rules": [
                        {"or_rules": {"rules": [{"header": {"name": ":method", "string_match": {"exact": "GET"}}}]}},
                        {"or_rules": {"rules": [{"url_path": {"path": {"prefix": "/bench/"}}}]}},
                    ]}}],
                    "principals": [{"and_ids": {"ids": [{"or_ids": {"ids": [
                        {"filter_state": {"key": "io.istio.peer_principal", "string_match": {"exact": CLIENT}}},
                    ]}}]}}],
                }}},
                "shadow_rules_stat_prefix": "istio_dry_run_allow_",
            },
        }),
    );
    Ok(())
}

fn array<'value>(value: &'value mut Value, pointer: &str) -> Result<&'value mut Vec<Value>> {
    value
        .pointer_mut(pointer)
        .and_then(Value::as_array_mut)
        .with_context(|| format!("the captured listener has no {pointer}"))
}

/// Gives every endpoint its loopback address.
fn rename(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Some((_, ours)) = ENDPOINTS.iter().find(|(theirs, _)| theirs == text) {
                *text = (*ours).to_owned();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(rename),
        Value::Object(fields) => fields.values_mut().for_each(rename),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Fails when a captured address is left that no destination listens on.
pub(crate) fn check_addresses(dump: &Value) -> Result<()> {
    let text = items(dump, "EndpointsConfigDump", "dynamic_endpoint_configs")?
        .iter()
        .map(Value::to_string)
        .collect::<String>();
    ensure!(
        !text.contains("10.244."),
        "an endpoint of the captures has no loopback address in bench/src/mesh.rs"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dump: &Value, kind: &str, list: &str, pointer: &str) -> Vec<String> {
        items(dump, kind, list)
            .unwrap()
            .iter()
            .map(|item| item.pointer(pointer).unwrap().as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn the_mesh_has_the_five_listeners_of_a_waypoint() {
        let dump = config_dump(false).unwrap();
        let mut listeners = names(&dump, "ListenersConfigDump", "dynamic_listeners", "/name");
        listeners.sort();
        assert_eq!(
            listeners,
            [
                "connect_originate",
                "connect_terminate",
                "inner_connect_originate",
                "main_internal",
                "outer_connect_originate"
            ]
        );
    }

    #[test]
    fn each_authority_leads_to_a_chain_with_a_cluster_and_endpoints() {
        let mut dump = config_dump(false).unwrap();
        for chain in [HTTP_CHAIN, TCP_CHAIN] {
            let clusters = names(&dump, "ClustersConfigDump", "dynamic_active_clusters", "/cluster/name");
            let endpoints = names(
                &dump,
                "EndpointsConfigDump",
                "dynamic_endpoint_configs",
                "/endpoint_config/cluster_name",
            );
            assert!(clusters.iter().any(|name| name == chain), "{clusters:?}");
            assert!(endpoints.iter().any(|name| name == chain), "{endpoints:?}");
        }
        let listener = listener_mut(&mut dump, "main_internal").unwrap();
        let matcher = listener["filter_chain_matcher"].to_string();
        for (authority, chain) in [(HTTP_AUTHORITY, HTTP_CHAIN), (TCP_AUTHORITY, TCP_CHAIN)] {
            let (address, _) = authority.split_once(':').unwrap();
            assert!(matcher.contains(address) && matcher.contains(chain));
        }
        assert!(!matcher.contains("6432"), "other ports of the capture stay");
    }

    #[test]
    fn every_endpoint_is_on_an_address_where_the_destination_listens() {
        let dump = config_dump(false).unwrap();
        check_addresses(&dump).unwrap();
        let text = dump.to_string();
        for address in tunnel_addresses() {
            assert!(text.contains(&format!("{}:", address.ip())), "{address}");
        }
    }

    #[test]
    fn an_endpoint_that_was_left_is_named() {
        let captured: Value = serde_json::from_str(HTTP_CAPTURE).unwrap();
        assert!(check_addresses(&captured).is_err());
    }

    #[test]
    fn no_inspection_on_declared_ports() {
        let mut dump = config_dump(false).unwrap();
        let listener = listener_mut(&mut dump, "main_internal").unwrap();
        let filters = array(listener, "/listener_filters").unwrap();
        let inspector = filters
            .iter()
            .find(|filter| filter["name"] == "envoy.filters.listener.http_inspector")
            .unwrap();
        let rules = inspector["filter_disabled"]["or_match"]["rules"].as_array().unwrap();
        let starts: Vec<_> = rules
            .iter()
            .map(|rule| rule["destination_port_range"]["start"].as_u64().unwrap())
            .collect();
        assert_eq!(starts, [80, 5432]);
    }

    #[test]
    fn a_policy_stands_first_in_the_http_chain_and_only_when_asked_for() {
        for (policy, first) in [(false, "envoy.filters.http.grpc_stats"), (true, "envoy.filters.http.rbac")] {
            let mut dump = config_dump(policy).unwrap();
            let listener = listener_mut(&mut dump, "main_internal").unwrap();
            let chains = array(listener, "/filter_chains").unwrap();
            let chain = chains.iter_mut().find(|chain| chain["name"] == HTTP_CHAIN).unwrap();
            let filters = array(chain, "/filters/0/typed_config/http_filters").unwrap();
            assert_eq!(filters[0]["name"], first);
        }
    }
}
