//! What a large mesh costs: 100,000 workloads in 1,000 services. Alone in its process, so that its memory is its own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what fails here fails the test")]

use std::sync::Arc;

use cairn_exchange::clock;
use cairn_proto::istio::workload::{Address, Locality, Port, PortList, Service, Workload, address::Type};
use cairn_ztunnel::{
    mesh::{Interner, Mesh},
    wds,
};
use prost::Message as _;

const WORKLOADS: u32 = 100_000;
const SERVICES: u32 = 1_000;
/// Bytes.
const MOST_MEMORY: u64 = 150 << 20;

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

fn pod(number: u32, revision: &str) -> (String, Vec<u8>) {
    let service = number % SERVICES;
    let key = format!("ns{}/svc{service}.ns{}.svc.cluster.local", service % 100, service % 100);
    let ports = PortList {
        ports: vec![Port {
            service_port: 80,
            target_port: 8080,
            ..Port::default()
        }],
    };
    let workload = Workload {
        uid: format!("Kubernetes//Pod/ns{}/svc{service}-5d4f8c7b9-{number:05}", service % 100),
        name: format!("svc{service}-5d4f8c7b9-{number:05}"),
        namespace: format!("ns{}", service % 100),
        addresses: vec![(0x0a00_0000 + number).to_be_bytes().to_vec()],
        tunnel_protocol: 1,
        service_account: format!("svc{service}"),
        node: format!("node-{}", number % 2_000),
        canonical_name: format!("svc{service}"),
        canonical_revision: revision.to_owned(),
        workload_name: format!("svc{service}"),
        cluster_id: "Kubernetes".into(),
        locality: Some(Locality {
            region: "region".into(),
            zone: format!("zone-{}", number % 3),
            subzone: String::new(),
        }),
        services: [(key, ports)].into(),
        ..Workload::default()
    };
    let name = workload.uid.clone();
    let r#type = Some(Type::Workload(workload));
    (name, Address { r#type }.encode_to_vec())
}

#[test]
fn a_hundred_thousand_workloads_fit_and_one_change_costs_what_one_is() {
    let before = resident();
    let (mesh, mut texts) = (Arc::new(Mesh::new("")), Interner::default());
    for number in 0..SERVICES {
        let service = Service {
            name: format!("svc{number}"),
            namespace: format!("ns{}", number % 100),
            hostname: format!("svc{number}.ns{}.svc.cluster.local", number % 100),
            ..Service::default()
        };
        let name = format!("{}/{}", service.namespace, service.hostname);
        let r#type = Some(Type::Service(service));
        wds::apply(&name, &Address { r#type }.encode_to_vec(), &mesh, &mut texts).unwrap();
    }
    for number in 0..WORKLOADS {
        let (name, bytes) = pod(number, "v1");
        wds::apply(&name, &bytes, &mesh, &mut texts).unwrap();
    }
    let memory = resident() - before;
    assert_eq!(mesh.counts(), (WORKLOADS as usize, SERVICES as usize));
    let changes: Vec<_> = (0..10_000).map(|number| pod(number * 7 % WORKLOADS, "v2")).collect();
    let begin = clock::now();
    for (name, bytes) in &changes {
        wds::apply(name, bytes, &mesh, &mut texts).unwrap();
    }
    let each = begin.elapsed() / 10_000;
    println!("{} MiB for {WORKLOADS} workloads, {each:?} a change", memory >> 20);
    assert!(memory < MOST_MEMORY, "{} MiB", memory >> 20);
    assert!(each.as_micros() < 500, "{each:?}, without optimization");
}
