use cairn_exchange::Scheme;
use http::{HeaderValue, Method, uri::PathAndQuery};

use super::{
    Backoff, Duration, HeaderMap, HeaderMatcher, HeaderName, Outcome, RateLimitedBackoff, Reason, RequestHead, RetryBudget,
    RetryOn, RetryPlan, RetryPolicy, StatusCode,
};
use crate::{
    matcher::{HeaderMatch, StringMatcher},
    retry::{Reset, ResetFormat, ResetHeader},
};

/// istiod's default (contract xds §4.6).
const DEFAULT: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";

fn head(fields: &[(&'static str, &'static str)]) -> RequestHead {
    let fields = fields
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
    RequestHead {
        method: Method::GET,
        path: PathAndQuery::from_static("/"),
        authority: HeaderValue::from_static("web"),
        scheme: Scheme::Http,
        headers: fields.collect(),
    }
}

fn policy(on: &str) -> RetryPolicy {
    RetryPolicy {
        on: RetryOn::parse(on).0,
        retries: 2,
        ..RetryPolicy::default()
    }
}

fn reset(refused: bool, request_started: bool) -> Outcome<'static> {
    Outcome::Reset(Reset {
        refused,
        request_started,
    })
}

fn wants(policy: &RetryPolicy, outcome: &Outcome<'_>) -> Option<Reason> {
    policy.for_request(&mut head(&[])).wants(policy, outcome)
}

#[test]
fn attempts_without_an_answer_are_tried_again_when_a_word_covers_them() {
    use Reason::{ConnectFailure, PerTryTimeout, RefusedStream, Reset};
    for (on, connect, refused, unsent, cut, per_try) in [
        (DEFAULT, Some(ConnectFailure), Some(RefusedStream), None, None, None),
        ("connect-failure", Some(ConnectFailure), None, None, None, None),
        ("refused-stream", None, Some(RefusedStream), None, None, None),
        (
            "reset",
            Some(ConnectFailure),
            Some(Reset),
            Some(Reset),
            Some(Reset),
            Some(PerTryTimeout),
        ),
        ("reset-before-request", Some(ConnectFailure), None, Some(Reset), None, None),
        (
            "5xx",
            Some(ConnectFailure),
            Some(Reset),
            Some(Reset),
            Some(Reset),
            Some(PerTryTimeout),
        ),
        (
            "gateway-error",
            Some(ConnectFailure),
            Some(Reset),
            Some(Reset),
            Some(Reset),
            Some(PerTryTimeout),
        ),
        ("retriable-4xx,unavailable,retriable-headers", None, None, None, None, None),
        ("", None, None, None, None, None),
    ] {
        let policy = policy(on);
        assert_eq!(wants(&policy, &Outcome::ConnectFailure), connect, "{on}: connect failure");
        assert_eq!(wants(&policy, &reset(true, true)), refused, "{on}: refused stream");
        assert_eq!(wants(&policy, &reset(false, false)), unsent, "{on}: reset before the request");
        assert_eq!(wants(&policy, &reset(false, true)), cut, "{on}: reset");
        assert_eq!(wants(&policy, &Outcome::PerTryTimeout), per_try, "{on}: per-try timeout");
        assert_eq!(wants(&policy, &Outcome::Overflow), None, "{on}: overflow");
    }
}

#[test]
fn answers_are_tried_again_by_status_header_or_grpc_status() {
    let none = HeaderMap::new();
    let retry_me = head(&[("x-retry", "yes")]).headers;
    let limited = head(&[("x-envoy-ratelimited", "true")]).headers;
    let listed = HeaderMatcher {
        name: crate::matcher::HeaderName::parse("x-retry").unwrap(),
        how: HeaderMatch::String(StringMatcher::exact("yes")),
        invert: false,
        treat_missing_as_empty: false,
    };
    for (on, status, headers, grpc, retried) in [
        ("5xx", 500, &none, None, true),
        ("5xx", 499, &none, None, false),
        ("gateway-error", 502, &none, None, true),
        ("gateway-error", 504, &none, None, true),
        ("gateway-error", 500, &none, None, false),
        ("gateway-error", 505, &none, None, false),
        ("retriable-4xx", 409, &none, None, true),
        ("retriable-4xx", 404, &none, None, false),
        ("retriable-status-codes", 429, &none, None, true),
        ("retriable-status-codes", 503, &none, None, false),
        ("connect-failure", 429, &none, None, false),
        ("retriable-headers", 200, &retry_me, None, true),
        ("retriable-headers", 200, &none, None, false),
        ("5xx,reset", 503, &limited, None, false),
        ("envoy-ratelimited", 429, &limited, None, true),
        ("cancelled", 200, &none, Some(1), true),
        ("deadline-exceeded", 200, &none, Some(4), true),
        ("resource-exhausted", 200, &none, Some(8), true),
        ("internal", 200, &none, Some(13), true),
        ("unavailable", 200, &none, Some(14), true),
        ("unavailable", 200, &none, Some(13), false),
        ("unavailable", 200, &none, Some(0), false),
        ("unavailable", 503, &none, None, false),
        (DEFAULT, 503, &none, None, false),
    ] {
        let policy = RetryPolicy {
            status_codes: vec![StatusCode::TOO_MANY_REQUESTS],
            response_headers: vec![listed.clone()],
            ..policy(on)
        };
        let status = StatusCode::from_u16(status).unwrap();
        let outcome = Outcome::Response {
            status,
            headers,
            grpc_status: grpc,
        };
        assert_eq!(
            wants(&policy, &outcome).is_some(),
            retried,
            "{on}: {status} {headers:?} {grpc:?}"
        );
    }
}

#[test]
fn retries_end_when_none_is_left_and_it_can_be_told() {
    let policy = policy("reset");
    let mut plan = policy.for_request(&mut head(&[]));
    for left in [1, 0] {
        assert_eq!(plan.decide(&policy, &reset(false, true)), Some(Reason::Reset));
        assert_eq!(plan.left, left);
    }
    assert!(!plan.may_retry());
    assert_eq!(plan.decide(&policy, &reset(false, true)), None);
    assert_eq!(plan.wants(&policy, &reset(false, true)), Some(Reason::Reset));
    assert_eq!(plan.made, 2);
}

#[test]
fn a_request_may_ask_for_retries_and_its_asking_goes_no_further() {
    let policy = policy("connect-failure");
    let mut asking = head(&[
        ("x-envoy-retry-on", "retriable-status-codes,retriable-headers"),
        ("x-envoy-retry-grpc-on", "internal"),
        ("x-envoy-max-retries", "7"),
        ("x-envoy-retriable-status-codes", "418, x,425"),
        ("x-envoy-retriable-header-names", "x-again, x-more"),
    ]);
    let plan = policy.for_request(&mut asking);
    assert!(asking.headers.is_empty());
    assert_eq!(plan.left, 7);
    assert!(
        plan.on
            .contains(RetryOn::INTERNAL | RetryOn::CONNECT_FAILURE | RetryOn::STATUS_CODES)
    );
    let again = head(&[("x-more", "1")]).headers;
    for (status, headers, retried) in [
        (StatusCode::IM_A_TEAPOT, &HeaderMap::new(), true),
        (StatusCode::OK, &again, true),
        (StatusCode::OK, &HeaderMap::new(), false),
    ] {
        assert_eq!(
            plan.wants(
                &policy,
                &Outcome::Response {
                    status,
                    headers,
                    grpc_status: None
                }
            )
            .is_some(),
            retried
        );
    }
}

#[test]
fn only_requests_with_a_listed_header_are_tried_again_when_some_are_listed() {
    let marked = HeaderMatcher {
        name: crate::matcher::HeaderName::parse("x-idempotent").unwrap(),
        how: HeaderMatch::Present(true),
        invert: false,
        treat_missing_as_empty: false,
    };
    let policy = RetryPolicy {
        request_headers: vec![marked],
        ..policy("reset")
    };
    assert!(!policy.for_request(&mut head(&[])).may_retry());
    assert!(policy.for_request(&mut head(&[("x-idempotent", "1")])).may_retry());
}

#[test]
fn the_wait_follows_the_answer_when_it_says_something_and_else_doubles() {
    let retry_after = ResetHeader {
        name: HeaderName::from_static("retry-after"),
        format: ResetFormat::Seconds,
    };
    let policy = RetryPolicy {
        backoff: Backoff::new(Some(Duration::from_millis(100)), None),
        rate_limited_backoff: Some(RateLimitedBackoff::new(vec![retry_after], None)),
        ..policy("5xx")
    };
    let now = std::time::SystemTime::UNIX_EPOCH;
    let plan = |made| RetryPlan {
        made,
        ..RetryPlan::default()
    };
    let answer = head(&[("retry-after", "2")]).headers;
    for (made, answer, wait) in [
        (1, None, 99),
        (2, None, 199),
        (1, Some(&HeaderMap::new()), 99),
        (1, Some(&answer), 2599),
    ] {
        assert_eq!(plan(made).wait(&policy, answer, now, 2_599), Duration::from_millis(wait));
    }
}

#[test]
fn a_budget_grows_with_the_requests_but_has_a_floor() {
    let budget = RetryBudget::default();
    for (requests, most) in [(0, 3), (10, 3), (15, 3), (20, 4), (1000, 200)] {
        assert_eq!(budget.most(requests), most);
    }
    assert_eq!(
        RetryBudget {
            percent: 1000.0,
            least: 0
        }
        .most(5),
        5
    );
}
