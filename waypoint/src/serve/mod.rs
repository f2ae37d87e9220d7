//! From a tunnel to answers: accept it, find out whose service it is and what is spoken, decide, forward, tell.
//!
//! * `listener` accepts connections, `tunnel` their CONNECT streams;
//! * `detect` finds out what is spoken where the configuration does not say;
//! * `http1` and `http2` read requests, `request` follows one through route and filters to its answer (`response`), within its
//!   `limits` of time; `ask`, `call` and `grpc` make the calls of filters, `mirrors` send
//!   copies;
//! * `body_start` waits for the beginning of a body where a filter decides by it;
//! * `tcp` decides about connections of bytes (`passage`, `authorize`); `relay` passes them, and those of upgraded requests (`upgrade`);
//! * `open` looks whether policy still allows what is open, and `trusted` whether the peers of tunnels are believed still.

use std::time::Duration;

mod ask;
mod authorize;
mod body_start;
pub(crate) mod call;
mod date;
mod denied_by;
mod detect;
mod forward;
mod framing;
pub(crate) mod grpc;
mod http1;
mod http2;
mod inner;
mod inner_io;
mod limits;
mod line;
pub mod listener;
mod mirrors;
pub mod open;
mod pace;
mod passage;
mod relay;
mod reply;
mod request;
mod response;
mod server_name;
mod tcp;
pub mod trusted;
mod tunnel;
pub(crate) mod upgrade;

pub use denied_by::DenyDetail;
pub use inner::Inner;
pub use inner_io::Informational;
pub(crate) use limits::request_end;
pub use mirrors::Mirrors;
pub use response::ResponseBody;

/// How long a request's head may take where the configuration does not say: longer than any honest client needs.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
