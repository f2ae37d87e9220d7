//! Pure decisions about a request: its own types in, a verdict out.
//!
//! Nothing here opens a socket, waits, reads a clock or knows protobuf. Configuration compiles into these types once; a request asks
//! them many times. What random numbers and the time of day decide comes in as parameters, so that every decision can be repeated.
//!
//! * [`matcher`]: does one fact have the asked shape?
//! * [`miss`]: what was asked and what was there, in words.
//! * [`path`]: the one form that a path takes before anything looks at it.
//! * [`route`]: which route a request takes, and what that route makes of it.
//! * [`headers`]: which headers are added, removed and believed.
//! * [`jwt`]: which tokens a request must have, and whether they are good.
//! * [`rbac`]: who may do what.
//! * [`timeout`]: how long a request may take.
//! * [`retry`]: whether, when and how often it is tried again.
//! * [`balance`]: who gets the next request.
//! * [`rate_limit`]: what a request counts as, and how much is left.
//! * [`cors`]: which origins may call.
//! * [`fault`]: which requests are delayed or fail on purpose.

pub mod balance;
pub mod cors;
pub mod fault;
pub mod headers;
pub mod jwt;
pub mod matcher;
pub mod miss;
pub mod outlier;
pub mod path;
pub mod rate_limit;
pub mod rbac;
pub mod retry;
pub mod route;
pub mod timeout;
