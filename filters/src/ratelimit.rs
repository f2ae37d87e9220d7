//! Limits of requests that a service counts (contract xds §3.12).
//!
//! The request's descriptors are sent to the service, and its answer decides; without one, `failure_mode_deny` does. How the messages
//! are written is not known here: [`Wire`] is.

use std::sync::Arc;

use bytes::Bytes;
use cairn_exchange::{Exchange, ResponseFlags};
use cairn_policy::{
    headers::{HeaderEdits, record_alone},
    rate_limit::{
        self, About, Descriptor, HostLimits, RateLimit,
        headers::{Status, of_statuses},
    },
    route::Fraction,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use parking_lot::Mutex;

use crate::{
    contract::{HttpFilter, LocalReply, ResponseHead, Resume, Slot, Verdict},
    on_route::{RouteConfig, Scope},
    services::{GrpcCall, GrpcError, GrpcService},
};

/// gRPC's status for callers that ask too much.
pub const RESOURCE_EXHAUSTED: u32 = 8;

const INTERNAL: HeaderName = HeaderName::from_static("x-envoy-internal");
const RATELIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");

/// The filter.
#[derive(Debug)]
pub struct GlobalRateLimit {
    /// Its settings.
    pub settings: Arc<Settings>,
}

/// Settings of the filter.
#[derive(Debug)]
pub struct Settings {
    /// Under which the service knows these limits.
    pub domain: Arc<str>,
    /// Which limits of routes it counts by.
    pub stage: u32,
    /// Its own, in the place of those of routes.
    pub own: Vec<RateLimit>,
    /// Of which requests.
    pub requests: Requests,
    /// The share of requests that are counted.
    pub enabled: Fraction,
    /// The share of those beyond their limit that are denied.
    pub enforced: Fraction,
    /// The share of requests that are denied when the service does not answer.
    pub deny_on_failure: Fraction,
    /// What those beyond their limit are answered.
    pub status: StatusCode,
    /// What is answered when the service does not answer.
    pub status_on_error: StatusCode,
    /// gRPC callers are told `RESOURCE_EXHAUSTED`.
    pub resource_exhausted: bool,
    /// Whether answers tell what is left.
    pub headers: bool,
    /// Whether answers to those beyond their limit carry `x-envoy-ratelimited`.
    pub tell_limited: bool,
    /// Edits of those answers.
    pub response_edits: HeaderEdits,
    /// The service.
    pub service: Arc<GrpcService>,
    /// How its messages are written.
    pub wire: Wire,
}

/// What a route says of it.
#[derive(Clone, Debug)]
pub struct OnItsRoute {
    /// What becomes of the limits of the virtual host.
    pub host_limits: HostLimits,
    /// Limits in the place of all others.
    pub own: Vec<RateLimit>,
    /// Another domain.
    pub domain: Option<Arc<str>>,
}

/// Of which requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Requests {
    /// Of all.
    #[default]
    Both,
    /// Of those that come from within.
    Internal,
    /// Of those that do not.
    External,
}

/// How the messages of the service are written.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    /// The method.
    pub method: &'static str,
    /// The question: domain and descriptors.
    pub question: fn(&str, &[Descriptor]) -> Bytes,
    /// The answer, or why it is none.
    pub answer: fn(&[u8]) -> Result<Answer, String>,
}

/// What the service says.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// The request is beyond a limit.
    pub over: bool,
    /// Of each descriptor.
    pub statuses: Vec<Status>,
    /// Fields for the answer.
    pub response_headers: Vec<(HeaderName, HeaderValue)>,
    /// Fields for the request.
    pub request_headers: Vec<(HeaderName, HeaderValue)>,
    /// The answer's body, when the request is denied.
    pub body: Bytes,
}

/// What it keeps for a request: fields for its answer, once they are known.
type Kept = Arc<Mutex<Option<Fields>>>;

#[derive(Default)]
struct Fields {
    fields: HeaderMap,
    denied: bool,
}

// === impl GlobalRateLimit ===

impl HttpFilter for GlobalRateLimit {
    fn name(&self) -> &str {
        "envoy.filters.http.ratelimit"
    }

    fn decode_head(&self, slot: &mut Slot, exchange: &mut Exchange, scope: &Scope<'_>) -> Verdict {
        let settings = &self.settings;
        if !settings.counts(exchange) || scope.route.forward().is_none() {
            return Verdict::Continue;
        }
        let here = match scope.config() {
            Some(RouteConfig::RateLimit(here)) => Some(&**here),
            _ => None,
        };
        let descriptors = settings.descriptors(exchange, scope, here);
        if descriptors.is_empty() {
            return Verdict::Continue;
        }
        let domain = here.and_then(|here| here.domain.as_deref()).unwrap_or(&settings.domain);
        let call = GrpcCall {
            service: settings.service.clone(),
            method: settings.wire.method,
            message: (settings.wire.question)(domain, &descriptors),
            metadata: Vec::new(),
        };
        let answer = scope.services.grpc(call);
        let kept = Kept::default();
        *slot = Slot::Other(Box::new(kept.clone()));
        let settings = settings.clone();
        Verdict::Stop(Box::pin(async move {
            let answer = answer.await;
            let resume: Resume = Box::new(move |exchange| settings.decide(answer, &descriptors, exchange, &kept));
            resume
        }))
    }

    fn encode_head(&self, slot: &mut Slot, exchange: &mut Exchange, head: &mut ResponseHead) {
        let Slot::Other(kept) = slot else { return };
        let Some(Fields { fields, denied }) = kept.downcast_ref::<Kept>().and_then(|kept| kept.lock().take()) else {
            return;
        };
        if denied && fields.contains_key(header::CONTENT_TYPE) {
            head.headers.remove(header::CONTENT_TYPE);
        }
        for (name, value) in &fields {
            head.headers.append(name, value.clone());
        }
        if denied {
            let edits = &self.settings.response_edits;
            edits.apply_to_response(&mut head.headers, exchange, &record_alone);
        }
    }
}

// === impl Settings ===

impl Settings {
    /// Whether a request is counted.
    fn counts(&self, exchange: &Exchange) -> bool {
        let internal = || {
            let head = exchange.request.as_ref();
            head.is_some_and(|head| head.headers.get(INTERNAL).is_some_and(|value| value == "true"))
        };
        let meant = match self.requests {
            Requests::Both => true,
            Requests::Internal => internal(),
            Requests::External => !internal(),
        };
        meant && self.enabled.contains(fastrand::u64(..))
    }

    fn descriptors(&self, exchange: &Exchange, scope: &Scope<'_>, here: Option<&OnItsRoute>) -> Vec<Descriptor> {
        let about = About {
            exchange,
            source_cluster: scope.services.node_cluster(),
            cluster: scope.route.cluster().map(|name| &**name),
        };
        let own = here.map(|here| &here.own).filter(|own| !own.is_empty()).unwrap_or(&self.own);
        match scope.route.found {
            Some(_) if !own.is_empty() => RateLimit::each(own, self.stage, about),
            Some(found) => {
                let host_limits = here.map_or(HostLimits::Override, |here| here.host_limits);
                rate_limit::describe(found, host_limits, self.stage, about)
            }
            None => Vec::new(),
        }
    }

    fn decide(
        &self,
        answer: Result<Bytes, GrpcError>,
        descriptors: &[Descriptor],
        exchange: &mut Exchange,
        kept: &Kept,
    ) -> Verdict {
        let answer = answer.and_then(|bytes| (self.wire.answer)(&bytes).map_err(GrpcError::Malformed));
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return self.failed(&error),
        };
        let Answer {
            over,
            statuses,
            response_headers,
            request_headers,
            body,
        } = answer;
        let denied = over && self.enforced.contains(fastrand::u64(..));
        let mut fields = HeaderMap::new();
        for (name, value) in response_headers {
            fields.append(name, value);
        }
        if over && self.tell_limited {
            fields.insert(RATELIMITED, HeaderValue::from_static("true"));
        }
        let told = |index: usize| {
            descriptors
                .get(index)
                .and_then(|descriptor| descriptor.headers)
                .unwrap_or(self.headers)
        };
        let told = statuses.iter().enumerate().filter(|(index, _)| told(*index));
        of_statuses(told.map(|(_, status)| status), &mut fields);
        *kept.lock() = Some(Fields { fields, denied });
        if denied {
            return Verdict::Reply(LocalReply {
                grpc_status: self.resource_exhausted.then_some(RESOURCE_EXHAUSTED),
                ..LocalReply::new(self.status, ResponseFlags::RATE_LIMITED, "request_rate_limited", body)
            });
        }
        if let Some(head) = &mut exchange.request {
            for (name, value) in request_headers {
                head.headers.append(name, value);
            }
        }
        Verdict::Continue
    }

    fn failed(&self, error: &GrpcError) -> Verdict {
        tracing::debug!(%error, cluster = %self.service.cluster, "the rate limit service gave no answer");
        if !self.deny_on_failure.contains(fastrand::u64(..)) {
            return Verdict::Continue;
        }
        let flags = ResponseFlags::RATE_LIMIT_SERVICE_ERROR;
        Verdict::Reply(LocalReply::new(
            self.status_on_error,
            flags,
            "rate_limiter_error",
            Bytes::new(),
        ))
    }
}
