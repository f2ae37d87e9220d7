//! HTTP filters: live work on a request between the routes and the wire.
//!
//! * [`contract`] says what a filter may do and when: [`HttpFilter`], its verdicts and needs;
//! * [`chain`] is the filters of one chain and their run over one request;
//! * [`on_route`] is what the chosen route says to them, [`services`] what they may ask of others;
//! * [`grpc_stats`] counts the messages of gRPC calls;
//! * [`header_mutation`] edits headers;
//! * [`rbac`] denies by policy;
//! * [`jwt_authn`] asks for tokens;
//! * [`ext_authz`] asks an authorizer;
//! * [`fault`] delays and aborts, [`cors`] lets other origins call;
//! * [`local_ratelimit`] counts requests here, [`ratelimit`] by a service;
//! * [`set_filter_state`] puts objects beside requests;
//! * [`grpc_web`] lets browsers speak gRPC;
//! * [`buffer`] waits for whole requests.
//!
//! A filter does not know how clusters connect, and reads no protobuf: its configuration arrives compiled.

pub mod buffer;
pub mod chain;
pub mod contract;
pub mod cors;
pub mod ext_authz;
pub mod fault;
pub mod grpc_stats;
pub mod grpc_web;
pub mod header_mutation;
pub mod jwt_authn;
pub mod local_ratelimit;
pub mod on_route;
pub mod ratelimit;
pub mod rbac;
pub mod services;
pub mod set_filter_state;

pub use chain::{Filter, FilterChain, Placed, Run};
pub use contract::{BodyNeed, BodyRefusal, BodyStart, HttpFilter, LocalReply, Needs, ResponseHead, Resume, Slot, Verdict};
pub use on_route::{OnRoute, PerRoute, RouteConfig, Scope};
pub use services::{
    GrpcAnswer, GrpcCall, GrpcError, GrpcService, HttpAnswer, HttpCall, HttpError, HttpReply, NoServices, Services,
};
