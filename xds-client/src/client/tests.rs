//! The client against a scripted server: each test plays istiod on the streams that the client opens.

mod memory;
mod server;
mod tls;
