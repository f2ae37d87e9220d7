//! What the mesh says of a name: a pure function of question and table.
//!
//! A name may be short (`web`, `web.app`, `web.app.svc`), whole, one that a wildcard covers, or one that a resolver has put a search
//! domain behind (`api.example.com.app.svc.cluster.local`): then the answer leads from there to the name that was meant.
//! A service without an address of its own has those of its endpoints.

use std::{net::IpAddr, sync::Arc};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata},
};

use crate::mesh::{Mesh, Service};

/// How long an answer may be kept, in seconds: as long as clients may go without a change.
const TTL: u32 = 30;
/// Addresses in one answer.
const MOST_ADDRESSES: usize = 64;

/// Whether a message is a question that can be answered or passed on.
pub fn is_question(message: &Message) -> bool {
    let metadata = &message.metadata;
    metadata.message_type == MessageType::Query && metadata.op_code == OpCode::Query && message.queries.len() == 1
}

/// An answer to be filled.
pub fn response_to(asked: &Message) -> Message {
    let mut response = Message::response(asked.metadata.id, asked.metadata.op_code);
    response.metadata.recursion_desired = asked.metadata.recursion_desired;
    response.metadata.recursion_available = true;
    response.add_queries(asked.queries.iter().cloned());
    response
}

/// The answer, when the name is one of the mesh, seen from a namespace.
pub fn answer(mesh: &Mesh, namespace: &str, domain: &str, asked: &Message) -> Option<Message> {
    let query: &Query = asked.queries.first()?;
    if query.query_class() != DNSClass::IN || !matches!(query.query_type(), RecordType::A | RecordType::AAAA) {
        // Other questions about our names are the cluster's to answer.
        return None;
    }
    let name = query.name().to_lowercase().to_ascii();
    let (meant, service) = find(mesh, namespace, domain, name.trim_end_matches('.'))?;
    let mut response = response_to(asked);
    response.metadata.authoritative = true;
    let mut owner = query.name().clone();
    if let Some(meant) = meant {
        let target = Name::from_ascii(format!("{meant}.")).ok()?;
        response.add_answer(Record::from_rdata(owner, TTL, RData::CNAME(rdata::CNAME(target.clone()))));
        owner = target;
    }
    for address in addresses(mesh, &service) {
        let data = match (address, query.query_type()) {
            (IpAddr::V4(v4), RecordType::A) => RData::A(rdata::A(v4)),
            (IpAddr::V6(v6), RecordType::AAAA) => RData::AAAA(rdata::AAAA(v6)),
            _ => continue,
        };
        response.add_answer(Record::from_rdata(owner.clone(), TTL, data));
    }
    // No address of this family: an answer without records says that there is the name, and keeps the client from asking elsewhere.
    Some(response)
}

/// The service of a name, and the name that was meant when a search domain has to be taken off.
fn find(mesh: &Mesh, namespace: &str, domain: &str, name: &str) -> Option<(Option<String>, Arc<Service>)> {
    let services = format!("svc.{domain}");
    let mut whole = vec![name.to_owned()];
    match name.split('.').count() {
        1 => whole.push(format!("{name}.{namespace}.{services}")),
        2 => whole.push(format!("{name}.{services}")),
        3 if name.ends_with(".svc") => whole.push(format!("{name}.{domain}")),
        _ => {}
    }
    let exact = |name: &str| mesh.service_named(name, namespace);
    if let Some(service) = whole.iter().find_map(|name| exact(name)) {
        return Some((None, service));
    }
    let search = [format!("{namespace}.{services}"), services.clone(), domain.to_owned()];
    for suffix in search {
        let Some(bare) = name.strip_suffix(&suffix).and_then(|rest| rest.strip_suffix('.')) else {
            continue;
        };
        // A single label with the domain behind it is nothing that a search would have been made for.
        if bare.contains('.')
            && let Some(service) = exact(bare).or_else(|| wildcard(mesh, namespace, bare))
        {
            return Some((Some(bare.to_owned()), service));
        }
    }
    wildcard(mesh, namespace, name).map(|service| (None, service))
}

/// The service of the longest wildcard that covers a name.
fn wildcard(mesh: &Mesh, namespace: &str, name: &str) -> Option<Arc<Service>> {
    let mut rest = name;
    while let Some((_, shorter)) = rest.split_once('.') {
        if let Some(service) = mesh.service_named(&format!("*.{shorter}"), namespace) {
            return Some(service);
        }
        rest = shorter;
    }
    None
}

/// Addresses of a service in our network, else of its endpoints.
fn addresses(mesh: &Mesh, service: &Service) -> Vec<IpAddr> {
    let own = service.vips.iter().filter(|vip| *vip.network == **mesh.network());
    let own: Vec<_> = own
        .filter(|vip| vip.range.prefix_len() == vip.range.max_prefix_len())
        .map(|vip| vip.range.addr())
        .filter(|address| !address.is_unspecified())
        .collect();
    if !own.is_empty() {
        return own;
    }
    let endpoints = mesh.endpoints(&service.key);
    endpoints.map_or_else(Vec::new, |endpoints| endpoints.addresses(service.families, MOST_ADDRESSES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn mesh() -> Mesh {
        let mesh = Mesh::new("");
        for (key, addresses) in [
            ("app/web.app.svc.cluster.local", &["10.0.0.1", "fd00::1"][..]),
            ("other/web.other.svc.cluster.local", &["10.0.0.2"]),
            ("app/api.example.com", &["240.0.0.1"]),
            ("app/*.wild.example.com", &["240.0.0.2"]),
            ("app/headless.app.svc.cluster.local", &[]),
        ] {
            mesh.insert_service(testing::service(key, addresses, &[(80, 80)]));
        }
        for (name, address) in [("h1", "10.1.0.1"), ("h2", "10.1.0.2")] {
            let mut pod = testing::workload(name, &[address]);
            pod.services = Box::new([("app/headless.app.svc.cluster.local".into(), Arc::from([(80, 80)]))]);
            mesh.insert_workload(pod);
        }
        mesh
    }

    fn ask(name: &str, kind: RecordType) -> Option<String> {
        let mut asked = Message::query();
        asked.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let answer = answer(&mesh(), "app", "cluster.local", &asked)?;
        assert_eq!((answer.metadata.id, answer.metadata.authoritative), (asked.metadata.id, true));
        let mut records: Vec<_> = answer.answers.iter().map(|record| record.data.to_string()).collect();
        records.sort();
        Some(records.join(" "))
    }

    #[test]
    fn names_are_found_short_whole_by_wildcard_and_behind_a_search_domain() {
        use RecordType::{A, AAAA, MX};
        let cases = [
            ("web.", A, Some("10.0.0.1")),
            ("WEB.app.", A, Some("10.0.0.1")),
            ("web.other.", A, Some("10.0.0.2")),
            ("web.other.svc.", A, Some("10.0.0.2")),
            ("web.other.svc.cluster.local.", A, Some("10.0.0.2")),
            ("web.app.svc.cluster.local.", AAAA, Some("fd00::1")),
            ("web.other.svc.cluster.local.", AAAA, Some("")),
            ("web.app.svc.cluster.local.", MX, None),
            ("web.nowhere.", A, None),
            ("api.example.com.", A, Some("240.0.0.1")),
            (
                "api.example.com.app.svc.cluster.local.",
                A,
                Some("240.0.0.1 api.example.com."),
            ),
            ("api.example.com.svc.cluster.local.", A, Some("240.0.0.1 api.example.com.")),
            ("api.example.com.cluster.local.", A, Some("240.0.0.1 api.example.com.")),
            ("a.wild.example.com.", A, Some("240.0.0.2")),
            ("a.b.wild.example.com.", A, Some("240.0.0.2")),
            ("wild.example.com.", A, None),
            ("headless.", A, Some("10.1.0.1 10.1.0.2")),
            ("headless.", AAAA, Some("")),
            ("www.example.org.", A, None),
        ];
        for (name, kind, want) in cases {
            assert_eq!(ask(name, kind).as_deref(), want, "{name} {kind}");
        }
    }
}
