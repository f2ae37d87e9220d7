//! Which policy denied a request, told to clients that may know it.
//!
//! An answer of 403 tells its reader nothing; for clients of namespaces that the operator trusts (`CAIRN_DENY_DETAIL_NAMESPACES`) it
//! carries the header `x-cairn-denied-by`. Whoever is denied learns the names of policies by it, so nobody is told by default. A
//! client's namespace is that of its certificate, never of anything that it says.

use std::sync::Arc;

use cairn_exchange::Connection;
use cairn_filters::LocalReply;
use cairn_policy::rbac::PolicyName;
use http::{HeaderName, HeaderValue};

const DENIED_BY: HeaderName = HeaderName::from_static("x-cairn-denied-by");
/// Stands for every namespace.
const ANY: &str = "*";

/// Whom denials are told in detail.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DenyDetail(Option<Arc<[Box<str>]>>);

// === impl DenyDetail ===

impl DenyDetail {
    /// Namespaces with commas between them.
    pub fn parse(list: &str) -> Self {
        let names = list.split(',').map(str::trim).filter(|name| !name.is_empty());
        let names: Arc<[Box<str>]> = names.map(Into::into).collect();
        Self((!names.is_empty()).then_some(names))
    }

    /// The answer, with the header where it is a denial and the client may know.
    pub fn tell(&self, reply: LocalReply, connection: &Connection) -> LocalReply {
        let Some(namespaces) = &self.0 else { return reply };
        let namespace = connection.peer.as_ref().and_then(|peer| peer.namespace());
        let trusted = namespace.is_some_and(|namespace| namespaces.iter().any(|name| **name == *namespace || **name == *ANY));
        let words = if trusted { words(&reply.details) } else { None };
        match words.and_then(|words| HeaderValue::try_from(words).ok()) {
            Some(value) => reply.with_header(DENIED_BY, value),
            None => reply,
        }
    }
}

/// Who denied, by the details of an answer; nothing where it is no denial.
fn words(details: &str) -> Option<String> {
    if let Some(policy) = details.strip_prefix("rbac_access_denied_matched_policy[") {
        let policy = policy.strip_suffix(']').unwrap_or(policy);
        return Some(match policy {
            "none" => "no ALLOW policy matches".to_owned(),
            name => PolicyName::of(name).into_owned(),
        });
    }
    if let Some(problem) = details.strip_prefix("jwt_authn_access_denied{") {
        return Some(problem.trim_end_matches('}').replace('_', " "));
    }
    (details == "chain_not_supported").then(|| "a rule that the waypoint does not support".to_owned())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use cairn_exchange::{ResponseFlags, clock};
    use http::StatusCode;

    use super::*;

    fn told(list: &str, peer: Option<&str>, details: &'static str) -> Option<String> {
        let connection = Connection {
            id: 1,
            authority: "10.96.1.10:80".into(),
            local_address: None,
            service_port: 80,
            remote_address: "10.244.0.9:1".parse().unwrap(),
            peer: peer.map(|peer| peer.parse().unwrap()),
            local: None,
            source: None,
            requested_server_name: None,
            opened: clock::now(),
        };
        let reply = LocalReply::new(StatusCode::FORBIDDEN, ResponseFlags::NONE, details, Bytes::new());
        let reply = DenyDetail::parse(list).tell(reply, &connection);
        let value = reply.headers.iter().find(|(name, _)| *name == DENIED_BY);
        value.map(|(_, value)| value.to_str().unwrap().to_owned())
    }

    #[test]
    fn only_clients_of_trusted_namespaces_are_told() {
        const DENIED: &str = "rbac_access_denied_matched_policy[ns[app]-policy[p]-rule[0]]";
        let client = Some("spiffe://cluster.local/ns/app/sa/client");
        for (list, peer, details, wanted) in [
            ("app", client, DENIED, Some("rule 0 of app/p")),
            ("ops, app", client, DENIED, Some("rule 0 of app/p")),
            ("*", client, DENIED, Some("rule 0 of app/p")),
            ("ops", client, DENIED, None),
            ("ap", client, DENIED, None),
            ("", client, DENIED, None),
            (" , ", client, DENIED, None),
            ("*", None, DENIED, None),
            (
                "app",
                client,
                "rbac_access_denied_matched_policy[none]",
                Some("no ALLOW policy matches"),
            ),
            (
                "app",
                client,
                "jwt_authn_access_denied{Jwt_is_expired}",
                Some("Jwt is expired"),
            ),
            ("app", client, "route_not_found", None),
        ] {
            assert_eq!(told(list, peer, details).as_deref(), wanted, "{list} {peer:?} {details}");
        }
    }
}
