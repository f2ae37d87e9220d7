//! The mesh as istiod's workload discovery describes it: who is where, and which services lead to whom.
//!
//! [`Mesh`] is one writer's table that everybody reads: look-ups by address, by name and by key take no lock that a writer holds for
//! longer than one entry, so that a push of the whole mesh never stands in the way of a connection. A service and its endpoints are
//! known apart from each other: either may come first.
//!
//! Nothing here knows protobuf (see [`crate::wds`]), sockets or policies.

mod bag;
mod endpoints;
mod intern;
mod service;
mod table;
mod workload;

pub use endpoints::{Endpoints, From};
pub use intern::Interner;
pub use service::{Families, HealthPolicy, LoadBalancing, Mode, Scope, Service, Vip, WeightedWaypoint};
pub use table::Mesh;
pub use workload::{ApplicationProtocol, ApplicationTunnel, Gateway, GatewayTarget, Ports, Tunnel, Workload};
