//! What istiod sends into what the proxy does: the only place where protobuf becomes meaning.
//!
//! [`Compiler`] is the one writer of the configuration. It takes each answer of istiod, compiles what changed, waits with chains
//! whose clusters have no endpoints yet, and publishes a new [`Snapshot`](crate::snapshot::Snapshot). What is malformed keeps its
//! last good version; what is not supported refuses exactly the chain, route or cluster that it stands in, and is listed
//! (architecture rule 3).
//!
//! * [`compiler`] and `listeners`, `clusters`: the state between answers;
//! * `chain`, `hcm`, `http_filters`, `per_route`, `route`, `tcp`, `matcher`, `cluster`, `endpoint`, `workload`, …: one message each;
//! * [`store`]: the resources as they came;
//! * [`load`]: the same resources from files;
//! * [`dump`] and [`show`]: for tools and for people.
// Messages are taken apart by exhaustive destructuring, which names deprecated fields too.
#![allow(deprecated)]

mod access_log;
mod adopt;
mod answer;
mod any;
mod assignment;
mod balancing;
mod cel;
mod chain;
mod cluster;
mod clusters;
pub mod compiler;
mod cors;
mod discovery;
mod dns;
pub mod dump;
mod endpoint;
mod ext_authz;
mod fault;
mod grpc_service;
mod hcm;
mod header_mutation;
mod headers;
mod http_filters;
mod jwt_authn;
mod limits;
mod listener;
mod listeners;
mod live;
pub mod load;
mod local_ratelimit;
mod matcher;
mod mirrors;
mod originate;
mod origination;
mod own_limits;
mod per_route;
mod protocol_options;
mod rate_limits;
mod ratelimit;
pub(crate) mod rbac;
mod redact;
pub mod report;
mod retry;
mod route;
mod route_action;
mod set_filter_state;
pub mod show;
mod state;
mod stats;
pub mod store;
mod structure;
mod subsets;
mod tcp;
mod terminate;
mod tls;
mod tracer;
mod transport;
pub(crate) mod trust;
mod upstream_http;
mod value;
mod wire;
mod workload;

#[cfg(test)]
mod filter_tests;
#[cfg(test)]
mod tests;

pub use compiler::{Applied, Compiler, Resource};
pub use own_limits::{ANNOTATION as OWN_LIMITS, OwnLimitsError};
pub use report::{Effect, ResourceError, Unsupported};
pub use store::{Pending, Store, Stored};
