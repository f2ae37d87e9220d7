//! SPIFFE identities as a mesh uses them.

use std::{fmt, ops::Range, str::FromStr, sync::Arc};

/// A parsed `spiffe://<trust domain>/…`; the usual form in a mesh is `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.
///
/// Cheap to clone; compares and hashes by its text.
#[derive(Clone)]
pub struct SpiffeId {
    text: Arc<str>,
    trust_domain_end: usize,
    /// Where namespace and service account stand in `text`, when the path has the mesh's form.
    workload: Option<(Range<usize>, Range<usize>)>,
}

/// Why a text is not a SPIFFE ID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a SPIFFE ID: {reason}")]
pub struct InvalidSpiffeId {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

const SCHEME: &str = "spiffe://";

// === impl SpiffeId ===

impl SpiffeId {
    /// Makes the identity of a workload.
    pub fn workload(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, InvalidSpiffeId> {
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The whole identity, `spiffe://…`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.trust_domain_end]
    }

    /// The namespace, for identities of the form `…/ns/<namespace>/sa/<account>`.
    pub fn namespace(&self) -> Option<&str> {
        self.workload.as_ref().map(|(namespace, _)| &self.text[namespace.clone()])
    }

    /// The service account, for identities of the form `…/ns/<namespace>/sa/<account>`.
    pub fn service_account(&self) -> Option<&str> {
        self.workload.as_ref().map(|(_, account)| &self.text[account.clone()])
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, InvalidSpiffeId> {
        let refuse = |reason| {
            Err(InvalidSpiffeId {
                text: text.chars().take(256).collect(),
                reason,
            })
        };
        let Some(rest) = text.strip_prefix(SCHEME) else {
            return refuse("it does not start with spiffe://");
        };
        if text.len() > 2048 {
            return refuse("it is longer than 2048 bytes");
        }
        let trust_domain_len = rest.find('/').unwrap_or(rest.len());
        if trust_domain_len == 0 {
            return refuse("the trust domain is empty");
        }
        if rest.bytes().any(|byte| byte <= b' ' || byte == 0x7f || byte == b',') {
            return refuse("it contains a space, comma or control character");
        }
        let trust_domain_end = SCHEME.len() + trust_domain_len;
        Ok(Self {
            text: text.into(),
            trust_domain_end,
            workload: workload_ranges(text, trust_domain_end),
        })
    }
}

/// Finds namespace and account in `…/ns/<namespace>/sa/<account>`.
fn workload_ranges(text: &str, path_start: usize) -> Option<(Range<usize>, Range<usize>)> {
    const NS: &str = "/ns/";
    const SA: &str = "/sa/";
    let path = text[path_start..].strip_prefix(NS)?;
    let namespace_start = path_start + NS.len();
    let namespace_len = path.find('/')?;
    let account = path[namespace_len..].strip_prefix(SA)?;
    let account_start = namespace_start + namespace_len + SA.len();
    if namespace_len == 0 || account.is_empty() || account.contains('/') {
        return None;
    }
    Some((namespace_start..namespace_start + namespace_len, account_start..text.len()))
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for SpiffeId {}

impl std::hash::Hash for SpiffeId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_workload_identity() {
        let id: SpiffeId = "spiffe://cluster.local/ns/app/sa/client".parse().unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("cluster.local", Some("app"), Some("client"))
        );
        assert_eq!(id, SpiffeId::workload("cluster.local", "app", "client").unwrap());
    }

    #[test]
    fn other_paths_have_no_namespace() {
        for text in [
            "spiffe://td",
            "spiffe://td/x",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/a/sa/b/c",
        ] {
            let id: SpiffeId = text.parse().unwrap();
            assert_eq!((id.trust_domain(), id.namespace()), ("td", None), "{text}");
        }
    }

    #[test]
    fn what_is_no_identity_is_refused() {
        for text in [
            "",
            "http://td/ns/a/sa/b",
            "spiffe:///ns/a",
            "spiffe://t d/x",
            "spiffe://a,spiffe://b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }
}
