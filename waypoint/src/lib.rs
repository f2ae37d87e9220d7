//! The waypoint proxy: takes a tunnel, finds out whose service it is, decides, forwards, tells.
//!
//! * [`config`] turns what istiod sends into a [`snapshot::Snapshot`]: the only place where protobuf becomes meaning;
//! * [`serve`] follows a tunnel to the answer of each request in it;
//! * [`upstream`] holds clusters, endpoints, balancing and the connections to endpoints;
//! * [`workloads`] knows who is who in the mesh;
//! * [`admin`] and [`cli`] are for people and their tools.

pub mod admin;
pub mod body;
pub mod cli;
pub mod config;
pub mod engine;
pub mod proxy;
mod pump;
pub mod serve;
pub mod snapshot;
pub mod upstream;
pub mod workloads;
