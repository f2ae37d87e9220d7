//! The node: who the proxy says it is, in the form that istiod reads.
//!
//! istiod authenticates the stream against the namespace and service account in here, finds the pod by its name, and reads
//! features and versions from the metadata (contract xds §1.4–1.7). The form is pilot-agent's: a flat struct whose
//! booleans are the strings `"true"` and `"false"`. The builder is a pure function of its fields; reading the environment and
//! the downward API's files is the caller's.

use std::{collections::BTreeMap, net::IpAddr};

use cairn_proto::envoy::config::core::v3::{Locality, Node};
use serde_json::{Map, Value, json};
use tracing::warn;

use crate::proxy_config;

/// A label of the ReplicaSet, of no meaning to anybody else.
const TEMPLATE_HASH: &str = "pod-template-hash";
/// The locality of a pod, by the names of the label, the newer first.
const LOCALITY_LABELS: [&str; 2] = ["topology.istio.io/locality", "istio-locality"];
/// The variables that become metadata.
const META: &str = "ISTIO_META_";
const METAJSON: &str = "ISTIO_METAJSON_";

/// What the node is made of.
#[derive(Clone, Debug, Default)]
pub struct NodeBuilder {
    /// `POD_NAME`.
    pub pod_name: String,
    /// `POD_NAMESPACE`.
    pub pod_namespace: String,
    /// `SERVICE_ACCOUNT`; when empty, `ISTIO_META_SERVICE_ACCOUNT` counts.
    pub service_account: String,
    /// `INSTANCE_IP` first (it is part of the node's id), then what other addresses the pod has.
    pub instance_ips: Vec<IpAddr>,
    /// The argument `--domain`, as `app.svc.cluster.local`.
    pub dns_domain: String,
    /// The Istio version to claim (contract xds §1.13), unless `ISTIO_META_ISTIO_VERSION` is set.
    pub istio_version: String,
    /// The names that istiod's certificate may carry.
    pub istiod_names: Vec<String>,
    /// `/etc/istio/pod/labels`; `None` when there is no such file.
    pub labels: Option<BTreeMap<String, String>>,
    /// `/etc/istio/pod/annotations`.
    pub annotations: BTreeMap<String, String>,
    /// `PROXY_CONFIG`, protobuf JSON; defaults are filled in.
    pub proxy_config: Map<String, Value>,
    /// Environment variables. Only those that start with `ISTIO_META_` or `ISTIO_METAJSON_` are read.
    pub environment: BTreeMap<String, String>,
    /// The port of `/healthz/ready`: 15021.
    pub status_port: u16,
    /// The port of the metrics: 15090.
    pub prometheus_port: u16,
    /// There is a socket of an external server of secrets named by `credentialName`.
    pub credential_socket: bool,
    /// There is a socket of an external server of secrets in files.
    pub file_credential_socket: bool,
    /// More metadata that is not in the environment, as `DNS_PROXY_ADDR` or `OUTLIER_LOG_PATH`; wins over everything.
    pub more: Map<String, Value>,
}

// === impl NodeBuilder ===

impl NodeBuilder {
    /// The node of a waypoint.
    pub fn build(&self) -> Node {
        let config = proxy_config::merged(&self.proxy_config);
        let mut metadata = self.variables(&config);
        let labels = self.all_labels(&metadata);
        let locality = LOCALITY_LABELS
            .iter()
            .find_map(|label| labels.get(*label))
            .map(|label| sanitized(label));
        let cluster = proxy_config::cluster_name(&config, &labels, text(&metadata, "WORKLOAD_NAME"), &self.pod_namespace);
        self.add_own(&mut metadata, config, labels, locality.as_deref());
        let ip = self.instance_ips.first().map(ToString::to_string).unwrap_or_default();
        Node {
            id: format!("waypoint~{ip}~{}.{}~{}", self.pod_name, self.pod_namespace, self.dns_domain),
            cluster,
            metadata: Some(object_to_proto(metadata.into_iter().map(|(key, value)| (key, flat(value))))),
            locality: Some(locality.map(|label| parsed(&label)).unwrap_or_default()),
            // istiod serves Envoy's dialect to whoever asks and does not read this; other control planes do.
            user_agent_name: "envoy".to_owned(),
            ..Node::default()
        }
    }

    /// Everything named `ISTIO_META*`, of the configuration and, above it, of the environment.
    fn variables(&self, config: &Map<String, Value>) -> Map<String, Value> {
        let environment = self.environment.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let mut metadata = Map::new();
        for (key, value) in proxy_config::metadata(config).chain(environment.clone()) {
            if let Some(key) = key.strip_prefix(META) {
                metadata.insert(key.to_owned(), value.into());
            }
        }
        for (name, value) in environment.filter(|(key, _)| key.starts_with(METAJSON)) {
            match serde_json::from_str::<Map<String, Value>>(value) {
                Ok(object) => metadata.extend(object),
                Err(error) => warn!(
                    variable = name,
                    "left out of the node's metadata, since it is no JSON object: {error}"
                ),
            }
        }
        metadata
    }

    /// The pod's labels over the static ones that `ISTIO_METAJSON_LABELS` or other metadata brought.
    fn all_labels(&self, metadata: &Map<String, Value>) -> BTreeMap<String, String> {
        let given = |key| strings(metadata.get(key).and_then(Value::as_object));
        let variable = self
            .environment
            .get("ISTIO_METAJSON_LABELS")
            .and_then(|json| serde_json::from_str(json).ok());
        let mut labels = given("STATIC_LABELS");
        labels.extend(strings(variable.as_ref()));
        match &self.labels {
            Some(pod) => labels.extend(pod.iter().map(|(key, value)| (key.clone(), value.clone()))),
            None => labels.extend(given("LABELS")),
        }
        labels.remove(TEMPLATE_HASH);
        labels
    }

    /// What the proxy knows of itself and no variable may contradict.
    fn add_own(
        &self,
        metadata: &mut Map<String, Value>,
        config: Map<String, Value>,
        mut labels: BTreeMap<String, String>,
        locality: Option<&str>,
    ) {
        if let Some(locality) = locality {
            labels.insert("istio-locality".to_owned(), locality.to_owned());
        }
        let mut annotations = strings(metadata.get("ANNOTATIONS").and_then(Value::as_object));
        annotations.extend(self.annotations.clone());
        let ips: Vec<_> = self.instance_ips.iter().map(ToString::to_string).collect();
        if text(metadata, "ISTIO_VERSION").is_empty() {
            metadata.insert("ISTIO_VERSION".to_owned(), json!(self.istio_version));
        }
        let own = [
            ("NAME", json!(self.pod_name)),
            ("NAMESPACE", json!(self.pod_namespace)),
            ("SERVICE_ACCOUNT", json!(self.service_account)),
            ("INSTANCE_IPS", json!(ips.join(","))),
            ("LABELS", json!(labels)),
            ("ANNOTATIONS", json!(annotations)),
            ("PROXY_CONFIG", Value::Object(config)),
            ("PILOT_SAN", json!(self.istiod_names)),
            ("ENVOY_STATUS_PORT", json!(self.status_port)),
            ("ENVOY_PROMETHEUS_PORT", json!(self.prometheus_port)),
            // Forced for waypoints: it is how Envoy is told to watch workloads.
            ("METADATA_DISCOVERY", json!(true)),
        ];
        // pilot-agent leaves empty values out.
        metadata.extend(
            own.into_iter()
                .filter(|(_, value)| !is_empty(value))
                .map(|(key, value)| (key.to_owned(), value)),
        );
        for (key, there) in [
            ("credential", self.credential_socket),
            ("file-credential", self.file_credential_socket),
        ] {
            if there {
                metadata.insert(key.to_owned(), json!(true));
            }
        }
        metadata.extend(self.more.clone());
    }
}

fn text<'a>(metadata: &'a Map<String, Value>, key: &str) -> &'a str {
    metadata.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn strings(object: Option<&Map<String, Value>>) -> BTreeMap<String, String> {
    let entries = object.into_iter().flatten();
    entries
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(number) => number.as_u64() == Some(0),
        Value::Null | Value::Bool(_) => false,
    }
}

/// Kubernetes allows no slash in a label, so `region.zone.subzone` stands for `region/zone/subzone`.
fn sanitized(label: &str) -> String {
    if label.contains('/') {
        label.to_owned()
    } else {
        label.replace('.', "/")
    }
}

fn parsed(locality: &str) -> Locality {
    let mut parts = locality.splitn(3, '/').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    Locality {
        region: next(),
        zone: next(),
        sub_zone: next(),
    }
}

/// Top-level booleans are strings; inside `PROXY_CONFIG` and the like they stay what they are.
fn flat(value: Value) -> Value {
    match value {
        Value::Bool(yes) => yes.to_string().into(),
        other => other,
    }
}

fn object_to_proto(fields: impl Iterator<Item = (String, Value)>) -> prost_types::Struct {
    prost_types::Struct {
        fields: fields.map(|(key, value)| (key, to_proto(value))).collect(),
    }
}

/// As deep as the JSON is, which its parser limits to 128 levels.
fn to_proto(value: Value) -> prost_types::Value {
    use prost_types::value::Kind;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(yes) => Kind::BoolValue(yes),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(items) => Kind::ListValue(prost_types::ListValue {
            values: items.into_iter().map(to_proto).collect(),
        }),
        Value::Object(fields) => Kind::StructValue(object_to_proto(fields.into_iter())),
    };
    prost_types::Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests;
