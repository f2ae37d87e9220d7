//! HTTP/1.1 requests of one inner connection.
//!
//! hyper reads and writes; what it does differently from what users of Envoy expect is mended around it: framing that could smuggle
//! requests is refused before hyper sees it, its own short error answers are replaced, informational answers go past it, and an answer
//! that was cut ends the connection with a reset.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::pin,
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};

use cairn_exchange::Protocol;
use http::{StatusCode, Version, header};
use hyper::{Request, Response, server::conn::http1, service::service_fn};

use super::{
    Inner, ResponseBody,
    inner_io::InnerIo,
    request::{self, Arrived},
};
use crate::{
    body::Incoming,
    snapshot::{ChainKind, HttpSettings},
};

/// hyper's smallest read buffer; more is asked for by the chain's limit on heads.
const MIN_BUFFER: usize = 8 * 1024;

/// Serves requests until the connection ends. (What is needed only to begin is not part of the future: idle connections are many.)
pub fn serve(inner: Arc<Inner>, io: InnerIo) -> impl Future<Output = ()> + Send {
    let limits = limits(&inner);
    let relay = inner.relay.clone().unwrap_or_default();
    let line = inner.line.clone().unwrap_or_default();
    let io = io.watched(
        limits.max_head.max(MIN_BUFFER),
        limits.head_timeout,
        relay.queue.clone(),
        line.clone(),
    );
    let service = service_fn({
        let inner = inner.clone();
        // hyper keeps the place of this future while the connection is idle: a box takes less.
        move |request| Box::pin(answer(inner.clone(), request))
    });
    let connection = http1::Builder::new()
        .half_close(true)
        .max_buf_size(limits.max_head.max(MIN_BUFFER))
        .max_headers(limits.max_headers)
        .auto_date_header(false)
        .preserve_header_case(limits.preserve_header_case)
        .serve_connection(io, service)
        .with_upgrades();
    let mut connection = Box::pin(connection);
    async move {
        let mut drain = inner.proxy.drain.clone();
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = drain.drained() => {
                connection.as_mut().graceful_shutdown();
                connection.as_mut().await
            }
            () = inner.spent(limits.idle_timeout, limits.longest) => {
                connection.as_mut().graceful_shutdown();
                connection.as_mut().await
            }
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
    idle_timeout: Option<Duration>,
    longest: Option<Duration>,
    preserve_header_case: bool,
}

/// Limits by the chain that serves the connection now.
fn limits(inner: &Inner) -> Limits {
    let (_, chain) = inner.http_chain();
    let of = |settings: &HttpSettings| Limits {
        max_head: settings.max_request_head,
        max_headers: settings.max_request_headers,
        head_timeout: settings.request_headers_timeout,
        idle_timeout: settings.idle_timeout,
        longest: settings.max_connection_duration,
        preserve_header_case: settings.preserve_header_case,
    };
    match chain.as_ref().map(|chain| &chain.kind) {
        Some(ChainKind::Http(http)) => of(&http.settings),
        _ => of(&HttpSettings::default()),
    }
}

async fn answer(inner: Arc<Inner>, mut request: Request<hyper::body::Incoming>) -> Result<Response<ResponseBody>, Infallible> {
    let upgrade = request
        .headers()
        .contains_key(header::UPGRADE)
        .then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let protocol = if parts.version == Version::HTTP_10 {
        Protocol::Http10
    } else {
        Protocol::Http11
    };
    let (relay, line) = (inner.relay.clone(), inner.line.clone());
    let asked = upgrade.clone();
    let arrived = Arrived {
        method: parts.method,
        uri: parts.uri,
        headers: parts.headers,
        protocol,
        body: Incoming::http1(body),
        upgrade,
        relay: relay.clone(),
        extensions: parts.extensions,
    };
    let mut exchange = pin!(request::serve(inner, arrived));
    let (Some(relay), Some(line)) = (relay, line) else {
        return Ok(exchange.await);
    };
    // An informational answer wakes this connection's task: hyper finds nothing new here, flushes, and the connection writes it.
    // One that came together with the final answer goes first too.
    let mut response = None;
    let response = poll_fn(|cx| {
        relay.connection.register(cx.waker());
        if response.is_none() {
            response = Some(ready!(exchange.as_mut().poll(cx)));
        }
        if relay.queue.is_waiting() {
            // The flush that follows takes them, and wakes this task.
            return Poll::Pending;
        }
        match response.take() {
            Some(response) => Poll::Ready(response),
            None => Poll::Pending,
        }
    })
    .await;
    line.answering(response.body().limits());
    if let Some(asked) = asked {
        line.decide(asked, response.status() == StatusCode::SWITCHING_PROTOCOLS);
    }
    Ok(response)
}
