//! The labels of a connection, in their order; what is not known is `unknown`.

use cairn_telemetry::prometheus;

use super::{Flag, Parties, Reporter};

const UNKNOWN: &str = "unknown";

/// The labels as they stand between the braces.
pub(super) fn render(parties: &Parties, flag: Flag) -> Box<str> {
    let source = parties.source.as_ref().map(|workload| &*workload.facts);
    let claimed = parties.claimed.as_deref().filter(|_| source.is_none());
    let destination = parties.destination.as_ref().map(|workload| &*workload.facts);
    let service = parties.service.as_deref();
    let or = |known: Option<&str>, claim: Option<&str>| {
        let text = known.or(claim).filter(|text| !text.is_empty());
        text.unwrap_or(UNKNOWN).to_owned()
    };
    let from = |known: fn(&cairn_exchange::Workload) -> &str, claim: fn(&crate::baggage::Claimed) -> &str| {
        or(source.map(known), claimed.map(claim))
    };
    let to = |known: fn(&cairn_exchange::Workload) -> &str| or(destination.map(known), None);
    let of = |known: fn(&crate::mesh::Service) -> &str| or(service.map(known), None);
    let identity = parties.source_identity.as_ref();
    let pairs = [
        (
            "reporter",
            match parties.reporter {
                Reporter::Source => "source",
                Reporter::Destination => "destination",
            }
            .to_owned(),
        ),
        ("source_workload", from(|w| &w.workload_name, |c| &c.workload)),
        ("source_canonical_service", from(|w| &w.canonical_name, |c| &c.service)),
        ("source_canonical_revision", from(|w| &w.canonical_revision, |c| &c.version)),
        ("source_workload_namespace", from(|w| &w.namespace, |c| &c.namespace)),
        ("source_principal", or(identity.map(|id| id.as_str()), None)),
        ("source_app", from(|w| &w.canonical_name, |c| &c.service)),
        ("source_version", from(|w| &w.canonical_revision, |c| &c.version)),
        ("source_cluster", from(|w| &w.cluster, |c| &c.cluster)),
        ("destination_service", of(|s| &s.hostname)),
        ("destination_service_namespace", of(|s| &s.namespace)),
        ("destination_service_name", of(|s| &s.name)),
        ("destination_workload", to(|w| &w.workload_name)),
        ("destination_canonical_service", to(|w| &w.canonical_name)),
        ("destination_canonical_revision", to(|w| &w.canonical_revision)),
        ("destination_workload_namespace", to(|w| &w.namespace)),
        (
            "destination_principal",
            or(destination.and_then(|w| w.identity.as_ref()).map(|id| id.as_str()), None),
        ),
        ("destination_app", to(|w| &w.canonical_name)),
        ("destination_version", to(|w| &w.canonical_revision)),
        ("destination_cluster", to(|w| &w.cluster)),
        ("request_protocol", "tcp".to_owned()),
        (
            "response_flags",
            match flag {
                Flag::None => "-",
                Flag::Denied => "DENY",
                Flag::Connect => "CONNECT",
            }
            .to_owned(),
        ),
        (
            "connection_security_policy",
            if parties.mutual_tls { "mutual_tls" } else { UNKNOWN }.to_owned(),
        ),
        ("source_region", from(|w| &w.region, |c| &c.region)),
        ("source_zone", from(|w| &w.zone, |c| &c.zone)),
        ("destination_region", to(|w| &w.region)),
        ("destination_zone", to(|w| &w.zone)),
    ];
    prometheus::labels(pairs.iter().map(|(name, value)| (*name, value.as_str())))
}
