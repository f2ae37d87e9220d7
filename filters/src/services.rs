//! What filters ask of others: a gRPC method, or an HTTP request, of a service behind a cluster.
//!
//! Filters do not know how clusters connect; who runs them does, and answers over the same endpoints and connections as the traffic.
//! Messages are bytes here: who compiled the filter knows how they are written.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use cairn_exchange::RequestHead;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

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

/// An HTTP request to a service behind a cluster.
#[derive(Clone, Debug)]
pub struct HttpCall {
    /// The cluster.
    pub cluster: Arc<str>,
    /// How long it may take, from its beginning to the last byte of the answer; `None` never ends it.
    pub timeout: Option<Duration>,
    /// Its head.
    pub head: RequestHead,
    /// Its body.
    pub body: Bytes,
    /// Most bytes of the answer's body.
    pub max_answer: usize,
}

/// What came back.
#[derive(Clone, Debug)]
pub struct HttpReply {
    /// Status.
    pub status: StatusCode,
    /// Fields.
    pub headers: HeaderMap,
    /// All of the body.
    pub body: Bytes,
}

/// Why nothing came back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// Not within its time.
    #[error("the call took too long")]
    Timeout,
    /// The configuration has no such cluster, or nobody behind it could be reached.
    #[error("{0}")]
    Unreachable(String),
    /// More came back than is taken.
    #[error("the answer is longer than {0} bytes")]
    TooLarge(usize),
}

/// The answer to an HTTP request, when it is there.
pub type HttpAnswer = Pin<Box<dyn Future<Output = Result<HttpReply, HttpError>> + Send>>;

/// The answer to a call, when it is there.
pub type GrpcAnswer = Pin<Box<dyn Future<Output = Result<Bytes, GrpcError>> + Send>>;

/// What filters may ask of others for one request.
pub trait Services: Send + Sync {
    /// Calls a method. The future owns what it needs; dropping it gives the call up.
    fn grpc(&self, call: GrpcCall) -> GrpcAnswer;

    /// Sends a request. The future owns what it needs; dropping it gives the request up.
    fn http(&self, call: HttpCall) -> HttpAnswer;

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

    fn http(&self, call: HttpCall) -> HttpAnswer {
        let words = format!("there is nobody to ask in {}", call.cluster);
        Box::pin(async move { Err(HttpError::Unreachable(words)) })
    }

    fn node_cluster(&self) -> &str {
        ""
    }
}
