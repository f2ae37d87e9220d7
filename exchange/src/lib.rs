//! The facts that every other part reads: who the parties are, what happened to one request, and when.
//!
//! Nothing here opens a socket, waits, or knows where configuration comes from.

pub mod cel;
pub mod clock;
mod filter_state;
mod flags;
pub mod format;
mod metadata;
mod record;
pub mod regex;
mod spiffe;
mod trace;
mod workload;

pub use filter_state::FilterState;
pub use flags::ResponseFlags;
pub use metadata::DynamicMetadata;
pub use record::{
    ClusterFacts, Connection, Counts, Exchange, Moments, Protocol, RequestHead, Scheme, Service, ShadowDecision, Upstream,
    is_grpc_content_type,
};
pub use spiffe::{InvalidSpiffeId, SpiffeId};
pub use trace::TraceIds;
pub use workload::Workload;
