//! An answer of istiod for one type of resources, and what came of it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::report::ResourceError;

/// Type URL of clusters.
pub const CLUSTERS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
/// Type URL of endpoint assignments.
pub const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
/// Type URL of listeners.
pub const LISTENERS: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
/// Type URL of workloads alone.
pub const WORKLOADS: &str = "type.googleapis.com/istio.workload.Workload";
/// Type URL of workloads and services.
pub const ADDRESSES: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of secrets.
pub const SECRETS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// Type URL of extension configurations.
pub const EXTENSIONS: &str = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig";
/// Type URL of what istiod tells of trust anchors.
pub const PROXY_CONFIG: &str = "type.googleapis.com/istio.mesh.v1alpha1.ProxyConfig";

/// Bytes of a NACK's words, after which only the number of further errors is told.
const MAX_WORDS: usize = 6 * 1024;

/// One resource as istiod sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Its name.
    pub name: String,
    /// istiod's version of it, where it has one.
    pub version: String,
    /// The type of the message.
    pub type_url: String,
    /// The encoded message.
    pub bytes: Bytes,
}

/// What came of an answer.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// What was wrong with the resources in it: all of it, also what was wrong before and was sent again.
    pub errors: Vec<ResourceError>,
    /// The version that was published, when anything in the snapshot changed.
    pub published: Option<u64>,
    /// For each type of dependent resources the names wanted from now on; only types whose names changed.
    pub wants: BTreeMap<&'static str, BTreeSet<String>>,
}

/// Errors as the words of one NACK.
pub(super) fn words<E: std::borrow::Borrow<ResourceError>>(errors: &[E]) -> String {
    let mut words = String::new();
    for (index, error) in errors.iter().enumerate() {
        let sentence = error.borrow().to_string();
        if words.len() + sentence.len() > MAX_WORDS && index > 0 {
            words.push_str(&format!("; and {} more", errors.len() - index));
            break;
        }
        if index > 0 {
            words.push_str("; ");
        }
        words.push_str(&sentence);
    }
    words
}

// === impl Applied ===

impl Applied {
    /// The words of the NACK, when there has to be one: which resource, which field, what is wrong with it.
    pub fn nack(&self) -> Option<String> {
        (!self.errors.is_empty()).then(|| words(&self.errors))
    }
}

// === impl Resource ===

impl From<cairn_xds::Changed> for Resource {
    fn from(changed: cairn_xds::Changed) -> Self {
        let cairn_xds::Changed {
            name,
            version,
            aliases: _,
            type_url,
            bytes,
        } = changed;
        Self {
            name,
            version,
            type_url: type_url.as_str().to_owned(),
            bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use cairn_proto::envoy::{
        config::{
            cluster::v3::Cluster, core::v3::TypedExtensionConfig, endpoint::v3::ClusterLoadAssignment, listener::v3::Listener,
        },
        extensions::transport_sockets::tls::v3::Secret,
    };

    use super::{
        super::{any::Named, report::Malformed},
        *,
    };

    fn type_url<M: Named>() -> String {
        format!("{}{}", cairn_proto::TYPE_URL_PREFIX, M::NAME)
    }

    #[test]
    fn the_type_urls_are_those_of_the_messages() {
        assert_eq!(CLUSTERS, type_url::<Cluster>());
        assert_eq!(ENDPOINTS, type_url::<ClusterLoadAssignment>());
        assert_eq!(LISTENERS, type_url::<Listener>());
        assert_eq!(EXTENSIONS, type_url::<TypedExtensionConfig>());
        assert_eq!(SECRETS, type_url::<Secret>());
        assert!(WORKLOADS.ends_with(cairn_proto::istio::workload::Workload::NAME));
        assert!(ADDRESSES.ends_with(cairn_proto::istio::workload::Address::NAME));
    }

    #[test]
    fn the_words_of_a_nack_have_an_end() {
        let error = |number: usize| {
            let malformed = Malformed {
                field: format!("filters[{number}]"),
                what: "is wrong".repeat(20),
            };
            ResourceError::malformed("main_internal", Some("inbound-vip|80|http|web.app"), malformed)
        };
        let words = words(&(0..1000).map(error).collect::<Vec<_>>());
        assert!(words.len() < MAX_WORDS + 100, "{}", words.len());
        assert!(words.ends_with(" more"), "{words}");
        assert!(
            words.starts_with("main_internal, chain inbound-vip|80|http|web.app, filters[0]: is wrong"),
            "{words}"
        );
    }
}
