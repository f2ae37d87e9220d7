//! Endpoint assignments (contract xds §5.10): where each endpoint is, how it is reached, and how much of the load it gets.
//!
//! An endpoint is an address behind a tunnel, an address behind another network's gateway, or a plain address. The live state of an
//! endpoint that was there before is adopted, so that a change of its neighbours does not forget its connections.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use cairn_proto::envoy::config::{
    core::v3::{HealthStatus, Locality as EnvoyLocality, Metadata},
    endpoint::v3::{
        ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, LocalityLbEndpoints, cluster_load_assignment::Policy,
        lb_endpoint::HostIdentifier,
    },
};
use prost_types::{Struct, value::Kind};

use super::{
    any::{Unknown, decode, text},
    report::{Malformed, Notes, Unsupported, ignore_set, refuse_set, unneeded},
    transport::MatchedTransports,
    value::{Place, place},
};
use crate::upstream::{
    Endpoint, EndpointSet, EndpointState, Health, Locality, LocalityGroup, NamedEndpoint, Target, TransportTerms,
};

/// Highest priority that an assignment may have, as Envoy's validation says.
const MAX_PRIORITY: u32 = 128;

/// Name of the metadata that says which transport an endpoint asks for.
const TRANSPORT_MATCH: &str = "envoy.transport_socket_match";

/// A compiled assignment, before live state is put to it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Assignment {
    /// Endpoints by priority and locality.
    pub groups: Vec<Group>,
    /// Endpoints that have a host name instead of an address.
    pub names: Vec<NamedEndpoint>,
}

/// Endpoints of one locality in one priority.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    priority: usize,
    locality: Arc<Locality>,
    weight: u32,
    endpoints: Vec<Reached>,
}

/// One endpoint.
#[derive(Clone, Debug)]
struct Reached {
    target: Reach,
    display: Arc<str>,
    health: Health,
    weight: u32,
    /// What it asks of the transport.
    asks: BTreeMap<String, String>,
}

/// The state of an endpoint, with what was put onto its connections.
type Known = (Option<Arc<TransportTerms>>, Arc<EndpointState>);

/// Where an endpoint is.
#[derive(Clone, Debug)]
enum Reach {
    /// There.
    At(Target),
    /// At each address of this name, at this port.
    Named(Arc<str>, u16),
}

/// Compiles an assignment that came over EDS.
pub(crate) fn compile(name: &str, bytes: &Bytes) -> Result<(Assignment, Vec<Unsupported>), Malformed> {
    let mut notes = Notes::of(name);
    let assignment: ClusterLoadAssignment = decode(bytes, Unknown::Refuses, &mut notes)?;
    if assignment.cluster_name != name {
        return Err(notes.malformed(
            "cluster_name",
            format!("`{}` is not the name of the resource", assignment.cluster_name),
        ));
    }
    let compiled = compile_assignment(assignment, &mut notes)?;
    if !compiled.names.is_empty() {
        notes.refuse(
            "endpoints",
            "endpoints over EDS need addresses; those with names are left out",
        );
    }
    Ok((compiled, notes.into_list()))
}

/// Compiles an assignment.
pub(crate) fn compile_assignment(assignment: ClusterLoadAssignment, notes: &mut Notes) -> Result<Assignment, Malformed> {
    let ClusterLoadAssignment {
        cluster_name: _,
        endpoints,
        named_endpoints,
        policy,
    } = assignment;
    refuse_set!(notes, named_endpoints);
    if let Some(Policy {
        drop_overloads,
        overprovisioning_factor,
        endpoint_stale_after,
        weighted_priority_health,
    }) = policy
    {
        unneeded!(endpoint_stale_after);
        refuse_set!(notes, drop_overloads);
        ignore_set!(notes, overprovisioning_factor, weighted_priority_health);
    }
    let mut compiled = Assignment::default();
    for (index, group) in endpoints.into_iter().enumerate() {
        notes.at("endpoints", index, |notes| compile_group(group, &mut compiled, notes))?;
    }
    Ok(compiled)
}

fn compile_group(group: LocalityLbEndpoints, compiled: &mut Assignment, notes: &mut Notes) -> Result<(), Malformed> {
    let LocalityLbEndpoints {
        locality,
        metadata,
        lb_endpoints,
        load_balancing_weight,
        priority,
        proximity,
        lb_config,
    } = group;
    unneeded!(metadata, proximity);
    refuse_set!(notes, lb_config);
    if priority > MAX_PRIORITY {
        return Err(notes.malformed("priority", format!("{priority} is more than {MAX_PRIORITY}")));
    }
    let EnvoyLocality { region, zone, sub_zone } = locality.unwrap_or_default();
    let locality = Arc::new(Locality {
        region: region.into(),
        zone: zone.into(),
        sub_zone: sub_zone.into(),
    });
    let mut group = Group {
        priority: priority as usize,
        locality: locality.clone(),
        // Without a weight a locality gets no share where localities are weighted, as in Envoy.
        weight: load_balancing_weight.unwrap_or(0),
        endpoints: Vec::with_capacity(lb_endpoints.len()),
    };
    for (index, endpoint) in lb_endpoints.into_iter().enumerate() {
        notes.at("lb_endpoints", index, |notes| {
            compile_endpoint(endpoint, &mut group, &mut compiled.names, notes)
        })?;
    }
    compiled.groups.push(group);
    Ok(())
}

fn compile_endpoint(
    endpoint: LbEndpoint,
    group: &mut Group,
    names: &mut Vec<NamedEndpoint>,
    notes: &mut Notes,
) -> Result<(), Malformed> {
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
            return Ok(());
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
    unneeded!(health_check_config, hostname, observability_name);
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
    let (target, display) = match notes.within("endpoint", |notes| place(address, notes))? {
        Place::Socket(address) => (Reach::At(Target::Plain(address)), address.to_string()),
        Place::Host(host, port) => {
            let host: Arc<str> = host.into();
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
        Place::Internal(listener, id) => match behind(&listener, &id, metadata.as_ref(), notes)? {
            Some(target) => (Reach::At(target), format!("envoy://{listener}/{id}")),
            None => return Ok(()),
        },
    };
    let asks = metadata
        .as_ref()
        .and_then(|metadata| metadata.filter_metadata.get(TRANSPORT_MATCH))
        .map(texts)
        .unwrap_or_default();
    group.endpoints.push(Reached {
        target,
        display: display.into(),
        health,
        weight,
        asks,
    });
    Ok(())
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

// === impl Assignment ===

impl Assignment {
    /// The only "endpoint" of a cluster that goes where the client wanted to go.
    pub(crate) fn original_destination(tunnel: bool) -> Self {
        let endpoint = Reached {
            target: Reach::At(Target::Original { tunnel }),
            display: "".into(),
            health: Health::Healthy,
            weight: 1,
            asks: BTreeMap::new(),
        };
        let group = Group {
            priority: 0,
            locality: Arc::default(),
            weight: 1,
            endpoints: vec![endpoint],
        };
        Self {
            groups: vec![group],
            names: Vec::new(),
        }
    }

    /// The endpoints with their live state: that of `previous`, where an endpoint was in it. `addresses` knows those of a name.
    /// Endpoints that ask for a transport that we cannot do are left out and listed.
    pub(crate) fn endpoints<'a>(
        &self,
        cluster: &str,
        matched: &MatchedTransports,
        previous: &EndpointSet,
        addresses: impl Fn(&str) -> &'a [IpAddr],
        unsupported: &mut Vec<Unsupported>,
    ) -> EndpointSet {
        let mut states: HashMap<Target, Vec<Known>> = HashMap::new();
        for endpoint in previous.iter() {
            let known = (endpoint.transport.clone(), endpoint.state.clone());
            states.entry(endpoint.target.clone()).or_default().push(known);
        }
        let mut notes = Notes::of(cluster);
        let mut groups = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let mut endpoints = Vec::with_capacity(group.endpoints.len());
            for endpoint in &group.endpoints {
                let Reached {
                    target,
                    display,
                    health,
                    weight,
                    asks,
                } = endpoint;
                let transport = matched.of(asks).cloned();
                if let Some(TransportTerms::Unsupported(reason)) = transport.as_deref() {
                    notes.refuse("", format!("endpoint {display} is left out: {reason}"));
                    continue;
                }
                let targets: Vec<(Target, Arc<str>)> = match target {
                    Reach::At(target) => vec![(target.clone(), display.clone())],
                    Reach::Named(host, port) => {
                        let at = addresses(host).iter().map(|ip| SocketAddr::new(*ip, *port));
                        at.map(|at| (Target::Plain(at), at.to_string().into())).collect()
                    }
                };
                for (target, display) in targets {
                    // Connections that were made with something else on them are not this endpoint's.
                    let known = states.entry(target.clone()).or_default();
                    let state = match known.iter().find(|(with, _)| *with == transport) {
                        Some((_, state)) => state.clone(),
                        None => {
                            let state = Arc::<EndpointState>::default();
                            known.push((transport.clone(), state.clone()));
                            state
                        }
                    };
                    endpoints.push(Arc::new(Endpoint {
                        target,
                        display,
                        health: *health,
                        weight: *weight,
                        locality: group.locality.clone(),
                        transport: transport.clone(),
                        state,
                    }));
                }
            }
            let group_of = LocalityGroup {
                locality: group.locality.clone(),
                weight: group.weight,
                endpoints,
            };
            groups.push((group.priority, group_of));
        }
        unsupported.extend(notes.into_list());
        EndpointSet::new(groups)
    }
}
