//! What a route says about retries, and the decision after each attempt.

use std::time::Duration;

use cairn_exchange::RequestHead;
use http::{HeaderMap, HeaderName, StatusCode};
use smallvec::SmallVec;

use super::{Backoff, Outcome, RateLimitedBackoff, Reason, RetryOn};
use crate::matcher::HeaderMatcher;

/// Retries where configuration gives a policy without a number.
pub const DEFAULT_RETRIES: u32 = 1;
/// How often an endpoint is chosen anew because a predicate refuses it, where configuration says nothing.
pub const DEFAULT_HOST_ATTEMPTS: u32 = 1;

const RATE_LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");
const ASK_ON: HeaderName = HeaderName::from_static("x-envoy-retry-on");
const ASK_GRPC_ON: HeaderName = HeaderName::from_static("x-envoy-retry-grpc-on");
const ASK_RETRIES: HeaderName = HeaderName::from_static("x-envoy-max-retries");
const ASK_CODES: HeaderName = HeaderName::from_static("x-envoy-retriable-status-codes");
const ASK_HEADERS: HeaderName = HeaderName::from_static("x-envoy-retriable-header-names");

/// What a route says about retries.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    /// When.
    pub on: RetryOn,
    /// How often.
    pub retries: u32,
    /// For [`RetryOn::STATUS_CODES`].
    pub status_codes: Vec<StatusCode>,
    /// For [`RetryOn::HEADERS`]: headers of the answer.
    pub response_headers: Vec<HeaderMatcher>,
    /// When not empty, only requests with one of these headers are tried again.
    pub request_headers: Vec<HeaderMatcher>,
    /// How long one attempt may take up to the answer's head.
    pub per_try_timeout: Option<Duration>,
    /// How long one attempt may go without a byte.
    pub per_try_idle_timeout: Option<Duration>,
    /// How long to wait before a retry.
    pub backoff: Backoff,
    /// How long to wait when the answer says so.
    pub rate_limited_backoff: Option<RateLimitedBackoff>,
    /// Endpoints that were tried are avoided.
    pub avoid_previous_hosts: bool,
    /// How often an endpoint is chosen anew when the chosen one is to be avoided; then it is taken all the same.
    pub host_attempts: u32,
    /// Priorities that were tried are avoided.
    pub avoid_previous_priorities: Option<PreviousPriorities>,
}

/// Avoid the priorities of earlier attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreviousPriorities {
    /// After every so many attempts the tried priorities are counted anew.
    pub update_frequency: u32,
}

/// A limit on concurrent retries of a cluster, relative to its requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    /// Percent of active and pending requests.
    pub percent: f64,
    /// So many are always allowed.
    pub least: u32,
}

/// The retries of one request.
#[derive(Clone, Debug, Default)]
pub struct RetryPlan {
    /// When, with what the request asked for.
    pub on: RetryOn,
    /// How many are left.
    pub left: u32,
    /// How many were made.
    pub made: u32,
    status_codes: SmallVec<[StatusCode; 4]>,
    asked_headers: Vec<HeaderName>,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            on: RetryOn::NONE,
            retries: DEFAULT_RETRIES,
            status_codes: Vec::new(),
            response_headers: Vec::new(),
            request_headers: Vec::new(),
            per_try_timeout: None,
            per_try_idle_timeout: None,
            backoff: Backoff::default(),
            rate_limited_backoff: None,
            avoid_previous_hosts: false,
            host_attempts: DEFAULT_HOST_ATTEMPTS,
            avoid_previous_priorities: None,
        }
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { percent: 20.0, least: 3 }
    }
}

// === impl RetryPolicy ===

impl RetryPolicy {
    /// The retries of a request: the policy's, and what the request's `x-envoy-…` headers (which only internal clients can have) ask
    /// for; those headers are taken out.
    pub fn for_request(&self, head: &mut RequestHead) -> RetryPlan {
        let mut plan = RetryPlan {
            on: self.on,
            left: self.retries,
            made: 0,
            status_codes: self.status_codes.iter().copied().collect(),
            asked_headers: Vec::new(),
        };
        plan.add_asked(&mut head.headers);
        let wanted = self.request_headers.is_empty() || self.request_headers.iter().any(|matcher| matcher.matches(head));
        if !wanted {
            plan.on = RetryOn::NONE;
        }
        if plan.on.is_none() {
            plan.left = 0;
        }
        plan
    }
}

// === impl RetryPlan ===

impl RetryPlan {
    /// Whether another attempt is worth keeping the request's body for.
    pub fn may_retry(&self) -> bool {
        self.left > 0
    }

    /// Whether the request is tried again after an attempt ended so. `Some` takes one retry off; the caller may still be kept from it
    /// by breakers. Where this is `None` and [`RetryPlan::wants`] is not, the retries are used up: flag `URX`.
    pub fn decide(&mut self, policy: &RetryPolicy, outcome: &Outcome<'_>) -> Option<Reason> {
        let reason = self.wants(policy, outcome)?;
        self.left = self.left.checked_sub(1)?;
        self.made += 1;
        Some(reason)
    }

    /// Why the request would be tried again, were there retries left.
    pub fn wants(&self, policy: &RetryPolicy, outcome: &Outcome<'_>) -> Option<Reason> {
        // No answer at all counts as a 5xx and as a gateway error.
        let no_answer = RetryOn::RESET | RetryOn::SERVER_ERROR | RetryOn::GATEWAY_ERROR;
        let when = |met: bool, reason: Reason| met.then_some(reason);
        match outcome {
            Outcome::Overflow => None,
            Outcome::ConnectFailure => {
                let on = no_answer | RetryOn::CONNECT_FAILURE | RetryOn::RESET_BEFORE_REQUEST;
                when(self.on.any_of(on), Reason::ConnectFailure)
            }
            Outcome::PerTryTimeout => when(self.on.any_of(no_answer), Reason::PerTryTimeout),
            Outcome::Reset(reset) => {
                let refused = reset.refused && self.on.any_of(RetryOn::REFUSED_STREAM);
                let before = !reset.request_started && self.on.any_of(RetryOn::RESET_BEFORE_REQUEST);
                when(refused, Reason::RefusedStream).or(when(before || self.on.any_of(no_answer), Reason::Reset))
            }
            Outcome::Response {
                status,
                headers,
                grpc_status,
            } => self.wants_after(policy, *status, headers, *grpc_status),
        }
    }

    fn wants_after(&self, policy: &RetryPolicy, status: StatusCode, headers: &HeaderMap, grpc: Option<u32>) -> Option<Reason> {
        if headers.contains_key(RATE_LIMITED) {
            return self.on.contains(RetryOn::RATE_LIMITED).then_some(Reason::RateLimited);
        }
        let by_status = (self.on.contains(RetryOn::SERVER_ERROR) && status.is_server_error())
            || (self.on.contains(RetryOn::GATEWAY_ERROR) && matches!(status.as_u16(), 502..=504))
            || (self.on.contains(RetryOn::RETRIABLE_4XX) && status == StatusCode::CONFLICT)
            || (self.on.contains(RetryOn::STATUS_CODES) && self.status_codes.contains(&status));
        if by_status {
            return Some(Reason::Status(status));
        }
        let by_header = self.on.contains(RetryOn::HEADERS)
            && (policy
                .response_headers
                .iter()
                .any(|matcher| matcher.matches_answer(status, headers))
                || self.asked_headers.iter().any(|name| headers.contains_key(name)));
        if by_header {
            return Some(Reason::Header);
        }
        let grpc = grpc?;
        self.on.any_of(RetryOn::of_grpc(grpc)).then_some(Reason::Grpc(grpc))
    }

    /// How long to wait before the retry that was just decided on; `answer` is the head that led to it, if one did.
    pub fn wait(&self, policy: &RetryPolicy, answer: Option<&HeaderMap>, now: std::time::SystemTime, random: u64) -> Duration {
        let asked = policy
            .rate_limited_backoff
            .as_ref()
            .zip(answer)
            .and_then(|(backoff, headers)| backoff.wait(headers, now, random));
        asked.unwrap_or_else(|| policy.backoff.wait(self.made.saturating_sub(1), random))
    }

    fn add_asked(&mut self, headers: &mut HeaderMap) {
        for name in [ASK_ON, ASK_GRPC_ON] {
            if let Some(list) = headers.remove(name) {
                self.on |= RetryOn::parse(list.to_str().unwrap_or_default()).0;
            }
        }
        if let Some(number) = headers
            .remove(ASK_RETRIES)
            .and_then(|number| number.to_str().ok()?.trim().parse().ok())
        {
            self.left = number;
        }
        if let Some(list) = headers.remove(ASK_CODES) {
            self.status_codes
                .extend(items(list.to_str().unwrap_or_default()).filter_map(|code| code.parse().ok()));
        }
        if let Some(list) = headers.remove(ASK_HEADERS) {
            self.asked_headers
                .extend(items(list.to_str().unwrap_or_default()).filter_map(|name| name.parse().ok()));
        }
    }
}

fn items(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|item| !item.is_empty())
}

// === impl RetryBudget ===

impl RetryBudget {
    /// How many retries may run while so many requests are active or waiting.
    pub fn most(&self, requests: u64) -> u64 {
        // The share of a request count is never negative and far below 2⁶⁴.
        let share = (requests as f64 * self.percent.clamp(0.0, 100.0) / 100.0) as u64;
        share.max(u64::from(self.least))
    }
}

#[cfg(test)]
mod tests;
