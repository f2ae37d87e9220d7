//! How names are looked up: of clusters by DNS, and of hosts that requests name (contract xds §3.14, §5.4).

use std::time::Duration;

use cairn_proto::envoy::{
    config::cluster::v3::cluster::{DnsLookupFamily, RefreshRate},
    extensions::{
        clusters::dynamic_forward_proxy::v3::{ClusterConfig, cluster_config::ClusterImplementationSpecifier},
        common::dynamic_forward_proxy::v3::DnsCacheConfig,
    },
};

use super::{
    report::{Malformed, Notes, ignore_set, refuse_set, unneeded},
    value::duration,
};
use crate::upstream::{
    DnsTerms,
    dns::{Cadence, Family, HostCacheTerms},
};

/// What a message says of looking names up.
pub(crate) struct Asked {
    pub family: i32,
    pub refresh: Option<prost_types::Duration>,
    pub failure: Option<RefreshRate>,
    pub jitter: Option<prost_types::Duration>,
    pub respect_ttl: bool,
}

/// Envoy's defaults for hosts that requests name.
const HOST_REFRESH: Duration = Duration::from_secs(60);
const HOST_LEAST_REFRESH: Duration = Duration::from_secs(5);
const HOST_TTL: Duration = Duration::from_secs(300);
const MAX_HOSTS: usize = 1024;
/// As many hosts a configuration may ask for.
const MOST_HOSTS: u32 = 65_536;
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
const HTTP_PORT: u16 = 80;

/// The terms of a cluster.
pub(crate) fn terms(asked: Asked, notes: &mut Notes) -> Result<DnsTerms, Malformed> {
    let Asked {
        family: wanted,
        refresh,
        failure,
        jitter,
        respect_ttl,
    } = asked;
    let mut cadence = Cadence {
        respect_ttl,
        failure: rate("dns_failure_refresh_rate", failure, notes)?,
        ..Cadence::default()
    };
    if let Some(refresh) = refresh {
        cadence.refresh = duration("dns_refresh_rate", refresh, notes)?;
    }
    if let Some(jitter) = jitter {
        cadence.jitter = duration("dns_jitter", jitter, notes)?;
    }
    Ok(DnsTerms {
        family: family(wanted, notes)?,
        cadence,
    })
}

fn family(value: i32, notes: &Notes) -> Result<Family, Malformed> {
    Ok(match DnsLookupFamily::try_from(value) {
        Ok(DnsLookupFamily::Auto) => Family::Auto,
        Ok(DnsLookupFamily::V4Only) => Family::V4Only,
        Ok(DnsLookupFamily::V6Only) => Family::V6Only,
        Ok(DnsLookupFamily::V4Preferred) => Family::V4Preferred,
        Ok(DnsLookupFamily::All) => Family::All,
        Err(_) => return Err(notes.malformed("dns_lookup_family", format!("{value} is not known"))),
    })
}

fn rate(field: &str, rate: Option<RefreshRate>, notes: &Notes) -> Result<Option<(Duration, Duration)>, Malformed> {
    let Some(RefreshRate {
        base_interval,
        max_interval,
    }) = rate
    else {
        return Ok(None);
    };
    let base = base_interval.ok_or_else(|| notes.malformed(field, "has no base_interval"))?;
    let base = duration(field, base, notes)?;
    // Envoy's default is ten times the base.
    let most = match max_interval {
        Some(most) => duration(field, most, notes)?,
        None => base.saturating_mul(10),
    };
    if most < base {
        return Err(notes.malformed(field, "max_interval is less than base_interval"));
    }
    Ok(Some((base, most)))
}

/// The terms of a cluster whose endpoints requests name.
pub(crate) fn forward_proxy(config: ClusterConfig, notes: &mut Notes) -> Result<HostCacheTerms, Malformed> {
    let ClusterConfig {
        allow_insecure_cluster_options,
        allow_coalesced_connections,
        cluster_implementation_specifier,
    } = config;
    // It permits a cluster without checks of names, which is for those to decide who write it.
    unneeded!(allow_insecure_cluster_options);
    ignore_set!(notes, allow_coalesced_connections);
    match cluster_implementation_specifier {
        Some(ClusterImplementationSpecifier::DnsCacheConfig(config)) => {
            notes.within("dns_cache_config", |notes| cache(config, notes))
        }
        Some(ClusterImplementationSpecifier::SubClustersConfig(_)) => {
            notes.refuse("sub_clusters_config", "is not supported");
            cache(DnsCacheConfig::default(), notes)
        }
        None => Err(notes.malformed("dns_cache_config", "is missing")),
    }
}

/// The terms of a cache of hosts.
pub(crate) fn cache(config: DnsCacheConfig, notes: &mut Notes) -> Result<HostCacheTerms, Malformed> {
    let DnsCacheConfig {
        name,
        dns_lookup_family,
        dns_refresh_rate,
        dns_min_refresh_rate,
        host_ttl,
        max_hosts,
        disable_dns_refresh_on_failure,
        dns_failure_refresh_rate,
        dns_cache_circuit_breaker,
        use_tcp_for_dns_lookups,
        dns_resolution_config,
        typed_dns_resolver_config,
        preresolve_hostnames,
        dns_query_timeout,
        key_value_config,
        resolved_address_filter,
    } = config;
    // A cache belongs to its cluster, so that its name says nothing. What is looked up beforehand only comes sooner.
    unneeded!(
        name,
        use_tcp_for_dns_lookups,
        typed_dns_resolver_config,
        preresolve_hostnames,
        key_value_config
    );
    ignore_set!(notes, disable_dns_refresh_on_failure, dns_cache_circuit_breaker);
    refuse_set!(notes, dns_resolution_config, resolved_address_filter);
    let time = |field: &str, value: Option<prost_types::Duration>, default: Duration, notes: &Notes| match value {
        Some(value) => duration(field, value, notes),
        None => Ok(default),
    };
    let DnsTerms { family, mut cadence } = terms(
        Asked {
            family: dns_lookup_family,
            refresh: None,
            failure: dns_failure_refresh_rate,
            jitter: None,
            // Envoy's cache asks when the records have expired.
            respect_ttl: true,
        },
        notes,
    )?;
    cadence.refresh = time("dns_refresh_rate", dns_refresh_rate, HOST_REFRESH, notes)?;
    cadence.least = time("dns_min_refresh_rate", dns_min_refresh_rate, HOST_LEAST_REFRESH, notes)?;
    let max_hosts = match max_hosts {
        None => MAX_HOSTS,
        Some(0) => return Err(notes.malformed("max_hosts", "is zero")),
        Some(most) => most.min(MOST_HOSTS) as usize,
    };
    Ok(HostCacheTerms {
        family,
        cadence,
        host_ttl: time("host_ttl", host_ttl, HOST_TTL, notes)?,
        max_hosts,
        query_timeout: time("dns_query_timeout", dns_query_timeout, QUERY_TIMEOUT, notes)?,
        port: HTTP_PORT,
    })
}
