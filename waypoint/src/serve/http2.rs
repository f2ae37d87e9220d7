//! HTTP/2 requests of one inner connection, spoken with prior knowledge.
//!
//! h2 directly: every request is a task of its own, so that the requests of one connection use all cores; its answer leaves as the
//! client's window allows.

use std::{future::poll_fn, sync::Arc, task::Poll};

use bytes::Bytes;
use cairn_exchange::Protocol;
use futures_util::FutureExt as _;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response, Version, header};
use http_body::Body as _;
use tokio::{sync::oneshot, time::timeout};

use super::{
    Inner, ResponseBody,
    inner_io::InnerIo,
    open,
    request::{self, Arrived},
    upgrade,
};
use crate::{
    body::Incoming,
    pump::pump,
    snapshot::{ChainKind, HttpSettings},
    upstream::InformationalRelay,
};

/// Streams at once, where the configuration does not say: Envoy's default is without bound, ours is not.
const MAX_STREAMS: u32 = 1024;
/// Windows, where the configuration does not say.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes of answers that may wait in one connection.
const MAX_SEND_BUFFER: usize = 256 * 1024;

/// Serves requests until the connection ends.
pub async fn serve(inner: Arc<Inner>, io: InnerIo) {
    if let Err(error) = run(inner.clone(), io).await {
        tracing::debug!(%error, authority = %inner.connection.authority, "inner connection ended");
    }
}

async fn run(inner: Arc<Inner>, io: InnerIo) -> Result<(), h2::Error> {
    let (_, chain) = inner.http_chain();
    let defaults = HttpSettings::default();
    let settings = match chain.as_ref().map(|chain| &chain.kind) {
        Some(ChainKind::Http(http)) => &http.settings,
        _ => &defaults,
    };
    let (io, mut late) = cairn_hbone::watch(io, settings.request_headers_timeout.unwrap_or(super::HEAD_TIMEOUT));
    let mut builder = h2::server::Builder::new();
    if settings.http2_extended_connect {
        builder.enable_connect_protocol();
    }
    let mut connection = builder
        .max_concurrent_streams(settings.http2_max_concurrent_streams.unwrap_or(MAX_STREAMS))
        .initial_window_size(settings.http2_stream_window.unwrap_or(STREAM_WINDOW))
        .initial_connection_window_size(settings.http2_connection_window.unwrap_or(CONNECTION_WINDOW))
        .max_header_list_size(u32::try_from(settings.max_request_head).unwrap_or(u32::MAX))
        .max_send_buffer_size(MAX_SEND_BUFFER)
        .handshake::<_, Bytes>(io)
        .await?;
    drop(chain);
    let mut drain = inner.proxy.drain.clone();
    let mut draining = false;
    inner.proxy.open.enter(&inner);
    loop {
        let accepted = tokio::select! {
            // What was read is known before it is asked whether it is late.
            biased;
            accepted = connection.accept() => accepted,
            () = drain.drained(), if !draining => {
                draining = true;
                connection.graceful_shutdown();
                continue;
            }
            () = inner.spent(), if !draining => {
                draining = true;
                connection.graceful_shutdown();
                continue;
            }
            () = poll_fn(|cx| late.poll(cx)) => {
                tracing::info!(
                    authority = %inner.connection.authority,
                    client = %inner.connection.remote_address,
                    "an inner connection is closed: its client does not finish a head"
                );
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                let closed = poll_fn(|cx| connection.poll_closed(cx));
                return Box::pin(timeout(open::GOODBYE, closed)).await.unwrap_or(Ok(()));
            }
            () = poll_fn(|cx| inner.changes.poll_ended(cx)) => {
                if inner.is_busy() {
                    // What is under way is cut with it.
                    connection.abrupt_shutdown(Reason::NO_ERROR);
                } else {
                    connection.graceful_shutdown();
                }
                let closed = poll_fn(|cx| connection.poll_closed(cx));
                return Box::pin(timeout(open::GOODBYE, closed)).await.unwrap_or(Ok(()));
            }
        };
        match accepted {
            None => return Ok(()),
            Some(Err(error)) => return Err(error),
            Some(Ok((request, respond))) => {
                tokio::spawn(answer(inner.clone(), request, respond));
            }
        }
    }
}

/// Puts a cookie together that HTTP/2 allows to be cut into fields (RFC 9113 §8.2.3): HTTP/1.1 knows one field only.
fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(header::COOKIE).iter();
    if crumbs.next().is_none() || crumbs.next().is_none() {
        return;
    }
    let crumbs: Vec<_> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(header::COOKIE, cookie);
    }
}

fn answer(inner: Arc<Inner>, request: Request<RecvStream>, respond: SendResponse<Bytes>) -> impl Future<Output = ()> + Send {
    let (mut parts, body) = request.into_parts();
    join_cookies(&mut parts.headers);
    let relay: Arc<InformationalRelay> = Arc::default();
    let asked = parts.extensions.remove::<h2::ext::Protocol>();
    let asked = asked.filter(|asked| upgrade::from_extended(asked, &mut parts.method, &mut parts.headers));
    // What an extended CONNECT sends is no body.
    let (body, switch, switched) = match asked {
        None => (Incoming::http2(body), None, None),
        Some(_) => {
            let (switched, send) = oneshot::channel();
            let client = upgrade::ClientSide::Http2(body, send);
            (Incoming::Empty, Some(Box::new(client)), Some(switched))
        }
    };
    let arrived = Arrived {
        method: parts.method,
        uri: parts.uri,
        headers: parts.headers,
        protocol: Protocol::Http2,
        body,
        upgrade: switch,
        relay: Some(relay.clone()),
        extensions: http::Extensions::new(),
    };
    // In a box, so that what waits is not copied on its way into its task, nor kept while the answer leaves.
    send(Box::pin(request::serve(inner, arrived)), relay, respond, switched)
}

async fn send(
    mut exchange: impl Future<Output = Response<ResponseBody>> + Unpin,
    relay: Arc<InformationalRelay>,
    mut respond: SendResponse<Bytes>,
    switched: Option<oneshot::Sender<SendStream<Bytes>>>,
) {
    let response = poll_fn(|cx| {
        relay.connection.register(cx.waker());
        let answered = exchange.poll_unpin(cx);
        for early in relay.queue.take() {
            // Advice only: a client that does not take it misses nothing.
            let _ = respond.send_informational(early);
        }
        match answered {
            Poll::Ready(response) => Poll::Ready(Some(response)),
            // The client gave up: dropping the exchange gives up the request upstream too.
            Poll::Pending => respond.poll_reset(cx).map(|_| None),
        }
    })
    .await;
    drop(exchange);
    let Some(response) = response else { return };
    let (mut parts, body) = response.into_parts();
    let switched = switched.filter(|_| upgrade::to_extended(&mut parts.status, &mut parts.headers));
    let mut head = Response::new(());
    *head.status_mut() = parts.status;
    *head.headers_mut() = parts.headers;
    *head.version_mut() = Version::HTTP_2;
    let end = switched.is_none() && body.is_end_stream();
    match respond.send_response(head, end) {
        Ok(stream) if switched.is_some() => {
            // Whoever waits for it is gone when the exchange has been given up.
            let _ = switched.map(|switched| switched.send(stream));
        }
        Ok(stream) if !end => {
            if let Err(error) = pump(body, stream, Reason::INTERNAL_ERROR).await {
                tracing::debug!(%error, "an answer did not reach its client");
            }
        }
        Ok(_) => {}
        Err(error) => {
            tracing::debug!(%error, "an answer could not be sent");
            respond.send_reset(Reason::INTERNAL_ERROR);
        }
    }
}
