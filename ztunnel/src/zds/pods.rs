//! Which pods are served, and which are still to be.

use std::{
    collections::{HashMap, HashSet},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use cairn_exchange::clock::{self, Instant};
use cairn_proto::istio::workload::zds::WorkloadInfo;
use tokio::{runtime, time::sleep_until};

use super::Message;
use crate::{
    mesh::Mesh,
    netns::Namespace,
    node::Node,
    pod::{Pod, PodInfo},
    readiness::{Readiness, Task},
    sockets::Sockets,
};

/// After how long a pod that could not be served is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// The pods of this node.
pub struct Pods {
    node: Arc<Node>,
    template: Sockets,
    trust_domain: String,
    data: runtime::Handle,
    readiness: Readiness,
    /// Where each pod is.
    places: HashMap<String, Namespace>,
    pending: HashMap<String, Pending>,
    /// Pods that were named since the connection was made; none once the snapshot is in.
    named: Option<HashSet<String>>,
}

/// A pod that could not be served.
struct Pending {
    info: WorkloadInfo,
    namespace: Namespace,
    again: Instant,
    _task: Task,
}

// === impl Pods ===

impl Pods {
    /// None yet; they are served on `data`, with sockets like `template`.
    pub fn new(node: Arc<Node>, template: Sockets, trust_domain: String, data: runtime::Handle, readiness: Readiness) -> Self {
        Self {
            node,
            template,
            trust_domain,
            data,
            readiness,
            places: HashMap::new(),
            pending: HashMap::new(),
            named: Some(HashSet::new()),
        }
    }

    /// A new connection: every pod will be named again.
    pub fn connected(&mut self) {
        self.named = Some(HashSet::new());
    }

    /// Whatever was not named is gone.
    pub fn snapshot(&mut self) {
        let Some(named) = self.named.take() else { return };
        let gone = self
            .places
            .keys()
            .chain(self.pending.keys())
            .filter(|uid| !named.contains(*uid));
        let gone: Vec<_> = gone.cloned().collect();
        for uid in gone {
            tracing::info!(%uid, "a pod is gone");
            self.remove(&uid);
        }
    }

    /// Obeys; the words are for istio-cni.
    pub async fn apply(&mut self, message: Message) -> Result<(), String> {
        match message {
            Message::Add { uid, info, namespace } => {
                self.name(&uid);
                self.add(uid, info, namespace)
            }
            Message::Keep { uid } => {
                if self.named.is_none() {
                    return Err(format!("the pod {uid} is to be kept after the snapshot, which means nothing"));
                }
                if !self.places.contains_key(&uid) && !self.pending.contains_key(&uid) {
                    return Err(format!("the pod {uid} is to be kept and is not known here"));
                }
                self.name(&uid);
                Ok(())
            }
            Message::Del { uid } => {
                // One that is not known is gone as well.
                self.remove(&uid);
                Ok(())
            }
            Message::Snapshot => {
                self.snapshot();
                Ok(())
            }
        }
    }

    /// Tries pods again whose time has come; waits for it.
    pub async fn retry(&mut self) {
        let Some(next) = self.pending.values().map(|pending| pending.again).min() else {
            return std::future::pending().await;
        };
        sleep_until(next).await;
        let now = clock::now();
        let due = self.pending.iter().filter(|(_, pending)| pending.again <= now);
        let due: Vec<_> = due.map(|(uid, _)| uid.clone()).collect();
        for uid in due {
            if let Some(pending) = self.pending.remove(&uid) {
                // It is pending again if it fails.
                let _ = self.start(uid, pending.info, pending.namespace);
            }
        }
    }

    fn name(&mut self, uid: &str) {
        if let Some(named) = &mut self.named {
            named.insert(uid.to_owned());
        }
    }

    fn add(&mut self, uid: String, info: WorkloadInfo, namespace: OwnedFd) -> Result<(), String> {
        let namespace =
            Namespace::of(namespace).map_err(|error| format!("the network namespace of {uid} cannot be entered: {error}"))?;
        if let Some(before) = self.places.get(&uid) {
            if before.inode() == namespace.inode() {
                return Ok(());
            }
            // The same pod in another sandbox.
            self.remove(&uid);
        }
        self.pending.remove(&uid);
        self.start(uid, info, namespace)
    }

    fn start(&mut self, uid: String, info: WorkloadInfo, namespace: Namespace) -> Result<(), String> {
        let sockets = Sockets {
            namespace: namespace.clone(),
            ..self.template.clone()
        };
        let pod_info = PodInfo {
            name: info.name.clone(),
            namespace: info.namespace.clone(),
            service_account: info.service_account.clone(),
            trust_domain: self.trust_domain(&self.node.mesh, &info),
        };
        let _data = self.data.enter();
        match Pod::start(self.node.clone(), pod_info, sockets) {
            Ok(pod) => {
                tracing::info!(%uid, pod = %pod.uid, "a pod is served");
                self.node.pods.write().insert(uid.clone(), pod);
                self.places.insert(uid, namespace);
                Ok(())
            }
            Err(error) => {
                let words = format!("the pod {uid} is pending: {error}");
                let task = self.readiness.task(format!("the pod {uid} can be served"));
                let pending = Pending {
                    info,
                    namespace,
                    again: clock::now() + RETRY,
                    _task: task,
                };
                self.pending.insert(uid, pending);
                Err(words)
            }
        }
    }

    /// What workload discovery says, or the mesh's own.
    fn trust_domain(&self, mesh: &Mesh, info: &WorkloadInfo) -> String {
        let uid = format!("{}//Pod/{}/{}", self.node.settings.cluster, info.namespace, info.name);
        let known = mesh.workload(&uid);
        let known = known.as_ref().and_then(|workload| workload.identity());
        known.map_or(self.trust_domain.as_str(), |id| id.trust_domain()).to_owned()
    }

    fn remove(&mut self, uid: &str) {
        self.places.remove(uid);
        self.pending.remove(uid);
        if let Some(pod) = self.node.pods.write().remove(uid) {
            pod.end();
        }
    }
}
