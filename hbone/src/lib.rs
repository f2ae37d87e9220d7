//! Tunnels of a mesh: HBONE, that is mutual TLS, HTTP/2 and one CONNECT stream for each TCP connection.
//!
//! [`serve`] accepts CONNECT streams on one connection and hands each to its caller as a [`Connect`] that waits for an answer;
//! [`Pool`] opens streams towards a destination over as many connections as the load asks for. Both sides end in the same
//! [`TunnelStream`], a duplex byte stream that keeps half-closes apart from resets. [`drain`] ends work without cutting it.
//!
//! The crate speaks HTTP/2 through `h2` directly: a stream costs no task, no channel and no copy beyond what its reader or writer
//! asks for. It knows nothing of configuration, routes or policies, and parses no certificates: who a peer is, it is told.

pub mod drain;

mod budget;
mod dial;
mod heads;
mod keepalive;
mod open_error;
mod place;
mod pool;
mod server;
mod shared;
mod stream;
mod stream_limit;
mod tunnel;
mod turn;
mod windows;

pub use budget::Budget;
pub use dial::{Connecting, Dial, DialError, Dialed, TcpTls};
pub use heads::{Late, Watched, watch};
pub use keepalive::KeepaliveSettings;
pub use open_error::{OpenError, OpenErrorKind};
pub use pool::{Destination, Opened, Pool, PoolSettings, PoolStats};
pub use server::{AlreadyGone, Connect, Peer, ServeError, ServerSettings, serve};
pub use stream::{MAX_WRITE, StreamError, TunnelStream};
pub use stream_limit::StreamLimits;
pub use windows::WindowSettings;
