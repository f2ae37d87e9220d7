//! Workload discovery into the [`Mesh`]: `istio.workload.Address` (contract runtime §7.3).
//!
//! istiod leaves out what is at its default; the defaults are filled in here. A resource that is malformed, or that asks for what could
//! only be done wrong, is refused by name and the one before it stays; the others of the same push apply. What nobody here needs is
//! taken apart all the same, so that a new field is a compile error until somebody has thought of it.

use std::{net::IpAddr, sync::Arc};

use cairn_proto::istio::workload::{
    self as wire, Address, ApplicationTunnel as WireApplicationTunnel, GatewayAddress, IpFamilies,
    LoadBalancing as WireBalancing, Locality, NamespacedHostname, NetworkAddress, NetworkMode, Port, PortList,
    Service as WireService, TunnelProtocol, Workload as WireWorkload, WorkloadStatus, WorkloadType, address::Type,
    application_tunnel::Protocol, gateway_address::Destination, load_balancing, service::Visibility,
};
use ipnet::IpNet;
use prost::Message as _;

use crate::mesh::{
    ApplicationProtocol, ApplicationTunnel, Families, Gateway, GatewayTarget, HealthPolicy, Interner, LoadBalancing, Mesh, Mode,
    Ports, Scope, Service, Tunnel, Vip, WeightedWaypoint, Workload,
};

/// The type that is subscribed to.
pub const TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// What istiod leaves out.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT: &str = "default";
/// Where gateways end tunnels, unless they say otherwise.
const HBONE_PORT: u16 = 15008;

/// A resource that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {field} {reason}")]
pub struct Malformed {
    /// Its name.
    pub resource: String,
    /// Which part of it.
    pub field: String,
    /// What is wrong.
    pub reason: String,
}

/// What is said of one field.
type Wrong = (&'static str, String);

/// Applies one resource.
pub fn apply(resource: &str, bytes: &[u8], mesh: &Mesh, texts: &mut Interner) -> Result<(), Malformed> {
    let malformed = |(field, reason): Wrong| Malformed {
        resource: resource.to_owned(),
        field: field.to_owned(),
        reason,
    };
    let address = Address::decode(bytes).map_err(|error| malformed(("", format!("is no Address: {error}"))))?;
    match address.r#type {
        Some(Type::Workload(wire)) => {
            if wire.uid != resource {
                return Err(malformed(("uid", format!("`{}` is not the name of the resource", wire.uid))));
            }
            mesh.insert_workload(workload(wire, texts).map_err(malformed)?);
        }
        Some(Type::Service(wire)) => {
            let key = format!("{}/{}", wire.namespace, wire.hostname);
            if key != resource {
                return Err(malformed((
                    "hostname",
                    format!("makes `{key}`, which is not the name of the resource"),
                )));
            }
            mesh.insert_service(service(wire, texts).map_err(malformed)?);
        }
        None => return Err(malformed(("type", "is neither a workload nor a service".to_owned()))),
    }
    Ok(())
}

fn workload(wire: WireWorkload, texts: &mut Interner) -> Result<Workload, Wrong> {
    let WireWorkload {
        uid,
        name,
        namespace,
        addresses,
        hostname,
        network,
        tunnel_protocol,
        trust_domain,
        service_account,
        waypoint,
        network_gateway,
        node,
        canonical_name,
        canonical_revision,
        workload_type,
        workload_name,
        native_tunnel,
        application_tunnel,
        services,
        authorization_policies,
        status,
        cluster_id,
        locality,
        network_mode,
        extensions: _,
        capacity,
    } = wire;
    let or = |value: String, default: &str| if value.is_empty() { default.to_owned() } else { value };
    let namespace = or(namespace, DEFAULT);
    let account = or(service_account, DEFAULT);
    let trust_domain = or(trust_domain, DEFAULT_TRUST_DOMAIN);
    let Locality { region, zone, subzone } = locality.unwrap_or_default();
    let identity = texts.identity(&trust_domain, &namespace, &account);
    if identity.is_none() {
        let parts = format!("{trust_domain}, {namespace} and {account} make no SPIFFE identity");
        return Err(("trust_domain, namespace and service_account", parts));
    }
    let facts = cairn_exchange::Workload {
        uid: uid.into(),
        name: name.into(),
        identity,
        namespace: texts.text(&namespace),
        network: texts.text(&network),
        service_account: texts.text(&account),
        canonical_name: texts.text(&canonical_name),
        canonical_revision: texts.text(&canonical_revision),
        workload_type: match WorkloadType::try_from(workload_type) {
            Ok(WorkloadType::Deployment) => "deployment",
            Ok(WorkloadType::Cronjob) => "cronjob",
            Ok(WorkloadType::Job) => "job",
            Ok(WorkloadType::Pod) | Err(_) => "pod",
        },
        workload_name: texts.text(&workload_name),
        cluster: texts.text(&cluster_id),
        region: texts.text(&region),
        zone: texts.text(&zone),
    };
    let known = |number, field| (field, format!("has the value {number}, which is not known here"));
    Ok(Workload {
        facts: Arc::new(facts),
        addresses: addresses
            .iter()
            .map(|bytes| address("addresses", bytes))
            .collect::<Result<_, _>>()?,
        hostname: texts.text(&hostname),
        tunnel: match TunnelProtocol::try_from(tunnel_protocol) {
            Ok(TunnelProtocol::None) => Tunnel::None,
            Ok(TunnelProtocol::Hbone) => Tunnel::Hbone,
            Ok(TunnelProtocol::LegacyIstioMtls) => {
                return Err((
                    "tunnel_protocol",
                    "is LEGACY_ISTIO_MTLS, which ambient does not speak".to_owned(),
                ));
            }
            Err(_) => return Err(known(tunnel_protocol, "tunnel_protocol")),
        },
        waypoint: waypoint.map(|wire| gateway("waypoint", wire, texts)).transpose()?,
        network_gateway: network_gateway
            .map(|wire| gateway("network_gateway", wire, texts))
            .transpose()?,
        node: texts.text(&node),
        subzone: texts.text(&subzone),
        native_tunnel,
        application_tunnel: application_tunnel.map(self::application_tunnel).transpose()?,
        services: services
            .into_iter()
            .map(|(key, PortList { ports: list })| Ok((texts.text(&key), texts.ports(ports("services", list)?))))
            .collect::<Result<Vec<(Arc<str>, Ports)>, Wrong>>()?
            .into(),
        policies: authorization_policies.iter().map(|key| texts.text(key)).collect(),
        // What is newer than we are is nothing that connections should go to.
        healthy: WorkloadStatus::try_from(status) == Ok(WorkloadStatus::Healthy),
        host_network: NetworkMode::try_from(network_mode).map_err(|_| known(network_mode, "network_mode"))?
            == NetworkMode::HostNetwork,
        capacity: capacity.unwrap_or(1),
    })
}

fn service(wire: WireService, texts: &mut Interner) -> Result<Service, Wrong> {
    let WireService {
        name,
        namespace,
        hostname,
        addresses,
        ports: list,
        subject_alt_names,
        waypoint,
        load_balancing,
        ip_families,
        extensions: _,
        canonical,
        // Gateways ask, and nobody else.
        ingress_use_waypoint: _,
        weighted_waypoints,
        visibility,
    } = wire;
    let known = |number, field| (field, format!("has the value {number}, which is not known here"));
    let weighted = weighted_waypoints
        .into_iter()
        .map(|wire::WeightedWaypoint { destination, weight }| {
            let destination = destination.ok_or(("weighted_waypoints", "has an entry without destination".to_owned()))?;
            Ok(WeightedWaypoint {
                gateway: gateway("weighted_waypoints", destination, texts)?,
                weight,
            })
        });
    let weighted_waypoints = weighted.collect::<Result<_, Wrong>>()?;
    let names = subject_alt_names.iter().map(|name| {
        name.parse()
            .map_err(|error| ("subject_alt_names", format!("has an entry that is no identity: {error}")))
    });
    Ok(Service {
        key: texts.text(&format!("{namespace}/{hostname}")),
        name: name.into(),
        namespace: texts.text(&namespace),
        hostname: texts.text(&hostname),
        vips: addresses.into_iter().map(|wire| vip(wire, texts)).collect::<Result<_, _>>()?,
        ports: ports("ports", list)?,
        subject_alt_names: names.collect::<Result<_, Wrong>>()?,
        waypoint: waypoint.map(|wire| gateway("waypoint", wire, texts)).transpose()?,
        weighted_waypoints,
        load_balancing: load_balancing.map(balancing).transpose()?,
        families: match IpFamilies::try_from(ip_families).map_err(|_| known(ip_families, "ip_families"))? {
            IpFamilies::Automatic | IpFamilies::Dual => Families::Any,
            IpFamilies::Ipv4Only => Families::V4,
            IpFamilies::Ipv6Only => Families::V6,
        },
        canonical,
        private: Visibility::try_from(visibility).map_err(|_| known(visibility, "visibility"))? == Visibility::Namespace,
    })
}

fn balancing(wire: WireBalancing) -> Result<LoadBalancing, Wrong> {
    let WireBalancing {
        routing_preference,
        mode,
        health_policy,
    } = wire;
    let known = |number| ("load_balancing", format!("has the value {number}, which is not known here"));
    let scopes = routing_preference.into_iter().map(|number| {
        Ok(Some(
            match load_balancing::Scope::try_from(number).map_err(|_| known(number))? {
                load_balancing::Scope::UnspecifiedScope => return Ok(None),
                load_balancing::Scope::Region => Scope::Region,
                load_balancing::Scope::Zone => Scope::Zone,
                load_balancing::Scope::Subzone => Scope::Subzone,
                load_balancing::Scope::Node => Scope::Node,
                load_balancing::Scope::Cluster => Scope::Cluster,
                load_balancing::Scope::Network => Scope::Network,
            },
        ))
    });
    Ok(LoadBalancing {
        preference: scopes.collect::<Result<Vec<_>, Wrong>>()?.into_iter().flatten().collect(),
        mode: match load_balancing::Mode::try_from(mode).map_err(|_| known(mode))? {
            load_balancing::Mode::UnspecifiedMode => Mode::Unspecified,
            load_balancing::Mode::Strict => Mode::Strict,
            load_balancing::Mode::Failover => Mode::Failover,
            load_balancing::Mode::Passthrough => Mode::Passthrough,
        },
        health: match load_balancing::HealthPolicy::try_from(health_policy).map_err(|_| known(health_policy))? {
            load_balancing::HealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            load_balancing::HealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
    })
}

fn gateway(field: &'static str, wire: GatewayAddress, texts: &mut Interner) -> Result<Gateway, Wrong> {
    let GatewayAddress {
        hbone_mtls_port,
        destination,
    } = wire;
    let target = match destination {
        Some(Destination::Hostname(NamespacedHostname { namespace, hostname })) => {
            GatewayTarget::Service(texts.text(&format!("{namespace}/{hostname}")))
        }
        Some(Destination::Address(NetworkAddress {
            network,
            address: bytes,
            length: _,
        })) => GatewayTarget::Address(texts.text(&network), address(field, &bytes)?),
        None => return Err((field, "has no destination".to_owned())),
    };
    Ok(Gateway {
        target,
        port: match port(field, hbone_mtls_port)? {
            0 => HBONE_PORT,
            port => port,
        },
    })
}

fn application_tunnel(wire: WireApplicationTunnel) -> Result<ApplicationTunnel, Wrong> {
    let WireApplicationTunnel { protocol, port: number } = wire;
    const FIELD: &str = "application_tunnel";
    Ok(ApplicationTunnel {
        protocol: match Protocol::try_from(protocol) {
            Ok(Protocol::None) => ApplicationProtocol::None,
            Ok(Protocol::Proxy) => ApplicationProtocol::Proxy,
            Err(_) => return Err((FIELD, format!("has protocol {protocol}, which is not known here"))),
        },
        port: Some(port(FIELD, number)?).filter(|port| *port != 0),
    })
}

fn vip(wire: NetworkAddress, texts: &mut Interner) -> Result<Vip, Wrong> {
    let NetworkAddress {
        network,
        address: bytes,
        length,
    } = wire;
    let address = address("addresses", &bytes)?;
    let range = match length {
        None => IpNet::from(address),
        Some(length) => {
            let net = u8::try_from(length).ok().and_then(|length| IpNet::new(address, length).ok());
            net.ok_or_else(|| ("addresses", format!("has a range of /{length}, which {address} cannot have")))?
                .trunc()
        }
    };
    Ok(Vip {
        network: texts.text(&network),
        range,
    })
}

fn ports(field: &'static str, list: Vec<Port>) -> Result<Vec<(u16, u16)>, Wrong> {
    let pairs = list.into_iter().map(|wire| {
        let Port {
            service_port,
            target_port,
            // Layer 7 is the waypoint's.
            app_protocol: _,
        } = wire;
        Ok((port(field, service_port)?, port(field, target_port)?))
    });
    let mut pairs = pairs.collect::<Result<Vec<_>, Wrong>>()?;
    pairs.sort_unstable();
    pairs.dedup_by_key(|(service, _)| *service);
    Ok(pairs)
}

fn port(field: &'static str, number: u32) -> Result<u16, Wrong> {
    u16::try_from(number).map_err(|_| (field, format!("has the port {number}, which is none")))
}

fn address(field: &'static str, bytes: &[u8]) -> Result<IpAddr, Wrong> {
    ip(bytes).ok_or_else(|| (field, format!("has {} bytes that are no IP address", bytes.len())))
}

/// An address of either family; IPv4 in the form of IPv6 is IPv4.
pub(crate) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes)
            .ok()
            .map(|bytes| IpAddr::from(bytes).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> WireWorkload {
        WireWorkload {
            uid: "Kubernetes//Pod/app/web".into(),
            name: "web".into(),
            namespace: "app".into(),
            addresses: vec![vec![10, 1, 0, 1]],
            ..WireWorkload::default()
        }
    }

    fn applied(resource: &str, r#type: Type) -> (Mesh, Result<(), String>) {
        let mesh = Mesh::new("");
        let bytes = Address { r#type: Some(r#type) }.encode_to_vec();
        let result = apply(resource, &bytes, &mesh, &mut Interner::default());
        (mesh, result.map_err(|error| error.to_string()))
    }

    #[test]
    fn what_istiod_leaves_out_has_its_default() {
        let (mesh, result) = applied("Kubernetes//Pod/app/web", Type::Workload(pod()));
        result.unwrap();
        let web = mesh.workload_at([10, 1, 0, 1].into()).unwrap();
        assert_eq!(web.identity().unwrap().as_str(), "spiffe://cluster.local/ns/app/sa/default");
        assert!(web.healthy && web.capacity == 1 && web.tunnel == Tunnel::None && !web.host_network);
        assert_eq!(web.facts.workload_type, "deployment");
    }

    #[test]
    fn a_workload_without_addresses_is_known_by_its_name() {
        let wire = WireWorkload {
            addresses: Vec::new(),
            hostname: "db.example.com".into(),
            ..pod()
        };
        let (mesh, result) = applied("Kubernetes//Pod/app/web", Type::Workload(wire));
        result.unwrap();
        assert_eq!(&*mesh.workload("Kubernetes//Pod/app/web").unwrap().hostname, "db.example.com");
    }

    #[test]
    fn a_malformed_resource_is_refused_in_words_and_changes_nothing() {
        let legacy = WireWorkload {
            tunnel_protocol: TunnelProtocol::LegacyIstioMtls as i32,
            ..pod()
        };
        let odd_address = WireWorkload {
            addresses: vec![vec![1, 2, 3]],
            ..pod()
        };
        let odd_port = WireService {
            namespace: "app".into(),
            hostname: "web".into(),
            ports: vec![Port {
                service_port: 70_000,
                ..Port::default()
            }],
            ..WireService::default()
        };
        let odd_range = WireService {
            namespace: "app".into(),
            hostname: "web".into(),
            addresses: vec![NetworkAddress {
                address: vec![10, 0, 0, 0],
                length: Some(33),
                ..NetworkAddress::default()
            }],
            ..WireService::default()
        };
        let cases = [
            ("Kubernetes//Pod/app/web", Type::Workload(legacy), "LEGACY_ISTIO_MTLS"),
            ("Kubernetes//Pod/app/web", Type::Workload(odd_address), "3 bytes"),
            ("other", Type::Workload(pod()), "not the name of the resource"),
            ("app/web", Type::Service(odd_port), "70000"),
            ("app/web", Type::Service(odd_range), "/33"),
        ];
        for (resource, wire, words) in cases {
            let (mesh, result) = applied(resource, wire);
            let error = result.unwrap_err();
            assert!(error.contains(words) && error.starts_with(resource), "{error}");
            assert_eq!(mesh.counts(), (0, 0));
        }
    }
}
