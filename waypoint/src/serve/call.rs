//! Requests to a cluster's endpoint beside those of clients: of our own, for filters, and copies for mirrors.
//!
//! They go the way of the traffic, over the same endpoints, tunnels and connections, and count as requests of their cluster. They are
//! made once: what becomes of a request whose call fails is for its filter to say.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, atomic::AtomicBool},
};

use bytes::{Bytes, BytesMut};
use cairn_exchange::{Protocol, RequestHead, SpiffeId};
use cairn_filters::{HttpCall, HttpError, HttpReply};
use http_body::Body as _;
use parking_lot::Mutex;

use super::{
    forward::tell_outliers,
    response::{Active, Leased},
};
use crate::{
    body::{Incoming, RequestBody, RequestSource},
    proxy::Proxy,
    snapshot::Snapshot,
    upstream::{Answer, Attempt, AttemptError, Avoid, Cluster, Counted, Discovery, Key, Level, Picking, Purpose, host_and_port},
};

/// Nobody's address: we speak for ourselves, and no PROXY header tells of it.
const NO_CLIENT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// On whose behalf a request is made.
pub struct Caller {
    /// Whose connections it may share.
    pub principal: Option<SpiffeId>,
    /// Where the client is.
    pub address: SocketAddr,
    /// The client's connection: chooses among idle ones.
    pub connection: u64,
    /// What the client speaks.
    pub protocol: Protocol,
}

/// A request that was sent, and its answer's head.
pub struct Sent {
    /// The answer.
    pub answer: Answer,
    /// What it takes up until the answer has been read.
    counted: (Counted, Active),
}

/// Sends a request of our own; an error says why there is no answer. Bounded in time by the caller.
pub async fn send(proxy: &Proxy, snapshot: &Snapshot, cluster: &str, head: &RequestHead, body: Bytes) -> Result<Sent, String> {
    let cluster = snapshot
        .clusters
        .get(cluster)
        .cloned()
        .ok_or_else(|| format!("there is no cluster {cluster}"))?;
    let body = if body.is_empty() {
        Incoming::Empty
    } else {
        Incoming::whole(body, None)
    };
    let body = RequestBody::next_attempt(&Arc::new(Mutex::new(RequestSource::new(body, false))));
    let ourselves = Caller {
        principal: None,
        address: NO_CLIENT,
        connection: 0,
        protocol: Protocol::Http2,
    };
    send_body(proxy, snapshot, cluster, head, body, &ourselves).await
}

/// Sends a request; an error says why there is no answer. Bounded in time by the caller.
pub async fn send_body(
    proxy: &Proxy,
    snapshot: &Snapshot,
    cluster: Arc<Cluster>,
    head: &RequestHead,
    body: RequestBody,
    caller: &Caller,
) -> Result<Sent, String> {
    let endpoint = match &cluster.settings.discovery {
        Discovery::DynamicForwardProxy(terms) => {
            let named = host_and_port(head.authority.as_bytes());
            let (host, port) = named.ok_or_else(|| format!("`{:?}` names no host", head.authority))?;
            let port = port.unwrap_or(terms.port);
            let found = cluster.state.hosts.endpoint(proxy.connector.names(), terms, host, port).await;
            found.map_err(|error| error.to_string())?
        }
        _ => {
            cluster.resolved().await;
            let endpoint = Picking::new(&cluster).next(fastrand::u64(..), Avoid::default());
            endpoint.ok_or_else(|| format!("nobody is available in cluster {}", cluster.facts.name))?
        }
    };
    let active = Active::begin(endpoint.clone(), cluster.clone());
    let attempt = Attempt {
        connector: &proxy.connector,
        snapshot,
        cluster: &cluster,
        endpoint: &endpoint,
        original: None,
        key: Key {
            transport: cluster.transport_hash,
            tunnel: proxy.connector.tunnel_terms(snapshot, &endpoint.target),
            principal: caller.principal.clone(),
            original: None,
            purpose: Purpose::of(
                cluster.transport_to(&endpoint),
                cluster.settings.names_by_host,
                Some(head.authority.as_bytes()),
                caller.address,
                None,
            ),
            level: Level::default(),
        },
        near: caller.connection,
        sent: &AtomicBool::new(false),
        downstream: caller.protocol,
        upgrade: false,
        spelling: &http::Extensions::new(),
        informational: None,
        limit: None,
        source: None,
    };
    let result = attempt.send(head, body).await;
    let grpc = head.is_grpc();
    tell_outliers(&proxy.outliers, &cluster, &endpoint, &result, grpc);
    let (answer, counted) = result.map_err(|error| match error {
        AttemptError::Connect(error) => error.to_string(),
        other => format!("the service's connection failed: {other:?}"),
    })?;
    Ok(Sent {
        answer,
        counted: (counted, active),
    })
}

impl Sent {
    /// The answer has been read; its connection may be used again if the request was taken too.
    pub fn settle(self, taken: bool, near: u64) {
        let (counted, active) = self.counted;
        let lease = self.answer.lease;
        Leased { lease, counted, active }.settle(taken, near);
    }
}

/// Sends an HTTP request and reads its whole answer.
pub async fn http(proxy: &Proxy, snapshot: &Snapshot, call: &HttpCall) -> Result<HttpReply, HttpError> {
    let sent = send(proxy, snapshot, &call.cluster, &call.head, call.body.clone()).await;
    let mut sent = sent.map_err(HttpError::Unreachable)?;
    let mut bytes = BytesMut::new();
    let body = &mut sent.answer.body;
    while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut *body).poll_frame(cx)).await {
        let frame = frame.map_err(|error| HttpError::Unreachable(format!("the answer was cut: {error}")))?;
        match frame.into_data() {
            Ok(data) if bytes.len() + data.len() > call.max_answer => return Err(HttpError::TooLarge(call.max_answer)),
            Ok(data) => bytes.extend_from_slice(&data),
            Err(_) => {}
        }
    }
    Ok(HttpReply {
        status: sent.answer.head.status,
        headers: sent.answer.head.headers,
        body: bytes.freeze(),
    })
}
