//! Where requests go: clusters, their endpoints, which of them is chosen, and the connections to them.

mod balance;
mod cluster;
mod connect;
pub mod connections;
mod endpoint;
mod http;
mod io;

pub use balance::Picking;
pub use cluster::{
    Breakers, Cluster, ClusterSettings, ClusterState, Discovery, LbPolicy, NamedEndpoint, OriginalDestination, TcpKeepalive,
    TransportTerms, UpstreamProtocol,
};
pub use connect::{ConnectError, Connected, Connector, ORIGINATE};
pub use connections::Key;
pub use endpoint::{Endpoint, EndpointSet, EndpointState, Health, Locality, LocalityGroup, Priority, Spread, Target};
pub use http::{Answer, Attempt, AttemptError, InformationalRelay, Lease};
pub use io::UpstreamIo;
