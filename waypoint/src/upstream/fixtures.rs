//! Endpoints and clusters for tests, without anything behind them.

use std::{net::SocketAddr, sync::Arc};

use cairn_exchange::{ClusterFacts, clock};

use super::{
    Cluster, ClusterSettings, ClusterState, Endpoint, EndpointSet, EndpointState, Health, Locality, LocalityGroup, Target,
};

/// An endpoint `10.0.0.N:8080`.
pub fn endpoint(number: usize) -> Endpoint {
    let [.., high, low] = number.to_be_bytes();
    let address = SocketAddr::from(([10, 0, high, low], 8080));
    Endpoint {
        transport: None,
        target: Target::Plain(address),
        display: address.to_string().into(),
        health: Health::Healthy,
        weight: 1,
        locality: Arc::default(),
        hostname: None,
        hash_key: None,
        labels: Default::default(),
        healthy_since: clock::now(),
        state: Arc::new(EndpointState::default()),
    }
}

/// A locality of a priority.
pub fn locality(priority: usize, zone: &str, weight: u32, endpoints: Vec<Endpoint>) -> (usize, LocalityGroup) {
    let locality = Arc::new(Locality {
        zone: zone.into(),
        ..Locality::default()
    });
    let endpoints = endpoints.into_iter().map(Arc::new).collect();
    let group = LocalityGroup {
        locality,
        weight,
        endpoints,
    };
    (priority, group)
}

/// A cluster `web` of these localities.
pub fn cluster(groups: Vec<(usize, LocalityGroup)>, settings: ClusterSettings) -> Arc<Cluster> {
    let state = ClusterState::default();
    state
        .endpoints
        .store(Arc::new(EndpointSet::new(groups, settings.arrangement(None))));
    Arc::new(Cluster {
        facts: Arc::new(ClusterFacts {
            name: "web".into(),
            alt_stat_name: None,
            service: None,
        }),
        settings,
        transport_hash: 0,
        state: Arc::new(state),
    })
}

/// A cluster of so many equal endpoints.
pub fn equal(count: usize, settings: ClusterSettings) -> Arc<Cluster> {
    cluster(vec![locality(0, "a", 1, (0..count).map(endpoint).collect())], settings)
}
