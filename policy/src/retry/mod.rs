//! Whether, when and how often a request is tried again (contract xds §4.6).
//!
//! [`RetryPolicy`] is what a route says; [`RetryPolicy::for_request`] adds what the request's own headers ask for and gives the
//! [`RetryPlan`] of one request. After each attempt [`RetryPlan::decide`] looks at its [`Outcome`]; [`Backoff`] says how long to wait.
//!
//! What is not decided here: whether anything was already sent to the client, whether the body can be replayed, and whether the
//! cluster's breakers allow another attempt ([`RetryBudget`] gives their number).

mod backoff;
mod on;
mod outcome;
mod policy;

pub use backoff::{Backoff, DEFAULT_BACKOFF_BASE, RateLimitedBackoff, ResetFormat, ResetHeader};
pub use on::RetryOn;
pub use outcome::{Outcome, Reason, Reset};
pub use policy::{DEFAULT_HOST_ATTEMPTS, DEFAULT_RETRIES, PreviousPriorities, RetryBudget, RetryPlan, RetryPolicy};
