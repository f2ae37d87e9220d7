//! The same mesh for a stock Envoy: a static bootstrap made from a `config_dump`.
//!
//! Istio's proxy is an Envoy with extensions of its own. A stock one lacks them,
//! so they are taken out (peer metadata, the telemetry filter, metadata exchange)
//! and one factory is called by its upstream name; what is unknown stops the
//! rig, so that a new capture cannot slip past unnoticed. Stock Envoy therefore
//! does *less* than Istio's, which makes the comparison harder for us, not easier.
//! Certificates come from files in the place of SDS, endpoints stand in their
//! clusters in the place of EDS.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use crate::mesh::items;

const PREFIX: &str = "type.googleapis.com/";
/// Extensions that only Istio's build has.
const ABSENT: [&str; 6] = [
    "io.istio.http.peer_metadata.Config",
    "stats.PluginConfig",
    "envoy.tcp.metadataexchange.config.MetadataExchange",
    "envoy.extensions.network_filters.peer_metadata.Config",
    "envoy.extensions.network_filters.peer_metadata.UpstreamConfig",
    "istio.envoy.config.filter.http.istio_authn.v2alpha1.FilterConfig",
];
const ISTIO_HASHABLE: &str = "istio.hashable_string";
const ENVOY_HASHABLE: &str = "envoy.hashable_string";

/// Where this Envoy listens and finds its certificates.
pub(crate) struct Place<'path> {
    pub(crate) listen: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) certificates: &'path Path,
}

/// The bootstrap that serves what `dump` holds.
pub(crate) fn bootstrap(dump: &Value, place: &Place<'_>) -> Result<Value> {
    let endpoints = assignments(dump)?;
    let mut clusters = Vec::new();
    for entry in items(dump, "ClustersConfigDump", "dynamic_active_clusters")? {
        let mut cluster = resource(entry, "/cluster")?;
        inline_endpoints(&mut cluster, &endpoints)?;
        clusters.push(cluster);
    }
    let mut listeners = Vec::new();
    for entry in items(dump, "ListenersConfigDump", "dynamic_listeners")? {
        let mut listener = resource(entry, "/active_state/listener")?;
        if listener.get("name").and_then(Value::as_str) == Some("connect_terminate")
            && let Some(address) = listener.get_mut("address")
        {
            *address = socket(place.listen);
        }
        listeners.push(listener);
    }
    let mut resources = json!({"clusters": clusters, "listeners": listeners});
    strip(&mut resources)?;
    inline_secrets(&mut resources, place.certificates);
    Ok(json!({
        "node": {"id": "waypoint~127.0.0.1~waypoint.app~app.svc.cluster.local", "cluster": "waypoint.app"},
        "admin": {"address": socket(place.admin)},
        "bootstrap_extensions": [{
            "name": "envoy.bootstrap.internal_listener",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
                "buffer_size_kb": 64,
            },
        }],
        "layered_runtime": {"layers": [{"name": "global config", "static_layer": {
            "re2.max_program_size.error_level": 32768,
            "envoy.reloadable_features.http_reject_path_with_fragment": false,
        }}]},
        "static_resources": resources,
    }))
}

fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// The resource of a dump's entry, without the type that a static one does not repeat.
fn resource(entry: &Value, pointer: &str) -> Result<Value> {
    let mut resource = entry
        .pointer(pointer)
        .with_context(|| format!("an entry of the configuration dump has no {pointer}"))?
        .clone();
    if let Some(fields) = resource.as_object_mut() {
        fields.remove("@type");
    }
    Ok(resource)
}

fn assignments(dump: &Value) -> Result<Map<String, Value>> {
    let mut by_cluster = Map::new();
    for entry in items(dump, "EndpointsConfigDump", "dynamic_endpoint_configs")? {
        let assignment = resource(entry, "/endpoint_config")?;
        let name = assignment
            .get("cluster_name")
            .and_then(Value::as_str)
            .context("endpoints without a cluster name")?
            .to_owned();
        by_cluster.insert(name, assignment);
    }
    Ok(by_cluster)
}

/// A cluster that waits for EDS becomes one that has its endpoints.
fn inline_endpoints(cluster: &mut Value, endpoints: &Map<String, Value>) -> Result<()> {
    let Some(fields) = cluster.as_object_mut() else {
        bail!("a cluster of the configuration dump is no object");
    };
    let Some(eds) = fields.remove("eds_cluster_config") else {
        return Ok(());
    };
    let name = eds
        .get("service_name")
        .and_then(Value::as_str)
        .context("an EDS cluster without a service name")?;
    let assignment = endpoints
        .get(name)
        .with_context(|| format!("the configuration dump has no endpoints of {name}"))?;
    fields.insert("type".to_owned(), json!("STATIC"));
    fields.insert("load_assignment".to_owned(), assignment.clone());
    Ok(())
}

/// Takes out what a stock Envoy does not have.
fn strip(value: &mut Value) -> Result<()> {
    match value {
        Value::Array(elements) => {
            let mut kept = Vec::with_capacity(elements.len());
            for mut element in elements.drain(..) {
                if !is_absent(&element)? {
                    strip(&mut element)?;
                    kept.push(element);
                }
            }
            *elements = kept;
        }
        Value::Object(fields) => {
            if let Some(factory) = fields.get_mut("factory_key")
                && factory == ISTIO_HASHABLE
            {
                *factory = json!(ENVOY_HASHABLE);
            }
            for field in fields.values_mut() {
                strip(field)?;
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
    Ok(())
}

/// Whether a list's element is configured by an extension that Envoy lacks.
fn is_absent(element: &Value) -> Result<bool> {
    let Some(config) = element.get("typed_config") else {
        return Ok(false);
    };
    let outer = config.get("@type").and_then(Value::as_str).unwrap_or("");
    let url = if outer.ends_with("TypedStruct") {
        config.get("type_url").and_then(Value::as_str).unwrap_or("")
    } else {
        outer
    };
    let name = url.strip_prefix(PREFIX).unwrap_or(url);
    if ABSENT.contains(&name) {
        return Ok(true);
    }
    if !["envoy.", "google.protobuf.", "xds.type."]
        .iter()
        .any(|known| name.starts_with(known))
    {
        bail!("the capture uses {name:?}, which stock Envoy may lack: add it to ABSENT in bench/src/envoy.rs or teach the rig");
    }
    Ok(false)
}

/// Reads certificates from files where the capture names secrets.
fn inline_secrets(value: &mut Value, folder: &Path) {
    match value {
        Value::Array(elements) => {
            for element in elements {
                inline_secrets(element, folder);
            }
        }
        Value::Object(fields) => {
            let file = |name: &str| json!({"filename": folder.join(name)});
            if fields.remove("tls_certificate_sds_secret_configs").is_some() {
                fields.insert(
                    "tls_certificates".to_owned(),
                    json!([{
                        "certificate_chain": file("cert-chain.pem"),
                        "private_key": file("key.pem"),
                    }]),
                );
            }
            if let Some(mut combined) = fields.remove("combined_validation_context") {
                let mut context = combined
                    .get_mut("default_validation_context")
                    .map_or_else(|| json!({}), Value::take);
                if let Some(context) = context.as_object_mut() {
                    context.insert("trusted_ca".to_owned(), file("root-cert.pem"));
                }
                fields.insert("validation_context".to_owned(), context);
            }
            for field in fields.values_mut() {
                inline_secrets(field, folder);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::config_dump;

    fn rendered() -> Value {
        let place = Place {
            listen: SocketAddr::from(([127, 0, 0, 1], 25008)),
            admin: SocketAddr::from(([127, 0, 0, 1], 25000)),
            certificates: Path::new("/certificates"),
        };
        bootstrap(&config_dump(true).unwrap(), &place).unwrap()
    }

    #[test]
    fn nothing_is_left_that_only_istio_has_or_that_needs_a_control_plane() {
        let text = rendered().to_string();
        for absent in ABSENT {
            assert!(!text.contains(absent), "{absent}");
        }
        for absent in [ISTIO_HASHABLE, "sds_config", "eds_cluster_config", "\"ads\""] {
            assert!(!text.contains(absent), "{absent}");
        }
    }

    #[test]
    fn the_terminating_listener_has_our_address_certificate_and_root() {
        let bootstrap = rendered();
        let listeners = bootstrap["static_resources"]["listeners"].as_array().unwrap();
        let terminate = listeners
            .iter()
            .find(|listener| listener["name"] == "connect_terminate")
            .unwrap();
        assert_eq!(
            terminate["address"]["socket_address"],
            json!({"address": "127.0.0.1", "port_value": 25008})
        );
        let tls = &terminate["filter_chains"][0]["transport_socket"]["typed_config"];
        assert_eq!(tls["require_client_certificate"], json!(true));
        let common = &tls["common_tls_context"];
        assert_eq!(
            common["tls_certificates"][0]["private_key"]["filename"],
            "/certificates/key.pem"
        );
        let validation = &common["validation_context"];
        assert_eq!(validation["trusted_ca"]["filename"], "/certificates/root-cert.pem");
        assert_eq!(
            validation["match_typed_subject_alt_names"][0]["matcher"]["prefix"],
            "spiffe://cluster.local/"
        );
    }

    #[test]
    fn clusters_hold_the_endpoints_of_the_dump() {
        let bootstrap = rendered();
        let clusters = bootstrap["static_resources"]["clusters"].as_array().unwrap();
        let web = clusters
            .iter()
            .find(|cluster| cluster["name"].as_str().unwrap().starts_with("inbound-vip|80|"))
            .unwrap();
        assert_eq!(web["type"], "STATIC");
        let endpoints = web["load_assignment"]["endpoints"][0]["lb_endpoints"].as_array().unwrap();
        assert_eq!(endpoints.len(), 2);
    }

    #[test]
    fn an_unknown_extension_stops_the_rig() {
        let mut value = json!([{"name": "new", "typed_config": {
            "@type": "type.googleapis.com/udpa.type.v1.TypedStruct",
            "type_url": "type.googleapis.com/io.istio.http.new.Config",
        }}]);
        let error = strip(&mut value).unwrap_err().to_string();
        assert!(error.contains("io.istio.http.new.Config"), "{error}");
    }
}
