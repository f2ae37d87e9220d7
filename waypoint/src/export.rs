//! The way to collectors: messages of spans and logs go over the clusters, tunnels and connections of the traffic.
//!
//! Messages are made on the control runtime and carried on the one that serves connections, where the connections to endpoints live.
//! A message that does not arrive in its time is lost, which whoever made it counts.

use std::{
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::{RequestHead, Scheme};
use cairn_filters::{GrpcCall, GrpcService, HttpCall};
use cairn_telemetry::export::{Carried, Courier};
use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};
use parking_lot::Mutex;
use tokio::{runtime::Handle, time::timeout};

use crate::{
    proxy::Proxy,
    serve::{call, grpc},
};

/// How long a message may take where the configuration does not say.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of a collector's answer, which says nothing that matters.
const MAX_ANSWER: usize = 64 * 1024;

/// Ways to collectors.
pub type Exports = cairn_telemetry::export::Exports<Destination>;

/// A collector.
#[derive(Clone, Debug, PartialEq)]
pub enum Destination {
    /// A method of a gRPC service, with one message there and one back.
    Grpc {
        /// The service.
        service: Arc<GrpcService>,
        /// `/package.Service/Method`.
        method: &'static str,
    },
    /// An HTTP server.
    Http(Box<Server>),
}

/// An HTTP server that takes messages.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// The cluster.
    pub cluster: Arc<str>,
    /// The host that it is asked for.
    pub authority: HeaderValue,
    /// The path.
    pub path: PathAndQuery,
    /// Fields of each request.
    pub headers: HeaderMap,
    /// How long it may take.
    pub timeout: Duration,
}

/// Carries messages, once there is a proxy.
#[derive(Default)]
pub struct Post {
    proxy: OnceLock<Weak<Proxy>>,
    runtime: Mutex<Option<Handle>>,
}

// === impl Destination ===

impl Destination {
    /// The cluster behind which it is.
    pub fn cluster(&self) -> &Arc<str> {
        match self {
            Self::Grpc { service, .. } => &service.cluster,
            Self::Http(server) => &server.cluster,
        }
    }
}

// === impl Post ===

impl Post {
    /// From now on messages go over the connections of this proxy.
    pub fn serve(&self, proxy: Weak<Proxy>) {
        // There is one proxy.
        let _ = self.proxy.set(proxy);
    }

    /// Connections live on the calling runtime.
    pub fn connect_here(&self) {
        *self.runtime.lock() = Some(Handle::current());
    }
}

impl Courier<Destination> for Post {
    fn carry(&self, to: &Destination, message: Bytes) -> Carried {
        let Some(proxy) = self.proxy.get().and_then(Weak::upgrade) else {
            return Box::pin(async { Err("there is no proxy to send it over".into()) });
        };
        let to = to.clone();
        let sent = async move { send(&proxy, to, message).await };
        match self.runtime.lock().clone() {
            None => Box::pin(sent),
            Some(runtime) => {
                let sent = runtime.spawn(sent);
                Box::pin(async move { sent.await.unwrap_or_else(|error| Err(error.to_string())) })
            }
        }
    }
}

async fn send(proxy: &Proxy, to: Destination, message: Bytes) -> Result<(), String> {
    let snapshot = proxy.snapshot.load_full();
    match to {
        Destination::Grpc { service, method } => {
            let limit = service.timeout.unwrap_or(TIMEOUT);
            let call = GrpcCall {
                service,
                method,
                message,
                metadata: Vec::new(),
            };
            match timeout(limit, grpc::tell(proxy, &snapshot, &call)).await {
                Ok(answer) => answer.map_err(|error| error.to_string()),
                Err(_) => Err(format!("the collector did not answer within {limit:?}")),
            }
        }
        Destination::Http(server) => {
            let Server {
                cluster,
                authority,
                path,
                mut headers,
                timeout: limit,
            } = *server;
            headers.insert(http::header::CONTENT_LENGTH, HeaderValue::from(message.len()));
            let call = HttpCall {
                cluster,
                timeout: Some(limit),
                head: RequestHead {
                    method: Method::POST,
                    path,
                    authority,
                    scheme: Scheme::Http,
                    headers,
                },
                body: message,
                max_answer: MAX_ANSWER,
            };
            match timeout(limit, call::http(proxy, &snapshot, &call)).await {
                Ok(Ok(reply)) if reply.status.is_success() => Ok(()),
                Ok(Ok(reply)) => Err(format!("the collector answered {}", reply.status)),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("the collector did not answer within {limit:?}")),
            }
        }
    }
}
