//! The mesh of the tests: client 10.99.0.1, server 10.99.0.2 behind `web` (10.98.0.1:80 → 8080), a waypoint 10.99.0.3.

use std::net::{IpAddr, Ipv4Addr};

use cairn_proto::istio::{
    security::{Authorization, Group, Match, Rules, StringMatch, string_match::MatchType},
    workload::{
        Address, GatewayAddress, NamespacedHostname, NetworkAddress, Port, PortList, Service, Workload, address::Type,
        gateway_address::Destination,
    },
};
use cairn_ztunnel::{authorization, wds};
use prost::Message as _;

use crate::{
    istiod::Istiod,
    net::{Capture, Net, Pod, hub_ip},
};

pub const WEB: &str = "10.98.0.1:80";
pub const WAYPOINT: &str = "default/waypoint.default.svc.cluster.local";
pub const SERVICE: &str = "default/web.default.svc.cluster.local";

pub struct Cluster {
    pub net: Net,
    pub istiod: Istiod,
    pub client: Pod,
    pub server: Pod,
}

/// A pod of namespace `default` with an account of its own name.
pub fn workload(name: &str, ip: IpAddr, tunnel: bool, services: &[(&str, u32, u32)]) -> Workload {
    let IpAddr::V4(v4) = ip else { panic!("{ip}") };
    let ports = |service_port, target_port| PortList {
        ports: vec![Port {
            service_port,
            target_port,
            ..Port::default()
        }],
    };
    Workload {
        uid: format!("Kubernetes//Pod/default/{name}"),
        name: name.into(),
        namespace: "default".into(),
        addresses: vec![v4.octets().to_vec()],
        tunnel_protocol: i32::from(tunnel),
        service_account: name.into(),
        node: "node".into(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_name: name.into(),
        cluster_id: "Kubernetes".into(),
        services: services
            .iter()
            .map(|(key, port, target)| ((*key).to_owned(), ports(*port, *target)))
            .collect(),
        ..Workload::default()
    }
}

/// A service of one port.
pub fn service(key: &str, vip: Ipv4Addr, port: u32, target: u32) -> Service {
    let (namespace, hostname) = key.split_once('/').unwrap();
    Service {
        name: hostname.split('.').next().unwrap().into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        addresses: vec![NetworkAddress {
            address: vip.octets().to_vec(),
            ..NetworkAddress::default()
        }],
        ports: vec![Port {
            service_port: port,
            target_port: target,
            ..Port::default()
        }],
        ..Service::default()
    }
}

pub fn through(key: &str) -> Option<GatewayAddress> {
    let (namespace, hostname) = key.split_once('/').unwrap();
    Some(GatewayAddress {
        hbone_mtls_port: 15008,
        destination: Some(Destination::Hostname(NamespacedHostname {
            namespace: namespace.into(),
            hostname: hostname.into(),
        })),
    })
}

/// A policy of namespace `default` with one match.
pub fn policy(name: &str, deny: bool, one: Match) -> Authorization {
    Authorization {
        name: name.into(),
        namespace: "default".into(),
        scope: 1,
        action: i32::from(deny),
        groups: vec![Group {
            rules: vec![Rules { matches: vec![one] }],
        }],
        ..Authorization::default()
    }
}

pub fn principal(text: &str) -> Vec<StringMatch> {
    vec![StringMatch {
        match_type: Some(MatchType::Exact(text.into())),
    }]
}

impl Istiod {
    pub fn workloads(&self, all: Vec<Workload>) {
        let encode = |workload: Workload| {
            let name = workload.uid.clone();
            let r#type = Some(Type::Workload(workload));
            (name, Address { r#type }.encode_to_vec())
        };
        self.push(wds::TYPE, all.into_iter().map(encode).collect(), &[]);
    }

    pub fn services(&self, all: Vec<Service>) {
        let encode = |service: Service| {
            let name = format!("{}/{}", service.namespace, service.hostname);
            let r#type = Some(Type::Service(service));
            (name, Address { r#type }.encode_to_vec())
        };
        self.push(wds::TYPE, all.into_iter().map(encode).collect(), &[]);
    }

    pub fn policy(&self, policy: &Authorization) {
        let name = format!("{}/{}", policy.namespace, policy.name);
        self.push(authorization::TYPE, vec![(name, policy.encode_to_vec())], &[]);
    }
}

impl Cluster {
    /// Without any proxy yet.
    pub fn new(client: Capture, server: Capture) -> Self {
        let mut net = Net::new();
        let istiod = Istiod::new();
        let listener = net.hub().run(|| std::net::TcpListener::bind((hub_ip(), 15010))).unwrap();
        istiod.serve(listener);
        let captured = |capture: Capture| !matches!(capture, Capture::None);
        let (tunnel, server_tunnel) = (captured(client), captured(server));
        let (client, server) = (net.pod("client", 1, client), net.pod("server", 2, server));
        istiod.workloads(vec![
            workload("client", client.ip, tunnel, &[]),
            workload("server", server.ip, server_tunnel, &[(SERVICE, 80, 8080)]),
        ]);
        istiod.services(vec![service(SERVICE, Ipv4Addr::new(10, 98, 0, 1), 80, 8080)]);
        Self {
            net,
            istiod,
            client,
            server,
        }
    }

    /// With a dedicated proxy in both pods.
    pub async fn dedicated(capture: Capture) -> Self {
        let mut cluster = Self::new(capture, capture);
        for pod in [cluster.client.clone(), cluster.server.clone()] {
            cluster.proxy(&pod, &[]);
            pod.ready().await;
        }
        cluster.server.echo(8080);
        cluster
    }

    /// A dedicated proxy for a pod.
    pub fn proxy(&mut self, pod: &Pod, more: &[(&str, &str)]) -> std::path::PathBuf {
        let name = if pod.ip == self.client.ip { "client" } else { "server" };
        let info = format!("default/{name}/{name}");
        let environment = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", info.as_str())];
        self.net.ztunnel(&pod.space, &[&environment[..], more].concat())
    }

    pub fn log(&self, pod: &Pod, index: usize) -> std::path::PathBuf {
        self.net.folder.path().join(format!("{}-{index}.log", pod.space))
    }
}
