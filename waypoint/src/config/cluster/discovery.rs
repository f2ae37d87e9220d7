//! Where a cluster's endpoints come from (contract xds §5.1, §5.9): EDS, the cluster itself, the client's destination, DNS.

use std::sync::Arc;

use cairn_proto::envoy::{
    config::{
        cluster::v3::cluster::{ClusterDiscoveryType, CustomClusterType, DiscoveryType, EdsClusterConfig},
        core::v3::config_source::ConfigSourceSpecifier,
        endpoint::v3::ClusterLoadAssignment,
    },
    extensions::clusters::dynamic_forward_proxy::v3::ClusterConfig as DynamicForwardProxy,
};

use super::{Endpoints, TUNNEL_CLUSTERS};
use crate::{
    config::{
        any::{Unknown, type_name, unpack},
        assignment::Assignment,
        dns,
        report::{Malformed, Notes},
    },
    upstream::{ClusterSettings, Discovery, DnsTerms, OriginalDestination},
};

/// Where they come from; what is said of that is put into the settings.
pub(super) fn endpoints(
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
                let compiled = Assignment::compile(assignment, notes)?;
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
