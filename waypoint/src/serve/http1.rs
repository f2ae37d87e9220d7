//! HTTP/1.1 requests of one inner connection.
//!
//! hyper reads and writes; what it does differently from what users of Envoy expect is mended around it: framing that could smuggle
//! requests is refused before hyper sees it, its own short error answers are replaced, informational answers go past it, and an answer
//! that was cut ends the connection with a reset.

use std::{convert::Infallible, future::poll_fn, sync::Arc, task::Poll, time::Duration};

use cairn_exchange::Protocol;
use futures_util::FutureExt as _;
use http::{StatusCode, Version, header};
use hyper::{Request, Response, server::conn::http1, service::service_fn, upgrade::OnUpgrade};
use tokio::time::timeout;

use super::{
    Inner, ResponseBody,
    inner_io::InnerIo,
    line::Line,
    open,
    request::{self, Arrived},
    upgrade::ClientSide,
};
use crate::{
    body::Incoming,
    snapshot::{ChainKind, HttpSettings},
};

/// hyper's smallest read buffer; more is asked for by the chain's limit on heads.
const MIN_BUFFER: usize = 8 * 1024;
/// hyper's own limit of fields, which costs it less than one that is set: it has its place on the stack.
const MAX_HEADERS: usize = 100;

/// Serves requests until the connection ends. (What is needed only to begin is not part of the future: idle connections are many.)
pub fn serve(inner: Arc<Inner>, io: InnerIo) -> impl Future<Output = ()> + Send {
    let limits = limits(&inner);
    let line = inner.line.clone().unwrap_or_default();
    let io = io.watched(limits.max_head.max(MIN_BUFFER), limits.head_timeout, line.clone());
    let service = service_fn({
        let inner = inner.clone();
        // hyper keeps the place of this future while the connection is idle: a box takes less.
        move |request| Box::pin(answer(inner.clone(), request))
    });
    let mut builder = http1::Builder::new();
    if limits.max_headers != MAX_HEADERS {
        builder.max_headers(limits.max_headers);
    }
    let connection = builder
        .half_close(true)
        .max_buf_size(limits.max_head.max(MIN_BUFFER))
        .auto_date_header(false)
        .preserve_header_case(limits.preserve_header_case)
        .serve_connection(io, service)
        .with_upgrades();
    let mut connection = Box::pin(connection);
    async move {
        let mut drain = inner.proxy.drain.clone();
        inner.proxy.open.enter(&inner);
        let mut closing = false;
        let ended = loop {
            tokio::select! {
                ended = connection.as_mut() => break ended,
                () = drain.drained(), if !closing => {}
                () = inner.spent(), if !closing => {}
                () = poll_fn(|cx| inner.changes.poll_ended(cx)) => {
                    if inner.is_busy() {
                        // What is under way is cut with it.
                        return;
                    }
                    connection.as_mut().graceful_shutdown();
                    // It may be in the middle of a head. Boxed: only the end of a connection needs the place.
                    match Box::pin(timeout(open::GOODBYE, connection.as_mut())).await {
                        Ok(ended) => break ended,
                        Err(_) => return,
                    }
                }
            }
            closing = true;
            connection.as_mut().graceful_shutdown();
        };
        // Boxed: only the end of a connection needs the place.
        Box::pin(line.end()).await;
        if let Some(early) = line.early() {
            request::answered_early(&inner, early.status, early.details);
        }
        if let Err(error) = ended {
            tracing::debug!(%error, authority = %inner.connection.authority, "inner connection ended");
        }
    }
}

/// Limits of a connection.
struct Limits {
    max_head: usize,
    max_headers: usize,
    head_timeout: Option<Duration>,
    preserve_header_case: bool,
}

/// Limits by the chain that serves the connection now.
fn limits(inner: &Inner) -> Limits {
    let (_, chain) = inner.http_chain();
    let of = |settings: &HttpSettings| Limits {
        max_head: settings.max_request_head,
        max_headers: settings.max_request_headers,
        head_timeout: settings.request_headers_timeout.or(Some(super::HEAD_TIMEOUT)),
        preserve_header_case: settings.preserve_header_case,
    };
    match chain.as_ref().map(|chain| &chain.kind) {
        Some(ChainKind::Http(http)) => of(&http.settings),
        _ => of(&HttpSettings::default()),
    }
}

/// Answers a request. Its parts follow one another in one place: it is copied as often as it is handed on.
fn answer(
    inner: Arc<Inner>,
    mut request: Request<hyper::body::Incoming>,
) -> impl Future<Output = Result<Response<ResponseBody>, Infallible>> + Send {
    let asked = request
        .headers()
        .contains_key(header::UPGRADE)
        .then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let protocol = if parts.version == Version::HTTP_10 {
        Protocol::Http10
    } else {
        Protocol::Http11
    };
    let line = inner.line.clone().unwrap_or_default();
    let arrived = Arrived {
        method: parts.method,
        uri: parts.uri,
        headers: parts.headers,
        protocol,
        body: Incoming::http1(body),
        upgrade: asked.clone().map(|asked| Box::new(ClientSide::Http1(asked))),
        relay: Some(line.relay.clone()),
        extensions: parts.extensions,
    };
    let relay = line.relay.clone();
    // An informational answer wakes this connection's task (all of it is one task, with one waker): hyper finds nothing new here,
    // flushes, and the connection writes it.
    poll_fn(move |cx| {
        relay.connection.register(cx.waker());
        Poll::Ready(())
    })
    .then(move |()| request::serve(inner, arrived))
    .then(move |response| deliver(line, asked, response))
}

/// Hands an answer over, behind the informational ones that came together with it.
async fn deliver(
    line: Arc<Line>,
    asked: Option<OnUpgrade>,
    response: Response<ResponseBody>,
) -> Result<Response<ResponseBody>, Infallible> {
    poll_fn(|cx| {
        line.relay.connection.register(cx.waker());
        if line.relay.queue.is_waiting() {
            // The flush that follows takes them, and wakes this task.
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
    line.answering(response.body().limits());
    if let Some(asked) = asked {
        line.decide(asked, response.status() == StatusCode::SWITCHING_PROTOCOLS);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_answer<F>(_: impl Fn(Arc<Inner>, Request<hyper::body::Incoming>) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_request_takes_little_place_while_it_waits() {
        let size = size_of_answer(answer);
        assert!(size <= 3 * 1024, "{size} bytes");
    }
}
