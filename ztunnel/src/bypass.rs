//! Connections that went around a waypoint.
//!
//! A workload whose service has a waypoint still accepts who comes straight to it: only a policy can forbid that. Such connections are
//! counted, logged once for each pair of source and destination, and listed; [`crate::cli::policies`] prints the policies that forbid
//! them.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use cairn_exchange::SpiffeId;
use foldhash::fast::RandomState;
use papaya::HashMap;

use crate::mesh::{GatewayTarget, Mesh, Workload};

/// Pairs that are told apart; further ones are only counted.
const MOST_PAIRS: usize = 10_000;

/// Who went around a waypoint to whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// Who came; empty for plaintext of somebody unknown.
    pub source: Arc<str>,
    /// The key of the service or the name of the workload that has the waypoint.
    pub destination: Arc<str>,
}

/// Those that were seen.
#[derive(Debug, Default)]
pub struct Bypasses {
    pairs: HashMap<Pair, AtomicU64, RandomState>,
}

/// What an inbound connection went around, if it did: the service or workload whose waypoint it should have come from.
pub fn went_around(mesh: &Mesh, destination: &Workload, port: u16, source: Option<&Workload>) -> Option<Arc<str>> {
    let from = |target: &GatewayTarget| source.is_some_and(|source| mesh.is_behind(target, source));
    let services = destination
        .services
        .iter()
        .filter(|(_, ports)| ports.iter().any(|(_, target)| *target == port));
    let mut around = None;
    for service in services.filter_map(|(key, _)| mesh.service(key)) {
        if !service.has_waypoint() {
            // It may have been this one that was asked for.
            return None;
        }
        let single = service.waypoint.iter();
        let mut waypoints = single.chain(service.weighted_waypoints.iter().map(|one| &one.gateway));
        if waypoints.any(|waypoint| from(&waypoint.target)) {
            return None;
        }
        around = Some(service.key.clone());
    }
    let own = destination.waypoint.as_ref();
    if own.is_some_and(|waypoint| from(&waypoint.target)) {
        return None;
    }
    around.or_else(|| own.map(|_| destination.uid().clone()))
}

// === impl Bypasses ===

impl Bypasses {
    /// One more.
    pub fn seen(&self, source: Option<&SpiffeId>, destination: Arc<str>) {
        let pair = Pair {
            source: source.map(|source| source.as_str()).unwrap_or_default().into(),
            destination,
        };
        let pairs = self.pairs.pin();
        if let Some(count) = pairs.get(&pair) {
            count.fetch_add(1, Relaxed);
            return;
        }
        if pairs.len() >= MOST_PAIRS {
            return;
        }
        tracing::warn!(
            source = &*pair.source,
            destination = &*pair.destination,
            "a connection did not come through the waypoint; `cairn-ztunnel policies` prints the policy that would enforce it"
        );
        pairs.get_or_insert_with(pair, || AtomicU64::new(0)).fetch_add(1, Relaxed);
    }

    /// Pairs and how often they were seen.
    pub fn all(&self) -> Vec<(Pair, u64)> {
        let mut all: Vec<_> = self
            .pairs
            .pin()
            .iter()
            .map(|(pair, count)| (pair.clone(), count.load(Relaxed)))
            .collect();
        all.sort_by(|(a, _), (b, _)| (&a.destination, &a.source).cmp(&(&b.destination, &b.source)));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mesh::{Gateway, GatewayTarget},
        testing,
    };

    #[test]
    fn who_comes_from_somewhere_else_than_the_waypoint_has_gone_around_it() {
        let mesh = Mesh::new("");
        let gateway = Some(Gateway {
            target: GatewayTarget::Service("app/wp".into()),
            port: 15008,
        });
        let mut service = testing::service("app/web", &["10.0.0.1"], &[(80, 8080)]);
        service.waypoint = gateway.clone();
        mesh.insert_service(service);
        mesh.insert_service(testing::service("app/plain", &["10.0.0.2"], &[(80, 9090)]));
        let mut waypoint = testing::workload("waypoint", &["10.1.0.9"]);
        waypoint.services = Box::new([("app/wp".into(), Arc::from([(15008, 15008)]))]);
        mesh.insert_workload(waypoint.clone());
        let mut web = testing::workload("web", &["10.1.0.1"]);
        web.services = Box::new([
            ("app/web".into(), Arc::from([(80, 8080)])),
            ("app/plain".into(), Arc::from([(80, 9090)])),
        ]);
        let client = testing::workload("client", &["10.1.0.5"]);
        let around = |web: &Workload, port, source| went_around(&mesh, web, port, source).map(|key| key.to_string());
        assert_eq!(around(&web, 8080, Some(&client)).as_deref(), Some("app/web"));
        assert_eq!(around(&web, 8080, None).as_deref(), Some("app/web"));
        assert_eq!(around(&web, 8080, Some(&waypoint)), None);
        assert_eq!(around(&web, 9090, Some(&client)), None);
        assert_eq!(around(&web, 7070, Some(&client)), None);
        web.waypoint = gateway;
        assert_eq!(around(&web, 7070, Some(&client)).as_deref(), Some(&**web.uid()));
        assert_eq!(around(&web, 7070, Some(&waypoint)), None);
        let seen = Bypasses::default();
        for _ in 0..3 {
            seen.seen(client.identity(), "app/web".into());
        }
        assert_eq!(seen.all()[0].1, 3);
    }
}
