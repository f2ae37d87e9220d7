//! How endpoints are chosen (contract xds §5.3): `lb_policy` with its settings, and the policies by configuration that replace it.

use cairn_policy::balance::{DEFAULT_TABLE, HashFunction, MOST_ENTRIES, MOST_POINTS, RingSize, SlowStart, is_prime};
use cairn_proto::envoy::{
    config::{
        cluster::v3::{
            LoadBalancingPolicy,
            cluster::{
                CommonLbConfig, LbConfig, LbPolicy as EnvoyPolicy, LeastRequestLbConfig, MaglevLbConfig, OriginalDstLbConfig,
                RingHashLbConfig, RoundRobinLbConfig, SlowStartConfig as LegacySlowStart,
                common_lb_config::{ConsistentHashingLbConfig as LegacyHashing, LocalityConfigSpecifier, ZoneAwareLbConfig},
                ring_hash_lb_config::HashFunction as LegacyFunction,
            },
        },
        core::v3::RuntimeDouble,
    },
    extensions::load_balancing_policies::{
        cluster_provided::v3::ClusterProvided,
        common::v3::{
            ConsistentHashingLbConfig, LocalityLbConfig, SlowStartConfig,
            locality_lb_config::{LocalityConfigSpecifier as TypedLocality, ZoneAwareLbConfig as TypedZoneAware},
        },
        least_request::v3::{LeastRequest as TypedLeast, least_request::SelectionMethod},
        maglev::v3::Maglev,
        random::v3::Random,
        ring_hash::v3::{RingHash, ring_hash::HashFunction as TypedFunction},
        round_robin::v3::RoundRobin,
        wrr_locality::v3::WrrLocality,
    },
    r#type::v3::Percent,
};
use prost_types::Any;

use super::{
    any::{Unknown, type_name, unpack},
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    route_action,
    value::duration,
};
use crate::upstream::{ClusterSettings, Discovery, Hashing, LbPolicy, LeastRequest, OriginalDestination};

/// Fewest points of a ring, where configuration says nothing.
const MINIMUM_RING: u64 = 1024;
/// Part of its weight that a new endpoint has at least, in percent.
const LEAST_WARMTH: f64 = 10.0;
/// Policies inside of policies are followed so deep.
const DEPTH: usize = 4;
/// Where the typed policies are.
const PACKAGE: &str = "envoy.extensions.load_balancing_policies.";

/// What a cluster says of balancing, old style.
pub(crate) fn legacy(
    policy: i32,
    config: Option<LbConfig>,
    common: Option<CommonLbConfig>,
    settings: &mut ClusterSettings,
    notes: &mut Notes,
) -> Result<(), Malformed> {
    notes.within("common_lb_config", |notes| common_balancing(common, settings, notes))?;
    let policy = EnvoyPolicy::try_from(policy).map_err(|_| notes.malformed("lb_policy", format!("{policy} is not known")))?;
    let mut least = LeastRequest::default();
    let mut round_robin = None;
    let mut ring = RingSize::default();
    let mut table_size = DEFAULT_TABLE;
    match config {
        None => {}
        Some(LbConfig::LeastRequestLbConfig(config)) => {
            let LeastRequestLbConfig {
                choice_count,
                active_request_bias,
                slow_start_config,
            } = config;
            notes.within("least_request_lb_config", |notes| {
                least = least_request(
                    choice_count,
                    active_request_bias,
                    slow_start_of(slow_start_config, notes)?,
                    notes,
                )?;
                Ok(())
            })?;
        }
        Some(LbConfig::RoundRobinLbConfig(config)) => {
            let RoundRobinLbConfig { slow_start_config } = config;
            round_robin = notes.within("round_robin_lb_config", |notes| slow_start_of(slow_start_config, notes))?;
        }
        Some(LbConfig::RingHashLbConfig(config)) => {
            let RingHashLbConfig {
                minimum_ring_size,
                hash_function,
                maximum_ring_size,
            } = config;
            ring = notes.within("ring_hash_lb_config", |notes| {
                let function = match LegacyFunction::try_from(hash_function) {
                    Ok(LegacyFunction::XxHash) => HashFunction::XxHash,
                    Ok(LegacyFunction::MurmurHash2) => HashFunction::Murmur2,
                    Err(_) => return Err(notes.malformed("hash_function", format!("{hash_function} is not known"))),
                };
                ring_size(minimum_ring_size, maximum_ring_size, function, notes)
            })?;
        }
        Some(LbConfig::MaglevLbConfig(config)) => {
            let MaglevLbConfig { table_size: size } = config;
            table_size = notes.within("maglev_lb_config", |notes| maglev_size(size, notes))?;
        }
        Some(LbConfig::OriginalDstLbConfig(config)) => {
            settings.discovery = notes.within("original_dst_lb_config", |notes| original_destination(config, notes))?;
        }
    }
    settings.lb = match policy {
        EnvoyPolicy::RoundRobin => LbPolicy::RoundRobin { slow_start: round_robin },
        EnvoyPolicy::LeastRequest => LbPolicy::LeastRequest(least),
        EnvoyPolicy::Random => LbPolicy::Random,
        EnvoyPolicy::RingHash => LbPolicy::RingHash(ring),
        EnvoyPolicy::Maglev => LbPolicy::Maglev { table_size },
        EnvoyPolicy::ClusterProvided => LbPolicy::ClusterProvided,
        // The policy stands in `load_balancing_policy`, which comes next.
        EnvoyPolicy::LoadBalancingPolicyConfig => LbPolicy::RoundRobin { slow_start: None },
    };
    Ok(())
}

/// Policies by configuration: the first that is known counts, and replaces what `lb_policy` says.
pub(crate) fn typed(policy: LoadBalancingPolicy, settings: &mut ClusterSettings, notes: &mut Notes) -> Result<(), Malformed> {
    settings.locality_weighted = false;
    settings.fail_on_panic = false;
    settings.hashing = Hashing::default();
    first_known(policy, settings, notes, DEPTH)
}

fn first_known(
    policy: LoadBalancingPolicy,
    settings: &mut ClusterSettings,
    notes: &mut Notes,
    depth: usize,
) -> Result<(), Malformed> {
    let LoadBalancingPolicy { policies } = policy;
    let mut unknown = Vec::new();
    for (index, policy) in policies.into_iter().enumerate() {
        let Some(extension) = policy.typed_extension_config else {
            continue;
        };
        let Some(any) = extension.typed_config else {
            return Err(notes.malformed("policies", format!("{} has no configuration", extension.name)));
        };
        if notes.at("policies", index, |notes| known(&any, settings, notes, depth))? {
            return Ok(());
        }
        unknown.push(type_name(&any.type_url).to_owned());
    }
    // Envoy rejects a cluster none of whose policies it knows.
    notes.refuse("policies", format!("none is supported: {}", unknown.join(", ")));
    Ok(())
}

fn known(any: &Any, settings: &mut ClusterSettings, notes: &mut Notes, depth: usize) -> Result<bool, Malformed> {
    let Some(name) = type_name(&any.type_url).strip_prefix(PACKAGE) else {
        return Ok(false);
    };
    settings.lb = match name {
        "round_robin.v3.RoundRobin" => {
            let RoundRobin {
                slow_start_config,
                locality_lb_config,
            } = unpack(any, Unknown::Refuses, notes)?;
            locality(locality_lb_config, settings, notes);
            LbPolicy::RoundRobin {
                slow_start: typed_slow_start(slow_start_config, notes)?,
            }
        }
        "least_request.v3.LeastRequest" => {
            let TypedLeast {
                choice_count,
                active_request_bias,
                slow_start_config,
                locality_lb_config,
                enable_full_scan,
                selection_method,
            } = unpack(any, Unknown::Refuses, notes)?;
            locality(locality_lb_config, settings, notes);
            let slow_start = typed_slow_start(slow_start_config, notes)?;
            let mut least = least_request(choice_count, active_request_bias, slow_start, notes)?;
            let full = SelectionMethod::try_from(selection_method)
                .map_err(|_| notes.malformed("selection_method", format!("{selection_method} is not known")))?;
            if full == SelectionMethod::FullScan || enable_full_scan == Some(true) {
                least.choices = None;
            }
            LbPolicy::LeastRequest(least)
        }
        "random.v3.Random" => {
            let Random { locality_lb_config } = unpack(any, Unknown::Refuses, notes)?;
            locality(locality_lb_config, settings, notes);
            LbPolicy::Random
        }
        "ring_hash.v3.RingHash" => {
            #[allow(deprecated, reason = "configurations still have them")]
            let RingHash {
                hash_function,
                minimum_ring_size,
                maximum_ring_size,
                use_hostname_for_hashing,
                hash_balance_factor,
                consistent_hashing_lb_config,
                locality_weighted_lb_config,
            } = unpack(any, Unknown::Refuses, notes)?;
            let function = match TypedFunction::try_from(hash_function) {
                Ok(TypedFunction::DefaultHash | TypedFunction::XxHash) => HashFunction::XxHash,
                Ok(TypedFunction::MurmurHash2) => HashFunction::Murmur2,
                Err(_) => return Err(notes.malformed("hash_function", format!("{hash_function} is not known"))),
            };
            settings.locality_weighted = locality_weighted_lb_config.is_some();
            settings.hashing = Hashing {
                by_hostname: use_hostname_for_hashing,
                balance_factor: hash_balance_factor.unwrap_or(0),
            };
            consistent_hashing(consistent_hashing_lb_config, settings, notes)?;
            LbPolicy::RingHash(ring_size(minimum_ring_size, maximum_ring_size, function, notes)?)
        }
        "maglev.v3.Maglev" => {
            let Maglev {
                table_size,
                consistent_hashing_lb_config,
                locality_weighted_lb_config,
            } = unpack(any, Unknown::Refuses, notes)?;
            settings.locality_weighted = locality_weighted_lb_config.is_some();
            consistent_hashing(consistent_hashing_lb_config, settings, notes)?;
            LbPolicy::Maglev {
                table_size: maglev_size(table_size, notes)?,
            }
        }
        "cluster_provided.v3.ClusterProvided" => {
            let ClusterProvided {} = unpack(any, Unknown::Refuses, notes)?;
            LbPolicy::ClusterProvided
        }
        "wrr_locality.v3.WrrLocality" if depth > 0 => {
            let WrrLocality { endpoint_picking_policy } = unpack(any, Unknown::Refuses, notes)?;
            let inner = endpoint_picking_policy.ok_or_else(|| notes.malformed("endpoint_picking_policy", "is missing"))?;
            notes.within("endpoint_picking_policy", |notes| {
                first_known(inner, settings, notes, depth - 1)
            })?;
            settings.locality_weighted = true;
            return Ok(true);
        }
        _ => return Ok(false),
    };
    Ok(true)
}

fn locality(config: Option<LocalityLbConfig>, settings: &mut ClusterSettings, notes: &mut Notes) {
    match config.and_then(|config| config.locality_config_specifier) {
        None => {}
        Some(TypedLocality::LocalityWeightedLbConfig(_)) => settings.locality_weighted = true,
        Some(TypedLocality::ZoneAwareLbConfig(config)) => {
            let TypedZoneAware {
                routing_enabled,
                min_cluster_size,
                fail_traffic_on_panic,
                force_locality_direct_routing,
                force_local_zone,
                locality_basis,
            } = config;
            // Zone-aware routing needs a local cluster, which waypoints have none of.
            unneeded!(routing_enabled, min_cluster_size, locality_basis);
            notes.within("zone_aware_lb_config", |notes| {
                ignore_set!(notes, force_locality_direct_routing, force_local_zone)
            });
            settings.fail_on_panic = fail_traffic_on_panic;
        }
    }
}

fn consistent_hashing(
    config: Option<ConsistentHashingLbConfig>,
    settings: &mut ClusterSettings,
    notes: &mut Notes,
) -> Result<(), Malformed> {
    let Some(ConsistentHashingLbConfig {
        use_hostname_for_hashing,
        hash_balance_factor,
        hash_policy,
    }) = config
    else {
        return Ok(());
    };
    settings.hashing = Hashing {
        by_hostname: use_hostname_for_hashing,
        balance_factor: balance_factor(hash_balance_factor, notes)?,
    };
    notes.within("consistent_hashing_lb_config", |notes| {
        for (index, policy) in hash_policy.into_iter().enumerate() {
            let compiled = notes.at("hash_policy", index, |notes| route_action::hash(policy, notes))?;
            settings.hash_policies.extend(compiled);
        }
        Ok(())
    })
}

fn balance_factor(factor: Option<u32>, notes: &Notes) -> Result<u32, Malformed> {
    match factor {
        Some(factor) if factor < 100 => Err(notes.malformed("hash_balance_factor", format!("{factor} is less than 100"))),
        factor => Ok(factor.unwrap_or(0)),
    }
}

fn least_request(
    choices: Option<u32>,
    bias: Option<RuntimeDouble>,
    slow_start: Option<SlowStart>,
    notes: &Notes,
) -> Result<LeastRequest, Malformed> {
    let defaults = LeastRequest::default();
    let bias = bias.map_or(defaults.bias, |bias| bias.default_value);
    if bias.is_nan() || bias < 0.0 {
        return Err(notes.malformed("active_request_bias", format!("{bias} is less than 0")));
    }
    Ok(LeastRequest {
        choices: choices.map(|choices| choices.max(2)).or(defaults.choices),
        bias,
        slow_start,
    })
}

fn slow_start_of(config: Option<LegacySlowStart>, notes: &Notes) -> Result<Option<SlowStart>, Malformed> {
    let Some(LegacySlowStart {
        slow_start_window,
        aggression,
        min_weight_percent,
    }) = config
    else {
        return Ok(None);
    };
    slow_start(slow_start_window, aggression, min_weight_percent, notes)
}

fn typed_slow_start(config: Option<SlowStartConfig>, notes: &Notes) -> Result<Option<SlowStart>, Malformed> {
    let Some(SlowStartConfig {
        slow_start_window,
        aggression,
        min_weight_percent,
    }) = config
    else {
        return Ok(None);
    };
    slow_start(slow_start_window, aggression, min_weight_percent, notes)
}

fn slow_start(
    window: Option<prost_types::Duration>,
    aggression: Option<RuntimeDouble>,
    least: Option<Percent>,
    notes: &Notes,
) -> Result<Option<SlowStart>, Malformed> {
    let Some(window) = window else { return Ok(None) };
    let window = duration("slow_start_config.slow_start_window", window, notes)?;
    let aggression = aggression.map_or(1.0, |aggression| aggression.default_value);
    let least = least.map_or(LEAST_WARMTH, |percent| percent.value);
    Ok((!window.is_zero()).then(|| SlowStart {
        window,
        // Envoy takes what is no number, or not positive, for 1.
        aggression: if aggression > 0.0 { aggression } else { 1.0 },
        least: least.clamp(0.0, 100.0) / 100.0,
    }))
}

fn ring_size(minimum: Option<u64>, maximum: Option<u64>, function: HashFunction, notes: &Notes) -> Result<RingSize, Malformed> {
    let (minimum, maximum) = (minimum.unwrap_or(MINIMUM_RING), maximum.unwrap_or(MOST_POINTS));
    for (field, size) in [("minimum_ring_size", minimum), ("maximum_ring_size", maximum)] {
        if size > MOST_POINTS {
            return Err(notes.malformed(field, format!("{size} is more than {MOST_POINTS}")));
        }
    }
    if minimum > maximum {
        return Err(notes.malformed(
            "minimum_ring_size",
            format!("{minimum} is more than maximum_ring_size, {maximum}"),
        ));
    }
    Ok(RingSize {
        minimum,
        maximum,
        function,
    })
}

fn maglev_size(size: Option<u64>, notes: &Notes) -> Result<u64, Malformed> {
    let size = size.unwrap_or(DEFAULT_TABLE);
    if size > MOST_ENTRIES {
        return Err(notes.malformed("table_size", format!("{size} is more than {MOST_ENTRIES}")));
    }
    if !is_prime(size) {
        return Err(notes.malformed("table_size", format!("{size} is no prime number")));
    }
    Ok(size)
}

fn original_destination(config: OriginalDstLbConfig, notes: &mut Notes) -> Result<Discovery, Malformed> {
    let OriginalDstLbConfig {
        use_http_header,
        http_header_name,
        upstream_port_override,
        metadata_key,
    } = config;
    refuse_set!(notes, use_http_header, http_header_name);
    if let Some(key) = metadata_key {
        // `waypoint` of the endpoint's metadata, which the endpoint's target already holds (contract xds §5.8).
        let path: Vec<_> = key.path.iter().map(|segment| format!("{segment:?}")).collect();
        if key.key != "envoy.filters.listener.original_dst" || path.len() != 1 {
            notes.refuse("metadata_key", format!("`{}` is not known", key.key));
        }
    }
    let port_override = match upstream_port_override {
        None => None,
        Some(port) => match u16::try_from(port) {
            Ok(port) => Some(port),
            Err(_) => return Err(notes.malformed("upstream_port_override", format!("{port} is no port"))),
        },
    };
    Ok(Discovery::OriginalDestination(OriginalDestination { port_override }))
}

fn common_balancing(config: Option<CommonLbConfig>, settings: &mut ClusterSettings, notes: &mut Notes) -> Result<(), Malformed> {
    let Some(CommonLbConfig {
        healthy_panic_threshold,
        update_merge_window,
        ignore_new_hosts_until_first_hc,
        close_connections_on_host_set_change,
        consistent_hashing_lb_config,
        override_host_status,
        locality_config_specifier,
    }) = config
    else {
        return Ok(());
    };
    unneeded!(update_merge_window, ignore_new_hosts_until_first_hc);
    ignore_set!(notes, close_connections_on_host_set_change, override_host_status);
    if let Some(LegacyHashing {
        use_hostname_for_hashing,
        hash_balance_factor,
    }) = consistent_hashing_lb_config
    {
        settings.hashing = Hashing {
            by_hostname: use_hostname_for_hashing,
            balance_factor: balance_factor(hash_balance_factor, notes)?,
        };
    }
    if let Some(percent) = healthy_panic_threshold {
        settings.panic_threshold = percent.value.clamp(0.0, 100.0);
    }
    match locality_config_specifier {
        None => {}
        Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => settings.locality_weighted = true,
        Some(LocalityConfigSpecifier::ZoneAwareLbConfig(config)) => {
            let ZoneAwareLbConfig {
                routing_enabled,
                min_cluster_size,
                fail_traffic_on_panic,
            } = config;
            // Zone-aware routing needs a local cluster, which waypoints have none of.
            unneeded!(routing_enabled, min_cluster_size);
            settings.fail_on_panic = fail_traffic_on_panic;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
