//! How a cluster chooses among its endpoints (contract xds §5.2, §5.7).

use cairn_proto::envoy::config::cluster::v3::cluster::{
    CommonLbConfig, LbConfig, LbPolicy as EnvoyLbPolicy, LeastRequestLbConfig, MaglevLbConfig, OriginalDstLbConfig,
    RingHashLbConfig, RoundRobinLbConfig, common_lb_config::LocalityConfigSpecifier,
};

use crate::{
    config::report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    upstream::{ClusterSettings, Discovery, LbPolicy, OriginalDestination},
};

/// The policy, with what its configuration says; the one of original destinations also says how those are found.
pub(super) fn policy(
    policy: i32,
    config: Option<LbConfig>,
    discovery: &mut Discovery,
    notes: &mut Notes,
) -> Result<LbPolicy, Malformed> {
    let policy = EnvoyLbPolicy::try_from(policy).map_err(|_| notes.malformed("lb_policy", format!("{policy} is not known")))?;
    let mut choices = 2;
    let mut minimum_size = 1024;
    let mut table_size = 65537;
    match config {
        None => {}
        Some(LbConfig::LeastRequestLbConfig(config)) => {
            let LeastRequestLbConfig {
                choice_count,
                active_request_bias,
                slow_start_config,
            } = config;
            notes.within("least_request_lb_config", |notes| {
                ignore_set!(notes, active_request_bias, slow_start_config)
            });
            choices = choice_count.unwrap_or(choices).max(2);
        }
        Some(LbConfig::RoundRobinLbConfig(config)) => {
            let RoundRobinLbConfig { slow_start_config } = config;
            notes.within("round_robin_lb_config", |notes| ignore_set!(notes, slow_start_config));
        }
        Some(LbConfig::RingHashLbConfig(config)) => {
            let RingHashLbConfig {
                minimum_ring_size,
                hash_function,
                maximum_ring_size,
            } = config;
            notes.within("ring_hash_lb_config", |notes| {
                ignore_set!(notes, hash_function, maximum_ring_size)
            });
            minimum_size = minimum_ring_size.unwrap_or(minimum_size);
        }
        Some(LbConfig::MaglevLbConfig(config)) => {
            let MaglevLbConfig { table_size: size } = config;
            table_size = size.unwrap_or(table_size);
        }
        Some(LbConfig::OriginalDstLbConfig(config)) => {
            let OriginalDstLbConfig {
                use_http_header,
                http_header_name,
                upstream_port_override,
                metadata_key,
            } = config;
            notes.within("original_dst_lb_config", |notes| {
                refuse_set!(notes, use_http_header, http_header_name)
            });
            if let Some(key) = metadata_key {
                // `waypoint` of the endpoint's metadata, which the endpoint's target already holds (contract xds §5.8).
                let path: Vec<_> = key.path.iter().map(|segment| format!("{segment:?}")).collect();
                if key.key != "envoy.filters.listener.original_dst" || path.len() != 1 {
                    notes.refuse("original_dst_lb_config.metadata_key", format!("`{}` is not known", key.key));
                }
            }
            let port_override = match upstream_port_override {
                None => None,
                Some(port) => match u16::try_from(port) {
                    Ok(port) => Some(port),
                    Err(_) => {
                        return Err(
                            notes.malformed("original_dst_lb_config.upstream_port_override", format!("{port} is no port"))
                        );
                    }
                },
            };
            *discovery = Discovery::OriginalDestination(OriginalDestination { port_override });
        }
    }
    const HASHED: &str = "requests are not kept to one endpoint yet";
    Ok(match policy {
        EnvoyLbPolicy::RoundRobin => LbPolicy::RoundRobin,
        EnvoyLbPolicy::LeastRequest => LbPolicy::LeastRequest { choices },
        EnvoyLbPolicy::Random => LbPolicy::Random,
        EnvoyLbPolicy::RingHash => {
            notes.ignore("lb_policy", HASHED);
            LbPolicy::RingHash { minimum_size }
        }
        EnvoyLbPolicy::Maglev => {
            notes.ignore("lb_policy", HASHED);
            LbPolicy::Maglev { table_size }
        }
        EnvoyLbPolicy::ClusterProvided => LbPolicy::ClusterProvided,
        EnvoyLbPolicy::LoadBalancingPolicyConfig => {
            notes.ignore(
                "lb_policy",
                "a policy by configuration is not supported; least request is used",
            );
            LbPolicy::LeastRequest { choices }
        }
    })
}

/// What all policies have in common.
pub(super) fn common(config: Option<CommonLbConfig>, settings: &mut ClusterSettings, notes: &mut Notes) {
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
        return;
    };
    unneeded!(update_merge_window, ignore_new_hosts_until_first_hc);
    ignore_set!(
        notes,
        close_connections_on_host_set_change,
        consistent_hashing_lb_config,
        override_host_status
    );
    if let Some(percent) = healthy_panic_threshold {
        settings.panic_threshold = percent.value.clamp(0.0, 100.0);
    }
    match locality_config_specifier {
        None => {}
        Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => settings.locality_weighted = true,
        Some(LocalityConfigSpecifier::ZoneAwareLbConfig(_)) => notes.ignore("zone_aware_lb_config", "is not supported"),
    }
}
