//! One CONNECT: whose service is it, and what is spoken in it.
//!
//! A CONNECT that nobody serves is answered 503 at once, with the reason; a declared TCP port is decided, and its endpoint connected,
//! before the CONNECT is answered; HTTP and undeclared ports are answered 200 at once, and read (conformance/DIFFERENCES.md 1, 4).

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use cairn_exchange::{Connection, RequestHead, Scheme, clock};
use cairn_hbone::Connect;
use cairn_policy::{
    headers::outgoing::ServerHeader,
    rbac::{Denied, Facts},
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header, uri::PathAndQuery};

use super::{
    Inner, date,
    detect::FirstBytes,
    http1, http2,
    inner_io::InnerIo,
    tcp::{self, FirstToSpeak},
};
use crate::{
    proxy::{Proxy, under},
    snapshot::{Serves, matcher::Spoken},
};

/// Which node the CONNECT comes from, where a gateway says so (contract xds §2.2).
const SOURCE: &str = "x-istio-source";
/// A client of an HTTP chain that sends nothing is not waited for longer than this.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(3600);

/// How long a client may pause in what could become a request line.
pub const UNFINISHED_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves one CONNECT.
pub async fn serve(proxy: Arc<Proxy>, connect: Connect) {
    let counted = proxy.clone();
    let _counted = under(&counted.live.streams);
    let inner = arrived(proxy, &connect);
    let (snapshot, serves) = inner.serves();
    if let Some(refusal) = snapshot.terminate.as_ref().and_then(|terminate| terminate.refuse.as_ref()) {
        refuse(&inner, connect, StatusCode::FORBIDDEN, &refusal.reason);
        return;
    }
    if let Some(terminate) = &snapshot.terminate
        && !terminate.rbac.is_empty()
        && let Err(denied) = terminate.rbac.decide(&Facts::tunnel(&inner.connection, &head_of(&connect), connect.peer.local_address))
    {
        deny(&inner, connect, &denied.details());
        return;
    }
    match serves {
        Serves::Nobody(why) => refuse(&inner, connect, StatusCode::SERVICE_UNAVAILABLE, why),
        // From here on it may take long: nobody keeps the configuration for it, and no more memory than it needs (each way is a
        // future of its own, so that a stream without bytes does not pay for what it may become).
        Serves::Http(chain) => {
            drop((snapshot, chain));
            http(inner, connect).await;
        }
        Serves::Tcp(chain) => Box::pin(tcp::declared(Arc::new(inner), snapshot, chain, connect)).await,
        Serves::Detect => {
            drop(snapshot);
            Box::pin(undeclared(inner, connect)).await;
        }
    }
}

fn arrived(proxy: Arc<Proxy>, connect: &Connect) -> Inner {
    let authority: Arc<str> = connect.authority.as_str().into();
    let address: Option<SocketAddr> = authority.parse().ok();
    let source = connect.headers.get(SOURCE).and_then(|value| value.to_str().ok()).map(Into::into);
    let port = authority.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    let snapshot = proxy.snapshot.load();
    let connection = Connection {
        id: proxy.next_connection(),
        local_address: address,
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
    answer(inner, connect, status, why, format!("{}: {why}\n", inner.connection.authority));
}

/// Answers a CONNECT that a policy denies; which one, the client is not told.
pub fn deny(inner: &Inner, connect: Connect, details: &str) {
    answer(inner, connect, StatusCode::FORBIDDEN, details, Denied::ANSWER.to_owned());
}

fn answer(inner: &Inner, connect: Connect, status: StatusCode, why: &str, body: String) {
    inner.proxy.live.refused.fetch_add(1, Ordering::Relaxed);
    let peer = inner.connection.peer.as_ref().map_or("-", |peer| peer.as_str());
    tracing::info!(authority = %inner.connection.authority, client = %inner.connection.remote_address, peer, %status, why, "CONNECT refused");
    let mut headers = answer_headers(inner);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    connect.refuse(status, headers, body);
}

/// An HTTP port: everything in the tunnel is HTTP.
async fn http(inner: Inner, connect: Connect) {
    let Ok(mut stream) = connect.accept(answer_headers(&inner)) else { return };
    let mut first = FirstBytes::of_http();
    match first.within(FIRST_BYTE_TIMEOUT, &mut stream).await {
        // Nothing was ever sent, or no more than the beginning of a preface.
        Ok(None) | Err(_) => {}
        Ok(Some(_)) if first.is_empty() => {}
        Ok(Some(Spoken::Http2)) => {
            let io = InnerIo::new(stream, first.take());
            Box::pin(http2::serve(Arc::new(inner.speaking(Spoken::Http2)), io)).await;
        }
        Ok(Some(_)) => {
            let io = InnerIo::new(stream, first.take());
            Box::pin(http1::serve(Arc::new(inner.speaking(Spoken::Http11)), io)).await;
        }
    }
}

/// A port of which istiod does not know what is spoken.
///
/// A client that is silent may be waiting for its server: then the endpoint is connected, and the first byte of either side decides. A
/// client that began with what could become HTTP and stopped is given more time; then its bytes go on as they are, so that short
/// messages arrive. (The TCP chain that serves it has the same policies; istiod writes them so that a rule which needs HTTP denies.)
async fn undeclared(inner: Inner, connect: Connect) {
    let Ok(mut stream) = connect.accept(answer_headers(&inner)) else { return };
    let mut first = FirstBytes::of_anything();
    let spoken = match first.within(inner.proxy.settings.detect_timeout, &mut stream).await {
        Ok(None) if first.is_empty() => match tcp::whoever_speaks_first(&inner, &mut stream, &mut first).await {
            Ok(FirstToSpeak::Client(spoken)) => spoken,
            Ok(FirstToSpeak::Endpoint(passage)) => return Box::pin(passage.run(stream, first.take())).await,
            Err(_) => return,
        },
        Ok(None) => first.within(UNFINISHED_TIMEOUT, &mut stream).await.ok().flatten().unwrap_or(Spoken::Other),
        Ok(Some(spoken)) => spoken,
        Err(error) => {
            tracing::debug!(%error, authority = %inner.connection.authority, "the client went away before it said anything");
            return;
        }
    };
    let held = first.take();
    let inner = Arc::new(inner.speaking(spoken));
    let (snapshot, serves) = inner.serves();
    match (serves, spoken) {
        (Serves::Http(chain), spoken) => {
            drop((snapshot, chain));
            match spoken {
                Spoken::Http2 => Box::pin(http2::serve(inner, InnerIo::new(stream, held))).await,
                Spoken::Http11 | Spoken::Http10 | Spoken::Other => Box::pin(http1::serve(inner, InnerIo::new(stream, held))).await,
            }
        }
        (Serves::Tcp(chain), _) => Box::pin(tcp::detected(inner, snapshot, chain, stream, held)).await,
        (Serves::Detect | Serves::Nobody(_), _) => stream.reset(h2::Reason::CONNECT_ERROR),
    }
}
