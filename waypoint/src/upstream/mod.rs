//! Where requests go: clusters, their endpoints, which of them is chosen, and the connections to them.

mod balance;
mod cluster;
mod connect;
pub mod connections;
pub mod dns;
mod endpoint;
mod http;
mod io;
mod proxy_protocol;
mod transport;

pub use balance::Picking;
pub use cluster::{
    Breakers, Cluster, ClusterSettings, ClusterState, Discovery, DnsTerms, LbPolicy, NamedEndpoint, OriginalDestination,
    TcpKeepalive, UpstreamProtocol,
};
pub use connect::{ConnectError, Connected, Connector, INNER_ORIGINATE, ORIGINATE, OUTER_ORIGINATE, Toward};
pub use connections::Key;
pub use endpoint::{Endpoint, EndpointSet, EndpointState, Health, Locality, LocalityGroup, Priority, Spread, Target};
pub use http::{Answer, Attempt, AttemptError, InformationalRelay, Lease};
pub use io::UpstreamIo;
pub(crate) use proxy_protocol::MAX_VALUES as MAX_PROXY_VALUES;
pub use proxy_protocol::ProxyHeader;
pub(crate) use transport::host_and_port;
pub use transport::{NamesByHost, Purpose, TransportTerms};
