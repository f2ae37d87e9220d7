//! The node's L4 proxy of an ambient mesh: what it captures leaves and enters pods as HBONE, and L4 policy decides.
//!
//! * [`mesh`] is who is where; [`wds`] and [`authorization`] are the only places where protobuf becomes meaning, [`consumer`] is where it
//!   comes from;
//! * [`policies`] says what applies to one workload, [`route`] where a connection goes: both without sockets;
//! * [`pod`] is one pod that is served, of which [`node`] has many: [`outbound`], [`inbound`], [`dns`], [`socks5`], each over
//!   [`sockets`] of the pod's own [`netns`]; [`tunnels`] lead on, [`relay`] moves the bytes, [`open`] knows what is open;
//! * [`zds`] says which pods there are, [`certificates`] has one for each account;
//! * [`telemetry`], [`bypass`], [`baggage`] tell; [`admin`], [`cli`], [`settings`], [`logging`], [`readiness`] are for people and their
//!   tools; [`engine`] puts it together.

pub mod admin;
pub mod authorization;
pub mod baggage;
pub mod bypass;
pub mod certificates;
pub mod cli;
pub mod consumer;
pub mod dns;
pub mod engine;
pub mod inbound;
pub mod logging;
pub mod mesh;
pub mod netns;
pub mod node;
pub mod open;
pub mod outbound;
pub mod pod;
pub mod policies;
mod proxy_protocol;
pub mod readiness;
pub mod relay;
pub mod route;
pub mod settings;
pub mod sockets;
pub mod socks5;
pub mod telemetry;
pub mod tunnels;
pub mod wds;
pub mod zds;

#[cfg(test)]
mod testing;
