//! The label sets and numbers that a scrape shows for exchanges of each kind.

use std::{collections::BTreeSet, sync::Arc};

use cairn_exchange::{
    ClusterFacts, Exchange, Protocol, ResponseFlags,
    cel::{Options, Program},
    format::View,
};
use http::StatusCode;

use super::{Change, IstioStats, METRICS, MessageReport, Rules, Settings};
use crate::{Registry, prometheus::Format, testing};

fn scrape(registry: &Registry) -> String {
    let text = String::from_utf8(registry.render(Format::Text)).unwrap();
    text.split("# HELP process_").next().unwrap().to_owned()
}

/// The lines of one metric.
fn lines<'a>(text: &'a str, metric: &str) -> Vec<&'a str> {
    text.lines()
        .filter(|line| line.strip_prefix(metric).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .collect()
}

fn stats() -> (Registry, Arc<IstioStats>) {
    let registry = Registry::new();
    let stats = IstioStats::new(&registry, Settings::new("1.31.0"));
    (registry, stats)
}

fn report(stats: &IstioStats, exchange: &Exchange) {
    stats.report_http(&View::new(exchange), None, MessageReport::default());
}

const SOURCE: &str = concat!(
    r#"reporter="waypoint",source_workload="client-v2",source_canonical_service="client",source_canonical_revision="v2","#,
    r#"source_workload_namespace="shop",source_principal="spiffe://cluster.local/ns/shop/sa/client",source_app="client","#,
    r#"source_version="v2",source_cluster="Kubernetes","#,
);
const NO_SOURCE: &str = concat!(
    r#"reporter="waypoint",source_workload="unknown",source_canonical_service="unknown",source_canonical_revision="latest","#,
    r#"source_workload_namespace="unknown",source_principal="unknown",source_app="unknown","#,
    r#"source_version="unknown",source_cluster="unknown","#,
);
const DESTINATION: &str = concat!(
    r#"destination_workload="web-v2",destination_workload_namespace="app","#,
    r#"destination_principal="spiffe://cluster.local/ns/app/sa/web",destination_app="web",destination_version="v2","#,
    r#"destination_service="web.app.svc.cluster.local",destination_canonical_service="web","#,
    r#"destination_canonical_revision="v2",destination_service_name="web",destination_service_namespace="app","#,
    r#"destination_cluster="Kubernetes""#,
);
const NO_ENDPOINT: &str = concat!(
    r#"destination_workload="unknown",destination_workload_namespace="unknown",destination_principal="unknown","#,
    r#"destination_app="unknown",destination_version="unknown",destination_service="web.app.svc.cluster.local","#,
    r#"destination_canonical_service="unknown",destination_canonical_revision="unknown",destination_service_name="web","#,
    r#"destination_service_namespace="app",destination_cluster="unknown""#,
);
const NOTHING: &str = concat!(
    r#"destination_workload="unknown",destination_workload_namespace="unknown",destination_principal="unknown","#,
    r#"destination_app="unknown",destination_version="unknown",destination_service="unknown","#,
    r#"destination_canonical_service="unknown",destination_canonical_revision="unknown",destination_service_name="unknown","#,
    r#"destination_service_namespace="unknown",destination_cluster="unknown""#,
);

#[test]
fn labels_of_requests() {
    let plain = testing::exchange;
    let with = |edit: fn(&mut Exchange)| {
        let mut exchange = plain();
        edit(&mut exchange);
        exchange
    };
    let cases = [
        (
            "HTTP",
            plain(),
            format!(
                r#"{SOURCE}{DESTINATION},request_protocol="http",response_code="200",grpc_response_status="",response_flags="-",connection_security_policy="mutual_tls""#
            ),
        ),
        (
            "gRPC",
            testing::grpc(with(|exchange| exchange.grpc_status = Some(5))),
            format!(
                r#"{SOURCE}{DESTINATION},request_protocol="grpc",response_code="200",grpc_response_status="5",response_flags="-",connection_security_policy="mutual_tls""#
            ),
        ),
        (
            "gRPC without an answer",
            testing::grpc(with(|exchange| {
                exchange.status = None;
                exchange.flags = ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION;
            })),
            format!(
                r#"{SOURCE}{DESTINATION},request_protocol="grpc",response_code="0",grpc_response_status="",response_flags="DC",connection_security_policy="mutual_tls""#
            ),
        ),
        (
            "denied before an endpoint was chosen",
            with(|exchange| {
                exchange.status = Some(StatusCode::FORBIDDEN);
                exchange.upstream = None;
            }),
            format!(
                r#"{SOURCE}{NO_ENDPOINT},request_protocol="http",response_code="403",grpc_response_status="",response_flags="-",connection_security_policy="mutual_tls""#
            ),
        ),
        (
            "no route",
            with(|exchange| {
                exchange.status = Some(StatusCode::NOT_FOUND);
                exchange.flags = ResponseFlags::NO_ROUTE_FOUND;
                exchange.upstream = None;
                exchange.cluster = None;
            }),
            format!(
                r#"{SOURCE}{NOTHING},request_protocol="http",response_code="404",grpc_response_status="",response_flags="NR",connection_security_policy="mutual_tls""#
            ),
        ),
        (
            "a client without certificate or workload",
            with(|exchange| {
                let mut connection = testing::connection();
                connection.peer = None;
                connection.source = None;
                exchange.connection = Arc::new(connection);
            }),
            format!(
                r#"{NO_SOURCE}{DESTINATION},request_protocol="http",response_code="200",grpc_response_status="",response_flags="-",connection_security_policy="none""#
            ),
        ),
        (
            "a workload without certificate is in its own namespace",
            with(|exchange| {
                let mut connection = testing::connection();
                connection.peer = None;
                exchange.connection = Arc::new(connection);
            }),
            format!(
                r#"{}{DESTINATION},request_protocol="http",response_code="200",grpc_response_status="",response_flags="-",connection_security_policy="none""#,
                SOURCE
                    .replace("\"shop\"", "\"elsewhere\"")
                    .replace("spiffe://cluster.local/ns/shop/sa/client", "unknown")
            ),
        ),
    ];
    for (case, exchange, labels) in cases {
        let (registry, stats) = stats();
        report(&stats, &exchange);
        let text = scrape(&registry);
        assert_eq!(
            lines(&text, "istio_requests_total"),
            [format!("istio_requests_total{{{labels}}} 1")],
            "{case}"
        );
    }
}

#[test]
fn clusters_without_a_service_show_what_is_known() {
    for (name, service) in [("BlackHoleCluster", "BlackHoleCluster"), ("encap", "unknown")] {
        let (registry, stats) = stats();
        let mut exchange = testing::exchange();
        exchange.cluster = Some(Arc::new(ClusterFacts {
            name: name.into(),
            alt_stat_name: None,
            service: None,
        }));
        report(&stats, &exchange);
        let text = scrape(&registry);
        let expected = format!("destination_service_name=\"{service}\",destination_service_namespace=\"unknown\"");
        assert!(text.contains(&expected), "{text}");
    }
}

#[test]
fn a_request_is_counted_with_its_duration_and_bytes() {
    let (registry, stats) = stats();
    report(&stats, &testing::exchange());
    let text = scrape(&registry);
    let ending = |metric: &str, end: &str| {
        let found = lines(&text, metric);
        assert!(found.iter().any(|line| line.ends_with(end)), "{metric}: {found:#?}");
    };
    ending("istio_request_duration_milliseconds_bucket", r#"le="1"} 0"#);
    ending("istio_request_duration_milliseconds_bucket", r#"le="5"} 1"#);
    ending("istio_request_duration_milliseconds_bucket", r#"le="3600000"} 1"#);
    ending("istio_request_duration_milliseconds_bucket", r#"le="+Inf"} 1"#);
    ending("istio_request_duration_milliseconds_sum", "} 4");
    ending("istio_request_duration_milliseconds_count", "} 1");
    ending("istio_request_bytes_bucket", r#"le="50"} 0"#);
    ending("istio_request_bytes_bucket", r#"le="100"} 1"#);
    ending("istio_request_bytes_sum", "} 100");
    ending("istio_response_bytes_sum", "} 700");
    ending("istio_build", r#"istio_build{component="proxy",tag="1.31.0"} 1"#);
    let bounds: Vec<_> = lines(&text, "istio_request_bytes_bucket")
        .iter()
        .map(|line| line.split("le=\"").nth(1).unwrap().split('"').next().unwrap())
        .collect();
    assert_eq!(
        bounds.join(","),
        "0.5,1,5,10,25,50,100,250,500,1000,2500,5000,10000,30000,60000,300000,600000,1800000,3600000,+Inf"
    );
}

#[test]
fn messages_of_a_stream_are_told_as_they_come() {
    let (registry, stats) = stats();
    let mut exchange = testing::grpc(testing::exchange());
    exchange.status = None;
    exchange.counts.request_messages = 3;
    let mut reported = MessageReport::default();
    stats.report_messages(&View::new(&exchange), None, &mut reported);
    let labels = format!("{SOURCE}{DESTINATION}");
    let text = scrape(&registry);
    assert_eq!(
        lines(&text, "istio_request_messages_total"),
        [format!("istio_request_messages_total{{{labels}}} 3")],
        "labels of the parties alone"
    );
    exchange.counts.request_messages = 5;
    exchange.counts.response_messages = 1;
    exchange.status = Some(StatusCode::OK);
    stats.report_http(&View::new(&exchange), None, reported);
    let text = scrape(&registry);
    assert_eq!(
        lines(&text, "istio_request_messages_total"),
        [format!("istio_request_messages_total{{{labels}}} 5")]
    );
    assert_eq!(
        lines(&text, "istio_response_messages_total"),
        [format!("istio_response_messages_total{{{labels}}} 1")]
    );
}

#[test]
fn a_tcp_connection_is_opened_progresses_and_closes_under_one_set_of_labels() {
    let (registry, stats) = stats();
    let mut exchange = testing::exchange();
    exchange.protocol = Protocol::Tcp;
    exchange.request = None;
    exchange.status = None;
    (exchange.counts.received, exchange.counts.sent) = (10, 20);
    let shown = |metric: &str| {
        let text = scrape(&registry);
        let found = lines(&text, metric);
        assert_eq!(found.len(), 1, "{metric}: {found:#?}");
        found[0].to_owned()
    };
    let labels =
        format!(r#"{SOURCE}{DESTINATION},request_protocol="tcp",response_flags="-",connection_security_policy="mutual_tls""#);
    let mut tcp = stats.report_open(&exchange, &[None]);
    assert_eq!(
        shown("istio_tcp_connections_opened_total"),
        format!("istio_tcp_connections_opened_total{{{labels}}} 1")
    );
    assert_eq!(
        shown("istio_tcp_received_bytes_total"),
        format!("istio_tcp_received_bytes_total{{{labels}}} 10")
    );
    exchange.counts.sent = 100;
    tcp.progress(&exchange);
    assert_eq!(
        shown("istio_tcp_sent_bytes_total"),
        format!("istio_tcp_sent_bytes_total{{{labels}}} 100")
    );
    assert!(shown("istio_tcp_connections_closed_total").ends_with(" 0"));
    exchange.counts.received = 11;
    exchange.flags = ResponseFlags::UPSTREAM_REMOTE_RESET;
    tcp.close(&exchange);
    assert_eq!(
        shown("istio_tcp_received_bytes_total"),
        format!("istio_tcp_received_bytes_total{{{labels}}} 11")
    );
    assert_eq!(
        shown("istio_tcp_connections_closed_total"),
        format!("istio_tcp_connections_closed_total{{{labels}}} 1")
    );
}

#[test]
fn equal_labels_are_one_series_whatever_objects_they_come_from() {
    let (registry, stats) = stats();
    for _ in 0..3 {
        // New objects each time, as after a push of the same configuration.
        report(&stats, &testing::exchange());
    }
    let exchange = testing::exchange();
    report(&stats, &exchange);
    report(&stats, &exchange);
    let text = scrape(&registry);
    let found = lines(&text, "istio_requests_total");
    assert_eq!(found.len(), 1);
    assert!(found[0].ends_with(" 5"), "{found:?}");
}

#[test]
fn what_differs_is_a_series_of_its_own() {
    let (registry, stats) = stats();
    let base = testing::exchange();
    report(&stats, &base);
    let mut other = testing::exchange();
    other.connection = Arc::clone(&base.connection);
    other.cluster = base.cluster.clone();
    other.upstream = base.upstream.clone();
    other.status = Some(StatusCode::IM_A_TEAPOT);
    report(&stats, &other);
    other.flags = ResponseFlags::FAULT_INJECTED;
    report(&stats, &other);
    other.upstream = None;
    report(&stats, &other);
    let text = scrape(&registry);
    let found: BTreeSet<_> = lines(&text, "istio_requests_total").into_iter().collect();
    assert_eq!(found.len(), 4);
    assert!(found.iter().all(|line| line.ends_with(" 1")), "{found:#?}");
}

#[test]
fn series_beyond_the_limit_are_dropped_and_counted() {
    let registry = Registry::new();
    let stats = IstioStats::new(
        &registry,
        Settings {
            max_series: 2,
            ..Settings::new("x")
        },
    );
    let mut exchange = testing::exchange();
    for status in [200, 201, 202, 202, 200] {
        exchange.status = Some(StatusCode::from_u16(status).unwrap());
        report(&stats, &exchange);
    }
    let text = scrape(&registry);
    assert_eq!(lines(&text, "istio_requests_total").len(), 2);
    assert_eq!(
        lines(&text, "cairn_istio_stats_dropped_total"),
        ["cairn_istio_stats_dropped_total 2"]
    );
}

#[test]
fn counts_of_many_threads_add_up() {
    let (registry, stats) = stats();
    std::thread::scope(|scope| {
        for thread in 0..4_u16 {
            let stats = &stats;
            scope.spawn(move || {
                let mut exchange = testing::exchange();
                for round in 0..2_000_u16 {
                    exchange.status = Some(StatusCode::from_u16(200 + (round + thread) % 4).unwrap());
                    report(stats, &exchange);
                }
            });
        }
    });
    let text = scrape(&registry);
    let sum = |metric: &str| -> u64 {
        lines(&text, metric)
            .iter()
            .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
            .sum()
    };
    assert_eq!(lines(&text, "istio_requests_total").len(), 4);
    assert_eq!(sum("istio_requests_total"), 8_000);
    assert_eq!(sum("istio_request_duration_milliseconds_count"), 8_000);
    assert_eq!(sum("istio_request_duration_milliseconds_sum"), 32_000);
}

/// What Prometheus' parser insists on: families announced once and before their samples, samples of one family together, label
/// syntax, a number at the end, buckets that grow, no series twice.
fn check(text: &str) -> usize {
    let mut announced = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut family = ("", "");
    let mut last_bucket = (String::new(), 0.0_f64, 0_u64);
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            match (words.next(), words.next(), words.next()) {
                (Some("TYPE"), Some(name), Some(kind)) => {
                    assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                    assert!(announced.insert(name), "announced twice: {line}");
                    family = (name, kind);
                }
                (Some("HELP"), Some(_), Some(_)) => {}
                _ => panic!("{line}"),
            }
            continue;
        }
        let name_end = line.find(['{', ' ']).unwrap_or_else(|| panic!("{line}"));
        let (name, rest) = line.split_at(name_end);
        let suffix = name
            .strip_prefix(family.0)
            .unwrap_or_else(|| panic!("{line} after family {}", family.0));
        match family.1 {
            "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
            _ => assert_eq!(suffix, "", "{line}"),
        }
        let (labels, value) = parse_labels(rest);
        let value: f64 = value.trim_start().parse().unwrap_or_else(|_| panic!("{line}"));
        assert!(seen.insert((name.to_owned(), labels.clone())), "twice: {line}");
        if suffix == "_bucket" {
            let (bound, others): (Vec<_>, Vec<_>) = labels.into_iter().partition(|(name, _)| name == "le");
            let bound: f64 = bound[0].1.parse().unwrap();
            let others = format!("{name}{others:?}");
            if last_bucket.0 == others {
                assert!(last_bucket.1 < bound && last_bucket.2 <= value as u64, "{line}");
            }
            last_bucket = (others, bound, value as u64);
        }
    }
    seen.len()
}

/// Label names and values, and what follows them.
fn parse_labels(text: &str) -> (BTreeSet<(String, String)>, &str) {
    let mut labels = BTreeSet::new();
    let Some(mut rest) = text.strip_prefix('{') else {
        return (labels, text);
    };
    loop {
        let (name, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("{text}"));
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{name}");
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next() {
                Some((at, '"')) => break at,
                Some((_, '\\')) => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, c @ ('\\' | '"'))) => value.push(c),
                    other => panic!("{other:?} in {text}"),
                },
                Some((_, c)) => value.push(c),
                None => panic!("{text}"),
            }
        };
        assert!(labels.insert((name.to_owned(), value)), "{name} twice in {text}");
        rest = &after[end + 1..];
        match rest.split_at(1) {
            (",", more) => rest = more,
            ("}", after) => return (labels, after),
            _ => panic!("{text}"),
        }
    }
}

#[test]
fn a_scrape_parses() {
    let (registry, stats) = stats();
    registry.gauge("cairn_tunnels", "Tunnels.", &[("odd", "a\"b\\c\nd")]).set(-1);
    report(&stats, &testing::exchange());
    report(&stats, &testing::grpc(testing::exchange()));
    stats.report_open(&testing::exchange(), &[None]).close(&testing::exchange());
    let text = String::from_utf8(registry.render(Format::Text)).unwrap();
    // Requests: 2 × (1 + 3 × 22); messages: 2; TCP: 4; build; dropped; tunnels; and at least 5 of the process.
    assert!(check(&text) >= 134 + 2 + 4 + 3 + 5, "{text}");
}

#[test]
fn a_filter_changes_labels_and_leaves_metrics_out() {
    let (registry, stats) = stats();
    let program = |text| Program::parse(text, Options::ALL).unwrap();
    let metric = |name| METRICS.iter().position(|known| *known == name);
    let changes = vec![
        Change {
            metric: metric("requests_total"),
            remove: vec!["destination_principal".into()],
            set: vec![
                ("x-y".into(), program("request.headers['no']")),
                ("source_app".into(), program("'mine'")),
                ("request_host".into(), program("request.host")),
            ],
            ..Change::default()
        },
        Change {
            metric: metric("request_bytes"),
            drop: true,
            ..Change::default()
        },
    ];
    let rules = Arc::new(Rules::new(changes, None));
    for _ in 0..2 {
        stats.report_http(&View::new(&testing::exchange()), Some(&rules), MessageReport::default());
    }
    let text = scrape(&registry);
    let [line] = lines(&text, "istio_requests_total")[..] else {
        panic!("{text}")
    };
    assert!(
        line.contains(r#"source_app="mine","#) && !line.contains("destination_principal"),
        "{line}"
    );
    assert!(
        line.ends_with(r#",connection_security_policy="mutual_tls",request_host="web",x_y="unknown"} 2"#),
        "{line}"
    );
    let untouched = lines(&text, "istio_response_bytes_count");
    assert!(
        untouched[0].contains(DESTINATION) && untouched[0].ends_with(" 2"),
        "{untouched:?}"
    );
    assert!(!text.contains("istio_request_bytes"), "{text}");
    report(&stats, &testing::exchange());
    assert_eq!(
        lines(&scrape(&registry), "istio_request_bytes_count").len(),
        1,
        "other chains have it"
    );
}

#[test]
fn what_is_said_of_all_metrics_holds_for_connections_too() {
    let (registry, stats) = stats();
    let change = Change {
        remove: vec!["source_app".into()],
        set: vec![("response_code".into(), Program::parse("1", Options::ALL).unwrap())],
        ..Change::default()
    };
    let filters = [Some(Arc::new(Rules::new(vec![change], None)))];
    let mut exchange = testing::exchange();
    exchange.protocol = Protocol::Tcp;
    stats.report_open(&exchange, &filters).close(&exchange);
    let text = scrape(&registry);
    for metric in ["opened_total", "closed_total"] {
        let [line] = lines(&text, &format!("istio_tcp_connections_{metric}"))[..] else {
            panic!("{text}")
        };
        assert!(
            !line.contains("source_app") && !line.contains("response_code") && line.ends_with(" 1"),
            "{line}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn series_that_nobody_reports_are_forgotten_where_a_filter_says_so() {
    let (registry, stats) = stats();
    let minute = std::time::Duration::from_secs(60);
    let rules = Arc::new(Rules::new(vec![], Some(minute)));
    let report = || stats.report_http(&View::new(&testing::exchange()), Some(&rules), MessageReport::default());
    let count = || lines(&scrape(&registry), "istio_requests_total").len();
    report();
    tokio::spawn(IstioStats::rotate(Arc::downgrade(&stats)));
    for _ in 0..5 {
        tokio::time::sleep(minute / 2).await;
        report();
        assert_eq!(count(), 1, "it is in use");
    }
    tokio::time::sleep(3 * minute).await;
    assert_eq!(count(), 0);
    report();
    assert_eq!(count(), 1, "it is found anew");
}
