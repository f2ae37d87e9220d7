//! The headers of a CONNECT: who we are (`baggage`), where the client is (`forwarded`), and a number to find both ends' lines by.
//!
//! What a peer says of itself serves its labels where the mesh does not know it, and decides nothing.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::mesh::Workload;

/// What a peer says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claimed {
    /// `k8s.cluster.name`
    pub cluster: Box<str>,
    /// `k8s.namespace.name`
    pub namespace: Box<str>,
    /// `k8s.deployment.name` and the like.
    pub workload: Box<str>,
    /// `service.name`
    pub service: Box<str>,
    /// `service.version`
    pub version: Box<str>,
    /// `cloud.region`
    pub region: Box<str>,
    /// `cloud.availability_zone`
    pub zone: Box<str>,
}

/// Longest header that is read.
const LONGEST: usize = 4096;
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// What we say of a workload.
pub fn of(workload: &Workload) -> Option<HeaderValue> {
    let facts = &workload.facts;
    let kind = format!("k8s.{}.name", facts.workload_type);
    let parts = [
        ("k8s.cluster.name", &facts.cluster),
        ("k8s.namespace.name", &facts.namespace),
        (&*kind, &facts.workload_name),
        ("service.name", &facts.canonical_name),
        ("service.version", &facts.canonical_revision),
        ("cloud.region", &facts.region),
        ("cloud.availability_zone", &facts.zone),
    ];
    let said = parts.iter().filter(|(_, value)| !value.is_empty());
    let text: Vec<_> = said.map(|(name, value)| format!("{name}={value}")).collect();
    HeaderValue::try_from(text.join(",")).ok()
}

/// The headers of a CONNECT from this workload, for a client at this address, to this host.
pub fn connect(from: &Workload, client: SocketAddr, host: Option<&str>) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(3);
    if let Some(baggage) = of(from) {
        headers.insert(BAGGAGE, baggage);
    }
    let host = host.map(|host| format!(";host={host}")).unwrap_or_default();
    if let Ok(forwarded) = HeaderValue::try_from(format!("for=\"{client}\"{host}")) {
        headers.insert(HeaderName::from_static("forwarded"), forwarded);
    }
    let (trace, span) = (fastrand::u128(1..), fastrand::u64(1..));
    if let Ok(parent) = HeaderValue::try_from(format!("00-{trace:032x}-{span:016x}-00")) {
        headers.insert(HeaderName::from_static("traceparent"), parent);
    }
    headers
}

/// What a peer says of itself; nothing of what is too long or no text.
pub fn read(headers: &HeaderMap) -> Option<Box<Claimed>> {
    let text = headers.get(BAGGAGE)?.to_str().ok().filter(|text| text.len() <= LONGEST)?;
    let mut claimed = Box::<Claimed>::default();
    for (name, value) in text.split(',').filter_map(|part| part.trim().split_once('=')) {
        let slot = match name {
            "k8s.cluster.name" => &mut claimed.cluster,
            "k8s.namespace.name" => &mut claimed.namespace,
            "k8s.deployment.name" | "k8s.cronjob.name" | "k8s.pod.name" | "k8s.job.name" => &mut claimed.workload,
            "service.name" => &mut claimed.service,
            "service.version" => &mut claimed.version,
            "cloud.region" => &mut claimed.region,
            "cloud.availability_zone" => &mut claimed.zone,
            _ => continue,
        };
        *slot = value.into();
    }
    Some(claimed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn what_is_said_is_what_is_read_and_garbage_is_nothing() {
        let web = testing::workload("web", &[]);
        let headers = connect(&web, "10.1.0.5:1234".parse().unwrap(), Some("web.app.svc"));
        assert_eq!(
            headers["baggage"],
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=app,k8s.deployment.name=web,service.name=web,service.version=v1"
        );
        assert_eq!(headers["forwarded"], "for=\"10.1.0.5:1234\";host=web.app.svc");
        let claimed = read(&headers).unwrap();
        assert_eq!(
            (&*claimed.workload, &*claimed.namespace, &*claimed.version),
            ("web", "app", "v1")
        );
        let garbage = |text: &[u8]| read(&[(BAGGAGE, HeaderValue::from_bytes(text).unwrap())].into_iter().collect());
        assert_eq!(garbage(b"=,,=;\"k8s.cluster.name"), Some(Box::default()));
        assert_eq!(garbage(&[b'a'; LONGEST + 1]), None);
        assert_eq!(garbage(b"service.name=\xff"), None);
    }
}
