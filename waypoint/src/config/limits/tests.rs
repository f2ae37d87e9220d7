//! Limits as istiod and others send them.

use std::time::Duration;

use cairn_policy::retry::RetryBudget;
use cairn_proto::envoy::{
    config::cluster::v3::{
        CircuitBreakers, OutlierDetection,
        circuit_breakers::{Thresholds as EnvoyThresholds, thresholds::RetryBudget as EnvoyBudget},
    },
    r#type::v3::Percent,
};

use super::*;
use crate::upstream::Level;

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[test]
fn limits_are_read_by_priority() {
    let list = CircuitBreakers {
        thresholds: vec![
            EnvoyThresholds {
                max_connections: Some(7),
                retry_budget: Some(EnvoyBudget {
                    budget_percent: Some(Percent { value: 25.0 }),
                    budget_interval: None,
                    min_retry_concurrency: None,
                }),
                ..Default::default()
            },
            EnvoyThresholds {
                priority: 1,
                max_requests: Some(3),
                ..Default::default()
            },
        ],
        per_host_thresholds: vec![EnvoyThresholds {
            max_connections: Some(2),
            ..Default::default()
        }],
    };
    let mut notes = Notes::of("web");
    let breakers = breakers(Some(list), &mut notes).unwrap();
    assert_eq!(
        (
            breakers.default.max_connections,
            breakers.default.max_requests,
            breakers.default.retry_budget
        ),
        (7, 1024, Some(RetryBudget { percent: 25.0, least: 3 }))
    );
    assert_eq!(
        (breakers.of(Level::High).max_requests, breakers.high.max_connections),
        (3, 1024)
    );
    assert_eq!(breakers.connections_per_endpoint, Some(2));
    assert!(notes.into_list().is_empty());
    let wrong = CircuitBreakers {
        thresholds: vec![EnvoyThresholds {
            priority: 9,
            ..Default::default()
        }],
        ..Default::default()
    };
    let error = super::breakers(Some(wrong), &mut Notes::of("web")).unwrap_err();
    assert!(error.to_string().contains("thresholds[0].priority"), "{error}");
}

#[test]
fn what_nobody_says_of_outliers_is_envoys_and_nonsense_is_malformed() {
    let compile = |detection| outlier(detection, &mut Notes::of("web"));
    assert_eq!(compile(OutlierDetection::default()).unwrap(), OutlierSettings::default());
    let long = compile(OutlierDetection {
        base_ejection_time: seconds(600),
        success_rate_stdev_factor: Some(500),
        ..Default::default()
    })
    .unwrap();
    assert_eq!(
        (long.base_time, long.max_time),
        (Duration::from_secs(600), Duration::from_secs(600))
    );
    assert!((long.success_rate.deviations - 0.5).abs() < 1e-9);
    for (field, wrong) in [
        (
            "interval",
            OutlierDetection {
                interval: seconds(0),
                ..Default::default()
            },
        ),
        (
            "max_ejection_percent",
            OutlierDetection {
                max_ejection_percent: Some(101),
                ..Default::default()
            },
        ),
        (
            "max_ejection_time",
            OutlierDetection {
                max_ejection_time: seconds(-1),
                ..Default::default()
            },
        ),
    ] {
        let error = compile(wrong).unwrap_err();
        assert!(error.to_string().starts_with(field), "{error}");
    }
}
