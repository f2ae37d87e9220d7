//! `ProxyConfig` as the node's metadata carries it: protobuf JSON, what was set laid over pilot-agent's defaults.
//!
//! istiod reads it back from the metadata of each proxy (headers, tracing, statistics), so fields that mean nothing here pass through.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// The value that stands for "not named by the user".
const UNNAMED: &str = "istio-proxy";

/// `set` over the defaults (contract runtime §8.2).
pub(crate) fn merged(set: &Map<String, Value>) -> Map<String, Value> {
    let mut merged = Map::new();
    for (key, value) in [
        ("binaryPath", json!("/usr/local/bin/envoy")),
        ("configPath", json!("./etc/istio/proxy")),
        ("controlPlaneAuthPolicy", json!("MUTUAL_TLS")),
        ("discoveryAddress", json!("istiod.istio-system.svc:15012")),
        ("drainDuration", json!("45s")),
        ("proxyAdminPort", json!(15000)),
        ("serviceCluster", json!(UNNAMED)),
        ("statNameLength", json!(189)),
        ("statusPort", json!(15020)),
        ("terminationDrainDuration", json!("5s")),
    ] {
        merged.insert(key.to_owned(), value);
    }
    if set.contains_key("tracingServiceName") {
        // The two are one choice: a message cannot have both.
        merged.remove("serviceCluster");
    }
    merged.extend(set.iter().map(|(key, value)| (key.clone(), value.clone())));
    merged
}

/// The `ISTIO_META_` variables that the configuration asks for.
pub(crate) fn metadata(config: &Map<String, Value>) -> impl Iterator<Item = (&str, &str)> {
    let entries = config.get("proxyMetadata").and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
}

/// `node.cluster`, which tracers show as the service (contract seen §1, row 1.5): `APP.NAMESPACE`, unless `ProxyConfig` names it
/// otherwise. The command line's `--serviceCluster` never wins.
pub(crate) fn cluster_name(
    config: &Map<String, Value>,
    labels: &BTreeMap<String, String>,
    workload: &str,
    namespace: &str,
) -> String {
    let canonical = || {
        let labelled = first(labels, ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
        labelled.unwrap_or(if workload.is_empty() { UNNAMED } else { workload })
    };
    let named = match config.get("tracingServiceName").and_then(Value::as_str) {
        Some("CANONICAL_NAME_ONLY") => canonical().to_owned(),
        Some("CANONICAL_NAME_AND_NAMESPACE") if !namespace.is_empty() => return format!("{}.{namespace}", canonical()),
        Some("CANONICAL_NAME_AND_NAMESPACE") => canonical().to_owned(),
        Some(_) => UNNAMED.to_owned(),
        None => config
            .get("serviceCluster")
            .and_then(Value::as_str)
            .unwrap_or(UNNAMED)
            .to_owned(),
    };
    if !named.is_empty() && named != UNNAMED {
        return named;
    }
    let app = first(labels, ["app", "app.kubernetes.io/name", "service.istio.io/canonical-name"]);
    match (app, workload, namespace) {
        (Some(app), _, namespace) => format!("{app}.{namespace}"),
        (None, "", "") => UNNAMED.to_owned(),
        (None, "", namespace) => format!("{UNNAMED}.{namespace}"),
        (None, workload, namespace) => format!("{workload}.{namespace}"),
    }
}

fn first<'a>(labels: &'a BTreeMap<String, String>, keys: [&str; 3]) -> Option<&'a str> {
    keys.iter().find_map(|key| labels.get(*key)).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().expect("an object")
    }

    #[test]
    fn what_is_set_wins_over_the_defaults() {
        let config = merged(&object(
            json!({"discoveryAddress": "istiod-rev.istio-system.svc:15012", "concurrency": 2}),
        ));
        assert_eq!(config["discoveryAddress"], "istiod-rev.istio-system.svc:15012");
        assert_eq!(config["concurrency"], 2);
        assert_eq!(config["serviceCluster"], "istio-proxy");
        assert!(!merged(&object(json!({"tracingServiceName": "CANONICAL_NAME_ONLY"}))).contains_key("serviceCluster"));
    }

    #[test]
    fn the_cluster_is_named_as_pilot_agent_names_it() {
        let cases = [
            (json!({}), &[][..], "waypoint", "app", "waypoint.app"),
            (json!({}), &[("app", "shop")][..], "waypoint", "app", "shop.app"),
            (
                json!({}),
                &[("app.kubernetes.io/name", "k"), ("service.istio.io/canonical-name", "c")][..],
                "w",
                "app",
                "k.app",
            ),
            (json!({}), &[][..], "", "app", "istio-proxy.app"),
            (json!({}), &[][..], "", "", "istio-proxy"),
            (json!({"serviceCluster": "mine"}), &[("app", "shop")][..], "w", "app", "mine"),
            (
                json!({"tracingServiceName": "APP_LABEL_AND_NAMESPACE"}),
                &[("app", "shop")][..],
                "w",
                "app",
                "shop.app",
            ),
            (
                json!({"tracingServiceName": "CANONICAL_NAME_ONLY"}),
                &[("app", "shop")][..],
                "w",
                "app",
                "shop",
            ),
            (json!({"tracingServiceName": "CANONICAL_NAME_ONLY"}), &[][..], "w", "app", "w"),
            (
                json!({"tracingServiceName": "CANONICAL_NAME_AND_NAMESPACE"}),
                &[][..],
                "w",
                "app",
                "w.app",
            ),
            (
                json!({"tracingServiceName": "CANONICAL_NAME_AND_NAMESPACE"}),
                &[][..],
                "",
                "",
                "istio-proxy",
            ),
        ];
        for (config, labels, workload, namespace, want) in cases {
            let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let got = cluster_name(&merged(&object(config.clone())), &labels, workload, namespace);
            assert_eq!(got, want, "{config} {labels:?} {workload} {namespace}");
        }
    }
}
