//! From a tunnel to answers: accept it, find out whose service it is and what is spoken, decide, forward, tell.
//!
//! * `listener` accepts connections, `tunnel` their CONNECT streams;
//! * `detect` finds out what is spoken where the configuration does not say;
//! * `http1` and `http2` read requests, `request` follows one through route and filters to its answer (`response`), `ask`, `call` and `grpc` make the calls of filters;
//! * `body_start` waits for the beginning of a body where a filter decides by it;
//! * `tcp` passes bytes, `authorize` says whose.

mod ask;
mod authorize;
mod body_start;
mod call;
mod date;
mod detect;
mod forward;
mod framing;
mod grpc;
mod http1;
mod http2;
mod inner;
mod inner_io;
pub mod listener;
mod pace;
mod reply;
mod request;
mod response;
mod tcp;
mod tunnel;
mod upgrade;

pub use inner::Inner;
pub use inner_io::Informational;
pub use response::ResponseBody;
