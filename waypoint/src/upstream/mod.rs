//! Where requests go: clusters, their endpoints, which of them is chosen, and the connections to them.

mod balance;
mod breakers;
mod cluster;
mod connect;
pub mod connections;
pub mod dns;
mod endpoint;
mod endpoint_set;
#[cfg(test)]
mod fixtures;
mod http;
mod io;
mod latency;
mod monitor;
mod outlier;
mod proxy_protocol;
pub mod queue;
mod subsets;
mod transport;

pub use balance::{Avoid, Picking};
pub use breakers::{Breakers, Counted, Counts, Level, Resource, Thresholds, Usage};
pub use cluster::{
    Cluster, ClusterSettings, ClusterState, Discovery, DnsTerms, Hashing, LbPolicy, LeastRequest, NamedEndpoint,
    OriginalDestination, TcpKeepalive, UpstreamProtocol,
};
pub use connect::{ConnectError, Connected, Connector, INNER_ORIGINATE, ORIGINATE, OUTER_ORIGINATE, Toward};
pub use connections::Key;
pub use endpoint::{Endpoint, EndpointState, Health, Locality, LocalityGroup, Target};
pub use endpoint_set::{Arrangement, EndpointSet, List, Priority, Spread};
pub use http::{Answer, Attempt, AttemptError, InformationalRelay, Lease};
pub use io::UpstreamIo;
pub use latency::Latency;
pub use monitor::{History, Monitor};
pub use outlier::{Outliers, Signals};
pub(crate) use proxy_protocol::MAX_VALUES as MAX_PROXY_VALUES;
pub use proxy_protocol::ProxyHeader;
pub(crate) use transport::host_and_port;
pub use transport::{NamesByHost, Purpose, TransportTerms};
