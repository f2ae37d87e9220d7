//! How an attempt failed: what the retry policy makes of it, and what the client is told.

use std::borrow::Cow;

use cairn_exchange::ResponseFlags;
use cairn_filters::{BodyRefusal, LocalReply};
use cairn_policy::{
    rbac::Denied,
    retry::{Outcome, Reset},
    route::Found,
};
use http::{HeaderName, HeaderValue, Response, StatusCode};

use super::attempts::Attempts;
use crate::{
    serve::{ResponseBody, open, reply, request::Journey, response::Tail},
    upstream::{AttemptError, ConnectError},
};

const OVERLOADED: HeaderName = HeaderName::from_static("x-envoy-overloaded");

/// Cut after something was sent.
const STARTED: Outcome<'static> = Outcome::Reset(Reset {
    refused: false,
    request_started: true,
});

/// How an attempt failed, for the retry policy and for the answer.
pub(super) struct Failure {
    pub(super) outcome: Outcome<'static>,
    flags: ResponseFlags,
    /// Envoy's name of the reason: `connection termination`.
    reason: &'static str,
    transport: Option<Cow<'static, str>>,
    /// Nothing was sent.
    pub(super) unsent: bool,
    /// Trying again would not help.
    pub(super) is_final: bool,
    reply: Option<LocalReply>,
}

pub(super) fn fail(
    mut journey: Journey<'_>,
    found: Found<'_>,
    failure: Failure,
    attempts: &Attempts<'_>,
) -> Response<ResponseBody> {
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

pub(super) fn nobody() -> Failure {
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

/// The host that the request names was not found.
pub(super) fn unresolved(details: String) -> Failure {
    let reply = LocalReply::new(
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::DNS_RESOLUTION_FAILED,
        details,
        "DNS resolution failure",
    );
    Failure {
        reply: Some(reply),
        ..nobody()
    }
}

/// Policy denies the request, which it has let pass before.
pub(super) fn denied() -> Failure {
    let reply = LocalReply::new(StatusCode::FORBIDDEN, ResponseFlags::NONE, open::DENIED, Denied::ANSWER);
    Failure {
        reply: Some(reply),
        ..nobody()
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

pub(super) fn failure_of(error: AttemptError, tail: &Tail) -> Failure {
    let failure = |outcome, flags, reason, transport, unsent| Failure {
        outcome,
        flags,
        reason,
        transport,
        unsent,
        is_final: false,
        reply: None,
    };
    // However the endpoint's connection has taken it.
    if let Some(BodyRefusal { details, body }) = tail.source.as_ref().and_then(|source| source.lock().refused) {
        let mut reply = LocalReply::new(StatusCode::BAD_REQUEST, ResponseFlags::NONE, details, body);
        reply.as_it_is = true;
        return Failure {
            reply: Some(reply),
            ..nobody()
        };
    }
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
