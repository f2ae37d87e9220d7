//! From a tunnel to answers: accept it, find out whose service it is and what is spoken, decide, forward, tell.
//!
//! * `listener` accepts connections, `tunnel` their CONNECT streams;
//! * `detect` finds out what is spoken where the configuration does not say;
//! * `http1` and `http2` read requests, `request` follows one through filters and route to its answer (`response`);
//! * `tcp` passes bytes.

mod date;
mod detect;
mod forward;
mod framing;
mod http1;
mod http2;
mod inner;
mod inner_io;
pub mod listener;
mod reply;
mod request;
mod response;
mod server_name;
mod tcp;
mod tunnel;
mod upgrade;

pub use inner::Inner;
pub use inner_io::Informational;
pub use response::ResponseBody;
