//! One request: from its head, through filters and route, to its answer.
//!
//! The request sees one configuration, taken when its head has been read; endpoints are read anew at each attempt. Where something
//! decides against the request, the answer says so in Envoy's words, and the record tells why.

use std::{future::ready, net::SocketAddr, pin::pin, sync::Arc};

use bytes::{Bytes, BytesMut};
use cairn_exchange::{Exchange, Protocol, RequestHead, ResponseFlags, Scheme};
use cairn_filters::{LocalReply, OnRoute, ResponseHead, Run, Verdict};
use cairn_policy::{
    headers::{incoming::Arrival, is_upgrade, upgrade_kind},
    route::{Facts, Found, RouteAction, request_location},
};
use futures_util::future::Either;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, header, uri::PathAndQuery};
use http_body::Body as _;
use hyper::upgrade::OnUpgrade;
use parking_lot::Mutex;

use super::{
    Inner, ResponseBody, ask, body_start, date, forward,
    limits::{Limits, within},
    reply,
    response::Tail,
};
use crate::{
    body::{Incoming, RequestSource},
    snapshot::{Chain, ChainKind, HttpChain, HttpSettings, Snapshot},
    upstream::InformationalRelay,
};

/// A request as its protocol's reader hands it over.
pub struct Arrived {
    /// Method.
    pub method: Method,
    /// Target, in whatever form it came.
    pub uri: Uri,
    /// Fields, `host` among them for HTTP/1.
    pub headers: HeaderMap,
    /// Protocol.
    pub protocol: Protocol,
    /// Body.
    pub body: Incoming,
    /// The client's side of an upgrade that it asks for.
    pub upgrade: Option<OnUpgrade>,
    /// Where informational answers go.
    pub relay: Option<Arc<InformationalRelay>>,
    /// What its reader knows beside it: how the names of fields were spelled, where that is kept.
    pub extensions: http::Extensions,
}

/// A request on its way; what the steps share.
pub struct Journey<'a> {
    /// The configuration that it sees.
    pub snapshot: &'a Arc<Snapshot>,
    /// The chain.
    pub http: &'a HttpChain,
    /// What its end has to settle.
    pub tail: Box<Tail>,
    /// One random number for all choices about it.
    pub random: u64,
    /// The client's side of an upgrade.
    pub upgrade: Option<OnUpgrade>,
    /// Where informational answers go.
    pub relay: Option<Arc<InformationalRelay>>,
    /// How the names of fields were spelled, where that is kept.
    pub extensions: http::Extensions,
    /// Whether the client asked for an upgrade that the chain serves.
    pub upgrading: bool,
}

/// A request that a chain serves.
struct Begun {
    snapshot: Arc<Snapshot>,
    chain: Arc<Chain>,
    tail: Box<Tail>,
    body: Incoming,
    upgrade: Option<OnUpgrade>,
    relay: Option<Arc<InformationalRelay>>,
    extensions: http::Extensions,
    scheme_given: bool,
}

/// Serves one request. What needs no waiting is done at once: it takes no place in what waits.
pub fn serve(inner: Arc<Inner>, arrived: Arrived) -> impl Future<Output = Response<ResponseBody>> + Send {
    match Begun::begin(inner, arrived) {
        Ok(begun) => Either::Left(begun.go()),
        Err(answer) => Either::Right(ready(*answer)),
    }
}

impl Begun {
    /// Finds the chain of a request; an error is the answer.
    fn begin(inner: Arc<Inner>, arrived: Arrived) -> Result<Self, Box<Response<ResponseBody>>> {
        let (snapshot, chain) = inner.http_chain();
        let name = chain
            .as_ref()
            .map_or_else(|| inner.connection.authority.clone(), |chain| chain.name.clone());
        let Arrived {
            method,
            uri,
            headers,
            protocol,
            body,
            upgrade,
            relay,
            extensions,
        } = arrived;
        let mut exchange = Exchange::begin(protocol, inner.connection.clone(), name, snapshot.version);
        let scheme_given = uri.scheme().is_some();
        let head = head_of(method, uri, headers);
        let grpc = head.as_ref().is_ok_and(RequestHead::is_grpc);
        let problem = match head {
            Ok(head) => {
                exchange.request = Some(head);
                None
            }
            Err(problem) => Some(problem),
        };
        let mut tail = Tail::begin(inner, exchange);
        let Some(chain) = chain else {
            return Err(Box::new(local(tail, None, reply::chain_not_found(), grpc, true)));
        };
        tail.chain = Some(chain.clone());
        let ChainKind::Http(http) = &chain.kind else {
            return Err(Box::new(local(tail, None, reply::refused_chain(), grpc, false)));
        };
        tail.limits = Limits::of_chain(&http.settings, tail.exchange.start);
        if chain.refuse.is_some() {
            return Err(Box::new(local(tail, Some(http), reply::refused_chain(), grpc, false)));
        }
        if let Some(problem) = problem {
            return Err(Box::new(local(tail, Some(http), reply::bad_request(problem), false, true)));
        }
        Ok(Self {
            snapshot,
            chain,
            tail,
            body,
            upgrade,
            relay,
            extensions,
            scheme_given,
        })
    }

    async fn go(self) -> Response<ResponseBody> {
        let ChainKind::Http(http) = &self.chain.kind else {
            return local(self.tail, None, reply::refused_chain(), false, false);
        };
        let journey = Journey {
            snapshot: &self.snapshot,
            http,
            tail: self.tail,
            random: fastrand::u64(..),
            upgrade: self.upgrade,
            relay: self.relay,
            extensions: self.extensions,
            upgrading: false,
        };
        journey.go(self.scheme_given, self.body).await
    }
}

/// Whether an HTTP/1.0 client wants its connection to go on.
fn asks_to_keep_alive(headers: &HeaderMap) -> bool {
    let options = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok());
    options
        .flat_map(|value| value.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("keep-alive"))
}

/// Takes a request apart into the form that all protocols share; the error is Envoy's reason for 400.
fn head_of(method: Method, uri: Uri, mut headers: HeaderMap) -> Result<RequestHead, &'static str> {
    let parts = uri.into_parts();
    let host = join(&mut headers);
    let authority = match (parts.authority, host) {
        (Some(authority), _) => HeaderValue::try_from(authority.as_str()).unwrap_or(HeaderValue::from_static("")),
        (None, Some(host)) => host,
        (None, None) => return Err("missing_host_header"),
    };
    let scheme = match parts.scheme {
        Some(scheme) if scheme == http::uri::Scheme::HTTPS => Scheme::Https,
        _ => Scheme::Http,
    };
    let path = parts.path_and_query.unwrap_or(PathAndQuery::from_static("/"));
    Ok(RequestHead {
        method,
        path,
        authority,
        scheme,
        headers,
    })
}

/// The host header; several are joined, as Envoy does.
fn join(headers: &mut HeaderMap) -> Option<HeaderValue> {
    let mut all = headers.get_all(header::HOST).iter();
    let first = all.next()?.clone();
    let host = if all.next().is_none() {
        first
    } else {
        let joined: Vec<_> = headers.get_all(header::HOST).iter().map(HeaderValue::as_bytes).collect();
        HeaderValue::from_bytes(&joined.join(&b','))
            // Header values joined by a comma are a header value.
            .unwrap_or(first)
    };
    headers.remove(header::HOST);
    Some(host)
}

impl<'a> Journey<'a> {
    async fn go(mut self, scheme_given: bool, body: Incoming) -> Response<ResponseBody> {
        if let Err(reply) = self.admit(scheme_given) {
            let close = reply.details != "path_normalization_redirect";
            return self.reply_closing(*reply, close);
        }
        if self.upgrading {
            // As filters see it: what the route makes of it is not what policy speaks of.
            self.tail.asked = self.tail.exchange.request.clone().map(Box::new);
        }
        let mut body = body;
        let mut route = self.choose_route();
        if let (Some(trace), Some(found)) = (&mut self.tail.trace, route.found)
            && let Some(decorator) = &found.route.decorator
        {
            trace.decorate(decorator.operation.clone());
        }
        if let Some((reply, close)) = self.decode_in_time(&mut route, &mut body).await {
            return self.reply_of_filter(*reply, close, route);
        }
        self.keep(body);
        let head = match &self.tail.exchange.request {
            Some(head) => head,
            None => return self.reply(reply::bad_request("missing_request")),
        };
        let Some(found) = route.found else {
            return self.reply(reply::route_not_found());
        };
        match &found.route.action {
            RouteAction::Forward(to) => forward::forward(self, found, to).await,
            RouteAction::Redirect(redirect) => {
                let location = redirect.location(&found.route.matches.path, head);
                let mut reply = LocalReply::new(redirect.status, ResponseFlags::NONE, "direct_response", Bytes::new());
                if let Ok(location) = location {
                    reply = reply.with_header(header::LOCATION, location);
                }
                self.reply_by_route(reply, found)
            }
            RouteAction::DirectResponse(response) => {
                let mut reply = LocalReply::new(response.status, ResponseFlags::NONE, "direct_response", response.body.clone());
                if (response.status == StatusCode::CREATED || response.status.is_redirection())
                    && let Ok(location) = request_location(head)
                {
                    reply = reply.with_header(header::LOCATION, location);
                }
                self.reply_by_route(reply, found)
            }
        }
    }

    /// Chooses the route, as Envoy does: before the filters, which see it, and again where one of them asks for that. Edits of the
    /// request by filters alone do not change it.
    fn choose_route(&mut self) -> OnRoute<'a> {
        let exchange = &mut self.tail.exchange;
        exchange.reroute = false;
        let facts = Facts {
            random: self.random,
            metadata: &exchange.metadata,
        };
        let found = exchange.request.as_ref().and_then(|head| self.http.routes.find(head, facts));
        exchange.route = found.and_then(|found| found.route.name.clone());
        let weighted = match found.map(|found| &found.route.action) {
            Some(RouteAction::Forward(to)) => to.target.choose(self.random).1,
            _ => None,
        };
        OnRoute::new(found, weighted)
    }

    /// Leads the request through the filters, as long as it may take. There is an answer if one decides against it, or if it lasts
    /// too long, and whether the connection ends behind it.
    async fn decode_in_time(&mut self, route: &mut OnRoute<'a>, body: &mut Incoming) -> Option<(Box<LocalReply>, bool)> {
        let limits = self.tail.limits.clone();
        let decoded = within(limits.as_deref(), pin!(self.decode(route, body))).await;
        match decoded {
            Ok(decoded) => decoded.err(),
            Err(late) => Some((Box::new(late), !body.is_end_stream())),
        }
    }

    /// Leads the request through the filters. One that buffers gets the whole body before those behind it see anything; an error is
    /// an answer, and whether the connection ends behind it.
    async fn decode(&mut self, route: &mut OnRoute<'a>, body: &mut Incoming) -> Result<(), (Box<LocalReply>, bool)> {
        let filters = &self.http.filters;
        let limits = self.tail.limits.clone();
        let mut unread = !body.is_end_stream();
        if let Some(limits) = limits.as_ref().filter(|_| !unread) {
            limits.request_ended();
        }
        while !self.tail.run.with(|run| filters.is_done(run)) {
            let exchange = &mut self.tail.exchange;
            let services = ask::FromRequest::new(&self.tail.inner, self.snapshot);
            let verdict = self.tail.run.with(|run| filters.decode_head(run, exchange, route, &services));
            self.resume(verdict).await.map_err(|reply| (reply, unread))?;
            if self.tail.exchange.reroute {
                *route = self.choose_route();
            }
            if let Some(wanted) = self.tail.run.with(|run| filters.wants_body_start(run)) {
                let (start, whole) = body_start::begin(body, wanted, limits.as_deref())
                    .await
                    .map_err(|reply| (reply, true))?;
                unread &= !whole;
                if let Some(limits) = limits.as_ref().filter(|_| whole) {
                    limits.request_ended();
                }
                let exchange = &mut self.tail.exchange;
                let services = ask::FromRequest::new(&self.tail.inner, self.snapshot);
                let start = (&start, whole);
                let decode = |run: &mut _| filters.decode_body_start(run, exchange, route, &services, start);
                let verdict = self.tail.run.with(decode);
                self.resume(verdict).await.map_err(|reply| (reply, unread))?;
                if self.tail.exchange.reroute {
                    *route = self.choose_route();
                }
            }
            let Some(limit) = self.tail.run.with(|run| filters.wants_whole_body(run)) else {
                continue;
            };
            let collected = collect(body, limit, limits.as_deref()).await;
            let (mut whole, trailers) = collected.map_err(|reply| (reply, true))?;
            if let Some(limits) = &limits {
                limits.request_ended();
            }
            let exchange = &mut self.tail.exchange;
            let verdict = self.tail.run.with(|run| filters.decode_whole_body(run, exchange, &mut whole));
            *body = Incoming::whole(whole, trailers);
            unread = false;
            self.resume(verdict).await.map_err(|reply| (reply, unread))?;
            self.fit_length(body);
        }
        Ok(())
    }

    /// Waits for what a filter waits for, until it lets the request go on.
    async fn resume(&mut self, mut verdict: Verdict) -> Result<(), Box<LocalReply>> {
        loop {
            match verdict {
                Verdict::Continue => return Ok(()),
                Verdict::Reply(reply) => return Err(Box::new(reply)),
                Verdict::Stop(wait) => verdict = wait.await(&mut self.tail.exchange),
            }
        }
    }

    /// A filter may have changed the body: its length has to be told anew.
    fn fit_length(&mut self, body: &Incoming) {
        let Some(head) = &mut self.tail.exchange.request else { return };
        if head.headers.contains_key(header::CONTENT_LENGTH)
            && let Some(length) = body.size_hint().exact()
        {
            head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
    }

    /// What is done to every request before a filter sees it; an error is the answer.
    fn admit(&mut self, scheme_given: bool) -> Result<(), Box<LocalReply>> {
        let settings = &self.http.settings;
        let exchange = &mut self.tail.exchange;
        if exchange.protocol == Protocol::Http10 && !settings.accept_http10 {
            exchange.flags.insert(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR);
            return Err(Box::new(LocalReply::new(
                StatusCode::UPGRADE_REQUIRED,
                ResponseFlags::NONE,
                "low_version",
                "Upgrade Required",
            )));
        }
        let connection = exchange.connection.clone();
        let Some(head) = exchange.request.as_mut() else {
            return Ok(());
        };
        // hyper ends such a connection; HTTP/1.0 clients are told so all the same, as by Envoy.
        self.tail.ends_connection = exchange.protocol == Protocol::Http10 && !asks_to_keep_alive(&head.headers);
        if head.authority.is_empty() && exchange.protocol != Protocol::Http10 {
            return Err(Box::new(reply::bad_request("missing_host_header")));
        }
        // HTTP/1 counts them while it reads.
        if head.headers.len() > settings.max_request_headers {
            exchange.flags.insert(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR);
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            return Err(Box::new(LocalReply::new(
                status,
                ResponseFlags::NONE,
                "http2.too_many_headers",
                Bytes::new(),
            )));
        }
        underscores(settings.underscores, &mut head.headers)?;
        // An offer to go on in HTTP/2, which some clients make with every request: not taken, and no reason to refuse.
        if upgrade_kind(&head.headers).is_some_and(|kind| kind.eq_ignore_ascii_case("h2c")) {
            head.headers.remove(header::UPGRADE);
            head.headers.remove("http2-settings");
        }
        if let Some(kind) = upgrade_kind(&head.headers).filter(|_| is_upgrade(&head.headers)) {
            let served = (settings.websocket && kind.eq_ignore_ascii_case("websocket"))
                || settings.upgrades.iter().any(|other| kind.eq_ignore_ascii_case(other));
            if !served {
                return Err(Box::new(LocalReply::new(
                    StatusCode::FORBIDDEN,
                    ResponseFlags::NONE,
                    "upgrade_failed",
                    Bytes::new(),
                )));
            }
            self.upgrading = true;
        }
        let arrival = Arrival {
            tls: false,
            scheme_given,
            port: connection.service_port,
            remote: connection.remote_address.ip(),
        };
        let origin = settings.incoming.prepare(head, arrival, || {
            let id = uuid::Uuid::new_v4();
            let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
            HeaderValue::from_str(id.hyphenated().encode_lower(&mut text)).unwrap_or(HeaderValue::from_static(""))
        });
        // The header has no port.
        exchange.client_address = (origin.address != arrival.remote).then(|| SocketAddr::new(origin.address, 0));
        normalize(settings, head)?;
        self.trace();
        Ok(())
    }

    /// Begins the request's trace.
    fn trace(&mut self) {
        let (Some(tracer), Some(head)) = (&self.http.tracer, &mut self.tail.exchange.request) else {
            return;
        };
        let traced = self.http.settings.sampling.decide(&mut head.headers, self.random as u32);
        let trace = tracer.begin(&mut head.headers, traced);
        self.tail.exchange.traceable = traced;
        self.tail.exchange.trace = trace.ids();
        self.tail.trace = Some(Box::new(trace));
    }

    /// Makes the body available to attempts.
    fn keep(&mut self, body: Incoming) {
        if body.is_end_stream() {
            return;
        }
        let mut source = RequestSource::new(body, true);
        if self.tail.run.with(|run| self.http.filters.watches_request(run))
            && let Some(chain) = &self.tail.chain
        {
            source.observe(chain.clone(), self.tail.run.share());
        }
        let source = Arc::new(Mutex::new(source));
        if let Some(limits) = &self.tail.limits {
            limits.request_from(source.clone());
        }
        self.tail.source = Some(source);
    }

    /// Answers with our own words.
    pub fn reply(self, reply: LocalReply) -> Response<ResponseBody> {
        self.reply_closing(reply, false)
    }

    /// Answers an exchange that lasted too long on its way to this route.
    pub fn reply_expired(self, reply: LocalReply, found: Found<'_>) -> Response<ResponseBody> {
        let close = self.upgrading;
        self.reply_beside_route(reply, found, close)
    }

    fn reply_closing(self, reply: LocalReply, close: bool) -> Response<ResponseBody> {
        let grpc = self.tail.exchange.is_grpc();
        local(self.tail, Some(self.http), reply, grpc, close)
    }

    /// Answers for a filter. The route that the request would have taken is told all the same; the route's edits are not made.
    /// A client that waits for its upgrade has not ended its request.
    fn reply_of_filter(mut self, reply: LocalReply, close: bool, route: OnRoute<'_>) -> Response<ResponseBody> {
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

/// What a chain does to paths.
fn normalize(settings: &HttpSettings, head: &mut RequestHead) -> Result<(), Box<LocalReply>> {
    use cairn_policy::path::Normalized;
    match settings.path.apply(&head.path) {
        Normalized::Same => Ok(()),
        Normalized::Changed(path) => {
            head.path = path;
            Ok(())
        }
        Normalized::Redirect(path) => {
            let location = HeaderValue::try_from(path.as_str()).unwrap_or(HeaderValue::from_static("/"));
            let reply = LocalReply::new(
                StatusCode::TEMPORARY_REDIRECT,
                ResponseFlags::NONE,
                "path_normalization_redirect",
                Bytes::new(),
            );
            Err(Box::new(reply.with_header(header::LOCATION, location)))
        }
        Normalized::Reject => Err(Box::new(reply::bad_request("path_normalization_failed"))),
    }
}

/// Header names with underscores, as the chain wants them.
fn underscores(setting: crate::snapshot::chain::Underscores, headers: &mut HeaderMap) -> Result<(), Box<LocalReply>> {
    use crate::snapshot::chain::Underscores;
    if setting == Underscores::Allow {
        return Ok(());
    }
    let found: Vec<_> = headers.keys().filter(|name| name.as_str().contains('_')).cloned().collect();
    match setting {
        Underscores::Reject if !found.is_empty() => {
            let flags = ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR;
            let details = "http1.unexpected_underscore";
            Err(Box::new(LocalReply::new(
                StatusCode::BAD_REQUEST,
                flags,
                details,
                "Bad Request",
            )))
        }
        _ => {
            for name in found {
                headers.remove(name);
            }
            Ok(())
        }
    }
}

/// Reads a whole body, and the trailers behind it.
pub(super) async fn collect(
    body: &mut Incoming,
    limit: usize,
    limits: Option<&Limits>,
) -> Result<(Bytes, Option<HeaderMap>), Box<LocalReply>> {
    let too_large = || {
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        Box::new(LocalReply::new(
            status,
            ResponseFlags::NONE,
            "request_payload_too_large",
            "Payload Too Large",
        ))
    };
    let mut whole = BytesMut::new();
    let mut trailers = None;
    while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut *body).poll_frame(cx)).await {
        let frame = frame.map_err(|_| Box::new(reply::bad_request("http1.codec_error")))?;
        if let Some(limits) = limits {
            limits.moved();
        }
        match frame.into_data() {
            Ok(data) if whole.len() + data.len() > limit => return Err(too_large()),
            Ok(data) if whole.is_empty() => whole = BytesMut::from(data),
            Ok(data) => whole.extend_from_slice(&data),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok((whole.freeze(), trailers))
}

/// Answers with our own words; `close` ends the connection behind the answer.
fn local(mut tail: Box<Tail>, http: Option<&HttpChain>, reply: LocalReply, grpc: bool, close: bool) -> Response<ResponseBody> {
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
    let body = if is_head {
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
    tail.exchange.grpc_status = super::response::grpc_status(&head.headers);
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

/// Where the client wanted to go, for clusters that send there.
pub fn original(inner: &Inner) -> Option<SocketAddr> {
    inner.connection.local_address.or(inner.address)
}
