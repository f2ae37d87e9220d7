//! The waypoint proxy: takes a tunnel, finds out whose service it is, decides, forwards, tells.
//!
//! * [`config`] turns what istiod sends into a [`snapshot::Snapshot`]: the only place where protobuf becomes meaning;
//! * [`serve`] follows a tunnel to the answer of each request in it;
//! * [`upstream`] holds clusters, endpoints, balancing and the connections to endpoints;
//! * [`recorder`] keeps the last exchanges, [`explain`] tells why something is decided so;
//! * [`workloads`] knows who is who in the mesh;
//! * [`settings`], [`consumer`], [`logging`] and [`cairn_agent`] are what the agent of a pod does around it;
//! * [`admin`] and [`cli`] are for people and their tools.

pub mod admin;
pub mod body;
pub mod cli;
pub mod config;
pub mod consumer;
pub mod engine;
pub mod explain;
pub mod export;
pub mod logging;
pub mod proxy;
mod pump;
pub mod recorder;
pub mod serve;
pub mod settings;
pub mod snapshot;
mod stall;
pub mod upstream;
pub mod workloads;
