//! Clusters (contract xds §5.1–§5.9): settings, the service that they stand for, and endpoints that are written in them.
//!
//! A cluster with something that can decide and that we cannot do is kept, with transport terms that refuse its requests.

mod discovery;

use std::{hash::BuildHasher as _, sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_exchange::{ClusterFacts, Service};
use cairn_proto::envoy::config::{
    cluster::v3::{Cluster as EnvoyCluster, UpstreamConnectionOptions},
    core::v3::{Metadata, TcpKeepalive as EnvoyKeepalive},
};
use foldhash::quality::FixedState;

use super::{
    any::{Unknown, decode, text, typed},
    assignment::Assignment,
    balancing, dns, limits,
    origination::SecretNames,
    report::{Malformed, Notes, Present as _, Unsupported, ignore_set, refuse_set, unneeded},
    subsets,
    transport::{self, MatchedTransports},
    upstream_http,
    value::duration,
};
use crate::upstream::{ClusterSettings, Discovery, TcpKeepalive, TransportTerms};

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
        protocol_selection,
        upstream_config,
    );
    ignore_set!(
        notes,
        health_checks,
        close_connections_on_host_health_failure,
        ignore_health_on_host_removal,
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
    settings.breakers = notes.within("circuit_breakers", |notes| limits::breakers(circuit_breakers, notes))?;
    if let Some(detection) = outlier_detection {
        settings.outlier = Some(notes.within("outlier_detection", |notes| limits::outlier(detection, notes))?);
    }
    settings.tcp_keepalive = keepalive(upstream_connection_options, notes);
    balancing::legacy(lb_policy, lb_config, common_lb_config, &mut settings, notes)?;
    if let Some(policy) = load_balancing_policy {
        notes.within("load_balancing_policy", |notes| {
            balancing::typed(policy, &mut settings, notes)
        })?;
    }
    if let Some(config) = lb_subset_config {
        settings.subsets = notes.within("lb_subset_config", |notes| subsets::compile(config, notes))?;
    }
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
    let endpoints = discovery::endpoints(
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
