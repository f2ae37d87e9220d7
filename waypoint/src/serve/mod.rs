//! From a tunnel to answers: accept it, find out whose service it is and what is spoken, decide, forward, tell.
//!
//! * `listener` accepts connections, `tunnel` their CONNECT streams;
//! * `detect` finds out what is spoken where the configuration does not say;
//! * `http1` and `http2` read requests, `request` follows one through route and filters to its answer (`response`), `ask`, `call` and `grpc` make the calls of filters;
//! * `tcp` passes bytes.

mod ask;
mod call;
mod date;
mod denied_by;
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

pub use denied_by::DenyDetail;
pub use inner::Inner;
pub use inner_io::Informational;
pub use response::ResponseBody;
