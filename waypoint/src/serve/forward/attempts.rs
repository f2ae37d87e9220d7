//! The attempts to send one request: to which endpoint, and whether there is another one.
//!
//! An attempt that fails before anything of the request was sent harms nobody when it is made again elsewhere, and is, up to
//! [`UNSENT_TRIES`] times, whatever the route says of retries; beyond that the route's retry policy decides.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};

use cairn_exchange::clock;
use cairn_policy::{
    outlier::{Report, status_of_grpc},
    retry::{Outcome, RetryPlan, RetryPolicy},
};
use http::HeaderValue;

use super::failure::{Failure, denied, failure_of, nobody, unresolved};
use crate::{
    body::RequestBody,
    serve::{
        open::Asked,
        passage,
        request::{self, Journey},
        response::{Active, grpc_status},
    },
    upstream::{
        Answer, Attempt, AttemptError, Avoid, Cluster, ConnectError, Counted, Discovery, Endpoint, Key, Level, Outliers, Picking,
        Purpose, Resource,
        dns::{HostCacheTerms, Names},
        host_and_port,
    },
};

/// Other endpoints that are tried for a request of which nothing was sent (DIFFERENCES.md 5).
const UNSENT_TRIES: u32 = 2;

/// Where nothing is said of retries, the request's own headers may still ask (of internal clients, contract xds §4.6).
pub(super) static NO_RETRIES: LazyLock<RetryPolicy> = LazyLock::new(RetryPolicy::default);

/// The attempts to send one request.
pub(super) struct Attempts<'c> {
    picking: Picking<'c>,
    pub(super) policy: &'c RetryPolicy,
    pub(super) plan: RetryPlan,
    /// Under whose limits.
    level: Level,
    /// Tries elsewhere after one of which nothing was sent, beyond what the policy allowed.
    unsent: u8,
    /// Nothing was sent the last time.
    last_unsent: bool,
    /// When the last attempt began.
    begun: clock::Instant,
    /// Whether a connection has taken it.
    sent: AtomicBool,
    /// The retry that is under way, as the cluster's limits count it.
    retrying: Option<Counted>,
    /// The cluster's limits have kept the request from another try.
    pub(super) overflowed: bool,
    /// The answer would be tried again, were there retries left.
    pub(super) used_up: bool,
}

impl<'c> Attempts<'c> {
    /// None has been made yet.
    pub(super) fn new(picking: Picking<'c>, level: Level, policy: &'c RetryPolicy, plan: RetryPlan) -> Self {
        Self {
            picking,
            policy,
            plan,
            level,
            unsent: 0,
            last_unsent: false,
            begun: clock::now(),
            sent: AtomicBool::new(false),
            retrying: None,
            overflowed: false,
            used_up: false,
        }
    }

    /// Makes the next attempt.
    pub(super) async fn next(
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
        if let (Some(tracer), Some(trace)) = (&journey.http.tracer, &mut tail.trace) {
            tracer.attempt(trace, &mut tail.exchange, &tail.inner.proxy.settings.node);
        }
        let tail = &mut journey.tail;
        let original = request::original(&tail.inner);
        tail.exchange.attempts += 1;
        tail.exchange.upstream = Some(passage::describe(&endpoint, journey.snapshot, original));
        let body = match &tail.source {
            None => RequestBody::empty(),
            Some(source) => RequestBody::next_attempt(source),
        };
        if let (Some(tracer), Some(trace)) = (&journey.http.tracer, &mut tail.trace) {
            tracer.attempt(trace, &mut tail.exchange, &tail.inner.proxy.settings.node);
        }
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
                tunnel: tail.inner.proxy.connector.tunnel_terms(journey.snapshot, &endpoint.target),
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
        let asked = || Asked::request(&tail.exchange, tail.asked.as_deref());
        let mut sending = pin!(attempt.send(head, body));
        let sent = poll_fn(|cx| match sending.as_mut().poll(cx) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            // It may wait for long: its answer, or the rest of the request, may come hours later.
            Poll::Pending => tail
                .vigil
                .poll_denied(cx, &tail.inner, tail.chain.as_ref(), asked, true)
                .map(|()| None),
        });
        let Some(result) = sent.await else {
            return Err(Box::new(denied()));
        };
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
    pub(super) fn retry_answer(&mut self, journey: &Journey<'_>, cluster: &Cluster, answer: &Answer) -> Option<Duration> {
        let headers = &answer.head.headers;
        let grpc_status = grpc_status(headers);
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
    pub(super) fn retry_failure(&mut self, journey: &Journey<'_>, cluster: &Cluster, failure: &Failure) -> Option<Duration> {
        self.last_unsent = failure.unsent;
        if failure.is_final {
            return None;
        }
        let by_policy = self.decide(journey, cluster, &failure.outcome, None);
        if by_policy.is_some() || self.overflowed {
            return by_policy;
        }
        if failure.unsent
            && u32::from(self.unsent) + self.plan.made < UNSENT_TRIES
            && self.picking.has_others()
            && can_repeat(journey)
        {
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
    pub(super) fn timed_out(&self, journey: &Journey<'_>, cluster: &Arc<Cluster>) {
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
    pub(super) fn tried_again(&self) -> bool {
        self.plan.made + u32::from(self.unsent) > 0
    }
}

/// Whether the request's body, if it has one, could be sent again.
fn can_repeat(journey: &Journey<'_>) -> bool {
    journey.tail.source.as_ref().is_none_or(|source| source.lock().can_repeat())
}

/// How an attempt went, for the detection of endpoints that fail.
pub fn tell_outliers(
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
            let grpc_status = grpc.then(|| grpc_status(&answer.head.headers)).flatten();
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
    found.map_err(|error| Box::new(unresolved(error.to_string())))
}
