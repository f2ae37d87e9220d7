//! What keeps a cluster from being overrun, and from serving badly: circuit breakers and outlier detection (contract xds §5.2, §5.3).

use std::time::Duration;

use cairn_policy::{
    outlier::{FailurePercentage, OutlierSettings, Rule, SuccessRate},
    retry::RetryBudget,
};
use cairn_proto::envoy::config::{
    cluster::v3::{
        CircuitBreakers, OutlierDetection,
        circuit_breakers::{Thresholds as EnvoyThresholds, thresholds::RetryBudget as EnvoyBudget},
    },
    core::v3::RoutingPriority,
};

use super::{
    report::{Malformed, Notes, ignore_set, unneeded},
    value::duration,
};
use crate::upstream::{Breakers, Thresholds};

/// Share of requests that may be retries, where a budget says nothing.
const BUDGET_PERCENT: f64 = 20.0;
/// Retries that a budget always allows, where it says nothing.
const BUDGET_LEAST: u32 = 3;

/// Circuit breakers.
pub(crate) fn breakers(breakers: Option<CircuitBreakers>, notes: &mut Notes) -> Result<Breakers, Malformed> {
    let mut limits = Breakers::default();
    let Some(CircuitBreakers {
        thresholds: list,
        per_host_thresholds,
    }) = breakers
    else {
        return Ok(limits);
    };
    for (index, threshold) in list.into_iter().enumerate() {
        notes.at("thresholds", index, |notes| {
            let (priority, compiled) = thresholds(threshold, notes)?;
            match priority {
                RoutingPriority::Default => limits.default = compiled,
                RoutingPriority::High => limits.high = compiled,
            }
            Ok(())
        })?;
    }
    for (index, threshold) in per_host_thresholds.into_iter().enumerate() {
        notes.at("per_host_thresholds", index, |notes| {
            // Envoy takes nothing else of them, and rejects what would have no effect.
            let most = threshold.max_connections;
            let (priority, _) = thresholds(threshold, notes)?;
            if priority == RoutingPriority::Default {
                limits.connections_per_endpoint = most;
            }
            Ok(())
        })?;
    }
    Ok(limits)
}

fn thresholds(threshold: EnvoyThresholds, notes: &mut Notes) -> Result<(RoutingPriority, Thresholds), Malformed> {
    let EnvoyThresholds {
        priority,
        max_connections,
        max_pending_requests,
        max_requests,
        max_retries,
        retry_budget,
        track_remaining,
        max_connection_pools,
    } = threshold;
    // What is left is told on `/clusters` whether it is asked for or not.
    unneeded!(track_remaining);
    if max_connection_pools.is_some_and(|most| most != u32::MAX) {
        ignore_set!(notes, max_connection_pools);
    }
    let priority =
        RoutingPriority::try_from(priority).map_err(|_| notes.malformed("priority", format!("{priority} is no priority")))?;
    let defaults = Thresholds::default();
    let compiled = Thresholds {
        max_connections: max_connections.unwrap_or(defaults.max_connections),
        max_pending_requests: max_pending_requests.unwrap_or(defaults.max_pending_requests),
        max_requests: max_requests.unwrap_or(defaults.max_requests),
        max_retries: max_retries.unwrap_or(defaults.max_retries),
        retry_budget: match retry_budget {
            None => None,
            Some(EnvoyBudget {
                budget_percent,
                budget_interval,
                min_retry_concurrency,
            }) => {
                notes.within("retry_budget", |notes| ignore_set!(notes, budget_interval));
                Some(RetryBudget {
                    percent: budget_percent.map_or(BUDGET_PERCENT, |percent| percent.value.clamp(0.0, 100.0)),
                    least: min_retry_concurrency.unwrap_or(BUDGET_LEAST),
                })
            }
        },
    };
    Ok((priority, compiled))
}

/// Outlier detection.
pub(crate) fn outlier(detection: OutlierDetection, notes: &mut Notes) -> Result<OutlierSettings, Malformed> {
    let OutlierDetection {
        consecutive_5xx,
        interval,
        base_ejection_time,
        max_ejection_percent,
        enforcing_consecutive_5xx,
        enforcing_success_rate,
        success_rate_minimum_hosts,
        success_rate_request_volume,
        success_rate_stdev_factor,
        consecutive_gateway_failure,
        enforcing_consecutive_gateway_failure,
        split_external_local_origin_errors,
        consecutive_local_origin_failure,
        enforcing_consecutive_local_origin_failure,
        enforcing_local_origin_success_rate,
        failure_percentage_threshold,
        enforcing_failure_percentage,
        enforcing_failure_percentage_local_origin,
        failure_percentage_minimum_hosts,
        failure_percentage_request_volume,
        max_ejection_time,
        max_ejection_time_jitter,
        successful_active_health_check_uneject_host,
        monitors,
        always_eject_one_host,
        detect_degraded_hosts,
    } = detection;
    // There are no active health checks.
    unneeded!(successful_active_health_check_uneject_host);
    ignore_set!(notes, detect_degraded_hosts);
    if !monitors.is_empty() {
        notes.ignore("monitors", "are not supported");
    }
    let defaults = OutlierSettings::default();
    let time = |field, value: Option<prost_types::Duration>, default: Duration, notes: &Notes| {
        value.map_or(Ok(default), |value| duration(field, value, notes))
    };
    let percent = |field, value: Option<u32>, default: u32, notes: &Notes| match value {
        Some(percent) if percent > 100 => Err(notes.malformed(field, format!("{percent} is more than 100"))),
        percent => Ok(percent.unwrap_or(default)),
    };
    let rule = |consecutive: Option<u32>, field, enforcing, default: Rule, notes: &Notes| {
        Ok::<_, Malformed>(Rule {
            consecutive: consecutive.unwrap_or(default.consecutive),
            enforcing: percent(field, enforcing, default.enforcing, notes)?,
        })
    };
    let hosts = |value: Option<u32>, default: usize| value.map_or(default, |hosts| hosts as usize);
    let base_time = time("base_ejection_time", base_ejection_time, defaults.base_time, notes)?;
    let interval = time("interval", interval, defaults.interval, notes)?;
    if interval.is_zero() {
        return Err(notes.malformed("interval", "is zero"));
    }
    if base_time.is_zero() {
        return Err(notes.malformed("base_ejection_time", "is zero"));
    }
    Ok(OutlierSettings {
        interval,
        base_time,
        max_time: time(
            "max_ejection_time",
            max_ejection_time,
            defaults.max_time.max(base_time),
            notes,
        )?,
        max_jitter: time(
            "max_ejection_time_jitter",
            max_ejection_time_jitter,
            defaults.max_jitter,
            notes,
        )?,
        max_percent: percent("max_ejection_percent", max_ejection_percent, defaults.max_percent, notes)?,
        always_one: always_eject_one_host.unwrap_or(false),
        split: split_external_local_origin_errors,
        server_errors: rule(
            consecutive_5xx,
            "enforcing_consecutive_5xx",
            enforcing_consecutive_5xx,
            defaults.server_errors,
            notes,
        )?,
        gateway_errors: rule(
            consecutive_gateway_failure,
            "enforcing_consecutive_gateway_failure",
            enforcing_consecutive_gateway_failure,
            defaults.gateway_errors,
            notes,
        )?,
        local_failures: rule(
            consecutive_local_origin_failure,
            "enforcing_consecutive_local_origin_failure",
            enforcing_consecutive_local_origin_failure,
            defaults.local_failures,
            notes,
        )?,
        success_rate: SuccessRate {
            minimum_hosts: hosts(success_rate_minimum_hosts, defaults.success_rate.minimum_hosts),
            volume: success_rate_request_volume.unwrap_or(defaults.success_rate.volume),
            deviations: success_rate_stdev_factor.map_or(defaults.success_rate.deviations, |factor| f64::from(factor) / 1000.0),
            enforcing: percent(
                "enforcing_success_rate",
                enforcing_success_rate,
                defaults.success_rate.enforcing,
                notes,
            )?,
            enforcing_local: percent(
                "enforcing_local_origin_success_rate",
                enforcing_local_origin_success_rate,
                defaults.success_rate.enforcing_local,
                notes,
            )?,
        },
        failure_percentage: FailurePercentage {
            minimum_hosts: hosts(failure_percentage_minimum_hosts, defaults.failure_percentage.minimum_hosts),
            volume: failure_percentage_request_volume.unwrap_or(defaults.failure_percentage.volume),
            threshold: percent(
                "failure_percentage_threshold",
                failure_percentage_threshold,
                defaults.failure_percentage.threshold,
                notes,
            )?,
            enforcing: percent(
                "enforcing_failure_percentage",
                enforcing_failure_percentage,
                defaults.failure_percentage.enforcing,
                notes,
            )?,
            enforcing_local: percent(
                "enforcing_failure_percentage_local_origin",
                enforcing_failure_percentage_local_origin,
                defaults.failure_percentage.enforcing_local,
                notes,
            )?,
        },
    })
}

#[cfg(test)]
mod tests;
