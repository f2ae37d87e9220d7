//! Delta ADS: the one stream over which istiod tells the proxy what exists.
//!
//! [`Client`] keeps the stream open for the life of the process: it connects (TLS, bearer token, node), subscribes, hands each
//! answer to a [`Consumer`] as (type, changed, removed), and answers with the consumer's [`Verdict`]: an ACK, or a NACK with its
//! words. It remembers which names and versions are held, so that a new stream goes on where the last one ended and names that
//! vanished in between are handed out as removed. Losing the stream never takes anything away from the consumer.
//!
//! It never knows what a resource means: a type is a URL, a resource is bytes with a name.
//!
//! * `state` is the protocol without IO: events in, requests out.
//! * [`Status`] says how the stream fares, for readiness and metrics.
//! * [`NodeBuilder`] makes the node that istiod authenticates and serves.

mod backoff;
mod client;
mod codec;
mod connect;
mod consumer;
mod error;
mod file;
mod node;
mod proxy_config;
mod settings;
mod state;
mod status;
mod stream;
mod tls;

pub use backoff::Backoff;
pub use client::Client;
pub use consumer::{Changed, Consumer, Interest, Subscription, TypeUrl, Update, Verdict, Wish};
pub use error::{SettingsError, StreamError};
pub use node::NodeBuilder;
pub use settings::{Address, Allowed, ClientCertificate, Settings, Tls, TlsFiles};
pub use status::{Status, StatusSnapshot, TypeStatus};
