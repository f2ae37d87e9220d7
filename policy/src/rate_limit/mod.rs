//! Rate limits: what a request counts as, and how much is left (contract xds §3.12).
//!
//! * [`RateLimit`] makes a [`Descriptor`] of a request, by the actions that stand on its route, its virtual host or the filter;
//! * [`TokenBucket`] and [`Buckets`] count here, in the proxy;
//! * [`headers`] words what a counting service said.
//!
//! Time comes in as a duration since some beginning, so that nothing here has a clock.

mod bucket;
mod buckets;
mod descriptor;
pub mod headers;

pub use bucket::TokenBucket;
pub use buckets::{Allowance, BucketSettings, Buckets, CountedDescriptor};
pub use descriptor::{About, Action, Descriptor, Hits, HostLimits, LimitOverride, RateLimit, RateLimits, Unit, Value, describe};
