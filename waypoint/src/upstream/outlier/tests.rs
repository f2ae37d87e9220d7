//! Ejections under a clock that stands still.

use std::{sync::Arc, time::Duration};

use cairn_identity::{Identity, generate::Authority};
use cairn_policy::outlier::{OutlierSettings, Report, Rule};
use tokio::time::sleep;

use crate::{
    engine::{Engine, Parts},
    proxy::DataSettings,
    snapshot::{Snapshot, Table},
    upstream::{Avoid, Cluster, ClusterSettings, Endpoint, Health, Picking, fixtures},
};

struct Bench {
    engine: Engine,
    cluster: Arc<Cluster>,
    endpoints: Vec<Arc<Endpoint>>,
}

fn settings() -> OutlierSettings {
    OutlierSettings {
        interval: Duration::from_secs(5),
        base_time: Duration::from_secs(15),
        max_percent: 100,
        server_errors: Rule {
            consecutive: 3,
            enforcing: 100,
        },
        gateway_errors: Rule {
            consecutive: 2,
            enforcing: 100,
        },
        ..OutlierSettings::default()
    }
}

impl Bench {
    fn new(count: usize, outlier: OutlierSettings, log: Option<std::path::PathBuf>) -> Self {
        let id = "spiffe://cluster.local/ns/app/sa/waypoint".parse().unwrap();
        let engine = Engine::new(Parts {
            identity: Identity::fixed(Authority::new("test").unwrap().issue(&id).unwrap()),
            network: String::new(),
            version: "test".into(),
            settings: DataSettings {
                outlier_log: log,
                ..DataSettings::default()
            },
            observer: None,
        });
        let cluster = fixtures::equal(
            count,
            ClusterSettings {
                panic_threshold: 0.0,
                outlier: Some(outlier),
                ..ClusterSettings::default()
            },
        );
        let mut clusters = Table::default();
        clusters.insert(cluster.name().clone(), cluster.clone());
        let mut snapshot = Snapshot::empty(engine.workloads.clone());
        snapshot.clusters = clusters;
        engine.snapshot.store(Arc::new(snapshot));
        let endpoints = cluster.state.endpoints.load().iter().cloned().collect();
        Self {
            engine,
            cluster,
            endpoints,
        }
    }

    /// Tells of an endpoint, and lets the task look at it.
    async fn report(&self, at: usize, reports: &[Report]) {
        for report in reports {
            self.engine.proxy.outliers.report(&self.cluster, &self.endpoints[at], *report);
        }
        sleep(Duration::from_millis(1)).await;
    }

    fn out(&self) -> Vec<usize> {
        let out = |at: &usize| self.endpoints[*at].state.monitor.is_ejected();
        (0..self.endpoints.len()).filter(out).collect()
    }
}

const ERROR: Report = Report::Answered(500);
const GATEWAY: Report = Report::Answered(503);
const GOOD: Report = Report::Answered(200);

#[tokio::test(start_paused = true)]
async fn failures_in_a_row_eject_and_anything_else_begins_anew() {
    let bench = Bench::new(3, settings(), None);
    bench.report(0, &[ERROR, ERROR, GOOD, ERROR, ERROR]).await;
    assert!(bench.out().is_empty());
    bench.report(0, &[ERROR]).await;
    assert_eq!(bench.out(), [0]);
    // A 500 is no gateway error.
    bench.report(1, &[GATEWAY, ERROR]).await;
    assert_eq!(bench.out(), [0]);
    bench.report(2, &[GATEWAY, GATEWAY]).await;
    assert_eq!(bench.out(), [0, 2]);
    // What is out gets no requests.
    let picked = (0..50).filter_map(|lot| Picking::new(&bench.cluster).next(lot, Avoid::default()));
    assert!(picked.into_iter().all(|endpoint| Arc::ptr_eq(&endpoint, &bench.endpoints[1])));
}

#[tokio::test(start_paused = true)]
async fn an_ejection_ends_at_an_interval_and_the_next_takes_longer() {
    let bench = Bench::new(3, settings(), None);
    sleep(Duration::from_secs(2)).await;
    let mut lasted = Vec::new();
    for _ in 0..3 {
        bench.report(0, &[ERROR; 3]).await;
        assert_eq!(bench.out(), [0]);
        let mut seconds = 0;
        while !bench.out().is_empty() {
            sleep(Duration::from_secs(1)).await;
            seconds += 1;
        }
        lasted.push(seconds);
    }
    // 15, 30 and 45 seconds, up to the next look, which come every five; less what was forgiven in between.
    assert!(
        (15..=20).contains(&lasted[0]) && (30..=35).contains(&lasted[1]) && (45..=50).contains(&lasted[2]),
        "{lasted:?}"
    );
    sleep(Duration::from_secs(60)).await;
    bench.report(0, &[ERROR; 3]).await;
    sleep(Duration::from_secs(20)).await;
    assert!(bench.out().is_empty(), "what did well for a minute is forgiven");
}

#[tokio::test(start_paused = true)]
async fn one_is_ejected_with_the_default_share_and_no_second_one() {
    let outlier = OutlierSettings {
        max_percent: 10,
        ..settings()
    };
    let bench = Bench::new(3, outlier.clone(), None);
    bench.report(0, &[ERROR; 3]).await;
    bench.report(1, &[ERROR; 3]).await;
    assert_eq!(bench.out(), [0]);
    // The only one is never taken.
    let alone = Bench::new(1, outlier, None);
    alone.report(0, &[ERROR; 30]).await;
    assert!(alone.out().is_empty());
}

#[tokio::test(start_paused = true)]
async fn failures_to_connect_count_apart_where_that_is_asked_for() {
    let outlier = OutlierSettings {
        split: true,
        local_failures: Rule {
            consecutive: 4,
            enforcing: 100,
        },
        ..settings()
    };
    let bench = Bench::new(3, outlier, None);
    bench
        .report(0, &[Report::Failed, Report::TimedOut, Report::Failed, Report::Connected])
        .await;
    bench.report(0, &[Report::Failed; 3]).await;
    assert!(bench.out().is_empty());
    bench.report(0, &[Report::Failed]).await;
    assert_eq!(bench.out(), [0]);
    // Together they are gateway errors.
    let together = Bench::new(3, settings(), None);
    together.report(0, &[Report::Failed, Report::TimedOut]).await;
    assert_eq!(together.out(), [0]);
}

#[tokio::test(start_paused = true)]
async fn rates_are_compared_at_the_end_of_an_interval() {
    let outlier = OutlierSettings {
        server_errors: Rule {
            consecutive: 0,
            enforcing: 0,
        },
        ..settings()
    };
    let bench = Bench::new(5, outlier.clone(), None);
    for at in 0..5 {
        for _ in 0..100 {
            let report = if at == 0 && fastrand::bool() { ERROR } else { GOOD };
            bench
                .engine
                .proxy
                .outliers
                .report(&bench.cluster, &bench.endpoints[at], report);
        }
    }
    assert!(bench.out().is_empty());
    sleep(Duration::from_secs(7)).await;
    assert_eq!(bench.out(), [0]);

    let mut by_share = outlier;
    by_share.success_rate.enforcing = 0;
    by_share.failure_percentage.enforcing = 100;
    let bench = Bench::new(5, by_share, None);
    for at in 0..5 {
        let wrong = if at == 3 { 50 } else { 30 };
        let reports: Vec<Report> = (0..50).map(|number| if number < wrong { ERROR } else { GOOD }).collect();
        bench.report(at, &reports).await;
    }
    sleep(Duration::from_secs(7)).await;
    assert_eq!(bench.out(), [3]);
}

#[tokio::test(start_paused = true)]
async fn a_share_of_zero_only_tells_and_the_log_is_envoys() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("outliers.log");
    let mut outlier = settings();
    outlier.gateway_errors.enforcing = 0;
    let bench = Bench::new(3, outlier, Some(path.clone()));
    bench.report(0, &[GATEWAY, GATEWAY]).await;
    assert!(bench.out().is_empty());
    bench.report(0, &[ERROR]).await;
    sleep(Duration::from_secs(30)).await;
    assert!(bench.out().is_empty());
    bench.engine.logs.flush(Duration::from_secs(5)).await;
    let text = std::fs::read_to_string(&path).unwrap();
    let year = humantime::format_rfc3339(cairn_exchange::clock::wall()).to_string()[..4].to_owned();
    let lines: Vec<String> = text
        .lines()
        .map(|line| {
            let (before, rest) = line.split_once(r#""timestamp":""#).unwrap();
            let (timestamp, after) = rest.split_once('"').unwrap();
            assert!(
                timestamp.starts_with(&year) && timestamp.ends_with('Z') && timestamp.len() == 24,
                "{timestamp}"
            );
            // It comes back at the first look after its time.
            let after = (15..=20).fold(after.to_owned(), |after, seconds| {
                after.replace(
                    &format!(r#""secs_since_last_action":"{seconds}""#),
                    r#""secs_since_last_action":"S""#,
                )
            });
            format!(r#"{before}"timestamp":"T"{after}"#)
        })
        .collect();
    assert_eq!(
        lines,
        [
            r#"{"type":"CONSECUTIVE_GATEWAY_FAILURE","timestamp":"T","cluster_name":"web","upstream_url":"10.0.0.0:8080","action":"EJECT","num_ejections":0,"enforced":false,"eject_consecutive_event":{}}"#,
            r#"{"type":"CONSECUTIVE_5XX","timestamp":"T","cluster_name":"web","upstream_url":"10.0.0.0:8080","action":"EJECT","num_ejections":1,"enforced":true,"eject_consecutive_event":{}}"#,
            r#"{"type":"CONSECUTIVE_5XX","timestamp":"T","secs_since_last_action":"S","cluster_name":"web","upstream_url":"10.0.0.0:8080","action":"UNEJECT","num_ejections":1,"enforced":false}"#,
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn what_istiod_says_of_health_does_not_end_an_ejection() {
    let bench = Bench::new(3, settings(), None);
    bench.report(0, &[ERROR; 3]).await;
    bench.cluster.state.reassess();
    assert!(bench.endpoints[0].health == Health::Healthy && !bench.endpoints[0].is_healthy());
}
