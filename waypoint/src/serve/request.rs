//! One request: from its head, through filters and route, to its answer.
//!
//! The request sees one configuration, taken when its head has been read; endpoints are read anew at each attempt. Where something
//! decides against the request, the answer says so in Envoy's words, and the record tells why.

mod admit;
mod answer;

use std::{future::ready, net::SocketAddr, pin::pin, sync::Arc};

use bytes::Bytes;
use cairn_exchange::{Exchange, Protocol, RequestHead, ResponseFlags};
use cairn_filters::{LocalReply, OnRoute, Verdict};
use cairn_policy::route::{Facts, RouteAction, request_location};
use futures_util::future::Either;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, header};
use http_body::Body as _;
use parking_lot::Mutex;

pub use self::answer::{answered_early, finish_head};
use self::{admit::head_of, answer::local};
use super::{
    Inner, ResponseBody, ask,
    body_start::{self, collect},
    forward,
    limits::{Limits, within},
    reply,
    response::Tail,
    upgrade::Client,
};
use crate::{
    body::{Incoming, RequestSource},
    snapshot::{Chain, ChainKind, HttpChain, Snapshot},
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
    pub upgrade: Option<Client>,
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
    pub upgrade: Option<Client>,
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
    upgrade: Option<Client>,
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
}

/// Where the client wanted to go, for clusters that send there.
pub fn original(inner: &Inner) -> Option<SocketAddr> {
    inner.connection.local_address.or(inner.address)
}
