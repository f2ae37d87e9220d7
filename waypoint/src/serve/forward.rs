//! Forwarding: from a route that says "to this cluster" to the answer of an endpoint.
//!
//! The request is edited as its route says, sent within the route's time (`attempts`), and answered by what an endpoint says or by why
//! none did (`failure`).

mod attempts;
mod failure;

use std::{pin::pin, sync::Arc, time::Duration};

use cairn_exchange::{Protocol, ResponseFlags, clock};
use cairn_filters::{LocalReply, ResponseHead};
use cairn_policy::{
    balance::Criteria,
    headers::record_alone,
    retry::Outcome,
    route::{Forward, Found, HashFacts, HashPolicy, HashSource, RequestHash, WeightedCluster},
    timeout::RouteTimeouts,
};
use http::{
    HeaderName, HeaderValue, Response, StatusCode,
    header::{CONTENT_LENGTH, SET_COOKIE},
};
use tokio::time::sleep;

pub use self::attempts::tell_outliers;
use self::{
    attempts::{Attempts, NO_RETRIES},
    failure::fail,
};
use super::{
    ResponseBody,
    limits::{Limits, within},
    mirrors, reply,
    request::{self, Journey},
    response::{Active, Leased, Tail},
    upgrade,
};
use crate::{
    body::Incoming,
    upstream::{Answer, Cluster, Counted, Discovery, Level, Picking},
};

const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
const DROPPED: HeaderName = HeaderName::from_static("x-envoy-drop-overload");
/// Dynamic metadata that asks for subsets.
const SUBSETS: &str = "envoy.lb";
const DECORATOR: HeaderName = HeaderName::from_static("x-envoy-decorator-operation");

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
    // In a box: most clusters have nothing to wait for.
    if cluster.waits_for_names()
        && let Err(late) = within(limits.as_deref(), pin!(Box::pin(cluster.resolved()))).await
    {
        return match is_timeout_of_route(&late) {
            true => journey.reply_by_route(late, found),
            false => journey.reply_expired(late, found),
        };
    }
    let level = if to.high_priority { Level::High } else { Level::Default };
    let picking = Picking::new(&cluster)
        .hashed(hash)
        .asking(asked(&journey, &cluster, to, weighted))
        .by_latency(journey.tail.inner.proxy.settings.peak_ewma);
    let mut attempts = Attempts::new(picking, level, policy, plan);
    copy_to_mirrors(&mut journey, &cluster, to, timeouts.global);
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

/// Sends copies beside the first attempt. A cluster's own mirrors come before those of routes; where nobody serves the request, nobody
/// gets a copy.
fn copy_to_mirrors(journey: &mut Journey<'_>, cluster: &Cluster, to: &Forward, timeout: Option<Duration>) {
    let mirrors = match cluster.settings.mirrors.as_slice() {
        [] => to.mirrors.as_slice(),
        own => own,
    };
    let by_host = matches!(cluster.settings.discovery, Discovery::DynamicForwardProxy(_));
    if !mirrors.is_empty() && (by_host || cluster.state.endpoints.load().iter().next().is_some()) {
        mirrors::begin(journey, mirrors, timeout);
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
    if let (Some(_), Some(head)) = (max_stream, &mut tail.exchange.request) {
        let chain = journey.http.settings.max_stream_duration;
        limits.stream_by_route(to.timeouts.stream_limit(chain, &mut head.headers));
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

/// Edits in Envoy's order: what the weighted cluster says, then route, virtual host and table, then the rewrites of the route.
fn edit_request(journey: &mut Journey<'_>, found: Found<'_>, to: &Forward, weighted: Option<&WeightedCluster>) {
    let keep = !journey.http.settings.suppress_envoy_headers;
    if journey.tail.asked.is_none() && edits_request(found, to, weighted) {
        // As filters see it: what the route makes of it is not what policy speaks of.
        journey.tail.asked = journey.tail.exchange.request.clone().map(Box::new);
    }
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

/// Whether a route sends another request than it gets.
fn edits_request(found: Found<'_>, to: &Forward, weighted: Option<&WeightedCluster>) -> bool {
    let weighted = weighted.is_some_and(|weighted| !weighted.request_edits.is_empty() || weighted.host_rewrite.is_some());
    weighted
        || to.path_rewrite.is_some()
        || to.host_rewrite.is_some()
        || found.request_edits(None).iter().any(|edits| !edits.is_empty())
}

/// Edits an answer as route and virtual host say.
pub fn edit_response(head: &mut ResponseHead, tail: &mut Tail, found: Found<'_>, weighted: Option<&WeightedCluster>) {
    tail.exchange.status = Some(head.status); // edits may tell it
    for edits in found.response_edits(weighted) {
        edits.apply_to_response(&mut head.headers, &tail.exchange, &record_alone);
    }
    name_operation(head, tail, found);
}

/// Tells the client which operation its route is, where the chain traces.
pub fn name_operation(head: &mut ResponseHead, tail: &Tail, found: Found<'_>) {
    if !tail.trace.as_ref().is_some_and(|trace| trace.tells_operation()) {
        return;
    }
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

/// What a request asks of the endpoints of a cluster with subsets: its weighted cluster or route, and over that what filters noted.
fn asked(journey: &Journey<'_>, cluster: &Cluster, to: &Forward, weighted: Option<&WeightedCluster>) -> Option<Arc<Criteria>> {
    cluster.settings.subsets.as_ref()?;
    let configured = weighted.map_or(&to.asks, |weighted| &weighted.asks);
    let mut noted = journey.tail.exchange.metadata.namespace(SUBSETS).peekable();
    if noted.peek().is_none() {
        return configured.clone();
    }
    let noted = Criteria::new(noted);
    Some(Arc::new(
        configured
            .as_ref()
            .map_or(noted.clone(), |configured| configured.merged(&noted)),
    ))
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
