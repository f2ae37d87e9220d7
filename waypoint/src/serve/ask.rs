//! What filters ask of others while a request waits: calls over the same clusters and connections as the traffic.

use std::sync::Arc;

use cairn_filters::{GrpcAnswer, GrpcCall, GrpcError, HttpAnswer, HttpCall, HttpError, Services};
use tokio::time::timeout;

use super::{Inner, call, grpc};
use crate::{proxy::Proxy, snapshot::Snapshot};

/// Asks for one request, with the configuration that the request sees.
pub struct FromRequest<'r> {
    proxy: &'r Arc<Proxy>,
    snapshot: &'r Arc<Snapshot>,
}

// === impl FromRequest ===

impl<'r> FromRequest<'r> {
    /// On behalf of a request of this connection.
    pub fn new(inner: &'r Inner, snapshot: &'r Arc<Snapshot>) -> Self {
        Self {
            proxy: &inner.proxy,
            snapshot,
        }
    }
}

impl Services for FromRequest<'_> {
    fn grpc(&self, call: GrpcCall) -> GrpcAnswer {
        let (proxy, snapshot) = (self.proxy.clone(), self.snapshot.clone());
        Box::pin(async move {
            let answer = grpc::call(&proxy, &snapshot, &call);
            match call.service.timeout {
                None => answer.await,
                Some(limit) => timeout(limit, answer).await.unwrap_or(Err(GrpcError::Timeout)),
            }
        })
    }

    fn http(&self, call: HttpCall) -> HttpAnswer {
        let (proxy, snapshot) = (self.proxy.clone(), self.snapshot.clone());
        Box::pin(async move {
            let answer = call::http(&proxy, &snapshot, &call);
            match call.timeout {
                None => answer.await,
                Some(limit) => timeout(limit, answer).await.unwrap_or(Err(HttpError::Timeout)),
            }
        })
    }

    fn node_cluster(&self) -> &str {
        &self.proxy.settings.node.cluster
    }
}
