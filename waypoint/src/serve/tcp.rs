//! Bytes: from a client's tunnel to an endpoint and back, until both sides have ended.
//!
//! The decision comes before the connection, and the connection before the answer to a declared port's CONNECT: a client that may not
//! enter is never seen by the endpoint, and one whose endpoint is not there is told so. Half-closes are passed on as such; a reset of
//! one side resets the other.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use cairn_exchange::{Exchange, Protocol, ResponseFlags, Upstream, clock};
use cairn_filters::local_ratelimit;
use cairn_hbone::{Connect, TunnelStream};
use cairn_policy::{outlier::Report, route::hash_address};
use cairn_telemetry::istio::TcpReport;
use http::StatusCode;
use tokio::{
    io::AsyncWrite as _,
    time::{Instant, timeout},
};

use super::{Inner, authorize, detect::FirstBytes, tunnel};
use crate::{
    proxy::under,
    snapshot::{Chain, ChainKind, Serves, Snapshot, TcpChain, matcher::Spoken},
    upstream::{Avoid, ConnectError, Counted, Endpoint, Level, Picking, Resource, UpstreamIo},
};

/// Endpoints that are tried for one connection: of which no byte was sent, so that another try harms nobody.
const MAX_TRIES: u32 = 3;
/// Envoy's idle timeout of TCP connections.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// A port that is declared as TCP: connects first, then answers.
pub async fn declared(inner: Arc<Inner>, snapshot: Arc<Snapshot>, chain: Arc<Chain>, connect: Connect) {
    let mut connect = connect;
    let opened = tokio::select! {
        opened = Box::pin(Passage::open(&inner, &snapshot, &chain, Tells::Failure)) => opened,
        () = connect.cancelled() => {
            tracing::info!(authority = %inner.connection.authority, client = %inner.connection.remote_address, "CONNECT cancelled before its endpoint was connected");
            return;
        }
    };
    drop((snapshot, chain));
    let mut passage = match opened {
        Ok(passage) => passage,
        Err(refused) => {
            match refused.denied {
                true => tunnel::deny(&inner, connect, &refused.why),
                false => tunnel::refuse(&inner, connect, refused.status, &refused.why),
            }
            return;
        }
    };
    match connect.accept(tunnel::answer_headers(&inner)) {
        Ok(stream) => passage.run(stream, Bytes::new()).await,
        Err(_) => passage.close(End::ClientGone),
    }
}

/// A port whose protocol was found out: the CONNECT has been answered.
pub async fn detected(inner: Arc<Inner>, snapshot: Arc<Snapshot>, chain: Arc<Chain>, stream: TunnelStream, held: Bytes) {
    let opened = Box::pin(Passage::open(&inner, &snapshot, &chain, Tells::Failure)).await;
    drop((snapshot, chain));
    match opened {
        Ok(passage) => passage.run(stream, held).await,
        Err(refused) => {
            tracing::info!(authority = %inner.connection.authority, client = %inner.connection.remote_address, why = %refused.why, "connection refused");
            stream.reset(h2::Reason::CONNECT_ERROR);
        }
    }
}

/// Who said the first byte on a port of unknown protocol.
pub enum FirstToSpeak {
    /// The client, this.
    Client(Spoken),
    /// The endpoint: bytes, whatever the client will say.
    Endpoint(Box<Passage>),
}

/// A port of unknown protocol whose client is silent: connects to the endpoint that bytes would go to, if that chain allows it, and
/// waits for the first byte of either side. A client that speaks HTTP after all leaves that connection unused.
pub async fn whoever_speaks_first(
    inner: &Inner,
    stream: &mut TunnelStream,
    first: &mut FirstBytes,
) -> std::io::Result<FirstToSpeak> {
    let as_bytes = Arc::new(inner.also_speaking(Spoken::Other));
    let (snapshot, serves) = as_bytes.serves();
    let mut passage = match serves {
        Serves::Tcp(chain) => match Passage::open(&as_bytes, &snapshot, &chain, Tells::Nothing).await {
            Ok(passage) => Some(passage),
            Err(refused) => {
                tracing::info!(authority = %inner.connection.authority, client = %inner.connection.remote_address, why = %refused.why, "no endpoint for a silent client; it may still speak HTTP");
                None
            }
        },
        Serves::Http(_) | Serves::Detect | Serves::Nobody(_) => None,
    };
    drop(snapshot);
    loop {
        let patience = if first.is_empty() {
            IDLE_TIMEOUT
        } else {
            tunnel::UNFINISHED_TIMEOUT
        };
        let waited = timeout(
            patience,
            poll_fn(|cx| {
                let before = first.len();
                if let Poll::Ready(spoken) = first.poll(cx, stream) {
                    return Poll::Ready(spoken.map(Some));
                }
                let greeted = passage.as_mut().is_some_and(|passage| passage.poll_greeting(cx).is_ready());
                // What the client has begun to say is waited for with another patience.
                if greeted || first.len() > before {
                    Poll::Ready(Ok(None))
                } else {
                    Poll::Pending
                }
            }),
        );
        match waited.await {
            Ok(Ok(Some(spoken))) => return Ok(FirstToSpeak::Client(spoken)),
            Ok(Ok(None)) => match passage.take() {
                Some(spoken) if !spoken.greeting.is_empty() => return Ok(FirstToSpeak::Endpoint(Box::new(spoken))),
                waiting => passage = waiting,
            },
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(FirstToSpeak::Client(Spoken::Other)),
        }
    }
}

/// Why a connection is not passed.
struct Refused {
    status: StatusCode,
    why: String,
    /// By policy, whose name is nothing that the client is told.
    denied: bool,
}

/// What is told of a connection that does not come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tells {
    /// Why: to logs and metrics.
    Failure,
    /// Nothing: another protocol may be spoken in the end.
    Nothing,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Both sides ended.
    Clean,
    /// The client reset.
    ClientGone,
    /// The endpoint reset.
    EndpointGone,
    /// Silence.
    Idle,
    /// The maximum duration.
    Duration,
}

/// A connection to an endpoint on behalf of a client.
pub struct Passage {
    inner: Arc<Inner>,
    chain: Arc<Chain>,
    exchange: Option<Exchange>,
    endpoint: Arc<Endpoint>,
    /// The connection, as the cluster's limits count it.
    _counted: Counted,
    io: Option<UpstreamIo>,
    /// What the endpoint has said before the client said anything.
    greeting: Bytes,
    report: Option<TcpReport>,
}

impl Passage {
    /// Decides, and connects.
    async fn open(inner: &Arc<Inner>, snapshot: &Arc<Snapshot>, chain: &Arc<Chain>, tells: Tells) -> Result<Self, Refused> {
        let mut exchange = Exchange::begin(Protocol::Tcp, inner.connection.clone(), chain.name.clone(), snapshot.version);
        let tcp = match (&chain.kind, &chain.refuse) {
            (_, Some(refusal)) => {
                exchange.because(ResponseFlags::NONE, "chain_not_supported");
                let why = format!(
                    "this service has a rule that its waypoint does not support: {}",
                    refusal.reason
                );
                return Err(Refused {
                    status: StatusCode::FORBIDDEN,
                    why,
                    denied: false,
                });
            }
            (ChainKind::Tcp(tcp), None) => tcp,
            (ChainKind::Http(_) | ChainKind::Refused { .. }, None) => {
                return Err(Refused {
                    status: StatusCode::FORBIDDEN,
                    why: "this chain does not pass bytes".into(),
                    denied: false,
                });
            }
        };
        let refused = |mut exchange: Exchange, flags, why: String| {
            exchange.because(flags, why.clone());
            tell(inner, tcp, exchange, tells);
            Refused {
                status: StatusCode::SERVICE_UNAVAILABLE,
                why,
                denied: false,
            }
        };
        let cluster = tcp.choose(fastrand::u64(..)).and_then(|name| snapshot.clusters.get(name));
        exchange.cluster = cluster.map(|cluster| cluster.facts.clone());
        if let Err(why) = authorize::connection(inner, snapshot, tcp, &mut exchange).await {
            tell(inner, tcp, exchange, tells);
            return Err(Refused {
                status: StatusCode::FORBIDDEN,
                why,
                denied: true,
            });
        }
        if !tcp.limits.iter().all(|limit| limit.take(1, local_ratelimit::now())) {
            exchange.termination_details = Some("local_ratelimit_close_over_limit".into());
            let why = format!("more connections to {} than its limit allows", chain.name);
            return Err(refused(exchange, ResponseFlags::NONE, why));
        }
        let Some(cluster) = cluster else {
            let why = format!("the cluster of {} does not exist", chain.name);
            return Err(refused(exchange, ResponseFlags::NO_CLUSTER_FOUND, why));
        };
        let original = super::request::original(inner);
        let hash = tcp.hash_source_ip.then(|| hash_address(inner.connection.remote_address.ip()));
        let mut picking = Picking::new(cluster).hashed(hash);
        let outliers = &inner.proxy.outliers;
        let breakers = &cluster.settings.breakers;
        let count = |resource| Counted::within(&cluster.state, breakers, Level::Default, resource);
        let mut last = None;
        // All tries together take no longer than one may: a client that waits for its connection is not kept for three timeouts.
        let deadline = clock::now() + cluster.settings.connect_timeout;
        while exchange.attempts < MAX_TRIES && clock::now() < deadline {
            let avoid = Avoid {
                endpoints: true,
                priorities: None,
            };
            let Some(endpoint) = picking.next(fastrand::u64(..), avoid) else {
                break;
            };
            // It waits for its connection, and the connection counts from its making.
            let (Some(_pending), Some(counted)) = (count(Resource::Pending), count(Resource::Connection)) else {
                let why = format!("the limits of {} are reached", cluster.name());
                return Err(refused(exchange, ResponseFlags::UPSTREAM_OVERFLOW, why));
            };
            exchange.attempts += 1;
            exchange.upstream = Some(describe(&endpoint, snapshot, original));
            match inner.proxy.connector.connect(snapshot, cluster, &endpoint, original).await {
                Ok(connected) => {
                    if let Some(upstream) = &mut exchange.upstream {
                        upstream.local_address = connected.local_address;
                    }
                    outliers.report(cluster, &endpoint, Report::ConnectedForGood);
                    endpoint.state.active.fetch_add(1, Ordering::Relaxed);
                    endpoint.state.total.fetch_add(1, Ordering::Relaxed);
                    return Ok(Self {
                        inner: inner.clone(),
                        chain: chain.clone(),
                        exchange: Some(exchange),
                        endpoint,
                        _counted: counted,
                        io: Some(connected.io),
                        greeting: Bytes::new(),
                        report: None,
                    });
                }
                Err(error @ ConnectError::Unsupported(_)) => {
                    last = Some(error);
                    break;
                }
                Err(error) => {
                    let report = match error {
                        ConnectError::Timeout => Report::TimedOut,
                        _ => Report::Failed,
                    };
                    outliers.report(cluster, &endpoint, report);
                    last = Some(error);
                }
            }
        }
        Err(match last {
            Some(error) => {
                exchange.transport_failure = Some(error.to_string().into());
                let why = format!("no connection to an endpoint of {}: {error}", cluster.name());
                refused(exchange, ResponseFlags::UPSTREAM_CONNECTION_FAILURE, why)
            }
            None => {
                let why = format!("no healthy endpoint in {}", cluster.name());
                refused(exchange, ResponseFlags::NO_HEALTHY_UPSTREAM, why)
            }
        })
    }

    fn tcp(&self) -> Option<&TcpChain> {
        match &self.chain.kind {
            ChainKind::Tcp(tcp) => Some(tcp),
            ChainKind::Http(_) | ChainKind::Refused { .. } => None,
        }
    }

    /// Waits for the endpoint's first bytes. From one that ends without any, nothing comes any more.
    fn poll_greeting(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(io) = &mut self.io else { return Poll::Pending };
        match ready!(io.poll_bytes(cx, &mut BytesMut::new())) {
            Ok(bytes) if !bytes.is_empty() => {
                self.greeting = bytes;
                Poll::Ready(())
            }
            Ok(_) | Err(_) => {
                self.io = None;
                Poll::Pending
            }
        }
    }

    /// Passes bytes until both sides have ended.
    pub async fn run(mut self, stream: TunnelStream, held: Bytes) {
        let Some(upstream) = self.io.take() else { return };
        let proxy = self.inner.proxy.clone();
        let _counted = under(&proxy.live.exchanges);
        let (idle, most, interval) = self
            .tcp()
            .map_or((None, None, None), |tcp| (tcp.idle_timeout, tcp.max_duration, tcp.metrics));
        let idle = idle.unwrap_or(IDLE_TIMEOUT);
        let started = clock::now();
        let mut relay = Relay::new(stream, upstream, held, std::mem::take(&mut self.greeting));
        let mut seen = (0, 0);
        let mut last_moved = started;
        let end = loop {
            let now = clock::now();
            let limit = (!idle.is_zero()).then(|| last_moved + idle);
            let wake = [
                limit,
                most.map(|most| started + most),
                interval.map(|interval| now + interval),
            ]
            .into_iter()
            .flatten()
            .min();
            let done = poll_fn(|cx| relay.poll(cx));
            let ended = match wake {
                Some(wake) => tokio::time::timeout_at(wake, done).await.ok(),
                None => Some(done.await),
            };
            if let Some(end) = ended {
                break end;
            }
            let moved = (relay.sent, relay.received);
            if moved != seen {
                seen = moved;
                last_moved = relay.moved;
            }
            let now = clock::now();
            if most.is_some_and(|most| now >= started + most) {
                break End::Duration;
            }
            if !idle.is_zero() && now >= last_moved + idle {
                break End::Idle;
            }
            if interval.is_some() {
                self.progress(&relay);
            }
        };
        self.progress(&relay);
        relay.end(end);
        self.close(end);
    }

    /// Tells of the bytes so far; the first time, of the connection itself.
    fn progress(&mut self, relay: &Relay) {
        let Some(exchange) = &mut self.exchange else { return };
        exchange.counts.received = relay.received;
        exchange.counts.sent = relay.sent;
        if let ChainKind::Tcp(TcpChain { metrics: Some(_), .. }) = self.chain.kind {
            let istio = &self.inner.proxy.istio;
            self.report
                .get_or_insert_with(|| istio.report_open(exchange))
                .progress(exchange);
        }
    }

    /// Tells of the end.
    fn close(&mut self, end: End) {
        let Some(mut exchange) = self.exchange.take() else { return };
        exchange.moments.last_sent = Some(exchange.elapsed());
        match end {
            End::Clean | End::Idle => {}
            End::ClientGone => exchange.flags.insert(ResponseFlags::DOWNSTREAM_REMOTE_RESET),
            End::EndpointGone => exchange.flags.insert(ResponseFlags::UPSTREAM_REMOTE_RESET),
            End::Duration => exchange.flags.insert(ResponseFlags::DURATION_TIMEOUT),
        }
        let report = self.report.take();
        if let Some(tcp) = self.tcp() {
            if tcp.metrics.is_some() {
                report
                    .unwrap_or_else(|| self.inner.proxy.istio.report_open(&exchange))
                    .close(&exchange);
            }
            tcp.access_logs.log(&cairn_exchange::format::View::new(&exchange));
        }
        if let Some(observer) = &self.inner.proxy.observer {
            observer(&exchange);
        }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.endpoint.state.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells of a connection that never reached an endpoint.
fn tell(inner: &Inner, tcp: &TcpChain, mut exchange: Exchange, tells: Tells) {
    if tells == Tells::Nothing {
        return;
    }
    exchange.moments.last_sent = Some(exchange.elapsed());
    if tcp.metrics.is_some() {
        inner.proxy.istio.report_open(&exchange).close(&exchange);
    }
    tcp.access_logs.log(&cairn_exchange::format::View::new(&exchange));
    if let Some(observer) = &inner.proxy.observer {
        observer(&exchange);
    }
}

/// An endpoint as the record names it.
pub fn describe(endpoint: &Endpoint, snapshot: &Snapshot, original: Option<std::net::SocketAddr>) -> Upstream {
    let unspecified = || std::net::SocketAddr::from(([0, 0, 0, 0], 0));
    let address = endpoint.target.address().or(original).unwrap_or_else(unspecified);
    Upstream {
        display: endpoint.display.clone(),
        address,
        workload: snapshot.workloads.workload_at(address.ip()),
        local_address: None,
    }
}

/// Both directions of a connection.
struct Relay {
    client: Option<TunnelStream>,
    endpoint: Option<UpstreamIo>,
    /// Client to endpoint.
    up: Direction,
    /// Endpoint to client.
    down: Direction,
    buffer: BytesMut,
    sent: u64,
    received: u64,
    moved: Instant,
}

/// How a direction ended early.
enum Cut {
    /// The side that reads takes no more. It may have sent everything before (END_STREAM, then a reset that says so): whether it is
    /// gone for good, the other direction learns when it has read to the end.
    TakesNoMore,
    /// One side is gone.
    Gone(End),
}

/// One direction: what was read and not yet written, and how far its end has got.
#[derive(Default)]
struct Direction {
    pending: Bytes,
    read_ended: bool,
    ended: bool,
}

impl Relay {
    fn new(client: TunnelStream, endpoint: UpstreamIo, held: Bytes, greeting: Bytes) -> Self {
        let (received, sent) = (held.len() as u64, greeting.len() as u64);
        Self {
            client: Some(client),
            endpoint: Some(endpoint),
            up: Direction {
                pending: held,
                ..Direction::default()
            },
            down: Direction {
                pending: greeting,
                ..Direction::default()
            },
            buffer: BytesMut::new(),
            sent,
            received,
            moved: clock::now(),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let (Some(client), Some(endpoint)) = (&mut self.client, &mut self.endpoint) else {
            return Poll::Ready(End::Clean);
        };
        if !self.up.ended
            && let Poll::Ready(done) = self
                .up
                .client_to_endpoint(cx, client, endpoint, &mut self.received, &mut self.moved)
        {
            match done {
                Ok(()) | Err(Cut::TakesNoMore) => self.up.end(),
                Err(Cut::Gone(end)) => return Poll::Ready(end),
            }
        }
        if !self.down.ended
            && let Poll::Ready(done) =
                self.down
                    .endpoint_to_client(cx, client, endpoint, &mut self.buffer, &mut self.sent, &mut self.moved)
        {
            match done {
                Ok(()) | Err(Cut::TakesNoMore) => self.down.end(),
                Err(Cut::Gone(end)) => return Poll::Ready(end),
            }
        }
        // Who has said everything may still leave before it has heard everything. Reading does not tell any more, and writing not yet.
        if self.up.read_ended && !self.down.ended && client.poll_reset(cx).is_ready() {
            self.down.end();
        }
        if self.down.read_ended
            && !self.up.ended
            && let UpstreamIo::Tunnel(stream) = endpoint
            && stream.poll_reset(cx).is_ready()
        {
            self.up.end();
        }
        if self.up.ended && self.down.ended {
            Poll::Ready(End::Clean)
        } else {
            Poll::Pending
        }
    }

    /// Ends both sides as one of them, or we, ended.
    fn end(&mut self, end: End) {
        let (client, endpoint) = (self.client.take(), self.endpoint.take());
        match end {
            End::Clean => {}
            End::ClientGone | End::EndpointGone | End::Idle | End::Duration => {
                if let Some(client) = client {
                    client.reset(h2::Reason::CONNECT_ERROR);
                }
                match endpoint {
                    Some(UpstreamIo::Tunnel(stream)) => stream.reset(h2::Reason::CONNECT_ERROR),
                    Some(UpstreamIo::Plain(stream)) => {
                        // An end by FIN would tell the endpoint that it has heard everything.
                        let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                    }
                    None => {}
                }
            }
        }
    }
}

impl Direction {
    fn end(&mut self) {
        self.ended = true;
        self.pending = Bytes::new();
    }

    fn client_to_endpoint(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut TunnelStream,
        endpoint: &mut UpstreamIo,
        count: &mut u64,
        moved: &mut Instant,
    ) -> Poll<Result<(), Cut>> {
        loop {
            while !self.pending.is_empty() {
                match endpoint {
                    UpstreamIo::Tunnel(stream) => {
                        ready!(stream.poll_send(cx, &mut self.pending, false)).map_err(|_| Cut::TakesNoMore)?;
                    }
                    UpstreamIo::Plain(stream) => {
                        let written = ready!(Pin::new(stream).poll_write(cx, &self.pending)).map_err(|error| cut(&error))?;
                        self.pending.advance(written);
                    }
                }
            }
            if self.read_ended {
                return Pin::new(&mut *endpoint).poll_shutdown(cx).map_err(|error| cut(&error));
            }
            match ready!(client.poll_data(cx)) {
                None => self.read_ended = true,
                Some(Err(_)) => return Poll::Ready(Err(Cut::Gone(End::ClientGone))),
                Some(Ok(data)) => {
                    *count += data.len() as u64;
                    *moved = clock::now();
                    self.pending = data;
                }
            }
        }
    }

    fn endpoint_to_client(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut TunnelStream,
        endpoint: &mut UpstreamIo,
        buffer: &mut BytesMut,
        count: &mut u64,
        moved: &mut Instant,
    ) -> Poll<Result<(), Cut>> {
        loop {
            while !self.pending.is_empty() {
                ready!(client.poll_send(cx, &mut self.pending, false)).map_err(|_| Cut::TakesNoMore)?;
            }
            if self.read_ended {
                return Pin::new(&mut *client).poll_shutdown(cx).map_err(|_| Cut::TakesNoMore);
            }
            let data = ready!(endpoint.poll_bytes(cx, buffer)).map_err(|_| Cut::Gone(End::EndpointGone))?;
            if data.is_empty() {
                self.read_ended = true;
            } else {
                *count += data.len() as u64;
                *moved = clock::now();
                self.pending = data;
            }
        }
    }
}

/// What a failed write to a plain connection means. A reset is told once, here or to the reader; a broken pipe comes after the
/// endpoint's own end, which may still have to be read.
fn cut(error: &std::io::Error) -> Cut {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        Cut::TakesNoMore
    } else {
        Cut::Gone(End::EndpointGone)
    }
}
