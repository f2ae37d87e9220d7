//! Where requests go: clusters, their endpoints, which of them is chosen, and the connections to them.

mod balance;
mod breakers;
mod cluster;
mod connect;
pub mod connections;
mod endpoint;
mod endpoint_set;
#[cfg(test)]
mod fixtures;
mod http;
mod io;
mod latency;
mod monitor;
mod outlier;

pub use balance::{Avoid, Picking};
pub use breakers::{Breakers, Counted, Counts, Level, Resource, Thresholds, Usage};
pub use cluster::{
    Cluster, ClusterSettings, ClusterState, Discovery, Hashing, LbPolicy, LeastRequest, NamedEndpoint, OriginalDestination,
    TcpKeepalive, TransportTerms, UpstreamProtocol,
};
pub use connect::{ConnectError, Connected, Connector, ORIGINATE};
pub use connections::Key;
pub use endpoint::{Endpoint, EndpointState, Health, Locality, LocalityGroup, Target};
pub use endpoint_set::{Arrangement, EndpointSet, List, Priority, Spread};
pub use http::{Answer, Attempt, AttemptError, InformationalRelay, Lease};
pub use io::UpstreamIo;
pub use latency::Latency;
pub use monitor::{History, Monitor};
pub use outlier::{Outliers, Signals};
