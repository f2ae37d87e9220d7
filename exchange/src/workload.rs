//! What the mesh says of a workload: the labels of metrics and logs.

use std::sync::Arc;

use crate::SpiffeId;

/// A workload as istiod's discovery describes it, with the defaults of elided fields filled in (contract runtime §7.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Unique name, `Kubernetes//Pod/app/web-0`.
    pub uid: Arc<str>,
    /// Name of the pod or entry.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// The network that it is in; empty for the default one.
    pub network: Arc<str>,
    /// The identity it should have.
    pub identity: Option<SpiffeId>,
    /// Service account.
    pub service_account: Arc<str>,
    /// `service.istio.io/canonical-name`; `app` label.
    pub canonical_name: Arc<str>,
    /// `service.istio.io/canonical-revision`; `version` label.
    pub canonical_revision: Arc<str>,
    /// What kind of object owns it: `deployment`, `cronjob`, `pod`, `job`.
    pub workload_type: &'static str,
    /// Name of that object.
    pub workload_name: Arc<str>,
    /// The cluster that it is in.
    pub cluster: Arc<str>,
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
}
