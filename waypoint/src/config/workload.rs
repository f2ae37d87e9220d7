//! Workload discovery (contract runtime §7.3): `istio.workload.Workload` and `istio.workload.Address` into the table of who is
//! who.
//!
//! istiod leaves out what is at its default; the defaults are filled in here. A resource that is malformed is named, the others
//! apply. Nothing here can refuse traffic: a peer that is not known only has fewer labels.

use std::net::IpAddr;

use cairn_exchange::{SpiffeId, Workload};
use cairn_proto::istio::workload::{
    Address, NetworkAddress, Service as WdsService, Workload as WdsWorkload, WorkloadType, address::Type,
};

use super::{
    any::{Unknown, decode},
    report::{Malformed, Notes, unneeded},
};
use crate::workloads::{MeshService, Workloads};

/// Trust domain, namespace and service account where istiod leaves them out.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT: &str = "default";

/// Applies one resource of type `istio.workload.Workload`.
pub(crate) fn apply_workload(name: &str, bytes: &[u8], workloads: &Workloads) -> Result<(), Malformed> {
    let mut notes = Notes::of(name);
    let workload: WdsWorkload = decode(bytes, Unknown::Ignored, &mut notes)?;
    insert_workload(name, workload, workloads, &notes)
}

/// Applies one resource of type `istio.workload.Address`.
pub(crate) fn apply_address(name: &str, bytes: &[u8], workloads: &Workloads) -> Result<(), Malformed> {
    let mut notes = Notes::of(name);
    let Address { r#type } = decode(bytes, Unknown::Ignored, &mut notes)?;
    match r#type {
        Some(Type::Workload(workload)) => insert_workload(name, workload, workloads, &notes),
        Some(Type::Service(service)) => insert_service(name, service, workloads, &notes),
        None => Err(notes.malformed("type", "is neither a workload nor a service")),
    }
}

fn insert_workload(resource: &str, workload: WdsWorkload, workloads: &Workloads, notes: &Notes) -> Result<(), Malformed> {
    let WdsWorkload {
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
        extensions,
        capacity,
    } = workload;
    // How a workload is reached is said by endpoints; these are for ztunnel.
    unneeded!(
        hostname,
        tunnel_protocol,
        waypoint,
        network_gateway,
        node,
        native_tunnel,
        application_tunnel,
        services
    );
    unneeded!(authorization_policies, status, network_mode, extensions, capacity);
    if uid != resource {
        return Err(notes.malformed("uid", format!("`{uid}` is not the name of the resource")));
    }
    let or = |value: String, default: &str| if value.is_empty() { default.to_owned() } else { value };
    let (trust_domain, namespace, account) = (
        or(trust_domain, DEFAULT_TRUST_DOMAIN),
        or(namespace, DEFAULT),
        or(service_account, DEFAULT),
    );
    let workload_type = match WorkloadType::try_from(workload_type) {
        Ok(WorkloadType::Deployment) => "deployment",
        Ok(WorkloadType::Cronjob) => "cronjob",
        Ok(WorkloadType::Job) => "job",
        Ok(WorkloadType::Pod) | Err(_) => "pod",
    };
    let locality = locality.unwrap_or_default();
    let addresses = addresses
        .iter()
        .map(|bytes| {
            address(bytes).ok_or_else(|| notes.malformed("addresses", format!("{} bytes are no IP address", bytes.len())))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let workload = Workload {
        uid: uid.into(),
        name: name.into(),
        identity: SpiffeId::workload(&trust_domain, &namespace, &account).ok(),
        namespace: namespace.into(),
        network: network.into(),
        service_account: account.into(),
        canonical_name: canonical_name.into(),
        canonical_revision: canonical_revision.into(),
        workload_type,
        workload_name: workload_name.into(),
        cluster: cluster_id.into(),
        region: locality.region.into(),
        zone: locality.zone.into(),
    };
    workloads.insert_workload(workload, addresses);
    Ok(())
}

fn insert_service(resource: &str, service: WdsService, workloads: &Workloads, notes: &Notes) -> Result<(), Malformed> {
    let WdsService {
        name,
        namespace,
        hostname,
        addresses,
        ports,
        subject_alt_names,
        waypoint,
        load_balancing,
        ip_families,
        extensions,
        canonical,
        ingress_use_waypoint,
        weighted_waypoints,
        visibility,
    } = service;
    unneeded!(
        name,
        ports,
        subject_alt_names,
        waypoint,
        load_balancing,
        ip_families,
        extensions,
        canonical
    );
    unneeded!(ingress_use_waypoint, weighted_waypoints, visibility);
    // An address of another network is not one that our clients use, and may be another service's here.
    let mut own = Vec::with_capacity(addresses.len());
    for NetworkAddress {
        network,
        address: bytes,
        length,
    } in addresses
    {
        unneeded!(length);
        if *network == *workloads.network() {
            let of_wrong_length = || notes.malformed("addresses", format!("{} bytes are no IP address", bytes.len()));
            own.push(address(&bytes).ok_or_else(of_wrong_length)?);
        }
    }
    let service = MeshService {
        name: resource.into(),
        hostname: hostname.into(),
        namespace: namespace.into(),
        addresses: own,
    };
    workloads.insert_service(service);
    Ok(())
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes)
            .ok()
            .map(|bytes| IpAddr::from(bytes).to_canonical()),
        _ => None,
    }
}
