//! The answer on its way to the client, and the end of the exchange.
//!
//! An exchange ends when the last byte of its answer has been handed on, when the answer fails, or when the client goes away; whichever
//! it is, the record is completed and told once, the connection to the endpoint goes back or is given up, and the counters go down.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use cairn_exchange::{Exchange, RequestHead, ResponseFlags};
use cairn_filters::Run;
use cairn_telemetry::trace::Trace;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

use super::{
    Inner,
    limits::{Expired, Limits},
    open::{self, Asked, Vigil},
    pace::Pace,
};
use crate::{
    body::{BodyError, GivenUp, Incoming, RequestSource},
    snapshot::{Chain, ChainKind, HttpChain},
    stall::{self, Stall},
    upstream::{Cluster, Counted, Endpoint, Lease},
};

/// The body of an answer, with all that its end has to settle.
pub struct ResponseBody {
    incoming: Incoming,
    tail: Option<Box<Tail>>,
    /// How long the client has taken nothing, and may.
    stall: Stall,
    patience_ms: u32,
    /// It is slowed down.
    pace: Option<Box<Pace>>,
}

/// What the end of an exchange has to settle.
pub struct Tail {
    /// The client's connection.
    pub inner: Arc<Inner>,
    /// The record.
    pub exchange: Exchange,
    /// The chain; `None` when there was none.
    pub chain: Option<Arc<Chain>>,
    /// The run of the chain's filters.
    pub run: RunCell,
    /// The request's body, where there is one.
    pub source: Option<Arc<Mutex<RequestSource>>>,
    /// The connection to the endpoint.
    pub lease: Option<Leased>,
    /// The request as filters saw it, where the route has made another of it.
    pub asked: Option<Box<RequestHead>>,
    /// Whether it may stay open.
    pub vigil: Vigil,
    /// Its trace, where the chain traces.
    pub trace: Option<Box<Trace>>,
    /// How long it may last.
    pub limits: Option<Arc<Limits>>,
    /// The client's connection ends behind the answer.
    pub ends_connection: bool,
    /// With so many bytes the client has the whole answer, whether its end was seen or not.
    pub length: Option<u64>,
    /// Everything is settled.
    settled: bool,
}

/// A connection to an endpoint that belongs to an exchange.
pub struct Leased {
    /// The connection.
    pub lease: Lease,
    /// The request, as the cluster's limits count it.
    pub counted: Counted,
    /// The request, at its endpoint.
    pub active: Active,
}

/// A request at its endpoint, counted there while it lasts.
pub struct Active {
    endpoint: Arc<Endpoint>,
    cluster: Arc<Cluster>,
}

/// The run of filters over one request: alone with the request's task, or shared with the body that the filters watch.
#[allow(
    clippy::large_enum_variant,
    reason = "it stands in a box already, and the large variant is the usual one"
)]
pub enum RunCell {
    /// Alone.
    Own(Run),
    /// Shared.
    Shared(Arc<Mutex<Run>>),
}

// === impl RunCell ===

impl RunCell {
    /// Works with the run.
    pub fn with<T>(&mut self, f: impl FnOnce(&mut Run) -> T) -> T {
        match self {
            RunCell::Own(run) => f(run),
            RunCell::Shared(run) => f(&mut run.lock()),
        }
    }

    /// Shares the run with a body.
    pub fn share(&mut self) -> Arc<Mutex<Run>> {
        let shared = match self {
            RunCell::Shared(run) => return run.clone(),
            RunCell::Own(run) => Arc::new(Mutex::new(std::mem::take(run))),
        };
        *self = RunCell::Shared(shared.clone());
        shared
    }
}

// === impl Leased ===

impl Leased {
    /// Gives the connection back; `clean` when both sides of the exchange ended well.
    pub fn settle(self, clean: bool, near: u64) {
        let Active { endpoint, cluster } = &self.active;
        if let (Lease::Http1(connection), true) = (self.lease, clean) {
            endpoint.state.connections.put_http1(connection, &cluster.settings, near);
        }
    }
}

// === impl Active ===

impl Active {
    /// Counts a request at the endpoint.
    pub fn begin(endpoint: Arc<Endpoint>, cluster: Arc<Cluster>) -> Self {
        endpoint.state.active.fetch_add(1, Ordering::Relaxed);
        endpoint.state.total.fetch_add(1, Ordering::Relaxed);
        Self { endpoint, cluster }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.endpoint.state.active.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Tail ===

impl Tail {
    fn http(&self) -> Option<&HttpChain> {
        match &self.chain.as_ref()?.kind {
            ChainKind::Http(http) => Some(http),
            ChainKind::Tcp(_) | ChainKind::Refused { .. } => None,
        }
    }

    /// Bytes a second that the answer may have.
    fn answer_rate(&mut self) -> Option<u64> {
        let chain = self.chain.clone()?;
        match &chain.kind {
            ChainKind::Http(http) if http.filters.may_slow_down() => self.run.with(|run| http.filters.answer_rate(run)),
            _ => None,
        }
    }

    /// A piece of the answer passes.
    fn pass(&mut self, data: &mut Bytes, end: bool) {
        self.exchange.counts.sent += data.len() as u64;
        if let Some(chain) = self.chain.clone()
            && let ChainKind::Http(http) = &chain.kind
            && http.filters.needs().observe_response
        {
            self.run.with(|run| http.filters.encode_data(run, data, end));
        }
    }

    /// Ready when policy denies what it has let in before.
    fn poll_denied(&self, cx: &Context<'_>, waits: bool) -> Poll<()> {
        let asked = || Asked::request(&self.exchange, self.asked.as_deref());
        self.vigil.poll_denied(cx, &self.inner, self.chain.as_ref(), asked, waits)
    }

    /// The exchange is over; `clean` when the connection to the endpoint may be used again.
    pub fn finish(mut self: Box<Self>, clean: bool) {
        self.settle(clean);
    }

    fn settle(&mut self, clean: bool) {
        self.settled = true;
        self.vigil.end(&self.inner);
        if let Some(limits) = &self.limits {
            limits.finish();
        }
        let exchange = &mut self.exchange;
        let elapsed = exchange.elapsed();
        exchange.moments.last_sent = Some(elapsed);
        if exchange.upstream.is_some() {
            exchange.moments.last_upstream_received.get_or_insert(elapsed);
        }
        let mut request_done = true;
        if let Some(source) = &self.source {
            let mut source = source.lock();
            exchange.counts.received = source.received;
            exchange.moments.request_received = source.ended.map(|ended| ended.saturating_duration_since(exchange.start));
            request_done = source.ended.is_some();
            source.close();
        } else {
            exchange.moments.request_received.get_or_insert_default();
        }
        if let Some(leased) = self.lease.take() {
            leased.settle(clean && request_done, exchange.connection.id);
        }
        if let Some(chain) = self.chain.clone()
            && let ChainKind::Http(http) = &chain.kind
        {
            let exchange = &mut self.exchange;
            self.run.with(|run| http.filters.finish(run, exchange));
        }
        let proxy = &self.inner.proxy;
        if let Some(http) = self.http() {
            for rules in &http.metrics {
                proxy
                    .istio
                    .report_http(&view(&self.exchange), rules.as_ref(), Default::default());
            }
            http.access_logs.log(&view(&self.exchange));
        }
        if let (Some(trace), Some(chain)) = (self.trace.take(), &self.chain)
            && let ChainKind::Http(HttpChain {
                tracer: Some(tracer), ..
            }) = &chain.kind
        {
            tracer.finish(*trace, &self.exchange, &proxy.settings.node);
        }
        if let Some(observer) = &proxy.observer {
            observer(&self.exchange);
        }
        proxy.live.exchanges.fetch_sub(1, Ordering::Relaxed);
        self.inner.done();
    }
}

// === impl ResponseBody ===

impl ResponseBody {
    /// The body of an answer; the exchange ends with it.
    pub fn new(incoming: Incoming, mut tail: Box<Tail>) -> Self {
        let idle = tail.limits.as_ref().and_then(|limits| limits.idle());
        let pace = tail.answer_rate().map(|rate| Box::new(Pace::new(rate)));
        let mut body = Self {
            incoming,
            tail: Some(tail),
            stall: Stall::default(),
            patience_ms: u32::try_from(idle.unwrap_or(stall::LONGEST).as_millis()).unwrap_or(u32::MAX),
            pace,
        };
        if body.incoming.is_empty() {
            body.end(true);
        }
        body
    }

    /// No body, and nothing to settle.
    pub fn empty() -> Self {
        Self {
            incoming: Incoming::Empty,
            tail: None,
            stall: Stall::default(),
            patience_ms: 0,
            pace: None,
        }
    }

    /// How long its exchange may last.
    pub fn limits(&self) -> Option<Arc<Limits>> {
        self.tail.as_ref()?.limits.clone()
    }

    /// The exchange lasts too long.
    fn expire(&mut self, expired: Expired) -> BodyError {
        self.incoming = Incoming::Empty;
        let (flags, details) = expired.told();
        self.fail(flags, details);
        BodyError::Timeout
    }

    /// Policy denies the exchange now.
    fn deny(&mut self) -> BodyError {
        self.incoming = Incoming::Empty;
        self.fail(ResponseFlags::NONE, open::DENIED);
        BodyError::Denied
    }

    fn end(&mut self, clean: bool) {
        if let Some(tail) = self.tail.take() {
            tail.finish(clean);
        }
    }

    fn fail(&mut self, flags: ResponseFlags, details: &'static str) {
        if let Some(tail) = &mut self.tail {
            // The answer had begun well, and ended otherwise: the end is what there is to tell.
            tail.exchange.details = None;
            tail.exchange.because(flags, details);
        }
        self.end(false);
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        this.stall.moved();
        let next = match &mut this.pace {
            None => Pin::new(&mut this.incoming).poll_frame(cx),
            Some(pace) => pace.poll(&mut this.incoming, cx),
        };
        if let Some(limits) = this.tail.as_ref().and_then(|tail| tail.limits.as_ref()) {
            if next.is_ready() {
                limits.moved();
            }
            if let Poll::Ready(expired) = limits.poll(cx) {
                return Poll::Ready(Some(Err(this.expire(expired))));
            }
        }
        if let Some(tail) = &this.tail
            && tail.poll_denied(cx, next.is_pending()).is_ready()
        {
            return Poll::Ready(Some(Err(this.deny())));
        }
        match ready!(next) {
            None => {
                this.end(true);
                Poll::Ready(None)
            }
            Some(Err(error)) => {
                let (flags, details) = why_cut(&error);
                this.fail(flags, details);
                Poll::Ready(Some(Err(error)))
            }
            Some(Ok(frame)) => {
                let end = this.is_end_stream();
                let frame = match frame.into_data() {
                    Ok(mut data) => {
                        if let Some(tail) = &mut this.tail {
                            tail.pass(&mut data, end);
                        }
                        Frame::data(data)
                    }
                    Err(mut frame) => {
                        let instead = match (&mut this.tail, frame.trailers_mut()) {
                            (Some(tail), Some(trailers)) => tail.trailers(trailers),
                            _ => None,
                        };
                        instead.map_or(frame, Frame::data)
                    }
                };
                if end {
                    this.end(true);
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream() && self.pace.as_ref().is_none_or(|pace| pace.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        // A filter that sees the data may change its length.
        let seen = self
            .tail
            .as_ref()
            .and_then(|tail| tail.http())
            .is_some_and(|http| http.filters.needs().observe_response);
        if seen {
            SizeHint::default()
        } else {
            self.incoming.size_hint()
        }
    }
}

impl GivenUp for ResponseBody {
    /// Over when the exchange lasts too long, policy denies it now, or the client takes nothing for too long.
    fn poll_given_up(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        let limits = self.tail.as_ref().and_then(|tail| tail.limits.as_deref());
        if let Some(Poll::Ready(expired)) = limits.map(|limits| limits.poll(cx)) {
            return Poll::Ready(self.expire(expired));
        }
        if self.tail.as_ref().is_some_and(|tail| tail.poll_denied(cx, true).is_ready()) {
            return Poll::Ready(self.deny());
        }
        ready!(self.stall.poll(cx, Duration::from_millis(self.patience_ms.into())));
        self.expire(Expired::Idle);
        Poll::Ready(BodyError::Stalled)
    }
}

impl Tail {
    /// The answer's trailers pass; what is returned goes out as the end of the body in their place.
    fn trailers(&mut self, trailers: &mut http::HeaderMap) -> Option<Bytes> {
        if self.exchange.grpc_status.is_none() {
            self.exchange.grpc_status = grpc_status(trailers);
        }
        if let Some(chain) = self.chain.clone()
            && let ChainKind::Http(http) = &chain.kind
        {
            let instead = self.run.with(|run| http.filters.encode_trailers(run, trailers))?;
            self.exchange.counts.sent += instead.len() as u64;
            return Some(instead);
        }
        None
    }
}

fn view(exchange: &Exchange) -> cairn_exchange::format::View<'_> {
    cairn_exchange::format::View::new(exchange)
}

/// The status of a gRPC answer, from its trailers, or from its head when it has nothing else.
pub fn grpc_status(headers: &http::HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// What the record says of an answer that was cut.
fn why_cut(error: &BodyError) -> (ResponseFlags, &'static str) {
    match error {
        BodyError::Http1(error) if error.is_parse() => (
            ResponseFlags::UPSTREAM_PROTOCOL_ERROR,
            "upstream_reset_after_response_started{protocol_error}",
        ),
        BodyError::Http2(error) if error.is_reset() && error.is_remote() => (
            ResponseFlags::UPSTREAM_REMOTE_RESET,
            "upstream_reset_after_response_started{remote_reset}",
        ),
        _ => (
            ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
            "upstream_reset_after_response_started{connection_termination}",
        ),
    }
}

impl Drop for Tail {
    /// The client went away, or its connection was given up: hyper and h2 drop what they cannot deliver, and there is no other sign
    /// of it.
    fn drop(&mut self) {
        if !self.settled && self.length == Some(self.exchange.counts.sent) {
            self.settle(false);
        }
        if !self.settled {
            self.exchange.details = None;
            let stalled = self.inner.line.as_ref().is_some_and(|line| line.is_stalled());
            let expired = self.limits.as_ref().and_then(|limits| limits.expired());
            let (flags, details) = match expired.or(stalled.then_some(Expired::Idle)) {
                Some(expired) => expired.told(),
                None if self.inner.changes.is_ended() => (ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION, open::GONE),
                None => (
                    ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION,
                    "downstream_remote_disconnect",
                ),
            };
            self.exchange.because(flags, details);
            self.settle(false);
        }
    }
}

impl Tail {
    /// The beginning of an exchange, before anything is known but its start.
    pub fn begin(inner: Arc<Inner>, exchange: Exchange) -> Box<Self> {
        inner.proxy.live.exchanges.fetch_add(1, Ordering::Relaxed);
        inner.busy();
        let vigil = Vigil::new(exchange.snapshot);
        Box::new(Self {
            inner,
            exchange,
            chain: None,
            run: RunCell::Own(Run::default()),
            source: None,
            lease: None,
            asked: None,
            vigil,
            trace: None,
            limits: None,
            ends_connection: false,
            length: None,
            settled: false,
        })
    }
}
