//! The labels of a series, in the order and with the defaults of the stock filter for waypoints (contract runtime §7.2).

use std::{
    hash::{Hash, Hasher},
    sync::Arc,
};

use cairn_exchange::{ClusterFacts, Exchange, ResponseFlags, SpiffeId, Workload};

use super::rules;

pub(super) const UNKNOWN: &str = "unknown";
/// The revision of a source that has none; a destination's is `unknown`.
const LATEST: &str = "latest";

/// Clusters whose name is shown for want of a service.
const NAMED_CLUSTERS: [&str; 5] = [
    "BlackHoleCluster",
    "PassthroughCluster",
    "InboundPassthroughCluster",
    "InboundPassthroughClusterIpv4",
    "InboundPassthroughClusterIpv6",
];

/// Which metrics a series has, and what they know beside the parties.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum What {
    /// Of finished requests.
    Http { grpc: bool, status: u16, code: Option<u32> },
    /// Of gRPC messages.
    Messages,
    /// Of TCP connections.
    Tcp,
}

/// Everything that the labels are made from; `Arc`s are compared by address, which [`Parties::keep`] makes safe to store.
#[derive(Debug)]
pub(super) struct Parties<W = Arc<Workload>, C = Arc<ClusterFacts>, P = SpiffeId> {
    what: What,
    source: Option<W>,
    peer: Option<P>,
    mutual_tls: bool,
    destination: Option<W>,
    cluster: Option<C>,
    flags: ResponseFlags,
    /// Where what the chain's filter changes stands.
    rules: usize,
    /// Values of its labels.
    values: Box<[Box<str>]>,
}

/// The same, borrowed from an exchange.
pub(super) type Borrowed<'a> = Parties<&'a Arc<Workload>, &'a Arc<ClusterFacts>, &'a SpiffeId>;

pub(super) fn parties(exchange: &Exchange, what: What, rules: usize, values: Box<[Box<str>]>) -> Borrowed<'_> {
    let connection = &exchange.connection;
    let with_outcome = what != What::Messages;
    Parties {
        what,
        source: connection.source.as_ref(),
        peer: connection.peer.as_ref(),
        mutual_tls: with_outcome && connection.peer.is_some() && connection.local.is_some(),
        destination: exchange.upstream.as_ref().and_then(|upstream| upstream.workload.as_ref()),
        cluster: exchange.cluster.as_ref(),
        flags: if with_outcome { exchange.flags } else { ResponseFlags::NONE },
        rules,
        values,
    }
}

// === impl What ===

impl What {
    /// Its metrics.
    pub(super) fn metrics(self) -> rules::Range {
        match self {
            Self::Http { .. } => rules::HTTP,
            Self::Messages => rules::MESSAGES,
            Self::Tcp => rules::TCP,
        }
    }
}

// === impl Parties ===

impl Parties {
    /// Whether these are the very same.
    pub(super) fn are(&self, other: &Borrowed<'_>) -> bool {
        fn same<T>(kept: &Option<Arc<T>>, other: Option<&Arc<T>>) -> bool {
            match (kept, other) {
                (Some(kept), Some(other)) => Arc::ptr_eq(kept, other),
                (None, None) => true,
                _ => false,
            }
        }
        self.what == other.what
            && self.flags == other.flags
            && self.mutual_tls == other.mutual_tls
            && self.rules == other.rules
            && self.values == other.values
            && same(&self.source, other.source)
            && same(&self.destination, other.destination)
            && same(&self.cluster, other.cluster)
            && self.peer.as_ref() == other.peer
    }
}

impl Borrowed<'_> {
    /// Values of the labels that a filter changes.
    pub(super) fn values(&self) -> &[Box<str>] {
        &self.values
    }

    /// Keeps them alive.
    pub(super) fn keep(&self) -> Parties {
        Parties {
            what: self.what,
            source: self.source.cloned(),
            peer: self.peer.cloned(),
            mutual_tls: self.mutual_tls,
            destination: self.destination.cloned(),
            cluster: self.cluster.cloned(),
            flags: self.flags,
            rules: self.rules,
            values: self.values.clone(),
        }
    }
}

impl Hash for Borrowed<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        fn address<T>(object: Option<&Arc<T>>) -> usize {
            object.map_or(0, |object| Arc::as_ptr(object).addr())
        }
        self.what.hash(state);
        self.flags.hash(state);
        self.mutual_tls.hash(state);
        state.write_usize(address(self.source));
        state.write_usize(address(self.destination));
        state.write_usize(address(self.cluster));
        self.peer.hash(state);
        state.write_usize(self.rules);
        self.values.hash(state);
    }
}

/// Works with the labels and their values, in order.
pub(super) fn with<T>(parties: &Borrowed<'_>, f: impl FnOnce(&[(&str, &str)]) -> T) -> T {
    let source = |field: fn(&Workload) -> &str| or(parties.source.map(|workload| field(workload)), UNKNOWN);
    let destination = |field: fn(&Workload) -> &str| or(parties.destination.map(|workload| field(workload)), UNKNOWN);
    let peer_namespace = parties.peer.and_then(|peer| peer.namespace());
    let identity = parties.destination.and_then(|workload| workload.identity.as_ref());
    let (service, service_name, service_namespace) = service(parties.cluster.map(|cluster| &**cluster));
    let mut pairs = vec![
        ("reporter", "waypoint"),
        ("source_workload", source(|workload| &workload.workload_name)),
        ("source_canonical_service", source(|workload| &workload.canonical_name)),
        (
            "source_canonical_revision",
            or(parties.source.map(|workload| &*workload.canonical_revision), LATEST),
        ),
        (
            "source_workload_namespace",
            or(peer_namespace, source(|workload| &workload.namespace)),
        ),
        ("source_principal", or(parties.peer.map(|peer| peer.as_str()), UNKNOWN)),
        ("source_app", source(|workload| &workload.canonical_name)),
        ("source_version", source(|workload| &workload.canonical_revision)),
        ("source_cluster", source(|workload| &workload.cluster)),
        ("destination_workload", destination(|workload| &workload.workload_name)),
        ("destination_workload_namespace", destination(|workload| &workload.namespace)),
        (
            "destination_principal",
            or(identity.map(|identity| identity.as_str()), UNKNOWN),
        ),
        ("destination_app", destination(|workload| &workload.canonical_name)),
        ("destination_version", destination(|workload| &workload.canonical_revision)),
        ("destination_service", service),
        (
            "destination_canonical_service",
            destination(|workload| &workload.canonical_name),
        ),
        (
            "destination_canonical_revision",
            destination(|workload| &workload.canonical_revision),
        ),
        ("destination_service_name", service_name),
        ("destination_service_namespace", service_namespace),
        ("destination_cluster", destination(|workload| &workload.cluster)),
    ];
    let (mut status_text, mut code_text) = (itoa::Buffer::new(), itoa::Buffer::new());
    let flags = parties.flags.to_string();
    match parties.what {
        What::Messages => {}
        What::Http { grpc, status, code } => pairs.extend([
            ("request_protocol", if grpc { "grpc" } else { "http" }),
            ("response_code", status_text.format(status)),
            ("grpc_response_status", code.map_or("", |code| code_text.format(code))),
        ]),
        What::Tcp => pairs.push(("request_protocol", "tcp")),
    }
    if parties.what != What::Messages {
        let policy = if parties.mutual_tls { "mutual_tls" } else { "none" };
        pairs.extend([("response_flags", &*flags), ("connection_security_policy", policy)]);
    }
    f(&pairs)
}

/// Host, name and namespace of the service that a cluster stands for.
fn service(cluster: Option<&ClusterFacts>) -> (&str, &str, &str) {
    let Some(cluster) = cluster else {
        return (UNKNOWN, UNKNOWN, UNKNOWN);
    };
    if NAMED_CLUSTERS.contains(&&*cluster.name) {
        return (UNKNOWN, &cluster.name, UNKNOWN);
    }
    let Some(service) = &cluster.service else {
        return (UNKNOWN, UNKNOWN, UNKNOWN);
    };
    let first_label = service.host.split('.').next();
    (
        or(Some(&service.host), UNKNOWN),
        or(Some(&service.name), or(first_label, UNKNOWN)),
        or(Some(&service.namespace), UNKNOWN),
    )
}

fn or<'a>(text: Option<&'a str>, default: &'a str) -> &'a str {
    text.filter(|text| !text.is_empty()).unwrap_or(default)
}
