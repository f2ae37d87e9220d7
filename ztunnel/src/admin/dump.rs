//! `/config_dump`, in the shape that `istioctl ztunnel-config` reads.

use std::net::IpAddr;

use cairn_exchange::clock;
use cairn_identity::Identity;
use cairn_proto::istio::security::{Address, Authorization, Match, StringMatch, string_match::MatchType};
use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    mesh::{ApplicationProtocol, Families, Gateway, GatewayTarget, HealthPolicy, Mode, Scope, Service, Tunnel, Workload},
    node::Node,
    policies::{Action, Policy, Scope as PolicyScope},
    wds,
};

/// Everything.
pub(super) fn of(node: &Node) -> Value {
    let mesh = &node.mesh;
    let states: Map<_, _> = node
        .pods
        .read()
        .iter()
        .map(|(key, pod)| {
            let side = |inbound: bool| -> Vec<_> {
                let open = pod.open.all().into_iter().filter(|open| open.inbound == inbound);
                open.map(|open| {
                    json!({
                        "src": open.source.to_string(),
                        "originalDst": open.original,
                        "actualDst": open.actual.to_string(),
                        "protocol": if open.peer.is_some() { "HBONE" } else { "TCP" },
                    })
                })
                .collect()
            };
            let state = json!({
                "state": "Up",
                "connections": { "inbound": side(true), "outbound": side(false) },
                "info": {
                    "name": pod.info.name,
                    "namespace": pod.info.namespace,
                    "trustDomain": pod.info.trust_domain,
                    "serviceAccount": pod.info.service_account,
                },
            });
            (key.clone(), state)
        })
        .collect();
    let bypasses = node
        .bypasses
        .all()
        .into_iter()
        .map(|(pair, count)| json!({ "source": &*pair.source, "destination": &*pair.destination, "connections": count }));
    json!({
        "workloads": mesh.workloads().iter().map(|one| workload(one)).collect::<Vec<_>>(),
        "services": mesh.services().iter().map(|one| service(node, one)).collect::<Vec<_>>(),
        "policies": node.policies.all().values().map(|one| policy(one)).collect::<Vec<_>>(),
        "certificates": node.certificates.all().iter().map(|(id, identity)| certificate(id.as_str(), identity)).collect::<Vec<_>>(),
        "workloadState": states,
        "waypointBypasses": bypasses.collect::<Vec<_>>(),
        "version": { "version": env!("CARGO_PKG_VERSION"), "istioVersion": crate::settings::ISTIO_VERSION },
        "config": { "clusterId": &*node.settings.cluster, "localNode": &*node.settings.node, "network": &**mesh.network() },
    })
}

fn gateway(gateway: &Gateway) -> Value {
    let destination = match &gateway.target {
        GatewayTarget::Service(key) => key.to_string(),
        GatewayTarget::Address(network, address) => format!("{network}/{address}"),
    };
    json!({ "destination": destination, "hboneMtlsPort": gateway.port })
}

fn workload(workload: &Workload) -> Value {
    let facts = &workload.facts;
    let mut shown = json!({
        "uid": &*facts.uid,
        "workloadIps": workload.addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>(),
        "protocol": match workload.tunnel { Tunnel::None => "TCP", Tunnel::Hbone => "HBONE" },
        "name": &*facts.name,
        "namespace": &*facts.namespace,
        "serviceAccount": &*facts.service_account,
        "workloadName": &*facts.workload_name,
        "workloadType": facts.workload_type,
        "canonicalName": &*facts.canonical_name,
        "canonicalRevision": &*facts.canonical_revision,
        "clusterId": &*facts.cluster,
        "trustDomain": facts.identity.as_ref().map(|id| id.trust_domain()),
        "locality": { "region": &*facts.region, "zone": &*facts.zone, "subzone": &*workload.subzone },
        "node": &*workload.node,
        "network": &*facts.network,
        "status": if workload.healthy { "Healthy" } else { "Unhealthy" },
        "hostname": &*workload.hostname,
        "nativeTunnel": workload.native_tunnel,
        "networkMode": if workload.host_network { "HostNetwork" } else { "Standard" },
        "capacity": workload.capacity,
        "authorizationPolicies": workload.policies.iter().map(|key| &**key).collect::<Vec<_>>(),
        "services": workload.services.iter().map(|(key, _)| &**key).collect::<Vec<_>>(),
    });
    if let Some(shown) = shown.as_object_mut() {
        shown.extend(workload.waypoint.iter().map(|one| ("waypoint".to_owned(), gateway(one))));
        shown.extend(
            workload
                .network_gateway
                .iter()
                .map(|one| ("networkGateway".to_owned(), gateway(one))),
        );
        shown.extend(workload.application_tunnel.iter().map(|tunnel| {
            let protocol = match tunnel.protocol {
                ApplicationProtocol::None => "NONE",
                ApplicationProtocol::Proxy => "PROXY",
            };
            (
                "applicationTunnel".to_owned(),
                json!({ "protocol": protocol, "port": tunnel.port }),
            )
        }));
    }
    shown
}

fn ports(ports: &[(u16, u16)]) -> Value {
    let entries = ports.iter().map(|(port, target)| (port.to_string(), json!(target)));
    Value::Object(entries.collect())
}

fn service(node: &Node, service: &Service) -> Value {
    let endpoints = node
        .mesh
        .endpoints(&service.key)
        .map(|endpoints| endpoints.all())
        .unwrap_or_default();
    let endpoints = endpoints.iter().map(|(workload, of)| {
        let shown = json!({
            "workloadUid": &**workload.uid(),
            "service": &*service.key,
            "port": ports(of),
            "status": if workload.healthy { "Healthy" } else { "Unhealthy" },
        });
        (workload.uid().to_string(), shown)
    });
    let vip = |vip: &crate::mesh::Vip| {
        let single = vip.range.prefix_len() == vip.range.max_prefix_len();
        let range = if single {
            vip.range.addr().to_string()
        } else {
            vip.range.to_string()
        };
        format!("{}/{range}", vip.network)
    };
    let mut shown = json!({
        "name": &*service.name,
        "namespace": &*service.namespace,
        "hostname": &*service.hostname,
        "vips": service.vips.iter().map(vip).collect::<Vec<_>>(),
        "ports": ports(&service.ports),
        "endpoints": endpoints.collect::<Map<_, _>>(),
        "subjectAltNames": service.subject_alt_names.iter().map(|id| id.as_str()).collect::<Vec<_>>(),
        "ipFamilies": match service.families { Families::Any => "", Families::V4 => "IPv4", Families::V6 => "IPv6" },
        "canonical": service.canonical,
    });
    if let Some(shown) = shown.as_object_mut() {
        shown.extend(service.waypoint.iter().map(|one| ("waypoint".to_owned(), gateway(one))));
        shown.extend(service.load_balancing.iter().map(|terms| {
            let mode = match terms.mode {
                Mode::Unspecified => "Standard",
                Mode::Strict => "Strict",
                Mode::Failover => "Failover",
                Mode::Passthrough => "Passthrough",
            };
            let scope = |scope: &Scope| match scope {
                Scope::Region => "Region",
                Scope::Zone => "Zone",
                Scope::Subzone => "Subzone",
                Scope::Node => "Node",
                Scope::Cluster => "Cluster",
                Scope::Network => "Network",
            };
            let health = match terms.health {
                HealthPolicy::OnlyHealthy => "OnlyHealthy",
                HealthPolicy::AllowAll => "AllowAll",
            };
            let shown = json!({
                "mode": mode,
                "routingPreferences": terms.preference.iter().map(scope).collect::<Vec<_>>(),
                "healthPolicy": health,
            });
            ("loadBalancer".to_owned(), shown)
        }));
    }
    shown
}

fn policy(policy: &Policy) -> Value {
    json!({
        "name": &*policy.name,
        "namespace": &*policy.namespace,
        "scope": match policy.scope {
            PolicyScope::Global => "Global",
            PolicyScope::Namespace => "Namespace",
            PolicyScope::Selector => "WorkloadSelector",
        },
        "action": match policy.action { Action::Allow => "Allow", Action::Deny => "Deny" },
        "dryRun": policy.dry_run,
        "unreadable": policy.wire.is_none(),
        "rules": policy.wire.as_deref().map(rules).unwrap_or_default(),
    })
}

fn rules(wire: &Authorization) -> Vec<Vec<Vec<Value>>> {
    let clause = |clause: &cairn_proto::istio::security::Rules| clause.matches.iter().map(one_match).collect();
    wire.groups
        .iter()
        .map(|group| group.rules.iter().map(clause).collect())
        .collect()
}

fn one_match(wire: &Match) -> Value {
    let texts = |all: &[StringMatch]| -> Value {
        let shown = all.iter().filter_map(|one| {
            Some(match one.match_type.as_ref()? {
                MatchType::Exact(text) => json!({ "Exact": text }),
                MatchType::Prefix(text) => json!({ "Prefix": text }),
                MatchType::Suffix(text) => json!({ "Suffix": text }),
                MatchType::Presence(()) => json!({ "Presence": {} }),
            })
        });
        shown.collect()
    };
    let ranges = |all: &[Address]| -> Value {
        let shown = all
            .iter()
            .filter_map(|one| Some(json!(format!("{}/{}", wds::ip(&one.address)?, one.length))));
        shown.collect()
    };
    let accounts = |all: &[cairn_proto::istio::security::ServiceAccountMatch]| -> Value {
        let shown = all
            .iter()
            .map(|one| json!({ "namespace": one.namespace, "serviceAccount": one.service_account }));
        shown.collect()
    };
    let fields = [
        ("namespaces", texts(&wire.namespaces)),
        ("notNamespaces", texts(&wire.not_namespaces)),
        ("serviceAccounts", accounts(&wire.service_accounts)),
        ("notServiceAccounts", accounts(&wire.not_service_accounts)),
        ("principals", texts(&wire.principals)),
        ("notPrincipals", texts(&wire.not_principals)),
        ("sourceIps", ranges(&wire.source_ips)),
        ("notSourceIps", ranges(&wire.not_source_ips)),
        ("destinationIps", ranges(&wire.destination_ips)),
        ("notDestinationIps", ranges(&wire.not_destination_ips)),
        ("destinationPorts", json!(wire.destination_ports)),
        ("notDestinationPorts", json!(wire.not_destination_ports)),
    ];
    let said = fields
        .into_iter()
        .filter(|(_, value)| value.as_array().is_some_and(|all| !all.is_empty()));
    Value::Object(said.map(|(name, value)| (name.to_owned(), value)).collect())
}

fn certificate(id: &str, identity: &Identity) -> Value {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    let Some(credentials) = identity.current() else {
        let why = identity.unavailable().map(|why| why.to_string()).unwrap_or_default();
        return json!({ "identity": id, "state": format!("Unavailable: {why}"), "certChain": [] });
    };
    let date = |time| OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default();
    let serial = u128::from_str_radix(credentials.serial(), 16)
        .map_or_else(|_| credentials.serial().to_owned(), |number| number.to_string());
    let pem = |der: &[u8]| {
        let text = BASE64_STANDARD.encode(der);
        let lines: Vec<_> = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line)).collect();
        let pem = format!(
            "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
            lines.join("\n")
        );
        BASE64_STANDARD.encode(pem)
    };
    let chain = credentials.chain().iter().enumerate().map(|(at, der)| match at {
        0 => json!({
            "pem": pem(der),
            "serialNumber": serial,
            "validFrom": date(credentials.not_before()),
            "expirationTime": date(credentials.not_after()),
        }),
        _ => json!({ "pem": pem(der) }),
    });
    let roots = credentials.roots().iter().map(|der| json!({ "pem": pem(der) }));
    let state = if clock::wall() < credentials.not_after() {
        "Available"
    } else {
        "Expired"
    };
    json!({
        "identity": id,
        "state": state,
        "certChain": chain.collect::<Vec<_>>(),
        "rootCerts": roots.collect::<Vec<_>>(),
    })
}
