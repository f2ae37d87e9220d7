//! One endpoint of an assignment (contract xds §5.10): where it is, how it is reached, and how much of the load it gets.
//!
//! An endpoint is an address behind a tunnel, an address behind another network's gateway, or a plain address. The live state of an
//! endpoint that was there before is adopted, so that a change of its neighbours does not forget its connections.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use cairn_exchange::clock;
use cairn_policy::balance::Labels;
use cairn_proto::envoy::config::{
    core::v3::{HealthStatus, Metadata},
    endpoint::v3::{Endpoint as EnvoyEndpoint, LbEndpoint, lb_endpoint::HostIdentifier},
};
use prost_types::{Struct, value::Kind};

use super::{
    any::text,
    assignment::Group,
    report::{Malformed, Notes, ignore_set, unneeded},
    subsets,
    value::{Place, place},
};
use crate::upstream::{Endpoint, Health, Locality, NamedEndpoint, Target, TransportTerms};

/// Name of the metadata that says which transport an endpoint asks for.
const TRANSPORT_MATCH: &str = "envoy.transport_socket_match";
/// Name of the metadata that load balancing looks at.
const LB_METADATA: &str = subsets::NAMESPACE;

/// One endpoint.
#[derive(Clone, Debug)]
pub(crate) struct Reached {
    /// Where it is.
    pub target: Reach,
    /// As Envoy prints it in logs.
    pub display: Arc<str>,
    /// Health.
    pub health: Health,
    /// Share of the requests, at least 1.
    pub weight: u32,
    /// Its host name, where it is told.
    pub hostname: Option<Arc<str>>,
    /// What consistent hashing knows it by, where it is told.
    pub hash_key: Option<Arc<str>>,
    /// What it says of itself, for subsets.
    pub labels: Arc<Labels>,
    /// What it asks of the transport.
    pub asks: BTreeMap<String, String>,
}

/// Where an endpoint is.
#[derive(Clone, Debug)]
pub(crate) enum Reach {
    /// There.
    At(Target),
    /// At each address of this name, at this port.
    Named(Arc<str>, u16),
}

/// Compiles one endpoint of a group; `None` when it is left out. Those that have names are added to `names`.
pub(super) fn compile_endpoint(
    endpoint: LbEndpoint,
    group: &Group,
    names: &mut Vec<NamedEndpoint>,
    notes: &mut Notes,
) -> Result<Option<Reached>, Malformed> {
    let LbEndpoint {
        health_status,
        metadata,
        load_balancing_weight,
        host_identifier,
    } = endpoint;
    let endpoint = match host_identifier {
        Some(HostIdentifier::Endpoint(endpoint)) => endpoint,
        Some(HostIdentifier::EndpointName(name)) => {
            notes.refuse("endpoint_name", format!("`{name}` is not supported"));
            return Ok(None);
        }
        None => return Err(notes.malformed("endpoint", "is missing")),
    };
    let EnvoyEndpoint {
        address,
        health_check_config,
        hostname,
        additional_addresses,
        observability_name,
    } = endpoint;
    unneeded!(health_check_config, observability_name);
    // Further addresses of the same endpoint are tried by happy eyeballs in Envoy; the first one is the one that istiod prefers.
    ignore_set!(notes, additional_addresses);
    let health = match HealthStatus::try_from(health_status) {
        Ok(HealthStatus::Unknown | HealthStatus::Healthy) => Health::Healthy,
        Ok(HealthStatus::Degraded) => Health::Degraded,
        Ok(HealthStatus::Unhealthy | HealthStatus::Timeout) => Health::Unhealthy,
        Ok(HealthStatus::Draining) => Health::Draining,
        Err(_) => {
            notes.ignore("health_status", format!("{health_status} is not known; taken as unhealthy"));
            Health::Unhealthy
        }
    };
    let weight = load_balancing_weight.unwrap_or(1).max(1);
    let address = address.ok_or_else(|| notes.malformed("endpoint.address", "is missing"))?;
    let mut hostname = Some(hostname).filter(|name| !name.is_empty()).map(Arc::from);
    let (target, display) = match notes.within("endpoint", |notes| place(address, notes))? {
        Place::Socket(address) => (Reach::At(Target::Plain(address)), address.to_string()),
        Place::Host(host, port) => {
            let host: Arc<str> = host.into();
            hostname.get_or_insert_with(|| host.clone());
            names.push(NamedEndpoint {
                host: host.clone(),
                port,
                weight,
                locality: group.locality.clone(),
                priority: group.priority,
            });
            let display = format!("{host}:{port}");
            (Reach::Named(host, port), display)
        }
        Place::Elsewhere => return Ok(None),
        Place::Internal(listener, id) => match behind(&listener, &id, metadata.as_ref(), notes)? {
            Some(target) => (Reach::At(target), format!("envoy://{listener}/{id}")),
            None => return Ok(None),
        },
    };
    let asks = metadata
        .as_ref()
        .and_then(|metadata| metadata.filter_metadata.get(TRANSPORT_MATCH))
        .map(texts)
        .unwrap_or_default();
    let balanced_by = metadata
        .as_ref()
        .and_then(|metadata| metadata.filter_metadata.get(LB_METADATA));
    let hash_key = balanced_by.and_then(|of| text(&of.fields, "hash_key"));
    Ok(Some(Reached {
        hostname,
        hash_key: hash_key.filter(|key| !key.is_empty()).map(Into::into),
        target,
        display: display.into(),
        health,
        weight,
        labels: balanced_by.map(|of| Arc::new(subsets::labels(of))).unwrap_or_default(),
        asks,
    }))
}

/// What an endpoint behind one of Envoy's internal listeners is.
fn behind(listener: &str, id: &str, metadata: Option<&Metadata>, notes: &mut Notes) -> Result<Option<Target>, Malformed> {
    let empty = Struct::default();
    let of = |name: &str| {
        metadata
            .and_then(|metadata| metadata.filter_metadata.get(name))
            .unwrap_or(&empty)
    };
    let original = of("envoy.filters.listener.original_dst");
    let socket = |field: &str, value: &str, notes: &Notes| {
        value
            .parse::<SocketAddr>()
            .map_err(|_| notes.malformed(field, format!("`{value}` is no address and port")))
    };
    // The address stands in the metadata, which is what Envoy's tunnel listener reads, and again in the id.
    let local = match (text(&original.fields, "local"), id) {
        (Some(local), _) => Some(socket("metadata.local", local, notes)?),
        (None, "") => None,
        (None, id) => Some(socket("endpoint.address.endpoint_id", id, notes)?),
    };
    match (listener, local) {
        ("connect_originate", None) => Ok(Some(Target::Original { tunnel: true })),
        ("connect_originate", Some(address)) => {
            let gateway = text(&original.fields, "waypoint")
                .map(|gateway| socket("metadata.waypoint", gateway, notes))
                .transpose()?;
            Ok(Some(Target::Tunnel { address, gateway }))
        }
        ("inner_connect_originate", Some(gateway)) => {
            let double = of("istio").fields.get("double_hbone").and_then(|value| value.kind.as_ref());
            let target = match double {
                Some(Kind::StructValue(double)) => text(&double.fields, "hbone_target_address"),
                _ => None,
            };
            let target =
                target.ok_or_else(|| notes.malformed("metadata.istio.double_hbone.hbone_target_address", "is missing"))?;
            Ok(Some(Target::Double {
                gateway,
                service: target.into(),
            }))
        }
        // Envoy's own plumbing: from the tunnel into the chains, and from the inner tunnel into the outer one.
        ("main_internal" | "outer_connect_originate", _) => Ok(None),
        (other, _) => {
            notes.refuse(
                "endpoint.address",
                format!("listener {other} is not known; the endpoint is left out"),
            );
            Ok(None)
        }
    }
}

/// The members of a structure that are text.
fn texts(fields: &Struct) -> BTreeMap<String, String> {
    let text = |(key, value): (&String, &prost_types::Value)| match &value.kind {
        Some(Kind::StringValue(text)) => Some((key.clone(), text.clone())),
        _ => None,
    };
    fields.fields.iter().filter_map(text).collect()
}

// === impl Reached ===

impl Reached {
    /// Where the client wanted to go.
    pub(super) fn original_destination(tunnel: bool) -> Self {
        Self {
            target: Reach::At(Target::Original { tunnel }),
            display: "".into(),
            health: Health::Healthy,
            weight: 1,
            hostname: None,
            hash_key: None,
            labels: Arc::default(),
            asks: BTreeMap::new(),
        }
    }

    /// Whether nothing but perhaps the target is another than that of the one before.
    pub(super) fn is(
        &self,
        before: &Endpoint,
        display: &Arc<str>,
        transport: Option<&Arc<TransportTerms>>,
        locality: &Arc<Locality>,
    ) -> bool {
        let Self {
            target: _,
            display: _,
            health,
            weight,
            hostname,
            hash_key,
            labels,
            asks: _,
        } = self;
        let Endpoint {
            target: _,
            display: its_display,
            health: its_health,
            weight: its_weight,
            locality: its_locality,
            hostname: its_hostname,
            hash_key: its_hash_key,
            labels: its_labels,
            healthy_since: _,
            transport: its_transport,
            state: _,
        } = before;
        (health, weight, display) == (its_health, its_weight, its_display)
            && (locality, hostname, hash_key) == (its_locality, its_hostname, its_hash_key)
            && (transport, labels) == (its_transport.as_ref(), its_labels)
    }

    /// The endpoint at this target with the state of the one before: that itself, if nothing about it has changed.
    pub(super) fn alive(
        &self,
        target: &Target,
        display: &Arc<str>,
        transport: Option<&Arc<TransportTerms>>,
        before: Option<&Arc<Endpoint>>,
        locality: &Arc<Locality>,
    ) -> Arc<Endpoint> {
        if let Some(before) = before.filter(|before| self.is(before, display, transport, locality)) {
            return before.clone();
        }
        // Connections that were made with something else on them are not this endpoint's.
        let state = before
            .filter(|before| before.transport.as_ref() == transport)
            .map(|before| &before.state);
        let was_healthy = before.filter(|before| before.health == Health::Healthy);
        Arc::new(Endpoint {
            target: target.clone(),
            display: display.clone(),
            health: self.health,
            weight: self.weight,
            locality: locality.clone(),
            transport: transport.cloned(),
            hostname: self.hostname.clone(),
            hash_key: self.hash_key.clone(),
            labels: self.labels.clone(),
            healthy_since: was_healthy.map_or_else(clock::now, |before| before.healthy_since),
            state: state.cloned().unwrap_or_default(),
        })
    }
}
