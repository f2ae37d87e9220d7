//! Compared with the node that Istio's own agent code makes.

use prost_reflect::{DynamicMessage, prost::Message as _};
use prost_types::value::Kind;

use super::*;

/// The node that Istio's own agent code made for the pod of a captured scenario.
fn captured() -> Node {
    let capture: Value = serde_json::from_str(include_str!("../../tests/captured/capture.json")).unwrap();
    let node = cairn_proto::pool().get_message_by_name("envoy.config.core.v3.Node").unwrap();
    let message = DynamicMessage::deserialize(node, capture["node"].clone()).unwrap();
    Node::decode(message.encode_to_vec().as_slice()).unwrap()
}

fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// What the same pod knows: environment of the Deployment template, downward API, PROXY_CONFIG.
fn waypoint() -> NodeBuilder {
    NodeBuilder {
        pod_name: "waypoint-7d9f8b6c5-x2x4z".into(),
        pod_namespace: "app".into(),
        service_account: "waypoint".into(),
        instance_ips: vec!["10.244.0.2".parse().unwrap()],
        dns_domain: "app.svc.cluster.local".into(),
        istio_version: "1.31.0".into(),
        istiod_names: vec!["istiod.istio-system.svc".into()],
        labels: Some(pairs(&[
            ("gateway.istio.io/managed", "istio.io-mesh-controller"),
            ("gateway.networking.k8s.io/gateway-class-name", "istio-waypoint"),
            ("gateway.networking.k8s.io/gateway-name", "waypoint"),
            ("istio.io/dataplane-mode", "none"),
            ("service.istio.io/canonical-name", "waypoint"),
            ("service.istio.io/canonical-revision", "latest"),
            ("sidecar.istio.io/inject", "false"),
            ("pod-template-hash", "7d9f8b6c5"),
        ])),
        annotations: pairs(&[
            ("istio.io/rev", "default"),
            ("prometheus.io/path", "/stats/prometheus"),
            ("prometheus.io/port", "15020"),
            ("prometheus.io/scrape", "true"),
        ]),
        proxy_config: json!({"proxyMetadata": {"ISTIO_META_ENABLE_HBONE": "true"}})
            .as_object()
            .cloned()
            .unwrap(),
        environment: pairs(&[
            ("ISTIO_META_SERVICE_ACCOUNT", "waypoint"),
            ("ISTIO_META_NODE_NAME", "node-a"),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            ("ISTIO_META_INTERCEPTION_MODE", "REDIRECT"),
            ("ISTIO_META_WORKLOAD_NAME", "waypoint"),
            (
                "ISTIO_META_OWNER",
                "kubernetes://apis/apps/v1/namespaces/app/deployments/waypoint",
            ),
            ("ISTIO_META_MESH_ID", "cluster.local"),
            ("PATH", "/usr/bin"),
        ]),
        status_port: 15021,
        prometheus_port: 15090,
        ..NodeBuilder::default()
    }
}

fn field(node: &Node, key: &str) -> Option<Kind> {
    node.metadata
        .as_ref()
        .unwrap()
        .fields
        .get(key)
        .and_then(|value| value.kind.clone())
}

fn string(text: &str) -> Option<Kind> {
    Some(Kind::StringValue(text.into()))
}

#[test]
fn the_node_is_the_one_that_pilot_agent_makes() {
    let (ours, theirs) = (waypoint().build(), captured());
    for (key, value) in &theirs.metadata.as_ref().unwrap().fields {
        assert_eq!(ours.metadata.as_ref().unwrap().fields.get(key), Some(value), "{key}");
    }
    assert_eq!(ours, theirs);
}

#[test]
fn the_environment_wins_over_the_configuration_and_json_over_both() {
    let mut builder = waypoint();
    builder.environment.extend(pairs(&[
        ("ISTIO_META_ENABLE_HBONE", "false"),
        ("ISTIO_META_NETWORK", "net-1"),
        ("ISTIO_META_HTTP10", "1"),
        ("ISTIO_META_ISTIO_VERSION", "1.30.1"),
        (
            "ISTIO_METAJSON_X",
            r#"{"NETWORK": "net-2", "DISABLE_HBONE_SEND": true, "DEEP": {"flag": true}}"#,
        ),
        ("ISTIO_METAJSON_BROKEN", "{"),
    ]));
    let node = builder.build();
    assert_eq!(field(&node, "ENABLE_HBONE"), string("false"));
    assert_eq!(field(&node, "NETWORK"), string("net-2"));
    assert_eq!(field(&node, "HTTP10"), string("1"));
    assert_eq!(field(&node, "ISTIO_VERSION"), string("1.30.1"));
    assert_eq!(field(&node, "DISABLE_HBONE_SEND"), string("true"));
    let Some(Kind::StructValue(deep)) = field(&node, "DEEP") else {
        panic!("an object")
    };
    assert_eq!(deep.fields["flag"].kind, Some(Kind::BoolValue(true)));
}

#[test]
fn several_addresses_are_joined_and_the_first_is_in_the_id() {
    let mut builder = waypoint();
    builder.instance_ips.push("fd00::2".parse().unwrap());
    let node = builder.build();
    assert_eq!(field(&node, "INSTANCE_IPS"), string("10.244.0.2,fd00::2"));
    assert!(node.id.starts_with("waypoint~10.244.0.2~"), "{}", node.id);
}

#[test]
fn the_locality_comes_from_the_label_with_dots_or_slashes() {
    for (label, value, want) in [
        ("istio-locality", "eu.west.rack1", ["eu", "west", "rack1"]),
        ("istio-locality", "eu/west.1", ["eu", "west.1", ""]),
        ("topology.istio.io/locality", "us", ["us", "", ""]),
    ] {
        let mut builder = waypoint();
        builder.labels.get_or_insert_default().insert(label.into(), value.into());
        let got = builder.build().locality.unwrap();
        assert_eq!([&*got.region, &*got.zone, &*got.sub_zone], want, "{label}={value}");
    }
}

#[test]
fn static_labels_stand_below_the_pods_own() {
    let mut builder = waypoint();
    builder.environment.insert(
        "ISTIO_METAJSON_LABELS".into(),
        r#"{"app": "static", "istio.io/dataplane-mode": "x"}"#.into(),
    );
    let node = builder.build();
    let Some(Kind::StructValue(labels)) = field(&node, "LABELS") else {
        panic!("an object")
    };
    assert_eq!(labels.fields["app"].kind, string("static"));
    assert_eq!(labels.fields["istio.io/dataplane-mode"].kind, string("none"));
    assert!(!labels.fields.contains_key("pod-template-hash"));
    assert_eq!(node.cluster, "static.app");
}
