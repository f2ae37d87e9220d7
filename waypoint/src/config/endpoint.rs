//! Endpoint assignments (contract xds §5.10): where each endpoint is, how it is reached, and how much of the load it gets.
//!
//! An endpoint is an address behind a tunnel, an address behind another network's gateway, or a plain address. The live state of an
//! endpoint that was there before is adopted, so that a change of its neighbours does not forget its connections.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use cairn_exchange::clock;
use cairn_proto::envoy::{
    config::{
        core::v3::{HealthStatus, Locality as EnvoyLocality, Metadata},
        endpoint::v3::{
            ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, LocalityLbEndpoints,
            cluster_load_assignment::{Policy, policy::DropOverload},
            lb_endpoint::HostIdentifier,
        },
    },
    r#type::v3::{FractionalPercent, fractional_percent::DenominatorType},
};
use foldhash::fast::RandomState;
use prost_types::{Struct, value::Kind};

use super::{
    any::{Unknown, decode, text},
    report::{Malformed, Notes, Unsupported, ignore_set, refuse_set, unneeded},
    transport::MatchedTransports,
    value::{Place, place},
};
use crate::upstream::{
    ClusterSettings, Endpoint, EndpointSet, Health, Locality, LocalityGroup, NamedEndpoint, Target, TransportTerms,
};

/// Highest priority that an assignment may have, as Envoy's validation says.
const MAX_PRIORITY: u32 = 128;

/// Name of the metadata that says which transport an endpoint asks for.
const TRANSPORT_MATCH: &str = "envoy.transport_socket_match";
/// Name of the metadata that load balancing looks at.
const LB_METADATA: &str = "envoy.lb";

/// A compiled assignment, before live state is put to it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Assignment {
    /// Endpoints by priority and locality.
    pub groups: Vec<Group>,
    /// Endpoints that have a host name instead of an address.
    pub names: Vec<NamedEndpoint>,
    /// Percent by which healthy endpoints count for more, where it is told.
    overprovisioning: Option<u32>,
    /// Share of requests that are dropped, of a million.
    dropped: u32,
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
    hostname: Option<Arc<str>>,
    hash_key: Option<Arc<str>>,
    /// What it asks of the transport.
    asks: BTreeMap<String, String>,
}

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
    let mut compiled = Assignment::default();
    if let Some(Policy {
        drop_overloads,
        overprovisioning_factor,
        endpoint_stale_after,
        weighted_priority_health,
    }) = policy
    {
        unneeded!(endpoint_stale_after);
        ignore_set!(notes, weighted_priority_health);
        if overprovisioning_factor == Some(0) {
            return Err(notes.malformed("policy.overprovisioning_factor", "is zero"));
        }
        compiled.overprovisioning = overprovisioning_factor;
        compiled.dropped = drop_share(drop_overloads, notes)?;
    }
    for (index, group) in endpoints.into_iter().enumerate() {
        notes.at("endpoints", index, |notes| compile_group(group, &mut compiled, notes))?;
    }
    Ok(compiled)
}

/// The share of requests that are dropped, of a million. Envoy takes one category and rejects more.
fn drop_share(overloads: Vec<DropOverload>, notes: &Notes) -> Result<u32, Malformed> {
    let share = match <[DropOverload; 1]>::try_from(overloads) {
        Ok(
            [
                DropOverload {
                    category: _,
                    drop_percentage,
                },
            ],
        ) => drop_percentage,
        Err(none) if none.is_empty() => None,
        Err(_) => return Err(notes.malformed("policy.drop_overloads", "there is more than one")),
    };
    let Some(FractionalPercent { numerator, denominator }) = share else {
        return Ok(0);
    };
    let scale = match DenominatorType::try_from(denominator) {
        Ok(DenominatorType::Hundred) => 10_000,
        Ok(DenominatorType::TenThousand) => 100,
        Ok(DenominatorType::Million) => 1,
        Err(_) => return Err(notes.malformed("policy.drop_overloads", format!("{denominator} is no denominator"))),
    };
    Ok(numerator.saturating_mul(scale).min(1_000_000))
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
        Place::Elsewhere => return Ok(()),
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
    let hash_key = metadata
        .as_ref()
        .and_then(|metadata| metadata.filter_metadata.get(LB_METADATA))
        .and_then(|of| text(&of.fields, "hash_key"));
    group.endpoints.push(Reached {
        hostname,
        hash_key: hash_key.filter(|key| !key.is_empty()).map(Into::into),
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
            hostname: None,
            hash_key: None,
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
            ..Self::default()
        }
    }

    /// The endpoints with their live state: that of `previous`, where an endpoint was in it. `addresses` knows those of a name.
    /// Endpoints that ask for a transport that we cannot do are left out and listed; of two with the same address the first counts,
    /// as in Envoy.
    pub(crate) fn endpoints<'a, 'b>(
        &'b self,
        cluster: &str,
        settings: &ClusterSettings,
        matched: &MatchedTransports,
        previous: &EndpointSet,
        addresses: impl Fn(&str) -> &'a [IpAddr],
        unsupported: &mut Vec<Unsupported>,
    ) -> EndpointSet {
        let mut before: HashMap<&Target, &Arc<Endpoint>, RandomState> = HashMap::with_capacity_and_hasher(
            self.groups.iter().map(|group| group.endpoints.len()).sum(),
            RandomState::default(),
        );
        before.extend(previous.iter().map(|endpoint| (&endpoint.target, endpoint)));
        let mut seen: HashSet<Cow<'b, Target>, RandomState> =
            HashSet::with_capacity_and_hasher(before.len(), RandomState::default());
        let mut notes = Notes::of(cluster);
        let mut groups = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let mut endpoints = Vec::with_capacity(group.endpoints.len());
            for endpoint in &group.endpoints {
                let transport = matched.of(&endpoint.asks);
                if let Some(TransportTerms::Unsupported(reason)) = transport.map(Arc::as_ref) {
                    notes.refuse("", format!("endpoint {} is left out: {reason}", endpoint.display));
                    continue;
                }
                let mut add = |target: Cow<'b, Target>, display: &Arc<str>| {
                    if !seen.contains(&*target) {
                        let before = before.get(&*target).copied();
                        endpoints.push(endpoint.alive(&target, display, transport, before, &group.locality));
                        seen.insert(target);
                    }
                };
                match &endpoint.target {
                    Reach::At(target) => add(Cow::Borrowed(target), &endpoint.display),
                    Reach::Named(host, port) => {
                        for ip in addresses(host) {
                            let at = SocketAddr::new(*ip, *port);
                            add(Cow::Owned(Target::Plain(at)), &at.to_string().into());
                        }
                    }
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
        EndpointSet::new(groups, settings.arrangement(self.overprovisioning)).dropping(self.dropped)
    }
}

// === impl Reached ===

impl Reached {
    /// The endpoint at this target with the state of the one before: that itself, if nothing about it has changed.
    fn alive(
        &self,
        target: &Target,
        display: &Arc<str>,
        transport: Option<&Arc<TransportTerms>>,
        before: Option<&Arc<Endpoint>>,
        locality: &Arc<Locality>,
    ) -> Arc<Endpoint> {
        let Self {
            target: _,
            display: _,
            health,
            weight,
            hostname,
            hash_key,
            asks: _,
        } = self;
        let now = (*health, *weight, display, hostname, hash_key, locality);
        // Connections that were made with something else on them are not this endpoint's.
        let state = before
            .filter(|before| before.transport.as_ref() == transport)
            .map(|before| &before.state);
        let same = before.filter(|before| {
            let Endpoint {
                target: _,
                display,
                health,
                weight,
                locality,
                hostname,
                hash_key,
                healthy_since: _,
                transport: _,
                state: _,
            } = &***before;
            state.is_some() && now == (*health, *weight, display, hostname, hash_key, locality)
        });
        if let Some(same) = same {
            return same.clone();
        }
        let was_healthy = before.filter(|before| before.health == Health::Healthy);
        Arc::new(Endpoint {
            target: target.clone(),
            display: display.clone(),
            health: *health,
            weight: *weight,
            locality: locality.clone(),
            transport: transport.cloned(),
            hostname: hostname.clone(),
            hash_key: hash_key.clone(),
            healthy_since: was_healthy.map_or_else(clock::now, |before| before.healthy_since),
            state: state.cloned().unwrap_or_default(),
        })
    }
}
