//! Who is chosen, in thousands of picks.

use std::{collections::BTreeMap, time::Duration};

use cairn_policy::balance::RingSize;

use super::*;
use crate::upstream::{
    ClusterSettings, Hashing, Health,
    fixtures::{cluster, endpoint, equal, locality},
};

const PICKS: usize = 20_000;

/// How often each endpoint is chosen of [`PICKS`], by the last number of its address.
fn spread(cluster: &Cluster) -> BTreeMap<u8, usize> {
    let mut random = fastrand::Rng::with_seed(11);
    let mut taken = BTreeMap::new();
    for _ in 0..PICKS {
        if let Some(endpoint) = Picking::new(cluster).next(random.u64(..), Avoid::default()) {
            *taken.entry(number(&endpoint)).or_default() += 1;
        }
    }
    taken
}

fn number(endpoint: &Endpoint) -> u8 {
    match endpoint.target.address().map(|address| address.ip()) {
        Some(std::net::IpAddr::V4(ip)) => ip.octets()[3],
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_shares(cluster: &Cluster, shares: &[(u8, f64)]) {
    let taken = spread(cluster);
    for (number, share) in shares {
        let found = taken.get(number).copied().unwrap_or(0) as f64 / PICKS as f64;
        assert!(
            (found - share).abs() < 0.015,
            "endpoint {number}: {found}, not {share}: {taken:?}"
        );
    }
    let known: f64 = shares.iter().map(|(_, share)| share).sum();
    assert!(
        (known - 1.0).abs() < 1e-6 && taken.len() == shares.iter().filter(|(_, share)| *share > 0.0).count(),
        "{taken:?}"
    );
}

fn of(lb: LbPolicy) -> ClusterSettings {
    ClusterSettings {
        lb,
        ..ClusterSettings::default()
    }
}

fn least() -> LbPolicy {
    LbPolicy::LeastRequest(LeastRequest::default())
}

const TURNS: LbPolicy = LbPolicy::RoundRobin { slow_start: None };

fn weighted(weights: &[u32]) -> Vec<Endpoint> {
    let weigh = |(number, weight): (usize, &u32)| Endpoint {
        weight: *weight,
        ..endpoint(number)
    };
    weights.iter().enumerate().map(weigh).collect()
}

#[test]
fn weights_share_requests_but_at_random_they_do_not() {
    for (lb, shares) in [(TURNS, [0.75, 0.25]), (least(), [0.75, 0.25]), (LbPolicy::Random, [0.5, 0.5])] {
        let cluster = cluster(vec![locality(0, "a", 1, weighted(&[3, 1]))], of(lb));
        assert_shares(&cluster, &[(0, shares[0]), (1, shares[1])]);
    }
}

#[test]
fn the_less_busy_get_more_by_weight_and_bias() {
    for (bias, weights, shares) in [
        // Three requests under way at the first: a quarter of its weight.
        (1.0, [2, 1], [1.0 / 3.0, 2.0 / 3.0]),
        (0.0, [2, 1], [2.0 / 3.0, 1.0 / 3.0]),
        (2.0, [2, 1], [1.0 / 9.0, 8.0 / 9.0]),
    ] {
        let least = LbPolicy::LeastRequest(LeastRequest {
            bias,
            ..LeastRequest::default()
        });
        let endpoints = weighted(&weights);
        endpoints[0].state.active.store(3, Relaxed);
        let cluster = cluster(vec![locality(0, "a", 1, endpoints)], of(least));
        assert_shares(&cluster, &[(0, shares[0]), (1, shares[1])]);
    }
}

#[test]
fn of_equals_the_less_busy_of_two_or_of_all() {
    let choose = |choices| {
        let least = LbPolicy::LeastRequest(LeastRequest {
            choices,
            ..LeastRequest::default()
        });
        let cluster = equal(3, of(least));
        for (at, endpoint) in cluster.state.endpoints.load().iter().enumerate() {
            endpoint.state.active.store(u32::try_from(at).unwrap(), Relaxed);
        }
        cluster
    };
    assert_shares(&choose(None), &[(0, 1.0)]);
    // With two looked at: the first unless both others are drawn, the last only when drawn twice.
    assert_shares(&choose(Some(2)), &[(0, 5.0 / 9.0), (1, 3.0 / 9.0), (2, 1.0 / 9.0)]);
}

#[tokio::test(start_paused = true)]
async fn a_new_endpoint_warms_up() {
    let slow = Some(SlowStart {
        window: Duration::from_secs(60),
        aggression: 1.0,
        least: 0.1,
    });
    for lb in [
        LbPolicy::RoundRobin { slow_start: slow },
        LbPolicy::LeastRequest(LeastRequest {
            slow_start: slow,
            ..LeastRequest::default()
        }),
    ] {
        let old = endpoint(0);
        tokio::time::advance(Duration::from_secs(3600)).await;
        let cluster = cluster(vec![locality(0, "a", 1, vec![old, endpoint(1)])], of(lb));
        assert_shares(&cluster, &[(0, 1.0 / 1.1), (1, 0.1 / 1.1)]);
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_shares(&cluster, &[(0, 1.0 / 1.5), (1, 0.5 / 1.5)]);
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_shares(&cluster, &[(0, 0.5), (1, 0.5)]);
    }
}

#[tokio::test(start_paused = true)]
async fn endpoints_of_the_same_age_take_turns() {
    let slow = Some(SlowStart {
        window: Duration::from_secs(60),
        aggression: 1.0,
        least: 0.1,
    });
    let cluster = equal(2, of(LbPolicy::RoundRobin { slow_start: slow }));
    for age in [0, 5, 50] {
        tokio::time::advance(Duration::from_secs(age)).await;
        let picks: Vec<u8> = (0..20)
            .map(|_| number(&Picking::new(&cluster).next(fastrand::u64(..), Avoid::default()).unwrap()))
            .collect();
        assert!(picks.windows(2).all(|pair| pair[0] != pair[1]), "{age}: {picks:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_endpoint_is_spared_where_latency_decides() {
    for weights in [[1, 1], [2, 1]] {
        let cluster = cluster(vec![locality(0, "a", 1, weighted(&weights))], of(least()));
        let endpoints: Vec<_> = cluster.state.endpoints.load().iter().cloned().collect();
        endpoints[0].state.latency.observe(Duration::from_millis(500), clock::now());
        endpoints[1].state.latency.observe(Duration::from_millis(5), clock::now());
        let slow = |by_latency: bool| {
            let mut random = fastrand::Rng::with_seed(5);
            let mut pick = || {
                Picking::new(&cluster)
                    .by_latency(by_latency)
                    .next(random.u64(..), Avoid::default())
                    .unwrap()
            };
            (0..1000).filter(|_| number(&pick()) == 0).count()
        };
        assert!(slow(false) > 400, "{weights:?}: {}", slow(false));
        // Of two chosen at random it is both in a quarter of the cases.
        assert!(slow(true) < 300, "{weights:?}: {}", slow(true));
        tokio::time::advance(Duration::from_secs(120)).await;
        assert!(slow(true) > 400, "it is tried again: {}", slow(true));
    }
}

#[test]
fn localities_share_by_weight_and_lose_it_with_their_endpoints() {
    let settings = ClusterSettings {
        locality_weighted: true,
        ..of(least())
    };
    let groups = |sick: bool| {
        let mut first = vec![endpoint(0), endpoint(1)];
        if sick {
            first[1].health = Health::Unhealthy;
        }
        vec![
            locality(0, "a", 70, first),
            locality(0, "b", 30, vec![endpoint(2)]),
            locality(0, "c", 0, vec![endpoint(3)]),
        ]
    };
    assert_shares(&cluster(groups(false), settings.clone()), &[(0, 0.35), (1, 0.35), (2, 0.3)]);
    // Half of the endpoints count for 70 %: 49 to 30.
    assert_shares(&cluster(groups(true), settings), &[(0, 49.0 / 79.0), (2, 30.0 / 79.0)]);
}

#[test]
fn failing_endpoints_hand_over_to_the_next_priority() {
    let health = |threshold, sick: usize| {
        let settings = ClusterSettings {
            panic_threshold: threshold,
            ..of(least())
        };
        let mut first: Vec<Endpoint> = (0..4).map(endpoint).collect();
        for endpoint in first.iter_mut().take(sick) {
            endpoint.health = Health::Unhealthy;
        }
        cluster(
            vec![locality(0, "a", 1, first), locality(1, "b", 1, vec![endpoint(9)])],
            settings,
        )
    };
    // Three of four count for 105 %.
    assert_shares(&health(0.0, 1), &[(1, 1.0 / 3.0), (2, 1.0 / 3.0), (3, 1.0 / 3.0)]);
    assert_shares(&health(0.0, 2), &[(2, 0.35), (3, 0.35), (9, 0.3)]);
    assert_shares(&health(0.0, 4), &[(9, 1.0)]);
}

#[test]
fn in_panic_all_are_used_but_those_that_leave_or_none_when_that_is_asked_for() {
    let sick = |fail_on_panic, threshold| {
        let settings = ClusterSettings {
            panic_threshold: threshold,
            fail_on_panic,
            ..of(least())
        };
        let mut endpoints: Vec<Endpoint> = (0..4).map(endpoint).collect();
        endpoints[1].health = Health::Unhealthy;
        endpoints[2].health = Health::Unhealthy;
        endpoints[3].health = Health::Draining;
        cluster(vec![locality(0, "a", 1, endpoints)], settings)
    };
    assert_shares(&sick(false, 50.0), &[(0, 1.0 / 3.0), (1, 1.0 / 3.0), (2, 1.0 / 3.0)]);
    assert_shares(&sick(false, 0.0), &[(0, 1.0)]);
    assert!(spread(&sick(true, 50.0)).is_empty());
}

#[test]
fn an_ejected_endpoint_gets_nothing_until_it_is_back() {
    let cluster = equal(3, of(TURNS));
    let settings = cairn_policy::outlier::OutlierSettings::default();
    let first = cluster.state.endpoints.load().iter().next().cloned().unwrap();
    first.state.monitor.eject(&settings, clock::now(), Duration::ZERO);
    cluster.state.reassess();
    assert_shares(&cluster, &[(1, 0.5), (2, 0.5)]);
    first.state.monitor.take_back();
    cluster.state.reassess();
    assert_shares(&cluster, &[(0, 1.0 / 3.0), (1, 1.0 / 3.0), (2, 1.0 / 3.0)]);
}

#[test]
fn a_retry_goes_elsewhere_while_there_is_an_elsewhere() {
    let ring = LbPolicy::RingHash(RingSize::default());
    for lb in [TURNS, least(), LbPolicy::Random, ring, LbPolicy::Maglev { table_size: 101 }] {
        let cluster = equal(3, of(lb));
        let avoid = Avoid {
            endpoints: true,
            priorities: None,
        };
        for lot in 0..200u64 {
            let random = lot.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut picking = Picking::new(&cluster).hashed(lb.is_hashed().then_some(random));
            let mut tried: Vec<u8> = (0..3).map(|_| number(&picking.next(random, avoid).unwrap())).collect();
            assert!(picking.next(random, avoid).is_some());
            tried.sort_unstable();
            assert_eq!(tried, [0, 1, 2], "{lb:?} {random}");
        }
    }
}

#[test]
fn a_retry_may_leave_its_priority() {
    let groups = vec![locality(0, "a", 1, vec![endpoint(0)]), locality(1, "b", 1, vec![endpoint(1)])];
    let cluster = cluster(groups, of(least()));
    let picks = |update_frequency| {
        let avoid = Avoid {
            endpoints: false,
            priorities: Some(PreviousPriorities { update_frequency }),
        };
        let mut picking = Picking::new(&cluster);
        let picks: Vec<u8> = (0..4).map(|_| number(&picking.next(7, avoid).unwrap())).collect();
        picks
    };
    assert_eq!(picks(1), [0, 1, 0, 0]);
    assert_eq!(picks(2), [0, 0, 1, 1]);
}

#[test]
fn the_same_hash_meets_the_same_endpoint_and_its_load_is_bounded() {
    for factor in [0, 150] {
        let settings = ClusterSettings {
            hashing: Hashing {
                by_hostname: false,
                balance_factor: factor,
            },
            ..of(LbPolicy::Maglev { table_size: 65_537 })
        };
        let cluster = equal(10, settings);
        let pick = |hash| {
            Picking::new(&cluster)
                .hashed(Some(hash))
                .next(fastrand::u64(..), Avoid::default())
                .unwrap()
        };
        let first = pick(42);
        assert!((0..50).all(|_| Arc::ptr_eq(&pick(42), &first)));
        first.state.active.store(100, Relaxed);
        assert_eq!(Arc::ptr_eq(&pick(42), &first), factor == 0);
        assert!(
            (0..100)
                .map(|hash| number(&pick(hash)))
                .collect::<std::collections::BTreeSet<_>>()
                .len()
                > 5
        );
    }
}

#[test]
fn keys_and_host_names_decide_places_where_they_are_told() {
    let named = |by_hostname, hash_key: Option<&str>| {
        let endpoints = (0..6)
            .map(|at| Endpoint {
                hostname: Some((90 + at).to_string().into()),
                hash_key: hash_key.map(|key| format!("{key}{}", 90 + at).into()),
                ..endpoint(at)
            })
            .collect();
        let settings = ClusterSettings {
            hashing: Hashing {
                by_hostname,
                balance_factor: 0,
            },
            ..of(LbPolicy::Maglev { table_size: 7 })
        };
        let cluster = cluster(vec![locality(0, "a", 1, endpoints)], settings);
        let place = |hash| number(&Picking::new(&cluster).hashed(Some(hash)).next(0, Avoid::default()).unwrap());
        (0..7).map(place).collect::<Vec<_>>()
    };
    // Envoy's own tests: `MaglevLoadBalancerTest.BasicWithHostName` and `BasicWithMetadataHashKey`.
    assert_eq!(named(true, None), [2, 5, 0, 3, 4, 1, 0]);
    assert_eq!(named(false, Some("")), named(false, Some("")));
    assert_eq!(named(false, Some("127.0.0.1:")), [2, 4, 0, 1, 5, 0, 3]);
}
