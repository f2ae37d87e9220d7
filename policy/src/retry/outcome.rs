//! How an attempt ended, and why it is tried again.

use http::{HeaderMap, StatusCode};

/// How an attempt ended, as far as a retry is concerned.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// No connection, or no tunnel, to the endpoint could be made.
    ConnectFailure,
    /// The connection was closed or the stream reset before the answer's head.
    Reset(Reset),
    /// The attempt took longer than a single one may.
    PerTryTimeout,
    /// A breaker or limit refused the attempt here; trying again would only add to it.
    Overflow,
    /// The head of an answer came.
    Response {
        /// Its status.
        status: StatusCode,
        /// Its fields.
        headers: &'a HeaderMap,
        /// The gRPC status in the head (an answer without a body).
        grpc_status: Option<u32>,
    },
}

/// How a stream was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// By REFUSED_STREAM: the endpoint did nothing with it.
    pub refused: bool,
    /// Something of the request was sent.
    pub request_started: bool,
}

/// Why it is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No connection.
    ConnectFailure,
    /// The stream was refused.
    RefusedStream,
    /// No answer.
    Reset,
    /// A single attempt took too long.
    PerTryTimeout,
    /// The status of the answer.
    Status(StatusCode),
    /// A header of the answer.
    Header,
    /// The gRPC status of the answer.
    Grpc(u32),
    /// The endpoint limits its rate.
    RateLimited,
}
