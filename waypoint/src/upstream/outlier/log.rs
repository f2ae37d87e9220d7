//! Lines of the log of ejections (`--outlierLogPath`): Envoy's `OutlierDetectionEvent` as JSON, one a line.

use std::time::Duration;

use cairn_exchange::clock::{self, Instant};
use cairn_policy::outlier::{EjectionKind, Rate, Verdict};
use serde::Serialize;
use time::{OffsetDateTime, macros::format_description};

use crate::upstream::Endpoint;

/// An event; fields in the order in which Envoy writes them.
#[derive(Serialize)]
struct Event<'e> {
    #[serde(rename = "type")]
    kind: &'static str,
    timestamp: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    secs_since_last_action: Option<String>,
    cluster_name: &'e str,
    upstream_url: &'e str,
    action: &'static str,
    num_ejections: u32,
    enforced: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    eject_success_rate_event: Option<Outlier>,
    #[serde(skip_serializing_if = "Option::is_none")]
    eject_consecutive_event: Option<Nothing>,
    #[serde(skip_serializing_if = "Option::is_none")]
    eject_failure_percentage_event: Option<TooOften>,
}

#[derive(Serialize)]
struct Outlier {
    host_success_rate: u32,
    cluster_average_success_rate: u32,
    cluster_success_rate_ejection_threshold: u32,
}

#[derive(Serialize)]
struct TooOften {
    host_success_rate: u32,
}

#[derive(Serialize)]
struct Nothing {}

/// An endpoint was taken out, or would have been.
pub fn ejection(
    cluster: &str,
    endpoint: &Endpoint,
    kind: EjectionKind,
    enforced: bool,
    rate: Option<Rate>,
    verdict: Option<Verdict>,
    now: Instant,
) -> Vec<u8> {
    let history = endpoint.state.monitor.history();
    // Percents, none of them below zero in a protocol buffer's unsigned field.
    let whole = |percent: f64| percent.max(0.0) as u32;
    let host_success_rate = rate.map_or(0, |rate| whole(rate.success));
    let mut event = Event {
        kind: kind.name(),
        action: "EJECT",
        enforced,
        ..event(cluster, endpoint, history.ejections, since(history.returned, now))
    };
    match (kind, verdict) {
        (EjectionKind::SuccessRate | EjectionKind::SuccessRateLocalOrigin, Some(verdict)) => {
            event.eject_success_rate_event = Some(Outlier {
                host_success_rate,
                cluster_average_success_rate: whole(verdict.average),
                cluster_success_rate_ejection_threshold: whole(verdict.threshold),
            });
        }
        (EjectionKind::FailurePercentage | EjectionKind::FailurePercentageLocalOrigin, _) => {
            event.eject_failure_percentage_event = Some(TooOften { host_success_rate });
        }
        _ => event.eject_consecutive_event = Some(Nothing {}),
    }
    line(&event)
}

/// An endpoint was taken back.
pub fn return_(cluster: &str, endpoint: &Endpoint, now: Instant) -> Vec<u8> {
    let history = endpoint.state.monitor.history();
    line(&event(cluster, endpoint, history.ejections, since(history.ejected, now)))
}

fn event<'e>(cluster: &'e str, endpoint: &'e Endpoint, num_ejections: u32, since: Option<Duration>) -> Event<'e> {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    Event {
        kind: EjectionKind::Consecutive5xx.name(),
        timestamp: OffsetDateTime::from(clock::wall()).format(&format).unwrap_or_default(),
        secs_since_last_action: since.map(|since| since.as_secs().to_string()),
        cluster_name: cluster,
        upstream_url: &endpoint.display,
        action: "UNEJECT",
        num_ejections,
        enforced: false,
        eject_success_rate_event: None,
        eject_consecutive_event: None,
        eject_failure_percentage_event: None,
    }
}

fn since(moment: Option<Instant>, now: Instant) -> Option<Duration> {
    moment.map(|moment| now.saturating_duration_since(moment))
}

fn line(event: &Event<'_>) -> Vec<u8> {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    line
}
