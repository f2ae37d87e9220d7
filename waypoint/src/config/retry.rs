//! Retry policies (contract xds §4.6).

use cairn_policy::retry::{Backoff, DEFAULT_HOST_ATTEMPTS, DEFAULT_RETRIES, PreviousPriorities, RetryOn, RetryPolicy};
use cairn_proto::envoy::{
    config::route::v3::{
        HeaderMatcher as EnvoyMatcher, RetryPolicy as EnvoyPolicy,
        retry_policy::{RetryBackOff, RetryHostPredicate, RetryPriority, retry_host_predicate, retry_priority},
    },
    extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig,
};
use http::StatusCode;

use super::{
    any::{Unknown, type_name, unpack},
    headers,
    report::{Malformed, Notes, ignore_set},
    value::{duration, limit},
};

/// Compiles a retry policy.
pub(crate) fn compile(policy: EnvoyPolicy, notes: &mut Notes) -> Result<RetryPolicy, Malformed> {
    let EnvoyPolicy {
        retry_on,
        num_retries,
        per_try_timeout,
        per_try_idle_timeout,
        retry_priority,
        retry_host_predicate,
        retry_options_predicates,
        host_selection_retry_max_attempts,
        retriable_status_codes,
        retry_back_off,
        rate_limited_retry_back_off,
        retriable_headers,
        retriable_request_headers,
        refresh_cluster_on_retry,
    } = policy;
    ignore_set!(
        notes,
        retry_options_predicates,
        rate_limited_retry_back_off,
        refresh_cluster_on_retry
    );
    let (on, unknown) = RetryOn::parse(&retry_on);
    if !unknown.is_empty() {
        notes.ignore("retry_on", format!("{} is not known", unknown.join(", ")));
    }
    let status_codes = retriable_status_codes.into_iter().map(|code| {
        let status = u16::try_from(code).ok().and_then(|code| StatusCode::from_u16(code).ok());
        status.ok_or_else(|| notes.malformed("retriable_status_codes", format!("{code} is no status")))
    });
    let status_codes = status_codes.collect::<Result<Vec<_>, _>>()?;
    let backoff = match retry_back_off {
        None => Backoff::default(),
        Some(backoff) => notes.within("retry_back_off", |notes| self::backoff(backoff, notes))?,
    };
    let mut avoid_previous_hosts = false;
    for RetryHostPredicate { name, config_type } in retry_host_predicate {
        match config_type {
            Some(retry_host_predicate::ConfigType::TypedConfig(any))
                if type_name(&any.type_url) == "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate" =>
            {
                avoid_previous_hosts = true;
            }
            None if name == "envoy.retry_host_predicates.previous_hosts" => avoid_previous_hosts = true,
            _ => notes.ignore("retry_host_predicate", format!("{name} is not known")),
        }
    }
    Ok(RetryPolicy {
        on,
        retries: num_retries.unwrap_or(DEFAULT_RETRIES),
        status_codes,
        response_headers: matchers("retriable_headers", retriable_headers, notes)?,
        request_headers: matchers("retriable_request_headers", retriable_request_headers, notes)?,
        per_try_timeout: limit("per_try_timeout", per_try_timeout, None, notes)?,
        per_try_idle_timeout: limit("per_try_idle_timeout", per_try_idle_timeout, None, notes)?,
        backoff,
        rate_limited_backoff: None,
        avoid_previous_hosts,
        host_attempts: match u32::try_from(host_selection_retry_max_attempts) {
            Ok(0) | Err(_) => DEFAULT_HOST_ATTEMPTS,
            Ok(attempts) => attempts,
        },
        avoid_previous_priorities: priorities(retry_priority, notes)?,
    })
}

fn matchers(
    field: &'static str,
    list: Vec<EnvoyMatcher>,
    notes: &mut Notes,
) -> Result<Vec<cairn_policy::matcher::HeaderMatcher>, Malformed> {
    notes.within(field, |notes| {
        list.into_iter().map(|matcher| headers::matcher(matcher, notes)).collect()
    })
}

fn backoff(backoff: RetryBackOff, notes: &Notes) -> Result<Backoff, Malformed> {
    let RetryBackOff {
        base_interval,
        max_interval,
    } = backoff;
    let base = base_interval.map(|base| duration("base_interval", base, notes)).transpose()?;
    let most = max_interval.map(|most| duration("max_interval", most, notes)).transpose()?;
    if base.is_some_and(|base| base.is_zero() || most.is_some_and(|most| most < base)) {
        return Err(notes.malformed("", "the first interval has to be above zero and not above the last"));
    }
    Ok(Backoff::new(base, most))
}

fn priorities(priority: Option<RetryPriority>, notes: &mut Notes) -> Result<Option<PreviousPriorities>, Malformed> {
    let Some(RetryPriority { name, config_type }) = priority else {
        return Ok(None);
    };
    match config_type {
        Some(retry_priority::ConfigType::TypedConfig(any))
            if type_name(&any.type_url) == "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig" =>
        {
            let PreviousPrioritiesConfig { update_frequency } =
                notes.within("retry_priority", |notes| unpack(&any, Unknown::Ignored, notes))?;
            if update_frequency <= 0 {
                return Err(notes.malformed("retry_priority.update_frequency", "has to be above zero"));
            }
            Ok(Some(PreviousPriorities {
                update_frequency: update_frequency.unsigned_abs(),
            }))
        }
        _ => {
            notes.ignore("retry_priority", format!("{name} is not known"));
            Ok(None)
        }
    }
}
