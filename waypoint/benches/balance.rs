//! What a pick costs among few and among many endpoints, and what a change of one endpoint of many costs.
//!
//! `cargo bench -p cairn-waypoint --bench balance`

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use cairn_exchange::{ClusterFacts, clock};
use cairn_policy::balance::RingSize;
use cairn_proto::envoy::config::{
    cluster::v3::{Cluster as EnvoyCluster, cluster::EdsClusterConfig},
    core::v3::{
        Address, AggregatedConfigSource, ConfigSource, SocketAddress, address, config_source::ConfigSourceSpecifier,
        socket_address::PortSpecifier,
    },
    endpoint::v3::{
        ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
    },
};
use cairn_waypoint::{
    config::{Compiler, Resource},
    snapshot::Snapshot,
    upstream::{
        Avoid, Cluster, ClusterSettings, ClusterState, Endpoint, EndpointSet, EndpointState, Health, LbPolicy, LeastRequest,
        Locality, LocalityGroup, Picking, Target,
    },
    workloads::Workloads,
};
use divan::Bencher;
use prost::Message as _;

fn main() {
    divan::main();
}

const SIZES: [usize; 2] = [10, 10_000];
const CLUSTERS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";

fn address(number: usize) -> SocketAddr {
    let [.., high, low] = number.to_be_bytes();
    SocketAddr::from(([10, 0, high, low], 8080))
}

fn cluster(count: usize, lb: LbPolicy, weighted: bool) -> Cluster {
    let locality = Arc::new(Locality::default());
    let endpoint = |number| {
        Arc::new(Endpoint {
            transport: None,
            target: Target::Plain(address(number)),
            display: address(number).to_string().into(),
            health: Health::Healthy,
            weight: if weighted { 1 + number as u32 % 3 } else { 1 },
            locality: locality.clone(),
            hostname: None,
            hash_key: None,
            labels: Default::default(),
            healthy_since: clock::now(),
            state: Arc::new(EndpointState::default()),
        })
    };
    let settings = ClusterSettings {
        lb,
        ..ClusterSettings::default()
    };
    let group = LocalityGroup {
        locality: locality.clone(),
        weight: 1,
        endpoints: (0..count).map(endpoint).collect(),
    };
    let state = ClusterState::default();
    let set = EndpointSet::new(vec![(0, group)], settings.arrangement(None));
    state.endpoints.store(Arc::new(set));
    Cluster {
        facts: Arc::new(ClusterFacts {
            name: "web".into(),
            alt_stat_name: None,
            service: None,
        }),
        settings,
        transport_hash: 0,
        state: Arc::new(state),
    }
}

fn pick(bencher: Bencher<'_, '_>, cluster: &Cluster) {
    let hashed = cluster.settings.lb.is_hashed();
    bencher.with_inputs(|| fastrand::u64(..)).bench_values(|random| {
        Picking::new(cluster)
            .hashed(hashed.then_some(random))
            .next(random, Avoid::default())
    });
}

#[divan::bench(args = SIZES)]
fn least_request(bencher: Bencher<'_, '_>, count: usize) {
    pick(
        bencher,
        &cluster(count, LbPolicy::LeastRequest(LeastRequest::default()), false),
    );
}

#[divan::bench(args = SIZES)]
fn least_request_by_weight(bencher: Bencher<'_, '_>, count: usize) {
    pick(
        bencher,
        &cluster(count, LbPolicy::LeastRequest(LeastRequest::default()), true),
    );
}

#[divan::bench(args = SIZES)]
fn round_robin_by_weight(bencher: Bencher<'_, '_>, count: usize) {
    pick(bencher, &cluster(count, LbPolicy::RoundRobin { slow_start: None }, true));
}

#[divan::bench(args = SIZES)]
fn ring_hash(bencher: Bencher<'_, '_>, count: usize) {
    pick(bencher, &cluster(count, LbPolicy::RingHash(RingSize::default()), false));
}

#[divan::bench(args = SIZES)]
fn maglev(bencher: Bencher<'_, '_>, count: usize) {
    pick(bencher, &cluster(count, LbPolicy::Maglev { table_size: 65_537 }, false));
}

/// An assignment of so many endpoints, of which one has another weight.
fn assignment(count: usize, weight: u32) -> Bytes {
    let endpoint = |number: usize| LbEndpoint {
        load_balancing_weight: Some(if number == count / 2 { weight } else { 1 }),
        host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
            address: Some(Address {
                address: Some(address::Address::SocketAddress(SocketAddress {
                    address: address(number).ip().to_string(),
                    port_specifier: Some(PortSpecifier::PortValue(8080)),
                    ..Default::default()
                })),
            }),
            ..Default::default()
        })),
        ..Default::default()
    };
    let assignment = ClusterLoadAssignment {
        cluster_name: "web".into(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: (0..count).map(endpoint).collect(),
            ..Default::default()
        }],
        ..Default::default()
    };
    assignment.encode_to_vec().into()
}

/// From the bytes of an answer of istiod to the set that requests see.
#[divan::bench(args = SIZES)]
fn one_endpoint_changes(bencher: Bencher<'_, '_>, count: usize) {
    let workloads = Arc::new(Workloads::new(""));
    let published = Arc::new(arc_swap::ArcSwap::from_pointee(Snapshot::empty(workloads.clone())));
    let mut compiler = Compiler::new(workloads, published, None);
    let cluster = EnvoyCluster {
        name: "web".into(),
        cluster_discovery_type: Some(cairn_proto::envoy::config::cluster::v3::cluster::ClusterDiscoveryType::Type(
            3,
        )),
        eds_cluster_config: Some(EdsClusterConfig {
            eds_config: Some(ConfigSource {
                config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
                ..Default::default()
            }),
            ..Default::default()
        }),
        lb_policy: 1,
        ..Default::default()
    };
    let resource = |type_url: &str, bytes: Bytes| {
        vec![Resource {
            name: "web".into(),
            version: String::new(),
            type_url: type_url.into(),
            bytes,
        }]
    };
    let applied = compiler.apply(CLUSTERS, resource(CLUSTERS, cluster.encode_to_vec().into()), Vec::new());
    assert!(applied.errors.is_empty(), "{:?}", applied.errors);
    let both = [assignment(count, 1), assignment(count, 2)];
    let mut turn = 0;
    bencher.bench_local(|| {
        turn ^= 1;
        let bytes = both[turn].clone();
        compiler.apply(ENDPOINTS, resource(ENDPOINTS, bytes), Vec::new())
    });
}
