//! One attempt to send a request to one endpoint.
//!
//! An idle HTTP/1.1 connection may be closed by its endpoint at the very moment when it is taken. As long as nothing of the request was
//! written that is nobody's failure: the request goes to the next connection.

use std::{
    future::poll_fn,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::{Protocol, RequestHead};
use cairn_filters::ResponseHead;
use cairn_policy::headers::upgrade_kind;
use futures_util::{
    FutureExt as _,
    future::{Either, select},
    task::AtomicWaker,
};
use h2::{Reason, SendStream};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use http_body::Body as _;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{task::AbortHandle, time::sleep};

use super::{
    Cluster, ConnectError, Connected, Connector, Counted, Endpoint, Resource, Toward, UpstreamProtocol,
    connections::{Connections, Http1, Http2Lease, Key},
    queue::{Permit, Queues, Turn, Waited},
};
use crate::{
    body::{Incoming, RequestBody, RequestSource},
    pump::pump,
    serve::{Informational, request_end, upgrade},
    snapshot::Snapshot,
};

/// Idle connections that may turn out to be closed before a new one is made.
const MAX_STALE: usize = 8;
/// Windows of HTTP/2 connections to endpoints.
const HTTP2_STREAM_WINDOW: u32 = 256 * 1024;
const HTTP2_CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
/// Largest head of an answer.
const MAX_RESPONSE_HEAD: u32 = 64 * 1024;

/// What an attempt needs to know.
pub struct Attempt<'a> {
    /// Opens streams.
    pub connector: &'a Connector,
    /// The configuration of the request.
    pub snapshot: &'a Snapshot,
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// Where the client wanted to go.
    pub original: Option<SocketAddr>,
    /// What the connection has to have been made under.
    pub key: Key,
    /// Chooses the stack of idle connections.
    pub near: u64,
    /// Set when a connection has taken the request.
    pub sent: &'a AtomicBool,
    /// What the client speaks.
    pub downstream: Protocol,
    /// Whether the client asks for an upgrade.
    pub upgrade: bool,
    /// How the names of the request's fields were spelled, where that is kept.
    pub spelling: &'a http::Extensions,
    /// Where informational answers go.
    pub informational: Option<&'a Arc<InformationalRelay>>,
    /// How long the head of the answer may take, once there is a connection and the client's request has ended.
    pub limit: Option<Duration>,
    /// Where the client's request comes from, if it has a body.
    pub source: Option<&'a Mutex<RequestSource>>,
}

/// Passes informational answers from an endpoint's connection to the client's.
#[derive(Debug, Default)]
pub struct InformationalRelay {
    /// Where the client's connection takes them from.
    pub queue: Informational,
    /// Wakes the client's connection, which then flushes.
    pub connection: AtomicWaker,
}

/// An answer.
pub struct Answer {
    /// Its head.
    pub head: ResponseHead,
    /// Its body.
    pub body: Incoming,
    /// The connection that it comes on.
    pub lease: Lease,
    /// Our end of that connection.
    pub local_address: Option<SocketAddr>,
    /// The byte stream after a 101.
    pub upgrade: Option<Box<upgrade::Endpoint>>,
    /// How the names of its fields were spelled, where that is kept.
    pub spelling: http::Extensions,
}

/// The connection of an exchange.
#[allow(
    clippy::large_enum_variant,
    reason = "it stands in a box already, and the large variant is the usual one"
)]
pub enum Lease {
    /// For this exchange alone; to be put back when both sides are done.
    Http1(Http1),
    /// Shared.
    Http2(Http2Lease, Option<Upload>),
}

/// A request's body on its way into an HTTP/2 stream, which ends with the exchange: when nobody waits for the answer any more, the
/// endpoint is told (CANCEL), whether it takes the body or not.
pub struct Upload(AbortHandle);

/// Why there is no answer.
#[derive(Debug)]
pub enum AttemptError {
    /// No connection: nothing was sent, the body is untouched.
    Connect(ConnectError),
    /// There was no answer in time.
    Late,
    /// The cluster's limits are reached: nothing was sent.
    Overflow,
    /// The endpoint refused the stream before it did anything.
    Refused,
    /// The endpoint closed the connection before anything was sent.
    Closed,
    /// The endpoint closed the connection.
    Terminated,
    /// The endpoint reset the stream.
    Reset(h2::Reason),
    /// The endpoint broke the protocol.
    Protocol(String),
    /// The client's body ended early.
    RequestBody,
    /// The request cannot be put into the endpoint's protocol.
    Unsendable(String),
}

// === impl Attempt ===

impl Attempt<'_> {
    /// Sends the request; beside the answer, the request as the cluster's limits count it.
    pub async fn send(&self, request: &RequestHead, body: RequestBody) -> Result<(Answer, Counted), AttemptError> {
        let http2 = match self.cluster.settings.protocol {
            UpstreamProtocol::Http1 => false,
            UpstreamProtocol::Http2 => true,
            UpstreamProtocol::Downstream => self.downstream == Protocol::Http2,
        };
        if http2 && self.upgrade {
            // In a box: it is rare, and the others need no place for it.
            Box::pin(self.send_extended(request, &body)).await
        } else if http2 {
            self.send_http2(request, body).await
        } else {
            self.send_http1(request, body).await
        }
    }

    /// Waits for the answer to a request that is about to leave.
    async fn in_time<T>(&self, mut answer: impl Future<Output = T> + Unpin) -> Option<T> {
        let Some(limit) = self.limit else {
            return Some(answer.await);
        };
        // In a box, since few attempts have a limit.
        let late = Box::pin(async move {
            if let Some(source) = self.source {
                request_end(source).await;
            }
            sleep(limit).await;
        });
        match select(&mut answer, late).await {
            Either::Left((answer, _)) => Some(answer),
            Either::Right(_) => None,
        }
    }

    async fn connect(&self, speak: &'static [u8]) -> Result<Connected, AttemptError> {
        self.connector
            .connect(&Toward {
                snapshot: self.snapshot,
                cluster: self.cluster,
                endpoint: self.endpoint,
                original: self.original,
                purpose: self.key.purpose.as_deref(),
                speak: Some(speak),
            })
            .await
            .map_err(AttemptError::Connect)
    }

    /// The request as HTTP/1.1.
    fn http1_message(&self, request: &RequestHead, body: RequestBody) -> http::Request<RequestBody> {
        let body_ended = body.is_end_stream();
        let mut message = http::Request::new(body);
        *message.method_mut() = request.method.clone();
        *message.uri_mut() = Uri::from(request.path.clone());
        let mut headers = request.headers.clone();
        headers.insert(header::HOST, request.authority.clone());
        // A request without a body says so where its method leaves it open, as Envoy's does.
        if body_ended && !has_no_body(&request.method) {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        // hyper takes a GET or HEAD of unknown length for one without a body.
        if !body_ended && !headers.contains_key(header::CONTENT_LENGTH) && message.body().size_hint().exact().is_none() {
            headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        *message.headers_mut() = headers;
        if self.cluster.settings.preserve_header_case {
            *message.extensions_mut() = self.spelling.clone();
        }
        if let Some(relay) = self.informational {
            let relay = relay.clone();
            hyper::ext::on_informational(&mut message, move |answer| relay.pass(answer.status(), answer.headers()));
        }
        message
    }

    async fn send_http1(&self, request: &RequestHead, body: RequestBody) -> Result<(Answer, Counted), AttemptError> {
        let mut message = self.http1_message(request, body);
        let mut stale = 0;
        loop {
            let (mut connection, reused) = match self.idle_http1().filter(|_| stale < MAX_STALE) {
                Some(connection) => (connection, true),
                // In a box: requests that find a connection need no place for the making of one.
                None => Box::pin(self.http1()).await?,
            };
            if connection.sender.ready().await.is_err() {
                if reused {
                    stale += 1;
                    continue;
                }
                return Err(AttemptError::Closed);
            }
            let Some(counted) = self.request() else {
                let connections = &self.endpoint.state.connections;
                connections.put_http1(connection, &self.cluster.settings, self.near);
                return Err(AttemptError::Overflow);
            };
            connection.requests += 1;
            let Some(answered) = self.in_time(pin!(connection.sender.try_send_request(message))).await else {
                return Err(AttemptError::Late);
            };
            match answered {
                Ok(mut answer) => {
                    let upgrade = (answer.status() == StatusCode::SWITCHING_PROTOCOLS)
                        .then(|| Box::new(upgrade::Endpoint::Http1(hyper::upgrade::on(&mut answer))));
                    let local_address = connection.local_address;
                    let (parts, body) = answer.into_parts();
                    let answer = Answer {
                        head: ResponseHead {
                            status: parts.status,
                            headers: parts.headers,
                        },
                        body: Incoming::http1(body),
                        lease: Lease::Http1(connection),
                        local_address,
                        upgrade,
                        spelling: parts.extensions,
                    };
                    return Ok((answer, counted));
                }
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) if reused => {
                        message = unsent;
                        stale += 1;
                    }
                    Some(_) => return Err(AttemptError::Closed),
                    None => return Err(AttemptError::from(failed.into_error())),
                },
            }
        }
    }

    /// The request begins.
    fn request(&self) -> Option<Counted> {
        let breakers = &self.cluster.settings.breakers;
        let counted = Counted::within(&self.cluster.state, breakers, self.key.level, Resource::Request)?;
        self.sent.store(true, Ordering::Relaxed);
        Some(counted)
    }

    /// The request waits for a connection.
    fn pending(&self) -> Result<Counted, AttemptError> {
        let breakers = &self.cluster.settings.breakers;
        Counted::within(&self.cluster.state, breakers, self.key.level, Resource::Pending).ok_or(AttemptError::Overflow)
    }

    fn idle_http1(&self) -> Option<Http1> {
        let connections = &self.endpoint.state.connections;
        connections.take_http1(&self.key, &self.cluster.settings, self.near)
    }

    /// A connection for this request alone, and whether it has been used before: made, or waited for.
    async fn http1(&self) -> Result<(Http1, bool), AttemptError> {
        let state = &self.endpoint.state;
        let _pending = self.pending()?;
        loop {
            match Connections::turn_http1(state, self.cluster, &self.key, self.near) {
                Turn::Use(connection) => return Ok((connection, true)),
                Turn::Open(permit) => return Ok((self.open_http1(permit).await?, false)),
                Turn::Wait(waiting) => match waiting.turn().await {
                    Waited::Again => {
                        // Of the queue's first, what was put back for it.
                        if let Some(connection) = self.idle_http1() {
                            return Ok((connection, true));
                        }
                    }
                    Waited::Failed(error) => return Err(AttemptError::Connect(error)),
                },
            }
        }
    }

    async fn open_http1(&self, permit: Permit) -> Result<Http1, AttemptError> {
        let connected = self.connect(b"http/1.1").await?;
        // At most 100 fields in the head of an answer: hyper's own limit, which costs it less than one that is set.
        let (sender, connection) = hyper::client::conn::http1::Builder::new()
            .preserve_header_case(self.cluster.settings.preserve_header_case)
            .handshake(TokioIo::new(connected.io))
            .await
            .map_err(AttemptError::from)?;
        let permit = Arc::new(permit);
        let counted = permit.clone();
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "connection to an endpoint ended");
            }
            drop(counted);
        });
        Ok(Http1::new(sender, self.key.clone(), connected.local_address, permit))
    }

    /// The request as HTTP/2.
    fn http2_message(request: &RequestHead) -> Result<http::Request<()>, AttemptError> {
        let uri = Uri::builder()
            .scheme(match request.scheme {
                cairn_exchange::Scheme::Http => "http",
                cairn_exchange::Scheme::Https => "https",
            })
            .authority(request.authority.as_bytes())
            .path_and_query(request.path.clone())
            .build()
            .map_err(|error| AttemptError::Unsendable(error.to_string()))?;
        let mut message = http::Request::new(());
        *message.method_mut() = request.method.clone();
        *message.uri_mut() = uri;
        *message.version_mut() = http::Version::HTTP_2;
        *message.headers_mut() = request.headers.clone();
        message.headers_mut().remove(header::TRANSFER_ENCODING);
        Ok(message)
    }

    async fn send_http2(&self, request: &RequestHead, body: RequestBody) -> Result<(Answer, Counted), AttemptError> {
        let (lease, mut sender) = self.http2().await?;
        let counted = self.request().ok_or(AttemptError::Overflow)?;
        let local_address = lease.local_address();
        let end = body.is_end_stream();
        let (answer, stream) = sender.send_request(Self::http2_message(request)?, end).map_err(|error| {
            lease.retire();
            AttemptError::from(error)
        })?;
        // Request and answer go their ways independently (full duplex).
        let upload = (!end).then(|| Upload::begin(body, stream));
        let mut answer = answer;
        let answer = poll_fn(|cx| {
            while let (Poll::Ready(Some(Ok(early))), Some(relay)) = (answer.poll_informational(cx), self.informational) {
                relay.pass(early.status(), early.headers());
            }
            answer.poll_unpin(cx)
        });
        let answer = self.in_time(answer).await.ok_or(AttemptError::Late)?.map_err(|error| {
            if error.is_go_away() || error.is_io() {
                lease.retire();
            }
            AttemptError::from(error)
        })?;
        let (parts, body) = answer.into_parts();
        let answer = Answer {
            head: ResponseHead {
                status: parts.status,
                headers: parts.headers,
            },
            body: Incoming::http2(body),
            lease: Lease::Http2(lease, upload),
            local_address,
            upgrade: None,
            spelling: http::Extensions::new(),
        };
        Ok((answer, counted))
    }

    /// Asks for a switch by an extended CONNECT (RFC 8441). As by Envoy, whether or not the endpoint has said that it knows it: one that
    /// does not answers with an error, and nothing else that we could say means the same.
    async fn send_extended(&self, request: &RequestHead, body: &RequestBody) -> Result<(Answer, Counted), AttemptError> {
        if !body.is_end_stream() {
            return Err(AttemptError::Unsendable("an upgrade with a body".to_owned()));
        }
        let unsendable = || AttemptError::Unsendable("an upgrade to nothing".to_owned());
        let kind = upgrade_kind(&request.headers).ok_or_else(unsendable)?;
        let mut message = Self::http2_message(request)?;
        *message.method_mut() = Method::CONNECT;
        for name in [header::CONNECTION, header::UPGRADE, header::CONTENT_LENGTH] {
            message.headers_mut().remove(name);
        }
        message.extensions_mut().insert(h2::ext::Protocol::from(kind));
        let (lease, mut sender) = self.http2().await?;
        let counted = self.request().ok_or(AttemptError::Overflow)?;
        let local_address = lease.local_address();
        let (answer, mut send) = sender.send_request(message, false).map_err(|error| {
            lease.retire();
            AttemptError::from(error)
        })?;
        let answer = self.in_time(answer).await.ok_or(AttemptError::Late)?.map_err(|error| {
            if error.is_go_away() || error.is_io() {
                lease.retire();
            }
            AttemptError::from(error)
        })?;
        let (parts, recv) = answer.into_parts();
        let mut head = ResponseHead {
            status: parts.status,
            headers: parts.headers,
        };
        let (body, upgrade) = if head.status == StatusCode::OK {
            head.status = StatusCode::SWITCHING_PROTOCOLS;
            head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            if let Some(kind) = request.headers.get(header::UPGRADE) {
                head.headers.insert(header::UPGRADE, kind.clone());
            }
            head.headers.remove(header::CONTENT_LENGTH);
            let switched = upgrade::Endpoint::Http2(upgrade::stream(send, recv));
            (Incoming::Empty, Some(Box::new(switched)))
        } else {
            // Nothing more comes from us; an endpoint that has ended the stream already need not hear it.
            let _ = send.send_data(Bytes::new(), true);
            (Incoming::http2(recv), None)
        };
        let answer = Answer {
            head,
            body,
            lease: Lease::Http2(lease, None),
            local_address,
            upgrade,
            spelling: http::Extensions::new(),
        };
        Ok((answer, counted))
    }

    /// A connection that takes another request: one that is there, or a new one.
    async fn http2(&self) -> Result<(Http2Lease, h2::client::SendRequest<Bytes>), AttemptError> {
        if let Some(lease) = Connections::take_http2(&self.endpoint.state, &self.key, &self.cluster.settings) {
            match lease.sender().ready().await {
                Ok(sender) => return Ok((lease, sender)),
                Err(_) => lease.retire(),
            }
        }
        // In a box: requests that find a connection need no place for the making of one.
        Box::pin(self.other_http2()).await
    }

    async fn other_http2(&self) -> Result<(Http2Lease, h2::client::SendRequest<Bytes>), AttemptError> {
        let mut pending = None;
        let mut stale = 0;
        loop {
            let there = Connections::take_http2(&self.endpoint.state, &self.key, &self.cluster.settings);
            let (lease, made) = match there.filter(|_| stale < MAX_STALE) {
                Some(lease) => (lease, false),
                None => {
                    if pending.is_none() {
                        pending = Some(self.pending()?);
                    }
                    match Connections::turn_http2(&self.endpoint.state, self.cluster, &self.key) {
                        Turn::Use(lease) => (lease, false),
                        Turn::Open(permit) => (self.open_http2(permit).await?, true),
                        Turn::Wait(waiting) => match waiting.turn().await {
                            Waited::Again => continue,
                            Waited::Failed(error) => return Err(AttemptError::Connect(error)),
                        },
                    }
                }
            };
            match lease.sender().ready().await {
                Ok(sender) => return Ok((lease, sender)),
                // It ended while nobody used it, or takes no more requests.
                Err(_) => lease.retire(),
            }
            stale += 1;
            if made || stale > MAX_STALE {
                return Err(AttemptError::Closed);
            }
        }
    }

    async fn open_http2(&self, permit: Permit) -> Result<Http2Lease, AttemptError> {
        let opening = Queues::opening(&self.endpoint.state, &self.key);
        let connected = match self.connect(b"h2").await {
            Ok(connected) => connected,
            Err(error) => {
                if let AttemptError::Connect(error) = &error {
                    opening.failed(error);
                }
                return Err(error);
            }
        };
        let (sender, connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(HTTP2_STREAM_WINDOW)
            .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
            .max_header_list_size(MAX_RESPONSE_HEAD)
            .handshake(connected.io)
            .await
            .map_err(AttemptError::from)?;
        let gone = Arc::new(AtomicBool::new(false));
        let ended = gone.clone();
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to an endpoint ended");
            }
            ended.store(true, Ordering::Release);
            drop(permit);
        });
        let state = &self.endpoint.state;
        let lease = Connections::add_http2(state, sender, self.key.clone(), gone, connected.local_address);
        // From here on whoever waited finds it.
        drop(opening);
        Ok(lease)
    }
}

/// Methods of which everybody knows that there is no body.
fn has_no_body(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::DELETE | Method::TRACE | Method::CONNECT
    )
}

// === impl Upload ===

impl Upload {
    fn begin(body: RequestBody, stream: SendStream<Bytes>) -> Self {
        let task = tokio::spawn(async move {
            if let Err(error) = pump(body, stream, Reason::CANCEL).await {
                tracing::debug!(%error, "a request's body did not reach its endpoint");
            }
        });
        Self(task.abort_handle())
    }
}

impl Drop for Upload {
    /// The stream goes with its task; h2 resets one that nobody holds and that has not ended.
    fn drop(&mut self) {
        self.0.abort();
    }
}

// === impl InformationalRelay ===

impl InformationalRelay {
    /// Passes one on. 100 is answered by the client's own connection, 101 is no information.
    fn pass(&self, status: StatusCode, headers: &HeaderMap) {
        if matches!(status.as_u16(), 100 | 101) {
            return;
        }
        let mut answer = http::Response::new(());
        *answer.status_mut() = status;
        *answer.headers_mut() = headers.clone();
        self.queue.push(answer);
        self.connection.wake();
    }
}

// === impl AttemptError ===

impl From<hyper::Error> for AttemptError {
    fn from(error: hyper::Error) -> Self {
        if error.is_parse() {
            return AttemptError::Protocol(error.to_string());
        }
        if error.is_user() {
            return AttemptError::RequestBody;
        }
        AttemptError::Terminated
    }
}

impl From<h2::Error> for AttemptError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(h2::Reason::REFUSED_STREAM) => AttemptError::Refused,
            // RFC 9113 §6.8: streams above the last one that GOAWAY names were not looked at; the others are not told of it.
            Some(_) if error.is_go_away() && error.is_remote() => AttemptError::Refused,
            Some(reason) if error.is_reset() && error.is_remote() => AttemptError::Reset(reason),
            Some(reason) if error.is_library() => AttemptError::Protocol(reason.to_string()),
            _ => AttemptError::Terminated,
        }
    }
}
