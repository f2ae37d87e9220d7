//! The facts that every other part reads: who the parties are, what happened to one request, and when.
//!
//! Nothing here opens a socket, waits, or knows where configuration comes from.

pub mod clock;
mod spiffe;

pub use spiffe::{InvalidSpiffeId, SpiffeId};
