//! One CONNECT: whose service is it, and what is spoken in it.
//!
//! A CONNECT that nobody serves is answered 503 at once, with the reason; a declared TCP port is decided, and its endpoint connected,
//! before the CONNECT is answered; HTTP and undeclared ports are answered 200 at once, and read (conformance/DIFFERENCES.md 1, 4).

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use cairn_exchange::{Connection, Exchange, Protocol, RequestHead, ResponseFlags, Scheme, clock, format::View};
use cairn_hbone::Connect;
use cairn_policy::{headers::outgoing::ServerHeader, rbac::Facts};
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header, uri::PathAndQuery};

use super::{
    Inner, authorize, date,
    detect::FirstBytes,
    http1, http2,
    inner_io::InnerIo,
    server_name,
    tcp::{self, FirstToSpeak},
};
use crate::{
    proxy::{Proxy, under},
    snapshot::{Serves, matcher::Spoken},
};

/// Which node the CONNECT comes from, where a gateway says so (contract xds §2.2).
const SOURCE: &str = "x-istio-source";
/// Why a CONNECT is refused without the listener that accepts them.
const NO_TERMINATE: &str = "istiod has sent no listener that accepts tunnels (connect_terminate)";
/// The cluster of that listener's route, which is the listener of all services.
const INSIDE: &str = "main_internal";
/// That listener.
const TERMINATE: &str = "connect_terminate";
/// A client of an HTTP chain that sends nothing is not waited for longer than this.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(3600);

/// How long a client may pause in what could become a request line.
pub const UNFINISHED_TIMEOUT: Duration = Duration::from_secs(1);

/// What is left to do for a CONNECT: the next part of its life, which says what comes after it.
///
/// Each part is a future of its own, so that a stream without bytes does not pay for what it may become, and a long-lived connection
/// not for how it began.
struct Next(Option<Pin<Box<dyn Future<Output = Next> + Send>>>);

/// Serves one CONNECT.
pub async fn serve(proxy: Arc<Proxy>, connect: Connect) {
    let counted = proxy.clone();
    let _counted = under(&counted.live.streams);
    let mut next = begin(proxy, connect);
    while let Some(part) = next.0 {
        next = part.await;
    }
}

/// Decides what a CONNECT leads to. What follows may take long: nobody keeps the configuration for it.
fn begin(proxy: Arc<Proxy>, connect: Connect) -> Next {
    let inner = arrived(proxy, &connect);
    let (snapshot, serves) = inner.serves();
    let Some(terminate) = &snapshot.terminate else {
        // Who may open tunnels is not known.
        refuse(&inner, connect, StatusCode::SERVICE_UNAVAILABLE, NO_TERMINATE);
        return Next::NOTHING;
    };
    if let Some(refusal) = &terminate.refuse {
        refuse(&inner, connect, StatusCode::FORBIDDEN, &refusal.reason);
        return Next::NOTHING;
    }
    if !terminate.rbac.is_empty()
        && let Err(denied) = terminate.rbac.decide(&Facts::tunnel(
            &inner.connection,
            &head_of(&connect),
            connect.peer.local_address,
        ))
    {
        deny(&inner, connect, &denied.details());
        return Next::NOTHING;
    }
    match serves {
        Serves::Nobody(why) => {
            refuse(&inner, connect, StatusCode::SERVICE_UNAVAILABLE, why.why());
            Next::NOTHING
        }
        Serves::Http(_) => Next(Some(Box::pin(http(inner, connect)))),
        Serves::Tcp(chain) if chain.reads_server_name() => Next::last(server_name::declared(inner, snapshot, chain, connect)),
        Serves::Tcp(chain) => Next::last(tcp::declared(Arc::new(inner), snapshot, chain, connect)),
        Serves::Detect => Next(Some(Box::pin(undeclared(inner, connect)))),
    }
}

impl Next {
    /// It is over.
    const NOTHING: Self = Self(None);

    /// The last part.
    fn last(part: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Some(Box::pin(part.map(|()| Self::NOTHING))))
    }
}

fn arrived(proxy: Arc<Proxy>, connect: &Connect) -> Inner {
    let authority: Arc<str> = connect.authority.as_str().into();
    let address: Option<SocketAddr> = authority.parse().ok();
    let source = connect
        .headers
        .get(SOURCE)
        .and_then(|value| value.to_str().ok())
        .map(Into::into);
    let named: Option<(&str, u16)> = authority
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let port = named.map(|(_, port)| port);
    let snapshot = proxy.snapshot.load();
    // A service that is asked for by its name is the same service: policies see its address (conformance/DIFFERENCES.md).
    let by_name = || named.and_then(|(host, port)| Some(SocketAddr::new(snapshot.workloads.address_of(host)?, port)));
    let connection = Connection {
        id: proxy.next_connection(),
        local_address: address.or_else(by_name),
        service_port: port.unwrap_or(0),
        remote_address: connect.peer.address,
        peer: connect.peer.id.clone(),
        local: connect.peer.local_id.clone(),
        source: snapshot.workloads.workload_at(connect.peer.address.ip()),
        requested_server_name: None,
        opened: clock::now(),
        authority,
    };
    drop(snapshot);
    Inner::new(proxy, Arc::new(connection), address, source)
}

/// The head of a CONNECT as policies see it.
fn head_of(connect: &Connect) -> RequestHead {
    RequestHead {
        method: Method::CONNECT,
        // It has none, and nobody is told this one.
        path: PathAndQuery::from_static("/"),
        authority: HeaderValue::try_from(connect.authority.as_str()).unwrap_or(HeaderValue::from_static("")),
        scheme: Scheme::Http,
        headers: connect.headers.clone(),
    }
}

/// What stands in the head of every answer to a CONNECT, as from Envoy.
pub fn answer_headers(inner: &Inner) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(3);
    headers.insert(header::DATE, date::now());
    match &inner.proxy.snapshot.load().terminate {
        Some(terminate) => terminate.server.prepare(&mut headers, false),
        None => ServerHeader::default().prepare(&mut headers, false),
    }
    headers
}

/// Answers the CONNECT with an error that says why.
pub fn refuse(inner: &Inner, connect: Connect, status: StatusCode, why: &str) {
    answer(
        inner,
        connect,
        status,
        why,
        format!("{}: {why}\n", inner.connection.authority),
    );
}

/// Answers a CONNECT that a policy denies; which one, the client is not told.
pub fn deny(inner: &Inner, connect: Connect, details: &str) {
    answer(
        inner,
        connect,
        StatusCode::FORBIDDEN,
        details,
        authorize::answer_of(details).to_owned(),
    );
}

fn answer(inner: &Inner, connect: Connect, status: StatusCode, why: &str, body: String) {
    inner.proxy.live.refused.fetch_add(1, Ordering::Relaxed);
    let peer = inner.connection.peer.as_ref().map_or("-", |peer| peer.as_str());
    tracing::info!(authority = %inner.connection.authority, client = %inner.connection.remote_address, peer, %status, why, "CONNECT refused");
    log(inner, &connect, status, why, body.len());
    let mut headers = answer_headers(inner);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    connect.refuse(status, headers, body);
}

/// The access log's line about a refused CONNECT. What no chain serves is to Envoy a connection to the next listener that failed.
fn log(inner: &Inner, connect: &Connect, status: StatusCode, why: &str, body: usize) {
    let snapshot = inner.proxy.snapshot.load();
    let Some(terminate) = snapshot
        .terminate
        .as_ref()
        .filter(|terminate| !terminate.access_logs.is_empty())
    else {
        return;
    };
    let connection = Connection {
        local_address: Some(connect.peer.local_address),
        ..Connection::clone(&inner.connection)
    };
    let mut exchange = Exchange::begin(Protocol::Http2, Arc::new(connection), TERMINATE.into(), snapshot.version);
    let took = exchange.start.saturating_duration_since(inner.connection.opened);
    exchange.wall = exchange.wall.checked_sub(took).unwrap_or(exchange.wall);
    exchange.start = inner.connection.opened;
    exchange.request = Some(head_of(connect));
    exchange.cluster = snapshot.clusters.get(INSIDE).map(|cluster| cluster.facts.clone());
    exchange.status = Some(status);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        exchange.flags.insert(ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
        exchange.details = Some("upstream_reset_before_response_started{remote_connection_failure}".into());
        exchange.transport_failure = Some(why.to_owned().into());
    } else {
        exchange.details = Some(why.to_owned().into());
    }
    exchange.counts.sent = u64::try_from(body).unwrap_or(u64::MAX);
    exchange.moments.last_sent = Some(exchange.elapsed());
    terminate.access_logs.log(&View::new(&exchange));
}

/// An HTTP port: everything in the tunnel is HTTP.
async fn http(inner: Inner, connect: Connect) -> Next {
    let Ok(mut stream) = connect.accept(answer_headers(&inner)) else {
        return Next::NOTHING;
    };
    let mut first = FirstBytes::of_http();
    match first.within(FIRST_BYTE_TIMEOUT, &mut stream).await {
        // Nothing was ever sent, or no more than the beginning of a preface.
        Ok(None) | Err(_) => Next::NOTHING,
        Ok(Some(_)) if first.is_empty() => Next::NOTHING,
        Ok(Some(spoken)) => {
            let spoken = if spoken == Spoken::Http2 { spoken } else { Spoken::Http11 };
            requests(Arc::new(inner.speaking(spoken)), spoken, InnerIo::new(stream, first.take()))
        }
    }
}

/// Everything from here on is requests.
fn requests(inner: Arc<Inner>, spoken: Spoken, io: InnerIo) -> Next {
    match spoken {
        Spoken::Http2 => Next::last(http2::serve(inner, io)),
        Spoken::Http11 | Spoken::Http10 | Spoken::Other => Next::last(http1::serve(inner, io)),
    }
}

/// A port of which istiod does not know what is spoken.
///
/// A client that is silent may be waiting for its server: then the endpoint is connected, and the first byte of either side decides. A
/// client that began with what could become HTTP and stopped is given more time; then its bytes go on as they are, so that short
/// messages arrive. (The TCP chain that serves it has the same policies; istiod writes them so that a rule which needs HTTP denies.)
async fn undeclared(inner: Inner, connect: Connect) -> Next {
    let Ok(mut stream) = connect.accept(answer_headers(&inner)) else {
        return Next::NOTHING;
    };
    let mut first = FirstBytes::of_anything();
    let spoken = match first.within(inner.proxy.settings.detect_timeout, &mut stream).await {
        Ok(None) if first.is_empty() => match tcp::whoever_speaks_first(&inner, &mut stream, &mut first).await {
            Ok(FirstToSpeak::Client(spoken)) => spoken,
            Ok(FirstToSpeak::Endpoint(passage)) => return Next::last(passage.run(stream, first.take())),
            Err(_) => return Next::NOTHING,
        },
        Ok(None) => first
            .within(UNFINISHED_TIMEOUT, &mut stream)
            .await
            .ok()
            .flatten()
            .unwrap_or(Spoken::Other),
        Ok(Some(spoken)) => spoken,
        Err(error) => {
            tracing::debug!(%error, authority = %inner.connection.authority, "the client went away before it said anything");
            return Next::NOTHING;
        }
    };
    let held = first.take();
    let inner = Arc::new(inner.speaking(spoken));
    let (snapshot, serves) = inner.serves();
    match serves {
        Serves::Http(_) => requests(inner, spoken, InnerIo::new(stream, held)),
        Serves::Tcp(chain) if chain.reads_server_name() => Next::last(server_name::passed(inner, snapshot, chain, stream, held)),
        Serves::Tcp(chain) => Next::last(tcp::detected(inner, snapshot, chain, stream, held)),
        Serves::Detect | Serves::Nobody(_) => {
            stream.reset(h2::Reason::CONNECT_ERROR);
            Next::NOTHING
        }
    }
}
