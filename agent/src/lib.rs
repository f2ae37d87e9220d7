//! What a proxy needs around it, whichever proxy it is.
//!
//! * [`environment`]: variables with meaning, and sentences about those without;
//! * [`server`]: the HTTP server of administrative pages, with a limit for everything;
//! * [`shutdown`]: how a process ends: drained first, with nothing in flight cut while time remains.
//!
//! The pages themselves, and what readiness means, are each proxy's own.

pub mod environment;
pub mod server;
pub mod shutdown;
