//! External authorization (contract xds §3.5, §6.7): an authorizer is asked about a request, and its answer decides and edits.
//!
//! * here is the filter: whether it asks, and what becomes of the answer;
//! * [`question`] is what an authorizer is told, [`answer`] what it may say, [`edits`] how that is carried out;
//! * [`http`] asks one that speaks plain HTTP; one that speaks gRPC is asked in the messages of a [`Wire`];
//! * [`network`] asks about connections.
//!
//! An answer is carried out as a whole or not at all: where it says what cannot be done (a value with a line break, a path that is
//! none), the request is answered with 500, for a request without the edits that its authorizer made is not the one it allowed.

pub mod answer;
pub mod edits;
pub mod http;
pub mod network;
pub mod question;

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use ::http::{HeaderName, HeaderValue, StatusCode};
use bytes::Bytes;
use cairn_exchange::{Exchange, RequestHead, ResponseFlags, clock};
use cairn_policy::{
    headers::is_upgrade,
    matcher::{MetadataMatcher, StringMatcher},
    route::Fraction,
};
use parking_lot::Mutex;
use serde_json::Value;

use self::{
    answer::{Allowed, Answer, Decision, Denied},
    edits::{Invalid, ResponseEdits},
    http::HttpAuthorizer,
    question::{Body, Question, Wire},
};
use crate::{
    contract::{BodyStart, HttpFilter, LocalReply, ResponseHead, Resume, Slot, Verdict},
    on_route::{RouteConfig, Scope},
    services::{GrpcCall, GrpcService, Services},
};

const NAME: &str = "envoy.filters.http.ext_authz";
const FAILURE_ALLOWED: HeaderName = HeaderName::from_static("x-envoy-auth-failure-mode-allowed");

/// What is said of denied requests, in Envoy's words.
pub const DENIED: &str = "ext_authz_denied";
/// What is said of those about which there is no answer.
pub const ERROR: &str = "ext_authz_error";
/// What is said of those whose answer cannot be carried out.
pub const INVALID: &str = "ext_authz_invalid";

/// The filter.
#[derive(Debug)]
pub struct ExtAuthz {
    /// Its settings.
    pub settings: Arc<Settings>,
}

/// Settings of the filter.
#[derive(Debug)]
pub struct Settings {
    /// Who is asked.
    pub authorizer: Authorizer,
    /// Requests pass when there is no answer.
    pub allow_on_failure: bool,
    /// Such requests are marked.
    pub tell_failure: bool,
    /// What requests are answered with when there is no answer.
    pub status_on_error: StatusCode,
    /// How much of the body is told.
    pub body: Option<BodyTold>,
    /// An answer that edits the request has its route chosen again.
    pub reroutes: bool,
    /// The share of requests that are asked about.
    pub enabled: Fraction,
    /// Only those are asked about of which something was noted.
    pub enabled_by: Option<MetadataMatcher>,
    /// Requests that are not asked about are denied.
    pub deny_others: bool,
    /// What is told of requests.
    pub told: question::Told,
    /// Whether what the authorizer notes of a request is kept.
    pub notes: bool,
    /// Most bytes of the body of a denial.
    pub max_denial: Option<usize>,
}

/// Who is asked.
#[derive(Clone, Debug)]
pub enum Authorizer {
    /// A gRPC service.
    Grpc(Arc<GrpcService>, Wire),
    /// An HTTP service.
    Http(Arc<HttpAuthorizer>),
}

/// How much of the body is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyTold {
    /// Most bytes.
    pub limit: usize,
    /// Of a longer one its beginning is told; else it is answered with 413.
    pub partial: bool,
    /// It is told as bytes, not as text.
    pub as_bytes: bool,
}

/// What a route says of the filter.
#[derive(Clone, Debug, Default)]
pub struct OnItsRoute {
    /// Nobody is asked.
    pub disabled: bool,
    /// What the authorizer is told besides; those of all levels, where the more specific one wins.
    pub context: Vec<(Box<str>, Box<str>)>,
    /// Another word about the body.
    pub body: Option<BodyHere>,
    /// Another authorizer.
    pub authorizer: Option<Authorizer>,
}

/// What a route says of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyHere {
    /// Nothing of it is told.
    Untold,
    /// This much.
    Told(BodyTold),
}

/// An authorizer's answer, or why there is none.
type Said = Pin<Box<dyn Future<Output = Result<Answer, String>> + Send>>;

/// Edits of the answer, once they are known.
type Kept = Arc<Mutex<ResponseEdits>>;

/// What is kept for a request.
struct State {
    wants: Option<BodyTold>,
    edits: Kept,
}

// === impl ExtAuthz ===

impl HttpFilter for ExtAuthz {
    fn name(&self) -> &str {
        NAME
    }

    fn decode_head(&self, slot: &mut Slot, exchange: &mut Exchange, scope: &Scope<'_>) -> Verdict {
        let settings = &self.settings;
        let here = most_specific(scope);
        // Without a route the request is answered with 404 anyway.
        if scope.route.found.is_none() || here.is_some_and(|here| here.disabled) {
            return Verdict::Continue;
        }
        let noted = settings.enabled_by.as_ref().is_none_or(|by| by.matches(&exchange.metadata));
        if !noted || !settings.enabled.contains(fastrand::u64(..)) {
            return match settings.deny_others {
                true => settings.failed(None),
                false => Verdict::Continue,
            };
        }
        let wants = match here.and_then(|here| here.body) {
            Some(BodyHere::Untold) => None,
            Some(BodyHere::Told(told)) => Some(told),
            None => settings.body,
        };
        // What is upgraded has no body, though its stream goes on.
        let upgrade = |head: &RequestHead| is_upgrade(&head.headers);
        let wants = wants.filter(|_| !exchange.request.as_ref().is_some_and(upgrade));
        let edits = Kept::default();
        *slot = Slot::Other(Box::new(State {
            wants,
            edits: edits.clone(),
        }));
        match wants {
            Some(_) => Verdict::Continue,
            None => self.ask(exchange, scope, None, edits),
        }
    }

    fn body_start(&self, slot: &Slot) -> Option<BodyStart> {
        let BodyTold { limit, partial, .. } = state(slot)?.wants?;
        Some(BodyStart { limit, partial })
    }

    fn decode_body_start(
        &self,
        slot: &mut Slot,
        exchange: &mut Exchange,
        scope: &Scope<'_>,
        start: &Bytes,
        whole: bool,
    ) -> Verdict {
        let Some(State {
            wants: Some(wants),
            edits,
        }) = state(slot)
        else {
            return Verdict::Continue;
        };
        let body = (!start.is_empty()).then(|| Body {
            bytes: start.slice(..start.len().min(wants.limit)),
            partial: !whole || start.len() > wants.limit,
            received: start.len(),
            as_bytes: wants.as_bytes,
        });
        self.ask(exchange, scope, body.as_ref(), edits.clone())
    }

    fn encode_head(&self, slot: &mut Slot, _exchange: &mut Exchange, head: &mut ResponseHead) {
        if let Some(state) = state(slot) {
            std::mem::take(&mut *state.edits.lock()).apply(&mut head.headers);
        }
    }
}

fn state(slot: &Slot) -> Option<&State> {
    match slot {
        Slot::Other(state) => state.downcast_ref(),
        _ => None,
    }
}

fn most_specific<'a>(scope: &Scope<'a>) -> Option<&'a OnItsRoute> {
    words(scope).next()
}

fn words<'a>(scope: &Scope<'a>) -> impl Iterator<Item = &'a OnItsRoute> {
    scope.route.configs(scope.filter).filter_map(|config| match config {
        RouteConfig::ExtAuthz(here) => Some(&**here),
        _ => None,
    })
}

/// What the levels of the route add for the authorizer; the most specific word of a key wins.
fn context<'a>(scope: &Scope<'a>) -> Vec<(&'a str, &'a str)> {
    let mut context: Vec<(&str, &str)> = Vec::new();
    for (key, value) in words(scope).flat_map(|here| &here.context) {
        if !context.iter().any(|(other, _)| *other == &**key) {
            context.push((key, value));
        }
    }
    context
}

impl ExtAuthz {
    fn ask(&self, exchange: &Exchange, scope: &Scope<'_>, body: Option<&Body>, edits: Kept) -> Verdict {
        let settings = self.settings.clone();
        let authorizer = most_specific(scope).and_then(|here| here.authorizer.as_ref());
        let authorizer = authorizer.unwrap_or(&settings.authorizer);
        let context = context(scope);
        let question = Question::of_request(exchange, &settings.told, &context, body);
        let said = match authorizer {
            Authorizer::Grpc(service, wire) => ask_grpc(service, *wire, &question, scope.services),
            Authorizer::Http(authorizer) => authorizer.ask(&question, scope.services),
        };
        let asked = clock::now();
        Verdict::Stop(Box::pin(async move {
            let said = said.await;
            let took = clock::now().saturating_duration_since(asked);
            let resume: Resume = Box::new(move |exchange| settings.decide(said, took, exchange, &edits));
            resume
        }))
    }
}

/// Asks in the messages of a gRPC service.
fn ask_grpc(service: &Arc<GrpcService>, wire: Wire, question: &Question<'_>, services: &dyn Services) -> Said {
    let answer = services.grpc(GrpcCall {
        service: service.clone(),
        method: wire.method,
        message: (wire.question)(question),
        metadata: Vec::new(),
    });
    Box::pin(async move {
        let bytes = answer.await.map_err(|error| error.to_string())?;
        (wire.answer)(&bytes)
    })
}

// === impl Settings ===

impl Settings {
    fn decide(&self, said: Result<Answer, String>, took: Duration, exchange: &mut Exchange, edits: &Kept) -> Verdict {
        let Answer { decision, mut notes } = match said {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(%error, authorizer = self.authorizer.cluster(), "an authorizer gave no answer");
                return self.failed_or_allowed(None, exchange);
            }
        };
        if !notes.is_empty() && self.notes {
            if matches!(decision, Decision::Allowed(_)) {
                let took = i64::try_from(took.as_millis()).unwrap_or(i64::MAX);
                notes.push(("ext_authz_duration".into(), Value::from(took)));
            }
            for (key, value) in notes {
                exchange.metadata.set(NAME.into(), key.into(), Arc::new(value));
            }
        }
        match decision {
            Decision::Allowed(allowed) => self.allowed(*allowed, exchange, edits),
            Decision::Denied(denied) => match self.denial(denied, DENIED) {
                Ok(reply) => Verdict::Reply(reply),
                Err(invalid) => self.invalid(&invalid),
            },
            Decision::Failed(denied) => self.failed_or_allowed(Some(denied), exchange),
        }
    }

    fn allowed(&self, allowed: Allowed, exchange: &mut Exchange, kept: &Kept) -> Verdict {
        let Some(head) = &mut exchange.request else {
            return Verdict::Continue;
        };
        let edited = ResponseEdits::of(&allowed).and_then(|edits| allowed.apply(head).map(|edited| (edits, edited)));
        match edited {
            Ok((edits, edited)) => {
                *kept.lock() = edits;
                exchange.reroute |= edited && self.reroutes;
                Verdict::Continue
            }
            Err(invalid) => self.invalid(&invalid),
        }
    }

    fn denial(&self, denied: Denied, details: &'static str) -> Result<LocalReply, Invalid> {
        let Denied { status, headers, body } = denied;
        let body = match self.max_denial {
            Some(most) => body.slice(..body.len().min(most)),
            None => body,
        };
        let mut reply = LocalReply::new(status, ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE, details, body);
        reply.headers = edits::fields(headers)?;
        Ok(reply)
    }

    /// There is no answer: what the setting says.
    fn failed_or_allowed(&self, denied: Option<Denied>, exchange: &mut Exchange) -> Verdict {
        if !self.allow_on_failure {
            return self.failed(denied);
        }
        if let Some(head) = exchange.request.as_mut().filter(|_| self.tell_failure) {
            head.headers.insert(FAILURE_ALLOWED, HeaderValue::from_static("true"));
        }
        Verdict::Continue
    }

    fn failed(&self, denied: Option<Denied>) -> Verdict {
        let plain = || {
            let flags = ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE;
            LocalReply::new(self.status_on_error, flags, ERROR, Bytes::new())
        };
        let reply = denied.map(|denied| self.denial(denied, ERROR));
        Verdict::Reply(match reply {
            None | Some(Err(_)) => plain(),
            Some(Ok(reply)) => reply,
        })
    }

    fn invalid(&self, invalid: &Invalid) -> Verdict {
        tracing::warn!(%invalid, authorizer = self.authorizer.cluster(), "an authorizer's answer cannot be carried out; the request is refused");
        let flags = ResponseFlags::UNAUTHORIZED_EXTERNAL_SERVICE;
        Verdict::Reply(LocalReply::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            flags,
            INVALID,
            Bytes::new(),
        ))
    }
}

// === impl Authorizer ===

impl Authorizer {
    /// The cluster behind which it is.
    pub fn cluster(&self) -> &str {
        match self {
            Authorizer::Grpc(service, _) => &service.cluster,
            Authorizer::Http(authorizer) => &authorizer.cluster,
        }
    }
}

/// Whether any of these matches the name of a header.
fn any(matchers: &[StringMatcher], name: &str) -> bool {
    matchers.iter().any(|matcher| matcher.matches(name.as_bytes()))
}
