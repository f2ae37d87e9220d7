//! `tcp_proxy` of a chain (contract xds §2.7): where the bytes go and how long a connection may be silent.

use std::{sync::Arc, time::Duration};

use cairn_proto::envoy::{
    extensions::filters::network::tcp_proxy::v3::{
        TcpProxy,
        tcp_proxy::{ClusterSpecifier, WeightedCluster, weighted_cluster::ClusterWeight},
    },
    r#type::v3::{HashPolicy, hash_policy::PolicySpecifier},
};

use super::{
    access_log,
    chain::Context,
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    value::limit,
};
use crate::snapshot::TcpChain;

/// Envoy ends a silent connection after this unless told otherwise.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// Compiles a TCP proxy.
pub(crate) fn compile(proxy: TcpProxy, context: &mut Context, notes: &mut Notes) -> Result<TcpChain, Malformed> {
    let TcpProxy {
        stat_prefix,
        on_demand,
        metadata_match,
        idle_timeout,
        downstream_idle_timeout,
        upstream_idle_timeout,
        access_log,
        max_connect_attempts,
        backoff_options,
        hash_policy,
        tunneling_config,
        max_downstream_connection_duration,
        max_downstream_connection_duration_jitter_percentage,
        access_log_flush_interval,
        flush_access_log_on_connected,
        access_log_options,
        proxy_protocol_tlvs,
        proxy_protocol_tlv_merge_policy,
        upstream_connect_mode,
        max_early_data_bytes,
        check_drain_close,
        cluster_specifier,
    } = proxy;
    unneeded!(
        stat_prefix,
        proxy_protocol_tlv_merge_policy,
        max_early_data_bytes,
        check_drain_close
    );
    refuse_set!(notes, on_demand, metadata_match, tunneling_config, upstream_connect_mode);
    ignore_set!(
        notes,
        downstream_idle_timeout,
        upstream_idle_timeout,
        max_connect_attempts,
        backoff_options,
        max_downstream_connection_duration_jitter_percentage,
        access_log_flush_interval,
        flush_access_log_on_connected,
        access_log_options,
        proxy_protocol_tlvs,
    );
    let targets: Vec<(Arc<str>, u32)> = match cluster_specifier {
        None => return Err(notes.malformed("cluster", "is missing")),
        Some(ClusterSpecifier::Cluster(name)) => vec![(name.into(), 1)],
        Some(ClusterSpecifier::WeightedClusters(WeightedCluster { clusters })) => {
            let mut targets = Vec::with_capacity(clusters.len());
            for ClusterWeight {
                name,
                weight,
                metadata_match,
            } in clusters
            {
                refuse_set!(notes, metadata_match);
                if weight == 0 {
                    return Err(notes.malformed("weighted_clusters", format!("cluster {name} has weight 0")));
                }
                targets.push((name.into(), weight));
            }
            targets
        }
    };
    if targets.is_empty() {
        return Err(notes.malformed("weighted_clusters", "is empty"));
    }
    context.clusters.extend(targets.iter().map(|(name, _)| name.clone()));
    let mut hash_source_ip = false;
    for HashPolicy { policy_specifier } in hash_policy {
        match policy_specifier {
            Some(PolicySpecifier::SourceIp(_)) => hash_source_ip = true,
            Some(PolicySpecifier::FilterState(_)) => notes.ignore("hash_policy", "filter state is not supported"),
            None => return Err(notes.malformed("hash_policy", "is empty")),
        }
    }
    Ok(TcpChain {
        total_weight: targets.iter().map(|(_, weight)| u64::from(*weight)).sum(),
        targets,
        idle_timeout: limit("idle_timeout", idle_timeout, Some(IDLE_TIMEOUT), notes)?,
        max_duration: limit(
            "max_downstream_connection_duration",
            max_downstream_connection_duration,
            None,
            notes,
        )?,
        hash_source_ip,
        access_logs: access_log::compile(access_log, &context.outputs, notes)?,
        metrics: context.metrics,
        metric_rules: std::mem::take(&mut context.metric_rules).into(),
        rbac: std::mem::take(&mut context.rbac).into_iter().collect(),
        authorizers: std::mem::take(&mut context.authorizers),
        server_name: context.server_name,
        limits: std::mem::take(&mut context.limits),
    })
}
