//! Headers: which are added, removed and believed.
//!
//! [`HeaderEdits`] are what configuration adds and removes. [`incoming`] is what a proxy does to every request that it takes in
//! before anything looks at it: hop-by-hop headers go, headers that only a trusted proxy may set go, `x-forwarded-proto` and
//! `x-request-id` come. [`forwarded`] reads who the client is from `x-forwarded-for`. [`outgoing`] is what it does to answers.

mod edits;
pub mod forwarded;
mod hop;
pub mod incoming;
mod mutation;
pub mod outgoing;
mod request_id;

pub use edits::{EditAction, HeaderEdit, HeaderEditError, HeaderEdits, ViewOf, record_alone};
pub use hop::{is_upgrade, remove_hop_by_hop, upgrade_kind};
pub use mutation::Mutation;
pub use request_id::{Sampling, TraceReason, with_trace_reason};
