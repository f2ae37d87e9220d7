//! What all pods of this process share.

use std::{collections::HashMap, sync::Arc};

use cairn_hbone::{PoolSettings, ServerSettings};
use parking_lot::RwLock;

use crate::{
    bypass::Bypasses,
    certificates::Certificates,
    dns::Resolver,
    mesh::Mesh,
    pod::Pod,
    policies::Policies,
    telemetry::{AccessLog, Metrics},
};

/// Settings of the data path.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// The cluster that the node is in.
    pub cluster: Arc<str>,
    /// The node's name; empty where it does not matter.
    pub node: Arc<str>,
    /// Whether DNS is answered.
    pub dns: bool,
    /// Whether SOCKS5 is served.
    pub socks5: bool,
    /// How tunnels are accepted.
    pub server: ServerSettings,
    /// How they are made and kept.
    pub pool: PoolSettings,
}

/// What all pods share.
#[derive(Debug)]
pub struct Node {
    /// Who is where.
    pub mesh: Arc<Mesh>,
    /// Who may what.
    pub policies: Arc<Policies>,
    /// Certificates of pods.
    pub certificates: Arc<Certificates>,
    /// Numbers.
    pub metrics: Arc<Metrics>,
    /// Lines.
    pub log: AccessLog,
    /// Connections that went around a waypoint.
    pub bypasses: Bypasses,
    /// Answers names.
    pub resolver: Resolver,
    /// Settings.
    pub settings: NodeSettings,
    /// The pods that are served, by the name that they came under.
    pub pods: RwLock<HashMap<String, Arc<Pod>>>,
}

// === impl Node ===

impl Node {
    /// The pods that are served.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.read().values().cloned().collect()
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.pods.read().values().map(|pod| pod.open.count()).sum()
    }
}

impl NodeSettings {
    /// For a process with so many threads for connections: as many tunnels to a busy peer as there are threads.
    pub fn pool(workers: usize, max_streams: u32) -> PoolSettings {
        PoolSettings {
            spread_tunnels: workers.max(2),
            max_streams,
            ..PoolSettings::default()
        }
    }
}
