//! Tunnels end to end: accepting and opening over memory pipes and loopback TLS.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "helpers of tests fail by panicking"
)]

mod pool;
mod server;
mod streams;
mod support;
mod tls;
