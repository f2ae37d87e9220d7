//! Policies of both styles.

use cairn_proto::envoy::{
    config::{
        cluster::v3::{
            cluster::{LbConfig, MaglevLbConfig, RingHashLbConfig},
            load_balancing_policy::Policy,
        },
        core::v3::TypedExtensionConfig,
    },
    extensions::load_balancing_policies::common::v3::{
        LocalityLbConfig, locality_lb_config::LocalityWeightedLbConfig as Weighted,
    },
};
use prost::Message;

use super::*;

fn any(name: &str, message: &impl Message) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{name}"),
        value: message.encode_to_vec(),
    }
}

fn policies(configurations: Vec<Any>) -> LoadBalancingPolicy {
    let policy = |any: Any| Policy {
        typed_extension_config: Some(TypedExtensionConfig {
            name: "x".into(),
            typed_config: Some(any),
        }),
    };
    LoadBalancingPolicy {
        policies: configurations.into_iter().map(policy).collect(),
    }
}

/// Settings, and how many things are not done.
fn compile(configurations: Vec<Any>) -> (ClusterSettings, usize) {
    let mut settings = ClusterSettings::default();
    let mut notes = Notes::of("web");
    typed(policies(configurations), &mut settings, &mut notes).unwrap();
    (settings, notes.into_list().len())
}

#[test]
fn the_first_known_policy_counts() {
    let unknown = any(
        "envoy.extensions.load_balancing_policies.subset.v3.Subset",
        &Random::default(),
    );
    let least = TypedLeast {
        choice_count: Some(4),
        active_request_bias: Some(RuntimeDouble {
            default_value: 0.5,
            ..Default::default()
        }),
        locality_lb_config: Some(LocalityLbConfig {
            locality_config_specifier: Some(TypedLocality::LocalityWeightedLbConfig(Weighted {})),
        }),
        ..Default::default()
    };
    let least = any(
        "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest",
        &least,
    );
    let (settings, left) = compile(vec![unknown.clone(), least.clone()]);
    let expected = LeastRequest {
        choices: Some(4),
        bias: 0.5,
        slow_start: None,
    };
    assert_eq!(
        (settings.lb, settings.locality_weighted, left),
        (LbPolicy::LeastRequest(expected), true, 0)
    );
    let (_, left) = compile(vec![unknown]);
    assert_eq!(left, 1, "a cluster with no policy that is known refuses");
    let wrapped = WrrLocality {
        endpoint_picking_policy: Some(policies(vec![any(
            "envoy.extensions.load_balancing_policies.random.v3.Random",
            &Random::default(),
        )])),
    };
    let (settings, left) = compile(vec![any(
        "envoy.extensions.load_balancing_policies.wrr_locality.v3.WrrLocality",
        &wrapped,
    )]);
    assert_eq!((settings.lb, settings.locality_weighted, left), (LbPolicy::Random, true, 0));
}

#[test]
fn rings_and_tables_are_read_in_both_styles() {
    let ring = RingHash {
        hash_function: TypedFunction::MurmurHash2 as i32,
        minimum_ring_size: Some(12),
        consistent_hashing_lb_config: Some(ConsistentHashingLbConfig {
            use_hostname_for_hashing: true,
            hash_balance_factor: Some(150),
            hash_policy: Vec::new(),
        }),
        ..Default::default()
    };
    let (settings, _) = compile(vec![any(
        "envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash",
        &ring,
    )]);
    let expected = RingSize {
        minimum: 12,
        maximum: MOST_POINTS,
        function: HashFunction::Murmur2,
    };
    assert_eq!(settings.lb, LbPolicy::RingHash(expected));
    assert_eq!((settings.hashing.by_hostname, settings.hashing.balance_factor), (true, 150));
    let old = |policy: EnvoyPolicy, config| {
        let mut settings = ClusterSettings::default();
        let done = legacy(policy as i32, Some(config), None, &mut settings, &mut Notes::of("web"));
        done.map(|()| settings.lb)
    };
    let maglev = |size| LbConfig::MaglevLbConfig(MaglevLbConfig { table_size: Some(size) });
    assert_eq!(
        old(EnvoyPolicy::Maglev, maglev(101)).unwrap(),
        LbPolicy::Maglev { table_size: 101 }
    );
    let ring = |minimum, maximum| {
        LbConfig::RingHashLbConfig(RingHashLbConfig {
            minimum_ring_size: Some(minimum),
            maximum_ring_size: Some(maximum),
            hash_function: 0,
        })
    };
    for (policy, config, wrong) in [
        (
            EnvoyPolicy::Maglev,
            maglev(100),
            "maglev_lb_config.table_size: 100 is no prime number",
        ),
        (
            EnvoyPolicy::RingHash,
            ring(20, 10),
            "ring_hash_lb_config.minimum_ring_size: 20 is more than",
        ),
        (
            EnvoyPolicy::RingHash,
            ring(1, u64::MAX),
            "ring_hash_lb_config.maximum_ring_size",
        ),
    ] {
        let error = old(policy, config).unwrap_err().to_string();
        assert!(error.starts_with(wrong), "{error}");
    }
}
