//! Forwarding: from a route that says "to this cluster" to the answer of an endpoint.
//!
//! An attempt that fails before anything of the request was sent harms nobody when it is made again elsewhere, and is, up to
//! [`UNSENT_TRIES`] times, whatever the route says of retries; beyond that the route's retry policy decides.

use std::{
    borrow::Cow,
    pin::pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use cairn_exchange::{Protocol, ResponseFlags, clock};
use cairn_filters::{LocalReply, ResponseHead};
use cairn_policy::{
    headers::record_alone,
    outlier::{Report, status_of_grpc},
    retry::{Outcome, Reset, RetryPlan, RetryPolicy},
    route::{Forward, Found, HashFacts, HashPolicy, HashSource, RequestHash, WeightedCluster},
    timeout::RouteTimeouts,
};
use http::{
    HeaderName, HeaderValue, Response, StatusCode,
    header::{CONTENT_LENGTH, SET_COOKIE},
};
use tokio::time::sleep;

use super::{
    ResponseBody,
    limits::{Limits, within},
    passage, reply,
    request::{self, Journey},
    response::{Active, Leased, Tail},
    upgrade,
};
use crate::{
    body::{Incoming, RequestBody},
    upstream::{
        Answer, Attempt, AttemptError, Avoid, Cluster, ConnectError, Counted, Discovery, Endpoint, Key, Level, Outliers, Picking,
        Purpose, Resource,
        dns::{HostCacheTerms, Names},
        host_and_port,
    },
};

/// Other endpoints that are tried for a request of which nothing was sent (DIFFERENCES.md 5).
const UNSENT_TRIES: u32 = 2;

const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
const OVERLOADED: HeaderName = HeaderName::from_static("x-envoy-overloaded");
const DROPPED: HeaderName = HeaderName::from_static("x-envoy-drop-overload");
const DECORATOR: HeaderName = HeaderName::from_static("x-envoy-decorator-operation");

/// Cut after something was sent.
const STARTED: Outcome<'static> = Outcome::Reset(Reset {
    refused: false,
    request_started: true,
});

/// How an attempt failed, for the retry policy and for the answer.
struct Failure {
    outcome: Outcome<'static>,
    flags: ResponseFlags,
    /// Envoy's name of the reason: `connection termination`.
    reason: &'static str,
    transport: Option<Cow<'static, str>>,
    /// Nothing was sent.
    unsent: bool,
    /// Trying again would not help.
    is_final: bool,
    reply: Option<LocalReply>,
}

/// Forwards a request.
pub async fn forward(mut journey: Journey<'_>, found: Found<'_>, to: &Forward) -> Response<ResponseBody> {
    let (name, weighted) = to.target.choose(journey.random);
    let Some(cluster) = journey.snapshot.clusters.get(name).cloned() else {
        return journey.reply_by_route(reply::cluster_not_found(to.cluster_not_found), found);
    };
    journey.tail.exchange.cluster = Some(cluster.facts.clone());
    if let Some(dropped) = drop_overload(&journey, &cluster) {
        return journey.reply_by_route(dropped, found);
    }
    let RequestHash { hash, cookies } = hash_request(&journey, to, &cluster);
    edit_request(&mut journey, found, to, weighted);
    let per_try = to.retry.as_ref().and_then(|retry| retry.per_try_timeout);
    let grpc = journey.tail.exchange.is_grpc();
    let policy = to.retry.as_ref().unwrap_or(&NO_RETRIES);
    let (timeouts, plan) = match &mut journey.tail.exchange.request {
        Some(head) => (
            to.timeouts.of_request(per_try, grpc, &mut head.headers),
            policy.for_request(head),
        ),
        None => return journey.reply(reply::bad_request("missing_request")),
    };
    limit(&mut journey, to, timeouts.global);
    let limits = journey.tail.limits.clone();
    cluster.resolved().await;
    let level = if to.high_priority { Level::High } else { Level::Default };
    let mut attempts = Attempts {
        picking: Picking::new(&cluster)
            .hashed(hash)
            .by_latency(journey.tail.inner.proxy.settings.peak_ewma),
        level,
        policy,
        plan,
        unsent: 0,
        last_unsent: false,
        begun: clock::now(),
        sent: AtomicBool::new(false),
        retrying: None,
        overflowed: false,
        used_up: false,
    };
    let answered = loop {
        let elapsed = since_request(&journey.tail);
        if let Some(head) = &mut journey.tail.exchange.request {
            timeouts.write(elapsed, !journey.http.settings.suppress_envoy_headers, &mut head.headers);
        }
        let sent = within(
            limits.as_deref(),
            pin!(attempts.next(&mut journey, &cluster, timeouts.per_try)),
        )
        .await;
        let outcome = match sent {
            Ok(outcome) => outcome,
            Err(late) => {
                if is_timeout_of_route(&late) {
                    attempts.timed_out(&journey, &cluster);
                }
                break Err(late);
            }
        };
        let pause = match &outcome {
            Ok((answer, _)) => attempts.retry_answer(&journey, &cluster, answer),
            Err(failure) => {
                if matches!(failure.outcome, Outcome::PerTryTimeout) {
                    attempts.timed_out(&journey, &cluster);
                }
                attempts.retry_failure(&journey, &cluster, failure)
            }
        };
        match (pause, outcome) {
            (None, outcome) => break Ok(outcome),
            (Some(pause), outcome) => {
                drop(outcome);
                // A pause does not outlast the request's time.
                if let Err(late) = within(limits.as_deref(), pin!(sleep(pause))).await {
                    break Err(late);
                }
            }
        }
    };
    if attempts.overflowed {
        journey.tail.exchange.flags.insert(ResponseFlags::UPSTREAM_OVERFLOW);
    }
    match answered {
        Ok(Ok((mut answer, counts))) => {
            if attempts.used_up {
                let flags = &mut journey.tail.exchange.flags;
                flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
            }
            for cookie in cookies {
                answer.head.headers.append(SET_COOKIE, cookie);
            }
            answer_client(journey, found, weighted, answer, counts)
        }
        Ok(Err(failure)) => fail(journey, found, *failure, &attempts),
        // The route's own limit is answered by the route.
        Err(late) if is_timeout_of_route(&late) => journey.reply_by_route(late, found),
        Err(late) => journey.reply_expired(late, found),
    }
}

/// Whether an exchange was late by its route's timeout, not by another limit.
fn is_timeout_of_route(late: &LocalReply) -> bool {
    late.flags == ResponseFlags::UPSTREAM_REQUEST_TIMEOUT
}

/// What a route says of the exchange's time. One that waits to be switched to another protocol has no end of its request, and no
/// timeout that begins with it.
fn limit(journey: &mut Journey<'_>, to: &Forward, global: Option<Duration>) {
    let global = global.filter(|_| !journey.upgrading);
    let RouteTimeouts { idle, max_stream, .. } = to.timeouts;
    if idle.is_none() && max_stream.is_none() && global.is_none() {
        return;
    }
    let tail = &mut journey.tail;
    let limits = tail.limits.get_or_insert_with(|| {
        let limits = Limits::new(tail.exchange.start);
        if tail.source.is_none() {
            limits.request_ended();
        }
        limits
    });
    if let Some(idle) = idle {
        limits.idle_by_route(idle);
    }
    if let (Some(_), Some(head)) = (max_stream, &tail.exchange.request) {
        let chain = journey.http.settings.max_stream_duration;
        limits.stream_by_route(to.timeouts.stream_limit(chain, &head.headers));
    }
    if let Some(global) = global {
        limits.answer_by_route(global);
    }
    if let Some(source) = &tail.source {
        limits.request_from(source.clone());
    }
}

/// How much of the request's time has passed: it begins with the request's end.
fn since_request(tail: &Tail) -> Duration {
    if tail.exchange.attempts == 0 {
        // The first attempt has all the time, to the millisecond.
        return Duration::ZERO;
    }
    match &tail.source {
        None => tail.exchange.elapsed(),
        Some(source) => {
            let ended = source.lock().ended;
            ended.map_or(Duration::ZERO, |ended| clock::now().saturating_duration_since(ended))
        }
    }
}

/// Where nothing is said of retries, the request's own headers may still ask (of internal clients, contract xds §4.6).
static NO_RETRIES: LazyLock<RetryPolicy> = LazyLock::new(RetryPolicy::default);

/// The attempts to send one request.
struct Attempts<'c> {
    picking: Picking<'c>,
    policy: &'c RetryPolicy,
    plan: RetryPlan,
    /// Under whose limits.
    level: Level,
    /// Tries elsewhere after one of which nothing was sent, beyond what the policy allowed.
    unsent: u32,
    /// Nothing was sent the last time.
    last_unsent: bool,
    /// When the last attempt began.
    begun: clock::Instant,
    /// Whether a connection has taken it.
    sent: AtomicBool,
    /// The retry that is under way, as the cluster's limits count it.
    retrying: Option<Counted>,
    /// The cluster's limits have kept the request from another try.
    overflowed: bool,
    /// The answer would be tried again, were there retries left.
    used_up: bool,
}

impl Attempts<'_> {
    /// Makes the next attempt.
    async fn next(
        &mut self,
        journey: &mut Journey<'_>,
        cluster: &Arc<Cluster>,
        per_try: Option<Duration>,
    ) -> Result<(Answer, (Counted, Active)), Box<Failure>> {
        let avoid = Avoid {
            // Where a hash decides, a retry leaves its endpoint only when that is asked for, or cannot be reached.
            endpoints: self.policy.avoid_previous_hosts || self.last_unsent || !cluster.settings.lb.is_hashed(),
            priorities: self.policy.avoid_previous_priorities,
        };
        let endpoint = match &cluster.settings.discovery {
            Discovery::DynamicForwardProxy(terms) => {
                let authority = journey.tail.exchange.request.as_ref().map(|head| head.authority.clone());
                let names = journey.tail.inner.proxy.connector.names().clone();
                Box::pin(by_host(names, authority, cluster, terms)).await?
            }
            _ => self
                .picking
                .next(fastrand::u64(..), avoid)
                .ok_or_else(|| Box::new(nobody()))?,
        };
        let tail = &mut journey.tail;
        let original = request::original(&tail.inner);
        tail.exchange.attempts += 1;
        tail.exchange.upstream = Some(passage::describe(&endpoint, journey.snapshot, original));
        let body = match &tail.source {
            None => RequestBody::empty(),
            Some(source) => RequestBody::next_attempt(source),
        };
        self.begun = clock::now();
        self.sent.store(false, Relaxed);
        let active = Active::begin(endpoint.clone(), cluster.clone());
        let attempt = Attempt {
            connector: &tail.inner.proxy.connector,
            snapshot: journey.snapshot,
            cluster,
            endpoint: &endpoint,
            original,
            key: Key {
                transport: cluster.transport_hash,
                tunnel: journey.snapshot.tunnel_terms(&endpoint.target),
                principal: tail.exchange.connection.peer.clone(),
                original: endpoint.target.address().is_none().then_some(original).flatten(),
                purpose: Purpose::of(
                    cluster.transport_to(&endpoint),
                    cluster.settings.names_by_host,
                    tail.exchange.request.as_ref().map(|head| head.authority.as_bytes()),
                    tail.exchange.connection.remote_address,
                    original,
                ),
                level: self.level,
            },
            near: tail.exchange.connection.id,
            sent: &self.sent,
            downstream: tail.exchange.protocol,
            upgrade: journey.upgrading,
            spelling: &journey.extensions,
            informational: journey.relay.as_ref(),
            limit: per_try.filter(|_| !journey.upgrading),
            source: tail.source.as_deref(),
        };
        let Some(head) = &tail.exchange.request else {
            return Err(Box::new(nobody()));
        };
        let sent_at = tail.exchange.elapsed();
        let result = attempt.send(head, body).await;
        tell_outliers(
            &tail.inner.proxy.outliers,
            cluster,
            &endpoint,
            &result,
            tail.exchange.is_grpc(),
        );
        tail.exchange.moments.first_upstream_sent.get_or_insert(sent_at);
        match result {
            Ok((answer, counted)) => {
                if tail.inner.proxy.settings.peak_ewma {
                    let took = tail.exchange.elapsed().saturating_sub(sent_at);
                    endpoint.state.latency.observe(took, clock::now());
                }
                tail.exchange.moments.first_upstream_received = Some(tail.exchange.elapsed());
                if let Some(upstream) = &mut tail.exchange.upstream {
                    upstream.local_address = answer.local_address;
                }
                Ok((answer, (counted, active)))
            }
            Err(error) => Err(Box::new(failure_of(error, tail))),
        }
    }

    /// Whether an answer is tried again, and after what pause.
    fn retry_answer(&mut self, journey: &Journey<'_>, cluster: &Cluster, answer: &Answer) -> Option<Duration> {
        let headers = &answer.head.headers;
        let grpc_status = super::response::grpc_status(headers);
        let outcome = Outcome::Response {
            status: answer.head.status,
            headers,
            grpc_status,
        };
        self.last_unsent = false;
        let again = self.decide(journey, cluster, &outcome, Some(headers));
        self.used_up =
            again.is_none() && self.tried_again() && !self.overflowed && self.plan.wants(self.policy, &outcome).is_some();
        again
    }

    /// Whether a failed attempt is made again, and after what pause.
    fn retry_failure(&mut self, journey: &Journey<'_>, cluster: &Cluster, failure: &Failure) -> Option<Duration> {
        self.last_unsent = failure.unsent;
        if failure.is_final {
            return None;
        }
        let by_policy = self.decide(journey, cluster, &failure.outcome, None);
        if by_policy.is_some() || self.overflowed {
            return by_policy;
        }
        if failure.unsent && self.unsent + self.plan.made < UNSENT_TRIES && self.picking.has_others() && can_repeat(journey) {
            self.retry(cluster)?;
            self.unsent += 1;
            return Some(Duration::ZERO);
        }
        None
    }

    fn decide(
        &mut self,
        journey: &Journey<'_>,
        cluster: &Cluster,
        outcome: &Outcome<'_>,
        answer: Option<&http::HeaderMap>,
    ) -> Option<Duration> {
        self.retrying = None;
        if !can_repeat(journey) {
            return None;
        }
        self.plan.decide(self.policy, outcome)?;
        self.retry(cluster)?;
        Some(self.plan.wait(self.policy, answer, clock::wall(), fastrand::u64(..)))
    }

    /// Counts one more retry, if the cluster's limits allow it.
    fn retry(&mut self, cluster: &Cluster) -> Option<()> {
        self.retrying = Counted::within(&cluster.state, &cluster.settings.breakers, self.level, Resource::Retry);
        self.overflowed = self.retrying.is_none();
        self.retrying.as_ref().map(|_| ())
    }

    /// The attempt took too long: that is its endpoint's failure.
    fn timed_out(&self, journey: &Journey<'_>, cluster: &Arc<Cluster>) {
        // While it waits for one of too few connections, that is nobody's failure.
        let Some(endpoint) = self.picking.last().filter(|_| self.sent.load(Relaxed)) else {
            return;
        };
        let proxy = &journey.tail.inner.proxy;
        proxy.outliers.report(cluster, endpoint, Report::TimedOut);
        if proxy.settings.peak_ewma {
            let now = clock::now();
            endpoint.state.latency.observe(now.saturating_duration_since(self.begun), now);
        }
    }

    /// Whether anything was tried more than once.
    fn tried_again(&self) -> bool {
        self.plan.made + self.unsent > 0
    }
}

/// Whether the request's body, if it has one, could be sent again.
fn can_repeat(journey: &Journey<'_>) -> bool {
    journey.tail.source.as_ref().is_none_or(|source| source.lock().can_repeat())
}

/// Edits in Envoy's order: what the weighted cluster says, then route, virtual host and table, then the rewrites of the route.
fn edit_request(journey: &mut Journey<'_>, found: Found<'_>, to: &Forward, weighted: Option<&WeightedCluster>) {
    let keep = !journey.http.settings.suppress_envoy_headers;
    let exchange = &mut journey.tail.exchange;
    if let Some(weighted) = weighted {
        if !weighted.request_edits.is_empty() {
            weighted.request_edits.apply_to_request(exchange, &record_alone);
        }
        if let Some(head) = &mut exchange.request {
            weighted.rewrite_host(head, keep);
        }
    }
    for edits in found.request_edits(None) {
        edits.apply_to_request(exchange, &record_alone);
    }
    let Some(head) = &mut exchange.request else { return };
    if let Err(error) = to.rewrite(&found.route.matches.path, head, keep) {
        tracing::warn!(%error, route = ?found.route.name, "a rewritten path is no path; the request keeps its own");
    }
}

/// Edits an answer as route and virtual host say.
pub fn edit_response(head: &mut ResponseHead, tail: &mut Tail, found: Found<'_>, weighted: Option<&WeightedCluster>) {
    tail.exchange.status = Some(head.status); // edits may tell it
    for edits in found.response_edits(weighted) {
        edits.apply_to_response(&mut head.headers, &tail.exchange, &record_alone);
    }
    name_operation(head, found);
}

/// Tells the client which operation its route is.
pub fn name_operation(head: &mut ResponseHead, found: Found<'_>) {
    if let Some(decorator) = found.route.decorator.as_ref().filter(|decorator| decorator.propagate) {
        head.headers.insert(DECORATOR, decorator.operation.clone());
    }
}

fn answer_client(
    mut journey: Journey<'_>,
    found: Found<'_>,
    weighted: Option<&WeightedCluster>,
    answer: Answer,
    (counted, active): (Counted, Active),
) -> Response<ResponseBody> {
    let Answer {
        mut head,
        body,
        lease,
        local_address: _,
        upgrade,
        spelling,
    } = answer;
    let tail = &mut journey.tail;
    if let Some(source) = &tail.source {
        source.lock().stop_recording();
    }
    tail.exchange.because(ResponseFlags::NONE, "via_upstream");
    let switched = head.status == StatusCode::SWITCHING_PROTOCOLS;
    if !(journey.http.settings.suppress_envoy_headers || switched)
        && let (Some(received), Some(sent)) = (
            tail.exchange.moments.first_upstream_received,
            tail.exchange.moments.first_upstream_sent,
        )
    {
        let took = received.saturating_sub(sent).as_millis();
        head.headers
            .insert(SERVICE_TIME, HeaderValue::from(u64::try_from(took).unwrap_or(u64::MAX)));
    }
    edit_response(&mut head, tail, found, weighted);
    let mut response = request::finish_head(tail, Some(journey.http), head);
    if journey.http.settings.preserve_header_case {
        *response.extensions_mut() = spelling;
    }
    let mut tail = journey.tail;
    tail.lease = Some(Leased { lease, counted, active });
    // A client of HTTP/1 has its answer with the last byte of its length; the end of the endpoint's stream is not waited for.
    if matches!(body, Incoming::Http2(_)) && tail.exchange.protocol != Protocol::Http2 {
        let length = response.headers().get(CONTENT_LENGTH);
        tail.length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    }
    match (switched, journey.upgrade, upgrade) {
        (true, Some(client), Some(endpoint)) => {
            upgrade::pass(client, endpoint, tail);
            response.map(|()| ResponseBody::empty())
        }
        _ => response.map(|()| ResponseBody::new(body, tail)),
    }
}

fn fail(mut journey: Journey<'_>, found: Found<'_>, failure: Failure, attempts: &Attempts<'_>) -> Response<ResponseBody> {
    let exchange = &mut journey.tail.exchange;
    if let Some(reply) = failure.reply {
        return journey.reply_by_route(reply, found);
    }
    let tried_again = attempts.tried_again();
    if tried_again && !attempts.overflowed && (failure.unsent || attempts.plan.wants(attempts.policy, &failure.outcome).is_some())
    {
        exchange.flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
    }
    exchange.transport_failure.clone_from(&failure.transport);
    let inside = match &failure.transport {
        Some(transport) => format!("{}|{}", failure.reason.replace(' ', "_"), transport.replace(' ', "_")),
        None => failure.reason.replace(' ', "_"),
    };
    let how = if tried_again {
        "retried and the latest reset reason"
    } else {
        "reset reason"
    };
    let body = format!(
        "upstream connect error or disconnect/reset before headers. {how}: {}",
        failure.reason
    );
    let details = format!("upstream_reset_before_response_started{{{inside}}}");
    // An endpoint that breaks the protocol is a bad gateway, everything else an unavailable service: as Envoy's router answers.
    let broken = failure.flags.contains(ResponseFlags::UPSTREAM_PROTOCOL_ERROR);
    let status = if broken {
        StatusCode::BAD_GATEWAY
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let mut reply = LocalReply::new(status, failure.flags, details, body);
    if matches!(failure.outcome, Outcome::Overflow) && !journey.http.settings.suppress_envoy_headers {
        reply = reply.with_header(OVERLOADED, HeaderValue::from_static("true"));
    }
    journey.reply_by_route(reply, found)
}

/// How an attempt went, for the detection of endpoints that fail.
fn tell_outliers(
    outliers: &Outliers,
    cluster: &Arc<Cluster>,
    endpoint: &Arc<Endpoint>,
    result: &Result<(Answer, Counted), AttemptError>,
    grpc: bool,
) {
    if cluster.settings.outlier.is_none() {
        return;
    }
    let tell = |report| outliers.report(cluster, endpoint, report);
    match result {
        Ok((answer, _)) => {
            tell(Report::Connected);
            let grpc_status = grpc.then(|| super::response::grpc_status(&answer.head.headers)).flatten();
            tell(Report::Answered(
                grpc_status.map_or_else(|| answer.head.status.as_u16(), status_of_grpc),
            ));
        }
        // Of timeouts it is told where they are found out.
        Err(
            AttemptError::Connect(ConnectError::Unsupported(_))
            | AttemptError::Late
            | AttemptError::Overflow
            | AttemptError::Unsendable(_),
        ) => {}
        Err(AttemptError::RequestBody) => tell(Report::Connected),
        Err(AttemptError::Connect(_)) => tell(Report::Failed),
        Err(
            AttemptError::Refused
            | AttemptError::Closed
            | AttemptError::Terminated
            | AttemptError::Reset(_)
            | AttemptError::Protocol(_),
        ) => {
            tell(Report::Connected);
            tell(Report::Failed);
        }
    }
}

/// The hash of a request, where its cluster wants one: of what the cluster names, or else the route.
fn hash_request(journey: &Journey<'_>, to: &Forward, cluster: &Cluster) -> RequestHash {
    let policies = match cluster.settings.hash_policies.as_slice() {
        [] => to.hash_policies.as_slice(),
        own => own,
    };
    let exchange = &journey.tail.exchange;
    let Some(head) = exchange
        .request
        .as_ref()
        .filter(|_| cluster.settings.lb.is_hashed() && !policies.is_empty())
    else {
        return RequestHash::default();
    };
    let connection = &exchange.connection;
    let made_from = || {
        let local = connection.local_address.map(|address| address.to_string());
        format!(
            "{}{}",
            connection.remote_address,
            local.unwrap_or_else(|| connection.authority.to_string())
        )
    };
    let makes_cookies = policies
        .iter()
        .any(|policy| matches!(policy.source, HashSource::Cookie { ttl: Some(_), .. }));
    let facts = HashFacts {
        client: exchange.client_address.unwrap_or(connection.remote_address).ip(),
        connection: &if makes_cookies { made_from() } else { String::new() },
    };
    HashPolicy::hash(policies, head, facts)
}

/// The answer to a request that istiod says is to be dropped, by chance.
fn drop_overload(journey: &Journey<'_>, cluster: &Cluster) -> Option<LocalReply> {
    let dropped = cluster.state.endpoints.load().dropped;
    if dropped == 0 || fastrand::u32(..1_000_000) >= dropped {
        return None;
    }
    let reply = LocalReply::new(
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::DROP_OVERLOAD,
        "drop_overload",
        "drop overload",
    );
    Some(if journey.http.settings.suppress_envoy_headers {
        reply
    } else {
        reply.with_header(DROPPED, HeaderValue::from_static("true"))
    })
}

/// The endpoint that the request's host names, once it is looked up.
async fn by_host(
    names: Names,
    authority: Option<HeaderValue>,
    cluster: &Cluster,
    terms: &HostCacheTerms,
) -> Result<Arc<Endpoint>, Box<Failure>> {
    let Some((host, port)) = authority.as_ref().and_then(|authority| host_and_port(authority.as_bytes())) else {
        return Err(Box::new(nobody()));
    };
    let found = cluster
        .state
        .hosts
        .endpoint(&names, terms, host, port.unwrap_or(terms.port))
        .await;
    found.map_err(|error| {
        let reply = LocalReply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            ResponseFlags::DNS_RESOLUTION_FAILED,
            error.to_string(),
            "DNS resolution failure",
        );
        Box::new(Failure {
            reply: Some(reply),
            ..nobody()
        })
    })
}

fn nobody() -> Failure {
    Failure {
        outcome: Outcome::Overflow,
        flags: ResponseFlags::NO_HEALTHY_UPSTREAM,
        reason: "no healthy upstream",
        transport: None,
        unsent: true,
        is_final: true,
        reply: Some(reply::no_healthy_upstream()),
    }
}

fn late_attempt() -> Failure {
    let reply = LocalReply::new(
        StatusCode::GATEWAY_TIMEOUT,
        ResponseFlags::UPSTREAM_REQUEST_TIMEOUT,
        "upstream_per_try_timeout",
        "upstream request timeout",
    );
    Failure {
        outcome: Outcome::PerTryTimeout,
        flags: ResponseFlags::UPSTREAM_REQUEST_TIMEOUT,
        reason: "timeout",
        transport: None,
        unsent: false,
        is_final: false,
        reply: Some(reply),
    }
}

fn failure_of(error: AttemptError, tail: &Tail) -> Failure {
    let failure = |outcome, flags, reason, transport, unsent| Failure {
        outcome,
        flags,
        reason,
        transport,
        unsent,
        is_final: false,
        reply: None,
    };
    match error {
        AttemptError::Connect(ConnectError::Unsupported(reason)) => {
            tracing::warn!(%reason, "a request was refused: its cluster needs what is not supported");
            let body = format!("the waypoint cannot reach this service: {reason}\n");
            let reply = LocalReply::new(
                StatusCode::SERVICE_UNAVAILABLE,
                ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
                "cluster_not_supported",
                body,
            );
            Failure {
                reply: Some(reply),
                ..nobody()
            }
        }
        AttemptError::Connect(ConnectError::Timeout) => failure(
            Outcome::ConnectFailure,
            ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
            "connection timeout",
            None,
            true,
        ),
        AttemptError::Connect(error) => failure(
            Outcome::ConnectFailure,
            ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
            "remote connection failure",
            Some(error.to_string().into()),
            true,
        ),
        AttemptError::Late => late_attempt(),
        AttemptError::Overflow => Failure {
            is_final: true,
            ..failure(Outcome::Overflow, ResponseFlags::UPSTREAM_OVERFLOW, "overflow", None, false)
        },
        AttemptError::Refused => failure(
            Outcome::Reset(Reset {
                refused: true,
                request_started: true,
            }),
            ResponseFlags::UPSTREAM_REMOTE_RESET,
            "remote refused stream reset",
            None,
            true,
        ),
        AttemptError::Closed => failure(
            Outcome::Reset(Reset {
                refused: false,
                request_started: false,
            }),
            ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
            "connection termination",
            None,
            true,
        ),
        AttemptError::Terminated => failure(
            STARTED,
            ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
            "connection termination",
            None,
            false,
        ),
        AttemptError::Reset(_) => failure(STARTED, ResponseFlags::UPSTREAM_REMOTE_RESET, "remote reset", None, false),
        AttemptError::Protocol(_) => failure(STARTED, ResponseFlags::UPSTREAM_PROTOCOL_ERROR, "protocol error", None, false),
        AttemptError::RequestBody => {
            let client = tail.source.as_ref().is_some_and(|source| source.lock().failed);
            let details = if client { "http1.codec_error" } else { "request_body_failed" };
            Failure {
                reply: Some(reply::bad_request(details)),
                ..nobody()
            }
        }
        AttemptError::Unsendable(_) => Failure {
            reply: Some(reply::bad_request("invalid_authority")),
            ..nobody()
        },
    }
}
