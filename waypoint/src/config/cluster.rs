//! Clusters (contract xds §5.1–§5.9): settings, the service that they stand for, and endpoints that are written in them.
//!
//! A cluster with something that can decide and that we cannot do is kept, with transport terms that refuse its requests. What only
//! changes which endpoint is preferred (outlier ejection, warm-up, retry budgets) is left out and listed.

use std::{hash::BuildHasher as _, sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_exchange::{ClusterFacts, Service};
use cairn_proto::envoy::{
    config::{
        cluster::v3::{
            CircuitBreakers, Cluster as EnvoyCluster, UpstreamConnectionOptions,
            circuit_breakers::Thresholds,
            cluster::{
                ClusterDiscoveryType, CommonLbConfig, CustomClusterType, DiscoveryType, EdsClusterConfig, LbConfig,
                LbPolicy as EnvoyLbPolicy, LeastRequestLbConfig, MaglevLbConfig, OriginalDstLbConfig, RingHashLbConfig,
                RoundRobinLbConfig, common_lb_config::LocalityConfigSpecifier,
            },
        },
        core::v3::{Metadata, TcpKeepalive as EnvoyKeepalive, config_source::ConfigSourceSpecifier},
        endpoint::v3::ClusterLoadAssignment,
    },
    extensions::clusters::dynamic_forward_proxy::v3::ClusterConfig as DynamicForwardProxy,
};
use foldhash::quality::FixedState;

use super::{
    any::{Unknown, decode, text, type_name, typed, unpack},
    dns,
    endpoint::{self, Assignment},
    origination::SecretNames,
    report::{Malformed, Notes, Present as _, Unsupported, ignore_set, refuse_set, unneeded},
    transport::{self, MatchedTransports},
    upstream_http,
    value::duration,
};
use crate::upstream::{
    Breakers, ClusterSettings, Discovery, DnsTerms, LbPolicy, OriginalDestination, TcpKeepalive, TransportTerms,
};

/// Clusters that carry tunnels.
pub(crate) const TUNNEL_CLUSTERS: [&str; 3] = ["connect_originate", "inner_connect_originate", "outer_connect_originate"];

/// Where hosts that a request names without a port are, when TLS is spoken to them.
const HTTPS_PORT: u16 = 443;

/// A compiled cluster without its live state.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    /// Name and service.
    pub facts: Arc<ClusterFacts>,
    /// Settings.
    pub settings: ClusterSettings,
    /// What connections depend on.
    pub transport_hash: u64,
    /// Where its endpoints come from.
    pub endpoints: Endpoints,
    /// How single endpoints are reached, where that differs by endpoint.
    pub matched: Arc<MatchedTransports>,
    /// Secrets that it needs.
    pub secrets: SecretNames,
    /// What is not done.
    pub unsupported: Vec<Unsupported>,
}

/// Where endpoints come from.
#[derive(Clone, Debug)]
pub(crate) enum Endpoints {
    /// From EDS, under this name.
    Eds(Arc<str>),
    /// From the cluster itself.
    Fixed(Assignment),
}

/// Compiles a cluster.
pub(crate) fn compile(name: &str, bytes: &Bytes) -> Result<Compiled, Malformed> {
    let mut notes = Notes::of(name);
    let cluster: EnvoyCluster = decode(bytes, Unknown::Refuses, &mut notes)?;
    let EnvoyCluster {
        transport_socket_matches,
        transport_socket_matcher,
        name: own_name,
        alt_stat_name,
        eds_cluster_config,
        connect_timeout,
        per_connection_buffer_limit_bytes,
        per_connection_buffer_high_watermark_timeout,
        lb_policy,
        load_assignment,
        health_checks,
        max_requests_per_connection,
        circuit_breakers,
        upstream_http_protocol_options,
        common_http_protocol_options,
        http_protocol_options,
        http2_protocol_options,
        typed_extension_protocol_options,
        dns_refresh_rate,
        dns_jitter,
        dns_failure_refresh_rate,
        respect_dns_ttl,
        dns_lookup_family,
        dns_resolvers,
        use_tcp_for_dns_lookups,
        dns_resolution_config,
        typed_dns_resolver_config,
        wait_for_warm_on_init,
        outlier_detection,
        cleanup_interval,
        upstream_bind_config,
        lb_subset_config,
        common_lb_config,
        transport_socket,
        metadata,
        protocol_selection,
        upstream_connection_options,
        close_connections_on_host_health_failure,
        ignore_health_on_host_removal,
        filters,
        load_balancing_policy,
        lrs_server,
        lrs_report_endpoint_metrics,
        track_timeout_budgets,
        upstream_config,
        track_cluster_stats,
        preconnect_policy,
        connection_pool_per_downstream_connection,
        cluster_discovery_type,
        lb_config,
    } = cluster;
    // How much is buffered, and over which transport names are looked up, is ours; the rest is about statistics.
    unneeded!(
        per_connection_buffer_limit_bytes,
        per_connection_buffer_high_watermark_timeout,
        use_tcp_for_dns_lookups,
        typed_dns_resolver_config,
        wait_for_warm_on_init,
        cleanup_interval,
        lrs_server,
        lrs_report_endpoint_metrics,
        track_timeout_budgets,
        track_cluster_stats,
        // The address that connections leave from is the pod's; tunnels show who we are.
        upstream_bind_config,
        preconnect_policy,
        connection_pool_per_downstream_connection,
    );
    let notes = &mut notes;
    if own_name != name {
        return Err(notes.malformed("name", format!("`{own_name}` is not the name of the resource")));
    }
    refuse_set!(
        notes,
        transport_socket_matcher,
        upstream_http_protocol_options,
        common_http_protocol_options,
        http_protocol_options,
        http2_protocol_options,
        dns_resolvers,
        dns_resolution_config,
        lb_subset_config,
        protocol_selection,
        load_balancing_policy,
        upstream_config,
    );
    ignore_set!(
        notes,
        health_checks,
        close_connections_on_host_health_failure,
        ignore_health_on_host_removal,
        outlier_detection
    );
    check_filters(&filters, notes)?;

    let mut settings = ClusterSettings::default();
    if let Some(timeout) = connect_timeout {
        settings.connect_timeout = duration("connect_timeout", timeout, notes)?;
        if settings.connect_timeout.is_zero() {
            return Err(notes.malformed("connect_timeout", "is zero"));
        }
    }
    settings.max_requests_per_connection = max_requests_per_connection.filter(|max| *max > 0);
    settings.breakers = notes.within("circuit_breakers", |notes| breakers(circuit_breakers, notes));
    settings.tcp_keepalive = keepalive(upstream_connection_options, notes);
    settings.lb = balancing(lb_policy, lb_config, &mut settings.discovery, notes)?;
    notes.within("common_lb_config", |notes| {
        common_balancing(common_lb_config, &mut settings, notes)
    });
    upstream_http::apply(&typed_extension_protocol_options, &mut settings, notes)?;

    let asking = dns::terms(
        dns::Asked {
            family: dns_lookup_family,
            refresh: dns_refresh_rate,
            failure: dns_failure_refresh_rate,
            jitter: dns_jitter,
            respect_ttl: respect_dns_ttl,
        },
        notes,
    )?;
    let endpoints = discover(
        name,
        asking,
        cluster_discovery_type,
        eds_cluster_config,
        load_assignment,
        &mut settings,
        notes,
    )?;
    let mut secrets = SecretNames::default();
    if TUNNEL_CLUSTERS.contains(&name) {
        let terms = notes.within("transport_socket", |notes| transport::tunnel(transport_socket, notes))?;
        settings.tunnel = Some(terms);
    } else {
        settings.transport = notes.within("transport_socket", |notes| {
            transport::terms(transport_socket, &mut secrets, notes)
        })?;
    }
    if let Discovery::DynamicForwardProxy(terms) = &mut settings.discovery
        && matches!(settings.transport, TransportTerms::Tls(_))
    {
        terms.port = HTTPS_PORT;
    }
    let matched = transport::matches(transport_socket_matches, &mut secrets, notes)?;
    if let Some(reason) = notes.refusal() {
        settings.transport = TransportTerms::Unsupported(reason.into());
        settings.tunnel = None;
    }
    let facts = ClusterFacts {
        name: name.into(),
        alt_stat_name: Some(alt_stat_name).filter(|name| name.present()).map(Into::into),
        service: metadata.as_ref().and_then(service),
    };
    let transport_hash = transport_hash(&settings, &matched);
    let unsupported = std::mem::replace(notes, Notes::of(name)).into_list();
    Ok(Compiled {
        facts: Arc::new(facts),
        settings,
        transport_hash,
        endpoints,
        matched: Arc::new(matched),
        secrets,
        unsupported,
    })
}

/// The service in `metadata.istio.services`.
fn service(metadata: &Metadata) -> Option<Service> {
    use prost_types::value::Kind;
    let istio = metadata.filter_metadata.get("istio")?;
    let Kind::ListValue(list) = istio.fields.get("services")?.kind.as_ref()? else {
        return None;
    };
    let Kind::StructValue(first) = list.values.first()?.kind.as_ref()? else {
        return None;
    };
    let member = |key| text(&first.fields, key).unwrap_or_default().into();
    Some(Service {
        host: member("host"),
        name: member("name"),
        namespace: member("namespace"),
    })
}

/// Filters on upstream connections: istiod sends two that exchange metadata in ways that HBONE does not need.
fn check_filters(filters: &[cairn_proto::envoy::config::cluster::v3::Filter], notes: &mut Notes) -> Result<(), Malformed> {
    for (index, filter) in filters.iter().enumerate() {
        let cairn_proto::envoy::config::cluster::v3::Filter {
            name,
            typed_config,
            config_discovery,
        } = filter;
        notes.at("filters", index, |notes| {
            refuse_set!(notes, config_discovery);
            let Some(any) = typed_config else {
                notes.refuse("", format!("filter {name} has no configuration"));
                return Ok(());
            };
            match typed(any, notes)?.name() {
                "envoy.tcp.metadataexchange.config.MetadataExchange" => {}
                "envoy.extensions.network_filters.peer_metadata.UpstreamConfig" => {
                    notes.ignore("", "baggage of the other side is not read yet; peers are found by address");
                }
                other => notes.refuse("", format!("filter {other} is not known")),
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn breakers(breakers: Option<CircuitBreakers>, notes: &mut Notes) -> Breakers {
    let mut limits = Breakers::default();
    let Some(CircuitBreakers {
        thresholds,
        per_host_thresholds,
    }) = breakers
    else {
        return limits;
    };
    ignore_set!(notes, per_host_thresholds);
    for (index, threshold) in thresholds.into_iter().enumerate() {
        let Thresholds {
            priority,
            max_connections,
            max_pending_requests,
            max_requests,
            max_retries,
            retry_budget,
            track_remaining,
            max_connection_pools,
        } = threshold;
        notes.at("thresholds", index, |notes| {
            unneeded!(track_remaining);
            ignore_set!(notes, retry_budget, max_connection_pools);
            if priority != 0 {
                notes.ignore("priority", "high priority is not supported");
                return;
            }
            for (field, limit) in [
                ("max_connections", max_connections),
                ("max_pending_requests", max_pending_requests),
                ("max_requests", max_requests),
                ("max_retries", max_retries),
            ] {
                if limit.is_some_and(|limit| limit != u32::MAX) {
                    notes.ignore(field, "the limit is not enforced yet");
                }
            }
            limits = Breakers {
                max_connections: max_connections.unwrap_or(limits.max_connections),
                max_pending_requests: max_pending_requests.unwrap_or(limits.max_pending_requests),
                max_requests: max_requests.unwrap_or(limits.max_requests),
                max_retries: max_retries.unwrap_or(limits.max_retries),
            };
        });
    }
    limits
}

fn keepalive(options: Option<UpstreamConnectionOptions>, notes: &mut Notes) -> Option<TcpKeepalive> {
    let UpstreamConnectionOptions {
        tcp_keepalive,
        set_local_interface_name_on_upstream_connections,
        happy_eyeballs_config,
    } = options?;
    unneeded!(set_local_interface_name_on_upstream_connections);
    ignore_set!(notes, happy_eyeballs_config);
    let EnvoyKeepalive {
        keepalive_probes,
        keepalive_time,
        keepalive_interval,
    } = tcp_keepalive?;
    let seconds = |seconds: Option<u32>| seconds.map(|seconds| Duration::from_secs(seconds.into()));
    Some(TcpKeepalive {
        probes: keepalive_probes,
        time: seconds(keepalive_time),
        interval: seconds(keepalive_interval),
    })
}

fn balancing(policy: i32, config: Option<LbConfig>, discovery: &mut Discovery, notes: &mut Notes) -> Result<LbPolicy, Malformed> {
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

fn common_balancing(config: Option<CommonLbConfig>, settings: &mut ClusterSettings, notes: &mut Notes) {
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

fn discover(
    name: &str,
    asking: DnsTerms,
    discovery: Option<ClusterDiscoveryType>,
    eds: Option<EdsClusterConfig>,
    assignment: Option<ClusterLoadAssignment>,
    settings: &mut ClusterSettings,
    notes: &mut Notes,
) -> Result<Endpoints, Malformed> {
    let fixed = |names: &mut Vec<_>, notes: &mut Notes| {
        assignment.map_or(Ok(Assignment::default()), |assignment| {
            notes.within("load_assignment", |notes| {
                let compiled = endpoint::compile_assignment(assignment, notes)?;
                names.clone_from(&compiled.names);
                Ok(compiled)
            })
        })
    };
    let kind = match discovery {
        None => DiscoveryType::Static,
        Some(ClusterDiscoveryType::Type(kind)) => {
            DiscoveryType::try_from(kind).map_err(|_| notes.malformed("type", format!("{kind} is not known")))?
        }
        Some(ClusterDiscoveryType::ClusterType(CustomClusterType { name: _, typed_config })) => {
            let any = typed_config.ok_or_else(|| notes.malformed("cluster_type", "has no configuration"))?;
            if type_name(&any.type_url) == "envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig" {
                let terms = notes.within("cluster_type", |notes| {
                    let config: DynamicForwardProxy = unpack(&any, Unknown::Refuses, notes)?;
                    dns::forward_proxy(config, notes)
                })?;
                settings.discovery = Discovery::DynamicForwardProxy(terms);
            } else {
                notes.refuse("cluster_type", format!("{} is not known", type_name(&any.type_url)));
            }
            return Ok(Endpoints::Fixed(Assignment::default()));
        }
    };
    Ok(match kind {
        DiscoveryType::Static => {
            settings.discovery = Discovery::Static;
            let fixed = fixed(&mut settings.names, notes)?;
            if !settings.names.is_empty() {
                return Err(notes.malformed("load_assignment", "a cluster of the type STATIC has endpoints with names"));
            }
            Endpoints::Fixed(fixed)
        }
        DiscoveryType::StrictDns => {
            settings.discovery = Discovery::StrictDns(asking);
            Endpoints::Fixed(fixed(&mut settings.names, notes)?)
        }
        DiscoveryType::LogicalDns => {
            settings.discovery = Discovery::LogicalDns(asking);
            let fixed = fixed(&mut settings.names, notes)?;
            if settings.names.len() > 1 {
                return Err(notes.malformed("load_assignment", "a cluster of the type LOGICAL_DNS has one endpoint"));
            }
            Endpoints::Fixed(fixed)
        }
        DiscoveryType::OriginalDst => {
            if !matches!(settings.discovery, Discovery::OriginalDestination(_)) {
                settings.discovery = Discovery::OriginalDestination(OriginalDestination::default());
            }
            Endpoints::Fixed(if TUNNEL_CLUSTERS.contains(&name) {
                Assignment::default()
            } else {
                Assignment::original_destination(false)
            })
        }
        DiscoveryType::Eds => {
            let EdsClusterConfig {
                eds_config,
                service_name,
            } = eds.ok_or_else(|| notes.malformed("eds_cluster_config", "is missing"))?;
            match eds_config.and_then(|source| source.config_source_specifier) {
                Some(ConfigSourceSpecifier::Ads(_)) => {}
                _ => return Err(notes.malformed("eds_cluster_config.eds_config", "endpoints come over ADS only")),
            }
            let service: Arc<str> = if service_name.is_empty() {
                name.into()
            } else {
                service_name.into()
            };
            settings.discovery = Discovery::Eds(service.clone());
            Endpoints::Eds(service)
        }
    })
}

/// Fingerprint of what a connection to an endpoint is made with.
fn transport_hash(settings: &ClusterSettings, matched: &MatchedTransports) -> u64 {
    let parts = (
        &settings.transport,
        settings.protocol,
        &settings.tunnel,
        settings.tcp_keepalive,
        settings.preserve_header_case,
        settings.names_by_host,
        matched,
    );
    FixedState::with_seed(0).hash_one(parts)
}
