//! The messages that istiod and a waypoint exchange, and nothing of what they mean.
//!
//! Rust types and gRPC clients and servers are generated at build time from one committed descriptor set,
//! `descriptors.binpb` (made by `conformance/protoset` from the Go modules that istiod itself is built with). The same set
//! is available as a [`prost_reflect::DescriptorPool`], which prints any resource as JSON and finds fields that are newer than we are.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
pub use prost_reflect::DescriptorPool;

/// Generated code: the module tree is the protobuf package tree.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::wildcard_imports)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/messages.rs"));
}

pub use generated::*;

/// The descriptor set from which everything here was generated.
pub const DESCRIPTORS: &[u8] = include_bytes!("../descriptors.binpb");

static POOL: Mutex<Weak<DescriptorPool>> = Mutex::new(Weak::new());

/// Every message of the descriptor set, for JSON and for unknown fields.
///
/// The pool takes about 18 MB and 20 ms to make, and is needed only now and then: it lives while somebody holds it. Who needs it for
/// many messages holds it from the first to the last.
pub fn pool() -> Arc<DescriptorPool> {
    let mut shared = POOL.lock();
    if let Some(pool) = shared.upgrade() {
        return pool;
    }
    let pool = DescriptorPool::decode(DESCRIPTORS).expect("the committed descriptor set was checked by this crate's tests");
    let pool = Arc::new(pool);
    *shared = Arc::downgrade(&pool);
    pool
}

/// The prefix of every type URL in use.
pub const TYPE_URL_PREFIX: &str = "type.googleapis.com/";

#[cfg(test)]
mod tests {
    #[test]
    fn the_pool_knows_what_istiod_sends() {
        for name in [
            "envoy.config.listener.v3.Listener",
            "istio.workload.Address",
            "stats.PluginConfig",
            "udpa.type.v1.TypedStruct",
        ] {
            assert!(super::pool().get_message_by_name(name).is_some(), "{name}");
        }
    }
}
