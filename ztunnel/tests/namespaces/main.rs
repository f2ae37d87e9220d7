//! A cluster of network namespaces with real redirection: client pod, its proxy, a waypoint, the server's proxy, server pod.
//!
//! The namespaces, their bridge and their rules are made by each test and gone with it; nothing of the machine's own network is touched.
//! It needs the right to make namespaces.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what fails here fails the test")]

mod cluster;
mod dedicated;
mod hostile;
mod istiod;
mod net;
mod shared;
