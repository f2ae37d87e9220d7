//! What filters ask of others: a gRPC method of a service behind a cluster.
//!
//! Filters do not know how clusters connect; who runs them does, and answers over the same endpoints and connections as the traffic.
//! Messages are bytes here: who compiled the filter knows how they are written.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue};

/// A call of one method: one message there, one back.
#[derive(Clone, Debug)]
pub struct GrpcCall {
    /// The service.
    pub service: Arc<GrpcService>,
    /// `/package.Service/Method`.
    pub method: &'static str,
    /// The message.
    pub message: Bytes,
    /// Further metadata.
    pub metadata: Vec<(HeaderName, HeaderValue)>,
}

/// A service behind a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct GrpcService {
    /// The cluster.
    pub cluster: Arc<str>,
    /// The authority of calls.
    pub authority: HeaderValue,
    /// How long a call may take, from its beginning to the last byte of the answer; `None` never ends it.
    pub timeout: Option<Duration>,
    /// Metadata of every call.
    pub metadata: Vec<(HeaderName, HeaderValue)>,
    /// Most bytes of an answer's message.
    pub max_answer: usize,
    /// The proxy's own fields (`x-envoy-*`, `x-forwarded-for`) are left out.
    pub skip_envoy_headers: bool,
}

/// Why a call brought no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrpcError {
    /// Not within its time.
    #[error("the call took too long")]
    Timeout,
    /// The configuration has no such cluster, or nobody behind it could be reached.
    #[error("{0}")]
    Unreachable(String),
    /// The service answered with this status, and words.
    #[error("status {code}: {message}")]
    Status {
        /// gRPC's code.
        code: u32,
        /// Its words.
        message: String,
    },
    /// What came back is no answer of a gRPC service.
    #[error("{0}")]
    Malformed(String),
}

/// The answer to a call, when it is there.
pub type GrpcAnswer = Pin<Box<dyn Future<Output = Result<Bytes, GrpcError>> + Send>>;

/// What filters may ask of others for one request.
pub trait Services: Send + Sync {
    /// Calls a method. The future owns what it needs; dropping it gives the call up.
    fn grpc(&self, call: GrpcCall) -> GrpcAnswer;

    /// The cluster of the proxy's own node: what it says of itself as a client.
    fn node_cluster(&self) -> &str;
}

/// Nobody to ask: every call fails.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoServices;

impl Services for NoServices {
    fn grpc(&self, call: GrpcCall) -> GrpcAnswer {
        let words = format!("there is nobody to ask for {}", call.method);
        Box::pin(async move { Err(GrpcError::Unreachable(words)) })
    }

    fn node_cluster(&self) -> &str {
        ""
    }
}
