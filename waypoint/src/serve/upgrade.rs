//! Switching to another protocol, and the bytes between client and endpoint after it until both sides have ended.
//!
//! HTTP/1.1 asks by `upgrade` and is answered 101; HTTP/2 asks by an extended CONNECT (RFC 8441) and is answered 200. Between client and
//! endpoint every request of the kind has HTTP/1.1's form: what filters and routes see does not depend on what is spoken.

use std::sync::Arc;

use bytes::Bytes;
use cairn_exchange::{ResponseFlags, clock};
use cairn_hbone::TunnelStream;
use h2::{RecvStream, SendStream, ext::Protocol};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;

use super::{
    inner_io::InnerIo,
    limits::{Expired, Limits},
    open::{self, Asked, Standing, Vigil},
    relay::{End, Relay, Terms},
    response::Tail,
};
use crate::{proxy::under, upstream::UpstreamIo};

/// Received before window is given back: a part of the smallest stream window that HTTP/2 begins with.
const WINDOW_BATCH: u32 = 16 * 1024;

/// The client's side of a switch. In a box: few requests have one, and all have its place.
pub type Client = Box<ClientSide>;

/// What it is.
pub enum ClientSide {
    /// Its connection.
    Http1(OnUpgrade),
    /// Its stream: what it sends, and, once it is answered, what is sent to it.
    Http2(RecvStream, oneshot::Receiver<SendStream<Bytes>>),
}

/// The endpoint's side of a switch; in a box where answers have its place.
pub enum Endpoint {
    /// Its connection.
    Http1(OnUpgrade),
    /// Its stream.
    Http2(TunnelStream),
}

/// An extended CONNECT as HTTP/1.1 asks for it; whether it is one.
pub fn from_extended(protocol: &Protocol, method: &mut Method, headers: &mut HeaderMap) -> bool {
    let Ok(kind) = HeaderValue::from_str(protocol.as_str()) else {
        return false;
    };
    *method = Method::GET;
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, kind);
    true
}

/// The answer to an extended CONNECT; whether it says that the stream is switched.
pub fn to_extended(status: &mut StatusCode, headers: &mut HeaderMap) -> bool {
    headers.remove(header::CONNECTION);
    headers.remove(header::UPGRADE);
    let switched = *status == StatusCode::SWITCHING_PROTOCOLS;
    if switched {
        *status = StatusCode::OK;
        headers.remove(header::CONTENT_LENGTH);
    }
    switched
}

/// The byte stream that an extended CONNECT has made.
pub fn stream(send: SendStream<Bytes>, recv: RecvStream) -> TunnelStream {
    TunnelStream::of_halves(send, recv, WINDOW_BATCH)
}

/// Passes bytes once both connections have been switched, and settles the exchange at their end. What limits the stream's silence
/// and life goes on to.
pub fn pass(client: Client, endpoint: Box<Endpoint>, mut tail: Box<Tail>) {
    tokio::spawn(async move {
        let proxy = tail.inner.proxy.clone();
        let _counted = under(&proxy.live.streams);
        let Some((mut relay, terms)) = switched(client, endpoint, tail.limits.clone()).await else {
            tracing::debug!("an upgrade was not completed");
            tail.finish(false);
            return;
        };
        let Some(chain) = tail.chain.clone() else { return };
        let standing = Standing {
            inner: tail.inner.clone(),
            chain,
            asked: Asked::request(&tail.exchange, tail.asked.take().as_deref()),
            vigil: Vigil::new(tail.exchange.snapshot),
        };
        let end = relay.run(terms, &standing, |_| {}).await;
        let exchange = &mut tail.exchange;
        exchange.counts.received += relay.received;
        exchange.counts.sent += relay.sent;
        exchange.moments.last_upstream_received = Some(clock::now().saturating_duration_since(exchange.start));
        let expired = match end {
            End::Idle => Some(Expired::Idle),
            End::Duration => Some(Expired::Duration),
            End::Clean | End::ClientGone | End::EndpointGone | End::Denied | End::Gone => None,
        };
        let cut = match end {
            End::Denied => Some(open::DENIED),
            End::Gone => Some(open::GONE),
            _ => None,
        };
        if let Some(details) = cut {
            exchange.details = None;
            exchange.because(ResponseFlags::NONE, details);
        }
        if let Some((flags, details)) = expired.map(Expired::told) {
            exchange.details = None;
            exchange.because(flags, details);
        }
        tail.finish(false);
    });
}

/// The bytes of both sides, once their connections have let go of them.
async fn switched(client: Client, endpoint: Box<Endpoint>, limits: Option<Arc<Limits>>) -> Option<(Relay, Terms)> {
    let ((client, held), (endpoint, greeting)) = tokio::try_join!(client.switched(), endpoint.switched()).ok()?;
    let relay = Relay::new(client, endpoint, held, greeting);
    let terms = Terms {
        idle: limits.as_ref().and_then(|limits| limits.idle()),
        until: limits.as_ref().and_then(|limits| limits.stream_end()),
        interval: None,
    };
    Some((relay, terms))
}

/// A side's connection ended before it was switched.
struct Gone;

impl ClientSide {
    /// The client's bytes, and those that were read already.
    async fn switched(self) -> Result<(TunnelStream, Bytes), Gone> {
        match self {
            ClientSide::Http1(upgrade) => {
                let parts = upgrade.await.map_err(|_| Gone)?.downcast::<InnerIo>().map_err(|_| Gone)?;
                parts.io.into_parts(parts.read_buf).ok_or(Gone)
            }
            ClientSide::Http2(recv, send) => Ok((stream(send.await.map_err(|_| Gone)?, recv), Bytes::new())),
        }
    }
}

impl Endpoint {
    /// The endpoint's bytes, and those that were read already.
    async fn switched(self) -> Result<(UpstreamIo, Bytes), Gone> {
        match self {
            Endpoint::Http1(upgrade) => {
                let switched = upgrade.await.map_err(|_| Gone)?;
                let parts = switched.downcast::<TokioIo<UpstreamIo>>().map_err(|_| Gone)?;
                Ok((parts.io.into_inner(), parts.read_buf))
            }
            Endpoint::Http2(stream) => Ok((UpstreamIo::Tunnel(stream), Bytes::new())),
        }
    }
}
