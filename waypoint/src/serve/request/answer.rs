//! Answers in our own words, and the last things done to the head of every answer.

use std::sync::Arc;

use bytes::Bytes;
use cairn_exchange::{Exchange, Protocol, ResponseFlags};
use cairn_filters::{LocalReply, OnRoute, ResponseHead, Run};
use cairn_policy::route::Found;
use http::{HeaderValue, Method, Response, StatusCode, header};

use super::Journey;
use crate::{
    body::Incoming,
    serve::{
        Inner, ResponseBody, date, forward, reply,
        response::{Tail, grpc_status},
    },
    snapshot::HttpChain,
};

impl Journey<'_> {
    /// Answers with our own words.
    pub fn reply(self, reply: LocalReply) -> Response<ResponseBody> {
        self.reply_closing(reply, false)
    }

    /// Answers an exchange that lasted too long on its way to this route.
    pub fn reply_expired(self, reply: LocalReply, found: Found<'_>) -> Response<ResponseBody> {
        let close = self.upgrading;
        self.reply_beside_route(reply, found, close)
    }

    pub(super) fn reply_closing(self, reply: LocalReply, close: bool) -> Response<ResponseBody> {
        let grpc = self.tail.exchange.is_grpc();
        local(self.tail, Some(self.http), reply, grpc, close)
    }

    /// Answers for a filter. The route that the request would have taken is told all the same; the route's edits are not made.
    /// A client that waits for its upgrade has not ended its request.
    pub(super) fn reply_of_filter(mut self, reply: LocalReply, close: bool, route: OnRoute<'_>) -> Response<ResponseBody> {
        let close = close || self.upgrading;
        let Some(found) = route.found else {
            return self.reply_closing(reply, close);
        };
        if let Some(name) = route.cluster() {
            self.tail.exchange.cluster = self.snapshot.clusters.get(name).map(|cluster| cluster.facts.clone());
        }
        self.reply_beside_route(reply, found, close)
    }

    /// Answers for the connection, not for the route: none of its edits are made, only its name is told.
    fn reply_beside_route(mut self, reply: LocalReply, found: Found<'_>, close: bool) -> Response<ResponseBody> {
        let grpc = self.tail.exchange.is_grpc();
        let (mut head, body) = begin_reply(&mut self.tail, reply, grpc);
        forward::name_operation(&mut head, &self.tail, found);
        end_reply(self.tail, Some(self.http), head, body, close)
    }

    /// Answers with what the route says, edited as it says.
    pub fn reply_by_route(mut self, reply: LocalReply, found: Found<'_>) -> Response<ResponseBody> {
        let grpc = self.tail.exchange.is_grpc();
        let (mut head, body) = begin_reply(&mut self.tail, reply, grpc);
        forward::edit_response(&mut head, &mut self.tail, found, None);
        end_reply(self.tail, Some(self.http), head, body, false)
    }
}

/// Answers with our own words; `close` ends the connection behind the answer.
pub(super) fn local(
    mut tail: Box<Tail>,
    http: Option<&HttpChain>,
    reply: LocalReply,
    grpc: bool,
    close: bool,
) -> Response<ResponseBody> {
    let (head, body) = begin_reply(&mut tail, reply, grpc);
    end_reply(tail, http, head, body, close)
}

fn begin_reply(tail: &mut Tail, reply: LocalReply, grpc: bool) -> (ResponseHead, Bytes) {
    let reply = tail.inner.proxy.settings.deny_detail.tell(reply, &tail.inner.connection);
    tail.exchange.because(reply.flags, reply.details.clone());
    reply::render(reply, grpc)
}

fn end_reply(
    mut tail: Box<Tail>,
    http: Option<&HttpChain>,
    head: ResponseHead,
    body: Bytes,
    close: bool,
) -> Response<ResponseBody> {
    // A request whose body was not read to its end cannot be followed by another on HTTP/1.
    let close = close || tail.source.as_ref().is_some_and(|source| source.lock().ended.is_none());
    let is_head = tail
        .exchange
        .request
        .as_ref()
        .is_some_and(|request| request.method == Method::HEAD);
    let mut response = finish_head(&mut tail, http, head);
    if close && tail.exchange.protocol != Protocol::Http2 {
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    // Nobody waits for a body behind these, whatever a direct response has.
    let bodyless = is_head || matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let body = if bodyless {
        Incoming::Empty
    } else {
        Incoming::whole(body, None)
    };
    response.map(|()| ResponseBody::new(body, tail))
}

/// The last things done to the head of every answer.
pub fn finish_head(tail: &mut Tail, http: Option<&HttpChain>, mut head: ResponseHead) -> Response<()> {
    match http {
        Some(http) => {
            http.settings
                .server
                .prepare(&mut head.headers, head.status == StatusCode::SWITCHING_PROTOCOLS);
            let exchange = &mut tail.exchange;
            tail.run
                .with(|run: &mut Run| http.filters.encode_head(run, exchange, &mut head));
        }
        None => {
            head.headers.insert(header::SERVER, HeaderValue::from_static("istio-envoy"));
        }
    }
    head.headers.insert(header::DATE, date::now());
    tail.exchange.status = Some(head.status);
    tail.exchange.grpc_status = grpc_status(&head.headers);
    if let Some(http) = http {
        let traced = http.tracer.iter().flat_map(|tracer| tracer.response_headers());
        for name in http.access_logs.response_headers().chain(traced) {
            if let Some(value) = head.headers.get(name) {
                tail.exchange.response_headers.push((name.clone(), value.clone()));
            }
        }
    }
    let elapsed = tail.exchange.elapsed();
    tail.exchange.moments.first_sent = Some(elapsed);
    if tail.ends_connection {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let mut response = Response::new(());
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}

/// Tells of a request that was answered before it became one.
pub fn answered_early(inner: &Arc<Inner>, status: StatusCode, details: &'static str) {
    let (snapshot, chain) = inner.http_chain();
    let name = chain
        .as_ref()
        .map_or_else(|| inner.connection.authority.clone(), |chain| chain.name.clone());
    let mut exchange = Exchange::begin(Protocol::Http11, inner.connection.clone(), name, snapshot.version);
    exchange.status = Some(status);
    exchange.because(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR, details);
    let mut tail = Tail::begin(inner.clone(), exchange);
    tail.chain = chain;
    tail.finish(false);
}
