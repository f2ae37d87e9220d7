//! HTTP filters: live work on a request between the routes and the wire.
//!
//! * [`contract`] says what a filter may do and when: [`HttpFilter`], its verdicts and needs;
//! * [`chain`] is the filters of one chain and their run over one request;
//! * [`grpc_stats`] counts the messages of gRPC calls;
//! * [`header_mutation`] edits headers;
//! * [`rbac`] denies by policy.
//!
//! A filter does not know how clusters connect, and reads no protobuf: its configuration arrives compiled.

pub mod chain;
pub mod contract;
pub mod grpc_stats;
pub mod header_mutation;
pub mod rbac;

pub use chain::{Filter, FilterChain, Run};
pub use contract::{BodyNeed, HttpFilter, LocalReply, Needs, ResponseHead, Resume, Slot, Verdict};
