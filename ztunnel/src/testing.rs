//! What several tests need: workloads and services of few words.

use std::sync::Arc;

use cairn_exchange::SpiffeId;

use crate::mesh::{Families, Service, Tunnel, Vip, Workload};

/// A pod of namespace `app` with a service account of its own name.
pub(crate) fn workload(name: &str, addresses: &[&str]) -> Workload {
    Workload {
        facts: Arc::new(cairn_exchange::Workload {
            uid: format!("Kubernetes//Pod/app/{name}").into(),
            name: name.into(),
            namespace: "app".into(),
            network: "".into(),
            identity: SpiffeId::workload("cluster.local", "app", name).ok(),
            service_account: name.into(),
            canonical_name: name.into(),
            canonical_revision: "v1".into(),
            workload_type: "deployment",
            workload_name: name.into(),
            cluster: "Kubernetes".into(),
            region: "".into(),
            zone: "".into(),
        }),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        hostname: "".into(),
        tunnel: Tunnel::None,
        waypoint: None,
        network_gateway: None,
        node: "node".into(),
        subzone: "".into(),
        native_tunnel: false,
        application_tunnel: None,
        services: Box::new([]),
        policies: Box::new([]),
        healthy: true,
        host_network: false,
        capacity: 1,
    }
}

/// A service of key `namespace/hostname` with these addresses or ranges.
pub(crate) fn service(key: &str, addresses: &[&str], ports: &[(u16, u16)]) -> Service {
    let (namespace, hostname) = key.split_once('/').unwrap();
    let vip = |text: &&str| Vip {
        network: "".into(),
        range: text
            .parse()
            .unwrap_or_else(|_| ipnet::IpNet::from(text.parse::<std::net::IpAddr>().unwrap())),
    };
    Service {
        key: key.into(),
        name: hostname.split('.').next().unwrap().into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        vips: addresses.iter().map(vip).collect(),
        ports: ports.to_vec(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancing: None,
        families: Families::Any,
        canonical: false,
        private: false,
    }
}
